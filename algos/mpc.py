"""Planning by sampling through the simulator itself: random shooting, the cross-entropy method, and MPPI.

    max over a_0 … a_{H−1} of  J(A) = Σ_t r(s_t, a_t),  where s_{t+1} is what the simulator says; nothing after an end

of sequences A drawn from a distribution, whose first actions are played before it is planned again (MPC):
- `random` shooting (the notes' Algorithm 16): the best of N uniform sequences.
- `cem` (Algorithm 17; Rubinstein 1999): the distribution, independent normals, or categorical ones for discrete
  actions, is refitted to the M best of N, by mean and standard deviation or by frequency, and drawn from again.
- `mppi` (Williams et al. 2017, arXiv 1707.02342): its mean moves to Σ w_i A_i with w_i ∝ exp(J(A_i) / λ).
Details that matter:
- A plan begins where the last ends (a warm start): from the distribution's rest, no narrower than --min-noise, and from
  the best sequences, which stay among the candidates of every iteration and plan (Pinneri et al. 2020).
- Noise is correlated over time: what changes at every step averages out before it moves anything. Normals are fitted
  to what was drawn before it is clipped, so that a mean can be at a bound.
- Of `random` and `cem` the best sequence that was simulated is played, the last mean among them; of `mppi` its mean.
- A plan is played as it was simulated: MuJoCo's state includes the warm start of its solver (mjSTATE_INTEGRATION), and
  actions are float32, as the environment gets them. So a return promised is the return got, where nothing is random.
- MuJoCo's candidates run side by side on all cores (mujoco.batch); rewards and ends are gymnasium's, here for whole
  batches. Pendulum's own step takes arrays. Any other environment is copied for each candidate, dice included.

    python algos/mpc.py                                          # Pendulum-v1
    python algos/mpc.py --env-id HalfCheetah-v5                  # through MuJoCo, 200 steps
    python algos/mpc.py --env-id CartPole-v1 --planner random
"""

import copy
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_type_hints

import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np
import torch
import tyro
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box, Discrete
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, (1, math.inf, "at least 1")]  # lowest, highest, in words: checked before a run
Seed = Annotated[int, (0, 2**32 - 1, "from 0 to 2³² − 1")]
Fraction = Annotated[float, (0, 1, "from 0 to 1")]
Positive = Annotated[float, (sys.float_info.min, sys.float_info.max, "positive")]


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # gymnasium environment with Box or Discrete actions
    seed: Seed = 1  # of the episodes' starts and of the candidates
    planner: Literal["random", "cem", "mppi"] = "cem"  # see above
    horizon: Count = 60  # steps H that a plan looks ahead
    population: Count = 1500  # candidates N of an iteration
    elites: Count = 30  # M that cem refits to
    kept: Count = 10  # best sequences that stay among the candidates
    iterations: Count = 4  # of cem and mppi, per plan
    first_iterations: Count = 20  # the same, of an episode's first plan
    replan_every: Count = 1  # steps of a plan that are played; as many as --horizon: open loop
    noise: Positive = 1.0  # the normals' deviation at first, as a fraction of half the action's range
    min_noise: Fraction = 0.1  # what a new plan begins with of it at least; of discrete actions, of the uniform
    correlation: Fraction = 0.85  # of the noise of one step and the next
    temperature: Positive = 1.0  # λ of mppi, in units of the return
    eval_episodes: Count = 10  # episodes that are played
    max_episode_steps: Count | None = None  # cut episodes there; None: where the environment does
    output_dir: str = "runs"  # folder that run directories are made in
    capture_video: bool = False  # film 1000 images from episodes 0, 1, 8, 27, 64 … on


FAST = dict(horizon=25, population=200, elites=20, iterations=3, noise=0.5, min_noise=0.3, correlation=0.5)
FAST |= dict(first_iterations=10, eval_episodes=1)
RECOMMENDED = {  # by environment id: `--env-id` alone takes them, a flag wins
    "Pendulum-v1": dict(elites=50),
    "CartPole-v1": FAST | dict(horizon=60, population=100, elites=10, iterations=2, min_noise=0.5, eval_episodes=3),
    "HalfCheetah-v5": FAST | dict(max_episode_steps=200),
    "Hopper-v5": FAST | dict(max_episode_steps=200, horizon=40, population=100, elites=10, iterations=2),
    "Walker2d-v5": FAST | dict(max_episode_steps=200, horizon=50, population=150, elites=15, iterations=2),
    "Swimmer-v5": FAST | dict(max_episode_steps=200, horizon=50),
    "InvertedPendulum-v5": FAST,
    "Reacher-v5": FAST | dict(eval_episodes=10),
}


# Simulators -------------------------------------------------------------------------------------------------
# Each is simulate(env, actions (N, H, …), rng) → rewards (N, H) from env's present state on, 0 after an end. It leaves
# env as it is, and what is random comes from rng: a plan must not know the dice that the environment will throw.


def copies(env: gym.Env, actions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of any environment. The step of classic control's replaces what it changes: there a shallow copy is enough."""
    shallow = type(env).__module__.startswith("gymnasium.envs.classic_control")
    rewards = np.zeros(actions.shape[:2])
    for i, sequence in enumerate(actions):
        simulator = object.__new__(type(env))  # copy.deepcopy makes a new one, in no state, of gymnasium's EzPickle
        simulator.__dict__ = dict(env.__dict__) if shallow else copy.deepcopy(env.__dict__)
        simulator.np_random = rng
        for t, action in enumerate(sequence):
            _, rewards[i, t], terminated, _, _ = simulator.step(action)
            if terminated:
                break
    return rewards


def pendulum(env: PendulumEnv, actions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All N at once: what Pendulum-v1's step computes, it computes for arrays, too. It never ends."""
    simulator = copy.copy(env)
    simulator.state = np.repeat(np.array(env.state)[:, None], len(actions), 1)
    return np.stack([simulator.step(action.T)[1] for action in actions.swapaxes(0, 1)], 1)


class MujocoBatch:
    """MuJoCo's environments on all cores: `rewards(env, recorded, actions)` → rewards (N, H) and ends (N, H)."""

    def __init__(self, env: gym.Env, population: int, rewards: Callable):
        self.batch, self.rewards = mujoco.batch.Batch(env.model, population), rewards

    def __call__(self, env: gym.Env, actions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        spec, skip = mujoco.mjtState.mjSTATE_INTEGRATION.value, env.frame_skip
        state = np.empty(mujoco.mj_stateSize(env.model, spec))
        mujoco.mj_getState(env.model, env.data, state, spec)
        self.batch.state[: len(actions)] = state
        controls, fields = np.repeat(actions, skip, 1), ("qpos", "qvel", "xpos")[: 3 if self.rewards is reacher else 2]
        recorded = self.batch.rollout(controls.shape[1], controls, record=fields, ids=np.arange(len(actions)))
        rewards, terminated = self.rewards(env, {k: x[:, skip - 1 :: skip] for k, x in recorded.items()}, actions)
        return rewards * (np.cumsum(terminated, 1) - terminated == 0)


def locomotion(env: gym.Env, recorded: dict, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward speed, less what controls cost; Hopper and Walker2d are paid for health, and end without."""
    qpos, qvel = recorded["qpos"], recorded["qvel"]
    speed = np.diff(qpos[..., 0], axis=1, prepend=env.data.qpos[0]) / env.dt
    rewards = env._forward_reward_weight * speed - env._ctrl_cost_weight * np.square(actions).sum(-1)
    if not hasattr(env, "_healthy_z_range"):
        return rewards, np.zeros(rewards.shape, bool)
    state = np.concatenate([qpos[..., 2:], qvel], -1)
    low, high = getattr(env, "_healthy_state_range", (-np.inf, np.inf))
    healthy = ((low < state) & (state < high)).all(-1)
    for x, (low, high) in ((qpos[..., 1], env._healthy_z_range), (qpos[..., 2], env._healthy_angle_range)):
        healthy &= (low < x) & (x < high)
    return rewards + env._healthy_reward * healthy, ~healthy & env._terminate_when_unhealthy


def inverted_pendulum(env: gym.Env, recorded: dict, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 while the pole is within 0.2 of upright."""
    finite = np.isfinite(recorded["qpos"]).all(-1) & np.isfinite(recorded["qvel"]).all(-1)
    stands = finite & (np.abs(recorded["qpos"][..., 1]) <= 0.2)
    return stands * 1.0, ~stands


def reacher(env: gym.Env, recorded: dict, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Less the distance of fingertip and target and what controls cost; xpos is, as there, that of the last substep."""
    fingertip, target = (recorded["xpos"][:, :, env.model.body(name).id] for name in ("fingertip", "target"))
    rewards = -env._reward_dist_weight * np.linalg.norm(fingertip - target, axis=-1)
    return rewards - env._reward_control_weight * np.square(actions).sum(-1), np.zeros(rewards.shape, bool)


REWARDS = {f"{x}_v5": locomotion for x in ("half_cheetah", "hopper", "walker2d", "swimmer")}
REWARDS |= {"inverted_pendulum_v5": inverted_pendulum, "reacher_v5": reacher}


def make_simulator(env: gym.Env, population: int) -> Callable:
    """The fastest that is exact: an array of pendulums, a batch where the rewards are known here, or copies."""
    module = type(env).__module__
    if type(env) is PendulumEnv:
        return pendulum
    if module.startswith("gymnasium.envs.mujoco.") and (rewards := REWARDS.get(module.split(".")[-1])):
        return MujocoBatch(env, population, rewards)
    return copies


# The maths --------------------------------------------------------------------------------------------------


@dataclass
class Normals:
    """Sequences of Box actions: independent normals of a mean and a deviation (H, m), which are clipped when played."""

    space: Box
    mean: np.ndarray
    deviation: np.ndarray

    def sample(self, number: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
        """Draws (number, H, m); noise is an autoregressive process over time, neighbours having that correlation."""
        noise = rng.standard_normal((len(self.mean), number, self.mean.shape[1]))
        for t in range(1, len(noise) if correlation else 0):
            noise[t] = correlation * noise[t - 1] + math.sqrt(1 - correlation**2) * noise[t]
        return self.mean + self.deviation * noise.swapaxes(0, 1)

    def likeliest(self) -> np.ndarray:
        """A draw (H, m)."""
        return self.mean

    def actions(self, draws: np.ndarray) -> np.ndarray:
        """What the environment gets."""
        return draws.clip(self.space.low, self.space.high).astype(self.space.dtype)

    def refitted(self, draws: np.ndarray, weights: np.ndarray, spread: bool) -> "Normals":
        """To draws (N, H, m) of weights (N,) that sum to 1; the deviations only where `spread`."""
        mean, deviation = np.einsum("n,nhm->hm", weights, draws), self.deviation
        if spread:
            deviation = np.sqrt(np.einsum("n,nhm->hm", weights, (draws - mean) ** 2))
        return Normals(self.space, mean, deviation)

    def shifted(self, initial: "Normals", steps: int, min_noise: float) -> "Normals":
        """What is left after the first steps, and then the initial; no deviation is below that part of it."""
        deviation = np.concatenate([self.deviation[steps:], initial.deviation[:steps]])
        deviation = np.maximum(deviation, min_noise * initial.deviation)
        return Normals(self.space, np.concatenate([self.mean[steps:], initial.mean[:steps]]), deviation)


@dataclass
class Categoricals:
    """Sequences of Discrete actions: independent probabilities (H, actions)."""

    space: Discrete
    p: np.ndarray

    def sample(self, number: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
        """Draws (number, H) from 0 on; with that probability a step has the quantile of the step before."""
        quantiles, repeated = rng.random((2, number, len(self.p)))
        for t in range(1, len(self.p)):
            quantiles[:, t] = np.where(repeated[:, t] < correlation, quantiles[:, t - 1], quantiles[:, t])
        return (self.p.cumsum(1)[:, :-1] <= quantiles[..., None]).sum(-1)

    def likeliest(self) -> np.ndarray:
        """A draw (H,)."""
        return self.p.argmax(1)

    def actions(self, draws: np.ndarray) -> np.ndarray:
        """What the environment gets."""
        return self.space.start + draws

    def refitted(self, draws: np.ndarray, weights: np.ndarray, spread: bool) -> "Categoricals":
        """To the weighted frequencies of draws (N, H)."""
        return Categoricals(self.space, np.einsum("n,nha->ha", weights, draws[..., None] == np.arange(self.space.n)))

    def shifted(self, initial: "Categoricals", steps: int, min_noise: float) -> "Categoricals":
        """What is left after the first steps, mixed with that part of the initial probabilities, which follow."""
        rest = np.concatenate([self.p[steps:], initial.p[:steps]])
        return Categoricals(self.space, (1 - min_noise) * rest + min_noise * initial.p)


def initial_distribution(space: gym.Space, args: Args) -> Normals | Categoricals:
    """Around the middle of the bounds, or 0 where there are none; or uniform."""
    if isinstance(space, Discrete):
        return Categoricals(space, np.full((args.horizon, int(space.n)), 1 / space.n))
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
    mean = np.tile((low + high) / 2, (args.horizon, 1))
    return Normals(space, mean, np.tile(args.noise * (high - low) / 2, (args.horizon, 1)))


def cem_weights(returns: np.ndarray, elites: int) -> np.ndarray:
    """1 / M for the M best of (N,) returns, of equal ones the first, and 0 for the others."""
    weights = np.zeros(len(returns))
    weights[np.argsort(-returns, kind="stable")[:elites]] = 1 / elites
    return weights


def mppi_weights(returns: np.ndarray, temperature: float) -> np.ndarray:
    """exp(J / λ) over its sum, for returns (N,) (Williams et al. 2017, equations 34 and 35 of costs −J)."""
    weights = np.exp((returns - returns.max()) / temperature)
    return weights / weights.sum()


class SampledPlan(NamedTuple):
    """What is played and what goes on into the next plan."""

    actions: np.ndarray  # (H, …), what is played
    rewards: np.ndarray  # (H,), promised
    distribution: Normals | Categoricals  # at the end
    kept: np.ndarray  # (--kept, H, …), the best draws, the one that is played first


def make_plan(simulate: Callable, distribution, kept, iterations: int, args: Args, rng) -> SampledPlan:
    """Of simulate(actions (N, H, …)) → rewards (N, H): the best sequence that was simulated, or mppi's mean."""
    for _ in range(1 if args.planner == "random" else iterations):
        draws = distribution.sample(args.population, args.correlation, rng)
        if kept is not None:
            draws[: len(kept)] = kept
        rewards = simulate(distribution.actions(draws))
        returns = np.nan_to_num(rewards.sum(1), nan=-math.inf, neginf=-math.inf)
        best = np.argsort(-returns, kind="stable")[: args.kept]
        kept, kept_rewards = draws[best], rewards[best]
        if args.planner == "cem":
            distribution = distribution.refitted(draws, cem_weights(returns, args.elites), spread=True)
        if args.planner == "mppi":
            distribution = distribution.refitted(draws, mppi_weights(returns, args.temperature), spread=False)
    if args.planner != "random":
        mean = distribution.likeliest()
        promised = simulate(distribution.actions(mean)[None])[0]
        if args.planner == "mppi" or promised.sum() > kept_rewards[0].sum():
            kept[0], kept_rewards[0] = mean, promised
    return SampledPlan(distribution.actions(kept[0]), kept_rewards[0], distribution, kept)


# Playing ----------------------------------------------------------------------------------------------------


def play(args: Args) -> dict:
    """Returns {"run_dir": Path, "returns", "promised": (eval_episodes,)}, the last of what was played of plans."""
    check(args)
    if max(args.elites, args.kept) > args.population or args.replan_every > args.horizon:
        fail("--elites and --kept must be at most --population, and --replan-every at most --horizon")
    env = make_env(args, **{"max_episode_steps": args.max_episode_steps} if args.max_episode_steps else {})
    space = env.action_space
    if not isinstance(space, Discrete) and not (isinstance(space, Box) and len(space.shape) == 1):
        fail(f"actions of {args.env_id} are {space}: sequences are drawn of Discrete or one-dimensional Box ones")
    simulator, initial = make_simulator(env.unwrapped, args.population), initial_distribution(space, args)
    run_dir, writer = open_run(args)
    rng, promised, seconds, steps = np.random.default_rng(args.seed), [], [], args.replan_every

    def planner(env: gym.Env) -> Iterator:
        simulate, distribution, kept = (lambda actions: simulator(env.unwrapped, actions, rng)), initial, None
        promised.append(0.0)
        while True:
            start, iterations = time.perf_counter(), args.first_iterations if kept is None else args.iterations
            plan = make_plan(simulate, distribution, kept, iterations, args, rng)
            seconds.append(time.perf_counter() - start)
            writer.add_scalar("plans/promised_return", plan.rewards.sum(), len(seconds))
            writer.add_scalar("plans/seconds", seconds[-1], len(seconds))
            for action, reward in zip(plan.actions[:steps], plan.rewards):
                promised[-1] += float(reward)
                yield action
            distribution = plan.distribution.shifted(initial, steps, args.min_noise)
            kept = np.concatenate([plan.kept[:, steps:], plan.kept[:, -1:].repeat(steps, 1)], 1)

    returns = play_planner(planner, env, args, run_dir, writer)
    print(f"promised: {np.mean(promised):.2f}; a plan took {1000 * np.median(seconds):.1f} ms (median)")
    return {"run_dir": run_dir, "returns": returns, "promised": np.array(promised)}


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
