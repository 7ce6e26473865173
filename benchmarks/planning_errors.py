"""How far plans are from exact ones, over what they may try: mpc.py over candidates, mcts.py over simulations.

    python benchmarks/planning_errors.py --workers 2      # ten minutes of one core; again after a kill: goes on

- mpc.py plans ten steps of ilqr.py's DoubleIntegrator, from one state: the distance |A − A*| of the controls to LQR's.
- mcts.py plans in ten random processes of four steps, three states and two actions, a step ending with a probability of
  a tenth: the error of the root's value, max_a Q(a) / N(a), against exhaustive expectimax.
Each planner and budget is a row of results/planning_errors.csv, with the mean over all seeds and its standard error.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from estimates import markdown, number, plt, save, tidy
from gymnasium.spaces import Discrete
from rows import measured_rows
from run import RESULTS, ROOT, tree_sha256

ilqr, mcts, mpc = (importlib.import_module(name) for name in ("ilqr", "mcts", "mpc"))  # run.py has set the path

KEY = ["planner", "budget"]
SAMPLING = {"random": "random shooting", "mppi": "MPPI", "cem": "CEM"}
SEARCH = {"mean": "UCT, mean returns", "bellman": "UCT, Bellman backups"}
BUDGETS = (10, 30, 100, 300, 1_000, 3_000, 10_000)
SEEDS, PROCESSES, ITERATIONS, HORIZON = 20, 10, 30, 10


class Layered(gym.Env):
    """A random process of four steps, three states and two actions: what is observed is step · 3 + state.

    Rewards are uniform in [0, 1], times `scale`. An episode can end before, with a probability of a tenth a step.
    """

    observation_space, action_space, steps = Discrete(12), Discrete(2, start=3), 4

    def __init__(self, seed: int = 0, scale: float = 1.0):
        rng = np.random.default_rng(seed)
        self.p, self.rewards = rng.dirichlet(np.ones(3), (12, 2)), scale * rng.random((12, 2))
        self.s = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.s = 0
        return self.s, {}

    def step(self, action):
        reward = self.rewards[self.s, action - 3]
        state = int(self.np_random.choice(3, p=self.p[self.s, action - 3]))
        ended = self.s // 3 == self.steps - 1 or self.np_random.random() < 0.1
        self.s = 3 * min(self.s // 3 + 1, self.steps - 1) + state
        return self.s, reward, bool(ended), False, {}

    def q_values(self, gamma: float) -> np.ndarray:
        """(12, 2), by exhaustive expectimax."""
        q = np.zeros((12, 2))
        for step in reversed(range(self.steps)):
            for s in range(3 * step, 3 * step + 3):
                after = q[3 * step + 3 : 3 * step + 6].max(1) if step < self.steps - 1 else np.zeros(3)
                q[s] = self.rewards[s] + 0.9 * gamma * self.p[s] @ after
        return q


def searched(env: gym.Env, args, seed: int = 0) -> tuple:
    """mcts.py's root after --simulations from env's state, and how far down the tree each went."""
    simulator, dice = mcts.Simulator(env, seed), random.Random(seed)
    root, state, nodes = mcts.Node(int(env.action_space.n)), simulator.state_of(env), WeakValueDictionary()
    return root, [mcts.simulate(root, nodes, simulator, state, args, dice) for _ in range(args.simulations)]


def linear_quadratic(horizon: int) -> tuple[Callable, np.ndarray, gym.Env]:
    """ilqr.py's DoubleIntegrator from one state: simulate as mpc.py's do, and its optimal controls (H, 1)."""
    env = gym.make("DoubleIntegrator-v0")
    env.reset(seed=1)
    problem, state = ilqr.DoubleIntegrator(env), env.unwrapped.state.copy()
    exact = ilqr.optimise(problem, problem.state(), torch.zeros(1, horizon, 1).double(), ilqr.Args(method="lqr"))

    def simulate(actions: np.ndarray) -> np.ndarray:
        x, rewards = np.tile(state, (len(actions), 1)), []
        for u in actions.swapaxes(0, 1):
            both = np.concatenate([x, u], 1)
            rewards.append(-0.5 * np.square(both).sum(1))
            x = both @ env.unwrapped.F.T
        return np.stack(rewards, 1)

    return simulate, exact.u.numpy(), env


def distances(planner: str, population: int) -> list[float]:
    """|A − A*| of each seed; the correlation of the noise over time is none, as A* has none to find."""
    simulate, exact, env = linear_quadratic(HORIZON)
    args = mpc.Args(planner=planner, horizon=HORIZON, population=population, elites=max(population // 10, 2), kept=1)
    args.correlation, args.noise, args.temperature = 0.0, 0.3, 0.02
    initial = mpc.initial_distribution(env.action_space, args)
    generators = map(np.random.default_rng, range(SEEDS))
    plans = [mpc.make_plan(simulate, initial, None, ITERATIONS, args, rng) for rng in generators]
    return [float(np.linalg.norm(plan.actions - exact)) for plan in plans]


def errors(backup: str, simulations: int) -> list[float]:
    """|value − exact| at the root, of each process and seed."""
    args, found = mcts.Args(backup=backup, simulations=simulations, rollout_depth=4, c=0.2), []
    for process in range(PROCESSES):
        env = Layered(process)
        exact = env.q_values(args.gamma)[0].max()
        found += [abs(searched(env, args, seed)[0].value - exact) for seed in range(SEEDS // 2)]
    return found


def measure(planner: str, budget: int) -> dict:
    """Mean, its standard error, and the hash of what was run."""
    torch.set_num_threads(1)
    found = (distances if planner in SAMPLING else errors)(planner, budget)
    row = {"error": np.mean(found), "deviation": np.std(found, ddof=1) / len(found) ** 0.5}
    return row | {"code_sha256": code(planner)}


def code(planner: str) -> str:
    """Of what is run of mpc.py or mcts.py."""
    name, parts = ("mpc", ("make_plan", "initial_distribution")) if planner in SAMPLING else ("mcts", ("simulate",))
    return tree_sha256((ROOT / "algos" / f"{name}.py").read_text(encoding="utf-8"), parts)


def rate(rows: pd.DataFrame) -> float:
    """The slope of log error over log budget, by least squares."""
    return float(np.polyfit(np.log(rows["budget"]), np.log(rows["error"]), 1)[0])


SECTION = """
## Planning errors

Left, [mpc.py](../algos/mpc.py) on ten steps of a linear system with a quadratic cost: the distance of its controls to
LQR's, over the candidates of an iteration ({iterations} iterations of CEM and MPPI), mean of {seeds} seeds. Shooting at
random needs ever more for ever less; CEM narrows to the optimum, which float32 rounds, unless it has so few candidates
that it narrows to another place; MPPI stays where its noise and temperature hold it.
Right, [mcts.py](../algos/mcts.py) in {processes} small random processes: the error of the root's value against
exhaustive expectimax, over simulations, mean of {searches} searches. Means of returns keep what exploring has cost;
Bellman backups forget it ([planning_errors.py](planning_errors.py)).

{table}

![Distance to LQR's controls over candidates, and error of the root's value over simulations]({plot})
"""


def section(results: Path) -> str:
    """Of the page, "" without planning_errors.csv; draws the plot."""
    path = results / "planning_errors.csv"
    if not path.exists():
        return ""
    rows, cells = pd.read_csv(path), []
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, names in zip(both, (SAMPLING, SEARCH)):
        for name, label in names.items():
            mine = rows[rows["planner"] == name].sort_values("budget")
            bars = 1.96 * mine["deviation"]
            bars = [bars.clip(upper=0.9 * mine["error"]), bars]  # a logarithmic axis has no 0
            axes.errorbar(mine["budget"], mine["error"], bars, marker=".", capsize=2, label=label)
            changed = "" if (mine["code_sha256"] == code(name)).all() else " †"
            of = {f"{row.budget:,}".replace(",", " "): f"{row.error:.2g}" for row in mine.itertuples()}
            cells.append({"error": label + changed} | of | {"exponent": number(rate(mine), 2)})
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False)
    tidy(both[0], "candidates of an iteration", "distance to LQR's controls")
    tidy(both[1], "simulations", "error of the root's value")
    save(figure, results.parent / "plots" / "planning_errors.png")
    sizes = dict(iterations=ITERATIONS, seeds=SEEDS, processes=PROCESSES, searches=PROCESSES * (SEEDS // 2))
    return SECTION.format(table=markdown(cells), plot="plots/planning_errors.png", **sizes)


@dataclass
class Args:
    workers: int = 1
    """runs at a time; each uses one thread"""
    results: Path = RESULTS
    """folder of planning_errors.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    cells = [(name, budget) for name in (*SAMPLING, *SEARCH) for budget in BUDGETS]
    rows = measured_rows(args.results / "planning_errors.csv", KEY, cells, measure, args.workers)
    print(rows["error"].unstack("budget").round(4).to_string())


if __name__ == "__main__":
    main()
