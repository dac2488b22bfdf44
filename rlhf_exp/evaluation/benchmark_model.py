"""A policy as lm-evaluation-harness asks it: log-likelihoods of continuations, and greedy text.

Contexts reach the model as prompts do in training: behind the policy's prefix, in its chat template
(description and examples in the one user turn that it knows), without tokens it never samples, and
multiplied as in training. Requests that differ in their last token alone, as the one-token choices
of a question do, share a forward pass.

This module imports lm_eval, an optional dependency.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GenerationConfig

from rlhf_exp import losses
from rlhf_exp.policy import Batch, Policy

logger = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]  # token ids of a context and of what follows it


class PolicyLM(LM):
    """`batch` sequences go through the model at a time; longer contexts than it can take lose their
    beginning, which is logged.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        super().__init__()
        self.policy, self.batch, self.tokenizer = policy, batch, policy.tokenizer
        self.longest = getattr(policy.model.config, "max_position_embeddings", None) or 2**20
        begin = self.tokenizer.bos_token_id
        self.nothing = [self.tokenizer.eos_token_id if begin is None else begin]

    # ---- text to tokens

    @property
    def tokenizer_name(self) -> str:
        """For caches, which are off."""
        return self.tokenizer.name_or_path

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """One user turn with all that is said, then what the answer begins with, if anything."""
        said = "".join(m["content"] for m in chat_history if m["role"] != "assistant")
        begun = "".join(m["content"] for m in chat_history if m["role"] == "assistant")
        turn = [{"role": "user", "content": f"{self.policy.prefix or ''}{said}"}]
        template = self.tokenizer.apply_chat_template
        return template(turn, tokenize=False, add_generation_prompt=True) + begun

    def encode(self, text: str) -> list[int]:
        """As the policy's prompts; under chat the harness has applied the template already."""
        if not self.policy.chat:
            return self.policy.encode([text])[0]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pair(self, context: str, continuation: str) -> Pair:
        """Blanks at the end of a bare context belong to what follows it (the harness's rule)."""
        before = self.encode(context if self.policy.chat else context.rstrip())
        return before or self.nothing, self.encode(context + continuation)[len(before) :]

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation, in nats, and whether greedy decoding would give it."""
        return self.scores([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, in windows as long as the model allows."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tokenizer(text, add_special_tokens=False)["input_ids"],
                prefix_token=self.nothing[0],
                max_seq_len=self.longest - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(score for score, _ in self.scores(pairs)))
        return found

    @torch.no_grad()
    def scores(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """log p of each second part after the first, and whether it is what greedy decoding gives;
        the longest first.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(self._fitting(pairs)):
            alike.setdefault(tuple((context + continuation)[:-1]), []).append(i)
        sequences = sorted(alike, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(sequences), self.batch):
            part = sequences[start : start + self.batch]
            asked = [(row, i) for row, ids in enumerate(part) for i in alike[ids]]
            length = max(len(pairs[i][1]) for _, i in asked)
            logprobs = self._logprobs(part, length)
            for row, i in asked:
                ids = torch.tensor(pairs[i][1], device=logprobs.device)
                there = logprobs[row, length - len(ids) :]
                total = there.gather(1, ids[:, None]).sum()
                found[i] = float(total), bool((there.argmax(1) == ids).all())
        return [found[i] for i in range(len(pairs))]

    def _logprobs(self, sequences: list[tuple[int, ...]], length: int) -> torch.Tensor:
        """[b, length, v] after each of the last `length` tokens of each sequence, float32."""
        last = self.nothing[0]  # stands for the token that is asked for
        batch = self._padded([[*ids, last] for ids in sequences], length)
        logits = losses.without(self.policy.logits(batch), self.policy.control)
        return logits.float().log_softmax(-1)

    def _padded(self, sequences: list[list[int]], length: int) -> Batch:
        """On the left."""
        width, pad, device = (
            max(map(len, sequences)),
            self.tokenizer.pad_token_id,
            self.policy.device,
        )
        gaps = [width - len(ids) for ids in sequences]
        rows = list(zip(gaps, sequences, strict=True))
        ids = torch.tensor([[pad] * gap + row for gap, row in rows], device=device)
        mask = torch.tensor([[0] * gap + [1] * len(row) for gap, row in rows], device=device)
        return Batch(torch.arange(len(rows)), ids, mask, length)

    def _fitting(self, pairs: list[Pair], room: int = 0) -> Iterator[Pair]:
        """Contexts without what the model cannot take beside continuation and `room`."""
        cut = 0
        for context, continuation in pairs:
            space = self.longest - len(continuation) - room
            if space < 1:
                raise ValueError(
                    f"a benchmark's continuation of {len(continuation) + room} tokens leaves no "
                    f"context in the model's {self.longest}: leave the task out"
                )
            cut += len(context) > space
            yield context[-space:], continuation
        if cut:
            logger.warning("%d of %d contexts lost their beginning: too long", cut, len(pairs))

    # ---- text

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each context, up to the first of the task's stops; greedy, unless the task
        wants a sample.
        """
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            asked: Any = request.args
            groups.setdefault(json.dumps(asked[1], sort_keys=True), []).append(i)
        for settings, members in groups.items():
            told = json.loads(settings)
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                texts = self._texts([requests[i].args[0] for i in part], told)
                found |= dict(zip(part, texts, strict=True))
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _texts(self, contexts: list[str], told: dict[str, Any]) -> list[str]:
        """Completions under the task's generation settings; the policy's length where it names
        none.
        """
        stops = told.get("until") or []
        stops = [s for s in ([stops] if isinstance(stops, str) else stops) if s]
        room = told.get("max_gen_toks") or self.policy.max_new_tokens
        encoded = [self.encode(context) or self.nothing for context in contexts]
        pairs: list[Pair] = [(ids, []) for ids in encoded]
        batch = self._padded([ids for ids, _ in self._fitting(pairs, room)], 0)
        self.policy.model.generation_config = self._settings(told, room)
        with self.policy.precision():
            out = self.policy.model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
            )
        made = self.tokenizer.batch_decode(out[:, batch.ids.shape[1] :], skip_special_tokens=True)
        return [before_any(text, stops) for text in made]

    def _settings(self, told: dict[str, Any], room: int) -> GenerationConfig:
        sampled = {k: told[k] for k in ("temperature", "top_p", "top_k") if told.get("do_sample")}
        return GenerationConfig(
            do_sample=bool(told.get("do_sample")),
            max_new_tokens=room,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=self.policy.control or None,
            **sampled,
        )


def before_any(text: str, stops: list[str]) -> str:
    """`text` up to the first of the stops in it."""
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]
