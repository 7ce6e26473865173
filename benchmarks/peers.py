"""The peers that throughput.py --peers times beside SB3: SBX (SB3 in JAX) and CleanRL's scripts, both as they come.

SBX is imported: `pip install sbx-rl`. CleanRL is no package: --cleanrl names a checkout of github.com/vwxyzjn/cleanrl,
whose scripts are run unchanged, but for gymnasium's names of before 1.0, which they expect.
"""

import hashlib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import gymnasium as gym
import torch
from torch.utils.tensorboard import SummaryWriter

SBX = {"ppo": "PPO", "dqn": "DQN", "ddpg": "DDPG", "td3": "TD3", "sac": "SAC"}
"""Its classes, by script here. DDPG's critic has a learning rate of its own there; DQN's layers are all as wide as the
first one, and its gradient is not clipped."""
OFF_POLICY = "--env-id HalfCheetah-v5 --batch-size 256 --learning-starts 1000"
CLEANRL = {
    ("ppo", "CartPole-v1", "cleanrl"): "ppo --env-id CartPole-v1 --num-envs 4 --num-steps 128",
    ("ppo", "HalfCheetah-v5", "cleanrl"): "ppo_continuous_action --env-id HalfCheetah-v5 --num-envs 1",
    ("dqn", "CartPole-v1", "cleanrl"): "dqn --env-id CartPole-v1 --train-frequency 1 --learning-starts 1000",
    ("ddpg", "HalfCheetah-v5", "cleanrl"): f"ddpg_continuous_action {OFF_POLICY} --policy-frequency 1",
    ("ddpg", "HalfCheetah-v5", "cleanrl half"): f"ddpg_continuous_action {OFF_POLICY} --policy-frequency 2",
    ("td3", "HalfCheetah-v5", "cleanrl"): f"td3_continuous_action {OFF_POLICY}",
    ("sac", "HalfCheetah-v5", "cleanrl"): f"sac_continuous_action {OFF_POLICY}",
}
"""Its scripts and their flags, by script here, environment and setting; the networks are those of the work.
ppo_continuous_action normalises observations and rewards, which the work does not; "half" trains DDPG's policy at every
second step, as it does unless told otherwise."""


def sbx_class(name: str) -> Callable:
    """SBX's class, made with the arguments of SB3's: those that it lacks are left out."""
    import sbx

    def make(*args, policy_kwargs: dict, **kwargs):
        policy_kwargs = {x: policy_kwargs[x] for x in ("net_arch", "n_critics") if x in policy_kwargs}
        if name == "DQN":
            del kwargs["max_grad_norm"]
        return getattr(sbx, name)(*args, policy_kwargs=policy_kwargs, **kwargs)

    return make


class VectorEnv(gym.vector.SyncVectorEnv):
    """As before gymnasium 1.0: an episode's end begins the next one in the same step, and `infos` names its last
    observation "final_observation"; what it says of episodes is left out, and is not printed."""

    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions):
        *transition, infos = super().step(actions)
        return *transition, {"final_observation": infos["final_obs"]} if "final_obs" in infos else {}


def transform_observation(env: gym.Env, function: Callable, space=None, wrapper=gym.wrappers.TransformObservation):
    """As before gymnasium 1.0, where the space did not have to be given."""
    return wrapper(env, function, space)


def boundaries_cleanrl(flags: str, args, checkout: Path) -> list[tuple[int, float]]:
    """Trains; (environment steps, seconds) wherever the script logs its speed. `args` is the script's here."""
    boundaries, (script, *flags) = [], flags.split()
    flags += ["--total-timesteps", str(args.total_timesteps), "--no-cuda"]
    add_scalar = SummaryWriter.add_scalar

    def timed(writer, tag, value, step) -> None:
        add_scalar(writer, tag, value, step)
        if tag == "charts/SPS":
            boundaries.append((step, perf_counter()))

    torch.set_num_threads(args.torch_threads)
    os.chdir(args.output_dir)  # it makes its folder `runs` where it is
    with (
        patch.object(SummaryWriter, "add_scalar", timed),
        patch.object(gym.vector, "SyncVectorEnv", VectorEnv),
        patch.object(gym.wrappers, "TransformObservation", transform_observation),
        patch.object(sys, "argv", [script, *flags]),
        patch.object(sys, "path", [str(checkout), *sys.path]),
    ):
        runpy.run_path(str(checkout / "cleanrl" / f"{script}.py"), run_name="__main__")
    return boundaries


def settings_of(algo: str, flags: str, checkout: Path | None) -> dict[str, str]:
    """What can be measured of a script's work, by setting, and a hash of what is run there."""
    settings, this = {}, Path(__file__).read_text()
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("sbx-rl", "jax", "jaxlib")]
    except importlib.metadata.PackageNotFoundError as error:
        sys.exit(f"--peers: {error}; SBX comes with `pip install sbx-rl`")
    if algo in SBX:
        settings["sbx"] = versions
    for (script, env_id, setting), command in CLEANRL.items():
        if checkout and script == algo and env_id in flags:
            settings[setting] = [command, (checkout / "cleanrl" / f"{command.split()[0]}.py").read_text()]
    return {name: hashlib.sha256("\n".join([this, *about]).encode()).hexdigest() for name, about in settings.items()}
