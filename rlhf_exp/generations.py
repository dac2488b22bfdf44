"""The stages `generate` and `merge`: large pools of completions, sampled in shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Policy


@dataclass(kw_only=True)
class Generations:
    """What is sampled, and which part of it."""

    folder: str | None = None  # null: <run directory>/generations
    scored: bool = True  # by reward and gold

    def generate(
        self,
        policy: Policy,
        data: Dataset,
        reward: Any,
        gold: Any,
        sampling: dict[str, Any],
        directory: Path,
    ) -> None:
        raise NotImplementedError

    def merge(self, directory: Path) -> None:
        raise NotImplementedError
