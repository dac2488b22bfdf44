"""Who works on what, on whichever host: a lease is a file that its holder touches every BEAT
seconds.

It needs nothing of a shared file system but that one of several creates a file first (filelock's
SoftFileLease): flock may be local to a host there, or missing. A holder that was killed is noticed
at once on its own host, and elsewhere when its file has stood still for DURATION. That is longer
than NFS shows an old time of a file (60 s), and than a call that holds the interpreter may delay a
beat. Where names cannot be exchanged (NFS), filelock never takes a dead holder's file away; we do.

A lease is a hint, not a fence: a process that was suspended for longer than DURATION goes on
working until its next beat tells it that it has lost.
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import SoftFileLease, Timeout

from rlhf_exp import processes

logger = logging.getLogger(__name__)

RUNNING = ".running"  # of a run directory: held while a process works on the run
DURATION = 120.0  # seconds without a beat after which a holder on another host counts as dead
BEAT = 15.0  # seconds between beats
POLL = 0.5  # seconds between looks at a lease that is held


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its file tells."""

    host: str  # as filelock spells it: with the PID namespace, in a container
    pid: int
    since: str  # UTC, ISO

    def lives(self) -> bool | None:
        """Whether the process is there; None if it would be on another host."""
        if self.host != _this_host():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split('?')[0]} (since {self.since})"


class Busy(ValueError):
    """Somebody else works on the run, which is left as it is."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Do the block while nobody else holds `path`; wait as long as somebody does."""

    def lost(compromise: object) -> None:
        logger.warning(
            "the hold of %s was lost (%s): whoever else makes the same, the first is kept",
            path,
            getattr(compromise, "reason", compromise),
        )

    with _lease(path, lost) as lease:
        _acquire(lease, path, patient=True)
        yield


@contextmanager
def working(directory: Path) -> Iterator[None]:
    """Do the block as the one process that works on the run in `directory`. ValueError if another
    live one does; on another host, that is as soon as it beats, or not within DURATION.
    """
    path = directory / RUNNING

    def lost(_compromise: object) -> None:  # by a thread: the main one may be in a long call
        if processes.first_to_fail():
            print(f"error: another process has taken {directory} over", file=sys.stderr, flush=True)
        os._exit(1)

    with _lease(path, lost) as lease:
        _acquire(lease, path, patient=False)
        yield


def alive(path: Path) -> bool:
    """Whether somebody holds `path`, as far as one look can tell: the clocks of the hosts are taken
    to agree within DURATION.
    """
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    holder = read(path)
    return age < DURATION and (holder is None or holder.lives() is not False)


def read(path: Path) -> Holder | None:
    """Who holds `path`; None if nobody, or not legibly (yet)."""
    with suppress(OSError, ValueError, KeyError):
        lines = path.read_text(encoding="utf-8").splitlines()
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        return Holder(told["host"], int(told["pid"]), told.get("since", "now"))
    return None


@contextmanager
def _lease(path: Path, lost: Callable[[object], None]) -> Iterator[SoftFileLease]:
    """A lease to be acquired in the block; released after it."""
    lease = SoftFileLease(
        path, lease_duration=DURATION, heartbeat_interval=BEAT, on_compromise=lost
    )
    try:
        yield lease
    finally:
        lease.release()


def _acquire(lease: SoftFileLease, path: Path, *, patient: bool) -> None:
    """Wait for `path`; if not `patient`, only to see whether its holder lives."""
    seen, since = None, time.monotonic()
    while True:
        with suppress(Timeout):
            lease.acquire(blocking=False)  # takes a dead holder's place where it can
            _sign(path)
            return
        found, holder = _look(path), read(path)
        if found is None:
            continue  # it went away just now
        lives = holder.lives() if holder else None
        if lives and time.time() - found[1] / 1e9 > DURATION:
            lives = None  # another process has its number now, unless the file is touched
        if not patient and (lives or (seen and found != seen)):
            raise Busy(
                f"{path.parent} is being worked on by {holder or 'another process'}: wait until it "
                "is done, or end it"
            )
        if seen is None:
            logger.info("waiting for %s, which %s holds", path, holder or "another process")
        if found != seen:
            seen, since = found, time.monotonic()
        if lives is False or time.monotonic() - since > DURATION + 4 * POLL:
            _clear(path, found)
        time.sleep(POLL)


def _look(path: Path) -> tuple[int, int] | None:
    """What changes with every beat and every holder."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _sign(path: Path) -> None:
    """Add since when to what filelock wrote, which ignores fields that it does not know."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"since={datetime.now(UTC).isoformat(timespec='seconds')}\n")


def _clear(path: Path, judged: tuple[int, int]) -> None:
    """Take the file away that was judged dead. If somebody else was quicker and this is theirs, it
    goes back.
    """
    aside = path.with_name(f"{path.name}.dead-{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _look(aside) != judged:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


@cache
def _this_host() -> str:
    """How filelock spells this host."""
    with TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lease") as lease:
        owner = lease.owner
    return owner.hostname if owner else socket.gethostname()
