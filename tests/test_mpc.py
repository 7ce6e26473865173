"""algos/mpc.py: its simulators against the environments, its planners against their definitions and against ilqr.py."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import mpc
import numpy as np
import pytest
import scipy.stats
from gymnasium.spaces import Box, Discrete
from mpc import (
    Args,
    Categoricals,
    Normals,
    cem_weights,
    initial_distribution,
    make_plan,
    make_simulator,
    mppi_weights,
    play,
)
from planning_errors import linear_quadratic
from stable_baselines3.common.monitor import load_results
from swing_up import best_return
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(mpc.__file__)
BATCHED = [f"{x}-v5" for x in ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "InvertedPendulum", "Reacher")]
CLASSIC = ["Pendulum-v1", "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Simulators -------------------------------------------------------------------------------------------------


def differences(env: gym.Env, steps: int, horizon: int) -> tuple[float, int, int]:
    """Of simulated and real rewards, the largest; ends that were met; steps. From `steps` random places of episodes."""
    env.action_space.seed(0)
    simulate, worst, ends, done = make_simulator(env.unwrapped, 3), 0.0, 0, 0
    while done < steps:
        env.reset(seed=done)
        for _ in range(done % 40):
            if env.step(env.action_space.sample())[2]:
                env.reset()
        actions = np.array([[env.action_space.sample() for _ in range(horizon)] for _ in range(3)])
        rewards = simulate(env.unwrapped, actions, rng())
        assert rewards.shape == (3, horizon)
        real = np.zeros(horizon)
        for t, action in enumerate(actions[1]):
            _, real[t], terminated, *_ = env.step(action)
            done += 1
            if terminated:
                ends += 1
                break
        worst = max(worst, np.abs(rewards[1] - real).max())
    return worst, ends, done


@pytest.mark.parametrize("env_id", BATCHED)
def test_batches_of_mujoco_are_the_environment(env_id):
    """2000 real steps, ends included (10 000 in the slow test): the warm start of the solver is in the state."""
    env = gym.make(env_id)
    assert isinstance(make_simulator(env.unwrapped, 3), mpc.MujocoBatch)
    worst, ends, _ = differences(env, 2_000, 40)
    assert worst <= 1e-6
    assert (ends > 20) == (env_id in ("Hopper-v5", "Walker2d-v5", "InvertedPendulum-v5"))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [*BATCHED, "Pendulum-v1"])
def test_10_000_steps_are_the_environments(env_id):
    worst, _, steps = differences(gym.make(env_id), 10_000, 40)
    assert steps >= 10_000 and worst <= 1e-6


@pytest.mark.parametrize("env_id", [*CLASSIC, "FrozenLake-v1", "InvertedDoublePendulum-v5"])
def test_copies_are_the_environment(env_id):
    """Deterministic ones; of FrozenLake that is not slippery."""
    env = gym.make(env_id, **{"is_slippery": False} if env_id == "FrozenLake-v1" else {})
    simulator = make_simulator(env.unwrapped, 3)
    assert simulator is (mpc.pendulum if env_id == "Pendulum-v1" else mpc.copies)
    worst, _, _ = differences(env, 300, 30)
    assert worst <= 1e-12


def test_keywords_of_the_environment_are_the_simulators():
    """Whatever Hopper is paid for, and when it ends."""
    for kwargs in (
        dict(terminate_when_unhealthy=False, healthy_reward=3.0, forward_reward_weight=2.0, ctrl_cost_weight=0.5),
        dict(healthy_z_range=(1.2, 1.3), healthy_angle_range=(-0.05, 0.05), healthy_state_range=(-0.7, 0.7)),
    ):
        worst, ends, _ = differences(gym.make("Hopper-v5", **kwargs), 500, 20)
        assert worst <= 1e-6 and (ends == 0) == ("terminate_when_unhealthy" in kwargs)
    assert differences(gym.make("Reacher-v5", reward_dist_weight=2.0, reward_control_weight=0.1), 200, 20)[0] <= 1e-6


@pytest.mark.parametrize("env_id", [*CLASSIC, "FrozenLake-v1", "Hopper-v5", "InvertedDoublePendulum-v5"])
def test_simulating_leaves_the_environment_as_it_is(env_id):
    """What it does next, dice included, is what it would have done."""
    env, twin = gym.make(env_id), gym.make(env_id)
    env.reset(seed=3)
    twin.reset(seed=3)
    env.action_space.seed(0)
    actions = np.array([[env.action_space.sample() for _ in range(10)] for _ in range(4)])
    simulate = make_simulator(env.unwrapped, 4)
    for t in range(5):
        simulate(env.unwrapped, actions, rng())
        ours, theirs = env.step(actions[0, t]), twin.step(actions[0, t])
        assert np.array_equal(ours[0], theirs[0]) and ours[1:4] == theirs[1:4]


def test_plans_do_not_know_the_environments_dice():
    """On slippery ice one sequence has many outcomes, by the planner's own generator, and the same with its seed."""
    env = gym.make("FrozenLake-v1", desc=["SFFG"], is_slippery=True)
    env.reset(seed=0)
    actions = np.full((400, 3), 2)
    outcomes = [mpc.copies(env.unwrapped, actions, rng(seed)).sum(1) for seed in (0, 0, 1)]
    assert 0 < outcomes[0].mean() < 0.6 and (outcomes[0] == outcomes[1]).all() and (outcomes[0] != outcomes[2]).any()


def test_nothing_is_gained_after_an_end():
    """A Hopper that falls: its rewards are those up to the fall, the last included, then 0."""
    env = gym.make("Hopper-v5")
    env.reset(seed=0)
    actions = np.ones((2, 60, 3), np.float32)
    rewards = make_simulator(env.unwrapped, 2)(env.unwrapped, actions, rng())[0]
    for length in range(1, 61):
        _, reward, terminated, *_ = env.step(actions[0, 0])
        assert rewards[length - 1] == pytest.approx(reward)
        if terminated:
            break
    assert length < 60 and not rewards[length:].any()


# Distributions and weights ----------------------------------------------------------------------------------


def normals(horizon: int = 4) -> Normals:
    space = Box(np.float32([-1, -2]), np.float32([1, 2]))
    return Normals(space, rng(1).normal(size=(horizon, 2)), 0.1 + rng(2).random((horizon, 2)))


def test_normals_have_their_mean_deviation_and_correlation():
    draws = normals().sample(40_000, 0.7, rng())
    assert np.abs(draws.mean(0) - normals().mean).max() < 0.03
    assert np.abs(draws.std(0) / normals().deviation - 1).max() < 0.03
    noise = (draws - normals().mean) / normals().deviation
    for apart in (1, 2, 3):
        assert (noise[:, apart] * noise[:, 0]).mean() == pytest.approx(0.7**apart, abs=0.02)
    assert abs((noise[:, 0, 0] * noise[:, 0, 1]).mean()) < 0.02
    actions = normals().actions(draws)
    assert actions.dtype == np.float32 and (np.abs(actions) <= [1, 2]).all() and np.abs(draws[..., 1]).max() > 2
    assert np.array_equal(actions, draws.clip([-1, -2], [1, 2]).astype(np.float32))


def test_categoricals_have_their_probabilities_and_correlation():
    p = rng(3).dirichlet(np.ones(3), 4)
    draws = Categoricals(Discrete(3, start=5), p).sample(40_000, 0.0, rng())
    for t in range(4):
        assert scipy.stats.chisquare(np.bincount(draws[:, t], minlength=3), 40_000 * p[t]).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.02
    uniform = Categoricals(Discrete(3, start=5), np.full((4, 3), 1 / 3))
    draws = uniform.sample(40_000, 0.6, rng())
    assert (draws[:, 1] == draws[:, 0]).mean() == pytest.approx(0.6 + 0.4 / 3, abs=0.01)
    assert set(uniform.actions(draws).ravel()) == {5, 6, 7}
    assert Categoricals(Discrete(3, start=5), p).likeliest().tolist() == p.argmax(1).tolist()


def test_cem_refits_to_the_elites():
    """By mean and standard deviation, or frequency, of the M best; of equal ones the first."""
    returns = np.array([1.0, 5.0, 3.0, 5.0, 3.0])
    assert cem_weights(returns, 3).tolist() == [0, 1 / 3, 1 / 3, 1 / 3, 0]
    draws = rng().normal(size=(5, 4, 2))
    found = normals().refitted(draws, cem_weights(returns, 3), spread=True)
    assert found.mean == pytest.approx(draws[[1, 2, 3]].mean(0)) and found.deviation == pytest.approx(
        draws[[1, 2, 3]].std(0)
    )
    draws = np.array([[0, 1], [2, 1], [2, 0], [1, 1], [0, 0]])
    p = Categoricals(Discrete(3), np.full((2, 3), 1 / 3)).refitted(draws, cem_weights(returns, 3), spread=True).p
    assert p == pytest.approx(np.array([[0, 1 / 3, 2 / 3], [1 / 3, 2 / 3, 0]]))


def test_mppi_weighs_by_the_exponential_of_the_return():
    returns = 1e6 + np.array([0.0, 1.0, -2.0])
    expected = np.exp([0.0, 0.5, -1.0])
    assert mppi_weights(returns, 2.0) == pytest.approx(expected / expected.sum())
    assert mppi_weights(np.array([0.0, -math.inf]), 1.0).tolist() == [1, 0]
    draws = rng().normal(size=(3, 4, 2))
    found = normals().refitted(draws, mppi_weights(returns, 2.0), spread=False)
    assert found.mean == pytest.approx((expected[:, None, None] * draws).sum(0) / expected.sum())
    assert np.array_equal(found.deviation, normals().deviation)


def test_what_is_left_of_a_plan_is_where_the_next_begins():
    initial = Normals(normals().space, np.full((4, 2), 9.0), np.full((4, 2), 2.0))
    found = normals().shifted(initial, 3, min_noise=0.25)
    assert np.array_equal(found.mean, np.concatenate([normals().mean[3:], initial.mean[:3]]))
    assert np.array_equal(found.deviation, np.concatenate([normals().deviation[3:].clip(0.5), initial.deviation[:3]]))
    p, uniform = rng(3).dirichlet(np.ones(3), 4), np.full((4, 3), 1 / 3)
    found = Categoricals(Discrete(3), p).shifted(Categoricals(Discrete(3), uniform), 1, min_noise=0.4)
    assert found.p == pytest.approx(0.6 * np.concatenate([p[1:], uniform[:1]]) + 0.4 / 3)


def test_the_initial_distribution_is_around_the_middle():
    args = Args(horizon=3, noise=0.5)
    found = initial_distribution(Box(np.float32([0, -np.inf]), np.float32([4, np.inf])), args)
    assert found.mean.tolist() == [[2, 0]] * 3 and found.deviation.tolist() == [[1, 0.5]] * 3
    assert initial_distribution(Discrete(4), args).p.tolist() == [[0.25] * 4] * 3


# Planners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner, close", [("random", 3.0), ("cem", 0.02), ("mppi", 0.2)])
def test_plans_of_a_linear_quadratic_problem_approach_lqrs(planner, close):
    """The distance falls with the population, and CEM's is small."""
    simulate, exact, env = linear_quadratic(10)
    distances = []
    for population in (20, 2_000):
        args = Args(
            planner=planner,
            horizon=10,
            population=population,
            elites=population // 10,
            correlation=0.0,
            temperature=0.02,
        )
        args = replace(args, noise=0.3, kept=1)
        initial = initial_distribution(env.action_space, args)
        plans = [make_plan(simulate, initial, None, 30, args, rng(seed)) for seed in range(5)]
        distances.append(np.mean([np.linalg.norm(plan.actions - exact) for plan in plans]))
        best = simulate(exact[None]).sum()
        assert all(plan.rewards.sum() <= best + 1e-6 for plan in plans)
    assert distances[1] < distances[0] and distances[1] < close


@pytest.mark.parametrize("planner", ["random", "cem", "mppi"])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_a_plan_promises_what_was_simulated_and_begins_with_what_was_kept(planner, env_id):
    if (planner, env_id) == ("random", "CartPole-v1"):
        pytest.skip("as the others")
    env = gym.make(env_id)
    env.reset(seed=0)
    calls, simulator = [], make_simulator(env.unwrapped, 30)

    def simulate(actions):
        calls.append((actions, simulator(env.unwrapped, actions, rng())))
        return calls[-1][1]

    args = Args(planner=planner, horizon=15, population=30, elites=5, kept=4, temperature=0.5)
    initial = initial_distribution(env.action_space, args)
    kept = initial.sample(4, 0.5, rng(7))
    plan = make_plan(simulate, initial, kept, 3, args, rng(1))
    assert len(calls) == (1 if planner == "random" else 4)
    assert np.array_equal(calls[0][0][:4], initial.actions(kept))
    if planner != "random":
        order = np.argsort(-calls[0][1].sum(1), kind="stable")[:4]
        assert np.array_equal(calls[1][0][:4], calls[0][0][order]), "the best stay among the candidates"
    assert np.array_equal(simulator(env.unwrapped, plan.actions[None], rng())[0], plan.rewards)
    assert np.array_equal(plan.distribution.actions(plan.kept[0]), plan.actions) and plan.kept.shape == kept.shape
    most = max(rewards.sum(1).max() for _, rewards in calls)
    if planner == "mppi":
        assert np.array_equal(calls[-1][0][0], plan.actions), "its mean"
    else:
        assert plan.rewards.sum() == most


def test_mppi_moves_its_mean_by_the_weights():
    """One iteration by hand."""
    simulate, _, env = linear_quadratic(5)
    args = Args(planner="mppi", horizon=5, population=50, temperature=0.3, correlation=0.4, kept=1)
    initial = initial_distribution(env.action_space, args)
    plan = make_plan(simulate, initial, None, 1, args, rng(4))
    draws = initial.sample(50, 0.4, rng(4))
    weights = mppi_weights(simulate(draws.astype(np.float32)).sum(1), 0.3)
    assert plan.actions == pytest.approx(np.einsum("n,nhm->hm", weights, draws), abs=1e-6)
    assert np.array_equal(plan.distribution.deviation, initial.deviation)


def test_returns_that_are_not_numbers_are_never_best():
    args = Args(planner="cem", horizon=3, population=20, elites=5, kept=1)

    def simulate(actions):
        rewards = np.square(actions[..., 0]).astype(float)
        rewards[::2, 0] = np.nan
        return rewards

    plan = make_plan(simulate, initial_distribution(Box(-1, 1, (1,)), args), None, 1, args, rng())
    assert np.isfinite(plan.rewards).all()


# Playing ----------------------------------------------------------------------------------------------------

TINY = dict(horizon=10, population=20, elites=4, kept=2, iterations=2, first_iterations=2)


@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", "CartPole-v1", "Hopper-v5", "Reacher-v5", "HalfCheetah-v5", "Walker2d-v5"]
)
def test_a_return_promised_is_the_return_got(tmp_path, env_id):
    """Also where the episode ends, or is cut, within a plan."""
    args = Args(**TINY, env_id=env_id, replan_every=7, eval_episodes=2, max_episode_steps=60, output_dir=str(tmp_path))
    result = play(args)
    assert result["promised"] == pytest.approx(result["returns"], abs=1e-6)
    (run_dir,) = tmp_path.glob("*__mpc__*")
    assert (load_results(str(run_dir))["l"] <= 60).all()


def test_plans_are_played_for_as_many_steps_as_asked(tmp_path, monkeypatch):
    """Each begins from the rest of the one before."""
    plans = []
    monkeypatch.setattr(mpc, "make_plan", lambda *a: plans.append((a, make_plan(*a))) or plans[-1][1])
    args = Args(**TINY, replan_every=4, eval_episodes=1, max_episode_steps=21, output_dir=str(tmp_path), min_noise=0.2)
    play(replace(args, first_iterations=5))
    assert len(plans) == 6 and [a[3] for a, _ in plans] == [5] + [2] * 5
    (_, before), (after, _) = plans[2:4]
    assert np.array_equal(after[2][:, :6], before.kept[:, 4:]) and after[2].shape == before.kept.shape
    assert np.array_equal(after[1].mean[:6], before.distribution.mean[4:])
    assert after[1].deviation.min() >= 0.2 * 2 * args.noise - 1e-12


def test_same_seed_same_bits(tmp_path):
    args = Args(**TINY, env_id="Hopper-v5", eval_episodes=1, max_episode_steps=15)
    runs = [play(replace(args, seed=s, output_dir=str(tmp_path / str(i)))) for i, s in enumerate((1, 1, 2))]
    assert runs[0]["returns"].tolist() == runs[1]["returns"].tolist() != runs[2]["returns"].tolist()


def test_a_run_leaves_what_it_says(tmp_path):
    line = [
        sys.executable,
        SCRIPT,
        "--output-dir",
        tmp_path,
        "--env-id",
        "CartPole-v1",
        "--population",
        20,
        "--elites",
        4,
    ]
    line += ["--horizon", 8, "--max-episode-steps", 12, "--eval-episodes", 2]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=True)
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.startswith("CartPole-v1__mpc__1__") and str(run_dir) in done.stdout
    assert "promised: " in done.stdout and "Warning" not in done.stderr
    about = json.loads((run_dir / "args.json").read_text())["args"]
    assert about["horizon"] == 8 and about["correlation"] == 0.5, "recommended, unless a flag says otherwise"
    assert load_results(str(run_dir))["l"].tolist() == [12, 12]
    tags = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    assert {"charts/episodic_return", "eval/episodic_return", "plans/promised_return", "plans/seconds"} <= tags


@pytest.mark.parametrize(
    "change, hint",
    [
        (dict(elites=50), "--population"),
        (dict(kept=50), "--population"),
        (dict(replan_every=11), "--horizon"),
        (dict(env_id="Taxi-v0"), "Taxi-v0"),
        (dict(temperature=0.0), "--temperature"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(capsys, change, hint):
    with pytest.raises(SystemExit) as stop:
        play(Args(**TINY | change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and hint in error and error.count("\n") == 1


def test_other_action_spaces_are_refused(capsys, monkeypatch):
    env = gym.make("Pendulum-v1")
    env.action_space = Box(-1, 1, (2, 2))
    monkeypatch.setattr(mpc, "make_env", lambda args: copy.copy(env))
    with pytest.raises(SystemExit) as stop:
        play(Args(**TINY))
    assert stop.value.code == 2 and "one-dimensional" in capsys.readouterr().err


# Slow: returns ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_swing_ups_are_within_4_of_dynamic_programming(tmp_path):
    result = play(replace(Args(), **mpc.RECOMMENDED["Pendulum-v1"], output_dir=str(tmp_path)))
    best = np.array([best_return(1_000_001 + i) for i in range(10)])
    print((result["returns"] - best).round(2).tolist())
    assert (result["returns"] >= best - 4).all()


@pytest.mark.slow
def test_cart_poles_stand(tmp_path):
    result = play(replace(Args(), **mpc.RECOMMENDED["CartPole-v1"], env_id="CartPole-v1", output_dir=str(tmp_path)))
    assert result["returns"].tolist() == [500] * 3
