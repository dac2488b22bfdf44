"""The plan of memory against what real steps of small models were measured to take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from lab import PROMPTS
from transformers import AutoConfig

from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.imitation import Examples, Imitation
from rlhf_exp.algorithms.ppo import PPO, Experience
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.evaluation.scoring import against_reference
from rlhf_exp.frozen import Frozen
from rlhf_exp.hardware import Hardware
from rlhf_exp.plan import memory, passes
from rlhf_exp.plan.live import Live
from rlhf_exp.plan.memory import Job
from rlhf_exp.plan.scorers import Given, scorers
from rlhf_exp.plan.skeleton import Skeleton, count
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.reference import Reference
from rlhf_exp.rewards.pairwise import Pairwise

LORA = {"r": 4, "target_modules": "all-linear"}
SHAPES = {
    "gpt2": {"n_layer": 4, "n_embd": 48, "n_head": 4, "n_positions": 64},
    "llama": {
        "num_hidden_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt_neox": {
        "num_hidden_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
    },
}
SIXTEEN = (PROMPTS * 2)[:16]
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {"lora": LORA},
    "top": {"train_top": 2},
    "bfloat16": {"dtype": "bfloat16"},
    "checkpointed": {"checkpointing": True},
}


class Room:
    """A real policy, and the plan's job for it."""

    def __init__(self, tokens_from: Any, kind: str, *, algo: Any, **variant: Any) -> None:
        plain = {k: v for k, v in variant.items() if k != "checkpointing"}
        self.policy: Policy = tiny_policy(
            kind, max_new_tokens=24, min_new_tokens=24, sample_batch=16, **plain
        )
        self.policy.open(tokens_from("gpt2"))
        size = len(self.policy.tokenizer)
        config = AutoConfig.for_model(
            kind, vocab_size=size, bos_token_id=0, eos_token_id=0, **SHAPES[kind]
        )
        skeleton = Skeleton(config, **variant)
        torch.manual_seed(0)
        self.policy.model, self.policy.source = skeleton.build(), "here"
        asked = sorted(len(ids) for ids in self.policy.encode(SIXTEEN))
        told: Any = {"sft": algo, "evaluation": SimpleNamespace(prompts=16, samples=1)}
        told |= {"labeller": None, "preferences": None, "scorers": [], "stages": []}
        self.job = Job(
            skeleton=skeleton,
            policy=self.policy,
            algo=algo,
            hardware=Hardware(),
            prompts=asked,
            held_out=asked,
            demonstrations=asked,
            **told,
        )
        self.trial: Any = SimpleNamespace(
            mixed_precision="no",
            accelerator=Hardware().accelerator(),
            reference=Reference(self.policy),
        )

    def measured(self, call: Any, *held: Any) -> float:
        """Bytes that `call` takes at its peak, beside weights and what is `held`."""
        there: list[Any] = [*self.policy.model.parameters(), *self.policy.model.buffers()]
        there += passes._own(self.trial.reference, self.policy.model)
        for each in held:
            there += [v for v in vars(each).values() if isinstance(v, torch.Tensor)]
        with Live(there) as live:
            call()
        return sum(live.peak.values())

    def rollouts(self) -> Rollouts:
        rollouts = self.policy.sample(SIXTEEN)
        assert float(rollouts.response.min()) == 1.0, "a completion ended early"
        return rollouts


def planned(job: Job) -> dict[str, float]:
    """What each phase of the stage align makes, by name."""
    nothing: memory.Parts = {}
    found = {p.name: p.total for p in memory._learning(job, nothing)}
    found |= {p.name: p.total for p in memory._evaluation(job, nothing, nothing)}
    return found


def close(plan: float, measured: float, tolerance: float = 0.1) -> None:
    assert measured > 50_000, "too little to be compared"
    assert plan == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("kind", "variant", "budget"),
    [
        ("gpt2", "whole", 16_384),
        ("gpt2", "top", 220),
        ("llama", "lora", 220),
        ("llama", "bfloat16", 16_384),
        ("gpt_neox", "checkpointed", 16_384),
    ],
)
def test_ppo_update(kind: str, variant: str, budget: int, tiny_base: Any) -> None:
    algo = PPO(steps=1, batch=16, minibatch=16, token_budget=budget)
    room = Room(tiny_base, kind, algo=algo, **VARIANTS[variant])
    room.policy.model.eval()
    plan = planned(room.job)
    close(plan["evaluation: sampling"], room.measured(room.rollouts))
    rollouts = room.rollouts()
    reference = room.trial.reference
    measured = room.measured(lambda: against_reference(room.policy, reference, rollouts), rollouts)
    close(plan["evaluation: KL"], measured)
    algo.setup(room.policy, None, Dataset(prompts=PROMPTS, held_out=PROMPTS), room.trial)
    room.policy.model.train(variant == "checkpointed")
    head = SimpleNamespace(**dict(algo.descent.module.value_head.named_parameters()))
    state: dict[str, Experience] = {}

    def look() -> None:
        state["seen"] = algo.look_back(rollouts)

    rows = torch.arange(16)
    look()
    algo.update(rollouts, state["seen"], rows)  # the optimizer gets its states
    if budget == 220:
        close(plan["look-back"], room.measured(look, rollouts, head))
        update = room.measured(
            lambda: algo.update(rollouts, state["seen"], rows), rollouts, head, state["seen"]
        )
    else:  # the graph of the look-back is the first update's

        def both() -> None:
            look()
            algo.update(rollouts, state["seen"], rows)

        update = room.measured(both, rollouts, head)
    close(plan["update"], update)


def test_imitation_with_an_exact_kl(tiny_base: Any) -> None:
    algo = Imitation(steps=1, batch=16, minibatch=16, token_budget=300, kl_coef=0.1)
    room = Room(tiny_base, "llama", algo=algo)
    algo.setup(room.policy, None, Dataset(prompts=PROMPTS, held_out=PROMPTS), room.trial)
    algo.prepare()
    rollouts, rows = room.rollouts(), torch.arange(16)
    examples = Examples(rollouts, torch.ones(16))
    algo._update(examples, rows)
    measured = room.measured(lambda: algo._update(examples, rows), rollouts, examples)
    close(planned(room.job)["update"], measured)


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_sft_through_trl(micro_batch: int, tiny_base: Any, tmp_path: Any) -> None:
    told = [Demonstration(p, "a e i o u " * 3) for p in PROMPTS] * 2
    algo = SFT(epochs=1, batch=8, micro_batch=micro_batch)
    room = Room(tiny_base, "llama", algo=algo)
    told_ids = room.policy.encode([d.prompt + d.completion for d in told])
    room.job.demonstrations = sorted(len(ids) + 1 for ids in told_ids)
    data = Dataset(prompts=PROMPTS, held_out=PROMPTS, demonstrations=told)
    measured = room.measured(lambda: algo.train(tmp_path, data, room.policy))
    states = memory.held(room.job, room.job.skeleton.counts)["optimizer"]
    close(states + sum(memory._by_trainer(room.job, algo).values()), measured)


def test_dpo_through_trl(tiny_base: Any, tmp_path: Any) -> None:
    algo = DPO(lr=1e-3, batch=4, micro_batch=2, steps=2)
    room = Room(tiny_base, "gpt2", algo=algo)
    longest = max(PROMPTS, key=lambda p: len(room.policy.encode([p])[0]))
    (asked,) = room.policy.encode([longest])
    row: dict[str, Any] = {"prompt_ids": asked, "chosen_ids": [6] * 25, "rejected_ids": [7] * 25}
    row |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    trainer = algo._trainer(str(tmp_path), room.policy, [row] * 8, [], 0)
    trainer.settings = algo
    measured = room.measured(trainer.train)
    states = memory.held(room.job, room.job.skeleton.counts)["optimizer"]
    close(states + sum(memory._by_trainer(room.job, algo).values()), measured)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scoring_by_a_reward_model(kind: str, tiny_base: Any) -> None:
    room = Room(tiny_base, kind, algo=None)
    reward = Pairwise(token_budget=256, normalise="none", max_length=32)
    (scorer,) = scorers(reward, "reward", "reward", Given(room.job.skeleton, 40))
    assert (scorer.length, scorer.knob) == (32, "reward.token_budget")
    reward.model, reward.tokenizer = scorer.skeleton.frozen().build(), room.policy.tokenizer
    reward.model.config.pad_token_id = room.policy.tokenizer.pad_token_id
    reward.frozen, reward.mean, reward.std = Frozen(reward.model, "cpu"), 0.0, 1.0
    texts = ["big cat: " + "a e i o u " * 3, "xyz " * 20] * 8
    with Live([*reward.model.parameters(), *reward.model.buffers()]) as live:
        reward([""] * 16, texts)
    close(sum(scorer.scoring(room.job, 16).values()), sum(live.peak.values()))
    assert scorer.bytes == sum(p.numel() * 4 for p in reward.model.parameters())


def test_the_peak_is_told_by_what_it_holds(tiny_base: Any) -> None:
    algo = PPO(steps=1, batch=16, minibatch=16, token_budget=220)
    room = Room(tiny_base, "llama", algo=algo)
    parts = room.job.trace(room.job.skeleton, passes.learn, algo, room.policy, 6, 5, True, "no")
    head = 4 * (48 + 1)
    assert parts["gradients"] == room.job.skeleton.counts.trained_bytes + head
    vocabulary = len(room.policy.tokenizer)
    assert parts["logits"] % (6 * 24 * vocabulary * 4) == pytest.approx(0, abs=6 * vocabulary * 8)
    made = room.job.trace(room.job.skeleton, passes.decode, room.policy, 16, 5)
    cache = 4 * 2 * 2 * 12 * (5 + 24 - 1) * 16 * 4  # layers, K and V, heads, size, tokens, rows
    assert cache <= made["KV cache"] <= 1.25 * cache  # a layer's old keys beside its new ones


def test_blocks_of_a_deep_model_take_what_two_shallow_ones_show(tiny_base: Any) -> None:
    algo = PPO(steps=1, batch=16, minibatch=16)
    for variant in ("whole", "top"):
        room = Room(tiny_base, "llama", algo=algo, **VARIANTS[variant])
        deep = room.job.skeleton.cut(8)
        work = passes.learn(algo, room.policy, 4, 6, True, "no")
        assert work is not None
        exact, _ = passes._once(deep, work)
        found = passes.trace(deep, work)
        assert sum(found.values()) == pytest.approx(sum(exact.values()), rel=0.01)


@pytest.mark.parametrize("variant", ["whole", "lora", "top"])
def test_parameters_on_the_meta_device_are_those_of_the_model(variant: str, tiny_base: Any) -> None:
    room = Room(tiny_base, "llama", algo=None, **VARIANTS[variant])
    counts, model = room.job.skeleton.counts, room.policy.model
    assert counts == count(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_quantized_weights_take_their_bytes() -> None:
    config = AutoConfig.for_model("llama", vocab_size=300, **SHAPES["llama"])
    plain = Skeleton(config, dtype="bfloat16").counts
    linear = 4 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96)
    rest = 4 * (plain.total - linear)  # embeddings, norms and head in float32
    for kind, each in (("int8", 1.0), ("nf4", 0.5 + 1 / 64 + 4 / 16384)):
        counts = Skeleton(config, dtype="bfloat16", quantization=kind, lora=LORA).counts
        rows = 4 * 4 * (48 + 24 + 24 + 48 + 96 + 96 + 48) if kind == "int8" else 0
        assert counts.bytes == pytest.approx(linear * each + rows + rest + counts.trained_bytes)
        assert counts.trained_bytes == 4 * counts.trained
