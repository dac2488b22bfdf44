"""TRL's trainers as algorithms of a trial: stopped anywhere and resumed they end with the same
bits, they leave nothing behind in the policy, and they ask nobody but the trial.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from lab import PROMPTS, Lab, MakeLab
from runs import rows, timeless

from rlhf_exp import processes
from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.algorithms.trainer import TrainerAlgorithm, completion_ids
from rlhf_exp.algorithms.trl_online import GRPO, RLOO
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.trial import Stopped

pytest_plugins = ["lab_fixtures"]

COMPLETIONS = ["aa", "ee oo", "xyz", "iii", "k", "ooo uuu", "ttt"]
TOLD = [Demonstration(p, c) for p, c in zip(PROMPTS * 2, COMPLETIONS * 3, strict=False)]
DATA = Dataset(prompts=PROMPTS, held_out=PROMPTS, demonstrations=TOLD)
PAIRS = [
    {"prompt": p, "chosen": a, "rejected": b}
    for p in PROMPTS
    for a, b in (("aa ee", "xx"), ("ooo", "tk k"))
]
LORA = {"r": 2, "fan_in_fan_out": True}
rates: dict[str, Any] = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1}
several: dict[str, Any] = {"batch": 4, "micro_batch": 2} | rates  # micro-batches in a step
online: dict[str, Any] = {"batch": 2, "samples": 4, "micro_batch": 4, "kl_coef": 0.1} | rates

# What each has to remember: more than one epoch, round or update per sample, Adam's moments, a
# moving learning rate, random numbers.
STATEFUL: dict[str, Callable[[], TrainerAlgorithm]] = {
    "sft": lambda: SFT(epochs=2, held_out=2, **several),
    "packed": lambda: SFT(steps=6, packing=True, max_length=32, **several | {"batch": 2}),
    "dpo": lambda: DPO(epochs=1.5, **several),
    "rounds": lambda: DPO(
        pairs="sampled", reference="previous", rounds=2, pairs_per_round=12, **several
    ),
    "grpo": lambda: GRPO(steps=6, **online),
    "updates": lambda: GRPO(steps=6, iterations=2, **online),
    "rloo": lambda: RLOO(steps=6, **online),
}


def prepare(room: Lab) -> Lab:
    """Preference pairs where the trial looks for them."""
    for name in ("train", "evaluation"):
        write_jsonl(room.directory / f"{name}.jsonl", PAIRS)
    room.trial.evaluator.settings.every = 3
    return room


def train(room: Lab, algorithm: TrainerAlgorithm, stop: int | None = None) -> Lab:
    """Train on the toy; a signal comes during step `stop`."""
    prepare(room)
    room.signal_in(stop)
    with room.trial.listening():
        algorithm.run(room.policy, room.reward, DATA, room.trial)  # type: ignore[attr-defined]
    return room


# ------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("name", "lora"), [*((name, None) for name in STATEFUL), ("dpo", LORA), ("rloo", LORA)]
)
def test_stopped_twice_and_resumed_to_the_same_bits(
    name: str, lora: dict | None, base: Path, tmp_path: Path
) -> None:
    whole = train(Lab(base, tmp_path / "whole", lora=lora), STATEFUL[name]())
    last = whole.trial.steps
    assert last > 5
    for stop in (2, last - 2):
        with pytest.raises(Stopped, match=f"stopped after step {stop}"):
            train(Lab(base, tmp_path / "cut", lora=lora), STATEFUL[name](), stop)
    cut = train(Lab(base, tmp_path / "cut", lora=lora), STATEFUL[name]())
    assert torch.equal(cut.weights(), whole.weights())
    metrics = timeless(whole.directory / "metrics.jsonl")
    assert timeless(cut.directory / "metrics.jsonl") == metrics
    assert sorted(row["step"] for row in metrics if not is_evaluation(row)) == list(range(last))
    assert not torch.equal(whole.weights(), Lab(base, tmp_path / "new", lora=lora).weights())


def is_evaluation(row: dict[str, float]) -> bool:
    return "evaluation/reward/gold" in row


def test_stopped_between_rounds(base: Path, tmp_path: Path) -> None:
    """The next round starts anew: its own optimizer, its own pairs."""
    whole = train(Lab(base, tmp_path / "whole"), STATEFUL["rounds"]())
    with pytest.raises(Stopped):
        train(Lab(base, tmp_path / "cut"), STATEFUL["rounds"](), whole.trial.steps // 2)
    cut = train(Lab(base, tmp_path / "cut"), STATEFUL["rounds"]())
    assert torch.equal(cut.weights(), whole.weights())
    first, second = (rows(tmp_path / "cut" / "pairs" / f"round-{i}.jsonl") for i in (0, 1))
    assert first != second
    assert second == rows(tmp_path / "whole" / "pairs" / "round-1.jsonl")


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_looking_more_often_changes_nothing(name: str, base: Path, tmp_path: Path) -> None:
    seldom = train(Lab(base, tmp_path / "seldom"), STATEFUL[name]())
    room = Lab(base, tmp_path / "often")
    prepare(room)
    room.trial.evaluator.due = lambda step, last: True  # type: ignore[method-assign]
    room.trial.checkpoints.every = 1
    often = train(room, STATEFUL[name]())
    assert torch.equal(often.weights(), seldom.weights())
    seen = [row for row in rows(often.directory / "metrics.jsonl") if is_evaluation(row)]
    assert len(seen) == often.trial.steps + 1


# -------------------------------------------------------------------------------- what is left over


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "rloo"])
def test_the_policy_comes_back_as_it_went(name: str, lora: dict | None, lab: MakeLab) -> None:
    room = lab(lora=lora)
    model = room.policy.model
    hooks = len(model._forward_pre_hooks)
    train(room, STATEFUL[name]())
    assert room.policy.model is model
    assert not any(module.training for module in model.modules())
    assert not [m for m in model.modules() if "forward" in vars(m) and m is not model]
    assert "forward" not in vars(model)
    assert len(model._forward_pre_hooks) == hooks
    if lora is not None:
        assert list(model.peft_config) == ["default"]
    room.policy.save(room.directory / "policy")
    assert len(room.policy.sample(PROMPTS)) == len(PROMPTS)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "rloo"])
def test_only_what_is_trainable_is_trained(name: str, lab: MakeLab) -> None:
    room = lab(train_top=1)
    before = {k: p.clone() for k, p in room.policy.model.named_parameters()}
    train(room, STATEFUL[name]())
    moved = {k for k, p in room.policy.model.named_parameters() if not torch.equal(p, before[k])}
    assert moved
    assert all(".h.1." in k or ".ln_f." in k for k in moved), moved


@pytest.mark.parametrize("name", ["dpo", "rounds", "grpo", "rloo"])
def test_no_reference_is_loaded_by_name(
    name: str, lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL loads one unless it is kept from doing so."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("TRL loads a model")

    for trainer in ("dpo", "grpo", "rloo"):
        monkeypatch.setattr(f"trl.trainer.{trainer}_trainer.create_model_from_path", refuse)
    train(lab(), STATEFUL[name]())


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("make", [SFT, DPO])
def test_micro_batches_do_not_change_what_is_learned(make: Any, lab: MakeLab) -> None:
    start = lab().weights()

    def learned(micro_batch: int) -> torch.Tensor:
        room = lab()
        for module in room.policy.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        algorithm = make(batch=8, micro_batch=micro_batch, lr=1e-3, epochs=1.0)
        return train(room, algorithm).weights() - start

    whole, pieces = learned(8), learned(2)
    assert whole.norm() > 0.05
    # Adam makes full steps of gradients that are rounding errors, hence no equality
    assert (whole - pieces).norm() < 0.1 * whole.norm()


def test_the_learning_rate_follows_its_schedule(lab: MakeLab) -> None:
    def rates_of(**settings: Any) -> list[float]:
        room = train(lab(), SFT(steps=5, batch=4, micro_batch=4, lr=0.1, **settings))
        return [row["sft/lr"] for row in rows(room.directory / "metrics.jsonl") if "sft/lr" in row]

    constant = rates_of(schedule="constant", warmup=0.4)
    assert constant == pytest.approx([0.0, 0.05, 0.1, 0.1, 0.1])
    linear = rates_of(schedule="linear", warmup=0.0)
    assert linear == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])


def test_a_loss_that_is_no_number_ends_the_run(lab: MakeLab) -> None:
    room = lab()
    with torch.no_grad():
        next(room.policy.model.parameters()).mul_(float("nan"))
    room.trial.begin = lambda policy, algorithm, steps: 0  # type: ignore[method-assign]
    room.trial.steps = 5
    room.trial.log.begin(0, 5)
    with pytest.raises(ValueError, match=r"the loss of step 1 is nan: .* lower sft\.lr"):
        train(room, SFT(steps=5, batch=4, micro_batch=4))


def test_completions_are_tokenized_as_they_follow_their_prompts(lab: MakeLab) -> None:
    policy = lab(prefix="say ").policy
    prompts, completions = ["big cat:", "a", "old hat:"], [" aa", "b c", ""]
    found = completion_ids(policy, prompts, completions)
    end = policy.tokenizer.eos_token_id
    for asked, ids, p, c in zip(policy.encode(prompts), found, prompts, completions, strict=True):
        assert ids[-1] == end
        assert end not in ids[:-1]
        assert policy.tokenizer.decode(asked + ids[:-1]) == f"say {p}{c}"


def test_a_prompt_keeps_its_tokens_where_text_would_merge_with_it(lab: MakeLab) -> None:
    policy = lab().policy
    merged = policy.encode(["big"])[0]
    assert len(merged) == 1, "the tokenizer knows the word"
    (ids,) = completion_ids(policy, ["bi"], ["g"])
    assert policy.encode(["bi"])[0] + ids[:-1] != merged
    assert policy.tokenizer.decode(ids[:-1]) == "g"


def test_under_a_chat_template_the_completion_follows_the_header(lab: MakeLab) -> None:
    policy = lab(chat=True).policy
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (ids,) = completion_ids(policy, ["big cat"], ["aa"])
    (asked,) = policy.encode(["big cat"])
    assert policy.tokenizer.decode(asked + ids[:-1]) == "<user>big cat<assistant>aa"


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, r"sft\.schedule=cosin .* did you mean cosine"),
        ({"warmup": 1.5}, r"sft\.warmup=1\.5 must be a number of steps, or a share"),
        ({"betas": [0.9]}, r"sft\.betas=\[0\.9\] two numbers"),
        ({"batch": 6, "micro_batch": 4}, r"6 rows .* multiple of sft\.micro_batch=4"),
        ({"batch": 0}, r"sft\.batch=0"),
        ({"epochs": 0.0}, r"sft\.epochs=0\.0"),
        ({"steps": 0}, r"sft\.steps=0"),
        ({"held_out": -1}, r"sft\.held_out=-1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFT(**settings)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "rloo"])
def test_an_adapter_on_the_head_is_refused(name: str) -> None:
    policy = tiny_policy(lora={"r": 2, "target_modules": ["c_attn", "lm_head"]})
    with pytest.raises(ValueError, match=r"policy\.lora\.target_modules names lm_head"):
        STATEFUL[name]().check(policy, DATA)


def test_rows_that_the_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, policy = DPO(steps=1, batch=6, micro_batch=2, lr=1e-3), tiny_policy()
    monkeypatch.setattr(processes, "count", lambda: 3)
    algorithm.check(policy, DATA)
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(
        ValueError, match=r"algo\.batch=6\) cannot be shared by 4 processes in micro"
    ):
        algorithm.check(policy, DATA)
