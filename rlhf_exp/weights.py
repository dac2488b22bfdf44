"""Where weights come from: a hub id, a folder, a GGUF file, an installed package, or nothing but a
config.

transformers is imported inside the functions, because it costs seconds.
"""

import hashlib
import json
import logging
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_exp.artifacts import MANIFEST, Store, verify
from rlhf_exp.choices import pick

if TYPE_CHECKING:
    from rlhf_exp.policy import Policy

PAD = "<|pad|>"
END = "<|endoftext|>"
ATTENTION = ("eager", "sdpa", "flash_attention_2")  # what computes it, in transformers' words


def locate(path: str, package: str | None = None) -> Path | str:
    """A folder, a GGUF file, or the id of a model that the hub can be asked for; FileNotFoundError
    if it is none of these.

    `package` wins if it is installed: the folder in it that holds a config.json, else its GGUF
    file.
    """
    if package is not None and (found := _in_package(package)):
        return found
    local = Path(path).expanduser()
    if local.exists():
        if local.is_dir() and not (local / "config.json").exists():
            raise FileNotFoundError(f"{path} holds no config.json, so it is not a model folder")
        return local.resolve()
    if path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") != 1:
        raise FileNotFoundError(
            f"there is no model at {path}: give a hub id (owner/name), a folder or a .gguf file"
        )
    return _reachable(path)


def _in_package(package: str) -> Path | None:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    inside = [Path(str(f.locate())) for f in sorted(files, key=lambda f: len(f.parts))]
    folders = [f.parent for f in inside if f.name == "config.json"]
    return next(iter([*folders, *(f for f in inside if f.suffix == ".gguf")]), None)


def _reachable(hub_id: str) -> str:
    """`hub_id`, if its config is cached or the hub answers within seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if try_to_load_from_cache(hub_id, "config.json") is None:
            # One request without the library's retries, which take half a minute.
            get_hf_file_metadata(hf_hub_url(hub_id, "config.json"), timeout=5)
    except Exception as error:
        raise FileNotFoundError(
            f"the model {hub_id} is neither a local folder nor reachable on the hub "
            f"({type(error).__name__}): "
            "check the name and the network, or give a folder"
        ) from None
    return hub_id


def identity(policy: "Policy") -> dict:
    """What decides the weights `base` returns: config fields, and the state of local files."""
    if policy.quantization is not None and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"policy.quantization={policy.quantization} needs bitsandbytes: pip install "
            "'rlhf_exp[quantization]'"
        )
    adapter = None if policy.adapter is None else file_states(Path(policy.adapter))
    spec: dict[str, Any] = {"dtype": policy.dtype, "adapter": adapter}
    if policy.path is None:
        return spec | {
            "architecture": policy.architecture,
            "vocabulary": policy.vocabulary,
            "seed": policy.seed,
        }
    source = locate(policy.path, policy.package)
    return spec | {"source": policy.path if isinstance(source, str) else file_states(source)}


def file_states(path: Path) -> dict:
    """Name and size of each file below `path`, and the hash of the small ones: tells weights apart
    without reading them.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        "path": str(path),
        "files": [
            [
                f.name,
                f.stat().st_size,
                f.stat().st_mtime_ns if f.stat().st_size > 2**20 else _hash(f),
            ]
            for f in files
        ],
    }


def source_identity(source: Path | str) -> Any:
    """What tells one source of weights from another: an artifact by its name, other folders by
    their files, the hub by id.
    """
    if isinstance(source, str):
        return source
    if (source / MANIFEST).exists():
        verify(source)
        return source.name
    return file_states(source)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def base(policy: "Policy", store: Store, texts: list[str]) -> Path | str:
    """Folder or hub id of the starting weights; builds and GGUF conversions are artifacts."""
    if policy.path is None:
        spec = identity(policy) | {"texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
        return store.get("base", "scratch", spec, lambda folder: _build(policy, texts, folder))
    return loadable(locate(policy.path, policy.package), store)


def loadable(source: Path | str, store: Store) -> Path | str:
    """`source`, or what a GGUF file was converted into."""
    if isinstance(source, Path) and source.suffix == ".gguf":
        return store.get(
            "base",
            source.stem.lower(),
            file_states(source),
            lambda folder: _convert_gguf(source, folder),
        )
    return source


def scratch_tokenizer(policy: "Policy", texts: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=policy.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def _build(policy: "Policy", texts: list[str], folder: Path) -> None:
    """A model with random weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = scratch_tokenizer(policy, texts)
    fields = dict(policy.architecture or {})
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(
        fields.pop("model_type"), vocab_size=len(tokenizer), **ids, **fields
    )
    with torch.random.fork_rng():
        torch.manual_seed(policy.seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise once (tens of seconds) into an ordinary folder that loads in one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def load_tokenizer(source: Path | str):
    """The tokenizer of a model, padding on the left with a token that is not the end of text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="left")
    set_distinct_pad(tokenizer)
    return tokenizer


def set_distinct_pad(tokenizer) -> None:
    """Pad with the unknown token where end-of-text is the pad (or there is none), else with a token
    of our own.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    spare = tokenizer.unk_token
    if spare is not None and spare not in (tokenizer.eos_token, tokenizer.bos_token):
        tokenizer.pad_token = spare
    else:
        tokenizer.add_special_tokens({"pad_token": PAD})


def load_causal_lm(
    source: Path | str,
    dtype: str,
    tokenizer,
    quantization: str | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> Any:
    """Causal language model whose config agrees with `tokenizer` about padding; embeddings grow if
    a pad was added. With int8 or nf4 weights it is put on `device` while loading.
    """
    from transformers import AutoModelForCausalLM

    settings = _quantized(quantization, dtype, device) if quantization else {}
    if attention is not None:
        settings["attn_implementation"] = attention
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, dtype), **settings
    )
    fit_pad(model, tokenizer)
    for module in model.modules():  # a packing for some CPUs that drops gradients after generate()
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantized(quantization: str, dtype: str, device: str | torch.device) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    # it would say with every product that int8 multiplies in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def fit_pad(model, tokenizer) -> None:
    """Make room in `model` for all that the tokenizer knows, its pad token included."""
    needed = max(len(tokenizer), tokenizer.pad_token_id + 1)
    if needed > model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the new rows are drawn; every load must give the same model
            model.resize_token_embeddings(needed)
    model.config.pad_token_id = tokenizer.pad_token_id


def saved_settings(source: Path | str) -> dict[str, Any]:
    """What `Policy.save` noted beside the weights; nothing for weights of other origin."""
    file = Path(source) / "policy.json"
    return json.loads(file.read_text()) if file.exists() else {}


def add_tokens(model, tokenizer, names: list[str], like: str) -> list[int]:
    """Teach `tokenizer` and `model` new special tokens; returns their ids.

    Their embeddings start as draws from the distribution of the others, dimension by dimension
    (Lu et al. 2022, Quark), or as copies of the end-of-text token's (`like="end"`). Where the
    embeddings are frozen, the new rows alone are trained.
    """
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = tokenizer.convert_tokens_to_ids(names)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    old = inner.get_input_embeddings().num_embeddings
    if max(ids) >= old:
        inner.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    both = inner.get_input_embeddings(), inner.get_output_embeddings()
    layers = {id(layer.weight): layer for layer in both}  # one, where they are tied
    frozen = not all(p.requires_grad for p in inner.parameters())
    for layer in layers.values():
        seen = layer.weight.detach()[: min(ids)].float()
        with torch.no_grad():
            layer.weight[ids] = _drawn(seen, len(ids), like, tokenizer.eos_token_id).to(
                layer.weight
            )
        if frozen:
            _train_rows(layer.weight, ids)
    return ids


def _drawn(seen: torch.Tensor, count: int, like: str, end: int) -> torch.Tensor:
    """[count, d] new embeddings in the likeness of those there are [v, d]."""
    starts = {
        "distribution": lambda: torch.normal(
            seen.mean(0).expand(count, -1), seen.std(0).expand(count, -1)
        ),
        "end": lambda: seen[end].repeat(count, 1),
    }
    return pick(like, starts, "algo.token_start")()


def trains_rows(parameter: nn.Parameter) -> bool:
    """Whether some rows of `parameter` are trained and the others frozen."""
    return getattr(parameter, "trains_rows", False)


def _train_rows(weight: nn.Parameter, ids: list[int]) -> None:
    """Let gradients reach these rows of a frozen matrix, and no others."""
    if weight.requires_grad:
        return
    keep = torch.zeros(weight.shape[0], 1, device=weight.device)
    keep[ids] = 1.0
    weight.requires_grad_(True)
    weight.trains_rows = True  # type: ignore[attr-defined]
    weight.register_hook(lambda gradient: gradient * keep.to(gradient.dtype))


def context_length(source: Path | str) -> int | None:
    """Longest sequence the model's config allows; None if it names none."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None)


def generation_config(policy: "Policy") -> Any:
    """Complete settings for generate(), so that none is inherited from the checkpoint."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        max_new_tokens=policy.max_new_tokens,
        min_new_tokens=policy.min_new_tokens or None,
        temperature=policy.temperature,
        top_k=policy.top_k,
        top_p=policy.top_p,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
        suppress_tokens=policy.control or None,
    )


# ---- what is trained


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of any decoder, from the embeddings up."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"found no list of {depth} blocks in {type(model).__name__}: set policy.train_top=null"
    )


def freeze_bottom(model: nn.Module, top: int) -> None:
    """Train the `top` last blocks and what follows them; freeze the rest, embeddings included."""
    layers = blocks(model)
    if not 1 <= top < len(layers):
        raise ValueError(
            f"policy.train_top={top} must be between 1 and {len(layers) - 1}, or null to train all"
        )
    model.requires_grad_(False)
    for block in layers[-top:]:
        block.requires_grad_(True)
    head = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    seen_block = False
    for module in model.modules():
        seen_block = seen_block or module is layers[-1]
        if seen_block and not list(module.children()):
            for parameter in module.parameters():
                parameter.requires_grad_(id(parameter) not in head)
