"""algos/a2c.py: n-step returns against their definition, and whole updates against Stable-Baselines3's."""

import itertools

import a2c
import pytest
import sb3
import torch
from gymnasium.spaces import Box, Discrete
from parity import assert_advantages_agree, copy_weights, follow, largest_difference, recorded_envs
from test_ppo import random_episodes


def test_lambda_1_gives_n_step_returns():
    """R̂_t = r_t + γ r_{t+1} + … + γⁿ V(s_{t+n}), s_{t+n} the rollout's last state or the episode's; 0 if terminal."""
    gamma = 0.9
    rewards, values, next_values, terminated, truncated = random_episodes(T=20)
    ends = terminated | truncated
    next_values[:-1] = torch.where(ends[:-1], next_values[:-1], values[1:])  # within an episode: the next state's value
    returns = a2c.gae(rewards, values, next_values, terminated, truncated, gamma, 1.0) + values
    T, N = rewards.shape
    for t, n in itertools.product(range(T), range(N)):
        steps = ends[t:, n].tolist().index(True) + 1 if ends[t:, n].any() else T - t
        last = t + steps - 1
        expected = sum(gamma**k * rewards[t + k, n] for k in range(steps))
        expected += 0 if terminated[last, n] else gamma**steps * next_values[last, n]
        torch.testing.assert_close(returns[t, n], expected)


def test_online_actor_critic_takes_the_temporal_difference_as_advantage():
    """One environment, one step: Â = r + γ V(s') − V(s) whatever λ is."""
    r, v, next_v = (torch.tensor([[x]]) for x in (1.0, 5.0, 7.0))
    no = torch.zeros(1, 1, dtype=torch.bool)
    for gae_lambda in (0.0, 0.5, 1.0):
        assert a2c.gae(r, v, next_v, no, no, 0.9, gae_lambda).item() == pytest.approx(1 + 0.9 * 7 - 5)
        assert a2c.gae(r, v, next_v, no, ~no, 0.9, gae_lambda).item() == pytest.approx(1 + 0.9 * 7 - 5)
        assert a2c.gae(r, v, next_v, ~no, no, 0.9, gae_lambda).item() == pytest.approx(1 - 5)


def test_the_loss_takes_advantages_and_returns_as_constants():
    agent = a2c.ActorCritic(Box(-1, 1, (3,)), Discrete(2), (8,))
    states, actions = torch.randn(6, 3), torch.randint(2, (6,))
    advantages, returns = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    args = a2c.Args(ent_coef=0.1, vf_coef=0.7)
    loss, metrics = a2c.a2c_loss(agent, states, actions, advantages, returns, args)
    log_probs = agent.actor(states).log_softmax(-1)
    policy_loss = -(log_probs[range(6), actions] * advantages).mean()
    value_loss = (agent.critic(states).squeeze(-1) - returns).square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    torch.testing.assert_close(loss, policy_loss + 0.7 * value_loss - 0.1 * entropy)
    loss.backward()
    assert advantages.grad is None and returns.grad is None
    torch.testing.assert_close(metrics, torch.stack([policy_loss, value_loss, entropy]))


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_the_gradient_is_bounded_and_a_small_one_is_left_alone(monkeypatch, bound):
    agent, gradient = a2c.ActorCritic(Box(-1, 1, (3,)), Discrete(2), (4,)), torch.tensor([0.0, 2.0, 0.0])
    monkeypatch.setattr(a2c, "gradient_vector", lambda loss, module: gradient)
    observations, actions, rewards, ends = (
        torch.randn(2, 5, 4, 3),
        torch.zeros(5, 4),
        torch.rand(5, 4),
        torch.zeros(5, 4),
    )
    rollout = a2c.Rollout(*observations, actions.long(), rewards, ends.bool(), ends.bool())
    bounded, _ = a2c.a2c_gradient(agent, rollout, a2c.Args(max_grad_norm=bound))
    torch.testing.assert_close(bounded, gradient * min(1, bound / 2))


def test_online_actor_critic_runs():
    """One step per update: nothing there is a mean or a deviation of more than one sample."""
    flags = "--num-envs 1 --num-steps 1 --normalize-advantages --total-timesteps 60 --eval-episodes 1"
    run_dir = a2c.train(a2c.parse_args(flags.split()))["run_dir"]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60 and all(x.isfinite().all() for x in state["agent"].values())


VARIANTS = {
    "plain": {},
    "Adam": {"optimizer": "adam"},
    "GAE, normalised advantages, annealed": {"gae_lambda": 0.9, "normalize_advantages": True, "anneal_lr": True},
    "entropy bonus": {"ent_coef": 0.02},
}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_parity_with_sb3(env_id, variant, record_property):
    """Fifty rollouts through SB3's own train() and through ours: same weights, same data."""
    T, N, iterations = 5, 4, 50
    args = a2c.Args(
        env_id=env_id,
        num_envs=N,
        num_steps=T,
        total_timesteps=T * N * iterations,
        hidden_sizes=(32, 16),
        **VARIANTS[variant],
    )
    env = recorded_envs(env_id, N)
    model = sb3.a2c_model(args, env)
    spaces = env.observation_space, env.action_space
    agent = copy_weights(model.policy, a2c.ActorCritic(*spaces, args.hidden_sizes))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = a2c.make_optimizer(a2c.parameter_vector(agent), args)

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        obs, next_obs = obs.float(), next_obs.float()  # as SB3's policies make of them
        if args.anneal_lr:
            remaining = 1 - (model.num_timesteps - T * N) / args.total_timesteps
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        with torch.no_grad():
            values, next_values = agent.value(torch.stack([obs, next_obs]))
        advantages = a2c.gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        assert_advantages_agree(model, advantages)
        a2c.a2c_update(agent, optimizer, a2c.Rollout(obs, next_obs, actions, rewards, terminated, truncated), args)

    follow(model, args.total_timesteps, update)
    reference = copy_weights(model.policy, a2c.ActorCritic(*spaces, args.hidden_sizes))
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"{env_id}, {variant}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5
