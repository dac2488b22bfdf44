"""The plan of memory against what a GPU's allocator counts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from transformers import AutoConfig

from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.hardware import Hardware
from rlhf_exp.plan import memory
from rlhf_exp.plan.memory import Job
from rlhf_exp.plan.skeleton import Skeleton
from rlhf_exp.reference import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SHAPE = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
}
PROMPTS = [f"{word} " * 60 for word in ("big", "small", "old", "new")] * 8


def allocated(call: Any) -> float:
    """Bytes that `call` takes at its peak, beside what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("lora", [None, {"r": 16, "target_modules": "all-linear"}])
def test_ppo_in_bfloat16(lora: dict[str, Any] | None, tiny_base: Any) -> None:
    algo = PPO(steps=1, batch=32, minibatch=32, token_budget=4096)
    policy = tiny_policy("llama", max_new_tokens=64, min_new_tokens=64, sample_batch=32, lora=lora)
    policy.open(tiny_base("gpt2"))
    config = AutoConfig.for_model(
        "llama", vocab_size=32_000, bos_token_id=0, eos_token_id=0, **SHAPE
    )
    skeleton = Skeleton(config, dtype="bfloat16", lora=lora)
    policy.model, policy.dtype = skeleton.build().to("cuda"), "bfloat16"
    asked = sorted(len(ids) for ids in policy.encode(PROMPTS))
    told: dict[str, Any] = {"sft": None, "labeller": None, "preferences": None, "scorers": []}
    job = Job(
        stages=[], skeleton=skeleton, policy=policy, algo=algo, prompts=asked, held_out=asked,
        evaluation=SimpleNamespace(prompts=32, samples=1), demonstrations=asked,
        hardware=Hardware(), **told,
    )  # fmt: skip
    hardware = Hardware(device="cuda")
    trial: Any = SimpleNamespace(
        accelerator=hardware.accelerator(), reference=Reference(policy), mixed_precision="no"
    )
    algo.setup(policy, None, None, trial)  # type: ignore[arg-type]
    plan = {p.name: p.total for p in memory._learning(job, {})}
    plan |= {p.name: p.total for p in memory._evaluation(job, {}, {})}
    rollouts, rows = policy.sample(PROMPTS), torch.arange(32)
    seen = algo.look_back(rollouts)
    algo.update(rollouts, seen, rows)
    measured = {
        "evaluation: sampling": allocated(lambda: policy.sample(PROMPTS)),
        "look-back": allocated(lambda: algo.look_back(rollouts)),
        "update": allocated(lambda: algo.update(rollouts, seen, rows)),
    }
    for name, taken in measured.items():
        assert plan[name] == pytest.approx(taken, rel=0.1), name
