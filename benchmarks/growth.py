"""How training speed grows with environments, network width and batch size, and memory with the replay buffer.

    python benchmarks/growth.py            # about half an hour on an idle machine; again after a kill: goes on
    python benchmarks/growth.py --only width --rounds 1

Speed is measured as throughput.py does, here and in Stable-Baselines3, each in a process of its own: PPO on CartPole
with 1 to 64 environments, SAC on HalfCheetah with layers of 64 to 1024 units and with minibatches of 32 to 1024. Memory
is what a process holds more of, once SAC's replay buffer for HalfCheetah has been written to its end; it is measured
once. Each measurement is a row of results/growth.csv; on another machine all are taken anew.
"""

import ctypes
import importlib
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from run import RESULTS, source_sha256
from stable_baselines3.common.buffers import ReplayBuffer
from throughput import Work, code_of, machine, measure
from tqdm import tqdm

KEY = ["axis", "size", "setting", "round"]
EVIDENCE = ("flags", "code_sha256")
SAC = "--env-id HalfCheetah-v5 --torch-threads 2 --learning-starts 100"


def ppo_with(num_envs: int) -> Work:
    """A few rollouts of PPO on CartPole; one for the warm-up."""
    flags = f"--env-id CartPole-v1 --num-envs {num_envs} --num-steps 128 --update-epochs 4 --num-minibatches 4"
    rollouts = max(4, 128 // num_envs)
    return Work("ppo", flags, warmup_steps=128 * num_envs, steps=rollouts * 128 * num_envs)


def sac_with(width: int, batch_size: int) -> Work:
    """As many steps of SAC on HalfCheetah as take some seconds."""
    steps = int(np.clip(300 * (256 / width) ** 2 * 256 / batch_size, 60, 900))
    flags = f"{SAC} --hidden-sizes {width} {width} --batch-size {batch_size}"
    return Work("sac", flags, warmup_steps=200, steps=steps)


AXES = {
    "num_envs": {n: ppo_with(n) for n in (1, 2, 4, 8, 16, 32, 64)},
    "width": {n: sac_with(n, 256) for n in (64, 128, 256, 512, 1024)},
    "batch_size": {n: sac_with(256, n) for n in (32, 64, 128, 256, 512, 1024)},
}
"""What is trained at each size, by the axis along which it grows."""
SPEED_SETTINGS = ("eager", "compile", "sb3")
BUFFER_SIZES = (10_000, 100_000, 1_000_000)
MEMORY_SETTINGS = ("eager", "sb3")


def steps_per_second(axis: str, size: int, setting: str) -> float:
    """Of one training, in this process."""
    work = AXES[axis][size]
    script = importlib.import_module(work.algo)
    with patch.object(script, "LOG_EVERY", 20, create=True):  # the boundaries between which time is taken
        return measure(work, setting)


def resident_bytes() -> int:
    """Of this process (Linux)."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def buffer_bytes(size: int, setting: str) -> int:
    """Memory that a full replay buffer for HalfCheetah-v5 takes, in this process."""
    env, script = gym.make("HalfCheetah-v5"), importlib.import_module("sac")
    spaces = env.observation_space, env.action_space

    def full_buffer(size: int):
        if setting == "sb3":
            buffer = ReplayBuffer(size, *spaces, device="cpu", handle_timeout_termination=True)
            arrays = [x for x in vars(buffer).values() if isinstance(x, np.ndarray)]
        else:
            buffer = script.ReplayBuffer(size, 1, *spaces, torch.device("cpu"))
            arrays = [x.numpy() for x in buffer.data]
        for array in arrays:
            array.fill(1)  # pages that nobody has written to take no memory
        return buffer

    kept = full_buffer(100)  # what the first one takes once and for all
    ctypes.CDLL(None).malloc_trim(0)  # memory that imports left free would be used first, and not counted
    before = resident_bytes()
    kept = kept, full_buffer(size)
    return resident_bytes() - before


def measured(axis: str, size: int, setting: str, _: int) -> dict[str, float]:
    """Steps per second or, along the axis "buffer_size", bytes."""
    value = buffer_bytes(size, setting) if axis == "buffer_size" else steps_per_second(axis, size, setting)
    return {"value": round(value, 1)}


def evidence(cell: tuple[str, int, str, int]) -> dict[str, str]:
    """Of what is measured: flags and steps, and the hash of the code."""
    axis, size, setting, _ = cell
    if axis == "buffer_size":
        return dict(zip(EVIDENCE, ("-", source_sha256("sb3" if setting == "sb3" else "ours", "sac"))))
    work = AXES[axis][size]
    flags = f"{work.flags} ({work.steps} steps after {work.warmup_steps})"
    return dict(zip(EVIDENCE, (flags, source_sha256(*code_of(work, setting)))))


def cells(rounds: int) -> list[tuple[str, int, str, int]]:
    """(axis, size, setting, round) of everything; the settings of a size share what the machine does beside."""
    speed = [(axis, size, x) for axis in AXES for size in AXES[axis] for x in SPEED_SETTINGS]
    memory = [("buffer_size", size, x, 1) for size in BUFFER_SIZES for x in MEMORY_SETTINGS]
    return memory + [(*cell, number) for number in range(1, rounds + 1) for cell in speed]


def in_process(function: Callable, *args):
    """The function's result, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure_missing(path: Path, key: list[str], cells: list[tuple], measured: Callable, evidence: Callable):
    """Measures, each in a process of its own, the cells that the CSV at `path` lacks or has with other evidence or from
    another machine.

    `key` names the columns of a cell; `measured` and `evidence` make a row's others from it. Returns all rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).set_index(key) if path.exists() else pd.DataFrame()

    def described(cell: tuple) -> dict[str, str]:
        return evidence(cell) | {"machine": machine()}

    todo = [c for c in cells if c not in rows.index or dict(rows.loc[c, [*described(c)]]) != described(c)]
    for cell in (bar := tqdm(todo, unit="run")):
        bar.set_description(" ".join(map(str, cell)))
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # of the process; a script sets PyTorch's own number
            row = in_process(measured, *cell) | described(cell)
        row = pd.DataFrame([row], index=pd.MultiIndex.from_tuples([cell], names=key))
        rows = pd.concat([rows.drop(index=[cell], errors="ignore"), row]).sort_index() if len(rows) else row
        rows.to_csv(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the old file whole
    return rows


@dataclass
class Args:
    rounds: int = 3
    """measurements of every speed"""
    only: str = ""
    """only axes with this in their name: num_envs, width, batch_size, buffer_size"""
    results: Path = RESULTS
    """folder of growth.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    todo = [cell for cell in cells(args.rounds) if args.only in cell[0]]
    if not todo:
        sys.exit(
            f"--only {args.only}, --rounds {args.rounds}: nothing to measure; axes: {', '.join(AXES)}, buffer_size"
        )
    rows = measure_missing(args.results / "growth.csv", KEY, todo, measured, evidence)
    print(rows["value"].groupby(level=KEY[:3]).median().unstack("setting").to_string())


if __name__ == "__main__":
    main()
