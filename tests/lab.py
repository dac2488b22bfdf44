"""A toy on which an algorithm must learn: a tiny random policy, prompts of two words, and a reward
for vowels. lab_fixtures.py makes them.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.checkpoints import Checkpoints
from rlhf_exp.data.rows import Dataset
from rlhf_exp.evaluation.scoring import Evaluation, Evaluator
from rlhf_exp.hardware import Hardware
from rlhf_exp.policy import Policy
from rlhf_exp.reference import Reference
from rlhf_exp.tracking import Log, NoTracker
from rlhf_exp.trial import Trial, seed_everything

PROMPTS = [
    f"{size} {thing}:" for size in ("big", "small", "old") for thing in ("cat", "dog", "hat")
]
DATA = Dataset(prompts=PROMPTS, held_out=PROMPTS)
SHAPE = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}


class Vowels:
    """How many vowels a completion has."""

    def fit(self, fitting: Any) -> None:
        """Nothing to fit."""

    def load(self, device: Any) -> None:
        """Nothing to load."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor([float(sum(c.count(v) for v in "aeiou")) for c in completions])


class Lab:
    """A fresh policy with its trial, ready for an algorithm."""

    def __init__(
        self,
        base: Path | str,
        directory: Path,
        *,
        seed: int = 0,
        reward: Any = None,
        **policy: Any,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        seed_everything(seed)
        self.directory, self.seed, self.reward = directory, seed, reward or Vowels()
        self.policy = Policy(architecture=dict(SHAPE), vocabulary=300, max_new_tokens=8, **policy)
        self.policy.load(base, trainable=True)
        self.trial = Trial(
            directory=directory,
            seed=seed,
            accelerator=Hardware().accelerator(),
            reference=Reference(self.policy),
            pairs=lambda: directory,
            labeller=lambda: None,
            log=Log(directory, NoTracker(), show_every=1000),
            checkpoints=Checkpoints(every=1000),
            evaluator=Evaluator(
                Evaluation(every=1000, prompts=4), PROMPTS, self.reward, self.reward, directory
            ),
        )
        self.trial.checkpoints.open(directory)

    def run(self, algorithm: Any) -> list[dict[str, float]]:
        """Train; returns the metrics of every step."""
        with self.trial.listening():
            algorithm.run(self.policy, self.reward, DATA, self.trial)
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "reward/proxy" in row]

    def signal_in(self, step: int | None) -> None:
        """Let a signal come during this step of the trial."""
        end_step = self.trial.end_step

        def signalled(now: int, *others: Any) -> None:
            if now == step:
                self.trial.signalled = signal.SIGTERM
            end_step(now, *others)

        self.trial.end_step = signalled  # type: ignore[method-assign]

    def scores(self, count: int = 30) -> Tensor:
        """Scores of fresh completions [9 * count]."""
        rollouts = self.policy.sample(PROMPTS, count)
        return self.reward(rollouts.prompts, rollouts.completions)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.model.parameters()])


MakeLab = Callable[..., Lab]
