"""A table once, for a CSV file (numbers in full), for Markdown and for the page (rounded)."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_exp.artifacts import write_text
from rlhf_exp.report.estimates import Estimate
from rlhf_exp.report.page import template

LONG = 30  # rows from which a table is folded on the page
MISSING = "\u2013"
MINUS = "\u2212"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: `key` names it in the rows and in the CSV file, `head` on the page."""

    key: str
    head: str
    digits: int = 3  # after the point, on the page and in Markdown
    signed: bool = False  # a plus before what is positive: changes and differences
    interval: bool = False  # holds Estimates: three columns of the CSV file
    files: bool = False  # in the files alone, not on the page
    colors: Mapping[str, str] = field(default_factory=dict)  # a patch before each of these texts


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the page shows in one place, and what it is sorted by."""

    text: str
    interval: str = ""
    sort: float | None = None
    color: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by the keys of the columns; None where something is not known."""

    name: str  # of its files and its anchor
    title: str
    note: str  # one line: how to read it
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """`folder`/<name>.csv and .md."""
        write_text(folder / f"{self.name}.csv", self.to_csv())
        write_text(folder / f"{self.name}.md", self.to_markdown())

    def to_csv(self) -> str:
        """Every number in full; an interval is <key>_low and <key>_high; nothing where unknown."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name for column in self.columns for name in _names(column)])
        for row in self.rows:
            writer.writerow([v for c in self.columns for v in _values(c, row.get(c.key))])
        return file.getvalue()

    def to_markdown(self) -> str:
        """Title, note and the rounded table, pipes escaped."""
        lines = [[column.head for column in self.columns], ["---"] * len(self.columns)]
        lines += [[f"{cell.text} {cell.interval}".strip() for cell in row] for row in self._cells()]
        text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        return f"# {self.title}\n\n{self.note}\n\n{text}\n"

    def to_html(self) -> Markup:
        """For the page: sortable, and folded if it is long."""
        shown = [column for column in self.columns if not column.files]
        heads = [(c, any(_is_number(row.get(c.key)) for row in self.rows)) for c in shown]
        rows = [[(_cell(c, row.get(c.key)), number) for c, number in heads] for row in self.rows]
        page = template("table.html")
        return Markup(page.render(table=self, heads=heads, rows=rows, long=len(rows) > LONG))

    def _cells(self) -> list[list[Cell]]:
        return [
            [_cell(column, row.get(column.key)) for column in self.columns] for row in self.rows
        ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Estimate) and not isinstance(value, bool)


def _names(column: Column) -> list[str]:
    ends = ("", "_low", "_high") if column.interval else ("",)
    return [f"{column.key}{end}" for end in ends]


def _values(column: Column, value: Any) -> list[Any]:
    """What the CSV file has for a cell."""
    if column.interval:
        return [None] * 3 if value is None else [value.mean, value.low, value.high]
    return [str(value).lower() if isinstance(value, bool) else value]


def _cell(column: Column, value: Any) -> Cell:
    if value is None:
        return Cell(text=MISSING)
    if isinstance(value, Estimate):
        interval = ""
        if value.low is not None and value.high is not None:
            ends = (shown(end, column.digits, column.signed) for end in (value.low, value.high))
            interval = f"[{', '.join(ends)}]"
        text = shown(value.mean, column.digits, column.signed)
        return Cell(text=text, interval=interval, sort=_finite(value.mean))
    if isinstance(value, bool):
        return Cell(text="yes" if value else "no")
    if isinstance(value, int):
        return Cell(text=f"{value:,}".replace(",", "\u202f"), sort=value)
    if isinstance(value, float):
        return Cell(text=shown(value, column.digits, column.signed), sort=_finite(value))
    return Cell(text=str(value), color=column.colors.get(str(value), ""))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def shown(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number as people read it: rounded, with a real minus, thousands set apart, and no sign at
    a zero.
    """
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS).replace(",", "\u202f")


def _escaped(text: str) -> str:
    """Fit for a cell of Markdown: one line, no pipe that ends it, no HTML."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;")
