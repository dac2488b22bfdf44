"""The stand-in critic of the embedded world (`judge@critique.critic=rules`), whose policies are too
small to criticize anything.

It reads a review clause by clause, as the world does (data/reviews.py), and knows the three
principles of constitutions/reviews.yaml: `kind`, `warm` and `sound`. What it says is made from the
words of the review, and a revision is an edit of them; it never sees the gold.

Left out: prompts, which a review of this world is not judged by.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlhf_exp.data.reviews import (
    ADJECTIVES,
    BASE_VERBS,
    INTENSITIES,
    LONGEST,
    VERBS,
    clause_sentiment,
)
from rlhf_exp.feedback.rules import WARM

WEIGHTS = ADJECTIVES | VERBS | BASE_VERBS
PAST = dict(zip(BASE_VERBS, VERBS, strict=True))  # love: loved


@dataclass(frozen=True)
class Rule:
    """One principle: what is wrong with a review, and how to mend it."""

    faults: Callable[[str], list[str]]  # sentences, none if all is well
    mended: Callable[[str], list[str]]  # clauses of the new review


def criticized(principle: str, review: str) -> str:
    """What is wrong with `review` by the principle of this name."""
    return " ".join(RULES[principle].faults(review)) or f"Nothing in it fails to be {principle}."


def revised(principle: str, review: str) -> str:
    """`review` with what is wrong by the principle of this name mended; nothing, if nothing of it
    can be.
    """
    return " ".join(f"{clause} ." for clause in RULES[principle].mended(review))


def clauses(review: str) -> list[str]:
    """What full stops part, the unfinished end included."""
    return [c for c in (part.strip() for part in " ".join(review.split()).split(".")) if c]


# ---- kind


def _unkind(clause: str) -> bool:
    return (clause_sentiment(clause) or 0.0) < 0


def praised(clause: str) -> str:
    """The opposite of a clause that blames: "not" goes, or the word becomes its counterpart."""
    words = clause.split()
    if "not" in words:
        return _without_not(words)
    return " ".join(_opposite(word) if WEIGHTS.get(word, 0) < 0 else word for word in words)


def _without_not(words: list[str]) -> str:
    """A negated clause without its negation; "did not love" becomes "loved"."""
    return " ".join(PAST.get(word, word) for word in words if word not in ("did", "not"))


def _opposite(word: str) -> str:
    """The word of the same kind whose weight is nearest to the negative of this one's."""
    kind = next(words for words in (ADJECTIVES, VERBS, BASE_VERBS) if word in words)
    return min(kind, key=lambda other: abs(kind[other] + kind[word]))


# ---- warm


def _lukewarm(clause: str) -> bool:
    return 0 < (clause_sentiment(clause) or 0.0) <= WARM


def strengthened(clause: str) -> str:
    """Lukewarm praise in warm words: "not bad" is said outright, words that weaken go, and a weak
    word gives way to the first that is warm.
    """
    words = clause.split()
    if "not" in words:
        words = [_opposite(word) if word in WEIGHTS else word for word in words]
        words = _without_not(words).split()
    return " ".join(_warm(word) for word in words if INTENSITIES.get(word, 1.0) >= 1.0)


def _warm(word: str) -> str:
    kind = next((words for words in (ADJECTIVES, VERBS) if word in words), {})
    warm = [other for other in kind if kind[other] > WARM]
    return word if kind.get(word, 1.0) > WARM else min(warm, key=lambda other: kind[other])


# ---- sound


def repaired(clause: str) -> str | None:
    """The longest run of words that makes sense, the first of these; None if none does."""
    words = clause.split()
    runs = (
        " ".join(words[start : start + length])
        for length in range(len(words), 2, -1)
        for start in range(len(words) - length + 1)
    )
    return next((run for run in runs if clause_sentiment(run) is not None), None)


def _sound(review: str) -> list[str]:
    kept = dict.fromkeys(repaired(clause) for clause in clauses(review))
    return [clause for clause in kept if clause is not None][:LONGEST]


def _unsound(review: str) -> list[str]:
    said = clauses(review)
    garbled = [clause for clause in said if clause_sentiment(clause) is None]
    twice = [clause for clause in dict.fromkeys(said) if said.count(clause) > 1]
    cut = said[-1:] if not review.rstrip().endswith(".") else []
    long = said[LONGEST : LONGEST + 1]
    found = _named("This makes no sense", garbled) + _named("This is said twice", twice)
    return found + _named("The review breaks off", cut) + _named("It is too long from here", long)


def _named(what: str, quoted: Iterable[str]) -> list[str]:
    """A sentence that quotes what it blames, if there is anything."""
    found = ", ".join(f'"{words}"' for words in quoted)
    return [f"{what}: {found}."] if found else []


def _clause_by_clause(what: str, wrong: Callable[[str], bool], mend: Callable[[str], str]) -> Rule:
    return Rule(
        lambda review: _named(what, filter(wrong, clauses(review))),
        lambda review: [mend(c) if wrong(c) else c for c in clauses(review)],
    )


RULES = {
    "kind": _clause_by_clause("This is unkind", _unkind, praised),
    "warm": _clause_by_clause("This is lukewarm", _lukewarm, strengthened),
    "sound": Rule(_unsound, _sound),
}
