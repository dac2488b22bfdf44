"""Probes from class means: their difference, and linear discriminant analysis."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_exp.probes.head import Head, linear, statements


def class_means(rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] of the false rows and of the true ones."""
    return rows[y == 0].mean(0), rows[y == 1].mean(0)


@dataclass(kw_only=True)
class MeanDifference:
    """Mean of the true statements minus mean of the false ones; the boundary lies half-way."""

    normalise: str = "mean_var"
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = False

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        false, true = class_means(*statements(x, labels))
        w = true - false
        return linear(w, -float(w @ (true + false)) / 2)


@dataclass(kw_only=True)
class LDA:
    """S^-1 (mean true - mean false), S the pooled covariance within classes (ddof=0), shrunk
    towards a multiple of the identity: (1 - shrinkage) S + shrinkage tr(S)/d I.
    """

    normalise: str = "mean_var"
    shrinkage: float = 0.01
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} must be between 0 and 1")

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        rows, y = statements(x.double(), labels)
        false, true = class_means(rows, y)
        apart = rows - torch.where(y[:, None] == 1, true, false)
        within = apart.T @ apart / len(rows)
        d = len(within)
        level = within.trace() / d
        shrunk = (1 - self.shrinkage) * within + self.shrinkage * level * torch.eye(d).to(within)
        w = torch.linalg.lstsq(shrunk, (true - false)[:, None], driver="gelsd").solution[:, 0]
        return linear(w.to(x.dtype), -float(w @ (true + false)) / 2)
