"""Worker processes of a run on this machine: started together, ended together.

torch's elastic launch does nearly this, but kills a worker 30 seconds after a signal; a worker here
must be able to finish its step and save.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_exp import signals
from rlhf_exp.processes import FAILED, PREFIX, Node, WorkerFailed
from rlhf_exp.pruning import EXIT_CODE

GRACE = 5.0  # seconds between asking a worker to end at once and killing it
FOREIGN = ("ACCELERATE_", "FSDP_")  # settings of a shell that would override the config

Worker = subprocess.Popen[bytes]


def run_workers(directory: Path, count: int, env: dict[str, str], node: Node | None = None) -> None:
    """Do the run in `directory` in a group of `count` workers, together with those of other nodes
    if this is one `node` of several, and wait for them. Signals to this process reach the workers,
    if SLURM does not send them to all by itself.

    WorkerFailed if one ends badly and has said why, or after a signal, with its exit code;
    ValueError if one was killed.
    """
    store = _store() if node is None else None
    workers: list[Worker] = []
    received: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        received.append(number)
        for worker in workers if not signals.requeues() else ():
            worker.send_signal(number)

    with handling(hand_on):
        try:
            for rank in range(count):
                about = _described(rank, count, store, node)
                workers.append(start(directory, env | about))
            bad = _wait(workers, received)
            code = workers[bad].returncode if bad is not None else 0
            # the others see their peer vanish: they need not say so
            told = code >= 0 or (store is not None and _told_already(store))
        finally:
            _end(workers)
    if not told:
        raise ValueError(
            f"process {bad} of the run was ended by {signal.Signals(-code).name} (SIGKILL: often "
            f"for lack of memory); what it saved is kept: continue with resume={directory}"
        )
    code = code or next((w.returncode for w in workers if w.returncode), 0)
    if code:
        raise WorkerFailed(code if code >= 0 else 128 - code)


def _store() -> Any:
    """Where the workers meet; the system chooses a free port and the server holds it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _told_already(store: Any) -> bool:
    """Whether a worker has said why the run fails; from here on none will."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(PREFIX, store).add(FAILED, 1) > 1


def _described(rank: int, count: int, store: Any, node: Node | None) -> dict[str, str]:
    """What torchrun would tell the worker `rank` of this node."""
    about = {"LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": str(node is None)}
    if node is None:  # the store is up: connect only
        about |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        return about | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    about |= {"RANK": str(node.number * count + rank), "WORLD_SIZE": str(node.count * count)}
    return about | {"MASTER_ADDR": node.address, "MASTER_PORT": node.port}


def start(directory: Path, env: dict[str, str], output: int | None = None) -> Worker:
    """A worker in a session of its own, which Ctrl-C reaches through this process alone; it ends
    with this process. What it says goes to the screen, or to the file descriptor `output`.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    command = [sys.executable, "-m", "rlhf_exp.worker", str(directory)]
    return subprocess.Popen(
        command,
        env=inherited | env | {"RLHF_EXP_PARENT": str(os.getpid())},
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _wait(workers: list[Worker], received: list[int]) -> int | None:
    """Until all have ended well, gave up or stopped after a signal; else the first that has not."""
    while True:
        codes = [worker.poll() for worker in workers]
        fine = {None, 0, EXIT_CODE} | {code for n in received for code in (128 + n, 130, -n)}
        for rank, code in enumerate(codes):
            if code not in fine:
                return rank
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(workers: list[Worker]) -> None:
    """End those that still run: SIGQUIT lets them clear up, SIGKILL does not."""
    deadline = time.monotonic() + GRACE
    for worker in workers:
        worker.send_signal(signal.SIGQUIT)
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` gets the signals that are handed on, in this block."""
    before = {number: signal.signal(number, handler) for number in signals.STOPS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
