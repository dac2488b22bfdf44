"""The update that ReST, Quark and ALT share: its loss against worked numbers, and its knobs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lab import PROMPTS, MakeLab
from torch import Tensor, nn

from rlhf_exp.algorithms.imitation import Examples, Imitation, stream
from rlhf_exp.policy import Batch, Rollouts

pytest_plugins = ["lab_fixtures"]
CASE = json.loads((Path(__file__).parent / "vectors" / "conditional.json").read_text())[
    "quark_loss"
]


class Fixed(nn.Module):
    """Always says the same logits [n, r + 1, v]; each row is found by its first token."""

    def __init__(self, logits: list[Any]) -> None:
        super().__init__()
        rows = torch.tensor(logits, dtype=torch.float64)
        self.logits_by_row = nn.Parameter(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits_by_row[input_ids[:, 0]])


def numbers(**settings: Any) -> tuple[Imitation, Examples, Batch]:
    """The worked case: two prompts of one token, responses of two and one."""
    algorithm = Imitation(steps=1, batch=1, **settings)
    model = Fixed(CASE["policy_logits"])
    algorithm.descent = cast(Any, SimpleNamespace(module=model))
    algorithm.policy = cast(Any, SimpleNamespace(control=[4]))
    reference = Fixed(CASE["ref_logits"])
    algorithm.reference = cast(
        Any, SimpleNamespace(logits=lambda b: reference(b.ids).logits[:, :-1])
    )
    mask = torch.tensor(CASE["mask"])
    ids = torch.cat([torch.tensor([[0], [1]]), torch.tensor(CASE["response_ids"])], 1)
    full = torch.cat([torch.ones(2, 1, dtype=torch.long), mask], 1)
    rollouts = Rollouts(["a", "b"], ["", ""], ids, full, mask.float(), torch.ones(2).bool())
    return algorithm, Examples(rollouts, torch.ones(2)), Batch(torch.arange(2), ids, full, 2)


@pytest.mark.parametrize(
    ("settings", "kl", "mean", "total"),
    [
        ({"kl_coef": 0.05}, "kl_policy_ref", "kl_mean_quark", "total_quark"),
        (
            {"kl_coef": 0.05, "kl_direction": "reference_to_policy"},
            "kl_ref_policy",
            "kl_mean_alt",
            "total_alt_kl",
        ),
        ({"kl_coef": 0.0}, None, None, "total_alt_nokl"),
    ],
    ids=["quark", "alt", "alt without KL"],
)
def test_the_loss_is_quarks_and_alts(settings, kl, mean, total) -> None:
    algorithm, examples, batch = numbers(entropy_coef=0.06, **settings)
    terms = {k: v.detach().double() for k, v in algorithm._terms(examples, batch).items()}
    mask = torch.tensor(CASE["mask"]).double()
    count = mask.sum()
    torch.testing.assert_close(terms["nll"], torch.tensor(CASE["lm"]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        terms["entropy"], torch.tensor(CASE["entropy"]).double(), atol=1e-6, rtol=0
    )
    assert ("kl" in terms) == bool(kl)
    if kl:
        torch.testing.assert_close(terms["kl"], torch.tensor(CASE[kl]).double(), atol=1e-6, rtol=0)
        assert float((terms["kl"] * mask).sum() / count) == pytest.approx(CASE[mean], abs=1e-6)
    loss = terms["nll"] + algorithm.kl_coef * terms.get("kl", 0.0) - 0.06 * terms["entropy"]
    assert float((loss * mask).sum() / count) == pytest.approx(CASE[total], abs=1e-6)


def test_every_row_comes_up_equally_often_whatever_the_batch() -> None:
    """No epoch drops its last rows, and none comes twice before all have come once."""
    torch.manual_seed(0)
    seen = torch.cat(list(stream(10, 4, 25)))
    assert len(seen) == 100
    assert torch.bincount(seen).tolist() == [10] * 10
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert [len(rows) for rows in stream(3, 8, 2)] == [3, 3]


def learner(room: Any, **settings: Any) -> tuple[Imitation, Examples]:
    """An imitator with a few completions of the toy policy to imitate."""
    algorithm = Imitation(steps=1, batch=1, minibatch=18, **({"lr": 3e-3} | settings))
    algorithm.setup(room.policy, room.reward, cast(Any, None), room.trial)
    algorithm.prepare()
    rollouts = room.policy.sample(PROMPTS, 2)
    return algorithm, Examples(rollouts, torch.ones(len(rollouts)))


def test_what_is_imitated_becomes_likely(lab: MakeLab) -> None:
    algorithm, examples = learner(lab())
    first = algorithm.imitate(examples, 1)["imitation/nll"]
    algorithm.imitate(examples, 60)
    assert algorithm.imitate(examples, 1)["imitation/nll"] < 0.2 * first


def test_completions_of_no_weight_are_not_imitated(lab: MakeLab) -> None:
    algorithm, examples = learner(lab())
    examples.weights[::2] = 0.0
    algorithm.imitate(examples, 60)
    nll = algorithm._terms(examples, next(iter(_batches(examples))))["nll"].detach()
    per_row = (nll * examples.rollouts.response).sum(1) / examples.rollouts.response.sum(1)
    assert per_row[1::2].max() < per_row[::2].median()


def _batches(examples: Examples) -> Any:
    from rlhf_exp.policy import cut

    yield cut(examples.rollouts, list(range(len(examples.rollouts))))


def test_micro_batches_do_not_change_the_update(lab: MakeLab) -> None:
    weights = []
    for budget in (100_000, 60):
        room = lab()
        algorithm, examples = learner(room, kl_coef=0.5, entropy_coef=0.1, token_budget=budget)
        examples.weights = torch.linspace(0.5, 2.0, len(examples.weights))
        algorithm.imitate(examples, 3)
        weights.append(room.weights())
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("direction", ["policy_to_reference", "reference_to_policy"])
def test_the_kl_holds_the_policy_at_its_reference(direction: str, lab: MakeLab) -> None:
    found = []
    for coef in (1e-9, 3.0):
        algorithm, examples = learner(lab(), kl_coef=coef, kl_direction=direction)
        algorithm.imitate(examples, 40)
        found.append(algorithm.imitate(examples, 1)["imitation/kl"])
    assert found[1] < 0.3 * found[0]


def test_adaptive_coefficients_go_their_ways(lab: MakeLab) -> None:
    """More KL than wanted makes it dearer; more entropy than wanted pays less."""
    algorithm, examples = learner(
        lab(), kl_coef=0.1, kl_target=1e-6, entropy_coef=0.1, entropy_target=1e-6, coef_horizon=36.0
    )
    algorithm.imitate(examples, 2)
    assert algorithm.kl_coef == pytest.approx(0.1 * 0.9 * 1.1)  # at first there is no KL
    assert algorithm.entropy_coef == pytest.approx(0.1 * 0.9**2)
    state = algorithm.state()
    other, _ = learner(lab(), kl_coef=0.1)
    other.load_state(state)
    assert (other.kl_coef, other.entropy_coef) == (algorithm.kl_coef, algorithm.entropy_coef)


def test_the_schedule_falls_to_nothing_over_all_that_is_planned(lab: MakeLab) -> None:
    algorithm, examples = learner(lab(), schedule="linear", warmup=0.1)
    rates = [
        algorithm.imitate(examples, 1, done=i, total=20)["imitation/lr"] / algorithm.lr
        for i in range(20)
    ]
    assert rates[:2] == pytest.approx([0.0, 0.5])
    assert rates[2] == pytest.approx(1.0)
    assert np.diff(rates[2:]) == pytest.approx(-1 / 18)


def test_gradients_that_are_not_finite_end_the_step_in_words(lab: MakeLab) -> None:
    algorithm, examples = learner(lab())
    examples.weights[:] = float("nan")
    with pytest.raises(ValueError, match=r"no update .* finite .* algo\.lr"):
        algorithm.imitate(examples, 2)
    assert algorithm.descent.skipped == 2
    examples.weights[:] = 1.0
    algorithm.descent.restart()
    metrics = algorithm.imitate(examples, 2)
    assert metrics["imitation/skipped_updates"] == 2, "of the run, not of the present optimizer"
    assert "imitation/kl" not in metrics, "nobody measured it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_direction": "forward"}, r"algo\.kl_direction"),
        ({"schedule": "lineal"}, r"algo\.schedule.*linear"),
        ({"warmup": 1.5}, r"algo\.warmup=1\.5"),
        ({"kl_coef": -1.0}, r"algo\.kl_coef=-1\.0"),
        ({"kl_target": 0.0}, r"algo\.kl_target=0\.0"),
        ({"minibatch": 0}, r"algo\.minibatch=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imitation(steps=1, batch=1, **settings)
