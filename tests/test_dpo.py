"""DPO: every loss against worked numbers, pairs from wherever they come, and a toy to learn."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab import DATA, PROMPTS, Lab, MakeLab, Vowels
from runs import rows
from torch import Tensor

from rlhf_exp.algorithms.dpo import DPO, LOSSES, SMOOTHED, sequence_logprobs
from rlhf_exp.algorithms.trainer import scratch
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.labellers import Labeller
from rlhf_exp.labellers.dataset import FromDataset
from rlhf_exp.labellers.gold import Gold
from rlhf_exp.policy import response_logits
from rlhf_exp.preferences import paired, wins

pytest_plugins = ["lab_fixtures"]

VECTOR = json.loads((Path(__file__).parent / "vectors" / "dpo.json").read_text())
GIVEN, WANTED = VECTOR["inputs"], VECTOR["expected"]
PAIR = {"prompt": "big cat:", "chosen": "aa ee", "rejected": "x"}
steady: dict[str, Any] = {"lr": 5e-3, "batch": 16, "micro_batch": 16, "beta": 0.1}


def pairs_in(room: Lab, pairs: list[dict[str, str]], clean: list[dict[str, str]]) -> None:
    write_jsonl(room.directory / "train.jsonl", pairs)
    write_jsonl(room.directory / "evaluation.jsonl", clean)


def train(room: Lab, **settings: Any) -> list[dict[str, float]]:
    """Metrics of every step."""
    with room.trial.listening():
        DPO(**steady | settings).run(room.policy, room.reward, DATA, room.trial)
    return [row for row in rows(room.directory / "metrics.jsonl") if "dpo/loss" in row]


# ------------------------------------------------------------------------------------------ losses


@pytest.fixture
def loss_of(lab: MakeLab) -> Callable[..., tuple[Tensor, Tensor, dict[str, float]]]:
    """Gives the loss of pairs whose log-probabilities are told, its gradient by them (chosen, then
    rejected), and what is logged: the trainer's own code, with a model that says what it is told.
    """

    def computed(
        labels: Sequence[float] = (1.0, 1.0, 1.0), **settings: Any
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        inputs = {k: torch.tensor(v) for k, v in GIVEN.items() if isinstance(v, list)}
        algorithm = DPO(**steady | {"beta": GIVEN["beta"]} | settings)
        room = lab()
        row: dict[str, Any] = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
        row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        with scratch(room.policy) as folder:
            rows = [row | {"probability": p} for p in labels]
            trainer = algorithm._trainer(folder, room.policy, rows, [], 0)
            policy = torch.cat([inputs["policy_chosen"], inputs["policy_rejected"]])
            policy = policy[:, None].requires_grad_()  # completions of one token
            nothing = torch.zeros_like(policy)
            told = SimpleNamespace(
                log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0
            )
            mask = torch.tensor([[0, 1]] * len(policy))
            batch = trainer.data_collator(list(trainer.train_dataset))
            batch |= {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask)}
            batch |= {"completion_mask": mask}
            batch |= {f"ref_{s}_logps": inputs[f"ref_{s}"] for s in ("chosen", "rejected")}
            if algorithm.reference == "none":
                batch |= {f"ref_{s}_logps": torch.zeros(3) for s in ("chosen", "rejected")}
            trainer.model.train()
            loss = trainer.compute_loss(lambda **_: told, batch)
            (gradient,) = torch.autograd.grad(loss, policy)
            logged = {k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()}
        return loss.detach(), gradient[:, 0], algorithm._ours({"loss": 0.0} | logged)

    return computed


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "sigmoid"),
        ({"loss": "conservative", "label_smoothing": GIVEN["label_smoothing"]}, "smoothed"),
        ({"loss": "hinge"}, "hinge"),
        ({"loss": "ipo"}, "ipo_on_same_h"),  # of one token, so its mean is its sum
        ({"reference": "none"}, "reference_free_sigmoid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_match_worked_numbers(settings: dict[str, Any], wanted: str, loss_of: Any) -> None:
    expected = sum(WANTED[wanted]) / 3
    assert float(loss_of(**settings)[0]) == pytest.approx(expected, rel=1e-6)


def test_gradient_and_metrics_match_worked_numbers(loss_of: Any) -> None:
    _, gradient, logged = loss_of()
    assert (-3 * gradient[:3]).tolist() == pytest.approx(WANTED["grad_weight"], rel=1e-5)
    ratios = [p - r for p, r in zip(GIVEN["policy_chosen"], GIVEN["ref_chosen"], strict=True)]
    assert logged["dpo/chosen_log_ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-5)
    reward = 10 * sum(WANTED["reward_rejected"]) / 3  # over beta
    assert logged["dpo/rejected_log_ratio"] == pytest.approx(reward, rel=1e-5)
    assert logged["dpo/margin"] == pytest.approx(sum(WANTED["margin"]) / 3, rel=1e-5)
    assert logged["dpo/accuracy"] == pytest.approx(WANTED["accuracy"], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.3, 0.49])
def test_conservative_is_the_cross_entropy_of_labels_that_may_be_wrong(
    smoothing: float, loss_of: Any
) -> None:
    found = float(loss_of(loss="conservative", label_smoothing=smoothing)[0])
    x = [GIVEN["beta"] * h for h in WANTED["h"]]
    expected = [
        (1 - smoothing) * math.log1p(math.exp(-v)) + smoothing * math.log1p(math.exp(v)) for v in x
    ]
    assert found == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_are_what_the_loss_is_the_cross_entropy_to(
    smoothing: float, loss_of: Any
) -> None:
    labels = (0.9, 0.5, 0.6)
    settings = {"loss": "conservative", "label_smoothing": smoothing} if smoothing else {}
    found = float(loss_of(labels=labels, **settings)[0])
    expected = 0.0
    for h, p in zip(WANTED["h"], labels, strict=True):
        x, right = GIVEN["beta"] * h, (1 - smoothing) * p + smoothing * (1 - p)
        expected += right * math.log1p(math.exp(-x)) + (1 - right) * math.log1p(math.exp(x))
    assert found == pytest.approx(expected / 3, rel=1e-4)
    assert found != pytest.approx(float(loss_of(**settings)[0]), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_gradient(loss: str, loss_of: Any) -> None:
    """So the trainer knows them all."""
    smoothing = 0.0 if SMOOTHED.get(loss, True) else 0.1
    value, gradient, _ = loss_of(loss=loss, label_smoothing=smoothing)
    assert value.isfinite()
    assert gradient.abs().max() > 1e-4


# ------------------------------------------------------------------------------------------- pairs


def test_best_and_worst_of_each_prompt_are_a_pair() -> None:
    ranks = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 1.0, 2.0, 3.0])
    found, dropped = paired(["a", "b", "c", "d", "e", "f", "g", "g", "g"], ranks, 3, "best_worst")
    assert found == [(1, 0)]
    assert dropped == {"ties": 1, "equal_texts": 1}


def test_all_couples_that_differ_are_pairs() -> None:
    ranks = torch.tensor([1.0, 3.0, 2.0, 2.0, 7.0, 7.0, 7.0, 7.0])
    found, dropped = paired(["a", "b", "c", "c", "d", "e", "f", "g"], ranks, 4, "all")
    assert set(found) == {(1, 2), (1, 3), (1, 0), (2, 0), (3, 0)}
    assert dropped == {"ties": 6, "equal_texts": 1}


def test_a_labeller_ranks_by_wins() -> None:
    class Longer(Labeller):
        def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
            ahead = [len(a) - len(b) for a, b in zip(left, right, strict=True)]
            told = torch.tensor([0.5 + 0.4 * (d > 0) - 0.4 * (d < 0) for d in ahead])
            return torch.where(torch.tensor([not a for a in left]), torch.nan, told)

    found = wins(["p", "q"], ["aa", "aaaa", "a", "", "bb", "bb"], Longer(), 3)
    assert found.tolist() == pytest.approx([1.0, 1.8, 0.2, 1.0, 1.0, 1.0])


def test_reference_log_probabilities_are_those_of_the_completion(lab: MakeLab) -> None:
    policy = lab().policy
    responses = [[40, 41, 42], [50, policy.tokenizer.eos_token_id]]
    rollouts = policy.assemble(PROMPTS[:2], responses)
    found = sequence_logprobs(lambda batch: response_logits(policy.model, batch)[0], rollouts)
    for prompt, response, value in zip(PROMPTS, responses, found.tolist(), strict=False):
        ids = torch.tensor([policy.encode([prompt])[0] + response])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, -len(response) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        assert value == pytest.approx(float(picked.sum()), abs=1e-4)


def test_policy_and_reference_agree_before_the_first_step(lab: MakeLab) -> None:
    """Ours, computed once, and the trainer's own, of the same pairs."""
    room = lab()
    pairs_in(room, [PAIR] * 16, [PAIR])
    first = train(room, steps=2)[0]
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("chosen_log_ratio", "rejected_log_ratio", "margin"):
        assert first[f"dpo/{name}"] == pytest.approx(0, abs=1e-4)


def test_too_long_pairs_are_counted_and_left_out(
    lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    room = lab()
    long = PAIR | {"rejected": "x" * 40}
    pairs_in(room, [PAIR, long, PAIR, long, long], [PAIR, long])
    with caplog.at_level("INFO"):
        metrics = train(room, max_length=20, batch=2, micro_batch=2)
    assert metrics[0]["dpo/pairs"] == 2
    assert metrics[0]["dpo/too_long"] == 3
    assert "dpo/pairs" not in metrics[-1] or len(metrics) == 1
    assert "pairs 2, too long 3" in caplog.text
    assert len(rows(room.directory / "pairs" / "round-0.jsonl")) == 2


def test_pairs_that_are_made_only_now_leave_the_policy_alone(lab: MakeLab) -> None:
    """The stage `preferences` loads the start policy into the same object."""
    room = lab()
    pairs_in(room, [PAIR] * 16, [PAIR])
    model = room.policy.model

    def make() -> Path:
        room.policy.load(room.policy.source)
        return room.directory

    room.trial.pairs = make
    start = room.weights()
    train(room, steps=2)
    assert room.policy.model is model
    assert not torch.equal(room.weights(), start)


@pytest.mark.parametrize("ranked_by", ["reward", "labeller"])
@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_sampled_pairs_put_the_better_first(ranked_by: str, pairing: str, lab: MakeLab) -> None:
    room = lab()
    labeller = Gold()
    labeller.load(room.reward, "cpu")
    room.trial.labeller = lambda: labeller
    settings = {"pairs": "sampled", "pairs_per_round": 24, "samples": 4}
    metrics = train(room, ranked_by=ranked_by, pairing=pairing, **settings)
    found = rows(room.directory / "pairs" / "round-0.jsonl")
    assert len(found) == 24 == metrics[0]["dpo/pairs"]
    vowels = Vowels()
    better, worse = (vowels([], [row[s] for row in found]) for s in ("chosen", "rejected"))
    assert bool((better > worse).all())
    assert metrics[0]["dpo/ties"] > 0
    end = room.policy.tokenizer.eos_token_id
    for row in found:  # what was sampled, not what would be read from its text
        for side in ("chosen", "rejected"):
            text = room.policy.tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True)
            assert text == row[side]
            assert row[f"{side}_ids"][-1] == end or len(row[f"{side}_ids"]) == 8


def test_rounds_sample_from_the_policy_as_it_has_become(lab: MakeLab) -> None:
    def ratios(reference: str) -> list[float]:
        settings = {"pairs": "sampled", "rounds": 2, "pairs_per_round": 32, "reference": reference}
        metrics = train(lab(), **settings, lr=2e-2)
        assert [row["step"] for row in metrics] == [0, 1, 2, 3]
        return [row["dpo/chosen_log_ratio"] for row in metrics]

    start, previous = ratios("start"), ratios("previous")
    assert start[:2] == previous[:2]
    assert start[0] == pytest.approx(0, abs=1e-4)
    assert previous[2] == pytest.approx(0, abs=1e-4)  # against the policy that sampled
    assert abs(start[2]) > 0.1
    free = ratios("none")
    assert free[0] < -5, "the log-probability itself"


# --------------------------------------------------------------------------------------- it learns


def test_dpo_learns_to_write_vowels(lab: MakeLab) -> None:
    room = lab()
    before = room.scores()
    settings = {"pairs": "sampled", "rounds": 3, "pairs_per_round": 96, "samples": 8}
    metrics = train(room, **settings, epochs=2, lr=3e-3, reference="previous")
    after = room.scores()
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    assert after.mean() - before.mean() > 10 * error
    assert after.mean() > 4 * before.mean()
    assert metrics[-1]["dpo/accuracy"] > 0.8


def test_held_out_pairs_are_told_apart(lab: MakeLab) -> None:
    room = lab()
    room.trial.evaluator.settings.every = 6
    pairs = [{"prompt": p, "chosen": "aa ee", "rejected": "xx t"} for p in PROMPTS * 4]
    pairs_in(room, pairs, pairs[:7])
    seen = [row for row in train(room, epochs=4) if "dpo/held_out_accuracy" in row]
    assert [row["step"] for row in seen] == [5, 11]
    assert seen[-1]["dpo/held_out_accuracy"] == 1.0
    assert seen[-1]["dpo/held_out_chosen_log_ratio"] > seen[-1]["dpo/held_out_rejected_log_ratio"]


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "sigmoidal"}, r"algo\.loss=sigmoidal .* did you mean sigmoid"),
        ({"loss": "conservativ"}, r"did you mean conservative"),
        ({"pairs": "datasets"}, r"algo\.pairs=datasets .* did you mean dataset"),
        ({"pairing": "best"}, r"algo\.pairing=best .* did you mean best_worst"),
        ({"ranked_by": "labeler"}, r"did you mean labeller"),
        ({"reference": "base"}, r"algo\.reference=base"),
        ({"pairs": "sampled", "samples": 1}, r"algo\.samples=1: a pair takes two"),
        ({"rounds": 3}, r"algo\.rounds=3 .* algo\.pairs=sampled"),
        ({"beta": 0.0}, r"algo\.beta=0\.0"),
        ({"steps": 0}, r"algo\.steps=0"),
        ({"label_smoothing": 0.1}, r"no effect on algo\.loss=sigmoid.* conservative"),
        ({"loss": "conservative"}, r"algo\.loss=conservative .* give algo\.label_smoothing"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"label_smoothing=0\.5 must be .* below 0\.5"),
        ({"batch": 6, "micro_batch": 4}, r"6 rows of a step .* algo\.micro_batch=4"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**steady | settings)


class Flat(Vowels):
    """Thinks the same of everything."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.ones(len(completions))


def test_a_reward_that_ranks_nothing_is_refused(lab: MakeLab) -> None:
    room = lab(reward=Flat())
    wrong = r"only 0 of algo\.pairs_per_round=8 .* ties by algo\.ranked_by=reward"
    with pytest.raises(ValueError, match=wrong):
        train(room, pairs="sampled", pairs_per_round=8)
    assert not (room.directory / "pairs").exists()


def test_completions_that_never_differ_are_refused(lab: MakeLab) -> None:
    room = lab(temperature=1e-4)
    with pytest.raises(ValueError, match=r" [1-9]\d* equal texts.*\(policy\.temperature\)"):
        train(room, pairs="sampled", pairs_per_round=8)


def test_the_datas_own_labels_cannot_rank_samples(lab: MakeLab) -> None:
    room = lab()
    room.trial.labeller = FromDataset
    with pytest.raises(ValueError, match=r"algo\.ranked_by=labeller .* labeller=gold"):
        train(room, pairs="sampled", ranked_by="labeller")


def test_pairs_that_are_all_too_long_are_refused(lab: MakeLab) -> None:
    room = lab()
    pairs_in(room, [PAIR | {"chosen": "aa" * 40}] * 3, [PAIR])
    with pytest.raises(ValueError, match=r"none of 3 preference pairs fits algo\.max_length=20"):
        train(room, max_length=20)
