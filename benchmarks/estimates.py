"""What the report is made of: statistics over seeds, recorded returns and learning curves, table cells, plots."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
from run import Cell

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

BINS = 50
"""of a learning curve, over the run's steps"""
STYLES = {
    "ours": dict(color="#0072B2", linestyle="-"),
    "Stable-Baselines3": dict(color="#D55E00", linestyle="--"),
    "SB3's A2C": dict(color="#009E73", linestyle=":"),
    "SB3's PPO": dict(color="#CC79A7", linestyle="-."),
    "SB3's SAC": dict(color="#E69F00", linestyle=":"),
}
"""colours of Okabe and Ito (2008), apart for colour-blind readers, and in print by the dashes"""
OTHERS = dict(color="#555555", linestyle=":")
"""of any other curve"""


# Statistics -------------------------------------------------------------------------------------------------


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean along `axis` (Agarwal et al. 2021, arXiv 2108.13264)."""
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def iqm_difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """IQM of x − IQM of y along `axis`."""
    return iqm(x, axis) - iqm(y, axis)


def probability_of_improvement(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """P(x > y) over all pairs along the last axis, ties half."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def iqm_ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """IQM of x / IQM of y along `axis`."""
    return iqm(x, axis) / iqm(y, axis)


def interval(statistic, *samples: np.ndarray, paired: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of statistic(*samples), each resampled along its last axis, by itself or `paired`.

    NaN where a sample has fewer than three values.
    """
    if min(sample.shape[-1] for sample in samples) < 3:
        return (np.full(np.shape(statistic(*samples)), np.nan),) * 2
    rng = np.random.default_rng(0)
    options = dict(n_resamples=10_000, batch=1000, method="percentile", axis=-1, vectorized=True, rng=rng)
    options |= dict(paired=paired)
    return tuple(scipy.stats.bootstrap(samples, statistic, **options).confidence_interval)


# Recorded runs --------------------------------------------------------------------------------------------


def runs_of(runs: pd.DataFrame, impl: str, algo: str, env_id: str, steps: int) -> pd.DataFrame:
    """The recorded rows of one curve: every seed."""
    keys = runs.index.to_frame()
    mine = (keys["impl"] == impl) & (keys["algo"] == algo) & (keys["env_id"] == env_id)
    return runs.loc[mine & (keys["total_timesteps"] == steps)]


def of_seeds(rows: pd.DataFrame, seeds: list[int]) -> pd.DataFrame:
    """Those of these seeds, in the order of the seeds."""
    return rows[rows.index.get_level_values("seed").isin(seeds)].sort_index()


def returns_of(runs: pd.DataFrame, impl: str, algo: str, env_id: str, steps: int) -> np.ndarray:
    """Mean evaluation return of every recorded seed (seeds,)."""
    return runs_of(runs, impl, algo, env_id, steps)["eval_mean"].to_numpy()


def binned(path: Path, steps: int) -> pd.DataFrame:
    """Per fiftieth of a run: r, the mean training return of the episodes that ended in it, and t, seconds to its end.

    BINS rows; where no episode ended the last values stay, and before the first end they are NaN. Steps are counted
    as the sum of the lengths of the episodes that have ended.
    """
    episodes = pd.read_csv(path)
    bins = (episodes["l"].cumsum() * BINS // steps).clip(upper=BINS - 1)
    return episodes.groupby(bins.rename("bin")).agg({"r": "mean", "t": "max"}).reindex(range(BINS)).ffill()


def curves_of(impl: str, algo: str, env_id: str, steps: int, runs: pd.DataFrame, results: Path) -> np.ndarray:
    """Learning curves of the recorded seeds (BINS, seeds)."""
    cells = [Cell(*key) for key in runs_of(runs, impl, algo, env_id, steps).index]
    curves = [binned(results / "episodes" / f"{cell.name}.csv.gz", steps)["r"] for cell in cells]
    return np.stack(curves, axis=-1) if curves else np.empty((BINS, 0))


def training_means(impl: str, algo: str, env_id: str, steps: int, runs: pd.DataFrame, results: Path) -> np.ndarray:
    """Mean training return over the whole run (seeds,): of its fiftieths, those before the first end as the first."""
    return pd.DataFrame(curves_of(impl, algo, env_id, steps, runs, results)).bfill().mean().to_numpy()


# Tables and plots -----------------------------------------------------------------------------------------


def markdown(rows: list[dict]) -> str:
    """A table with the dicts' keys as its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def digits_of(*values: float) -> int:
    """Digits after the point that show the largest of the values to four places or so."""
    largest = max(abs(x) for x in values)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2 if largest >= 0.1 or largest == 0 else 4


def number(x: float, digits: int) -> str:
    """With `digits` after the point and a proper minus sign, which 0 never has."""
    text = f"{x:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def estimate(statistic, *samples: np.ndarray, paired: bool = False) -> str:
    """statistic(*samples) [its interval]; no interval from one value or two, — where a sample is empty."""
    if not all(len(sample) for sample in samples):
        return "—"
    values = [statistic(*samples), *interval(statistic, *samples, paired=paired)]
    value, low, high = (number(x, digits_of(*np.nan_to_num(values))) for x in values)
    return value if low == "nan" else f"{value} [{low}, {high}]"


def save(figure: plt.Figure, path: Path) -> None:
    """Writes the figure, without the version of matplotlib in the file: same data, same bytes."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def tidy(ax: plt.Axes, xlabel: str, ylabel: str) -> None:
    """Labels, grid and legend."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
