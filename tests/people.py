"""What the tests of people as labellers share: pairs, a labeller, and patience."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_exp.labellers.person import Person

ROWS = [(f"prompt {i}", f"one {i}", f"other {i}") for i in range(6)]


def person(folder: Path, **settings: Any) -> Person:
    given: dict[str, Any] = {"file": str(folder / "person.jsonl"), "folder": str(folder / "queue")}
    return Person(**(given | settings))


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` gives as soon as it is true; files may not be there yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError("it never came true")
