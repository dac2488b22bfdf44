"""Two processes learn from a batch what one does: under DDP and ZeRO, with and without control
tokens.
"""

from pathlib import Path

import group
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "hardware"),
    [
        ("ppo", "ddp"),
        ("ppo", "zero2"),
        ("ppo", "zero3"),
        ("rest", "zero2"),
        ("rest", "zero3"),
        ("quark", "zero3"),
    ],
)
def test_two_processes_learn_what_one_does(algorithm: str, hardware: str, tmp_path: Path) -> None:
    ended = group.of(2, "divided", tmp_path, algorithm, hardware)
    assert [p.returncode for p in ended] == [0, 0], "".join(p.stderr for p in ended)
