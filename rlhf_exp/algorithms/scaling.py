"""What happens to scores before they become rewards: scaling, clipping, and the rule for
completions that never end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.choices import pick, require


@dataclass
class RunningMoments:
    """Mean and unbiased standard deviation of all numbers seen (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, x: Tensor) -> None:
        """Take in x [n]."""
        n, mean = x.numel(), float(x.double().mean())
        total, delta = self.count + n, mean - self.mean
        self.squares += (
            float((x.double() - mean).square().sum()) + delta**2 * self.count * n / total
        )
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0


def apply_missing_eos(scores: Tensor, ended: Tensor, rule: str, value: float) -> Tensor:
    """Scores [n] after the rule for completions without end-of-text: keep, subtract `value`, or
    replace by `-value`.
    """
    rules = {"keep": scores, "subtract": scores - value, "replace": torch.full_like(scores, -value)}
    return torch.where(ended, scores, pick(rule, rules, "algo.missing_eos"))


class ScoreScaling:
    """none; running: divide by the std of all scores so far; first_batch: by the std of the first
    batch; batch: standardise.

    `running` and `first_batch` do not shift (trlx); `batch` is (x - mean) / (std + 1e-5) of each
    batch (ARENA).
    """

    def __init__(self, method: str) -> None:
        require(method, ("none", "running", "first_batch", "batch"), "algo.score_scaling")
        self.method = method
        self.moments = RunningMoments()

    def __call__(self, scores: Tensor) -> Tensor:
        if self.method == "none":
            return scores
        if self.method == "batch":
            return (scores - scores.mean()) / (scores.std() + 1e-5) if len(scores) > 1 else scores
        if self.method == "running" or self.moments.count == 0:
            self.moments.update(scores)
        return scores / max(self.moments.std, 1e-8)

    def state(self) -> dict[str, Any]:
        return vars(self.moments).copy()

    def load_state(self, state: dict[str, Any]) -> None:
        self.moments = RunningMoments(**state)
