"""Feedback in words on what a policy wrote, for algorithms that learn from text (ALT).

A provider is a task (what is asked, and how a reply is read) and a judge (who answers): rules, a
local model, or an endpoint. Judges know nothing of tasks, so whatever else asks for replies in
words can use them. A judge can also be asked which of a few options it would answer with, and how
sure it is: labels and scores come from that.

Left out: feedback by several judges at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf_exp.feedback.asking import Asker


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
    other: str | None = None  # of two completions, the second


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

    def check_options(self, options: Sequence[str]) -> None:
        """ValueError, before anything loads, if it cannot choose among `options`."""

    def choose(
        self, questions: Sequence[Question], options: Sequence[str], attempt: int
    ) -> Iterable[tuple[int, list[float] | str | None]]:
        """As `__call__`, but log-probabilities of `options` [len(options)] as the answer to each
        question, up to a constant; a text if the answer is none of them.
        """
        raise ValueError(f"the judge {type(self).__name__} writes replies and chooses no options")


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
        self.asker = Asker(self.judge, self.tries)

    @property
    def counts(self) -> dict[str, int]:
        """Since it was built: replies asked for, of which retried, and replies already known;
        completions without feedback because the replies were malformed, or none came.
        """
        return self.asker.counts

    def check(self) -> None:
        """Refuse what can be known to fail before anything loads."""
        self.judge.check()

    def load(self, device: str | torch.device) -> None:
        """Bring the judge to a device."""
        self.judge.load(device)

    def open(self, directory: Path) -> None:
        """Remember replies in the run directory, unless `cache` names another place."""
        path = directory / "feedback.jsonl" if self.cache is None else Path(self.cache)
        self.asker.open(path, "feedback.cache")

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Feedback | None]:
        """Feedback on each completion; None where no reply came, or none that could be read."""
        pairs = zip(prompts, completions, strict=True)
        return self.asker.replies([self.task.question(p, c) for p, c in pairs], self.task.parse)
