"""Runs in two real processes: started by themselves, by torchrun, stopped, killed, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    PATIENCE,
    command,
    command_line,
    environment,
    inside,
    rewound,
    rows,
    the_error,
    timeless,
)

from rlhf_exp.artifacts import verify

pytest_plugins = ["runs_fixtures"]
pytestmark = pytest.mark.slow

ASKED = ["experiment=debug", "reward=lexicon", "checkpoints.every=2"]
WHOLE = "hardware.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def workers_of(directory: Path) -> list[int]:
    """Process ids of the workers that still run in `directory`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"rlhf_exp.worker" in words and str(directory).encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


def until(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def started(directory: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        cwd=directory.parent,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("hardware", [["zero2"], ["zero3", WHOLE]], ids=["zero2", "zero3"])
def test_two_processes_leave_what_one_does(
    hardware: list[str], artifacts: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    asked = [*ASKED, f"artifacts={artifacts}", f"hydra.run.dir={directory}"]
    where = [f"hardware={hardware[0]}", "hardware.processes=2", *hardware[1:]]
    done = command_line(*asked, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not workers_of(directory)
    assert done.stderr.count("stage align") == 1  # one process speaks
    assert done.stdout.count("gold was highest") == 1
    steps = [r["step"] for r in rows(directory / "metrics.jsonl") if "reward/proxy" in r]
    assert steps == [0, 1, 2, 3]
    verify(directory / "policy")
    newest = directory / "checkpoints" / "step-000004"
    state = torch.load(newest / "state.pt", weights_only=True)
    from safetensors.torch import load_file

    saved = load_file(directory / "policy" / "model.safetensors")
    trained = state["policy"]
    assert len(trained) > 10
    for name, value in trained.items():
        assert value.numel() > 0
        assert torch.equal(value, saved[name])
    assert len(state["algorithm"]["optimizer"]["state"]) == len(trained) + 2  # and a value head


def test_stopped_and_resumed(artifacts: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    asked = [*ASKED, "algo.steps=6", f"artifacts={artifacts}", f"hydra.run.dir={directory}"]
    process = started(directory, *asked, "hardware=zero2", "hardware.processes=2")
    metrics = directory / "metrics.jsonl"
    until(lambda: metrics.exists() and '"reward/proxy":' in metrics.read_text(), process)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert stderr.count(f"continue with: python -m rlhf_exp resume={directory}") == 1
    assert not workers_of(directory)
    verify(max((directory / "checkpoints").glob("step-*")))
    assert not (directory / "policy").exists()

    elsewhere = ["hardware=zero3", "hardware.processes=2", WHOLE]
    done = command_line(f"resume={directory}", *elsewhere, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = json.loads((directory / "run.json").read_text())
    assert about["config"]["hardware"]["deepspeed"]["zero_optimization"]["stage"] == 2
    assert about["continued_on"][-1]["deepspeed"]["zero_optimization"]["stage"] == 3
    steps = [r["step"] for r in rows(metrics) if "reward/proxy" in r]
    assert steps == list(range(6))
    assert json.loads((directory / "summary.json").read_text())["step"] == 6


@pytest.mark.parametrize("hardware", ["cpu", "fsdp2"])
def test_a_process_that_is_killed(hardware: str, artifacts: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    asked = [*ASKED, "algo.steps=500", f"artifacts={artifacts}", f"hydra.run.dir={directory}"]
    process = started(directory, *asked, f"hardware={hardware}", "hardware.processes=2")
    metrics = directory / "metrics.jsonl"
    until(lambda: metrics.exists() and '"reward/proxy":' in metrics.read_text(), process)
    pids = workers_of(directory)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    stderr = process.communicate(timeout=PATIENCE)[1]
    assert time.monotonic() - began < 12
    assert process.returncode == 1
    error = the_error(stderr)
    assert "ended by SIGKILL" in error
    assert f"resume={directory}" in error
    assert not workers_of(directory)


def torchrun(count: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`torchrun -m rlhf_exp`, as its documentation says to start it on one machine."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run(
        [sys.executable, *start, "-m", "rlhf_exp", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_torchrun_shares_one_directory(artifacts: Path, tmp_path: Path) -> None:
    asked = [*ASKED, "algo.steps=2", "seed=1", f"artifacts={artifacts}", "hardware=cpu"]
    done = torchrun(2, *asked, "hardware.processes=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (directory,) = tmp_path.glob("multirun/*/*/0")
    assert (directory / ".hydra" / "config.yaml").exists()
    assert done.stderr.count("run directory: ") == 1
    alone = command_line(*asked, f"hydra.run.dir={tmp_path / 'alone'}", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (timeless(d / "metrics.jsonl") for d in (directory, tmp_path / "alone"))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]


def test_torchrun_of_another_size_or_a_sweep(tmp_path: Path) -> None:
    done = torchrun(2, "experiment=debug", cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "started 2 processes (WORLD_SIZE), but hardware.processes=1" in errors[0]
    done = torchrun(2, "-m", "experiment=debug", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "a sweep starts the processes of its jobs itself" in errors[0]


def test_dpo_in_two_processes_is_that_of_one_and_resumes(artifacts: Path, tmp_path: Path) -> None:
    asked = ["experiment=debug", "algo=dpo", "checkpoints.every=1", "checkpoints.keep=99"]
    asked.append(f"artifacts={artifacts}")
    assert inside(tmp_path / "one", *asked) == 0
    two = tmp_path / "two"
    where = ["hardware=zero2", "hardware.processes=2", f"hydra.run.dir={two}"]
    done = command_line(*asked, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = rewound(two, tmp_path / "again", 2)
    done = command_line(f"resume={again}", "hardware=cpu", cwd=tmp_path)  # in one process
    assert done.returncode == 0, done.stderr

    def told(run: Path) -> list[list[float]]:
        return [
            [row["dpo/loss"], row["dpo/grad_norm"], row["dpo/margin"]]
            for row in rows(run / "metrics.jsonl")
            if "dpo/loss" in row
        ]

    assert len(told(two)) == 4
    assert len(torch.load(max(again.glob("checkpoints/*/state.pt")))["random"]) == 1
    for run in (two, again):
        assert np.allclose(told(run), told(tmp_path / "one"), atol=2e-4), run
