"""Format rules: what a completion scores that is no answer at all, whatever the reward thinks.

A rule is called after the reward, with its scores. Macijauskas 2023 (MLMI thesis, chapter 4) gives
-1 to completions other than Yes and No, after the reward's baseline is subtracted.
"""

import re
import string
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


def postprocess(text: str) -> str:
    """`text` without punctuation, spaces and line breaks at its end, as in the thesis; nothing is
    taken from its beginning.
    """
    return text.rstrip(string.punctuation + " \n")


def plain(text: str) -> str:
    """What two answers are compared by: post-processed, and without the whitespace in front, with
    which byte-level tokenizers begin a completion.
    """
    return postprocess(text).lstrip()


@dataclass(kw_only=True)
class ExactAnswers:
    """Only one of the answers keeps its score."""

    answers: list[str] | None = None  # null: the right answers of the data set
    otherwise: float = -1.0  # the score of anything else

    def __post_init__(self) -> None:
        self.allowed: set[str] = set()
        if self.answers is not None:
            self.fill(self.answers)

    def fill(self, known: Collection[str]) -> None:
        """Take the answers `known` to the data set, unless the config names some."""
        self.allowed = set(map(plain, known if self.answers is None else self.answers)) - {""}
        if not self.allowed:
            raise ValueError(
                "the format rule has no answers to allow: give reward.format_rule.answers, use a "
                "data set that knows the right ones, or set reward.format_rule=null"
            )

    def __call__(self, scores: Tensor, completions: list[str]) -> Tensor:
        """`scores` [n], with `otherwise` for each completion that is no answer."""
        return torch.where(self.valid(completions).to(scores.device), scores, self.otherwise)

    def valid(self, completions: list[str]) -> Tensor:
        """Which completions keep their score, bool [n]."""
        assert self.allowed, "fill the rule with the data set's answers first"
        return torch.tensor([plain(c) in self.allowed for c in completions], dtype=torch.bool)


@dataclass(kw_only=True)
class Pattern:
    """Only a completion that the pattern matches as a whole, whitespace included, keeps its score.
    For example ` ?(Yes|No)[.]?`.
    """

    pattern: str  # regular expression of Python's re
    otherwise: float = -1.0  # the score of anything else

    def __post_init__(self) -> None:
        try:
            self.compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern={self.pattern} is not a regular expression ({error}); mend it"
            ) from None

    def fill(self, known: Collection[str]) -> None:
        """The data set's answers do not matter to a pattern."""

    def __call__(self, scores: Tensor, completions: list[str]) -> Tensor:
        """`scores` [n], with `otherwise` for each completion that does not match."""
        return torch.where(self.valid(completions).to(scores.device), scores, self.otherwise)

    def valid(self, completions: list[str]) -> Tensor:
        """Which completions keep their score, bool [n]."""
        matched = [self.compiled.fullmatch(c) is not None for c in completions]
        return torch.tensor(matched, dtype=torch.bool)
