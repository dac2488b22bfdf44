"""Supervised fine-tuning: what the loss falls on, what is cut, and that packed examples never see
each other.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from lab import PROMPTS, Lab, MakeLab
from runs import rows

from rlhf_exp.algorithms.sft import SFT, Collator, refuse_leaks
from rlhf_exp.algorithms.trainer import scratch
from rlhf_exp.artifacts import Store
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.policy import Policy

pytest_plugins = ["lab_fixtures"]

TOLD = [Demonstration(p, c) for p, c in zip(PROMPTS, ["aa", "e o u", "xyz"] * 3, strict=True)]
small: dict[str, Any] = {"batch": 4, "micro_batch": 4, "lr": 1e-2}


def told(demonstrations: list[Demonstration]) -> Dataset:
    return Dataset(prompts=PROMPTS, held_out=PROMPTS, demonstrations=demonstrations)


def run(room: Lab, algorithm: SFT, demonstrations: list[Demonstration]) -> list[dict[str, float]]:
    """Metrics of every step."""
    with room.trial.listening():
        algorithm.run(room.policy, room.reward, told(demonstrations), room.trial)
    return [row for row in rows(room.directory / "metrics.jsonl") if "sft/loss" in row]


# -------------------------------------------------------------------------------------------- rows


def test_the_loss_falls_on_the_completion_and_its_end_only(lab: MakeLab) -> None:
    policy = lab(prefix="say ").policy
    train, held_out = SFT(held_out=2, **small).rows(policy, told(TOLD))
    assert (len(train), len(held_out)) == (7, 2)
    for row, d in zip([*train, *held_out], TOLD, strict=True):
        (asked,) = policy.encode([d.prompt])
        answer = [i for i in row["labels"] if i != -100]
        assert row["labels"] == [-100] * len(asked) + answer
        assert row["input_ids"] == asked + answer
        assert answer[-1] == policy.tokenizer.eos_token_id
        assert policy.tokenizer.decode(answer[:-1]) == d.completion


def test_what_is_too_long_is_cut_or_dropped_and_counted(
    lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    policy = lab().policy
    long = [Demonstration("big cat:", "x" * 30), Demonstration("y" * 40, "a")]
    with caplog.at_level(logging.INFO):
        train, _ = SFT(max_length=16, **small).rows(policy, told([*TOLD, *long]))
    assert len(train) == len(TOLD) + 1
    assert max(len(row["input_ids"]) for row in train) == 16
    assert policy.tokenizer.eos_token_id not in train[-1]["labels"]
    assert "2 of 11 demonstrations exceed 16 tokens: 1 are cut, 1 dropped" in caplog.text


@pytest.mark.parametrize(
    ("demonstrations", "settings", "message"),
    [
        ([], {}, r"needs demonstrations and the data has none: give data\.demonstrations"),
        (TOLD, {"held_out": 9}, r"sft\.held_out=9 leaves none of 9 demonstrations"),
        (TOLD, {"max_length": 2}, r"shorter than sft\.max_length=2 tokens: raise it"),
    ],
)
def test_nothing_to_learn_from_is_refused(
    demonstrations: list[Demonstration], settings: dict[str, int], message: str, lab: MakeLab
) -> None:
    with pytest.raises(ValueError, match=message):
        SFT(**small | settings).rows(lab().policy, told(demonstrations))


# ---------------------------------------------------------------------------------------- learning


def test_demonstrations_are_learned_and_held_out_ones_told_of(lab: MakeLab) -> None:
    room = lab()
    room.trial.evaluator.settings.every = 20
    pairs = [Demonstration(p, "aa") for p in PROMPTS * 2]
    metrics = run(room, SFT(steps=40, held_out=2, **small), pairs)
    assert [row["step"] for row in metrics] == list(range(40))
    assert metrics[0]["sft/loss"] > 3
    assert metrics[-1]["sft/loss"] < 0.3
    assert metrics[-1]["sft/token_accuracy"] > 0.9
    seen = [row for row in metrics if "sft/held_out_loss" in row]
    assert [row["step"] for row in seen] == [19, 39]
    assert seen[1]["sft/held_out_loss"] < seen[0]["sft/held_out_loss"] < 3
    assert float(room.scores(4).mean()) > 1.5, "two vowels in nearly every completion"


def test_the_stage_reports_the_held_out_loss(lab: MakeLab, tmp_path: Path) -> None:
    policy = lab().policy
    (tmp_path / "made").mkdir()
    SFT(steps=3, held_out=2, **small).make(tmp_path / "made", told(TOLD), policy)
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert 0 < report["sft/held_out_loss"] < 6
    assert (tmp_path / "made" / "model.safetensors").exists()
    Policy(path=str(tmp_path / "made")).load(tmp_path / "made")


# ----------------------------------------------------------------------------------------- packing


def packed_and_alone(room: Lab) -> tuple[float, float]:
    """The loss of the same demonstrations, in rows of their own and packed."""
    found = []
    for packing in (False, True):
        algorithm = SFT(steps=1, packing=packing, max_length=32, batch=9, micro_batch=9)
        held = algorithm.rows(room.policy, told(TOLD))
        with scratch(room.policy) as folder:
            trainer = algorithm._trainer(folder, room.policy, (held[0], held[0]), seed=0)
            found.append((len(held[0]), trainer.evaluate()["eval_loss"]))
    (rows_alone, alone), (rows_packed, packed) = found
    assert rows_packed < rows_alone == 9
    return alone, packed


def test_packed_examples_have_the_loss_they_have_alone(lab: MakeLab) -> None:
    alone, packed = packed_and_alone(lab())
    assert packed == pytest.approx(alone, rel=1e-5)


def test_steps_are_counted_in_packed_rows(lab: MakeLab) -> None:
    """Counted in documents, the learning rate would never come down; and what is held out may be
    too little to fill a row.
    """
    algorithm = SFT(packing=True, epochs=2, max_length=32, held_out=1, batch=1, micro_batch=1)
    train, held_out = algorithm.rows(lab().policy, told(TOLD))
    assert 1 < len(train) < 8
    assert algorithm.steps_on(train) == 2 * len(train)
    assert sum(len(lengths) for lengths in train["seq_lengths"]) == 8
    assert len(held_out) == 1
    assert "seq_lengths" not in held_out.column_names


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_leaks_where_masks_follow_positions(kind: str, attention: str, tiny_base) -> None:
    policy = tiny_policy(kind)
    policy.load(tiny_base(kind))
    policy.model.set_attn_implementation(attention)
    refuse_leaks(policy)


def test_a_model_that_leaks_is_refused(tmp_path: Path) -> None:
    shape = {"model_type": "opt", "num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 48}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    policy = Policy(architecture=shape | {"init_std": 0.2}, vocabulary=300)
    policy.load(policy.base(Store(tmp_path), PROMPTS))
    with pytest.raises(ValueError, match=r"read each other in a opt model .* sft\.packing=false"):
        SFT(packing=True, **small).rows(policy, told(TOLD))


def test_an_attention_mask_would_hide_the_boundaries(tiny_base) -> None:
    """What TRL's own collator does without flash attention; the reason for ours."""
    policy = tiny_policy()
    policy.load(tiny_base())
    row = {"input_ids": [40, 41, 42, 43, 44, 45], "labels": [-100] * 6, "seq_lengths": [3, 3]}
    batch = Collator(0)([row])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert "attention_mask" not in batch
    del batch["labels"]
    with torch.no_grad():
        apart = policy.model(**batch, use_cache=False).logits
        mask = torch.ones_like(batch["input_ids"])
        mixed = policy.model(**batch, attention_mask=mask, use_cache=False).logits
    assert (apart - mixed)[0, 3:].abs().max() > 0.1
