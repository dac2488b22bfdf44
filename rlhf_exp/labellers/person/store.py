"""Labels that people gave, in a JSONL file that only grows: a row for each decision, and a row for
each one taken back.

A label is found again by the content of its pair, so a run that starts again asks only what nobody
has answered yet. Runs may share a file, and files may be joined: a row that comes twice counts
once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from rlhf_exp.ledger import Ledger


def key_of(prompt: str, one: str, other: str) -> str:
    """Names a pair by its content, whichever text comes first."""
    return hashlib.sha256(json.dumps([prompt, *sorted((one, other))]).encode()).hexdigest()


def now() -> str:
    """UTC, ISO, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Label:
    """One decision of one person. `left` is the text that was shown on the left."""

    id: str  # made by whoever sends it, so that the same decision sent twice counts once
    key: str
    prompt: str
    left: str
    right: str
    probability: float | None  # that `left` is better; 1/2 is a tie, None: the pair was skipped
    who: str
    when: str  # UTC, ISO
    seconds: float | None  # from showing to deciding

    def __post_init__(self) -> None:
        texts = (self.id, self.key, self.prompt, self.left, self.right, self.who, self.when)
        if not all(isinstance(text, str) for text in texts) or not (self.id and self.who.strip()):
            raise ValueError("its texts must be texts, and id and who not empty")
        if self.key != key_of(self.prompt, self.left, self.right):
            raise ValueError("its key is not that of its texts")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise ValueError(f"its probability {self.probability} is not between 0 and 1")
        if self.seconds is not None and not (isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"its seconds {self.seconds} are no length of time")

    def of(self, text: str) -> float | None:
        """The probability that `text`, one of the two, is better."""
        if self.probability is None or text == self.left:
            return self.probability
        return 1 - self.probability


def last_of_each(labels: Sequence[Label]) -> dict[str, Label]:
    """The last label of each person, by name."""
    return {label.who: label for label in labels}


def combined(labels: Sequence[Label], text: str) -> float:
    """P(`text` is better): the mean of the last labels of those who said; NaN if nobody did."""
    said = [p for label in last_of_each(labels).values() if (p := label.of(text)) is not None]
    return sum(said) / len(said) if said else float("nan")


class Store:
    """The labels of the file at `path`; what is added is on the disk when the call returns.

    ValueError names file and line of a row that is neither a label nor takes one back.
    """

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self.ids: set[str] = set()
        self.labels: dict[str, Label] = {}  # those that were not taken back, in order, by id
        self.pairs: dict[str, dict[str, Label]] = {}  # the same by pair
        with self.ledger.held():
            self._catch_up()

    def refresh(self) -> None:
        """Read what other runs have added to the file."""
        if self.ledger.grown():
            with self.ledger.held():
                self._catch_up()

    def of(self, key: str) -> list[Label]:
        """Labels of a pair that were not taken back, in order."""
        return list(self.pairs.get(key, {}).values())

    def add(self, label: Label) -> bool:
        """Write a label down; False if it is known already."""
        return self._append(label.id, asdict(label))

    def take_back(self, label: Label, *, id: str) -> bool:
        """Let `label` hold no longer; False if the row `id`, which says so, is known already."""
        row = {"id": id, "undo": label.id, "key": label.key, "who": label.who, "when": now()}
        return self._append(id, row)

    def _append(self, id: str, row: dict[str, Any]) -> bool:
        with self.ledger.held():
            self._catch_up()
            if id in self.ids:
                return False
            self.ledger.write([row])
            self._catch_up()
        return True

    def _catch_up(self) -> None:
        for line in self.ledger.rows():
            try:
                self._take_in(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.ledger.path}, line {self.ledger.lines}: not a label of a person "
                    f"({error}); remove the line, or name another file as labeller.file"
                ) from None

    def _take_in(self, row: dict[str, Any]) -> None:
        if row["id"] in self.ids:
            return
        if "undo" in row:
            if row["undo"] not in self.ids:
                raise ValueError(f"it takes back {row['undo']!r}, which no row before it is")
            label = self.labels.pop(row["undo"], None)  # two may have taken the same back
            if label is not None:
                del self.pairs[label.key][label.id]
        else:
            label = Label(**row)
            self.labels[label.id] = self.pairs.setdefault(label.key, {})[label.id] = label
        self.ids.add(row["id"])
