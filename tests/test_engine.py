"""ZeRO in two real processes takes the steps of one."""

import group
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("hardware", ["zero2", "zero3"])
def test_two_processes_take_the_steps_of_one(hardware: str, tmp_path) -> None:
    for process in group.of(2, "engine", tmp_path, hardware):
        assert process.returncode == 0, process.stderr
