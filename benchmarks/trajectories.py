"""Five ways down one problem: the cost of algos/ilqr.py's methods over their iterations.

    python benchmarks/trajectories.py      # a minute of one core; again after a kill: goes on

InvertedDoublePendulum-v5 from its evaluation's first start, 20 steps, the first guess being no force, 100 iterations at
most. Each method is a row of results/trajectories.csv, with J after every iteration.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import pandas as pd
import torch
import tyro
from estimates import markdown, number, plt, save, tidy
from rows import measured_rows
from run import RESULTS, ROOT, tree_sha256

ilqr = importlib.import_module("ilqr")  # run.py has put algos/ on the path

KEY = ["env_id", "method"]
METHODS = {"lqr": "LQR, once", "ilqr": "iLQR", "ddp": "DDP", "newton": "Newton", "gradient": "gradient"}
ENV, STEPS, ITERATIONS = "InvertedDoublePendulum-v5", 20, 100


def descent(env_id: str, method: str) -> dict:
    """J before and after every iteration, and the hash of what was run."""
    torch.set_num_threads(1)
    env = gym.make(env_id)
    env.reset(seed=1_000_001)
    problem = ilqr.PROBLEMS[env_id](env)
    args = ilqr.Args(method=method, iterations=ITERATIONS, tolerance=1e-13)
    costs = ilqr.optimise(problem, problem.state(), torch.zeros(1, STEPS, 1).double(), args).costs[:, 0]
    return {"costs": " ".join(map(repr, costs.tolist())), "code_sha256": code()}


def code() -> str:
    """Of what of ilqr.py is run here."""
    return tree_sha256((ROOT / "algos" / "ilqr.py").read_text(encoding="utf-8"), ("MuJoCo", "balance_cost", "optimise"))


SECTION = """
## Trajectory optimisation

The cost above the least that was found, over the iterations of [ilqr.py](../algos/ilqr.py)'s methods
({env}, {steps} steps from no force at all, [trajectories.py](trajectories.py)). One
step of LQR, taken whole, is worse than none; the same steps under a line search arrive. Look at the start: while the
poles are falling, second derivatives make Q_uu indefinite, and DDP and Newton wait for μ to grow. And look at how all
three end, ever more steeply: what iLQR leaves out vanishes with the cost.

{table}

![Cost above the least over iterations, five methods]({plot})
"""


def section(results: Path) -> str:
    """Of the page, "" without trajectories.csv; draws the plot."""
    path = results / "trajectories.csv"
    if not path.exists():
        return ""
    rows = pd.read_csv(path).set_index("method").reindex(list(METHODS)).dropna()
    changed = "" if (rows["code_sha256"] == code()).all() else " †"
    costs = {name: [float(x) for x in text.split()] for name, text in rows["costs"].items()}
    least = min(min(x) for x in costs.values())
    figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for name, values in costs.items():
        above = [max(x - least, 1e-12) for x in values]
        axes.plot(range(len(above)), above, marker=".", label=METHODS[name])
    axes.set(yscale="log", xlim=(0, 60))
    tidy(axes, "iteration", "J − least J")
    axes.legend(frameon=False)
    save(figure, results.parent / "plots" / "trajectories.png")
    cells = [
        {"method" + changed: METHODS[name], "J at the end": number(values[-1], 4)}
        | {"iterations until J is within 1 % of the least": within(values, least)}
        for name, values in costs.items()
    ]
    return SECTION.format(table=markdown(cells), plot="plots/trajectories.png", env=ENV, steps=STEPS)


def within(values: list[float], least: float) -> str:
    """The first iteration after which J is within 1 % of the least, or –."""
    return str(next((i for i, x in enumerate(values) if x <= 1.01 * least), "–"))


@dataclass
class Args:
    results: Path = RESULTS
    """folder of trajectories.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = measured_rows(args.results / "trajectories.csv", KEY, [(ENV, x) for x in METHODS], descent, 1)
    print(rows["costs"].str.split().map(lambda x: f"{x[-1]} after {len(x) - 1} iterations").to_string())


if __name__ == "__main__":
    main()
