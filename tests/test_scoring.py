"""What an evaluation measures, and when the gold is asked."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import MakeLab, Vowels
from runs import DebugRun, command_line, inside, not_finished, rewound, says, the_error

from rlhf_exp.evaluation.best_of_n import win_shares
from rlhf_exp.evaluation.scoring import (
    against_reference,
    correct,
    distinct,
    repetition,
    settle,
    wins,
)

pytest_plugins = ["lab_fixtures", "runs_fixtures"]
slow = pytest.mark.slow


# --------------------------------------------------------------------------------- by hand


def test_repetition_and_distinct_by_hand() -> None:
    text = "a b c d a b c d"  # abcd bcda cdab dabc abcd
    assert repetition(text) == pytest.approx(1 / 5)
    assert repetition(text, 1) == pytest.approx(4 / 8)
    assert repetition("too short a") == 0.0
    assert distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)  # ab ba ba


def test_wins_by_prompt_with_ties_and_several_completions() -> None:
    def rows(*gold: tuple[str, float]) -> list[dict[str, Any]]:
        return [{"prompt": prompt, "gold": value} for prompt, value in gold]

    before = rows(("p", 1.0), ("p", 2.0), ("q", 0.0))
    assert wins(rows(("q", 0.0), ("p", 1.5), ("p", 2.0), ("p", 0.5)), before) == [
        0.5, 0.5, 0.75, 0.0,
    ]  # fmt: skip


def test_right_answers_where_all_prompts_have_one() -> None:
    answers = {"Paris?": "yes", "Rome?": "no"}
    assert correct(answers, ["Paris?", "Rome?"], [" yes.", " yes"]) == [True, False]
    assert correct(answers, ["Paris?", "Oslo?"], ["yes", "no"]) is None
    assert correct({}, ["Paris?"], ["yes"]) is None


def test_win_shares_against_every_other_answer() -> None:
    gold = np.array([[3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [
        [
            np.mean([(g > h) + (g == h) / 2 for j, h in enumerate(row) if j != i])
            for i, g in enumerate(row)
        ]
        for row in gold
    ]
    np.testing.assert_allclose(win_shares(gold), expected)
    assert win_shares(np.array([[7.0]])) == [[0.5]]


# --------------------------------------------------------------------------------- a policy


def _moved(room: Any) -> None:
    """Put the policy elsewhere than its start."""
    torch.manual_seed(1)
    for parameter in room.policy.model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def test_the_exact_kl_is_that_over_the_vocabulary(lab: MakeLab) -> None:
    """Against plain loops, and its mean agrees with that of k1, which it estimates with less
    variance.
    """
    room = lab(temperature=0.8)
    start = {k: v.clone() for k, v in room.policy.model.state_dict().items()}
    _moved(room)
    evaluator = room.trial.evaluator
    evaluator.settings.samples = 200
    metrics = evaluator(3, room.policy, room.trial.reference)
    rows = json.loads((evaluator.folder / "step-000003.json").read_text())["rows"]
    k1, exact = (np.array([row[k] for row in rows]) for k in ("k1", "exact"))
    assert metrics["kl/exact"] == pytest.approx(exact.mean())
    assert metrics["kl/exact"] > 0.05
    error = (k1 - exact).std() / math.sqrt(len(k1))
    assert abs((k1 - exact).mean()) < 4 * error
    assert exact.std() < k1.std()

    rollouts = room.policy.sample(["big cat:"])
    after = _next(room.policy, rollouts)
    room.policy.model.load_state_dict(start)
    before = _next(room.policy, rollouts)
    by_hand = sum(
        float((p * (p.log() - q.log())).sum()) for p, q in zip(after, before, strict=True)
    )
    _moved(room)
    found = against_reference(room.policy, room.trial.reference, rollouts, exact=True)
    assert found.exact is not None
    assert float(found.exact.sum()) == pytest.approx(by_hand, rel=1e-4)


def _next(policy: Any, rollouts: Any) -> list[torch.Tensor]:
    """The distribution that each response token was drawn from, at the policy's temperature."""
    ids = rollouts.ids[0][rollouts.mask[0] == 1]
    length = int(rollouts.response[0].sum())
    with torch.no_grad():
        logits = policy.model(input_ids=ids[None]).logits[0]
    return list((logits[-length - 1 : -1] / policy.temperature).softmax(-1))


def test_the_gold_may_be_asked_later_with_the_same_outcome(lab: MakeLab) -> None:
    at_once, later = lab(), lab()
    later.trial.evaluator.gold = None
    for room in (at_once, later):
        evaluator = room.trial.evaluator
        evaluator(0, room.policy, room.trial.reference)
        _moved(room)
        evaluator(5, room.policy, room.trial.reference)
    early = json.loads((later.directory / "evaluation/step-000005.json").read_text())
    assert "gold" not in early["rows"][0]
    assert "reward/gold" not in early["metrics"]
    loaded = []
    settle(later.directory, lambda: loaded.append(1) or Vowels())
    for name in ("step-000000.json", "step-000005.json"):
        one, other = (
            json.loads((room.directory / "evaluation" / name).read_text())
            for room in (at_once, later)
        )
        assert one == other
    assert one["metrics"]["win/start"] == np.mean([row["win"] for row in one["rows"]])
    before = json.loads((later.directory / "evaluation/step-000000.json").read_text())
    assert before["metrics"]["win/start"] == 0.5
    asked = len(loaded)
    settle(later.directory, lambda: loaded.append(1) or Vowels())
    assert len(loaded) == asked == 2, "what is judged is not judged again, nor the gold loaded"


# --------------------------------------------------------------------------------- runs


def test_the_gold_has_the_memory_to_itself(tmp_path: Path) -> None:
    (tmp_path / "golds.py").write_text(
        "import gc\n"
        "from transformers import PreTrainedModel\n"
        "def models(prompts, completions):\n"
        "    alive = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel)]\n"
        "    return [float(len(alive))] * len(completions)\n"
    )
    settings = ["experiment=debug", "reward=lexicon", "labeller=dataset", "algo.steps=1"]
    settings += ["reward@gold=function", "gold.function=golds:models", "evaluation.gold=after"]
    done = command_line(*settings, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["gold"]["after"]["mean"] == 0.0
    assert summary["gold"]["before"]["mean"] == 0.0


@slow
@pytest.mark.parametrize("algorithm", ["ppo", "quark", "dpo"])
def test_an_interrupted_run_is_evaluated_as_it_stands(
    algorithm: str, artifacts: Path, tmp_path: Path
) -> None:
    """Its newest checkpoint gets the evaluation that the run itself would have made."""
    settings = ["experiment=debug", f"algo={algorithm}", "algo.steps=4", "evaluation.every=1"]
    settings += ["checkpoints.every=1", "checkpoints.keep=9"]
    assert inside(tmp_path / "whole", *settings, f"artifacts={artifacts}") == 0
    copy = rewound(tmp_path / "whole", tmp_path / "cut", 2)
    for step in (2, 3, 4):
        (copy / f"evaluation/step-{step:06d}.json").unlink()
    done = command_line("stages=[evaluate]", f"run={copy}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [p.name for p in sorted((copy / "evaluation").iterdir())]
    assert names == ["step-000000.json", "step-000001.json", "step-000002.json"]
    found, expected = (
        json.loads((d / "evaluation/step-000002.json").read_text())
        for d in (copy, tmp_path / "whole")
    )
    assert found == expected
    assert json.loads((copy / "summary.json").read_text())["step"] == 2
    assert "finished" not in json.loads((copy / "run.json").read_text())


def test_a_finished_run_is_evaluated_again(debug_run: DebugRun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(debug_run.directory, copy)
    (copy / "summary.json").unlink()
    done = command_line("stages=[evaluate]", f"run={copy}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = ((d / "summary.json").read_text() for d in (copy, debug_run.directory))
    assert json.loads(one) == json.loads(other)
    assert "win rate" in done.stdout


def test_best_of_n_asks_its_gold_later_with_the_same_outcome(
    artifacts: Path, tmp_path: Path
) -> None:
    settings = ["experiment=debug", "algo=best_of_n", f"artifacts={artifacts}"]
    assert inside(tmp_path / "during", *settings) == 0
    assert inside(tmp_path / "after", *settings, "evaluation.gold=after") == 0
    for file in sorted((tmp_path / "during/evaluation").iterdir()):
        later = json.loads((tmp_path / "after/evaluation" / file.name).read_text())
        assert later == json.loads(file.read_text())
    first = json.loads((tmp_path / "after/evaluation/step-000001.json").read_text())
    assert first["metrics"]["win/start"] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (["evaluation.gold=later"], ["evaluation.gold", "during"]),
        (
            ["evaluation.gold=after", "checkpoints.best=reward/gold"],
            ["checkpoints.best=reward/gold", "evaluation.gold=during"],
        ),
        (
            ["evaluation.gold=after", "pruning={bounds: {2: 0.5}}"],
            ["pruning.metric=reward/gold", "evaluation.gold=during"],
        ),
        (["stages=[evaluate]"], ["nothing to evaluate yet", "run="]),
        (["stages=[align,evaluate,compare]"], ["against="]),
    ],
)
def test_mistakes(
    settings: list[str], fragments: list[str], refused: Callable[..., str], artifacts: Path
) -> None:
    says(refused("experiment=debug", *settings), *fragments)


@slow
def test_runs_that_cannot_be_evaluated(debug_run: DebugRun, tmp_path: Path) -> None:
    """Each in one sentence, and nothing about the run is changed."""

    def refusal(*arguments: object) -> str:
        done = command_line("stages=[evaluate]", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        return the_error(done.stderr)

    says(refusal(f"run={tmp_path / 'none'}"), "run=", "no run.json")
    says(refusal(f"run={debug_run.directory}", "seed=1"), "settings from the run", "evaluation")
    begun = tmp_path / "begun"
    shutil.copytree(debug_run.directory, begun)
    not_finished(begun)
    for name in ("policy", "checkpoints"):
        shutil.rmtree(begun / name)
    before = (begun / "run.json").read_bytes()
    says(refusal(f"run={begun}"), "no checkpoint", "resume=")
    assert (begun / "run.json").read_bytes() == before
    assert not (begun / "failed.json").exists()
    edited = json.loads(before)
    edited["config"]["seed"] = 5
    (begun / "run.json").write_text(json.dumps(edited))
    says(refusal(f"run={begun}"), "edited", "run=")
