"""The store: what a stage makes is a directory named by its fingerprint, complete or absent.

A directory is written under a temporary name, every file fsynced and hashed, and renamed. Whoever
finds it finished reuses it after checking the hashes; whoever comes while it is being made, on this
host or another, waits for a lease. Of the processes of one run, the main one makes and writes; the
others wait and read.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_exp import lease, processes

MANIFEST = "artifact.json"
# How a full disk or a file size limit reads, also through libraries with errors of their own.
FULL = ("No space left", "File too large", "os error 28", "os error 27")


def fingerprint(spec: Any) -> str:
    """First 12 hex digits of the SHA-256 of `spec` as canonical JSON."""
    return hashlib.sha256(
        json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:12]


def file_hash(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name, so that a reader or a crash never sees half a file. Only the
    main process writes.
    """
    if not processes.main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_directory(path: Path, make: Callable[[Path], object], about: dict) -> None:
    """Let `make` fill a directory that appears at `path` whole or not at all, with a manifest of
    its hashes; if somebody else's has appeared there meanwhile, that one stays. Only the main
    process writes.
    """
    if not processes.main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        with lease.held(_lease_of(temporary)):
            temporary.mkdir()
            make(temporary)
            _seal(temporary, about)
            _move(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if any(sign in str(error) for sign in FULL):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise


def _lease_of(temporary: Path) -> Path:
    """Held by whoever is writing the directory `temporary`."""
    return temporary.with_name(f"{temporary.name}.lease")


def _clear_leftovers(path: Path) -> None:
    """Take away what processes that were killed have left of `path`, on any host."""
    for found in path.parent.glob(f".{path.name}.tmp-*"):
        temporary = found.with_name(found.name.removesuffix(".lease"))
        if not lease.alive(_lease_of(temporary)):
            shutil.rmtree(temporary, ignore_errors=True)
            _lease_of(temporary).unlink(missing_ok=True)


def _seal(folder: Path, about: dict) -> None:
    """Hash every file into the manifest and bring all to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {str(p.relative_to(folder)): file_hash(p) for p in files}
    write_json(folder / MANIFEST, about | {"files": hashes})
    for file in files:
        _sync(file)
    _sync(folder)


def _move(temporary: Path, path: Path) -> None:
    """Give the directory its name, unless a finished one has it."""
    try:
        temporary.rename(path)
    except OSError:
        if not (path / MANIFEST).is_file():
            raise
        shutil.rmtree(temporary)
        verify(path)
    _sync(path.parent)


def verify(path: Path) -> dict:
    """The manifest of a directory made by `write_directory`; ValueError if a file is missing or
    altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        hashes = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged (no readable {MANIFEST}): delete it to have it made again"
        ) from None
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or file_hash(file) != expected:
            raise ValueError(
                f"{path} is damaged ({name} is missing or altered): delete it to have it made again"
            )
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Store:
    """`<root>/<kind>/<name>-<fingerprint>/`; remembers in `used` where each artifact of this run
    came from.
    """

    root: Path

    def __post_init__(self) -> None:
        self.used: dict[str, str] = {}

    def get(self, kind: str, name: str, spec: dict, make: Callable[[Path], None]) -> Path:
        """The finished artifact that `spec` determines, made now if nobody made it before: by the
        main process alone, while the others wait as long as it takes.
        """
        path = self.root / kind / f"{name}-{fingerprint(spec)}"
        if not processes.main():
            processes.wait(path.exists)
            verify(path)
            return path
        made = not path.exists() and self._make(
            path, make, {"kind": kind, "name": name, "spec": spec}
        )
        if not made:
            verify(path)
        self.used[str(path)] = "made" if made else "reused"
        return path

    def _make(self, path: Path, make: Callable[[Path], None], about: dict) -> bool:
        """Make it, or wait until whoever came first has; whether it was us."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with lease.held(path.parent / f".{path.name}.lease"):
            if path.exists():
                return False
            now = datetime.now(UTC).isoformat(timespec="seconds")
            with processes.alone():
                write_directory(path, make, about | {"made": now})
        return True
