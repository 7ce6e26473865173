"""SAC: soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905), and REDQ by flags.

Maximises return and entropy together, with a stochastic policy π_φ; keeps every transition in a replay buffer, and
after every few steps takes gradient steps on minibatches from it, towards targets from a copy θ⁻ that follows slowly,

    y    = r + γ (min_i Q_θ⁻ᵢ(s', a') − α log π_φ(a'|s')),  a' ~ π_φ(·|s')        r alone if s' is terminal
    L(θ) = ½ Σ_i E[(Q_θᵢ(s, a) − y)²]
    J(φ) = E[min_i Q_θᵢ(s, ã) − α log π_φ(ã|s)],  ã ~ π_φ(·|s)                    ascended, through ã
    L(α) = −log α · E[log π_φ(ã|s) + H̄]                                           entropy is held at H̄ = −dim(a)
    θ⁻ ← (1 − τ) θ⁻ + τ θ

The policy is a Gaussian u ~ N(m(s), σ(s)²) squashed by a = tanh u, so log π(a|s) = log N(u) − Σ log(1 − tanh² u).
Details that matter, and why:
- log(1 − tanh² u) is 2 (log 2 − u − log(1 + e⁻²ᵘ)): exact where tanh u rounds to ±1, and nothing is added for safety.
- The minimum over critics: a policy that climbs one critic finds its errors; a minimum errs on the low side.
- log σ is kept within [−20, 2].
- A time limit is not a termination: a truncated step bootstraps from its true final observation.
- Actions are in [−1, 1] everywhere, the replay buffer included, and scaled to the space's bounds on their way into
  the environment; entropies are those of actions in [−1, 1].
- The critics are one network with an extra dimension: M of them cost one batched product per layer.

REDQ (Chen et al. 2021, arXiv 2101.05982) draws a random few of many critics for each target, so that many gradient
steps per environment step do not overestimate; its policy climbs the critics' mean, once per environment step. The
paper's N is --num-critics, its M --critic-subset:

    python algos/sac.py --env-id Hopper-v5 --num-critics 10 --critic-subset 2 --gradient-steps 20 --policy-delay 20

Against Stable-Baselines3: the same update (parameters and α agree to 1e-5 after 200 gradient steps,
tests/test_sac.py), but for the 1e-6 that SB3 adds to 1 − tanh² u.

    python algos/sac.py                                   # Pendulum-v1
    python algos/sac.py --env-id HalfCheetah-v5 --seed 3
    python algos/sac.py --resume runs/HalfCheetah-v5__sac__3__…
    torchrun --nproc-per-node 2 algos/sac.py  # data parallel: each process has its own environments and
                                              # buffer, but after --resume all begin with rank 0's
"""

import argparse
import copy
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
import warnings
from collections import deque
from collections.abc import Callable
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
    total_timesteps: int = 100_000
    """environment steps, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks and the replay buffer live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; two are faster than one for layers of 256, if there are cores to spare"""
    compile: bool = False
    """compile the gradient with torch.compile: pays in runs of several minutes; on a GPU acting and updates become
    CUDA graphs, too, unless torchrun runs several processes"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of float32 products, see torch.set_float32_matmul_precision: below highest a GPU may round to TF32, with medium a
    CPU to bfloat16; medium also takes oneDNN's in place of MKL's: benchmarks/README.md has where that is faster"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, which hold the replay buffer too"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "Pendulum-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 1
    """parallel environments N (per process)"""

    # algorithm
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (per process)"""
    learning_starts: int = 5_000
    """environment steps with random actions before the first update; a run that is no longer never learns"""
    batch_size: int = 256
    """transitions per gradient step (per process)"""
    train_frequency: int = 1
    """steps of every environment between updates"""
    gradient_steps: int = 1
    """gradient steps per update, whatever the number of environments"""
    learning_rate: float = 3e-4
    """Adam's step size, for policy, critics and temperature"""
    gamma: float = 0.99
    """discount γ"""
    tau: float = 0.005
    """share τ of the trained networks in an update of the target critics"""
    num_critics: int = 2
    """critics M; more than --critic-subset make it REDQ"""
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
MUJOCO = dict(total_timesteps=1_000_000, learning_starts=10_000)
RECOMMENDED = {
    "Pendulum-v1": dict(total_timesteps=20_000, learning_starts=100, learning_rate=1e-3),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "InvertedPendulum")},
    "Humanoid-v5": MUJOCO | dict(total_timesteps=2_000_000),
    "Swimmer-v5": MUJOCO | dict(gamma=0.999),
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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The maths --------------------------------------------------------------------------------------------------


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


CRITIC_METRICS = ("critic_loss", "q_values")
ACTOR_METRICS = ("actor_loss", "entropy", "alpha")


def sac_critic_gradient(agent, target, batch: Transitions, noise, members, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch, and CRITIC_METRICS (2,)."""
    loss, q_values = sac_critic_loss(agent, target, batch, noise, members, args)
    return gradient_vector(loss, agent.critics), torch.stack([loss, q_values]).detach()


def sac_actor_gradient(agent, batch: Transitions, noise: Tensor, args: Args) -> tuple[Tensor, Tensor | None, Tensor]:
    """−∇J(φ) on a minibatch, the temperature's gradient (1,) with --autotune, and ACTOR_METRICS (3,)."""
    alpha = agent.alpha
    states = agent.encode(batch.observations)
    loss, log_probs = sac_actor_loss(agent, states, noise, alpha, use_mean=args.critic_subset < args.num_critics)
    alpha_gradient = None
    if args.autotune:
        # To change it in the course of training fill a tensor that stays: a CUDA graph keeps a number as it was.
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

LOG_EVERY = 1_000
"""Environment steps between two points of losses/*, which are means over the updates since the last one."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    torch.set_float32_matmul_precision(args.matmul_precision)
    spaces = check_spaces(args, (Box,), "For Discrete actions use dqn.py.")
    check_bounds(args, spaces[1])
    if args.critic_subset > args.num_critics:
        fail(f"--critic-subset {args.critic_subset} must be at most --num-critics {args.num_critics}")
    if args.alpha <= 0:
        fail(f"--alpha {args.alpha} must be positive")
    agent = SoftActorCritics(*spaces, args.hidden_sizes, args.num_critics, args.alpha).to(device)
    target = copy.deepcopy(agent.critics).requires_grad_(False)
    actor_optimizer, critic_optimizer, alpha_optimizer = (
        vector_adam(x, args.learning_rate) for x in (agent.actor, agent.critics, agent.temperature)
    )
    critic_gradient, actor_gradient = (
        fused(x) if args.compile else x for x in (sac_critic_gradient, sac_actor_gradient)
    )
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, device)
    counter = nn.Module()  # a module, so that a checkpoint holds it
    counter.register_buffer("updates", torch.zeros((), dtype=torch.int64))
    modules = {"agent": agent, "target": target, "buffer": buffer, "counter": counter}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    run = Run(args, rank, modules | {"alpha_optimizer": alpha_optimizer})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    def act(obs: Tensor) -> tuple[Tensor, Tensor]:
        """a ~ π(·|s) in [−1, 1], and what the environment takes for it."""
        noise = torch.randn(args.num_envs, agent.action_size, device=device)
        with torch.no_grad():
            actions, _ = agent.sample(agent.encode(obs), noise)
            return actions, agent.to_env(actions)

    def critic_step(rows: Tensor, members: Tensor | None) -> tuple[Transitions, Tensor]:
        batch = buffer.get(rows)
        noise = torch.randn_like(batch.actions)
        return batch, sac_critic_update(agent, target, critic_optimizer, batch, noise, members, args, critic_gradient)

    def actor_step(*batch: Tensor) -> Tensor:
        batch = Transitions(*batch)
        noise = torch.randn_like(batch.actions)
        return sac_actor_update(agent, actor_optimizer, alpha_optimizer, batch, noise, args, actor_gradient)

    if args.compile and device.type == "cuda" and world_size == 1:
        act, critic_step, actor_step = map(CudaGraph, (act, critic_step, actor_step))

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    critic_metrics, actor_metrics = [], []
    logged_step = run.step
    while run.step < args.total_timesteps and not run.interrupted():
        # Collect a few steps from every environment.
        for _ in range(args.train_frequency):
            if run.step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, agent.action_size, device=device) - 1
                env_actions = agent.to_env(actions)
            else:
                actions, env_actions = act(torch.as_tensor(obs, dtype=agent.observation_dtype, device=device))
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, env_actions)
            buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated)
            run.step += args.num_envs * world_size
            run.log_episodes(infos)

        # Update on minibatches of everything in the buffer.
        if run.step > args.learning_starts:
            for _ in range(args.gradient_steps):
                rows, members = buffer.draw_rows(args.batch_size), None
                if args.critic_subset < args.num_critics:
                    members = torch.randperm(args.num_critics, device=device)[: args.critic_subset]
                batch, metrics = critic_step(rows, members)
                critic_metrics.append(metrics.clone())  # CUDA graphs reuse the memory of their outputs
                counter.updates += 1
                if counter.updates % args.policy_delay == 0:
                    actor_metrics.append(actor_step(*batch).clone())

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            losses = {}
            for names, metrics in ((CRITIC_METRICS, critic_metrics), (ACTOR_METRICS, actor_metrics)):
                if metrics:
                    losses |= dict(zip(names, average(torch.stack(metrics).mean(0)).tolist()))
            run.log(losses)
            critic_metrics, actor_metrics, logged_step = [], [], run.step
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


def fused(function: Callable) -> Callable:
    """torch.compile, a backward pass within the function included."""
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # an older PyTorch splits the graph at autograd.grad
        torch._dynamo.config.trace_autograd_ops = True
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # --matmul-precision has them
    return torch.compile(function)


class CudaGraph:
    """A function of tensors as one CUDA graph: all its kernels for the price of one launch.

    The first three calls run it, the fourth records it and later ones replay that: Python in it no longer runs, and a
    number in it (a learning rate, τ, the buffer's size) stays what it was. What is to change has to be an input or a
    tensor that is filled in place; what it works on (weights, optimisers, the buffer) is never to be replaced.
    Inputs have the same shapes in every call; the fourth call's are kept, and later ones written over them. Results
    hold until the next call: clone what you keep. Random draws go on as without a graph.
    """

    def __init__(self, function: Callable):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

    def __call__(self, *inputs: Tensor | None):
        self.calls += 1
        if self.calls < 4:  # compilation, cuBLAS's workspaces and Adam's state come before a recording
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if self.calls == 4:
            self.inputs = inputs
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*inputs)
        for own, x in zip(self.inputs, inputs):
            if x is not own:  # which the result of another graph is
                own.copy_(x)
        self.graph.replay()
        return self.outputs


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
