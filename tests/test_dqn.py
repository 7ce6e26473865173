"""The maths of algos/dqn.py against definitions and Stable-Baselines3."""

import copy
import itertools

import dqn
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from parity import assert_parameters_agree, follow_replay, recorded_envs
from stable_baselines3 import DQN
from test_replay import CPU, stream


def test_targets_against_the_definition():
    torch.manual_seed(0)
    rewards, terminated = torch.randn(50), torch.rand(50) < 0.3
    discounts, target_q, q = torch.rand(50), torch.randn(50, 4), torch.randn(50, 4)
    plain, double = dqn.q_target(rewards, terminated, discounts, target_q), None
    double = dqn.q_target(rewards, terminated, discounts, target_q, q)
    for i in range(50):
        best = max(range(4), key=lambda a: q[i, a])
        bootstrap = 0 if terminated[i] else discounts[i]
        assert plain[i] == pytest.approx(float(rewards[i] + bootstrap * max(target_q[i])), abs=1e-6)
        assert double[i] == pytest.approx(float(rewards[i] + bootstrap * target_q[i, best]), abs=1e-6)
    assert (double <= plain).all() and (double < plain).any()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("num_envs, capacity, steps", [(1, 40, 30), (1, 40, 95), (3, 40, 11), (3, 40, 50), (2, 8, 9)])
def test_n_step_windows_against_the_definition(n, num_envs, capacity, steps):
    """Every row of the buffer, its windows crossing ends of both kinds, the buffer's end and its newest step."""
    gamma, spaces = 0.9, (Box(-1, 1, (3,)), Discrete(4))
    buffer = dqn.ReplayBuffer(capacity, num_envs, *spaces, CPU)
    histories = [[] for _ in range(num_envs)]
    for step in stream(steps, num_envs, *spaces, seed=steps):
        buffer.add(*step)
        for history, transition in zip(histories, zip(*step)):
            history.append(transition)
    rows = torch.arange(buffer.size)
    ours, discounts = dqn.n_step_transitions(buffer, rows, n, gamma)
    lengths = set()
    for row in rows.tolist():
        env = row % num_envs
        kept = histories[env][-(buffer.capacity // num_envs) :]
        age = (row // num_envs - buffer.position // num_envs) % (buffer.capacity // num_envs)
        start = age if buffer.size == buffer.capacity else row // num_envs
        window = list(itertools.islice(kept, start, start + n))
        ends = [i for i, (*_, terminated, truncated) in enumerate(window) if terminated or truncated]
        window = window[: ends[0] + 1] if ends else window
        lengths.add(len(window))
        assert ours.rewards[row] == pytest.approx(sum(gamma**k * step[2] for k, step in enumerate(window)), abs=1e-5)
        assert discounts[row] == pytest.approx(gamma ** len(window))
        np.testing.assert_allclose(ours.observations[row], window[0][0], rtol=1e-6)
        assert ours.actions[row] == window[0][1]
        np.testing.assert_allclose(ours.next_observations[row], window[-1][3], rtol=1e-6)
        assert (ours.terminated[row], ours.truncated[row]) == window[-1][4:]
    assert set(range(1, min(n, 2) + 1)) <= lengths <= set(range(1, n + 1))


def test_a_one_step_window_is_the_transition():
    buffer = dqn.ReplayBuffer(20, 2, Box(-1, 1, (3,)), Discrete(4), CPU)
    for step in stream(15, 2, Box(-1, 1, (3,)), Discrete(4)):
        buffer.add(*step)
    rows = torch.arange(20)
    ours, discounts = dqn.n_step_transitions(buffer, rows, 1, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(ours, buffer.get(rows)))
    torch.testing.assert_close(discounts, torch.full((20,), 0.9))


def network_and_batch(size=32):
    torch.manual_seed(0)
    network, target = (dqn.QNetwork(Box(-1, 1, (3,)), Discrete(4), (8, 8)) for _ in range(2))
    buffer = dqn.ReplayBuffer(size, 1, Box(-1, 1, (3,)), Discrete(4), CPU)
    for observation, action, reward, next_observation, *ends in stream(size, 1, Box(-1, 1, (3,)), Discrete(4)):
        buffer.add(observation / 100, action, 3 * reward, next_observation / 100, *ends)
    return network, target.requires_grad_(False), buffer.get(torch.arange(size))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_loss_and_its_gradient_against_the_definition(double, loss):
    network, target, batch = network_and_batch()
    metrics = dqn.dqn_gradient(network, target, batch, 0.9, dqn.Args(double=double, loss=loss, max_grad_norm=1e9))
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    total = 0
    for obs, action, reward, next_obs, terminated, _ in zip(*batch):
        with torch.no_grad():
            chooser = network if double else target
            best = chooser.q_values(next_obs).argmax()
            y = reward + (0 if terminated else 0.9) * target.q_values(next_obs)[best]
        error = network.q_values(obs)[action] - y
        small = loss == "squared" or error.abs() < 1
        total = total + (0.5 * error.square() if small else error.abs() - 0.5)
    mean = total / len(batch.rewards)
    torch.testing.assert_close(metrics["td_loss"], mean.detach())
    mean.backward()
    torch.testing.assert_close(gradients, [p.grad for p in network.parameters()])
    taken = network.q_values(batch.observations)[torch.arange(32), batch.actions]
    torch.testing.assert_close(metrics["q_values"], taken.mean().detach())


def test_the_gradient_is_bounded_and_the_target_left_alone():
    network, target, batch = network_and_batch()
    before = copy.deepcopy(target.state_dict())
    gradients = []
    for bound in (1e9, 1e-3):
        network.zero_grad()
        dqn.dqn_gradient(network, target, batch, 0.9, dqn.Args(max_grad_norm=bound))
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    norm = gradients[0].norm()
    assert norm > 0.01
    torch.testing.assert_close(gradients[1], gradients[0] * 1e-3 / norm, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_polyak_update_against_the_definition(tau):
    network, target, _ = network_and_batch()
    expected = [(1 - tau) * b + tau * a for a, b in zip(network.parameters(), target.parameters())]
    dqn.polyak_update(target, network, tau)
    torch.testing.assert_close(list(target.parameters()), [x.detach() for x in expected])


def test_epsilon_greedy_and_boltzmann_frequencies():
    torch.manual_seed(0)
    n, q = 200_000, torch.tensor([1.0, 3.0, 2.0])
    bound = 5 * 0.5 / n**0.5
    frequencies = dqn.epsilon_greedy(q.expand(n, 3), 0.3).bincount() / n
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.8, 0.1]), atol=bound, rtol=0)
    frequencies = dqn.boltzmann(q.expand(n, 3), 0.5).bincount() / n
    torch.testing.assert_close(frequencies, (q / 0.5).softmax(0), atol=bound, rtol=0)
    assert (dqn.epsilon_greedy(q.expand(n, 3), 0.0) == 1).all()


# Stable-Baselines3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_step", [1, 3])
def test_updates_agree_with_sb3(n_step, record_property):
    """SB3's own learn() and train(), over the same data with the same minibatches, in a buffer that overflows.

    Our targets follow by the rule of train(), which tests/test_q_training.py holds against its definition.
    """
    env = recorded_envs("CartPole-v1", 1)
    settings = dict(learning_rate=1e-3, batch_size=32, gamma=0.97, max_grad_norm=0.5)
    model = DQN(
        "MlpPolicy",
        env,
        **settings,
        buffer_size=300,
        learning_starts=100,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=20,
        tau=0.7,
        exploration_initial_eps=1.0,
        exploration_final_eps=0.5,
        n_steps=n_step,
        policy_kwargs=dict(net_arch=[16, 16]),
        seed=0,
        device="cpu",
    )
    args = dqn.Args(double=False, n_step=n_step, **settings)
    network = dqn.QNetwork(env.observation_space, env.action_space, (16, 16))
    for ours, theirs in zip(network.parameters(), model.q_net.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    target = copy.deepcopy(network).requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate)
    buffer = dqn.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)
    seen = 100

    def update(rows):
        nonlocal seen
        for step in range(seen, model.num_timesteps):
            if step // 20 < (step + 1) // 20:
                dqn.polyak_update(target, network, 0.7)
        seen = model.num_timesteps
        batch, discounts = dqn.n_step_transitions(buffer, rows, n_step, args.gamma)
        optimizer.zero_grad()
        dqn.dqn_gradient(network, target, batch, discounts, args)
        optimizer.step()

    updates = follow_replay(model, buffer, 1000, update)
    assert updates > 200
    worst = max(
        assert_parameters_agree(network, model.q_net, 1e-5, before),
        assert_parameters_agree(target, model.q_net_target, 1e-5, before),
    )
    record_property("largest difference", worst)
    print(f"dqn, n = {n_step}: largest difference {worst:.1e} after {updates} updates")


# Maximisation bias ------------------------------------------------------------------------------------------


def value_of_left(double: bool, seed: int) -> float:
    """Sutton & Barto, example 6.7: what Q-learning believes of going left, the mean over its last updates.

    From A, right ends with 0 and left leads to B, where each of 8 actions ends with N(−0.1, 1): left is worth −0.1.
    Every update sees new outcomes, every 200 updates the target network becomes the trained one.
    """
    torch.manual_seed(seed)
    network = dqn.QNetwork(Discrete(2), Discrete(8), (16,))
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    args = dqn.Args(double=double, loss="squared")
    values = []
    for i in range(3000):
        states, actions = torch.randint(2, (4,)), torch.randint(8, (4,))
        in_b = states == 1
        rewards = torch.where(in_b, torch.randn(4) - 0.1, 0.0)
        terminated = in_b | (actions == 0)
        batch = dqn.Transitions(states, actions, rewards, torch.ones_like(states), terminated, terminated & False)
        optimizer.zero_grad()
        dqn.dqn_gradient(network, target, batch, 1.0, args)
        optimizer.step()
        if i % 200 == 199:
            dqn.polyak_update(target, network, 1.0)
        if i >= 1000:
            with torch.no_grad():
                values.append(network.q_values(torch.tensor(0))[1:].mean())
    return torch.stack(values).mean().item()


def test_plain_q_learning_overestimates_and_double_does_not():
    plain, double = ([value_of_left(double, seed) for seed in range(2)] for double in (False, True))
    print(f"left is worth -0.1; DQN says {np.mean(plain):.2f}, Double DQN {np.mean(double):.2f}")
    assert min(plain) > 0 > max(double), "plain: left looks better than right; double: it does not"
    assert np.mean(double) == pytest.approx(-0.1, abs=0.05)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--learning-starts 100", "--learning-starts 100 must be below --total-timesteps 100"),
        ("--exploration-start 1.5", "--exploration-start"),
        ("--exploration boltzmann --exploration-end 0", "--exploration-end"),
        ("--exploration-fraction 0", "--exploration-fraction"),
    ],
)
def test_settings_without_a_meaning_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.parse_args(f"--total-timesteps 100 --learning-starts 10 {flags}".split()))
    assert stopped.value.code == 2 and named in capsys.readouterr().err
