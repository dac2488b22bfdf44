"""The embedded world and its gold, and data files of the user."""

import json
import random
from pathlib import Path

import pytest

from rlhf_exp.data import reviews
from rlhf_exp.data.local import Local, read_jsonl, write_jsonl
from rlhf_exp.data.prepare import WRITERS
from rlhf_exp.data.reviews import Reviews, read
from rlhf_exp.data.rows import Demonstration, Pair

# ------------------------------------------------------------------------------ the embedded world


@pytest.mark.parametrize(
    ("review", "gold"),
    [
        # one clause: the adjective's weight, scaled by intensity, turned and halved by a negation
        (" the plot was wonderful .", 1.0),
        (" the plot is very wonderful .", 1.25),
        (" it was utterly dreadful .", -1.75),
        (" the cast felt slightly decent .", 0.1),
        (" the music was not wonderful .", -0.5),
        (" the music was not truly awful .", 0.75),
        # verbs
        (" i loved the acting .", 1.0),
        (" i regretted the script .", -0.7),
        (" i did not hate the script .", 0.5),
        (" i did not love the ending .", -0.5),
        # a clause that parses and says nothing
        (" the story follows a sailor .", 0.0),
        # the mean over clauses
        (" the plot was wonderful . the music was awful .", 0.0),
        (" i loved the acting . the story follows a poet .", 0.5),
        # repetition: half of the clauses are repeats
        (" the plot was wonderful . the plot was wonderful .", 0.5),
        # the end is missing
        (" the plot was wonderful", 0.5),
        # unparsed: sentiment counts in proportion to what parses, minus the share of what does not
        (" wonderful wonderful wonderful .", -1.0),
        (" the plot was wonderful . so good .", 0.0),
        (" the plot was wonderful . the plot was", -0.5),
        (" The plot was wonderful .", -1.0),
        (" i did love the plot .", -1.0),
        (" the plot was wonderful very .", -1.0),
        # nothing at all is unparsed and unfinished
        ("", -1.5),
        ("   ", -1.5),
        (" .", -1.0),
    ],
)
def test_gold_of_hand_written_reviews(review: str, gold: float) -> None:
    assert read(review).gold == pytest.approx(gold, abs=1e-9)


def test_clauses_beyond_the_sixth_count_as_unparsed() -> None:
    clauses = [f" the {aspect} was wonderful ." for aspect in reviews.ASPECTS]
    assert read("".join(clauses[:6])).gold == pytest.approx(1.0)
    assert read("".join(clauses[:8])).gold == pytest.approx(0.75 - 0.25)


def test_spaces_do_not_matter() -> None:
    assert read("the  plot was\n wonderful  .") == read(" the plot was wonderful .")


@pytest.fixture(scope="module")
def world():
    """A small world."""
    return Reviews(demonstrations=400, prompts=50, held_out=20).load()


def test_every_generated_review_is_well_formed(world) -> None:
    assert len(world.demonstrations) == 400
    for demonstration in world.demonstrations:
        reading = read(demonstration.completion)
        assert (reading.unparsed, reading.unfinished) == (0.0, False), demonstration.completion
        assert reading.gold == pytest.approx(reading.sentiment - reading.repeated)


def test_reviews_hardly_ever_repeat_a_clause(world) -> None:
    repeats = sum(read(d.completion).repeated > 0 for d in world.demonstrations)
    assert repeats < 0.05 * len(world.demonstrations)


def test_reviews_have_both_moods_and_words_within_one_agree(world) -> None:
    golds = [read(d.completion).sentiment for d in world.demonstrations]
    assert sum(g > 0.3 for g in golds) > 50
    assert sum(g < -0.3 for g in golds) > 50
    assert abs(sum(golds) / len(golds)) < 0.15


def test_held_out_films_are_not_trained_on(world) -> None:
    assert (len(world.prompts), len(world.held_out)) == (50, 20)
    assert len(set(world.prompts) | set(world.held_out)) == 70
    assert {d.prompt for d in world.demonstrations} <= set(world.prompts)


def test_same_seed_same_world() -> None:
    settings = {"demonstrations": 30, "prompts": 10, "held_out": 5}
    first, again, other = (Reviews(seed=seed, **settings).load() for seed in (0, 0, 1))
    assert first == again
    assert first.prompts != other.prompts
    assert first.demonstrations != other.demonstrations


def test_the_world_draws_from_its_own_generator() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    Reviews(demonstrations=5, prompts=5, held_out=5).load()
    assert random.random() == expected


@pytest.mark.parametrize("sizes", [{"prompts": 0}, {"held_out": 0}, {"prompts": 2400}], ids=str)
def test_impossible_world_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"data\.prompts=.* at most 2400"):
        Reviews(**sizes)


# ------------------------------------------------------------------------------------- local files


def rows_file(path: Path, rows: list[dict]) -> str:
    """Write `rows` to `path` as JSONL or Parquet."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    return str(path)


def prompt_rows(count: int) -> list[dict[str, str]]:
    """`count` different prompts."""
    return [{"prompt": f"question {i}"} for i in range(count)]


PAIRS = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_local_files_are_read_and_split(tmp_path: Path, suffix: str) -> None:
    data = Local(
        prompts=rows_file(tmp_path / f"prompts{suffix}", prompt_rows(20)),
        demonstrations=rows_file(tmp_path / f"told{suffix}", [{"prompt": "a", "completion": " b"}]),
        preferences=rows_file(tmp_path / f"pairs{suffix}", PAIRS),
        held_out_share=0.25,
    ).load()
    assert (len(data.prompts), len(data.held_out)) == (15, 5)
    assert {*data.prompts, *data.held_out} == {f"question {i}" for i in range(20)}
    assert data.demonstrations == [Demonstration("a", " b")]
    assert (len(data.pairs), len(data.held_out_pairs)) == (15, 5)
    assert data.held_out_pairs + data.pairs == [Pair(**row) for row in PAIRS]


def test_split_is_drawn_by_the_seed(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "p.jsonl", prompt_rows(20))
    first, again, other = (Local(prompts=path, seed=seed).load() for seed in (0, 0, 1))
    assert first == again
    assert set(first.held_out) != set(other.held_out)


def test_given_held_out_file_and_columns_are_used(tmp_path: Path) -> None:
    data = Local(
        prompts=rows_file(tmp_path / "p.jsonl", [{"q": "one"}, {"q": "two"}]),
        held_out=rows_file(tmp_path / "h.jsonl", [{"q": "three"}]),
        prompt_column="q",
    ).load()
    assert (data.prompts, data.held_out) == (["one", "two"], ["three"])


@pytest.mark.parametrize("field", ["prompts", "held_out", "demonstrations", "preferences"])
def test_missing_file_is_named(tmp_path: Path, field: str) -> None:
    files = {"prompts": rows_file(tmp_path / "p.jsonl", prompt_rows(20))}
    files[field] = str(tmp_path / "nowhere.jsonl")
    for ask in (Local(**files).load, Local(**files).identity):
        with pytest.raises(FileNotFoundError, match=r"no data file at .*nowhere\.jsonl"):
            ask()


GOOD = '{"prompt": "fine"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (f"{GOOD}\n{{broken\n{GOOD}\n", "line 2: not valid JSON"),
        (f'{GOOD}\n"text"\n', "line 2: expected an object"),
        (f"{GOOD}\n\n{GOOD}\n", "line 2: not valid JSON"),
        (f'{GOOD}\n{{"text": "x"}}\n', "line 2: no column 'prompt'; it has text"),
        (f"{GOOD}\n{{}}\n", "line 2: no column 'prompt'; it has none"),
        (f'{GOOD}\n{{"prompt": ""}}\n', "line 2: column 'prompt' must be text"),
        (f'{GOOD}\n{{"prompt": "  "}}\n', "line 2: column 'prompt' must be text"),
        (f'{GOOD}\n{{"prompt": null}}\n', "line 2: column 'prompt' must be text .* not None"),
        (f'{GOOD}\n{{"prompt": 3}}\n', "line 2: column 'prompt' must be text .* not 3"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"prompts\.jsonl.*{message}"):
        Local(prompts=str(path)).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"prompt\nx\n", r"p\.csv: data files end in \.jsonl or \.parquet"),
        ("p.parquet", b"not parquet", r"p\.parquet cannot be read as Parquet"),
        ("p.jsonl", b'{"prompt": "\xff\xfe"}\n', r"p\.jsonl.*UTF-8"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?i){message}"):
        Local(prompts=str(tmp_path / name)).load()


def test_equal_replies_and_missing_columns_of_pairs_are_refused(tmp_path: Path) -> None:
    prompts = rows_file(tmp_path / "p.jsonl", prompt_rows(20))
    equal = [*PAIRS[:2], {"prompt": "p", "chosen": "same", "rejected": "same"}]
    lacking = [{"prompt": "p", "chosen": "x"}]
    odd = [PAIRS[0] | {"probability": 0.9}, PAIRS[1] | {"probability": "high"}]
    for rows, message in (
        (odd, "line 2: column 'probability' .* between 0.5 and 1, not 'high'"),
        ([PAIRS[0] | {"probability": 0.2}], "line 1: column 'probability' .* not 0.2"),
        (equal, "line 3: chosen and rejected are equal"),
        (lacking, "'rejected'"),
    ):
        pairs = rows_file(tmp_path / "pairs.jsonl", rows)
        with pytest.raises(ValueError, match=rf"pairs\.jsonl.*{message}"):
            Local(prompts=prompts, preferences=pairs).load()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_may_say_how_sure_they_are(tmp_path: Path, kind: str) -> None:
    prompts = rows_file(tmp_path / "p.jsonl", prompt_rows(20))
    path = tmp_path / f"pairs.{kind}"
    WRITERS[kind](path, [PAIRS[0] | {"probability": 0.75}, *PAIRS[1:]])
    data = Local(prompts=prompts, preferences=str(path), held_out_preferences=str(path)).load()
    assert [pair.probability for pair in data.pairs] == [0.75] + [1.0] * 19


def test_demonstration_without_completion_is_refused(tmp_path: Path) -> None:
    prompts = rows_file(tmp_path / "p.jsonl", prompt_rows(20))
    told = rows_file(tmp_path / "told.jsonl", [{"prompt": "p", "completion": " "}])
    with pytest.raises(ValueError, match=r"told\.jsonl, line 1: column 'completion'"):
        Local(prompts=prompts, demonstrations=told).load()


def test_too_few_rows_to_hold_some_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few rows to keep some for evaluation"):
        Local(prompts=rows_file(tmp_path / "p.jsonl", prompt_rows(1))).load()


def test_prompts_in_both_splits_are_refused(tmp_path: Path) -> None:
    prompts = rows_file(tmp_path / "p.jsonl", prompt_rows(3))
    held_out = rows_file(tmp_path / "h.jsonl", [{"prompt": "question 1"}])
    with pytest.raises(ValueError, match=r"1 prompts are both trained on and held out.*question 1"):
        Local(prompts=prompts, held_out=held_out).load()
    repeated = rows_file(tmp_path / "r.jsonl", prompt_rows(2) * 10)
    with pytest.raises(ValueError, match="both trained on and held out"):
        Local(prompts=repeated).load()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_share_outside_the_unit_interval_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.held_out_share={share}"):
        Local(prompts="p.jsonl", held_out_share=share)


@pytest.mark.parametrize("field", ["prompts", "held_out", "demonstrations", "preferences"])
def test_identity_changes_with_the_content_of_each_file(tmp_path: Path, field: str) -> None:
    files = {}
    for name in ("prompts", "held_out", "demonstrations", "preferences"):
        (tmp_path / name).mkdir()  # equal file names in different folders
        files[name] = rows_file(tmp_path / name / "rows.jsonl", [{"prompt": name}])
    before = Local(**files).identity()
    assert Local(**files).identity() == before
    with Path(files[field]).open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert Local(**files).identity() != before


@pytest.mark.parametrize(
    "text", ["a\u2028b", "a\x85b", "a\nb", "a\r\nb", 'q"\\', "ü 漢 🙂", "\x0c"]
)
def test_any_text_survives_the_way_through_a_file(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": text}, {"prompt": "next"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 1}))  # no line end at all
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]


def test_statements_answers_and_templates_of_the_user(tmp_path: Path) -> None:
    prompts = [{"prompt": f"p{i}", "right": f"a{i}"} for i in range(10)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    stated = [{"prompt": f"s{i}", "completion": "yes", "truth": i % 2 == 1} for i in range(20)]
    write_jsonl(tmp_path / "stated.jsonl", stated)
    data = Local(
        prompts=str(tmp_path / "prompts.jsonl"),
        answer_column="right",
        statements=str(tmp_path / "stated.jsonl"),
        label_column="truth",
        templates="truthful",
    ).load()
    assert data.answers == {f"p{i}": f"a{i}" for i in range(10)}
    assert (len(data.statements), len(data.held_out_statements)) == (18, 2)
    found = data.statements + data.held_out_statements
    assert {s.fields["prompt"] for s in found} == {f"s{i}" for i in range(20)}
    for s in found:
        assert s.fields.keys() == {"prompt", "completion"}
        assert s.label == int(s.fields["prompt"][1:]) % 2
    assert data.templates == "truthful"


def test_statements_of_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    prompts, stated = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    write_jsonl(prompts, [{"prompt": f"q{i}"} for i in range(4)])
    rows = [{"prompt": f"p{i // 2}", "completion": str(i), "label": i % 2} for i in range(40)]
    write_jsonl(stated, rows)
    data = Local(prompts=str(prompts), statements=str(stated)).load()
    fitted, held = (
        {s.fields["prompt"] for s in part} for part in (data.statements, data.held_out_statements)
    )
    assert (len(fitted), len(held), fitted & held) == (18, 2, set())
    both = Local(prompts=str(prompts), statements=str(stated), held_out_statements=str(stated))
    with pytest.raises(ValueError, match="20 prompts have statements both to fit on and held out"):
        both.load()
    few = tmp_path / "few.jsonl"
    write_jsonl(few, rows[:6])
    assert Local(prompts=str(prompts), statements=str(few)).load().held_out_statements


@pytest.mark.parametrize("value", [None, 2, ["a"]])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_what_is_stated_must_be_text(tmp_path: Path, column: str, value: object) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    row = {"prompt": "a", "completion": "b", "label": 1}
    write_jsonl(tmp_path / "s.jsonl", [row, row | {column: value}])
    data = Local(prompts=str(tmp_path / "p.jsonl"), statements=str(tmp_path / "s.jsonl"))
    with pytest.raises(ValueError, match=rf"s\.jsonl, line 2: column '{column}' must be text"):
        data.load()


@pytest.mark.parametrize("label", ["yes", None, -1, 0.5])
def test_labels_must_be_indices(tmp_path: Path, label: object) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write_jsonl(tmp_path / "s.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": label}])
    data = Local(prompts=str(tmp_path / "p.jsonl"), statements=str(tmp_path / "s.jsonl"))
    with pytest.raises(ValueError, match=r"s\.jsonl, line 2: column 'label' must be the index"):
        data.load()
