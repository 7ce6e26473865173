"""bc.py: its distributions, what each of them can clone, its experts, and what it refuses to open."""

import base64
import io
import json
import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import bc
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from sb3_contrib import TQC, RecurrentPPO
from scipy.special import logsumexp
from scipy.stats import norm
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

PLANE = Box(-1, 1, (2,))


def policy_for(actions=PLANE, observations=PLANE, **settings) -> bc.ClonedPolicy:
    torch.manual_seed(0)
    return bc.ClonedPolicy(observations, actions, bc.Args(**settings))


def fitted(policy: bc.ClonedPolicy, obs, actions, **settings) -> bc.ClonedPolicy:
    losses_of_fit(policy, obs, actions, **{"epochs": 60, "holdout": 0.2} | settings)
    return policy


def losses_of_fit(policy: bc.ClonedPolicy, obs, actions, **settings) -> dict[str, float]:
    args, run = bc.Args(**settings), SimpleNamespace(stopped=False)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
    metrics = bc.fit(policy, optimizer, (obs, actions), args, run, bc.bc_gradient)
    return {name: np.mean([x[name] for x in metrics if name in x]) for name in metrics[0] | metrics[-1]}


def output_of(flags: str, capsys, code: int | None = None) -> str:
    """What a run prints; it ends with this exit code."""
    try:
        bc.train(bc.parse_args(flags.split()))
    except SystemExit as exit_:
        assert exit_.code == code
    else:
        assert code is None, "it was not refused"
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and (code != 2 or printed.err.count("\n") == 1), printed.err
    return printed.out + printed.err


# Distributions ----------------------------------------------------------------------------------------------


def test_a_mixtures_log_probability_is_scipys():
    policy = policy_for(head="mixture", components=3)
    obs, actions = torch.randn(50, 2), 2 * torch.rand(50, 2) - 1
    log_weights, means, log_stds = (x.detach().numpy() for x in policy.head.components(policy.encode(obs)))
    densities = norm.logpdf(actions.numpy()[:, None], means, np.exp(log_stds)).sum(-1)
    assert np.exp(log_weights).sum(-1) == pytest.approx(1, abs=1e-5)
    expected = logsumexp(log_weights + densities, axis=-1)
    np.testing.assert_allclose(policy.log_prob(obs, actions).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_gaussians_log_probability_is_scipys_also_for_a_space_of_other_bounds():
    policy = policy_for(Box(np.float32([-1, 2]), np.float32([3, 4])))
    policy.head.log_std.data = torch.tensor([-1.0, 0.5])
    obs, scaled = torch.randn(50, 2), 2 * torch.rand(50, 2) - 1
    actions = torch.stack([-1 + 2 * (scaled[:, 0] + 1), 3 + scaled[:, 1]], 1)
    expected = norm.logpdf(scaled, policy.head.mode(policy.encode(obs)).detach(), np.exp([-1.0, 0.5])).sum(-1)
    np.testing.assert_allclose(policy.log_prob(obs, actions).detach(), expected, rtol=1e-4, atol=1e-4)


def test_autoregressive_probabilities_of_all_bins_add_up_to_one():
    policy = policy_for(head="autoregressive", bins=7)
    centres = policy.head.centres
    np.testing.assert_allclose(centres, np.linspace(-1, 1, 15)[1::2], atol=1e-6)
    every = torch.cartesian_prod(centres, centres)
    obs = torch.randn(1, 2).expand(49, 2)
    probabilities = policy.log_prob(obs, every).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    within_the_bins = every + (torch.rand(49, 2) - 0.5) * 0.99 * 2 / 7
    torch.testing.assert_close(policy.log_prob(obs, within_the_bins).exp(), probabilities)
    first = policy.head.logits(policy.encode(obs), every)[:, 0].softmax(-1)
    assert (first == first[0]).all(), "the first dimension's distribution depends on a later one"
    torch.testing.assert_close(first[0], probabilities.reshape(7, 7).sum(1))
    second = policy.head.logits(policy.encode(obs), every)[:, 1].softmax(-1).reshape(7, 7, 7)
    assert (second[:, :1] == second).all() and not torch.equal(second[0], second[1])


@pytest.mark.parametrize("head", ["mixture", "autoregressive"])
@torch.no_grad()
def test_the_mode_is_the_likeliest_of_its_kind(head):
    policy = policy_for(head=head, components=4, bins=5)
    obs = torch.randn(30, 2)
    features = policy.encode(obs)
    if head == "mixture":
        policy.head.network[-1].weight.data[:4] *= 5
        log_weights, means, log_stds = policy.head.components(features)
        heights = log_weights + torch.as_tensor(norm.logpdf(0, 0, log_stds.exp()).sum(-1))
        expected = means[torch.arange(30), heights.argmax(-1)]
    else:
        policy.head.network[-1].weight.data *= 30
        first = policy.head.logits(features, torch.zeros(30, 2))[:, 0].argmax(-1)
        given = torch.stack([policy.head.centres[first], torch.zeros(30)], 1)
        second = policy.head.logits(features, given)[:, 1].argmax(-1)
        expected = policy.head.centres[torch.stack([first, second], 1)]
        assert len(expected.unique(dim=0)) > 2
    torch.testing.assert_close(policy(obs), expected.clamp(-1, 1))


# What it learns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [Box(-9, 9, (2,)), Box(-np.inf, np.inf, (2,))], ids=["bounded", "unbounded"])
def test_recovers_a_linear_gaussian_expert_to_the_least_squares_solution(space):
    torch.manual_seed(1)
    obs = 3 * torch.randn(400, 2) + 5
    actions = obs @ torch.tensor([[0.3, -0.5], [0.2, 0.4]]) + 0.7 + 0.3 * torch.randn(400, 2)
    policy = policy_for(space, hidden_sizes=())
    twice = torch.cat([obs, obs]), torch.cat([actions, actions])  # what is held out is what it learns from
    fitted(policy, *twice, epochs=1000, patience=1000, batch_size=400, learning_rate=0.01, holdout=0.5)
    inputs = torch.cat([obs, torch.ones(400, 1)], 1)
    predicted = inputs @ torch.linalg.lstsq(inputs, actions).solution
    torch.testing.assert_close(policy(obs), predicted, rtol=0, atol=1e-3)
    scale = (policy.high - policy.low) / 2
    deviation = (actions - predicted).std(0, correction=0)
    torch.testing.assert_close(policy.head.log_std.exp() * scale, deviation, rtol=1e-2, atol=0)


def test_of_a_two_mode_expert_the_gaussian_makes_a_third_mode_and_the_other_heads_do_not():
    """Left or right around an obstacle, and the second dimension has to agree with the first: never the mean."""
    torch.manual_seed(2)
    obs = torch.randn(1000, 2)
    side = torch.randint(2, (1000, 1)) * 2.0 - 1
    actions = 0.7 * side.expand(-1, 2) + 0.05 * torch.randn(1000, 2)
    collided = {}
    for head in ("gaussian", "mixture", "autoregressive"):
        policy = fitted(policy_for(head=head, components=3), obs, actions, epochs=30)
        chosen = policy(torch.randn(200, 2))
        passed = (chosen.abs() - 0.7).abs().max(1).values < 0.25
        collided[head] = 1 - (passed & (chosen[:, 0].sign() == chosen[:, 1].sign())).float().mean().item()
    print(f"runs into the obstacle: {collided}")
    assert collided["gaussian"] > 0.95 and collided["mixture"] < 0.05 and collided["autoregressive"] < 0.05


def test_standardises_by_the_moments_of_the_data():
    torch.manual_seed(5)
    obs, actions = 3 * torch.randn(300, 2) + 5, 7 * torch.randn(300, 2) - 2
    policy = policy_for(Box(np.float32([-1, -np.inf]), np.float32([4, np.inf])))
    policy.standardise(obs, actions)
    torch.testing.assert_close(policy.mean, obs.mean(0))
    torch.testing.assert_close(policy.std, obs.std(0, correction=0))
    mean, std = actions[:, 1].mean().item(), actions[:, 1].std(correction=0).item()
    torch.testing.assert_close(policy.low, torch.tensor([-1, mean - 3 * std]))
    torch.testing.assert_close(policy.high, torch.tensor([4, mean + 3 * std]))
    policy.head.mode.forward = lambda x: torch.tensor([[2.0, 2.0]])
    assert policy(obs[:1])[0].tolist() == pytest.approx([4, mean + 6 * std])
    policy.standardise(torch.full((9, 2), 0.3), actions)
    assert policy.std.tolist() == [1, 1], "what never varied must not be blown up when it does"


class Recall(gym.Env):
    """Shows −1 or 1 at random; the reward is 1 where the action tells the one before."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2, start=3)

    def show(self):
        self.before, self.now = self.now, self.np_random.integers(2)
        return np.float32([2 * self.now - 1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return self.show(), {}

    def step(self, action):
        reward = float(action - 3 == self.before)
        return self.show(), reward, False, False, {}


class RecallExpert:
    """Remembers."""

    before = None

    def __call__(self, obs):
        assert obs.shape == (1, 1), "the expert sees one observation, whatever the policy sees"
        action = np.array([3 if self.before is None else 3 + (self.before > 0)])
        self.before = obs[0, 0]
        return action


gym.register("Recall-v0", Recall, max_episode_steps=50)


@pytest.mark.parametrize("history, low, high", [(1, 15, 35), (2, 48, 50)])
def test_an_expert_that_remembers_needs_a_history(history, low, high, monkeypatch):
    monkeypatch.setattr(bc, "find_expert", lambda *_: RecallExpert())
    flags = f"--env-id Recall-v0 --history {history} --total-timesteps 2000 --epochs 20 --eval-episodes 5"
    result = bc.train(bc.parse_args(flags.split()))
    assert low <= result["returns"].mean() <= high
    rows = (result["run_dir"] / "monitor.csv").read_text().splitlines()[2:]
    assert np.mean([float(row.split(",")[0]) for row in rows]) > 48, "the expert sees the newest observation"
    seen = torch.load(result["run_dir"] / "checkpoint.pt", weights_only=True)["demonstrations"]["observations"]
    assert seen.shape == (2000, history)
    if history == 2:
        begin = torch.arange(2000) % 50 == 0
        assert (seen[begin, 0] == seen[begin, 1]).all(), "an episode's first observation is repeated"
        assert (seen[1:, 0] == seen[:-1, 1])[~begin[1:]].all(), "oldest first"
    assert bc.make_env(bc.Args(env_id="Recall-v0")).observation_space.shape == (1,), "others have their own history"


def test_stops_early_and_keeps_the_best_weights_by_the_held_out_part():
    torch.manual_seed(3)
    obs, actions = torch.randn(200, 2), torch.randint(2, (200,))  # nothing to learn but by heart
    policy = policy_for(Discrete(2), hidden_sizes=(64, 64))
    settings = dict(epochs=100, patience=5, holdout=0.5, learning_rate=0.01, batch_size=32)
    losses = losses_of_fit(policy, obs, actions, **settings)
    assert losses["epochs"] < 20 and losses["log_loss"] < losses["held_out_log_loss"]
    held_out = -policy.log_prob(obs[100:], actions[100:]).mean().item()
    assert held_out == pytest.approx(losses["held_out_log_loss"], abs=1e-5)


def test_the_held_out_part_trains_nothing():
    torch.manual_seed(4)
    obs, actions = torch.randn(100, 2), torch.randint(2, (100,))
    runs = []
    for last in (actions[90:], 1 - actions[90:]):
        policy = policy_for(Discrete(2))
        fitted(policy, obs, torch.cat([actions[:90], last]), holdout=0.1, epochs=1)
        runs.append(policy.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_noise_disturbs_actions_within_the_space(noise):
    torch.manual_seed(0)
    space = Discrete(4, start=2)
    done_instead = bc.disturbed(torch.full((4000,), 3), space, noise).numpy()
    assert (done_instead != 3).mean() == pytest.approx(noise * 3 / 4, abs=0.03) and set(done_instead) <= {2, 3, 4, 5}
    space = Box(np.float32([-1, 0]), np.float32([1, 10]))
    done_instead = bc.disturbed(torch.tensor([0.0, 5.0]).repeat(4000, 1), space, noise).numpy()
    assert all(space.contains(x) for x in done_instead[:50])
    spread = norm.ppf(0.75) * noise * np.array([1, 5])  # the median of |noise|, which clipping leaves as it is
    np.testing.assert_allclose(np.quantile(np.abs(done_instead - [0, 5]), 0.5, axis=0), spread, rtol=0.1, atol=1e-6)


def test_a_fit_that_is_killed_costs_no_demonstrations(monkeypatch):
    monkeypatch.setattr(bc, "find_expert", lambda args, envs, run: lambda obs: np.zeros(len(obs), np.int64))
    monkeypatch.setattr(bc, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bc.train(bc.Args(total_timesteps=100))
    (run_dir,) = Path("runs").iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == len(state["demonstrations"]["observations"]) == 100


def test_labels_are_the_experts_whatever_noise_does(monkeypatch):
    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: (obs[:, 2] > 0).astype(np.int64))
    flags = "--total-timesteps 600 --noise 0.5 --epochs 1 --eval-episodes 1 --num-envs 3"
    run_dir = bc.train(bc.parse_args(flags.split()))["run_dir"]
    data = torch.load(run_dir / "checkpoint.pt", weights_only=True)["demonstrations"]
    assert (data["actions"] == (data["observations"][:, 2] > 0)).all() and 0.1 < data["actions"].float().mean() < 0.9


def test_num_demonstrations_ends_with_that_many_episodes(monkeypatch):
    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: (obs[:, 2] > 0).astype(np.int64))
    run_dir = bc.train(bc.parse_args("--num-demonstrations 3 --epochs 1 --eval-episodes 1".split()))["run_dir"]
    rows = (run_dir / "monitor.csv").read_text().splitlines()[2:]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert len(rows) == 3 and state["step"] == sum(int(row.split(",")[1]) for row in rows)


def test_a_run_stopped_before_the_first_epoch_goes_on_to_the_same_bits(monkeypatch, capsys):
    standardise = bc.ClonedPolicy.standardise

    def signalled(policy, *data):
        os.kill(os.getpid(), signal.SIGTERM)
        standardise(policy, *data)

    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: (obs[:, 2] > 0).astype(np.int64))
    flags = "--total-timesteps 200 --eval-episodes 1 --epochs 3 --output-dir"
    whole = bc.train(bc.parse_args([*flags.split(), "whole"]))["run_dir"]
    monkeypatch.setattr(bc.ClonedPolicy, "standardise", signalled)
    assert "--resume" in output_of(f"{flags} stopped", capsys, code=130)
    (run_dir,) = Path("stopped").iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == len(state["demonstrations"]["actions"]) == 200 and state["counter"]["fitted_at"] == 0
    monkeypatch.setattr(bc.ClonedPolicy, "standardise", standardise)
    for _ in range(2):  # the second time there is nothing left to do
        bc.train(bc.parse_args(["--resume", str(run_dir)]))
        ours, theirs = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (run_dir, whole))
        assert ours["counter"]["fitted_at"] == 200
        assert all(torch.equal(x, theirs["policy"][name]) for name, x in ours["policy"].items())


def test_needs_a_demonstration_to_learn_from_and_one_to_hold_out(capsys):
    for flags in ("--total-timesteps 1", "--holdout 0", "--holdout 1"):
        assert flags in output_of(flags, capsys, code=2)
    assert not Path("runs").exists(), "before an expert is trained"


class Box1(gym.Env):
    """Observes what it should be given, a square; takes actions of a space of one dimension, for ten steps."""

    observation_space = Box(-9, 9, (2,))

    def __init__(self, space):
        self.action_space, self.done = space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.np_random.normal(size=2).astype(np.float32), -float(abs(action[0])), False, False, {}


SPACES = {
    "half": Box(np.float32([0]), np.float32([np.inf])),
    "none": Box(-np.inf, np.inf, (1,)),
    "huge": Box(-3e38, 3e38, (1,), np.float32),
    "double": Box(-1, 1, (1,), np.float64),
}
for name, space in SPACES.items():
    gym.register(f"Box-{name}-v0", Box1, max_episode_steps=10, kwargs={"space": space})


@pytest.mark.parametrize("name", SPACES)
def test_actions_are_within_any_box_and_of_its_type(name, monkeypatch, capsys):
    """The environment checks them: the expert's, disturbed ones, and the clone's, which errs to either side of 0."""
    space = SPACES[name]
    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: obs[:, :1].clip(0, 1).astype(space.dtype))
    flags = f"--env-id Box-{name}-v0 --total-timesteps 200 --epochs 2 --eval-episodes 2 --noise 0.3"
    assert "evaluation" in output_of(flags, capsys)
    policy = policy_for(space, hidden_sizes=(8,))
    obs, actions = torch.randn(200, 2), torch.rand(200, 1)
    policy.standardise(obs, actions)
    policy.head.mode.forward = lambda x: torch.linspace(-3, 3, 200).unsqueeze(1)
    assert all(map(space.contains, policy(obs).numpy())) and policy(obs).isfinite().all()


@pytest.mark.parametrize("head", ["gaussian", "mixture", "autoregressive"])
def test_the_exported_policy_is_the_one_that_was_trained(head):
    args = bc.Args(env_id="Pendulum-v1", head=head)
    policy, envs = policy_for(*reversed(spaces_of("Pendulum-v1")), head=head), bc.Envs(args, 1)
    bc.export_policy(policy, envs, Path("policy.pt2"))
    exported = torch.export.load("policy.pt2").module()
    for batch in (1, 2, 7):
        obs = torch.randn(batch, 3)
        torch.testing.assert_close(exported(obs), policy(obs))


# Experts ----------------------------------------------------------------------------------------------------


def spaces_of(env_id):
    env = gym.make(env_id)
    return env.observation_space, env.action_space


def found(expert=None, env_id="CartPole-v1", **settings):
    """What find_expert gives."""
    args = bc.Args(env_id=env_id, expert=expert, **settings)
    return bc.find_expert(args, bc.Envs(args, 1), SimpleNamespace(stopped=False))


MODELS = {
    "PPO": (PPO, {}),
    "PPO with gSDE": (PPO, dict(use_sde=True)),
    "A2C": (A2C, dict(policy_kwargs=dict(activation_fn=torch.nn.ReLU, net_arch=dict(pi=[9], vf=[5])))),
    "DQN": (DQN, {}),
    "SAC": (SAC, dict(policy_kwargs=dict(net_arch=[30, 20]))),
    "SAC with gSDE": (SAC, dict(use_sde=True)),
    "TD3": (TD3, {}),
    "DDPG": (DDPG, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_sb3s_models_act_as_in_sb3(name, capsys):
    model, settings = MODELS[name]
    env_id = "CartPole-v1" if name in ("PPO", "A2C", "DQN") else "Pendulum-v1"
    expert = model("MlpPolicy", env_id, seed=3, device="cpu", **settings)
    expert.save("expert.zip")
    state = torch.manual_seed(9).get_state()
    ours = found("expert.zip", env_id)
    assert "expert.zip" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state), "the expert's seed is not the run's"
    obs = np.random.default_rng(0).normal(size=(50, *spaces_of(env_id)[0].shape)).astype(np.float32)
    np.testing.assert_array_equal(ours(obs), expert.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("model", [RecurrentPPO, TQC], ids=lambda model: model.__name__)
def test_refuses_models_of_other_libraries_by_their_class(model, capsys):
    env_id, policy = ("Pendulum-v1", "MlpPolicy") if model is TQC else ("CartPole-v1", "MlpLstmPolicy")
    model(policy, env_id, device="cpu").save("expert.zip")
    refusal = output_of(f"--env-id {env_id} --expert expert.zip", capsys, code=2)
    assert "sb3_contrib" in refusal and ("TQCPolicy" if model is TQC else "RecurrentActorCriticPolicy") in refusal


def test_refuses_an_expert_whose_observations_were_normalised(capsys):
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    PPO("MlpPolicy", env, device="cpu").save("expert.zip")
    env.save("vecnormalize.pkl")
    assert "vecnormalize.pkl" in output_of("--expert expert.zip", capsys, code=2) and not Path("runs").exists()
    Path("vecnormalize.pkl").unlink()
    assert found("expert.zip")


def test_the_experts_return_stands_beside_the_clones(monkeypatch, capsys):
    """Played in the episodes of the evaluation, whatever --noise and --history do."""
    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: (obs[:, 2] > 0).astype(np.int64))
    envs, returns = bc.Envs(bc.Args(), 1), []
    for i in range(3):
        obs, envs.episodes = envs.reset(1 + 1_000_000 + i), []
        while not envs.episodes:
            obs, *_ = envs.step(torch.as_tensor((obs[:, 2] > 0).astype(np.int64)))
        returns.append(envs.episodes[0][1])
    flags = "--total-timesteps 300 --epochs 1 --eval-episodes 3 --noise 0.5 --history 2"
    lines = output_of(flags, capsys).splitlines()
    assert f"the expert: {np.mean(returns):.2f} ± {np.std(returns):.2f} over 3 episodes" in lines


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_trains_an_expert_once_and_leaves_the_runs_randomness_alone(env_id, capsys):
    state = torch.manual_seed(9).get_state()
    trained = found(env_id=env_id, expert_timesteps=256)
    (path,) = Path("runs/experts").iterdir()
    written = path.stat().st_mtime_ns
    assert f"{path}, trained now" in capsys.readouterr().out
    again = found(env_id=env_id, expert_timesteps=256)
    printed = capsys.readouterr().out
    assert str(path) in printed and "trained now" not in printed
    obs = np.stack([spaces_of(env_id)[0].sample() for _ in range(9)]).clip(-5, 5)
    assert (trained(obs) == again(obs)).all() and path.stat().st_mtime_ns == written
    assert torch.equal(torch.get_rng_state(), state)


def test_takes_a_trained_expert_only_where_it_is_the_one_asked_for(monkeypatch):
    """Others: of other steps, of an environment that was registered anew, of other code."""
    trained = []

    def trains(args, path, run):
        trained.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        PPO("MlpPolicy", args.env_id, n_steps=2, batch_size=2, device="cpu").save(path)

    monkeypatch.setattr(bc, "train_expert", trains)
    gym.register("Anew-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=10)
    for steps in (300, 30_000, 300):
        found(env_id="Anew-v0", expert_timesteps=steps)
    assert len(trained) == 2
    gym.registry["Anew-v0"].max_episode_steps = 20
    found(env_id="Anew-v0", expert_timesteps=300)
    assert len(trained) == 3
    monkeypatch.setattr(bc.inspect, "getsource", lambda _: "other settings")
    found(env_id="Anew-v0", expert_timesteps=300)
    assert len(set(trained)) == len(trained) == 4


def test_an_expert_stopped_in_training_is_not_kept():
    args = bc.Args(expert_timesteps=10_000)
    with pytest.raises(SystemExit) as exit_:
        bc.find_expert(args, bc.Envs(args, 1), SimpleNamespace(stopped=True))
    assert exit_.value.code == 130 and not Path("runs").exists()


@pytest.mark.parametrize("name", ["half", "none"])
def test_says_where_no_expert_can_be_trained(name, capsys):
    assert "--expert" in output_of(f"--env-id Box-{name}-v0", capsys, code=2)


def our_expert(path, env_id="CartPole-v1") -> bc.ClonedPolicy:
    torch.manual_seed(6)
    args = bc.Args(env_id=env_id)
    policy = bc.ClonedPolicy(*spaces_of(env_id), args)
    bc.export_policy(policy, bc.Envs(args, 1), path)
    return policy


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_policies_of_scripts_here_act_as_in_their_own_code(env_id):
    policy = our_expert(Path("policy.pt2"), env_id)
    expert = found("policy.pt2", env_id)
    obs = np.random.default_rng(0).normal(size=(20, policy.observation_space.shape[0])).astype(np.float32)
    np.testing.assert_array_equal(expert(obs), policy(torch.as_tensor(obs)).detach().numpy())


NETWORKS = {"ppo": ["ActorCritic", True], "sac": ["SoftActorCritics", 2], "dqn": ["QNetwork"]}
NETWORKS["a2c"] = ["ActorCritic"]
EXPORTED = {"ppo": "MountainCarContinuous-v0", "sac": "Pendulum-v1", "dqn": "Acrobot-v1", "a2c": "Taxi-v4"}


@pytest.mark.parametrize("algo", EXPORTED)
def test_takes_the_policies_of_other_scripts(algo):
    script = __import__(algo)
    flags = f"--env-id {EXPORTED[algo]} --eval-episodes 1 --total-timesteps 300"
    args = script.parse_args(flags.split())
    envs = script.Envs(args, 1)
    spaces = envs.observation_space, envs.action_space
    network, *settings = NETWORKS[algo]
    policy = getattr(script, network)(*spaces, (8,), *settings)
    script.export_policy(policy.eval(), envs, Path("policy.pt2"))
    expert = found("policy.pt2", EXPORTED[algo])
    obs = np.stack([spaces[0].sample() for _ in range(5)]).astype(envs.dtype)
    np.testing.assert_array_equal(expert(obs), policy(torch.as_tensor(obs)).detach().numpy())


@pytest.mark.parametrize("expert", ["nowhere.pt2", "nonsense.pt2", "nonsense.zip", "pendulum.pt2", "pendulum.zip"])
def test_refuses_what_is_no_expert_for_the_environment(expert, capsys):
    Path("nonsense.pt2").write_bytes(b"nonsense")
    Path("nonsense.zip").write_bytes(b"nonsense")
    our_expert(Path("pendulum.pt2"), "Pendulum-v1")
    PPO("MlpPolicy", "Pendulum-v1", device="cpu").save("pendulum.zip")
    assert f"--expert {expert}" in output_of(f"--expert {expert}", capsys, code=2)
    assert not Path("runs").exists()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def pickled(x) -> bytes:
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


def test_nothing_in_a_malicious_model_of_sb3_is_executed():
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save("good.zip")
    with zipfile.ZipFile("good.zip") as good, zipfile.ZipFile("bad.zip", "w") as bad:
        about = json.loads(good.read("data"))
        for value in about.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = base64.b64encode(pickle.dumps(Malicious())).decode()
        bad.writestr("data", json.dumps(about))
        for name in set(good.namelist()) - {"data"}:
            bad.writestr(name, good.read(name))
    assert found("bad.zip") and not Path("harm").exists()
    with pytest.raises(Exception):  # noqa: B017
        PPO.load("bad.zip")
    assert Path("harm").exists(), "Stable-Baselines3's own loader would have executed it"
    Path("harm").rmdir()
    with zipfile.ZipFile("good.zip") as good, zipfile.ZipFile("bad.zip", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickled(Malicious()) if name == "policy.pth" else good.read(name))
    with pytest.raises(SystemExit):
        found("bad.zip")
    assert not Path("harm").exists()


# Minari -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(monkeypatch) -> tuple[list, str]:
    """Episodes of CartPole-v1, and a Minari dataset of them."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("datasets").resolve()))
    envs, episodes, obs = bc.Envs(bc.Args(), 1), [], None
    for i in range(6):
        seen, done, rewards, obs = [], [], [], envs.reset(i)
        envs.episodes = []
        while not envs.episodes:
            seen.append(obs[0])
            done.append(int(obs[0, 2] > 0))
            obs, reached, reward, *_ = envs.step(torch.tensor(done[-1:]))
            rewards.append(reward[0])
        ends = np.arange(len(done)) == len(done) - 1
        arrays = np.array([*seen, reached[0]]), np.array(done), np.array(rewards), ends, np.zeros_like(ends)
        episodes.append(EpisodeBuffer(None, None, None, *arrays))
    about = dict(algorithm_name="none", author="none", author_email="none", code_permalink="none", description="none")
    minari.create_dataset_from_buffers("cartpole/test-v0", episodes, env="CartPole-v1", eval_env="CartPole-v1", **about)
    return episodes, "cartpole/test-v0"


@pytest.mark.parametrize("history", [1, 3])
def test_learns_from_a_minari_dataset(history, dataset, capsys):
    episodes, name = dataset
    steps = sum(len(x.actions) for x in episodes)
    flags = f"--dataset {name} --epochs 2 --eval-episodes 1 --history {history} --total-timesteps"
    begun = sum(len(x.actions) for x in episodes[:4]) + 1  # an episode is read to its end
    printed = output_of(f"{flags} {begun}", capsys)
    returns = [sum(x.rewards) for x in episodes]
    assert f"the expert: {np.mean(returns):.2f} ± {np.std(returns):.2f} over 6 episodes" in printed
    (run_dir,) = Path("runs").iterdir()
    for length, whole in ((steps - len(episodes[5].actions), 5), (steps, 6)):
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        data = state["demonstrations"]
        assert state["step"] == state["counter"]["fitted_at"] == length and state["counter"]["episodes"] == whole
        actions = np.concatenate([x.actions for x in episodes])[:length]
        assert data["observations"].shape == (length, 4 * history) and (data["actions"].numpy() == actions).all()
        row = 0
        for x in episodes[:5]:
            for lag in range(history):
                shown = data["observations"][row : row + len(x.actions), 4 * (history - 1 - lag) :][:, :4].numpy()
                times = np.maximum(0, np.arange(len(x.actions)) - lag)
                assert (shown == x.observations[times]).all()
            row += len(x.actions)
        rows = np.loadtxt(run_dir / "monitor.csv", delimiter=",", skiprows=2)
        np.testing.assert_allclose(rows[:, 0], returns[:whole])
        if length < steps:  # goes on with what it has not read yet
            bc.train(bc.parse_args(["--resume", str(run_dir), "--total-timesteps", "100000"]))


def test_refuses_datasets_that_are_not_there_or_of_other_spaces(dataset, monkeypatch, capsys):
    for flags, names in (
        ("--dataset ./nowhere", "--dataset ./nowhere"),
        (f"--env-id Acrobot-v1 --dataset {dataset[1]}", "Acrobot-v1 has"),
    ):
        assert names in output_of(flags, capsys, code=2)
    assert "over 2 episodes" in output_of(f"--dataset {dataset[1]} --num-demonstrations 2 --epochs 1", capsys)
    monkeypatch.setitem(sys.modules, "minari", None)
    assert 'pip install "minari[hdf5,hf]"' in output_of(f"--dataset {dataset[1]}", capsys, code=2)
