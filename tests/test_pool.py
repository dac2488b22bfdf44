"""Choosing among judged completions: against the published systems' numbers, and at their edges."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_exp.algorithms.pool import Pool, balanced, numbered, quantiles, rank, survivors, ties

NUMBERS = json.loads((Path(__file__).parent / "vectors" / "conditional.json").read_text())


def pool_wide(scores: list[float], count: int) -> np.ndarray:
    return quantiles(np.array(scores), np.zeros(len(scores), dtype=np.int64), count)


# ---- quantiles


def test_quark_quantiles_are_the_reference_implementations() -> None:
    case = NUMBERS["quark_quantiles"]
    names = [f"p{i}" for i, s in enumerate(case["input_scores"]) if s is not None]
    scores = [s for s in case["input_scores"] if s is not None]
    assert len(case["input_scores"]) - len(scores) == case["n_dropped_none"]
    found = dict(zip(names, pool_wide(scores, case["K"]).tolist(), strict=True))
    assert [found[n] for n in case["order_desc_by_score"]] == case["quantile_index"]
    grown = case["after_second_add_[0.60,0.01]"]
    found = dict(zip([*names, "p15", "p16"], pool_wide([*scores, 0.60, 0.01], 5), strict=True))
    assert [found[n] for n in grown["order"]] == grown["quantile_index"]


@pytest.mark.parametrize("size", [5, 14, 16, 23, 96])
def test_the_last_quantile_takes_the_remainder(size: int) -> None:
    found = np.bincount(pool_wide(list(range(size)), 5))
    assert found.tolist() == NUMBERS["quark_quantiles"]["sizes_K5"][str(size)]


def test_fewer_completions_than_labels_is_an_error_not_the_worst_label() -> None:
    with pytest.raises(ValueError, match=r"1 groups .* fewer than the 5 labels, the smallest 4"):
        pool_wide([0.1, 0.2, 0.3, 0.4], 5)


def test_alt_quantiles_are_each_prompts_own() -> None:
    case = NUMBERS["alt_rm"]
    rewards = np.array(case["rewards"])
    both = np.concatenate([rewards, rewards + 100])  # a second prompt, far better throughout
    groups = np.repeat([0, 1], len(rewards))
    found = quantiles(both, groups, 5)
    for half in (found[: len(rewards)], found[len(rewards) :]):
        by_name = dict(zip(case["generations"], half, strict=True))
        expected = [int(token.split("_")[3]) for token in case["quantile_tokens"]]
        assert [by_name[g] for g in case["sorted_generations"]] == expected


def test_equal_scores_keep_their_order_and_are_reported() -> None:
    scores = np.array([1.0, 1.0, 1.0, 0.0])
    groups = np.zeros(4, dtype=np.int64)
    found = quantiles(scores, groups, 2)
    assert found.tolist() == [0, 0, 1, 1]
    assert ties(scores, groups, found) == pytest.approx(1 / 3)  # one of three neighbors is parted
    assert ties(np.array([4.0, 3.0, 2.0, 1.0]), groups, found) == 0.0


def test_rank_counts_within_groups_and_takes_the_first_key_first() -> None:
    groups = np.array([0, 1, 0, 1, 0])
    first, second = np.array([1, 0, 0, 0, 0]), np.array([0, 5, 9, 4, 8])
    assert rank([first, second], groups).tolist() == [2, 1, 1, 0, 0]


def test_a_million_rows_are_cut_into_quantiles_of_each_prompt() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=1_000_000), rng.integers(0, 10_000, 1_000_000)
    found = quantiles(scores, groups, 5)
    assert np.bincount(found).min() > 190_000
    best = np.bincount(groups, weights=found == 0)
    assert (best == np.bincount(groups) // 5).all()


# ---- what is kept and what is learned from


def test_survivors_are_a_share_of_every_group() -> None:
    groups = np.repeat([0, 1, 2], [10, 5, 3])
    kept = survivors(groups, 0.5, np.random.default_rng(0))
    assert np.bincount(groups[kept], minlength=3).tolist() == [5, 2, 1]
    assert len(survivors(groups, 1.0, np.random.default_rng(0))) == 0
    assert survivors(groups, 0.0, np.random.default_rng(0)).tolist() == list(range(18))
    draws = {tuple(survivors(groups, 0.5, np.random.default_rng(seed))) for seed in range(9)}
    assert len(draws) > 1, "which of them is a matter of chance"


def choose(labels: list[int], ended: list[bool], count: int, *, fill: bool, seed: int = 0):
    prompts = np.zeros(len(labels), dtype=np.int64)
    rng = np.random.default_rng(seed)
    return balanced(
        prompts, np.array(labels), np.array(ended), count=count, kinds=2, fill=fill, rng=rng
    ).tolist()


def test_balance_takes_equally_from_every_label() -> None:
    labels = [0] * 8 + [1] * 3
    found = choose(labels, [True] * 11, 4, fill=False)
    assert [labels[i] for i in found] == [0, 0, 1, 1]
    assert len({tuple(choose(labels, [True] * 11, 4, fill=False, seed=s)) for s in range(9)}) > 1


def test_completions_that_ended_come_before_those_cut_off() -> None:
    ended = [False, False, True, False, True, False]
    for seed in range(5):
        assert choose([0] * 6, ended, 4, fill=False, seed=seed) == [2, 4]
        assert set(choose([0] * 6, ended, 6, fill=False, seed=seed)) > {2, 4}  # topped up


def test_fill_tops_up_with_the_first_unused() -> None:
    labels = [0, 0, 0, 0, 0, 1]
    short = choose(labels, [True] * 6, 4, fill=False)
    full = choose(labels, [True] * 6, 4, fill=True)
    assert (len(short), len(full)) == (3, 4)
    assert set(short) < set(full)
    assert set(full) - set(short) == {min(set(range(6)) - set(short))}
    assert choose([0, 1], [True] * 2, 4, fill=True) == [0, 1]  # no more than there are


def test_balance_is_by_prompt() -> None:
    prompts = np.repeat([0, 1, 2], 6)
    labels = np.tile([0, 0, 0, 1, 1, 1], 3)
    rng = np.random.default_rng(0)
    found = balanced(prompts, labels, np.ones(18, bool), count=4, kinds=2, fill=True, rng=rng)
    assert np.bincount(prompts[found] * 2 + labels[found]).tolist() == [2] * 6


# ---- the pool


def test_rows_have_the_keys_of_the_published_files_and_keep_duplicates() -> None:
    pool = Pool(
        prompts=["a", "b", "a", "a"],
        completions=["x", "y", "z", "x"],
        responses=[[1], [2], [3], [1]],
        scores=[0.1, 0.2, 0.3, 0.1],
        ended=[True, True, False, True],
        feedbacks=["good", "bad", "bad", "good"],
        grades=[3.0, 0.0, 1.0, 3.0],
    )
    first, second = pool.rows()
    assert first == {
        "prompt": "a",
        "generations": ["x", "z", "x"],
        "rewards": [0.1, 0.3, 0.1],
        "ended": [True, False, True],
        "feedbacks": ["good", "bad", "good"],
        "scores": [3.0, 1.0, 3.0],
    }
    assert second["generations"] == ["y"]
    assert numbered(pool.prompts).tolist() == [0, 1, 0, 0]


def test_keep_cuts_every_column_alike() -> None:
    pool = Pool(
        prompts=list("abc"),
        completions=list("xyz"),
        responses=[[1], [2], [3]],
        scores=[1.0, 2.0, 3.0],
        ended=[True] * 3,
        feedbacks=list("pqr"),
        grades=[0.0, 1.0, 2.0],
        members={"m": [7.0, 8.0, 9.0]},
    )
    pool.keep(np.array([2, 0]))
    assert (pool.prompts, pool.completions, pool.responses) == (["c", "a"], ["z", "x"], [[3], [1]])
    assert (pool.scores, pool.feedbacks, pool.grades) == ([3.0, 1.0], ["r", "p"], [2.0, 0.0])
    assert pool.members == {"m": [9.0, 7.0]}
