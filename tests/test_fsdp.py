"""FSDP in two real processes: the steps of plain AdamW, state that is anybody's, whole runs."""

import json
from pathlib import Path

import group
import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import command_line, nothing_half_written, rewound, rows, same_outcome, says, the_error
from transformers import AutoModelForCausalLM

from rlhf_exp.artifacts import verify
from rlhf_exp.config import build, conf_directory, resolved
from rlhf_exp.hardware import Hardware
from rlhf_exp.hardware.fsdp import FSDP
from rlhf_exp.policy import Policy

pytest_plugins = ["runs_fixtures"]
slow = pytest.mark.slow


def together(part: str, folder: Path, *arguments: str) -> None:
    for process in group.of(2, part, folder, *arguments):
        assert process.returncode == 0, process.stderr


@slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    together("engine", tmp_path, "fsdp2")


@slow
def test_full_adapted_and_mixed_weights_and_state_for_others(tmp_path: Path) -> None:
    from sharded_steps import alone, apart, built

    together("sharded", tmp_path, "compare")
    saved = torch.load(tmp_path / "after-3.pt")
    assert apart(alone(built, 3, **saved)[1], alone(built, 0, 1, 2, 3)[1]) < 1e-6
    together("sharded", tmp_path, "go_on")  # in ZeRO-3


@slow
@pytest.mark.parametrize(
    ("algorithm", "policy"), [("ppo", "top"), ("ppo", "lora"), ("rest", "whole"), ("quark", "lora")]
)
def test_algorithms_learn_what_they_learn_in_one_process(
    algorithm: str, policy: str, tmp_path: Path
) -> None:
    together("divided", tmp_path, algorithm, "fsdp2", policy)


@slow
def test_a_run_and_its_resumption_there_and_elsewhere(artifacts: Path, tmp_path: Path) -> None:
    asked = ["experiment=debug", "reward=lexicon", "checkpoints.every=2", "checkpoints.keep=99"]
    run = tmp_path / "run"
    where = ["hardware=fsdp2", "hardware.device=cpu", "hardware.processes=2"]
    asked += [f"artifacts={artifacts}", f"hydra.run.dir={run}"]
    done = command_line(*asked, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    verify(run / "policy")
    state = torch.load(run / "checkpoints" / "step-000004" / "state.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert model.config.architectures == ["GPT2LMHeadModel"]
    saved = dict(model.named_parameters())
    assert saved.keys() == state["policy"].keys()
    assert all(torch.equal(saved[name], value) for name, value in state["policy"].items())
    assert len(state["algorithm"]["optimizer"]["state"]) == len(saved) + 2  # and a value head

    there = rewound(run, tmp_path / "there", 2)
    done = command_line(f"resume={there}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_outcome(there, run)

    elsewhere = rewound(run, tmp_path / "elsewhere", 2)
    done = command_line(f"resume={elsewhere}", "hardware=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in rows(elsewhere / "metrics.jsonl") if "reward/proxy" in r] == [
        *range(4)
    ]
    assert json.loads((elsewhere / "summary.json").read_text())["step"] == 4


# ---- refusals


def test_trainers_of_trl_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    asked = ["experiment=debug", "algo=dpo", f"hydra.run.dir={tmp_path / 'run'}"]
    where = ["hardware=fsdp2", "hardware.device=cpu", "hardware.processes=2"]
    done = command_line(*asked, f"artifacts={tmp_path / 'artifacts'}", *where, cwd=tmp_path)
    assert done.returncode == 1
    says(the_error(done.stderr), "algo=dpo trains by a trainer of TRL", "use hardware=zero3")
    nothing_half_written(tmp_path / "run")
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("name", ["dpo", "sft", "grpo", "rloo", "ppo", "quark", "best_of_n"])
def test_algorithms_that_may_train(name: str) -> None:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = resolved(compose("config", overrides=[f"algo={name}"]))
    policy, algo = (build(config[key], key) for key in ("policy", "algo"))
    Hardware().check_training(policy, algo)
    if name not in ("dpo", "sft", "grpo", "rloo"):
        FSDP().check_training(policy, algo)
        return
    with pytest.raises(ValueError, match=f"algo={name} trains by a trainer of TRL"):
        FSDP().check_training(policy, algo)


def test_quantized_weights_and_fp16_are_refused() -> None:
    quantized = Policy(path="x", quantization="nf4", lora={"r": 2}, sft=False)
    Hardware().check_training(quantized, object())
    with pytest.raises(ValueError, match=r"quantization=nf4 .* use hardware=zero3"):
        FSDP().check_training(quantized, object())
    with pytest.raises(ValueError, match=r"mixed_precision=fp16 needs a loss scaler.* use bf16"):
        FSDP(mixed_precision="fp16")
