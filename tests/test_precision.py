"""Fewer digits: where they are allowed, and that all passes have the same ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from lab import DATA, Lab

from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.hardware import Hardware, forget_accelerator
from rlhf_exp.hardware.deepspeed import DeepSpeed
from rlhf_exp.precision import Autocast, check
from rlhf_exp.reference import Reference

pytest_plugins = ["lab_fixtures"]
LORA = {"r": 2, "target_modules": "all"}
HALF = Autocast("bf16")


@pytest.fixture
def mixed() -> Iterator[Any]:
    """The accelerator of a run in bf16; there is one setting per process."""
    forget_accelerator()
    yield Hardware(mixed_precision="bf16").alone()
    forget_accelerator()


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_all_passes_multiply_alike(
    lora: dict[str, Any] | None, base: Any, tmp_path: Path, monkeypatch: Any, mixed: Any
) -> None:
    """Old log-probabilities are those of the first update, and the reference's at the start."""
    monkeypatch.setattr(Hardware, "accelerator", lambda _: mixed)
    room = Lab(base, tmp_path, lora=lora)
    room.policy.precision, room.trial.mixed_precision = HALF, "bf16"
    room.trial.reference = Reference(room.policy)
    algorithm = PPO(steps=1, batch=36, minibatch=12, epochs=1, lr=1e-3)
    algorithm.setup(room.policy, room.reward, DATA, room.trial)
    rollouts = room.policy.sample(DATA.prompts * 4)
    rollouts.scores = room.reward(rollouts.prompts, rollouts.completions)
    experience = algorithm.look_back(rollouts)
    spoken = rollouts.response.bool()
    assert float(experience.log_ratio[spoken].abs().max()) < 1e-5
    plain = Reference(room.policy)
    plain.precision = Autocast()
    algorithm.reference = plain
    apart = algorithm.look_back(rollouts).log_ratio[spoken].abs().max()
    assert float(apart) > 1e-4, "a reference in float32 says something else"
    algorithm.reference = room.trial.reference
    stats = algorithm.update(rollouts, experience, torch.arange(12))
    assert stats["ppo/ratio_error"] < 0.02  # other rows in a batch, other rounding
    assert stats["ppo/ratio"] == pytest.approx(1.0, abs=0.01)


def test_sampling_and_logits_are_those_of_the_precision(tiny_base: Any) -> None:
    policy = tiny_policy()
    policy.load(tiny_base())
    seen: list[torch.dtype] = []
    layer = policy.model.transformer.h[0].mlp.c_fc
    layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    for precision, dtype in ((Autocast(), torch.float32), (HALF, torch.bfloat16)):
        policy.precision = precision
        policy.sample(["x"])
        assert set(seen) == {dtype}
        seen.clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_are_float32_over_any_base(dtype: str, tiny_base: Any) -> None:
    policy = tiny_policy(dtype=dtype, lora=LORA, sft=False)
    check(policy, Hardware(), trains=True)
    policy.load(tiny_base(), trainable=True)
    trained = {p.dtype for p in policy.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {getattr(torch, dtype)})


ZERO3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
QLORA = {"lora": LORA, "quantization": "nf4", "sft": False}


@pytest.mark.parametrize(
    ("policy", "hardware", "message"),
    [
        ({"dtype": "bfloat16"}, Hardware(), r"rounds away .* hardware\.mixed_precision=bf16"),
        ({"dtype": "float16", "train_top": 1}, Hardware(), r"loses the gradients .*policy\.lora"),
        ({}, Hardware(mixed_precision="fp16"), r"fp16 needs a GPU: use bf16"),
        ({"attention": "flash_attention_2"}, Hardware(), r"GPU: use policy\.attention=sdpa"),
        (
            {"attention": "flash_attention_2"},
            Hardware(device="cuda"),
            r"cannot work in float32: set hardware\.mixed_precision=bf16",
        ),
        (
            {"attention": "flash_attention_2", "dtype": "bfloat16"},
            Hardware(device="cuda"),
            r"pip install flash-attn",
        ),
        (QLORA, DeepSpeed(deepspeed=ZERO3), r"nf4 cannot be offloaded .* hardware=zero3"),
        (
            QLORA,
            DeepSpeed(deepspeed={"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}),
            r"keeps norms, head and adapters in float32",
        ),
        (QLORA | {"compile": True}, Hardware(), r"cannot compile the products"),
        ({"compile": True}, DeepSpeed(deepspeed=ZERO3), r"come and go under ZeRO-3"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_go_together(policy: dict[str, Any], hardware: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(tiny_policy(**policy), hardware, trains=True)


def test_halves_that_nobody_trains_or_that_zero_copies() -> None:
    check(tiny_policy(dtype="bfloat16"), Hardware(), trains=False)
    zero2 = DeepSpeed(deepspeed={"zero_optimization": {"stage": 2}})
    check(tiny_policy(dtype="bfloat16", sft=False), zero2, trains=True)
