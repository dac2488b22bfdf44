"""Runs for the end-to-end tests: the real command line in a subprocess, or the same run in this
process. Artifacts of one debug run are made once per session; what can starts from them.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from rlhf_exp import lease
from rlhf_exp.__main__ import run
from rlhf_exp.config import conf_directory
from rlhf_exp.worker import guarded

REPOSITORY = Path(__file__).parent.parent
PATIENCE = 240  # seconds after which a subprocess counts as hanging; one takes about ten
RESULTS = (
    "metrics.jsonl",
    "samples.jsonl",
    "evaluation",
    "checkpoints",
    "policy",
    "figures",
    "summary.json",
)


def environment(**extra: str) -> dict[str, str]:
    """What a subprocess sees: this repository first, one thread, no network."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true", "MPLBACKEND": "Agg"}
    threads = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    return os.environ | {"PYTHONPATH": path} | offline | threads | extra


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rlhf_exp", *map(str, arguments)]


def command_line(
    *arguments: object, cwd: Path, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """`python -m rlhf_exp <arguments>` in `cwd`, waited for."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def inside(directory: Path, *overrides: object) -> int:
    """Do the run that these overrides ask for, in this process; returns the exit code. Figures,
    which take longer than many a run, are drawn if asked for.
    """
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("config", overrides=["figures=false", *map(str, overrides)])
    directory.mkdir(parents=True, exist_ok=True)
    return logged(lambda: run(config, directory))


def logged(call: Any) -> int:
    """The exit code of `call`, with the logging it set up undone."""
    logger = logging.getLogger("rlhf_exp")
    before = logger.propagate, logger.level, list(logger.handlers)
    try:
        return guarded(call)
    finally:
        for handler in set(logger.handlers) - set(before[2]):
            handler.close()
        logger.propagate, logger.handlers = before[0], before[2]
        logger.setLevel(before[1])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second", "mfu/"))}
        for row in rows(path)
    ]


def weights(directory: Path) -> str:
    """Hash of the final weights, or of the adapter."""
    (file,) = (directory / "policy").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def same_outcome(directory: Path, expected: Path) -> None:
    """Bit for bit the same run, apart from what the clock decides."""
    assert timeless(directory / "metrics.jsonl") == timeless(expected / "metrics.jsonl")
    ours, theirs = (d / "samples.jsonl" for d in (directory, expected))
    assert ours.exists() == theirs.exists()  # not every algorithm samples while it trains
    assert not ours.exists() or rows(ours) == rows(theirs)
    assert weights(directory) == weights(expected)
    for file in (expected / "evaluation").iterdir():
        assert json.loads((directory / "evaluation" / file.name).read_text()) == json.loads(
            file.read_text()
        )
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (directory, expected))
    assert ours == theirs
    assert contents(directory / "checkpoints") == contents(expected / "checkpoints")


def contents(folder: Path) -> set[str]:
    """Every file and folder below, hidden ones and half-written ones included."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} if folder.exists() else set()


def the_error(stderr: str) -> str:
    """The one line that begins with "error: "; fails if there is none, several, or a traceback."""
    assert "Traceback" not in stderr, stderr
    found = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, stderr
    return found[0]


def nothing_half_written(directory: Path) -> None:
    """A run that was refused has no results, and nobody left a temporary directory beside it."""
    left = contents(directory)
    assert not left & set(RESULTS), left
    assert not [name for name in contents(directory.parent) if ".tmp-" in name]


def says(sentence: str, *fragments: str) -> None:
    """An error names the thing and the cure, and is no essay."""
    for fragment in fragments:
        assert fragment in sentence, f"{fragment!r} is not in: {sentence}"
    assert len(sentence) < 700, sentence


def worker_of(directory: Path) -> int:
    """The process id of the worker of a run that is being done."""
    holder = lease.read(directory / lease.RUNNING)
    assert holder is not None, f"nobody works on {directory}"
    return holder.pid


def not_finished(directory: Path) -> None:
    """Take back what a run writes last."""
    about = json.loads((directory / "run.json").read_text())
    for written_last in ("artifacts", "finished"):
        del about[written_last]
    (directory / "run.json").write_text(json.dumps(about))


def rewound(directory: Path, copy: Path, step: int) -> Path:
    """What a run killed after the checkpoint of `step` leaves: a copy of `directory` without the
    later checkpoints and what comes at the end.
    """
    shutil.copytree(directory, copy)
    for name in ("policy", "figures"):
        shutil.rmtree(copy / name, ignore_errors=True)
    (copy / "summary.json").unlink()
    not_finished(copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


@dataclass(frozen=True)
class DebugRun:
    """`python -m rlhf_exp experiment=debug` on a machine where nothing was trained yet."""

    directory: Path
    artifacts: Path
    process: subprocess.CompletedProcess[str]
