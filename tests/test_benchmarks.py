"""The harness: what is measured is what is compared, and the page says what the measurements say."""

import importlib
import itertools
import json
import os
import re
import runpy
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, fields, replace
from itertools import product
from pathlib import Path

import compounding_error
import deep_sea
import gymnasium as gym
import numpy as np
import pandas as pd
import planning_errors
import planning_mujoco
import ppo
import ppo_atari
import pytest
import random_walk
import report
import rows as rows_module
import run
import sb3
import steps_to_solve
import suites
import torch
import trajectories
from stable_baselines3.common.evaluation import evaluate_policy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


# The baseline -----------------------------------------------------------------------------------------------

COMMON = dict(
    seed=7,
    total_timesteps=2000,
    num_envs=5,
    num_steps=20,
    learning_rate=0.0123,
    gamma=0.91,
    gae_lambda=0.82,
    hidden_sizes=(24, 12),
    log_std_init=-0.7,
    normalize_observations=True,
    normalize_rewards=True,
    env_id="Pendulum-v1",
    device="cpu",
)
OFF_POLICY = dict(
    seed=7,
    total_timesteps=2000,
    num_envs=5,
    buffer_size=1235,
    learning_starts=77,
    batch_size=41,
    train_frequency=3,
    gradient_steps=6,
    learning_rate=0.0123,
    gamma=0.91,
    tau=0.23,
    hidden_sizes=(24, 12),
    env_id="MountainCarContinuous-v0",
    device="cpu",
)
UNUSUAL = {
    "ppo": COMMON
    | dict(
        num_minibatches=5,
        update_epochs=3,
        anneal_lr=True,
        clip_coef=0.13,
        anneal_clip=True,
        clip_value=0.17,
        normalize_advantages=False,
        ent_coef=0.019,
        vf_coef=0.61,
        max_grad_norm=0.77,
        target_kl=0.031,
    ),
    "a2c": COMMON
    | dict(
        anneal_lr=True, optimizer="adam", normalize_advantages=True, ent_coef=0.019, vf_coef=0.61, max_grad_norm=0.77
    ),
    "trpo": COMMON
    | dict(
        normalize_advantages=False,
        target_kl=0.031,
        cg_iterations=7,
        cg_damping=0.013,
        line_search_steps=6,
        line_search_shrink=0.57,
        num_minibatches=5,
        critic_epochs=3,
    ),
    "dqn": OFF_POLICY
    | dict(
        env_id="Acrobot-v1",
        anneal_lr=True,
        n_step=4,
        double=False,
        loss="huber",
        max_grad_norm=0.77,
        target_frequency=35,
        exploration="epsilon",
        exploration_start=0.9,
        exploration_end=0.21,
        exploration_fraction=0.43,
    ),
    "ddpg": OFF_POLICY | dict(noise="ou", exploration_noise=0.31, matmul_precision="high"),
    "td3": OFF_POLICY
    | dict(
        noise="ou",
        exploration_noise=0.31,
        num_critics=3,
        policy_delay=5,
        target_noise=0.13,
        target_noise_clip=0.41,
        matmul_precision="high",
    ),
    "sac": OFF_POLICY
    | dict(
        num_critics=3,
        critic_subset=3,
        policy_delay=1,
        alpha=0.37,
        autotune=False,
        target_entropy=-0.6,
        matmul_precision="high",
    ),
}
PIXELS = dict(env_id="ALE/Breakout-v5", protocol="nature", full_action_space=True, clip_rewards=False)
VECTORS_ALONE = ("env_id", "hidden_sizes", "log_std_init", "normalize_observations", "normalize_rewards", "exploration")
for algo in ("ppo", "dqn"):
    vectors = {name: value for name, value in UNUSUAL[algo].items() if name not in VECTORS_ALONE}
    UNUSUAL[f"{algo}_atari"] = vectors | PIXELS
del UNUSUAL["dqn_atari"]["anneal_lr"], UNUSUAL["dqn_atari"]["tau"]  # constant, and copies of the network, there
"""A value unlike the default for every hyperparameter."""
SAME_FOR_SB3 = {
    "torch_threads",
    "compile",
    "output_dir",
    "resume",
    "checkpoint_every",
    "eval_episodes",
    "capture_video",
}
"""Flags that say how a run is done, not what it computes."""


def sb3_model(algo, **changes):
    """SB3's model for the unusual flags."""
    args = importlib.import_module(algo).Args(**UNUSUAL[algo] | changes)
    for name in ("normalize_observations", "normalize_rewards"):
        setattr(args, name, getattr(args, name, False))
    return sb3.MODELS[algo](args, sb3.maker_of(algo)(args, args.num_envs))


@pytest.mark.parametrize("algo", sb3.MODELS)
def test_every_hyperparameter_has_an_unusual_value(algo):
    defaults = importlib.import_module(algo).Args()
    assert UNUSUAL[algo].keys() | SAME_FOR_SB3 == {field.name for field in fields(defaults)}, (
        "translate the new flag in sb3.py, test it here"
    )
    same = {name for name, value in UNUSUAL[algo].items() if value == getattr(defaults, name)}
    assert same <= {"anneal_lr", "loss", "exploration", "policy_delay"}


@pytest.mark.parametrize("algo", ["ppo", "a2c", "trpo"])
def test_what_all_have_in_common_is_translated_to_sb3(algo):
    model = sb3_model(algo)
    assert (model.seed, model.n_envs, model.n_steps, model.gamma, model.gae_lambda) == (7, 5, 20, 0.91, 0.82)
    assert model.env.gamma == 0.91 and model.env.norm_obs and model.env.norm_reward
    layers = [tuple(x.weight.shape) for x in model.policy.modules() if hasattr(x, "weight")]
    assert layers == [(24, 3), (12, 24), (24, 3), (12, 24), (1, 12), (1, 12)]
    assert model.policy.log_std.item() == pytest.approx(-0.7) and model.policy.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("algo", ["ppo", "ppo_atari", "a2c"])
def test_schedules_are_translated_to_sb3(algo):
    """SB3 asks for its schedules after a rollout: 100 of 2000 steps are gone when ours stands at the beginning."""
    model = sb3_model(algo)
    schedules = {model.lr_schedule: 0.0123} | ({model.clip_range: 0.13} if algo != "a2c" else {})
    for schedule, start in schedules.items():
        assert schedule(0.95) == pytest.approx(start) and schedule(0.45) == pytest.approx(start / 2)
    assert sb3_model(algo, anneal_lr=False).lr_schedule(0.45) == pytest.approx(0.0123)


@pytest.mark.parametrize("algo", ["ppo", "ppo_atari"])
def test_ppos_hyperparameters_are_translated_to_sb3(algo):
    model = sb3_model(algo)
    assert (model.seed, model.n_envs, model.n_steps, model.gamma, model.gae_lambda) == (7, 5, 20, 0.91, 0.82)
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    assert (model.batch_size, model.n_epochs, model.ent_coef, model.vf_coef) == (20, 3, 0.019, 0.61)
    assert (model.max_grad_norm, model.target_kl, model.normalize_advantage) == (0.77, 0.031, False)
    assert model.clip_range_vf(1.0) == 0.17


def test_a2cs_hyperparameters_are_translated_to_sb3():
    model = sb3_model("a2c")
    assert (model.ent_coef, model.vf_coef, model.max_grad_norm, model.normalize_advantage) == (0.019, 0.61, 0.77, True)
    assert isinstance(model.policy.optimizer, torch.optim.Adam)
    rmsprop = sb3_model("a2c", optimizer="rmsprop").policy.optimizer
    assert isinstance(rmsprop, torch.optim.RMSprop)
    assert (rmsprop.defaults["alpha"], rmsprop.defaults["eps"]) == (0.99, 1e-5)


def test_trpos_hyperparameters_are_translated_to_sb3():
    model = sb3_model("trpo")
    assert (model.target_kl, model.cg_max_steps, model.cg_damping, model.normalize_advantage) == (
        0.031,
        7,
        0.013,
        False,
    )
    assert (model.line_search_max_iter, model.line_search_shrinking_factor) == (6, 0.57)
    assert (model.batch_size, model.n_critic_updates, model.lr_schedule(0.5)) == (20, 3, 0.0123)
    model = sb3_model("trpo", env_id="Hopper-v5")  # three dimensions, of which SB3's KL is the mean
    assert (model.target_kl, model.cg_damping) == pytest.approx((0.031 / 3, 0.013 / 3))


@pytest.mark.parametrize("algo", ["dqn", "dqn_atari", "ddpg", "td3", "sac"])
def test_what_off_policy_algorithms_have_in_common_is_translated_to_sb3(algo):
    model = sb3_model(algo)
    assert (model.seed, model.n_envs, model.learning_starts, model.batch_size, model.gamma) == (7, 5, 77, 41, 0.91)
    assert (model.buffer_size, model.replay_buffer.buffer_size) == (1235, 247)
    assert (model.train_freq.frequency, model.train_freq.unit.value, model.gradient_steps) == (3, "step", 6)
    tau = 1 if algo == "dqn_atari" else 0.23
    assert (model.lr_schedule(1 - 15 / 2000 if algo == "dqn" else 0.5), model.tau) == (pytest.approx(0.0123), tau)
    observations = model.observation_space.shape[0]
    layers = [tuple(x.weight.shape) for x in model.policy.modules() if isinstance(x, torch.nn.Linear)]
    assert layers[:2] == ([(512, 3136), (18, 512)] if algo == "dqn_atari" else [(24, observations), (12, 24)])
    assert model.policy.optimizer_class is torch.optim.Adam and not model.policy.optimizer_kwargs


@pytest.mark.parametrize("algo", ["dqn", "dqn_atari"])
def test_dqns_hyperparameters_are_translated_to_sb3(algo):
    model = sb3_model(algo)
    assert (model.n_steps, model.max_grad_norm, model.target_update_interval) == (4, 0.77, 35)
    assert model.replay_buffer.n_steps == 4
    iteration = 3 * 5 / 2000  # SB3 asks for its schedule after the rollout, ours stands at the iteration's beginning
    if algo == "dqn":
        assert [model.lr_schedule(x - iteration) for x in (1.0, 0.5)] == pytest.approx([0.0123, 0.0123 / 2])
        assert sb3_model(algo, anneal_lr=False).lr_schedule(0.5) == pytest.approx(0.0123)
    assert (model.exploration_initial_eps, model.exploration_final_eps, model.exploration_fraction) == (0.9, 0.21, 0.43)


@pytest.mark.parametrize("algo", ["ddpg", "td3"])
def test_exploration_noise_is_translated_to_sb3(algo):
    """Both draw the same process: deviation and correlation of many steps agree."""
    for noise, correlation in (("gaussian", 0.0), ("ou", 0.85)):
        action_noise = sb3_model(algo, noise=noise).action_noise
        np.random.seed(0)
        x = np.array([action_noise() for _ in range(20_000)]).flatten()
        assert x.std() == pytest.approx(0.31 / (1 - correlation**2) ** 0.5, rel=0.1)
        assert np.corrcoef(x[:-1], x[1:])[0, 1] == pytest.approx(correlation, abs=0.05)


def test_td3s_hyperparameters_are_translated_to_sb3():
    model = sb3_model("td3")
    assert (model.policy_delay, model.target_policy_noise, model.target_noise_clip) == (5, 0.13, 0.41)
    assert len(model.critic.q_networks) == 3


def test_sacs_hyperparameters_are_translated_to_sb3():
    model = sb3_model("sac")
    assert (model.ent_coef, model.target_entropy, len(model.critic.q_networks)) == (0.37, -0.6, 3)
    tuned = sb3_model("sac", autotune=True, target_entropy=None)
    assert tuned.log_ent_coef.exp().item() == pytest.approx(0.37) and tuned.target_entropy == -1


@pytest.mark.parametrize(
    "algo, changes, names",
    [
        ("dqn", dict(exploration="boltzmann"), "--exploration boltzmann"),
        ("dqn", dict(loss="squared"), "--loss squared"),
        ("dqn_atari", dict(loss="squared"), "--loss squared"),
        ("sac", dict(critic_subset=2), "--critic-subset 2"),
        ("sac", dict(policy_delay=20), "--policy-delay 20"),
    ],
)
def test_what_sb3_does_not_have_is_refused(algo, changes, names):
    with pytest.raises(SystemExit, match=names):
        sb3_model(algo, **changes)


def test_what_only_the_scripts_can_do_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sb3.py", "sac", "--capture-video"])
    with pytest.raises(SystemExit, match="--capture-video is for algos/sac.py alone"):
        runpy.run_path(str(run.ROOT / "benchmarks" / "sb3.py"), run_name="__main__")
    assert sb3.parse_args("sac", []).normalize_observations is False


@pytest.mark.usefixtures("highest_precision_afterwards")
@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac"])
def test_sb3s_products_have_the_precision_asked_for(monkeypatch, algo):
    flags = "--total-timesteps 60 --learning-starts 50 --hidden-sizes 8 --eval-episodes 1 --matmul-precision {}"
    for precision in ("high", "highest"):
        monkeypatch.setattr("sys.argv", ["sb3.py", algo, *flags.format(precision).split()])
        runpy.run_path(str(ROOT / "benchmarks" / "sb3.py"), run_name="__main__")
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac"])
def test_sb3_takes_what_auto_stands_for_and_recorded_rows_the_highest_precision(monkeypatch, algo):
    script = importlib.import_module(algo)
    monkeypatch.setattr(script, "exact_precision", lambda device: "medium")
    monkeypatch.setattr(script, "products_per_second", lambda threads, *_: -threads)
    args = sb3.parse_args(algo, ["--torch-threads", "auto"])
    assert (args.torch_threads, args.matmul_precision) == (1, "medium")
    for impl in ("ours", "sb3"):
        cell = run.Cell(impl, algo, "Pendulum-v1", 1, 20_000)
        assert cell.command[-2:] == ["--matmul-precision", "highest"]


def test_sb3s_side_of_an_off_policy_run():
    flags = "--total-timesteps 300 --learning-starts 50 --hidden-sizes 8 --eval-episodes 2 --train-frequency 4"
    result = sb3.train("dqn", sb3.parse_args("dqn", flags.split()))
    assert len(result["returns"]) == 2 and (result["run_dir"] / "model.zip").exists()
    assert json.loads((result["run_dir"] / "args.json").read_text())["args"]["learning_starts"] == 50
    rows = (result["run_dir"] / "monitor.csv").read_text().splitlines()[2:]
    assert 200 < sum(float(row.split(",")[1]) for row in rows) <= 300
    assert not sb3.parse_args("sac", []).normalize_observations and not sb3.parse_args("sac", []).normalize_rewards
    assert sb3.parse_args("ppo", ["--normalize-observations"]).normalize_observations


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_sb3_sees_the_same_images_and_rewards(game):
    """From the first image on, bit for bit; without actions, so that sticky ones make no difference."""
    args = ppo_atari.parse_args(["--env-id", f"ALE/{game}-v5", "--no-clip-rewards"])
    theirs, ours = sb3.make_pixel_env(args, 2), ppo_atari.PixelEnvs(args, 2)
    images, expected = theirs.reset(), ours.reset(0)
    rewards, still = [], np.zeros(2, dtype=int)
    for _ in range(150):
        np.testing.assert_array_equal(np.moveaxis(images, -1, 1), expected)
        images, reward, *_ = theirs.step(still)
        expected, _, expected_reward, *_ = ours.step(torch.as_tensor(still))
        np.testing.assert_array_equal(reward, expected_reward)
        rewards.append(reward)
    assert np.sum(rewards) == (-6 if game == "Pong" else 0)


@pytest.mark.parametrize("protocol", ["machado", "nature"])
def test_sb3s_games_are_whole_and_their_scores_unclipped(protocol, tmp_path):
    """Breakout has five lives, its upper bricks count more than one point: three games of random actions."""
    args = ppo_atari.parse_args(["--env-id", "ALE/Breakout-v5", "--protocol", protocol])
    env, rng = sb3.make_pixel_env(args, 2, tmp_path / "monitor.csv"), np.random.default_rng(0)
    sticky = env.unwrapped.envs[0].unwrapped.ale.getFloat("repeat_action_probability")
    assert sticky == (0.25 if protocol == "machado" else 0)
    env.seed(0)
    env.reset()
    ends, clipped = 0, []
    while (tmp_path / "monitor.csv").read_text().count("\n") < 5:
        _, rewards, dones, _ = env.step(rng.integers(4, size=2))
        clipped.append(rewards)
        ends += dones.sum()
    games = pd.read_csv(tmp_path / "monitor.csv", comment="#")
    assert list(games.columns) == ["r", "l", "t"] and len(games) == 3 and games["l"].min() > 100
    assert np.unique(clipped).tolist() == [0, 1] and games["r"].sum() > 0
    assert ends == 3 if protocol == "machado" else ends > 3 * 4


def test_sb3s_nature_protocol_serves_at_a_games_start_alone():
    """After that the ball of Breakout waits for the agent's FIRE, as in ours; the start takes up to 30 frames."""
    env = sb3.make_pixel_env(ppo_atari.parse_args("--env-id ALE/Breakout-v5 --protocol nature".split()), 2)
    env.seed(0)
    env.reset()
    ale = [env.unwrapped.envs[i].unwrapped.ale for i in range(2)]
    assert ale[0].getEpisodeFrameNumber() != ale[1].getEpisodeFrameNumber()
    for _ in range(400):
        env.step(np.zeros(2, dtype=int))
    assert [x.lives() for x in ale] == [4, 4]


def test_sb3s_command_trains_on_images(monkeypatch, tmp_path, capsys):
    flags = "--env-id Catch-v0 --num-envs 2 --num-steps 8 --num-minibatches 1 --total-timesteps 40 --eval-episodes 3"
    monkeypatch.setattr("sys.argv", ["sb3.py", "ppo_atari", *flags.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "sb3.py"), run_name="__main__")
    assert "over 3 episodes" in capsys.readouterr().out
    header, _, *rows = next(tmp_path.glob("runs/*/monitor.csv")).read_text().splitlines()
    assert "Catch-v0" in header and len(rows) == 8, "make_pixel_env's header; 48 steps of balls that take 6"


def test_both_networks_start_from_the_same_distribution():
    """Orthogonal rows of the same gains: the singular values of every layer agree."""
    args = ppo.Args(env_id="Pendulum-v1")
    model = sb3.ppo_model(args, sb3.make_env(args, 1))
    agent = ppo.ActorCritic(model.observation_space, model.action_space, args.hidden_sizes)
    pi, vf = model.policy.mlp_extractor.policy_net, model.policy.mlp_extractor.value_net
    theirs = [pi[0], pi[2], model.policy.action_net, vf[0], vf[2], model.policy.value_net]
    ours = [layer for net in (agent.actor, agent.critic) for layer in net if hasattr(layer, "weight")]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.weight.detach().svd().S, b.weight.detach().svd().S, rtol=1e-4)
        assert not a.bias.any() and not b.bias.any()


# Hashes of code ---------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of algos/ and benchmarks/ to change, which run.py takes for the repository."""
    for folder in ("algos", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "plots"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("impl, file", [("ours", "algos/ppo.py"), ("sb3", "benchmarks/sb3.py")])
def test_evidence_outlives_comments_and_docstrings_but_no_change_of_code(copy, impl, file):
    before = run.source_sha256(impl, "ppo")
    for docstring in ('"""PPO', '    """Trains') if impl == "ours" else ('"""Stable', '    """SB3'):
        edit(copy / file, docstring, f"{docstring}, in other words,")
    (copy / file).write_text((copy / file).read_text() + "\n# a comment\n")
    assert run.source_sha256(impl, "ppo") == before
    edit(copy / file, "eps=1e-5", "eps=1e-6")
    assert run.source_sha256(impl, "ppo") != before


def test_evidence_is_of_the_flags_that_a_cell_is_run_with():
    cells = [cell for cell in run.cells_of("model-based") if cell.impl == "sb3"]
    assert cells and all("--learning-starts 1000" in " ".join(cell.command) for cell in cells)
    args = json.loads(json.dumps(asdict(sb3.parse_args("sac", cells[0].command[3:]))))  # as args.json has them
    source, version = run.source_sha256("sb3", "sac"), run.stable_baselines3.__version__
    ran = run.code_sha256(cells[0], source, args, version, run.with_hashes(cells[0].flags))
    assert run.present_code(cells[0]) == ran
    assert run.present_code(replace(cells[0], total_timesteps=14_000)) != ran


@pytest.mark.parametrize("algo", sb3.MODELS)
def test_sb3s_evidence_is_of_the_flags_that_it_reads(algo):
    """Not of seed, folders and the like, nor of what our script alone has: a flag that comes or goes there."""
    cell = run.Cell("sb3", algo, UNUSUAL[algo]["env_id"], 1, 1000)
    args = asdict(importlib.import_module(algo).Args(**UNUSUAL[algo]))

    def code(**changes):
        return run.code_sha256(cell, "source", args | changes, "2.9", "")

    same = {name for name in args if code(**{name: "another"}) == code()}
    ours_alone = {"double"} if "dqn" in algo else set()
    device = set() if algo.endswith("_atari") else {"device"}
    assert same == SAME_FOR_SB3 - {"torch_threads", "eval_episodes"} | {"seed"} | ours_alone | device
    assert code(new_flag=1) == code(**dict.fromkeys(same)) == code()
    without = {name: value for name, value in args.items() if name != "matmul_precision"}
    hashes = [run.code_sha256(cell, "source", without | x, "2.9", "") for x in ({}, {"matmul_precision": "highest"})]
    assert hashes[0] == hashes[1] != code(matmul_precision="medium"), "no such flag is as good as its default"


@pytest.mark.parametrize("algo", sb3.MODELS)
def test_every_flag_that_sb3_reads_is_found(algo):
    """In the text of sb3.py; here those are listed that making its environments and model asks for."""
    asked = set()

    class Listening:
        """Args, as sb3.parse_args gives them."""

        def __getattr__(self, name):
            asked.add(name)
            return UNUSUAL[algo].get(name, False)

    args = Listening()
    sb3.MODELS[algo](args, sb3.maker_of(algo)(args, 1))
    found = run.arguments_read((ROOT / "benchmarks" / "sb3.py").read_text(), run.runs_sb3s(algo)).keys()
    assert "gamma" in asked and asked <= found | {"seed"}
    of_the_run = {"torch_threads", "num_envs", "total_timesteps", "eval_episodes", "matmul_precision"}
    assert found - asked <= of_the_run, "what it does not ask for is read by train() or by the lines below it"


def test_a_new_flag_of_ours_leaves_sb3s_evidence_as_it_is_until_sb3_reads_it(copy, monkeypatch):
    cell, script_args = run.Cell("sb3", "a2c", "Pendulum-v1", 1, 1000), run.script_args
    plain = run.present_code(cell)

    def codes():
        for value in (3, 4):
            monkeypatch.setattr(run, "script_args", lambda *x, value=value: script_args(*x) | {"new_flag": value})
            yield run.present_code(cell)

    assert set(codes()) == {plain}
    edit(copy / "benchmarks" / "sb3.py", "if args.optimizer == ", "if args.new_flag and args.optimizer == ")
    assert len({plain, *codes()}) == 3


def test_sb3s_hash_is_of_all_that_a_model_uses(copy):
    before = {algo: run.source_sha256("sb3", algo) for algo in sb3.MODELS}
    edit(copy / "benchmarks" / "sb3.py", "theta=0.15", "theta=0.9")
    edit(copy / "benchmarks" / "sb3.py", "make_pixel_env(args, num_envs: int,", "make_pixel_env(args, num_envs,")
    changed = {algo for algo in sb3.MODELS if run.source_sha256("sb3", algo) != before[algo]}
    assert changed == {"ddpg", "td3", "ppo_atari", "dqn_atari"}
    pixels = {algo: run.source_sha256("sb3", algo) for algo in ("ppo_atari", "dqn_atari")}
    edit(copy / "benchmarks" / "sb3.py", 'loss="huber"', 'loss="squared"')
    assert run.source_sha256("sb3", "sac") == before["sac"] and run.source_sha256("sb3", "dqn") != before["dqn"]
    edit(copy / "benchmarks" / "sb3.py", "env = VecMonitor(env", "env = VecMonitor(env or env")
    assert run.source_sha256("sb3", "sac") != before["sac"]
    assert pixels == {algo: run.source_sha256("sb3", algo) for algo in pixels}, "they have environments of their own"


def test_our_hash_is_of_the_flags_and_the_files_they_name(copy, monkeypatch):
    cell = next(cell for cell in run.cells_of("imitation") if cell.algo == "bc")
    hashes = [run.present_code(cell)]
    expert = copy / cell.flags.split()[1]
    expert.parent.mkdir(parents=True)
    for content in (b"one", b"other"):
        expert.write_bytes(content)
        hashes.append(run.present_code(cell))
    monkeypatch.setitem(run.FLAGS, (cell.algo, cell.env_id, cell.total_timesteps), f"{cell.flags} --learning-rate 0.5")
    assert len({*hashes, run.present_code(cell)}) == 4


def test_a_change_that_leaves_every_episode_as_it_was_is_confirmed_by_one_seed(copy, monkeypatch, capsys):
    monkeypatch.setitem(run.SUITES, "tiny", [suites.Entry(["a2c"], ["CartPole-v1"], range(1, 3), 400, ("ours",))])
    args = run.Args("tiny", work=copy / "work", results=copy / "results")
    cells = run.cells_of("tiny")
    assert run.run(cells, args) == 0
    measured = run.read_runs(args.results)
    first, episodes = measured.code_sha256.iloc[0], copy / "results" / "episodes"
    assert set(measured.code_sha256) == {first}
    assert run.confirm(cells, args) == 0 and not (copy / "work" / "confirm").exists(), "nothing has changed"

    edit(
        copy / "algos" / "a2c.py",
        "if run.step - logged_step >= LOG_EVERY",
        "if run.step - logged_step + 0 >= LOG_EVERY",
    )
    files = {path.name: path.read_bytes() for path in episodes.iterdir()}
    assert run.confirm(cells, args) == 0
    confirmed = run.read_runs(args.results)
    assert set(confirmed.code_sha256) == {run.present_code(cells[0])} != {first}
    assert confirmed.drop(columns="code_sha256").equals(measured.drop(columns="code_sha256"))
    assert {path.name: path.read_bytes() for path in episodes.iterdir()} == files
    assert len(list((copy / "work" / "confirm").glob("ours__*"))) == 1, "one seed is enough"

    edit(copy / "algos" / "a2c.py", "logged_step + 0 >= LOG_EVERY", "logged_step - 0 >= LOG_EVERY")
    with monkeypatch.context() as patch:
        patch.setattr(run, "run", lambda *_: 1)  # today's code fails; what an older confirmation left is no evidence
        assert run.confirm(cells, args) == 1 and run.read_runs(args.results).equals(confirmed)
    edit(copy / "algos" / "a2c.py", "gamma: Fraction = 0.99", "gamma: Fraction = 0.5")
    assert run.confirm(cells, args) == 1 and "--rerun-changed" in capsys.readouterr().err
    assert run.read_runs(args.results).equals(confirmed)


# Statistics -------------------------------------------------------------------------------------------------


def test_iqm_is_the_mean_of_the_middle():
    assert report.iqm(np.array([100, 3, 1, 2, -50, 4, 5, 6, 7, 1000.0])) == pytest.approx(np.mean([2, 3, 4, 5, 6, 7]))
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == 3


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    x, y = np.array([1.0, 2.0]), np.array([0.0, 1.0, 5.0])
    assert report.probability_of_improvement(x, y) == pytest.approx((1 + 0.5 + 1 + 1) / 6)


def test_interval_covers_a_difference_as_often_as_it_says():
    """Of 95 % intervals from 10 seeds a little under 95 % hold the truth: the bootstrap's known optimism, no more."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, (300, 10)), rng.normal(0, 1, (300, 10))
    low, high = report.interval(report.iqm_difference, x, y)
    assert 0.86 < np.mean((low <= 1) & (1 <= high)) < 0.98
    assert np.mean((low <= 0) & (0 <= high)) < 0.7


def test_what_both_sides_owe_to_the_same_start_states_is_no_difference():
    """Returns that vary by 100 with the seed and by 1 with the side."""
    rng = np.random.default_rng(0)
    start = rng.normal(0, 100, 10)
    x, y = start + rng.normal(5, 1, 10), start + rng.normal(0, 1, 10)
    low, high = report.interval(report.iqm_difference, x, y, paired=True)
    assert 3 < low < high < 7 and report.verdict(x, y) == "ours better"
    low, high = report.interval(report.iqm_difference, x, y)
    assert low < -50 and high > 50


def test_steps_to_reach_is_the_end_of_the_first_bin_that_does():
    curve = np.linspace(0, 49, report.BINS)
    assert report.steps_to_reach(curve, 9.5, 50_000) == 11_000
    assert report.steps_to_reach(curve, 0, 50_000) == 1_000 and np.isnan(report.steps_to_reach(curve, 50, 50_000))


def test_a_row_compares_the_seeds_that_both_sides_have(measured):
    runs, results = measured
    cells = [run.Cell(impl, "a2c", "CartPole-v1", seed, 100_000) for seed in (1, 2, 3, 4) for impl in ("ours", "sb3")]
    row = report.comparison("a2c", "CartPole-v1", 100_000, runs.drop(index=astuple(cells[0])), cells, results)
    assert row["seeds"] == "2/4" and row["ours"].startswith("202.5") and row["SB3"].startswith("302.5")
    assert row["difference"] == "−100.0" and row["verdict"] == "too few seeds"  # no interval from two
    assert report.comparison("a2c", "CartPole-v1", 100_000, runs, cells, results)["verdict"] == "SB3 better, few seeds"
    row = report.comparison(
        "a2c", "CartPole-v1", 100_000, runs.drop(index=list(map(astuple, cells[:6:2]))), cells, results
    )
    assert (row["seeds"], row["ours"], row["difference"]) == ("3/4", "—", "—") and row["SB3"].startswith("302.0")
    assert row["worst seed"] == "301.0" and row["difference over training"] == "—"


def test_a_failed_seed_is_shown_beside_the_iqm_that_leaves_it_out(measured):
    runs, results = measured
    cells = [run.Cell(impl, "a2c", "CartPole-v1", seed, 100_000) for seed in (1, 2, 3) for impl in ("ours", "sb3")]
    runs.loc[astuple(cells[2]), "eval_mean"] = 9.0
    assert report.comparison("a2c", "CartPole-v1", 100_000, runs, cells, results)["worst seed"] == "9.00 / 301.0"


def test_the_difference_over_training_is_of_the_whole_curve(tmp_path):
    """The same evaluations; ours learns in the first half of the run, SB3 in the second; the first end is at 10 %.

    A seed that ours alone has, of another kind, does not count.
    """
    (tmp_path / "episodes").mkdir()
    rows, cells = [], []
    curves = {"ours": [0, 0, 100, 100, 100], "sb3": [0, 0, 0, 0, 100]}
    for seed in (1, 2, 3, 4):
        for impl, returns in curves.items() if seed < 4 else [("ours", [1e6] * 5)]:
            cells.append(run.Cell(impl, "a2c", "CartPole-v1", seed, 1000))
            rows.append(
                dict(zip(run.KEY, astuple(cells[-1]))) | dict(eval_mean=100.0, code_sha256="older", versions="torch=2")
            )
            ends = pd.DataFrame({"r": np.repeat(returns, 2) + seed, "l": [120] + 9 * [97], "t": 1.0})
            ends.to_csv(tmp_path / "episodes" / f"{cells[-1].name}.csv.gz")
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    row = report.comparison("a2c", "CartPole-v1", 1000, run.read_runs(tmp_path), cells, tmp_path)
    assert row["difference"] == "0.00 [0.00, 0.00]"
    # Ends at steps 120, 217, 314, …, in the fiftieths 6, 10, 15, 20, 25, …, 44, 49: ours is at 100 in 25, SB3 in 6.
    middle, *ends = row["difference over training"].replace("[", "").replace("]", "").replace(",", "").split()
    assert float(middle) == pytest.approx(38) and 36 < float(ends[0]) < 38 < float(ends[1]) < 40


def test_what_a_suite_still_lacks_is_said():
    cells = [run.Cell("ours", algo, "CartPole-v1", seed, 5) for algo in ("ppo", "a2c") for seed in (1, 2)]
    assert report.coverage(cells, cells) == ""
    text = report.coverage(cells, cells[:1])
    assert text.startswith("1 of the suite's 4 runs have been made, of 1 of its 2 pairs")
    assert "3 of the suite's 4 runs have been made, of 2 of its 2 pairs" in report.coverage(cells, cells[:3])


def test_start_states_are_what_seeds_differ_by():
    """Two sides 4 apart in each of two seeds 30 apart; a third side has hardly begun."""
    cells = [
        ("ours", "td3", 1, -170.0),
        ("sb3", "td3", 1, -174.0),
        ("ours", "td3", 2, -140.0),
        ("sb3", "td3", 2, -144.0),
    ]
    cells += [("ours", "sac", 1, -900.0), ("ours", "ppo", 1, -900.0)]
    runs = pd.DataFrame(cells, columns=["impl", "algo", "seed", "eval_mean"])
    runs = runs.assign(env_id="Pendulum-v1", total_timesteps=20_000)
    text = report.start_states(pd.concat([runs, runs.assign(total_timesteps=100_000)]))
    assert "- td3 on Pendulum-v1" in text and "−172, −142:" in text
    assert "21.2 apart (standard deviation), but within a seed 2.8." in text
    assert report.start_states(runs[runs["seed"] == 1]) == ""
    apart = runs.assign(eval_mean=runs["eval_mean"] + 30 * (runs["impl"] == "ours"))
    assert report.start_states(apart) == ""


def test_the_headline_shows_what_is_slower_too(measured):
    runs, _ = measured
    speeds = [("a2c CartPole", setting, i, x) for i in (1, 2) for setting, x in (("eager", 50.0), ("sb3", 100.0))]
    speeds = pd.DataFrame(speeds, columns=["work", "setting", "round", "steps_per_second"]).assign(machine="one")
    text = report.headline(runs, speeds.assign(code_sha256="older", flags=""))
    assert "| [a2c](algos/a2c.py) | 202.0 / 302.0 † | 0.5 × on CartPole † |" in text and "and 3 seeds" in text
    now = speeds.assign(flags=report.WORKS["a2c CartPole"].flags)
    now["code_sha256"] = [run.source_sha256("sb3" if x == "sb3" else "ours", "a2c") for x in now["setting"]]
    assert "| 0.5 × on CartPole |" in report.headline(runs, now)
    compiled = now[now["setting"] == "eager"].assign(setting="compile", steps_per_second=200.0)
    assert "| 0.5 / 2.0 × on CartPole |" in report.headline(runs, pd.concat([now, compiled]))
    slower = now.assign(machine="other", steps_per_second=now["steps_per_second"] * ([1, 5] * 2))
    assert "| 0.1 × on CartPole |" in report.headline(runs, pd.concat([now, slower]))  # the machine measured last
    others = [now.assign(work=f"{algo} CartPole", machine=f"{algo}'s") for algo in ("ppo", "mbpo")]
    assert "counted, on a CPU." in report.headline(runs, pd.concat([now, *others]))  # neither of these is in the table
    other = now.assign(work="a2c HalfCheetah", machine="other")
    assert "counted, on one of 2 CPUs." in report.headline(runs, pd.concat([now, other]))
    now.loc[now["setting"] == "sb3", "code_sha256"] = "older"
    assert "| 0.5 × on CartPole † |" in report.headline(runs, now)


def test_the_headline_says_where_there_are_fewer_seeds(measured, monkeypatch):
    runs, _ = measured
    more = runs.reset_index().assign(total_timesteps=100_000, env_id="Acrobot-v1")
    more = pd.concat([more, more.assign(seed=more["seed"] + 3)]).set_index(run.KEY)
    speeds = pd.DataFrame([("a2c CartPole", "eager", 1, 1.0), ("a2c CartPole", "sb3", 1, 1.0)])
    speeds = speeds.set_axis(["work", "setting", "round", "steps_per_second"], axis=1)
    speeds = speeds.assign(code_sha256="", flags="", machine="one")
    text = report.headline(pd.concat([runs, more]).sort_index(), speeds)
    assert "| 202.0 / 302.0 (3 seeds) † | 202.0 / 302.0 † |" in text and "and 6 seeds" in text


# Recording and reporting ------------------------------------------------------------------------------------


def test_a_finished_run_is_recorded_once_and_not_measured_again(tmp_path):
    cell = run.Cell("ours", "ppo", "CartPole-v1", 3, 100_000)
    folder, results = tmp_path / "work" / cell.name, tmp_path / "results"
    (folder / "somerun").mkdir(parents=True)
    assert cell.name == "ours__ppo__CartPole-v1__3"
    assert cell.command == ["python", "algos/ppo.py", "--env-id", "CartPole-v1", "--seed", "3"]
    (folder / "stdout.txt").write_text("evaluation: 12.50 ± 1.00 over 10 episodes\nrun directory: x/somerun\n")
    (folder / "somerun" / "monitor.csv").write_text('#{"t_start": 0}\nr,l,t\n10.0,10,0.5\n20.0,30,2.0\n')
    about = {"args": run.script_args("ppo", "CartPole-v1"), "versions": {"torch": "2"}}
    (folder / "somerun" / "args.json").write_text(json.dumps(about))
    assert run.plan(cell, folder, run.read_runs(results), False)[0] == "record"
    for _ in range(2):
        run.record(cell, folder, results)
    runs = pd.read_csv(results / "runs.csv")
    assert len(runs) == 1 and (runs.eval_mean[0], runs.steps_per_second[0], runs.seconds[0]) == (12.5, 20, 2)
    assert pd.read_csv(results / "episodes" / f"{cell.name}.csv.gz").r.tolist() == [10, 20]
    assert run.plan(cell, folder, run.read_runs(results), False)[0] == "skip"
    runs.assign(code_sha256="older").to_csv(results / "runs.csv", index=False)
    assert run.plan(cell, folder, run.read_runs(results), False)[0] == "skip"
    assert run.plan(cell, folder, run.read_runs(results), True)[0] != "skip"
    (folder / "somerun" / "monitor.csv").write_text('#{"t_start": 0}\nr,l,t\n')  # no episode has ended
    run.record(cell, folder, results)
    runs = pd.read_csv(results / "runs.csv")
    assert runs.eval_mean[0] == 12.5 and np.isnan(runs.seconds[0]) and np.isnan(runs.steps_per_second[0])


def test_a_run_goes_on_with_the_code_that_began_it_or_begins_anew(tmp_path):
    cell = run.Cell("ours", "ppo", "CartPole-v1", 3, 100_000)
    run_dir = tmp_path / "somerun"
    run_dir.mkdir()
    (run_dir / "checkpoint.pt").touch()
    (run_dir / "args.json").write_text(json.dumps({"args": run.script_args("ppo", "CartPole-v1"), "versions": {}}))
    (tmp_path / "meta.json").write_text(json.dumps(run.about_now(cell)))
    runs = run.read_runs(tmp_path)
    assert run.plan(cell, tmp_path, runs, False) == ("resume", run_dir)
    (tmp_path / "meta.json").write_text(json.dumps(run.about_now(cell) | {"source_sha256": "older"}))
    assert run.plan(cell, tmp_path, runs, False) == ("run", None)


@pytest.fixture
def measured(tmp_path):
    """Results of kfac, whose return rises to 100 within 10k steps, and of both A2Cs, whose does within 40k and 80k."""
    rows = []
    (tmp_path / "episodes").mkdir()
    for impl, algo, rise, code in (("ours", "kfac", 10_000, 1), ("ours", "a2c", 40_000, 2), ("sb3", "a2c", 80_000, 3)):
        for seed in (1, 2, 3):
            cell = run.Cell(impl, algo, "CartPole-v1", seed, 100_000)
            returns = np.minimum(100, np.arange(1, 1001) * 100 * 100 / rise)
            pd.DataFrame({"r": returns, "l": 100, "t": 1.0}).to_csv(tmp_path / "episodes" / f"{cell.name}.csv.gz")
            row = dict(zip(run.KEY, (impl, algo, "CartPole-v1", seed, 100_000)))
            rows.append(row | {"eval_mean": 100.0 * code + seed, "code_sha256": "older", "versions": "torch=2"})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return run.read_runs(tmp_path), tmp_path


def test_sample_efficiency_counts_the_steps_to_a2cs_final_return(measured):
    ours, sb3s = report.efficiency_rows(*measured)
    assert (ours["against"], ours["A2C's steps"], ours["its steps"], ours["×"]) == ("our A2C", "42k", "12k", "3.5")
    assert (sb3s["against"], sb3s["A2C's steps"], sb3s["its steps"], sb3s["×"]) == ("SB3's A2C", "82k", "12k", "6.8")
    assert ours["A2C's final return"] == "100.0" and ours["algorithm"] == "kfac †"


def test_an_algorithm_without_counterpart_stands_beside_sb3s_a2c_and_ppo(measured):
    runs, results = measured
    cells = [run.Cell("ours", "kfac", "CartPole-v1", seed, 100_000) for seed in (1, 2, 3, 4)]
    row = report.comparison("kfac", "CartPole-v1", 100_000, runs, cells, results)
    assert row["ours"].startswith("102.0 [") and row["seeds"] == "3/4"
    assert row["SB3"].startswith("A2C 302.0 [") and row["SB3"].endswith("(3)") and "PPO" not in row["SB3"]
    assert (row["difference"], row["difference over training"]) == ("—", "—")


@pytest.fixture
def variants(monkeypatch):
    """A fork of a2c.py, here a2c.py with a flag, against a2c.py, and A2C's own script with another one, against SB3."""
    monkeypatch.setitem(run.VARIANTS, "forked", run.Variant("a2c", "--gamma 0.9", against="a2c"))
    monkeypatch.setitem(run.VARIANTS, "long", run.Variant("a2c", "--num-steps 8"))
    entries = [suites.Entry(["forked", "long"], ["CartPole-v1"], range(1, 6), 100_000)]
    monkeypatch.setitem(run.SUITES, "mine", entries)


def test_a_variant_is_run_with_its_script_and_flags(variants, monkeypatch):
    cells = run.cells_of("mine")
    assert [(cell.impl, cell.algo) for cell in cells] == 5 * [("ours", "forked")] + 5 * [("ours", "long")]
    command = "python algos/a2c.py --env-id CartPole-v1 --seed 1 --total-timesteps 100000 --gamma 0.9"
    assert " ".join(cells[0].command) == command and cells[0].name == "ours__forked__CartPole-v1__1__100000"
    plain = run.Cell("ours", "a2c", "CartPole-v1", 2, 100_000)
    assert len({run.present_code(cell) for cell in (plain, cells[0], cells[5])}) == 3
    assert run.source_sha256("ours", "forked") == run.source_sha256("ours", "a2c")
    monkeypatch.setitem(run.FLAGS, ("forked", "CartPole-v1", 100_000), "--num-envs 4")
    assert cells[0].flags == "--num-envs 4 --gamma 0.9"


def test_a_fork_is_compared_with_its_original(variants, measured, monkeypatch):
    """Of five seeds four are measured, and three of these of the original, too."""
    runs, results = measured
    rows = [("ours", "forked", "CartPole-v1", x, 100_000, 149.0 + x, "older", "torch=2") for x in (1, 2, 3, 4)]
    rows[-1] = *rows[-1][:5], 9999.0, "older", "torch=2"
    runs = pd.concat([runs.reset_index(), pd.DataFrame(rows, columns=runs.reset_index().columns)])
    runs = runs.set_index(run.KEY).sort_index()
    cells = [cell for cell in run.cells_of("mine") if cell.algo == "forked"]
    for cell in cells:
        returns = np.full(1000, 100.0)  # from the first step on; the original's mean is 80
        path = results / "episodes" / f"{cell.name}.csv.gz"
        pd.DataFrame({"r": returns, "l": 100, "t": 1.0}).to_csv(path)
    row = report.comparison("forked", "CartPole-v1", 100_000, runs, cells, results)
    assert (row["algorithm"], row["seeds"], row["worst seed"]) == ("forked †", "3/5", "150.0 / 201.0")
    assert row["ours"].startswith("151.0 [") and row["SB3"].startswith("a2c 202.0 [")
    assert row["difference"].startswith("−51.0 [") and row["verdict"] == "a2c better, few seeds"
    assert float(row["difference over training"].split()[0]) == pytest.approx(20, abs=1)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    report.plot_suite([("forked", "CartPole-v1", 100_000)], runs, results, results / "plot.png")
    assert [x.get_text() for x in figures[0].legends[0].get_texts()] == ["ours", "a2c"]
    few = runs.drop(index=[astuple(cell) for cell in cells[:3]])  # seed 4, which the original has not
    assert report.comparison("forked", "CartPole-v1", 100_000, few, cells, results)["seeds"] == "1/5"
    alone = runs.drop(index="a2c", level="algo")
    row = report.comparison("forked", "CartPole-v1", 100_000, alone, cells, results)
    assert (row["seeds"], row["SB3"], row["difference"]) == ("4/5", "a2c —", "—") and row["ours"].startswith("152 [")


def test_a_page_of_ones_own(variants, measured, monkeypatch, tmp_path):
    """With its own commands, and links that lead to the repository; the page and README.md of others stay."""
    runs, results = measured
    mine = tmp_path / "root" / "mine" / "results"
    shutil.copytree(results, mine)
    runs.assign(command="python …", date="2026-11-27", script_sha256="abc").to_csv(mine / "runs.csv")
    shutil.copy(RESULTS / "throughput.csv", mine)
    lines = report.HEADLINE.splitlines()
    readme = f"{lines[0]}\nthe repository's headline\n{lines[-1]}\n"
    (tmp_path / "root" / "README.md").write_text(readme)
    monkeypatch.setattr("sys.argv", ["", "--results", str(mine), "--suites", "classic"])
    for _ in range(2):  # the second time over the first one's page
        report.main()
    page = (mine.parent / "README.md").read_text()
    assert f"`python benchmarks/report.py --results {mine} --suites classic` from [results/](results/)" in page
    assert f"python benchmarks/run.py classic --workers 2 --results {mine}\n" in page and "## Throughput" not in page
    assert "holds. To measure" in page and "`throughput.py`" not in page
    assert f'pd.read_csv("{mine}/runs.csv")' in page and "benchmarks/results" not in page
    (link,) = {x for x in re.findall(r"\]\(([^)]*sb3\.py)\)", page)}
    assert (mine.parent / link).resolve() == ROOT / "benchmarks" / "sb3.py"
    monkeypatch.setattr("sys.argv", ["", "--results", str(mine)])
    report.main()  # with everything that is there: no headline of theirs for the README.md above
    assert "## Throughput" in (mine.parent / "README.md").read_text()
    assert (tmp_path / "root" / "README.md").read_text() == readme
    monkeypatch.setattr("sys.argv", ["", "--results", str(mine), "--suites", "smoke"])
    report.main()
    assert "## classic" not in (mine.parent / "README.md").read_text()
    shutil.move(mine, mine.parent / "others")
    for place in (mine.parent / "others", shutil.copytree(mine.parent / "others", tmp_path / "root" / "results")):
        monkeypatch.setattr("sys.argv", ["", "--results", str(place)])
        with pytest.raises(SystemExit, match=f"choose a folder within a new one, such as {place.name}/results"):
            report.main()
    monkeypatch.setattr("sys.argv", ["", "--suites", "classics"])
    with pytest.raises(SystemExit, match="--suites classics: no such suite; benchmarks/suites.py has smoke, classic"):
        report.main()
    monkeypatch.setattr("sys.argv", ["", "--suites", "classic"])
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("the committed page was written over"))
    with pytest.raises(SystemExit, match="--suites would leave the rest out of .*README.md; give it other --results"):
        report.main()
    text = report.variants("mine")
    assert text.startswith(
        "- forked: `algos/a2c.py --gamma 0.9`, against a2c, which stands in SB3's place.\n- long: `algos"
    )


def test_the_pages_are_what_report_py_makes_of_the_measurements(tmp_path, monkeypatch):
    """Red? Run `python benchmarks/report.py` and commit the pages."""
    pages = ("README.md", "benchmarks/README.md")
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    text = (ROOT / pages[0]).read_text()
    (tmp_path / pages[0]).write_text(text.replace("[ppo](algos/ppo.py) |", "[ppo](algos/ppo.py) | an older figure"))
    assert text.count("[ppo](algos/ppo.py) |") == 1
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path / "benchmarks" / "results")])
    report.main()
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    for plot in (tmp_path / "benchmarks" / "plots").iterdir():
        assert (ROOT / "benchmarks" / "plots" / plot.name).exists()


# Imitation --------------------------------------------------------------------------------------------------


def mean_mistakes(policy, horizon: int, episodes: int) -> float:
    """Of `policy`, from an observation and the environment to an action."""
    env, total = gym.wrappers.TimeLimit(compounding_error.Ledge(), horizon), 0
    for seed in range(episodes):
        obs, ended = env.reset(seed=seed)[0], False
        while not ended:
            obs, reward, _, ended, _ = env.step(policy(obs, env.unwrapped))
            total -= reward
    return total / episodes


def test_mistakes_on_the_ledge_are_as_many_as_expected(monkeypatch):
    monkeypatch.setattr(compounding_error, "ERROR", 0.1)
    monkeypatch.setattr(report, "ERROR", 0.1)
    monkeypatch.setattr(report, "HORIZONS", (5, 20))
    expected = report.expected_mistakes()
    for i, horizon in enumerate((5, 20)):
        ignorant = mean_mistakes(lambda obs, env: int(obs[0] > 0), horizon, 3000)
        returns = mean_mistakes(lambda obs, env: 2 if obs[1] else int(obs[0] > 0), horizon, 3000)
        np.testing.assert_allclose(ignorant, expected["bc"][i], rtol=0.05)
        np.testing.assert_allclose(returns, expected["dagger"][i] / 1.1, rtol=0.05)  # no mistakes on the ground: 1 + ε
    assert mean_mistakes(lambda obs, env: compounding_error.expert(obs[None])[0], 20, 100) == 0


def test_exponent_is_that_of_a_power():
    T = np.array(report.HORIZONS)[:, None]
    mistakes = 0.3 * T**1.7 * np.array([0.5, 1.5, 1.0])
    np.testing.assert_allclose(report.exponent(mistakes), 1.7)
    np.testing.assert_allclose(report.interval(report.exponent, mistakes), 1.7)
    assert report.exponent(mistakes[:, None, :]).shape == (1,)


def test_a_clone_stays_down_and_dagger_comes_back(monkeypatch):
    for name, value in (("ERROR", 0.02), ("LABELS", 2000), ("EPISODES", 200)):
        monkeypatch.setattr(compounding_error, name, value)
    monkeypatch.setattr(report, "ERROR", 0.02)
    monkeypatch.setattr(report, "HORIZONS", (50,))
    for algo, expected in report.expected_mistakes().items():
        assert abs(compounding_error.mistakes(algo, 50, 1) / expected - 1) < 0.25


def test_compounding_error_measures_what_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rows_module, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(compounding_error, "mistakes", lambda *cell: asked.append(cell) or cell[1] / 4)
    for seeds in (1, 1, 2):
        monkeypatch.setattr("sys.argv", ["", "--seeds", str(seeds), "--results", str(tmp_path)])
        compounding_error.main()
    cells = list(product(("bc", "dagger"), compounding_error.HORIZONS, (1, 2)))
    assert sorted(asked) == cells
    rows = pd.read_csv(tmp_path / "compounding_error.csv", index_col=compounding_error.KEY)
    assert list(rows.index) == cells and list(rows.mistakes) == [cell[1] / 4 for cell in cells]
    assert "## Compounding error" in report.compounding(tmp_path) and "† |" not in report.compounding(tmp_path)
    excess = max(x / 4 / y - 1 for x, y in zip(report.HORIZONS, report.expected_mistakes()["bc"]))
    assert f"up to {excess:.0%} off what is expected" in report.compounding(tmp_path)
    assert (tmp_path.parent / "plots" / "compounding_error.png").exists()
    rows.drop(index=[("bc", 10, 1)]).assign(code_sha256="older").to_csv(tmp_path / "compounding_error.csv")
    assert "1 seeds" in report.compounding(tmp_path) and "| bc † |" in report.compounding(tmp_path)


def test_deep_sea_measures_what_is_missing_and_draws_what_is_complete(tmp_path, monkeypatch):
    """Real runs, of 20 episodes at most: at random some of depth 7 are censored, R-max's are not."""
    for name, value in {"DEPTHS": (4, 7), "SHALLOW": (3,), "LIMIT": 20, "UNDIRECTED": [("none", 1.0)]}.items():
        monkeypatch.setattr(deep_sea, name, value)
    monkeypatch.setattr(deep_sea, "DIRECTED", [("rmax", 0.0)])
    monkeypatch.setattr(rows_module, "ProcessPoolExecutor", ThreadPoolExecutor)
    asked, original = [], deep_sea.episodes_needed
    monkeypatch.setattr(deep_sea, "episodes_needed", lambda *cell: asked.append(cell) or original(*cell))
    for seeds in (2, 3):
        monkeypatch.setattr("sys.argv", ["", "--seeds", str(seeds), "--results", str(tmp_path)])
        deep_sea.main()
    assert len(asked) == len({*asked}) == 3 * 5
    rows = pd.read_csv(tmp_path / "deep_sea.csv", index_col=deep_sea.KEY)["episodes"]
    assert (rows["rmax"] <= 20).all() and (rows["none"].xs(7, level="depth") == 21).any() and rows.min() >= 1
    text = deep_sea.section(tmp_path)
    assert "| rmax | –" in text and "median of 3 seeds" in text and "†" not in text
    assert (tmp_path.parent / "plots" / "deep_sea.png").exists()
    rows.to_frame().assign(code_sha256="older").drop(index=[("rmax", 0.0, 7, 1)]).to_csv(tmp_path / "deep_sea.csv")
    text = deep_sea.section(tmp_path)
    assert "| rmax † | – |" in text and text.count("> 20") >= 1


def test_an_optimal_plan_is_told_from_another():
    env, args = deep_sea.rmax.DeepSea(5, 1), deep_sea.rmax.Args()
    seen = deep_sea.rmax.Experience(Counter(), np.zeros((25, 2), int), np.zeros((25, 2)))
    for state, action in product(range(25), range(2)):
        ((_, to, reward, done),) = env.P[state][action]
        seen.followed[2 * state + action, 25 if done else to] += 1
        seen.counts[state, action], seen.rewards[state, action] = 1, reward
    assert deep_sea.is_known(seen, env, args)
    seen.rewards[24] = 0.0
    assert not deep_sea.is_known(seen, env, args)


def test_the_error_of_values_on_the_random_walk(tmp_path, monkeypatch):
    """A step size of almost 0 leaves V at 0, whose error is that of −0.9, …, 0.9; a small one lowers it."""
    monkeypatch.setattr(random_walk, "REPETITIONS", 3)
    at_zero = np.sqrt(np.mean(np.square(np.arange(-9, 10) / 10)))
    rows = [random_walk.error(0.8, rate) for rate in (1e-9, 0.05)]
    assert rows[0]["error"] == pytest.approx(at_zero, rel=1e-5) and rows[1]["error"] < 0.95 * at_zero
    index = pd.MultiIndex.from_tuples([(0.8, 1e-9), (0.8, 0.05)], names=random_walk.KEY)
    pd.DataFrame(rows, index=index).to_csv(tmp_path / "random_walk.csv")
    assert f"| 0.8 | 0.05 | {rows[1]['error']:.3f} |" in random_walk.section(tmp_path)
    assert (tmp_path.parent / "plots" / "random_walk.png").exists()


def test_the_errors_of_plans(tmp_path, monkeypatch):
    """More candidates, or simulations, err less; measured, drawn, and marked where the script has changed since."""
    for name, value in dict(SEEDS=4, PROCESSES=2, ITERATIONS=3).items():
        monkeypatch.setattr(planning_errors, name, value)
    keys = [(name, n) for name in (*planning_errors.SAMPLING, *planning_errors.SEARCH) for n in (10, 200)]
    rows = pd.DataFrame([planning_errors.measure(*key) for key in keys])
    assert (rows["error"][1::2].to_numpy() < rows["error"][::2].to_numpy()).all()
    table = rows.set_index(pd.MultiIndex.from_tuples(keys, names=planning_errors.KEY))
    table.to_csv(tmp_path / "planning_errors.csv")
    text, slope = planning_errors.section(tmp_path), np.log(rows["error"][5] / rows["error"][4]) / np.log(20)
    assert f"| CEM | {rows['error'][4]:.2g} | {rows['error'][5]:.2g} | −{-slope:.2f} |" in text and "†" not in text
    assert (tmp_path.parent / "plots" / "planning_errors.png").exists()
    table.assign(code_sha256="older").to_csv(tmp_path / "planning_errors.csv")
    assert "| CEM † |" in planning_errors.section(tmp_path)


def test_planning_through_mujoco_beside_what_was_learned(tmp_path, monkeypatch):
    """One episode of either, SAC's policy being trained once; then the speeds."""
    small = dict(horizon=5, population=10, elites=3, kept=1, iterations=1, first_iterations=1, eval_episodes=1)
    monkeypatch.setitem(planning_mujoco.mpc.RECOMMENDED, "Hopper-v5", small | dict(max_episode_steps=200))
    for name, value in dict(SAC_STEPS=150, SECONDS=0.01).items():
        monkeypatch.setattr(planning_mujoco, name, value)
    run, runs = planning_mujoco.subprocess.run, []
    train = lambda line, **kwargs: runs.append(run([*line, "--learning-starts", "100"], **kwargs))  # noqa: E731
    monkeypatch.setattr(planning_mujoco.subprocess, "run", train)
    keys = [("Hopper-v5", planner, 1) for planner in ("mpc", "sac", "sac")]
    rows = [planning_mujoco.measure(*key, runs=tmp_path / "runs") for key in keys]
    assert len(runs) == 1 and rows[1]["return"] == rows[2]["return"]
    assert all(0 < row["length"] <= 200 and row["return"] > 0 for row in rows)
    index = pd.MultiIndex.from_tuples(keys[:2], names=planning_mujoco.KEY)
    pd.DataFrame(rows[:2], index=index).to_csv(tmp_path / "planning_mujoco.csv")
    assert planning_mujoco.section(tmp_path) == "", "without speeds"
    speeds = planning_mujoco.speeds("Hopper-v5", 0)
    index = pd.MultiIndex.from_tuples([("Hopper-v5", 0)], names=planning_mujoco.SPEED_KEY)
    pd.DataFrame([speeds], index=index).to_csv(tmp_path / "planning_speed.csv")
    text = planning_mujoco.section(tmp_path)
    assert f"| Hopper-v5 | {rows[0]['return']:.1f} | " in text and f"| {speeds['mpc'] / speeds['python']:.2f} |" in text


def test_the_costs_of_five_methods_over_iterations(tmp_path, monkeypatch):
    """On a few steps: measured once, drawn, and marked where ilqr.py has changed since."""
    for name, value in dict(STEPS=4, ITERATIONS=6).items():
        monkeypatch.setattr(trajectories, name, value)
    rows = [trajectories.descent("InvertedPendulum-v5", name) for name in trajectories.METHODS]
    costs = [[float(x) for x in row["costs"].split()] for row in rows]
    assert [len(x) for x in costs][:2] == [2, len(costs[1])] and all(b <= a for a, b in itertools.pairwise(costs[1]))
    keys = [("InvertedPendulum-v5", name) for name in trajectories.METHODS]
    table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(keys, names=trajectories.KEY))
    table.to_csv(tmp_path / "trajectories.csv")
    text = trajectories.section(tmp_path)
    assert f"| iLQR | {costs[1][-1]:.4f} | " in text and "†" not in text
    assert (tmp_path.parent / "plots" / "trajectories.png").exists()
    table.assign(code_sha256="older").to_csv(tmp_path / "trajectories.csv")
    assert "| method † |" in trajectories.section(tmp_path)
    assert trajectories.within([5.0, 1.02, 1.005, 1.0], 1.0) == "2" and trajectories.within([5.0], 1.0) == "–"


def test_labels_are_compared_where_every_seed_is_measured(measured, monkeypatch):
    runs, results = measured[0].assign(command="", date="", script_sha256=""), measured[1]
    cells = run.cells_of("imitation")
    returns = {cell: cell.total_timesteps * (2 if cell.algo == "dagger" else 1) for cell in cells}
    returns |= {run.Cell(*expert): 5000 for expert in suites.EXPERTS.values()}
    assert cells[-1].env_id == "Hopper-v5" and returns.pop(cells[-1]) == 2000
    index = pd.MultiIndex.from_tuples([astuple(cell) for cell in returns], names=run.KEY)
    rows = pd.DataFrame([runs.iloc[0].to_dict() | {"eval_mean": x} for x in returns.values()], index=index).sort_index()
    (results / "experts").mkdir()
    experts = pd.DataFrame({"env_id": suites.EXPERTS.keys(), "eval_mean": 5000.0, "eval_episodes": 9})
    experts.to_csv(results / "experts" / "experts.csv", index=False)
    monkeypatch.setattr(report, "RESULTS", results)
    today = [cell for cell in returns if cell.algo == "bc" and cell.env_id == "Hopper-v5"]
    rows.loc[list(map(astuple, today)), "code_sha256"] = [run.present_code(cell) for cell in today]
    section = report.imitation(cells, rows, results / "of another machine")
    assert "| HalfCheetah-v5 | 1000 | 1000 [1000, 1000] † | 2000 [2000, 2000] † |" in section
    assert "| Hopper-v5 | 500 | 500.0 [500.0, 500.0] | 1000 [1000, 1000] † |" in section
    assert "| Hopper-v5 | 1000 |" not in section and section.count("| 5000 |") == 7
    assert "| expert (9 episodes) |" in section
    assert report.imitation(cells, rows.loc[list(suites.EXPERTS.values())], results) == ""


# Steps to solve ---------------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path, monkeypatch):
    """SAC for 201 steps with evaluations after 50, 100, 150 and 200."""
    monkeypatch.setattr(steps_to_solve, "EVERY", 50)
    monkeypatch.setattr(steps_to_solve, "EPISODES", 3)
    flags = f"--total-timesteps 201 --eval-episodes 3 --learning-starts 60 --hidden-sizes 8 --output-dir {tmp_path}"
    return sb3.parse_args("sac", flags.split())


def test_evaluations_see_the_policy_and_leave_training_as_it_is(short):
    sac = importlib.import_module("sac")
    evaluated = steps_to_solve.returns_ours("sac", short)
    states = [sac.train(replace(short, total_timesteps=steps)) for steps in (200, 201)]
    assert len(evaluated) == 4 and evaluated[0] != evaluated[1] != evaluated[2]
    assert evaluated[-1] == states[0]["returns"].mean()
    one, other = (
        torch.load(path, weights_only=True)["agent"]
        for path in sorted(Path(short.output_dir).glob("*/checkpoint.pt"), key=os.path.getmtime)[::2]
    )
    for x, y in zip(one.values(), other.values(), strict=True):
        assert torch.equal(x, y)


def test_evaluations_of_sb3_see_its_policy(short):
    evaluated = steps_to_solve.returns_sb3("sac", short)
    env = sb3.make_env(short, 3)
    model = sb3.sac_model(short, sb3.make_env(short, 1)).learn(200)
    env.seed(short.seed + 1_000_000)
    assert len(evaluated) == 4 and evaluated[-1] == evaluate_policy(model, env, 3)[0]


def test_steps_to_solve_measures_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def measure(impl, algo, seed):
        asked.append((impl, algo, seed))
        solved = {("ours", "mbpo"): 8 + seed, ("ours", "sac"): 30, ("sb3", "sac"): 40 if seed == 1 else 99}[impl, algo]
        return list(np.where(np.arange(steps_to_solve.SIDES[impl, algo] // 100) + 1 >= solved, -150.0, -1200.0))

    monkeypatch.setattr(steps_to_solve, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(steps_to_solve, "measure", measure)
    for seeds in (1, 1, 2):
        monkeypatch.setattr("sys.argv", ["", "--seeds", str(seeds), "--results", str(tmp_path)])
        steps_to_solve.main()
    assert sorted(asked) == sorted((*side, seed) for side in steps_to_solve.SIDES for seed in (1, 2))
    section = report.solving(tmp_path)
    assert "| MBPO | 950.0 | 900, 1000 | 1 | −150.0 (step 3000) |" in section
    assert "| SAC | 3000 | 3000, 3000 | 3.16 | " in section
    assert "| SB3's SAC | 4500 | 4000, > 5000 | 4.74 | " in section and "†" not in section
    assert "it takes 20 gradient steps, and SAC 1." in section
    assert (tmp_path.parent / "plots" / "steps_to_solve.png").exists()
    path = tmp_path / "steps_to_solve.csv"
    rows = pd.read_csv(path, index_col=steps_to_solve.KEY)
    never = rows.copy()
    never.loc[("ours", "mbpo", 2), "eval_mean"] = -1200.0
    never.to_csv(path)
    assert "| MBPO | 2950 | 900, > 3000 |" in report.solving(tmp_path)
    rows.drop(index=[("ours", "mbpo", 1)]).assign(code_sha256="older").to_csv(path)
    assert "| MBPO † | 1000 | 1000 | 1 |" in report.solving(tmp_path)
