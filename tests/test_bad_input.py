"""Bad words, settings and data: exit code 1, one sentence with thing and cure, no results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DebugRun, command_line, contents, nothing_half_written, says, the_error

pytest_plugins = ["runs_fixtures"]

OWN_DATA = [
    "experiment=debug",
    "data=local",
    "data.prompts=prompts.jsonl",
    "reward=lexicon",
]
UNTRAINED = [*OWN_DATA, "policy.sft=false", "algo.steps=2"]


def write_prompts(folder: Path, *lines: Any) -> None:
    (folder / "prompts.jsonl").write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    )


# ---- through the command line


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["algo.stpes=3"], ["algo.stpes", "did you mean algo.steps?"]),
        (["+algo.stpes=3"], ["algo.stpes", "did you mean steps?"]),
        (["polcy=tiny"], ["polcy", "did you mean policy?"]),
        (["reward=ensemlbe"], ["reward=ensemlbe", "did you mean ensemble?", "lexicon"]),
        (["algo.steps=many"], ["algo.steps", "many", "Integer"]),
        (["data=local"], ["data.prompts"]),
        (["algo.steps=[3"], ["algo.steps=[3"]),
        (["resume=nowhere", "seed=1"], ["resume=", "hardware alone may be"]),
    ],
)
def test_a_wrong_word_on_the_command_line(
    arguments: list[str], fragments: list[str], tmp_path: Path
) -> None:
    done = command_line(*arguments, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    says(the_error(done.stderr), *fragments)
    nothing_half_written(tmp_path / "run")
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command_line("experiment=debug", "hydra.run.dir=file/run", cwd=tmp_path)
    assert done.returncode == 1
    says(the_error(done.stderr), "file/run", "hydra.run.dir=")
    assert contents(tmp_path) == {"file"}


@pytest.mark.slow
def test_a_run_directory_that_holds_a_run(debug_run: DebugRun, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in debug_run.directory.glob("*.json*")}
    done = command_line(
        "experiment=debug",
        f"artifacts={debug_run.artifacts}",
        f"hydra.run.dir={debug_run.directory}",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    says(the_error(done.stderr), str(debug_run.directory), "resume=", "hydra.run.dir")
    assert {p: p.read_bytes() for p in debug_run.directory.glob("*.json*")} == before


@pytest.mark.slow
def test_a_sweep_over_something_wrong(tmp_path: Path) -> None:
    done = command_line("-m", "algo.steps=many", "hydra.sweep.dir=s", cwd=tmp_path)
    assert done.returncode == 1
    says(the_error(done.stderr), "algo.steps", "many", "Integer")
    nothing_half_written(tmp_path / "s" / "0")


# ---- impossible settings


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["algo.minibatch=7"], ["algo.minibatch=7", "algo.batch=16"]),
        (["algo.steps=0"], ["algo.steps=0", "positive"]),
        (["algo.kl_target=-1"], ["algo.kl_target=-1", "null"]),
        (["algo.kl_estimator=k4"], ["algo.kl_estimator=k4", "k1", "k3"]),
        (["algo.whiten=bacth"], ["algo.whiten=bacth", "did you mean batch?"]),
        (["algo.schedule=cosin"], ["algo.schedule=cosin", "did you mean cosine?"]),
        (
            ["policy.lora={r: 4}", "policy.train_top=1"],
            ["policy.lora", "policy.train_top=1", "null"],
        ),
        (["policy.top_p=0.9"], ["policy.top_p=0.9", "KL", "policy.top_p=1"]),
        (["policy.top_k=50"], ["policy.top_k=50", "policy.top_k=0"]),
        (["policy.min_new_tokens=3"], ["policy.min_new_tokens=3", "policy.min_new_tokens=0"]),
        (["policy.temperature=0"], ["policy.temperature=0", "positive"]),
        (["policy.path=somewhere"], ["policy.path", "policy.architecture"]),
        (["policy.dtype=float8"], ["policy.dtype=float8", "bfloat16"]),
        (["preferences.noise_rate=1.5"], ["preferences.noise_rate=1.5", "between 0 and 1"]),
        (["reward.objective=uwoo"], ["reward.objective=uwoo", "did you mean uwo?"]),
        (["reward.size=0"], ["reward.size=0", "at least 1"]),
        (["reward.member.batch=30"], ["reward.batch=30", "multiple of reward.micro_batch=32"]),
        (["sft.batch=48"], ["sft.batch=48", "sft.micro_batch=32"]),
        (["data.prompts=30000"], ["data.prompts=30000", "lower one"]),
        (["checkpoints.keep=0"], ["checkpoints.keep=0", "at least 1"]),
        (["evaluation.every=0"], ["evaluation.every", "at least 1"]),
        (["stages=[sft,allign]"], ["allign", "align"]),
        (["hardware=gpu"], ["hardware.device=cuda", "hardware=cpu"]),
        (
            ["reward=function", "reward.function=no_colon"],
            ["reward.function=no_colon", "module:function"],
        ),
        (["reward=pairwise", "reward.train=false"], ["reward.train=false", "reward.path"]),
        (["seed=abc"], ["seed", "abc"]),
        (["seed=-1"], ["seed=-1"]),
        (["show_every=0"], ["show_every=0"]),
        (
            ["checkpoints.best=reward/glod"],
            ["checkpoints.best=reward/glod", "did you mean reward/gold?"],
        ),
        (["stages=align"], ["stages"]),
    ],
)
def test_settings_that_cannot_be(
    overrides: list[str], fragments: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    if overrides == ["hardware=gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    says(refused("experiment=debug", *overrides), *fragments)
    assert not (tmp_path / "artifacts").exists(), "this is known before anything is built"


# ---- data


def test_a_data_file_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    says(refused(*UNTRAINED), "prompts.jsonl", "no data file", "working directory")
    assert not (tmp_path / "artifacts").exists()


GOOD = {"prompt": "tell me:"}


@pytest.mark.parametrize(
    ("lines", "fragments"),
    [
        ([], ["prompts.jsonl", "empty"]),
        ([GOOD, '{"prompt": "cut sho'], ["prompts.jsonl, line 2", "not valid JSON"]),
        ([GOOD, "", GOOD], ["prompts.jsonl, line 2", "not valid JSON"]),
        ([GOOD, '"text"'], ["prompts.jsonl, line 2", "expected an object"]),
        ([GOOD, GOOD, {"text": "x"}], ["prompts.jsonl, line 3", "'prompt'", "it has text"]),
        ([GOOD, {"prompt": "  "}], ["prompts.jsonl, line 2", "'prompt'", "not empty"]),
        ([GOOD, {"prompt": 3}], ["prompts.jsonl, line 2", "'prompt'", "must be text", "3"]),
        ([GOOD], ["prompts.jsonl", "too few rows", "data.held_out"]),
        ([GOOD] * 12, ["trained on and held out", "tell me:"]),
    ],
)
def test_prompts_that_cannot_be_used(
    lines: list[Any], fragments: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    write_prompts(tmp_path, *lines)
    says(refused(*UNTRAINED), *fragments)
    assert not (tmp_path / "artifacts").exists(), (
        "no weights are built for data that cannot be read"
    )


def test_a_data_file_that_is_not_text(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    says(refused(*UNTRAINED), "prompts.jsonl", "UTF-8")


def test_a_data_file_that_is_no_parquet(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prompts.parquet").write_text("no table")
    says(refused(*UNTRAINED, "data.prompts=prompts.parquet"), "prompts.parquet", "Parquet")


def test_a_prompt_longer_than_the_context(refused: Callable[..., str], tmp_path: Path) -> None:
    write_prompts(tmp_path, *({"prompt": f"{i} " + "long " * (200 * (i == 7))} for i in range(20)))
    says(refused(*UNTRAINED), "'7 long long", "context of 128", "policy.max_new_tokens")


def test_a_policy_that_wants_demonstrations_there_are_none_of(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    write_prompts(tmp_path, *({"prompt": f"film {i}:"} for i in range(20)))
    says(refused(*OWN_DATA), "data.demonstrations", "policy.sft=false")


def test_pairs_of_equal_texts(refused: Callable[..., str], tmp_path: Path) -> None:
    write_prompts(tmp_path, *({"prompt": f"film {i}:"} for i in range(20)))
    pairs = [{"prompt": "film 1:", "chosen": " good", "rejected": bad} for bad in (" bad", " good")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    asked = ["labeller=dataset", "data.preferences=pairs.jsonl", "reward=pairwise"]
    says(refused(*UNTRAINED, *asked), "pairs.jsonl, line 2", "equal", "remove")


def test_labels_from_a_data_set_that_has_none(
    refused: Callable[..., str], tmp_path: Path, artifacts: Path
) -> None:
    asked = ["experiment=debug", "labeller=dataset", f"artifacts={artifacts}"]
    says(refused(*asked), "labeller=dataset", "data.preferences", "labeller=gold")


def test_no_pair_within_the_longest_length(refused: Callable[..., str], artifacts: Path) -> None:
    asked = ["reward.member.max_length=2", f"artifacts={artifacts}"]
    says(
        refused("experiment=debug", *asked),
        "none of 64 preference pairs",
        "reward.max_length=2",
        "raise",
    )


def test_no_pair_that_differs(refused: Callable[..., str], artifacts: Path) -> None:
    asked = ["policy.temperature=0.001", f"artifacts={artifacts}"]
    says(
        refused("experiment=debug", *asked), "of 80 preference pairs survived", "policy.temperature"
    )
