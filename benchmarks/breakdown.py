"""Where a training step's time goes: the environments, the replay buffer, the gradient, the optimiser, the rest.

    python benchmarks/breakdown.py                 # every work of throughput.py; again after a kill: goes on
    python benchmarks/breakdown.py --only dqn

A script trains as for throughput.py while clocks stand around the functions that it calls, which cost it about a
microsecond each. What no clock has seen is acting, estimating advantages, drawing minibatches of a rollout, logging,
and Python between them. Beside these, how long the environments take when nothing happens between two steps, with
random actions. Each measurement is a process of its own, of half a minute on an idle machine, and a row of
results/breakdown.csv, in microseconds per environment step; on another machine all are taken anew.
"""

import contextlib
import functools
import importlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import numpy as np
import torch
import tyro
from growth import EVIDENCE, measure_missing
from run import RESULTS, source_sha256
from throughput import WORKS, arguments, boundaries_ours, code_of, environments, passed

KEY = ["work", "setting"]
SETTINGS = ("eager", "compile")
PARTS = {
    "environment": ("Envs.step", "PixelEnvs.step"),
    "replay buffer": ("ReplayBuffer.add", "ReplayBuffer.draw_rows", "ReplayBuffer.get"),
    "gradient": (
        *(f"{algo}_gradient" for algo in ("ppo", "a2c", "dqn", "pixel_ppo")),
        *(f"{algo}_{part}_gradient" for algo in ("ddpg", "td3", "sac") for part in ("critic", "actor")),
        *("critic_gradient", "trust_region_step", "line_search"),
    ),
    "optimiser": (
        *("LeanAdam.step", "LeanAdam.zero_grad", "torch.optim.Adam.step", "torch.optim.RMSprop.step"),
        "torch.optim.Optimizer.zero_grad",
    ),
    "target networks": ("polyak_update",),
}
"""Functions of the scripts, none of which may call another of them. TRPO's gradient includes the step along it that is
searched for."""


@contextlib.contextmanager
def clocks(script) -> Iterator[Callable[[], np.ndarray]]:
    """Within it, a function gives the time and the seconds spent so far in each of PARTS."""
    spent, running = Counter(), []

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def clocked(*args, **kwargs):
            assert not running, f"{function.__name__} within {running}: its time would count twice"
            running.append(function.__name__)
            began = perf_counter()
            result = function(*args, **kwargs)
            spent[part] += perf_counter() - began
            running.pop()
            return result

        clocked.part = part
        return clocked

    compile_function = torch.compile

    def timed_compile(function: Callable, **settings) -> Callable:  # the clock stands outside of what is compiled
        return timed(compile_function(function.__wrapped__, **settings), function.part)

    with contextlib.ExitStack() as stack:
        for part, names in PARTS.items():
            for name in names:
                *owner, name = name.split(".")
                owner = functools.reduce(lambda x, y: getattr(x, y, None), owner, script)
                within = owner is torch.optim.Adam and hasattr(script, "LeanAdam")  # whose first step is that one
                if hasattr(owner, name) and not within:
                    stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        stack.enter_context(patch.object(torch, "compile", timed_compile))
        yield lambda: np.array([perf_counter(), *(spent[part] for part in PARTS)])


def seconds_alone(script, args) -> float:
    """An environment step's, over 2 seconds of random actions and nothing else, as the script takes it."""
    envs, actions = environments(script, args)
    steps, start = 0, perf_counter()
    while perf_counter() < start + 2:
        envs.step(actions[steps % len(actions)])
        steps += 1
    envs.close()
    return (perf_counter() - start) / (steps * args.num_envs)


def measured(name: str, setting: str) -> dict[str, float]:
    """Microseconds per environment step: in all, of each part, and of the environments alone."""
    work = WORKS[name]
    script = importlib.import_module(work.algo)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(work, setting, folder)
        with clocks(script) as clock:
            boundaries = boundaries_ours(work.algo, args, clock)
        alone = seconds_alone(script, args)
    steps, times = passed(boundaries, work.warmup_steps)
    whole, *parts = times / steps
    seconds = {"whole": whole, **dict(zip(PARTS, parts)), "the rest": whole - sum(parts), "environment alone": alone}
    return {part: round(1e6 * x, 1) for part, x in seconds.items()}


def evidence(cell: tuple[str, str]) -> dict[str, str]:
    """Of what is measured: flags and steps, and the hash of the code."""
    work = WORKS[cell[0]]
    flags = f"{work.flags} ({work.steps} steps after {work.warmup_steps})"
    return dict(zip(EVIDENCE, (flags, source_sha256(*code_of(work, cell[1])))))


def cells() -> list[tuple[str, str]]:
    """(work, setting) of everything."""
    return [(name, x) for name, work in WORKS.items() for x in SETTINGS if {*SETTINGS} <= {*work.settings}]


@dataclass
class Args:
    only: str = ""
    """only works with this in their name"""
    results: Path = RESULTS
    """folder of breakdown.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    todo = [cell for cell in cells() if args.only in cell[0]]
    if not todo:
        sys.exit(f"--only {args.only}: in no work's name; there are {', '.join(dict(cells()))}")
    rows = measure_missing(args.results / "breakdown.csv", KEY, todo, measured, evidence)
    print(rows.drop(columns=[*EVIDENCE]).to_string())


if __name__ == "__main__":
    main()
