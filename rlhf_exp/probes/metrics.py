"""What a probe is worth: accuracy, AUROC, calibrated accuracy and calibration error of its scores,
with intervals over examples, and Platt scaling.

A score is the log-odds that the label is 1. Rows are sorted once; every metric takes a weight per
row, and a bootstrap resample is nothing but other weights. Left out: more than two classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any] | Tensor
MODES = ("none", "partial", "full")
METRICS = ("accuracy", "auroc", "calibrated_accuracy", "ece")
CELLS = 1 << 17  # resamples x rows at once, so that they stay in the cache
RIDGE = 1e-6  # keeps Platt's scale finite where the scores separate the classes


@dataclass(frozen=True)
class Interval:
    """A metric and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def accuracy(scores: Array, labels: Array) -> float:
    """Share of rows whose score [m] is above 0 exactly where the label [m] is 1."""
    rows = _Sorted(scores, labels)
    return float(_accuracy(*rows.below(rows.ones()), rows.zero)[0])


def auroc(scores: Array, labels: Array) -> float:
    """Probability that a row of label 1 outscores one of label 0, ties counting one half
    (Mann-Whitney), for scores and labels [m].
    """
    rows = _Sorted(scores, labels)
    return float(_auroc(*rows.below(rows.ones()))[0])


def calibrated_accuracy(scores: Array, labels: Array) -> float:
    """Accuracy with the threshold at the (1 - pi) quantile of the scores [m], pi the share of
    label 1: without ties, as many rows are called 1 as are 1.

    elk takes the pi quantile, which is right for balanced classes only.
    """
    rows = _Sorted(scores, labels)
    return float(_calibrated_accuracy(*rows.below(rows.ones()))[0])


def ece_sweep(probabilities: Array, labels: Array) -> float:
    """Calibration error: root mean square of (mean probability - frequency of label 1) over
    equal-mass bins, for probabilities and labels [m].

    As many bins as possible while this and every smaller number of bins have rising frequencies
    (ECE-sweep, Roelofs et al. 2020, "Mitigating Bias in Calibration Error Estimation"). Equal
    probabilities share a bin, so that the order of the rows does not matter.
    """
    rows = _Sorted(probabilities, labels)
    ends = sweep(rows.scores, rows.labels)
    return float(_ece(rows.ones(), rows.scores - rows.labels, ends)[0])


def sweep(probabilities: NDArray, labels: NDArray) -> NDArray:
    """Where the bins of `ece_sweep` end (exclusive), for rows [m] sorted by probability.

    Only bins between the first and the last row that are out of order can break the order, so a
    number of bins costs as many steps as bins touch those rows.
    """
    m = len(labels)
    ends = np.flatnonzero(np.diff(probabilities, prepend=-np.inf, append=np.inf))  # [g + 1] of ties
    sums = np.append(0, np.cumsum(labels))  # whole numbers: equal frequencies compare as equal

    def frequencies(edges: NDArray) -> NDArray:
        return np.diff(sums[edges]) / np.diff(edges)

    def edges(bins: int, low: int, high: int) -> NDArray:
        return np.unique(ends[np.searchsorted(ends, np.arange(low, high + 1) * m // bins)])

    frequency = frequencies(ends)
    lowest_ahead = np.minimum.accumulate(frequency[::-1])[::-1]
    astray = np.flatnonzero(np.maximum.accumulate(frequency) > lowest_ahead)
    if not len(astray):
        return ends[1:]
    first, last = int(ends[astray[0]]), int(ends[astray[-1] + 1])
    for bins in range(2, m + 1):
        touched = edges(bins, first * bins // m, -(-last * bins // m))
        if np.any(np.diff(frequencies(touched)) < 0):
            return edges(bins - 1, 0, bins - 1)[1:]
    raise AssertionError("one bin per distinct probability must show the disorder")


def platt(scores: Array, targets: Array) -> tuple[float, float]:
    """The a and b that maximize the likelihood of sigmoid(a * score + b), for scores and 0/1
    targets [m]; a < 0 says that the scores point the wrong way.

    Newton with step halving in float64 on standardized scores. Instead of Platt's smoothed targets,
    a ridge of 1e-6 makes the optimum finite for separable scores; it moves others by about as much.
    """
    s, y = _checked(scores, targets)
    mean, spread = s.mean(), s.std() if np.ptp(s) > 0 else 1.0
    x = np.stack([(s - mean) / spread, np.ones_like(s)], 1)  # [m, 2]

    def loss(theta: NDArray) -> float:
        z = x @ theta
        return (np.logaddexp(0, z) - y * z).mean() + RIDGE / 2 * theta @ theta

    theta = np.zeros(2)
    for _ in range(100):
        p = _sigmoid(x @ theta)
        gradient = x.T @ (p - y) / len(y) + RIDGE * theta
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while loss(theta - step) > loss(theta) + 1e-14:
            step /= 2
        theta -= step
    scale = float(theta[0] / spread)
    return scale, float(theta[1] - scale * mean)


def ensembled(logits: Array, labels: Array) -> dict[str, tuple[NDArray, NDArray, NDArray]]:
    """Scores, labels and example of each row, by how templates and answers are put together.

    `logits` [n, v, 2] are those of each statement being true, `labels` [n] the right answers.
    none: every statement alone, true or not, n * v * 2 rows; partial: answer 1 minus answer 0 of
    each template, n * v rows; full: the same of the means over templates, n rows. To ensemble
    layers, pass the mean of their logits.
    """
    x, y = _numpy(logits), _numpy(labels).astype(int)
    n, v, _ = x.shape
    difference = x[..., 1] - x[..., 0]  # [n, v]
    true = np.stack([1 - y, y], 1)[:, None].repeat(v, 1)  # [n, v, 2]
    return {
        "none": (x.ravel(), true.ravel(), np.arange(n).repeat(v * 2)),
        "partial": (difference.ravel(), y.repeat(v), np.arange(n).repeat(v)),
        "full": (difference.mean(1), y, np.arange(n)),
    }


def evaluate(
    logits: Array, labels: Array, *, resamples: int = 1000, level: float = 0.95, seed: int = 42
) -> dict[str, dict[str, Interval]]:
    """Each of `METRICS` under each of `MODES`, from `logits` [n, v, 2] and `labels` [n].

    Resamples draw examples, whose templates and statements stay together; one that drew a single
    class has no AUROC and is left out of that interval. The calibration error keeps the bins of the
    full sample; as resampling adds noise to every bin, its interval leans upward. resamples=0 gives
    the values alone: low and high equal them.
    """
    n = len(labels)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    drawn += np.arange(resamples)[:, None] * n
    weights = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    weights = np.concatenate([np.ones((1, n)), weights])  # the sample itself comes first
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(values: NDArray) -> Interval:
        value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(drawn, tails) if len(drawn) else (value, value)
        return Interval(value, float(low), float(high))

    return {
        mode: {name: interval(v) for name, v in _measure(weights, *rows).items()}
        for mode, rows in ensembled(logits, labels).items()
    }


def _measure(
    weights: NDArray, scores: NDArray, labels: NDArray, examples: NDArray
) -> dict[str, NDArray]:
    """`METRICS`, each [r], of rows [m] that belong to examples, under weights [r, n] of these."""
    rows = _Sorted(scores, labels)
    p = _sigmoid(rows.scores)
    ends, examples = sweep(p, rows.labels), examples[rows.order]
    found = []
    for part in np.array_split(weights, -(-len(weights) * len(p) // CELLS)):
        per_row = np.take(part, examples, axis=1)
        below = rows.below(per_row)
        found.append(
            [
                _accuracy(*below, rows.zero),
                _auroc(*below),
                _calibrated_accuracy(*below),
                _ece(per_row, p - rows.labels, ends),
            ]
        )
    return dict(zip(METRICS, np.concatenate(found, 1), strict=True))


class _Sorted:
    """Rows by rising score, and what lies below each distinct score."""

    def __init__(self, scores: Array, labels: Array) -> None:
        s, y = _checked(scores, labels)
        self.order = np.argsort(s, kind="stable")
        self.scores, self.labels = s[self.order], y[self.order]
        self.ends = np.flatnonzero(np.diff(self.scores, append=np.inf)) + 1  # [g] of each tie
        self.zero = int(np.searchsorted(self.scores[self.ends - 1], 0, side="right"))

    def ones(self) -> NDArray:
        return np.ones((1, len(self.scores)))

    def below(self, weights: NDArray) -> tuple[NDArray, NDArray]:
        """Weight of label 0 and of label 1 among the c lowest distinct scores, [r, g + 1] for
        c = 0..g, from the weights [r, m] of the sorted rows.
        """
        counts = np.zeros((2, len(weights), len(self.ends) + 1))
        for k in (0, 1):
            counts[k, :, 1:] = _sums(weights * (self.labels == k), self.ends)
        return counts[0], counts[1]


def _accuracy(negative: NDArray, positive: NDArray, cut: int | NDArray) -> NDArray:
    """Share that is right when the `cut` lowest distinct scores are called 0, [r]."""
    row = np.arange(len(negative))
    right = negative[row, cut] + positive[:, -1] - positive[row, cut]
    return right / (negative[:, -1] + positive[:, -1])


def _auroc(negative: NDArray, positive: NDArray) -> NDArray:
    area = (np.diff(positive) * (negative[:, 1:] + negative[:, :-1])).sum(1) / 2
    pairs = negative[:, -1] * positive[:, -1]
    return np.divide(area, pairs, out=np.full_like(area, np.nan), where=pairs > 0)


def _calibrated_accuracy(negative: NDArray, positive: NDArray) -> NDArray:
    cut = (negative + positive < negative[:, -1:]).sum(1)
    return _accuracy(negative, positive, cut)


def _ece(weights: NDArray, gaps: NDArray, ends: NDArray) -> NDArray:
    """Root mean square over bins of the mean gap [m], under weights [r, m]."""
    mass, total = (np.diff(_sums(x, ends), prepend=0) for x in (weights, weights * gaps))
    return np.sqrt((total**2 / np.maximum(mass, 1)).sum(1) / mass.sum(1))


def _sums(x: NDArray, ends: NDArray) -> NDArray:
    """Of the first `ends` columns of x [r, m]; torch adds them up in a quarter of NumPy's time."""
    sums = torch.from_numpy(x).cumsum(1).numpy()
    return sums if len(ends) == x.shape[1] else sums[:, ends - 1]


def _sigmoid(x: NDArray) -> NDArray:
    return (1 + np.tanh(x / 2)) / 2


def _numpy(x: Array) -> NDArray:
    return x.detach().cpu().double().numpy() if isinstance(x, Tensor) else np.asarray(x, float)


def _checked(scores: Array, labels: Array) -> tuple[NDArray, NDArray]:
    s, y = _numpy(scores), _numpy(labels).astype(int)
    lost = int((~np.isfinite(s)).sum())
    if lost:
        raise ValueError(
            f"{lost} of {len(s)} probe scores are not finite: extract the hidden states in float32 "
            "or regularize the probe"
        )
    if len(np.unique(y)) < 2:
        raise ValueError(
            f"the {len(y)} labels to judge a probe by are all of one class: use a larger or a "
            "balanced split"
        )
    return s, y
