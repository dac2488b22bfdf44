"""Templates: how a statement becomes a question with one answer for each label.

Two answers to one question, of which one is right, are a contrast pair (Burns et al. 2022,
"Discovering Latent Knowledge in Language Models Without Supervision", section 2). A template file
is YAML, either ours

    templates:
      - name: short
        question: "{{ text }}\\nTrue or false?"
        answers: ["false", "true"]

or promptsource's (Bach et al. 2022), which is read without that package.

Left out: the 2048 characters to which promptsource cuts every variable. Where the variable is a
prompt with the completion to be judged, that cut takes the completion. Here nothing is cut unasked,
and `Contrast.shortened` takes from the beginning of the passage.
"""

import logging
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlhf_exp.choices import nearest, pick, require
from rlhf_exp.data.rows import Statement
from rlhf_exp.probes.rendering import BAR, compiled, join, render, trim, variables

logger = logging.getLogger(__name__)

WORDING = Path(__file__).parent / "wording"
BUFFER = 1000  # statements that wait for the other classes, per class


@dataclass(frozen=True, kw_only=True)
class Template:
    """A question and its answers, in Jinja."""

    name: str
    question: str
    # one per label, or one text that renders to "a ||| b"; null: open-ended, of no use here
    answers: tuple[str, ...] | str | None
    answer: str = "{{ answer_choices[label] }}"  # the answer part, given the label
    passage: str | None = None  # field to shorten; null: `prompt`, else the longest text
    choices_in_prompt: bool = False  # whether the question names the answers
    binarize: bool = False  # the file asks for `contrasts(binarize=True)`

    def choices(self, values: dict[str, Any]) -> list[str]:
        """The answer of each label for a statement with the fields `values`."""
        if self.answers is None:
            raise ValueError(f"template {self.name} is open-ended: give it answers, one per label")
        answers = self.answers if isinstance(self.answers, str) else BAR.join(self.answers)
        return [answer.strip() for answer in render(self.name, answers, variables(values))]

    def render(self, values: dict[str, Any], label: int) -> tuple[str, str]:
        """Question and answer of `label`. As in elk, spaces around the question go and its line
        breaks stay; around the answer all whitespace goes.
        """
        known = {"answer_choices": self.choices(values), "label": label}
        source = f"{self.question}{BAR}{self.answer}"
        parts = render(self.name, source, variables(values) | known)
        if len(parts) != 2 or not parts[1].strip():
            raise ValueError(
                f"template {self.name} gives no question and answer, or several, for "
                f"{str(values)[:60]}: mend it or leave it out"
            )
        return trim(parts[0]), parts[1].strip()


# ---- contrast pairs


@dataclass(frozen=True)
class Contrast:
    """One statement in one template: a question and the two answers to compare."""

    template: Template
    fields: dict[str, Any]
    labels: tuple[int, int] = (0, 1)  # which answers
    shots: str = ""  # solved examples in front of the question

    def texts(self) -> tuple[str, str, str]:
        """(question with shots in front, answer of labels[0], answer of labels[1])"""
        return self._texts

    @cached_property
    def _texts(self) -> tuple[str, str, str]:
        (question, first), (other, second) = (
            self.template.render(self.fields, label) for label in self.labels
        )
        if question != other:
            raise ValueError(
                f"template {self.template.name} tells the label in its question: name `label` in "
                "the answer alone"
            )
        if first == second:
            raise ValueError(
                f"template {self.template.name} gives both answers as {first!r} for "
                f"{str(self.fields)[:60]}: give each label an answer of its own"
            )
        return f"{self.shots}\n\n{question}" if self.shots else question, first, second

    def passage(self) -> str:
        """The field that may be shortened."""
        return self.fields[self._passage()]

    def shortened(self, keep: int) -> "Contrast":
        """The same with the passage cut to its last `keep` characters; answers are never cut."""
        name = self._passage()
        passage = self.fields[name]
        return replace(
            self,
            template=replace(self.template, passage=name),
            fields=self.fields | {name: passage[max(0, len(passage) - keep) :]},
        )

    def _passage(self) -> str:
        texts = {k: v for k, v in self.fields.items() if isinstance(v, str)}
        longest = max(texts, key=lambda k: len(texts[k]), default="")
        name = self.template.passage or ("prompt" if "prompt" in texts else longest)
        if name not in texts:
            raise ValueError(
                f"template {self.template.name}: passage {name!r} is no text field of the "
                f"statement; choose one of {', '.join(texts) or 'none'}"
            )
        return name


def contrasts(
    statements: Sequence[Statement],
    templates: Sequence[Template],
    *,
    binarize: bool = False,
    shots: int = 0,
    shot_statements: Sequence[Statement] = (),
    seed: int = 0,
) -> tuple[list[list[Contrast]], list[int]]:
    """Contrast pairs [n][v] of n statements in v templates, and for each statement which of the two
    answers is right (0 or 1).

    `binarize` pairs the right one of more than two answers with one wrong answer, drawn uniformly,
    in random order. `shots` solved examples from `shot_statements`, in equal parts per label
    (what is left over goes to labels drawn at random), stand in front, never the statement itself.
    Draws depend on `seed` and the statement, not on its neighbors.
    """
    binarize = binarize or any(template.binarize for template in templates)
    pool: dict[int, list[Statement]] = {}
    for shot in {repr(s.fields): s for s in shot_statements if shots}.values():
        pool.setdefault(shot.label, []).append(shot)
    pairs, right = [], []
    for statement in statements:
        told = {k: v for k, v in statement.fields.items() if k != "completion"}
        rng = random.Random(f"{seed} {told!r}")  # one draw for all completions of a prompt
        labels = _labels(statement, templates, binarize, rng)
        solved = _solved(statement, shots, pool, rng)
        told = ["\n\n".join(join(*t.render(s.fields, s.label)) for s in solved) for t in templates]
        both = zip(templates, told, strict=True)
        pairs.append([Contrast(t, statement.fields, labels, front) for t, front in both])
        right.append(labels.index(statement.label))
    return pairs, right


def _labels(
    statement: Statement, templates: Sequence[Template], binarize: bool, rng: random.Random
) -> tuple[int, int]:
    """The two labels to compare."""
    counts = {len(t.choices(statement.fields)): t.name for t in templates}
    (count, name), *others = counts.items()
    if others:
        raise ValueError(
            f"templates {name} and {others[0][1]} differ in their number of answers, {count} and "
            f"{others[0][0]}: use templates with the same labels"
        )
    if not 0 <= statement.label < count:
        raise ValueError(
            f"the label {statement.label} of {str(statement.fields)[:60]} is none of the {count} "
            f"answers of template {name}: labels count from 0"
        )
    if count != 2 and not (binarize and count > 2):
        raise ValueError(
            f"template {name} gives {count} answers, and a contrast has two: set binarize=true to "
            "pair the right one of several with a wrong one"
        )
    if count == 2:
        return 0, 1
    wrong = rng.choice([label for label in range(count) if label != statement.label])
    first, second = rng.sample([wrong, statement.label], 2)
    return first, second


def _solved(
    statement: Statement, shots: int, pool: dict[int, list[Statement]], rng: random.Random
) -> list[Statement]:
    """`shots` statements of `pool` other than `statement`, balanced over the labels."""
    labels = sorted(pool) if shots else []
    more = rng.sample(labels, shots % len(labels)) if labels else []
    drawn = []
    for label in labels:
        count = shots // len(labels) + (label in more)
        found = rng.sample(pool[label], min(count + 1, len(pool[label])))
        drawn += [s for s in found if s.fields != statement.fields][:count]
    if len(drawn) < shots:
        raise ValueError(
            f"shots={shots} asks for more solved examples of a label than there are besides the "
            "statement itself: lower shots"
        )
    return rng.sample(drawn, len(drawn))


def balanced(statements: Iterable[Statement], limit: int | None = None) -> list[Statement]:
    """At most `limit` statements with as many of each label, in the order they come.

    elk's balancing: each label has a first-in-first-out queue of at most BUFFER statements (a full
    one loses its oldest); as soon as all have one, one of each leaves, label 0 first. Nothing is
    drawn.
    """
    statements = list(statements)
    queues = {label: deque(maxlen=BUFFER) for label in sorted({s.label for s in statements})}
    if len(queues) < 2:
        raise ValueError(
            f"all {len(statements)} statements have one label: balancing needs at least two labels"
        )
    kept: list[Statement] = []
    for statement in statements:
        queues[statement.label].append(statement)
        if all(queues.values()):
            kept += [queue.popleft() for queue in queues.values()]
    return kept[:limit]


# ---- template files


class _Loader(yaml.SafeLoader):
    """Safe YAML in which promptsource's objects are plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _Loader.construct_yaml_map)


def read_templates(source: str, names: list[str] | None = None) -> list[Template]:
    """Templates of the file `source`: one of WORDING by its name, or any path. `names` picks some,
    in that order; none picks all. Open-ended ones (without answers) are dropped.
    """
    own = WORDING / f"{source}.yaml"
    path = own if own.is_file() else Path(source).expanduser()
    if not path.is_file():
        known = sorted(p.stem for p in WORDING.glob("*.yaml"))
        raise FileNotFoundError(
            f"there are no templates {source!r}: give a YAML file or one of {', '.join(known)}"
            f"{nearest(source, known)}"
        )
    found = _parse(path)
    closed = {t.name: t for t in found if t.answers is not None}
    if dropped := sum(t.answers is None for t in found):
        logger.info("%s: %d open-ended templates dropped", path, dropped)
    if not closed or len(closed) + dropped < len(found):
        raise ValueError(f"{path} must hold at least one template with answers, and no name twice")
    for name, template in closed.items():
        try:
            compiled(f"{template.question}{BAR}{template.answer}")
        except jinja2.TemplateError as error:
            raise ValueError(f"{path}, template {name}: mend its Jinja ({error})") from None
    return [pick(name, closed, "template") for name in names or closed]


def _parse(path: Path) -> list[Template]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: mend its YAML ({' '.join(str(error).split())})") from None
    entries = document.get("templates") if isinstance(document, dict) else None
    if not entries or not isinstance(entries, list | dict):
        raise ValueError(f"{path} holds no templates: list them under `templates:`")
    if isinstance(entries, list):
        return [_own(path, entry) for entry in entries]
    return [_imported(path, entry, document) for entry in entries.values()]


def _own(path: Path, entry: Any) -> Template:
    """A template in our form."""
    if not isinstance(entry, dict) or None in (entry.get("name"), entry.get("question")):
        raise ValueError(f"{path}: {str(entry)[:60]} is no template: give name and question")
    for key in entry:
        require(key, [f.name for f in fields(Template)], f"{path}, template {entry['name']}: key")
    answers = entry.get("answers")
    listed = answers if isinstance(answers, list) else [answers]
    for text in [*listed, *(entry.get(k) for k in ("name", "question", "answer", "passage"))]:
        if not isinstance(text, str | None):
            raise ValueError(
                f"{path}, template {entry['name']}: {text!r} must be text; put it in quotes (bare "
                "yes and no are truth values)"
            )
    settings = {key: value for key, value in entry.items() if value is not None}
    settings["answers"] = tuple(answers) if isinstance(answers, list) else answers
    return Template(**settings)


def _imported(path: Path, entry: Any, document: dict[str, Any]) -> Template:
    """A template of promptsource. elk's `binarize` and `label_column` stand at the file's root."""
    known = entry if isinstance(entry, dict) else {}
    if not isinstance(known.get("name"), str) or BAR not in str(known.get("jinja")):
        raise ValueError(
            f"{path}: {str(entry)[:60]} is no promptsource template: give a name, and jinja that "
            f"holds a question, {BAR} and an answer"
        )
    question, _, answer = entry["jinja"].partition(BAR)
    column = document.get("label_column") or "label"
    return Template(
        name=entry["name"],
        question=question if column == "label" else f"{{% set {column} = label %}}{question}",
        answers=entry.get("answer_choices"),
        answer=answer,
        choices_in_prompt=bool((entry.get("metadata") or {}).get("choices_in_prompt")),
        binarize=bool(document.get("binarize")),
    )
