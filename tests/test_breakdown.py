"""benchmarks/breakdown.py: a part's time is counted where it is spent, once, and outside of what is compiled."""

import time

import breakdown
import pandas as pd
import pytest
import report
import torch
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


@pytest.mark.parametrize("algo", SMALL)
def test_every_part_is_seen_and_they_add_up(monkeypatch, algo):
    monkeypatch.setitem(WORKS, "small", Work(algo, SMALL[algo], warmup_steps=40, steps=60))
    if algo in OFF_POLICY | {"a2c"}:
        monkeypatch.setattr(f"{algo}.LOG_EVERY", 10)
    row = breakdown.measured("small", "eager")
    parts = [*breakdown.PARTS, "the rest"]
    assert sum(row[part] for part in parts) == pytest.approx(row["whole"], abs=1)
    used = {"environment", "gradient", "optimiser"}
    used |= {"replay buffer", "target networks"} if algo in OFF_POLICY else set()
    assert {part for part in breakdown.PARTS if row[part] > 0} == used
    assert 0 < row["environment alone"] and row["the rest"] > 0


@pytest.mark.parametrize(
    "function, part", [("step_envs", "environment"), ("td3_actor_gradient", "gradient"), ("vector_step", "optimiser")]
)
def test_a_slow_function_is_found_in_its_part(monkeypatch, function, part):
    """Every call waits 5 ms; TD3's policy is updated with every second step, its critics with each."""
    import td3

    monkeypatch.setitem(WORKS, "small", Work("td3", PENDULUM, warmup_steps=40, steps=60))
    monkeypatch.setattr("td3.LOG_EVERY", 10)
    quick = getattr(td3, function)
    monkeypatch.setattr(td3, function, lambda *args: time.sleep(0.005) or quick(*args))
    row = breakdown.measured("small", "eager")
    waited = 5000 * {"step_envs": 1, "td3_actor_gradient": 0.5, "vector_step": 1.5}[function]
    assert waited < row[part] < 2 * waited and row["whole"] - row[part] < waited


def test_the_clock_stands_outside_of_what_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: compiled.append(function) or function)
    monkeypatch.setitem(WORKS, "small", Work("td3", PENDULUM, warmup_steps=40, steps=60))
    monkeypatch.setattr("td3.LOG_EVERY", 10)
    assert breakdown.measured("small", "compile")["gradient"] > 0
    assert [x.__name__ for x in compiled] == ["td3_critic_gradient", "td3_actor_gradient"]
    assert not any(hasattr(x, "part") for x in compiled)


def test_the_section_of_the_page(tmp_path):
    (tmp_path / "results").mkdir()
    values = {"whole": 1000.0, **dict.fromkeys(breakdown.PARTS, 100.0), "the rest": 500.0, "environment alone": 20.0}
    cells = [("sac HalfCheetah", "compile"), ("ppo CartPole", "eager")]
    rows = [dict(zip(breakdown.KEY, cell)) | values | breakdown.evidence(cell) for cell in cells]
    rows[0]["target networks"] = 0.0
    pd.DataFrame(rows).to_csv(tmp_path / "results" / "breakdown.csv", index=False)
    section = report.breakdown(tmp_path / "results")
    first = section.index("| ppo CartPole | eager | 1000 | 10% | 10% | 10% | 10% | 10% | 50% | 100 | 20 |")
    assert first < section.index("| sac HalfCheetah | compile | 1000 | 10% | 10% | 10% | 10% | — | 50% | 100 | 20 |")
    assert "†" not in section
    assert (tmp_path / "plots" / "breakdown.png").stat().st_size > 10_000
    pd.DataFrame(rows).assign(code_sha256="older").to_csv(tmp_path / "results" / "breakdown.csv", index=False)
    assert "ppo CartPole | eager † |" in report.breakdown(tmp_path / "results")
    assert report.breakdown(tmp_path) == ""
