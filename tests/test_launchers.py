"""benchmarks/run.py: nothing measured twice and nothing lost, on this machine and on a Ray cluster."""

import glob
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

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
    def start(folder: str, *flags: str) -> subprocess.Popen:
        paths = ["--work", tmp_path / folder / "work", "--results", tmp_path / folder / "results"]
        return subprocess.Popen([sys.executable, ROOT / "benchmarks" / "run.py", "smoke", *paths, *flags])

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
    assert all(len(list(folder.glob("*/args.json"))) == 1 for folder in work.iterdir()), "resumed where it was"


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
