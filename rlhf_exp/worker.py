"""A process of a run: `python -m rlhf_exp.worker <run directory>` does what the directory's
run.json asks for, from its newest checkpoint on.

Launchers start it, torchrun and srun may, and it starts the others if the hardware asks for several
and nobody else did. It knows nothing of Hydra. The exit code says how it ended: 0 done, 1 a mistake
in the input, 128 + n stopped by signal n. Why a run failed is also left in its failed.json.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_exp import processes, signals
from rlhf_exp.artifacts import write_json
from rlhf_exp.lease import RUNNING, Busy, alive, working
from rlhf_exp.pruning import EXIT_CODE

PARENT = "RLHF_EXP_PARENT"  # process id of whoever a worker is not to outlive
# set, to the benchmarks asked for as JSON: the run is evaluated as it stands, and nothing else done
LOOK = "RLHF_EXP_LOOK"
FAILED = "failed.json"

at_work: Path | None = None  # the directory of the run that this process does, once it does


def work(directory: Path) -> None:
    """Do the run in this process, or this process's part of it."""
    global at_work
    signals.listen()
    quiet_libraries()
    with working(directory) if processes.main() else nullcontext():
        if LOOK in os.environ:
            _look(directory)
            return
        if processes.first(lambda: _begin(directory)):
            return
        at_work = directory
        _log_to(directory / "run.log")
        from rlhf_exp.run import Stages

        Stages(directory).run()
    at_work = None


def _look(directory: Path) -> None:
    """Evaluate the run as it stands."""
    _log_to(directory / "run.log")
    from rlhf_exp.run import Stages

    Stages(directory).look(json.loads(os.environ[LOOK]))


def _begin(directory: Path) -> bool:
    """Whether the run was finished by somebody else meanwhile; else it begins (again)."""
    (directory / FAILED).unlink(missing_ok=True)
    return "finished" in asked_of(directory)


def quiet_libraries() -> None:
    """Libraries report through our log or not at all."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _log_to(path: Path) -> None:
    """Messages of this package to the screen, as they are, and to `path`, with the time. Of a
    group, the main process's only, and errors of the others on the screen.
    """
    logger = logging.getLogger("rlhf_exp")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    if not processes.main():
        screen.setLevel(logging.ERROR)
        return
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


def asked_of(directory: Path, key: str = "resume") -> dict[str, Any]:
    """What run.json says; ValueError or FileNotFoundError if it is not one of ours."""
    if not (directory / "run.json").is_file():
        raise FileNotFoundError(
            f"{key}={directory}: no run.json there, so it is not a run directory of rlhf_exp"
        )
    try:
        about = json.loads((directory / "run.json").read_text())
        _ = about["config"].keys(), about["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{key}={directory}: its run.json is damaged, so what it did is not known"
        ) from None
    return about


def resume(directory: Path, arguments: Sequence[str] = ()) -> None:
    """Continue the run in `directory`, on the hardware it ran on last or as `arguments` change it;
    ValueError if it is finished or not one of ours.
    """
    about = asked_of(directory)
    config = about["config"]
    from rlhf_exp.runs import genuine, read

    if genuine(about) and read(directory).state == "finished":
        raise ValueError(
            f"resume={directory}: this run is finished; its results are in summary.json"
        )
    from rlhf_exp.config import build

    node, hardware = _hardware_of(about, arguments, f"resume={directory}")
    if arguments:
        from rlhf_exp import precision

        policy, algo = (build(config[key], key) for key in ("policy", "algo"))
        precision.check_training(policy, hardware, algo)
        about["continued_on"] = [*about.get("continued_on", []), node]
        processes.first(lambda: write_json(directory / "run.json", about))
    if processes.main():
        (directory / "job.json").unlink(missing_ok=True)  # of an attempt under SLURM
    hardware.launch(directory)


def _hardware_of(about: dict[str, Any], arguments: Sequence[str], what: str) -> tuple[Any, Any]:
    """Node and object of the hardware a run had last, as `arguments` change it; ValueError where
    the run is not genuine, or cannot be done here.
    """
    from rlhf_exp.config import build, last_hardware, overridden
    from rlhf_exp.runs import genuine

    node = last_hardware(about)
    if arguments and node is not None:
        node = overridden("hardware", node, arguments)
    hardware = build(node, "hardware") if node is not None else None
    os.environ.update(hardware.env() if hardware is not None else {})
    if hardware is None or not genuine(about):
        raise ValueError(
            f"{what}: run.json was edited or comes from elsewhere (its fingerprint does not fit)"
        )
    hardware.check()
    return node, hardware


def evaluate(directory: Path, arguments: Sequence[str] = ()) -> None:
    """Evaluate the run in `directory` as it stands, finished or not: its newest checkpoint, if it
    was not, what the gold has not judged, and benchmarks. `arguments` change hardware and
    evaluation (of which only the benchmarks count).
    """
    from rlhf_exp.config import overridden

    about = asked_of(directory, "run")
    benchmarks = [a for a in arguments if a.startswith("evaluation")]
    for argument in benchmarks:
        if not argument.startswith(("evaluation=", "evaluation.harness")):
            raise ValueError(
                f"{argument}: the run has settled how it is evaluated, and evaluation=<option> or "
                "evaluation.harness alone may be given anew, for benchmarks"
            )
    others = [a for a in arguments if a not in benchmarks]
    _, hardware = _hardware_of(about, others, f"run={directory}")
    node = about["config"]["evaluation"]
    node = overridden("evaluation", node, benchmarks) if benchmarks else node
    os.environ[LOOK] = json.dumps(node.get("harness"))
    try:
        hardware.launch(directory)
    finally:
        del os.environ[LOOK]


def guarded(call: Callable[[], object], directory: Path | None = None) -> int:
    """Run `call`; what a person can mend becomes one sentence on stderr, and in failed.json of the
    run that this process was started for (`directory`) or works at. Returns the exit code.

    Of several processes that fail, the first one says why. RLHF_EXP_TRACEBACK=1 shows the whole
    traceback instead of a sentence.
    """
    try:
        call()
    except processes.WorkerFailed as error:
        return error.exit_code
    except KeyboardInterrupt:
        if processes.main() and not processes.failed():
            print("interrupted; finished artifacts are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if signals.ended_by_signal():
            print(f"after a signal: {sentence(error)}", file=sys.stderr)
        elif processes.first_to_fail():
            if not isinstance(error, Busy):  # the run itself goes on
                record_failure(directory, sentence(error))
            if os.environ.get("RLHF_EXP_TRACEBACK") == "1":
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        if hasattr(error, "exit_code"):  # trial.Stopped
            if processes.main():
                print(error, file=sys.stderr)
            return error.exit_code  # type: ignore[attr-defined]
        if processes.joined():
            return _died(error, directory)
        record_failure(directory, f"{type(error).__name__}: {sentence(error)}")
        raise
    return 0


def _died(error: Exception, directory: Path | None) -> int:
    """The exit code of a process of a group with an error that nobody expected. If it is only
    that another one vanished, the launcher ends this one before its patience does.
    """
    try:
        time.sleep(processes.PATIENCE)
    except KeyboardInterrupt:
        return 130
    if not signals.ended_by_signal() and processes.first_to_fail():
        record_failure(directory, f"{type(error).__name__}: {sentence(error)}")
        traceback.print_exc()
    return 1


def record_failure(directory: Path | None, why: str) -> None:
    """Leave in a run's directory, if there is a run in it, why it failed."""
    somebody = at_work is None and directory is not None and alive(directory / RUNNING)
    directory = directory or at_work
    if directory is None or somebody or not (directory / "run.json").exists():
        return
    told = {"error": why, "rank": processes.rank(), "host": socket.gethostname()}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with processes.alone(), suppress(OSError):  # the disk may be what is wrong
        write_json(directory / FAILED, told | {"when": when})


def sentence(error: Exception) -> str:
    """One line for one error; operating-system errors with what they mean for a run."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    hints = {13: "no permission to write there", 28: "the disk is full", 30: "it is read-only"}
    what = hints.get(error.errno, str(error.strerror).lower())
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{what}; choose another place with artifacts= or hydra.run.dir="


def die_with_parent() -> None:
    """Be sent SIGTERM when the process that started this one ends, however it ends (Linux). Of
    those that are to: SLURM's own end without their jobs.
    """
    if sys.platform == "linux" and PARENT in os.environ:
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
        if os.environ[PARENT] != str(os.getppid()):  # it has ended already
            sys.exit(130)


def main() -> None:
    """The process that launchers start."""
    die_with_parent()
    signals.listen()
    directory = Path(sys.argv[1])
    code = guarded(lambda: carry_out(directory), directory)
    try:
        failed = processes.failed()
        alone = os.environ.get("SLURM_PROCID", "0") == "0"  # before the processes have met
        main = processes.main() if processes.joined() else alone
        code = signals.instead_of_leaving(code, main=main, failed=failed)
    except ValueError as error:
        record_failure(directory, sentence(error))
        print(f"error: {sentence(error)}", file=sys.stderr)
        code = 1
    gave_up = code == EXIT_CODE and signals.requeues()  # which SLURM need not call a failure
    processes.leave(0 if gave_up else code)


def carry_out(directory: Path) -> None:
    """Do what run.json asks for, as one of the processes it takes or as their parent."""
    from rlhf_exp.config import build, last_hardware

    about = asked_of(directory)
    hardware = build(last_hardware(about), "hardware")
    os.environ.update(hardware.env())
    processes.join()
    hardware.check()
    hardware.launch(directory)


if __name__ == "__main__":
    from rlhf_exp import worker

    worker.main()  # of the module that others import, not of its double
