"""Quark and ALT: labels before prompts, what is learned under them, and asking for the best."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from lab import DATA, PROMPTS, Lab, MakeLab, Vowels

from rlhf_exp.algorithms.conditional import Conditional
from rlhf_exp.algorithms.labels import Attributes, Categories, FreeForm, Quantiles
from rlhf_exp.algorithms.pool import Pool
from rlhf_exp.data.rows import Dataset
from rlhf_exp.evaluation.scoring import against_reference
from rlhf_exp.feedback import Feedback
from rlhf_exp.policy import Policy, Rollouts

pytest_plugins = ["lab_fixtures"]
NUMBERS = json.loads((Path(__file__).parent / "vectors" / "conditional.json").read_text())
TOKENS = [" <|best|>", " <|middle|>", " <|worst|>"]


def quark(**changes: Any) -> Conditional:
    settings: dict[str, Any] = {
        "labels": Quantiles(names=TOKENS),
        "tokens": TOKENS,
        "steps": 6,
        "batch": 60,
        "minibatch": 32,
        "updates": 30,
        "lr": 1e-2,
        "kl_coef": 0.05,
        "entropy_coef": 0.0,
    }
    return Conditional(**settings | changes)


def alt(**changes: Any) -> Conditional:
    settings: dict[str, Any] = {
        "labels": Quantiles(names=["Good.", "Bad."], scope="prompt"),
        "form": "{label} input: ",
        "steps": 2,
        "batch": 9,
        "samples": 4,
        "minibatch": 16,
        "updates": None,
        "epochs": 1.0,
        "per_prompt": 4,
        "drop_factor": 1.0,
        "restart_optimizer": True,
        "reference_sees_label": True,
        "end_sentences": True,
        "kl_coef": 0.0,
    }
    return Conditional(**settings | changes)


def scored(room: Lab, prompts: list[str], n: int = 1) -> Rollouts:
    rollouts = room.policy.sample(prompts, n)
    rollouts.scores = room.reward(rollouts.prompts, rollouts.completions)
    return rollouts


def ready(room: Lab, algorithm: Conditional, data: Dataset = DATA) -> Conditional:
    algorithm.check(room.policy, data)
    algorithm.setup(room.policy, room.reward, data, room.trial)
    algorithm._add_tokens()
    algorithm.prepare()
    return algorithm


class Says:
    """A provider that says what it is told to; None is no usable reply."""

    def __init__(self, task: Any, *said: Feedback | None) -> None:
        self.task, self.said = task, said
        self.counts = {"asked": 0, "malformed": 0, "failed": 0}

    def check(self) -> None: ...

    def open(self, directory: Path) -> None: ...

    def load(self, device: Any) -> None: ...

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Feedback | None]:
        found = [self.said[i % len(self.said)] for i in range(len(prompts))]
        self.counts["asked"] += len(found)
        self.counts["malformed"] += found.count(None)
        return found


class Task:
    """As much of a task as a labelling looks at."""

    names = ("fine", "poor")
    attributes = MappingProxyType({"fine": "good:1", "poor": "good:0"})
    highest = 3

    @staticmethod
    def parse(reply: str) -> Feedback | None:
        return Feedback(reply.lower()) if reply.lower() in Task.names else None


# ---- it learns


def test_quark_writes_vowels_when_asked_for_the_best(lab: MakeLab) -> None:
    room = lab()
    before = room.scores()
    rows = room.run(quark(steps=14))
    assert room.policy.prefix == TOKENS[0]
    best = room.scores()
    room.policy.prefix = TOKENS[2]
    worst = room.scores()
    error = (best.var() / len(best) + before.var() / len(before)).sqrt()
    assert best.mean() - before.mean() > 5 * error
    assert best.mean() - worst.mean() > 8 * error
    assert rows[-1]["labels/best_asked"] > rows[-1]["labels/worst_asked"]
    assert rows[-1]["labels/0/reward"] > rows[-1]["labels/1/reward"] > rows[-1]["labels/2/reward"]


def test_labels_that_mean_nothing_teach_nothing(lab: MakeLab) -> None:
    """The control: rewards drawn by lot, so labels are arbitrary."""

    class Lot(Vowels):
        def __call__(self, prompts: list[str], completions: list[str]):
            return torch.rand(len(completions))

    room = lab(reward=Lot())
    room.reward = Vowels()
    before = room.scores().mean()
    room.reward = Lot()
    room.run(quark(steps=3))
    room.reward = Vowels()
    assert room.scores().mean() < 2 * before


# ---- what stands before the prompt


@pytest.mark.parametrize(
    ("form", "label", "expected"),
    [
        ("{label}", "_QUANTILE_TOKEN_0_", "quark"),
        ("{label} input: ", "Excellent.", "alt_rm"),
        ("feedback: {label} input: ", "FB", "alt_lmu"),
        ("{label}.\n\n", "Harmless and very helpful", "alt_lmc"),
    ],
)
def test_control_text_is_the_published_one(form, label, expected, lab: MakeLab) -> None:
    algorithm = ready(lab(), alt(form=form))
    found = algorithm._before(label) + "PROMPT"
    assert found == NUMBERS["alt_rm"]["train_input_example"][expected]


def test_a_prompt_that_looks_like_control_text_stays_whole(lab: MakeLab) -> None:
    """Conditioning is never undone by splitting text, so nothing of such a prompt gets lost."""
    prompts = ["Good. input: big cat:", "a.\n\nb input: c:"]
    room = lab()
    algorithm = ready(room, alt(), Dataset(prompts=prompts, held_out=prompts))
    algorithm.learn(scored(room, prompts, 4), 0)
    examples = algorithm._examples(np.arange(8), ["Good."] * 8)
    texts = room.policy.tokenizer.batch_decode(
        [i[m == 1] for i, m in zip(_prompt_ids(examples), _prompt_mask(examples), strict=True)]
    )
    assert texts == ["Good. input: " + p for p in prompts for _ in range(4)]


def _prompt_ids(examples: Any) -> Any:
    return examples.rollouts.ids[:, : examples.rollouts.width]


def _prompt_mask(examples: Any) -> Any:
    return examples.rollouts.mask[:, : examples.rollouts.width]


def test_prompts_with_a_control_token_in_them_are_refused(lab: MakeLab) -> None:
    odd = Dataset(prompts=[*PROMPTS, "say <|best|> now:"], held_out=PROMPTS)
    with pytest.raises(ValueError, match=r"'say <\|best\|> now:' contains .* '<\|best\|>'"):
        ready(lab(), quark(), odd)


def test_the_reference_of_quark_sees_the_bare_prompt_and_that_of_alt_the_label(
    lab: MakeLab,
) -> None:
    room = lab()
    algorithm = ready(room, quark(compare=0))
    algorithm.pool.add(scored(room, PROMPTS))
    bare = algorithm._examples(np.arange(9), [TOKENS[0]] * 9).asked
    assert bare is not None
    assert not set(room.policy.control) & set(bare.ids.flatten().tolist())
    other = lab()
    algorithm = ready(other, alt(kl_coef=0.1))
    algorithm.pool.add(scored(other, PROMPTS))
    assert algorithm._examples(np.arange(9), ["Good."] * 9).asked is None


def test_control_tokens_start_like_the_others_and_are_never_sampled(lab: MakeLab) -> None:
    room = lab()
    old = room.policy.model.get_input_embeddings().weight.detach().clone()
    ready(room, quark())
    control = room.policy.control
    new = room.policy.model.get_input_embeddings().weight.detach()
    assert control == [len(old), len(old) + 1, len(old) + 2]
    assert torch.equal(new[: len(old)], old)
    spread = (new[control] - old.mean(0)) / old.std(0)
    assert 0.7 < float(spread.std()) < 1.3
    assert float(spread.abs().max()) < 5
    with torch.no_grad():  # the model wants to say nothing else
        room.policy.model.lm_head.weight[control] += 100 * room.policy.model.lm_head.weight.mean()
        room.policy.model.get_output_embeddings().weight[control] *= 50
    rollouts = room.policy.sample(PROMPTS, 20)
    assert not set(control) & set(rollouts.response_ids.flatten().tolist())


def test_the_end_token_lends_its_embedding(lab: MakeLab) -> None:
    room = lab()
    room.policy.add_control_tokens(["<|separator|>"], "end")
    weight = room.policy.model.get_input_embeddings().weight
    assert torch.equal(weight[room.policy.control[0]], weight[room.policy.tokenizer.eos_token_id])


# Weight decay would reach every row of a matrix of which some are trained.
@pytest.mark.parametrize("kind", [{"lora": {"r": 2, "fan_in_fan_out": True}}, {"train_top": 1}])
def test_where_embeddings_are_frozen_the_new_rows_alone_learn(
    kind: dict[str, Any], lab: MakeLab
) -> None:
    room = lab(**kind)
    algorithm = ready(room, quark(compare=0, weight_decay=0.1))
    weight = room.policy.model.get_input_embeddings().weight
    before = weight.detach().clone()
    algorithm.learn(scored(room, PROMPTS, 4), 0)
    moved = (weight.detach() - before).abs().amax(1)
    assert moved[room.policy.control].min() > 0
    assert moved[: room.policy.control[0]].max() == 0


# ---- targets


def test_cut_off_completions_end_only_where_a_sentence_does(lab: MakeLab) -> None:
    room = lab()
    end = room.policy.tokenizer.eos_token_id
    algorithm = ready(room, alt())
    algorithm.pool = Pool(
        prompts=["p"] * 3,
        completions=["It ends. ", "It does", "It ended"],
        responses=[[5, 6], [5, 7], [5, end]],
        ended=[False, False, True],
    )
    assert [algorithm._target(i) for i in range(3)] == [[5, 6, end], [5, 7], [5, end]]
    algorithm.end_sentences = False
    assert algorithm._target(0) == [5, 6]


# ---- the pool


def test_the_pool_grows_in_quark_and_is_renewed_in_alt(lab: MakeLab) -> None:
    room = lab()
    grown = room.run(quark(steps=3, updates=1))
    assert [row["pool/rows"] for row in grown] == [60, 120, 180]
    other = lab()
    renewed = other.run(alt(steps=3))
    assert [row["pool/rows"] for row in renewed] == [36, 36, 36]
    halved = lab().run(alt(steps=2, drop_factor=0.5))
    assert [row["pool/rows"] for row in halved] == [36, 54]
    files = sorted((room.directory / "pool").iterdir())
    assert [f.name for f in files] == [f"step-{i:06d}.jsonl" for i in (1, 2, 3)]
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    assert {r["prompt"] for r in rows} == set(PROMPTS)
    assert sum(len(r["generations"]) for r in rows) == 60, "what this step brought"
    assert all(len(r["generations"]) == len(r["rewards"]) for r in rows)


def test_half_of_every_label_is_forgotten_where_prompts_come_once(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, quark(drop_factor=0.5, compare=0))
    prompts = [f"{p} {i}" for p in PROMPTS for i in range(2)]
    for step, rows in enumerate((18, 27)):
        assert algorithm.learn(scored(room, prompts), step)["pool/rows"] == rows


def test_a_restart_keeps_no_optimizer(lab: MakeLab) -> None:
    room = lab()
    room.run(alt(steps=3))
    assert len(room.trial.accelerator._optimizers) == 1


def test_learning_takes_as_many_of_every_label(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, alt(samples=6, per_prompt=4, compare=0))
    metrics = algorithm.learn(scored(room, PROMPTS, 6), 0)
    assert (metrics["pool/rows"], metrics["pool/learned"]) == (54, 36)
    assert metrics["labels/0/rows"] == metrics["labels/1/rows"] == 27


# ---- labels


def test_a_reward_that_cannot_tell_completions_apart_is_an_error(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, quark())
    rollouts = scored(room, PROMPTS)
    rollouts.scores = torch.full((9,), 0.5)
    with pytest.raises(ValueError, match=r"all 9 completions of the pool the score 0\.5"):
        algorithm.learn(rollouts, 0)


def test_fewer_samples_than_quantiles_are_refused_before_anything_loads() -> None:
    with pytest.raises(ValueError, match=r"algo\.samples=4 .* 5 quantiles"):
        alt(labels=Quantiles(names=list("abcde"), scope="prompt"), per_prompt=None)


def test_attributes_join_the_phrases_of_each_members_quantile() -> None:
    labels = Attributes(
        attributes={"kind": ["Kind", "Rude"], "short": ["short", "long"]}, joint=", and "
    )
    pool = Pool(
        prompts=["p"] * 2 + ["q"] * 2,
        scores=[0.0] * 4,
        members={"kind": [1.0, 0.0, 1.0, 0.0], "short": [0.0, 1.0, 1.0, 0.0], "rest": [0.0] * 4},
    )
    texts, ranks = labels.label(pool)
    assert texts == ["Kind, and long", "Rude, and short", "Kind, and short", "Rude, and long"]
    assert ranks.tolist() == [1, 1, 0, 2]
    assert labels.best(pool, np.random.default_rng(0)) == "Kind, and short"
    pool.members = {"other": [0.0] * 4}
    with pytest.raises(ValueError, match=r"names 'kind', and the reward has the members other"):
        labels.label(pool)


def test_categories_are_learned_as_said_and_unusable_replies_left_out(lab: MakeLab) -> None:
    room = lab()
    provider = Says(Task, Feedback("fine"), Feedback("poor"), None, Feedback("poor"))
    algorithm = ready(room, alt(labels=Categories(feedback=provider), fill=True, compare=0))
    metrics = algorithm.learn(scored(room, PROMPTS, 4), 0)
    assert metrics["pool/unjudged"] == 9
    assert (metrics["labels/0/rows"], metrics["labels/1/rows"]) == (9, 18)
    assert (metrics["feedback/failed"], metrics["feedback/malformed"]) == (0, 9)
    assert metrics["pool/learned"] == 27
    assert room.policy.prefix == "fine input: "
    kept = algorithm.pool
    assert len(kept.feedbacks) == len(kept.responses) == len(kept.scores) == 27
    again = algorithm.learn(scored(room, PROMPTS, 4), 1)
    assert again["feedback/malformed"] == 9, "of this step, not of the run"


def test_steerlm_says_the_categories_as_attributes(lab: MakeLab) -> None:
    room = lab()
    labels = Categories(feedback=Says(Task, Feedback("fine"), Feedback("poor")), attributes=True)
    algorithm = ready(room, alt(labels=labels, form="{label}.\n\n", compare=0))
    algorithm.learn(scored(room, PROMPTS, 4), 0)
    assert room.policy.prefix == "good:1.\n\n"
    assert set(algorithm.labels.label(algorithm.pool)[0]) == {"good:1", "good:0"}


def test_free_feedback_asks_with_an_example_of_the_best_grade(lab: MakeLab) -> None:
    room = lab()
    said = [Feedback("Clear.", 3.0), Feedback("Dull.", 1.0), Feedback("Crisp.", 3.0), None]
    algorithm = ready(
        room, alt(labels=FreeForm(feedback=Says(Task, *said)), samples=8, per_prompt=8, fill=True)
    )
    metrics = algorithm.learn(scored(room, PROMPTS, 8), 0)
    assert room.policy.prefix in ("Clear. input: ", "Crisp. input: ")
    assert (metrics["labels/0/rows"], metrics["labels/2/rows"]) == (36, 18)
    texts, _ = algorithm.labels.label(algorithm.pool)
    assert texts == algorithm.pool.feedbacks


def test_a_judge_of_whom_nothing_can_be_used_is_an_error(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, alt(labels=Categories(feedback=Says(Task, None))))
    with pytest.raises(ValueError, match="nothing usable of any of 36 completions"):
        algorithm.learn(scored(room, PROMPTS, 4), 0)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "label: "}, r"algo\.form='label: ' must hold"),
        ({"updates": 5}, r"algo\.updates=5 and algo\.epochs=1\.0"),
        ({"epochs": None}, r"algo\.updates=None and algo\.epochs=None"),
        ({"drop_factor": 1.5}, r"algo\.drop_factor=1\.5"),
        ({"per_prompt": 1}, r"algo\.per_prompt=1 is less than .* 2 labels"),
        ({"per_prompt": 5}, r"algo\.per_prompt=5 cannot be shared equally among 2 labels"),
        ({"per_prompt": None, "fill": True}, r"algo\.fill=true tops up algo\.per_prompt"),
        ({"epochs": -1.0}, r"algo\.epochs=-1\.0 must be positive"),
        ({"compare": -1}, r"algo\.compare=-1"),
        ({"lr": -1.0}, r"algo\.lr=-1\.0 must not be negative"),
        ({"kl_target": 1.0}, r"algo\.kl_target=1\.0 steers algo\.kl_coef, which is 0"),
        (
            {"labels": Quantiles(names=TOKENS), "batch": 1, "samples": 2, "per_prompt": 3},
            r"algo\.batch=1 \* algo\.samples=2 completions cannot be cut into 3 quantiles",
        ),
        ({"token_start": "zero"}, r"algo\.token_start"),
        ({"tokens": ["<x>"], "kl_coef": 0.1}, r"algo\.reference_sees_label=false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alt(**settings)


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match=r"algo\.labels\.names=\['a', 'a'\]"):
        Quantiles(names=["a", "a"])


# ---- what is saved, what is loaded, what is measured


def test_a_saved_policy_goes_on_asking_for_the_best(lab: MakeLab, tmp_path: Path) -> None:
    room = lab()
    room.run(quark(steps=1, updates=2))
    room.policy.save(tmp_path / "saved")
    again = Policy(path=str(tmp_path / "saved"), sft=False, max_new_tokens=8)
    again.load(tmp_path / "saved")
    assert (again.prefix, again.control) == (TOKENS[0], room.policy.control)
    assert again.encode(["big cat:"])[0][0] == again.control[0]
    rollouts = again.sample(PROMPTS, 20)
    assert not set(again.control) & set(rollouts.response_ids.flatten().tolist())
    with pytest.raises(ValueError, match=r"knows the control token ' <\|best\|>' already"):
        quark().setup(again, room.reward, DATA, room.trial)
    bare = Policy(path=str(tmp_path / "saved"), sft=False, prefix="", max_new_tokens=8)
    bare.load(tmp_path / "saved")
    assert bare.encode(["big cat:"])[0][0] != again.control[0]


def test_an_adapter_trained_with_control_tokens_loads_again(lab: MakeLab, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    room = lab(lora={"r": 2, "fan_in_fan_out": True})
    room.run(quark(steps=1, updates=2))
    room.policy.save(tmp_path / "saved")
    base: Any = AutoModelForCausalLM.from_pretrained(room.policy.source)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    ids = torch.tensor(room.policy.encode(["big cat:"]))
    assert torch.equal(loaded(ids).logits, room.policy.model(ids).logits)
    again = Policy(
        path=room.policy.source, adapter=str(tmp_path / "saved"), sft=False, max_new_tokens=8
    )
    again.load(room.policy.source)
    assert (again.prefix, again.control) == (TOKENS[0], room.policy.control)
    torch.testing.assert_close(again.model(ids).logits, loaded(ids).logits, atol=1e-5, rtol=0)


def test_the_kl_is_to_what_the_start_policy_says_of_the_bare_prompt(lab: MakeLab) -> None:
    room = lab()
    room.policy.prefix = "old hat: "
    rollouts = room.policy.sample(PROMPTS, 2)
    found = against_reference(room.policy, room.trial.reference, rollouts)
    log_ratio, nll = found.log_ratio, found.surprise
    bare = room.policy.assemble(rollouts.prompts, rollouts.responses(), [""] * len(rollouts))
    for i in range(len(rollouts)):
        asked, plain = (_logprobs(room.policy, r, i) for r in (rollouts, bare))
        length = len(asked)
        torch.testing.assert_close(log_ratio[i, :length], asked - plain, atol=1e-5, rtol=0)
        assert not log_ratio[i, length:].any()
        assert float(nll[i]) == pytest.approx(-float(plain.mean()), abs=1e-5)
    assert float(log_ratio.abs().max()) > 0.01, "the prefix changes what is said"


def _logprobs(policy: Policy, rollouts: Rollouts, row: int) -> torch.Tensor:
    """Of the response tokens of one row, asked alone and without padding."""
    ids = rollouts.ids[row][rollouts.mask[row] == 1]
    count = int(rollouts.response[row].sum())
    with torch.no_grad():
        logprobs = policy.model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[1:, None])[-count:, 0]


def test_a_prompt_too_long_behind_its_label_is_told(lab: MakeLab) -> None:
    room = lab()
    fits = "big cat " * 6 + ":"
    data = Dataset(prompts=[fits], held_out=[fits])
    ready(lab(), alt(form="{label} "), data)
    with pytest.raises(ValueError, match=r"prompt 1 .* context of 64"):
        ready(room, alt(form="{label} this is what we have to say of it: "), data)


def test_feedback_too_long_for_the_context_is_left_out_and_counted(lab: MakeLab) -> None:
    room = lab()
    said = [Feedback("Clear.", 3.0), Feedback("On and on. " * 9, 2.0)]
    labels = FreeForm(feedback=Says(Task, *said))
    algorithm = ready(room, alt(labels=labels, samples=8, per_prompt=8, fill=True, compare=0))
    assert algorithm.learn(scored(room, PROMPTS, 8), 0)["pool/unjudged"] == 36
    assert set(algorithm.pool.feedbacks) == {"Clear."}


def test_the_next_iteration_does_not_nest_its_labels(lab: MakeLab, tmp_path: Path) -> None:
    room = lab()
    room.run(alt(steps=1))
    room.policy.save(tmp_path / "first")
    again = Policy(path=str(tmp_path / "first"), sft=False, max_new_tokens=8)
    again.load(tmp_path / "first", trainable=True)
    assert (again.prefix, again.plain) == ("Good. input: ", "")
    algorithm = alt()
    algorithm.setup(again, room.reward, DATA, room.trial)
    algorithm.prepare()
    assert algorithm._before("Good.") == "Good. input: "


# ---- a pool from elsewhere


def write_pool(path: Path, **more: Any) -> str:
    rows = [{"prompt": p, "generations": ["aeiou", "xyz"]} | more for p in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_first_step_learns_from_a_file_too(lab: MakeLab, tmp_path: Path) -> None:
    room = lab()
    algorithm = ready(room, quark(compare=0, start=write_pool(tmp_path / "p.jsonl")))
    metrics = algorithm.learn(scored(room, PROMPTS), 0)
    assert metrics["pool/rows"] == 9 + 18
    assert algorithm.pool.scores[:2] == [5.0, 0.0], "scored here, as the file has no rewards"
    end = room.policy.tokenizer.eos_token_id
    assert [r[-1] == end for r in algorithm.pool.responses[:2]] == algorithm.pool.ended[:2]
    assert algorithm.learn(scored(room, PROMPTS), 1)["pool/rows"] == 9 + 18 + 9, "once"
    given = write_pool(tmp_path / "q.jsonl", rewards=[0.25, 0.75], ended=[True, False])
    other = ready(lab(), quark(compare=0, start=given))
    other._collect(scored(lab(), PROMPTS), 0)
    assert other.pool.scores[:2] == [5.0, 0.0], "rewards of another origin are not mixed in"
    assert other.pool.ended[:2] == [True, False]


def test_feedback_in_a_file_is_not_asked_for_again(lab: MakeLab, tmp_path: Path) -> None:
    room = lab()
    provider = Says(Task, Feedback("poor"))
    path = write_pool(tmp_path / "p.jsonl", rewards=[1.0, 0.0], feedbacks=["Fine", "so-so"])
    labels = Categories(feedback=provider)
    algorithm = ready(room, alt(labels=labels, start=path, compare=0, fill=True))
    metrics = algorithm.learn(scored(room, PROMPTS, 4), 0)
    assert provider.counts["asked"] == 36
    assert metrics["pool/unjudged"] == 9, "no judge could have said so-so"
    assert algorithm.pool.feedbacks.count("fine") == 9
    assert len(algorithm.pool) == 9 + 36


def test_a_start_that_is_not_there_is_told_before_anything_loads(lab: MakeLab) -> None:
    with pytest.raises(FileNotFoundError, match="no data file at missing"):
        quark(start="missing.jsonl").check(lab().policy, DATA)
