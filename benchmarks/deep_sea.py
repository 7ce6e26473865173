"""Episodes until DeepSea's optimal policy is known, over its depth: six ways to explore, of algos/rmax.py.

    python benchmarks/deep_sea.py --workers 2      # about three hours of one core; again after a kill: goes on

The sea of N² states holds one reward, at the end of one path of N steps to the right; each of them costs a little, and
which action is the right one differs from cell to cell (and from seed to seed). Undirected exploration finds it with
probability 2^−N an episode at best, and with less if it learns that right costs. Counted are the episodes until the
plan without a bonus, that keeps to what was tried, is optimal: its value, in the true table, is V* to 1e-9. A run
without it after LIMIT episodes is censored. Each finished run is a row of results/deep_sea.csv.
"""

import importlib
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from run import RESULTS, ROOT, tree_sha256
from tqdm import tqdm

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


def episodes_needed(optimism: str, epsilon: float, depth: int, seed: int) -> int:
    """LIMIT + 1 where LIMIT are not enough."""
    args = rmax.Args(optimism=optimism, epsilon=epsilon)
    env, rng, shape = rmax.DeepSea(depth, seed), np.random.default_rng(seed), (depth**2, 2)
    seen, values = rmax.Experience(Counter(), np.zeros(shape, int), np.zeros(shape)), np.zeros(depth**2)
    for number in range(1, LIMIT + 1):
        total, _, values = rmax.play_episode(env, seen, values, args, rng)
        if total > 0.5:  # before that nobody can know
            known = rmax.estimate(seen, np.where(seen.counts, 0, -np.inf))
            policy = rmax.plan(known, np.zeros(depth**2), args).argmax(1)
            if value(env, policy) >= 0.99 - 1e-9:
                return number
    return LIMIT + 1


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
    path = args.results / "deep_sea.csv"
    rows = pd.read_csv(path).set_index(KEY) if path.exists() else pd.DataFrame()
    ways = [*product(DIRECTED + UNDIRECTED, DEPTHS), *product(UNDIRECTED, SHALLOW)]
    ways.sort(key=lambda x: x[1])  # by depth
    cells = [(*way, depth, seed) for way, depth in ways for seed in range(1, args.seeds + 1)]
    code = tree_sha256((ROOT / "algos" / "rmax.py").read_text(encoding="utf-8"), ("DeepSea", "play_episode"))
    todo = [x for x in cells if x not in rows.index]
    with ProcessPoolExecutor(args.workers) as pool:
        futures = {pool.submit(episodes_needed, *cell): cell for cell in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run", smoothing=0):
            row = {"episodes": future.result(), "code_sha256": code}
            row = pd.DataFrame([row], index=pd.MultiIndex.from_tuples([futures[future]], names=KEY))
            rows = pd.concat([rows, row]).sort_index()
            rows.to_csv(path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the old file whole
    print(rows.groupby(KEY[:3])["episodes"].median().unstack("depth").to_string())


if __name__ == "__main__":
    main()
