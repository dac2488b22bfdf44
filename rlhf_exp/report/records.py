"""Stored runs as a study reads them: what each was asked to do, and its evaluations as arrays.

Only finished runs with whole evaluations count; every directory that is passed over is named with
the reason, so that no conclusion rests on runs that are silently missing. Runs that were pruned or
failed are missing from an arm not by chance: an arm looks better without them.
"""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf_exp import runs
from rlhf_exp.report import evaluations
from rlhf_exp.report.evaluations import Evaluated
from rlhf_exp.report.settings import Settings, differing, label, without_seed
from rlhf_exp.report.sweep import logged
from rlhf_exp.runs import Run

NOMINAL = "rlhf_exp.algorithms.best_of_n."  # algorithms whose KL is a formula, not measured
ALL = "all runs"
REASONS = 3  # told of a study in which nothing is usable
GO_ON = "python -m rlhf_exp resume="
CURES = {
    "partial": "continue it with: " + GO_ON + "{0}",
    "running": "wait for it",
    "queued": "wait for it",
    "failed": "mend that and continue it with: " + GO_ON + "{0}",
    "pruned": "start it with pruning=null to see its end",
    "missing": "start the command that asked for it again",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished run."""

    run: Run
    settings: Settings  # in which the runs of the study differ, without the seed
    seed: str
    prompts: tuple[str, ...]  # in order of first appearance, the same in all evaluations
    evaluations: tuple[Evaluated, ...]  # by step
    summary: dict[str, Any] = field(repr=False)  # summary.json; empty if there is none
    about: dict[str, Any] = field(repr=False)  # run.json without the config
    tokens: int | None  # sampled while training, if the algorithm tells
    seconds: float  # of the training steps

    @property
    def arm(self) -> str:
        """What its seeds have in common, on one line."""
        return label(self.settings) or ALL

    @property
    def nominal(self) -> bool:
        """Whether its KL is the nominal one of best-of-n: an upper bound (Beirami et al. 2024)."""
        return str(self.run.config["algo"]["_target_"]).startswith(NOMINAL)

    @property
    def first(self) -> Evaluated:
        """The evaluation before training."""
        return self.evaluations[0]

    @property
    def last(self) -> Evaluated:
        """The evaluation after training."""
        return self.evaluations[-1]

    def table(self, name: str) -> np.ndarray:
        """A column of all evaluations [E, P]; KeyError if one of them lacks it."""
        return np.stack([evaluated.values[name] for evaluated in self.evaluations])

    def curve(self, name: str) -> np.ndarray:
        """Means of a column over the prompts, by evaluation [E]."""
        return self.table(name).mean(1)

    @cached_property
    def first_rows(self) -> list[dict[str, Any]]:
        """The raw rows of the first evaluation, one per completion, read when asked for."""
        return evaluations.content(evaluations.files(self.run.directory)[0])["rows"]

    @cached_property
    def last_rows(self) -> list[dict[str, Any]]:
        """The raw rows of the last evaluation."""
        return evaluations.content(evaluations.files(self.run.directory)[-1])["rows"]


def read(patterns: Sequence[str]) -> tuple[list[Record], list[str]]:
    """The finished runs that the patterns name, and of each directory that is not used why, in one
    sentence. A pattern is a folder or a glob (`~` is the home); what it matches is a run, a sweep
    (all its jobs, wherever they ran) or a folder below which runs lie.

    FileNotFoundError if a pattern matches nothing, ValueError if no run is usable.
    """
    left_out: list[str] = []
    found = [d for pattern in patterns for d in _matched(pattern, left_out)]
    records = _once(load(found, left_out), left_out)
    if not records:
        more = f" (and {len(left_out) - REASONS} more)" if len(left_out) > REASONS else ""
        asked, why = ", ".join(patterns), "; ".join(left_out[:REASONS])
        raise ValueError(f"runs={asked} holds no finished run that can be used: {why}{more}")
    return records, left_out


def load(directories: Iterable[Path], left_out: list[str]) -> list[Record]:
    """The records of these run directories, each run once; to `left_out` is added why others are
    none.
    """
    found: dict[str, dict[str, Any]] = {}
    for directory in dict.fromkeys(d.absolute() for d in directories):
        try:
            run = _usable(directory)
            if same := found.get(run.fingerprint):
                raise ValueError(f"{directory} is the same run as {same['run'].directory}")
            found[run.fingerprint] = _parts(run)
        except (ValueError, OSError) as error:
            left_out.append(str(error))
    told = differing([parts["run"] for parts in found.values()])
    return [
        Record(settings=without_seed(settings), **parts)
        for settings, parts in zip(told, found.values(), strict=True)
    ]


def _once(records: list[Record], left_out: list[str]) -> list[Record]:
    """One run for each seed of an arm: a second one, of a config that an older version wrote with
    fewer keys, is no further seed.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        first = found.setdefault((record.arm, record.seed), record)
        if first is not record:
            left_out.append(
                f"{record.run.directory} has the settings and the seed of {first.run.directory}, "
                "though another version wrote its config"
            )
    return list(found.values())


def _matched(pattern: str, left_out: list[str]) -> list[Path]:
    """The run directories at or below what a pattern matches."""
    path = Path(pattern).expanduser()
    # unlike Path.glob, glob.glob passes hidden folders over
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207
    if not matches:
        raise FileNotFoundError(
            f"runs={pattern} matches nothing: give run directories, or a folder of them, such as "
            "'multirun/2026-01-31/12-00-00/*'"
        )
    found: list[Path] = []
    for folder in filter(Path.is_dir, matches):
        below = [*runs.directories(folder), *_jobs(folder, left_out)]
        torn = [
            f"{d} has results and no run.json, so what its run did is not known: restore the file "
            "or remove the directory"
            for d in _torn(folder)
        ]
        found += below
        left_out += torn
        if not below and not torn:
            left_out.append(f"{folder} has no run.json, nor a run below it: give run directories")
    return found


def _torn(folder: Path, depth: int = runs.DEPTH) -> Iterator[Path]:
    """Directories at or below `folder` that hold what a run leaves, but not what it was."""
    entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    if "run.json" in names:
        return
    if names & {"metrics.jsonl", "evaluation"}:
        yield folder
    elif depth:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _torn(entry, depth - 1)


def _jobs(folder: Path, left_out: list[str]) -> list[Path]:
    """Where the jobs of a sweep lie; of those that were never begun it is told."""
    if not (folder / "sweep.json").exists():
        return []
    try:
        jobs = runs.sweep(folder)
    except ValueError as error:
        left_out.append(str(error))
        return []
    begun = [job for job in jobs if (job.directory / "run.json").exists()]
    left_out += [_unfinished(job) for job in jobs if job not in begun]
    return [job.directory for job in begun]


def _usable(directory: Path) -> Run:
    """The finished run in `directory`; ValueError if there is none."""
    run = runs.read(directory)
    if run.state != "finished":
        raise ValueError(_unfinished(run))
    algo = run.config.get("algo")
    if not isinstance(algo, dict) or "_target_" not in algo or "seed" not in run.config:
        raise ValueError(f"{directory}/run.json names no algo or seed: it is no run of rlhf_exp")
    asked = directory / ".hydra" / "overrides.yaml"
    with suppress(OSError, yaml.YAMLError):  # what it says is in the config, too
        given = yaml.safe_load(asked.read_text())
        return replace(run, overrides=tuple(map(str, given or ())))
    return run


def _unfinished(run: Run) -> str:
    steps = f", {run.step} of {run.steps} steps done" if run.step and run.steps else ""
    error = f": {run.error}" if run.error else ""
    cure = CURES[run.state].format(run.directory)
    return f"{run.directory} is not finished ({run.state}{steps}{error}); {cure}"


def _parts(run: Run) -> dict[str, Any]:
    """All of a record but its settings."""
    prompts, found = evaluations.read(run.directory)
    about = json.loads((run.directory / "run.json").read_bytes())
    tokens, seconds = _cost(run.directory / "metrics.jsonl")
    return {
        "run": run,
        "seed": str(about.pop("config")["seed"]),
        "prompts": prompts,
        "evaluations": found,
        "summary": _summary(run.directory / "summary.json"),
        "about": about,
        "tokens": tokens,
        "seconds": seconds,
    }


def _summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        raise ValueError(
            f"{path} is damaged: write it again with: "
            f"python -m rlhf_exp stages=[evaluate] run={path.parent}"
        ) from None


def _cost(metrics: Path) -> tuple[int | None, float]:
    """Tokens sampled (None if no row tells their rate) and seconds, over the training steps."""
    tokens, seconds, told = 0.0, 0.0, False
    for row in logged(metrics) if metrics.exists() else []:
        took = sum(v for k, v in row.items() if k.startswith("time/"))
        seconds += took
        if "tokens_per_second" in row:
            told = True
            tokens += row["tokens_per_second"] * took
    return (round(tokens) if told else None), seconds
