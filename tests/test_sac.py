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


# Gradients --------------------------------------------------------------------------------------------------


def make_agent(num_critics=2, alpha=0.5):
    torch.manual_seed(0)
    agent = sac.SoftActorCritics(*SPACES, (16, 16), num_critics, alpha)
    target = sac.Critics(num_critics, 5, (16, 16)).requires_grad_(False)
    return agent, target


def make_batch(size=32):
    return sac.Transitions(
        observations=torch.randn(size, 3),
        actions=torch.rand(size, 2) * 2 - 1,
        rewards=torch.randn(size),
        next_observations=torch.randn(size, 3),
        terminated=torch.rand(size) < 0.3,
        truncated=torch.rand(size) < 0.3,
    )


def gradients(agent):
    """By name, of the parameters that have one."""
    return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}


def assert_gradients(agent, loss, *prefixes):
    """Those parameters have the gradient of `loss`, and the others none."""
    names, parameters = zip(*((n, p) for n, p in agent.named_parameters() if n.startswith(prefixes)))
    expected = dict(zip(names, torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(gradients(agent), expected, rtol=1e-4, atol=1e-6)


def test_critics_are_networks_of_their_own_side_by_side():
    torch.manual_seed(0)
    critics, states, actions = sac.Critics(5, 7, (16, 8)), torch.randn(10, 4), torch.randn(10, 3)
    values = critics(states, actions)
    assert values.shape == (5, 10) and values[:, 0].unique().numel() == 5
    for critic, value in zip(critics, values):
        torch.testing.assert_close(value, critic(torch.cat([states, actions], 1)).squeeze(1))


@pytest.mark.parametrize("members", [None, torch.tensor([4, 1])], ids=["all", "two of five"])
def test_critics_gradient_against_the_definition(members):
    agent, target = make_agent(num_critics=5)
    batch, noise = make_batch(), torch.randn(32, 2)
    metrics = sac.sac_critic_gradient(agent, target, batch, noise, members, sac.Args(gamma=0.9))
    loss, values = 0, []
    for i in range(32):
        s, a, r, s_next, terminated, _ = (x[i : i + 1] for x in batch)
        a_next, log_prob = sac.squashed_gaussian(*agent.policy(s_next), noise[i : i + 1])
        next_q = target(s_next, a_next)[[0, 1, 2, 3, 4] if members is None else members.tolist()]
        y = r + (0 if terminated else 0.9 * (min(next_q) - 0.5 * log_prob).detach())
        values += agent.critics(s, a).flatten()
        loss = loss + 0.5 * sum((q - y).square() for q in values[-5:]).squeeze() / 32
    assert_gradients(agent, loss, "critics")
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["q_values"].item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)


@pytest.mark.parametrize("subset", [2, 3])
def test_actors_gradient_against_the_definition(subset):
    """Judged by the critics' minimum or, where targets draw a subset of them, by their mean."""
    agent, _ = make_agent(num_critics=3)
    batch, noise = make_batch(), torch.randn(32, 2)
    args = sac.Args(num_critics=3, critic_subset=subset, autotune=False)
    metrics = sac.sac_actor_gradient(agent, batch, noise, args)
    loss, entropy = 0, 0
    for s, e in zip(batch.observations, noise):
        mean, log_std = agent.actor(s).chunk(2)
        action, log_prob = sac.squashed_gaussian(mean, log_std, e)
        q = agent.critics(s.unsqueeze(0), action.unsqueeze(0)).flatten()
        loss = loss + (0.5 * log_prob - (q.mean() if subset == 2 else q.min())) / 32
        entropy -= log_prob.item() / 32
    assert_gradients(agent, loss, "actor")
    assert metrics["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert (metrics["entropy"].item(), metrics["alpha"].item()) == (
        pytest.approx(entropy, rel=1e-4),
        pytest.approx(0.5),
    )


@pytest.mark.parametrize("target_entropy, expected", [(None, -2.0), (-0.7, -0.7), (50.0, 50.0)])
def test_the_temperatures_gradient_is_by_how_much_the_entropy_is_above_its_target(target_entropy, expected):
    """So descending it lowers α there; the target is −A unless another is asked for. The actor's gradient stays."""
    (agent, _), (other, _) = make_agent(), make_agent()
    batch, noise = make_batch(), torch.randn(32, 2)
    metrics = sac.sac_actor_gradient(agent, batch, noise, sac.Args(target_entropy=target_entropy))
    assert agent.log_alpha.grad.item() == pytest.approx(metrics["entropy"].item() - expected, abs=1e-5)
    sac.sac_actor_gradient(other, batch, noise, sac.Args(autotune=False))
    ours = gradients(agent)
    del ours["log_alpha"]
    torch.testing.assert_close(ours, gradients(other), rtol=0, atol=0)


def test_the_deviation_is_bounded():
    agent, _ = make_agent()
    torch.nn.init.zeros_(agent.actor[-1].weight)
    for bias, log_std in ((100.0, 2.0), (-100.0, -20.0), (-1.0, -1.0)):
        agent.actor[-1].bias.data = torch.tensor([0.3, -0.2, bias, bias])
        expected = torch.tensor([0.3, -0.2]).expand(10, 2), torch.full((10, 2), log_std)
        torch.testing.assert_close(agent.policy(torch.randn(10, 3)), expected)


def test_the_target_follows_by_tau_and_takes_over_buffers():
    torch.manual_seed(0)
    online, target = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    online(torch.randn(8, 3))
    expected = [0.7 * a + 0.3 * b for a, b in zip(target.parameters(), online.parameters())]
    sac.polyak_update(target, online, 0.3)
    torch.testing.assert_close(list(target.parameters()), [x.detach() for x in expected])
    assert not online[1].running_mean.eq(0).any() and target[1].num_batches_tracked == 1
    torch.testing.assert_close(list(target.buffers()), list(online.buffers()), rtol=0, atol=0)


def test_redq_draws_other_critics_for_each_target(monkeypatch):
    drawn, actors, critic_gradient, actor_gradient = [], [], sac.sac_critic_gradient, sac.sac_actor_gradient
    monkeypatch.setattr(sac, "sac_critic_gradient", lambda *x: drawn.append(x[4]) or critic_gradient(*x))
    monkeypatch.setattr(sac, "sac_actor_gradient", lambda *x: actors.append(1) or actor_gradient(*x))
    flags = "--total-timesteps 30 --learning-starts 10 --num-critics 10 --critic-subset 2 --gradient-steps 20"
    flags += " --policy-delay 20 --hidden-sizes 8 --eval-episodes 1 --batch-size 8 --buffer-size 100"
    sac.train(sac.parse_args(flags.split()))
    assert len(drawn) == 20 * 20 and len(actors) == 20
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
    critic_optimizer = torch.optim.Adam(agent.critics.parameters(), args.learning_rate)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), args.learning_rate)
    alpha_optimizer = torch.optim.Adam([agent.log_alpha], args.learning_rate)
    buffer = sac.ReplayBuffer(300, 1, env.observation_space, env.action_space, CPU)

    def update(rows):
        batch = buffer.get(rows)
        noise, next_noise = (torch.randn_like(batch.actions) for _ in range(2))
        critic_optimizer.zero_grad()
        sac.sac_critic_gradient(agent, target, batch, next_noise, None, args)
        critic_optimizer.step()
        sac.polyak_update(target, agent.critics, args.tau)
        actor_optimizer.zero_grad()
        alpha_optimizer.zero_grad()
        sac.sac_actor_gradient(agent, batch, noise, args)
        actor_optimizer.step()
        alpha_optimizer.step()

    assert follow_replay(model, buffer, 400, update) == 200
    worst = 0.0
    for ours, theirs, before in (
        (agent.actor, copy_actor(model.actor, copy.deepcopy(start.actor)), start.actor),
        (agent.critics, copy_critics(model.critic, copy.deepcopy(start.critics)), start.critics),
        (target, copy_critics(model.critic_target, copy.deepcopy(start.critics)), start.critics),
    ):
        worst = max(worst, assert_parameters_agree(ours, theirs, 1e-5, before.state_dict()))
    alpha, sb3_alpha = agent.log_alpha.exp().item(), model.log_ent_coef.exp().item()
    assert abs(alpha - 0.3) > 0.01 and alpha == pytest.approx(sb3_alpha, rel=1e-5)
    worst = max(worst, abs(alpha / sb3_alpha - 1))
    record_property("largest difference", worst)
    print(f"sac, {env_id}: largest difference {worst:.1e} after 200 updates")
