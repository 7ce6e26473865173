"""dagger.py: whose actions are done, whose are learned, and from which states."""

from pathlib import Path

import bc
import dagger
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

PLANE = Box(-1, 1, (2,))


def contrary(obs):
    """An expert for CartPole-v1 that no small network has right before it has learned."""
    return (np.sin(200 * obs[:, 2]) > 0).astype(np.int64)


def run_of(flags, monkeypatch, expert=contrary) -> tuple[dict, np.ndarray, Path]:
    """A short run in CartPole-v1 → its data, the actions that were done there, its directory."""
    done, step_envs = [], dagger.step_envs
    with monkeypatch.context() as patch:
        patch.setattr(dagger, "find_expert", lambda *_: expert)
        patch.setattr(dagger, "step_envs", lambda envs, actions: done.append(actions) or step_envs(envs, actions))
        patch.setattr(dagger, "evaluate", lambda *_: np.zeros(1))
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
    sizes = []
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: sizes.append(len(x)) or split(x, size))
    long, _, _ = run_of("--total-timesteps 400", monkeypatch)
    assert sizes == [100, 200, 300, 400], "every iteration learns from all data so far"
    for name in ("observations", "actions"):
        assert torch.equal(short[name], long[name][:200])


@pytest.mark.parametrize(
    "space", [Discrete(3, start=1), Box(np.float32([-1, 2]), np.float32([3, 4]))], ids=["discrete", "box"]
)
def test_the_first_iteration_is_cloning(space):
    """The expert acts, whatever β decays by, and the gradient is that of bc.py (for a Box, its Gaussian's mean's)."""
    assert [dagger.expert_probability(1, decay) for decay in (0.0, 0.3, 1.0)] == [1, 1, 1]
    assert [dagger.expert_probability(i, 0.5) for i in (2, 3)] == [0.5, 0.25]
    assert dagger.expert_probability(2, 0.0) == 0
    torch.manual_seed(0)
    learner, cloned = dagger.Learner(PLANE, space, ()), bc.ClonedPolicy(PLANE, space, bc.Args(hidden_sizes=()))
    layer = cloned.head.logits if isinstance(space, Discrete) else cloned.head.mean
    layer.load_state_dict(learner.network[0].state_dict())
    obs = 1e-4 * torch.randn(20, 2)  # where tanh is the identity
    learner.network[0].bias.data[:] = layer.bias.data[:] = 0
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(20)]))
    if isinstance(space, Box):
        actions = torch.as_tensor(space.low + space.high) / 2 + 1e-3 * (actions - torch.as_tensor(space.low))
    ours, _ = dagger.dagger_gradient(learner, obs, actions)
    theirs = torch.autograd.grad(-cloned.log_prob(obs, actions).mean(), list(layer.parameters()))
    torch.testing.assert_close(ours, torch.cat([x.flatten() for x in theirs]), rtol=1e-4, atol=1e-9)


def test_the_expert_acts_with_probability_beta(monkeypatch):
    monkeypatch.setattr(dagger.Learner, "forward", lambda learner, obs: 0 * obs[:, 0].long())
    monkeypatch.setattr(dagger, "export_policy", lambda *_: None)
    flags = "--total-timesteps 6000 --steps-per-iteration 2000 --beta-decay 0.5"
    _, done, _ = run_of(flags, monkeypatch, expert=lambda obs: np.ones(len(obs), np.int64))
    shares = done.reshape(3, 2000).mean(1)
    assert shares == pytest.approx([1, 0.5, 0.25], abs=0.04)
