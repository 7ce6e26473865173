"""algos/q_learning.py: updates by hand, limits against exact solutions, and Sutton and Barto's examples."""

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import policy_iteration
import pytest
import q_learning
import torch
from q_learning import Args, Transition, learn, read_args, train, update
from stable_baselines3.common.monitor import load_results
from tables import chain_of_the_notes, model, optimal, random_table, register
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ALGORITHMS = ("q-learning", "sarsa", "expected-sarsa", "double-q")
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def updated(args: Args, step: Transition, tables: list, next_action: int | None = None, count: int = 0, seed: int = 0):
    """Q (T, S, A) after the step, and the temporal difference; its pair has been updated `count` times before."""
    tables, counts = np.array(tables, float), np.full(np.shape(tables), count)
    tables, counts = tables.tolist(), counts.tolist()
    difference = update(tables, counts, step, next_action, args.exploration_start, args, random.Random(seed))
    assert (np.array(counts) - count).sum() == 1 and np.array(counts)[:, step.state, step.action].sum() > count
    return np.array(tables), difference


def last(iterator):
    return deque(iterator, maxlen=1)[0]


def learned(table: dict, **settings) -> np.ndarray:
    """Q (S, A) after `learn` in an environment with this table, which begins anywhere."""
    args = Args(register(table, anywhere=True, max_episode_steps=50), **settings)
    return np.mean(last(learn(gym.make(args.env_id), args))[0], 0)


# One update -------------------------------------------------------------------------------------------------


def test_the_pass_over_the_notes_five_transitions():
    """Gordon's example: right all the way, step size ½, from zeros on: R = −½, −½, −5, −½, 0."""
    table, args = chain_of_the_notes(), Args(learning_rate=0.5, gamma=1.0)
    tables, counts = np.zeros((1, 5, 2)).tolist(), np.zeros((1, 5, 2), int).tolist()
    for state in range(5):
        ((_, successor, reward, done),) = table[state][1]
        update(tables, counts, Transition(state, 1, reward, successor, done), None, 0.0, args, random.Random(0))
    assert np.array(tables)[0].T.tolist() == [[0, 0, 0, 0, 0], [-0.5, -0.5, -5, -0.5, 0]]


@pytest.mark.parametrize(
    "algorithm, next_value",
    [("q-learning", 8.0), ("sarsa", 2.0), ("expected-sarsa", 0.7 * 8 + 0.1 * (2 + 4 + 5))],
)
def test_a_target_is_what_its_definition_says(algorithm, next_value):
    """The next state's values are 2, 4, 8, 5; SARSA goes on with the first; ε = 0.4."""
    args = Args(algorithm=algorithm, learning_rate=0.25, gamma=0.5, exploration_start=0.4)
    tables, difference = updated(args, Transition(0, 1, 3.0, 1, False), [[[0, 1, 0, 0], [2, 4, 8, 5]]], 0)
    assert difference == pytest.approx(3 + 0.5 * next_value - 1)
    assert tables[0, 0].tolist() == pytest.approx([0, 1 + 0.25 * difference, 0, 0])
    assert tables[0, 1].tolist() == [2, 4, 8, 5]


def test_double_q_learning_chooses_with_one_table_and_judges_with_the_other():
    args = Args(algorithm="double-q", learning_rate=0.5, gamma=1.0)
    q = [[[0.0, 0.0], [1.0, 7.0]], [[0.0, 0.0], [30.0, 20.0]]]
    seen = set()
    for seed in range(20):
        tables, difference = updated(args, Transition(0, 0, 0.0, 1, False), q, seed=seed)
        first = tables[0, 0, 0] != 0
        assert difference == (20 if first else 1)
        assert tables[:, 0, 0].tolist() == ([10, 0] if first else [0, 0.5])
        seen.add(first)
    assert seen == {True, False}, "either table has its turns"


@each_algorithm
def test_nothing_follows_a_terminal_state(algorithm):
    q = np.full((1 + (algorithm == "double-q"), 2, 2), 100.0)
    args = Args(algorithm=algorithm, learning_rate=1.0)
    tables, _ = updated(args, Transition(0, 0, 3.0, 1, True), q, 0)
    assert 3 in tables[:, 0, 0]


def test_step_sizes_by_count():
    """The tenth update of a pair with ω = 0.7 moves it by 10^−0.7 of the way."""
    args = Args(rate_exponent=0.7, gamma=0.0)
    tables, difference = updated(args, Transition(0, 0, 1.0, 1, False), np.zeros((1, 2, 2)), count=9)
    assert difference == 1 and tables[0, 0, 0] == pytest.approx(10**-0.7)


def test_exploration():
    probabilities = q_learning.action_probabilities
    assert probabilities([1.0, 3.0, 3.0, 2.0], "epsilon", 0.2) == pytest.approx([0.05, 0.45, 0.45, 0.05])
    weights = np.exp(np.array([1.0, 3.0, -700.0]) / 0.5 - 6)
    assert probabilities([1.0, 3.0, -700.0], "boltzmann", 0.5) == pytest.approx(weights / weights.sum())


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_what_is_done_has_those_probabilities_and_their_schedule(exploration, monkeypatch):
    """From 0.9 to 0.1 over the first half of the run."""
    seen, original = [], q_learning.action_probabilities
    monkeypatch.setattr(q_learning, "action_probabilities", lambda *x: seen.append(x[1:]) or original(*x))
    args = Args("FrozenLake-v1", total_timesteps=100, exploration=exploration, exploration_start=0.9)
    last(learn(gym.make("FrozenLake-v1"), args))
    expected = [max(0.9 - 0.8 * step / 50, 0.1) for step in range(100)]
    assert [x[0] for x in seen] == [exploration] * 100 and [x[1] for x in seen] == pytest.approx(expected)


def updates_of(monkeypatch, args: Args) -> list[tuple[Transition, int | None]]:
    """What `learn` updates with, in its order: transitions, and the actions that follow them."""
    seen, original = [], q_learning.update
    monkeypatch.setattr(q_learning, "update", lambda *x: seen.append(x[2:4]) or original(*x))
    last(learn(gym.make(args.env_id), args))
    return seen


def test_sarsa_takes_the_action_that_it_bootstrapped_from(monkeypatch):
    seen = updates_of(monkeypatch, Args("FrozenLake-v1", algorithm="sarsa", exploration_start=0.9, total_timesteps=200))
    followed = [(x[1], y[0].action) for x, y in itertools.pairwise(seen) if not x[0].terminated]
    assert len(followed) > 100 and all(promised == taken for promised, taken in followed)


@pytest.mark.parametrize("algorithm", ["q-learning", "sarsa"])
def test_planning_is_updates_with_what_has_been_lived_through(algorithm, monkeypatch):
    """K = 3 after every step, drawn from all steps so far, no two alike; SARSA imagines an action for each."""
    env_id = register(
        {s: {a: [(1.0, s + 1, 0.0, s == 199)] for a in range(2)} for s in range(201)}, max_episode_steps=300
    )
    args = Args(env_id, algorithm=algorithm, planning_steps=3, exploration_start=0.9, total_timesteps=200)
    seen = updates_of(monkeypatch, args)
    assert len(seen) == 4 * 200 and all((action is None) == (algorithm == "q-learning") for _, action in seen)
    lived = [step for step, _ in seen[::4]]
    drawn = [lived[: i // 4 + 1].index(step) for i, (step, _) in enumerate(seen) if i % 4]
    assert len({*drawn}) > 100 and np.mean(np.array(drawn[300:]) < 50) > 0.1, "old ones, too"


# The whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["q-learning", "double-q"])
def test_goes_to_q_star_with_robbins_and_monros_step_sizes(algorithm):
    """To 0.02, in a random process whose rewards are noisy by where they lead."""
    table, gamma = random_table(1, states=4, actions=2), 0.5
    expected = policy_iteration.look_ahead(model(table), optimal(table, gamma), gamma)
    settings = dict(algorithm=algorithm, gamma=gamma, rate_exponent=0.95, exploration_start=1.0, exploration_end=1.0)
    found = learned(table, total_timesteps=300_000, **settings)
    assert np.abs(found - expected).max() < 0.02


@pytest.mark.parametrize("algorithm", ["sarsa", "expected-sarsa"])
def test_sarsa_evaluates_a_fixed_policy(algorithm, monkeypatch):
    """The uniform one, whatever the table says; against the linear system."""
    table, gamma, actions = random_table(2, states=4, actions=2), 0.5, 2
    chain = {s: {0: [(p / actions, *rest) for a in range(actions) for p, *rest in table[s][a]]} for s in table}
    values = policy_iteration.evaluation(model(chain), np.zeros(4, int), np.zeros(4), gamma, "exact")
    expected = policy_iteration.look_ahead(model(table), values, gamma)
    monkeypatch.setattr(q_learning, "action_probabilities", lambda values, *_: [0.5, 0.5])
    found = learned(table, algorithm=algorithm, gamma=gamma, rate_exponent=0.95, total_timesteps=300_000)
    assert np.abs(found - expected).max() < 0.03


@each_algorithm
@pytest.mark.parametrize("terminated", [False, True])
def test_a_time_limit_bootstraps_and_an_end_does_not(algorithm, terminated):
    """Reward 1 for ever, cut after ten steps, is worth 10 with γ = 0.9; a step that ends the episode 1."""
    table = {0: {a: [(1.0, 0, 1.0, terminated)] for a in range(2)}}
    args = Args(register(table, max_episode_steps=10), algorithm=algorithm, gamma=0.9, total_timesteps=4_000)
    tables, _, _ = last(learn(gym.make(args.env_id), args))
    assert np.mean(tables, 0)[0] == pytest.approx(1 if terminated else 10, rel=1e-3)


def greedy_return(q_values: np.ndarray) -> int:
    """Of one episode of CliffWalking-v1, which has no limit, of at most 100 steps."""
    env, total = gym.make("CliffWalking-v1"), 0
    obs, _ = env.reset()
    for _ in range(100):
        obs, reward, terminated, *_ = env.step(int(q_values[obs].argmax()))
        total += reward
        if terminated:
            break
    return total


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_cliff(seed):
    """Sutton and Barto's example 6.6: SARSA earns more while it learns; Q-learning's greedy path is the shorter one."""
    earned, paths = {}, {}
    for algorithm in ("q-learning", "sarsa"):
        args = Args(algorithm=algorithm, gamma=1.0, learning_rate=0.1, seed=seed, total_timesteps=40_000)
        env = gym.wrappers.TimeLimit(gym.make(args.env_id), 1000)
        steps = list(learn(env, args))
        earned[algorithm] = np.mean([x[2][0] for x in steps[20_000:] if x[2]])
        paths[algorithm] = greedy_return(np.mean(steps[-1][0], 0))
    assert paths["q-learning"] == -13 and -20 < paths["sarsa"] <= -15
    assert earned["sarsa"] > earned["q-learning"] + 10 and earned["sarsa"] > -35, earned


def test_double_q_learning_does_not_overestimate():
    """Example 6.7: even actions lead to ten of mean −0.1 and deviation 1, odd ones to the end; better is the latter."""

    class Bias(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(10)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.there = False
            return 0, {}

        def step(self, action):
            if self.there:
                return 1, self.np_random.normal(-0.1), True, False, {}
            self.there = action % 2 == 0
            went.append(self.there)
            return int(self.there), 0.0, not self.there, False, {}

    shares = {}
    for algorithm in ("q-learning", "double-q"):
        shares[algorithm] = []
        for seed in range(60):
            went = []
            last(learn(Bias(), Args(algorithm=algorithm, learning_rate=0.1, gamma=1.0, seed=seed, total_timesteps=200)))
            shares[algorithm].append(np.mean(went))
    single, double = (np.mean(shares[x]) for x in ("q-learning", "double-q"))
    assert single > double + 0.1, (single, double)


@pytest.mark.slow
def test_planning_saves_steps():
    """Real steps until the greedy path over the cliff's edge is first −13, over 10 seeds: a fifth with K = 20."""
    needed = {}
    for planning in (0, 20):
        counts = []
        for seed in range(10):
            args = Args(gamma=1.0, planning_steps=planning, seed=seed, total_timesteps=50_000)
            env = gym.wrappers.TimeLimit(gym.make(args.env_id), 1000)
            steps = enumerate(learn(env, args), 1)
            counts.append(next(i for i, (q, _, over) in steps if over and greedy_return(np.mean(q, 0)) == -13))
        needed[planning] = np.mean(counts)
    assert needed[0] >= 5 * needed[20], needed


# Runs -------------------------------------------------------------------------------------------------------


def test_the_file_alone_runs(tmp_path):
    """Warnings being errors, with everything at its default, within a minute; −13 is the shortest way."""
    shutil.copy(q_learning.__file__, tmp_path)
    command = [sys.executable, "-W", "error", "q_learning.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines()[-2:] == [
        "evaluation: -13.00 ± 0.00 over 100 episodes",
        f"run directory: runs/{folder.name}",
    ]
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "solution.npz", "policy.pt2"}
    table = load_results(str(folder))
    assert len(table) > 100 and table["l"].sum() <= 20_000
    assert json.loads((folder / "args.json").read_text())["args"]["gamma"] == 1, "recommended"
    events = EventAccumulator(str(folder)).Reload()
    returns = [x.value for x in events.Scalars("charts/episodic_return")]
    assert returns == table["r"].tolist() and events.Scalars("eval/episodic_return")[0].value == -13
    assert {"charts/episodic_length", "charts/SPS", "losses/td_error", "losses/q_values"} <= {*events.Tags()["scalars"]}
    policy = torch.export.load(folder / "policy.pt2").module()
    with np.load(folder / "solution.npz") as kept:
        assert policy(torch.arange(48)).tolist() == kept["policy"].tolist() == kept["Q"].argmax(1).tolist()
        assert kept["V"].tolist() == kept["Q"].max(1).tolist()


def test_the_same_seed_is_the_same_run(tmp_path):
    args = Args("FrozenLake-v1", total_timesteps=3_000, planning_steps=2, eval_episodes=3, output_dir=str(tmp_path))
    runs = [train(replace(args, seed=seed)) for seed in (1, 1, 2)]
    texts = [re.sub(r",[^,\n]+\n", "\n", (x["run_dir"] / "monitor.csv").read_text().split("t\n", 1)[1]) for x in runs]
    assert texts[0] == texts[1] != texts[2] and (runs[0]["Q"] == runs[1]["Q"]).all()
    assert (runs[0]["Q"] != runs[2]["Q"]).any()


def test_the_seed_is_the_environments_and_the_explorers():
    """One action alone leaves the environment's chance, and a table without chance the explorer's."""
    chance = {s: {0: [(0.5, 0, 0.0, False), (0.5, 1, 1.0, False)]} for s in range(2)}
    certain = {s: {a: [(1.0, a, float(a), False)] for a in range(2)} for s in range(2)}
    for table in (chance, certain):
        found = []
        for seed in (1, 2):
            args = Args(register(table, max_episode_steps=20), seed=seed, total_timesteps=100, exploration_start=0.9)
            found.append(last(learn(gym.make(args.env_id), args))[0])
        assert found[0] != found[1]


def test_episodes_without_a_limit_are_cut_after_1000_steps(capsys, tmp_path):
    """Up, against the wall, for ever: nothing else has a value above −1 here."""
    args = Args(total_timesteps=2_500, learning_rate=0.0, exploration_start=0.0, exploration_end=0.0, eval_episodes=2)
    found = train(replace(args, output_dir=str(tmp_path)))
    assert "CliffWalking-v1 has no time limit: episodes are cut after 1000 steps\n" in capsys.readouterr().out
    assert load_results(str(found["run_dir"]))["l"].max() <= 1000 and found["returns"].tolist() == [-1000, -1000]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPole-v1", ["Box(", "Discrete(2)", "dqn.py"]),
        ("--env-id Blackjack-v1", ["Tuple(", "no table"]),
        ("--learning-rate 1.5", ["--learning-rate", "from 0 to 1"]),
        ("--rate-exponent 2", ["--rate-exponent", "from 0 to 1"]),
        ("--planning-steps -1", ["--planning-steps", "0 or more"]),
        ("--exploration-start 1.5", ["--exploration-start"]),
        ("--exploration boltzmann --exploration-end 0", ["--exploration-end", "positive"]),
    ],
)
def test_refusals(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train(read_args(flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words), line
    assert not Path("runs").exists()


def test_a_reward_that_is_not_finite(capsys):
    with pytest.raises(SystemExit) as stop:
        train(Args(register({0: {0: [(1.0, 0, np.nan, False)]}}), total_timesteps=10))
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, least, flags",
    [("CliffWalking-v1", -13, ""), ("Taxi-v4", 7.5, ""), ("FrozenLake-v1", 0.71, "--eval-episodes 2000")],
)
def test_recommended_settings_solve_it(env_id, least, flags, tmp_path):
    """The interquartile mean of ten seeds; on the cliff each of them."""
    means = []
    for seed in range(1, 11):
        argv = f"--env-id {env_id} --seed {seed} {flags} --output-dir {tmp_path}".split()
        means.append(train(read_args(argv))["returns"].mean())
    middle = sorted(means)[2:8]
    assert (min(means) if env_id == "CliffWalking-v1" else np.mean(middle)) >= least, means
