"""Monte Carlo tree search with UCT (Kocsis & Szepesvári 2006), in the environment itself.

From the present state, again and again (the notes' Algorithm 18): down the tree by the best score, one new leaf, a
random rollout from it, and its return G_t = r_t + γ G_{t+1} back up along the path:

    score(a) = (Q(a) / N(a) − low) / (high − low) + 2 C √(2 ln N / N(a))          N = Σ_a N(a)

Q(a) is the sum of the returns that went through action a, N(a) their number; what was never tried goes first. The
action that was tried most is played. Details that matter:
- A node is a state where an action is chosen, known by what is observed: ways that meet again share it. Outcomes are
  drawn anew in every simulation, and counted under each action.
- low and high are the least and greatest return that went through the node: scores hang neither on the rewards' scale
  nor on what is paid in any case, and C is a fraction of what is at stake there. If all are equal, the bonus decides.
- --backup bellman: Q(a) is the rewards' sum and γ times the outcomes' values, each the best mean Q / N of its own (DP-
  UCT, Keller & Helmert 2013). What exploring lost is forgotten; means keep it. FrozenLake needs that.
- The simulator has dice of its own and no time limit: a plan must not know what the environment will throw.
- The node of the outcome met is the next root, with all that is known below it.
- The simulator is put into a state by setting it, in toy text and classic control; any other environment is copied.

    python algos/mcts.py                                         # CartPole-v1: 500
    python algos/mcts.py --env-id FrozenLake-v1                  # chance, and a reward far off
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
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_type_hints
from weakref import WeakValueDictionary

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
    c: Positive = 1.0  # C of the score
    rollout_depth: Steps = 20  # steps of a rollout, at most
    backup: Literal["mean", "bellman"] = "mean"  # of the returns, or from the outcomes' values
    gamma: Fraction = 1.0  # discount γ
    eval_episodes: Count = 3  # episodes that are played
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on


RECOMMENDED = {  # by environment id: `--env-id` alone takes them, a flag wins
    "FrozenLake-v1": dict(simulations=500, rollout_depth=100, gamma=0.99, backup="bellman"),
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

    def state_of(self, env: gym.Env) -> dict:
        """What to put the simulator into."""
        return {name: getattr(env, name) for name in self.fields} if self.fields else copy.deepcopy(env.__dict__)

    def put(self, state: dict) -> None:
        self.env.__dict__ = self.env.__dict__ | state if self.fields else copy.deepcopy(state)
        self.env.render_mode, self.env.np_random = None, self.dice


# The maths --------------------------------------------------------------------------------------------------


class Node:
    """A state in which one of so many actions is chosen; lists are by action."""

    __slots__ = ("__weakref__", "counts", "high", "low", "outcomes", "rewards", "totals", "value", "visits")

    def __init__(self, actions: int):
        self.visits, self.low, self.high = 0, math.inf, -math.inf
        self.value = 0.0  # a rollout's return at first, then the greatest Q(a) / N(a)
        self.counts, self.totals, self.rewards = [0] * actions, [0.0] * actions, [0.0] * actions  # N(a), Q(a), Σ r
        self.outcomes = [Counter() for _ in range(actions)]  # Node → how often it was met

    def select(self, c: float, dice: random.Random) -> int:
        """The action of the greatest score, or one that was never tried; of several one at random."""
        if 0 in self.counts:
            return dice.choice([a for a, n in enumerate(self.counts) if n == 0])
        scale, bonus = 1 / (self.high - self.low) if self.high > self.low else 0.0, 2 * math.log(self.visits)
        pairs = zip(self.totals, self.counts)
        scores = [(total / n - self.low) * scale + 2 * c * math.sqrt(bonus / n) for total, n in pairs]
        best = max(scores)
        return dice.choice([a for a, score in enumerate(scores) if score == best])

    def add(self, action: int, reward: float, outcome: "Node | None", value: float, args: Args) -> None:
        """A return that went through the action, and the state met after it; None is the end."""
        self.visits += 1
        self.counts[action] += 1
        self.rewards[action] += reward
        self.low, self.high = min(self.low, value), max(self.high, value)
        if outcome is not None:
            self.outcomes[action][outcome] += 1
        self.totals[action] += value
        if args.backup == "bellman":
            after = sum(n * node.value for node, n in self.outcomes[action].items())
            self.totals[action] = self.rewards[action] + args.gamma * after
        self.value = max(total / n for total, n in zip(self.totals, self.counts) if n)

    def best(self) -> int:
        """The action that was tried most, of several that of the greatest mean."""
        return max(range(len(self.counts)), key=lambda a: (self.counts[a], self.totals[a] / max(1, self.counts[a])))


def key(obs) -> object:
    """An observation as a dictionary's key."""
    return obs.tobytes() if isinstance(obs, np.ndarray) else obs


def simulate(root: Node, nodes: WeakValueDictionary, simulator: Simulator, state: dict, args: Args, dice) -> int:
    """One simulation from the state that root stands for; nodes by observation. Returns the steps down the tree."""
    simulator.put(state)
    step, first, actions = simulator.env.step, int(simulator.env.action_space.start), len(root.counts)
    node, path, terminated, value, discount, steps = root, [], False, 0.0, 1.0, 0
    while node is not None and not terminated and len(path) <= args.rollout_depth:
        action = node.select(args.c, dice)
        obs, reward, terminated, _, _ = step(first + action)
        before, node = node, None if terminated else nodes.get(key(obs))
        path.append((before, action, float(reward), node))
    if node is not None:
        value = node.value  # as deep as a rollout: around a circle, for instance
    elif not terminated:
        leaf = nodes[key(obs)] = Node(actions)
        path[-1] = (*path[-1][:3], leaf)
        while not terminated and steps < args.rollout_depth:
            obs, reward, terminated, _, _ = step(first + int(dice.random() * actions))
            value, discount, steps = value + discount * reward, discount * args.gamma, steps + 1
        leaf.value = value
    for node, action, reward, outcome in reversed(path):
        value = reward + args.gamma * value
        node.add(action, reward, outcome, value, args)
    return len(path)


# Playing ----------------------------------------------------------------------------------------------------


def play(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns": (eval_episodes,)}."""
    check(args)
    env = make_env(args)
    if not isinstance(env.action_space, Discrete):
        fail(f"--env-id {args.env_id}: actions are {env.action_space}, not Discrete; mpc.py takes others")
    run_dir, writer = open_run(args)
    dice, steps, actions = random.Random(args.seed), itertools.count(1), int(env.action_space.n)

    def planner(env: gym.Env) -> Generator[int, object, None]:
        env = env.unwrapped
        simulator, root, nodes = Simulator(env, dice.getrandbits(32)), Node(actions), WeakValueDictionary()
        while True:
            start, state = time.perf_counter(), simulator.state_of(env)
            depths = [simulate(root, nodes, simulator, state, args, dice) for _ in range(args.simulations)]
            action, step = root.best(), next(steps)
            writer.add_scalar("tree/value", root.value, step)
            writer.add_scalar("tree/visits", root.visits, step)
            writer.add_scalar("tree/depth", max(depths), step)
            writer.add_scalar("tree/simulations_per_second", args.simulations / (time.perf_counter() - start), step)
            obs = yield int(env.action_space.start) + action
            root = nodes.setdefault(key(obs), Node(actions))

    return {"run_dir": run_dir, "returns": play_planner(planner, env, args, run_dir, writer)}


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
