"""What --compile records as CUDA graphs computes what the same code does without: on a GPU, where there is one."""

import contextlib
import importlib
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

ALGOS = Path(__file__).resolve().parent.parent / "algos"
FLAGS = {
    "ddpg": "",
    "td3": "--noise ou --policy-delay 2 --num-envs 2",
    "sac": "",
    "sac, as REDQ": "--num-critics 4 --critic-subset 2 --gradient-steps 2 --policy-delay 2",
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def output(algo: str, flags: str) -> tuple[Path, str]:
    """Runs the script as a program. Returns the run directory, and what it wrote to stderr."""
    command = [sys.executable, str(ALGOS / f"{algo}.py"), *flags.split(), "--device", "cuda"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return Path(process.stdout.splitlines()[-1].removeprefix("run directory: ")), process.stderr


def run(algo: str, flags: str) -> Path:
    return output(algo, flags)[0]


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)


Pair = namedtuple("Pair", "total product")


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac"])
def test_inputs_are_copied_to_where_the_recording_had_its_own(monkeypatch, algo):
    """Without a GPU: a graph whose replay is the function of what lies in memory then, written over its results."""
    graph, replays = importlib.import_module(algo).CudaGraph, []

    class Memory:
        def replay(self):
            replays.append([x.data_ptr() for x in pytree.tree_leaves(recorded.inputs) if x is not None])
            new = recorded.function(*recorded.inputs)
            for own, other in zip(pytree.tree_leaves(recorded.outputs), pytree.tree_leaves(new), strict=True):
                own.copy_(other)

    nothing = contextlib.nullcontext
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(CUDAGraph=Memory, graph=lambda graph: nothing(), Stream=lambda: stream, stream=lambda x: nothing())
    for name, fake in (fakes | dict(current_stream=lambda: stream)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorded = graph(lambda x, none, y: (Pair(x + y.total, x * y.product), {"x": x.clone()}))
    shared, results = torch.zeros(2), []
    for i in range(7):
        shared.fill_(i)
        results.append(recorded(torch.full((2,), 10.0 * i), None, Pair(shared, shared)))
    values = [(pair.total[0].item(), pair.product[0].item(), other["x"][0].item()) for pair, other in results]
    assert values == [(11 * i, 10 * i * i, 10 * i) for i in range(7)], "a later call has written over a result"
    assert len(replays) == 4 and all(x == replays[0] for x in replays)


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac"])
@pytest.mark.parametrize("compiled, device", [(False, "cuda"), (True, "cpu"), (True, "mps")])
def test_elsewhere_a_function_is_given_back_as_it_is(algo, compiled, device):
    script = importlib.import_module(algo)
    assert script.cuda_graph(print, script.Args(compile=compiled), torch.device(device)) is print


@needs_gpu
def test_a_recorded_function_is_the_function():
    """It writes to memory of its own, draws random numbers and takes new inputs, also those that another one made."""
    results = []
    for wrap in (lambda function: function, importlib.import_module("td3").CudaGraph):
        torch.manual_seed(0)
        total = torch.zeros(5, device="cuda")

        def add(x, nothing, total=total):
            total.add_(x)
            return total.clone(), torch.randn_like(x)

        double, add = wrap(lambda x: 2 * x), wrap(add)
        for i in range(8):
            x = torch.full((5,), float(i), device="cuda") + torch.rand(5, device="cuda")
            results.append([y.clone() for y in (*add(double(x), None), torch.rand(3, device="cuda"))])
    for eager, replayed in zip(results[:8], results[8:]):
        assert all(a.equal(b) for a, b in zip(eager, replayed))


@needs_gpu
@pytest.mark.parametrize("name", FLAGS)
def test_compile_changes_no_result(name):
    algo = name.split(",")[0]
    flags = f"--env-id Pendulum-v1 --total-timesteps 420 --learning-starts 200 --hidden-sizes 64 64 {FLAGS[name]}"
    eager, compiled = run(algo, flags), run(algo, f"{flags} --compile")
    a, b = checkpoint(eager), checkpoint(compiled)
    names = {"agent", "target"}
    assert names <= a.keys()
    for part in names:
        for key, x in a[part].items():
            torch.testing.assert_close(
                x, b[part][key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
    for key in ("observations", "actions", "rewards"):
        torch.testing.assert_close(a["buffer"][key], b["buffer"][key], rtol=1e-3, atol=1e-3)
    assert torch.equal(a["cuda_rng"][0], b["cuda_rng"][0])


@needs_gpu
def test_a_run_with_graphs_goes_on():
    """What is loaded lies where the next recording finds it; the arguments are the run's own."""
    run_dir = run("sac", "--total-timesteps 250 --learning-starts 200 --compile")
    before = checkpoint(run_dir)
    assert run("sac", f"--resume {run_dir} --total-timesteps 300") == run_dir
    after = checkpoint(run_dir)
    assert after["updates"] == before["updates"] + 50
    assert json.loads((run_dir / "args.json").read_text())["args"]["compile"]
    assert not any(before["agent"][key].equal(x) for key, x in after["agent"].items() if key.startswith("actor"))
    assert all(x.isfinite().all() for x in after["agent"].values())


@needs_gpu
@pytest.mark.parametrize("flag", ["", "--compile"])
def test_no_warning(flag):
    assert "Warning" not in output("td3", f"--total-timesteps 250 --learning-starts 200 {flag}")[1]
