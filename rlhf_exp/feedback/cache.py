"""Replies of judges by key, in a JSONL file that runs may share.

A row is written whole or, after a kill, found to be half and dropped; a reply once paid for is not
paid for again.
"""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_exp import lease

BATCH = 32  # replies written and fsynced at once


class Cache:
    """`replies` by key; `add` and `flush` append to the file at `path`, which `setting` names."""

    def __init__(self, path: Path, setting: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.setting = path, setting
        self.lock = path.with_name(f".{path.name}.lease")
        self.replies: dict[str, str] = {}
        self.waiting: list[dict[str, Any]] = []
        self.read = self.lines = 0  # bytes and lines known already
        with lease.held(self.lock):
            self._catch_up()

    def add(self, row: dict[str, Any]) -> None:
        """Remember `row` (its `key` and `reply`, and what else a reader may want to see)."""
        self.replies[row["key"]] = row["reply"]
        self.waiting.append(row)
        if len(self.waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Bring what was added to the disk, after what other runs have written meanwhile."""
        if not self.waiting:
            return
        lines = "".join(json.dumps(row) + "\n" for row in self.waiting).encode()
        with lease.held(self.lock):
            self._catch_up()
            with self.path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        self.waiting = []

    def _catch_up(self) -> None:
        """Read what is new in the file; a half line at its end, left by a kill, is cut off."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            file.seek(self.read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            if len(whole) < len(new):
                file.truncate(self.read + len(whole))
        for line in whole.splitlines():
            self.lines += 1
            key, reply = self._parsed(line)
            self.replies.setdefault(key, reply)  # the first reply holds, whoever asked for it
        self.read += len(whole)

    def _parsed(self, line: bytes) -> tuple[str, str]:
        try:
            row = json.loads(line)
            key, reply = row["key"], row["reply"]
        except (ValueError, KeyError, TypeError):
            key = reply = None
        if not isinstance(key, str) or not isinstance(reply, str):
            raise ValueError(
                f"{self.path}, line {self.lines}: not a remembered reply of a judge; remove the "
                f"line, or name another file as {self.setting}"
            )
        return key, reply
