"""algos/mpc.py through MuJoCo: the first 200 steps of an episode beside what SAC has learned in 100 000, and its speed.

    python benchmarks/planning_mujoco.py      # four hours of one core, most of them SAC's; again after a kill: goes on

- Each environment, planner and seed is a row of results/planning_mujoco.csv: mpc.py's run with its recommended
  settings; sac.py's is a run of 100 000 steps whose deterministic policy then plays the same episode. SAC's runs stay
  in --output-dir; one that is there is taken.
- Each environment and round is a row of results/planning_speed.csv, on a machine that does nothing else: environment
  steps per second by mpc.py's simulator, by mujoco.rollout alone with as many threads and the same controls, and by
  stepping one environment in Python; seconds of a plan, and of copy.deepcopy of the environment's state.
"""

import copy
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import mujoco.rollout
import numpy as np
import pandas as pd
import torch
import tyro
from estimates import estimate, iqm, markdown, number
from rows import measured_rows
from run import RESULTS, ROOT, tree_sha256

mpc = importlib.import_module("mpc")  # run.py has put algos/ on the path

KEY, SPEED_KEY = ["env_id", "planner", "seed"], ["env_id", "round"]
ENVS, SEEDS, STEPS, SAC_STEPS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"), 5, 200, 100_000
ROUNDS, SECONDS, AGAINST = 7, 1.0, {"rollout": "mujoco.rollout", "python": "Python"}


# Returns ----------------------------------------------------------------------------------------------------


def planned(env_id: str, seed: int) -> dict:
    """mpc.py's episode: return and length."""
    args = replace(mpc.Args(), **mpc.RECOMMENDED[env_id], env_id=env_id, seed=seed)
    assert (args.eval_episodes, args.max_episode_steps) == (1, STEPS)
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            found = mpc.play(replace(args, output_dir=folder))
        length = pd.read_csv(found["run_dir"] / "monitor.csv", skiprows=1)["l"].iloc[0]
    return {"return": found["returns"][0], "length": length}


def learned(env_id: str, seed: int, runs: Path) -> dict:
    """SAC's deterministic policy in the same episode, after SAC_STEPS of training."""
    if not (policies := sorted(runs.glob(f"{env_id}__sac__{seed}__*/policy.pt2"))):
        flags = f"--env-id {env_id} --seed {seed} --total-timesteps {SAC_STEPS} --output-dir {runs}"
        subprocess.run([sys.executable, ROOT / "algos" / "sac.py", *flags.split()], check=True, capture_output=True)
        policies = sorted(runs.glob(f"{env_id}__sac__{seed}__*/policy.pt2"))
    policy, env = torch.export.load(policies[-1]).module(), gym.make(env_id, max_episode_steps=STEPS)
    (obs, _), total, length, ended = env.reset(seed=seed + 1_000_000), 0.0, 0, False
    while not ended:
        with torch.no_grad():
            action = policy(torch.as_tensor(obs)[None].float())[0]
        obs, reward, terminated, truncated, _ = env.step(action.numpy())
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return {"return": total, "length": length}


def measure(env_id: str, planner: str, seed: int, runs: Path) -> dict:
    """A row, with the hash of what planned."""
    row = planned(env_id, seed) if planner == "mpc" else learned(env_id, seed, runs)
    return row | {"code_sha256": code() if planner == "mpc" else ""}


# Speed ------------------------------------------------------------------------------------------------------


def rate(steps: int, work: Callable) -> float:
    """Steps a second, work being done again and again for SECONDS."""
    work()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        work()
        times += 1
    return times * steps / (time.perf_counter() - start)


def speeds(env_id: str, round: int) -> dict:
    """Environment steps a second, and seconds of a plan and of a deepcopy."""
    args = replace(mpc.Args(), **mpc.RECOMMENDED[env_id], env_id=env_id)
    env, rng = gym.make(env_id).unwrapped, np.random.default_rng(round)
    env.reset(seed=round)
    simulate, initial = mpc.make_simulator(env, args.population), mpc.initial_distribution(env.action_space, args)
    draws = initial.sample(args.population, args.correlation, rng)
    actions, kept = initial.actions(draws), draws[: args.kept]
    data = [mujoco.MjData(env.model) for _ in range(os.cpu_count() or 1)]
    state = np.empty(mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_FULLPHYSICS.value))
    mujoco.mj_getState(env.model, env.data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
    states, controls = np.tile(state, (len(actions), 1)), np.repeat(actions, env.frame_skip, 1).astype(float)
    one, iterations = gym.make(env_id).unwrapped, args.iterations

    def plan() -> None:
        mpc.make_plan(lambda actions: simulate(env, actions, rng), initial, kept, iterations, args, rng)

    def step() -> None:
        for sequence in actions[:4]:
            one.reset(seed=round)
            for action in sequence:
                one.step(action)

    found = {
        "mpc": rate(actions[..., 0].size, lambda: simulate(env, actions, rng)),
        "rollout": rate(
            actions[..., 0].size,
            lambda: mujoco.rollout.rollout(env.model, data, states, controls, persistent_pool=True),
        ),
        "python": rate(actions[:4, :, 0].size, step),
        "plan_seconds": 1 / rate(1, plan),
        "deepcopy_seconds": 1 / rate(1, lambda: copy.deepcopy(env.__dict__)),
    }
    mujoco.rollout.shutdown_persistent_pool()
    return found | {"cpus": os.cpu_count()}


# The page ---------------------------------------------------------------------------------------------------


def code() -> str:
    """Of what plans, and through what."""
    text = (ROOT / "algos" / "mpc.py").read_text(encoding="utf-8")
    return tree_sha256(text, ("MujocoBatch", "locomotion", "make_plan", "initial_distribution"))


SECTION = """
## Planning through MuJoCo

The return of the first {steps} steps of an episode: [mpc.py](../algos/mpc.py), which has learned nothing and knows the
simulator, beside the deterministic policy of [sac.py](../algos/sac.py) after {sac_steps} steps of training, IQM over
seeds [95 % interval] ([planning_mujoco.py](planning_mujoco.py)); an episode that ends sooner is over. Look at how long
each stood: a plan for Hopper sees a third of a second ahead, and what it gains there is a fall after that. Then the
environment steps that mpc.py simulates in a second, rewards and all, relative to `mujoco.rollout` alone and to stepping
one environment in Python, the time of a plan, and what `copy.deepcopy` of the environment for each of its candidates
would add (medians of {rounds} rounds, {cpus} threads).

{table}

{speed}
"""


def section(results: Path) -> str:
    """Of the page, "" without planning_mujoco.csv and planning_speed.csv."""
    paths = [results / f"planning_{x}.csv" for x in ("mujoco", "speed")]
    if not all(path.exists() for path in paths):
        return ""
    rows, speed = (pd.read_csv(path) for path in paths)
    cells, speed_cells = [], []
    for env_id in [x for x in ENVS if x in set(rows["env_id"])]:
        ours, sac = (rows[(rows["env_id"] == env_id) & (rows["planner"] == x)] for x in ("mpc", "sac"))
        changed = "" if (ours["code_sha256"] == code()).all() else " †"
        row = {"environment": env_id + changed, "mpc.py": estimate(iqm, ours["return"].to_numpy())}
        row |= {"its steps": lengths(ours)}
        row |= {
            f"sac.py, seeds: {len(sac)}": estimate(iqm, sac["return"].to_numpy()),
            "the policy's steps": lengths(sac),
        }
        cells.append(row)
    for env_id, mine in speed.groupby("env_id", sort=False):
        args = mpc.RECOMMENDED[env_id]
        copies = mine["deepcopy_seconds"].median() * args["population"] * args["iterations"]
        speed_cells.append({"environment": env_id, "steps a second": f"{mine['mpc'].median():,.0f}".replace(",", " ")})
        speed_cells[-1] |= {f"/ {y}": number((mine["mpc"] / mine[x]).median(), 2) for x, y in AGAINST.items()}
        speed_cells[-1] |= {"a plan, ms": number(1000 * mine["plan_seconds"].median(), 0)}
        speed_cells[-1] |= {"deepcopies for a plan, ms": number(1000 * copies, 0)}
    sizes = dict(steps=STEPS, sac_steps=f"{SAC_STEPS:,}".replace(",", " "), rounds=ROUNDS, cpus=speed["cpus"].max())
    return SECTION.format(table=markdown(cells), speed=markdown(speed_cells), **sizes)


def lengths(rows: pd.DataFrame) -> str:
    """Of the episodes, shortest and longest."""
    return " to ".join(map(str, sorted({rows["length"].min(), rows["length"].max()})))


@dataclass
class Args:
    seeds: int = SEEDS
    """seeds of each planner, from 1"""
    parts: tuple[str, ...] = ("mpc", "sac", "speed")
    """what is measured"""
    output_dir: Path = Path("runs")
    """folder of SAC's runs"""
    results: Path = RESULTS
    """folder of planning_mujoco.csv and planning_speed.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    cells = [x for x in product(ENVS, ("mpc", "sac"), range(1, args.seeds + 1)) if x[1] in args.parts]
    rounds = [*product(ENVS, range(ROUNDS))] if "speed" in args.parts else []
    work = partial(measure, runs=args.output_dir)
    measured_rows(args.results / "planning_mujoco.csv", KEY, cells, work, 1)
    measured_rows(args.results / "planning_speed.csv", SPEED_KEY, rounds, speeds, 1)
    print(section(args.results))


if __name__ == "__main__":
    main()
