"""The evaluations that a run has written, as arrays by prompt; what is wrong with one is told in a
sentence.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.evaluation.summary import evaluation_files

NEEDED = ("gold", "proxy", "k1", "length")  # columns that every evaluation must have


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation of a run."""

    step: int  # n, for best-of-n
    metrics: dict[str, float]  # means over the completions, and what only a whole evaluation has
    # by column of the rows, booleans as 0 and 1: means over each prompt's completions, float64 [P]
    values: dict[str, np.ndarray]

    def mean(self, name: str) -> float:
        """Mean of a column over the prompts."""
        return float(self.values[name].mean())


def read(directory: Path) -> tuple[tuple[str, ...], tuple[Evaluated, ...]]:
    """The prompts of a run and its evaluations, by step. ValueError if there are none, if one is
    damaged or lacks gold, or if they have other prompts.
    """
    paths = files(directory)
    if not paths:
        raise ValueError(
            f"{directory} is finished and has no evaluation/step-*.json: give runs with the "
            "stage align"
        )
    prompts, found = (), []
    for path in paths:
        asked, evaluated = _evaluated(path, directory)
        if found and asked != prompts:
            raise ValueError(
                f"{path} has other prompts than {paths[0].name}, so nothing can be compared within "
                "the run: start it again in a new directory"
            )
        prompts = asked
        found.append(evaluated)
    return prompts, tuple(found)


def files(directory: Path) -> list[Path]:
    """The evaluation files of a run, by step."""
    return evaluation_files(directory / "evaluation")


def content(path: Path) -> dict[str, Any]:
    """What an evaluation file holds; ValueError if it is not whole."""
    try:
        found = json.loads(path.read_bytes())
        if not found["rows"] or not all("prompt" in {**row} for row in found["rows"]):
            raise ValueError
        _ = found["step"] + 0, {**found["metrics"]}
        return found
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged or cut short: copy it again from where the run was made, or start "
            "the run again in a new directory"
        ) from None


def _evaluated(path: Path, directory: Path) -> tuple[tuple[str, ...], Evaluated]:
    whole = content(path)
    rows = whole["rows"]
    if not all("gold" in row for row in rows):
        raise ValueError(
            f"{path} has rows without gold: add it with: "
            f"python -m rlhf_exp stages=[evaluate] run={directory}"
        )
    columns = _columns(rows)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(f"{path} is damaged: not every row has a number as {', '.join(missing)}")
    metrics = {k: float(v) for k, v in whole["metrics"].items() if isinstance(v, int | float)}
    for name, column in (columns | metrics).items():
        if np.isnan(column).any() or (name in NEEDED and not np.isfinite(column).all()):
            raise ValueError(
                f"{path} holds {name} that is no finite number: the run has diverged; leave it out "
                "or start it again with a lower learning rate"
            )
    prompts, values = _by_prompt([row["prompt"] for row in rows], columns)
    return prompts, Evaluated(step=int(whole["step"]), metrics=metrics, values=values)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The columns that are numbers in every row, float64 [N]."""
    found = {}
    for name in rows[0]:
        with suppress(KeyError, ValueError):
            column = np.array([row[name] for row in rows])
            if column.dtype.kind in "biuf" and column.ndim == 1:
                found[name] = column.astype(np.float64)
    return found


def _by_prompt(
    asked: list[str], columns: dict[str, np.ndarray]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The prompts in order of first appearance, and means over each prompt's rows [P]."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(asked))}
    where = np.array([index[prompt] for prompt in asked])
    counts = np.bincount(where)
    means = {k: np.bincount(where, column) / counts for k, column in columns.items()}
    return tuple(index), means
