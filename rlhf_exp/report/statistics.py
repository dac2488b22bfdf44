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

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache, lru_cache

import numpy as np

from rlhf_exp.report.estimates import Difference, Estimate, Scope

LEVEL = 0.95
RESAMPLES = 10_000
MOST_SEEDS = 10_000  # nobody trains more
FEWEST = 5  # below, resamples of so few values have no tails to take a quantile from
Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]


# -------------------------------------------------------------------------- one arm, its intervals


def iqm(values: np.ndarray) -> float:
    """Interquartile mean of all values: the mean of the middle half (Agarwal et al. 2021, arXiv
    2108.13264, section 4.3), as scipy.stats.trim_mean cuts it: a quarter of the values, rounded
    down, from either end.
    """
    return float(_middle(np.ravel(values)))


def _middle(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def mean_of_means(strata: Sequence[np.ndarray]) -> np.ndarray:
    """A statistic for `stratified`: the mean over the strata of their means, over the last axis."""
    return np.mean([values.mean(-1) for values in strata], axis=0)


def iqm_of_all(strata: Sequence[np.ndarray]) -> np.ndarray:
    """A statistic for `stratified`: the interquartile mean of the runs of all strata together."""
    return _middle(np.concatenate(list(strata), -1))


def interval(
    value: float, resampled: np.ndarray, count: int
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of an estimate with bootstrap values [B] over samples of `count`, the
    smallest one if there are several, which errs to the wide side. None for one.

    Plain percentiles of small samples are too narrow, by sqrt((n - 1) / n) and by the normal's
    quantile in place of Student's. So the expanded percentile interval is taken: the quantiles at
    Phi(-sqrt(n / (n - 1)) t(.975, n - 1)) and its mirror (Hesterberg 2015, The American
    Statistician 69(4), section 5.3). No quantile leaves the range of the resamples, though, and
    the range of n values has the mean outside in a share 2^(1 - n) of all cases: below 5, the same
    factors widen the standard error of the bootstrap (the t interval of the same paper).

    Of normal scores, intervals so made cover 95 % with 2 to 4 values, 92 % with 5, 94 % with 8
    (plain percentiles: 49, 75, 81, 83, 89 %); of very skewed ones (log-normal) 80 to 85 %.
    """
    if count < 2:
        return None, None
    factor = _factor(count)
    if count < FEWEST:
        half = factor * float(resampled.std())
        return value - half, value + half
    from scipy.special import ndtr

    tail = float(ndtr(-factor))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


@cache
def _factor(count: int) -> float:
    """Standard errors of the bootstrap in half an interval."""
    from scipy.special import stdtrit

    return math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, (1 + LEVEL) / 2))


def stratified(
    strata: Sequence[np.ndarray],
    statistic: Statistic = mean_of_means,
    runs: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the scores of runs, an array [S] for each condition, with the interval of the
    stratified bootstrap: runs are drawn anew within each condition (Agarwal et al. 2021, section
    4.1); see `interval` for its width. No interval where a condition has one run. Conditions with
    the same entry of `runs` are drawn together.
    """
    drawn = []
    for scores, number in zip(strata, _numbered(runs or range(len(strata))), strict=True):
        rng = np.random.default_rng((seed, number))
        drawn.append(scores[rng.integers(0, len(scores), (resamples, len(scores)))])
    value = float(statistic(strata))
    return estimate(value, statistic(drawn), min(map(len, strata)))


def crossed(
    tables: Sequence[np.ndarray],
    prompts: Sequence[Hashable] | None = None,
    seeds: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap means [T, B, ...] of tables [S, P, ...] in which seeds and prompts are crossed:
    both are drawn anew, independently of each other (the pigeonhole bootstrap: Owen 2007, Annals
    of Applied Statistics 1(2), which errs to the wide side). Tables with the same entry of
    `prompts` (all, if None) share the prompts that are drawn, and those with the same entry of
    `seeds` (none, if None) the seeds: what a seed makes may be common to several conditions.
    """
    named, runs = _numbered(prompts or [None] * len(tables)), _numbered(seeds or range(len(tables)))
    found = []
    for table, key, run in zip(tables, named, runs, strict=True):
        drawn = _counts(table.shape[0], resamples, (seed, 0, run))  # [B, S]
        asked = _counts(table.shape[1], resamples, (seed, 1, key))  # [B, P]
        sums = np.einsum("bs,bs...->b...", drawn, np.tensordot(asked, table, ([1], [1])))
        found.append(sums / (table.shape[0] * table.shape[1]))
    return np.stack(found)


def _numbered(entries: Sequence[Hashable]) -> list[int]:
    """The number of each entry, equal ones alike."""
    known = list(dict.fromkeys(entries))
    return [known.index(entry) for entry in entries]


@lru_cache(maxsize=16)
def _counts(size: int, resamples: int, seed: tuple[int, ...]) -> np.ndarray:
    """How often each of `size` things is drawn, in `size` draws [B, size]."""
    drawn = np.random.default_rng(seed).integers(0, size, (resamples, size))
    drawn += size * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * size)
    return counts.reshape(resamples, size).astype(np.float64)


def crossed_mean(table: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of a table [S, P] with the interval of `crossed`; for one seed, over prompts only."""
    return crossed_means([table[..., None]], resamples=resamples, seed=seed)[0]


def crossed_means(
    tables: Sequence[np.ndarray],
    prompts: Sequence[Hashable] | None = None,
    runs: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """Of tables [S, P, M] of M measures, the mean over tables of each. If one table has one seed,
    seeds stand still in all. `prompts` and `runs` (seeds) as for `crossed`.
    """
    seeds, asked = sizes(tables)
    if seeds == 1:
        tables = [table.mean(0, keepdims=True) for table in tables]
    values = np.mean([table.mean((0, 1)) for table in tables], axis=0)  # [M]
    runs = None if seeds == 1 else runs
    drawn = crossed(tables, prompts, runs, resamples=resamples, seed=seed).mean(0)  # [B, M]
    count = asked if seeds == 1 else seeds
    return [estimate(float(x), b, count) for x, b in zip(values, drawn.T, strict=True)]


def sizes(tables: Sequence[np.ndarray]) -> tuple[int, int]:
    """The fewest seeds and the fewest prompts of tables [S, P, ...]."""
    seeds, prompts = (min(table.shape[axis] for table in tables) for axis in (0, 1))
    return seeds, prompts


def estimate(value: float, drawn: np.ndarray, count: int) -> Estimate:
    """With the `interval` of its bootstrap values [B]."""
    low, high = interval(value, drawn, count)
    return Estimate(mean=value, low=low, high=high)


def scope_of(seeds: int, prompts: int) -> Scope:
    """What an interval over so many of both covers."""
    if seeds == 1:
        return "prompts"
    return "seeds" if prompts == 1 else "seeds and prompts"


# ------------------------------------------------------------------------------ two arms


def difference(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    paired: bool = True,
    prompts: Sequence[Hashable] | None = None,
    runs: Sequence[Hashable] | None = None,
    wins: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """`first` minus `second`: for each stratum a table [S, P] of either arm, the mean over strata.

    Paired, the tables of a stratum have the same seeds and prompts in the same order. Unpaired,
    seeds are drawn in each arm by itself. `prompts` says which tables share prompts, one entry per
    stratum, or if unpaired one per table, those of `first` before those of `second`; `runs` in the
    same way which tables share seeds. Without `wins` the win rate is left out.
    """
    if paired:
        tables = [a - b for a, b in zip(first, second, strict=True)]
    else:  # the mean over twice as many tables is half of the difference
        tables = [2 * a for a in first] + [-2 * b for b in second]
    measures = [table[..., None] for table in tables]
    if wins := wins and paired:
        won = [(a > b) + 0.5 * (a == b) for a, b in zip(first, second, strict=True)]
        measures = [np.stack(both, -1) for both in zip(tables, won, strict=True)]
    found, *rate = crossed_means(measures, prompts, runs, resamples=resamples, seed=seed)
    seeds, asked = sizes(tables)
    scores = [[table.mean(1) for table in arm] for arm in (first, second)]
    both = None if runs is None else [*runs, *runs] if paired else list(runs)
    return Difference(
        mean=found.mean,
        low=found.low,
        high=found.high,
        seeds=seeds,
        strata=len(first),
        prompts=asked,
        scope=scope_of(seeds, asked),
        paired=paired,
        improvement=None
        if seeds == 1
        else improvement(scores[0], scores[1], both, resamples=resamples, seed=seed),
        win_rate=share(rate[0]) if wins else None,
        more_seeds=_more(found.mean, tables, runs, seeds),
    )


def _more(
    mean: float, tables: Sequence[np.ndarray], runs: Sequence[Hashable] | None, seeds: int
) -> int | None:
    """Tables that share seeds vary together, the others by themselves."""
    if seeds < 2:
        return None
    groups: dict[int, list[np.ndarray]] = {}
    for table, number in zip(tables, _numbered(runs or range(len(tables))), strict=True):
        groups.setdefault(number, []).append(table.mean(1))
    variances = [np.sum(found, axis=0).var(ddof=1) for found in groups.values()]
    needed = _needed(mean, math.sqrt(math.fsum(variances)) / len(tables))
    return None if needed is None else max(0, needed - seeds)


def share(found: Estimate) -> Estimate:
    """A share is between 0 and 1, whatever its interval reckons."""
    if found.low is None or found.high is None:
        return found
    return Estimate(mean=found.mean, low=max(0.0, found.low), high=min(1.0, found.high))


def improvement(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    runs: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Probability that a run of the one arm scores above a run of the other: the mean over strata
    of the Mann-Whitney share P(X > Y) + P(X = Y) / 2, from scores of runs [S] per stratum, with
    the interval of the stratified bootstrap (Agarwal et al. 2021, section 4.3). `runs` says which
    scores share seeds, those of `first` before those of `second`.
    """

    def shares(arms: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean([_above(x, y) for x, y in zip(arms[::2], arms[1::2], strict=True)], axis=0)

    both = [scores for pair in zip(first, second, strict=True) for scores in pair]
    if runs is not None:
        runs = [
            key for pair in zip(runs[: len(first)], runs[len(first) :], strict=True) for key in pair
        ]
    return share(stratified(both, shares, runs, resamples=resamples, seed=seed))


def _above(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the pairs of x [..., n] and y [..., m] in which x is larger, ties half [...]."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def seeds_needed(differences: np.ndarray) -> int | None:
    """Seeds in all at which the interval of the mean of paired differences [S] would exclude 0, if
    mean and standard deviation stay as they are: the smallest n with t(.975, n - 1) sd / sqrt(n) <
    |mean|. None if there is no such n up to MOST_SEEDS, or fewer than 2 seeds to tell sd from.

    That many have an even chance of settling it; for four chances in five plan for twice as many.
    """
    if len(differences) < 2:
        return None
    return _needed(float(np.mean(differences)), float(np.std(differences, ddof=1)))


def _needed(mean: float, deviation: float) -> int | None:
    from scipy.special import stdtrit

    n = np.arange(2, MOST_SEEDS + 1)
    enough = stdtrit(n - 1, (1 + LEVEL) / 2) * deviation / np.sqrt(n) < abs(mean)
    return int(n[enough.argmax()]) if enough.any() else None
