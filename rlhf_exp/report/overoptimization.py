"""What the runs of a study tell about over-optimization: proxy rises, gold rises, peaks and falls.

Of one run: start, final and peak gold, the gap between the last two, gold at equal KL. Of an arm:
the same over its seeds, and the fits of Gao et al. 2022 (arXiv 2210.10760).

What a careful reader should know. Peaks are picked on other prompts than those that measure them,
so that noise alone makes no gap; the gap of a run may then be negative. Gold is the gold model's
opinion of sampled completions, not a person's. The KL is the mean log ratio of sampled
completions, itself an estimate; that of best-of-n is nominal, an upper bound, so at equal KL
best-of-n looks worse than it is. Its rows are expected values, which win more often than single
completions do: no win rates are given against them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_exp.report.records import Record
from rlhf_exp.report.statistics import RESAMPLES, Estimate, Scope

Measure = str | tuple[Literal["kl"], float]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How gold and proxy went in one run; means over its prompts."""

    start: float
    final: float
    peak: float  # gold at the step that the other half of the prompts picks
    gap: float  # peak - final
    share: float | None  # of the gain at the peak that was lost again; None if there was no gain
    peak_step: int  # where gold is highest on all prompts
    peak_kl: float  # nats, there
    kl: float  # nats, at the end
    proxy_change: float  # final - start
    gold_change: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A measure over the seeds of an arm."""

    mean: float
    low: float | None
    high: float | None
    iqm: Estimate
    seeds: int
    prompts: int | None  # None for what is measured of a run as a whole
    scope: Scope


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Gold over d = sqrt(KL) of an arm's runs: R(d) = d (alpha - beta d) for best-of-n, and
    d (alpha - beta ln d) for training (Gao et al. 2022, equations 1 and 2), R being gold - gold at
    the start.
    """

    form: Literal["best-of-n", "training"]
    alpha: Estimate
    beta: Estimate
    r2: float | None  # about the mean; negative where a constant would fit better
    peak: float | None  # the d at which R is highest, if beta > 0
    reached: float  # the largest d of the data; a peak beyond it is extrapolated
    points: int
    runs: int

    def __call__(self, d: np.ndarray) -> np.ndarray:
        """R at d > 0 (square root of nats)."""
        raise NotImplementedError


def arms(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each arm, by its label, in order of first appearance; by seed within."""
    raise NotImplementedError


def course(record: Record) -> Course:
    """See Course. ValueError for a run that was evaluated on one prompt: halves need two."""
    raise NotImplementedError


def at_kl(record: Record, kl: float, name: str = "gold") -> np.ndarray | None:
    """A column [P] where the run first comes to `kl` nats: along its evaluations in order, linear
    between the two around the first crossing of the mean k1 (best-of-n: its nominal KL over n).
    None where it never gets there, or begins above: nothing is extrapolated.

    The line is what a policy is worth that asks either of the two by a coin; its KL is `kl` or
    less, as KL is convex.
    """
    raise NotImplementedError


def measured(record: Record, measure: Measure) -> np.ndarray | None:
    """A measure of a run by prompt [P]: "final" (gold), "peak", "gap", "gain" (final - start),
    ("kl", nats) for gold at equal KL, or the last evaluation's column of that name (such as proxy,
    length, win). None if the run has none.
    """
    raise NotImplementedError


def summaries(
    records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Summary]:
    """Of the runs of one arm: start, final, peak, gap, gain, proxy_gain, peak_step, peak_kl, kl,
    every column of the last evaluation but gold, and those of its metrics that only a whole
    evaluation has (text/distinct_1, ...); of those that all the runs have.
    """
    raise NotImplementedError


def fit(records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> Fit | None:
    """Least squares in alpha and beta over all evaluations with KL > 0 of one arm's runs. None
    with fewer than 3 such points at different KLs, or where a run does not begin at KL 0.

    The points of a run depend on each other, so intervals come from drawing whole runs anew; none
    for one run. The measured KL has an error of its own, which pulls alpha towards 0.
    """
    raise NotImplementedError


def shared_seeds(records: Sequence[Record]) -> list[str]:
    """The settings named seed that stand still while the runs' seeds differ, such as
    preferences.seed: no interval tells what other values of theirs would do.
    """
    raise NotImplementedError
