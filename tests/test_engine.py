"""ZeRO in two real processes takes the steps of one."""

import group
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_take_the_steps_of_one(stage: int, tmp_path) -> None:
    for process in group.of(2, "zero", tmp_path, stage):
        assert process.returncode == 0, process.stderr
