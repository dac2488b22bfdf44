"""Jinja for templates that strangers wrote: sandboxed, strict about variables, and deterministic.

promptsource (Bach et al. 2022) writes ||| between question and answer, and between answers. Left
out: its filters `permutation`, `reorder`, `to_letter` and `highlight`.
"""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

BAR = "|||"
# Stands for BAR while rendering, because fields may hold BAR, or any other short text.
_MARK = "\0b3f1c66e-question-bar-answer\0"
_KEY = "_key"  # what `choice` draws by


def join(left: str, right: str) -> str:
    """Both texts, with one space between them unless one is empty or has whitespace there."""
    apart = not left or not right or left[-1].isspace() or right[0].isspace()
    return left + right if apart else f"{left} {right}"


def trim(text: str) -> str:
    """`text` without the spaces around it; its line breaks stay (as in elk)."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return "\n" * before.count("\n") + core + "\n" * after.count("\n")


@jinja2.pass_context
def _choice(context: Any, items: Sequence[Any]) -> Any:
    """promptsource draws at random; here the statement decides, so that both answers of a pair and
    a second run see the same wording.
    """
    return random.Random(f"{context[_KEY]}{items!r}").choice(items)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """All items that come up as often as the most frequent one."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


_JINJA = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_JINJA.globals.update(zip=zip, len=len, enumerate=enumerate)
_JINJA.filters.update(choice=_choice, most_frequent=_most_frequent, len=len)


@cache
def compiled(source: str) -> jinja2.Template:
    """`source` ready to render; jinja2.TemplateError if it is not Jinja."""
    return _JINJA.from_string(source.replace(BAR, _MARK))


def variables(fields: dict[str, Any]) -> dict[str, Any]:
    """What a template may name: copies of the fields, and `text` from prompt and completion."""
    known = copy.deepcopy(fields)
    if "prompt" in fields and "completion" in fields:
        known = {"text": join(fields["prompt"], fields["completion"])} | known
    # The ends of the fields, because these stay when a passage is shortened.
    return known | {_KEY: "".join(str(value)[-40:] for value in fields.values())}


def render(name: str, source: str, known: dict[str, Any]) -> list[str]:
    """The parts between BAR of `source` filled with `known`; ValueError naming the template."""
    try:
        return compiled(source).render(known).split(_MARK)
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"template {name}: {error.message} among {', '.join(k for k in known if k != _KEY)}: "
            "mend the template or leave it out"
        ) from None
    except Exception as error:  # whatever a stranger's template raises
        raise ValueError(
            f"template {name} cannot be rendered ({error}): mend it or leave it out"
        ) from None
