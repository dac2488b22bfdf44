"""Normalisations and probe families: worked numbers (tests/vectors/probes.json), the defects of the
reference implementations as regressions, and properties that hold for any states.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.probes import ccs, normalise
from rlhf_exp.probes.ccs import CCS
from rlhf_exp.probes.families import FAMILIES
from rlhf_exp.probes.head import Head, differences, statements
from rlhf_exp.probes.logistic import (
    INLP,
    SEPARABLE,
    Logistic,
    LogisticDifference,
    cross_entropy,
    fit_logistic,
    project_out,
)
from rlhf_exp.probes.unsupervised import TPC
from rlhf_exp.probes.vinc import VINC, Moments

VECTORS = json.loads((Path(__file__).parent / "vectors" / "probes.json").read_text())


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), double(expected), atol=tolerance, rtol=0)


def pairs(name: str) -> tuple[Tensor, Tensor]:
    """States [n, 1, 2, d] and labels of a worked example."""
    given = VECTORS[name]["inputs"]
    x = torch.stack([double(given["x_neg"]), double(given["x_pos"])], 1)[:, None]
    return x, torch.tensor(given.get("labels", [0] * len(x)))


def world(n: int = 200, v: int = 1, d: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States in which truth is one direction among noise, and each answer has an offset."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    x = torch.randn(n, v, 2, d, generator=generator) + torch.randn(1, v, 2, d, generator=generator)
    truth = torch.zeros(d)
    truth[3] = 3.0
    turn = (2.0 * labels - 1)[:, None, None]
    x[:, :, 1] += turn * truth
    x[:, :, 0] -= turn * truth
    return x.double(), labels


def answers(head: Head, x: Tensor) -> Tensor:
    logits = head(x).mean(1)
    return logits[:, 1] - logits[:, 0]


def right(scores: Tensor, labels: Tensor) -> float:
    return float(((scores > 0).long() == labels).double().mean())


# ---- normalisation


@pytest.mark.parametrize(
    ("method", "vector"),
    [
        ("mean", "burns_norm_mean"),
        ("mean_var", "burns_norm_meanvar"),
        ("paper_scale", "burns_norm_legacy_scale"),
    ],
)
def test_normalisation_of_one_class(method: str, vector: str) -> None:
    case = VECTORS[vector]
    x = double(case["inputs"]["x"])[:, None, None]
    fitted = normalise.fit(x, method)
    near(fitted(x)[:, 0, 0], case["expected"]["normalized"])
    if "mean" in case["expected"]:
        near(fitted.mean[0, 0], case["expected"]["mean"])
    if "std" in case["expected"]:
        near(fitted.scale[0, 0], case["expected"]["std"])


def test_correlation_removal() -> None:
    x, _ = pairs("correlation_removal")
    expected = VECTORS["correlation_removal"]["expected"]
    fitted = normalise.fit(x, "correlation")
    assert fitted.remove.shape[1] == expected["rank"]
    near(torch.eye(4).double() - fitted.remove @ fitted.restore.T, expected["P"])
    near(fitted(x)[0, 0, 0], expected["cleaned_first_neg"])
    near(fitted(x)[0, 0, 1], expected["cleaned_first_pos"])
    gap = fitted(x).mean((0, 1))
    assert float((gap[1] - gap[0]).abs().max()) < 1e-9


@pytest.mark.parametrize("method", ["correlation", "correlation_template", "leace"])
def test_erasure_leaves_no_covariance_and_one_direction_less(method: str) -> None:
    x, _ = world(v=3)
    fitted = normalise.fit(x, method)
    clean = fitted(x)
    means = clean.mean(0)  # [v, 2, d]
    spread = means - means.mean((0, 1)) if method == "correlation_template" else means.mean(0)
    assert float((spread - spread.mean(-2, keepdim=True)).abs().max()) < 1e-9
    assert fitted.remove.shape[1] == (5 if method == "correlation_template" else 1)


def test_leace_changes_no_more_than_it_must() -> None:
    """Theorem 4.3: r(x) = mean + (I - W+ P W)(x - mean); idempotent, and W (x - r(x)) lies in the
    column space of W Cov(x, z).
    """
    x, _ = world(n=500, d=5)
    fitted = normalise.fit(x, "leace")
    rows = x.flatten(0, 2)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    z = torch.nn.functional.one_hot(torch.arange(2).repeat(len(x))).double()
    column = (whiten @ centred.T @ (z - z.mean(0)) / len(rows))[:, :1]
    column /= column.norm()
    expected = centred - centred @ whiten @ column @ column.T @ torch.linalg.inv(whiten)
    near(fitted(x).flatten(0, 2), (expected + rows.mean(0)).tolist(), 1e-8)


def test_per_template_divides_by_one_number() -> None:
    x, _ = world(v=2)
    fitted = normalise.fit(x, "per_template")
    for j in range(2):
        expected = x[:, j].std(0, correction=0).mean()
        near(fitted(x)[:, j], ((x[:, j] - x[:, j].mean(0)) / expected).tolist())
    one = x[:1]
    assert torch.equal(normalise.fit(one, "per_template")(one), one)  # nothing to centre by


@pytest.mark.parametrize("method", normalise.METHODS)
def test_normalisation_is_fitted_on_training_states_alone(method: str) -> None:
    """The reference class centres by the batch it is given, so that one sample becomes 0."""
    x, _ = world(v=2)
    fitted = normalise.fit(x[:150], method)
    together, alone = fitted(x[150:]), torch.cat([fitted(row[None]) for row in x[150:]])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("method", normalise.METHODS)
def test_the_order_of_examples_does_not_matter(method: str) -> None:
    """With an unpivoted basis of all one-hot columns, a direction of rounding noise goes too."""
    x, _ = world(v=2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(normalise.fit(x[order], method)(x), normalise.fit(x, method)(x))


@pytest.mark.parametrize("method", ["mean_var", "standard", "paper_scale", "per_template", "leace"])
def test_columns_that_do_not_vary_become_zero(method: str) -> None:
    x, _ = world()
    x[..., 5] = 7.0
    clean = normalise.fit(x, method)(x)
    assert clean.isfinite().all()
    expected = 7.0 if method == "leace" else 0.0
    assert torch.allclose(clean[..., 5], double(expected))


def test_columns_of_rounding_noise_count_as_constant() -> None:
    x, _ = world()
    x[..., 5] = 7.0 + 1e-9 * x[..., 5]
    clean = normalise.fit(x, "mean_var")(x + torch.eye(12)[5].double() * 3e-7)
    assert float(clean[..., 5].abs().max()) < 1e-5


# ---- CCS


def test_ccs_loss_and_gradients() -> None:
    case = VECTORS["ccs_loss"]
    neg, pos = (double(case["inputs"][k]) for k in ("p_neg", "p_pos"))
    near(ccs.consistency(neg, pos), case["expected"]["consistency_mean"])
    near(ccs.confidence(neg, pos), case["expected"]["confidence_mean"])
    near(ccs.ccs_loss(neg, pos), case["expected"]["total"])
    near(ccs.ccs_loss(pos, neg), case["expected"]["total"])
    logits = [p.logit().requires_grad_(True) for p in (neg, pos)]
    ccs.ccs_loss(*(z.sigmoid() for z in logits)).backward()
    for z, name in zip(logits, ("neg", "pos"), strict=True):
        assert z.grad is not None
        near(z.grad[:5], case["expected"][f"grad_wrt_logit_{name}_first5"])


def test_ccs_credence() -> None:
    case = VECTORS["ccs_credence"]
    found = ccs.credence(*(double(case["inputs"][k]) for k in ("p_neg", "p_pos")))
    near(found, case["expected"]["credence"])
    assert (found > 0.5).long().tolist() == case["expected"]["prediction"]


def test_ccs_prompt_variance() -> None:
    case = VECTORS["ccs_prompt_var"]
    given = [double(case["inputs"][k]) for k in ("p_neg", "p_pos")]
    near(ccs.prompt_variance(*given), case["expected"]["prompt_var"])
    near(ccs.ccs_prompt_variance(*given), case["expected"]["ccs_prompt_var"])


def test_jensen_shannon_terms_are_in_nats() -> None:
    certain = double([0.0, 1.0]), double([0.0, 1.0])  # p- and 1 - p+ are opposites
    near(ccs.jensen_shannon(*certain), math.log(2))
    near(ccs.jensen_shannon_confidence(*certain), math.log(2))
    near(ccs.jensen_shannon(double([0.3]), double([0.7])), 0.0)
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    near(ccs.jensen_shannon_confidence(double([0.3]), double([0.7])), entropy)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adamw"])
@pytest.mark.parametrize("term", ["js", "js_confidence"])
def test_entropies_have_a_slope_where_a_sigmoid_saturates(term: str, optimizer: str) -> None:
    x, labels = world(n=40, d=200)
    head = CCS(loss=[term], optimizer=optimizer, epochs=50, restarts=3).fit(10 * x, labels, 0)
    assert head.weights[0].isfinite().all()


def test_loss_terms_have_coefficients() -> None:
    given = double([[0.2, 0.4]]), double([[0.9, 0.5]])
    total = ccs.parse_loss(["0.5*consistency_squared", "confidence_squared"])(*given)
    near(total, float(0.5 * ccs.consistency(*given) + ccs.confidence(*given)))
    with pytest.raises(ValueError, match=r"loss=ccss is not known.*did you mean ccs\?"):
        ccs.parse_loss(["ccss"])
    with pytest.raises(ValueError, match="'half' is not a number"):
        ccs.parse_loss(["half*ccs"])


def test_ccs_reaches_the_known_optimum() -> None:
    """The best of ten restarts, from torch's starting points."""
    case = VECTORS["ccs_train"]
    expected, decay = case["expected"], case["inputs"]["weight_decay"]
    x, labels = pairs("ccs_train")
    x = normalise.fit(x, "mean")(x)
    head = CCS(weight_decay=decay).fit(x, labels, 0)
    p = head(x).sigmoid()
    plain = float(ccs.ccs_loss(p[..., 0], p[..., 1]))
    theta = torch.cat([head.weights[0][0], head.biases[0]])
    assert plain + 0.5 * decay * float(theta.square().sum()) <= expected["best_objective"] + 1e-3
    assert plain == pytest.approx(expected["unregularised_ccs_loss_at_optimum"], abs=1e-3)
    direction = theta[:-1] / theta[:-1].norm()
    assert abs(float(direction @ double(expected["direction_unit_up_to_sign"]))) > 0.99
    assert right(answers(head, x), labels) in (0.0, 1.0)
    zero = CCS(init="zero", restarts=1, epochs=1, optimizer="adamw", lr=0.0).fit(x, labels, 0)
    p = zero(x).sigmoid()
    assert float(ccs.ccs_loss(p[..., 0], p[..., 1])) == expected["objective_at_zero"]


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "epochs": 200},
        {"optimizer": "adamw", "epochs": 30, "batch": 50},
        {"init": "spherical"},
        {"init": "pca"},
        {"bias": False},
        {"layers": 2, "hidden": 16, "restarts": 3},
        {"layers": 3, "activation": "relu", "layer_norm": True, "restarts": 3},
        {"optimizer": "adamw", "layers": 2, "activation": "silu", "epochs": 200},
        {"loss": ["js", "0.5*js_confidence"]},
        {"loss": ["ccs_prompt_var"]},
    ],
    ids=str,
)
def test_ccs_finds_the_truth_under_every_setting(settings: dict[str, Any]) -> None:
    x, labels = world(v=2)
    clean = normalise.fit(x, "mean")(x)
    head = CCS(**settings).fit(clean, labels, 0)
    share = right(answers(head, clean), labels)
    assert max(share, 1 - share) > 0.95
    if settings.get("bias") is False:
        assert not head.biases[0].any()


def test_ccs_tries_at_once_are_those_one_by_one() -> None:
    x, labels = world()
    clean = normalise.fit(x, "mean")(x).float()
    settings: dict[str, Any] = {"optimizer": "adamw", "epochs": 20, "layers": 2, "hidden": 5}
    one, many = CCS(restarts=1, **settings), CCS(restarts=4, **settings)
    alone = one.fit(clean, labels, 7)
    generator = torch.Generator().manual_seed(7)
    tries = [many._start(clean, i, generator) for i in range(4)]
    together = many._adamw(tries, clean, ccs.ccs_loss, generator)
    torch.testing.assert_close(together[0].weights, alone.weights, atol=1e-5, rtol=1e-4)


def test_ccs_says_when_nothing_is_finite() -> None:
    x, labels = world()
    family = CCS(optimizer="adamw", lr=1e200, epochs=3, weight_decay=1e200)
    with pytest.raises(ValueError, match="not finite in all 10 tries: normalise the states"):
        family.fit(x, labels, 0)


# ---- TPC and VINC


def test_top_principal_component() -> None:
    x, labels = pairs("crc_tpc")
    expected = VECTORS["crc_tpc"]["expected"]
    clean = normalise.fit(x, "mean")(x)
    head = TPC().fit(clean, labels, 0)
    direction = head.weights[0][0]
    turn = torch.sign(direction[direction.abs().argmax()])
    near(direction * turn, expected["direction"])
    near(answers(head, clean) * turn, expected["scores"])
    assert right(answers(head, clean) * turn, labels) == expected["accuracy_after_sign"]
    assert head.notes == ["the component holds 95.6% of the differences' second moment"]


@pytest.mark.parametrize("centroids", [True, False])
def test_vinc_moments_in_a_stream_equal_one_pass(centroids: bool) -> None:
    x, _ = world(n=90, v=3)
    whole = Moments(centroids=centroids).update(x)
    stream = Moments(centroids=centroids)
    for piece in x.split([1, 40, 49]):
        stream.update(piece)
    for a, b in zip(whole.matrices(), stream.matrices(), strict=True):
        torch.testing.assert_close(a, b)


def test_vinc_matrices_by_hand() -> None:
    x = double([[[[0.0], [1.0]], [[2.0], [1.0]]], [[[4.0], [0.0]], [[4.0], [-2.0]]]])  # n=v=k=2
    v, i, n = Moments().update(x).matrices()
    # centroids: example 0 (1, 1), example 1 (4, -1); means (2.5, 0)
    near(v, [[(2.25 + 1.0) / 2]])
    near(i, [[(1.0 + 0.0 + 0.0 + 1.0) / 4]])
    near(n, [[-1.5]])


def test_each_template_is_a_sample_of_its_own_without_centroids() -> None:
    """elk divides by the number of examples here, which doubles the mean of two templates."""
    x, _ = world(v=2)
    v, _, n = Moments(centroids=False).update(x).matrices()
    flat = x.flatten(0, 1)
    apart = flat - flat.mean(0)
    near(v, ((apart[:, 0].T @ apart[:, 0] + apart[:, 1].T @ apart[:, 1]) / 2 / len(flat)).tolist())
    cross = apart[:, 0].T @ apart[:, 1] / len(flat)
    near(n, ((cross + cross.T) / 2).tolist())


def test_vinc_direction_is_the_top_eigenvector() -> None:
    x, labels = world(v=2)
    clean = normalise.fit(x, "correlation")(x)
    family = VINC(var_weight=0.3, neg_cov_weight=0.6)
    direction, value = family.solve(Moments().update(clean))
    v, i, n = Moments().update(clean).matrices()
    a = 0.3 * v - 0.4 * i - 0.6 * n
    near(a @ direction, (value * direction).tolist(), 1e-9)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(a).max()))
    assert float(direction.norm()) == pytest.approx(1.0)
    share = right(answers(family.fit(clean, labels, 0), clean), labels)
    assert max(share, 1 - share) > 0.95


# ---- supervised


def test_logistic_regression_on_statements() -> None:
    x, labels = pairs("logistic_statement_probe")
    expected = VECTORS["logistic_statement_probe"]["expected"]
    rows, y = statements(x, labels)
    for l2, key in ((0.0, "unregularised"), (0.05, "l2_0_05")):
        theta = fit_logistic(rows, y, l2=l2)
        near(theta[:-1], expected[key]["w"], 1e-4)
        near(theta[-1], expected[key]["b"], 1e-4)
        assert cross_entropy(theta, rows, y) == pytest.approx(expected[key]["cross_entropy"])
    head = Logistic(penalty="none").fit(x, labels, 0)
    near(answers(head, x), expected["pair_scores_unregularised"], 1e-4)
    near(answers(head, x).sigmoid(), expected["rewards_unregularised"], 1e-4)


def test_logistic_regression_on_differences() -> None:
    x, labels = pairs("logistic_difference_probe")
    expected = VECTORS["logistic_difference_probe"]["expected"]
    clean = normalise.fit(x, "mean")(x)
    head = LogisticDifference(l2=0.05).fit(clean, labels, 0)
    near(head.weights[0][0], expected["w"], 1e-4)
    assert not head.biases[0].any()
    rows = differences(clean)
    theta = torch.cat([head.weights[0][0], double([0.0])])
    assert cross_entropy(theta, rows, labels.double()) == pytest.approx(expected["cross_entropy"])


def test_separable_classes_without_a_penalty_are_noted() -> None:
    x, labels = world()
    x[:, :, 0, 3] += 100.0 * (1 - 2 * labels.double())[:, None]
    x[:, :, 1, 3] -= 100.0 * (1 - 2 * labels.double())[:, None]
    assert SEPARABLE in Logistic(penalty="none").fit(x, labels, 0).notes
    assert Logistic(l2=0.01).fit(x, labels, 0).notes == []


def test_cross_validation_takes_the_penalty_that_predicts_best() -> None:
    x, labels = world(n=60, d=40)
    head = Logistic(penalty="cv").fit(x, labels, 0)
    (note,) = [n for n in head.notes if n.startswith("l2=")]
    assert note.endswith("chosen over 5 folds")
    assert 1e-4 <= float(note.split(",")[0][3:]) <= 10
    with pytest.raises(ValueError, match="needs at least 5 examples, there are 4: lower folds"):
        Logistic(penalty="cv").fit(x[:4], labels[:4], 0)


def test_inlp_notes_separable_classes_too() -> None:
    x, labels = world(n=20, d=40)
    assert SEPARABLE in INLP(l2=0.0).fit(x, labels, 0).notes


def test_nullspace_projection() -> None:
    case = VECTORS["inlp_projection"]
    found = project_out(double(case["inputs"]["x"]), double(case["inputs"]["w"]))
    near(found, case["expected"]["projected"])


def test_inlp_erases_until_nothing_is_left() -> None:
    x, labels = world(n=2000, d=6)
    found = [INLP(keep=k).fit(x, labels, 0).weights[0][0] for k in range(2)]
    assert abs(float(found[0] @ found[1])) < 1e-6 * float(found[0].norm() * found[1].norm())
    assert right(answers(INLP().fit(x, labels, 0), x), labels) > 0.95
    with pytest.raises(ValueError, match=r"keep=7, but after \d directions nothing is left"):
        INLP(keep=7).fit(x, labels, 0)


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_families_find_truth_and_the_control_does_not(name: str) -> None:
    x, labels = world(n=400, v=2)
    family = FAMILIES[name]()
    clean = normalise.fit(x, family.normalise)(x)
    share = right(answers(family.fit(clean[:300], labels[:300], 0), clean[300:]), labels[300:])
    share = share if family.supervised else max(share, 1 - share)
    assert share < 0.9 if name == "random" else share > 0.95


@pytest.mark.parametrize("name", FAMILIES)
def test_fits_repeat_and_forget_the_order_of_examples(name: str) -> None:
    x, labels = world()
    family = FAMILIES[name]()
    clean = normalise.fit(x, family.normalise)(x)
    first, second = family.fit(clean, labels, 0), family.fit(clean, labels, 0)
    assert torch.equal(first(clean), second(clean))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    shuffled = family.fit(clean[order], labels[order], 0)
    a, b = answers(first, clean), answers(shuffled, clean)
    agreement = abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    assert agreement > 0.999


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.supervised])
def test_unsupervised_families_do_not_look_at_labels(name: str) -> None:
    x, labels = world()
    family = FAMILIES[name]()
    clean = normalise.fit(x, family.normalise)(x)
    assert torch.equal(family.fit(clean, labels, 0)(clean), family.fit(clean, 1 - labels, 0)(clean))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.supervised])
def test_inverted_labels_turn_supervised_probes_round(name: str) -> None:
    x, labels = world()
    family = FAMILIES[name]()
    clean = normalise.fit(x, family.normalise)(x)
    up, down = (answers(family.fit(clean, y, 0), clean) for y in (labels, 1 - labels))
    torch.testing.assert_close(up, -down, atol=1e-3, rtol=1e-3)
