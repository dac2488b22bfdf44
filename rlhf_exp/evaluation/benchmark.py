"""What is asked of a benchmark: a name, and how it is to differ from its task file."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlhf_exp.choices import nearest

SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class Benchmark:
    """One of evaluation.harness.tasks."""

    name: str  # a task, a group or a tag
    shots: int | None = None  # examples in the context; null: evaluation.harness.shots
    limit: int | None = None  # questions of each task; null: evaluation.harness.limit
    metric: str | None = None  # what the average and the table take; null: the task's first
    data: str | None = None  # folder of <split>*.parquet, in place of the task's data set

    def __post_init__(self) -> None:
        if (self.shots or 0) < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"evaluation.harness.tasks: {self.name} has shots={self.shots} and limit="
                f"{self.limit}; give no fewer than 0 and 1"
            )

    @staticmethod
    def of(task: Any) -> "Benchmark":
        """From a name, or a mapping of the fields."""
        given: Any = {"name": task} if isinstance(task, str) else task
        known = [f.name for f in fields(Benchmark)]
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ValueError(f"evaluation.harness.tasks: {task} has no name; give it one")
        for key in given:
            if key not in known:
                raise ValueError(
                    f"evaluation.harness.tasks: {key} is no setting of {given['name']}"
                    f"{nearest(key, known)}"
                )
        return Benchmark(**given)

    def changes(self) -> dict[str, Any]:
        """What the task's file would say if its data were in the folder; FileNotFoundError if there
        are none.
        """
        if self.data is None:
            return {}
        folder = Path(self.data).expanduser().absolute()
        found = {split: sorted(map(str, folder.glob(f"{split}*.parquet"))) for split in SPLITS}
        if not any(found.values()):
            raise FileNotFoundError(
                f"evaluation.harness.tasks: data={self.data} of {self.name} holds no "
                "train*.parquet, validation*.parquet or test*.parquet"
            )
        files = {split: paths for split, paths in found.items() if paths}
        return {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
