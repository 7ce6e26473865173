"""benchmarks/growth.py: what is measured at each size, going on after a kill, and the page's section."""

import os

import growth
import pandas as pd
import pytest
import report
from estimates import save
from throughput import Work, machine


@pytest.mark.parametrize(
    "setting, bytes_each", [("eager", 2 * 17 * 4 + 6 * 4 + 4 + 2), ("sb3", 2 * 17 * 8 + 6 * 4 + 12)]
)
def test_the_memory_of_a_full_buffer(setting, bytes_each):
    """Two observations of 17 numbers, which SB3 keeps as float64, 6 of an action, a reward and two flags.

    Up to a page of 2 MiB, which the kernel may take for what would need less.
    """
    for size, error in ((growth.BUFFER_SIZES[0], 0.3), (200_000, 0.1)):
        expected = pytest.approx(size * bytes_each, rel=error, abs=2**21)
        assert growth.in_process(growth.buffer_bytes, size, setting) == expected


def test_a_size_is_what_the_script_is_run_with():
    for axis, works in growth.AXES.items():
        for size, work in works.items():
            flag = {"num_envs": f"--num-envs {size} ", "width": f"-sizes {size} {size} ", "batch_size": f"-size {size}"}
            assert flag[axis] in work.flags + " "
            assert axis != "num_envs" or work.steps % (128 * size) == work.warmup_steps % (128 * size) == 0


@pytest.mark.parametrize("setting", ["eager", "sb3"])
def test_a_short_training_is_timed(monkeypatch, setting):
    """Shorter than the 1000 steps after which sac.py logs."""
    flags = "--env-id Pendulum-v1 --hidden-sizes 8 --batch-size 8 --learning-starts 20"
    monkeypatch.setitem(growth.AXES["width"], 64, Work("sac", flags, warmup_steps=50, steps=100))
    assert growth.steps_per_second("width", 64, setting) > 0


def test_what_is_measured_already_is_left_alone_and_a_stop_loses_nothing(monkeypatch, tmp_path):
    """Of the memory's six cells one is up to date, one of older code, one of another machine; the fifth fails."""
    cells = [("buffer_size", size, setting, 1) for size in growth.BUFFER_SIZES for setting in growth.MEMORY_SETTINGS]
    rows = [(*cell, 1.0, *growth.evidence(cell).values(), machine()) for cell in cells[:3]]
    rows = pd.DataFrame(rows, columns=[*growth.KEY, "value", *growth.EVIDENCE, "machine"])
    rows.loc[1, "code_sha256"], rows.loc[2, "machine"] = "older", "another"
    rows.to_csv(tmp_path / "growth.csv", index=False)
    asked, fail = [], [cells[4]]

    def in_process(function, *cell):
        assert function is growth.measured and os.environ["OMP_NUM_THREADS"] == "1"
        if cell in fail:
            raise KeyboardInterrupt
        asked.append(cell)
        return {"value": 7.0}

    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setattr(growth, "in_process", in_process)
    monkeypatch.setattr("sys.argv", ["", "--only", "buffer", "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        growth.main()
    assert asked == cells[1:4]
    fail.clear()
    growth.main()
    assert asked == cells[1:] and os.environ["OMP_NUM_THREADS"] == "9"
    kept = pd.read_csv(tmp_path / "growth.csv").set_index(growth.KEY)
    assert kept.loc[cells[0], "value"] == 1 and all(kept.loc[cell, "value"] == 7 for cell in cells[1:])
    assert {*kept["machine"]} == {machine()}
    monkeypatch.setattr("sys.argv", ["", "--only", "bufer", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="--only bufer"):
        growth.main()


def test_the_section_of_the_page(monkeypatch, tmp_path):
    """Three rounds, the first of them slow; a size that is measured no more."""
    (tmp_path / "results").mkdir()
    cells = [*growth.cells(3), ("num_envs", 3, "eager", 1)]
    value = {("buffer_size", growth.BUFFER_SIZES[-1]): 160e6}
    rows = [(*cell, value.get(cell[:2], 5.0 if cell[3] == 1 else 10.0 + cell[3])) for cell in cells]
    rows = pd.DataFrame(rows, columns=[*growth.KEY, "value"])
    rows.loc[(rows["axis"] == "width") & (rows["size"] == 256) & (rows["setting"] == "eager"), "value"] *= 2
    rows = rows.assign(
        **pd.DataFrame([*map(growth.evidence, cells[:-1]), dict(flags="-", code_sha256="gone")]), machine="this one"
    )
    rows.to_csv(tmp_path / "results" / "growth.csv", index=False)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    section = report.growth(tmp_path / "results")
    assert "bytes a transition: ours, eager 160, Stable-Baselines3 160" in section and "†" not in section
    assert "measurements a point: 3; median" in section and "Machine: this one. " in section
    assert "eager over SB3 is 2.00 in one and 1.00 in the other" in section
    line, _, (bars,) = figures[0].axes[0].containers[0]
    assert line.get_xdata().tolist() == [*growth.AXES["num_envs"]] and {*line.get_ydata()} == {12}
    assert [[*x[:, 1]] for x in bars.get_segments()] == [[5, 13]] * len(growth.AXES["num_envs"])
    assert figures[0].axes[3].containers[0][0].get_ydata()[-1] == 160  # MB
    assert (tmp_path / "plots" / "growth.png").stat().st_size > 10_000
    for changed in (dict(code_sha256="older"), dict(flags="others")):
        rows.iloc[:1].assign(**changed).to_csv(tmp_path / "results" / "growth.csv", index=False)
        assert "† some with older code" in report.growth(tmp_path / "results")
    rows.iloc[:2].assign(machine=["old one", "new one"]).to_csv(tmp_path / "results" / "growth.csv", index=False)
    assert "Machine: old one and new one. " in report.growth(tmp_path / "results")
    assert report.growth(tmp_path) == ""
