"""A labeller answers one question: which of two completions is better, with what probability.

What it says is soft: 1 and 0 are certain, 1/2 is a tie, NaN is no answer. Who wants errors on top
wraps one in `noisy`.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


def draw(seed: int, prompt: str, left: str, right: str) -> int:
    """A number below 2**64 for a pair: the same whichever completion is left, and whatever was
    drawn before.
    """
    text = "\0".join([str(seed), prompt, *sorted((left, right))])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Labeller(Protocol):
    """One that checks, loads or remembers nothing writes `__call__` alone."""

    source: str = "sampled"  # where pairs come from: sampled from a policy, or the `dataset`'s own
    asks_gold: bool = False  # whether the gold reward decides
    dear: bool = False  # whether a label costs somebody's time or money, so that none is wasted

    def identity(self) -> dict[str, Any]:
        """What to put in place of settings in the fingerprint of pairs: the weights or the content
        of a file that one names; None for one that decides no label.
        """
        return {}

    def check(self) -> None:
        """Refuse what can be known to fail before anything samples or loads."""

    def open(self, directory: Path) -> None:
        """Keep what must outlive the run in, or beside, its directory."""

    def load(self, gold: Any, device: str | torch.device) -> None:
        """Bring it to a device; `gold` is the gold reward, loaded by whoever asks it."""

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        """P(left is better) [n] in [0, 1], on the CPU; NaN where it cannot say."""
        ...

    def finished(self) -> bool:
        """Whether somebody has asked it to say no more: what it has said must do."""
        return False

    def report(self) -> dict[str, float]:
        """What is worth knowing of the labels given since it was built, by name."""
        return {}
