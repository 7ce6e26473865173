"""Policy iteration, value iteration and what lies between, for a Markov decision process whose table is known.

With p(s', done | s, a) and r(s, a) given, the optimal values are fixed points (Bellman 1957; Puterman 1994, chapter 6),

    Q*(s, a) = r(s, a) + γ Σ_s' p(s', not done | s, a) V*(s')          V*(s) = max_a Q*(s, a)

and one loop finds them, modified policy iteration (Puterman & Shin 1978):

    π ← argmax_a Q,  where Q = r + γ P V                         improvement: greedy after a look ahead
    V ← T_π … T_π max_a Q,  where T_π V = r_π + γ P_π V          evaluation: k sweeps, max_a Q being the first

k = 1 is value iteration. `exact` solves (I − γ P_π) V = r_π in place of sweeps: policy iteration. Details that matter:
- The error is bounded, not guessed: Q* − Q lies between γ / (1 − γ) times the least and the greatest of T V − V
  (MacQueen 1966). The middle is taken, and rounding is in the bound, too. Where episodes can end, 0 is among them.
- The transition's own `done` cuts the sum, not the state that it leads to: in Taxi and CliffWalking final states have
  rows of their own.
- A policy keeps its action among equal ones; else exact policy iteration could go round for ever.
- With γ = 1 a policy has a value only if it ends from everywhere (a stochastic shortest path: Bertsekas & Tsitsiklis
  1991). The first policy is one that does, by the nearest end, and so are ties of the last one broken.
- A time limit is no part of the table: the values are those of episodes that only end by themselves.

    python algos/policy_iteration.py                                      # FrozenLake8x8-v1
    python algos/policy_iteration.py --env-id Taxi-v4 --evaluation-sweeps 1
    python algos/policy_iteration.py --env-id CliffWalking-v1 --gamma 1 --q --evaluation-sweeps 20
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_type_hints

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
    env_id: str = "FrozenLake8x8-v1"  # gymnasium environment that has a table, env.unwrapped.P
    seed: Seed = 1  # of the evaluation; the solution hangs on nothing random
    evaluation_sweeps: Count | Literal["exact"] = "exact"  # k per improvement; 1: value iteration; or a linear system
    q: bool = False  # iterate on Q instead of on V (Q-iteration)
    gamma: Fraction = 0.99  # discount γ; 1: a stochastic shortest path
    tolerance: Positive = 1e-9  # stop where ‖V − V*‖ (--q: ‖Q − Q*‖) is at most that; γ = 1: where V changes by it
    max_iterations: Count = 1_000_000  # improvements after which it stops in any case, and says what is reached
    eval_episodes: Count = 100  # episodes of the evaluation
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … of the evaluation on


RECOMMENDED = {"CliffWalking-v1": dict(gamma=1.0)}  # by environment id: `--env-id` alone takes them, a flag wins


# The model --------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A Markov decision process of S states and A actions, each with up to B successors; unused places have p = 0."""

    rewards: np.ndarray  # (S, A), expected
    going_on: np.ndarray  # (S, A, B), p(s', not done | s, a)
    successors: np.ndarray  # (S, A, B), s' as an index


def model_of(table, states: int, actions: int) -> Model:
    """Of gymnasium's table: table[s][a] is a list of (p, s', r, done)."""
    try:
        rows = [list(table[s][a]) for s in range(states) for a in range(actions)]
        most = max(map(len, rows))
        padded = np.array([row + [(0.0, 0, 0.0, True)] * (most - len(row)) for row in rows], float)
        p, successors, rewards, done = np.moveaxis(padded.reshape(states, actions, most, 4), -1, 0)
    except (LookupError, TypeError, ValueError) as error:
        fail(
            f"env.unwrapped.P[s][a] must be rows (p, s', r, done) for {states} states and {actions} actions: {error!r}"
        )
    if not (np.isfinite(padded).all() and (p >= 0).all() and np.allclose(p.sum(-1), 1)):
        fail("a reward in env.unwrapped.P is not finite, or probabilities of a state and action do not sum to 1")
    return Model((p * rewards).sum(-1), p * (done == 0), successors.astype(np.int64))


# The maths --------------------------------------------------------------------------------------------------


def look_ahead(model: Model, values: np.ndarray, gamma: float) -> np.ndarray:
    """Q (S, A) = r + γ P V of values V (S,): Bellman's equation without its maximum."""
    return model.rewards + gamma * np.einsum("sab,sab->sa", model.going_on, values[model.successors])


def evaluation(model: Model, policy: np.ndarray, iterate: np.ndarray, gamma: float, sweeps) -> np.ndarray:
    """V (S,) or Q (S, A) after k − 1 sweeps of T_π from `iterate` on; for "exact" where they would lead, V^π or Q^π."""
    states, q = np.arange(len(policy)), iterate.ndim == 2
    chain = Model(*(x[states, policy][:, None] for x in model))  # one action
    if sweeps == "exact":
        _, ends = nearest_end(chain, np.full((len(policy), 1), gamma == 1))
        if gamma == 1 and not ends.all():
            fail(f"with --gamma 1 a policy that never ends, as from state {ends.argmin()}, has no value: lower --gamma")
        transitions = np.zeros((len(policy), len(policy)))
        np.add.at(transitions, (states[:, None], chain.successors[:, 0]), chain.going_on[:, 0])
        values = np.linalg.solve(np.eye(len(policy)) - gamma * transitions, chain.rewards[:, 0])
        return look_ahead(model, values, gamma) if q else values
    for _ in range(sweeps - 1):
        iterate = look_ahead(model, iterate[states, policy], gamma) if q else look_ahead(chain, iterate, gamma)[:, 0]
    return iterate


def nearest_end(model: Model, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An allowed action (S,) that may lead nearer to an end, and whether (S,) there is one; allowed is (S, A) of bool.

    Where all states have one, a policy of them ends almost surely: breadth first, from the end on.
    """
    leads_on = allowed & (model.going_on.sum(-1) < 1 - 1e-12)  # may end at once
    policy, ends = leads_on.argmax(1), leads_on.any(1)
    new = ends
    while new.any():
        leads_on = allowed & ((model.going_on > 0) & ends[model.successors]).any(-1)
        new = leads_on.any(1) & ~ends
        policy, ends = np.where(new, leads_on.argmax(1), policy), ends | new
    return policy, ends


def modified_policy_iteration(model: Model, gamma: float, sweeps: int | Literal["exact"], q: bool = False) -> Iterator:
    """From 0 on, for ever: yields (T X, Q, T X − X) of every iterate X, which is V (S,), or with `q` Q (S, A).

    Q (S, A) is the look ahead from X, and T X is Q or its maximum (Puterman 1994, section 6.5).
    """
    states, iterate = np.arange(len(model.rewards)), np.zeros(model.rewards.shape[: 1 + q])
    policy, ends = nearest_end(model, np.full(model.rewards.shape, gamma == 1))
    if gamma == 1 and not ends.all():
        fail(f"with --gamma 1 an episode has to end, and from state {ends.argmin()} none can; take a lower --gamma")
    if gamma == 1 and sweeps == "exact":
        iterate = evaluation(model, policy, iterate, gamma, sweeps)
    while True:
        q_values = look_ahead(model, iterate.max(1) if q else iterate, gamma)
        improved = q_values if q else q_values.max(1)
        yield improved, q_values, improved - iterate
        iterate = improved
        if sweeps != 1:
            better = q_values.max(1) > q_values[states, policy] + rounding(model, q_values)
            policy = np.where(better, q_values.argmax(1), policy)
            iterate = evaluation(model, policy, iterate, gamma, sweeps)


def rounding(model: Model, q_values: np.ndarray) -> float:
    """A bound on what float64 adds to one look ahead: of a sum of B + 3 numbers."""
    largest = max(np.abs(q_values).max(), np.abs(model.rewards).max())
    return float((model.successors.shape[2] + 3) * np.finfo(float).eps * largest)


# Solution ---------------------------------------------------------------------------------------------------


def solve(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns": (eval_episodes,), "V": (S,), "Q": (S, A), "policy": (S,) of indices}."""
    check(args)
    env = make_table_env(args)
    if not hasattr(env.unwrapped, "P"):
        fail(f"{args.env_id} has no table, env.unwrapped.P; q_learning.py learns from experience")
    model = model_of(env.unwrapped.P, int(env.observation_space.n), int(env.action_space.n))
    if args.evaluation_sweeps == "exact" and len(model.rewards) > 10_000:
        fail(f"a linear system of {len(model.rewards)} states is too large to solve: take --evaluation-sweeps 50")
    run_dir, writer = open_run(args)
    iterates = modified_policy_iteration(model, args.gamma, args.evaluation_sweeps, args.q)
    iterates = itertools.islice(iterates, args.max_iterations)
    scale = args.gamma / (1 - args.gamma) if args.gamma < 1 else 1.0
    ends = bool((model.going_on.sum(-1) < 1 - 1e-15).any())  # after which nothing is gained or lost any more
    for number, (_, q_values, difference) in enumerate(tqdm(iterates, unit=" iterations", desc=args.env_id), 1):
        rounded, extremes = rounding(model, q_values), np.append(difference, [0.0] * ends)
        low, high = extremes.min(), extremes.max()
        error = scale * (high - low) / 2 + rounded / (1 - args.gamma) if args.gamma < 1 else high - low
        writer.add_scalar("losses/error_bound" if args.gamma < 1 else "losses/change", error, number)
        if error <= args.tolerance or high - low <= rounded:
            break
    q_values = q_values + scale * (low + high) / 2 * (args.gamma < 1)
    values = q_values.max(1)
    equal = q_values >= values[:, None] - 2 * max(error, rounded)  # to the best, as far as is known
    policy, ends = nearest_end(model, equal & (args.gamma == 1))
    policy = np.where(ends, policy, equal.argmax(1))
    print(picture(policy, model, env))
    left = f"‖V − V*‖ ≤ {error:.1e}" if args.gamma < 1 else f"the last changed V by {error:.1e}"
    print(f"{number} iterations: {left}{'' if error <= args.tolerance else ', above --tolerance'}")
    return finish(q_values, policy, env, args, run_dir, writer, number)


def picture(policy: np.ndarray, model: Model, env: gym.Env) -> str:
    """Of a grid, a row a line: where the policy's action goes, on the average of all steps; · where nothing goes on."""
    size = getattr(env.unwrapped, "shape", (getattr(env.unwrapped, "nrow", 0), getattr(env.unwrapped, "ncol", 0)))
    if math.prod(size) != len(policy):
        return "the policy is in solution.npz"
    places = np.stack(np.divmod(np.arange(len(policy)), size[1]), -1)
    steps = places[model.successors] - places[:, None, None]  # (S, A, B, 2): down, right
    weights = model.going_on * (np.abs(steps).sum(-1) == 1)  # a fall off a cliff does not count
    down, right = (weights[..., None] * steps).sum((0, 2)).T
    arrows = np.where(np.abs(down) > np.abs(right), np.where(down > 0, "↓", "↑"), np.where(right > 0, "→", "←"))
    return "\n".join(map("".join, np.where(model.going_on.any((1, 2)), arrows[policy], "·").reshape(size)))


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
    solve(read_args())
