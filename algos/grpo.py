"""GRPO: group relative policy optimisation, PPO without a critic (Shao et al. 2024, arXiv 2402.03300).

Each iteration plays groups of G episodes with the current policy π_old, every group from an initial state of its
own, and takes several epochs of minibatch steps on

    R_i  = Σ_t γ^t r_{i,t}
    Â_i  = (R_i − mean(R_1 … R_G)) / std(R_1 … R_G)              for every step of episode i
    ρ_t  = π_θ(a_t|s_t) / π_old(a_t|s_t),   q_t = π_ref(a_t|s_t) / π_θ(a_t|s_t)
    L(θ) = −E[min(ρ_t Â, clip(ρ_t, 1−ε, 1+ε) Â)] + β E[q_t − 1 − log q_t] − c_e E[H(π_θ(·|s_t))]

A language model's terms: a prompt is an initial state (a reset seed), a completion an episode, a token a step,
the verifier's score the return. Details that matter, and why:
- What a state is worth is what the group gets from it: its mean return takes the place of V(s_0).
- One reset seed per group also fixes the environment's later luck: returns differ by the actions alone.
- A group of equal returns says nothing: its advantages are exactly 0.
- --no-std-normalisation has Dr. GRPO's advantages (Liu et al. 2025, arXiv 2503.20783): divided by their deviation,
  groups of nearly equal returns weigh as much as those where something was at stake.
- Few gradient steps per iteration: a whole return says little about one action, and many epochs fit its noise.
- The loss is a mean over all steps. A mean over each episode's own steps first, as in the paper, makes a step of
  a long episode weigh less, good or bad; Dr. GRPO names that bias too, and divides by a constant.
- --reward-to-go compares R_{i,t} = Σ_{k≥t} γ^{k−t} r_{i,k} with the group's at the same time, 0 once ended.
- β E[q − 1 − log q] ("k3") is never negative, and over π_θ's own actions KL(π_θ ‖ π_ref) in the mean, its gradient
  that of KL(π_ref ‖ π_θ); after the first step of an iteration the actions are an older policy's. π_ref is a copy
  of the policy, observation statistics included, renewed every so many iterations.
- An episode that a time limit cuts: there is no critic to say what is missing, so R ends at the cut. That is exact
  for the return up to the limit, which is what evaluation measures.
- An environment that is done steps on idly until the longest episode ends: steps that are simulated, but not counted.
- Data parallel: the mean is over each process's own steps, and processes count alike, however many those are.

With one epoch of one minibatch and no deviation, the gradient is that of reinforce.py's mean baseline times (G−1)/G,
as the group's mean has the episode itself in it, times episodes/steps, a sum over time there being a mean over
steps here (tests/test_grpo.py). No counterpart in Stable-Baselines3; the clipped objective is ppo.py's.

    python algos/grpo.py                          # CartPole-v1
    python algos/grpo.py --no-std-normalisation   # Dr. GRPO's advantages
    python algos/grpo.py --env-id Pendulum-v1     # with its recommended settings
    python algos/grpo.py --resume runs/CartPole-v1__grpo__1__…
    torchrun --nproc-per-node 2 algos/grpo.py     # data parallel: each process plays its own groups
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
from collections.abc import Callable, Iterator, Sequence
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
    """environment steps, over all environments and processes; the last episodes are played to their end"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradient with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record resets 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 8
    """parallel environments, a multiple of --group-size (per process)"""
    normalize_observations: bool = False
    """normalise observations by their running mean and deviation, clipped to ±10"""

    # algorithm
    group_size: int = 8
    """episodes G from the same initial state; where G changes, --num-envs and --groups must follow"""
    groups: int = 1
    """groups per iteration (per process); groups × G episodes are played --num-envs at a time"""
    std_normalisation: bool = True
    """divide advantages by the group's deviation; off: as in Dr. GRPO"""
    reward_to_go: bool = False
    """compare what each action was followed by with the group's at that time, not the return of the whole episode"""
    gamma: float = 0.99
    """discount γ"""
    num_minibatches: int = 1
    """minibatches per epoch"""
    update_epochs: int = 2
    """passes over each iteration's episodes"""
    learning_rate: float = 3e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    clip_coef: float = 0.2
    """clipping range ε of the probability ratio"""
    kl_coef: float = 0.0
    """weight β of the KL to the reference policy"""
    reference_every: int = 10
    """iterations after which the reference policy is renewed"""
    ent_coef: float = 0.0
    """weight c_e of the entropy bonus"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """tanh layers of the policy"""
    log_std_init: float = 0.0
    """initial log standard deviation of Box actions"""


# fmt: off
MUJOCO = dict(total_timesteps=1_000_000, learning_rate=1e-3, normalize_observations=True, reward_to_go=True)
RECOMMENDED = {
    "CartPole-v1": dict(),
    "Acrobot-v1": dict(),
    "Pendulum-v1": dict(update_epochs=4, learning_rate=1e-2, gamma=0.9, reward_to_go=True),
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


class Policy(nn.Module):
    """Policy π(a|s).

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
        self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), log_std_init))
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space, normalised by the running statistics if asked for."""
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        return obs if self.observation_statistics is None else self.observation_statistics.normalize(obs)

    def draw_noise(self, *shape: int) -> Tensor:
        """All the randomness of a rollout's actions at once, (*shape, A): Gumbel, or Gaussian of π's deviation."""
        noise = torch.empty(*shape, self.action_size, device=self.actor[-1].weight.device)
        return -noise.exponential_().log() if self.discrete else noise.normal_() * self.log_std.detach().exp()

    def sample(self, states: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s): mean + noise, or argmax of logits + noise (the Gumbel-max trick)."""
        output = self.actor(states) + noise
        return output.argmax(-1) if self.discrete else output

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


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{k≥t} γ^{k−t} r_k; rewards (T, N), 0 after an episode's end. R_0 is the whole return."""
    *earlier, last = rewards.unbind()
    returns = [last]
    for reward in reversed(earlier):
        returns.append(reward + gamma * returns[-1])
    return torch.stack(returns[::-1])


def group_advantages(returns: Tensor, group_size: int, std_normalisation: bool) -> Tensor:
    """Â = (R − mean) / std over each group (arXiv 2402.03300, section 4.1.2), or R − mean; the groups lie side by side.

    Returns (T, N), N a multiple of the group size G.
    """
    groups = returns.unflatten(1, (-1, group_size))
    groups = groups - groups[..., :1]  # exactly 0 where all are equal: no rounding error to be divided by itself
    advantages = groups - groups.mean(-1, keepdim=True)
    if std_normalisation:
        advantages = advantages / (groups.std(-1, correction=0, keepdim=True) + 1e-8)
    return advantages.flatten(1)


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, clip: Tensor | float) -> Tensor:
    """−E[min(ρÂ, clip(ρ, 1−ε, 1+ε)Â)] (arXiv 1707.06347, eq. 7); ratio ρ and advantages (B,)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """E[ρ − 1 − log ρ], an unbiased estimate of KL(π_old ‖ π_θ) in nats (Schulman 2020, "k3"); log_ratio (B,)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


class GRPOBatch(NamedTuple):
    """The steps of an iteration's episodes, or a minibatch of them; first dimension B. States are encoded."""

    states: Tensor
    actions: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor


METRICS = ("policy_loss", "entropy", "approx_kl", "reference_kl", "clipfrac")


def grpo_loss(policy: Policy, batch: GRPOBatch, args: Args) -> tuple[Tensor, Tensor]:
    """The loss L(θ) of a minibatch, and METRICS (5,)."""
    log_probs, entropy = policy.log_prob_and_entropy(batch.states, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    policy_loss = clipped_policy_loss(ratio, batch.advantages, args.clip_coef)
    reference_kl, entropy = approximate_kl(batch.reference_log_probs - log_probs), entropy.mean()
    loss = policy_loss + args.kl_coef * reference_kl - args.ent_coef * entropy
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, torch.stack([policy_loss, entropy, approximate_kl(log_ratio), reference_kl, clipfrac]).detach()


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


def gradient_vector(loss: Tensor, module: nn.Module) -> Tensor:
    """∇loss with respect to all parameters of `module`, each of which has to take part in it, as one vector (P,): its
    mean over the processes."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return average(torch.cat([x.flatten() for x in gradients]))


def vector_step(optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    """One step of an optimiser of one vector (P,), down this gradient."""
    optimizer.param_groups[0]["params"][0].grad = gradient
    optimizer.step()


def grpo_gradient(policy: Policy, batch: GRPOBatch, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch, and METRICS."""
    loss, metrics = grpo_loss(policy, batch, args)
    return gradient_vector(loss, policy), metrics


def grpo_update(policy: Policy, optimizer, batch: GRPOBatch, args: Args, gradient_of=grpo_gradient) -> Tensor:
    """One step of the optimiser of `parameter_vector(policy)` on a minibatch. Returns METRICS before it."""
    gradient, metrics = gradient_of(policy, batch, args)
    vector_step(optimizer, gradient)
    return metrics


def shuffled_parts(batch: Sequence[Tensor], epochs: int, parts: int) -> Iterator[tuple[Tensor, ...]]:
    """For every epoch a new order of the batch's samples, in as many parts as asked for, of equal size up to one."""
    for _ in range(epochs):
        order = torch.randperm(len(batch[0]), device=batch[0].device)
        yield from zip(*(x[order].tensor_split(parts) for x in batch))


EPISODE_LIMIT = 100_000
"""Steps after which an episode is taken for one that never ends."""


class Episodes(NamedTuple):
    """One whole episode per environment, (T, N, …) with T the longest; `running` is false after an episode's end."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    running: Tensor
    final_observations: Tensor
    truncated: Tensor


@torch.no_grad()
def play_episodes(policy: Policy, envs: gym.vector.VectorEnv, seeds: list[int]) -> tuple[Episodes, list[dict]]:
    """Plays one episode in every environment, each reset with its seed. Returns them, and the infos of their ends.

    An environment that is done steps on idly until the longest episode ends; none of those steps is kept.
    """
    device = next(policy.parameters()).device

    def tensor(x, dtype):
        return torch.as_tensor(np.asarray(x), dtype=dtype, device=device)

    obs, _ = envs.reset(seed=seeds)
    running = np.ones(envs.num_envs, dtype=bool)
    final_obs, truncated = obs.copy(), ~running
    steps, ends = [], []
    while running.any():
        if len(steps) == EPISODE_LIMIT:
            fail(
                f"an episode has not ended after {EPISODE_LIMIT} steps; give the environment a time limit (gymnasium's"
                " TimeLimit wrapper: max_episode_steps where it is registered), or use ppo.py"
            )
        states = policy.encode(tensor(obs, policy.observation_dtype))
        actions = policy.sample(states, policy.draw_noise(envs.num_envs))
        next_obs, reached, rewards, terminated, time_limit, infos = step_envs(envs, policy.to_env(actions))
        steps.append((obs, actions.cpu(), rewards * running, running))
        final_obs[running], truncated[running] = reached[running], (time_limit & ~terminated)[running]
        if "episode" in infos:
            ends.append(infos | {"_episode": infos["_episode"] & running})
        obs, running = next_obs, running & ~(terminated | time_limit)
    observations, actions, rewards, running = zip(*steps)
    observations, final_obs = (tensor(x, policy.observation_dtype) for x in (observations, final_obs))
    actions, rewards = torch.stack(actions).to(device), tensor(rewards, torch.float32)
    running, truncated = (tensor(x, torch.bool) for x in (running, truncated))
    return Episodes(observations, actions, rewards, running, final_obs, truncated), ends


def check_same_start(args: Args) -> None:
    """Refuses an environment that one reset seed does not always start in the same way."""
    env = make_env(args)
    first, *others = (np.copy(env.reset(seed=args.seed)[0]) for _ in range(10))
    env.close()
    if not all(np.array_equal(first, other) for other in others):
        fail(
            f"{args.env_id}: its reset ignores the seed, so that no group could start from one state; let it draw from"
            " self.np_random after super().reset(seed=seed), or use reinforce.py"
        )


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    num_episodes = args.groups * args.group_size
    if args.group_size == 1:
        fail("--group-size 1 has nothing to compare with; it must be at least 2")
    if args.num_envs % args.group_size or num_episodes % args.num_envs:
        fail(
            f"--num-envs {args.num_envs} must be a multiple of --group-size {args.group_size}, and divide"
            f" --groups × --group-size = {num_episodes}"
        )
    if args.num_minibatches > num_episodes:
        fail(f"--num-minibatches {args.num_minibatches} must be at most --groups × --group-size = {num_episodes}")
    spaces = check_spaces(args, (Discrete, Box))
    check_same_start(args)
    policy = Policy(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(device)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam([parameter_vector(policy)], args.learning_rate, eps=1e-5, fused=True)
    gradient_of = compiled(grpo_gradient, device) if args.compile else grpo_gradient
    counter = nn.Module()
    counter.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
    modules = {"policy": policy, "optimizer": optimizer, "reference": reference, "counter": counter}
    run = Run(args, rank, modules)
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    while run.step < args.total_timesteps and not run.interrupted():
        remaining = 1 - run.step / args.total_timesteps
        lr = optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        if counter.iteration % args.reference_every == 0:
            reference.load_state_dict(policy.state_dict())
        counter.iteration += 1

        # Play groups of episodes, and compare each with its group; then (T, N) becomes the (B,) steps that were played.
        played = []
        for _ in range(num_episodes // args.num_envs):
            seeds = torch.randint(2**31, (args.num_envs // args.group_size,)).repeat_interleave(args.group_size)
            episodes, ends = play_episodes(policy, envs, seeds.tolist())
            run.step += round(world_size * average(episodes.running.sum()).item())
            for infos in ends:
                run.log_episodes(infos)
            returns = returns_to_go(episodes.rewards, args.gamma)
            compared = returns if args.reward_to_go else returns[:1]
            advantages = group_advantages(compared, args.group_size, args.std_normalisation).expand_as(returns)
            steps = (episodes.observations, episodes.actions, advantages, returns)
            played.append([x[episodes.running] for x in steps])
        observations, actions, advantages, returns = (torch.cat(x) for x in zip(*played))

        # Update: several epochs of shuffled minibatches.
        states = policy.encode(observations)
        with torch.no_grad():
            log_probs, _ = policy.log_prob_and_entropy(states, actions)
            reference_log_probs, _ = reference.log_prob_and_entropy(reference.encode(observations), actions)
        metrics = []
        batch = GRPOBatch(states, actions, log_probs, reference_log_probs, advantages)
        for minibatch in shuffled_parts(batch, args.update_epochs, args.num_minibatches):
            minibatch_metrics = grpo_update(policy, optimizer, GRPOBatch(*minibatch), args, gradient_of)
            metrics.append(minibatch_metrics.clone())  # CUDA graphs reuse the memory of their outputs
        if policy.observation_statistics is not None:
            policy.observation_statistics.update(observations)
            for x in policy.observation_statistics.buffers():
                x.copy_(average(x))  # each merged its own steps, however many: their mean, not one merge

        # Log.
        losses = average(torch.cat([torch.stack(metrics).mean(0), returns.mean(0, keepdim=True)])).tolist()
        run.log(dict(zip((*METRICS, "returns"), losses)), learning_rate=lr)
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(policy)


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
