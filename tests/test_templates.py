"""Templates: the published wording, contrast pairs, balance, and template files of strangers."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.data.rows import Statement
from rlhf_exp.probes.templates import (
    BUFFER,
    WORDING,
    Contrast,
    Template,
    balanced,
    contrasts,
    join,
    read_templates,
)

# SHA-256 of the questions of Macijauskas 2023 for the text "abc", rendered by promptsource's rules.
PUBLISHED = {
    "template1": "65cfa845322733e991b66645448b24a294815373f01f9c0cc966190e860c9353",
    "template2": "a318029e3365883ae880740369623551642860b1cd31a97985f42b61de442998",
    "template3": "a637457d58b248fd522aedc305d2b911056a3e3d9d7876420b383eac609c2280",
    "template4": "03cf1483a6e354ae960befc14e03d9468540ac0030525950ee3e167dbef450e2",
    "template5": "41bf95b9556a02e1a14e05349ed3cff5259b9d6d43d3b200e6263d8117109861",
}
ANSWERS = [
    ("no", "yes"),
    ("no", "yes"),
    ("deceptive", "truthful"),
    ("No", "Yes"),
    ("deceptive", "truthful"),
]
COLORS = Template(name="colors", question="{{ text }}?", answers="red ||| green ||| blue")
SIGNS = Template(name="signs", question="{{ text }}:", answers=("-", "+"))


def numbered(count: int, labels: int = 2) -> list[Statement]:
    return [Statement({"text": f"t{i}"}, i % labels) for i in range(count)]


# ------------------------------------------------------------------------------------------ wording


def test_published_wording_to_the_letter() -> None:
    templates = read_templates("truthful")
    told = [Contrast(t, {"text": "abc"}).texts() for t in templates]
    found = {
        t.name: hashlib.sha256(question.encode()).hexdigest()
        for t, (question, *_) in zip(templates, told, strict=True)
    }
    assert found == PUBLISHED
    assert [tuple(answers) for _, *answers in told] == ANSWERS


def test_text_joins_prompt_and_completion_and_is_never_truncated() -> None:
    fields = {"prompt": "p" * 5000 + " ASSISTANT:", "completion": "Yes"}
    pair = Contrast(read_templates("truthful", ["template2"])[0], fields)
    assert f"{fields['prompt']} Yes \n```" in pair.texts()[0]
    short = pair.shortened(12)
    assert short.passage() == "pp ASSISTANT:"[-12:]
    assert "\n``` \np ASSISTANT: Yes \n``` \nAnswer:" in short.texts()[0]
    assert short.texts()[1:] == pair.texts()[1:]
    assert "\n``` \nYes \n```" in pair.shortened(0).texts()[0]


@pytest.mark.parametrize("name", sorted(p.stem for p in WORDING.glob("*.yaml")))
def test_every_embedded_set_gives_contrasts(name: str) -> None:
    templates = read_templates(name)
    statements = [Statement({"prompt": "a", "completion": "b"}, 1)]
    [row], [label] = contrasts(statements, templates)
    assert len(row) == len(templates) > 0
    assert label == 1
    assert all("a b" in c.texts()[0] for c in row)


@pytest.mark.parametrize(
    ("left", "right", "joined"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", "\nb", "a\nb"), ("", "b", "b"), ("a", "", "a")],
)
def test_joint(left: str, right: str, joined: str) -> None:
    assert join(left, right) == joined


# ---------------------------------------------------------------------------------- contrast pairs


def test_passage_is_the_longest_text_and_stays_so() -> None:
    fields = {"premise": "it is a long story", "hypothesis": "it is", "id": 7}
    template = Template(name="t", question="{{ premise }} | {{ hypothesis }}", answers=("n", "y"))
    short = Contrast(template, fields).shortened(5)
    assert short.texts()[0] == "story | it is"
    assert short.shortened(2).texts()[0] == "ry | it is"
    bad = Template(name="t", question="{{ id }}", answers=("n", "y"), passage="id")
    with pytest.raises(ValueError, match=r"passage 'id' is no text field .*premise, hypothesis"):
        Contrast(bad, fields).shortened(1)


def test_binarize_pairs_the_right_answer_with_each_wrong_one() -> None:
    statements = numbered(3000, labels=3)
    rows, right = contrasts(statements, [COLORS], binarize=True)
    for statement, [pair], label in zip(statements, rows, right, strict=True):
        told = pair.texts()
        assert told[1 + label] == ("red", "green", "blue")[statement.label]
        assert told[1] != told[2]
    assert 0.45 < sum(right) / 3000 < 0.55, "the two are shuffled"
    drawn = [pair.labels[1 - y] for s, [pair], y in zip(statements, rows, right, strict=True)]
    assert all(900 < drawn.count(wrong) < 1100 for wrong in range(3)), "wrong ones are uniform"
    again, same = contrasts(statements[::-1], [COLORS], binarize=True)
    assert ([r[0].labels for r in again], same) == ([r[0].labels for r in rows[::-1]], right[::-1])
    other, _ = contrasts(statements, [COLORS], binarize=True, seed=1)
    assert [r[0].labels for r in other] != [r[0].labels for r in rows]


def test_shots_are_balanced_solved_and_never_the_statement() -> None:
    pool = numbered(8)
    solved = [f"t{i}: {'-+'[i % 2]}" for i in range(8)]
    extra = 0
    for seed in range(100):
        rows, _ = contrasts(pool, [SIGNS], shots=3, shot_statements=pool * 2, seed=seed)
        for i, [pair] in enumerate(rows):
            *shots, question = pair.texts()[0].split("\n\n")
            assert question == f"t{i}:"
            assert len(set(shots)) == 3
            assert set(shots) <= {*solved} - {solved[i]}
            ends = [shot[-1] for shot in shots]
            assert ends.count("+") in (1, 2)
            extra += ends.count("+") == 2
    assert 340 < extra < 460, "half of 800: the odd one out has either label"
    assert contrasts(pool, [SIGNS])[0][0][0].shots == ""


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (COLORS, {}, r"colors gives 3 answers, .* set binarize=true"),
        (Template(name="t", question="q", answers="one"), {}, r"t gives 1 answers"),
        (Template(name="t", question="q", answers=None), {}, r"t is open-ended: give it answers"),
        (SIGNS, {"shots": 4}, r"shots=4 asks for more .*lower shots"),
        (SIGNS, {"shots": 6, "shot_statements": numbered(4)}, r"shots=6 asks for more"),
    ],
)
def test_statements_that_give_no_pairs(template: Template, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrasts(numbered(1), [template], **settings)


def test_labels_and_templates_must_fit() -> None:
    with pytest.raises(ValueError, match=r"label 2 of \{'text': 'a'\} is none of the 2 answers"):
        contrasts([Statement({"text": "a"}, 2)], [SIGNS])
    with pytest.raises(ValueError, match=r"signs and colors differ in .*answers, 2 and 3"):
        contrasts(numbered(1), [SIGNS, COLORS], binarize=True)


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        ("q", ("same", " same "), "gives both answers as 'same'"),
        ("{{ label }}", ("n", "y"), "tells the label in its question"),
        ("{{ txt }}", ("n", "y"), "template t: 'txt' is undefined among text"),
        ("q ||| a", ("n", "y"), "no question and answer, or several"),
        ("q", ("n", " "), "no question and answer"),
        ("{{ 1 / 0 }}", ("n", "y"), r"cannot be rendered \(division by zero\)"),
        ("{{ text.__class__.__mro__ }}", ("n", "y"), "cannot be rendered .*unsafe"),
    ],
)
def test_what_a_template_may_not_do(question: str, answers: Any, message: str) -> None:
    template = Template(name="t", question=question, answers=answers)
    with pytest.raises(ValueError, match=message):
        Contrast(template, {"text": "abc"}).texts()


def test_balance_is_first_in_first_out() -> None:
    order = [Statement({"text": str(i)}, label) for i, label in enumerate([1, 1, 0, 1, 0, 0, 0])]
    assert [int(s.fields["text"]) for s in balanced(order)] == [2, 0, 4, 1, 5, 3]
    assert [int(s.fields["text"]) for s in balanced(order, 3)] == [2, 0, 4]
    late = [Statement({"text": str(i)}, 1) for i in range(BUFFER + 3)] + [Statement({}, 0)]
    assert [s.fields for s in balanced(late)] == [{}, {"text": "3"}], "the queue lost its oldest"
    with pytest.raises(ValueError, match="all 3 statements have one label"):
        balanced(numbered(3, labels=1))


# ----------------------------------------------------------------------------------- template files

PROMPTSOURCE = """\
dataset: strangers
label_column: stance
templates:
  5f0c: !Template
    answer_choices: '{{ options | join("|||") }}'
    id: 5f0c
    jinja: '{% set _ = options.append("?") %}{{ ["Hm", "So", "Well"] | choice }}, {{ claim }}

      {% if claim %}{{ len(options) }} ||| {{ answer_choices[stance] }}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      original_task: true
    name: stance
    reference: ''
  77aa: !Template
    answer_choices: null
    jinja: '{{ claim }} ||| {{ claim }}'
    metadata: !TemplateMetadata {}
    name: open-ended
"""


def written(folder: Path, text: str) -> str:
    path = folder / "templates.yaml"
    path.write_text(text)
    return str(path)


def test_promptsource_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        [template] = read_templates(written(tmp_path, PROMPTSOURCE))
    assert "1 open-ended templates dropped" in caplog.text
    assert (template.name, template.choices_in_prompt) == ("stance", True)
    fields = [{"claim": f"a ||| b {i}", "options": ["con", "pro"]} for i in range(40)]
    told = [Contrast(template, f).texts() for f in fields]
    openings = [question.split(",")[0] for question, *_ in told]
    assert set(openings) == {"Hm", "So", "Well"}
    assert all(
        question == f"{opening}, a ||| b {i}\n3"
        for i, ((question, *_), opening) in enumerate(zip(told, openings, strict=True))
    )
    assert {tuple(answers) for _, *answers in told} == {("con", "pro")}
    assert told == [Contrast(template, f).texts() for f in fields], "the same draws again"
    assert fields[0]["options"] == ["con", "pro"], "a template works on copies"


def test_other_filters_and_binarize_of_elk(tmp_path: Path) -> None:
    text = """\
binarize: true
templates:
  a: !Template
    name: a
    jinja: '{{ ["x", "y", "x"] | most_frequent | first }}{% for a, b in zip([1], [2]) %}{{ a }}{{ b
      }}{% endfor %} ||| {{ answer_choices[label] }}'
    answer_choices: a ||| b ||| c
"""
    [[pair]], [right] = contrasts([Statement({}, 2)], read_templates(written(tmp_path, text)))
    told = pair.texts()
    assert told[0] == "x12"
    assert told[1 + right] == "c"


def test_own_file_and_choice_of_names(tmp_path: Path) -> None:
    text = """\
templates:
  - {name: one, question: "{{ text }}", answers: ["a", "b"], passage: text}
  - {name: two, question: q, answers: "x ||| y", answer: "it is {{ answer_choices[label] }}"}
"""
    path = written(tmp_path, text)
    assert [t.name for t in read_templates(path)] == ["one", "two"]
    two, one = read_templates(path, ["two", "one"])
    assert (one.answers, one.passage) == (("a", "b"), "text")
    assert Contrast(two, {"text": ""}).texts() == ("q", "it is x", "it is y")
    with pytest.raises(ValueError, match=r"template=tow is not known.*did you mean two"):
        read_templates(path, ["tow"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("templates: [{name: t, question: q, answers: [no, yes]}]", "False must be text; put it"),
        ("templates: [{name: t, question: 3, answers: [a, b]}]", "3 must be text"),
        ("templates: [{name: t, qestion: q}]", "is no template: give name and question"),
        (
            "templates: [{name: t, question: q, answer_choices: a}]",
            "template t: key=answer_choices is not known.*did you mean",
        ),
        ("templates: [{name: t, question: q}]", "at least one template with answers"),
        (
            "templates: [{name: t, question: q, answers: [a, b]}, {name: t, question: r, "
            "answers: [a, b]}]",
            "no name twice",
        ),
        ("templates: [{name: t, question: '{{ q', answers: [a, b]}]", "template t: mend its Jinja"),
        ("templates: {a: !Template {name: t, jinja: q}}", "is no promptsource template"),
        (
            "templates: {a: !!python/object/apply:os.getcwd []}",
            "mend its YAML .*could not determine",
        ),
        ("templates: []", "holds no templates"),
        ("- a", "holds no templates"),
        ("a: [", "mend its YAML"),
    ],
)
def test_files_that_hold_no_templates(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_templates(written(tmp_path, text))


def test_unknown_set_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="statement, truthful; did you mean truthful"):
        read_templates("thruthful")


@pytest.mark.parametrize("said", ["a ||| b", "\0", "{{ text }}", "{% endfor %}", "\ue000", ""])
def test_whatever_a_policy_says_is_text(said: str) -> None:
    """Completions come from a model: they may hold the bar, control characters or Jinja."""
    template = Template(name="t", question="{{ text }} right ?", answers=("no", "yes"))
    question, no, yes = Contrast(template, {"prompt": "p", "completion": said}).texts()
    assert question == f"{'p ' + said if said else 'p'} right ?"
    assert (no, yes) == ("no", "yes")
