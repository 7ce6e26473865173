"""The maths of algos/ddpg.py against definitions and Stable-Baselines3."""

import copy

import ddpg
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from parity import assert_parameters_agree, follow_replay, recorded_envs
from stable_baselines3 import DDPG
from test_replay import CPU


def make_agent(seed):
    torch.manual_seed(seed)
    return ddpg.DeterministicActorCritic(Box(-1, 1, (3,)), Box(-1, 1, (2,)), (16, 16))


def make_batch(size=32):
    return ddpg.Transitions(
        observations=torch.randn(size, 3),
        actions=torch.rand(size, 2) * 2 - 1,
        rewards=torch.randn(size),
        next_observations=torch.randn(size, 3),
        terminated=torch.rand(size) < 0.3,
        truncated=torch.rand(size) < 0.3,
    )


def gradients(agent):
    """By name, of the parameters that have one."""
    return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}


def test_the_critics_gradient_against_the_definition():
    agent, target, batch = make_agent(0), make_agent(1), make_batch()
    metrics = ddpg.ddpg_critic_gradient(agent, target, batch, ddpg.Args(gamma=0.9))
    errors, values = [], []
    for s, a, r, s_next, terminated, _ in zip(*batch):
        y = r + (0 if terminated else 0.9 * target.critic(torch.cat([s_next, target.actor(s_next)])).item())
        values.append(agent.critic(torch.cat([s, a])))
        errors.append((values[-1] - y).square())
    loss, parameters = torch.cat(errors).mean(), dict(agent.critic.named_parameters(prefix="critic"))
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    torch.testing.assert_close(gradients(agent), expected, rtol=1e-4, atol=1e-6)
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["q_values"].item() == pytest.approx(np.mean([x.item() for x in values]), abs=1e-5)
    assert not gradients(target)


def test_the_policys_gradient_is_that_of_the_theorem():
    """∇J = E[∇_a Q(s, a) ∇_φ μ_φ(s)] at a = μ_φ(s) (deterministic policy gradient, arXiv 1509.02971, eq. 6)."""
    agent, batch = make_agent(0), make_batch()
    metrics = ddpg.ddpg_actor_gradient(agent, batch)
    states, parameters = batch.observations, dict(agent.actor.named_parameters(prefix="actor"))
    actions = agent.actor(states).detach().requires_grad_()
    q_values = agent.q_value(states, actions)
    (slope,) = torch.autograd.grad(q_values.sum(), actions)
    theorem = torch.autograd.grad((agent.actor(states) * slope).sum(1).mean(), parameters.values())
    torch.testing.assert_close(gradients(agent), dict(zip(parameters, (-x for x in theorem))))
    assert metrics["actor_loss"].item() == pytest.approx(-q_values.mean().item(), abs=1e-6)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
def test_updates_agree_with_sb3(env_id, record_property):
    """SB3's own learn() and train(), over the same data with the same minibatches."""
    env = recorded_envs(env_id, 1)
    settings = dict(learning_rate=1e-3, batch_size=32, gamma=0.97, tau=0.05)
    options = dict(buffer_size=300, learning_starts=200, policy_kwargs=dict(net_arch=[16, 16]), seed=0, device="cpu")
    model, args = DDPG("MlpPolicy", env, **settings, **options), ddpg.Args(**settings)
    agent = ddpg.DeterministicActorCritic(env.observation_space, env.action_space, (16, 16))
    for ours, theirs in ((agent.actor, model.actor), (agent.critic, model.critic)):
        for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
            x.data.copy_(y.data)
    target, start = (copy.deepcopy(agent).requires_grad_(False) for _ in range(2))
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), args.learning_rate)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), args.learning_rate)
    buffer = ddpg.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)

    def update(rows):
        batch = buffer.get(rows)
        critic_optimizer.zero_grad()
        ddpg.ddpg_critic_gradient(agent, target, batch, args)
        critic_optimizer.step()
        actor_optimizer.zero_grad()
        ddpg.ddpg_actor_gradient(agent, batch)
        actor_optimizer.step()
        ddpg.polyak_update(target, agent, args.tau)

    assert follow_replay(model, buffer, 400, update) == 200
    worst = 0.0
    for ours, actor, critic in ((agent, model.actor, model.critic), (target, model.actor_target, model.critic_target)):
        worst = max(worst, assert_parameters_agree(ours.actor, actor, 1e-5, start.actor.state_dict()))
        worst = max(worst, assert_parameters_agree(ours.critic, critic, 1e-5, start.critic.state_dict()))
    record_property("largest difference", worst)
    print(f"ddpg, {env_id}: largest difference {worst:.1e} after 200 updates")


def test_adam_on_one_vector_is_adam_on_each_parameter():
    """Also with another learning rate, and after either has taken over its state, as on --resume."""
    torch.manual_seed(0)
    networks = [ddpg.relu_mlp([3, 50, 2]) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.Adam(networks[0].parameters(), 1e-2), torch.optim.Adam(networks[1].parameters(), 1e-2)]
    for steps in range(1, 31):
        x, scale = torch.randn(16, 3), 10.0 ** (steps % 4 - 3)
        for network, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            (scale * network(x).square().mean()).backward()
            optimizer.step()
        torch.testing.assert_close(*(list(network.parameters()) for network in networks))
        if steps == 10:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 3e-4
        if steps == 20:
            states = [copy.deepcopy(x.state_dict()) for x in optimizers]
            optimizers = [type(x)(network.parameters(), 1e-2) for x, network in zip(optimizers, networks)]
            for optimizer, state in zip(optimizers, states):
                optimizer.load_state_dict(state)
