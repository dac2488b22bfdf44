"""Feedback in words on what a policy wrote, for algorithms that learn from text (ALT).

A provider is a task (what is asked, and how a reply is read) and a judge (who answers): rules, a
local model, or an endpoint. Judges know nothing of tasks, so whatever else asks for replies in
words can use them.

Left out: feedback by several judges at once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf_exp.feedback.cache import Cache


@dataclass(frozen=True)
class Feedback:
    """What a judge said of one completion."""

    text: str  # a category, or one sentence
    score: float | None = None
    analysis: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What rules find in one completion, before a task puts it into words."""

    quality: float  # share of the points earned, in [0, 1]
    sentence: str  # names strengths and weaknesses
    analysis: str


@dataclass(frozen=True)
class Question:
    """What a judge is asked. A model reads `messages`; rules read what the messages are about."""

    messages: tuple[tuple[str, str], ...]  # turns: (role, content)
    max_tokens: int  # longest reply
    prompt: str
    completion: str
    write: Callable[[Verdict], str] = field(compare=False)  # a verdict in the form asked for


class Task(Protocol):
    """What is asked of each completion."""

    def question(self, prompt: str, completion: str) -> Question: ...

    def parse(self, reply: str) -> Feedback | None:
        """None for a reply that does not have the form asked for."""
        ...


class Judge(Protocol):
    """Who answers. One that checks, loads or remembers nothing writes `__call__` alone."""

    varies: bool = False  # whether asking again can get another reply
    retried: int = 0  # requests made again since it was built, because one failed

    def identity(self) -> dict[str, Any] | None:
        """What decides the replies beside the question; None: they are not worth remembering."""
        return None

    def check(self) -> None:
        """Refuse what can be known to fail before anything loads."""

    def load(self, device: str | torch.device) -> None:
        """Bring it to a device."""

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterable[tuple[int, str | None]]:
        """Position and reply of each question, in any order, as they come; None: no reply came.

        `attempt` counts from 0; later ones follow replies that could not be read. Raises
        ConnectionError when nobody answers any more.
        """
        ...


@dataclass(kw_only=True)
class Provider:
    """Asks `judge` what `task` wants to know, and remembers every reply it waited for."""

    task: Any  # what is asked
    judge: Any  # who answers
    tries: int = 5  # times a question is asked before its replies count as malformed
    # JSONL file of replies, shared by the runs that name it; null: feedback.jsonl of each run
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"feedback.tries={self.tries} must be at least 1")
        self.memory: Cache | None = None
        self._identity: dict[str, Any] | None = None
        names = ("asked", "cached", "malformed", "failed", "retried")
        self._counts: dict[str, int] = dict.fromkeys(names, 0)

    @property
    def counts(self) -> dict[str, int]:
        """Since it was built: replies asked for, of which retried, and replies already known;
        completions without feedback because the replies were malformed, or none came.
        """
        return self._counts | {"retried": self._counts["retried"] + self.judge.retried}

    def check(self) -> None:
        """Refuse what can be known to fail before anything loads."""
        self.judge.check()

    def load(self, device: str | torch.device) -> None:
        """Bring the judge to a device."""
        self.judge.load(device)

    def open(self, directory: Path) -> None:
        """Remember replies in the run directory, unless `cache` names another place."""
        self._identity = self.judge.identity()
        if self._identity is not None:
            path = directory / "feedback.jsonl" if self.cache is None else Path(self.cache)
            self.memory = Cache(path.expanduser())

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Feedback | None]:
        """Feedback on each completion; None where no reply came, or none that could be read."""
        pairs = zip(prompts, completions, strict=True)
        questions = [self.task.question(p, c) for p, c in pairs]
        waiting = list(dict.fromkeys(questions))
        self._counts["cached"] += len(questions) - len(waiting)
        found: dict[Question, Feedback | None] = {}
        for attempt in range(self.tries if self.judge.varies else 1):
            replies = self._replies(waiting, attempt)
            found |= {q: self.task.parse(reply) for q, reply in replies.items()}
            waiting = [q for q in replies if found[q] is None]
        self._counts["malformed"] += sum(q in found and found[q] is None for q in questions)
        self._counts["failed"] += sum(q not in found for q in questions)
        return [found.get(q) for q in questions]

    def _replies(self, questions: list[Question], attempt: int) -> dict[Question, str]:
        """Replies by question, those that never came left out."""
        keys = {q: self._key(q, attempt) for q in questions}
        known = self.memory.replies if self.memory is not None else {}
        replies = {q: known[key] for q, key in keys.items() if key in known}
        unknown = [q for q in questions if q not in replies]
        self._count(cached=len(replies), asked=len(unknown))
        self._count(retried=len(unknown) if attempt else 0)
        try:
            for i, reply in self.judge(unknown, attempt) if unknown else ():
                if reply is not None:
                    replies[unknown[i]] = reply
                    self._remember(unknown[i], keys[unknown[i]], reply)
        finally:  # what was answered before a judge went down is kept
            if self.memory is not None:
                self.memory.flush()
        return {q: replies[q] for q in questions if q in replies}

    def _key(self, question: Question, attempt: int) -> str:
        """Names a reply by all that decides it: instruction and text, judge, attempt."""
        spec = [question.messages, question.max_tokens, self._identity, attempt]
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    def _remember(self, question: Question, key: str, reply: str) -> None:
        if self.memory is not None:
            about = {"prompt": question.prompt, "completion": question.completion}
            self.memory.add({"key": key} | about | {"reply": reply})

    def _count(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._counts[name] += number
