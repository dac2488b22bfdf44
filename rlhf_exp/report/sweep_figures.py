"""Figures of a sweep: gold and proxy on the way from the start, gold by step, gold at the end."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from rlhf_exp.report.look import GREY, LOOK
from rlhf_exp.report.settings import label, without_seed
from rlhf_exp.report.sweep import Row, logged
from rlhf_exp.runs import Run

COLORS = (
    "#1f5fa8", "#d55e00", "#2e7d4f", "#a6409d", "#b8860b", "#56b4e9",
    "#a8321f", "#4a4a4a", "#6fbf73", "#e07bb0", "#7a4b2a", "#8c8cd9",
)  # fmt: skip
MARKERS = "osD^vP"  # tell apart settings whose colors are the same
WRAPPED = 44  # columns of a label
ROWS = 34  # of a legend, before it gets another column
GOLD, PROXY, KL = (f"evaluation/{name}" for name in ("reward/gold", "reward/proxy", "kl/k1"))
SCORE = "mean score on held-out prompts"
Group = list[tuple[Row, list[Row]]]  # the row of each run of a setting, and its evaluations


def draw(folder: Path, jobs: Sequence[Run], table: Sequence[Row]) -> list[str]:
    """Write gold_and_proxy_by_kl.png, gold_by_step.png and final_gold.png of the finished ones
    among `jobs`, whose rows are `table`, to `folder`; returns their names.
    """
    groups = _grouped(jobs, table)
    if not groups:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rows = sum(name.count("\n") + 1 for name in groups) + 3
    columns = math.ceil(rows / ROWS)
    size = 5.5 + 2.9 * columns, max(3.8, 0.8 + 0.17 * min(rows, ROWS))
    tall = max(2.2, 0.9 + 0.15 * rows)
    plots: dict[str, tuple[Callable[..., None], tuple[float, float]]] = {
        "gold_and_proxy_by_kl": (_by_kl, size),
        "gold_by_step": (_by_step, size),
        "final_gold": (_final, (6.5, tall)),
    }
    with plt.rc_context(LOOK):
        for name, (plot, inches) in plots.items():
            figure, axes = plt.subplots(figsize=inches, layout="constrained")
            plot(axes, groups)
            if handles := axes.get_legend_handles_labels()[0]:
                figure.legend(
                    handles=handles,
                    loc="outside right upper",
                    frameon=False,
                    fontsize=8,
                    ncols=columns,
                )
            figure.savefig(folder / f"{name}.png", dpi=150)
            plt.close(figure)
    return [f"{name}.png" for name in plots]


def _grouped(jobs: Sequence[Run], table: Sequence[Row]) -> dict[str, Group]:
    """Finished runs that were evaluated, by the label of their setting without the seed."""
    groups: dict[str, Group] = {}
    for job, row in zip(jobs, table, strict=True):
        if job.state == "finished" and (evaluations := _evaluations(job.directory)):
            name = label(without_seed(row["settings"])) or "all runs"
            groups.setdefault(fill(name, WRAPPED), []).append((row, evaluations))
    return groups


def _evaluations(directory: Path) -> list[Row]:
    """Step and means of each evaluation of a run, as logged or, where none were, as written."""
    metrics = directory / "metrics.jsonl"
    found = [row for row in (logged(metrics) if metrics.exists() else []) if GOLD in row]
    if found:
        return found
    files = sorted((directory / "evaluation").glob("step-*.json"))
    read = [json.loads(file.read_text()) for file in files]
    return [
        {"step": e["step"]} | {f"evaluation/{k}": v for k, v in e["metrics"].items()} for e in read
    ]


def _looks(groups: dict[str, Group]) -> list[dict[str, Any]]:
    """Color and marker of each setting."""
    return [
        {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i // len(COLORS) % len(MARKERS)]}
        for i in range(len(groups))
    ]


def _by_kl(axes: Any, groups: dict[str, Group]) -> None:
    for style, name in (("-", "gold"), ("--", "proxy")):
        axes.plot([], [], style, color=GREY, label=name)
    for (name, group), look in zip(groups.items(), _looks(groups), strict=True):
        for i, (_, evaluations) in enumerate(group):
            x = [max(0.0, e[KL]) ** 0.5 for e in evaluations]
            gold, proxy = ([e[key] for e in evaluations] for key in (GOLD, PROXY))
            shown = {"label": name} if i == 0 else {}
            axes.plot(x, gold, markersize=3, linewidth=1.3, alpha=0.9, **look, **shown)
            axes.plot(x, proxy, "--", linewidth=0.9, alpha=0.5, color=look["color"])
    axes.set(xlabel="√KL to the start (√nats)", ylabel=SCORE)


def _by_step(axes: Any, groups: dict[str, Group]) -> None:
    for (name, group), look in zip(groups.items(), _looks(groups), strict=True):
        curves = [{e["step"]: e[GOLD] for e in evaluations} for _, evaluations in group]
        steps = sorted(set.intersection(*map(set, curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        means = [sum(found) / len(found) for found in values]
        axes.plot(steps, means, label=name, markersize=3, linewidth=1.5, **look)
        if len(curves) > 1:
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
    seeds = max(map(len, groups.values()))
    axes.set(xlabel="step", ylabel="gold" + (", mean and range over seeds" if seeds > 1 else ""))


def _final(axes: Any, groups: dict[str, Group]) -> None:
    for y, (group, look) in enumerate(zip(groups.values(), _looks(groups), strict=True)):
        values = [evaluations[-1][GOLD] for _, evaluations in group]
        axes.plot(values, [y] * len(values), linestyle="", markersize=5, alpha=0.7, **look)
        axes.plot([sum(values) / len(values)], [y], "|", color="black", markersize=13)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("gold after training: a dot per run, a bar for their mean")
