"""PPO from pixels, on Atari (Schulman et al. 2017, arXiv 1707.06347; network: Mnih et al. 2015, "Nature CNN").

The algorithm is that of ppo.py,

    L(θ) = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c_v E[(V(s_t) − R̂_t)²] − c_e E[H(π_θ(·|s_t))]

with one convolutional network that ends in both the policy and the value. Details that matter, and why:
- ale_py's own C++ environments: a step is 4 frames, the last two of them maximised (sprites flicker), grey, 84 × 84;
  an observation is the newest 4 of such images. A step is an agent's step: 1 M steps are 4 M frames.
- Two protocols. `machado` (Machado et al. 2018, arXiv 1709.06009): the emulator repeats the last action with
  probability 0.25, and a lost life is no termination. `nature` (Mnih et al. 2015): no such repetition, up to 30 frames
  without action at the start, and a lost life is a termination for learning, though the game goes on; FIRE is pressed
  for the agent at a game's start, as in OpenAI's Baselines, but not after a lost life. Under both a game ends after
  108 000 frames at the latest; Mnih et al. evaluated for 5 minutes, 18 000.
- The training reward is the sign of the game's, so that one step size does for all games; what is logged and evaluated
  is the score of full games, unclipped, under both protocols.
- Observations stay uint8 until the device; there they become [0, 1], channels last.
- Log-probabilities and values are those of acting: one forward pass for each step, one more at the rollout's end,
  and one where a time limit (108 000 frames) ends a game, for the value of its final observation.
- Orthogonal initialisation, gain √2, 0.01 for the policy's layer and 1 for the value's; Adam's ε is 1e-5.

Against Stable-Baselines3: the same update as PPO with CnnPolicy (parameters agree to 1e-4, tests/test_ppo_atari.py).
SB3 reads its schedules after a rollout, here they are read before it.

    python algos/ppo_atari.py --torch-threads 4              # ALE/Pong-v5
    python algos/ppo_atari.py --env-id ALE/Breakout-v5 --protocol nature
    python algos/ppo_atari.py --env-id My/Pixels-v0          # any environment with uint8 images (C, H, W)
    torchrun --nproc-per-node 2 algos/ppo_atari.py           # data parallel: each process has its own environments
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
    """where the network lives; auto takes CUDA when there is one"""
    torch_threads: int = 2
    """CPU threads for PyTorch; on the CPU as many as there are cores is fastest"""
    compile: bool = False
    """compile the update with torch.compile (CUDA graphs on a GPU)"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints"""
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
    clip_coef: float = 0.1
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


RECOMMENDED = {"ALE/Pong-v5": dict(total_timesteps=3_000_000)}
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Network ----------------------------------------------------------------------------------------------------


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """The layer with orthogonal weights of that gain and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class PixelActorCritic(nn.Module):
    """Policy π(a|s) and value V(s) on one convolutional network (Mnih et al. 2015, "Model architecture").

    Observations are images (…, C, H, W) uint8, and states s what `encode` makes of them; actions are indices (…,)
    from 0. `forward` is the deterministic policy, from observations to what the environment takes.
    """

    observation_dtype = torch.uint8

    def __init__(self, observation_space: Box, action_space: Discrete):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        channels = observation_space.shape[0]
        convolutions = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
        layers = [x for layer in convolutions for x in (orthogonal(layer), nn.ReLU(inplace=True))] + [nn.Flatten()]
        with torch.no_grad():
            features = nn.Sequential(*layers)(torch.zeros(1, *observation_space.shape)).shape[1]
        layers += [orthogonal(nn.Linear(features, 512)), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        self.actor = orthogonal(nn.Linear(512, int(action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(512, 1), gain=1.0)

    def encode(self, obs: Tensor) -> Tensor:
        """Images (B, C, H, W) from 0 to 255 → from 0 to 1, channels last."""
        return obs.to(torch.float32, memory_format=torch.channels_last).div_(255)

    def logits_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) and (B,)."""
        features = self.trunk(states)
        return self.actor(features), self.critic(features).squeeze(-1)

    def sample(self, logits: Tensor) -> Tensor:
        """Indices (…,) drawn from softmax(logits), by the Gumbel-max trick; logits (…, A)."""
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely action."""
        return self.to_env(self.logits_and_values(self.encode(obs))[0].argmax(-1))

    def to_env(self, actions: Tensor) -> Tensor:
        """Indices moved to the space's start."""
        return actions + int(self.action_space.start)


# The maths --------------------------------------------------------------------------------------------------


def categorical_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of softmax(logits); logits (…, A), actions (…,)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


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


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, clip: Tensor | float) -> Tensor:
    """−E[min(ρÂ, clip(ρ, 1−ε, 1+ε)Â)] (arXiv 1707.06347, eq. 7); ratio ρ and advantages (B,)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_value: float | None) -> Tensor:
    """E[(V − R̂)²], inputs (B,); with `clip_value` V is first kept within that distance of V_old, as in SB3."""
    if clip_value is not None:
        values = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return F.mse_loss(values, returns)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """E[ρ − 1 − log ρ], an unbiased estimate of KL(π_old ‖ π_θ) in nats (Schulman 2020, "k3"); log_ratio (B,)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var[R̂ − V] / Var[R̂]: 1 is a perfect critic, 0 one that knows nothing but the mean; inputs of one shape."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


class PixelBatch(NamedTuple):
    """A rollout, or a minibatch of it; first dimension B. Observations are uint8."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")


def pixel_ppo_loss(agent: PixelActorCritic, batch: PixelBatch, clip: Tensor | float, args) -> tuple[Tensor, Tensor]:
    """The loss L(θ) of a minibatch, and METRICS (5,)."""
    logits, values = agent.logits_and_values(agent.encode(batch.observations))
    log_probs, entropy = categorical_log_prob_and_entropy(logits, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    advantages = batch.advantages
    if args.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = clipped_policy_loss(ratio, advantages, clip)
    value_loss = clipped_value_loss(values, batch.values, batch.returns, args.clip_value)
    entropy = entropy.mean()
    with torch.no_grad():
        clipfrac = ((ratio - 1).abs() > clip).float().mean()
        metrics = torch.stack([policy_loss, value_loss, entropy, approximate_kl(log_ratio), clipfrac])
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy, metrics


def pixel_ppo_update(agent, optimizer, batch: PixelBatch, clip: Tensor | float, args) -> tuple[Tensor, bool]:
    """One gradient step on a minibatch. Returns METRICS before it, and whether the KL passed its target instead."""
    loss, metrics = pixel_ppo_loss(agent, batch, clip, args)
    parameters = list(agent.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    if dist.is_initialized():
        metrics, gradients = average(metrics), average_all(gradients)
    if args.target_kl is not None and metrics[3] > 1.5 * args.target_kl:
        return metrics, True
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.contiguous()  # fused Adam reads a channels-last gradient in its memory's order
    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    return metrics, False


def shuffled_minibatches(batch: Sequence[Tensor], epochs: int, num_minibatches: int) -> Iterator[tuple[Tensor, ...]]:
    """For every epoch a new order of the batch's samples, in equal parts if they divide it; each tensor (B, …)."""
    for _ in range(epochs):
        order = torch.randperm(len(batch[0]), device=batch[0].device)
        yield from zip(*(x[order].chunk(num_minibatches) for x in batch))


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} must divide --num-envs × --num-steps = {batch_size}")
    agent = PixelActorCritic(*check_pixel_spaces(args)).to(device)
    lr, clip = (torch.tensor(x, device=device) for x in (args.learning_rate, args.clip_coef))
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=not args.compile, capturable=args.compile)
    update = compiled(pixel_ppo_update, device) if args.compile else pixel_ppo_update
    run = Run(args, rank, {"agent": agent, "optimizer": optimizer})
    lr = lr.copy_(optimizer.param_groups[0]["lr"])  # a checkpoint brought its own
    optimizer.param_groups[0]["lr"] = lr
    envs = make_pixel_envs(args, args.num_envs)
    videos = f"videos_from_step_{run.step}" if args.resume else "videos"
    film = Film(run.dir / videos if args.capture_video and rank == 0 else None)

    obs, infos = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    lives = infos.get("lives", np.zeros(args.num_envs))
    while run.step < args.total_timesteps and not run.interrupted():
        remaining = 1 - run.step / args.total_timesteps
        lr.fill_(args.learning_rate * (remaining if args.anneal_lr else 1))
        clip.fill_(args.clip_coef * (remaining if args.anneal_clip else 1))

        # Collect T steps from every environment with the policy as it stands.
        rollout = []
        for _ in range(args.num_steps):
            images = to_device(obs, device)
            with torch.no_grad():
                logits, values = agent.logits_and_values(agent.encode(images))
            actions = agent.sample(logits)
            film.add(obs)
            obs, next_obs, rewards, terminated, truncated, infos = step_pixel_envs(envs, agent.to_env(actions))
            film.cut(terminated | truncated)
            if args.protocol == "nature":
                lives, before = infos.get("lives", lives), lives
                terminated = terminated | (lives < before)
            final_values = torch.zeros_like(values)  # of observations that a time limit ended at
            if truncated.any():
                with torch.no_grad():
                    _, final_values = agent.logits_and_values(agent.encode(to_device(next_obs, device)))
            rewards = np.sign(rewards) if args.clip_rewards else rewards
            outcome = torch.as_tensor(np.stack([rewards, terminated, truncated]), dtype=torch.float32).to(device)
            rollout.append((images, actions, logits, values, final_values, outcome))
            run.step += args.num_envs * world_size
            run.log_episodes(infos)

        # Estimate advantages and returns; everything is (T, N).
        observations, actions, logits, values, final_values, outcomes = map(torch.stack, zip(*rollout))
        rewards, terminated, truncated = outcomes.unbind(1)
        terminated, truncated = terminated.bool(), truncated.bool()
        with torch.no_grad():
            log_probs, _ = categorical_log_prob_and_entropy(logits, actions)
            _, last_values = agent.logits_and_values(agent.encode(to_device(obs, device)))
        next_values = torch.cat([values[1:], last_values.unsqueeze(0)])
        next_values = torch.where(truncated, final_values, next_values)
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update: several epochs of shuffled minibatches.
        batch = [x.flatten(0, 1) for x in (observations, actions, log_probs, values, advantages, returns)]
        batch[0] = batch[0].contiguous(memory_format=torch.channels_last)  # once, not in every minibatch
        metrics = []
        for minibatch in shuffled_minibatches(batch, args.update_epochs, args.num_minibatches):
            minibatch_metrics, kl_passed = update(agent, optimizer, PixelBatch(*minibatch), clip, args)
            metrics.append(minibatch_metrics.clone())  # CUDA graphs reuse the memory of their outputs
            if kl_passed:
                break

        # Log.
        losses = dict(zip(METRICS, torch.stack(metrics).mean(0).tolist()))
        losses["values"] = values.mean().item()
        losses["explained_variance"] = explained_variance(values, returns).item()
        run.log(losses, learning_rate=lr.item())
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(agent)


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


def average_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each over the processes of torchrun, in one message."""
    flat = average(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


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
