"""What a study shows as it is: completions of the same prompts side by side, and settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_exp.report.layout import Arm, Layout
from rlhf_exp.report.page import template
from rlhf_exp.report.records import Record
from rlhf_exp.report.tables import MISSING, shown
from rlhf_exp.runs import NO_MATTER

LONGEST = 2000  # characters of a completion that are shown
IGNORED = (*NO_MATTER, "seed", "hardware", "stages")  # decide nothing that is compared
Row = Mapping[str, Any]


def completions(layout: Layout, count: int) -> Markup:
    """The first `count` held-out prompts, with what the start and the first seed of each arm
    answered.
    """
    prompts = layout.arms[0].records[0].prompts[:count]
    samples = [{"prompt": prompt, "cards": _cards(layout, prompt)} for prompt in prompts]
    return Markup(template("samples.html").render(samples=samples))


def first_seed(arm: Arm) -> Record:
    """The run that stands for the arm."""
    return next(record for record in arm.records if record.seed == arm.seeds[0])


def _cards(layout: Layout, prompt: str) -> list[dict[str, str]]:
    """One per different answer at the start, one per arm at the end."""
    starts: dict[str, dict[str, str]] = {}
    ends = []
    for arm in layout.arms:
        record = first_seed(arm)
        if row := _row(record.first_rows, prompt):
            starts.setdefault(str(row.get("completion")), _card(f"start of {arm.name}", row))
        if row := _row(record.last_rows, prompt):
            color = layout.looks[arm.value]["color"]
            ends.append(_card(f"{arm.name}, seed {record.seed}", row, color))
    if len(starts) == 1:
        next(iter(starts.values()))["name"] = "start policy"
    return [*starts.values(), *ends]


def _row(rows: Sequence[Row], prompt: str) -> Row | None:
    return next((row for row in rows if row["prompt"] == prompt), None)


def _card(name: str, row: Row, color: str = "") -> dict[str, str]:
    text = str(row.get("completion") or MISSING)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} [… {len(text) - LONGEST} more characters]"
    scores = f"gold {shown(row.get('gold'))} · proxy {shown(row.get('proxy'))}"
    return {"name": name, "completion": text, "scores": scores, "color": color}


def configs(layout: Layout) -> Markup:
    """The settings that all runs share, and of each arm the others, as JSON."""
    of_arm = {
        arm.name: {k: v for k, v in first_seed(arm).run.config.items() if k not in IGNORED}
        for arm in layout.arms
    }
    shared = _shared([r.run.config for arm in layout.arms for r in arm.records])
    shared = {k: v for k, v in shared.items() if k not in IGNORED}
    parts = [("Settings in common", _text(shared))]
    parts += [(f"Only {name}", _text(_beyond(c, shared))) for name, c in of_arm.items()]
    return Markup(template("configs.html").render(parts=parts))


def _shared(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The keys that have the same value in all nodes; nodes are compared within."""
    first = nodes[0]
    found: dict[str, Any] = {}
    for key, value in first.items():
        if not all(key in node for node in nodes):
            continue
        values = [node[key] for node in nodes]
        if all(other == value for other in values):
            found[key] = value
        elif all(isinstance(other, dict) for other in values) and (inner := _shared(values)):
            found[key] = inner
    return found


def _beyond(node: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What `node` has beside what is shared."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key not in shared:
            found[key] = value
        elif shared[key] != value and (inner := _beyond(value, shared[key])):
            found[key] = inner
    return found


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) if config else "nothing"
