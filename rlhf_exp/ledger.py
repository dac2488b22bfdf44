"""A JSONL file that only grows and that runs may share: replies of judges, labels of people.

A row is on the disk whole or, after a kill, found to be half and cut off.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rlhf_exp import lease


class Ledger:
    """Remembers how far it has read; `rows` and `write` are for who has it `held`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.read = self.lines = 0  # bytes and lines known already

    def held(self) -> AbstractContextManager[None]:
        """While nobody else reads or writes."""
        return lease.held(self.path.with_name(f".{self.path.name}.lease"))

    def grown(self) -> bool:
        """Whether there is something to read, or something was cut off."""
        return self.path.exists() and self.path.stat().st_size != self.read

    def rows(self) -> Iterator[bytes]:
        """What is new in the file, line by line; a half line at its end, left by a kill, is cut
        off. `lines` is the number of the line that was given last.
        """
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            file.seek(self.read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            if len(whole) < len(new):
                file.truncate(self.read + len(whole))
        for line in whole.split(b"\n")[:-1]:
            self.lines += 1
            self.read += len(line) + 1
            yield line

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Bring `rows` to the disk, after all that was read."""
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
