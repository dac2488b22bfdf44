"""How a row becomes the prompt that the policy sees: named formats, formats of the user, and the
chat template of a tokenizer.

A format has the user's words in alternatives, of which the first is taken whose columns are all
filled: with and without an input, a title, a system prompt. What is said in turns is wrapped turn
by turn, and the opening of the reply ends the prompt.

`open_assistant` is what policies and proxies of Coste et al. 2023 read, `alpaca` what the gold
reward model of AlpacaFarm reads (Dubois et al. 2023), `tldr` and `article` are those of Stiennon et
al. 2020, `human_assistant` that of Bai et al. 2022.
"""

from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from rlhf_exp.choices import pick


@dataclass(frozen=True)
class PromptFormat:
    """The words of a prompt, and what stands around each turn."""

    texts: tuple[str, ...] = ("{prompt}",)  # with names of columns in braces
    user: str = "{}"
    assistant: str = "{}"
    reply: str = ""  # ends every prompt
    tokenizer: Any = None  # whose chat template stands around the turns instead

    @property
    def dialogue(self) -> bool:
        """Whether it tells turns apart."""
        return self.tokenizer is not None or self.user != "{}"

    @property
    def holds_turns(self) -> bool:
        """Whether a conversation can be put into it."""
        return self.dialogue or self.texts == ("{prompt}",)

    @cached_property
    def alternatives(self) -> list[tuple[str, set[str]]]:
        """Each text with the columns it names."""
        return [(text, {n for _, n, _, _ in Formatter().parse(text) if n}) for text in self.texts]

    def render(self, turns: list[str]) -> str:
        """The prompt of a conversation in which the user has the first word and the last."""
        if self.tokenizer is not None:
            return _chat(self.tokenizer, turns)
        sides = (self.user, self.assistant)
        said = [sides[i % 2].replace("{}", turn) for i, turn in enumerate(turns)]
        return "".join(said) + self.reply


def fill(text: str, words: dict[str, str]) -> str:
    """`text` with words for its columns, which may be paths (`{prompt.text}`)."""
    pieces = Formatter().parse(text)
    return "".join(literal + (words[name] if name else "") for literal, name, _, _ in pieces)


def _chat(tokenizer: Any, turns: list[str]) -> str:
    """Without the begin-of-text token, which the policy adds."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "")


INSTRUCTION = (
    "{instruction}\n{input}",
    "{instruction}",
    "{system_prompt}\n\n{question}",
    "{question}",
    "{prompt}",
)
FORMATS = {
    "plain": PromptFormat(),
    "open_assistant": PromptFormat(
        INSTRUCTION, "<|prompter|>{}<|endoftext|>", "<|assistant|>{}<|endoftext|>", "<|assistant|>"
    ),
    "alpaca": PromptFormat(
        (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:",
        )
    ),
    "human_assistant": PromptFormat(
        INSTRUCTION, "\n\nHuman: {}", "\n\nAssistant: {}", "\n\nAssistant:"
    ),
    "question": PromptFormat(
        ("{system_prompt}\n\nQuestion: {question}\n\nAnswer:", "Question: {question}\n\nAnswer:")
    ),
    "tldr": PromptFormat(("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",)),
    "article": PromptFormat(("Article:\n{article}\n\nTL;DR:",)),
}


def prompt_format(wanted: str | list[str], tokenizer: Any, key: str) -> PromptFormat:
    """The format called `wanted`, `chat` for the template of `tokenizer`, or a text (or several,
    the fullest first) with columns in braces; ValueError naming the setting `key`.
    """
    texts = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if any("{" in text for text in texts):
        return _own(texts, key)
    if wanted != "chat":
        return pick(texts[0], FORMATS | {"chat": PromptFormat()}, key)
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            f"{key}=chat needs a tokenizer with a chat template: give its hub id or folder as "
            "data.tokenizer"
        )
    return PromptFormat(INSTRUCTION, tokenizer=tokenizer)


def _own(texts: tuple[str, ...], key: str) -> PromptFormat:
    try:
        named = [
            [name for _, name, _, _ in Formatter().parse(t) if name is not None] for t in texts
        ]
    except ValueError as error:
        raise ValueError(
            f"{key}={list(texts)} is no prompt format ({error}): pair the braces"
        ) from None
    if not all(names and all(names) for names in named):
        raise ValueError(
            f"{key}={list(texts)} is no prompt format: each text must name a column in braces, "
            "such as {prompt}"
        )
    return PromptFormat(texts)
