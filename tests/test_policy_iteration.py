"""algos/policy_iteration.py against linear programs, the notes' table, and what the theory promises at every step."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import policy_iteration
import pytest
import scipy.sparse
import torch
from policy_iteration import Args, evaluation, modified_policy_iteration, solve
from scipy.optimize import linprog
from tables import chain_of_the_notes, model, optimal, random_table, register, table_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(policy_iteration.__file__)
SCHEDULES = [(sweeps, q) for sweeps in (1, 3, 20, "exact") for q in (False, True)]


def linear_program(table: dict, gamma: float) -> np.ndarray:
    """V* (S,): the least V that is nowhere below a look ahead from it. It knows of no Model."""
    states, actions = len(table), len(table[0])
    constraints, bounds = scipy.sparse.lil_matrix((states * actions, states)), np.zeros(states * actions)
    for i, (s, a) in enumerate(itertools.product(range(states), range(actions))):
        constraints[i, s] -= 1
        for p, successor, reward, done in table[s][a]:
            constraints[i, successor] += 0 if done else gamma * p
            bounds[i] -= p * reward
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    solution = linprog(np.ones(states), constraints.tocsr(), bounds, bounds=(None, None), options=options)
    assert solution.success
    return solution.x


# The solution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["FrozenLake8x8-v1", "Taxi-v4", "CliffWalking-v1"])
@pytest.mark.parametrize("sweeps, q", [(1, False), (5, True), ("exact", False)])
def test_equals_the_linear_program(env_id, sweeps, q, tmp_path):
    found = solve(Args(env_id, evaluation_sweeps=sweeps, q=q, eval_episodes=1, output_dir=str(tmp_path)))
    assert np.abs(found["V"] - linear_program(table_of(env_id), 0.99)).max() < 1e-8


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_linear_program_on_random_tables(seed, tmp_path):
    table, (sweeps, q), gamma = random_table(seed), SCHEDULES[seed % 8], (0.0, 0.5, 0.9, 0.99)[seed % 4]
    expected = linear_program(table, gamma)
    args = Args(register(table), evaluation_sweeps=sweeps, q=q, gamma=gamma, eval_episodes=1, output_dir=str(tmp_path))
    found = solve(args)
    assert np.abs(found["V"] - expected).max() < 1e-8
    with np.load(found["run_dir"] / "solution.npz") as kept:
        assert all((kept[name] == found[name]).all() for name in ("V", "Q", "policy")) and len(kept.files) == 3
    values = evaluation(model(table), found["policy"], np.zeros(len(table)), gamma, "exact")
    assert np.abs(values - expected).max() < 1e-7, "the policy's own value"


@pytest.mark.parametrize("sweeps, q", SCHEDULES)
def test_the_chain_of_the_notes(sweeps, q, tmp_path):
    """Gordon's table of V*, Q* and A*, number for number, with γ = 1."""
    env_id = register(chain_of_the_notes())
    found = solve(Args(env_id, evaluation_sweeps=sweeps, q=q, gamma=1.0, eval_episodes=1, output_dir=str(tmp_path)))
    assert found["V"].tolist() == [-13, -12, -11, -1, 0]
    assert found["Q"].T.tolist() == [[-14, -14, -13, -12, 0], [-13, -12, -11, -1, 0]]
    assert (found["Q"] - found["V"][:, None]).T.tolist() == [[-1, -2, -2, -11, 0], [0, 0, 0, 0, 0]]
    assert found["returns"].tolist() == [-13]


@pytest.mark.parametrize("seed", range(6))
def test_stochastic_shortest_paths(seed, tmp_path):
    """γ = 1 with every step at a cost, so that a policy that never ends is worse than any other."""
    table = random_table(seed, end=0.2)
    table = {s: {a: [(p, t, -abs(r) - 0.1, end) for p, t, r, end in x] for a, x in y.items()} for s, y in table.items()}
    for sweeps, q in SCHEDULES:
        iterates = modified_policy_iteration(model(table), 1.0, sweeps, q)
        _, q_values, _ = next(x for x in iterates if np.abs(x[2]).max() < 1e-11)
        assert np.abs(q_values.max(1) - linear_program(table, 1.0)).max() < 1e-8


def test_a_policy_that_never_ends_is_no_solution(tmp_path):
    """On FrozenLake to walk along the upper edge for ever is worth as much, by Q* alone, as to walk to the goal."""
    for sweeps in (1, 7, "exact"):
        found = solve(Args("FrozenLake-v1", evaluation_sweeps=sweeps, gamma=1.0, output_dir=str(tmp_path)))
        values = evaluation(model(table_of("FrozenLake-v1")), found["policy"], np.zeros(16), 1.0, "exact")
        assert np.abs(values - found["V"]).max() < 1e-6 and found["V"][0] == pytest.approx(14 / 17)


# Every step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [False, True])
@pytest.mark.parametrize("table", [random_table(3), chain_of_the_notes()], ids=["random", "chain"])
def test_a_sweep_is_a_contraction(table, q):
    """‖V_{k+1} − V*‖ ≤ γ ‖V_k − V*‖, at every iteration."""
    gamma, values = 0.9, optimal(table, 0.9)
    target = policy_iteration.look_ahead(model(table), values, gamma) if q else values
    errors = [np.abs(target).max()]
    for iterate, *_ in itertools.islice(modified_policy_iteration(model(table), gamma, 1, q), 100):
        errors.append(np.abs(iterate - target).max())
        assert errors[-1] <= gamma * errors[-2] + 1e-12
    assert errors[-1] < 1e-3 < errors[1]


@pytest.mark.parametrize("table", [random_table(5, states=40), table_of("FrozenLake8x8-v1")], ids=["random", "lake"])
@pytest.mark.parametrize("gamma", [0.95, 1.0])
def test_policy_iteration_improves_in_every_state_and_ends(table, gamma, monkeypatch):
    """By V^π of one policy and the next, up to the first whose value is V*; no policy comes twice."""
    policies, values = [], []

    def watched(chain, policy, *rest):
        policies.append(tuple(policy))
        values.append(evaluation(chain, policy, *rest))
        return values[-1]

    monkeypatch.setattr(policy_iteration, "evaluation", watched)
    if gamma == 1 and len(table) == 40:  # at a cost
        table = {s: {a: [(p, t, -1.0, end) for p, t, _, end in x] for a, x in y.items()} for s, y in table.items()}
    changes = [
        np.abs(x[2]).max() for x in itertools.islice(modified_policy_iteration(model(table), gamma, "exact"), 30)
    ]
    last = policies.index(policies[-1])
    assert 1 < last < 20 and len({*policies}) == last + 1 and policies[last:] == [policies[-1]] * (len(policies) - last)
    for old, new in itertools.pairwise(values[: last + 1]):
        assert (new >= old - 1e-12).all() and (new > old + 1e-12).any()
    assert max(changes[last + 2 :]) < 1e-12


@pytest.mark.parametrize("sweeps, q", SCHEDULES)
@pytest.mark.parametrize("tolerance", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_what_is_reached_is_within_the_tolerance_and_as_said(sweeps, q, tolerance, end, capsys, tmp_path):
    """V and Q; where nothing ends the bound is far below γ / (1 − γ) times the change, and half of it elsewhere."""
    table, gamma = random_table(2, end=end), 0.97
    args = Args(register(table), evaluation_sweeps=sweeps, q=q, gamma=gamma, tolerance=tolerance, eval_episodes=1)
    args.output_dir = str(tmp_path)
    found = solve(args)
    said = float(re.search(r"\d+ iterations: ‖V − V\*‖ ≤ (\S+)\n", capsys.readouterr().out)[1])
    best = policy_iteration.look_ahead(model(table), optimal(table, gamma), gamma)
    error = np.abs(found["Q"] - best).max()
    assert (found["V"] == found["Q"].max(1)).all() and error <= said * 1.1 <= tolerance * 1.1
    events = EventAccumulator(str(found["run_dir"])).Reload()
    bounds = [x.value for x in events.Scalars("losses/error_bound")]
    assert bounds[-1] == pytest.approx(said, rel=0.05) and min(bounds[:-1]) > tolerance, "it stops at once"


@pytest.mark.parametrize("states", [1, 12])
def test_where_nothing_ends_few_sweeps_are_enough(states, capsys, tmp_path):
    """The same reward everywhere: the second iterate is V* = 100 but for a constant, which the bounds know."""
    table = {s: {0: [(1.0, (s + 1) % states, 1.0, False)]} for s in range(states)}
    args = Args(register(table, max_episode_steps=9), evaluation_sweeps=1, eval_episodes=1, output_dir=str(tmp_path))
    assert solve(args)["V"] == pytest.approx(100)
    assert re.search(r"^1 iterations", capsys.readouterr().out, re.MULTILINE)


def test_the_bound_is_tight():
    """One state, reward 1 for ever: after k sweeps γᵏ / (1 − γ) is missing, and that is what the bound says."""
    table = {0: {0: [(1.0, 0, 1.0, False)]}}
    for k, (values, _, difference) in enumerate(
        itertools.islice(modified_policy_iteration(model(table), 0.5, 1), 30), 1
    ):
        assert 2 - values[0] == pytest.approx(0.5**k / 0.5) == pytest.approx(0.5 / (1 - 0.5) * difference[0])


@pytest.mark.parametrize("q", [False, True])
def test_sweeps_lie_between_value_and_policy_iteration(q):
    """k sweeps are the maximum and k − 1 times T_π; many of them are the linear system's solution."""
    table, gamma = random_table(7), 0.9
    first, second = itertools.islice(modified_policy_iteration(model(table), gamma, 3, q), 2)
    policy, expected = first[1].argmax(1), first[0]
    for _ in range(2):
        ahead = policy_iteration.look_ahead(model(table), expected[range(12), policy] if q else expected, gamma)
        expected = ahead if q else ahead[range(12), policy]
    ahead = policy_iteration.look_ahead(model(table), expected.max(1) if q else expected, gamma)
    np.testing.assert_allclose(second[1], ahead, rtol=1e-12)
    many, exact = (evaluation(model(table), policy, first[0], gamma, sweeps) for sweeps in (400, "exact"))
    np.testing.assert_allclose(many, exact, rtol=1e-10)


# The table --------------------------------------------------------------------------------------------------


def test_rows_of_several_lengths_and_what_ends():
    table = {0: {0: [(0.25, 1, 4.0, True), (0.75, 1, 8.0, False)]}, 1: {0: [(1.0, 0, -1.0, False)]}}
    found = model(table)
    assert found.rewards.tolist() == [[7], [-1]]
    assert found.going_on.tolist() == [[[0, 0.75]], [[1, 0]]]
    assert found.successors[0, 0].tolist() == [1, 1] and found.successors[1, 0, 0] == 0


@pytest.mark.parametrize(
    "rows, word",
    [
        ([(0.5, 0, 0.0, False)], "sum to 1"),
        ([(1.5, 0, 0.0, False), (-0.5, 0, 0.0, False)], "sum to 1"),
        ([(1.0, 0, np.nan, False)], "not finite"),
        ([(1.0, 0, 0.0)], "rows"),
    ],
)
def test_a_table_that_is_none(rows, word, capsys):
    with pytest.raises(SystemExit) as stop:
        solve(Args(register({0: {0: rows}})))
    assert stop.value.code == 2 and word in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPole-v1", "no table, q_learning.py"),
        ("--env-id Blackjack-v1", "no table, q_learning.py"),
        ("--env-id NoSuch-v0", "--env-id"),
        ("--gamma 1.5", "--gamma, from 0 to 1"),
        ("--evaluation-sweeps 0", "--evaluation-sweeps, at least 1"),
        ("--tolerance 0", "--tolerance, positive"),
    ],
)
def test_refusals(flags, words, capsys):
    """One line, exit code 2, and no run directory."""
    with pytest.raises(SystemExit) as stop:
        solve(policy_iteration.read_args(flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words.split(", ")), line
    assert not Path("runs").exists()


def test_too_many_states_for_a_linear_system(capsys):
    with pytest.raises(SystemExit):
        solve(Args(register({s: {0: [(1.0, s, 0.0, True)]} for s in range(10_001)})))
    assert "--evaluation-sweeps 50" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, sweeps, state",
    [
        ({0: {0: [(1.0, 1, 0.0, True)]}, 1: {0: [(1.0, 1, 0.0, False)]}}, 1, 1),
        # Back and forth between two states pays 0.3 a round; the first policies end.
        (
            {
                0: {0: [(1.0, 0, -1.0, True)], 1: [(1.0, 1, 0.5, False)]},
                1: {0: [(1.0, 0, -1.0, True)], 1: [(1.0, 0, -0.2, False)]},
            },
            "exact",
            0,
        ),
    ],
    ids=["none can end", "the better one does not end"],
)
def test_what_never_ends_has_no_value_without_a_discount(table, sweeps, state, capsys):
    with pytest.raises(SystemExit) as stop:
        list(itertools.islice(modified_policy_iteration(model(table), 1.0, sweeps), 10))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"state {state}" in line and "--gamma" in line


def test_it_stops_at_max_iterations_and_says_so(capsys, tmp_path):
    env_id = register({0: {0: [(1.0, 0, 0.0, True)], 1: [(1.0, 0, 1.0, False)]}}, max_episode_steps=10)
    found = solve(Args(env_id, gamma=1.0, evaluation_sweeps=1, max_iterations=20, output_dir=str(tmp_path)))
    assert found["V"].tolist() == [20]
    assert "20 iterations: the last changed V by 1.0e+00, above --tolerance\n" in capsys.readouterr().out


def test_a_tolerance_below_rounding(capsys, tmp_path):
    solve(Args("FrozenLake-v1", evaluation_sweeps=1, tolerance=1e-300, eval_episodes=1, output_dir=str(tmp_path)))
    assert re.search(r"iterations: ‖V − V\*‖ ≤ .*e-1[34], above --tolerance\n", capsys.readouterr().out)


# What it writes and prints ----------------------------------------------------------------------------------


def test_the_file_alone_runs(tmp_path):
    """Warnings being errors, with everything at its default."""
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, "-W", "error", SCRIPT.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    evaluation_, run_dir = done.stdout.splitlines()[-2:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"evaluation: 0\.\d\d ± 0\.\d\d over 100 episodes", evaluation_)
    assert run_dir == f"run directory: runs/{folder.name}"
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "solution.npz", "policy.pt2"}
    about = json.loads((folder / "args.json").read_text())
    assert about["algo"] == "policy_iteration" and about["args"]["gamma"] == 0.99
    assert about["versions"].keys() == {"python", "torch", "gymnasium", "numpy"} and len(about["script_sha256"]) == 64


def test_the_policy_of_a_grid_in_arrows(capsys, tmp_path):
    solve(Args("CliffWalking-v1", gamma=1.0, evaluation_sweeps=1, eval_episodes=1, output_dir=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == ["→" * 11 + "↓"] * 3 and lines[4].startswith("↑")
    solve(Args("FrozenLake-v1", gamma=1.0, eval_episodes=1, output_dir=str(tmp_path)))
    assert capsys.readouterr().out.splitlines()[:4] == ["←↑↑↑", "←·←·", "↑↓←·", "·→↓·"]


def test_policy_pt2_is_the_table(tmp_path):
    found = solve(Args("Taxi-v4", eval_episodes=1, output_dir=str(tmp_path)))
    policy = torch.export.load(found["run_dir"] / "policy.pt2").module()
    for states in (torch.arange(500), torch.tensor([7])):
        assert policy(states).tolist() == found["policy"][states.numpy()].tolist()


def test_evaluation_plays_the_policy_from_seeds_of_its_own(tmp_path):
    found = solve(Args("FrozenLake-v1", eval_episodes=30, seed=4, output_dir=str(tmp_path)))
    env, returns = gym.make("FrozenLake-v1"), []
    for i in range(30):
        obs, over, total = env.reset(seed=1_000_004 + i)[0], False, 0.0
        while not over:
            obs, reward, terminated, truncated, _ = env.step(int(found["policy"][obs]))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert found["returns"].tolist() == returns and 0 < np.mean(returns) < 1


def test_evaluation_cuts_episodes_where_nothing_else_does(capsys, tmp_path):
    """With γ = 0 every way is as good: up, for ever."""
    found = solve(Args("CliffWalking-v1", gamma=0.0, eval_episodes=2, output_dir=str(tmp_path)))
    assert found["returns"].tolist() == [-1000, -1000]
    assert "CliffWalking-v1 has no time limit: episodes are cut after 1000 steps\n" in capsys.readouterr().out


def test_capture_video(tmp_path):
    found = solve(Args("FrozenLake-v1", eval_episodes=2, capture_video=True, output_dir=str(tmp_path)))
    assert list(found["run_dir"].glob("videos/*.mp4"))
