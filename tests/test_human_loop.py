"""The whole loop with somebody who labels in a tool of their own: rounds of questions while the
policy learns, a kill in the middle of one, and the rest after it.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from people import wait_for
from runs import PATIENCE, command, environment, rows

pytest_plugins = ["runs_fixtures"]

SMALL = [
    "experiment=human_loop",
    "labeller.interface=files",
    "labeller.folder=queue",
    "labeller.file=person.jsonl",
    "algo.labels=24",
    "algo.first=0.5",
    "algo.every=2",
    "algo.candidates=3",
    "algo.learner.steps=4",
    "algo.learner.batch=16",
    "algo.learner.minibatch=16",
    "reward.size=2",
    "reward.member.epochs=1",
    "sft.epochs=0.32",
    "sft.batch=32",
    "sft.micro_batch=32",
    "evaluation.prompts=16",
    "evaluation.every=2",
    "checkpoints.every=1",
    "figures=false",
]


class Somebody:
    """Prefers the longer text; answers what lies in the queue, so many pairs at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answered: list[str] = []

    def waiting(self) -> list[dict]:
        """Pairs in the queue that were not answered yet."""
        found = rows(self.folder / "queue.jsonl")
        return [pair for pair in found if pair["key"] not in self.answered]

    def answer(self, count: int) -> None:
        """Answer `count` pairs as soon as there are so many."""
        pairs = wait_for(lambda: len(self.waiting()) >= count and self.waiting(), PATIENCE)[:count]
        with (self.folder / "answers.jsonl").open("a") as file:
            for pair in pairs:
                choice = "left" if len(pair["left"]) > len(pair["right"]) else "right"
                row = {"key": pair["key"], "choice": choice, "who": "somebody"}
                file.write(json.dumps(row) + "\n")
                self.answered.append(pair["key"])


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command in `tmp_path`."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            command(*arguments), cwd=tmp_path, env=environment(), text=True, **streams
        )

    return start


@pytest.mark.slow
def test_labels_outlive_a_kill_and_only_the_rest_is_asked(
    started: Callable[..., subprocess.Popen[str]], artifacts: Path, tmp_path: Path
) -> None:
    somebody = Somebody(tmp_path / "queue")
    run = started(*SMALL, f"artifacts={artifacts}")
    try:
        somebody.answer(12)  # before the first step
        wait_for(lambda: len(somebody.waiting()) == 12, PATIENCE)  # after the second
        somebody.answer(5)
        wait_for(lambda: len(rows(tmp_path / "person.jsonl")) == 17, PATIENCE)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
    (directory,) = tmp_path.glob("multirun/*/*/0")
    again = started(f"resume={directory}")
    try:
        wait_for(lambda: len(somebody.waiting()) == 7, PATIENCE)
        somebody.answer(7)
        said, _ = again.communicate(timeout=PATIENCE)
    finally:
        again.kill()
    assert again.returncode == 0, said
    labels = rows(directory / "labels.jsonl")
    assert [row["round"] for row in labels] == [0] * 12 + [1] * 12
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in labels)
    decisions = rows(tmp_path / "person.jsonl")
    assert len(decisions) == len({row["key"] for row in decisions}) == 24
    assert (directory / "policy" / "model.safetensors").exists()
