"""benchmarks/throughput.py: the ratios, and the floor that they are compared with."""

import importlib
import sys
import time
from types import SimpleNamespace

import pandas as pd
import peers
import pytest
import report
import sb3
import throughput
import torch


def measured(work, speeds):
    """Rows of throughput.csv, of one round with older code."""
    rows = pd.DataFrame(speeds.items(), columns=["setting", "steps_per_second"])
    return rows.assign(work=work, round=1, code_sha256="", flags="", machine="one, 2 cores")


def test_ratios_are_taken_within_a_round():
    """SB3 slows down by half from one round to the next, ours by a third; one work has no floor."""
    speeds = {"eager": (30, 20), "sb3": (20, 10), "environment": (120, 100), "products": (120, 100)}
    rows = [("a", setting, i, x) for setting, pair in speeds.items() for i, x in enumerate(pair)]
    rows += [("b", "eager", 0, 9), ("b", "sb3", 0, 3)]
    table = throughput.summary(pd.DataFrame(rows, columns=["work", "setting", "round", "steps_per_second"]))
    eager = table.loc[("a", "eager")].drop(["over peer", "over medium"])
    assert list(eager) == pytest.approx([2, 25, 1.5, 1.75, 2, (0.5 + 0.4) / 2, (0.25 + 0.2) / 2, (0.25 + 0.2) / 2])
    assert table[["over peer", "over medium"]].isna().all(axis=None)  # nothing of theirs was measured
    assert table.loc[("b", "eager"), "median"] == 3 and pd.isna(table.loc[("b", "eager"), "of floor"])
    assert ("a", "compile") not in table.index and ("b", "products") not in table.index


def test_the_page_says_what_bounds_the_faster_setting():
    """3 times SB3 compiled, 2 eager; of 1/30 s a fifth is environment, a tenth products."""
    work = "dqn CartPole"
    rows = measured(work, {"eager": 20.0, "compile": 30.0, "sb3": 10.0, "environment": 150.0, "products": 300.0})
    table = report.throughput_table(rows)
    both = "2.00 [2.00, 2.00] † | 3.00 [3.00, 3.00] †"
    assert f"| {work} | 1 | 10 | — | — | {both} | — | — | 30% | 20% | 10% | 70% |" in table
    now = {x: report.source_sha256(*throughput.code_of(throughput.WORKS[work], x)) for x in rows["setting"]}
    fresh = rows.assign(code_sha256=rows["setting"].map(now), flags=throughput.WORKS[work].flags)
    assert "†" not in report.throughput_table(fresh)
    fresh.loc[fresh["setting"] == "sb3", "code_sha256"] = "older"
    assert both in report.throughput_table(fresh)
    bare = report.throughput_table(rows[rows["setting"].isin(["eager", "sb3"])].assign(work="other"))
    assert "| other | 1 | 10 | — | — | 2.00 [2.00, 2.00] † | — | — | — | — | — | — |" in bare


def test_the_best_peer_is_that_of_the_round():
    """Ours does 30 and 24 a second; SBX is the fastest in the first round, CleanRL in the second, SB3 in none."""
    speeds = {"eager": (30, 24), "sb3": (10, 10), "sbx": (40, 20), "cleanrl": (20, 24), "cleanrl half": (60, 60)}
    speeds["sb3 medium"] = (15, 16)
    rows = [measured("ddpg HalfCheetah", {x: v[i] for x, v in speeds.items()}).assign(round=i) for i in range(2)]
    table = throughput.summary(pd.concat(rows))
    eager = table.loc[("ddpg HalfCheetah", "eager")]
    assert eager["over peer"] == pytest.approx((30 / 40 + 24 / 24) / 2)  # "half" does less work
    assert eager["over medium"] == pytest.approx((30 / 15 + 24 / 16) / 2)
    page = report.throughput_table(pd.concat(rows))
    cells = "10 | 22; half 60 | 30 | 2.70 [2.40, 3.00] † | 0.88 (SBX) | 1.75"
    assert f"| ddpg HalfCheetah | 2 | {cells} |" in page
    ahead = "A peer is ahead, in the same rounds: SBX on ddpg HalfCheetah (ours 0.88 of it)."
    assert report.peers_ahead(pd.concat(rows)) == ahead
    assert report.tables_by_machine(pd.concat(rows), report.throughput_table).endswith(f"|\n\n{ahead}")
    ours = [x.assign(steps_per_second=x["steps_per_second"] * (1 + x["setting"].eq("eager"))) for x in rows]
    assert report.peers_ahead(pd.concat(ours)) == "" == report.peers_ahead(measured("a2c CartPole", {"eager": 1.0}))


@pytest.mark.usefixtures("highest_precision_afterwards")
def test_each_setting_is_measured_at_its_precision(monkeypatch):
    seen, set_precision = [], torch.set_float32_matmul_precision
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda x: seen.append(x) or set_precision(x))
    for name in ("per_second", "matrix_flops_per_second", "flops_per_step"):
        monkeypatch.setattr(throughput, name, lambda *_: 1.0)
    flags = "--env-id Pendulum-v1 --learning-starts 50 --hidden-sizes 8"
    settings = throughput.WORKS["td3 HalfCheetah"].settings
    assert settings == (*throughput.SETTINGS, throughput.MEDIUM)
    work = throughput.Work("td3", flags, warmup_steps=60, steps=40, settings=settings)
    for setting in ("sb3", "sb3 medium"):
        throughput.measure(work, setting)
    assert seen == ["highest", "medium"]  # whatever the script chooses for itself
    for precision in ("high", "highest"):
        seen.clear()
        asked = work._replace(flags=f"{flags} --matmul-precision {precision}")
        for setting in ("eager", "sb3", "products"):
            throughput.measure(asked, setting)
        assert [x for x in seen if x == precision][:3] == [precision] * 3
    for setting in ("eager", "compile", throughput.MEDIUM):
        assert throughput.arguments(work, setting, "").compile == setting.startswith("compile")


CLEANRL = """
import argparse, time
import gymnasium as gym
from torch.utils.tensorboard import SummaryWriter
from cleanrl_utils import SPEED

parser = argparse.ArgumentParser()
for flag in ("--env-id", "--num-envs", "--num-steps", "--total-timesteps"):
    parser.add_argument(flag)
parser.add_argument("--no-cuda", action="store_true")
args, writer = parser.parse_args(), SummaryWriter("runs")
env = gym.wrappers.TransformObservation(gym.make(args.env_id, max_episode_steps=3), lambda obs: 2 * obs)
envs = gym.vector.SyncVectorEnv([lambda: env])
envs.reset(seed=1)
for step in range(1, 1 + int(args.total_timesteps)):
    observations, _, _, truncated, infos = envs.step(envs.action_space.sample())
    if truncated.any():
        assert (infos["final_observation"][0] != observations[0]).any() and "final_info" not in infos
    writer.add_scalar("losses/other", 1.0, step)
    writer.add_scalar("charts/SPS", SPEED, step)
"""


def test_cleanrls_script_is_run_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "cleanrl").mkdir()
    (tmp_path / "cleanrl" / "ppo.py").write_text(CLEANRL)
    (tmp_path / "cleanrl_utils.py").write_text("SPEED = 7")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(total_timesteps=12, torch_threads=1, output_dir=str(tmp_path / "out"))
    flags = peers.CLEANRL["ppo", "CartPole-v1", "cleanrl"]
    boundaries = peers.boundaries_cleanrl(flags, args, tmp_path)
    assert [step for step, _ in boundaries] == [*range(1, 13)] and boundaries[0][1] < boundaries[-1][1]
    assert (tmp_path / "out" / "runs").is_dir()
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "1.0")
    now = peers.settings_of("ppo", "--env-id CartPole-v1", tmp_path)
    (tmp_path / "cleanrl" / "ppo.py").write_text(CLEANRL + "# changed")
    changed = peers.settings_of("ppo", "--env-id CartPole-v1", tmp_path)
    assert [*now] == ["sbx", "cleanrl"] and now["sbx"] == changed["sbx"] and now["cleanrl"] != changed["cleanrl"]


def test_a_peer_that_is_not_there_is_refused(monkeypatch, tmp_path):
    def version(name):
        raise peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib.metadata, "version", version)
    for flags, words in ((["--peers"], "pip install sbx-rl"), (["--cleanrl", str(tmp_path)], "no checkout of")):
        monkeypatch.setattr("sys.argv", ["", "--only", "td3", *flags])
        with pytest.raises(SystemExit, match=words):
            throughput.main()


@pytest.mark.parametrize("algo", peers.SBX)
def test_sbx_is_made_with_sb3s_arguments(algo, monkeypatch):
    """Every one that SB3's has, but for what SBX's signature, faked here, lacks."""
    seen = {}

    def fake(policy, env, **kwargs):
        seen.update(kwargs)

    monkeypatch.setitem(sys.modules, "sbx", SimpleNamespace(**{name: fake for name in peers.SBX.values()}))
    work = next(work for work in throughput.WORKS.values() if work.algo == algo)
    args = throughput.arguments(work, "sbx", "")
    monkeypatch.setattr(sb3, peers.SBX[algo], peers.sbx_class(peers.SBX[algo]))
    sb3.MODELS[algo](args, throughput.maker_of(algo)(args, 1))
    assert seen["policy_kwargs"].keys() <= {"net_arch", "n_critics"} and "max_grad_norm" not in seen or algo == "ppo"
    assert seen["policy_kwargs"]["net_arch"] == list(args.hidden_sizes) and seen["gamma"] == args.gamma


def test_speed_is_measured_after_the_warm_up():
    assert throughput.per_second([(10, 0.0), (20, 5.0), (30, 6.0), (50, 8.0)], start=15) == pytest.approx(30 / 3)


def test_floating_point_operations_of_a_ddpg_update():
    """Products of inputs × outputs of every layer, forward, for its weights and for its inputs, where they count."""
    flags = "--env-id Pendulum-v1 --hidden-sizes 16 8 --batch-size 32 --learning-starts 40 --eval-episodes 1"
    args = importlib.import_module("ddpg").parse_args(flags.split())
    actor, critic = 3 * 16 + 16 * 8 + 8 * 1, 4 * 16 + 16 * 8 + 8 * 1
    target = actor + critic
    critic_step = 3 * critic - 4 * 16  # nobody asks for the gradient of its inputs
    actor_step = 3 * actor - 3 * 16 + 2 * critic  # nor for that of the critic's weights
    expected = 2 * (32 * (target + critic_step + actor_step) + actor)
    assert throughput.flops_per_step("ddpg", args) == pytest.approx(expected)


@pytest.mark.parametrize("algo, env_id", [("ppo", "CartPole-v1"), ("trpo", "Pendulum-v1"), ("sac", "Pendulum-v1")])
def test_the_floor_is_below_no_measurement(algo, env_id):
    flags = "--num-steps 64" if algo != "sac" else "--learning-starts 300 --batch-size 32 --hidden-sizes 32 32"
    work = throughput.Work(algo, f"--env-id {env_id} --num-envs 1 {flags}", warmup_steps=320, steps=1024)
    speed, *parts = (throughput.measure(work, setting) for setting in ("eager", "environment", "products"))
    assert 0 < speed < 1 / sum(1 / x for x in parts)


def test_what_was_measured_is_the_training(monkeypatch):
    """Evaluation and export are not part of it, and Run is as it was afterwards."""
    module = importlib.import_module("a2c")
    log = module.Run.log
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    args = module.parse_args("--total-timesteps 2000 --num-envs 2".split())
    boundaries = throughput.boundaries_ours("a2c", args)
    assert [step for step, _ in boundaries] == [1000, 2000]
    assert module.Run.log is log


def test_the_models_time_is_left_out():
    """Also that of a generator, which works when it is asked for its items."""

    def rollouts(count):
        for i in range(count):
            time.sleep(0.1)
            yield i

    module = SimpleNamespace(
        learn_model=lambda: time.sleep(0.1) or {"a": 1}, branched_rollouts=rollouts, model_diagnostics=lambda: {}
    )
    began = time.perf_counter()
    with throughput.clock_without_model(module) as clock:
        assert module.learn_model() == {"a": 1} and module.model_diagnostics() == {}
        assert [x for x in module.branched_rollouts(2) if time.sleep(0.1) is None] == [0, 1]
        seconds = clock() - began
    assert 0.2 < seconds < 0.3
    assert module.branched_rollouts is rollouts


def test_mbpo_is_held_against_sac():
    rows = [(x, i, y / (i + 1)) for x, y in (("eager", 40.0), ("updates", 76.0), ("sac", 80.0)) for i in range(3)]
    rows = pd.DataFrame(rows, columns=["setting", "round", "steps_per_second"])
    rows = rows.assign(work="mbpo HalfCheetah", code_sha256="older", machine="one")
    rows["flags"] = throughput.WORKS["mbpo HalfCheetah"].flags
    section = report.throughput_section(pd.concat([rows, rows.assign(work="ppo CartPole")]))
    assert "(47% of the whole here" in section and "| ours, updates † | 3 | 38 | 0.95 | 0.95 | 0.95 |" in section
    assert section.index("ppo CartPole") < section.index("MBPO against")
    assert "SB3 ran there" not in section
    both = pd.concat([rows.assign(machine="an older one", steps_per_second=1.0), rows])
    assert report.throughput_section(both).split("MBPO")[1] == section.split("MBPO")[1]
    work = throughput.WORKS["mbpo HalfCheetah"]
    assert [throughput.code_of(work, x)[1] for x in work.settings] == ["mbpo", "mbpo", "sac"]


def test_machines_have_tables_of_their_own():
    """The other one is measured later, and of both works the newest rows are those of one machine."""
    rows = [("ppo CartPole", 8540.0, "one"), ("a2c CartPole", 21240.0, "one"), ("a2c CartPole", 7080.0, "other")]
    rows = pd.DataFrame(rows, columns=["work", "steps_per_second", "machine"]).assign(round=1, code_sha256="", flags="")
    ours = rows.assign(setting="eager", steps_per_second=rows["steps_per_second"] * [2, 2, 3])
    measurements = pd.concat([rows.assign(setting="sb3"), ours])
    section = report.throughput_section(measurements)
    one, other = section.split("\nother:\n")
    assert "\none:\n" in one and "| ppo CartPole | 1 | 8540 | — | — | 2.00 [2.00, 2.00] † |" in one
    assert (
        "| a2c CartPole | 1 | 21240 | — | — | 2.00 [" in one and "| a2c CartPole | 1 | 7080 | — | — | 3.00 [" in other
    )
    assert "ppo CartPole" not in other
    newest = report.newest(measurements)
    assert [*zip(newest["work"], newest["machine"])] == [("ppo CartPole", "one"), ("a2c CartPole", "other")] * 2


def test_mbpos_settings_are_measured(monkeypatch):
    """The model, which sleeps here, costs the whole and not the updates."""
    mbpo = importlib.import_module("mbpo")
    small = dict(model_hidden_sizes=(8,), ensemble_size=3, num_elites=2, patience=1, rollouts_per_step=1)
    monkeypatch.setitem(mbpo.RECOMMENDED, "Pendulum-v1", small)
    learn = mbpo.learn_model
    monkeypatch.setattr(mbpo, "learn_model", lambda *args: time.sleep(2) or learn(*args))
    flags = "--env-id Pendulum-v1 --hidden-sizes 8 --batch-size 16 --gradient-steps 1 --learning-starts 100"
    work = throughput.Work("mbpo", flags, warmup_steps=250, steps=250, settings=throughput.MODEL_BASED_SETTINGS)
    speeds = {setting: throughput.measure(work, setting) for setting in work.settings}
    assert speeds["eager"] < 0.8 * speeds["updates"] and min(speeds.values()) > 0


def test_measuring_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """Rounds that are there are not measured again, and neither another work's nor another machine's are touched."""
    calls, limit, flags = [], 7, throughput.WORKS["ppo CartPole"].flags

    def measure(device, name, setting, cleanrl):
        calls.append(setting)
        return 10.0 * len(calls) if len(calls) < limit else sys.exit("ppo CartPole, eager: no more")

    def rounds(count):
        monkeypatch.setattr("sys.argv", ["", "--only", "ppo CartPole", "--rounds", count, "--results", str(tmp_path)])
        throughput.main()
        return pd.read_csv(tmp_path / "throughput.csv", keep_default_na=False)

    monkeypatch.setattr(throughput, "measure_in_process", measure)
    here, settings = throughput.machine(), list(throughput.SETTINGS)
    others = [
        ("a2c CartPole", "eager", 1, 7.0, "", "", "", here),
        ("ppo CartPole", "eager", 1, 8.0, "", "", "", "other"),
    ]
    others = pd.DataFrame(others, columns=throughput.COLUMNS)
    stale = others.assign(work="ppo CartPole", machine=here, round=[1, 2], steps_per_second=9.0)
    pd.concat([others, stale]).to_csv(tmp_path / "throughput.csv", index=False)
    with pytest.raises(SystemExit, match="no more"):
        rounds("2")  # stops in the second round
    limit = 99
    kept = rounds("2")
    assert calls == settings + settings[:2] + settings
    assert kept["steps_per_second"].tolist() == [7, 8, 10, 20, 30, 40, 50, 80, 90, 100, 110, 120]
    assert kept["round"].tolist() == [1, 1] + [1] * 5 + [2] * 5
    assert set(kept["flags"][2:]) == {flags} and kept["machine"].tolist() == [here, "other"] + [here] * 10
    assert len(rounds("3")) == 17 and calls[12:] == settings
    for column, value in (("code_sha256", "older"), ("flags", "others")):
        changed = rounds("3")
        changed.loc[changed["setting"].eq("sb3") & changed["round"].eq(3), column] = value
        changed.to_csv(tmp_path / "throughput.csv", index=False)
        assert len(rounds("1")) == 7  # ratios hold within a code: what older code has measured goes
        rounds("3")
    assert len(calls) == 17 + 2 * 15
    monkeypatch.setitem(throughput.WORKS, "ppo CartPole", throughput.WORKS["ppo CartPole"]._replace(flags=""))
    rounds("1")
    rounds("1")  # no flags are read back as none
    assert len(calls) == 17 + 2 * 15 + 5
    monkeypatch.setattr(peers, "settings_of", lambda *_: {"sbx": "hash"})
    monkeypatch.setattr(
        "sys.argv", ["", "--only", "ppo CartPole", "--rounds", "1", "--results", str(tmp_path), "--peers"]
    )
    throughput.main()
    assert calls[-6:] == [*settings, "sbx"]  # a round is measured as a whole
    assert len(rounds("1")) == 8 and len(calls) == 17 + 2 * 15 + 5 + 6  # and stays, where the peer is not asked for


def test_a_machine_is_named_with_its_generation(monkeypatch):
    about = "vendor_id : AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr(throughput.Path, "read_text", lambda _: about)
    monkeypatch.setattr(throughput.os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert throughput.machine() == "AMD EPYC (family 25, model 17), 3 cores"
    monkeypatch.setattr(throughput.Path, "read_text", lambda _: "model name : Some ARM\n")
    assert throughput.machine() == "Some ARM, 3 cores"


def test_the_gpus_section():
    """12 times SB3 and 1.5 times LeanRL; what is not measured yet is named; older code and other flags are marked."""
    work = "td3 HalfCheetah"
    codes = [report.source_sha256(impl, "td3") for impl in ("ours", "sb3")]
    rows = [(work, "compile", 1, 1404.0, codes[0]), (work, "sb3", 1, 117.0, codes[1])]
    rows = pd.DataFrame(rows, columns=["work", "setting", "round", "steps_per_second", "code_sha256"])
    rows = rows.assign(flags=throughput.CUDA_WORKS[work].flags, machine="a GPU, 16 cores")
    section = report.cuda_section(rows)
    assert f"| {work} | 1 | 117 | 1404 | 12.00 | 936 | 1.50 |" in section
    assert "a GPU, 16 cores" in section and "ppo_atari Pong" in section.split("Not measured yet:")[1]
    cpu = rows.assign(setting=["eager", "environment"], steps_per_second=[1201.0, 9999.0])
    assert f"over SB3 there: {work} 12.0 × (measured once)." in report.cuda_speeds(rows, cpu)
    faster = cpu.assign(setting="compile", steps_per_second=1405.0)
    assert report.cuda_speeds(rows, pd.concat([cpu, faster])) == ""  # our CPU's compiled training is ahead of the GPU's
    for changed in (dict(code_sha256="older"), dict(flags="others")):
        assert f"| {work} † |" in report.cuda_section(rows.assign(**changed))
        assert f"{work} 12.0 † × (" in report.cuda_speeds(rows.assign(**changed), cpu)
    second = rows.assign(round=2, steps_per_second=[1000.0, 100.0])
    assert "| 11.00 [10.00, 12.00] |" in report.cuda_section(pd.concat([rows, second]))
    assert "11.0 × (2 rounds)." in report.cuda_speeds(pd.concat([rows, second]), cpu)
    both = pd.concat([rows.assign(machine="an older GPU", steps_per_second=1.0), rows])
    assert report.cuda_section(both) == section and report.cuda_speeds(both, cpu) == report.cuda_speeds(rows, cpu)


def test_what_was_tried_is_told(tmp_path):
    assert report.tried_section(tmp_path) == ""
    (tmp_path / "tried.csv").write_text('work,tried,of,unit,before,after\na,"one, two",a step,µs,20,19\n')
    section = report.tried_section(tmp_path)
    assert "| a | one, two | a step | µs | 20 | 19 |" in section and section.startswith("\n### Tried, and not kept")


def test_sb3_is_measured_on_the_device_asked_for(monkeypatch, tmp_path):
    """sb3.py's own runs stay on the CPU; where there is no GPU, "meta" is a device that is not the CPU either."""
    flags = "--env-id Pendulum-v1 --hidden-sizes 8"
    args = throughput.arguments(throughput.Work("td3", flags, 0, 100), "sb3", str(tmp_path))
    env = throughput.maker_of("td3")(args, 1)
    with throughput.sb3_models_on("meta"):
        assert throughput.MODELS["td3"](args, env).device.type == "meta"
    assert throughput.MODELS["td3"](args, env).device.type == "cpu"
    seen, models_on = [], throughput.sb3_models_on
    monkeypatch.setattr(throughput, "sb3_models_on", lambda device: seen.append(device) or models_on(device))
    throughput.boundaries_sb3("td3", args)
    work = throughput.works_on("cuda")["td3 HalfCheetah"]
    assert seen == ["cpu"] and throughput.works_on("cpu") is throughput.WORKS
    assert throughput.arguments(work, "compile", str(tmp_path)).device == "cuda"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["", "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: PyTorch .* finds none here"):
        throughput.main()
