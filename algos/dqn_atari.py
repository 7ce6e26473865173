"""DQN from pixels, on Atari (Mnih et al. 2015), by default Double DQN (van Hasselt et al. 2016, arXiv 1509.06461).

    y_t  = r_t + γ r_{t+1} + … + γᵐ⁻¹ r_{t+m−1} + γᵐ Q_θ⁻(s_{t+m}, a*)      no last term if s_{t+m} is terminal
    a*   = argmax_a Q_θ(s_{t+m}, a)                          Double DQN; plain DQN lets Q_θ⁻ choose as well
    L(θ) = E[ℓ(Q_θ(s_t, a_t) − y_t)]                         ℓ: Huber with threshold 1, or half the square

- The replay buffer holds every image once, and stacks 4 as they are drawn: 7.1 GB for a million transitions, not 56.
- A step is 4 frames, the last two of them maximised (sprites flicker), grey, 84 × 84: 1 M steps are 4 M frames.
- Protocol `machado` (2018, arXiv 1709.06009): the emulator repeats the last action with probability 0.25. `nature`
  (Mnih et al. 2015): up to 30 frames without action, then FIRE, begin a game; learning takes a lost life for its end.
- Learning sees the rewards' signs, so that one step size does for all games; logged and evaluated are full scores.
- Stable-Baselines3 (SB3) makes the same update in DQN with CnnPolicy, that of `--no-double` (tests/test_dqn_atari.py).

    python algos/dqn_atari.py --buffer-size 400_000          # ALE/Pong-v5
    python algos/dqn_atari.py --env-id ALE/Breakout-v5 --protocol nature --n-step 3
    python algos/dqn_atari.py --env-id My/Pixels-v0          # any environment with stacks of uint8 images (C, H, W)
"""

import copy
import errno
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque, namedtuple
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_type_hints

import ale_py  # noqa: F401  (gymnasium knows its environments from here on)
import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.save_video import save_video
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Count = 10_000_000  # environment steps of 4 frames, over all environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where networks and replay buffer live; auto prefers CUDA
    torch_threads: Count = 2  # CPU threads for PyTorch; on the CPU as many as there are cores is fastest
    compile: bool = False  # compile loss and gradient with torch.compile (CUDA graphs on a GPU)
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 1_000_000  # environment steps between checkpoints, which hold the replay buffer too
    eval_episodes: Count = 10  # games of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film games 0, 1, 8, 27, 64 … of the first environment, as the agent sees them

    # environment
    env_id: str = "ALE/Pong-v5"  # one of ale_py's environments, or another that observes uint8 images (C, H, W)
    num_envs: Count = 8  # parallel environments N
    protocol: Literal["machado", "nature"] = "machado"  # sticky actions; or random starts, a lost life as a termination
    full_action_space: bool = False  # all 18 actions of the console, as Machado et al., not only the game's own
    clip_rewards: bool = True  # learn from the rewards' signs

    # algorithm
    buffer_size: Count = 1_000_000  # images of 7 KB in the replay buffer: a few more than transitions
    learning_starts: Count = 80_000  # environment steps with random actions before the first update
    batch_size: Count = 32  # transitions per gradient step
    train_frequency: Count = 1  # steps of every environment between updates
    gradient_steps: Count = 2  # gradient steps per update: 2 after 8 environments' steps are one for every 4
    learning_rate: Positive = 1e-4  # Adam's step size
    gamma: Fraction = 0.99  # discount γ
    n_step: Count = 1  # rewards n that a target sums before it bootstraps
    double: bool = True  # let the network that is trained choose the target's action (Double DQN)
    loss: Literal["huber", "squared"] = "huber"  # loss ℓ of a temporal difference
    max_grad_norm: Positive = 10.0  # bound on the gradient's global norm
    target_frequency: Count = 1_000  # environment steps between copies to the target network, after a step of all
    exploration_start: Fraction = 1.0  # ε at the start
    exploration_end: Fraction = 0.01  # ε once --exploration-fraction of the run has passed
    exploration_fraction: Positive = 0.1  # part of --total-timesteps over which it falls, linearly


RECOMMENDED = {"ALE/Pong-v5": dict(total_timesteps=3_000_000)}  # by environment id; an explicit flag wins


# Environments, network and replay ---------------------------------------------------------------------------


class PixelEnvs:
    """N environments with images, under --protocol; where a game ends, the next one begins within the same step.

    Observations are stacks (N, C, H, W) of bytes, the newest image last; rewards are the game's own, and returns its
    scores. Under nature's protocol a lost life counts as terminated, but the game goes on: `ended` (N,) tells its end.
    """

    def __init__(self, args: Args, num_envs: int, max_episode_steps: int | None = None):
        self.num_envs, self.dtype, self.nature, self.video = num_envs, np.uint8, args.protocol == "nature", {}
        atari, same_step = args.env_id.startswith("ALE/"), {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        if atari:  # ale_py's own, stepped in C++ threads, up to 108 000 frames a game
            options = dict(repeat_action_probability=0.0 if self.nature else 0.25, noop_max=30 if self.nature else 0)
            options |= dict(use_fire_reset=self.nature, full_action_space=args.full_action_space, reward_clipping=False)
            options |= same_step | {"max_num_frames_per_episode": 4 * (max_episode_steps or 27_000)}
        else:
            options = dict(max_episode_steps=max_episode_steps, vectorization_mode="sync", vector_kwargs=same_step)
        try:
            self.envs = gym.make_vec(args.env_id, num_envs, **options)
        except (gym.error.Error, AssertionError, ImportError, TypeError) as error:  # TypeError: it needs arguments
            fail(f"--env-id {args.env_id}: {error} (kwargs go into gym.register)")
        self.close, self.time_limit = self.envs.close, 27_000 if atari else self.envs.spec.max_episode_steps
        self.observation_space = space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        images = space.dtype == np.uint8 and len(space.shape or ()) == 3 and min(space.shape[1:]) >= 36
        if not (images and isinstance(self.action_space, Discrete)):
            needs = "uint8 images (C, H, W) of at least 36 × 36 and Discrete actions; ppo.py and dqn.py take vectors"
            fail(f"{args.env_id} has {space}, {self.action_space}; {ALGO}.py needs {needs}; Atari's are ALE/Pong-v5 …")

    def film(self, folder: Path, name: str) -> None:
        """Films games 0, 1, 8, 27, 64 … of the first environment, as the agent sees them, 1000 images at most."""
        self.video = dict(frames=[], video_folder=str(folder), name_prefix=name, episode_index=0, fps=15)

    def reset(self, seed: int) -> np.ndarray:
        """First observations (N, C, H, W); environment i is seeded with seed + i."""
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        obs, infos = self.envs.reset(seed=seed)
        self.lives = infos.get("lives", np.zeros(self.num_envs))
        return obs

    def step(self, actions: Tensor) -> tuple[np.ndarray, ...]:
        """Observations to act on, those reached (others where a game ended), rewards, terminated, truncated: (N, …)."""
        obs, rewards, terminated, truncated, infos = self.envs.step(actions.numpy(force=True))
        self.ended, self.returns, self.lengths = terminated | truncated, self.returns + rewards, self.lengths + 1
        self.episodes = [(i, float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(self.ended)]
        reached = obs.copy() if self.episodes else obs
        for i, *_ in self.episodes:
            reached[i], self.returns[i], self.lengths[i] = infos["final_obs"][i], 0, 0
        lives, self.lives = self.lives, infos.get("lives", self.lives)
        terminated = terminated | (self.nature & (self.lives < lives))
        if self.video and len(self.video["frames"]) < 1000:
            self.video["frames"].append(np.repeat(reached[0, -1, :, :, None], 3, axis=-1))
        if self.video and self.ended[0]:
            save_video(**self.video)  # of those games alone
            self.video |= dict(frames=[], episode_index=self.video["episode_index"] + 1)
        return obs, reached, finite("reward", np.asarray(rewards, np.float32)), terminated, truncated


class PixelQNetwork(nn.Module):
    """Q(s, ·) of byte images (Mnih et al. 2015, "Model architecture"), and as `forward` the greedy policy."""

    def __init__(self, observation_space: Box, action_space: Discrete):
        super().__init__()
        self.first_action = int(action_space.start)
        convolutions = (observation_space.shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)
        layers = [x for sizes in convolutions for x in (nn.Conv2d(*sizes), nn.ReLU(inplace=True))] + [nn.Flatten()]
        features = nn.Sequential(*layers)(torch.zeros(1, *observation_space.shape)).shape[1]
        self.network = nn.Sequential(*layers, nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, int(action_space.n)))

    def q_values(self, obs: Tensor) -> Tensor:
        """Q(s, ·), shape (B, A), of images (B, C, H, W)."""
        return self.network(obs.to(torch.float32, memory_format=torch.channels_last).div_(255))

    def forward(self, obs: Tensor) -> Tensor:
        """The actions (B,) of highest value, as the environment counts them."""
        return self.first_action + self.q_values(obs).argmax(-1)


# Steps of an environment, first dimension B; each next observation is the one that its step truly led to. A one-step
# target needs `terminated` alone; one of several steps must not go on past `truncated` either (see dqn.py).
Transitions = namedtuple("Transitions", "observations actions rewards next_observations terminated truncated")


class FrameBuffer:
    """The newest transitions of N environments whose observations are their newest K images; each is stored once.

    Every Nth row is an environment's: all K images of an episode's first observation, then the newest one of each next.
    In an observation's last row stands what was done and came of it, `usable` while that and all K images are there.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space: Box, device: torch.device):
        self.stack, *size = observation_space.shape
        self.num_envs, self.capacity = num_envs, capacity // num_envs * num_envs
        needed, free, least = self.capacity * (math.prod(size) + 9), free_memory(device), num_envs * (self.stack + 2)
        if needed > free or self.capacity < least:
            fail(f"--buffer-size {capacity} needs {needed:,} bytes, {device} has {free:,} free; {least} is the least")
        self.images = torch.zeros(self.capacity, *size, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(self.capacity, dtype=torch.int16, device=device)
        self.rewards = torch.zeros(self.capacity, device=device)
        self.terminated, self.truncated, self.usable = torch.zeros(3, self.capacity, dtype=torch.bool, device=device)
        self.newest = torch.arange(num_envs) - num_envs  # rows of their newest images, counted on beyond the capacity
        self.begins = torch.ones(num_envs, dtype=torch.bool)

    def add(self, obs, actions, rewards, next_obs, terminated, truncated, ended) -> None:
        """One step of all environments, each (N, …); `ended` where the next observation is another episode's."""
        if not np.array_equal(obs[:, 1:], next_obs[:, :-1]):
            fail("an observation is not the one before with a newer image at its end: use ppo_atari.py", code=1)
        images = torch.as_tensor(np.concatenate([obs, next_obs[:, -1:]], 1))
        new = self.begins.unsqueeze(1) | (torch.arange(self.stack + 1) == self.stack)  # (N, K + 1)
        rows = self.newest.unsqueeze(1) + self.num_envs * new.cumsum(1)
        self.images[rows[new] % self.capacity] = images[new].to(self.images.device)
        self.usable[(rows[new] + (self.stack - 1) * self.num_envs) % self.capacity] = False  # its oldest is overwritten
        self.newest = rows[:, -1]
        acted_on = (self.newest - self.num_envs) % self.capacity
        step = dict(actions=actions, rewards=rewards, terminated=terminated, truncated=truncated, usable=True)
        for name, x in step.items():
            getattr(self, name)[acted_on] = torch.as_tensor(x, device=self.images.device).to(getattr(self, name).dtype)
        self.begins = torch.as_tensor(ended)

    def draw_rows(self, batch_size: int) -> Tensor:
        """Usable rows (B,) drawn uniformly, with replacement."""
        filled = min(int(self.newest.max()) + self.num_envs, self.capacity) // self.num_envs  # rows of an environment
        rows = torch.empty(0, dtype=torch.long, device=self.usable.device)
        while len(rows) < batch_size:
            draws = torch.randint(self.num_envs * filled, (2 * batch_size,), device=rows.device)
            draws = draws % filled * self.num_envs + draws // filled
            rows = torch.cat([rows, draws[self.usable[draws]]])
        return rows[:batch_size]

    def get(self, rows: Tensor, n: int, gamma: float) -> tuple[Transitions, Tensor]:
        """Transitions over m ≤ n steps from rows (B,), with r_t + … + γᵐ⁻¹ r_{t+m−1} for their reward, and γᵐ (B,)."""
        steps = torch.arange(n, device=rows.device)
        window = (rows.unsqueeze(1) + steps * self.num_envs) % self.capacity  # (B, n)
        ends = (self.terminated[window] | ~self.usable[(window + self.num_envs) % self.capacity]).int()
        counts = ends.cumsum(1) - ends == 0  # up to where the episode or the buffer ends, and with it
        length = counts.sum(1)
        rewards = (self.rewards[window] * counts * gamma**steps).sum(1)
        last = (rows + (length - 1) * self.num_envs) % self.capacity
        newest, ago = torch.stack([rows, last + self.num_envs]), torch.arange(1 - self.stack, 1, device=rows.device)
        images = (newest.unsqueeze(2) + ago * self.num_envs) % self.capacity  # (2, B, K)
        obs, next_obs = self.images.index_select(0, images.flatten()).unflatten(0, images.shape)
        step = self.actions[rows].long(), rewards, next_obs, self.terminated[last], self.truncated[last]
        return Transitions(obs, *step), gamma**length

    def state_dict(self) -> dict:
        """The rows that have been filled, and where the next ones go."""
        filled = min(int(self.newest.max()) + 1, self.capacity)
        state = {name: x[:filled] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return state if filled == self.capacity else {name: x.clone() for name, x in state.items()}  # else saved whole

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave; every environment then begins an episode."""
        for name, x in state.items():
            getattr(self, name)[: len(x)] = x
        self.begins[:] = True


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on `device`, where CUDA or Linux tells (a container's limit aside)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    return math.inf


# The maths --------------------------------------------------------------------------------------------------


def epsilon_greedy(q_values: Tensor, epsilon: float) -> Tensor:
    """Actions (N,): with probability ε any, else the one of highest value; q_values (N, A)."""
    anything = torch.randint(q_values.shape[-1], q_values.shape[:-1], device=q_values.device)
    explore = torch.rand(q_values.shape[:-1], device=q_values.device) < epsilon
    return torch.where(explore, anything, q_values.argmax(-1))


def q_target(rewards, terminated, discounts, next_target_q: Tensor, next_q: Tensor | None = None) -> Tensor:
    """y = r + γᵐ Q_θ⁻(s', a*), shape (B,), without the second term where s' is terminal.

    Q_θ⁻(s', ·) is `next_target_q` (B, A). a* is what `next_q`, Q_θ(s', ·), holds highest (Double DQN, the unnumbered
    equation of arXiv 1509.06461), or without it what Q_θ⁻ does (DQN, eq. 3 there).
    """
    choosing = next_target_q if next_q is None else next_q
    next_values = next_target_q.gather(1, choosing.argmax(1, keepdim=True)).squeeze(1)
    return rewards + discounts * next_values * ~terminated


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """torch.nn.utils.clip_grad_norm_, with one norm over all numbers instead of a norm of norms, which is faster."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))


def dqn_gradient(network, target, batch: Transitions, discounts: Tensor | float, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ), of norm --max-grad-norm at most, in .grad; discounts γᵐ are (B,), or one. Returns what to log."""
    with torch.no_grad():
        next_q = network.q_values(batch.next_observations) if args.double else None
        next_target_q = target.q_values(batch.next_observations)
        targets = q_target(batch.rewards, batch.terminated, discounts, next_target_q, next_q)
    q_values = network.q_values(batch.observations).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    loss = F.smooth_l1_loss(q_values, targets) if args.loss == "huber" else 0.5 * F.mse_loss(q_values, targets)
    loss.backward()
    clip_gradient(network.parameters(), args.max_grad_norm)
    return {"td_loss": loss.detach(), "q_values": q_values.detach().mean()}


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        envs = PixelEnvs(args, args.num_envs)
        if args.learning_starts >= args.total_timesteps:
            fail(f"--learning-starts {args.learning_starts} must be below --total-timesteps {args.total_timesteps}")
        network = PixelQNetwork(envs.observation_space, envs.action_space).to(run.device)
        target = copy.deepcopy(network).requires_grad_(False).eval()
        optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, fused=True)
        mode = "reduce-overhead" if run.device.type == "cuda" else None  # CUDA graphs, which write over their results
        gradient_of = torch.compile(dqn_gradient, mode=mode) if args.compile else dqn_gradient
        buffer = FrameBuffer(args.buffer_size, args.num_envs, envs.observation_space, run.device)
        run.start(envs, network=network, target=target, optimizer=optimizer, buffer=buffer)  # what a checkpoint holds

        obs, metrics, logged_step = envs.reset(args.seed + run.step), [], run.step
        while run.goes_on():
            # Collect a few steps from every environment.
            for _ in range(args.train_frequency):
                progress = min(run.step / (args.exploration_fraction * args.total_timesteps), 1.0)
                exploration = args.exploration_start + (args.exploration_end - args.exploration_start) * progress
                if run.step < args.learning_starts:
                    actions = torch.randint(int(envs.action_space.n), (args.num_envs,), device=run.device)
                else:
                    with torch.no_grad():
                        actions = epsilon_greedy(network.q_values(torch.as_tensor(obs, device=run.device)), exploration)
                acted_on = obs
                obs, next_obs, rewards, *ends = envs.step(network.first_action + actions)
                rewards = np.sign(rewards) if args.clip_rewards else rewards
                buffer.add(acted_on, actions, rewards, next_obs, *ends, envs.ended)
                run.advance(envs)
                if run.step % args.target_frequency < args.num_envs:  # it has just passed a multiple
                    target.load_state_dict(network.state_dict())

            # Update on minibatches of everything in the buffer.
            for _ in range(args.gradient_steps if run.step > args.learning_starts else 0):
                minibatch = buffer.get(buffer.draw_rows(args.batch_size), args.n_step, args.gamma)
                optimizer.zero_grad()
                metrics.append({name: x.clone() for name, x in gradient_of(network, target, *minibatch, args).items()})
                optimizer.step()

            if run.step - logged_step >= 1000 or run.step >= args.total_timesteps:
                run.log(metrics, exploration=exploration)  # means over the updates since the last time
                metrics, logged_step = [], run.step
        return run.finish(network)


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def finite(name: str, numbers: np.ndarray) -> np.ndarray:
    """The same numbers; stops the run where one is not finite, before it enters a buffer."""
    if not np.isfinite(numbers).all():
        fail(f"a number of the {name} is not finite; the last checkpoint stays", code=1)
    return numbers


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings or, on --resume, the run's own."""
    for stream in {sys.stdout, sys.stderr} & {sys.__stdout__, sys.__stderr__}:
        stream.reconfigure(errors="replace")  # a console that has no γ shows --help all the same
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    defaults = replace(Args(), **{"env_id": given.env_id} | RECOMMENDED.get(given.env_id, {}))
    if given.resume:
        defaults = load_checkpoint(given.resume)["args"]
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    return tyro.cli(Args, default=defaults, args=argv, description=f"Settings taken with --env-id alone:\n\n{table}")


def load_checkpoint(folder: str, **modules) -> dict:
    """What a run's checkpoint.pt holds; the states of `modules` in it are loaded into them."""
    try:  # without mmap on Windows, where a file that optimisers still read from could not be replaced
        state = torch.load(Path(folder, "checkpoint.pt"), "cpu", weights_only=True, mmap=sys.platform != "win32")
        state["args"] = {ALGO: Args}[state["algo"]](**state["args"])  # a KeyError names the script that it is of
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except Exception as error:  # whatever is wrong with the file, it is no checkpoint of this script
        fail(f"--resume {folder}: not a checkpoint of {ALGO}.py, or one of an older version ({error!r:.200})")
    return state


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not; what it observes becomes a vector, unless it is an index or an image."""
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {}, **kwargs)
    except (gym.error.Error, ImportError, TypeError) as error:  # a TypeError: its constructor needs arguments
        hint = "kwargs go into gym.register; ppo_atari.py and dqn_atari.py play Atari; --capture-video needs rgb_array"
        fail(f"--env-id {args.env_id}: {error} ({hint})")
    plain = isinstance(env.observation_space, Discrete) or len(env.observation_space.shape or ()) in (1, 3)
    return env if plain else gym.wrappers.FlattenObservation(env)


class Envs:
    """N environments, stepped in turn; where an episode ends, the next one begins within the same step.

    Observations are copies (N, …): float32, bytes as they are, int64 of a Discrete space.
    """

    def __init__(self, args: Args, num_envs: int, action_spaces: tuple[type, ...] = (gym.Space,), **kwargs):
        self.envs, self.num_envs = [make_env(args, **kwargs) for _ in range(num_envs)], num_envs
        self.observation_space, space = self.envs[0].observation_space, self.envs[0].action_space
        self.action_space, self.time_limit = space, self.envs[0].spec.max_episode_steps
        index, image = isinstance(self.observation_space, Discrete), self.observation_space.dtype == np.uint8
        self.dtype = np.int64 if index else np.uint8 if image else np.float32
        self.episodes = []  # (environment, return, length) of those that ended in the last step
        if len(self.observation_space.shape) == 3:
            fail(f"{args.env_id} observes images; ppo_atari.py and dqn_atari.py learn from them")
        odd = isinstance(space, Box) and space.dtype.kind != "f" or len(space.shape or ()) > 1
        if odd or not isinstance(space, action_spaces):
            takes = "ppo.py takes Discrete and Box, dqn.py Discrete, sac.py Box; a Box is to be a vector of floats"
            fail(f"{args.env_id} has the actions {space}; {ALGO}.py cannot take them ({takes})")

    def film(self, folder: Path, name: str) -> None:
        """Records episodes 0, 1, 8, 27, 64 … of the first environment, and on from there to 1000 images at most."""
        self.envs[0] = gym.wrappers.RecordVideo(self.envs[0], str(folder), name_prefix=name, video_length=1000)

    def reset(self, seed: int) -> np.ndarray:
        """First observations (N, …); environment i is seeded with seed + i."""
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return finite("observation", np.array([x.reset(seed=seed + i)[0] for i, x in enumerate(self.envs)], self.dtype))

    def step(self, actions: Tensor) -> tuple[np.ndarray, ...]:
        """(observations to act on, observations reached, rewards, terminated, truncated), each (N, …).

        The two observations differ where an episode ended: it reached its final one, and the next one has begun.
        """
        reached = np.empty((self.num_envs, *self.observation_space.shape), self.dtype)
        rewards, (terminated, truncated) = np.empty(self.num_envs), np.empty((2, self.num_envs), bool)
        for i, (env, action) in enumerate(zip(self.envs, finite("action", actions.numpy(force=True)))):
            reached[i], rewards[i], terminated[i], truncated[i], _ = env.step(action)
        self.returns, self.lengths = self.returns + finite("reward", rewards), self.lengths + 1
        ended = np.flatnonzero(terminated | truncated)
        self.episodes = [(i, float(self.returns[i]), int(self.lengths[i])) for i in ended]
        obs = reached.copy() if len(ended) else reached
        for i in ended:
            obs[i], self.returns[i], self.lengths[i] = finite("observation", self.envs[i].reset()[0]), 0, 0
        return obs, finite("observation", reached), rewards.astype(np.float32), terminated, truncated

    def close(self) -> None:
        """Closes them all."""
        for env in self.envs:
            env.close()


class Run(ExitStack):
    """A run directory, and what a run sets in its process (seeds, threads, signals), put back where `with` ends."""

    def __init__(self, args: Args):
        super().__init__()
        for name, hint in get_type_hints(Args, include_extras=True).items():
            values = value if isinstance(value := getattr(args, name), tuple) else (value,)
            for low, high, text in itertools.chain(*(getattr(x, "__metadata__", ()) for x in (hint, *get_args(hint)))):
                if not all(x is None or low <= x <= high for x in values):
                    fail(f"--{name.replace('_', '-')} {value} must be {text}")
        own = replace(load_checkpoint(args.resume)["args"] if args.resume else args, resume=args.resume)
        if replace(own, total_timesteps=args.total_timesteps) != args:
            fail("--resume goes on with the run's own arguments; only --total-timesteps may be changed beside it")
        if type(self) is Run and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            fail("learns in one process; ppo.py and ppo_atari.py learn in several under torchrun")
        self.args, self.dir, self.recent_returns, self.stopped = args, Path(os.devnull), deque(maxlen=100), False
        self.step = self.updates = self.longest_episode = self.saved_step = 0  # updates: gradient steps
        best = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(best if args.device == "auto" else args.device)
        if self.device.type != "cpu" and not getattr(torch, self.device.type).is_available():
            fail(f"--device {args.device}: PyTorch {torch.__version__} finds no such device here; use --device auto")
        self.callback(torch.set_num_threads, torch.get_num_threads())
        self.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if args.compile:
            if not shutil.which(os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))):
                fail("--compile needs a C++ compiler: install g++, or name one in the environment variable CXX")
            if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # takes loss.backward() into the graph
                self.enter_context(torch._dynamo.config.patch(trace_autograd_ops=True))
                wrapped = self.device.type == "cpu" and sys.platform == "linux"
                self.enter_context(torch._inductor.config.patch(cpp_wrapper=wrapped))

        def stop(number: int, frame) -> None:  # the iteration in progress ends first; a second signal stops at once
            self.stopped = True
            signal.signal(number, signal.SIG_DFL)

        if threading.current_thread() is threading.main_thread():
            for number in {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}:
                self.callback(signal.signal, number, signal.signal(number, stop))
        torch.set_num_threads(args.torch_threads)
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # the first two for environments that use them
            seed(args.seed)

    def __exit__(self, kind, error, trace) -> bool:
        super().__exit__(kind, error, trace)
        unfinished = self.dir / "checkpoint.tmp"
        full = unfinished.exists() or getattr(error, "errno", None) == errno.ENOSPC
        if full and isinstance(error, OSError | RuntimeError):
            unfinished.unlink(missing_ok=True)
            fail(f"{error}; is the disk full? The checkpoint of step {self.saved_step} stays", code=1)
        if isinstance(error, BrokenPipeError):  # nobody reads what is printed: no traceback, here or at Python's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)

    def start(self, envs, **modules) -> None:
        """Makes a run directory, or opens --resume's. `modules`, with state_dicts, are what a checkpoint holds."""
        args, self.envs, self.modules, state = self.args, envs, modules, {"seconds": 0, "monitor_size": 0}
        self.callback(envs.close)
        self.dir = Path(args.resume) if args.resume else self.new_dir()
        self.monitor = self.enter_context(open(self.dir / "monitor.csv", "a", buffering=1, newline=""))
        try:
            if hasattr(os, "lockf"):  # Windows has no such lock
                os.lockf(self.monitor.fileno(), os.F_TLOCK, 0)
        except OSError:
            fail(f"--resume {self.dir}: another process is at it")
        if args.resume:
            state = load_checkpoint(args.resume, **modules)
            self.step, self.updates, self.longest_episode = (state[x] for x in ("step", "updates", "longest_episode"))
            self.saved_step = self.step
            torch.set_rng_state(state["rng"])
            torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
        self.start_time = time.time() - state["seconds"]
        self.monitor.truncate(state["monitor_size"])  # episodes after the checkpoint will be lived through again
        versions = {"python": sys.version.split()[0]} | {x.__name__: x.__version__ for x in (torch, gym, np)}
        about = {"algo": ALGO, "args": asdict(replace(args, resume=None)), "versions": versions}
        about["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (self.dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
        if args.capture_video:
            envs.film(self.dir / "videos", f"from-step-{self.step}")
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if args.resume else None)
        self.callback(self.writer.close)
        if not args.resume:
            self.monitor.write(f"#{json.dumps({'t_start': self.start_time, 'env_id': args.env_id})}\nr,l,t\n")
            self.checkpoint()
        recommended, given = RECOMMENDED.get(args.env_id, {}), asdict(args)
        words = (f"{x}={given[x]}" + f" (not {value})" * (given[x] != value) for x, value in recommended.items())
        print(f"recommended settings: {' '.join(words) or 'none'}", flush=True)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", desc=args.env_id, mininterval=0.5)
        self.callback(self.bar.close)

    def new_dir(self) -> Path:
        """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}, or the first of …_1, …_2 that does not exist yet."""
        env_id = re.sub(r"[^\w.=-]+", "-", self.args.env_id)  # Windows refuses colons, for instance
        path = Path(self.args.output_dir).expanduser() / f"{env_id}__{ALGO}__{self.args.seed}__{int(time.time())}"
        try:
            for name in itertools.chain([path], (f"{path}_{n}" for n in itertools.count(1))):
                with suppress(FileExistsError):
                    os.makedirs(name)
                    return Path(name)
        except OSError as error:
            fail(f"--output-dir {self.args.output_dir}: {error}")

    def goes_on(self) -> bool:
        """Whether there are steps left and nobody has asked to stop; writes a checkpoint where one is due."""
        if self.step - self.saved_step >= self.args.checkpoint_every:
            self.checkpoint()
        return self.step < self.args.total_timesteps and not self.stopped

    def checkpoint(self) -> None:
        """Writes checkpoint.pt under another name and renames it: whenever the process dies, a whole one is there."""
        networks = [module for module in self.modules.values() if isinstance(module, nn.Module)]
        if not all(x.isfinite().all() for network in networks for x in network.parameters()):
            fail(f"a weight is not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {name: getattr(self, name) for name in ("step", "updates", "longest_episode")}
        state |= {"algo": ALGO, "args": asdict(replace(self.args, resume=None)), "rng": torch.get_rng_state()}
        state |= {"seconds": time.time() - self.start_time, "cuda_rng": torch.cuda.get_rng_state_all()}
        state["monitor_size"] = (self.dir / "monitor.csv").stat().st_size
        torch.save(state, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        self.saved_step = self.step

    def advance(self, envs) -> None:
        """Counts a step of all environments, and writes down the episodes that it ended."""
        self.step += envs.num_envs
        for _, episode_return, length in envs.episodes:
            self.longest_episode = max(self.longest_episode, length)
            self.recent_returns.append(episode_return)
            self.monitor.write(f"{episode_return:.6f},{length},{time.time() - self.start_time:.6f}\n")
            self.writer.add_scalar("charts/episodic_return", episode_return, self.step)
            self.writer.add_scalar("charts/episodic_length", length, self.step)

    def log(self, metrics: list[dict[str, Tensor]], **charts: float) -> None:
        """Writes losses/*, the means of `metrics`, and charts/*; stops where a loss is not finite."""
        charts["SPS"] = self.step / (time.time() - self.start_time)
        scalars = {f"charts/{name}": value for name, value in charts.items()}
        for name in dict.fromkeys(itertools.chain(*metrics)):
            scalars[f"losses/{name}"] = value = torch.stack([x[name] for x in metrics if name in x]).mean().item()
            if not math.isfinite(value):
                fail(f"{name} not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.step)
        self.bar.set_postfix({"return": f"{np.mean(self.recent_returns or [np.nan]):.1f}"}, refresh=False)
        self.bar.update(self.step - self.bar.n)

    def finish(self, policy: nn.Module) -> dict:
        """Last checkpoint; then, unless the run was interrupted, policy.pt2, the evaluation and the last two lines."""
        self.checkpoint()
        self.bar.close()
        if self.stopped:
            print(f"stopped at step {self.step}; to go on: --resume {self.dir}", file=sys.stderr)
            raise SystemExit(130)
        export_policy(policy, self.envs, self.dir / "policy.pt2")
        limit = self.envs.time_limit or 10 * self.longest_episode or 1000
        if self.envs.time_limit is None:
            print(f"{self.args.env_id} has no time limit: evaluation cuts episodes after {limit} steps")
        returns = evaluate(policy, self.args, type(self.envs), max_episode_steps=limit)
        self.writer.add_scalar("eval/episodic_return", returns.mean(), self.step)
        print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        print(f"run directory: {self.dir}", flush=True)
        return {"run_dir": self.dir, "returns": returns}


@torch.no_grad()
def evaluate(policy: nn.Module, args: Args, envs_class: type = Envs, **kwargs) -> np.ndarray:
    """Returns (eval_episodes,) of the deterministic policy; episode i is reset with seed + 1 000 000 + i."""
    envs, training = envs_class(args, min(args.num_envs, args.eval_episodes), **kwargs), policy.training
    returns, device = np.full(args.eval_episodes, np.nan), next(policy.parameters()).device
    policy.eval()
    for first in range(0, args.eval_episodes, envs.num_envs):
        obs, playing = envs.reset(args.seed + 1_000_000 + first), returns[first : first + envs.num_envs]
        while np.isnan(playing).any():
            obs, *_ = envs.step(policy(torch.as_tensor(obs, device=device)))
            for i, episode_return, _ in envs.episodes:
                if i < len(playing) and np.isnan(playing[i]):
                    playing[i] = episode_return
    envs.close()
    policy.train(training)
    return returns


def export_policy(policy: nn.Module, envs, path: Path) -> None:
    """Saves `policy.forward` (and all its weights): `torch.export.load(path).module()(obs)`, any batch size."""
    example = torch.as_tensor(np.stack([envs.observation_space.sample()] * 2).astype(envs.dtype))
    policy, shapes = copy.deepcopy(policy).cpu().eval(), ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=shapes), path)


if __name__ == "__main__":
    train(parse_args())
