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
- Orthogonal initialisation, gain √2, and 0.01 for the policy's last layer: at first it hardly looks at the observation.
- Running statistics are merged once per rollout, at its end: log π_old is that of the policy that acted.
- Rewards are divided by the deviation of the discounted return, never shifted; episodes are logged unscaled.
- Box actions come from a Gaussian and are clipped to the space only on their way into the environment.

Against Stable-Baselines3 (SB3): the same update, parameters agree to 1e-5 after several rollouts (tests/test_ppo.py).
Its VecNormalize moves its statistics at every step; it reads its schedules after a rollout, here they are read before.

    python algos/ppo.py                              # CartPole-v1, 100k steps: half a minute, 500 of 500
    python algos/ppo.py --env-id Hopper-v5 --seed 3  # everything measured is in benchmarks/README.md
    python algos/ppo.py --resume runs/Hopper-v5__ppo__3__…
    torchrun --nproc-per-node 2 algos/ppo.py         # data parallel: each process has its own environments
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_type_hints

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

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]
NotNegative = Annotated[float, (0, sys.float_info.max, "0 or more")]


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Count = 100_000  # environment steps, over all environments and processes, in whole rollouts
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto takes CUDA when there is one
    torch_threads: Count = 1  # CPU threads for PyTorch; one is fastest for networks this small
    compile: bool = False  # compile loss and gradient with torch.compile: pays in runs of several minutes
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 50_000  # environment steps between checkpoints
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on, of the first environment

    # environment
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 4  # parallel environments N (per process)
    normalize_observations: bool = False  # normalise Box observations by running mean and deviation, clipped to ±10
    normalize_rewards: bool = False  # divide rewards by the running deviation of the discounted return, clipped to ±10

    # algorithm
    num_steps: Count = 128  # steps T per environment and rollout
    num_minibatches: Count = 4  # minibatches per epoch, of N·T / this many steps each (per process)
    update_epochs: Count = 4  # passes over each rollout
    learning_rate: Positive = 2.5e-4  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate linearly, rollout by rollout, to 0 at --total-timesteps
    gamma: Fraction = 0.99  # discount γ
    gae_lambda: Fraction = 0.95  # λ of generalised advantage estimation
    clip_coef: Positive = 0.2  # clipping range ε of the probability ratio
    anneal_clip: bool = False  # lower the clipping range linearly to 0
    clip_value: Positive | None = None  # keep V within this distance of V_old in the value loss, as SB3; None: off
    normalize_advantages: bool = True  # normalise advantages per minibatch (and process)
    ent_coef: NotNegative = 0.01  # weight c_e of the entropy bonus
    vf_coef: NotNegative = 0.5  # weight c_v of the value loss, a mean of squares without ½
    max_grad_norm: Positive = 0.5  # bound on the gradient's global norm
    target_kl: Positive | None = None  # end the update once the approximate KL passes 1.5 times this; None: off
    hidden_sizes: tuple[Count, ...] = (64, 64)  # tanh layers of the policy and, apart from it, of the value network
    log_std_init: float = 0.0  # initial log standard deviation of Box actions


# fmt: off
MUJOCO = dict(
    total_timesteps=1_000_000, num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10, learning_rate=3e-4,
    ent_coef=0.0, normalize_observations=True, normalize_rewards=True)
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "CartPole-v1": dict(
        num_envs=8, num_steps=32, num_minibatches=1, update_epochs=20, learning_rate=1e-3, gamma=0.98, gae_lambda=0.8,
        anneal_clip=True, ent_coef=0.0),
    "Acrobot-v1": dict(
        num_envs=16, num_steps=256, num_minibatches=64, learning_rate=3e-4, anneal_lr=False, gae_lambda=0.94,
        ent_coef=0.0, normalize_observations=True, normalize_rewards=True),
    "Pendulum-v1": dict(
        num_steps=1024, num_minibatches=64, update_epochs=10, learning_rate=1e-3, anneal_lr=False, gamma=0.9,
        ent_coef=0.0),
    "MountainCarContinuous-v0": dict(
        total_timesteps=50_000, num_envs=8, num_steps=256, num_minibatches=8, update_epochs=10, gamma=0.9999,
        gae_lambda=0.9, clip_coef=0.1, ent_coef=0.005, log_std_init=0.5, normalize_observations=True,
        normalize_rewards=True),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum")},
    "Swimmer-v5": MUJOCO | dict(gamma=0.9999),
}
# fmt: on


# Networks ---------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of all samples so far, as buffers: saved, exported and frozen with the network."""

    def __init__(self, *shape: int):
        super().__init__()
        for name, value in (("mean", torch.zeros(shape)), ("var", torch.ones(shape)), ("std", torch.ones(shape))):
            self.register_buffer(name, value)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merges a batch (B, *shape) (parallel variance, Chan et al. 1979)."""
        self.count += len(batch)
        mean, weight = batch.mean(0), len(batch) / self.count.item()
        # Of all samples: the mean of the two variances, and what the distance of the two means adds to it.
        self.var.lerp_((batch - mean).square().mean(0) + (1 - weight) * (mean - self.mean).square(), weight)
        self.mean.lerp_(mean, weight)
        self.std.copy_((self.var + 1e-8).sqrt())

    def scale(self, x: Tensor) -> Tensor:
        """x / deviation, clipped to ±10; (…, *shape)."""
        return (x / self.std).clamp(-10, 10)


def orthogonal_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with orthogonal weights of that gain, and no bias at first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Tanh layers of the given sizes with gain √2, and a linear one with `output_gain`."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [orthogonal_linear(inputs, outputs, 2**0.5), nn.Tanh()]
    return nn.Sequential(*layers, orthogonal_linear(sizes[-2], sizes[-1], output_gain))


class ActorCritic(nn.Module):
    """Policy π(a|s) and value V(s): two networks that share nothing but the encoding of observations.

    Observations are (…, D) float32 of a Box, (…,) int64 of a Discrete space; states s (…, D) are what `encode` makes of
    them; actions (…, A) float32, unclipped, for a Box, (…,) indices from 0 for a Discrete space. `forward` is the
    deterministic policy, from observations to what the environment takes.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, normalize_observations=False, log_std_init=0.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.observation_statistics = RunningStatistics(inputs) if normalize_observations and not self.one_hot else None
        self.return_statistics = RunningStatistics()
        self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)
        self.critic = mlp([inputs, *hidden_sizes, 1], output_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), log_std_init))
            self.register_buffer("bounds", torch.as_tensor(np.stack([action_space.low, action_space.high])))

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space, normalised by the running statistics if asked for."""
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        statistics = self.observation_statistics
        return obs if statistics is None else statistics.scale(obs - statistics.mean)

    def value(self, states: Tensor) -> Tensor:
        """V(s), shape (…,)."""
        return self.critic(states).squeeze(-1)

    def draw_noise(self, *shape: int) -> Tensor:
        """All the randomness of a rollout's actions at once, (*shape, A): Gumbel, or Gaussian of π's deviation."""
        noise = torch.empty(*shape, self.action_size, device=next(self.parameters()).device)
        return -noise.exponential_().log() if self.discrete else noise.normal_() * self.log_std.detach().exp()

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s) by `draw_noise`'s noise: mean + noise, or argmax of logits + noise (the Gumbel-max trick)."""
        output = self.actor(self.encode(obs)) + noise
        return output.argmax(-1) if self.discrete else output

    def log_prob_and_entropy(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and H(π(·|s)) in nats, both (…,), of softmax(logits) or N(mean, diag σ²), σ the same in all s."""
        output = self.actor(states)
        if self.discrete:
            log_probs = output.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy
        log_normaliser = (self.log_std + 0.5 * math.log(2 * math.pi)).sum()
        log_prob = -0.5 * ((actions - output) * (-self.log_std).exp()).square().sum(-1) - log_normaliser
        return log_prob, (log_normaliser + 0.5 * self.action_size).expand_as(log_prob)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices moved to the space's start, Box actions clipped to its bounds."""
        return actions + int(self.action_space.start) if self.discrete else actions.clamp(*self.bounds)

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely action."""
        output = self.actor(self.encode(obs))
        return self.to_env(output.argmax(-1) if self.discrete else output)


# The maths --------------------------------------------------------------------------------------------------


def gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode or rollout (arXiv 1506.02438, eq. 16).

    All inputs (T, N). `next_values` is V of the observation that step t truly led to: it counts at a truncation
    and at the rollout's end, and at a termination it does not. Where an episode ended values[t + 1] is another one's.
    """
    deltas = (rewards + gamma * next_values * ~terminated - values).unbind()
    decay = (gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)).unbind()
    advantages = [deltas[-1]]
    for delta, factor in zip(deltas[-2::-1], decay[-2::-1]):
        advantages.append(torch.addcmul(delta, factor, advantages[-1]))
    return torch.stack(advantages[::-1])


def discounted_returns(rewards: Tensor, done: Tensor, previous: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t−1}, from 0 in each episode; rewards and done (T, N), `previous` (N,) is R_{−1}.

    Its deviation is the scale of normalised rewards. `previous` is 0 where an episode begins with the rollout.
    """
    returns, goes_on = [previous], torch.cat([torch.ones_like(done[:1]), ~done[:-1]])
    for reward, factor in zip(rewards, gamma * goes_on.to(rewards.dtype)):
        returns.append(torch.addcmul(reward, factor, returns[-1]))
    return torch.stack(returns[1:])


# A rollout, or a minibatch of it, first dimension B; states are encoded observations.
PPOBatch = namedtuple("PPOBatch", "states actions log_probs values advantages returns")


def ppo_loss(agent: nn.Module, batch: PPOBatch, clip: Tensor | float, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss L(θ) of a minibatch (arXiv 1707.06347, eq. 7 and 9), and what to log of it."""
    log_probs, entropies = agent.log_prob_and_entropy(batch.states, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio, advantages = log_ratio.exp(), batch.advantages
    if args.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    values = agent.value(batch.states)
    if args.clip_value is not None:
        values = batch.values + (values - batch.values).clamp(-args.clip_value, args.clip_value)
    value_loss, entropy = F.mse_loss(values, batch.returns), entropies.mean()
    metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    metrics["approx_kl"] = (ratio - 1 - log_ratio).mean()  # of π_old to π_θ in nats, unbiased (Schulman 2020, "k3")
    metrics["clipfrac"] = ((ratio - 1).abs() > clip).float().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {name: x.detach() for name, x in metrics.items()}


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """torch.nn.utils.clip_grad_norm_, with one norm over all numbers instead of a norm of norms, which is faster."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))


def ppo_gradient(agent: nn.Module, batch: PPOBatch, clip: Tensor | float, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ), of norm --max-grad-norm at most, in the parameters' .grad; with --compile this is one graph."""
    loss, metrics = ppo_loss(agent, batch, clip, args)
    loss.backward()
    if dist.is_initialized():  # by torchrun: take the mean over the processes
        for gradient in [p.grad for p in agent.parameters() if p.grad is not None]:
            gradient.copy_(gathered(gradient.unsqueeze(0)).mean(0))
    clip_gradient(agent.parameters(), args.max_grad_norm)
    return metrics


def shuffled_minibatches(batch: tuple, epochs: int, num_minibatches: int) -> Iterator[tuple]:
    """For every epoch a new order of the samples of a namedtuple of tensors (B, …), in equal parts if possible."""
    for _ in range(epochs):
        order = torch.randperm(len(batch[0]), device=batch[0].device)
        yield from map(type(batch), *(x[order].chunk(num_minibatches) for x in batch))


def anneal(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each of its groups to `factor` times the one that it began with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, the backward pass in the function included; on CUDA as CUDA graphs, whose results are copied."""
    graphs = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
    return lambda *inputs: {name: x.clone() for name, x in graphs(*inputs).items()}


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with ParallelRun(args) as run:
        envs = Envs(args, args.num_envs, (Discrete, Box))
        batch_size, spaces = args.num_envs * args.num_steps, (envs.observation_space, envs.action_space)
        if batch_size % args.num_minibatches:
            fail(f"--num-minibatches {args.num_minibatches} must divide --num-envs × --num-steps = {batch_size}")
        agent = ActorCritic(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(run.device)
        optimizer = lean(torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True))
        gradient_of = compiled(ppo_gradient, run.device) if args.compile else ppo_gradient
        clip = torch.tensor(args.clip_coef, device=run.device)  # a number would be a constant of the compiled gradient
        run.start(envs, agent=agent, optimizer=optimizer)  # all that a checkpoint holds

        obs = envs.reset(args.seed + run.step + run.rank * args.num_envs)  # other episodes where a run is resumed
        discounted_return = torch.zeros(args.num_envs, device=run.device)
        while run.goes_on():
            remaining = 1 - run.step / args.total_timesteps
            anneal(optimizer, remaining if args.anneal_lr else 1)
            clip.fill_(args.clip_coef * (remaining if args.anneal_clip else 1))

            # Collect T steps from every environment with the policy as it stands.
            rollout = []
            for noise in agent.draw_noise(args.num_steps, args.num_envs):
                actions = agent.act(torch.as_tensor(obs, device=run.device), noise)
                acted_on = obs
                obs, next_obs, rewards, terminated, truncated = envs.step(agent.to_env(actions))
                rollout.append((acted_on, next_obs, actions.numpy(force=True), rewards, terminated, truncated))
                run.advance(envs)
            rollout = (torch.as_tensor(np.array(x), device=run.device) for x in zip(*rollout))
            observations, next_observations, actions, rewards, terminated, truncated = rollout

            # Estimate advantages and returns; everything is (T, N).
            if args.normalize_rewards:
                done = terminated | truncated
                discounted = discounted_returns(rewards, done, discounted_return, args.gamma)
                discounted_return = discounted[-1] * ~done[-1]
                agent.return_statistics.update(gathered(discounted.flatten()))
                rewards = agent.return_statistics.scale(rewards)
            with torch.no_grad():
                states = agent.encode(observations)
                values, next_values = agent.value(states), agent.value(agent.encode(next_observations))
                log_probs, _ = agent.log_prob_and_entropy(states, actions)
            advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
            returns = advantages + values

            # Update: several epochs of shuffled minibatches; row t·N + n is step t of environment n.
            metrics = []
            batch = (x.flatten(0, 1) for x in (states, actions, log_probs, values, advantages, returns))
            for minibatch in shuffled_minibatches(PPOBatch(*batch), args.update_epochs, args.num_minibatches):
                optimizer.zero_grad()
                metrics.append(gradient_of(agent, minibatch, clip, args))
                approx_kl = metrics[-1]["approx_kl"].unsqueeze(0)
                if args.target_kl is not None and gathered(approx_kl).mean() > 1.5 * args.target_kl:
                    break  # before the step, as SB3
                optimizer.step()
            if agent.observation_statistics is not None:  # only now, so that π_old acted with those of its update
                agent.observation_statistics.update(gathered(observations.flatten(0, 1)))

            explained = 1 - advantages.var(correction=0) / (returns.var(correction=0) + 1e-8)
            metrics.append({"values": values.mean(), "explained_variance": explained})  # of the returns' variance, by V
            run.log(metrics, learning_rate=optimizer.param_groups[0]["lr"])
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


# Data parallel under torchrun -------------------------------------------------------------------------------


class ParallelRun(Run):
    """A Run of which torchrun may start several: each has its own environments and noise; only the first writes."""

    def __init__(self, args: Args):
        super().__init__(args)
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1:
            dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA's
            self.callback(dist.destroy_process_group)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def start(self, envs, **modules) -> None:
        """As in one process; those that do not write load the checkpoint, and draw random numbers of their own."""
        if self.rank == 0:
            return super().start(envs, **modules)
        if self.args.resume:
            self.step = load_checkpoint(self.args.resume, **modules)["step"]
        torch.manual_seed(self.args.seed + self.step + self.rank)
        self.log = self.checkpoint = self.finish = lambda *_, **__: {}

    def goes_on(self) -> bool:
        """As in one process; a signal to one of them stops all."""
        self.stopped = bool(gathered(torch.tensor([self.stopped], device=self.device)).any())
        return super().goes_on()

    def advance(self, envs) -> None:
        """Counts a step of the environments of all processes; the first logs its own episodes."""
        self.step += (self.world_size - (self.rank == 0)) * self.args.num_envs
        return super().advance(envs) if self.rank == 0 else None


def gathered(batch: Tensor) -> Tensor:
    """The batches (B, …) of all processes of torchrun as one, B the same in each; the batch itself in one process."""
    if not dist.is_initialized():
        return batch
    parts = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, batch.contiguous())
    return torch.cat(parts)


if __name__ == "__main__":
    train(parse_args())
