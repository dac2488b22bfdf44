"""VINC, the eigen reporter of EleutherAI's elk: variance, invariance, negative covariance.

With template means c_ij of example i and answer j, and population covariances:
V = mean_j Cov_i(c_ij), I = mean_ij Cov over the templates of one example and answer,
N = mean over ordered pairs j != j' of CrossCov_i(c_ij, c_ij'). The probe is the top eigenvector of
a V - (1 - b) I - b N, after the directions that tell the answers apart have been erased.

The moments are gathered in a stream; over any split of the data they equal those of one pass.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_exp.probes.head import Head, linear


class Moments:
    """Running V, I and N of states [n, v, 2, d], in float64."""

    def __init__(self, *, centroids: bool = True) -> None:
        self.centroids = centroids
        self.count, self.examples = 0, 0
        self.mean = self.scatter = self.within = torch.zeros(())

    def update(self, x: Tensor) -> "Moments":
        """Take in more examples [n, v, 2, d]."""
        n, v, k, _ = x.shape
        double = x.double()
        centre = double.mean(1, keepdim=True)
        inner = (double - centre).flatten(0, 2)
        rows = (centre if self.centroids else double).flatten(0, 1)  # [samples, k, d]
        mean = rows.mean(0)
        apart = rows - mean
        scatter = torch.einsum("nkd,nle->klde", apart, apart)
        if not self.count:
            self.mean, self.scatter = mean, scatter
            self.within = inner.T @ inner / (v * k)
        else:
            total, gap = self.count + len(rows), mean - self.mean
            share = self.count * len(rows) / total
            self.scatter = self.scatter + scatter + share * torch.einsum("kd,le->klde", gap, gap)
            self.mean = self.mean + gap * len(rows) / total
            self.within = self.within + inner.T @ inner / (v * k)
        self.count += len(rows)
        self.examples += n
        return self

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, I, N, each [d, d]; N is symmetric because both orders of a pair are in it."""
        covariance = self.scatter / self.count  # [k, k, d, d]
        k = len(covariance)
        variance = torch.stack([covariance[j, j] for j in range(k)]).mean(0)
        others = [covariance[i, j] for i in range(k) for j in range(k) if i != j]
        return variance, self.within / self.examples, torch.stack(others).mean(0)


@dataclass(kw_only=True)
class VINC:
    """The top eigenvector of `var_weight` V - (1 - `neg_cov_weight`) I - `neg_cov_weight` N."""

    normalise: str = "correlation"
    var_weight: float = 0.0  # a
    neg_cov_weight: float = 0.5  # b
    centroids: bool = True  # false: every template is a sample of its own
    supervised: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.neg_cov_weight <= 1 or self.var_weight < 0:
            raise ValueError(
                f"neg_cov_weight={self.neg_cov_weight} must be between 0 and 1 and "
                f"var_weight={self.var_weight} at least 0"
            )

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        direction, value = self.solve(Moments(centroids=self.centroids).update(x))
        return linear(direction.to(x.dtype), notes=[f"eigenvalue {value:.4g}"])

    def solve(self, moments: Moments) -> tuple[Tensor, float]:
        """Unit eigenvector [d] of gathered moments and its eigenvalue; the loss is minus that."""
        v, i, n = moments.matrices()
        matrix = self.var_weight * v - (1 - self.neg_cov_weight) * i - self.neg_cov_weight * n
        values, vectors = torch.linalg.eigh(matrix)
        return vectors[:, -1], float(values[-1])
