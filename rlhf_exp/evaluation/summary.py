"""What the evaluations of a run come to, from its stored files: before, after, change, peak.

No model is needed, and torch is not imported.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np


def evaluation_files(folder: Path) -> list[Path]:
    """The files of a run's evaluation/, by step."""
    found = {
        int(match[1]): path
        for path in folder.glob("step-*.json")
        if (match := re.fullmatch(r"step-(\d+)\.json", path.name))
    }
    return [found[step] for step in sorted(found)]


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, by step."""
    return [json.loads(p.read_text()) for p in evaluation_files(directory / "evaluation")]


def bootstrap_interval(
    values: list[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    x = np.asarray(values)
    means = x[np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _by_prompt(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Mean over each prompt's completions: those are not independent of each other."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row[key])
    return [math.fsum(values) / len(values) for values in found.values()]


# of a row: its name in the summary
SUMMARISED = {
    "proxy": "proxy", "gold": "gold", "k1": "kl", "length": "length", "win": "win_rate",
    "correct": "accuracy",
}  # fmt: skip


def summary(directory: Path) -> dict[str, Any]:
    """Before and after with 95 % intervals over held-out prompts, the change paired by prompt, the
    peak of gold, and all metrics of both ends. What no evaluation has is left out: the gold may
    not have been asked yet.
    """
    evaluations = read_evaluations(directory)
    first, last = evaluations[0], evaluations[-1]
    table: dict[str, Any] = {"step": last["step"], "completions": len(last["rows"])}
    for key, name in SUMMARISED.items():
        if key not in first["rows"][0] or key not in last["rows"][0]:
            continue
        before, after = (_by_prompt(e["rows"], key) for e in (first, last))
        table["prompts"] = len(after)
        change = [b - a for a, b in zip(before, after, strict=True)]
        table[name] = {
            side: {"mean": math.fsum(x) / len(x), "interval": bootstrap_interval(x)}
            for side, x in (("before", before), ("after", after), ("change", change))
        }
    if all("reward/gold" in e["metrics"] for e in evaluations):
        peak = max(evaluations, key=lambda e: e["metrics"]["reward/gold"])
        names = {"mean": "reward/gold", "kl": "kl/k1"}
        table["gold_peak"] = {"step": peak["step"]} | {
            k: peak["metrics"][name] for k, name in names.items()
        }
    return table | {"metrics": {"before": first["metrics"], "after": last["metrics"]}}
