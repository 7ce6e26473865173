"""Measures training steps per second of the scripts here, eager and compiled, against Stable-Baselines3.

    python benchmarks/throughput.py                        # every work, 5 rounds
    python benchmarks/throughput.py --only CartPole --rounds 3

The settings alternate within a round, so that what else the machine does falls on all of them, and a ratio is
taken over SB3 of the same round. Each measurement is a process of its own, on the CPU, with one PyTorch thread or as
many as the work's flags ask for: it trains for the work's steps and takes the time between two boundaries of training
iterations, the first of them after warm-up and compilation. Writes benchmarks/results/throughput.csv and prints the
ratios.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import pandas as pd
import torch
import tyro
from run import RESULTS, ROOT, last_line, source_sha256
from sb3 import MODELS, make_env, parse_args
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm


class Work(NamedTuple):
    """What is trained, with the same flags on both sides."""

    algo: str
    flags: str
    """environment and settings"""
    warmup_steps: int
    """environment steps before the measurement: compilation and first iterations"""
    steps: int
    """environment steps measured, 10 to 20 seconds of them"""


WORKS = {
    "ppo CartPole": Work(
        algo="ppo",
        flags="--env-id CartPole-v1 --num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4",
        warmup_steps=20 * 512,
        steps=100 * 512,
    ),
    "ppo HalfCheetah": Work(
        algo="ppo",
        flags="--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32",
        warmup_steps=2 * 2048,
        steps=10 * 2048,
    ),
    "a2c CartPole": Work(
        algo="a2c",
        flags="--env-id CartPole-v1 --num-envs 8 --num-steps 5",
        warmup_steps=20_000,
        steps=80_000,
    ),
    "trpo HalfCheetah": Work(
        algo="trpo",
        flags="--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --critic-epochs 10 --target-kl 0.01"
        " --no-normalize-observations --no-normalize-rewards",
        warmup_steps=2 * 2048,
        steps=10 * 2048,
    ),
    "dqn CartPole": Work(
        algo="dqn",
        flags="--env-id CartPole-v1 --no-double --hidden-sizes 120 84 --batch-size 128 --train-frequency 1"
        " --gradient-steps 1 --learning-starts 1000",
        warmup_steps=3_000,
        steps=12_000,
    ),
    **{
        f"{algo} HalfCheetah": Work(
            algo=algo,
            flags="--env-id HalfCheetah-v5 --hidden-sizes 256 256 --batch-size 256 --learning-starts 1000"
            " --torch-threads 2",
            warmup_steps=2_000,
            steps=3_000,
        )
        for algo in ("ddpg", "td3", "sac")
    },
}
SETTINGS = ("eager", "compile", "sb3")


@dataclass
class Args:
    rounds: int = 5
    """measurements of every setting"""
    only: str = ""
    """only works with this in their name"""
    results: Path = RESULTS
    """folder of throughput.csv"""


def boundaries_ours(algo: str, args) -> list[tuple[int, float]]:
    """Trains; (environment steps, seconds) at the end of every training iteration."""
    module, boundaries = importlib.import_module(algo), []
    log = module.Run.log

    def timed_log(run, *metrics, **charts) -> None:
        log(run, *metrics, **charts)
        boundaries.append((run.step, perf_counter()))

    module.Run.log = timed_log
    module.train(args)
    return boundaries


def boundaries_sb3(algo: str, args) -> list[tuple[int, float]]:
    """Trains; (environment steps, seconds) at the start of every rollout and at the end."""
    boundaries = []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            boundaries.append((self.num_timesteps, perf_counter()))

        _on_training_end = _on_rollout_start

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(args.torch_threads)
    env = make_env(args, args.num_envs, Path(args.output_dir) / "monitor.csv")
    MODELS[algo](args, env).learn(args.total_timesteps, callback=Clock())
    return boundaries


def measure(work: Work, setting: str) -> float:
    """Environment steps per second of one training, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        argv = f"{work.flags} --total-timesteps {work.warmup_steps + work.steps} --eval-episodes 1 --device cpu".split()
        argv += ["--output-dir", folder] + (["--compile"] if setting == "compile" else [])
        args = parse_args(work.algo, argv)
        boundaries = (boundaries_sb3 if setting == "sb3" else boundaries_ours)(work.algo, args)
    measured = [(step, seconds) for step, seconds in boundaries if step >= work.warmup_steps]
    (first_step, start), (last_step, end) = measured[0], measured[-1]
    return (last_step - first_step) / (end - start)


def measure_in_process(name: str, setting: str) -> float:
    """`measure` in a fresh process of this script."""
    process = subprocess.run(
        [sys.executable, __file__, "--worker", name, setting],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        sys.exit(f"{name}, {setting}: {last_line(process.stderr)}")
    return float(process.stdout.splitlines()[-1])


def summary(measurements: pd.DataFrame) -> pd.DataFrame:
    """Per work and setting: median steps/s; min, median and max over rounds of the ratio to SB3 in the same round."""
    speeds = measurements.pivot_table(index=["work", "round"], columns="setting", values="steps_per_second", sort=False)
    ratios = speeds.div(speeds["sb3"], axis=0).stack(future_stack=True).groupby(["work", "setting"], sort=False)
    medians = speeds.stack(future_stack=True).groupby(["work", "setting"], sort=False).median()
    return pd.DataFrame(
        {"rounds": ratios.size(), "steps/s": medians} | {name: ratios.agg(name) for name in ("min", "median", "max")}
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:  # measure_in_process
        name, setting = sys.argv[2:]
        print(measure(WORKS[name], setting))
        return
    args = tyro.cli(Args, description=__doc__)
    names = [name for name in WORKS if args.only in name]
    if not names:
        sys.exit(f"--only {args.only}: in no work's name; there are {', '.join(WORKS)}")
    if args.rounds < 1:
        sys.exit(f"--rounds {args.rounds}: must be at least 1")
    rows, today = [], datetime.now(timezone.utc).date().isoformat()
    bar = tqdm(total=args.rounds * len(names) * len(SETTINGS), unit="run")
    for number in range(1, args.rounds + 1):
        for name in names:
            for setting in SETTINGS:
                bar.set_description(f"{name}, {setting}")
                speed = round(measure_in_process(name, setting), 1)
                code = source_sha256("sb3" if setting == "sb3" else "ours", WORKS[name].algo)
                rows.append((name, setting, number, speed, today, code))
                bar.update()
    bar.close()
    measurements = pd.DataFrame(rows, columns="work setting round steps_per_second date code_sha256".split())
    path = args.results / "throughput.csv"
    if path.exists():
        old = pd.read_csv(path)
        measurements = pd.concat([old[~old["work"].isin(names)], measurements])
    args.results.mkdir(parents=True, exist_ok=True)
    measurements.to_csv(path, index=False)
    print(summary(measurements).round({"steps/s": 0, "min": 2, "median": 2, "max": 2}).to_string())


if __name__ == "__main__":
    main()
