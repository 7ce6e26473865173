"""TD(λ): the value of a given policy, learned from its episodes; from TD(0) to Monte Carlo, by table or network.

After every episode V_φ moves towards the λ-returns that a copy of it, φ⁻, the target network, makes of the episode,

    G_t = r_t + γ ((1 − λ) V_φ⁻(s_{t+1}) + λ G_{t+1})            no V where s_{t+1} is terminal
    L(φ) = ½ Σ_t (V_φ(s_t) − G_t)²

which is the off-line λ-return algorithm (Sutton & Barto 2018, section 12.1; Sutton 1988), the forward view of TD(λ):
λ = 0 is TD(0), λ = 1 regression on whole returns, TD(1). `--q` has Q(s_t, a_t), with the actions that the policy took,
in place of V: SARSA(λ). Details that matter, and why:
- λ trades bias for variance: TD(0) believes its own estimates, which are wrong at first, and Monte Carlo believes one
  noisy return at a time. Between them the error is least (tests and benchmarks draw it).
- `--target-frequency` K gradient steps go by before φ⁻ becomes φ. Many of them are close to dynamic programming, one is
  temporal difference learning; with λ = 1 K is without effect, as V_φ⁻ does not enter.
- A time limit is not a termination: the last state of an episode that was cut has a value.
- States are the policy's own; off them a linear V can diverge (Tsitsiklis & Van Roy 1997; tests/test_td_lambda.py).

The 19-state walk and the walk on [−3, 3] of the course are environments of this file.

    python algos/td_lambda.py                                    # RandomWalk19-v0, with a table
    python algos/td_lambda.py --env-id ContinuousWalk-v0         # with a network
    python algos/td_lambda.py --env-id CartPole-v1 --policy runs/…/policy.pt2 --hidden-sizes 64 64 --optimizer Adam
"""

import copy
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from contextlib import suppress
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
    env_id: str = "RandomWalk19-v0"  # gymnasium environment; its recommended settings, if any, become the defaults
    seed: Seed = 1  # of everything random
    total_timesteps: Count = 100_000  # environment steps; the episode that passes them is the last
    policy: str = "uniform"  # the policy that is evaluated: uniform, or a policy.pt2 of any script here
    q: bool = False  # learn Q(s, a), by SARSA(λ), in place of V(s)
    trace_decay: Fraction = 0.8  # λ of the λ-returns; 0: TD(0), 1: Monte Carlo
    gamma: Fraction = 0.99  # discount γ
    optimizer: Literal["SGD", "Adam"] = "SGD"  # SGD is the textbook's; Adam for networks
    learning_rate: Positive = 0.1  # step size α of the optimizer
    target_frequency: Count = 1  # gradient steps K, one an episode, between updates of the target network
    hidden_sizes: tuple[Count, ...] = ()  # ReLU layers; none: linear, which for Discrete observations is a table
    eval_episodes: Count = 100  # episodes of the final evaluation of the policy, to compare
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … of the evaluation on


RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "RandomWalk19-v0": dict(gamma=1.0, learning_rate=0.02),
    "ContinuousWalk-v0": dict(gamma=1.0, optimizer="Adam", learning_rate=1e-3, hidden_sizes=(64, 64), trace_decay=0.9),
}


# Two walks --------------------------------------------------------------------------------------------------


class RandomWalk(gym.Env):
    """Nineteen states in a row, from the middle on; −1 beyond the left end, 1 beyond the right (Sutton & Barto 7.1)."""

    observation_space, action_space = Discrete(19), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 9
        return 9, {}

    def step(self, action):
        self.state += 2 * int(action) - 1
        ended = not 0 <= self.state < 19
        return min(max(self.state, 0), 18), float(np.sign(self.state - 9)) if ended else 0.0, ended, False, {}


class ContinuousWalk(gym.Env):
    """A walk on [−3, 3] from 0: left or right by N(1, ¼²), at −1 a step, until it is outside."""

    observation_space, action_space = Box(-np.inf, np.inf, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(1, np.float32)
        return self.position.copy(), {}

    def step(self, action):
        self.position += (2 * int(action) - 1) * self.np_random.normal(1, 0.25)
        return self.position.copy(), -1.0, bool(abs(self.position[0]) > 3), False, {}


for name, walk in {"RandomWalk19-v0": RandomWalk, "ContinuousWalk-v0": ContinuousWalk}.items():
    if name not in gym.registry:
        gym.register(name, walk)


# Networks ---------------------------------------------------------------------------------------------------


class ValueFunction(nn.Module):
    """V(s), or with `q` Q(s, a): linear, or ReLU layers. Linear of one-hot states and pairs, it is a table of zeros.

    Observations and actions are (B,) int64 of a Discrete space, which become one-hot, else (B, …).
    """

    def __init__(self, observation_space, action_space, hidden_sizes: tuple[int, ...], q: bool):
        super().__init__()
        self.spaces = [observation_space] + [action_space] * q
        self.pairs = q and all(isinstance(space, Discrete) for space in self.spaces)
        sizes = [gym.spaces.flatdim(space) for space in self.spaces]
        sizes = [math.prod(sizes) if self.pairs else sum(sizes), *hidden_sizes, 1]
        layers = [nn.Linear(*x, bias=bool(hidden_sizes)) for x in itertools.pairwise(sizes)]
        self.network = nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU())][:-1])
        if not hidden_sizes:
            nn.init.zeros_(layers[0].weight)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Values (B,)."""
        parts = [
            F.one_hot(x - int(space.start), int(space.n)) if isinstance(space, Discrete) else x.flatten(1)
            for space, x in zip(self.spaces, (obs, actions))
        ]
        inputs = parts[0].unsqueeze(2) * parts[1].unsqueeze(1) if self.pairs else torch.cat(parts, 1)
        return self.network(inputs.flatten(1).float()).squeeze(1)


# The maths --------------------------------------------------------------------------------------------------


def lambda_returns(rewards: Tensor, next_values: Tensor, gamma: float, trace_decay: float) -> Tensor:
    """G_t = r_t + γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}) of one episode, (T,) (Sutton & Barto 2018, eq. 12.2 and 12.3).

    rewards r_t and next_values V(s_{t+1}) are (T,); the last of these, 0 if s_T is terminal, is G_T, too.
    """
    returns, following = torch.empty_like(rewards), next_values[-1]
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * torch.lerp(next_values[t], following, trace_decay)
    return returns


# T steps; observations and actions have one entry more, at the end, where the policy would have gone on.
Episode = namedtuple("Episode", "observations actions rewards terminated")


def td_loss(value: nn.Module, target: nn.Module, episode: Episode, args: Args) -> Tensor:
    """L(φ) = ½ Σ_t (V_φ(s_t) − G_t)², G_t with the target network's values."""
    observations, actions, rewards, terminated = episode
    with torch.no_grad():
        next_values = target(observations[1:], actions[1:])
        next_values[-1] *= not terminated
        returns = lambda_returns(rewards, next_values, args.gamma, args.trace_decay)
    return 0.5 * F.mse_loss(value(observations[:-1], actions[:-1]), returns, reduction="sum")


# Training ---------------------------------------------------------------------------------------------------


def play(env: gym.Env, act, seed: int | None = None) -> Episode:
    """An episode of the policy `act`, from an observation to an action."""
    obs, _ = env.reset(seed=seed)
    observations, actions, rewards, terminated, truncated = [obs], [act(obs)], [], False, False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        actions.append(act(obs))
        rewards.append(float(reward))
    if not np.isfinite(rewards).all():
        fail("a reward is not finite", code=1)
    return Episode(*(torch.as_tensor(np.array(x)) for x in (observations, actions)), torch.tensor(rewards), terminated)


def train(args: Args) -> dict:
    """Returns {"run_dir": Path, "value": the ValueFunction, "returns": (eval_episodes,) of the policy}."""
    check(args)
    env = make_env(args)
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: episodes are cut after 1000 steps")
        env = gym.wrappers.TimeLimit(env, 1000)
    act = read_policy(args.policy, env)
    run_dir, writer = open_run(args)
    torch.manual_seed(args.seed)
    env.action_space.seed(args.seed)
    value = ValueFunction(env.observation_space, env.action_space, args.hidden_sizes, args.q)
    target = copy.deepcopy(value).requires_grad_(False)
    optimizer = getattr(torch.optim, args.optimizer)(value.parameters(), args.learning_rate)
    step, number, start, monitor = 0, 0, time.time(), open(run_dir / "monitor.csv", "w", newline="")
    with monitor, tqdm(total=args.total_timesteps, unit="step", desc=args.env_id) as bar:
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        while step < args.total_timesteps:
            number, episode = number + 1, play(env, act, None if number else args.seed)
            loss = td_loss(value, target, episode, args)
            if not loss.isfinite():
                fail(f"the loss of episode {number} is not finite: take a lower --learning-rate", code=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % args.target_frequency == 0:
                target.load_state_dict(value.state_dict())
            step += (length := len(episode.rewards))
            monitor.write(f"{episode.rewards.sum():.6f},{length},{time.time() - start:.6f}\n")
            writer.add_scalar("charts/episodic_return", episode.rewards.sum(), step)
            writer.add_scalar("charts/episodic_length", length, step)
            writer.add_scalar("charts/SPS", step / (time.time() - start), step)
            writer.add_scalar("losses/value_loss", loss / length, step)
            bar.update(length)
    if isinstance(env.observation_space, Discrete) and not args.q:
        states = torch.arange(int(env.observation_space.n)) + int(env.observation_space.start)
        np.savez(run_dir / "solution.npz", V=value(states, states).detach().numpy())
    torch.save(value.state_dict(), run_dir / "value.pt")
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), video_length=1000)
    episodes = [play(env, act, args.seed + 1_000_000 + i) for i in range(args.eval_episodes)]
    env.close()
    returns = np.array([x.rewards.sum().item() for x in episodes])
    discounted = np.mean([lambda_returns(x.rewards, 0 * x.rewards, args.gamma, 1.0)[0] for x in episodes])
    first = np.mean([value(x.observations[:1], x.actions[:1]).item() for x in episodes])
    writer.add_scalar("eval/episodic_return", returns.mean(), step)
    writer.close()
    print(f"value of the episodes' first states: {first:.2f}, their discounted returns: {discounted:.2f}")
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}", flush=True)
    return {"run_dir": run_dir, "value": value, "returns": returns}


def read_policy(name: str, env: gym.Env):
    """A function from an observation to an action: the uniform policy, or that of a policy.pt2."""
    if name == "uniform":
        return lambda obs: env.action_space.sample()
    try:
        policy = torch.export.load(name).module()
        policy(torch.as_tensor(np.array([env.observation_space.sample()])))
    except Exception as error:  # whatever is wrong with the file or its inputs, it is no policy of this environment
        fail(f"--policy {name}: no policy.pt2 for {env.spec.id} ({error!r:.200})")
    return torch.no_grad()(lambda obs: policy(torch.as_tensor(np.array([obs])))[0].numpy())


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def check(args: Args) -> None:
    """Stops where a value is outside its range."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        values = value if isinstance(value := getattr(args, name), tuple) else (value,)
        for low, high, text in itertools.chain(*(getattr(x, "__metadata__", ()) for x in (hint, *get_args(hint)))):
            if not all(isinstance(x, str | None) or low <= x <= high for x in values):
                fail(f"--{name.replace('_', '-')} {value} must be {text}")


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not; what it observes becomes a vector, unless it is an index or an image."""
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {}, **kwargs)
    except (gym.error.Error, ImportError, TypeError) as error:  # a TypeError: its constructor needs arguments
        hint = "kwargs go into gym.register; ppo_atari.py and dqn_atari.py play Atari; --capture-video needs rgb_array"
        fail(f"--env-id {args.env_id}: {error} ({hint})")
    plain = isinstance(env.observation_space, Discrete) or len(env.observation_space.shape or ()) in (1, 3)
    return env if plain else gym.wrappers.FlattenObservation(env)


def open_run(args: Args) -> tuple[Path, SummaryWriter]:
    """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}[_n] with args.json, and a writer of TensorBoard's events."""
    env_id = re.sub(r"[^\w.=-]+", "-", args.env_id)  # Windows refuses colons, for instance
    path = Path(args.output_dir).expanduser() / f"{env_id}__{ALGO}__{args.seed}__{int(time.time())}"
    try:
        for name in itertools.chain([path], (f"{path}_{n}" for n in itertools.count(1))):
            with suppress(FileExistsError):
                os.makedirs(name)
                break
    except OSError as error:
        fail(f"--output-dir {args.output_dir}: {error}")
    versions = {"python": sys.version.split()[0]} | {x.__name__: x.__version__ for x in (torch, gym, np)}
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    about = {"algo": ALGO, "args": asdict(args), "versions": versions, "script_sha256": script}
    Path(name, "args.json").write_text(json.dumps(about, indent=2) + "\n")
    return Path(name), SummaryWriter(str(name))


def read_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings."""
    for stream in {sys.stdout, sys.stderr} & {sys.__stdout__, sys.__stderr__}:
        stream.reconfigure(errors="replace")  # a console that has no γ shows --help all the same
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    defaults = replace(Args(), **{"env_id": given.env_id} | RECOMMENDED.get(given.env_id, {}))
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    return tyro.cli(Args, default=defaults, args=argv, description=f"Settings taken with --env-id alone:\n\n{table}")


if __name__ == "__main__":
    train(read_args())
