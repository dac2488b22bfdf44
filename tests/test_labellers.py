"""Labellers: gold, soft gold, and any of them with errors."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.data.rows import Pair
from rlhf_exp.labellers import Labeller
from rlhf_exp.labellers.dataset import FromDataset
from rlhf_exp.labellers.gold import Gold
from rlhf_exp.labellers.noisy import Noisy
from rlhf_exp.preferences import agreement, ask, labelled, ordered, wins
from rlhf_exp.rewards import Reward


class Length(Reward):
    """The longer the better."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor([float(len(c)) for c in completions])


def loaded(labeller: Any) -> Any:
    labeller.load(Length(), "cpu")
    return labeller


def test_soft_gold_is_a_bradley_terry_rater() -> None:
    soft = loaded(Gold(scale=2.0))
    said = soft(["p"] * 3, ["aaaa", "a", "aa"], ["aa", "aaa", "bb"])
    assert said.tolist() == pytest.approx([0.7311, 0.2689, 0.5], abs=1e-4)
    assert loaded(Gold())(["p"] * 3, ["aaaa", "a", "aa"], ["aa", "aaa", "bb"]).tolist() == [
        1,
        0,
        0.5,
    ]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_noise_turns_its_share_of_labels(rate: float) -> None:
    texts = [("x" * (i % 7 + 1), "y" * (i % 5 + 9), f"prompt {i}") for i in range(2000)]
    left, right, prompts = map(list, zip(*texts, strict=True))
    said = loaded(Noisy(labeller=Gold(), rate=rate))(prompts, left, right)
    assert float(said.mean()) == pytest.approx(rate, abs=0.03)  # the right one is always longer


def test_noise_is_a_pairs_own_whatever_comes_before_and_whichever_is_left() -> None:
    noisy = loaded(Noisy(labeller=Gold(), rate=0.5))
    prompts, left, right = (
        [f"prompt {i}" for i in range(50)],
        ["a" * (i + 1) for i in range(50)],
        ["b" * (51 - i) for i in range(50)],
    )
    said = noisy(prompts, left, right)
    assert 5 < int((said != loaded(Gold())(prompts, left, right)).sum()) < 45
    assert torch.equal(noisy(prompts, right, left), 1 - said)
    order = random.Random(0).sample(range(50), 50)
    shuffled = noisy(*([column[i] for i in order] for column in (prompts, left, right)))
    assert torch.equal(shuffled, said[order])
    other = loaded(Noisy(labeller=Gold(), rate=0.5, seed=1))(prompts, left, right)
    assert not torch.equal(other, said)


def test_no_answer_stays_no_answer_under_noise() -> None:
    class Mute(Labeller):
        def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
            return torch.full((len(prompts),), torch.nan)

    assert loaded(Noisy(labeller=Mute(), rate=1.0))(["p"], ["a"], ["b"]).isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noisy(labeller=Gold(), rate=1.5), r"labeller\.rate=1\.5"),
        (lambda: Noisy(labeller=FromDataset()), r"preferences\.noise_rate in its place"),
        (lambda: Gold(scale=0.0), r"labeller\.scale=0\.0"),
    ],
)
def test_impossible_labellers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Counting(Labeller):
    """Says 0.8 of everything but what mentions a c, of which it cannot say."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        pairs = list(zip(left, right, strict=True))
        self.asked += pairs
        return torch.tensor([torch.nan if "c" in "".join(pair) else 0.8 for pair in pairs])


def test_nobody_is_asked_about_equal_texts() -> None:
    labeller = Counting()
    said = ask(labeller, ["p"] * 3, ["a", "a", "b"], ["a", "b", "c"])
    assert labeller.asked == [("a", "b"), ("b", "c")]
    assert said[:2].tolist() == pytest.approx([0.5, 0.8])
    assert said[2].isnan()
    assert wins(["p"], ["a", "a", "b"], labeller, 3).tolist() == pytest.approx([1.3, 1.3, 0.4])


def test_pairs_carry_how_sure_the_label_is() -> None:
    completions = ["a", "b", "a", "a", "b", "c"]
    assert labelled(["p", "q", "r"], completions, Counting()) == [
        Pair("p", "a", "b", pytest.approx(0.8))
    ]
    assert ordered("p", "a", "b", 0.25) == Pair("p", "b", "a", 0.75)


def test_ties_are_dropped_or_kept() -> None:
    gold = loaded(Gold())
    texts = ["a", "b", "aa", "b"]
    assert labelled(["p", "q"], texts, gold) == [Pair("q", "aa", "b")]
    kept = labelled(["p", "q"], texts, gold, ties="keep")
    assert kept == [Pair("p", "a", "b", 0.5), Pair("q", "aa", "b")]


def test_agreement_leaves_ties_of_either_out() -> None:
    pairs = [Pair("p", "aaa", "b"), Pair("p", "a", "bb", 0.6), Pair("p", "aa", "bb", 0.9)]
    pairs += [Pair("p", "a", "bbbb", 0.5), Pair("p", "aaaa", "bb")]
    assert agreement(pairs, Length()) == {"agreement_with_gold": pytest.approx(2 / 3)}
    assert agreement(pairs, None) == {}
    assert agreement([Pair("p", "aa", "bb")], Length()) == {}
