"""The tables of a study that tell of its runs one by one: numbers, cost, benchmarks, machines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.estimates import Estimate
from rlhf_exp.report.findings import Findings
from rlhf_exp.report.statistics import stratified
from rlhf_exp.report.tables import Column, Table

Row = dict[str, Any]
BENCHMARKED = ("before", "before_stderr", "after", "after_stderr")


def arm_column(findings: Findings) -> Column:
    """The arms by name, with their colors."""
    return Column(key="arm", head="arm", colors=findings.layout.colors)


def known(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that have a value in some row."""
    return [c for c in columns if any(row.get(c.key) is not None for row in rows)]


def runs(findings: Findings) -> Table:
    """One row per run."""
    rows = []
    for record, course in zip(findings.records, findings.courses, strict=True):
        last = {name: record.last.mean(name) for name in record.last.values}
        rows.append(
            {**record.settings, **last, **vars(course), "seed": int(record.seed)}
            | {"tokens": record.tokens, "seconds": record.seconds}
            | {"directory": str(record.run.directory)}
        )
    measured = [
        Column(key="start", head="gold at the start"),
        Column(key="final", head="final gold"),
        Column(key="peak", head="peak gold"),
        Column(key="gap", head="gap", signed=True),
        Column(key="peak_step", head="peak at step"),
        Column(key="peak_kl", head="peak at KL", digits=2),
        Column(key="proxy", head="proxy"),
        Column(key="kl", head="KL (nats)", digits=2),
        Column(key="win", head="win rate"),
        Column(key="length", head="length", digits=1),
        Column(key="tokens", head="tokens sampled"),
        Column(key="seconds", head="seconds", digits=1),
    ]
    colors = findings.layout.colors
    named = [
        Column(key=n, head=n, colors=colors if n == findings.layout.compared else {})
        for n in findings.layout.arms[0].settings
    ]
    seed, where = Column(key="seed", head="seed"), Column(key="directory", head="directory")
    return Table(
        name="runs",
        title="All runs",
        note="One row per run; numbers are means over held-out prompts.",
        columns=[*named, seed, *known(measured, rows), where],
        rows=rows,
    )


def benchmarks(findings: Findings) -> Table:
    """What the runs' summary.json tells of benchmarks."""
    rows = []
    for record in findings.records:
        told = record.summary.get("benchmarks") or {}
        before, after = told.get("before") or {}, told.get("after") or {}
        for task in dict.fromkeys((*before, *after)):
            rows += _benchmark(
                findings.layout.arm(record).name,
                record.seed,
                task,
                before.get(task, {}),
                after.get(task, {}),
            )
    named = [Column(key=k, head=k) for k in ("seed", "task", "metric")]
    heads = {"before_stderr": "± (standard error)", "after_stderr": "± (standard error)"}
    return Table(
        name="benchmarks",
        title="Benchmarks",
        note="Of the start policy and after training, with the standard error over the "
        "benchmark's items.",
        columns=[
            arm_column(findings),
            *named,
            *(Column(key=k, head=heads.get(k, k)) for k in BENCHMARKED),
        ],
        rows=rows,
    )


def _benchmark(arm: str, seed: str, task: str, before: Row, after: Row) -> list[Row]:
    names = [n for n in dict.fromkeys((*before, *after)) if "_stderr" not in n]
    rows = []
    for name in names:
        metric, comma, kind = name.partition(",")  # lm-eval names its filters behind a comma
        error = f"{metric}_stderr{comma}{kind}"
        values = (before.get(name), before.get(error), after.get(name), after.get(error))
        named = {"arm": arm, "seed": int(seed), "task": task, "metric": name}
        rows.append(named | dict(zip(BENCHMARKED, map(_number, values), strict=True)))
    return rows


def _number(value: Any) -> float | None:
    """lm-eval writes N/A where there is no standard error."""
    return float(value) if isinstance(value, int | float) else None


def cost(findings: Findings) -> Table:
    """Tokens and seconds by arm, and what they bought."""
    rows = []
    for arm in findings.layout.arms:
        tokens = [r.tokens for r in arm.records if r.tokens is not None]
        row: Row = {"arm": arm.name, "runs": len(arm.records)}
        row["seconds"] = _mean([r.seconds for r in arm.records])
        if len(tokens) == len(arm.records) and any(tokens):
            row["tokens"] = _mean(tokens)
            gain = findings.summaries[arm.name]["gain"].mean
            row["gain_per_million"] = 1e6 * gain / row["tokens"].mean
        rows.append(row)
    columns = [
        Column(key="tokens", head="tokens sampled", interval=True, digits=0),
        Column(key="seconds", head="seconds of training", interval=True, digits=1),
        Column(key="gain_per_million", head="gold gained per million tokens", signed=True),
    ]
    return Table(
        name="cost",
        title="Cost",
        note="Per run, means over seeds [95 % interval], of the training steps alone; seconds "
        "depend on the machine and on what else it did.",
        columns=[arm_column(findings), Column(key="runs", head="runs"), *known(columns, rows)],
        rows=rows,
    )


def _mean(values: Sequence[float]) -> Estimate:
    return stratified([np.array(values, dtype=float)])


def circumstances(findings: Findings) -> Table:
    """Versions, revision and machine, and how many runs had which."""
    counted = Counter(
        (name, value) for record in findings.records for name, value in _circumstances(record.about)
    )
    differing = Counter(name for name, _ in counted)
    rows = [
        {"what": name, "value": value, "runs": count, "differs": differing[name] > 1}
        for (name, value), count in counted.items()
    ]
    return Table(
        name="circumstances",
        title="Versions and machines",
        note="What the runs were made with; several rows of a name: runs differ in it.",
        columns=[
            Column(key="what", head="what"),
            Column(key="value", head="value"),
            Column(key="runs", head="runs"),
            Column(key="differs", head="differs"),
        ],
        rows=sorted(rows, key=lambda row: not row["differs"]),
    )


def _circumstances(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = dict(about.get("versions") or {}) | {"git revision": about.get("git") or "unknown"}
    return [(k, str(v)) for k, v in (told | dict(about.get("machine") or {})).items()]
