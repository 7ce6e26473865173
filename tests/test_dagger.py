"""dagger.py: whose actions are done, whose are learned, and from which states."""

import inspect
from pathlib import Path

import bc
import dagger
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

PLANE = Box(-1, 1, (2,))


def contrary(obs):
    """An expert for CartPole-v1 that no small network has right before it has learned."""
    return (np.sin(200 * obs[:, 2]) > 0).astype(np.int64)


def run_of(flags, monkeypatch, expert=contrary) -> tuple[dict, np.ndarray, Path]:
    """A short run in CartPole-v1 → its data, the actions that were done there, its directory."""
    done, step = [], dagger.Envs.step
    with monkeypatch.context() as patch:
        patch.setattr(dagger, "find_expert", lambda *_: expert)
        patch.setattr(dagger.Envs, "step", lambda envs, actions: done.append(actions) or step(envs, actions))
        patch.setattr(dagger, "evaluate", lambda *_, **__: np.zeros(1))
        flags = f"--steps-per-iteration 100 --epochs 1 --eval-episodes 1 {flags}"
        run_dir = dagger.train(dagger.parse_args(flags.split()))["run_dir"]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return state["data"], torch.cat(done).numpy(), run_dir


def test_labels_are_the_experts_in_the_learners_states(monkeypatch):
    data, done, run_dir = run_of("--total-timesteps 400 --num-envs 2", monkeypatch)
    labels = contrary(data["observations"].numpy())
    assert len(labels) == 400 and (data["actions"].numpy() == labels).all()
    assert (done[:100] == labels[:100]).all(), "in the first iteration the expert acts"
    assert 0.2 < (done[100:] == labels[100:]).mean() < 0.8, "from the second on the learner does"
    learner = torch.load(run_dir / "checkpoint.pt", weights_only=True)["learner"]
    torch.testing.assert_close(learner["mean"], data["observations"].mean(0))
    torch.testing.assert_close(learner["std"], data["observations"].std(0, correction=0))


def test_the_learner_that_acts_is_the_one_that_has_learned(monkeypatch):
    """From iteration to iteration the done actions are those of the weights at the iteration's begin."""
    learners, forward = [], dagger.Learner.forward

    def recorded(learner, obs):
        learners.append(learner.network[0].weight.detach().clone())
        return forward(learner, obs)

    monkeypatch.setattr(dagger.Learner, "forward", recorded)
    monkeypatch.setattr(dagger, "export_policy", lambda *_: None)
    run_of("--total-timesteps 300", monkeypatch)
    changes = [i for i in range(1, 300) if not torch.equal(learners[i], learners[i - 1])]
    assert changes == [100, 200]


def test_data_only_grow(monkeypatch):
    short, _, _ = run_of("--total-timesteps 200", monkeypatch)
    sizes, standardise = [], dagger.Learner.standardise
    monkeypatch.setattr(dagger.Learner, "standardise", lambda x, obs: sizes.append(len(obs)) or standardise(x, obs))
    long, _, _ = run_of("--total-timesteps 400", monkeypatch)
    assert sizes == [100, 200, 300, 400], "every iteration learns from all data so far"
    for name in ("observations", "actions"):
        assert torch.equal(short[name], long[name][:200])


@pytest.mark.parametrize(
    "space", [Discrete(3, start=1), Box(np.float32([-1, 2]), np.float32([3, 4]))], ids=["discrete", "box"]
)
def test_the_first_iteration_is_cloning(space):
    """The gradient is that of bc.py (for a Box, its Gaussian's mean's)."""
    torch.manual_seed(0)
    learner, cloned = dagger.Learner(PLANE, space, ()), bc.ClonedPolicy(PLANE, space, bc.Args(hidden_sizes=()))
    (layer,) = cloned.logits if isinstance(space, Discrete) else cloned.head.mode
    layer.load_state_dict(learner.network[0].state_dict())
    obs = 1e-4 * torch.randn(20, 2)  # where tanh is the identity
    learner.network[0].bias.data[:] = layer.bias.data[:] = 0
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(20)]))
    if isinstance(space, Box):
        actions = torch.as_tensor(space.low + space.high) / 2 + 1e-3 * (actions - torch.as_tensor(space.low))
    dagger.dagger_gradient(learner, obs, actions)
    bc.bc_gradient(cloned, obs, actions)
    for ours, theirs in zip(learner.network.parameters(), layer.parameters(), strict=True):
        factor = 1 if isinstance(space, Discrete) else 1  # mean of A = 2 squares here, half their sum there
        torch.testing.assert_close(ours.grad, theirs.grad * factor, rtol=1e-4, atol=1e-9)


def test_the_expert_acts_with_probability_beta(monkeypatch):
    monkeypatch.setattr(dagger.Learner, "forward", lambda learner, obs: 0 * obs[:, 0].long())
    monkeypatch.setattr(dagger, "export_policy", lambda *_: None)
    flags = "--total-timesteps 6000 --steps-per-iteration 2000 --beta-decay 0.5"
    _, done, _ = run_of(flags, monkeypatch, expert=lambda obs: np.ones(len(obs), np.int64))
    done = done[:6000]
    shares = done.reshape(3, 2000).mean(1)
    assert shares == pytest.approx([1, 0.5, 0.25], abs=0.04)


def output_of(flags: str, capsys, code: int | None = None) -> str:
    """What a run prints; it ends with this exit code."""
    try:
        dagger.train(dagger.parse_args(flags.split()))
    except SystemExit as exit_:
        assert exit_.code == code
    else:
        assert code is None, "it was not refused"
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and (code != 2 or printed.err.count("\n") == 1), printed.err
    return printed.out + printed.err


def test_experts_are_found_as_in_bc():
    """What test_bc.py shows of them is so here, too."""
    for name in ("load_sb3", "train_expert", "find_expert", "LabelledStates", "moments"):
        assert inspect.getsource(getattr(dagger, name)) == inspect.getsource(getattr(bc, name))


def test_refuses_models_of_other_libraries_and_normalised_observations(capsys):
    RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu").save("recurrent.zip")
    refusal = output_of("--expert recurrent.zip", capsys, code=2)
    assert "sb3_contrib" in refusal and "RecurrentActorCriticPolicy" in refusal
    env = VecNormalize(make_vec_env("CartPole-v1", 1))
    PPO("MlpPolicy", env, device="cpu").save("expert.zip")
    env.save("vecnormalize.pkl")
    assert "vecnormalize.pkl" in output_of("--expert expert.zip", capsys, code=2) and not Path("runs").exists()


def test_the_experts_return_stands_beside_the_learners_and_says_whose(capsys):
    flags = "--expert-timesteps 256 --total-timesteps 1 --epochs 1 --eval-episodes 2"  # one step is enough here
    for trained in (True, False):
        lines = output_of(flags, capsys).splitlines()
        experts = [line for line in lines if line.startswith("the expert: ")]
        assert len(experts) == 2 and "runs/experts/CartPole-v1__256__" in experts[0]
        assert experts[0].endswith(", trained now") is trained
        assert experts[1].endswith("over 2 episodes") and lines[lines.index(experts[1]) + 1].startswith("evaluation: ")
    assert "trained now" in output_of(flags.replace("256", "257"), capsys)


def test_refuses_actions_that_it_cannot_scale(capsys):
    for name, space in {"half": Box(np.float32([0]), np.float32([np.inf])), "huge": Box(-3e38, 3e38, (1,))}.items():
        env = {"entry_point": Still, "max_episode_steps": 10, "kwargs": {"space": space}}
        gym.register(f"Dagger-{name}-v0", **env)
        assert "bc.py" in output_of(f"--env-id Dagger-{name}-v0", capsys, code=2)


class Still(gym.Env):
    """Nothing but a space of actions."""

    observation_space = Box(-9, 9, (2,))

    def __init__(self, space):
        self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.np_random.normal(size=2).astype(np.float32), 0.0, False, False, {}
