"""DAgger: imitation from labels in the learner's own states (Ross, Gordon and Bagnell 2011, arXiv 1011.0686).

In iteration i = 1, 2, … (algorithm 3.1)

    act with        π_i = β_i π* + (1 − β_i) π̂_i     in every step: the expert π* with probability β_i, else the learner
    label           D ← D ∪ {(s, π*(s))}             for every state s that was visited, whoever acted
    learn           π̂_{i+1} = argmin_π Σ_{(s, a) ∈ D} ℓ(π(s), a)

The learner sees what its mistakes lead to, and what the expert would do there: an error of ε per step costs it of the
order of ε T in T steps, where cloning (bc.py) may pay ε T². It needs an expert that can be asked at any time.
Details that matter, and why:
- β_i = d^(i−1) with d = `--beta-decay`. For d = 0, the paper's parameter-free choice, the expert acts in the first
  iteration, which is behavioural cloning, and the learner alone from the second on.
- Data are aggregated, never thrown away: learning from the last iteration alone can go round in circles.
- Where a mistake ends the episode, an early learner lives, and spends its labels, in the few steps before its falls:
  on Hopper cloning needs fewer labels; on HalfCheetah, whose episodes go on, DAgger needs fewer (benchmarks/README.md).
- Labels cost: charts/labels counts them, one for every environment step.
- The loss ℓ is the cross-entropy for Discrete actions, and the square for a Box, whose bounds become [−1, 1].

- The last learner is exported and evaluated; the paper ends with the one that does best on validation.

The expert: `--expert` takes the policy.pt2 of any script here or a model of Stable-Baselines3 (.zip; loading one can
execute code that is in it). Without it one is trained by Stable-Baselines3 and kept in {output-dir}/experts.

    python algos/dagger.py                                        # CartPole-v1; trains an expert first
    python algos/dagger.py --env-id HalfCheetah-v5 --expert runs/HalfCheetah-v5__sac__1__…/policy.pt2
    python algos/dagger.py --beta-decay 0.7 --steps-per-iteration 500
    torchrun --nproc-per-node 2 algos/dagger.py                   # each process has its own environments and data
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

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
    """environment steps, each of which costs a label, over all environments and processes"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the policy and the data live; auto takes CUDA when there is one"""
    torch_threads: int = 1
    """CPU threads for PyTorch; one is fastest for networks this small"""
    compile: bool = False
    """compile the gradient with torch.compile (CUDA graphs on a GPU): pays in runs of several minutes"""
    output_dir: str = "runs"
    """folder that run directories are made in, and experts/"""
    resume: str | None = None
    """run directory to go on in, with its own arguments; only --total-timesteps may be changed, schedules go by it"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints, which hold the data too"""
    eval_episodes: int = 10
    """episodes of the final evaluation, with the deterministic policy"""
    capture_video: bool = False
    """record episodes 0, 1, 8, 27, 64 … of the first environment to the run directory's videos/"""

    # environment
    env_id: str = "CartPole-v1"
    """gymnasium environment; its recommended settings, where there are some, become the defaults"""
    num_envs: int = 1
    """parallel environments N (per process)"""

    # expert
    expert: str | None = None
    """policy.pt2 of a script here, or a model of Stable-Baselines3 (.zip, which can execute code); None trains one"""
    expert_timesteps: int = 100_000
    """environment steps that an expert is trained for"""

    # algorithm
    steps_per_iteration: int = 1_000
    """environment steps of an iteration, over all environments and processes"""
    beta_decay: float = 0.0
    """d in β_i = d^(i−1), the probability that the expert acts in a step of iteration i"""
    epochs: int = 20
    """times to go through all data in an iteration"""
    batch_size: int = 128
    """states per gradient step (per process)"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """ReLU layers of the policy"""


# fmt: off
MUJOCO = dict(total_timesteps=20_000, epochs=100, batch_size=256, hidden_sizes=(256, 256))
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


class Learner(nn.Module):
    """π̂(s): logits of Discrete actions, or an action in [−1, 1]^A. `forward` is the policy, for the environment.

    Observations are (…, D) float32 or uint8 for a Box, (…,) int64 for a Discrete space, and standardised within.
    """

    def __init__(self, observation_space, action_space, hidden_sizes):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.observation_dtype = storage_dtype(observation_space)
        self.one_hot, self.discrete = isinstance(observation_space, Discrete), isinstance(action_space, Discrete)
        inputs = int(observation_space.n) if self.one_hot else observation_space.shape[0]
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        if not self.discrete:
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))
        self.network = relu_mlp([inputs, *hidden_sizes, outputs])

    @torch.no_grad()
    def standardise(self, obs: Tensor) -> None:
        """Takes over the mean and deviation of observations (B, …)."""
        if not self.one_hot:
            self.mean = average(obs.float().mean(0))
            std = average((obs.float() - self.mean).square().mean(0)).sqrt()
            self.std = torch.where(std < 1e-6, 1.0, std)  # what never varied may do so later

    def outputs(self, obs: Tensor) -> Tensor:
        """Logits, or actions in [−1, 1] (…, A)."""
        if self.one_hot:
            obs = F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n))
        outputs = self.network((obs.float() - self.mean) / self.std)
        return outputs if self.discrete else outputs.tanh()

    def forward(self, obs: Tensor) -> Tensor:
        """The likeliest action, or the action."""
        outputs = self.outputs(obs)
        if self.discrete:
            return outputs.argmax(-1) + int(self.action_space.start)
        return (self.low + (outputs + 1) / 2 * (self.high - self.low)).clamp(self.low, self.high)


# The data ---------------------------------------------------------------------------------------------------


class LabelledStates:
    """D: observations and the expert's actions there, in tensors that are allocated once."""

    def __init__(self, rows: int, observation_space, action_space, device: torch.device):
        self.size = 0
        action_dtype = torch.int64 if isinstance(action_space, Discrete) else torch.float32
        layout = (observation_space.shape, storage_dtype(observation_space)), (action_space.shape, action_dtype)
        needed = sum(rows * int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout)
        if needed > (free := free_memory(device)):
            fail(f"--total-timesteps needs {needed:,} bytes for {rows} rows, and {device} has {free:,} free")
        self.allocated = [torch.zeros(rows, *shape, dtype=x, device=device) for shape, x in layout]

    @property
    def data(self) -> list[Tensor]:
        """Observations and actions so far."""
        return [x[: self.size] for x in self.allocated]

    def add(self, obs: np.ndarray, actions: np.ndarray) -> None:
        """Observations (N, …) and the expert's actions (N, …)."""
        for stored, new in zip(self.allocated, (obs, actions)):
            stored[self.size : self.size + len(new)] = torch.as_tensor(new)
        self.size += len(obs)

    def state_dict(self) -> dict:
        """What there is so far."""
        return dict(zip(("observations", "actions"), (x.clone() for x in self.data)))

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""
        self.size = len(state["actions"])
        for stored, old in zip(self.allocated, (state["observations"], state["actions"])):
            stored[: self.size] = old


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, by CUDA or Linux (a container's limit aside); else all that there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The maths --------------------------------------------------------------------------------------------------


def expert_probability(iteration: int, decay: float) -> float:
    """β_i = d^(i−1) for iteration i = 1, 2, …; 0⁰ is 1."""
    return decay ** (iteration - 1)


def imitation_loss(learner: Learner, obs: Tensor, actions: Tensor) -> Tensor:
    """ℓ on states (B, …) and the expert's actions there (B, …), in the environment's units."""
    outputs = learner.outputs(obs)
    if learner.discrete:
        return F.cross_entropy(outputs, actions - int(learner.action_space.start))
    return F.mse_loss(outputs, 2 * (actions - learner.low) / (learner.high - learner.low) - 1)


def dagger_gradient(learner: Learner, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """∇ℓ on a minibatch, and the loss."""
    loss = imitation_loss(learner, obs, actions)
    return gradient_vector(loss, learner), loss.detach()


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


# Training ---------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """Trains, evaluates and exports. Returns {"run_dir": Path, "returns": (eval_episodes,) of the evaluation}."""
    rank, world_size, device = set_up(args)
    if not 0 <= args.beta_decay <= 1:
        fail(f"--beta-decay {args.beta_decay} must be from 0 to 1")
    spaces = check_spaces(args, (Discrete, Box))
    if isinstance(spaces[1], Box) and not np.isfinite([spaces[1].low, spaces[1].high]).all():
        fail(f"{args.env_id} has the unbounded action space {spaces[1]}; {ALGO} needs bounds")
    learner = Learner(*spaces, args.hidden_sizes).to(device)
    optimizer = vector_adam(learner, args.learning_rate)
    gradient_of = compiled(dagger_gradient, device) if args.compile else dagger_gradient
    steps = -(-args.total_timesteps // (args.num_envs * world_size))
    data = LabelledStates(steps * args.num_envs, *spaces, device)
    expert = find_expert(args, rank, spaces)
    counter = nn.Module()  # a module, so that a checkpoint holds it
    counter.register_buffer("iterations", torch.zeros((), dtype=torch.int64))
    run = Run(args, rank, {"learner": learner, "optimizer": optimizer, "data": data, "counter": counter})
    envs = make_envs(args, args.num_envs, run.dir / "videos" if args.capture_video and rank == 0 else None)

    obs, _ = envs.reset(seed=args.seed + run.step + rank * args.num_envs)
    while run.step < args.total_timesteps and not run.interrupted():
        counter.iterations += 1
        beta = expert_probability(counter.iterations.item(), args.beta_decay)

        # Act with a mixture of expert and learner; the expert labels every state.
        end, disagreements = min(run.step + args.steps_per_iteration, args.total_timesteps), []
        while run.step < end:
            labels = expert(obs)
            with torch.no_grad():
                own = learner(torch.as_tensor(obs, dtype=learner.observation_dtype, device=device)).cpu().numpy()
            by_expert = (torch.rand(args.num_envs) < beta).numpy().reshape(-1, *[1] * (own.ndim - 1))
            disagreements.append((own != labels).mean() if learner.discrete else np.abs(own - labels).mean())
            data.add(obs, labels)
            actions = torch.as_tensor(np.where(by_expert, labels, own).astype(spaces[1].dtype))
            obs, *_, infos = step_envs(envs, actions)
            run.step += args.num_envs * world_size
            run.log_episodes(infos)

        # Learn from everything so far.
        states, labels = data.data
        learner.standardise(states)
        losses = []
        for _ in range(args.epochs):
            for rows in torch.randperm(data.size, device=device).split(args.batch_size):
                gradient, loss = gradient_of(learner, states[rows], labels[rows])
                vector_step(optimizer, gradient)
                losses.append(loss.clone())

        # Log.
        last = losses[-len(losses) // args.epochs :]
        metrics = {"imitation_loss": average(torch.stack(last).mean()).item(), "disagreement": np.mean(disagreements)}
        run.log(metrics, labels=run.step, beta=beta)
        if run.step - run.saved_step >= args.checkpoint_every:
            run.checkpoint()

    envs.close()
    return run.finish(learner)


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
