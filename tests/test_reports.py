"""Faults that people report of such code, each with the input that showed it; those of experts are in test_bc.py."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import pytest
import torch
from gymnasium.spaces import Box

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TINY = {
    "ppo": "--num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 64 --hidden-sizes 8 --eval-episodes 2",
    "sac": "--learning-starts 20 --batch-size 8 --total-timesteps 40 --hidden-sizes 8 --eval-episodes 2"
    " --buffer-size 1000",
}
TINY |= {"td3": TINY["sac"], "ddpg": TINY["sac"]}
CONTINUOUS = ("ppo", "sac", "td3", "ddpg")


def train(algo: str, flags: str) -> dict:
    """In this process."""
    module = importlib.import_module(algo)
    return module.train(module.parse_args(f"{TINY[algo]} {flags}".split()))


def start(algo: str, flags: str, **kwargs) -> subprocess.Popen:
    """In a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), *TINY[algo].split(), *flags.split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | kwargs
    return subprocess.Popen(command, env=env, **pipes)


def start_long(algo: str, flags: str = "") -> tuple[subprocess.Popen, Path]:
    """A run of hours, once it has written a checkpoint → process, run directory."""
    process = start(algo, f"--total-timesteps 10_000_000 --checkpoint-every 100 {flags}")
    deadline = time.time() + 60
    while time.time() < deadline:
        found = list(Path("runs").glob("*/monitor.csv"))
        if found and len(found[0].read_text().splitlines()) > 20:
            return process, found[0].parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{algo} has not begun")


def messages(text: str) -> list[str]:
    """Lines without progress bars."""
    lines = re.split("[\r\n]+", text.replace("\x1b[A", ""))
    return [x for x in lines if x.strip() and not re.match(r".*\d+(%\|.*\||step ).*\]\s*$", x)]


def assert_refuses(capsys, algo: str, flags: str, *words: str, code: int = 2) -> None:
    """With one line on stderr that has the words in it, and that exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train(algo, flags)
    lines = messages(capsys.readouterr().err)
    assert exit_.value.code == code and len(lines) == 1, lines
    assert lines[0].startswith(f"{algo}.py: ") and all(word in lines[0] for word in words), lines


def settings_of_the_process() -> tuple:
    """What train() may change for as long as it runs."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    precision = torch.get_float32_matmul_precision()
    return handlers, torch.get_num_threads(), precision, torch._dynamo.config.trace_autograd_ops


# Environments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", [x for x in ALGOS if hasattr(importlib.import_module(x), "Envs")])
def test_1_an_environment_that_reuses_its_observation_array(algo):
    module = importlib.import_module(algo)
    envs = module.Envs(module.Args(env_id="OneArray-v0"), 1)
    envs.reset(0)
    for _ in range(20):
        obs, reached, rewards, terminated, truncated = envs.step(torch.zeros(1, 1))
    assert (obs.tolist(), reached.tolist(), envs.episodes) == ([[0, 0]], [[20, 0]], [(0, 20.0, 20)])
    assert truncated.all() and not terminated.any() and rewards == 1


@pytest.mark.parametrize("algo", CONTINUOUS)
@pytest.mark.parametrize("env_id", ["Int8-v0", "Int64-v0"])
def test_2_actions_that_are_whole_numbers_in_a_box(algo, env_id, capsys):
    assert_refuses(capsys, algo, f"--env-id {env_id}", env_id, "vector of floats")
    assert not Path("runs").exists()


@pytest.mark.parametrize("algo", CONTINUOUS)
def test_2_actions_that_are_no_float32_are_of_the_spaces_type_and_reach_its_whole_range(algo):
    """The environment refuses others; the exported policy gives them, too."""
    run_dir = train(algo, "--env-id Float64-v0")["run_dir"]
    space = gym.make("Float64-v0").action_space
    action = torch.export.load(run_dir / "policy.pt2").module()(torch.zeros(1, 2)).detach().numpy()[0]
    assert space.contains(action)
    module, settings = importlib.import_module(algo), [2] if algo in ("sac", "td3") else []
    networks = {"ppo": "ActorCritic", "sac": "SoftActorCritics", "td3": "DeterministicActorCritics"}
    agent = getattr(module, networks.get(algo, "DeterministicActorCritic"))(Box(-1, 1, (2,)), space, (4,), *settings)
    reached = agent.to_env(torch.linspace(-1, 1, 2001).unsqueeze(-1) * (200 if algo == "ppo" else 1)).numpy()
    assert reached.dtype == space.dtype and (reached.min(), reached.max()) == (space.low[0], space.high[0])


@pytest.mark.parametrize("algo", ["sac", "td3", "ddpg"])
@pytest.mark.parametrize("env_id", ["Huge-v0", "HalfBounded-v0"])
def test_3_bounds_too_wide_to_be_scaled_to(algo, env_id, capsys):
    assert_refuses(capsys, algo, f"--env-id {env_id}", env_id, "ppo.py")
    assert not Path("runs").exists()


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_13_an_environment_that_never_ends(algo, capsys):
    flags = "--total-timesteps 64" if algo == "ppo" else ""
    assert train(algo, f"--env-id NeverEnds-v0 {flags}")["returns"].tolist() == [1000, 1000]
    assert "cuts episodes after 1000 steps" in capsys.readouterr().out


def test_13_one_that_ended_in_training_is_cut_after_ten_times_its_longest_episode(capsys):
    """It ends by itself after 20 steps: nothing is cut, but the run says that it would."""
    assert train("ppo", "--env-id Counting-v0")["returns"].tolist() == [20, 20]
    assert "cuts episodes after 200 steps" in capsys.readouterr().out


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_18_an_environment_that_needs_arguments(algo, capsys):
    assert_refuses(capsys, algo, "--env-id Needy-v0", "Needy-v0", "goal", "kwargs", "gym.register")


HINTS = [
    ("ppo", "ALE/Pong-v5", ["ppo_atari.py", "dqn_atari.py"]),
    ("sac", "OneStateImageBox-v0", ["images", "ppo_atari.py", "dqn_atari.py"]),
    ("ppo", "OneStateMulti-v0", ["MultiDiscrete", "Discrete"]),
    ("sac", "CartPole-v1", ["Discrete(2)", "dqn.py"]),
]


@pytest.mark.parametrize("algo, env_id, words", HINTS, ids=[hint[1] for hint in HINTS])
def test_20_hints_that_fit_the_space(algo, env_id, words, capsys):
    assert_refuses(capsys, algo, f"--env-id {env_id}", *words)


# Flags ------------------------------------------------------------------------------------------------------


RANGES = [
    ("ppo", "--gamma 2"), ("ppo", "--gamma nan"), ("ppo", "--gae-lambda -0.1"), ("ppo", "--clip-coef -1"),
    ("ppo", "--learning-rate -1"), ("ppo", "--learning-rate inf"), ("ppo", "--max-grad-norm 0"),
    ("ppo", "--target-kl 0"), ("ppo", "--hidden-sizes 8 0"), ("ppo", "--num-envs 0"), ("ppo", "--seed -1"),
    ("sac", "--tau 3"), ("sac", "--gamma -1"), ("sac", "--learning-rate 0"), ("sac", "--alpha 0"),
    ("sac", "--batch-size 0"), ("td3", "--tau 1.5"), ("ddpg", "--gamma 1.01"),
]  # fmt: skip


@pytest.mark.parametrize("algo, flag", RANGES, ids=[" ".join(x) for x in RANGES])
def test_8_values_out_of_range(algo, flag, capsys):
    assert_refuses(capsys, algo, flag, flag.split()[0], "must be")
    assert not Path("runs").exists()


@pytest.mark.parametrize("algo", ALGOS)
def test_8_every_rate_and_share_has_a_range(algo):
    """And every number of something: by the fields' names."""
    module = importlib.import_module(algo)
    source = (ROOT / "algos" / f"{algo}.py").read_text()
    fields = dict(re.findall(r"^    (\w+): ([^=\n]+) = ", source.split("class Args:")[1].split("\n\n\n")[0], re.M))
    assert fields.keys() == module.Args.__dataclass_fields__.keys()
    bare = {"log_std_init", "target_entropy", "rollout_lengths"}  # the last is looked at as a whole
    numbers = [name for name, kind in fields.items() if re.search(r"(?<!Annotated\[)\b(int|float)\b", kind)]
    loose = [name for name in numbers if name not in bare]
    assert not loose, f"{algo}.py: give {loose} a type with a range, such as Count, Fraction or Positive"
    expected = {"gamma": "Fraction", "gae_lambda": "Fraction", "tau": "Fraction", "learning_rate": "Positive"}
    expected |= {"learning_rate": "Fraction"} if algo == "q_learning" else {}  # a table's: more overshoots
    below_one = 'Annotated[float, (0, 1 - 1e-9, "at least 0 and below 1")]'  # they divide by 1 − γ
    expected |= {"gamma": below_one} if algo in ("rmax", "fqi") else {}
    assert {name: fields[name] for name in expected if name in fields}.items() <= expected.items()


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_9_output_dir_is_a_link_to_nowhere_or_begins_with_a_tilde(algo, capsys, monkeypatch):
    os.symlink("nowhere/at/all", "link")
    assert_refuses(capsys, algo, "--output-dir link", "--output-dir", "link")
    monkeypatch.setenv("HOME", os.getcwd())
    assert train(algo, "--output-dir=~/mine")["run_dir"].parent == Path.cwd() / "mine"


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_11_a_module_before_the_environments_name_and_no_sysconf(algo, monkeypatch):
    """Windows takes no colon in a folder's name, and has no os.sysconf, os.lockf and SIGHUP."""
    for owner, name in ((os, "sysconf"), (os, "lockf"), (os, "F_TLOCK"), (signal, "SIGHUP")):
        monkeypatch.delattr(owner, name)
    run_dir = train(algo, "--env-id conftest:my/Point-v0")["run_dir"]
    assert re.fullmatch(rf"conftest-my-Point-v0__{algo}__1__\d+(_\d+)?", run_dir.name)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_12_a_console_that_knows_few_characters(encoding):
    for flags, words in (("--help", "discount"), ("", "run directory: ")):
        process = start("ppo", flags, env={"PYTHONIOENCODING": encoding}, text=False)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert words in out.decode(encoding)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_16_compilation_without_a_compiler(algo, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    assert_refuses(capsys, algo, "--compile", "--compile", "C++ compiler", "CXX")


@pytest.mark.parametrize("algo", ["sac", "td3", "ddpg", "dqn"])
@pytest.mark.parametrize("steps", [40, 41])
def test_22_a_run_that_would_never_learn(algo, steps, capsys):
    with patch.dict(TINY, {"dqn": TINY["sac"]}):
        assert_refuses(capsys, algo, f"--total-timesteps 40 --learning-starts {steps}", "--learning-starts")


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_7_videos_of_before_a_resume_stay(algo):
    run_dir = train(algo, "--env-id Counting-v0 --capture-video")["run_dir"]
    before = {path: path.read_bytes() for path in run_dir.glob("videos/*.mp4")}
    module = importlib.import_module(algo)
    module.train(module.parse_args(["--resume", str(run_dir), "--total-timesteps", "200"]))
    after = {path: path.read_bytes() for path in run_dir.glob("videos/*.mp4")}
    assert before and before.items() < after.items()


def test_23_the_video_of_a_very_long_episode_is_bounded():
    """Its frames are kept in memory until it ends."""
    ppo, frames = importlib.import_module("ppo"), []
    args = ppo.Args(env_id="Long-v0", capture_video=True)
    envs = ppo.Envs(args, 2)
    envs.film(Path("videos"), "x")
    envs.reset(0)
    for _ in range(1200):
        envs.step(torch.zeros(2, 1))
        frames.append(len(envs.envs[0].recorded_frames))
    envs.close()
    assert max(frames) in (1000, 1001) and frames[-1] == 0 and len(list(Path("videos").glob("*.mp4"))) == 1


@pytest.mark.parametrize("algo", ["ppo", "sac"])
@pytest.mark.parametrize("how", ["returns", "refuses", "fails"])
def test_10_train_leaves_nothing_behind(algo, how, capsys):
    """However it ends: signal handlers, threads, precision and the compiler's settings are as before, files closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, files = settings_of_the_process(), set(os.listdir("/proc/self/fd"))
    module = importlib.import_module(algo)
    error = {"fails": ZeroDivisionError, "refuses": SystemExit}.get(how)

    def broken(*_, **__):
        raise ZeroDivisionError

    flags = "--torch-threads 2" + (" --matmul-precision medium" if algo == "sac" else "")
    if how == "returns":
        train(algo, flags)
    else:
        with pytest.raises(error), patch.object(module.Run, "log", broken if how == "fails" else module.Run.log):
            train(algo, f"{flags} {'--env-id BadRewardBox-v0 --total-timesteps 2000' if how == 'refuses' else ''}")
    assert settings_of_the_process() == before
    assert not [
        fd for fd in set(os.listdir("/proc/self/fd")) - files if "runs" in os.path.realpath(f"/proc/self/fd/{fd}")
    ]
    assert not [
        thread
        for thread in threading.enumerate()
        if "EventFile" in type(thread).__name__ or "_AsyncWriter" in thread.name
    ]


def test_10_train_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(train("ppo", "")))
    thread.start()
    thread.join(60)
    assert results and len(results[0]["returns"]) == 2


def test_17_a_full_disk(capsys, monkeypatch):
    """A checkpoint that cannot be written leaves the one before, and nothing else."""
    save = torch.save

    def full(state, path):
        if state["step"]:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("basic_ios::clear: iostream error")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    assert_refuses(capsys, "ppo", "--checkpoint-every 32", "disk", "step 0 stays", code=1)
    (run_dir,) = Path("runs").iterdir()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 0
    assert not list(run_dir.glob("*.tmp"))


def test_17_a_full_disk_while_an_episode_is_written(capsys, monkeypatch):
    ppo = importlib.import_module("ppo")

    def full(run, envs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ppo.Run, "advance", full)
    assert_refuses(capsys, "ppo", "", "is the disk full", "step 0 stays", code=1)


def test_17_a_disk_that_is_really_full():
    Path("small").mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=330k", "none", "small"]).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        process = start(
            "ppo", "--output-dir small --total-timesteps 100_000 --checkpoint-every 32 --hidden-sizes 64 64"
        )
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1 and len(messages(err)) == 1 and "disk" in err, err
        (run_dir,) = Path("small").iterdir()
        assert not list(run_dir.glob("*.tmp"))
        torch.load(run_dir / "checkpoint.pt", weights_only=True)
    finally:
        subprocess.run(["umount", "small"], check=True)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_19_two_processes_cannot_resume_one_directory(algo):
    process, run_dir = start_long(algo, "--env-id conftest:Counting-v0")
    try:
        second = start(algo, "")
        second.kill()
        command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--resume", str(run_dir)]
        env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and len(messages(done.stderr)) == 1, done.stderr
        assert f"--resume {run_dir}: another process is at it" in done.stderr
    finally:
        process.kill()
        process.communicate()


def test_21_a_closed_terminal():
    """kill -HUP is as SIGTERM."""
    process, run_dir = start_long("ppo", "--env-id conftest:Counting-v0")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"--resume {run_dir}" in messages(err)[-1]
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] > 200


def test_21_nobody_reads_what_is_printed():
    process = start("ppo", "")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(100) == 0 and messages(err) == [], err
