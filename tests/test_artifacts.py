"""The store: complete or absent, made once, found again, and never trusted when damaged."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.artifacts import (
    MANIFEST,
    Store,
    file_hash,
    fingerprint,
    verify,
    write_directory,
    write_json,
)

ROOT = Path(__file__).parents[1]


def make_two_files(folder: Path) -> None:
    """What a stage would do: a file, and one in a folder below."""
    (folder / "weights.bin").write_bytes(b"\x00\x01" * 100)
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("hello\n")


def refuse(folder: Path) -> None:
    """A stage that must not run."""
    raise AssertionError("made again, though it was there")


def visible(folder: Path) -> list[str]:
    """Everything under `folder`."""
    return sorted(p.name for p in folder.rglob("*"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "artifacts")


@pytest.fixture
def artifact(store: Store) -> Path:
    """A finished artifact."""
    return store.get("kind", "name", {"lr": 0.1}, make_two_files)


# ------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_stable_and_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint({}) == "44136fa355b3"  # first digits of the SHA-256 of "{}"


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": None}, {"a": [1]}, {"a": True}], ids=str
)
def test_fingerprint_tells_specs_apart(other: dict) -> None:
    assert fingerprint({"a": 1}) != fingerprint(other)


# ------------------------------------------------------------------------------ making and reusing


def test_made_artifact_lies_at_kind_name_fingerprint(store: Store, artifact: Path) -> None:
    assert artifact == store.root / "kind" / f"name-{fingerprint({'lr': 0.1})}"
    manifest = verify(artifact)
    assert manifest["spec"] == {"lr": 0.1}
    assert manifest["files"] == {
        "weights.bin": file_hash(artifact / "weights.bin"),
        "sub/notes.txt": file_hash(artifact / "sub" / "notes.txt"),
    }
    assert visible(artifact) == [MANIFEST, "notes.txt", "sub", "weights.bin"]


def test_second_run_reuses_what_the_first_made(store: Store, artifact: Path) -> None:
    second = Store(store.root)
    assert second.get("kind", "name", {"lr": 0.1}, refuse) == artifact
    assert store.used == {str(artifact): "made"}
    assert second.used == {str(artifact): "reused"}


def test_another_spec_is_another_directory(store: Store, artifact: Path) -> None:
    other = store.get("kind", "name", {"lr": 0.2}, lambda f: (f / "a").write_text("b"))
    assert other != artifact
    assert visible(other) == ["a", MANIFEST]
    verify(artifact)


# ------------------------------------------------------------------------------ complete or absent


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_failed_stage_leaves_nothing_and_can_be_tried_again(store: Store, error) -> None:
    def make(folder: Path) -> None:
        make_two_files(folder)
        raise error

    with pytest.raises(type(error)):
        store.get("kind", "name", {}, make)
    assert visible(store.root) == ["kind"]
    assert store.used == {}
    verify(store.get("kind", "name", {}, make_two_files))


def test_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            store.get("kind", "name", {}, make_two_files)
    assert caught.value.errno == errno.ENOSPC
    assert visible(store.root) == ["kind"]
    verify(store.get("kind", "name", {}, make_two_files))


def test_full_disk_keeps_the_old_json_and_no_half_written_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "run.json", {"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "run.json", {"step": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"step": 1}
    assert visible(tmp_path) == ["run.json"]


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "name-1"
    stale = tmp_path / ".name-1.tmp-999999"
    other = tmp_path / ".name-2.tmp-999999"
    for folder in (stale, other):
        folder.mkdir()
        (folder / "half").write_text("ha")
    write_directory(path, make_two_files, {})
    assert not stale.exists()
    assert other.exists(), "only the artifact's own leftovers may go: others may be in the making"
    verify(path)


def test_what_somebody_elsewhere_is_writing_stays(tmp_path: Path) -> None:
    theirs, dead = tmp_path / ".name-1.tmp-aa", tmp_path / ".name-1.tmp-bb"
    for folder in (theirs, dead):
        folder.mkdir()
        folder.with_name(f"{folder.name}.lease").write_text(
            "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=00\nduration=120.0\n"
        )
    os.utime(tmp_path / ".name-1.tmp-bb.lease", (0, 0))  # stood still for long
    write_directory(tmp_path / "name-1", make_two_files, {})
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"name-1", theirs.name, f"{theirs.name}.lease"}


def test_a_finished_directory_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "name-1"

    def make(folder: Path) -> None:
        write_directory(path, lambda f: (f / "first").write_text("theirs"), {"by": "them"})
        make_two_files(folder)

    write_directory(path, make, {"by": "us"})
    assert verify(path)["by"] == "them"
    assert visible(tmp_path) == [MANIFEST, "first", "name-1"]


def test_a_half_written_directory_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    (tmp_path / "name-1").mkdir()
    (tmp_path / "name-1" / "half").write_text("ha")
    with pytest.raises(OSError, match="not empty"):
        write_directory(tmp_path / "name-1", make_two_files, {})
    assert visible(tmp_path) == ["half", "name-1"]


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["weights.bin", "sub/notes.txt"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_damaged_file_is_named(store: Store, artifact: Path, name: str, damage: str) -> None:
    file = artifact / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + b"!" if damage == "altered" else content[:-1])
    with pytest.raises(ValueError, match=rf"{artifact} is damaged \({name} .*delete it"):
        store.get("kind", "name", {"lr": 0.1}, refuse)


@pytest.mark.parametrize("manifest", [None, "", '{"files": {', "null", "{}", "\x00\x00"], ids=repr)
def test_unreadable_manifest_is_damage(store: Store, artifact: Path, manifest: str | None) -> None:
    if manifest is None:
        (artifact / MANIFEST).unlink()
    else:
        (artifact / MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match=rf"{artifact} is damaged .*{MANIFEST}.*delete it"):
        store.get("kind", "name", {"lr": 0.1}, refuse)


# ------------------------------------------------------------------------------------- two at once

MAKE_ONCE = """
import os, sys, time
from pathlib import Path
from rlhf_exp.artifacts import Store

here = Path(sys.argv[1])

def make(folder):
    with open(here / "log", "a") as log:
        log.write("made\\n")
    while len(list(here.glob("ready-*"))) < 2:  # the other one is at the door
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / "weights.bin").write_text("x" * 1000)

store = Store(here / "artifacts")
(here / f"ready-{os.getpid()}").touch()
store.get("kind", "name", {"lr": 0.1}, make)
print(*store.used.values())
"""


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE_ONCE, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted(worker.communicate(timeout=60)[0].strip() for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert said == ["made", "reused"]
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_a_killed_process_began_is_made_by_the_next(tmp_path: Path) -> None:
    script = MAKE_ONCE.replace("time.sleep(0.3)", "os.kill(os.getpid(), 9)").replace("< 2", "< 1")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, timeout=60)
    assert killed.returncode == -9
    kind = tmp_path / "artifacts" / "kind"
    assert len(list(kind.iterdir())) == 3  # a lease, half a directory and its lease
    started = time.monotonic()
    path = Store(tmp_path / "artifacts").get("kind", "name", {"lr": 0.1}, make_two_files)
    assert time.monotonic() - started < 5
    assert list(kind.iterdir()) == [path]
