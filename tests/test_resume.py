"""Same seed, same weights: run twice, interrupted, killed, resumed, looked at more or less often.

The settings make every piece of state matter: an adaptive KL coefficient, running score moments, a
learning rate that moves, several minibatches drawn in random order, Adam's moments.
"""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import (
    command,
    environment,
    inside,
    logged,
    rows,
    same_outcome,
    weights,
)

from rlhf_exp.artifacts import verify
from rlhf_exp.checkpoints import Checkpoints
from rlhf_exp.worker import resume

pytest_plugins = ["runs_fixtures"]

STEPS = 8
STATEFUL = [
    "experiment=debug",
    f"algo.steps={STEPS}",
    "algo.minibatch=8",
    "algo.kl_target=1",
    "algo.kl_horizon=100",
    "algo.score_scaling=running",
    "algo.schedule=linear",
    "algo.warmup=2",
    "checkpoints.every=2",
    "evaluation.every=3",
    "show_every=2",
]


@pytest.fixture(scope="module")
def uninterrupted(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert inside(directory, *STATEFUL, f"artifacts={artifacts}") == 0
    return directory


def test_every_piece_of_state_moves(uninterrupted: Path) -> None:
    """Otherwise the comparisons below would prove little."""
    steps = [r for r in rows(uninterrupted / "metrics.jsonl") if "reward/proxy" in r]
    assert len(steps) == STEPS
    assert len({r["kl/coef"] for r in steps}) > STEPS // 2
    assert len({r["ppo/lr"] for r in steps}) > STEPS // 2
    newest = max((uninterrupted / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt", weights_only=True)
    assert state["algorithm"]["scaling"]["count"] == STEPS * 16
    assert state["algorithm"]["optimizer"]["state"][0]["step"] > STEPS


def test_the_same_seed_gives_the_same_weights(
    uninterrupted: Path, artifacts: Path, tmp_path: Path
) -> None:
    assert inside(tmp_path / "again", *STATEFUL, f"artifacts={artifacts}") == 0
    same_outcome(tmp_path / "again", uninterrupted)
    assert inside(tmp_path / "other", *STATEFUL, "seed=1", f"artifacts={artifacts}") == 0
    assert weights(tmp_path / "other") != weights(uninterrupted)


# ---- signals, for real


def until_row(count: int, directory: Path, number: int, *arguments: object) -> tuple[int, str]:
    """Start a run, signal it once it has logged `count` steps; exit code and what it said."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=directory.parent,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 200
    try:
        while _steps(metrics) < count:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stderr = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, stderr


def _steps(metrics: Path) -> int:
    return metrics.read_text().count('"reward/proxy":') if metrics.exists() else 0


def to_the_end(directory: Path) -> None:
    done = subprocess.run(
        command(f"resume={directory}"),
        cwd=directory.parent,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_stopped_by_signals_and_resumed(
    uninterrupted: Path, artifacts: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    asked = [*STATEFUL, f"artifacts={artifacts}", f"hydra.run.dir={directory}"]
    cure = f"continue with: python -m rlhf_exp resume={directory}"

    code, stderr = until_row(2, directory, signal.SIGTERM, *asked)
    assert code == 128 + signal.SIGTERM
    assert cure in stderr
    assert "Traceback" not in stderr
    verify(max((directory / "checkpoints").glob("step-*")))
    assert not (directory / "policy").exists()

    code, stderr = until_row(5, directory, signal.SIGINT, f"resume={directory}")
    assert code == 128 + signal.SIGINT
    assert cure in stderr
    assert 2 < _steps(directory / "metrics.jsonl") < STEPS

    to_the_end(directory)
    same_outcome(directory, uninterrupted)


@pytest.mark.slow
def test_killed_and_resumed(uninterrupted: Path, artifacts: Path, tmp_path: Path) -> None:
    directory, step = tmp_path / "run", random.randrange(1, STEPS)
    print(f"killed after step {step}")  # shown if this fails
    asked = [*STATEFUL, f"artifacts={artifacts}", f"hydra.run.dir={directory}"]
    code, _ = until_row(step, directory, signal.SIGKILL, *asked)
    assert code == -signal.SIGKILL
    assert not (directory / "policy").exists()
    to_the_end(directory)
    same_outcome(directory, uninterrupted)


# ---- accidents, in this process


def test_ended_before_the_first_checkpoint(
    uninterrupted: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", _no_space)
        assert inside(tmp_path / "run", *STATEFUL, f"artifacts={artifacts}") == 1
    assert _steps(tmp_path / "run" / "metrics.jsonl") == 2
    assert logged(lambda: resume(tmp_path / "run")) == 0
    same_outcome(tmp_path / "run", uninterrupted)


def test_ended_between_a_best_evaluation_and_its_checkpoint(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nothing is learned, so the first evaluation after the start stays the best
    asked = [
        "experiment=debug",
        "algo.lr=0",
        "algo.steps=3",
        "evaluation.every=1",
        "checkpoints.every=10",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", _no_space)
        assert inside(tmp_path / "run", *asked, f"artifacts={artifacts}") == 1
    assert logged(lambda: resume(tmp_path / "run")) == 0
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["step"] == 1
    verify(tmp_path / "run" / "checkpoints" / "step-000001")


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_last_line_cut_short_is_done_again(
    uninterrupted: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, save = tmp_path / "run", Checkpoints.save

    def save_once(self: Checkpoints, step: int, state: dict, best_step: int | None) -> None:
        if step > 2:
            _no_space()
        save(self, step, state, best_step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_once)
        assert inside(directory, *STATEFUL, f"artifacts={artifacts}") == 1
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (directory / name).open("a") as file:
            file.write('{"step": 3, "rew')
    assert logged(lambda: resume(directory)) == 0
    same_outcome(directory, uninterrupted)


# ---- looking changes nothing


def test_looking_more_often_changes_nothing(
    uninterrupted: Path, artifacts: Path, tmp_path: Path
) -> None:
    often = ["evaluation.every=1", "checkpoints.every=1", "show_every=1"]
    assert inside(tmp_path / "often", *STATEFUL, *often, f"artifacts={artifacts}") == 0
    assert len(list((tmp_path / "often" / "evaluation").iterdir())) == STEPS + 1
    seldom = ["evaluation.every=100", "checkpoints.every=100", "show_every=100"]
    assert inside(tmp_path / "seldom", *STATEFUL, *seldom, f"artifacts={artifacts}") == 0
    assert len(list((tmp_path / "seldom" / "evaluation").iterdir())) == 2
    assert weights(tmp_path / "often") == weights(tmp_path / "seldom") == weights(uninterrupted)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_and_the_best_checkpoints_are_kept(
    keep: int, artifacts: Path, tmp_path: Path
) -> None:
    asked = ["experiment=debug", "algo.steps=6", "evaluation.every=1", "checkpoints.every=1"]
    asked += ["checkpoints.best=length/mean", f"checkpoints.keep={keep}", f"artifacts={artifacts}"]
    assert inside(tmp_path / "run", *asked) == 0
    folder = tmp_path / "run" / "checkpoints"
    lengths = {
        r["step"]: r["evaluation/length/mean"]
        for r in rows(tmp_path / "run" / "metrics.jsonl")
        if r["step"] > 0 and "evaluation/length/mean" in r
    }
    best = max(lengths, key=lambda step: (lengths[step], -step))
    assert json.loads((folder / "best.json").read_text()) == {
        "step": best,
        "length/mean": lengths[best],
    }
    kept = {int(p.name.removeprefix("step-")) for p in folder.glob("step-*")}
    assert kept == {best} | set(range(7 - keep, 7))
    for path in folder.glob("step-*"):
        verify(path)
