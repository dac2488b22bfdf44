"""Resumable state of a run: atomic, checksummed directories, the last few and the best of them
kept.
"""

import io
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_exp import processes
from rlhf_exp.artifacts import verify, write_directory, write_json
from rlhf_exp.choices import require
from rlhf_exp.evaluation.scoring import METRICS


@dataclass(kw_only=True)
class Checkpoints:
    """When state is saved and what is kept."""

    # steps between checkpoints; the end is always saved; null: a third of the run
    every: int | None = None
    # also when so many have passed since the last one; null: never for that reason
    minutes: float | None = 30.0
    keep: int = 2  # last checkpoints kept
    # evaluation metric whose best checkpoint is kept as well; higher is better
    best: str = "reward/proxy"

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or self.keep < 1:
            raise ValueError(
                f"checkpoints.every={self.every} and checkpoints.keep={self.keep} must be at "
                "least 1"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(
                f"checkpoints.minutes={self.minutes} must be more than 0, or null for checkpoints "
                "by steps alone"
            )
        require(self.best, METRICS, "checkpoints.best")

    def due(self, step: int, last: int) -> bool:
        """Whether a checkpoint is to be written after `step` of `last` steps; the main process's
        clock decides for all.
        """
        if step % (self.every or max(1, last // 3)) == 0 or step == last:
            return True
        late = self.minutes is not None and time.monotonic() - self.saved > 60 * self.minutes
        return processes.agreed(late)

    def open(self, directory: Path) -> None:
        """Use `directory`/checkpoints."""
        self.folder, self.saved = directory / "checkpoints", time.monotonic()

    def save(self, step: int, state: dict[str, Any], best_step: int | None) -> None:
        """Write `state` as the checkpoint of `step`, then drop what is neither recent nor best. The
        main process writes; all go on when it has.
        """
        processes.first(lambda: self._write(step, state, best_step))
        self.saved = time.monotonic()

    def _write(self, step: int, state: dict[str, Any], best_step: int | None) -> None:
        path = self.folder / f"step-{step:06d}"
        if path.exists():
            shutil.rmtree(
                path
            )  # left by an earlier attempt that got further than the one being resumed
        packed = io.BytesIO()  # torch.save straight to a full disk dies without an OSError
        torch.save(state, packed)
        write_directory(
            path, lambda t: (t / "state.pt").write_bytes(packed.getbuffer()), {"step": step}
        )
        steps = self.steps()
        for old in set(steps[: -self.keep]) - {best_step}:
            shutil.rmtree(self.folder / f"step-{old:06d}")

    def mark_best(self, step: int, value: float) -> None:
        write_json(self.folder / "best.json", {"step": step, self.best: value})

    def best_so_far(self) -> tuple[int | None, float]:
        path = self.folder / "best.json"
        if not path.exists():
            return None, float("-inf")
        found = json.loads(path.read_text())
        return found["step"], found[self.best]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint; ValueError if it is damaged."""
        steps = self.steps()
        if not steps:
            return None
        path = self.folder / f"step-{steps[-1]:06d}"
        verify(path)
        return steps[-1], torch.load(path / "state.pt", weights_only=True)


def random_state() -> dict[str, Any]:
    """State of every random generator a run draws from, as plain values and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
