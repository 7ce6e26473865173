"""Scripts as programs: their flags, their refusals, their run directory, and what survives a fault.

The plumbing has the same text in every file, so three scripts stand for all: on policy, off policy, from an expert.
"""

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
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import OneState
from stable_baselines3.common.monitor import load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for path in sorted((ROOT / "algos").glob("*.py")) if "\nclass Run(" in path.read_text()}
"""Those that resume."""


@dataclass
class Tiny:
    """How a script is run within a second, and what is its own about its command line and its checkpoint."""

    env_id: str
    flags: str
    """a tiny run there; a later flag wins over an earlier one; INDICES and NUMBERS stand for experts"""
    one_state: str
    """where every episode has 10 steps"""
    values: str
    """a tag that the script must log"""
    boxes: str
    """flags of a run with Box actions, normalised observations and a policy that reaches the space's bounds"""
    explode: tuple[tuple[str, str], ...]
    """flags that make a loss, an action or a weight infinite, and what the message must name"""
    refusals: tuple[tuple[str, str], ...]
    """flags that only this script has to refuse, and what its message must name"""
    refitted: tuple[str, ...] = ()
    """what of a checkpoint in mid-run the run's end changes, even without a step"""


TINY = {
    "ppo": Tiny(
        env_id="CartPole-v1",
        flags="--total-timesteps 512 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 --eval-episodes 2",
        one_state="OneState-v0",
        values="losses/values",
        boxes="--env-id Pendulum-v1 --normalize-observations --learning-rate 1",
        explode=(
            ("--learning-rate 1e300", "_loss"),
            ("--learning-rate 1e300 --num-minibatches 1 --update-epochs 1 --total-timesteps 128", "a weight"),
        ),
        refusals=(("--num-minibatches 3", "--num-minibatches"),),
    ),
    "sac": Tiny(
        env_id="Pendulum-v1",
        flags="--total-timesteps 1600 --num-envs 2 --learning-starts 100 --buffer-size 200 --batch-size 16"
        " --train-frequency 8 --hidden-sizes 8 --eval-episodes 2",
        one_state="OneStateBox-v0",
        values="losses/q_values",
        boxes="--learning-rate 0.1",
        explode=(
            ("--learning-rate 1e300", "the action"),
            ("--learning-rate 1e300 --policy-delay 1_000_000", "critic_loss"),
        ),
        refusals=(
            ("--env-id OneStateUnbounded-v0", "too wide"),
            ("--buffer-size 1_000_000_000_000", "bytes"),
        ),
    ),
    "bc": Tiny(
        env_id="CartPole-v1",
        flags="--expert INDICES --total-timesteps 512 --num-envs 2 --epochs 3 --hidden-sizes 8 --eval-episodes 2",
        one_state="OneState-v0",
        values="losses/log_loss",
        boxes="--env-id Pendulum-v1 --expert NUMBERS --learning-rate 0.1",
        explode=(("--learning-rate 1e300", "log_loss"),),
        refusals=(
            ("--expert nowhere.pt2", "--expert"),
            ("--env-id Pendulum-v1", "--expert"),  # its actions are no numbers within bounds
            ("--holdout 1", "--holdout"),
        ),
        refitted=("/policy/", "/optimizer/", "/counter/", "/rng"),
    ),
}

ROLLOUTS = "--total-timesteps 512 --num-envs 2 --eval-episodes 2"
MEMORY = f"{ROLLOUTS} --learning-starts 100 --buffer-size 200 --batch-size 16"
REPLAY = f"{MEMORY} --train-frequency 8"
ALONE = {algo: f"--env-id {tiny.env_id} {tiny.flags}" for algo, tiny in TINY.items()} | {
    "a2c": f"{ROLLOUTS} --num-steps 16",
    "dagger": f"{ROLLOUTS} --env-id CartPole-v1 --expert INDICES --steps-per-iteration 64 --epochs 2",
    "ddpg": f"{REPLAY} --env-id Pendulum-v1",
    "dqn": f"{REPLAY} --env-id CartPole-v1",
    "dqn_atari": f"{REPLAY} --env-id ALE/Klax-v5 --torch-threads 1",  # whose games have a hundred steps
    "grpo": f"{ROLLOUTS} --group-size 2 --groups 2 --num-minibatches 2",
    "kfac": f"{ROLLOUTS} --num-steps 16",
    "mbpo": f"{MEMORY} --env-id Pendulum-v1 --num-envs 8 --gradient-steps 1 --ensemble-size 3 --num-elites 2"
    " --model-hidden-sizes 8 --model-frequency 400 --patience 1 --rollouts-per-step 2 --model-buffer-age 800",
    "ppo_atari": f"{ROLLOUTS} --env-id ALE/Klax-v5 --num-steps 64 --num-minibatches 2 --update-epochs 1"
    " --torch-threads 1",
    "reinforce": ROLLOUTS,
    "td3": f"{REPLAY} --env-id Pendulum-v1",
    "trpo": f"{ROLLOUTS} --num-steps 64 --num-minibatches 2",
}
"""The flags of every script's run in an empty folder."""


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
    return [expert(flag) if flag in ("INDICES", "NUMBERS") else flag for flag in f"{ALONE[algo]} {extra}".split()]


def train(algo, extra="") -> Path:
    """A tiny run in this process → its run directory."""
    module = module_of(algo)
    return module.train(module.parse_args(flags_of(algo, extra)))["run_dir"]


def resume(algo, run_dir, extra="") -> Path:
    """--resume in this process → the directory it went on in."""
    module = module_of(algo)
    return module.train(module.parse_args(["--resume", str(run_dir), *extra.split()]))["run_dir"]


def start_long_run(algo) -> tuple[subprocess.Popen, Path]:
    """A run of hours in the one-state environment, once it is past its first checkpoint → process, run directory."""
    flags = flags_of(algo, f"--env-id conftest:{TINY[algo].one_state} --total-timesteps 10_000_000")
    command = [sys.executable, str(SCRIPTS[algo]), *flags, "--checkpoint-every", "100"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while time.time() < deadline:
        found = list(Path("runs").glob("*/checkpoint.pt"))
        if found and len((found[0].parent / "monitor.csv").read_text().splitlines()) > 20:
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


def assert_fails(algo, capsys, names, action, code=2):
    """`action` ends the script with that exit code and one line that holds `names`, one or several."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        action()
    lines = messages(capsys.readouterr().err)
    assert exit_.value.code == code
    assert len(lines) == 1 and lines[0].startswith(f"{algo}.py: "), lines
    assert all(name in lines[0] for name in ([names] if isinstance(names, str) else names)), lines


@pytest.fixture(scope="session", params=TINY)
def algo(request):
    return request.param


all_scripts = pytest.mark.parametrize("algo", SCRIPTS, indirect=True)
ppo_alone_if_fast = pytest.mark.parametrize(
    "algo", [x if x == "ppo" else pytest.param(x, marks=pytest.mark.slow) for x in TINY], indirect=True
)
"""For what costs a process."""


@pytest.fixture(scope="session")
def run_alone(tmp_path_factory):
    """Runs a script, copied alone to an empty folder, warnings being errors; once, for all tests."""

    @functools.cache
    def run(algo):
        folder = tmp_path_factory.mktemp(algo)
        shutil.copy(SCRIPTS[algo], folder)
        env = {key: x for key, x in os.environ.items() if not key.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", f"{algo}.py", *flags_of(algo)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        done.dir = next((folder / "runs").iterdir())
        return done

    return run


@pytest.fixture
def alone(algo, run_alone):
    """A finished tiny run of the file copied alone to an empty folder."""
    return run_alone(algo)


@pytest.fixture
def finished(alone, tmp_path):
    """A copy of that run's directory, to resume and to damage."""
    return Path(shutil.copytree(alone.dir, tmp_path / "runs" / alone.dir.name))


@pytest.fixture(scope="session")
def boxes(algo, tmp_path_factory):
    """The directory of a finished run with Box actions and normalised observations."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(algo, f"{TINY[algo].boxes} --output-dir {tmp_path_factory.mktemp('boxes')}")


def test_every_script_has_a_tiny_run():
    assert ALONE.keys() == SCRIPTS.keys(), "add the script's tiny run to ALONE in tests/test_command_line.py"


# Flags ------------------------------------------------------------------------------------------------------


@all_scripts
def test_help_shows_every_flag_its_text_and_the_recommended_settings(algo, capsys):
    with pytest.raises(SystemExit) as exit_:
        module_of(algo).parse_args(["--help"])
    assert exit_.value.code == 0
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    source = SCRIPTS[algo].read_text().split("class Args:")[1].split("\n\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): .+ = .+  # (.+)$", source, re.M))
    for field in fields(module_of(algo).Args):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.name in texts, f"{field.name} needs one line, which ends in a comment: --help shows that"
        assert re.sub(r"\s+", "", texts[field.name]) in shown, f"--help does not say what {field.name} is"
    for env_id, settings in module_of(algo).RECOMMENDED.items():
        assert f"{env_id}:{json.dumps(settings)[1:-1]}".replace(" ", "") in shown


@all_scripts
def test_env_id_alone_takes_the_recommended_settings_and_an_explicit_flag_wins(algo):
    module = module_of(algo)
    for env_id, settings in module.RECOMMENDED.items():
        args = module.parse_args(["--env-id", env_id, "--total-timesteps", "77", "--num-envs", "5"])
        assert args == module.Args(**{"env_id": env_id} | settings | {"total_timesteps": 77, "num_envs": 5})
    for argv in (["--env-id", env_id], ["--env_id", env_id], [f"--env-id={env_id}"], [f"--env_id={env_id}"]):
        assert module.parse_args(argv) == module.Args(**{"env_id": env_id} | settings), argv
    assert module.parse_args(["--env-id", "MyOwn-v0"]) == module.Args(env_id="MyOwn-v0")
    default = module.Args().env_id
    assert module.parse_args([]) == module.Args(**{"env_id": default} | module.RECOMMENDED.get(default, {}))


def test_says_which_recommended_settings_it_took(capsys):
    train("ppo")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("recommended settings: "))
    settings = module_of("ppo").RECOMMENDED["CartPole-v1"]
    assert " learning_rate=0.001 " in line and " gamma=0.98 " in line and "num_steps=64 (not 32)" in line
    assert len(re.findall(r"\w+=", line)) == len(settings)


# The run directory ------------------------------------------------------------------------------------------


@all_scripts
def test_the_file_alone_runs_and_prints_evaluation_and_run_directory_last(algo, alone):
    evaluation, run_dir = alone.stdout.splitlines()[-2:]
    assert re.fullmatch(r"evaluation: -?\d+\.\d+ ± \d+\.\d+ over 2 episodes", evaluation)
    assert run_dir == f"run directory: runs/{alone.dir.name}"
    args = module_of(algo).parse_args(flags_of(algo))
    assert re.fullmatch(rf"{args.env_id.replace('/', '-')}__{algo}__1__\d+", alone.dir.name)
    assert "Warning" not in alone.stderr and messages(alone.stderr) == []
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in alone.dir.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "checkpoint.pt", "policy.pt2"}


def test_args_json_holds_every_argument_the_versions_and_the_script(algo, alone):
    module, about = module_of(algo), json.loads((alone.dir / "args.json").read_text())
    expected = module.parse_args(flags_of(algo))
    expected = module.settle(expected) if hasattr(module, "settle") else expected  # what "auto" stands for here
    assert about["algo"] == algo
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


def test_two_runs_in_the_same_second_get_two_directories():
    now = int(time.time())
    taken = [Path(f"runs/CartPole-v1__ppo__1__{now + k}{end}") for k in range(60) for end in ("", "_1")]
    for path in taken:
        path.mkdir(parents=True)
    run_dir = train("ppo")
    assert run_dir not in taken and re.search(r"__\d+_2$", run_dir.name)
    assert not any(list(path.iterdir()) for path in taken)


def test_capture_video_writes_mp4(algo):
    assert list(train(algo, "--capture-video").glob("videos/*.mp4"))


class Seeds(OneState):
    """Notes what it is reset with."""

    noted = []

    def reset(self, *, seed=None, **kwargs):
        self.noted.append(seed)
        return super().reset(seed=seed, **kwargs)


gym.register("Seeds-v0", Seeds, max_episode_steps=10)


@pytest.mark.parametrize("num_envs, at_a_time", [(2, 2), (8, 5)])
def test_evaluation_plays_each_episode_with_its_own_seed_in_at_most_num_envs_environments(num_envs, at_a_time):
    ppo = module_of("ppo")
    args = ppo.Args(env_id="Seeds-v0", seed=7, num_envs=num_envs, eval_episodes=5)
    envs = ppo.Envs(args, 1)
    policy = ppo.ActorCritic(envs.observation_space, envs.action_space, (4,))
    Seeds.noted.clear()
    assert ppo.evaluate(policy, args).tolist() == [10] * 5
    seeds = [seed for seed in Seeds.noted if seed is not None]
    assert seeds[:5] == list(range(1_000_007, 1_000_012)) and len(seeds) == -(-5 // at_a_time) * at_a_time


USE_POLICY = """
import sys, torch
for path in sys.argv[1:]:
    policy = torch.export.load(path + "/policy.pt2").module()
    torch.save([policy(obs).detach() for obs in torch.load(path + "/observations.pt")], path + "/actions.pt")
assert not {"gymnasium", "stable_baselines3", *%r} & set(sys.modules)
"""


def test_policy_pt2_alone_acts_like_the_checkpoints_network(algo, finished, boxes, monkeypatch):
    """A finished run that is resumed loads its network from the checkpoint and exports it again."""
    module, policies = module_of(algo), []
    export = module.export_policy

    def watched(policy, envs, path):
        export(policy, envs, path)
        batches = [30 * torch.randn(n, *envs.observation_space.shape) for n in (1, 7, 100)]
        torch.save(batches, path.parent / "observations.pt")
        policies.append((policy.eval(), batches, envs.action_space, path.parent))

    monkeypatch.setattr(module, "export_policy", watched)
    for run_dir in (finished, Path(shutil.copytree(boxes, "boxes"))):
        (run_dir / "policy.pt2").unlink()
        resume(algo, run_dir)
    command = [sys.executable, "-c", USE_POLICY % list(SCRIPTS), *(str(run_dir) for *_, run_dir in policies)]
    subprocess.run(command, check=True, timeout=120)
    for policy, batches, space, run_dir in policies:
        for obs, actions in zip(batches, torch.load(run_dir / "actions.pt"), strict=True):
            torch.testing.assert_close(actions, policy(obs).detach())
            assert len(actions) == len(obs) and all(space.contains(action) for action in actions.numpy())
        assert len(actions.unique()) > 1, "these observations tell no policies apart"
    assert (actions == torch.as_tensor(space.high)).any(), "this policy never reaches the bounds"


def readmes_python() -> list[str]:
    """README.md's blocks of Python."""
    return re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readmes_sweep(capsys, monkeypatch):
    """Which trains with the recommended settings, and with the flags that it gives."""
    monkeypatch.syspath_prepend(ROOT / "algos")
    _, code = readmes_python()
    tiny = ["--total-timesteps", "256", "--eval-episodes", "1"]
    ppo = module_of("ppo")
    parse_args = ppo.parse_args
    monkeypatch.setattr(ppo, "parse_args", lambda argv: parse_args([*argv, *tiny]))
    exec(code, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("0.0003 ", "0.001 "))]
    assert len(lines) == 2 and lines[0][2] != lines[1][2]
    for learning_rate, _, run_dir in lines:
        args = json.loads((Path(run_dir) / "args.json").read_text())["args"]
        assert (args["learning_rate"], args["env_id"]) == (float(learning_rate), "CartPole-v1")
        assert args["gamma"] == ppo.RECOMMENDED["CartPole-v1"]["gamma"] != ppo.Args().gamma


def test_the_readmes_lines_play_with_policy_pt2(algo, alone, boxes, monkeypatch):
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

    for run_dir in (alone.dir, boxes):

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
    ("--env-id OneStateMulti-v0", "MultiDiscrete"),
    ("--env-id {one_state} --capture-video", "--capture-video"),  # it cannot render
    ("--total-timesteps 0", "--total-timesteps 0 must be"),  # other values out of range are in test_reports.py
    ("--device cuda", "--device cuda"),
    ("--output-dir a_file", "--output-dir"),
    ("--output-dir a_file/below", "--output-dir"),
)


@pytest.mark.parametrize("extra, names", REFUSALS, ids=[refusal[0] for refusal in REFUSALS])
def test_refuses_in_one_line_and_leaves_nothing(algo, extra, names, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("a_file").write_text("")
    before = contents(".")
    assert_fails(algo, capsys, names, lambda: train(algo, extra.format(one_state=TINY[algo].one_state)))
    assert contents(".") == before


@pytest.mark.parametrize("algo, extra, names", [(algo, *x) for algo in TINY for x in TINY[algo].refusals])
def test_refuses_its_own_flags_in_one_line_and_leaves_nothing(algo, extra, names, capsys):
    assert_fails(algo, capsys, names, lambda: train(algo, extra))
    assert contents(".") == {}


@pytest.mark.parametrize("algo", ["sac", "dqn"])
def test_refuses_several_processes(algo, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_fails(algo, capsys, ("one process", "ppo.py"), lambda: train(algo))
    assert contents(".") == {}


def assert_resume_refuses(algo, run_dir, capsys, extra="", names=()):
    before = contents(".")
    assert_fails(algo, capsys, ("--resume", *names), lambda: resume(algo, run_dir, extra))
    assert contents(".") == before


@pytest.mark.parametrize("where", ["nowhere", "a_file", "empty"])
def test_resume_refuses_what_is_no_run_directory(algo, where, capsys):
    Path("a_file").write_text("")
    Path("empty").mkdir()
    assert_resume_refuses(algo, where, capsys, names=[where])


@pytest.mark.parametrize("extra", ["--seed 7", "--env-id Acrobot-v1", "--total-timesteps 1024 --num-envs 5"])
def test_resume_refuses_other_flags(algo, finished, capsys, extra):
    assert_resume_refuses(algo, finished, capsys, extra)


@pytest.mark.parametrize("size", ["half", "all but ten", "a hundred", "none"])
def test_resume_refuses_a_truncated_checkpoint(algo, finished, capsys, size):
    whole = (finished / "checkpoint.pt").read_bytes()
    sizes = {"half": len(whole) // 2, "all but ten": len(whole) - 10, "a hundred": 100, "none": 0}
    (finished / "checkpoint.pt").write_bytes(whole[: sizes[size]])
    assert_resume_refuses(algo, finished, capsys)


def test_resume_refuses_another_algorithms_checkpoint(algo, finished, capsys):
    torch.save(load(finished) | {"algo": "a2c"}, finished / "checkpoint.pt")
    assert_resume_refuses(algo, finished, capsys, names=["a2c"])


def test_resume_refuses_a_run_directory_of_an_older_version(algo, finished, capsys):
    """Some had no algo and no args in checkpoint.pt; others may have other flags, or other networks."""
    state = load(finished)
    about = ("algo", "args", "updates", "longest_episode")
    old = {name: x for name, x in state.items() if name not in about}
    old["rng"] = {"torch": state["rng"], "cuda": state["cuda_rng"]}
    network = next(name for name in ("agent", "policy") if name in state)
    weights = dict(list(state[network].items())[1:])
    for changed in (old, state | {"args": state["args"] | {"dropped_flag": 1}}, state | {network: weights}):
        torch.save(changed, finished / "checkpoint.pt")
        assert_resume_refuses(algo, finished, capsys, names=["older version"])


def test_resume_refuses_a_checkpoint_that_lacks_something(algo, finished, capsys):
    state = load(finished)
    for key in ("algo", "args", *(name for name, x in state.items() if isinstance(x, dict) and name != "args")):
        torch.save({k: v for k, v in state.items() if k != key}, finished / "checkpoint.pt")
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
    assert_resume_refuses(algo, finished, capsys)
    assert not Path("harm").exists()


# Faults in mid-run ------------------------------------------------------------------------------------------


class BadReset(OneState):
    """Whose 30th episode begins with what is not finite."""

    resets = 0

    def reset(self, **kwargs):
        self.resets += 1
        obs, info = super().reset(**kwargs)
        return obs + np.nan if self.resets >= 30 else obs, info


gym.register("BadReset-v0", BadReset, max_episode_steps=10)
gym.register("BadResetBox-v0", BadReset, max_episode_steps=10, kwargs={"action": "box"})


def assert_checkpoint_is_finite():
    (run_dir,) = Path("runs").iterdir()
    for name, value in tensors(run_dir).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("bad, name", [("BadReward", "reward"), ("BadObservation", "observation"), ("BadReset", "obs")])
def test_stops_where_the_environment_is_not_finite_and_keeps_the_last_checkpoint(algo, bad, name, capsys):
    env_id = TINY[algo].one_state.replace("OneState", bad)
    extra = f"--env-id {env_id} --total-timesteps 5000 --checkpoint-every 100"
    assert_fails(algo, capsys, (f"the {name}", "not finite"), lambda: train(algo, extra), code=1)
    assert_checkpoint_is_finite()
    (run_dir,) = Path("runs").iterdir()
    assert 100 <= load(run_dir)["step"] < 5000


@pytest.mark.parametrize("algo, extra, names", [(algo, *x) for algo in TINY for x in TINY[algo].explode])
def test_stops_where_a_loss_action_or_weight_is_not_finite_and_keeps_the_last_checkpoint(algo, extra, names, capsys):
    assert_fails(algo, capsys, (names, "not finite"), lambda: train(algo, extra), code=1)
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
    process, run_dir = start_long_run(algo)
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
    assert names - {"checkpoint.tmp"} == {"args.json", "monitor.csv", "checkpoint.pt", "policy.pt2"}
    assert_tensorboard_agrees_with_monitor(run_dir)


@ppo_alone_if_fast
def test_a_killed_run_resumes(algo):
    kill_and_resume(algo, random.random())


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(10))
def test_a_run_killed_at_any_moment_resumes(algo, round_):
    kill_and_resume(algo, 2 * random.random())


# Resume and determinism; that of a run in its middle is in test_runs.py, for every script ---------------------


def test_resume_of_a_finished_run_changes_nothing_and_cuts_episodes_after_the_checkpoint(algo, finished, alone):
    with open(finished / "monitor.csv", "a") as file:
        file.write("111.0,9,999.0\n222.0,9,9")
    assert resume(algo, finished) == finished
    assert (finished / "monitor.csv").read_text() == (alone.dir / "monitor.csv").read_text()
    assert different(tensors(finished), tensors(alone.dir)) == []
    before, after = leaves(load(alone.dir)), leaves(load(finished))
    changed = {k for k in before if not isinstance(before[k], torch.Tensor) and before[k] != after[k]}
    assert changed <= {"/seconds"} and after["/seconds"] >= before["/seconds"] > 0


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
    assert "/rng" in different(tensors(other), tensors(alone.dir))


# Several processes, and compilation -------------------------------------------------------------------------

TWO_PROCESSES = """
import copy, sys
sys.path.insert(0, sys.argv[1])
import numpy, ppo, ppo_atari, torch
import torch.distributed as dist
from gymnasium.spaces import Box, Discrete

torch.manual_seed(0)
numbers = torch.randn(3, 40, 6)
data = [(x[:, :4], x[:, 4:], *torch.randn(4, 40)) for x in numbers]  # of three updates
box = ppo.ActorCritic(Box(-1, 1, (4,)), Box(-1, 1, (2,)), (8,))
pixel = ppo_atari.PixelActorCritic(Box(0, 255, (1, 36, 36), numpy.uint8), Discrete(3))
for layer in (box.actor[-1], pixel.actor):
    layer.weight.data *= 100  # so that the policy hangs on the layers below it


def update(agent, optimizer, part):
    # The bound is on the mean gradient, not on that of each process.
    args = dict(normalize_advantages=False, vf_coef=0.05, max_grad_norm=0.01)
    optimizer.zero_grad()
    if agent.__class__ is ppo.ActorCritic:
        metrics = ppo.ppo_gradient(agent, ppo.PPOBatch(*part), 0.2, ppo.Args(**args))
    else:
        states, actions, *rest = part
        images = (128 + 40 * states[:, :1, None, None]).clamp(0, 255).byte().expand(-1, -1, 36, 36)
        batch = ppo_atari.PixelBatch(images, (actions[:, 0] > 0).long(), *rest)
        metrics = ppo_atari.pixel_ppo_gradient(agent, batch, 0.2, ppo_atari.Args(**args))
    norm = torch.cat([p.grad.flatten() for p in agent.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)
    optimizer.step()
    return metrics


for module in (ppo, ppo_atari):
    assert module.gathered(numbers) is numbers
expected = []
for agent in (box, pixel):
    whole = copy.deepcopy(agent)
    optimizer = torch.optim.SGD(whole.parameters(), 10.0)
    expected.append(([update(whole, optimizer, batch) for batch in data], whole))

dist.init_process_group("gloo")
rank, halves = dist.get_rank(), numbers.unflatten(1, (2, 20))
for module in (ppo, ppo_atari):
    own = halves[0, rank].clone()
    assert module.gathered(own).equal(numbers[0])
    assert module.gathered(own.T).equal(torch.cat(list(halves[0].transpose(1, 2)))), "of what is not contiguous"
for agent, (metrics, whole) in zip((box, pixel), expected):
    before = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.SGD(agent.parameters(), 10.0)
    for batch, logged in zip(data, metrics):
        found = update(agent, optimizer, [x.chunk(2)[rank] for x in batch])
        for name, x in logged.items():
            torch.testing.assert_close(ppo.gathered(found[name].unsqueeze(0)).mean(0), x, rtol=1e-4, atol=1e-5)
    for (name, x), y in zip(agent.named_parameters(), whole.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
        assert (x - before[name]).abs().max() > 1e-4, name
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
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("algo, env_id", [("ppo", "OneState-v0"), ("ppo_atari", "OneStateImage-v0")])
def test_two_processes_train_as_one_run_which_two_resume(algo, env_id):
    flags = "--normalize-observations --normalize-rewards" if algo == "ppo" else "--learning-rate 1e-5"
    flags = flags_of(algo, f"--env-id conftest:{env_id} --total-timesteps 512 {flags} --output-dir")
    out = torchrun(SCRIPTS[algo], *flags, folder := tempfile.mkdtemp(dir="."))
    run_dir = max(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime)
    for total in (512, 1024):
        if total > 512:
            wait_for_the_next_second()
            out = torchrun(SCRIPTS[algo], "--resume", run_dir, "--total-timesteps", total)
        assert out.splitlines()[-1] == f"run directory: {run_dir}" and out.count("evaluation: ") == 1
        state = load(run_dir)
        assert state["step"] == total
        # Rank 0 writes its own episodes, half of all where each has 10 steps, at the step of both processes together.
        assert 0.4 * total < episodes(run_dir)[:, 1].sum() <= total / 2
        assert scalars(run_dir)["charts/SPS"][-1].step == total
        if algo == "ppo":
            for name in ("observation_statistics", "return_statistics"):
                assert state["agent"][f"{name}.count"] == total, f"{name} are those of one process"
    assert_tensorboard_agrees_with_monitor(run_dir)


def test_updates_of_two_processes_on_half_the_data_are_those_of_one_on_all():
    Path("two_processes.py").write_text(TWO_PROCESSES)
    torchrun("two_processes.py", ROOT / "algos")
    assert Path("checked by 0").exists() and Path("checked by 1").exists()


@pytest.mark.slow
def test_compile_changes_no_result(algo):
    """Random draws within a compiled gradient, dropout for instance, would be others."""
    torch._dynamo.reset()  # its limit on compilations is per process
    total = 480 if algo == "sac" else 256  # an episode in each environment
    eager, compiled = (train(algo, f"--total-timesteps {total} {flag}") for flag in ("", "--compile"))
    np.testing.assert_allclose(episodes(eager)[:, :2], episodes(compiled)[:, :2], rtol=1e-4)
    assert len(episodes(eager)) > 1
    a, b = tensors(eager), tensors(compiled)
    for name in a.keys() & b.keys():
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
