"""Runs a suite of benchmarks/suites.py, here and in Stable-Baselines3, and records it in benchmarks/results/.

    python benchmarks/run.py smoke                              # 4 short runs, about a minute
    python benchmarks/run.py classic --workers 2                # again after a kill: goes on where it was
    python benchmarks/run.py mujoco --only Hopper --dry-run     # what it would do
    python benchmarks/run.py classic --rerun-changed            # measures anew what older code has measured
    python benchmarks/run.py classic --confirm-changed          # or one seed of it, to see that nothing else changed
    python benchmarks/run.py atari --launcher ray               # on all nodes of a Ray cluster (RAY_ADDRESS)

Each cell (implementation, algorithm, environment, seed, steps) is one process with the command that a user would
type. Its run directory and output are in a folder of its own in --work; a cell that has finished there is recorded
and not run again. A row of results/runs.csv holds the command, the versions and two hashes: of the script's bytes,
and of its code without comments and docstrings, which says whether the row still describes the code.
"""

import ast
import functools
import glob
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import stable_baselines3
import tyro
from launchers import Local, LocalJob, Ray, RayJob
from sb3 import MODELS, maker_of
from suites import FLAGS, SUITES
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EVALUATION = re.compile(r"^evaluation: (\S+) ± (\S+) over (\d+) episodes\nrun directory: (.+)$", re.MULTILINE)
"""The last two lines of a run that has finished."""
COMPILE_FROM = 1_000_000
"""Environment steps from which our runs are compiled: half a minute of compilation, then about twice the speed."""
NOT_SB3S = ("output_dir", "seed", "compile", "checkpoint_every")
"""Flags that make no difference to which baseline benchmarks/sb3.py runs."""


@dataclass
class Args:
    suite: tyro.conf.Positional[str]
    """suite of benchmarks/suites.py"""
    workers: int = 1
    """runs at a time; each uses one thread"""
    launcher: Literal["local", "ray"] = "local"
    """local: --workers processes here; ray: a task for every cell, on as many CPUs as the Ray cluster has"""
    address: str | None = None
    """of the Ray cluster; None: what RAY_ADDRESS says, or else a Ray on this machine alone"""
    only: str = ""
    """only cells in whose name, IMPL__ALGO__ENV__SEED, this regular expression is found: ppo, sb3__a2c, Hopper.*1$"""
    rerun_changed: bool = False
    """measure anew the recorded cells whose code has changed since"""
    confirm_changed: bool = False
    """of those, measure one seed anew per algorithm and environment: if every episode is as recorded, the rows of the
    other seeds count as measured with today's code, too"""
    dry_run: bool = False
    """list the cells and the time that they take, start nothing"""
    work: Path = ROOT / "runs" / "benchmarks"
    """folder of the cells' run directories and output"""
    results: Path = RESULTS
    """folder of runs.csv and episodes/"""


# Cells ------------------------------------------------------------------------------------------------------


@functools.cache
def script_args(algo: str, env_id: str, flags: str = "") -> dict:
    """The arguments that algos/{algo}.py takes for `env_id` and `flags` alone."""
    return asdict(importlib.import_module(algo).parse_args(["--env-id", env_id, *flags.split()]))


@dataclass(frozen=True)
class Cell:
    """One run. These fields are the key of its row in runs.csv."""

    impl: str
    algo: str
    env_id: str
    seed: int
    total_timesteps: int

    @property
    def steps_if_unusual(self) -> list[str]:
        """[total_timesteps] where it is not what the script takes by itself, else []."""
        default = script_args(self.algo, self.env_id)["total_timesteps"]
        return [] if self.total_timesteps == default else [str(self.total_timesteps)]

    @property
    def name(self) -> str:
        """Name of its folder in --work and of its file in results/episodes/."""
        parts = [self.impl, self.algo, self.env_id.replace("/", "-"), str(self.seed), *self.steps_if_unusual]
        return "__".join(parts)

    @property
    def flags(self) -> str:
        """What it is run with beside environment, seed and steps."""
        return FLAGS.get((self.algo, self.env_id, self.total_timesteps), "")

    @property
    def script(self) -> str:
        """Path of what runs it, from the repository's root."""
        return "benchmarks/sb3.py" if self.impl == "sb3" else f"algos/{self.algo}.py"

    @property
    def command(self) -> list[str]:
        """What a user would type to run it."""
        command = ["python", self.script] + ([self.algo] if self.impl == "sb3" else [])
        command += ["--env-id", self.env_id, "--seed", str(self.seed)]
        command += ["--total-timesteps", *self.steps_if_unusual] if self.steps_if_unusual else []
        command += self.flags.split()
        return command + ["--compile"] if self.impl == "ours" and self.total_timesteps >= COMPILE_FROM else command


KEY = [field.name for field in fields(Cell)]


def cells_of(suite: str) -> list[Cell]:
    """The suite's cells; both implementations of a seed next to each other, so that they share the machine's load."""
    return [
        Cell(impl, algo, env_id, seed, entry.total_timesteps or script_args(algo, env_id)["total_timesteps"])
        for entry in SUITES[suite]
        for algo in entry.algos
        for seed in entry.seeds
        for env_id in entry.env_ids
        for impl in entry.implementations
        if impl == "ours" or algo in MODELS
    ]


# Which code has run -----------------------------------------------------------------------------------------


def script_sha256(cell: Cell) -> str:
    """Of the bytes of the cell's script as it is now."""
    return hashlib.sha256((ROOT / cell.script).read_bytes()).hexdigest()


def source_sha256(impl: str, algo: str) -> str:
    """Of the syntax tree, without docstrings, of algos/{algo}.py or of the functions of sb3.py that run `algo`."""
    if impl == "ours":
        return tree_sha256((ROOT / "algos" / f"{algo}.py").read_text())
    functions = (MODELS[algo].__name__, maker_of(algo).__name__, "train")
    return tree_sha256((ROOT / "benchmarks" / "sb3.py").read_text(), functions)


@functools.cache
def tree_sha256(text: str, functions: tuple[str, ...] | None = None) -> str:
    """Of a script's syntax tree without docstrings, or of these functions' alone."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):  # a bare string is a docstring, also below a field
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    if functions:
        tree.body = [node for node in tree.body if getattr(node, "name", None) in functions]
    # Python 3.13 leaves empty fields out, older versions write them: out with them, for one hash everywhere.
    dump = re.sub(r"(, )?\w+=(\[\]|Load\(\))", "", ast.dump(tree)).replace("(, ", "(")
    return hashlib.sha256(dump.encode()).hexdigest()


def code_sha256(impl: str, source: str, args: dict, sb3_version: str) -> str:
    """`source` of source_sha256 alone, or for SB3 with the run's flags and SB3's version, which make the run too."""
    if impl == "ours":
        return source
    args = {k: v for k, v in args.items() if k not in NOT_SB3S}
    return hashlib.sha256(json.dumps([source, args, sb3_version], sort_keys=True).encode()).hexdigest()


def present_code(cell: Cell, sb3_version: str = stable_baselines3.__version__) -> str:
    """code_sha256 of the cell if it were run now."""
    args = script_args(cell.algo, cell.env_id, cell.flags) | {"total_timesteps": cell.total_timesteps}
    return code_sha256(cell.impl, source_sha256(cell.impl, cell.algo), args, sb3_version)


def code_that_ran(cell: Cell, folder: Path, run_dir: Path) -> dict[str, str]:
    """code_sha256 and script_sha256 of a run that has been started, from meta.json, written at its launch.

    A run started by hand has none: then today's code is taken for it, unless args.json has the hash of another
    script. (sb3.py writes no hash there, so a baseline started by hand counts as one of today's sb3.py.)
    """
    about = json.loads((run_dir / "args.json").read_text())
    now = script_sha256(cell)
    meta = {"source_sha256": source_sha256(cell.impl, cell.algo), "script_sha256": now}
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text())
    elif about.get("script_sha256", now) != now:
        return {"code_sha256": "unknown", "script_sha256": about["script_sha256"]}
    code = code_sha256(cell.impl, meta["source_sha256"], about["args"], about["versions"].get("stable_baselines3", ""))
    return {"code_sha256": code, "script_sha256": about.get("script_sha256", meta["script_sha256"])}


# Results ----------------------------------------------------------------------------------------------------


def read_runs(results: Path) -> pd.DataFrame:
    """runs.csv, indexed by KEY; empty before the first recording."""
    path = results / "runs.csv"
    return (pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)).set_index(KEY).sort_index()


def sb3_version(row: pd.Series) -> str:
    """Stable-Baselines3's version in a row of runs.csv; "" for a run of ours."""
    return dict(x.split("=") for x in row["versions"].split()).get("stable_baselines3", "")


def evaluation(folder: Path) -> re.Match | None:
    """mean, deviation, episodes and run directory that a finished run printed; None while it has not."""
    path = folder / "stdout.txt"
    return EVALUATION.search(path.read_text()) if path.exists() else None


def record(cell: Cell, folder: Path, results: Path) -> None:
    """Writes results/episodes/{cell}.csv.gz, then the cell's row of results/runs.csv."""
    mean, std, episodes, run_dir = evaluation(folder).groups()
    run_dir = folder / Path(run_dir).name
    monitor = pd.read_csv(run_dir / "monitor.csv", comment="#")
    versions = json.loads((run_dir / "args.json").read_text())["versions"]
    seconds = monitor["t"].max()  # not a number where no episode has ended, as in an imitator's short run
    row = {
        "eval_mean": float(mean),
        "eval_std": float(std),
        "eval_episodes": int(episodes),
        "steps_per_second": round(monitor["l"].sum() / seconds, 1),
        "seconds": round(seconds, 1),
        **code_that_ran(cell, folder, run_dir),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "date": datetime.fromtimestamp((folder / "stdout.txt").stat().st_mtime, timezone.utc).date().isoformat(),
        "command": " ".join(cell.command),
    }
    (results / "episodes").mkdir(parents=True, exist_ok=True)
    monitor.round({"r": 3, "t": 2}).to_csv(
        results / "episodes" / f"{cell.name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    index = pd.MultiIndex.from_tuples([astuple(cell)], names=KEY)
    runs = read_runs(results).drop(index=[astuple(cell)], errors="ignore")
    row = pd.DataFrame([row], index=index)
    (row if runs.empty else pd.concat([runs, row])).sort_index().to_csv(results / "runs.csv.tmp")
    os.replace(results / "runs.csv.tmp", results / "runs.csv")  # a kill leaves the old file whole


# Running ----------------------------------------------------------------------------------------------------


def in_use(path: Path) -> bool:
    """Whether a living process has this file as its standard output (known on Linux; elsewhere False)."""
    for stdout in glob.glob("/proc/[0-9]*/fd/1"):
        try:
            if os.readlink(stdout) == str(path):
                return True
        except OSError:  # it has just ended, or is another user's
            continue
    return False


def state(cell: Cell, folder: Path) -> tuple[str, Path | None]:
    """("in use" | "finished" | "started" | "new", run directory): how far the cell is in the work folder."""
    if in_use(folder / "stdout.txt"):
        return "in use", None
    if match := evaluation(folder):
        return "finished", folder / Path(match[4]).name
    checkpoints = sorted(folder.glob("*/checkpoint.pt"), key=os.path.getmtime)
    return ("started", checkpoints[-1].parent) if checkpoints and cell.impl == "ours" else ("new", None)


def plan(cell: Cell, folder: Path, runs: pd.DataFrame, rerun_changed: bool) -> tuple[str, Path | None]:
    """("skip" | "in use" | "record" | "resume" | "run", run directory): what there is to do for the cell."""
    now = present_code(cell)
    recorded = astuple(cell) in runs.index
    if recorded and not (rerun_changed and runs.loc[astuple(cell), "code_sha256"] != now):
        return "skip", None
    found, run_dir = state(cell, folder)
    if found in ("in use", "new"):
        return {"in use": "in use", "new": "run"}[found], None
    unchanged = code_that_ran(cell, folder, run_dir)["code_sha256"] == now
    if found == "finished":
        return ("record", run_dir) if unchanged or not rerun_changed else ("run", None)
    return ("resume", run_dir) if unchanged else ("run", None)  # half of a run with one code, half with another: no


def launch(cell: Cell, folder: Path, run_dir: Path | None, launcher: Local | Ray) -> LocalJob | RayJob:
    """Starts the cell's process, afresh or going on in `run_dir`."""
    if run_dir is not None:
        return launcher.start([cell.script, "--resume", str(run_dir)], folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    meta = {"source_sha256": source_sha256(cell.impl, cell.algo), "script_sha256": script_sha256(cell)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return launcher.start(cell.command[1:], folder)


def last_line(text: str) -> str:
    """The last line with words on it, without the frames that tyro draws."""
    lines = [line.strip("│ ") for line in text.splitlines() if any(c.isalnum() for c in line)]
    return lines[-1] if lines else ""


def problem(folder: Path, code: int) -> str:
    """What a failed run said last, and where the rest is."""
    log = folder / "stderr.txt"
    return f"{folder.name}: {last_line(log.read_text()) or f'exit code {code}'} (all of it: {log})"


def run(todo: list[Cell], args: Args) -> int:
    """Runs and records the cells, as many at a time as the launcher takes. Returns how many have failed."""
    failed, running, queue = 0, {}, list(todo)
    launcher = Ray(ROOT, args.address) if args.launcher == "ray" else Local(ROOT, args.workers)
    runs = read_runs(args.results)
    bar = tqdm(total=len(todo), unit="run", smoothing=0, desc=args.suite)

    def done(message: str | None = None) -> None:
        nonlocal failed
        if message:
            failed += 1
            bar.write(message, file=sys.stderr)
        bar.set_postfix(failed=failed, refresh=False)
        bar.update()

    try:
        while queue or running:
            while queue and len(running) < launcher.workers:
                cell = queue.pop(0)
                folder = args.work / cell.name
                what, run_dir = plan(cell, folder, runs, args.rerun_changed)
                if what in ("run", "resume"):
                    running[launch(cell, folder, run_dir if launcher.resumes else None, launcher)] = cell
                elif what == "in use":
                    done(f"{cell.name}: another process is at it, writing {folder}; start again when it has ended")
                else:
                    if what == "record":
                        record(cell, folder, args.results)
                    done()
            for job in [job for job in running if job.poll() is not None]:
                cell = running.pop(job)
                folder = args.work / cell.name
                if evaluation(folder):
                    record(cell, folder, args.results)
                    done()
                else:
                    done(problem(folder, job.poll()))
            time.sleep(0.2)
    finally:
        for job in running:
            job.stop()
        while any(job.poll() is None for job in running):
            time.sleep(0.1)
        launcher.close()
        bar.close()
    return failed


def group(cell: Cell) -> Cell:
    """What the seeds of a measurement have in common."""
    return replace(cell, seed=0)


def changed_cells(todo: list[Cell], runs: pd.DataFrame) -> list[Cell]:
    """Those that other code than today's has measured."""
    return [c for c in todo if astuple(c) in runs.index and runs.code_sha256[astuple(c)] != present_code(c)]


def first_of_each_group(cells: list[Cell]) -> dict[Cell, Cell]:
    """By group, the first of the cells in it."""
    return {group(cell): cell for cell in reversed(cells)}


def confirm(todo: list[Cell], args: Args) -> int:
    """Measures one cell of each group of changed ones in a folder apart. Returns how many failed or differ.

    Same seed, same bits: where its evaluation and every episode are the recorded ones, the change made no difference,
    and the rows of the group that the same code had measured get today's code_sha256.
    """
    runs = read_runs(args.results)
    changed = changed_cells(todo, runs)
    firsts = first_of_each_group(changed)
    apart = args.work / "confirm"
    failed = run(list(firsts.values()), replace(args, work=apart, results=apart / "results", rerun_changed=True))
    again, names = read_runs(apart / "results"), ["eval_mean", "eval_std", "eval_episodes"]
    for key, cell in firsts.items():
        if astuple(cell) not in again.index:
            continue
        one, other = (
            pd.read_csv(results / "episodes" / f"{cell.name}.csv.gz")[["r", "l"]]
            for results in (args.results, apart / "results")
        )
        old = runs.loc[astuple(cell)]
        if not (one.equals(other) and list(old[names]) == list(again.loc[astuple(cell), names])):
            failed += 1
            print(f"{cell.name}: its episodes are others now; --rerun-changed measures them", file=sys.stderr)
            continue
        for same in changed:
            if group(same) == key and runs.code_sha256[astuple(same)] == old["code_sha256"]:
                runs.loc[[astuple(same)], "code_sha256"] = present_code(same)
                print(f"{same.name}: confirmed", file=sys.stderr)
    runs.to_csv(args.results / "runs.csv.tmp")
    os.replace(args.results / "runs.csv.tmp", args.results / "runs.csv")
    return failed


def expected_seconds(cell: Cell, runs: pd.DataFrame) -> float:
    """Of one run: the median of the recorded ones, if need be of other lengths; not a number where there is none."""
    runs = runs.reset_index()
    runs = runs[(runs["impl"] == cell.impl) & (runs["algo"] == cell.algo) & (runs["env_id"] == cell.env_id)]
    same = runs[runs["total_timesteps"] == cell.total_timesteps]
    runs = runs if same["seconds"].isna().all() else same
    return (runs["seconds"] / runs["total_timesteps"]).median() * cell.total_timesteps


def print_plan(todo: list[Cell], args: Args) -> None:
    """What a run of run.py would do with each cell, and how long that takes."""
    runs = read_runs(args.results)
    again = args.rerun_changed or args.confirm_changed
    if args.confirm_changed:
        todo = list(first_of_each_group(changed_cells(todo, runs)).values())
    minutes = []
    for cell in todo:
        what, _ = plan(cell, args.work / cell.name, runs, again)
        if what in ("run", "resume"):
            minutes.append(expected_seconds(cell, runs) / 60)
        time_needed = f"{minutes[-1]:4.0f} min" if what in ("run", "resume") and minutes[-1] >= 0 else ""
        print(f"{what:6}  {time_needed:8}  {' '.join(cell.command)}")
    hours = np.nansum(minutes) / 60
    unknown = f"; {np.isnan(minutes).sum()} have no recorded time to go by" if np.isnan(minutes).any() else ""
    print(f"{len(minutes)} runs of {hours:.1f} hours in all, as those recorded{unknown}", file=sys.stderr)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.work, args.results = args.work.resolve(), args.results.resolve()
    if args.suite not in SUITES:
        sys.exit(f"{args.suite}: no such suite; benchmarks/suites.py has {', '.join(SUITES)}")
    if args.workers < 1:
        sys.exit(f"--workers {args.workers}: must be at least 1")
    try:
        todo = [cell for cell in cells_of(args.suite) if re.search(args.only, cell.name)]
    except re.error as error:
        sys.exit(f"--only {args.only}: not a regular expression ({error})")
    if not todo:
        sys.exit(f"--only {args.only}: in no cell's name; one is {cells_of(args.suite)[0].name}")
    if args.dry_run:
        print_plan(todo, args)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = (confirm if args.confirm_changed else run)(todo, args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"{failed} of {len(todo)} failed; the same command tries them again")


if __name__ == "__main__":
    main()
