"""What every data set hands to the stages: prompts, demonstrations, preference pairs, and
statements whose truth is known.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Demonstration:
    """One supervised example: the loss falls on the completion only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the better one first."""

    prompt: str
    chosen: str
    rejected: str
    probability: float = 1.0  # that `chosen` is the better one: a soft label


@dataclass(frozen=True)
class Statement:
    """Something to be judged. A template turns `fields` into a question with an answer for each
    label; `label` is the index of the right answer.
    """

    fields: dict[str, Any]
    label: int


def subject(fields: dict[str, Any]) -> str:
    """What a statement with these fields is about: its prompt, or all of them. Statements about
    one thing stay on one side of a split.
    """
    return str(fields.get("prompt", fields))


@dataclass(kw_only=True)
class Dataset:
    """The splits of one data set. `held_out` prompts are never trained on."""

    prompts: list[str]
    held_out: list[str]
    demonstrations: list[Demonstration] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    held_out_pairs: list[Pair] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    held_out_statements: list[Statement] = field(default_factory=list)
    templates: str | None = None  # the set of templates written for the statements
    answers: dict[str, str] = field(default_factory=dict)  # the right completion, by prompt
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # rows by role and reason
