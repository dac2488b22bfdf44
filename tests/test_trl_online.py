"""GRPO and RLOO: TRL's updates on our samples, scores, reference and prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import DATA, PROMPTS, Lab, MakeLab, Vowels
from runs import rows
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.algorithms.online import prompts_at
from rlhf_exp.algorithms.trainer import scratch
from rlhf_exp.algorithms.trl_online import GRPO, GRPO_LOSSES, RLOO, TRLOnline, counted_positions
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import micro_batches, response_logits
from rlhf_exp.rewards.mix import Mix, Part

pytest_plugins = ["lab_fixtures"]

BOTH = [GRPO, RLOO]
UNEVEN = ["cat:", "big cat:", "old dog: small hat:"]  # padded on the left, side by side
steady: dict[str, Any] = {"lr": 1e-2, "batch": 8, "samples": 4, "micro_batch": 32, "kl_coef": 0.0}


def train(room: Lab, algorithm: TRLOnline, data: Dataset = DATA) -> list[dict[str, float]]:
    """Metrics of every step."""
    with room.trial.listening():
        algorithm.run(room.policy, room.reward, data, room.trial)
    return [row for row in rows(room.directory / "metrics.jsonl") if "reward/proxy" in row]


# ------------------------------------------------------------------------- the same as everywhere


class Asked(Vowels):
    """Remembers what it was asked to score."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        self.asked.append(prompts)
        return super().__call__(prompts, completions)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("iterations", [1, 2])
def test_prompts_come_in_the_order_of_every_online_algorithm(
    make: type[TRLOnline], iterations: int, lab: MakeLab
) -> None:
    room = lab(reward=Asked())
    room.trial.evaluator.proxy = room.trial.evaluator.gold = Vowels()
    train(room, make(steps=3, iterations=iterations, **steady | {"batch": 4, "micro_batch": 8}))
    wanted = [
        [p for p in prompts_at(PROMPTS, step, 4, room.trial.seed) for _ in range(4)]
        for step in range(3)
    ]
    assert room.reward.asked == wanted


@pytest.mark.parametrize("make", BOTH)
def test_members_and_facets_are_logged_as_for_ppo(make: type[TRLOnline], lab: MakeLab) -> None:
    class Long(Vowels):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.tensor([0.1 * len(c) for c in completions])

        def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
            return {"valid": torch.tensor([float(c != "") for c in completions])}

    parts = {"vowels": Part(reward=Vowels(), weight=2.0), "long": Part(reward=Long(), weight=1.0)}
    room = lab(reward=Mix(parts=parts))
    room.trial.log.show_every = 1
    metrics = train(room, make(steps=2, **steady))
    shown = rows(room.directory / "samples.jsonl")
    for row in metrics:
        members = row["reward/proxy/vowels"], row["reward/proxy/long"]
        assert row["reward/proxy"] == pytest.approx(2 * members[0] + members[1], abs=1e-5)
        assert row["length/mean"] > 1
        assert 0 <= row["reward/valid"] <= 1
    assert [row["step"] for row in shown] == [0] * 4 + [1] * 4
    for row in shown:
        (vowels,) = Vowels()([""], [row["completion"]]).tolist()
        assert row["members"]["vowels"] == vowels
        assert row["prompt"] in PROMPTS


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("lora", [None, {"r": 2, "fan_in_fan_out": True}], ids=["whole", "lora"])
def test_policy_and_reference_agree_before_the_first_step(
    make: type[TRLOnline], lora: dict | None, lab: MakeLab
) -> None:
    """With prompts of several lengths and a model of absolute positions."""
    room = lab(lora=lora, prefix="x ")
    data = Dataset(prompts=UNEVEN, held_out=UNEVEN)
    metrics = train(room, make(steps=3, **steady | {"kl_coef": 0.1, "lr": 0.05}), data)
    name = make.name
    assert metrics[0][f"{name}/kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert metrics[2][f"{name}/kl_per_token"] > 1e-3


def test_log_probabilities_are_those_of_sampling(lab: MakeLab) -> None:
    """TRL leaves position ids out, so that padding would move every token of this model."""
    room = lab(temperature=0.7)
    rollouts = room.policy.sample(UNEVEN, 4)
    (batch,) = micro_batches(rollouts, torch.arange(len(rollouts)), 10**6)
    assert not bool(batch.mask[:, 0].all()), "padded on the left"
    with torch.no_grad():
        logits = response_logits(room.policy.model, batch)[0]
    wanted = losses.selective_log_softmax(logits, batch.response_ids, 0.7)
    shown = rollouts.response[batch.rows, : batch.length].bool()

    def scored() -> Tensor:
        with scratch(room.policy) as folder, torch.no_grad():
            algorithm = GRPO(steps=1, **steady)
            trainer = algorithm._trainer(folder, room.policy, Vowels(), PROMPTS, room.trial)
            return trainer._get_per_token_logps_and_entropies(
                room.policy.model, batch.ids, batch.mask, batch.length
            )[0]

    with counted_positions(room.policy.model):
        torch.testing.assert_close(scored()[shown], wanted[shown], atol=1e-4, rtol=0)
    assert (scored() - wanted)[shown].abs().max() > 1e-3, "no longer needed"


@pytest.mark.parametrize("make", BOTH)
def test_sampling_settings_are_the_policys(make: type[TRLOnline], lab: MakeLab) -> None:
    room = lab(temperature=0.5, top_k=7, top_p=0.9, min_new_tokens=2)
    with scratch(room.policy) as folder:
        algorithm = make(steps=1, **steady)
        trainer = algorithm._trainer(folder, room.policy, Vowels(), PROMPTS, room.trial)
        told = trainer.generation_config
        assert (told.temperature, told.top_k, told.top_p) == (0.5, 7, 0.9)
        assert (told.min_new_tokens, told.max_new_tokens) == (2, 8)
        assert told.eos_token_id == [room.policy.tokenizer.eos_token_id]
        assert told.pad_token_id == room.policy.tokenizer.pad_token_id != told.eos_token_id[0]
        assert trainer.temperature == 0.5


# --------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("make", BOTH)
def test_vowels_are_learned(make: type[TRLOnline], lab: MakeLab) -> None:
    room = lab()
    before = room.scores()
    metrics = train(room, make(steps=20, **steady))
    after = room.scores()
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    assert after.mean() - before.mean() > 10 * error
    assert after.mean() > 4 * before.mean()
    assert [row["step"] for row in metrics] == list(range(20))


@pytest.mark.parametrize("make", BOTH)
def test_the_kl_penalty_holds_the_policy_back(make: type[TRLOnline], lab: MakeLab) -> None:
    def moved(kl_coef: float) -> float:
        room = lab()
        train(room, make(steps=10, **steady | {"kl_coef": kl_coef}))
        evaluations = rows(room.directory / "metrics.jsonl")
        return evaluations[-1]["evaluation/kl/k1"]

    assert moved(5.0) < 0.5 * moved(0.0)


@pytest.mark.parametrize("loss", GRPO_LOSSES)
def test_every_loss_of_grpo_moves_the_policy(loss: str, lab: MakeLab) -> None:
    room = lab()
    start = room.weights()
    (row,) = train(room, GRPO(steps=1, loss=loss, **steady))
    assert row["grpo/grad_norm"] > 1e-3
    assert not torch.equal(room.weights(), start)


def test_nothing_is_learned_from_prompts_whose_completions_score_the_same(lab: MakeLab) -> None:
    class Flat(Vowels):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.ones(len(completions))

    for make in BOTH:
        room = lab(reward=Flat())
        start = room.weights()
        (row,) = train(room, make(steps=1, **steady))
        assert row[f"{make.name}/flat_groups"] == 1
        assert torch.equal(room.weights(), start)


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, r"algo\.samples=1: a completion is compared .* at least 2"),
        ({"steps": 0}, r"algo\.steps=0"),
        ({"iterations": 0}, r"algo\.iterations=0"),
        ({"kl_coef": -0.1}, r"algo\.kl_coef=-0\.1"),
        ({"micro_batch": 12}, r"the 32 rows of a step \(algo\.batch=8\) .* algo\.micro_batch=12"),
        ({"schedule": "liner"}, r"algo\.schedule=liner .* did you mean linear"),
    ],
)
def test_impossible_settings_are_named(
    make: type[TRLOnline], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"steps": 5} | steady | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dappo"}, r"algo\.loss=dappo .* did you mean dapo"),
        ({"scale": "groups"}, r"algo\.scale=groups .* did you mean group"),
    ],
)
def test_impossible_settings_of_grpo_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(steps=5, **steady | settings)


@pytest.mark.parametrize("make", BOTH)
def test_sampling_that_makes_the_kl_wrong_is_refused(make: type[TRLOnline], lab: MakeLab) -> None:
    policy = lab(top_k=5).policy
    with pytest.raises(ValueError, match=rf"policy\.top_k=5 .* {make.__name__} wrong"):
        make(steps=1, **steady | {"kl_coef": 0.1}).check(policy, DATA)
    make(steps=1, **steady).check(policy, DATA)  # nothing asks for a KL


def test_a_score_that_is_no_number_is_refused(lab: MakeLab) -> None:
    class Broken(Vowels):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            scores = super().__call__(prompts, completions)
            scores[-1] = (
                float("nan") if len(scores) == 32 else 0.0
            )  # a step's, not the evaluation's
            return scores

    room = lab(reward=Broken())
    with pytest.raises(ValueError, match=r"reward gave nan for the completion .*must be finite"):
        train(room, RLOO(steps=2, **steady))
    assert not (room.directory / "samples.jsonl").exists()
    assert "forward" not in vars(room.policy.model)


def test_the_run_directory_holds_what_any_other_does(lab: MakeLab) -> None:
    room = lab()
    train(room, RLOO(steps=2, **steady))
    found = {p.name for p in Path(room.directory).iterdir()}
    assert found == {"metrics.jsonl", "samples.jsonl", "evaluation", "checkpoints"}
