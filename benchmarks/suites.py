"""What benchmarks/run.py measures and benchmarks/report.py reports: plain data.

A fork of ppo.py, with a flag of its own, against the original: copy it to algos/my_ppo.py and add here

    VARIANTS["my_ppo"] = Variant("my_ppo", against="ppo")
    VARIANTS["my_ppo_centred"] = Variant("my_ppo", "--advantages centred", against="ppo")
    SUITES["mine"] = [Entry(["ppo", "my_ppo", "my_ppo_centred"], ["CartPole-v1", "Acrobot-v1"], range(1, 11), 100_000)]

then `run.py mine` and `report.py --suites mine`, both with `--results mine/results`, for a page of its own. An
environment of your own is `module:Id-v0`, where the module, in algos/ or installed, registers it on import; the rows'
hashes do not notice a change in it.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """Every algorithm on every environment with every seed, here and in Stable-Baselines3."""

    algos: list[str]
    """scripts of algos/"""
    env_ids: list[str]
    """gymnasium environments"""
    seeds: range
    """seeds of the runs"""
    total_timesteps: int | None = None
    """environment steps; None: the script's own default for the environment"""
    implementations: tuple[str, ...] = ("ours", "sb3")
    """sides to run; "sb3" is left out for an algorithm that benchmarks/sb3.py has no counterpart of"""


class Variant(NamedTuple):
    """An algorithm of a suite that is not just a script of algos/: a fork, or a script with other flags."""

    script: str
    """file of algos/, without .py"""
    flags: str = ""
    """what it is run with beside environment, seed and steps"""
    against: str | None = None
    """script or variant that the report compares it with, in place of SB3's"""


VARIANTS: dict[str, Variant] = {}
"""By the name that an Entry calls it and the page shows."""

EXPERTS = {
    "HalfCheetah-v5": ("ours", "kfac", "HalfCheetah-v5", 1, 500_000),
    "Hopper-v5": ("ours", "ppo", "Hopper-v5", 1, 1_000_000),
}
"""Runs of other suites whose policy.pt2, kept in results/experts/, the suite "imitation" learns from."""

LABELS = (125, 250, 500, 1_000)
"""labels of the suite "imitation": an imitator's steps"""

FLAGS = {
    (algo, env_id, labels): f"--expert benchmarks/results/experts/{env_id}.pt2 --eval-episodes 50{flags}"
    for env_id in EXPERTS
    for algo, flags in (("bc", ""), ("dagger", " --steps-per-iteration 25"))
    for labels in LABELS
} | {
    # the settings for long runs act at random for 10k steps
    ("sac", "HalfCheetah-v5", 15_000): "--learning-starts 1000",
    # run.py's workers have a PyTorch thread each
    ("ppo_atari", "ALE/Pong-v5", 1_000_000): "--torch-threads 1",
}
"""What (script, environment, steps) are run with beside the seed."""

SCRIPT_FLAGS = dict.fromkeys(("ddpg", "td3", "sac", "mbpo"), "--matmul-precision highest")
"""What all runs of a script have: rows were recorded so, and `auto` may choose otherwise on another processor."""

CLASSIC = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"]

SUITES: dict[str, list[Entry]] = {
    "smoke": [Entry(["ppo"], ["CartPole-v1"], range(1, 3), 5_000)],
    "classic": [
        Entry(["ppo", "a2c", "trpo", "reinforce", "kfac", "grpo"], CLASSIC, range(1, 11), 100_000),
        Entry(["a2c"], ["CartPole-v1"], range(1, 11), implementations=("ours",)),
        Entry(["dqn"], ["CartPole-v1"], range(1, 11), 50_000),
        Entry(["dqn"], ["Acrobot-v1"], range(1, 11), 100_000),
        Entry(["ddpg", "td3", "sac"], ["Pendulum-v1"], range(1, 11), 20_000),
    ],
    "mujoco": [
        Entry(["ppo", "trpo", "a2c"], ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"], range(1, 6), 1_000_000),
        Entry(["sac", "td3", "ddpg"], ["HalfCheetah-v5", "Hopper-v5"], range(1, 6), 100_000),  # 1M on larger machines
        Entry(["kfac"], ["HalfCheetah-v5", "Hopper-v5"], range(1, 6), 1_000_000),
        # added when the first five favoured ours on two of these, where A2C ends in one local optimum or another
        Entry(["a2c"], ["HalfCheetah-v5", "Walker2d-v5", "Hopper-v5"], range(6, 11), 1_000_000),
    ],
    "model-based": [
        Entry(["mbpo", "sac"], ["HalfCheetah-v5"], range(1, 3), 15_000),
        Entry(["sac"], ["HalfCheetah-v5"], range(3, 6), 15_000),  # a run of MBPO takes an hour, SAC's five minutes
    ],
    "atari": [Entry(["ppo_atari"], ["ALE/Pong-v5"], range(1, 2), 1_000_000, implementations=("ours",))],
    "imitation": [Entry(["bc", "dagger"], list(EXPERTS), range(1, 6), labels) for labels in LABELS],
    "efficiency": [Entry(["a2c", "kfac"], ["HalfCheetah-v5"], range(1, 4), 500_000)],
}
