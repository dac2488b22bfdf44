"""Workers that are forks of a process which has imported what every run needs: they begin at once,
where a fresh interpreter takes seconds to import torch and transformers.

For runs of one process on the CPU, on Linux: a forked process cannot use a GPU that its parent has
touched. The parent only imports; it computes nothing with several threads, which a fork would miss.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rlhf_exp import signals
from rlhf_exp.hardware.launch import FOREIGN

POSSIBLE = sys.platform == "linux"


def preload() -> None:
    """Import what runs import."""
    from rlhf_exp import worker

    worker.quiet_libraries()
    import accelerate  # noqa: F401
    import matplotlib.pyplot  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import peft  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    import rlhf_exp.report.figures
    import rlhf_exp.run  # noqa: F401


class Fork:
    """A worker for the run in `directory`, with the methods of subprocess.Popen that are used."""

    def __init__(self, directory: Path, env: dict[str, str], output: int | None = None) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _work(directory, env | {"RLHF_EXP_PARENT": str(parent)}, output)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it works."""
        if self.returncode is None:
            with suppress(ChildProcessError):  # a signal came between the next two lines
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that are handed on to workers wait until after this block, in which one is begun and
    noted; a fork lets them in when it has its own handlers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(directory: Path, env: dict[str, str], output: int | None) -> NoReturn:
    """What the child does, and all it does: nothing of the parent's stack is returned to."""
    code = 1
    try:
        os.setsid()  # Ctrl-C reaches it through its parent alone
        for number in signals.STOPS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPS)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        os.environ.update(env)
        if "OMP_NUM_THREADS" in env:  # which torch has read already
            import torch

            torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
        sys.argv = ["rlhf_exp.worker", str(directory)]
        from rlhf_exp import worker

        worker.main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
