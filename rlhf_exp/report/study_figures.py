"""Figures of a study: gold and proxy on the way from the start, gold at the end and at its peak,
the contrasts. One color per value of the setting that is compared, one panel per choice of the
others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

from rlhf_exp.report.drawing import DRAWN, INK, Figure, save
from rlhf_exp.report.layout import Arm, Layout
from rlhf_exp.report.look import GREY
from rlhf_exp.report.tables import Estimate

PANELS = 12  # drawn at most; the tables hold all
ROWS = 48  # arms or contrasts drawn at most in one figure
ACROSS = 3  # panels in a row
WIDE, HIGH = 9.6, 3.0  # inches of a figure, of a row of panels
SHADE = 0.16
WRAPPED = 46  # columns of a label


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm at one of its evaluations: means over its seeds."""

    step: int
    kl: float  # nats
    gold: Estimate
    proxy: Estimate


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the forest plot."""

    name: str
    estimate: Estimate
    within: bool = False  # of one stratum, not over all


Curves = Mapping[str, Sequence[Point]]  # by the name of the arm
Fits = Mapping[str, Callable[[float], float]]  # gold by sqrt(KL), by the name of the arm


def plotting() -> Any:
    """matplotlib.pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def by_kl(folder: Path, layout: Layout, curves: Curves, fits: Fits) -> Figure:
    """Gold and proxy over sqrt(KL), a panel per choice of the other settings."""
    plt = plotting()
    with plt.rc_context(DRAWN):
        drawn, panels = _panels(plt, layout)
        for axes, arms in panels:
            for arm in arms:
                _way(axes, arm, layout, curves[arm.name])
                if arm.name in fits:
                    _fitted(
                        axes, layout.looks[arm.value]["color"], curves[arm.name], fits[arm.name]
                    )
        drawn.supxlabel("√KL to the start (√nats)", fontsize=9)
        drawn.supylabel("mean score on held-out prompts", fontsize=9)
        styles = {"gold": {"linestyle": "-"}, "proxy": {"linestyle": "--", "alpha": 0.6}}
        if fits:
            styles["fit to gold (Gao et al.)"] = {"linestyle": ":"}
        _legend(plt, drawn, layout, styles)
        caption = (
            "Solid: gold; dashed: proxy; means over seeds at each evaluation, bands their 95 % "
            "intervals. Where gold falls while proxy goes on rising, the proxy is over-optimized."
        )
        if fits:
            caption += " Dotted: the form of Gao et al. (2022), fitted to gold."
        return save(
            drawn,
            folder,
            "gold_and_proxy_by_kl",
            *_told(
                "Gold and proxy on the way from the start",
                caption,
                len(layout.panels),
                PANELS,
                "panels",
            ),
        )


def by_step(folder: Path, layout: Layout, curves: Curves) -> Figure:
    """Gold over steps, with the same panels."""
    plt = plotting()
    with plt.rc_context(DRAWN):
        drawn, panels = _panels(plt, layout)
        for axes, arms in panels:
            for arm in arms:
                points = curves[arm.name]
                _line(
                    axes,
                    [p.step for p in points],
                    [p.gold for p in points],
                    layout.looks[arm.value],
                )
        drawn.supxlabel("step (best-of-n: n)", fontsize=9)
        drawn.supylabel("mean gold on held-out prompts", fontsize=9)
        _legend(plt, drawn, layout, {})
        caption = "Means over seeds at each evaluation, bands their 95 % intervals."
        return save(
            drawn,
            folder,
            "gold_by_step",
            *_told("Gold by step", caption, len(layout.panels), PANELS, "panels"),
        )


def final(
    folder: Path, layout: Layout, golds: Mapping[str, Sequence[float]],
    means: Mapping[str, Estimate], iqms: Mapping[str, Estimate],
) -> Figure:  # fmt: skip
    """Gold of each arm after training: a dot per seed, mean with interval, IQM."""
    plt = plotting()
    arms, places = _rows(layout)
    with plt.rc_context(DRAWN):
        drawn, axes = plt.subplots(figsize=(WIDE, _tall(places)), layout="constrained")
        for arm, y in zip(arms, places, strict=True):
            color = layout.looks[arm.value]["color"]
            values = golds[arm.name]
            axes.plot(values, [y + 0.22] * len(values), "o", color=color, markersize=4, alpha=0.55)
            _interval(axes, means[arm.name], y - 0.08, color)
            axes.plot([means[arm.name].value], [y - 0.08], "D", color=color, markersize=5)
            axes.plot([iqms[arm.name].value], [y - 0.08], "|", color=INK, markersize=11)
        _named(axes, layout, arms, places)
        axes.set_xlabel("gold after training, mean over held-out prompts")
        caption = (
            "Dots: seeds; diamond and bar: mean and its 95 % interval over seeds; tick: "
            "interquartile mean."
        )
        return save(
            drawn,
            folder,
            "final_gold",
            *_told("Gold after training", caption, len(layout.arms), ROWS, "arms"),
        )


def peak_and_final(
    folder: Path, layout: Layout, peaks: Mapping[str, float], finals: Mapping[str, float]
) -> Figure:
    """From the peak of gold to its end: what training on went over to."""
    plt = plotting()
    arms, places = _rows(layout)
    with plt.rc_context(DRAWN):
        drawn, axes = plt.subplots(figsize=(WIDE, _tall(places)), layout="constrained")
        for arm, y in zip(arms, places, strict=True):
            color = layout.looks[arm.value]["color"]
            peak, end = peaks[arm.name], finals[arm.name]
            axes.plot([peak, end], [y, y], color=color, linewidth=2, alpha=0.6)
            axes.plot([peak], [y], "o", color=color, markerfacecolor="none", markersize=6.5)
            axes.plot([end], [y], "o", color=color, markersize=5)
        _named(axes, layout, arms, places)
        axes.set_xlabel("gold, mean over held-out prompts and seeds")
        caption = "Ring: gold at its peak; dot: gold after training; between them the over-optimization gap."
        return save(
            drawn,
            folder,
            "peak_and_final",
            *_told("Peak and end of gold", caption, len(layout.arms), ROWS, "arms"),
        )


def forest(folder: Path, lines: Sequence[Line], what: str) -> Figure:
    """Differences with their intervals, one line each; filled where the interval excludes 0."""
    plt = plotting()
    shown = lines[:ROWS]
    with plt.rc_context(DRAWN):
        tall = 0.9 + 0.27 * len(shown)
        drawn, axes = plt.subplots(figsize=(WIDE, tall), layout="constrained")
        axes.axvline(0, color=INK, linewidth=0.9)
        for y, line in enumerate(shown):
            color = _verdict_color(line.estimate)
            face = "none" if color == GREY else color
            _interval(axes, line.estimate, y, color, width=1.1 if line.within else 2.0)
            size = 4 if line.within else 6
            axes.plot(
                [line.estimate.value], [y], "s", color=color, markerfacecolor=face, markersize=size
            )
        names = [("    " if line.within else "") + shorten(line.name, 90) for line in shown]
        axes.set_yticks(range(len(shown)), [fill(name, 60) for name in names], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(what)
        caption = (
            "Mean difference and 95 % interval, paired by seed and prompt where both have them. Filled: the "
            "interval excludes 0; hollow and grey: open. Small: within one stratum, the other "
            "settings as named."
        )
        return save(
            drawn,
            folder,
            "contrasts",
            *_told("Contrasts of final gold", caption, len(lines), ROWS, "contrasts"),
        )


def _told(title: str, caption: str, count: int, limit: int, what: str) -> tuple[str, str]:
    """Title and caption, which says what is not drawn."""
    if count > limit:
        caption += f" The first {limit} of {count} {what} are drawn; the tables hold all."
    return title, caption


def _panels(plt: Any, layout: Layout) -> tuple[Any, list[tuple[Any, list[Arm]]]]:
    """The figure, and axes and arms of each panel that is drawn."""
    shown = list(layout.panels.items())[:PANELS]
    across = min(ACROSS, len(shown))
    down = math.ceil(len(shown) / across)
    size = WIDE if across > 1 else 0.75 * WIDE, max(HIGH * down, 3.8) + 0.5
    drawn, grid = plt.subplots(
        down, across, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, _) in zip(grid.flat, shown, strict=False):
        axes.set_title(fill(name, WRAPPED - 8 * across), fontsize=9)
    return drawn, [(axes, arms) for axes, (_, arms) in zip(grid.flat, shown, strict=False)]


def _way(axes: Any, arm: Arm, layout: Layout, points: Sequence[Point]) -> None:
    """Gold and proxy of one arm over sqrt(KL)."""
    look = layout.looks[arm.value]
    x = [_root(p.kl) for p in points]
    _line(axes, x, [p.gold for p in points], look)
    proxies = [p.proxy.value for p in points]
    axes.plot(x, proxies, "--", color=look["color"], linewidth=1.0, alpha=0.6)


def _fitted(axes: Any, color: str, points: Sequence[Point], fit: Callable[[float], float]) -> None:
    """The fit, from the start as far as the runs went."""
    end = max(_root(p.kl) for p in points)
    x = [end * i / 60 for i in range(1, 61)]
    axes.plot(x, [fit(d) for d in x], ":", color=color, linewidth=1.0)


def _line(axes: Any, x: Sequence[float], estimates: Sequence[Estimate], look: Any) -> None:
    """Means, and a band where there are intervals."""
    axes.plot(x, [e.value for e in estimates], markersize=3.2, linewidth=1.5, **look)
    known = [(at, e.low, e.high) for at, e in zip(x, estimates, strict=True) if e.low is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=look["color"], alpha=SHADE, linewidth=0)


def _legend(plt: Any, drawn: Any, layout: Layout, styles: Mapping[str, Any]) -> None:
    """Above the panels: the values of the setting that is compared, and the styles of the lines."""
    handles = [plt.Line2D([], [], color=INK, label=name, **style) for name, style in styles.items()]
    if layout.compared:
        handles += [
            plt.Line2D(
                [], [], markersize=4, label=f"{layout.compared}={shorten(value, 40)}", **look
            )
            for value, look in layout.looks.items()
        ]
    if handles:
        drawn.legend(
            handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5
        )


def _rows(layout: Layout) -> tuple[list[Arm], list[float]]:
    """The arms that are drawn and where, a gap between panels."""
    arms: list[Arm] = []
    places: list[float] = []
    for i, group in enumerate(layout.panels.values()):
        for arm in group:
            places.append(len(arms) + 0.6 * i)
            arms.append(arm)
    return arms[:ROWS], places[:ROWS]


def _tall(places: Sequence[float]) -> float:
    return 1.0 + 0.33 * (places[-1] + 1)


def _named(axes: Any, layout: Layout, arms: Sequence[Arm], places: Sequence[float]) -> None:
    """Arms by name from top to bottom."""
    axes.set_yticks(places, [fill(arm.name, WRAPPED) for arm in arms], fontsize=8)
    axes.set_ylim(places[-1] + 0.7, places[0] - 0.7)
    axes.grid(visible=False, axis="y")


def _interval(axes: Any, estimate: Estimate, y: float, color: str, width: float = 2.0) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [y, y], color=color, linewidth=width)


def _verdict_color(estimate: Estimate) -> str:
    """Grey unless the interval excludes 0."""
    if estimate.low is None or estimate.high is None or estimate.low <= 0 <= estimate.high:
        return GREY
    return "#009e73" if estimate.low > 0 else "#d55e00"


def _root(kl: float) -> float:
    """sqrt(KL); an estimate below 0 is noise about 0."""
    return math.sqrt(max(0.0, kl))
