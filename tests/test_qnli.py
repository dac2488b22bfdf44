"""QNLI as the thesis has it: wording, splits, flips, and what is refused."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rlhf_exp.data.qnli import ANSWERS, PROMPT, QNLI, flips
from rlhf_exp.data.rows import Dataset

SIZES: Any = {"statements": 30, "held_out": 20, "prompts": 50}


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"Q{i}?", "sentence": f"S{i}.", "label": i * 7 % 3 % 2, "idx": i}
        for i in range(start, start + count)
    ]


def prompt_of(row: Any) -> str:
    return PROMPT.format(sentence=row["sentence"], question=row["question"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """90 training rows in two files, as the hub names them, and 25 validation rows."""
    for name, part in (
        ("train-00000-of-00002", rows(60)),
        ("train-00001-of-00002", rows(30, 60)),
        ("validation-00000-of-00001", rows(25, 1000)),
    ):
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    return tmp_path


def test_prompt_to_the_letter() -> None:
    text = PROMPT.format(sentence="The sky is blue.", question="What color is the sky?")
    assert len(text) == 538
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "48466d3a3958867c544e8ab0e99acd06522707a4df2739fc7091f3989073a12f"
    assert text.endswith("??\nAnswer: ASSISTANT:")


@pytest.mark.parametrize(
    ("seed", "count", "truthful", "digest"),
    [
        (42, 10_000, 4984, "39d4b6f7e80966bf9df3ae99bf1afd8913ce99909dcc9ce3734062aed9cd7bb3"),
        (2023, 5463, 2668, "58401ee81edc485dbd9892d52aeea1651cd87905f35119d6168a4eb2f7a6be3b"),
    ],
)
def test_flips_of_the_thesis(seed: int, count: int, truthful: int, digest: str) -> None:
    told = "".join(str(int(flip)) for flip in flips(seed, count))
    assert told.count("1") == truthful
    assert hashlib.sha256(told.encode()).hexdigest() == digest


def test_splits_are_those_of_the_library_datasets(folder: Path) -> None:
    """The thesis' own calls, on a small data set."""
    train = datasets.Dataset.from_list(rows(90)).shuffle(seed=42)
    parts = train.train_test_split(train_size=30, seed=42)
    policy = parts["test"].shuffle(seed=0).select(range(50))
    validation = datasets.Dataset.from_list(rows(25, 1000)).shuffle(seed=2023).select(range(20))
    data = QNLI(path=str(folder), **SIZES).load()

    assert data.prompts == [prompt_of(row) for row in policy]
    assert data.held_out == [prompt_of(row) for row in validation]
    for told, given, seed in (
        (data.statements, parts["train"], 42),
        (data.held_out_statements, validation, 2023),
    ):
        assert [s.fields["prompt"] for s in told] == [prompt_of(row) for row in given]
        assert [s.label for s in told] == [int(flip) for flip in flips(seed, len(given))]
        for statement, row in zip(told, given, strict=True):
            right = statement.fields["completion"] == ANSWERS[row["label"]]
            assert right == bool(statement.label)

    right = {prompt_of(row): ("Yes", "No")[row["label"]] for row in [*policy, *validation]}
    assert data.answers == right
    assert {*right.values()} == {"Yes", "No"}
    assert [d.prompt for d in data.demonstrations] == data.prompts
    assert [d.completion for d in data.demonstrations] == [f" {right[p]}" for p in data.prompts]
    assert data.templates == "truthful"


def test_leaks_are_dropped_from_the_policy_and_nowhere_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = QNLI(path=str(folder), **SIZES | {"prompts": 60}).load()
    taken = [clean.statements[3].fields["prompt"], clean.held_out[4], clean.prompts[7]]
    texts = {prompt_of(row): row for row in rows(90) + rows(25, 1000)}
    doomed = clean.prompts[20:23]  # become a statement's, a held-out and another policy's prompt
    spoiled = rows(90)
    for old, new in zip(doomed, taken, strict=True):
        i = spoiled.index(texts[old])
        spoiled[i] = texts[new] | {"label": 1 - texts[new]["label"]}
    for path in folder.glob("train*"):
        path.unlink()
    parquet.write_table(pa.Table.from_pylist(spoiled), folder / "train.parquet")

    with caplog.at_level(logging.INFO):
        data = QNLI(path=str(folder), **SIZES).load()
    assert "4 prompts dropped: used elsewhere, or labeled both ways" in caplog.text
    left = [p for p in clean.prompts if p not in (*doomed, taken[2])]
    assert data.prompts == left[:50]
    assert (data.statements, data.held_out) == (clean.statements, clean.held_out)
    with pytest.raises(ValueError, match=r"data\.prompts=57 is more than the 56 training rows"):
        QNLI(path=str(folder), **SIZES | {"prompts": 57}).load()


def test_held_out_prompt_with_both_labels_is_not_asked(folder: Path) -> None:
    again = rows(25, 1000)
    again[1] = again[0] | {"label": 1 - again[0]["label"]}
    parquet.write_table(pa.Table.from_pylist(again), next(folder.glob("validation*")))
    data = QNLI(path=str(folder), **SIZES | {"held_out": 25}).load()
    assert len(data.held_out) == 23
    assert len(data.held_out_statements) == 25
    assert prompt_of(again[0]) not in {*data.held_out, *data.answers}


def test_identity_follows_the_files(folder: Path) -> None:
    before = QNLI(path=str(folder)).identity()
    assert {split: len(hashes) for split, hashes in before.items()} == {"train": 2, "validation": 1}
    parquet.write_table(pa.Table.from_pylist(rows(25, 2000)), next(folder.glob("validation*")))
    after = QNLI(path=str(folder)).identity()
    assert after["train"] == before["train"]
    assert after["validation"] != before["validation"]
    assert QNLI().identity() == {"hub": "nyu-mll/glue", "config": "qnli"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statements": 90}, r"data\.statements=90 is more than the 89 training rows to spare"),
        ({"held_out": 26}, r"data\.held_out=26 is more than the 25 validation rows of"),
        ({"prompts": 61}, r"data\.prompts=61 is more than the 60 training rows besides"),
        ({"prompts": 0}, r"data\.prompts=0 must be positive"),
    ],
    ids=str,
)
def test_sizes_that_the_files_do_not_give(folder: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QNLI(path=str(folder), **SIZES | settings).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"line 1: the label must be 0 \(entailment\) or 1, not -1"),
        ({"label": "entailment"}, "not 'entailment'"),
        ({"question": ""}, "line 1: column 'question' must be text"),
        ({"sentence": None, "label": None}, "column 'sentence' must be text"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used(folder: Path, change: dict, message: str) -> None:
    path = next(folder.glob("validation*"))
    parquet.write_table(pa.Table.from_pylist([row | change for row in rows(25)]), path)
    with pytest.raises(ValueError, match=message):
        QNLI(path=str(folder), **SIZES).load()


def test_missing_column_and_missing_files(folder: Path) -> None:
    path = next(folder.glob("validation*"))
    parquet.write_table(pa.table({"sentence": ["S"], "label": [0]}), path)
    with pytest.raises(ValueError, match="no column 'question'; it has sentence, label"):
        QNLI(path=str(folder), **SIZES).load()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no validation\*\.parquet"):
        QNLI(path=str(folder)).identity()


def test_hub_gives_what_the_files_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str, **_: Any) -> datasets.Dataset:
        assert (name, config) == ("nyu-mll/glue", "qnli")
        return datasets.Dataset.from_list({"train": rows(90), "validation": rows(25, 1000)}[split])

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found: Dataset = QNLI(**SIZES).load()
    assert found == QNLI(path=str(folder), **SIZES).load()


def test_hub_out_of_reach() -> None:
    with pytest.raises(FileNotFoundError, match=r"nyu-mll/glue is neither .*data\.path"):
        QNLI(**SIZES).load()
