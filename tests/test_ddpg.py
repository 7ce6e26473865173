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


def test_losses_against_the_definition():
    agent, target, batch = make_agent(0), make_agent(1), make_batch()
    loss, q_values = ddpg.ddpg_critic_loss(agent, target, batch, ddpg.Args(gamma=0.9))
    errors, values = [], []
    for s, a, r, s_next, terminated, _ in zip(*batch):
        y = r + (0 if terminated else 0.9 * target.critic(torch.cat([s_next, target.actor(s_next)])).item())
        values.append(agent.critic(torch.cat([s, a])).item())
        errors.append((values[-1] - y) ** 2)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert q_values.item() == pytest.approx(np.mean(values), abs=1e-5)


def test_the_policys_gradient_is_that_of_the_theorem():
    """∇J = E[∇_a Q(s, a) ∇_φ μ_φ(s)] at a = μ_φ(s) (deterministic policy gradient, arXiv 1509.02971, eq. 6)."""
    agent, states = make_agent(0), torch.randn(32, 3)
    ours = torch.autograd.grad(ddpg.ddpg_actor_loss(agent, states), list(agent.actor.parameters()))
    actions = agent.actor(states).detach().requires_grad_()
    (slope,) = torch.autograd.grad(agent.q_value(states, actions).sum(), actions)
    theorem = torch.autograd.grad((agent.actor(states) * slope).sum(1).mean(), list(agent.actor.parameters()))
    torch.testing.assert_close(ours, tuple(-x for x in theorem))


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
def test_updates_agree_with_sb3(env_id, record_property):
    """SB3's own learn() and train(), over the same data with the same minibatches."""
    env = recorded_envs(env_id, 1)
    settings = dict(learning_rate=1e-3, batch_size=32, gamma=0.97, tau=0.05)
    options = dict(buffer_size=300, learning_starts=200, policy_kwargs=dict(net_arch=[16, 16]), seed=0, device="cpu")
    model = DDPG("MlpPolicy", env, **settings, **options)
    agent = ddpg.DeterministicActorCritic(env.observation_space, env.action_space, (16, 16))
    pairs = (agent.actor, model.actor), (agent.critic, model.critic)
    for ours, theirs in pairs:
        for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
            x.data.copy_(y.data)
    target, start = (copy.deepcopy(agent).requires_grad_(False) for _ in range(2))
    optimizers = [ddpg.vector_adam(x, 1e-3) for x in (agent.actor, agent.critic)]
    buffer = ddpg.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)

    def update(rows):
        ddpg.ddpg_update(agent, target, *optimizers, buffer.get(rows), ddpg.Args(**settings))

    assert follow_replay(model, buffer, 400, update) == 200
    worst = 0.0
    for ours, actor, critic in ((agent, model.actor, model.critic), (target, model.actor_target, model.critic_target)):
        worst = max(worst, assert_parameters_agree(ours.actor, actor, 1e-5, start.actor.state_dict()))
        worst = max(worst, assert_parameters_agree(ours.critic, critic, 1e-5, start.critic.state_dict()))
    record_property("largest difference", worst)
    print(f"ddpg, {env_id}: largest difference {worst:.1e} after 200 updates")


def test_a_step_by_hand_is_the_optimisers_own_to_the_bit():
    """Learning rates may change, and either takes over the other's state."""
    torch.manual_seed(0)
    start = ddpg.relu_mlp([3, 50, 2])
    networks = [copy.deepcopy(start) for _ in range(2)]
    ours, theirs = (ddpg.vector_adam(x, 1e-2) for x in networks)
    for steps in range(1, 61):
        gradient = torch.randn(302) * 10 ** (steps % 4 - 3)
        ddpg.adam_step(ours, gradient)
        (vector,) = theirs.param_groups[0]["params"]
        vector.grad = gradient
        theirs.step()
        for a, b in zip(*(x.parameters() for x in networks), strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        assert ours.state_dict()["state"][0]["step"] == steps
        if steps == 20:
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 3e-4
        if steps == 40:
            states = copy.deepcopy([theirs.state_dict(), ours.state_dict()])
            ours, theirs = (ddpg.vector_adam(x, 1e-2) for x in networks)
            ours.load_state_dict(states[0])
            theirs.load_state_dict(states[1])


def test_adam_on_one_vector_is_adam_on_each_parameter():
    """Also after the module has taken over a state, as on --resume."""
    torch.manual_seed(0)
    ours = ddpg.relu_mlp([3, 8, 2])
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours.state_dict())
    pairs = [(ours, ddpg.vector_adam(ours, 1e-2)), (theirs, torch.optim.Adam(theirs.parameters(), 1e-2))]
    for _ in range(2):
        for x in torch.randn(3, 16, 3):
            ddpg.adam_step(pairs[0][1], ddpg.gradient_vector(ours(x).square().mean(), ours))
            pairs[1][1].zero_grad()
            theirs(x).square().mean().backward()
            pairs[1][1].step()
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))
        assert not torch.equal(ours[0].weight, start["0.weight"])
        ours.load_state_dict(start)
        theirs.load_state_dict(start)
