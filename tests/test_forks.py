"""Forks as a researcher makes them: small edits of copies of the scripts, each held against plain PyTorch.

A fork is a list of (text, its replacement). That it learns as PyTorch would is checked by training it twice, as it is
and with torch.optim.Adam and torch.nn.utils.clip_grad_norm_ in place of what the script has: the same weights.
"""

import contextlib
import copy
import functools
import importlib.util
import re
import sys
import types
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete
from torch import nn

ALGOS = Path(__file__).resolve().parent.parent / "algos"
SIZES = "--hidden-sizes 16 16 --eval-episodes 3 --device cpu"
OFF_POLICY = f"{SIZES} --total-timesteps 80 --learning-starts 40 --batch-size 16 --buffer-size 200 --learning-rate 3e-3"
FLAGS = {
    "ppo": f"{SIZES} --env-id Pendulum-v1 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2"
    " --total-timesteps 192",
    "a2c": f"{SIZES} --env-id CartPole-v1 --num-envs 2 --num-steps 8 --total-timesteps 160 --optimizer adam",
    "trpo": f"{SIZES} --env-id Pendulum-v1 --num-envs 2 --num-steps 32 --num-minibatches 2 --total-timesteps 192",
    "reinforce": f"{SIZES} --env-id CartPole-v1 --total-timesteps 600",
    "dqn": f"{OFF_POLICY} --env-id CartPole-v1 --train-frequency 1 --gradient-steps 1 --n-step 1 --target-frequency 10",
    "sac": f"{OFF_POLICY} --env-id Pendulum-v1",
    "td3": f"{OFF_POLICY} --env-id Pendulum-v1",
    "ddpg": f"{OFF_POLICY} --env-id Pendulum-v1",
}
TANH, RELU = "nn.Tanh()", "nn.ReLU(inplace=True)"
ON_POLICY = ("ppo", "a2c", "trpo", "reinforce")


def fork(folder: Path, algo: str, *edits: tuple[str, str]) -> types.ModuleType:
    """algos/{algo}.py with these replacements, each of a text that occurs once, as a module."""
    text = (ALGOS / f"{algo}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{algo}.py has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / f"{algo}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"fork_{folder.name}_{algo}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(module: types.ModuleType, flags: str | None = None, inserted: type | None = None) -> types.SimpleNamespace:
    """Trains it. What its checkpoint holds, as it was at first (`before`) and in the end (`modules`, `after`); metrics
    as they were logged; numbers of rows that layers of the type `inserted` have seen in training; result of train().
    `loaded` is every state, of optimisers and buffers too, where training begins or is resumed."""
    seen, hooks = types.SimpleNamespace(metrics=[], rows=set()), []
    start, log, finish = module.Run.start, module.Run.log, module.Run.finish

    def state(modules: dict) -> dict:
        return {name: copy.deepcopy(x.state_dict()) for name, x in modules.items() if isinstance(x, nn.Module)}

    def recording_start(run, envs, **modules):
        start(run, envs, **modules)
        seen.modules, seen.before = modules, state(modules)
        seen.loaded = {name: copy.deepcopy(x.state_dict()) for name, x in modules.items()}
        networks = [x for x in modules.values() if isinstance(x, nn.Module)]
        for layer in {x for network in networks for x in network.modules() if inserted and isinstance(x, inserted)}:
            hooks.append(layer.register_forward_hook(lambda _, inputs, output: seen.rows.add(len(inputs[0]))))

    def recording_log(run, metrics, **charts):
        seen.metrics += [{name: x.mean().item() for name, x in row.items()} for row in metrics]
        log(run, metrics, **charts)

    def recording_finish(run, policy):
        for hook in hooks:
            hook.remove()
        seen.policy, seen.envs, seen.after = policy, run.envs, state(seen.modules)
        return finish(run, policy)

    with patch.multiple(module.Run, start=recording_start, log=recording_log, finish=recording_finish):
        flags = flags or FLAGS[Path(module.__file__).stem]
        seen.result = module.train(
            module.parse_args([*flags.split(), "--output-dir", str(Path(module.__file__).parent)])
        )
    return seen


@contextlib.contextmanager
def plain_pytorch(module: types.ModuleType):
    """Within it the fork has Adam without a kernel of its own, and PyTorch's own clipping."""

    def clip_gradient(parameters, bound):
        torch.nn.utils.clip_grad_norm_(list(parameters), bound)

    adam, has_own = torch.optim.Adam, hasattr(module, "clip_gradient")
    with contextlib.ExitStack() as stack:
        if has_own:
            stack.enter_context(patch.object(module, "clip_gradient", clip_gradient))
        stack.enter_context(patch.object(torch.optim, "Adam", lambda *x, **kw: adam(*x, **kw | {"fused": False})))
        yield


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-3) -> None:
    """Two states as `train` records them agree, in parts of a tensor's largest number."""
    for name, state in ours.items():
        for key, x in state.items():
            error = (x - theirs[name][key]).abs().max() / theirs[name][key].abs().max().clamp(min=1e-3)
            assert error < tolerance, f"{name}, {key}: {error:.1e}"


def assert_differs(ours: dict, theirs: dict) -> None:
    """Somewhere in what both have."""
    pairs = [(x, theirs[name].get(key)) for name, state in ours.items() for key, x in state.items()]
    assert any(y is None or x.shape != y.shape or not torch.allclose(x, y, rtol=1e-3) for x, y in pairs), "no effect"


def assert_learns_as_pytorch(module: types.ModuleType, **kwargs) -> types.SimpleNamespace:
    """The fork's weights are those of plain PyTorch; what it exports and evaluates is the network in eval mode."""
    seen = train(module, **kwargs)
    with plain_pytorch(module):
        plain = train(module, **kwargs)
    assert_same(seen.after, plain.after)
    for name, module_ in seen.modules.items():
        if isinstance(module_, nn.Module) and name != "target":
            still = [
                key for key, x in module_.named_parameters() if x.equal(seen.before[name][key]) and x.requires_grad
            ]
            assert not still, f"{still} did not learn"
    policy = torch.export.load(seen.result["run_dir"] / "policy.pt2").module()
    obs = torch.as_tensor(np.stack([seen.envs.observation_space.sample() for _ in range(5)]))
    with torch.no_grad():
        torch.testing.assert_close(policy(obs), seen.policy.eval()(obs))
    return seen


# Networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", FLAGS)
def test_another_activation(algo, tmp_path):
    """GELU; in dqn.py it had no effect at all, and in ppo.py it did not act."""
    module = fork(tmp_path, algo, (TANH if algo in ON_POLICY else RELU, "nn.GELU()"))
    seen = assert_learns_as_pytorch(module, inserted=nn.GELU)
    assert_acts_and_learns(seen, module)
    assert_differs(seen.after, train(fork(tmp_path / "original", algo)).after)


@pytest.mark.parametrize("algo", FLAGS)
def test_a_norm(algo, tmp_path):
    """LayerNorm before each activation: every network has its own, which acts, learns, is exported and followed."""
    activation = TANH if algo in ON_POLICY else RELU
    module = fork(tmp_path, algo, (activation, f"nn.LayerNorm(outputs), {activation}"))
    seen = assert_learns_as_pytorch(module, inserted=nn.LayerNorm)
    assert_acts_and_learns(seen, module)
    if algo in ("sac", "td3"):
        norms = [x for x in seen.modules["agent"].critics.modules() if isinstance(x, nn.LayerNorm)]
        assert len(norms) == 4 and not norms[0].weight.equal(norms[2].weight)


def assert_acts_and_learns(seen: types.SimpleNamespace, module: types.ModuleType) -> None:
    """The layer has seen the rows of one step and those of minibatches."""
    args = module.parse_args(FLAGS[Path(module.__file__).stem].split())
    assert args.num_envs in seen.rows, "the layer does not act"
    assert max(seen.rows) > args.num_envs, "the layer does not learn"


@pytest.mark.parametrize("algo", ["ppo", "dqn", "sac"])
def test_dropout(algo, tmp_path):
    """It drops in training; what is evaluated and exported does not."""
    activation = TANH if algo in ON_POLICY else RELU
    module = fork(tmp_path, algo, (activation, f"{activation}, nn.Dropout(0.5)"))
    seen = train(module, inserted=nn.Dropout)
    assert_acts_and_learns(seen, module)
    assert all(x.training for x in seen.policy.modules()), "evaluation left the network in eval mode"
    policy = torch.export.load(seen.result["run_dir"] / "policy.pt2").module()
    obs = torch.as_tensor(np.stack([seen.envs.observation_space.sample() for _ in range(5)]))
    with torch.no_grad():
        torch.testing.assert_close(policy(obs), policy(obs), rtol=0, atol=0)
        torch.testing.assert_close(policy(obs), seen.policy.eval()(obs))


@pytest.mark.parametrize("algo", ["sac", "td3", "ddpg"])
def test_batch_norm_in_the_critics(algo, tmp_path):
    """Over the minibatch, each critic its own; the target copies its statistics and normalises by them."""
    definition = """def normed_mlp(sizes):
    layers = []
    for layer in relu_mlp(sizes):
        if isinstance(layer, nn.Linear):
            layer.register_parameter("bias", None)  # its gradient would be rounding alone
        layers += [layer, nn.BatchNorm1d(layer.out_features)] if isinstance(layer, nn.Linear) else [layer]
    return nn.Sequential(*layers[:-1])


"""
    one = algo == "ddpg"
    old = "self.critic = relu_mlp(" if one else "super().__init__(relu_mlp([inputs, *hidden_sizes, 1])"
    first = "class DeterministicActorCritic(" if one else "class Critics("
    module = fork(tmp_path, algo, (old, old.replace("relu", "normed")), (first, definition + first))
    seen = assert_learns_as_pytorch(module)
    agent, target = seen.modules["agent"], seen.modules["target"]
    critics = nn.ModuleList([agent.critic]) if one else agent.critics
    x = torch.cat([torch.randn(32, 3), torch.rand(32, 1)], -1)
    critic = critics[0].train()
    norm, y, values = critic[1], critic[0](x), critic[:2](x)
    expected = (y - y.mean(0)) / (y.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(values, expected)
    target = nn.ModuleList([target.critic]) if one else getattr(target, "critics", target)
    pairs = [(x, y) for x, y in zip(critics.modules(), target.modules()) if isinstance(x, nn.BatchNorm1d)]
    assert pairs and not any(y.training for _, y in pairs)
    for ours, theirs in pairs:
        assert int(theirs.num_batches_tracked) > 0
        torch.testing.assert_close(theirs.running_mean, ours.running_mean, rtol=0.3, atol=0.1)


SHARED_TRUNK = (
    ("self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)",
     "self.trunk = mlp([inputs, *hidden_sizes], output_gain=2**0.5)\n"
     "        self.actor = mlp([hidden_sizes[-1], self.action_size], output_gain=0.01)"),
    ("self.critic = mlp([inputs, *hidden_sizes, 1], output_gain=1.0)",
     "self.critic = mlp([hidden_sizes[-1], 1], output_gain=1.0)"),
    ("return self.critic(states).squeeze(-1)", "return self.critic(self.trunk(states)).squeeze(-1)"),
    ("output = self.actor(self.encode(obs)) + noise", "output = self.actor(self.trunk(self.encode(obs))) + noise"),
    ("        output = self.actor(states)\n", "        output = self.actor(self.trunk(states))\n"),
    ("        output = self.actor(self.encode(obs))\n", "        output = self.actor(self.trunk(self.encode(obs)))\n"),
)  # fmt: skip


def test_a_trunk_that_policy_and_value_share(tmp_path):
    seen = assert_learns_as_pytorch(fork(tmp_path, "ppo", *SHARED_TRUNK))
    assert not seen.after["agent"]["trunk.0.weight"].equal(seen.before["agent"]["trunk.0.weight"])


# Optimisers -------------------------------------------------------------------------------------------------


ADAM = "lean(torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True))"


def trained_with(optimizer, tmp_path, algo="ppo", name="optimizer"):
    """The original, with the optimiser that `optimizer(Adam, params, lr, **settings)` makes, from Python."""
    module = fork(tmp_path / "reference", algo)
    with patch.object(torch.optim, "Adam", functools.partial(optimizer, torch.optim.Adam)):
        return train(module)


def test_adamw(tmp_path):
    """In sac.py it changed nothing."""
    old = "lean(torch.optim.Adam(agent.critics.parameters(), args.learning_rate, fused=True))"
    new = "torch.optim.AdamW(agent.critics.parameters(), args.learning_rate, weight_decay=0.3)"
    seen = train(fork(tmp_path, "sac", (old, new)))
    original = train(fork(tmp_path / "original", "sac"))
    assert_differs({"agent": seen.after["agent"]}, original.after)

    def optimizer(adam, params, lr, **settings):  # decay by hand, before Adam's step
        params = list(params)
        adam = adam(params, lr, **settings)
        decay = 0.3 if len(params) == 12 else 0.0  # the critics'

        def shrink(*_):
            with torch.no_grad():
                torch._foreach_mul_(params, 1 - lr * decay)

        adam.register_step_pre_hook(shrink)
        return adam

    assert_same(seen.after, trained_with(optimizer, tmp_path, "sac").after)


def test_weight_decay(tmp_path):
    seen = train(fork(tmp_path, "ppo", (ADAM, ADAM.replace("eps", "weight_decay=0.1, eps"))))
    reference = trained_with(lambda adam, p, lr, **x: adam(p, lr, weight_decay=0.1, **x), tmp_path)
    assert_same(seen.after, reference.after)
    assert_differs(seen.after, train(fork(tmp_path / "original", "ppo")).after)


def test_groups_with_two_rates_that_are_annealed(tmp_path):
    groups = "{'params': [*agent.actor.parameters(), agent.log_std]}, {'params': agent.critic.parameters(), 'lr': 0.0}"
    module = fork(
        tmp_path, "ppo", (ADAM, f"lean(torch.optim.Adam([{groups}], args.learning_rate, eps=1e-5, fused=True))")
    )
    seen = train(module, FLAGS["ppo"] + " --anneal-lr --learning-rate 0.003")
    for key, x in seen.after["agent"].items():
        assert (not x.equal(seen.before["agent"][key])) == key.startswith(("actor", "log_std")), key
    rates = [group["lr"] for group in seen.modules["optimizer"].param_groups]
    assert rates == [pytest.approx(0.001), 0], "a third of the way is left where the last rollout begins"


def test_the_update_of_any_tutorial(tmp_path):
    """loss.backward() and torch's own clipping and optimiser, written out; in ppo.py nothing trained."""
    tutorial = """                optimizer.zero_grad()
                loss, loss_metrics = ppo_loss(agent, minibatch, clip, args)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                metrics.append(loss_metrics)
"""
    old = """                optimizer.zero_grad()
                metrics.append(gradient_of(agent, minibatch, clip, args))
"""
    module = fork(
        tmp_path, "ppo", (old, tutorial), (ADAM, "torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)")
    )
    assert_same(train(module).after, train(fork(tmp_path / "original", "ppo")).after)


def test_a_frozen_layer(tmp_path):
    """It stays as it is, and the others learn."""
    seen = train(fork(tmp_path, "ppo", (ADAM, ADAM + "\n        agent.actor[0].requires_grad_(False)")))
    for key, x in seen.after["agent"].items():
        assert x.equal(seen.before["agent"][key]) == (key.startswith(("actor.0", "return_statistics", "bounds"))), key


def test_a_frozen_layer_of_the_actor_that_critics_judge(tmp_path):
    old = "actor_optimizer = lean(torch.optim.Adam(agent.actor.parameters(), args.learning_rate, fused=True))"
    seen = train(fork(tmp_path, "sac", (old, old + "\n        agent.actor[0].requires_grad_(False)")))
    for key, x in seen.after["agent"].items():
        if key.startswith("actor"):
            assert x.equal(seen.before["agent"][key]) == key.startswith("actor.0"), key


# Actions, memory, replay ------------------------------------------------------------------------------------


class Levers(gym.Env):
    """Three levers of 3, 2 and 4 positions; the reward is the number of those in position 1."""

    observation_space, action_space = Box(-1, 1, (2,), np.float32), MultiDiscrete([3, 2, 4])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(2, 0.5, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.full(2, 0.5, np.float32), float((action == 1).sum()), False, False, {}


gym.register("Levers-v0", Levers, max_episode_steps=8)

MULTI_DISCRETE = (
    ("(Discrete, Box))", "(gym.spaces.MultiDiscrete,))"),
    ("self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]",
     "self.sizes, self.action_size = action_space.nvec.tolist(), int(action_space.nvec.sum())"),
    ("isinstance(observation_space, Discrete), isinstance(action_space, Discrete)",
     "isinstance(observation_space, Discrete), True"),
    ("        return output.argmax(-1) if self.discrete else output\n\n",
     "        return torch.stack([x.argmax(-1) for x in output.split(self.sizes, -1)], -1)\n\n"),
    ("            log_probs = output.log_softmax(-1)\n"
     "            entropy = -(log_probs.exp() * log_probs).sum(-1)\n"
     "            return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy\n",
     "            parts = [x.log_softmax(-1) for x in output.split(self.sizes, -1)]\n"
     "            chosen = [x.gather(-1, a.unsqueeze(-1)).squeeze(-1) for x, a in zip(parts, actions.unbind(-1))]\n"
     "            return sum(chosen), -sum((x.exp() * x).sum(-1) for x in parts)\n"),
    ("return actions + int(self.action_space.start) if self.discrete else actions.clamp(*self.bounds)",
     "return actions"),
    ("return self.to_env(output.argmax(-1) if self.discrete else output)",
     "return torch.stack([x.argmax(-1) for x in output.split(self.sizes, -1)], -1)"),
)  # fmt: skip


def test_multi_discrete_actions(tmp_path):
    flags = f"{SIZES} --env-id Levers-v0 --num-envs 4 --num-steps 64 --total-timesteps 4096 --learning-rate 3e-3"
    seen = assert_learns_as_pytorch(fork(tmp_path, "ppo", *MULTI_DISCRETE), flags=flags)
    agent, states, actions = seen.policy, torch.randn(50, 2), torch.tensor(Levers.action_space.sample()).expand(50, 3)
    log_probs, entropy = agent.log_prob_and_entropy(states, actions)
    parts = [torch.distributions.Categorical(logits=x) for x in agent.actor(states).split([3, 2, 4], -1)]
    torch.testing.assert_close(log_probs, sum(p.log_prob(a) for p, a in zip(parts, actions.unbind(-1))))
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts))
    assert seen.result["returns"].mean() > 20, "of 24; at random 8.7"


RECURRENT = (
    ("namedtuple(\"PPOBatch\", \"states actions", "namedtuple(\"PPOBatch\", \"hidden starts states actions"),
    ("agent.log_prob_and_entropy(batch.states, batch.actions)",
     "agent.log_prob_and_entropy(batch.states, batch.actions, batch.hidden, batch.starts)"),
    ("self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)",
     "self.memory = nn.GRUCell(inputs, hidden_sizes[0])\n"
     "        self.actor = mlp([hidden_sizes[0], *hidden_sizes[1:], self.action_size], output_gain=0.01)"),
    ("    def act(self, obs: Tensor, noise: Tensor) -> Tensor:",
     "    def act(self, obs: Tensor, noise: Tensor, hidden: Tensor):"),
    ("        output = self.actor(self.encode(obs)) + noise\n"
     "        return output.argmax(-1) if self.discrete else output\n",
     "        hidden = self.memory(self.encode(obs), hidden)\n"
     "        output = self.actor(hidden) + noise\n"
     "        return output.argmax(-1) if self.discrete else output, hidden\n"),
    ("    def log_prob_and_entropy(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:",
     "    def unroll(self, states, hidden, starts):  # (n, T, D), (n, H), (n, T) → (n, T, H)\n"
     "        outputs = []\n"
     "        for x, start in zip(states.unbind(1), starts.unbind(1)):\n"
     "            hidden = self.memory(x, hidden * ~start.unsqueeze(-1))\n"
     "            outputs.append(hidden)\n"
     "        return torch.stack(outputs, 1)\n\n"
     "    def log_prob_and_entropy(self, states, actions, hidden, starts) -> tuple[Tensor, Tensor]:"),
    ("        output = self.actor(states)\n", "        output = self.actor(self.unroll(states, hidden, starts))\n"),
    ("    def forward(self, obs: Tensor) -> Tensor:", "    def forward(self, obs: Tensor, hidden: Tensor):"),
    ("        output = self.actor(self.encode(obs))\n",
     "        hidden = self.memory(self.encode(obs), hidden)\n        output = self.actor(hidden)\n"),
    ("return self.to_env(output.argmax(-1) if self.discrete else output)",
     "return self.to_env(output.argmax(-1) if self.discrete else output), hidden"),
    ("        while run.goes_on():\n",
     "        hidden = torch.zeros(args.num_envs, args.hidden_sizes[0], device=run.device)\n"
     "        started = np.ones(args.num_envs, bool)\n"
     "        while run.goes_on():\n            first_hidden, starts = hidden, []\n"),
    ("                actions = agent.act(torch.as_tensor(obs, device=run.device), noise)\n",
     "                hidden = hidden * ~torch.as_tensor(started, device=run.device).unsqueeze(-1)\n"
     "                starts.append(started)\n"
     "                actions, hidden = agent.act(torch.as_tensor(obs, device=run.device), noise, hidden)\n"),
    ("                run.advance(envs)\n",
     "                run.advance(envs)\n                started = terminated | truncated\n"),
    ("                log_probs, _ = agent.log_prob_and_entropy(states, actions)\n",
     "                starts = torch.as_tensor(np.array(starts), device=run.device).T\n"
     "                inputs = states.transpose(0, 1), actions.transpose(0, 1)\n"
     "                log_probs = agent.log_prob_and_entropy(*inputs, first_hidden, starts)[0].T\n"),
    ("            batch = (x.flatten(0, 1) for x in (states, actions, log_probs, values, advantages, returns))\n",
     "            batch = (x.transpose(0, 1) for x in (states, actions, log_probs, values, advantages, returns))\n"
     "            batch = (first_hidden, starts, *batch)\n"),
    ("        while np.isnan(playing).any():\n"
     "            obs, *_ = envs.step(policy(torch.as_tensor(obs, device=device)))\n",
     "        hidden = torch.zeros(envs.num_envs, args.hidden_sizes[0], device=device)\n"
     "        while np.isnan(playing).any():\n"
     "            actions, hidden = policy(torch.as_tensor(obs, device=device), hidden)\n"
     "            obs, *_ = envs.step(actions)\n"),
    ("{0: torch.export.Dim(\"batch\")},)", "*[{0: torch.export.Dim(\"batch\")}] * 2,)"),
    ("torch.export.export(policy, (example,), ",
     "torch.export.export(policy, (example, torch.zeros(2, policy.memory.hidden_size)), "),
)  # fmt: skip


class Recall(gym.Env):
    """A bit is shown in the first of four steps; in the last the action has to be that bit, for a reward of 1."""

    observation_space, action_space = Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(2)

    def observe(self):
        return np.array([self.bit * 2 - 1 if self.t == 0 else 0, self.t == 3], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.bit = 0, int(self.np_random.integers(2))
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), float(self.t == 4 and action == self.bit), self.t == 4, False, {}


gym.register("RecallBit-v0", Recall, max_episode_steps=10)


def test_a_recurrent_policy(tmp_path):
    """A GRU, carried, reset at episode ends, replayed in learning, carried in evaluation and export; it remembers."""
    changed = sum(len([x for x in new.split("\n") if x and x not in old.split("\n")]) for old, new in RECURRENT)
    assert changed <= 40, f"{changed} lines"
    module = fork(tmp_path, "ppo", *RECURRENT)
    first, loss = [], module.ppo_loss

    def recording_loss(agent, batch, clip, args):
        result = loss(agent, batch, clip, args)
        first.append(result[1]["approx_kl"].item())
        return result

    flags = f"{SIZES} --env-id RecallBit-v0 --num-envs 8 --num-steps 30 --num-minibatches 2 --learning-rate 5e-3"
    flags += " --total-timesteps 14400 --eval-episodes 20 --gae-lambda 1 --ent-coef 0.003"
    with patch.object(module, "ppo_loss", recording_loss):
        seen = train(module, flags)
    assert max(abs(x) for x in first[::8]) < 1e-5, "the policy that acted is not the one that learns"
    assert seen.result["returns"].mean() == 1, "it does not remember"
    policy = torch.export.load(seen.result["run_dir"] / "policy.pt2").module()
    env, returns = gym.make("RecallBit-v0"), []
    for seed in range(10):
        (obs, _), hidden, end = env.reset(seed=seed), torch.zeros(1, 16), False
        while not end:
            actions, hidden = policy(torch.as_tensor(obs[None]), hidden)
            obs, reward, end, _, _ = env.step(actions[0].numpy())
        returns.append(reward)
    assert returns == [1] * 10


def test_an_lstm_merely_put_into_the_network_fails_at_once(tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        train(fork(tmp_path, "ppo", ("nn.Tanh()]", "nn.LSTM(outputs, outputs), nn.Tanh()]")))


def leaves(tree, path=()):
    """(path, value) of everything in a state."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def assert_resumes(module: types.ModuleType, seen: types.SimpleNamespace, *names: str) -> None:
    """Every number of what a checkpoint holds under these names is there when the run is resumed."""
    checkpoint = torch.load(seen.result["run_dir"] / "checkpoint.pt", weights_only=True)
    again = train(module, f"--resume {seen.result['run_dir']} --total-timesteps 120")
    for name in names:
        saved, loaded = dict(leaves(checkpoint[name])), dict(leaves(again.loaded[name]))
        assert saved.keys() == loaded.keys() and len(saved) > 0
        for path, x in saved.items():
            same = x.equal(loaded[path]) if isinstance(x, torch.Tensor) else x == loaded[path]
            assert same, (name, path)


PRIORITISED = (
    ("dtype=x, device=device) for shape, x in layout))\n",
     "dtype=x, device=device) for shape, x in layout))\n"
     "        self.priorities = torch.zeros(self.capacity, device=device)\n"),
    ("        self.position = (self.position + self.num_envs) % self.capacity\n",
     "        self.priorities[rows] = self.priorities.max().clamp(min=1.0)\n"
     "        self.position = (self.position + self.num_envs) % self.capacity\n"),
    ("return torch.randint(self.size, (batch_size,), device=self.data.rewards.device)",
     "return self.priorities[: self.size].pow(0.6).multinomial(batch_size, replacement=True)"),
    ("return state | {\"position\": self.position}",
     "return state | {\"position\": self.position, \"priorities\": self.priorities[: self.size].clone()}"),
    ("        self.position, self.size = state[\"position\"], len(state[\"rewards\"])\n",
     "        self.position, self.size = state[\"position\"], len(state[\"rewards\"])\n"
     "        self.priorities[: self.size] = state[\"priorities\"]\n"),
    ("discounts: Tensor | float, args: Args) -> dict[str, Tensor]:",
     "discounts: Tensor | float, args: Args, weights) -> dict[str, Tensor]:"),
    ("F.smooth_l1_loss(q_values, targets) if args.loss == \"huber\" else 0.5 * F.mse_loss(q_values, targets)",
     "(weights * F.smooth_l1_loss(q_values, targets, reduction=\"none\")).mean()"),
    ("    return {\"td_loss\": loss.detach(),",
     "    return {\"td_errors\": (q_values - targets).detach().abs(), \"td_loss\": loss.detach(),"),
    ("                metrics.append(gradient_of(network, target, batch, discounts, args))\n"
     "                optimizer.step()\n",
     "                weights = buffer.priorities[rows].pow(-0.6 * 0.4)\n"
     "                metrics.append(gradient_of(network, target, batch, discounts, args, weights / weights.max()))\n"
     "                optimizer.step()\n"
     "                buffer.priorities[rows] = metrics[-1][\"td_errors\"] + 1e-6\n"),
)  # fmt: skip


def test_prioritised_replay_resumed(tmp_path):
    """Its priorities are drawn by, learned, saved and restored."""
    module = fork(tmp_path, "dqn", *PRIORITISED)
    seen = assert_learns_as_pytorch(module)
    buffer = seen.modules["buffer"]
    assert len(buffer.priorities[: buffer.size].unique()) > 10, "no priority was learned"
    buffer.priorities[: buffer.size] = 0
    buffer.priorities[3], buffer.priorities[7] = 1, 3
    counts = buffer.draw_rows(100_000).bincount(minlength=8)
    assert counts[7] / counts[3] == pytest.approx(3**0.6, rel=0.05) and counts.sum() == counts[3] + counts[7]
    assert_resumes(module, train(module), "buffer", "network", "target", "optimizer")


THIRD = (
    ("        run.start(envs, agent=agent, target=target, buffer=buffer, **optimizers)",
     "        model = relu_mlp([agent.actor[0].in_features + agent.action_size, 16, agent.actor[0].in_features])\n"
     "        model_optimizer = torch.optim.Adam(model.to(run.device).parameters(), 1e-3)\n"
     "        optimizers |= dict(model=model, model_optimizer=model_optimizer)\n"
     "        run.start(envs, agent=agent, target=target, buffer=buffer, **optimizers)"),
    ("                metrics.append(critic_metrics)\n",
     "                metrics.append(critic_metrics)\n"
     "                predicted = model(torch.cat([batch.observations, batch.actions], -1))\n"
     "                model_optimizer.zero_grad()\n"
     "                model_loss = F.mse_loss(predicted, batch.next_observations)\n"
     "                model_loss.backward()\n"
     "                model_optimizer.step()\n"
     "                metrics.append({\"model_loss\": model_loss.detach()})\n"),
)  # fmt: skip


def test_a_third_network_with_its_optimiser_resumed(tmp_path):
    module = fork(tmp_path, "td3", *THIRD)
    seen = assert_learns_as_pytorch(module)
    losses = [row["model_loss"] for row in seen.metrics if "model_loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert_resumes(module, seen, "model", "model_optimizer", "agent", "target", "critic_optimizer", "actor_optimizer")


# Settings ---------------------------------------------------------------------------------------------------


def test_a_default_that_the_recommended_settings_override_is_shown(tmp_path, capsys):
    """γ in Args has no effect on CartPole: the line says so. A flag that wins is named, too."""
    module = fork(tmp_path, "ppo", ("gamma: Fraction = 0.99 ", "gamma: Fraction = 0.5 "))
    flags = f"{SIZES} --num-envs 2 --num-steps 8 --total-timesteps 16 --env-id CartPole-v1 --gae-lambda 0.7"
    train(module, flags)
    (line,) = re.findall("^recommended .*$", capsys.readouterr().out, re.MULTILINE)
    assert " gamma=0.98 " in line and "gae_lambda=0.7 (not 0.8)" in line
