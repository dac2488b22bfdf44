"""Full disks, damaged files, runs that cannot be resumed: one sentence, nothing half-written."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import DebugRun, command_line, contents, inside, logged, not_finished, says, the_error

from rlhf_exp.artifacts import verify, write_json
from rlhf_exp.worker import guarded, resume

pytest_plugins = ["runs_fixtures"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- disks


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The disk as it looks when it is full: no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_artifacts_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    says(refused("experiment=debug", "artifacts=file/artifacts"), "file/artifacts", "artifacts=")


def test_a_disk_that_is_full_when_weights_are_written(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    with no_file_beyond(300_000):
        sentence = refused("experiment=debug")
    says(sentence, str(tmp_path / "artifacts"), "artifacts=", "hydra.run.dir=")
    assert not list((tmp_path / "artifacts" / "base").glob("[!.]*"))


def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_file_beyond(2_000_000):  # larger than the weights, smaller than weights and optimizer
        code = inside(tmp_path / "run", "experiment=debug", f"artifacts={artifacts}")
    assert code == 1
    says(
        the_error(capsys.readouterr().err), str(tmp_path / "run" / "checkpoints"), "hydra.run.dir="
    )
    left = contents(tmp_path / "run")
    assert not [name for name in left if ".tmp-" in name or "step-000002/" in name], left
    assert "policy" not in left


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (OSError(28, "No space left on device"), ["disk is full", "artifacts=", "hydra.run.dir="]),
        (OSError(28, "No space left", "/data/x"), ["/data/x", "disk is full", "hydra.run.dir="]),
        (PermissionError(13, "denied", "/data/x"), ["/data/x", "no permission", "hydra.run.dir="]),
        (OSError(30, "Read-only", "/data/x"), ["/data/x", "read-only", "hydra.run.dir="]),
    ],
)
def test_what_the_operating_system_says(
    error: OSError, fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert guarded(fail) == 1
    says(the_error(capsys.readouterr().err), *fragments)


# ---- damage and resumption


def test_a_damaged_artifact(
    refused: Callable[..., str], debug_run: DebugRun, tmp_path: Path
) -> None:
    shutil.copytree(debug_run.artifacts, tmp_path / "copied")
    used = json.loads((debug_run.directory / "run.json").read_text())["artifacts"]
    [name] = [Path(path).name for path in used if Path(path).parent.name == "sft"]
    folder = tmp_path / "copied" / "sft" / name
    flip_a_byte(folder / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        verify(folder)
    asked = ["experiment=debug", f"artifacts={tmp_path / 'copied'}"]
    says(refused(*asked), str(folder), "model.safetensors", "damaged", "delete it")


@pytest.fixture
def interrupted(debug_run: DebugRun, tmp_path: Path) -> Path:
    """A copy of the debug run as it was before its last stages."""
    directory = tmp_path / "interrupted"
    shutil.copytree(debug_run.directory, directory)
    shutil.rmtree(directory / "policy")
    shutil.rmtree(directory / "figures")
    (directory / "summary.json").unlink()
    not_finished(directory)
    return directory


def not_resumed(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = contents(directory) - {"run.log"}
    assert logged(lambda: resume(directory)) == 1
    assert contents(directory) - {"run.log", "failed.json"} == before
    return the_error(capsys.readouterr().err)


def test_resuming_the_copy_works(interrupted: Path, debug_run: DebugRun) -> None:
    """Otherwise the refusals below would say nothing."""
    assert logged(lambda: resume(interrupted)) == 0
    ours, theirs = (d / "summary.json" for d in (interrupted, debug_run.directory))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_a_damaged_checkpoint(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((interrupted / "checkpoints").glob("step-*"))
    flip_a_byte(newest / "state.pt")
    says(not_resumed(interrupted, capsys), str(newest), "state.pt", "damaged", "delete it")


def test_resuming_a_finished_run(debug_run: DebugRun, tmp_path: Path) -> None:
    done = command_line(f"resume={debug_run.directory}", cwd=tmp_path)
    assert done.returncode == 1
    says(the_error(done.stderr), str(debug_run.directory), "finished", "summary.json")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["no run.json", "not a run directory"]),
        ('{"config": {', ["run.json is damaged"]),
        ("[1, 2]", ["run.json is damaged"]),
        ('{"name": "another tool"}', ["run.json is damaged"]),
        ('{"config": {"seed": 0}, "fingerprint": "abc"}', ["run.json", "comes from elsewhere"]),
    ],
)
def test_resuming_a_foreign_directory(
    content: str | None, fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    if content is not None:
        (tmp_path / "theirs" / "run.json").write_text(content)
    says(not_resumed(tmp_path / "theirs", capsys), f"resume={tmp_path / 'theirs'}", *fragments)


def test_resuming_a_run_whose_settings_were_edited(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((interrupted / "run.json").read_text())
    about["config"]["algo"]["kl_coef"] = 0.5
    write_json(interrupted / "run.json", about)
    says(not_resumed(interrupted, capsys), "run.json was edited", str(interrupted))
