"""What to change so that a run fits: settings in the order of what they cost, each tried by
planning again.

First what leaves the result as it is: the next stage of ZeRO, offloading, models that are never
trained in the host's memory, smaller micro-batches. Then what is another experiment: a LoRA
adapter, quantized weights under it. The first single change that is enough is named; if none is,
changes are added up until it is.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf

from rlhf_exp.config import build, overridden
from rlhf_exp.hardware import Hardware

Changes = dict[str, Any]
Config = dict[str, Any]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
KEPT = [f.name for f in fields(Hardware)]  # of the machine, whichever class divides the work


def changed(config: Config, changes: Changes) -> Config:
    """A copy of `config` with the settings at these dotted keys; the key `hardware` is an option,
    for the same machine.
    """
    tree = OmegaConf.create(copy.deepcopy(config))
    for key, value in changes.items():
        if key == "hardware":
            kept = {name: config["hardware"][name] for name in KEPT if name in config["hardware"]}
            value = overridden("hardware", {}, [f"hardware={value}"]) | kept
        OmegaConf.update(tree, key, value, merge=False)
    found = OmegaConf.to_container(tree)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def cure(config: Config, known: dict[str, Any]) -> str:
    """The nearest settings with which the plan fits, as overrides for the command line."""
    groups = (_stages, _frozen, _smaller, _adapters)
    found = _first(config, groups, known)
    if found is None:
        return "no setting tried here would do (ZeRO, offloading, micro-batches, LoRA, nf4)"
    if "hardware" in found:  # another option forgets what was given for this machine
        option = overridden("hardware", {}, [f"hardware={found['hardware']}"])
        own = {k: config["hardware"][k] for k in KEPT if k in config["hardware"]}
        given = {f"hardware.{k}": v for k, v in own.items() if v != option.get(k)}
        found = {"hardware": found["hardware"]} | given | found
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
    from rlhf_exp import precision
    from rlhf_exp.plan.estimate import make

    after = changed(config, changes)
    try:
        policy, hardware, algo = (build(after[k], k) for k in ("policy", "hardware", "algo"))
        precision.check_training(policy, hardware, algo)
        return make(after, known).fits
    except ValueError:  # settings that exclude each other
        return False


def _stages(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    """What divides more of the model among the same processes, or keeps it in the host's memory."""
    hardware: Hardware = build(config["hardware"], "hardware")
    several = hardware.processes * hardware.nodes > 1
    for stage in range(hardware.stage + 1, 4) if several else ():
        yield so_far | {"hardware": f"zero{stage}"}
    if hardware.kind == "cuda" and not hardware.offload_parameters:
        yield so_far | {"hardware": "zero3_offload"}


def _frozen(config: Config, so_far: Changes, known: dict[str, Any]) -> Iterator[Changes]:
    if config["hardware"].get("frozen") == "replicated" and config["hardware"]["device"] != "cpu":
        yield so_far | {"hardware.frozen": "offloaded"}


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
