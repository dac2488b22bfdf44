"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), also over quantized weights (Dettmers et al.
2023, QLoRA, arXiv 2305.14314).

`policy.lora` holds fields of peft.LoraConfig. Beside peft's own lists and patterns,
`target_modules` takes three names that mean the same in every architecture: attention, mlp, and all
(both). They are read off a block: the linear layers within a child that is called attention, under
whatever name, and the other linear layers of the block.

peft is imported inside the functions, because it costs seconds.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_exp.artifacts import MANIFEST
from rlhf_exp.choices import nearest
from rlhf_exp.weights import blocks, file_states, saved_settings

PARTS = ("attention", "mlp", "all")


# ---- where adapters go


def add_lora(model: Any, fields: dict[str, Any], *, quantized: bool = False) -> Any:
    """`model` with a fresh LoRA adapter, the identity at the start, in float32 whatever the base.
    ValueError for fields that peft does not know and targets that are not there.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    unknown = sorted(set(fields) - set(LoraConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"policy.lora.{unknown[0]} is no field of peft.LoraConfig: remove it"
            f"{nearest(unknown[0], LoraConfig.__dataclass_fields__)}"
        )
    if quantized:  # norms and head in float32
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    told: dict[str, Any] = {"task_type": "CAUSAL_LM"} | fields | _resolved(model, fields)
    return get_peft_model(model, LoraConfig(**told))


def _resolved(model: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What peft is told about targets: lists of names, and whether their weights are turned."""
    asked = fields.get("target_modules")
    names = targets(model, asked) if isinstance(asked, str) and asked in PARTS else asked
    if isinstance(names, list):
        _require_there(model, names)
    elif isinstance(names, str) and names != "all-linear" and not _matching(model, names):
        raise ValueError(_missing(model, names))
    return {"target_modules": names} | _turned(model, fields)


def _turned(model: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """peft warns where it has to find out by itself that GPT-2 keeps its weights transposed."""
    from transformers.pytorch_utils import Conv1D

    turned = any(isinstance(module, Conv1D) for module in model.modules())
    return {"fan_in_fan_out": True} if turned and "fan_in_fan_out" not in fields else {}


def targets(model: Any, part: str) -> list[str]:
    """Names below a block of the linear layers in `part` (attention, mlp or all), such as
    `self_attn.q_proj`; they are the same in every block, but for blocks of another kind.
    """
    found: dict[str, list[str]] = {"attention": [], "mlp": []}
    for block in blocks(model):
        for name, _ in linear_layers(block):
            found["attention" if _of_attention(name) else "mlp"].append(name)
    found["all"] = found["attention"] + found["mlp"]
    names = list(dict.fromkeys(found[part]))
    if not names:
        raise ValueError(
            f"policy.lora.target_modules={part} finds no linear layer of that part in a "
            f"{type(model).__name__}, whose blocks have {_listed(found['all'])}: name some of these"
        )
    return names


def _of_attention(name: str) -> bool:
    """attn, self_attn, self_attention, attention, crossattention, attention.attention, ..."""
    return any(re.search("att(n|ention)", part) for part in name.split(".")[:-1])


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer below `module`, quantized and turned ones included."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            yield name, layer


def _require_there(model: Any, names: list[str]) -> None:
    """peft is content if one name of a list matches."""
    there = [name for name, _ in model.named_modules()]
    for name in names:
        if not any(each == name or each.endswith(f".{name}") for each in there):
            raise ValueError(_missing(model, name))


def _matching(model: Any, pattern: str) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    except re.error as error:
        raise ValueError(
            f"policy.lora.target_modules={pattern} is no regular expression ({error}): mend it, or "
            f"use a list of names, attention, mlp, all or all-linear"
        ) from None


def _missing(model: Any, name: str) -> str:
    there = dict.fromkeys(each.split(".")[-1] for each, _ in linear_layers(model))
    return (
        f"policy.lora.target_modules names {name}, and no module of this {type(model).__name__} is "
        f"called that: it has {_listed(there)}; attention, mlp and all stand for those of the "
        "blocks"
    )


def _listed(names: Any) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


# ---- adapters of earlier runs


def holds_adapter(source: Path | str, adapter: str) -> bool:
    """Whether the stage sft made `source` from a base with this very adapter merged in."""
    manifest = Path(source) / MANIFEST
    if not manifest.exists():
        return False
    made_from = json.loads(manifest.read_text()).get("spec", {}).get("policy", {})
    return made_from.get("adapter") == file_states(Path(adapter))


def merge_adapter(model, folder: str, base: str):
    """`model` with the adapter at `folder` folded in; refused if the adapter was trained on other
    weights.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").exists():
        raise FileNotFoundError(f"policy.adapter={folder} holds no adapter_config.json")
    require_base(model, path, base)
    return with_adapter(model, path).merge_and_unload()


def with_adapter(model, folder: Path):
    """`model` under the adapter at `folder`, as it was trained: norms and head of a quantized model
    in float32.
    """
    from peft import PeftModel, prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with warnings.catch_warnings():  # over quantized layers GPT-2's weights lay the other way round
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        return PeftModel.from_pretrained(model, folder)


def require_base(model, folder: Path, base: str) -> None:
    """ValueError if the adapter at `folder` was trained on other weights than `model`, which came
    from `base`.
    """
    if (folder / "policy.json").exists():
        expected = saved_settings(folder).get("base_weights")
        if expected is not None and expected != fingerprint(model):
            raise ValueError(
                f"the adapter {folder} was trained on other weights than {base}: give the base it "
                "names"
            )
        return
    recorded = json.loads((folder / "adapter_config.json").read_text()).get(
        "base_model_name_or_path"
    )
    if recorded not in (None, base) and Path(recorded).name != Path(base).name:
        raise ValueError(
            f"the adapter {folder} was trained on {recorded}, not on {base}: give that as "
            "policy.path"
        )


def fingerprint(model: nn.Module) -> str:
    """Identity of the weights below any adapter: names, shapes and first values of the parameters
    that are not quantized.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name or not parameter.is_floating_point():
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        values = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values)
    return digest.hexdigest()
