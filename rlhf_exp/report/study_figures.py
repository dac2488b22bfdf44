"""Figures of a study: gold and proxy on the way from the start, gold at the end and at its peak,
the contrasts. One color per value of the setting that is compared, one panel per choice of the
others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import numpy as np

from rlhf_exp.report.contrasts import Contrast
from rlhf_exp.report.drawing import DRAWN, INK, Figure, save
from rlhf_exp.report.estimates import Difference, Estimate
from rlhf_exp.report.findings import Findings, Point
from rlhf_exp.report.layout import Arm, Layout, named
from rlhf_exp.report.look import GREY, PALETTE, Look
from rlhf_exp.report.overoptimization import Fit
from rlhf_exp.report.tables import MINUS

PANELS = 12  # drawn at most; the tables hold all
ROWS = 48  # arms or contrasts drawn at most in one figure
WIDE, HIGH = 9.6, 3.0  # inches of a figure, of a row of panels
SHADE = 0.16
WRAPPED = 46  # columns of a label
KL_AXIS = "√KL to the start (√nats)"
COLORS = {"higher": PALETTE[2], "lower": PALETTE[1], "open": GREY}  # by verdict


def draw(folder: Path, findings: Findings) -> list[Figure]:
    """Write every figure to `folder` as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots = [by_kl, final, peak_and_final, by_step]
    if findings.contrasts:
        plots.insert(3, forest)
    with plt.rc_context(DRAWN):
        return [plot(plt, folder, findings) for plot in plots]


def by_kl(plt: Any, folder: Path, findings: Findings) -> Figure:
    """Gold and proxy over sqrt(KL), a panel per choice of the other settings."""
    layout = findings.layout
    drawn, panels = _panels(plt, layout)
    for axes, arms in panels:
        for arm in arms:
            look, points = layout.looks[arm.value], findings.curves[arm.name]
            x = [math.sqrt(max(0.0, p.kl)) for p in points]  # an estimate below 0 is noise
            _line(axes, x, [p.gold for p in points], look)
            faint = {"color": look["color"], "linestyle": "--", "linewidth": 1.0, "alpha": 0.7}
            _line(axes, x, [p.proxy for p in points], faint, shade=SHADE / 2)
            if found := findings.fits.get(arm.name):
                _fitted(axes, look["color"], points, found)
    drawn.supxlabel(KL_AXIS, fontsize=9)
    drawn.supylabel("mean score on held-out prompts", fontsize=9)
    styles: dict[str, Look] = {"gold": {}, "proxy": {"linestyle": "--", "alpha": 0.7}}
    caption = (
        "Solid: gold; dashed: proxy; means over seeds at each evaluation; bands: 95 % "
        "intervals over seeds, for these prompts. Where gold falls while proxy goes on rising, the "
        "proxy is over-optimized."
    )
    if findings.fits:
        styles["fit to gold"] = {"linestyle": ":"}
        caption += " Dotted: the form of Gao et al. (2022), fitted to gold."
    _legend(plt, drawn, layout, styles)
    caption += _not_drawn(len(layout.panels), PANELS, "panels")
    title = "Gold and proxy on the way from the start"
    return save(drawn, folder, "gold_and_proxy_by_kl", title, caption)


def by_step(plt: Any, folder: Path, findings: Findings) -> Figure:
    """Gold over steps, with the same panels."""
    layout = findings.layout
    drawn, panels = _panels(plt, layout)
    for axes, arms in panels:
        for arm in arms:
            points = findings.curves[arm.name]
            _line(axes, [p.step for p in points], [p.gold for p in points], layout.looks[arm.value])
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn.supxlabel("step (best-of-n: n)", fontsize=9)
    drawn.supylabel("mean gold on held-out prompts", fontsize=9)
    _legend(plt, drawn, layout, {})
    caption = (
        "Means over seeds at each evaluation; bands: 95 % intervals over seeds, for these prompts."
    )
    caption += _not_drawn(len(layout.panels), PANELS, "panels")
    return save(drawn, folder, "gold_by_step", "Gold by step", caption)


def final(plt: Any, folder: Path, findings: Findings) -> Figure:
    """Gold of each arm after training: a dot per seed, mean with interval, IQM."""
    drawn, axes, places = _rows(plt, findings.layout)
    for arm, y in places:
        color = findings.layout.looks[arm.value]["color"]
        found = findings.summaries[arm.name]["final"]
        seeds = [record.last.mean("gold") for record in arm.records]
        axes.plot(seeds, [y + 0.2] * len(seeds), "o", color=color, markersize=4, alpha=0.6)
        if found.low is not None:
            axes.plot([found.low, found.high], [y - 0.12] * 2, color=color, linewidth=2)
        axes.plot([found.mean], [y - 0.12], "D", color=color, markersize=5)
        axes.plot([found.iqm.mean], [y - 0.12], "|", color=INK, markersize=11)
    axes.set_xlabel("gold after training, mean over held-out prompts")
    caption = (
        "Dots: seeds; diamond and bar: their mean and its 95 % interval over seeds and prompts "
        "(all arms answer the same prompts, so arms differ more surely than these bars suggest: "
        "see the contrasts); tick: interquartile mean."
    )
    caption += _not_drawn(len(findings.layout.arms), ROWS, "arms")
    return save(drawn, folder, "final_gold", "Gold after training", caption)


def peak_and_final(plt: Any, folder: Path, findings: Findings) -> Figure:
    """From the peak of gold to its end."""
    drawn, axes, places = _rows(plt, findings.layout)
    for arm, y in places:
        color = findings.layout.looks[arm.value]["color"]
        peak, end = (findings.summaries[arm.name][name].mean for name in ("peak", "final"))
        axes.plot([peak, end], [y, y], color=color, linewidth=2, alpha=0.6)
        axes.plot([peak], [y], "o", color=color, markerfacecolor="none", markersize=7)
        axes.plot([end], [y], "o", color=color, markersize=4.5)
    axes.set_xlabel("gold, mean over held-out prompts and seeds")
    caption = (
        "Ring: gold at its peak; dot: gold after training; between them the over-optimization "
        "gap. Peaks are picked on other prompts than those that measure them, so a gap may be "
        "negative (dot right of ring)."
    )
    caption += _not_drawn(len(findings.layout.arms), ROWS, "arms")
    return save(drawn, folder, "peak_and_final", "Peak and end of gold", caption)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the forest plot."""

    name: str
    difference: Difference
    within: bool = False  # in one of several strata


def forest(plt: Any, folder: Path, findings: Findings) -> Figure:
    """Differences of final gold with their intervals; filled where the interval excludes 0."""
    lines = [line for contrast in findings.contrasts for line in _lines(contrast)]
    if len(lines) > ROWS:  # strata are in the table
        lines = [line for line in lines if not line.within]
    shown = lines[:ROWS]
    size = WIDE, 0.9 + 0.27 * len(shown)
    drawn, axes = plt.subplots(figsize=size, layout="constrained")
    axes.axvline(0, color=INK, linewidth=0.9)
    for y, line in enumerate(shown):
        found = line.difference
        color = COLORS[found.verdict]
        face = "none" if found.verdict == "open" else color
        if found.low is not None:
            width = 1.1 if line.within else 2.2
            axes.plot([found.low, found.high], [y, y], color=color, linewidth=width)
        size = 4 if line.within else 6
        axes.plot([found.mean], [y], "s", color=color, markerfacecolor=face, markersize=size)
    names = [shorten(line.name, 72, placeholder="…") for line in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    for text, line in zip(axes.get_yticklabels(), shown, strict=True):
        text.set_alpha(0.75 if line.within else 1.0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("difference of gold after training")
    caption = (
        "Mean difference and its 95 % interval. Filled: the interval excludes 0; hollow and grey: "
        "open. Thin: within one stratum, the other settings as named."
    )
    caption += _not_drawn(len(lines), ROWS, "contrasts")
    return save(drawn, folder, "contrasts", "Contrasts of final gold", caption)


def _lines(contrast: Contrast) -> list[Line]:
    name = f"{contrast.axis}: {contrast.value} {MINUS} {contrast.against}"
    if contrast.overall is None:
        return []
    if len(contrast.strata) == 1:
        name += f" ({named(contrast.strata[0].settings)})"
        return [Line(name=name, difference=contrast.overall)]
    return [Line(name=name, difference=contrast.overall)] + [
        Line(name=named(s.settings), difference=s.difference, within=True) for s in contrast.strata
    ]


def _not_drawn(count: int, limit: int, what: str) -> str:
    return f" The first {limit} of {count} {what} are drawn." if count > limit else ""


def _panels(plt: Any, layout: Layout) -> tuple[Any, list[tuple[Any, list[Arm]]]]:
    """The figure, and axes and arms of each panel that is drawn."""
    shown = list(layout.panels.items())[:PANELS]
    across = min(len(shown), 2 if len(shown) == 4 else 3)
    down = math.ceil(len(shown) / across)
    size = WIDE if across > 1 else 0.8 * WIDE, max(HIGH * down, 3.8) + 0.4
    drawn, grid = plt.subplots(
        down, across, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    panels = []
    for axes, (name, arms) in zip(grid.flat, shown, strict=False):
        axes.set_title(fill(name, 90 // across), fontsize=9)
        panels.append((axes, arms))
    return drawn, panels


def _fitted(axes: Any, color: str, points: Sequence[Point], fit: Fit) -> None:
    """The fit, from the start as far as the runs went."""
    d = np.linspace(0, fit.reached, 61)[1:]
    axes.plot(d, points[0].gold.mean + fit(d), ":", color=color, linewidth=1.0)


def _line(
    axes: Any, x: Sequence[float], estimates: Sequence[Estimate], look: Look, shade: float = SHADE
) -> None:
    """Means, and a band where there are intervals."""
    axes.plot(x, [e.mean for e in estimates], **{"markersize": 3.2, "linewidth": 1.5} | look)
    known = [(at, e.low, e.high) for at, e in zip(x, estimates, strict=True) if e.low is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=look["color"], alpha=shade, linewidth=0)


def _legend(plt: Any, drawn: Any, layout: Layout, styles: dict[str, Look]) -> None:
    """Above the panels: the values of the setting that is compared, then the styles of lines."""
    handles = []
    if layout.compared:
        handles += [
            plt.Line2D([], [], markersize=4, label=shorten(value, 40, placeholder="…"), **look)
            for value, look in layout.looks.items()
        ]
    handles += [
        plt.Line2D([], [], color=INK, label=name, **style) for name, style in styles.items()
    ]
    if handles:
        title = layout.compared or None
        drawn.legend(
            handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5,
            title=title, title_fontsize=8.5, alignment="left",
        )  # fmt: skip


def _rows(plt: Any, layout: Layout) -> tuple[Any, Any, list[tuple[Arm, float]]]:
    """The figure, its axes, and the arms that are drawn, top to bottom, a gap between panels."""
    places = []
    for i, group in enumerate(layout.panels.values()):
        places += [(arm, len(places) + k + 0.6 * i) for k, arm in enumerate(group)]
    places = places[:ROWS]
    heights = [y for _, y in places]
    size = WIDE, 1.0 + 0.33 * (heights[-1] + 1)
    drawn, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_yticks(heights, [fill(arm.name, WRAPPED) for arm, _ in places], fontsize=8)
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    axes.grid(visible=False, axis="y")
    return drawn, axes, places
