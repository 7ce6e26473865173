"""benchmarks/run.py: nothing measured twice and nothing lost, on this machine and on a Ray cluster."""

import glob
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import launchers
import pandas as pd
import pytest
import run
import suites

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Three runs of a few seconds; its arguments for run.run."""
    entry = suites.Entry(["a2c"], ["CartPole-v1"], range(1, 4), 3000, implementations=("ours",))
    monkeypatch.setitem(run.SUITES, "tiny", [entry])
    return run.Args("tiny", work=tmp_path / "work", results=tmp_path / "results", workers=2)


def test_a_cell_that_another_run_py_is_at_is_left_alone(tiny, capsys):
    cells = run.cells_of("tiny")
    with run.lock_of(cells[0], tiny.work):
        assert run.run(cells[:1], tiny) == 1
        assert "another run.py is at it" in capsys.readouterr().err
        run.print_plan(cells[:2], tiny)
    assert not (tiny.work / cells[0].name).exists()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["in", "run"]


def test_a_run_that_fails_is_counted_and_its_last_line_shown(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run.Cell, "flags", property(lambda cell: "--num-envs 0"))
    assert run.run(run.cells_of("tiny")[:1], tiny) == 1
    assert "--num-envs 0 must be at least 1" in capsys.readouterr().err and run.read_runs(tiny.results).empty


def test_processes_that_record_at_once_lose_no_row(tiny):
    """Twelve runs that have finished, by six threads."""
    cells = [run.Cell("ours", "a2c", "CartPole-v1", seed, 3000) for seed in range(12)]
    for cell in cells:
        folder = tiny.work / cell.name
        (folder / "run").mkdir(parents=True)
        (folder / "stdout.txt").write_text(
            f"evaluation: {cell.seed}.00 ± 1.00 over 10 episodes\nrun directory: x/run\n"
        )
        (folder / "run" / "monitor.csv").write_text("#{}\nr,l,t\n10.0,10,0.5\n")
        (folder / "run" / "args.json").write_text('{"args": {}, "versions": {"torch": "2"}}')
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda cell: run.record(cell, tiny.work / cell.name, tiny.results), cells))
    assert run.read_runs(tiny.results)["eval_mean"].tolist() == list(range(12))


def test_the_plan_says_how_long_it_takes(tiny, capsys):
    """As recorded for the same number of steps, or else in proportion to them."""
    tiny.results.mkdir()
    rows = [("ours", "a2c", "CartPole-v1", 1, 3000, 120.0), ("ours", "a2c", "CartPole-v1", 9, 6000, 9000.0)]
    rows = pd.DataFrame(rows, columns=[*run.KEY, "seconds"]).assign(code_sha256="older")
    rows.to_csv(tiny.results / "runs.csv", index=False)
    run.print_plan(run.cells_of("tiny"), tiny)
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["skip", "†", "python"],
        *[["run", "2", "min"]] * 2,
    ]
    assert "2 runs; 0.1 hours in all, as those recorded\n" in err
    run.print_plan(run.cells_of("smoke"), replace(tiny, results=tiny.results / "new"))  # the committed runs' times
    assert capsys.readouterr().out.count(" min ") == 4
    other = run.Cell("ours", "a2c", "CartPole-v1", 1, 2000)
    assert run.expected_seconds(other, run.read_runs(tiny.results)) == pytest.approx(2000 * (120 / 3000 + 1.5) / 2)


@pytest.mark.parametrize(
    "flags, work",
    [
        ([], run.ROOT / "runs" / "benchmarks"),
        (["--results", "mine/results"], "mine/work"),
        (["--results", "mine/results", "--work", "other"], "other"),
    ],
)
def test_other_results_have_a_work_folder_of_their_own(monkeypatch, flags, work):
    seen = []
    monkeypatch.setattr(run, "print_plan", lambda todo, args: seen.append(args.work))
    monkeypatch.setattr("sys.argv", ["", "smoke", "--dry-run", *flags])
    run.main()
    assert seen == [Path.cwd() / work]


def test_what_other_code_has_measured_is_told(tiny, capsys, monkeypatch):
    """At the end of a run, for the recorded; in a plan, also for what has finished and waits to be recorded."""
    tiny.results.mkdir()
    first, second, _ = run.cells_of("tiny")
    rows = pd.DataFrame([(*astuple(first), 1.0, "older")], columns=[*run.KEY, "seconds", "code_sha256"])
    rows.to_csv(tiny.results / "runs.csv", index=False)
    folder = tiny.work / second.name
    (folder / "run").mkdir(parents=True)
    (folder / "stdout.txt").write_text("evaluation: 1.00 ± 1.00 over 10 episodes\nrun directory: x/run\n")
    (folder / "run" / "args.json").write_text('{"args": {}, "versions": {}}')
    for source, mark in (({}, []), ({"source_sha256": "older"}, ["†"])):
        (folder / "meta.json").write_text(json.dumps(run.about_now(second) | source))
        run.print_plan([first, second], tiny)
        assert [x.split("python")[0].split() for x in capsys.readouterr().out.splitlines()] == [
            ["skip", "†"],
            ["record", *mark],
        ]
    monkeypatch.setattr(run, "run", lambda todo, args: 0)
    monkeypatch.setattr("sys.argv", ["", "tiny", "--only", first.name, "--results", str(tiny.results)])
    run.main()
    assert "1 of 1 are of other code or flags (†): --rerun-changed" in capsys.readouterr().err
    rows.assign(code_sha256=run.present_code(first)).to_csv(tiny.results / "runs.csv", index=False)
    run.main()
    assert capsys.readouterr().err == ""
    run.print_plan([first], tiny)
    assert capsys.readouterr().out.split()[:2] == ["skip", "python"]


def test_what_says_that_a_run_has_finished_arrives_last(tmp_path, monkeypatch):
    files = {"stdout.txt": b"evaluation", "x/monitor.csv": b"r", "meta": b"m"}
    fake = SimpleNamespace(wait=lambda *_, **__: ([1], []), get=lambda _: (3, files))
    monkeypatch.setitem(sys.modules, "ray", fake)
    arrived, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: arrived.append(b.name) or rename(a, b))
    job = launchers.RayJob(None, tmp_path)
    assert job.poll() == job.poll() == 3 and arrived == ["monitor.csv", "meta", "stdout.txt"]
    assert (tmp_path / "x" / "monitor.csv").read_bytes() == b"r"


def measured(results: Path) -> tuple[dict, dict]:
    """Evaluations and episodes of every cell recorded in `results`."""
    runs = run.read_runs(results)
    assert runs.index.is_unique
    paths = (results / "episodes").iterdir()
    return runs["eval_mean"].to_dict(), {path.name: pd.read_csv(path)[["r", "l"]].values.tolist() for path in paths}


def processes(*words: str) -> list[int]:
    """Process ids of those whose command line has all these words in it."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            if all(word in Path(path).read_text() for word in words):
                found.append(int(path.split("/")[2]))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_twice_measures_nothing_twice_and_loses_nothing(tmp_path):
    def start(folder: str) -> subprocess.Popen:
        paths = ["--work", tmp_path / folder / "work", "--results", tmp_path / folder / "results"]
        return subprocess.Popen([sys.executable, ROOT / "benchmarks" / "run.py", "smoke", *paths])

    results, work = tmp_path / "killed" / "results", tmp_path / "killed" / "work"
    recorded = {}
    for kills in (1, 2):
        process = start("killed")
        while len(run.read_runs(results)) < kills or not processes(str(work) + "/"):
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.05)
        time.sleep(2)
        process.kill()
        process.wait()
        while processes(str(work) + "/"):  # the kernel kills them with it
            time.sleep(0.05)
        rows = (results / "runs.csv").read_text().splitlines()[1:]
        assert kills <= len(rows) < 4 and recorded.items() <= dict.fromkeys(rows).items()
        recorded = dict.fromkeys(rows)
    assert start("killed").wait() == 0 and start("whole").wait() == 0
    assert recorded.items() <= dict.fromkeys((results / "runs.csv").read_text().splitlines()).items()
    assert len(run.read_runs(results)) == 4 and measured(results) == measured(tmp_path / "whole" / "results")
    assert all(len(list(folder.glob("*/args.json"))) == 1 for folder in work.glob("*__*")), "resumed where it was"


def test_where_no_cluster_is_one_line_says_so(monkeypatch):
    with pytest.raises(SystemExit, match="--address 127.0.0.1:9: no Ray cluster there"):
        launchers.refuse_unreachable("127.0.0.1:9")
    with pytest.raises(SystemExit, match="--address ray://127.0.0.1:9: no Ray cluster there"):
        launchers.refuse_unreachable("ray://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install ray"):
        launchers.Ray(ROOT, None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_ray_cluster_that_loses_a_node_measures_what_this_machine_does(tiny):
    ray = pytest.importorskip("ray", reason="Ray is optional: pip install ray==2.60.0")
    utilities = pytest.importorskip("ray.cluster_utils")
    cluster = utilities.Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    killed = []

    def kill_a_node_in_mid_run():
        while len(processes("algos/a2c.py", "3000")) < 2:
            time.sleep(0.05)
        killed.extend(processes("algos/a2c.py", "3000"))
        cluster.remove_node(node, allow_graceful=False)

    try:
        node = cluster.add_node(num_cpus=1)
        killer = threading.Thread(target=kill_a_node_in_mid_run, daemon=True)
        killer.start()
        on_ray = replace(tiny, launcher="ray", address=cluster.address)
        assert run.run(run.cells_of("tiny"), on_ray) == 0
        killer.join()
        assert len(killed) == 2
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        cluster.shutdown()
    folder = tiny.work / "ours__a2c__CartPole-v1__1__3000"
    assert (folder / "meta.json").exists() and list(folder.glob("*/policy.pt2")) and not list(folder.glob("*/*.pt"))
    here = replace(tiny, work=tiny.work / "here", results=tiny.results / "here")
    assert run.run(run.cells_of("tiny"), here) == 0
    assert measured(tiny.results) == measured(here.results)
