"""What a search leaves: search.json and search.csv, best first, the table on the screen, and the
figures history.png (one objective) or frontier.png (several).
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rlhf_exp.artifacts import write_json, write_text
from rlhf_exp.report.text import ROWS
from rlhf_exp.search.study import WHY, complete, concluded

NOTES = {TrialState.PRUNED: "gave up", TrialState.FAIL: "failed"}


def ordered(study: Study) -> list[FrozenTrial]:
    """Concluded trials, best first: the Pareto front, what else is complete, pruned, failed."""
    front = {t.number for t in front_of(study)}
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]

    def place(trial: FrozenTrial) -> tuple[Any, ...]:
        known = trial.values if trial.state == TrialState.COMPLETE else None
        best = sign * known[0] if known else 0.0
        return states.index(trial.state), trial.number not in front, best, trial.number

    return sorted(concluded(study), key=place)


def front_of(study: Study) -> list[FrozenTrial]:
    """The trials that no other is better than in every objective, by the first one."""
    return sorted(study.best_trials, key=lambda t: t.values) if complete(study) else []


def rows(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """One per concluded trial: number, state, objectives, parameters, directory."""
    front = {t.number for t in front_of(study)}
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "best": trial.number in front,
            "values": dict(
                zip(names, trial.values if trial.state == TrialState.COMPLETE else (), strict=False)
            ),
            "params": trial.params,
            "directory": trial.user_attrs.get("directory"),
            "why": trial.user_attrs.get(WHY),
        }
        for trial in ordered(study)
    ]


def write(study: Study, names: Sequence[str], directory: Path) -> None:
    """search.json and search.csv, as far as the search has come."""
    found = rows(study, names)
    about = {
        "study": study.study_name,
        "objectives": dict(zip(names, (d.name.lower() for d in study.directions), strict=True)),
        "trials": found,
    }
    write_json(directory / "search.json", about)
    keys = list(dict.fromkeys(k for row in found for k in row["params"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "best", *names, *keys, "directory"])
    for row in found:
        values = [row["values"].get(n) for n in names] + [row["params"].get(k) for k in keys]
        writer.writerow([row["number"], row["state"], row["best"], *values, row["directory"]])
    write_text(directory / "search.csv", text.getvalue())


def table(study: Study, names: Sequence[str]) -> str:
    """The trials in words, best first; with several objectives the front has stars."""
    found = rows(study, names)
    keys = list(dict.fromkeys(k for row in found for k in row["params"]))
    lines = [["trial", *names, *keys, "directory"]]
    for row, trial in zip(found, ordered(study), strict=True):
        values = [f"{v:.4f}" for v in row["values"].values()]
        values = values or [NOTES[trial.state]] + [""] * (len(names) - 1)
        params = [_short(row["params"].get(k)) for k in keys]
        star = "*" if row["best"] and len(names) > 1 else ""
        lines.append([f"{row['number']}{star}", *values, *params, str(row["directory"])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- figures


def draw(study: Study, names: Sequence[str], directory: Path) -> None:
    """history.png, or with two objectives frontier.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rlhf_exp.report.look import LOOK

    plt.rcParams.update(LOOK)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    plot, name = (_history, "history") if len(names) == 1 else (_frontier, "frontier")
    plot(axes, study, names)
    figure.savefig(directory / f"{name}.png", dpi=150)
    plt.close(figure)


def _history(axes: Any, study: Study, names: Sequence[str]) -> None:
    """Every trial, and the best up to each."""
    from rlhf_exp.report.look import GREY, PROXY

    done = complete(study)
    better = max if study.directions[0] == StudyDirection.MAXIMIZE else min
    numbers, values = [t.number for t in done], [t.values[0] for t in done]
    best = [better(values[: i + 1]) for i in range(len(values))]
    axes.plot(numbers, values, "o", color=GREY, markersize=4, label="finished")
    axes.step(numbers, best, where="post", color=PROXY, label="best so far")
    for state, mark, label in (
        (TrialState.PRUNED, "v", "gave up"),
        (TrialState.FAIL, "x", "failed (no value)"),
    ):
        there = [t for t in concluded(study) if t.state == state]
        known = [t.value if t.value is not None else min(values) for t in there]
        if there:
            axes.plot([t.number for t in there], known, mark, color=GREY, label=label)
    axes.set(xlabel="trial", ylabel=ROWS.get(names[0], names[0]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def _frontier(axes: Any, study: Study, names: Sequence[str]) -> None:
    """Every trial, the Pareto front joined and numbered; the second objective lies across."""
    from rlhf_exp.report.look import GREY, PROXY

    front = sorted(front_of(study), key=lambda t: t.values[1])
    done = complete(study)
    axes.plot([t.values[1] for t in done], [t.values[0] for t in done], "o", color=GREY, alpha=0.6)
    x, y = [t.values[1] for t in front], [t.values[0] for t in front]
    axes.plot(x, y, "o-", color=PROXY, label="Pareto front (numbers are trials)")
    for trial, across, up in zip(front, x, y, strict=True):
        axes.annotate(str(trial.number), (across, up), xytext=(4, -11), textcoords="offset points")
    axes.set(xlabel=ROWS.get(names[1], names[1]), ylabel=ROWS.get(names[0], names[0]))
    axes.margins(y=0.12)  # room for the numbers
    axes.legend(frameon=False)
