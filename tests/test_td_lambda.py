"""algos/td_lambda.py: λ-returns by definition, both views, fixed points, and where it goes wrong off the policy."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import td_lambda
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.monitor import load_results
from td_lambda import Args, Episode, ValueFunction, lambda_returns, play, read_args, td_loss, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRUE = (np.arange(19) - 9) / 10
"""V of RandomWalk19-v0 under the uniform policy."""


def random_episode(seed: int, length: int, states: int = 4, terminated: bool = True) -> Episode:
    torch.manual_seed(seed)
    observations, actions = torch.randint(states, (length + 1,)), torch.randint(2, (length + 1,))
    return Episode(observations, actions, torch.randn(length), terminated)


def table(values) -> ValueFunction:
    value = ValueFunction(Discrete(len(values)), Discrete(2), (), False)
    value.network[0].weight.data[0] = torch.as_tensor(values, dtype=torch.float32)
    return value


def weights(value: ValueFunction) -> np.ndarray:
    return value.network[0].weight.detach().numpy()[0]


# The maths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace_decay", [0.0, 0.3, 1.0])
def test_lambda_returns_are_what_they_are_defined_as(trace_decay):
    """(1 − λ) Σ_n λ^{n−1} G^{(n)}, the rest of the weight on the return of the whole episode."""
    torch.manual_seed(0)
    rewards, next_values, gamma, length = torch.randn(6), torch.randn(6), 0.9, 6
    expected = []
    for t in range(length):
        n_step = [
            sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * next_values[t + n - 1]
            for n in range(1, length - t + 1)
        ]
        parts = [(1 - trace_decay) * trace_decay ** (n - 1) * x for n, x in enumerate(n_step[:-1], 1)]
        expected.append(sum(parts) + trace_decay ** (length - t - 1) * n_step[-1])
    torch.testing.assert_close(lambda_returns(rewards, next_values, gamma, trace_decay), torch.stack(expected))


@pytest.mark.parametrize("trace_decay", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("terminated", [True, False])
def test_the_forward_view_is_the_backward_view(trace_decay, terminated):
    """Over an episode with V fixed: the gradient is the sum of δ_t e_t of accumulating traces (Sutton 1988)."""
    episode, values, gamma = random_episode(1, 12, terminated=terminated), np.array([0.3, -1.0, 2.0, 0.5]), 0.9
    value = table(values)
    td_loss(value, table(values), episode, Args(gamma=gamma, trace_decay=trace_decay)).backward()
    states, traces, moved = episode.observations.tolist(), np.zeros(4), np.zeros(4)
    for t, reward in enumerate(episode.rewards.tolist()):
        ends = terminated and t == 11
        difference = reward + (0 if ends else gamma * values[states[t + 1]]) - values[states[t]]
        traces = gamma * trace_decay * traces + np.eye(4)[states[t]]
        moved += difference * traces
    np.testing.assert_allclose(-value.network[0].weight.grad[0], moved, rtol=1e-5, atol=1e-6)


def test_the_target_networks_values_enter_and_only_the_trained_ones_learn():
    episode, args = random_episode(2, 5), Args(trace_decay=0.0, gamma=1.0)
    value, target = table([0.0] * 4), table([10.0] * 4).requires_grad_(False)
    loss = td_loss(value, target, episode, args)
    returns = episode.rewards + 10 * torch.tensor([1, 1, 1, 1, 0])
    torch.testing.assert_close(loss, 0.5 * returns.square().sum())
    loss.backward()
    assert value.network[0].weight.grad.any() and target.network[0].weight.grad is None


def test_the_fixed_point_of_linear_td_is_a_inverse_b():
    """With five features of the nineteen states, in the walk's own distribution: there the mean gradient is 0."""
    rng, gamma = np.random.default_rng(0), 0.9
    features = np.vstack([rng.normal(size=(19, 5)), np.zeros(5)])  # the last: beyond an end
    steps = [(s, s + d, float(s + d == 19) - float(s + d == -1)) for s in range(19) for d in (-1, 1)]
    visits = np.linalg.solve(np.eye(19) - 0.5 * (np.eye(19, k=1) + np.eye(19, k=-1)), np.eye(19)[9])
    a, b, value = np.zeros((5, 5)), np.zeros(5), ValueFunction(Box(-9, 9, (5,)), Discrete(2), (), False)
    for s, successor, reward in steps:
        phi, following = features[s], features[successor] if 0 <= successor < 19 else features[-1]
        a += visits[s] / 2 * np.outer(phi, phi - gamma * following)
        b += visits[s] / 2 * reward * phi

    def mean_gradient(w: np.ndarray) -> np.ndarray:
        value.network[0].weight.data[0] = torch.as_tensor(w)
        value.zero_grad()
        for s, successor, reward in steps:
            inside = 0 <= successor < 19
            observations = torch.as_tensor(features[[s, successor if inside else -1]], dtype=torch.float32)
            episode = Episode(observations, torch.zeros(2, dtype=torch.int64), torch.tensor([reward]), not inside)
            (visits[s] / 2 * td_loss(value, value, episode, Args(gamma=gamma, trace_decay=0.0))).backward()
        return value.network[0].weight.grad[0].numpy()

    solution = np.linalg.solve(a, b)
    np.testing.assert_allclose(mean_gradient(solution), 0, atol=1e-5)
    np.testing.assert_allclose(mean_gradient(0 * solution), -b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
def test_off_the_policys_distribution_it_can_diverge(on_policy):
    """Tsitsiklis and Van Roy's example: values w and 2w, no rewards, from the first state to the second, which goes on
    to itself. Updates of the first alone drive w away from 0, with those that the policy would make it goes there."""
    value = ValueFunction(Box(-9, 9, (1,)), Discrete(2), (), False)
    value.network[0].weight.data.fill_(1.0)
    optimizer, actions, args = (
        torch.optim.SGD(value.parameters(), 0.05),
        torch.zeros(2),
        Args(trace_decay=0.0, gamma=0.95),
    )
    for _ in range(600):
        optimizer.zero_grad()
        for pair, often in (((1.0, 2.0), 1), ((2.0, 2.0), 20 if on_policy else 0)):
            episode = Episode(torch.tensor(pair).unsqueeze(1), actions, torch.zeros(1), False)
            (often / 20 * td_loss(value, value, episode, args)).backward()
        optimizer.step()
    w = abs(value.network[0].weight.item())
    assert w < 0.1 if on_policy else w > 1.5


# Learning ---------------------------------------------------------------------------------------------------


def error_after(trace_decay: float, learning_rate: float, runs: int, episodes: int = 10) -> float:
    """Root mean square error of V on the 19 states, on the average of the first episodes and of `runs` runs."""
    args, errors = Args(trace_decay=trace_decay, gamma=1.0), []
    env = gym.make("RandomWalk19-v0")
    env.action_space.seed(0)
    for _ in range(runs):
        value = table(np.zeros(19))
        optimizer = torch.optim.SGD(value.parameters(), learning_rate)
        for _ in range(episodes):
            episode = play(env, lambda obs: env.action_space.sample())
            optimizer.zero_grad()
            td_loss(value, value, episode, args).backward()
            optimizer.step()
            errors.append(min(np.sqrt(np.mean((weights(value) - TRUE) ** 2)), 1.0))
    return float(np.mean(errors))


def test_between_td_and_monte_carlo_the_error_is_least():
    """Sutton and Barto's U, of the off-line algorithm (figure 12.3), each λ at its best step size of some."""
    best = {x: min(error_after(x, rate, 15) for rate in rates) for x, rates in
            {0.0: (0.1, 0.2, 0.4), 0.9: (0.02, 0.04, 0.08), 1.0: (0.005, 0.01, 0.02)}.items()}  # fmt: skip
    assert best[0.9] < best[0.0] - 0.02 and best[0.9] < best[1.0] - 0.02, best


@pytest.mark.parametrize("q", [False, True])
def test_the_walks_values(q, tmp_path):
    """Q(s, a) is the next state's value, or what lies beyond the end."""
    flags = f"--output-dir {tmp_path} --eval-episodes 20 --learning-rate {0.01 if q else 0.005}"
    found = train(read_args([*flags.split(), *(["--q"] if q else [])]))
    learned = weights(found["value"])
    if q:
        expected = np.stack([np.append(-1, TRUE[:-1]), np.append(TRUE[1:], 1)], 1)
        assert np.abs(learned.reshape(19, 2) - expected).max() < 0.25
    else:
        assert np.abs(learned - TRUE).max() < 0.15
        with np.load(found["run_dir"] / "solution.npz") as kept:
            np.testing.assert_allclose(kept["V"], learned)


def truth(positions: np.ndarray, episodes: int = 100_000) -> np.ndarray:
    """−steps from each position until the walk on [−3, 3] is left, by simulation."""
    rng, means = np.random.default_rng(0), []
    for position in positions:
        x, steps = np.full(episodes, position), np.zeros(episodes)
        while len(x):
            steps[: len(x)] += 1
            x = x + rng.choice([-1, 1], len(x)) * rng.normal(1, 0.25, len(x))
            inside = np.abs(x) <= 3
            order = np.argsort(~inside, kind="stable")
            steps[: len(x)] = steps[: len(x)][order]
            x = x[inside]
        means.append(-steps.mean())
    return np.array(means)


@pytest.mark.slow
def test_a_network_on_the_continuous_walk(tmp_path):
    positions = np.linspace(-2.75, 2.75, 12)
    found = train(read_args(f"--env-id ContinuousWalk-v0 --output-dir {tmp_path}".split()))
    inputs = torch.as_tensor(positions, dtype=torch.float32).unsqueeze(1)
    values = found["value"](inputs, torch.zeros(12)).detach().numpy()
    assert np.abs(values - truth(positions)).max() < 0.5, values - truth(positions)


def test_the_target_network_is_renewed_every_k_episodes(tmp_path, monkeypatch):
    """With K = 3 the first three regressions bootstrap from zeros, the next three from what these left."""
    seen = []
    loss = td_lambda.td_loss
    monkeypatch.setattr(td_lambda, "td_loss", lambda *x: seen.append([weights(y).copy() for y in x[:2]]) or loss(*x))
    train(Args(output_dir=str(tmp_path), total_timesteps=1_500, target_frequency=3, eval_episodes=1))
    assert len(seen) > 7
    for number, (_, target) in enumerate(seen):
        np.testing.assert_array_equal(target, seen[number - number % 3][0])


def test_without_bootstrapping_the_target_network_is_without_effect(tmp_path):
    args = Args(output_dir=str(tmp_path), total_timesteps=1_500, trace_decay=1.0, learning_rate=0.01, eval_episodes=1)
    few, many = (weights(train(replace(args, target_frequency=k))["value"]) for k in (1, 5))
    np.testing.assert_array_equal(few, many)


# Runs -------------------------------------------------------------------------------------------------------


def test_the_file_alone_runs(tmp_path):
    """Warnings being errors, with everything at its default, within a minute."""
    shutil.copy(td_lambda.__file__, tmp_path)
    command = [sys.executable, "-W", "error", "td_lambda.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    compared, evaluation, run_dir = done.stdout.splitlines()[-3:]
    assert re.fullmatch(r"evaluation: -?\d\.\d\d ± \d\.\d\d over 100 episodes", evaluation)
    assert run_dir == f"run directory: runs/{folder.name}"
    names = {re.sub(r"^events\.out\.tfevents\..*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "monitor.csv", "solution.npz", "value.pt"}
    assert load_results(str(folder))["l"].sum() >= 100_000
    tags = {*EventAccumulator(str(folder)).Reload().Tags()["scalars"]}
    assert tags >= {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/value_loss"}


def test_a_policy_of_a_file(tmp_path):
    """Always right, in the walk: V is 1 wherever it comes."""

    class Right(torch.nn.Module):
        def forward(self, obs):
            return torch.ones_like(obs)

    dynamic = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(Right(), (torch.zeros(2, dtype=torch.int64),), dynamic_shapes=dynamic), "p.pt2"
    )
    found = train(
        read_args(f"--policy p.pt2 --total-timesteps 1000 --learning-rate 0.5 --output-dir {tmp_path}".split())
    )
    np.testing.assert_allclose(weights(found["value"]), [0] * 9 + [1] * 10, atol=1e-3)
    assert (found["returns"] == 1).all()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--policy nowhere.pt2", ["--policy nowhere.pt2"]),
        ("--trace-decay 1.1", ["--trace-decay", "from 0 to 1"]),
        ("--learning-rate 0", ["--learning-rate", "positive"]),
        ("--hidden-sizes 0", ["--hidden-sizes", "at least 1"]),
    ],
)
def test_refusals(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train(read_args(flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(word in line for word in words), line
    assert not Path("runs").exists()


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(Args(learning_rate=1e30, output_dir=str(tmp_path)))
    assert stop.value.code == 1 and "--learning-rate" in capsys.readouterr().err


def test_the_same_seed_is_the_same_run(tmp_path):
    args = Args(output_dir=str(tmp_path), total_timesteps=2_000, eval_episodes=3)
    runs = [train(replace(args, seed=seed)) for seed in (1, 1, 2)]
    a, b, c = ((weights(x["value"]), x["returns"]) for x in runs)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and (a[0] != c[0]).any()


def test_a_time_limit_bootstraps(tmp_path):
    """OneState-v0 has reward 1 for ever and a limit of 10 steps: with γ = 0.9 its value is 10."""
    flags = "--env-id OneState-v0 --gamma 0.9 --learning-rate 0.05 --total-timesteps 5000 --eval-episodes 1"
    found = train(read_args(f"{flags} --hidden-sizes 8 --optimizer Adam --output-dir {tmp_path}".split()))
    value = found["value"](torch.zeros(1, 1), torch.zeros(1)).item()
    assert value == pytest.approx(10, rel=0.02)


# Seeds and steps --------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_run_of_a_walk_by_chance(tmp_path):
    """Networks, steps and actions; evaluation begins with seeds of its own."""
    args = Args("ContinuousWalk-v0", hidden_sizes=(8,), optimizer="Adam", total_timesteps=60, eval_episodes=3)
    args.output_dir, runs = str(tmp_path), []
    for seed in (1, 1, 2):
        found = td_lambda.train(replace(args, seed=seed))
        runs.append((torch.cat([x.flatten() for x in found["value"].parameters()]), found["returns"].tolist()))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] and not torch.equal(runs[0][0], runs[2][0])


def test_episodes_are_reset_with_their_seeds(tmp_path, monkeypatch):
    seeds, original = [], td_lambda.play
    monkeypatch.setattr(td_lambda, "play", lambda env, act, seed=None: seeds.append(seed) or original(env, act, seed))
    td_lambda.train(Args(seed=4, total_timesteps=1, eval_episodes=2, output_dir=str(tmp_path)))
    assert seeds == [4, 1_000_004, 1_000_005]


def test_steps_of_the_continuous_walk():
    """N(1, ¼²) to the right or left."""
    env, steps = td_lambda.ContinuousWalk(), []
    env.reset(seed=1)
    for i in range(4_000):
        env.position[:] = 0
        steps.append((1 if i % 2 else -1) * env.step(i % 2)[0].item())
    assert np.mean(steps) == pytest.approx(1, abs=0.02) and np.std(steps) == pytest.approx(0.25, abs=0.01)


def test_sarsa_bootstraps_from_the_next_action():
    """Q is 1, 2 in state 0 and 4, 8 in state 1; a step from (0, 1) with reward 1 to (1, 0)."""
    q = td_lambda.ValueFunction(Discrete(2), Discrete(2), (), True)
    q.network[0].weight.data[:] = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    episode = td_lambda.Episode(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1.0]), False)
    loss = td_lambda.td_loss(q, q, episode, Args(q=True, gamma=0.5, trace_decay=0.0))
    assert loss.item() == pytest.approx(0.5 * (0.5 * 4 + 1 - 2) ** 2)
