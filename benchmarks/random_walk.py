"""Bias against variance: the error of TD(λ)'s values on the walk of 19 states, over λ and the step size α.

    python benchmarks/random_walk.py --workers 2      # ten minutes of one core; again after a kill: goes on

The root mean square error against the exact V, (s − 9) / 10, over the 19 states, in the mean over the first ten
episodes and 100 repetitions, of algos/td_lambda.py's updates (Sutton and Barto 2018, section 12.1: the off-line
λ-return algorithm, whose errors are those of TD(λ) in their figure 12.6 where α is small). Each λ and α is a row of
results/random_walk.csv.
"""

import copy
import importlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from estimates import markdown, number, plt, save, tidy
from rows import measured_rows
from run import RESULTS, ROOT, tree_sha256

td_lambda = importlib.import_module("td_lambda")  # run.py has put algos/ on the path

KEY = ["trace_decay", "learning_rate"]
DECAYS = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0)
RATES = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
EPISODES, REPETITIONS = 10, 100
TRUTH = (torch.arange(19) - 9) / 10


def error(trace_decay: float, learning_rate: float) -> dict:
    """Mean over the repetitions, its standard error, and the hash of what was run."""
    torch.set_num_threads(1)
    args, errors = td_lambda.Args(trace_decay=trace_decay, gamma=1.0), []
    states = torch.arange(19)
    for seed in range(REPETITIONS):
        env = td_lambda.RandomWalk()
        env.action_space.seed(seed)
        value = td_lambda.ValueFunction(env.observation_space, env.action_space, (), False)
        target = copy.deepcopy(value).requires_grad_(False)
        optimizer, sizes = torch.optim.SGD(value.parameters(), learning_rate), []
        for _ in range(EPISODES):
            episode = td_lambda.play(env, lambda obs: env.action_space.sample())  # noqa: B023  (called at once)
            optimizer.zero_grad()
            td_lambda.td_loss(value, target, episode, args).backward()
            optimizer.step()
            target.load_state_dict(value.state_dict())
            with torch.no_grad():
                sizes.append((value(states, states) - TRUTH).square().mean().sqrt().item())
        errors.append(np.mean(sizes))
    return {"error": np.mean(errors), "deviation": np.std(errors) / REPETITIONS**0.5, "code_sha256": code()}


def code() -> str:
    """Of what of td_lambda.py is run here."""
    text = (ROOT / "algos" / "td_lambda.py").read_text(encoding="utf-8")
    return tree_sha256(text, ("RandomWalk", "ValueFunction", "play", "td_loss"))


SECTION = """
## Bias against variance

The error of TD(λ)'s values, [td_lambda.py](../algos/td_lambda.py), on the walk of 19 states in its first {episodes}
episodes, mean of {repetitions} ([random_walk.py](random_walk.py)). λ = 0 believes its own estimates, which are wrong at
first; λ = 1 believes whole noisy returns. Look at each λ's best step size: the least error is between them
(Sutton and Barto 2018, figures 12.3 and 12.6).

{table}

![Error over the step size for each λ, and the best over λ]({plot})
"""


def section(results: Path) -> str:
    """Of the page, "" without random_walk.csv; draws the plot."""
    path = results / "random_walk.csv"
    if not path.exists():
        return ""
    rows = pd.read_csv(path)
    changed = "" if (rows["code_sha256"] == code()).all() else " †"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    best = rows.loc[rows.groupby("trace_decay")["error"].idxmin()]
    for decay, mine in rows.groupby("trace_decay"):
        left.plot(mine["learning_rate"], mine["error"].clip(upper=1), marker=".", label=f"λ = {decay:g}")
    left.set(xscale="log", ylim=(0.3, 0.56))
    tidy(left, "step size α", "RMS error of V")
    right.errorbar(range(len(best)), best["error"], 1.96 * best["deviation"], marker="o", capsize=3, label="best α")
    right.set(xticks=range(len(best)), xticklabels=[f"{x:g}" for x in best["trace_decay"]])
    tidy(right, "λ", "")
    save(figure, results.parent / "plots" / "random_walk.png")
    cells = [
        {"λ" + changed: f"{x.trace_decay:g}", "best α": f"{x.learning_rate:g}", "RMS error": number(x.error, 3)}
        | {"± (95 %)": number(1.96 * x.deviation, 3)}
        for x in best.itertuples()
    ]
    return SECTION.format(
        table=markdown(cells), plot="plots/random_walk.png", episodes=EPISODES, repetitions=REPETITIONS
    )


@dataclass
class Args:
    workers: int = 1
    """runs at a time; each uses one thread"""
    results: Path = RESULTS
    """folder of random_walk.csv"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = measured_rows(args.results / "random_walk.csv", KEY, [*product(DECAYS, RATES)], error, args.workers)
    print(rows["error"].unstack("learning_rate").round(3).to_string())


if __name__ == "__main__":
    main()
