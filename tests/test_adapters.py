"""Where adapters go: by part of a block in any architecture, and nowhere without a word."""

import re
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_exp import adapters
from rlhf_exp.hardware import Hardware
from rlhf_exp.plan.skeleton import of_policy
from rlhf_exp.precision import check

OPT = {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 2}
SHAPES: dict[str, dict[str, Any]] = TINY | {
    "qwen2": TINY["llama"],
    "phi3": TINY["llama"] | {"pad_token_id": 0},
    "opt": OPT | {"word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 2},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 2, "rotary_dim": 4},
}
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPECTED = {
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "llama": (PROJECTIONS, GATED),
    "qwen2": (PROJECTIONS, GATED),
    "phi3": (["self_attn.o_proj", "self_attn.qkv_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
    "opt": ([f"self_attn.{x}_proj" for x in ("k", "v", "q", "out")], ["fc1", "fc2"]),
    "bloom": (
        ["self_attention.query_key_value", "self_attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "gptj": ([f"attn.{x}_proj" for x in ("k", "v", "q", "out")], ["mlp.fc_in", "mlp.fc_out"]),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_parts_of_a_block_by_architecture(kind: str) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, vocab_size=300, **SHAPES[kind])
        model = AutoModelForCausalLM.from_config(config)
        attention, mlp = EXPECTED[kind]
        assert sorted(adapters.targets(model, "attention")) == sorted(attention)
        assert sorted(adapters.targets(model, "mlp")) == sorted(mlp)
        adapted = adapters.add_lora(model, {"r": 2, "target_modules": "mlp"})
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(mlp), "A and B of each, in two blocks"
    assert all(any(f".{name}.lora_" in t for name in mlp) for t in trained)


@pytest.mark.parametrize("part", ["attention", "mlp", "all"])
def test_the_plan_counts_what_is_trained(part: str, tiny_base: Any) -> None:
    policy = tiny_policy("llama", lora={"r": 2, "target_modules": part})
    policy.load(tiny_base("llama"), trainable=True)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert of_policy(policy, policy.tokenizer).counts.trained == trained > 0


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, r"names query, and no module .* q_proj, k_proj"),
        ({"target_modules": ".*query"}, r"names \.\*query, and no module .* q_proj"),
        ({"target_modules": "(q_proj"}, r"\(q_proj is no regular expression"),
        ({"rank": 4}, r"policy\.lora\.rank is no field of peft\.LoraConfig.*rank_pattern"),
    ],
    ids=str,
)
def test_what_no_module_is_called_is_refused_before_weights_load(
    lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(tiny_policy("llama", lora=lora), Hardware(), trains=True)
    assert not re.search(r"[.!?] [A-Z]", str(caught.value)), "one sentence"


def test_layers_that_are_not_there_are_refused_before_weights_load() -> None:
    with pytest.raises(ValueError, match=r"policy\.train_top=5 must be between 1 and 1"):
        check(tiny_policy("llama", train_top=5), Hardware(), trains=True)
