"""algos/rmax.py: bonuses and posterior by definition, plans against policy_iteration.py, and two environments."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import policy_iteration
import pytest
import rmax
import scipy.stats
import torch
from gymnasium.spaces import Discrete
from rmax import Args, DeepSea, Experience, RiverSwim, bonus, estimate, plan, play_episode, posterior_sample, train
from stable_baselines3.common.monitor import load_results
from tables import model, optimal, random_table, register
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DIRECTED = ("rmax", "ucb", "mbie-eb", "beb", "thompson")


def nothing(states: int, actions: int) -> Experience:
    return Experience(Counter(), np.zeros((states, actions), int), np.zeros((states, actions)))


def seen_steps(states: int, actions: int, *steps: tuple[int, int, float, int]) -> Experience:
    """Of steps (state, action, reward, outcome)."""
    seen = nothing(states, actions)
    for state, action, reward, outcome in steps:
        seen.followed[state * actions + action, outcome] += 1
        seen.counts[state, action] += 1
        seen.rewards[state, action] += reward
    return seen


def play(env: gym.Env, args: Args, episodes: int, seen: Experience | None = None):
    """Yields (what was seen, return, length, V of the plan) after every episode."""
    seen = seen or nothing(int(env.observation_space.n), int(env.action_space.n))
    rng, values = np.random.default_rng(args.seed), np.zeros(len(seen.counts))
    for i in range(episodes):
        total, length, values = play_episode(env, seen, values, args, rng, None if i else args.seed)
        yield seen, total, length, values


def known(seen: Experience, args: Args) -> np.ndarray:
    """Q (S, A) of the plan that keeps to what was tried."""
    return plan(estimate(seen, np.where(seen.counts, 0, -np.inf)), np.zeros(len(seen.counts)), args)


# The maths --------------------------------------------------------------------------------------------------


def test_bonuses_are_what_their_definitions_say():
    """n = 100 steps; β = 0.5 scales all but R-max's, whose m is 5."""
    counts, args = np.array([[0, 1, 4], [5, 20, 70]]), Args(bonus_scale=0.5, known_after=5)
    some = np.array([1, 4, 5, 20, 70])
    expected = {"ucb": np.sqrt(2 * np.log(100) / some), "mbie-eb": some**-0.5, "beb": 1 / some}
    for optimism, values in expected.items():
        found = bonus(counts, replace(args, optimism=optimism)).ravel()
        assert found[0] == np.inf and found[1:] == pytest.approx(0.5 * values), optimism
    assert bonus(counts, args).tolist() == [[np.inf] * 3, [0, 0, 0]]
    assert bonus(counts, replace(args, optimism="none")).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert bonus(np.array([[0, 1]]), replace(args, optimism="ucb")).tolist() == [[np.inf, 0]], "ln 1"
    for optimism in DIRECTED[:-1]:
        assert (bonus(np.zeros((2, 2), int), replace(args, optimism=optimism)) == np.inf).all()


def test_the_estimate_is_of_frequencies_and_means():
    seen = seen_steps(2, 2, (0, 1, 3.0, 1), (0, 1, 1.0, 1), (0, 1, -1.0, 2), (0, 1, 2.0, 0), (1, 0, 7.0, 2))
    found = estimate(seen, np.full((2, 2), 10.0))
    assert found.rewards.tolist() == [[10, 11.25], [17, 10]]
    steps = {(pair, outcome): p for pair, outcome, p in zip(found.pairs, found.outcomes, found.p)}
    assert steps == {(1, 1): 0.5, (1, 2): 0.25, (1, 0): 0.25, (2, 2): 1}


def test_posterior_samples_are_of_the_dirichlet_and_the_normal():
    """Three states; a pair seen 5 times, 3 of them an end: betas for the outcomes, normals for rewards."""
    steps = [(0, 1, 2.0, 3), (0, 1, 2.0, 3), (0, 1, 2.0, 3), (0, 1, 2.0, 0), (0, 1, 5.0, 2)]
    seen, rng = seen_steps(3, 2, *steps), np.random.default_rng(0)
    p, rewards = np.zeros((4_000, 6, 4)), np.zeros((4_000, 3, 2))
    for i in range(4_000):
        sample = posterior_sample(seen, Args(max_reward=4.0), rng)
        np.add.at(p[i], (sample.pairs, sample.outcomes), sample.p)
        rewards[i] = sample.rewards
    assert p.sum(-1) == pytest.approx(1)
    counts = np.zeros((6, 4))
    counts[1] = [1, 0, 1, 3]
    for pair in (0, 1, 5):
        for outcome in range(4):
            a = counts[pair, outcome] + 1 / 4
            expected = scipy.stats.beta(a, counts[pair].sum() + 1 - a)
            assert scipy.stats.kstest(p[:, pair, outcome], expected.cdf).pvalue > 1e-3, (pair, outcome)
    both = np.cov(p[:, 1, 3], p[:, 1, 0])[0, 1]  # of a Dirichlet: −a b / (total² (total + 1))
    assert both == pytest.approx(-3.25 * 1.25 / (6**2 * 7), rel=0.15)
    for pair, mean, deviation in ((1, 13 / 6, 4 / np.sqrt(6)), (4, 0, 4)):
        cdf = scipy.stats.norm(mean, deviation).cdf
        assert scipy.stats.kstest(rewards.reshape(-1, 6)[:, pair], cdf).pvalue > 1e-3, pair
    assert abs(np.corrcoef(p[:, 1, 3], p[:, 5, 3])[0, 1]) < 0.06, "one pair's sample says nothing of another's"


@pytest.mark.parametrize("seed", range(5))
def test_a_known_model_is_planned_as_policy_iteration_plans_it(seed):
    """A random table's own probabilities, with a twelfth of all pairs at the end; from any V on."""
    table, gamma = random_table(seed), 0.9
    rewards = np.array([[sum(p * r for p, _, r, _ in table[s][a]) for a in range(3)] for s in range(12)])
    rows = [
        (3 * s + a, 12 if done else successor, p)
        for s in table
        for a in table[s]
        for p, successor, _, done in table[s][a]
    ]
    pairs, outcomes, p = map(np.array, zip(*rows))
    expected = policy_iteration.look_ahead(model(table), optimal(table, gamma), gamma)
    for values in (np.zeros(12), np.random.default_rng(seed).normal(0, 50, 12)):
        found = plan(rmax.SparseModel(rewards, pairs, outcomes, p), values, Args(gamma=gamma, max_reward=10.0))
        assert np.abs(found - expected).max() <= 1e-6


def test_a_plan_of_what_was_seen_is_the_plan_of_the_empirical_table():
    """FrozenLake walked through at random: r̂ and P̂ made a table for policy_iteration.py."""
    env, args = gym.make("FrozenLake-v1"), Args(optimism="none", epsilon=1.0)
    *_, (seen, _, _, _) = play(env, args, 2_000)
    table = {s: {a: [] for a in range(4)} for s in range(16)}
    for (pair, outcome), count in seen.followed.items():
        s, a = divmod(pair, 4)
        reward = seen.rewards[s, a] / seen.counts[s, a]
        table[s][a].append((count / seen.counts[s, a], min(outcome, 15), reward, outcome == 16))
    for s, a in np.argwhere(seen.counts == 0):  # never tried, hence as bad as can be
        table[s][a] = [(1.0, 0, -100.0, True)]
    expected = policy_iteration.look_ahead(model(table), optimal(table, args.gamma), args.gamma)
    assert seen.counts[14, 2] > 10 and np.abs(known(seen, args) - expected).max() < 1e-5


def test_nothing_is_worth_more_than_r_max_for_ever():
    """A bonus of 2 on a reward of 1, and again; and what is as bad as can be."""
    seen, args = seen_steps(1, 2, (0, 0, 1.0, 0)), Args(gamma=0.9)
    assert plan(estimate(seen, np.array([[2.0, 0.0]])), np.zeros(1), args) == pytest.approx(np.array([[10, 0]]))
    assert plan(estimate(seen, np.array([[0.0, np.inf]])), np.zeros(1), args)[0, 1] == pytest.approx(10)
    assert plan(estimate(seen, np.array([[0.0, -np.inf]])), np.zeros(1), args)[0, 1] == pytest.approx(-10)


def test_a_plan_ends_where_rounding_is_above_its_tolerance():
    seen = seen_steps(1, 1, (0, 0, 1e6, 0))
    found = plan(estimate(seen, np.zeros((1, 1))), np.zeros(1), Args(gamma=0.999, max_reward=1e6))
    assert found[0, 0] == pytest.approx(1e9, rel=1e-9)


@pytest.mark.parametrize("terminated", [False, True])
def test_a_time_limit_has_a_value_and_an_end_has_none(terminated):
    """Reward 1 for ever, cut after ten steps, is worth 100 with γ = 0.99; a step that ends the episode 1."""
    env_id = register({0: {0: [(1.0, 0, 1.0, terminated)]}}, max_episode_steps=10)
    *_, (seen, _, _, _) = play(gym.make(env_id), Args(optimism="none"), 3)
    assert known(seen, Args()) == pytest.approx(1 if terminated else 100)


# The two environments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 5, 16])
@pytest.mark.parametrize("mapping", [0, 1])
def test_deep_sea(depth, mapping):
    """0.99 is the best, by right all the way; left all the way is 0; a mistake at the last step costs the reward."""
    env = DeepSea(depth, mapping)
    table = {s: dict(enumerate(rows)) for s, rows in enumerate(env.P)}
    assert optimal(table, 1 - 1e-12)[0] == pytest.approx(0.99)
    rights = np.random.default_rng(mapping).integers(2, size=(depth, depth))

    def go(path: list[bool]) -> list:
        (obs, _), found = env.reset(seed=1), []
        for y, right in enumerate(path):
            assert obs // depth == y
            obs, reward, terminated, truncated, _ = env.step(int(rights[divmod(obs, depth)] == right))
            found.append((reward, terminated, truncated))
            assert terminated == (y == depth - 1)
        return [x[0] for x in found]

    cost = -0.01 / depth
    assert go([True] * depth) == pytest.approx([cost] * (depth - 1) + [1 + cost])
    assert go([False] * depth) == [0] * depth
    assert go([True] * (depth - 1) + [False]) == pytest.approx([cost] * (depth - 1) + [0])
    assert go([False] + [True] * (depth - 1)) == pytest.approx([0] + [cost] * (depth - 1)), "the edge is a wall"


def test_which_action_is_right_differs_from_cell_to_cell():
    share = np.mean([DeepSea(32, mapping).P[0][1][0][2] < 0 for mapping in range(200)])
    inside = np.mean([rows[1][0][2] < 0 for rows in DeepSea(32).P])
    assert 0.4 < share < 0.6 and 0.45 < inside < 0.55


def test_river_swim():
    """Its steps, and the frequencies of 20 000 of them."""
    env = RiverSwim()
    assert env.P[0][0] == [(1.0, 0, 0.005, False)] and env.P[3][0] == [(1.0, 2, 0.0, False)]
    assert env.P[0][1] == [(0.4, 0, 0.0, False), (0.6, 1, 0.0, False)]
    assert env.P[3][1] == [(0.05, 2, 0.0, False), (0.6, 3, 0.0, False), (0.35, 4, 0.0, False)]
    assert env.P[5][1] == [(0.4, 4, 1.0, False), (0.6, 5, 1.0, False)]
    env.reset(seed=1)
    reached = Counter()
    for _ in range(20_000):
        env.state = 3
        reached[env.step(1)[0]] += 1
    assert [reached[s] / 20_000 for s in (2, 3, 4)] == pytest.approx([0.05, 0.6, 0.35], abs=0.015)
    limit = gym.make("RiverSwim-v0").spec.max_episode_steps, gym.make("DeepSea8-v0").spec.max_episode_steps
    assert limit == (20, 8) and gym.make("DeepSea8-v0").observation_space == Discrete(64)


def test_other_files_play_them(tmp_path):
    """By gymnasium's module:id, and with their table."""
    args = policy_iteration.Args("rmax:DeepSea8-v0", eval_episodes=2, output_dir=str(tmp_path))
    assert policy_iteration.solve(args)["returns"] == pytest.approx(0.99)


# Exploration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimism", DIRECTED)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_directed_exploration_finds_the_deep_reward(optimism, seed):
    """At depth 10 in 400 episodes, where chance has one in 1024 a time; the plan of what was seen is then optimal."""
    env, args = DeepSea(10, seed), Args(optimism=optimism, seed=seed)
    found = next(seen for seen, total, _, _ in play(env, args, 400) if total > 0.5)
    policy = known(found, args).argmax(1)
    obs, done, total = env.reset()[0], False, 0.0
    while not done:
        obs, reward, done, _, _ = env.step(policy[obs])
        total += reward
    assert total == pytest.approx(0.99)


def test_undirected_exploration_does_not():
    """ε-greedy learns that right costs: not one of 5 × 1000 episodes."""
    for seed in range(5):
        assert all(total < 0.5 for _, total, _, _ in play(DeepSea(10, seed), Args(optimism="none", seed=seed), 1_000))


@pytest.mark.parametrize("optimism", ["rmax", "ucb", "mbie-eb", "beb"])
def test_every_plan_is_optimistic(optimism):
    """Where no chance is at work what was seen is true, and a plan is no lower than V* in any state."""
    env = DeepSea(6, 1)
    best = optimal({s: dict(enumerate(rows)) for s, rows in enumerate(env.P)}, 0.99)
    for _, _, _, values in play(env, Args(optimism=optimism), 60):
        assert (values >= best - 1e-6).all()


@pytest.mark.parametrize("m", [1, 4])
def test_r_max_takes_each_action_m_times(m):
    """In one episode of one state: it plans anew within, where it knows more, and does not go on where nothing is."""
    table = {0: {a: [(1.0, 0, 0.1 * (a == 3), False)] for a in range(5)}}
    env_id = register(table, max_episode_steps=5 * m)
    *_, (seen, _, _, _) = play(gym.make(env_id), Args(known_after=m), 1)
    assert seen.counts.tolist() == [[m] * 5]


def test_thompson_draws_once_an_episode(monkeypatch):
    drawn, original = [], rmax.posterior_sample
    monkeypatch.setattr(rmax, "posterior_sample", lambda *x: drawn.append(1) or original(*x))
    lengths = [length for _, _, length, _ in play(DeepSea(5, 0), Args(optimism="thompson"), 7)]
    assert lengths == [5] * 7 and len(drawn) == 7


def test_epsilon_greedy():
    """ε = 0.4 of two actions, of which one is better: four fifths are that; the directed ones never try by chance."""
    table = {0: {a: [(1.0, 0, float(a), False)] for a in range(2)}}
    env_id, shares = register(table, max_episode_steps=2_000), {}
    for optimism in ("none", "rmax"):
        args = Args(optimism=optimism, epsilon=0.4)
        *_, (seen, _, _, _) = play(gym.make(env_id), args, 1, seen_steps(1, 2, (0, 0, 0.0, 0), (0, 1, 1.0, 0)))
        shares[optimism] = seen.counts[0, 1] / 2_000
    assert shares["none"] == pytest.approx(0.8, abs=0.03) and shares["rmax"] > 0.99


@pytest.mark.parametrize("optimism", DIRECTED)
def test_up_the_river(optimism, tmp_path):
    """The best is 3.37 in the mean over these seeds; downstream it is 0.1."""
    settings = dict(known_after=16, total_timesteps=3_000, eval_episodes=50, output_dir=str(tmp_path))
    assert train(Args("RiverSwim-v0", optimism=optimism, **settings))["returns"].mean() > 3


# Runs -------------------------------------------------------------------------------------------------------


def test_the_file_alone_runs(tmp_path):
    """Warnings being errors, with everything at its default, within a minute; 0.99 is the best."""
    shutil.copy(rmax.__file__, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "rmax.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines()[-2:] == [
        "evaluation: 0.99 ± 0.00 over 100 episodes",
        f"run directory: runs/{folder.name}",
    ]
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "solution.npz", "policy.pt2"}
    table = load_results(str(folder))
    assert table["l"].sum() == 20_480 == json.loads((folder / "args.json").read_text())["args"]["total_timesteps"]
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [x.value for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["charts/episodic_return"] == pytest.approx(table["r"].tolist(), abs=1e-6)
    assert scalars["charts/episodic_length"] == table["l"].tolist()
    assert 0.3 < scalars["charts/pairs_seen"][-1] <= 0.6, "half of the grid cannot be reached"
    assert scalars["losses/q_values"][-1] < scalars["losses/q_values"][0] <= 100
    assert scalars["eval/episodic_return"] == pytest.approx([0.99]) and "charts/SPS" in scalars
    policy = torch.export.load(folder / "policy.pt2").module()
    with np.load(folder / "solution.npz") as kept:
        assert policy(torch.arange(256)).tolist() == kept["policy"].tolist() == kept["Q"].argmax(1).tolist()
        assert kept["V"].tolist() == kept["Q"].max(1).tolist() and kept["V"][0] == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize("optimism", ["rmax", "thompson", "none"])
def test_the_same_seed_is_the_same_run(optimism, tmp_path):
    args = Args("FrozenLake-v1", optimism=optimism, total_timesteps=1_000, eval_episodes=3, output_dir=str(tmp_path))
    runs = [train(replace(args, seed=seed)) for seed in (1, 1, 2)]
    texts = [re.sub(r",[^,\n]+\n", "\n", (x["run_dir"] / "monitor.csv").read_text().split("t\n", 1)[1]) for x in runs]
    assert texts[0] == texts[1] != texts[2] and (runs[0]["Q"] == runs[1]["Q"]).all()


def test_the_seed_is_the_explorers_too(tmp_path):
    """No chance is at work in DeepSea."""
    args = Args("DeepSea8-v0", total_timesteps=200, eval_episodes=1, output_dir=str(tmp_path))
    runs = [load_results(str(train(replace(args, seed=seed))["run_dir"]))["r"].tolist() for seed in (1, 2)]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_evaluated_was_tried(seed, tmp_path):
    """After one step, which cost something, the other action is not thought to be better."""
    env_id = register({0: {a: [(1.0, 0, -1.0, True)] for a in range(2)}}, max_episode_steps=5)
    found = train(Args(env_id, seed=seed, total_timesteps=1, eval_episodes=1, output_dir=str(tmp_path)))
    assert found["V"].tolist() == [-1] and found["Q"].min() == pytest.approx(-100)


def test_spaces_that_do_not_begin_at_0(tmp_path):
    class Shifted(gym.Env):
        observation_space, action_space = Discrete(3, start=5), Discrete(2, start=-1)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = 5
            return 5, {}

        def step(self, action):
            assert action in (-1, 0)
            self.state += int(action == 0)
            ended = self.state == 7
            return self.state, float(ended), ended, False, {}

    gym.registry.pop("Shifted-v0", None)
    gym.register("Shifted-v0", Shifted, max_episode_steps=30)
    found = train(Args("Shifted-v0", total_timesteps=100, eval_episodes=2, output_dir=str(tmp_path)))
    assert found["returns"].tolist() == [1, 1] and found["policy"][:2].tolist() == [1, 1]
    assert found["V"][:2] == pytest.approx([0.99, 1])
    policy = torch.export.load(found["run_dir"] / "policy.pt2").module()
    assert policy(torch.tensor([5, 6])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPole-v1", ["no table", "dqn.py"]),
        ("--env-id NoSuch-v0", ["--env-id"]),
        ("--gamma 1", ["--gamma", "below 1"]),
        ("--known-after 0", ["--known-after", "at least 1"]),
        ("--epsilon 1.5", ["--epsilon", "from 0 to 1"]),
        ("--bonus-scale 0", ["--bonus-scale", "positive"]),
    ],
)
def test_refusals(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train(rmax.read_args(flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words), line
    assert not Path("runs").exists()


@pytest.mark.parametrize("reward", [1.5, -2.0, np.nan])
@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_reward_that_is_larger_than_r_max(reward, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(Args(register({0: {0: [(1.0, 0, reward, False)]}}, max_episode_steps=5), output_dir=str(tmp_path)))
    assert stop.value.code == 1 and "--max-reward" in capsys.readouterr().err
