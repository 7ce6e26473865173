"""benchmarks/breakdown.py: a part's time is counted where it is spent, once, and outside of what is compiled."""

import functools
import importlib
import time

import breakdown
import pandas as pd
import pytest
import report
import td3
import torch
from estimates import save
from throughput import WORKS, Work

PENDULUM = "--env-id Pendulum-v1 --hidden-sizes 8 --batch-size 8 --learning-starts 20"
SMALL = {
    "ppo": "--env-id CartPole-v1 --num-envs 1 --num-steps 16 --num-minibatches 1",
    "a2c": "--env-id CartPole-v1 --num-envs 1 --num-steps 5",
    "trpo": "--env-id CartPole-v1 --num-envs 1 --num-steps 16",
    "dqn": PENDULUM.replace("Pendulum", "CartPole") + " --train-frequency 1 --target-frequency 9",
    **{algo: PENDULUM for algo in ("ddpg", "td3", "sac")},
}
OFF_POLICY = {"dqn", "ddpg", "td3", "sac"}


OPTIMISER = {"Adam.step", "RMSprop.step", "Optimizer.zero_grad"}
LEAN = {"LeanAdam.step", "LeanAdam.zero_grad", "RMSprop.step", "Optimizer.zero_grad"}
REPLAY = {"Envs.step", *LEAN, "ReplayBuffer.add", "ReplayBuffer.draw_rows", "ReplayBuffer.get", "polyak_update"}
CLOCKED = {
    "ppo": {"Envs.step", *LEAN, "ppo_gradient"},
    "a2c": {"Envs.step", *OPTIMISER, "a2c_gradient"},
    "trpo": {"Envs.step", *LEAN, "trust_region_step", "line_search", "critic_gradient"},
    "dqn": REPLAY | {"dqn_gradient"},
    **{x: REPLAY | {f"{x}_critic_gradient", f"{x}_actor_gradient"} for x in ("ddpg", "td3", "sac")},
    "ppo_atari": {"PixelEnvs.step", *OPTIMISER, "pixel_ppo_gradient"},
}


def test_every_work_is_known_here():
    assert {WORKS[name].algo for name, _ in breakdown.cells()} == {*CLOCKED}


@pytest.mark.parametrize("algo", CLOCKED)
def test_what_has_a_clock(algo):
    script = importlib.import_module(algo)
    owners = {"": script} | {
        f"{x.__name__}.": x for x in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Optimizer)
    }
    for name in ("Envs", "PixelEnvs", "ReplayBuffer", "LeanAdam"):
        owners |= {f"{name}.": getattr(script, name)} if hasattr(script, name) else {}
    with breakdown.clocks(script):
        clocked = {prefix + x for prefix, owner in owners.items() for x, y in vars(owner).items() if hasattr(y, "part")}
    assert clocked - ({"Envs.step"} if "PixelEnvs.step" in CLOCKED[algo] else set()) == CLOCKED[algo]
    assert not any(hasattr(x, "part") for owner in owners.values() for x in vars(owner).values())


@pytest.mark.parametrize("algo", SMALL)
def test_every_part_is_seen(monkeypatch, algo):
    monkeypatch.setitem(WORKS, "small", Work(algo, SMALL[algo], warmup_steps=40, steps=60))
    if algo in OFF_POLICY | {"a2c"}:
        monkeypatch.setattr(f"{algo}.LOG_EVERY", 10)
    row = breakdown.measured("small", "eager")
    used = {"environment", "gradient", "optimiser"}
    used |= {"replay buffer", "target networks"} if algo in OFF_POLICY else set()
    assert {part for part in breakdown.PARTS if row[part] > 0} == used
    assert 0 < row["environment alone"] and 0 < row["the rest"] < row["whole"]


def test_a_function_within_another_is_refused(monkeypatch):
    """Its time would count twice."""
    monkeypatch.setitem(breakdown.PARTS, "gradient", (*breakdown.PARTS["gradient"], "ppo_loss"))
    monkeypatch.setitem(WORKS, "small", Work("ppo", SMALL["ppo"], warmup_steps=40, steps=60))
    with pytest.raises(AssertionError, match="ppo_loss within"):
        breakdown.measured("small", "eager")


@pytest.mark.parametrize(
    "function, part",
    [("Envs.step", "environment"), ("td3_actor_gradient", "gradient"), ("LeanAdam.step", "optimiser")],
)
def test_a_slow_function_is_found_in_its_part(monkeypatch, function, part):
    """Every call waits 20 ms; TD3's policy is updated with every second step, its critics with each."""
    monkeypatch.setitem(WORKS, "small", Work("td3", PENDULUM, warmup_steps=40, steps=60))
    monkeypatch.setattr("td3.LOG_EVERY", 10)
    *owner, name = function.split(".")
    owner = functools.reduce(getattr, owner, td3)
    quick = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: time.sleep(0.02) or quick(*args))
    row = breakdown.measured("small", "eager")
    waited = 20_000 * {"Envs.step": 1, "td3_actor_gradient": 0.5, "LeanAdam.step": 1.5}[function]
    assert waited < row[part] and row["whole"] - row[part] < waited
    assert (row["environment alone"] > waited) == (function == "Envs.step")


def test_alone_is_a_step_of_one_of_the_environments(monkeypatch):
    monkeypatch.setattr(breakdown, "perf_counter", lambda: next(clock))
    clock = iter(range(100))  # a second a look: one before, one a step, one at the end
    args = td3.parse_args([*PENDULUM.split(), "--num-envs", "4"])
    assert breakdown.seconds_alone(td3, args) == pytest.approx(3 / (1 * 4))


def test_the_clock_stands_outside_of_what_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setitem(WORKS, "small", Work("td3", PENDULUM, warmup_steps=40, steps=60))
    monkeypatch.setattr("td3.LOG_EVERY", 10)
    assert breakdown.measured("small", "compile")["gradient"] > 0
    assert [x.__name__ for x in compiled] == ["td3_critic_gradient", "td3_actor_gradient"]
    assert not any(hasattr(x, "part") for x in compiled)


def test_the_section_of_the_page(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    values = {"whole": 1000.0, **dict.fromkeys(breakdown.PARTS, 100.0), "the rest": 500.0, "environment alone": 20.0}
    cells = [("sac HalfCheetah", "compile"), ("ppo CartPole", "eager")]
    rows = [dict(zip(breakdown.KEY, cell)) | values | breakdown.evidence(cell) for cell in cells]
    rows[0] |= {"target networks": 0.0, "whole": 2000.0}
    gone = dict(zip(breakdown.KEY, ("no such work", "eager"))) | values | dict(flags="-", code_sha256="-")
    machines = ["new one", "old one", "none"]
    rows = pd.DataFrame([*rows, gone]).assign(machine=machines)
    rows.to_csv(tmp_path / "results" / "breakdown.csv", index=False)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    section = report.breakdown(tmp_path / "results")
    first = section.index("| ppo CartPole | eager | 1000 | 10% | 10% | 10% | 10% | 10% | 50% | 100 | 20 |")
    assert first < section.index("| sac HalfCheetah | compile | 2000 | 5% | 5% | 5% | 5% | — | 25% | 100 | 20 |")
    assert "†" not in section and "no such work" not in section and "Machine: old one and new one.\n" in section
    (ax,) = figures[0].axes
    bars = [x.get_text() for x in ax.get_yticklabels()]
    assert bars == ["sac HalfCheetah, compile", "ppo CartPole, eager"]  # from below
    assert [x.get_text() for x in ax.texts] == ["2,000 µs", "1,000 µs"]
    assert (tmp_path / "plots" / "breakdown.png").stat().st_size > 10_000
    for changed in (dict(code_sha256="older"), dict(flags="others")):
        rows.assign(**changed).to_csv(tmp_path / "results" / "breakdown.csv", index=False)
        assert "ppo CartPole | eager † |" in report.breakdown(tmp_path / "results")
    assert report.breakdown(tmp_path) == ""
