"""Between text and token ids: encoding prompts, finding where a response ends, and the checks made
before training.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def encode_prompts(tokenizer, prompts: list[str], *, chat: bool) -> list[list[int]]:
    """Token ids of each prompt; under `chat` as a user turn followed by the assistant's header."""
    if not chat:
        return tokenizer(prompts, return_token_type_ids=False)["input_ids"]
    turns = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
        )
        for p in prompts
    ]
    return tokenizer(turns, add_special_tokens=False, return_token_type_ids=False)["input_ids"]


def until(ids: list[int], end: int) -> list[int]:
    """`ids` up to and with the first `end`."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def batches_by_length(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of similar length: a batch's size times its longest is at
    most `token_budget`, and it has one index at least.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def check_lengths(
    encoded: list[list[int]], prompts: list[str], context: int | None, new_tokens: int
) -> None:
    """Every prompt has tokens, and room for `new_tokens` more."""
    for number, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True), 1):
        if not ids or not prompt.strip():
            raise ValueError(f"prompt {number} is empty; remove it from the data")
        if context is not None and len(ids) + new_tokens > context:
            raise ValueError(
                f"prompt {number} ({prompt[:40]!r}...) has {len(ids)} tokens and "
                f"policy.max_new_tokens={new_tokens} more do "
                f"not fit into the model's context of {context}: shorten the prompt or lower "
                "policy.max_new_tokens"
            )


def lint(tokenizer, prompts: list[str], *, chat: bool) -> None:
    """Refuse a tokenizer under which training would silently be about other tokens than the text
    says.

    Begin-of-text at most once, end-of-text known, padding distinct from end-of-text, and a boundary
    between prompt and completion that survives decoding.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so no completion could end: set its eos_token"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer pads with its end-of-text token {tokenizer.eos_token!r}, so an ended "
            "completion looks like padding: "
            "give it a pad token of its own"
        )
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            "policy.chat=true needs a chat template and the tokenizer has none: set "
            "policy.chat=false"
        )
    for prompt, ids in zip(prompts, encode_prompts(tokenizer, prompts, chat=chat), strict=True):
        _lint_prompt(tokenizer, prompt, ids, chat)


def _lint_prompt(tokenizer, prompt: str, ids: list[int], chat: bool) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and not chat and ids[:2] == [bos, bos]:
        raise ValueError(
            f"the prompt {prompt[:40]!r} starts with the begin-of-text token "
            f"{tokenizer.bos_token!r} twice: remove it from the text"
        )
    if tokenizer.eos_token_id in ids[-1:]:
        raise ValueError(
            f"the tokenizer appends the end-of-text token to the prompt {prompt[:40]!r}, so the "
            "completion would start after "
            "the end: load it with add_eos_token=False"
        )
    bare = tokenizer.decode([i for i in ids if i != bos])
    if not chat and bare != prompt:
        raise ValueError(
            f"the tokenizer does not round-trip the prompt {prompt[:40]!r} (it comes back as "
            f"{bare[:40]!r}), so the boundary "
            "between prompt and completion is unsafe: normalise the text or use another tokenizer"
        )


def padded(rows: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask [b, t] of `rows`, padded on the tokenizer's side; its own way there goes through
    every number in Python.
    """
    columns = (
        [torch.tensor(r) for r in rows],
        [torch.ones(len(r), dtype=torch.long) for r in rows],
    )
    fill = tokenizer.pad_token_id, 0
    ids, mask = (
        pad_sequence(c, batch_first=True, padding_value=f, padding_side=tokenizer.padding_side)
        for c, f in zip(columns, fill, strict=True)
    )
    return ids, mask


def last_token(mask: Tensor) -> Tensor:
    """Column of the last 1 in each row, whatever side the padding is on: [n, t] -> [n] int64."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
