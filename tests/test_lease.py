"""Leases between real processes: one at a time, the dead give way, the living do not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_exp import lease

ROOT = Path(__file__).parents[1]
SHORT = 2.0  # seconds for which a holder on another host may stand still

HOLD = """
import ctypes, os, sys, time
from pathlib import Path
from rlhf_exp import lease
lease.DURATION, lease.BEAT, lease.POLL = 2.0, 0.2, 0.05
"""
WORK = HOLD + "with lease.working(Path(sys.argv[1])):\n    print('in', flush=True)\n    "
SLEEP = "time.sleep(60)"
STOP_THE_INTERPRETER = "ctypes.PyDLL(None).usleep(1_300_000); print('out', flush=True)"
FORK = "os.fork() or os._exit(0); os.wait(); print('forked', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DURATION", SHORT), ("BEAT", 0.2), ("POLL", 0.05)):
        monkeypatch.setattr(lease, name, value)


@contextmanager
def process(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "in"; killed at the end."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "in\n", started.communicate()
            yield started
        finally:
            started.kill()


def elsewhere(path: Path, pid: int = 1) -> None:
    """The file of a holder on another host."""
    path.write_text(
        f"filelock/2\npid={pid}\nhost=node7\nmode=lease\ntoken=00\nduration={SHORT!r}\n"
        "since=2026-01-31T12:00:00+00:00\n"
    )


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Somebody on another host who touches the file."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            path.touch()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ------------------------------------------------------------------------------------ on this host


def test_a_run_that_is_being_worked_on_is_refused_with_who_does_since_when(tmp_path: Path) -> None:
    with process(WORK + SLEEP, tmp_path) as other:
        started = time.monotonic()
        sentence = rf"^{tmp_path} is being worked on by process {other.pid} on \S+ \(since 2\d+-"
        with pytest.raises(ValueError, match=sentence), lease.working(tmp_path):
            raise AssertionError("both work on it")
        assert time.monotonic() - started < 1
        assert lease.alive(tmp_path / lease.RUNNING)


def test_a_killed_holder_gives_way_at_once(tmp_path: Path) -> None:
    with process(WORK + SLEEP, tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / lease.RUNNING).exists()
        assert not lease.alive(tmp_path / lease.RUNNING)
        started = time.monotonic()
        with lease.working(tmp_path):
            holder = lease.read(tmp_path / lease.RUNNING)
            assert holder is not None
            assert (holder.pid, holder.lives()) == (os.getpid(), True)
        assert time.monotonic() - started < SHORT / 2
    assert list(tmp_path.iterdir()) == [], "nothing is left when the work is done"


def test_a_killed_holder_gives_way_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)  # as NFS refuses it
    with process(WORK + SLEEP, tmp_path) as other:
        other.kill()
        other.wait()
        started = time.monotonic()
        with lease.working(tmp_path):
            assert time.monotonic() - started < SHORT / 2
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_holds_the_interpreter_keeps_the_lease(tmp_path: Path) -> None:
    with process(WORK + STOP_THE_INTERPRETER, tmp_path) as other:
        with lease.held(tmp_path / lease.RUNNING):
            assert other.wait(10) == 0, "taken from a living process"
        assert other.communicate() == ("out\n", "")


def test_the_end_of_a_forked_child_is_not_the_end_of_its_parents_work(tmp_path: Path) -> None:
    with process(WORK + FORK, tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "forked\n"
        assert lease.alive(tmp_path / lease.RUNNING)


def test_who_lost_a_run_ends_with_one_sentence(tmp_path: Path) -> None:
    with process(WORK + SLEEP, tmp_path) as other:
        path = tmp_path / lease.RUNNING
        path.unlink()
        elsewhere(path)  # somebody judged it dead while it was suspended
        said = other.communicate(timeout=10)[1]
        assert (other.returncode, said) == (
            1,
            f"error: another process has taken {tmp_path} over\n",
        )
        assert "node7" in path.read_text()


# --------------------------------------------------------------------------------- on another host


def test_a_run_of_another_host_is_refused_as_soon_as_it_beats(tmp_path: Path) -> None:
    path = tmp_path / lease.RUNNING
    elsewhere(path, pid=4711)
    with beating(path):
        sentence = r"process 4711 on node7 \(since 2026-01-31T12:00:00\+00:00\): wait until it is"
        with pytest.raises(ValueError, match=sentence), lease.working(tmp_path):
            raise AssertionError("both work on it")
        assert lease.alive(path)
    assert "node7" in path.read_text()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("content", ["a record", "nothing"])
def test_a_holder_elsewhere_that_stands_still_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, content: str
) -> None:
    if not exchange:
        monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    path = tmp_path / lease.RUNNING
    elsewhere(path)
    if content == "nothing":
        path.write_text("")  # killed before it could write who it is
    assert lease.alive(path)
    started = time.monotonic()
    with lease.working(tmp_path):
        assert SHORT <= time.monotonic() - started < 2 * SHORT
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_touched_for_long_counts_as_dead(tmp_path: Path) -> None:
    elsewhere(tmp_path / "lease")
    before = time.time() - 2 * SHORT
    os.utime(tmp_path / "lease", (before, before))
    assert not lease.alive(tmp_path / "lease")
    assert not lease.alive(tmp_path / "nobody")


def test_a_file_taken_by_mistake_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    elsewhere(path)
    lease._clear(path, (0, 0))  # judged: another one, which somebody has replaced since
    assert "node7" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]
