"""algos/ppo.py: the maths against closed forms, and whole updates against Stable-Baselines3's."""

import importlib
import itertools

import numpy as np
import ppo
import pytest
import sb3
import scipy.stats
import torch
from gymnasium.spaces import Box, Discrete
from parity import assert_advantages_agree, copy_weights, follow, largest_difference, recorded_envs

GAMMA, LAMBDA = 0.9, 0.8


def random_episodes(T=40, N=3, seed=0):
    """Rewards, values, next values, terminated and truncated (T, N), with several ends of both kinds inside."""
    rng = np.random.default_rng(seed)
    floats = [torch.tensor(rng.normal(size=(T, N))) for _ in range(3)]
    terminated, truncated = (torch.tensor(rng.random((T, N)) < 0.1) for _ in range(2))
    assert terminated.any() and truncated.any() and (terminated & truncated).any() | True
    return *floats, terminated, truncated


# Closed forms -----------------------------------------------------------------------------------------------


def test_gae_is_the_double_sum():
    rewards, values, next_values, terminated, truncated = random_episodes()
    expected = torch.zeros_like(rewards)
    T, N = rewards.shape
    for t, n in itertools.product(range(T), range(N)):
        for k in range(T - t):
            bootstrap = 0.0 if terminated[t + k, n] else next_values[t + k, n]
            delta = rewards[t + k, n] + GAMMA * bootstrap - values[t + k, n]
            expected[t, n] += (GAMMA * LAMBDA) ** k * delta
            if terminated[t + k, n] or truncated[t + k, n]:
                break
    advantages = ppo.gae(rewards, values, next_values, terminated, truncated, GAMMA, LAMBDA)
    torch.testing.assert_close(advantages, expected)


def test_gae_of_a_time_limit_is_the_value_of_going_on():
    """Reward 1 for ever, cut every 10 steps: with V = 100 = 1 / (1 − γ) every advantage is 0; terminated, it is not."""
    ones, no = torch.ones(30, 2), torch.zeros(30, 2, dtype=torch.bool)
    ends = no.clone()
    ends[9::10] = True
    assert ppo.gae(ones, 100 * ones, 100 * ones, no, ends, 0.99, 0.95).abs().max() < 1e-4
    assert ppo.gae(ones, 100 * ones, 100 * ones, ends, no, 0.99, 0.95)[9::10].eq(-99).all()


def test_discounted_returns_restart_with_each_episode_and_carry_over():
    rewards, _, _, terminated, truncated = random_episodes()
    done, expected = terminated | truncated, []
    running = torch.tensor([1.0, 0.0, -2.0], dtype=rewards.dtype)
    previous = running
    for reward, end in zip(rewards, done):
        running = reward + GAMMA * running
        expected.append(running)
        running = running * ~end
    torch.testing.assert_close(ppo.discounted_returns(rewards, done, previous, GAMMA), torch.stack(expected))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_clipped_policy_loss(advantage, ratio):
    """eq. 7, and no gradient exactly where the step has already gone past the clip in the direction of gain."""
    rho = torch.tensor([ratio], requires_grad=True)
    loss = ppo.clipped_policy_loss(rho, torch.tensor([advantage]), 0.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage))
    loss.backward()
    clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert rho.grad.item() == pytest.approx(0.0 if clipped else -advantage)


def test_shuffled_minibatches_are_whole_epochs_in_a_new_order_with_rows_kept_together():
    rows = torch.arange(12)
    parts = list(ppo.shuffled_minibatches([rows, 10 * rows], epochs=2, num_minibatches=3))
    assert len(parts) == 6 and all(len(a) == 4 and torch.equal(10 * a, b) for a, b in parts)
    epochs = [torch.cat([a for a, _ in parts[i : i + 3]]) for i in (0, 3)]
    assert all(torch.equal(epoch.sort().values, rows) for epoch in epochs)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], rows)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert ppo.explained_variance(returns + 5, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(3), returns) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)


def test_clipped_value_loss():
    values, old, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.5]), torch.tensor([2.0, 2.0])
    assert ppo.clipped_value_loss(values, old, returns, None).item() == pytest.approx(((1 - 2) ** 2 + (3 - 2) ** 2) / 2)
    assert ppo.clipped_value_loss(values, old, returns, 0.2).item() == pytest.approx((1.8**2 + 0.7**2) / 2)


def test_approximate_kl_is_the_kl_in_the_mean():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = scipy.stats.entropy(p, q)
    actions = p.multinomial(400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert ppo.approximate_kl((q / p).log()[actions]).item() == pytest.approx(exact, rel=0.02)


def test_running_statistics_are_numpys():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 5, size=(size, 4)).astype(np.float32) for size in (1, 7, 100, 33)]
    statistics = ppo.RunningStatistics(4)
    for batch in batches:
        statistics.update(torch.tensor(batch))
    samples = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, samples.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.var, samples.var(0), rtol=1e-5)
    assert statistics.count == len(samples)
    expected = np.clip((samples - samples.mean(0)) / samples.std(0), -10, 10)
    normalized = statistics.normalize(torch.tensor(samples, dtype=torch.float32))
    np.testing.assert_allclose(normalized, expected, rtol=1e-4, atol=1e-5)
    assert statistics.scale(torch.full((4,), 1e6)).eq(10).all()


def test_running_statistics_keep_their_precision_over_many_batches_far_from_zero():
    rng = np.random.default_rng(0)
    batches = rng.normal(1000, 1, size=(3000, 64, 1)).astype(np.float32)
    statistics = ppo.RunningStatistics(1)
    for batch in batches:
        statistics.update(torch.tensor(batch))
    assert statistics.var.item() == pytest.approx(batches.astype(np.float64).var(), rel=1e-3)


def test_gaussian_is_scipys():
    rng = np.random.default_rng(0)
    mean, actions, log_std = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=3)
    log_prob, entropy = ppo.gaussian_log_prob_and_entropy(*map(torch.tensor, (mean, log_std, actions)))
    expected = scipy.stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(log_prob, expected.logpdf(actions).sum(-1))
    np.testing.assert_allclose(entropy, expected.entropy().sum(-1))


def test_categorical_is_scipys():
    rng = np.random.default_rng(0)
    logits, actions = rng.normal(size=(5, 4)), rng.integers(4, size=5)
    log_prob, entropy = ppo.categorical_log_prob_and_entropy(torch.tensor(logits), torch.tensor(actions))
    probs = scipy.special.softmax(logits, axis=-1)
    np.testing.assert_allclose(log_prob, np.log(probs[np.arange(5), actions]))
    np.testing.assert_allclose(entropy, scipy.stats.entropy(probs, axis=-1))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_samples_follow_the_distribution_whose_log_probability_is_taken(space):
    """E over samples of −log π(a|s) is the entropy, and Discrete frequencies are the softmax."""
    torch.manual_seed(0)
    agent = ppo.ActorCritic(Box(-1, 1, (4,)), space, (8,), log_std_init=-0.5)
    agent.actor[-1].weight.data *= 100
    obs = torch.randn(1, 4).expand(200_000, 4)
    with torch.no_grad():
        actions = agent.sample(agent.actor(obs), agent.draw_noise(len(obs)))
        log_prob, entropy = agent.log_prob_and_entropy(obs, actions)
        if isinstance(space, Discrete):
            frequencies = actions.bincount(minlength=3) / len(obs)
            torch.testing.assert_close(frequencies, agent.actor(obs[0]).softmax(-1), atol=5e-3, rtol=0)
    assert -log_prob.mean().item() == pytest.approx(entropy[0].item(), abs=0.01)


def test_what_the_environment_takes_is_in_its_space():
    box, discrete = Box(np.float32([-1, 0]), np.float32([2, 0.5])), Discrete(3, start=5)
    agent = ppo.ActorCritic(Box(-1, 1, (4,)), box, (8,), log_std_init=3.0)
    obs = torch.randn(100, 4)
    for action in agent.to_env(agent.sample(agent.actor(obs), agent.draw_noise(100))).detach().numpy():
        assert box.contains(action)
    agent = ppo.ActorCritic(Discrete(4, start=1), discrete, (8,))
    for action in agent(torch.tensor([1, 2, 3, 4])).numpy():
        assert discrete.contains(action)


# Parity with Stable-Baselines3 ------------------------------------------------------------------------------


VARIANTS = {
    "plain": {},
    "no advantage normalisation": {"normalize_advantages": False},
    "value clipping": {"clip_value": 0.1},
    "annealed": {"anneal_lr": True, "anneal_clip": True},
    "target KL": {"target_kl": 0.005},
}


@pytest.mark.parametrize("kl, stops", [(0.0149, False), (0.0151, True)])
def test_an_update_stops_above_one_and_a_half_times_the_target_kl(kl, stops):
    agent = ppo.ActorCritic(Box(-1, 1, (3,)), Discrete(2), (4,))
    vector = ppo.parameter_vector(agent)
    before, metrics = vector.detach().clone(), torch.tensor([0, 0, 0, kl, 0])
    optimizer, args = torch.optim.SGD([vector], 1.0), ppo.Args(target_kl=0.01)
    result, kl_passed = ppo.ppo_update(
        agent, optimizer, None, None, args, lambda *_: (torch.ones_like(vector), metrics)
    )
    assert kl_passed == stops and torch.equal(result, metrics)
    torch.testing.assert_close(vector.detach(), before if stops else before - 1)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_parity_with_sb3(env_id, variant, monkeypatch, record_property):
    """Four rollouts through SB3's own train() and through ours: same weights, same data, same minibatch order."""
    T, N, iterations = 64, 4, 4
    args = ppo.Args(
        env_id=env_id,
        num_envs=N,
        num_steps=T,
        total_timesteps=T * N * iterations,
        num_minibatches=4,
        update_epochs=3,
        learning_rate=3e-3,
        **{"anneal_lr": False, "gae_lambda": 0.9, "hidden_sizes": (32, 16)} | VARIANTS[variant],
    )
    env = recorded_envs(env_id, N)
    model = sb3.ppo_model(args, env)
    spaces = env.observation_space, env.action_space
    agent = copy_weights(model.policy, ppo.ActorCritic(*spaces, args.hidden_sizes))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam([ppo.parameter_vector(agent)], args.learning_rate, eps=1e-5, fused=True)
    permutation, orders, stops = np.random.permutation, [], []
    monkeypatch.setattr(np.random, "permutation", lambda n: orders.append(permutation(n)) or orders[-1])

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        obs, next_obs = obs.float(), next_obs.float()  # as SB3's policies make of them
        remaining = 1 - (model.num_timesteps - T * N) / args.total_timesteps
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip = args.clip_coef * (remaining if args.anneal_clip else 1)
        with torch.no_grad():
            values, next_values = agent.value(obs), agent.value(next_obs)
            log_probs, _ = agent.log_prob_and_entropy(obs, actions)
        advantages = ppo.gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        assert_advantages_agree(model, advantages)
        batch = (obs, actions, log_probs, values, advantages, advantages + values)
        batch = ppo.PPOBatch(*(x.flatten(0, 1) for x in batch))
        kl_passed = False
        for order in orders:
            order = torch.as_tensor(order % T * N + order // T)  # SB3 counts its samples environment by environment
            for indices in order.chunk(args.num_minibatches):
                minibatch = ppo.PPOBatch(*(x[indices] for x in batch))
                _, kl_passed = ppo.ppo_update(agent, optimizer, minibatch, clip, args)
                if kl_passed:
                    break
        stops.append(kl_passed)
        orders.clear()

    follow(model, args.total_timesteps, update)
    assert any(stops) == (variant == "target KL")
    reference = copy_weights(model.policy, ppo.ActorCritic(*spaces, args.hidden_sizes))
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"{env_id}, {variant}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("algo", ["ppo", "a2c", "trpo", "kfac"])
def test_the_policy_without_modules_is_the_policy(algo):
    """Also after its weights have moved and after it has taken over a state; it records no gradients."""
    agent = importlib.import_module(algo).ActorCritic(Box(-1, 1, (4,)), Discrete(3), (16, 8))
    function = importlib.import_module(algo).without_modules(agent.actor)
    obs = torch.randn(5, 4)
    for _ in range(2):
        torch.testing.assert_close(function(obs), agent.actor(obs).detach())
        assert not function(obs).requires_grad
        with torch.no_grad():
            for parameter in agent.actor.parameters():
                parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(function(obs), agent.actor(obs).detach())
    agent.load_state_dict({name: x / 2 for name, x in agent.state_dict().items()})
    torch.testing.assert_close(function(obs), agent.actor(obs).detach())
