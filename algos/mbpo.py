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

--value-expansion H uses the model otherwise: the minibatches are real, and the critics' targets are rewards of H
imagined steps and the value after them (MVE, arXiv 1803.00101). Else --real-ratio 1 leaves the model out: that is
sac.py, bit for bit (tests/test_mbpo.py), which agrees with Stable-Baselines3's (SB3 has no MBPO).

    python algos/mbpo.py              # Pendulum-v1: solved in 300 to 800 steps, by sac.py in 2800 to 3800
    python algos/mbpo.py --env-id HalfCheetah-v5 --compile
"""

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
from collections.abc import Callable, Iterator
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


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Count = 5_000  # environment steps
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where networks and buffers live; auto prefers CUDA
    torch_threads: Count | Literal["auto"] = 1  # CPU threads; auto tries for a second, not reproducible by itself
    compile: bool = False  # torch.compile: pays in runs of several minutes; on a GPU gradients become CUDA graphs, too
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # of float32 products; auto never rounds
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 5_000  # environment steps between checkpoints, which hold the model and both buffers too
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on, of the first environment

    # environment
    env_id: str = "Pendulum-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 1  # parallel environments N

    # model
    ensemble_size: Count = 7  # members M of the ensemble
    num_elites: Count = 5  # members that imagine: those that predict the held-out data best
    model_hidden_sizes: tuple[Count, ...] = (200, 200, 200, 200)  # SiLU layers of each member
    model_learning_rate: Positive = 1e-3  # Adam's step size for the ensemble
    model_weight_decay: Fraction = 5e-5  # weight of ½ Σ w² in the ensemble's loss
    model_batch_size: Count = 256  # transitions per gradient step of each member
    model_frequency: Count = 250  # environment steps between two trainings of the ensemble, each on all data so far
    holdout: Annotated[float, (0, 0.9, "from 0 to 0.9")] = 0.2  # share of the data held out, 1 to 5000 transitions
    patience: Count = 5  # a training ends when no member became 1 % better on held-out data for so many epochs
    model_epochs: Count = 100  # epochs after which a training ends in any case
    rollouts_per_step: Count = 400  # imagined rollouts per environment step, all begun after a training of the ensemble
    rollout_lengths: tuple[int, int, int, int] = (1, 1, 0, 1)  # k₁ k₂ t₁ t₂: from k₁ steps at step t₁ to k₂ at t₂
    model_buffer_age: Count = 1_000  # environment steps after which imagined data go; later where rollouts end early
    real_ratio: Fraction = 0.05  # share of real transitions in a minibatch; 1 makes no use of the model
    value_expansion: Count | None = None  # H imagined steps in the targets, on real minibatches alone

    # policy
    buffer_size: Count = 1_000_000  # real transitions that the replay buffer holds
    learning_starts: Annotated[int, (10, math.inf, "at least 10")] = 250  # random steps before the first training
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
GROWING = MUJOCO | dict(checkpoint_every=50_000)  # gigabytes, by the imagined data
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "Pendulum-v1": dict(
        total_timesteps=3_000, learning_starts=200, learning_rate=1e-3, tau=0.02, hidden_sizes=(128, 128),
        model_hidden_sizes=(128, 128, 128), model_batch_size=32, patience=10, model_frequency=50, model_buffer_age=100,
        rollouts_per_step=40, rollout_lengths=(30, 30, 0, 1)),
    "HalfCheetah-v5": MUJOCO | dict(total_timesteps=400_000, gradient_steps=10),
    "Hopper-v5": GROWING | dict(total_timesteps=125_000, rollout_lengths=(1, 15, 20_000, 100_000)),
    "Walker2d-v5": MUJOCO | dict(total_timesteps=300_000),
    "Ant-v5": GROWING | dict(total_timesteps=300_000, rollout_lengths=(1, 25, 20_000, 100_000)),
    "Humanoid-v5": GROWING | dict(total_timesteps=300_000, rollout_lengths=(1, 25, 20_000, 300_000)),
}
# fmt: on


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


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
        self.register_buffer("bounds", torch.as_tensor(np.stack([action_space.low, action_space.high])))

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
        low, high = self.bounds
        return (low + (actions + 1) / 2 * (high - low)).clamp(low, high)

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

    Without the environment's rule of termination each gives a logit for it, too. Weights of `network` are (M, …, …).
    """

    def __init__(self, members: int, num_elites: int, state_size: int, action_size: int, hidden_sizes, termination):
        super().__init__()
        self.members, self.outputs, self.termination = members, state_size + 1, termination
        sizes, layers = [state_size + action_size, *hidden_sizes, 2 * self.outputs + (termination is None)], []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [EnsembleLinear(members, inputs, outputs), nn.SiLU()]
        self.network = nn.Sequential(*layers[:-1])
        self.log_variance_bounds = nn.Parameter(torch.tensor([-10.0, 0.5])[:, None].repeat(1, self.outputs))
        self.register_buffer("elites", torch.arange(num_elites))
        self.register_buffer("learned_at", torch.zeros((), dtype=torch.int64))  # environment step of the last training
        for name, size in (("input", sizes[0]), ("output", self.outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def member_weights(self) -> dict[str, Tensor]:
        """The network's weights by name, first dimension M; refuses those that members would share."""
        weights = dict(itertools.chain(self.network.named_parameters(), self.network.named_buffers()))
        if shared := [name for name, x in weights.items() if x.dim() < 3 or len(x) != self.members]:
            raise TypeError(f"DynamicsEnsemble: members would share {shared}; each needs its own, as in EnsembleLinear")
        return weights

    def forward(self, inputs: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(s, a) (K or 1, B, D + A) → mean, log σ² (K, B, D + 1), standardised, logits (K, B, 0 or 1) of K members."""
        weights = {} if members is None else {name: x[members] for name, x in self.member_weights().items()}
        outputs = torch.func.functional_call(self.network, weights, (inputs - self.input_mean) / self.input_std)
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


class ModelBuffer(ReplayBuffer):
    """The newest imagined transitions. `capacity` may be lowered and raised again before an `add`."""

    def add(self, *transitions) -> None:
        """The fields of Transitions, each (B, …)."""
        count = min(len(transitions[0]), self.capacity)
        rows = (self.position + torch.arange(count, device=self.data.rewards.device)) % self.capacity
        for stored, new in zip(self.data, transitions):
            stored.index_copy_(0, rows, new[-count:])
        self.size = min(max(self.size, self.position + count), self.capacity)
        self.position = (self.position + count) % self.capacity

    def state_dict(self) -> dict:
        """The rows in use, and where the next ones go."""
        return {name: x[: self.size].clone() for name, x in self.data._asdict().items()} | {"position": self.position}


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on `device`, where CUDA or Linux tells (a container's limit aside)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    return math.inf


# The maths: the model, then soft actor-critic ---------------------------------------------------------------


ENDLESS = "Pendulum-v1", "HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5"  # only a time limit ends them
# Whether states (B, D) that a step has led to are terminal (B,): gymnasium's, where gym.make is given no options.
TERMINATION: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(ENDLESS, lambda x: torch.zeros_like(x[:, 0], dtype=torch.bool)),
    "InvertedPendulum-v5": lambda x: ~((x[:, 1].abs() <= 0.2) & x.isfinite().all(-1)),
    "InvertedDoublePendulum-v5": lambda x: 0.6 * (x[:, 3] + x[:, 3] * x[:, 4] - x[:, 1] * x[:, 2]) <= 1,  # the tip
    "Hopper-v5": lambda x: ~((x[:, 0] > 0.7) & (x[:, 1].abs() < 0.2) & (x[:, 1:].abs() < 100).all(-1)),
    "Walker2d-v5": lambda x: ~((0.8 < x[:, 0]) & (x[:, 0] < 2) & (x[:, 1].abs() < 1)),
    "Ant-v5": lambda x: ~((0.2 <= x[:, 0]) & (x[:, 0] <= 1) & x.isfinite().all(-1)),
    "Humanoid-v5": lambda x: ~((1 < x[:, 0]) & (x[:, 0] < 2)),
}


def model_errors(model: nn.Module, inputs: Tensor, outputs: Tensor, terminated: Tensor) -> tuple[Tensor, Tensor]:
    """Of each member (M,): −log p_θᵢ in nats, and the mean square error of μ_i in variances of the outputs.

    Inputs, standardised outputs and 0 or 1, (M or 1, B, …); −log p of a learned termination is added to both.
    """
    mean, log_variance, logits = model(inputs)
    square = (outputs - mean).square()
    nll = 0.5 * (square * (-log_variance).exp() + log_variance + math.log(2 * math.pi)).sum(-1).mean(1)
    ends = terminated.unsqueeze(-1).expand_as(logits)
    surprise = F.binary_cross_entropy_with_logits(logits, ends, reduction="none").sum(-1).mean(1)  # 0 of no logits
    return nll + surprise, square.mean((1, 2)) + surprise


def model_gradient(model, inputs: Tensor, outputs: Tensor, terminated: Tensor, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ) in .grad, each member's on its own minibatch (M, B, …), as in `model_errors`; returns what to log.

    The bounds of log σ² are drawn together a little, to the variances that data have (arXiv 1805.12114, appendix A.1).
    """
    nll, _ = model_errors(model, inputs, outputs, terminated)
    weights = sum(x.square().sum() for name, x in model.network.named_parameters() if name.endswith("weight"))
    loss = nll.sum() + 0.01 * model.log_variance_bounds.diff(dim=0).sum() + 0.5 * args.model_weight_decay * weights
    loss.backward()
    return {"model_loss": loss.detach()}


def learn_model(model, optimizer, data: Transitions, args: Args, gradient_of=model_gradient) -> dict[str, Tensor]:
    """Trains every member on a bootstrap of `data` until none gets better on the held-out part; returns what to log.

    Each keeps its weights of least square error, which surprises blow up less than −log p; the best are the elites.
    """
    inputs = torch.cat([data.observations, data.actions], -1)
    outputs = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], -1)
    for x, mean, std in ((inputs, model.input_mean, model.input_std), (outputs, model.output_mean, model.output_std)):
        deviation = x.double().std(0, correction=0)
        mean.copy_(x.double().mean(0))
        std.copy_(torch.where(deviation < 1e-6, 1.0, deviation))  # a constant tells nothing
    outputs, terminated = (outputs - model.output_mean) / model.output_std, data.terminated.float()
    order, weights = torch.randperm(len(inputs), device=inputs.device), model.member_weights()
    held_out, rest = order.split([(count := max(1, min(int(args.holdout * len(order)), 5_000))), len(order) - count])
    bootstrap = rest[torch.randint(len(rest), (args.ensemble_size, len(rest)), device=rest.device)]
    best_weights = {name: x.detach().clone() for name, x in weights.items()}
    best = best_nll = torch.full((args.ensemble_size,), math.inf, device=inputs.device)
    losses, waited = [], 0
    for epoch in range(args.model_epochs + 1):
        with torch.no_grad():
            model.eval()
            nll, error = model_errors(model, *(x[held_out].unsqueeze(0) for x in (inputs, outputs, terminated)))
        better = error < 0.99 * best
        best, best_nll = torch.where(better, error, best), torch.where(better, nll, best_nll)
        for name, x in weights.items():
            best_weights[name][better] = x.detach()[better]
        waited = 0 if better.any() else waited + 1
        if waited == args.patience or epoch == args.model_epochs:
            break
        model.train()
        shuffled = bootstrap.gather(1, torch.rand_like(bootstrap, dtype=torch.float32).argsort(1))
        for rows in shuffled.split(args.model_batch_size, 1):
            optimizer.zero_grad()
            losses.append(gradient_of(model, inputs[rows], outputs[rows], terminated[rows], args)["model_loss"])
            optimizer.step()
    for name, x in weights.items():
        x.detach().copy_(best_weights[name])
    model.elites.copy_(best.argsort()[: args.num_elites])
    metrics = dict(model_nll=best_nll.mean(), model_error=best.mean())
    return metrics | dict(model_loss=torch.stack(losses).mean(), model_epochs=torch.tensor(float(epoch)))


@torch.no_grad()
def branched_rollouts(model, agent, states: Tensor, length: int) -> Iterator[Transitions]:
    """`length` steps under the policy from states (B, D), each as Transitions; what has terminated goes no further."""
    while length > 0 and len(states) > 0:
        noise = torch.randn(len(states), agent.action_size, device=states.device)
        actions, _ = squashed_gaussian(*agent.policy(states), noise)
        next_states, rewards, terminated = model.step(states, actions)
        yield Transitions(states, actions, rewards, next_states, terminated, torch.zeros_like(terminated))
        states, length = next_states[~terminated], length - 1


@torch.no_grad()
def model_diagnostics(model, buffer: ReplayBuffer, newest: int) -> dict[str, float]:
    """Of the `newest` rows, yet to be learned from: RMS error and disagreement of the elites' means, in output σs."""
    age = torch.arange(1, newest + 1, device=buffer.data.rewards.device)
    data = buffer.get((buffer.position - age) % buffer.capacity)
    outputs = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], -1)
    means, _, _ = model(torch.cat([data.observations, data.actions], -1).unsqueeze(0), model.elites)
    error = means.mean(0) - (outputs - model.output_mean) / model.output_std
    return {"unseen_error": error.square().mean().sqrt().item(), "disagreement": means.std(0).mean().item()}


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh u, u = mean + σ·noise, and log π(a), (…, A) and (…,) (arXiv 1812.05905, appendix C); inputs (…, A)."""
    u = mean + log_std.exp() * noise
    log_gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh² u)
    return u.tanh(), (log_gaussian - log_slope).sum(-1)


def sac_critic_gradient(agent, target, batch: tuple, noise: Tensor, members: Tensor | None, args: Args) -> dict:
    """Leaves ∇L(θ) in the critics' .grad; noise (B, A) is that of a', members the critics of the target's minimum."""
    with torch.no_grad():
        next_states = agent.encode(batch.next_observations)
        next_actions, next_log_probs = squashed_gaussian(*agent.policy(next_states), noise)
        next_q = target(next_states, next_actions)[slice(None) if members is None else members]
        soft_values = next_q.min(0).values - agent.log_alpha.exp() * next_log_probs  # (B,); arXiv 1812.05905, eq. 3
        targets = batch.rewards + args.gamma * soft_values * ~batch.terminated
    q_values = agent.critics(agent.encode(batch.observations), batch.actions)
    loss = 0.5 * (q_values - targets).square().mean(1).sum()
    loss.backward()
    return {"critic_loss": loss.detach(), "q_values": q_values.detach().mean()}


def sac_actor_gradient(agent, batch: tuple, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """Leaves −∇J(φ) in the actor's .grad and, with --autotune, ∇L(α) (eq. 18, for log α) in log α's; noise (B, A)."""
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
    Q(ŝ_t, â_t) learns y_t (TD-k trick of arXiv 1803.00101), Q(s, a) learns r + γ v_0; ŝ_0 = s'. A termination ends it.
    """
    with torch.no_grad():
        alpha, pairs = agent.log_alpha.exp(), (agent.encode(batch.observations), batch.actions, batch.rewards)
        steps = [(*pairs, torch.ones_like(batch.terminated), torch.zeros_like(batch.rewards))]  # no log π(a|s) counts
        states, alive = agent.encode(batch.next_observations), ~batch.terminated
        for noise_t in noise[:-1]:
            actions, log_probs = squashed_gaussian(*agent.policy(states), noise_t)
            next_states, rewards, terminated = model.step(states, actions)
            steps.append((states, actions, rewards, alive, log_probs))
            states, alive = next_states, alive & ~terminated
        actions, log_probs = squashed_gaussian(*agent.policy(states), noise[-1])
        next_q = target(states, actions)
        next_q = next_q if members is None else next_q[members]
        values = (next_q.min(0).values - alpha * log_probs) * alive
        targets = []
        for _, _, rewards, alive, log_probs in reversed(steps):
            targets.insert(0, rewards + args.gamma * values)
            values = (targets[0] - alpha * log_probs) * alive
        states, actions, _, weights, _ = map(torch.cat, zip(*steps))
    q_values = agent.critics(states, actions)
    loss = 0.5 * ((q_values - torch.cat(targets)).square() * weights).sum(1).sum() / weights.sum()
    loss.backward()
    return {"critic_loss": loss.detach(), "q_values": q_values[:, : len(batch.rewards)].detach().mean()}


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's statistics, are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for old, new in zip(target.buffers(), online.buffers()):
        old.copy_(new)


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, the backward pass in the function included; on CUDA as CUDA graphs, whose results are copied."""
    graphs = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
    return lambda *inputs: {name: x.clone() for name, x in graphs(*inputs).items()}


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args := settle(args)) as run:
        torch.set_float32_matmul_precision(args.matmul_precision)
        envs = Envs(args, args.num_envs, (Box,))
        spaces = envs.observation_space, envs.action_space
        if args.learning_starts >= args.total_timesteps:
            fail(f"--learning-starts {args.learning_starts} must be below --total-timesteps {args.total_timesteps}")
        if not (envs.action_space.high / 2 - envs.action_space.low / 2 < np.finfo(np.float32).max / 2).all():
            fail(f"{args.env_id} has the actions {envs.action_space}, too wide to be scaled to; ppo.py takes them")
        if not isinstance(spaces[0], Box) or spaces[0].dtype.kind != "f":
            fail(f"{args.env_id} has the observations {spaces[0]}; mbpo predicts real numbers. Use sac.py")
        if args.critic_subset > args.num_critics or args.num_elites > args.ensemble_size:
            fail("--critic-subset must be at most --num-critics, and --num-elites at most --ensemble-size")
        k_1, k_2, t_1, t_2 = args.rollout_lengths
        if min(k_1, k_2) < 1 or t_1 >= t_2:
            fail(f"--rollout-lengths {k_1} {k_2} {t_1} {t_2}: k₁ and k₂ must be at least 1, and t₁ before t₂")
        if args.env_id not in TERMINATION:
            tqdm.write(f"{ALGO}.py: when {args.env_id} ends is not known here: the model learns it", sys.stderr)
        agent = SoftActorCritics(*spaces, args.hidden_sizes, args.num_critics, args.alpha).to(run.device)
        target = copy.deepcopy(agent.critics).requires_grad_(False).eval()
        sizes, ends = (spaces[0].shape[0], agent.action_size, args.model_hidden_sizes), TERMINATION.get(args.env_id)
        model = DynamicsEnsemble(args.ensemble_size, args.num_elites, *sizes, ends).to(run.device).eval()
        model_optimizer = lean(torch.optim.Adam(model.parameters(), args.model_learning_rate, fused=True))
        critic_optimizer = lean(torch.optim.Adam(agent.critics.parameters(), args.learning_rate, fused=True))
        actor_optimizer = lean(torch.optim.Adam(agent.actor.parameters(), args.learning_rate, fused=True))
        alpha_optimizer = lean(torch.optim.Adam([agent.log_alpha], args.learning_rate, fused=True))
        expansion = functools.partial(value_expansion_gradient, model) if args.value_expansion else None
        gradients = expansion or sac_critic_gradient, sac_actor_gradient, model_gradient
        if args.compile:
            run.enter_context(torch._inductor.config.patch(fallback_random=True))  # draws as if not compiled
            gradients = [compiled(x, run.device) for x in gradients]
        critic_gradient, actor_gradient, gradient_of_model = gradients
        real_rows = args.batch_size if args.value_expansion else round(args.real_ratio * args.batch_size)
        imagines, kept = real_rows < args.batch_size, args.rollouts_per_step * args.model_buffer_age
        buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, run.device)
        capacity = kept * max(k_1, k_2) if imagines else 1
        if capacity * sum(x[0].nbytes for x in buffer.data) > free_memory(run.device):
            fail(f"{capacity:,} imagined transitions do not fit: lower --model-buffer-age or --rollouts-per-step")
        imagined = ModelBuffer(capacity, 1, *spaces, run.device)
        modules = dict(agent=agent, target=target, model=model, buffer=buffer, imagined=imagined)  # for checkpoints
        modules |= dict(model_optimizer=model_optimizer, critic_optimizer=critic_optimizer)
        run.start(envs, **modules, actor_optimizer=actor_optimizer, alpha_optimizer=alpha_optimizer)

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
                    charts |= model_diagnostics(model, buffer, min(run.step - learned_at, buffer.size))
                data = Transitions(*(x[: buffer.size] for x in buffer.data))
                metrics.append(learn_model(model, model_optimizer, data, args, gradient_of_model))
                model.learned_at.fill_(run.step)
            if is_due and imagines:
                charts["rollout_length"] = length = int(np.interp(run.step, (t_1, t_2), (k_1, k_2)))
                imagined.capacity = kept * length
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


# CUDA, and what auto stands for ----------------------------------------------------------------------------


def settle(args: Args) -> Args:
    """The same with a number for --torch-threads auto and a setting for --matmul-precision auto, which it prints."""
    precision = exact_precision(args.device) if args.matmul_precision == "auto" else args.matmul_precision
    threads, before = args.torch_threads, torch.get_float32_matmul_precision()
    if threads == "auto":
        torch.set_float32_matmul_precision(precision)
        counts = [2**i for i in range(int(math.log2(os.cpu_count() or 1)) + 1)]
        shape = max(args.batch_size, 1), max([1, *args.hidden_sizes])
        threads = max(counts, key=lambda count: products_per_second(count, *shape))
        torch.set_float32_matmul_precision(before)
    settled = replace(args, torch_threads=threads, matmul_precision=precision)
    if settled != args:
        print(f"auto: --torch-threads {threads} --matmul-precision {precision}")
    return settled


def products_per_second(threads: int, batch_size: int, width: int) -> float:
    """How often that many threads can take a layer's three products, forward and backward, in a second."""
    before, inputs, weights = torch.get_num_threads(), torch.ones(batch_size, width), torch.ones(width, width)
    torch.set_num_threads(threads)
    count, start = -100, time.perf_counter()  # of which the first 100 are not timed
    while count < 1 or time.perf_counter() < start + 0.3:
        for product in (inputs @ weights, inputs @ weights.T, inputs.T @ inputs):
            product.relu_()
        count += 1
        start = time.perf_counter() if count == 0 else start
    torch.set_num_threads(before)
    return count / (time.perf_counter() - start)


def exact_precision(device: str) -> str:
    """The --matmul-precision that multiplies float32 fastest on this processor, or GPU, without rounding.

    On AMD's processors of family 26 (Zen 5) PyTorch's usual choice, MKL, uses half the width of the vector unit, and
    oneDNN, which "medium" calls, all of it. That may round factors to bfloat16, so it is held against float64 first.
    """
    precision, before, about = "highest", torch.get_float32_matmul_precision(), os.getenv("PROCESSOR_IDENTIFIER", "")
    with suppress(OSError):  # on Windows there is no such file, but the variable: AMD64 Family 26 …, AuthenticAMD
        about = Path("/proc/cpuinfo").read_text()
    family = re.search(r"family\s*:?\s*(\d+)", about, re.IGNORECASE)
    on_cpu = device == "cpu" or device == "auto" and not torch.cuda.is_available()
    if on_cpu and "AuthenticAMD" in about and family and int(family[1]) >= 26:
        torch.set_float32_matmul_precision("medium")
        factors = [torch.arange(256 * n).add(n).sin().view(256, n) for n in (32, 256)]
        errors = [(x.T @ x - (x.T.double() @ x.double())).abs().max() for x in factors]
        precision = "medium" if max(errors) < 1e-3 else "highest"  # rounded factors make it 1e-2 or more
        torch.set_float32_matmul_precision(before)
    return precision


if __name__ == "__main__":
    train(parse_args())
