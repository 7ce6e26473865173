"""Monte Carlo tree search with UCT (Kocsis & Szepesvári 2006), in the environment itself.

From the present state, again and again (the notes' Algorithm 18): down the tree by the best score, one new leaf, a
random rollout from it, and its return G_t = r_t + γ G_{t+1} back up along the path:

    score(a) = (Q(a) / N(a) − low) / (high − low) + 2 C √(2 ln N / N(a))          N = Σ_a N(a)

Q(a) is the sum of the returns that went through action a, N(a) their number; what was never tried goes first. The
action that was tried most is played. Details that matter:
- Nodes stand for states where an action is chosen; under each action there is one for every outcome observed. Every
  simulation begins at the root and draws all outcomes anew, so each counts as often as it occurs.
- low and high are the least and greatest return that went through the node: scores hang neither on the rewards' scale
  nor on what is paid in any case, and C is a fraction of what is at stake there. If all are equal, the bonus decides.
- The simulator has dice of its own: a plan must not know those that the environment will throw.
- The subtree of the action played and the outcome met is the next root, with all it knows.
- A time limit is no part of the simulator: simulations end where an episode terminates, and --rollout-depth steps below
  the leaf.
- The simulator is put into a state by setting it, in toy text and classic control; any other environment is copied.

    python algos/mcts.py                                         # CartPole-v1: 500
    python algos/mcts.py --simulations 10 --rollout-depth 10     # with a fiftieth of the search
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Steps = Annotated[int, (0, math.inf, "at least 0")]
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # gymnasium environment with Discrete actions
    seed: Seed = 1  # of the episodes' starts and of the search
    simulations: Count = 100  # per step of the environment
    c: Positive = 0.2  # C of the score
    rollout_depth: Steps = 50  # steps of a rollout, at most
    gamma: Fraction = 1.0  # discount γ
    eval_episodes: Count = 3  # episodes that are played
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on


RECOMMENDED = {  # by environment id: `--env-id` alone takes them, a flag wins
    "FrozenLake-v1": dict(simulations=3000, c=0.3, rollout_depth=100),
}


# Simulator --------------------------------------------------------------------------------------------------


class Simulator:
    """A copy of an environment that can be put into any state which that environment was in."""

    def __init__(self, env: gym.Env, seed: int):
        self.env = object.__new__(type(env))  # copy.deepcopy makes a new one, in no state, of gymnasium's EzPickle
        self.fields = None  # that make up the state, which step() replaces and does not change
        if hasattr(env, "P") and hasattr(env, "s"):
            self.fields = [name for name in ("s", "lastaction", "fickle_step") if hasattr(env, name)]
        elif type(env).__module__.startswith("gymnasium.envs.classic_control"):
            self.fields = [name for name in ("state", "steps_beyond_terminated") if hasattr(env, name)]
        self.env.__dict__, self.dice = dict(env.__dict__), np.random.default_rng(seed)
        self.put(self.state_of(env))

    def state_of(self, env: gym.Env) -> dict:
        """What to put the simulator into."""
        return {name: getattr(env, name) for name in self.fields} if self.fields else copy.deepcopy(env.__dict__)

    def put(self, state: dict) -> None:
        self.env.__dict__ = self.env.__dict__ | state if self.fields else copy.deepcopy(state)
        self.env.render_mode, self.env.np_random = None, self.dice


# The maths --------------------------------------------------------------------------------------------------


class Node:
    """A state in which one of so many actions is chosen; what is kept of each action is in lists by its index."""

    __slots__ = ("counts", "high", "low", "outcomes", "totals", "visits")

    def __init__(self, actions: int):
        self.visits, self.low, self.high = 0, math.inf, -math.inf
        self.counts, self.totals = [0] * actions, [0.0] * actions  # N(a), Q(a)
        self.outcomes = [{} for _ in range(actions)]  # by action: observation → Node

    def select(self, c: float, dice: random.Random) -> int:
        """The action of the greatest score, or one that was never tried; of several one at random."""
        if 0 in self.counts:
            return dice.choice([a for a, n in enumerate(self.counts) if n == 0])
        scale, bonus = 1 / (self.high - self.low) if self.high > self.low else 0.0, 2 * math.log(self.visits)
        best, chosen = -math.inf, []
        for action, (total, n) in enumerate(zip(self.totals, self.counts)):
            score = (total / n - self.low) * scale + 2 * c * math.sqrt(bonus / n)
            if score > best:
                best, chosen = score, [action]
            elif score == best:
                chosen.append(action)
        return chosen[0] if len(chosen) == 1 else dice.choice(chosen)

    def add(self, action: int, value: float) -> None:
        """A return that went through the action."""
        self.visits += 1
        self.counts[action] += 1
        self.totals[action] += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def best(self) -> int:
        """The action that was tried most, of several that of the greatest mean return."""
        return max(range(len(self.counts)), key=lambda a: (self.counts[a], self.totals[a] / max(1, self.counts[a])))

    def value(self) -> float:
        """Mean return of the best action."""
        return self.totals[self.best()] / self.counts[self.best()]


def key(obs) -> object:
    """An observation as a dictionary's key."""
    return obs.tobytes() if isinstance(obs, np.ndarray) else obs


def simulate(root: Node, simulator: Simulator, state: dict, args: Args, dice: random.Random) -> int:
    """One simulation from the state that root stands for; returns the depth of the new leaf."""
    simulator.put(state)
    step, first = simulator.env.step, int(simulator.env.action_space.start)
    node, path, terminated = root, [], False
    while node is not None and not terminated:
        action = node.select(args.c, dice)
        obs, reward, terminated, _, _ = step(first + action)
        path.append((node, action, reward))
        outcomes, outcome = node.outcomes[action], key(obs)
        node = outcomes.get(outcome)
    value, discount, steps = 0.0, 1.0, 0
    if not terminated:
        outcomes[outcome] = Node(len(root.counts))
    while not terminated and steps < args.rollout_depth:
        _, reward, terminated, _, _ = step(first + int(dice.random() * len(root.counts)))
        value, discount, steps = value + discount * reward, discount * args.gamma, steps + 1
    for node, action, reward in reversed(path):
        value = float(reward) + args.gamma * value
        node.add(action, value)
    return len(path)


# Playing ----------------------------------------------------------------------------------------------------


def play(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns": (eval_episodes,)}."""
    check(args)
    env = make_env(args)
    if not isinstance(env.action_space, Discrete):
        fail(
            f"actions of {args.env_id} are {env.action_space}; this tree branches on Discrete ones, mpc.py takes others"
        )
    run_dir, writer = open_run(args)
    dice, steps, actions = random.Random(args.seed), itertools.count(1), int(env.action_space.n)

    def planner(env: gym.Env) -> Generator[int, object, None]:
        env = env.unwrapped
        simulator, root = Simulator(env, dice.getrandbits(32)), Node(actions)
        while True:
            start, state = time.perf_counter(), simulator.state_of(env)
            depths = [simulate(root, simulator, state, args, dice) for _ in range(args.simulations)]
            action, step = root.best(), next(steps)
            writer.add_scalar("tree/value", root.value(), step)
            writer.add_scalar("tree/visits", root.visits, step)
            writer.add_scalar("tree/depth", max(depths), step)
            writer.add_scalar("tree/simulations_per_second", args.simulations / (time.perf_counter() - start), step)
            obs = yield int(env.action_space.start) + action
            root = root.outcomes[action].get(key(obs)) or Node(actions)

    returns = play_planner(planner, env, args, run_dir, writer)
    return {"run_dir": run_dir, "returns": returns}


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


def play_planner(planner, env: gym.Env, args: Args, run_dir: Path, writer: SummaryWriter) -> np.ndarray:
    """Plays --eval-episodes with a planner → returns (eval_episodes,); episode i is reset with seed + 1 000 000 + i.

    planner(env), a generator called after a reset, yields the episode's actions and is sent what is observed then.
    """
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: episodes are cut after 1000 steps")
        env = gym.wrappers.TimeLimit(env, 1000)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), video_length=1000)
    returns, step, start = np.zeros(args.eval_episodes), 0, time.time()
    with open(run_dir / "monitor.csv", "w", newline="") as monitor, tqdm(unit=" steps", desc=args.env_id) as bar:
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        for i in range(args.eval_episodes):
            env.reset(seed=args.seed + 1_000_000 + i)
            ended, first, actions, obs = False, step, planner(env), None
            while not ended:
                obs, reward, terminated, truncated, _ = env.step(actions.send(obs))
                if not math.isfinite(reward):
                    fail(f"the reward of step {step - first + 1} of episode {i + 1} is not finite", code=1)
                returns[i] += reward
                ended, step = terminated or truncated, step + 1
                bar.set_postfix_str(f"episode {i + 1}, return {returns[i]:.2f}", refresh=False)
                bar.update()
            monitor.write(f"{returns[i]:.6f},{step - first},{time.time() - start:.6f}\n")
            monitor.flush()
            writer.add_scalar("charts/episodic_return", returns[i], step)
            writer.add_scalar("charts/episodic_length", step - first, step)
            writer.add_scalar("charts/SPS", step / (time.time() - start), step)
    env.close()
    writer.add_scalar("eval/episodic_return", returns.mean(), step)
    writer.close()
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}", flush=True)
    return returns


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
    play(read_args())
