"""What to change so that a run fits: settings in the order of what they cost, each tried by
planning again.

First what leaves the result as it is: the next stage of ZeRO, offloading, smaller micro-batches.
Then what is another experiment: a LoRA adapter, quantized weights under it. The first single change
that is enough is named; if none is, changes are added up until it is.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import OmegaConf

Changes = dict[str, Any]
Config = dict[str, Any]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def changed(config: Config, changes: Changes) -> Config:
    """A copy of `config` with the settings at these dotted keys."""
    tree = OmegaConf.create(copy.deepcopy(config))
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, merge=False)
    found = OmegaConf.to_container(tree)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def cure(config: Config, known: dict[str, Any]) -> str:
    """The nearest settings with which the plan fits, as overrides for the command line."""
    groups = (_stages, _offloads, _smaller, _adapters)
    found = _first(config, groups, known)
    if found is None:
        return "no setting tried here would do (ZeRO, offloading, micro-batches, LoRA, nf4)"
    return "this would fit: " + " ".join(f"'{k}={_value(v)}'" for k, v in found.items())


def _first(
    config: Config, groups: tuple[Callable[..., Iterator[Changes]], ...], known: dict[str, Any]
) -> Changes | None:
    for group in groups:
        for changes in group(config, {}, known):
            if _fits(config, changes, known):
                return changes
    together: Changes = {}
    for group in groups:
        last = together
        for changes in group(config, together, known):
            if _fits(config, changes, known):
                return changes
            last = changes
        together = last
    return None


def _fits(config: Config, changes: Changes, known: dict[str, Any]) -> bool:
    from rlhf_exp.plan.estimate import make

    try:
        return make(changed(config, changes), known).fits
    except ValueError:  # settings that exclude each other
        return False


def _stages(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    hardware = config["hardware"]
    if hardware.get("processes", 1) * hardware.get("nodes", 1) > 1 and "stage" in hardware:
        for stage in range(hardware["stage"] + 1, 4):
            yield so_far | {"hardware.stage": stage}


def _offloads(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    hardware = config["hardware"] | {
        k.removeprefix("hardware."): v for k, v in so_far.items() if k.startswith("hardware.")
    }
    for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if hardware.get("stage", 0) >= least and hardware.get(name) is False:
            so_far = so_far | {f"hardware.{name}": True}
            yield so_far


def _smaller(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    """Halves what the largest phase does at once, again and again."""
    from rlhf_exp.plan.estimate import make

    while True:
        now = changed(config, so_far)
        knob = make(now, known).largest.knob
        value = None if knob is None else OmegaConf.select(OmegaConf.create(now), knob)
        if knob is None or not isinstance(value, int) or value < (32 if "budget" in knob else 2):
            return
        so_far = so_far | {knob: _half(value)}
        yield so_far


def _half(value: int) -> int:
    """The largest divisor up to a half."""
    return next(v for v in range(value // 2, 0, -1) if value % v == 0)


def _adapters(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    if config["policy"]["lora"] is None:
        so_far = so_far | {"policy.lora": LORA, "policy.train_top": None}
        yield so_far
    if config["policy"]["quantization"] is None and not config["policy"]["sft"]:
        yield so_far | {"policy.quantization": "nf4"}


def _value(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
