"""Labelling in the terminal of the run: two texts, one key."""

import getpass
import os
import select
import shutil
import sys
import termios
import textwrap
import time
import tty
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_exp.labellers.person.desk import Desk, Question

KEYS = {"1": "left", "2": "right", "0": "tie", "s": "skip"}
POLL = 0.5  # seconds between looks at what has happened while no key is pressed
HELP = "1 first is better   2 second is better   0 tie   s skip   u undo   q finish"


def plain(text: str) -> str:
    """`text` with its control characters spelled out: a completion does not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, indented."""
    lines = (textwrap.wrap(line, width - 4) or [""] for line in plain(text).split("\n"))
    return "\n".join(f"    {part}" for line in lines for part in line)


@contextmanager
def single_keys() -> Iterator[None]:
    """Keys come without Enter; Ctrl-C still interrupts."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_key() -> str:
    """The next key, or nothing if none is pressed for POLL seconds: reading alone would go on after
    a signal. KeyboardInterrupt where the terminal is gone.
    """
    if not select.select([sys.stdin], [], [], POLL)[0]:
        return ""
    found = os.read(sys.stdin.fileno(), 1)
    if not found:
        raise KeyboardInterrupt
    return found.decode(errors="replace")


class Terminal:
    """Asks whoever started the run."""

    def __init__(self, key: Callable[[], str] = read_key) -> None:
        self.key = key

    def check(self) -> None:
        """ValueError if there is nobody to ask."""
        if not sys.stdin.isatty():
            raise ValueError(
                "labeller.interface=terminal needs a terminal to read keys from, and standard "
                "input is none: start the run in one, or take labeller.interface=page or files"
            )

    def __call__(self, desk: Desk) -> None:
        """Return when the round is over."""
        who = getpass.getuser()
        with single_keys():
            while not desk.wait(0.0):
                questions = desk.take(who)
                if not questions:  # somebody else has to say, or has it in hand
                    desk.wait(POLL)
                    continue
                self._show(desk, who, questions[0])
                self._answer(desk, who, questions[0])

    def _show(self, desk: Desk, who: str, question: Question) -> None:
        state, width = desk.state(who, 1), min(shutil.get_terminal_size().columns, 100)
        rule = "─" * width
        parts = [f"\n{rule}\npair {state['done'] + 1} of {state['asked']}\n"]
        parts += [f"prompt\n{wrapped(question.prompt, width)}\n"]
        parts += [f"1\n{wrapped(question.left, width)}\n", f"2\n{wrapped(question.right, width)}\n"]
        print("\n".join([*parts, HELP]), flush=True)

    def _answer(self, desk: Desk, who: str, question: Question) -> None:
        """Read keys until one of them means something, or another run has the answer."""
        began = time.monotonic()
        while not desk.wait(0.0) and question.key in desk.open:
            key, id = self.key().lower(), uuid.uuid4().hex
            if key in KEYS:
                seconds = round(time.monotonic() - began, 2)
                desk.label(question, KEYS[key], who=who, id=id, seconds=seconds)
                print(f"  {KEYS[key]}", flush=True)
            elif key == "u":
                print("  taken back" if desk.undo(who=who, id=id) else "  nothing to take back")
            elif key == "q":
                desk.finish()
            else:
                continue
            return
