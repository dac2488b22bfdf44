"""Probe metrics against numbers computed by hand and against resampling row by row."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlhf_exp.probes import metrics
from rlhf_exp.probes.metrics import Interval

# Pair counting with ties as one half: 5.5 of 9 pairs.
TIES = {"labels": [1, 0, 1, 0, 1, 0], "scores": [0.5, 0.5, 0.5, 0.2, 0.9, 0.9]}
AUROC_TIES = 0.611111111111


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def made_up(n: int, v: int, gap: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Statement logits [n, v, 2], a third of the answers 1, with ties."""
    draw = np.random.default_rng(7)
    labels = (np.arange(n) % 3 == 0).astype(int)
    side = np.stack([1 - 2 * labels, 2 * labels - 1], 1)[:, None]  # [n, 1, 2]
    return np.round(8 * (draw.normal(size=(n, v, 2)) + gap * side)) / 8, labels


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]])
def test_auroc_counts_ties_as_half_in_any_order(order: list[int]) -> None:
    scores, labels = np.array(TIES["scores"])[order], torch.tensor(TIES["labels"])[order]
    assert metrics.auroc(scores, labels) == pytest.approx(AUROC_TIES, abs=1e-6)
    assert metrics.auroc(-scores, labels) == pytest.approx(1 - AUROC_TIES, abs=1e-6)


def test_accuracy_calls_only_scores_above_zero_true() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, -3.0, 0.0], dtype=torch.bfloat16)
    assert metrics.accuracy(scores, [1, 0, 0, 0, 1]) == pytest.approx(3 / 5)


def test_calibrated_accuracy_calls_as_many_true_as_are() -> None:
    scores, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 0, 1])
    assert metrics.calibrated_accuracy(scores, labels) == 1  # the pi quantile would give 0.5
    assert metrics.calibrated_accuracy(scores - 9, labels) == 1
    assert metrics.calibrated_accuracy(-scores, labels) == 0.5
    assert metrics.calibrated_accuracy([1.0, 3.0, 3.0, 2.0], labels) == 0.75  # none is above 3


@pytest.mark.parametrize(
    ("probabilities", "labels", "expected"),
    [
        ([0.1, 0.3, 0.6, 0.8], [0, 1, 0, 1], math.sqrt((0.3**2 + 0.2**2) / 2)),  # two bins
        ([0.1, 0.4, 0.7, 0.8], [0, 0, 1, 1], math.sqrt(0.3 / 4)),  # in order: a bin per row
        ([0.7, 0.7, 0.7, 0.7], [1, 0, 1, 1], 0.05),  # ties stay together
        ([0.8, 0.1, 0.6, 0.3], [1, 0, 0, 1], math.sqrt(0.13 / 2)),  # rows in any order
    ],
)
def test_calibration_error_by_hand(probabilities, labels, expected: float) -> None:
    assert metrics.ece_sweep(probabilities, labels) == pytest.approx(expected)


@pytest.mark.parametrize("grid", [5, 1000])
def test_sweep_finds_the_bins_of_trying_them_all(grid: int) -> None:
    draw = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        m = int(draw.integers(4, 60))
        p = np.sort(draw.integers(0, grid, m)) / grid
        y = (draw.random(m) < sigmoid(draw.uniform(1, 30) * (p - 0.5))).astype(int)
        y[:2] = 0, 1
        best = np.array([0, m])
        for bins in range(2, m + 1):
            cuts = [i * m // bins for i in range(1, bins)]
            cuts = [next(j for j in range(i, m + 1) if j == m or p[j] > p[j - 1]) for i in cuts]
            edges = np.unique([0, *cuts, m])
            means = [y[a:b].mean() for a, b in pairwise(edges)]
            if any(b < a for a, b in pairwise(means)):
                break
            best = edges
        np.testing.assert_array_equal(metrics.sweep(p, y), best[1:])
        counts.add(len(best))
    assert len(counts) > 3


@pytest.mark.parametrize("sign", [1, -1])
def test_platt_matches_the_closed_form(sign: int) -> None:
    # Two scores: 1 of 4 true at 0, 2 of 3 true at 2, so sigmoid must give just these shares.
    scores, targets = sign * np.array([0.0] * 4 + [2.0] * 3), [0, 0, 0, 1, 1, 1, 0]
    scale, bias = metrics.platt(scores, targets)
    assert scale == pytest.approx(sign * (math.log(2) + math.log(3)) / 2, abs=1e-4)
    assert bias == pytest.approx(-math.log(3), abs=1e-4)
    far = metrics.platt(1e4 * scores + 3e4, targets)
    assert far == pytest.approx((scale / 1e4, bias - 3 * scale))


def test_platt_is_finite_for_separable_and_for_equal_scores() -> None:
    scale, bias = metrics.platt(torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([1, 1, 0, 0]))
    assert -30 < scale < -5
    assert bias == pytest.approx(0, abs=1e-6)
    scale, bias = metrics.platt([0.7] * 15, [1] * 3 + [0] * 12)  # std 1e-16
    assert scale == pytest.approx(0, abs=1e-6)
    assert bias == pytest.approx(math.log(0.25), abs=1e-4)


def test_ensembling_modes_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, -1.0]], [[1.0, 5.0], [0.0, 2.0]]])  # [2, 2, 2]
    modes = metrics.ensembled(logits, torch.tensor([0, 1]))
    assert {name: [part.tolist() for part in rows] for name, rows in modes.items()} == {
        "none": [
            [0, 1, 2, -1, 1, 5, 0, 2],
            [1, 0, 1, 0, 0, 1, 0, 1],
            [0, 0, 0, 0, 1, 1, 1, 1],
        ],
        "partial": [[1, -3, 4, 2], [0, 0, 1, 1], [0, 0, 1, 1]],
        "full": [[-1, 3], [0, 1], [0, 1]],
    }


def test_intervals_are_those_of_drawing_whole_examples() -> None:
    logits, labels = made_up(30, 2)
    found = metrics.evaluate(logits, labels, resamples=40, level=0.8, seed=3)
    draws = np.random.default_rng(3).integers(0, 30, (40, 30))
    assert tuple(found) == metrics.MODES
    for mode, (scores, truth, _) in metrics.ensembled(logits, labels).items():
        for name in ("accuracy", "auroc", "calibrated_accuracy"):
            metric = getattr(metrics, name)
            drawn = [
                metric(*metrics.ensembled(logits[rows], labels[rows])[mode][:2]) for rows in draws
            ]
            low, high = np.quantile(drawn, [0.1, 0.9])
            expected = (metric(scores, truth), low, high)
            interval = found[mode][name]
            assert (interval.value, interval.low, interval.high) == pytest.approx(expected), name
            assert low < high
        assert found[mode]["ece"].value == pytest.approx(metrics.ece_sweep(sigmoid(scores), truth))


def test_calibration_interval_of_scores_in_order_is_that_of_single_rows() -> None:
    logits, labels = made_up(30, 1, gap=20.0)
    logits /= 10
    found = metrics.evaluate(logits, labels, resamples=40, seed=3)["full"]["ece"]
    scores = logits[:, 0, 1] - logits[:, 0, 0]
    square = (sigmoid(scores) - labels) ** 2
    draws = np.random.default_rng(3).integers(0, 30, (40, 30))
    # Rows of equal score share a bin; all of one label, they add what they would alone.
    low, high = np.quantile(np.sqrt(square[draws].mean(1)), [0.025, 0.975])
    expected = (math.sqrt(square.mean()), low, high)
    assert (found.value, found.low, found.high) == pytest.approx(expected)


def test_copies_of_a_template_add_no_certainty(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = made_up(40, 1)
    once = metrics.evaluate(logits, labels, resamples=100)
    monkeypatch.setattr(metrics, "CELLS", 300)  # many parts
    copied = metrics.evaluate(logits.repeat(5, 1), labels, resamples=100)
    for name in metrics.METRICS[:3]:  # five times the rows are cut into other bins
        for mode in ("none", "partial"):
            assert vars(copied[mode][name]) == pytest.approx(vars(once[mode][name])), (mode, name)
    assert once["full"] == once["partial"]
    assert isinstance(once["full"]["auroc"], Interval)


def test_a_resample_of_one_class_leaves_the_auroc_interval() -> None:
    logits = torch.tensor([[[0.0, -1.0]], [[0.0, 1.0]]])
    found = metrics.evaluate(logits, torch.tensor([0, 1]), resamples=20)
    assert found["full"]["auroc"] == Interval(1.0, 1.0, 1.0)
    assert found["full"]["accuracy"] == Interval(1.0, 1.0, 1.0)


def test_without_resamples_the_interval_is_the_value() -> None:
    logits, labels = made_up(30, 2)
    auroc = metrics.evaluate(logits, labels, resamples=0)["partial"]["auroc"]
    assert auroc.low == auroc.value == auroc.high
    assert auroc.value == metrics.evaluate(logits, labels, resamples=5)["partial"]["auroc"].value


ONE_CLASS = (
    "the 3 labels to judge a probe by are all of one class: use a larger or a balanced split"
)
LOST = (
    "2 of 3 probe scores are not finite: extract the hidden states in float32 or regularize the "
    "probe"
)
FUNCTIONS = ("accuracy", "auroc", "calibrated_accuracy", "ece_sweep", "platt")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_cannot_be_measured_is_said_in_one_sentence(name: str) -> None:
    metric = getattr(metrics, name)
    with pytest.raises(ValueError, match=f"^{re.escape(ONE_CLASS)}$"):
        metric([0.1, 0.2, 0.3], [1, 1, 1])
    with pytest.raises(ValueError, match=f"^{re.escape(LOST)}$"):
        metric([0.1, math.nan, math.inf], [1, 0, 1])


def test_evaluate_refuses_the_same() -> None:
    logits = torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match="are all of one class"):
        metrics.evaluate(logits, torch.ones(3))
    logits[0, 0, 1] = math.nan
    with pytest.raises(ValueError, match=r"^1 of 6 probe scores are not finite"):
        metrics.evaluate(logits, torch.tensor([0, 1, 1]))
