"""Both sides over a whole suite, after Agarwal et al. 2021 (arXiv 2108.13264): what the separate rows add up to.

Returns are normalised per environment, 0 a random policy's and 1 the reference's of REFERENCES, and pooled over all
pairs of algorithm and environment; an interval resamples the seeds within each pair.

    python benchmarks/aggregate.py                        # measures the random policy's returns of REFERENCES
"""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
from estimates import BINS, STYLES, binned, iqm, of_seeds, runs_of, save
from matplotlib import pyplot as plt
from run import Cell

REFERENCES = {
    "CartPole-v1": (22.2, 500.0),
    "Acrobot-v1": (-497.4, -73.5),
    "Pendulum-v1": (-1238.5, -151.9),
    "HalfCheetah-v5": (-260.8, 9655.7),
    "Hopper-v5": (18.5, 3618.4),
    "Walker2d-v5": (2.1, 4933.1),
}
"""(random_return, best of RL Baselines3 Zoo with one of our algorithms)"""
EPISODES = {"CartPole-v1": 1000, "Acrobot-v1": 200, "HalfCheetah-v5": 20}
"""of random actions; 300 elsewhere"""
SIDES = {"ours": "ours", "sb3": "Stable-Baselines3"}
THRESHOLDS = np.linspace(0, 1.05, 106)
"""of the profile"""
RESAMPLES, BATCH = 1000, 50

Strata = list[np.ndarray]
"""Per pair of algorithm and environment an array whose first dimension are its runs."""


def random_return(env_id: str) -> float:
    """Mean return of random actions over EPISODES; the same at every call."""
    env, total = gym.make(env_id), 0.0
    env.action_space.seed(0)
    for seed in range(EPISODES.get(env_id, 300)):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, ended = total + reward, terminated or truncated
    return total / (seed + 1)


def normalised(returns, env_id: str):
    """0 for random actions' mean return, 1 for the reference's."""
    random, reference = REFERENCES[env_id]
    return (returns - random) / (reference - random)


def profile(scores: np.ndarray) -> np.ndarray:
    """Share of the runs (…, runs) above each of THRESHOLDS (…, 106)."""
    return (scores[..., None] > THRESHOLDS).mean(-2)


def course(scores: np.ndarray) -> np.ndarray:
    """IQM over the runs (…, runs, BINS) in every bin (…, BINS)."""
    return iqm(scores, axis=-2)


def stratified(statistic: Callable[..., np.ndarray], *sides: Strata) -> np.ndarray:
    """statistic(all runs of each side pooled), then the ends of its 95 % bootstrap interval, stacked (3, …).

    The statistic takes resamples (…, runs) or (…, runs, BINS) at once; those of several sides are of the same seeds.
    """
    rng, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLES // BATCH):
        rows = [rng.integers(len(x), size=(BATCH, len(x))) for x in sides[0]]
        draws = [np.concatenate([x[i] for x, i in zip(side, rows)], axis=1) for side in sides]
        resampled.extend(statistic(*draws))
    pooled = statistic(*(np.concatenate(side) for side in sides))
    return np.stack([pooled, *np.percentile(resampled, [2.5, 97.5], axis=0)])


def paired(groups: list[tuple[str, str, int]], runs: pd.DataFrame) -> list[tuple[tuple[str, str, int], list[int]]]:
    """Those (algorithm, environment, steps) that both sides have measured, with the seeds that both have."""
    pairs = []
    for algo, env_id, steps in groups:
        ours, sb3 = (runs_of(runs, impl, algo, env_id, steps).index.get_level_values("seed") for impl in SIDES)
        both = sorted(set(ours) & set(sb3))
        if both:
            pairs.append(((algo, env_id, steps), both))
    return pairs


def over_time(curves: list[pd.DataFrame], duration: float) -> np.ndarray:
    """The runs' returns at every fiftieth of `duration` seconds (runs, BINS); a run that has ended keeps its last."""
    times = (np.arange(BINS) + 1) * duration / BINS
    rows = [np.searchsorted(curve["t"], times, side="right") - 1 for curve in curves]
    return np.stack([curve["r"].to_numpy()[row.clip(min=0)] for curve, row in zip(curves, rows)])


def measured(groups: list[tuple[str, str, int]], runs: pd.DataFrame, results: Path) -> dict[str, dict[str, Strata]]:
    """By side: normalised evaluation returns, and training returns over steps and over time."""
    groups = [group for group in groups if group[1] in REFERENCES]
    strata = {side: {"evaluation": [], "steps": [], "time": []} for side in SIDES}
    for (algo, env_id, steps), seeds in paired(groups, runs):
        cells = {side: [Cell(side, algo, env_id, seed, steps) for seed in seeds] for side in SIDES}
        curves = {
            side: [binned(results / "episodes" / f"{cell.name}.csv.gz", steps).bfill() for cell in cells[side]]
            for side in SIDES
        }
        duration = np.median([curve["t"].iloc[-1] for curve in curves["sb3"]])
        for side in SIDES:
            evaluation = of_seeds(runs_of(runs, side, algo, env_id, steps), seeds)["eval_mean"].to_numpy()
            strata[side]["evaluation"].append(normalised(evaluation, env_id))
            strata[side]["steps"].append(normalised(np.stack([curve["r"] for curve in curves[side]]), env_id))
            strata[side]["time"].append(normalised(over_time(curves[side], duration), env_id))
    return strata


def plot_aggregate(strata: dict[str, dict[str, Strata]], steps_path: Path, time_path: Path) -> None:
    """Two figures: profile of the evaluations and training return over steps, and training return over time."""
    share = (np.arange(BINS) + 0.5) / BINS
    panels = [
        ("evaluation", profile, THRESHOLDS, "normalised return τ", "share of runs above τ"),
        ("steps", course, share, "share of the run's environment steps", "normalised training return"),
        ("time", course, share + 0.5 / BINS, "time, in SB3's run times", "normalised training return"),
    ]
    for path, shown in ((steps_path, panels[:2]), (time_path, panels[2:])):
        size = 5 * len(shown), 3.8
        figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
        for ax, (kind, statistic, x, xlabel, ylabel) in zip(axes.flat, shown):
            for side, label in SIDES.items():
                middle, low, high = stratified(statistic, strata[side][kind])
                ax.plot(x, middle, linewidth=1.8, label=label, **STYLES[label])
                ax.fill_between(x, low, high, color=STYLES[label]["color"], alpha=0.2, linewidth=0)
            ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, max(x[-1], 1)))
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        save(figure, path)


if __name__ == "__main__":
    for env_id, (random, _) in REFERENCES.items():
        print(f"{env_id}: {random_return(env_id):.1f}, in REFERENCES {random}", flush=True)
