"""Weights, adapters and rewards that are not there or misbehave: one sentence, and no results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import inside, says

from rlhf_exp.artifacts import Store
from rlhf_exp.policy import Policy

pytest_plugins = ["runs_fixtures"]


# ---- weights


@pytest.mark.parametrize(
    ("path", "fragments"),
    [
        ("nobody/nothing", ["nobody/nothing", "reachable", "check the name"]),
        ("./nowhere", ["./nowhere", "no model"]),
        ("nowhere.gguf", ["nowhere.gguf", "no model"]),
        ("empty", ["empty", "config.json"]),
    ],
)
def test_a_model_that_is_not_there(
    path: str, fragments: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    says(
        refused("experiment=debug", "reward=lexicon", "policy=hub", f"policy.path={path}"),
        *fragments,
    )
    assert not (tmp_path / "artifacts").exists()


def test_a_reward_model_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    asked = ["reward=hub", "reward.path=nobody/nothing"]
    says(refused("experiment=debug", *asked), "nobody/nothing", "reachable")
    assert not (tmp_path / "artifacts").exists(), "this is known before anything is trained"


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with tiny models of one shape; tmp_path/adapter is one on the first."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}
    policies = [Policy(architecture=dict(shape), vocabulary=300, seed=seed) for seed in (0, 1)]
    store = Store(tmp_path / "models")
    folders = [Path(policy.base(store, ["film one was good"])) for policy in policies]
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    adapted: Any = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    return folders[0], folders[1]


def starting_from(base: Path, *others: str) -> list[str]:
    return ["experiment=debug", "reward=lexicon", "policy=hub", f"policy.path={base}", *others]


def test_an_adapter_that_is_not_there(
    refused: Callable[..., str], bases: tuple[Path, Path]
) -> None:
    asked = starting_from(bases[0], "policy.adapter=nowhere")
    says(refused(*asked), "policy.adapter=nowhere", "adapter_config.json")


def test_an_adapter_on_another_base(
    refused: Callable[..., str], bases: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = starting_from(bases[1], "policy.adapter=adapter")
    says(
        refused(*asked),
        "the adapter adapter was trained on",
        bases[0].name,
        bases[1].name,
        "policy.path",
    )


def test_an_adapter_on_its_own_base_is_used(
    bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["algo.steps=1", "algo.lr=0", "policy.max_new_tokens=4", "artifacts=artifacts"]
    for name, others in (("plain", []), ("adapted", ["policy.adapter=adapter"])):
        assert inside(tmp_path / name, *starting_from(bases[0], *short, *others)) == 0
    plain, adapted = (
        json.loads((tmp_path / n / "evaluation" / "step-000000.json").read_text())["rows"]
        for n in ("plain", "adapted")
    )
    assert [r["completion"] for r in plain] != [r["completion"] for r in adapted]


# ---- rewards


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        ("[float('nan')] * len(completions)", ["nan", "finite"]),
        ("[1.0] * (len(completions) - 1) + [float('-inf')]", ["-inf", "finite"]),
        ("None", ["gave None", "one number per completion"]),
        ("[None] * len(completions)", ["None", "one number per completion"]),
        ("[1.0]", ["one score for each of 16 completions"]),
        ("[[1.0, 2.0]] * len(completions)", ["one", "completion"]),
        ("1.0", ["one", "completion"]),
        ("['good'] * len(completions)", ["one number per completion"]),
        ("completions[0]['text']", ["raised TypeError"]),
    ],
)
def test_a_reward_function_that_misbehaves(
    body: str,
    fragments: list[str],
    refused: Callable[..., str],
    tmp_path: Path,
    artifacts: Path,
    request: pytest.FixtureRequest,
) -> None:
    module = f"bad_reward_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"def f(prompts, completions):\n    return {body}\n")
    asked = ["experiment=debug", "reward=function", f"reward.function={module}:f"]
    says(refused(*asked, f"artifacts={artifacts}"), "reward", *fragments)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("no_such_module:f", "no_such_module"),
        ("json:no_such_function", "no_such_function"),
        ("reward_cut_short:f", "reward_cut_short.py"),
    ],
)
def test_a_reward_function_that_is_not_there(
    name: str, fragment: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "reward_cut_short.py").write_text("def f(prompts, completions):\n    return [")
    asked = ["experiment=debug", "reward=function", f"reward.function={name}"]
    says(refused(*asked), f"reward.function={name}", fragment, "check module and name")
    assert not (tmp_path / "artifacts").exists(), "this is known before anything is trained"


def test_a_reward_function_of_another_signature(
    refused: Callable[..., str], artifacts: Path
) -> None:
    asked = ["reward=function", "reward.function=builtins:len", f"artifacts={artifacts}"]
    says(refused("experiment=debug", *asked), "reward.function=builtins:len", "raised TypeError")
