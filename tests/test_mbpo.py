"""The maths of algos/mbpo.py against definitions, environments and algos/sac.py (which is held against SB3)."""

import copy

import gymnasium as gym
import mbpo
import numpy as np
import pytest
import sac
import torch
from gymnasium.spaces import Box
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_replay import CPU

SPACES = Box(-1, 1, (3,)), Box(-1, 1, (2,))


def make_model(members=7, num_elites=5, hidden_sizes=(16, 16), termination=mbpo.TERMINATION["Pendulum-v1"], seed=0):
    torch.manual_seed(seed)
    return mbpo.DynamicsEnsemble(members, num_elites, 3, 2, hidden_sizes, termination)


def make_agent(seed=0, alpha=0.5):
    torch.manual_seed(seed)
    agent = mbpo.SoftActorCritics(*SPACES, (16, 16), 2, alpha)
    return agent, mbpo.Critics(2, 5, (16, 16)).requires_grad_(False)


def transitions(states, actions, rewards, next_states, terminated=None):
    no = torch.zeros(len(rewards), dtype=torch.bool)
    return mbpo.Transitions(states, actions, rewards, next_states, no if terminated is None else terminated, no)


def linear_system(count: int, noise: float, seed=0, scale=1.0):
    """s' = A s + B a + σ ε and r = c·s + 2 σ ε, with what a step does apart."""
    draw = torch.Generator().manual_seed(7)
    A, B, c = (torch.randn(*shape, generator=draw) for shape in ((3, 3), (2, 3), (3,)))
    draw = torch.Generator().manual_seed(seed)
    states, actions = scale * torch.randn(count, 3, generator=draw), torch.rand(count, 2, generator=draw) * 2 - 1
    means = states @ (0.3 * A) + actions @ B, states @ c
    next_states = means[0] + noise * torch.randn(count, 3, generator=draw)
    rewards = means[1] + 2 * noise * torch.randn(count, generator=draw)
    return transitions(states, actions, rewards, next_states), means


def learn(model, data, **flags):
    """A training by Adam; returns what it logs, as numbers."""
    args = mbpo.Args(ensemble_size=model.members, num_elites=len(model.elites), **flags)
    optimizer = torch.optim.Adam(model.parameters(), args.model_learning_rate)
    return {name: x.item() for name, x in mbpo.learn_model(model, optimizer, data, args).items()}


def inputs_and_outputs(model, data):
    """(s, a), and the standardised change and reward."""
    outputs = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], -1)
    return torch.cat(data[:2], -1), (outputs - model.output_mean) / model.output_std


def gradients_of(*modules):
    return {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}


# The ensemble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [None, torch.tensor([4, 1])], ids=["all", "two"])
def test_the_ensemble_is_separate_networks_side_by_side(members):
    """Forward and gradient, of seven networks of torch's own layers with the same weights."""
    model, inputs = make_model(), torch.randn(7 if members is None else 2, 12, 5)
    model.input_mean.normal_(), model.input_std.uniform_(0.5, 2)
    mean, log_variance, logits = model(inputs, members)
    assert logits.numel() == 0
    weights = torch.randn_like(mean)
    ((mean * weights).sum() + (log_variance * weights**2).sum()).backward()
    low, high = model.log_variance_bounds.detach()
    for row, i in enumerate(range(7) if members is None else members.tolist()):
        layers = []
        for layer in model.network[::2]:
            layers += [torch.nn.Linear(*layer.weight.shape[1:]), torch.nn.SiLU()]
            layers[-2].weight.data, layers[-2].bias.data = layer.weight[i].T.clone(), layer.bias[i, 0].clone()
        outputs = torch.nn.Sequential(*layers[:-1])((inputs[row] - model.input_mean) / model.input_std)
        raw = high - torch.nn.functional.softplus(high - outputs[:, 4:])
        bounded = low + torch.nn.functional.softplus(raw - low)
        torch.testing.assert_close(mean[row], outputs[:, :4])
        torch.testing.assert_close(log_variance[row], bounded)
        ((outputs[:, :4] * weights[row]).sum() + (bounded * weights[row] ** 2).sum()).backward()
        for layer, linear in zip(model.network[::2], layers[::2]):
            torch.testing.assert_close(layer.weight.grad[i], linear.weight.grad.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.bias.grad[i, 0], linear.bias.grad, rtol=1e-4, atol=1e-5)
    others = set(range(7)) - set(range(7) if members is None else members.tolist())
    assert all(not layer.weight.grad[i].any() for layer in model.network[::2] for i in others)


@pytest.mark.parametrize("termination", [mbpo.TERMINATION["Pendulum-v1"], None], ids=["known", "learned"])
def test_errors_and_gradient_against_their_definition(termination):
    model = make_model(termination=termination)
    inputs, outputs, terminated = torch.randn(7, 12, 5), torch.randn(7, 12, 4), (torch.rand(7, 12) < 0.3).float()
    args = mbpo.Args(model_weight_decay=0.02)
    logged = mbpo.model_gradient(model, inputs, outputs, terminated, args)["model_loss"]
    got = gradients_of(model)
    model.zero_grad()
    mean, log_variance, logits = model(inputs)
    nll, error = torch.zeros(7), torch.zeros(7)
    for i in range(7):
        for j in range(12):
            gaussian = torch.distributions.Normal(mean[i, j], (0.5 * log_variance[i, j]).exp())
            surprise = torch.zeros(())
            if termination is None:
                surprise = -torch.distributions.Bernoulli(logits=logits[i, j, 0]).log_prob(terminated[i, j])
            nll[i] += (surprise - gaussian.log_prob(outputs[i, j]).sum()) / 12
            error[i] += (surprise + (mean[i, j] - outputs[i, j]).square().mean()) / 12
    for ours, expected in zip(mbpo.model_errors(model, inputs, outputs, terminated), (nll, error)):
        torch.testing.assert_close(ours, expected)
    low, high = model.log_variance_bounds
    loss = nll.sum() + 0.01 * (high - low).sum() + 0.01 * sum((x.weight**2).sum() for x in model.network[::2])
    loss.backward()
    torch.testing.assert_close(logged, loss.detach())
    torch.testing.assert_close(got, gradients_of(model), rtol=1e-4, atol=1e-5)
    assert got.keys() == dict(model.named_parameters()).keys()
    assert not torch.equal(low, high) and (log_variance > low).all() and (log_variance < high).all()


def test_standardised_inputs_and_outputs_have_mean_0_and_deviation_1():
    data, _ = linear_system(1000, 0.1, scale=5.0)
    data.observations[:, 1] = 3.0  # a constant stays finite
    model, seen = make_model(), []
    model.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    learn(model, data, model_epochs=1)
    seen.clear()
    model(inputs_and_outputs(model, data)[0])
    for x in (seen[0][:, [0, 2, 3, 4]], inputs_and_outputs(model, data)[1]):
        torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert (seen[0][:, 1].abs() < 1e-3).all()


@pytest.mark.parametrize("layer", [torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.LayerNorm(16, bias=False)])
def test_what_is_put_into_the_network_keeps_members_apart_or_is_refused(layer):
    """Activations and dropout, which rests while the model imagines; a norm's weights would be one for all members."""
    model, (data, _) = make_model(), linear_system(100, 0.1)
    plain, before = copy.deepcopy(model.network), model.network[0].weight.detach().clone()
    model.network[1] = layer
    if isinstance(layer, torch.nn.LayerNorm):
        with pytest.raises(TypeError, match=r"share \['1.weight'\]; each needs its own"):
            learn(model, data, patience=1)
        return
    modes, inputs = [], torch.randn(7, 5, 5)
    model.network[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    learn(model, data, patience=2, model_batch_size=8, model_learning_rate=0.01)
    assert True in modes and not model.training and not torch.equal(model.network[0].weight, before)
    plain.load_state_dict(model.network.state_dict())
    plain[1] = layer if isinstance(layer, torch.nn.GELU) else torch.nn.Identity()
    expected = plain((inputs - model.input_mean) / model.input_std)
    torch.testing.assert_close(model(inputs)[0], expected[..., :4])
    torch.testing.assert_close(model(inputs[[3, 5]], torch.tensor([3, 5]))[0], expected[[3, 5], :, :4])


def test_recovers_a_linear_gaussian_system_and_disagrees_off_its_data():
    data, _ = linear_system(4000, noise=0.2)
    model = make_model(hidden_sizes=(32, 32))
    metrics = learn(model, data)
    fresh, (next_means, reward_means) = linear_system(1000, noise=0.2, seed=1)
    mean, log_variance, _ = model(torch.cat(fresh[:2], -1).unsqueeze(0), model.elites)
    change = mean * model.output_std + model.output_mean
    sigma = (0.5 * log_variance).exp() * model.output_std
    assert (change[..., :3] - (next_means - fresh.observations)).square().mean().sqrt() < 0.08
    assert (change[..., 3] - reward_means).square().mean().sqrt() < 0.16
    torch.testing.assert_close(sigma.mean((0, 1)), torch.tensor([0.2, 0.2, 0.2, 0.4]), rtol=0.15, atol=0)
    # The held-out negative log-likelihood, in standardised units: no better than the truth's, and not far from it.
    entropy = (torch.tensor([0.2, 0.2, 0.2, 0.4]) / model.output_std).log().sum() + 2 * np.log(2 * np.pi * np.e)
    assert entropy - 0.1 < metrics["model_nll"] < entropy + 0.5
    far, _, _ = model(torch.cat([fresh.observations + 8, fresh.actions], -1).unsqueeze(0), model.elites)
    assert far.std(0).mean() > 5 * mean.std(0).mean()


def test_the_elites_are_the_members_that_predict_held_out_data_best():
    data, _ = linear_system(2000, noise=0.1)
    model = make_model()
    learn(model, data)
    with torch.no_grad():  # members 2 and 6 are spoilt, and a training too slow to mend them
        for i in (2, 6):
            model.network[-1].weight[i] += 1
    learn(model, data, model_learning_rate=1e-9, patience=1)
    assert not {2, 6} & set(model.elites.tolist()) and len(set(model.elites.tolist())) == 5
    fresh, _ = linear_system(2000, noise=0.1, seed=1)
    inputs, outputs = inputs_and_outputs(model, fresh)
    errors = (model(inputs.unsqueeze(0))[0] - outputs).square().mean((1, 2))
    assert errors[model.elites].max() < errors[[2, 6]].min()


def test_a_training_keeps_the_weights_that_were_best():
    """Steps that spoil the weights: in the end they are what they were, and the training has ended by patience."""
    data, _ = linear_system(500, noise=0.1)
    model = make_model()
    learn(model, data)
    before, steps = copy.deepcopy(model.state_dict()), []

    def uphill(*inputs):
        assert all(parameter.grad is None for parameter in model.parameters())
        steps.append(inputs)
        metrics = mbpo.model_gradient(*inputs)
        for parameter in model.parameters():
            parameter.grad.neg_()
        return metrics

    args = mbpo.Args(patience=3, model_batch_size=100)
    metrics = mbpo.learn_model(model, torch.optim.Adam(model.parameters(), 1e-2), data, args, uphill)
    assert len(steps) == 3 * 4 and metrics["model_epochs"] == 3  # 400 of the 500 rows, by 100
    for name, weights in model.network.state_dict().items():
        torch.testing.assert_close(weights, before[f"network.{name}"], rtol=0, atol=0)


def test_each_member_keeps_the_weights_with_which_it_was_best():
    """A gradient that spoils members 0 to 2 in the second epoch: of those alone the first epoch's weights stay."""
    data, _ = linear_system(500, noise=0.1)
    model, before = make_model(), []

    def gradient(*inputs):
        before.append({name: x.detach().clone() for name, x in model.network.named_parameters()})
        metrics = mbpo.model_gradient(*inputs)
        if len(before) > 20:
            for parameter in model.network.parameters():
                parameter.grad[:3].neg_()
        return metrics

    args = mbpo.Args(model_epochs=2, model_batch_size=20)  # 400 of the 500 rows: 20 steps an epoch
    mbpo.learn_model(model, torch.optim.SGD(model.parameters(), 0.02), data, args, gradient)
    assert len(before) == 40
    for name, x in model.network.named_parameters():
        torch.testing.assert_close(x[:3], before[20][name][:3], rtol=0, atol=0)
        assert not any(torch.equal(one, two) for one, two in zip(x[3:], before[20][name][3:]))


def test_every_member_learns_from_its_own_bootstrap_of_what_is_not_held_out():
    data, _ = linear_system(400, noise=0.1)
    data.rewards.copy_(torch.arange(400))
    model, seen = make_model(), []

    def gradient(model, inputs, outputs, *others):
        seen.append((outputs[..., 3] * model.output_std[3] + model.output_mean[3]).round().long())
        return mbpo.model_gradient(model, inputs, outputs, *others)

    optimizer = torch.optim.Adam(model.parameters(), 1e-9)
    mbpo.learn_model(model, optimizer, data, mbpo.Args(patience=2, holdout=0.25), gradient)
    epochs = torch.cat(seen, 1).split(300, 1)
    assert len(epochs) == 2 and torch.equal(epochs[0].sort(1).values, epochs[1].sort(1).values)
    assert not torch.equal(epochs[0], epochs[1]), "shuffled"
    members = [set(rows.tolist()) for rows in epochs[0]]
    assert all(150 < len(rows) < 225 for rows in members), "drawn with replacement: 1 − 1/e of 300"
    assert members[0] != members[1] and len(set.union(*members)) <= 300


# Steps in the model -----------------------------------------------------------------------------------------


def constant_members(model, members):
    """Each member predicts its own index as the change of every coordinate and as the reward."""
    with torch.no_grad():
        for layer in model.network[::2]:
            layer.weight.zero_(), layer.bias.zero_()
        model.network[-1].bias[:, :, :4] = torch.arange(members).float()[:, None, None]
        model.network[-1].bias[:, :, 4:8] = -50.0


def test_every_row_is_imagined_by_an_elite_drawn_for_it():
    model = make_model()
    constant_members(model, 7)
    model.elites.copy_(torch.tensor([0, 2, 3, 5, 6]))
    states, counts = torch.zeros(1003, 3), torch.zeros(7, 1003)
    for _ in range(200):
        next_states, rewards, terminated = model.step(states, torch.zeros(1003, 2))
        assert (next_states - rewards[:, None]).abs().max() < 0.1 and not terminated.any()
        members = rewards.round().long()
        assert set(members.tolist()) <= {0, 2, 3, 5, 6} and (rewards - members).abs().max() < 0.1
        assert np.ptp(torch.bincount(members, minlength=7)[model.elites].numpy()) <= 2
        counts[members, torch.arange(1003)] += 1
    assert (counts[model.elites].mean(1) - 40).abs().max() < 1
    assert counts[model.elites].std(1).mean() == pytest.approx((200 * 0.2 * 0.8) ** 0.5, rel=0.1), "anew for each row"
    assert len(model.step(states[:2], torch.zeros(2, 2))[1]) == 2, "fewer rows than elites"


def test_a_step_of_the_model_draws_from_its_gaussian():
    """Of one member, so that mean and deviation are known; rows stay where they are."""
    model = make_model(members=1, num_elites=1)
    data, _ = linear_system(500, 0.5, scale=3.0)
    learn(model, data, model_epochs=1)
    states, actions = (x[:4].repeat(50_000, 1) for x in data[:2])
    next_states, rewards, _ = model.step(states, actions)
    mean, log_variance, _ = model(torch.cat(data[:2], -1)[:4].unsqueeze(0))
    mean = mean[0] * model.output_std + model.output_mean
    sigma = (0.5 * log_variance[0]).exp() * model.output_std
    drawn = torch.cat([next_states - states, rewards[:, None]], -1).unflatten(0, (-1, 4))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0.01)
    torch.testing.assert_close(drawn.std(0), sigma, atol=0, rtol=0.02)


def test_a_learned_termination_is_what_the_logit_says():
    data, _ = linear_system(3000, noise=0.05)
    data = data._replace(terminated=data.next_observations[:, 0] > 1)
    model = make_model(termination=None, hidden_sizes=(64, 64))
    learn(model, data)
    fresh, _ = linear_system(3000, noise=0.05, seed=1)
    next_states, _, terminated = model.step(*fresh[:2])
    assert 0.05 < terminated.float().mean() < 0.5
    assert (terminated == (next_states[:, 0] > 1)).float().mean() > 0.9


class Chain:
    """A model for tests: every step adds the action to the state, pays the state's sum, and ends above 2."""

    def step(self, states, actions):
        next_states = states + actions.sum(-1, keepdim=True)
        return next_states, states.sum(-1), next_states[:, 0] > 2


def test_rollouts_go_no_further_than_a_termination():
    agent, _ = make_agent()
    torch.manual_seed(1)
    steps = list(mbpo.branched_rollouts(Chain(), agent, torch.randn(500, 3) + 0.5, 6))
    assert len(steps) == 6 and any(step.terminated.any() for step in steps[:-1])
    for now, then in zip(steps, steps[1:]):
        assert torch.equal(then.observations, now.next_observations[~now.terminated])
    assert (steps[-1].observations[:, 0] <= 2).all() and not any(step.truncated.any() for step in steps)
    ended = list(mbpo.branched_rollouts(Chain(), agent, torch.full((3, 3), 50.0), 6))
    assert len(ended) == 1 and ended[0].terminated.all()


def test_rollouts_in_the_true_dynamics_are_the_environments(monkeypatch):
    """The environment's own step in the model's place: what is imagined is what happens, to the last step."""
    env = gym.make("Pendulum-v1")

    class TrueDynamics:
        def step(self, states, actions):
            outcomes = []
            for state, action in zip(states.double().numpy(), agent.to_env(actions).numpy()):
                env.reset()
                env.unwrapped.state = np.array([np.arctan2(state[1], state[0]), state[2]])
                outcomes.append(env.step(action)[:2])
            next_states, rewards = zip(*outcomes)
            return torch.tensor(np.array(next_states)), torch.tensor(rewards).float(), torch.zeros(len(states)) > 0

    torch.manual_seed(0)
    agent = mbpo.SoftActorCritics(env.observation_space, env.action_space, (16, 16), 2)
    real = gym.make("Pendulum-v1")
    start, _ = real.reset(seed=3)
    for step in mbpo.branched_rollouts(TrueDynamics(), agent, torch.tensor(start)[None], 15):
        obs, reward, *_ = real.step(agent.to_env(step.actions)[0].numpy())
        np.testing.assert_allclose(step.next_observations[0], obs, atol=1e-4)
        assert step.rewards.item() == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize("env_id", sorted(set(mbpo.TERMINATION) - {"Pendulum-v1"}))
def test_terminations_are_the_environments(env_id):
    """On 10 000 real transitions of random actions, of all sizes, so that bodies fall in many ways."""
    env = gym.make(env_id)
    rng, states, flags = np.random.default_rng(0), [], []
    env.reset(seed=0)
    env.action_space.seed(0)
    while len(states) < 10_000:
        scale, action = rng.random(), env.action_space.sample()
        for _ in range(rng.integers(1, 20)):
            obs, _, terminated, truncated, _ = env.step(scale * action)
            states.append(obs)
            flags.append(terminated)
            if terminated or truncated:
                env.reset()
                break
    predicted = mbpo.TERMINATION[env_id](torch.tensor(np.array(states), dtype=torch.float32)).numpy()
    assert predicted.tolist() == flags
    assert any(flags) == (env_id not in mbpo.ENDLESS)


def test_not_finite_states_are_terminal_where_the_environment_says_so():
    for env_id, size in (("InvertedPendulum-v5", 4), ("Ant-v5", 105)):
        states = torch.zeros(3, size)
        states[:, 0 if env_id == "Ant-v5" else 1] = 0.2 if env_id == "Ant-v5" else -0.2  # the bound itself is healthy
        states[1, 3], states[2, 2] = np.nan, np.inf
        assert mbpo.TERMINATION[env_id](states).tolist() == [False, True, True]


# Buffers ----------------------------------------------------------------------------------------------------


def rows_of(values):
    x = torch.tensor(values).float()
    return transitions(x[:, None].repeat(1, 3), x[:, None].repeat(1, 2), x, x[:, None].repeat(1, 3), x > 5)


def test_the_model_buffer_keeps_the_newest_of_any_number():
    buffer = mbpo.ModelBuffer(20, 1, *SPACES, CPU)
    buffer.capacity = 10
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        buffer.add(*rows_of(range(start, stop)))
    assert buffer.size == 10 and sorted(buffer.data.rewards[:10].tolist()) == list(range(2, 12))
    buffer.capacity = 12
    buffer.add(*rows_of(range(12, 15)))
    assert buffer.size == 10 and buffer.position == 5  # the ring goes on where it was
    state = buffer.state_dict()
    other = mbpo.ModelBuffer(20, 1, *SPACES, CPU)
    other.load_state_dict(state)
    assert (other.size, other.position) == (10, 5)
    for one, two in zip(buffer.data, other.data):
        assert torch.equal(one[:10], two[:10])
    buffer.add(*rows_of(range(100, 200)))
    assert sorted(buffer.data.rewards[: buffer.size].tolist()) == list(range(188, 200)), "more than fit"
    buffer.capacity = 6
    buffer.add(*rows_of(range(3)))
    assert buffer.size == 6 and sorted(buffer.data.rewards[:6].tolist())[:3] == [0, 1, 2]
    full = mbpo.ModelBuffer(20, 1, *SPACES, CPU)
    full.capacity = 10
    full.add(*rows_of(range(10)))
    other.load_state_dict(full.state_dict())
    assert other.state_dict()["position"] == 0 and len(other.state_dict()["rewards"]) == 10, "saved as soon as loaded"


def test_diagnostics_are_of_the_newest_rows():
    """Two elites that are 0.1 beside the truth on average, 0.2 apart in the change and the reward."""
    buffer = mbpo.ReplayBuffer(50, 2, *SPACES, CPU)
    for _ in range(30):  # the ring wraps
        states, actions = torch.randn(2, 3), torch.rand(2, 2)
        no = torch.zeros(2, dtype=torch.bool)
        buffer.add(states, actions, 3 + actions.sum(-1), states + actions.sum(-1, keepdim=True), no, no)

    class Model:
        elites, output_mean, output_std = torch.tensor([4, 1]), torch.tensor([0.0, 0, 0, 3]), torch.full((4,), 2.0)

        def __call__(self, inputs, members):
            assert members is self.elites and inputs.shape[::2] == (1, 5)
            means = inputs[..., 3:].sum(-1, keepdim=True) / 2
            return means + torch.tensor([0.0, 0.2])[:, None, None] + torch.zeros(4), None, None

    charts = mbpo.model_diagnostics(Model(), buffer, 20)
    assert charts == {"unseen_error": pytest.approx(0.1), "disagreement": pytest.approx(0.2 / 2**0.5)}
    buffer.data.actions[:10] += 100  # the ring's end is after row 9, so these are the 10 newest
    buffer.data.next_observations[:10] += 200
    buffer.data.rewards[:10] += 200
    buffer.data.rewards[40:] += 40  # and these the 10 before
    assert mbpo.model_diagnostics(Model(), buffer, 10)["unseen_error"] == pytest.approx(0.1, rel=1e-3)
    assert mbpo.model_diagnostics(Model(), buffer, 11)["unseen_error"] > 1


# The policy -------------------------------------------------------------------------------------------------


def train(module, flags: str) -> dict:
    result = module.train(module.parse_args(flags.split()))
    return torch.load(result["run_dir"] / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_with_real_data_alone_it_is_sac(env_id, monkeypatch):
    """Whole runs: policy, critics, targets, temperature and Adam's moments, bit for bit after 400 gradient steps."""

    def drawing_no_numbers(*args, make=mbpo.DynamicsEnsemble):
        with torch.random.fork_rng():
            return make(*args)

    monkeypatch.setattr(mbpo, "DynamicsEnsemble", drawing_no_numbers)
    flags = f"--env-id {env_id} --total-timesteps 300 --learning-starts 100 --gradient-steps 2 --batch-size 32"
    flags += " --hidden-sizes 16 16 --learning-rate 1e-3 --gamma 0.95 --tau 0.01 --eval-episodes 1"
    real, model_free = train(mbpo, flags + " --real-ratio 1"), train(sac, flags)
    for name in ("agent", "target"):
        for one, two in zip(real[name].values(), model_free[name].values(), strict=True):
            assert torch.equal(one, two)
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        for one, two in zip(real[name]["state"][0].values(), model_free[name]["state"][0].values(), strict=True):
            assert torch.equal(one, two)
    assert real["updates"] == model_free["updates"] == 400 and real["model"]["learned_at"] == 0


@pytest.mark.parametrize("members", [None, torch.tensor([1])], ids=["all", "one"])
def test_value_expansion_of_no_step_is_sacs_gradient(members):
    agent, target = make_agent()
    batch = transitions(*(x for x in linear_system(32, 0.1)[0][:4]), terminated=torch.rand(32) < 0.3)
    noise, args = torch.randn(1, 32, 2), mbpo.Args(gamma=0.9)
    expanded = mbpo.value_expansion_gradient(Chain(), agent, target, batch, noise, members, args)
    gradients = gradients_of(agent)
    agent.zero_grad()
    plain = sac.sac_critic_gradient(agent, target, batch, noise[0], members, args)
    torch.testing.assert_close(expanded, plain)
    torch.testing.assert_close(gradients, gradients_of(agent), rtol=1e-4, atol=1e-6)
    assert gradients.keys() == {name for name, _ in agent.named_parameters() if name.startswith("critics")}


def test_value_expansion_against_its_definition():
    """Row by row and step by step, in an environment that ends; critics alone get gradients."""
    agent, target = make_agent(alpha=0.3)

    @torch.no_grad()
    def sample(state, noise):
        return mbpo.squashed_gaussian(*agent.policy(state), noise)

    torch.manual_seed(2)
    batch = transitions(
        torch.randn(40, 3), torch.rand(40, 2), torch.randn(40), torch.randn(40, 3) + 1, torch.rand(40) < 0.2
    )
    noise, args = torch.randn(4, 40, 2), mbpo.Args(gamma=0.9)
    metrics = mbpo.value_expansion_gradient(Chain(), agent, target, batch, noise, None, args)
    got = gradients_of(agent)
    agent.zero_grad()
    total, count, lengths = 0.0, 0, []
    for i in range(40):
        pairs = [(batch.observations[i], batch.actions[i], batch.rewards[i], 0.0)]
        state, ended = batch.next_observations[i], bool(batch.terminated[i])
        for t in range(3):
            if ended:
                break
            action, log_prob = sample(state, noise[t, i])
            next_state, reward, terminated = Chain().step(state[None], action[None])
            pairs.append((state, action, reward[0], log_prob))
            state, ended = next_state[0], bool(terminated)
        value = 0.0
        if not ended:
            action, log_prob = sample(state, noise[3, i])
            value = target(state[None], action[None]).min() - 0.3 * log_prob
        for state, action, reward, log_prob in reversed(pairs):
            y = (reward + 0.9 * value).item()
            q_values = agent.critics(state[None], action[None]).flatten()
            total = total + (0.5 * (q_values - y).square()).sum()
            value = y - 0.3 * log_prob
        count += len(pairs)
        lengths.append(len(pairs))
    assert set(lengths) == {1, 2, 3, 4}
    (total / count).backward()
    assert metrics["critic_loss"].item() == pytest.approx((total / count).item(), rel=1e-4)
    torch.testing.assert_close(metrics["q_values"], agent.critics(batch.observations, batch.actions).mean().detach())
    torch.testing.assert_close(got, gradients_of(agent), rtol=1e-3, atol=1e-5)
    assert got.keys() == {name for name, _ in agent.named_parameters() if name.startswith("critics")}


# Training ---------------------------------------------------------------------------------------------------

TINY = "--total-timesteps 60 --learning-starts 20 --model-frequency 20 --gradient-steps 2 --batch-size 20"
TINY += " --hidden-sizes 8 --model-hidden-sizes 8 --ensemble-size 3 --num-elites 2 --patience 1 --rollouts-per-step 4"
TINY += " --eval-episodes 1 --env-id Pendulum-v1"


@pytest.mark.parametrize("ratio, real", [(0.25, 5), (0.0, 0), (1.0, 20)])
def test_minibatches_are_mixed_in_the_ratio_asked_for(monkeypatch, ratio, real):
    batches, gradient = [], mbpo.sac_critic_gradient

    def spy(agent, target, batch, *others):
        batches.append(batch)
        return gradient(agent, target, batch, *others)

    monkeypatch.setattr(mbpo, "sac_critic_gradient", spy)
    state = train(mbpo, f"{TINY} --real-ratio {ratio}")
    assert len(batches) == 2 * 40
    lived = {tuple(x.tolist()) for x in state["buffer"]["next_observations"]}
    for batch in batches:
        found = [tuple(x.tolist()) in lived for x in batch.next_observations]
        assert sum(found) == real and all(found[:real])


def test_the_model_is_trained_at_its_frequency_and_its_rollouts_are_kept_for_their_age(monkeypatch):
    calls, learn_model, rollouts = [], mbpo.learn_model, mbpo.branched_rollouts

    def spy(model, optimizer, data, *others):
        calls.append(len(data.rewards))
        return learn_model(model, optimizer, data, *others)

    begun = []
    monkeypatch.setattr(mbpo, "learn_model", spy)
    monkeypatch.setattr(
        mbpo, "branched_rollouts", lambda m, a, states, k: begun.append((len(states), k)) or rollouts(m, a, states, k)
    )
    state = train(mbpo, f"{TINY} --model-buffer-age 40 --rollout-lengths 1 4 20 60 --total-timesteps 80")
    assert calls == [20, 40, 60, 80] and begun == [(80, 1), (80, 2), (80, 4), (80, 4)], "linear, rounded down"
    assert len(state["imagined"]["rewards"]) == 4 * 40 * 4
    assert state["model"]["learned_at"] == 80


def test_value_expansion_trains_on_real_minibatches(monkeypatch):
    batches, gradient = [], mbpo.value_expansion_gradient

    def spy(model, agent, target, batch, noise, *others):
        batches.append((batch, noise))
        return gradient(model, agent, target, batch, noise, *others)

    monkeypatch.setattr(mbpo, "value_expansion_gradient", spy)
    state = train(mbpo, f"{TINY} --value-expansion 3")
    assert len(batches) == 80 and len(state["imagined"]["rewards"]) == 0
    lived = {tuple(x.tolist()) for x in state["buffer"]["next_observations"]}
    for batch, noise in batches:
        assert noise.shape == (4, 20, 1) and all(tuple(x.tolist()) in lived for x in batch.next_observations)


@pytest.mark.parametrize("env_id", ["OneStateBox-v0", "OneStateTerminalBox-v0"])
def test_a_time_limit_is_not_a_termination_and_a_termination_is_one_in_imagined_steps_too(env_id, monkeypatch):
    """As in tests/test_learning.py, with what is true in the model's place and 1 real row in 16."""
    terminates = "Terminal" in env_id

    def step(model, states, actions):
        rewards = torch.ones(len(states))
        return torch.zeros_like(states), rewards, (torch.rand_like(rewards) < 0.1) & terminates

    monkeypatch.setattr(mbpo.DynamicsEnsemble, "step", step)
    monkeypatch.setattr(mbpo, "learn_model", lambda *_: {})
    flags = f"--env-id {env_id} --total-timesteps 2500 --learning-starts 100 --batch-size 16 --gradient-steps 1"
    flags += " --hidden-sizes 16 --learning-rate 0.01 --eval-episodes 1 --tau 0.5 --no-autotune --alpha 0.1"
    flags += " --rollouts-per-step 2 --rollout-lengths 1 5 0 1000"
    run_dir = mbpo.train(mbpo.parse_args(flags.split()))["run_dir"]
    soft = 0.1 * np.log(2)
    expected = 1 / (1 - 0.9 * 0.99) + soft * 0.9 * 0.99 / (1 - 0.9 * 0.99) if terminates else 100 + soft * 99
    q_values = EventAccumulator(str(run_dir)).Reload().Scalars("losses/q_values")[-1].value
    assert q_values == pytest.approx(expected, abs=1 if terminates else 5)
