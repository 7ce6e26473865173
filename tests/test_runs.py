"""Every script of algos/, with a tiny run: it trains, goes on after an interruption to the same bits, and exports."""

import importlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

ALGOS = (Path(__file__).resolve().parent.parent / "algos").glob("*.py")
SCRIPTS = sorted(path.stem for path in ALGOS if "\nclass Run(" in path.read_text())
"""Those that resume."""


class Clock(gym.Env):
    """Episodes of ten steps, every one the same under the same actions, whatever the seed.

    A resumed run begins new episodes; where one had just ended, it goes on here as if it had never stopped. Half of the
    episodes or so end in a termination, the others in a truncation. Images are stacks of the last two.
    """

    def __init__(self, box: bool = False, images: bool = False):
        self.images = images
        self.action_space = Box(np.float32([-2, 0]), np.float32([1, 3])) if box else Discrete(3, start=2)
        self.observation_space = Box(0, 255, (2, 36, 36), np.uint8) if images else Box(-2, 2, (3,))

    def look(self):
        now = np.array([np.sin(self.time), np.cos(2 * self.time), np.tanh(self.level)], np.float32)
        if not self.images:
            return now
        image = np.broadcast_to(np.repeat(127 * (1 + now), 12)[:, None], (36, 36)).astype(np.uint8)
        self.stack = np.stack([self.stack[1] if self.time else image, image])
        return self.stack

    def reset(self, *, seed=None, options=None):
        self.time, self.level = 0, 0.0
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.time, self.level = self.time + 1, 0.5 * self.level + float(np.sum(action)) - 1.5 * np.size(action)
        end, good = self.time == 10, bool(np.sin(7 * self.level) > 0)
        return self.look(), float(np.tanh(self.level) + np.sin(self.time)), end and good, end and not good, {}


gym.register("Clock-v0", Clock, max_episode_steps=11)
gym.register("ClockBox-v0", Clock, max_episode_steps=11, kwargs={"box": True})
gym.register("ClockImages-v0", Clock, max_episode_steps=11, kwargs={"images": True})


class Expert(nn.Module):
    """Does something or other by the sum of what it sees, in Clock-v0."""

    def forward(self, obs):
        return 2 + (obs.sum(-1) < 0).long()


# Half of the steps is a whole number of iterations, and of episodes in each environment; buffers overflow, and
# counters (of gradient steps, of iterations) that a checkpoint has to hold are in mid-cycle there.
TOTAL = 160
COMMON = f"--total-timesteps {TOTAL} --num-envs 2 --torch-threads 1 --eval-episodes 2"
ON_POLICY = f"{COMMON} --env-id Clock-v0 --hidden-sizes 8"
REPLAY = f"{COMMON} --learning-starts 40 --buffer-size 100 --batch-size 8"
OFF_POLICY = f"{REPLAY} --env-id ClockBox-v0 --hidden-sizes 8"
ROLLOUTS = "--num-steps 20 --num-minibatches 2"
FLAGS = {
    "a2c": f"{ON_POLICY} --num-steps 10",
    "bc": f"{ON_POLICY} --expert expert.pt2 --epochs 3 --batch-size 16",
    "dagger": f"{ON_POLICY} --expert expert.pt2 --steps-per-iteration 40 --epochs 2 --batch-size 16",
    "ddpg": f"{OFF_POLICY} --train-frequency 5",
    "dqn": f"{REPLAY} --env-id Clock-v0 --hidden-sizes 8 --train-frequency 5 --target-frequency 30 --n-step 3",
    "dqn_atari": f"{REPLAY} --env-id ClockImages-v0 --train-frequency 5 --target-frequency 30 --n-step 3",
    "grpo": f"{ON_POLICY} --group-size 2 --groups 2 --num-minibatches 2 --reference-every 3 --normalize-observations",
    "kfac": f"{ON_POLICY} --num-steps 10 --inverse-every 3 --normalize-observations",
    "mbpo": f"{OFF_POLICY} --gradient-steps 1 --policy-delay 3 --ensemble-size 3 --num-elites 2 --patience 1"
    " --model-hidden-sizes 8 --model-frequency 40 --rollouts-per-step 2 --model-buffer-age 60",
    "ppo": f"{ON_POLICY} {ROLLOUTS} --update-epochs 2 --normalize-observations --normalize-rewards",
    "ppo_atari": f"{COMMON} --env-id ClockImages-v0 {ROLLOUTS} --update-epochs 1",
    "reinforce": f"{ON_POLICY} --normalize-observations",
    "sac": f"{OFF_POLICY} --train-frequency 5 --policy-delay 3",
    "td3": f"{OFF_POLICY} --train-frequency 5 --policy-delay 3",
    "trpo": f"{ON_POLICY} {ROLLOUTS} --critic-epochs 2 --normalize-observations --normalize-rewards",
}


def leaves(state, path: str = "") -> dict:
    """What a nested state holds, by its path: tensors as (dtype, shape, bytes), other things as they are."""
    if isinstance(state, torch.Tensor):
        return {path: (state.dtype, tuple(state.shape), state.cpu().contiguous().numpy().tobytes())}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}
    return {path: state}


def assert_same(ours: dict, theirs: dict) -> None:
    """The leaves of two states are the same, bit for bit; names those that are not."""
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    assert not differing, f"not the same: {', '.join(sorted(differing))}"


def saved(run_dir: Path) -> dict:
    """The leaves of checkpoint.pt, without what hangs on the clock."""
    state = leaves(torch.load(run_dir / "checkpoint.pt", weights_only=True))
    return {name: leaf for name, leaf in state.items() if name not in ("/seconds", "/monitor_size")}


def episodes(run_dir: Path) -> np.ndarray:
    """Returns and lengths in monitor.csv, (episodes, 2)."""
    return np.loadtxt(run_dir / "monitor.csv", delimiter=",", skiprows=2)[:, :2]


@pytest.mark.parametrize("algo", SCRIPTS)
def test_a_tiny_run_trains_resumes_to_the_same_bits_and_exports(algo, monkeypatch):
    assert algo in FLAGS, f"the flags of a tiny run of {algo}.py belong into FLAGS"
    module, started = importlib.import_module(algo), []
    start, goes_on = module.Run.start, module.Run.goes_on

    def noted(run, envs, **modules):
        """What a run begins with, once it has loaded its checkpoint; all its modules must be in that."""
        start(run, envs, **modules)
        state = {name: x.state_dict() for name, x in modules.items()} | {"rng": torch.get_rng_state()}
        started.append((run, leaves(state | {"step": run.step, "longest_episode": run.longest_episode})))

    def until_half(run):
        run.stopped |= run.step >= TOTAL // 2
        return goes_on(run)

    monkeypatch.setattr(module.Run, "start", noted)
    program = torch.export.export(Expert(), (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, "expert.pt2")
    flags = FLAGS[algo].split()
    whole = module.train(module.parse_args(flags))["run_dir"]

    monkeypatch.setattr(module.Run, "goes_on", until_half)
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(flags))
    assert stop.value.code == 130
    half, beginning = started[-1][0].dir, started[-1][1]
    checkpoint = saved(half)
    assert checkpoint["/step"] == TOTAL // 2 and not (half / "policy.pt2").exists()

    monkeypatch.setattr(module.Run, "goes_on", goes_on)
    resumed = module.train(module.parse_args(["--resume", str(half)]))
    run, restored = started[-1]
    assert resumed["run_dir"] == half and np.isfinite(resumed["returns"]).all() and len(resumed["returns"]) == 2
    assert_same(restored, {name: leaf for name, leaf in checkpoint.items() if name in restored})
    assert_same(saved(half), saved(whole))
    assert (episodes(half) == episodes(whole)).all() and len(episodes(half)) == TOTAL // 10

    networks = [name for name, x in run.modules.items() if isinstance(x, nn.Module)]
    weights = [f"/{name}/{key}" for name in networks for key, _ in run.modules[name].named_parameters()]
    for before, after in ((beginning, restored), (restored, saved(whole))):  # bc.py learns once it has all steps
        assert any(before[name] != after[name] for name in weights) or after is restored and algo == "bc"

    env = gym.make(started[0][0].args.env_id)
    policy = torch.export.load(whole / "policy.pt2").module()
    for batch in (1, 5):
        actions = policy(torch.as_tensor(np.stack([env.observation_space.sample() for _ in range(batch)])))
        assert len(actions) == batch and all(env.action_space.contains(x) for x in actions.numpy(force=True))
