"""The maths of algos/td3.py against definitions and Stable-Baselines3."""

import copy

import pytest
import td3
import torch
from gymnasium.spaces import Box
from parity import assert_parameters_agree, copy_critics, follow_replay, recorded_envs
from stable_baselines3 import TD3
from test_replay import CPU

SPACES = Box(-1, 1, (3,)), Box(-1, 1, (2,))


def agent_and_batch(num_critics=2, size=64):
    torch.manual_seed(0)
    agent, target = (td3.DeterministicActorCritics(*SPACES, (16, 16), num_critics) for _ in range(2))
    batch = td3.Transitions(
        observations=torch.randn(size, 3),
        actions=torch.rand(size, 2) * 2 - 1,
        rewards=torch.randn(size),
        next_observations=torch.randn(size, 3),
        terminated=torch.rand(size) < 0.3,
        truncated=torch.rand(size) < 0.3,
    )
    return agent, target.requires_grad_(False), batch


def assert_gradients(agent, loss, network):
    """Its parameters have the gradient of `loss`, and the agent's others none."""
    parameters = dict(getattr(agent, network).named_parameters(prefix=network))
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    ours = {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_critics", [2, 4])
def test_the_critics_gradient_against_the_definition(num_critics):
    """The noise is clipped in some places, the action in others, and neither in the rest."""
    agent, target, batch = agent_and_batch(num_critics)
    target.actor[-2].weight.data *= 10
    noise, args = torch.randn(64, 2), td3.Args(gamma=0.9, target_noise=0.6, target_noise_clip=0.5)
    metrics = td3.td3_critic_gradient(agent, target, batch, noise, args)
    loss, values, clipped = 0, [], []
    for i in range(64):
        s, a, r, s_next, terminated, _ = (x[i : i + 1] for x in batch)
        smoothing = [min(max(0.6 * x, -0.5), 0.5) for x in noise[i].tolist()]
        a_next = [min(max(x + y, -1), 1) for x, y in zip(target.actor(s_next)[0].tolist(), smoothing)]
        clipped += [(abs(x) == 0.5, abs(y) == 1) for x, y in zip(smoothing, a_next)]
        y = r + (0 if terminated else 0.9 * min(target.critics(s_next, torch.tensor([a_next]))))
        values += agent.critics(s, a).flatten()
        loss = loss + sum((q - y).square() for q in values[-num_critics:]).squeeze() / 64
    assert all(clipped.count(x) > 3 for x in ((True, False), (False, True), (False, False)))
    assert_gradients(agent, loss, "critics")
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["q_values"].item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)


def test_the_policy_climbs_the_first_critic_alone():
    agent, _, batch = agent_and_batch()
    metrics = td3.td3_actor_gradient(agent, batch)
    loss = -agent.critics(batch.observations, agent.actor(batch.observations))[0].mean()
    assert_gradients(agent, loss, "actor")
    assert metrics["actor_loss"].item() == pytest.approx(loss.item(), abs=1e-6)


def test_ornstein_uhlenbeck_noise_has_its_mean_variance_and_correlation():
    torch.manual_seed(0)
    x, xs = torch.zeros(2000), []
    for _ in range(400):
        x = td3.ornstein_uhlenbeck(x, torch.randn(2000), sigma=0.2, theta=0.15)
        xs.append(x)
    late = torch.stack(xs[100:])
    variance = 0.2**2 / (1 - 0.85**2)
    assert late.mean().item() == pytest.approx(0, abs=0.01)
    assert late.var().item() == pytest.approx(variance, rel=0.03)
    assert (late[:-1] * late[1:]).mean().item() == pytest.approx(0.85 * variance, rel=0.03)
    white = td3.ornstein_uhlenbeck(x, torch.ones(2000), sigma=0.2, theta=1.0)
    torch.testing.assert_close(white, torch.full((2000,), 0.2))


@pytest.mark.parametrize("env_id, num_critics", [("Pendulum-v1", 2), ("Pendulum-v1", 3), ("Hopper-v5", 2)])
def test_updates_agree_with_sb3(env_id, num_critics, record_property):
    """SB3's own learn() and train(), over the same data with the same minibatches and smoothing noise."""
    env = recorded_envs(env_id, 1)
    settings = dict(learning_rate=1e-3, batch_size=32, gamma=0.97, tau=0.05, policy_delay=2)
    model = TD3(
        "MlpPolicy",
        env,
        **settings,
        buffer_size=300,
        learning_starts=100,
        target_policy_noise=0.3,
        target_noise_clip=0.4,
        policy_kwargs=dict(net_arch=[16, 16], n_critics=num_critics),
        seed=0,
        device="cpu",
    )
    args = td3.Args(target_noise=0.3, target_noise_clip=0.4, num_critics=num_critics, **settings)
    agent = td3.DeterministicActorCritics(env.observation_space, env.action_space, (16, 16), num_critics)
    for ours, theirs in zip(agent.actor.parameters(), model.actor.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    copy_critics(model.critic, agent.critics)
    target, start = (copy.deepcopy(agent).requires_grad_(False) for _ in range(2))
    critic_optimizer = torch.optim.Adam(agent.critics.parameters(), args.learning_rate)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), args.learning_rate)
    buffer = td3.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)
    updates = 0

    def update(rows):
        nonlocal updates
        updates += 1
        batch = buffer.get(rows)
        critic_optimizer.zero_grad()
        td3.td3_critic_gradient(agent, target, batch, torch.randn_like(batch.actions), args)
        critic_optimizer.step()
        if updates % args.policy_delay == 0:
            actor_optimizer.zero_grad()
            td3.td3_actor_gradient(agent, batch)
            actor_optimizer.step()
            td3.polyak_update(target, agent, args.tau)

    assert follow_replay(model, buffer, 400, update) == 300
    worst = 0.0
    for ours, actor, critic in ((agent, model.actor, model.critic), (target, model.actor_target, model.critic_target)):
        worst = max(worst, assert_parameters_agree(ours.actor, actor, 1e-5, start.actor.state_dict()))
        theirs = copy_critics(critic, copy.deepcopy(start.critics))
        worst = max(worst, assert_parameters_agree(ours.critics, theirs, 1e-5, start.critics.state_dict()))
    record_property("largest difference", worst)
    print(f"td3, {env_id}, {num_critics} critics: largest difference {worst:.1e} after {updates} updates")
