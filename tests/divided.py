"""Learning in two processes beside the same in one, for test_divided.py: the same rollouts are
learned from, so weights and metrics must agree but for the order of additions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_steps import two
from lab import DATA, PROMPTS, SHAPE, Lab, Vowels, seed_everything

from rlhf_exp import frozen, processes
from rlhf_exp.algorithms.conditional import Conditional
from rlhf_exp.algorithms.labels import Quantiles
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.rest import ReST
from rlhf_exp.artifacts import Store
from rlhf_exp.hardware.engine import whole
from rlhf_exp.policy import Policy, Rollouts, cut, response_logits
from rlhf_exp.reference import Reference
from rlhf_exp.rewards import scored
from rlhf_exp.rewards.mix import Mix

SAMPLES = 5  # of 9 prompts: 22 rollouts for one process, 23 for the other
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ppo": lambda: PPO(steps=2, batch=9, samples=SAMPLES, minibatch=15, epochs=2, lr=1e-3),
    "rest": lambda: ReST(
        steps=2,
        batch=9,
        samples=SAMPLES,
        levels=[0.0, 0.5],
        demonstrations=0,
        validation=0,
        minibatch=7,
        kl_coef=0.1,
    ),
    "quark": lambda: Conditional(
        steps=2,
        batch=9,
        samples=SAMPLES,
        labels=Quantiles(names=["<|good|>", "<|fair|>", "<|poor|>"]),
        tokens=["<|good|>", "<|fair|>", "<|poor|>"],
        token_start="end",
        updates=4,
        minibatch=8,
        kl_coef=0.05,
        entropy_coef=0.06,
        compare=0,
    ),
}


POLICIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "top": {"train_top": 1},
    "lora": {"lora": {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}},
}


def learned(name: str, room: Lab, rollouts: list[Rollouts]) -> tuple[dict[str, Any], Any]:
    """Metrics of the last of two steps, and the weights after it."""
    algorithm = ALGORITHMS[name]()
    algorithm.token_budget = 150  # some micro-batches
    algorithm.check(room.policy, DATA)
    seed_everything(0)
    algorithm.setup(room.policy, room.reward, DATA, room.trial)
    metrics = [algorithm.learn(r, step) for step, r in enumerate(rollouts)]
    return metrics[-1], room.policy.trainable_state()


def shards(folder: Path) -> None:
    """Assert that models divided among two processes answer as whole ones do."""
    base = Policy(architecture=dict(SHAPE), vocabulary=300).base(Store(folder / "store"), PROMPTS)
    for settings in ({}, {"train_top": 1}):
        policy = Policy(path=str(base), sft=False, max_new_tokens=8, **settings)
        policy.load(base, trainable=True)
        torch.manual_seed(0)
        rollouts = policy.assemble(PROMPTS, [[5, 6, 7]] * len(PROMPTS))
        batch = cut(rollouts, list(range(len(PROMPTS))))
        before = response_logits(policy.model, batch)[0]
        whole_reference = Reference(policy)
        with frozen.placed("sharded"):
            reference = Reference(policy)
        kept = reference.kind.frozen
        own = sum(shape.numel() for shape in kept.shapes)
        assert 0 < own <= sum(p.numel() for p in policy.model.parameters())
        assert abs(sum(part.numel() for part in kept.kept) - own / 2) < len(kept.kept)
        assert sum(p.numel() for p in kept.parameters) == 0
        assert torch.equal(response_logits(policy.model, batch)[0], before)  # it kept its own
        with reference.ready():
            assert torch.equal(reference.logits(batch), whole_reference.logits(batch))
            assert sum(p.numel() for p in kept.parameters) == own
        assert sum(p.numel() for p in kept.parameters) == 0
        assert torch.equal(reference.logits(batch), whole_reference.logits(batch))
        with processes.alone(), pytest.raises(ValueError, match="frozen=offloaded"):
            reference.logits(batch)


def compare(folder: Path, name: str, where: str, policy: str) -> None:
    """Assert that two processes learn what one does."""
    store = Store(folder / "store")
    base = processes.first(
        lambda: Policy(architecture=dict(SHAPE), vocabulary=300).base(store, PROMPTS)
    )
    with processes.alone():
        room = Lab(base, folder / f"alone-{processes.rank()}", **POLICIES[policy])
        rollouts = [scored(room.policy.sample(PROMPTS, SAMPLES), room.reward) for _ in range(2)]
        metrics, weights = learned(name, room, rollouts)

    room = Lab(base, folder / "together", **POLICIES[policy])
    hardware = two(where)
    accelerator = hardware.accelerator()
    room.trial.accelerator = accelerator
    room.policy.whole = lambda: whole(accelerator)
    found, ours = learned(name, room, rollouts)
    assert ours.keys() == weights.keys()
    for key, value in weights.items():
        assert float((ours[key] - value).abs().max()) < 2e-4, key
    for key, value in metrics.items():
        allowed = 0.01 if key.endswith("_fraction") else 1e-3  # one token may be clipped, or not
        assert abs(found[key] - value) < allowed * max(1.0, abs(value)), (key, found[key], value)

    # made of others, a reward still says of each completion what it says of it alone
    parts = {"a": {"reward": Vowels()}, "b": {"reward": Vowels(), "weight": 2.0}}
    mix = Mix(parts=parts)
    few = scored(rollouts[0].select(torch.arange(7)), mix)
    assert torch.equal(few.scores, 3 * room.reward(few.prompts, few.completions))  # type: ignore[arg-type]
    assert len(scored(rollouts[0].select(torch.arange(1)), mix)) == 1  # less than one for each

    # every process gets the whole of what they sample and score together, and the same
    drawn = scored(room.policy.sample(PROMPTS, SAMPLES), room.reward)
    assert drawn.prompts == [p for p in PROMPTS for _ in range(SAMPLES)]
    assert len(set(processes.gather(tuple(drawn.completions)))) == 1
    half = len(drawn) // 2
    assert drawn.completions[:half] != drawn.completions[-half:]
    assert torch.equal(drawn.scores, room.reward(drawn.prompts, drawn.completions))  # type: ignore[arg-type]
    hardware.release(accelerator)
