"""algos/dqn_atari.py: the buffer that holds every image once, and whole updates against SB3's with CnnPolicy."""

import copy

import dqn_atari
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from parity import Recorder, assert_parameters_agree, follow_replay
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CPU = torch.device("cpu")


def parse(flags: str):
    return dqn_atari.parse_args(flags.split())


# The buffer -------------------------------------------------------------------------------------------------


def acted_on(buffer) -> list[int]:
    """Each environment's row of the step that was put there last: the one before its newest image."""
    return ((buffer.newest - buffer.num_envs) % buffer.capacity).tolist()


class Reference:
    """What a buffer of whole observations would hold: for every row of `buffer`, the newest transition put there."""

    def __init__(self, buffer):
        self.buffer, self.truth = buffer, {}

    def add(self, obs, actions, rewards, next_obs, terminated, truncated, ended):
        self.buffer.add(obs, actions, rewards, next_obs, terminated, truncated, ended)
        rows = acted_on(self.buffer)
        self.truth |= zip(rows, zip(obs, actions, rewards, next_obs, terminated, truncated))

    def check(self) -> int:
        """Every usable row's transition is the true one; returns how many there are."""
        usable = self.buffer.usable.nonzero().squeeze(1)
        batch, _ = self.buffer.get(usable, 1, 0.9)
        for ours, *truth in zip(batch, *(self.truth[row] for row in usable.tolist()), strict=True):
            assert np.array_equal(ours.numpy(), truth)
        return len(usable)


def test_stacks_are_the_environments_own_over_4_000_steps():
    """Two games, in a ring that they fill several times over; episodes end many times, two at once too."""
    args = parse("--env-id ALE/Klax-v5")
    envs = dqn_atari.PixelEnvs(args, 2)
    buffer = Reference(dqn_atari.FrameBuffer(2 * 301, 2, envs.observation_space, CPU))
    rng, ends = np.random.default_rng(0), 0
    obs = envs.reset(0)
    for t in range(2_000):
        actions = rng.integers(envs.action_space.n, size=2)
        acted_on = obs
        obs, next_obs, rewards, terminated, truncated = envs.step(torch.as_tensor(actions))
        ends += envs.ended.sum()
        buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated, envs.ended)
        if t % 500 == 499:
            assert 0.93 * 602 < buffer.check() < 602
    assert ends > 15


def images(*values) -> np.ndarray:
    """An observation (1, K, 2, 2) with these images."""
    return np.array(values, np.uint8).reshape(1, -1, 1, 1) * np.ones((1, 1, 2, 2), np.uint8)


def episode(buffer, start: int, length: int, terminated: bool = True) -> list[int]:
    """Puts an episode of numbered images into the buffer of one environment; returns the rows of its steps."""
    rows = []
    for t in range(start, start + length):
        end = np.array([t == start + length - 1])
        last = end & terminated, end & (not terminated)
        buffer.add(images(t, t + 1, t + 2), [t % 5], [float(t)], images(t + 1, t + 2, t + 3), *last, end)
        rows += acted_on(buffer)
    return rows


def small_buffer(capacity=40) -> dqn_atari.FrameBuffer:
    return dqn_atari.FrameBuffer(capacity, 1, Box(0, 255, (3, 2, 2), np.uint8), CPU)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_n_step_transitions_against_their_definition(n):
    """Within an episode; up to a termination, a time limit, and the newest step."""
    buffer, gamma = small_buffer(), 0.9
    ends = {
        "terminated": episode(buffer, 0, 5),
        "truncated": episode(buffer, 50, 6, terminated=False),
        "newest": episode(buffer, 100, 4)[:4],
    }
    buffer.terminated[ends["newest"][-1]] = False  # as if the episode went on
    for (kind, rows), start in zip(ends.items(), (0, 50, 100)):
        for i, row in enumerate(rows):
            m = min(n, len(rows) - i)
            batch, discounts = buffer.get(torch.tensor([row]), n, gamma)
            t = start + i
            assert (batch.observations.numpy() == images(t, t + 1, t + 2)).all()
            assert (batch.next_observations.numpy() == images(t + m, t + m + 1, t + m + 2)).all()
            assert batch.rewards.item() == pytest.approx(sum(gamma**k * (t + k) for k in range(m)))
            assert discounts.item() == pytest.approx(gamma**m) and batch.actions.item() == t % 5
            reached_end = i + m == len(rows)
            assert batch.terminated.item() == (kind == "terminated" and reached_end)
            assert batch.truncated.item() == (kind == "truncated" and reached_end)


def test_a_lost_life_ends_a_window_but_not_the_row_of_images():
    buffer = small_buffer()
    for t in range(4):
        flags = np.array([t == 1]), np.array([False]), np.array([False])
        buffer.add(images(t, t + 1, t + 2), [0], [1.0], images(t + 1, t + 2, t + 3), *flags)
    assert buffer.newest.item() == 6, "the row of the last of 3 images and one for each step"
    batch, discounts = buffer.get(torch.tensor([2, 4]), 3, 0.5)
    assert batch.rewards.tolist() == [1.5, 1.5] and discounts.tolist() == [0.25, 0.25]
    assert batch.terminated.tolist() == [True, False]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("episodes", [1, 4])
def test_every_usable_row_is_drawn_equally_often(num_envs, episodes):
    """Of all environments, before the ring is full and after."""
    buffer = dqn_atari.FrameBuffer(20 * num_envs, num_envs, Box(0, 255, (3, 2, 2), np.uint8), CPU)
    no = np.zeros(num_envs, bool)
    for t in range(6 * episodes):
        stack, following = (images(*range(s, s + 3)).repeat(num_envs, 0) for s in (t, t + 1))
        end = no | (t % 6 == 5)
        buffer.add(stack, np.zeros(num_envs), np.zeros(num_envs), following, end, no, end)
    usable = buffer.usable.nonzero().squeeze(1)
    assert (len(usable) == 6 * num_envs) if episodes == 1 else (8 * num_envs < len(usable) < 18 * num_envs)
    torch.manual_seed(0)
    counts = torch.bincount(buffer.draw_rows(40_000), minlength=20 * num_envs)
    assert counts[~buffer.usable].sum() == 0
    assert (counts[usable] / 40_000 - 1 / len(usable)).abs().max() < 0.01


@pytest.mark.parametrize("steps", [1, 7, 30, 100])
def test_a_restored_buffer_holds_the_same_and_goes_on_with_a_new_episode(steps):
    buffer, other = small_buffer(), small_buffer()
    other.begins[:] = False  # as in the middle of an episode
    for start in range(0, steps, 10):
        episode(buffer, start, min(10, steps - start) - (start + 10 >= steps), terminated=False)
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    for name in ("images", "actions", "rewards", "terminated", "truncated", "usable", "newest"):
        assert getattr(other, name).equal(getattr(buffer, name)), name
    state = buffer.state_dict()["images"]
    assert len(state) == min(buffer.newest.item() + 1, 40) == len(state.untyped_storage()) / 4, "what is filled alone"
    rows = episode(other, 200, 3)
    batch, _ = other.get(torch.tensor(rows), 1, 0.9)
    assert (batch.observations.numpy() == np.concatenate([images(t, t + 1, t + 2) for t in (200, 201, 202)])).all()


def test_a_million_transitions_take_no_more_than_7_2_gb():
    """100 000 images, measured by what their tensors hold, in games as short as Klax's random ones."""
    space = Box(0, 255, (4, 84, 84), np.uint8)
    buffer = dqn_atari.FrameBuffer(100_000, 8, space, CPU)
    tensors = [x for x in vars(buffer).values() if isinstance(x, torch.Tensor)]
    assert 10 * sum(x.nbytes for x in tensors) <= 7.2e9


def test_images_that_are_no_stack_are_refused(capsys):
    buffer = small_buffer()
    no = np.array([False])
    with pytest.raises(SystemExit):
        buffer.add(images(1, 2, 3), [0], [0.0], images(7, 8, 9), no, no, no)
    assert "ppo_atari.py" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["machado", "nature"])
def test_what_the_buffer_holds_of_a_game_of_five_lives(protocol, monkeypatch):
    """Signs of rewards; a lost life as a termination under nature's protocol alone; no image more than there are."""
    step = dqn_atari.PixelEnvs.step

    def richer(envs, actions):
        obs, reached, rewards, *rest = step(envs, actions)
        return obs, reached, 7 * rewards, *rest

    monkeypatch.setattr(dqn_atari.PixelEnvs, "step", richer)
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *_, **__: np.zeros(1))
    flags = f"--env-id ALE/Breakout-v5 --protocol {protocol} --num-envs 2 --total-timesteps 1000 --buffer-size 2000"
    run_dir = dqn_atari.train(parse(f"{flags} --learning-starts 999 --torch-threads 1"))["run_dir"]
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    games = np.loadtxt(run_dir / "monitor.csv", delimiter=",", skiprows=2, ndmin=2)
    usable, terminated = buffer["usable"], buffer["terminated"] & buffer["usable"]
    assert usable.sum() == 1000 and len(games) > 2 and games[:, 0].max() >= 2
    assert buffer["rewards"][usable].unique().tolist() == [0, 1]
    assert (buffer["newest"] // 2 + 1).sum() == 1000 + 4 * (len(games) + 2), "4 more for each game that has begun"
    lives = {"machado": 1, "nature": 5}[protocol]
    assert lives * len(games) <= terminated.sum() <= lives * len(games) + (lives - 1) * 2


def test_steps_updates_and_schedules_follow_the_flags(monkeypatch):
    """a: a step of both environments, after 10 random ones with its ε; t: the target follows; b, c: a gradient step."""
    events = []
    epsilon_greedy, add, get = dqn_atari.epsilon_greedy, dqn_atari.FrameBuffer.add, dqn_atari.FrameBuffer.get

    def act(q_values, epsilon):
        events.append(("ε", pytest.approx(epsilon)))
        return epsilon_greedy(q_values, epsilon)

    def gradient(network, target, batch, discounts, args):
        events.append(("b", len(batch.rewards)))
        return {"td_loss": torch.zeros(())}

    def step(optimizer):
        events.append(("c", optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(dqn_atari, "epsilon_greedy", act)
    monkeypatch.setattr(dqn_atari, "dqn_gradient", gradient)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(dqn_atari.FrameBuffer, "add", lambda *x: events.append("a") or add(*x))
    monkeypatch.setattr(dqn_atari.FrameBuffer, "get", lambda *x: events.append(("n", *x[2:])) or get(*x))
    monkeypatch.setattr(dqn_atari.PixelQNetwork, "load_state_dict", lambda *_: events.append("t"))
    flags = "--env-id Catch-v0 --num-envs 2 --train-frequency 3 --gradient-steps 2 --learning-starts 10 --batch-size 4"
    flags += " --total-timesteps 48 --buffer-size 1000 --target-frequency 5 --n-step 3 --gamma 0.9"
    flags += " --learning-rate 0.3 --exploration-start 0.9 --exploration-end 0.1 --exploration-fraction 0.5"
    dqn_atari.train(parse(f"{flags} --eval-episodes 1"))

    expected, steps = [], 0
    while steps < 48:
        for _ in range(3):
            expected += [("ε", max(0.9 - 0.8 * steps / 24, 0.1))] * (steps >= 10) + ["a"]
            steps += 2
            expected += ["t"] * (steps // 5 - (steps - 2) // 5)
        expected += [("n", 3, 0.9), ("b", 4), ("c", 0.3)] * (2 if steps > 10 else 0)
    assert events == expected


# Against Stable-Baselines3 ----------------------------------------------------------------------------------


class LikeTheirs:
    """Our buffer under the interface of parity.follow_replay: rows are those of SB3's buffer of one environment."""

    def __init__(self, capacity: int, space: Box):
        self.capacity, self.steps, self.row_of = capacity, 0, {}
        self.frames = dqn_atari.FrameBuffer(3 * capacity, 1, space, CPU)

    def add(self, obs, actions, rewards, next_obs, terminated, truncated):
        self.frames.add(obs, actions, rewards, next_obs, terminated, truncated, terminated | truncated)
        (self.row_of[self.steps % self.capacity],) = acted_on(self.frames)
        self.steps += 1

    def draw_rows(self, batch_size: int):
        return torch.randint(min(self.steps, self.capacity), (batch_size,))

    def ours(self, rows):
        return torch.tensor([self.row_of[row] for row in rows.tolist()])


class EndingBothWays(gym.Wrapper):
    """Balls to catch, every other one of which a time limit stops in mid-air."""

    def __init__(self):
        super().__init__(gym.make("Catch-v0"))
        self.balls = 0

    def reset(self, **kwargs):
        self.balls, self.steps = self.balls + 1, 0
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        return obs, reward, terminated, self.balls % 2 == 0 and self.steps == 4, info


@pytest.mark.parametrize("n_step", [1, 3])
def test_updates_agree_with_sb3(n_step, record_property):
    """SB3's own learn() and train(), over the same images with the same minibatches, in a buffer that overflows."""
    env = Recorder(DummyVecEnv([EndingBothWays]))
    settings = dict(learning_rate=1e-4, batch_size=16, gamma=0.97, max_grad_norm=0.5)
    model = DQN(
        "CnnPolicy",
        env,
        **settings,
        buffer_size=150,
        learning_starts=40,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=20,
        exploration_initial_eps=1.0,
        exploration_final_eps=0.5,
        n_steps=n_step,
        policy_kwargs=dict(net_arch=[]),
        seed=0,
        device="cpu",
    )
    args = dqn_atari.Args(double=False, n_step=n_step, **settings)
    network = dqn_atari.PixelQNetwork(env.observation_space, env.action_space)
    for ours, theirs in zip(network.parameters(), model.q_net.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    target = copy.deepcopy(network).requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, fused=True)
    buffer = LikeTheirs(150, env.observation_space)
    seen = 40

    def update(rows):
        nonlocal seen
        for step in range(seen, model.num_timesteps):
            if step // 20 < (step + 1) // 20:
                target.load_state_dict(network.state_dict())
        seen = model.num_timesteps
        batch, discounts = buffer.frames.get(buffer.ours(rows), n_step, args.gamma)
        optimizer.zero_grad()
        dqn_atari.dqn_gradient(network, target, batch, discounts, args)
        optimizer.step()

    updates = follow_replay(model, buffer, 300, update)
    assert updates > 50
    worst = max(
        assert_parameters_agree(network, model.q_net, 1e-5, before),
        assert_parameters_agree(target, model.q_net_target, 1e-5, before),
    )
    record_property("largest difference", worst)
    print(f"dqn_atari, n = {n_step}: largest difference {worst:.1e} after {updates} updates")


# The gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_the_gradient_is_the_losses_up_to_its_bound(double, loss):
    """Against the definition, sample by sample, on images from 0 to 1."""
    torch.manual_seed(0)
    spaces = Box(0, 255, (2, 36, 36), np.uint8), Discrete(3, start=5)
    network, target = (dqn_atari.PixelQNetwork(*spaces) for _ in range(2))
    obs, next_obs = torch.randint(256, (2, 8, 2, 36, 36), dtype=torch.uint8)
    actions, rewards, terminated = torch.randint(3, (8,)), 3 * torch.randn(8), torch.arange(8) % 3 == 0
    batch = dqn_atari.Transitions(obs, actions, rewards, next_obs, terminated, terminated & False)
    with torch.no_grad():
        next_q, next_target_q = (x.network(next_obs / 255) for x in (network, target))
        best = (next_q if double else next_target_q).argmax(1)
        y = rewards + 0.9 * ~terminated * next_target_q[torch.arange(8), best]
    errors = network.network(obs / 255)[torch.arange(8), actions] - y
    assert errors.abs().min() < 1 < errors.abs().max()
    small = (errors.abs() < 1) | (loss == "squared")
    mean = torch.where(small, 0.5 * errors.square(), errors.abs() - 0.5).mean()
    expected = torch.autograd.grad(mean, list(network.parameters()))
    norm = torch.cat([x.flatten() for x in expected]).norm()
    for bound in (1e9, 0.01):
        network.zero_grad()
        args = dqn_atari.Args(double=double, loss=loss, max_grad_norm=bound)
        metrics = dqn_atari.dqn_gradient(network, target, batch, 0.9, args)
        torch.testing.assert_close(metrics["td_loss"], mean.detach())
        for parameter, gradient in zip(network.parameters(), expected):
            assert parameter.grad.stride() == parameter.stride(), "fused Adam reads both in their memory's order"
            torch.testing.assert_close(parameter.grad, gradient * min(1, bound / norm), rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in target.parameters())
    assert network(obs).tolist() == (5 + network.network(obs / 255).argmax(1)).tolist()


# Learning ---------------------------------------------------------------------------------------------------


ONE_STATE = "--num-envs 1 --learning-starts 100 --buffer-size 5000 --train-frequency 4 --gradient-steps 2"
ONE_STATE += " --target-frequency 8 --loss squared --learning-rate 1e-3 --max-grad-norm 1000"


@pytest.mark.parametrize(
    "env_id, flags, value, tolerance",
    [
        ("OneStateImage-v0", "--batch-size 16 --gamma 0.9 --total-timesteps 1600", 10, 0.5),
        pytest.param(
            "OneStateTerminalImage-v0",
            "--batch-size 64 --total-timesteps 3000",
            1 / (1 - 0.99 * 0.9),
            1,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_time_limit_is_bootstrapped_and_a_termination_is_not(env_id, flags, value, tolerance):
    """As in tests/test_learning.py, with a nearer horizon in the fast one."""
    run = dqn_atari.train(parse(f"--env-id {env_id} {flags} {ONE_STATE} --torch-threads 1 --eval-episodes 1"))
    events = EventAccumulator(str(run["run_dir"]), {"scalars": 0}).Reload()
    assert events.Scalars("losses/q_values")[-1].value == pytest.approx(value, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_learns_to_catch_from_pixels(seed):
    flags = f"--env-id Catch-v0 --seed {seed} --total-timesteps 15000 --learning-starts 1000 --buffer-size 20000"
    flags += (
        " --exploration-fraction 0.5 --target-frequency 200 --learning-rate 5e-4 --gradient-steps 1 --torch-threads 1"
    )
    assert dqn_atari.train(parse(f"{flags} --eval-episodes 100"))["returns"].mean() >= 0.9
