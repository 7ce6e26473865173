"""DQN from pixels, on Atari (Mnih et al. 2015), by default Double DQN (van Hasselt et al. 2016, arXiv 1509.06461).

The algorithm is that of dqn.py,

    y_t  = r_t + γ r_{t+1} + … + γᵐ⁻¹ r_{t+m−1} + γᵐ Q_θ⁻(s_{t+m}, a*)      no last term if s_{t+m} is terminal
    a*   = argmax_a Q_θ(s_{t+m}, a)                          Double DQN; plain DQN lets Q_θ⁻ choose as well
    L(θ) = E[ℓ(Q_θ(s_t, a_t) − y_t)]                         ℓ: Huber with threshold 1, or half the square

with a convolutional network. Details that matter, and why:
- The replay buffer holds every image once, and builds the observations of 4 images when they are drawn: a million
  transitions take 7.1 GB instead of 56.
- ale_py's own C++ environments: a step is 4 frames, the last two of them maximised (sprites flicker), grey, 84 × 84;
  an observation is the newest 4 of such images. A step is an agent's step: 1 M steps are 4 M frames.
- Two protocols. `machado` (Machado et al. 2018, arXiv 1709.06009): the emulator repeats the last action with
  probability 0.25, and a lost life is no termination. `nature` (Mnih et al. 2015): no such repetition, up to 30 frames
  without action at the start, and a lost life is a termination for learning, though the game goes on; FIRE is pressed
  for the agent at a game's start, as in OpenAI's Baselines, but not after a lost life. Under both a game ends after
  108 000 frames at the latest; Mnih et al. evaluated for 5 minutes, 18 000.
- The training reward is the sign of the game's, so that one step size does for all games; what is logged and evaluated
  is the score of full games, unclipped, under both protocols.
- ε falls from 1 to 0.01 over the first tenth of the run; one gradient step for every 4 steps, after 80k random ones:
  that is the default 2 after a step of 8 environments; with another number of them `--gradient-steps` is to be changed.

Against Stable-Baselines3: the same update as DQN with CnnPolicy and `--no-double` (parameters agree to 1e-4,
tests/test_dqn_atari.py).

    python algos/dqn_atari.py --buffer-size 400_000          # ALE/Pong-v5
    python algos/dqn_atari.py --env-id ALE/Breakout-v5 --protocol nature --n-step 3
    python algos/dqn_atari.py --env-id My/Pixels-v0          # any environment with stacks of uint8 images (C, H, W)
    torchrun --nproc-per-node 2 algos/dqn_atari.py           # data parallel: each process has its own environments and
                                                             # buffer (after --resume all begin with rank 0's buffer)
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.save_video import capped_cubic_video_schedule, save_video
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of everything random; same seed, same machine and thread count: same bits on CPU"""
    total_timesteps: int = 10_000_000
    """environment steps of 4 frames, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks and the replay buffer live; auto takes CUDA when there is one"""
    torch_threads: int = 2
    """CPU threads for PyTorch; on the CPU as many as there are cores is fastest"""
    compile: bool = False
    """compile the gradient with torch.compile (CUDA graphs on a GPU)"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 1_000_000
    """environment steps between checkpoints, which hold the replay buffer too"""
    eval_episodes: int = 10
    """games of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """film games 0, 1, 8, 27, 64 … of the first environment, as the agent sees them, in the run directory's videos/"""

    # environment
    env_id: str = "ALE/Pong-v5"
    """gymnasium environment: one of ale_py's, or another whose observations are uint8 images (C, H, W)"""
    num_envs: int = 8
    """parallel environments N (per process)"""
    protocol: Literal["machado", "nature"] = "machado"
    """machado: sticky actions, lives do not count; nature: random starts, for learning a lost life is a termination"""
    full_action_space: bool = False
    """all 18 actions of the console, as Machado et al., instead of those that do something in the game"""
    clip_rewards: bool = True
    """learn from the rewards' signs"""

    # algorithm
    buffer_size: int = 1_000_000
    """images that the replay buffer holds (per process): a few more than transitions, 7 KB each; --resume needs twice
    the memory for a moment"""
    learning_starts: int = 80_000
    """environment steps with random actions before the first update"""
    batch_size: int = 32
    """transitions per gradient step (per process)"""
    train_frequency: int = 1
    """steps of every environment between updates"""
    gradient_steps: int = 2
    """gradient steps per update, whatever the number of environments"""
    learning_rate: float = 1e-4
    """Adam's step size"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount γ"""
    n_step: int = 1
    """rewards n that a target sums before it bootstraps"""
    double: bool = True
    """let the network that is trained choose the target's action (Double DQN)"""
    loss: Literal["huber", "squared"] = "huber"
    """loss ℓ of a temporal difference"""
    max_grad_norm: float = 10.0
    """bound on the gradient's global norm"""
    target_frequency: int = 1_000
    """environment steps between updates of the target network, which come after a step of all environments"""
    tau: float = 1.0
    """share of the trained network in an update of the target network; 1 copies it"""
    exploration_start: float = 1.0
    """ε at the start"""
    exploration_end: float = 0.01
    """ε once --exploration-fraction of the run has passed"""
    exploration_fraction: float = 0.1
    """part of --total-timesteps over which it falls, linearly"""


RECOMMENDED = {"ALE/Pong-v5": dict(total_timesteps=3_000_000)}
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Network ----------------------------------------------------------------------------------------------------


class PixelQNetwork(nn.Module):
    """Q(s, ·) of images, for every action (Mnih et al. 2015, "Model architecture"; PyTorch's own initialisation).

    Observations are images (…, C, H, W) uint8; actions indices from 0. `forward` is the greedy policy, from
    observations to what the environment takes.
    """

    observation_dtype = torch.uint8

    def __init__(self, observation_space: Box, action_space: Discrete):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        convolutions = (observation_space.shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)
        layers = [x for sizes in convolutions for x in (nn.Conv2d(*sizes), nn.ReLU(inplace=True))] + [nn.Flatten()]
        with torch.no_grad():
            features = nn.Sequential(*layers)(torch.zeros(1, *observation_space.shape)).shape[1]
        layers += [nn.Linear(features, 512), nn.ReLU(inplace=True), nn.Linear(512, int(action_space.n))]
        self.network = nn.Sequential(*layers)

    def q_values(self, obs: Tensor) -> Tensor:
        """Q(s, ·), shape (B, A)."""
        return self.network(obs.to(torch.float32, memory_format=torch.channels_last).div_(255))

    def to_env(self, actions: Tensor) -> Tensor:
        """Indices moved to the space's start."""
        return actions + int(self.action_space.start)

    def forward(self, obs: Tensor) -> Tensor:
        """The action of highest value."""
        return self.to_env(self.q_values(obs).argmax(-1))


# Replay -----------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Steps of an environment, first dimension B; each next observation is the one that its step truly led to.

    A one-step target needs `terminated` alone. An n-step target must not go on past `truncated` either, nor past the
    newest rows of a buffer: n_step_transitions of dqn.py.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    truncated: Tensor


class FrameBuffer:
    """The newest transitions of N environments whose observations are their newest K images; each is stored once.

    Every environment has a ring of rows, one image each: all K of an episode's first observation, then the newest one
    of every next observation. The row of an observation's newest image also holds what was done there and what came
    of it, and is `usable` as long as that and all K images are there.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space: Box, device: torch.device):
        self.stack, *size = observation_space.shape
        self.length = capacity // num_envs
        needed = num_envs * self.length * (int(np.prod(size)) + 9)
        if self.length <= self.stack + 1:
            fail(f"--buffer-size {capacity} must be at least {self.stack + 2} images for each of the {num_envs} envs")
        if needed > (free := free_memory(device)):
            fail(
                f"--buffer-size {capacity} needs {needed:,} bytes, and {device} has {free:,} free: choose a smaller one"
            )
        rows = num_envs * self.length
        self.images = torch.zeros(rows, *size, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(rows, dtype=torch.int16, device=device)
        self.rewards = torch.zeros(rows, device=device)
        self.terminated, self.truncated, self.usable = torch.zeros(3, rows, dtype=torch.bool, device=device)
        self.newest = torch.full((num_envs,), -1)  # number of every environment's newest image, counted from 0
        self.begins = torch.ones(num_envs, dtype=torch.bool)

    def rows(self, counts: Tensor, envs: Tensor) -> Tensor:
        """Rows of the environments' images number `counts`, of any shape."""
        return envs * self.length + counts % self.length

    def push(self, envs: Tensor, images: Tensor) -> None:
        """One more image (E, H, W) for each of the environments (E,); forgets what it overwrites a part of."""
        self.newest[envs] += 1
        rows = self.rows(self.newest[envs], envs)
        self.images[rows] = images.to(self.images.device)
        self.usable[self.rows(self.newest[envs] + self.stack - 1, envs)] = False

    def add(self, obs, actions, rewards, next_obs, terminated, truncated, ended) -> None:
        """One step of all environments, each (N, …); `ended` where the next observation is another episode's."""
        obs, next_obs = torch.as_tensor(obs), torch.as_tensor(next_obs)
        if not obs[:, 1:].equal(next_obs[:, :-1]):
            fail("an observation is not the one before with a newer image at its end: use ppo_atari.py", code=1)
        envs = torch.arange(len(obs))
        for k in range(self.stack):
            self.push(envs[self.begins], obs[self.begins, k])
        rows = self.rows(self.newest, envs)
        for stored, new in zip(
            (self.actions, self.rewards, self.terminated, self.truncated), (actions, rewards, terminated, truncated)
        ):
            stored[rows] = torch.as_tensor(new, device=stored.device).to(stored.dtype)
        self.push(envs, next_obs[:, -1])
        self.usable[rows] = True
        self.begins = torch.as_tensor(ended)

    def draw_rows(self, batch_size: int) -> Tensor:
        """Usable rows (B,) drawn uniformly, with replacement."""
        filled = min(int(self.newest.max()) + 1, self.length)
        found = []
        while sum(map(len, found)) < batch_size:
            draws = torch.randint(len(self.newest) * filled, (2 * batch_size,), device=self.usable.device)
            rows = draws // filled * self.length + draws % filled
            found.append(rows[self.usable[rows]])
        return torch.cat(found)[:batch_size]

    def after(self, rows: Tensor, steps) -> Tensor:
        """Rows of the same environments that many images later, or before."""
        return rows // self.length * self.length + (rows + steps) % self.length

    def observations(self, rows: Tensor) -> Tensor:
        """The observations (B, K, H, W) whose newest images are in rows (B,)."""
        window = self.after(rows.unsqueeze(1), torch.arange(1 - self.stack, 1, device=rows.device))
        return self.images.index_select(0, window.flatten()).unflatten(0, window.shape)

    def get(self, rows: Tensor, n: int, gamma: float) -> tuple[Transitions, Tensor]:
        """Transitions over m steps from rows (B,), with r_t + … + γᵐ⁻¹ r_{t+m−1} for their reward, and γᵐ (B,).

        m = n, or less where the episode or the buffer ends before (Sutton & Barto 2018, eq. 7.1).
        """
        steps = torch.arange(n, device=rows.device)
        window = self.after(rows.unsqueeze(1), steps)  # (B, n)
        ends = self.terminated[window] | ~self.usable[self.after(window, 1)]
        counts = ends.int().cumsum(1) - ends.int() == 0  # up to the first end, and with it
        length = counts.sum(1)
        last = window.gather(1, length.unsqueeze(1) - 1).squeeze(1)
        rewards = (self.rewards[window] * counts * gamma**steps).sum(1)
        transitions = Transitions(
            self.observations(rows),
            self.actions[rows].long(),
            rewards,
            self.observations(self.after(last, 1)),
            self.terminated[last],
            self.truncated[last],
        )
        return transitions, gamma**length

    def state_dict(self) -> dict:
        """The rows that have been filled (N, …), and where the next ones go."""
        filled, envs = min(int(self.newest.max()) + 1, self.length), len(self.newest)
        names = ("images", "actions", "rewards", "terminated", "truncated", "usable")
        tensors = {name: getattr(self, name).unflatten(0, (envs, self.length))[:, :filled] for name in names}
        return {name: x if filled == self.length else x.clone() for name, x in tensors.items()} | {
            "newest": self.newest
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave; every environment then begins an episode."""
        state, envs = dict(state), len(self.newest)
        self.newest.copy_(state.pop("newest"))
        for name, x in state.items():
            getattr(self, name).unflatten(0, (envs, self.length))[:, : x.shape[1]] = x
        self.begins[:] = True


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The maths --------------------------------------------------------------------------------------------------


def linear_schedule(start: float, end: float, progress: float) -> float:
    """From start to end as `progress` goes from 0 to 1, and end from there on."""
    return start + (end - start) * min(progress, 1.0)


def epsilon_greedy(q_values: Tensor, epsilon: float) -> Tensor:
    """Actions (N,): with probability ε any, else the one of highest value; q_values (N, A)."""
    anything = torch.randint(q_values.shape[-1], q_values.shape[:-1], device=q_values.device)
    explore = torch.rand(q_values.shape[:-1], device=q_values.device) < epsilon
    return torch.where(explore, anything, q_values.argmax(-1))


def q_target(rewards, terminated, discounts, next_target_q: Tensor, next_q: Tensor | None = None) -> Tensor:
    """y = r + γᵐ Q_θ⁻(s', a*), shape (B,), without the second term where s' is terminal.

    Q_θ⁻(s', ·) is `next_target_q` (B, A). a* is what `next_q`, Q_θ(s', ·), holds highest (Double DQN, the
    unnumbered equation of arXiv 1509.06461), or without it what Q_θ⁻ does (DQN, eq. 3 there).
    """
    choosing = next_target_q if next_q is None else next_q
    next_values = next_target_q.gather(1, choosing.argmax(1, keepdim=True)).squeeze(1)
    return rewards + discounts * next_values * ~terminated


METRICS = ("td_loss", "q_values")


def dqn_loss(network, target, batch: Transitions, discounts: Tensor | float, args: Args) -> tuple[Tensor, Tensor]:
    """The loss L(θ) of a minibatch, and METRICS (2,); discounts γᵐ are (B,), or one for all."""
    with torch.no_grad():
        next_q = network.q_values(batch.next_observations) if args.double else None
        next_target_q = target.q_values(batch.next_observations)
        targets = q_target(batch.rewards, batch.terminated, discounts, next_target_q, next_q)
    q_values = network.q_values(batch.observations).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    loss = F.smooth_l1_loss(q_values, targets) if args.loss == "huber" else 0.5 * F.mse_loss(q_values, targets)
    return loss, torch.stack([loss, q_values.mean()]).detach()


def vector_adam(module: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam on all parameters of `module` as one vector (P,), of which they become views: a step is a few operations.

    Gradients reach the vector through `gradient_vector` and the function below it alone: after `loss.backward()` the
    optimiser's step moves nothing, and clipping the parameters' gradients clips nothing. The module has to be complete
    and on its device before; a parameter that is replaced or moved later is trained no more, without an error.
    """
    parameters = list(module.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    nn.utils.vector_to_parameters(vector.data, parameters)
    return torch.optim.Adam([vector], learning_rate, fused=True)


def gradient_vector(loss: Tensor, module: nn.Module) -> Tensor:
    """∇loss with respect to all parameters of `module`, each of which has to take part in it, as one vector (P,): its
    mean over the processes."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return average(torch.cat([x.flatten() for x in gradients]))


def adam_step(optimizer: torch.optim.Adam, gradient: Tensor) -> None:
    """One step of a `vector_adam`, down this gradient (P,): the kernel of `optimizer.step()`, and its state, by hand.

    The same bits, without what PyTorch does around the kernel for optimisers of many parameters. Weight decay, amsgrad
    and hooks are left out: for them, or for another optimiser, set the vector's .grad and call `optimizer.step()`.
    """
    group = optimizer.param_groups[0]
    vector, (beta1, beta2) = group["params"][0], group["betas"]
    state = optimizer.state[vector]
    if not state:
        state["step"] = torch.zeros((), device=vector.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(vector.data), torch.zeros_like(vector.data)
    steps = state["step"].add_(1)
    torch._fused_adam_(
        [vector.data],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [steps],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=0,
        amsgrad=False,
        maximize=False,
    )


def dqn_gradient(network, target, batch: Transitions, discounts: Tensor | float, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch, of norm --max-grad-norm at most, and METRICS (2,)."""
    loss, metrics = dqn_loss(network, target, batch, discounts, args)
    gradient = gradient_vector(loss, network)
    return gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1), metrics


def dqn_update(network, target, optimizer, batch, discounts, args: Args, gradient_of=dqn_gradient) -> Tensor:
    """One gradient step on a minibatch, with a `vector_adam(network)`. Returns METRICS before it."""
    gradient, metrics = gradient_of(network, target, batch, discounts, args)
    adam_step(optimizer, gradient)
    return metrics


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's, do not follow."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000
"""Environment steps between two points of losses/*, which are means over the updates since the last one."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    if args.exploration_fraction <= 0:
        fail(f"--exploration-fraction {args.exploration_fraction} must be positive")
    spaces = check_pixel_spaces(args)
    network = PixelQNetwork(*spaces).to(device)
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = vector_adam(network, args.learning_rate)
    gradient_of = compiled(dqn_gradient, device) if args.compile else dqn_gradient
    buffer = FrameBuffer(args.buffer_size, args.num_envs, spaces[0], device)
    run = Run(args, rank, {"network": network, "target": target, "optimizer": optimizer, "buffer": buffer})
    envs = make_pixel_envs(args, args.num_envs)
    videos = f"videos_from_step_{run.step}" if args.resume else "videos"
    film = Film(run.dir / videos if args.capture_video and rank == 0 else None)

    obs, infos = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    lives = infos.get("lives", np.zeros(args.num_envs))
    metrics = []
    logged_step = run.step
    while run.step < args.total_timesteps and not run.interrupted():
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / args.total_timesteps)

        # Collect a few steps from every environment.
        for _ in range(args.train_frequency):
            progress = run.step / (args.exploration_fraction * args.total_timesteps)
            exploration = linear_schedule(args.exploration_start, args.exploration_end, progress)
            if run.step < args.learning_starts:
                actions = torch.randint(int(spaces[1].n), (args.num_envs,), device=device)
            else:
                with torch.no_grad():
                    actions = epsilon_greedy(network.q_values(to_device(obs, device)), exploration)
            acted_on = obs
            film.add(obs)
            obs, next_obs, rewards, terminated, truncated, infos = step_pixel_envs(envs, network.to_env(actions))
            ended = terminated | truncated
            film.cut(ended)
            if args.protocol == "nature":
                lives, before = infos.get("lives", lives), lives
                terminated = terminated | (lives < before)
            rewards = np.sign(rewards) if args.clip_rewards else rewards
            buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated, ended)
            step, run.step = run.step, run.step + args.num_envs * world_size
            run.log_episodes(infos)
            if step // args.target_frequency < run.step // args.target_frequency:
                polyak_update(target, network, args.tau)

        # Update on minibatches of everything in the buffer.
        if run.step > args.learning_starts:
            for _ in range(args.gradient_steps):
                batch, discounts = buffer.get(buffer.draw_rows(args.batch_size), args.n_step, args.gamma)
                metrics.append(dqn_update(network, target, optimizer, batch, discounts, args, gradient_of).clone())

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            losses = average(torch.stack(metrics).mean(0)).tolist() if metrics else []
            run.log(dict(zip(METRICS, losses)), exploration=exploration, learning_rate=optimizer.param_groups[0]["lr"])
            metrics, logged_step = [], run.step
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(network)


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings or, on --resume, the run's own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--resume")
    known, _ = early.parse_known_args(argv)
    defaults = Args(**{"env_id": known.env_id, **RECOMMENDED.get(known.env_id, {})})
    if known.resume:
        try:
            saved = json.loads((Path(known.resume) / "args.json").read_text())["args"]
            saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
            defaults = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"--resume {known.resume}: not the directory of a run of {ALGO}.py ({error})")
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    description = f"{__doc__.splitlines()[0]}\n\nRecommended settings, taken with --env-id alone:\n\n{table}"
    args = tyro.cli(Args, default=defaults, args=argv, description=description)
    if known.resume and replace(args, resume=None, total_timesteps=defaults.total_timesteps) != defaults:
        fail("--resume goes on with the run's own arguments; only --total-timesteps may be changed beside it")
    return args


def set_up(args: Args) -> tuple[int, int, torch.device]:
    """Seeds, threads, device; meets the other processes under torchrun. Returns (rank, world size, device)."""
    for name, value in asdict(args).items():
        if type(value) is int and value < 1 and name != "seed":
            fail(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed} must be from 0 to 2³² − 1")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if kind != "cpu" and not getattr(torch, kind).is_available():
        fail(f"--device {kind}: PyTorch {torch.__version__} finds no such device here; use --device auto")
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA's
    torch.set_num_threads(args.torch_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)  # neither is drawn from here: a checkpoint has PyTorch's state alone
    torch.manual_seed(args.seed)
    return rank, max(world_size, 1), torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def average(x: Tensor) -> Tensor:
    """Mean over the processes of torchrun; x itself where there is only one."""
    if not dist.is_initialized():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, a backward pass within the function included; on CUDA replayed as CUDA graphs."""
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # an older PyTorch splits the graph at autograd.grad
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """An array's copy on the device; on its way to CUDA from pinned memory, without waiting."""
    x = torch.from_numpy(np.array(x))
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def make_pixel_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """Environments of the protocol that reset within the step that ends an episode; rewards are the game's own.

    ale_py steps its environments in C++ threads; other environments with images are stepped one after another.
    """
    gym.register_envs(ale_py)
    options = dict(autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    nature = args.protocol == "nature"
    try:
        if args.env_id.startswith("ALE/"):
            options |= dict(repeat_action_probability=0.0 if nature else 0.25, noop_max=30 if nature else 0)
            options |= dict(use_fire_reset=nature, reward_clipping=False, full_action_space=args.full_action_space)
            envs = gym.make_vec(args.env_id, num_envs, **options)
        else:
            envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync", vector_kwargs=options)
    except (gym.error.Error, ImportError, AssertionError) as error:
        fail(f"--env-id {args.env_id}: {' '.join(str(error).split())}")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def check_pixel_spaces(args: Args) -> tuple[Box, Discrete]:
    """One environment's observation and action space; refuses what the network cannot take."""
    envs = make_pixel_envs(args, 1)
    envs.close()
    images, actions = envs.single_observation_space, envs.single_action_space
    if not isinstance(images, Box) or images.dtype != np.uint8 or len(images.shape) != 3 or min(images.shape[1:]) < 36:
        fail(
            f"{args.env_id} has the observation space {images}; {ALGO} needs uint8 images (C, H, W) of at least "
            "36 × 36. Atari's games are called ALE/Breakout-v5 and so on; for vectors use ppo.py or dqn.py."
        )
    if not isinstance(actions, Discrete):
        fail(f"{args.env_id} has the action space {actions}; {ALGO} needs Discrete.")
    return images, actions


def step_pixel_envs(envs: gym.vector.VectorEnv, actions: Tensor) -> tuple:
    """(observation to act on, observation reached, rewards, terminated, truncated, infos).

    The two observations differ where an episode ended: it reached its final one, and the next one has begun.
    """
    obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
    reached, ended = obs, terminated | truncated
    if ended.any():
        reached = obs.copy()
        for i in np.flatnonzero(ended):
            reached[i] = infos["final_obs"][i]
    if not np.isfinite(rewards).all():
        fail("the environment gave a reward that is not finite; the last checkpoint stays", code=1)
    return obs, reached, rewards, terminated, truncated, infos


class Film:
    """Episodes 0, 1, 8, 27, 64 … of the first environment, as the agent sees them; none where there is no folder."""

    def __init__(self, folder: Path | None):
        self.folder, self.frames, self.episode = folder, [], 0

    def add(self, obs: np.ndarray) -> None:
        """The newest image of the first environment's observation; obs (N, C, H, W)."""
        if self.folder and capped_cubic_video_schedule(self.episode):
            self.frames.append(np.repeat(obs[0, -1, :, :, None], 3, axis=2))

    def cut(self, ended: np.ndarray) -> None:
        """Writes the film where the first environment's episode has ended (N,)."""
        if self.folder and ended[0]:
            if self.frames:
                save_video(self.frames, str(self.folder), fps=15, episode_index=self.episode)
            self.frames, self.episode = [], self.episode + 1


class Run:
    """A run directory and all that goes into it: arguments, episodes, metrics, checkpoints, the exported policy.

    `modules` (anything with a state_dict) are what a checkpoint holds beside the counters and PyTorch's random state;
    one that is made later is not resumed, and begins differently in every process. Under torchrun only rank 0 writes.
    """

    def __init__(self, args: Args, rank: int, modules: dict):
        self.args, self.rank, self.modules, self.signals, self.stopped = args, rank, modules, [], False
        self.step, self.saved_step, self.seconds, self.monitor_size = 0, 0, 0.0, 0
        self.dir = Path(args.resume) if args.resume else None
        if args.resume:
            self.restore()
        elif rank == 0:
            self.dir = self.new_dir()
        self.start_step, self.start_time = self.step, time.time() - self.seconds
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if rank > 0:
            torch.manual_seed(args.seed + self.step + rank)
            return
        about = {"algo": ALGO, "args": asdict(replace(args, resume=None))}
        about["versions"] = {"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, gym, np)}
        about["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (self.dir / "args.tmp").write_text(json.dumps(about, indent=2) + "\n")
        os.replace(self.dir / "args.tmp", self.dir / "args.json")
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if args.resume else None)
        self.monitor = open(self.dir / "monitor.csv", "a", buffering=1)
        self.monitor.truncate(self.monitor_size)  # episodes after the checkpoint will be lived through again
        if self.monitor_size == 0:
            header = {"t_start": self.start_time, "env_id": args.env_id}
            self.monitor.write(f"#{json.dumps(header)}\nr,l,t\n")
            self.checkpoint()
        self.recent_returns = deque(maxlen=100)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", desc=args.env_id, mininterval=0.5)

    def new_dir(self) -> Path:
        """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}, or the first of …_1, …_2 that does not exist yet."""
        name = f"{self.args.env_id.replace('/', '-')}__{ALGO}__{self.args.seed}__{int(time.time())}"
        for n in itertools.count():
            path = Path(self.args.output_dir) / (f"{name}_{n}" if n else name)
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                pass
            except OSError as error:
                fail(f"--output-dir {self.args.output_dir}: {error}")

    def on_signal(self, number: int, frame) -> None:
        """Ctrl-C and SIGTERM let the iteration in progress end; a second one stops at once."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def interrupted(self) -> bool:
        """Whether this process, or another one under torchrun, was asked to stop."""
        self.stopped = average(torch.tensor(float(len(self.signals)))).item() > 0
        return self.stopped

    def checkpoint(self) -> None:
        """Writes checkpoint.pt under another name and renames it: whenever the process dies, a whole one is there."""
        if self.rank > 0:
            return
        weights = [x for module in self.modules.values() if isinstance(module, nn.Module) for x in module.parameters()]
        if not all(x.isfinite().all() for x in weights):
            fail(f"a weight is not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"step": self.step, "seconds": time.time() - self.start_time}
        state["monitor_size"] = (self.dir / "monitor.csv").stat().st_size
        state["rng"] = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save(state, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        self.saved_step = self.step

    def restore(self) -> None:
        """Loads checkpoint.pt into the modules, the counters and PyTorch's random state."""
        try:
            state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.step = self.saved_step = state["step"]
            self.seconds, self.monitor_size = state["seconds"], state["monitor_size"]
            torch.set_rng_state(state["rng"]["torch"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        except Exception as error:  # whatever is wrong with the file, it is no checkpoint of this run
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            fail(f"--resume {self.dir}: checkpoint.pt cannot be used ({reason})")

    def log_episodes(self, infos: dict) -> None:
        """Writes the episodes that ended in this step to monitor.csv and TensorBoard."""
        if self.rank > 0 or "episode" not in infos:
            return
        for i in np.flatnonzero(infos["_episode"]):
            episode_return, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            self.monitor.write(f"{episode_return:.6f},{length},{time.time() - self.start_time:.6f}\n")
            self.writer.add_scalar("charts/episodic_return", episode_return, self.step)
            self.writer.add_scalar("charts/episodic_length", length, self.step)
            self.recent_returns.append(episode_return)

    def log(self, losses: dict[str, float], **charts: float) -> None:
        """Writes losses/* and charts/* to TensorBoard and moves the progress bar; stops where a loss is not finite."""
        bad = ", ".join(name for name, value in losses.items() if not np.isfinite(value))
        if bad:
            fail(f"{bad} not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        if self.rank > 0:
            return
        charts["SPS"] = (self.step - self.start_step) / (time.time() - self.start_time - self.seconds)
        for group, values in (("losses", losses), ("charts", charts)):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, self.step)
        if self.recent_returns:
            self.bar.set_postfix({"return": f"{np.mean(self.recent_returns):.1f}"}, refresh=False)
        self.bar.update(self.step - self.bar.n)

    def finish(self, policy: nn.Module) -> dict:
        """Last checkpoint; then, unless the run was interrupted, policy.pt2, the evaluation and the last two lines."""
        self.checkpoint()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank > 0:
            return {}
        self.bar.close()
        self.monitor.close()
        if self.stopped:
            print(f"stopped at step {self.step}; to go on: --resume {self.dir}", file=sys.stderr)
            raise SystemExit(130)
        export_policy(policy, self.dir / "policy.pt2")
        returns = evaluate(policy, self.args)
        self.writer.add_scalar("eval/episodic_return", returns.mean(), self.step)
        self.writer.close()
        print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        print(f"run directory: {self.dir}")
        return {"run_dir": self.dir, "returns": returns}


@torch.no_grad()
def evaluate_games(policy: nn.Module, args: Args) -> np.ndarray:
    """Scores (eval_episodes,) of fresh games under the protocol with the deterministic policy."""
    envs = make_pixel_envs(args, args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed + 1_000_000)
    scores, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    device = next(policy.parameters()).device
    while running.any():
        obs, _, rewards, terminated, truncated, _ = step_pixel_envs(envs, policy(to_device(obs, device)))
        scores += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return scores


evaluate = evaluate_games
"""What Run asks for."""


def export_policy(policy: nn.Module, path: Path) -> None:
    """Saves `policy.forward` for the CPU: `torch.export.load(path).module()(obs)`, any batch size.

    The module's other weights, critics for instance, go into the file as well.
    """
    policy = copy.deepcopy(policy).cpu()
    example = torch.as_tensor(np.stack([policy.observation_space.sample()] * 2), dtype=policy.observation_dtype)
    program = torch.export.export(policy, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


if __name__ == "__main__":
    train(parse_args())
