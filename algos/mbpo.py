"""MBPO: model-based policy optimisation (Janner et al. 2019, arXiv 1906.08253): SAC on what a learned model imagines.

Every `--model-frequency` steps in the environment, an ensemble of probabilistic networks learns from all of them what
a step does (algorithm 2),

    p_θᵢ(s', r | s, a) = N(μ_i(s, a), diag σ_i²(s, a))      of the change s' − s and of r, i = 1 … M
    L(θ) = Σ_i E[−log p_θᵢ(s', r | s, a)]                    each member on its own bootstrap of the data

then rolls it out for k steps from states that were really visited,

    s_0 ~ D_env,  a_t ~ π_φ(·|s_t),  s_{t+1}, r_t ~ p_θᵢ(·|s_t, a_t), i anew from the elites;  all of it goes to D_model

and after every step in the environment takes many gradient steps of soft actor-critic (sac.py) on minibatches that are
real in small part. Details that matter, and why:
- Short rollouts that branch off real states: a model's error compounds with the steps that it is followed for
  (theorem 4.3). `--rollout-lengths` lets k grow as the model gets better; with k = 1 this is Dyna.
- The ensemble is what keeps the policy from exploiting a model where it is wrong by chance: the members disagree there.
- Early stopping on a held-out part of the data; the members that predict it best are the elites.
- Inputs and outputs are standardised; log σ² is kept between two learned bounds, softly, so that it cannot run away.
- Imagined episodes end where the environment's would: by its own rule, for the environments in TERMINATION, or by what
  the ensemble learns of it. No rollout goes on past an end.
- D_model holds what the last `--model-buffer-age` steps' models have imagined: older rollouts are of older policies.
  It is of one size for that many full rollouts, so that where they end early older ones stay.
- Where data are few, an epoch is a few gradient steps: `--model-batch-size` and `--patience` must let the model learn
  all the same, or the policy learns in a world that is wrong. Where nothing in an environment is chaotic, as in
  Pendulum-v1, long rollouts show the policy what has not been visited yet.

`--value-expansion H` uses the model otherwise: the minibatches are real, and the critics' targets are rewards of H
imagined steps and the value after them, for the real step and for each imagined one (MVE, arXiv 1803.00101).
`--real-ratio` then has no use; without value expansion `--real-ratio 1` leaves the model out: SAC.

Against Stable-Baselines3, which has no MBPO: with real data alone this is sac.py, bit for bit (tests/test_mbpo.py),
whose parameters agree with SB3's to 1e-5 (tests/test_sac.py).

    python algos/mbpo.py                                     # Pendulum-v1: solved (−175) after 300 to 800 steps, where
                                                             # sac.py needs 2800 to 3800; benchmarks/README.md
    python algos/mbpo.py --env-id HalfCheetah-v5 --compile
    python algos/mbpo.py --value-expansion 3
    torchrun --nproc-per-node 2 algos/mbpo.py                # data parallel: each process has its own environments,
                                                             # buffers and bootstraps, but after --resume
                                                             # all begin with rank 0's buffers
"""

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of everything random; same seed, same machine and thread count: same bits on CPU"""
    total_timesteps: int = 5_000
    """environment steps, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks and the buffers live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; two are faster than one for layers of 256, if there are cores to spare"""
    compile: bool = False
    """compile the gradients with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of float32 products, see torch.set_float32_matmul_precision: below highest a GPU may round to TF32, with medium a
    CPU to bfloat16; medium also takes oneDNN's in place of MKL's: benchmarks/README.md has where that is faster"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 5_000
    """environment steps between checkpoints, which hold the model and both buffers too"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "Pendulum-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 1
    """parallel environments N (per process)"""

    # model
    ensemble_size: int = 7
    """members M of the ensemble"""
    num_elites: int = 5
    """members that imagine: those that predict the held-out data best"""
    model_hidden_sizes: tuple[int, ...] = (200, 200, 200, 200)
    """SiLU layers of each member"""
    model_learning_rate: float = 1e-3
    """Adam's step size for the ensemble"""
    model_weight_decay: float = 5e-5
    """weight of ½ Σ w² in the ensemble's loss"""
    model_batch_size: int = 256
    """transitions per gradient step of each member (per process)"""
    model_frequency: int = 250
    """environment steps between two trainings of the ensemble, each on all data so far"""
    holdout: float = 0.2
    """share of the data that is held out of a training, at most 5000 transitions"""
    patience: int = 5
    """a training ends when no member has become 1 % better on the held-out data for so many epochs"""
    model_epochs: int = 100
    """epochs after which a training ends in any case"""
    rollouts_per_step: int = 400
    """imagined rollouts per environment step, all begun after a training of the ensemble (per process)"""
    rollout_lengths: tuple[int, int, int, int] = (1, 1, 0, 1)
    """steps of a rollout: k₁ k₂ t₁ t₂ for a length that grows from k₁ at environment step t₁ to k₂ at t₂"""
    model_buffer_age: int = 1_000
    """environment steps after which an imagined transition is forgotten; later where rollouts end early"""
    real_ratio: float = 0.05
    """share of real transitions in a minibatch, without value expansion; 1 makes no use of the model"""
    value_expansion: int | None = None
    """H imagined steps in the targets of real minibatches, instead of imagined minibatches"""

    # policy
    buffer_size: int = 1_000_000
    """real transitions that the replay buffer holds (per process)"""
    learning_starts: int = 250
    """environment steps with random actions before the first training and update"""
    batch_size: int = 256
    """transitions per gradient step (per process)"""
    gradient_steps: int = 20
    """gradient steps per step of every environment"""
    learning_rate: float = 3e-4
    """Adam's step size, for policy, critics and temperature"""
    gamma: float = 0.99
    """discount γ"""
    tau: float = 0.005
    """share τ of the trained networks in an update of the target critics"""
    num_critics: int = 2
    """critics M"""
    critic_subset: int = 2
    """critics drawn for each target, which takes their minimum; if fewer than M, the policy climbs the mean of all M"""
    policy_delay: int = 1
    """gradient steps of the critics per step of the policy and of the temperature"""
    alpha: float = 1.0
    """temperature α: weight of the entropy; with --autotune, the first one"""
    autotune: bool = True
    """learn α so that the policy's entropy is --target-entropy"""
    target_entropy: float | None = None
    """entropy H̄ in nats of actions in [−1, 1]^A, at most A log 2, for --autotune; None: −A"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """ReLU layers of the policy and of each critic"""


# fmt: off
MUJOCO = dict(learning_starts=1_000)
RECOMMENDED = {
    "Pendulum-v1": dict(
        total_timesteps=3_000, learning_starts=200, learning_rate=1e-3, tau=0.02, hidden_sizes=(128, 128),
        model_hidden_sizes=(128, 128, 128), model_batch_size=32, patience=10, model_frequency=50, model_buffer_age=100,
        rollouts_per_step=40, rollout_lengths=(30, 30, 0, 1),
    ),
    "HalfCheetah-v5": MUJOCO | dict(total_timesteps=400_000, gradient_steps=10),
    "Hopper-v5": MUJOCO | dict(
        total_timesteps=125_000, checkpoint_every=50_000, rollout_lengths=(1, 15, 20_000, 100_000),
    ),
    "Walker2d-v5": MUJOCO | dict(total_timesteps=300_000),
    "Ant-v5": MUJOCO | dict(
        total_timesteps=300_000, checkpoint_every=50_000, rollout_lengths=(1, 25, 20_000, 100_000),
    ),
    "Humanoid-v5": MUJOCO | dict(
        total_timesteps=300_000, checkpoint_every=50_000, rollout_lengths=(1, 25, 20_000, 300_000),
    ),
}
# fmt: on
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def storage_dtype(space: gym.Space) -> torch.dtype:
    """What a replay buffer keeps of a space: uint8 as it is, an index as int64, other numbers as float32."""
    if isinstance(space, Discrete):
        return torch.int64
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


class EnsembleLinear(nn.Module):
    """M linear layers, each with its own weights, in one product."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: slice | Tensor | None) -> Tensor:
        """x (K or 1, B, in) → (K, B, out), by the K members asked for, or by all; an index that takes all would copy
        the weights' gradients."""
        weight, bias = (x if members is None else x[members] for x in (self.weight, self.bias))
        return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


class CriticEnsemble(nn.Module):
    """Q_1 … Q_M(s, a): states (B, D) and actions (B, A) in [−1, 1] → values (M, B).

    What a fork puts between the layers, such as a norm, needs weights (M, 1, H) that are indexed by `members` as
    EnsembleLinear's are: those of nn.LayerNorm would be one set for all critics, without an error.
    """

    def __init__(self, members: int, inputs: int, hidden_sizes):
        super().__init__()
        sizes = itertools.pairwise([inputs, *hidden_sizes, 1])
        self.layers = nn.ModuleList(EnsembleLinear(members, *inputs_outputs) for inputs_outputs in sizes)

    def forward(self, states: Tensor, actions: Tensor, members: slice | Tensor | None = None) -> Tensor:
        """Values (K, B) of the K members asked for, of all by default."""
        x = torch.cat([states, actions], -1).unsqueeze(0)
        for layer in self.layers[:-1]:
            x = layer(x, members).relu_()
        return self.layers[-1](x, members).squeeze(-1)


class SoftActorCritics(nn.Module):
    """Policy π(a|s) on [−1, 1]^A, critics Q_i(s, a) and temperature α. `forward` is the policy without noise.

    Observations are (…, D) float32 or uint8 for a Box, (…,) int64 for a Discrete space, and states s (…, D) what
    `encode` makes of them. Actions (…, A) are in [−1, 1], which `to_env` scales to the space's bounds.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, num_critics, alpha=1.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_dtype = storage_dtype(observation_space)
        self.one_hot = isinstance(observation_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = action_space.shape[0]
        self.actor = relu_mlp([inputs, *hidden_sizes, 2 * self.action_size])
        self.critics = CriticEnsemble(num_critics, inputs + self.action_size, hidden_sizes)
        self.temperature = nn.ParameterDict({"log_alpha": torch.tensor(alpha).log()})  # a module, for vector_adam
        self.register_buffer("low", torch.as_tensor(action_space.low))
        self.register_buffer("high", torch.as_tensor(action_space.high))

    @property
    def alpha(self) -> Tensor:
        """The temperature, as a constant."""
        return self.temperature["log_alpha"].detach().exp()

    def sample(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """a ~ π(·|s) in [−1, 1] and its log-probability, (…, A) and (…,), from standard Gaussian noise (…, A)."""
        mean, log_std = self.actor(states).chunk(2, -1)
        return squashed_gaussian(mean, log_std.clamp(-20, 2), noise)

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        return obs.float()

    def to_env(self, actions: Tensor) -> Tensor:
        """[−1, 1] → the space's bounds, linearly in each dimension."""
        return (self.low + (actions + 1) / 2 * (self.high - self.low)).clamp(self.low, self.high)

    def forward(self, obs: Tensor) -> Tensor:
        """The action of the Gaussian's mean."""
        return self.to_env(self.actor(self.encode(obs)).chunk(2, -1)[0].tanh())


class DynamicsEnsemble(nn.Module):
    """p_θᵢ(s', r | s, a), i = 1 … M: the standardised change of the state and the reward, (D + 1,) numbers, Gaussian.

    Where the environment's own rule of termination is not known, each member gives a logit for it as well.
    """

    def __init__(self, members: int, num_elites: int, state_size: int, action_size: int, hidden_sizes, termination):
        super().__init__()
        self.outputs, self.termination = state_size + 1, termination
        sizes = [state_size + action_size, *hidden_sizes, 2 * self.outputs + (termination is None)]
        self.layers = nn.ModuleList(EnsembleLinear(members, *pair) for pair in itertools.pairwise(sizes))
        self.log_variance_bounds = nn.Parameter(torch.tensor([-10.0, 0.5])[:, None].repeat(1, self.outputs))
        self.register_buffer("elites", torch.arange(num_elites))
        for name, size in (("input", sizes[0]), ("output", self.outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def standardise(self, data: "Transitions") -> None:
        """Takes the moments of the data for those that inputs and outputs are standardised with."""
        for name, x in zip(("input", "output"), unstandardised(data)):
            x = x.double()  # E[x²] − E[x]² loses digits
            mean, square = average(torch.stack([x.mean(0), x.square().mean(0)]))
            std = (square - mean.square()).clamp(min=0).sqrt()
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, 1.0, std))  # a constant tells nothing

    def inputs_of(self, states: Tensor, actions: Tensor) -> Tensor:
        """Standardised (s, a), (…, D + A)."""
        return (torch.cat([states, actions], -1) - self.input_mean) / self.input_std

    def forward(self, inputs: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised inputs (M or 1, B, D + A) → mean and log σ² (M, B, D + 1), and (M, B, 0 or 1) logits."""
        x = inputs
        for layer in self.layers[:-1]:
            x = F.silu(layer(x, members))
        mean, log_variance, logits = self.layers[-1](x, members).split(
            [self.outputs, self.outputs, 1 if self.termination is None else 0], -1
        )
        low, high = self.log_variance_bounds
        log_variance = high - F.softplus(high - log_variance)
        return mean, low + F.softplus(log_variance - low), logits

    def step(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s', r ~ p_θᵢ(·|s, a) and whether s' is terminal: (B, D), (B,), (B,); i is drawn from the elites for each row.

        The rows are dealt out to the elites at random and evenly, so that no member computes what another one is for.
        """
        count, members = len(states), len(self.elites)
        order = torch.randperm(count, device=states.device)
        rows = order[torch.arange(-(-count // members) * members, device=states.device) % count]
        inputs = self.inputs_of(states, actions)[rows].unflatten(0, (members, -1))
        mean, log_variance, logits = self(inputs, self.elites)
        outputs = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        outcomes = torch.cat([outputs * self.output_std + self.output_mean, logits], -1)
        outcomes = outcomes.flatten(0, 1)[:count][order.argsort()]  # in the rows' own order
        next_states, rewards = states + outcomes[:, : self.outputs - 1], outcomes[:, self.outputs - 1]
        if self.termination is None:
            return next_states, rewards, torch.rand_like(rewards) < outcomes[:, -1].sigmoid()
        return next_states, rewards, self.termination(next_states)

    def predict(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The elites' mean next state (B, D), and their disagreement (B,): how far apart they are, in output σs."""
        means, _, _ = self(self.inputs_of(states, actions).unsqueeze(0), self.elites)
        change = means.mean(0) * self.output_std + self.output_mean
        return states + change[:, :-1], means.std(0).mean(-1)


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


class ReplayBuffer:
    """The newest transitions of N environments, in tensors that are allocated once.

    A step of all N environments takes N rows, and row i + N, modulo the capacity, is the step after row i's in the same
    environment; but the newest N rows, those before `position`, are followed by the oldest or by rows never written,
    which no flag marks. The capacity is the largest multiple of N up to what was asked for.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space, action_space, device: torch.device):
        self.capacity, self.num_envs, self.position, self.size = capacity // num_envs * num_envs, num_envs, 0, 0
        observation = observation_space.shape, storage_dtype(observation_space)
        action = action_space.shape, torch.int64 if isinstance(action_space, Discrete) else torch.float32
        flag = (), torch.bool
        layout = Transitions(observation, action, ((), torch.float32), observation, flag, flag)
        needed = sum(self.capacity * int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)
        if self.capacity == 0:
            fail(f"--buffer-size {capacity} must be at least --num-envs {num_envs}")
        if needed > (free := free_memory(device)):
            fail(
                f"--buffer-size {capacity} needs {needed:,} bytes, and {device} has {free:,} free: choose a smaller one"
            )
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
        """The rows in use, and where the next ones go; the newest end an episode, as a resumed run begins new ones.

        What else a fork keeps has to be added here and below, as tensors or plain values: a checkpoint holds no more.
        """
        full = self.size == self.capacity
        state = {name: x if full else x[: self.size].clone() for name, x in self.data._asdict().items()}
        newest = (self.position - 1 - torch.arange(min(self.num_envs, self.size))) % self.capacity
        state["truncated"] = state["truncated"].index_put((newest,), ~state["terminated"][newest])
        return state | {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        for name, stored in self.data._asdict().items():
            stored[: len(state[name])] = state[name]
        self.position, self.size = state["position"], len(state["rewards"])


class ModelBuffer(ReplayBuffer):
    """The newest imagined transitions; `add` takes any number of them."""

    def __init__(self, args: Args, observation_space, action_space, device: torch.device):
        capacity = args.rollouts_per_step * args.model_buffer_age * max(args.rollout_lengths[:2])
        if args.real_ratio == 1 or args.value_expansion:
            capacity = 1  # no minibatch will ask
        numbers = 2 * observation_space.shape[0] + action_space.shape[0] + 1
        if (needed := capacity * (4 * numbers + 2)) > (free := free_memory(device)):
            fail(
                f"--rollouts-per-step, --model-buffer-age and --rollout-lengths ask for {capacity:,} transitions, "
                f"{needed:,} bytes, and {device} has {free:,} free: lower one of them"
            )
        super().__init__(capacity, 1, observation_space, action_space, device)

    def limit(self, capacity: int) -> None:
        """How many it holds from now on, at most what was asked for at first."""
        self.capacity, self.size, self.position = capacity, min(self.size, capacity), self.position % capacity

    def add(self, *transitions) -> None:
        """The fields of Transitions, each (B, …)."""
        count = min(len(transitions[0]), self.capacity)
        rows = (self.position + torch.arange(count, device=self.data.rewards.device)) % self.capacity
        for stored, new in zip(self.data, transitions):
            stored.index_copy_(0, rows, new[-count:])
        self.size = max(self.size, min(self.position + count, self.capacity))
        self.position = (self.position + count) % self.capacity

    def state_dict(self) -> dict:
        """All rows, their limit, and where the next ones go."""
        state = {name: x[: self.size].clone() for name, x in self.data._asdict().items()}
        return state | {"position": self.position, "capacity": self.capacity}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        super().load_state_dict(state)
        self.capacity = state["capacity"]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The model --------------------------------------------------------------------------------------------------


def never(next_states: Tensor) -> Tensor:
    """Of environments that only a time limit ends."""
    return torch.zeros(len(next_states), dtype=torch.bool, device=next_states.device)


def hopper_falls(next_states: Tensor) -> Tensor:
    """Height, angle or any other coordinate out of its healthy range."""
    height, angle, others = next_states[:, 0], next_states[:, 1], next_states[:, 1:]
    return ~((height > 0.7) & (angle.abs() < 0.2) & (others.abs() < 100).all(-1))


def double_pendulum_falls(next_states: Tensor) -> Tensor:
    """The tip of two poles of 0.6 is not above 1."""
    sin_1, sin_2, cos_1, cos_2 = next_states[:, 1:5].unbind(-1)
    return 0.6 * (cos_1 + cos_1 * cos_2 - sin_1 * sin_2) <= 1


def walker_falls(next_states: Tensor) -> Tensor:
    """Height or angle out of their healthy range."""
    height, angle = next_states[:, 0], next_states[:, 1]
    return ~((0.8 < height) & (height < 2) & (angle.abs() < 1))


TERMINATION: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("Pendulum-v1", "HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5"), never),
    "InvertedPendulum-v5": lambda x: ~((x[:, 1].abs() <= 0.2) & x.isfinite().all(-1)),
    "InvertedDoublePendulum-v5": double_pendulum_falls,
    "Hopper-v5": hopper_falls,
    "Walker2d-v5": walker_falls,
    "Ant-v5": lambda x: ~((0.2 <= x[:, 0]) & (x[:, 0] <= 1) & x.isfinite().all(-1)),
    "Humanoid-v5": lambda x: ~((1 < x[:, 0]) & (x[:, 0] < 2)),
}
"""Whether states (B, D) that a step has led to are terminal (B,): gymnasium's, where gym.make is given no options."""


def unstandardised(data: Transitions) -> tuple[Tensor, Tensor]:
    """Inputs (s, a) and outputs (s' − s, r) of the model, (B, D + A) and (B, D + 1)."""
    states, next_states = data.observations.float(), data.next_observations.float()
    return torch.cat([states, data.actions], -1), torch.cat([next_states - states, data.rewards[:, None]], -1)


def gaussian_nll(mean: Tensor, log_variance: Tensor, x: Tensor) -> Tensor:
    """−log N(x; mean, diag σ²), summed over the last dimension."""
    return 0.5 * ((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)).sum(-1)


def termination_loss(logits: Tensor, terminated: Tensor) -> Tensor:
    """−log p(terminated), mean over each member's minibatch (M,); logits (M, B, 1), terminated (M, B) 0 or 1."""
    return F.binary_cross_entropy_with_logits(logits.squeeze(-1), terminated, reduction="none").mean(1)


def model_loss(model: DynamicsEnsemble, inputs: Tensor, outputs: Tensor, terminated: Tensor, decay: float) -> Tensor:
    """Σ_i of each member's negative log-likelihood on its own minibatch, (M, B, …) standardised, and weight decay.

    The bounds of log σ² are drawn together a little, to the variances that the data have (arXiv 1805.12114, appendix
    A.1).
    """
    mean, log_variance, logits = model(inputs)
    loss = gaussian_nll(mean, log_variance, outputs).mean(1).sum()
    if model.termination is None:
        loss += termination_loss(logits, terminated).sum()
    low, high = model.log_variance_bounds
    weights = sum(layer.weight.square().sum() for layer in model.layers)
    return loss + 0.01 * (high - low).sum() + 0.5 * decay * weights


def model_gradient(model, inputs: Tensor, outputs: Tensor, terminated: Tensor, decay: float) -> Tensor:
    """∇L(θ) of `model_loss`, one vector."""
    return gradient_vector(model_loss(model, inputs, outputs, terminated, decay), model)


def learn_model(model, optimizer, data: Transitions, args: Args, gradient_of=model_gradient) -> dict[str, float]:
    """Trains every member on a bootstrap of `data` until it no longer gets better on the held-out part.

    Better by the square of its error, which a few surprises do not blow up as they do the likelihood; where it learns
    terminations, with their loss. Each member keeps the weights with which it was best, and the best members become
    the elites. Returns means over members, on the held-out part: the negative log-likelihood in nats, the square error
    in σ² of the outputs (where terminations are learned, with their loss in nats), and the epochs.
    """
    model.standardise(data)
    inputs, outputs = unstandardised(data)
    inputs, outputs = (inputs - model.input_mean) / model.input_std, (outputs - model.output_mean) / model.output_std
    terminated, members = data.terminated.float(), args.ensemble_size
    order = torch.randperm(len(inputs), device=inputs.device)
    held_out, rest = order.split([(count := max(1, min(int(args.holdout * len(order)), 5_000))), len(order) - count])
    bootstrap = rest[torch.randint(len(rest), (members, len(rest)), device=rest.device)]

    @torch.no_grad()
    def errors() -> tuple[Tensor, Tensor]:
        mean, log_variance, logits = model(inputs[held_out].unsqueeze(0))
        nll = gaussian_nll(mean, log_variance, outputs[held_out]).mean(-1)
        error = (mean - outputs[held_out]).square().mean((1, 2))
        if model.termination is None:
            error += termination_loss(logits, terminated[held_out].expand(members, -1))
        return average(error), average(nll)

    best, best_nll = errors()
    best_weights = copy.deepcopy(list(model.layers.parameters()))
    epochs = waited = 0
    while waited < args.patience and epochs < args.model_epochs:
        shuffled = bootstrap.gather(1, torch.rand_like(bootstrap, dtype=torch.float32).argsort(1))
        for rows in shuffled.split(args.model_batch_size, 1):
            gradient = gradient_of(model, inputs[rows], outputs[rows], terminated[rows], args.model_weight_decay)
            adam_step(optimizer, gradient)
        error, nll = errors()
        better = error < 0.99 * best
        for kept, now in zip(best_weights, model.layers.parameters()):
            kept.data[better] = now.data[better]
        best, best_nll = torch.where(better, error, best), torch.where(better, nll, best_nll)
        epochs, waited = epochs + 1, 0 if better.any() else waited + 1
    for kept, now in zip(best_weights, model.layers.parameters()):
        now.data.copy_(kept.data)
    model.elites.copy_(best.argsort()[: args.num_elites])
    return {"model_nll": best_nll.mean().item(), "model_error": best.mean().item(), "model_epochs": float(epochs)}


@torch.no_grad()
def branched_rollouts(model, agent, states: Tensor, length: int) -> Iterator[Transitions]:
    """`length` steps under the policy from states (B, D), each as Transitions; what has terminated goes no further."""
    for _ in range(length):
        if len(states) == 0:
            return
        actions, _ = agent.sample(states, torch.randn(len(states), agent.action_size, device=states.device))
        next_states, rewards, terminated = model.step(states, actions)
        yield Transitions(states, actions, rewards, next_states, terminated, torch.zeros_like(terminated))
        states = next_states[~terminated]


def rollout_length(schedule: tuple[int, int, int, int], step: int) -> int:
    """k at an environment step: from k₁ at t₁ to k₂ at t₂ linearly, rounded down, and constant outside."""
    k_1, k_2, t_1, t_2 = schedule
    return int(np.interp(step, (t_1, t_2), (k_1, k_2)))


@torch.no_grad()
def prediction_errors(model, buffer: ReplayBuffer, newest: int, horizon: int) -> list[float]:
    """Root mean squared error after 1 … `horizon` real actions, in standard deviations of the state.

    On the `newest` steps of every environment, which the model has not learned from yet; windows that cross an
    episode's end do not count.
    """
    n, data, errors = buffer.num_envs, buffer.data, []
    count = (newest - horizon + 1) * n
    starts = (buffer.position - newest * n + torch.arange(max(count, 0), device=data.rewards.device)) % buffer.capacity
    states, within = data.observations[starts].float(), torch.ones_like(starts, dtype=torch.bool)
    for step in range(horizon):
        rows = (starts + step * n) % buffer.capacity
        states, _ = model.predict(states, data.actions[rows])
        error = ((states - data.next_observations[rows]) / model.input_std[: states.shape[-1]]).square().mean(-1)
        errors.append(error[within].mean().sqrt().item())
        within &= ~(data.terminated[rows] | data.truncated[rows])
    return errors


def model_diagnostics(model, buffer: ReplayBuffer, newest: int) -> dict[str, float]:
    """Charts of how well the model knows the `newest` steps of every environment, which it has yet to learn from.

    `disagreement` is what it can tell of its error by itself; numbers that no window within an episode gives are left
    out.
    """
    errors = prediction_errors(model, buffer, newest, ERROR_HORIZON)
    rows = buffer.position - 1 - torch.arange(newest * buffer.num_envs, device=buffer.data.rewards.device)
    data = buffer.get(rows % buffer.capacity)
    _, disagreement = model.predict(data.observations, data.actions)
    charts = {"one_step_error": errors[0], "k_step_error": errors[-1], "disagreement": disagreement.mean().item()}
    return {name: x for name, x in charts.items() if np.isfinite(x)}


# Soft actor-critic -------------------------------------------------------------------------------------------


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh u, u = mean + σ·noise, and log π(a), (…, A) and (…,) (arXiv 1812.05905, appendix C); inputs (…, A)."""
    u = mean + log_std.exp() * noise
    log_gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh² u)
    return u.tanh(), (log_gaussian - log_slope).sum(-1)


def soft_q_target(rewards, terminated, next_q: Tensor, next_log_probs, alpha: Tensor, gamma: float) -> Tensor:
    """y = r + γ (min_i Q_i(s', a') − α log π(a'|s')), and r where s' is terminal; (B,), next_q (M, B).

    arXiv 1812.05905, equations 2, 3 and 5, with the minimum over two critics of the paper's practical algorithm.
    """
    return rewards + gamma * (next_q.min(0).values - alpha * next_log_probs) * ~terminated


def sac_critic_loss(agent, target, batch: Transitions, noise: Tensor, members, args: Args) -> tuple[Tensor, Tensor]:
    """L(θ) on a minibatch, and the mean of Q_i(s, a) over critics and minibatch; noise (B, A) is that of a'.

    The target takes the minimum over those of the target critics that `members` picks.
    """
    with torch.no_grad():
        next_states = agent.encode(batch.next_observations)
        next_actions, next_log_probs = agent.sample(next_states, noise)
        next_q = target(next_states, next_actions, members)
        targets = soft_q_target(batch.rewards, batch.terminated, next_q, next_log_probs, agent.alpha, args.gamma)
    q_values = agent.critics(agent.encode(batch.observations), batch.actions)
    return 0.5 * (q_values - targets).square().mean(1).sum(), q_values.mean()


def sac_actor_loss(agent, states: Tensor, noise: Tensor, alpha: Tensor, use_mean: bool) -> tuple[Tensor, Tensor]:
    """−J(φ) on states (B, D), and log π(ã|s) (B,); judged by the critics' minimum, or by their mean."""
    actions, log_probs = agent.sample(states, noise)
    q_values = agent.critics(states, actions)
    q_values = q_values.mean(0) if use_mean else q_values.min(0).values
    return (alpha * log_probs - q_values).mean(), log_probs


def temperature_loss(log_alpha: Tensor, log_probs: Tensor, target_entropy: float) -> Tensor:
    """L(α): descending it lowers α where the entropy is above its target (arXiv 1812.05905, eq. 18; log α for α)."""
    return -log_alpha * (log_probs.detach().mean() + target_entropy)


def value_expansion_loss(model, agent, target, batch: Transitions, noise, members, args) -> tuple[Tensor, Tensor]:
    """The critics' loss with targets of H imagined steps, and their mean value of the real actions.

    The noise (H + 1, B, A) is that of the policy after the real step.
    v_H = min_i Q_θ⁻ᵢ(ŝ_H, â_H) − α log π(â_H|ŝ_H);   y_t = r̂_t + γ v_{t+1} and v_t = y_t − α log π(â_t|ŝ_t) for t < H.
    y_t is the target of Q(ŝ_t, â_t) and r + γ v_0 that of Q(s, a), of which the former sees states that the model leads
    to (the TD-k trick of arXiv 1803.00101); ŝ_0 is the real s'. After a termination nothing follows.
    """
    alpha = agent.alpha
    with torch.no_grad():
        steps, states, alive = [], agent.encode(batch.next_observations), ~batch.terminated
        for noise_t in noise[:-1]:
            actions, log_probs = agent.sample(states, noise_t)
            next_states, rewards, terminated = model.step(states, actions)
            steps.append((states, actions, log_probs, rewards, alive))
            states, alive = next_states, alive & ~terminated
        actions, log_probs = agent.sample(states, noise[-1])
        values = (target(states, actions, members).min(0).values - alpha * log_probs) * alive
        targets = []
        for _, _, log_probs, rewards, alive in reversed(steps):
            targets.insert(0, rewards + args.gamma * values)
            values = (targets[0] - alpha * log_probs) * alive
        targets = torch.cat([batch.rewards + args.gamma * values, *targets])
        weights = torch.cat([torch.ones_like(batch.rewards), *(alive.float() for *_, alive in steps)])
        states = torch.cat([agent.encode(batch.observations), *(states for states, *_ in steps)])
        actions = torch.cat([batch.actions, *(actions for _, actions, *_ in steps)])
    q_values = agent.critics(states, actions)
    loss = 0.5 * ((q_values - targets).square() * weights).sum(1).sum() / weights.sum()
    return loss, q_values[:, : len(batch.rewards)].mean()


CRITIC_METRICS = ("critic_loss", "q_values")
ACTOR_METRICS = ("actor_loss", "entropy", "alpha")


def sac_critic_gradient(agent, target, batch: Transitions, noise, members, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch, and CRITIC_METRICS (2,)."""
    loss, q_values = sac_critic_loss(agent, target, batch, noise, members, args)
    return gradient_vector(loss, agent.critics), torch.stack([loss, q_values]).detach()


def value_expansion_gradient(model, agent, target, batch, noise, members, args: Args) -> tuple[Tensor, Tensor]:
    """As sac_critic_gradient, of `value_expansion_loss`."""
    loss, q_values = value_expansion_loss(model, agent, target, batch, noise, members, args)
    return gradient_vector(loss, agent.critics), torch.stack([loss, q_values]).detach()


def sac_actor_gradient(agent, batch: Transitions, noise: Tensor, args: Args) -> tuple[Tensor, Tensor | None, Tensor]:
    """−∇J(φ) on a minibatch, the temperature's gradient (1,) with --autotune, and ACTOR_METRICS (3,)."""
    alpha = agent.alpha
    states = agent.encode(batch.observations)
    loss, log_probs = sac_actor_loss(agent, states, noise, alpha, use_mean=args.critic_subset < args.num_critics)
    alpha_gradient = None
    if args.autotune:
        # To change it in the course of training, hand it over as a tensor: a number would be compiled in.
        target_entropy = -agent.action_size if args.target_entropy is None else args.target_entropy
        alpha_loss = temperature_loss(agent.temperature["log_alpha"], log_probs, target_entropy)
        alpha_gradient = gradient_vector(alpha_loss, agent.temperature)
    return gradient_vector(loss, agent.actor), alpha_gradient, torch.stack([loss, -log_probs.mean(), alpha]).detach()


def sac_critic_update(
    agent, target, optimizer, batch, noise, members, args: Args, gradient_of=sac_critic_gradient
) -> Tensor:
    """One gradient step of the critics, which their targets follow. Returns CRITIC_METRICS (2,) before it."""
    gradient, metrics = gradient_of(agent, target, batch, noise, members, args)
    adam_step(optimizer, gradient)
    polyak_update(target, agent.critics, args.tau)
    return metrics


def sac_actor_update(
    agent, actor_optimizer, alpha_optimizer, batch, noise, args: Args, gradients_of=sac_actor_gradient
) -> Tensor:
    """One gradient step of the policy and, with --autotune, of α. Returns ACTOR_METRICS (3,) before it."""
    gradient, alpha_gradient, metrics = gradients_of(agent, batch, noise, args)
    adam_step(actor_optimizer, gradient)
    if args.autotune:
        adam_step(alpha_optimizer, alpha_gradient)
    return metrics


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


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's, do not follow."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 250
"""Environment steps between two points of losses/*, which are means over the updates since the last one; losses/model_*
are of the last training."""
ERROR_HORIZON = 5
"""Steps k of charts/k_step_error."""


def check_model_arguments(args: Args, observation_space: gym.Space) -> None:
    """Refuses what the flags' types allow and the algorithm does not."""
    if not isinstance(observation_space, Box) or observation_space.dtype.kind != "f":
        fail(f"{args.env_id} has the observation space {observation_space}; mbpo predicts real numbers. Use sac.py.")
    if args.critic_subset > args.num_critics:
        fail(f"--critic-subset {args.critic_subset} must be at most --num-critics {args.num_critics}")
    if args.alpha <= 0:
        fail(f"--alpha {args.alpha} must be positive")
    if args.num_elites > args.ensemble_size:
        fail(f"--num-elites {args.num_elites} must be at most --ensemble-size {args.ensemble_size}")
    if not 0 <= args.real_ratio <= 1:
        fail(f"--real-ratio {args.real_ratio} must be from 0 to 1")
    if not 0 < args.holdout < 1:
        fail(f"--holdout {args.holdout} must be between 0 and 1")
    if args.learning_starts < 10:
        fail(f"--learning-starts {args.learning_starts} must be at least 10: the model learns from them")
    k_1, k_2, t_1, t_2 = args.rollout_lengths
    if min(k_1, k_2) < 1 or t_1 >= t_2:
        fail(f"--rollout-lengths {k_1} {k_2} {t_1} {t_2}: k₁ and k₂ must be at least 1, and t₁ before t₂")


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    torch.set_float32_matmul_precision(args.matmul_precision)
    spaces = check_spaces(args, (Box,), "For Discrete actions use dqn.py.")
    check_bounds(args, spaces[1])
    check_model_arguments(args, spaces[0])
    if args.env_id not in TERMINATION and rank == 0:
        print(f"{ALGO}.py: how episodes of {args.env_id} end is not known here: the model learns it", file=sys.stderr)
    agent = SoftActorCritics(*spaces, args.hidden_sizes, args.num_critics, args.alpha).to(device)
    target = copy.deepcopy(agent.critics).requires_grad_(False)
    sizes = spaces[0].shape[0], agent.action_size, args.model_hidden_sizes
    model = DynamicsEnsemble(args.ensemble_size, args.num_elites, *sizes, TERMINATION.get(args.env_id)).to(device)
    model_optimizer = vector_adam(model, args.model_learning_rate)
    actor_optimizer, critic_optimizer, alpha_optimizer = (
        vector_adam(x, args.learning_rate) for x in (agent.actor, agent.critics, agent.temperature)
    )
    gradients = sac_critic_gradient, sac_actor_gradient, model_gradient
    if args.value_expansion:
        gradients = functools.partial(value_expansion_gradient, model), *gradients[1:]
    critic_gradient, actor_gradient, gradient_of_model = (compiled(x, device) if args.compile else x for x in gradients)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, device)
    imagined = ModelBuffer(args, *spaces, device)
    counter = nn.Module()  # a module, so that a checkpoint holds it
    for name in ("updates", "modelled_at"):
        counter.register_buffer(name, torch.zeros((), dtype=torch.int64))
    modules = {"agent": agent, "target": target, "model": model, "buffer": buffer, "imagined": imagined}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer, "counter": counter}
    run = Run(args, rank, modules | {"alpha_optimizer": alpha_optimizer, "model_optimizer": model_optimizer})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    real_rows = args.batch_size if args.value_expansion else round(args.real_ratio * args.batch_size)
    critic_metrics, actor_metrics, model_metrics, charts = [], [], {}, {}
    logged_step, model_seconds, started = run.step, 0.0, time.perf_counter()
    while run.step < args.total_timesteps and not run.interrupted():
        # Take a step in every environment.
        if run.step < args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, agent.action_size, device=device) - 1
        else:
            noise = torch.randn(args.num_envs, agent.action_size, device=device)
            with torch.no_grad():
                states = agent.encode(torch.as_tensor(obs, dtype=agent.observation_dtype, device=device))
                actions, _ = agent.sample(states, noise)
        acted_on = obs
        obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, agent.to_env(actions))
        buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated)
        run.step += args.num_envs * world_size
        run.log_episodes(infos)

        # Learn the model from all steps so far, and follow it for a few more.
        is_learned, new_steps = counter.modelled_at.item() > 0, run.step - counter.modelled_at.item()
        is_due = run.step >= args.learning_starts and (not is_learned or new_steps >= args.model_frequency)
        if is_due and (args.value_expansion or real_rows < args.batch_size):
            began = time.perf_counter()
            if is_learned:
                charts |= model_diagnostics(model, buffer, min(new_steps // world_size, buffer.size) // args.num_envs)
            data = Transitions(*(x[: buffer.size] for x in buffer.data))
            model_metrics = learn_model(model, model_optimizer, data, args, gradient_of_model)
            length = rollout_length(args.rollout_lengths, run.step)
            if not args.value_expansion:
                imagined.limit(args.rollouts_per_step * args.model_buffer_age * length)
                starts = data.observations[buffer.draw_rows(args.rollouts_per_step * args.model_frequency)]
                for transitions in branched_rollouts(model, agent, starts, length):
                    imagined.add(*transitions)
            counter.modelled_at.fill_(run.step)
            model_seconds += time.perf_counter() - began
            charts |= {"rollout_length": length, "model_share": model_seconds / (time.perf_counter() - started)}

        # Update on minibatches of what has been lived through and of what has been imagined.
        if run.step > args.learning_starts:
            for _ in range(args.gradient_steps):
                batch = buffer.get(buffer.draw_rows(real_rows))
                if real_rows < args.batch_size:
                    others = imagined.get(imagined.draw_rows(args.batch_size - real_rows))
                    batch = Transitions(*map(torch.cat, zip(batch, others)))
                members = None
                if args.critic_subset < args.num_critics:
                    members = torch.randperm(args.num_critics, device=device)[: args.critic_subset]
                noise = torch.randn_like(batch.actions)
                if args.value_expansion:
                    noise = torch.randn(args.value_expansion + 1, *batch.actions.shape, device=device)
                metrics = sac_critic_update(
                    agent, target, critic_optimizer, batch, noise, members, args, critic_gradient
                )
                critic_metrics.append(metrics.clone())
                counter.updates += 1
                if counter.updates % args.policy_delay == 0:
                    noise = torch.randn_like(batch.actions)
                    metrics = sac_actor_update(
                        agent, actor_optimizer, alpha_optimizer, batch, noise, args, actor_gradient
                    )
                    actor_metrics.append(metrics.clone())

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            losses = dict(model_metrics)
            for names, metrics in ((CRITIC_METRICS, critic_metrics), (ACTOR_METRICS, actor_metrics)):
                if metrics:
                    losses |= dict(zip(names, average(torch.stack(metrics).mean(0)).tolist()))
            run.log(losses, **charts)
            critic_metrics, actor_metrics, model_metrics, charts, logged_step = [], [], {}, {}, run.step
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(agent)


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem
FLATTEN = "Flatten it with gymnasium.wrappers.FlattenObservation"


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


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not."""
    try:
        return gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {args.env_id}: {' '.join(str(error).split())}")


def check_spaces(args: Args, action_spaces: tuple[type, ...], hint: str = "") -> tuple[gym.Space, gym.Space]:
    """The environment's observation and action space; refuses what the networks cannot take."""
    env = make_env(args)
    env.close()
    if args.capture_video and "rgb_array" not in env.metadata["render_modes"]:
        fail(f"--capture-video: {args.env_id} cannot render to images")
    observation = ("observation", env.observation_space, (Discrete, Box), FLATTEN)
    for kind, space, allowed, way_out in (observation, ("action", env.action_space, action_spaces, hint)):
        if not isinstance(space, allowed) or (isinstance(space, Box) and len(space.shape) != 1):
            names = " or ".join("a one-dimensional Box" if x is Box else x.__name__ for x in allowed)
            message = f"{args.env_id} has the {kind} space {space}; {ALGO} needs {names}. {way_out}"
            fail(" ".join(message.split()))
    return env.observation_space, env.action_space


def check_bounds(args: Args, action_space: Box) -> None:
    """Refuses actions without bounds, which nothing in [−1, 1] can be scaled to."""
    if not action_space.is_bounded("both"):
        fail(f"{args.env_id} has the unbounded action space {action_space}; {ALGO} needs finite bounds. Use ppo.py.")


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """Environments that reset within the step that ends an episode: no step is spent on a reset."""

    def make(index: int) -> gym.Env:
        if video_dir is None or index > 0:
            return make_env(args)
        return gym.wrappers.RecordVideo(make_env(args, render_mode="rgb_array"), str(video_dir))

    envs = [lambda index=index: make(index) for index in range(num_envs)]
    envs = gym.vector.SyncVectorEnv(envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def step_envs(envs: gym.vector.VectorEnv, actions: Tensor) -> tuple:
    """(observation to act on, observation reached, rewards, terminated, truncated, infos).

    The two observations differ where an episode ended: it reached its final one, and the next one has begun.
    """
    obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
    reached = obs
    if "final_obs" in infos:
        reached = obs.copy()
        for i in np.flatnonzero(infos["_final_obs"]):
            reached[i] = infos["final_obs"][i]
    if not (np.isfinite(rewards).all() and np.isfinite(reached).all()):
        fail("the environment gave a reward or observation that is not finite; the last checkpoint stays", code=1)
    return obs, reached, rewards, terminated, truncated, infos


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
def evaluate(policy: nn.Module, args: Args) -> np.ndarray:
    """Returns (eval_episodes,) of fresh episodes with the deterministic policy, each in its own environment.

    A policy with a memory would have to carry it on here, and in export_policy; one with dropout or BatchNorm, to be
    switched to eval() in both.
    """
    envs = make_envs(args, args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed + 1_000_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    device = next(policy.parameters()).device
    while running.any():
        actions = policy(torch.as_tensor(obs, dtype=policy.observation_dtype, device=device))
        obs, _, rewards, terminated, truncated, _ = step_envs(envs, actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


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
