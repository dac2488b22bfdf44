"""Any labeller, wrong as often as one likes (Christiano et al. 2017 suppose 10 %).

The stage `preferences` has noise of its own (`preferences.noise_rate`), which is an exact share of
its pairs; this one serves wherever a labeller is asked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.labellers import Labeller, draw


@dataclass(kw_only=True)
class Noisy(Labeller):
    """Turns a share `rate` of what `labeller` says the other way round: always the same pairs, in
    whatever order they come and whichever is left.
    """

    labeller: Any
    rate: float = 0.1  # share of pairs
    seed: int = 0  # draws which

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"labeller.rate={self.rate} must be between 0 and 1")
        if self.labeller.source == "dataset":
            raise ValueError(
                "labeller=noisy asks a labeller about new completions, and labeller=dataset knows "
                "the data's own pairs only: set preferences.noise_rate in its place"
            )
        self.asks_gold, self.dear = self.labeller.asks_gold, self.labeller.dear

    def identity(self) -> dict[str, Any]:
        return {"labeller": self.labeller.identity()}

    def check(self) -> None:
        self.labeller.check()

    def open(self, directory: Path) -> None:
        self.labeller.open(directory)

    def load(self, gold: Any, device: str | torch.device) -> None:
        self.labeller.load(gold, device)

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        said = self.labeller(prompts, left, right)
        rows = zip(prompts, left, right, strict=True)
        drawn = torch.tensor([draw(self.seed, *row) / 2**64 for row in rows])
        return torch.where(drawn < self.rate, 1 - said, said)

    def finished(self) -> bool:
        return self.labeller.finished()

    def report(self) -> dict[str, float]:
        return self.labeller.report()
