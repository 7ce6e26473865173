"""benchmarks/growth.py: what is measured at each size, going on after a kill, and the page's section."""

import growth
import pandas as pd
import pytest
import report
from throughput import Work


@pytest.mark.parametrize(
    "setting, bytes_each", [("eager", 2 * 17 * 4 + 6 * 4 + 4 + 2), ("sb3", 2 * 17 * 8 + 6 * 4 + 12)]
)
def test_the_memory_of_a_full_buffer(setting, bytes_each):
    """Two observations of 17 numbers, which SB3 keeps as float64, 6 of an action, a reward and two flags."""
    measured = growth.in_process(growth.buffer_bytes, 200_000, setting)
    assert measured == pytest.approx(200_000 * bytes_each, rel=0.15)


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


def test_what_is_measured_already_is_left_alone(monkeypatch, tmp_path):
    """Of the memory's six cells one is up to date, one was measured with older code."""
    cells = [("buffer_size", size, setting) for size in growth.BUFFER_SIZES for setting in growth.MEMORY_SETTINGS]
    rows = [(*cells[0], 1.0, *growth.evidence(cells[0]).values()), (*cells[1], 2.0, "-", "older")]
    rows = pd.DataFrame(rows, columns=[*growth.KEY, "value", *growth.EVIDENCE])
    rows.to_csv(tmp_path / "growth.csv", index=False)
    asked = []
    monkeypatch.setattr(growth, "in_process", lambda _, *cell: asked.append(cell) or {"value": 7.0})
    monkeypatch.setattr("sys.argv", ["", "--only", "buffer", "--results", str(tmp_path)])
    growth.main()
    assert asked == cells[1:]
    kept = pd.read_csv(tmp_path / "growth.csv").set_index(growth.KEY)["value"]
    assert kept[cells[0]] == 1 and all(kept[cell] == 7 for cell in cells[1:])


def test_the_section_of_the_page(tmp_path):
    (tmp_path / "results").mkdir()
    values = {"buffer_size": 160e6}
    rows = [(*cell, values.get(cell[0], 10.0), *growth.evidence(cell).values()) for cell in growth.cells()]
    rows = pd.DataFrame(rows, columns=[*growth.KEY, "value", *growth.EVIDENCE])
    rows.to_csv(tmp_path / "results" / "growth.csv", index=False)
    section = report.growth(tmp_path / "results")
    assert "bytes a transition: ours, eager 160, Stable-Baselines3 160" in section and "†" not in section
    assert (tmp_path / "plots" / "growth.png").stat().st_size > 10_000
    for changed in (dict(code_sha256="older"), dict(flags="others")):
        rows.iloc[:1].assign(**changed).to_csv(tmp_path / "results" / "growth.csv", index=False)
        assert "†: some with older code" in report.growth(tmp_path / "results")
    assert report.growth(tmp_path) == ""
