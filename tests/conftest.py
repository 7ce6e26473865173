"""Small environments whose values are known in closed form."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class OneState(gym.Env):
    """One state, reward 1 for ever: with γ = 0.99 its value is 100. `action` is Discrete or Box."""

    def __init__(self, action: str = "discrete", observation: str = "box"):
        spaces = {"box": Box(-1, 1, (1,)), "discrete": Discrete(3, start=2), "dict": Dict(a=Discrete(2))}
        spaces |= {name: Box(0, 255, (1, n, n), np.uint8) for name, n in (("image", 36), ("small image", 35))}
        self.observation_space = spaces[observation]
        unbounded = Box(-np.inf, np.inf, (1,))
        actions = {"discrete": Discrete(2), "box": Box(-1, 1, (1,)), "multi": MultiDiscrete([2, 2]), "any": unbounded}
        self.action_space = actions[action]

    def observe(self):
        space = self.observation_space
        if not isinstance(space, Box):
            return 3
        return np.full(space.shape, 255 if space.dtype == np.uint8 else 0, space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        return self.observe(), 1.0, False, False, {}


class OneStateTerminal(OneState):
    """The same, but each tenth step is terminal."""

    def reset(self, **kwargs):
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.steps == 10, truncated, info


class Faulty(OneState):
    """Goes wrong at its 300th step: a reward or an observation that is not finite."""

    def __init__(self, fault: str, action: str = "discrete", observation: str = "box"):
        super().__init__(action, observation)
        self.fault, self.steps = fault, 0

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(action)
        bad = self.steps >= 300
        return (
            obs + np.nan if bad and self.fault == "obs" else obs,
            np.inf if bad and self.fault == "reward" else reward,
            *rest,
        )


class Catch(gym.Env):
    """A ball falls from the top of 84 × 84 pixels, the paddle at the bottom catches it for a reward of 1, or misses it.

    7 × 7 squares of 12 pixels; observations are the newest 4 images (4, 84, 84), zeros before the first. Actions are
    left, stay and right. An episode is one ball: 6 steps.
    """

    observation_space, action_space = Box(0, 255, (4, 84, 84), np.uint8), Discrete(3)

    def look(self):
        image = np.zeros((84, 84), np.uint8)
        for row, column, shade in ((self.row, self.ball, 255), (6, self.paddle, 128)):
            image[12 * row : 12 * row + 12, 12 * column : 12 * column + 12] = shade
        self.stack = np.concatenate([self.stack[1:], image[None]])
        return self.stack

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, *(int(x) for x in self.np_random.integers(7, size=2))
        self.stack = np.zeros((4, 84, 84), np.uint8)
        return self.look(), {}

    def step(self, action):
        self.row, self.paddle = self.row + 1, int(np.clip(self.paddle + action - 1, 0, 6))
        landed = self.row == 6
        return self.look(), float(landed and self.ball == self.paddle), landed, False, {}


class Counting(gym.Env):
    """Observes (steps so far, 0), reward 1, truncated after 20 steps; `fault` is what is unusual about it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, fault: str = "", action_space=None, render_mode=None):
        self.fault, self.action_space, self.render_mode = fault, action_space or Box(-1, 1, (1,)), render_mode
        self.observation_space, self.buffer = Box(-5000, 5000, (2,), np.float32), np.zeros(2, np.float32)

    def observe(self):
        obs = self.buffer if self.fault == "one array" else np.zeros(2, np.float32)
        obs[0] = self.t
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t += 1
        length = {"never ends": np.inf, "is long": 1500}.get(self.fault, 20)
        return self.observe(), 1.0, False, self.t >= length, {}

    def render(self):
        return np.full((8, 8, 3), self.t % 256, np.uint8)


class Needy(Counting):
    """Cannot be made without an argument."""

    def __init__(self, goal):
        super().__init__(goal)


gym.register("Counting-v0", Counting)
gym.register("Needy-v0", Needy)
gym.register("my/Point-v0", Counting)
for name, fault in (("OneArray", "one array"), ("NeverEnds", "never ends"), ("Long", "is long")):
    gym.register(f"{name}-v0", Counting, kwargs={"fault": fault})
for name, space in (
    ("Int8", Box(-100, 100, (1,), np.int8)),  # a range that its own type cannot hold
    ("Int64", Box(0, 5, (1,), np.int64)),
    ("Float64", Box(-3, 5, (1,), np.float64)),
    ("Huge", Box(-3e38, 3e38, (1,), np.float32)),
    ("HalfBounded", Box(0, np.inf, (1,), np.float32)),
):
    gym.register(f"{name}-v0", Counting, kwargs={"action_space": space})


gym.register("Catch-v0", Catch)
gym.register("OneState-v0", OneState, max_episode_steps=10)
gym.register("OneStateTerminal-v0", OneStateTerminal)
gym.register("OneStateSmallImage-v0", OneState, max_episode_steps=10, kwargs={"observation": "small image"})
gym.register("OneStateImage-v0", OneState, max_episode_steps=10, kwargs={"observation": "image"})
gym.register("OneStateTerminalImage-v0", OneStateTerminal, kwargs={"observation": "image"})
gym.register("OneStateImageBox-v0", OneState, max_episode_steps=10, kwargs={"observation": "image", "action": "box"})
gym.register("BadRewardImage-v0", Faulty, max_episode_steps=10, kwargs={"fault": "reward", "observation": "image"})
gym.register("OneStateTerminalBox-v0", OneStateTerminal, kwargs={"action": "box"})
gym.register("OneStateBox-v0", OneState, max_episode_steps=10, kwargs={"action": "box"})
gym.register("OneStateDiscrete-v0", OneState, max_episode_steps=10, kwargs={"observation": "discrete"})
gym.register(
    "OneStateDiscreteBox-v0", OneState, max_episode_steps=10, kwargs={"observation": "discrete", "action": "box"}
)
gym.register("OneStateDict-v0", OneState, max_episode_steps=10, kwargs={"observation": "dict"})
gym.register("OneStateMulti-v0", OneState, max_episode_steps=10, kwargs={"action": "multi"})
gym.register("OneStateUnbounded-v0", OneState, max_episode_steps=10, kwargs={"action": "any"})
for name, fault in (("BadReward", "reward"), ("BadObservation", "obs")):
    gym.register(f"{name}-v0", Faulty, max_episode_steps=10, kwargs={"fault": fault})
    gym.register(f"{name}Box-v0", Faulty, max_episode_steps=10, kwargs={"fault": fault, "action": "box"})


def pytest_collection_modifyitems(items):
    """Tests of one script's command line share its finished run: one process has them all (pytest -n 2)."""
    for item in items:
        algo = getattr(item, "callspec", None) and item.callspec.params.get("algo")
        if isinstance(algo, str):
            item.add_marker(pytest.mark.xdist_group(algo))


@pytest.fixture(autouse=True)
def _in_tmp_dir(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that runs/ never lands in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def highest_precision_afterwards():
    """Of float32 products: PyTorch's setting is of the whole process."""
    yield
    torch.set_float32_matmul_precision("highest")
