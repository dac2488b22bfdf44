"""What fitting probes found, from one plain dict: report.json, report.csv, report.md and figures.

The dict holds `chosen` (probe, layer, sign, selected_by), `data` (examples per split, templates,
passages cut), `rows` (one per split, probe, layer and ensembling, with an interval per metric),
`separability` by layer, `zero_shot` (a row or null), `transfer` (names, auroc, and trained_on where
there are more rows than names; or null) and perhaps `notes`.
"""

import csv
from pathlib import Path
from typing import Any

from rlhf_exp.artifacts import write_json
from rlhf_exp.probes.metrics import METRICS
from rlhf_exp.report.look import GREY, LOOK, PROXY

ENSEMBLING = "partial"  # the layer is chosen by it, so probes are compared by it
RANDOM, ZERO_SHOT = "random", "LM zero-shot"
OTHERS = ("#d55e00", "#009e73", "#a6409d", "#b8860b", "#56b4e9", "#7a4b2a", "#c2185b", "#5b7f00")
Report = dict[str, Any]
Row = dict[str, Any]


def write(folder: Path, report: Report) -> None:
    """Write report.{json,csv,md}, by_layer.png and, if there is transfer, transfer.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    write_json(folder / "report.json", report)
    _write_csv(folder / "report.csv", report)
    (folder / "report.md").write_text(as_markdown(report))
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
        _by_layer(axes, report)
        figure.savefig(folder / "by_layer.png", dpi=150)
        plt.close(figure)
        if report["transfer"]:
            size = 2.5 + 0.6 * len(report["transfer"]["names"])
            figure, axes = plt.subplots(figsize=(size, size - 0.5), layout="constrained")
            _transfer(axes, report["transfer"])
            figure.savefig(folder / "transfer.png", dpi=150)
            plt.close(figure)


def ranked(report: Report) -> list[Row]:
    """The report-split row of every probe at its best layer on the selection split (the last among
    equals), with `selection_auroc`, and the zero-shot row; best AUROC first.
    """
    chosen, best = report["chosen"], {}
    for row in sorted(_rows(report, "selection"), key=lambda r: (r["auroc"]["value"], r["layer"])):
        if row["probe"] != chosen["probe"] or row["layer"] == chosen["layer"]:
            best[row["probe"]] = row
    rows = [
        row | {"selection_auroc": best[row["probe"]]["auroc"]["value"]}
        for row in _rows(report, "report")
        if row["layer"] == best[row["probe"]]["layer"]
    ]
    return sorted(rows + _zero_shot(report), key=lambda r: -r["auroc"]["value"])


def as_text(report: Report) -> str:
    """The chosen probe and the eight best ones, with the controls, for the terminal."""
    chosen = report["chosen"]
    rows = ranked(report)
    keep = {RANDOM, ZERO_SHOT, chosen["probe"]}
    shown = [row for i, row in enumerate(rows) if i < 8 or row["probe"] in keep]
    lines = [
        f"probe {chosen['probe']} at layer {chosen['layer']}, by {chosen['selected_by']}",
        f"sign: {chosen['sign']}",
        f"{'':24} {'layer':>5} {'AUROC':>6} {'95 % interval':>15} {'accuracy':>9} {'ECE':>6}",
    ]
    for row in shown:
        auroc, accuracy, ece = (row[k]["value"] for k in ("auroc", "accuracy", "ece"))
        name = ("* " if row["probe"] == chosen["probe"] else "  ") + row["probe"]
        lines.append(
            f"{name:24} {_layer(row):>5} {auroc:6.3f} {_range(row['auroc']):>15} "
            f"{accuracy:9.3f} {ece:6.3f}"
        )
    if len(shown) < len(rows):
        lines.append(f"  and {len(rows) - len(shown)} more in report.md")
    return "\n".join(lines)


def as_markdown(report: Report) -> str:
    """report.md: the choice in words, then every table."""
    chosen, data = report["chosen"], report["data"]
    parts = [
        f"# Probe {chosen['probe']}, layer {chosen['layer']}",
        "\n".join(
            [
                f"- Chosen by {chosen['selected_by']}.",
                f"- Sign: {chosen['sign']}.",
                f"- Fitted on {data['train']} examples, chosen on {data['selection']}, reported on "
                f"{data['report']}; {data['cut']} passages were cut to fit.",
                f"- Templates: {', '.join(data['templates']) or 'unknown'}.",
                "- Intervals are 95 % bootstrap intervals over examples of the report split; those "
                "of the calibration error (ECE) lean upward: resampling adds noise to every bin.",
            ]
        ),
        "## Probes, each at its best layer",
        "The layer is the best on the selection split, the metrics are those of the report split, "
        "each template by itself.",
        _probes(report),
        "![AUROC by layer](by_layer.png)",
        f"## {chosen['probe']} at layer {chosen['layer']} by ensembling",
        "none: every statement alone; partial: one answer minus the other under each template; "
        "full: the same after averaging over templates.",
        _ensemblings(report),
        f"## {chosen['probe']} by layer",
        "Separability is the AUROC with which a linear model tells which answer a normalised state "
        "ends in; 0.5 is wanted.",
        _layers(report),
    ]
    if report["transfer"]:
        parts += [
            "## Transfer",
            "AUROC; rows are trained on, columns evaluated on.",
            _transfers(report["transfer"]),
            "![AUROC of transfer](transfer.png)",
        ]
    if report.get("notes"):
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------ tables


def _probes(report: Report) -> str:
    head = ["probe", "layer", "selection AUROC", "AUROC", "accuracy", "calibrated accuracy", "ECE"]
    rows = []
    for row in ranked(report):
        name = {RANDOM: "random (control)"}.get(row["probe"], row["probe"])
        rows.append(
            [
                f"**{name}**" if row["probe"] == report["chosen"]["probe"] else name,
                _layer(row),
                f"{row['selection_auroc']:.3f}" if "selection_auroc" in row else "-",
                *(_cell(row[k]) for k in ("auroc", "accuracy", "calibrated_accuracy", "ece")),
            ]
        )
    return _table(head, rows)


def _ensemblings(report: Report) -> str:
    chosen = report["chosen"]
    rows = [
        [row["ensembling"], *(_cell(row[k]) for k in METRICS)]
        for row in report["rows"]
        if (row["split"], row["probe"], row["layer"])
        == ("report", chosen["probe"], chosen["layer"])
    ]
    return _table(["ensembling", "accuracy", "AUROC", "calibrated accuracy", "ECE"], rows)


def _layers(report: Report) -> str:
    probe = report["chosen"]["probe"]
    auroc = {
        split: {r["layer"]: r["auroc"] for r in _rows(report, split) if r["probe"] == probe}
        for split in ("train", "selection")
    }
    splits = [split for split, found in auroc.items() if found]
    head = ["layer", *(f"{s} AUROC" for s in splits), "AUROC", "accuracy", "ECE", "separability"]
    rows = []
    for row in _rows(report, "report"):
        if row["probe"] == probe:
            separable = report["separability"].get(str(row["layer"]))
            rows.append(
                [
                    _layer(row),
                    *(f"{auroc[split][row['layer']]['value']:.3f}" for split in splits),
                    *(_cell(row[k]) for k in ("auroc", "accuracy", "ece")),
                    "-" if separable is None else f"{separable:.3f}",
                ]
            )
    return _table(head, rows)


def _transfers(transfer: dict[str, Any]) -> str:
    rows = [
        [f"**{name}**", *(f"{x:.3f}" for x in values)]
        for name, values in zip(_trained_on(transfer), transfer["auroc"], strict=True)
    ]
    return _table(["trained on", *transfer["names"]], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_csv(path: Path, report: Report) -> None:
    """One line per row, each metric with its interval in three columns."""
    keys = ("split", "probe", "layer", "ensembling", "n")
    ends = {"": "value", "_low": "low", "_high": "high"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *(metric + end for metric in METRICS for end in ends)])
        for row in report["rows"] + _zero_shot(report):
            numbers = [row[metric][part] for metric in METRICS for part in ends.values()]
            writer.writerow([row[k] for k in keys] + numbers)


# ----------------------------------------------------------------------------------------- figures


def _by_layer(axes: Any, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    chosen, colors = report["chosen"], iter(OTHERS * len(report["rows"]))
    names = [row["probe"] for row in ranked(report) if row["probe"] != ZERO_SHOT]
    for name in names:
        rows = [row for row in _rows(report, "report") if row["probe"] == name]
        x, y = [row["layer"] for row in rows], [row["auroc"]["value"] for row in rows]
        look: dict[str, Any] = {"linewidth": 1.1, "markersize": 2}
        if name == chosen["probe"]:
            low, high = ([row["auroc"][end] for row in rows] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=PROXY, alpha=0.15, linewidth=0)
            look = {"linewidth": 2.2, "markersize": 4, "color": PROXY, "zorder": 3}
        else:
            look["color"] = GREY if name == RANDOM else next(colors)
        label = f"{name} (chosen)" if name == chosen["probe"] else name
        axes.plot(x, y, "o-", label=label, **look)
    for row in _zero_shot(report):
        axes.axhline(
            row["auroc"]["value"], color="black", linestyle="--", linewidth=1, label=ZERO_SHOT
        )
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.axvline(chosen["layer"], color=PROXY, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="AUROC on the report split")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _transfer(axes: Any, transfer: dict[str, Any]) -> None:
    axes.imshow(transfer["auroc"], cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for i, values in enumerate(transfer["auroc"]):
        for j, x in enumerate(values):
            color = "white" if abs(x - 0.5) > 0.3 else "black"
            axes.text(j, i, f"{x:.2f}", ha="center", va="center", color=color)
    names, trained_on = transfer["names"], _trained_on(transfer)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(trained_on)), trained_on)
    axes.set(xlabel="evaluated on", ylabel="trained on", title="AUROC")
    axes.grid(visible=False)


# ------------------------------------------------------------------------------------------- cells


def _rows(report: Report, split: str) -> list[Row]:
    return [r for r in report["rows"] if (r["split"], r["ensembling"]) == (split, ENSEMBLING)]


def _zero_shot(report: Report) -> list[Row]:
    row = report["zero_shot"]
    return [row | {"probe": ZERO_SHOT, "layer": None}] if row else []


def _trained_on(transfer: dict[str, Any]) -> list[str]:
    return transfer.get("trained_on", transfer["names"])


def _layer(row: Row) -> str:
    return "-" if row["layer"] is None else str(row["layer"])


def _range(interval: dict[str, float]) -> str:
    return f"[{interval['low']:.3f}, {interval['high']:.3f}]"


def _cell(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} {_range(interval)}"
