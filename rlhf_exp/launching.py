"""The jobs of a sweep: what each of them asks for, whether it was done before, what became of it.

A job is known by its fingerprint. Its run is looked for below `runs` and in the sweep's own folder:
one that is finished is not done again, one that stopped or failed goes on in its old directory, one
that is being done is left alone, and what is missing is started. Launchers differ in where they
start `python -m rlhf_exp.worker <run directory>`; the jobs know nothing of Hydra.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from rlhf_exp import lease, processes, runs
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.config import build, check, check_node, conf_directory, resolved
from rlhf_exp.hardware.forks import POSSIBLE, Fork, preload, undisturbed
from rlhf_exp.hardware.launch import handling, start
from rlhf_exp.objective import outcome
from rlhf_exp.report import sweep

logger = logging.getLogger(__name__)

BEING_DONE = ("running", "queued")  # states of runs that somebody sees to
LEFT_ALONE = ("finished", *BEING_DONE)
UNSAID = (
    "plan",
    "planning",
    "runs",
    "sweep",
    "run",
    "report",
)  # keys that are none of the run's business
SWEEPS = (
    "a sweep starts the processes of its jobs itself: run it with -m and without torchrun or "
    "srun, or one run with them"
)


def asked(config: DictConfig) -> dict[str, Any]:
    """What a run is asked to do, as plain values: checked, and artifacts where every process finds
    them.
    """
    check(config)
    plain = resolved(config)
    plain["artifacts"] = str(Path(plain["artifacts"]).expanduser().absolute())
    return plain


def write_down(plain: dict[str, Any], directory: Path) -> None:
    """run.json, in a directory that holds no run yet."""
    from rlhf_exp.about import describe

    if (directory / "run.json").exists():
        raise ValueError(
            f"{directory} already holds a run: choose another hydra.run.dir, "
            f"or continue it with resume={directory}"
        )
    write_json(directory / "run.json", describe(plain))


@dataclass
class Job:
    """One point of a sweep."""

    number: int
    overrides: list[str]
    config: DictConfig
    plain: dict[str, Any] = field(default_factory=dict)  # the same, checked
    told: dict[str, Any] = field(default_factory=dict)  # of it, what the run is told
    fingerprint: str = ""
    directory: Path | None = None
    run: runs.Run | None = None  # that was found
    error: Exception | None = None

    @property
    def state(self) -> str:
        """What became of it before."""
        return self.run.state if self.run is not None else "missing"

    @property
    def needed(self) -> bool:
        """Whether somebody must do it."""
        pruned = self.state == "pruned" and self.plain.get("pruning") is not None
        return self.error is None and self.state not in LEFT_ALONE and not pruned


class Points:
    """Composes the points of a sweep. Those that differ in values only share one composition, as
    that is slow; the values are then set as Hydra sets them.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self.loader, self.config = loader, config
        self.parser = OverridesParser.create(loader)
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: list[str]) -> DictConfig:
        """The config of a run under these overrides, without Hydra's own part."""
        read = self.parser.parse_overrides(overrides)
        values = [o for o in read if self._is_value(o)]
        options = tuple(o.input_line or "" for o in read if o not in values)
        if options not in self.composed:
            found = self.loader.load_sweep_config(self.config, list(options))
            with flag_override(found, ["struct", "readonly"], False):
                del found["hydra"]
            self.composed[options] = found
        config = self.composed[options].copy()
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value())
        return config

    def _is_value(self, override: Override) -> bool:
        """Whether it sets a value there is, and selects, adds or deletes nothing."""
        key = override.key_or_group
        plain = override.type == OverrideType.CHANGE and override.package is None
        return plain and not key.startswith("hydra") and not (conf_directory() / key).is_dir()


class Sweeping(Launcher):
    """What launchers have in common; each says in `do` how jobs are done."""

    report = True  # write table and figures at the end; a sweeper with its own turns it off
    wait = True

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.points, self.config = Points(hydra_context.config_loader, config), config
        check_node(config.hydra.launcher, "hydra.launcher")
        self.check()

    def check(self) -> None:
        """Refuse settings that make no sense, and a machine that cannot do it: ValueError."""

    def check_job(self, job: Job) -> None:
        """Refuse a job that cannot be done here, before anything is written: ValueError."""

    def submit(self, jobs: list[Job], folder: Path) -> None:
        """Hand these jobs over, if somebody else is to do them; no other command launches now."""

    def do(self, jobs: list[Job]) -> None:
        """Do these jobs, or wait for those who do."""
        raise NotImplementedError

    def plannable(self, job: Job) -> bool:
        """Whether the memory of the devices that will do the job is known here."""
        return True

    def queue(self) -> dict[str, str] | None:
        """What SLURM says of jobs, by their ids; None if it says nothing."""
        return slurm_states()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Do what is missing of these jobs; Hydra's sweepers call this."""
        if processes.joined():
            raise ValueError(SWEEPS)
        require(self.config.sweep, ("run", "status"), "sweep")
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        jobs = [self._job(list(o), n) for n, o in enumerate(job_overrides, initial_job_idx)]
        if self.config.sweep == "status":
            self._find(jobs, folder)
            print(sweep.show([_as_run(job) for job in jobs]))
            _tidy(folder)
            return [_returned(job, None) for job in jobs]
        place = Path(self.config.runs).absolute()
        place.mkdir(parents=True, exist_ok=True)
        with lease.held(place / ".launching"):  # two commands do not begin the same run
            self._find(jobs, folder)
            todo = self._first_of_each(jobs)
            self._note(folder, jobs)
            logger.info("%s", _counted(jobs, todo))
            self.submit(todo, folder)
        several = self.report and initial_job_idx + len(jobs) > 1
        try:
            self.do(todo)
            if self.wait:
                self._attend(jobs)
        finally:
            if several:
                self._report(folder)
        if several and self.config.report.after_sweep:
            self._study(folder)
        queue = slurm_states()
        return [_returned(job, self._outcome(job, queue)) for job in jobs]

    def _attend(self, jobs: list[Job]) -> None:
        """Wait for the runs that another command has begun."""
        directories = {job.directory for job in jobs if job.state in BEING_DONE}
        if directories:
            logger.info("waiting for %d that another command has begun", len(directories))
        while directories:
            time.sleep(1.0)
            queue = slurm_states()
            directories = {d for d in directories if d and runs.read(d, queue).state in BEING_DONE}

    # ---- before

    def _job(self, overrides: list[str], number: int) -> Job:
        """What the sweep's point `number` asks for; its error, if it cannot be done."""
        job = Job(number, overrides, self.points(overrides))
        try:
            job.plain = asked(job.config)
            job.told = {k: v for k, v in job.plain.items() if k not in UNSAID}
            for key, node in job.plain.items():
                if isinstance(node, dict) and "_target_" in node:
                    _can_be_built(json.dumps(node, sort_keys=True), key)
            job.fingerprint = runs.config_fingerprint(job.told)
            self.check_job(job)
        except ValueError as error:
            job.error = error
        return job

    def _find(self, jobs: list[Job], folder: Path) -> None:
        """Where each job's run is, or is to be, and what became of it."""
        known = runs.find([Path(self.config.runs), folder], self.queue())
        taken = {
            d for d in (folder.iterdir() if folder.exists() else ()) if (d / "run.json").exists()
        }
        chosen: dict[str, Path] = {}
        for job in jobs:
            if job.error is not None:
                continue
            if found := known.get(job.fingerprint):
                job.directory, job.run = found.directory, found
            elif job.fingerprint in chosen:
                job.directory = chosen[job.fingerprint]
            else:
                numbers = (job.number, *range(len(taken) + 1))
                job.directory = next(d for n in numbers if (d := folder / str(n)) not in taken)
                taken.add(job.directory)
            chosen[job.fingerprint] = job.directory

    def _first_of_each(self, jobs: list[Job]) -> list[Job]:
        """The jobs to be done, each run once; their directories say what is asked."""
        todo: dict[str, Job] = {}
        for job in jobs:
            if job.needed and job.fingerprint not in todo:
                try:
                    self._prepare(job)
                except ValueError as error:
                    job.error = error
                    continue
                todo[job.fingerprint] = job
        errors = [job.error for job in jobs if job.error is not None]
        if self.report and errors and len(errors) == len(jobs):  # of a grid; a search goes on
            raise errors[0]
        return list(todo.values())

    def _prepare(self, job: Job) -> None:
        """Write down what is asked of a job; ValueError if it cannot fit where it is to run."""
        from rlhf_exp import plan

        assert job.directory is not None
        if str(job.plain["plan"]).lower() == "true":
            raise ValueError("plan=true plans one run: leave -m away")
        if job.plain["plan"] is False and self.plannable(job):
            plan.refuse(job.plain)
        if not (job.directory / "run.json").exists():
            write_down(job.told, job.directory)
            asked_for = job.directory / ".hydra"  # where Hydra leaves it in a single run
            asked_for.mkdir()
            OmegaConf.save(job.config, asked_for / "config.yaml")
            OmegaConf.save(OmegaConf.create(job.overrides), asked_for / "overrides.yaml")
        else:  # what decides nothing may have changed
            about = json.loads((job.directory / "run.json").read_text())
            about.pop("continued_on", None)  # the sweep says where
            named = {"config": job.told, "fingerprint": job.fingerprint}
            write_json(job.directory / "run.json", about | named)
            for left in ("failed.json", "job.json"):  # of an earlier attempt
                (job.directory / left).unlink(missing_ok=True)

    def _note(self, folder: Path, jobs: list[Job]) -> None:
        """sweep.json: which run each job is."""
        path = folder / "sweep.json"
        before = json.loads(path.read_text())["jobs"] if path.exists() else []
        now = [
            {
                "number": job.number,
                "overrides": list(filter_overrides(job.overrides)),
                "directory": str(job.directory or folder / str(job.number)),
                "fingerprint": job.fingerprint,
                "error": str(job.error) if job.error else None,
            }
            for job in jobs
        ]
        numbers = {job.number for job in jobs}
        kept = [j for j in before if j["number"] not in numbers]
        write_json(path, {"jobs": sorted(kept + now, key=lambda j: j["number"])})

    # ---- after

    def _outcome(self, job: Job, queue: dict[str, str] | None) -> Any:
        """The job's objective, or the exception that it ended with."""
        if job.error is not None or job.directory is None:
            return job.error
        run = runs.read(job.directory, queue)
        if run.state == "failed":
            return ValueError(f"{job.directory}: {run.error}")
        if run.state == "partial" or (run.state in BEING_DONE and self.wait):
            return ValueError(f"{job.directory}: stopped before its end; the same command goes on")
        return outcome(job.directory, job.plain["objective"])

    def _report(self, folder: Path) -> None:
        """Table and figures of the sweep so far, beside its runs."""
        jobs = runs.sweep(folder, slurm_states())
        sweep.write(folder, jobs)
        print(sweep.show(jobs))
        print(f"table and figures: {folder / 'sweep.md'}")

    def _study(self, folder: Path) -> None:
        """The report of the sweep, beside its runs; they are safe if it fails."""
        node = OmegaConf.to_container(self.config.report, resolve=True)
        try:
            page = build(node, "report").write([str(folder)], folder / "report")
        except Exception as error:
            logger.warning("no report: %s", error, exc_info=not isinstance(error, ValueError))
        else:
            print(f"report: {page}")


def chosen(arms: dict[str, list[str]], only: Sequence[str] | None) -> list[str]:
    """The names of the arms to be done; ValueError for one that is none."""
    for name in only or ():
        require(name, arms, "hydra.sweeper.only")
    return [name for name in arms if only is None or name in only]


def slurm_states() -> dict[str, str] | None:
    """What SLURM says of jobs, if there is one and it answers."""
    from rlhf_exp.slurm import states

    return states()


def _as_run(job: Job) -> runs.Run:
    """The job as reports take it."""
    told = {"number": job.number, "overrides": tuple(job.overrides)}
    if job.run is not None:
        return replace(job.run, **told)
    error = str(job.error) if job.error else None
    about = {"directory": job.directory or Path(), "config": job.plain, "error": error}
    return runs.Run(state="missing", fingerprint=job.fingerprint, **about, **told)


def _tidy(folder: Path) -> None:
    """Remove what a sweeper left in the folder of a sweep that only looked."""
    left = list(folder.iterdir()) if folder.exists() else []
    if [path.name for path in left] != ["multirun.yaml"]:
        return
    left[0].unlink()
    for path in (folder, folder.parent):  # the day's, too
        with suppress(OSError):
            path.rmdir()


@cache
def _can_be_built(node: str, key: str) -> None:
    """Build a node once for all jobs that have it: its class may refuse its values."""
    build(json.loads(node), key)


def _counted(jobs: list[Job], todo: list[Job]) -> str:
    """One line: what of the sweep is there, and what is to be done."""
    states = [job.state for job in jobs if job.error is None]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    there = ", ".join(f"{n} {state}" for state, n in counts.items() if state != "missing")
    wrong = sum(job.error is not None for job in jobs)
    told = [f"{len(jobs)} jobs", *([there] if there else []), f"{len(todo)} to do"]
    return ", ".join(told + ([f"{wrong} impossible"] if wrong else []))


def _returned(job: Job, value: Any) -> JobReturn:
    """What Hydra wants to know of a job."""
    failed = isinstance(value, Exception)
    back = JobReturn(
        overrides=job.overrides,
        working_dir=str(job.directory) if job.directory else None,
        status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
    )
    back.return_value = value
    return back


@dataclass(kw_only=True)
class Local(Sweeping):
    """Jobs on this machine, each in a process of its own, `jobs` of them at a time."""

    jobs: int
    fork: bool  # one-process jobs on the CPU, from this process; false: each imports for itself

    def check(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"hydra.launcher.jobs={self.jobs} must be at least 1")

    def check_job(self, job: Job) -> None:
        if self.jobs > 1 and build(job.plain["hardware"], "hardware").kind == "cuda":
            raise ValueError(
                f"hydra.launcher.jobs={self.jobs} would have as many runs share the GPUs: give 1, "
                "or start a sweep for each with its own CUDA_VISIBLE_DEVICES"
            )

    def do(self, jobs: list[Job]) -> None:
        """Start, and wait. A signal reaches the jobs that run, and no other is started."""
        waiting, working, received = list(jobs), {}, []
        if any(map(self._forks, jobs)):
            preload()

        def hand_on(number: int, _frame: Any) -> None:
            received.append(number)
            for process in working:
                process.send_signal(number)

        with handling(hand_on):
            while working or (waiting and not received):
                while waiting and len(working) < self.jobs and not received:
                    job = waiting.pop(0)
                    with undisturbed() if self._forks(job) else nullcontext():
                        working |= self._started(job)
                for process in [p for p in working if p.poll() is not None]:
                    _tell_if_killed(working.pop(process), process.returncode, bool(received))
                time.sleep(0.05)
        if received:
            raise SystemExit(128 + received[-1])

    def _started(self, job: Job) -> dict[Any, Job]:
        """The job's process; where several run at once, what it says goes to a file."""
        assert job.directory is not None
        if runs.read(job.directory).state in LEFT_ALONE:  # another command came first
            return {}
        logger.info("#%d: %s", job.number, " ".join(filter_overrides(job.overrides)))
        print(f"run directory: {job.directory}", file=sys.stderr)
        begin = Fork if self._forks(job) else start
        if self.jobs == 1:
            return {begin(job.directory, {}): job}
        cores = max(1, (os.cpu_count() or 1) // self.jobs)
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)}
        with (job.directory / "output.log").open("ab") as file:
            return {begin(job.directory, threads, file.fileno()): job}

    def _forks(self, job: Job) -> bool:
        """Whether the job is a fork of this process."""
        hardware = build(job.plain["hardware"], "hardware")
        return self.fork and POSSIBLE and hardware.kind == "cpu" and not hardware.grouped


def _tell_if_killed(job: Job, code: int, stopped: bool) -> None:
    """Leave a word of a process that could leave none."""
    from rlhf_exp.worker import record_failure

    if code < 0 and not stopped:
        record_failure(
            job.directory,
            f"ended by {signal.Signals(-code).name} (SIGKILL: often for lack of memory); what it "
            "saved is kept",
        )
