"""The processes of a run: which of them this one is, and what they tell each other.

Alone, a process is the whole run: every function here is then the identity and imports nothing.
Several meet at a store, the small server of keys and values that torchrun (or our own launch, or
the main process under SLURM) keeps. Waiting at the store has no deadline, because the main process
may fit a reward model for an hour; it ends when any process fails. `gather` is a collective and has
the deadline `hardware.timeout`.

Until the hardware builds its accelerator, the variables that describe the group are hidden from
libraries, so that what the main process makes by itself (artifacts) is made as in a run of one.
"""

import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TASKS = "RLHF_EXP_TASKS"  # "node": a SLURM task is a whole node, not a process of the run
OF_MPI = ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
FAILED = "failed"  # the store's count of processes that wanted to say why the run fails
PREFIX = "rlhf_exp"  # of our keys
PATIENCE = 3.0  # seconds in which a launcher ends the others when one process dies without a word


class WorkerFailed(Exception):
    """A process of the run ended badly; it has already said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a process of the run ended with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass
class Group:
    """The processes that met."""

    rank: int
    count: int
    local_rank: int
    store: Any
    variables: dict[str, str]  # what describes the group to libraries
    keeps_store: bool  # this process keeps it, and no launcher
    spoken: int = 0  # messages so far; the same on every rank

    def key(self) -> str:
        """Name of the next message."""
        self.spoken += 1
        return f"message/{self.spoken}"


_group: Group | None = None


@dataclass(frozen=True)
class Node:
    """One of several nodes on which SLURM has started one task each: the task starts the processes
    of its node, which meet at the first node's `address`.
    """

    number: int
    count: int
    address: str
    port: str


def node() -> Node | None:
    """The node whose processes this one is to start; None if it has none to start, or all."""
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if os.environ.get(TASKS) != "node" or count == 1:
        return None
    return Node(int(os.environ["SLURM_PROCID"]), count, *_meeting_point(os.environ))


def _meeting_point(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address and port that all tasks of a job step find by themselves."""
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return (
        environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        environment.get("MASTER_PORT") or str(20_000 + job % 20_000),
    )


def described(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of torch's rendezvous, as torchrun gives them or as they follow from those of
    srun; None where nothing describes a group.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        missing = [name for name in NAMES if name not in environment]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE describe a group of processes, but {missing[0]} is missing: "
                "start with torchrun or srun, or unset RANK and WORLD_SIZE"
            )
        return {name: environment[name] for name in NAMES}
    # of a job step: SLURM_NTASKS is also there in a batch script that starts one process itself
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or environment.get(TASKS) == "node":
        return None
    address, port = _meeting_point(environment)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def first_host(nodes: str) -> str:
    """The first name in SLURM's short form of a list: node[03-05,9],login -> node03."""
    found = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    assert found is not None, f"no host in SLURM's list {nodes!r}"
    return found.group(1) + (found.group(2) or "")


def join() -> None:
    """Meet the other processes if the environment describes any; ValueError if they cannot."""
    global _group
    variables = described(os.environ)
    if variables is None or _group is not None:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ |= variables
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    where = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
    try:
        store, rank, count = next(iter(rendezvous("env://")))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of the run cannot meet at {where} ({str(error).splitlines()[0]}): "
            "give a reachable MASTER_ADDR and a free MASTER_PORT"
        ) from None
    _group = Group(
        rank,
        count,
        int(variables["LOCAL_RANK"]),
        PrefixStore(PREFIX, store),
        variables,
        keeps_store=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )
    for name in (*NAMES, *OF_MPI):
        os.environ.pop(name, None)


def reveal() -> None:
    """Describe the group to libraries from here on."""
    if _group is not None:
        os.environ.update(_group.variables)


def joined() -> bool:
    """Whether this process was started as one of a group, if only of one."""
    return _group is not None


def rank() -> int:
    """Position of this process in the run, from 0."""
    return _group.rank if _group is not None else 0


def local_rank() -> int:
    """Position of this process on its node, from 0: which device is its own."""
    return _group.local_rank if _group is not None else 0


def count() -> int:
    """Processes of the run, on all nodes."""
    return _group.count if _group is not None else 1


def main() -> bool:
    """Whether this is the process that writes shared files and speaks."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """In this block the process is the whole run, and waits for nobody."""
    global _group
    held, _group = _group, None
    try:
        yield
    finally:
        _group = held


# ---- waiting, without a deadline


def wait(done: Callable[[], bool]) -> None:
    """Sleep until `done()`; WorkerFailed as soon as another process of the run has failed."""
    assert _group is not None, "there is nobody to wait for"
    pause = 0.005
    try:
        while not done():
            if _group.store.check([FAILED]):
                raise WorkerFailed(1)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    except RuntimeError:  # whoever keeps the store is gone
        raise WorkerFailed(1) from None


def barrier() -> None:
    """Go on when every process has come here."""
    if _group is None:
        return
    store, key, everyone = _group.store, _group.key(), _group.count
    store.add(key, 1)
    wait(lambda: store.add(key, 0) == everyone)


def agreed(value: T) -> T:
    """The main process's `value`, on every process."""
    if _group is None or _group.count == 1:
        return value
    store, key = _group.store, _group.key()
    if main():
        store.set(key, pickle.dumps(value))
        return value
    wait(lambda: store.check([key]))
    return pickle.loads(store.get(key))


def first(make: Callable[[], T]) -> T:
    """Let the main process do it alone while the others wait; every process gets the result."""
    if not main():
        return agreed(None)  # type: ignore[return-value]
    with alone():
        value = make()
    return agreed(value)


# ---- collectives


def gather(value: T) -> list[T]:
    """What every process gives, in order of rank."""
    if count() == 1:
        return [value]
    from torch import distributed

    assert distributed.is_initialized(), "gather needs the accelerator of the hardware"
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def total(values: Any) -> Any:
    """The sum of a tensor over the processes, in place."""
    if count() > 1:
        from torch import distributed

        distributed.all_reduce(values)
    return values


def share(items: int) -> slice:
    """This process's contiguous part of `items` things; parts differ by one at most."""
    return slice(rank() * items // count(), (rank() + 1) * items // count())


# ---- the end


def failed() -> bool:
    """Whether some process of the group has failed and said why."""
    try:
        return _group is not None and _group.store.check([FAILED])
    except RuntimeError:
        return True


def first_to_fail() -> bool:
    """Whether this process is to say why the run fails: one does, the others end silently."""
    if _group is None:
        return True
    try:
        return _group.store.add(FAILED, 1) == 1
    except RuntimeError:  # whoever keeps the store ended before us
        return False


def leave(code: int) -> None:
    """End this process with `code`. In a group at once: gloo's threads may abort an interpreter
    that takes its time to shut down.
    """
    if _group is None:
        sys.exit(code)
    import logging
    import multiprocessing

    for child in multiprocessing.active_children():  # of a data loader: os._exit leaves them behind
        child.terminate()
    _take_leave(_group)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _take_leave(group: Group) -> None:
    """Whoever keeps the store lets the others read in it what was said last."""
    deadline = time.monotonic() + PATIENCE
    try:
        group.store.add("left", 1)
        while group.keeps_store and group.store.add("left", 0) < group.count:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
    except RuntimeError:  # it is gone already
        return
