"""The stage `prepare`: a data set's splits as files, with a manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.data.rows import Dataset


@dataclass(kw_only=True)
class Prepare:
    """Where the files go."""

    folder: str | None = None  # null: <run directory>/data

    def write(self, data: Dataset, spec: dict[str, Any], directory: Path) -> None:
        raise NotImplementedError
