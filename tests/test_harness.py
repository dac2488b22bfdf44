"""Benchmarks: likelihoods against plain torch, the arithmetic against vectors, what is refused."""

import hashlib
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_policy
from runs import DebugRun, command_line

from rlhf_exp.data.facts import Facts
from rlhf_exp.data.local import read_jsonl, write_jsonl
from rlhf_exp.data.qnli import PROMPT
from rlhf_exp.data.reviews import ADJECTIVES, clause_sentiment
from rlhf_exp.evaluation import harness as harness_module
from rlhf_exp.evaluation import own_tasks
from rlhf_exp.evaluation.benchmark_scores import Score, average, pooled, standard_error
from rlhf_exp.evaluation.harness import Harness
from rlhf_exp.policy import Policy

pytest.importorskip("lm_eval")
pytest_plugins = ["runs_fixtures"]

VECTORS = json.loads((Path(__file__).parent / "vectors" / "benchmarks.json").read_text())
LONG = {"model_type": "gpt2", "initializer_range": 0.2} | TINY["gpt2"] | {"n_positions": 256}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture
def policy(tiny_base) -> Policy:
    """With room for few-shot contexts, and no trained weights."""
    return loaded(tiny_base)


def loaded(tiny_base, **settings: Any) -> Policy:
    """Of the tiny base; its position embeddings are repeated to make room."""
    made = tiny_policy(**settings)
    made.load(tiny_base(), trainable=True)
    inner = made.model.get_base_model() if made.lora else made.model
    table = inner.transformer.wpe.weight.data
    grown = torch.nn.Embedding(256, table.shape[1])
    grown.weight.data = table.repeat(4, 1)
    inner.transformer.wpe, inner.config.n_positions = grown, 256
    return made


def loglikelihood(policy: Policy, prompt: str, continuation: str) -> float:
    """One sequence through the model, without padding, shared passes or this package's losses."""
    text = (policy.prefix or "") + prompt
    if policy.chat:
        text = f"<user>{text}\n<assistant>"
    before = policy.tokenizer(text)["input_ids"]
    ids = before + policy.tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits[0].double()
    logits[:, policy.control] = -torch.inf
    logprobs = logits.log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


def rows(task: str, count: int) -> list[dict[str, Any]]:
    return read_jsonl(own_tasks.TASKS / f"{task}.jsonl")[:count]


# ------------------------------------------------------------------------------- asking the policy


@pytest.mark.parametrize("how", ["plain", "prefix", "control", "lora", "chat"])
def test_accuracies_are_those_of_plain_likelihoods(how: str, tiny_base) -> None:
    from rlhf_exp.evaluation.benchmark_model import PolicyLM

    settings: dict[str, Any] = {"prefix": {"prefix": "the best : "}, "chat": {"chat": True}}.get(
        how, {"lora": {"r": 2, "init_lora_weights": False}} if how == "lora" else {}
    )
    policy = loaded(tiny_base, **settings)
    policy.tokenizer.chat_template = TEMPLATE if how == "chat" else None
    if how == "control":
        policy.add_control_tokens(["<best>"])
    asked = rows("capitals", 12)
    delimiter = "" if how == "chat" else " "  # the harness's rule
    expected = [
        [loglikelihood(policy, r["prompt"], delimiter + c) for c in r["choices"]] for r in asked
    ]
    measured: list[tuple[float, bool]] = []
    ask = PolicyLM.scores

    def spying(self: PolicyLM, pairs: Any) -> Any:
        measured.extend(found := ask(self, pairs))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyLM, "scores", spying)
        result = Harness(tasks=["capitals"], limit=12, batch=5).measure(policy)["capitals"]
    flat = [value for row in expected for value in row]
    assert [value for value, _ in measured] == pytest.approx(flat, abs=1e-4)
    right = [int(np.argmax(e) == r["answer"]) for e, r in zip(expected, asked, strict=True)]
    by_length = [
        int(np.argmax([x / len(c) for x, c in zip(e, r["choices"], strict=True)]) == r["answer"])
        for e, r in zip(expected, asked, strict=True)
    ]
    assert result["acc"] == pytest.approx(statistics.fmean(right))
    assert result["acc_norm"] == pytest.approx(statistics.fmean(by_length))
    assert result["acc_stderr"] == pytest.approx(statistics.stdev(right) / math.sqrt(12))


def test_one_token_choices_share_a_pass_and_long_contexts_lose_their_beginning(
    policy: Policy, monkeypatch, caplog
) -> None:
    from rlhf_exp.evaluation.benchmark_model import PolicyLM

    passes: list[int] = []
    ask = policy.logits

    def counting(batch: Any) -> Any:
        passes.append(len(batch.rows))
        return ask(batch)

    monkeypatch.setattr(policy, "logits", counting)
    model = PolicyLM(policy, batch=8)
    model.longest = 10
    context = list(range(5, 25))
    found = model.scores([(context, [7]), (context, [9]), (context[-4:], [7, 9])])
    assert sum(passes) == 2
    assert "2 of 3 contexts lost their beginning" in caplog.text
    with torch.no_grad():
        cut = policy.model(torch.tensor([context[-9:]])).logits[0, -1].log_softmax(-1)
    assert [value for value, _ in found[:2]] == pytest.approx(cut[[7, 9]].tolist(), abs=1e-4)
    greedy = int(cut.argmax())
    assert model.scores([(context, [greedy]), (context, [greedy - 1])])[0][1] is True
    with pytest.raises(ValueError, match=r"of 11 tokens leaves no context in the model's 10"):
        model.scores([(context, context[:11])])


def test_shots_limit_and_prefix_reach_the_contexts(tiny_base, monkeypatch) -> None:
    policy = loaded(tiny_base, prefix="now : ")
    texts: list[str] = []
    encode = policy.encode

    def recording(prompts: list[str]) -> list[list[int]]:
        texts.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(policy, "encode", recording)
    Harness(tasks=[{"name": "facts_truth", "shots": 2, "limit": 3}], shots=1).measure(policy)
    contexts = {t for t in texts if t.endswith("?")}
    assert len(contexts) == 3
    known = {r["prompt"]: r["choices"][r["answer"]] for r in rows("facts", 256)}
    for context in contexts:
        *shown, question = context.split("\n\n")
        assert len(shown) == 2
        assert all(known[p] == a for p, a in (s.rsplit(" ", 1) for s in shown))
        assert question in [r["prompt"] for r in rows("facts", 3)]
    assert encode(["x"]) == [policy.tokenizer("now : x")["input_ids"]]


def test_generation_is_greedy_and_stops(policy: Policy, tmp_path: Path) -> None:
    prompt = "a short satire about a king :"
    ids = policy.tokenizer(prompt)["input_ids"]
    made: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            made.append(int(policy.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    text = policy.tokenizer.decode(made)
    stop = text[len(text) // 2 :][:2]
    write_jsonl(tmp_path / "said.jsonl", [{"q": prompt, "a": text.partition(stop)[0]}])
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: said.jsonl}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
        f"generation_kwargs: {{until: [{json.dumps(stop)}], max_gen_toks: 12}}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    mine = Harness(tasks=["mine"], folder=str(tmp_path))
    mine.check()
    assert mine.measure(policy) == {"mine": {"exact_match": 1.0}}


def test_random_generators_and_weights_are_left_alone(policy: Policy) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    Harness(tasks=["reviews_mood", "facts_answer"], limit=4, shots=1).measure(policy)
    assert drawn() == expected
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())
    assert not policy.model.training


# ---------------------------------------------------------------------------------- the arithmetic


def test_accuracy_with_and_without_length() -> None:
    vector, mine = VECTORS["mc_accuracy"], Harness(tasks=["capitals"])
    (task,) = mine._load(mine.benchmarks[0]).values()
    row = {"choices": vector["inputs"]["choices"], "answer": vector["inputs"]["gold"]}
    found = task.process_results(row, [(x, False) for x in vector["inputs"]["loglik"]])
    assert found == {k: vector["expected"][k] for k in ("acc", "acc_norm")}


def test_average_is_plain() -> None:
    vector = VECTORS["leaderboard_average"]
    for name, scores in vector["inputs"]["rows"].items():
        found = average([Score(x, 0.3, [], []) for x in scores])["average"]
        assert found["score"] == pytest.approx(vector["expected"]["mean"][name], abs=1e-9)
        assert found["score_stderr"] == pytest.approx(0.15)  # 0.3 / sqrt(4)


def test_standard_errors_of_groups() -> None:
    x, y = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    scores = [Score(statistics.fmean(v), standard_error(v), list("abcd"), v) for v in (x, y)]
    assert standard_error(x) == pytest.approx(0.25)
    same = pooled([{"acc": s} for s in scores])["acc"]
    assert (same.mean, same.values) == (0.625, [1, 0, 0.5, 1])
    assert same.stderr == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    scores[1].examples = list("efgh")
    apart = pooled([{"acc": s, "f1": s} if s is scores[0] else {"acc": s} for s in scores])
    assert apart["acc"].stderr == pytest.approx(math.hypot(0.25, math.sqrt(1 / 12)) / 2)
    assert "f1" not in apart


def test_table_tells_errors_and_change() -> None:
    mine = Harness(tasks=[{"name": "mmlu", "metric": "acc"}, "other"])
    many = {f"mmlu/{i}": {"acc": 0.1} for i in range(9)}
    before = many | {"mmlu": {"f1": 0.9, "acc": 0.5, "acc_stderr": 0.03}, "other": {"bleu": 7.0}}
    after = many | {"mmlu": {"f1": 0.9, "acc": 0.6, "acc_stderr": 0.04}, "other": {"bleu": 8.5}}
    head, *lines = mine.as_text(before, after).splitlines()
    assert head.split() == ["benchmark", "before", "after", "change"]
    assert [" ".join(line.split()) for line in lines] == [
        "mmlu acc 0.500 ± 0.030 0.600 ± 0.040 0.100 ± 0.050",
        "other bleu 7.000 8.500 1.500",
    ]
    assert max(map(len, (head, *lines))) <= 120
    assert "0.600 ± 0.040" in mine.as_text(None, after)


# --------------------------------------------------------------------------------------- the tasks


def test_rows_can_be_made_again(tmp_path: Path) -> None:
    own_tasks.write(tmp_path)
    assert {p.name for p in own_tasks.TASKS.glob("*.jsonl")} == {p.name for p in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (own_tasks.TASKS / file.name).read_bytes(), file.name


def test_rows_are_right() -> None:
    data = Facts().load()
    asked = {r["prompt"]: f" {r['choices'][r['answer']]}" for r in rows("facts", 256)}
    assert asked == {p: data.answers[p] for p in data.held_out}
    for row in rows("reviews_grammar", 200):
        right, wrong = row["choices"][row["answer"]], row["choices"][1 - row["answer"]]
        assert sorted(right.split()) == sorted(wrong.split())
        read = [clause_sentiment(c.removesuffix(" .")) for c in (right, wrong)]
        assert read[0] is not None
        assert read[1] is None
    for row in rows("reviews_mood", 200):
        right, wrong = row["choices"][row["answer"]], row["choices"][1 - row["answer"]]
        told = [ADJECTIVES[w] for w in row["prompt"].split() if w in ADJECTIVES]
        going_on, turning = (ADJECTIVES[c.split()[3]] for c in (right, wrong))
        assert going_on == -turning
        assert len(told) == 2
        assert all(x * going_on > 0 for x in told)


def test_qnli_under_four_prompts(policy: Policy, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    said = VECTORS["qnli_vicuna_prompt"]["inputs"]
    told = [said | {"label": i % 2, "idx": i} for i in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(told), tmp_path / "validation-0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(told[:1]), tmp_path / "train-0.parquet")
    mine = Harness(tasks=[{"name": "qnli_prompts", "data": str(tmp_path)}], limit=5)
    mine.check()
    leaves = mine._load(mine.benchmarks[0])
    texts = {name: leaf.doc_to_text(told[0]) for name, leaf in leaves.items()}
    expected = VECTORS["qnli_vicuna_prompt"]["expected"]["sha256"]
    assert texts["qnli_vicuna"] == PROMPT.format(**said)
    assert hashlib.sha256(texts["qnli_vicuna"].encode()).hexdigest() == expected
    assert texts["qnli_plain"] in texts["qnli_vicuna"]
    assert texts["qnli_glue"] in texts["qnli_wrapped"]
    policy.model.config.n_positions = 1024
    table = policy.model.transformer.wpe
    policy.model.transformer.wpe = torch.nn.Embedding(1024, table.embedding_dim)
    found = mine.measure(policy)
    each = [found[f"qnli_prompts/{name}"]["acc"] for name in leaves]
    assert len(each) == 4
    assert set(each) <= {0.4, 0.6}, "the same question with both labels: one answer to all"
    assert found["qnli_prompts"]["acc"] == pytest.approx(statistics.fmean(each))
    assert found["qnli_prompts"]["acc_spread"] == pytest.approx(max(each) - min(each))
    assert "  qnli_plain acc" in mine.as_text(None, found)


@pytest.mark.slow
def test_open_llm_is_what_the_harness_has() -> None:
    from hydra import compose, initialize_config_dir

    from rlhf_exp.config import build, conf_directory, resolved

    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        node = resolved(compose("config", overrides=["evaluation=open_llm"]))["evaluation"]
    mine: Harness = build(node, "evaluation").harness
    known = mine._manager.task_index
    asked = [(b.name, b.shots, b.metric) for b in mine.benchmarks]
    assert asked == [
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("mmlu", 5, "acc"),
        ("truthfulqa_mc2", 0, "acc"),
    ]
    for name, _, metric in asked:
        members = [m["task"] for m in mine._members(name)]
        assert len(members) == (57 if name == "mmlu" else 1)
        for member in members:
            assert metric in [m["metric"] for m in known[member].cfg["metric_list"]], member
    wrong = Harness(tasks=["arc_challange"])
    wrong.__dict__["_manager"] = mine._manager
    with pytest.raises(
        ValueError, match=r"arc_challange is no task .*; did you mean arc_challenge"
    ):
        wrong.check()


# ---------------------------------------------------------------------------------- what is refused


def test_missing_package_is_told_with_its_cure(monkeypatch) -> None:
    monkeypatch.setattr(harness_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs lm_eval: pip install 'rlhf_exp\[evaluation\]'"):
        Harness(tasks=["capitals"]).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, r"tasks is empty: name a task"),
        ({"tasks": ["a", "a"]}, r"names a twice"),
        ({"tasks": [3]}, r"3 has no name"),
        ({"tasks": [{"name": "a", "shot": 2}]}, r"shot is no setting of a; did you mean shots"),
        ({"tasks": [{"name": "a", "limit": 0}]}, r"a has shots=None and limit=0"),
        ({"tasks": ["a"], "batch": 0}, r"batch=0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Harness(**settings)


def test_data_that_cannot_be_had_are_told_before_the_run() -> None:
    with pytest.raises(
        ValueError, match=r"qnli_prompts cannot be loaded .*give it a network or da"
    ):
        Harness(tasks=["qnli_prompts"]).check()


TASK = (
    "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
    "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_choice: c\n"
    "doc_to_target: a\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)
ROW = '{"q": "x", "c": ["y", "z"], "a": 0}\n'


@pytest.mark.parametrize(
    ("yaml", "lines", "task", "message"),
    [
        (TASK, ROW + '{"q": \n', "mine", r"rows\.jsonl, line 2: not valid JSON .*; mend"),
        (TASK, None, "mine", r"no data file at .*rows\.jsonl"),
        (TASK + "x: [\n", ROW, "mine", r"mine\.yaml is no valid YAML \(.* line \d+.*\): mend it"),
        (None, ROW, "mine", r"holds no task file"),
        (TASK.replace("_text: q", "_text: '{{q'"), ROW, "mine", r"mine cannot be loaded \(Templ"),
        (TASK, ROW, {"name": "mine", "metric": "f1"}, r"mine has no metric f1; it has acc"),
        (TASK, ROW, {"name": "mine", "data": "nowhere"}, r"data=nowhere of mine holds no train"),
    ],
)
def test_broken_files_of_a_user_end_in_a_sentence(yaml, lines, task, message, tmp_path) -> None:
    for name, text in (("mine.yaml", yaml), ("rows.jsonl", lines)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Harness(tasks=[task], folder=str(tmp_path)).check()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# --------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_run_tells_its_benchmarks(debug_run: DebugRun, tmp_path: Path) -> None:
    from rlhf_exp.run import Stages

    directory = tmp_path / "run"
    settings = ["experiment=debug", "evaluation=harness", "evaluation.harness.limit=8"]
    places = [f"artifacts={debug_run.artifacts}", f"hydra.run.dir={directory}"]
    done = command_line(*settings, *places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = json.loads((directory / "summary.json").read_text())
    for side in ("before", "after"):
        scores = first["benchmarks"][side]
        assert set(scores) == {"reviews_grammar", "reviews_mood", "average"}
        assert all(scores[name]["acc"] * 8 % 1 == 0 for name in ("reviews_grammar", "reviews_mood"))
    assert first["benchmarks"]["before"]["reviews_grammar"]["acc"] > 0.5, "a model of reviews"
    assert "reviews_mood acc" in done.stdout
    assert "Running loglikelihood" not in done.stderr
    stages = Stages(directory)
    stages.run_evaluate()
    assert json.loads((directory / "summary.json").read_text()) == first
    (made,) = [p for p in stages.store.used if "/benchmark/start-" in p]
    assert stages.store.used[made] == "reused"
