"""What conditional training puts before a prompt: a label that tells how good the completion is.

A labelling asks about new completions (`judge`), labels the whole pool (`label`), and names the
label to ask for when sampling (`best`). Quark, ALT and SteerLM differ in this and in numbers.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from rlhf_exp import processes
from rlhf_exp.algorithms.pool import Pool, numbered, quantiles, ties
from rlhf_exp.choices import require
from rlhf_exp.feedback import Feedback
from rlhf_exp.policy import Rollouts

logger = logging.getLogger(__name__)


class Labelling(Protocol):
    """`names` are the labels, best first, where they are known beforehand; `kinds` how many ranks
    there are.
    """

    names: list[str]
    kinds: int
    asks: ClassVar[bool] = False  # whether `judge` asks anybody
    scope: str = ""  # pool or prompt, where labels are quantiles of it
    quantiles: int = 1  # how many

    def check(self) -> None:
        """Refuse what can be known to fail before anything loads."""

    def load(self, device: Any, directory: Path) -> None:
        """Bring what is asked to a device; caches go to `directory`."""

    def judge(self, rollouts: Rollouts) -> list[Feedback | None] | None:
        """What is said of each completion, None where nothing usable was; or None if nobody is
        asked.
        """

    def usable(self, feedback: Feedback | None) -> Feedback | None:
        """`feedback` from a file, or None if the judge could not have said it."""
        return feedback

    def label(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        """Label of each row of the pool, and its rank from 0, the best: int64 [n]."""
        ...

    def cells(self, pool: Pool) -> np.ndarray:
        """The group of each row of which the pool forgets a share: its label, or its label among
        those of its prompt: int64 [n].
        """
        ranks = self.label(pool)[1]
        if self.scope != "prompt":
            return ranks
        return numbered(list(zip(pool.prompts, ranks.tolist(), strict=True)))

    def best(self, pool: Pool, rng: np.random.Generator) -> str:
        """The label to ask for."""
        return self.names[0]

    def metrics(self) -> dict[str, float]:
        """What is worth knowing of the last labelling."""
        return {}


def _parted(scores: Any, groups: np.ndarray, count: int, what: str) -> np.ndarray:
    """Quantiles, unless there is nothing to tell apart."""
    scores = np.asarray(scores)
    if scores.min() == scores.max():
        raise ValueError(
            f"{what} gives all {len(scores)} completions of the pool the score {scores[0]:.4g}, so "
            "no label would mean more than another: use another reward, or let the policy vary "
            "more (policy.temperature)"
        )
    return quantiles(scores, groups, count)


@dataclass(kw_only=True)
class Quantiles(Labelling):
    """Quantiles of the reward: over the whole pool (Quark) or of each prompt by itself (ALT_RM)."""

    names: list[str]  # best first
    scope: str = "pool"  # pool or prompt

    def __post_init__(self) -> None:
        require(self.scope, ("pool", "prompt"), "algo.labels.scope")
        _distinct(self.names)
        self.kinds = self.quantiles = len(self.names)
        self.tied = 0.0

    def label(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        groups = pool.groups() if self.scope == "prompt" else np.zeros(len(pool), dtype=np.int64)
        found = _parted(pool.scores, groups, self.kinds, "the reward")
        self.tied = ties(np.asarray(pool.scores), groups, found)
        return [self.names[i] for i in found], found

    def metrics(self) -> dict[str, float]:
        return {"labels/tied": self.tied}


@dataclass(kw_only=True)
class Attributes(Labelling):
    """Several quantiles at once, one for each named member of the reward, each with phrases of its
    own, joined: "relevant, and factual, and complete".
    """

    attributes: dict[str, list[str]] = field(default_factory=dict)  # member -> phrases, best first
    scope: str = "prompt"  # pool or prompt
    joint: str = ", and "

    def __post_init__(self) -> None:
        require(self.scope, ("pool", "prompt"), "algo.labels.scope")
        lengths = {len(phrases) for phrases in self.attributes.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"algo.labels.attributes={self.attributes} must name members of the reward, each "
                "with the same number of phrases"
            )
        self.names = [self.joint.join(p) for p in zip(*self.attributes.values(), strict=True)]
        self.quantiles = len(self.names)
        self.kinds = len(self.attributes) * (self.quantiles - 1) + 1

    def label(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        groups = pool.groups() if self.scope == "prompt" else np.zeros(len(pool), dtype=np.int64)
        columns = []
        for member in self.attributes:
            if member not in pool.members:
                raise ValueError(
                    f"algo.labels.attributes names {member!r}, and the reward has the members "
                    f"{', '.join(pool.members) or 'none'}: name these"
                )
            columns.append(
                _parted(pool.members[member], groups, self.quantiles, f"member {member}")
            )
        phrases = list(self.attributes.values())
        texts = [
            self.joint.join(p[q] for p, q in zip(phrases, row, strict=True))
            for row in zip(*columns, strict=True)
        ]
        return texts, np.sum(columns, axis=0)


@dataclass(kw_only=True)
class Judged(Labelling):
    """What a judge says of each completion."""

    feedback: Any  # who is asked, and what
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.names = []
        self.before: dict[str, int] = {}

    def check(self) -> None:
        self.feedback.check()

    def load(self, device: Any, directory: Path) -> None:
        self.feedback.open(directory)
        self.feedback.load(device)

    def judge(self, rollouts: Rollouts) -> list[Feedback | None]:
        self.before = dict(self.feedback.counts)
        return processes.first(lambda: self.feedback(rollouts.prompts, rollouts.completions))

    def cells(self, pool: Pool) -> np.ndarray:
        return pool.groups()

    def metrics(self) -> dict[str, float]:
        """Of the last asking; what a cache answered is told in the log only, as a resumed run finds
        more there.
        """
        new = {k: v - self.before[k] for k, v in self.feedback.counts.items()}
        logger.info("feedback: %s", ", ".join(f"{v} {k}" for k, v in new.items()))
        return {f"feedback/{k}": float(new[k]) for k in ("malformed", "failed")}


@dataclass(kw_only=True)
class Categories(Judged):
    """One of a few categories (ALT_LMC), or the task's attribute string for it (SteerLM)."""

    attributes: bool = False  # say attribute strings, not categories

    def __post_init__(self) -> None:
        super().__post_init__()
        task = self.feedback.task
        self.places = {name: i for i, name in enumerate(task.names)}
        if self.attributes and task.attributes is None:
            raise ValueError(
                "algo.labels.attributes=true needs a string for each category: give "
                "algo.labels.feedback.task.attributes"
            )
        self.names = [task.attributes[c] if self.attributes else c for c in task.names]
        _distinct(self.names)
        self.kinds = len(self.names)

    def usable(self, feedback: Feedback | None) -> Feedback | None:
        return self.feedback.task.parse(feedback.text) if feedback is not None else None

    def label(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        found = np.array([self.places[f] for f in pool.feedbacks], dtype=np.int64)
        return [self.names[i] for i in found], found


@dataclass(kw_only=True)
class FreeForm(Judged):
    """A sentence with a grade (ALT_LMU); sampling asks with an example of the best grade."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.highest: int = self.feedback.task.highest  # whole grades are kept in balance
        self.kinds = self.highest + 1

    def usable(self, feedback: Feedback | None) -> Feedback | None:
        if feedback is None or not isinstance(feedback.score, int | float):
            return None
        return feedback if feedback.text and 0 <= feedback.score <= self.highest else None

    def label(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        return list(pool.feedbacks), self.highest - np.floor(pool.grades).astype(np.int64)

    def best(self, pool: Pool, rng: np.random.Generator) -> str:
        top = max(pool.grades)
        pairs = zip(pool.feedbacks, pool.grades, strict=True)
        return str(rng.choice([feedback for feedback, grade in pairs if grade == top]))


def _distinct(names: list[str]) -> None:
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise ValueError(f"algo.labels.names={names} must be two or more labels, all different")
