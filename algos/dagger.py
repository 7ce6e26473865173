"""DAgger: imitation from labels in the learner's own states (Ross, Gordon and Bagnell 2011, arXiv 1011.0686).

In iteration i = 1, 2, … (algorithm 3.1)

    act with        π_i = β_i π* + (1 − β_i) π̂_i     in every step: the expert π* with probability β_i, else the learner
    label           D ← D ∪ {(s, π*(s))}             for every state s that was visited, whoever acted
    learn           π̂_{i+1} = argmin_π Σ_{(s, a) ∈ D} ℓ(π(s), a)

The learner sees what its mistakes lead to, and what the expert would do there: an error of ε per step costs it of the
order of ε T in T steps, where cloning (bc.py) may pay ε T². It needs an expert that can be asked at any time.
- β_i = d^(i−1) with d = --beta-decay. For d = 0, the paper's parameter-free choice, the expert acts in the first
  iteration, which is behavioural cloning, and the learner alone from the second on.
- Data are aggregated, never thrown away: learning from the last iteration alone can go round in circles.
- Where a mistake ends the episode, an early learner lives, and spends its labels, in the few steps before its falls:
  on Hopper cloning needs fewer labels; on HalfCheetah, whose episodes go on, DAgger needs fewer (benchmarks/README.md).
- Labels cost: charts/labels counts them, one for every environment step.
- The loss ℓ is the cross-entropy for Discrete actions, and the square for a Box, whose bounds become [−1, 1].
- The last learner is exported and evaluated; the paper ends with the one that does best on validation.

--expert takes your own policy.pt2, as PyTorch may execute what it holds, or a model of Stable-Baselines3 (.zip), whose
pickles stay closed. Without it Stable-Baselines3 trains one, kept in {output-dir}/experts for runs that ask the same.

    python algos/dagger.py                                        # CartPole-v1; trains an expert first
    python algos/dagger.py --env-id HalfCheetah-v5 --expert runs/HalfCheetah-v5__sac__1__…/policy.pt2
    python algos/dagger.py --beta-decay 0.7 --steps-per-iteration 500
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
    total_timesteps: Count = 10_000  # environment steps, each of which costs a label
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where policy and data live; auto prefers CUDA
    torch_threads: Count = 1  # CPU threads for PyTorch; one is fastest for networks this small
    compile: bool = False  # compile loss and gradient with torch.compile: pays in runs of several minutes
    output_dir: str = "runs"  # folder that run directories are made in, and experts/
    resume: str | None = None  # run directory to go on in, with its own flags; --total-timesteps alone may be changed
    checkpoint_every: Count = 50_000  # environment steps between checkpoints, which hold the data too
    eval_episodes: Count = 10  # episodes of the final evaluation, with the deterministic policy
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on, of the first environment

    # environment
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    num_envs: Count = 1  # parallel environments N

    # expert
    expert: str | None = None  # your own policy.pt2, as it may hold code, or a Stable-Baselines3 .zip; None trains one
    expert_timesteps: Count = 100_000  # environment steps that an expert is trained for

    # algorithm
    steps_per_iteration: Count = 1_000  # environment steps of an iteration, over all environments
    beta_decay: Fraction = 0.0  # d in β_i = d^(i−1), the probability that the expert acts in a step of iteration i
    epochs: Count = 20  # times to go through all data in an iteration
    batch_size: Count = 128  # states per gradient step
    learning_rate: Positive = 1e-3  # Adam's step size
    hidden_sizes: tuple[Count, ...] = (64, 64)  # ReLU layers of the policy


MUJOCO = dict(total_timesteps=20_000, epochs=100, batch_size=256, hidden_sizes=(256, 256))
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


class Learner(nn.Module):
    """π̂(s): logits of Discrete actions, or an action in [−1, 1]^A. `forward` is the policy, for the environment.

    Observations are (…, D) of a Box, (…,) int64 of a Discrete space, and standardised within.
    """

    def __init__(self, observation_space, action_space, hidden_sizes):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.network = relu_mlp([inputs, *hidden_sizes, outputs])
        if not self.discrete:
            self.register_buffer("bounds", torch.as_tensor(np.stack([action_space.low, action_space.high])))

    @torch.no_grad()
    def standardise(self, obs: Tensor) -> None:
        """Takes over the mean and deviation of observations (B, …)."""
        for old, new in zip((self.mean, self.std), () if self.one_hot else moments(obs.float())):
            old.copy_(new)

    def outputs(self, obs: Tensor) -> Tensor:
        """Logits, or actions in [−1, 1] (…, A)."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        outputs = self.network((obs.float() - self.mean) / self.std)
        return outputs if self.discrete else outputs.tanh()

    def forward(self, obs: Tensor) -> Tensor:
        """The likeliest action, or the action."""
        outputs = self.outputs(obs)
        if self.discrete:
            return outputs.argmax(-1) + int(self.action_space.start)
        low, high = self.bounds
        return (low + (outputs + 1) / 2 * (high - low)).clamp(low, high)


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


def dagger_gradient(learner: Learner, obs: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """Leaves ∇ℓ on states (B, …) and the expert's actions there (B, …) in the parameters' .grad."""
    outputs = learner.outputs(obs)
    if learner.discrete:
        loss = F.cross_entropy(outputs, actions - int(learner.action_space.start))
    else:
        low, high = learner.bounds
        loss = F.mse_loss(outputs, (2 * (actions - low) / (high - low) - 1).float())
    loss.backward()
    return {"imitation_loss": loss.detach()}


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


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    with Run(args) as run:
        envs = Envs(args, args.num_envs, (Discrete, Box))
        space, data = envs.action_space, LabelledStates()
        if isinstance(space, Box) and not (space.high.astype(np.float64) - space.low < np.finfo(np.float32).max).all():
            fail(f"{args.env_id} has the actions {space}, unbounded or too wide to be scaled to; bc.py takes them")
        expert = find_expert(args, envs, run)
        learner = Learner(envs.observation_space, space, args.hidden_sizes).to(run.device)
        optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, fused=True)
        gradient_of = torch.compile(dagger_gradient) if args.compile else dagger_gradient
        iteration_steps = -(-args.steps_per_iteration // args.num_envs) * args.num_envs
        run.start(envs, learner=learner, optimizer=optimizer, data=data)  # all that a checkpoint holds

        obs = envs.reset(args.seed + run.step)
        while run.goes_on():
            # Act with a mixture of expert and learner; the expert labels every state.
            beta, disagreements = args.beta_decay ** math.ceil(run.step / iteration_steps), []
            end = min(run.step + iteration_steps, args.total_timesteps)
            learner.eval()
            while run.step < end:
                labels = expert(obs)
                with torch.no_grad():
                    own = learner(torch.as_tensor(obs, device=run.device)).numpy(force=True)
                by_expert = (torch.rand(args.num_envs) < beta).numpy().reshape(-1, *[1] * (own.ndim - 1))
                disagreements.append(np.abs(own - labels).mean() if space.shape else (own != labels).mean())
                data.append((torch.as_tensor(obs), torch.as_tensor(labels)))
                obs, *_ = envs.step(torch.as_tensor(np.where(by_expert, labels, own)))
                run.advance(envs)

            # Learn from everything so far.
            states, labels = (x.to(run.device) for x in data.state_dict().values())
            learner.standardise(states)
            learner.train()
            for _ in range(args.epochs):
                metrics = []
                for rows in torch.randperm(len(states), device=run.device).split(args.batch_size):
                    optimizer.zero_grad()
                    metrics.append(gradient_of(learner, states[rows], labels[rows]))
                    optimizer.step()

            metrics.append({"disagreement": torch.tensor(np.mean(disagreements))})
            run.log(metrics, labels=run.step, beta=beta)

        if not run.stopped:
            limit = envs.time_limit or 10 * run.longest_episode or 1000  # as of the learner
            player = nn.PReLU()  # a module for `evaluate`, which plays where its parameter is: on the CPU
            player.forward = lambda obs: torch.as_tensor(expert(obs.numpy()))
            returns = evaluate(player, args, max_episode_steps=limit)
            tqdm.write(f"the expert: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        return run.finish(learner)


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
