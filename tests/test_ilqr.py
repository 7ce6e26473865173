"""algos/ilqr.py against the Riccati equation, dense programs, dense Newton steps, L-BFGS and dynamic programming."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import ilqr
import mujoco
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from ilqr import (
    Args,
    Expansion,
    Pendulum,
    backward,
    box_qp,
    expand,
    first_guesses,
    forward,
    linear_step,
    optimise,
    play,
)
from stable_baselines3.common.monitor import load_results
from swing_up import best_return
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

SCRIPT = Path(ilqr.__file__)
ONE = ilqr.STEP_SIZES[:1]
MUJOCO = ["InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Reacher-v5"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Symmetric matrices (…, n, n), positive definite."""
    root = normal(*shape, shape[-1], seed=seed)
    return root @ root.mT + 0.1 * torch.eye(shape[-1])


def unbounded(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.full(shape, -math.inf).double(), torch.full(shape, math.inf).double()


def linear_quadratic(batch: int, steps: int, n: int, m: int) -> Expansion:
    """Random, different at every step, with affine terms; f and c are as large as the rest."""
    F = normal(batch, steps, n, n + m, seed=1) / math.sqrt(n)
    shapes = ((batch, steps, n), (batch, steps, n + m), (batch, n))
    f, c, v = (normal(*shape, seed=i) for i, shape in enumerate(shapes, 2))
    return Expansion(F, f, positive(batch, steps, n + m, seed=5), c, positive(batch, n, seed=6), v)


def costs_of(e: Expansion, x: Tensor, u: Tensor) -> Tensor:
    """J (B,) of the linear-quadratic problem for x (B, T + 1, n) and u (B, T, m)."""
    z, end = torch.cat([x[:, :-1], u], -1), x[:, -1]
    running = 0.5 * torch.einsum("bti,btij,btj->b", z, e.C, z) + (e.c * z).sum((1, 2))
    return running + 0.5 * torch.einsum("bi,bij,bj->b", end, e.V, end) + (e.v * end).sum(1)


def states_of(e: Expansion, x: Tensor, u: Tensor) -> Tensor:
    """x (B, T + 1, n) from the first states x (B, n) on, under u (B, T, m)."""
    states = [x]
    for t in range(u.shape[1]):
        states.append((e.F[:, t] @ torch.cat([states[-1], u[:, t]], -1)[..., None])[..., 0] + e.f[:, t])
    return torch.stack(states, 1)


def pendulum(seed: int = 1_000_001, bounded: bool = True, cls: type = Pendulum) -> Pendulum:
    env = gym.make("Pendulum-v1")
    env.reset(seed=seed)
    problem = cls(env)
    if not bounded:
        problem.low, problem.high = unbounded(1)
    return problem


def played(problem, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States (B, T + 1, n), controls and J (B,) of controls (B, T, m) from x (n,)."""
    K = torch.zeros(*u.shape, len(x)).double()
    found = forward(problem, x.expand(len(u), u.shape[1] + 1, -1), u, K, 0 * u, torch.ones(1).double())
    return tuple(y[0] for y in found)


def cost_of_controls(problem, x: Tensor, u: Tensor) -> Tensor:
    """J as a function of all controls u (T, m), written here again to be differentiated."""
    total = 0
    for control in u:
        total = total + problem.cost(x, control)
        x = problem.step(x, control)
    return total + problem.final_cost(x)


# The linear-quadratic case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_over_a_long_horizon_gains_are_the_riccati_equations(seed):
    n, m, steps = 4, 2, 500
    F, C = normal(n, n + m, seed=seed) / 2, positive(n + m, seed=seed)
    A, B, Q, R, S = F[:, :n], F[:, n:], C[:n, :n], C[n:, n:], C[:n, n:]
    P = scipy.linalg.solve_discrete_are(A, B, Q, R, s=S)
    A, B, R, S = (x.numpy() for x in (A, B, R, S))
    expected = -np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A + S.T)
    repeated = [x.expand(1, steps, *x.shape) for x in (F, torch.zeros(n), C, torch.zeros(n + m))]
    e = Expansion(*(x.double() for x in repeated), torch.zeros(1, n, n).double(), torch.zeros(1, n).double())
    K, k, _ = backward(e, *unbounded(1, steps, m), torch.zeros(1).double(), "lqr")
    assert np.abs(K[0, 0].numpy() - expected).max() <= 1e-8 and not k.any()


def test_controls_and_cost_are_the_dense_quadratic_programs():
    """12 steps, 3 problems side by side, everything different at every step, with affine terms and cross terms."""
    batch, steps, n, m = 3, 12, 4, 2
    e, x = linear_quadratic(batch, steps, n, m), normal(batch, n, seed=9)
    K, k, _ = backward(e, *unbounded(batch, steps, m), torch.zeros(batch).double(), "ilqr")
    state, controls = x, []
    for t in range(steps):
        controls.append((K[:, t] @ state[..., None])[..., 0] + k[:, t])
        state = (e.F[:, t] @ torch.cat([state, controls[-1]], -1)[..., None])[..., 0] + e.f[:, t]
    controls = torch.stack(controls, 1)
    for i in range(batch):
        one, first = Expansion(*(y[i : i + 1] for y in e[:-1])), x[i : i + 1]

        def J(u, one=one, first=first):
            u = u.reshape(1, steps, m)
            return costs_of(one, states_of(one, first, u), u)[0]

        zero = torch.zeros(steps * m).double()
        dense = -torch.linalg.solve(torch.func.hessian(J)(zero), torch.func.grad(J)(zero))
        assert (controls[i].flatten() - dense).abs().max() <= 1e-9
        assert J(controls[i].flatten()).item() == pytest.approx(J(dense).item(), abs=1e-9)
    played = e._replace(f=0 * e.f)  # as around trajectories that were played, where a step lowers J by the gain
    K, k, gain = backward(played, *unbounded(batch, steps, m), torch.zeros(batch).double(), "ilqr")
    step = linear_step(played.F, K, k)
    assert torch.allclose(gain, -costs_of(played, states_of(played, 0 * x, step), step), atol=1e-9)


def test_noise_does_not_change_the_gains():
    """E J of u = K x + k under noise of any covariance has gradient 0 at the gains of the problem without noise."""
    steps, n, m = 8, 3, 2
    e = linear_quadratic(1, steps, n, m)
    K, k, _ = backward(e, *unbounded(1, steps, m), torch.zeros(1).double(), "lqr")
    gains = [x[0].clone().requires_grad_() for x in (K, k)]

    def expected_cost(K, k, noise):
        mean, covariance, total = normal(n, seed=3), torch.zeros(n, n).double(), 0
        for t in range(steps):
            z, feedback = torch.cat([mean, K[t] @ mean + k[t]]), torch.cat([torch.eye(n).double(), K[t]])
            of_z = feedback @ covariance @ feedback.T
            total = total + 0.5 * z @ e.C[0, t] @ z + e.c[0, t] @ z + 0.5 * (e.C[0, t] * of_z).sum()
            mean, covariance = e.F[0, t] @ z + e.f[0, t], e.F[0, t] @ of_z @ e.F[0, t].T + noise
        return total + 0.5 * mean @ e.V[0] @ mean + e.v[0] @ mean + 0.5 * (e.V[0] * covariance).sum()

    quiet, loud = (expected_cost(*gains, scale * positive(n, seed=4)) for scale in (0, 10))
    assert loud > quiet + 10
    for total in (quiet, loud):
        assert max(g.abs().max() for g in torch.autograd.grad(total, gains)) <= 1e-9 * loud


def test_lqr_plays_a_linear_problem_at_once_and_exactly(tmp_path):
    """DoubleIntegrator-v0: what is promised is played and returned, open loop and replanned."""
    base = Args(env_id="DoubleIntegrator-v0", method="lqr", starts=1, horizon=100, eval_episodes=2)
    results = [play(replace(base, replan=x, output_dir=str(tmp_path / str(x)))) for x in (False, True)]
    for result in results:
        assert result["promised"] == pytest.approx(-result["returns"], rel=1e-5)
        assert result["played"] == pytest.approx(-result["returns"], rel=1e-5)
    assert results[0]["returns"] == pytest.approx(results[1]["returns"], rel=1e-5)


def test_the_line_search_plays_every_step_size():
    """û + α k + K (x − x̂): at the first step, where x is x̂, by hand; further on, with what was played."""
    env = gym.make("DoubleIntegrator-v0")
    env.reset(seed=1)
    problem, generator = ilqr.DoubleIntegrator(env), torch.Generator().manual_seed(0)
    k, K = (torch.randn(shape, generator=generator).double() for shape in ((1, 3, 1), (1, 3, 1, 2)))
    x = problem.state().expand(1, 4, 2)
    xs, us, _ = ilqr.forward(problem, x, 0 * k, K, k, ilqr.STEP_SIZES)
    for size, played, controls in zip(ilqr.STEP_SIZES, xs[:, 0], us[:, 0]):
        for t in range(3):
            expected = size * k[0, t] + K[0, t] @ (played[t] - x[0, t])
            assert controls[t].item() == pytest.approx(expected.item(), rel=1e-12)


def test_regularised_steps_lower_a_quadratic_cost_by_their_gain():
    """With μ, too: V and v are of the feedback that is played, not of the best one."""
    env = gym.make("DoubleIntegrator-v0")
    env.reset(seed=1)
    problem, free = ilqr.DoubleIntegrator(env), torch.full((1, 12, 1), math.inf).double()
    u = torch.randn(1, 12, 1, generator=torch.Generator().manual_seed(0)).double()
    start = problem.state().expand(1, 13, 2)
    x, u, before = (y[0] for y in ilqr.forward(problem, start, u, torch.zeros(1, 12, 1, 2).double(), 0 * u, ONE))
    e = ilqr.expand(problem, x, u, False)
    K, k, gain = ilqr.backward(e, -free, free, torch.tensor([2.0]).double(), "ilqr")
    after = ilqr.forward(problem, x, u, K, k, ONE)[2][0]
    assert (before - after).item() == pytest.approx(gain.item(), rel=1e-9) and gain > 0.1


def test_newton_steps_along_the_linear_dynamics():
    """What `optimise` plays of --method newton is û + α times the dense step, without feedback."""
    env = gym.make("Pendulum-v1")
    env.reset(seed=1)
    problem, start = ilqr.Pendulum(env), torch.tensor([0.05, 0.0]).double()
    guess, method = torch.full((1, 8, 1), 0.1).double(), "newton"
    x, u, _ = (
        y[0]
        for y in ilqr.forward(problem, start.expand(1, 9, 2), guess, torch.zeros(1, 8, 1, 2).double(), 0 * guess, ONE)
    )
    e = ilqr.expand(problem, x, u, True)
    K, k, _ = ilqr.backward(e, problem.low - u, problem.high - u, torch.zeros(1).double(), method)
    step = ilqr.linear_step(e.F, K, k)
    tried = [(u + size * step).clamp(problem.low, problem.high)[0] for size in ilqr.STEP_SIZES]
    plan = optimise(problem, start, guess, Args(method=method, iterations=1))
    assert plan.costs[1] < plan.costs[0] and any(torch.allclose(plan.u, y, rtol=1e-9, atol=0) for y in tried)


def test_lqr_takes_its_one_step_whole():
    """Also where that is worse than none, as here: it is exact where the problem is what it takes it for, or not."""
    env = gym.make("InvertedDoublePendulum-v5")
    env.reset(seed=1_000_001)
    problem = ilqr.PROBLEMS["InvertedDoublePendulum-v5"](env)
    plan = optimise(problem, problem.state(), torch.zeros(1, 20, 1).double(), Args(method="lqr"))
    assert len(plan.costs) == 2 and plan.costs[1] > plan.costs[0]


# Bounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_boxs_quadratic_program_is_scipys(m):
    batch = 40
    H, g = positive(batch, m, seed=m), 3 * normal(batch, m, 1, seed=m + 10)
    low, high = -normal(batch, m, 1, seed=m + 20).abs(), normal(batch, m, 1, seed=m + 30).abs()
    k, inverse = box_qp(H, g, low, high)
    held = 0
    for i in range(batch):
        root = np.linalg.cholesky(H[i]).T
        bounds = low[i, :, 0].numpy(), high[i, :, 0].numpy()
        expected = scipy.optimize.lsq_linear(root, -np.linalg.solve(root.T, g[i, :, 0]), bounds, "bvls", tol=1e-14).x
        assert np.abs(k[i, :, 0].numpy() - expected).max() <= 1e-8
        free = (k[i] > low[i]) & (k[i] < high[i])
        size = int(free.sum())
        part, back = (x[i][free & free.T].reshape(size, size) for x in (H, inverse))
        assert torch.allclose(back @ part, torch.eye(size).double())
        assert not inverse[i][~(free & free.T)].any()
        held += int((~free).sum())
    assert 10 < held < batch * m


def test_a_plan_within_bounds_satisfies_the_conditions_of_an_optimum():
    """Swing up: where a control is free ∂J/∂u is 0, at a bound it points outwards."""
    problem = pendulum(1_000_004)
    guesses = first_guesses(problem, 8, 50, torch.Generator().manual_seed(0))
    plan = optimise(problem, problem.state(), guesses, Args(iterations=80, tolerance=1e-12))
    assert plan.u.abs().max() == 2 and (plan.u.abs() < 2).sum() > 10
    gradient = torch.func.grad(lambda u: cost_of_controls(problem, problem.state(), u))(plan.u)
    free = plan.u.abs() < 2
    assert gradient[free].abs().max() <= 0.01 < 0.5 < gradient.abs().max()
    assert (gradient[~free] * plan.u[~free] <= 0).all()
    assert not plan.K[plan.u.abs() == 2].any(), "no feedback where a bound holds the control"
    assert cost_of_controls(problem, problem.state(), plan.u).item() == pytest.approx(plan.costs[-1].min().item())


# Second order -----------------------------------------------------------------------------------------------


class Costly(Pendulum):
    """With a quadratic cost in which Newton's matrix is positive definite, near upright."""

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        return x[..., 0] ** 2 + 0.1 * x[..., 1] ** 2 + 0.3 * u[..., 0] ** 2

    def final_cost(self, x: Tensor) -> Tensor:
        return 3 * x[..., 0] ** 2 + x[..., 1] ** 2


def newtons(steps: int = 15) -> tuple[Costly, Tensor, Tensor]:
    problem = pendulum(bounded=False, cls=Costly)
    return problem, torch.tensor([0.3, -0.8]).double(), 0.3 * normal(1, steps, 1, seed=7)


def expansion(problem, x: Tensor, u: Tensor) -> Expansion:
    states, controls, _ = played(problem, x, u)
    return expand(problem, states, controls, second=True)


def test_newton_by_stages_is_the_dense_newton_step():
    problem, x, u = newtons()
    e = expansion(problem, x, u)
    K, k, gain = backward(e, *unbounded(*u.shape), torch.zeros(1).double(), "newton")
    step = linear_step(e.F, K, k)[0]
    J = lambda u: cost_of_controls(problem, x, u)  # noqa: E731
    H, g = torch.func.hessian(J)(u[0]).reshape(u.shape[1], -1), torch.func.grad(J)(u[0])[:, 0]
    dense = -torch.linalg.solve(H, g)
    assert (step[:, 0] - dense).abs().max() <= 1e-8
    assert gain.item() == pytest.approx(0.5 * (g @ torch.linalg.solve(H, g)).item(), rel=1e-9)
    for other in ("ilqr", "ddp"):
        K, k, _ = backward(e, *unbounded(*u.shape), torch.zeros(1).double(), other)
        assert (linear_step(e.F, K, k)[0, :, 0] - dense).abs().max() > 1e-3, f"{other} is not Newton's method"


def test_ddp_weighs_second_order_dynamics_by_the_values_gradient():
    """Two steps, by hand: the last but one stage's Q with v of the last stage, not with the costate."""
    problem, x, u = newtons(2)
    e = expansion(problem, x, u)
    K, k, _ = backward(e, *unbounded(*u.shape), torch.zeros(1).double(), "ddp")
    V, v = e.V[0], e.v[0]
    for t in (1, 0):
        F = e.F[0, t]
        Q = e.C[0, t] + F.T @ V @ F + torch.einsum("i,ijk->jk", v, e.F2[0, t])
        q = e.c[0, t] + F.T @ v
        gain, step = -Q[2:, :2] / Q[2, 2], -q[2:] / Q[2, 2]
        assert torch.allclose(K[0, t], gain) and torch.allclose(k[0, t], step)
        V, v = Q[:2, :2] - Q[:2, 2:] @ Q[2:, :2] / Q[2, 2], q[:2] - Q[:2, 2] * q[2] / Q[2, 2]


def test_ddp_and_newton_agree_at_an_optimum_and_converge_quadratically():
    problem, x, u = newtons()
    best = optimise(problem, x, u, Args(method="newton", iterations=50, tolerance=1e-15))
    e = expansion(problem, x, best.u[None])
    ddp, newton = (backward(e, *unbounded(*u.shape), torch.zeros(1).double(), name)[0] for name in ("ddp", "newton"))
    ilqr_gains = backward(e, *unbounded(*u.shape), torch.zeros(1).double(), "ilqr")[0]
    assert (ddp - newton).abs().max() <= 1e-7 < 1e-3 < (ddp - ilqr_gains).abs().max()
    for method, most in (("ddp", 8), ("newton", 8), ("ilqr", 20)):
        plan = optimise(problem, x, u, Args(method=method, iterations=50, tolerance=1e-12))
        assert len(plan.costs) - 1 <= most and plan.costs[-1].item() == pytest.approx(best.costs[-1].item(), rel=1e-9)


def test_the_gradient_method_steps_down_the_gradient():
    problem, x, u = newtons()
    e = expansion(problem, x, u)
    K, k, gain = backward(e, *unbounded(*u.shape), torch.full((1,), 4.0).double(), "gradient")
    g = torch.func.grad(lambda u: cost_of_controls(problem, x, u))(u[0])
    assert not K.any() and torch.allclose(k[0], -g / 4)
    assert gain.item() == pytest.approx((g**2).sum().item() / 4)


@pytest.mark.parametrize("method", ["ilqr", "ddp", "newton", "gradient"])
def test_no_iteration_raises_a_cost(method):
    """Swing up, where Q_uu is indefinite at times: costs never rise, and what is kept is what they are of."""
    problem = pendulum()
    guesses = first_guesses(problem, 6, 40, torch.Generator().manual_seed(0))
    plan = optimise(problem, problem.state(), guesses, Args(method=method, iterations=30))
    costs = plan.costs
    assert (costs[1:] <= costs[:-1]).all() and (costs[-1] < costs[0]).all()
    states, controls, J = played(problem, problem.state(), plan.u[None])
    assert J.item() == pytest.approx(costs[-1].min().item(), rel=1e-12) and torch.equal(states[0], plan.x)


def test_an_indefinite_stage_is_no_step_and_raises_mu():
    """c = −u²: no μ below 2 makes Q_uu + μ I positive definite, and above it J falls to the bound."""
    problem = pendulum()
    problem.cost = lambda x, u: -(u[..., 0] ** 2)
    u = torch.full((1, 5, 1), 0.5).double()
    e = expansion(problem, problem.state(), u)
    for mu, fine in ((0.0, False), (1.9, False), (2.1, True)):
        gain = backward(e, problem.low - u, problem.high - u, torch.tensor([mu]).double(), "ilqr")[2]
        assert gain.isfinite().item() is fine
    plan = optimise(problem, problem.state(), u, Args(iterations=40))
    assert plan.u.abs().min() == 2


# Derivatives and dynamics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "DoubleIntegrator-v0"])
def test_dynamics_and_cost_are_the_environments(env_id):
    env = gym.make(env_id)
    problem, rng, wrong = ilqr.PROBLEMS[env_id](env), np.random.default_rng(0), 0.0
    for t in range(10_000):
        if t % 100 == 0:
            env.reset(seed=t)
        x, u = problem.state(), rng.uniform(-2, 2, 1).astype(np.float32)
        _, reward, *_ = env.step(u)
        u = torch.as_tensor(u).double()
        wrong = max(wrong, (problem.step(x, u) - problem.state()).abs().max().item())
        wrong = max(wrong, abs(problem.cost(x, u).item() + reward) / 10)
    assert wrong <= (1e-12 if env_id == "DoubleIntegrator-v0" else 1e-6)  # the other computes with a float32 torque


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujoco_steps_are_the_environments(env_id):
    env = gym.make(env_id)
    problem, rng = ilqr.PROBLEMS[env_id](env), np.random.default_rng(0)
    xs, us, after = [], [], []
    for t in range(1_000):
        if t % 20 == 0:
            env.reset(seed=t)
        xs.append(problem.state())
        us.append(rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32))
        env.step(us[-1])
        after.append(problem.state())
    found = problem.step(torch.stack(xs), torch.as_tensor(np.array(us)).double())
    assert (found - torch.stack(after)).abs().max() <= 1e-6
    one = problem.step(xs[5][None, None], torch.as_tensor(us[5]).double()[None, None])
    assert torch.equal(one[0, 0], found[5]), "of any leading shape, the same bits"


def points(env_id: str, number: int = 30) -> tuple[ilqr.Problem, Tensor, Tensor]:
    """States and controls of random episodes."""
    env = gym.make(env_id)
    problem, xs = ilqr.PROBLEMS[env_id](env), []
    env.action_space.seed(0)
    for t in range(number):
        if t % 6 == 0:
            env.reset(seed=t)
        xs.append(problem.state())
        env.step(env.action_space.sample())
    us = [env.action_space.sample() for _ in range(number)]
    return problem, torch.stack(xs), torch.as_tensor(np.array(us)).double()


def richardson(f, x: Tensor, u: Tensor, delta: float) -> Tensor:
    """Derivative of f by (x, u) to the sixth order, column by column."""
    z, n, columns = torch.cat([x, u], -1), x.shape[-1], []
    for direction in torch.eye(z.shape[-1]).double():
        at = [
            (
                f(*(z + h * direction).split([n, z.shape[-1] - n], -1))
                - f(*(z - h * direction).split([n, z.shape[-1] - n], -1))
            )
            / (2 * h)
            for h in (delta, delta / 2, delta / 4)
        ]
        first, second = (4 * at[1] - at[0]) / 3, (4 * at[2] - at[1]) / 3
        columns.append((16 * second - first) / 15)
    return torch.stack(columns, -1)


@pytest.mark.parametrize("env_id", MUJOCO)
def test_mujocos_derivatives_are_richardsons(env_id):
    problem, x, u = points(env_id)
    expected = richardson(problem.step, x, u, 1e-3)
    assert (problem.jacobian(x, u) - expected).abs().max() <= 1e-8 * expected.abs().max()
    expected = richardson(problem.jacobian, x, u, 1e-3)
    assert (problem.hessian(x, u) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "DoubleIntegrator-v0"])
def test_torchs_derivatives_are_richardsons(env_id):
    problem, x, u = points(env_id)
    assert (problem.jacobian(x, u) - richardson(problem.step, x, u, 1e-3)).abs().max() <= 1e-8
    assert (problem.hessian(x, u) - richardson(problem.jacobian, x, u, 1e-3)).abs().max() <= 1e-8


@pytest.mark.parametrize("env_id", MUJOCO)
def test_tangent_coordinates_are_differences(env_id):
    problem, x, _ = points(env_id, 2)
    model, (a, b) = problem.model, x[:, : problem.model.nq].numpy()
    velocity, moved = np.zeros(model.nv), a.copy()
    mujoco.mj_differentiatePos(model, velocity, 1.0, a, b)
    mujoco.mj_integratePos(model, moved, velocity, 1.0)
    assert velocity == pytest.approx(b - a) and moved == pytest.approx(b)


def test_expansions_hold_the_costs_derivatives():
    problem, x, u = points("Reacher-v5", 12)
    states, controls, _ = played(problem, x[0], u[None, :5])
    e = expand(problem, states, controls, second=True)
    assert [tuple(y.shape) for y in e] == [
        (1, 5, 8, 10),
        (1, 5, 8),
        (1, 5, 10, 10),
        (1, 5, 10),
        (1, 8, 8),
        (1, 8),
        (1, 5, 8, 10, 10),
    ]
    n, m, xs = 8, 2, states[0, :-1]
    gradient = richardson(problem.cost, xs, controls[0], 1e-3)
    assert (e.c[0] - gradient).abs().max() <= 1e-7 and not e.f.any()
    slope = lambda x, u: torch.func.vmap(torch.func.grad(lambda z: problem.cost(z[:n], z[n:])))(torch.cat([x, u], -1))  # noqa: E731
    assert (e.C[0] - richardson(slope, xs, controls[0], 1e-3)).abs().max() <= 1e-5 * e.C.abs().max()
    last = states[:, -1]
    end = richardson(lambda x, u: problem.final_cost(x), last, torch.zeros(1, m).double(), 1e-3)[:, :n]
    assert (e.v - end).abs().max() <= 1e-7
    assert torch.allclose(e.V, torch.func.hessian(problem.final_cost)(last[0])[None])


def test_costs_are_what_the_table_says():
    problem, x, u = points("Reacher-v5", 5)
    for state, control in zip(x, u):
        data = mujoco.MjData(problem.model)
        data.qpos[:], data.qvel[:] = state.numpy()[:4], state.numpy()[4:]
        mujoco.mj_forward(problem.model, data)
        off = data.body("fingertip").xpos - data.body("target").xpos
        assert problem.cost(state, control).item() == pytest.approx(
            math.sqrt(off[:2] @ off[:2] + 1e-4) + (control**2).sum().item()
        )
    x, u = torch.tensor([1.0, 0.2, -0.5, 3.0, 4.0, 5.0]).double(), torch.tensor([2.0]).double()
    assert ilqr.balance_cost(x, u).item() == pytest.approx(0.1 + 0.2**2 + 0.3**2 + 0.01 * 50 + 0.001 * 4)
    single = ilqr.balance_cost(torch.tensor([1.0, 0.2, 3.0, 4.0]).double(), u)
    assert single.item() == pytest.approx(0.1 + 0.2**2 + 0.01 * 25 + 0.001 * 4)
    cart = points("InvertedPendulum-v5", 2)[0]
    assert cart.final_cost(x[:4]).item() == cart.cost(x[:4], 0 * u).item() > 0


# Against another optimiser ----------------------------------------------------------------------------------


def test_from_ten_starts_it_finds_what_l_bfgs_finds_or_better():
    problem, steps = pendulum(), 20
    x, guesses = problem.state(), first_guesses(problem, 10, steps, torch.Generator().manual_seed(0))
    ours = optimise(problem, x, guesses, Args(iterations=200, tolerance=1e-10)).costs[-1].min().item()
    value = torch.func.grad_and_value(lambda u: cost_of_controls(problem, x, u))

    def cost(u):
        gradient, J = value(torch.as_tensor(u).reshape(-1, 1))
        return J.item(), gradient.flatten().numpy()

    found = [
        scipy.optimize.minimize(cost, g.flatten(), jac=True, method="L-BFGS-B", bounds=[(-2, 2)] * steps)
        for g in guesses.numpy()
    ]
    assert ours <= min(x.fun for x in found) + 1e-6


# Playing ----------------------------------------------------------------------------------------------------


def test_first_guesses_are_none_and_held_uniform_ones():
    problem, generator = pendulum(), torch.Generator().manual_seed(0)
    guesses = first_guesses(problem, 500, 50, generator)
    assert guesses.shape == (500, 50, 1) and not guesses[0].any() and guesses.abs().max() <= 2
    assert (guesses[:, :20] == guesses[:, :1]).all() and (guesses[1:, 20] != guesses[1:, 19]).all()
    assert guesses[1:].mean().abs() < 0.1 and guesses[1:].std().item() == pytest.approx(4 / math.sqrt(12), rel=0.1)
    problem.low, problem.high = unbounded(1)
    assert 0.9 < first_guesses(problem, 500, 50, generator).abs().max() <= 1


TINY = dict(horizon=12, starts=2, iterations=3, eval_episodes=1)


@pytest.mark.parametrize("method", ["ilqr", "ddp", "newton", "gradient", "lqr"])
def test_every_method_plays(tmp_path, method):
    result = play(Args(**TINY, method=method, replan=False, output_dir=str(tmp_path)))
    assert result["played"] == pytest.approx(result["promised"], rel=1e-3), "12 steps open loop, of float32 torques"


def test_an_open_loop_plan_is_played_to_its_end(tmp_path, monkeypatch):
    """200 steps in plans of 60, 60, 60 and 20; replanned, one a step, each from the rest of the one before."""
    calls = []
    monkeypatch.setattr(ilqr, "optimise", lambda p, x, u, args: calls.append((x, u)) or optimise(p, x, u, args))
    args = Args(iterations=1, starts=3, eval_episodes=1, replan=False, output_dir=str(tmp_path))
    play(args)
    assert [u.shape for _, u in calls] == [(3, 60, 1)] * 3 + [(3, 20, 1)]
    calls.clear()
    plans = []
    monkeypatch.setattr(
        ilqr, "optimise", lambda p, x, u, args: plans.append((u, optimise(p, x, u, args))) or plans[-1][1]
    )
    play(replace(args, replan=True))
    assert [len(u) for u, _ in plans] == [3] + [1] * 199
    assert [u.shape[1] for u, _ in plans] == [60] * 141 + list(range(59, 0, -1))
    for (_, before), (guess, _) in itertools.pairwise(plans):
        assert torch.equal(guess[0, :-1], before.u[1 : guess.shape[1]])


def test_same_seed_same_bits(tmp_path):
    args = Args(**TINY | dict(iterations=1, horizon=5, eval_episodes=1), replan=True)
    runs = [replace(args, seed=seed, output_dir=str(tmp_path / str(i))) for i, seed in enumerate((1, 1, 2))]
    returns = [play(x)["returns"].tolist() for x in runs]
    assert returns[0] == returns[1] != returns[2]


def test_a_run_leaves_what_it_says(tmp_path):
    line = [
        sys.executable,
        SCRIPT,
        "--output-dir",
        tmp_path,
        "--horizon",
        "15",
        "--starts",
        "2",
        "--iterations",
        "2",
        "--no-replan",
    ]
    done = subprocess.run([*map(str, line), "--eval-episodes", "2"], capture_output=True, text=True, check=True)
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.startswith("Pendulum-v1__ilqr__1__") and str(run_dir) in done.stdout
    assert "promised" in done.stdout and "Warning" not in done.stderr
    assert json.loads((run_dir / "args.json").read_text())["args"]["horizon"] == 15
    assert load_results(str(run_dir))["l"].tolist() == [200, 200]
    events = EventAccumulator(str(run_dir)).Reload()
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"}
    assert tags | {"plans/cost_in_episode_1", "plans/cost_in_episode_2"} == set(events.Tags()["scalars"])
    assert [x.step for x in events.Scalars("charts/episodic_return")] == [200, 400]


def test_other_environments_are_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as stop:
        play(Args(env_id="CartPole-v1"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "mpc.py" in error and "Reacher-v5" in error and error.count("\n") == 1


# Slow: returns ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replanned_swing_ups_are_within_2_of_dynamic_programming(tmp_path):
    result = play(Args(output_dir=str(tmp_path)))
    best = np.array([best_return(1_000_001 + i) for i in range(10)])
    print(result["returns"].round(2).tolist(), best.round(2).tolist())
    assert (result["returns"] >= best - 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("env_id, steps", [("InvertedPendulum-v5", 1000), ("InvertedDoublePendulum-v5", 1000)])
def test_pendulums_are_balanced_from_ten_starts(tmp_path, env_id, steps):
    play(replace(Args(), **ilqr.RECOMMENDED[env_id], env_id=env_id, output_dir=str(tmp_path)))
    (run_dir,) = tmp_path.iterdir()
    assert load_results(str(run_dir))["l"].tolist() == [steps] * 10
