"""DQN: deep Q-learning (Mnih et al. 2015), by default Double DQN (van Hasselt et al. 2016, arXiv 1509.06461).

Acts ε-greedily on Q_θ, keeps every transition in a replay buffer, and after every few steps takes gradient steps on
minibatches from it, towards targets from a copy Q_θ⁻ of the network that is renewed at intervals,

    y_t  = r_t + γ r_{t+1} + … + γᵐ⁻¹ r_{t+m−1} + γᵐ Q_θ⁻(s_{t+m}, a*)      no last term if s_{t+m} is terminal
    a*   = argmax_a Q_θ(s_{t+m}, a)                          Double DQN; plain DQN lets Q_θ⁻ choose as well
    L(θ) = E[ℓ(Q_θ(s_t, a_t) − y_t)]                         ℓ: Huber with threshold 1, or half the square

where m = n (`--n-step`), or less where the episode ends before. Details that matter, and why:
- Double DQN: the maximum over noisy estimates is too high; choosing with one network and judging with the other
  takes most of that out.
- A time limit is not a termination: a truncated step bootstraps from its true final observation.
- n-step targets are not corrected for the actions of older policies, so keep n small; a window ends with its episode
  and with the newest step in the buffer, and bootstraps from there.
- Huber and the bound on the gradient's norm: one surprising reward must not undo the network. But where outcomes
  differ by much more than 1, Huber finds something near their median, not their mean: then `--loss squared`.
- At a constant learning rate the greedy policy is good at one moment and bad at the next: `--anneal-lr` where the
  last one counts.

Against Stable-Baselines3 (SB3): the same update with `--no-double` (parameters agree to 1e-5 after many updates, n-step
windows included, tests/test_dqn.py); SB3 has no Double DQN, no Boltzmann exploration and no squared loss.

    python algos/dqn.py                              # CartPole-v1
    python algos/dqn.py --env-id Acrobot-v1          # with its recommended settings
    python algos/dqn.py --n-step 5 --exploration boltzmann --exploration-end 0.5
    python algos/dqn.py --resume runs/Acrobot-v1__dqn__1__…
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

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]
NotNegative = Annotated[float, (0, sys.float_info.max, "0 or more")]


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Count = 100_000  # environment steps, over all environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where networks and replay buffer live; auto prefers CUDA
    torch_threads: Count = 1  # CPU threads for PyTorch; one is fastest for networks this small
    compile: bool = False  # compile loss and gradient with torch.compile: pays in runs of several minutes
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 50_000  # environment steps between checkpoints, which hold the replay buffer too
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on, of the first environment

    # environment
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 1  # parallel environments N

    # algorithm
    buffer_size: Count = 100_000  # transitions that the replay buffer holds
    learning_starts: Count = 1_000  # environment steps with random actions before the first update
    batch_size: Count = 128  # transitions per gradient step
    train_frequency: Count = 4  # steps of every environment between updates
    gradient_steps: Count = 4  # gradient steps per update, whatever the number of environments
    learning_rate: Positive = 6.3e-4  # Adam's step size
    anneal_lr: bool = False  # lower the learning rate linearly to 0 at --total-timesteps
    gamma: Fraction = 0.99  # discount γ
    n_step: Count = 1  # rewards n that a target sums before it bootstraps
    double: bool = True  # let the network that is trained choose the target's action (Double DQN)
    loss: Literal["huber", "squared"] = "huber"  # loss ℓ of a temporal difference
    max_grad_norm: Positive = 10.0  # bound on the gradient's global norm
    target_frequency: Count = 250  # environment steps between updates of the target network, after a step of all
    tau: Fraction = 1.0  # share of the trained network in an update of the target network; 1 copies it
    exploration: Literal["epsilon", "boltzmann"] = "epsilon"  # ε-greedy, or in proportion to exp(Q / temperature)
    exploration_start: NotNegative = 1.0  # ε or temperature at the start
    exploration_end: NotNegative = 0.1  # ε or temperature once --exploration-fraction of the run has passed
    exploration_fraction: Positive = 0.12  # part of --total-timesteps over which it falls, linearly
    hidden_sizes: tuple[Count, ...] = (256, 256)  # ReLU layers of the network


# fmt: off
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "CartPole-v1": dict(
        total_timesteps=50_000, train_frequency=64, gradient_steps=32, learning_rate=2e-3, anneal_lr=True, gamma=0.98,
        n_step=3, target_frequency=128, exploration_end=0.04, exploration_fraction=0.16, hidden_sizes=(128, 128)),
    "MountainCar-v0": dict(
        total_timesteps=120_000, buffer_size=10_000, train_frequency=16, gradient_steps=8, learning_rate=4e-3,
        gamma=0.98, target_frequency=600, exploration_end=0.07, exploration_fraction=0.2),
    **{name: dict(buffer_size=50_000, learning_starts=1) for name in ("Acrobot-v1", "LunarLander-v3")},
}
# fmt: on


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class QNetwork(nn.Module):
    """Q(s, ·) for every action. `forward` is the greedy policy, from observations to what the environment takes.

    Observations are (…, D) float32 or uint8 for a Box, (…,) int64 for a Discrete space; actions indices from 0.
    """

    def __init__(self, observation_space, action_space, hidden_sizes):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot = isinstance(observation_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.network = relu_mlp([inputs, *hidden_sizes, int(action_space.n)])

    def q_values(self, obs: Tensor) -> Tensor:
        """Q(s, ·), shape (…, A); a Discrete space's observations become one-hot."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        return self.network(obs.float())

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices moved to the space's start."""
        return actions + int(self.action_space.start)

    def forward(self, obs: Tensor) -> Tensor:
        """The action of highest value."""
        return self.to_env(self.q_values(obs).argmax(-1))


# Replay -----------------------------------------------------------------------------------------------------

# Steps of an environment, first dimension B; each next observation is the one that its step truly led to. A one-step
# target needs `terminated` alone; one of several steps must not go on past `truncated` either (see dqn.py).
Transitions = namedtuple("Transitions", "observations actions rewards next_observations terminated truncated")


class ReplayBuffer:
    """The newest transitions of N environments, in tensors that are allocated once.

    A step takes N rows, of capacity // N · N: row i + N, modulo that, is the step after row i's in its environment, but
    the newest N rows, before `position`, are followed by the oldest or by rows never written, which no flag marks.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space, action_space, device: torch.device):
        self.capacity, self.num_envs = max(capacity // num_envs, 1) * num_envs, num_envs
        self.position, self.size = 0, 0  # where the next step goes, and rows in use
        index, image = isinstance(observation_space, Discrete), observation_space.dtype == np.uint8
        observation = observation_space.shape, torch.int64 if index else torch.uint8 if image else torch.float32
        action = action_space.shape, torch.int64 if isinstance(action_space, Discrete) else torch.float32
        layout = Transitions(observation, action, ((), torch.float32), observation, ((), torch.bool), ((), torch.bool))
        needed = sum(self.capacity * math.prod(shape) * dtype.itemsize for shape, dtype in layout)
        if needed > (free := free_memory(device)):
            fail(f"--buffer-size {capacity} needs {needed:,} bytes, {device} has {free:,} free: choose a smaller one")
        self.data = Transitions(*(torch.zeros(self.capacity, *shape, dtype=x, device=device) for shape, x in layout))

    def add(self, *transitions) -> None:
        """One step of all environments: the fields of Transitions, each (N, …)."""
        rows = slice(self.position, self.position + self.num_envs)
        for stored, new in zip(self.data, transitions, strict=True):
            if stored.is_cpu:
                stored.numpy()[rows] = new  # NumPy writes a few numbers faster than PyTorch
            else:
                stored[rows] = torch.as_tensor(new)
        self.position = (self.position + self.num_envs) % self.capacity
        self.size = min(self.size + self.num_envs, self.capacity)

    def draw_rows(self, batch_size: int) -> Tensor:
        """Rows (B,) drawn uniformly, with replacement."""
        return torch.randint(self.size, (batch_size,), device=self.data.rewards.device)

    def get(self, rows: Tensor) -> Transitions:
        """The transitions in rows (B,)."""
        return Transitions(*(stored.index_select(0, rows) for stored in self.data))

    def state_dict(self) -> dict:
        """The rows in use, and where the next ones go; the newest end an episode, as a resumed run begins new ones."""
        state = {name: x[: self.size].clone() for name, x in self.data._asdict().items()}
        newest = (self.position - 1 - torch.arange(min(self.num_envs, self.size))) % self.capacity
        state["truncated"][newest] = ~state["terminated"][newest]
        return state | {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        for name, stored in self.data._asdict().items():
            stored[: len(state[name])] = state[name]
        self.position, self.size = state["position"], len(state["rewards"])


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


def boltzmann(q_values: Tensor, temperature: float) -> Tensor:
    """Actions (N,) in proportion to exp(Q / temperature), by the Gumbel-max trick; q_values (N, A)."""
    return (q_values / temperature - torch.empty_like(q_values).exponential_().log()).argmax(-1)


def n_step_transitions(buffer: ReplayBuffer, rows: Tensor, n: int, gamma: float) -> tuple[Transitions, Tensor]:
    """Transitions over m steps from `rows` (B,), with r_t + … + γᵐ⁻¹ r_{t+m−1} for their reward, and γᵐ (B,).

    m = n, or less where the episode or the buffer ends before (Sutton & Barto 2018, eq. 7.1).
    """
    steps = torch.arange(n, device=rows.device)
    window = (rows.unsqueeze(1) + steps * buffer.num_envs) % buffer.capacity  # (B, n)
    newest = (buffer.position - 1 - window) % buffer.capacity < buffer.num_envs
    ends = (buffer.data.terminated[window] | buffer.data.truncated[window] | newest).int()
    counts = ends.cumsum(1) - ends == 0  # up to the first end, and with it
    length = counts.sum(1)
    last = buffer.get(window.gather(1, length.unsqueeze(1) - 1).squeeze(1))
    rewards = (buffer.data.rewards[window] * counts * gamma**steps).sum(1)
    first = buffer.get(rows)
    return last._replace(observations=first.observations, actions=first.actions, rewards=rewards), gamma**length


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


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's statistics, are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for old, new in zip(target.buffers(), online.buffers()):
        old.copy_(new)


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000  # environment steps between two points of losses/*, which are means over the updates since the last


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        envs = Envs(args, args.num_envs, (Discrete,))
        if args.learning_starts >= args.total_timesteps:
            fail(f"--learning-starts {args.learning_starts} must be below --total-timesteps {args.total_timesteps}")
        explore = epsilon_greedy if args.exploration == "epsilon" else boltzmann
        lowest, highest = sorted([args.exploration_start, args.exploration_end])
        if highest > 1 if args.exploration == "epsilon" else lowest == 0:
            fail("--exploration-start and --exploration-end are at most 1 for epsilon, and positive for boltzmann")
        spaces = envs.observation_space, envs.action_space
        network = QNetwork(*spaces, args.hidden_sizes).to(run.device)
        target = copy.deepcopy(network).requires_grad_(False).eval()
        optimizer = lean(torch.optim.Adam(network.parameters(), args.learning_rate, fused=True))
        gradient_of = torch.compile(dqn_gradient) if args.compile else dqn_gradient
        buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, run.device)
        q_values = torch.no_grad()(network.q_values)
        run.start(envs, network=network, target=target, optimizer=optimizer, buffer=buffer)  # what a checkpoint holds

        obs, metrics, logged_step = envs.reset(args.seed + run.step), [], run.step
        while run.goes_on():
            for group in optimizer.param_groups:
                remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * remaining

            # Collect a few steps from every environment.
            for _ in range(args.train_frequency):
                progress = min(run.step / (args.exploration_fraction * args.total_timesteps), 1.0)
                exploration = args.exploration_start + (args.exploration_end - args.exploration_start) * progress
                if run.step < args.learning_starts:
                    actions = torch.randint(int(envs.action_space.n), (args.num_envs,), device=run.device)
                else:
                    actions = explore(q_values(torch.as_tensor(obs, device=run.device)), exploration)
                acted_on = obs
                obs, next_obs, rewards, terminated, truncated = envs.step(network.to_env(actions))
                buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated)
                run.advance(envs)
                if run.step % args.target_frequency < args.num_envs:  # it has just passed a multiple
                    polyak_update(target, network, args.tau)

            # Update on minibatches of everything in the buffer.
            for _ in range(args.gradient_steps if run.step > args.learning_starts else 0):
                rows = buffer.draw_rows(args.batch_size)
                if args.n_step == 1:
                    batch, discounts = buffer.get(rows), args.gamma
                else:
                    batch, discounts = n_step_transitions(buffer, rows, args.n_step, args.gamma)
                optimizer.zero_grad()
                metrics.append(gradient_of(network, target, batch, discounts, args))
                optimizer.step()

            if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
                run.log(metrics, exploration=exploration, learning_rate=optimizer.param_groups[0]["lr"])
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


class LeanAdam(torch.optim.Adam):
    """A fused torch.optim.Adam with less Python around its kernel: the same bits, sooner.

    A step that is to do more (a closure, hooks, AMSGrad, a scaler, the first) is torch.optim.Adam's own.
    """

    options = "amsgrad", "maximize", "decoupled_weight_decay"
    hooks = [x for name, x in vars(sys.modules[torch.optim.Optimizer.__module__]).items() if "_optimizer_p" in name]

    def step(self, closure=None):
        """Follows every .grad that there is."""
        hooked = any(self.hooks) or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if (
            closure
            or hooked
            or hasattr(self, "found_inf")
            or not all(
                group["fused"] and not any(map(group.get, self.options)) and all(map(self.state.get, parameters))
                for group, parameters in work
            )
        ):
            return super().step(closure)
        with torch.no_grad():
            for group, parameters in work:
                states = [self.state[p] for p in parameters]
                steps, means, squares = ([x[name] for x in states] for name in ("step", "exp_avg", "exp_avg_sq"))
                numbers = dict(zip(("beta1", "beta2"), group["betas"]), amsgrad=False, maximize=False)
                numbers |= {name: group[name] for name in ("lr", "weight_decay", "eps")}
                if parameters:
                    torch._foreach_add_(steps, 1)
                    torch._fused_adam_(parameters, [p.grad for p in parameters], means, squares, [], steps, **numbers)

    step.hooked = True  # the parent's calls the hooks

    def zero_grad(self, set_to_none=True):
        """Forgets the gradients."""
        if not set_to_none:
            return super().zero_grad(False)
        for parameter in itertools.chain(*(group["params"] for group in self.param_groups)):
            parameter.grad = None


def lean(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer; a torch.optim.Adam becomes a LeanAdam."""
    if type(optimizer) is torch.optim.Adam:
        optimizer.__class__ = LeanAdam
    return optimizer


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
