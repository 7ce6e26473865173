"""algos/grpo.py: group advantages, the KL to the reference, and REINFORCE's gradient as a special case."""

import copy
from collections import namedtuple

import grpo
import gymnasium as gym
import numpy as np
import pytest
import reinforce
import scipy.stats
import torch
from gymnasium.spaces import Box, Discrete
from test_learning import last_scalar, train
from test_reinforce import LENGTHS, play, recorded


class IgnoresSeed(gym.Env):
    """Starts anywhere, whatever the seed; every observation is the same array."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)
    observation = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        self.observation[:] = np.random.default_rng().uniform(-1, 1, 1)
        return self.observation, {}


gym.register("IgnoresSeed-v0", IgnoresSeed, max_episode_steps=10)


# Advantages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_normalisation", [True, False])
def test_group_advantages_are_the_definition(std_normalisation):
    returns = torch.randn(5, 12, dtype=torch.float64) * 30 + 7
    advantages = grpo.group_advantages(returns, 4, std_normalisation)
    for t in range(5):
        for group in (slice(0, 4), slice(4, 8), slice(8, 12)):
            expected = returns[t, group].numpy() - returns[t, group].mean().item()
            expected /= returns[t, group].numpy().std() if std_normalisation else 1
            np.testing.assert_allclose(advantages[t, group], expected, rtol=1e-6)
            assert abs(advantages[t, group].mean()) < 1e-12


@pytest.mark.parametrize("value", [0.0, 1 / 3, 63.39676587, -1e6])
def test_a_group_of_equal_returns_gives_exactly_0(value):
    """Also where the mean of G equal numbers is not that number to the last bit, as for most of these G."""
    for group_size in range(2, 20):
        returns = torch.full((1, 2 * group_size), value)
        returns[0, -1] += 1
        advantages = grpo.group_advantages(returns, group_size, std_normalisation=True)[0]
        assert advantages[:group_size].eq(0).all()
        assert advantages[group_size:].isfinite().all() and advantages[-1] > 0


@pytest.mark.parametrize("reward_to_go", [False, True])
def test_with_one_epoch_and_no_deviation_the_gradient_is_that_of_reinforces_mean_baseline(reward_to_go):
    """Times (G−1)/G, as the group's mean has the episode itself in it, and times episodes/steps: a mean over steps."""
    policy, (observations, actions, rewards, running, *_), _ = play(grpo)
    returns = grpo.returns_to_go(rewards, 0.9)
    returns = returns if reward_to_go else returns[:1].expand_as(returns)
    weights = returns - reinforce.leave_one_out_mean(returns)
    reinforce.policy_gradient(policy, observations, actions, weights, running, reinforce.Args())
    theirs = [p.grad.clone() for p in policy.parameters()]

    policy.zero_grad()
    advantages = grpo.group_advantages(returns, 4, std_normalisation=False)
    old = policy.log_prob_and_entropy(observations, actions)[0].detach()
    batch = grpo.GRPOBatch(*(x[running] for x in (observations, actions, old, old, advantages)))
    grpo.grpo_gradient(policy, batch, grpo.Args(ent_coef=0.0, kl_coef=0.0))
    factor = (4 - 1) / 4 * 4 / sum(LENGTHS)
    assert all(gradient.abs().max() > 1e-3 for gradient in theirs)
    ours = [p.grad for p in policy.parameters()]
    torch.testing.assert_close(ours, [gradient * factor for gradient in theirs], rtol=1e-4, atol=1e-7)


# The loss ---------------------------------------------------------------------------------------------------


def one_state_batch(pi, reference):
    """A policy of one state with these probabilities, and the batch in which every action has its share exactly."""
    policy = grpo.Policy(Discrete(1), Discrete(len(pi)), ())
    policy.actor[-1].weight.data.zero_()
    policy.actor[-1].bias.data.copy_(torch.tensor(pi).log())
    actions = torch.repeat_interleave(torch.arange(len(pi)), (torch.tensor(pi) * 10).round().int())
    states = policy.encode(torch.zeros(10, dtype=torch.int64))
    log_probs = torch.tensor(pi).log()[actions]
    batch = grpo.GRPOBatch(states, actions, log_probs, torch.tensor(reference).log()[actions], torch.zeros(10))
    return policy, batch


def test_the_kl_to_the_reference_and_its_gradient():
    """Where actions have their shares exactly: the value is KL(π ‖ π_ref), the gradient that of KL(π_ref ‖ π)."""
    pi, reference = [0.5, 0.3, 0.2], [0.1, 0.4, 0.5]
    policy, batch = one_state_batch(pi, reference)
    metrics = grpo.grpo_gradient(policy, batch, grpo.Args(kl_coef=0.7, ent_coef=0.0))
    exact = scipy.stats.entropy(pi, reference)
    assert abs(exact - scipy.stats.entropy(reference, pi)) > 0.05
    assert metrics["reference_kl"].item() == pytest.approx(exact, rel=1e-5)
    gradient = policy.actor[-1].bias.grad
    torch.testing.assert_close(gradient, 0.7 * (torch.tensor(pi) - torch.tensor(reference)))


def test_the_entropy_bonus_and_its_gradient():
    pi = [0.5, 0.3, 0.2]
    policy, batch = one_state_batch(pi, pi)
    metrics = grpo.grpo_gradient(policy, batch, grpo.Args(kl_coef=0.0, ent_coef=0.3))
    assert metrics["entropy"].item() == pytest.approx(scipy.stats.entropy(pi), rel=1e-5)
    gradient = policy.actor[-1].bias.grad
    p = np.array(pi)
    np.testing.assert_allclose(gradient, 0.3 * p * (np.log(p) + scipy.stats.entropy(p)), rtol=1e-4, atol=1e-6)


def test_the_ratio_is_clipped():
    """The first action's ratio is 2 and its advantage positive: no gradient, and half of the batch is clipped."""
    policy, batch = one_state_batch([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    log_probs = torch.where(batch.actions == 0, np.log(0.25), batch.log_probs)
    batch = batch._replace(log_probs=log_probs, advantages=(batch.actions == 0).float())
    metrics = grpo.grpo_gradient(policy, batch, grpo.Args(clip_coef=0.2))
    assert metrics["clipfrac"] == 0.5 and metrics["policy_loss"].item() == pytest.approx(-1.2 * 0.5)
    assert metrics["approx_kl"].item() == pytest.approx(0.5 * (2 - 1 - np.log(2)), rel=1e-5)
    assert policy.actor[-1].bias.grad.abs().max() < 1e-7


@pytest.mark.parametrize("ratio, advantage, slope", [(0.5, -1.0, 0.0), (0.5, 1.0, -0.5), (1.1, 1.0, -1.1), (2, -1, 2)])
def test_there_is_no_gradient_exactly_where_the_step_went_past_the_clip_in_the_direction_of_gain(
    ratio, advantage, slope
):
    """arXiv 1707.06347, eq. 7, in one sample: −ρ Â in log π, or 0."""
    log_prob = torch.zeros(1, requires_grad=True)
    policy = torch.nn.Module()
    policy.log_prob_and_entropy = lambda states, actions: (log_prob, torch.zeros(1))
    old = -torch.tensor([ratio]).log()
    grpo.grpo_gradient(policy, grpo.GRPOBatch(None, None, old, old, torch.tensor([advantage])), grpo.Args())
    assert log_prob.grad.item() == pytest.approx(slope)


def test_shuffled_parts_are_whole_epochs_in_a_new_order_with_rows_kept_together():
    rows, pair = torch.arange(11), namedtuple("Pair", "a b")
    parts = list(grpo.shuffled_parts(pair(rows, 10 * rows), epochs=2, parts=4))
    assert all(isinstance(part, pair) for part in parts)
    assert [len(a) for a, _ in parts] == 2 * [3, 3, 3, 2] and all(torch.equal(10 * a, b) for a, b in parts)
    epochs = [torch.cat([a for a, _ in parts[i : i + 4]]) for i in (0, 4)]
    assert all(torch.equal(epoch.sort().values, rows) for epoch in epochs)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], rows)


# Training ---------------------------------------------------------------------------------------------------

TINY = ["--hidden-sizes", 8, "--no-anneal-lr", "--eval-episodes", 1, "--num-minibatches", 1, "--update-epochs", 1]
GROUPS = ["--num-envs", 6, "--group-size", 3, "--groups", 4]


def test_each_group_starts_from_one_state_of_its_own(monkeypatch):
    starts = recorded(grpo, monkeypatch, "play_episodes", lambda episodes, *_: episodes.observations[0])
    flags = [*TINY, *GROUPS, "--total-timesteps"]
    run_dir = train(grpo, *flags, 600)["run_dir"]
    train(grpo, "--resume", run_dir, "--total-timesteps", 1200)
    groups = torch.cat(starts).unflatten(0, (-1, 3))
    assert len(groups) >= 12 and (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique(dim=0)) == len(groups)


@pytest.mark.parametrize("flags", [["--reward-to-go"], ["--no-reward-to-go", "--no-std-normalisation"]])
def test_a_batch_is_every_step_that_was_played_with_the_advantage_of_its_episode(flags, monkeypatch):
    """By loops over rounds, groups, episodes and steps."""
    rounds = recorded(grpo, monkeypatch, "play_episodes", lambda episodes, *_: episodes)
    batches = recorded(grpo, monkeypatch, "grpo_gradient", lambda _, policy, batch, args: batch)
    flags = [*TINY, *GROUPS, "--gamma", 0.9, "--env-id", "CartPole-v1", "--total-timesteps", 1, *flags]
    result = train(grpo, *flags)
    expected = []
    for observations, _, rewards, running, *_ in rounds:
        lengths = running.sum(0).tolist()
        R = np.zeros(rewards.shape)
        for i, length in enumerate(lengths):
            for t in range(len(R)):
                first = t if "--reward-to-go" in flags else 0
                R[t, i] = sum(0.9 ** (k - first) * rewards[k, i].item() for k in range(first, length))
        for i, length in enumerate(lengths):
            group = slice(i // 3 * 3, i // 3 * 3 + 3)
            for t in range(length):
                advantage = R[t, i] - R[t, group].mean()
                if "--no-std-normalisation" not in flags and advantage != 0:
                    advantage /= R[t, group].std()
                expected.append([*observations[t, i].tolist(), advantage])
    (batch,) = batches
    found = torch.cat([batch.states, batch.advantages[:, None]], 1).numpy()
    expected = np.array(expected, dtype=np.float32)
    found, expected = (x[np.lexsort(x.T[::-1])] for x in (found, expected))  # a group shares its first observations
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert len(rounds) == 2 and len(found) == torch.load(result["run_dir"] / "checkpoint.pt")["step"]


def test_the_reference_is_renewed_every_so_many_iterations_also_after_a_resume(monkeypatch):
    """In the first step of an iteration π is π_old: where the reference is new, both KLs are 0."""
    kls = recorded(grpo, monkeypatch, "grpo_gradient", lambda metrics, *_: metrics)
    iterations = iter(4 * [True] + [False] + 4 * [True] + [False])
    monkeypatch.setattr(grpo.Run, "goes_on", lambda run: next(iterations))
    flags = [*TINY, *GROUPS, "--kl-coef", 0.1, "--reference-every", 3, "--learning-rate", 0.01]
    run_dir = train(grpo, *flags, "--num-minibatches", 2, "--update-epochs", 2)["run_dir"]
    train(grpo, "--resume", run_dir)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["updates"] == len(kls)
    first = kls[::4]  # of the four gradient steps of each iteration
    assert len(first) == 8 and [abs(x["approx_kl"]) < 1e-6 for x in first] == [True] * 8
    assert [abs(x["reference_kl"]) < 1e-6 for x in first] == [i % 3 == 0 for i in range(8)]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_reference_keeps_its_own_observation_statistics(kl_coef, monkeypatch):
    """In the second iteration the reference is the policy of the first one, with the statistics of then."""
    played = recorded(
        grpo, monkeypatch, "play_episodes", lambda episodes, policy, *_: (copy.deepcopy(policy), episodes)
    )
    batches = recorded(grpo, monkeypatch, "shuffled_parts", lambda _, batch, *__: batch)
    flags = ["--num-envs", 6, "--group-size", 3, "--groups", 2, "--normalize-observations", "--kl-coef", kl_coef]
    train(grpo, *TINY, *flags, "--total-timesteps", 200)
    (reference, _), (policy, (observations, actions, _, running, *_)) = played[:2]
    observations, actions = observations[running], actions[running]
    expected, _ = reference.log_prob_and_entropy(reference.encode(observations), actions)
    torch.testing.assert_close(batches[1].reference_log_probs, expected)
    other, _ = reference.log_prob_and_entropy(policy.encode(observations), actions)
    assert (expected - other).abs().max() > 1e-3


def test_an_environment_that_ignores_the_seed_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        train(grpo, "--env-id", "IgnoresSeed-v0")
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("grpo.py: IgnoresSeed-v0") and "seed" in lines[0]


@pytest.mark.parametrize("env_id", ["OneState-v0", "OneStateBox-v0", "OneStateDiscrete-v0"])
def test_without_a_critic_a_return_ends_at_the_cut(env_id):
    result = train(grpo, "--env-id", env_id, *TINY, *GROUPS, "--total-timesteps", 40, "--gamma", 0.9)
    truth = np.mean([(1 - 0.9**k) / 0.1 for k in range(1, 11)])
    assert last_scalar(result["run_dir"], "losses/returns") == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--no-std-normalisation", "--reward-to-go", "--kl-coef", 0.01]])
def test_grpo_learns(flags):
    assert train(grpo, "--total-timesteps", 15_000, *flags)["returns"].mean() > 100
