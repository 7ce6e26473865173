"""Learning a table of Q from experience: Q-learning, SARSA, expected SARSA, double Q-learning, and Dyna-Q.

After every step from (s, a) to s' with reward r the table moves towards a target, by a step size α,

    Q(s, a) ← Q(s, a) + α (r + γ q' − Q(s, a))                  q' = 0 if s' is terminal, else
    q' = max_a' Q(s', a')                                       Q-learning (Watkins 1989): the greedy policy's
    q' = Q(s', a'), a' ~ π                                      SARSA (Rummery & Niranjan 1994): the next action's
    q' = Σ_a' π(a' | s') Q(s', a')                              expected SARSA (van Seijen et al. 2009)
    q' = Q₂(s', argmax_a' Q₁(s', a')), Q₁ and Q₂ in turn        double Q-learning (van Hasselt 2010)

Details that matter, and why:
- A time limit is not a termination: the step that it cuts short bootstraps, with an action that is never taken.
- Q-learning learns about the greedy policy whatever it does, SARSA about what it does, exploration included: on the
  cliff SARSA walks further from the edge, and falls less while it explores.
- The maximum of noisy estimates is too high; choosing with one table and judging with the other takes that out.
- Q goes to Q* only if Σ α = ∞ and Σ α² < ∞ for every pair (Robbins & Monro 1951): `--rate-exponent` ω, ½ < ω ≤ 1, has
  α = N(s, a)^−ω. A constant α forgets, and ends in a neighbourhood.
- Dyna-Q (Sutton 1990): `--planning-steps` K more updates a step, of steps remembered: a model that is what was seen.
- Equal values share the greedy probability; the first of them alone would never leave a corner of an empty table.

    python algos/q_learning.py                                             # CliffWalking-v1
    python algos/q_learning.py --algorithm sarsa
    python algos/q_learning.py --env-id FrozenLake-v1                      # with its recommended settings
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import deque
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
NotNegative = Annotated[float, (0, sys.float_info.max, "0 or more")]
Number = Annotated[int, (0, math.inf, "0 or more")]


@dataclass
class Args:
    env_id: str = "CliffWalking-v1"  # gymnasium environment; its recommended settings, if any, become the defaults
    seed: Seed = 1  # of everything random
    total_timesteps: Count = 100_000  # environment steps
    algorithm: Literal["q-learning", "sarsa", "expected-sarsa", "double-q"] = "q-learning"  # which q' is in the target
    planning_steps: Number = 0  # updates K from remembered outcomes after every step (Dyna-Q)
    learning_rate: Fraction = 0.5  # step size α
    rate_exponent: Fraction | None = None  # ω: the step size is N(s, a)^−ω instead, N counting the pair's updates
    gamma: Fraction = 0.99  # discount γ
    exploration: Literal["epsilon", "boltzmann"] = "epsilon"  # ε-greedy, or in proportion to exp(Q / temperature)
    exploration_start: NotNegative = 0.1  # ε or temperature at the start
    exploration_end: NotNegative = 0.1  # ε or temperature once --exploration-fraction of the run has passed
    exploration_fraction: Positive = 0.5  # part of --total-timesteps over which it falls, linearly
    eval_episodes: Count = 100  # episodes of the final evaluation, with the greedy policy
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … of the evaluation on


# fmt: off
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, an explicit flag wins
    "CliffWalking-v1": dict(total_timesteps=20_000, gamma=1.0),
    "Taxi-v4": dict(total_timesteps=300_000),
    **{name: dict(total_timesteps=steps, planning_steps=10, rate_exponent=0.7, exploration_start=1.0)
       for name, steps in (("FrozenLake-v1", 50_000), ("FrozenLake8x8-v1", 100_000))},
}
# fmt: on


# The maths --------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """A step between states and with an action that are indices from 0."""

    state: int
    action: int
    reward: float
    next_state: int
    terminated: bool


def action_probabilities(values: list[float], exploration: str, amount: float) -> list[float]:
    """π(· | s), (A,), of Q(s, ·): with probability `amount` any, else a best one; or in parts of exp(Q / amount)."""
    best = max(values)
    if exploration == "epsilon":
        others, greedy = amount / len(values), (1 - amount) / values.count(best)
        return [others + greedy * (x == best) for x in values]
    weights = [math.exp((x - best) / amount) for x in values]
    return [x / sum(weights) for x in weights]


def update(tables: list, counts: list, step: Transition, next_action: int | None, amount: float, args: Args, rng):
    """Moves Q(s, a) of one of the tables towards its target (Sutton & Barto 2018, eq. 6.7 to 6.10) → how far it was.

    Tables and counts of updates are lists (S, A): one number at a time they are faster than arrays.
    """
    chosen = rng.randrange(len(tables))
    row, next_row = tables[chosen][step.state], tables[chosen][step.next_state]
    if step.terminated:
        next_value = 0.0
    elif args.algorithm == "sarsa":
        next_value = next_row[next_action]
    elif args.algorithm == "expected-sarsa":
        next_value = sum(map(math.prod, zip(action_probabilities(next_row, args.exploration, amount), next_row)))
    else:  # tables[chosen - 1] is the other of two, or the only one
        next_value = tables[chosen - 1][step.next_state][next_row.index(max(next_row))]
    count = counts[chosen][step.state][step.action] = counts[chosen][step.state][step.action] + 1
    rate = args.learning_rate if args.rate_exponent is None else count**-args.rate_exponent
    difference = step.reward + args.gamma * next_value - row[step.action]
    row[step.action] += rate * difference
    return difference


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000  # environment steps between two points of losses/*, which are means over the updates since the last


def learn(env: gym.Env, args: Args) -> Iterator[tuple[np.ndarray, float, tuple[float, int] | None]]:
    """Yields, after every step, Q (T, S, A) as lists, the temporal difference, and an ended episode's (return, length).

    Of the T tables, two of double Q-learning and else one, the mean is acted on.
    """
    rng, memory, amount, first_state = random.Random(args.seed), [], args.exploration_start, env.observation_space.start
    shape = 1 + (args.algorithm == "double-q"), int(env.observation_space.n), int(env.action_space.n)
    tables, counts = np.zeros(shape).tolist(), np.zeros(shape, int).tolist()

    def act(state: int) -> int:
        values = [sum(x) / len(tables) for x in zip(*(table[state] for table in tables))]
        return rng.choices(range(len(values)), action_probabilities(values, args.exploration, amount))[0]

    state, action, total, length = int(env.reset(seed=args.seed)[0] - first_state), None, 0.0, 0
    for number in range(args.total_timesteps):
        progress = min(number / (args.exploration_fraction * args.total_timesteps), 1.0)
        amount = args.exploration_start + (args.exploration_end - args.exploration_start) * progress
        action = act(state) if action is None else action
        obs, reward, terminated, truncated, _ = env.step(env.action_space.start + action)
        if not math.isfinite(reward := float(reward)):
            fail(f"the reward of step {number} is not finite", code=1)
        step = Transition(state, action, reward, int(obs - first_state), terminated)
        next_action = act(step.next_state) if args.algorithm == "sarsa" else None
        difference = update(tables, counts, step, next_action, amount, args, rng)
        memory += [step] * bool(args.planning_steps)
        for remembered in rng.choices(memory, k=args.planning_steps) if memory else ():
            imagined = act(remembered.next_state) if args.algorithm == "sarsa" else None
            update(tables, counts, remembered, imagined, amount, args, rng)
        state, action, total, length = step.next_state, next_action, total + reward, length + 1
        ended = terminated or truncated
        yield tables, difference, (total, length) if ended else None
        if ended:
            state, action, total, length = int(env.reset()[0] - first_state), None, 0.0, 0


def train(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns": (eval_episodes,), "V": (S,), "Q": (S, A), "policy": (S,) of indices}."""
    check(args)
    env = make_table_env(args)
    lowest, highest = sorted([args.exploration_start, args.exploration_end])
    if highest > 1 if args.exploration == "epsilon" else lowest == 0:
        fail("--exploration-start and --exploration-end are at most 1 for epsilon, and positive for boltzmann")
    run_dir, writer = open_run(args)
    start, recent, differences = time.time(), deque(maxlen=100), []
    with (
        open(run_dir / "monitor.csv", "w", newline="") as monitor,
        tqdm(total=args.total_timesteps, unit="step") as bar,
    ):
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        for number, (tables, difference, episode) in enumerate(learn(env, args), 1):
            differences.append(abs(difference))
            if episode:
                recent.append(episode[0])
                monitor.write(f"{episode[0]:.6f},{episode[1]},{time.time() - start:.6f}\n")
                writer.add_scalar("charts/episodic_return", episode[0], number)
                writer.add_scalar("charts/episodic_length", episode[1], number)
            if number % LOG_EVERY == 0 or number == args.total_timesteps:
                writer.add_scalar("losses/td_error", np.mean(differences), number)
                writer.add_scalar("losses/q_values", np.mean(tables, 0).max(1).mean(), number)
                writer.add_scalar("charts/SPS", number / (time.time() - start), number)
                bar.set_postfix({"return": f"{np.mean(recent or [np.nan]):.1f}"}, refresh=False)
                bar.update(number - bar.n)
                differences = []
    q_values = np.mean(tables, 0)
    return finish(q_values, q_values.argmax(1), env, args, run_dir, writer, args.total_timesteps)


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
