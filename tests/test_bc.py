"""bc.py: its distributions, what each of them can clone, its experts, and what it refuses to open."""

import io
import json
import os
import signal
import sys
import zipfile
from pathlib import Path

import bc
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from scipy.special import logsumexp
from scipy.stats import norm
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3

CPU = torch.device("cpu")
PLANE = Box(-1, 1, (2,))


def policy_for(actions=PLANE, observations=PLANE, **settings) -> bc.ClonedPolicy:
    torch.manual_seed(0)
    return bc.ClonedPolicy(observations, actions, bc.Args(**settings))


def fitted(policy: bc.ClonedPolicy, obs, actions, **settings) -> bc.ClonedPolicy:
    args = bc.Args(**{"epochs": 60, "holdout": 0.2} | settings)
    bc.fit(policy, bc.vector_adam(policy, args.learning_rate), obs, actions, args, stop=lambda: False)
    return policy


# Distributions ----------------------------------------------------------------------------------------------


def test_a_mixtures_log_probability_is_scipys():
    policy = policy_for(head="mixture", components=3)
    obs, actions = torch.randn(50, 2), 2 * torch.rand(50, 2) - 1
    log_weights, means, log_stds = (x.detach().numpy() for x in policy.head.components(policy.features(obs)))
    densities = norm.logpdf(actions.numpy()[:, None], means, np.exp(log_stds)).sum(-1)
    assert np.exp(log_weights).sum(-1) == pytest.approx(1, abs=1e-5)
    expected = logsumexp(log_weights + densities, axis=-1)
    np.testing.assert_allclose(policy.log_prob(obs, actions).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_gaussians_log_probability_is_scipys_also_for_a_space_of_other_bounds():
    policy = policy_for(Box(np.float32([-1, 2]), np.float32([3, 4])))
    policy.head.log_std.data = torch.tensor([-1.0, 0.5])
    obs, scaled = torch.randn(50, 2), 2 * torch.rand(50, 2) - 1
    actions = torch.stack([-1 + 2 * (scaled[:, 0] + 1), 3 + scaled[:, 1]], 1)
    expected = norm.logpdf(scaled, policy.head.mean(policy.features(obs)).detach(), np.exp([-1.0, 0.5])).sum(-1)
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
    first = policy.head.logits(policy.features(obs), every)[:, 0].softmax(-1)
    assert (first == first[0]).all(), "the first dimension's distribution depends on a later one"
    torch.testing.assert_close(first[0], probabilities.reshape(7, 7).sum(1))
    second = policy.head.logits(policy.features(obs), every)[:, 1].softmax(-1).reshape(7, 7, 7)
    assert (second[:, :1] == second).all() and not torch.equal(second[0], second[1])


@pytest.mark.parametrize("head", ["mixture", "autoregressive"])
@torch.no_grad()
def test_the_mode_is_the_likeliest_of_its_kind(head):
    policy = policy_for(head=head, components=4, bins=5)
    obs = torch.randn(30, 2)
    features = policy.features(obs)
    if head == "mixture":
        policy.head.weights.weight.data *= 5
        log_weights, means, log_stds = policy.head.components(features)
        heights = log_weights + torch.as_tensor(norm.logpdf(0, 0, log_stds.exp()).sum(-1))
        expected = means[torch.arange(30), heights.argmax(-1)]
    else:
        policy.head.network[2].weight.data *= 30
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
    assert policy.to_env(torch.tensor([[2.0, 2.0]]))[0].tolist() == pytest.approx([4, mean + 6 * std])
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
    args = bc.Args(epochs=100, patience=5, holdout=0.5, learning_rate=0.01, batch_size=32)
    losses = bc.fit(policy, bc.vector_adam(policy, 0.01), obs, actions, args, stop=lambda: False)
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
    done_instead = bc.disturbed(np.full(4000, 3), space, noise)
    assert (done_instead != 3).mean() == pytest.approx(noise * 3 / 4, abs=0.03) and set(done_instead) <= {2, 3, 4, 5}
    space = Box(np.float32([-1, 0]), np.float32([1, 10]))
    done_instead = bc.disturbed(np.tile(np.float32([0, 5]), (4000, 1)), space, noise)
    assert all(space.contains(x) for x in done_instead[:50])
    spread = norm.ppf(0.75) * noise * np.array([1, 5])  # the median of |noise|, which clipping leaves as it is
    np.testing.assert_allclose(np.quantile(np.abs(done_instead - [0, 5]), 0.5, axis=0), spread, rtol=0.1, atol=1e-6)


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


def test_a_signal_before_the_first_epoch_ends_with_a_checkpoint(monkeypatch, capsys):
    standardise = bc.ClonedPolicy.standardise

    def signalled(policy, *data):
        os.kill(os.getpid(), signal.SIGTERM)
        standardise(policy, *data)

    monkeypatch.setattr(bc.ClonedPolicy, "standardise", signalled)
    monkeypatch.setattr(bc, "find_expert", lambda *_: lambda obs: (obs[:, 2] > 0).astype(np.int64))
    with pytest.raises(SystemExit) as exit_:
        bc.train(bc.parse_args("--total-timesteps 200 --eval-episodes 1".split()))
    assert exit_.value.code == 130 and "--resume" in capsys.readouterr().err
    (run_dir,) = Path("runs").iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == len(state["demonstrations"]["actions"]) == 200 and state["counter"]["fitted_at"] == 0
    monkeypatch.setattr(bc.ClonedPolicy, "standardise", standardise)
    bc.train(bc.parse_args(["--resume", str(run_dir)]))
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["counter"]["fitted_at"] == 200


# Experts ----------------------------------------------------------------------------------------------------


def spaces_of(env_id):
    env = gym.make(env_id)
    return env.observation_space, env.action_space


@pytest.mark.parametrize("model", [PPO, A2C, DQN, SAC, TD3], ids=lambda model: model.__name__)
def test_sb3s_models_act_as_in_sb3(model, capsys):
    env_id = "Pendulum-v1" if model in (SAC, TD3) else "CartPole-v1"
    expert = model("MlpPolicy", env_id, seed=3, device="cpu")
    expert.save("expert.zip")
    state = torch.manual_seed(9).get_state()
    ours = bc.find_expert(bc.Args(env_id=env_id, expert="expert.zip"), 0, spaces_of(env_id))
    assert "execute code" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state), "the expert's seed is not the run's"
    env, returns = gym.make(env_id), []
    for act in (ours, lambda obs: expert.predict(obs, deterministic=True)[0]):
        (obs, _), total, ended = env.reset(seed=5), 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0])
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    assert returns[0] == returns[1]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_trains_an_expert_once_and_leaves_the_runs_randomness_alone(env_id, capsys):
    args = bc.Args(env_id=env_id, expert_timesteps=256)
    state, spaces, path = torch.manual_seed(9).get_state(), spaces_of(env_id), Path(f"runs/experts/{env_id}.zip")
    trained = bc.find_expert(args, 0, spaces)
    about, written = json.loads(path.with_suffix(".json").read_text()), path.stat().st_mtime_ns
    assert f"{about['return']:.2f}" in capsys.readouterr().err and about["episodes"] == 10
    again = bc.find_expert(args, 0, spaces)
    obs = np.stack([spaces[0].sample() for _ in range(9)]).clip(-5, 5)
    assert (trained(obs) == again(obs)).all() and path.stat().st_mtime_ns == written
    assert torch.equal(torch.get_rng_state(), state)


def our_expert(path, env_id="CartPole-v1") -> bc.ClonedPolicy:
    torch.manual_seed(6)
    policy = bc.ClonedPolicy(*spaces_of(env_id), bc.Args())
    bc.export_policy(policy, path)
    return policy


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_policies_of_scripts_here_act_as_in_their_own_code(env_id):
    policy = our_expert(Path("policy.pt2"), env_id)
    args = bc.Args(env_id=env_id, expert="policy.pt2")
    expert = bc.find_expert(args, 0, spaces_of(env_id))
    obs = np.random.default_rng(0).normal(size=(20, policy.observation_space.shape[0])).astype(np.float32)
    np.testing.assert_array_equal(expert(obs), policy(torch.as_tensor(obs)).detach().numpy())


@pytest.mark.parametrize("expert", ["nowhere.pt2", "nonsense.pt2", "nonsense.zip", "pendulum.pt2", "three.pt2"])
def test_refuses_what_is_no_expert_for_the_environment(expert, capsys):
    Path("nonsense.pt2").write_bytes(b"nonsense")
    Path("nonsense.zip").write_bytes(b"nonsense")
    our_expert(Path("pendulum.pt2"), "Pendulum-v1")
    with pytest.raises(SystemExit) as exit_:
        bc.train(bc.parse_args(["--expert", expert]))
    assert exit_.value.code == 2 and f"--expert {expert}" in capsys.readouterr().err
    assert not Path("runs").exists()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def pickled(x) -> bytes:
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


def in_json(path, change):
    def changed(name, data):
        if name != f"policy/{path}":
            return data
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return changed


def replace_first(key, value):
    """Sets the first `key` anywhere below."""

    def change(content):
        below = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        if isinstance(content, dict) and key in content:
            content[key] = value
            return True
        return any(change(x) for x in below)

    return change


CODE = "__import__('os').mkdir('harm')"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
ATTACKS = {
    "sample inputs": lambda name, data: pickled((Malicious(),)) if name.endswith("sample_inputs/model.pt") else data,
    "weights": lambda name, data: (
        in_json(WEIGHTS, lambda x: next(iter(x["config"].values())).update(use_pickle=True))(name, data)
        if name.endswith(".json")
        else pickled(Malicious())
        if name.endswith("weight_0")
        else data
    ),
    "constant": in_json(
        CONSTANTS,
        lambda x: x["config"].update(
            a=dict(path_name="opaque_obj_0", is_param=False, use_pickle=True, tensor_meta=None)
        ),
    ),
    "guards": in_json("models/model.json", lambda x: x.update(guards_code=[CODE])),
    "symbol": in_json("models/model.json", replace_first("expr_str", CODE)),
    "operator": in_json("models/model.json", replace_first("target", "os.mkdir")),
    "file": in_json("models/model.json", replace_first("target", "torch.ops.aten.from_file.default")),
    "name": in_json("models/model.json", lambda x: x["graph_module"]["graph"]["nodes"][0].update(name=f"x={CODE};y")),
}


@pytest.mark.parametrize("attack", [*ATTACKS, "extra file"])
def test_a_malicious_policy_is_refused_and_nothing_in_it_is_executed(attack, capsys):
    our_expert(Path("good.pt2"))
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        changed = False
        for name in good.namelist():
            name = name.replace(good.namelist()[0].split("/")[0], "policy", 1)
            data = good.read(name.replace("policy", good.namelist()[0].split("/")[0], 1))
            new = ATTACKS[attack](name, data) if attack in ATTACKS else data
            changed |= new != data
            bad.writestr(name, new)
        if attack == "constant":
            bad.writestr("policy/data/constants/opaque_obj_0", pickled(Malicious()))
        if attack == "extra file":
            bad.writestr("policy/data/aotinductor/model/x.so", b"\x7fELF")
        assert changed or attack == "extra file"
    with pytest.raises(SystemExit) as exit_:
        bc.train(bc.parse_args(["--expert", "bad.pt2"]))
    assert exit_.value.code == 2 and "it holds" in capsys.readouterr().err or attack == "sample inputs"
    assert not Path("harm").exists() and not Path("runs").exists()


def test_the_attacks_would_work_on_pytorch_itself():
    """What the check is for: PyTorch executes at least one of them."""
    our_expert(Path("good.pt2"))
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, ATTACKS["sample inputs"](name, good.read(name)))
    with pytest.raises(Exception):  # noqa: B017 — it stumbles over what it has executed
        torch.export.load("bad.pt2")
    assert Path("harm").exists()


# Minari -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 3])
def test_demonstrations_saved_with_minari_train_the_same_policy(history, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("datasets").resolve()))
    our_expert(Path("policy.pt2"))
    flags = f"--total-timesteps 300 --epochs 2 --eval-episodes 1 --history {history}"
    saved, read = (
        torch.load(bc.train(bc.parse_args(f"{flags} {more}".split()))["run_dir"] / "checkpoint.pt", weights_only=True)
        for more in ("--expert policy.pt2 --save-dataset cartpole/test-v0", "--dataset cartpole/test-v0")
    )
    for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated"):
        torch.testing.assert_close(saved["demonstrations"][name], read["demonstrations"][name])
    assert saved["demonstrations"]["observations"].shape == (300, 4 * history)
    (again,) = [path for path in Path("runs").iterdir() if 'save_dataset": "cart' in (path / "args.json").read_text()]
    bc.train(bc.parse_args(["--resume", str(again)]))
    assert saved["counter"]["episodes"] > 3 and saved["step"] == read["step"] == 300
    torch.testing.assert_close(saved["policy"], read["policy"])


def test_refuses_datasets_that_are_not_there_taken_or_of_other_spaces(monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("datasets").resolve()))
    our_expert(Path("policy.pt2"))
    bc.train(
        bc.parse_args("--expert policy.pt2 --total-timesteps 50 --epochs 1 --save-dataset cartpole/small-v0".split())
    )
    for flags, names in (
        ("--dataset ./nowhere", "--dataset ./nowhere"),
        ("--env-id Acrobot-v1 --dataset cartpole/small-v0", "Acrobot-v1 has"),
        ("--dataset cartpole/small-v0 --num-envs 2", "--num-envs 1"),
        ("--expert policy.pt2 --save-dataset cartpole/small-v0", "already"),
        ("--expert policy.pt2 --save-dataset !", "--save-dataset"),
    ):
        with pytest.raises(SystemExit) as exit_:
            bc.train(bc.parse_args(flags.split()))
        assert exit_.value.code == 2 and names in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(SystemExit):
        bc.train(bc.parse_args("--dataset cartpole/small-v0".split()))
    assert 'pip install "minari[hdf5]"' in capsys.readouterr().err
