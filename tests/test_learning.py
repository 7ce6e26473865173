"""Whole runs: what the critic comes to say of a time limit, and whether the policy learns."""

from pathlib import Path

import numpy as np
import ppo
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ONE_STATE = ["--total-timesteps", "20000", "--learning-rate", "0.01", "--eval-episodes", "1", "--num-steps", "32"]


def train(module, *flags):
    return module.train(module.parse_args([str(flag) for flag in flags]))


def last_scalar(run_dir: Path, tag: str) -> float:
    """The last value of a TensorBoard tag."""
    events = EventAccumulator(str(run_dir), {"scalars": 0})
    events.Reload()
    return events.Scalars(tag)[-1].value


@pytest.mark.parametrize("env_id", ["OneState-v0", "OneStateBox-v0", "OneStateDiscrete-v0"])
def test_a_time_limit_is_not_a_termination(env_id):
    """Reward 1 for ever, episodes cut after 10 steps, γ = 0.99: the critic must say 100, not the 9.6 of ten steps."""
    result = train(ppo, "--env-id", env_id, *ONE_STATE)
    assert last_scalar(result["run_dir"], "losses/values") == pytest.approx(100, abs=5)
    assert result["returns"] == [10]


def test_a_termination_is_not_bootstrapped():
    """The same reward, but the tenth step is terminal: the mean over the episode of Σ γᵏ to its end is 5.34."""
    whole_episodes = ["--num-steps", "40", "--gae-lambda", "1"]
    result = train(ppo, "--env-id", "OneStateTerminal-v0", *ONE_STATE, *whole_episodes)
    truth = np.mean([(1 - 0.99**k) / 0.01 for k in range(1, 11)])
    assert last_scalar(result["run_dir"], "losses/values") == pytest.approx(truth, abs=0.5)


def test_ppo_learns_cartpole():
    result = train(ppo, "--total-timesteps", 25_000)
    assert result["returns"].mean() > 300


def test_ppo_learns_with_normalised_observations_and_rewards():
    flags = ["--normalize-observations", "--normalize-rewards", "--total-timesteps", 25_000]
    result = train(ppo, *flags)
    assert result["returns"].mean() > 300
