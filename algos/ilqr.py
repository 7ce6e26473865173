"""Trajectory optimisation with derivatives: LQR, iterative LQR, differential dynamic programming, Newton, gradient.

    min over u_0 … u_{T−1} of  J = Σ_t c(x_t, u_t) + c_T(x_T)   subject to  x_{t+1} = f(x_t, u_t),  low ≤ u_t ≤ high

Around a trajectory x̂, û, with F = ∇f, C = ∇²c and c = ∇c by (x, u), dynamic programming from the end gives

    Q_t = C_t + F_tᵀ V_{t+1} F_t + W_t        q_t = c_t + F_tᵀ (V_{t+1} f_t + v_{t+1})        W: second-order dynamics
    K_t = −Q_uu⁻¹ Q_ux                        k_t = −Q_uu⁻¹ q_u                               (the notes' Algorithm 19)

and forwards u_t = û_t + α k_t + K_t (x_t − x̂_t) is played, with α by line search (Algorithm 22). The methods:
- `lqr`: once, α = 1, W = 0: exact where f is linear and c quadratic. `ilqr` (Li & Todorov 2004): until J is least.
- `ddp` (Jacobson & Mayne 1970): W = v_{t+1} · ∇²f, and the true dynamics in the forward pass.
- `newton` by stages (Pantoja 1988; Dunn & Bertsekas 1989): W = λ_{t+1} · ∇²f with the costate λ = ∂J/∂x, and linear
  dynamics in the forward pass: Newton's step on all controls at once, in O(T). DDP only agrees near an optimum (v = λ).
- `gradient`: K = 0, k = −∂J/∂u / μ.
Details that matter:
- Bounds are part of the problem: a stage's k solves its quadratic program in the box, and K is 0 where k is at a bound
  (Tassa, Mansard & Todorov 2014). What is played is clipped, too.
- Q_uu + μ I is inverted. Where it is not positive definite, or no α lowers J, μ grows tenfold; else it falls.
- All α are tried at once, and the best is taken if it lowers J. Many first guesses are improved side by side.
- A step of MuJoCo is the environment's whole step; central differences of it take one call of mujoco.rollout. Joints
  are hinges and slides, so the tangent coordinates are differences of qpos.

    python algos/ilqr.py                                         # Pendulum-v1, planned anew at every step
    python algos/ilqr.py --no-replan                             # plans of 60 steps, played to their end
    python algos/ilqr.py --env-id InvertedDoublePendulum-v5      # the same, through MuJoCo
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_type_hints

import gymnasium as gym
import mujoco.rollout
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # one of PROBLEMS, whose dynamics and cost are written here
    seed: Seed = 1  # of the episodes' starts and of the first guesses
    method: Literal["lqr", "ilqr", "ddp", "newton", "gradient"] = "ilqr"  # what an iteration solves
    horizon: Count = 60  # steps T that a plan looks ahead; never beyond the episode's time limit
    replan: bool = True  # plan anew at every step, from the last plan on (MPC); else a plan is played to its end
    starts: Count = 128  # first guesses, of which the best plan is kept: no control, then random ones
    iterations: Count = 60  # of a plan, at most
    tolerance: Positive = 1e-5  # a plan is done where an iteration promises to lower no guess's J by more, relatively
    eval_episodes: Count = 10  # episodes that are played
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on


RECOMMENDED = {  # by environment id: `--env-id` alone takes them, a flag wins
    "DoubleIntegrator-v0": dict(method="lqr", starts=1),
    **{f"Inverted{x}Pendulum-v5": dict(starts=1, horizon=20) for x in ("", "Double")},
    "Reacher-v5": dict(starts=1, horizon=25),
}
STEP_SIZES = torch.tensor([2.0**-i for i in range(12)], dtype=torch.float64)  # α (A,)


# Problems ---------------------------------------------------------------------------------------------------


class Problem:
    """An environment in torch, its states x (…, n) and controls u (…, m) in float64; a subclass has `step` and `cost`.

    step(x, u) is f, (…, n); cost(x, u) is c, (…); final_cost(x) is c_T, (…), here 0.
    """

    def __init__(self, env: gym.Env):
        self.env = env.unwrapped
        self.low, self.high = (torch.as_tensor(x).double() for x in (env.action_space.low, env.action_space.high))

    def state(self) -> Tensor:
        return torch.as_tensor(self.env.state).double()

    def final_cost(self, x: Tensor) -> Tensor:
        return 0 * x.sum(-1)

    def jacobian(self, x: Tensor, u: Tensor) -> Tensor:
        """∇f (B, n, n + m) by (x, u), of x (B, n) and u (B, m)."""
        return torch.cat(vmap(jacfwd(self.step, (0, 1)))(x, u), -1)

    def hessian(self, x: Tensor, u: Tensor) -> Tensor:
        """∇²f (B, n, n + m, n + m)."""
        return torch.cat([torch.cat(y, -1) for y in vmap(jacfwd(jacfwd(self.step, (0, 1)), (0, 1)))(x, u)], -2)


class PointOnLine(gym.Env):
    """DoubleIntegrator-v0: place and speed, pushed by u; linear, the reward is −½ (|x|² + u²)."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Box(-np.inf, np.inf, (1,))
    F = np.array([[1.0, 0.1, 0.005], [0.0, 1.0, 0.1]])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state, {}

    def step(self, action):
        both = np.append(self.state, action)
        self.state = self.F @ both
        return self.state, -0.5 * float(both @ both), False, False, {}


gym.register("DoubleIntegrator-v0", PointOnLine, max_episode_steps=100)


class DoubleIntegrator(Problem):
    """PointOnLine, whose cost is −reward."""

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.cat([x, u], -1) @ torch.as_tensor(self.env.F).T

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * (x.square().sum(-1) + u.square().sum(-1))


class Pendulum(Problem):
    """Pendulum-v1, whose cost is −reward; x = (angle from upright, its speed), u is the torque."""

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        env, (angle, speed) = self.env, x.unbind(-1)
        push = 3 * env.g / (2 * env.l) * angle.sin() + 3 / (env.m * env.l**2) * u[..., 0]
        speed = (speed + push * env.dt).clamp(-env.max_speed, env.max_speed)
        return torch.stack([angle + speed * env.dt, speed], -1)

    def cost(self, x: Tensor, u: Tensor) -> Tensor:
        angle = torch.remainder(x[..., 0] + torch.pi, 2 * torch.pi) - torch.pi
        return angle**2 + 0.1 * x[..., 1] ** 2 + 0.001 * u[..., 0] ** 2


class MuJoCo(Problem):
    """Hinges and slides, x = (qpos, qvel); a step is frame_skip of MuJoCo's, the last state costs c(x, 0)."""

    def __init__(self, cost, env: gym.Env):
        super().__init__(env)
        self.cost, self.model = cost, self.env.model
        self.data = [mujoco.MjData(self.model) for _ in range(os.cpu_count() or 1)]  # one a thread

    def state(self) -> Tensor:
        return torch.as_tensor(np.concatenate([self.env.data.qpos, self.env.data.qvel]))

    def final_cost(self, x: Tensor) -> Tensor:
        return self.cost(x, torch.zeros_like(x[..., :1]))

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        first = np.pad(x.reshape(-1, x.shape[-1]).numpy(), ((0, 0), (1, 0)))  # a state of MuJoCo's begins with the time
        controls = np.repeat(u.reshape(-1, 1, u.shape[-1]).numpy(), self.env.frame_skip, 1)
        states, _ = mujoco.rollout.rollout(self.model, self.data, first, controls, persistent_pool=True)
        return torch.as_tensor(states[:, -1, 1:]).reshape(x.shape)

    def jacobian(self, x: Tensor, u: Tensor) -> Tensor:
        return self.differences(self.step, x, u, 1e-5)

    def hessian(self, x: Tensor, u: Tensor) -> Tensor:
        return self.differences(self.jacobian, x, u, 1e-4)

    def differences(self, f, x: Tensor, u: Tensor, delta: float) -> Tensor:
        """Central differences of f by (x, u), (…, n + m) behind the shape of f's value; all in one call of f."""
        z, n = torch.cat([x, u], -1)[..., None, :], x.shape[-1]
        shifts = delta * torch.eye(z.shape[-1]).double()
        z = torch.stack([z + shifts, z - shifts])
        up, down = f(z[..., :n], z[..., n:])
        return (up - down).movedim(x.dim() - 1, -1) / (2 * delta)


def balance_cost(x: Tensor, u: Tensor) -> Tensor:
    """The squares of the cart's place and the poles' angles from upright, and some of the speeds' and the force's."""
    place, angles, speeds = x[..., 0], x[..., 1 : x.shape[-1] // 2].cumsum(-1), x[..., x.shape[-1] // 2 :]
    squares = 0.1 * place**2 + angles.square().sum(-1) + 0.01 * speeds.square().sum(-1)
    return squares + 0.001 * u.square().sum(-1)


def reacher_cost(x: Tensor, u: Tensor) -> Tensor:
    """The environment's penalties: fingertip to target, made smooth within a centimetre, and the torques' squares."""
    first, both, targets = x[..., 0], x[..., 0] + x[..., 1], x[..., 2:4].unbind(-1)
    tip = 0.1 * first.cos() + 0.11 * both.cos(), 0.1 * first.sin() + 0.11 * both.sin()
    return (sum((a - b) ** 2 for a, b in zip(tip, targets)) + 1e-4).sqrt() + u.square().sum(-1)


PROBLEMS = {"Pendulum-v1": Pendulum, "DoubleIntegrator-v0": DoubleIntegrator}
PROBLEMS |= {f"Inverted{x}Pendulum-v5": functools.partial(MuJoCo, balance_cost) for x in ("", "Double")}
PROBLEMS["Reacher-v5"] = functools.partial(MuJoCo, reacher_cost)


# The maths --------------------------------------------------------------------------------------------------


class Expansion(NamedTuple):
    """A problem around B trajectories of T steps, in deviations z = (δx, δu) from them."""

    F: Tensor  # (B, T, n, n + m), ∇f
    f: Tensor  # (B, T, n), what f(x̂_t, û_t) is ahead of x̂_{t+1}: 0 where the trajectory was played
    C: Tensor  # (B, T, n + m, n + m), ∇²c
    c: Tensor  # (B, T, n + m), ∇c
    V: Tensor  # (B, n, n), ∇²c_T
    v: Tensor  # (B, n), ∇c_T
    F2: Tensor | None = None  # (B, T, n, n + m, n + m), ∇²f


def expand(problem: Problem, x: Tensor, u: Tensor, second: bool) -> Expansion:
    """Around played trajectories x (B, T + 1, n) and u (B, T, m)."""
    n, (xs, us) = x.shape[-1], (y.flatten(0, 1) for y in (x[:, :-1], u))
    z, cost, end = torch.cat([xs, us], -1), lambda z: problem.cost(z[:n], z[n:]), jacrev(problem.final_cost)
    of_steps = [problem.jacobian(xs, us), 0 * xs, vmap(jacfwd(jacrev(cost)))(z), vmap(jacrev(cost))(z)]
    of_steps += [problem.hessian(xs, us)] if second else []
    F, f, C, c, *F2 = (y.unflatten(0, u.shape[:2]) for y in of_steps)
    return Expansion(F, f, C, c, vmap(jacfwd(end))(x[:, -1]), vmap(end)(x[:, -1]), *F2)


def box_qp(H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """k (B, m, 1), the argmin of ½ kᵀ H k + gᵀ k in the box, and (B, m, m) H⁻¹ on what no bound holds, 0 elsewhere.

    H (B, m, m) is positive definite; g, low, high (B, m, 1). Projected Newton (Bertsekas 1982; Tassa et al. 2014).
    """
    inverse = torch.linalg.inv(H)
    unbounded = -inverse @ g
    k = unbounded.clamp(low, high)
    for _ in range(0 if (k == unbounded).all() else 20):
        slope = g + H @ k
        free = ~((k <= low) & (slope >= 0) | (k >= high) & (slope <= 0))
        inverse = torch.linalg.inv(torch.where(free & free.mT, H, torch.eye(k.shape[1]).double())) * (free & free.mT)
        if k.shape[1] == 1 or (slope * free).abs().max() <= 1e-12 * g.abs().max():
            break
        tried = (k - STEP_SIZES[:, None, None, None] * (inverse @ slope)).clamp(low, high)
        k = tried[((H @ tried / 2 + g) * tried).sum((2, 3)).argmin(0), torch.arange(len(k))]
    return k, inverse


def backward(e: Expansion, low: Tensor, high: Tensor, mu: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """K (B, T, m, n), k (B, T, m), and (B,) by how much they lower J in this model; NaN if a Q_uu + μ I is indefinite.

    low, high (B, T, m) bound δu; μ (B,). V and v are Hessian and gradient of the value in δx (Algorithm 19).
    """
    V, v, costate, gain, n = e.V, e.v[..., None], e.v[..., None], 0 * mu, e.V.shape[-1]
    eye, gains = torch.eye(low.shape[-1]).double(), []
    for t in reversed(range(low.shape[1])):
        F, c = e.F[:, t], e.c[:, t, :, None]
        Q = e.C[:, t] + F.mT @ V @ F
        q = c + F.mT @ (V @ e.f[:, t, :, None] + v)
        if method in ("ddp", "newton"):
            Q = Q + ((v if method == "ddp" else costate)[..., None] * e.F2[:, t]).sum(1)
        if method == "gradient":
            Q[:, n:], Q[:, :, n:] = 0, 0
        Q_ux, Q_uu, q_u = Q[:, n:, :n], Q[:, n:, n:], q[:, n:]
        H = Q_uu + mu[:, None, None] * eye
        definite = (torch.linalg.cholesky_ex(H).info == 0)[:, None, None]
        k, inverse = box_qp(torch.where(definite, H, eye), q_u, low[:, t, :, None], high[:, t, :, None])
        K, slope = -inverse @ Q_ux, q_u + Q_uu @ k
        gain = torch.where(definite[:, 0, 0], gain - ((q_u + slope) * k).sum((1, 2)) / 2, math.nan)
        V = Q[:, :n, :n] + Q_ux.mT @ K + K.mT @ Q_ux + K.mT @ Q_uu @ K
        v = q[:, :n] + Q_ux.mT @ k + K.mT @ slope
        V, costate = (V + V.mT) / 2, c[:, :n] + F[..., :n].mT @ costate
        gains.append((K, k[..., 0]))
    return *(torch.stack(x, 1) for x in zip(*gains[::-1])), gain


def linear_step(F: Tensor, K: Tensor, k: Tensor) -> Tensor:
    """δu (B, T, m) of all controls at once, where deviations go on as δx' = F (δx, δu)."""
    deviation, steps = torch.zeros_like(F[:, 0, :, :1]), []
    for t in range(k.shape[1]):
        steps.append(k[:, t, :, None] + K[:, t] @ deviation)
        deviation = F[:, t] @ torch.cat([deviation, steps[-1]], 1)
    return torch.stack(steps, 1)[..., 0]


def forward(problem: Problem, x: Tensor, u: Tensor, K: Tensor, k: Tensor, step_sizes: Tensor):
    """(A, B): x (T + 1, n), u (T, m) and J of û + α k + K (x − x̂), played, for step sizes α (A,); J is ∞, not NaN."""
    states, controls = [x[:, 0].expand(len(step_sizes), -1, -1)], []
    for t in range(u.shape[1]):
        change = step_sizes[:, None, None] * k[:, t] + (K[:, t] @ (states[-1] - x[:, t])[..., None])[..., 0]
        controls.append((u[:, t] + change).clamp(problem.low, problem.high))
        states.append(problem.step(states[-1], controls[-1]))
    x, u = torch.stack(states, 2), torch.stack(controls, 2)
    J = problem.cost(x[:, :, :-1], u).sum(-1) + problem.final_cost(x[:, :, -1])
    return x, u, J.nan_to_num(nan=math.inf)


class Plan(NamedTuple):
    """x (T + 1, n), u (T, m), last gains K (T, m, n) of the best guess; costs (iterations + 1, B), J of every one."""

    x: Tensor
    u: Tensor
    K: Tensor
    costs: Tensor


def optimise(problem: Problem, start: Tensor, guesses: Tensor, args: Args) -> Plan:
    """The best plan from the state `start` (n,), and from first guesses of the controls (B, T, m)."""
    batch, steps, m = guesses.shape
    x, K = start.expand(batch, steps + 1, -1), torch.zeros(batch, steps, m, len(start)).double()
    x, u, J = (y[0] for y in forward(problem, x, guesses, K, 0 * guesses, STEP_SIZES[:1]))
    costs, mu, once = [J], torch.full((batch,), float(args.method == "gradient")).double(), args.method == "lqr"
    for _ in range(1 if once else args.iterations):
        e = expand(problem, x, u, args.method in ("ddp", "newton"))
        K, k, gain = backward(e, problem.low - u, problem.high - u, mu, args.method)
        if args.method == "newton":
            K, k = 0 * K, linear_step(e.F, K, k)
        new_x, new_u, J = forward(problem, x, u, K, k, STEP_SIZES[: 1 if once else None])
        J, best = J.min(0)
        better = gain.isfinite() & ((costs[-1] > J) | once)
        x = torch.where(better[:, None, None], new_x[best, torch.arange(batch)], x)
        u = torch.where(better[:, None, None], new_u[best, torch.arange(batch)], u)
        costs.append(torch.where(better, J, costs[-1]))
        mu = torch.where(better, mu / 10 * (mu > 1e-8), (10 * mu).clamp(min=1e-6))
        if (gain <= args.tolerance * (1 + costs[-1].abs())).all():
            break
    least = costs[-1].argmin()
    return Plan(x[least], u[least], K[least], torch.stack(costs))


def first_guesses(problem: Problem, number: int, steps: int, generator: torch.Generator) -> Tensor:
    """Controls (number, steps, m): none, then uniform ones (within ±1 if unbounded), each held for 20 steps."""
    low, high = (x.nan_to_num(posinf=1, neginf=-1) for x in (problem.low, problem.high))
    uniform = torch.rand(number, -(-steps // 20), len(low), generator=generator, dtype=torch.float64)
    guesses = (low + (high - low) * uniform).repeat_interleave(20, 1)[:, :steps]
    guesses[0] = torch.zeros_like(low).clamp(problem.low, problem.high)
    return guesses


# Playing ----------------------------------------------------------------------------------------------------


def play(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns", "promised", "played": (eval_episodes,)}, the last two the first plans' J."""
    check(args)
    if args.env_id not in PROBLEMS:
        fail(f"--env-id {args.env_id}: dynamics and cost are known here of {', '.join(PROBLEMS)}; mpc.py plays others")
    env = make_env(args)
    problem, limit = PROBLEMS[args.env_id](env), env.spec.max_episode_steps
    run_dir, writer = open_run(args)
    generator, promised, played = torch.Generator().manual_seed(args.seed), [], []

    def planner(env: gym.Env) -> Iterator[np.ndarray]:
        plan, used = None, 0
        for t in range(limit):
            x, horizon = problem.state(), min(args.horizon, limit - t)
            if plan is None or used == len(plan.u):
                plan, used = optimise(problem, x, first_guesses(problem, args.starts, horizon, generator), args), 0
            elif args.replan:
                plan, used = optimise(problem, x, torch.cat([plan.u[1:], plan.u[-1:]])[None, :horizon], args), 0
            if t == 0:
                promised.append(problem.cost(plan.x[:-1], plan.u).sum().item())
                played.append(0.0)
                for i, cost in enumerate(plan.costs.min(1).values):
                    writer.add_scalar(f"plans/cost_in_episode_{len(played)}", cost, i)
            played[-1] += problem.cost(x, plan.u[used]).item() * (t < args.horizon)
            yield plan.u[used].numpy().astype(np.float32)
            used += 1

    returns = play_planner(planner, env, args, run_dir, writer)
    promised, played = np.array(promised), np.array(played)
    print(f"cost of each first plan: promised {promised.mean():.4f}, played {played.mean():.4f}")
    return {"run_dir": run_dir, "returns": returns, "promised": promised, "played": played}


# Plumbing: the same in every file ---------------------------------------------------------------------------

ALGO = Path(__file__).stem


def fail(message: str, code: int = 2) -> NoReturn:
    """Stops with one line on stderr; exit code 2 where the request was wrong, 1 where the run went wrong."""
    tqdm.write(f"{ALGO}.py: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(code)


def check(args: Args) -> None:
    """Stops where a value is outside its range."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        values = value if isinstance(value := getattr(args, name), tuple) else (value,)
        for low, high, text in itertools.chain(*(getattr(x, "__metadata__", ()) for x in (hint, *get_args(hint)))):
            if not all(isinstance(x, str | None) or low <= x <= high for x in values):
                fail(f"--{name.replace('_', '-')} {value} must be {text}")


def make_env(args: Args, **kwargs) -> gym.Env:
    """gymnasium.make, or one line why not; what it observes becomes a vector, unless it is an index or an image."""
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {}, **kwargs)
    except (gym.error.Error, ImportError, TypeError) as error:  # a TypeError: its constructor needs arguments
        hint = "kwargs go into gym.register; ppo_atari.py and dqn_atari.py play Atari; --capture-video needs rgb_array"
        fail(f"--env-id {args.env_id}: {error} ({hint})")
    plain = isinstance(env.observation_space, Discrete) or len(env.observation_space.shape or ()) in (1, 3)
    return env if plain else gym.wrappers.FlattenObservation(env)


def open_run(args: Args) -> tuple[Path, SummaryWriter]:
    """Makes {output_dir}/{env_id}__{algo}__{seed}__{time}[_n] with args.json, and a writer of TensorBoard's events."""
    env_id = re.sub(r"[^\w.=-]+", "-", args.env_id)  # Windows refuses colons, for instance
    path = Path(args.output_dir).expanduser() / f"{env_id}__{ALGO}__{args.seed}__{int(time.time())}"
    try:
        for name in itertools.chain([path], (f"{path}_{n}" for n in itertools.count(1))):
            with suppress(FileExistsError):
                os.makedirs(name)
                break
    except OSError as error:
        fail(f"--output-dir {args.output_dir}: {error}")
    versions = {"python": sys.version.split()[0]} | {x.__name__: x.__version__ for x in (torch, gym, np)}
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    about = {"algo": ALGO, "args": asdict(args), "versions": versions, "script_sha256": script}
    Path(name, "args.json").write_text(json.dumps(about, indent=2) + "\n")
    return Path(name), SummaryWriter(str(name))


def play_planner(planner, env: gym.Env, args: Args, run_dir: Path, writer: SummaryWriter) -> np.ndarray:
    """Plays --eval-episodes with a planner → returns (eval_episodes,); episode i is reset with seed + 1 000 000 + i.

    planner(env), a generator called after a reset, yields the episode's actions and is sent what is observed then.
    """
    if env.spec.max_episode_steps is None:
        print(f"{args.env_id} has no time limit: episodes are cut after 1000 steps")
        env = gym.wrappers.TimeLimit(env, 1000)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"), video_length=1000)
    returns, step, start = np.zeros(args.eval_episodes), 0, time.time()
    with open(run_dir / "monitor.csv", "w", newline="") as monitor, tqdm(unit=" steps", desc=args.env_id) as bar:
        monitor.write(f"#{json.dumps({'t_start': start, 'env_id': args.env_id})}\nr,l,t\n")
        for i in range(args.eval_episodes):
            env.reset(seed=args.seed + 1_000_000 + i)
            ended, first, actions, obs = False, step, planner(env), None
            while not ended:
                obs, reward, terminated, truncated, _ = env.step(actions.send(obs))
                if not math.isfinite(reward):
                    fail(f"the reward of step {step - first + 1} of episode {i + 1} is not finite", code=1)
                returns[i] += reward
                ended, step = terminated or truncated, step + 1
                bar.set_postfix_str(f"episode {i + 1}, return {returns[i]:.2f}", refresh=False)
                bar.update()
            monitor.write(f"{returns[i]:.6f},{step - first},{time.time() - start:.6f}\n")
            monitor.flush()
            writer.add_scalar("charts/episodic_return", returns[i], step)
            writer.add_scalar("charts/episodic_length", step - first, step)
            writer.add_scalar("charts/SPS", step / (time.time() - start), step)
    env.close()
    writer.add_scalar("eval/episodic_return", returns.mean(), step)
    writer.close()
    print(f"evaluation: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}", flush=True)
    return returns


def read_args(argv: list[str] | None = None) -> Args:
    """Command line → Args. Defaults are the environment's recommended settings."""
    for stream in {sys.stdout, sys.stderr} & {sys.__stdout__, sys.__stderr__}:
        stream.reconfigure(errors="replace")  # a console that has no γ shows --help all the same
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    defaults = replace(Args(), **{"env_id": given.env_id} | RECOMMENDED.get(given.env_id, {}))
    table = "\n\n".join(f"{env}: {json.dumps(settings)[1:-1]}" for env, settings in RECOMMENDED.items())
    return tyro.cli(Args, default=defaults, args=argv, description=f"Settings taken with --env-id alone:\n\n{table}")


if __name__ == "__main__":
    play(read_args())
