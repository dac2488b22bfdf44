"""Statistics of few runs on many prompts: point estimates, intervals, differences of two arms.

Every function is pure, takes arrays, and says where its formula comes from. What an interval
covers is told by its `scope`:

- "seeds and prompts": other seeds and other held-out prompts of the same distribution. Seeds vary
  what the runs' seeds vary; what all runs share (start policy, preference pairs, reward models
  whose own seed stands still) is held fixed.
- "prompts": other prompts for these very policies; nothing is known about other seeds.

Intervals are at 95 %, each by itself: of many differences that are none, one in twenty is told
apart. Left out: corrections for that, models with random effects, anything Bayesian.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
MOST_SEEDS = 10_000  # nobody trains more
FEWEST = 5  # below, resamples of so few values have no tails to take a quantile from
Scope = Literal["seeds and prompts", "seeds", "prompts"]
Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; low and high are None where there can be none."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def told(self) -> str:
        """0.12 [0.03, 0.21]"""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one arm has more than another."""

    mean: float
    low: float | None
    high: float | None
    seeds: int  # per stratum, in the one that has fewest
    strata: int  # settings that both arms have, over which the mean goes
    prompts: int
    scope: Scope
    paired: bool  # by seed and prompt
    improvement: Estimate | None  # P(a run of the one is above a run of the other); None for 1 seed
    win_rate: Estimate | None  # share of pairs (seed, prompt) in which the one is above; ties half
    more_seeds: int | None  # that would settle it, were the difference what it seems to be

    @property
    def verdict(self) -> Literal["higher", "lower", "open"]:
        """ "higher" and "lower" only where the interval excludes 0."""
        raise NotImplementedError

    @property
    def told(self) -> str:
        """+0.02 [-0.05, 0.09] over 5 seeds: open; about 14 more seeds would settle it if the
        difference is real
        """
        raise NotImplementedError


def iqm(values: np.ndarray) -> float:
    """Interquartile mean of all values: the mean of the middle half (Agarwal et al. 2021, arXiv
    2108.13264, section 4.3), as scipy.stats.trim_mean cuts it: a quarter of the values, rounded
    down, from either end.
    """
    raise NotImplementedError


def mean_of_means(strata: Sequence[np.ndarray]) -> np.ndarray:
    """A statistic for `stratified`: the mean over the strata of their means, over the last axis."""
    raise NotImplementedError


def iqm_of_all(strata: Sequence[np.ndarray]) -> np.ndarray:
    """A statistic for `stratified`: the interquartile mean of the runs of all strata together."""
    raise NotImplementedError


def stratified(
    strata: Sequence[np.ndarray],
    statistic: Statistic = mean_of_means,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the scores of runs, an array [S] for each condition, with the interval of the
    stratified bootstrap: runs are drawn anew within each condition (Agarwal et al. 2021, section
    4.1); see `interval` for its width. No interval where a condition has one run.
    """
    raise NotImplementedError


def crossed(
    tables: Sequence[np.ndarray],
    prompts: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap means [T, B] of tables [S, P] in which seeds and prompts are crossed: both are
    drawn anew, independently of each other (the pigeonhole bootstrap: Owen 2007, Annals of Applied
    Statistics 1(2)). Seeds are drawn for each table; tables with the same entry of `prompts` (all,
    if None) share the prompts that are drawn.
    """
    raise NotImplementedError


def crossed_mean(table: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of a table [S, P] with the interval of `crossed`; for one seed, over prompts only."""
    raise NotImplementedError


def difference(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    paired: bool = True,
    prompts: Sequence[Hashable] | None = None,
    wins: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """`first` minus `second`: for each stratum a table [S, P] of either arm, the mean over strata.

    Paired, the tables of a stratum have the same seeds and prompts in the same order. Unpaired,
    seeds are drawn in each arm by itself. `prompts` says which tables share prompts, one entry per
    stratum, or if unpaired one per table, those of `first` before those of `second`. Without
    `wins` the win rate is left out.
    """
    raise NotImplementedError


def improvement(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Probability that a run of the one arm scores above a run of the other: the mean over strata
    of the Mann-Whitney share P(X > Y) + P(X = Y) / 2, from scores of runs [S] per stratum, with
    the interval of the stratified bootstrap (Agarwal et al. 2021, section 4.3).
    """
    raise NotImplementedError


def seeds_needed(differences: np.ndarray) -> int | None:
    """Seeds in all at which the interval of the mean of paired differences [S] would exclude 0, if
    mean and standard deviation stay as they are: the smallest n with t(.975, n - 1) sd / sqrt(n) <
    |mean|. None if there is no such n up to MOST_SEEDS, or fewer than 2 seeds to tell sd from.

    That many have an even chance of settling it; for four chances in five plan for twice as many.
    """
    raise NotImplementedError
