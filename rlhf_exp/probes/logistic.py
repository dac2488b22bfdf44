"""Logistic regression on statements or on differences, and the directions it needs to be erased.

The statement probe (every statement a row, true or false) is the one that worked in Macijauskas
2023; its answer score is the logit of one statement minus that of the other, in which the bias
cancels. INLP: Ravfogel et al. 2020 (arXiv 2004.07667).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlhf_exp.choices import require
from rlhf_exp.probes.head import Head, differences, linear, statements

SEPARABLE = "the classes are separable and nothing regularises: the weights have no finite optimum"


def fit_logistic(
    x: Tensor,
    y: Tensor,
    *,
    l2: float = 0.0,
    bias: bool = True,
    start: Tensor | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-7,
) -> Tensor:
    """Minimiser [d + 1] (weights, then bias) of mean BCE + l2 * sum w^2 over rows x [m, d] with
    targets y [m]; the bias is not penalised. L-BFGS with strong-Wolfe line search, from zero.
    """
    theta = torch.zeros(x.shape[1] + 1, dtype=x.dtype) if start is None else start.clone()
    parameter = nn.Parameter(theta.to(x.device))
    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=tolerance * 1e-2,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        w, b = parameter.data[:-1], parameter.data[-1]
        logits = x @ w + b
        error = (logits.sigmoid() - y) / len(y)
        slope = error.sum() if bias else error.new_zeros(())
        parameter.grad = torch.cat([x.T @ error + 2 * l2 * w, slope[None]])
        fit = nn.functional.binary_cross_entropy_with_logits(logits, y)
        return fit + l2 * w.square().sum()

    optimizer.step(loss)
    return parameter.data


def cross_entropy(theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Mean BCE of the weights and bias `theta` [d + 1]."""
    logits = x @ theta[:-1] + theta[-1]
    return float(nn.functional.binary_cross_entropy_with_logits(logits, y))


def entropy(y: Tensor) -> float:
    """Entropy in nats of the targets, the cross-entropy of a constant."""
    p = float(y.mean())
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _notes(theta: Tensor, x: Tensor, y: Tensor, l2: float) -> list[str]:
    margins = (x @ theta[:-1] + theta[-1]) * (2 * y - 1)
    return [SEPARABLE] if l2 == 0 and bool((margins > 0).all()) else []


@dataclass(kw_only=True)
class Logistic:
    """Statement logistic regression. `penalty`: none, l2 (weight `l2`), or cv: the best of no
    penalty and ten from 1e-4 to 1e4 by mean validation loss over `folds` folds of examples.
    """

    normalise: str = "mean_var"
    penalty: str = "l2"
    l2: float = 0.001
    folds: int = 5
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.penalty, ("none", "l2", "cv"), "penalty")
        if self.l2 < 0 or self.folds < 2:
            raise ValueError(f"l2={self.l2} must be at least 0 and folds={self.folds} at least 2")

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        rows, y = statements(x, labels)
        l2 = {"none": 0.0, "l2": self.l2}.get(self.penalty)
        notes = []
        if l2 is None:
            l2 = self._cross_validated(x, labels, seed)
            notes.append(f"l2={l2:.2g}, chosen over {self.folds} folds")
        theta = fit_logistic(rows, y, l2=l2)
        return linear(theta[:-1], float(theta[-1]), notes + _notes(theta, rows, y, l2))

    def _cross_validated(self, x: Tensor, labels: Tensor, seed: int) -> float:
        if len(x) < self.folds:
            raise ValueError(
                f"penalty=cv needs at least {self.folds} examples, there are {len(x)}: lower folds"
            )
        penalties = [
            *torch.logspace(4, -4, 10).tolist(),
            0.0,
        ]  # each warms the next
        fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) % self.folds
        losses = torch.zeros(len(penalties))
        for k in range(self.folds):
            rows, y = statements(x[fold != k], labels[fold != k])
            held, truth = statements(x[fold == k], labels[fold == k])
            theta = None
            for i, l2 in enumerate(penalties):
                theta = fit_logistic(rows, y, l2=l2, start=theta, iterations=100, tolerance=1e-4)
                losses[i] += cross_entropy(theta, held, truth) / self.folds
        return penalties[int(losses.argmin())]


@dataclass(kw_only=True)
class LogisticDifference:
    """Logistic regression of the label on normalised differences, without a bias."""

    normalise: str = "mean_var"
    l2: float = 0.001
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = True

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        rows = differences(x)
        y = labels.repeat_interleave(x.shape[1]).to(x.dtype)
        theta = fit_logistic(rows, y, l2=self.l2, bias=False)
        return linear(theta[:-1], notes=_notes(theta, rows, y, self.l2))


def project_out(x: Tensor, direction: Tensor) -> Tensor:
    """x - (x . w) w / |w|^2 for rows x [..., d] and w [d]."""
    return x - (x @ direction)[..., None] * direction / direction.square().sum()


@dataclass(kw_only=True)
class INLP:
    """Iterative nullspace projection: fit, project the direction out, and again until the
    cross-entropy is 0.99 of the labels' entropy. The probe is the `keep`-th direction found; the
    report says how many hold what the first one found.
    """

    normalise: str = "mean_var"
    l2: float = 0.001
    keep: int = 0
    directions: int = 8  # at most
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.keep < self.directions:
            raise ValueError(
                f"keep={self.keep} must be at least 0 and less than directions={self.directions}"
            )

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        rows, y = statements(x, labels)
        found: list[Tensor] = []  # weights and bias of each fit
        ratios: list[float] = []
        while len(found) < self.directions and (not ratios or ratios[-1] < 0.99):
            theta = fit_logistic(rows, y, l2=self.l2)
            ratios.append(cross_entropy(theta, rows, y) / entropy(y))
            for earlier in found:  # rows no longer hold it, so it adds nothing but rounding
                theta[:-1] = project_out(theta[:-1], earlier[:-1])
            found.append(theta)
            rows = project_out(rows, theta[:-1])
        if len(found) <= self.keep:
            raise ValueError(
                f"keep={self.keep}, but after {len(found)} directions nothing is left: lower keep"
            )
        said = ", ".join(f"{r:.3f}" for r in ratios)
        note = f"cross-entropy over label entropy, a direction erased each time: {said}"
        theta = found[self.keep]
        notes = [note, *_notes(theta, *statements(x, labels), self.l2)]
        return linear(theta[:-1], float(theta[-1]), notes)
