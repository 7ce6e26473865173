"""Episodes until DeepSea's optimal policy is known, over its depth: six ways to explore, of algos/rmax.py.

    python benchmarks/deep_sea.py --workers 2      # about three hours of one core; again after a kill: goes on

The sea of N² states holds one reward, at the end of one path of N steps to the right; each of them costs a little, and
which action is the right one differs from cell to cell (and from seed to seed). Undirected exploration finds it with
probability 2^−N an episode at best, and with less if it learns that right costs. Counted are the episodes until the
plan without a bonus, that keeps to what was tried, is optimal: its value, in the true table, is V* to 1e-9. A run
without it after LIMIT episodes is censored. Each finished run is a row of results/deep_sea.csv.
"""

import importlib
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from estimates import markdown, number, plt, save, tidy
from rows import measured_rows
from run import RESULTS, ROOT, tree_sha256

rmax = importlib.import_module("rmax")  # run.py has put algos/ on the path

DEPTHS = range(4, 33, 4)
SHALLOW = (2, 3, 5, 6, 7)
"""depths for undirected exploration, too: where it still arrives"""
LIMIT = 100_000
KEY = ["optimism", "epsilon", "depth", "seed"]
DIRECTED = [("rmax", 0.0), ("ucb", 0.0), ("mbie-eb", 0.0), ("beb", 0.0), ("thompson", 0.0)]
UNDIRECTED = [("none", 0.1), ("none", 1.0)]


def value(env, policy: np.ndarray) -> float:
    """Sum of the rewards from the start on (no chance is at work)."""
    state, total, done = 0, 0.0, False
    while not done:
        ((_, state, reward, done),) = env.P[state][policy[state]]
        total += reward
    return total


def is_known(seen, env, args) -> bool:
    """Whether the plan that keeps to what was tried is optimal."""
    q_values = rmax.plan(rmax.estimate(seen, np.where(seen.counts, 0, -np.inf)), np.zeros(len(seen.counts)), args)
    return value(env, q_values.argmax(1)) >= 0.99 - 1e-9


def code() -> str:
    """Of what of rmax.py is run here."""
    return tree_sha256((ROOT / "algos" / "rmax.py").read_text(encoding="utf-8"), ("DeepSea", "play_episode"))


def episodes_needed(optimism: str, epsilon: float, depth: int, seed: int) -> dict:
    """LIMIT + 1 where LIMIT are not enough, and the hash of what was run."""
    args = rmax.Args(optimism=optimism, epsilon=epsilon)
    env, rng, shape = rmax.DeepSea(depth, seed), np.random.default_rng(seed), (depth**2, 2)
    seen, values = rmax.Experience(Counter(), np.zeros(shape, int), np.zeros(shape)), np.zeros(depth**2)
    for episodes in range(1, LIMIT + 2):
        total, _, values = rmax.play_episode(env, seen, values, args, rng)
        if episodes > LIMIT or (total > 0.5 and is_known(seen, env, args)):  # before that nobody can know
            break
    return {"episodes": episodes, "code_sha256": code()}


SECTION = """
## Directed and undirected exploration

Episodes until DeepSea's optimal policy is known, median of {seeds} seeds ([deep_sea.py](deep_sea.py) with
[rmax.py](../algos/rmax.py)); a depth of N has N² states and one rewarded path of N steps. All know that no reward is
above 1 in size, and nothing else. Look at the two plots, of the same numbers: what is straight on the left is
exponential in the depth, what is straight on the right polynomial. > says that half of the runs or more had not found
it after {limit} episodes (hollow in the plots). The last column is fitted to the means of the depths at which every run
arrived; the exponential's for undirected exploration, the power of N for the others.

{table}

![Episodes over depth, twice]({plot})
"""
NAMES = {("none", 0.1): "ε-greedy, ε = 0.1", ("none", 1.0): "at random, ε = 1"}
COLORS = {"rmax": "#0072B2", "ucb": "#56B4E9", "mbie-eb": "#009E73", "beb": "#CC79A7", "thompson": "#E69F00"}


def section(results: Path) -> str:
    """Of the page, "" without deep_sea.csv; draws the plot."""
    path = results / "deep_sea.csv"
    if not path.exists():
        return ""
    rows = pd.read_csv(path)
    rows = rows.groupby(KEY[:3]).filter(lambda x: len(x) == rows["seed"].max())  # depths that are complete
    changed = "" if (rows["code_sha256"] == code()).all() else " †"
    depths, table = sorted(rows["depth"].unique()), []
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for optimism, epsilon in UNDIRECTED + DIRECTED:
        mine = rows[(rows["optimism"] == optimism) & (rows["epsilon"] == epsilon)].groupby("depth")["episodes"]
        median, name = mine.median(), NAMES.get((optimism, epsilon), optimism)
        fitted = mine.mean()[mine.max() <= LIMIT]
        x = fitted.index if optimism == "none" else np.log(fitted.index)
        slope = np.polyfit(x, np.log(fitted), 1)[0] if len(x) > 2 else np.nan
        fit = f"{number(np.exp(slope), 2)}^N" if optimism == "none" else f"N^{number(slope, 2)}"
        fit = "–" if np.isnan(slope) else fit
        cells = [
            f"> {LIMIT}" if median.get(n, 0) > LIMIT else number(median[n], 0) if n in median else "–" for n in depths
        ]
        table.append({"": name + changed} | dict(zip(depths, cells)) | {"fit": fit})
        style = dict(color=COLORS.get(optimism, "#D55E00" if epsilon == 0.1 else "#555555"))
        style |= dict(linestyle="--" if optimism == "none" else "-", linewidth=1.2)
        low, high, over = mine.quantile(0.25), mine.quantile(0.75), median > LIMIT
        for ax in axes:
            ax.plot(median.index, median, **style, label=name)
            ax.fill_between(median.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
            for marked, face in ((~over, style["color"]), (over, "white")):
                ax.plot(median[marked], "o", markersize=4, markerfacecolor=face, markeredgecolor=style["color"])
    for ax in axes:
        ax.set(yscale="log")
        tidy(ax, "depth N", "episodes until the optimal policy is known")
    axes[0].set(title="exponential: straight here")
    axes[1].set(title="polynomial: straight here", xscale="log", ylabel="")
    axes[1].set(xticks=(2, 4, 8, 16, 32), xticklabels=(2, 4, 8, 16, 32))
    axes[1].minorticks_off()
    axes[0].set(xticks=DEPTHS)
    for ax in axes:
        ax.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(figure, results.parent / "plots" / "deep_sea.png")
    seeds = rows.groupby(KEY[:3]).size().max()
    return SECTION.format(table=markdown(table), plot="plots/deep_sea.png", seeds=seeds, limit=LIMIT)


@dataclass
class Args:
    workers: int = 1
    """runs at a time; each uses one thread"""
    seeds: int = 10
    """seeds per way and depth, from 1"""
    results: Path = RESULTS
    """folder of deep_sea.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    ways = [*product(DIRECTED + UNDIRECTED, DEPTHS), *product(UNDIRECTED, SHALLOW)]
    ways.sort(key=lambda x: x[1])  # by depth
    cells = [(*way, depth, seed) for way, depth in ways for seed in range(1, args.seeds + 1)]
    rows = measured_rows(args.results / "deep_sea.csv", KEY, cells, episodes_needed, args.workers)
    print(rows.groupby(KEY[:3])["episodes"].median().unstack("depth").to_string())


if __name__ == "__main__":
    main()
