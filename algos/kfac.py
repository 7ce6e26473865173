"""K-FAC: the natural policy gradient with Kronecker-factored curvature, as ACKTR (Wu et al. 2017, arXiv 1708.05144).

The steepest ascent of the return per unit of change in the policy, measured by its KL divergence, is F⁻¹∇J, with the
Fisher matrix F = E[∇log π(a'|s) ∇log π(a'|s)ᵀ], a' ~ π(·|s). F has a row for every weight: too large to invert. K-FAC
(Martens & Grosse 2015, arXiv 1503.05671) makes two approximations. Let a layer compute s = W ā from its input ā (a 1
appended goes with the bias), and let g = ∂ log π(a'|s)/∂s, so that its own gradient is g āᵀ. Then
1. block diagonal: what the gradients of two layers have in common is dropped; one block F_l = E[āāᵀ ⊗ ggᵀ] per layer;
2. product of expectations: E[āāᵀ ⊗ ggᵀ] ≈ E[āāᵀ] ⊗ E[ggᵀ] = A ⊗ G, as if ā and g were independent. The inverse of a
   Kronecker product is the product of the inverses, so two small matrices are inverted in the place of one huge one.

Each iteration collects T steps from N environments, estimates advantages Â with GAE(λ), and takes one step:

    ∇L  = −E[Â ∇log π(a|s)] − c_e ∇E[H(π(·|s))]
    Δ_l = (G_l + √λ/π_l I)⁻¹ ∇L_l (A_l + π_l√λ I)⁻¹              λ the damping, π_l² = (tr A/dim A) / (tr G/dim G)
    θ  ← θ − η Δ                                                 η = min(η_max, √(2δ / Δᵀ F̂ Δ))

The critic does the same with the loss E[(V − R̂)²]/2, the Gauss-Newton matrix E[∇V ∇Vᵀ] in the place of F, and its own
δ. Details that matter, and why:
- a' is drawn afresh from the policy: with the actions taken F would be the empirical Fisher, which is no metric.
- Gauss-Newton is the Fisher matrix of N(V(s), 1). V is one number: g = ∂V/∂s is exact, no noise is drawn for it.
- log σ of a Gaussian policy is no layer's: its Fisher is exactly 2 per dimension, and 0 between it and the mean.
- A and G are running averages: the mean of the first updates, then exponential. One batch alone is too noisy.
- Inverses come from eigendecompositions, negative rounding cut off, every few updates: curvature changes slowly.
- Old inverses only fit small steps: on CartPole `--critic-trust-region 1` ends at 221 and 264 (seeds 1 and 2), and with
  `--inverse-every 1` beside it at 500 and 500.
- Δᵀ F̂ Δ = Σ_l tr(Δ_lᵀ G_l Δ_l A_l), undamped: η²/2 of it is the KL divergence of a step to second order, as F̂
  measures it, and that is at most δ. F̂ is approximate and an average over old policies: the true KL may be larger.
- The critic's δ is a share of its squared error, so it has no unit of reward: δ for N(V(s), σ²), σ² that error.
- A time limit is not a termination: a truncated step bootstraps from its true final observation.

Against ACKTR on Atari: actor and critic share no layers and take separate steps, which keeps their curvatures apart,
and advantages are GAE(λ), not n-step; the authors' code for MuJoCo does both as well. The critic's δ is relative to
its error, where ACKTR has σ = 1. Their code also has momentum 0.9, on Atari clips gradients, draws noise for the
critic's factors and inverts in a thread of its own: not here.

    python algos/kfac.py                              # CartPole-v1
    python algos/kfac.py --env-id HalfCheetah-v5 --seed 3
    python algos/kfac.py --resume runs/CartPole-v1__kfac__1__…
    torchrun --nproc-per-node 2 algos/kfac.py         # data parallel: each process has its own environments
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    seed: int = 1
    """seed of everything random; same seed, same machine and thread count: same bits on CPU"""
    total_timesteps: int = 100_000
    """environment steps, over all environments and processes, rounded up to whole rollouts"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradients and curvature with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 16
    """parallel environments N (per process)"""
    normalize_observations: bool = False
    """normalise observations by their running mean and deviation, clipped to ±10"""
    normalize_rewards: bool = False
    """divide rewards by the running deviation of the discounted return, clipped to ±10"""

    # algorithm
    num_steps: int = 16
    """steps T per environment and rollout"""
    trust_region: float = 0.001
    """δ of the policy: bound on the KL divergence of a step, in nats, to second order and as F̂ measures it"""
    critic_trust_region: float = 0.01
    """δ of the critic: bound on half its mean squared change in a step, as a share of its mean squared error"""
    max_step_size: float = 0.25
    """η_max: bound on the step size of both networks"""
    anneal_step_size: bool = True
    """lower the step sizes linearly to 0"""
    damping: float = 0.01
    """λ added to the curvature, factored"""
    statistics_decay: float = 0.99
    """decay of the running averages of A and G, per update"""
    inverse_every: int = 10
    """updates between inversions"""
    gamma: float = 0.99
    """discount γ"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    normalize_advantages: bool = True
    """normalise advantages per rollout and process"""
    ent_coef: float = 0.0
    """weight c_e of the entropy bonus"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """tanh layers of the policy and, apart from it, of the value network"""
    log_std_init: float = 0.0
    """initial log standard deviation of Box actions"""


# fmt: off
MUJOCO = dict(
    total_timesteps=1_000_000, num_envs=8, num_steps=128, trust_region=0.002, normalize_observations=True,
    normalize_rewards=True)
RECOMMENDED = {
    "Acrobot-v1": dict(normalize_observations=True, normalize_rewards=True),
    "Pendulum-v1": dict(
        trust_region=0.005, critic_trust_region=0.1, gamma=0.9, normalize_observations=True, normalize_rewards=True),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum")},
    "Swimmer-v5": MUJOCO | dict(gamma=0.9999),
}
# fmt: on
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Networks ---------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of all samples so far, as buffers: saved, exported and frozen with the network.

    `std`, which normalises, is what `update` makes of `var`.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merges a batch (B, *shape), B the same in all processes (parallel variance, Chan et al. 1979)."""
        mean = average(batch.mean(0))
        var = average((batch - mean).square().mean(0))
        count = len(batch) * (dist.get_world_size() if dist.is_initialized() else 1)
        self.count += count
        weight = count / self.count.item()
        self.var.lerp_(var + (1 - weight) * (mean - self.mean).square(), weight)
        self.mean.lerp_(mean, weight)
        self.std.copy_((self.var + 1e-8).sqrt())

    def scale(self, x: Tensor) -> Tensor:
        """x / deviation, clipped to ±10; (…, *shape)."""
        return (x / self.std).clamp(-10, 10)

    def normalize(self, x: Tensor) -> Tensor:
        """(x − mean) / deviation, clipped to ±10; (…, *shape)."""
        return self.scale(x - self.mean)


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Tanh layers of the given sizes; weights orthogonal with gain √2, `output_gain` in the last; biases zero."""
    layers = []
    for i in range(len(sizes) - 1):
        last = i == len(sizes) - 2
        linear = nn.Linear(sizes[i], sizes[i + 1])
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def without_modules(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """A network of `mlp` as a function of (B, inputs), without gradients and without the cost of calling modules.

    For the few rows of one step that cost is more than the arithmetic's. It follows weights that change in place, and
    repeats what `mlp` does: of another network it would leave out, in silence, all but the linear layers.
    """
    *hidden, last = [(x.weight.detach().T, x.bias.detach()) for x in network if isinstance(x, nn.Linear)]

    def function(x: Tensor) -> Tensor:
        for weight, bias in hidden:
            x = torch.addmm(bias, x, weight).tanh_()
        return torch.addmm(last[1], x, last[0])

    return function


class ActorCritic(nn.Module):
    """Policy π(a|s) and value V(s): two networks that share nothing but the encoding of observations.

    Observations are (…, D) float32 for a Box, (…,) int64 for a Discrete space, and states s (…, D) what `encode`
    makes of them; actions are (…, A) float32, unclipped, for a Box, (…,) indices from 0 for a Discrete space.
    `forward` is the deterministic policy, from observations to what the environment takes.
    """

    def __init__(self, observation_space, action_space, hidden_sizes, normalize_observations=False, log_std_init=0.0):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        self.observation_dtype = torch.int64 if self.one_hot else torch.float32
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.observation_statistics = RunningStatistics(inputs) if normalize_observations and not self.one_hot else None
        self.return_statistics = RunningStatistics()
        self.actor = mlp([inputs, *hidden_sizes, self.action_size], output_gain=0.01)
        self.critic = mlp([inputs, *hidden_sizes, 1], output_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), log_std_init))
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states: one-hot for a Discrete space, normalised by the running statistics if asked for."""
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        return obs if self.observation_statistics is None else self.observation_statistics.normalize(obs)

    def value(self, states: Tensor) -> Tensor:
        """V(s), shape (…,)."""
        return self.critic(states).squeeze(-1)

    def draw_noise(self, *shape: int) -> Tensor:
        """All the randomness of a rollout's actions at once, (*shape, A): Gumbel, or Gaussian of π's deviation."""
        noise = torch.empty(*shape, self.action_size, device=self.actor[-1].weight.device)
        return -noise.exponential_().log() if self.discrete else noise.normal_() * self.log_std.detach().exp()

    def sample(self, output: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(·|s) from the actor's output: mean + noise, or argmax of logits + noise (the Gumbel-max trick)."""
        return (output + noise).argmax(-1) if self.discrete else output + noise

    def log_prob_and_entropy(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and H(π(·|s)), both (…,)."""
        output = self.actor(states)
        if self.discrete:
            return categorical_log_prob_and_entropy(output, actions)
        return gaussian_log_prob_and_entropy(output, self.log_std, actions)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices moved to the space's start, Box actions clipped to its bounds."""
        return actions + int(self.action_space.start) if self.discrete else actions.clamp(self.low, self.high)

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely action."""
        output = self.actor(self.encode(obs))
        return self.to_env(output.argmax(-1) if self.discrete else output)


class KroneckerFactors(nn.Module):
    """The Fisher matrix of one Linear layer as A ⊗ G: running averages and damped inverses, all of them buffers.

    A is E[āāᵀ] (I+1, I+1), the 1 appended to the input going with the bias; G is E[ggᵀ] (O, O). Weight and bias
    are one matrix X (O, I+1), and (A ⊗ G) vec(X) = vec(G X A).
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        for name, size in (("A", layer.in_features + 1), ("G", layer.out_features)):
            self.register_buffer(name, torch.zeros(size, size))
            self.register_buffer(f"{name}_inverse", torch.zeros(size, size))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def update(self, A: Tensor, G: Tensor, args: Args) -> None:
        """Takes a batch's factors into the running averages, the k-th with weight max(1/k, 1 − decay).

        The first update and every `inverse_every`-th after it renews the inverses.
        """
        self.updates += 1
        k = self.updates.item()
        weight = max(1 / k, 1 - args.statistics_decay)
        self.A.lerp_(A, weight)
        self.G.lerp_(G, weight)
        if (k - 1) % args.inverse_every == 0:
            self.invert(args.damping)

    def invert(self, damping: float) -> None:
        """(A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹, factored Tikhonov damping (arXiv 1503.05671, section 6.3)."""
        if not (self.A.isfinite().all() and self.G.isfinite().all()):
            fail("the curvature is not finite; the last checkpoint stays", code=1)
        pi = (self.A.trace() / len(self.A) / (self.G.trace() / len(self.G)).clamp(min=1e-10)).sqrt()
        self.A_inverse.copy_(damped_inverse(self.A, pi * damping**0.5))
        self.G_inverse.copy_(damped_inverse(self.G, damping**0.5 / pi))

    def precondition(self, gradient: Tensor) -> Tensor:
        """F̂⁻¹∇L with the damped inverses; (O, I+1)."""
        return self.G_inverse @ gradient @ self.A_inverse

    def quadratic_form(self, step: Tensor) -> Tensor:
        """Δᵀ F̂ Δ = tr(Δᵀ G Δ A), undamped, of a step Δ (O, I+1)."""
        return ((self.G @ step) * (step @ self.A)).sum()


# The maths --------------------------------------------------------------------------------------------------


def categorical_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of softmax(logits); logits (…, A), actions (…,)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


def gaussian_log_prob_and_entropy(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log p(a) and entropy in nats, both (…,), of N(mean, diag(σ²)), σ = exp(log_std); mean, actions (…, A).

    log_std is (A,), the same in all states: another shape would be summed over the states, too.
    """
    log_normaliser = (log_std + 0.5 * np.log(2 * np.pi)).sum()
    log_prob = -0.5 * ((actions - mean) * (-log_std).exp()).square().sum(-1) - log_normaliser
    return log_prob, (log_normaliser + 0.5 * len(log_std)).expand_as(log_prob)


def linear_recurrence(x: Tensor, decay: Tensor, y: Tensor) -> Tensor:
    """y_t = x_t + decay_t · y_{t−1} along the first dimension; x and decay (T, N), y_{−1} = y (N,)."""
    ys = []
    for x_t, decay_t in zip(x.unbind(), decay.unbind()):
        y = torch.addcmul(x_t, decay_t, y)
        ys.append(y)
    return torch.stack(ys)


def gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode or rollout (arXiv 1506.02438, eq. 16).

    All inputs (T, N). `next_values` is V of the observation that step t truly led to: it counts at a truncation
    and at the rollout's end, and at a termination it does not. Where an episode ended values[t + 1] is another one's.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * (~(terminated | truncated)).to(deltas.dtype)
    return linear_recurrence(deltas.flip(0), decay.flip(0), torch.zeros_like(deltas[0])).flip(0)


def discounted_returns(rewards: Tensor, done: Tensor, previous: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t−1}, from 0 in each episode; rewards and done (T, N), `previous` (N,) is R_{−1}.

    Of past rewards, not a critic's target: its deviation is the scale by which rewards are normalised. `previous` is 0
    for an episode that begins with this rollout.
    """
    first = torch.cat([torch.zeros_like(done[:1]), done[:-1]])
    return linear_recurrence(rewards, gamma * (~first).to(rewards.dtype), previous)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """E[ρ − 1 − log ρ], an unbiased estimate of KL(π_old ‖ π_θ) in nats (Schulman 2020, "k3"); log_ratio (B,)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var[R̂ − V] / Var[R̂]: 1 is a perfect critic, 0 one that knows nothing but the mean; inputs of one shape."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


def damped_inverse(x: Tensor, damping: Tensor) -> Tensor:
    """(X + damping · I)⁻¹ of a symmetric positive semidefinite X (n, n), by eigendecomposition."""
    source = x.cpu() if x.device.type == "mps" else x  # an older PyTorch has no eigh on MPS
    eigenvalues, eigenvectors = (y.to(x.device) for y in torch.linalg.eigh(source))
    return eigenvectors / (eigenvalues.clamp(min=0) + damping) @ eigenvectors.T


def layer_by_layer(network: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output for x (B, I), and of each Linear its inputs with a 1 appended and its outputs, (B, ·)."""
    inputs, outputs = [], []
    for layer in network:
        if isinstance(layer, nn.Linear):
            inputs.append(F.pad(x, (0, 1), value=1.0).detach())
            outputs.append(layer(x))
            x = outputs[-1]
        else:
            x = layer(x)
    return x, inputs, outputs


def kronecker_factors(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """A = E[āāᵀ] and G = E[ggᵀ] over a batch of ā (B, I+1) and g (B, O) (arXiv 1503.05671, eq. 1)."""
    return inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)


def trust_region_step_size(quadratic_form: Tensor, trust_region: Tensor | float, max_step_size: float) -> Tensor:
    """η = min(η_max, √(2δ / Δᵀ F̂ Δ)) (arXiv 1708.05144, section 3.2), so that η²/2 Δᵀ F̂ Δ is at most δ."""
    form = quadratic_form.clamp(min=1e-30)  # 0 where there is nothing left to learn; rounding may make it negative
    return (2 * trust_region / form).sqrt().clamp(max=max_step_size)


class KFACBatch(NamedTuple):
    """A rollout; first dimension B. States are encoded observations."""

    states: Tensor
    actions: Tensor
    advantages: Tensor
    returns: Tensor


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl")


def actor_gradients(agent: ActorCritic, batch: KFACBatch, noise: Tensor, ent_coef: float) -> tuple:
    """Loss gradients and Fisher factors of the policy; `noise` (B, A) makes the actions of the Fisher matrix.

    Returns the gradient (O, I+1) of each Linear layer, behind them that of log σ if there is one; A, G, A, G, …
    of the layers; the loss −E[Â log π(a|s)] and the entropy; log π(a|s) (B,).
    """
    output, inputs, outputs = layer_by_layer(agent.actor, batch.states)

    def log_prob_and_entropy(actions):
        if agent.discrete:
            return categorical_log_prob_and_entropy(output, actions)
        return gaussian_log_prob_and_entropy(output, agent.log_std, actions)

    log_probs, entropy = log_prob_and_entropy(batch.actions)
    policy_loss, entropy = -(log_probs * batch.advantages).mean(), entropy.mean()
    log_std = [] if agent.discrete else [agent.log_std]
    gradients = torch.autograd.grad(policy_loss - ent_coef * entropy, outputs + log_std, retain_graph=True)
    drawn = output.detach() + noise
    own_log_probs, _ = log_prob_and_entropy(drawn.argmax(-1) if agent.discrete else drawn)
    scores = torch.autograd.grad(own_log_probs.sum(), outputs)
    factors = [factor for a, g in zip(inputs, scores) for factor in kronecker_factors(a, g)]
    gradients = [g.T @ a for g, a in zip(gradients, inputs)] + list(gradients[len(inputs) :])
    return gradients, factors, policy_loss.detach(), entropy.detach(), log_probs.detach()


def critic_gradients(agent: ActorCritic, batch: KFACBatch) -> tuple:
    """Gradients of E[(V − R̂)²]/2 and Gauss-Newton factors of the critic, as of the actor; and E[(V − R̂)²]."""
    values, inputs, outputs = layer_by_layer(agent.critic, batch.states)
    slopes = torch.autograd.grad(values.sum(), outputs)
    errors = values.detach() - batch.returns.unsqueeze(-1)
    gradients = [(errors * g).T @ a / len(a) for g, a in zip(slopes, inputs)]
    factors = [factor for a, g in zip(inputs, slopes) for factor in kronecker_factors(a, g)]
    return gradients, factors, errors.square().mean()


def gradients_and_factors(agent: ActorCritic, batch: KFACBatch, noise: Tensor, ent_coef: float) -> tuple:
    """Gradients and factors of the actor, those of the critic, the losses as in METRICS; lists all; log π(a|s) (B,)."""
    actor, actor_factors, policy_loss, entropy, log_probs = actor_gradients(agent, batch, noise, ent_coef)
    critic, critic_factors, value_loss = critic_gradients(agent, batch)
    return actor, actor_factors, critic, critic_factors, [policy_loss, value_loss, entropy], log_probs


def linear_layers(network: nn.Sequential) -> list[nn.Linear]:
    """The layers with curvature, from the input on."""
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def make_curvature(agent: ActorCritic) -> nn.ModuleList:
    """The KroneckerFactors of the actor's Linear layers, and those of the critic's."""
    networks = (agent.actor, agent.critic)
    return nn.ModuleList(nn.ModuleList(map(KroneckerFactors, linear_layers(network))) for network in networks)


def natural_direction(curvature: nn.ModuleList, gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Δ of each Linear layer of a network, (O, I+1), and Δᵀ F̂ Δ of them all."""
    steps = [layer.precondition(gradient) for layer, gradient in zip(curvature, gradients)]
    return steps, sum(layer.quadratic_form(step) for layer, step in zip(curvature, steps))


def take_step(network: nn.Sequential, steps: list[Tensor], size: Tensor) -> None:
    """θ ← θ − η Δ."""
    for layer, step in zip(linear_layers(network), steps):
        layer.weight -= size * step[:, :-1]
        layer.bias -= size * step[:, -1]


@torch.no_grad()
def kfac_update(agent, curvature, batch: KFACBatch, annealed: float, args: Args, measure: Callable) -> Tensor:
    """One step of both networks on a rollout; returns METRICS, η of the actor and η of the critic.

    `curvature` is of make_curvature(agent); `annealed` multiplies both step sizes; `measure` is
    gradients_and_factors, compiled or not.
    """
    advantages = batch.advantages
    if args.normalize_advantages and len(advantages) > 1:
        batch = batch._replace(advantages=(advantages - advantages.mean()) / (advantages.std() + 1e-8))
    noise = agent.draw_noise(len(batch.states))
    with torch.enable_grad():
        *lists, log_probs = measure(agent, batch, noise, args.ent_coef)
    if dist.is_initialized():
        averages = iter(average_all([x for tensors in lists for x in tensors]))
        lists = [[next(averages) for _ in tensors] for tensors in lists]
    gradients, factors, critic_gradients, critic_factors, losses = lists
    for layers, pairs in zip(curvature, (factors, critic_factors)):
        for layer, A, G in zip(layers, pairs[::2], pairs[1::2]):
            layer.update(A, G, args)

    steps, form = natural_direction(curvature[0], gradients)
    if not agent.discrete:
        log_std_step = gradients[-1] / (2 + args.damping)
        form = form + 2 * log_std_step.square().sum()
    size = annealed * trust_region_step_size(form, args.trust_region, args.max_step_size)
    take_step(agent.actor, steps, size)
    if not agent.discrete:
        agent.log_std -= size * log_std_step

    steps, form = natural_direction(curvature[1], critic_gradients)
    critic_trust_region = args.critic_trust_region * losses[METRICS.index("value_loss")]
    critic_size = annealed * trust_region_step_size(form, critic_trust_region, args.max_step_size)
    take_step(agent.critic, steps, critic_size)

    new_log_probs, _ = agent.log_prob_and_entropy(batch.states, batch.actions)
    kl = average(approximate_kl(new_log_probs - log_probs))
    return torch.stack([*losses, kl, size, critic_size])


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000
"""Environment steps between two points of losses/*, which are means over the updates since the last one."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    for name in ("trust_region", "critic_trust_region", "max_step_size", "damping"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be greater than 0")
    spaces = check_spaces(args, (Discrete, Box))
    agent = ActorCritic(*spaces, args.hidden_sizes, args.normalize_observations, args.log_std_init).to(device)
    curvature = make_curvature(agent).to(device)
    measure = compiled(gradients_and_factors, device) if args.compile else gradients_and_factors
    run = Run(args, rank, {"agent": agent, "curvature": curvature})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    actor = without_modules(agent.actor)  # a network that is not `mlp`'s has to act itself

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(np.asarray(x), dtype=dtype, device=device)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    discounted_return = torch.zeros(args.num_envs, device=device)
    metrics = []
    logged_step = run.step
    while run.step < args.total_timesteps and not run.interrupted():
        annealed = 1 - run.step / args.total_timesteps if args.anneal_step_size else 1.0

        # Collect T steps from every environment with the policy as it stands.
        rollout = []
        for noise in agent.draw_noise(args.num_steps, args.num_envs):
            actions = agent.sample(actor(agent.encode(tensor(obs, agent.observation_dtype))), noise)
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, agent.to_env(actions))
            rollout.append((acted_on, next_obs, actions.cpu(), rewards, terminated, truncated))
            run.step += args.num_envs * world_size
            run.log_episodes(infos)

        # Estimate advantages and returns; everything is (T, N).
        observations, next_observations, actions, rewards, terminated, truncated = zip(*rollout)
        observations = tensor(observations, agent.observation_dtype)
        next_observations = tensor(next_observations, agent.observation_dtype)
        actions, rewards = torch.stack(actions).to(device), tensor(rewards)
        terminated, truncated = tensor(terminated, torch.bool), tensor(truncated, torch.bool)
        if args.normalize_rewards:
            done = terminated | truncated
            discounted = discounted_returns(rewards, done, discounted_return, args.gamma)
            discounted_return = discounted[-1] * ~done[-1]
            agent.return_statistics.update(discounted.flatten())
            rewards = agent.return_statistics.scale(rewards)
        with torch.no_grad():
            states = agent.encode(observations)
            values, next_values = agent.value(states), agent.value(agent.encode(next_observations))
        advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update: one natural-gradient step of the policy, one of the critic.
        batch = KFACBatch(*(x.flatten(0, 1) for x in (states, actions, advantages, returns)))
        update_metrics = kfac_update(agent, curvature, batch, annealed, args, measure)
        metrics.append(torch.stack([values.mean(), explained_variance(values, returns), *update_metrics]))
        if agent.observation_statistics is not None:
            agent.observation_statistics.update(observations.flatten(0, 1))

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            *losses, size, critic_size = torch.stack(metrics).mean(0).tolist()
            losses = dict(zip(("values", "explained_variance", *METRICS), losses))
            run.log(losses, step_size=size, critic_step_size=critic_size)
            metrics, logged_step = [], run.step
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(agent)


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem
FLATTEN = "Flatten it with gymnasium.wrappers.FlattenObservation"


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings or, on --resume, the run's own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--resume")
    known, _ = early.parse_known_args(argv)
    defaults = Args(**{"env_id": known.env_id, **RECOMMENDED.get(known.env_id, {})})
    if known.resume:
        try:
            saved = json.loads((Path(known.resume) / "args.json").read_text())["args"]
            saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
            defaults = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"--resume {known.resume}: not the directory of a run of {ALGO}.py ({error})")
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    description = f"{__doc__.splitlines()[0]}\n\nRecommended settings, taken with --env-id alone:\n\n{table}"
    args = tyro.cli(Args, default=defaults, args=argv, description=description)
    if known.resume and replace(args, resume=None, total_timesteps=defaults.total_timesteps) != defaults:
        fail("--resume goes on with the run's own arguments; only --total-timesteps may be changed beside it")
    return args


def set_up(args: Args) -> tuple[int, int, torch.device]:
    """Seeds, threads, device; meets the other processes under torchrun. Returns (rank, world size, device)."""
    for name, value in asdict(args).items():
        if type(value) is int and value < 1 and name != "seed":
            fail(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed} must be from 0 to 2³² − 1")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if kind != "cpu" and not getattr(torch, kind).is_available():
        fail(f"--device {kind}: PyTorch {torch.__version__} finds no such device here; use --device auto")
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA's
    torch.set_num_threads(args.torch_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)  # neither is drawn from here: a checkpoint has PyTorch's state alone
    torch.manual_seed(args.seed)
    return rank, max(world_size, 1), torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)


def average(x: Tensor) -> Tensor:
    """Mean over the processes of torchrun; x itself where there is only one."""
    if not dist.is_initialized():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each over the processes of torchrun, in one message."""
    flat = average(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, a backward pass within the function included; on CUDA replayed as CUDA graphs."""
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # an older PyTorch splits the graph at autograd.grad
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not."""
    try:
        return gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {args.env_id}: {' '.join(str(error).split())}")


def check_spaces(args: Args, action_spaces: tuple[type, ...], hint: str = "") -> tuple[gym.Space, gym.Space]:
    """The environment's observation and action space; refuses what the networks cannot take."""
    env = make_env(args)
    env.close()
    if args.capture_video and "rgb_array" not in env.metadata["render_modes"]:
        fail(f"--capture-video: {args.env_id} cannot render to images")
    observation = ("observation", env.observation_space, (Discrete, Box), FLATTEN)
    for kind, space, allowed, way_out in (observation, ("action", env.action_space, action_spaces, hint)):
        if not isinstance(space, allowed) or (isinstance(space, Box) and len(space.shape) != 1):
            names = " or ".join("a one-dimensional Box" if x is Box else x.__name__ for x in allowed)
            message = f"{args.env_id} has the {kind} space {space}; {ALGO} needs {names}. {way_out}"
            fail(" ".join(message.split()))
    return env.observation_space, env.action_space


def make_envs(args: Args, num_envs: int, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """Environments that reset within the step that ends an episode: no step is spent on a reset."""

    def make(index: int) -> gym.Env:
        if video_dir is None or index > 0:
            return make_env(args)
        return gym.wrappers.RecordVideo(make_env(args, render_mode="rgb_array"), str(video_dir))

    envs = [lambda index=index: make(index) for index in range(num_envs)]
    envs = gym.vector.SyncVectorEnv(envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def step_envs(envs: gym.vector.VectorEnv, actions: Tensor) -> tuple:
    """(observation to act on, observation reached, rewards, terminated, truncated, infos).

    The two observations differ where an episode ended: it reached its final one, and the next one has begun.
    """
    obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
    reached = obs
    if "final_obs" in infos:
        reached = obs.copy()
        for i in np.flatnonzero(infos["_final_obs"]):
            reached[i] = infos["final_obs"][i]
    if not (np.isfinite(rewards).all() and np.isfinite(reached).all()):
        fail("the environment gave a reward or observation that is not finite; the last checkpoint stays", code=1)
    return obs, reached, rewards, terminated, truncated, infos


class Run:
    """A run directory and all that goes into it: arguments, episodes, metrics, checkpoints, the exported policy.

    `modules` (anything with a state_dict) are what a checkpoint holds beside the counters and PyTorch's random state;
    one that is made later is not resumed, and begins differently in every process. Under torchrun only rank 0 writes.
    """

    def __init__(self, args: Args, rank: int, modules: dict):
        self.args, self.rank, self.modules, self.signals, self.stopped = args, rank, modules, [], False
        self.step, self.saved_step, self.seconds, self.monitor_size = 0, 0, 0.0, 0
        self.dir = Path(args.resume) if args.resume else None
        if args.resume:
            self.restore()
        elif rank == 0:
            self.dir = self.new_dir()
        self.start_step, self.start_time = self.step, time.time() - self.seconds
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if rank > 0:
            torch.manual_seed(args.seed + self.step + rank)
            return
        about = {"algo": ALGO, "args": asdict(replace(args, resume=None))}
        about["versions"] = {"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (torch, gym, np)}
        about["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        (self.dir / "args.tmp").write_text(json.dumps(about, indent=2) + "\n")
        os.replace(self.dir / "args.tmp", self.dir / "args.json")
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if args.resume else None)
        self.monitor = open(self.dir / "monitor.csv", "a", buffering=1)
        self.monitor.truncate(self.monitor_size)  # episodes after the checkpoint will be lived through again
        if self.monitor_size == 0:
            header = {"t_start": self.start_time, "env_id": args.env_id}
            self.monitor.write(f"#{json.dumps(header)}\nr,l,t\n")
            self.checkpoint()
        self.recent_returns = deque(maxlen=100)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", desc=args.env_id, mininterval=0.5)

    def new_dir(self) -> Path:
        """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}, or the first of …_1, …_2 that does not exist yet."""
        name = f"{self.args.env_id.replace('/', '-')}__{ALGO}__{self.args.seed}__{int(time.time())}"
        for n in itertools.count():
            path = Path(self.args.output_dir) / (f"{name}_{n}" if n else name)
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                pass
            except OSError as error:
                fail(f"--output-dir {self.args.output_dir}: {error}")

    def on_signal(self, number: int, frame) -> None:
        """Ctrl-C and SIGTERM let the iteration in progress end; a second one stops at once."""
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def interrupted(self) -> bool:
        """Whether this process, or another one under torchrun, was asked to stop."""
        self.stopped = average(torch.tensor(float(len(self.signals)))).item() > 0
        return self.stopped

    def checkpoint(self) -> None:
        """Writes checkpoint.pt under another name and renames it: whenever the process dies, a whole one is there."""
        if self.rank > 0:
            return
        weights = [x for module in self.modules.values() if isinstance(module, nn.Module) for x in module.parameters()]
        if not all(x.isfinite().all() for x in weights):
            fail(f"a weight is not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"step": self.step, "seconds": time.time() - self.start_time}
        state["monitor_size"] = (self.dir / "monitor.csv").stat().st_size
        state["rng"] = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save(state, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        self.saved_step = self.step

    def restore(self) -> None:
        """Loads checkpoint.pt into the modules, the counters and PyTorch's random state."""
        try:
            state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.step = self.saved_step = state["step"]
            self.seconds, self.monitor_size = state["seconds"], state["monitor_size"]
            torch.set_rng_state(state["rng"]["torch"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        except Exception as error:  # whatever is wrong with the file, it is no checkpoint of this run
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            fail(f"--resume {self.dir}: checkpoint.pt cannot be used ({reason})")

    def log_episodes(self, infos: dict) -> None:
        """Writes the episodes that ended in this step to monitor.csv and TensorBoard."""
        if self.rank > 0 or "episode" not in infos:
            return
        for i in np.flatnonzero(infos["_episode"]):
            episode_return, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            self.monitor.write(f"{episode_return:.6f},{length},{time.time() - self.start_time:.6f}\n")
            self.writer.add_scalar("charts/episodic_return", episode_return, self.step)
            self.writer.add_scalar("charts/episodic_length", length, self.step)
            self.recent_returns.append(episode_return)

    def log(self, losses: dict[str, float], **charts: float) -> None:
        """Writes losses/* and charts/* to TensorBoard and moves the progress bar; stops where a loss is not finite."""
        bad = ", ".join(name for name, value in losses.items() if not np.isfinite(value))
        if bad:
            fail(f"{bad} not finite at step {self.step}; the checkpoint of step {self.saved_step} stays", code=1)
        if self.rank > 0:
            return
        charts["SPS"] = (self.step - self.start_step) / (time.time() - self.start_time - self.seconds)
        for group, values in (("losses", losses), ("charts", charts)):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, self.step)
        if self.recent_returns:
            self.bar.set_postfix({"return": f"{np.mean(self.recent_returns):.1f}"}, refresh=False)
        self.bar.update(self.step - self.bar.n)

    def finish(self, policy: nn.Module) -> dict:
        """Last checkpoint; then, unless the run was interrupted, policy.pt2, the evaluation and the last two lines."""
        self.checkpoint()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank > 0:
            return {}
        self.bar.close()
        self.monitor.close()
        if self.stopped:
            print(f"stopped at step {self.step}; to go on: --resume {self.dir}", file=sys.stderr)
            raise SystemExit(130)
        export_policy(policy, self.dir / "policy.pt2")
        returns = evaluate(policy, self.args)
        self.writer.add_scalar("eval/episodic_return", returns.mean(), self.step)
        self.writer.close()
        print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
        print(f"run directory: {self.dir}")
        return {"run_dir": self.dir, "returns": returns}


@torch.no_grad()
def evaluate(policy: nn.Module, args: Args) -> np.ndarray:
    """Returns (eval_episodes,) of fresh episodes with the deterministic policy, each in its own environment.

    A policy with a memory would have to carry it on here, and in export_policy; one with dropout or BatchNorm, to be
    switched to eval() in both.
    """
    envs = make_envs(args, args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed + 1_000_000)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    device = next(policy.parameters()).device
    while running.any():
        actions = policy(torch.as_tensor(obs, dtype=policy.observation_dtype, device=device))
        obs, _, rewards, terminated, truncated, _ = step_envs(envs, actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def export_policy(policy: nn.Module, path: Path) -> None:
    """Saves `policy.forward` for the CPU: `torch.export.load(path).module()(obs)`, any batch size.

    The module's other weights, critics for instance, go into the file as well.
    """
    policy = copy.deepcopy(policy).cpu()
    example = torch.as_tensor(np.stack([policy.observation_space.sample()] * 2), dtype=policy.observation_dtype)
    program = torch.export.export(policy, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


if __name__ == "__main__":
    train(parse_args())
