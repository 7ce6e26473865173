"""Every script as a program: its flags, its refusals, its run directory, and what survives a fault."""

import contextlib
import csv
import functools
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.monitor import load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "algos").glob("*.py"))}


@dataclass
class Tiny:
    """How a script is run within a second, and what is its own about its command line and its checkpoint."""

    flags: str
    """a tiny run in `env_id`; a later flag wins over an earlier one; INDICES and NUMBERS stand for experts"""
    rebuild: Callable
    """(module, args, observation space, action space, checkpoint) → the deterministic policy"""
    env_id: str = "CartPole-v1"
    one_state: str = "OneState-v0"
    """where every episode has 10 steps"""
    values: str = "losses/values"
    boxes: str | None = None
    """flags of a run with Box actions, normalised observations and a policy that reaches the space's bounds"""
    explode: tuple[tuple[str, str], ...] = ()
    """flags that make a loss, or nothing but the last update's weights, infinite, and what the message must name"""
    refusals: tuple[tuple[str, str], ...] = ()
    """flags that only this script has to refuse, and what its message must name"""
    refitted: tuple[str, ...] = ()
    """what of a checkpoint in mid-run the run's end changes, even without a step"""
    pixels: bool = False
    """whether it sees uint8 images, and nothing else"""


def rebuild_actor_critic(module, args, observation_space, action_space, checkpoint):
    agent = module.ActorCritic(observation_space, action_space, args.hidden_sizes, args.normalize_observations)
    agent.load_state_dict(checkpoint["agent"])
    return agent


def rebuild_policy(module, args, observation_space, action_space, checkpoint):
    policy = module.Policy(observation_space, action_space, args.hidden_sizes, args.normalize_observations)
    policy.load_state_dict(checkpoint["policy"])
    return policy


def rebuild_q_network(module, args, observation_space, action_space, checkpoint):
    network = module.QNetwork(observation_space, action_space, args.hidden_sizes)
    network.load_state_dict(checkpoint["network"])
    return network


def rebuild_actor_critics(name):
    def rebuild(module, args, observation_space, action_space, checkpoint):
        critics = [args.num_critics] if hasattr(args, "num_critics") else []
        agent = getattr(module, name)(observation_space, action_space, args.hidden_sizes, *critics)
        agent.load_state_dict(checkpoint["agent"])
        return agent

    return rebuild


def rebuild_cloned_policy(module, args, observation_space, action_space, checkpoint):
    policy = module.ClonedPolicy(observation_space, action_space, args)
    policy.load_state_dict(checkpoint["policy"])
    return policy


def rebuild_learner(module, args, observation_space, action_space, checkpoint):
    learner = module.Learner(observation_space, action_space, args.hidden_sizes)
    learner.load_state_dict(checkpoint["learner"])
    return learner


def rebuild_pixels(name, key):
    def rebuild(module, args, observation_space, action_space, checkpoint):
        network = getattr(module, name)(observation_space, action_space)
        network.load_state_dict(checkpoint[key])
        return network

    return rebuild


PIXEL_REFUSALS = (
    ("--env-id CartPole-v1", "uint8 images"),
    ("--env-id OneStateSmallImage-v0", "36 × 36"),
    ("--env-id OneStateImageBox-v0", "needs Discrete"),
)
CONTINUOUS_Q = (
    "--total-timesteps 1600 --num-envs 2 --learning-starts 100 --buffer-size 200 --batch-size 16 --train-frequency 8"
    " --hidden-sizes 8 --eval-episodes 2"
)
CONTINUOUS_Q_REFUSALS = (
    ("--env-id CartPole-v1", "use dqn.py"),
    ("--env-id OneStateUnbounded-v0", "unbounded"),
    ("--buffer-size 1", "--buffer-size"),
    ("--gradient-steps 0", "--gradient-steps"),
)

TINY = {
    "ppo": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_actor_critic,
        boxes="--env-id Pendulum-v1 --normalize-observations --learning-rate 1",
        explode=(
            ("--learning-rate inf", "_loss"),
            ("--learning-rate inf --num-minibatches 1 --update-epochs 1 --total-timesteps 128", "not finite"),
        ),
        refusals=(
            ("--num-minibatches 3", "--num-minibatches"),
            ("--num-minibatches 0", "--num-minibatches"),
            ("--num-steps 0", "--num-steps"),
            ("--update-epochs 0", "--update-epochs"),
        ),
    ),
    "ppo_atari": Tiny(
        flags="--total-timesteps 1024 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1"
        " --torch-threads 1 --learning-rate 1e-5 --eval-episodes 2",
        rebuild=rebuild_pixels("PixelActorCritic", "agent"),
        env_id="ALE/Klax-v5",  # games of a hundred steps
        one_state="OneStateImage-v0",
        explode=(
            ("--learning-rate inf", "_loss"),
            ("--learning-rate inf --num-minibatches 1 --total-timesteps 128", "not finite"),
        ),
        refusals=(*PIXEL_REFUSALS, ("--num-minibatches 3", "--num-minibatches"), ("--num-steps 0", "--num-steps")),
        pixels=True,
    ),
    "a2c": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --num-steps 16 --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_actor_critic,
        boxes="--env-id Pendulum-v1 --normalize-observations --learning-rate 1",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=(("--num-steps 0", "--num-steps"),),
    ),
    "trpo": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --num-steps 64 --num-minibatches 2 --critic-epochs 2"
        " --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_actor_critic,
        boxes="--env-id Pendulum-v1 --normalize-observations --target-kl 10",
        explode=(
            ("--learning-rate inf", "_loss"),
            ("--learning-rate inf --num-minibatches 1 --critic-epochs 1 --total-timesteps 128", "not finite"),
        ),
        refusals=(
            ("--num-minibatches 3", "--num-minibatches"),
            ("--num-steps 0", "--num-steps"),
            ("--cg-iterations 0", "--cg-iterations"),
            ("--target-kl 0", "--target-kl"),
            ("--line-search-shrink 0", "--line-search-shrink"),
            ("--line-search-shrink 1", "--line-search-shrink"),
        ),
    ),
    "kfac": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --num-steps 16 --inverse-every 3 --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_actor_critic,
        boxes="--env-id Pendulum-v1 --normalize-observations --trust-region 100 --max-step-size 100",
        explode=(
            ("--trust-region inf --max-step-size inf", "not finite"),
            ("--critic-trust-region inf --max-step-size inf --inverse-every 1000", "_loss"),
            ("--trust-region inf --max-step-size inf --total-timesteps 32", "not finite"),
        ),
        refusals=(
            ("--num-steps 0", "--num-steps"),
            ("--inverse-every 0", "--inverse-every"),
            ("--damping 0", "--damping"),
            ("--trust-region 0", "--trust-region"),
            ("--critic-trust-region -1", "--critic-trust-region"),
            ("--max-step-size nan", "--max-step-size"),
        ),
    ),
    "reinforce": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_policy,
        boxes="--env-id Pendulum-v1 --normalize-observations --learning-rate 1",
        explode=(
            ("--learning-rate inf", "policy_loss"),
            ("--value-learning-rate inf", "value_loss"),
            ("--learning-rate inf --total-timesteps 1", "not finite"),
        ),
        refusals=(
            ("--baseline mean --num-envs 1", "--num-envs"),
            ("--baseline optimal --num-envs 1", "--num-envs"),
            ("--value-steps 0", "--value-steps"),
        ),
    ),
    "grpo": Tiny(
        flags="--total-timesteps 512 --num-envs 4 --group-size 2 --groups 2 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_policy,
        values="losses/returns",
        boxes="--env-id Pendulum-v1 --normalize-observations --learning-rate 1",
        explode=(
            ("--learning-rate inf", "policy_loss"),
            ("--learning-rate inf --num-minibatches 1 --update-epochs 1 --total-timesteps 1", "not finite"),
        ),
        refusals=(
            ("--group-size 1", "--group-size"),
            ("--num-envs 3", "--num-envs"),
            ("--groups 3", "--groups"),
            ("--num-minibatches 5", "--num-minibatches"),
            ("--reference-every 0", "--reference-every"),
        ),
    ),
    "dqn": Tiny(
        flags="--total-timesteps 512 --num-envs 2 --learning-starts 100 --buffer-size 200 --batch-size 16"
        " --train-frequency 4 --gradient-steps 1 --exploration-end 0.9 --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_q_network,
        values="losses/q_values",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=(
            ("--env-id Pendulum-v1", "use ddpg.py, td3.py or sac.py"),
            ("--buffer-size 1", "--buffer-size"),
            ("--buffer-size 1_000_000_000_000", "bytes"),
            ("--n-step 0", "--n-step"),
            ("--exploration-fraction 0", "--exploration-fraction"),
            ("--exploration boltzmann --exploration-end 0", "--exploration-end"),
            ("--exploration boltzmann --exploration-start 0", "--exploration-start"),
            ("--train-frequency 0", "--train-frequency"),
        ),
    ),
    "dqn_atari": Tiny(
        flags="--total-timesteps 1000 --num-envs 2 --learning-starts 500 --buffer-size 800 --batch-size 8"
        " --train-frequency 40 --gradient-steps 1 --exploration-end 0.9 --torch-threads 1 --eval-episodes 2",
        rebuild=rebuild_pixels("PixelQNetwork", "network"),
        env_id="ALE/Klax-v5",  # games of a hundred steps
        one_state="OneStateImage-v0",
        values="losses/q_values",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=(
            *PIXEL_REFUSALS,
            ("--buffer-size 10", "--buffer-size"),
            ("--buffer-size 1_000_000_000_000", "bytes"),
            ("--n-step 0", "--n-step"),
            ("--exploration-fraction 0", "--exploration-fraction"),
            ("--train-frequency 0", "--train-frequency"),
        ),
        pixels=True,
    ),
    "ddpg": Tiny(
        flags=f"{CONTINUOUS_Q} --noise ou",
        rebuild=rebuild_actor_critics("DeterministicActorCritic"),
        env_id="Pendulum-v1",
        one_state="OneStateBox-v0",
        values="losses/q_values",
        boxes="--learning-rate 0.1",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=CONTINUOUS_Q_REFUSALS,
    ),
    "td3": Tiny(
        flags=CONTINUOUS_Q,
        rebuild=rebuild_actor_critics("DeterministicActorCritics"),
        env_id="Pendulum-v1",
        one_state="OneStateBox-v0",
        values="losses/q_values",
        boxes="--learning-rate 0.1",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=(*CONTINUOUS_Q_REFUSALS, ("--num-critics 0", "--num-critics"), ("--policy-delay 0", "--policy-delay")),
    ),
    "sac": Tiny(
        flags=CONTINUOUS_Q,
        rebuild=rebuild_actor_critics("SoftActorCritics"),
        env_id="Pendulum-v1",
        one_state="OneStateBox-v0",
        values="losses/q_values",
        boxes="--learning-rate 0.1",
        explode=(("--learning-rate inf", "not finite"),),
        refusals=(
            *CONTINUOUS_Q_REFUSALS,
            ("--critic-subset 3", "--critic-subset"),
            ("--alpha 0", "--alpha"),
        ),
    ),
    "mbpo": Tiny(
        flags="--total-timesteps 1600 --num-envs 8 --learning-starts 100 --buffer-size 200 --batch-size 16"
        " --gradient-steps 1 --hidden-sizes 8 --eval-episodes 2 --ensemble-size 3 --num-elites 2"
        " --model-hidden-sizes 8 --model-frequency 400 --patience 1 --rollouts-per-step 2 --model-buffer-age 800",
        rebuild=rebuild_actor_critics("SoftActorCritics"),
        env_id="Pendulum-v1",
        one_state="OneStateBox-v0",
        values="losses/q_values",
        boxes="--learning-rate 0.1",
        explode=(("--learning-rate inf", "not finite"), ("--model-learning-rate inf", "not finite")),
        refusals=(
            *CONTINUOUS_Q_REFUSALS,
            ("--env-id OneStateDiscreteBox-v0", "Use sac.py"),
            ("--critic-subset 3", "--critic-subset"),
            ("--alpha 0", "--alpha"),
            ("--num-elites 4", "--num-elites"),
            ("--real-ratio 1.5", "--real-ratio"),
            ("--holdout 1", "--holdout"),
            ("--learning-starts 9", "--learning-starts"),
            ("--rollout-lengths 0 1 0 1", "--rollout-lengths"),
            ("--rollout-lengths 1 2 5 5", "--rollout-lengths"),
            ("--value-expansion 0", "--value-expansion"),
            ("--rollouts-per-step 1_000_000_000", "bytes"),
        ),
    ),
    "bc": Tiny(
        flags="--expert INDICES --total-timesteps 512 --num-envs 2 --epochs 3 --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_cloned_policy,
        values="losses/log_loss",
        boxes="--env-id Pendulum-v1 --expert NUMBERS --learning-rate 0.1",
        explode=(("--learning-rate inf", "log_loss"),),
        refusals=(
            ("--expert nowhere.pt2", "--expert"),
            ("--env-id Pendulum-v1", "--expert"),  # its actions are no numbers within bounds
            ("--holdout 1", "--holdout"),
            ("--noise -1", "--noise"),
            ("--history 0", "--history"),
            ("--epochs 0", "--epochs"),
            ("--num-demonstrations 0", "--num-demonstrations"),
            ("--total-timesteps 1_000_000_000_000", "bytes"),
        ),
        refitted=("/policy/", "/optimizer/", "/counter/", "/rng/"),
    ),
    "dagger": Tiny(
        flags="--expert INDICES --total-timesteps 512 --num-envs 2 --steps-per-iteration 64 --epochs 2"
        " --hidden-sizes 8 --eval-episodes 2",
        rebuild=rebuild_learner,
        values="losses/imitation_loss",
        boxes="--env-id Pendulum-v1 --expert NUMBERS --learning-rate 1",
        explode=(
            ("--learning-rate inf", "_loss"),
            ("--learning-rate inf --epochs 1 --batch-size 100 --total-timesteps 64", "not finite"),
        ),
        refusals=(
            ("--expert nowhere.pt2", "--expert"),
            ("--env-id OneStateUnbounded-v0", "unbounded"),
            ("--beta-decay 2", "--beta-decay"),
            ("--total-timesteps 1_000_000_000_000", "bytes"),
            ("--steps-per-iteration 0", "--steps-per-iteration"),
            ("--epochs 0", "--epochs"),
        ),
    ),
}


# Helpers ----------------------------------------------------------------------------------------------------


def module_of(algo):
    return importlib.import_module(algo)


class Reflex(torch.nn.Module):
    """An expert for any environment with a Box to see: does something or other by the sum of what it sees."""

    def __init__(self, indices: bool):
        super().__init__()
        self.indices = indices

    def forward(self, obs):
        return (obs.sum(-1) < 0).long() if self.indices else obs.sum(-1, keepdim=True).tanh()


@functools.cache
def expert(kind: str) -> str:
    """The path of such an expert's policy.pt2, of two actions (INDICES) or one number (NUMBERS)."""
    path = Path(tempfile.mkdtemp()) / f"{kind}.pt2"
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("size")},)
    torch.export.save(torch.export.export(Reflex(kind == "INDICES"), (torch.zeros(2, 3),), dynamic_shapes=shapes), path)
    return str(path)


def flags_of(algo, extra=""):
    """A tiny run's flags; `extra` comes last and wins."""
    flags = f"--env-id {TINY[algo].env_id} {TINY[algo].flags} {extra}".split()
    return [expert(flag) if flag in ("INDICES", "NUMBERS") else flag for flag in flags]


def train(algo, extra="") -> Path:
    """A tiny run in this process → its run directory."""
    module = module_of(algo)
    return module.train(module.parse_args(flags_of(algo, extra)))["run_dir"]


def resume(algo, run_dir, extra="") -> Path:
    """--resume in this process → the directory it went on in."""
    module = module_of(algo)
    return module.train(module.parse_args(["--resume", str(run_dir), *extra.split()]))["run_dir"]


def start(algo, *flags, **kwargs) -> subprocess.Popen:
    """The script as a process of its own; `conftest:` before an environment's id makes tests/conftest.py known."""
    kwargs["env"] = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS[algo]), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def start_long_run(algo, rows=20) -> tuple[subprocess.Popen, Path]:
    """A run of hours in the one-state environment, once its monitor.csv holds some rows → process, run directory."""
    flags = f"--env-id conftest:{TINY[algo].one_state} --total-timesteps 10_000_000 --checkpoint-every 100".split()
    process = start(algo, *flags_of(algo), *flags)
    deadline = time.time() + 100
    while time.time() < deadline:
        found = list(Path("runs").glob("*/checkpoint.pt"))
        if found and len((found[0].parent / "monitor.csv").read_text().splitlines()) > rows:
            return process, found[0].parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    raise AssertionError("no episode after 100 s")


def load(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def leaves(tree, path="") -> dict:
    """Every value of a checkpoint, by its path."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}
    return {path: tree}


def tensors(run_dir) -> dict:
    return {k: v for k, v in leaves(load(run_dir)).items() if isinstance(v, torch.Tensor)}


def different(a: dict, b: dict) -> list[str]:
    """Paths of the tensors that differ in a single bit."""
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


def episodes(run_dir) -> np.ndarray:
    """monitor.csv's rows (episodes, 3): r, l, t; fails unless the file is whole."""
    header, names, *rows = (run_dir / "monitor.csv").read_text().splitlines()
    assert json.loads(header.removeprefix("#")).keys() >= {"t_start", "env_id"}
    assert names == "r,l,t"
    return np.array([[float(x) for x in row] for row in csv.reader(rows)]).reshape(len(rows), 3)


def scalars(run_dir) -> dict[str, list]:
    """TensorBoard's events by tag."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def assert_tensorboard_agrees_with_monitor(run_dir):
    tags, rows = scalars(run_dir), episodes(run_dir)
    for tag, column in (("charts/episodic_return", 0), ("charts/episodic_length", 1)):
        np.testing.assert_allclose([event.value for event in tags[tag]], rows[:, column], rtol=1e-6)


def wait_for_the_next_second():
    """TensorBoard reads event files in the order of the seconds in their names; a real resume takes longer."""
    time.sleep(1.01 - time.time() % 1)


def contents(folder) -> dict:
    """Every file below a folder, to see whether anything changed."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def messages(err: str) -> list[str]:
    """stderr's lines without progress bars, which have no percentage once a run is past its last step.

    And without what mbpo.py says of an environment that it does not know.
    """
    lines = re.split("[\r\n]+", err.replace("\x1b[A", ""))
    lines = [line for line in lines if not line.endswith("is not known here: the model learns it")]
    return [line for line in lines if line.strip() and not re.match(r".*\d+(%\|.*\||step ).*\]\s*$", line)]


def assert_fails(algo, capsys, extra, names, code=2, action=train):
    """`extra` ends the script with that exit code and one line that holds `names`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        action(algo, extra) if action is train else action()
    lines = messages(capsys.readouterr().err)
    assert exit_.value.code == code
    assert len(lines) == 1 and lines[0].startswith(f"{algo}.py: ") and names in lines[0], lines


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A run that fails in this process leaves its handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", params=[algo for algo in SCRIPTS if algo in TINY])
def algo(request):
    return request.param


def these_if_fast(*names: str):
    """A test of every script, slow but for these."""
    params = [algo if algo in names else pytest.param(algo, marks=pytest.mark.slow) for algo in TINY]
    return pytest.mark.parametrize("algo", params, indirect=True)


ppo_alone_if_fast = these_if_fast("ppo")
"""For what costs a process and is in the plumbing alone, which is the same source in every file."""


@pytest.fixture(scope="session")
def alone(algo, tmp_path_factory):
    """A finished tiny run of the file copied alone to an empty folder, warnings being errors."""
    folder = tmp_path_factory.mktemp(algo)
    shutil.copy(SCRIPTS[algo], folder)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", f"{algo}.py", *flags_of(algo)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    done.dir = next((folder / "runs").iterdir())
    return done


@pytest.fixture
def finished(alone, tmp_path):
    """A copy of that run's directory, to resume and to damage."""
    return Path(shutil.copytree(alone.dir, tmp_path / "runs" / alone.dir.name))


@pytest.fixture(scope="session")
def boxes(algo, tmp_path_factory):
    """The directory of a finished run with Box actions and normalised observations."""
    if TINY[algo].boxes is None:
        pytest.skip("takes no Box actions")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(algo, f"{TINY[algo].boxes} --output-dir {tmp_path_factory.mktemp('boxes')}")


def test_every_script_has_a_tiny_run():
    assert TINY.keys() == SCRIPTS.keys(), "add the script's tiny run to TINY in tests/test_command_line.py"


# Flags ------------------------------------------------------------------------------------------------------


def test_help_shows_every_flag_its_text_and_the_recommended_settings(algo, capsys):
    with pytest.raises(SystemExit) as exit_:
        module_of(algo).parse_args(["--help"])
    assert exit_.value.code == 0
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    source = SCRIPTS[algo].read_text().split("class Args:")[1].split("\n\n\n")[0]
    texts = dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.M | re.S))
    for field in fields(module_of(algo).Args):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert re.sub(r"\s+", "", texts[field.name]) in shown, f"--help does not say what {field.name} is"
    for env_id, settings in module_of(algo).RECOMMENDED.items():
        assert f"{env_id}:{json.dumps(settings)[1:-1]}".replace(" ", "") in shown


def test_env_id_alone_takes_the_recommended_settings_and_an_explicit_flag_wins(algo):
    module = module_of(algo)
    for env_id, settings in module.RECOMMENDED.items():
        for argv in (["--env-id", env_id], ["--env_id", env_id], [f"--env-id={env_id}"], [f"--env_id={env_id}"]):
            args = module.parse_args(argv)
            assert args == module.Args(**{"env_id": env_id} | settings), argv
        args = module.parse_args(["--env-id", env_id, "--total-timesteps", "77", "--num-envs", "5"])
        assert args == module.Args(**{"env_id": env_id} | settings | {"total_timesteps": 77, "num_envs": 5})
    unknown = module.parse_args(["--env-id", "MyOwn-v0"])
    assert unknown == module.Args(env_id="MyOwn-v0")
    default = module.Args().env_id
    assert module.parse_args([]) == module.Args(**{"env_id": default} | module.RECOMMENDED.get(default, {}))


# The run directory ------------------------------------------------------------------------------------------


def test_the_file_alone_runs_and_prints_evaluation_and_run_directory_last(algo, alone):
    evaluation, run_dir = alone.stdout.splitlines()[-2:]
    assert re.fullmatch(r"evaluation: -?\d+\.\d+ ± \d+\.\d+ over 2 episodes", evaluation)
    assert run_dir == f"run directory: runs/{alone.dir.name}"
    assert re.fullmatch(rf"{TINY[algo].env_id.replace('/', '-')}__{algo}__1__\d+", alone.dir.name)
    assert "Warning" not in alone.stderr and messages(alone.stderr) == []


def test_a_run_directory_holds_everything_and_no_more(alone):
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in alone.dir.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "checkpoint.pt", "policy.pt2"}


def test_args_json_holds_every_argument_the_versions_and_the_script(algo, alone):
    module, about = module_of(algo), json.loads((alone.dir / "args.json").read_text())
    expected = module.parse_args(flags_of(algo))
    assert about["args"] == json.loads(json.dumps({f.name: getattr(expected, f.name) for f in fields(module.Args)}))
    assert about["versions"].items() >= {"torch": torch.__version__, "gymnasium": gym.__version__}.items()
    assert about["versions"]["python"] == sys.version.split()[0] and about["versions"]["numpy"] == np.__version__
    assert about["script_sha256"] == hashlib.sha256(SCRIPTS[algo].read_bytes()).hexdigest()


def test_tensorboard_has_cleanrls_tags(algo, alone):
    tags = scalars(alone.dir)
    charts = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"}
    assert tags.keys() >= charts | {TINY[algo].values}
    assert len([tag for tag in tags if tag.startswith("losses/")]) > 1
    assert {tag.split("/")[0] for tag in tags} == {"charts", "losses", "eval"}
    assert tags["charts/SPS"][-1].step == tags[TINY[algo].values][-1].step == load(alone.dir)["step"]
    evaluation = float(re.search(r"evaluation: (\S+)", alone.stdout)[1])
    assert tags["eval/episodic_return"][-1].value == pytest.approx(evaluation, abs=0.01)


def test_monitor_csv_reads_in_sb3_and_agrees_with_tensorboard(alone):
    table, rows = load_results(str(alone.dir)), episodes(alone.dir)
    assert (table[["r", "l"]].to_numpy() == rows[:, :2]).all() and len(rows) > 5
    assert_tensorboard_agrees_with_monitor(alone.dir)
    assert (np.diff(rows[:, 2]) >= 0).all() and (rows[:, 2] > 0).all() and rows[-1, 2] > rows[0, 2]
    assert 0 < rows[:, 1].sum() <= load(alone.dir)["step"]


@ppo_alone_if_fast
def test_two_runs_in_the_same_second_get_two_directories(algo):
    now = int(time.time())
    taken = [Path(f"runs/{TINY[algo].env_id.replace('/', '-')}__{algo}__1__{now + k}") for k in range(60)]
    for path in taken:
        path.mkdir(parents=True)
    run_dir = train(algo)
    assert run_dir not in taken and re.search(r"__\d+_1$", run_dir.name)
    assert not any(list(path.iterdir()) for path in taken)


def test_capture_video_writes_mp4(algo):
    assert list(train(algo, "--capture-video").glob("videos/*.mp4"))


USE_POLICY = """
import sys, torch
for path in sys.argv[1:]:
    policy = torch.export.load(path + "/policy.pt2").module()
    torch.save([policy(obs).detach() for obs in torch.load(path + "/observations.pt")], path + "/actions.pt")
assert not {"gymnasium", "stable_baselines3", *%r} & set(sys.modules)
"""


def test_policy_pt2_alone_acts_like_the_checkpoints_network(algo, alone, request):
    run_dirs = [alone.dir] + ([request.getfixturevalue("boxes")] if TINY[algo].boxes else [])
    policies = []
    for run_dir in run_dirs:
        args = module_of(algo).Args(**json.loads((run_dir / "args.json").read_text())["args"])
        if TINY[algo].pixels:
            observation_space, action_space = module_of(algo).check_pixel_spaces(args)
            channels, *size = observation_space.shape
            images = [255.0 * torch.randint(0, 2, (n, channels, 4, 4)) for n in (1, 7, 100)]
            batches = [torch.nn.functional.interpolate(x, size).byte() for x in images]
        else:
            env = gym.make(args.env_id)
            observation_space, action_space = env.observation_space, env.action_space
            batches = [30 * torch.randn(n, *observation_space.shape) for n in (1, 7, 100)]
        policy = TINY[algo].rebuild(module_of(algo), args, observation_space, action_space, load(run_dir))
        torch.save(batches, run_dir / "observations.pt")
        policies.append((run_dir, batches, policy, action_space))
    try:
        code = USE_POLICY % list(SCRIPTS)
        subprocess.run([sys.executable, "-c", code, *map(str, run_dirs)], check=True, timeout=120)
        for run_dir, batches, policy, space in policies:
            for obs, actions in zip(batches, torch.load(run_dir / "actions.pt"), strict=True):
                torch.testing.assert_close(actions, policy(obs).detach())
                assert len(actions) == len(obs) and all(space.contains(action) for action in actions.numpy())
            assert len(actions.unique()) > 1, "these observations tell no policies apart"
            if isinstance(space, gym.spaces.Box):
                assert (actions == torch.as_tensor(space.high)).any(), "this policy never reaches the bounds"
    finally:
        for path in (path for run_dir in run_dirs for path in run_dir.glob("*ions.pt")):
            path.unlink()


def readmes_python() -> list[str]:
    """README.md's blocks of Python."""
    return re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readmes_sweep(capsys, monkeypatch):
    """Which trains with the recommended settings, and with the flags that it gives."""
    monkeypatch.syspath_prepend(ROOT / "algos")
    _, code = readmes_python()
    tiny = ["--total-timesteps", "256", "--eval-episodes", "1"]
    ppo = importlib.import_module("ppo")
    parse_args = ppo.parse_args
    monkeypatch.setattr(ppo, "parse_args", lambda argv: parse_args([*argv, *tiny]))
    exec(code, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("0.0003 ", "0.001 "))]
    assert len(lines) == 2 and lines[0][2] != lines[1][2]
    for learning_rate, _, run_dir in lines:
        args = json.loads((Path(run_dir) / "args.json").read_text())["args"]
        assert (args["learning_rate"], args["env_id"]) == (float(learning_rate), "CartPole-v1")
        assert args["gamma"] == ppo.RECOMMENDED["CartPole-v1"]["gamma"] != ppo.Args().gamma


def test_the_readmes_lines_play_with_policy_pt2(algo, alone, request, monkeypatch):
    if TINY[algo].pixels:
        pytest.skip("its environments are no gymnasium.make's")
    code, _ = readmes_python()
    make, steps = gym.make, []

    class Watched(gym.Wrapper):
        def reset(self, **kwargs):
            self.over = False
            return super().reset(**kwargs)

        def step(self, action):
            assert not self.over, "a step after the episode's end"
            steps.append(self.action_space.contains(action))
            result = super().step(action)
            self.over = result[2] or result[3]
            return result

    for run_dir in [alone.dir] + ([request.getfixturevalue("boxes")] if TINY[algo].boxes else []):

        def played(env_id, render_mode, run_dir=run_dir):
            assert (env_id, render_mode) == ("CartPole-v1", "human")  # there may be no screen here
            return Watched(make(json.loads((run_dir / "args.json").read_text())["args"]["env_id"]))

        monkeypatch.setattr(gym, "make", played)
        exec(code.replace("runs/…", str(run_dir)).replace("1000", "100"), {})
        assert len(steps) == 100 and all(steps)
        steps.clear()


# Refusals ---------------------------------------------------------------------------------------------------

REFUSALS = (
    ("--env-id Nonsense-v0", "--env-id Nonsense-v0"),
    ("--env-id CartPole-v77", "--env-id CartPole-v77"),
    ("--env-id OneStateMulti-v0", "action space MultiDiscrete"),
    ("--env-id OneStateDict-v0", "observation space Dict"),
    ("--env-id OneStateDict-v0", "FlattenObservation"),
    ("--env-id OneState-v0 --capture-video", "--capture-video"),  # it cannot render
    ("--num-envs 0", "--num-envs"),
    ("--total-timesteps 0", "--total-timesteps"),
    ("--total-timesteps -5", "--total-timesteps"),
    ("--torch-threads 0", "--torch-threads"),
    ("--checkpoint-every 0", "--checkpoint-every"),
    ("--eval-episodes 0", "--eval-episodes"),
    ("--seed -1", "--seed"),
    ("--device cuda", "--device cuda"),
    ("--output-dir a_file", "--output-dir"),
    ("--output-dir a_file/below", "--output-dir"),
    ("--resume nowhere", "--resume"),
    ("--resume a_file", "--resume"),
    ("--resume empty", "--resume"),
)
OF_VECTORS = ("OneStateMulti-v0", "FlattenObservation", "--capture-video")
"""Refusals that scripts for pixels do not get to."""


@pytest.mark.parametrize("extra, names", REFUSALS, ids=[" ".join(refusal) for refusal in REFUSALS])
def test_refuses_in_one_line_and_leaves_nothing(algo, extra, names, capsys, monkeypatch):
    if TINY[algo].pixels and any(x in extra + names for x in OF_VECTORS):
        pytest.skip("refuses observations that are no images first")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("a_file").write_text("")
    Path("empty").mkdir()
    before = contents(".")
    if extra.startswith("--resume"):  # alone: other flags beside it are refused anyway
        assert_fails(algo, capsys, None, names, action=lambda: resume(algo, extra.split()[1]))
    else:
        assert_fails(algo, capsys, extra, names)
    assert contents(".") == before


@pytest.mark.parametrize("algo, extra, names", [(algo, *x) for algo in TINY for x in TINY[algo].refusals])
def test_refuses_its_own_flags_in_one_line_and_leaves_nothing(algo, extra, names, capsys):
    assert_fails(algo, capsys, extra, names)
    assert contents(".") == {}


def assert_resume_refuses(algo, run_dir, capsys, extra=""):
    before = contents(".")
    assert_fails(algo, capsys, None, "--resume", action=lambda: resume(algo, run_dir, extra))
    assert contents(".") == before


@pytest.mark.parametrize("extra", ["--seed 7", "--env-id Acrobot-v1", "--total-timesteps 1024 --num-envs 5"])
def test_resume_refuses_other_flags(algo, finished, capsys, extra):
    assert_resume_refuses(algo, finished, capsys, extra)


@pytest.mark.parametrize("size", ["half", "all but ten", "a hundred", "none"])
def test_resume_refuses_a_truncated_checkpoint(algo, finished, capsys, size):
    whole = (finished / "checkpoint.pt").read_bytes()
    sizes = {"half": len(whole) // 2, "all but ten": len(whole) - 10, "a hundred": 100, "none": 0}
    (finished / "checkpoint.pt").write_bytes(whole[: sizes[size]])
    assert_resume_refuses(algo, finished, capsys)


def test_resume_refuses_a_checkpoint_that_is_none(algo, finished, capsys):
    (finished / "checkpoint.pt").write_bytes(b"nonsense")
    assert_resume_refuses(algo, finished, capsys)
    (finished / "checkpoint.pt").unlink()
    assert_resume_refuses(algo, finished, capsys)


def test_resume_refuses_a_checkpoint_that_lacks_something(algo, finished, capsys):
    state = load(finished)
    for key in state:
        torch.save({k: v for k, v in state.items() if k != key}, finished / "checkpoint.pt")
        assert_resume_refuses(algo, finished, capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"args": 1}', '{"args": {"no_such_flag": 1}}'])
def test_resume_refuses_damaged_arguments(algo, finished, capsys, text):
    (finished / "args.json").write_text(text)
    assert_resume_refuses(algo, finished, capsys)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "dump", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))], ids=["zip", "pickle"]
)
def test_resume_executes_nothing(algo, finished, capsys, dump):
    dump(load(finished) | {"step": Malicious()}, finished / "checkpoint.pt")
    assert_fails(algo, capsys, None, "--resume", action=lambda: resume(algo, finished))
    assert not Path("harm").exists()


# Faults in mid-run ------------------------------------------------------------------------------------------


def assert_checkpoint_is_finite():
    (run_dir,) = Path("runs").iterdir()
    for name, value in tensors(run_dir).items():
        assert value.isfinite().all() or name.endswith("/lr"), name


@pytest.mark.parametrize("bad", ["BadReward", "BadObservation"])
def test_stops_where_the_environment_is_not_finite_and_keeps_the_last_checkpoint(algo, bad, capsys):
    if TINY[algo].pixels and bad == "BadObservation":
        pytest.skip("a pixel is always finite")
    env_id = TINY[algo].one_state.replace("OneState", bad)
    extra = f"--env-id {env_id} --total-timesteps 5000 --checkpoint-every 100"
    assert_fails(algo, capsys, extra, "that is not finite", code=1)
    assert_checkpoint_is_finite()
    (run_dir,) = Path("runs").iterdir()
    assert 100 <= load(run_dir)["step"] < 5000


@pytest.mark.parametrize("algo, extra, names", [(algo, *x) for algo in TINY for x in TINY[algo].explode])
def test_stops_where_a_loss_or_weight_is_not_finite_and_keeps_the_last_checkpoint(algo, extra, names, capsys):
    assert_fails(algo, capsys, extra, names, code=1)
    assert_checkpoint_is_finite()


def test_every_loop_ends_on_a_signal_and_goes_on_from_its_checkpoint(algo, monkeypatch, capsys):
    module, steps = module_of(algo), []
    log = module.Run.log

    def log_and_signal(run, *args, **kwargs):
        log(run, *args, **kwargs)
        steps.append(run.step)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(module.Run, "log", log_and_signal)
        train(algo, "--total-timesteps 2000")
    (run_dir,) = Path("runs").iterdir()
    assert exit_.value.code == 130 and f"--resume {run_dir}" in messages(capsys.readouterr().err)[-1]
    assert len(steps) == 1 and load(run_dir)["step"] == steps[0] < 2000
    wait_for_the_next_second()
    assert resume(algo, run_dir) == run_dir and load(run_dir)["step"] >= 2000


@ppo_alone_if_fast
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_resume_goes_on(algo, number):
    process, run_dir = start_long_run(algo)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {run_dir}" in messages(err)[-1] and "Traceback" not in err
    step, before = load(run_dir)["step"], json.loads((run_dir / "args.json").read_text())["args"]
    assert step > 0 and f"step {step}" in messages(err)[-1]
    assert step - 40 <= episodes(run_dir)[:, 1].sum() <= step  # the checkpoint is of this moment
    assert not (run_dir / "policy.pt2").exists()

    wait_for_the_next_second()
    assert resume(algo, run_dir, f"--total-timesteps {step + 500}") == run_dir
    assert json.loads((run_dir / "args.json").read_text())["args"] == before | {"total_timesteps": step + 500}
    assert load(run_dir)["step"] >= step + 500 and list(Path("runs").iterdir()) == [run_dir]
    assert (run_dir / "policy.pt2").exists()
    assert_tensorboard_agrees_with_monitor(run_dir)


def kill_and_resume(algo, seconds):
    process, run_dir = start_long_run(algo, rows=12)  # past the first checkpoint, at step 100
    time.sleep(seconds)
    process.kill()
    process.communicate()
    wait_for_the_next_second()
    total, before = load(run_dir)["step"], tensors(run_dir)
    assert resume(algo, run_dir, f"--total-timesteps {total}") == run_dir
    before, after = (
        {name: x for name, x in state.items() if not name.startswith(TINY[algo].refitted)}
        for state in (before, tensors(run_dir))
    )
    assert different(before, after) == [], "networks, targets, optimisers, replay buffer, random state"
    wait_for_the_next_second()
    total += 500
    assert resume(algo, run_dir, f"--total-timesteps {total}") == run_dir
    step = load(run_dir)["step"]
    assert total <= step < total + 500
    # Every episode has 10 steps; two environments lose at most 9 each at the resume and 9 each at the end.
    assert (episodes(run_dir)[:, :2] == 10).all()
    assert step - 36 <= episodes(run_dir)[:, 1].sum() <= step
    names = {path.name for path in run_dir.iterdir() if "events" not in path.name}
    assert names == {"args.json", "monitor.csv", "checkpoint.pt", "policy.pt2"}
    assert_tensorboard_agrees_with_monitor(run_dir)


@ppo_alone_if_fast
def test_a_killed_run_resumes(algo):
    kill_and_resume(algo, random.random())


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(10))
def test_a_run_killed_at_any_moment_resumes(algo, round_):
    kill_and_resume(algo, 2 * random.random())


# Resume and determinism -------------------------------------------------------------------------------------


def test_resume_restores_every_bit(algo, finished, alone):
    assert resume(algo, finished) == finished
    assert different(tensors(finished), tensors(alone.dir)) == []
    before, after = leaves(load(alone.dir)), leaves(load(finished))
    changed = {k for k in before if not isinstance(before[k], torch.Tensor) and before[k] != after[k]}
    assert changed <= {"/seconds"} and after["/seconds"] >= before["/seconds"] > 0
    assert any("rng" in name for name in tensors(finished)), "the random state is not in the checkpoint"
    assert (episodes(finished) == episodes(alone.dir)).all()


def test_resume_with_more_steps_goes_on_to_them(algo, finished, alone):
    total = 2 * module_of(algo).parse_args(flags_of(algo)).total_timesteps
    assert resume(algo, finished, f"--total-timesteps {total}") == finished
    step = load(alone.dir)["step"]
    assert load(finished)["step"] >= total
    assert json.loads((finished / "args.json").read_text())["args"]["total_timesteps"] == total
    old, new = episodes(alone.dir), episodes(finished)
    assert (new[: len(old)] == old).all() and 0 < new[len(old) :, 1].sum() <= load(finished)["step"] - step
    assert (np.diff(new[:, 2]) >= 0).all(), "time stood still or ran backwards at the resume"
    assert different(tensors(finished), tensors(alone.dir))


def test_resume_cuts_off_the_episodes_after_the_checkpoint(algo, finished, alone):
    with open(finished / "monitor.csv", "a") as file:
        file.write("111.0,9,999.0\n222.0,9,9")
    resume(algo, finished)
    assert (finished / "monitor.csv").read_text() == (alone.dir / "monitor.csv").read_text()


def test_resume_keeps_the_last_events_before_the_checkpoint(algo):
    """Episodes of 10 steps: several end in the very step that the checkpoint is written at."""
    run_dir = train(algo, f"--env-id {TINY[algo].one_state} --total-timesteps 640")
    wait_for_the_next_second()
    resume(algo, run_dir, "--total-timesteps 1280")
    assert_tensorboard_agrees_with_monitor(run_dir)


def test_same_seed_same_bits_other_seed_other_bits(algo, alone):
    same, other = train(algo), train(algo, "--seed 2")
    assert (episodes(same)[:, :2] == episodes(alone.dir)[:, :2]).all()
    assert different(tensors(same), tensors(alone.dir)) == []
    assert episodes(other)[:, :2].tolist() != episodes(alone.dir)[:, :2].tolist()
    assert "/rng/torch" in different(tensors(other), tensors(alone.dir))


# Several processes, and compilation -------------------------------------------------------------------------

AVERAGES = """
import importlib, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
modules = [importlib.import_module(name) for name in sys.argv[2:]]
modules = [m for m in modules if hasattr(m, "average")]
assert modules
data = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1  # updates, processes, batch, shape
expected = {}
for m in modules:
    if hasattr(m, "RunningStatistics"):
        expected[m] = m.RunningStatistics(4)
        for batch in data:
            expected[m].update(batch.flatten(0, 1))
    assert m.average(data[0]) is data[0] or m.average(data[0]).equal(data[0])
dist.init_process_group("gloo")
rank = dist.get_rank()
for m in modules:
    own = data[0, rank].clone()
    torch.testing.assert_close(m.average(own), data[0].mean(0))
    assert own.equal(data[0, rank]), "average wrote into its input"
    if hasattr(m, "average_all"):
        ours = m.average_all([data[0, rank], data[1, rank, 0], data[2, rank, 0, 0]])
        torch.testing.assert_close(ours, [data[0].mean(0), data[1].mean(0)[0], data[2].mean(0)[0, 0]])
    if m in expected:
        statistics = m.RunningStatistics(4)
        for batch in data:
            statistics.update(batch[rank])
        torch.testing.assert_close(dict(statistics.state_dict()), dict(expected[m].state_dict()))
        torch.testing.assert_close(statistics.mean, data.flatten(0, 2).mean(0))
        torch.testing.assert_close(statistics.var, data.flatten(0, 2).var(0, correction=0))
        assert statistics.count == data[..., 0].numel()
open(f"checked by {rank}", "x").close()
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(script, *args) -> str:
    """Runs a script in two processes → what they print.

    PyTorch's gloo threads can abort a process that is just ending (github.com/pytorch/pytorch/pull/179291), rarely,
    and torchrun then stops the other one: only that is tried again.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    for _ in range(3):
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=200)
        if "terminate called without an active exception" not in done.stderr:
            break
        shutil.rmtree("runs", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@these_if_fast("ppo", "trpo", "kfac", "dqn", "sac", "bc", "dagger")
def test_two_processes_train_as_one_run(algo):
    out = torchrun(SCRIPTS[algo], *flags_of(algo, f"--env-id conftest:{TINY[algo].one_state} --total-timesteps 512"))
    (run_dir,) = Path("runs").iterdir()
    assert out.splitlines()[-1] == f"run directory: {run_dir}" and out.count("evaluation: ") == 1
    state = load(run_dir)
    assert 512 <= state["step"] < 1024
    # Rank 0 writes its own episodes, half of all where each has 10 steps, at the step of both processes together.
    assert 0 < episodes(run_dir)[:, 1].sum() <= state["step"] / 2
    assert scalars(run_dir)["charts/SPS"][-1].step == state["step"]


def test_two_processes_count_demonstrations_together():
    """Their episodes end at different steps; a process that stopped alone would leave the other waiting."""
    flags = flags_of("bc", "--total-timesteps 2000 --num-demonstrations 9 --num-envs 1")
    torchrun(SCRIPTS["bc"], *flags)
    (run_dir,) = Path("runs").iterdir()
    assert 9 <= load(run_dir)["counter"]["episodes"] <= 10 and load(run_dir)["step"] < 2000


def test_averages_over_two_processes_are_those_of_one():
    Path("averages.py").write_text(AVERAGES)
    torchrun("averages.py", ROOT / "algos", *SCRIPTS)
    assert Path("checked by 0").exists() and Path("checked by 1").exists()


UPDATES = """
import copy, sys
sys.path.insert(0, sys.argv[1])
import a2c, dqn, grpo, kfac, numpy, ppo, ppo_atari, reinforce, torch, trpo
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete

spaces = Box(-1, 1, (4,)), Box(-1, 1, (2,))
draw = torch.Generator().manual_seed(0)


def numbers(*shape):
    return torch.randn(*shape, generator=draw)


def actor_critic(module):
    agent = module.ActorCritic(*spaces, (8,))
    agent.draw_noise = lambda n: torch.zeros(n, 2)
    if module is kfac:
        return agent, None
    vector = module.parameter_vector(agent.critic if module is trpo else agent)
    return agent, torch.optim.Adam([vector], 1e-2)


def ppo_step(agent, optimizer, part):
    args = ppo.Args(normalize_advantages=False)
    return ppo.ppo_update(agent, optimizer, ppo.PPOBatch(*part), 0.2, args)[0]


def a2c_step(agent, optimizer, part):
    states, actions, rewards, signs, *_ = part
    rollout = a2c.Rollout(states, states.roll(1, 1), actions, rewards, signs > 1, signs > 2)
    metrics = a2c.a2c_update(agent, optimizer, a2c.Rollout(*(x.unsqueeze(0) for x in rollout)), a2c.Args())
    return metrics[:-1]  # of the variances in the last one there is no mean


def trpo_step(agent, optimizer, part):
    states, actions, _, _, advantages, returns = part
    metrics = trpo.trpo_update(agent, states, actions, advantages, trpo.Args(normalize_advantages=False))
    assert metrics["step_fraction"] > 0
    return trpo.critic_update(agent, optimizer, states, returns)


def kfac_step(agent, _, part):
    states, actions, _, _, advantages, returns = part
    agent.curvature = getattr(agent, "curvature", None) or kfac.make_curvature(agent)
    args = kfac.Args(normalize_advantages=False, inverse_every=2)
    batch = kfac.KFACBatch(states, actions, advantages, returns)
    kfac.kfac_update(agent, agent.curvature, batch, 1.0, args, kfac.gradients_and_factors)


def policy_step(policy, optimizer, part):
    states, actions, *_, advantages, _ = part
    log_probs, _ = policy.log_prob_and_entropy(states, actions)
    module = sys.modules[type(policy).__module__]
    step = getattr(module, "vector_step", None) or module.adam_step
    step(optimizer, module.gradient_vector(-(log_probs * advantages).mean(), policy))


class DQNAgent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.target = (dqn.QNetwork(Box(-1, 1, (4,)), Discrete(3), (8,)) for _ in range(2))
        self.target.requires_grad_(False)


def dqn_agent(module):
    agent = DQNAgent()
    return agent, module.vector_adam(agent.network, 1e-2)


def dqn_step(agent, optimizer, part):
    states, numbers, rewards, signs, *_ = part
    actions = (numbers[:, 0] > 0).long()
    batch = dqn.Transitions(states, actions, rewards, states.roll(1, 1), signs > 1, signs > 2)
    dqn.dqn_update(agent.network, agent.target, optimizer, batch, 0.9, dqn.Args(max_grad_norm=0.1))


def policy(module):
    policy = module.Policy(*spaces, (8,))
    return policy, torch.optim.Adam([module.parameter_vector(policy)], 1e-2)


def pixel_agent(module):
    agent = module.PixelActorCritic(Box(0, 255, (1, 36, 36), numpy.uint8), Discrete(3))
    return agent, torch.optim.Adam(agent.parameters(), 1e-3)


def pixel_step(agent, optimizer, part):
    states, numbers, *rest = part
    images = (128 + 40 * states[:, :1, None, None]).clamp(0, 255).byte().expand(-1, -1, 36, 36)
    batch = ppo_atari.PixelBatch(images, (numbers[:, 0] > 0).long(), *rest)
    args = ppo_atari.Args(normalize_advantages=False)
    return ppo_atari.pixel_ppo_update(agent, optimizer, batch, 0.2, args)[0]


def make(module):
    if module is ppo_atari:
        return pixel_agent(module)
    return (actor_critic if hasattr(module, "ActorCritic") else dqn_agent if module is dqn else policy)(module)


steps = {ppo: ppo_step, a2c: a2c_step, trpo: trpo_step, kfac: kfac_step}
steps |= {reinforce: policy_step, grpo: policy_step, dqn: dqn_step, ppo_atari: pixel_step}
data = [[numbers(40, 4), numbers(40, 2), *(numbers(40) for _ in range(4))] for _ in range(3)]
runs = {}
for module, step in steps.items():
    torch.manual_seed(0)
    whole = make(module)
    start = copy.deepcopy(whole[0].state_dict())
    runs[module] = whole[0], start, [step(*whole, batch) for batch in data]
dist.init_process_group("gloo")
for module, step in steps.items():
    whole, start, metrics = runs[module]
    part = make(module)
    part[0].load_state_dict(start)
    for batch, expected in zip(data, metrics):
        found = step(*part, [x.chunk(2)[dist.get_rank()] for x in batch])
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for (name, x), y, before in zip(part[0].named_parameters(), whole.parameters(), start.values()):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=lambda text: f"{module.__name__} {name}: {text}")
    assert any(not x.equal(start[name]) for name, x in part[0].named_parameters()), module.__name__
open(f"checked by {dist.get_rank()}", "x").close()
dist.barrier()
dist.destroy_process_group()
"""


def test_updates_of_two_processes_on_half_the_data_are_those_of_one_on_all():
    Path("updates.py").write_text(UPDATES)
    torchrun("updates.py", ROOT / "algos")
    assert Path("checked by 0").exists() and Path("checked by 1").exists()


@pytest.mark.slow
def test_compile_changes_no_result(algo):
    """Random draws within a compiled gradient, dropout for instance, would be others."""
    torch._dynamo.reset()  # its limit on compilations is per process
    eager, compiled = (train(algo, f"--total-timesteps 256 {flag}") for flag in ("", "--compile"))
    assert (episodes(eager)[:, :2] == episodes(compiled)[:, :2]).all()
    a, b = tensors(eager), tensors(compiled)
    for name in a.keys() & b.keys():
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
