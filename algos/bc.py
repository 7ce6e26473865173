"""Behavioural cloning: supervised learning of a policy from an expert's actions (Pomerleau 1988, "ALVINN").

Maximises the likelihood of what an expert π* does in the states that the expert itself visits,

    L(θ) = −E_{o ~ d^π*}[log π_θ(π*(o) | o)]

and keeps the weights that do best on a part of the demonstrations that was held out. What it cannot learn is how to
come back: an error of ε per step on the expert's states costs up to ε T² in T steps, as one mistake leads to states
that no demonstration shows (Ross and Bagnell 2010, theorem 2.1); dagger.py, which asks the expert there, pays ε T.
Details that matter, and why:
- Where experts do one thing or another (left or right around an obstacle), a Gaussian goes between them. `--head
  mixture` has K Gaussians and acts by the best of them; `--head autoregressive` cuts every dimension of the action
  into bins and gives each dimension's distribution from the ones before it.
- Where the expert remembers, one observation does not tell what it does: `--history K` shows the last K of them.
- `--noise` disturbs the expert's actions, not their labels: its corrections are then among the demonstrations
  (DART, Laskey et al. 2017, arXiv 1703.09327).
- Observations are standardised with the demonstrations' mean and deviation, which the exported policy contains.

The expert: `--expert` takes the policy.pt2 of any script here or a model of Stable-Baselines3 (.zip; loading one can
execute code that is in it). Without it one is trained by Stable-Baselines3 and kept in {output-dir}/experts.
`--dataset` takes a Minari dataset instead, and `--save-dataset` writes one (both need
`pip install "minari[hdf5]"`, and a download `"minari[hdf5,hf]"`).

    python algos/bc.py                                            # CartPole-v1; trains an expert first
    python algos/bc.py --env-id HalfCheetah-v5 --expert runs/HalfCheetah-v5__sac__1__…/policy.pt2
    python algos/bc.py --env-id HalfCheetah-v5 --dataset mujoco/halfcheetah/expert-v0 --head mixture
    python algos/bc.py --num-demonstrations 5 --noise 0.2 --save-dataset cartpole/noisy-v0
    torchrun --nproc-per-node 2 algos/bc.py                       # each process collects its own demonstrations
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
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
    total_timesteps: int = 10_000
    """the expert's environment steps to learn from, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the policy and the demonstrations live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradient with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in, and experts/"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, which hold the demonstrations too"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record the expert's episodes 0, 1, 8, 27, 64 … in the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 1
    """parallel environments N (per process)"""
    history: int = 1
    """newest observations K that the policy sees; before an episode's K-th, the first is repeated"""

    # demonstrations
    expert: str | None = None
    """policy.pt2 of a script here, or a model of Stable-Baselines3 (.zip, which can execute code); None trains one"""
    dataset: str | None = None
    """Minari dataset to learn from instead of an expert, by its id (downloaded where it is missing) or its path"""
    save_dataset: str | None = None
    """id to save the demonstrations under as a Minari dataset, such as cartpole/expert-v0"""
    num_demonstrations: int | None = None
    """episodes to learn from, over all environments and processes, where --total-timesteps gives more"""
    noise: float = 0.0
    """disturbs the expert: probability of a random action, or for a Box deviation in halves of the action's range"""
    expert_timesteps: int = 100_000
    """environment steps that an expert is trained for"""

    # algorithm
    head: Literal["gaussian", "mixture", "autoregressive"] = "gaussian"
    """distribution of Box actions"""
    components: int = 5
    """Gaussians of --head mixture"""
    bins: int = 31
    """bins per dimension of --head autoregressive"""
    holdout: float = 0.1
    """part of the demonstrations held out, the newest"""
    epochs: int = 200
    """times to go through the rest at most"""
    patience: int = 10
    """epochs without a better loss on the held-out part before it stops"""
    batch_size: int = 128
    """observations per gradient step (per process)"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """ReLU layers of the policy"""


# fmt: off
MUJOCO = dict(total_timesteps=50_000, batch_size=256, hidden_sizes=(256, 256))
RECOMMENDED = {
    "Pendulum-v1": dict(total_timesteps=20_000, expert_timesteps=10_000),
    **{f"{name}-v5": MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")},
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


class CategoricalHead(nn.Module):
    """π(a|o) over n actions, indices from 0."""

    def __init__(self, features: int, actions: int):
        super().__init__()
        self.logits = nn.Linear(features, actions)

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """log π(a|o) (B,); features (B, F), actions (B,)."""
        return -F.cross_entropy(self.logits(features), actions, reduction="none")

    def mode(self, features: Tensor) -> Tensor:
        """The likeliest action (B,)."""
        return self.logits(features).argmax(-1)


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(a; μ, σ²) of a diagonal Gaussian, summed over the last dimension, which all three share."""
    return -(0.5 * ((actions - mean) / log_std.exp()).square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


class GaussianHead(nn.Module):
    """N(μ(o), σ²), with one σ (A,) for all observations: its likeliest mean is least squares', weighted by 1/σ²."""

    def __init__(self, features: int, actions: int):
        super().__init__()
        self.mean = nn.Linear(features, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """log π(a|o) (B,); features (B, F), actions (B, A)."""
        return gaussian_log_prob(actions, self.mean(features), self.log_std)

    def mode(self, features: Tensor) -> Tensor:
        """The mean (B, A)."""
        return self.mean(features)


class MixtureHead(nn.Module):
    """Σ_k w_k(o) N(μ_k(o), σ_k(o)²) with K components (Bishop 1994, "Mixture density networks")."""

    def __init__(self, features: int, actions: int, components: int):
        super().__init__()
        self.shape = (components, actions)
        self.weights = nn.Linear(features, components)
        self.means, self.log_stds = (nn.Linear(features, components * actions) for _ in range(2))

    def components(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w (B, K), μ and log σ (B, K, A)."""
        means, log_stds = (x(features).unflatten(-1, self.shape) for x in (self.means, self.log_stds))
        return self.weights(features).log_softmax(-1), means, log_stds.clamp(-5, 2)

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """log π(a|o) (B,); features (B, F), actions (B, A)."""
        log_weights, means, log_stds = self.components(features)
        return (log_weights + gaussian_log_prob(actions.unsqueeze(1), means, log_stds)).logsumexp(-1)

    def mode(self, features: Tensor) -> Tensor:
        """The mean of the component that is highest at its mean (B, A)."""
        log_weights, means, log_stds = self.components(features)
        best = (log_weights - log_stds.sum(-1)).argmax(-1)
        return means.gather(1, best[:, None, None].expand(-1, 1, self.shape[1])).squeeze(1)


class AutoregressiveHead(nn.Module):
    """Π_i π(a_i | a_1 … a_{i−1}, o), each over equal bins of [−1, 1]; any joint distribution, but for their width."""

    def __init__(self, features: int, actions: int, bins: int):
        super().__init__()
        self.register_buffer("before", torch.ones(actions, actions).tril(-1))  # what dimension i is given
        self.register_buffer("which", torch.eye(actions))
        self.register_buffer("centres", (2 * torch.arange(bins) + 1) / bins - 1)
        self.network = relu_mlp([features + 2 * actions, 64, bins])

    def logits(self, features: Tensor, actions: Tensor) -> Tensor:
        """Of every dimension's bins (B, A, bins); that of dimension i sees only actions before it."""
        size = len(self.which)
        given = actions.unsqueeze(1) * self.before
        which = self.which.expand(len(actions), size, size)
        return self.network(torch.cat([features.unsqueeze(1).expand(-1, size, -1), given, which], -1))

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """log of the probability of the actions' bins (B,); features (B, F), actions (B, A)."""
        bins = ((actions.clamp(-1, 1) + 1) / 2 * len(self.centres)).long().clamp(max=len(self.centres) - 1)
        given = self.centres[bins]
        return -F.cross_entropy(self.logits(features, given).transpose(1, 2), bins, reduction="none").sum(-1)

    def mode(self, features: Tensor) -> Tensor:
        """The centre of the likeliest bin (B, A), one dimension after the other."""
        actions = features.new_zeros(features.shape[0], len(self.which))
        for i in range(len(self.which)):
            chosen = self.centres[self.logits(features, actions)[:, i].argmax(-1)]
            actions = actions + chosen.unsqueeze(-1) * self.which[i]
        return actions


class ClonedPolicy(nn.Module):
    """π_θ(a|o). `forward` is its likeliest action, from observations to what the environment takes.

    Observations are (…, D) float32 or uint8 for a Box, (…,) int64 for a Discrete space. Within, they are standardised,
    and Box actions scaled: the space's bounds to [−1, 1] or, where it has none, three deviations about the mean.
    """

    def __init__(self, observation_space, action_space, args: Args):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_dtype = storage_dtype(observation_space)
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.trunk = nn.Sequential(*relu_mlp([inputs, *args.hidden_sizes]), nn.ReLU()) if args.hidden_sizes else None
        features = [inputs, *args.hidden_sizes][-1]
        if self.discrete:
            self.head = CategoricalHead(features, int(action_space.n))
            return
        size = action_space.shape[0]
        low, high = (torch.as_tensor(x, dtype=torch.float32) for x in (action_space.low, action_space.high))
        self.register_buffer("bounded", low.isfinite() & high.isfinite())
        self.register_buffer("low", torch.where(self.bounded, low, -1.0))
        self.register_buffer("high", torch.where(self.bounded, high, 1.0))
        self.head = {
            "gaussian": lambda: GaussianHead(features, size),
            "mixture": lambda: MixtureHead(features, size, args.components),
            "autoregressive": lambda: AutoregressiveHead(features, size, args.bins),
        }[args.head]()

    @torch.no_grad()
    def standardise(self, obs: Tensor, actions: Tensor) -> None:
        """Takes over the mean and deviation of observations (B, …), and of actions (B, A) where they have no bounds."""

        def moments(x: Tensor) -> tuple[Tensor, Tensor]:
            mean = average(x.mean(0))
            std = average((x - mean).square().mean(0)).sqrt()
            return mean, torch.where(std < 1e-6, 1.0, std)  # what never varied may do so later

        if not self.one_hot:
            self.mean, self.std = moments(obs.float())
        if not self.discrete:
            mean, std = moments(actions)
            self.low = torch.where(self.bounded, self.low, mean - 3 * std)
            self.high = torch.where(self.bounded, self.high, mean + 3 * std)

    def features(self, obs: Tensor) -> Tensor:
        """What the head is given (…, F)."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        x = (obs.float() - self.mean) / self.std
        return x if self.trunk is None else self.trunk(x)

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log π(a|o) (B,) of actions in the environment's units; a Box's density, or bins' mass, is of scaled ones."""
        if self.discrete:
            scaled = actions - int(self.action_space.start)
        else:
            scaled = 2 * (actions - self.low) / (self.high - self.low) - 1
        return self.head.log_prob(self.features(obs), scaled)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes: indices from the space's start, or numbers within its bounds."""
        if self.discrete:
            return actions + int(self.action_space.start)
        actions = self.low + (actions + 1) / 2 * (self.high - self.low)
        return torch.where(self.bounded, actions.clamp(self.low, self.high), actions)

    def forward(self, obs: Tensor) -> Tensor:
        """The likeliest action."""
        return self.to_env(self.head.mode(self.features(obs)))


# Demonstrations ---------------------------------------------------------------------------------------------


class Demonstration(NamedTuple):
    """Steps of an expert, first dimension B; actions are labels, what it would do. A dataset needs the rest."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    truncated: Tensor


class Demonstrations:
    """Steps of N environments, in tensors that are allocated once; row i + N follows row i in time."""

    def __init__(self, rows: int, num_envs: int, observation_space, action_space, device: torch.device):
        self.num_envs, self.size = num_envs, 0
        observation = observation_space.shape, storage_dtype(observation_space)
        action = action_space.shape, torch.int64 if isinstance(action_space, Discrete) else torch.float32
        flag = (), torch.bool
        layout = Demonstration(observation, action, ((), torch.float32), observation, flag, flag)
        needed = sum(rows * int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)
        if needed > (free := free_memory(device)):
            fail(f"--total-timesteps needs {needed:,} bytes for {rows} rows, and {device} has {free:,} free")
        self.allocated = Demonstration(*(torch.zeros(rows, *shape, dtype=x, device=device) for shape, x in layout))

    @property
    def data(self) -> Demonstration:
        """The rows so far."""
        return Demonstration(*(x[: self.size] for x in self.allocated))

    def add(self, step: Demonstration) -> None:
        """One step of all environments, each field (N, …)."""
        for stored, new in zip(self.allocated, step):
            stored[self.size : self.size + self.num_envs] = torch.as_tensor(new)
        self.size += self.num_envs

    def state_dict(self) -> dict:
        """The rows so far; the newest end an episode, as a resumed run begins new ones."""
        state = {name: x.clone() for name, x in self.data._asdict().items()}
        state["truncated"][-self.num_envs :] = ~state["terminated"][-self.num_envs :]
        return state

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        self.size = len(state["rewards"])
        for name, stored in self.allocated._asdict().items():
            stored[: self.size] = state[name]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def show_history(args: Args, history: int) -> None:
    """Makes this process's environments of the id give their last `history` observations, flattened, oldest first."""
    spec = gym.registry[make_env(args).spec.id]
    names = ("FrameStackObservation", "FlattenObservation")
    wrappers = tuple(x for x in spec.additional_wrappers if x.name not in names)  # without those of a run before
    if history > 1:
        stack, flatten = (getattr(gym.wrappers, name) for name in names)
        wrappers += stack.wrapper_spec(stack_size=history, padding_type="reset"), flatten.wrapper_spec()
    spec.additional_wrappers = wrappers


# The maths --------------------------------------------------------------------------------------------------


def bc_gradient(policy: ClonedPolicy, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """∇L(θ) on a minibatch of observations (B, …) and the expert's actions (B, …), and the loss."""
    loss = -policy.log_prob(obs, actions).mean()
    return gradient_vector(loss, policy), loss.detach()


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


def vector_step(optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
    """One step of an optimiser of one vector (P,), down this gradient."""
    optimizer.param_groups[0]["params"][0].grad = gradient
    optimizer.step()


def fit(
    policy: ClonedPolicy, optimizer, obs: Tensor, actions: Tensor, args: Args, stop, gradient_of=bc_gradient
) -> dict:
    """Supervised learning on pairs (B, …) until the held-out loss stops falling, or `stop()`; keeps the best weights.

    Returns losses in nats per pair: of the last epoch, the best held-out one, and the epochs that it took.
    """
    policy.standardise(obs, actions)
    size = len(obs) - max(1, int(args.holdout * len(obs)))
    steps = math.ceil(average(torch.tensor(float(size))).item() / args.batch_size)  # the same in every process
    best, best_epoch, best_weights, loss = math.inf, 0, copy.deepcopy(policy.state_dict()), torch.tensor(0.0)
    for epoch in tqdm(range(args.epochs), desc="cloning", unit="epoch", leave=False, disable=None):  # on a terminal
        if stop():
            break
        order, losses = torch.randperm(size, device=obs.device), []
        for i in range(steps):
            rows = order[torch.arange(i * args.batch_size, (i + 1) * args.batch_size, device=obs.device) % size]
            gradient, batch_loss = gradient_of(policy, obs[rows], actions[rows])
            vector_step(optimizer, gradient)
            losses.append(batch_loss.clone())
        loss = average(torch.stack(losses).mean())
        with torch.no_grad():
            chunks = zip(obs[size:].split(4096), actions[size:].split(4096))
            held_out = average(-torch.cat([policy.log_prob(*chunk) for chunk in chunks]).mean()).item()
        if held_out < best:
            best, best_epoch, best_weights = held_out, epoch, copy.deepcopy(policy.state_dict())
        if epoch - best_epoch >= args.patience or not math.isfinite(held_out):
            break
    if math.isfinite(loss.item()):
        policy.load_state_dict(best_weights)
    return {"log_loss": loss.item(), "held_out_log_loss": best, "epochs": best_epoch + 1}


# The expert -------------------------------------------------------------------------------------------------

Expert = Callable[[np.ndarray], np.ndarray]
"""Observations (N, …) → actions (N, …), as the environment gives and takes them."""


def checked_archive(path: Path) -> io.BytesIO:
    """A copy of a policy.pt2 that holds tensors and a graph of PyTorch's operators; an error where it holds more.

    torch.export.load by itself unpickles parts of an archive and evaluates strings in it.
    """

    def checked(value, key: str = ""):
        if isinstance(value, dict):
            return {checked(k): {} if k == "metadata" else checked(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [checked(x, key) for x in value]
        allowed = {
            "expr_str": r"s\d+|Symbol\('s\d+'(, \w+=True)*\)",
            "target": r"torch\.ops\.aten\.(?!from_file)\w+\.\w+",
            "in_spec": r'(null|type|context|children_spec|builtins\.(tuple|dict|list)|[\s\d\[\]{}",:\\])*',
        }
        allowed["out_spec"] = allowed["in_spec"]
        if isinstance(value, str) and not re.fullmatch(allowed.get(key, r"[\w.+]*"), value):
            raise ValueError(f"it holds {value[:40]!r}")
        if key == "use_pickle" and value is not False:
            raise ValueError("it holds a pickle")
        return value

    copied = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copied, "w") as copy_:
        for name in archive.namelist():
            data, inner = archive.read(name), name.partition("/")[2]
            if re.fullmatch(r"models/model\.json|data/(weights|constants)/model_\w+_config\.json", inner):
                data = json.dumps(checked(json.loads(data))).encode()
            elif inner == "data/sample_inputs/model.pt":
                example = torch.load(io.BytesIO(data), weights_only=True)
                torch.save(example, buffer := io.BytesIO())
                data = buffer.getvalue()
            elif not re.fullmatch(
                r"data/(weights/weight|constants/tensor)_\d+|[\w./]*(version|serialization_id|format|byteorder)", inner
            ):
                raise ValueError(f"it holds {inner[:40]!r}")
            copy_.writestr(name, data)
    copied.seek(0)
    return copied


def load_expert(args: Args, path: Path, spaces: tuple[gym.Space, gym.Space]) -> Expert:
    """The deterministic policy in a policy.pt2 or in a model of Stable-Baselines3 (.zip), or one line why not."""
    observation_space, action_space = spaces
    try:
        expert = load_sb3(path) if path.suffix == ".zip" else load_policy(path, storage_dtype(observation_space))
        obs = np.stack([observation_space.sample() for _ in range(2)])
        actions = expert(obs)
        fits = len(actions) == 2 and all(np.shape(x) == action_space.shape for x in actions)
        if not fits or (isinstance(action_space, Discrete) and not all(map(action_space.contains, actions))):
            raise ValueError(f"its actions are not {action_space}")
        return expert
    except Exception as error:  # whatever is wrong with the file, it is no expert for this environment
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        fail(f"--expert {path} cannot be used for {args.env_id} ({reason})")


def load_policy(path: Path, dtype: torch.dtype) -> Expert:
    """The policy of a policy.pt2; nothing that the file might hold is executed."""
    policy = torch.export.load(checked_archive(path)).module()

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        return policy(torch.as_tensor(obs, dtype=dtype)).numpy()

    return act


def load_sb3(path: Path) -> Expert:
    """The deterministic policy of a model of Stable-Baselines3."""
    import stable_baselines3

    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("data"))
    kind = about["policy_class"]["__module__"].split(".")[1]
    names = {"dqn": "DQN", "td3": "TD3", "sac": "SAC", "common": "PPO" if "clip_range" in about else "A2C"}
    model = getattr(stable_baselines3, names[kind]).load(path, device="cpu")
    return lambda obs: model.predict(obs, deterministic=True)[0]


def train_expert(args: Args, path: Path, spaces: tuple[gym.Space, gym.Space]) -> None:
    """Trains Stable-Baselines3's PPO (Discrete actions) or SAC, writes the model to `path` and its return beside it."""
    try:
        from stable_baselines3 import PPO, SAC
    except ImportError:
        fail("training an expert needs stable-baselines3: pip install stable-baselines3, or give one with --expert")
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    class Progress(BaseCallback):
        def _on_step(self) -> bool:
            bar.update(min(self.num_timesteps, bar.total) - bar.n)
            return True

    env_id = make_env(args).spec.id
    if isinstance(spaces[1], Discrete):
        settings = dict(n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98)
        schedules = {
            name: lambda remaining, x=x: remaining * x for name, x in (("learning_rate", 1e-3), ("clip_range", 0.2))
        }
        model = PPO("MlpPolicy", make_vec_env(env_id, 8, seed=1), seed=1, device="cpu", **settings, **schedules)
    else:
        model = SAC("MlpPolicy", make_vec_env(env_id, 1, seed=1), learning_rate=1e-3, seed=1, device="cpu")
    with tqdm(total=args.expert_timesteps, unit="step", desc=f"expert for {args.env_id}") as bar:
        model.learn(args.expert_timesteps, callback=Progress())
    mean, std = evaluate_policy(model, make_vec_env(env_id, 1, seed=2), n_eval_episodes=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"return": mean, "std": std, "episodes": 10}) + "\n")
    model.save(path.with_suffix(".tmp.zip"))
    os.replace(path.with_suffix(".tmp.zip"), path)
    tqdm.write(f"expert for {args.env_id}: {mean:.2f} ± {std:.2f} over 10 episodes, kept in {path}", file=sys.stderr)


@torch.random.fork_rng()  # Stable-Baselines3 seeds the whole process
def find_expert(args: Args, rank: int, spaces: tuple[gym.Space, gym.Space]) -> Expert:
    """The expert of --expert, or the one that was trained before, or one trained now."""
    if args.expert is not None:
        if not Path(args.expert).is_file():
            fail(f"--expert {args.expert}: no such file")
        if args.expert.endswith(".zip"):
            tqdm.write(f"loading {args.expert}, which can execute code that is in it", file=sys.stderr)
        return load_expert(args, Path(args.expert), spaces)
    path = Path(args.output_dir) / "experts" / f"{args.env_id.replace('/', '-').replace(':', '-')}.zip"
    if rank == 0 and not path.exists():
        train_expert(args, path, spaces)
    if dist.is_initialized():
        dist.barrier()  # until rank 0 has it
    return load_expert(args, path, spaces)


def disturbed(actions: np.ndarray, action_space: gym.Space, noise: float) -> np.ndarray:
    """What is done instead of the expert's actions (N, …): see --noise."""
    if noise == 0:
        return actions
    if isinstance(action_space, Discrete):
        others = action_space.start + torch.randint(int(action_space.n), (len(actions),)).numpy()
        return np.where(torch.rand(len(actions)).numpy() < noise, others, actions)
    half_range = (action_space.high - action_space.low) / 2
    deviation = noise * np.where(np.isfinite(half_range), half_range, 1)
    noisy = actions + deviation * torch.randn(actions.shape).numpy()
    return noisy.clip(action_space.low, action_space.high).astype(action_space.dtype)


# Minari -----------------------------------------------------------------------------------------------------


def import_minari():
    """The package minari, or one line how to get it."""
    try:
        import minari

        return minari
    except ImportError:
        fail('--dataset and --save-dataset need Minari: pip install "minari[hdf5]"')


def dataset_episodes(args: Args, spaces: tuple[gym.Space, gym.Space]) -> Iterator:
    """The episodes of --dataset (minari.EpisodeData), if their observations and actions are the environment's."""
    minari, path = import_minari(), Path(args.dataset)
    try:
        if path.exists():
            dataset = minari.MinariDataset(path / "data" if (path / "data").exists() else path)
        else:
            dataset = minari.load_dataset(args.dataset, download=True)
    except Exception as error:  # its own, h5py's, or the network's
        fail(f"--dataset {args.dataset} cannot be had ({' '.join(str(error).split())[:200]})")
    for ours, theirs in zip(spaces, (dataset.observation_space, dataset.action_space)):
        kinds = {(type(space), space.shape, getattr(space, "n", None)) for space in (ours, theirs)}
        if len(kinds) > 1:
            fail(f"--dataset {args.dataset} has {theirs}, where {args.env_id} has {ours}")
    return dataset.iterate_episodes()


def stacked(obs: np.ndarray, history: int) -> np.ndarray:
    """Observations (T, D) → the last `history` ones at every time, oldest first (T, history · D)."""
    if history == 1:
        return obs
    times = np.arange(len(obs))[:, None] + np.arange(1 - history, 1)
    return obs[times.clip(min=0)].reshape(len(obs), -1)


def save_dataset(args: Args, demonstrations: Demonstrations) -> None:
    """Writes the demonstrations as the Minari dataset --save-dataset; actions are the labels, --noise or not."""
    minari, episodes = import_minari(), []
    from minari.data_collector import EpisodeBuffer

    if args.save_dataset in minari.list_local_datasets():
        return  # a resumed run has written it before
    for i in range(demonstrations.num_envs):
        of_env = Demonstration(*(x[i :: demonstrations.num_envs].cpu().numpy() for x in demonstrations.data))
        ends = np.flatnonzero(of_env.terminated | of_env.truncated) + 1
        for steps in zip(*(np.split(x, ends) for x in of_env)):
            steps = Demonstration(*steps)
            if len(steps.rewards) == 0:
                continue
            obs = np.concatenate([steps.observations, steps.next_observations[-1:]])
            if args.history > 1:
                obs = obs.reshape(len(obs), args.history, -1)[:, -1]
            truncated = steps.truncated.copy()
            truncated[-1] |= not steps.terminated[-1]  # where the demonstrations end
            episodes.append(
                EpisodeBuffer(None, None, None, obs, steps.actions, steps.rewards, steps.terminated, truncated)
            )
    about = dict(algorithm_name="the expert of bc.py", description=f"Demonstrations with --noise {args.noise}")
    about |= dict(author="unknown", author_email="unknown", code_permalink="unknown")  # or it asks for them
    env_id = make_env(args).spec.id
    minari.create_dataset_from_buffers(args.save_dataset, episodes, env=env_id, eval_env=env_id, **about)


# Training ---------------------------------------------------------------------------------------------------


def expert_steps(expert: Expert, args: Args, run, rank: int) -> Iterator[tuple[Demonstration, dict]]:
    """What an expert does in the environments, its own actions for labels whatever --noise makes of them."""
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)
    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    size = envs.single_observation_space.shape[0] // args.history if args.history > 1 else None
    try:
        while True:
            actions = expert(obs if size is None else obs[:, -size:])
            done_instead = torch.as_tensor(disturbed(actions, envs.single_action_space, args.noise))
            acted_on = obs
            obs, next_obs, rewards, terminated, truncated, infos = step_envs(envs, done_instead)
            yield Demonstration(acted_on, actions, rewards, next_obs, terminated, truncated), infos
    finally:
        envs.close()


def dataset_steps(episodes: Iterator, args: Args) -> Iterator[tuple[Demonstration, dict]]:
    """The transitions of a Minari dataset, one after the other."""
    for episode in episodes:
        obs, length = stacked(episode.observations, args.history), len(episode.rewards)
        for t in range(length):
            flags = episode.terminations[t : t + 1], episode.truncations[t : t + 1]
            ended = flags[0] | flags[1]
            infos = {"episode": {"r": [episode.rewards.sum()], "l": [length]}, "_episode": ended} if ended.any() else {}
            now, then = slice(t, t + 1), slice(t + 1, t + 2)
            yield Demonstration(obs[now], episode.actions[now], episode.rewards[now], obs[then], *flags), infos


def check_arguments(args: Args) -> None:
    """Refuses what no run can be made of."""
    if not 0 < args.holdout < 1:
        fail(f"--holdout {args.holdout} must be between 0 and 1")
    if args.noise < 0:
        fail(f"--noise {args.noise} must not be negative")
    if args.dataset and (args.num_envs > 1 or dist.is_initialized()):
        fail(f"--dataset {args.dataset} is read as one environment's, by one process: --num-envs 1, without torchrun")
    if args.save_dataset:
        minari = import_minari()
        try:
            taken = args.save_dataset in minari.list_local_datasets()
            minari.dataset.minari_dataset.parse_dataset_id(args.save_dataset)
        except ValueError as error:
            fail(f"--save-dataset {args.save_dataset}: {' '.join(str(error).split())}")
        if taken and not args.resume:
            fail(f"--save-dataset {args.save_dataset}: there is one already; choose another id")


LOG_EVERY = 1_000
"""Environment steps between two points of charts/* while the expert acts."""


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    check_arguments(args)
    show_history(args, 1)
    spaces = check_spaces(args, (Discrete, Box))
    source = dataset_episodes(args, spaces) if args.dataset else find_expert(args, rank, spaces)
    if args.history > 1:
        if not isinstance(spaces[0], Box):
            fail(f"--history {args.history} needs observations in a Box, and {args.env_id} has {spaces[0]}")
        show_history(args, args.history)
        spaces = check_spaces(args, (Discrete, Box))
    policy = ClonedPolicy(*spaces, args).to(device)
    optimizer = vector_adam(policy, args.learning_rate)
    gradient_of = compiled(bc_gradient, device) if args.compile else bc_gradient
    rows = -(-args.total_timesteps // (args.num_envs * world_size)) * args.num_envs
    demonstrations = Demonstrations(rows, args.num_envs, *spaces, device)
    counter = nn.Module()  # a module, so that a checkpoint holds it
    for name in ("episodes", "fitted_at"):
        counter.register_buffer(name, torch.zeros((), dtype=torch.int64))
    modules = {"policy": policy, "optimizer": optimizer, "demonstrations": demonstrations, "counter": counter}
    run = Run(args, rank, modules)

    # Watch the expert.
    steps = dataset_steps(source, args) if args.dataset else expert_steps(source, args, run, rank)
    for _ in range(run.step if args.dataset else 0):
        next(steps, None)  # a resumed run has read these
    enough = math.inf if args.num_demonstrations is None else args.num_demonstrations
    logged_step = run.step
    while run.step < args.total_timesteps and counter.episodes < enough and not run.interrupted():
        step, infos = next(steps, (None, None))
        if step is None:
            break
        demonstrations.add(step)
        run.step += args.num_envs * world_size
        ended = torch.tensor(float((step.terminated | step.truncated).sum()))
        counter.episodes += round(average(ended).item() * world_size)  # the same in every process
        run.log_episodes(infos)
        if run.step - logged_step >= LOG_EVERY:
            run.log({}, demonstrations=counter.episodes.item())
            logged_step = run.step
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()
    steps.close()

    # Do as it does.
    if not run.stopped and counter.fitted_at != run.step:
        data = demonstrations.data
        losses = fit(policy, optimizer, data.observations, data.actions, args, run.interrupted, gradient_of)
        if not run.stopped:
            run.log(losses, demonstrations=counter.episodes.item())
            counter.fitted_at.fill_(run.step)
    result = run.finish(policy)
    show_history(args, 1)
    if args.save_dataset and rank == 0:
        save_dataset(args, demonstrations)
    return result


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
