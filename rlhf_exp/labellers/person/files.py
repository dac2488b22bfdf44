"""Labelling in a tool of one's own: pairs go out as queue.jsonl, labels come in as answers*.jsonl.

An answer is a row {key, choice, who}; choice is left, right, tie or skip, of the texts as the queue
has them. Files are read whole whenever they change, and rows that are known already are passed by:
they may be appended to or replaced, and the run may start again.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

from rlhf_exp.artifacts import write_text
from rlhf_exp.labellers.person.desk import Closed, Desk, shown

logger = logging.getLogger(__name__)

POLL = 1.0  # seconds between looks at the folder
EVERYBODY = ""  # a queue is the same for all, and so is the order of its texts


class Files:
    """Writes the queue and reads the answers in `folder`."""

    def __init__(self, folder: Path, poll: float = POLL) -> None:
        self.folder, self.poll = folder, poll
        self.looked: dict[Path, tuple[int, int]] = {}  # time and size of each file when it was read
        self.refused: set[str] = set()  # rows that were named in the log

    def check(self) -> None:
        """ValueError if the folder is none."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"labeller.folder={self.folder} is a file: name a folder for queue.jsonl"
            )

    def __call__(self, desk: Desk) -> None:
        """Return when the round is over."""
        self.looked = {}
        self._write(desk)
        logger.info("pairs are in %s; answers*.jsonl beside it are read", self._queue)
        while not desk.wait(self.poll):
            if self._read(desk):
                self._write(desk)
        self._write(desk)

    @property
    def _queue(self) -> Path:
        return self.folder / "queue.jsonl"

    def _write(self, desk: Desk) -> None:
        """The pairs that are still to be labelled."""
        rows = [asdict(shown(desk.rows[key], EVERYBODY)) for key in desk.open]
        write_text(self._queue, "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self, desk: Desk) -> bool:
        """Take in what is new; whether anything was."""
        found = False
        for path in sorted(self.folder.glob("answers*.jsonl")):
            about = path.stat()
            mark = about.st_mtime_ns, about.st_size
            if self.looked.get(path) != mark:
                self.looked[path] = mark
                lines = path.read_bytes().split(b"\n")
                for number, line in enumerate(lines[:-1], 1):  # the last one may still be written
                    found |= bool(line.strip()) and self._take(desk, path, number, line.strip())
        return found

    def _take(self, desk: Desk, path: Path, number: int, line: bytes) -> bool:
        """Take one answer in; what is wrong with it is said once, and the run goes on."""
        id = hashlib.sha256(f"{path.name} {number} ".encode() + line).hexdigest()
        if id in desk.store.ids or id in self.refused:
            return False
        try:
            row = json.loads(line)
            key, choice, who = (row[name] for name in ("key", "choice", "who"))
            if not isinstance(who, str) or not who.strip():
                raise ValueError("who must be a name")
            desk.label(desk.question(key, EVERYBODY), choice, who=who.strip(), id=id)
        except Closed:
            self._refuse(path, number, id, "no pair with this key is asked")
            return False
        except (ValueError, TypeError, KeyError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            self._refuse(path, number, id, why)
            return False
        return True

    def _refuse(self, path: Path, number: int, id: str, why: str) -> None:
        self.refused.add(id)
        logger.warning("%s, line %d: no answer {key, choice, who}: %s", path, number, why)
