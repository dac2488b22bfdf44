"""How a row is read: what stands before the reply, and the replies with the better ones first.

columns      columns for prompt and completion, or prompt, chosen and rejected
choice       two completions, and which is better: AlpacaFarm's output_1, output_2, preference (1
             or 2), Coste et al.'s answers and preference (0 or 1), the summaries of Stiennon et al.
ranked       ([prompt, ...], [best, worse, ...])
scored       completions with scores: rows for best-of-n (answers, gold_scores)
turns        [question, answer, ...] or messages with roles
transcripts  whole conversations, chosen and rejected, of HH-RLHF
text         running text, which is cut into a prompt and its continuation

A prompt that is a list of turns is read as a conversation in every schema that has a prompt column.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from rlhf_exp.data.places import Row
from rlhf_exp.data.prompt_formats import PromptFormat, fill
from rlhf_exp.data.sources import Source

ASSISTANT = "\n\nAssistant:"
Reply = tuple[float, str]  # rank and text; the lower rank is better


class Dropped(Exception):
    """A row that is left out and counted; says why."""


# ---- prompts, as turns


def _templated(row: Row, source: Source, form: PromptFormat) -> list[str]:
    column = _column(row, source, "prompt", "row.0")
    if row.has(column) and isinstance(row.at(column), list):
        return _conversation(row, column, source, form)
    there = []
    for text, names in form.alternatives:
        columns = {name: source.column(name) for name in names}
        if all(row.has(c) for c in columns.values()):
            there.append(text)
            words = {name: row.text(c) for name, c in columns.items()}
            if all(w.strip() for w in words.values()):
                return [fill(text, words)]
    if not there:
        lacking = {c for _, names in form.alternatives for c in map(source.column, names)}
        missing = " or ".join(repr(c) for c in sorted(lacking) if not row.has(c))
        raise row.bad(
            f"no column {missing}; it has {', '.join(row.values) or 'none'}: give {source.key}"
            ".columns or another format"
        )
    raise Dropped("empty")


def _column(row: Row, source: Source, name: str, place: str) -> str:
    """The column called `name`, or its place in a row that is a list."""
    return source.column(name, place if "row" in row.values else name)


def _conversation(row: Row, column: str, source: Source, form: PromptFormat) -> list[str]:
    turns = _turns(row, column)
    if not len(turns) % 2:
        raise row.bad(f"the conversation in column {column!r} must end with the user's turn")
    if not form.holds_turns:
        raise row.bad(
            f"column {column!r} is a conversation: give {source.key}.format=plain, chat, "
            "open_assistant or human_assistant"
        )
    return turns


def _turns(row: Row, column: str) -> list[str]:
    """Of a conversation, the user's first; a system message joins the first."""
    value = row.at(column)
    if not isinstance(value, list):
        raise row.bad(f"column {column!r} must be a list of turns, not {value!r}"[:200])
    said = [_turn(row, column, turn, i) for i, turn in enumerate(value)]
    if said and said[0][0] == "system":
        said[:2] = [("user", "\n\n".join(text for _, text in said[:2] if text.strip()))]
    if any(role not in (None, ("user", "assistant")[i % 2]) for i, (role, _) in enumerate(said)):
        raise row.bad(f"the turns of column {column!r} must go user, assistant, user, ...")
    if not said or not all(text.strip() for _, text in said):
        raise Dropped("empty")
    return [text for _, text in said]


def _turn(row: Row, column: str, turn: Any, place: int) -> tuple[str | None, str]:
    role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)
    if not isinstance(text, str) or (isinstance(turn, dict) and role is None):
        raise row.bad(
            f"turn {place + 1} of column {column!r} must be text, or have role and content"
        )
    return role, text


def _said(row: Row, source: Source, form: PromptFormat) -> list[str]:
    turns = _turns(row, source.column("turns", "row"))
    return turns if len(turns) % 2 else turns[:-1]


def _transcribed(row: Row, source: Source, form: PromptFormat) -> list[str]:
    """Verbatim, unless the format has turns of its own."""
    prompt = _divided(row, source.column("chosen"))[0]
    if not form.dialogue:
        return [prompt]
    pieces = re.split(r"\n\n(Human|Assistant):", prompt.removesuffix(ASSISTANT))
    if pieces[1::2] != [("Human", "Assistant")[i % 2] for i in range(len(pieces) // 2)]:
        raise Dropped("turns do not alternate")
    turns = [turn.strip() for turn in pieces[2::2]]
    if not turns or not len(turns) % 2 or not all(turns):
        raise Dropped("turns do not alternate" if all(turns) else "empty")
    return turns


def _divided(row: Row, column: str) -> tuple[str, str]:
    """A transcript before and after the opening of the last reply."""
    text = row.text(column)
    if ASSISTANT not in text:
        raise row.bad(
            f"column {column!r} has no line that begins with 'Assistant:'; remove the row"
        )
    prompt, reply = text.rsplit(ASSISTANT, 1)
    return prompt + ASSISTANT, reply


def _begun(row: Row, source: Source, form: PromptFormat) -> list[str]:
    return [_cut(row, source)[0]]


def _cut(row: Row, source: Source) -> tuple[str, str]:
    """A text after its first words."""
    text = row.text(source.column("text"))
    words = re.match(rf"\s*\S+(\s+\S+){{{source.prompt_words - 1}}}(?=\s)", text)
    if words is None:
        raise Dropped("empty" if not text.strip() else "too few words")
    return words.group().lstrip(), text[words.end() :]


# ---- replies


def _named(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    return [(i, _reply(row, source.column(name))) for i, name in enumerate(wanted)]


def _reply(row: Row, column: str) -> str:
    """Text, or a single message."""
    value = row.at(column)
    if isinstance(value, list) and len(value) == 1:
        return _turn(row, column, value[0], 0)[1]
    return row.text(column)


def _chosen(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    texts = [
        _reply(row, source.column(n, f"answers.{i}")) for i, n in enumerate(("first", "second"))
    ]
    column = source.column("choice", "preference")
    choice = row.at(column)
    if choice is None:
        raise Dropped("tie")
    if choice not in source.choices:
        raise row.bad(
            f"column {column!r} is {choice!r}, which is none of {source.key}.choices="
            f"{source.choices}"
        )
    better = source.choices.index(choice)
    return [(float(i != better), text) for i, text in enumerate(texts)]


def _texts(row: Row, column: str) -> list[str]:
    value = row.at(column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise row.bad(f"column {column!r} must be a list of texts")
    return value


def _ranked(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    return list(enumerate(_texts(row, _column(row, source, "replies", "row.1"))))


def _scored(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    texts = _texts(row, source.column("answers"))
    column = source.column("scores", "gold_scores")
    scores = row.at(column)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise row.bad(
            f"column {column!r} must be a list with a score for each of {len(texts)} texts"
        )
    if not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise row.bad(f"column {column!r} must hold finite numbers only")
    return [(-score, text) for score, text in zip(scores, texts, strict=True)]


def _last(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    turns = _turns(row, source.column("turns", "row"))
    if len(turns) % 2:
        raise Dropped("no reply")
    return [(0, turns[-1])]


def _endings(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    columns = [source.column("chosen"), source.column("rejected")][: len(wanted)]
    parts = [_divided(row, column) for column in columns]
    if len({prompt for prompt, _ in parts}) > 1:
        raise Dropped("prompts differ")
    return [(i, reply) for i, (_, reply) in enumerate(parts)]


def _rest(row: Row, source: Source, wanted: tuple[str, ...]) -> list[Reply]:
    return [(0, _cut(row, source)[1])]


SCHEMAS: dict[str, tuple[Callable[..., list[str]], Callable[..., list[Reply]]]] = {
    "columns": (_templated, _named),
    "choice": (_templated, _chosen),
    "ranked": (_templated, _ranked),
    "scored": (_templated, _scored),
    "turns": (_said, _last),
    "transcripts": (_transcribed, _endings),
    "text": (_begun, _rest),
}
