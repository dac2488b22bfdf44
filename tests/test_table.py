"""The reader of public sets: every preset on small files with the real columns, splits, filters,
mixtures, the hub, and what is refused.
"""

import gzip
import json
import logging
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from runs import inside

from rlhf_exp.config import build, check, conf_directory, resolved
from rlhf_exp.data.local import read_rows, write_jsonl
from rlhf_exp.data.prepare import write_parquet
from rlhf_exp.data.reading import mixed
from rlhf_exp.data.rows import Dataset, Pair
from rlhf_exp.data.sources import Source
from rlhf_exp.data.table import Tables
from rlhf_exp.weights import load_tokenizer


def tables(name: str, *overrides: str) -> Tables:
    """What `python -m rlhf_exp data=<name> <overrides>` builds as data."""
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose(f"data/{name}", overrides=list(overrides))
    return build(resolved(config)["data"], "data")


def write(file: Path, rows: list[Any]) -> Path:
    """Rows in the form that the name of the file asks for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        write_parquet(file, rows)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        write_jsonl(file, rows)
    return file


# ---- the presets, on small files with the columns and names of the published ones


def instructions(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"{split} {i}", "input": f"in {i}" if i % 2 else "", "output": f"out {i}"}
        for i in range(count)
    ]


def alpaca_farm(folder: Path) -> None:
    for split, count in (("sft", 6), ("preference", 6), ("unlabeled", 8), ("val", 4)):
        write(folder / f"alpaca_instructions/{split}.json", instructions(split, count))
    rows = [
        row | {"output_1": f"a{i}", "output_2": f"b{i}", "preference": 1 + i % 2}
        for i, row in enumerate(instructions("preference", 12))
    ]
    rows[3]["output_2"] = rows[3]["output_1"]
    write(folder / "alpaca_human_preference.json", [row | {"raw_preference": 1} for row in rows])


def alpaca_farm_synthetic(folder: Path) -> None:
    alpaca_farm(folder)
    for file, start in (("train/sft", 0), ("train/human_pref", 6), ("validation/val", 12)):
        rows = [
            row | {"answers": [f"a{i}", f"b{i}"], "preference": i % 2}
            for i, row in enumerate(instructions(file, 6), start)
        ]
        write(folder / f"{file}.json", rows)


def alpaca_farm_generations(folder: Path) -> None:
    rows = [
        row
        | {
            "answers": [f"{j} of {i}" for j in range(90)],
            "gold_scores": [j % 70 for j in range(90)],
        }
        for i, row in enumerate(instructions("val", 5))
    ]
    write(folder / "validation.jsonl", rows)


def posts(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{split}{i}", "subreddit": "tifu", "title": f"T{i}", "post": f"{split} {i}\n\n"}
        | {"summary": f"sum {i}"}
        for i in range(count)
    ]


def tldr(folder: Path) -> None:
    for split, count in (("train", 7), ("validation", 3)):
        write(folder / f"{split}.jsonl", posts(split, count))
        rows = [
            {
                "info": {k: post[k] for k in ("id", "post", "title", "subreddit")}
                | {"site": None, "article": None},
                "summaries": [
                    {"text": f" {side} {i}", "policy": "sup4", "note": None} for side in "ab"
                ],
                "choice": i % 2,
                "worker": "w",
                "batch": "batch3",
                "split": split,
                "extra": {"confidence": 5},
            }
            for i, post in enumerate(posts(f"compared {split}", count))
        ]
        if split == "validation":  # a news article
            info = rows[0]["info"] | dict.fromkeys(("post", "title", "subreddit"))
            rows.append(rows[0] | {"info": info | {"article": "News."}, "batch": "cnndm0"})
        write(folder / f"comparisons/{split}/0000.parquet", rows)


def transcripts(split: str, count: int) -> list[dict[str, str]]:
    start = [f"\n\nHuman: Hi {split}{i}\n\nAssistant: Yes?\n\nHuman: More" for i in range(count)]
    return [
        {"chosen": f"{s}\n\nAssistant: good {i}", "rejected": f"{s}\n\nAssistant: bad {i}"}
        for i, s in enumerate(start)
    ]


def hh_rlhf(folder: Path) -> None:
    for part in ("helpful-base", "harmless-base"):
        for split, count in (("train", 4), ("test", 2)):
            write(folder / part / f"{split}.jsonl.gz", transcripts(f"{part} {split}", count))
    odd = transcripts("odd", 1)[0]
    odd["rejected"] = odd["rejected"].replace("More", "Less")
    write(folder / "helpful-online" / "train.jsonl.gz", [odd])


def openorca(folder: Path) -> None:
    rows = [
        {"id": f"niv.{i}", "system_prompt": "Be kind." if i % 2 else ""}
        | {"question": f"Why {i}?", "response": f"Because {i}."}
        for i in range(10)
    ]
    write(folder / "1M-GPT4-Augmented.parquet", rows)


def realtoxicityprompts(folder: Path) -> None:
    rows = [
        {
            "filename": "0766.txt",
            "begin": 0,
            "end": 9,
            "challenging": i == 1,
            "prompt": {"text": f"So I {i}", "toxicity": [0.1, 0.9, None][i % 3], "threat": 0.1},
            "continuation": {"text": f" went {i}.", "toxicity": 0.2},
        }
        for i in range(9)
    ]
    write(folder / "prompts.jsonl", rows)


def imdb(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [
            {"text": f"This {split} film number {i} is one that  I saw.<br />Fine", "label": i % 2}
            for i in range(4)
        ]
        write(
            folder / f"{split}-00000-of-00001.parquet", [*rows, {"text": "Too short", "label": 0}]
        )


def mixture(folder: Path) -> None:
    alpaca_farm(folder)
    hh_rlhf(folder)


PAIRS = "data.preferences.pairs."
TOO_FEW = {role: {"too few words": 1} for role in ("prompts", "held_out", "demonstrations")}
# Files, overrides for their size, rows kept (prompts, held out, demonstrations, pairs, held-out
# pairs), and rows dropped.
PRESETS: dict[str, tuple[Any, list[str], list[int], dict[str, dict[str, int]]]] = {
    "alpaca_farm": (
        alpaca_farm,
        [PAIRS + "hold_out=3"],
        [8, 4, 6, 9, 2],
        {"held_out_preferences": {"equal pair": 1}},
    ),
    "alpaca_farm_synthetic": (alpaca_farm_synthetic, [PAIRS + "size=9"], [8, 4, 6, 9, 6], {}),
    "alpaca_farm_generations": (
        alpaca_farm_generations,
        ["data.prompts.pool.hold_out=2", "data.preferences.pool.hold_out=2"],
        [3, 2, 3, 24, 16],
        {"demonstrations": {"held out": 2}},
    ),
    "tldr": (
        tldr,
        ["data.held_out_preferences.comparisons.size=3"],
        [7, 3, 7, 7, 3],
        {"held_out_preferences": {"filter": 1}},
    ),
    "hh_rlhf": (hh_rlhf, [], [9, 4, 9, 8, 4], {"preferences": {"prompts differ": 1}}),
    "openorca": (
        openorca,
        [
            "data.prompts.questions.size=6",
            "data.prompts.questions.hold_out=2",
            "data.demonstrations.questions.size=8",
        ],
        [6, 2, 8, 0, 0],
        {},
    ),
    "realtoxicityprompts": (
        realtoxicityprompts,
        ["data.held_out.beginnings.size=2"],
        [7, 2, 7, 0, 0],
        {
            "held_out": {"filter": 1},
            "prompts": {"held out": 2},
            "demonstrations": {"held out": 2},
        },
    ),
    "imdb": (imdb, [], [4, 4, 4, 0, 0], TOO_FEW),
    "mixture": (
        mixture,
        [
            "data.preferences.instructions.hold_out=3",
            "data.held_out_preferences.conversations.size=2",
        ],
        [16, 8, 12, 16, 5],
        {"preferences": {"equal pair": 1, "prompts differ": 1}},
    ),
}


def preset(name: str, folder: Path, *overrides: str) -> Tables:
    """The preset on its small files in `folder`."""
    files, sizes, _, _ = PRESETS[name]
    files(folder)
    return tables(name, f"data.path={folder}", *sizes, *overrides)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Dataset]:
    """What a preset makes of its small files, made once."""
    return cache(lambda name: preset(name, tmp_path_factory.mktemp(name)).load())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reads_small_files_with_the_real_columns(name: str, loaded) -> None:
    data = loaded(name)
    roles = (data.prompts, data.held_out, data.demonstrations, data.pairs, data.held_out_pairs)
    assert [len(rows) for rows in roles] == PRESETS[name][2]
    assert data.dropped == PRESETS[name][3]
    trained = {*data.prompts, *(r.prompt for r in [*data.demonstrations, *data.pairs])}
    assert not trained & {*data.held_out, *(pair.prompt for pair in data.held_out_pairs)}


POST = "SUBREDDIT: r/tifu\n\nTITLE: T{0}\n\nPOST: {1} {0}\n\n\n\nTL;DR:"
TURNS = "\n\nHuman: Hi helpful-base {}\n\nAssistant: Yes?\n\nHuman: More\n\nAssistant:"
OPEN = "<|prompter|>{}<|endoftext|><|assistant|>"


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "pair"),
    [
        (
            "alpaca_farm",
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nunlabeled 1\n\n### Input:\nin 1\n\n### Response:",
            "out 1",
            Pair(
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\npreference 8\n\n"
                "### Response:",
                "a8",
                "b8",
            ),
        ),
        (
            "alpaca_farm_synthetic",
            OPEN.format("unlabeled 1\nin 1"),
            "out 1",
            Pair(OPEN.format("train/sft 1\nin 1"), "b1", "a1"),
        ),
        ("alpaca_farm_generations", OPEN.format("val 0"), "63 of 0", None),
        (
            "tldr",
            POST.format(1, "train"),
            " sum 1",
            Pair(POST.format(1, "compared train"), " b 1", " a 1"),
        ),
        (
            "hh_rlhf",
            TURNS.format("train0"),
            " good 0",
            Pair(TURNS.format("train0"), " good 0", " bad 0"),
        ),
        ("openorca", "Be kind.\n\nQuestion: Why 1?\n\nAnswer:", " Because 1.", None),
        ("realtoxicityprompts", "So I 1", " went 1.", None),
        ("imdb", "This train film number 1 is one that", " I saw.<br />Fine", None),
        ("mixture", "\n\nHuman: unlabeled 1\nin 1\n\nAssistant:", " out 1", None),
    ],
    ids=str,
)
def test_preset_to_the_letter(name: str, prompt: str, completion: str, pair: Any, loaded) -> None:
    data = loaded(name)
    assert prompt in data.prompts
    assert completion in [d.completion for d in data.demonstrations]
    assert pair is None or pair in data.pairs


def test_every_preset_is_tested_and_every_setting_of_a_source_has_its_line() -> None:
    with_reader = {
        file.stem
        for file in (conf_directory() / "data").glob("*.yaml")
        if "rlhf_exp.data.table.Tables" in file.read_text() or "- alpaca_farm\n" in file.read_text()
    }
    assert with_reader == set(PRESETS)
    told = yaml.safe_load((conf_directory() / "data" / "source" / "rows.yaml").read_text())
    node = Source(path="???")
    assert told == {f.name: getattr(node, f.name) for f in fields(Source) if f.name != "key"}


def test_a_set_is_added_to_a_mixture_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", [{"prompt": f"mine {i}"} for i in range(8)])
    imdb(tmp_path)
    roles = ("prompts", "held_out", "demonstrations")
    overrides = [f"data.{role}.reviews.path={tmp_path}" for role in roles]
    overrides += ["data=imdb", "+data/source@data.prompts.mine=rows"]
    overrides += [f"data.prompts.mine.path={file}", "data.prompts.mine.hold_out=1"]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("config", overrides=overrides)
    check(config)
    data = build(resolved(config)["data"], "data").load()
    for found, mine, reviews in ((data.prompts, 7, 4), (data.held_out, 1, 4)):
        assert sum(p.startswith("mine") for p in found) == mine
        assert len(found) == mine + reviews


def test_generations_are_cut_to_their_first_answers_and_no_row_is_lost(loaded) -> None:
    """The published pipeline cuts the rows of a batch in place of the answers of a row."""
    data = loaded("alpaca_farm_generations")
    assert len(data.prompts) + len(data.held_out) == 5
    for pair in data.pairs + data.held_out_pairs:
        better, worse = (int(text.split()[0]) for text in (pair.chosen, pair.rejected))
        assert worse < better < 64
    assert len({*data.pairs}) == 24


# ---- splits and sizes


def numbered(folder: Path, count: int) -> str:
    """A file of pairs, prompts and demonstrations with numbers."""
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i}", "chosen": f"g{i}", "rejected": f"b{i}", "n": i}
        for i in range(count)
    ]
    return str(write(folder / "rows.jsonl", rows))


def reader(file: Any, *, held: int = 1, **settings: Any) -> Tables:
    """Prompts of `file`, the last ones held out."""
    source = {"path": str(file), "hold_out": held, "seed": None}
    return Tables(prompts={"rows": source}, **settings)


def test_held_out_pairs_are_those_of_random_split(tmp_path: Path) -> None:
    """AlpacaFarm's fixed split: torch's `random_split` under a seed."""
    file, seed = numbered(tmp_path, 40), 287631038922
    source = {"path": file, "hold_out": 15, "seed": seed}
    data = reader(file, held=1, preferences={"rows": source}).load()
    generator = torch.Generator().manual_seed(seed)
    left, held = torch.utils.data.random_split(range(40), [25, 15], generator=generator)  # type: ignore[arg-type]
    assert [pair.prompt for pair in data.held_out_pairs] == [f"p{i}" for i in held]
    spared = {*data.held_out}
    assert [p.prompt for p in data.pairs] == [f"p{i}" for i in left if f"p{i}" not in spared]
    assert not {p.prompt for p in data.held_out_pairs} & {*data.prompts}


def test_sizes_fractions_and_order(tmp_path: Path) -> None:
    file = numbered(tmp_path, 20)

    def got(**settings: Any) -> list[int]:
        found = reader(file, demonstrations={"rows": {"path": file} | settings}).load()
        return [int(d.prompt[1:]) for d in found.demonstrations]

    assert got() == list(range(19))  # p19 is held out
    assert got(size=5, seed=None) == [0, 1, 2, 3, 4]
    assert got(fraction=0.25, seed=None) == [0, 1, 2, 3, 4]
    drawn = got(size=5, seed=1)
    assert drawn == got(size=5, seed=1) != got(size=5, seed=2)
    assert drawn == got(size=10, seed=1)[:5]
    assert drawn[:4] == got(fraction=0.25, seed=1)  # which draws p19, too
    assert len(set(drawn)) == 5
    with pytest.raises(
        ValueError, match=r"data\.demonstrations\.rows\.size=20 is more than the 19"
    ):
        got(size=20)
    with pytest.raises(ValueError, match=r"data\.prompts\.rows\.hold_out=20 leaves none of the 20"):
        reader(file, held=20).load()


def test_mixtures_keep_their_shares() -> None:
    parts = [list("aaaaaaaa"), list("bb"), list("cccc")]
    found = mixed(parts, [0.5, 0.25, 0.25], 0)
    assert {x: found.count(x) for x in "abc"} == {"a": 4, "b": 2, "c": 2}
    assert found == mixed(parts, [2.0, 1.0, 1.0], 0) != mixed(parts, [2.0, 1.0, 1.0], 1)
    everything = mixed(parts, [None] * 3, 0)
    assert sorted(everything) == sorted("aaaaaaaabbcccc") != everything
    assert mixed([list("abc")], [None], 0) == list("abc")
    assert mixed([list("abcd"), list("efgh")], [0.75, 0.25], 0).count("e") == 1


# ---- what is dropped


def test_every_drop_is_counted_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"prompt": "one", "chosen": "x y z", "rejected": "u v w", "kind": "k"}
    changes: list[dict[str, Any]] = [
        {"prompt": " "},
        {"prompt": None},
        {"chosen": ""},
        {"chosen": " u v w "},
        {"kind": "other"},
        {"chosen": "As an AI Language model, no"},
        {"rejected": "u v"},
        {"chosen": "a b c d e"},
        {"prompt": "a b c d"},
        {"prompt": "held"},
    ]
    file = write(tmp_path / "pairs.jsonl", [good, *(good | change for change in changes)])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in ("a", "b", "a", "held")])
    source = {"path": str(file), "where": {"kind": "k"}, "prompt_length": [None, 3]}
    source |= {"completion_length": [3, 4]}
    with caplog.at_level(logging.INFO):
        data = reader(prompts, preferences={"x": source}, drop_phrases=["as an ai language"]).load()
    assert data.pairs == [Pair("one", "x y z", "u v w")]
    assert data.dropped == {
        "prompts": {"repeated": 1},
        "preferences": {
            "empty": 3,
            "equal pair": 1,
            "filter": 1,
            "phrase": 1,
            "completion too short": 1,
            "completion too long": 1,
            "prompt too long": 1,
            "held out": 1,
        },
    }
    assert "data.preferences: 1 (dropped: 3 empty, " in caplog.text
    source["where"] = {"kind": "none"}
    with pytest.raises(
        ValueError, match=r"nothing is left of data\.preferences \(dropped: 11 filter"
    ):
        reader(prompts, preferences={"x": source}).load()


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"n": 3}, [3]),
        ({"n": [1, 5, 77]}, [1, 5]),
        ({"n": {"below": 2}}, [0, 1]),
        ({"n": {"at_least": 2, "below": 4}}, [2, 3]),
        ({"n": {"not_in": [0, 1, 2, 3]}}, [4, 5, 6]),
        ({"n": {"is": 4}, "prompt": "p4"}, [4]),
    ],
    ids=str,
)
def test_rows_are_chosen_by_their_columns(where: dict, kept: list[int], tmp_path: Path) -> None:
    source = {"path": numbered(tmp_path, 8), "hold_out": 1, "where": where, "seed": None}
    held = {"path": source["path"], "where": {"n": 7}}
    data = Tables(prompts={"rows": source | {"hold_out": 0}}, held_out={"rows": held}).load()
    assert data.prompts == [f"p{i}" for i in kept]


def test_the_filter_of_tldr_counts_tokens(tmp_path: Path, tiny_base) -> None:
    """24 to 48 tokens, both included (Stiennon et al. 2020); words without a tokenizer."""
    lengths = [23, 24, 36, 48, 49]
    rows = [{"prompt": f"p{n}", "completion": " ".join(["qx"] * n)} for n in lengths]
    file = write(tmp_path / "posts.jsonl", [*rows, {"prompt": "last", "completion": "a"}])
    source = {"path": str(file), "completion_length": [24, 48]}
    data = reader(file, demonstrations={"posts": source}).load()
    assert [len(d.completion.split()) for d in data.demonstrations] == [24, 36, 48]

    tokenizer = load_tokenizer(tiny_base())
    counts = {row["prompt"]: len(tokenizer(row["completion"])["input_ids"]) for row in rows}
    most = counts["p36"]
    source = {"path": str(file), "completion_length": [None, most]}
    data = reader(file, demonstrations={"p": source}, tokenizer=str(tiny_base())).load()
    assert [d.prompt for d in data.demonstrations] == ["p23", "p24", "p36"]
    assert most != 36


# ---- local files and the hub


def test_identity_follows_files_and_revision(tmp_path: Path) -> None:
    data = preset("tldr", tmp_path)
    before = data.identity()
    assert before.keys() == {source.key for _, source in data.sources()}
    assert len(before["data.preferences.comparisons"]) == 1
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n")
    after = data.identity()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"data.prompts.posts", "data.demonstrations.posts"}
    assert tables("hh_rlhf", "data.prompts.conversations.revision=abc").identity()[
        "data.prompts.conversations"
    ] == {
        "path": "Anthropic/hh-rlhf",
        "config": None,
        "split": "train",
        "files": "*/train.jsonl.gz",
        "revision": "abc",
    }


def test_hub_gives_what_the_files_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through datasets where configuration and split name the rows, else through the files."""
    asked = []

    def load_dataset(path: str, config: Any, split: str, revision: Any, streaming: bool) -> Any:
        asked.append((path, config, split, revision, streaming))
        (file,) = tmp_path.glob(f"{split}*")
        return datasets.Dataset.from_list(read_rows(file))

    def snapshot_download(path: str, **settings: Any) -> str:
        asked.append((path, *settings.values()))
        return str(tmp_path)

    here = preset("tldr", tmp_path).load()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert tables("tldr", *PRESETS["tldr"][1]).load() == here
    posts = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
    compared = "openai/summarize_from_feedback"
    files = [[f"comparisons/{s}/*.parquet", ".gitattributes"] for s in ("validation", "train")]
    assert asked == [
        (posts, None, "validation", None, False),
        (compared, "dataset", "refs/convert/parquet", files[0]),
        (posts, None, "train", None, False),
        (compared, "dataset", "refs/convert/parquet", files[1]),
    ]


def test_hub_out_of_reach_is_told_within_seconds() -> None:
    for name, hub in (("hh_rlhf", "Anthropic/hh-rlhf"), ("imdb", "stanfordnlp/imdb")):
        started = time.monotonic()
        with pytest.raises(FileNotFoundError, match=rf"{hub} is neither a local .*data\.path"):
            tables(name).load()
        assert time.monotonic() - started < 10


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no alpaca_instructions/val\.json: put"):
        tables("alpaca_farm", f"data.path={tmp_path}").identity()
    with pytest.raises(FileNotFoundError, match=r"there is no data at nowhere: give a hub id"):
        tables("imdb", "data.path=nowhere").identity()


# ---- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompts.posts.fraction=1.5", r"prompts\.posts\.fraction=1\.5 must be above 0"),
        ("data.prompts.posts.size=0", r"prompts\.posts\.size=0 must be at least 1"),
        ("data.prompts.posts.size=many", r"data\.prompts\.posts\.size: .*'many'"),
        ("data.prompts.posts.weight=-1", r"weight=-1.* must be positive"),
        ("data.prompts.posts.hold_out=-1", r"hold_out=-1 must not be negative"),
        ("data.prompts.posts.prompt_length=[9,2]", r"prompt_length=\[9, 2\] must be \[least, most"),
        ("data.prompts.posts.prompt_length=[a,9]", r"prompt_length=\['a', 9\] must be \[least"),
        ("data.prompts.posts.prompt_length=[9]", r"prompt_length=\[9\] must be \[least, most"),
        ("data.prompts.posts.schema=colums", r"posts\.schema=colums .* did you mean columns"),
        ("data.prompts.posts.where={id: {blow: 3}}", r"where=blow .* did you mean below"),
        ("data.preferences.comparisons.choices=[1]", r"choices=\[1\] must be the marks of two"),
        ("data.demonstrations.posts.hold_out=5", r"demonstrations\.posts\.hold_out=5 has no role"),
        (
            "+data.prompts.posts.sise=5",
            r"posts\.sise is not a setting of a source; did you mean size",
        ),
        ("+data.prompts.more={split: train}", r"data\.prompts\.more\.path must be given"),
        ("+data.prompts.more={path: a/b, weight: 2}", r"data\.prompts: give a weight to every"),
        ("~data.held_out.posts", r"no held-out prompts: give data\.held_out"),
        ("~data.prompts.posts", r"data\.prompts has no source"),
    ],
)
def test_impossible_settings(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables("tldr", override)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.5, "size": 3}, r"x\.fraction=0\.5 and .*x\.size=3 exclude each other"),
        ({"files": "*.json", "streaming": True}, r"files=\*\.json and .*streaming=True exclude"),
        ({"files": "*.json", "config": "a"}, r"files=\*\.json and .*config=a exclude"),
        ({"answers": 3}, r"x\.answers=3 is for data\.prompts\.x\.schema=scored, not columns"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source.of({"path": "a/b"} | settings, "data.prompts.x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.format=plian", r"data\.format=plian .* did you mean plain"),
        ("data.format=chat", r"data\.format=chat needs a tokenizer with a chat template"),
        ("data.prompts.posts.format='{a'", r"prompts\.posts\.format=.* is no prompt format"),
        ("data.prompts.posts.format='{} or'", r"must name a column in braces"),
        ("data.prompts.posts.schema=text", r"data\.format has no place for what .*schema=text"),
    ],
)
def test_impossible_formats_are_refused_before_rows_are_read(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables("tldr", override).load()


@pytest.mark.slow
def test_a_preset_goes_through_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Demonstrations, pairs and prompts of HH-RLHF from files: sft, reward model, PPO."""
    hh_rlhf(tmp_path)
    code = inside(
        tmp_path / "run",
        f"artifacts={tmp_path / 'artifacts'}",
        "experiment=debug",
        "data=hh_rlhf",
        f"data.path={tmp_path}",
        "labeller=dataset",
        "reward=pairwise",
        "reward.epochs=1",
        "policy.max_new_tokens=8",
    )
    assert code == 0, capsys.readouterr().err
    pairs = next((tmp_path / "artifacts" / "preferences").glob("pairs-*"))
    assert len((pairs / "train.jsonl").read_text().splitlines()) == 8
    assert len((pairs / "evaluation.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["prompts"] == 4
