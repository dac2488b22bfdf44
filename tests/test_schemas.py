"""Row schemas of the references, bad rows, and prompt formats to the letter."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.data.local import read_rows
from rlhf_exp.data.prompt_formats import FORMATS, prompt_format
from rlhf_exp.data.reading import Reading, pairs
from rlhf_exp.data.rows import Demonstration, Pair
from rlhf_exp.data.schemas import Dropped
from rlhf_exp.data.sources import Source
from rlhf_exp.data.table import Tables

OPEN = "<|prompter|>{}<|endoftext|><|assistant|>"


def reader(file: Path, **settings: Any) -> Tables:
    """All roles from one file, its last row held out."""
    source = {"path": str(file)} | settings
    return Tables(
        prompts={"x": source | {"hold_out": 1, "seed": None}},
        demonstrations={"x": source},
        preferences={"x": source},
    )


def read(folder: Path, rows: list[Any], role: str, **settings: Any) -> list[Any]:
    """What `role` gets of `rows`, written as JSON lines."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reading(reader(file, **settings))(role)


# ---- schemas


@pytest.mark.parametrize(
    ("row", "settings", "completion", "rejected"),
    [
        (
            {"instruction": "Q", "input": "I", "output_1": "a", "output_2": "b", "preference": 2},
            {
                "schema": "choice",
                "columns": {"first": "output_1", "second": "output_2"},
                "choices": [1, 2],
            },
            "b",
            "a",
        ),
        (
            {"instruction": "Q", "input": "I", "answers": ["a", "b"], "preference": 0},
            {"schema": "choice"},
            "a",
            "b",
        ),
        (
            {"instruction": "Q", "input": "I", "answers": ["a", "b"], "gold_scores": [-2.5, 1]},
            {"schema": "scored"},
            "b",
            "a",
        ),
        ([["Q\nI"], ["b", "a"]], {"schema": "ranked"}, "b", "a"),
        (
            {"prompt": ["Q\nI"], "replies": ["b", "a"]},
            {"schema": "ranked"},
            "b",
            "a",
        ),
        (["Q\nI", "b"], {"schema": "turns"}, "b", None),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q\nI"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            {"schema": "turns", "columns": {"turns": "messages"}},
            "b",
            None,
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Q\nI"}],
                "completion": [{"role": "assistant", "content": "b"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "a"}],
            },
            {},
            "b",
            "a",
        ),
        (
            {
                "chosen": "\n\nHuman: Q\nI\n\nAssistant: b",
                "rejected": "\n\nHuman: Q\nI\n\nAssistant: a",
            },
            {"schema": "transcripts"},
            "b",
            "a",
        ),
        ({"text": "Q\nI and b\n"}, {"schema": "text", "prompt_words": 2}, "and b", None),
    ],
    ids=lambda value: value.get("schema") if isinstance(value, dict) else None,
)
def test_the_schemas_of_the_references(
    row: Any, settings: dict, completion: str, rejected: Any, tmp_path: Path
) -> None:
    settings = {"format": "open_assistant"} | settings
    prompt = OPEN.format("Q\nI")
    assert read(tmp_path, [row, row], "prompts", **settings) == [prompt]
    told = read(tmp_path, [row], "demonstrations", **settings)
    assert told == [Demonstration(prompt, completion)]
    if rejected is not None:
        found = read(tmp_path, [row], "preferences", lead=" ", **settings)
        assert found == [Pair(prompt, f" {completion}", f" {rejected}")]


TALK = ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("form", "prompt"),
    [
        ("plain", "onetwothree"),
        (
            "open_assistant",
            "<|prompter|>one<|endoftext|><|assistant|>two<|endoftext|>"
            "<|prompter|>three<|endoftext|><|assistant|>",
        ),
        ("human_assistant", "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"),
    ],
)
def test_conversations_turn_by_turn(form: str, prompt: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schema": "turns", "format": form}
    assert read(tmp_path, [TALK], "demonstrations", **settings) == [Demonstration(prompt, "four")]
    assert read(tmp_path, [TALK[:3], TALK], "prompts", **settings) == [prompt]
    ranked = [[TALK[:3], ["good", "bad", "worse"]]]
    found = read(tmp_path, ranked, "preferences", schema="ranked", format=form, pairs=None)
    expected = [("good", "bad"), ("good", "worse"), ("bad", "worse")]
    assert found == [Pair(prompt, *texts) for texts in expected]
    assert read(tmp_path, ranked, "preferences", schema="ranked", format=form)[0] in found


def test_transcripts_are_kept_to_the_letter_or_taken_apart(tmp_path: Path) -> None:
    start = "\n\nHuman:  Hi there \n\nAssistant: Yes.\n\n\nHuman: Assistant: is a word"
    row = {"chosen": f"{start}\n\nAssistant: fine ", "rejected": f"{start}\n\nAssistant: no"}
    (plain,) = read(tmp_path, [row], "preferences", schema="transcripts", lead=" ")
    assert plain == Pair(f"{start}\n\nAssistant:", " fine", " no")
    (turns,) = read(tmp_path, [row], "preferences", schema="transcripts", format="open_assistant")
    assert turns.prompt == (
        "<|prompter|>Hi there<|endoftext|><|assistant|>Yes.<|endoftext|>"
        "<|prompter|>Assistant: is a word<|endoftext|><|assistant|>"
    )
    twice = {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}
    with pytest.raises(ValueError, match="dropped: 1 turns do not alternate"):
        read(tmp_path, [twice, twice], "prompts", schema="transcripts", format="open_assistant")


def test_a_system_message_joins_the_first_turn(tmp_path: Path) -> None:
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]
    row = {"turns": [{"role": role, "content": text} for role, text in said]}
    (told,) = read(tmp_path, [row], "demonstrations", schema="turns", columns={"turns": "turns"})
    assert told == Demonstration("Be kind.\n\nHi", "Hello")


def test_pairs_of_many_replies_are_drawn_and_ordered() -> None:
    replies = [(-score, f"{score}") for score in (1.0, 3.0, 2.0, 3.0)]
    source = Source(path="a/b", pairs=None)
    every = pairs("p", replies, source)
    assert {(p.chosen, p.rejected) for p in every} == {
        ("3.0", "2.0"),
        ("3.0", "1.0"),
        ("2.0", "1.0"),
    }
    assert len(every) == 5
    source.pairs = 2
    assert (drawn := pairs("p", replies, source)) == pairs("p", replies, source)
    assert len(drawn) == 2
    assert set(drawn) <= set(every)
    with pytest.raises(Dropped, match=r"^tie$"):
        pairs("p", [(1, "a"), (1, "b")], source)
    with pytest.raises(Dropped, match=r"^equal pair$"):
        pairs("p", [(1, "a"), (2, "a")], source)


def test_one_bad_answer_of_many_costs_no_row(tmp_path: Path) -> None:
    row = {"prompt": "p", "answers": ["", "a", "b b", "c c c"], "gold_scores": [4, 3, 2, 1]}
    settings: dict[str, Any] = {"schema": "scored", "completion_length": [None, 2], "pairs": None}
    assert read(tmp_path, [row], "preferences", **settings) == [Pair("p", "a", "b b")]
    assert read(tmp_path, [row], "demonstrations", **settings) == [Demonstration("p", "a")]
    row = {"prompt": "p", "answers": ["a", ""], "gold_scores": [2, 1]}
    with pytest.raises(ValueError, match=r"dropped: 1 empty"):
        read(tmp_path, [row], "preferences", **settings)


# ---- rows that cannot be used


GOOD = {"prompt": "p", "completion": "c", "chosen": "g", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "x"}, {}, r"no column 'prompt'; it has text: give data\.prompts\.x\.columns"),
        ({"prompt": 3}, {}, r"column 'prompt' must be text, not 3"),
        (
            {"prompt": {"txt": "x"}},
            {"columns": {"prompt": "prompt.text"}},
            r"no column 'prompt\.text'",
        ),
        ({"prompt": ["a", "b"]}, {}, r"'prompt' must end with the user's turn"),
        ({"prompt": ["a", 2]}, {}, r"turn 2 of column 'prompt' must be text"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, {}, r"must go user, assistant"),
        ({"prompt": ["a"]}, {"format": "alpaca"}, r"is a conversation: give .*format=plain"),
        ({"chosen": "x"}, {"schema": "transcripts"}, r"'chosen' has no line that begins with"),
        ({"n": 1}, {"where": {"n": {"below": "x"}}}, r"where compares 'n' with 'x', but it is 1"),
    ],
    ids=str,
)
def test_bad_prompts_are_named_by_file_line_and_column(
    row: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{message}"):
        read(tmp_path, [row, row], "prompts", **settings)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: "):
        read(tmp_path, [GOOD, GOOD, {"prompt": 3}, GOOD], "prompts")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"rejected": 1}, {}, r"column 'rejected' must be text, not 1"),
        ({"answers": ["a"]}, {"schema": "choice"}, r"no column 'answers\.1'"),
        (
            {"answers": ["a", "b"], "preference": 2},
            {"schema": "choice"},
            r"'preference' is 2, which is none of data\.preferences\.x\.choices=\[0, 1\]",
        ),
        ({"answers": "ab"}, {"schema": "scored"}, r"column 'answers' must be a list of texts"),
        (
            {"answers": ["a", "b"], "gold_scores": [1]},
            {"schema": "scored"},
            r"'gold_scores' must be a list with a score for each of 2 texts",
        ),
        (
            {"answers": ["a", "b"], "gold_scores": [1, None]},
            {"schema": "scored"},
            r"'gold_scores' must hold finite numbers only",
        ),
        ({"replies": "b"}, {"schema": "ranked"}, r"column 'replies' must be a list of texts"),
    ],
    ids=str,
)
def test_bad_replies_are_named_by_file_line_and_column(
    row: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{message}"):
        read(tmp_path, [GOOD | row], "preferences", **settings)


@pytest.mark.parametrize(
    ("rows", "role", "settings", "reason"),
    [
        ([{"answers": ["a", "b"], "preference": None}], "preferences", {"schema": "choice"}, "tie"),
        ([{"answers": [], "gold_scores": []}], "demonstrations", {"schema": "scored"}, "empty"),
        ([["only a question"]], "demonstrations", {"schema": "turns"}, "no reply"),
        ([{"text": "one two"}], "demonstrations", {"schema": "text"}, "too few words"),
        ([{"text": " "}], "demonstrations", {"schema": "text"}, "empty"),
        ([{"prompt": []}], "demonstrations", {}, "empty"),
    ],
    ids=str,
)
def test_rows_that_say_nothing_are_dropped(
    rows: list, role: str, settings: dict, reason: str, tmp_path: Path
) -> None:
    rows = [GOOD | row if isinstance(row, dict) else row for row in rows]
    with pytest.raises(
        ValueError, match=rf"nothing is left of data\.{role} \(dropped: 1 {reason}\)"
    ):
        read(tmp_path, rows, role, **settings)


# ---- formats


def test_the_gold_template_has_its_header_with_and_without_an_input(tmp_path: Path) -> None:
    """The published code cuts it after its first line, and has none without an input."""
    rows = [{"instruction": "Add.", "input": i} for i in ("1 {x}", "", None)] + [
        {"instruction": "Sub."}
    ]
    found = read(tmp_path, [*rows, rows[0]], "prompts", format="alpaca")
    below = "Below is an instruction that describes a task"
    write = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert found == [
        f"{below}, paired with an input that provides further context. {write}Add.\n\n### Input:\n"
        "1 {x}\n\n### Response:",
        f"{below}. {write}Add.\n\n### Response:",
        f"{below}. {write}Sub.\n\n### Response:",
    ]


def test_own_formats_take_the_first_text_that_is_filled(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": ""}, {"a": "", "b": "y"}, {"a": "end"}]
    found = read(tmp_path, rows, "prompts", format=["{a} of {b}?", "{a}?"])
    assert found == ["x of y?", "x?"]
    nested = [{"post": {"text": "{x}"}, "tags": ["t"]}] * 2
    assert read(tmp_path, nested, "prompts", format="{post.text}: {tags.0}{{}}") == ["{x}: t{}"]
    with pytest.raises(ValueError, match=r"data\.format=.* must name a column in braces"):
        prompt_format("{} and {a}", None, "data.format")
    assert {name for _, names in FORMATS["question"].alternatives for name in names} == {
        "system_prompt",
        "question",
    }


def test_the_chat_template_of_a_tokenizer(tmp_path: Path, tiny_base) -> None:
    """Without the begin-of-text token, which the policy would put there a second time."""
    from rlhf_exp.weights import load_tokenizer

    folder = tmp_path / "model"
    tokenizer = load_tokenizer(tiny_base())
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((tiny_base() / "config.json").read_text())
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(TALK) + "\n")
    source = {"path": str(file), "schema": "turns"}
    tables = Tables(
        prompts={"x": source | {"hold_out": 1}},
        demonstrations={"x": source},
        format="chat",
        tokenizer=str(folder),
    )
    assert Reading(tables)("demonstrations") == [
        Demonstration("[user]one[assistant]two[user]three[assistant]", "four")
    ]


# ---- files


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "more": [i, None]} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {
        "a.jsonl": lines.encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "lines.json": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "x"},\n', r"a\.json: not valid JSON"),
        ("a.json", b"[]", r"a\.json is empty"),
        ("a.json", b'[{"prompt": "x"}, 3]', r"a\.json, line 2: expected an object .* found 3"),
        ("a.jsonl", b'["q", "a"]\n', r"a\.jsonl, line 1: expected an object"),
        ("a.jsonl.gz", b"not packed", r"a\.jsonl\.gz cannot be unpacked"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}', mtime=0)[:-9],
            r"a\.jsonl\.gz cannot be unpacked",
        ),
        ("a.csv.gz", b"", r"data files end in \.jsonl or \.parquet"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)
