"""A tiny policy: padding and micro-batches never change a number, and the reference stays put."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_policy
from torch import Tensor
from torch.nn import functional as F

from rlhf_exp import adapters, losses, weights
from rlhf_exp.artifacts import Store
from rlhf_exp.policy import Policy, Rollouts, micro_batches, response_logits
from rlhf_exp.reference import Reference

PROMPTS = [
    "a slow drama about a sailor :",
    "a loud comedy :",
    "x",
    "a modern satire about a thief :",
]
RESPONSES = [
    " the plot was wonderful .",
    " i hated it",
    "",
    " it was",
    " fine .",
    " the story follows",
]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
TRAINED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "lora": {"lora": LORA},
    "top layer": {"train_top": 1},
}


def loaded(base: Any, kind: str = "gpt2", *, trainable: bool = False, **settings: Any) -> Policy:
    """A tiny policy with its weights."""
    if kind == "gpt2" and settings.get(
        "lora"
    ):  # its layers are transposed, and peft warns unless told
        settings["lora"] = settings["lora"] | {"fan_in_fan_out": True}
    policy = tiny_policy(kind, **settings)
    policy.load(base(kind), trainable=trainable)
    return policy


def rollouts_of(policy: Policy, pairs: list[tuple[str, str]]) -> Rollouts:
    """Rollouts that hold given texts, each response ended."""
    end = policy.tokenizer.eos_token_id
    responses = [policy.tokenizer(r)["input_ids"] + [end] for _, r in pairs]
    return policy.assemble([p for p, _ in pairs], responses)


def mixed_rollouts(policy: Policy) -> Rollouts:
    """Prompts and responses of many lengths."""
    pairs = [(p, r) for p in PROMPTS for r in RESPONSES]
    return rollouts_of(policy, pairs)


@torch.no_grad()
def log_probabilities(policy: Policy, rollouts: Rollouts, budget: int, reference=None) -> Tensor:
    """[n, r] of the response tokens, zero elsewhere, over micro-batches of `budget` tokens."""
    found = torch.zeros_like(rollouts.response)
    for batch in micro_batches(rollouts, torch.arange(len(rollouts)), budget):
        model_logits = response_logits(policy.model, batch)[0]
        logits = model_logits if reference is None else reference.logits(batch)
        new = losses.selective_log_softmax(logits, batch.response_ids)
        columns = slice(0, batch.length)
        found[batch.rows, columns] = new * rollouts.response[batch.rows, columns]
    return found


# ----------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("budget", [1, 30, 64, 150, 10_000])
def test_micro_batches_cover_every_row_once_within_the_budget(tiny_base, budget: int) -> None:
    policy = loaded(tiny_base)
    rollouts = mixed_rollouts(policy)
    rows = torch.tensor([3, 1, 20, 7, 8, 23, 0, 15, 16])
    batches = list(micro_batches(rollouts, rows, budget))
    assert sorted(torch.cat([b.rows for b in batches]).tolist()) == sorted(rows.tolist())
    for batch in batches:
        assert len(batch.rows) == 1 or batch.ids.numel() <= budget
        assert batch.mask.sum(1).tolist() == rollouts.mask[batch.rows].sum(1).tolist()
        assert torch.equal(batch.response_ids, rollouts.response_ids[batch.rows, : batch.length])
        longest = (int(batch.mask.sum(1).max()), int(rollouts.response[batch.rows].sum(1).max()))
        assert batch.length == longest[1], "cut to its longest response"
        assert (batch.mask[:, 0] == 1).any(), "cut to its longest prompt"
    if budget == 10_000:
        assert len(batches) == 1
    if budget == 1:
        assert len(batches) == len(rows)


def test_micro_batches_put_equal_lengths_together(tiny_base) -> None:
    texts = [(PROMPTS[0], RESPONSES[0]), ("x", "y")] * 8  # long and short ones in turn
    rollouts = rollouts_of(loaded(tiny_base), texts)
    batches = list(micro_batches(rollouts, torch.arange(16), 8 * rollouts.ids.shape[1]))
    assert [len(b.rows) for b in batches[-1:]] == [8]
    assert sum(b.ids.numel() for b in batches) == int(rollouts.mask.sum()), "no padding at all"


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_log_probabilities_do_not_depend_on_padding(tiny_base, kind: str, budget: int) -> None:
    policy = loaded(tiny_base, kind)
    rollouts = mixed_rollouts(policy)
    found = log_probabilities(policy, rollouts, budget)
    for i in range(len(rollouts)):
        ids = rollouts.ids[i][rollouts.mask[i].bool()].unsqueeze(0)  # no padding at all
        length = int(rollouts.response[i].sum())
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, -length - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0, -length:, None]).squeeze(1)
        torch.testing.assert_close(found[i, :length], expected, atol=1e-5, rtol=0)
        assert not found[i, length:].any()
    assert float(found.std()) > 0.3, "logits so flat that a wrong position would not show"


def test_hidden_states_are_those_the_logits_come_from(tiny_base) -> None:
    policy = loaded(tiny_base)
    (batch,) = micro_batches(mixed_rollouts(policy), torch.arange(24), 10_000)
    with torch.no_grad():
        logits, states = response_logits(policy.model, batch, hidden=True)
    assert states is not None
    torch.testing.assert_close(policy.model.lm_head(states), logits)


def test_selected_rollouts_keep_their_rows(tiny_base) -> None:
    rollouts = mixed_rollouts(loaded(tiny_base))
    rollouts.scores = torch.arange(24.0)
    rollouts.members = {"a": -torch.arange(24.0)}
    few = rollouts.select(torch.tensor([5, 2]))
    assert few.prompts == [rollouts.prompts[5], rollouts.prompts[2]]
    assert few.scores is not None
    assert few.members is not None
    assert (few.scores.tolist(), few.members["a"].tolist()) == ([5.0, 2.0], [-5.0, -2.0])
    assert torch.equal(few.ids, rollouts.ids[[5, 2]])
    assert torch.equal(few.ended, rollouts.ended[[5, 2]])


# ---------------------------------------------------------------------------------------- sampling


def test_samples_are_reproducible_and_differ_by_seed(tiny_base) -> None:
    policy = loaded(tiny_base)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(policy.sample(PROMPTS, 2).completions)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_copies_of_a_prompt_lie_side_by_side(tiny_base) -> None:
    rollouts = loaded(tiny_base).sample(PROMPTS[:2], 3)
    assert rollouts.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len(set(rollouts.completions)) > 3


def test_samples_are_laid_out_as_promised(tiny_base) -> None:
    policy = loaded(tiny_base, sample_batch=100)  # 256 rows in three calls of generate
    torch.manual_seed(0)
    rollouts = policy.sample(PROMPTS, 64)
    pad, eos = policy.tokenizer.pad_token_id, policy.tokenizer.eos_token_id
    width = rollouts.ids.shape[1] - rollouts.response.shape[1]
    encoded = policy.encode(rollouts.prompts)
    assert 0 < int(rollouts.ended.sum()) < len(rollouts)
    assert rollouts.response.shape[1] <= policy.max_new_tokens
    for i, prompt in enumerate(encoded):
        length = int(rollouts.response[i].sum())
        kept = rollouts.ids[i, width : width + length].tolist()
        assert rollouts.ids[i, :width].tolist() == [pad] * (width - len(prompt)) + prompt
        assert rollouts.mask[i].tolist() == (
            [0] * (width - len(prompt))
            + [1] * (len(prompt) + length)
            + [0] * (rollouts.response.shape[1] - length)
        )
        assert eos not in kept[:-1]
        assert (kept[-1] == eos) == bool(rollouts.ended[i])
        assert bool(rollouts.ended[i]) or length == rollouts.response.shape[1]
        expected = policy.tokenizer.decode(kept, skip_special_tokens=True)
        assert rollouts.completions[i] == expected


def test_samples_follow_the_scored_distribution(tiny_base) -> None:
    """First tokens drawn at temperature 0.7 have the frequencies of the softmax at 0.7."""
    policy = loaded(tiny_base, temperature=0.7, max_new_tokens=1)
    torch.manual_seed(0)
    rollouts = policy.sample(["a slow drama :"], 4000)
    (batch,) = micro_batches(rollouts, torch.tensor([0]), 10_000)
    with torch.no_grad():
        logits = response_logits(policy.model, batch)[0][0, 0]
    expected = (logits / 0.7).softmax(-1)
    counts = torch.bincount(rollouts.response_ids[:, 0], minlength=len(expected))
    top = expected.topk(20).indices
    deviations = (4000 * expected * (1 - expected)).sqrt()[top]
    assert ((counts[top] - 4000 * expected[top]).abs() < 4.5 * deviations).all()
    plain = logits.softmax(-1)
    assert ((counts[top] - 4000 * plain[top]).abs() > 4.5 * deviations).any(), "no power"


def test_prefix_stands_before_every_prompt(tiny_base) -> None:
    policy = loaded(tiny_base, prefix="Excellent. ")
    rollouts = policy.sample(["a loud comedy :"])
    width = rollouts.ids.shape[1] - rollouts.response.shape[1]
    assert policy.tokenizer.decode(rollouts.ids[0, :width]) == "Excellent. a loud comedy :"
    assert rollouts.prompts == ["a loud comedy :"], "the reward sees the prompt as it was"


def test_generation_settings_of_the_checkpoint_are_not_inherited(tiny_base, tmp_path) -> None:
    policy = loaded(tiny_base)
    policy.save(tmp_path / "model")
    greedy = {"top_k": 1, "max_new_tokens": 2, "do_sample": False, "repetition_penalty": 5.0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(greedy))
    odd = tiny_policy()
    odd.load(tmp_path / "model")
    drawn = []
    for candidate in (policy, odd):
        torch.manual_seed(0)
        drawn.append(candidate.sample(PROMPTS).completions)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 5}, r"policy\.top_k=5 .*set policy\.top_k=0"),
        ({"top_p": 0.9}, r"policy\.top_p=0\.9 .*set policy\.top_p=1\.0"),
        ({"min_new_tokens": 3}, r"policy\.min_new_tokens=3"),
    ],
)
def test_transforms_that_make_kl_negative_are_refused(setting, message: str) -> None:
    tiny_policy().require_plain_sampling("PPO")
    with pytest.raises(ValueError, match=message):
        tiny_policy(**setting).require_plain_sampling("PPO")


def test_check_prompts_before_weights_are_loaded(tiny_base) -> None:
    policy = tiny_policy()
    policy.check_prompts(PROMPTS, tiny_base())
    assert not hasattr(policy, "model")
    with pytest.raises(ValueError, match=r"prompt 5 .*context of 64.*policy.max_new_tokens"):
        policy.check_prompts([*PROMPTS, PROMPTS[0] * 10], tiny_base())
    with pytest.raises(ValueError, match="prompt 5 is empty"):
        policy.check_prompts([*PROMPTS, " "], tiny_base())


# --------------------------------------------------------------------------------------- reference


def perturb(policy: Policy) -> None:
    """What training does: every trainable parameter moves."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


CASES = [(k, t) for k in TINY for t in TRAINED]


@pytest.mark.parametrize(("kind", "trained"), CASES, ids=[f"{k}-{t}" for k, t in CASES])
def test_reference_is_the_start_policy_and_stays_it(tiny_base, kind: str, trained: str) -> None:
    torch.manual_seed(0)
    policy = loaded(tiny_base, kind, trainable=True, **TRAINED[trained])
    plain = loaded(tiny_base, kind)
    reference = Reference(policy)
    rollouts = mixed_rollouts(policy)
    start = log_probabilities(policy, rollouts, 200)
    torch.testing.assert_close(start, log_probabilities(plain, rollouts, 200), atol=1e-5, rtol=0)
    kept = log_probabilities(policy, rollouts, 200, reference)
    torch.testing.assert_close(kept, start, atol=1e-6, rtol=0)

    perturb(policy)
    moved = log_probabilities(policy, rollouts, 200)
    assert float((moved - start).abs().max()) > 0.1, "nothing was trained"
    again = log_probabilities(policy, rollouts, 200, reference)
    torch.testing.assert_close(again, start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("trained", TRAINED)
def test_reference_does_not_depend_on_what_the_policy_did_last(tiny_base, trained: str) -> None:
    policy = loaded(tiny_base, trainable=True, **TRAINED[trained])
    reference = Reference(policy)
    rollouts = mixed_rollouts(policy)
    perturb(policy)
    first, second = list(micro_batches(rollouts, torch.arange(24), 400))[:2]
    expected = reference.logits(first)
    response_logits(policy.model, second)  # another batch
    torch.testing.assert_close(reference.logits(first), expected)
    response_logits(policy.model, first)
    torch.testing.assert_close(reference.logits(first), expected)
    policy.sample(PROMPTS[:2])  # one token at a time, with a cache
    torch.testing.assert_close(reference.logits(first), expected)
    assert not expected.requires_grad


@pytest.mark.parametrize("trained", TRAINED)
def test_reference_adds_only_the_memory_it_needs(tiny_base, trained: str) -> None:
    policy = loaded(tiny_base, trainable=True, **TRAINED[trained])
    before = {id(p) for p in policy.model.parameters()}
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.model.parameters())
    kind: Any = Reference(policy).kind
    holder = getattr(kind, "top", kind.model if hasattr(kind, "model") else None)
    added = sum(p.numel() for p in holder.parameters() if id(p) not in before)
    assert added == {"all weights": total, "lora": 0, "top layer": trainable}[trained]
    assert all(not p.requires_grad for p in holder.parameters() if id(p) not in before)


def test_gradient_reaches_only_what_is_trained(tiny_base) -> None:
    for trained, settings in TRAINED.items():
        policy = loaded(tiny_base, trainable=True, **settings)
        reference = Reference(policy)
        (batch,) = micro_batches(mixed_rollouts(policy), torch.arange(24), 10_000)
        kl = losses.full_kl(response_logits(policy.model, batch)[0], reference.logits(batch))
        (kl.sum() + response_logits(policy.model, batch)[0].square().sum()).backward()
        for name, parameter in policy.model.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            if trained != "lora":  # at the start the gradient of lora_A is 0
                assert reached == parameter.requires_grad, f"{trained}: {name}"
            assert parameter.requires_grad or parameter.grad is None, f"{trained}: {name}"


@pytest.mark.parametrize("top", [0, 2, 3])
def test_impossible_number_of_top_layers_is_refused(tiny_base, top: int) -> None:
    with pytest.raises(ValueError, match=rf"policy\.train_top={top} must be between 1 and 1"):
        loaded(tiny_base, trainable=True, train_top=top)


# ---------------------------------------------------------------------------- building and loading


def test_model_from_scratch_is_decided_by_its_seed_and_texts(tmp_path: Path) -> None:
    texts = ["some text to learn from"] * 5

    def build(name: str, seed: int, told: list[str]) -> Path:
        torch.manual_seed(len(name))
        folder = tiny_policy(seed=seed).base(Store(tmp_path / name), told)
        assert isinstance(folder, Path)
        return folder

    first, again, seed, text = (
        build("a", 0, texts),
        build("bb", 0, texts),
        build("a", 1, texts),
        build("a", 0, [*texts, "more"]),
    )
    assert first.name == again.name
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert len({first.name, seed.name, text.name}) == 3
    assert (seed / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_growing_for_a_pad_token_does_not_depend_on_the_generator(tiny_base) -> None:
    """A hub model without a pad token gets one; loaded twice it must be the same policy."""
    tokenizer = weights.load_tokenizer(tiny_base())
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = weights.load_causal_lm(tiny_base(), "float32", tokenizer)
        found.append(model.get_output_embeddings().weight.detach())
    assert len(found[0]) == tokenizer.pad_token_id + 1
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x/y"}, r"either policy\.path"),
        ({"architecture": None}, r"either policy\.path"),
        ({"dtype": "int8"}, r"policy\.dtype=int8 .*float32, bfloat16, float16"),
        ({"lora": {"r": 2}, "train_top": 1}, r"policy\.lora and policy\.train_top=1"),
        ({"temperature": 0.0}, r"policy\.temperature=0\.0 must be positive"),
        ({"max_new_tokens": 0}, r"policy\.max_new_tokens=0"),
        ({"min_new_tokens": 13}, r"policy\.min_new_tokens=13"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_policy(**settings)


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c", "nowhere.gguf", "no-such/model"]
)
def test_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=path):
        Policy(path=path).identity()


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        Policy(path=str(tmp_path)).base(Store(tmp_path / "store"), [])


# ----------------------------------------------------------------------------- saving and adapters


def test_saved_policy_loads_as_it_was(tiny_base, tmp_path: Path) -> None:
    policy = loaded(tiny_base, trainable=True, prefix="Good. ")
    perturb(policy)
    policy.save(tmp_path / "saved", "a card")
    again = Policy(path=str(tmp_path / "saved"))
    again.load(again.base(Store(tmp_path / "store"), []))
    rollouts = mixed_rollouts(policy)
    found = log_probabilities(again, rollouts, 10_000)
    torch.testing.assert_close(
        found, log_probabilities(policy, rollouts, 10_000), atol=1e-6, rtol=0
    )
    assert json.loads((tmp_path / "saved" / "policy.json").read_text())["prefix"] == "Good. "
    assert (tmp_path / "saved" / "README.md").read_text() == "a card"


@pytest.mark.parametrize("trained", TRAINED)
def test_trainable_state_restores_the_policy(tiny_base, trained: str) -> None:
    torch.manual_seed(0)
    policy = loaded(tiny_base, trainable=True, **TRAINED[trained])
    perturb(policy)
    state = policy.trainable_state()
    rollouts = mixed_rollouts(policy)
    expected = log_probabilities(policy, rollouts, 10_000)
    perturb(policy)
    assert not torch.equal(log_probabilities(policy, rollouts, 10_000), expected)
    policy.load_trainable_state(state)
    assert torch.equal(log_probabilities(policy, rollouts, 10_000), expected)


def test_state_of_another_policy_is_refused(tiny_base) -> None:
    state = loaded(tiny_base, trainable=True).trainable_state()
    with pytest.raises(ValueError, match="made by another policy"):
        loaded(tiny_base, trainable=True, train_top=1).load_trainable_state(state)


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> tuple[Path, Policy]:
    """A LoRA adapter as a run leaves it, and the policy it came from."""
    torch.manual_seed(0)
    policy = loaded(tiny_base, trainable=True, **TRAINED["lora"])
    perturb(policy)
    folder = tmp_path_factory.mktemp("adapter")
    policy.save(folder)
    return folder, policy


def test_adapter_is_merged_into_its_base(tiny_base, adapter, tmp_path: Path) -> None:
    folder, trained = adapter
    policy = Policy(path=str(tiny_base()), adapter=str(folder))
    policy.load(policy.base(Store(tmp_path), []))
    rollouts = mixed_rollouts(trained)
    found = log_probabilities(policy, rollouts, 10_000)
    expected = log_probabilities(trained, rollouts, 10_000)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ours", [True, False], ids=["policy.json", "adapter_config.json"])
def test_adapter_of_another_base_is_refused(tiny_base, adapter, tmp_path, ours: bool) -> None:
    folder, _ = adapter
    copied = tmp_path / "adapter"
    copied.mkdir()
    for file in folder.iterdir():
        if ours or file.name != "policy.json":
            (copied / file.name).write_bytes(file.read_bytes())
    other = Policy(path=str(tiny_base(seed=1)), adapter=str(copied))
    with pytest.raises(ValueError, match=rf"the adapter {copied} was trained on"):
        other.load(other.base(Store(tmp_path / "store"), []))


def test_adapter_that_is_none_is_refused(tiny_base, tmp_path: Path) -> None:
    policy = Policy(path=str(tiny_base()), adapter=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        policy.load(policy.base(Store(tmp_path / "store"), []))


def test_adapter_is_part_of_the_identity(tiny_base, adapter) -> None:
    plain, adapted = (Policy(path=str(tiny_base()), adapter=a) for a in (None, str(adapter[0])))
    assert plain.identity() != adapted.identity()


def test_edited_adapter_is_another_policy(tiny_base, adapter, tmp_path: Path) -> None:
    for file in adapter[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    policy = Policy(path=str(tiny_base()), adapter=str(tmp_path))
    before = policy.identity()
    weights_file = tmp_path / "adapter_model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert policy.identity() != before


def test_fingerprint_sees_through_an_adapter(tiny_base) -> None:
    plain = adapters.fingerprint(loaded(tiny_base).model)
    assert adapters.fingerprint(loaded(tiny_base, trainable=True, **TRAINED["lora"]).model) == plain
    other = tiny_policy()
    other.load(tiny_base(seed=1))
    assert adapters.fingerprint(other.model) != plain


def test_samples_have_zero_kl_to_the_reference_at_the_start(tiny_base) -> None:
    for trained, settings in TRAINED.items():
        policy = loaded(tiny_base, trainable=True, **settings)
        reference = Reference(policy)
        torch.manual_seed(0)
        rollouts = policy.sample(PROMPTS, 4)
        new = log_probabilities(policy, rollouts, 10_000)
        ref = log_probabilities(policy, rollouts, 10_000, reference)
        for estimator in losses.KL_ESTIMATORS:
            kl = losses.kl_estimate(new, ref, estimator).sum(1)
            assert float(kl.abs().max()) < 1e-5, f"{trained} {estimator}"


def test_padding_helper_of_the_tests_pads_as_sample_does(tiny_base) -> None:
    policy = loaded(tiny_base)
    torch.manual_seed(0)
    sampled = policy.sample(PROMPTS, 16)
    rows = sampled.ended.nonzero().squeeze(1)
    ended = sampled.select(rows)
    texts = list(zip(ended.prompts, ended.completions, strict=True))
    built = rollouts_of(policy, texts)
    assert len(rows) > 0
    width = ended.ids.shape[1] - ended.response.shape[1]
    longest = built.ids.shape[1] - built.response.shape[1]
    assert torch.equal(
        F.pad(built.ids[:, :longest], (width - longest, 0), value=1), ended.ids[:, :width]
    )
