"""algos/kfac.py: Kronecker factors, damping, step and both networks' updates against dense matrices."""

import time
from dataclasses import replace

import kfac
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.nn import functional as F

ARGS = kfac.Args(
    trust_region=1e-3, critic_trust_region=1e-2, max_step_size=1e9, damping=0.01, normalize_advantages=False
)
SPACES = {"discrete": Discrete(3), "box": Box(-1, 1, (2,))}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def linear_layers(*networks):
    return [layer for network in networks for layer in network.modules() if isinstance(layer, nn.Linear)]


def make_kfac(agent):
    """The actor's and the critic's, as train() makes them."""
    return kfac.KFAC(agent.actor, None if agent.discrete else agent.log_std), kfac.KFAC(agent.critic)


def make_agent(space, hidden_sizes=(), inputs=4, seed=0):
    """An agent in float64 whose policy is far from uniform."""
    torch.manual_seed(seed)
    agent = kfac.ActorCritic(Box(-1, 1, (inputs,)), space, hidden_sizes, log_std_init=-0.3).double()
    with torch.no_grad():
        agent.actor[-1].weight *= 100
        for layer in linear_layers(agent):
            layer.bias.normal_(std=0.5)
    return agent


def make_batch(agent, size, states=None):
    """Random states, actions of the policy, advantages that depend on both, random returns."""
    states = torch.randn(size, agent.actor[0].in_features).double() if states is None else states
    actions = agent.act(states, agent.draw_noise(size))
    advantages = torch.randn(size).double() + states[:, 0] + (actions if agent.discrete else actions.sum(-1))
    return kfac.KFACBatch(states, actions, advantages, 2 * torch.randn(size).double() + states[:, 1])


def vec(weight, bias):
    """The columns of [W b] below each other."""
    return torch.cat([weight, bias.unsqueeze(1)], 1).T.flatten()


def vectors(layers):
    return [vec(layer.weight.detach(), layer.bias.detach()) for layer in layers]


def gradients(layers):
    return [vec(layer.weight.grad, layer.bias.grad) for layer in layers]


def per_sample_gradients(values, network):
    """Gradients (B, P) of each of the values (B,), layer by layer, each as vec."""
    layers, rows = linear_layers(network), []
    for value in values:
        found = torch.autograd.grad(value, [p for x in layers for p in (x.weight, x.bias)], retain_graph=True)
        rows.append(torch.cat([vec(*pair) for pair in zip(found[::2], found[1::2])]))
    return torch.stack(rows)


def measure(agent, actor, critic, batch, args=ARGS, noise=None):
    """Gradients and curvature as in train(); what kfac_gradient gives."""
    agent.zero_grad()
    outputs = kfac.kfac_gradient(agent, batch, args)
    noise = agent.draw_noise(len(batch.states)) if noise is None else noise
    kfac.measure_curvature(agent, actor, critic, batch.states, noise, args)
    return outputs


def update(agent, actor, critic, batch, args=ARGS, annealed=1.0, noise=None):
    """A whole update as in train(); the losses, and η of the actor and of the critic."""
    losses, _ = measure(agent, actor, critic, batch, args, noise)
    size = actor.step(args.trust_region, annealed, args)
    return losses, size, critic.step(args.critic_trust_region * losses["value_loss"], annealed, args)


def factors_of(agent, batch, noise=None):
    """A and G of each layer, the actor's and the critic's, of this batch alone."""
    actor, critic = make_kfac(agent)
    measure(agent, actor, critic, batch, noise=noise)
    return [[(x.A.clone(), x.G.clone()) for x in part.factors] for part in (actor, critic)]


# Gradients and factors --------------------------------------------------------------------------------------


@each_space
def test_gradients_are_those_of_the_loss_whatever_is_measured_beside_them(space):
    agent = make_agent(space, (5, 6))
    batch = make_batch(agent, 30)
    (losses, log_probs) = measure(agent, *make_kfac(agent), batch, replace(ARGS, ent_coef=0.3))
    ours = [p.grad for p in agent.parameters()]
    expected_log_probs, entropy = agent.log_prob_and_entropy(batch.states, batch.actions)
    policy_loss = -(expected_log_probs * batch.advantages).mean()
    value_loss = (agent.value(batch.states) - batch.returns).square().mean()
    loss = policy_loss - 0.3 * entropy.mean() + value_loss / 2
    torch.testing.assert_close(ours, list(torch.autograd.grad(loss, [*agent.parameters()])))
    expected = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy.mean())
    torch.testing.assert_close(losses, {name: x.detach() for name, x in expected.items()})
    torch.testing.assert_close(log_probs, expected_log_probs.detach())


def own_log_probs(agent, states, noise):
    return agent.log_prob_and_entropy(states, agent.act(states, noise))[0]


@each_space
def test_one_layer_and_one_sample_are_the_dense_fisher_block(space):
    agent = make_agent(space)
    batch, noise = make_batch(agent, 1), agent.draw_noise(1)
    ((A, G),), _ = factors_of(agent, batch, noise)
    (score,) = per_sample_gradients(own_log_probs(agent, batch.states, noise), agent.actor)
    assert score.norm() > 0.1
    torch.testing.assert_close(torch.kron(A, G), torch.outer(score, score))


def test_a_linear_layer_with_independent_factors_is_the_dense_fisher_block():
    """Of a Gaussian with linear mean, g = noise/σ² knows nothing of the state: every state meets every noise."""
    agent = make_agent(SPACES["box"])
    noise = agent.draw_noise(7).double().repeat(11, 1)
    batch = make_batch(agent, 77, torch.randn(11, 4).double().repeat_interleave(7, 0))
    ((A, G),), _ = factors_of(agent, batch, noise)
    scores = per_sample_gradients(own_log_probs(agent, batch.states, noise), agent.actor)
    torch.testing.assert_close(torch.kron(A, G), scores.T @ scores / 77)


def test_the_fisher_matrix_is_of_the_policys_own_actions():
    """G of softmax(logits) is E[diag(p) − ppᵀ], whatever actions were taken; the empirical one depends on them."""
    agent = make_agent(SPACES["discrete"])
    states = torch.randn(20, 4).double()
    p = agent.actor(states).softmax(-1).detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / 20
    batch = make_batch(agent, 100_000, states.repeat(5000, 1))
    ((_, G),), _ = factors_of(agent, batch._replace(actions=torch.zeros_like(batch.actions)))
    empirical = F.one_hot(torch.zeros(20, dtype=torch.int64), 3) - p
    torch.testing.assert_close(G, exact, atol=5e-3, rtol=0)
    assert (empirical.T @ empirical / 20 - exact).abs().max() > 0.1


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)], ids=["tanh", "relu in place"])
def test_critic_factors_are_exact(activation):
    """Per layer A = E[āāᵀ], G = E[ggᵀ] with g = ∂V/∂s: what comes after a layer must not overwrite its s."""
    agent = make_agent(SPACES["discrete"], (5,))
    agent.critic[1] = activation
    batch = make_batch(agent, 40)
    _, ((A0, G0), (A1, G1)) = factors_of(agent, batch)
    s = agent.critic[0](batch.states).detach()
    hidden, slope = (s.tanh(), 1 - s.tanh().square()) if isinstance(activation, nn.Tanh) else (s.relu(), s > 0)
    slopes = slope * agent.critic[2].weight.detach()
    torch.testing.assert_close(G0, slopes.T @ slopes / 40)
    torch.testing.assert_close(G1, torch.ones(1, 1).double())
    for A, x in ((A0, batch.states), (A1, hidden)):
        x = torch.cat([x, torch.ones(40, 1)], 1)
        torch.testing.assert_close(A, x.T @ x / 40)


# Damping, running averages, step size -----------------------------------------------------------------------


def one_layer(damping=ARGS.damping):
    """A network of one layer, its K-FAC with factors of very different scale, and .grad filled at random."""
    torch.manual_seed(0)
    network, args = nn.Sequential(nn.Linear(4, 3)).double(), replace(ARGS, damping=damping)
    optimizer = kfac.KFAC(network)
    optimizer.factors[0].update(5 * torch.randn(30, 5).double(), 0.1 * torch.randn(30, 3).double(), args)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    return network, optimizer, args


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_the_step_solves_the_damped_dense_system(damping):
    network, optimizer, args = one_layer(damping)
    A, G = optimizer.factors[0].A, optimizer.factors[0].G
    pi = ((A.trace() / 5) / (G.trace() / 3)) ** 0.5
    assert pi > 10
    dense = torch.kron(A + pi * damping**0.5 * torch.eye(5), G + damping**0.5 / pi * torch.eye(3))
    (before,), (gradient,) = vectors(network), gradients(network)
    size = optimizer.step(1e-3, 1.0, args)
    torch.testing.assert_close((before - vectors(network)[0]) / size, torch.linalg.solve(dense, gradient))


def test_a_policy_without_curvature_still_has_finite_inverses():
    """Of a policy that has become deterministic, G is 0; rounding may leave a factor slightly indefinite."""
    factors = kfac.KroneckerFactors(nn.Linear(4, 3))
    factors.update(torch.eye(5), torch.zeros(5, 3), ARGS)
    assert factors.A_inverse.isfinite().all() and factors.G_inverse.isfinite().all()
    factors.A.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1e-3])))
    factors.G.copy_(torch.eye(3) * factors.A.trace() / 5)
    args = replace(ARGS, statistics_decay=1.0, damping=1e-6, inverse_every=1)
    factors.updates.fill_(10**9)  # the averages stay as they are
    factors.update(torch.zeros(5, 5), torch.zeros(5, 3), args)
    torch.testing.assert_close(factors.A_inverse.diag(), torch.tensor([1 / 1.001] * 4 + [1e3]), rtol=1e-3, atol=0)


def test_step_size():
    """η = √(2δ / Δᵀ F̂ Δ), or its bound; and 0 of a critic without error."""
    network, optimizer, args = one_layer()
    (before,) = vectors(network)
    size = optimizer.step(0.01, 1.0, args)
    step = (before - vectors(network)[0]) / size
    form = step @ torch.kron(optimizer.factors[0].A, optimizer.factors[0].G) @ step
    assert size.item() == pytest.approx((0.02 / form.item()) ** 0.5)
    assert optimizer.step(0.01, 1.0, replace(args, max_step_size=1e-4)).item() == pytest.approx(1e-4)
    assert optimizer.step(0.01, 0.5, replace(args, max_step_size=1e-4)).item() == pytest.approx(5e-5)
    for p in network.parameters():
        p.grad.zero_()
    assert optimizer.step(0.01, 1.0, replace(args, max_step_size=0.25)).item() == 0.25
    assert optimizer.step(torch.tensor(0.0), 1.0, args).item() == 0


@each_space
@pytest.mark.parametrize("annealed", [1.0, 0.5])
def test_both_steps_end_on_their_trust_regions(space, annealed):
    """The parameters' change d has dᵀ F̂ d = 2δ, with F̂ dense and log σ's block 2I; of the critic 2δ·E[(V − R̂)²]."""
    agent = make_agent(space, (5,))
    agent.critic = kfac.mlp([4, 6, 5, 1], 1.0).double()  # deeper than the actor: the two are apart
    actor, critic = make_kfac(agent)
    batch, before = make_batch(agent, 50), vectors(linear_layers(agent))
    log_std = None if agent.discrete else agent.log_std.detach().clone()
    losses, *_ = update(agent, actor, critic, batch, annealed=annealed)
    steps = [new - old for new, old in zip(vectors(linear_layers(agent)), before)]
    factors = [*actor.factors, *critic.factors]
    forms = [d @ torch.kron(layer.A, layer.G) @ d for d, layer in zip(steps, factors, strict=True)]
    assert min(forms) > 0
    actor_form, critic_form = sum(forms[:2]), sum(forms[2:])
    if not agent.discrete:
        step = agent.log_std.detach() - log_std
        assert 2 * step.square().sum() > 0.001 * actor_form
        actor_form = actor_form + 2 * step.square().sum()
    assert actor_form.item() == pytest.approx(2e-3 * annealed**2)
    assert critic_form.item() == pytest.approx(2e-2 * losses["value_loss"].item() * annealed**2)


def test_the_bound_on_the_step_size_holds_where_it_is_smaller():
    agent = make_agent(SPACES["discrete"], (5,))
    _, size, critic_size = update(agent, *make_kfac(agent), make_batch(agent, 50), replace(ARGS, max_step_size=1e-5))
    assert size.item() == critic_size.item() == pytest.approx(1e-5)


def test_the_trust_region_bounds_the_kl():
    """With many samples of a linear policy K-FAC's F̂ is nearly exact: the step's KL divergence is δ."""
    agent = make_agent(SPACES["box"])
    batch = make_batch(agent, 20_000)
    old = torch.distributions.Normal(agent.actor(batch.states).detach(), agent.log_std.detach().exp())
    update(agent, *make_kfac(agent), batch)
    new = torch.distributions.Normal(agent.actor(batch.states), agent.log_std.exp())
    kl = torch.distributions.kl_divergence(old, new).sum(-1).mean().item()
    assert kl == pytest.approx(1e-3, rel=0.1)


def test_running_averages_and_their_inverses():
    """Weights 1, 1/2, 1/3, then 0.3 for ever; new inverses with the first update and with every third after it.

    Every update is of curvature that a checkpoint has brought: the count of updates is part of it.
    """
    agent = make_agent(SPACES["discrete"], (5,))
    args = replace(ARGS, statistics_decay=0.7, inverse_every=3)
    states, averages, history = [x.state_dict() for x in make_kfac(agent)], None, []
    for number, weight in enumerate([1, 1 / 2, 1 / 3, 0.3, 0.3, 0.3, 0.3]):
        optimizers = make_kfac(agent)
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
        batch, noise = make_batch(agent, 50), agent.draw_noise(50)
        new = [x for part in factors_of(agent, batch, noise) for pair in part for x in pair]
        update(agent, *optimizers, batch, args, noise=noise)
        states = [{name: x.clone() for name, x in optimizer.state_dict().items()} for optimizer in optimizers]
        averages = [weight * x + (1 - weight) * y for x, y in zip(new, averages or new)]
        history.append(averages)
        for i, layer in enumerate(layer for optimizer in optimizers for layer in optimizer.factors):
            A, G = averages[2 * i : 2 * i + 2]
            torch.testing.assert_close((layer.A, layer.G), (A, G))
            A, G = history[number // 3 * 3][2 * i : 2 * i + 2]
            pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
            torch.testing.assert_close(layer.A_inverse @ (A + 0.1 * pi * torch.eye(len(A))), torch.eye(len(A)).double())
    assert (history[0][1] - history[1][1]).abs().max() > 1e-3


def test_advantages_are_normalised_where_there_is_more_than_one():
    """Their scale and mean then do not count, and a rollout of a single step leaves the weights finite."""
    args, after = replace(ARGS, normalize_advantages=True, max_step_size=0.01), []
    for scale, shift in ((1, 0), (7, 3)):
        agent = make_agent(SPACES["box"], (5,))
        batch, optimizers = make_batch(agent, 50), make_kfac(agent)
        update(agent, *optimizers, batch._replace(advantages=scale * batch.advantages + shift), args)
        after.append(torch.cat(vectors(linear_layers(agent))))
    torch.testing.assert_close(*after)
    losses, *_ = update(agent, *optimizers, make_batch(agent, 1), args)
    assert all(x.isfinite() for x in losses.values())
    assert torch.cat(vectors(linear_layers(agent))).isfinite().all()


def test_the_fisher_matrix_of_log_std_is_two():
    """The Hessian of KL(π_old ‖ π) by mean and log σ: 2 per dimension of log σ, and nothing between the two."""
    agent = make_agent(SPACES["box"])
    mean, log_std = torch.randn(2).double(), agent.log_std.detach().clone()
    old = torch.distributions.Normal(mean, log_std.exp())

    def kl(x):
        return torch.distributions.kl_divergence(old, torch.distributions.Normal(x[:2], x[2:].exp())).sum()

    fisher = torch.autograd.functional.hessian(kl, torch.cat([mean, log_std]))
    torch.testing.assert_close(fisher[2:], torch.tensor([[0, 0, 2, 0], [0, 0, 0, 2]]).double())
    _, size, _ = update(agent, *make_kfac(agent), make_batch(agent, 50))
    gradient = agent.log_std.grad
    expected = log_std - size * torch.linalg.solve(fisher[2:, 2:] + ARGS.damping * torch.eye(2), gradient)
    torch.testing.assert_close(agent.log_std.detach(), expected)


# Directions -------------------------------------------------------------------------------------------------


def test_one_layer_critic_takes_a_dense_damped_gauss_newton_step():
    agent = make_agent(SPACES["discrete"])
    batch, (before,) = make_batch(agent, 50), vectors([agent.critic[0]])
    x = torch.cat([batch.states, torch.ones(50, 1)], 1).double()
    gauss_newton, gradient = x.T @ x / 50, x.T @ (x @ before - batch.returns) / 50
    pi = (gauss_newton.trace() / 5) ** 0.5
    damped = (gauss_newton + 0.1 * pi * torch.eye(5)) * (1 + 0.1 / pi)
    *_, size = update(agent, *make_kfac(agent), batch)
    expected = before - size * torch.linalg.solve(damped, gradient)
    torch.testing.assert_close(vectors([agent.critic[0]])[0], expected)


def test_a_whole_gauss_newton_step_of_a_linear_critic_is_least_squares():
    agent = make_agent(SPACES["discrete"])
    batch = make_batch(agent, 50)
    x = torch.cat([batch.states, torch.ones(50, 1)], 1).double()
    args = replace(ARGS, damping=1e-16, critic_trust_region=1e9, max_step_size=1.0)
    update(agent, *make_kfac(agent), batch, args)
    expected = torch.linalg.lstsq(x, batch.returns.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(vectors([agent.critic[0]])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_kfac_is_closer_to_the_exact_natural_gradient_than_the_gradient_is(seed):
    """Two layers: cosine similarity with (F + λI)⁻¹∇L, where F is dense and its expectation over actions exact.

    Advantages are noise, as they mostly are in a rollout. It is no law: of a gradient that hardly varies from sample
    to sample, even the exact block diagonal of F can lead further away than the gradient itself.
    """
    agent = make_agent(SPACES["discrete"], (6,), seed=seed)
    batch = make_batch(agent, 300, torch.randn(300, 4).double() @ torch.randn(4, 4).double())
    batch = batch._replace(advantages=torch.randn(300).double())
    fisher = 0
    for action in range(3):
        log_probs, _ = agent.log_prob_and_entropy(batch.states, torch.full((300,), action))
        scores = per_sample_gradients(log_probs, agent.actor)
        fisher = fisher + (log_probs.exp().detach().unsqueeze(1) * scores).T @ scores / 300
    before = torch.cat(vectors(linear_layers(agent.actor)))
    update(agent, *make_kfac(agent), batch)
    gradient = torch.cat(gradients(linear_layers(agent.actor)))
    natural = torch.linalg.solve(fisher + ARGS.damping * torch.eye(len(fisher)), gradient)
    direction = before - torch.cat(vectors(linear_layers(agent.actor)))
    plain, ours = (F.cosine_similarity(x, natural, dim=0).item() for x in (gradient, direction))
    assert ours > plain and ours > 0.5, (ours, plain)


def test_an_affine_change_of_the_inputs_leaves_the_steps_effect_unchanged_and_sgds_not():
    """Inputs M x + c with weights that undo it: the same function before the step, so the same function after it."""
    torch.manual_seed(1)
    M, c = torch.randn(3, 3).double() + 2 * torch.eye(3), torch.randn(3).double()
    args = replace(ARGS, damping=1e-14)
    states, noise, changes = torch.randn(400, 3).double(), 0.7 * torch.randn(400, 2).double(), {}
    for name in ("original", "changed"):
        for method in ("K-FAC", "SGD"):
            agent = make_agent(SPACES["box"], (5,), inputs=3)
            torch.manual_seed(2)
            batch, x = make_batch(agent, 400, states), states
            if name == "changed":
                x = states @ M.T + c
                for network in (agent.actor, agent.critic):
                    network[0].weight.data = network[0].weight.data @ M.inverse()
                    network[0].bias.data -= network[0].weight.data @ c
            outputs = [network(x).detach() for network in (agent.actor, agent.critic)]
            if method == "K-FAC":
                update(agent, *make_kfac(agent), batch._replace(states=x), args, noise=noise)
            else:
                kfac.kfac_gradient(agent, batch._replace(states=x), args)
                torch.optim.SGD(agent.parameters(), 1e-3).step()
            after = [network(x).detach() for network in (agent.actor, agent.critic)]
            changes[name, method] = outputs, [new - old for new, old in zip(after, outputs)]
    torch.testing.assert_close(changes["original", "SGD"][0], changes["changed", "SGD"][0])
    for method, same in (("K-FAC", True), ("SGD", False)):
        for a, b in zip(changes["original", method][1], changes["changed", method][1]):
            difference = ((a - b).norm() / a.norm()).item()
            assert a.norm() > 0 and (difference < 1e-3 if same else difference > 0.3), (method, difference)


# Forks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, name",
    [
        ([nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)], "LayerNorm"),
        ([nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 1)], "BatchNorm1d"),
        ([nn.Linear(4, 5), nn.Dropout(0.1), nn.Linear(5, 1)], "Dropout"),
        ([nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 1)], "PReLU"),
        ([nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)], "bias=False"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(4, 1))], "Parametrized"),
    ],
    ids=["LayerNorm", "BatchNorm", "Dropout", "PReLU", "without bias", "weight norm"],
)
def test_a_layer_whose_curvature_is_not_known_is_refused_in_one_line(layers, name, capsys):
    with pytest.raises(SystemExit):
        kfac.KFAC(nn.Sequential(*layers))
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1


def test_layers_without_weights_are_right():
    """GELU and a LayerNorm without parameters: the factors are those of the layers' own per-sample gradients."""
    agent = make_agent(SPACES["discrete"], (5,))
    agent.critic = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False), nn.GELU(), nn.Linear(5, 1))
    agent.double()
    batch = make_batch(agent, 40)
    _, ((_, G), _) = factors_of(agent, batch)
    slopes = torch.func.vmap(torch.func.jacrev(lambda s: agent.critic[1:](s).squeeze(0)))(agent.critic[0](batch.states))
    torch.testing.assert_close(G, (slopes.T @ slopes / 40).detach())


def test_what_is_frozen_stays_and_the_rest_moves():
    agent = make_agent(SPACES["box"], (5,))
    agent.actor[0].requires_grad_(False)
    optimizers = make_kfac(agent)
    for frozen in (agent.actor[0], agent.critic[2], agent.log_std):  # the last two in mid-run
        frozen.requires_grad_(False)
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        update(agent, *optimizers, make_batch(agent, 50))
        moved = {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in agent.named_parameters() if p.requires_grad}
    assert len(moved) == 4


def test_an_edit_of_the_gradient_takes_effect():
    """Its direction counts, and where the bound on the step size holds its length does, too."""
    agent = make_agent(SPACES["discrete"], (5,))
    actor, critic = make_kfac(agent)
    measure(agent, actor, critic, make_batch(agent, 50))
    torch.nn.utils.clip_grad_norm_(agent.actor.parameters(), 1e-3)
    agent.actor[2].weight.grad.zero_()
    before = {name: p.detach().clone() for name, p in agent.actor.named_parameters()}
    expected = actor.factors[0]
    gradient = torch.cat([agent.actor[0].weight.grad, agent.actor[0].bias.grad.unsqueeze(1)], 1)
    actor.step(1e9, 1.0, replace(ARGS, max_step_size=0.5))
    step = 0.5 * expected.G_inverse @ gradient @ expected.A_inverse
    torch.testing.assert_close(before["0.weight"] - agent.actor[0].weight.detach(), step[:, :-1])


class Twice(nn.Module):
    """A layer that a forward pass uses two times."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.first(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("fault", ["a layer used twice", "another network", "half a layer frozen"])
def test_what_would_be_wrong_in_silence_stops_in_one_line(fault, capsys):
    agent = make_agent(SPACES["discrete"], (5,))
    if fault == "a layer used twice":
        agent.critic = Twice().double()
    actor, critic = make_kfac(agent)
    if fault == "another network":
        agent.critic = kfac.mlp([4, 5, 1], 1.0).double()
    if fault == "half a layer frozen":
        agent.critic[0].bias.requires_grad_(False)
    with pytest.raises(SystemExit):
        update(agent, actor, critic, make_batch(agent, 20))
    message = capsys.readouterr().err
    assert "K-FAC" in message and message.count("\n") == 1


# Cost -------------------------------------------------------------------------------------------------------


def milliseconds(function, rounds=5, calls=20):
    """CPU time of a call: the best round, so that other work on the machine counts little."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        times.append((time.process_time() - start) / calls)
    return 1000 * min(times)


@pytest.mark.slow
def test_overhead_of_an_update_over_a2cs(record_property):
    """The same network and batch: a K-FAC update, inverses included, against one gradient step with RMSprop."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    agent = kfac.ActorCritic(Box(-1, 1, (4,)), Discrete(2), (64, 64))
    batch = kfac.KFACBatch(*(x if x.dtype == torch.int64 else x.float() for x in make_batch(agent.double(), 256)))
    agent.float()
    actor, critic = make_kfac(agent)
    optimizer = torch.optim.RMSprop(agent.parameters(), lr=1e-6, alpha=0.99, eps=1e-5)
    args = replace(ARGS, max_step_size=1e-6)

    def a2c():
        log_probs, entropy = agent.log_prob_and_entropy(batch.states, batch.actions)
        value_loss = F.mse_loss(agent.value(batch.states), batch.returns)
        loss = -(log_probs * batch.advantages).mean() + 0.5 * value_loss - 0.01 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()

    ours = milliseconds(lambda: update(agent, actor, critic, batch, args))
    theirs = milliseconds(a2c)
    without = milliseconds(lambda: update(agent, actor, critic, batch, replace(args, inverse_every=1_000_000)))
    torch.set_num_threads(threads)
    record_property("overhead", ours / theirs)
    print(f"K-FAC {ours:.2f} ms ({without:.2f} without inverses), A2C {theirs:.2f} ms: {ours / theirs:.1f} times")
    assert ours < 10 * theirs
