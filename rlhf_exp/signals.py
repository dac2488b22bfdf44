"""Signals that ask a run to end, and SLURM's warning, after which a job goes back into the queue.

A handler does no work: it notes the signal, and the run ends where its state is whole. Under SLURM
(RLHF_EXP_MAX_REQUEUES is set by its launcher) two things differ. SIGUSR2, which comes before the
time limit or a preemption, is answered by `scontrol requeue`. And a process that a signal has ended
waits to be killed, because SLURM counts a job that leaves during its grace time as done.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

WARNING = signal.SIGUSR2  # of SLURM; it reaches every process of the job step
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, WARNING)
LIMIT = "RLHF_EXP_MAX_REQUEUES"
LAST_WAIT = 900.0  # seconds to be killed in; then the process leaves by itself

received: list[int] = []  # by this process, in order


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Let a signal end a stage as Ctrl-C does: half-made artifacts are removed."""
    again = bool(received)
    received.append(number)
    if not (again and requeues()):  # SLURM may say it twice; clearing up goes on
        raise KeyboardInterrupt


def listen() -> None:
    """Have `interrupt` called from here on; forked children are left out."""
    if signal.getsignal(WARNING) is interrupt:
        return
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, WARNING):
        signal.signal(number, interrupt)
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """A forked child (a worker of a data loader) can be ended, but not by the warning, which it
    would otherwise die of before its parent has saved.
    """
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(WARNING, signal.SIG_IGN)


def requeues() -> bool:
    """Whether this process belongs to a SLURM job that may go back into the queue."""
    return LIMIT in os.environ


def ended_by_signal() -> bool:
    """Whether what looks like a failure is SLURM taking the job's processes down."""
    return requeues() and bool(received)


def instead_of_leaving(code: int, *, main: bool, failed: bool) -> int:
    """Under SLURM, after a signal: requeue the job if it was the warning (the `main` process does),
    and wait to be killed. Returns the exit code, at once where nothing of this applies: no signal
    has come, or a process of the run has `failed` and the signal only clears up. ValueError if the
    job does not go back into the queue.
    """
    if not requeues():
        return code
    for number in STOPS:  # what was said is known; scontrol inherits this
        signal.signal(number, signal.SIG_IGN)
    warned = WARNING in received or code == 128 + WARNING
    ended = signal.SIGTERM in received or code == 128 + signal.SIGTERM
    if not code or not (warned or ended):
        return code
    if failed:
        return 1
    if warned and main:
        _requeue()
    _wait_to_be_killed()
    return code


def _requeue() -> None:
    """Put this job back into the queue; ValueError if it may not or SLURM will not."""
    limit, before = int(os.environ[LIMIT]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if before >= limit:
        raise ValueError(
            f"job {job} was requeued {before} times already (hydra.launcher.max_requeues={limit}); "
            "its state is saved: submit the sweep again to go on"
        )
    asked, said = ["scontrol", "requeue", job], ""
    for pause in (5, 10, 20, 0):  # a controller that is busy preempting may not answer at once
        try:
            subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
            break
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip()
        except (subprocess.TimeoutExpired, OSError) as error:
            said = str(error)
        time.sleep(pause)
    else:
        raise ValueError(f"SLURM did not requeue job {job} ({said}); its state is saved")
    print(f"job {job} goes back into the queue ({before + 1} of {limit})", file=sys.stderr)


def _wait_to_be_killed() -> None:
    """SLURM ends this step, and starts the job again or not."""
    sys.stderr.flush()
    for number in (signal.SIGTERM, signal.SIGCHLD):  # torch raises where its children are killed
        signal.signal(number, signal.SIG_DFL)
    time.sleep(LAST_WAIT)
