"""Learning rates: of which parameters, and over the steps; in our algorithms and in TRL's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from lab import Lab, MakeLab
from runs import rows
from test_trainer import DATA, prepare

from rlhf_exp import losses
from rlhf_exp.algorithms.groups import Rates
from rlhf_exp.algorithms.imitation import Imitation
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.sft import SFT

pytest_plugins = ["lab_fixtures"]
LORA = {"r": 2, "target_modules": "all"}


def rate_of(policy: Any, **settings: Any) -> dict[str, float]:
    """Rate by name of what is trained."""
    rate = Rates(**settings).rates(policy.model)
    return {n: rate(p) for n, p in policy.model.named_parameters() if p.requires_grad}


def test_rates_fall_from_head_to_embeddings(tiny_base: Any) -> None:
    policy = tiny_policy("llama")
    policy.load(tiny_base("llama"), trainable=True)
    policy.model.requires_grad_(True)
    found = rate_of(policy, lr=1.0, layer_decay=0.5)
    by_part = {
        "lm_head.weight": 1.0,
        "model.norm.weight": 1.0,
        "model.layers.1.mlp.up_proj.weight": 0.5,
        "model.layers.0.self_attn.q_proj.weight": 0.25,
        "model.embed_tokens.weight": 0.125,
    }
    assert {name: found[name] for name in by_part} == by_part
    assert sorted(set(found.values())) == [0.125, 0.25, 0.5, 1.0]
    own = rate_of(policy, lr=1.0, layer_decay=0.5, embedding_lr=0.01, head_lr=2.0)
    changed = {name: rate for name, rate in own.items() if rate != found[name]}
    assert changed == {"model.embed_tokens.weight": 0.01, "lm_head.weight": 2.0}


def test_adapters_have_a_rate_of_their_own_and_control_tokens_do_not_decay(lab: MakeLab) -> None:
    room = lab(lora=LORA)
    room.policy.add_control_tokens(["<|best|>"])
    settings = Rates(lr=0.1, adapter_lr=1.0, layer_decay=0.5, weight_decay=0.3)
    adapters = {n: r for n, r in rate_of(room.policy, **vars(settings)).items() if "lora_" in n}
    assert {rate for name, rate in adapters.items() if ".h.1." in name} == {0.5}
    assert {rate for name, rate in adapters.items() if ".h.0." in name} == {0.25}
    groups = settings.by_rate(room.policy.model)
    assert [(g.lr, g.weight_decay) for g in groups] == [(0.25, 0.3), (0.5, 0.3), (0.0125, 0.0)]
    trained = [p for p in room.policy.model.parameters() if p.requires_grad]
    assert {id(p) for g in groups for p in g.parameters} == {id(p) for p in trained}


def test_a_policy_with_one_rate_is_one_group(lab: MakeLab) -> None:
    room = lab()
    (group,) = Rates(lr=0.1).by_rate(room.policy.model)
    assert all(
        a is b for a, b in zip(group.parameters, room.policy.model.parameters(), strict=True)
    )


def test_the_optimizers_of_all_algorithms_have_these_rates(base: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"lr": 1e-2, "layer_decay": 0.5, "weight_decay": 0.1}
    expected = {1e-2, 5e-3, 2.5e-3, 1.25e-3}
    room = Lab(base, tmp_path / "ppo")
    ppo = PPO(steps=1, batch=9, minibatch=9, value_lr=0.5, **told)
    ppo.setup(room.policy, room.reward, DATA, room.trial)
    assert {g["lr"] for g in ppo.descent.optimizer.param_groups} == {*expected, 0.5}
    room = Lab(base, tmp_path / "imitation")
    imitation = Imitation(steps=1, batch=9, **told)
    imitation.setup(room.policy, room.reward, DATA, room.trial)
    imitation.prepare()
    assert {g["lr"] for g in imitation.descent.optimizer.param_groups} == expected
    room = prepare(Lab(base, tmp_path / "sft"))
    sft = SFT(batch=4, micro_batch=4, steps=2, **told | {"schedule": "constant", "warmup": 0.0})
    with room.trial.listening():
        sft.run(room.policy, room.reward, DATA, room.trial)
    groups = sft.trainer.optimizer.param_groups
    assert {g["lr"] for g in groups} == expected
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}  # none for norms and biases
    assert sum(len(g["params"]) for g in groups) == len(list(room.policy.model.parameters()))


def test_a_rate_of_nearly_nothing_moves_nothing(base: Path, tmp_path: Path) -> None:
    start = Lab(base, tmp_path / "start").policy.trainable_state()
    room = Lab(base, tmp_path / "end")
    room.run(PPO(steps=2, batch=9, minibatch=9, lr=1e-3, embedding_lr=1e-12))
    moved = {
        name: float((value - start[name]).abs().max())
        for name, value in room.policy.trainable_state().items()
    }
    slow = [name for name in moved if "wte" in name or "wpe" in name]
    assert len(slow) == 2
    assert max(moved[name] for name in slow) < 1e-8
    assert min(change for name, change in moved.items() if name not in slow) > 1e-4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_the_same_in_trainers_and_here(
    schedule: str, base: Path, tmp_path: Path
) -> None:
    room = prepare(Lab(base, tmp_path))
    told: dict[str, Any] = {"schedule": schedule, "schedule_steps": 8, "lr_floor": 0.25}
    sft = SFT(batch=4, micro_batch=4, steps=11, lr=1.0e-3, warmup=3, **told)
    with room.trial.listening():
        sft.run(room.policy, room.reward, DATA, room.trial)
    lines = [row for row in rows(room.directory / "metrics.jsonl") if "sft/lr" in row]
    expected = [
        1e-3 * losses.lr_scale(s, total=8, warmup=3, schedule=schedule, floor=0.25)
        for s in range(11)
    ]
    assert [row["sft/lr"] for row in lines] == pytest.approx(expected, rel=1e-6)
    assert [1e-3 * sft.lr_scale(s, 11) for s in range(11)] == pytest.approx(expected)
    assert expected[-1] == (1e-3 if schedule == "constant" else 0.25e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, r"algo\.layer_decay=0\.0 must be above 0 and at most 1"),
        ({"adapter_lr": -1.0}, r"algo\.adapter_lr=-1\.0 must not be negative"),
        ({"lr_floor": 2.0}, r"algo\.lr_floor=2\.0 between 0 and 1"),
        ({"warmup": 2.5}, r"algo\.warmup=2\.5 must be a number of steps, or a share"),
        ({"schedule": "linaer"}, r"algo\.schedule=linaer is not known.*did you mean linear"),
        ({"betas": [0.9]}, r"algo\.betas=\[0\.9\] two numbers"),
    ],
    ids=str,
)
def test_impossible_rates(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rates(**settings)


def test_warmup_in_steps_or_shares() -> None:
    assert [Rates(warmup=w).warmup_steps(50) for w in (0, 0.1, 1, 7)] == [0, 5, 1, 7]
    assert torch.tensor(Rates(warmup=0.5).lr_scale(2, 8)) == 0.5
