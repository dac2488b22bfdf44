"""The store: what a stage makes is a directory named by its fingerprint, complete or absent.

A directory is written under a temporary name, every file fsynced and hashed, and renamed. Whoever
finds it finished reuses it after checking the hashes; whoever comes while it is being made waits on
a file lock. Of the processes of one run, the main one makes and writes; the others wait and read.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf_exp import processes

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
    its hashes. Only the main process writes.
    """
    if not processes.main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(stale)  # left by a process that was killed
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        make(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        hashes = {str(p.relative_to(temporary)): file_hash(p) for p in files}
        write_json(temporary / MANIFEST, about | {"files": hashes})
        for file in files:
            _sync(file)
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if any(sign in str(error) for sign in FULL):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise


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
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            found = path.exists()
            if found:
                verify(path)
            else:
                made = datetime.now(UTC).isoformat(timespec="seconds")
                with processes.alone():
                    write_directory(
                        path, make, {"kind": kind, "name": name, "spec": spec, "made": made}
                    )
        self.used[str(path)] = "reused" if found else "made"
        return path
