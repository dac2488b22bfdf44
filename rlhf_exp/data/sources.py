"""Which rows of a set one role gets, and how they are to be read.

Left out: a new draw of the fraction in every epoch. A data set is drawn once, so that every run and
every stage sees the same one; to see more of it, raise the fraction.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.choices import nearest, require
from rlhf_exp.data.places import Place, Row

TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "is": operator.eq,
    "in": lambda value, allowed: value in allowed,
    "not_in": lambda value, refused: value not in refused,
    "below": lambda value, limit: value is not None and value < limit,
    "at_least": lambda value, limit: value is not None and value >= limit,
}


@dataclass(kw_only=True)
class Source:
    """Rows of one set for one role; conf/data/source/rows.yaml says more of each key."""

    path: str  # hub id, folder or file
    config: str | None = None  # configuration on the hub
    split: str = "train"  # on the hub; of a folder, the files whose names begin so
    files: str | None = None  # pattern of the files instead
    revision: str | None = None  # branch, tag or commit on the hub
    streaming: bool = False
    schema: str = "columns"  # how a row is read, see rlhf_exp/data/schemas.py
    columns: dict[str, str] | None = None  # where its name differs
    choices: list[Any] = field(default_factory=lambda: [0, 1])
    format: Any = None  # of the prompt; null: the data set's
    lead: str | None = None  # every completion starts with it; null: the data set's
    where: dict[str, Any] | None = None  # rows used
    prompt_length: list[Any] | None = None  # least and most
    completion_length: list[Any] | None = None
    prompt_words: int = 8  # of schema=text
    answers: int | None = None  # lists in a row are cut to so many
    pairs: int | None = 1  # of a row with many completions
    hold_out: int = 0  # rows for the held-out role
    fraction: float | None = None  # of the other rows
    size: int | None = None  # rows that are left after dropping
    weight: float | None = None  # share in a mixture
    seed: int | None = 0  # draws rows and pairs; null takes them in order
    key: str = "data"  # where it stands in the config

    def __post_init__(self) -> None:
        key = self.key
        for name in ("prompt_length", "completion_length"):
            self._check_range(name)
        for name in ("answers", "pairs", "size", "prompt_words"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{key}.{name}={value} must be at least 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"{key}.fraction={self.fraction} must be above 0 and at most 1")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"{key}.weight={self.weight} must be positive")
        for one, other in (("fraction", "size"), ("files", "config"), ("files", "streaming")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(
                    f"{key}.{one}={getattr(self, one)} and {key}.{other}={getattr(self, other)} "
                    "exclude each other: leave one out"
                )
        if self.answers is not None and self.schema != "scored":
            raise ValueError(
                f"{key}.answers={self.answers} is for {key}.schema=scored, not {self.schema}: set "
                "it to null"
            )
        if self.hold_out < 0:
            raise ValueError(f"{key}.hold_out={self.hold_out} must not be negative")
        if len(self.choices) != 2:
            raise ValueError(f"{key}.choices={self.choices} must be the marks of two completions")
        for tests in self._tests.values():
            for test in tests:
                require(test, TESTS, f"{key}.where")

    @classmethod
    def of(cls, node: dict[str, Any], key: str) -> "Source":
        """What the node at `key` describes; ValueError for a wrong key, type or value."""
        known = [f.name for f in fields(cls) if f.name != "key"]
        for name in node:
            if name not in known:
                raise ValueError(f"{key}.{name} is not a setting of a source{nearest(name, known)}")
        if "path" not in node:
            raise ValueError(f"{key}.path must be given: a hub id, a folder or a file")
        try:
            OmegaConf.merge(OmegaConf.structured(cls), node)
        except OmegaConfBaseException as error:
            where = getattr(error, "full_key", None) or "?"
            raise ValueError(f"{key}.{where}: {str(error).splitlines()[0]}") from None
        return cls(**node, key=key)

    def _check_range(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        numbers = [v for v in value if v is not None]
        sound = len(value) == 2 and all(isinstance(v, int) and v >= 0 for v in numbers)
        if not sound or numbers != sorted(numbers):
            raise ValueError(
                f"{self.key}.{name}={value} must be [least, most], either of them null"
            )

    def place(self, folder: str | None) -> Place:
        """Where its rows are: in `folder` if that is given."""
        path = folder or self.path
        return Place(
            path, self.config, self.split, self.files, self.revision, self.streaming, self.answers
        )

    def column(self, name: str, default: str | None = None) -> str:
        """What the column called `name` is called in the rows."""
        return (self.columns or {}).get(name, default or name)

    @cached_property
    def _tests(self) -> dict[str, dict[str, Any]]:
        return {
            k: v if isinstance(v, dict) else {"in" if isinstance(v, list) else "is": v}
            for k, v in (self.where or {}).items()
        }

    def keeps(self, row: Row) -> bool:
        """Whether the row passes `where`."""
        for column, tests in self._tests.items():
            for test, limit in tests.items():
                value = row.at(column)
                try:
                    if not TESTS[test](value, limit):
                        return False
                except TypeError:
                    raise row.bad(
                        f"{self.key}.where compares {column!r} with {limit!r}, but it is {value!r}"
                    ) from None
        return True

    def part(self, rows: list[Row], *, held: bool) -> list[Row]:
        """The rows that are held out, or a fraction of the others."""
        if self.hold_out >= len(rows):
            raise ValueError(
                f"{self.key}.hold_out={self.hold_out} leaves none of the {len(rows)} rows: lower it"
            )
        rows = self._drawn(rows)
        cut = len(rows) - self.hold_out
        if held:
            return rows[cut:]
        return rows[: cut if self.fraction is None else max(1, round(self.fraction * cut))]

    def _drawn(self, rows: list[Row]) -> list[Row]:
        """In the order of torch's `random_split` under the seed, if only some are taken."""
        some = self.hold_out or self.fraction or self.size or self.weight
        if self.seed is None or not some:
            return rows
        generator = torch.Generator().manual_seed(self.seed)
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
