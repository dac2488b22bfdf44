"""The pairs that wait for a label, and who has which of them in hand.

A person who asks for pairs keeps them until nothing was asked for `lease` seconds, so that two
people do not read the same one, unless a pair is to have several labels. Any thread may call; one
thread waits.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf_exp import signals
from rlhf_exp.labellers.person.store import Label, Store, key_of, last_of_each, now

# what a person may say, and the probability it gives to the text on the left
CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}
PRESENT = 30.0  # seconds after which somebody who asks for nothing counts as gone
REFRESH = 2.0  # seconds between looks at what other runs have added to the file
OTHERS_FIRST = 5.0  # seconds in which only others get a pair that somebody has let lie

Row = tuple[str, str, str]  # a prompt and two texts


class Closed(Exception):
    """The pair is not asked any more."""


@dataclass(frozen=True)
class Question:
    """A pair as one person sees it."""

    key: str
    prompt: str
    left: str
    right: str


def shown(row: Row, who: str) -> Question:
    """The two texts in an order that looks random, and is always the same for a pair and person."""
    prompt, *texts = row
    key = key_of(*row)
    turned = hashlib.sha256(f"{key} {who}".encode()).digest()[0] % 2 == 1
    left, right = sorted(texts, reverse=turned)
    return Question(key, prompt, left, right)


class Desk:
    """Hands pairs out and takes labels in, round by round."""

    def __init__(
        self,
        store: Store,
        *,
        labels_per_pair: int = 1,
        lease: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.labels_per_pair = store, labels_per_pair
        self.lease, self.clock = lease, clock
        self.changed = threading.Condition(threading.RLock())
        self.asking = False  # a round is on
        self.finished = False  # nothing will be asked any more
        self.rows: dict[str, Row] = {}  # of the round, by key
        self.open: list[str] = []  # keys that need labels, in the order of the round
        self.in_hand: dict[str, dict[str, float]] = {}  # until when, by key and person
        self.seen: dict[str, float] = {}  # when each person was here last
        self.touched = float("-inf")  # when something was last said
        self.refreshed = float("-inf")  # when the file was last looked at

    # ---- the run's side

    def ask(self, rows: Sequence[Row]) -> int:
        """Begin a round; how many of its pairs need labels."""
        with self.changed:
            self.rows = {key_of(*row): row for row in rows}
            self.in_hand, self.touched = {}, float("-inf")
            self._refresh()
            self.asking = bool(self.open) and not self.finished
            return len(self.open) if self.asking else 0

    def wait(self, seconds: float, *, grace: float = 0.0) -> bool:
        """Wait until something happens, `seconds` at most. Whether the round is over: all pairs are
        labelled and nothing was said for `grace` seconds, in which the last label can be taken
        back. KeyboardInterrupt if a signal has asked the run to stop.
        """
        with self.changed:
            if not self._settled(grace):
                self.changed.wait(seconds)
            if self.clock() - self.refreshed >= REFRESH:
                self._refresh()
            if (
                signals.received
            ):  # noted while a policy trains, which goes on until its step is done
                raise KeyboardInterrupt
            self.asking = self.asking and not self._settled(grace)
            return not self.asking

    def _settled(self, grace: float) -> bool:
        return self.finished or (not self.open and self.clock() - self.touched >= grace)

    def _refresh(self) -> None:
        self.store.refresh()
        self.refreshed = self.clock()
        self._count()

    def _count(self) -> None:
        wanted = self.labels_per_pair
        self.open = [k for k in self.rows if len(last_of_each(self.store.of(k))) < wanted]

    # ---- the people's side

    def take(self, who: str, count: int = 1) -> list[Question]:
        """At most `count` pairs for `who`, who has them in hand from now on."""
        with self.changed:
            now = self.seen[who] = self.clock()
            here = {k for k, hands in self.in_hand.items() if hands.get(who, now) > now}
            first = sorted(self.open, key=lambda key: key not in here)  # what is read stays
            keys = (key for key in first if self._hand_out(key, who))
            keys = islice(keys, count if self.asking else 0)
            return [shown(self.rows[key], who) for key in keys]

    def _hand_out(self, key: str, who: str) -> bool:
        """Whether `who` has the pair in hand from now on; who keeps asking keeps it."""
        now, people = self.clock(), set(last_of_each(self.store.of(key)))
        hands = self.in_hand.setdefault(key, {})
        others = {p for p, until in hands.items() if until > now and p != who}
        if who in people or len(others | people) >= self.labels_per_pair:
            return False
        mine = hands.get(who, float("-inf"))
        if mine <= now < mine + OTHERS_FIRST:
            return False
        hands[who] = now + self.lease
        return True

    def question(self, key: str, who: str) -> Question:
        """The pair as `who` sees it; Closed if it is not of this round."""
        with self.changed:
            if key not in self.rows:
                raise Closed
            return shown(self.rows[key], who)

    def label(
        self, question: Question, choice: str, *, who: str, id: str, seconds: float | None = None
    ) -> bool:
        """Write down what `who` says of a pair; False if the decision `id` is known already.

        Closed if the pair is not of this round, or the round is over; ValueError for a choice that
        there is not.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice={choice!r} is none of {', '.join(CHOICES)}")
        with self.changed:
            if id in self.store.ids:
                return False
            if not self.asking or question.key not in self.rows:
                raise Closed
            said = {"probability": CHOICES[choice], "who": who, "when": now(), "seconds": seconds}
            added = self.store.add(Label(id=id, **vars(question), **said))
            self._said(who)
            return added

    def undo(self, *, who: str, id: str) -> str | None:
        """Take back the last label that `who` gave in this round; the key of its pair, None if
        there is none, or the request `id` is known already. Closed if the round is over.
        """
        with self.changed:
            if id in self.store.ids:
                return None
            if not self.asking:
                raise Closed
            given = reversed(self.store.labels.values())
            last = next((x for x in given if x.who == who and x.key in self.rows), None)
            if last is None:
                return None
            self.store.take_back(last, id=id)
            self.rows = {last.key: self.rows[last.key]} | self.rows  # it comes next
            for hands in self.in_hand.values():
                hands.pop(who, None)
            self._said(who)
            return last.key

    def _said(self, who: str) -> None:
        self.seen[who] = self.touched = self.clock()
        self._count()
        self.changed.notify_all()

    def finish(self) -> None:
        """Ask nothing any more; who waits goes on."""
        with self.changed:
            self.finished, self.asking = True, False
            self.changed.notify_all()

    def state(self, who: str, count: int = 2) -> dict[str, Any]:
        """What a page shows to `who`: pairs to label, how far the round is, who else is there."""
        with self.changed:
            pairs = [vars(question) for question in self.take(who, count)]
            here = [p for p, t in self.seen.items() if self.clock() - t < PRESENT and p != who]
            return {
                "pairs": pairs,
                "done": len(self.rows) - len(self.open),
                "asked": len(self.rows),
                "others": len(here),
                "asking": self.asking,
                "finished": self.finished,
            }
