"""A2C: synchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783, without its asynchrony).

Each iteration takes T steps in N environments with the current policy, then one gradient step on all of them,

    δ_t  = r_t + γ V(s_{t+1}) − V(s_t)                           V(s_{t+1}) = 0 if s_{t+1} is terminal
    Â_t  = δ_t + γλ Â_{t+1}                                      the trace is cut where an episode ends
    R̂_t  = Â_t + V(s_t)                                          λ = 1: the n-step return r_t + … + γⁿ V(s_{t+n})
    L(θ) = −E[log π_θ(a_t|s_t) Â_t] + c_v E[(V_θ(s_t) − R̂_t)²] − c_e E[H(π_θ(·|s_t))]

with Â and R̂ as constants. Details that matter, and why:
- A time limit is not a termination: a truncated step bootstraps from its true final observation.
- n counts from each step to the rollout's end, T steps at most: every step uses all rewards that were seen.
- RMSprop, as in the paper; Adam is a flag.
- Gradients are clipped by their global norm: one bad batch must not undo the policy, as nothing else limits a step.
- Orthogonal initialisation, gain √2, and 0.01 for the policy's last layer: the first policy is near uniform.
- Box actions come from a Gaussian and are clipped to the space only on their way into the environment.

Two textbook algorithms are settings of this one. Online actor-critic, an update after every single step: `--num-envs 1
--num-steps 1`. Batch actor-critic, one-step advantages over a long batch: `--gae-lambda 0 --num-steps 256`; the critic
takes one step per batch and is not fitted to the end first.

Against Stable-Baselines3: the same update (parameters agree to 1e-5 after many rollouts, tests/test_a2c.py).
SB3's VecNormalize moves its statistics at every step, here they move once per rollout. SB3 reads its learning rate
after a rollout, here it is read before it.

    python algos/a2c.py                              # CartPole-v1
    python algos/a2c.py --env-id Pendulum-v1         # with its recommended settings
    python algos/a2c.py --env-id Hopper-v5 --seed 3  # everything measured is in benchmarks/README.md
    python algos/a2c.py --resume runs/Hopper-v5__a2c__3__…
    torchrun --nproc-per-node 2 algos/a2c.py         # data parallel: each process has its own environments
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
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
    """environment steps, over all environments and processes, rounded up to whole rollouts"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradient, its T steps unrolled (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 8
    """parallel environments N (per process)"""
    normalize_observations: bool = False
    """normalise observations by their running mean and deviation, clipped to ±10"""
    normalize_rewards: bool = False
    """divide rewards by the running deviation of the discounted return, clipped to ±10"""

    # algorithm
    num_steps: int = 5
    """steps T per environment and update"""
    learning_rate: float = 7e-4
    """the optimiser's step size"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSprop with smoothing 0.99, or Adam; ε is 1e-5 in both"""
    gamma: float = 0.99
    """discount γ"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation; 1 gives n-step returns"""
    normalize_advantages: bool = False
    """normalise advantages per rollout and process"""
    ent_coef: float = 0.0
    """weight c_e of the entropy bonus"""
    vf_coef: float = 0.5
    """weight c_v of the value loss, a mean of squares without ½"""
    max_grad_norm: float = 0.5
    """bound on the gradient's global norm"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """tanh layers of the policy and, apart from it, of the value network"""
    log_std_init: float = 0.0
    """initial log standard deviation of Box actions"""


# fmt: off
MUJOCO = dict(
    total_timesteps=1_000_000, num_steps=8, anneal_lr=True, gae_lambda=0.9, vf_coef=0.4, log_std_init=-1.0,
    normalize_observations=True, normalize_rewards=True)
RECOMMENDED = {
    "CartPole-v1": dict(total_timesteps=200_000, learning_rate=1e-3, anneal_lr=True),
    "Acrobot-v1": dict(
        total_timesteps=500_000, num_envs=16, normalize_observations=True, normalize_rewards=True),
    "Pendulum-v1": dict(
        total_timesteps=500_000, num_steps=8, learning_rate=5e-3, anneal_lr=True, gamma=0.9, gae_lambda=0.9,
        vf_coef=1.0, normalize_observations=True, normalize_rewards=True),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum")},
    "Swimmer-v5": MUJOCO | dict(gamma=0.9999),
}
# fmt: on
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Networks ---------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of all samples so far, as buffers: saved, exported and frozen with the network.

    `std`, which normalises, is what `update` makes of `var`.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merges a batch (B, *shape), B the same in all processes (parallel variance, Chan et al. 1979)."""
        mean = average(batch.mean(0))
        var = average((batch - mean).square().mean(0))
        count = len(batch) * (dist.get_world_size() if dist.is_initialized() else 1)
        self.count += count
        weight = count / self.count.item()
        self.var.lerp_(var + (1 - weight) * (mean - self.mean).square(), weight)
        self.mean.lerp_(mean, weight)
        self.std.copy_((self.var + 1e-8).sqrt())

    def scale(self, x: Tensor) -> Tensor:
        """x / deviation, clipped to ±10; (…, *shape)."""
        return (x / self.std).clamp(-10, 10)

    def normalize(self, x: Tensor) -> Tensor:
        """(x − mean) / deviation, clipped to ±10; (…, *shape)."""
        return self.scale(x - self.mean)


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Tanh layers of the given sizes; weights orthogonal with gain √2, `output_gain` in the last; biases zero."""
    layers = []
    for i in range(len(sizes) - 1):
        last = i == len(sizes) - 2
        linear = nn.Linear(sizes[i], sizes[i + 1])
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def without_modules(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """A network of `mlp` as a function of (B, inputs), without gradients and without the cost of calling modules.

    For the few rows of one step that cost is more than the arithmetic's. It follows weights that change in place, and
    repeats what `mlp` does: of another network it would leave out, in silence, all but the linear layers.
    """
    *hidden, last = [(x.weight.detach().T, x.bias.detach()) for x in network if isinstance(x, nn.Linear)]

    def function(x: Tensor) -> Tensor:
        for weight, bias in hidden:
            x = torch.addmm(bias, x, weight).tanh_()
        return torch.addmm(last[1], x, last[0])

    return function


class ActorCritic(nn.Module):
    """Policy π(a|s) and value V(s): two networks that share nothing but the encoding of observations.

    Observations are (…, D) float32 for a Box, (…,) int64 for a Discrete space, and states s (…, D) what `encode`
    makes of them; actions are (…, A) float32, unclipped, for a Box, (…,) indices from 0 for a Discrete space.
    `forward` is the deterministic policy, from observations to what the environment takes.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, normalize_observations=False, log_std_init=0.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        self.observation_dtype = torch.int64 if self.one_hot else torch.float32
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.observation_statistics = RunningStatistics(inputs) if normalize_observations and not self.one_hot else None
        self.return_statistics = RunningStatistics()
        self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)
        self.critic = mlp([inputs, *hidden_sizes, 1], output_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), log_std_init))
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space, normalised by the running statistics if asked for."""
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        return obs if self.observation_statistics is None else self.observation_statistics.normalize(obs)

    def value(self, states: Tensor) -> Tensor:
        """V(s), shape (…,)."""
        return self.critic(states).squeeze(-1)

    def draw_noise(self, *shape: int) -> Tensor:
        """All the randomness of a rollout's actions at once, (*shape, A): Gumbel, or Gaussian of π's deviation."""
        noise = torch.empty(*shape, self.action_size, device=self.actor[-1].weight.device)
        return -noise.exponential_().log() if self.discrete else noise.normal_() * self.log_std.detach().exp()

    def sample(self, output: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s) from the actor's output: mean + noise, or argmax of logits + noise (the Gumbel-max trick)."""
        return (output + noise).argmax(-1) if self.discrete else output + noise

    def log_prob_and_entropy(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and H(π(·|s)), both (…,)."""
        output = self.actor(states)
        if self.discrete:
            return categorical_log_prob_and_entropy(output, actions)
        return gaussian_log_prob_and_entropy(output, self.log_std, actions)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices moved to the space's start, Box actions clipped to its bounds."""
        return actions + int(self.action_space.start) if self.discrete else actions.clamp(self.low, self.high)

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely action."""
        output = self.actor(self.encode(obs))
        return self.to_env(output.argmax(-1) if self.discrete else output)


# The maths --------------------------------------------------------------------------------------------------


def categorical_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of softmax(logits); logits (…, A), actions (…,)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


def gaussian_log_prob_and_entropy(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of N(mean, diag(σ²)), σ = exp(log_std); mean, actions (…, A).

    log_std is (A,), the same in all states: another shape would be summed over the states, too.
    """
    log_normaliser = (log_std + 0.5 * np.log(2 * np.pi)).sum()
    log_prob = -0.5 * ((actions - mean) * (-log_std).exp()).square().sum(-1) - log_normaliser
    return log_prob, (log_normaliser + 0.5 * len(log_std)).expand_as(log_prob)


def linear_recurrence(x: Tensor, decay: Tensor, y: Tensor) -> Tensor:
    """y_t = x_t + decay_t · y_{t−1} along the first dimension; x and decay (T, N), y_{−1} = y (N,)."""
    ys = []
    for x_t, decay_t in zip(x.unbind(), decay.unbind()):
        y = torch.addcmul(x_t, decay_t, y)
        ys.append(y)
    return torch.stack(ys)


def gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode or rollout (arXiv 1506.02438, eq. 16).

    All inputs (T, N). `next_values` is V of the observation that step t truly led to: it counts at a truncation
    and at the rollout's end, and at a termination it does not. Where an episode ended values[t + 1] is another one's.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * (~(terminated | truncated)).to(deltas.dtype)
    return linear_recurrence(deltas.flip(0), decay.flip(0), torch.zeros_like(deltas[0])).flip(0)


def discounted_returns(rewards: Tensor, done: Tensor, previous: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t−1}, from 0 in each episode; rewards and done (T, N), `previous` (N,) is R_{−1}.

    Of past rewards, not a critic's target: its deviation is the scale by which rewards are normalised. `previous` is 0
    for an episode that begins with this rollout.
    """
    first = torch.cat([torch.zeros_like(done[:1]), done[:-1]])
    return linear_recurrence(rewards, gamma * (~first).to(rewards.dtype), previous)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var[R̂ − V] / Var[R̂]: 1 is a perfect critic, 0 one that knows nothing but the mean; inputs of one shape."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


class Rollout(NamedTuple):
    """T steps of N environments; all (T, N, …). States are encoded observations."""

    states: Tensor
    next_states: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor


METRICS = ("policy_loss", "value_loss", "entropy", "values", "explained_variance")


def a2c_loss(agent: ActorCritic, states, actions, advantages, returns, args: Args) -> tuple[Tensor, Tensor]:
    """The loss L(θ) of B samples, first dimension of all, and the first three METRICS (3,)."""
    log_probs, entropy = agent.log_prob_and_entropy(states, actions)
    if args.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = -(log_probs * advantages.detach()).mean()
    value_loss = F.mse_loss(agent.value(states), returns.detach())
    entropy = entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, torch.stack([policy_loss, value_loss, entropy]).detach()


def parameter_vector(module: nn.Module) -> nn.Parameter:
    """All parameters of `module` as one vector (P,), of which they become views.

    Optimiser and gradient then take a few operations instead of a few per parameter. Call it once, after `module.to`
    and before anything else keeps the weights; then step with `vector_step`: the optimiser never sees what
    `loss.backward()` leaves in a parameter's .grad, and a parameter that is replaced later is trained no more.
    """
    parameters = list(module.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    nn.utils.vector_to_parameters(vector.data, parameters)
    return vector


def make_optimizer(vector: nn.Parameter, args: Args) -> torch.optim.Optimizer:
    """RMSprop or Adam."""
    if args.optimizer == "adam":
        return torch.optim.Adam([vector], args.learning_rate, eps=1e-5, fused=True)
    return torch.optim.RMSprop([vector], args.learning_rate, alpha=0.99, eps=1e-5)


def gradient_vector(loss: Tensor, module: nn.Module) -> Tensor:
    """∇loss with respect to all parameters of `module`, each of which has to take part in it, as one vector (P,): its
    mean over the processes."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return average(torch.cat([x.flatten() for x in gradients]))


def vector_step(optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    """One step of an optimiser of one vector (P,), down this gradient."""
    optimizer.param_groups[0]["params"][0].grad = gradient
    optimizer.step()


def a2c_gradient(agent: ActorCritic, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a whole rollout, of norm --max-grad-norm at most, and METRICS (5,)."""
    states, next_states, actions, rewards, terminated, truncated = rollout
    with torch.no_grad():
        values, next_values = agent.value(torch.stack([states, next_states]))
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values
    loss, metrics = a2c_loss(agent, *(x.flatten(0, 1) for x in (states, actions, advantages, returns)), args)
    metrics = torch.cat([metrics, torch.stack([values.mean(), explained_variance(values, returns)])])
    gradient = gradient_vector(loss, agent)
    return gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1), metrics


def a2c_update(agent: ActorCritic, optimizer, rollout: Rollout, args: Args, gradient_of=a2c_gradient) -> Tensor:
    """One step of the optimiser on a rollout. Returns METRICS before it, (5,)."""
    gradient, metrics = gradient_of(agent, rollout, args)
    vector_step(optimizer, gradient)
    return average(metrics)


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000
"""Environment steps between two points of losses/*, which are means over the updates since the last one."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    spaces = check_spaces(args, (Discrete, Box))
    agent = ActorCritic(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(device)
    optimizer = make_optimizer(parameter_vector(agent), args)
    gradient_of = compiled(a2c_gradient, device) if args.compile else a2c_gradient
    run = Run(args, rank, {"agent": agent, "optimizer": optimizer})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    actor = without_modules(agent.actor)  # a network that is not `mlp`'s has to act itself

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(np.asarray(x), dtype=dtype, device=device)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    discounted_return = torch.zeros(args.num_envs, device=device)
    metrics = []
    logged_step = run.step
    while run.step < args.total_timesteps and not run.interrupted():
        remaining = 1 - run.step / args.total_timesteps
        lr = optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)

        # Collect T steps from every environment with the policy as it stands.
        rollout = []
        for noise in agent.draw_noise(args.num_steps, args.num_envs):
            actions = agent.sample(actor(agent.encode(tensor(obs, agent.observation_dtype))), noise)
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, agent.to_env(actions))
            rollout.append((acted_on, next_obs, actions.cpu(), rewards, terminated, truncated))
            run.step += args.num_envs * world_size
            run.log_episodes(infos)

        # Update: one gradient step on the whole rollout; everything is (T, N, …).
        observations, next_observations, actions, rewards, terminated, truncated = zip(*rollout)
        observations = tensor(observations, agent.observation_dtype)
        next_observations = tensor(next_observations, agent.observation_dtype)
        actions, rewards = torch.stack(actions).to(device), tensor(rewards)
        terminated, truncated = tensor(terminated, torch.bool), tensor(truncated, torch.bool)
        if args.normalize_rewards:
            done = terminated | truncated
            discounted = discounted_returns(rewards, done, discounted_return, args.gamma)
            discounted_return = discounted[-1] * ~done[-1]
            agent.return_statistics.update(discounted.flatten())
            rewards = agent.return_statistics.scale(rewards)
        states, next_states = agent.encode(observations), agent.encode(next_observations)
        rollout = Rollout(states, next_states, actions, rewards, terminated, truncated)
        rollout_metrics = a2c_update(agent, optimizer, rollout, args, gradient_of)
        metrics.append(rollout_metrics.clone())  # CUDA graphs reuse the memory of their outputs
        if agent.observation_statistics is not None:
            agent.observation_statistics.update(observations.flatten(0, 1))

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            losses = torch.stack(metrics).mean(0).tolist()
            run.log(dict(zip(METRICS, losses)), learning_rate=lr)
            metrics, logged_step = [], run.step
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
