"""docs/support-matrix.md is made of what runs left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.report.matrix import as_markdown, read


def finished(run: Path, change: float, interval: list[float], processes: int = 1) -> None:
    (run / "evaluation").mkdir(parents=True)
    rows = [{"proxy": 1.0}, {"proxy": 5.0}]  # standard deviation 2
    (run / "evaluation" / "step-000000.json").write_text(json.dumps({"rows": rows}))
    moved = {"proxy": {"change": {"mean": change, "interval": interval}}}
    (run / "summary.json").write_text(json.dumps(moved))
    about = {
        "versions": {"rlhf_exp": "0.1.0", "torch": "2.13"},
        "config": {"hardware": {"device": None, "processes": processes}},
        "machine": {"gpus": 0},
    }
    (run / "run.json").write_text(json.dumps(about))


def test_a_cell_is_the_change_in_standard_deviations(tmp_path: Path) -> None:
    finished(tmp_path / "ppo" / "lexicon", 3.0, [2.0, 4.0])
    finished(tmp_path / "ppo" / "mix", -1.0, [-2.0, 0.5])
    finished(tmp_path / "dpo" / "mix", 0.2, [-0.1, 0.5])
    page = as_markdown("reward", read(tmp_path))
    assert "Made from 3 runs" in page
    assert "| | mix | lexicon |\n" in page
    assert "| `dpo` | +0.1 | none |\n" in page
    assert "| `ppo` | -0.5 | **+1.5** |\n" in page
    assert "Versions: rlhf_exp 0.1.0, torch 2.13." in page


def test_hardware_says_how_many_processes(tmp_path: Path) -> None:
    finished(tmp_path / "ppo" / "zero2", 1.0, [-1.0, 2.0], processes=2)
    page = as_markdown("hardware", read(tmp_path))
    assert "| | zero2 x 2 |\n" in page
    assert "devices: cpu" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["reward"], "usage: "), (["weather", "."], "usage: "), (["reward", "."], "no finished run")],
)
def test_what_cannot_be_read(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_exp.report.matrix", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
