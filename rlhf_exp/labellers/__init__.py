"""A labeller answers one question: which of two completions is better, with what probability."""

from typing import Any, Protocol

from torch import Tensor


class Labeller(Protocol):
    """`source` says where pairs come from: sampled from the start policy, or the dataset's own,
    already in order.
    """

    source: str

    def load(self, gold: Any, device: Any) -> None: ...

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        """P(left is better) [n] in [0, 1]; NaN where it cannot say."""
        ...
