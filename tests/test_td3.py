"""The maths of algos/td3.py against definitions and Stable-Baselines3."""

import copy

import numpy as np
import pytest
import td3
import torch
from gymnasium.spaces import Box
from parity import assert_parameters_agree, copy_critics, follow_replay, recorded_envs
from stable_baselines3 import TD3
from test_replay import CPU, stream
from torch import nn

SPACES = Box(-1, 1, (3,)), Box(-1, 1, (2,))


def agent_and_batch(num_critics=2, size=32):
    torch.manual_seed(0)
    agent, target = (td3.DeterministicActorCritics(*SPACES, (16, 16), num_critics) for _ in range(2))
    buffer = td3.ReplayBuffer(size, 1, *SPACES, CPU)
    for step in stream(size, 1, *SPACES):
        buffer.add(*step)
    batch = buffer.get(torch.arange(size))
    batch = batch._replace(
        observations=torch.randn(size, 3), next_observations=torch.randn(size, 3), actions=torch.rand(size, 2) * 2 - 1
    )
    return agent, target.requires_grad_(False), batch


def test_ensemble_is_its_members_side_by_side():
    torch.manual_seed(0)
    ensemble = td3.CriticEnsemble(5, 7, (16, 8))
    states, actions = torch.randn(10, 4), torch.randn(10, 3)
    values = ensemble(states, actions)
    assert values.shape == (5, 10)
    for i in range(5):
        layers = []
        for layer in ensemble.layers:
            linear = nn.Linear(*layer.weight[i].shape)
            linear.weight.data, linear.bias.data = layer.weight[i].T, layer.bias[i, 0]
            layers += [linear, nn.ReLU()]
        expected = nn.Sequential(*layers[:-1])(torch.cat([states, actions], 1)).squeeze(1)
        torch.testing.assert_close(values[i], expected)
    for members in (slice(1), slice(2, 4), torch.tensor([4, 1])):
        torch.testing.assert_close(ensemble(states, actions, members), values[members])


def test_ensemble_starts_as_pytorchs_linear_layers_do_each_member_with_its_own():
    torch.manual_seed(0)
    layer, linear = td3.EnsembleLinear(3, 400, 300), nn.Linear(400, 300)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max().item() == pytest.approx(0.05, rel=0.02) == theirs.abs().max().item()
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert not torch.equal(layer.weight[0], layer.weight[1])


@pytest.mark.parametrize("num_critics", [2, 4])
def test_targets_and_losses_against_the_definition(num_critics):
    agent, target, batch = agent_and_batch(num_critics)
    noise = torch.randn(32, 2)
    loss, q_values = td3.td3_critic_loss(agent, target, batch, noise, td3.Args(gamma=0.9, target_noise_clip=0.3))
    total, values = 0, []
    for i in range(32):
        s, a, r, s_next, terminated, _ = (x[i : i + 1] for x in batch)
        a_next = (target.actor(s_next) + noise[i].clamp(-0.3, 0.3)).clamp(-1, 1)
        y = r + (0 if terminated else 0.9 * min(target.critics(s_next, a_next)))
        total += sum((q - y).square() for q in agent.critics(s, a)).item() / 32
        values += agent.critics(s, a).flatten().tolist()
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert q_values.item() == pytest.approx(np.mean(values), abs=1e-5)
    expected = -agent.critics(batch.observations, agent.actor(batch.observations))[0].mean()
    torch.testing.assert_close(td3.td3_actor_loss(agent, batch.observations), expected)


def test_smoothing_stays_within_both_bounds():
    torch.manual_seed(0)
    actions, noise = torch.rand(1000, 2) * 2 - 1, 2 * torch.randn(1000, 2)
    smoothed = td3.smoothed_actions(actions, noise, 0.5)
    assert (smoothed - actions).abs().max() == pytest.approx(0.5) and smoothed.abs().max() == 1
    inside = (noise.abs() < 0.5) & ((actions + noise).abs() < 1)
    torch.testing.assert_close(smoothed[inside], (actions + noise)[inside])


def test_updates_move_what_they_should_and_nothing_else():
    agent, target, batch = agent_and_batch()
    optimizers = [td3.vector_adam(x, 1e-2) for x in (agent.actor, agent.critics)]
    noise = torch.randn(32, 2)

    def moved(update):
        before = {name: x.clone() for module in (agent, target) for name, x in named(module).items()}
        update()
        after = {name: x for module in (agent, target) for name, x in named(module).items()}
        return {name for name in before if not torch.equal(before[name], after[name])}

    def named(module):
        owner = "agent" if module is agent else "target"
        return {f"{owner}.{name.split('.')[0]}.{name}": x.detach() for name, x in module.named_parameters()}

    def groups(names):
        return {".".join(name.split(".")[:2]) for name in names}

    critics = moved(lambda: td3.td3_critic_update(agent, target, optimizers[1], batch, noise, td3.Args()))
    assert groups(critics) == {"agent.critics"}
    actor = moved(lambda: td3.td3_actor_update(agent, target, optimizers[0], batch, td3.Args()))
    assert groups(actor) == {"agent.actor", "target.actor", "target.critics"}
    assert all(x.grad is None for x in target.parameters())


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
    target = copy.deepcopy(agent).requires_grad_(False)
    start = copy.deepcopy(agent)
    actor_optimizer, critic_optimizer = (td3.vector_adam(x, 1e-3) for x in (agent.actor, agent.critics))
    buffer = td3.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)
    updates = 0

    def update(rows):
        nonlocal updates
        updates += 1
        batch = buffer.get(rows)
        noise = torch.randn_like(batch.actions) * args.target_noise
        td3.td3_critic_update(agent, target, critic_optimizer, batch, noise, args)
        if updates % args.policy_delay == 0:
            td3.td3_actor_update(agent, target, actor_optimizer, batch, args)

    assert follow_replay(model, buffer, 400, update) == 300
    worst = 0.0
    for ours, actor, critic in ((agent, model.actor, model.critic), (target, model.actor_target, model.critic_target)):
        worst = max(worst, assert_parameters_agree(ours.actor, actor, 1e-5, start.actor.state_dict()))
        theirs = copy_critics(critic, copy.deepcopy(start.critics))
        worst = max(worst, assert_parameters_agree(ours.critics, theirs, 1e-5, start.critics.state_dict()))
    record_property("largest difference", worst)
    print(f"td3, {env_id}, {num_critics} critics: largest difference {worst:.1e} after {updates} updates")
