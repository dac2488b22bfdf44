"""Best-of-n curves of several runs and seeds as one table and one figure.

    python -m rlhf_exp.report.best_of_n RUN...                 what the runs hold
    python -m rlhf_exp.report.best_of_n RUN... --out FOLDER --uwo-weights 0 0.2 2
                                                               other rankings, from stored scores

Needs no model: other objectives, weights and n are computed from the member scores in the runs'
pools. Folders written by tlc4418/llm_optimization are read too.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.artifacts import write_json
from rlhf_exp.evaluation.best_of_n import RESULTS, STATISTICS, Curves, kl_bon
from rlhf_exp.report.look import LOOK
from rlhf_exp.worker import guarded

COLORS = ("#1f5fa8", "#b8860b", "#2e7d4f", "#a8321f", "#6a4c93", "#4a4a4a", "#c2569b", "#3a9ca6")


def report(runs: list[Path], out: Path, *, standardise: bool = False) -> dict[str, Any]:
    """Merge the curves below `runs` and write curves.json, curves.csv and curves.png to `out`.

    `standardise` takes off each folder's mean over all answers and divides by their (population)
    standard deviation, so that every curve starts at 0.
    """
    groups: dict[str, list[Path]] = {}
    for run in runs:
        for folder in curve_folders(run):
            groups.setdefault(group_of(folder.name), []).append(folder)
    table = {
        "runs": [str(run) for run in runs],
        "standardised": standardise,
        "answer_length": average_length([f for found in groups.values() for f in found]),
        "curves": {name: merge(found, standardise) for name, found in groups.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "curves.json", table)
    _write_csv(out / "curves.csv", table["curves"])
    draw(table, out / "curves.png")
    return table


def curve_folders(run: Path) -> list[Path]:
    """The folders of curves of a run, or in a folder of them."""
    inner = run / "best_of_n" if (run / "best_of_n").is_dir() else run
    found = sorted(path.parent for path in inner.glob(f"*/{RESULTS}"))
    if not found:
        raise FileNotFoundError(f"{run} holds no */{RESULTS}: make them with algo=best_of_n")
    return found


def group_of(name: str) -> str:
    """What a folder is a seed of: reward models that differ by seed are one group, `single`."""
    return "single" if re.fullmatch(r"seed\d+", name) else re.sub(r"_seeds[\d-]+$", "", name)


def merge(folders: list[Path], standardise: bool = False) -> list[dict[str, Any]]:
    """Mean and population standard deviation over the folders for each n."""
    curves = [json.loads((folder / RESULTS).read_text()) for folder in folders]
    ns = [row["n"] for row in curves[0]]
    scores = {}
    for name in ("proxy", "gold"):
        rows = []
        for folder, curve in zip(folders, curves, strict=True):
            if [row["n"] for row in curve] != ns:
                raise ValueError(
                    f"{folder} and {folders[0]} have other n: recompute both with the same --ns"
                )
            values = np.array([row[f"{name}_score"] for row in curve])
            rows.append(_standardised(values, folder, name) if standardise else values)
        scores[name] = np.stack(rows)
    return [
        {"n": n, "kl_bon": kl_bon(n), "curves": len(folders)}
        | {f"{name}_mean": float(x[:, i].mean()) for name, x in scores.items()}
        | {f"{name}_std": float(x[:, i].std()) for name, x in scores.items()}
        for i, n in enumerate(ns)
    ]


def _standardised(values: np.ndarray, folder: Path, name: str) -> np.ndarray:
    moments = _statistics(folder)[name]
    if not moments["std"] > 0:
        raise ValueError(f"{folder}: all {name} scores are equal, so nothing can be standardised")
    return (values - moments["mean"]) / moments["std"]


def _statistics(folder: Path) -> dict[str, Any]:
    path = folder / STATISTICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {STATISTICS}: only folders of ours can be used")
    return json.loads(path.read_text())


def average_length(folders: list[Path]) -> dict[str, float]:
    """Mean answer length over those folders that know it, in words and tokens."""
    found = [_statistics(f)["answer_length"] for f in folders if (f / STATISTICS).is_file()]
    units = {unit for lengths in found for unit in lengths}
    return {
        unit: float(np.mean([lengths[unit] for lengths in found if unit in lengths]))
        for unit in sorted(units)
    }


def _write_csv(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    rows = [{"ranking": name} | row for name, curve in curves.items() for row in curve]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(table: dict[str, Any], path: Path) -> None:
    """Gold on the left axis, proxy on the right, over the nominal KL on a square-root scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit = ", standardised" if table["standardised"] else ""
    look: dict[Any, Any] = {**LOOK, "axes.spines.right": True}
    with plt.rc_context(look):
        figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
        right = left.twinx()
        for (name, curve), color in zip(table["curves"].items(), COLORS * 9, strict=False):
            x = [row["kl_bon"] for row in curve]
            for axes, score, style in ((left, "gold", "-"), (right, "proxy", "--")):
                mean = np.array([row[f"{score}_mean"] for row in curve])
                std = np.array([row[f"{score}_std"] for row in curve])
                axes.plot(x, mean, style, color=color, linewidth=1.3, label=name)
                axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        left.set_xscale("function", functions=(np.sqrt, np.square))
        left.set_xlim(left=0)
        left.set(xlabel="nominal KL of best-of-n (nats, √ scale)", ylabel=f"gold (solid){unit}")
        right.set_ylabel(f"proxy (dashed){unit}")
        right.grid(visible=False)
        left.legend(frameon=False, fontsize=7)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def recompute(run: Path, out: Path, settings: Curves) -> None:
    """Curves of a run under other settings, from its stored scores, in the new folder `out`."""
    pool = run if run.is_file() else run / "best_of_n" / "pool.jsonl"
    if not pool.is_file():
        raise FileNotFoundError(f"{run} is neither a pool of scored answers nor a run with one")
    if out.exists():
        raise ValueError(f"{out} is there already: give another --out")
    settings.write(pool, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--out", type=Path, help="where to; the first run's best_of_n/ if not given"
    )
    parser.add_argument("--standardise", action="store_true", help="every curve starts at 0")
    parser.add_argument("--ns", nargs="+", type=int)
    parser.add_argument("--big-n", type=int)
    parser.add_argument("--on-too-large", choices=("error", "skip"))
    parser.add_argument("--objectives", nargs="*")
    parser.add_argument("--uwo-weights", nargs="+", type=float)
    parser.add_argument("--variance")
    sys.exit(guarded(lambda: _command(parser.parse_args())))


def _command(args: argparse.Namespace) -> None:
    given = {f.name: getattr(args, f.name, None) for f in fields(Curves)}
    changes = {name: value for name, value in given.items() if value is not None}
    runs = args.runs
    if changes:
        if args.out is None:
            raise ValueError("other rankings need a folder of their own: give --out")
        settings = Curves(**changes)
        runs = [args.out / str(i) for i in range(len(args.runs))]
        for run, folder in zip(args.runs, runs, strict=True):
            recompute(run, folder, settings)
    out = args.out or args.runs[0] / "best_of_n"
    report(runs, out, standardise=args.standardise)
    print(out / "curves.json", out / "curves.csv", out / "curves.png", sep="\n")


if __name__ == "__main__":
    main()
