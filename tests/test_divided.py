"""Two processes learn from a batch what one does: under DDP and ZeRO, with and without control
tokens.
"""

from pathlib import Path

import group
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "stage"),
    [("ppo", 0), ("ppo", 2), ("ppo", 3), ("rest", 2), ("rest", 3), ("quark", 3)],
)
def test_two_processes_learn_what_one_does(algorithm: str, stage: int, tmp_path: Path) -> None:
    ended = group.of(2, "divided", tmp_path, algorithm, stage)
    assert [p.returncode for p in ended] == [0, 0], "".join(p.stderr for p in ended)
