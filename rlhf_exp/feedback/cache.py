"""Replies of judges by key, in a JSONL file that runs may share: a reply once paid for is not paid
for again.
"""

import json
import time
from pathlib import Path
from typing import Any

from rlhf_exp.ledger import Ledger

BATCH = 32  # replies written and fsynced at once, at most
PAUSE = 1.0  # seconds after which those that came are written, however few


class Cache:
    """`replies` by key; `add` and `flush` append to the file at `path`, which `setting` names."""

    def __init__(self, path: Path, setting: str) -> None:
        self.ledger, self.setting = Ledger(path), setting
        self.replies: dict[str, str] = {}
        self.waiting: list[dict[str, Any]] = []
        self.flushed = time.monotonic()
        with self.ledger.held():
            self._catch_up()

    def add(self, row: dict[str, Any]) -> None:
        """Remember `row` (its `key` and `reply`, and what else a reader may want to see)."""
        self.replies[row["key"]] = row["reply"]
        self.waiting.append(row)
        if len(self.waiting) >= BATCH or time.monotonic() - self.flushed > PAUSE:
            self.flush()

    def flush(self) -> None:
        """Bring what was added to the disk, after what other runs have written meanwhile."""
        if not self.waiting:
            return
        with self.ledger.held():
            self._catch_up()
            self.ledger.write(self.waiting)
        self.waiting, self.flushed = [], time.monotonic()

    def _catch_up(self) -> None:
        for line in self.ledger.rows():
            key, reply = self._parsed(line)
            self.replies.setdefault(key, reply)  # the first reply holds, whoever asked for it

    def _parsed(self, line: bytes) -> tuple[str, str]:
        try:
            row = json.loads(line)
            key, reply = row["key"], row["reply"]
        except (ValueError, KeyError, TypeError):
            key = reply = None
        if not isinstance(key, str) or not isinstance(reply, str):
            raise ValueError(
                f"{self.ledger.path}, line {self.ledger.lines}: not a remembered reply of a judge; "
                f"remove the line, or name another file as {self.setting}"
            )
        return key, reply
