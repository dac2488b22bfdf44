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


LORA = "policy.lora={r: 4, target_modules: all}"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        [LORA],
        ["hardware.mixed_precision=bf16"],
        ["hardware.frozen=offloaded", "policy.gradient_checkpointing=true"],
        ["reward=lexicon", "policy.sft=false", LORA, "policy.quantization=nf4"],
        ["reward=lexicon", "policy.sft=false", LORA, "policy.quantization=int8"],
    ],
    ids=["whole", "lora", "bf16", "offloaded", "nf4", "int8"],
)
def test_debug_run_on_a_gpu(tmp_path: Path, extra: list[str]):
    if any("quantization" in setting for setting in extra):
        pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
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
