"""Pools of completions: the same rows whatever the shards and interruptions, merged only when
whole, read back with errors that name the line.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from filelock import FileLock
from runs import inside, rows, says, the_error
from torch import Tensor

from rlhf_exp.artifacts import file_hash
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset
from rlhf_exp.generated import Generated, read_generations
from rlhf_exp.generations import Generations, PoolFile, manifest_of
from rlhf_exp.policy import Policy

pytest_plugins = ["runs_fixtures"]

PROMPTS = [f"The film {i} is" for i in range(10)]
DATA = Dataset(prompts=PROMPTS, held_out=["Held out:"])


class Half:
    """A reward with members and a facet."""

    def member_scores(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        length = torch.tensor([float(len(c)) for c in completions])
        return {"one": length, "two": -length}

    def combine(self, members: dict[str, Tensor]) -> Tensor:
        return members["one"] / 2

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        return {"valid": torch.ones(len(prompts))}

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return self.combine(self.member_scores(prompts, completions))


def vowels(prompts: list[str], completions: list[str]) -> Tensor:
    return torch.tensor([float(sum(c.count(v) for v in "aeiou")) for c in completions])


@pytest.fixture(scope="module")
def policy(tiny_base: Callable[..., Path]) -> Policy:
    found = tiny_policy(sample_batch=9)  # three prompts of three completions each
    found.load(tiny_base())
    return found


def generate(folder: Path, policy: Policy, **settings: Any) -> Path:
    """Draw a shard into `folder`; returns its file."""
    chosen = Generations(**({"folder": str(folder), "samples": 3, "seed": 5} | settings))
    chosen.generate(policy, DATA, Half(), vowels, {"policy": "tiny"}, folder)
    i, n = chosen.shard.split("/")
    return folder / f"{chosen.split}_output_{i}_of_{n}.jsonl"


def merged(folder: Path, **settings: Any) -> Path:
    Generations(**({"folder": str(folder)} | settings)).merge(folder)
    return folder / f"{settings.get('split', 'train')}_output.jsonl"


@pytest.fixture(scope="module")
def whole(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("whole"), policy)


# ---- drawing


def test_rows_say_what_was_drawn_and_scored(whole: Path) -> None:
    found = rows(whole)
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["index"] for row in found] == list(range(10))
    assert len({text for row in found for text in row["generations"]}) > 25
    for row in found:
        lengths = [float(len(text)) for text in row["generations"]]
        assert row["members"] == {"one": lengths, "two": [-x for x in lengths]}
        assert row["rewards"] == [x / 2 for x in lengths]
        assert row["gold_scores"] == vowels([], row["generations"]).tolist()
        assert row["facets"] == {"valid": [1, 1, 1]}
        assert all(0 < n <= 12 for n in row["lengths"])
        assert all(ended or n == 12 for ended, n in zip(row["ended"], row["lengths"], strict=True))
    manifest = json.loads(manifest_of(whole).read_text())
    assert manifest["rows"] == 10
    assert manifest["sha256"] == file_hash(whole)
    assert manifest["shard"] == "0/1"


@pytest.mark.parametrize("total", [3, 4, 11])
def test_shards_merge_to_the_rows_of_one(
    total: int, whole: Path, policy: Policy, tmp_path: Path
) -> None:
    """Blocks hold three prompts and shards 4, 3 or 1: they cut blocks."""
    for i in reversed(range(total)):
        generate(tmp_path, policy, shard=f"{i}/{total}")
    sizes = [len(rows(tmp_path / f"train_output_{i}_of_{total}.jsonl")) for i in range(total)]
    assert sizes == {3: [4, 4, 2], 4: [3, 3, 3, 1], 11: [1] * 10 + [0]}[total]
    assert merged(tmp_path).read_bytes() == whole.read_bytes()
    manifest = json.loads((tmp_path / "train_output.manifest.json").read_text())
    assert (manifest["rows"], len(manifest["shards"])) == (10, total)
    assert manifest["sha256"] == file_hash(whole)


def test_the_seed_decides_the_rows_and_drawing_leaves_the_generator_alone(
    whole: Path, policy: Policy, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    again = generate(tmp_path / "again", policy)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.read_bytes() == whole.read_bytes()
    other = generate(tmp_path / "other", policy, seed=6)
    assert rows(other)[0]["generations"] != rows(whole)[0]["generations"]


def test_repeated_prompts_are_kept_each_with_its_own_completions(
    policy: Policy, tmp_path: Path
) -> None:
    found = rows(generate(tmp_path, policy, prompts=30, scored=False))
    assert [row["index"] for row in found] == list(range(30))
    prompts = [row["prompt"] for row in found]
    assert len(set(prompts)) < 30
    assert set(prompts) <= set(PROMPTS)
    assert len({tuple(row["generations"]) for row in found}) == 30
    assert found[0].keys() == {"index", "prompt", "generations", "lengths", "ended"}


def test_more_samples_than_a_batch_holds(policy: Policy, tmp_path: Path) -> None:
    found = rows(generate(tmp_path, policy, split="held_out", samples=20))
    assert [len(row["generations"]) for row in found] == [20]
    assert found[0]["prompt"] == "Held out:"


@pytest.mark.parametrize(("kept", "rest"), [(0, 10), (1, 0), (4, 25), (9, 3)])
def test_resumed_after_a_kill(
    kept: int, rest: int, whole: Path, policy: Policy, tmp_path: Path
) -> None:
    """`kept` rows and `rest` bytes of the next are on the disk, and the manifest is not sealed."""
    lines = whole.read_bytes().splitlines(keepends=True)
    path = tmp_path / whole.name
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:rest])
    begun = json.loads(manifest_of(whole).read_text())
    unsealed = {k: v for k, v in begun.items() if k not in ("sha256", "rows")}
    manifest_of(path).write_text(json.dumps(unsealed))
    generate(tmp_path, policy)
    assert path.read_bytes() == whole.read_bytes()
    assert manifest_of(path).read_bytes() == manifest_of(whole).read_bytes()


def test_a_finished_shard_is_left_alone(
    policy: Policy, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "sample", lambda *_: pytest.fail("drawn again"))
    before = whole.read_bytes()
    assert generate(whole.parent, policy) == whole
    assert whole.read_bytes() == before


def test_another_draw_does_not_continue_the_file(
    whole: Path, policy: Policy, tmp_path: Path
) -> None:
    for file in (whole, manifest_of(whole)):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r"drawn with other settings than this run \(seed differ"):
        generate(tmp_path, policy, seed=1)
    with pytest.raises(ValueError, match=r"\(samples differ\): .* generations\.folder"):
        generate(tmp_path, policy, samples=2)
    manifest_of(tmp_path / whole.name).unlink()
    with pytest.raises(ValueError, match=r"has no readable manifest .*\.manifest\.json"):
        generate(tmp_path, policy)
    assert (tmp_path / whole.name).read_bytes() == whole.read_bytes()


def test_two_processes_do_not_write_one_shard(policy: Policy, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".train_output_0_of_1.jsonl.lock"),
        pytest.raises(ValueError, match=r"written by another process: .* generations\.shard"),
    ):
        generate(tmp_path, policy)
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "4/4"}, r"generations\.shard=4/4 must be <i>/<n>"),
        ({"shard": "half"}, r"generations\.shard=half .* such as 0/4"),
        ({"split": "test"}, r"generations\.split=test .* train, held_out"),
        ({"samples": 0}, r"generations\.samples=0"),
        ({"prompts": 0}, r"generations\.prompts=0"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generations(**settings)


# ---- merging


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> list[Path]:
    """The pool in three shards, made of `whole` by hand."""
    lines = rows(whole)
    spec = json.loads(manifest_of(whole).read_text())["spec"]
    made = []
    for i, part in enumerate((lines[:4], lines[4:8], lines[8:])):
        pool = PoolFile(tmp_path / f"train_output_{i}_of_3.jsonl", spec, shard=f"{i}/3")
        pool.append([Generated(**row) for row in part])
        pool.finish()
        made.append(pool.path)
    return made


def _missing(shards: list[Path]) -> None:
    shards[1].unlink()


def _changed(shards: list[Path]) -> None:
    text = shards[1].read_text()
    shards[1].write_text(text.replace("film 5", "film 6"))


def _unfinished(shards: list[Path]) -> None:
    note = json.loads(manifest_of(shards[1]).read_text())
    manifest_of(shards[1]).write_text(json.dumps({k: note[k] for k in ("fingerprint", "spec")}))


def _twice(shards: list[Path]) -> None:
    shutil.copy(shards[0], shards[1])
    shutil.copy(manifest_of(shards[0]), manifest_of(shards[1]))


def _no_manifest(shards: list[Path]) -> None:
    manifest_of(shards[1]).unlink()


def _of_other_n(shards: list[Path]) -> None:
    for file in (shards[1], manifest_of(shards[1])):
        shutil.copy(file, file.with_name(file.name.replace("1_of_3", "1_of_4")))


def _of_another_draw(shards: list[Path]) -> None:
    found = [Generated(**row) for row in rows(shards[1])]
    spec = json.loads(manifest_of(shards[1]).read_text())["spec"] | {"seed": 7}
    shards[1].unlink()
    pool = PoolFile(shards[1], spec, shard="1/3")
    pool.append(found)
    pool.finish()


def _rows_lost(shards: list[Path], i: int = 1) -> None:
    """A shard without its last rows, sealed all the same."""
    found, spec = rows(shards[i]), json.loads(manifest_of(shards[i]).read_text())["spec"]
    shards[i].unlink()
    pool = PoolFile(shards[i], spec, shard=f"{i}/3")
    pool.append([Generated(**row) for row in found[:1]])
    pool.finish()


def _last_rows_lost(shards: list[Path]) -> None:
    _rows_lost(shards, 2)


def _gone(shards: list[Path]) -> None:
    for path in shards:
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "fragments"),
    [
        (_missing, ["train_output_1_of_3.jsonl is missing", "generations.shard=1/3"]),
        (_changed, ["train_output_1_of_3.jsonl was changed", "SHA-256"]),
        (_unfinished, ["train_output_1_of_3.jsonl is unfinished", "generations.shard=1/3"]),
        (_twice, ["train_output_1_of_3.jsonl holds shard 0/3", "twice"]),
        (_no_manifest, ["train_output_1_of_3.jsonl has no readable manifest"]),
        (_of_other_n, ["one of 3 shards", "train_output_1_of_4.jsonl one of 4"]),
        (
            _of_another_draw,
            ["train_output_1_of_3.jsonl", "train_output_0_of_3.jsonl", "seed differ"],
        ),
        (_rows_lost, ["train_output_2_of_3.jsonl, line 1", "row of prompt 5"]),
        (_last_rows_lost, ["train_output_2_of_3.jsonl ends with row 9 of 10"]),
        (_gone, ["holds no train_output_<i>_of_<n>.jsonl", "stages=[generate]"]),
    ],
)
def test_shards_that_do_not_make_a_whole(
    harm: Callable[[list[Path]], None], fragments: list[str], shards: list[Path], tmp_path: Path
) -> None:
    harm(shards)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        merged(tmp_path)
    says(str(refused.value), *fragments)
    left = {p.name for p in tmp_path.iterdir()}
    assert not [name for name in left if name.removeprefix(".").startswith("train_output.")]


def test_unharmed_shards_merge(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    assert len(shards) == 3
    assert merged(tmp_path).read_bytes() == whole.read_bytes()


# ---- reading

OURS = {"prompt": "p", "generations": ["a", ""], "rewards": [1, 2.5]}


@pytest.mark.parametrize(
    "row",
    [
        OURS,
        {"instruction": "p", "input": "", "answers": ["a", ""], "proxy_scores": [1, 2.5]},
        OURS | {"feedbacks": ["Good.", None], "scores": [3.0, None], "perplexity": [1, 2]},
    ],
    ids=["ALT", "llm_optimization", "ALT with feedback"],
)
def test_files_of_the_references_are_read(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row, row])
    (tmp_path / "lines.json").write_text(path.read_text())
    (tmp_path / "list.json").write_text(json.dumps([row, row]))
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist([row, row]), tmp_path / "table.parquet")
    for name in ("rows.jsonl", "lines.json", "list.json", "table.parquet"):
        found = read_generations(tmp_path / name)
        assert [r.index for r in found] == [0, 1]
        assert (found[1].prompt, found[1].generations) == ("p", ["a", ""])
        assert found[1].rewards == [1, 2.5]
        assert found[1].feedbacks == row.get("feedbacks")
        assert found[1].scores == row.get("scores")
        assert found[1].members is None


def test_a_written_row_is_read_back(whole: Path) -> None:
    assert [json.loads(row.line()) for row in read_generations(whole)] == rows(whole)


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"rewards": [1]}, ["'rewards'", "each of 2 generations", "1 entries"]),
        ({"rewards": [1, None]}, ["'rewards'", "None", "generation 1", "score it again"]),
        ({"rewards": [math.nan, 1]}, ["'rewards'", "nan", "generation 0"]),
        ({"gold_scores": [1, math.inf]}, ["'gold_scores'", "inf"]),
        ({"gold_scores": [1, True]}, ["'gold_scores'", "True"]),
        ({"rewards": 3}, ["'rewards'", "not 3"]),
        ({"members": {"m": [1]}}, ["members 'm'", "1 entries"]),
        ({"feedbacks": ["x"]}, ["'feedbacks'", "1 entries"]),
        ({"generations": "a"}, ["'generations'", "list of texts"]),
        ({"generations": ["a", None]}, ["'generations'", "list of texts"]),
        ({"generations": []}, ["'generations'", "list of texts"]),
        ({"prompt": " "}, ["'prompt'", "not empty"]),
        ({"prompt": 3}, ["'prompt'", "must be text"]),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used(
    row: dict[str, Any], fragments: list[str], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [OURS, OURS | row])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: ") as refused:
        read_generations(tmp_path / "rows.jsonl")
    says(str(refused.value), *fragments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.jsonl is empty"),
        (b'{"prompt": "p"', r"rows\.jsonl, line 1: not valid JSON"),
        (b"3\n", r"rows\.jsonl, line 1: expected an object"),
        (b"\xff\n", r"rows\.jsonl is not UTF-8"),
        (b'{"generations": ["a"]}', r"line 1: no column 'prompt'"),
    ],
)
def test_files_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_generations(tmp_path / "rows.jsonl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file at .*rows\.jsonl"):
        read_generations(tmp_path / "rows.jsonl")


# ---- the stages

# The artifacts of experiment=debug.
SMALL = ["reward=ensemble_small", "sft.epochs=0.32", "sft.batch=32", "sft.micro_batch=32"]
SMALL += ["preferences.pairs=64", "preferences.evaluation_pairs=16"]


def test_two_runs_draw_a_pool_and_the_second_merges_it(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*SMALL, f"artifacts={artifacts}", f"generations.folder={tmp_path / 'pool'}"]
    asked += ["generations.prompts=9", "generations.samples=2", "stages=[generate,merge]"]
    one, two = "generations.shard=0/2", "generations.shard=1/2"
    assert inside(tmp_path / "0", *asked, "stages=[generate]", one) == 0
    assert inside(tmp_path / "1", *asked, two) == 0
    found = read_generations(tmp_path / "pool" / "train_output.jsonl")
    assert [row.index for row in found] == list(range(9))
    assert all(row.members and row.members.keys() == {"member_0", "member_1"} for row in found)
    capsys.readouterr()
    assert inside(tmp_path / "2", *asked, two, "reward.uwo_weight=0.1") == 1
    says(the_error(capsys.readouterr().err), "train_output_1_of_2.jsonl", "reward differ")
