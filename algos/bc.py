"""Behavioural cloning: supervised learning of a policy from an expert's actions (Pomerleau 1988, "ALVINN").

Fits a policy to what an expert π* does, in the states that the expert itself visits, by minimising

    L(θ) = −E_{o ~ d^π*}[log π_θ(π*(o) | o)]

and keeps the weights that do best on steps held out. An error of ε per step costs up to ε T² in T steps, as a mistake
leads to states that no demonstration shows (Ross and Bagnell 2010, theorem 2.1); dagger.py asks the expert there: ε T.
- Where experts do one thing or another (left or right around an obstacle), a Gaussian goes between them. `--head
  mixture` acts by the best of K Gaussians; `--head autoregressive` predicts each dimension from those before it.
- Where the expert remembers, one observation does not tell what it does: `--history K` shows the last K of them.
- `--noise` disturbs what the expert does, not the labels: they show how it recovers, then (DART, arXiv 1703.09327).
- Observations are standardised with the demonstrations' mean and deviation, which the exported policy contains.

    python algos/bc.py                                            # CartPole-v1; trains an expert first
    python algos/bc.py --env-id HalfCheetah-v5 --expert runs/HalfCheetah-v5__sac__1__…/policy.pt2
    python algos/bc.py --env-id HalfCheetah-v5 --dataset mujoco/halfcheetah/expert-v0 --head mixture
"""

import copy
import errno
import hashlib
import importlib
import inspect
import io
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
import zipfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]
NotNegative = Annotated[float, (0, sys.float_info.max, "0 or more")]


@dataclass
class Args:
    # run
    seed: Seed = 1  # of everything random; same seed, same machine and thread count: same bits on CPU
    total_timesteps: Annotated[int, (2, math.inf, "at least 2")] = 10_000  # the expert's steps to learn from
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where policy and data live; auto prefers CUDA
    torch_threads: Count = 1  # CPU threads for PyTorch; one is fastest for networks this small
    compile: bool = False  # compile loss and gradient with torch.compile: pays in runs of several minutes
    output_dir: str = "runs"  # folder that run directories are made in, and experts/ that are trained here
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 50_000  # environment steps between checkpoints, which hold the demonstrations too
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film the expert from episodes 0, 1, 8, 27, 64 … on, 1000 images each, into videos/

    # environment
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 1  # parallel environments N
    history: Count = 1  # newest observations K that the policy sees; before the K-th, an episode's first is repeated

    # demonstrations
    expert: str | None = None  # Stable-Baselines3's .zip, or a policy.pt2 that you trust (it may run code)
    dataset: str | None = None  # id of a Minari dataset to learn from instead; downloaded if missing
    num_demonstrations: Count | None = None  # episodes to learn from at most; with --num-envs 2, parts of others, too
    noise: NotNegative = 0.0  # share of random actions; in a Box, σ of Gaussian noise as a part of half its range
    expert_timesteps: Count = 100_000  # environment steps that an expert is trained for

    # algorithm
    head: Literal["gaussian", "mixture", "autoregressive"] = "gaussian"  # distribution of Box actions
    components: Count = 5  # Gaussians of --head mixture
    bins: Count = 31  # bins per dimension of --head autoregressive
    holdout: Annotated[float, (1e-6, 1 - 1e-6, "between 0 and 1")] = 0.1  # share of steps held out, the last ones
    epochs: Count = 200  # passes through the steps not held out, at most
    patience: Count = 10  # epochs without a better loss on the held-out part before it stops
    batch_size: Count = 128  # observations per gradient step
    learning_rate: Positive = 1e-3  # Adam's step size
    hidden_sizes: tuple[Count, ...] = (64, 64)  # ReLU layers of the policy


MUJOCO = dict(total_timesteps=50_000, batch_size=256, hidden_sizes=(256, 256))
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "Pendulum-v1": dict(total_timesteps=20_000, expert_timesteps=10_000),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")},
}


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; μ, σ²) of a diagonal Gaussian, summed over the last dimension, which all three share."""
    return -(0.5 * ((x - mean) / log_std.exp()).square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


class GaussianHead(nn.Module):
    """N(μ(x), σ²), one σ for all x. Every head has log_prob and mode of encoded x (B, D), for actions in [−1, 1]."""

    def __init__(self, inputs: int, action_size: int, args: Args):
        super().__init__()
        self.mode = relu_mlp([inputs, *args.hidden_sizes, action_size])
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def log_prob(self, x: Tensor, actions: Tensor) -> Tensor:
        """log π(a|x), (B,)."""
        return gaussian_log_prob(actions, self.mode(x), self.log_std)


class MixtureHead(nn.Module):
    """Σ_k w_k(x) N(μ_k(x), σ_k(x)²) with K components (Bishop 1994, "Mixture density networks")."""

    def __init__(self, inputs: int, action_size: int, args: Args):
        super().__init__()
        self.shape = 2, args.components, action_size  # of means and log deviations
        self.network = relu_mlp([inputs, *args.hidden_sizes, args.components * (1 + 2 * action_size)])

    def components(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w (B, K), μ and log σ (B, K, A)."""
        weights, gaussians = self.network(x).tensor_split([self.shape[1]], -1)
        means, log_stds = gaussians.unflatten(-1, self.shape).unbind(1)
        return weights.log_softmax(-1), means, log_stds.clamp(-5, 2)  # none may shrink to a single action

    def log_prob(self, x: Tensor, actions: Tensor) -> Tensor:
        log_weights, means, log_stds = self.components(x)
        return (log_weights + gaussian_log_prob(actions.unsqueeze(1), means, log_stds)).logsumexp(-1)

    def mode(self, x: Tensor) -> Tensor:
        """The mean of the component that is highest at its mean (B, A)."""
        log_weights, means, log_stds = self.components(x)
        best = (log_weights - log_stds.sum(-1)).argmax(-1)
        return means.gather(1, best[:, None, None].expand(-1, 1, self.shape[2])).squeeze(1)


class AutoregressiveHead(nn.Module):
    """Π_i π(a_i | a_1 … a_{i−1}, x), each over equal bins of [−1, 1]: any joint distribution, up to the bins' width."""

    def __init__(self, inputs: int, action_size: int, args: Args):
        super().__init__()
        self.register_buffer("which", torch.eye(action_size))  # row i: that dimension i is asked for
        self.register_buffer("centres", (2 * torch.arange(args.bins) + 1) / args.bins - 1)
        self.network = relu_mlp([inputs + 2 * action_size, *args.hidden_sizes, args.bins])

    def logits(self, x: Tensor, actions: Tensor) -> Tensor:
        """Of every dimension's bins (B, A, bins); that of dimension i sees only actions before it."""
        given = actions.unsqueeze(1) * torch.ones_like(self.which).tril(-1)
        x, which = x.unsqueeze(1).expand(-1, len(self.which), -1), self.which.expand_as(given)
        return self.network(torch.cat([x, given, which], -1))

    def log_prob(self, x: Tensor, actions: Tensor) -> Tensor:
        bins = (actions.unsqueeze(-1) - self.centres).abs().argmin(-1)
        return -F.cross_entropy(self.logits(x, self.centres[bins]).transpose(1, 2), bins, reduction="none").sum(-1)

    def mode(self, x: Tensor) -> Tensor:
        """The centre of the likeliest bin (B, A), one dimension after the other."""
        actions = x.new_zeros(x.shape[0], len(self.which))
        for _ in self.which:  # after pass i the first i are final, as each depends on those before it alone
            actions = self.centres[self.logits(x, actions).argmax(-1)]
        return actions


class ClonedPolicy(nn.Module):
    """π_θ(a|o). `forward` is its likeliest action, for the environment; o is (B, D), or (B,) of a Discrete space.

    Box actions are scaled: the space's bounds to [−1, 1] or, where it has none, three deviations about the mean.
    """

    def __init__(self, observation_space, action_space, args: Args):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        if self.discrete:
            self.logits = relu_mlp([inputs, *args.hidden_sizes, int(action_space.n)])
            return
        heads = dict(gaussian=GaussianHead, mixture=MixtureHead, autoregressive=AutoregressiveHead)
        self.head = heads[args.head](inputs, action_space.shape[0], args)
        self.register_buffer("bounds", torch.as_tensor(np.stack([action_space.low, action_space.high])))
        self.register_buffer("low", torch.tensor(action_space.low, dtype=torch.float32))  # of what is scaled: finite
        self.register_buffer("high", torch.tensor(action_space.high, dtype=torch.float32))  # after `standardise`

    def standardise(self, obs: Tensor, actions: Tensor) -> None:
        """Takes over the mean and deviation of observations (B, …), and of actions (B, A) where they have no bounds."""
        if not self.one_hot:
            self.mean, self.std = moments(obs.float())
        if not self.discrete:
            (mean, std), bounded = moments(actions.float()), self.bounds.float().diff(dim=0)[0].isfinite()
            self.low = torch.where(bounded, self.low, mean - 3 * std)
            self.high = torch.where(bounded, self.high, mean + 3 * std)

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → x (B, D): one-hot for a Discrete space, else standardised."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        return (obs.float() - self.mean) / self.std

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log π(a|o) (B,) of the environment's actions; in a Box of the scaled action: its density, or bins' mass."""
        x = self.encode(obs)
        if self.discrete:
            return -F.cross_entropy(self.logits(x), actions.long() - int(self.action_space.start), reduction="none")
        return self.head.log_prob(x, 2 * (actions.float() - self.low) / (self.high - self.low) - 1)

    def forward(self, obs: Tensor) -> Tensor:
        """The likeliest action: an index from the space's start, or numbers within its bounds."""
        x = self.encode(obs)
        if self.discrete:
            return self.logits(x).argmax(-1) + int(self.action_space.start)
        return (self.low + (self.head.mode(x) + 1) / 2 * (self.high - self.low)).clamp(*self.bounds)


# The maths --------------------------------------------------------------------------------------------------


class LabelledStates(list):
    """Batches of observations and the expert's actions there, (B, …) each."""

    def state_dict(self) -> dict:
        """All of them so far, which become one batch: for the fit, and for a checkpoint."""
        self[:] = [tuple(map(torch.cat, zip(*self)))] if self else []
        return dict(zip(("observations", "actions"), self[0])) if self else {}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        self[:] = [tuple(state.values())] if state else []


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the first dimension; a deviation of 1 for what never varied, as it may do so later."""
    mean = x.mean(0)
    std = (x - mean).square().mean(0).sqrt()
    return mean, torch.where(std < 1e-6, 1.0, std)


def bc_gradient(policy: ClonedPolicy, obs: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """Leaves ∇L(θ) on observations (B, …) and the expert's actions (B, …) in the parameters' .grad."""
    loss = -policy.log_prob(obs, actions).mean()
    loss.backward()
    return {"log_loss": loss.detach()}


def fit(policy: ClonedPolicy, optimizer, data: tuple[Tensor, Tensor], args: Args, run, gradient_of) -> list[dict]:
    """Learns from pairs (B, …) until the held-out loss stops falling, or run.stopped; keeps the best weights."""
    if len(data[0]) < 2:
        fail("of one step there is none to hold out: raise --total-timesteps")
    policy.standardise(*data)
    size = len(data[0]) - max(1, int(args.holdout * len(data[0])))
    (obs, actions), held_out = (x[:size] for x in data), [x[size:].split(4096) for x in data]
    best, best_epoch, best_weights, metrics = math.inf, 0, copy.deepcopy(policy.state_dict()), []
    for epoch in tqdm(range(args.epochs), desc="cloning", unit="epoch", leave=False, disable=None):  # on a terminal
        if run.stopped:
            break
        order, metrics = torch.randperm(size, device=obs.device), []
        for first in range(0, size, args.batch_size):  # the last batch is filled from the order's beginning
            rows = order[torch.arange(first, first + args.batch_size, device=obs.device) % size]
            optimizer.zero_grad()
            metrics.append(gradient_of(policy, obs[rows], actions[rows]))
            optimizer.step()
        policy.eval()
        with torch.no_grad():
            loss = -torch.cat([policy.log_prob(*chunk) for chunk in zip(*held_out)]).mean().item()
        policy.train()
        if loss < best:
            best, best_epoch, best_weights = loss, epoch, copy.deepcopy(policy.state_dict())
        if epoch - best_epoch >= args.patience or not math.isfinite(loss):
            break
    policy.load_state_dict(best_weights)
    return [*metrics, {"held_out_log_loss": torch.tensor(best), "epochs": torch.tensor(best_epoch + 1.0)}]


# The expert: arrays of observations (N, …) → arrays of actions (N, …) -----------------------------------------


def load_sb3(path: Path, envs) -> Callable:
    """The policy in a Stable-Baselines3 .zip, from tensors to tensors, built from its weights and JSON: no pickles."""
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("data"))
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
    module, init = (about["policy_class"].get(x, "") for x in ("__module__", "__init__"))  # "<function SACPolicy.__…"
    name = init.removeprefix("<function ").partition(".")[0]
    if not re.fullmatch(r"stable_baselines3\.\w+\.policies\.(ActorCritic|DQN|SAC|TD3)Policy", f"{module}.{name}"):
        raise ValueError(f"it is a {module}.{name}; only Stable-Baselines3's own for vectors can be played")
    if found := [*path.parent.glob("*vecnormalize*.pkl")]:
        raise ValueError(f"{found[0].name}, beside it, normalised its observations; a pickle, it is not opened here")
    settings = {key: x for key, x in about["policy_kwargs"].items() if not key.startswith((":", "optimizer_"))}
    if match := re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", settings.get("activation_fn", "")):
        settings["activation_fn"] = getattr(nn, match[1])
    settings |= {"use_sde": about["use_sde"]} if name == "ActorCriticPolicy" else {}
    spaces = envs.observation_space, envs.action_space
    policy = getattr(importlib.import_module(module), name)(*spaces, lambda _: 0.0, **settings)
    policy.load_state_dict(weights)
    return lambda obs: torch.as_tensor(policy.predict(obs.numpy(), deterministic=True)[0])


def train_expert(args: Args, path: Path, run) -> None:
    """Trains Stable-Baselines3's PPO (Discrete actions) or SAC, with seed 1 whatever the run's; writes it to `path`."""
    from stable_baselines3 import PPO, SAC
    from stable_baselines3.common.env_util import make_vec_env

    algo, num_envs, settings = SAC, 1, dict(learning_rate=1e-3)
    if isinstance(make_env(args).action_space, Discrete):
        algo, num_envs, settings = PPO, 8, dict(n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98)
        settings |= dict(learning_rate=lambda remaining: 1e-3 * remaining, clip_range=lambda remaining: 0.2 * remaining)
    model = algo("MlpPolicy", make_vec_env(lambda: make_env(args), num_envs, 1), seed=1, device="cpu", **settings)
    with tqdm(total=args.expert_timesteps, unit="step", desc=f"expert for {args.env_id}") as bar:
        model.learn(args.expert_timesteps, lambda *_: bar.update(num_envs) or not run.stopped)  # False stops it
    if run.stopped:
        raise SystemExit(130)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path.with_suffix(".tmp.zip"))
    os.replace(path.with_suffix(".tmp.zip"), path)


@torch.random.fork_rng()  # Stable-Baselines3 seeds the whole process
def find_expert(args: Args, envs, run) -> Callable:
    """The expert of --expert, or one of Stable-Baselines3: trained now, or before for the same task and steps."""
    space, spec = envs.action_space, envs.envs[0].spec
    recipe = hashlib.sha256(repr((spec, inspect.getsource(train_expert))).encode()).hexdigest()
    name = f"{spec.id.replace('/', '-')}__{args.expert_timesteps}__{recipe[:8]}.zip"
    path = Path(args.expert or Path(args.output_dir, "experts", name)).expanduser()
    known = args.expert or path.exists()
    try:
        if not known:
            train_expert(args, path, run)
        model = load_sb3(path, envs) if path.suffix == ".zip" else torch.export.load(path).module()
        act = lambda obs: model(torch.as_tensor(obs)).numpy(force=True)  # noqa: E731
        expert = (lambda obs: act(obs).clip(space.low, space.high)) if isinstance(space, Box) else act
        obs = np.stack([envs.observation_space.sample() for _ in range(2)]).astype(envs.dtype)
        if act(obs).shape != (2, *space.shape) or not all(map(space.contains, expert(obs))):
            raise ValueError(f"its actions are not {space}")
    except Exception as error:  # whatever is wrong with the file, or the space that an expert was to be trained for
        way_out = "" if args.expert else "; give an expert, or pip install stable-baselines3 to train one"
        fail(f"--expert {path} cannot be used for {args.env_id} ({type(error).__name__} {error!s:.250}){way_out}")
    tqdm.write(f"the expert: {path}{'' if known else ', trained now'}")
    return expert


def disturbed(actions: Tensor, space: gym.Space, noise: float) -> Tensor:
    """What is done instead of the expert's actions (N, …): see --noise."""
    if isinstance(space, Discrete):
        others = int(space.start) + torch.randint(int(space.n), actions.shape)
        return torch.where(torch.rand(len(actions)) < noise, others, actions)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    deviation = noise * (high / 2 - low / 2).nan_to_num(posinf=1.0)  # where there is no bound, as for [−1, 1]
    return (actions + deviation * torch.randn(actions.shape)).clamp(low, high)


def read_dataset(args: Args, envs) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """(observations (T, …), actions (T, …), return) of each episode of the Minari dataset --dataset."""
    try:
        dataset = importlib.import_module("minari").load_dataset(args.dataset, download=True)
    except Exception as error:  # its own, h5py's, or the network's
        fail(f'--dataset {args.dataset} cannot be had ({error!s:.200}); it takes pip install "minari[hdf5,hf]"')
    ours, theirs = ((x.observation_space, x.action_space) for x in (envs, dataset))
    if any(len({(type(x), x.shape, getattr(x, "n", 0)) for x in pair}) > 1 for pair in zip(ours, theirs)):
        fail(f"--dataset {args.dataset} has {theirs}, where {args.env_id} has {ours}")
    episodes = []
    for x in itertools.islice(dataset.iterate_episodes(), args.num_demonstrations):
        times = (np.arange(len(x.actions))[:, None] + np.arange(1 - args.history, 1)).clip(min=0)
        obs = x.observations[times].astype(envs.dtype)
        episodes.append((obs.reshape(len(obs), -1) if obs.ndim > 2 else obs[:, 0], x.actions, x.rewards.sum()))
    return episodes


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        envs = Envs(args, args.num_envs, (Discrete, Box))
        dataset = read_dataset(args, envs) if args.dataset else []
        expert = original = None if dataset else find_expert(args, envs, run)
        if args.history > 1:  # of all of the id from here to the run's end, evaluation's too
            if not isinstance(envs.observation_space, Box):
                fail(f"--history needs observations in a Box, and {args.env_id} has {envs.observation_space}")
            size, spec = envs.observation_space.shape[0], gym.registry[envs.envs[0].spec.id]
            expert = lambda obs: original(obs[:, -size:])  # noqa: E731  it sees the newest alone, as before
            run.callback(setattr, spec, "additional_wrappers", spec.additional_wrappers)
            stack = gym.wrappers.FrameStackObservation.wrapper_spec(stack_size=args.history, padding_type="reset")
            spec.additional_wrappers += gym.wrappers.FlattenObservation.wrapper_spec(), stack
            envs.close()
            envs = Envs(args, args.num_envs)
        policy = ClonedPolicy(envs.observation_space, envs.action_space, args).to(run.device)
        optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
        gradient_of = torch.compile(bc_gradient) if args.compile else bc_gradient
        data, counter = LabelledStates(), nn.Module()  # a module, so that a checkpoint holds it
        for name in ("episodes", "fitted_at"):
            counter.register_buffer(name, torch.zeros((), dtype=torch.int64))
        run.start(envs, policy=policy, optimizer=optimizer, demonstrations=data, counter=counter)

        # Read what the expert did, or watch it.
        obs = envs.reset(args.seed + run.step)
        while run.goes_on() and counter.episodes < (len(dataset) or args.num_demonstrations or math.inf):
            if dataset:
                seen, labels, episode_return = dataset[counter.episodes]
                progress = SimpleNamespace(num_envs=len(seen), episodes=[(0, episode_return, len(seen))])
            else:
                seen, labels, progress = obs, torch.as_tensor(expert(obs)), envs
                obs, *_ = envs.step(disturbed(labels, envs.action_space, args.noise) if args.noise else labels)
            data.append((torch.as_tensor(seen), torch.as_tensor(labels)))
            run.advance(progress)
            counter.episodes += len(progress.episodes)
            if progress.episodes:
                run.log([], demonstrations=counter.episodes.item())

        if counter.fitted_at != run.step and not run.stopped:
            run.checkpoint()  # from here a fit that is killed begins anew
            pairs = [x.to(run.device) for x in data.state_dict().values()]
            metrics = fit(policy, optimizer, pairs, args, run, gradient_of)
            if not run.stopped:
                run.log(metrics, demonstrations=counter.episodes.item())
                counter.fitted_at.fill_(run.step)
        if not run.stopped:
            limit = envs.time_limit or 10 * run.longest_episode or 1000  # as in Run.finish
            player = nn.PReLU()  # any with a parameter: `evaluate` sends observations to where that is, the CPU
            player.forward = lambda obs: torch.as_tensor(expert(obs.numpy()))
            played = [x for *_, x in dataset] or evaluate(player, args, max_episode_steps=limit)
            tqdm.write(f"the expert: {np.mean(played):.2f} ± {np.std(played):.2f} over {len(played)} episodes")
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
