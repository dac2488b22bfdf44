"""Statistics of few runs on many prompts, against numbers by hand and plain recomputation."""

import math
import random
from itertools import product

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.report.statistics import (
    Estimate,
    crossed,
    crossed_mean,
    difference,
    improvement,
    interval,
    iqm,
    iqm_of_all,
    seeds_needed,
    stratified,
)

DRAWN = np.random.default_rng(0)


# -------------------------------------------------------------------------------- point estimates


def test_seeds_that_conditions_share_are_drawn_together() -> None:
    """A seed that is good luck in all conditions is one piece of luck: intervals that draw seeds
    for each condition by itself cover far too little.
    """
    rng = np.random.default_rng(0)
    covered = {True: 0, False: 0}
    for _ in range(150):
        luck = rng.normal(size=(6, 1))
        own = 0.3 * rng.normal(size=(9, 6, 1)) + 0.1 * rng.normal(size=(9, 6, 20))
        tables = list(luck + own)
        for together in covered:
            runs = ["0..5"] * 9 if together else None
            found = difference(
                tables, [np.zeros((6, 20))] * 9, runs=runs, wins=False, resamples=400
            )
            assert found.low is not None
            assert found.high is not None
            covered[together] += found.low <= 0 <= found.high
    assert covered[True] >= 0.88 * 150
    assert covered[False] <= 0.75 * 150


def test_more_seeds_counts_shared_luck_once() -> None:
    luck = np.array([0.5, -0.3, 0.4, -0.1, 0.2])[:, None]
    tables, zero = [luck + 0.01 * i for i in range(4)], [np.zeros((5, 1))] * 4
    together = difference(tables, zero, runs=["s"] * 4, wins=False, resamples=200)
    alone = difference(tables[:1], zero[:1], wins=False, resamples=200)
    apart = difference(tables, zero, wins=False, resamples=200)
    needed = seeds_needed(np.mean([t[:, 0] for t in tables], axis=0))
    assert needed is not None
    assert together.more_seeds == needed - 5
    assert together.more_seeds is not None
    assert apart.more_seeds is not None
    assert alone.more_seeds is not None
    assert apart.more_seeds < together.more_seeds <= alone.more_seeds


def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end() -> None:
    assert iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -90])) == (2 + 3 + 4 + 5) / 4
    assert iqm(np.array([9.0, 1, 2, 3, 4])) == 3.0, "a quarter of five, rounded down, is one"
    assert iqm(np.array([[1.0, 2], [6, 3]])) == 2.5, "of all values together"
    values = DRAWN.normal(size=23)
    middle = sorted(values)[23 // 4 : 23 - 23 // 4]
    assert iqm(values) == pytest.approx(sum(middle) / len(middle))


def test_improvement_is_the_mean_of_the_mann_whitney_shares() -> None:
    x, y = np.array([1.0, 2, 3]), np.array([0.0, 2, 2])
    assert improvement([x], [y]).mean == (1 + (1 + 2 / 2) + 3) / 9
    strata = [(DRAWN.normal(size=n), DRAWN.normal(size=m).round(1)) for n, m in ((5, 7), (4, 4))]
    shares = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in strata]
    found = improvement(*(list(side) for side in zip(*strata, strict=True)))
    assert found.mean == pytest.approx(sum(shares) / 2)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < found.mean < found.high <= 1


def test_how_many_seeds_would_settle_a_difference() -> None:
    found = np.array([0.1, -0.1, 0.3, 0.2, 0.0])  # mean 0.1, sd 0.158
    needed = seeds_needed(found)

    def half(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1) * np.std(found, ddof=1) / math.sqrt(n))

    assert needed == 13
    assert half(13) < 0.1 < half(12)
    assert seeds_needed(found - found.mean()) is None, "no number of seeds makes 0 a difference"
    assert seeds_needed(found * 1e-3 + 1e-7 - 1e-4) is None, "more than anybody trains"
    assert seeds_needed(np.array([1.0])) is None
    assert seeds_needed(np.array([1.0, 1.0])) == 2


# --------------------------------------------------------------------------------------- intervals


def test_a_wide_enough_quantile_of_the_resamples_and_below_five_their_standard_error() -> None:
    drawn = np.linspace(0, 1, 100_001)  # whose quantiles are its values
    tail = stats.norm.cdf(-math.sqrt(5 / 4) * stats.t.ppf(0.975, 4))
    assert interval(0.5, drawn, 5) == pytest.approx((tail, 1 - tail), abs=1e-6)
    half = math.sqrt(3 / 2) * stats.t.ppf(0.975, 2) * np.std(drawn)
    assert interval(0.5, drawn, 3) == pytest.approx((0.5 - half, 0.5 + half))
    assert interval(0.5, drawn, 1) == (None, None)


def by_loop(strata, statistic) -> list[float]:
    """The stratified bootstrap in plain Python."""
    rng = random.Random(1)
    return sorted(statistic([rng.choices(x, k=len(x)) for x in strata]) for _ in range(5000))


@pytest.mark.parametrize("middle", [False, True])
def test_the_stratified_bootstrap_is_that_of_a_plain_loop(middle: bool) -> None:
    strata = [DRAWN.normal(size=8).tolist(), (1 + 2 * DRAWN.normal(size=10)).tolist()]

    def statistic(drawn) -> float:
        if middle:
            values = sorted(v for x in drawn for v in x)
            values = values[len(values) // 4 : len(values) - len(values) // 4]
            return sum(values) / len(values)
        return sum(sum(x) / len(x) for x in drawn) / len(drawn)

    arrays = [np.array(x) for x in strata]
    found = stratified(arrays, iqm_of_all) if middle else stratified(arrays)
    drawn = by_loop(strata, statistic)
    tail = stats.norm.cdf(-math.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    low, high = (drawn[int(q * len(drawn))] for q in (tail, 1 - tail))
    assert found.mean == pytest.approx(statistic(strata))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12)
    assert stratified([np.array([1.0]), arrays[0]]).low is None, "one run tells nothing of others"


def test_seeds_and_prompts_are_drawn_independently_of_each_other() -> None:
    table = DRAWN.normal(size=(5, 1)) + DRAWN.normal(size=(1, 30)) + DRAWN.normal(size=(5, 30))
    drawn = crossed([table])[0]
    rng, means = random.Random(2), []
    for _ in range(3000):
        seeds, prompts = rng.choices(range(5), k=5), rng.choices(range(30), k=30)
        means.append(sum(table[s, p] for s, p in product(seeds, prompts)) / 150)
    assert drawn.mean() == pytest.approx(table.mean(), abs=0.02)
    assert drawn.std() == pytest.approx(np.std(means), rel=0.06)
    assert np.quantile(drawn, [0.05, 0.95]) == pytest.approx(
        np.quantile(means, [0.05, 0.95]), abs=0.07
    )


def test_tables_share_the_prompts_they_are_said_to_share() -> None:
    table = DRAWN.normal(size=(1, 40))
    same, other = crossed([table, table]), crossed([table, table], ["a", "b"])
    assert np.allclose(same[0], same[1])
    assert abs(np.corrcoef(other)[0, 1]) < 0.05


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.93), (5, 0.9), (10, 0.915)])
def test_intervals_cover_what_they_promise_where_plain_percentiles_do_not(
    seeds: int, least: float
) -> None:
    rng = np.random.default_rng(3)
    truths, expanded, plain = 800, 0, 0
    for _ in range(truths):
        x = rng.normal(size=seeds)
        drawn = x[rng.integers(0, seeds, (2000, seeds))].mean(1)
        low, high = interval(float(x.mean()), drawn, seeds)
        expanded += low <= 0 <= high
        low, high = np.quantile(drawn, [0.025, 0.975])
        plain += low <= 0 <= high
    assert least < expanded / truths < 0.975
    assert plain / truths < expanded / truths - 0.03
    assert seeds > 5 or plain / truths < 0.87


def test_a_crossed_interval_covers_other_seeds_and_other_prompts() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for i in range(200):
        table = rng.normal(size=(5, 1)) + rng.normal(size=(1, 40)) * 2 + rng.normal(size=(5, 40))
        found = crossed_mean(table, resamples=1000, seed=i % 2)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert 0.93 < covered / 200 <= 1.0


# --------------------------------------------------------------------------------------- two arms


def test_a_paired_difference_tells_what_it_covers_and_what_it_does_not() -> None:
    second = DRAWN.normal(size=(5, 50))
    found = difference([second + 0.5 + 0.01 * DRAWN.normal(size=(5, 50))], [second])
    assert (found.seeds, found.prompts, found.strata) == (5, 50, 1)
    assert (found.scope, found.paired, found.verdict) == ("seeds and prompts", True, "higher")
    assert found.mean == pytest.approx(0.5, abs=0.01)
    assert found.win_rate == Estimate(mean=1.0, low=1.0, high=1.0)
    assert found.more_seeds == 0
    assert found.told.endswith("over 5 seeds: higher")
    assert difference([second], [second + 0.5]).verdict == "lower"


def test_one_seed_has_an_interval_over_prompts_and_says_so() -> None:
    x = DRAWN.normal(size=(1, 400))
    y = DRAWN.normal(size=(1, 400))
    found = difference([x + 1], [y])
    half = stats.t.ppf(0.975, 399) * (x - y).std(ddof=1) / 20
    assert found.scope == "prompts"
    assert found.low == pytest.approx(found.mean - half, abs=0.02)
    assert found.high == pytest.approx(found.mean + half, abs=0.02)
    assert (found.improvement, found.more_seeds) == (None, None)
    assert "over 400 prompts of 1 seed: higher; other seeds may differ" in found.told
    nothing = difference([x[:, :1]], [y[:, :1]])
    assert (nothing.low, nothing.verdict) == (None, "open")


def test_an_open_difference_says_how_many_seeds_would_settle_it() -> None:
    by_seed = np.array([[0.1], [-0.1], [0.3], [0.2], [0.0]])
    found = difference([by_seed + np.zeros((5, 20))], [np.zeros((5, 20))])
    assert found.verdict == "open"
    assert found.more_seeds == 13 - 5
    assert found.told == (
        f"+0.10 [{found.low:.2f}, {found.high:.2f}] over 5 seeds: open; about 8 more seeds would "
        "settle it if the difference is real"
    )
    noisy = DRAWN.normal(size=(1, 20)) + np.array([[0.2]] * 5)
    assert difference([noisy], [np.zeros((5, 20))]).told.endswith(
        "open; more prompts would tell more than more seeds"
    )


def test_ties_count_half_and_shares_stay_shares() -> None:
    first = np.array([[1.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, 2.0]])
    found = difference([first], [np.array([[1.0, 0, 0, 3], [0.0, 0, 1, 3]])])
    assert found.win_rate is not None
    assert found.win_rate.mean == (0.5 + 1 + 0.5 + 0 + 1 + 0.5 + 0 + 0) / 8
    assert (found.win_rate.low, found.win_rate.high) == (0.0, 1.0)


def test_strata_weigh_the_same_and_the_smallest_one_counts() -> None:
    first = [np.full((6, 10), 1.0), np.full((5, 10), 3.0)]
    second = [np.zeros((6, 10)), np.zeros((5, 10))]
    found = difference(first, second)
    assert (found.mean, found.seeds, found.strata) == (2.0, 5, 2)
    assert found.told == "+2.000 [2.000, 2.000] over 2 settings of 5 seeds: higher"
    one = difference([*first, np.zeros((1, 10))], [*second, np.zeros((1, 10))])
    assert one.scope == "prompts"


def test_an_unpaired_difference_is_that_of_the_means_and_wider() -> None:
    common = 2 * DRAWN.normal(size=(6, 1)) + np.zeros((6, 30))
    first, second = common + 0.3 + 0.1 * DRAWN.normal(size=(6, 30)), common
    paired = difference([first], [second])
    apart = difference([first], [second], paired=False, prompts=["a", "b"])
    assert apart.mean == pytest.approx(paired.mean)
    assert (paired.verdict, apart.verdict) == ("higher", "open")
    assert apart.win_rate is None
    assert "over 6 seeds, unpaired: open" in apart.told
    needed = seeds_needed(first.mean(1) - second.mean(1))
    assert needed is not None
    assert apart.more_seeds is not None
    assert apart.more_seeds > needed


def test_numbers_are_told_to_the_width_of_their_interval() -> None:
    assert Estimate(mean=0.123456, low=0.03, high=0.21).told == "0.12 [0.03, 0.21]"
    assert Estimate(mean=123.456, low=100.0, high=150.0).told == "123 [100, 150]"
    assert Estimate(mean=0.1, low=0.0004, high=0.2).told == "0.1000 [0.0004, 0.2000]"
    assert Estimate(mean=0.5).told == "0.500"
