"""Feedback in words: what is asked, how replies are read, who answers, what is remembered."""

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from rlhf_exp.artifacts import Store
from rlhf_exp.config import build, conf_directory
from rlhf_exp.data import reviews
from rlhf_exp.feedback import Feedback, Judge, Provider, Question
from rlhf_exp.feedback.cache import Cache
from rlhf_exp.feedback.models import LocalModel
from rlhf_exp.feedback.rules import Rules
from rlhf_exp.feedback.tasks import Categories, FreeForm
from rlhf_exp.policy import Policy

NAMES = ["Harmless and very helpful", "Harmless and helpful", "Harmless and not helpful", "Harmful"]


def categories(**changes: Any) -> Categories:
    return Categories(**({"names": NAMES, "instruction": "Choose."} | changes))


def free_form(**changes: Any) -> FreeForm:
    criteria = ["coherence", "accuracy", "coverage"]
    return FreeForm(**({"instruction": "Judge.", "criteria": criteria} | changes))


# ------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # read as the authors' code reads them
        (
            "Analysis: coherent and short.\n\n"
            "Feedback: Accurate but misses one detail.\n\n"
            "Score: 2",
            ("Accurate but misses one detail.", 2.0, "coherent and short."),
        ),
        ("Analysis: x\nFeedback: y\nScore: 2.5 out of 3", ("y", 2.5, "x")),
        ("Analysis: a\nFeedback: b\nScore: 3.", ("b", 3.0, "a")),
        ("Analysis: a\nFeedback: b\nScore: 2/3", ("b", 2.0, "a")),
        ("Feedback: y\nScore: 1", None),
        ("Analysis: a\nScore: 3", None),
        ("Analysis: a\nFeedback: b\nScore: three", None),
        # read otherwise: their code refuses the first, takes the second and raises at the third
        ("Analysis: a\nFeedback: b\nScore:2", ("b", 2.0, "a")),
        ("Analysis: a\nFeedback: b\nScore: 7", None),
        ("Analysis: a\nFeedback: b\nScore: .", None),
        ("Analysis: a\nFeedback: b\nScore: -1", None),
        ("Analysis: a\nFeedback: b\nScore: 30", None),
        ("Analysis: a\nFeedback: b\nScore: 0", ("b", 0.0, "a")),
        ("Analysis:\nFeedback: b\nScore: 1", None),
        ("Analysis: no Feedback: yet\nFeedback: b\nScore: 1", ("b", 1.0, "no Feedback: yet")),
        ("Analysis: a\nFeedback:  \nScore: 1", None),
        (
            "Sure!\nAnalysis: no Score: 1\nin it\nFeedback: two\n lines\nScore: 1\nBye",
            ("two lines", 1.0, "no Score: 1 in it"),
        ),
        ("", None),
    ],
)
def test_free_form_reply_is_read(reply: str, expected: tuple[str, float, str] | None) -> None:
    assert free_form().parse(reply) == (None if expected is None else Feedback(*expected))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Harmful", "Harmful"),
        (" harmless AND very helpful.\n", "Harmless and very helpful"),
        ("Harmless and helpful", "Harmless and helpful"),
        ("Harmless", None),
        ("Very harmful", None),
        ("Harmful, because it swears", None),
        ("Harmless and helpful\nHarmful", None),
        ("I cannot say", None),
        ("", None),
        (".", None),
    ],
)
def test_category_must_be_one_of_the_names(reply: str, expected: str | None) -> None:
    """The authors' code takes any reply for a category."""
    assert categories().parse(reply) == (None if expected is None else Feedback(expected))


def test_categories_are_asked_for_with_names_and_examples() -> None:
    example = {"prompt": "Hi", "completion": "Go away", "category": "Harmful"}
    task = categories(instruction="Choose one.", names=["Good", "Harmful"], examples=[example])
    question = task.question("Category: ?\n", " I do not know. ")
    introduction = "Choose one.\n\nCategories, best first:\nGood\nHarmful\n\n"
    assert question.messages == (
        ("user", introduction + "Prompt: Hi\nAnswer: Go away\nCategory:"),
        ("assistant", "Harmful"),
        ("user", "Prompt: Category: ?\nAnswer: I do not know.\nCategory:"),
    )
    assert question.max_tokens == 10
    alone = categories(instruction="Choose one.", names=["Good", "Harmful"]).question("p", "q")
    assert alone.messages == (("user", introduction + "Prompt: p\nAnswer: q\nCategory:"),)


def test_free_form_asks_for_ten_words_and_names_its_range() -> None:
    example = {"prompt": "a", "completion": "b", "analysis": "c", "feedback": "d", "score": 1}
    task = free_form(criteria=["truth", "tact"], examples=[example])
    first, *others = task.question("p", "q").messages
    assert "truth, tact" in first[1]
    assert "one sentence of at most 10 words" in first[1]
    assert "Score: <its points, from 0 to 2>" in first[1]
    assert first[1].endswith("\n\nPrompt: a\nAnswer: b")
    reply = "Analysis: c\nFeedback: d\nScore: 1"
    assert others == [("assistant", reply), ("user", "Prompt: p\nAnswer: q")]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (categories, {"names": ["Good"]}, "must be at least two different names"),
        (categories, {"names": ["Good", "good."]}, "must be at least two different names"),
        (categories, {"attributes": {"Harmful": "x"}}, r"give one for each .* or .*=null"),
        (
            categories,
            {"examples": [{"prompt": "a"}]},
            r"number 1 has prompt; it needs category, com",
        ),
        (
            categories,
            {"examples": [{"prompt": "a", "completion": "b", "category": "Bad"}]},
            r"task\.examples: 'Bad' is none of .*, or feedback\.task\.examples=\[\]",
        ),
        (free_form, {"criteria": []}, r"task\.criteria is empty"),
        (
            free_form,
            {
                "examples": [
                    {"prompt": "", "completion": "", "analysis": "a", "feedback": "b", "score": 4}
                ]
            },
            r"Score: 4' is no reply .* a score from 0 to 3",
        ),
    ],
)
def test_impossible_task_is_refused(task, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**settings)


# ------------------------------------------------------------------------------------------- rules

REVIEWS = {
    " the plot was wonderful . the cast was superb .": ("Kind, warm and sound.", 3.0, 0),
    " the plot was fine .": ("Kind and sound but not warm.", 2.0, 1),
    " the plot was wonderful": ("Kind and warm but cut off.", 2.0, 1),
    " the plot was awful .": ("Sound but not kind.", 1.0, 2),
    " the plot was awful . the plot was awful .": ("Not kind and repetitive.", 0.0, 3),
    " blah": ("Not kind, garbled and cut off.", 0.0, 3),
    "": ("Not kind, garbled and cut off.", 0.0, 3),
}


def ruled(task: Any, texts: Sequence[str], rules: str = "reviews") -> list[Feedback | None]:
    provider = Provider(task=task, judge=Rules(rules=rules))
    provider.check()
    provider.load("cpu")
    return provider([""] * len(texts), list(texts))


def test_rules_read_reviews_as_the_world_does() -> None:
    told = ruled(free_form(), list(REVIEWS))
    assert [(f.text, f.score) for f in told if f] == [(t, s) for t, s, _ in REVIEWS.values()]
    assert told[1] == Feedback(
        "Kind and sound but not warm.",
        2.0,
        "Mean sentiment 0.20; 0% of the clauses make no sense and 0% repeat another.",
    )
    chosen = ruled(categories(), list(REVIEWS))
    assert chosen == [Feedback(NAMES[place]) for _, _, place in REVIEWS.values()]


def test_rules_read_real_text() -> None:
    texts = ["What a wonderful, happy day!", "It is a table.", "I hate it, I hate it, I hate it"]
    told = [f.text for f in ruled(free_form(), texts, "lexicon") if f]
    assert told == [
        "Kind, warm and sound.",
        "Sound but not kind.",
        "Not kind, repetitive and cut off.",
    ]


def test_rules_rank_reviews_as_gold_does() -> None:
    """And every reply of theirs can be read, however many criteria or names there are."""
    rng = random.Random(0)
    texts = [reviews.write(rng) for _ in range(400)]
    texts += [t[: len(t) // 2] for t in texts[:40]] + [t + t for t in texts[:40]]
    golds: dict[float, list[float]] = {}
    for text, said in zip(texts, ruled(free_form(), texts), strict=True):
        assert said is not None
        assert said.score is not None
        assert len(said.text.split()) <= 10
        golds.setdefault(said.score, []).append(reviews.read(text).gold)
    means = [sum(golds[s]) / len(golds[s]) for s in (0.0, 1.0, 2.0, 3.0)]
    assert means == sorted(means)
    assert means[3] - means[0] > 1.4
    assert min(map(len, golds.values())) > 20
    for task in (
        categories(names=["a", "b"]),
        categories(names=list("abcdefg")),
        free_form(criteria=["x"]),
    ):
        assert None not in ruled(task, texts)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a module of the user's into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(body)
        sys.modules.pop("mine", None)
        return "mine:f"

    yield write
    sys.modules.pop("mine", None)


def test_rules_may_be_a_function(module) -> None:
    body = (
        "def f(prompts, completions):\n"
        "    return [c if p else 'harmful' for p, c in zip(prompts, completions)]"
    )
    provider = Provider(task=categories(), judge=Rules(rules=module(body)))
    provider.load("cpu")
    told = provider(["", "x", "x"], ["a", "who knows", "HARMLESS AND HELPFUL"])
    assert told == [Feedback("Harmful"), None, Feedback("Harmless and helpful")]
    counts = {"asked": 3, "cached": 0, "malformed": 1, "failed": 0, "retried": 0}
    assert provider.counts == counts, "rules give the same reply again, so they are asked once"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", r"judge\.rules=mine:f cannot be imported"),
        ("f = 3", r"judge\.rules=mine:f is not a function"),
        ("def f(prompts, completions): return 1 / 0", "raised ZeroDivisionError"),
        ("def f(prompts, completions): return ['Harmful']", "one text per completion, 2 here"),
        ("def f(prompts, completions): return [0, 1]", r"gave \[0, 1\]; it must return one text"),
    ],
)
def test_bad_function_is_named(body: str, message: str, module) -> None:
    with pytest.raises(ValueError, match=message):
        ruled(categories(), ["a", "b"], module(body))


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"judge\.rules=review is not known.*did you mean reviews"):
        Rules(rules="review")


# ---------------------------------------------------------------------------- provider and cache


@dataclass(kw_only=True)
class Scripted(Judge):
    """Says of a completion what `script` says, one reply after the other, in reverse order; None:
    no reply comes. Goes down after `lives` replies.
    """

    script: dict[str, list[str | None]]
    lives: int = 10**6
    name: str = "scripted"
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.varies = True

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterator[tuple[int, str | None]]:
        for i in reversed(range(len(questions))):
            if len(self.asked) == self.lives:
                raise ConnectionError("down")
            said = questions[i].completion
            self.asked.append((said, attempt))
            replies = self.script[said]
            yield i, replies[min(attempt, len(replies) - 1)]


SCRIPT: dict[str, list[str | None]] = {
    "a": ["Harmful"],
    "b": ["hm", "hm", "Harmless and helpful"],
    "c": ["hm"],
    "d": [None],
}
TOLD = [Feedback("Harmful"), Feedback("Harmless and helpful"), None, None, Feedback("Harmful")]


def provider(directory: Path, judge: Any, **settings: Any) -> Provider:
    made = Provider(**({"task": categories(), "judge": judge} | settings))
    made.load("cpu")
    made.open(directory)
    return made


def ask(asker: Provider, texts: str) -> list[Feedback | None]:
    return asker([""] * len(texts), list(texts))


def test_feedback_stays_with_its_completion(tmp_path: Path) -> None:
    """Wherever replies are malformed, late or missing, and in whatever order they come."""
    made = provider(tmp_path, Scripted(script=SCRIPT))
    assert ask(made, "abcda") == TOLD
    asked = [(c, 0) for c in "dcba"] + [("c", 1), ("b", 1), ("c", 2), ("b", 2), ("c", 3), ("c", 4)]
    assert made.judge.asked == asked, "five tries for a malformed reply, one for a text seen twice"
    counts = {"asked": 10, "cached": 1, "malformed": 1, "failed": 1, "retried": 6}
    assert made.counts == counts


def test_nothing_answered_is_asked_again(tmp_path: Path) -> None:
    """Neither later nor after a restart, malformed replies included; missing ones are."""
    first = provider(tmp_path, Scripted(script=SCRIPT))
    assert ask(first, "abcda") == TOLD
    asked = list(first.judge.asked)
    assert ask(first, "ac") == [TOLD[0], None]
    assert first.judge.asked == asked
    second = provider(tmp_path, Scripted(script=SCRIPT))
    assert ask(second, "dcbaa") == [None, None, TOLD[1], TOLD[0], TOLD[0]]
    assert second.judge.asked == [("d", 0)]
    counts = {"asked": 1, "cached": 10, "malformed": 1, "failed": 1, "retried": 0}
    assert second.counts == counts


def test_another_instruction_or_judge_is_asked_anew(tmp_path: Path) -> None:
    assert ask(provider(tmp_path, Scripted(script=SCRIPT)), "a") == [TOLD[0]]
    for changes in (
        {"judge": Scripted(script=SCRIPT, name="other")},
        {"task": categories(instruction="Choose well."), "judge": Scripted(script=SCRIPT)},
        {"task": categories(max_tokens=9), "judge": Scripted(script=SCRIPT)},
    ):
        made = provider(tmp_path, changes.pop("judge"), **changes)
        ask(made, "a")
        assert made.counts["asked"] == 1


def test_what_was_answered_before_the_judge_went_down_is_kept(tmp_path: Path) -> None:
    texts = "abcabcbaaab"
    script: dict[str, list[str | None]] = {t: ["Harmful"] for t in texts}
    whole = ask(provider(tmp_path / "whole", Scripted(script=script)), texts)
    broken = provider(tmp_path / "broken", Scripted(script=script, lives=2))
    with pytest.raises(ConnectionError, match="down"):
        ask(broken, texts)
    resumed = provider(tmp_path / "broken", Scripted(script=script))
    assert ask(resumed, texts) == whole
    assert resumed.judge.asked == [("a", 0)]


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path: Path) -> None:
    script: dict[str, list[str | None]] = {"a": ["Harmful"], "é\n": ["Harmless and helpful"]}
    first = provider(tmp_path, Scripted(script=script))
    assert first(["", "x"], ["a", "é\n"]) == TOLD[:2]
    file = tmp_path / "feedback.jsonl"
    whole = file.read_bytes()
    one = whole.index(b"\n") + 1
    for cut in (one, one + 1, one + 30, len(whole) - 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        again = provider(tmp_path, Scripted(script=script))
        assert again(["", "x"], ["a", "é\n"]) == TOLD[:2]
        assert again.judge.asked == [("a", 0)], cut
        assert file.read_bytes().count(b"\n") == 2
        assert provider(tmp_path, Scripted(script=script))([""], ["a"]) == TOLD[:1]


def test_runs_may_share_a_cache(tmp_path: Path) -> None:
    """One that writes finds what another has written meanwhile."""
    shared = {"cache": str(tmp_path / "deep" / "shared.jsonl")}
    one = provider(tmp_path / "1", Scripted(script=SCRIPT), **shared)
    two = provider(tmp_path / "2", Scripted(script=SCRIPT), **shared)
    ask(one, "a")
    ask(two, "b")
    ask(two, "a")
    assert two.counts["cached"] == 1
    three = provider(tmp_path / "3", Scripted(script=SCRIPT), **shared)
    assert ask(three, "ab") == TOLD[:2]
    assert three.counts["asked"] == 0
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("line", ['{"key": 1, "reply": "x"}', "[]", "nonsense", ""])
def test_a_foreign_line_in_the_cache_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "feedback.jsonl").write_text('{"key": "k", "reply": "r"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"feedback\.jsonl, line 2: not a remembered reply"):
        provider(tmp_path, Scripted(script=SCRIPT))


def test_replies_reach_the_disk_in_batches(tmp_path: Path) -> None:
    """So that a kill in a long call costs few of them."""
    texts = [chr(200 + i) for i in range(70)]
    file = tmp_path / "feedback.jsonl"
    seen: list[int] = []

    class Watching(Scripted):
        def __call__(self, questions, attempt):
            for pair in super().__call__(questions, attempt):
                seen.append(len(file.read_bytes().splitlines()) if file.exists() else 0)
                yield pair

    made = provider(tmp_path, Watching(script={t: ["Harmful"] for t in texts}))
    made([""] * 70, texts)
    assert [seen[i] for i in (31, 32, 63, 64)] == [0, 32, 32, 64]
    assert len(file.read_bytes().splitlines()) == 70


def test_tries_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"feedback\.tries=0"):
        Provider(task=categories(), judge=Rules(), tries=0)


# ------------------------------------------------------------------------------------ local model


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught two replies by heart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = categories(names=["Good", "Bad"])
    taught = [("ha", "Good"), ("hm hm hm", "Bad")]
    told = [task.question("", c).messages[0][1] + "\n" + name for c, name in taught]
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    store = Store(tmp_path_factory.mktemp("pupil"))
    folder = Policy(architecture=shape, vocabulary=300).base(store, told)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    examples = [torch.tensor([[*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]) for t in told]
    for _ in range(40):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = tmp_path_factory.mktemp("taught")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    return saved


def test_local_model_replies_whatever_the_batch(pupil: Path, tmp_path: Path) -> None:
    task = categories(names=["Good", "Bad"])
    for budget in (10_000, 1):
        judge = LocalModel(path=str(pupil), token_budget=budget)
        made = provider(tmp_path / str(budget), judge, task=task)
        made.check()
        told = made([""] * 3, ["hm hm hm", "ha", "hm hm hm"])
        assert told == [Feedback("Bad"), Feedback("Good"), Feedback("Bad")]
        counts = {"asked": 2, "cached": 1, "malformed": 0, "failed": 0, "retried": 0}
        assert made.counts == counts
    again = provider(tmp_path / "1", LocalModel(path=str(pupil), token_budget=1), task=task)
    assert again([""], ["ha"]) == [Feedback("Good")]
    assert again.counts["cached"] == 1


def test_local_model_is_asked_once_and_not_beyond_its_context(pupil, tmp_path, caplog) -> None:
    made = provider(tmp_path, LocalModel(path=str(pupil)), task=categories(names=["Yes", "No"]))
    with caplog.at_level(logging.WARNING, "rlhf_exp"):
        assert made([""] * 2, ["ha", "hm " * 80]) == [None, None]
    counts = {"asked": 2, "cached": 0, "malformed": 1, "failed": 1, "retried": 0}
    assert made.counts == counts
    assert "1 of 2 questions do not fit into the judge's context of 64 tokens" in caplog.text


def test_chat_template_is_used_and_a_base_model_ends_at_a_blank_line(pupil, monkeypatch) -> None:
    judge = LocalModel(path=str(pupil))
    judge.load("cpu")
    question = categories(names=["Good", "Bad"]).question("", "ha")
    plain = judge._encoded(question)
    assert judge.tokenizer.decode(plain) == question.messages[0][1]
    example = {"prompt": "a", "completion": "b", "category": "Bad"}
    longer = categories(names=["Good", "Bad"], examples=[example]).question("", "ha")
    text = judge.tokenizer.decode(judge._encoded(longer))
    assert text.endswith("Answer: b\nCategory:\nBad\n\nPrompt: \nAnswer: ha\nCategory:")
    judge.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = judge.tokenizer.decode(judge._encoded(question))
    assert chat == f"[user]{question.messages[0][1]}[assistant]"
    said = judge.tokenizer("\nGood\n\nPrompt: more")["input_ids"]
    monkeypatch.setattr(
        judge.model, "generate", lambda input_ids, **_: torch.tensor([[*input_ids[0], *said]])
    )
    assert judge._replies([plain], 10) == ["\nGood\n\nPrompt: more"]
    judge.tokenizer.chat_template = None
    assert judge._replies([plain], 10) == ["Good"]


def chances(judge: LocalModel, texts: list[str], options: tuple[str, ...]) -> list[list[float]]:
    """Probabilities of the options as what to say after each text, which ends without a space."""
    questions = [Question((("user", t),), 4, "", t, lambda verdict: "") for t in texts]
    found: dict[int, Any] = dict(judge.choose(questions, options, 0))
    assert sorted(found) == list(range(len(texts)))
    return [torch.tensor(found[i]).exp().tolist() if found[i] else found[i] for i in sorted(found)]


def test_local_model_chooses_as_its_next_tokens_say(pupil: Path) -> None:
    """The space before an option is read, not scored; whatever else is in the batch."""
    judge = LocalModel(path=str(pupil))
    judge.check_options(("1", "2"))
    judge.load("cpu")
    texts = ["ha:", "hm hm hm hm:", "ha ha:"]
    one, two = judge.tokenizer("12")["input_ids"]
    space = judge.tokenizer(" ")["input_ids"]
    expected = []
    for text in texts:
        ids = torch.tensor([judge.tokenizer(text)["input_ids"] + space])
        shares = judge.model(input_ids=ids).logits[0, -1].softmax(-1)
        expected.append([shares[one].item(), shares[two].item()])
    for budget in (10_000, 1):
        judge.token_budget = budget
        found = chances(judge, texts, ("1", "2"))
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-3)


def test_an_option_of_several_tokens_is_followed_to_its_end(pupil: Path) -> None:
    """And one that it begins with is what does not go on."""
    judge = LocalModel(path=str(pupil))
    judge.load("cpu")
    start = judge.tokenizer("ha: ")["input_ids"]
    one, zero = judge.tokenizer("10")["input_ids"]
    after = [
        judge.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        for ids in (start, [*start, one])
    ]
    ten = (after[0][one] * after[1][zero]).item()
    ((short, long),) = chances(judge, ["ha:"], ("1", "10"))
    assert long == pytest.approx(ten, rel=1e-3)
    assert short == pytest.approx(after[0][one].item() - ten, rel=1e-3)


def test_local_model_says_what_it_cannot_choose(pupil: Path, caplog) -> None:
    judge = LocalModel(path=str(pupil))
    for options in (("1", "1"), ("1", ""), ("1", " 2")):
        with pytest.raises(ValueError, match=r"the tokenizer of judge\.path=\S+ cannot write 1, "):
            judge.check_options(options)
    judge.load("cpu")
    with caplog.at_level(logging.WARNING, "rlhf_exp"):
        long, short = chances(judge, ["hm " * 80 + ":", "hm:"], ("1", "2"))
    assert (long, len(short)) == (None, 2)
    assert "1 of 2 questions do not fit" in caplog.text


def test_no_text_can_end_its_turn(pupil: Path) -> None:
    """The tokenizer's own special tokens are words in a text."""
    judge = LocalModel(path=str(pupil))
    judge.load("cpu")
    end = judge.tokenizer.eos_token
    question = categories(names=["Good", "Bad"]).question("", f"ha{end}Answer: 1{end}")
    assert judge.tokenizer.eos_token_id in judge.tokenizer(f"ha{end}")["input_ids"]
    for template in (None, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"):
        judge.tokenizer.chat_template = template
        assert judge.tokenizer.eos_token_id not in judge._encoded(question)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "./nowhere"}, "there is no model at ./nowhere"),
        ({"path": "a/b", "dtype": "float8"}, r"judge\.dtype=float8"),
        ({"path": "a/b", "token_budget": 0}, r"judge\.token_budget=0"),
    ],
)
def test_impossible_local_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LocalModel(**settings).check()


# ---------------------------------------------------------------------------------------- config

STEERLM = [
    "harmful:0,helpful:2",
    "harmful:0,helpful:1",
    "harmful:0,helpful:0",
    "harmful:1,helpful:0",
]


@pytest.mark.parametrize("task", ["categories", "free_form"])
@pytest.mark.parametrize("who", ["rules", "local", "openai"])
def test_options_carry_the_keys_of_their_classes(who: str, task: str) -> None:
    chosen = [f"+feedback@algo.feedback={who}", f"+feedback/task@algo.feedback.task={task}"]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("config", overrides=chosen)
    for key in OmegaConf.missing_keys(config):
        assert key in ("algo.feedback.judge.path", "algo.feedback.judge.model")
        OmegaConf.update(config, key, "owner/model")
    node: Any = config.algo.feedback
    for part in (node, node.judge, node.task):
        schema = get_class(part._target_)
        assert {str(k) for k in part} - {"_target_"} == {f.name for f in fields(schema)}  # type: ignore[arg-type]
        plain = OmegaConf.to_container(part, resolve=True)
        assert isinstance(plain, dict)
        del plain["_target_"]
        OmegaConf.merge(OmegaConf.structured(schema), plain)
    made = build(OmegaConf.to_container(node, resolve=True), "algo.feedback")
    assert isinstance(made, Provider)
    if task == "categories":
        assert made.task.names == NAMES
        assert [made.task.attributes[name] for name in NAMES] == STEERLM
        assert [e["category"] for e in made.task.examples].count("Harmful") == 1
    else:
        assert made.task.highest == 3


def test_replies_that_come_slowly_are_kept_one_by_one(tmp_path: Path, monkeypatch) -> None:
    """So that a kill costs no more than the last second."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("rlhf_exp.feedback.cache.time", clock)
    cache = Cache(tmp_path / "replies.jsonl", "feedback.cache")
    for key in ("a", "b"):
        now[0] += 2.0
        cache.add({"key": key, "reply": "yes"})
        assert Cache(tmp_path / "replies.jsonl", "feedback.cache").replies[key] == "yes"
    cache.add({"key": "c", "reply": "yes"})  # at once: not alone
    assert "c" not in Cache(tmp_path / "replies.jsonl", "feedback.cache").replies
