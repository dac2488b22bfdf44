"""Two finished runs side by side: what was set differently, and what came of it.

One run a side is one seed a side: the intervals are over prompts, for these two policies.
"""

from pathlib import Path
from typing import Any


def compare(run: Path, against: Path) -> dict[str, Any]:
    """`run` minus `against`, as plain values for JSON. FileNotFoundError or ValueError in one
    sentence for what is no finished run of ours, or twice the same.
    """
    raise NotImplementedError


def as_text(found: dict[str, Any]) -> str:
    """For the terminal, at most 120 columns."""
    raise NotImplementedError


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Write compare.json to `folder` and return its path."""
    raise NotImplementedError
