"""How many environment steps a task takes: MBPO against SAC, here and in Stable-Baselines3, on Pendulum-v1.

    python benchmarks/steps_to_solve.py --workers 2         # 15 runs, about an hour; again after a kill: goes on

Each run is the script's own, with its recommended settings, but for one thing: every 100 environment steps the
deterministic policy is evaluated for 20 fresh episodes, the same ones every time. The task counts as solved at the
first evaluation that reaches −175. An evaluation draws no random number of the training's, so it changes nothing.

Each finished run is 30 or 50 rows of results/steps_to_solve.csv.
"""

import contextlib
import importlib
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pandas as pd
import torch
import tyro
from run import RESULTS, source_sha256
from sb3 import MODELS, make_env, parse_args
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from tqdm import tqdm

ENV_ID, SOLVED = "Pendulum-v1", -175
EVERY, EPISODES = 100, 20
SIDES = {("ours", "mbpo"): 3_000, ("ours", "sac"): 5_000, ("sb3", "sac"): 5_000}
"""(implementation, algorithm) and its runs' environment steps"""
KEY = ["impl", "algo", "seed", "step"]


def returns_ours(algo: str, args) -> list[float]:
    """Mean return of the policy's evaluation after every EVERY environment steps of training."""
    script, returns = importlib.import_module(algo), []
    goes_on = script.Run.goes_on

    def evaluating(run) -> bool:  # every iteration asks this once, at its beginning
        if run.step and run.step % EVERY == 0:
            returns.append(script.evaluate(run.modules["agent"], args).mean())
        return goes_on(run)

    with patch.object(script.Run, "goes_on", evaluating), patch.object(script, "export_policy"):
        script.train(args)
    return returns


def returns_sb3(algo: str, args) -> list[float]:
    """As returns_ours, of Stable-Baselines3."""
    env, returns = make_env(args, EPISODES), []

    class Evaluating(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps and self.num_timesteps % EVERY == 0:
                env.seed(args.seed + 1_000_000)
                returns.append(evaluate_policy(self.model, env, EPISODES, warn=False)[0])

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(args.torch_threads)
    MODELS[algo](args, make_env(args, args.num_envs)).learn(args.total_timesteps, callback=Evaluating())
    return returns


def measure(impl: str, algo: str, seed: int) -> list[float]:
    """Mean returns of the evaluations of one run (steps / EVERY,), quietly."""
    steps = SIDES[impl, algo] + 1  # the last evaluation is at the beginning of an iteration
    flags = f"--env-id {ENV_ID} --seed {seed} --total-timesteps {steps} --eval-episodes {EPISODES}"
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        args = parse_args(algo, [*flags.split(), "--output-dir", folder])
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return (returns_ours if impl == "ours" else returns_sb3)(algo, args)


@dataclass
class Args:
    workers: int = 1
    """runs at a time; each uses one thread"""
    seeds: int = 5
    """seeds of each algorithm, from 1"""
    results: Path = RESULTS
    """folder of steps_to_solve.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    path = args.results / "steps_to_solve.csv"
    rows = pd.read_csv(path).set_index(KEY) if path.exists() else pd.DataFrame()
    cells = [(*side, seed) for seed, side in product(range(1, args.seeds + 1), SIDES)]
    todo = [cell for cell in cells if (*cell, SIDES[cell[:2]]) not in rows.index]
    with ProcessPoolExecutor(args.workers) as pool:
        futures = {pool.submit(measure, *cell): cell for cell in todo}
        for future in tqdm(as_completed(futures), total=len(todo), unit="run", smoothing=0):
            impl, algo, seed = futures[future]
            run = pd.DataFrame({"eval_mean": future.result()}).round(3).assign(code_sha256=source_sha256(impl, algo))
            keys = [(impl, algo, seed, EVERY * (n + 1)) for n in range(len(run))]
            rows = pd.concat([rows, run.set_index(pd.MultiIndex.from_tuples(keys, names=KEY))]).sort_index()
            rows.to_csv(path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the old file whole
    solved = rows[rows["eval_mean"] >= SOLVED].reset_index("step")["step"].groupby(["impl", "algo", "seed"]).min()
    print(solved.unstack("seed").to_string())


if __name__ == "__main__":
    main()
