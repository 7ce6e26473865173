"""PPO: proximal policy optimisation with a clipped objective (Schulman et al. 2017, arXiv 1707.06347).

Each iteration collects T steps from N environments with the current policy π_old, estimates advantages
with GAE(λ) (Schulman et al. 2016, arXiv 1506.02438), then takes several epochs of minibatch steps on

    δ_t  = r_t + γ V(s_{t+1}) − V(s_t)                           V(s_{t+1}) = 0 if s_{t+1} is terminal
    Â_t  = δ_t + γλ Â_{t+1}                                      the trace is cut where an episode ends
    ρ_t  = π_θ(a_t|s_t) / π_old(a_t|s_t)
    L(θ) = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c_v E[(V(s_t) − R̂_t)²] − c_e E[H(π_θ(·|s_t))]

with R̂_t = Â_t + V_old(s_t). Details that matter, and why:
- A time limit is not a termination: a truncated step bootstraps from its true final observation.
- Values and log-probabilities are computed once per rollout in one batch, so acting needs the policy alone.
- Advantages are normalised per minibatch; Adam's ε is 1e-5; gradients are clipped by their global norm.
- Orthogonal initialisation, gain √2, and 0.01 for the policy's last layer: the first policy is near uniform.
- Running statistics are merged once per rollout and stay fixed in between: ρ is exactly 1 when the update starts.
- Rewards are divided by the deviation of the discounted return, never shifted; what is logged is unscaled.
- Box actions come from a Gaussian and are clipped to the space only on their way into the environment.

Against Stable-Baselines3: the same update (parameters agree to 1e-5 after several rollouts, tests/test_ppo.py).
SB3's VecNormalize moves its statistics at every step, here they move once per rollout.

    python algos/ppo.py                              # CartPole-v1, 100k steps, about 15 s on two cores
    python algos/ppo.py --env-id Hopper-v5 --seed 3  # takes the settings recommended for Hopper-v5
    python algos/ppo.py --resume runs/Hopper-v5__ppo__3__…
    torchrun --nproc-per-node 2 algos/ppo.py         # data parallel: each process has its own environments
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import random
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

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
    """where the networks live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the update with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 4
    """parallel environments N (per process)"""
    normalize_observations: bool = False
    """normalise observations by their running mean and deviation, clipped to ±10"""
    normalize_rewards: bool = False
    """divide rewards by the running deviation of the discounted return, clipped to ±10"""

    # algorithm
    num_steps: int = 128
    """steps T per environment and rollout"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 4
    """passes over each rollout"""
    learning_rate: float = 2.5e-4
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount γ"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    clip_coef: float = 0.2
    """clipping range ε of the probability ratio"""
    anneal_clip: bool = False
    """lower the clipping range linearly to 0"""
    clip_value: float | None = None
    """keep V within this distance of V_old in the value loss; None: off"""
    normalize_advantages: bool = True
    """normalise advantages per minibatch"""
    ent_coef: float = 0.01
    """weight c_e of the entropy bonus"""
    vf_coef: float = 0.5
    """weight c_v of the value loss"""
    max_grad_norm: float = 0.5
    """bound on the gradient's global norm"""
    target_kl: float | None = None
    """end the update once the approximate KL passes 1.5 times this; None: off"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """tanh layers of the policy and, apart from it, of the value network"""
    log_std_init: float = 0.0
    """initial log standard deviation of Box actions"""


MUJOCO = dict(
    total_timesteps=1_000_000,
    num_envs=1,
    num_steps=2048,
    num_minibatches=32,
    update_epochs=10,
    learning_rate=3e-4,
    ent_coef=0.0,
    normalize_observations=True,
    normalize_rewards=True,
)
RECOMMENDED = {
    "CartPole-v1": dict(num_envs=8, num_steps=32, num_minibatches=1, update_epochs=20, learning_rate=1e-3)
    | dict(gamma=0.98, gae_lambda=0.8, anneal_clip=True, ent_coef=0.0),
    "Acrobot-v1": dict(num_envs=16, num_steps=256, num_minibatches=64, gae_lambda=0.94, ent_coef=0.0)
    | dict(learning_rate=3e-4, anneal_lr=False, normalize_observations=True, normalize_rewards=True),
    "Pendulum-v1": dict(num_steps=1024, num_minibatches=64, update_epochs=10, learning_rate=1e-3)
    | dict(anneal_lr=False, gamma=0.9, ent_coef=0.0),
    "MountainCarContinuous-v0": dict(),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum")},
    "Swimmer-v5": MUJOCO | dict(gamma=0.9999),
}
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Networks ---------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of all samples so far, in buffers: saved, exported and frozen with the network."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merges a batch (B, *shape) by the parallel-variance formula of Chan et al. (1979)."""
        count = len(batch) * (dist.get_world_size() if dist.is_initialized() else 1)
        mean = average(batch.mean(0))
        var = average((batch - mean).square().mean(0))
        self.count += count
        weight = count / self.count.item()
        self.var.lerp_(var + (1 - weight) * (mean - self.mean).square(), weight)
        self.mean.lerp_(mean, weight)

    def scale(self, x: Tensor) -> Tensor:
        """x / deviation, clipped to ±10; any leading dimensions."""
        return (x * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Tanh layers of the given sizes, orthogonal weights (gain √2, the last `output_gain`), zero biases."""
    layers = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        last = i == len(sizes) - 2
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """Policy π(a|s) and value V(s), two separate networks behind one observation encoder.

    Observations are (B, D) float32 for a Box, (B,) int64 for a Discrete space. Actions are (B,) indices from 0
    for a Discrete space, (B, A) unclipped for a Box. `forward` is the greedy policy: it returns what the
    environment takes.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, normalize_observations, log_std_init=0.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.discrete = isinstance(action_space, Discrete)
        one_hot = isinstance(observation_space, Discrete)
        self.observation_dtype = torch.int64 if one_hot else torch.float32
        inputs = int(observation_space.n) if one_hot else observation_space.shape[0]
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.observation_statistics = RunningStatistics((inputs,)) if normalize_observations and not one_hot else None
        self.return_statistics = RunningStatistics(())
        self.actor = mlp([inputs, *hidden_sizes, outputs], output_gain=0.01)
        self.critic = mlp([inputs, *hidden_sizes, 1], output_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), log_std_init))
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    def encode(self, obs: Tensor) -> Tensor:
        """Network input (B, D): one-hot for a Discrete space, else normalised by the running statistics if asked."""
        if isinstance(self.observation_space, Discrete):
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        return (
            obs
            if self.observation_statistics is None
            else self.observation_statistics.scale(obs - self.observation_statistics.mean)
        )

    def value(self, obs: Tensor) -> Tensor:
        """V(s), shape (B,)."""
        return self.critic(self.encode(obs)).squeeze(-1)

    def draw_noise(self, *shape: int) -> Tensor:
        """The randomness of `sample`, drawn for a whole rollout at once: (*shape, A) Gumbel or Gaussian."""
        noise = torch.empty(*shape, self.actor[-1].out_features, device=self.actor[-1].weight.device)
        return -noise.exponential_().log() if self.discrete else noise.normal_()

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s), a function of the noise: the Gumbel-max trick, or mean + deviation · noise."""
        output = self.actor(self.encode(obs))
        return (output + noise).argmax(-1) if self.discrete else output + self.log_std.exp() * noise

    def log_prob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and H(π(·|s)), both (B,), with gradients."""
        output = self.actor(self.encode(obs))
        if self.discrete:
            return categorical_log_prob_and_entropy(output, actions)
        return gaussian_log_prob_and_entropy(output, self.log_std, actions)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices shifted to the space's start, Box actions clipped to its bounds."""
        return actions + int(self.action_space.start) if self.discrete else actions.clamp(self.low, self.high)

    def forward(self, obs: Tensor) -> Tensor:
        """The greedy policy: the most likely action."""
        output = self.actor(self.encode(obs))
        return self.to_env(output.argmax(-1) if self.discrete else output)


# The maths --------------------------------------------------------------------------------------------------


def categorical_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (B,), of the distribution softmax(logits) (B, A)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


def gaussian_log_prob_and_entropy(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (B,), of N(mean, diag(exp(log_std)²)); mean and actions (B, A), log_std (A,)."""
    z = (actions - mean) * (-log_std).exp()
    log_normaliser = (log_std + 0.5 * np.log(2 * np.pi)).sum()
    entropy = log_normaliser + 0.5 * len(log_std)
    return -0.5 * z.square().sum(-1) - log_normaliser, entropy.expand(mean.shape[:-1])


def linear_recurrence(x: Tensor, decay: Tensor, y: Tensor) -> Tensor:
    """y_t = x_t + decay_t · y_{t−1} along the first dimension; x and decay (T, N), y_{−1} = y (N,)."""
    ys = []
    for x_t, decay_t in zip(x.unbind(), decay.unbind()):
        y = torch.addcmul(x_t, decay_t, y)
        ys.append(y)
    return torch.stack(ys)


def gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages Â_t = Σ_k (γλ)^k δ_{t+k} up to the episode's or the rollout's end (arXiv 1506.02438, eq. 16).

    All inputs are (T, N). `next_values` is V of the observation that step t truly led to: at a truncation and at
    the rollout's end it bootstraps, at a termination it does not count.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * ~(terminated | truncated)
    return linear_recurrence(deltas.flip(0), decay.flip(0), torch.zeros_like(deltas[0])).flip(0)


def discounted_returns(rewards: Tensor, done: Tensor, previous: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t−1}, restarted after each episode's end: what reward normalisation takes the deviation of.

    `rewards` and `done` are (T, N); `previous` (N,) is R of the step before the first, 0 where an episode starts.
    """
    started = torch.cat([torch.zeros_like(done[:1]), done[:-1]])
    return linear_recurrence(rewards, gamma * ~started, previous)


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip: Tensor | float) -> Tensor:
    """−E[min(ρÂ, clip(ρ, 1−ε, 1+ε)Â)] (arXiv 1707.06347, eq. 7), ρ = exp(log_ratio); both (B,)."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_value: float | None) -> Tensor:
    """E[(V − R̂)²], all (B,); with `clip_value`, V is first kept within that distance of V_old (SB3's form)."""
    if clip_value is not None:
        values = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return F.mse_loss(values, returns)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """E[(ρ − 1) − log ρ], a low-variance estimate of KL(π_old ‖ π_θ) in nats (Schulman 2020, "k3")."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


class Batch(NamedTuple):
    """A flattened rollout, or a minibatch of it; first dimension B."""

    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: Batch, clip: Tensor, args: Args) -> Tensor:
    """One gradient step on a minibatch, unless `args.target_kl` forbids it. Returns METRICS (5,) before the step."""
    log_probs, entropy = agent.log_prob_and_entropy(batch.obs, batch.actions)
    log_ratio = log_probs - batch.log_probs
    advantages = batch.advantages
    if args.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss = policy_loss(log_ratio, advantages, clip)
    vf_loss = value_loss(agent.value(batch.obs), batch.values, batch.returns, args.clip_value)
    entropy = entropy.mean()
    loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropy
    with torch.no_grad():
        clipfrac = ((log_ratio.exp() - 1).abs() > clip).float().mean()
        metrics = torch.stack([pg_loss, vf_loss, entropy, approximate_kl(log_ratio), clipfrac])

    parameters = list(agent.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    if dist.is_initialized():
        metrics, gradients = average(metrics), [average(gradient) for gradient in gradients]
    if args.target_kl is not None and metrics[3] > 1.5 * args.target_kl:
        return metrics
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return metrics


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates, exports. Returns the run directory and, of the final evaluation, the episodes' returns."""
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} must divide --num-envs × --num-steps = {batch_size}")
    rank, world_size, device = set_up(args)
    spaces = check_spaces(args, (Discrete, Box))
    agent = ActorCritic(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(device)
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=not args.compile, capturable=args.compile)
    run = Run(args, rank, {"agent": agent, "optimizer": optimizer})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)
    gradient_step = compiled(update, device) if args.compile else update
    lr, clip = optimizer.param_groups[0]["lr"], torch.tensor(args.clip_coef, device=device)

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(np.asarray(x), dtype=dtype, device=device)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    discounted = torch.zeros(args.num_envs, device=device)
    while run.step < args.total_timesteps and not run.interrupted():
        remaining = 1 - run.step / args.total_timesteps
        lr.fill_(args.learning_rate * (remaining if args.anneal_lr else 1))
        clip.fill_(args.clip_coef * (remaining if args.anneal_clip else 1))

        # Collect T steps from every environment with the policy as it stands.
        rollout = []
        for noise in agent.draw_noise(args.num_steps, args.num_envs):
            actions = agent.sample(tensor(obs, agent.observation_dtype), noise)
            next_obs, rewards, terminated, truncated, reached, infos = step_envs(envs, agent.to_env(actions))
            rollout.append((obs, actions.cpu(), rewards, terminated, truncated, reached))
            obs = next_obs
            run.step += args.num_envs * world_size
            run.log_episodes(infos)
        states, actions, rewards, terminated, truncated, reached = zip(*rollout)

        # Estimate advantages and returns, everything (T, N).
        states, reached = tensor(states, agent.observation_dtype), tensor(reached, agent.observation_dtype)
        actions, rewards = torch.stack(actions).to(device), tensor(rewards)
        terminated, truncated = tensor(terminated, torch.bool), tensor(truncated, torch.bool)
        if args.normalize_rewards:
            done = terminated | truncated
            running = discounted_returns(rewards, done, args.gamma * discounted, args.gamma)
            discounted = running[-1] * ~done[-1]
            agent.return_statistics.update(running.flatten())
            rewards = agent.return_statistics.scale(rewards)
        with torch.no_grad():
            values, next_values = agent.value(states), agent.value(reached)
            log_probs, _ = agent.log_prob_and_entropy(states, actions)
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update: several epochs of shuffled minibatches.
        batch = Batch(*(x.flatten(0, 1) for x in (states, actions, log_probs, values, advantages, returns)))
        orders = (torch.randperm(batch_size, device=device) for _ in range(args.update_epochs))
        metrics = []
        for indices in (indices for order in orders for indices in order.chunk(args.num_minibatches)):
            metrics.append(gradient_step(agent, optimizer, Batch(*(x[indices] for x in batch)), clip, args))
            if args.target_kl is not None and metrics[-1][3] > 1.5 * args.target_kl:
                break
        if args.normalize_observations:
            agent.observation_statistics.update(batch.obs)

        # Log.
        metrics = dict(zip(METRICS, torch.stack(metrics).mean(0).tolist()))
        metrics["values"] = values.mean().item()
        metrics["explained_variance"] = (1 - (returns - values).var() / (returns.var() + 1e-8)).item()
        run.log(metrics, learning_rate=lr.item())
        run.checkpoint_if_due()

    envs.close()
    return run.finish(agent)


# Plumbing, the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2):
    """Stops with one line on stderr. Exit code 2: the request was wrong; 1: the run went wrong."""
    print(f"{ALGO}.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings or, on --resume, the run's own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--resume", default=None)
    known, _ = early.parse_known_args(argv)
    if known.resume is None:
        defaults = Args(**{"env_id": known.env_id, **RECOMMENDED.get(known.env_id, {})})
    else:
        try:
            saved = json.loads((Path(known.resume) / "args.json").read_text())["args"]
            defaults = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--resume {known.resume}: no run of {ALGO}.py to go on with there ({error})")
    table = "\n".join(f"  {env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    description = f"{__doc__.splitlines()[0]}\n\nRecommended settings, taken by --env-id alone:\n{table}"
    args = tyro.cli(Args, default=defaults, args=argv, description=description)
    for field in fields(Args) if known.resume else ():
        before, now = getattr(defaults, field.name), getattr(args, field.name)
        if before != now and field.name not in ("resume", "total_timesteps"):
            flag = "--" + field.name.replace("_", "-")
            fail(f"{flag} {now}: a resumed run keeps its own arguments ({before}); only --total-timesteps may change")
    return args


def set_up(args: Args) -> tuple[int, int, torch.device]:
    """Seeds, threads and device; joins the other processes under torchrun. Returns (rank, world size, device)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("num_envs", "total_timesteps", "torch_threads", "checkpoint_every", "eval_episodes"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        fail(f"--device {kind}: this PyTorch ({torch.__version__}) finds no such device; use --device auto")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    torch.set_num_threads(args.torch_threads)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return rank, world_size, device


def average(x: Tensor) -> Tensor:
    """Mean of a tensor over the processes of torchrun; the tensor itself where there is only one."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def compiled(function, device: torch.device):
    """torch.compile, forward, backward and optimiser in one; on CUDA captured in CUDA graphs."""
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # PyTorch ≥ 2.10; before, the graph breaks there
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or a clear line why not."""
    try:
        return gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {args.env_id}: {str(error).strip()}")


def check_spaces(args: Args, action_spaces: tuple, hint: str = "") -> tuple[gym.Space, gym.Space]:
    """Observation and action space of the environment; refuses what the networks cannot take."""
    env = make_env(args)
    observations, actions = env.observation_space, env.action_space
    env.close()
    if not isinstance(actions, action_spaces) or (isinstance(actions, Box) and len(actions.shape) != 1):
        names = " or ".join("a one-dimensional Box" if space is Box else space.__name__ for space in action_spaces)
        fail(f"{args.env_id} has the action space {actions}; {ALGO} needs {names}. {hint}".rstrip())
    if not isinstance(observations, Discrete) and not (isinstance(observations, Box) and len(observations.shape) == 1):
        wrapper = "gymnasium.wrappers.FlattenObservation"
        fail(
            f"{args.env_id} has the observation space {observations}; {ALGO} needs Discrete or a one-dimensional Box. Wrap it in {wrapper}"
        )
    return observations, actions


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """Environments that are reset within the step that ends an episode, so that no step is spent on a reset."""

    def make_one(index: int) -> gym.Env:
        if video_dir is None or index > 0:
            return make_env(args)
        return gym.wrappers.RecordVideo(make_env(args, render_mode="rgb_array"), str(video_dir))

    envs = [lambda index=index: make_one(index) for index in range(num_envs)]
    envs = gym.vector.SyncVectorEnv(envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def step_envs(envs: gym.vector.VectorEnv, actions: Tensor) -> tuple:
    """One step: (next observation to act on, reward, terminated, truncated, observation reached, infos).

    The observation reached is where the action led: at an episode's end its final observation, while the one to
    act on is already the next episode's first.
    """
    obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
    reached = obs
    if "final_obs" in infos:
        reached = obs.copy()
        for i in np.flatnonzero(infos["_final_obs"]):
            reached[i] = infos["final_obs"][i]
    if not (np.isfinite(rewards).all() and np.isfinite(reached).all()):
        fail("the environment returned a non-finite reward or observation; the last checkpoint is kept", code=1)
    return obs, rewards, terminated, truncated, reached, infos


class Run:
    """A run directory and all that is written to it: arguments, episodes, metrics, checkpoints, the policy.

    `modules` (anything with state_dict) are what a checkpoint holds, beside the counters and the random state.
    Under torchrun only rank 0 writes.
    """

    def __init__(self, args: Args, rank: int, modules: dict):
        self.args, self.rank, self.modules = args, rank, modules
        self.step, self.seconds, self.saved_step, monitor_size = 0, 0.0, 0, 0
        self.dir = Path(args.resume) if args.resume else self.new_dir()
        if args.resume:
            monitor_size = self.restore()
        self.start_time, self.start_step = time.time() - self.seconds, self.step
        self.recent_returns, self.signals = deque(maxlen=100), []
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        if rank > 0:
            torch.manual_seed(args.seed + rank + self.step)
            return
        versions = {m.__name__: m.__version__ for m in (torch, gym, np)} | {"python": platform.python_version()}
        about = {"algo": ALGO, "args": asdict(replace(args, resume=None)), "versions": versions}
        about["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (self.dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step if args.resume else None)
        self.writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in about["args"].items()))
        self.monitor = open(self.dir / "monitor.csv", "a", buffering=1)
        if monitor_size:
            self.monitor.truncate(monitor_size)
        else:
            header = json.dumps({"t_start": self.start_time, "env_id": args.env_id})
            self.monitor.write(f"#{header}\nr,l,t\n")
            self.checkpoint()
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", desc=args.env_id)

    def new_dir(self) -> Path | None:
        """runs/{env_id}__{algo}__{seed}__{time}, with _1, _2, … where that exists."""
        if self.rank > 0:
            return None
        name = f"{self.args.env_id.replace('/', '-')}__{ALGO}__{self.args.seed}__{int(time.time())}"
        for suffix in ("", *(f"_{n}" for n in range(1, 1000))):
            path = Path(self.args.output_dir) / f"{name}{suffix}"
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
            except OSError as error:
                fail(f"--output-dir {self.args.output_dir}: {error}")
        fail(f"--output-dir {self.args.output_dir}: too many runs named {name}")

    def on_signal(self, number: int, frame) -> None:
        """Ctrl-C or SIGTERM: the iteration in progress is finished first; a second signal stops at once."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def interrupted(self) -> bool:
        """Whether any process was asked to stop."""
        return average(torch.tensor(float(bool(self.signals)))).item() > 0

    def checkpoint(self) -> None:
        """Writes checkpoint.pt under a temporary name, then renames it: a kill leaves the old one whole."""
        if self.rank > 0:
            return
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"step": self.step, "seconds": time.time() - self.start_time, "monitor_size": self.monitor.tell()}
        state["rng"] = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save(state, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        self.saved_step = self.step

    def checkpoint_if_due(self) -> None:
        """A checkpoint every --checkpoint-every steps."""
        if self.step - self.saved_step >= self.args.checkpoint_every:
            self.checkpoint()

    def restore(self) -> int:
        """Loads checkpoint.pt into the modules, counters and random state; returns monitor.csv's size then."""
        try:
            state = torch.load(self.dir / "checkpoint.pt", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
        except Exception as error:
            fail(f"--resume {self.dir}: checkpoint.pt cannot be used ({str(error).splitlines()[0]})")
        self.step, self.seconds, self.saved_step = state["step"], state["seconds"], state["step"]
        torch.set_rng_state(state["rng"]["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        return state["monitor_size"]

    def log_episodes(self, infos: dict) -> None:
        """Writes the episodes that ended in this step to monitor.csv (r, l, t) and to TensorBoard."""
        if "episode" not in infos or self.rank > 0:
            return
        for i in np.flatnonzero(infos["_episode"]):
            r, l = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            self.monitor.write(f"{round(r, 6)},{l},{round(time.time() - self.start_time, 6)}\n")
            self.writer.add_scalar("charts/episodic_return", r, self.step)
            self.writer.add_scalar("charts/episodic_length", l, self.step)
            self.recent_returns.append(r)

    def log(self, losses: dict[str, float], **charts: float) -> None:
        """Writes losses/* and charts/* to TensorBoard and moves the progress bar; stops at a non-finite loss."""
        if not np.isfinite(list(losses.values())).all():
            bad = ", ".join(f"{k} {v}" for k, v in losses.items() if not np.isfinite(v))
            fail(f"{bad} at step {self.step}; the last checkpoint, {self.dir}, is of step {self.saved_step}", code=1)
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
        """Last checkpoint, policy.pt2 and evaluation; returns {"run_dir", "returns"}. An interrupted run exits here."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.checkpoint()
        if self.rank > 0:
            return {}
        self.bar.close()
        self.monitor.close()
        if self.signals:
            script = Path(sys.argv[0]).name
            print(f"stopped at step {self.step}; go on with: python {script} --resume {self.dir}", file=sys.stderr)
            raise SystemExit(128 + self.signals[0])
        export_policy(policy, self.dir / "policy.pt2")
        returns = evaluate(policy, self.args)
        self.writer.add_scalar("eval/episodic_return", returns.mean(), self.step)
        self.writer.close()
        print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        print(f"run directory: {self.dir}")
        return {"run_dir": self.dir, "returns": returns}


@torch.no_grad()
def evaluate(policy: nn.Module, args: Args) -> np.ndarray:
    """Returns of --eval-episodes fresh episodes with the deterministic policy, one environment each."""
    envs = make_envs(args, args.eval_episodes)
    device = next(policy.parameters()).device
    obs, _ = envs.reset(seed=args.seed + 1_000_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any():
        actions = policy(torch.as_tensor(obs, dtype=policy.observation_dtype, device=device))
        obs, rewards, terminated, truncated, *_ = step_envs(envs, actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def export_policy(policy: nn.Module, path: Path) -> None:
    """Saves the deterministic policy alone: `torch.export.load(path).module()(obs)`, any batch size, on the CPU."""
    policy = copy.deepcopy(policy).cpu().eval()
    example = torch.as_tensor(np.stack([policy.observation_space.sample()] * 2), dtype=policy.observation_dtype)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=({0: batch},)), path)


if __name__ == "__main__":
    train(parse_args())
