"""MBPO: model-based policy optimisation (Janner et al. 2019, arXiv 1906.08253): SAC on what a learned model imagines.

Every --model-frequency environment steps, an ensemble of networks learns from all of them what a step does (alg. 2),

    p_θᵢ(s', r | s, a) = N(μ_i(s, a), diag σ_i²(s, a))      of the change s' − s and of r, i = 1 … M
    L(θ) = Σ_i E[−log p_θᵢ(s', r | s, a)]                    each member on its own bootstrap of the data

then rolls it out for k steps from states that were really visited,

    s_0 ~ D_env,  a_t ~ π_φ(·|s_t),  s_{t+1}, r_t ~ p_θᵢ(·|s_t, a_t), i anew from the elites;  all of it goes to D_model

and after each environment step takes many gradient steps of soft actor-critic (sac.py) on minibatches, real in part.
- Short rollouts that branch off real states: a model's error compounds with the steps that it is followed for
  (theorem 4.3). --rollout-lengths lets k grow as the model gets better; with k = 1 this is Dyna.
- The ensemble keeps the policy from exploiting a model where it is wrong by chance: the members disagree there.
- Early stopping on held-out data; the members that predict it best are the elites.
- Inputs and outputs are standardised; log σ² is kept softly between two learned bounds, so that it cannot run away.
- Imagined episodes end by the environment's own rule (TERMINATION), or by what the ensemble learns of it.
- D_model holds as many full rollouts as the last --model-buffer-age steps begin: older ones are of older policies.
- Where data are few, --model-batch-size and --patience must let the model learn all the same.

--value-expansion H uses the model otherwise: the minibatches are real, and the critics' targets are rewards of H
imagined steps and the value after them (MVE, arXiv 1803.00101). Else --real-ratio 1 leaves the model out: that is
sac.py, bit for bit (tests/test_mbpo.py), which agrees with Stable-Baselines3's (SB3 has no MBPO).

    python algos/mbpo.py              # Pendulum-v1: solved in 300 to 800 steps, by sac.py in 2800 to 3800
    python algos/mbpo.py --env-id HalfCheetah-v5 --compile
"""

import argparse
import copy
import errno
import functools
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
from collections.abc import Callable, Iterable, Iterator
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

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest and both in words, for check_args
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]
NotNegative = Annotated[float, (0, sys.float_info.max, "0 or more")]
AtLeast10 = Annotated[int, (10, math.inf, "at least 10: the model learns from them")]


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Count = 5_000  # environment steps
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where networks and buffers live; auto prefers CUDA
    torch_threads: Count = 1  # CPU threads for PyTorch; for layers of 256 two are faster, if there are cores to spare
    compile: bool = False  # torch.compile: pays in runs of several minutes; on a GPU gradients become CUDA graphs, too
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products; lower may round
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 5_000  # environment steps between checkpoints, which hold the model and both buffers too
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # record episodes 0, 1, 8, 27, 64 … of the first environment to the run's videos/

    # environment
    env_id: str = "Pendulum-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 1  # parallel environments N

    # model
    ensemble_size: Count = 7  # members M of the ensemble
    num_elites: Count = 5  # members that imagine: those that predict the held-out data best
    model_hidden_sizes: tuple[Count, ...] = (200, 200, 200, 200)  # SiLU layers of each member
    model_learning_rate: Positive = 1e-3  # Adam's step size for the ensemble
    model_weight_decay: NotNegative = 5e-5  # weight of ½ Σ w² in the ensemble's loss
    model_batch_size: Count = 256  # transitions per gradient step of each member
    model_frequency: Count = 250  # environment steps between two trainings of the ensemble, each on all data so far
    holdout: Fraction = 0.2  # share of the data that is held out of a training, at most 5000 transitions
    patience: Count = 5  # a training ends when no member became 1 % better on held-out data for so many epochs
    model_epochs: Count = 100  # epochs after which a training ends in any case
    rollouts_per_step: Count = 400  # imagined rollouts per environment step, all begun after a training of the ensemble
    rollout_lengths: tuple[int, int, int, int] = (1, 1, 0, 1)  # k₁ k₂ t₁ t₂: from k₁ steps at step t₁ to k₂ at t₂
    model_buffer_age: Count = 1_000  # environment steps after which imagined data go; later where rollouts end early
    real_ratio: Fraction = 0.05  # share of real transitions in a minibatch; 1 makes no use of the model
    value_expansion: Count | None = None  # H imagined steps in the targets, on real minibatches alone

    # policy
    buffer_size: Count = 1_000_000  # real transitions that the replay buffer holds
    learning_starts: AtLeast10 = 250  # environment steps with random actions before the first training and update
    batch_size: Count = 256  # transitions per gradient step
    gradient_steps: Count = 20  # gradient steps per step of every environment
    learning_rate: Positive = 3e-4  # Adam's step size, for policy, critics and temperature
    gamma: Fraction = 0.99  # discount γ
    tau: Fraction = 0.005  # share τ of the trained networks in an update of the target critics
    num_critics: Count = 2  # critics M
    critic_subset: Count = 2  # critics drawn for each target; if fewer than M, the policy climbs the mean of all M
    policy_delay: Count = 1  # gradient steps of the critics per step of the policy and of the temperature
    alpha: Positive = 1.0  # temperature α: weight of the entropy; with --autotune, the first one
    autotune: bool = True  # learn α so that the policy's entropy is --target-entropy
    target_entropy: float | None = None  # entropy H̄ in nats of actions in [−1, 1]^A, at most A log 2; None: −A
    hidden_sizes: tuple[Count, ...] = (256, 256)  # ReLU layers of the policy and of each critic


# fmt: off
MUJOCO = dict(learning_starts=1_000)
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "Pendulum-v1": dict(
        total_timesteps=3_000, learning_starts=200, learning_rate=1e-3, tau=0.02, hidden_sizes=(128, 128),
        model_hidden_sizes=(128, 128, 128), model_batch_size=32, patience=10, model_frequency=50, model_buffer_age=100,
        rollouts_per_step=40, rollout_lengths=(30, 30, 0, 1)),
    "HalfCheetah-v5": MUJOCO | dict(total_timesteps=400_000, gradient_steps=10),
    "Hopper-v5": MUJOCO | dict(
        total_timesteps=125_000, checkpoint_every=50_000, rollout_lengths=(1, 15, 20_000, 100_000)),
    "Walker2d-v5": MUJOCO | dict(total_timesteps=300_000),
    "Ant-v5": MUJOCO | dict(total_timesteps=300_000, checkpoint_every=50_000, rollout_lengths=(1, 25, 20_000, 100_000)),
    "Humanoid-v5": MUJOCO | dict(
        total_timesteps=300_000, checkpoint_every=50_000, rollout_lengths=(1, 25, 20_000, 300_000)),
}
# fmt: on


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class ToBox(nn.Module):
    """Actions (…, A) → what a Box takes: within its bounds, rounded where it holds integers, in its dtype."""

    def __init__(self, space: Box):
        super().__init__()
        self.dtype, exact = torch.as_tensor(space.low).dtype, np.float32 if space.dtype == np.float32 else np.float64
        self.register_buffer("bounds", torch.as_tensor(np.stack([space.low, space.high]).astype(exact)))

    def forward(self, actions: Tensor) -> Tensor:
        """(…, A), of any float type."""
        actions = actions.clamp(*self.bounds)
        return (actions if self.dtype.is_floating_point else actions.round()).to(self.dtype)


class Critics(nn.ModuleList):
    """Q_1 … Q_M: states (B, D) and actions (B, A) in [−1, 1] → values (M, B)."""

    def __init__(self, members: int, inputs: int, hidden_sizes: tuple[int, ...]):
        super().__init__(relu_mlp([inputs, *hidden_sizes, 1]) for _ in range(members))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Of each critic for each pair."""
        x = torch.cat([states, actions], -1)
        return torch.stack([critic(x) for critic in self]).squeeze(-1)


class SoftActorCritics(nn.Module):
    """Policy π(a|s) on [−1, 1]^A, critics Q_i(s, a) and temperature α. `forward` is the policy without noise.

    Observations are (…, D) of a Box, (…,) int64 of a Discrete space; states s (…, D) are what `encode` makes of them.
    Actions (…, A) are in [−1, 1], which `to_env` scales to the space's bounds.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, num_critics, alpha=1.0):
        super().__init__()
        self.observation_space, self.one_hot = observation_space, isinstance(observation_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = action_space.shape[0]
        self.actor = relu_mlp([inputs, *hidden_sizes, 2 * self.action_size])
        self.critics = Critics(num_critics, inputs + self.action_size, hidden_sizes)
        self.log_alpha = nn.Parameter(torch.tensor(alpha).log())
        self.to_box = ToBox(action_space)

    def policy(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of u, each (…, A); an action is tanh u."""
        mean, log_std = self.actor(states).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        return obs.float()

    def to_env(self, actions: Tensor) -> Tensor:
        """[−1, 1] → the space's bounds, linearly in each dimension."""
        low, high = self.to_box.bounds
        return self.to_box(low + (actions + 1) / 2 * (high - low))

    def forward(self, obs: Tensor) -> Tensor:
        """The action of the Gaussian's mean."""
        return self.to_env(self.policy(self.encode(obs))[0].tanh())


class EnsembleLinear(nn.Module):
    """M linear layers, each with its own weights, in one product."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """x (M or 1, B, in) → (M, B, out)."""
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)


class DynamicsEnsemble(nn.Module):
    """p_θᵢ(s', r | s, a), i = 1 … M: the standardised change of the state and the reward, (D + 1,) numbers, Gaussian.

    Where the environment's own rule of termination is not known, each member gives a logit for it as well. What is put
    into `network` has to keep members apart: it has no weights, or (M, …, …).
    """

    def __init__(self, members: int, num_elites: int, state_size: int, action_size: int, hidden_sizes, termination):
        super().__init__()
        self.members, self.outputs, self.termination = members, state_size + 1, termination
        sizes, layers = [state_size + action_size, *hidden_sizes, 2 * self.outputs + (termination is None)], []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [EnsembleLinear(members, inputs, outputs), nn.SiLU()]
        self.network = nn.Sequential(*layers[:-1])
        self.member_weights()
        self.log_variance_bounds = nn.Parameter(torch.tensor([-10.0, 0.5])[:, None].repeat(1, self.outputs))
        self.register_buffer("elites", torch.arange(num_elites))
        self.register_buffer("learned_at", torch.zeros((), dtype=torch.int64))  # environment step of the last training
        for name, size in (("input", sizes[0]), ("output", self.outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def member_weights(self) -> dict[str, Tensor]:
        """The network's weights by name, first dimension M; refuses those that members would share."""
        weights = dict(itertools.chain(self.network.named_parameters(), self.network.named_buffers()))
        for name, x in weights.items():
            if x.dim() < 3 or len(x) != self.members:
                needed = f"each needs its own, in a tensor ({self.members}, …, …) like EnsembleLinear's"
                raise TypeError(f"DynamicsEnsemble: all members would share {name} {tuple(x.shape)}; {needed}")
        return weights

    def standardise(self, **data: Tensor) -> None:
        """Takes the moments of input= (B, D + A) and output= (B, D + 1) for those that they are standardised with."""
        for name, x in data.items():
            std = x.double().std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(x.double().mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, 1.0, std))  # a constant tells nothing

    def forward(self, inputs: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(s, a) (K or 1, B, D + A) → mean and log σ² (K, B, D + 1), standardised, and (K, B, 0 or 1) logits.

        Of the K members asked for, or of all.
        """
        inputs, weights = (inputs - self.input_mean) / self.input_std, {}
        if members is not None:
            weights = {name: x[members] for name, x in self.member_weights().items()}
        outputs = torch.func.functional_call(self.network, weights, inputs)
        mean, log_variance, logits = outputs.tensor_split([self.outputs, 2 * self.outputs], -1)
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
        inputs = torch.cat([states, actions], -1)[rows].unflatten(0, (members, -1))
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
        means, _, _ = self(torch.cat([states, actions], -1).unsqueeze(0), self.elites)
        change = means.mean(0) * self.output_std + self.output_mean
        return states + change[:, :-1], means.std(0).mean(-1)


# Replay -----------------------------------------------------------------------------------------------------

# Steps of an environment, first dimension B; each next observation is the one that its step truly led to. A one-step
# target needs `terminated` alone; one of several steps must not go on past `truncated` either (see dqn.py).
Transitions = namedtuple("Transitions", "observations actions rewards next_observations terminated truncated")


class ReplayBuffer:
    """The newest transitions of N environments, in tensors that are allocated once.

    A step of all N environments takes N rows, and row i + N, modulo the capacity, is the step after row i's in the same
    environment; but the newest N rows, those before `position`, are followed by the oldest or by rows never written,
    which no flag marks. The capacity is the largest multiple of N up to what was asked for.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space, action_space, device: torch.device):
        self.capacity, self.num_envs, self.position, self.size = capacity // num_envs * num_envs, num_envs, 0, 0
        index, image = isinstance(observation_space, Discrete), observation_space.dtype == np.uint8
        observation = observation_space.shape, torch.int64 if index else torch.uint8 if image else torch.float32
        action = action_space.shape, torch.int64 if isinstance(action_space, Discrete) else torch.float32
        layout = Transitions(observation, action, ((), torch.float32), observation, ((), torch.bool), ((), torch.bool))
        needed = sum(self.capacity * math.prod(shape) * dtype.itemsize for shape, dtype in layout)
        if self.capacity == 0:
            fail(f"--buffer-size {capacity} must be at least --num-envs {num_envs}")
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


class ModelBuffer(ReplayBuffer):
    """The newest imagined transitions; `add` takes any number of them."""

    def __init__(self, capacity: int, observation_space, action_space, device: torch.device):
        needed = capacity * (4 * (2 * observation_space.shape[0] + action_space.shape[0] + 1) + 2)
        if needed > (free := free_memory(device)):
            flags = "--rollouts-per-step, --model-buffer-age and --rollout-lengths"
            fail(f"{flags} ask for {capacity:,} transitions, {needed:,} bytes; {device} has {free:,} free: lower one")
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
        """All rows, where the next ones go, and how many it holds."""
        state = {name: x[: self.size].clone() for name, x in self.data._asdict().items()}
        return state | {"position": self.position, "capacity": self.capacity}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        super().load_state_dict(state)
        self.capacity = state["capacity"]


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on `device`, where CUDA or Linux tells (a container's limit aside)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    return math.inf


# The model --------------------------------------------------------------------------------------------------


def never(next_states: Tensor) -> Tensor:
    """Of environments that only a time limit ends."""
    return torch.zeros(len(next_states), dtype=torch.bool, device=next_states.device)


# Whether states (B, D) that a step has led to are terminal (B,): gymnasium's, where gym.make is given no options.
TERMINATION: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("Pendulum-v1", "HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5"), never),
    "InvertedPendulum-v5": lambda x: ~((x[:, 1].abs() <= 0.2) & x.isfinite().all(-1)),
    "InvertedDoublePendulum-v5": lambda x: 0.6 * (x[:, 3] + x[:, 3] * x[:, 4] - x[:, 1] * x[:, 2]) <= 1,  # the tip
    "Hopper-v5": lambda x: ~((x[:, 0] > 0.7) & (x[:, 1].abs() < 0.2) & (x[:, 1:].abs() < 100).all(-1)),
    "Walker2d-v5": lambda x: ~((0.8 < x[:, 0]) & (x[:, 0] < 2) & (x[:, 1].abs() < 1)),
    "Ant-v5": lambda x: ~((0.2 <= x[:, 0]) & (x[:, 0] <= 1) & x.isfinite().all(-1)),
    "Humanoid-v5": lambda x: ~((1 < x[:, 0]) & (x[:, 0] < 2)),
}


def model_errors(model: nn.Module, inputs: Tensor, outputs: Tensor, terminated: Tensor) -> tuple[Tensor, Tensor]:
    """Of each member (M,): −log p_θᵢ in nats, and the mean square error of μ_i in variances of the outputs.

    Inputs (M or 1, B, D + A), standardised outputs (M or 1, B, D + 1), `terminated` (M or 1, B) 0 or 1: where the model
    learns it, its −log p is added to both.
    """
    mean, log_variance, logits = model(inputs)
    square = (outputs - mean).square()
    nll = 0.5 * (square * (-log_variance).exp() + log_variance + math.log(2 * math.pi)).sum(-1).mean(1)
    surprise = 0.0
    if model.termination is None:
        terminated = terminated.expand(logits.shape[:-1])
        surprise = F.binary_cross_entropy_with_logits(logits.squeeze(-1), terminated, reduction="none").mean(1)
    return nll + surprise, square.mean((1, 2)) + surprise


def model_gradient(model, inputs: Tensor, outputs: Tensor, terminated: Tensor, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ) in .grad, each member's on its own minibatch (M, B, …), as in `model_errors`; returns what to log.

    The bounds of log σ² are drawn together a little, to the variances that data have (arXiv 1805.12114, appendix A.1).
    """
    nll, _ = model_errors(model, inputs, outputs, terminated)
    low, high = model.log_variance_bounds
    weights = sum(x.square().sum() for name, x in model.network.named_parameters() if name.endswith("weight"))
    loss = nll.sum() + 0.01 * (high - low).sum() + 0.5 * args.model_weight_decay * weights
    loss.backward()
    return {"model_loss": loss.detach()}


def learn_model(model, optimizer, data: Transitions, args: Args, gradient_of=model_gradient) -> dict[str, Tensor]:
    """Trains every member on a bootstrap of `data` until none gets better on the held-out part; returns what to log.

    Better by the square of its error, which a few surprises do not blow up as they do the likelihood. Each member keeps
    the weights with which it was best, and the best members become the elites.
    """
    inputs = torch.cat([data.observations, data.actions], -1)
    outputs = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], -1)
    model.standardise(input=inputs, output=outputs)
    outputs, terminated = (outputs - model.output_mean) / model.output_std, data.terminated.float()
    order, weights = torch.randperm(len(inputs), device=inputs.device), model.member_weights()
    held_out, rest = order.split([(count := max(1, min(int(args.holdout * len(order)), 5_000))), len(order) - count])
    bootstrap = rest[torch.randint(len(rest), (args.ensemble_size, len(rest)), device=rest.device)]

    @torch.no_grad()
    def errors() -> tuple[Tensor, Tensor]:
        model.eval()
        return model_errors(model, *(x[held_out].unsqueeze(0) for x in (inputs, outputs, terminated)))

    best_nll, best = errors()
    best_weights = {name: x.detach().clone() for name, x in weights.items()}
    losses, epochs, waited = [], 0, 0
    while waited < args.patience and epochs < args.model_epochs:
        model.train()
        shuffled = bootstrap.gather(1, torch.rand_like(bootstrap, dtype=torch.float32).argsort(1))
        for rows in shuffled.split(args.model_batch_size, 1):
            optimizer.zero_grad()
            losses.append(gradient_of(model, inputs[rows], outputs[rows], terminated[rows], args)["model_loss"])
            optimizer.step()
        nll, error = errors()
        better = error < 0.99 * best
        best, best_nll = torch.where(better, error, best), torch.where(better, nll, best_nll)
        for name, x in weights.items():
            best_weights[name][better] = x.detach()[better]
        epochs, waited = epochs + 1, 0 if better.any() else waited + 1
    for name, x in weights.items():
        x.detach().copy_(best_weights[name])
    model.elites.copy_(best.argsort()[: args.num_elites])
    held_out = dict(model_nll=best_nll.mean(), model_error=best.mean())
    return held_out | dict(model_loss=torch.stack(losses).mean(), model_epochs=torch.tensor(float(epochs)))


@torch.no_grad()
def branched_rollouts(model, agent, states: Tensor, length: int) -> Iterator[Transitions]:
    """`length` steps under the policy from states (B, D), each as Transitions; what has terminated goes no further."""
    for _ in range(length):
        if len(states) == 0:
            return
        noise = torch.randn(len(states), agent.action_size, device=states.device)
        actions, _ = squashed_gaussian(*agent.policy(states), noise)
        next_states, rewards, terminated = model.step(states, actions)
        yield Transitions(states, actions, rewards, next_states, terminated, torch.zeros_like(terminated))
        states = next_states[~terminated]


@torch.no_grad()
def model_diagnostics(model, buffer: ReplayBuffer, newest: int) -> dict[str, float]:
    """Charts of how well the model knows the `newest` steps of every environment, which it has yet to learn from.

    Root mean squared errors after 1 and after 5 real actions, in deviations of the state, where so many follow within
    an episode; and the elites' disagreement, which is what the model can tell of its error by itself.
    """
    data, charts = buffer.data, {}
    age = torch.arange(newest * buffer.num_envs, 0, -1, device=data.rewards.device)  # rows before the next one
    states, within = data.observations[(buffer.position - age) % buffer.capacity], age > 0
    for step in range(1, 6):
        rows = (buffer.position - age) % buffer.capacity
        states, disagreement = model.predict(states, data.actions[rows])
        error = ((states - data.next_observations[rows]) / model.input_std[: states.shape[-1]]).square().mean(-1)
        if step == 1:
            charts["disagreement"] = disagreement.mean().item()
        if step in (1, 5) and within.any():
            charts[f"{step}_step_error"] = error[within].mean().sqrt().item()
        age = age - buffer.num_envs
        within = within & (age > 0) & ~(data.terminated[rows] | data.truncated[rows])
    return charts


# Soft actor-critic ------------------------------------------------------------------------------------------


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


def sac_critic_gradient(agent, target, batch: tuple, noise: Tensor, members: Tensor | None, args: Args) -> dict:
    """Leaves ∇L(θ) of a minibatch in the critics' .grad, and returns what to log; noise (B, A) is that of a'.

    The target takes the minimum over those of the target critics that `members` picks, or over all.
    """
    with torch.no_grad():
        next_states = agent.encode(batch.next_observations)
        next_actions, next_log_probs = squashed_gaussian(*agent.policy(next_states), noise)
        next_q = target(next_states, next_actions)
        next_q = next_q if members is None else next_q[members]
        alpha = agent.log_alpha.exp()
        targets = soft_q_target(batch.rewards, batch.terminated, next_q, next_log_probs, alpha, args.gamma)
    q_values = agent.critics(agent.encode(batch.observations), batch.actions)
    loss = 0.5 * (q_values - targets).square().mean(1).sum()
    loss.backward()
    return {"critic_loss": loss.detach(), "q_values": q_values.detach().mean()}


def sac_actor_gradient(agent, batch: tuple, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """Leaves −∇J(φ) of a minibatch in the actor's .grad and, with --autotune, ∇L(α) in log α's; returns what to log.

    L(α) is eq. 18 of arXiv 1812.05905 with log α for α: descending it lowers α where the entropy is above H̄.
    """
    states, alpha = agent.encode(batch.observations), agent.log_alpha.detach().exp()
    actions, log_probs = squashed_gaussian(*agent.policy(states), noise)
    q_values = agent.critics(states, actions)
    q_values = q_values.mean(0) if args.critic_subset < args.num_critics else q_values.min(0).values
    loss = (alpha * log_probs - q_values).mean()
    loss.backward(inputs=[p for p in agent.actor.parameters() if p.requires_grad])  # the critics only judge
    entropy = -log_probs.detach().mean()
    if args.autotune:
        target_entropy = -agent.action_size if args.target_entropy is None else args.target_entropy
        (agent.log_alpha * (entropy - target_entropy)).backward()
    return {"actor_loss": loss.detach(), "entropy": entropy, "alpha": alpha}


def value_expansion_gradient(model, agent, target, batch: tuple, noise: Tensor, members, args: Args) -> dict:
    """As sac_critic_gradient, with targets of H imagined steps; noise (H + 1, B, A) is that of the actions after a.

    v_H = min_i Q_θ⁻ᵢ(ŝ_H, â_H) − α log π(â_H|ŝ_H);   y_t = r̂_t + γ v_{t+1} and v_t = y_t − α log π(â_t|ŝ_t) for t < H.
    y_t is the target of Q(ŝ_t, â_t) and r + γ v_0 that of Q(s, a), of which the former sees states that the model leads
    to (the TD-k trick of arXiv 1803.00101); ŝ_0 is the real s'. After a termination nothing follows.
    """
    with torch.no_grad():
        alpha, steps = agent.log_alpha.exp(), []
        states, alive = agent.encode(batch.next_observations), ~batch.terminated
        for noise_t in noise[:-1]:
            actions, log_probs = squashed_gaussian(*agent.policy(states), noise_t)
            next_states, rewards, terminated = model.step(states, actions)
            steps.append((states, actions, log_probs, rewards, alive))
            states, alive = next_states, alive & ~terminated
        actions, log_probs = squashed_gaussian(*agent.policy(states), noise[-1])
        next_q = target(states, actions)
        next_q = next_q if members is None else next_q[members]
        values = (next_q.min(0).values - alpha * log_probs) * alive
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
    loss.backward()
    return {"critic_loss": loss.detach(), "q_values": q_values[:, : len(batch.rewards)].detach().mean()}


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's statistics, are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for old, new in zip(target.buffers(), online.buffers()):
        old.copy_(new)


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam on all parameters as one vector, of which they become views: the same numbers, a tenth faster.

    Gradients stay ordinary tensors, which `step` gathers. What it cannot do right it refuses.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, **settings):
        self.parameters = list(params)
        kinds = {(p.dtype, p.device) if isinstance(p, Tensor) else None for p in self.parameters}
        if len(kinds) > 1 or None in kinds:
            raise TypeError("FlatAdam takes parameters of one group, type and device: take torch.optim.Adam instead")
        vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        for p, view in zip(self.parameters, vector.data.split([p.numel() for p in self.parameters])):
            p.data = view.view_as(p)
        self.pointers = [p.data_ptr() for p in self.parameters]
        super().__init__([vector], lr, fused=True, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the parameters' gradients."""
        super().zero_grad()  # of groups that were added
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step down the parameters' .grad: torch.optim.Adam's kernel, with little of the Python around it."""
        if closure or any(p.grad is None or p.data_ptr() != x for p, x in zip(self.parameters, self.pointers)):
            raise RuntimeError("FlatAdam: a parameter has no gradient, or new memory: take torch.optim.Adam instead")
        group, vector = self.param_groups[0], self.param_groups[0]["params"][0]
        vector.grad = torch.cat([p.grad.flatten() for p in self.parameters])
        state, unusual = self.state[vector], len(self.param_groups) > 1 or group["decoupled_weight_decay"]
        if vector.is_cuda or not state or unusual or group["amsgrad"]:
            group["capturable"] = vector.is_cuda and torch.cuda.is_current_stream_capturing()  # in a CUDA graph
            return super().step()
        state["step"] += 1
        tensors = [vector], [vector.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
        settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        torch._fused_adam_(*tensors, beta1=group["betas"][0], beta2=group["betas"][1], **settings)


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, the backward pass in the function included; on CUDA as CUDA graphs, whose results are copied."""
    graphs = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
    return lambda *inputs: {name: x.clone() for name, x in graphs(*inputs).items()}


# Training ---------------------------------------------------------------------------------------------------


def check_off_policy(args: Args, action_space: gym.Space) -> None:
    """Refuses a run that never learns, and actions whose bounds nothing in [−1, 1] can be scaled to."""
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} must be below --total-timesteps {args.total_timesteps}")
    width = action_space.high.astype(np.float64) - action_space.low
    if not (width < (np.finfo(np.float32).max if action_space.dtype.kind == "f" else 2**53)).all():
        fail(f"{args.env_id} has the actions {action_space}, too wide to be scaled to; ppo.py takes them")


def check_model_arguments(args: Args, observation_space: gym.Space) -> None:
    """Refuses what the flags' types allow and the algorithm does not."""
    k_1, k_2, t_1, t_2 = args.rollout_lengths
    if not isinstance(observation_space, Box) or observation_space.dtype.kind != "f":
        fail(f"{args.env_id} has the observations {observation_space}; mbpo predicts real numbers. Use sac.py")
    if args.critic_subset > args.num_critics:
        fail(f"--critic-subset {args.critic_subset} must be at most --num-critics {args.num_critics}")
    if args.num_elites > args.ensemble_size:
        fail(f"--num-elites {args.num_elites} must be at most --ensemble-size {args.ensemble_size}")
    if args.holdout in (0, 1):
        fail(f"--holdout {args.holdout} must be between 0 and 1")
    if min(k_1, k_2) < 1 or t_1 >= t_2:
        fail(f"--rollout-lengths {k_1} {k_2} {t_1} {t_2}: k₁ and k₂ must be at least 1, and t₁ before t₂")
    if args.env_id not in TERMINATION:
        tqdm.write(f"{ALGO}.py: how episodes of {args.env_id} end is not known here: the model learns it", sys.stderr)


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        torch.set_float32_matmul_precision(args.matmul_precision)
        envs = Envs(args, args.num_envs, (Box,))
        spaces = envs.observation_space, envs.action_space
        check_off_policy(args, envs.action_space)
        check_model_arguments(args, envs.observation_space)
        agent = SoftActorCritics(*spaces, args.hidden_sizes, args.num_critics, args.alpha).to(run.device)
        target = copy.deepcopy(agent.critics).requires_grad_(False).eval()
        sizes = spaces[0].shape[0], agent.action_size, args.model_hidden_sizes
        model = DynamicsEnsemble(args.ensemble_size, args.num_elites, *sizes, TERMINATION.get(args.env_id))
        model_optimizer = FlatAdam(model.to(run.device).eval().parameters(), args.model_learning_rate)
        critic_optimizer = FlatAdam(agent.critics.parameters(), args.learning_rate)
        actor_optimizer = FlatAdam(agent.actor.parameters(), args.learning_rate)
        alpha_optimizer = FlatAdam([agent.log_alpha], args.learning_rate)
        gradients = [sac_critic_gradient, sac_actor_gradient, model_gradient]
        if args.value_expansion:
            gradients[0] = functools.partial(value_expansion_gradient, model)
        if args.compile:
            run.enter_context(torch._inductor.config.patch(fallback_random=True))  # draws as if not compiled
            gradients = [compiled(x, run.device) for x in gradients]
        critic_gradient, actor_gradient, gradient_of_model = gradients
        real_rows = args.batch_size if args.value_expansion else round(args.real_ratio * args.batch_size)
        imagines, kept = real_rows < args.batch_size, args.rollouts_per_step * args.model_buffer_age
        buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, run.device)
        imagined = ModelBuffer(kept * max(args.rollout_lengths[:2]) if imagines else 1, *spaces, run.device)
        modules = dict(agent=agent, target=target, model=model, buffer=buffer, imagined=imagined)
        modules |= dict(model_optimizer=model_optimizer, critic_optimizer=critic_optimizer)
        modules |= dict(actor_optimizer=actor_optimizer, alpha_optimizer=alpha_optimizer)
        run.start(envs, **modules)  # all that a checkpoint holds

        obs, metrics, charts, logged_step = envs.reset(args.seed + run.step), [], {}, run.step
        while run.goes_on():
            # Take a step in every environment.
            if run.step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, agent.action_size, device=run.device) - 1
            else:
                noise = torch.randn(args.num_envs, agent.action_size, device=run.device)
                with torch.no_grad():
                    states = agent.encode(torch.as_tensor(obs, device=run.device))
                    actions, _ = squashed_gaussian(*agent.policy(states), noise)
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated = envs.step(agent.to_env(actions))
            buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated)
            run.advance(envs)

            # Learn the model from all steps so far, and follow it for a few more.
            learned_at = model.learned_at.item()
            is_due = run.step >= (learned_at + args.model_frequency if learned_at else args.learning_starts)
            if is_due and (imagines or args.value_expansion):
                if learned_at:
                    new_steps = min(run.step - learned_at, buffer.size) // args.num_envs
                    charts |= model_diagnostics(model, buffer, new_steps)
                data = Transitions(*(x[: buffer.size] for x in buffer.data))
                metrics.append(learn_model(model, model_optimizer, data, args, gradient_of_model))
                model.learned_at.fill_(run.step)
            if is_due and imagines:
                k_1, k_2, t_1, t_2 = args.rollout_lengths
                charts["rollout_length"] = length = int(np.interp(run.step, (t_1, t_2), (k_1, k_2)))
                imagined.limit(kept * length)
                starts = buffer.draw_rows(args.rollouts_per_step * args.model_frequency)
                for transitions in branched_rollouts(model, agent, data.observations[starts], length):
                    imagined.add(*transitions)

            # Update on minibatches of what has been lived through and of what has been imagined.
            for _ in range(args.gradient_steps if run.step > args.learning_starts else 0):
                batch, members = buffer.get(buffer.draw_rows(real_rows)), None
                if imagines:
                    others = imagined.get(imagined.draw_rows(args.batch_size - real_rows))
                    batch = Transitions(*map(torch.cat, zip(batch, others)))
                if args.critic_subset < args.num_critics:
                    members = torch.randperm(args.num_critics, device=run.device)[: args.critic_subset]
                steps = (args.value_expansion + 1,) if args.value_expansion else ()
                noise = torch.randn(*steps, *batch.actions.shape, device=run.device)
                critic_optimizer.zero_grad()
                metrics.append(critic_gradient(agent, target, batch, noise, members, args))
                critic_optimizer.step()
                polyak_update(target, agent.critics, args.tau)
                run.updates += 1
                if run.updates % args.policy_delay == 0:
                    actor_optimizer.zero_grad()
                    alpha_optimizer.zero_grad()
                    metrics.append(actor_gradient(agent, batch, torch.randn_like(batch.actions), args))
                    actor_optimizer.step()
                    if args.autotune:
                        alpha_optimizer.step()

            if run.step - logged_step >= 250 or run.step >= args.total_timesteps:
                run.log(metrics, **charts)
                metrics, charts, logged_step = [], {}, run.step
        return run.finish(agent)


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings or, on --resume, the run's own."""
    for stream in {sys.stdout, sys.stderr} & {sys.__stdout__, sys.__stderr__}:
        stream.reconfigure(errors="replace")  # a console that has no γ shows --help all the same
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--resume")
    known, _ = early.parse_known_args(argv)
    defaults = Args(**{"env_id": known.env_id} | RECOMMENDED.get(known.env_id, {}))
    if known.resume:
        defaults = load_checkpoint(known.resume)["args"]
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    description = f"{(__doc__ or ALGO).splitlines()[0]}\n\nRecommended settings, taken with --env-id alone:\n\n{table}"
    args = tyro.cli(Args, default=defaults, args=argv, description=description)
    if known.resume and replace(args, resume=None, total_timesteps=defaults.total_timesteps) != defaults:
        fail("--resume goes on with the run's own arguments; only --total-timesteps may be changed beside it")
    return args


def check_args(args: Args) -> None:
    """Refuses a value outside the range that its type in Args names."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        values = value if isinstance(value := getattr(args, name), tuple) else (value,)
        for low, high, meaning in itertools.chain(*(getattr(x, "__metadata__", ()) for x in (hint, *get_args(hint)))):
            if not all(x is None or low <= x <= high for x in values):
                fail(f"--{name.replace('_', '-')} {value} must be {meaning}")


def load_checkpoint(folder: str, **modules) -> dict:
    """What a run's checkpoint.pt holds; the states of `modules` in it are loaded into them."""
    try:
        mmap = sys.platform != "win32"  # there a file that optimisers still read from could not be replaced
        state = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True, mmap=mmap)
        if state["algo"] != ALGO:
            raise ValueError(f"it is {state['algo']}.py's")
        state["args"] = Args(**state["args"])
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except Exception as error:  # whatever is wrong with the file, it is no checkpoint of this script
        fail(f"--resume {folder}: not a checkpoint of {ALGO}.py, or one of an older version ({error!r:.200})")
    return state


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not; what it observes becomes a vector, unless it is an index or an image."""
    try:
        env = gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ImportError, TypeError) as error:  # a TypeError: its constructor needs arguments
        hint = "ppo_atari.py and dqn_atari.py play Atari" if "ALE/" in args.env_id else "kwargs go into gym.register"
        hint = "--capture-video needs it to render" if "render_mode" in kwargs else hint
        fail(f"--env-id {args.env_id}: {error} ({hint})")
    plain = isinstance(env.observation_space, Discrete) or len(env.observation_space.shape or ()) in (1, 3)
    return env if plain else gym.wrappers.FlattenObservation(env)


class Envs:
    """N environments, stepped in turn; where an episode ends, the next one begins within the same step.

    Observations are copies (N, …): float32, bytes as they are, int64 of a Discrete space.
    """

    def __init__(self, args: Args, num_envs: int, action_spaces: tuple[type, ...] = (gym.Space,), **kwargs):
        kwargs |= {"render_mode": "rgb_array"} if args.capture_video else {}
        self.envs = [make_env(args, **kwargs) for _ in range(num_envs)]
        self.num_envs, self.time_limit = num_envs, self.envs[0].spec.max_episode_steps
        self.observation_space, self.action_space = self.envs[0].observation_space, self.envs[0].action_space
        index, image = isinstance(self.observation_space, Discrete), self.observation_space.dtype == np.uint8
        self.dtype = np.int64 if index else np.uint8 if image else np.float32
        self.episodes = []  # (environment, return, length) of those that ended in the last step
        if len(self.observation_space.shape) == 3:
            fail(f"{args.env_id} observes images; ppo_atari.py and dqn_atari.py learn from them")
        if not isinstance(self.action_space, action_spaces) or len(self.action_space.shape or ()) > 1:
            needed = " or ".join("a vector in a Box" if x is Box else x.__name__ for x in action_spaces)
            others = "ppo.py takes Discrete and Box, dqn.py Discrete, sac.py Box"
            fail(f"{args.env_id} has the actions {self.action_space}; {ALGO}.py needs {needed} ({others})")

    def film(self, args: Args, folder: str, name: str) -> None:
        """Records episodes 0, 1, 8, 27, 64 … of the first environment, at most 1000 steps of each."""
        self.envs[0] = gym.wrappers.RecordVideo(self.envs[0], folder, name_prefix=name)

    def reset(self, seed: int) -> np.ndarray:
        """First observations (N, …); environment i is seeded with seed + i."""
        self.returns, self.lengths = [0.0] * len(self.envs), [0] * len(self.envs)
        return finite("observation", np.array([x.reset(seed=seed + i)[0] for i, x in enumerate(self.envs)], self.dtype))

    def step(self, actions: Tensor) -> tuple[np.ndarray, ...]:
        """(observations to act on, observations reached, rewards, terminated, truncated), each (N, …).

        The two observations differ where an episode ended: it reached its final one, and the next one has begun.
        """
        obs = reached = np.empty((len(self.envs), *self.observation_space.shape), self.dtype)
        rewards, (terminated, truncated) = np.empty(len(self.envs), np.float32), np.empty((2, len(self.envs)), bool)
        for i, (env, action) in enumerate(zip(self.envs, finite("action", actions.numpy(force=True)))):
            reached[i], reward, terminated[i], truncated[i], _ = env.step(action)
            rewards[i] = reward = float(reward)
            self.returns[i], self.lengths[i] = self.returns[i] + reward, self.lengths[i] + 1
            if self.lengths[i] == 1000 and getattr(env, "recording", False):
                env.stop_recording()  # its frames are kept in memory
        finite("reward", rewards)
        finite("observation", reached)
        self.episodes = [(i, self.returns[i], self.lengths[i]) for i in np.flatnonzero(terminated | truncated)]
        for i, *_ in self.episodes:
            obs = reached.copy() if obs is reached else obs
            obs[i], self.returns[i], self.lengths[i] = finite("observation", self.envs[i].reset()[0]), 0.0, 0
        return obs, reached, rewards, terminated, truncated

    def close(self) -> None:
        """Closes them all."""
        for env in self.envs:
            env.close()


def finite(name: str, numbers: np.ndarray) -> np.ndarray:
    """The same numbers; stops the run where one is not finite, before it enters a buffer."""
    if not np.isfinite(numbers).all():
        fail(f"a number of the {name} is not finite; the last checkpoint stays", code=1)
    return numbers


class Run(ExitStack):
    """A run directory, and what a run sets in its process (seeds, threads, signals), put back where `with` ends."""

    def __init__(self, args: Args):
        super().__init__()
        check_args(args)
        self.args, self.step, self.saved_step, self.longest_episode = args, 0, 0, 0
        self.updates = 0  # gradient steps, in files whose schedules count them
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        if kind != "cpu" and not getattr(torch, kind).is_available():
            fail(f"--device {kind}: PyTorch {torch.__version__} finds no such device here; use --device auto")
        if type(self) is Run and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            fail("learns in one process; ppo.py and ppo_atari.py learn in several under torchrun")
        self.device, self.recent_returns, self.stopped = torch.device(kind), deque(maxlen=100), False
        self.callback(torch.set_num_threads, torch.get_num_threads())
        self.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        if args.compile:
            self.compile_backward()

        def stop(number: int, frame) -> None:  # the iteration in progress ends first; a second signal stops at once
            self.stopped = True
            signal.signal(number, signal.SIG_DFL)

        if threading.current_thread() is threading.main_thread():
            for number in {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}:
                self.callback(signal.signal, number, signal.signal(number, stop))
        torch.set_num_threads(args.torch_threads)
        random.seed(args.seed)
        np.random.seed(args.seed)  # for environments that draw from these two; a checkpoint has PyTorch's state alone
        torch.manual_seed(args.seed)

    def compile_backward(self) -> None:
        """Has torch.compile take loss.backward() into its graph, where PyTorch can; refuses without a C++ compiler."""
        if not shutil.which(os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))):
            fail("--compile needs a C++ compiler: install g++, or name one in the environment variable CXX")
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            self.enter_context(torch._dynamo.config.patch(trace_autograd_ops=True))

    def __exit__(self, kind, error, trace) -> bool:
        super().__exit__(kind, error, trace)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            fail(f"the disk is full; the checkpoint of step {self.saved_step} stays", code=1)
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
        about = {"algo": ALGO, "args": asdict(replace(args, resume=None))}
        about["versions"] = {"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, gym, np)}
        about["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (self.dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
        if args.capture_video:
            envs.film(args, str(self.dir / "videos"), f"from-step-{self.step}")
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if args.resume else None)
        self.callback(self.writer.close)
        if not args.resume:
            self.monitor.write(f"#{json.dumps({'t_start': self.start_time, 'env_id': args.env_id})}\nr,l,t\n")
            self.checkpoint()
        recommended, given = RECOMMENDED.get(args.env_id, {}), asdict(args)
        taken = " ".join(f"{name}={given[name]}" for name in recommended if given[name] == recommended[name])
        other = " ".join(f"{name}={given[name]}" for name in recommended if given[name] != recommended[name])
        print(f"recommended settings taken: {taken or 'none'}; overridden: {other or 'none'}", flush=True)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", desc=args.env_id, mininterval=0.5)
        self.callback(self.bar.close)

    def new_dir(self) -> Path:
        """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}, or the first of …_1, …_2 that does not exist yet."""
        folder, env_id = Path(self.args.output_dir).expanduser(), re.sub(r"[^\w.=-]+", "-", self.args.env_id)
        name = f"{env_id}__{ALGO}__{self.args.seed}__{int(time.time())}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (folder / (f"{name}_{n}" if n else name) for n in itertools.count()):
                with suppress(FileExistsError):
                    path.mkdir()
                    return path
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
        state |= {"algo": ALGO, "args": asdict(replace(self.args, resume=None))}
        state |= {name: getattr(self, name) for name in ("step", "updates", "longest_episode")}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        state |= {"seconds": time.time() - self.start_time, "monitor_size": (self.dir / "monitor.csv").stat().st_size}
        try:
            torch.save(state, self.dir / "checkpoint.tmp")
            os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        except (OSError, RuntimeError) as error:
            (self.dir / "checkpoint.tmp").unlink(missing_ok=True)
            fail(f"no checkpoint could be written, is the disk full? That of step {self.saved_step} stays ({error})", 1)
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
        names = dict.fromkeys(itertools.chain(*metrics))
        losses = {name: torch.stack([x[name] for x in metrics if name in x]).mean().item() for name in names}
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            fail(f"{', '.join(bad)} not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", 1)
        charts["SPS"] = self.step / (time.time() - self.start_time)
        for group, values in (("losses", losses), ("charts", charts)):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, self.step)
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
