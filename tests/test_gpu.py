"""The main job on a GPU, in small."""

import json
from pathlib import Path

import pytest
import torch
from runs import command_line

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("extra", [[], ["policy.lora={r: 4, target_modules: all-linear}"]])
def test_debug_run_on_a_gpu(tmp_path: Path, extra: list[str]):
    run = tmp_path / "run"
    process = command_line(
        "experiment=debug", "hardware=gpu", f"hydra.run.dir={run}", *extra, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((run / "summary.json").read_text())["kl"]["after"]["mean"] != 0


def test_debug_run_with_a_probe_on_a_gpu(tmp_path: Path):
    run = tmp_path / "run"
    process = command_line(
        "experiment=debug",
        "data=facts",
        "reward=probe",
        "hardware=gpu",
        f"hydra.run.dir={run}",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    (report,) = (tmp_path / "artifacts" / "reward").glob("probe-*/report.json")
    assert json.loads(report.read_text())["zero_shot"] is not None
    assert -1 <= json.loads((run / "summary.json").read_text())["proxy"]["after"]["mean"] <= 1
