"""PPO from pixels, on Atari (Schulman et al. 2017, arXiv 1707.06347; network: Mnih et al. 2015, "Nature CNN").

The algorithm is that of ppo.py,

    L(θ) = −E[min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)] + c_v E[(V(s_t) − R̂_t)²] − c_e E[H(π_θ(·|s_t))]

with one convolutional network that ends in both the policy and the value. Details that matter, and why:
- ale_py's own C++ environments: a step is 4 frames, the last two of them maximised (sprites flicker), grey, 84 × 84;
  an observation is the newest 4 of such images. A step is an agent's step: 1 M steps are 4 M frames.
- Protocol `machado` (2018, arXiv 1709.06009): the emulator repeats the last action with probability 0.25. `nature`
  (Mnih et al. 2015): up to 30 frames without action, then FIRE, begin a game; learning takes a lost life for its end.
- Learning sees the rewards' signs, so that one step size does for all games; logged and evaluated are full scores.
- Log-probabilities and values are those of acting; a game that a time limit ends is valued at its final observation.
- Orthogonal initialisation, gain √2, 0.01 for the policy's layer and 1 for the value's; Adam's ε is 1e-5.
- Stable-Baselines3 (SB3) makes the same update in PPO with CnnPolicy (tests/test_ppo_atari.py). It reads its schedules
  after a rollout, here they are read before it.

    python algos/ppo_atari.py --torch-threads 4              # ALE/Pong-v5
    python algos/ppo_atari.py --env-id ALE/Breakout-v5 --protocol nature
    python algos/ppo_atari.py --env-id My/Pixels-v0          # any environment with uint8 images (C, H, W)
    torchrun --nproc-per-node 2 algos/ppo_atari.py           # data parallel: each process has its own environments
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_type_hints

import ale_py  # noqa: F401  (gymnasium knows its environments from here on)
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.save_video import save_video
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
    total_timesteps: Count = 10_000_000  # environment steps of 4 frames, over all environments and processes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the network lives; auto takes CUDA when there is one
    torch_threads: Count = 2  # CPU threads for PyTorch; on the CPU as many as there are cores is fastest
    compile: bool = False  # compile loss and gradient with torch.compile (CUDA graphs on a GPU)
    output_dir: str = "runs"  # folder that run directories are made in
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 100_000  # environment steps between checkpoints
    eval_episodes: Count = 10  # games of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film games 0, 1, 8, 27, 64 … of the first environment, as the agent sees them

    # environment
    env_id: str = "ALE/Pong-v5"  # one of ale_py's, or another environment whose observations are uint8 images (C, H, W)
    num_envs: Count = 8  # parallel environments N (per process)
    protocol: Literal["machado", "nature"] = "machado"  # sticky actions; or random starts, a lost life a termination
    full_action_space: bool = False  # all 18 actions of the console, as Machado et al., not just those with an effect
    clip_rewards: bool = True  # learn from the rewards' signs

    # algorithm
    num_steps: Count = 128  # steps T per environment and rollout
    num_minibatches: Count = 4  # minibatches per epoch, of N·T / this many steps each (per process)
    update_epochs: Count = 4  # passes over each rollout
    learning_rate: Positive = 2.5e-4  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate linearly, rollout by rollout, to 0 at --total-timesteps
    gamma: Fraction = 0.99  # discount γ
    gae_lambda: Fraction = 0.95  # λ of generalised advantage estimation
    clip_coef: Positive = 0.1  # clipping range ε of the probability ratio
    anneal_clip: bool = False  # lower the clipping range linearly to 0
    clip_value: Positive | None = None  # keep V within this distance of V_old in the value loss; None: off
    normalize_advantages: bool = True  # normalise advantages per minibatch (and process)
    ent_coef: NotNegative = 0.01  # weight c_e of the entropy bonus
    vf_coef: NotNegative = 0.5  # weight c_v of the value loss, a mean of squares without ½
    max_grad_norm: Positive = 0.5  # bound on the gradient's global norm
    target_kl: Positive | None = None  # end the update once the approximate KL passes 1.5 times this; None: off


RECOMMENDED = {"ALE/Pong-v5": dict(total_timesteps=3_000_000)}  # by environment id; an explicit flag wins


# Environments and network -----------------------------------------------------------------------------------


class PixelEnvs:
    """N environments with images, under --protocol; where a game ends, the next one begins within the same step.

    Observations are stacks (N, C, H, W) of bytes, the newest image last; rewards are the game's own, and returns its
    scores. Under nature's protocol a lost life counts as terminated, but the game goes on: `ended` (N,) tells its end.
    """

    def __init__(self, args: Args, num_envs: int, max_episode_steps: int | None = None):
        self.num_envs, self.dtype, self.nature, self.video = num_envs, np.uint8, args.protocol == "nature", {}
        atari, same_step = args.env_id.startswith("ALE/"), {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        if atari:  # ale_py's own, stepped in C++ threads, up to 108 000 frames a game
            options = dict(repeat_action_probability=0.0 if self.nature else 0.25, noop_max=30 if self.nature else 0)
            options |= dict(use_fire_reset=self.nature, full_action_space=args.full_action_space, reward_clipping=False)
            options |= same_step | {"max_num_frames_per_episode": 4 * (max_episode_steps or 27_000)}
        else:
            options = dict(max_episode_steps=max_episode_steps, vectorization_mode="sync", vector_kwargs=same_step)
        try:
            self.envs = gym.make_vec(args.env_id, num_envs, **options)
        except (gym.error.Error, AssertionError, ImportError, TypeError) as error:  # TypeError: it needs arguments
            fail(f"--env-id {args.env_id}: {error} (kwargs go into gym.register)")
        self.close, self.time_limit = self.envs.close, 27_000 if atari else self.envs.spec.max_episode_steps
        self.observation_space = space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        images = space.dtype == np.uint8 and len(space.shape or ()) == 3 and min(space.shape[1:]) >= 36
        if not (images and isinstance(self.action_space, Discrete)):
            needs = "uint8 images (C, H, W) of at least 36 × 36 and Discrete actions; ppo.py and dqn.py take vectors"
            fail(f"{args.env_id} has {space}, {self.action_space}; {ALGO}.py needs {needs}; Atari's are ALE/Pong-v5 …")

    def film(self, folder: Path, name: str) -> None:
        """Films games 0, 1, 8, 27, 64 … of the first environment, as the agent sees them, 1000 images at most."""
        self.video = dict(frames=[], video_folder=str(folder), name_prefix=name, episode_index=0, fps=15)

    def reset(self, seed: int) -> np.ndarray:
        """First observations (N, C, H, W); environment i is seeded with seed + i."""
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        obs, infos = self.envs.reset(seed=seed)
        self.lives = infos.get("lives", np.zeros(self.num_envs))
        return obs

    def step(self, actions: Tensor) -> tuple[np.ndarray, ...]:
        """Observations to act on, those reached (others where a game ended), rewards, terminated, truncated: (N, …)."""
        obs, rewards, terminated, truncated, infos = self.envs.step(actions.numpy(force=True))
        self.ended, self.returns, self.lengths = terminated | truncated, self.returns + rewards, self.lengths + 1
        self.episodes = [(i, float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(self.ended)]
        reached = obs.copy() if self.episodes else obs
        for i, *_ in self.episodes:
            reached[i], self.returns[i], self.lengths[i] = infos["final_obs"][i], 0, 0
        lives, self.lives = self.lives, infos.get("lives", self.lives)
        terminated = terminated | (self.nature & (self.lives < lives))
        if self.video and len(self.video["frames"]) < 1000:
            self.video["frames"].append(np.repeat(reached[0, -1, :, :, None], 3, axis=-1))
        if self.video and self.ended[0]:
            save_video(**self.video)  # of those games alone
            self.video |= dict(frames=[], episode_index=self.video["episode_index"] + 1)
        return obs, reached, finite("reward", np.asarray(rewards, np.float32)), terminated, truncated


def orthogonal(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """The layer with orthogonal weights of that gain and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class PixelActorCritic(nn.Module):
    """Policy π(a|s) and value V(s) of byte images (Mnih et al. 2015, "Model architecture"); `forward` acts greedily."""

    def __init__(self, observation_space: Box, action_space: Discrete):
        super().__init__()
        self.first_action, channels = int(action_space.start), observation_space.shape[0]
        convolutions = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
        layers = [x for layer in convolutions for x in (orthogonal(layer), nn.ReLU(inplace=True))] + [nn.Flatten()]
        features = nn.Sequential(*layers)(torch.zeros(1, *observation_space.shape)).shape[1]
        self.trunk = nn.Sequential(*layers, orthogonal(nn.Linear(features, 512)), nn.ReLU(inplace=True))
        self.actor = orthogonal(nn.Linear(512, int(action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(512, 1), gain=1.0)

    def logits_and_values(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's logits (B, A) and V(s), (B,), of images (B, C, H, W)."""
        features = self.trunk(obs.to(torch.float32, memory_format=torch.channels_last).div_(255))
        return self.actor(features), self.critic(features).squeeze(-1)

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely actions (B,), as the environment counts them."""
        return self.first_action + self.logits_and_values(obs)[0].argmax(-1)


# The maths --------------------------------------------------------------------------------------------------


def categorical_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of softmax(logits); logits (…, A), actions (…,)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


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


# A rollout, or a minibatch of it, first dimension B; observations are uint8.
PixelBatch = namedtuple("PixelBatch", "observations actions log_probs values advantages returns")


def pixel_ppo_loss(agent: nn.Module, batch: PixelBatch, clip: Tensor | float, args: Args) -> tuple[Tensor, dict]:
    """The loss L(θ) of a minibatch (arXiv 1707.06347, eq. 7 and 9), and what to log of it."""
    logits, values = agent.logits_and_values(batch.observations)
    log_probs, entropies = categorical_log_prob_and_entropy(logits, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio, advantages = log_ratio.exp(), batch.advantages
    if args.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    if args.clip_value is not None:
        values = batch.values + (values - batch.values).clamp(-args.clip_value, args.clip_value)
    value_loss, entropy = F.mse_loss(values, batch.returns), entropies.mean()
    metrics = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy)
    metrics["approx_kl"] = (ratio - 1 - log_ratio).mean()  # of π_old to π_θ in nats, unbiased (Schulman 2020, "k3")
    metrics["clipfrac"] = ((ratio - 1).abs() > clip).float().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {name: x.detach() for name, x in metrics.items()}


def pixel_ppo_gradient(agent: nn.Module, batch: PixelBatch, clip: Tensor | float, args: Args) -> dict[str, Tensor]:
    """Leaves ∇L(θ), of norm --max-grad-norm at most, in the parameters' .grad; with --compile this is one graph."""
    loss, metrics = pixel_ppo_loss(agent, batch, clip, args)
    loss.backward()
    if dist.is_initialized():  # by torchrun: take the mean over the processes
        for gradient in [p.grad for p in agent.parameters() if p.grad is not None]:
            gradient.copy_(gathered(gradient.unsqueeze(0)).mean(0))
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return metrics


def shuffled_minibatches(batch: tuple, epochs: int, num_minibatches: int) -> Iterator[tuple]:
    """For every epoch a new order of the samples of a namedtuple of tensors (B, …), in equal parts if possible."""
    for _ in range(epochs):
        order = torch.randperm(len(batch[0]), device=batch[0].device)
        yield from map(type(batch), *(x[order].chunk(num_minibatches) for x in batch))


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, the backward pass in the function included; on CUDA as CUDA graphs, whose results are copied."""
    graphs = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
    return lambda *inputs: {name: x.clone() for name, x in graphs(*inputs).items()}


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with ParallelRun(args) as run:
        envs = PixelEnvs(args, args.num_envs)
        if (steps := args.num_envs * args.num_steps) % args.num_minibatches:
            fail(f"--num-minibatches {args.num_minibatches} must divide --num-envs × --num-steps = {steps}")
        agent = PixelActorCritic(envs.observation_space, envs.action_space).to(run.device)
        optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        gradient_of = compiled(pixel_ppo_gradient, run.device) if args.compile else pixel_ppo_gradient
        act = torch.no_grad()(agent.logits_and_values)
        clip = torch.tensor(args.clip_coef, device=run.device)  # a number would be a constant of the compiled gradient
        run.start(envs, agent=agent, optimizer=optimizer)  # all that a checkpoint holds

        obs = envs.reset(args.seed + run.step + run.rank * args.num_envs)
        while run.goes_on():
            remaining = 1 - run.step / args.total_timesteps
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (remaining if args.anneal_lr else 1)
                group["lr"] = float(np.float32(group["lr"]))  # as a float32 tensor, which it was in the runs measured
            clip.fill_(args.clip_coef * (remaining if args.anneal_clip else 1))

            # Collect T steps from every environment with the policy as it stands.
            rollout, outcomes = [], []
            for _ in range(args.num_steps):
                images = torch.as_tensor(obs, device=run.device)
                logits, values = act(images)
                actions = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)  # Gumbel-max: ~ softmax
                obs, next_obs, rewards, terminated, truncated = envs.step(agent.first_action + actions)
                final_values = torch.zeros_like(values)  # of observations that a time limit ended at
                if truncated.any():
                    _, final_values = act(torch.as_tensor(next_obs, device=run.device))
                rollout.append((images, actions, logits, values, final_values))
                outcomes.append((np.sign(rewards) if args.clip_rewards else rewards, terminated, truncated))
                run.advance(envs)
            observations, actions, logits, values, final_values = map(torch.stack, zip(*rollout))
            rewards, terminated, truncated = (torch.as_tensor(np.array(x), device=run.device) for x in zip(*outcomes))

            # Estimate advantages and returns; everything is (T, N).
            log_probs, _ = categorical_log_prob_and_entropy(logits, actions)
            _, last_values = act(torch.as_tensor(obs, device=run.device))
            next_values = torch.where(truncated, final_values, torch.cat([values[1:], last_values.unsqueeze(0)]))
            advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
            returns = advantages + values

            # Update: several epochs of shuffled minibatches; row t·N + n is step t of environment n.
            metrics = []
            observations = observations.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # once for them all
            others = actions, log_probs, values, advantages, returns
            batch = PixelBatch(observations, *(x.flatten(0, 1) for x in others))
            for minibatch in shuffled_minibatches(batch, args.update_epochs, args.num_minibatches):
                optimizer.zero_grad()
                metrics.append(gradient_of(agent, minibatch, clip, args))
                approx_kl = metrics[-1]["approx_kl"].unsqueeze(0)
                if args.target_kl is not None and gathered(approx_kl).mean() > 1.5 * args.target_kl:
                    break
                optimizer.step()

            explained = 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)
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
