"""Labelling in a tool of one's own: pairs go out as queue.jsonl, labels come in as answers*.jsonl.

An answer is a row {key, choice, who}; choice is left, right, tie or skip, of the texts as the queue
has them. Files are read whole whenever they change, and rows that are known already are passed by:
they may be appended to or replaced, and the run may start again. An answer to a pair that is not
asked is looked at again in the next round.
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
NAMES = ("key", "choice", "who")  # of an answer
EVERYBODY = ""  # a queue is the same for all, and so is the order of its texts


def whole(line: bytes) -> bool:
    """Whether a line without its end is an answer, not one that is still written."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.keys() >= set(NAMES)


class Files:
    """Writes the queue and reads the answers in `folder`."""

    def __init__(self, folder: Path, poll: float = POLL) -> None:
        self.folder, self.poll = folder, poll
        self.looked: dict[Path, tuple[int, int]] = {}  # time and size of each file when it was read
        self.refused: set[str] = set()  # rows that are no answers, and were named in the log
        self.early: set[str] = set()  # answers to pairs that this round does not ask

    def check(self) -> None:
        """ValueError if the folder is none."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"labeller.folder={self.folder} is a file: name a folder for queue.jsonl"
            )

    def __call__(self, desk: Desk) -> None:
        """Return when the round is over."""
        self.looked, self.early = {}, set()
        self._write(desk)
        logger.info("pairs are in %s; answers*.jsonl beside it are read", self._queue)
        written = desk.open
        while not desk.wait(self.poll):
            self._read(desk)
            if desk.open != written:  # by an answer here, or by another run
                written = desk.open
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
        found, early = False, len(self.early)
        for path in sorted(self.folder.glob("answers*.jsonl")):
            about = path.stat()
            mark = about.st_mtime_ns, about.st_size
            if self.looked.get(path) != mark:
                self.looked[path] = mark
                lines = path.read_bytes().split(b"\n")
                if not whole(lines[-1]):
                    lines.pop()
                for number, line in enumerate(lines, 1):
                    found |= bool(line.strip()) and self._take(desk, path, number, line.strip())
        if len(self.early) > early:
            logger.info("%d answers wait: their pairs are not asked in this round", len(self.early))
        return found

    def _take(self, desk: Desk, path: Path, number: int, line: bytes) -> bool:
        """Take one answer in; what is wrong with it is said once, and the run goes on."""
        id = hashlib.sha256(f"{path.name} {number} ".encode() + line).hexdigest()
        if id in desk.store.ids or id in self.refused or id in self.early:
            return False
        try:
            row = json.loads(line)
            key, choice, who = (row[name] for name in NAMES)
            if not all(isinstance(text, str) and text.strip() for text in (key, who)):
                raise ValueError("key and who must be texts, and not empty")
            desk.label(desk.question(key, EVERYBODY), choice, who=who.strip(), id=id)
        except Closed:
            self.early.add(id)
            return False
        except (ValueError, TypeError, KeyError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            self._refuse(path, number, id, why)
            return False
        return True

    def _refuse(self, path: Path, number: int, id: str, why: str) -> None:
        self.refused.add(id)
        logger.warning("%s, line %d: no answer {key, choice, who}: %s", path, number, why)
