"""The gold reward as the labeller: it prefers what it scores higher."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rlhf_exp.rewards import score


@dataclass(kw_only=True)
class Gold:
    """Never errs; a tie is one half. Noise is added by `preferences.noise_rate`."""

    source: ClassVar[str] = "sampled"

    def load(self, gold: Any, device: Any) -> None:
        self.gold = gold
        self.gold.load(device)

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        ahead = (
            score(self.gold, prompts, left, "gold").objective
            - score(self.gold, prompts, right, "gold").objective
        )
        return 0.5 + 0.5 * ahead.sign()
