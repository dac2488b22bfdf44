"""A reward that is fitted while the policy improves: what is asked, of whom, and how often."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import inside, rows
from torch import Tensor

from rlhf_exp.algorithms.online_preferences import (
    OnlinePreferences,
    disagreement,
    label_counts,
)
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.labellers import Labeller
from rlhf_exp.rewards import Reward
from rlhf_exp.rewards.refitting import resampled, tuned

pytest_plugins = ["runs_fixtures"]

# ---------------------------------------------------------------------------------------- formulas


def test_members_disagree_where_their_predictions_vary() -> None:
    left = torch.tensor([[0.0, 2.0, 9.0], [0.0, -2.0, 9.0]])
    spread = disagreement(left, torch.zeros(2, 3))
    sure = 1 / (1 + math.exp(-2))
    assert spread.tolist() == pytest.approx([0.0, (sure - 0.5) ** 2, 0.0], abs=1e-6)
    assert torch.equal(disagreement(left, left + 3.0), torch.zeros(3))


@pytest.mark.parametrize("half", [None, 1.0, 5.0])
@pytest.mark.parametrize("times", [0, 1, 7])
def test_all_labels_are_asked_for_and_no_more(times: int, half: float | None) -> None:
    counts = label_counts(100, 0.25, times, half)
    assert sum(counts) == 100
    assert len(counts) == times + 1
    assert counts[0] == (25 if times else 100)
    assert min(counts) >= 0


def test_the_label_rate_anneals_to_half_of_what_it_was() -> None:
    counts = label_counts(10_000, 0.1, 9, 4.0)[1:]
    assert counts == sorted(counts, reverse=True)
    assert counts[4] / counts[0] == pytest.approx(0.5, abs=0.01)
    even = label_counts(1000, 0.1, 9, None)[1:]
    assert max(even) - min(even) <= 1


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_resample_leaves_out_about_one_in_e(bootstrap: bool) -> None:
    drawn, left = resampled(2000, random.Random(0), bootstrap=bootstrap)
    assert set(drawn) | set(left) == set(range(2000))
    assert not set(drawn) & set(left)
    assert len(left) / 2000 == pytest.approx(1 / math.e, abs=0.03)
    assert (len(drawn) == 2000) == bootstrap  # with replacement, as many as there are


def test_a_resample_always_leaves_something_to_judge_by() -> None:
    for seed in range(2000):
        drawn, left = resampled(8, random.Random(seed), bootstrap=True)
        assert len(left) >= 2
        assert len(drawn) == 8


def test_weight_decay_follows_the_ratio_of_the_losses() -> None:
    assert tuned(0.1, 2.0, (1.1, 1.5)) == pytest.approx(0.15)  # it overfits
    assert tuned(0.1, 1.0, (1.1, 1.5)) == pytest.approx(0.1 / 1.5)
    assert tuned(0.1, 1.3, (1.1, 1.5)) == 0.1


# --------------------------------------------------------------------------------------- settings


def ppo(**settings: Any) -> PPO:
    return PPO(**{"steps": 20, "batch": 4, "minibatch": 4, "lr": 1e-3} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner": SFT()}, r"algo\.learner is SFT, .* algo@algo\.learner=ppo"),
        ({"pick": "disagreements"}, r"algo\.pick=disagreements .* did you mean disagreement"),
        ({"first": 0.0}, r"algo\.first=0\.0 must be above 0"),
        ({"labels": 20}, r"algo\.labels=20 with algo\.first=0\.25 begins with 5 labels"),
        ({"buffer": 4}, r"algo\.buffer=4 keeps so many"),
        ({"annealing": 0.0}, r"algo\.annealing=0\.0"),
        ({"loss_band": [1.5, 1.1]}, r"algo\.loss_band=\[1\.5, 1\.1\]"),
        ({"weight_decay": -1.0}, r"algo\.weight_decay=-1\.0"),
        ({"every": 0}, r"algo\.every=0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlinePreferences(**{"learner": ppo()} | settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=lexicon"], r"fits an ensemble of reward models: use reward=ensemble"),
        (["reward=single"], r"algo\.pick=disagreement needs members .* reward\.size to 2"),
        (["reward.member.normalise=none"], r"set reward\.member\.normalise=eval_set"),
        (["labeller=dataset"], r"labeller=dataset knows the data's own pairs only"),
    ],
)
def test_what_cannot_be_fitted_or_asked_ends_the_run_at_once(
    overrides: list[str], message: str, refused: Any
) -> None:
    sentence = refused("experiment=debug", "algo=online_preferences", *overrides)
    assert re.search(message, sentence)


# ------------------------------------------------------------------------------------------ labels


class Letters:
    """A policy that answers with two different letters, or sometimes with one twice."""

    def sample(self, prompts: list[str], n: int) -> SimpleNamespace:
        assert prompts, "a policy is not asked for nothing"
        drawn = torch.randint(5, (len(prompts) * n,)).tolist()
        return SimpleNamespace(completions=["abcde"[i] for i in drawn])


class Alphabet(Labeller):
    """Prefers what comes earlier; knows nothing of e; calls a and b a tie."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        self.asked = list(zip(prompts, left, right, strict=True))
        said = [
            math.nan if "e" in (x, y) else 0.5 if {x, y} == {"a", "b"} else float(x < y)
            for _, x, y in self.asked
        ]
        return torch.tensor(said)


def asking(directory: Path, labels: int = 40, **settings: Any) -> OnlinePreferences:
    """An algorithm that is ready to ask, of members whose scores are known."""
    torch.manual_seed(0)
    given = {"labels": labels, "first": 1.0, "candidates": 30} | settings
    algorithm = OnlinePreferences(learner=ppo(), **given)
    algorithm.policy, algorithm.labeller = Letters(), Alphabet()  # type: ignore[assignment]
    algorithm.data = SimpleNamespace(prompts=["p", "q", "r", "s", "t"])  # type: ignore[assignment]
    told = {"directory": directory, "seed": 0, "evaluator": SimpleNamespace(gold=None)}
    algorithm.trial = SimpleNamespace(**told)  # type: ignore[assignment]
    algorithm.rows, algorithm.unsaid, algorithm.round, algorithm.finished = [], [], 0, False
    return algorithm


def later(algorithm: OnlinePreferences) -> OnlinePreferences:
    """In its second round, of members who disagree about q alone."""
    old = {"prompt": "old", "chosen": "a", "rejected": "b", "probability": 1.0, "round": 0}
    algorithm.round, algorithm.rows = 1, [old] * 8
    algorithm._spread = lambda pairs: torch.tensor(  # type: ignore[method-assign]
        [float(pair[0] == "q") for pair in pairs]
    )
    return algorithm


def test_what_the_labeller_cannot_say_is_dropped_and_counted_and_ties_are_kept(
    tmp_path: Path,
) -> None:
    algorithm = asking(tmp_path)
    found = algorithm._ask(40, random.Random(0))
    unsure = sum("e" in pair for pair in algorithm.labeller.asked)
    assert unsure > 3
    assert found["cannot_say"] == unsure
    assert found["labels"] == len(algorithm.labeller.asked) - unsure
    stored = rows(tmp_path / "labels.jsonl")
    assert stored == algorithm.rows
    assert all(r["chosen"] < r["rejected"] for r in stored if r["probability"] == 1.0)
    ties = [r for r in stored if r["probability"] == 0.5]
    assert ties
    assert all({r["chosen"], r["rejected"]} == {"a", "b"} for r in ties)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Five prompts with ten pairs each: fifty questions, whatever is wanted."""
    algorithm = asking(tmp_path)
    seen: list[Any] = []
    for number in range(3):
        algorithm.round = number
        algorithm._spread = lambda pairs: torch.zeros(len(pairs))  # type: ignore[method-assign]
        algorithm.labeller.asked = []
        algorithm._ask(30, random.Random(number))
        seen += [(p, *sorted(pair)) for p, *pair in algorithm.labeller.asked]
    assert len(seen) == len(set(seen)) == 50


def test_the_pairs_on_which_members_disagree_most_are_asked(tmp_path: Path) -> None:
    algorithm = later(asking(tmp_path))
    found = algorithm._ask(8, random.Random(0))
    assert [pair[0] for pair in algorithm.labeller.asked].count("q") >= 7
    assert found["disagreement"] > found["disagreement_of_candidates"]
    (tmp_path / "uniform").mkdir()
    uniform = later(asking(tmp_path / "uniform", pick="uniform"))
    uniform._ask(8, random.Random(0))
    assert [pair[0] for pair in uniform.labeller.asked].count("q") < 6


def test_what_was_about_to_be_asked_is_asked_after_an_interruption(tmp_path: Path) -> None:
    """Although a policy may not say the same again."""
    first = asking(tmp_path)
    first._ask(20, random.Random(0))
    again = asking(tmp_path)
    torch.manual_seed(1)
    again._ask(20, random.Random(1))
    assert again.labeller.asked == first.labeller.asked
    assert again.rows == first.rows


def test_who_has_finished_is_not_asked_again(tmp_path: Path) -> None:
    class Finishing(Alphabet):
        def finished(self) -> bool:
            return True

    algorithm = later(asking(tmp_path))
    algorithm.labeller = Finishing()
    algorithm._ask(8, random.Random(0))
    assert algorithm.finished
    algorithm.labeller, labels = Alphabet(), len(algorithm.rows)  # of a run that was resumed
    for number in (2, 3):
        algorithm.round = number
        algorithm._ask(8, random.Random(0))
    assert len(algorithm.rows) == labels
    assert algorithm.labeller.asked == []


def test_labels_of_a_run_tell_of_their_labeller(tmp_path: Path) -> None:
    class Telling(Alphabet):
        def report(self) -> dict[str, float]:
            return {"same_position": 0.25}

    class First(Reward):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.tensor([-float(ord(c)) for c in completions])

    algorithm = asking(tmp_path)
    algorithm.labeller, algorithm.trial.evaluator.gold = Telling(), First()
    algorithm._ask(20, random.Random(0))
    told = json.loads((tmp_path / "labels.json").read_text())
    assert told == {"same_position": 0.25, "agreement_with_gold": 1.0}


def test_too_few_answers_are_an_error(tmp_path: Path) -> None:
    algorithm = asking(tmp_path)
    algorithm.data.prompts = ["p"]
    with pytest.raises(ValueError, match=r"only \d labels came of \d+ pairs .* takes 8"):
        algorithm._ask(10, random.Random(0))


# --------------------------------------------------------------------------------------------- run


def test_run_asks_and_refits_as_it_improves(artifacts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ["experiment=debug", "algo=online_preferences", "labeller=noisy", "algo.labels=120"]
    assert inside(run, *asked, f"artifacts={artifacts}") == 0
    labels = rows(run / "labels.jsonl")
    assert [r["round"] for r in labels] == [0] * 60 + [1] * 60
    assert len({(r["prompt"], *sorted((r["chosen"], r["rejected"]))) for r in labels}) == 120
    (told,) = (r for r in rows(run / "metrics.jsonl") if "preferences/labels" in r)
    assert told["preferences/labels"] == 120
    assert told["preferences/disagreement"] > told["preferences/disagreement_of_candidates"]
    fitted = sorted(p for p in (run / "rewards" / "reward").iterdir() if p.is_dir())
    assert len(fitted) == 4  # two members, this round and the one before
    pairs = [rows(p / "train.jsonl") for p in (run / "rewards" / "preferences").iterdir()]
    assert sorted(len(p) for p in pairs) == [60, 60, 120, 120]
    assert (run / "policy" / "model.safetensors").exists()
    about = json.loads((run / "run.json").read_text())
    assert not any("/reward/" in path for path in about["artifacts"])  # none is fitted before
