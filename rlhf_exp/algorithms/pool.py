"""Completions that were judged, kept for learning; and the arithmetic of choosing among them.

Every choice is one pass of sorting or counting over whole columns: a pool of a million rows is cut
into quantiles in seconds, and only when it is asked for, never at an insertion.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_exp.policy import Rollouts

Ints = np.ndarray
Floats = np.ndarray


@dataclass
class Pool:
    """Columns of equal length, in the order of arrival."""

    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)  # token ids
    scores: list[float] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # the completion came to its own end
    feedbacks: list[str] = field(default_factory=list)  # "" where nobody was asked
    grades: list[float] = field(default_factory=list)  # the score that came with the feedback
    members: dict[str, list[float]] = field(default_factory=dict)  # what the score was made from

    def __len__(self) -> int:
        return len(self.prompts)

    def add(
        self, rollouts: Rollouts, feedbacks: list[str] | None = None, grades: Any = None
    ) -> None:
        """Append scored rollouts."""
        assert rollouts.scores is not None
        count = len(rollouts)
        self.prompts += rollouts.prompts
        self.completions += rollouts.completions
        self.responses += rollouts.responses()
        self.scores += rollouts.scores.tolist()
        self.ended += rollouts.ended.tolist()
        self.feedbacks += feedbacks or [""] * count
        self.grades += grades or [0.0] * count
        for name, values in (rollouts.members or {}).items():
            self.members.setdefault(name, []).extend(values.tolist())

    def keep(self, rows: Ints) -> None:
        """Forget all but `rows` (int64 [m])."""
        for name, column in vars(self).items():
            if isinstance(column, list):
                setattr(self, name, [column[i] for i in rows])
        self.members = {k: [column[i] for i in rows] for k, column in self.members.items()}

    def groups(self) -> Ints:
        """Number of the prompt of each row, in the order of first appearance: int64 [n]."""
        return numbered(self.prompts)

    def rows(self, first: int = 0) -> list[dict[str, Any]]:
        """What came as row `first` and later: one row per prompt, under the keys that the published
        systems use for such files.
        """
        found: dict[str, dict[str, Any]] = {}
        columns = {"generations": self.completions, "rewards": self.scores, "ended": self.ended}
        if any(self.feedbacks):
            columns |= {"feedbacks": self.feedbacks, "scores": self.grades}
        for i, prompt in enumerate(self.prompts[first:], first):
            row = found.setdefault(prompt, {"prompt": prompt} | {k: [] for k in columns})
            for name, column in columns.items():
                row[name].append(column[i])
        return list(found.values())


def numbered(values: list[Any]) -> Ints:
    """Each value's number in the order of first appearance: int64 [n]."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(v, len(numbers)) for v in values], dtype=np.int64)


def rank(keys: list[np.ndarray], groups: Ints) -> Ints:
    """Place of each row in its group, from 0, when sorted by `keys` (the first decides first);
    ties keep their order: int64 [n].
    """
    order = np.lexsort([*reversed(keys), groups])
    sizes = np.bincount(groups, minlength=1)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = np.empty(len(groups), dtype=np.int64)
    places[order] = np.arange(len(groups)) - starts[groups[order]]
    return places


def quantiles(scores: Floats, groups: Ints, count: int) -> Ints:
    """Quantile of each row in its group, 0 the best: int64 [n].

    The first count - 1 quantiles of a group of n hold floor(n / count) rows each, the last one the
    rest; ties keep the order of arrival (Lu et al. 2022, Quark: one group; ALT: a group per
    prompt). ValueError where a group has fewer rows than there are quantiles.
    """
    sizes = np.bincount(groups)
    if small := int((sizes < count).sum()):
        raise ValueError(
            f"{small} groups of completions have fewer than the {count} labels, the smallest "
            f"{int(sizes.min())}: raise algo.samples or algo.batch, or name fewer labels in "
            "algo.labels.names"
        )
    places = rank([-np.asarray(scores)], groups)
    return np.minimum(places // (sizes[groups] // count), count - 1)


def ties(scores: Floats, groups: Ints, labels: Ints) -> float:
    """Share of neighbors in the order of scores that equal scores, but different labels, part."""
    order = np.lexsort([labels, -np.asarray(scores), groups])
    same = np.diff(groups[order]) == 0
    parted = same & (np.diff(np.asarray(scores)[order]) == 0) & (np.diff(labels[order]) != 0)
    return float(parted.sum() / max(1, same.sum()))


def survivors(groups: Ints, drop: float, rng: np.random.Generator) -> Ints:
    """Rows of which each group of m keeps floor(m * (1 - drop)), drawn at random: int64 [k],
    ascending.
    """
    places = rank([rng.permutation(len(groups))], groups)
    kept = np.floor(np.bincount(groups, minlength=1) * (1.0 - drop) + 1e-9)
    return np.flatnonzero(places < kept[groups])


def balanced(
    prompts: Ints,
    labels: Ints,
    ended: np.ndarray,
    *,
    count: int,
    kinds: int,
    fill: bool,
    rng: np.random.Generator,
) -> Ints:
    """Rows to learn from: of each prompt floor(count / kinds) of every label, drawn at random,
    those that came to their own end first; then, with `fill`, the first unused rows of the prompt
    up to `count`: int64 [k], ascending.
    """
    cells = prompts * kinds + labels
    shuffled = rng.permutation(len(prompts))
    places = rank([~np.asarray(ended, dtype=bool), shuffled], numbered(cells.tolist()))
    chosen = places < count // kinds
    if fill:
        taken = np.bincount(prompts, weights=chosen, minlength=int(prompts.max()) + 1)
        waiting = rank([chosen.astype(np.int64)], prompts)  # the unused first, in their order
        chosen |= ~chosen & (waiting < (count - taken)[prompts])
    return np.flatnonzero(chosen)
