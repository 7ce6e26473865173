"""Where benchmarks/run.py has its processes: on this machine, or on the nodes of a Ray cluster.

A launcher's `start` takes the arguments of Python and a folder that the process leaves its output and its run
directory in, and returns a job: `poll()` is None while it runs, then its exit code; `stop()` makes it end.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RETRIES = 10
"""How often Ray begins a run again whose node has died."""
NOT_SHIPPED = ["runs", ".git", ".venv", "tests", "benchmarks/plots", "benchmarks/results/*.csv", "**/*.csv.gz"]
"""What no run on another node needs of the repository."""
NOT_RETURNED = ("checkpoint.pt", "checkpoint.tmp")
"""What stays behind there: a checkpoint may hold a replay buffer."""


def die_with_parent() -> None:
    """In the child: Linux kills it when this process ends, however that ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_process(arguments: list[str], folder: Path, root: Path) -> subprocess.Popen:
    """Python in `root` with these arguments and one thread; what it prints and a new run directory are in `folder`."""
    if "--resume" not in arguments:
        arguments = [*arguments, "--output-dir", str(folder)]
    with open(folder / "stdout.txt", "w") as stdout, open(folder / "stderr.txt", "w") as stderr:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=stdout,
            stderr=stderr,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the others in order
            preexec_fn=die_with_parent,
        )


# This machine -----------------------------------------------------------------------------------------------


class LocalJob:
    """A process of this machine."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.poll = process, process.poll

    def stop(self) -> None:
        """Asks it to end; the scripts of algos/ write a checkpoint first."""
        self.process.terminate()


class Local:
    """Processes of this machine, `workers` at a time."""

    resumes = True
    """An interrupted run goes on from its last checkpoint."""

    def __init__(self, root: Path, workers: int):
        self.root, self.workers = root, workers

    def start(self, arguments: list[str], folder: Path) -> LocalJob:
        """The job, just begun."""
        return LocalJob(start_process(arguments, folder, self.root))

    def close(self) -> None:
        """Nothing is left open."""


# A Ray cluster ----------------------------------------------------------------------------------------------


def run_on_node(arguments: list[str]) -> tuple[int, dict[str, bytes]]:
    """On a node, in the repository's copy there: exit code, and the files left, by their path in the folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        code = start_process(arguments, folder, Path.cwd()).wait()
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_RETURNED]
        return code, {str(path.relative_to(folder)): path.read_bytes() for path in files}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class RayJob:
    """A task of a Ray cluster; Ray begins it again on another node where its own one dies."""

    def __init__(self, reference, folder: Path):
        self.reference, self.folder, self.code = reference, folder, None

    def poll(self) -> int | None:
        """None while it waits or runs; then its files are in the folder, and this is its exit code."""
        import ray

        if self.code is None and ray.wait([self.reference], timeout=0)[0]:
            try:
                self.code, files = ray.get(self.reference)
            except ray.exceptions.RayError as error:
                self.code, files = 1, {"stderr.txt": str(error).encode()}
            for name in sorted(files, key="stdout.txt".__eq__):  # that is what says that a run has finished: last
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name("arriving").write_bytes(files[name])
                os.replace(path.with_name("arriving"), path)
        return self.code

    def stop(self) -> None:
        """At once: what it has done is lost."""
        import ray

        ray.cancel(self.reference, force=True)


def refuse_unreachable(address: str | None) -> None:
    """Exits with one line where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").partition(":")
    if port:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            sys.exit(f"--address {address}: no Ray cluster there ({error}); its head says its own when it starts")


class Ray:
    """Tasks of one CPU each on all nodes of a Ray cluster, which get a copy of the repository.

    Python and what requirements.txt lists must be on every node. An interrupted run begins anew.
    """

    resumes = False
    workers = 10**6  # they queue in the cluster

    def __init__(self, root: Path, address: str | None):
        try:
            import ray
        except ImportError:
            sys.exit("--launcher ray: Ray is not installed here; pip install ray==2.60.0")
        refuse_unreachable(address or os.environ.get("RAY_ADDRESS"))
        environment = {"working_dir": str(root), "excludes": NOT_SHIPPED}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            sys.exit(f"--address {address}: {' '.join(str(error).split())}")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no node has this module on its path
        self.task = ray.remote(num_cpus=1, max_retries=RETRIES)(run_on_node)

    def start(self, arguments: list[str], folder: Path) -> RayJob:
        """The job; the cluster begins it when a CPU is free."""
        return RayJob(self.task.remote(arguments), folder)

    def close(self) -> None:
        """Leaves the cluster."""
        import ray

        ray.shutdown()
