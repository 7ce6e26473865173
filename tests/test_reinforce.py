"""algos/reinforce.py: its estimates against the exact gradient of a small MDP, its updates against SB3's A2C."""

import copy
import itertools

import grpo
import gymnasium as gym
import numpy as np
import pytest
import reinforce
import torch
from gymnasium.spaces import Box, Discrete
from parity import Recorder, copy_weights
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv
from test_learning import last_scalar, train

BASELINES = ("none", "mean", "optimal", "value")


class KnownLengths(gym.Env):
    """Episodes whose length is the seed; observations are (length, t).

    Odd ones terminate, even ones are truncated, those of two steps are both.
    """

    observation_space, action_space = Box(-100, 100, (2,)), Discrete(2)

    def observe(self):
        return np.array([self.length, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = int(self.np_random.integers(1, 9)) if seed is None else seed % 8 + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        end, odd = self.t >= self.length, self.length % 2 == 1
        return self.observe(), 1.0 + action * self.t, end and (odd or self.length == 2), end and not odd, {}


class Equal(gym.Env):
    """Seven steps of reward 0.1, whatever the actions: all episodes are equal."""

    observation_space, action_space = Box(0, 7, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 0.1, self.t == 7, False, {}


gym.register("Equal-v0", Equal)
gym.register("KnownLengths-v0", KnownLengths)
SEEDS = [4, 0, 7, 1]
LENGTHS = [5, 1, 8, 2]


def play(module, seeds=SEEDS, env_id="KnownLengths-v0"):
    """Episodes of an untrained policy → the policy, the episodes, and (environment, return, length) of their ends."""
    torch.manual_seed(0)
    envs = module.Envs(module.Args(env_id=env_id), len(seeds))
    policy = module.Policy(envs.observation_space, envs.action_space, (8,))
    return policy, module.play_episodes(policy, envs, seeds), envs.episodes


# Episodes ---------------------------------------------------------------------------------------------------


def test_every_environment_plays_one_episode_and_idle_steps_are_left_out():
    _, (observations, actions, rewards, running, final_observations, truncated), ends = play(reinforce)
    assert running.shape == rewards.shape == actions.shape == (8, 4)
    for i, length in enumerate(LENGTHS):
        assert running[:, i].tolist() == [t < length for t in range(8)]
        expected = torch.tensor([[length, t] for t in range(length)], dtype=torch.float32)
        torch.testing.assert_close(observations[:length, i], expected)
        torch.testing.assert_close(rewards[:length, i], 1.0 + actions[:length, i] * torch.arange(1, length + 1))
        assert rewards[length:, i].eq(0).all()
        assert final_observations[i].tolist() == [length, length]
    assert truncated.tolist() == [False, False, True, False]  # of 5, 1, 8 and 2 steps; the last is terminated too
    expected = [(i, rewards[:, i].sum().item(), LENGTHS[i]) for i in np.argsort(LENGTHS)]
    assert ends == expected  # in the order in which they ended


@pytest.mark.parametrize("module", [reinforce, grpo], ids=["reinforce", "grpo"])
def test_an_episode_that_does_not_end_is_reported(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "EPISODE_LIMIT", 8)
    play(module)  # the longest ends with its eighth step
    monkeypatch.setattr(module, "EPISODE_LIMIT", 7)
    with pytest.raises(SystemExit) as exit_:
        play(module)
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in (" 7 steps", "time limit", "ppo.py"))


def test_only_used_steps_count():
    """run.step is the sum of monitor.csv's episode lengths."""
    result = train(reinforce, "--env-id", "KnownLengths-v0", "--total-timesteps", 300, "--eval-episodes", 1)
    lengths = [int(line.split(",")[1]) for line in (result["run_dir"] / "monitor.csv").read_text().splitlines()[2:]]
    assert len(lengths) % 8 == 0 and len(set(lengths)) > 5
    assert sum(lengths) == torch.load(result["run_dir"] / "checkpoint.pt", weights_only=True)["step"] >= 300


# Closed forms -----------------------------------------------------------------------------------------------


def test_returns_to_go_is_the_sum_of_what_follows():
    rewards = torch.randn(7, 3, dtype=torch.float64)
    expected = torch.zeros_like(rewards)
    for t in range(7):
        for k in range(t, 7):
            expected[t] += 0.9 ** (k - t) * rewards[k]
    torch.testing.assert_close(reinforce.returns_to_go(rewards, 0.9), expected)


def test_leave_one_out_mean():
    returns = torch.randn(5, 4, dtype=torch.float64)
    expected = [[returns[t, [j for j in range(4) if j != i]].mean() for i in range(4)] for t in range(5)]
    torch.testing.assert_close(reinforce.leave_one_out_mean(returns), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("N", [2, 3, 8])
def test_leave_one_out_mean_of_equal_returns_is_exactly_these(N):
    returns = reinforce.returns_to_go(torch.ones(500, N), 0.99)
    assert torch.equal(reinforce.leave_one_out_mean(returns), returns)


def test_optimal_baseline_where_one_gradient_is_much_larger():
    """Without that one, the baseline is the mean of the others' returns, and not what is left of a difference."""
    g = torch.ones(3, 2)
    g[0] *= 1e5
    b = reinforce.optimal_baseline(g, torch.tensor([[-50.0], [3.0], [5.0]]) * g)
    torch.testing.assert_close(b, torch.tensor([4.0, -50.0, -50.0]))
    assert reinforce.optimal_baseline(0 * g, 0 * g).eq(0).all()


def test_optimal_baseline_minimises_the_variance_over_the_other_episodes():
    """E[g] = 0, so the variance of h − b g is least where its mean square is: at 0 derivative, for every i."""
    g, h = torch.randn(2, 6, 10, dtype=torch.float64)
    b = reinforce.optimal_baseline(g, h).requires_grad_()
    others = ~torch.eye(6, dtype=torch.bool)
    squares = (h[None] - b[:, None, None] * g[None]).square().sum(-1)  # [i, j]: episode j with i's baseline
    (slope,) = torch.autograd.grad((squares * others).sum(), b)
    assert slope.abs().max() < 1e-6


def test_optimal_baseline_of_whole_returns_is_the_gradient_weighted_mean_return():
    g, returns = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    squares = g.square().sum(1)
    expected = [sum(squares[j] * returns[j] for j in range(6) if j != i) for i in range(6)]
    expected = torch.stack(expected) / (squares.sum() - squares)
    torch.testing.assert_close(reinforce.optimal_baseline(g, returns[:, None] * g), expected)


def test_episode_gradients_are_those_of_each_episode_alone():
    policy, (observations, actions, rewards, running, *_), _ = play(reinforce)
    g, h = reinforce.episode_gradients(policy, observations, actions, rewards, running)
    for i, length in enumerate(LENGTHS):
        log_probs, _ = policy.log_prob_and_entropy(observations[:length, i], actions[:length, i])
        for rows, weights in ((g, 1.0), (h, rewards[:length, i])):
            policy.zero_grad()
            (log_probs * weights).sum().backward(retain_graph=True)
            torch.testing.assert_close(rows[i], torch.cat([p.grad.flatten() for p in policy.parameters()]))


class Tabular(torch.nn.Module):
    """Has these log-probabilities and entropies, whatever the states and actions are."""

    def __init__(self, log_probs, entropies=None):
        super().__init__()
        self.log_probs, self.entropies = log_probs, torch.zeros_like(log_probs) if entropies is None else entropies

    def log_prob_and_entropy(self, states, actions):
        return self.log_probs, self.entropies


def test_the_policy_gradient_sums_over_time_and_averages_over_episodes():
    log_probs, entropies, advantages = torch.randn(3, 4, 2)
    running = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    log_probs.requires_grad_(), entropies.requires_grad_()
    args = reinforce.Args(ent_coef=0.3)
    metrics = reinforce.policy_gradient(Tabular(log_probs, entropies), None, None, advantages, running, args)
    torch.testing.assert_close(log_probs.grad, -advantages * running / 2)
    torch.testing.assert_close(entropies.grad, -0.3 * running / 2)
    terms = (log_probs * advantages + 0.3 * entropies).detach()
    torch.testing.assert_close(metrics["policy_loss"], -(terms[:, 0].sum() + terms[:2, 1].sum()) / 2)
    torch.testing.assert_close(metrics["entropy"], (entropies.detach() * running).sum() / 6)


def test_the_value_gradient_is_a_mean_over_the_steps_that_were_played():
    critic, states, returns = torch.nn.Linear(3, 1), torch.randn(4, 2, 3), torch.randn(4, 2)
    running = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    metrics = reinforce.value_gradient(critic, states, returns, running)
    loss = (critic(states[running]).squeeze(-1) - returns[running]).square().mean()
    torch.testing.assert_close(metrics["value_loss"], loss.detach())
    torch.testing.assert_close([p.grad for p in critic.parameters()], [*torch.autograd.grad(loss, critic.parameters())])


def test_the_entropy_bonus_alone_makes_the_policy_uniform():
    torch.manual_seed(0)
    policy = reinforce.Policy(Box(-1, 1, (3,)), Discrete(4), (8,))
    policy.actor[-1].weight.data *= 300
    states, running = torch.randn(10, 5, 3), torch.ones(10, 5, dtype=torch.bool)
    optimizer, entropies = torch.optim.Adam(policy.parameters(), 0.02), []
    for _ in range(100):
        optimizer.zero_grad()
        batch = states, torch.zeros(10, 5, dtype=torch.int64), torch.zeros(10, 5), running
        entropies.append(reinforce.policy_gradient(policy, *batch, reinforce.Args(ent_coef=0.1))["entropy"].item())
        optimizer.step()
    assert entropies[0] < 1.1 and entropies[-1] == pytest.approx(np.log(4), abs=0.01)


# The exact gradient of a small MDP --------------------------------------------------------------------------

S, A, H, GAMMA = 3, 2, 5, 0.8  # states, actions, horizon, discount


def small_mdp():
    """Transitions (S, A, S + 1), the last state being the end; rewards (S, A); logits of a softmax policy (S, A)."""
    rng = np.random.default_rng(3)
    transitions = rng.dirichlet(np.ones(S + 1), size=(S, A))
    return (torch.tensor(x) for x in (transitions, rng.normal(1.5, 2, (S, A)), rng.normal(size=(S, A))))


def exact_gradient(logits, gamma, reward_to_go):
    """Σ_t Σ_s d_t(s) Σ_a ∇π(a|s) A_t(s, a), by dynamic programming; whole returns discount step t by γ^t."""
    transitions, rewards, _ = small_mdp()
    pi = logits.softmax(-1)
    advantages, value = [], torch.zeros(S, dtype=torch.float64)
    for _ in range(H):
        q = rewards + gamma * transitions[..., :S] @ value
        value = (pi * q).sum(-1)
        advantages.insert(0, q - value[:, None])
    gradient, d = torch.zeros(S, A, dtype=torch.float64), torch.full((S,), 1 / S, dtype=torch.float64)
    for t, advantage in enumerate(advantages):
        gradient += (1 if reward_to_go else gamma**t) * d[:, None] * pi * advantage  # Σ_a ∇π A: here E[A] = 0
        d = torch.einsum("s,sa,san->n", d, pi, transitions[..., :S])
    return gradient


def test_exact_gradient_is_the_derivative_of_the_expected_return():
    transitions, rewards, logits = small_mdp()
    logits.requires_grad_()
    value = torch.zeros(S, dtype=torch.float64)
    for _ in range(H):
        value = (logits.softmax(-1) * (rewards + GAMMA * transitions[..., :S] @ value)).sum(-1)
    (derivative,) = torch.autograd.grad(value.mean(), logits)
    torch.testing.assert_close(exact_gradient(logits.detach(), GAMMA, reward_to_go=False), derivative)


def sample(N, M):
    """M batches of N episodes: states, actions, rewards and running, each (H, N, M)."""
    transitions, rewards, logits = small_mdp()
    generator = torch.Generator().manual_seed(0)

    def draw(probabilities):
        return probabilities.reshape(-1, probabilities.shape[-1]).multinomial(1, generator=generator).view(N, M)

    state, steps = draw(torch.ones(N * M, S)), []
    for _ in range(H):
        running, inside = state < S, state.clamp(max=S - 1)
        action = draw(logits.softmax(-1)[inside])
        steps.append((inside, action, rewards[inside, action] * running, running))
        state = torch.where(running, draw(transitions[inside, action]), S)
    return [torch.stack(x) for x in zip(*steps)]


@pytest.fixture(scope="module")
def estimates():
    """{(baseline, reward-to-go): gradient estimates (M, S, A)} of M batches, by the file's own functions."""
    N, M = 4, 30_000
    states, actions, rewards, running = sample(N, M)
    result = {}
    for baseline, reward_to_go in itertools.product(BASELINES, (True, False)):
        # Logits of its own for every episode: one backward pass gives every episode's gradient.
        logits = small_mdp_logits().expand(N, M, S, A).clone().requires_grad_()
        n, m = torch.arange(N)[:, None], torch.arange(M)
        log_probs = logits.log_softmax(-1)[n, m, states, actions]
        to_go = reinforce.returns_to_go(rewards, GAMMA)
        returns = to_go if reward_to_go else to_go[:1].expand_as(to_go)
        if baseline == "none":
            b = 0.0
        elif baseline == "mean":
            b = reinforce.leave_one_out_mean(returns)
        elif baseline == "optimal":
            totals = ((log_probs * running).sum(), (log_probs * running * returns).sum())
            g, h = (torch.autograd.grad(x, logits, retain_graph=True)[0].flatten(2) for x in totals)
            b = torch.vmap(reinforce.optimal_baseline, in_dims=1, out_dims=1)(g, h)
        else:
            value = torch.stack([to_go[running & (states == s)].mean() for s in range(S)])
            b = value[states if reward_to_go else states[:1]]
        reinforce.policy_gradient(Tabular(log_probs), None, None, returns - b, running, reinforce.Args())
        result[baseline, reward_to_go] = -logits.grad.sum(0) * M
    return result


def small_mdp_logits():
    return list(small_mdp())[2]


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_estimates_are_the_exact_gradient_in_the_mean(estimates, baseline, reward_to_go):
    found = estimates[baseline, reward_to_go]
    exact = exact_gradient(small_mdp_logits(), GAMMA, reward_to_go)
    error = found.std(0) / len(found) ** 0.5
    assert error.max() < 0.03 * exact.norm(), "too few samples to tell a bias"
    assert ((found.mean(0) - exact).abs() < 4 * error).all()


def test_baselines_and_reward_to_go_lower_the_variance(estimates):
    variance = {key: found.var(0).sum().item() for key, found in estimates.items()}
    print({key: round(x, 2) for key, x in variance.items()})
    for reward_to_go in (True, False):
        none, mean, optimal, value = (variance[baseline, reward_to_go] for baseline in BASELINES)
        assert none > 1.1 * mean and none > 1.1 * optimal and mean > 1.02 * value
    for baseline in BASELINES:
        assert variance[baseline, False] > 1.04 * variance[baseline, True]


# What train() makes of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_of_an_iteration_are_the_definition(baseline, reward_to_go, normalize, monkeypatch):
    """R − b by loops over episodes and steps, with the networks as they were before the update."""
    seen = {}

    def record(name, before):
        function = getattr(reinforce, name)

        def recording(*args):
            if name not in seen:
                seen[name] = before(*args)
            result = function(*args)
            if name == "play_episodes":
                seen["episodes"] = result._replace(rewards=result.rewards.clone())  # train adds final values to them
            return result

        monkeypatch.setattr(reinforce, name, recording)

    def values(critic, states, *_):
        final = critic(seen["episodes"].final_observations)
        return critic(states).detach().squeeze(-1).double(), final.detach().squeeze(-1).double()

    record("play_episodes", lambda *args: None)
    record("policy_gradient", lambda policy, states, actions, advantages, *_: (advantages, policy_gradients(policy)))
    record("value_gradient", values)

    def policy_gradients(policy):
        observations, actions, *_ = seen["episodes"]
        rows = []
        for i, length in enumerate(lengths()):
            log_probs, _ = policy.log_prob_and_entropy(observations[:length, i], actions[:length, i])
            grads = [torch.autograd.grad(x, list(policy.parameters()), retain_graph=True) for x in log_probs]
            rows.append(torch.stack([torch.cat([x.flatten() for x in grad]) for grad in grads]).double())
        return rows

    def lengths():
        return seen["episodes"].running.sum(0).tolist()

    flags = ["--env-id", "KnownLengths-v0", "--total-timesteps", 1, "--num-envs", 5, "--gamma", 0.9, "--seed", 2]
    flags += ["--baseline", baseline, "--reward-to-go" if reward_to_go else "--no-reward-to-go", "--eval-episodes", 1]
    train(reinforce, *flags, "--normalize-returns" if normalize else "--no-normalize-returns")
    episodes, (advantages, gradients) = seen["episodes"], seen["policy_gradient"]
    assert episodes.truncated.any() and not episodes.truncated.all() and len(set(lengths())) > 2
    R = np.zeros((8, 5))
    for i, length in enumerate(lengths()):
        rewards = episodes.rewards[:length, i].tolist()
        if baseline == "value" and episodes.truncated[i]:
            rewards.append(seen["value_gradient"][1][i].item())
        for t in range(length):
            first = t if reward_to_go else 0
            R[t, i] = sum(0.9 ** (k - first) * rewards[k] for k in range(first, len(rewards)))
        if not reward_to_go:
            R[:, i] = R[0, i]
    expected = []
    for i, length in enumerate(lengths()):
        others = [j for j in range(5) if j != i]
        g = [x.sum(0).numpy() for x in gradients]
        h = [R[: len(x), j] @ x.numpy() for j, x in enumerate(gradients)]
        for t in range(length):
            b = 0.0
            if baseline == "mean":
                b = np.mean([R[t, j] for j in others])
            elif baseline == "optimal":
                b = sum(g[j] @ h[j] for j in others) / sum(g[j] @ g[j] for j in others)
            elif baseline == "value":
                b = seen["value_gradient"][0][t if reward_to_go else 0, i].item()
            expected.append(R[t, i] - b)
    expected = np.array(expected) / (np.sqrt(np.mean(np.square(expected))) if normalize else 1)
    found = np.concatenate([advantages[:length, i].numpy() for i, length in enumerate(lengths())])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def recorded(module, monkeypatch, name, keep):
    """What `keep` makes of every call of a function of the file: keep(result, *arguments)."""
    function, kept = getattr(module, name), []

    def recording(*args):
        result = function(*args)
        kept.append(keep(result, *args))
        return result

    monkeypatch.setattr(module, name, recording)
    return kept


ONCE = ["--total-timesteps", 1, "--hidden-sizes", 8, "--eval-episodes", 1]


@pytest.mark.parametrize("N", [3, 8])
@pytest.mark.parametrize("baseline, reward_to_go", [("mean", True), ("mean", False), ("optimal", False)])
def test_equal_episodes_have_no_advantage_over_each_other(baseline, reward_to_go, N, monkeypatch):
    """Exactly none: there is nothing that --normalize-returns could make large."""
    seen = recorded(reinforce, monkeypatch, "policy_gradient", lambda _, *args: args[3])
    flags = ["--baseline", baseline, "--reward-to-go" if reward_to_go else "--no-reward-to-go", "--num-envs", N]
    train(reinforce, "--env-id", "Equal-v0", *ONCE, *flags, "--normalize-returns")
    assert seen[0].shape == (7, N) and seen[0].eq(0).all()


@pytest.mark.parametrize("baseline, N", [("none", 1), ("none", 8), ("value", 1)])
def test_equal_weights_are_normalised_to_1(baseline, N, monkeypatch):
    seen = recorded(reinforce, monkeypatch, "policy_gradient", lambda _, *args: args[3])
    flags = ["--baseline", baseline, "--no-reward-to-go", "--num-envs", N, "--normalize-returns"]
    train(reinforce, "--env-id", "Equal-v0", *ONCE, *flags)
    torch.testing.assert_close(seen[0].abs(), torch.ones(7, N))


def test_final_values_are_those_of_normalised_observations(monkeypatch):
    """In the second iteration, when there are statistics to normalise by, and V has been fitted once."""
    played = recorded(
        reinforce,
        monkeypatch,
        "play_episodes",
        lambda episodes, policy, *_: (copy.deepcopy(policy), episodes._replace(rewards=episodes.rewards.clone())),
    )
    fitted = recorded(reinforce, monkeypatch, "value_gradient", lambda _, *args: copy.deepcopy(args))
    flags = ["--env-id", "KnownLengths-v0", "--num-envs", 16, "--value-steps", 1, "--normalize-observations"]
    train(reinforce, *flags, *ONCE, "--total-timesteps", 100)
    (policy, episodes), (critic, _, returns, running) = played[1], fitted[1]
    expected = critic(policy.encode(episodes.final_observations)).squeeze(-1).detach() * episodes.truncated
    assert episodes.truncated.any() and not episodes.truncated.all()
    last = running.sum(0) - 1, range(16)
    torch.testing.assert_close(returns[last], episodes.rewards[last] + 0.99 * expected)


def test_the_learning_rate_falls_with_the_steps_played(monkeypatch):
    lrs, optimizer_step = [], torch.optim.Adam.step
    steps = recorded(reinforce, monkeypatch, "play_episodes", lambda episodes, *_: episodes.running.sum().item())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda x: lrs.append(x.param_groups[0]["lr"]) or optimizer_step(x))
    flags = [*ONCE, "--total-timesteps", 1000, "--learning-rate", 0.02, "--anneal-lr", "--baseline", "mean"]
    run_dir = train(reinforce, *flags)["run_dir"]
    assert len(lrs) > 2
    np.testing.assert_allclose(lrs, 0.02 * (1 - np.cumsum([0, *steps[:-1]]) / 1000), rtol=1e-5)
    lrs.clear()
    before = sum(steps)
    train(reinforce, "--resume", run_dir, "--total-timesteps", 2000)
    assert lrs[0] == pytest.approx(0.02 * (1 - before / 2000), rel=1e-5) and lrs[-1] < lrs[0]
    lrs.clear()
    train(reinforce, *flags, "--no-anneal-lr")
    np.testing.assert_allclose(lrs, 0.02, rtol=1e-5)


ONE_STATE = ["--total-timesteps", 4000, "--baseline", "value", "--gamma", 0.9, "--eval-episodes", 1, "--num-envs", 4]
TEN_STEPS = np.mean([(1 - 0.9**k) / 0.1 for k in range(1, 11)])


def test_with_a_critic_a_time_limit_is_not_a_termination():
    """Reward 1 for ever, cut after 10 steps, γ = 0.9: V must say 10, not the 4.1 of what is left of ten steps."""
    result = train(reinforce, "--env-id", "OneState-v0", *ONE_STATE)
    assert last_scalar(result["run_dir"], "losses/values") == pytest.approx(10, abs=0.3)


@pytest.mark.parametrize("env_id", ["OneStateBox-v0", "OneStateDiscrete-v0"])
def test_a_return_with_a_critic_is_completed_by_its_value(env_id):
    """All states are one: at γ = 1 returns are V plus what is left of ten steps, 5.5 in the mean."""
    result = train(reinforce, "--env-id", env_id, *ONE_STATE, "--total-timesteps", 40, "--gamma", 1)
    values, returns = (last_scalar(result["run_dir"], f"losses/{name}") for name in ("values", "returns"))
    assert returns == pytest.approx(values + 5.5, rel=1e-5)


def test_a_termination_is_not_completed():
    result = train(reinforce, "--env-id", "OneStateTerminal-v0", *ONE_STATE)
    assert last_scalar(result["run_dir"], "losses/values") == pytest.approx(TEN_STEPS, abs=0.3)


@pytest.mark.parametrize("env_id", ["OneState-v0", "OneStateBox-v0", "OneStateDiscrete-v0"])
@pytest.mark.parametrize("baseline", ["mean", "optimal"])
def test_without_a_critic_a_return_ends_at_the_cut(baseline, env_id):
    result = train(reinforce, "--env-id", env_id, *ONE_STATE, "--baseline", baseline, "--total-timesteps", 40)
    assert last_scalar(result["run_dir"], "losses/returns") == pytest.approx(TEN_STEPS, rel=1e-4)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_learns(baseline):
    flags = ["--baseline", baseline, "--num-envs", 8, "--learning-rate", 0.01, "--normalize-returns"]
    assert train(reinforce, *flags, "--total-timesteps", 8000, "--no-anneal-lr")["returns"].mean() > 100


# Parity with Stable-Baselines3's A2C ------------------------------------------------------------------------


class Terminating(gym.Wrapper):
    """Ends by termination where the time limit would have truncated."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("terminates", [False, True], ids=["truncated", "terminated"])
@pytest.mark.parametrize("env_id, T, lr", [("CartPole-v1", 7, 0.05), ("Pendulum-v1", 20, 0.001)])
def test_update_parity_with_sb3s_a2c(env_id, T, lr, terminates, optimizer, monkeypatch):
    """Five rollouts of whole episodes through SB3's own A2C.train() and through ours: same weights, same data.

    They coincide where all episodes have n_steps steps and λ = 1. A2C takes means over all steps, and weighs the
    value loss by c_v; the sum over time here is T times that, so step sizes and Adam's ε make up for it.
    """
    N, vf_coef, eps = 4, 0.5, 1e-5
    args = reinforce.Args(env_id=env_id, num_envs=N, gamma=0.95, ent_coef=0.01, hidden_sizes=(32, 16))
    wrap = Terminating if terminates else lambda env: env
    env = Recorder(DummyVecEnv([lambda: wrap(gym.make(env_id, max_episode_steps=T)) for _ in range(N)]))
    kinds = {"sgd": (torch.optim.SGD, {}), "adam": (torch.optim.Adam, {"eps": eps})}
    kind, options = kinds[optimizer]
    model = A2C(
        "MlpPolicy",
        env,
        learning_rate=lr,
        n_steps=T,
        gamma=args.gamma,
        gae_lambda=1.0,
        ent_coef=args.ent_coef,
        vf_coef=vf_coef,
        max_grad_norm=float("inf"),
        use_rms_prop=False,
        policy_kwargs=dict(
            net_arch=list(args.hidden_sizes),
            activation_fn=torch.nn.Tanh,
            optimizer_class=kind,
            optimizer_kwargs=options,
        ),
        seed=1,
        device="cpu",
    )

    def ours():
        policy = reinforce.Policy(env.observation_space, env.action_space, args.hidden_sizes)
        critic = reinforce.mlp([env.observation_space.shape[0], *args.hidden_sizes, 1], 1.0)
        policy.critic = critic  # where copy_weights looks for it
        copy_weights(model.policy, policy)
        del policy.critic
        return policy, critic

    policy, critic = ours()
    before = [p.clone() for p in (*policy.parameters(), *critic.parameters())]
    if optimizer == "sgd":
        optimizers = kind(policy.parameters(), lr / T), kind(critic.parameters(), lr * vf_coef)
    else:
        optimizers = (
            torch.optim.Adam(policy.parameters(), lr, eps=eps * T),
            torch.optim.Adam(critic.parameters(), lr, eps=eps / vf_coef),
        )
    sb3_train = model.train

    def train():
        sb3_train()
        observations, next_observations, rewards, terminated, truncated = (
            torch.as_tensor(np.array(x)) for x in zip(*env.steps)
        )
        env.steps.clear()
        assert (terminated if terminates else truncated)[-1].all() and not (terminated | truncated)[:-1].any()
        actions = torch.as_tensor(model.rollout_buffer.actions).reshape(N, T, -1).swapaxes(0, 1)
        actions = actions.squeeze(-1).long() if policy.discrete else actions
        running = torch.ones(T, N, dtype=torch.bool)
        with torch.no_grad():
            values, final_values = critic(observations).squeeze(-1), critic(next_observations[-1]).squeeze(-1)
        rewards[-1] += args.gamma * final_values * truncated[-1]
        returns = reinforce.returns_to_go(rewards, args.gamma)
        for x in optimizers:
            x.zero_grad()
        reinforce.policy_gradient(policy, observations, actions, returns - values, running, args)
        reinforce.value_gradient(critic, observations, returns, running)
        for x in optimizers:
            x.step()

    monkeypatch.setattr(model, "train", train)
    model.learn(5 * T * N)
    reference = ours()
    worst = 0.0
    pairs = zip((*policy.parameters(), *critic.parameters()), (p for x in reference for p in x.parameters()), before)
    for ours_now, theirs, was in pairs:
        assert (ours_now - was).abs().max() > 1e-5, "a parameter did not move"
        worst = max(worst, ((ours_now - theirs).norm() / theirs.norm()).item())
    print(f"{env_id}, {optimizer}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5
