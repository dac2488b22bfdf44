"""A weighted sum of rewards: `reward=mix` with `reward.parts.<name>.reward` and `.weight`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.rewards import Fitting, Reward, ask, facets


@dataclass(kw_only=True)
class Part:
    """One term of the sum."""

    reward: Any
    weight: float = 1.0


@dataclass(kw_only=True)
class Mix(Reward):
    """sum of weight * reward over the parts; each part is shown in the metrics under its name."""

    parts: dict[str, Any]

    def __post_init__(self) -> None:
        self.parts = {
            name: part if isinstance(part, Part) else Part(**part)
            for name, part in self.parts.items()
        }
        if not self.parts:
            raise ValueError(
                "reward.parts is empty: name at least one part with a reward and a weight"
            )

    @property
    def learns_from_pairs(self) -> bool:
        return any(part.reward.learns_from_pairs for part in self.parts.values())

    def check(self, fitting: Fitting) -> None:
        for part in self.parts.values():
            part.reward.check(fitting)

    def fit(self, fitting: Fitting) -> None:
        for part in self.parts.values():
            part.reward.fit(fitting)

    def load(self, device: str | torch.device) -> None:
        for part in self.parts.values():
            part.reward.load(device)

    def member_scores(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Each part's unweighted scores [n], by name."""
        return {
            name: ask(part.reward, prompts, completions, name).objective
            for name, part in self.parts.items()
        }

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Those of the parts."""
        return facets((part.reward for part in self.parts.values()), prompts, completions)

    def combine(self, members: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [self.parts[name].weight * scores for name, scores in members.items()]
        ).sum(0)

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return self.combine(self.member_scores(prompts, completions))
