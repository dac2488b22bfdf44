"""What the labels of a run tell of those who gave them."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import median

from rlhf_exp.labellers.person.store import Label, last_of_each


def summary(pairs: Sequence[Sequence[Label]]) -> dict[str, float]:
    """Numbers by name, of the labels of each pair. What there is nothing to tell of is left out.

    `agreement` is the share of couples of people who say the same of a pair, skips aside;
    `contradictions` counts pairs of which not all labels say the same; `left_chosen` is the share
    of choices that fell on the left: far from 1/2, the place decides.
    """
    labels = [label for pair in pairs for label in pair]
    if not labels:
        return {}
    chosen = [label.probability for label in labels if label.probability in (0, 1)]
    seconds = [label.seconds for label in labels if label.seconds is not None]
    couples = [couple for pair in pairs for couple in _couples(pair)]
    by = Counter(label.who for label in labels)
    found: dict[str, float] = {
        "labels": len(labels),
        "labellers": len(by),
        "ties": sum(label.probability == 0.5 for label in labels),
        "skips": sum(label.probability is None for label in labels),
        "contradictions": sum(len(_said(pair)) > 1 for pair in pairs),
    }
    if couples:
        found["agreement"] = sum(couples) / len(couples)
    if chosen:
        found["left_chosen"] = sum(chosen) / len(chosen)
    if seconds:
        found["seconds_per_label"] = median(seconds)
    return found | {f"labels_by/{who}": float(n) for who, n in sorted(by.items())}


def _said(pair: Sequence[Label]) -> set[float]:
    """The different probabilities that a pair's labels give to one of its texts."""
    said = (label.of(pair[0].left) for label in pair)
    return {p for p in said if p is not None}


def _couples(pair: Sequence[Label]) -> list[bool]:
    """Of every two people who said something of a pair, whether it was the same."""
    said = [p for x in last_of_each(pair).values() if (p := x.of(pair[0].left)) is not None]
    return [one == other for one, other in combinations(said, 2)]
