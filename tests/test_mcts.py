"""algos/mcts.py: its bookkeeping by hand, its values against exhaustive search, its simulator against environments."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import mcts
import numpy as np
import pytest
from gymnasium.spaces import Discrete
from mcts import Args, Node, Simulator, key, play
from planning_errors import Layered, searched
from scipy.stats import binom, chisquare
from stable_baselines3.common.monitor import load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(mcts.__file__)
STATED = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "FrozenLake-v1", "Taxi-v4", "CliffWalking-v1"]


def below(root: Node) -> list[Node]:
    """Root and every node that can be reached from it, once each."""
    found = {root: None}
    for node in (waiting := [root]):
        fresh = [x for outcomes in node.outcomes for x in outcomes if x not in found]
        found |= dict.fromkeys(fresh)
        waiting += dict.fromkeys(fresh)
    return list(found)


# Bookkeeping ------------------------------------------------------------------------------------------------


def test_visits_and_values_add_up():
    """A node was met once more than it was visited, when it was made; other visits of an action ended there."""
    root, depths = searched(Layered(), Args(simulations=500, rollout_depth=4, gamma=0.9))
    assert root.visits == 500 and max(depths) <= 4
    met, tree = Counter(), below(root)
    for node in tree:
        assert node.visits == sum(node.counts)
        assert all(outcomes.total() <= count for outcomes, count in zip(node.outcomes, node.counts))
        met.update(sum(node.outcomes, Counter()))
        for total, count in zip(node.totals, node.counts):
            assert node.low * max(count, 1) - 1e-9 <= total <= node.high * count + 1e-9 if count else total == 0
        assert node.visits == 0 or node.value == max(q / n for q, n in zip(node.totals, node.counts) if n)
    assert root not in met and all(met[node] == node.visits + 1 for node in tree if node is not root)
    assert len(tree) < 12, "what is observed is the state: one node for each, though several ways lead there"


def test_bellman_backups_are_the_outcomes_values():
    """Q(a) / N(a) is the mean reward and γ times the mean of the values of the outcomes met, an end's being 0."""
    node, near, far, args = Node(2), Node(2), Node(2), Args(gamma=0.5, backup="bellman")
    near.value, far.value = 3.0, 8.0
    for outcome, reward in ((near, 1.0), (far, 2.0), (None, 6.0), (near, 1.0)):
        node.add(1, reward, outcome, 100.0, args)
    assert node.counts == [0, 4] and node.value == node.totals[1] / 4 == (10 + 0.5 * (3 + 8 + 3)) / 4
    node.add(0, 7.0, None, 0.0, args)
    assert node.value == 7 and (node.low, node.high) == (0, 100), "of the returns"
    far.add(0, 80.0, None, 80.0, args)
    node.add(1, 2.0, far, 80.0, args)
    assert node.value == (12 + 0.5 * (3 + 80 + 3 + 80)) / 5, "as they are now"


@pytest.mark.parametrize("backup", ["mean", "bellman"])
def test_a_leaf_is_worth_its_rollout_of_random_actions(backup):
    """Three steps, each paid by its action 0, 1 or 2: the first is the tree's, the others are the rollout's."""

    class Paid(gym.Env):
        observation_space, action_space, actions = Discrete(4), Discrete(3), ()

        def step(self, action):
            self.actions = (*self.actions, action)
            return len(self.actions), float(action), len(self.actions) == 3, False, {}

    rollouts, args = [], Args(simulations=1, gamma=0.5, backup=backup)
    for seed in range(300):
        root, _ = searched(env := Paid(), args, seed)
        assert env.actions == (), "it is the simulator that plays"
        action = root.counts.index(1)
        (leaf,) = root.outcomes[action]
        assert root.value == action + 0.5 * leaf.value and leaf.visits == 0
        rollouts.append(leaf.value)
    values, counts = np.unique(rollouts, return_counts=True)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3], "a + b / 2"
    assert chisquare(counts, 300 * np.array([1, 1, 2, 1, 2, 1, 1]) / 9).pvalue > 1e-3


def test_a_circle_ends():
    """Around two states for ever, for 1 a step: as deep as a rollout, then the state's value."""

    class Circle(gym.Env):
        observation_space, action_space, at = Discrete(2), Discrete(1), 0

        def step(self, action):
            self.at = 1 - self.at
            return self.at, 1.0, False, False, {}

    for backup in ("mean", "bellman"):
        root, depths = searched(Circle(), Args(simulations=2_000, rollout_depth=9, gamma=0.8, backup=backup))
        assert max(depths) == 10 and root.totals[0] == pytest.approx(5 * root.visits, rel=0.05), "1 / (1 − γ)"


def test_returns_are_backed_up_with_discount():
    """Along a corridor in which step t is paid t + 1, and which ends after six steps: by hand, at every node."""

    class Corridor(gym.Env):
        observation_space, action_space, at = Discrete(7), Discrete(1), 0

        def step(self, action):
            self.at += 1
            assert self.at <= 6, "no simulation goes on past an end"
            return self.at, float(self.at), self.at == 6, False, {}

    args = Args(simulations=9, gamma=0.5, rollout_depth=50)
    root, depths = searched(Corridor(), args)
    assert depths == [1, 2, 3, 4, 5, 6, 6, 6, 6]
    node = root
    for at in range(6):
        expected = sum((k + 1) * 0.5 ** (k - at) for k in range(at, 6))
        assert node.totals[0] / node.counts[0] == pytest.approx(expected) and node.visits == 9 - at
        assert node.low == pytest.approx(node.high)
        node = next(iter(node.outcomes[0]), None)
    assert node is None
    root, _ = searched(Corridor(), replace(args, simulations=1, rollout_depth=2))
    assert root.totals == [1 + 0.5 * (2 + 0.5 * 3)], "a rollout is cut after --rollout-depth steps below the leaf"


def test_the_score_is_its_formula():
    node = Node(3)
    for action, value in ((0, 10.0), (0, 14.0), (1, 11.0), (2, 18.0), (2, 8.0), (2, 10.0)):
        node.add(action, 0.0, None, value, Args())
    assert (node.visits, node.low, node.high) == (6, 8, 18)
    assert node.counts == [2, 1, 3] and node.totals == [24, 11, 36]
    for c, best in ((0.01, (0, 2)), (1.0, (1,))):
        means = [(q / n - 8) / 10 for q, n in zip(node.totals, node.counts)]
        scores = [m + 2 * c * math.sqrt(2 * math.log(6) / n) for m, n in zip(means, node.counts)]
        assert node.select(c, random.Random(0)) == int(np.argmax(scores)) and int(np.argmax(scores)) in best
    for c in np.linspace(0.01, 0.5, 50):
        scores = [m + 2 * c * math.sqrt(2 * math.log(6) / n) for m, n in zip(means, node.counts)]
        assert node.select(c, random.Random(0)) == int(np.argmax(scores)), c
    assert node.best() == 2 and node.value == 12
    node.add(0, 0.0, None, 0.0, Args())
    assert node.best() == 2, "of as many visits, the greater mean"


def test_what_was_never_tried_goes_first_and_equals_are_drawn():
    """Of 0.1 three times the mean is not quite 0.1: where all were equal, the bonus decides, and no rounding."""
    node, dice = Node(4), random.Random(0)
    node.add(1, 0.0, None, 0.1, Args())
    assert {node.select(0.2, dice) for _ in range(100)} == {0, 2, 3}
    for action in (0, 0, 0, 1, 1, 2, 3):
        node.add(action, 0.0, None, 0.1, Args())
    assert {node.select(1e-300, dice) for _ in range(100)} == {2, 3}
    for action in (2, 2, 3, 3):
        node.add(action, 0.0, None, 0.1, Args())
    assert {node.select(1e-300, dice) for _ in range(100)} == {0, 1, 2, 3}
    node.add(0, 0.0, None, 0.1, Args())
    assert {node.select(1e-300, dice) for _ in range(100)} == {1, 2, 3}


def test_the_scale_of_rewards_does_not_matter():
    """Times a power of two, every count is the same; low and high are each node's own."""
    args = Args(simulations=400, rollout_depth=4)
    trees = [below(searched(Layered(scale=scale), args)[0]) for scale in (1.0, 1024.0, 2.0**-20)]
    for ours, *others in zip(*trees):
        assert all(ours.counts == x.counts for x in others)
    assert trees[1][0].value == pytest.approx(1024 * trees[0][0].value)


# Against exhaustive search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", ["mean", "bellman"])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_values_approach_exhaustive_expectimax(gamma, backup):
    """Five processes, three seeds: the error falls with the simulations, and is small in the end."""
    errors = {n: [] for n in (30, 300, 3_000)}
    for seed in range(5):
        env = Layered(seed)
        exact = env.q_values(gamma)[0].max()
        for simulations, found in errors.items():
            args = Args(simulations=simulations, rollout_depth=4, gamma=gamma, backup=backup, c=0.2)
            found += [abs(searched(env, args, i)[0].value - exact) for i in range(3)]
    mean = [np.mean(found) for found in errors.values()]
    assert mean[0] > 1.5 * mean[1] > 2 * mean[2] and mean[2] < 0.05, mean


def test_the_best_action_is_found():
    right = [searched(Layered(seed), Args(simulations=2_000, rollout_depth=4))[0].best() for seed in range(10)]
    exact = [Layered(seed).q_values(1.0)[0] for seed in range(10)]
    assert all(q[a] >= q.max() - 0.02 for a, q in zip(right, exact))


# The simulator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [*STATED, "InvertedPendulum-v5"])
def test_the_simulator_is_the_environment(env_id):
    """Put into a state and given the same dice, it does what the environment does, again and again, also at ends."""
    env = gym.make(env_id, **{"is_slippery": False} if env_id == "FrozenLake-v1" else {}).unwrapped
    env.reset(seed=0)
    env.action_space.seed(0)
    simulator, ends = Simulator(env, 0), 0
    assert bool(simulator.fields) == (env_id in STATED)
    for t in range(200 if env_id in STATED else 30):
        state, action = simulator.state_of(env), env.action_space.sample()
        real = env.step(action)
        for _ in range(2):
            simulator.put(state)
            simulated = simulator.env.step(action)
            for _ in range(t % 5):
                simulator.env.step(env.action_space.sample())
        assert np.array_equal(simulated[0], real[0]) and simulated[1:4] == real[1:4]
        if real[2]:
            ends += 1
            env.reset(seed=t)
    assert ends > 0 or env_id not in ("CartPole-v1", "FrozenLake-v1")


def test_a_fickle_passenger_changes_his_mind_in_every_simulation():
    """That he has not yet done so is part of Taxi's state, and none of what is observed."""
    env = gym.make("Taxi-v4", fickle_passenger=True).unwrapped
    env.reset(seed=0)
    env.s, env.fickle_step = env.encode(2, 2, 4, 0), True
    simulator = Simulator(env, 0)
    for _ in range(2):
        simulator.put(simulator.state_of(env))
        assert simulator.env.fickle_step
        simulator.env.step(0)
        assert not simulator.env.fickle_step and env.fickle_step


@pytest.mark.parametrize("env_id", [*STATED, "Blackjack-v1"])
def test_searching_leaves_the_environment_as_it_is(env_id):
    """Its dice included: what it does next is what it would have done."""
    env, twin = gym.make(env_id).unwrapped, gym.make(env_id).unwrapped
    env.reset(seed=3)
    twin.reset(seed=3)
    env.action_space.seed(0)
    for _ in range(5):
        searched(env, Args(simulations=20, rollout_depth=10))
        action = env.action_space.sample()
        ours, theirs = env.step(action), twin.step(action)
        assert np.array_equal(ours[0], theirs[0]) and ours[1:4] == theirs[1:4]
        if ours[2]:
            break


def test_plans_do_not_know_the_environments_dice():
    """Slippery ice, one step: outcomes of the simulator are its own, by its seed."""
    env = gym.make("FrozenLake-v1").unwrapped
    env.reset(seed=0)
    drawn = []
    for seed in (0, 0, 1):
        simulator = Simulator(env, seed)
        state, outcomes = simulator.state_of(env), []
        for _ in range(60):
            simulator.put(state)
            outcomes.append(simulator.env.step(2)[0])
        drawn.append(outcomes)
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0, 1, 4}
    assert np.bincount(drawn[0] + drawn[2])[[0, 1, 4]].min() > 20, "each a third"


def test_time_limits_are_not_seen():
    """CartPole's limit of ten steps is the wrapper's: rollouts go on."""
    env = gym.make("CartPole-v1", max_episode_steps=10)
    env.reset(seed=0)
    root, _ = searched(env.unwrapped, Args(simulations=50))
    assert root.high > 15


# Playing ----------------------------------------------------------------------------------------------------


def planned(monkeypatch, args: Args, **kwargs) -> list[tuple[Node, int]]:
    """The root and its visits at each search's first simulation, in a run."""
    roots, inner = [], mcts.simulate

    def spied(root, *others):
        if not roots or roots[-1][0] is not root:
            roots.append((root, root.visits))
        return inner(root, *others)

    monkeypatch.setattr(mcts, "simulate", spied)
    play(args, **kwargs)
    return roots


def test_the_tree_is_kept_from_step_to_step(tmp_path, monkeypatch):
    """The next root is the node of the outcome met, with its visits."""
    roots = planned(monkeypatch, Args(simulations=30, eval_episodes=1, output_dir=str(tmp_path)))
    assert len(roots) > 100 and roots[0][1] == 0
    kept = 0
    for (before, _), (after, visits) in zip(roots, roots[1:]):
        children = [x for outcomes in before.outcomes for x in outcomes]
        assert any(after is x for x in children) or visits == 0
        kept += any(after is x for x in before.outcomes[before.best()]) and visits > 5
    assert kept > 0.9 * len(roots)


def test_an_outcome_that_was_not_searched_is_a_new_root(tmp_path, monkeypatch):
    gym.register("Layered-v0", Layered, kwargs={"seed": 1})
    args = Args(env_id="Layered-v0", simulations=6, rollout_depth=3, eval_episodes=40, output_dir=str(tmp_path))
    roots = planned(monkeypatch, args)
    firsts = [visits for _, visits in roots]
    assert firsts.count(0) > 41 and any(firsts), "a root of each episode, and some in between"


def test_keys_tell_observations_apart():
    a, b = np.float32([0.0, 1.0]), np.float32([0.0, 1.0 + 1e-6])
    assert key(a) == key(a.copy()) != key(b) and key(5) == 5 and key((1, 2)) == (1, 2)


def test_same_seed_same_bits(tmp_path):
    args = Args(simulations=3, rollout_depth=3, eval_episodes=2)
    runs = [
        play(replace(args, seed=seed, output_dir=str(tmp_path / str(i))))["returns"] for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0].tolist() == runs[1].tolist() != runs[2].tolist()


def test_a_run_leaves_what_it_says(tmp_path):
    line = [sys.executable, SCRIPT, "--output-dir", tmp_path, "--simulations", 5, "--rollout-depth", 5]
    done = subprocess.run([*map(str, line), "--eval-episodes", "2"], capture_output=True, text=True, check=True)
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.startswith("CartPole-v1__mcts__1__") and str(run_dir) in done.stdout
    assert "Warning" not in done.stderr and "evaluation: " in done.stdout
    assert json.loads((run_dir / "args.json").read_text())["args"]["simulations"] == 5
    assert len(load_results(str(run_dir))) == 2
    tags = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    assert {"tree/value", "tree/visits", "tree/depth", "tree/simulations_per_second", "eval/episodic_return"} <= tags


def test_continuous_actions_are_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as stop:
        play(Args(env_id="Pendulum-v1"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "mpc.py" in error and error.count("\n") == 1


@pytest.mark.slow
def test_frozen_lakes_are_crossed(tmp_path):
    """Not less often than 0.95 of the best success within 100 steps, by dynamic programming, explains (5 %)."""
    lake, best = gym.make("FrozenLake-v1"), np.zeros(16)
    for _ in range(lake.spec.max_episode_steps):
        q = [
            [sum(p * (r + (not end) * best[s]) for p, s, r, end in lake.unwrapped.P[at][a]) for a in range(4)]
            for at in range(16)
        ]
        best = np.max(q, 1)
    bar = 0.95 * best[0]
    args = replace(Args(), **mcts.RECOMMENDED["FrozenLake-v1"], env_id="FrozenLake-v1", eval_episodes=200)
    crossed = int(play(replace(args, output_dir=str(tmp_path)))["returns"].sum())
    print(f"{crossed} of 200; the bar is {bar:.4f}, at which 5 % of samples are below {binom.ppf(0.05, 200, bar):.0f}")
    assert 0.70 < bar < 0.71 and crossed >= binom.ppf(0.05, 200, bar)


@pytest.mark.slow
def test_cart_poles_stand(tmp_path):
    assert play(Args(eval_episodes=10, output_dir=str(tmp_path)))["returns"].tolist() == [500] * 10
