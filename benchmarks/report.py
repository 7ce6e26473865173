"""Writes benchmarks/README.md and benchmarks/plots/ from benchmarks/results/; the same input gives the same bytes.

    python benchmarks/report.py

Everything is resampled with a fixed seed. Read the numbers back with pandas, as the page's last section shows.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import deep_sea
import numpy as np
import pandas as pd
import planning_errors
import planning_mujoco
import random_walk
import trajectories
import tyro
from aggregate import REFERENCES, Strata, paired, plot_aggregate, stratified
from aggregate import measured as measured_on_both_sides
from breakdown import PARTS
from breakdown import cells as breakdown_cells
from breakdown import evidence as breakdown_evidence
from compounding_error import ERROR, HORIZONS
from compounding_error import LABELS as LEDGE_LABELS
from estimates import (
    BINS,
    OTHERS,
    STYLES,
    curves_of,
    digits_of,
    estimate,
    interval,
    iqm,
    iqm_difference,
    iqm_ratio,
    markdown,
    number,
    of_seeds,
    probability_of_improvement,
    returns_of,
    runs_of,
    save,
    tidy,
    training_means,
)
from growth import AXES, BUFFER_SIZES, EVIDENCE
from growth import KEY as GROWTH_KEY
from growth import cells as growth_cells
from growth import evidence as growth_evidence
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter
from run import KEY, RESULTS, ROOT, Cell, cells_of, present_code, read_runs, sb3_version, source_sha256, variant_of
from sb3 import MODELS, parse_args
from steps_to_solve import ENV_ID, EPISODES, EVERY, SIDES, SOLVED
from suites import EXPERTS, SUITES, VARIANTS
from throughput import CUDA_WORKS, LEANRL, MODEL_BASED_SETTINGS, WORKS, code_of, summary

LABELS = {"ours": "ours", "sb3": "Stable-Baselines3"}
IMITATORS = {
    "bc": dict(label="behavioural cloning", color="#D55E00", linestyle="--"),
    "dagger": dict(label="DAgger", color="#0072B2", linestyle="-"),
}
BESIDE = {"mbpo": ("sac",)}
"""SB3's algorithms that are shown beside one that it does not have; ("a2c", "ppo") but for these"""
SOLVERS = {
    ("ours", "mbpo"): dict(label="MBPO", color="#0072B2", linestyle="-"),
    ("ours", "sac"): dict(label="SAC", color="#009E73", linestyle="-."),
    ("sb3", "sac"): dict(label="SB3's SAC", color="#D55E00", linestyle="--"),
}
GROWING = {
    "eager": dict(label="ours, eager", color="#0072B2", linestyle="-"),
    "compile": dict(label="ours, compiled", color="#009E73", linestyle="-."),
    "sb3": dict(label="Stable-Baselines3", color="#D55E00", linestyle="--"),
}
PART_COLOURS = ["#009E73", "#F0E442", "#0072B2", "#56B4E9", "#CC79A7", "#BBBBBB"]
"""of breakdown.py's parts, and of the rest"""
OUR_SETTINGS = ("eager", "compile")
"""of throughput.py, beside SB3's"""
HEADLINE_SUITES = ("classic", "mujoco")
"""in README.md; the plot is the first one's"""
EFFICIENCY = [("kfac", "CartPole-v1", 100_000), ("kfac", "Acrobot-v1", 100_000), ("kfac", "HalfCheetah-v5", 500_000)]
"""(algorithm, environment, steps) whose sample efficiency is compared with A2C's"""

POOLED_SEEDS = 3
"""at least, of both sides, where returns are pooled"""
SAME_SOLUTION = (("ddpg", "td3", "sac"), "Pendulum-v1", 20_000)
"""algorithms that end with as good as the same policy, where and after how many steps"""

PUBLISHED = {
    ("ppo", "CartPole-v1"): "CleanRL 490 ± 6; Zoo 500",
    ("ppo", "Acrobot-v1"): "CleanRL −86 ± 1; Zoo −73.5 (1M steps)",
    ("ppo", "Pendulum-v1"): "Zoo −172.2",
    ("a2c", "CartPole-v1"): "Zoo 500 (500k steps)",
    ("a2c", "Acrobot-v1"): "Zoo −83.4 (500k steps)",
    ("a2c", "Pendulum-v1"): "Zoo −163.0 (1M steps, gSDE)",
    ("a2c", "HalfCheetah-v5"): "Zoo 3041 (v3, 1M steps)",
    ("trpo", "CartPole-v1"): "Zoo 500",
    ("trpo", "Acrobot-v1"): "Zoo −83.1",
    ("trpo", "Pendulum-v1"): "Zoo −174.6 (gSDE)",
    ("a2c", "Hopper-v5"): "Zoo 733 (v3)",
    ("a2c", "Walker2d-v5"): "Zoo 582 (v3)",
    ("trpo", "HalfCheetah-v5"): "Zoo 1785 (v3)",
    ("trpo", "Hopper-v5"): "Engstrom et al. 2043, with PPO's code-level tricks 2466 (v2); Zoo 3618 (v3)",
    ("trpo", "Walker2d-v5"): "Engstrom et al. 2791, with PPO's code-level tricks 3050 (v2); Zoo 4933 (v3)",
    ("dqn", "CartPole-v1"): "Zoo 500",
    ("dqn", "Acrobot-v1"): "Zoo −76.6",
    ("ddpg", "Pendulum-v1"): "Zoo −152.1",
    ("td3", "Pendulum-v1"): "Zoo −151.9",
    ("sac", "Pendulum-v1"): "Zoo −157.0",
    ("td3", "HalfCheetah-v5"): "CleanRL 9583 ± 126 (v4, 1M steps); Zoo 9656 (v3, 1M steps)",
    ("td3", "Hopper-v5"): "CleanRL 3135 ± 360 (v4, 1M steps); Zoo 3606 (v3, 1M steps)",
    ("sac", "HalfCheetah-v5"): "CleanRL 9635 ± 1424 (v4, 1M steps); Zoo 9535 (v3, 1M steps)",
    ("sac", "Hopper-v5"): "CleanRL 2310 ± 343 (v4, 1M steps); Zoo 2326 (v3, 1M steps)",
    ("ddpg", "HalfCheetah-v5"): "CleanRL 10374 ± 157 (v4, 1M steps)",
    ("ddpg", "Hopper-v5"): "CleanRL 1577 ± 819 (v4, 1M steps)",
    ("ppo", "HalfCheetah-v5"): "CleanRL 1443 ± 46 (v4); Zoo 5819 (v3)",
    ("ppo", "Hopper-v5"): "CleanRL 2383 ± 272 (v4); Engstrom et al. 2513 (v2); Zoo 2410 (v3)",
    ("ppo", "Walker2d-v5"): "CleanRL 2288 ± 572 (v4); Engstrom et al. 3292 (v2); Zoo 3479 (v3)",
    ("ppo_atari", "ALE/Pong-v5"): "CleanRL 20.4 (10M steps, NoFrameskip-v4); Zoo 21.0 (the same)",
}
"""Figures that others give for the algorithm and environment; sources in PAGE."""

REMARKS = {
    ("classic", "reinforce"): (
        "Solves CartPole as PPO does, at a budget that is too small for A2C. It learns from whole episodes: on Acrobot "
        "half of the seeds see the goal once or never and end where they began, so that the IQM is no seed's return; "
        "A2C and PPO always learn. On Pendulum it has hardly begun, no better than A2C and far behind PPO."
    ),
    ("classic", "kfac"): (
        "Far ahead of A2C, at steps that are too few for A2C's settings, on CartPole and Pendulum, level with it on "
        "Acrobot; level with PPO but for Pendulum, where one seed got stuck and most others stay a little behind."
    ),
    ("classic", "grpo"): (
        "Ends level with PPO on CartPole and Acrobot without any critic, but takes longer. On Pendulum it has hardly "
        "begun to learn: one advantage for all 200 actions of an episode says little about any of them."
    ),
    ("mujoco", "a2c"): (
        "The seeds 6 to 10 were added after the first five alone had favoured ours on HalfCheetah and Walker2d, with "
        "intervals that did not reach 0; those of all ten do not allow for this second look. On HalfCheetah a run "
        "ends in a good local optimum or in a poor one, on either side, and five seeds count too few of each."
    ),
    ("mujoco", "kfac"): (
        "On Hopper level with PPO and far ahead of A2C; on HalfCheetah most seeds end where PPO's do, and A2C's, of "
        "which some end far higher, are ahead of both."
    ),
    ("model-based", "mbpo"): (
        "Runs forward where SAC, from the same number of steps, has hardly begun to learn; each of its steps takes "
        "many times the computing time, for the model and for more gradient steps than SAC's one."
    ),
}
"""What to say of an algorithm in a suite that its row does not; beside the figures, so without any."""

HEAD = """\
# Benchmarks

Generated by `python benchmarks/report.py{flags}` from [{results}/]({results}/): change that, not this page.
"""

PAGE = """
Both sides run with the same hyperparameters (SB3: Stable-Baselines3, and sb3-contrib for TRPO; DQN's one difference is
below), and on both the trained policy is evaluated deterministically for 10 episodes. One seed gives one number, the
mean return of those episodes.

- **ours**, **SB3**: interquartile mean (IQM) over seeds [95 % interval]. The IQM leaves out the lowest and the
  highest quarter of the seeds, rounded down: with fewer than 4 seeds it is the plain mean. So it does not show that a
  few seeds have failed: **worst seed** does, ours / SB3's. **seeds**: measured / planned, where some are missing.
- **difference**: IQM of ours − IQM of Stable-Baselines3 (SB3). Where both sides are run, all of a row is over the
  seeds that both have.
- **P(ours > SB3)**: share of pairs (a seed of ours, a seed of SB3) in which ours is better; a tie counts half.
- Intervals are percentile bootstraps, 10 000 resamples of the seeds. With few seeds they are too narrow: read those of
  3 as a spread, not as a test, and those of 5 with care. Of 2 there are none.
- With the same seed both sides are evaluated from the same 10 start states, so what compares them resamples their
  seeds together. Neighbouring seeds have 9 of them in common: where start states decide much of the return, as on
  Pendulum, the seeds of one side are alike, and its own interval is narrower than that of seeds further apart.
- **verdict**: whether the interval of the difference reaches 0, which does not show that the two sides are equal, or
  which side is better; with 3 or 4 seeds, "few seeds", that is no test, and with fewer there is none. Between equal
  sides one interval in twenty would not reach 0, and with 5 seeds more, so that a few among this many pairs would be
  no surprise.
- **difference over training**: a seed's training return is averaged over its whole run; then IQM of ours − IQM of
  SB3's, each side's seeds resampled by themselves. It says how fast a side learns and depends less on the last policy.
  The verdict does not look at it.
- DQN is Double DQN here, the script's default, and plain DQN in SB3, which has no other.
- TRPO's trust region and damping are the same on both sides. For an action of A dimensions sb3-contrib takes the KL's
  mean over them where trpo.py takes the KL of the action, so its two numbers are A times smaller ([sb3.py](sb3.py)).
- An algorithm that SB3 does not have stands beside SB3's A2C and PPO (MBPO: SAC) after the same number of steps, each
  with the settings recommended for it here; in brackets SB3's seeds. Where these settings are meant for a longer run,
  they are taken unchanged for the suite's shorter one: A2C's are, on all three tasks of classic control. But SAC beside
  MBPO, on both sides, acts at random for 1000 steps in place of 10 000.
- Speed is not compared here, because these runs shared their machine with other work: see the table on throughput.
- **published**: what others report, with their own hyperparameters and environment versions, so for orientation.
  CleanRL: mean training return ± deviation over 3 seeds, 500k steps (classic control) or 1M (MuJoCo)
  (sources: [PPO](https://docs.cleanrl.dev/rl-algorithms/ppo/), [DDPG](https://docs.cleanrl.dev/rl-algorithms/ddpg/),
  [TD3](https://docs.cleanrl.dev/rl-algorithms/td3/), [SAC](https://docs.cleanrl.dev/rl-algorithms/sac/)).
  Zoo: RL Baselines3 Zoo, one tuned run, deterministic
  evaluation ([source](https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md)). Engstrom et al. 2020:
  [arXiv 2005.12729](https://arxiv.org/abs/2005.12729).
- † The code has changed since at least one of these runs was measured, or which code ran is not known. A change
  after which one seed still gives the same episodes, bit for bit, counts as none (`run.py --confirm-changed`).
"""

SUITE = """
## {suite}

{coverage}{table}

{remarks}![Learning curves of the suite {suite}]({plot})

Training return of the episodes that ended in each fiftieth of the run: IQM over seeds, 95 % bootstrap band. Steps
are those of ended episodes, so with many environments and long episodes a curve begins a little early.

<details><summary>Commands and code of every run</summary>

{runs}

</details>
"""

START_STATES = """\
- {algos} on {env_id}: their mean over both sides is, seed by seed, {means}:
  {between} apart (standard deviation), but within a seed {within}. So it is the evaluation's start states, the same for
  all of them, that seeds differ by. The Zoo's figures are over 750 episodes.
"""

THROUGHPUT = """
## Throughput

Environment steps per second of training on the CPU, same flags and number of PyTorch threads on both sides, from
`python benchmarks/throughput.py`. The settings alternate and a ratio is taken over SB3 of the same round: above 1
is faster than SB3; median [least, greatest] over the rounds. Compilation is not counted. † Measured with older code or
other flags.

{tables}

- **over the best peer**: the faster setting over the fastest of SB3, CleanRL and SBX (JAX) in the same round, median;
  below 1 that one wins. "half" is CleanRL's DDPG as it comes, which updates its policy with every second step only: a
  quarter less arithmetic than everybody else's, so it is not ranked. SBX takes all cores for every work; the
  differences between the peers' work and ours are named in [peers.py](peers.py). — was not measured.
- **over SB3 medium**: the faster setting over SB3 after `torch.set_float32_matmul_precision("medium")`, the call that
  `--matmul-precision auto` makes here on processors where it is faster and rounds nothing (AMD, family 26); SB3 leaves
  it to its user.
- **environment alone**, **products**, **above the floor**: what the faster setting's time goes into. The environments'
  part is what they take alone with random actions, the products' what training's matrix products take at the rate that
  the machine reaches for 256 × 256.
  What is above is element-wise arithmetic, smaller products' lower rate, memory, and what PyTorch and Python take to
  call it all; and where updates come between their steps the environments are slower than alone.
- **of the floor**: the first two over the whole; 100% would be these two, one after the other, and nothing else.
"""

TRIED = """
### Tried, and not kept

What was tried on DQN, DDPG and TD3 and left out, since it gains less than the noise, or too little for what it costs a
reader. Timed by hand, at most four runs a side, at different times
([tried.csv](results/tried.csv)): compare within a row alone. DQN with one PyTorch thread, the others with two.

{table}

Without a difference above the noise, which is some 3% for DQN and more for the others: garbage collection off, glibc's
thresholds for trimming and mapping memory (training hardly faults any pages in), the critics' last layer as a product
and a sum, leaving out the fields of the replay buffer that a one-step target does not need.
"""

CUDA_THROUGHPUT = """
### On a GPU

Environment steps per second from `python benchmarks/throughput.py --device cuda`, the networks of both sides and our
replay buffer on the GPU, the environments on the CPU: `--compile`, which there records acting and updates as CUDA
graphs (DDPG, TD3, SAC) or the gradient alone (the others), over SB3 in the same run. Compilation is not counted; DDPG,
TD3 and SAC take rounded factors (TF32) in their products on both sides, `--matmul-precision high`. A measurement takes
ours a second or two. † Measured with older code or other flags. Machine: {machines}.

{table}

- **LeanRL**: what it publishes for compiled scripts with CUDA graphs on an H100 ([throughput.py](throughput.py),
  `LEANRL`: constants), on HalfCheetah-v4 and Breakout. With networks this small the processor and the environments
  bound more than the GPU does, and theirs were others: these ratios are for orientation.
- SB3 itself advises the CPU for PPO with such a network, and there both sides are faster.
- Not measured yet: {missing}.
"""

BREAKDOWN = """
### Where a step's time goes

![Parts of the time of training]({plot})

From [breakdown.py](breakdown.py), one training each, at another time than the table above: microseconds per environment
step, and the part of them that is spent in each place{changed}. Machine: {machines}.

- **environment**: the part that is spent in the environments' steps. The last two columns are the time of one step, in
  training and alone, with random actions and nothing between two steps. In training it is longer: by up to a half where
  a rollout is collected at once, and by a multiple where an update comes between two steps (DQN, DDPG, TD3, SAC). Why
  is not measured here; cold caches, and with two threads PyTorch's second one on the other core, would do it.
- **gradient**: targets, loss, backward pass and the bound on its norm. TRPO's includes the search for the step
  (compiled is only its critic's), that of PPO on pixels the optimiser.
- **the rest**: acting, advantages, minibatches of a rollout, logging, and Python between them.

A single training each: rows of the same work, and this table and the one above, differ by what the machine did beside.

{table}
"""

GROWTH = """
### With environments, width, batch size

![Steps per second and memory]({plot})

From [growth.py](growth.py), measurements a point: {rounds}{spread}{changed}. Machine: {machines}. Environments: PPO on
CartPole-v1, one PyTorch thread; every iteration takes 128 steps in each environment and then 16 gradient steps, so that
minibatches grow too. Width: SAC on HalfCheetah-v5, two threads, with two layers of that many units and minibatches of
256. Batch size: the same with layers of 256. Buffer size: the memory of SAC's full replay buffer for HalfCheetah-v5
{bytes}. SB3 keeps its observations as the float64 that they come in.
{twice}
"""

MODEL_BASED_THROUGHPUT = """
MBPO against sac.py with the same flags, {flags}: as it is, and its updates alone, without the time that the model
takes ({share} of the whole here, between the second and the third training of the model).

{table}
"""

AGGREGATE = """
### {suite}, all in all

{table}

![Profile, and returns over steps]({plot})

The {pairs} pairs of algorithm and environment that both sides have measured with at least {least} seeds in common,
each after its own number of steps. Returns are normalised per environment, 0 a random policy's and 1 the Zoo's best
among these algorithms ([aggregate.py](aggregate.py)), so that they can be pooled. A pair weighs in by its number of
seeds, here {weights}; the IQM leaves out the lowest quarter of all runs, from whichever pairs they are, and the mean
does not. In brackets and as bands 95 % intervals, 1000 resamples of the seeds within each pair, the same seeds of both
sides for the difference. Left: the share of runs whose evaluation is above τ. Right: training return.

![Returns over time]({time_plot})

The same over time, in units of SB3's median for the pair. This is no comparison of speed, for which see the table on
throughput: the runs shared their machine with other work, the two sides often on different days{compiled}. And SB3's
clock starts a second or so earlier, before its model is built.
"""

HEADLINE = """\
<!-- headline: written by benchmarks/report.py -->
{table}

IQM of the evaluation return, ours / SB3's, with the same hyperparameters, number of steps and {seeds} seeds, or as
many as a cell says (of 3, the mean). DQN's returns are of Double DQN here and of plain DQN in SB3, which has no other;
its speed is of plain DQN on both sides. Training steps per second over SB3's in the same run, eager / with `--compile`,
the compilation itself not counted, on {cpus}. {ahead}† The code has changed since. Intervals, learning curves and
commands: [benchmarks](benchmarks/README.md).{gpu}

![{suite}: profile, and returns over steps](benchmarks/plots/{suite}_all.png)
<!-- end of headline -->"""

EFFICIENT = """
## Sample efficiency

Environment steps until the IQM over seeds of the training return (the curves above) first reaches A2C's final one,
which is the mean of that curve's last tenth; × is how many times fewer steps than A2C's own number. Steps are known
to a fiftieth of the run, and with 3 seeds × is a rough figure.

{table}

ACKTR's authors claim 2 to 3 × fewer steps than A2C. K-FAC shows that here on Acrobot alone. On CartPole A2C climbs as
fast and then falls back: its final return is low and both pass it early, but within these steps only K-FAC goes on to
the maximum. On HalfCheetah A2C updates after every 64 environment steps and K-FAC after 1024, both see normalised
observations, and the seeds differ by more than the algorithms.
"""

IMITATION = """
## Imitation

Behavioural cloning (bc) and DAgger with the same number of labels from the same expert: our K-FAC's policy of seed 1
on HalfCheetah-v5, our PPO's on Hopper-v5. IQM over {seeds} seeds [95 % interval] of the mean return over 50 episodes.

{table}

![Return against the number of labels]({plot})

On HalfCheetah, where an episode goes on after a mistake, DAgger is ahead with the fewest labels, and from then on the
two cannot be told apart. On Hopper, where a fall ends the episode, cloning is ahead at every number of labels: DAgger's
come from the learner's own short episodes and show it little of how the expert goes on.

<details><summary>Commands and code of every run</summary>

{runs}

</details>
"""

SOLVING = """
## Steps to solve

MBPO against SAC on {env_id}, each script's own settings ([steps_to_solve.py](steps_to_solve.py)): environment steps
until the deterministic policy, evaluated every {every} steps from the same {episodes} start states, first reaches
{solved}. IQM over {seeds} seeds [95 % interval], and all seeds. × is how many times fewer steps MBPO took; with each
it takes {updates} gradient steps, and SAC {sac_updates}. A run that never got there counts as {steps} steps, and one
that did may fall back, which the last return shows.

{table}

![Evaluation returns against environment steps]({plot})
"""

COMPOUNDING = """
## Compounding error

Mistakes in T steps on a ledge that the expert never falls from, where every step goes wrong with probability
{error}, of policies that have learned from {labels} labels ([compounding_error.py](compounding_error.py)). Mean over
{seeds} seeds [95 % bootstrap interval], the same ones in every row, which therefore err together: cloning's means are
up to {excess} off what is expected, and where one interval misses it, others do. The exponent k of mistakes ∝ T^k is
fitted to the logarithms; the expected numbers' own is a little below 2 for cloning, whose expectation begins as
T (T + 1) / 2 and then bends, since an episode cannot have more than T mistakes.

{table}

![Mistakes against the horizon]({plot})
"""

REPRODUCE = """
## Reproduce

```
{commands}
```

Each leaves alone what `results/` already holds. {machines}To measure everything again, give each
of them, `report.py` too, `--results NEW/results`: the page is then `NEW/README.md`.
`run.py --rerun-changed` measures anew what is marked † or was measured with another version of SB3.

## Raw data

```python
import pandas as pd

runs = pd.read_csv("{results}/runs.csv")
runs.groupby(["algo", "env_id", "total_timesteps", "impl"]).eval_mean.describe()
# r: return, l: length in steps, t: seconds since the start
episodes = pd.read_csv("{results}/episodes/{example}.csv.gz")
```
"""


@dataclass
class Args:
    results: Path = RESULTS
    """folder of runs.csv, episodes/ and throughput.csv; README.md and plots/ go beside it"""
    suites: tuple[str, ...] = ()
    """only these suites, and nothing but them"""


# Tables -----------------------------------------------------------------------------------------------------


def verdict(x: np.ndarray, y: np.ndarray, other: str = "SB3") -> str:
    """Of the difference's interval: does it reach 0, and if not, which side is better."""
    low, high = interval(iqm_difference, x, y, paired=True)
    if len(x) < 3:
        return "too few seeds"
    few = ", few seeds" if len(x) < 5 else ""
    return ("interval reaches 0" if low <= 0 <= high else "ours better" if low > 0 else f"{other} better") + few


def has_changed(row: pd.Series) -> bool:
    """Whether the code of a row of runs.csv is no longer what the row was measured with.

    SB3's version is the row's own: what is installed where the page is generated does not matter.
    """
    return row["code_sha256"] != present_code(Cell(*row.name), sb3_version(row))


def dagger(rows: pd.DataFrame) -> str:
    """ " †" where the code of one of these rows of runs.csv has changed."""
    return " †" if len(rows) and rows.apply(has_changed, axis=1).any() else ""


def beside(algo: str) -> dict[str, tuple[str, str]]:
    """By label, the (implementation, algorithm) that an algorithm of ours is shown beside."""
    if against := variant_of(algo).against:
        return {against: ("ours", against)}
    if algo in MODELS:
        return {LABELS["sb3"]: ("sb3", algo)}
    return {f"SB3's {other.upper()}": ("sb3", other) for other in BESIDE.get(algo, ("a2c", "ppo"))}


def comparison(algo: str, env_id: str, steps: int, runs: pd.DataFrame, cells: list[Cell], results: Path) -> dict:
    """A row of a suite's table; `cells`: those of this algorithm, environment and number of steps."""
    against = variant_of(algo).against
    mine = runs.loc[[astuple(cell) for cell in cells if astuple(cell) in runs.index]]
    sides = ("ours", algo), ("ours", against) if against else ("sb3", algo)
    frames = [runs_of(rows, *side, env_id, steps) for rows, side in zip((mine, runs if against else mine), sides)]
    seeds = [set(frame.index.get_level_values("seed")) for frame in frames]
    if both := seeds[0] & seeds[1]:
        frames = [of_seeds(frame, [*both]) for frame in frames]
    x, y = (frame["eval_mean"].to_numpy() for frame in frames)
    courses = [training_means(*side, env_id, steps, frame, results) for side, frame in zip(sides, frames) if both]
    shown = pd.concat(frames)
    found, wanted = len(x) if against else max(len(x), len(y)), len({cell.seed for cell in cells})
    sb3 = f"{against or ''} {estimate(iqm, y)}".strip()
    if not against and algo not in MODELS:
        others = {label: runs_of(runs, *side, env_id, steps) for label, side in beside(algo).items()}
        shown = pd.concat([shown, *others.values()])
        measured = {label.removeprefix("SB3's "): z["eval_mean"].to_numpy() for label, z in others.items() if len(z)}
        sb3 = "; ".join(f"{name} {estimate(iqm, z)} ({len(z)})" for name, z in measured.items()) or "—"
    return {
        "algorithm": algo + dagger(shown),
        "environment": env_id,
        "steps": EngFormatter(sep="")(steps),
        "seeds": f"{found}" if found == wanted else f"{found}/{wanted}",
        "ours": estimate(iqm, x),
        "SB3": sb3,
        "difference": estimate(iqm_difference, x, y, paired=True) if both else "—",
        "P(ours > SB3)": estimate(probability_of_improvement, x, y, paired=True) if both else "—",
        "verdict": verdict(x, y, against or "SB3") if both else "—",
        "difference over training": estimate(iqm_difference, *courses) if both else "—",
        "worst seed": " / ".join(number(z.min(), digits_of(z.min())) for z in (x, y) if len(z)),
        "published": PUBLISHED.get((algo, env_id), "—"),
    }


def coverage(cells: list[Cell], recorded: list[Cell]) -> str:
    """What of a suite has been measured, "" where all has."""
    planned, measured = ({(cell.algo, cell.env_id, cell.total_timesteps) for cell in x} for x in (cells, recorded))
    if len(recorded) == len(cells):
        return ""
    return (
        f"{len(recorded)} of the suite's {len(cells)} runs have been made, of {len(measured)} of its {len(planned)} "
        "pairs of algorithm and environment; the others are not in the table.\n\n"
    )


def start_states(runs: pd.DataFrame) -> str:
    """How much of SAME_SOLUTION's returns is the seed's, over seeds that all of them have; "" where it is not most."""
    algos, env_id, steps = SAME_SOLUTION
    rows = runs.reset_index()
    rows = rows[rows["algo"].isin(algos) & (rows["env_id"] == env_id) & (rows["total_timesteps"] == steps)]
    returns = rows.pivot(index="seed", columns=["algo", "impl"], values="eval_mean")
    returns = returns.dropna(axis=1, thresh=len(returns) // 2 + 1).dropna()  # without a side that has hardly begun
    if len(returns) < 2 or returns.shape[1] < 2:
        return ""
    between, within = returns.mean(axis=1).std(), returns.std(axis=1).mean()
    if between < 2 * within:
        return ""
    return START_STATES.format(
        algos=", ".join(sorted({algo for algo, _ in returns})),
        env_id=env_id,
        means=", ".join(number(x, 0) for x in returns.mean(axis=1)),
        between=number(between, 1),
        within=number(within, 1),
    )


def run_table(runs: pd.DataFrame) -> str:
    """What measured each row of runs.csv."""
    return markdown(
        [
            {
                "command": f"`{row.command}`",
                "mean return": number(row.eval_mean, 2),
                "date": row.date,
                "script sha256": f"`{row.script_sha256[:10]}`",
                "versions": row.versions.replace("=", " ").replace(" +", "+"),
            }
            for row in runs.itertuples()
        ]
    )


def speed_dagger(
    measurements: pd.DataFrame, work: str, settings: tuple[str, ...] = (*OUR_SETTINGS, "sb3"), works=WORKS
) -> str:
    """ " †" where one of a work's settings was measured with other code or other flags."""
    rows = measurements[(measurements["work"] == work) & measurements["setting"].isin(settings)]
    known = work in works and all(
        row.code_sha256 == source_sha256(*code_of(works[work], row.setting)) and row.flags == works[work].flags
        for row in rows.itertuples()
    )
    return "" if known else " †"


def ratio(row: pd.Series) -> str:
    """median [least, greatest] of a row of `summary`."""
    return f"{number(row['median'], 2)} [{number(row['min'], 2)}, {number(row['max'], 2)}]"


PEER_NAMES = {"sb3": "SB3", "cleanrl": "CleanRL", "sbx": "SBX"}


def peers_ahead(measurements: pd.DataFrame) -> str:
    """A sentence on the works in which the fastest peer is faster than both settings here; "" where there are none."""
    table, ahead = summary(measurements), []
    for work in table.index.unique("work"):
        rows = table.loc[work].reindex([*OUR_SETTINGS]).dropna(subset=["over peer"])
        best = rows["over peer"].max()
        if best < 1:
            fastest = table.loc[work, "steps/s"].reindex([*PEER_NAMES]).idxmax()
            ahead.append(f"{PEER_NAMES[fastest]} on {work} (ours {number(best, 2)} of it)")
    return f"A peer is ahead, in the same rounds: {'; '.join(ahead)}." if ahead else ""


def peer_columns(settings: pd.DataFrame, best: pd.Series) -> dict[str, str]:
    """Of a work in `summary`: what the peers do in a second, and the best setting's ratio to the fastest of them."""
    speeds = {name: settings["steps/s"].get(setting, np.nan) for setting, name in PEER_NAMES.items()}
    cells = {f"{name}, steps/s": number(x, 0) if x > 0 else "—" for name, x in speeds.items()}
    if (half := settings["steps/s"].get("cleanrl half", np.nan)) > 0:
        cells["CleanRL, steps/s"] += f"; half {number(half, 0)}"
    fastest = max(speeds, key=lambda name: speeds[name] if speeds[name] > 0 else 0)
    over = f"{number(best['over peer'], 2)} ({fastest})" if best["over peer"] > 0 else "—"
    return cells | {"over the best peer": over}


def throughput_table(measurements: pd.DataFrame) -> str:
    """A row for every work: the ratios to SB3 and what bounds them, with † for what older code has measured."""
    rows, table = [], summary(measurements)
    for work in table.index.unique("work"):
        settings = table.loc[work]
        ours = {name: settings.loc[name] for name in OUR_SETTINGS if name in settings.index}
        best = max(ours.values(), key=lambda row: row["median"])
        peer = peer_columns(settings, best)
        medium = f"{number(best['over medium'], 2)}" if best["over medium"] > 0 else "—"
        parts = {"of floor": "of the floor", "environment": "environment alone", "products": "products"}
        rows.append(
            {
                "work": work,
                "rounds": int(best["rounds"]),
                **{name: peer.pop(name) for name in [*peer][:-1]},
                **{
                    f"{x} over SB3": ratio(row) + speed_dagger(measurements, work, (x, "sb3"))
                    for x, row in ours.items()
                },
                **peer,
                "over SB3 medium": medium,
                **{title: f"{best[part]:.0%}" if best[part] > 0 else "—" for part, title in parts.items()},
                "above the floor": f"{1 - best['of floor']:.0%}" if best["of floor"] > 0 else "—",
            }
        )
    return markdown(rows)


def model_based_table(measurements: pd.DataFrame) -> str:
    """Steps per second and the ratios to sac.py, with † for what older code has measured."""
    rows = []
    for (work, setting), row in summary(measurements).iterrows():
        rows.append(
            {
                "work": work,
                "setting": f"ours, {setting}" + speed_dagger(measurements, work, (setting,)),
                "rounds": int(row["rounds"]),
                "steps/s (median)": number(row["steps/s"], 0),
                **{f"ratio to sac.py, {name}": number(row[name], 2) for name in ("min", "median", "max")},
            }
        )
    return markdown(rows)


def by_machine(measurements: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of every machine, in the order that they were measured in."""
    return dict(tuple(measurements.groupby("machine", sort=False)))


def newest(measurements: pd.DataFrame) -> pd.DataFrame:
    """Of every work the rows of the machine that measured it last: the table's last ones."""
    return measurements[measurements["machine"] == measurements.groupby("work")["machine"].transform("last")]


def tables_by_machine(measurements: pd.DataFrame, table: Callable[[pd.DataFrame], str]) -> str:
    """A table for every machine that has one, below its name."""
    tables = {name: (table(rows), peers_ahead(rows)) for name, rows in by_machine(measurements).items()}
    return "\n\n".join("\n\n".join(filter(None, (f"{name}:", *rest))) for name, rest in tables.items() if rest[0])


def throughput_section(measurements: pd.DataFrame) -> str:
    """The tables of what has been measured."""
    model_based = measurements["work"].map(lambda x: x in WORKS and WORKS[x].settings == MODEL_BASED_SETTINGS)
    section = THROUGHPUT.format(tables=tables_by_machine(measurements[~model_based], throughput_table))
    for work, rows in newest(measurements[model_based]).groupby("work"):
        speed = rows.pivot(index="round", columns="setting", values="steps_per_second")
        section += MODEL_BASED_THROUGHPUT.format(
            flags=f"`{WORKS[work].flags}`",
            share=f"{1 - (speed['eager'] / speed['updates']).median():.0%}",
            table=model_based_table(rows),
        )
    return section


def tried_section(results: Path) -> str:
    """The section on tried.csv, "" without it."""
    path = results / "tried.csv"
    return TRIED.format(table=markdown(pd.read_csv(path).to_dict("records"))) if path.exists() else ""


def cuda_section(measurements: pd.DataFrame) -> str:
    """The table of what has been measured on a GPU."""
    measurements = newest(measurements)
    rows, table = [], summary(measurements)
    works = [work for work in CUDA_WORKS if work in table.index]
    for work in works:
        speed = table.loc[work, "steps/s"]
        rounds, over = table.loc[(work, "compile"), ["rounds", "median"]]
        lean = LEANRL.get(work, np.nan)
        rows.append(
            {
                "work": work + speed_dagger(measurements, work, works=CUDA_WORKS),
                "rounds": int(rounds),
                "SB3, steps/s": number(speed["sb3"], 0),
                "compile, steps/s": number(speed["compile"], 0),
                "compile over SB3": ratio(table.loc[(work, "compile")]) if rounds > 1 else number(over, 2),
                "LeanRL, steps/s": number(lean, 0) if lean > 0 else "—",
                "compile over LeanRL": number(speed["compile"] / lean, 2) if lean > 0 else "—",
            }
        )
    missing = ", ".join(work for work in CUDA_WORKS if work not in works) or "nothing"
    machines = "; ".join(measurements["machine"].unique())
    return CUDA_THROUGHPUT.format(table=markdown(rows), machines=machines, missing=missing)


def breakdown(results: Path) -> str:
    """The section on breakdown.csv, "" without it; draws its plot."""
    path = results / "breakdown.csv"
    if not path.exists():
        return ""
    parts, table = [*PARTS, "the rest"], []
    rows = pd.read_csv(path).set_index(["work", "setting"])
    rows = rows.loc[[cell for cell in breakdown_cells() if cell in rows.index]]
    for (work, setting), row in rows.iterrows():
        current = breakdown_evidence((work, setting)) == dict(row[[*EVIDENCE]])
        table.append(
            {
                "work": work,
                "setting": setting + ("" if current else " †"),
                "µs a step": number(row["whole"], 0),
                **{part: f"{row[part] / row['whole']:.0%}" if row[part] > 0 else "—" for part in parts},
                "environments, µs in training": number(row["environment"], 0),
                "µs alone": number(row["environment alone"], 0),
            }
        )
    figure, ax = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    shares = rows[parts].div(rows["whole"], axis=0)[::-1]
    shares.index = [f"{work}, {setting}" for work, setting in shares.index]
    shares.plot.barh(stacked=True, ax=ax, color=PART_COLOURS, width=0.8)
    for y, whole in enumerate(rows["whole"][::-1]):
        ax.text(1.01, y, f"{whole:,.0f} µs", va="center", fontsize=8)
    tidy(ax, "part of the time", "")
    ax.grid(visible=False)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(frameon=False, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.4, 1), fontsize=8)
    save(figure, results.parent / "plots" / "breakdown.png")
    changed = " († with older code or other flags)" if any("†" in row["setting"] for row in table) else ""
    machines = " and ".join(by_machine(rows))
    return BREAKDOWN.format(plot="plots/breakdown.png", changed=changed, machines=machines, table=markdown(table))


def measured_twice(rows: pd.DataFrame) -> str:
    """What width 256 and batch size 256, which are the same training, differ by; "" without both."""
    medians = rows[rows["size"] == 256].groupby(["axis", "setting"])["value"].median()
    ratios = [medians.get((x, "eager"), np.nan) / medians.get((x, "sb3"), np.nan) for x in ("width", "batch_size")]
    if np.isnan(ratios).any():
        return ""
    return (
        "Width 256 and batch size 256 are the same training, measured twice: eager over SB3 is "
        f"{number(ratios[0], 2)} in one and {number(ratios[1], 2)} in the other, and smaller differences mean nothing."
    )


def growth(results: Path) -> str:
    """The section on growth.csv, "" without it; draws its plot."""
    path = results / "growth.csv"
    if not path.exists():
        return ""
    rows = pd.read_csv(path)
    cells = [*zip(*(rows[column] for column in GROWTH_KEY))]
    known = [cell in growth_cells(max(rows["round"])) for cell in cells]
    rows, cells = rows[known], [*itertools.compress(cells, known)]
    changed = [*map(growth_evidence, cells)] != rows[[*EVIDENCE]].to_dict("records")
    sizes = {axis: [*works] for axis, works in AXES.items()} | {"buffer_size": [*BUFFER_SIZES]}
    sizes = {axis: ticks for axis, ticks in sizes.items() if axis in set(rows["axis"])}
    figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.4), squeeze=False, layout="constrained")
    for ax, (axis, ticks) in zip(axes.flat, sizes.items()):
        values = rows[rows["axis"] == axis].groupby(["setting", "size"])["value"].agg(["median", "min", "max"])
        values /= 1e6 if axis == "buffer_size" else 1
        for setting in [x for x in GROWING if x in values.index]:
            line = values.loc[setting]
            spread = [line["median"] - line["min"], line["max"] - line["median"]]
            ax.errorbar(line.index, line["median"], spread, marker="o", markersize=4, capsize=2, **GROWING[setting])
        ax.set_xscale("log")
        ax.set_yscale("log")
        labels = [EngFormatter(sep="")(x) if axis == "buffer_size" else str(x) for x in ticks]
        ax.set_xticks(ticks, labels, minor=False)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        for either in (ax.xaxis, ax.yaxis):
            either.set_minor_locator(NullLocator())
        unit = "MB" if axis == "buffer_size" else "environment steps/s"
        tidy(ax, axis.replace("_", " ").replace("num envs", "environments"), unit)
    save(figure, results.parent / "plots" / "growth.png")
    speed = rows[rows["axis"] != "buffer_size"][["axis", "size", "setting"]]
    largest = rows[(rows["axis"] == "buffer_size") & (rows["size"] == BUFFER_SIZES[-1])].set_index("setting")["value"]
    each = ", ".join(f"{GROWING[x]['label']} {largest[x] / BUFFER_SIZES[-1]:.0f}" for x in GROWING if x in largest)
    return GROWTH.format(
        plot="plots/growth.png",
        rounds=" to ".join(map(str, sorted({*speed.value_counts()}))),
        spread="; median, least and greatest" if speed.duplicated().any() else "",
        twice=measured_twice(rows),
        machines=" and ".join(by_machine(rows)),
        changed=" († some with older code or other flags)" if changed else "",
        bytes=f"(bytes a transition: {each})" if each else "",
    )


# Learning curves --------------------------------------------------------------------------------------------


def plot_suite(groups: list[tuple[str, str, int]], runs: pd.DataFrame, results: Path, path: Path) -> None:
    """One subplot per (algorithm, environment, steps) with the recorded learning curves."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    lines = {}
    for ax, (algo, env_id, steps) in zip(axes.flat, groups):
        x = (np.arange(BINS) + 0.5) * steps / BINS
        for label, (impl, name) in ({"ours": ("ours", algo)} | beside(algo)).items():
            curves = curves_of(impl, name, env_id, steps, runs, results)
            if not curves.size:
                continue
            begun = ~np.isnan(curves).any(1)  # an episode has ended in every seed's run
            low, high = interval(iqm, curves[begun])
            style = STYLES.get(label, OTHERS)
            (lines[label],) = ax.plot(x[begun], iqm(curves[begun]), linewidth=1.8, **style)
            ax.fill_between(x[begun], low, high, color=style["color"], alpha=0.2, linewidth=0)
        ax.set_title(f"{algo}  {env_id}", fontsize=11)
        ax.set_xlim(0, steps)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(plt.MaxNLocator(5))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    figure.supxlabel("environment steps", fontsize=11)
    figure.supylabel("training return", fontsize=11)
    labels = [x for x in STYLES if x in lines] + [x for x in lines if x not in STYLES]
    figure.legend([lines[x] for x in labels], labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)


# Both sides all in all --------------------------------------------------------------------------------------


def pooled(statistic: Callable[..., np.ndarray], *sides: Strata) -> np.ndarray:
    """A side's pooled statistic, or that of the first minus that of the second, and its interval (3,)."""

    def difference(*draws: np.ndarray) -> np.ndarray:
        first, *second = (statistic(x, axis=-1) for x in draws)
        return first - second[0] if second else first

    return stratified(difference, *sides)


def aggregate_section(suite: str, groups: list[tuple[str, str, int]], runs: pd.DataFrame, results: Path) -> str:
    """What both sides have measured of a suite, pooled; "" for fewer than two pairs; draws its plot."""
    pairs = paired([group for group in groups if group[1] in REFERENCES], runs)
    pairs = [(key, seeds) for key, seeds in pairs if len(seeds) >= POOLED_SEEDS]
    if len(pairs) < 2:
        return ""
    strata = measured_on_both_sides([key for key, _ in pairs], runs, results)
    plots = [results.parent / "plots" / f"{suite}_{name}.png" for name in ("all", "time")]
    plot_aggregate(strata, *plots)
    used = {x: pd.concat([of_seeds(runs_of(runs, x, *key), seeds) for key, seeds in pairs]) for x in LABELS}
    evaluations = [strata[x]["evaluation"] for x in LABELS]
    names = [label + dagger(used[x]) for x, label in LABELS.items()] + ["difference"]
    counts, rows = [*map(len, used.values()), ""], []
    for name, runs_used, sides in zip(names, counts, [evaluations[:1], evaluations[1:], evaluations]):
        row = {"": name, "runs": runs_used}
        for title, statistic in (("IQM of the normalised return", iqm), ("mean", np.mean)):
            row[title] = "{} [{}, {}]".format(*(number(x, 3) for x in pooled(statistic, *sides)))
        rows.append(row)
    fewest, most = (extreme(len(seeds) for _, seeds in pairs) for extreme in (min, max))
    compiled = used["ours"]["command"].str.contains("--compile").sum()
    return AGGREGATE.format(
        suite=suite,
        pairs=len(pairs),
        least=POOLED_SEEDS,
        weights=fewest if fewest == most else f"{fewest} to {most}",
        compiled=f", and {compiled} of our {len(used['ours'])} were compiled" if compiled else "",
        table=markdown(rows),
        plot=f"plots/{plots[0].name}",
        time_plot=f"plots/{plots[1].name}",
    )


def cuda_speeds(cuda: pd.DataFrame, cpu: pd.DataFrame) -> str:
    """A sentence on the GPU's ratios to SB3, of works that a GPU makes faster here; "" without any."""
    cuda = newest(cuda)
    table = summary(cuda).xs("compile", level="setting")
    on_cpu = summary(cpu)["steps/s"].unstack("setting").reindex(columns=OUR_SETTINGS).max(axis=1)
    works = [work for work in table.index if table.loc[work, "steps/s"] > on_cpu.get(work, 0)]
    if not works:
        return ""
    over = [f"{x} {number(table.loc[x, 'median'], 1)}" + speed_dagger(cuda, x, works=CUDA_WORKS) for x in works]
    rounds = min(int(table.loc[x, "rounds"]) for x in works)
    return (
        f" On [a GPU](benchmarks/README.md#on-a-gpu) with `--compile`, over SB3 there: {', '.join(over)} × "
        f"({'measured once' if rounds == 1 else f'{rounds} rounds'})."
    )


def headline(runs: pd.DataFrame, measurements: pd.DataFrame, cuda: pd.DataFrame | None = None) -> str:
    """README.md's table and figure; `measurements` of speed on the CPU, `cuda` on a GPU."""
    groups = [
        (cell.algo, cell.env_id, cell.total_timesteps)
        for suite in HEADLINE_SUITES
        for cell in cells_of(suite)
        if cell.algo in MODELS
    ]
    pairs = [(key, seeds) for key, seeds in paired(list(dict.fromkeys(groups)), runs) if len(seeds) >= 3]
    env_ids = list(dict.fromkeys(env_id for (_, env_id, _), _ in pairs))
    usual = max(len(seeds) for _, seeds in pairs)
    measurements = newest(measurements)
    speeds = summary(measurements)["median"].unstack("setting").reindex(columns=OUR_SETTINGS)
    rows = {}
    for (algo, env_id, steps), seeds in pairs:
        row = rows.setdefault(algo, {"": f"[{algo}](algos/{algo}.py)"} | dict.fromkeys(env_ids, "–"))
        used = [of_seeds(runs_of(runs, impl, algo, env_id, steps), seeds) for impl in LABELS]
        x, y = (iqm(side["eval_mean"].to_numpy()) for side in used)
        few = f" ({len(seeds)} seeds)" if len(seeds) < usual else ""
        row[env_id] = " / ".join(number(value, min(1, digits_of(x, y))) for value in (x, y)) + few
        row[env_id] += dagger(pd.concat(used))
        works = [work for work in speeds.index if work.startswith(f"{algo} ")]
        speed = "; ".join(
            f"{' / '.join(number(x, 1) for x in speeds.loc[work].dropna())} × on {work.removeprefix(algo).strip()}"
            + speed_dagger(measurements, work)
            for work in works
        )
        row["training steps per second"] = speed or "–"
    shown = measurements["work"].str.split().str[0].isin(list(rows))
    machines = measurements.loc[shown, "machine"].nunique()
    return HEADLINE.format(
        table=markdown(list(rows.values())),
        suite=HEADLINE_SUITES[0],
        seeds=usual,
        ahead=f"{ahead}\n" if (ahead := peers_ahead(measurements)) else "",
        cpus="a CPU" if machines == 1 else f"one of {machines} CPUs",
        gpu="" if cuda is None else cuda_speeds(cuda, measurements),
    )


def put_into(readme: Path, text: str) -> None:
    """Replaces what stands between the marks of HEADLINE, where there are such."""
    first, last = HEADLINE.splitlines()[0], HEADLINE.splitlines()[-1]
    page = readme.read_text() if readme.exists() else ""
    if first in page:
        before, after = page.split(first)[0], page.split(last)[1]
        readme.write_text(before + text + after)


# Sample efficiency ------------------------------------------------------------------------------------------


def steps_to_reach(curve: np.ndarray, target: float, steps: int) -> float:
    """Environment steps at the end of the first bin of a learning curve (BINS,) that reaches `target`; else NaN."""
    reached = np.flatnonzero(curve >= target)
    return (reached[0] + 1) * steps / BINS if len(reached) else np.nan


def efficiency_rows(runs: pd.DataFrame, results: Path) -> list[dict]:
    """For each of EFFICIENCY and each side's A2C: steps to A2C's final return, A2C's and the algorithm's."""
    rows = []
    for algo, env_id, steps in EFFICIENCY:
        curves = curves_of("ours", algo, env_id, steps, runs, results)
        used = runs_of(runs, "ours", algo, env_id, steps)
        for impl, label in (("ours", "our A2C"), ("sb3", "SB3's A2C")):
            others = curves_of(impl, "a2c", env_id, steps, runs, results)
            if not curves.size or not others.size:
                continue
            curve, other = iqm(curves), iqm(others)
            target = other[-BINS // 10 :].mean()
            ours, theirs = steps_to_reach(curve, target, steps), steps_to_reach(other, target, steps)
            thousands = EngFormatter(sep="")
            rows.append(
                {
                    "algorithm": algo + dagger(pd.concat([used, runs_of(runs, impl, "a2c", env_id, steps)])),
                    "environment": env_id,
                    "against": label,
                    "seeds": f"{curves.shape[1]}, {others.shape[1]}",
                    "A2C's final return": number(target, digits_of(target)),
                    "A2C's steps": thousands(theirs),
                    "its steps": f"not in {thousands(steps)}" if np.isnan(ours) else thousands(ours),
                    "×": "—" if np.isnan(ours) else number(theirs / ours, 1),
                }
            )
    return rows


def solving(results: Path) -> str:
    """The section on steps_to_solve.csv, of the seeds that are complete, "" for none; draws its plot."""
    path, evaluations, longest = results / "steps_to_solve.csv", sum(SIDES.values()) // EVERY, max(SIDES.values())
    measured = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["seed"])
    measured = measured.groupby("seed").filter(lambda x: len(x) == evaluations)
    if measured.empty:
        return ""
    rows, needed = [], {}
    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for side, style in SOLVERS.items():
        runs = measured.set_index(["impl", "algo", "step", "seed"]).sort_index().loc[side]
        changed = "" if (runs["code_sha256"] == source_sha256(*side)).all() else " †"
        returns = runs["eval_mean"].unstack("seed")
        steps = returns.index.to_numpy()
        solved = (returns >= SOLVED).to_numpy()
        needed[side] = np.where(solved.any(0), steps[solved.argmax(0)], longest)
        each = ", ".join(str(n) if ever else f"> {steps[-1]}" for n, ever in zip(needed[side], solved.any(0)))
        rows.append(
            {
                "": style["label"] + changed,
                f"steps to {number(SOLVED, 0)}": estimate(iqm, needed[side]),
                "each seed": each,
                "×": "1" if not rows else estimate(iqm_ratio, needed[side], needed["ours", "mbpo"]),
                "last return": f"{estimate(iqm, returns.to_numpy()[-1])} (step {steps[-1]})",
            }
        )
        ax.plot(steps, iqm(returns.to_numpy()), linewidth=1.8, **style)
        ax.fill_between(steps, *interval(iqm, returns.to_numpy()), color=style["color"], alpha=0.2, linewidth=0)
    ax.axhline(SOLVED, color="#555555", linestyle=":", label="solved")
    ax.set_xlim(0, longest)
    tidy(ax, "environment steps", "return of the deterministic policy")
    save(figure, results.parent / "plots" / "steps_to_solve.png")
    return SOLVING.format(
        env_id=ENV_ID,
        every=EVERY,
        episodes=EPISODES,
        solved=number(SOLVED, 0),
        seeds=measured["seed"].nunique(),
        steps=longest,
        updates=parse_args("mbpo", ["--env-id", ENV_ID]).gradient_steps,
        sac_updates=parse_args("sac", ["--env-id", ENV_ID]).gradient_steps,
        table=markdown(rows),
        plot="plots/steps_to_solve.png",
    )


# Imitation --------------------------------------------------------------------------------------------------


def labels_rows(env_id: str, budgets: list[int], runs: pd.DataFrame) -> list[dict]:
    """bc, DAgger and their difference for every number of labels."""
    rows = []
    for labels in budgets:
        measured = {algo: runs_of(runs, "ours", algo, env_id, labels) for algo in IMITATORS}
        x, y = (runs["eval_mean"].to_numpy() for runs in measured.values())
        row = {"environment": env_id, "labels": labels}
        row |= {algo: estimate(iqm, runs["eval_mean"].to_numpy()) + dagger(runs) for algo, runs in measured.items()}
        row["dagger − bc"] = estimate(iqm_difference, y, x, paired=True)
        rows.append(row | {"P(dagger > bc)": estimate(probability_of_improvement, y, x, paired=True)})
    return rows


def draw(ax: plt.Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, **style) -> None:
    """Points with a line and their intervals."""
    ax.errorbar(x, y, np.maximum(0, (y - low, high - y)), marker="o", markersize=4, capsize=3, linewidth=1.8, **style)


def imitation(cells: list[Cell], runs: pd.DataFrame, results: Path) -> str:
    """The section on return against the number of labels, where every seed is measured; draws its plot."""
    recorded = [cell for cell in cells if astuple(cell) in runs.index]
    missing = {(cell.env_id, cell.total_timesteps) for cell in set(cells) - set(recorded)}
    measured = {(cell.env_id, cell.total_timesteps) for cell in cells} - missing
    rows, columns = [], [env_id for env_id in EXPERTS if env_id in dict(measured)]
    if not columns:
        return ""
    experts = pd.read_csv(RESULTS / "experts" / "experts.csv", index_col="env_id")  # what the runs start from
    figure, axes = plt.subplots(1, len(columns), figsize=(5 * len(columns), 3.8), squeeze=False, layout="constrained")
    for env_id, ax in zip(columns, axes.flat):
        budgets = sorted(labels for env, labels in measured if env == env_id)
        for (algo, style), aside in zip(IMITATORS.items(), (0.98, 1.02)):  # so that no bar hides another
            returns = np.stack([returns_of(runs, "ours", algo, env_id, labels) for labels in budgets])
            draw(ax, aside * np.array(budgets), iqm(returns), *interval(iqm, returns), **style)
        expert = experts.loc[env_id, "eval_mean"]
        ax.axhline(expert, color="#555555", linestyle=":", label="the expert")
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, map(str, budgets))
        ax.set_title(env_id, fontsize=11)
        ax.minorticks_off()
        tidy(ax, "labels", "return")
        ax.get_legend().remove()
        column = f"expert ({experts.loc[env_id, 'eval_episodes']} episodes)"
        rows += [row | {column: number(expert, 0)} for row in labels_rows(env_id, budgets, runs)]
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save(figure, results.parent / "plots" / "labels.png")
    return IMITATION.format(
        seeds=len({cell.seed for cell in cells}),
        table=markdown(rows),
        plot="plots/labels.png",
        runs=run_table(runs.loc[[astuple(cell) for cell in recorded]].sort_index(level=KEY)),
    )


def exponent(mistakes: np.ndarray, axis: int = -1) -> np.ndarray:
    """k of mistakes ∝ T^k, by least squares on the logarithms of their means (horizons, …) along `axis`."""
    x = np.log(HORIZONS) - np.log(HORIZONS).mean()
    return np.tensordot(x / (x**2).sum(), np.log(mistakes.mean(axis)), 1)


def expected_mistakes() -> dict[str, np.ndarray]:
    """What the docstring of compounding_error.py expects (horizons,)."""
    T = np.array(HORIZONS)
    return {"bc": T - (1 - ERROR) * (1 - (1 - ERROR) ** T) / ERROR, "dagger": ERROR * T}


def compounding(results: Path) -> str:
    """The section on compounding_error.csv, of the seeds that are complete, "" for none; draws its plot."""
    path = results / "compounding_error.csv"
    measured = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["seed"])
    measured = measured.groupby("seed").filter(lambda x: len(x) == len(IMITATORS) * len(HORIZONS))
    if measured.empty:
        return ""
    measured = measured.set_index(["algo", "horizon", "seed"]).sort_index()
    rows = [{"T": horizon} for horizon in HORIZONS] + [{"T": "exponent"}]
    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for algo, style in IMITATORS.items():
        mistakes = measured.loc[algo]["mistakes"].unstack("seed").to_numpy()
        changed = "" if (measured.loc[algo]["code_sha256"] == source_sha256("ours", algo)).all() else " †"
        expected = expected_mistakes()[algo]
        for row, x, y in zip(rows, mistakes, expected):
            row |= {algo + changed: estimate(np.mean, x), f"{algo}, expected": number(y, digits_of(y))}
        rows[-1] |= {algo + changed: estimate(exponent, mistakes)}
        rows[-1] |= {f"{algo}, expected": number(exponent(expected[:, None]), 2)}
        style = style | {"linestyle": ""}
        draw(ax, np.array(HORIZONS), mistakes.mean(-1), *interval(np.mean, mistakes), **style)
        ax.plot(HORIZONS, expected, color=style["color"], linewidth=1, label=f"{style['label']}, expected")
    ax.set(xscale="log", yscale="log", xticks=HORIZONS, xticklabels=HORIZONS)
    ax.minorticks_off()
    tidy(ax, "horizon T", "mistakes in an episode")
    save(figure, results.parent / "plots" / "compounding_error.png")
    means = measured.loc["bc"]["mistakes"].groupby("horizon").mean()
    return COMPOUNDING.format(
        excess=f"{np.abs(means / expected_mistakes()['bc'] - 1).max():.0%}",
        error=ERROR,
        labels=LEDGE_LABELS,
        seeds=mistakes.shape[1],
        table=markdown(rows),
        plot="plots/compounding_error.png",
    )


# The page ---------------------------------------------------------------------------------------------------


ELSE = ["throughput.py", "throughput.py --device cuda  # on a GPU", "breakdown.py", "growth.py"]
ELSE += [f"{name}.py --workers 2" for name in ("compounding_error", "steps_to_solve", "deep_sea", "random_walk")]
ELSE += ["trajectories.py", "planning_errors.py --workers 2", "planning_mujoco.py"]
"""commands that measure what no suite does"""


def check_suites(names: tuple[str, ...]) -> None:
    """Refuses a suite that there is not."""
    if unknown := [name for name in names if name not in SUITES]:
        sys.exit(f"--suites {unknown[0]}: no such suite; benchmarks/suites.py has {', '.join(SUITES)}")


def check_page(path: Path, head: str, results: Path) -> None:
    """Refuses to write over a README.md that is not an older page of these results."""
    source = head.split(" from ")[-1]
    if path.exists() and not (path.read_text().startswith("# Benchmarks\n") and source in path.read_text()):
        sys.exit(
            f"--results {results}: the page would be {path}, which is another text; choose a folder within a new one, "
            f"such as {results.name}/results"
        )


def variants(suite: str) -> str:
    """What a suite's variants are."""
    lines = []
    for name in dict.fromkeys(cell.algo for cell in cells_of(suite) if cell.algo in VARIANTS):
        script, flags, against = VARIANTS[name]
        beside_it = f", against {against}, which stands in SB3's place" if against else ""
        lines.append(f"- {name}: `{' '.join(['algos/' + script + '.py', *flags.split()])}`{beside_it}.\n")
    return "".join(lines)


def suite_section(suite: str, cells: list[Cell], recorded: list[Cell], runs: pd.DataFrame, results: Path) -> str:
    """Table, learning curves, commands, and all in all; draws the plots."""
    groups = {}
    for cell in cells:
        groups.setdefault((cell.algo, cell.env_id, cell.total_timesteps), []).append(cell)
    groups = {key: group for key, group in groups.items() if set(group) & set(recorded)}
    plot = results.parent / "plots" / f"{suite}.png"
    plot_suite(list(groups), runs, results, plot)
    section = SUITE.format(
        suite=suite,
        coverage=coverage(cells, recorded),
        table=markdown([comparison(*key, runs, group, results) for key, group in groups.items()]),
        remarks="".join(f"- {algo}: {text}\n" for (of, algo), text in REMARKS.items() if of == suite)
        + variants(suite)
        + (start_states(runs) if suite == "classic" else "")
        + "\n",
        plot=f"plots/{plot.name}",
        runs=run_table(runs.loc[[astuple(cell) for cell in recorded]].sort_index(level=KEY)),
    )
    return section + aggregate_section(suite, list(groups), runs, results)


def speed_sections(results: Path, runs: pd.DataFrame, readme: Path | None) -> str:
    """What throughput.py and its neighbours have measured, "" without throughput.csv; the headline goes to `readme`."""
    order = {name: i for i, name in enumerate(WORKS)}
    speeds, cuda = (
        pd.read_csv(path, keep_default_na=False).sort_values("work", key=lambda x: x.map(order), kind="stable")
        if (path := results / name).exists()
        else None
        for name in ("throughput.csv", "throughput_cuda.csv")
    )
    if speeds is None:
        return ""
    if readme:
        put_into(readme, headline(runs, speeds, cuda))
    section = throughput_section(speeds) + ("" if cuda is None else cuda_section(cuda))
    return section + breakdown(results) + growth(results) + tried_section(results)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_suites(args.suites)
    runs = read_runs(args.results)
    if runs.empty:
        sys.exit(f"{args.results / 'runs.csv'} has no runs yet; python benchmarks/run.py classic measures some")
    ours = args.results.resolve().parts[-2:] == RESULTS.parts[-2:]  # the repository's own page
    if ours and args.suites:
        sys.exit(f"--suites would leave the rest out of {args.results.parent / 'README.md'}; give it other --results")
    flags = "" if ours else f" --results {args.results}" + (f" --suites {' '.join(args.suites)}" if args.suites else "")
    path, head = args.results.parent / "README.md", HEAD.format(flags=flags, results=args.results.name)
    check_page(path, head, args.results)
    page, suites = head + PAGE, []
    for suite in args.suites or SUITES:
        cells = cells_of(suite)
        recorded = [cell for cell in cells if astuple(cell) in runs.index]
        if not recorded:
            continue
        suites.append(suite)
        if suite == "imitation":  # its own table and plot
            page += imitation(cells, runs, args.results)
        else:
            page += suite_section(suite, cells, recorded, runs, args.results)
    if not args.suites:
        rows = efficiency_rows(runs, args.results)
        page += EFFICIENT.format(table=markdown(rows)) if rows else ""
        page += deep_sea.section(args.results) + random_walk.section(args.results) + trajectories.section(args.results)
        page += planning_errors.section(args.results) + planning_mujoco.section(args.results)
        page += solving(args.results) + compounding(args.results)
        page += speed_sections(args.results, runs, args.results.parent.parent / "README.md" if ours else None)
    where = "" if ours else f" --results {args.results}"
    commands = [f"run.py {suite} --workers 2{where}" for suite in suites] + (ELSE if ours else [])
    page += REPRODUCE.format(
        commands="\n".join(f"python benchmarks/{x}" for x in [*commands, f"report.py{flags}"]),
        machines="`throughput.py` keeps what other machines have measured and adds its own. " if ours else "",
        results="benchmarks/results" if ours else args.results,
        example=Cell(*runs.index[0]).name,
    )
    if not ours:  # links to scripts
        page = re.sub(r"\]\((\w+\.py)\)", rf"]({os.path.relpath(ROOT / 'benchmarks', path.parent)}/\1)", page)
    path.write_text(page)
    print(f"wrote {path} and {len(suites)} plots")


if __name__ == "__main__":
    main()
