"""algos/trpo.py: second-order maths against dense matrices, and whole updates against sb3-contrib's."""

from dataclasses import replace

import numpy as np
import pytest
import sb3
import sb3_contrib.trpo.trpo as sb3_trpo
import scipy.stats
import stable_baselines3
import torch
import trpo
from gymnasium.spaces import Box, Discrete
from parity import assert_advantages_agree, copy_weights, follow, largest_difference, recorded_envs
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

SPACES = {"discrete": Discrete(3), "box": Box(-1, 1, (2,))}
PLAIN = trpo.Args(normalize_advantages=False)
both_kinds_of_actions = pytest.mark.parametrize("kind", SPACES)


def small_problem(kind, seed=0, dtype=torch.float64):
    """An agent whose policy is not uniform, and states, actions sampled from it, and advantages (B,)."""
    torch.manual_seed(seed)
    agent = trpo.ActorCritic(Box(-1, 1, (3,)), SPACES[kind], (5,), log_std_init=-0.3).to(dtype)
    agent.actor[-1].weight.data *= 50
    states = torch.randn(40, 3, dtype=dtype)
    actions = agent.act(states, agent.draw_noise(40).to(dtype))
    return agent, states, actions, torch.randn(40, dtype=dtype)


def small_batch(kind, args=PLAIN, seed=0):
    """The same agent, and what a step sees of the rollout."""
    agent, *rollout = small_problem(kind, seed)
    return agent, trpo.trpo_batch(agent, *rollout, args)


def take_step(agent, batch, args):
    """The policy's step as train() takes it."""
    return trpo.line_search(agent, batch, trpo.trust_region_step(agent, batch, args), args)


def objective_of(agent, batch):
    return trpo.objective_and_kl(agent, batch)[0]


def kl_of(agent, batch):
    return trpo.objective_and_kl(agent, batch)[1]


def gradient_of_objective(agent, batch):
    return trpo.flat_gradient(objective_of(agent, batch), trpo.policy_parameters(agent))


def dense_fisher(agent, batch):
    """E_s E_a~π[∇log π ∇log πᵀ] in closed form: Jᵀ M J with J the Jacobian of logits or mean, M their Fisher matrix."""
    states = batch.states
    names = [f"actor.{name}" for name, _ in agent.actor.named_parameters()]
    values = dict(agent.named_parameters())

    def outputs(*weights):
        return functional_call(agent.actor, {n.removeprefix("actor."): w for n, w in zip(names, weights)}, (states,))

    weights = tuple(values[name].detach() for name in names)
    jacobians = torch.autograd.functional.jacobian(outputs, weights)
    jacobian = torch.cat([j.flatten(2) for j in jacobians], -1)  # (B, A, P)
    if agent.discrete:
        p = agent.actor(states).softmax(-1).detach()
        metric = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    else:
        metric = torch.diag((-2 * agent.log_std.detach()).exp()).expand(len(states), -1, -1)
    fisher = (jacobian.mT @ metric @ jacobian).mean(0)
    if agent.discrete:
        return fisher
    return torch.block_diag(fisher, 2 * torch.eye(agent.action_size, dtype=fisher.dtype))


@both_kinds_of_actions
def test_the_hessian_of_the_kl_is_the_explicit_fisher_matrix(kind):
    agent, batch = small_batch(kind)
    parameters = trpo.policy_parameters(agent)
    gradient, fisher = (
        trpo.flat_gradient(kl_of(agent, batch), parameters, create_graph=True),
        dense_fisher(agent, batch),
    )
    for column, unit in zip(fisher.T, torch.eye(len(fisher), dtype=fisher.dtype)):
        product = trpo.flat_gradient(gradient @ unit, parameters, retain_graph=True)
        torch.testing.assert_close(product, column, rtol=1e-8, atol=1e-10)


def test_conjugate_gradient_is_a_dense_solve():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 12)), torch.tensor(rng.normal(size=12))
    matrix = torch.tensor(a @ a.T + np.eye(12))
    expected = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(trpo.conjugate_gradient(lambda v: matrix @ v, b, 12), expected)
    torch.testing.assert_close(
        trpo.conjugate_gradient(lambda v: matrix @ v, 1e-9 * b, 12), 1e-9 * expected, atol=0, rtol=1e-6
    )
    residuals = [(matrix @ trpo.conjugate_gradient(lambda v: matrix @ v, b, k) - b).norm() for k in (0, 4, 8, 12)]
    assert residuals[0] == b.norm() and residuals[3] < 1e-6 * residuals[2] < 1e-6 * residuals[0]
    assert trpo.conjugate_gradient(lambda v: matrix @ v, 0 * b, 12).eq(0).all()


@both_kinds_of_actions
def test_kl_is_the_mean_log_ratio_and_its_gradient_vanishes_at_the_old_policy(kind):
    agent, batch = small_batch(kind)
    assert kl_of(agent, batch).item() == pytest.approx(0, abs=1e-12)
    assert trpo.flat_gradient(kl_of(agent, batch), trpo.policy_parameters(agent)).abs().max() < 1e-9
    with torch.no_grad():
        old = agent.actor(batch.states)
        for parameter in trpo.policy_parameters(agent):
            parameter += 0.1 * torch.randn_like(parameter)
        new = agent.actor(batch.states)
    if agent.discrete:
        expected = scipy.stats.entropy(old.softmax(-1), new.softmax(-1), axis=-1).mean()
    else:
        p = torch.distributions.Normal(old, torch.tensor(-0.3).exp())
        q = torch.distributions.Normal(new, agent.log_std.detach().exp())
        expected = torch.distributions.kl_divergence(p, q).sum(-1).mean().item()
    assert expected > 1e-3 and kl_of(agent, batch).item() == pytest.approx(expected)


@both_kinds_of_actions
def test_the_objective_is_the_advantage_weighted_probability_ratio(kind):
    agent, states, actions, advantages = small_problem(kind)
    batch = trpo.trpo_batch(agent, states, actions, advantages, trpo.Args())
    normalised = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(batch.advantages, normalised)
    assert objective_of(agent, batch).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        old = agent.log_prob_and_entropy(states, actions)[0].exp()
        for parameter in trpo.policy_parameters(agent):
            parameter += 0.1 * torch.randn_like(parameter)
        ratio = agent.log_prob_and_entropy(states, actions)[0].exp() / old
    assert objective_of(agent, batch).item() == pytest.approx((ratio * normalised).mean().item())


@both_kinds_of_actions
@pytest.mark.parametrize("seed", range(5))
def test_the_step_stays_in_the_trust_region_and_gains(kind, seed):
    args = replace(PLAIN, target_kl=0.02)
    agent, batch = small_batch(kind, args, seed)
    critic = parameters_to_vector(agent.critic.parameters()).clone()
    before = objective_of(agent, batch).item()
    metrics = take_step(agent, batch, args)
    assert 0 < metrics["step_fraction"] <= 1
    assert 0.2 * args.target_kl < kl_of(agent, batch).item() < args.target_kl
    assert objective_of(agent, batch).item() > before + 1e-3
    assert metrics["kl"].item() == pytest.approx(kl_of(agent, batch).item())
    assert metrics["policy_loss"].item() == pytest.approx(-objective_of(agent, batch).item())
    assert torch.equal(critic, parameters_to_vector(agent.critic.parameters()))


@both_kinds_of_actions
def test_the_direction_is_the_damped_natural_gradient_and_its_length_the_trust_region(kind):
    """θ − θ_old = βᵏ √(2δ / xᵀ(F + cI)x) x with x = (F + cI)⁻¹ g, all dense."""
    args = replace(PLAIN, target_kl=1e-5, cg_iterations=200, cg_damping=0.01)
    agent, batch = small_batch(kind, args)
    parameters = trpo.policy_parameters(agent)
    old = parameters_to_vector(parameters).detach().clone()
    gradient, fisher = gradient_of_objective(agent, batch), dense_fisher(agent, batch)
    fisher += args.cg_damping * torch.eye(len(fisher), dtype=fisher.dtype)
    x = torch.linalg.solve(fisher, gradient)
    expected = (2 * args.target_kl / (x @ fisher @ x)).sqrt() * x
    metrics = take_step(agent, batch, args)
    step = parameters_to_vector(parameters).detach() - old
    assert metrics["step_fraction"] > 0
    torch.testing.assert_close(step, metrics["step_fraction"] * expected, rtol=1e-3, atol=1e-6)


@both_kinds_of_actions
@pytest.mark.parametrize("fault", ["loses", "leaves the trust region", "is not a number"])
def test_line_search_refuses_a_bad_step_and_leaves_the_weights_untouched(kind, fault):
    args = replace(PLAIN, line_search_steps=4)
    agent, batch = small_batch(kind, args)
    gradient, before = gradient_of_objective(agent, batch), objective_of(agent, batch).item()
    step = {"loses": -1e-3, "leaves the trust region": 1e3, "is not a number": np.nan}[fault] * gradient
    old = [p.detach().clone() for p in agent.parameters()]
    metrics = trpo.line_search(agent, batch, step, args)
    assert metrics["step_fraction"] == metrics["kl"] == 0 and metrics["policy_loss"].item() == pytest.approx(-before)
    assert all(torch.equal(a, b) for a, b in zip(old, agent.parameters()))
    metrics = trpo.line_search(agent, batch, 1e-3 * gradient, args)
    assert metrics["step_fraction"] == 1 and not torch.equal(old[-1 - len(agent.critic)], agent.actor[-1].bias)


def test_line_search_shrinks_the_step_until_it_fits():
    args = replace(PLAIN, line_search_steps=60, line_search_shrink=0.5, target_kl=1e-4)
    agent, batch = small_batch("discrete", args)
    parameters, gradient = trpo.policy_parameters(agent), gradient_of_objective(agent, batch)
    old = parameters_to_vector(parameters).detach().clone()
    metrics = trpo.line_search(agent, batch, gradient, args)
    fraction = metrics["step_fraction"].item()
    assert 0 < fraction < 1 and np.log2(fraction).is_integer() and metrics["kl"] < 1e-4
    torch.testing.assert_close(parameters_to_vector(parameters).detach(), old + fraction * gradient)


def test_equal_advantages_leave_the_policy_as_it_is():
    """Normalised they are 0: no direction, 0/0 for its length, and the line search refuses."""
    agent, states, actions, _ = small_problem("discrete")
    old = parameters_to_vector(agent.parameters()).clone()
    batch = trpo.trpo_batch(agent, states, actions, torch.ones(40, dtype=torch.float64), trpo.Args())
    metrics = take_step(agent, batch, trpo.Args())
    assert metrics["kl"] == metrics["step_fraction"] == 0 and metrics["policy_loss"].item() == pytest.approx(0)
    assert torch.equal(old, parameters_to_vector(agent.parameters()))


# Forks ------------------------------------------------------------------------------------------------------


@both_kinds_of_actions
def test_any_network_takes_the_natural_gradient_step(kind):
    """LayerNorm, GELU and a layer without bias: F of the dense Jacobian, as with the network of the script."""
    args = replace(PLAIN, target_kl=1e-5, cg_iterations=300, cg_damping=0.01)
    agent, states, actions, advantages = small_problem(kind)
    layers = nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, agent.action_size)
    agent.actor = nn.Sequential(*layers).double()
    batch = trpo.trpo_batch(agent, states, actions, advantages, args)
    parameters = trpo.policy_parameters(agent)
    old = parameters_to_vector(parameters).detach().clone()
    fisher = dense_fisher(agent, batch)
    damped = fisher + args.cg_damping * torch.eye(len(fisher), dtype=fisher.dtype)
    x = torch.linalg.solve(damped, gradient_of_objective(agent, batch))
    metrics = take_step(agent, batch, args)
    step = parameters_to_vector(parameters).detach() - old
    expected = metrics["step_fraction"] * (2 * args.target_kl / (x @ damped @ x)).sqrt() * x
    assert metrics["step_fraction"] > 0
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


def test_what_is_frozen_stays_and_the_rest_moves():
    agent, batch = small_batch("box")
    agent.actor[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    assert take_step(agent, batch, PLAIN)["step_fraction"] > 0
    moved = {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"actor.2.weight", "actor.2.bias", "log_std"}


def test_a_parameter_that_the_policy_does_not_use_is_not_left_out_in_silence():
    agent, batch = small_batch("box")
    agent.encoder = nn.Linear(3, 3).double()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        trpo.trust_region_step(agent, batch, PLAIN)


def test_an_actor_with_dropout_is_refused_in_one_line(capsys):
    agent, states, actions, advantages = small_problem("box")
    agent.actor.insert(2, nn.Dropout(0.1))
    batch = trpo.trpo_batch(agent, states, actions, advantages, PLAIN)
    with pytest.raises(SystemExit):
        take_step(agent, batch, PLAIN)
    assert "Dropout" in capsys.readouterr().err


# Parity with Stable-Baselines3 ------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
def test_update_parity_with_sb3(env_id, normalize, monkeypatch, record_property):
    """Three rollouts through sb3-contrib's own train() and through ours: same weights, data and minibatch order.

    The known differences are taken out: direction of the line search's KL, start and tolerance of conjugate gradient.
    Networks in double precision, as fifteen steps of conjugate gradient in single precision amplify its rounding.
    """
    T, N, iterations = 128, 4, 3
    args = trpo.Args(
        env_id=env_id,
        num_envs=N,
        num_steps=T,
        total_timesteps=T * N * iterations,
        num_minibatches=4,
        critic_epochs=5,
        normalize_advantages=normalize,
        hidden_sizes=(32, 16),
        log_std_init=-0.5,  # away from 0, where a relative difference says nothing
    )
    env = recorded_envs(env_id, N)
    model = sb3.trpo_model(args, env)
    spaces = env.observation_space, env.action_space
    model.policy.double()
    monkeypatch.setattr(stable_baselines3.common.policies, "preprocess_obs", lambda obs, *_, **__: obs.double())
    agent = copy_weights(model.policy, trpo.ActorCritic(*spaces, args.hidden_sizes).double())
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.critic.parameters(), args.learning_rate, eps=1e-5, fused=True)
    kl, solver = sb3_trpo.kl_divergence, sb3_trpo.conjugate_gradient_solver
    monkeypatch.setattr(sb3_trpo, "kl_divergence", lambda new, old: kl(old, new))

    def solve(product, b, max_iter):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", torch.zeros_like)
            return solver(product, b, max_iter, residual_tol=1e-10 * float(b @ b))

    monkeypatch.setattr(sb3_trpo, "conjugate_gradient_solver", solve)
    permutation, orders, fractions = np.random.permutation, [], []
    monkeypatch.setattr(np.random, "permutation", lambda n: orders.append(permutation(n)) or orders[-1])

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        obs, next_obs = obs.double(), next_obs.double()
        actions = actions if agent.discrete else actions.double()
        with torch.no_grad():
            values, next_values = agent.value(obs), agent.value(next_obs)
        advantages = trpo.gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        assert_advantages_agree(model, advantages.float())
        states, returns = obs.flatten(0, 1), (advantages + values).flatten()
        batch = trpo.trpo_batch(agent, states, actions.flatten(0, 1), advantages.flatten(), args)
        fractions.append(take_step(agent, batch, args)["step_fraction"])
        for order in orders[1:]:  # the first is that of the policy's batch, all of the rollout
            order = torch.as_tensor(order % T * N + order // T)  # SB3 counts its samples environment by environment
            for indices in order.chunk(args.num_minibatches):
                optimizer.zero_grad()
                trpo.critic_gradient(agent, trpo.ValueBatch(states[indices], returns[indices]))
                optimizer.step()
        assert len(orders) == 1 + args.critic_epochs
        orders.clear()

    follow(model, args.total_timesteps, update)
    assert all(fractions), "a step was refused"
    reference = copy_weights(model.policy, trpo.ActorCritic(*spaces, args.hidden_sizes).double())
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"{env_id}, normalised {normalize}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5
