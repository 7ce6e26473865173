"""benchmarks/aggregate.py: what both sides have measured, pooled."""

import shutil

import aggregate
import numpy as np
import pandas as pd
import pytest
import report
import run

BINS = aggregate.BINS


def test_returns_are_normalised_by_random_actions_and_the_reference():
    random, best = aggregate.REFERENCES["Pendulum-v1"]
    np.testing.assert_allclose(
        aggregate.normalised(np.array([random, best, (random + best) / 2]), "Pendulum-v1"), [0, 1, 0.5]
    )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_the_random_policys_return_is_measured(env_id):
    assert aggregate.REFERENCES[env_id][0] == round(aggregate.random_return(env_id), 1)


def test_a_profile_is_the_share_of_runs_above_every_threshold():
    shares = aggregate.profile(np.array([0.1049, 0.5049, 0.5049, 2.0]))
    at = dict(zip(aggregate.THRESHOLDS.round(2), shares))
    assert (at[0.0], at[0.1], at[0.11], at[0.5], at[0.51], at[1.05]) == (1, 1, 0.75, 0.75, 0.25, 0.25)


def mean_of_runs(scores):
    return scores.mean(-1)


def test_seeds_are_resampled_within_each_pair_of_algorithm_and_environment():
    """Two pairs whose seeds agree leave nothing to resample, however far apart they are."""
    apart = [np.zeros(4), np.ones(12)]
    np.testing.assert_allclose(aggregate.stratified(mean_of_runs, apart), 0.75)
    mean, low, high = aggregate.stratified(mean_of_runs, [np.arange(10.0), np.full(10, 100.0)])
    deviation = np.arange(10).std() / 10**0.5 / 2
    assert mean == 52.25 and low == pytest.approx(mean - 1.96 * deviation, abs=0.15)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.15)


def test_a_difference_resamples_the_same_seeds_on_both_sides():
    """What a seed has in common on both sides is no difference, however far apart the seeds are."""
    ours = [np.arange(10.0) * 100, np.arange(4.0)]
    sb3 = [x - 3 for x in ours]
    np.testing.assert_allclose(aggregate.stratified(lambda x, y: x.mean(-1) - y.mean(-1), ours, sb3), 3)
    _, low, high = aggregate.stratified(mean_of_runs, ours)
    assert low < high - 100


def test_a_course_is_the_iqm_of_the_runs_in_each_bin():
    scores = np.array([[0.0, 9], [1, 1], [3, 1], [99, 1]])
    np.testing.assert_allclose(aggregate.course(scores), [2, 1])


def test_a_run_is_read_at_the_time_that_it_has_reached():
    """One is done after half of the duration, the other only halfway at its end."""
    bins = np.arange(BINS)
    fast = pd.DataFrame({"r": bins, "t": (bins + 1) * 50 / BINS})
    slow = pd.DataFrame({"r": bins, "t": (bins + 1) * 200 / BINS})
    one, other = aggregate.over_time([fast, slow], duration=100.0)
    np.testing.assert_array_equal(one, (2 * bins + 1).clip(max=BINS - 1))
    np.testing.assert_array_equal(other, ((bins + 1) // 2 - 1).clip(min=0))


@pytest.fixture
def recorded(tmp_path):
    """Ours: seeds 1 to 3, SB3: 2 to 4, with training returns that rise from 22.2 to 500, SB3's in twice the time."""
    rows = []
    (tmp_path / "episodes").mkdir()
    for impl, seeds, seconds in (("ours", (1, 2, 3), 10), ("sb3", (2, 3, 4), 20)):
        for seed in seeds:
            cell = run.Cell(impl, "a2c", "CartPole-v1", seed, 100_000)
            rise = np.linspace(22.2, 500, 1000) + 1000 * (seed in (1, 4))
            episodes = pd.DataFrame({"r": rise, "l": 100, "t": np.linspace(0, seconds, 1000)})
            episodes.to_csv(tmp_path / "episodes" / f"{cell.name}.csv.gz", index=False)
            rows.append(dict(zip(run.KEY, (impl, "a2c", "CartPole-v1", seed, 100_000))) | {"eval_mean": 22.2 + seed})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return run.read_runs(tmp_path), tmp_path


def test_only_what_both_sides_have_measured_is_pooled(recorded):
    runs, results = recorded
    groups = [("a2c", "CartPole-v1", 100_000), ("a2c", "CartPole-v1", 200_000), ("ppo", "CartPole-v1", 100_000)]
    assert aggregate.paired(groups, runs) == [(groups[0], [2, 3])]
    strata = aggregate.measured(groups, runs, results)
    rise = (np.arange(BINS) + 0.5) / BINS
    for side, speed in (("ours", 2), ("sb3", 1)):
        (evaluation,), (steps,), (time,) = strata[side].values()
        np.testing.assert_allclose(evaluation, np.array([2, 3]) / (500 - 22.2))
        np.testing.assert_allclose(steps, [rise, rise], atol=2e-3)
        np.testing.assert_allclose(time, [np.minimum(speed * rise, rise[-1])] * 2, atol=0.03)


def test_the_section_pools_pairs_of_enough_seeds(recorded, monkeypatch):
    """Both sides share two seeds of A2C on CartPole and, once copied there, of PPO and DQN, and one seed of TRPO."""
    runs, results = recorded
    algos = ("a2c", "ppo", "dqn", "trpo")
    for impl, _, *rest in runs.index:
        a2c, *others = (results / "episodes" / f"{run.Cell(impl, x, *rest).name}.csv.gz" for x in algos)
        for path in others:
            shutil.copy(a2c, path)
    runs = [runs.reset_index().assign(algo=algo, command="", code_sha256="", versions="") for algo in algos]
    runs[2]["command"] = "dqn.py --compile"
    runs[3] = runs[3][runs[3]["seed"] == 2].assign(eval_mean=500.0)
    runs = pd.concat(runs).set_index(run.KEY).sort_index()
    groups = [(algo, "CartPole-v1", 100_000) for algo in algos]
    assert report.aggregate_section("classic", groups, runs, results) == ""
    monkeypatch.setattr(report, "POOLED_SEEDS", 2)
    assert report.aggregate_section("classic", groups[:1], runs, results) == ""
    section = report.aggregate_section("classic", [*groups[:2], groups[3]], runs, results)
    assert "The 2 pairs" in section and "at least 2 seeds" in section and "compiled" not in section
    assert "| ours † | 4 | 0.005 [0.004, 0.006] | 0.005 [0.004, 0.006] |" in section and "seeds, here 2;" in section
    assert "| difference |  | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] |" in section
    assert "and 2 of our 6 were compiled. " in report.aggregate_section("classic", groups, runs, results)
    assert all((results.parent / "plots" / f"classic_{x}.png").exists() for x in ("all", "time"))
    better = runs.copy()
    better.loc["ours", "eval_mean"] = (better.loc["ours", "eval_mean"] + 477.8 / 10).to_numpy()
    assert "| difference |  | 0.100 [0.1" in report.aggregate_section("classic", groups[:2], better, results)
    monkeypatch.setattr(report, "POOLED_SEEDS", 1)
    assert "seeds, here 1 to 2;" in report.aggregate_section("classic", groups, runs, results)


def test_a_pooled_difference_is_of_the_same_seeds():
    """IQM and mean of both sides and of their difference, which is the same for every seed."""
    x = [np.array([0.0, 1.0, 2.0, 30.0]), np.array([5.0, 6.0, 7.0, 8.0])]
    np.testing.assert_allclose(report.pooled(np.mean, x)[0], 59 / 8)
    np.testing.assert_allclose(report.pooled(report.iqm, x)[0], (2 + 5 + 6 + 7) / 4)
    np.testing.assert_allclose(report.pooled(np.mean, x, [side - 3 for side in x]), 3)
