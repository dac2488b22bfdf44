"""Models known by their config alone: shapes without weights.

Parameters are counted on torch's meta device. A hub id needs the hub's config.json and nothing
else; folders, GGUF files and architectures built from scratch need no network.

Left out: weights that differ from what their config says.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import adapters, forward, weights

# Bytes of a quantized weight. int8: one, and a float32 per row, which is counted apart. nf4: half
# of one, an 8-bit scale for 64 weights, and a float32 for 256 scales (Dettmers et al. 2023).
QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}


TRACED = ("eager", "sdpa")  # kinds of attention that need no package; flash takes what sdpa takes


def read_config(path: str, package: str | None = None) -> Any:
    """The config of a hub id, folder or GGUF file, or FileNotFoundError."""
    from transformers import AutoConfig

    source = weights.locate(path, package)
    if isinstance(source, Path) and source.suffix == ".gguf":
        return AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    return AutoConfig.from_pretrained(source)


@dataclass(frozen=True)
class Skeleton:
    """A model and what is trained of it, in the words of policy.Policy."""

    config: Any  # transformers' PretrainedConfig
    head: str = "causal"  # causal, classifier (of one label) or none
    dtype: str = "float32"
    lora: dict[str, Any] | None = None
    train_top: int | None = None
    quantization: str | None = None
    trained: bool = True  # false: all of it is frozen
    checkpointing: bool = False  # activations are computed again on the way back
    attention: str | None = None  # attn_implementation; null: the library's choice

    @property
    def key(self) -> str:
        """Equal for equal skeletons."""
        rest = {k: v for k, v in vars(self).items() if k != "config" and not k.startswith("_")}
        settings = {k: v for k, v in rest.items() if isinstance(v, str | int | dict | None)}
        return self.config.to_json_string() + json.dumps(settings, sort_keys=True, default=str)

    @property
    def depth(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    def cut(self, depth: int) -> "Skeleton":
        """The same model with `depth` blocks."""
        config = copy.deepcopy(self.config)
        inner = config.get_text_config()
        for name, value in vars(inner).items():
            if isinstance(value, list) and len(value) == self.depth:  # a kind for each block
                setattr(inner, name, value[:depth])
        inner.num_hidden_layers = depth
        return replace(self, config=config)

    def frozen(self) -> "Skeleton":
        """The same model when nothing of it is trained."""
        return replace(self, trained=False, lora=None, train_top=None, checkpointing=False)

    def build(self) -> Any:
        """The model, on the default device and in the tensor mode of the moment."""
        chosen = {"attn_implementation": self.attention} if self.attention in TRACED else {}
        kind = getattr(torch, self.dtype)
        model = _CLASSES[self.head]()(self.config, dtype=kind, **chosen).eval()
        if self.quantization is not None:
            _pack(model)
        if not self.trained:
            return model.requires_grad_(False)
        if self.checkpointing:
            forward.recompute(model)
        if self.lora is not None:
            return _adapted(model, self.lora, self.head)
        if self.train_top is not None:
            weights.freeze_bottom(model, self.train_top)
        return model

    @cached_property
    def counts(self) -> "Counts":
        """Of the model, on the meta device."""
        with torch.device("meta"):
            return count(self.build(), self.quantization)


def of_policy(policy: Any, tokenizer: Any = None) -> Skeleton:
    """What `policy` loads, with room for all that its tokenizer knows."""
    known = 0 if tokenizer is None else max(len(tokenizer), tokenizer.pad_token_id + 1)
    return Skeleton(
        _built(policy, tokenizer) if policy.path is None else _read(policy, known),
        dtype=policy.dtype,
        lora=policy.lora,
        train_top=policy.train_top,
        quantization=policy.quantization,
        checkpointing=policy.gradient_checkpointing,
        attention=policy.attention,
    )


def _built(policy: Any, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    fields = dict(policy.architecture or {})
    ids: dict[str, Any] = {"bos_token_id": None, "vocab_size": policy.vocabulary}
    if tokenizer is not None:
        ids |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        ids |= {"pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(fields.pop("model_type"), **ids, **fields)


def _read(policy: Any, known: int) -> Any:
    config = read_config(policy.path, policy.package)
    inner = config.get_text_config()
    inner.vocab_size = max(inner.vocab_size, known)
    return config


def settle(model: nn.Module) -> None:
    """Move a model from the meta device to where tensors are made now, in the tensor mode of the
    moment; what was shared stays shared.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = old, new
                if old is not None:
                    table[name] = made[id(old)][1]  # type: ignore[assignment]


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    def build(config: Any, **settings: Any) -> Any:
        config = copy.deepcopy(config)
        config.num_labels, config.pad_token_id = 1, 0  # a real one is given its tokenizer's
        return AutoModelForSequenceClassification.from_config(config, **settings)

    return build


def _bare() -> Any:
    from transformers import AutoModel

    return AutoModel.from_config


_CLASSES = {"causal": _causal, "classifier": _classifier, "none": _bare}


def _adapted(model: Any, lora: dict[str, Any], head: str) -> Any:
    with warnings.catch_warnings():  # of turned weights, which peft turns, and of an old name
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        if head == "causal":
            return adapters.add_lora(model, lora)
        from peft import LoraConfig, get_peft_model

        told = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora)
        return get_peft_model(model, told)


# ---- quantized weights


class _Unpacked(torch.autograd.Function):
    """A product with a weight that exists in full precision for the moment only, as bitsandbytes
    has it: nothing but the packed weight is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x.to(weight.dtype), weight.clone(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return (grads[0].to(weight.dtype) @ weight.clone()).to(grads[0].dtype), None, None


def _pack(model: nn.Module) -> None:
    """Let every linear layer but the head work as a quantized one does; the rest is float32, as
    `adapters.add_lora` makes it.
    """
    packed = {id(p) for p in linear_weights(model)}
    for module in model.modules():
        if id(getattr(module, "weight", None)) in packed:
            turned = not isinstance(module, nn.Linear)  # transformers' Conv1D

            def forward(x: Tensor, m: Any = module, turned: bool = turned) -> Any:
                return _Unpacked.apply(x, m.weight.t() if turned else m.weight, m.bias)

            module.forward = forward  # type: ignore[method-assign]
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.float()
    model.requires_grad_(False)


def linear_weights(model: Any) -> Iterator[nn.Parameter]:
    """The weights that bitsandbytes would quantize: of linear layers, the head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        inside = "lora_" not in name and "score" not in name and "value_head" not in name
        if isinstance(module, nn.Linear | Conv1D) and module is not head and inside:
            yield module.weight  # type: ignore[misc]


# ---- counting


@dataclass(frozen=True)
class Counts:
    """Parameters of a model in groups, and its bytes."""

    total: int
    embeddings: int  # looked up, not multiplied: input embeddings and positions
    head: int  # of the product that gives logits, tied or not; 0 without one
    trained: int
    trained_linear: int  # of `trained`, those multiplied with every token
    trained_head: int
    reached: int  # multiplied with every token and passed by the backward pass; the head left out
    bytes: float
    trained_bytes: float  # of gradients
    layers: int
    width: int  # heads times their size
    tied: bool  # the head is the input embedding

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with; the head, only where logits are."""
        return self.total - self.embeddings - (0 if self.tied else self.head)


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, wherever they lie: ZeRO-3 leaves empty ones behind."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count(model: Any, quantization: str | None = None) -> Counts:
    """Count the parameters of `model`, a language model on any device, meta included."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    config = inner.config.get_text_config()
    head_module = inner.get_output_embeddings()
    looked_up: dict[int, Any] = {
        id(m.weight): m.weight for m in inner.modules() if isinstance(m, nn.Embedding)
    }
    head = [] if head_module is None else [head_module.weight]
    tied = any(id(p) in looked_up for p in head)
    parameters = list({id(p): p for p in model.parameters()}.values())
    trained = [p for p in parameters if p.requires_grad]
    apart = {*looked_up, *map(id, head)}
    packed = {id(p) for p in linear_weights(inner)} if quantization else set()
    return Counts(
        total=sum(map(numel, parameters)),
        embeddings=sum(map(numel, looked_up.values())),
        head=sum(map(numel, head)),
        trained=sum(map(numel, trained)),
        trained_linear=sum(numel(p) for p in trained if id(p) not in apart),
        trained_head=sum(numel(p) for p in head if p.requires_grad),
        reached=_reached(model, parameters, apart),
        bytes=sum(_bytes(p, quantization if id(p) in packed else None) for p in parameters),
        trained_bytes=sum(_bytes(p) for p in trained),
        layers=config.num_hidden_layers,
        width=_attention_width(config),
        tied=tied,
    )


def _bytes(parameter: nn.Parameter, quantization: str | None = None) -> float:
    if quantization is None:
        return numel(parameter) * parameter.element_size()
    rows = 4.0 * parameter.shape[0] if quantization == "int8" else 0.0
    return numel(parameter) * QUANTIZED[quantization] + rows


def _reached(model: Any, parameters: list[nn.Parameter], apart: set[int]) -> int:
    """From the first parameter that is trained on; earlier ones never see a gradient pass."""
    first = next((i for i, p in enumerate(parameters) if p.requires_grad), len(parameters))
    return sum(numel(p) for p in parameters[first:] if id(p) not in apart)


def _attention_width(config: Any) -> int:
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
