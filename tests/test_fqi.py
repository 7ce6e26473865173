"""algos/fqi.py: targets and projections by definition, value iteration on empirical models, and where it diverges."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import fqi
import gymnasium as gym
import numpy as np
import policy_iteration
import pytest
import torch
from fqi import (
    Args,
    Dataset,
    FittedNetwork,
    collect,
    fit_network,
    fit_table,
    model_q_values,
    q_targets,
    read_args,
    train,
)
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.monitor import load_results
from tables import model, optimal, random_table, register
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


def table_of(states: int, outputs: int) -> nn.Embedding:
    """A table of zeros, as in train()."""
    return nn.Embedding.from_pretrained(torch.zeros(states, outputs).double())


FEW = "--transitions 300 --iterations 3 --gradient-steps 20 --eval-episodes 2"


def steps(*rows: tuple) -> Dataset:
    """Of (s, a, r, s', terminated)."""
    return Dataset(*(torch.as_tensor(np.array(x)) for x in zip(*rows)))


def random_steps(env_id: str, number: int, seed: int = 1) -> Dataset:
    env = gym.make(env_id)
    env.action_space.seed(seed)
    return collect(env, None, 1.0, Args(transitions=number), [], seed)


def trained(flags: str, folder) -> dict:
    return train(read_args(f"{FEW} {flags} --output-dir {folder}".split()))


# The maths --------------------------------------------------------------------------------------------------


def test_targets_are_what_their_definition_says():
    """The next state's values are 3 and 5; a terminal one has none."""
    table = table_of(2, 2)
    table.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    data = steps((0, 1, 0.5, 1, False), (0, 1, 0.5, 1, True), (1, 0, -1.0, 0, False))
    assert q_targets(table, data, 0.9).tolist() == pytest.approx([0.5 + 4.5, 0.5, -1 + 1.8])


def test_a_tables_projection_is_the_mean_and_leaves_the_rest():
    table = table_of(3, 2)
    table.weight.data.fill_(7.0)
    fit_table(
        table, torch.tensor([0, 2, 2, 2]), torch.tensor([1, 0, 0, 1]), torch.tensor([1.0, 2.0, 5.0, -1.0]).double()
    )
    assert table.weight.tolist() == [[7, 1], [7, 7], [3.5, -1]]
    assert table(torch.tensor([2, 0])).tolist() == [[3.5, -1], [7, 1]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_table_and_all_pairs_it_is_value_iteration_on_the_empirical_model(seed):
    """Every iterate, 30 of them; the model's probabilities and rewards are frequencies and means."""
    env_id, gamma = register(random_table(seed), anywhere=True, max_episode_steps=7), 0.95
    data = random_steps(env_id, 2_000)
    rows = {s: {a: [] for a in range(3)} for s in range(12)}
    for s, a, r, successor, terminated in zip(*(x.tolist() for x in data)):
        rows[s][a].append((r, successor, terminated))
    assert all(rows[s][a] for s in rows for a in rows[s])
    empirical = {s: {a: [(1 / len(x), t, r, d) for r, t, d in x] for a, x in rows[s].items()} for s in rows}
    found, expected = table_of(12, 3), np.zeros((12, 3))
    for _ in range(30):
        fit_table(found, data.observations, data.actions, q_targets(found, data, gamma))
        expected = policy_iteration.look_ahead(model(empirical), expected.max(1), gamma)
        assert np.abs(found.weight.detach().numpy() - expected).max() < 1e-9


def test_fitted_value_iteration_with_a_table_is_value_iteration():
    """On a random table."""
    table, gamma = random_table(3), 0.9
    values, expected = table_of(12, 1), np.zeros(12)
    states = torch.arange(12)
    for _ in range(20):
        q_values = model_q_values(values, table, 12, gamma)
        expected_q = policy_iteration.look_ahead(model(table), expected, gamma)
        assert np.abs(q_values.numpy() - expected_q).max() < 1e-9
        fit_table(values, states, 0 * states, q_values.amax(1))
        expected = expected_q.max(1)


def test_the_regression_is_the_least_squares_solution():
    """A linear network on 400 steps: the normal equations of each action's own steps, to 1 %; weight decay shrinks."""
    torch.manual_seed(1)
    obs, actions = torch.randn(400, 3), torch.randint(2, (400,))
    targets = (obs @ torch.tensor([1.0, -2.0, 0.5]) + actions + torch.randn(400)).double()
    args = Args(hidden_sizes=(), gradient_steps=2_000, learning_rate=0.05, gamma=0.5)
    found = {}
    for decay in (0.0, 1.0):
        network = FittedNetwork(Box(-9, 9, (3,)), 2, obs, args)
        optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.gradient_steps % 1)
        fit_network(network, optimizer, scheduler, obs, actions, targets, args)
        assert scheduler.last_epoch == args.gradient_steps, "the step size falls with each"
        found[decay] = network(obs).detach()
    for a in range(2):
        mine = actions == a
        inputs = torch.cat([obs, torch.ones(400, 1)], 1)
        solution = torch.linalg.lstsq(inputs[mine], targets[mine, None].float()).solution
        assert (found[0.0][:, a] - (inputs @ solution)[:, 0]).abs().max() < 0.02 * targets.abs().max()
    assert found[1.0].std() < 0.7 * found[0.0].std()


@pytest.mark.parametrize("features", ["linear", "table"])
def test_a_backup_and_a_projection_together_are_no_contraction(features):
    """Tsitsiklis and Van Roy's two states, of values φ and 2 φ: rewards are 0, Q* is 0, and φ grows by 6 γ / 5 a round.

    The best fit of targets γ 2 φ at both is φ = 6 γ φ / 5 (000, section 6.4.2). With a table they shrink by γ.
    """
    gamma = 0.95
    data = steps((0, 0, 0.0, 1, False), (1, 0, 0.0, 1, False))
    if features == "table":
        function = table_of(2, 1)
        function.weight.data.copy_(torch.tensor([[1.0], [2.0]]))
    else:
        function = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1, bias=False))
        function.scale, function[-1].weight.data[:] = 1.0, 1.0
    args = Args(gradient_steps=300, learning_rate=0.1, batch_size=2)
    obs = data.observations if features == "table" else data.observations.float() + 1
    data = data._replace(observations=obs, next_observations=obs[[1, 1]])
    sizes = []
    for _ in range(15):
        targets = q_targets(function, data, gamma)
        if features == "table":
            fit_table(function, obs, data.actions, targets)
        else:
            optimizer = torch.optim.Adam(function.parameters(), args.learning_rate)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.gradient_steps % 1)
            fit_network(
                function,
                optimizer,
                scheduler,
                torch.cat([obs, obs]),
                data.actions.repeat(2),
                targets.repeat(2),
                replace(args, batch_size=64),
            )
        sizes.append(function(obs).abs().max().item())
    rate = (sizes[-1] / sizes[4]) ** (1 / 10)
    assert rate == pytest.approx(gamma if features == "table" else 6 / 5 * gamma, rel=0.02)


def test_networks_standardise_by_the_data_and_take_indices():
    obs = torch.tensor([[1.0, 5.0, 3.0], [3.0, 5.0, 9.0]])
    network = FittedNetwork(Box(-9, 9, (3,)), 2, obs, Args())
    assert network.mean.tolist() == [2, 5, 6] and network.std.tolist() == pytest.approx([2**0.5, 1, 18**0.5])
    assert network(obs).shape == (2, 2)
    indices = FittedNetwork(Discrete(4), 3, torch.tensor([0, 3]), Args(hidden_sizes=()))
    weight, bias = indices.network[0].weight, indices.network[0].bias
    assert torch.allclose(indices(torch.tensor([1, 3])), 20 * (weight.T[[1, 3]] + bias))


# Data -------------------------------------------------------------------------------------------------------


def test_random_steps_are_what_the_environment_did():
    """CartPole again by hand, with the same actions; cut and ended episodes apart, (return, length) of whole ones."""
    env = gym.make("CartPole-v1", max_episode_steps=15)
    env.action_space.seed(3)
    episodes = []
    data = collect(env, None, 1.0, Args(transitions=400), episodes, 3)
    again, number = gym.make("CartPole-v1", max_episode_steps=15), 0
    obs, cut, lengths = again.reset(seed=3)[0], 0, []
    start = 0
    for number in range(400):
        assert data.observations[number].tolist() == obs.tolist()
        obs, reward, terminated, truncated, _ = again.step(int(data.actions[number]))
        assert data.next_observations[number].tolist() == obs.tolist()
        assert (data.rewards[number], data.terminated[number]) == (reward, terminated)
        if terminated or truncated:
            lengths.append((number + 1.0 - start, number + 1 - start))
            cut, start, obs = cut + (not terminated), number + 1, again.reset()[0]
    assert episodes == lengths and 0 < cut < len(lengths)
    assert 0.4 < data.actions.float().mean() < 0.6


def test_an_epsilon_greedy_step_is_the_policys_or_chance():
    """Nine of ten steps of ε = 0.2, of two actions."""
    env = gym.make("CartPole-v1")
    torch.manual_seed(0)
    data = collect(env, lambda obs: 1, 0.2, Args(transitions=2_000), [], 1)
    assert data.actions.float().mean() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("features", ["table", "network"])
def test_a_time_limit_bootstraps_and_an_end_does_not(features, terminated, tmp_path):
    """Reward 1 for ever, cut after ten steps, is worth 10 with γ = 0.9; a step that ends the episode 1."""
    env_id = register({0: {a: [(1.0, 0, 1.0, terminated)] for a in range(2)}}, max_episode_steps=10)
    flags = f"--env-id {env_id} --features {features} --gamma 0.9 --iterations 150 --weight-decay 0"
    found = trained(flags, tmp_path)["function"](torch.tensor([0]))
    assert found.max().item() == pytest.approx(1 if terminated else 10, rel=1e-3)


def test_data_grow_with_the_policy(tmp_path):
    """Three times 300 steps of six rounds; the columns of monitor.csv are theirs."""
    found = trained("--iterations 6 --collect-every 2", tmp_path)
    table = load_results(str(found["run_dir"]))
    assert 900 - 3 * 200 < table["l"].sum() <= 900 and table["l"].sum() > 400
    found = trained("--iterations 6", tmp_path)
    assert load_results(str(found["run_dir"]))["l"].sum() <= 300


def test_growing_data_keep_what_there_was_and_add_the_policys(monkeypatch, tmp_path):
    seen, original = [], fqi.fit_network
    monkeypatch.setattr(fqi, "fit_network", lambda *x: seen.append((x[3].clone(), x[4].clone())) or original(*x))
    trained("--iterations 4 --collect-every 2 --epsilon 0", tmp_path)
    assert [len(x[0]) for x in seen] == [300, 300, 600, 600]
    assert (seen[-1][0][:300] == seen[0][0]).all()


# Minari -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> tuple[list, str]:
    """The episodes of a dataset of CartPole-v1, its last one cut, and its id."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    env, episodes = gym.make("CartPole-v1", max_episode_steps=30), []
    for i in range(12):
        obs, over, buffer = env.reset(seed=i)[0], False, EpisodeBuffer(id=i, seed=i)
        rows = {"observations": [obs], "actions": [], "rewards": [], "terminations": [], "truncations": []}
        while not over:
            action = int(obs[2] + obs[3] > 0) if i > 9 else int(env.np_random.integers(2))
            obs, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            for name, x in zip(rows, (obs, action, reward, terminated, truncated)):
                rows[name].append(x)
        episodes.append(replace(buffer, **rows))
    about = dict(algorithm_name="some", author="tests", author_email="a@b.c", code_permalink="none")
    minari.create_dataset_from_buffers("cartpole/some-v0", episodes, env="CartPole-v1", eval_env="CartPole-v1", **about)
    return episodes, "cartpole/some-v0"


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_offline_data_stay_offline(dataset, monkeypatch, tmp_path):
    """The steps are the dataset's, a cut episode's last is not terminal, and no step is taken for more."""
    episodes, name = dataset
    env = gym.make("CartPole-v1")
    data = fqi.read_transitions(Args(dataset=name), env)
    observations = np.concatenate([np.array(x.observations)[:-1] for x in episodes])
    following = np.concatenate([np.array(x.observations)[1:] for x in episodes])
    assert (data.observations.numpy() == observations).all() and (data.next_observations.numpy() == following).all()
    assert data.actions.tolist() == [int(a) for x in episodes for a in x.actions]
    assert data.terminated.sum() < len(episodes) and not data.terminated[-1]
    assert data.rewards.sum() == len(observations)
    monkeypatch.setattr(fqi, "collect", None)
    found = trained(f"--dataset {name}", tmp_path)
    assert (found["run_dir"] / "monitor.csv").read_text().endswith("r,l,t\n") and len(found["returns"]) == 2


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_a_dataset_of_another_environment(dataset, capsys, tmp_path):
    for flags, word in ((f"--env-id Acrobot-v1 --dataset {dataset[1]}", "spaces"), ("--dataset no/such-v0", "minari[")):
        with pytest.raises(SystemExit) as stop:
            trained(flags, tmp_path)
        assert stop.value.code == 2 and word in capsys.readouterr().err


# Runs -------------------------------------------------------------------------------------------------------


def test_the_file_alone_runs(tmp_path):
    """Warnings being errors; a short run."""
    shutil.copy(fqi.__file__, tmp_path)
    command = [sys.executable, "-W", "error", "fqi.py", *FEW.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"evaluation: \d+\.\d\d ± \d+\.\d\d over 2 episodes", done.stdout.splitlines()[-2])
    assert done.stdout.splitlines()[-1] == f"run directory: runs/{folder.name}"
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "policy.pt2"}
    table = load_results(str(folder))
    assert json.loads((folder / "args.json").read_text())["args"]["transitions"] == 300 >= table["l"].sum() > 200
    events = EventAccumulator(str(folder)).Reload()
    assert [x.value for x in events.Scalars("charts/episodic_return")] == table["r"].tolist()
    assert [x.step for x in events.Scalars("charts/episodic_length")] == table["l"].cumsum().tolist()
    assert [x.step for x in events.Scalars("losses/value_loss")] == [1, 2, 3]
    assert {"losses/q_values", "eval/episodic_return"} <= {*events.Tags()["scalars"]}


def test_policy_pt2_is_the_greedy_policy(tmp_path):
    found = trained("", tmp_path)
    policy, obs = torch.export.load(found["run_dir"] / "policy.pt2").module(), torch.randn(50, 4)
    for batch in (obs, obs[:1]):
        assert policy(batch).tolist() == found["function"](batch).argmax(1).tolist()


@pytest.mark.parametrize("iterate", ["q", "v"])
def test_frozen_lake(iterate, tmp_path):
    """Of a table, V is within 0.1 of V*, and greedy success near the best, 0.74; all of solution.npz agrees."""
    flags = f"--env-id FrozenLake-v1 --iterate {iterate} --transitions 20000 --iterations 300 --eval-episodes 300"
    found = trained(flags, tmp_path)
    best = optimal(gym.make("FrozenLake-v1").unwrapped.P, 0.99)
    with np.load(found["run_dir"] / "solution.npz") as kept:
        assert np.abs(kept["V"] - best).max() < (0.1 if iterate == "q" else 0.03)
        assert kept["policy"].tolist() == kept["Q"].argmax(1).tolist() and (kept["V"] == kept["Q"].max(1)).all()
        policy = torch.export.load(found["run_dir"] / "policy.pt2").module()
        assert policy(torch.arange(16)).tolist() == kept["policy"].tolist()
    assert found["returns"].mean() > 0.65


@pytest.mark.parametrize(
    "flags", ["--features table", "--hidden-sizes 8 --learning-rate 0.02 --gradient-steps 100 --collect-every 4"]
)
def test_spaces_that_do_not_begin_at_0(flags, tmp_path):
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
    found = trained(f"--env-id Shifted-v0 --iterations 12 --weight-decay 0 {flags}", tmp_path)
    assert found["returns"].tolist() == [1, 1]
    policy = torch.export.load(found["run_dir"] / "policy.pt2").module()
    assert policy(torch.tensor([5, 6])).tolist() == [0, 0]


@pytest.mark.parametrize("space", [Box(-9, 9, (2,), np.float64), Box(0, 255, (3, 8, 8), np.uint8)])
def test_other_observations(space, tmp_path):
    class Some(gym.Env):
        observation_space, action_space = space, Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return space.sample(), {}

        def step(self, action):
            return space.sample(), 1.0, False, False, {}

    gym.registry.pop("Some-v0", None)
    gym.register("Some-v0", Some, max_episode_steps=10)
    found = trained("--env-id Some-v0 --hidden-sizes 8", tmp_path)
    policy = torch.export.load(found["run_dir"] / "policy.pt2").module()
    assert policy(torch.as_tensor(np.array([space.sample()] * 3))).shape == (3,)


def test_the_same_seed_is_the_same_run(tmp_path):
    runs = [trained(f"--seed {seed} --collect-every 1", tmp_path) for seed in (1, 1, 2)]
    weights = [torch.cat([x.flatten() for x in run["function"].parameters()]) for run in runs]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()
    assert runs[0]["returns"].tolist() == runs[1]["returns"].tolist()


@pytest.mark.parametrize(
    "flags, words, code",
    [
        ("--env-id Pendulum-v1", ["Discrete", "sac.py"], 2),
        ("--features table", ["--features table", "Box("], 2),
        ("--iterate v", ["--iterate v", "env.unwrapped.P"], 2),
        ("--gamma 1", ["--gamma", "below 1"], 2),
        ("--weight-decay -1", ["--weight-decay", "0 or more"], 2),
        ("--collect-every 0", ["--collect-every", "at least 1"], 2),
        ("--learning-rate 1e30", ["not finite", "--learning-rate"], 1),
    ],
)
def test_refusals(flags, words, code, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        trained(flags, tmp_path / "new")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fqi.py: ")]
    assert stop.value.code == code and all(word in line for word in words), line
    assert code == 1 or not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_reward_that_is_not_finite(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        trained(f"--env-id {register({0: {0: [(1.0, 0, np.nan, False)]}}, max_episode_steps=5)}", tmp_path)
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err


def test_episodes_without_a_limit_are_cut(capsys, tmp_path):
    found = trained("--env-id CliffWalking-v1 --features table --transitions 3000 --gamma 0", tmp_path)
    assert "CliffWalking-v1 has no time limit: episodes are cut after 1000 steps\n" in capsys.readouterr().out
    assert load_results(str(found["run_dir"]))["l"].max() <= 1000 and found["returns"].max() <= -13


def test_modules_are_evaluated_as_such(monkeypatch, tmp_path):
    """A fork's dropout is off in policy.pt2 and in the evaluation."""
    original = FittedNetwork.__init__

    def with_dropout(self, *args):
        original(self, *args)
        self.network.insert(2, nn.Dropout(0.9))

    monkeypatch.setattr(FittedNetwork, "__init__", with_dropout)
    found = trained("", tmp_path)
    assert not found["function"].training
    policy, obs = torch.export.load(found["run_dir"] / "policy.pt2").module(), torch.randn(50, 4)
    assert policy(obs).tolist() == policy(obs).tolist() == found["function"](obs).argmax(1).tolist()


@pytest.mark.slow
def test_cart_pole_from_random_steps(tmp_path):
    """The interquartile mean over ten seeds, of the last round, with everything at its default."""
    means = [
        train(read_args(f"--seed {seed} --output-dir {tmp_path}".split()))["returns"].mean() for seed in range(1, 11)
    ]
    assert np.mean(sorted(means)[2:8]) >= 400, means
