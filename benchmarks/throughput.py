"""Measures training steps per second of the scripts here, eager and compiled, against Stable-Baselines3.

    python benchmarks/throughput.py                        # every work, 5 rounds
    python benchmarks/throughput.py --only CartPole --rounds 3
    python benchmarks/throughput.py --peers --cleanrl ../cleanrl   # with SBX (pip install sbx-rl) and CleanRL
    python benchmarks/throughput.py --device cuda          # on a GPU, beside what LeanRL publishes

The settings alternate within a round, so that what else the machine does falls on all of them, and a ratio is
taken over SB3 of the same round. Each measurement is a process of its own, on the CPU, with one PyTorch thread or as
many as the work's flags ask for: it trains for the work's steps and takes the time between two boundaries of training
iterations, the first of them after warm-up and compilation. With --device cuda the networks, here and in SB3, are on
the GPU, and the environments on the CPU. Beside these, for the CPU, what any implementation has to do: the
steps per second of the environments alone, with random actions, and of training's matrix products alone at the rate
that this machine reaches for 256 × 256; one after the other they are the floor. DDPG, TD3 and SAC choose how products
are taken (--matmul-precision auto), and the floor is at that rate; SB3 is measured as it comes and, "sb3 medium", after
the call torch.set_float32_matmul_precision("medium"). MBPO, which SB3 does not have, is held against sac.py with the
same flags: as it is, and without the time that its model takes, which leaves the updates. With --peers SBX and
CleanRL's scripts are measured in the same rounds (see peers.py), as they come, SBX on all cores.
Writes benchmarks/results/throughput.csv, or throughput_cuda.csv, after every round of a work, and prints the ratios.
Rounds that are there, of this machine with today's code and flags, are not measured again: after a kill it goes on,
and more --rounds add to them. Other machines' stay.
"""

import contextlib
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import peers
import sb3
import torch
import tyro
from run import RESULTS, ROOT, last_line, source_sha256
from sb3 import MODELS, maker_of, parse_args
from stable_baselines3.common.callbacks import BaseCallback
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SETTINGS = ("eager", "compile", "sb3", "environment", "products")
PEERS = ("sbx", "cleanrl", "cleanrl half")
MEDIUM = "sb3 medium"
"""SB3 after the call that --matmul-precision medium makes."""
COLUMNS = ("work", "setting", "round", "steps_per_second", "date", "code_sha256", "flags", "machine")
MODEL_BASED_SETTINGS = ("eager", "updates", "sac")


class Work(NamedTuple):
    """What is trained, with the same flags on both sides."""

    algo: str
    flags: str
    """environment and settings"""
    warmup_steps: int
    """environment steps before the measurement: compilation and first iterations"""
    steps: int
    """environment steps measured: 10 to 20 seconds of them on the CPU, some on a GPU"""
    settings: tuple[str, ...] = SETTINGS
    device: str = "cpu"
    """where the networks are"""


WORKS = {
    "ppo CartPole": Work(
        algo="ppo",
        flags="--env-id CartPole-v1 --num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4",
        warmup_steps=20 * 512,
        steps=100 * 512,
    ),
    "ppo HalfCheetah": Work(
        algo="ppo",
        flags="--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32"
        " --no-normalize-observations --no-normalize-rewards",
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
        flags="--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --critic-epochs 10 --target-kl 0.06"
        " --no-normalize-observations --no-normalize-rewards",
        warmup_steps=2 * 2048,
        steps=10 * 2048,
    ),
    "dqn CartPole": Work(
        algo="dqn",
        flags="--env-id CartPole-v1 --no-double --hidden-sizes 120 84 --batch-size 128 --n-step 1"
        " --train-frequency 1 --gradient-steps 1 --learning-starts 1000",
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
            settings=(*SETTINGS, MEDIUM),
        )
        for algo in ("ddpg", "td3", "sac")
    },
    "ppo_atari Pong": Work(
        algo="ppo_atari",
        flags="--env-id ALE/Pong-v5 --torch-threads 2",  # 8 environments, 128 steps, 4 epochs of 4 minibatches
        warmup_steps=1024,
        steps=3 * 1024,
    ),
    "mbpo HalfCheetah": Work(
        algo="mbpo",
        flags="--env-id HalfCheetah-v5 --hidden-sizes 256 256 --batch-size 256 --gradient-steps 10"
        " --learning-starts 250",
        warmup_steps=500,
        steps=250,  # from one training of the model to the next
        settings=MODEL_BASED_SETTINGS,
    ),
}


TF32 = " --matmul-precision high"  # as LeanRL
CUDA_WORKS = {
    name: WORKS[name]._replace(
        flags=WORKS[name].flags + flags, warmup_steps=warmup, steps=steps, settings=("compile", "sb3"), device="cuda"
    )
    for name, flags, warmup, steps in (
        ("sac HalfCheetah", TF32, 2_000, 2_000),
        ("ppo HalfCheetah", "", 2 * 2048, 3 * 2048),
        ("td3 HalfCheetah", TF32, 2_000, 2_000),
        ("ppo_atari Pong", "", 4 * 1024, 6 * 1024),
        ("ddpg HalfCheetah", TF32, 2_000, 2_000),
        ("dqn CartPole", "", 2_000, 3_000),
    )
}
"""What is measured on a GPU."""

LEANRL = {"ppo HalfCheetah": 1774, "ppo_atari Pong": 6809, "td3 HalfCheetah": 936, "sac HalfCheetah": 725}
"""Steps per second that LeanRL publishes for its compiled scripts with CUDA graphs on an H100, on HalfCheetah-v4 and
Breakout; its other figures are of works that are not here."""


@dataclass
class Args:
    rounds: int = 5
    """measurements of every setting"""
    only: str = ""
    """only works with this in their name"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    peers: bool = False
    """measure SBX, too, and CleanRL if --cleanrl names it"""
    cleanrl: Path | None = None
    """a checkout of github.com/vwxyzjn/cleanrl"""
    results: Path = RESULTS
    """folder of throughput.csv"""


def boundaries_ours(algo: str, args, clock: Callable[[], float] = perf_counter) -> list[tuple[int, float]]:
    """Trains, without evaluation and export; (environment steps, clock) at the end of every logged iteration."""
    module, boundaries = importlib.import_module(algo), []
    log = module.Run.log

    def timed_log(run, *metrics, **charts) -> None:
        log(run, *metrics, **charts)
        boundaries.append((run.step, clock()))

    with (
        patch.object(module.Run, "log", timed_log),
        patch.object(module, "evaluate", lambda *_, **__: np.zeros(1)),
        patch.object(module, "export_policy"),
    ):
        module.train(args)
    return boundaries


@contextlib.contextmanager
def clock_without_model(module):
    """Within it, mbpo.py's model runs outside the time of the clock given."""
    spent = 0.0

    def outside(function):
        def timed(*args):
            nonlocal spent
            began = perf_counter()
            result = function(*args)
            result = result if isinstance(result, dict) else list(result)  # a generator has done nothing yet
            spent += perf_counter() - began
            return result

        return timed

    parts = ("learn_model", "branched_rollouts", "model_diagnostics")
    with patch.multiple(module, **{name: outside(getattr(module, name)) for name in parts}):
        yield lambda: perf_counter() - spent


@contextlib.contextmanager
def sb3_models_on(device: str):
    """Within it sb3.py, which says "cpu" where its runs are reproducible, makes its models on this device."""
    with contextlib.ExitStack() as stack:
        for name in ("PPO", "DQN", "DDPG", "TD3", "SAC"):
            model = getattr(sb3, name)
            on_device = lambda *args, model=model, **kwargs: model(*args, **(kwargs | {"device": device}))  # noqa: E731
            stack.enter_context(patch.object(sb3, name, on_device))
        yield


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
    torch.set_float32_matmul_precision(getattr(args, "matmul_precision", "highest"))
    env = maker_of(algo)(args, args.num_envs, Path(args.output_dir) / "monitor.csv")
    with sb3_models_on(args.device):
        model = MODELS[algo](args, env)
    model.learn(args.total_timesteps, callback=Clock())
    return boundaries


def passed(boundaries: list[tuple[int, float]], start: int) -> tuple[int, float]:
    """Steps, and what the clock has advanced, from the first boundary at or after step `start` to the last one."""
    measured = [(step, clock) for step, clock in boundaries if step >= start]
    (first_step, first), (last_step, last) = measured[0], measured[-1]
    return last_step - first_step, last - first


def per_second(boundaries: list[tuple[int, float]], start: int) -> float:
    """Steps per unit of the clock, from the first boundary at or after step `start` to the last one."""
    steps, seconds = passed(boundaries, start)
    return steps / seconds


def flops_per_step(algo: str, args) -> float:
    """Floating-point operations in the matrix products of training, per environment step.

    Overwrites args.total_timesteps and the script's LOG_EVERY.
    """
    module = importlib.import_module(algo)
    if hasattr(module, "LOG_EVERY"):
        module.LOG_EVERY = 1  # a boundary after every iteration
    start = getattr(args, "learning_starts", 0) + 1
    args.total_timesteps = start + 3 * max(args.num_envs * getattr(args, "num_steps", 1), 16)
    with FlopCounterMode(display=False) as counter:
        return 1 / per_second(boundaries_ours(algo, args, counter.get_total_flops), start)


def environment_steps_per_second(algo: str, args) -> float:
    """Of the environments alone, with random actions, over 2 seconds."""
    envs, actions = environments(importlib.import_module(algo), args)
    steps, start = 0, perf_counter()
    while perf_counter() < start + 2:
        for action in actions:
            envs.step(action)
        steps += len(actions) * args.num_envs
    envs.close()
    return steps / (perf_counter() - start)


def environments(script, args) -> tuple:
    """The script's environments, reset, and a hundred random actions for them."""
    envs = getattr(script, "PixelEnvs", None) or script.Envs
    envs = envs(args, args.num_envs)
    envs.action_space.seed(0)
    envs.reset(0)
    samples = ([envs.action_space.sample() for _ in range(args.num_envs)] for _ in range(100))
    return envs, [torch.as_tensor(np.array(x)) for x in samples]


def matrix_flops_per_second(threads: int) -> float:
    """Of products of 256 × 256 matrices."""
    x = torch.randn(256, 256)
    timer = Timer("x @ x", globals={"x": x}, num_threads=threads)
    return 2 * 256**3 / timer.blocked_autorange(min_run_time=2).median


def arguments(work: Work, setting: str, folder: str):
    """The script's Args, with run directories in `folder`."""
    switches = ["--compile"] if setting.startswith("compile") else []
    if setting.startswith("sb3") and work.algo in ("ddpg", "td3", "sac") and "--matmul" not in work.flags:
        switches += ["--matmul-precision", "medium" if setting == MEDIUM else "highest"]
    argv = f"{work.flags} --total-timesteps {work.warmup_steps + work.steps} --eval-episodes 1".split()
    argv += ["--device", work.device, "--output-dir", folder, *switches]
    return parse_args(code_of(work, setting)[1], argv)


def measure(work: Work, setting: str, cleanrl: Path | None = None) -> float:
    """Environment steps per second of one training, or of a part of its floor, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        algo, args = code_of(work, setting)[1], arguments(work, setting, folder)
        if setting == "environment":
            return environment_steps_per_second(algo, args)
        if setting == "products":
            torch.set_float32_matmul_precision(getattr(args, "matmul_precision", "highest"))
            return matrix_flops_per_second(args.torch_threads) / flops_per_step(algo, args)
        if work.settings == MODEL_BASED_SETTINGS:
            script = importlib.import_module(algo)
            context = clock_without_model(script) if setting == "updates" else contextlib.nullcontext(perf_counter)
            with context as clock, patch.object(script, "LOG_EVERY", work.steps, create=True):
                return per_second(boundaries_ours(algo, args, clock), work.warmup_steps)
        if setting == "sbx":
            with patch.object(sb3, peers.SBX[algo], peers.sbx_class(peers.SBX[algo])):
                boundaries = boundaries_sb3(algo, args)
        elif setting in PEERS:
            boundaries = peers.boundaries_cleanrl(peers.CLEANRL[algo, args.env_id, setting], args, cleanrl)
        else:
            boundaries = (boundaries_sb3 if code_of(work, setting)[0] == "sb3" else boundaries_ours)(algo, args)
    return per_second(boundaries, work.warmup_steps)


def code_of(work: Work, setting: str) -> tuple[str, str]:
    """Implementation and algorithm that are measured."""
    return "sb3" if setting in ("sb3", MEDIUM) else "ours", "sac" if setting == "sac" else work.algo


def works_on(device: str) -> dict[str, Work]:
    """What is measured there, by name."""
    return CUDA_WORKS if device == "cuda" else WORKS


def measure_in_process(device: str, name: str, setting: str, cleanrl: Path | None = None) -> float:
    """`measure` in a fresh process of this script."""
    process = subprocess.run(
        [sys.executable, __file__, "--worker", device, name, setting, *([str(cleanrl.resolve())] if cleanrl else [])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        sys.exit(f"{name}, {setting}: {last_line(process.stderr)}")
    return float(process.stdout.splitlines()[-1])


def machine(device: str = "cpu") -> str:
    """The processor's name, its family and model, where Linux has them, since processors of one name may differ by
    generations, and the number of cores that this process may use; with CUDA the GPU's name before them."""
    try:
        about = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", about)[1].strip()
        numbers = [re.search(rf"{x}\s*:\s*(\d+)", about) for x in ("cpu family", "model")]
        name += " (family {}, model {})".format(*(x[1] for x in numbers)) if all(numbers) else ""
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{name}, {cores} cores"


PARTS = ("of floor", "environment", "products")


def summary(measurements: pd.DataFrame) -> pd.DataFrame:
    """Per work and setting: median steps/s, its ratio to SB3 (or sac.py), the fastest peer and SB3 medium, and the
    parts that both of environment and products, the floor, and each of them have in its time, all within a round."""
    speeds = measurements.pivot_table(index=["work", "round"], columns="setting", values="steps_per_second", sort=False)
    settings = dict.fromkeys((*SETTINGS, MEDIUM, *MODEL_BASED_SETTINGS, *PEERS))
    speeds = speeds.reindex(columns=settings)  # some were not measured
    floor = 1 / (1 / speeds["environment"] + 1 / speeds["products"])
    peer = speeds[["sb3", *PEERS[:-1]]].max(axis=1).where(speeds[[*PEERS]].notna().any(axis=1))
    ratios = {"over": speeds["sb3"].fillna(speeds["sac"]), "over peer": peer, "over medium": speeds[MEDIUM]}
    ratios["of floor"] = floor
    ratios |= {name: speeds[name] for name in PARTS[1:]}
    ratios = {name: speeds.div(other, axis=0) for name, other in ratios.items()} | {"steps/s": speeds}
    groups = {name: x.stack(future_stack=True).groupby(["work", "setting"], sort=False) for name, x in ratios.items()}
    columns = {"rounds": groups["steps/s"].count(), "steps/s": groups["steps/s"].median()}
    columns |= {name: groups["over"].agg(name) for name in ("min", "median", "max")}
    columns |= {name: groups[name].median() for name in ("over peer", "over medium", *PARTS)}
    table = pd.DataFrame(columns)
    return table[table["rounds"] > 0]


def evidence_of(work: Work, args: Args) -> dict[str, tuple[str, str]]:
    """By setting that is measured, a hash of its code and its flags."""
    code = {x: source_sha256(*code_of(work, x)) for x in work.settings}
    code |= peers.settings_of(work.algo, work.flags, args.cleanrl) if args.peers and args.device == "cpu" else {}
    return {setting: (sha256, work.flags) for setting, sha256 in code.items()}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:  # measure_in_process
        device, name, setting, *cleanrl = sys.argv[2:]
        print(measure(works_on(device)[name], setting, *map(Path, cleanrl)))
        return
    args = tyro.cli(Args, description=__doc__)
    works = works_on(args.device)
    names = [name for name in works if args.only in name]
    if not names:
        sys.exit(f"--only {args.only}: in no work's name; there are {', '.join(works)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: PyTorch {torch.__version__} finds none here")
    if args.rounds < 1:
        sys.exit(f"--rounds {args.rounds}: must be at least 1")
    if args.cleanrl and not (args.cleanrl / "cleanrl" / "ppo.py").exists():
        sys.exit(f"--cleanrl {args.cleanrl}: no checkout of github.com/vwxyzjn/cleanrl")
    path = args.results / ("throughput_cuda.csv" if args.device == "cuda" else "throughput.csv")
    args.results.mkdir(parents=True, exist_ok=True)
    columns = pd.DataFrame(columns=COLUMNS)
    measurements = pd.read_csv(path, keep_default_na=False) if path.exists() else columns
    today, here = datetime.now(UTC).date().isoformat(), machine(args.device)
    evidence = {name: evidence_of(works[name], args) for name in names}
    bar = tqdm(total=args.rounds * sum(map(len, evidence.values())), unit="run")
    for number in range(1, args.rounds + 1):
        for name in names:
            now = evidence[name]
            own = measurements[(measurements["work"] == name) & (measurements["machine"] == here)]
            rounds = {i: dict(zip(x["setting"], zip(x["code_sha256"], x["flags"]))) for i, x in own.groupby("round")}
            if any({x: there.get(x) for x in now} != now for there in rounds.values()):
                measurements, rounds = measurements.drop(own.index), {}
            if number in rounds:
                bar.update(len(now))
                continue
            rows = []
            for setting in now:
                bar.set_description(f"{name}, {setting}")
                speed = round(measure_in_process(args.device, name, setting, args.cleanrl), 1)
                rows.append((name, setting, number, speed, today, *now[setting], here))
                bar.update()
            tables = (measurements, pd.DataFrame(rows, columns=COLUMNS))  # the newest rows come last
            measurements = pd.concat([x for x in tables if len(x)], ignore_index=True)
            measurements.to_csv(path, index=False)  # a round that has ended is kept, whatever comes
    bar.close()
    measured = measurements[measurements["work"].isin(names) & (measurements["machine"] == here)]
    print(summary(measured).round(2).round({"steps/s": 0}).to_string())


if __name__ == "__main__":
    main()
