"""algos/ppo.py: the maths against closed forms, and whole updates against Stable-Baselines3's."""

import copy
import itertools
import math
from collections import namedtuple

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


class Fixed(torch.nn.Module):
    """Has log-probabilities, entropies and values (B,) that do not look at the batch."""

    def __init__(self, log_probs, values, entropies):
        super().__init__()
        self.log_probs, self.values = torch.nn.Parameter(log_probs), torch.nn.Parameter(values)
        self.entropies = torch.nn.Parameter(entropies)

    def log_prob_and_entropy(self, states, actions):
        return self.log_probs, self.entropies

    def value(self, states):
        return self.values


def loss_of(log_ratio, advantages, values=0.0, old_values=0.0, returns=0.0, entropies=0.0, clip=0.2, **flags):
    """The agent, loss and metrics of a batch with these numbers, each (B,) or for all samples."""
    rows = [torch.as_tensor(x, dtype=torch.float32) for x in (log_ratio, advantages, values, old_values, returns)]
    log_ratio, advantages, values, old_values, returns, entropies = torch.broadcast_tensors(
        *rows, torch.as_tensor(entropies, dtype=torch.float32)
    )
    old = torch.linspace(-3, -1, len(log_ratio))
    agent = Fixed(old + log_ratio, values.clone(), entropies.clone())
    batch = ppo.PPOBatch(None, None, old, old_values, advantages, returns)
    args = ppo.Args(**{"normalize_advantages": False, "vf_coef": 0.0, "ent_coef": 0.0} | flags)
    return agent, *ppo.ppo_loss(agent, batch, clip, args)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_clipped_policy_loss(advantage, ratio):
    """eq. 7, and no gradient exactly where the step has already gone past the clip in the direction of gain."""
    agent, loss, metrics = loss_of([math.log(ratio)], [advantage])
    assert loss.item() == pytest.approx(-min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage))
    assert metrics["policy_loss"] == loss and metrics["clipfrac"] == (abs(ratio - 1) > 0.2)
    loss.backward()
    clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert agent.log_probs.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    """eq. 9; the gradient of the value loss is 2 c_v (V − R̂) / B, that of the bonus −c_e / B."""
    advantages, values, returns = torch.randn(3, 5)
    agent, loss, metrics = loss_of([0.0] * 5, advantages, values, 9.0, returns, 0.4, vf_coef=0.7, ent_coef=0.1)
    value_loss = (values - returns).square().mean()
    torch.testing.assert_close(loss, -advantages.mean() + 0.7 * value_loss - 0.1 * 0.4)
    torch.testing.assert_close(metrics["value_loss"], value_loss)
    assert metrics["entropy"].item() == pytest.approx(0.4) and not metrics["policy_loss"].requires_grad
    loss.backward()
    torch.testing.assert_close(agent.values.grad, 2 * 0.7 * (values - returns) / 5)
    torch.testing.assert_close(agent.entropies.grad, torch.full((5,), -0.1 / 5))


def test_normalised_advantages_have_mean_0_and_deviation_1():
    advantages = torch.tensor([1.0, 5.0, -3.0, 4.0])
    agent, loss, _ = loss_of([0.0] * 4, advantages, normalize_advantages=True)
    loss.backward()
    expected = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(agent.log_probs.grad, -expected / 4)
    assert loss_of([0.0], [7.0], normalize_advantages=True)[1] == -7  # one sample has no deviation


def test_shuffled_minibatches_are_whole_epochs_in_a_new_order_with_rows_kept_together():
    rows, pair = torch.arange(12), namedtuple("Pair", "a b")
    parts = list(ppo.shuffled_minibatches(pair(rows, 10 * rows), epochs=2, num_minibatches=3))
    assert all(isinstance(part, pair) for part in parts)
    assert len(parts) == 6 and all(len(a) == 4 and torch.equal(10 * a, b) for a, b in parts)
    epochs = [torch.cat([a for a, _ in parts[i : i + 3]]) for i in (0, 3)]
    assert all(torch.equal(epoch.sort().values, rows) for epoch in epochs)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], rows)


def test_clipped_value_loss():
    flags = dict(values=[1.0, 3.0], old_values=[0.0, 2.5], returns=2.0)
    free, clipped = (loss_of([0.0, 0.0], 0.0, **flags, clip_value=x)[2]["value_loss"] for x in (None, 0.2))
    assert free.item() == pytest.approx(((1 - 2) ** 2 + (3 - 2) ** 2) / 2)
    assert clipped.item() == pytest.approx((1.8**2 + 0.7**2) / 2)


def test_approximate_kl_is_the_kl_in_the_mean():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    actions = p.multinomial(400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    metrics = loss_of((q / p).log()[actions], 0.0)[2]
    assert metrics["approx_kl"].item() == pytest.approx(scipy.stats.entropy(p, q), rel=0.02)


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
    agent = ppo.ActorCritic(Box(-1, 1, (4,)), Discrete(2), (8,), normalize_observations=True)
    agent.observation_statistics = statistics
    expected = np.clip((samples - samples.mean(0)) / samples.std(0), -10, 10)
    states = agent.encode(torch.tensor(samples, dtype=torch.float32))
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)
    assert statistics.scale(torch.full((4,), 1e6)).eq(10).all()


def test_running_statistics_keep_their_precision_over_many_batches_far_from_zero():
    rng = np.random.default_rng(0)
    batches = rng.normal(1000, 1, size=(3000, 64, 1)).astype(np.float32)
    statistics = ppo.RunningStatistics(1)
    for batch in batches:
        statistics.update(torch.tensor(batch))
    assert statistics.var.item() == pytest.approx(batches.astype(np.float64).var(), rel=1e-3)


def distribution_of(outputs, actions, space, log_std=None):
    """log π(a|s) and entropies of an agent whose policy network has these outputs (B, A), in double precision."""
    agent = ppo.ActorCritic(Box(-1, 1, outputs.shape[1:]), space, ()).double()
    agent.actor = torch.nn.Identity()
    if log_std is not None:
        agent.log_std.data.copy_(torch.tensor(log_std))
    return (x.detach() for x in agent.log_prob_and_entropy(torch.tensor(outputs), torch.tensor(actions)))


def test_gaussian_is_scipys():
    rng = np.random.default_rng(0)
    mean, actions, log_std = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=3)
    log_prob, entropy = distribution_of(mean, actions, Box(-1, 1, (3,)), log_std)
    expected = scipy.stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(log_prob, expected.logpdf(actions).sum(-1))
    np.testing.assert_allclose(entropy, expected.entropy().sum(-1))


def test_categorical_is_scipys():
    rng = np.random.default_rng(0)
    logits, actions = rng.normal(size=(5, 4)), rng.integers(4, size=5)
    log_prob, entropy = distribution_of(logits, actions, Discrete(4))
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
        actions = agent.act(obs, agent.draw_noise(len(obs)))
        log_prob, entropy = agent.log_prob_and_entropy(obs, actions)
        if isinstance(space, Discrete):
            frequencies = actions.bincount(minlength=3) / len(obs)
            torch.testing.assert_close(frequencies, agent.actor(obs[0]).softmax(-1), atol=5e-3, rtol=0)
    assert -log_prob.mean().item() == pytest.approx(entropy[0].item(), abs=0.01)


def test_what_the_environment_takes_is_in_its_space():
    box, discrete = Box(np.float32([-1, 0]), np.float32([2, 0.5])), Discrete(3, start=5)
    agent = ppo.ActorCritic(Box(-1, 1, (4,)), box, (8,), log_std_init=3.0)
    obs = torch.randn(100, 4)
    for action in agent.to_env(agent.act(obs, agent.draw_noise(100))).numpy():
        assert box.contains(action)
    agent = ppo.ActorCritic(Discrete(4, start=1), discrete, (8,))
    for action in agent(torch.tensor([1, 2, 3, 4])).numpy():
        assert discrete.contains(action)


# The optimiser ----------------------------------------------------------------------------------------------


def test_clip_gradient_is_pytorchs():
    for bound in (0.1, 1.0, 100.0):
        ours = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        ours[1].bias.requires_grad_(False)
        theirs = copy.deepcopy(ours)
        x = torch.randn(6, 3)
        for network in (ours, theirs):
            network(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
        ppo.clip_gradient(ours.parameters(), bound)
        for x, y in zip(ours.parameters(), theirs.parameters()):
            assert (x.grad is None) == (y.grad is None)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kl, steps", [(0.0149, 8), (0.0151, 0)])
def test_an_update_stops_above_one_and_a_half_times_the_target_kl(kl, steps, monkeypatch):
    taken, step, gradient = [], ppo.LeanAdam.step, ppo.ppo_gradient
    monkeypatch.setattr(ppo.LeanAdam, "step", lambda self: taken.append(step(self)))
    monkeypatch.setattr(ppo, "ppo_gradient", lambda *x: gradient(*x) | {"approx_kl": torch.tensor(kl)})
    flags = "--num-envs 2 --num-steps 8 --num-minibatches 4 --update-epochs 2 --target-kl 0.01 --eval-episodes 1"
    run_dir = ppo.train(ppo.parse_args([*flags.split(), "--total-timesteps", "16"]))["run_dir"]
    (group,) = torch.load(run_dir / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert len(taken) == steps and group["eps"] == 1e-5


# Parity with Stable-Baselines3 ------------------------------------------------------------------------------


VARIANTS = {
    "plain": {},
    "no advantage normalisation": {"normalize_advantages": False},
    "value clipping": {"clip_value": 0.1},
    "annealed": {"anneal_lr": True, "anneal_clip": True},
    "target KL": {"target_kl": 0.005},
}


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
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    permutation, orders, stops = np.random.permutation, [], []
    monkeypatch.setattr(np.random, "permutation", lambda n: orders.append(permutation(n)) or orders[-1])

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        obs, next_obs = obs.float(), next_obs.float()  # as SB3's policies make of them
        remaining = 1 - (model.num_timesteps - T * N) / args.total_timesteps
        ppo.anneal(optimizer, remaining if args.anneal_lr else 1)
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
                optimizer.zero_grad()
                metrics = ppo.ppo_gradient(agent, ppo.PPOBatch(*(x[indices] for x in batch)), clip, args)
                kl_passed = args.target_kl is not None and metrics["approx_kl"] > 1.5 * args.target_kl
                if kl_passed:
                    break
                optimizer.step()
        stops.append(kl_passed)
        orders.clear()

    follow(model, args.total_timesteps, update)
    assert any(stops) == (variant == "target KL")
    reference = copy_weights(model.policy, ppo.ActorCritic(*spaces, args.hidden_sizes))
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"{env_id}, {variant}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5
