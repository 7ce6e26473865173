"""Runs Stable-Baselines3's own training and shows each of its rollouts to the update under test."""

import functools

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Discrete
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper


class Recorder(VecEnvWrapper):
    """Keeps what a loop here would have seen of each step: true next observations, both kinds of end."""

    def reset(self):
        self.obs, self.steps = self.venv.reset(), []
        return self.obs

    def step_wait(self):
        obs, rewards, done, infos = self.venv.step_wait()
        next_obs = obs.copy()
        for i in np.flatnonzero(done):
            next_obs[i] = infos[i]["terminal_observation"]
        truncated = np.array([info["TimeLimit.truncated"] for info in infos])
        self.steps.append((self.obs, next_obs, rewards.copy(), done & ~truncated, truncated))
        self.obs = obs.copy()
        return obs, rewards, done, infos


def recorded_envs(env_id: str, num_envs: int, episode_steps: int = 17) -> Recorder:
    """SB3's vector environment with short episodes, so that time limits occur within a rollout."""
    return Recorder(DummyVecEnv([lambda: gym.make(env_id, max_episode_steps=episode_steps) for _ in range(num_envs)]))


def copy_weights(policy, agent):
    """SB3's ActorCriticPolicy → ActorCritic; returns the agent."""
    pi, vf = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
    pairs = {agent.actor: [*pi, policy.action_net], agent.critic: [*vf, policy.value_net]}
    for ours, theirs in pairs.items():
        for layer, other in zip(ours, theirs):
            layer.load_state_dict(other.state_dict())
    if not agent.discrete:
        agent.log_std.data.copy_(policy.log_std)
    return agent


def follow(model, total_timesteps: int, update) -> None:
    """model.learn(); after each of its own train() calls `update` with the rollout that it has seen.

    The rollout: observations, next observations, actions, rewards, terminated, truncated, all (T, N, …).
    """
    env, sb3_train, updates, ends = model.env, model.train, [], np.zeros(2)

    def train():
        sb3_train()
        obs, next_obs, rewards, terminated, truncated = (torch.as_tensor(np.array(x)) for x in zip(*env.steps))
        env.steps.clear()
        ends[:] += [terminated.sum(), truncated.sum()]
        actions = torch.as_tensor(model.rollout_buffer.actions).reshape(env.num_envs, model.n_steps, -1).swapaxes(0, 1)
        actions = actions.squeeze(-1).long() if isinstance(env.action_space, Discrete) else actions
        update(obs, next_obs, actions, rewards, terminated, truncated)
        updates.append(None)

    model.train = train
    model.learn(total_timesteps)
    assert len(updates) == total_timesteps // (env.num_envs * model.n_steps)
    assert ends[1] > 0, "no episode was truncated"
    assert ends[0] > 0 or not isinstance(env.action_space, Discrete), "no episode was terminated"


def assert_advantages_agree(model, advantages) -> None:
    """Ours (T, N) are those in SB3's rollout buffer."""
    theirs = torch.as_tensor(model.rollout_buffer.advantages).reshape(advantages.T.shape).T
    torch.testing.assert_close(advantages, theirs, rtol=1e-4, atol=1e-4)


def largest_difference(agent, reference, before: dict) -> float:
    """max over parameters of |ours − theirs| / |theirs|, in norms; fails for a parameter that has not moved."""
    worst = 0.0
    for (name, ours), theirs in zip(agent.named_parameters(), reference.parameters(), strict=True):
        assert (ours - before[name]).abs().max() > 1e-4, f"{name} did not move"
        worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
    return worst


def follow_replay(model, buffer, total_timesteps: int, update) -> int:
    """model.learn() of an off-policy algorithm; before each of its gradient steps `buffer` gets what its own got.

    Each step of SB3's uses rows that `buffer` drew, and `update` takes the same rows after it, from the same random
    state. Returns the number of gradient steps.
    """
    env, theirs, sb3_train, updates, ends = model.env, model.replay_buffer, model.train, [], np.zeros(2)

    def train(gradient_steps, batch_size):
        for age, (obs, next_obs, rewards, terminated, truncated) in zip(range(len(env.steps), 0, -1), env.steps):
            actions = theirs.actions[(theirs.pos - age) % theirs.buffer_size]
            actions = actions.squeeze(-1) if isinstance(env.action_space, Discrete) else actions
            buffer.add(obs, actions, rewards, next_obs, terminated, truncated)
            ends[:] += [terminated.sum(), truncated.sum()]
        env.steps.clear()
        for _ in range(gradient_steps):
            rows = buffer.draw_rows(batch_size)
            theirs.sample = functools.partial(
                lambda rows, batch_size, env: theirs._get_samples(rows, env), rows.numpy()
            )
            state = torch.get_rng_state()
            sb3_train(1, batch_size)
            torch.set_rng_state(state)
            update(rows)
            updates.append(None)

    model.train = train
    model.learn(total_timesteps)
    assert ends[1] > 0, "no episode was truncated"
    assert ends[0] > 0 or not isinstance(env.action_space, Discrete), "no episode was terminated"
    assert total_timesteps > buffer.capacity, "the buffer did not overflow"
    return len(updates)


def assert_parameters_agree(ours, theirs, tolerance: float, before: dict) -> float:
    """The largest |ours − theirs| / |theirs| over the parameters, in norms; all have moved from `before`."""
    worst = 0.0
    for (name, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (x - before[name]).abs().max() > 1e-4, f"{name} did not move"
        error = ((x - y).norm() / y.norm()).item()
        assert error < tolerance, f"{name} differs by {error:.1e}, and {tolerance:.0e} is allowed"
        worst = max(worst, error)
    return worst


def copy_critics(theirs, ours):
    """SB3's ContinuousCritic → Critics; returns the latter."""
    for network, other in zip(ours, theirs.q_networks, strict=True):
        for layer, theirs_layer in zip(network, other, strict=True):
            layer.load_state_dict(theirs_layer.state_dict())
    return ours
