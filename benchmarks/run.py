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
and of all that makes the run, its code without comments and docstrings, which says whether the row still describes
the code. Several run.py may share --work and --results.
"""

import ast
import functools
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import stable_baselines3
import tyro
from filelock import FileLock, Timeout
from launchers import Local, LocalJob, Ray, RayJob
from sb3 import MODELS, maker_of
from suites import FLAGS, SCRIPT_FLAGS, SUITES, VARIANTS, Variant
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
    """list the cells and the time that they take, start nothing: "skip" what is recorded, "record" what has finished in
    --work, "resume" what has begun there, "run" the rest; † where other code or flags than today's measured it"""
    work: Path | None = None
    """folder of the cells' run directories and output; None: runs/benchmarks or, beside other --results, work"""
    results: Path = RESULTS
    """folder of runs.csv and episodes/"""


# Cells ------------------------------------------------------------------------------------------------------


@functools.cache
def script_args(script: str, env_id: str, flags: str = "") -> dict:
    """The arguments that algos/{script}.py takes for `env_id` and `flags` alone."""
    return asdict(importlib.import_module(script).parse_args(["--env-id", env_id, *flags.split()]))


def variant_of(algo: str) -> Variant:
    """What a suite calls by this name."""
    return VARIANTS.get(algo, Variant(algo))


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
        default = script_args(variant_of(self.algo).script, self.env_id)["total_timesteps"]
        return [] if self.total_timesteps == default else [str(self.total_timesteps)]

    @property
    def name(self) -> str:
        """Name of its folder in --work and of its file in results/episodes/."""
        parts = [self.impl, self.algo, self.env_id.replace("/", "-"), str(self.seed), *self.steps_if_unusual]
        return "__".join(parts)

    @property
    def flags(self) -> str:
        """What it is run with beside environment, seed and steps."""
        own, variant = FLAGS.get((self.algo, self.env_id, self.total_timesteps), ""), variant_of(self.algo)
        return " ".join(filter(None, [own, SCRIPT_FLAGS.get(variant.script), variant.flags]))

    @property
    def script(self) -> str:
        """Path of what runs it, from the repository's root."""
        return "benchmarks/sb3.py" if self.impl == "sb3" else f"algos/{variant_of(self.algo).script}.py"

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
        Cell(impl, algo, env_id, seed, steps)
        for entry in SUITES[suite]
        for algo in entry.algos
        for seed in entry.seeds
        for env_id in entry.env_ids
        for steps in [entry.total_timesteps or script_args(variant_of(algo).script, env_id)["total_timesteps"]]
        for impl in entry.implementations
        if impl == "ours" or algo in MODELS
    ]


# Which code has run -----------------------------------------------------------------------------------------


def script_sha256(cell: Cell) -> str:
    """Of the bytes of the cell's script as it is now."""
    return hashlib.sha256((ROOT / cell.script).read_bytes()).hexdigest()


def source_sha256(impl: str, algo: str) -> str:
    """Of the syntax tree, without docstrings, of the script of algos/ or of all in sb3.py that runs `algo`."""
    if impl == "ours":
        return tree_sha256((ROOT / "algos" / f"{variant_of(algo).script}.py").read_text())
    return tree_sha256((ROOT / "benchmarks" / "sb3.py").read_text(), runs_sb3s(algo))


def runs_sb3s(algo: str) -> tuple[str, ...]:
    """The functions of sb3.py that run `algo`; they use others."""
    return MODELS[algo].__name__, maker_of(algo).__name__, "train"


def used_by(tree: ast.Module, names: tuple[str, ...]) -> set[str]:
    """These functions, and what of the module they use, and so on; train()'s make_env is another one for images."""
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used, todo = set(), list(names)
    while todo:
        name = todo.pop()
        used.add(name)
        inside = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
        todo += (inside & defined.keys()) - used - ({"make_env"} - set(names))
    return used


@functools.cache
def tree_sha256(text: str, functions: tuple[str, ...] | None = None) -> str:
    """Of a script's syntax tree without docstrings, or of these functions' and of what they use."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):  # a bare string is a docstring, also below a field
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    if functions:
        used = used_by(tree, functions)
        tree.body = [node for node in tree.body if getattr(node, "name", None) in used]
    # Python 3.13 leaves empty fields out, older versions write them: out with them, for one hash everywhere.
    dump = re.sub(r"(, )?\w+=(\[\]|Load\(\))", "", ast.dump(tree)).replace("(, ", "(")
    return hashlib.sha256(dump.encode()).hexdigest()


@functools.cache
def arguments_read(text: str, functions: tuple[str, ...]) -> dict[str, object]:
    """What these functions of sb3.py, those they use and its last lines read of the arguments, NOT_SB3S left out.

    By name the value that they take where the script has no such flag: getattr's third argument, or None.
    """
    tree, read = ast.parse(text), {}
    used = used_by(tree, functions)
    last_lines = [node for node in tree.body if isinstance(node, ast.If)]  # below `if __name__ == "__main__":`
    for top in [node for node in tree.body if getattr(node, "name", None) in used] + last_lines:
        for node in ast.walk(top):
            match node:
                case ast.Attribute(value=ast.Name(id="args"), attr=name):
                    read.setdefault(name, None)
                case ast.Call(func=ast.Name(id="refuse_unless"), keywords=values):
                    read |= {value.arg: None for value in values}
                case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="args"), ast.Constant(name), *default]):
                    read[name] = ast.literal_eval(default[0]) if default else None
    return {name: default for name, default in read.items() if name not in NOT_SB3S}


def with_hashes(flags: str) -> str:
    """The flags of a cell, each file among them with its hash."""
    words = [(word, ROOT / word) for word in flags.split()]
    return " ".join(
        f"{x}@{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else x for x, path in words
    )


def code_sha256(cell: Cell, source: str, args: dict, sb3_version: str, flags: str) -> str:
    """`source` of source_sha256 with what else makes the run: the flags, or for SB3 its version and what it is given.

    That is what sb3.py reads of `args` alone: a flag more or less of algos/ leaves SB3's runs what they were.
    """
    if cell.impl == "ours":
        return hashlib.sha256(json.dumps([source, flags]).encode()).hexdigest() if flags else source
    read = arguments_read((ROOT / "benchmarks" / "sb3.py").read_text(), runs_sb3s(cell.algo))
    args = {name: args.get(name, default) for name, default in read.items()}
    return hashlib.sha256(json.dumps([source, args, sb3_version], sort_keys=True).encode()).hexdigest()


def present_code(cell: Cell, sb3_version: str = stable_baselines3.__version__) -> str:
    """code_sha256 of the cell if it were run now."""
    script = variant_of(cell.algo).script
    args = script_args(script, cell.env_id, cell.flags) | {"total_timesteps": cell.total_timesteps}
    source = source_sha256(cell.impl, cell.algo)
    return code_sha256(cell, source, args, sb3_version, with_hashes(cell.flags))


def about_now(cell: Cell) -> dict[str, str]:
    """What meta.json keeps of a run that starts now."""
    return {
        "source_sha256": source_sha256(cell.impl, cell.algo),
        "script_sha256": script_sha256(cell),
        "flags": with_hashes(cell.flags),
        "command": " ".join(cell.command),
    }


def what_ran(cell: Cell, folder: Path, run_dir: Path) -> dict[str, str]:
    """code_sha256, script_sha256 and command of a run that has been started, from meta.json, written at its launch.

    A run started by hand has none: then today's code is taken for it, unless args.json has the hash of another
    script. (sb3.py writes no hash there, so a baseline started by hand counts as one of today's sb3.py.)
    """
    about, meta = json.loads((run_dir / "args.json").read_text()), about_now(cell)
    script = about.get("script_sha256", meta["script_sha256"])
    if (folder / "meta.json").exists():
        meta |= json.loads((folder / "meta.json").read_text())
    elif script != meta["script_sha256"]:
        return {"code_sha256": "unknown", "script_sha256": script, "command": meta["command"]}
    version = about["versions"].get("stable_baselines3", "")
    code = code_sha256(cell, meta["source_sha256"], about["args"], version, meta["flags"])
    script = about.get("script_sha256", meta["script_sha256"])
    return {"code_sha256": code, "script_sha256": script, "command": meta["command"]}


# Results ----------------------------------------------------------------------------------------------------


def read_runs(results: Path) -> pd.DataFrame:
    """runs.csv, indexed by KEY; empty before the first recording."""
    path = results / "runs.csv"
    return (pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)).set_index(KEY).sort_index()


def writing(results: Path) -> FileLock:
    """Held by whoever changes runs.csv."""
    results.mkdir(parents=True, exist_ok=True)
    return FileLock(results / "runs.lock")


def write_runs(runs: pd.DataFrame, results: Path) -> None:
    """Under another name first: a kill leaves the old file whole."""
    runs.sort_index().to_csv(results / "runs.csv.tmp")
    os.replace(results / "runs.csv.tmp", results / "runs.csv")


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
        **what_ran(cell, folder, run_dir),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "date": datetime.fromtimestamp((folder / "stdout.txt").stat().st_mtime, UTC).date().isoformat(),
    }
    row["command"] = row.pop("command")  # the last column
    (results / "episodes").mkdir(parents=True, exist_ok=True)
    monitor.round({"r": 3, "t": 2}).to_csv(
        results / "episodes" / f"{cell.name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    row = pd.DataFrame([row], index=pd.MultiIndex.from_tuples([astuple(cell)], names=KEY))
    with writing(results):
        runs = read_runs(results).drop(index=[astuple(cell)], errors="ignore")
        write_runs(row if runs.empty else pd.concat([runs, row]), results)


# Running ----------------------------------------------------------------------------------------------------


def lock_of(cell: Cell, work: Path) -> FileLock:
    """Held by the run.py that is at the cell; the system lets it go when that process ends, however it ends."""
    (work / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(work / "locks" / cell.name)


def is_held(lock: FileLock) -> bool:
    """Whether another process holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def state(cell: Cell, folder: Path) -> tuple[str, Path | None]:
    """("finished" | "started" | "new", run directory): how far the cell is in the work folder."""
    if match := evaluation(folder):
        return "finished", folder / Path(match[4]).name
    checkpoints = sorted(folder.glob("*/checkpoint.pt"), key=os.path.getmtime)
    return ("started", checkpoints[-1].parent) if checkpoints and cell.impl == "ours" else ("new", None)


def plan(cell: Cell, folder: Path, runs: pd.DataFrame, rerun_changed: bool) -> tuple[str, Path | None]:
    """("skip" | "record" | "resume" | "run", run directory): what there is to do for the cell."""
    now = present_code(cell)
    recorded = astuple(cell) in runs.index
    if recorded and not (rerun_changed and runs.loc[astuple(cell), "code_sha256"] != now):
        return "skip", None
    found, run_dir = state(cell, folder)
    if found == "new":
        return "run", None
    unchanged = what_ran(cell, folder, run_dir)["code_sha256"] == now
    if found == "finished":
        return ("record", run_dir) if unchanged or not rerun_changed else ("run", None)
    return ("resume", run_dir) if unchanged else ("run", None)  # half of a run with one code, half with another: no


def launch(cell: Cell, folder: Path, run_dir: Path | None, launcher: Local | Ray) -> LocalJob | RayJob:
    """Starts the cell's process, afresh or going on in `run_dir`."""
    if run_dir is not None:
        return launcher.start([cell.script, "--resume", str(run_dir)], folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(about_now(cell), indent=2) + "\n")
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
    bar = tqdm(total=len(todo), unit="run", smoothing=0, desc=args.suite)

    def done(lock: FileLock, message: str | None = None) -> None:
        nonlocal failed
        lock.release()
        if message:
            failed += 1
            bar.write(message, file=sys.stderr)
        bar.set_postfix(failed=failed, refresh=False)
        bar.update()

    try:
        while queue or running:
            while queue and len(running) < launcher.workers:
                cell = queue.pop(0)
                folder, lock = args.work / cell.name, lock_of(cell, args.work)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    done(lock, f"{cell.name}: another run.py is at it; start again when that has ended")
                    continue
                what, run_dir = plan(cell, folder, read_runs(args.results), args.rerun_changed)
                if what in ("run", "resume"):
                    job = launch(cell, folder, run_dir if launcher.resumes else None, launcher)
                    running[job] = cell, folder, lock
                    continue
                if what == "record":
                    record(cell, folder, args.results)
                done(lock)
            for job in [job for job in running if job.poll() is not None]:
                cell, folder, lock = running.pop(job)
                if evaluation(folder):
                    record(cell, folder, args.results)
                    done(lock)
                else:
                    done(lock, problem(folder, job.poll()))
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
    and the rows of the group that the same code had measured get today's code_sha256 and versions. Where only the
    evaluation differs, as it may by rounding where another number of environments is evaluated at a time, the new one
    is recorded for that cell.
    """
    runs = read_runs(args.results)
    changed = changed_cells(todo, runs)
    firsts = first_of_each_group(changed)
    if not firsts:
        print("nothing has changed", file=sys.stderr)
        return 0
    apart = args.work / "confirm"
    failed = run(list(firsts.values()), replace(args, work=apart, results=apart / "results", rerun_changed=True))
    new_runs, evaluations = read_runs(apart / "results"), ["eval_mean", "eval_std"]
    for key, cell in firsts.items():
        if astuple(cell) not in new_runs.index or new_runs.code_sha256[astuple(cell)] != present_code(cell):
            continue  # it failed: what is there is of an older confirmation
        recorded, new = runs.loc[astuple(cell)], new_runs.loc[astuple(cell)]
        one, other = (
            pd.read_csv(results / "episodes" / f"{cell.name}.csv.gz")[["r", "l"]]
            for results in (args.results, apart / "results")
        )
        if not one.equals(other):
            failed += 1
            print(f"{cell.name}: its episodes are others now; --rerun-changed measures them", file=sys.stderr)
            continue
        same = [c for c in changed if group(c) == key and runs.code_sha256[astuple(c)] == recorded["code_sha256"]]
        same = same if recorded["code_sha256"] != "unknown" else [cell]
        with writing(args.results):
            now = read_runs(args.results)
            rows = [astuple(c) for c in same if now.code_sha256[astuple(c)] == recorded["code_sha256"]]
            now.loc[rows, "code_sha256"] = [present_code(Cell(*row)) for row in rows]
            now.loc[rows, "versions"] = new["versions"]
            if list(recorded[evaluations]) != list(new[evaluations]):
                now.loc[[astuple(cell)], evaluations] = [list(new[evaluations])]
            write_runs(now, args.results)
        print("\n".join(f"{Cell(*row).name}: confirmed" for row in rows), file=sys.stderr)
    return failed


def expected_seconds(cell: Cell, runs: pd.DataFrame) -> float:
    """Of one run: the median of the recorded ones, if need be of other lengths; not a number where there is none."""
    if runs.empty:
        return np.nan
    runs = runs.reset_index()
    runs = runs[(runs["impl"] == cell.impl) & (runs["algo"] == cell.algo) & (runs["env_id"] == cell.env_id)]
    same = runs[runs["total_timesteps"] == cell.total_timesteps]
    runs = runs if same["seconds"].isna().all() else same
    return (runs["seconds"] / runs["total_timesteps"]).median() * cell.total_timesteps


def print_plan(todo: list[Cell], args: Args) -> None:
    """What a run of run.py would do with each cell, and how long that takes."""
    runs, recorded, work = read_runs(args.results), read_runs(args.results), args.work
    to_go_by = pd.concat([x for x in (runs, read_runs(RESULTS)) if len(x)] or [runs])
    if args.confirm_changed:
        todo, work = list(first_of_each_group(changed_cells(todo, runs)).values()), args.work / "confirm"
        recorded = read_runs(work / "results")
    minutes = []
    for cell in todo:
        what, run_dir = plan(cell, work / cell.name, recorded, args.rerun_changed or args.confirm_changed)
        if what == "skip" and recorded.code_sha256[astuple(cell)] != present_code(cell):
            what = "skip †"
        if what == "record" and what_ran(cell, work / cell.name, run_dir)["code_sha256"] != present_code(cell):
            what = "record †"
        what = "in use" if is_held(lock_of(cell, work)) else what
        if what in ("run", "resume"):
            minutes.append(expected_seconds(cell, to_go_by) / 60)
        time_needed = f"{minutes[-1]:4.0f} min" if what in ("run", "resume") and minutes[-1] >= 0 else ""
        print(f"{what:8}  {time_needed:8}  {' '.join(cell.command)}")
    hours, unknown = np.nansum(minutes) / 60, np.isnan(minutes).sum()
    without = f", without {unknown} that have no recorded time to go by" if unknown else ""
    print(f"{len(minutes)} runs; {hours:.1f} hours in all, as those recorded{without}", file=sys.stderr)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.results = args.results.resolve()
    usual = ROOT / "runs" / "benchmarks" if args.results == RESULTS else args.results.parent / "work"
    args.work = (args.work or usual).resolve()
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
        print(
            "stopped; the same command goes on from here (unfinished runs of SB3's or on Ray begin anew)",
            file=sys.stderr,
        )
        sys.exit(130)
    if failed:
        again = "" if args.confirm_changed else "; the same command tries them again"
        sys.exit(f"{failed} failed{' or differ' if args.confirm_changed else f' of {len(todo)}'}{again}")
    if changed := len(changed_cells(todo, read_runs(args.results))):
        print(
            f"{changed} of {len(todo)} are of other code or flags (†): --rerun-changed measures them", file=sys.stderr
        )


if __name__ == "__main__":
    main()
