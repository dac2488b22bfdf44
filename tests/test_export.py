"""The stage export: a plain folder that answers as the trained policy did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from runs import DebugRun, inside
from torch import Tensor

from rlhf_exp import weights
from rlhf_exp.artifacts import write_directory
from rlhf_exp.export import Export
from rlhf_exp.policy import Policy

pytest_plugins = ["runs_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")

CPU = torch.device("cpu")
IDS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
ADAPTED = {"lora": {"r": 4, "target_modules": "all-linear", "lora_alpha": 8}, "sft": False}


def trained(base: Path, directory: Path, **settings: Any) -> Policy:
    """A policy with an adapter that has learned something, saved as a run does."""
    policy = Policy(path=str(base), **settings)
    policy.load(base, trainable=True)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    write_directory(directory / "policy", policy.save, {})
    return policy


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


def exported(folder: Path) -> Tensor:
    """What anybody gets who loads the folder with transformers alone."""
    from transformers import AutoModelForCausalLM

    assert not (folder / "adapter_config.json").exists()
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("kind", TINY)
def test_an_adapter_is_merged(tiny_base, tmp_path: Path, kind: str) -> None:
    policy = trained(tiny_base(kind), tmp_path, **ADAPTED)
    folder = Export().write(tmp_path, CPU)
    assert folder == tmp_path / "export"
    torch.testing.assert_close(exported(folder), logits(policy.model), atol=1e-4, rtol=0)
    with torch.no_grad(), policy.model.disable_adapter():
        assert (logits(policy.model) - exported(folder)).abs().max() > 0.1
    report = json.loads((folder / "export.json").read_text())
    assert report["max"] < 1e-4
    assert report["same"] == 1.0


def test_what_is_exported_is_a_policy_to_start_from(tiny_base, tmp_path: Path) -> None:
    policy = trained(tiny_base(), tmp_path, **ADAPTED, prefix="> ")
    folder = Export().write(tmp_path, CPU)
    again = Policy(path=str(folder), sft=False)
    again.load(folder)
    assert again.prefix == "> "
    torch.testing.assert_close(logits(again.model), logits(policy.model), atol=1e-4, rtol=0)
    assert weights.saved_settings(folder)["lora"] is False


def test_control_tokens_keep_their_rows(tiny_base, tmp_path: Path) -> None:
    policy = Policy(path=str(tiny_base()), **ADAPTED)
    policy.load(tiny_base(), trainable=True)
    policy.add_control_tokens(["<best>", "<worst>"])
    write_directory(tmp_path / "policy", policy.save, {})
    folder = Export().write(tmp_path, CPU)
    torch.testing.assert_close(exported(folder), logits(policy.model), atol=1e-4, rtol=0)
    assert exported(folder).shape[-1] == logits(policy.model).shape[-1]
    assert weights.saved_settings(folder)["control"] == policy.control


def test_whole_weights_are_written_in_the_dtype_asked_for(tiny_base, tmp_path: Path) -> None:
    policy = trained(tiny_base(), tmp_path)
    folder = Export(dtype="bfloat16", folder=str(tmp_path / "half")).write(tmp_path, CPU)
    assert folder == tmp_path / "half"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    gap = (exported(folder) - logits(policy.model)).abs().max()
    assert 1e-5 < float(gap) < 0.1
    with pytest.raises(ValueError, match=r"half exists already: choose another export.folder"):
        Export(folder=str(folder)).write(tmp_path, CPU)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_over_quantized_weights(
    tiny_base, tmp_path: Path, kind: str, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    policy = trained(tiny_base(kind), tmp_path, **ADAPTED, quantization=quantization)
    folder = Export().write(tmp_path, CPU)
    gap = (exported(folder) - logits(policy.model)).abs()
    if quantization == "int8":  # its products round activations too, which exported weights do not
        assert gap.mean() < 0.03 * logits(policy.model).std()
        return
    assert gap.max() < 1e-4
    other = Export(base="original", folder=str(tmp_path / "original"), tolerance=9.0)
    before = exported(other.write(tmp_path, CPU))
    assert (before - logits(policy.model)).abs().max() > 0.05  # quantization had moved the weights


def test_another_model_than_the_trained_one_is_refused(tiny_base, tmp_path: Path) -> None:
    trained(tiny_base(), tmp_path, **ADAPTED)
    with pytest.raises(ValueError, match=r"was trained on other weights than .*: give the base"):
        Export(path=str(tiny_base(seed=1))).write(tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match=r"no longer at /nowhere: give export.path="):
        Export(path="/nowhere").write(tmp_path, CPU)
    with pytest.raises(ValueError, match=r"more than export.tolerance=1e-12: see export.base"):
        Export(dtype="bfloat16", tolerance=1e-12).write(tmp_path, CPU)
    assert not (tmp_path / "export").exists()


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no trained policy in .*: give export.run="):
        Export().source(tmp_path)
    with pytest.raises(ValueError, match=r"export\.base=both"):
        Export(base="both")


@pytest.mark.slow
def test_the_stage(debug_run: DebugRun, tmp_path: Path, refused: Any) -> None:
    asked = ["stages=[export]", f"artifacts={tmp_path / 'none'}"]
    assert inside(tmp_path / "out", *asked, f"export.run={debug_run.directory}") == 0
    policy = Policy(path=str(debug_run.directory / "policy"), sft=False)
    policy.load(debug_run.directory / "policy")
    torch.testing.assert_close(exported(tmp_path / "out" / "export"), logits(policy.model))
    assert "logits against the trained policy" in (tmp_path / "out" / "run.log").read_text()
    assert not (tmp_path / "none").exists()  # nothing was trained or built for it
    assert "no trained policy in" in refused("stages=[export]")


def test_adapters_that_train_copies_of_layers(tiny_base, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    policy = trained(tiny_base(), tmp_path, lora=lora, sft=False)
    folder = Export().write(tmp_path, CPU)
    torch.testing.assert_close(exported(folder), logits(policy.model), atol=1e-4, rtol=0)
