"""Principles that judges and critics go by, from a YAML file (Bai et al. 2022, arXiv 2212.08073).

Those of the paper are not repeated here; two small sets in this project's own words are.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_exp.choices import nearest

OWN = Path(__file__).parent / "constitutions"


@dataclass(frozen=True)
class Principle:
    """One rule in the three forms in which it is asked."""

    name: str
    compare: str  # a question about two answers
    critique: str  # what a critic is to name in one answer
    revise: str  # how to write the answer anew


PARTS = tuple(f.name for f in fields(Principle))


def read(constitution: str, setting: str) -> list[Principle]:
    """The principles of one of our own constitutions by name, or of a YAML file.

    FileNotFoundError if there is no such file; ValueError if it holds no principles, or one that
    lacks a part; `setting` is the key that named it.
    """
    path = OWN / f"{constitution}.yaml"
    if not path.exists():
        path = Path(constitution).expanduser()
    if not path.is_file():
        own = sorted(p.stem for p in OWN.glob("*.yaml"))
        raise FileNotFoundError(
            f"{setting}={constitution}: no such file; give one, or {' or '.join(own)}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={path} is no YAML: {' '.join(str(error).split())}") from None
    rows = content.get("principles") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{setting}={path} needs a list `principles` with at least one of them")
    found = [_principle(f"{setting}={path}, principle {i}", row) for i, row in enumerate(rows, 1)]
    names = [principle.name for principle in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{setting}={path} has two principles with the name {twice[0]}")
    return found


def _principle(where: str, row: Any) -> Principle:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must have {', '.join(PARTS)}")
    for key in row:
        if key not in PARTS:
            raise ValueError(f"{where}: unknown {key!r}{nearest(str(key), PARTS)}")
    for part in PARTS:
        if not isinstance(row.get(part), str) or not row[part].strip():
            raise ValueError(f"{where} needs a text for `{part}`")
    return Principle(**{part: row[part].strip() for part in PARTS})
