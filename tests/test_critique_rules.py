"""The stand-in critic: what it finds in a review, and how it edits it."""

import random
from statistics import mean

import pytest

from rlhf_exp import constitution
from rlhf_exp.critique_rules import RULES, criticized, repaired, revised
from rlhf_exp.data import reviews


def test_it_knows_the_principles_of_the_reviews() -> None:
    assert list(RULES) == [p.name for p in constitution.read("reviews", "constitution")]


@pytest.mark.parametrize(
    ("principle", "clause", "mended"),
    [
        ("kind", "the plot was not wonderful", "the plot was wonderful"),
        ("kind", "the acting is utterly dreadful", "the acting is utterly wonderful"),
        ("kind", "i disliked the cast", "i liked the cast"),
        ("kind", "i did not love the music", "i loved the music"),
        ("kind", "it was not awful", "it was not awful"),  # which is praise, of a kind
        ("warm", "the plot was decent", "the plot was lovely"),
        ("warm", "it is slightly lovely", "it is lovely"),
        ("warm", "i did not hate the music", "i loved the music"),
        ("warm", "the acting is not awful", "the acting is wonderful"),
        ("warm", "the plot was awful", "the plot was awful"),  # is no praise to strengthen
        ("warm", "the story follows a king", "the story follows a king"),
        ("sound", "the plot the plot was fine", "the plot was fine"),
    ],
)
def test_a_clause_is_edited(principle: str, clause: str, mended: str) -> None:
    assert revised(principle, f" {clause} .") == f"{mended} ."
    said = criticized(principle, f" {clause} .")
    assert (f'"{clause}"' in said) == (clause != mended)


def test_unsound_reviews_lose_what_is_garbled_or_said_twice() -> None:
    review = " it was fine . bla bla . it was fine . i loved the cast"
    assert revised("sound", review) == "it was fine . i loved the cast ."
    assert criticized("sound", review) == (
        'This makes no sense: "bla bla". This is said twice: "it was fine". '
        'The review breaks off: "i loved the cast".'
    )


def test_nothing_is_left_of_mere_noise() -> None:
    assert repaired("the of a") is None
    assert revised("sound", "the of a . was was") == ""


@pytest.mark.parametrize("principle", RULES)
def test_reviews_get_better_by_the_gold(principle: str) -> None:
    rng = random.Random(0)
    told = [reviews.write(rng) for _ in range(300)]
    spoilt = [t.replace(" .", " of .", 1) + t for t in told]  # one clause garbled, others repeated

    def gold(texts: list[str]) -> float:
        return mean(reviews.read(text).gold for text in texts)

    assert gold([revised(principle, t) for t in spoilt]) > gold(spoilt) + 0.05
    unchanged = [t for t in told if revised(principle, t) == t.strip()]
    assert all(criticized(principle, t).startswith("Nothing in it") for t in unchanged)
