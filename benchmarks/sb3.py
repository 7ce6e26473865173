"""Stable-Baselines3 at the hyperparameters of a script here: the other side of every comparison.

    python benchmarks/sb3.py ppo --env-id Hopper-v5 --seed 3

takes the flags of algos/ppo.py, the environment's recommended settings included, and translates every one of
them; so with a2c, dqn, ddpg, td3, sac, ppo_atari and dqn_atari, and with trpo for sb3-contrib's. It leaves a run
directory of the same form (args.json, monitor.csv, model.zip) and prints the same lines. What SB3 does not have is
refused, but for Double DQN, the default of algos/dqn.py: SB3's DQN is the plain one whether --double is set or not.

On Atari SB3 has its own environments, Python wrappers with OpenCV, set to the script's --protocol.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from gymnasium.spaces import Box
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.atari_wrappers import (
    ClipRewardEnv,
    EpisodicLifeEnv,
    FireResetEnv,
    MaxAndSkipEnv,
    NoopResetEnv,
    WarpFrame,
)
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))


def ppo_model(args, env: VecEnv) -> PPO:
    """SB3's PPO with every hyperparameter of algos/ppo.py's Args."""
    batch_size = args.num_envs * args.num_steps

    def schedule(value: float, anneal: bool):
        # SB3 reads its schedules after a rollout, algos/ppo.py before it: one rollout's progress lies between.
        return lambda remaining: value * (remaining + batch_size / args.total_timesteps if anneal else 1.0)

    return PPO(
        "MlpPolicy",
        env,
        learning_rate=schedule(args.learning_rate, args.anneal_lr),
        n_steps=args.num_steps,
        batch_size=batch_size // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=schedule(args.clip_coef, args.anneal_clip),
        clip_range_vf=args.clip_value,
        normalize_advantage=args.normalize_advantages,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
        policy_kwargs=dict(
            net_arch=list(args.hidden_sizes),
            activation_fn=torch.nn.Tanh,
            log_std_init=args.log_std_init,
            optimizer_kwargs=dict(eps=1e-5),
        ),
        seed=args.seed,
        device="cpu",
    )


def a2c_model(args, env: VecEnv) -> A2C:
    """SB3's A2C with every hyperparameter of algos/a2c.py's Args."""
    rollout = args.num_envs * args.num_steps / args.total_timesteps  # SB3 reads its schedule after it, a2c.py before
    policy_kwargs = dict(net_arch=list(args.hidden_sizes), activation_fn=torch.nn.Tanh, log_std_init=args.log_std_init)
    if args.optimizer == "adam":
        policy_kwargs["optimizer_kwargs"] = dict(eps=1e-5)
    return A2C(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: args.learning_rate * (remaining + rollout if args.anneal_lr else 1.0),
        n_steps=args.num_steps,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        use_rms_prop=args.optimizer == "rmsprop",
        rms_prop_eps=1e-5,
        normalize_advantage=args.normalize_advantages,
        policy_kwargs=policy_kwargs,
        seed=args.seed,
        device="cpu",
    )


def trpo_model(args, env: VecEnv) -> TRPO:
    """sb3-contrib's TRPO with every hyperparameter of algos/trpo.py's Args.

    For a Box its KL is the mean over the dimensions of the action, and the Fisher matrix is that mean's Hessian: the
    same trust region and the same damping are smaller numbers there.
    """
    dimensions = env.action_space.shape[0] if isinstance(env.action_space, Box) else 1
    return TRPO(
        "MlpPolicy",
        env,
        learning_rate=args.learning_rate,
        n_steps=args.num_steps,
        batch_size=args.num_envs * args.num_steps // args.num_minibatches,
        gamma=args.gamma,
        cg_max_steps=args.cg_iterations,
        cg_damping=args.cg_damping / dimensions,
        line_search_shrinking_factor=args.line_search_shrink,
        line_search_max_iter=args.line_search_steps,
        n_critic_updates=args.critic_epochs,
        gae_lambda=args.gae_lambda,
        normalize_advantage=args.normalize_advantages,
        target_kl=args.target_kl / dimensions,
        policy_kwargs=dict(
            net_arch=list(args.hidden_sizes), activation_fn=torch.nn.Tanh, log_std_init=args.log_std_init
        ),
        seed=args.seed,
        device="cpu",
    )


def dqn_model(args, env: VecEnv) -> DQN:
    """SB3's DQN with every hyperparameter of algos/dqn.py's Args but --double."""
    refuse_unless(args, exploration="epsilon", loss="huber")
    rollout = args.train_frequency * args.num_envs / args.total_timesteps  # SB3 reads its schedules after it
    return DQN(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: args.learning_rate * (remaining + rollout if args.anneal_lr else 1.0),
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        tau=args.tau,
        gamma=args.gamma,
        train_freq=args.train_frequency,
        gradient_steps=args.gradient_steps,
        n_steps=args.n_step,
        target_update_interval=args.target_frequency,
        exploration_fraction=args.exploration_fraction,
        exploration_initial_eps=args.exploration_start,
        exploration_final_eps=args.exploration_end,
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=dict(net_arch=list(args.hidden_sizes)),
        seed=args.seed,
        device="cpu",
    )


def continuous_q_arguments(args) -> dict:
    """SB3's names for what algos/ddpg.py, td3.py and sac.py have in common."""
    return dict(
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        tau=args.tau,
        gamma=args.gamma,
        train_freq=args.train_frequency,
        gradient_steps=args.gradient_steps,
        seed=args.seed,
        device="cpu",
    )


def exploration_noise(args, env: VecEnv) -> ActionNoise:
    """SB3's form of the noise that algos/ddpg.py and td3.py add to actions in [−1, 1]."""
    sigma = np.full(env.action_space.shape, args.exploration_noise)
    if args.noise == "gaussian":
        return NormalActionNoise(np.zeros_like(sigma), sigma)
    return OrnsteinUhlenbeckActionNoise(np.zeros_like(sigma), sigma, theta=0.15, dt=1.0)


def ddpg_model(args, env: VecEnv) -> DDPG:
    """SB3's DDPG with every hyperparameter of algos/ddpg.py's Args."""
    noise = exploration_noise(args, env)
    policy_kwargs = dict(net_arch=list(args.hidden_sizes))
    return DDPG("MlpPolicy", env, **continuous_q_arguments(args), action_noise=noise, policy_kwargs=policy_kwargs)


def td3_model(args, env: VecEnv) -> TD3:
    """SB3's TD3 with every hyperparameter of algos/td3.py's Args."""
    return TD3(
        "MlpPolicy",
        env,
        **continuous_q_arguments(args),
        action_noise=exploration_noise(args, env),
        policy_delay=args.policy_delay,
        target_policy_noise=args.target_noise,
        target_noise_clip=args.target_noise_clip,
        policy_kwargs=dict(net_arch=list(args.hidden_sizes), n_critics=args.num_critics),
    )


def sac_model(args, env: VecEnv) -> SAC:
    """SB3's SAC with every hyperparameter of algos/sac.py's Args but REDQ's."""
    refuse_unless(args, policy_delay=1, critic_subset=args.num_critics)
    return SAC(
        "MlpPolicy",
        env,
        **continuous_q_arguments(args),
        ent_coef=f"auto_{args.alpha}" if args.autotune else args.alpha,
        target_entropy="auto" if args.target_entropy is None else args.target_entropy,
        policy_kwargs=dict(net_arch=list(args.hidden_sizes), n_critics=args.num_critics),
    )


def ppo_atari_model(args, env: VecEnv) -> PPO:
    """SB3's PPO from pixels with every hyperparameter of algos/ppo_atari.py's Args."""
    rollout = args.num_envs * args.num_steps

    def schedule(value: float, anneal: bool):
        return lambda remaining: value * (remaining + rollout / args.total_timesteps if anneal else 1.0)  # as above

    return PPO(
        "CnnPolicy",
        env,
        learning_rate=schedule(args.learning_rate, args.anneal_lr),
        n_steps=args.num_steps,
        batch_size=rollout // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=schedule(args.clip_coef, args.anneal_clip),
        clip_range_vf=args.clip_value,
        normalize_advantage=args.normalize_advantages,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
        policy_kwargs=dict(optimizer_kwargs=dict(eps=1e-5)),
        seed=args.seed,
        device=args.device,
    )


def dqn_atari_model(args, env: VecEnv) -> DQN:
    """SB3's DQN from pixels with every hyperparameter of algos/dqn_atari.py's Args but --double.

    Its replay buffer stores each image eight times: 56 GB for a million transitions.
    """
    refuse_unless(args, loss="huber")
    return DQN(
        "CnnPolicy",
        env,
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        tau=1.0,
        gamma=args.gamma,
        train_freq=args.train_frequency,
        gradient_steps=args.gradient_steps,
        n_steps=args.n_step,
        target_update_interval=args.target_frequency,
        exploration_fraction=args.exploration_fraction,
        exploration_initial_eps=args.exploration_start,
        exploration_final_eps=args.exploration_end,
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=dict(net_arch=[]),
        seed=args.seed,
        device=args.device,
    )


MODELS = {
    "ppo": ppo_model,
    "a2c": a2c_model,
    "trpo": trpo_model,
    "dqn": dqn_model,
    "ddpg": ddpg_model,
    "td3": td3_model,
    "sac": sac_model,
    "ppo_atari": ppo_atari_model,
    "dqn_atari": dqn_atari_model,
}


def refuse_unless(args, **values) -> None:
    """Exits with one line where a flag has a value that SB3 has no counterpart of."""
    for name, value in values.items():
        if getattr(args, name) != value:
            sys.exit(f"sb3.py: SB3 has no --{name.replace('_', '-')} {getattr(args, name)}; it has {value} alone")


def parse_args(algo: str, argv: list[str]):
    """algos/{algo}.py's flags; the off-policy scripts, which normalise nothing, say so in the others' words."""
    script = __import__(algo)
    args = script.parse_args(argv)
    if hasattr(args, "matmul_precision"):
        args = script.settle(args)
    for name in ("resume", "capture_video"):
        if getattr(args, name):
            sys.exit(f"sb3.py: --{name.replace('_', '-')} is for algos/{algo}.py alone; leave it out")
    if not hasattr(args, "normalize_observations"):
        args.normalize_observations = args.normalize_rewards = False
    return args


class ProgressBar(BaseCallback):
    """tqdm over the run's steps."""

    def __init__(self, total: int):
        super().__init__()
        self.bar = tqdm(total=total, unit="step")

    def _on_step(self) -> bool:
        if self.num_timesteps - self.bar.n >= 1000:
            self.bar.update(self.num_timesteps - self.bar.n)
        return True


def make_env(args, num_envs: int, monitor: Path | None = None, statistics: VecNormalize | None = None) -> VecEnv:
    """SB3's vector environments, monitored before rewards are normalised; `statistics` to evaluate with, frozen."""
    env = DummyVecEnv([lambda: gym.make(args.env_id) for _ in range(num_envs)])
    env = VecMonitor(env, str(monitor) if monitor else None)
    observations, rewards = args.normalize_observations, args.normalize_rewards
    if observations or rewards:
        env = VecNormalize(env, statistics is None, observations, rewards and statistics is None, gamma=args.gamma)
        if statistics is not None and observations:
            env.obs_rms = statistics.obs_rms
    return env


def make_pixel_env(args, num_envs: int, monitor: Path | None = None, statistics: VecEnv | None = None) -> VecEnv:
    """SB3's vector environments for images, set to args.protocol; the episodes monitored are whole games, unclipped.

    `statistics`, the environments trained on, are given in an evaluation, and not needed.
    """
    gym.register_envs(ale_py)
    atari, nature = args.env_id.startswith("ALE/"), args.protocol == "nature"
    if monitor:
        ResultsWriter(str(monitor), header={"t_start": time.time(), "env_id": args.env_id}).close()

    def make() -> gym.Env:
        if atari:
            options = dict(repeat_action_probability=0.0 if nature else 0.25, full_action_space=args.full_action_space)
            env = gym.make(args.env_id, frameskip=1, **options)
            env = MaxAndSkipEnv(NoopResetEnv(env, 30) if nature else env, 4)
            if nature and "FIRE" in env.unwrapped.get_action_meanings():
                env = FireResetEnv(env)  # at a game's start alone, as there; SB3's AtariWrapper has it after each life
        else:
            env = gym.make(args.env_id)
        env = Monitor(env, str(monitor) if monitor else None, override_existing=False)
        env = EpisodicLifeEnv(env) if atari and nature else env
        env = WarpFrame(env) if atari else env
        return ClipRewardEnv(env) if args.clip_rewards else env

    env = DummyVecEnv([make] * num_envs)
    return VecFrameStack(env, 4) if atari else env


def maker_of(algo: str) -> Callable[..., VecEnv]:
    """What makes the environments that `algo` is trained and evaluated on."""
    return make_pixel_env if algo.endswith("_atari") else make_env


def train(algo: str, args) -> dict:
    """Trains SB3's `algo`, evaluates it as algos/ does; returns {"run_dir", "returns"}."""
    torch.set_num_threads(args.torch_threads)
    name = f"{args.env_id.replace('/', '-')}__{algo}-sb3__{args.seed}__{time.time_ns() // 1000}"
    run_dir = Path(args.output_dir) / name
    run_dir.mkdir(parents=True)
    env = make_env(args, args.num_envs, run_dir / "monitor.csv")
    model: BaseAlgorithm = MODELS[algo](args, env)
    versions = {m.__name__: m.__version__ for m in (stable_baselines3, torch, gym, np)}
    versions["python"] = platform.python_version()
    about = {"algo": f"{algo}-sb3", "args": asdict(args), "versions": versions}
    (run_dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    model.learn(args.total_timesteps, callback=ProgressBar(args.total_timesteps))
    model.save(run_dir / "model.zip")

    eval_env = make_env(args, args.eval_episodes, statistics=env)
    eval_env.seed(args.seed + 1_000_000)
    returns, _ = evaluate_policy(model, eval_env, args.eval_episodes, return_episode_rewards=True)
    print(f"evaluation: {np.mean(returns):.2f} ± {np.std(returns):.2f} over {len(returns)} episodes")
    print(f"run directory: {run_dir}")
    return {"run_dir": run_dir, "returns": np.array(returns)}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in MODELS:
        sys.exit(f"usage: python benchmarks/sb3.py {{{','.join(MODELS)}}} [the flags of algos/ALGO.py]")
    algo = sys.argv[1]
    make_env = maker_of(algo)  # train()'s
    args = parse_args(algo, sys.argv[2:])
    torch.set_float32_matmul_precision(getattr(args, "matmul_precision", "highest"))
    train(algo, args)
