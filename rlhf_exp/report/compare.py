"""Two finished runs side by side: what was set differently, and what came of it.

One run a side is one seed a side: the intervals are over prompts, for these two policies.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from rlhf_exp.artifacts import write_json
from rlhf_exp.report import records
from rlhf_exp.report.contrasts import comparable
from rlhf_exp.report.overoptimization import at_kl, course
from rlhf_exp.report.records import Record
from rlhf_exp.report.settings import differing
from rlhf_exp.report.statistics import difference

WIDTH = 120  # columns of a terminal
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the largest KL that both reach
COLUMNS = {"gold": "gold", "proxy": "proxy", "k1": "KL (nats)", "length": "length (tokens)"}
NOTE = "one seed a side: intervals are over prompts and say nothing of other seeds"
UNPAIRED = "they were asked other prompts, so that nothing is paired"


def compare(run: Path, against: Path) -> dict[str, Any]:
    """`run` minus `against`, as plain values for JSON. FileNotFoundError or ValueError in one
    sentence for what is no finished run of ours, or twice the same.
    """
    first, second = _pair(run, against)
    paired = first.prompts == second.prompts
    told = differing([first.run, second.run])
    common = [k for k in first.last.metrics if k in second.last.metrics]
    return {
        "run": str(first.run.directory),
        "against": str(second.run.directory),
        "settings": {name: [settings[name] for settings in told] for name in told[0]},
        "seeds": [first.seed, second.seed],
        "prompts": [len(first.prompts), len(second.prompts)],
        "paired": paired,
        "note": NOTE if paired else f"{NOTE}; {UNPAIRED}",
        "after": {name: _difference(first, second, name) for name in COLUMNS},
        "equal_kl": _at_equal_kl(first, second),
        "course": [asdict(course(record)) for record in (first, second)],
        "metrics": {k: [r.last.metrics[k] for r in (first, second)] for k in common},
        "cost": [_cost(record) for record in (first, second)],
    }


def _pair(run: Path, against: Path) -> tuple[Record, Record]:
    for key, path in (("run", run), ("against", against)):
        if not path.expanduser().is_dir():
            raise FileNotFoundError(f"{key}={path} is no directory: give that of a finished run")
    left_out: list[str] = []
    found = records.load([run.expanduser(), against.expanduser()], left_out)
    if left_out:
        raise ValueError(left_out[0])
    if len(found) < 2:
        raise ValueError(f"run={run} and against={against} are one directory: give two")
    return found[0], found[1]


def _difference(first: Record, second: Record, name: str) -> dict[str, Any]:
    values = [record.last.values[name] for record in (first, second)]
    return _told(first, second, *values)


def _told(first: Record, second: Record, one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
    """Means of values [P] of either run, and their difference."""
    paired = first.prompts == second.prompts
    found = difference(
        [one[None]],
        [two[None]],
        paired=paired,
        prompts=[first.prompts] if paired else [first.prompts, second.prompts],
        wins=comparable(first, second),
    )
    return {
        "means": [float(one.mean()), float(two.mean())],
        "difference": asdict(found) | {"verdict": found.verdict, "told": found.told},
    }


def _at_equal_kl(first: Record, second: Record) -> list[dict[str, Any]]:
    """Gold at the largest KL that both reach, and at shares of it."""
    largest = min(float(record.curve("k1").max()) for record in (first, second))
    found = []
    for share in SHARES if largest > 0 else ():
        one, two = (at_kl(record, share * largest) for record in (first, second))
        if one is not None and two is not None:
            found.append({"kl": share * largest} | _told(first, second, one, two))
    return found


def _cost(record: Record) -> dict[str, Any]:
    return {"steps": record.run.step, "seconds": record.seconds, "tokens": record.tokens}


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Write compare.json to `folder` and return its path."""
    path = folder / "compare.json"
    write_json(path, found)
    return path


# ------------------------------------------------------------------------------------ the terminal


def as_text(found: dict[str, Any]) -> str:
    """For the terminal, at most 120 columns."""
    lines = [f"run      {found['run']}", f"against  {found['against']}", ""]
    lines += _table("setting", [(name, *values) for name, values in found["settings"].items()])
    after = found["after"]
    lines += ["", *_table("after training", [_row(COLUMNS[k], after[k]) for k in COLUMNS])]
    lines += _wins(after["gold"]["difference"])
    if equal := found["equal_kl"]:
        rows = [_row(f"gold at {e['kl']:.2f} nats", e) for e in equal]
        lines += ["", *_table("at equal KL", rows)]
    else:
        lines += ["", "no KL is reached by both"]
    metrics = [(k, *map(_number, values)) for k, values in found["metrics"].items()]
    lines += ["", *_table("metric", metrics)]
    costs = [(k, *(_number(cost[k]) for cost in found["cost"])) for k in found["cost"][0]]
    lines += ["", *_table("cost", costs), "", fill(found["note"], WIDTH)]
    return "\n".join(_cut(line) for line in lines)


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    told = entry["difference"]["told"].partition(";")[0]  # the note below says the rest
    return name, *(f"{mean:.3f}" for mean in entry["means"]), told


def _wins(told: dict[str, Any]) -> list[str]:
    rate = told["win_rate"]
    if rate is None:
        return []
    interval = "" if rate["low"] is None else f" [{rate['low']:.3f}, {rate['high']:.3f}]"
    return [f"gold is higher than against's for {rate['mean']:.3f}{interval} of prompts, ties half"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns for the name, the run, the other, and what is told of their difference."""
    if not rows:
        return []
    lines = [(head, "run", "against", *["difference"] * (len(rows[0]) - 3)), *rows]
    widths = [min(40, max(len(line[i]) for line in lines)) for i in range(3)]
    return [
        "  ".join(
            [f"{line[0]:<{widths[0]}}"]
            + [f"{text:>{w}}" for text, w in zip(line[1:3], widths[1:], strict=True)]
            + list(line[3:])
        )
        for line in lines
    ]


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
