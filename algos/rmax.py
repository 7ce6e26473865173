"""Exploration with guarantees, in a table: a model of counts, and plans that take what is unknown for good.

With N(s, a) steps seen of a pair, r̂ their mean reward and P̂ where they led, a plan is the fixed point of

    Q(s, a) = min(r̂(s, a) + b(s, a) + γ Σ_s' P̂(s' | s, a) max_a' Q(s', a'), R_max / (1 − γ))

and b = ∞ where N = 0: what was never tried is utopia. To act greedily then either is good or finds something out, so
bad steps are polynomially many in states and actions, where ε-greedy may need exponentially many.

    rmax       b = ∞ where N < m, else 0                          Brafman & Tennenholtz 2002
    ucb        b = β √(2 ln n / N), n = Σ N                       Auer et al. 2002, there of bandits
    mbie-eb    b = β / √N                                         Strehl & Littman 2008
    beb        b = β / N                                          Kolter & Ng 2009
    thompson   b = 0; r and P are drawn from their posterior      Strens 2000; Osband et al. 2013
    none       b = 0, also where N = 0, and ε-greedy

    python algos/rmax.py                                    # DeepSea16-v0: 0.99; with --optimism none it stays at 0
    python algos/rmax.py --env-id RiverSwim-v0 --optimism thompson
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, deque, namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]


@dataclass
class Args:
    env_id: str = "DeepSea16-v0"  # gymnasium environment; its recommended settings, if any, become the defaults
    seed: Seed = 1  # of everything random
    total_timesteps: Count = 20_000  # environment steps; the episode that passes them is the last
    optimism: Literal["rmax", "ucb", "mbie-eb", "beb", "thompson", "none"] = "rmax"  # what unknown pairs are worth
    known_after: Count = 1  # steps m from which on R-max believes what it saw of a pair; more where chance is at work
    bonus_scale: Positive = 1.0  # β of the bonuses
    epsilon: Fraction = 0.1  # ε of `--optimism none`, which alone is ε-greedy
    max_reward: Positive = 1.0  # R_max: no reward is larger in size
    gamma: Annotated[float, (0, 1 - 1e-9, "at least 0 and below 1")] = 0.99  # discount γ
    eval_episodes: Count = 100  # episodes of the final evaluation, of the plan without bonus
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … of the evaluation on


RECOMMENDED = {f"DeepSea{depth}-v0": dict(total_timesteps=5 * depth**3) for depth in range(4, 33, 4)}
RECOMMENDED["RiverSwim-v0"] = dict(known_after=16)  # `--env-id` alone takes these settings, an explicit flag wins


# Two environments -------------------------------------------------------------------------------------------


class TableEnv(gym.Env):
    """Begins in state 0; table[s][a] is a list of (p, s', r, done), gymnasium's env.unwrapped.P."""

    def __init__(self, table: list):
        self.P, self.observation_space, self.action_space = table, Discrete(len(table)), Discrete(len(table[0]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        rows = self.P[self.state][int(action)]
        place = self.np_random.choice(len(rows), p=[x[0] for x in rows]) if len(rows) > 1 else 0
        _, self.state, reward, done = rows[place]
        return self.state, reward, done, False, {}


class RiverSwim(TableEnv):
    """Six states. Down is certain, 0.005 at the end; up is against the current, and 1 there (Osband et al. 2013)."""

    def __init__(self):
        up = [[(0.05, s - 1, 0.0, False), (0.6, s, 0.0, False), (0.35, s + 1, 0.0, False)] for s in range(1, 5)]
        up = [[(0.4, 0, 0.0, False), (0.6, 1, 0.0, False)], *up, [(0.4, 4, 1.0, False), (0.6, 5, 1.0, False)]]
        super().__init__([[[(1.0, max(s - 1, 0), 0.005 * (s == 0), False)], up[s]] for s in range(6)])


class DeepSea(TableEnv):
    """A grid; each step sinks a row, to the left or, at 0.01 / depth, right: 1 in the corner (Osband et al. 2019)."""

    def __init__(self, depth: int = 16, mapping: int = 0):
        def row(y: int, x: int, right: bool) -> tuple:
            below, beside = min(y + 1, depth - 1), min(x + 1, depth - 1) if right else max(x - 1, 0)
            return 1.0, below * depth + beside, right * ((x == y == depth - 1) - 0.01 / depth), y == depth - 1

        rights = np.random.default_rng(mapping).integers(2, size=(depth, depth))  # else the first would do everywhere
        super().__init__([[[row(y, x, a == right)] for a in range(2)] for (y, x), right in np.ndenumerate(rights)])


if "RiverSwim-v0" not in gym.registry:
    gym.register("RiverSwim-v0", RiverSwim, max_episode_steps=20)
    for depth in range(4, 33, 4):
        gym.register(f"DeepSea{depth}-v0", DeepSea, max_episode_steps=depth, kwargs={"depth": depth})


# The maths --------------------------------------------------------------------------------------------------

# Counts by (pair, outcome), N (S, A) and sums of rewards (S, A); a pair is state · A + action, outcome S the end.
Experience = namedtuple("Experience", "followed counts rewards")
# Expected rewards (S, A), and all steps that are possible, E of them: their pairs, outcomes and probabilities (E,).
SparseModel = namedtuple("SparseModel", "rewards pairs outcomes p")


def estimate(seen: Experience, extra: np.ndarray) -> SparseModel:
    """Means of what was seen, the likeliest model, with something extra (S, A) on the reward."""
    pairs, outcomes = np.array([*seen.followed], int).reshape(-1, 2).T
    p = np.array([*seen.followed.values()]) / seen.counts.flat[pairs]
    return SparseModel(seen.rewards / np.maximum(seen.counts, 1) + extra, pairs, outcomes, p)


def posterior_sample(seen: Experience, args: Args, rng: np.random.Generator, sticks: int = 25) -> SparseModel:
    """P(· | s, a) ~ Dirichlet(N(s, a, ·) + 1 / (S + 1)), mean reward ~ N(Σ r / (N + 1), R_max² / (N + 1))."""
    left = np.exp(-rng.standard_exponential((seen.counts.size, sticks)).cumsum(1))  # of the prior: Sethuraman 1994
    prior = rng.standard_exponential((len(left), 1)) * -np.diff(left, prepend=1)
    weights = np.append(rng.standard_gamma([*seen.followed.values()]), prior)
    pairs, outcomes = np.array([*seen.followed], int).reshape(-1, 2).T
    pairs = np.append(pairs, np.repeat(np.arange(len(left)), sticks))
    outcomes = np.append(outcomes, rng.integers(len(seen.counts) + 1, size=left.size))
    rewards = rng.normal(seen.rewards / (seen.counts + 1), args.max_reward / np.sqrt(seen.counts + 1))
    return SparseModel(rewards, pairs, outcomes, weights / np.bincount(pairs, weights)[pairs])


def bonus(counts: np.ndarray, args: Args) -> np.ndarray:
    """b (S, A) of counts N (S, A)."""
    n, seen = max(counts.sum(), 1), np.maximum(counts, 1)
    scale = {"ucb": np.sqrt(2 * np.log(n) / seen), "mbie-eb": 1 / np.sqrt(seen), "beb": 1 / seen}
    unknown = counts < {"rmax": args.known_after, "none": 0}.get(args.optimism, 1)
    return np.where(unknown, np.inf, args.bonus_scale * scale.get(args.optimism, 0 * seen))


def plan(model: SparseModel, values: np.ndarray, args: Args) -> np.ndarray:
    """Q (S, A), to 1e-6, by value iteration from V (S,) on; cut at what rewards of ±R_max can come to."""
    bound = args.max_reward / (1 - args.gamma)
    while True:
        weighted = model.p * np.append(values, 0)[model.outcomes]
        following = np.bincount(model.pairs, weighted, model.rewards.size).reshape(model.rewards.shape)
        q_values = (model.rewards + args.gamma * following).clip(-bound, bound)
        change, values = np.abs(q_values.max(1) - values).max(), q_values.max(1)
        if args.gamma * change <= max(1e-6 * (1 - args.gamma), 1e-15 * bound):  # the second is rounding
            return q_values


# Training ---------------------------------------------------------------------------------------------------


def play_episode(env: gym.Env, seen: Experience, values: np.ndarray, args: Args, rng, seed: int | None = None) -> tuple:
    """Adds the episode to what was seen → its return, its length, and its last plan's V (S,), where planning begins."""
    (obs, _), (states, actions), thompson = env.reset(seed=seed), seen.counts.shape, args.optimism == "thompson"
    total, length, count, ended = 0.0, 0, 0, False
    while not ended:
        if length == 0 or (not thompson and count & (count - 1) == 0):  # where 1, 2, 4 … steps of a pair say more
            model = posterior_sample(seen, args, rng) if thompson else estimate(seen, bonus(seen.counts, args))
            q_values = plan(model, values, args)
            values = q_values.max(1)
        state = int(obs - env.observation_space.start)
        explore, row = args.optimism == "none" and rng.random() < args.epsilon, q_values[state]
        action = rng.choice(np.flatnonzero(explore | (row == row.max())))
        obs, reward, terminated, truncated, _ = env.step(env.action_space.start + action)
        if not abs(reward := float(reward)) <= args.max_reward:
            fail(f"a reward was {reward}: raise --max-reward, now {args.max_reward}", code=1)
        outcome = states if terminated else int(obs - env.observation_space.start)  # a time limit is no end
        seen.followed[state * actions + action, outcome] += 1
        seen.rewards[state, action] += reward
        count = seen.counts[state, action] = seen.counts[state, action] + 1
        total, length, ended = total + reward, length + 1, terminated or truncated
    return total, length, values


def train(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns": (eval_episodes,), "V": (S,), "Q": (S, A), "policy": (S,) of indices}."""
    check(args)
    env = make_table_env(args)
    run_dir, writer = open_run(args)
    shape = int(env.observation_space.n), int(env.action_space.n)
    seen, values = Experience(Counter(), np.zeros(shape, int), np.zeros(shape)), np.zeros(shape[0])
    rng, start, recent, steps = np.random.default_rng(args.seed), time.time(), deque(maxlen=100), 0
    with open(run_dir / "monitor.csv", "w", newline="") as monitor, tqdm(total=args.total_timesteps) as bar:
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        while steps < args.total_timesteps:
            total, length, values = play_episode(env, seen, values, args, rng, None if steps else args.seed)
            steps += length
            recent.append(total)
            monitor.write(f"{total:.6f},{length},{time.time() - start:.6f}\n")
            writer.add_scalar("charts/episodic_return", total, steps)
            writer.add_scalar("charts/episodic_length", length, steps)
            writer.add_scalar("charts/pairs_seen", (seen.counts > 0).mean(), steps)
            writer.add_scalar("charts/SPS", steps / (time.time() - start), steps)
            writer.add_scalar("losses/q_values", values.mean(), steps)
            bar.set_postfix({"return": f"{np.mean(recent):.2f}"}, refresh=False)
            bar.update(length)
    q_values = plan(estimate(seen, np.where(seen.counts, 0, -np.inf)), np.zeros(shape[0]), args)  # tried pairs alone
    return finish(q_values, q_values.argmax(1), env, args, run_dir, writer, steps)


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


def make_table_env(args: Args) -> gym.Env:
    """gymnasium.make, or one line why not; where there is no time limit, episodes are cut after 1000 steps."""
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {})
    except (gym.error.Error, ImportError, TypeError) as error:  # a TypeError: its constructor needs arguments
        fail(f"--env-id {args.env_id}: {error} (kwargs go into gym.register; --capture-video needs rgb_array)")
    if not all(isinstance(x, Discrete) for x in (env.observation_space, env.action_space)):
        fail(f"{env.observation_space}, {env.action_space}: no table; q_learning.py takes Discrete ones, dqn.py any")
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: episodes are cut after 1000 steps")
        env = gym.wrappers.TimeLimit(env, 1000)
    return env


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


class TablePolicy(nn.Module):
    """A table (S,) of actions' indices as a policy, from observations (B,) to what the environment takes, (B,)."""

    def __init__(self, policy: np.ndarray, env: gym.Env):
        super().__init__()
        self.first_state = int(env.observation_space.start)
        self.register_buffer("table", torch.as_tensor(policy + env.action_space.start))

    def forward(self, obs: Tensor) -> Tensor:
        return self.table[obs - self.first_state]


def finish(q_values, policy: np.ndarray, env: gym.Env, args: Args, run_dir: Path, writer, step: int) -> dict:
    """Writes Q (S, A) and the policy (S,), a table of indices, and evaluates it → what is known at the end.

    policy.pt2 is a TablePolicy: `torch.export.load(path).module()(obs)`; episode i is reset with seed + 1 000 000 + i.
    """
    values, module, returns = q_values.max(1), TablePolicy(policy, env), np.zeros(args.eval_episodes)
    np.savez(run_dir / "solution.npz", V=values, Q=q_values, policy=policy)
    example, shapes = torch.full((2,), module.first_state), ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), run_dir / "policy.pt2")
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), video_length=1000)
    for i in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed + 1_000_000 + i)
        ended = False
        while not ended:
            action = env.action_space.start + policy[obs - env.observation_space.start]
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            ended = terminated or truncated
    env.close()
    writer.add_scalar("eval/episodic_return", returns.mean(), step)
    writer.close()
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}", flush=True)
    return {"run_dir": run_dir, "returns": returns, "V": values, "Q": q_values, "policy": policy}


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
