"""How fast policy_iteration.py plans: against plain NumPy, pymdptoolbox and mdpsolver, one thread each.

    OMP_NUM_THREADS=1 python benchmarks/value_iteration.py          # five minutes, 6 GiB; peers that are not installed
    pip install pymdptoolbox mdpsolver                              # are left out

Random processes of 4 actions with 5 successors each, γ = 0.95, no files: prints seconds and ratios in rounds, ours and
the other in turn. A sweep over 10⁶ states against the expression (P * V[successors]).sum(-1) alone; the peak of memory
in a sweep; value iteration to 0.001 from V* over 10⁴ states against pymdptoolbox's, on sparse matrices and on dense
arrays, and over 10⁶ against mdpsolver's (C++). All three stop by the span of a sweep's change.
"""

import importlib
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import tyro
from run import ROOT  # noqa: F401  (puts algos/ on the path)

planner = importlib.import_module("policy_iteration")
ACTIONS, SUCCESSORS, GAMMA, TOLERANCE = 4, 5, 0.95, 1e-3


def random_model(states: int) -> "planner.Model":
    """Rewards are normal, successors uniform, their probabilities a flat Dirichlet's."""
    rng, shape = np.random.default_rng(0), (states, ACTIONS, SUCCESSORS)
    p = rng.standard_exponential(shape)
    p /= p.sum(-1, keepdims=True)
    return planner.Model(rng.normal(size=shape[:2]), p, rng.integers(states, size=shape))


def solve(model) -> np.ndarray:
    """V (S,), at most TOLERANCE from V*: the loop of policy_iteration.py's solve(), of value iteration."""
    scale = GAMMA / (1 - GAMMA)
    for values, _, difference in planner.modified_policy_iteration(model, GAMMA, 1):
        low, high = difference.min(), difference.max()
        if scale * (high - low) / 2 <= TOLERANCE:
            return values + scale * (low + high) / 2


def toolbox(model, dense: bool):
    """The same by pymdptoolbox, as a function, or None; its examples have dense arrays (A, S, S)."""
    try:
        mdp = importlib.import_module("mdptoolbox.mdp")
    except ImportError:
        return None
    states = len(model.rewards)
    rows = np.repeat(np.arange(states), SUCCESSORS)
    matrices = [
        scipy.sparse.csr_matrix((p.ravel(), (rows, to.ravel())), (states, states))
        for p, to in zip(model.going_on.swapaxes(0, 1), model.successors.swapaxes(0, 1))
    ]

    matrices = np.stack([x.toarray() for x in matrices]) if dense else matrices

    def run() -> tuple[float, np.ndarray]:
        solver = mdp.ValueIteration(matrices, model.rewards, GAMMA, TOLERANCE)  # checks all it is given: not counted
        return seconds(solver.run)[0], np.array(solver.V)

    return run


def cpp(model):
    """The same by mdpsolver, as a function, or None."""
    try:
        module = importlib.import_module("mdpsolver")
    except ImportError:
        return None

    def run() -> tuple[float, np.ndarray]:
        solver = module.model()  # a new one: an old one would begin where it ended
        lists = (x.tolist() for x in (model.rewards, model.going_on, model.successors))
        solver.mdp(GAMMA, rewards=next(lists), tranMatProbs=next(lists), tranMatColumns=next(lists))
        took, _ = seconds(lambda: solver.solve("vi", TOLERANCE, parallel=False, makeFinalCheck=False))
        return took, np.array(solver.getValueVector())

    return run


def seconds(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(name: str, ours, other, rounds: int, what: str) -> None:
    """Prints a line for each round: seconds of both, and their ratio."""
    if other is None:
        return print(f"{name}: not installed")
    for _ in range(rounds):
        (mine, values), (theirs, expected) = seconds(ours), other()
        apart = (
            ""
            if expected is None or values is None
            else f", V apart by {np.ptp(values - expected):.0e} but for a constant"
        )
        print(f"{name}: ours {mine:.3f} s, {what} {theirs:.3f} s, ours over it {mine / theirs:.2f}{apart}", flush=True)


@dataclass
class Args:
    states: int = 1_000_000
    """of the large process"""
    rounds: int = 5
    """of each comparison; mdpsolver two"""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    small = random_model(min(10_000, args.states))
    compare("10⁴ states", lambda: solve(small), toolbox(small, False), args.rounds, "pymdptoolbox, sparse,")
    compare("10⁴ states", lambda: solve(small), toolbox(small, True), min(args.rounds, 2), "pymdptoolbox, dense,")
    model = random_model(args.states)
    size = sum(x.nbytes for x in model)
    sweeps = planner.modified_policy_iteration(model, GAMMA, 1)
    values = next(sweeps)[0]
    tracemalloc.start()
    next(sweeps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"a sweep's peak of memory: {1 + peak / size:.2f} times the model's arrays, {size / 2**20:.0f} MiB")

    def expression() -> tuple[float, None]:
        return seconds(lambda: (model.going_on * values[model.successors]).sum(-1))[0], None

    def sweep() -> None:
        next(sweeps)

    compare("a sweep", sweep, expression, args.rounds, "NumPy's expression")
    compare(f"{args.states:,} states", lambda: solve(model), cpp(model), min(args.rounds, 2), "mdpsolver")


if __name__ == "__main__":
    main()
