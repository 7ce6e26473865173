"""How mistakes add up over a horizon of T steps: cloning pays of the order of ε T² for an error of ε, DAgger of ε T.

    python benchmarks/compounding_error.py --workers 2      # 100 runs; again after a kill: goes on

The environment is a ledge. On it the right action is 0 or 1, as a hint says that is wrong with probability ε: the
expert knows better, but nobody who sees the hint alone errs less often. A mistake ends on the ground, where only
action 2 is right and leads back up. The expert never goes there, so a clone has not learned what to do, and stays.
Both algorithms get the same number of labels at every T. The returns are minus the number of mistakes. Expected are

    cloning    Σ_{t=1}^{T} (1 − (1 − ε)^t) ≈ ε T² / 2   mistaken from the first error to the end (Ross and Bagnell 2010)
    DAgger     ε T, but for terms in ε²                   mistaken once, then back (Ross et al. 2011)

Runs train() of algos/bc.py and algos/dagger.py; each finished run is a row of results/compounding_error.csv.
"""

import contextlib
import importlib
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.spaces import Box, Discrete
from rows import measured_rows
from run import RESULTS, source_sha256

ERROR = 0.002
"""ε"""
HORIZONS = (10, 20, 40, 80, 160)
LABELS = 5_000
EPISODES = 2_000
KEY = ["algo", "horizon", "seed"]
FLAGS = {
    "bc": "--hidden-sizes 32 --epochs 20",
    "dagger": "--hidden-sizes 32 --epochs 5 --steps-per-iteration 500",
}


class Ledge(gym.Env):
    """Observations: the hint, −1 or 1, and whether the learner is on the ground, where the hint means nothing."""

    observation_space, action_space = Box(-1, 1, (2,)), Discrete(3)
    right_in_newest = 0
    """right action in the ledge that was observed last: what the expert knows"""

    def observe(self) -> np.ndarray:
        self.right = Ledge.right_in_newest = 2 if self.on_ground else int(self.np_random.integers(2))
        hint = self.np_random.integers(2) if self.on_ground else self.right ^ (self.np_random.random() < ERROR)
        return np.float32([2 * hint - 1, self.on_ground])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.on_ground = False
        return self.observe(), {}

    def step(self, action):
        self.on_ground = bool(action != self.right)
        return self.observe(), -float(self.on_ground), False, False, {}


def expert(obs: np.ndarray) -> np.ndarray:
    """Right actions (1,) in the one ledge that a learner trains in."""
    return np.array([Ledge.right_in_newest])


def mistakes(algo: str, horizon: int, seed: int) -> float:
    """Mean number of them in an episode, of a policy trained on LABELS labels."""
    script, env_id = importlib.import_module(algo), f"Ledge{horizon}-v0"
    if env_id not in gym.registry:
        gym.register(env_id, Ledge, max_episode_steps=horizon)
    seed *= EPISODES  # an evaluation has a seed for each episode, counted on from its run's: share none
    flags = f"--env-id {env_id} --seed {seed} --total-timesteps {LABELS} --eval-episodes {EPISODES} {FLAGS[algo]}"
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        args = script.parse_args([*flags.split(), "--output-dir", folder])
        with patch.object(script, "find_expert", lambda *_: expert), contextlib.redirect_stdout(nowhere):
            with contextlib.redirect_stderr(nowhere):
                return -float(np.mean(script.train(args)["returns"]))


def measured(algo: str, horizon: int, seed: int) -> dict:
    """The row of a run."""
    return {"mistakes": mistakes(algo, horizon, seed), "code_sha256": source_sha256("ours", algo)}


@dataclass
class Args:
    workers: int = 1
    """runs at a time; each uses one thread"""
    seeds: int = 10
    """seeds per algorithm and horizon, from 1"""
    results: Path = RESULTS
    """folder of compounding_error.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    cells = [*product(FLAGS, HORIZONS, range(1, args.seeds + 1))]
    rows = measured_rows(args.results / "compounding_error.csv", KEY, cells, measured, args.workers)
    print(rows.groupby(["algo", "horizon"])["mistakes"].describe()[["count", "mean", "std"]].to_string())


if __name__ == "__main__":
    main()
