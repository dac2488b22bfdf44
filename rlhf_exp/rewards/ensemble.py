"""Reward-model ensembles (Coste et al. 2023, arXiv 2310.02743): mean, worst case, uncertainty
weighted.

The members share data and settings and differ by seed: head initialisation and data order.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.rewards import Fitting, Reward, score

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Ensemble(Reward):
    """`size` copies of `member` with seeds `member.seed`, `member.seed + 1`, ..."""

    member: Any  # any reward with a `seed`
    size: int = 5  # the paper finds 4 and 5 about equal, 3 worse
    objective: str = "uwo"  # mean, wco (worst member) or uwo (mean - uwo_weight * variance)
    uwo_weight: float = 0.5  # lambda of UWO; 0 is the mean
    # population (the paper, eq. 5) or unbiased (its released PPO code)
    variance: str = "population"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"reward.size={self.size} must be at least 1")
        losses.combine(torch.zeros(1, 1), self.objective, self.uwo_weight, self.variance)
        losses.ensemble_variance(torch.zeros(1, 1), self.variance)
        if not hasattr(self.member, "seed"):
            raise ValueError(
                f"reward.member={type(self.member).__name__} has no seed to differ by: use "
                "reward=mix instead"
            )
        self.members = [replace(self.member, seed=self.member.seed + i) for i in range(self.size)]
        if self.objective != "mean" and getattr(self.member, "normalise", None) == "none":
            logger.warning(
                "reward.objective=%s compares members whose scores have arbitrary offsets, "
                "because reward.member.normalise=none",
                self.objective,
            )

    @property
    def learns_from_pairs(self) -> bool:
        return self.member.learns_from_pairs

    def check(self) -> None:
        self.member.check()

    def fit(self, fitting: Fitting) -> None:
        for number, member in enumerate(self.members, 1):
            logger.info("reward member %d of %d", number, self.size)
            member.fit(fitting)

    def load(self, device: str | torch.device) -> None:
        for member in self.members:
            member.load(device)

    def member_scores(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Each member's scores [n], by name."""
        return {
            f"member_{i}": score(member, prompts, completions, f"reward member {i}").objective
            for i, member in enumerate(self.members)
        }

    def combine(self, members: dict[str, Tensor]) -> Tensor:
        return losses.combine(
            torch.stack(list(members.values())), self.objective, self.uwo_weight, self.variance
        )

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return self.combine(self.member_scores(prompts, completions))
