"""Fitted Q-iteration: dynamic programming by regression, on data of any policy; with a table exactly what data say.

On a dataset of steps (s, a, r, s') each of K rounds computes targets with the last round's function, and fits them,

    y_i = r_i + γ max_a' Q_φ(s'_i, a')              Algorithm 9; 0 after a terminal s'_i
    φ ← argmin_φ Σ_i (Q_φ(s_i, a_i) − y_i)²          (Ernst et al. 2005; with networks: Riedmiller 2005)

`--iterate v` is fitted value iteration (Algorithm 8): y_i = max_a Σ_s' p(s' | s_i, a) (r + γ V_φ(s')), of the model
that the environment's table is; Algorithm 10 is `--collect-every`. Details that matter, and why:
- A time limit is not a termination: the last state of an episode that was cut has a value.
- A regression is run to its end, by a step size that falls to 0: maxima prefer what noise has made too high.
- Weight decay keeps Q low where no data are. Without it maxima find what the network makes up there, and late rounds
  are worse than early ones: a backup and a projection together are no contraction.

    python algos/fqi.py                                                   # CartPole-v1 from 10 000 random steps
    python algos/fqi.py --env-id FrozenLake-v1                            # a table; --iterate v: with the model
"""

import hashlib
import importlib
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
    env_id: str = "CartPole-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    seed: Seed = 1  # of everything random
    transitions: Count = 10_000  # environment steps of the uniform policy, which are the data
    dataset: str | None = None  # Minari dataset to learn from in their place; needs pip install "minari[hdf5,hf]"
    collect_every: Count | None = None  # rounds after which as many steps of the ε-greedy policy are added to the data
    epsilon: Fraction = 0.1  # ε of that
    iterations: Count = 80  # rounds K of targets and regression; the last is evaluated
    iterate: Literal["q", "v"] = "q"  # on Q(s, a), or on V(s), for which the environment needs a table
    features: Literal["network", "table"] = "network"  # what is fitted; a table is exact, of Discrete observations
    hidden_sizes: tuple[Count, ...] = (64, 64)  # ReLU layers of the network; none: linear
    gamma: Annotated[float, (0, 1 - 1e-9, "at least 0 and below 1")] = 0.95  # discount γ
    learning_rate: Positive = 1e-3  # step size of Adam at the start of a round; it falls to 0, linearly
    weight_decay: Annotated[float, (0, math.inf, "0 or more")] = 2e-3  # of all parameters: gradient of ½ ‖φ‖²
    gradient_steps: Count = 200  # of one round's regression
    batch_size: Count = 256  # transitions per gradient step
    eval_episodes: Count = 100  # episodes of the final evaluation, with the greedy policy
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … of the evaluation on


RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "FrozenLake-v1": dict(features="table", iterations=300, gamma=0.99),
}


# Networks ---------------------------------------------------------------------------------------------------


class FittedNetwork(nn.Module):
    """Q(s, ·), (B, A), or V(s), (B, 1), of observations (B, …), which the data standardise, or indices (B,)."""

    def __init__(self, space: gym.Space, outputs: int, observations: Tensor, args: Args):
        super().__init__()
        self.space, self.scale = space, 1 / (1 - args.gamma)  # the layers' own output has the rewards' range
        std, mean = torch.std_mean(observations.flatten(1).float() if isinstance(space, Box) else torch.zeros(2, 1), 0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", torch.where(std > 1e-8, std, 1.0))
        layers = [nn.Linear(*x) for x in itertools.pairwise([gym.spaces.flatdim(space), *args.hidden_sizes, outputs])]
        self.network = nn.Sequential(*[x for layer in layers for x in (layer, nn.ReLU())][:-1])

    def forward(self, obs: Tensor) -> Tensor:
        obs = F.one_hot(obs, int(self.space.n)) if isinstance(self.space, Discrete) else obs.flatten(1).float()
        return self.scale * self.network((obs - self.mean) / self.std)


class GreedyPolicy(nn.Module):
    """The environment's own observations (B, …) → its actions (B,), those that are best by Q, which has indices."""

    def __init__(self, q_function: nn.Module, first_state: int, first_action: int):
        super().__init__()
        self.q_function, self.first_state, self.first_action = q_function, first_state, first_action

    def forward(self, obs: Tensor) -> Tensor:
        return self.q_function(obs - self.first_state).argmax(1) + self.first_action


# The maths --------------------------------------------------------------------------------------------------

# Steps: observations, next_observations (N, …), actions, rewards, terminated (N,); of Discrete spaces indices from 0.
Dataset = namedtuple("Dataset", "observations actions rewards next_observations terminated")


@torch.no_grad()
def q_targets(q_function: nn.Module, data: Dataset, gamma: float) -> Tensor:
    """y (N,) = r + γ max_a' Q(s', a'), without the maximum where s' is terminal (Algorithm 9)."""
    return data.rewards + gamma * q_function(data.next_observations).amax(1).masked_fill(data.terminated, 0)


@torch.no_grad()
def model_q_values(v_function: nn.Module, table, states: int, gamma: float) -> Tensor:
    """Q (S, A) = Σ p (r + γ V(s')) of gymnasium's table: table[s][a] is a list of (p, s', r, done) (Algorithm 8)."""
    rows = [(s, a, *row) for s in range(states) for a in range(len(table[s])) for row in table[s][a]]
    s, a, p, successors, rewards, done = torch.tensor(rows, dtype=torch.float64).T
    values = p * (rewards + gamma * (1 - done) * v_function(successors.long())[:, 0])
    return torch.zeros(states, len(table[0])).double().index_put((s.long(), a.long()), values, accumulate=True)


def fit_table(table: nn.Embedding, observations: Tensor, columns: Tensor, targets: Tensor) -> None:
    """The exact projection: f(s)[column] ← the mean of its targets (N,); what is not among them keeps its value."""
    places = observations * table.weight.shape[1] + columns
    table.weight.data.view(-1).scatter_reduce_(0, places, targets, "mean", include_self=False)


def fit_network(function, optimizer, scheduler, observations: Tensor, columns, targets, args: Args) -> None:
    """φ ← argmin Σ (f_φ(s)[column] − y)², by minibatches; columns (N,) are actions, or of V all 0."""
    for _ in range(args.gradient_steps):
        rows = torch.randint(len(targets), (args.batch_size,))
        values = function(observations[rows]).gather(1, columns[rows, None])[:, 0]
        loss = F.mse_loss(values / function.scale, targets[rows].to(values.dtype) / function.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


# Training ---------------------------------------------------------------------------------------------------


def collect(env: gym.Env, act, epsilon: float, args: Args, episodes: list, seed: int | None = None) -> Dataset:
    """--transitions steps, ε-greedy by `act`, from an observation to an action; episodes gets (return, length)s."""
    steps, total, length, (obs, _), first = [], 0.0, 0, env.reset(seed=seed), getattr(env.observation_space, "start", 0)
    for number in range(args.transitions):
        action = env.action_space.sample() if torch.rand(()) < epsilon else act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        if not math.isfinite(reward := float(reward)):
            fail(f"the reward of step {number} is not finite", code=1)
        steps.append((obs - first, action - env.action_space.start, reward, next_obs - first, terminated))  # copies
        obs, total, length = next_obs, total + reward, length + 1
        if terminated or truncated:
            episodes.append((total, length))
            total, length, (obs, _) = 0.0, 0, env.reset()
    return Dataset(*(torch.as_tensor(np.array(x)) for x in zip(*steps)))


def read_transitions(args: Args, env: gym.Env) -> Dataset:
    """The steps of the Minari dataset --dataset."""
    try:
        dataset = importlib.import_module("minari").load_dataset(args.dataset, download=True)
    except Exception as error:  # its own, h5py's, or the network's
        fail(f'--dataset {args.dataset} cannot be had ({error!s:.200}); it takes pip install "minari[hdf5,hf]"')
    if (dataset.observation_space, dataset.action_space) != (env.observation_space, env.action_space):
        fail(f"--dataset {args.dataset} has other spaces than {args.env_id}: {dataset.observation_space}")
    first, episodes = getattr(env.observation_space, "start", 0), dataset.iterate_episodes()
    steps = [(x.observations[:-1], x.actions, x.rewards, x.observations[1:], x.terminations) for x in episodes]
    obs, actions, rewards, next_obs, terminated = map(np.concatenate, zip(*steps))
    columns = obs - first, actions - env.action_space.start, rewards, next_obs - first, terminated
    return Dataset(*map(torch.as_tensor, columns))


def train(args: Args) -> dict:
    """Returns {"run_dir": Path, "function": Q or V, "returns": (eval_episodes,) of the greedy policy}."""
    check(args)
    env = make_env(args)
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, Discrete):
        fail(f"{args.env_id} has actions in {actions}, and fqi.py takes Discrete ones; sac.py and ppo.py take others")
    if args.features == "table" and not isinstance(space, Discrete):
        fail(f"--features table takes Discrete observations, and {args.env_id} has {space}")
    if args.iterate == "v" and not hasattr(env.unwrapped, "P"):
        fail(f"--iterate v takes the environment's table, env.unwrapped.P, and {args.env_id} has none: --iterate q")
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: episodes are cut after 1000 steps")
        env = gym.wrappers.TimeLimit(env, 1000)
    run_dir, writer = open_run(args)
    torch.manual_seed(args.seed)
    actions.seed(args.seed)
    start, collected, episodes = time.time(), 0, []
    act = torch.no_grad()(lambda obs: policy(torch.as_tensor(np.array([obs])))[0].item())
    data = read_transitions(args, env) if args.dataset else collect(env, act, 1.0, args, episodes, args.seed)
    columns = int(actions.n) if args.iterate == "q" else 1
    table = lambda columns: nn.Embedding.from_pretrained(torch.zeros(int(space.n), columns).double())  # noqa: E731
    network = FittedNetwork(space, columns, data.observations, args)
    function = table(columns) if args.features == "table" else network
    q_function = function if args.iterate == "q" else table(int(actions.n))  # of V the look ahead
    policy = GreedyPolicy(q_function, int(getattr(space, "start", 0)), int(actions.start))
    optimizer = torch.optim.Adam(function.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.gradient_steps % 1)
    with open(run_dir / "monitor.csv", "w", newline="") as monitor, tqdm(range(1, args.iterations + 1)) as rounds:
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        for number in rounds:
            if args.iterate == "q":
                columns, targets = data.actions, q_targets(function, data, args.gamma)
            else:
                q_function.weight.data.copy_(model_q_values(function, env.unwrapped.P, int(space.n), args.gamma))
                columns, targets = 0 * data.actions, q_function(data.observations).detach().amax(1)
            if function is not network:
                fit_table(function, data.observations, columns, targets)
            else:
                fit_network(function, optimizer, scheduler, data.observations, columns, targets, args)
            values = function(data.observations).detach().gather(1, columns[:, None])[:, 0]
            loss = (values - targets).square().mean().item()
            if not math.isfinite(loss):
                fail(f"the loss of round {number} is not finite: take a lower --learning-rate or --gamma", code=1)
            writer.add_scalar("losses/value_loss", loss, number)
            writer.add_scalar("losses/q_values", values.mean(), number)
            rounds.set_postfix(loss=f"{loss:.2g}", q=f"{values.mean():.1f}", refresh=False)
            for total, length in episodes:
                collected += length
                monitor.write(f"{total:.6f},{length},{time.time() - start:.6f}\n")
                writer.add_scalar("charts/episodic_return", total, collected)
                writer.add_scalar("charts/episodic_length", length, collected)
            episodes.clear()
            if args.collect_every and number % args.collect_every == 0 and number < args.iterations:
                data = Dataset(*map(torch.cat, zip(data, collect(env, act, args.epsilon, args, episodes))))
    policy.eval()
    if isinstance(space, Discrete):
        q_values = q_function(torch.arange(int(space.n))).detach().numpy()
        np.savez(run_dir / "solution.npz", V=q_values.max(1), Q=q_values, policy=q_values.argmax(1))
    example, shapes = torch.as_tensor(np.array([env.observation_space.sample()] * 2)), ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=shapes), run_dir / "policy.pt2")
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), video_length=1000)
    returns = np.zeros(args.eval_episodes)
    for i in range(args.eval_episodes):
        obs, ended = env.reset(seed=args.seed + 1_000_000 + i)[0], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[i] += reward
            ended = terminated or truncated
    env.close()
    writer.add_scalar("eval/episodic_return", returns.mean(), args.iterations)
    writer.close()
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}", flush=True)
    return {"run_dir": run_dir, "function": function, "returns": returns}


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
