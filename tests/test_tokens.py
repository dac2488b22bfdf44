"""The token lint refuses a tokenizer under which training is about other tokens than the text."""

from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from rlhf_exp import tokens, weights

PROMPT = "a slow drama about a sailor :"


@pytest.fixture
def tokenizer(tiny_base) -> Any:
    """The tokenizer of the tiny policy: byte-level, end of text 0, pad 1, no begin of text."""
    return weights.load_tokenizer(tiny_base())


def adding(tokenizer: Any, template: str) -> Any:
    """`tokenizer` with a begin-of-text token <s>, placing special tokens as `template` says."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return tokenizer


def test_sound_tokenizers_pass(tokenizer: Any) -> None:
    assert tokenizer.decode(tokens.encode_prompts(tokenizer, [PROMPT], chat=False)[0]) == PROMPT
    tokens.lint(tokenizer, [PROMPT], chat=False)
    with_bos = adding(tokenizer, "<s> $A")
    assert tokens.encode_prompts(with_bos, [PROMPT], chat=False)[0][0] == with_bos.bos_token_id
    tokens.lint(with_bos, [PROMPT], chat=False)


def test_begin_of_text_twice_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="begin-of-text token '<s>' twice: remove it"):
        tokens.lint(adding(tokenizer, "<s> $A"), [PROMPT, "<s>" + PROMPT], chat=False)


def test_no_end_of_text_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokens.lint(tokenizer, [PROMPT], chat=False)


def test_padding_with_end_of_text_is_refused(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match=r"pads with its end-of-text token '<\|endoftext\|>'"):
        tokens.lint(tokenizer, [PROMPT], chat=False)


def test_no_padding_is_refused(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token of its own"):
        tokens.lint(tokenizer, [PROMPT], chat=False)


def test_end_of_text_after_the_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="appends the end-of-text token"):
        tokens.lint(adding(tokenizer, "$A <|endoftext|>"), [PROMPT], chat=False)


def test_text_that_does_not_come_back_is_refused(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokens.lint(tokenizer, [PROMPT], chat=False)
    with pytest.raises(ValueError, match="does not round-trip the prompt 'A Slow"):
        tokens.lint(tokenizer, ["A Slow drama"], chat=False)


def test_chat_without_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"set policy\.chat=false"):
        tokens.lint(tokenizer, [PROMPT], chat=True)


def test_chat_prompts_end_with_the_header_of_the_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokens.lint(tokenizer, [PROMPT], chat=True)
    (ids,) = tokens.encode_prompts(adding(tokenizer, "<s> $A"), [PROMPT], chat=True)
    assert tokenizer.decode(ids) == f"user: {PROMPT}\nassistant:", "no second begin of text"


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_empty_prompt_is_refused_by_number(tokenizer: Any, prompt: str) -> None:
    prompts = [PROMPT, prompt]
    encoded = tokens.encode_prompts(tokenizer, prompts, chat=False)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        tokens.check_lengths(encoded, prompts, 64, 12)


def test_prompt_must_leave_room_for_the_completion(tokenizer: Any) -> None:
    encoded = tokens.encode_prompts(tokenizer, [PROMPT, PROMPT * 2], chat=False)
    longest = len(encoded[1])
    tokens.check_lengths(encoded, [PROMPT, PROMPT * 2], longest + 12, 12)
    tokens.check_lengths(encoded, [PROMPT, PROMPT * 2], None, 12)
    with pytest.raises(
        ValueError, match=rf"prompt 2 .*{longest} tokens and policy\.max_new_tokens=13.*context of"
    ):
        tokens.check_lengths(encoded, [PROMPT, PROMPT * 2], longest + 12, 13)


# ----------------------------------------------------------------------------- masks and positions


def test_a_response_goes_up_to_its_first_end() -> None:
    end, pad = 0, 1
    assert tokens.until([5, 6, end, pad, pad], end) == [5, 6, end]
    assert tokens.until([5, end, 6, end, pad], end) == [5, end]
    assert tokens.until([5, 6, 7], end) == [5, 6, 7]


def test_last_token_on_either_side_of_the_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert tokens.last_token(mask).tolist() == [1, 3, 3, 2]


# ----------------------------------------------------------------------------------- distinct pads


@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
def test_pad_becomes_distinct_from_end_of_text(tiny_base, pad: str | None) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base())
    tokenizer.pad_token = pad
    weights.set_distinct_pad(tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.pad_token == weights.PAD


def test_unknown_token_serves_as_pad_before_the_vocabulary_grows(tiny_base) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base())
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    tokenizer.pad_token = tokenizer.eos_token
    size = len(tokenizer)
    weights.set_distinct_pad(tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<unk>", size)
