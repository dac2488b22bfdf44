"""Jobs of a sweep under SLURM: arrays submitted through submitit, watched through squeue.

A task is one process of the run, or one node of it; it becomes `python -m rlhf_exp.worker <run
directory>`, so SLURM sees that program's exit code. What became of a run is read from its
directory; the queue only tells which jobs are still there, so no accounting is needed.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_exp import runs, signals
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.config import build, conf_directory
from rlhf_exp.launching import Job, Sweeping
from rlhf_exp.processes import TASKS

logger = logging.getLogger(__name__)

# Fields that submitit takes for every cluster, and those that it hands to sbatch and srun.
GENERAL = ("name", "timeout_min", "mem_gb", "cpus_per_task")
OF_SBATCH = (
    "partition", "account", "qos", "constraint", "nodelist", "exclude", "exclusive",
    "gpus_per_task", "gres", "mem_per_gpu", "mem_per_cpu", "dependency", "additional_parameters",
    "array_parallelism", "signal_delay_s",
)  # fmt: skip
GONE_AFTER = 3  # looks at the queue that must miss a job before it counts as gone
OUTER = ("SLURM_CONF", "SLURM_CLUSTERS")  # of the cluster, not of the job that submits others


@dataclass(kw_only=True)
class Slurm(Sweeping):
    """Array jobs. conf/hydra/launcher/slurm.yaml tells what each field means."""

    cluster: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodelist: str | None
    exclude: str | None
    exclusive: bool | None
    timeout_min: int
    tasks: str
    gpus_per_node: int | None
    gpus_per_task: int | None
    gres: str | None
    cpus_per_task: int | None
    mem_gb: float | None
    mem_per_gpu: str | None
    mem_per_cpu: str | None
    dependency: str | None
    additional_parameters: dict[str, Any] | None
    name: str
    set_up: list[str] | None
    tear_down: list[str] | None
    srun_args: list[str]
    python: str | None
    snapshot: bool
    array_parallelism: int
    array_size: int | None
    signal_delay_s: int
    max_requeues: int
    wait: bool
    poll: float

    def __post_init__(self) -> None:
        self.handles: dict[Path, Any] = {}  # of what was submitted

    def check(self) -> None:
        """Refuse settings that make no sense, and a machine that has no SLURM."""
        require(self.cluster, ("slurm", "local"), "hydra.launcher.cluster")
        require(self.tasks, ("process", "node"), "hydra.launcher.tasks")
        for name in ("timeout_min", "array_parallelism", "array_size", "cpus_per_task", "poll"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"hydra.launcher.{name}={value} must be more than 0")
        least = self.signal_delay_s / 60 + 1  # the warning may come a minute early
        if self.timeout_min <= least:
            raise ValueError(
                f"hydra.launcher.timeout_min={self.timeout_min}: SLURM would warn a job before it "
                f"has begun; give more than {least:.0f}, or a smaller signal_delay_s"
            )
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ValueError(
                "hydra/launcher=slurm needs the package submitit: pip install 'rlhf_exp[slurm]'"
            ) from None
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "hydra/launcher=slurm: there is no sbatch here; submit from a login node of the "
                "cluster, or use hydra/launcher=local"
            )

    def submit(self, jobs: list[Job], folder: Path) -> None:
        """As arrays that the cluster takes."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        code = _copy_code(folder / "code" / stamp) if self.snapshot and jobs else None
        for needs, same in self._alike(jobs).items():
            size = self.array_size or _array_limit(self.cluster)
            for i in range(0, len(same), size):
                self._submit(folder, needs, same[i : i + size], code)

    def do(self, jobs: list[Job]) -> None:
        """Wait unless told otherwise. Ctrl-C leaves the jobs in the queue."""
        if not self.wait:
            logger.info("not waiting; to see how they are, add sweep=status to the same command")
            return
        try:
            self._watch(jobs)
        except KeyboardInterrupt:
            ids = " ".join(sorted({h.job_id.split("_")[0] for h in self.handles.values()}))
            if self.cluster == "slurm":
                print(
                    "no longer waiting; the jobs stay in the queue. To see how they are, add "
                    f"sweep=status to the same command; to end them: scancel {ids}",
                    file=sys.stderr,
                )
            raise

    # ---- submission

    def check_job(self, job: Job) -> None:
        self._needs(job)

    def _alike(self, jobs: list[Job]) -> dict[tuple[int, int, int | None], list[Job]]:
        """Jobs by what they need."""
        found: dict[tuple[int, int, int | None], list[Job]] = {}
        for job in jobs:
            found.setdefault(self._needs(job), []).append(job)
        return found

    def _needs(self, job: Job) -> tuple[int, int, int | None]:
        """Nodes of a job, tasks on each, and GPUs on each."""
        hardware = build(job.plain["hardware"], "hardware")
        tasks = 1 if self.tasks == "node" else hardware.processes
        if self.gpus_per_node is not None or self.gres or self.gpus_per_task:
            return hardware.nodes, tasks, self.gpus_per_node
        if hardware.device is None:
            raise ValueError(
                "hardware.device=null asks what the machine has, which is not the one that will "
                "do it: give hardware.device=cuda or hardware.device=cpu"
            )
        return hardware.nodes, tasks, hardware.processes if hardware.device == "cuda" else None

    def _submit(
        self, folder: Path, needs: tuple[int, int, int | None], jobs: list[Job], code: Path | None
    ) -> None:
        """Submit one array, and note in the run directories which jobs they became."""
        import submitit
        from submitit.core.utils import FailedJobError

        nodes, tasks, gpus = needs
        env = {signals.LIMIT: str(self.max_requeues), TASKS: self.tasks}
        if code is not None:
            path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
            env |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        with _outside_of_a_job():
            try:
                executor = submitit.AutoExecutor(
                    folder / ".submitit" / "%j",
                    cluster=self.cluster,
                    slurm_python=self.python,
                )
                executor.update_parameters(**self._parameters(nodes, tasks, gpus))
                directories = [str(job.directory) for job in jobs]
                local = [self.cluster == "local"] * len(jobs)
                handles = executor.map_array(task, directories, [env] * len(jobs), local)
            except (FailedJobError, subprocess.CalledProcessError) as error:
                raise ValueError(f"SLURM took no job: {_last_line(str(error))}") from None
        for job, handle in zip(jobs, handles, strict=True):
            assert job.directory is not None
            self.handles[job.directory] = handle
            if self.cluster == "slurm":
                about = {"id": handle.job_id, "log": str(handle.paths.stderr)}
                write_json(job.directory / "job.json", about)
        first, last = handles[0].job_id, handles[-1].job_id
        logger.info(
            "submitted %d jobs: %s", len(jobs), first if first == last else f"{first} to {last}"
        )

    def _parameters(self, nodes: int, tasks: int, gpus: int | None) -> dict[str, Any]:
        """What submitit is told. srun takes no cpus-per-task over from sbatch (22.05 to 23.02)."""
        given = {name: getattr(self, name) for name in GENERAL}
        given |= {"nodes": nodes, "tasks_per_node": tasks, "gpus_per_node": gpus}
        arguments = list(self.srun_args)
        if self.cpus_per_task is not None:
            arguments.append(f"--cpus-per-task={self.cpus_per_task}")
        given |= {f"slurm_{name}": getattr(self, name) for name in OF_SBATCH}
        given |= {"slurm_setup": self.set_up, "slurm_teardown": self.tear_down}
        given["slurm_srun_args"] = arguments
        return {k: v for k, v in given.items() if v is not None}

    # ---- waiting

    def _watch(self, jobs: list[Job]) -> None:
        """Until no job is in the queue any more, or goes back to it."""
        missed = {d: 0 for job in jobs if (d := job.directory) in self.handles}
        shown: dict[str, int] = {}
        total = len(missed)
        while missed:
            time.sleep(self.poll)
            queue = states(mine=True)
            told = {d: self._told(d, queue) for d in missed}
            counts = {s: list(told.values()).count(s) for s in ("queued", "running")}
            counts["ended"] = total - sum(counts.values())
            if queue is not None and counts != shown:
                shown = counts
                logger.info("SLURM: %s", ", ".join(f"{n} {s}" for s, n in counts.items() if n))
            for directory, state in told.items():
                missed[directory] = missed[directory] + 1 if state == "ended" else 0
            enough = 1 if self.cluster == "local" else GONE_AFTER
            missed = {
                d: n for d, n in missed.items() if n < enough and not self._settled(d, told[d])
            }

    def _told(self, directory: Path, queue: dict[str, str] | None) -> str:
        """What the cluster says of a job: queued, running or ended."""
        handle = self.handles[directory]
        if self.cluster == "local":
            return "ended" if handle.done() else "running"
        if queue is None:  # it did not answer
            return "running"
        state = queue.get(handle.job_id, "gone").split()[0]
        return "queued" if state in runs.QUEUED else "running" if state in runs.RUNNING else "ended"

    def _settled(self, directory: Path, told: str) -> bool:
        """Whether nothing more can come of a job: it left, and a shared file system shows why."""
        return told == "ended" and runs.read(directory).state in ("finished", "failed", "pruned")

    def queue(self) -> dict[str, str] | None:
        told = states()
        if told is None and self.cluster == "slurm":
            raise ValueError(
                "SLURM does not answer (squeue), so nobody knows what is in the queue already: "
                "try again later"
            )
        return told

    def plannable(self, job: Job) -> bool:
        return job.plain["hardware"].get("device_memory") is not None


def task(directory: str, env: dict[str, str], local: bool) -> None:
    """What a task of the job does: it becomes a worker of the run in `directory`."""
    os.environ.update(env)
    if local:  # no SLURM would requeue it
        del os.environ[signals.LIMIT]
        if int(os.environ["SUBMITIT_LOCAL_NTASKS"]) > 1:
            from submitit.helpers import TorchDistributedEnvironment

            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ.setdefault("OMP_NUM_THREADS", cpus)
    for number in (signal.SIGTERM, signals.WARNING):
        signal.signal(number, signal.SIG_IGN)  # until the worker listens, a moment later
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "rlhf_exp.worker", directory])


def states(*, mine: bool = False) -> dict[str, str] | None:
    """Jobs in SLURM's memory, ended ones included for some minutes, of all users or `mine`: state
    and reason by id (12, or 12_3 of an array). None if SLURM does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", *(["--me"] if mine else []), "-h", "-r", "-a", "-t", "all", "-o", "%i|%T|%r"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {
        job: state if reason in ("None", "") else f"{state} ({reason})"
        for job, state, reason in rows
    }


def _array_limit(cluster: str) -> int:
    """Jobs that one array may hold."""
    if cluster != "slurm":
        return 1000
    told = subprocess.run(
        ["scontrol", "show", "config"], capture_output=True, text=True, check=False
    )
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", told.stdout)
    return max(1, int(found.group(1)) - 1) if found else 1000


def _copy_code(folder: Path) -> Path:
    """This package and its configs, as they are now, for jobs that start later."""
    shutil.copytree(
        Path(__file__).parent,
        folder / "rlhf_exp",
        ignore=shutil.ignore_patterns("__pycache__"),
        dirs_exist_ok=True,
    )
    shutil.copytree(conf_directory(), folder / "rlhf_exp" / "conf", dirs_exist_ok=True)
    return folder


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that submits, if it is one itself, but not its cluster's."""
    inner = {k for k in os.environ if k.startswith("SLURM_") and k not in OUTER}
    hidden = {k: os.environ.pop(k) for k in inner} if "SLURM_JOB_ID" in os.environ else {}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()]
    return (wrong or lines or ["no reason given"])[-1]
