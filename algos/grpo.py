"""GRPO: group relative policy optimisation, PPO without a critic (Shao et al. 2024, arXiv 2402.03300).

Each iteration plays groups of G episodes with the current policy π_old, every group from an initial state of its
own, and takes several epochs of minibatch steps on

    R_i  = Σ_t γ^t r_{i,t}
    Â_i  = (R_i − mean(R_1 … R_G)) / std(R_1 … R_G)              for every step of episode i
    ρ_t  = π_θ(a_t|s_t) / π_old(a_t|s_t),   q_t = π_ref(a_t|s_t) / π_θ(a_t|s_t)
    L(θ) = −E[min(ρ_t Â, clip(ρ_t, 1−ε, 1+ε) Â)] + β E[q_t − 1 − log q_t] − c_e E[H(π_θ(·|s_t))]

A language model's terms: a prompt is an initial state (a reset seed), a completion an episode, a token a step,
the verifier's score the return. Details that matter, and why:
- The group's mean return takes the place of V(s_0). A group of equal returns says nothing: advantages of exactly 0.
- One reset seed per group also fixes the environment's later luck: returns differ by the actions alone.
- --no-std-normalisation: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783). Groups of nearly equal returns then weigh less.
- --reward-to-go compares R_{i,t} = Σ_{k≥t} γ^{k−t} r_{i,k} with the group's at the same time, 0 once ended.
- Few gradient steps per iteration: a whole return says little about one action, and many epochs fit its noise.
- The loss is a mean over all steps. The paper's mean over each episode first lets steps of long episodes weigh less.
- q − 1 − log q ("k3") estimates KL(π_θ ‖ π_ref) from π_θ's own actions, its gradient is KL(π_ref ‖ π_θ)'s. π_ref is a
  copy of the policy, observation statistics included, renewed every so many iterations.
- An episode that a time limit cuts: no critic says what is missing, so R ends at the cut.

No counterpart in Stable-Baselines3. With one epoch of one minibatch and no deviation, the gradient is that of
reinforce.py's mean baseline times (G−1)/G times episodes/steps (tests/test_grpo.py).

    python algos/grpo.py                          # CartPole-v1
    python algos/grpo.py --no-std-normalisation   # Dr. GRPO's advantages
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
from collections.abc import Iterator
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
    total_timesteps: Count = 100_000  # environment steps, over all environments; the last episodes go on to their end
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto takes CUDA when there is one
    torch_threads: Count = 1  # CPU threads for PyTorch; one is fastest for networks this small
    compile: bool = False  # compile loss and gradient with torch.compile: pays in runs of several minutes
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 50_000  # environment steps between checkpoints
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film 1000 images from resets 0, 1, 8, 27, 64 … on, of the first environment

    # environment
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 8  # parallel environments, a multiple of --group-size
    normalize_observations: bool = False  # normalise Box observations by running mean and deviation, clipped to ±10

    # algorithm
    group_size: Annotated[int, (2, math.inf, "at least 2")] = 8  # episodes G from one state; --num-envs is a multiple
    groups: Count = 1  # groups per iteration; groups × G episodes are played --num-envs at a time
    std_normalisation: bool = True  # divide advantages by the group's deviation; off: as in Dr. GRPO
    reward_to_go: bool = False  # compare what followed each action with the group's at that time, not whole returns
    gamma: Fraction = 0.99  # discount γ
    num_minibatches: Count = 1  # minibatches per epoch
    update_epochs: Count = 2  # passes over each iteration's episodes
    learning_rate: Positive = 3e-3  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    clip_coef: Positive = 0.2  # clipping range ε of the probability ratio
    kl_coef: NotNegative = 0.0  # weight β of the KL to the reference policy
    reference_every: Count = 10  # iterations after which the reference policy is renewed
    ent_coef: NotNegative = 0.0  # weight c_e of the entropy bonus
    hidden_sizes: tuple[Count, ...] = (64, 64)  # tanh layers of the policy
    log_std_init: float = 0.0  # initial log standard deviation of Box actions


# fmt: off
MUJOCO = dict(total_timesteps=1_000_000, learning_rate=1e-3, normalize_observations=True, reward_to_go=True)
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "Pendulum-v1": dict(update_epochs=4, learning_rate=1e-2, gamma=0.9, reward_to_go=True),
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


class Policy(nn.Module):
    """Policy π(a|s).

    Observations are (…, D) float32 of a Box, (…,) int64 of a Discrete space; states s (…, D) are what `encode` makes of
    them; actions (…, A) float32, unclipped, for a Box, (…,) indices from 0 for a Discrete space. `forward` is the
    deterministic policy, from observations to what the environment takes.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, normalize_observations=False, log_std_init=0.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        self.state_size = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        normalized = normalize_observations and not self.one_hot
        self.observation_statistics = RunningStatistics(self.state_size) if normalized else None
        self.actor = mlp([self.state_size, *hidden_sizes, self.action_size], output_gain=0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), log_std_init))
            self.register_buffer("bounds", torch.as_tensor(np.stack([action_space.low, action_space.high])))

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space, normalised by the running statistics if asked for."""
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        statistics = self.observation_statistics
        return obs if statistics is None else statistics.scale(obs - statistics.mean)

    def draw_noise(self, *shape: int) -> Tensor:
        """All the randomness of a rollout's actions at once, (*shape, A): Gumbel, or Gaussian of π's deviation."""
        noise = torch.empty(*shape, self.action_size, device=next(self.parameters()).device)
        return -noise.exponential_().log() if self.discrete else noise.normal_() * self.log_std.detach().exp()

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s): mean + noise, or argmax of logits + noise (the Gumbel-max trick)."""
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
    scale = groups.std(-1, correction=0, keepdim=True) + 1e-8 if std_normalisation else 1
    return ((groups - groups.mean(-1, keepdim=True)) / scale).flatten(1)


EPISODE_LIMIT = 100_000  # steps after which an episode is taken for one that never ends

# One whole episode per environment, (T, N, …) with T the longest; `running` is false after an episode's end.
Episodes = namedtuple("Episodes", "observations actions rewards running final_observations truncated")


def play_episodes(policy: Policy, envs, seeds: list[int]) -> Episodes:
    """Plays one episode in every environment, each reset with its seed; their ends are then in envs.episodes."""
    device, num_envs = next(policy.parameters()).device, envs.num_envs
    obs = finite("observation", np.array([env.reset(seed=x)[0] for env, x in zip(envs.envs, seeds)], envs.dtype))
    envs.returns, envs.lengths, running = np.zeros(num_envs), np.zeros(num_envs, int), np.ones(num_envs, bool)
    final_obs, truncated, steps, ends = obs.copy(), ~running, [], []
    while running.any():  # those that are done step on idly; none of these steps counts
        if len(steps) == EPISODE_LIMIT:
            fail(f"no end of an episode after {EPISODE_LIMIT} steps: register a time limit, or use ppo.py")
        actions = policy.act(torch.as_tensor(obs, device=device), policy.draw_noise(num_envs))
        next_obs, reached, rewards, terminated, time_limit = envs.step(policy.to_env(actions))
        steps.append((obs, actions.numpy(force=True), rewards * running, running))
        final_obs[running], truncated[running] = reached[running], (time_limit & ~terminated)[running]
        ends += [end for end in envs.episodes if running[end[0]]]
        obs, running = next_obs, running & ~(terminated | time_limit)
    envs.episodes = ends
    return Episodes(*(torch.as_tensor(np.array(x), device=device) for x in (*zip(*steps), final_obs, truncated)))


def check_same_start(args: Args) -> None:
    """Refuses an environment that one reset seed does not always start in the same way."""
    env = make_env(args)
    first, *others = (np.copy(env.reset(seed=args.seed)[0]) for _ in range(10))
    env.close()
    if not all(np.array_equal(first, other) for other in others):
        fail(f"{args.env_id}: its reset ignores the seed, and no group can start from one state: use reinforce.py")


# The steps of an iteration's episodes, or a minibatch of them; first dimension B. States are encoded observations.
GRPOBatch = namedtuple("GRPOBatch", "states actions log_probs reference_log_probs advantages")


def grpo_gradient(policy: nn.Module, batch: GRPOBatch, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ) of a minibatch in the parameters' .grad, and returns what to log; with --compile this is one graph.

    Both KLs are Schulman's "k3" (2020): of π_old to π_θ, and of π_θ to π_ref as long as π_θ is π_old; in nats.
    """
    log_probs, entropies = policy.log_prob_and_entropy(batch.states, batch.actions)
    log_ratio, log_q = log_probs - batch.log_probs, batch.reference_log_probs - log_probs
    ratio, clip = log_ratio.exp(), args.clip_coef
    policy_loss = -torch.min(ratio * batch.advantages, ratio.clamp(1 - clip, 1 + clip) * batch.advantages).mean()
    reference_kl, entropy = (log_q.exp() - 1 - log_q).mean(), entropies.mean()
    (policy_loss + args.kl_coef * reference_kl - args.ent_coef * entropy).backward()
    approx_kl, clipfrac = (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > clip).float().mean()
    metrics = dict(policy_loss=policy_loss, entropy=entropy, reference_kl=reference_kl, approx_kl=approx_kl)
    return {name: x.detach() for name, x in metrics.items()} | {"clipfrac": clipfrac}


def shuffled_parts(batch: tuple, epochs: int, parts: int) -> Iterator[tuple]:
    """For every epoch a new order of the batch's samples, in as many parts as asked for, of equal size up to one."""
    for _ in range(epochs):
        order = torch.randperm(len(batch[0]), device=batch[0].device)
        yield from map(type(batch), *(x[order].tensor_split(parts) for x in batch))


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        G, num_episodes = args.group_size, args.groups * args.group_size
        if args.num_envs % G or num_episodes % args.num_envs:
            fail(f"--num-envs {args.num_envs} must be a multiple of --group-size {G} and divide --groups × it")
        if args.num_minibatches > num_episodes:
            fail(f"--num-minibatches {args.num_minibatches} must be at most --groups × --group-size = {num_episodes}")
        envs = Envs(args, args.num_envs, (Discrete, Box))
        check_same_start(args)
        spaces = envs.observation_space, envs.action_space
        policy = Policy(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(run.device)
        reference = copy.deepcopy(policy)
        reference_steps = args.reference_every * args.update_epochs * args.num_minibatches  # from one to the next
        optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, eps=1e-5, fused=True)
        gradient_of = torch.compile(grpo_gradient) if args.compile else grpo_gradient
        run.start(envs, policy=policy, reference=reference, optimizer=optimizer)  # all that a checkpoint holds

        while run.goes_on():
            for group in optimizer.param_groups:
                remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * remaining
            if run.updates % reference_steps == 0:
                reference.load_state_dict(policy.state_dict())

            # Play groups of episodes, compare each with its group; then (T, N) becomes the (B,) steps that were played.
            played = []
            for _ in range(num_episodes // args.num_envs):
                seeds = torch.randint(2**31, (args.num_envs // G,)).repeat_interleave(G)
                episodes = play_episodes(policy, envs, seeds.tolist())
                run.step += int(episodes.running.sum()) - args.num_envs  # `advance` counts one step of each environment
                run.advance(envs)
                returns = returns_to_go(episodes.rewards, args.gamma)
                advantages = group_advantages(returns if args.reward_to_go else returns[:1], G, args.std_normalisation)
                steps = (episodes.observations, episodes.actions, advantages.expand_as(returns), returns)
                played.append([x[episodes.running] for x in steps])
            observations, actions, advantages, returns = (torch.cat(x) for x in zip(*played))

            # Update: several epochs of shuffled minibatches.
            states, metrics = policy.encode(observations), []
            with torch.no_grad():
                log_probs, _ = policy.log_prob_and_entropy(states, actions)
                reference_log_probs, _ = reference.log_prob_and_entropy(reference.encode(observations), actions)
            batch = GRPOBatch(states, actions, log_probs, reference_log_probs, advantages)
            for minibatch in shuffled_parts(batch, args.update_epochs, args.num_minibatches):
                optimizer.zero_grad()
                metrics.append(gradient_of(policy, minibatch, args))
                optimizer.step()
                run.updates += 1
            if policy.observation_statistics is not None:
                policy.observation_statistics.update(observations)
            run.log([*metrics, {"returns": returns.mean()}], learning_rate=optimizer.param_groups[0]["lr"])
        return run.finish(policy)


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
