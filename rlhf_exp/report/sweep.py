"""The runs of a sweep side by side, from their stored files alone: which settings did what.

A table for the terminal (`show`), and in the sweep's directory sweep.md, sweep.csv and figures/
(`write`).
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

from rlhf_exp.artifacts import write_text
from rlhf_exp.report.settings import SEED, Settings, differing, label, short, without_seed
from rlhf_exp.runs import ORDER, Run

WIDTH = 120  # columns of a terminal
GAP = 2  # between two of its cells
NARROWEST = 8  # a setting's column in it
MEASURED = ("gold", "proxy", "kl", "length")  # of summary.json, after training
GROUPED = ("gold", "proxy", "kl")
HEADS = {"number": "job", "kl": "KL", "length": "tokens", "interval": "95 % interval"}
Row = dict[str, Any]


def rows(jobs: Sequence[Run]) -> list[Row]:
    """One row per job: number, settings (name -> text), state, step, steps, gold, gold_low,
    gold_high, proxy, kl (nats), length (tokens), seconds (of its training steps) and error; None
    where it is not known. The numbers are means over held-out prompts after training.
    """
    return [
        {
            "number": i if job.number is None else job.number,
            "settings": settings,
            "state": job.state,
            "step": job.step,
            "steps": job.steps,
            **_after(job),
            "seconds": _seconds(job.directory / "metrics.jsonl"),
            "error": job.error,
        }
        for i, (job, settings) in enumerate(zip(jobs, differing(jobs), strict=True))
    ]


def _after(job: Run) -> Row:
    """What summary.json says of a finished run."""
    try:
        summary = json.loads((job.directory / "summary.json").read_text())
        after = {name: summary[name]["after"] for name in MEASURED}
    except (OSError, ValueError, KeyError):
        after = {}
    found: Row = {"gold": None, "gold_low": None, "gold_high": None}
    found |= {name: after.get(name, {}).get("mean") for name in MEASURED}
    if after:
        found["gold_low"], found["gold_high"] = after["gold"]["interval"]
    return found


def _seconds(metrics: Path) -> float | None:
    """Seconds that the logged steps took, interruptions left out."""
    if not metrics.exists():
        return None
    return sum(v for row in logged(metrics) for k, v in row.items() if k.startswith("time/"))


def logged(metrics: Path) -> list[Row]:
    """The rows of metrics.jsonl; what a killed process has cut short is left out."""
    found = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def over_seeds(table: Sequence[Row]) -> list[Row]:
    """One row per setting without the seed: settings, count of finished runs, and for gold, proxy
    and kl their mean, lowest and highest (or None); empty where no seeds differ.
    """
    if not any(SEED in row["settings"] for row in table):
        return []
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        groups.setdefault(tuple(without_seed(row["settings"]).values()), []).append(row)
    return [
        {
            "settings": without_seed(group[0]["settings"]),
            "count": sum(row["state"] == "finished" for row in group),
            **{name: _spread([row[name] for row in group]) for name in GROUPED},
        }
        for group in groups.values()
    ]


def _spread(values: list[float | None]) -> tuple[float, float, float] | None:
    known = [value for value in values if value is not None]
    return (math.fsum(known) / len(known), min(known), max(known)) if known else None


# ------------------------------------------------------------------------------------ the terminal


def show(jobs: Sequence[Run]) -> str:
    """The table in at most 120 columns, why runs failed or were given up, and how many are in
    which state.
    """
    table = rows(jobs)
    names = list(table[0]["settings"]) if table else []
    text, left_out = _fitted(table, names)
    if left_out:
        text.append(shorten(f"{len(left_out)} more settings differ: {', '.join(left_out)}", WIDTH))
    return "\n".join([*text, *_errors(table), counts(jobs)])


def _fitted(table: Sequence[Row], names: list[str]) -> tuple[list[str], list[str]]:
    """Lines of at most WIDTH columns: settings are cut, then left out, the last ones first but for
    the seed; and the names of those.
    """
    shown, left_out = list(names), []
    while True:
        head, lines = _cells(table, shown)
        head[1 : 1 + len(shown)] = short(shown)
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        settings = range(1, 1 + len(shown))
        while sum(widths) + GAP * (len(widths) - 1) > WIDTH:
            widest = max(settings, key=lambda i: widths[i], default=0)
            if not widest or widths[widest] <= NARROWEST:
                break
            widths[widest] -= 1
        else:
            return [_line(line, widths, 1 + len(shown)) for line in [head, *lines]], left_out
        assert shown, "the table is too wide without settings"
        left_out.insert(0, shown.pop(-2 if shown[-1] == SEED and len(shown) > 1 else -1))


def _cells(table: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table, for the terminal and for sweep.md."""
    measured = ["gold", "interval", "proxy", "kl", "length"]
    head = ["number", *names, "state", "step", *measured, "seconds"]
    lines = [
        [
            str(row["number"]),
            *(row["settings"][name] for name in names),
            row["state"],
            _step(row),
            _fixed(row["gold"], 3),
            _range(row["gold_low"], row["gold_high"]),
            *(_fixed(row[name], digits) for name, digits in (("proxy", 3), ("kl", 2))),
            *(_fixed(row[name], digits) for name, digits in (("length", 1), ("seconds", 0))),
        ]
        for row in table
    ]
    return [HEADS.get(name, name) for name in head], lines


def _line(cells: Sequence[str], widths: Sequence[int], text: int) -> str:
    """The first `text` cells and the state to the left, numbers to the right."""
    fitted = [
        cell if len(cell) <= width else f"{cell[: width - 1]}…"
        for cell, width in zip(cells, widths, strict=True)
    ]
    aligned = [
        f"{cell:<{width}}" if i <= text else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(fitted, widths, strict=True))
    ]
    return (" " * GAP).join(aligned).rstrip()


def _errors(table: Sequence[Row]) -> list[str]:
    return [
        fill(f"job {row['number']} {row['state']}: {row['error']}", WIDTH, subsequent_indent="    ")
        for row in table
        if row["error"]
    ]


def counts(jobs: Sequence[Run]) -> str:
    """9 finished, 1 running, 1 failed, 1 missing"""
    found = Counter(job.state for job in jobs)
    told = [f"{found[state]} {state}" for state in ORDER if found[state]]
    return ", ".join(told) or "no jobs"


def _step(row: Row) -> str:
    if row["step"] is None:
        return "-"
    return f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"])


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


# --------------------------------------------------------------------------------------- the files


def write(folder: Path, jobs: Sequence[Run]) -> None:
    """Write sweep.md, sweep.csv and, of the finished runs, figures/ to `folder`."""
    from rlhf_exp.report.sweep_figures import draw

    table = rows(jobs)
    drawn = draw(folder / "figures", jobs, table)
    write_text(folder / "sweep.md", as_markdown(folder.name, jobs, table, drawn))
    _write_csv(folder / "sweep.csv", table)


def as_markdown(name: str, jobs: Sequence[Run], table: Sequence[Row], drawn: Sequence[str]) -> str:
    """sweep.md: the runs, the same over seeds, what is not finished, and the figures."""
    names = list(table[0]["settings"]) if table else []
    parts = [
        f"# Sweep {name}",
        f"{counts(jobs)}. Gold, proxy, KL to the start (nats) and length (tokens) are means over "
        "held-out prompts after training, with the 95 % bootstrap interval of gold; seconds are "
        "those of the training steps.",
        _table(*_cells(table, names)),
    ]
    if grouped := over_seeds(table):
        parts += [
            "## Over seeds",
            "Mean, lowest and highest of the finished runs.",
            _seeds(grouped),
        ]
    if left := [row for row in table if row["state"] != "finished"]:
        parts += ["## Not finished", "\n".join(map(_unfinished, left))]
    parts += [f"![{Path(file).stem.replace('_', ' ')}](figures/{file})" for file in drawn]
    return "\n\n".join(parts) + "\n"


def _seeds(grouped: Sequence[Row]) -> str:
    head = [*grouped[0]["settings"], "runs", *(HEADS.get(name, name) for name in GROUPED)]
    return _table(
        head,
        [
            [
                *group["settings"].values(),
                str(group["count"]),
                *(
                    "-" if group[k] is None else f"{_fixed(group[k][0], 3)} {_range(*group[k][1:])}"
                    for k in GROUPED
                ),
            ]
            for group in grouped
        ],
    )


def _unfinished(row: Row) -> str:
    settings = label(row["settings"])
    what = f"- job {row['number']}{f' ({settings})' if settings else ''}: {row['state']}"
    return f"{what}: {row['error']}" if row["error"] else what


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [head, *lines]]
    cells.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _write_csv(path: Path, table: Sequence[Row]) -> None:
    """All numbers in full; settings before the numbers, named as on the command line."""
    names: Settings = table[0]["settings"] if table else {}
    columns = [name for name in (table[0] if table else ()) if name not in ("number", "settings")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", *names, *columns])
        for row in table:
            cells = [row[name] for name in columns]
            writer.writerow([row["number"], *row["settings"].values(), *cells])
