"""DQN: deep Q-learning (Mnih et al. 2015), by default Double DQN (van Hasselt et al. 2016, arXiv 1509.06461).

Acts ε-greedily on Q_θ, keeps every transition in a replay buffer, and after every few steps takes gradient steps on
minibatches from it, towards targets from a copy Q_θ⁻ of the network that is renewed at intervals,

    y_t  = r_t + γ r_{t+1} + … + γᵐ⁻¹ r_{t+m−1} + γᵐ Q_θ⁻(s_{t+m}, a*)      no last term if s_{t+m} is terminal
    a*   = argmax_a Q_θ(s_{t+m}, a)                          Double DQN; plain DQN lets Q_θ⁻ choose as well
    L(θ) = E[ℓ(Q_θ(s_t, a_t) − y_t)]                         ℓ: Huber with threshold 1, or half the square

where m = n (`--n-step`), or less where the episode ends before. Details that matter, and why:
- Double DQN: the maximum over noisy estimates is too high; choosing with one network and judging with the other
  takes most of that out.
- A time limit is not a termination: a truncated step bootstraps from its true final observation.
- n-step targets are not corrected for the actions of older policies, so keep n small; a window ends with its episode
  and with the newest step in the buffer, and bootstraps from there.
- Huber and the bound on the gradient's norm: one surprising reward must not undo the network. But where outcomes
  differ by much more than 1, Huber finds something near their median, not their mean: then `--loss squared`.
- At a constant learning rate the greedy policy is good at one moment and bad at the next: `--anneal-lr` where the
  last one counts.
- Transitions lie in tensors that are allocated once; observations of uint8 stay uint8, others become float32.

Against Stable-Baselines3: the same update with `--no-double` (parameters agree to 1e-5 after many updates, n-step
windows included, tests/test_dqn.py); SB3 has no Double DQN, no Boltzmann exploration and no squared loss.

    python algos/dqn.py                              # CartPole-v1
    python algos/dqn.py --env-id Acrobot-v1          # with its recommended settings
    python algos/dqn.py --n-step 5 --exploration boltzmann --exploration-end 0.5
    python algos/dqn.py --resume runs/Acrobot-v1__dqn__1__…
    torchrun --nproc-per-node 2 algos/dqn.py         # data parallel: each process has its own environments and buffer
                                                     # (but after --resume all of them begin with rank 0's buffer)
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
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
    """environment steps, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks and the replay buffer live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradient with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, which hold the replay buffer too"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 1
    """parallel environments N (per process)"""

    # algorithm
    buffer_size: int = 100_000
    """transitions that the replay buffer holds (per process)"""
    learning_starts: int = 1_000
    """environment steps with random actions before the first update"""
    batch_size: int = 128
    """transitions per gradient step (per process)"""
    train_frequency: int = 4
    """steps of every environment between updates"""
    gradient_steps: int = 4
    """gradient steps per update, whatever the number of environments"""
    learning_rate: float = 6.3e-4
    """Adam's step size"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount γ"""
    n_step: int = 1
    """rewards n that a target sums before it bootstraps"""
    double: bool = True
    """let the network that is trained choose the target's action (Double DQN)"""
    loss: Literal["huber", "squared"] = "huber"
    """loss ℓ of a temporal difference"""
    max_grad_norm: float = 10.0
    """bound on the gradient's global norm"""
    target_frequency: int = 250
    """environment steps between updates of the target network, which come after a step of all environments"""
    tau: float = 1.0
    """share of the trained network in an update of the target network; 1 copies it"""
    exploration: Literal["epsilon", "boltzmann"] = "epsilon"
    """ε-greedy, or actions with a probability in proportion to exp(Q / temperature)"""
    exploration_start: float = 1.0
    """ε or temperature at the start"""
    exploration_end: float = 0.1
    """ε or temperature once --exploration-fraction of the run has passed"""
    exploration_fraction: float = 0.12
    """part of --total-timesteps over which it falls, linearly"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """ReLU layers of the network"""


# fmt: off
RECOMMENDED = {
    "CartPole-v1": dict(
        total_timesteps=50_000, train_frequency=64, gradient_steps=32, learning_rate=2e-3, anneal_lr=True, gamma=0.98,
        n_step=3, target_frequency=128, exploration_end=0.04, exploration_fraction=0.16, hidden_sizes=(128, 128)),
    "Acrobot-v1": dict(buffer_size=50_000, learning_starts=1),
    "MountainCar-v0": dict(
        total_timesteps=120_000, buffer_size=10_000, train_frequency=16, gradient_steps=8, learning_rate=4e-3,
        gamma=0.98, target_frequency=600, exploration_end=0.07, exploration_fraction=0.2),
    "LunarLander-v3": dict(buffer_size=50_000, learning_starts=1),
}
# fmt: on
"""Settings by environment id: `--env-id` alone takes them, an explicit flag wins."""


# Networks ---------------------------------------------------------------------------------------------------


def relu_mlp(sizes: list[int]) -> nn.Sequential:
    """ReLU layers of the given sizes, the last one linear; PyTorch's own initialisation."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def storage_dtype(space: gym.Space) -> torch.dtype:
    """What a replay buffer keeps of a space: uint8 as it is, an index as int64, other numbers as float32."""
    if isinstance(space, Discrete):
        return torch.int64
    return torch.uint8 if space.dtype == np.uint8 else torch.float32


class QNetwork(nn.Module):
    """Q(s, ·) for every action. `forward` is the greedy policy, from observations to what the environment takes.

    Observations are (…, D) float32 or uint8 for a Box, (…,) int64 for a Discrete space; actions indices from 0.
    """

    def __init__(self, observation_space, action_space, hidden_sizes):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_dtype = storage_dtype(observation_space)
        self.one_hot = isinstance(observation_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.network = relu_mlp([inputs, *hidden_sizes, int(action_space.n)])
        # The same tensors once more; whoever changes relu_mlp changes q_values too.
        self.layers = [(layer.weight, layer.bias) for layer in self.network if isinstance(layer, nn.Linear)]

    def encode(self, obs: Tensor) -> Tensor:
        """Observations → states (…, D): one-hot for a Discrete space."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        return obs.float()

    def q_values(self, obs: Tensor) -> Tensor:
        """Q(s, ·), shape (…, A): as from `network`, without the cost of calling its modules."""
        x = self.encode(obs)
        for weight, bias in self.layers[:-1]:
            x = F.linear(x, weight, bias).relu_()
        return F.linear(x, *self.layers[-1])

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices moved to the space's start."""
        return actions + int(self.action_space.start)

    def forward(self, obs: Tensor) -> Tensor:
        """The action of highest value."""
        return self.to_env(self.q_values(obs).argmax(-1))


# Replay -----------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Steps of an environment, first dimension B; each next observation is the one that its step truly led to.

    A one-step target needs `terminated` alone. An n-step target must not go on past `truncated` either, nor past the
    newest rows of a buffer: n_step_transitions of dqn.py.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    truncated: Tensor


class ReplayBuffer:
    """The newest transitions of N environments, in tensors that are allocated once.

    A step of all N environments takes N rows, and row i + N, modulo the capacity, is the step after row i's in the same
    environment; but the newest N rows, those before `position`, are followed by the oldest or by rows never written,
    which no flag marks. The capacity is the largest multiple of N up to what was asked for.
    """

    def __init__(self, capacity: int, num_envs: int, observation_space, action_space, device: torch.device):
        self.capacity, self.num_envs, self.position, self.size = capacity // num_envs * num_envs, num_envs, 0, 0
        observation = observation_space.shape, storage_dtype(observation_space)
        action = action_space.shape, torch.int64 if isinstance(action_space, Discrete) else torch.float32
        flag = (), torch.bool
        layout = Transitions(observation, action, ((), torch.float32), observation, flag, flag)
        needed = sum(self.capacity * int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)
        if self.capacity == 0:
            fail(f"--buffer-size {capacity} must be at least --num-envs {num_envs}")
        if needed > (free := free_memory(device)):
            fail(
                f"--buffer-size {capacity} needs {needed:,} bytes, and {device} has {free:,} free: choose a smaller one"
            )
        self.data = Transitions(*(torch.zeros(self.capacity, *shape, dtype=x, device=device) for shape, x in layout))

    def add(self, *transitions) -> None:
        """One step of all environments: the fields of Transitions, each (N, …)."""
        rows = slice(self.position, self.position + self.num_envs)
        for stored, new in zip(self.data, transitions, strict=True):
            if stored.is_cpu:
                stored.numpy()[rows] = new  # NumPy writes a few numbers faster than PyTorch
            else:
                stored[rows] = torch.as_tensor(new)
        self.position = (self.position + self.num_envs) % self.capacity
        self.size = min(self.size + self.num_envs, self.capacity)

    def draw_rows(self, batch_size: int) -> Tensor:
        """Rows (B,) drawn uniformly, with replacement."""
        return torch.randint(self.size, (batch_size,), device=self.data.rewards.device)

    def get(self, rows: Tensor) -> Transitions:
        """The transitions in rows (B,)."""
        return Transitions(*(stored.index_select(0, rows) for stored in self.data))

    def state_dict(self) -> dict:
        """The rows in use, and where the next ones go; the newest end an episode, as a resumed run begins new ones.

        What else a fork keeps has to be added here and below, as tensors or plain values: a checkpoint holds no more.
        """
        full = self.size == self.capacity
        state = {name: x if full else x[: self.size].clone() for name, x in self.data._asdict().items()}
        newest = (self.position - 1 - torch.arange(min(self.num_envs, self.size))) % self.capacity
        state["truncated"] = state["truncated"].index_put((newest,), ~state["terminated"][newest])
        return state | {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        for name, stored in self.data._asdict().items():
            stored[: len(state[name])] = state[name]
        self.position, self.size = state["position"], len(state["rewards"])


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The maths --------------------------------------------------------------------------------------------------


def linear_schedule(start: float, end: float, progress: float) -> float:
    """From start to end as `progress` goes from 0 to 1, and end from there on."""
    return start + (end - start) * min(progress, 1.0)


def epsilon_greedy(q_values: Tensor, epsilon: float) -> Tensor:
    """Actions (N,): with probability ε any, else the one of highest value; q_values (N, A)."""
    anything = torch.randint(q_values.shape[-1], q_values.shape[:-1], device=q_values.device)
    explore = torch.rand(q_values.shape[:-1], device=q_values.device) < epsilon
    return torch.where(explore, anything, q_values.argmax(-1))


def boltzmann(q_values: Tensor, temperature: float) -> Tensor:
    """Actions (N,) in proportion to exp(Q / temperature), by the Gumbel-max trick; q_values (N, A)."""
    gumbel = -torch.empty_like(q_values).exponential_().log()
    return (q_values / temperature + gumbel).argmax(-1)


def n_step_transitions(buffer: ReplayBuffer, rows: Tensor, n: int, gamma: float) -> tuple[Transitions, Tensor]:
    """Transitions over m steps from `rows` (B,), with r_t + … + γᵐ⁻¹ r_{t+m−1} for their reward, and γᵐ (B,).

    m = n, or less where the episode or the buffer ends before (Sutton & Barto 2018, eq. 7.1).
    """
    steps = torch.arange(n, device=rows.device)
    window = (rows.unsqueeze(1) + steps * buffer.num_envs) % buffer.capacity  # (B, n)
    newest = (buffer.position - 1 - window) % buffer.capacity < buffer.num_envs
    ends = (buffer.data.terminated[window] | buffer.data.truncated[window] | newest).int()
    counts = ends.cumsum(1) - ends == 0  # up to the first end, and with it
    length = counts.sum(1)
    last = buffer.get(window.gather(1, length.unsqueeze(1) - 1).squeeze(1))
    rewards = (buffer.data.rewards[window] * counts * gamma**steps).sum(1)
    first = buffer.get(rows)
    return last._replace(observations=first.observations, actions=first.actions, rewards=rewards), gamma**length


def q_target(rewards, terminated, discounts, next_target_q: Tensor, next_q: Tensor | None = None) -> Tensor:
    """y = r + γᵐ Q_θ⁻(s', a*), shape (B,), without the second term where s' is terminal.

    Q_θ⁻(s', ·) is `next_target_q` (B, A). a* is what `next_q`, Q_θ(s', ·), holds highest (Double DQN, the
    unnumbered equation of arXiv 1509.06461), or without it what Q_θ⁻ does (DQN, eq. 3 there).
    """
    choosing = next_target_q if next_q is None else next_q
    next_values = next_target_q.gather(1, choosing.argmax(1, keepdim=True)).squeeze(1)
    return rewards + discounts * next_values * ~terminated


METRICS = ("td_loss", "q_values")


def dqn_loss(network, target, batch: Transitions, discounts: Tensor | float, args: Args) -> tuple[Tensor, Tensor]:
    """The loss L(θ) of a minibatch, and METRICS (2,); discounts γᵐ are (B,), or one for all."""
    with torch.no_grad():
        next_q = network.q_values(batch.next_observations) if args.double else None
        next_target_q = target.q_values(batch.next_observations)
        targets = q_target(batch.rewards, batch.terminated, discounts, next_target_q, next_q)
    q_values = network.q_values(batch.observations).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
    loss = F.smooth_l1_loss(q_values, targets) if args.loss == "huber" else 0.5 * F.mse_loss(q_values, targets)
    return loss, torch.stack([loss, q_values.mean()]).detach()


def vector_adam(module: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam on all parameters of `module` as one vector (P,), of which they become views: a step is a few operations.

    Gradients reach the vector through `gradient_vector` and the function below it alone: after `loss.backward()` the
    optimiser's step moves nothing, and clipping the parameters' gradients clips nothing. The module has to be complete
    and on its device before; a parameter that is replaced or moved later is trained no more, without an error.
    """
    parameters = list(module.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    nn.utils.vector_to_parameters(vector.data, parameters)
    return torch.optim.Adam([vector], learning_rate, fused=True)


def gradient_vector(loss: Tensor, module: nn.Module) -> Tensor:
    """∇loss with respect to all parameters of `module`, each of which has to take part in it, as one vector (P,): its
    mean over the processes."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return average(torch.cat([x.flatten() for x in gradients]))


def adam_step(optimizer: torch.optim.Adam, gradient: Tensor) -> None:
    """One step of a `vector_adam`, down this gradient (P,): the kernel of `optimizer.step()`, and its state, by hand.

    The same bits, without what PyTorch does around the kernel for optimisers of many parameters. Weight decay, amsgrad
    and hooks are left out: for them, or for another optimiser, set the vector's .grad and call `optimizer.step()`.
    """
    group = optimizer.param_groups[0]
    vector, (beta1, beta2) = group["params"][0], group["betas"]
    state = optimizer.state[vector]
    if not state:
        state["step"] = torch.zeros((), device=vector.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(vector.data), torch.zeros_like(vector.data)
    steps = state["step"].add_(1)
    torch._fused_adam_(
        [vector.data],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [steps],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=0,
        amsgrad=False,
        maximize=False,
    )


def dqn_gradient(network, target, batch: Transitions, discounts: Tensor | float, args: Args) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch, of norm --max-grad-norm at most, and METRICS (2,)."""
    loss, metrics = dqn_loss(network, target, batch, discounts, args)
    gradient = gradient_vector(loss, network)
    return gradient * (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1), metrics


def dqn_update(network, target, optimizer, batch, discounts, args: Args, gradient_of=dqn_gradient) -> Tensor:
    """One gradient step on a minibatch, with a `vector_adam(network)`. Returns METRICS before it."""
    gradient, metrics = gradient_of(network, target, batch, discounts, args)
    adam_step(optimizer, gradient)
    return metrics


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """θ⁻ ← (1 − τ) θ⁻ + τ θ for every parameter; buffers, such as BatchNorm's, do not follow."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


# Training ---------------------------------------------------------------------------------------------------

LOG_EVERY = 1_000
"""Environment steps between two points of losses/*, which are means over the updates since the last one."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    spaces = check_spaces(args, (Discrete,), "For Box actions use ddpg.py, td3.py or sac.py.")
    if args.exploration_fraction <= 0:
        fail(f"--exploration-fraction {args.exploration_fraction} must be positive")
    if args.exploration == "boltzmann" and min(args.exploration_start, args.exploration_end) <= 0:
        fail("--exploration-start and --exploration-end are temperatures here and must be positive")
    network = QNetwork(*spaces, args.hidden_sizes).to(device)
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = vector_adam(network, args.learning_rate)
    gradient_of = compiled(dqn_gradient, device) if args.compile else dqn_gradient
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, *spaces, device)
    run = Run(args, rank, {"network": network, "target": target, "optimizer": optimizer, "buffer": buffer})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    metrics = []
    logged_step = run.step
    while run.step < args.total_timesteps and not run.interrupted():
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / args.total_timesteps)

        # Collect a few steps from every environment.
        for _ in range(args.train_frequency):
            progress = run.step / (args.exploration_fraction * args.total_timesteps)
            exploration = linear_schedule(args.exploration_start, args.exploration_end, progress)
            if run.step < args.learning_starts:
                actions = torch.randint(int(spaces[1].n), (args.num_envs,), device=device)
            else:
                with torch.no_grad():
                    q_values = network.q_values(torch.as_tensor(obs, dtype=network.observation_dtype, device=device))
                explore = epsilon_greedy if args.exploration == "epsilon" else boltzmann
                actions = explore(q_values, exploration)
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, network.to_env(actions))
            buffer.add(acted_on, actions, rewards, next_obs, terminated, truncated)
            step, run.step = run.step, run.step + args.num_envs * world_size
            run.log_episodes(infos)
            if step // args.target_frequency < run.step // args.target_frequency:
                polyak_update(target, network, args.tau)

        # Update on minibatches of everything in the buffer.
        if run.step > args.learning_starts:
            for _ in range(args.gradient_steps):
                rows = buffer.draw_rows(args.batch_size)
                if args.n_step == 1:
                    batch, discounts = buffer.get(rows), args.gamma
                else:
                    batch, discounts = n_step_transitions(buffer, rows, args.n_step, args.gamma)
                metrics.append(dqn_update(network, target, optimizer, batch, discounts, args, gradient_of).clone())

        # Log.
        if run.step - logged_step >= LOG_EVERY or run.step >= args.total_timesteps:
            losses = average(torch.stack(metrics).mean(0)).tolist() if metrics else []
            run.log(dict(zip(METRICS, losses)), exploration=exploration, learning_rate=optimizer.param_groups[0]["lr"])
            metrics, logged_step = [], run.step
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(network)


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
