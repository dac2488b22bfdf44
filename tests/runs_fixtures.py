"""Fixtures on top of runs.py; a module asks for them with `pytest_plugins = ["runs_fixtures"]`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import DebugRun, command_line, inside, nothing_half_written, the_error

from rlhf_exp.artifacts import verify


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> DebugRun:
    folder = tmp_path_factory.mktemp("debug")
    directory, artifacts = folder / "run", folder / "artifacts"
    process = command_line(
        "experiment=debug", f"artifacts={artifacts}", f"hydra.run.dir={directory}", cwd=folder
    )
    assert process.returncode == 0, process.stderr
    return DebugRun(directory, artifacts, process)


@pytest.fixture(scope="session")
def artifacts(debug_run: DebugRun) -> Path:
    """The artifact store of the debug run, warm."""
    return debug_run.artifacts


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Does a run in this process, in `tmp_path`, and gives the one sentence it ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def attempt(*overrides: object) -> str:
        capsys.readouterr()
        code = inside(tmp_path / "run", "artifacts=artifacts", *overrides)
        sentence = the_error(capsys.readouterr().err)
        assert code == 1
        nothing_half_written(tmp_path / "run")
        for kind in ("base", "sft", "preferences", "reward"):
            for made in (tmp_path / "artifacts" / kind).glob("[!.]*"):
                verify(made)
        return sentence

    return attempt
