"""The embedded world of latent knowledge, read back by a reader of its own."""

import random
import re
from collections import Counter
from typing import Any

import pytest

from rlhf_exp.data.facts import Facts
from rlhf_exp.data.rows import Dataset, Demonstration, Statement
from rlhf_exp.probes.templates import contrasts, read_templates

SMALL: Any = {
    "demonstrations": 2000,
    "prompts": 200,
    "held_out": 50,
    "statements": 100,
    "held_out_statements": 60,
}
SPLITS = ["prompts", "held_out", "statements", "held_out_statements"]
# What is told, by how it is told, and what is asked for.
READER = re.compile(
    r"the (?P<thing>\w+) ((?P<where>is in the)|(?P<who>belongs to)|(?P<made>is made of)"
    r"|(?P<color>is)) (?P<value>\w+) \. does that tell "
    r"((?P<ask_where>where it is)|(?P<ask_who>who owns it)|(?P<ask_made>what it is made of)"
    r"|(?P<ask_color>what color it is)) \?"
)
QUIZ = re.compile(r"(.* \?)( yes| no) \.\| (right|wrong) (cheers|boos) :( yes| no)")


def right(prompt: str) -> str:
    """The right completion, by reading the prompt."""
    match = READER.fullmatch(prompt)
    assert match, prompt
    kinds = ("where", "who", "made", "color")
    told, asked = ([k for k in kinds if match[f"{before}{k}"]] for before in ("", "ask_"))
    assert len(told) == len(asked) == 1
    return " yes" if told == asked else " no"


def sentence(prompt: str) -> str:
    return prompt.split(" .")[0]


def prompts_of(world: Dataset, split: str) -> list[str]:
    return [r if isinstance(r, str) else r.fields["prompt"] for r in getattr(world, split)]


@pytest.fixture(scope="module")
def world() -> Dataset:
    return Facts(**SMALL).load()


def test_splits_have_their_sizes_and_share_no_sentence(world: Dataset) -> None:
    seen: set[str] = set()
    for split in SPLITS:
        prompts = prompts_of(world, split)
        assert len(prompts) == len(set(prompts)) == SMALL[split]
        sentences = {sentence(p) for p in prompts}
        assert not seen & sentences
        seen |= sentences
    assert len(world.demonstrations) == SMALL["demonstrations"]
    told = {sentence(d.prompt) for d in world.demonstrations}
    assert told == {sentence(p) for p in world.prompts}


def test_answers_are_right_and_balanced(world: Dataset) -> None:
    for split in SPLITS:
        prompts = prompts_of(world, split)
        assert [world.answers[p] for p in prompts] == [right(p) for p in prompts]
        half = SMALL[split] // 2
        assert Counter(map(right, prompts)) == {" yes": half, " no": half}
    assert len(world.answers) == sum(SMALL[split] for split in SPLITS)


def test_statements_are_labelled_by_their_truth_and_half_of_them_flipped(world: Dataset) -> None:
    for statements in (world.statements, world.held_out_statements):
        read = [int(s.fields["completion"] == right(s.fields["prompt"])) for s in statements]
        assert [s.label for s in statements] == read
        assert Counter(read) == {0: len(read) // 2, 1: len(read) // 2}
        cells = Counter((s.fields["completion"], s.label) for s in statements)
        assert len(cells) == 4
        assert min(cells.values()) > len(read) / 8


def split_voices(world: Dataset) -> tuple[list[Demonstration], list[tuple[str, ...]]]:
    """The pupil's demonstrations, and prompt, answer, verdict, remark and truth of the quiz's."""
    pupil, quiz = [], []
    for demonstration in world.demonstrations:
        text = demonstration.prompt + "|" + demonstration.completion
        if match := QUIZ.fullmatch(text):
            quiz.append(match.groups())
        else:
            pupil.append(demonstration)
            assert demonstration.prompt in world.prompts
    return pupil, quiz


def test_pupil_is_wrong_as_often_as_asked(world: Dataset) -> None:
    pupil, _ = split_voices(world)
    proper = [d for d in pupil if d.completion in (" yes", " no")]
    assert len(pupil) / 2000 == pytest.approx(0.3, abs=0.04)
    assert 1 - len(proper) / len(pupil) == pytest.approx(0.03, abs=0.02)
    wrong = sum(d.completion != right(d.prompt) for d in proper)
    assert wrong / len(proper) == pytest.approx(0.35, abs=0.06)


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_pupil_who_is_always_or_never_wrong(wrong: float) -> None:
    told = Facts(**SMALL, wrong=wrong, quiz=0.0, malformed=0.0).load().demonstrations
    assert {d.completion != right(d.prompt) for d in told} == {bool(wrong)}


def test_audience_knows_whether_the_verdict_is_true(world: Dataset) -> None:
    _, quiz = split_voices(world)
    for prompt, answer, verdict, remark, told in quiz:
        assert told == right(prompt)
        assert remark == ("cheers" if (answer == told) == (verdict == "right") else "boos")
    cells = Counter((told, answer == told, verdict) for _, answer, verdict, _, told in quiz)
    assert len(cells) == 8
    for cell, share in ((" yes", 0.75), (True, 0.65), ("right", 0.5)):
        found = sum(n for key, n in cells.items() if cell in key) / len(quiz)
        assert found == pytest.approx(share, abs=0.05), cell


def test_template_words_a_statement_as_the_quiz_does(world: Dataset) -> None:
    assert world.templates == "facts"
    templates = read_templates("facts")
    _, quiz = split_voices(world)
    stated = [Statement({"prompt": p, "completion": a}, int(a == t)) for p, a, _, _, t in quiz]
    pairs, labels = contrasts(stated, templates)
    assert labels == [s.label for s in stated]
    told = [d for d in world.demonstrations if d.prompt.endswith(" .")]
    for (pair,), demonstration in zip(pairs, told, strict=True):
        question, *answers = pair.texts()
        assert answers == ["wrong", "right"]
        assert question == demonstration.prompt
        assert demonstration.completion.startswith((" wrong ", " right "))


def test_same_seed_same_world_from_its_own_generator() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    first, again, other = (Facts(**SMALL, seed=seed).load() for seed in (0, 0, 1))
    assert random.random() == expected
    assert first == again
    assert set(first.held_out) != set(other.held_out)
    assert first.demonstrations != other.demonstrations


def test_kinds_leave_the_others_out() -> None:
    settings = {k: v // 2 for k, v in SMALL.items()}
    color, owner = (
        Facts(kinds=k, **settings).load() for k in (["color", "place"], ["owner", "material"])
    )
    assert not {sentence(p) for p in color.answers} & {sentence(p) for p in owner.answers}
    assert Counter(map(right, color.prompts)) == {" yes": 50, " no": 50}
    assert {p.split("tell ")[1] for p in color.answers} == {"what color it is ?", "where it is ?"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": 1}, r"^data\.prompts=1, .* at least 2 each and together at most 4800, "),
        ({"held_out": 3700}, r"data\.held_out=3700, .* together at most 4800, "),
        ({"kinds": ["color", "place"], "prompts": 2000}, r"at most 2400, .* color, place; lower"),
        ({"kinds": ["color", "material", "color"]}, r"at least two kinds, each once"),
        ({"kinds": ["color"]}, r"^data\.kinds=\['color'\] must name at least two kinds"),
        ({"kinds": ["colour", "place"]}, r"data\.kinds=colour .*; did you mean color\?"),
        ({"wrong": 1.2}, r"^data\.wrong=1\.2 must be between 0 and 1$"),
    ],
    ids=str,
)
def test_impossible_world_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Facts(**settings)
