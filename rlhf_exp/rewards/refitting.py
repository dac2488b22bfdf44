"""An ensemble fitted again and again on a growing set of labels (Christiano et al. 2017, arXiv
1706.03741, section 2.2.3).

Every member learns from its own bootstrap resample. What a resample leaves out, about 1/e of the
labels, is its validation set: over it the member's scores are standardised, and its weight decay
rises or falls so that the loss there stays between 1.1 and 1.5 times the loss on what it learned
from. A member starts from the start policy's weights each time, so labels and weight decay decide
it, and an interrupted run can make it again.
"""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from rlhf_exp import losses, processes
from rlhf_exp.artifacts import Store
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.rewards import Fitting
from rlhf_exp.rewards.ensemble import Ensemble

Row = dict[str, Any]  # prompt, chosen, rejected, probability

STEP = 1.5  # factor by which a weight decay moves


def resampled(count: int, rng: random.Random, *, bootstrap: bool) -> tuple[list[int], list[int]]:
    """Indices to learn from and indices left out, about 1/e of `count` and at least two: drawn with
    replacement, or each of them once.
    """
    left: list[int] = []
    drawn: list[int] = []
    while len(left) < 2:
        if bootstrap:
            drawn = sorted(rng.choices(range(count), k=count))
        else:
            drawn = sorted(rng.sample(range(count), round(count * (1 - 1 / math.e))))
        left = sorted(set(range(count)) - set(drawn))
    return drawn, left


def tuned(decay: float, ratio: float, band: Sequence[float]) -> float:
    """The weight decay after a fit whose validation loss was `ratio` times its training loss, to be
    kept within `band`.
    """
    low, high = band
    return decay * STEP if ratio > high else decay / STEP if ratio < low else decay


@dataclass(kw_only=True)
class Refitting:
    """Fits the members of `reward` in place; their artifacts lie below `folder`, those of the last
    two times.
    """

    reward: Ensemble
    fitting: Fitting
    folder: Path
    bootstrap: bool
    band: Sequence[float]
    weight_decay: float  # at first
    ratios: dict[str, float] = field(default_factory=dict)  # of its losses, once fitted

    def __post_init__(self) -> None:
        self.store = Store(self.folder)
        self.decay = dict.fromkeys(self.reward.members, self.weight_decay)
        self.used: list[set[Path]] = [set(), set()]

    def adapt(self) -> None:
        """Move each weight decay as the last fit says."""
        self.decay |= {n: tuned(self.decay[n], r, self.band) for n, r in self.ratios.items()}

    def __call__(self, rows: list[Row], seed: str) -> dict[str, float]:
        """Fit and load every member on its part of `rows`, drawn by `seed`; means over the members
        of accuracy on what they have not seen, of the ratio of their losses, and of weight decay.
        """
        self.used = [set(), self.used[0]]
        accuracy = {name: self._fit(name, rows, f"{seed}/{name}") for name in self.reward.members}
        if processes.main():
            self._tidy()
        found = {"accuracy": accuracy, "loss_ratio": self.ratios, "weight_decay": self.decay}
        return {name: sum(of.values()) / len(of) for name, of in found.items()}

    def _fit(self, name: str, rows: list[Row], seed: str) -> float:
        drawn, left = resampled(len(rows), random.Random(seed), bootstrap=self.bootstrap)
        train, rest = [rows[i] for i in drawn], [rows[i] for i in left]
        member: Any = replace(self.reward.members[name], weight_decay=self.decay[name])
        pairs = self._written(train, rest)
        member.fit(replace(self.fitting, store=self.store, pairs=lambda: pairs))
        member.load(self.fitting.device)
        self.reward.members[name] = member
        self.used[0] |= {pairs, Path(member.folder)}
        (unseen, accuracy), (seen, _) = _judged(member, rest), _judged(member, train)
        self.ratios[name] = unseen / max(seen, 1e-6)
        return accuracy

    def _written(self, train: list[Row], rest: list[Row]) -> Path:
        """The artifact of pairs that a reward model is fitted on."""

        def make(folder: Path) -> None:
            write_jsonl(folder / "train.jsonl", train)
            write_jsonl(folder / "evaluation.jsonl", rest)

        return self.store.get("preferences", "labels", {"train": train, "evaluation": rest}, make)

    def _tidy(self) -> None:
        for path in self.folder.glob("*/*"):
            if path.is_dir() and path not in self.used[0] | self.used[1]:
                shutil.rmtree(path)


def _judged(member: Any, rows: list[Row]) -> tuple[float, float]:
    """Mean loss of a member on `rows`, and its accuracy where the label is no tie."""
    prompts = [row["prompt"] for row in rows]
    better, worse = (member(prompts, [row[s] for row in rows]) for s in ("chosen", "rejected"))
    label = tensor([row["probability"] for row in rows])
    scale = odds_scale(member)
    loss = losses.preference_loss(better * scale, worse * scale, 0.0, label).mean()
    told = label != 0.5
    right: Tensor = (better > worse)[told].float()
    return float(loss), float(right.mean()) if told.any() else 0.5


def odds_scale(member: Any) -> float:
    """What turns differences of a member's scores into log-odds: the standard deviation that it
    was standardised by.
    """
    return float(member.std)
