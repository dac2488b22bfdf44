"""What has become of runs, told by the files in their directories; answers in milliseconds.

| state | how it is told |
|---|---|
| finished | run.json says so: its last write, after the last stage |
| running | a process holds the lease .running, or SLURM says that the job runs |
| queued | SLURM has the job and will start it |
| pruned | pruned.json: the run gave itself up as hopeless |
| failed | failed.json says why; or SLURM ended the job, or does not know it any more |
| partial | the run was begun; nobody works on it |
| missing | nobody has begun it, if it was asked for at all |
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_exp import lease
from rlhf_exp.artifacts import fingerprint

# of several runs that were asked for the same, the one that got furthest counts
ORDER = ("finished", "running", "queued", "pruned", "partial", "failed", "missing")
# settings that decide nothing of what comes out of a run
NO_MATTER = (
    "artifacts", "tracker", "resume", "show_every", "objective", "pruning", "runs", "sweep",
    "checkpoints",
)  # fmt: skip
IN_HARDWARE = ("timeout", "device_memory", "peak_tflops")  # the same, within hardware
BEFORE = NO_MATTER[:4]  # those that older runs were named without
QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
DEPTH = 4  # levels below a root on which runs are looked for
TAIL = 16_384  # bytes at the end of metrics.jsonl in which its last whole row is looked for

Queue = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as its directory tells."""

    directory: Path
    state: str
    fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    error: str | None = None  # why it failed or was given up, in one line
    step: int | None = None  # steps done, as far as logged
    steps: int | None = None  # steps asked for, where the config tells
    checkpoint: int | None = None  # step of the newest checkpoint of a run that is not finished
    job: str | None = None  # SLURM's id
    number: int | None = None  # of the job in its sweep
    overrides: tuple[str, ...] = ()  # that make the job differ from the others of its sweep


class Found(dict[str, Run]):
    """Runs by fingerprint; `left_out` says of each run.json that could not be used why."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[str] = []


def config_fingerprint(config: dict[str, Any]) -> str:
    """Names a run by what decides its outcome; where files lie and who is told does not."""
    kept = {k: v for k, v in config.items() if k not in NO_MATTER}
    if isinstance(hardware := kept.get("hardware"), dict):
        kept["hardware"] = {k: v for k, v in hardware.items() if k not in IN_HARDWARE}
    return fingerprint(kept)


def genuine(about: dict[str, Any]) -> bool:
    """Whether the content of a run.json is what a run has written: its fingerprint fits its config,
    as it is made now or as it was for older runs.
    """
    config = about["config"]
    older = fingerprint({k: v for k, v in config.items() if k not in BEFORE})
    return about["fingerprint"] in (config_fingerprint(config), older)


def read(directory: Path, queue: Queue | None = None) -> Run:
    """The run in `directory`. `queue` tells SLURM's state of each job it knows, by id as in
    job.json; None if SLURM was not asked. ValueError if its run.json is damaged or foreign.
    """
    about = _about(directory / "run.json")
    job = _json(directory / "job.json") or {}
    state, error = _state(directory, about, job, queue)
    config = about["config"]
    algorithm = config.get("algo")
    return Run(
        directory=directory,
        state=state,
        fingerprint=config_fingerprint(config),
        config=config,
        error=error,
        step=_step(directory / "metrics.jsonl"),
        steps=algorithm.get("steps") if isinstance(algorithm, dict) else None,
        checkpoint=None if state == "finished" else _checkpoint(directory / "checkpoints"),
        job=job.get("id"),
    )


def find(roots: Sequence[Path], queue: Queue | None = None) -> Found:
    """Every run below the roots, up to <root>/<date>/<time>/<job>/ and one level more, by
    fingerprint: the one that got furthest, the newest among equals.
    """
    found, rank = Found(), {}
    for directory in dict.fromkeys(d for root in roots for d in directories(root.absolute())):
        try:
            run = read(directory, queue)
            newest = -(directory / "run.json").stat().st_mtime
        except (ValueError, OSError) as error:
            found.left_out.append(str(error))
            continue
        order = ORDER.index(run.state), newest
        if run.fingerprint not in found or order < rank[run.fingerprint]:
            found[run.fingerprint], rank[run.fingerprint] = run, order
    return found


def sweep(folder: Path, queue: Queue | None = None) -> list[Run]:
    """The jobs of a sweep, by number, of its sweep.json; FileNotFoundError if there is none,
    ValueError if it is damaged.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no sweep.json: give the directory of a sweep")
    try:
        jobs = sorted(json.loads(path.read_text())["jobs"], key=lambda job: job["number"])
        return [_job(job, queue) for job in jobs]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: start the sweep again to have it written") from None


def _job(job: dict[str, Any], queue: Queue | None) -> Run:
    directory = Path(job["directory"])
    told = {"number": job["number"], "overrides": tuple(job["overrides"])}
    known = {"fingerprint": job["fingerprint"], "error": job.get("error")}
    missing = Run(directory=directory, state="missing", **known, **told)
    if not (directory / "run.json").exists():
        return missing
    try:
        return replace(read(directory, queue), **told)
    except ValueError as error:
        return replace(missing, error=str(error))


def _state(
    directory: Path, about: dict[str, Any], job: dict[str, Any], queue: Queue | None
) -> tuple[str, str | None]:
    """State and, in one line, what went wrong."""
    if "finished" in about or "artifacts" in about:  # older runs wrote artifacts alone
        return "finished", None
    if lease.alive(directory / lease.RUNNING):
        return "running", None
    told = None if queue is None else queue.get(job.get("id", "")) or "UNKNOWN"
    known = told.split()[0].strip("+") if told else None
    if job and known in QUEUED | RUNNING:
        return ("queued" if known in QUEUED else "running"), None
    if (directory / "failed.json").exists():
        return "failed", _why(_json(directory / "failed.json"))
    if (directory / "pruned.json").exists():
        return "pruned", _given_up(_json(directory / "pruned.json"))
    if job and told:
        return "failed", _lost(job, told)
    return ("partial" if (directory / "run.log").exists() else "missing"), None


def _given_up(pruned: dict[str, Any] | None) -> str:
    if pruned is None or not {"step", "metric", "value", "bound"} <= pruned.keys():
        return "given up; its pruned.json is damaged"
    return (
        f"given up after step {pruned['step']}: {pruned['metric']} was {pruned['value']:.3g}, the "
        f"bound {pruned['bound']:.3g}"
    )


def _why(failed: dict[str, Any] | None) -> str:
    text = " ".join(str((failed or {}).get("error", "")).split())
    return text or "its failed.json is damaged; run.log may tell why"


def _lost(job: dict[str, Any], state: str) -> str:
    log = f"its log is {job.get('log')}"
    if state == "UNKNOWN":
        return (
            f"SLURM no longer knows job {job['id']}, which left no result (killed, or out of "
            f"time?); {log}"
        )
    why = _last_error(Path(str(job.get("log"))))
    return f"SLURM ended job {job['id']} as {state}{why}, and it left no result; {log}"


def _last_error(log: Path) -> str:
    """What srun said last of an error, such as: task 0: Killed."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
        said = [line.partition("error:")[2].strip() for line in lines if "srun: error:" in line]
        return f", {said[-1]}" if said else ""
    return ""


def _about(path: Path) -> dict[str, Any]:
    about = _json(path)
    try:
        if about is not None and isinstance(about["config"], dict) and genuine(about):
            return about
    except KeyError:
        pass
    what = "edited, or of another program" if about else "damaged" if path.exists() else "missing"
    raise ValueError(f"{path} is {what}, so what its run did is not known")


def _json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None if there is none, or no object in it."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None


def _step(metrics: Path) -> int | None:
    """Steps done, as the last whole row of metrics.jsonl tells."""
    with suppress(OSError), metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)  # the last line of a killed process may be cut short
                evaluated = any(name.startswith("evaluation/") for name in row)
                return row["step"] + (not evaluated)
    return None


def _checkpoint(folder: Path) -> int | None:
    """Newest one, finished or not."""
    steps = [p.name.removeprefix("step-") for p in folder.glob("step-*")]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def directories(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run directories at or below `folder`, none inside another."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # no folder, or none that may be read
        return
    if any(entry.name == "run.json" for entry in entries):
        yield folder
    elif depth:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield from directories(Path(entry.path), depth - 1)
