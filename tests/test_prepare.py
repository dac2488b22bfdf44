"""The stage prepare: files that data=local reads again, the manifest, and the way to the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import inside, rows

from rlhf_exp.artifacts import file_hash, verify
from rlhf_exp.config import conf_directory
from rlhf_exp.data.facts import Facts
from rlhf_exp.data.local import Local
from rlhf_exp.data.prepare import Prepare
from rlhf_exp.data.reviews import Reviews
from rlhf_exp.data.rows import Dataset, Demonstration, Pair, Statement

pytest_plugins = ["runs_fixtures"]

SPEC = {"config": {"seed": 3, "_target_": "x"}, "files": {}}
SMALL = Dataset(
    prompts=["a", "b\u2028\nc"],
    held_out=["d"],
    demonstrations=[Demonstration("a", " one")],
    pairs=[Pair("a", " good", " bad"), Pair("b", " g", " b")],
    held_out_pairs=[Pair("d", " ü", " 漢")],
    dropped={"prompts": {"held out": 2}},
)


def local(folder: Path, **more: Any) -> Local:
    """The command of the manifest, as an object."""
    words = json.loads((folder / "manifest.json").read_text())["read"].split(" data.")[1:]
    given: dict[str, Any] = dict(word.split("=") for word in words)
    files = {k: str(folder / v) for k, v in given.items() if (folder / v).exists()}
    return Local(**given | files | more)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "data",
    [
        SMALL,
        Reviews(demonstrations=40, prompts=30, held_out=10).load(),
        Facts(
            demonstrations=40, prompts=30, held_out=10, statements=20, held_out_statements=8
        ).load(),
    ],
    ids=["all roles", "reviews", "facts"],
)
def test_what_is_prepared_reads_the_same(data: Dataset, form: str, tmp_path: Path) -> None:
    Prepare(format=form).write(data, SPEC, tmp_path)
    again = local(tmp_path / "data").load()
    assert len(again.demonstrations) == len(data.demonstrations) > 0
    asked = {p: a for p, a in data.answers.items() if p in {*data.prompts, *data.held_out}}
    assert again == Dataset(**vars(data) | {"answers": asked, "dropped": {}})
    assert bool(list(tmp_path.glob("data/*preferences*"))) == bool(data.pairs)


def test_the_manifest_tells_counts_hashes_seed_and_drops(tmp_path: Path) -> None:
    Prepare(folder=str(tmp_path / "out")).write(SMALL, SPEC, tmp_path)
    folder = tmp_path / "out"
    verify(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {role: about["rows"] for role, about in manifest["files"].items()} == {
        "prompts": 2,
        "held_out": 1,
        "demonstrations": 1,
        "preferences": 2,
        "held_out_preferences": 1,
    }
    for about in manifest["files"].values():
        assert about["sha256"] == file_hash(folder / about["file"])
    assert (manifest["seed"], manifest["data"]) == (3, SPEC)
    assert manifest["dropped"] == {"prompts": {"held out": 2}}
    assert rows(folder / "preferences.jsonl")[0] == {
        "prompt": "a",
        "chosen": " good",
        "rejected": " bad",
    }
    assert (
        "- config_name: held_out\n  data_files: held_out.jsonl\n"
        in (folder / "README.md").read_text()
    )


def test_the_same_data_is_left_as_it_is_and_other_data_refused(tmp_path: Path) -> None:
    prepare = Prepare(folder=str(tmp_path / "out"))
    prepare.write(SMALL, SPEC, tmp_path)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    prepare.write(SMALL, SPEC, tmp_path)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"out exists and holds something else: choose another"):
        prepare.write(SMALL, SPEC | {"files": {"x": "y"}}, tmp_path)
    (tmp_path / "out" / "prompts.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"out is damaged \(prompts\.jsonl"):
        prepare.write(SMALL, SPEC, tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists and holds something else"):
        Prepare(folder=str(tmp_path / "mine")).write(SMALL, SPEC, tmp_path)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    odd = Dataset(prompts=["a"], held_out=["b"], statements=[Statement({"x": {1, 2}}, 0)])
    with pytest.raises(TypeError):
        Prepare(folder=str(tmp_path / "out")).write(odd, SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the hub


TOLD: list[Any] = []


class Hub:
    """Notes what is asked of it."""

    def __init__(self, **settings: Any) -> None:
        TOLD.append(settings)

    def create_repo(self, *names: str, **settings: Any) -> None:
        TOLD.append(names[0])
        TOLD.append(settings)

    def upload_folder(self, *, folder_path: Path, **settings: Any) -> None:
        if settings["repo_id"] == "me/broken":
            raise ConnectionError("no route to the hub\nand more")
        TOLD.append(sorted(p.name for p in folder_path.iterdir()))
        TOLD.append(settings)


def test_push_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TOLD.clear()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a-secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    data = Dataset(prompts=["a"], held_out=["b"])
    Prepare(push="me/mine", private=False).write(data, SPEC, tmp_path)
    files = ["README.md", "artifact.json", "held_out.jsonl", "manifest.json", "prompts.jsonl"]
    expected = [
        {"token": "a-secret"},
        "me/mine",
        {"repo_type": "dataset", "private": False, "exist_ok": True},
        files,
        {"repo_id": "me/mine", "repo_type": "dataset"},
    ]
    assert expected == TOLD
    assert not [f for f in (tmp_path / "data").iterdir() if b"a-secret" in f.read_bytes()]
    with pytest.raises(
        ValueError, match=r"prepare\.push=me/broken failed \(.*route to the hub\), b"
    ):
        Prepare(push="me/broken").write(data, SPEC, tmp_path)


def test_push_without_token_or_name_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"prepare\.push=me/mine needs a token .* set HF_TOKEN"):
        Prepare(push="me/mine").write(SMALL, SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"prepare\.push=mine must be owner/name"):
        Prepare(push="mine")
    with pytest.raises(ValueError, match=r"prepare\.format=csv .* choose one of jsonl, parquet"):
        Prepare(format="csv")


# ---- the stage


def test_every_setting_has_its_line_in_the_config() -> None:
    node = yaml.safe_load((conf_directory() / "config.yaml").read_text())["prepare"]
    assert {k: v for k, v in node.items() if k != "_target_"} == vars(Prepare())


def test_the_stage_and_the_run_that_reads_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`stages=[prepare]` needs no policy; an algorithm trains on what it wrote."""
    sizes = ["data.demonstrations=30", "data.prompts=24", "data.held_out=6"]
    store = f"artifacts={tmp_path / 'artifacts'}"
    assert inside(tmp_path / "prepare", "stages=[prepare]", "data=reviews", *sizes, store) == 0
    assert not (tmp_path / "artifacts").exists()
    folder = tmp_path / "prepare" / "data"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {role: about["rows"] for role, about in manifest["files"].items()} == {
        "prompts": 24,
        "held_out": 6,
        "demonstrations": 30,
    }
    assert manifest["data"]["config"]["prompts"] == 24
    words = [w.replace("=", f"={folder}/") for w in manifest["read"].split(" ")[4:]]
    run = ["experiment=debug", "data=local", *words, "reward=lexicon", "policy.sft=false"]
    code = inside(tmp_path / "run", *run, "algo.steps=1", "policy.max_new_tokens=6", store)
    assert code == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["prompts"] == 6
