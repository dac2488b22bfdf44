"""Directions found without labels from the differences of contrast pairs, and a random one.

Top principal component (CRC-TPC) and bimodal salience (BSS) are baselines of Burns et al. 2022
(arXiv 2212.03827, appendix); the sign of either is arbitrary and set afterwards. Left out: k-means.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlhf_exp.probes.head import Head, differences, linear


@dataclass(kw_only=True)
class TPC:
    """Top principal component of the normalised differences, not centred again; threshold 0."""

    normalise: str = "mean"
    supervised: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        d = differences(x).double()
        values, vectors = torch.linalg.eigh(d.T @ d / len(d))
        share = float(values[-1] / values.sum().clamp(min=1e-300))
        note = f"the component holds {share:.1%} of the differences' second moment"
        return linear(vectors[:, -1].to(x.dtype), notes=[note])


def salience(z: Tensor) -> Tensor:
    """(var(z < 0) + var(z >= 0)) / var(z) down the rows of z [n, restarts]: small for two narrow
    groups on either side of 0. Population variances; an empty group has none.
    """
    groups = torch.stack([z < 0, z >= 0]).to(z.dtype)
    count = groups.sum(1).clamp(min=1)
    mean = (groups * z).sum(1, keepdim=True) / count[:, None]
    inner = ((z - mean).square() * groups).sum(1) / count
    return inner.sum(0) / z.var(0, correction=0).clamp(min=1e-12)


@dataclass(kw_only=True)
class BSS:
    """Bimodal salience search: the unit direction whose projections fall into two narrow groups,
    the mean of `salience` over templates.
    """

    normalise: str = "mean"
    restarts: int = 20
    epochs: int = 20
    lr: float = 0.1
    supervised: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        generator = torch.Generator().manual_seed(seed)
        d = x[:, :, 1] - x[:, :, 0]  # [n, v, d]
        start = torch.randn(d.shape[-1], self.restarts, generator=generator).to(x)
        theta = nn.Parameter(start / start.norm(dim=0))
        optimizer = torch.optim.AdamW([theta], lr=self.lr)
        for _ in range(self.epochs):
            optimizer.zero_grad()
            self._loss(d, theta).sum().backward()
            optimizer.step()
            with torch.no_grad():
                theta /= theta.norm(dim=0)
        with torch.no_grad():
            losses = self._loss(d, theta)
        best = int(losses.argmin())
        note = f"salience {float(losses[best]):.4f}, the best of {self.restarts} restarts"
        return linear(theta.detach()[:, best], notes=[note])

    def _loss(self, d: Tensor, theta: Tensor) -> Tensor:
        """[restarts]"""
        return torch.stack([salience(d[:, j] @ theta) for j in range(d.shape[1])]).mean(0)


@dataclass(kw_only=True)
class Random:
    """A random unit direction: what a probe that has learnt nothing reports."""

    normalise: str = "mean"
    supervised: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x)
        return linear(direction / direction.norm())
