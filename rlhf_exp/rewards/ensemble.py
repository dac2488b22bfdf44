"""Reward-model ensembles (Coste et al. 2023, arXiv 2310.02743): mean, worst case, uncertainty
weighted.

The members share data and settings and differ by seed: head initialisation and data order. Or they
are of different kinds, each named, with scores made comparable by their own statistics.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.rewards import Fitting, Reward, ask, facets

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Ensemble(Reward):
    """`size` copies of `member` with seeds `member.seed`, `member.seed + 1`, ...; or `named`."""

    member: Any = None  # any reward with a `seed`
    # rewards of any kinds by name, in place of copies of one
    named: dict[str, Any] = field(default_factory=dict)
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
        if (self.member is None) == (not self.named):
            raise ValueError(
                "an ensemble is either reward.size copies of reward.member or the rewards in "
                "reward.named: give one of them and leave the other null or {}"
            )
        self.members = self.named or self._copies()
        scales = {name: _scale(member) for name, member in self.members.items()}
        odd = [name for name, scale in scales.items() if scale != "standardised"]
        if self.objective != "mean" and odd and set(scales.values()) != {"probability"}:
            logger.warning(
                "reward.objective=%s compares members, and the scores of %s have a scale of their "
                "own: set their normalise or standardise",
                self.objective,
                ", ".join(odd),
            )

    def _copies(self) -> dict[str, Any]:
        if not hasattr(self.member, "seed"):
            raise ValueError(
                f"reward.member={type(self.member).__name__} has no seed to differ by: use "
                "reward=mix instead"
            )
        seeds = range(self.member.seed, self.member.seed + self.size)
        return {f"member_{i}": replace(self.member, seed=seed) for i, seed in enumerate(seeds)}

    @property
    def learns_from_pairs(self) -> bool:
        return any(member.learns_from_pairs for member in self.members.values())

    def check(self, fitting: Fitting) -> None:
        for member in self.members.values():
            member.check(fitting)

    def fit(self, fitting: Fitting) -> None:
        for name, member in self.members.items():
            logger.info("reward %s of %d", name, len(self.members))
            member.fit(fitting)

    def load(self, device: str | torch.device) -> None:
        for member in self.members.values():
            member.load(device)

    def member_scores(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Each member's scores [n], by name."""
        return {
            name: ask(member, prompts, completions, f"reward {name}").objective
            for name, member in self.members.items()
        }

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Those of the members."""
        return facets(self.members.values(), prompts, completions)

    def combine(self, members: dict[str, Tensor]) -> Tensor:
        return losses.combine(
            torch.stack(list(members.values())), self.objective, self.uwo_weight, self.variance
        )

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return self.combine(self.member_scores(prompts, completions))


def _scale(member: Any) -> str:
    """What a member's scores are measured in."""
    if getattr(member, "standardise", getattr(member, "normalise", "none") != "none"):
        return "standardised"
    return getattr(member, "score", "arbitrary")
