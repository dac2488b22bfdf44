"""The arithmetic of benchmarks: from what lm_eval found of each example to means, of groups too,
with standard errors.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, float]]


@dataclass
class Score:
    """One metric of a task or group."""

    mean: float
    stderr: float | None
    examples: list[str]  # which ones: their hashes
    values: list[float]  # one for each; none if the metric is no mean


def scores_of(leaf: Any, name: str, out: Any) -> dict[str, Score]:
    """What lm_eval found of one task, by metric; metric/filter where a task has several."""
    from lm_eval.api.metrics import mean

    found = {}
    results = {k: v for k, v in out["results"][name].items() if isinstance(v, float | int)}
    keys = [k.partition(",")[::2] for k in results if "," in k and "_stderr," not in k]
    for metric, kind in keys:
        alone = [m for m, _ in keys].count(metric) == 1
        rows = [s for s in out["samples"][name] if s["filter"] == kind and metric in s]
        averaged = leaf.aggregation().get(metric) is mean
        values = [float(s[metric]) for s in rows] if averaged else []
        found[metric if alone else f"{metric}/{kind}"] = Score(
            float(results[f"{metric},{kind}"]),
            standard_error(values),
            [s["doc_hash"] for s in rows],
            values,
        )
    return found


def standard_error(values: list[float]) -> float | None:
    """Of the mean: sd / sqrt(n), the sd with n - 1; None if fewer than two values tell nothing."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def pooled(members: list[dict[str, Score]]) -> dict[str, Score]:
    """The unweighted mean of a group's members, metric by metric that all of them have."""
    common = [m for m in members[0] if all(m in scores for scores in members)]
    return {metric: _pool([scores[metric] for scores in members]) for metric in common}


def _pool(scores: list[Score]) -> Score:
    center = statistics.fmean(s.mean for s in scores)
    if all(s.values and s.examples == scores[0].examples for s in scores):
        rows = zip(*(s.values for s in scores), strict=True)
        values = [statistics.fmean(row) for row in rows]
        return Score(center, standard_error(values), scores[0].examples, values)
    errors = [s.stderr for s in scores if s.stderr is not None]
    independent = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return Score(center, independent, [], [])


def spread(members: list[dict[str, Score]]) -> dict[str, float]:
    """The best member minus the worst, by metric."""
    found = {metric: [scores[metric].mean for scores in members] for metric in pooled(members)}
    return {f"{metric}_spread": max(means) - min(means) for metric, means in found.items()}


def told(scores: dict[str, Score]) -> dict[str, float]:
    """Mean and standard error of each metric."""
    found: dict[str, float] = {}
    for metric, score in scores.items():
        found[metric] = score.mean
        if score.stderr is not None:
            found[f"{metric}_stderr"] = score.stderr
    return found


def metric_of(wanted: str | None, scores: dict[str, float]) -> str:
    """The one that the table and the average take."""
    return next(m for m in scores if wanted is None or m.partition("/")[0] == wanted)


def headline(wanted: str | None, scores: dict[str, float]) -> Score:
    """The score of a benchmark that the average takes."""
    metric = metric_of(wanted, scores)
    return Score(scores[metric], scores.get(f"{metric}_stderr"), [], [])


def average(headlines: list[Score]) -> Results:
    """The plain mean of several benchmarks."""
    return {"average": told({"score": _pool(headlines)})} if len(headlines) > 1 else {}


def plus_minus(value: float, error: float | None) -> str:
    """A value with its standard error, if there is one."""
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
