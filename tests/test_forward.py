"""Blocks computed again, compiled, or with another attention: the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from test_policy import loaded, log_probabilities, mixed_rollouts
from test_trainer import DATA, prepare

from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.trl_online import GRPO
from rlhf_exp.plan.live import Live

pytest_plugins = ["lab_fixtures"]
LORA = {"r": 2, "target_modules": "all"}
ALGORITHMS: dict[str, Any] = {
    "ppo": lambda: PPO(steps=2, batch=9, minibatch=3, epochs=2, lr=1e-2),
    "dpo": lambda: DPO(lr=1e-2, batch=4, micro_batch=2, steps=3),
    "grpo": lambda: GRPO(steps=2, batch=2, samples=4, micro_batch=4, kl_coef=0.1, lr=1e-2),
}


def trained(base: Path, folder: Path, name: str, **settings: Any) -> Lab:
    room = prepare(Lab(base, folder, **settings))
    with room.trial.listening():
        ALGORITHMS[name]().run(room.policy, room.reward, DATA, room.trial)
    return room


@pytest.mark.parametrize(
    ("name", "lora"), [("ppo", None), ("ppo", LORA), ("dpo", LORA), ("grpo", None)]
)
def test_computed_again_to_the_same_bits(name: str, lora: Any, base: Path, tmp_path: Path) -> None:
    plain = trained(base, tmp_path / "plain", name, lora=lora)
    again = trained(base, tmp_path / "again", name, lora=lora, gradient_checkpointing=True)
    assert torch.equal(plain.weights(), again.weights())
    assert not torch.equal(plain.weights(), Lab(base, tmp_path / "new", lora=lora).weights())


def test_less_is_kept_and_sampling_keeps_its_cache(tiny_base: Any) -> None:
    peaks, calls = [], []
    for checkpointed in (False, True):
        policy = loaded(tiny_base, "llama", trainable=True, gradient_checkpointing=checkpointed)
        rollouts = mixed_rollouts(policy)
        with Live([*policy.model.parameters(), rollouts.ids]) as live:
            logits = policy.model(input_ids=rollouts.ids, use_cache=False, logits_to_keep=1).logits
            kept = sum(live.end.values())
            logits.sum().backward()
        peaks.append(kept)
        policy.model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda _m, args: calls.append(args[0].shape[1])
        )
        policy.sample(["x a loud comedy :"])
        assert min(calls) == 1, "after the prompt, one token at a time"
        calls.clear()
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_eager_and_sdpa_agree_on_padded_batches(kind: str, tiny_base: Any) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        policy = loaded(tiny_base, kind, attention=attention)
        assert policy.model.config._attn_implementation == attention
        found.append(log_probabilities(policy, mixed_rollouts(policy), 10_000))
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of itself
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_learn_alike_under_the_same_names(base: Path, tmp_path: Path) -> None:
    plain = trained(base, tmp_path / "plain", "ppo")
    fast = trained(base, tmp_path / "fast", "ppo", compile=True, gradient_checkpointing=True)
    torch.testing.assert_close(fast.weights(), plain.weights(), atol=2e-3, rtol=0)
    assert fast.policy.trainable_state().keys() == plain.policy.trainable_state().keys()
    fast.policy.save(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118
