"""The replay buffer, which is the same source in every off-policy script."""

import io
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import sac
import torch
from gymnasium.spaces import Box, Discrete

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def stream(steps, num_envs, observation_space, action_space, seed=0):
    """Random steps of N environments, as a loop would add them: (N, …) arrays in the order of Transitions."""
    rng = np.random.default_rng(seed)

    def draw(space):
        if isinstance(space, Discrete):
            return rng.integers(space.n, size=num_envs) + space.start
        return (rng.uniform(0, 255, (num_envs, *space.shape))).astype(space.dtype)

    for _ in range(steps):
        yield (
            draw(observation_space),
            draw(action_space),
            rng.normal(size=num_envs),
            draw(observation_space),
            rng.random(num_envs) < 0.15,
            rng.random(num_envs) < 0.15,
        )


SPACES = {
    "box": (Box(-1, 1, (3,)), Box(-1, 1, (2,))),
    "float64": (Box(-1, 1, (3,), np.float64), Discrete(4)),
    "uint8": (Box(0, 255, (5,), np.uint8), Discrete(4)),
    "discrete": (Discrete(7, start=2), Discrete(3)),
}


def test_takes_steps_on_another_device_than_the_cpu_too():
    """Of the device meta, which is everywhere: its tensors have shapes and no numbers."""
    buffer = sac.ReplayBuffer(10, 2, *SPACES["box"], torch.device("meta"))
    for step in stream(7, 2, *SPACES["box"]):
        buffer.add(*step)
    assert (buffer.position, buffer.size) == (4, 10)


def test_a_field_that_is_not_given_is_an_error():
    (step,) = stream(1, 1, *SPACES["box"])
    with pytest.raises(ValueError, match="shorter"):
        sac.ReplayBuffer(10, 1, *SPACES["box"], CPU).add(*step[:-1])


@pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("num_envs, capacity, steps", [(1, 10, 4), (1, 10, 25), (3, 10, 2), (3, 10, 8), (4, 12, 3)])
def test_holds_the_newest_transitions(spaces, num_envs, capacity, steps):
    buffer = sac.ReplayBuffer(capacity, num_envs, *spaces, CPU)
    expected = deque(maxlen=capacity // num_envs * num_envs)
    for step in stream(steps, num_envs, *spaces):
        buffer.add(*step)
        expected.extend(zip(*step))
        assert buffer.size == len(expected)
    oldest_first = torch.arange(buffer.size)
    if buffer.size == buffer.capacity:
        oldest_first = (oldest_first + buffer.position) % buffer.capacity
    for ours, theirs in zip(buffer.get(oldest_first), zip(*expected)):
        np.testing.assert_array_equal(ours.numpy(), np.array(theirs).astype(ours.numpy().dtype))


def test_keeps_uint8_and_stores_other_numbers_as_float32():
    dtypes = {name: sac.ReplayBuffer(4, 1, *spaces, CPU).data.observations.dtype for name, spaces in SPACES.items()}
    assert dtypes == {
        "box": torch.float32,
        "float64": torch.float32,
        "uint8": torch.uint8,
        "discrete": torch.int64,
    }


def test_draws_all_rows_alike_and_none_that_is_empty():
    torch.manual_seed(0)
    buffer = sac.ReplayBuffer(100, 1, *SPACES["box"], CPU)
    for step in stream(10, 1, *SPACES["box"]):
        buffer.add(*step)
    counts = buffer.draw_rows(100_000).bincount(minlength=100)
    assert (counts[10:] == 0).all()
    assert ((counts[:10] - 10_000).abs() < 5 * (100_000 * 0.1 * 0.9) ** 0.5).all()


@pytest.mark.parametrize("steps", [0, 3, 7, 20])
def test_state_dict_restores_every_bit_and_what_comes_next(steps):
    spaces = SPACES["uint8"]
    one, other = (sac.ReplayBuffer(14, 2, *spaces, CPU) for _ in range(2))
    data = list(stream(steps + 5, 2, *spaces))
    for step in data[:steps]:
        one.add(*step)
    state = one.state_dict()
    assert len(state["rewards"]) == min(2 * steps, 14), "empty rows are in the checkpoint"
    other.load_state_dict(state)
    for step in data[steps:]:
        one.add(*step)
        other.add(*step)
    assert (one.position, one.size) == (other.position, other.size)
    for name, ours, theirs in zip(one.data._fields, one.data, other.data):
        differ = set((ours != theirs).reshape(len(ours), -1).any(1).nonzero().flatten().tolist())
        newest_then = {(2 * steps - 1 - k) % 14 for k in range(2)} if steps else set()
        assert differ <= (newest_then if name == "truncated" else set()), name


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 20])
def test_a_saved_buffers_newest_steps_end_an_episode(steps):
    """A resumed run begins new episodes: no n-step window may go on from the old ones into them."""
    spaces = SPACES["box"]
    buffer = sac.ReplayBuffer(14, 2, *spaces, CPU)
    for step in stream(steps, 2, *spaces):
        buffer.add(*step)
    before = buffer.data.truncated.clone()
    state = buffer.state_dict()
    ends = state["terminated"] | state["truncated"]
    newest = [(2 * steps - 1 - k) % 14 for k in range(2)] if steps else []
    assert ends[newest].all() and not (state["terminated"] & state["truncated"])[newest].any()
    others = [row for row in range(len(ends)) if row not in newest]
    assert torch.equal(state["truncated"][others], before[others])
    assert torch.equal(buffer.data.truncated, before), "the run in progress goes on in its episodes"


def test_state_dict_is_a_copy_of_the_rows_in_use_alone():
    buffer = sac.ReplayBuffer(100_000, 1, *SPACES["box"], CPU)
    first, second = stream(2, 1, *SPACES["box"])
    buffer.add(*first)
    state, file = buffer.state_dict(), io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 50_000, "empty rows are in the file"
    before = state["rewards"].clone()
    buffer.position = 0
    buffer.add(*second)
    assert torch.equal(state["rewards"], before)


def test_refuses_what_does_not_fit_with_both_figures(monkeypatch, capsys):
    monkeypatch.setattr(sac, "free_memory", lambda device: 4_999)
    sac.ReplayBuffer(100, 1, Box(-1, 1, (4,)), Discrete(2), CPU)  # 100 × (16 + 8 + 4 + 16 + 1 + 1) bytes
    with pytest.raises(SystemExit) as exit_:
        sac.ReplayBuffer(1000, 1, Box(-1, 1, (4,)), Discrete(2), CPU)
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "--buffer-size 1000 needs 46,000 bytes" in err and "4,999 free" in err


def test_free_memory_is_what_linux_says(monkeypatch):
    kilobytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())["MemAvailable"]
    assert sac.free_memory(CPU) == pytest.approx(1024 * int(kilobytes.split()[0]), rel=0.2)
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert sac.free_memory(CPU) > 2**30


MEMORY = """
import sys, os, torch
sys.path.insert(0, sys.argv[1])
import sac
import gymnasium as gym
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
env = gym.make("HalfCheetah-v5")
before = resident()
buffer = sac.ReplayBuffer(1_000_000, 1, env.observation_space, env.action_space, torch.device("cpu"))
for stored in buffer.data:
    stored.fill_(1)
print(resident() - before)
"""


def test_a_million_transitions_of_halfcheetah_take_under_200_megabytes():
    done = subprocess.run([sys.executable, "-c", MEMORY, ROOT / "algos"], capture_output=True, text=True, check=True)
    assert 100e6 < int(done.stdout) <= 200e6
