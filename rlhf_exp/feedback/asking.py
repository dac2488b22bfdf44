"""Asking a judge: again where its reply cannot be read, and nothing twice.

A reply is remembered under all that decides it, be it one that could not be read; one that never
came is asked for again when somebody next wants it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_exp.feedback.cache import Cache

if TYPE_CHECKING:
    from rlhf_exp.feedback import Question

T = TypeVar("T")
COUNTS = ("asked", "cached", "malformed", "failed", "retried")


class Asker:
    """Puts questions to `judge`, each up to `tries` times if another reply can come of it."""

    def __init__(self, judge: Any, tries: int) -> None:
        self.judge, self.tries = judge, tries
        self.memory: Cache | None = None
        self._identity: dict[str, Any] | None = None
        self._counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    @property
    def counts(self) -> dict[str, int]:
        """Since it was built: replies asked for, of which retried, and replies already known;
        questions that got malformed replies only, or none.
        """
        return self._counts | {"retried": self._counts["retried"] + self.judge.retried}

    def open(self, path: Path, setting: str) -> None:
        """Remember replies in the file `path`, which `setting` names, if they are worth it."""
        self._identity = self.judge.identity()
        if self._identity is not None:
            self.memory = Cache(path.expanduser(), setting)

    def replies(
        self, questions: Sequence["Question"], read: Callable[[str], T | None]
    ) -> list[T | None]:
        """What `read` makes of the reply to each question; None where no reply came, or none that
        it could read.
        """
        return self._found(questions, read, ())

    def choices(
        self, questions: Sequence["Question"], options: Sequence[str]
    ) -> list[list[float] | None]:
        """Log-probabilities of the `options` as the answer to each question; None where no reply
        came, or none that is an option.
        """
        return self._found(questions, _log_probabilities, tuple(options))

    # ---- inside

    def _found(
        self,
        questions: Sequence["Question"],
        read: Callable[[str], T | None],
        options: tuple[str, ...],
    ) -> list[T | None]:
        waiting = list(dict.fromkeys(questions))
        self._counts["cached"] += len(questions) - len(waiting)
        found: dict[Question, T | None] = {}
        for attempt in range(self.tries if self.judge.varies else 1):
            replies = self._replies(waiting, options, attempt)
            found |= {q: read(reply) for q, reply in replies.items()}
            waiting = [q for q in replies if found[q] is None]
        self._counts["malformed"] += sum(q in found and found[q] is None for q in questions)
        self._counts["failed"] += sum(q not in found for q in questions)
        return [found.get(q) for q in questions]

    def _replies(
        self, questions: list["Question"], options: tuple[str, ...], attempt: int
    ) -> dict["Question", str]:
        """Replies by question, those that never came left out."""
        keys = {q: self._key(q, options, attempt) for q in questions}
        known = self.memory.replies if self.memory is not None else {}
        replies = {q: known[key] for q, key in keys.items() if key in known}
        unknown = [q for q in questions if q not in replies]
        self._count(cached=len(replies), asked=len(unknown))
        self._count(retried=len(unknown) if attempt else 0)
        try:
            for i, reply in self._asked(unknown, options, attempt):
                if reply is not None:
                    replies[unknown[i]] = reply
                    self._remember(unknown[i], keys[unknown[i]], reply)
        finally:  # what was answered before a judge went down is kept
            if self.memory is not None:
                self.memory.flush()
        return {q: replies[q] for q in questions if q in replies}

    def _asked(
        self, questions: list["Question"], options: tuple[str, ...], attempt: int
    ) -> Iterable[tuple[int, str | None]]:
        """What the judge says, as text: log-probabilities of options as a JSON list."""
        if not questions:
            return ()
        if not options:
            return self.judge(questions, attempt)
        said = self.judge.choose(questions, options, attempt)
        return ((i, None if answer is None else json.dumps(answer)) for i, answer in said)

    def _key(self, question: "Question", options: tuple[str, ...], attempt: int) -> str:
        """Names a reply by all that decides it: instruction and text, judge, attempt."""
        spec = [question.messages, question.max_tokens, self._identity, attempt]
        spec += [options] if options else []
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    def _remember(self, question: "Question", key: str, reply: str) -> None:
        if self.memory is not None:
            about = {"prompt": question.prompt, "completion": question.completion}
            about |= {"other": question.other} if question.other is not None else {}
            self.memory.add({"key": key} | about | {"reply": reply})

    def _count(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._counts[name] += number


def _log_probabilities(reply: str) -> list[float] | None:
    """Those in a remembered answer; None if it is words."""
    said = json.loads(reply)
    return said if isinstance(said, list) else None
