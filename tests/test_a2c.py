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


def random_rollout(space, T=5, N=4):
    """An agent of three numbers, and a rollout that it might have seen."""
    torch.manual_seed(0)
    agent = a2c.ActorCritic(Box(-1, 1, (3,)), space, (8,))
    agent.actor[-1].weight.data *= 100
    states, next_states = torch.randn(2, T, N, 3)
    actions = torch.randint(2, (T, N)) if isinstance(space, Discrete) else torch.randn(T, N, 2)
    ends = torch.rand(2, T, N) < 0.2
    return agent, a2c.Rollout(states, next_states, actions, torch.randn(T, N), *ends)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("space", [Discrete(2), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_the_gradient_is_that_of_the_loss_with_advantages_and_returns_as_constants(space, normalize):
    agent, rollout = random_rollout(space)
    flags = {"ent_coef": 0.1, "vf_coef": 0.7, "gamma": 0.9, "gae_lambda": 0.8, "max_grad_norm": 1e9}
    metrics = a2c.a2c_gradient(agent, rollout, a2c.Args(**flags, normalize_advantages=normalize))
    found = [p.grad.clone() for p in agent.parameters()]

    values, next_values = (agent.critic(x).squeeze(-1).detach() for x in (rollout.states, rollout.next_states))
    advantages = a2c.gae(rollout.rewards, values, next_values, rollout.terminated, rollout.truncated, 0.9, 0.8)
    returns = advantages + values
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    if normalize:
        advantages = (advantages - advantages.mean()) / advantages.std()
    if isinstance(space, Discrete):
        pi = torch.distributions.Categorical(logits=agent.actor(rollout.states))
        log_probs, entropy = pi.log_prob(rollout.actions), pi.entropy().mean()
    else:
        pi = torch.distributions.Normal(agent.actor(rollout.states), agent.log_std.exp())
        log_probs, entropy = pi.log_prob(rollout.actions).sum(-1), pi.entropy().sum(-1).mean()
    policy_loss = -(log_probs * advantages).mean()
    value_loss = (agent.critic(rollout.states).squeeze(-1) - returns).square().mean()
    loss = policy_loss + 0.7 * value_loss - 0.1 * entropy
    expected = torch.autograd.grad(loss, list(agent.parameters()))
    assert all(x.abs().max() > 1e-4 for x in expected)
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)
    expected = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, values=values.mean())
    expected["explained_variance"] = explained
    torch.testing.assert_close(metrics, {name: x.detach() for name, x in expected.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bound", [0.01, 1e9])
def test_the_gradient_is_bounded_and_a_small_one_is_left_alone(bound):
    norms = []
    for max_grad_norm in (1e9, bound):
        agent, rollout = random_rollout(Discrete(2))
        a2c.a2c_gradient(agent, rollout, a2c.Args(max_grad_norm=max_grad_norm))
        norms.append(torch.cat([p.grad.flatten() for p in agent.parameters()]).norm().item())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(min(bound, norms[0]), rel=1e-3)


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
    optimizer = a2c.make_optimizer(agent.parameters(), args)

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        obs, next_obs = obs.float(), next_obs.float()  # as SB3's policies make of them
        if args.anneal_lr:
            remaining = 1 - (model.num_timesteps - T * N) / args.total_timesteps
            a2c.anneal(optimizer, remaining)
        with torch.no_grad():
            values, next_values = agent.value(torch.stack([obs, next_obs]))
        advantages = a2c.gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        assert_advantages_agree(model, advantages)
        optimizer.zero_grad()
        a2c.a2c_gradient(agent, a2c.Rollout(obs, next_obs, actions, rewards, terminated, truncated), args)
        optimizer.step()

    follow(model, args.total_timesteps, update)
    reference = copy_weights(model.policy, a2c.ActorCritic(*spaces, args.hidden_sizes))
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"{env_id}, {variant}: largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5
