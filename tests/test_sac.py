"""The maths of algos/sac.py against definitions and Stable-Baselines3."""

import copy

import numpy as np
import pytest
import sac
import torch
from gymnasium.spaces import Box
from parity import assert_parameters_agree, copy_critics, follow_replay, recorded_envs
from scipy.integrate import quad
from stable_baselines3 import SAC
from test_replay import CPU

SPACES = Box(-1, 1, (3,)), Box(-1, 1, (2,))


# The squashed Gaussian --------------------------------------------------------------------------------------


def log_prob_of(action: float, mean: float, log_std: float) -> float:
    """log π(a) by the function under test, from the noise that leads to `action`, in double precision."""
    noise = (np.arctanh(action) - mean) / np.exp(log_std)
    inputs = (torch.tensor([x], dtype=torch.float64) for x in (mean, log_std, noise))
    actions, log_prob = sac.squashed_gaussian(*inputs)
    assert actions.item() == pytest.approx(action, abs=1e-12)
    return log_prob.item()


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.7, -1.0), (-2.0, 0.5), (3.0, -2.0)])
def test_the_density_integrates_to_one_and_to_the_cumulative_distribution(mean, log_std):
    def density(action):
        return np.exp(log_prob_of(action, mean, log_std))

    middle = np.tanh(mean)
    below, above = quad(density, -1, middle, limit=200)[0], quad(density, middle, 1, limit=200)[0]
    assert below == pytest.approx(0.5, abs=1e-5) and above == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
def test_log_probability_against_a_change_of_variables_by_autograd(scale):
    """log π(a) = log N(u) − log |da/du|, with the slope from autograd, near ±1 too."""
    torch.manual_seed(0)
    mean, log_std, noise = (x.double() for x in (scale * torch.randn(200, 3), torch.randn(200, 3), torch.randn(200, 3)))
    actions, log_prob = sac.squashed_gaussian(mean, log_std, noise)
    u = (mean + log_std.exp() * noise).requires_grad_()
    (slope,) = torch.autograd.grad(u.tanh().sum(), u)
    keep = (slope > 1e-10).all(1)  # further out autograd's 1 − tanh² has no digits left
    expected = (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - slope.log()).sum(1)
    torch.testing.assert_close(log_prob[keep], expected[keep].detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(actions, u.tanh().detach())
    assert keep.sum() > 20 and (scale < 3 or (actions.abs() > 0.9999).any())


def test_log_probability_and_gradient_stay_exact_where_tanh_rounds_to_one():
    """At u = ±20 and ±80 single precision has tanh u = ±1; log(1 − tanh² u) is 2 log 2 − 2|u| there."""
    mean = torch.tensor([[20.0], [-20.0], [80.0], [-80.0]], requires_grad=True)
    actions, log_prob = sac.squashed_gaussian(mean, torch.zeros(4, 1), torch.zeros(4, 1))
    assert actions.abs().flatten().tolist() == [1.0] * 4
    expected = -0.5 * np.log(2 * np.pi) - (2 * np.log(2) - 2 * mean.abs().flatten())
    torch.testing.assert_close(log_prob, expected.float())
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([2.0, -2.0, 2.0, -2.0]))


def test_the_entropys_gradient_is_that_of_the_exact_entropy():
    """E[−log π] by reparameterisation, differentiated, against finite differences of the entropy by quadrature."""

    def entropy(mean, log_std):
        def integrand(noise):
            u = mean + np.exp(log_std) * noise
            log_slope = 2 * (np.log(2) - abs(u) - np.log1p(np.exp(-2 * abs(u))))
            gaussian = np.exp(-0.5 * noise**2) / np.sqrt(2 * np.pi)
            return gaussian * (0.5 * noise**2 + log_std + 0.5 * np.log(2 * np.pi) + log_slope)

        return quad(integrand, -12, 12, limit=200)[0]

    torch.manual_seed(0)
    mean, log_std = torch.tensor([0.8]).double().requires_grad_(), torch.tensor([-0.3]).double().requires_grad_()
    noise = torch.randn(1_000_000, 1).double()
    _, log_prob = sac.squashed_gaussian(mean.expand_as(noise), log_std.expand_as(noise), noise)
    assert -log_prob.mean().item() == pytest.approx(entropy(0.8, -0.3), abs=0.005)
    gradients = torch.autograd.grad(-log_prob.mean(), [mean, log_std])
    h = 1e-4
    exact = (
        (entropy(0.8 + h, -0.3) - entropy(0.8 - h, -0.3)) / (2 * h),
        (entropy(0.8, -0.3 + h) - entropy(0.8, -0.3 - h)) / (2 * h),
    )
    assert [g.item() for g in gradients] == pytest.approx(exact, abs=0.01)


# Losses -----------------------------------------------------------------------------------------------------


def make_agent(num_critics=2, seed=0, alpha=0.5):
    torch.manual_seed(seed)
    agent = sac.SoftActorCritics(*SPACES, (16, 16), num_critics, alpha)
    target = sac.CriticEnsemble(num_critics, 5, (16, 16)).requires_grad_(False)
    return agent, target


@pytest.fixture
def descent(monkeypatch):
    """Gradient descent instead of Adam, at the optimiser's learning rate: what moves shows the gradient."""

    def step(optimizer, gradient):
        group = optimizer.param_groups[0]
        group["params"][0].data.sub_(group["lr"] * gradient)

    monkeypatch.setattr(sac, "adam_step", step)


def make_batch(size=32):
    return sac.Transitions(
        observations=torch.randn(size, 3),
        actions=torch.rand(size, 2) * 2 - 1,
        rewards=torch.randn(size),
        next_observations=torch.randn(size, 3),
        terminated=torch.rand(size) < 0.3,
        truncated=torch.rand(size) < 0.3,
    )


@pytest.mark.parametrize("members", [None, torch.tensor([4, 1])], ids=["all", "two of five"])
def test_critic_loss_against_the_definition(members):
    agent, target = make_agent(num_critics=5)
    batch, noise = make_batch(), torch.randn(32, 2)
    loss, q_values = sac.sac_critic_loss(agent, target, batch, noise, members, sac.Args(gamma=0.9))
    total, values = 0.0, []
    for i in range(32):
        s, a, r, s_next, terminated, _ = (x[i : i + 1] for x in batch)
        a_next, log_prob = agent.sample(s_next, noise[i : i + 1])
        soft = min(target(s_next, a_next, members)).item() - 0.5 * log_prob.item()
        y = r.item() + (0 if terminated else 0.9 * soft)
        values += agent.critics(s, a).flatten().tolist()
        total += 0.5 * sum((q - y) ** 2 for q in values[-5:]) / 32
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert q_values.item() == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.parametrize("use_mean", [False, True])
def test_actor_loss_against_the_definition(use_mean):
    agent, _ = make_agent(num_critics=3)
    states, noise = torch.randn(32, 3), torch.randn(32, 2)
    loss, log_probs = sac.sac_actor_loss(agent, states, noise, torch.tensor(0.7), use_mean)
    total = 0.0
    for s, e, log_prob in zip(states, noise, log_probs):
        mean, log_std = agent.actor(s).chunk(2)
        u = mean + log_std.exp() * e
        q = agent.critics(s.unsqueeze(0), u.tanh().unsqueeze(0)).flatten()
        total += 0.7 * log_prob.item() - (q.mean() if use_mean else q.min()).item()
    assert loss.item() == pytest.approx(total / 32, rel=1e-4)


def test_temperature_goes_down_where_the_entropy_is_above_its_target():
    log_alpha = torch.tensor(0.3, requires_grad=True)
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)  # entropy 1.5
    for target_entropy, slope in ((1.0, 0.5), (2.5, -1.0)):
        loss = sac.temperature_loss(log_alpha, log_probs, target_entropy)
        (gradient,) = torch.autograd.grad(loss, log_alpha)
        assert gradient.item() == pytest.approx(slope)
    assert sac.temperature_loss(log_alpha, log_probs, 1.0).grad_fn is not None
    with pytest.raises(RuntimeError):  # the policy gets no gradient from it
        torch.autograd.grad(sac.temperature_loss(log_alpha, log_probs, 1.0), log_probs)


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize("target_entropy, expected", [(None, -2.0), (-0.7, -0.7)])
def test_the_target_entropy_is_minus_the_number_of_actions_or_as_asked_for(target_entropy, expected):
    agent, _ = make_agent()
    batch, noise = make_batch(), torch.randn(32, 2)
    actor_optimizer, alpha_optimizer = sac.vector_adam(agent.actor, 0.0), sac.vector_adam(agent.temperature, 1.0)
    _, log_probs = sac.sac_actor_loss(agent, batch.observations, noise, agent.alpha, use_mean=False)
    before = agent.temperature["log_alpha"].item()
    args = sac.Args(target_entropy=target_entropy)
    loss, entropy, alpha = sac.sac_actor_update(agent, actor_optimizer, alpha_optimizer, batch, noise, args)
    moved = agent.temperature["log_alpha"].item() - before
    assert moved == pytest.approx(log_probs.mean().item() + expected, abs=1e-5)
    assert (entropy.item(), alpha.item()) == (pytest.approx(-log_probs.mean().item()), pytest.approx(0.5))


@pytest.mark.parametrize("subset", [2, 5])
def test_the_policy_climbs_the_mean_of_critics_if_targets_draw_a_subset(subset):
    agent, _ = make_agent(num_critics=5)
    batch, noise = make_batch(), torch.randn(32, 2)
    optimizers = [sac.vector_adam(x, 1e-3) for x in (agent.actor, agent.temperature)]
    expected, _ = sac.sac_actor_loss(agent, batch.observations, noise, agent.alpha, use_mean=subset == 2)
    args = sac.Args(num_critics=5, critic_subset=subset)
    torch.testing.assert_close(sac.sac_actor_update(agent, *optimizers, batch, noise, args)[0], expected.detach())


def test_the_deviation_is_bounded():
    agent, _ = make_agent()
    torch.nn.init.zeros_(agent.actor[-1].weight)
    noise = torch.randn(10, 2)
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0), (-1.0, -1.0)):
        agent.actor[-1].bias.data = torch.tensor([0.3, -0.2, bias, bias])
        expected = sac.squashed_gaussian(torch.tensor([0.3, -0.2]), torch.full((2,), log_std), noise)
        torch.testing.assert_close(agent.sample(torch.randn(10, 3), noise), expected)


@pytest.mark.parametrize("autotune", [True, False])
def test_updates_move_what_they_should_and_nothing_else(autotune):
    agent, target = make_agent()
    batch, noise, args = make_batch(), torch.randn(32, 2), sac.Args(autotune=autotune)
    optimizers = {name: sac.vector_adam(getattr(agent, name), 1e-2) for name in ("actor", "critics", "temperature")}

    def moved(update):
        parts = {name: getattr(agent, name) for name in optimizers} | {"target": target}
        before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        update()
        return {n for n, part in parts.items() if any(not x.equal(before[n][k]) for k, x in part.state_dict().items())}

    critics = moved(lambda: sac.sac_critic_update(agent, target, optimizers["critics"], batch, noise, None, args))
    assert critics == {"critics", "target"}
    critics_state = copy.deepcopy(optimizers["critics"].state_dict()["state"][0])
    actor = moved(
        lambda: sac.sac_actor_update(agent, optimizers["actor"], optimizers["temperature"], batch, noise, args)
    )
    assert actor == {"actor"} | ({"temperature"} if autotune else set())
    torch.testing.assert_close(optimizers["critics"].state_dict()["state"][0], critics_state, rtol=0, atol=0)
    assert all(x.grad is None for x in [*agent.critics.parameters(), *target.parameters()])


@pytest.mark.usefixtures("descent")
def test_the_target_follows_by_tau():
    agent, target = make_agent()
    optimizer = sac.vector_adam(agent.critics, 0.1)
    old = [x.clone() for x in target.parameters()]
    noise = torch.randn(32, 2)
    sac.sac_critic_update(agent, target, optimizer, make_batch(), noise, None, sac.Args(tau=0.3))
    expected = [0.7 * a + 0.3 * b for a, b in zip(old, agent.critics.parameters())]
    torch.testing.assert_close(list(target.parameters()), [x.detach() for x in expected])


def test_redq_draws_other_critics_for_each_target(monkeypatch):
    drawn, update = [], sac.sac_critic_update

    def recorded(agent, target, optimizer, batch, noise, members, *rest):
        drawn.append(members)
        return update(agent, target, optimizer, batch, noise, members, *rest)

    monkeypatch.setattr(sac, "sac_critic_update", recorded)
    actor_updates, actor_update = [], sac.sac_actor_update
    monkeypatch.setattr(sac, "sac_actor_update", lambda *x: actor_updates.append(1) or actor_update(*x))
    flags = "--total-timesteps 30 --learning-starts 10 --num-critics 10 --critic-subset 2 --gradient-steps 20"
    flags += " --policy-delay 20 --hidden-sizes 8 --eval-episodes 1 --batch-size 8 --buffer-size 100"
    sac.train(sac.parse_args(flags.split()))
    assert len(drawn) == 20 * 20 and len(actor_updates) == 20
    assert all(len(set(members.tolist())) == 2 for members in drawn)
    counts = torch.cat(drawn).bincount(minlength=10)
    assert ((counts - 80).abs() < 5 * (400 * 0.2 * 0.8) ** 0.5).all()


# Stable-Baselines3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
def test_updates_agree_with_sb3(env_id, record_property):
    """SB3's own learn() and train(): same data, minibatches and noise; its 1e-6 in log(1 − tanh²) is taken out."""
    env = recorded_envs(env_id, 1)
    settings = dict(learning_rate=1e-3, batch_size=32, gamma=0.97, tau=0.05)
    options = dict(buffer_size=300, learning_starts=200, policy_kwargs=dict(net_arch=[16, 16]), seed=0, device="cpu")
    model = SAC("MlpPolicy", env, **settings, **options, ent_coef="auto_0.3")
    model.actor.action_dist.epsilon = 0.0
    args = sac.Args(alpha=0.3, **settings)
    agent = sac.SoftActorCritics(env.observation_space, env.action_space, (16, 16), 2, args.alpha)

    def copy_actor(theirs, ours):
        linears = [layer for layer in theirs.latent_pi if isinstance(layer, torch.nn.Linear)]
        for layer, linear in zip(ours[:-1:2], linears, strict=True):
            layer.load_state_dict(linear.state_dict())
        for name in ("weight", "bias"):
            heads = [getattr(head, name).data for head in (theirs.mu, theirs.log_std)]
            getattr(ours[-1], name).data.copy_(torch.cat(heads))
        return ours

    copy_actor(model.actor, agent.actor)
    copy_critics(model.critic, agent.critics)
    target, start = copy.deepcopy(agent.critics).requires_grad_(False), copy.deepcopy(agent)
    optimizers = [sac.vector_adam(x, 1e-3) for x in (agent.actor, agent.temperature)]
    critic_optimizer = sac.vector_adam(agent.critics, 1e-3)
    buffer = sac.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)

    def update(rows):
        batch = buffer.get(rows)
        noise, next_noise = (torch.randn_like(batch.actions) for _ in range(2))
        sac.sac_critic_update(agent, target, critic_optimizer, batch, next_noise, None, args)
        sac.sac_actor_update(agent, *optimizers, batch, noise, args)

    assert follow_replay(model, buffer, 400, update) == 200
    worst = 0.0
    for ours, theirs, before in (
        (agent.actor, copy_actor(model.actor, copy.deepcopy(start.actor)), start.actor),
        (agent.critics, copy_critics(model.critic, copy.deepcopy(start.critics)), start.critics),
        (target, copy_critics(model.critic_target, copy.deepcopy(start.critics)), start.critics),
    ):
        worst = max(worst, assert_parameters_agree(ours, theirs, 1e-5, before.state_dict()))
    alpha, sb3_alpha = agent.alpha.item(), model.log_ent_coef.exp().item()
    assert abs(alpha - 0.3) > 0.01 and alpha == pytest.approx(sb3_alpha, rel=1e-5)
    worst = max(worst, abs(alpha / sb3_alpha - 1))
    record_property("largest difference", worst)
    print(f"sac, {env_id}: largest difference {worst:.1e} after 200 updates")
