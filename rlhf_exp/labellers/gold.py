"""The gold reward as the labeller: it prefers what it scores higher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.labellers import Labeller
from rlhf_exp.rewards import score


@dataclass(kw_only=True)
class Gold(Labeller):
    """Errs only if it is soft: then it says what a Bradley-Terry rater would, of whom `scale` is
    the difference of scores that turns even odds into 73 to 27.
    """

    scale: float | None = (
        None  # P(left) = sigmoid(difference / scale); null: 1, 0, or 1/2 for a tie
    )

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"labeller.scale={self.scale} must be positive, or null")
        self.asks_gold = True

    def load(self, gold: Any, device: str | torch.device) -> None:
        self.gold = gold
        self.gold.load(device)

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        ahead = (
            score(self.gold, prompts, left, "gold").objective
            - score(self.gold, prompts, right, "gold").objective
        )
        return 0.5 + 0.5 * ahead.sign() if self.scale is None else (ahead / self.scale).sigmoid()
