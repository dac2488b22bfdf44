"""People as the labeller: on a page, in the terminal, or through files for a tool of one's own.

The run waits until every pair has its labels. What was said is kept in a file and found again by
the content of a pair, so a run that was stopped and started again asks only for the rest.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import processes
from rlhf_exp.choices import require
from rlhf_exp.labellers import Labeller
from rlhf_exp.labellers.person.agreement import summary
from rlhf_exp.labellers.person.desk import Desk
from rlhf_exp.labellers.person.files import Files
from rlhf_exp.labellers.person.page import Page
from rlhf_exp.labellers.person.store import Store, combined, key_of
from rlhf_exp.labellers.person.terminal import Terminal

logger = logging.getLogger(__name__)

HOW = ("interface", "folder", "host", "port", "lease")  # labels are asked for, not which


@dataclass(kw_only=True)
class Person(Labeller):
    """Asks people, and combines what several say of a pair: the mean of each one's last label."""

    file: str = "artifacts/labels/person.jsonl"  # where labels are kept; runs may share it
    interface: str = "page"  # page, terminal or files
    labels_per_pair: int = 1  # by as many people
    folder: str | None = None  # of files: queue.jsonl, answers*.jsonl; null: labels/ of the run
    host: str = "127.0.0.1"  # of page: the address it listens on
    port: int = 0  # of page; 0: any free one
    lease: float = 300.0  # of page: seconds that a pair is kept for a page that asks no more

    def __post_init__(self) -> None:
        require(self.interface, ("page", "terminal", "files"), "labeller.interface")
        if self.labels_per_pair < 1:
            raise ValueError(f"labeller.labels_per_pair={self.labels_per_pair} must be at least 1")
        if self.interface == "terminal" and self.labels_per_pair > 1:
            raise ValueError(
                f"labeller.labels_per_pair={self.labels_per_pair} needs several people, and "
                "labeller.interface=terminal asks one: set it to 1, or take interface=page"
            )
        if not 0 <= self.port < 2**16:
            raise ValueError(f"labeller.port={self.port} must be 0, for any free one, to 65535")
        if not self.lease > 0:
            raise ValueError(f"labeller.lease={self.lease} must be positive: seconds")
        self.dear = True
        self.desk: Desk | None = None
        self.keys: set[str] = set()  # of the pairs asked about

    def identity(self) -> dict[str, Any]:
        """How labels are asked for decides nothing. Nor do the labels themselves: they come while
        the pairs are made. Who takes some back later removes the artifact of the pairs, which is
        then made again from the file, or names another file.
        """
        return dict.fromkeys(HOW)

    def check(self) -> None:
        if processes.main():
            if self.interface != "files" or self.folder is not None:
                self._interface(Path()).check()
            Store(self._path())

    def open(self, directory: Path) -> None:
        if processes.main() and self.desk is None:
            store = Store(self._path())
            self.desk = Desk(store, labels_per_pair=self.labels_per_pair, lease=self.lease)
            self.ask = self._interface(directory)

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        rows = list(zip(prompts, left, right, strict=True))
        return torch.tensor(processes.first(lambda: self._labels(rows)))

    def _labels(self, rows: Sequence[tuple[str, str, str]]) -> list[float]:
        """P(the first text is better) for each row."""
        assert self.desk is not None, "open comes first"
        missing = self.desk.ask(rows)
        self.keys |= set(self.desk.rows)
        if missing:
            logger.info("waiting for people: %d of %d pairs are unlabelled", missing, len(rows))
            self.ask(self.desk)
        store = self.desk.store
        return [combined(store.of(key_of(*row)), row[1]) for row in rows]

    def finished(self) -> bool:
        return self.desk is not None and self.desk.finished

    def report(self) -> dict[str, float]:
        if self.desk is None:
            return {}
        found = summary([self.desk.store.of(key) for key in sorted(self.keys)])
        refused = len(self.ask.refused) if isinstance(self.ask, Files) else 0
        return found | ({"refused_answers": refused} if refused else {})

    def _path(self) -> Path:
        return Path(self.file).expanduser()

    def _interface(self, directory: Path) -> Any:
        """How people are asked in the run in `directory`."""
        if self.interface == "page":
            return Page(host=self.host, port=self.port)
        if self.interface == "terminal":
            return Terminal()
        if self.folder is None:
            return Files(directory / "labels")
        return Files(Path(self.folder).expanduser())
