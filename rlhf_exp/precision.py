"""In what numbers a policy is kept, trained and multiplied, and what cannot go together: told
within seconds, before any weights load.

Weights that are trained are float32, or have float32 copies that an optimizer of ZeRO keeps: in
bfloat16 a weight of 0.02 moves in steps of 1e-4, so an update of lr=1e-5 would be rounded away.
Everything else may have half of the digits: `hardware.mixed_precision` says what matrices are
multiplied in (one `Autocast` serves training, reference, sampling and evaluation), `policy.dtype`
and `policy.quantization` how frozen weights are kept.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Autocast:
    """Opens blocks in which matrices are multiplied as `mixed_precision` says (no, bf16, fp16)."""

    mixed_precision: str = "no"
    device: str = "cpu"

    def __call__(self) -> AbstractContextManager[Any]:
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device, KINDS[self.mixed_precision])


def check(policy: Any, hardware: Any, *, trains: bool) -> None:
    """ValueError if `hardware` cannot hold `policy` as it is asked for, or train it if it `trains`;
    also if adapters or layers are asked for that the architecture does not have.
    """
    if hardware.mixed_precision == "fp16" and hardware.kind == "cpu":
        raise ValueError("hardware.mixed_precision=fp16 needs a GPU: use bf16, or no")
    if policy.quantization is not None:
        _check_quantized(policy, hardware)
    if policy.attention == "flash_attention_2":
        _check_flash(policy, hardware)
    if policy.compile:
        _check_compiled(policy, hardware)
    if trains and policy.lora is None and policy.dtype != "float32":
        _check_halves(policy, hardware)
    if policy.lora is not None or policy.train_top is not None:
        from rlhf_exp.plan.skeleton import of_policy

        _ = of_policy(policy).counts  # on the meta device


def check_training(policy: Any, hardware: Any, algo: Any) -> None:
    """As `check`, for a run that lets `algo` improve `policy`."""
    check(policy, hardware, trains=algo.trains)
    hardware.check_training(policy, algo)


def _check_quantized(policy: Any, hardware: Any) -> None:
    told = f"policy.quantization={policy.quantization}"
    if hardware.offload_parameters:
        raise ValueError(
            f"{told} cannot be offloaded with hardware's offload_param: use hardware=zero3, or "
            "zero2 where the weights fit"
        )
    own = getattr(hardware, "deepspeed", {})
    if any((own.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")):
        raise ValueError(
            f"{told} keeps norms, head and adapters in float32, which hardware.deepspeed.bf16 and "
            "fp16 would not: remove them and set hardware.mixed_precision=bf16"
        )


def _check_flash(policy: Any, hardware: Any) -> None:
    told = "policy.attention=flash_attention_2"
    if hardware.kind == "cpu":
        raise ValueError(f"{told} needs a GPU: use policy.attention=sdpa, or hardware=gpu")
    if policy.dtype == "float32" and hardware.mixed_precision == "no":
        raise ValueError(
            f"{told} cannot work in float32: set hardware.mixed_precision=bf16, or "
            "policy.attention=sdpa"
        )
    if find_spec("flash_attn") is None:
        raise ValueError(
            f"{told} needs its package: pip install flash-attn, or use policy.attention=sdpa"
        )


def _check_compiled(policy: Any, hardware: Any) -> None:
    if policy.quantization is not None:
        raise ValueError(
            f"policy.compile=true cannot compile the products of policy.quantization="
            f"{policy.quantization}: set one of them to its default"
        )
    if hardware.stage == 3:
        raise ValueError(
            "policy.compile=true cannot compile weights that come and go under ZeRO-3 and FSDP2: "
            "set policy.compile=false, or use hardware=zero2"
        )


def _check_halves(policy: Any, hardware: Any) -> None:
    told = f"policy.dtype={policy.dtype}"
    cure = (
        "set policy.dtype=float32 and hardware.mixed_precision=bf16, or train an adapter "
        "(policy.lora={r: 16, target_modules: all})"
    )
    if policy.dtype == "float16":
        raise ValueError(f"{told} loses the gradients of weights that are trained: {cure}")
    if not hardware.masters or policy.sft:
        raise ValueError(
            f"{told} rounds away the small steps of weights that are trained, where no ZeRO keeps "
            f"float32 copies of them (policy.sft=true trains without it): {cure}, or use "
            "policy.sft=false with hardware=zero2"
        )
