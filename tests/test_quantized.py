"""Adapters over 8-bit and NF4 weights under every algorithm: they learn, the base does not move,
a stopped run ends with the same bits, and what is saved can be loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_policy
from lab import PROMPTS, Lab
from runs import command_line, rows
from test_hardware_runs import WHOLE
from test_trainer import DATA, prepare

from rlhf_exp import weights
from rlhf_exp.algorithms.conditional import Conditional
from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.labels import Quantiles
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.rest import ReST
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.algorithms.trl_online import GRPO
from rlhf_exp.policy import Policy
from rlhf_exp.trial import Stopped

bnb = pytest.importorskip(
    "bitsandbytes",
    reason="peft imports it in every run (3 s), so it is no part of dev: pip install -e "
    "'.[quantization]'",
)
pytest_plugins = ["lab_fixtures", "runs_fixtures"]

LORA = {"r": 2, "lora_alpha": 8, "target_modules": "all"}
TOKENS = [" <|best|>", " <|worst|>"]
again: dict[str, Any] = {"batch": 9, "samples": 4, "minibatch": 8, "lr": 1e-2}
conditional: dict[str, Any] = again | {"kl_coef": 0.05, "compare": 4, "steps": 3}
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ppo": lambda: PPO(steps=4, batch=9, minibatch=9, epochs=2, lr=1e-2),
    "dpo": lambda: DPO(lr=1e-2, batch=4, micro_batch=2),
    "sft": lambda: SFT(lr=1e-2, batch=4, micro_batch=2, epochs=1),
    "grpo": lambda: GRPO(steps=3, batch=2, samples=4, micro_batch=4, kl_coef=0.1, lr=1e-2),
    "rest": lambda: ReST(steps=2, levels=[0.0], validation=2, kl_coef=0.1, **again),
    "quark": lambda: Conditional(
        labels=Quantiles(names=TOKENS), tokens=TOKENS, updates=2, **conditional
    ),
    "alt_rm": lambda: Conditional(
        labels=Quantiles(names=["Good.", "Bad."], scope="prompt"), form="{label} input: ",
        updates=2, restart_optimizer=True, reference_sees_label=True, **conditional
    ),
}  # fmt: skip


def train(base: Any, folder: Path, kind: str, name: str, stop: int | None = None) -> Lab:
    """An algorithm on the toy; a signal comes during step `stop`."""
    room = prepare(Lab(base, folder, lora=LORA, quantization=kind, sft=False))
    room.trial.evaluator.settings.every = 1000
    room.signal_in(stop)
    with room.trial.listening():
        ALGORITHMS[name]().run(room.policy, room.reward, DATA, room.trial)
    return room


def parameters(policy: Policy) -> dict[str, torch.Tensor]:
    """Every parameter, without the rows of control tokens."""
    known = len(policy.tokenizer) - len(policy.control)
    return {
        name: (p[:known] if "wte" in name else p).detach().clone()
        for name, p in policy.model.named_parameters()
    }


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapter_learns_base_does_not_and_both_can_be_resumed_and_loaded(
    kind: str, name: str, base: Path, tmp_path: Path
) -> None:
    start = parameters(Lab(base, tmp_path / "new", lora=LORA, quantization=kind, sft=False).policy)
    room = train(base, tmp_path / "whole", kind, name)
    end = parameters(room.policy)
    stored = {k: v.dtype for k, v in end.items() if not v.is_floating_point()}
    assert len(stored) == 8, "four linear layers in each of two blocks"
    assert set(stored.values()) == {torch.uint8 if kind == "nf4" else torch.int8}
    assert all(v.dtype == torch.float32 for k, v in end.items() if k not in stored)
    moved = {k for k, v in end.items() if not torch.equal(v, start[k])}
    assert moved == {k for k in end if "lora_" in k}, "all of the adapter, and nothing else"

    with pytest.raises(Stopped):
        train(base, tmp_path / "cut", kind, name, stop=1)
    resumed = train(base, tmp_path / "cut", kind, name)
    for key, value in resumed.policy.trainable_state().items():
        assert torch.equal(value, room.policy.trainable_state()[key]), key

    loads(room.policy, base, kind, tmp_path / "saved")


def loads(policy: Policy, base: Path, kind: str, folder: Path) -> None:
    """What `save` wrote says what the policy says, over the same base read anew."""
    from peft import PeftModel

    policy.save(folder)
    tokenizer = weights.load_tokenizer(folder)
    model = weights.load_causal_lm(base, "float32", tokenizer, kind)
    found = PeftModel.from_pretrained(model, str(folder)).eval()
    ids = torch.tensor([policy.encode(PROMPTS[:1])[0]])
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, policy.model(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_under_a_half_precision_dtype(
    kind: str, architecture: str, tiny_base: Any
) -> None:
    """Norms, embeddings, head and adapters are float32 also where products are not; NF4 has its
    scales quantized.
    """
    policy = tiny_policy(architecture, dtype="bfloat16", lora=LORA, quantization=kind, sft=False)
    policy.load(tiny_base(architecture), trainable=True)
    whole = {p.dtype for p in policy.model.parameters() if p.is_floating_point()}
    assert whole == {torch.float32}
    assert policy.model.get_output_embeddings().weight.dtype == torch.float32
    kinds = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
    packed = [m for m in policy.model.modules() if isinstance(m, kinds)]
    assert len(packed) > 4
    if kind == "nf4":
        assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in packed)
        assert all(m.compute_dtype == torch.bfloat16 for m in packed)
    rollouts = policy.sample(["x", "a loud comedy :"])
    assert rollouts.response.sum() > 0
    loss = policy.model(input_ids=rollouts.ids, labels=rollouts.ids).loss
    loss.backward()  # after generate()
    first = {k: p.grad for k, p in policy.model.named_parameters() if "lora_B" in k}
    assert len(first) == len(packed)
    assert all(g is not None and g.abs().sum() > 0 for g in first.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "kind"),
    [(["zero2"], "nf4"), (["zero2"], None), (["zero3", WHOLE], "int8"), (["zero3", WHOLE], "nf4")],
)
def test_two_processes_train_one_adapter(
    hardware: list[str], kind: str | None, artifacts: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    done = command_line(
        "experiment=debug", "reward=lexicon", "algo.steps=2", "policy.sft=false",
        "policy.lora={r: 2, target_modules: all}", f"policy.quantization={kind or 'null'}",
        f"hardware={hardware[0]}", *hardware[1:], "hardware.processes=2", f"artifacts={artifacts}",
        f"hydra.run.dir={directory}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    updates = [r["ppo/grad_norm"] for r in rows(directory / "metrics.jsonl") if "ppo/lr" in r]
    assert len(updates) == 2
    assert all(norm > 0 for norm in updates)
    newest = directory / "checkpoints" / "step-000002" / "state.pt"
    trained = torch.load(newest, weights_only=True)["policy"]
    assert len(trained) == 16
    assert all("lora_" in name and value.abs().sum() > 0 for name, value in trained.items())
