"""Rewards: what `score` refuses, ensembles, sums, functions of the user, pairwise reward models."""

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor

from rlhf_exp.artifacts import Store
from rlhf_exp.data.local import read_jsonl, write_jsonl
from rlhf_exp.rewards import Fitting, Reward, score
from rlhf_exp.rewards.ensemble import Ensemble
from rlhf_exp.rewards.function import Function
from rlhf_exp.rewards.lexicon import Lexicon
from rlhf_exp.rewards.mix import Mix, Part
from rlhf_exp.rewards.pairwise import STATISTICS, Pairwise

VECTORS = Path(__file__).parent / "vectors"
PROMPTS = ["a slow drama :"] * 3
TEXTS = [" the plot was wonderful .", " bad", ""]


@dataclass(kw_only=True)
class Seeded(Reward):
    """A reward whose scores are its table's row `seed`."""

    table: Any = None
    seed: int = 0
    loads: int = 0

    def load(self, device: Any) -> None:
        self.loads += 1

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor(self.table[self.seed])


# ------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0.0]), "gave nan for the completion ' bad'"),
        (torch.tensor([1.0, 2.0, float("inf")]), "gave inf for the completion ''"),
        (torch.tensor([-float("inf"), 2.0, 3.0]), "gave -inf"),
        (torch.tensor([1.0, 2.0]), r"each of 3 completions, not shape \(2,\)"),
        (torch.ones(3, 1), r"not shape \(3, 1\)"),
        (torch.tensor(1.0), r"not shape \(\)"),
        (None, "not NoneType"),
        ([1.0, 2.0, 3.0], "not list"),
        (0.5, "not float"),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "member"])
def test_bad_scores_are_refused_with_the_completion(answer: Any, message: str, inside) -> None:
    reward: Any = lambda prompts, completions: answer  # noqa: E731
    if inside:
        reward = Mix(parts={"mine": Part(reward=reward)})
    name = "reward mine" if inside else "reward"
    with pytest.raises(ValueError, match=rf"{name}.*{message}|mine .*{message}"):
        score(reward, PROMPTS, TEXTS)


def test_scores_come_back_as_float32_of_the_cpu() -> None:
    found = score(lambda p, c: torch.tensor([1, 2, 3], dtype=torch.float64), PROMPTS, TEXTS)
    assert found.objective.dtype == torch.float32
    assert found.objective.tolist() == [1.0, 2.0, 3.0]
    assert found.members == {}


# ----------------------------------------------------------------------------------- ensemble, sum

ENSEMBLES = json.loads((VECTORS / "ensembles.json").read_text())["ensemble_objectives"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "mean"}, ENSEMBLES["population_variance"]["mean"]),
        ({"objective": "wco"}, ENSEMBLES["population_variance"]["WCO"]),
        ({"uwo_weight": 0.5}, ENSEMBLES["population_variance"]["UWO_lambda_0.5"]),
        (
            {"uwo_weight": 0.1, "variance": "unbiased"},
            ENSEMBLES["unbiased_variance"]["UWO_lambda_0.1"],
        ),
        ({"uwo_weight": 0.0}, ENSEMBLES["population_variance"]["mean"]),
    ],
    ids=str,
)
def test_ensemble_combines_its_members_and_shows_them(settings, expected: list[float]) -> None:
    rows = ENSEMBLES["scores"]
    ensemble = Ensemble(member=Seeded(table=rows), size=3, **settings)
    found = score(ensemble, ["p"] * 4, ["a", "b", "c", "d"])
    torch.testing.assert_close(found.objective, torch.tensor(expected), atol=1e-6, rtol=0)
    assert list(found.members) == ["member_0", "member_1", "member_2"]
    for member, row in zip(found.members.values(), rows, strict=True):
        torch.testing.assert_close(member, torch.tensor(row))
    torch.testing.assert_close(ensemble(["p"] * 4, ["a", "b", "c", "d"]), found.objective)


def test_members_differ_by_seed_only_and_all_are_loaded() -> None:
    ensemble = Ensemble(member=Seeded(table="shared", seed=4), size=3)
    ensemble.load("cpu")
    assert [m.seed for m in ensemble.members.values()] == [4, 5, 6]
    assert {m.table for m in ensemble.members.values()} == {"shared"}
    assert [m.loads for m in ensemble.members.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"reward\.size=0"),
        ({"objective": "min"}, r"reward\.objective=min .* mean, wco, uwo"),
        ({"objective": "mean", "variance": "sample"}, r"reward\.variance=sample"),
        ({"member": Lexicon()}, r"reward\.member=Lexicon has no seed .* reward=mix"),
    ],
    ids=str,
)
def test_impossible_ensembles_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble(**({"member": Seeded()} | settings))


@pytest.mark.parametrize(
    ("objective", "normalise", "warns"),
    [
        ("wco", "none", True),
        ("uwo", "none", True),
        ("mean", "none", False),
        ("wco", "eval_set", False),
    ],
)
def test_ensemble_of_arbitrary_offsets_is_warned_of(
    objective: str, normalise: str, warns: bool, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf_exp"), "propagate", True)
    Ensemble(member=Pairwise(normalise=normalise), size=2, objective=objective)
    assert ("a scale of their own" in caplog.text) == warns


def test_mix_is_the_weighted_sum_and_shows_its_parts() -> None:
    parts = {
        "a": Part(reward=Seeded(table=[[1.0, 2.0, 3.0]]), weight=2.0),
        "b": Part(reward=Seeded(table=[[1.0, 0.0, -1.0]]), weight=-0.5),
    }
    found = score(Mix(parts=parts), PROMPTS, TEXTS)
    assert found.objective.tolist() == [1.5, 4.0, 6.5]
    assert {k: v.tolist() for k, v in found.members.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [1.0, 0.0, -1.0],
    }


def test_mix_may_hold_an_ensemble() -> None:
    ensemble = Ensemble(member=Seeded(table=[[0.0], [2.0]]), size=2, objective="wco")
    mix = Mix(
        parts={"e": Part(reward=ensemble, weight=3.0), "s": Part(reward=Seeded(table=[[1.0]]))}
    )
    assert score(mix, ["p"], ["c"]).objective.tolist() == [1.0]
    assert not mix.learns_from_pairs
    assert Mix(parts={"p": Part(reward=Pairwise())}).learns_from_pairs


def test_mix_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.parts is empty"):
        Mix(parts={})


# ------------------------------------------------------------------------------ functions, lexicon


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user into the working directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        name = f"user_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def scored_by(name: str) -> list[float]:
    """Scores of a function of the user."""
    reward = Function(function=name)
    reward.load("cpu")
    return score(reward, PROMPTS, TEXTS).objective.tolist()


@pytest.mark.parametrize(
    "body",
    [
        "return [float(len(c)) for c in completions]",
        "import torch; return torch.tensor([len(c) for c in completions])",
        "import numpy; return numpy.array([len(c) for c in completions])",
    ],
)
def test_function_of_the_user_scores(user_module, body: str) -> None:
    name = user_module(f"def f(prompts, completions):\n    {body}\n")
    assert scored_by(f"{name}:f") == [float(len(t)) for t in TEXTS]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "None.*one number per completion"),
        ("return [1.0, None, 2.0]", "None.*one number per completion"),
        ("return [1.0]", r"each of 3 completions, not shape \(1,\)"),
        ("return 3.0", "one (number per|score for each of 3) completion"),
        ("return ['good', 'bad', 'ugly']", "one number per completion"),
        ("return [1.0, float('nan'), 2.0]", "gave nan for the completion ' bad'"),
        ("return {c: 1.0 for c in completions}", "one number per completion"),
        ("raise KeyError('lost')", r"user_.*py\) raised KeyError: 'lost'"),
        ("return 1 / 0", r"user_.*py\) raised ZeroDivisionError"),
    ],
)
def test_function_that_misbehaves_is_named(user_module, body: str, message: str) -> None:
    name = user_module(f"def f(prompts, completions):\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        scored_by(f"{name}:f")


def test_callable_object_that_raises_is_named(user_module) -> None:
    name = user_module(
        "class F:\n"
        "    def __call__(self, prompts, completions):\n"
        "        raise KeyError('lost')\n"
        "f = F()\n"
    )
    with pytest.raises(ValueError, match=rf"reward\.function={name}:f .*raised KeyError"):
        scored_by(f"{name}:f")


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("x = 1\n", "g", "cannot be imported .*check module and name"),
        ("x = 1\n", "x", "is not a function"),
        ("import no_such_module\n", "f", "cannot be imported .*no_such_module"),
        ("def f(:\n", "f", "cannot be imported"),
        ("1 / 0\n", "f", "cannot be imported .*division"),
    ],
)
def test_function_that_cannot_be_found_fails_before_training(
    user_module, source: str, attribute: str, message: str
) -> None:
    reward = Function(function=f"{user_module(source)}:{attribute}")
    with pytest.raises(ValueError, match=message):
        Mix(parts={"mine": Part(reward=reward)}).check(fitting(Store(Path())))


@pytest.mark.parametrize("path", ["/nowhere/model", "no-such/model"])
def test_missing_reward_model_fails_before_training(path: str) -> None:
    for reward in (Pairwise(path=path), Ensemble(member=Pairwise(path=path), size=2)):
        with pytest.raises(FileNotFoundError, match=path):
            reward.check(fitting(Store(Path())))


@pytest.mark.parametrize("name", ["politeness", ":f", "module:"])
def test_function_needs_module_and_name(name: str) -> None:
    with pytest.raises(ValueError, match="module:function"):
        Function(function=name)


def test_lexicon_orders_sentiment_and_ignores_the_prompt() -> None:
    reward = Lexicon()
    reward.load("cpu")
    texts = ["I love it, wonderful!", "I like it.", "It is a table.", "I hate it, awful.", ""]
    scores = score(reward, ["great"] * 5, texts).objective
    good, fair, neutral, bad, empty = scores.tolist()
    assert 1 >= good > fair > neutral == empty == 0 > bad >= -1
    assert torch.equal(scores, score(reward, ["awful"] * 5, texts).objective)


# ---------------------------------------------------------------------------------------- pairwise

MANY = [
    (p, c)
    for p in ("a slow drama about a sailor :", "x", "")
    for c in (
        " the plot was wonderful .",
        " bad",
        "",
        " it was not very good , i did hate the music .",
    )
]


@pytest.fixture(scope="module")
def classifier(tiny_base, tmp_path_factory) -> Callable[..., Path]:
    """Saves a randomly initialised classifier with so many labels; gives its folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    def make(labels: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tiny_base(), num_labels=labels)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_base()).save_pretrained(folder)
        return folder

    return make


def ready(folder: Path, **settings: Any) -> Pairwise:
    """The reward model in `folder` as it is."""
    reward = Pairwise(path=str(folder), train=False, normalise="none", max_length=60, **settings)
    reward.load("cpu")
    return reward


def split(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Prompts and completions."""
    return [p for p, _ in pairs], [c for _, c in pairs]


def test_pairwise_scores_are_those_of_the_unpadded_model(classifier) -> None:
    reward = ready(classifier())
    found = score(reward, *split(MANY)).objective
    for (prompt, completion), value in zip(MANY, found, strict=True):
        ids = reward.tokenizer(prompt + completion + reward.tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            expected = reward.model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    assert float(found.std()) > 0.1, "scores so flat that a wrong position would not show"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [1, 50, 16_384])
def test_pairwise_scores_do_not_depend_on_padding_or_batch(classifier, side, budget: int) -> None:
    folder = classifier()
    expected = ready(folder)(*split(MANY))
    reward = ready(folder, token_budget=budget)
    reward.tokenizer.padding_side = side
    torch.testing.assert_close(reward(*split(MANY)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(*split(MANY[::-1])), expected.flip(0), atol=1e-5, rtol=0)
    one_by_one = torch.cat([reward([p], [c]) for p, c in MANY])
    torch.testing.assert_close(one_by_one, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 50, 100])
def test_pairwise_keeps_to_its_token_budget(classifier, budget: int) -> None:
    reward = ready(classifier(), token_budget=budget)
    shapes: list[tuple[int, int]] = []
    forward = reward._forward

    def watched(ids: Tensor, mask: Tensor) -> Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return forward(ids, mask)

    reward._forward = watched  # type: ignore[method-assign]
    reward(*split(MANY))
    assert sum(rows for rows, _ in shapes) == len(MANY)
    assert all(rows == 1 or rows * length <= budget for rows, length in shapes)


def test_pairwise_cuts_long_texts_on_the_left(classifier) -> None:
    reward = ready(classifier())
    end = " the plot was wonderful ." * 8
    assert len(reward.tokenizer(end)["input_ids"]) > 60
    first, second, other = reward(
        ["drama", "a satire about a thief", "drama"], [end, end, end + " x"]
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("labels", [2, 3])
def test_classifier_with_several_labels_is_no_reward_model(classifier, labels: int) -> None:
    with pytest.raises(ValueError, match=rf"has {labels} labels; a reward model has exactly one"):
        ready(classifier(labels))


def test_pairwise_before_fitting_says_what_to_run() -> None:
    with pytest.raises(ValueError, match="run the stages preferences and reward first"):
        Pairwise().load("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "zscore"}, r"reward\.normalise=zscore .*none, eval_set, policy_samples"),
        ({"train": False}, r"give reward\.path"),
        ({"batch": 30, "micro_batch": 20}, r"reward\.batch=30 must be a multiple"),
    ],
    ids=str,
)
def test_impossible_pairwise_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pairwise(**settings)


def test_what_learns_from_pairs() -> None:
    assert Pairwise().learns_from_pairs
    assert Pairwise(path="x", train=False).learns_from_pairs, "statistics over the evaluation pairs"
    assert not Pairwise(path="x", train=False, normalise="none").learns_from_pairs
    assert not Pairwise(path="x", train=False, normalise="policy_samples").learns_from_pairs
    assert Ensemble(member=Pairwise(), size=2).learns_from_pairs


def fitting(
    store: Store,
    pairs: Path | None = None,
    samples: Any = None,
    policy: Any = None,
    data: Any = None,
) -> Fitting:
    """What the reward stage hands over; what is not given must not be asked for."""

    def give(value: Any, name: str) -> Callable[[], Any]:
        def asked() -> Any:
            assert value is not None, f"{name} was asked for without need"
            return value

        return asked

    return Fitting(
        store=store,
        data=give(data, "data"),
        trained=tiny_policy(),
        pairs=give(pairs, "pairs"),
        samples=give(samples, "samples"),
        policy=give(policy, "policy"),
        device="cpu",
    )


def with_raw_scores(reward: Pairwise, table: dict[str, float], monkeypatch) -> None:
    """Let the model of `reward` give the numbers of `table` by completion."""

    def forward(self: Pairwise, ids: Tensor, mask: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return torch.tensor([table[text] for text in texts])

    monkeypatch.setattr(Pairwise, "_forward", forward)


@pytest.mark.parametrize("member", [0, 1, 2])
def test_stored_statistics_standardise_as_the_paper_does(
    classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: int
) -> None:
    vector = ENSEMBLES["normalised"]
    table = dict(zip("abcd", ENSEMBLES["scores"][member], strict=True))
    reward = Pairwise(path=str(classifier()), train=False, normalise="policy_samples")
    with_raw_scores(reward, table, monkeypatch)
    reward.fit(fitting(Store(tmp_path), samples=[("", c) for c in table], policy="start"))
    assert isinstance(reward.folder, Path)
    statistics = json.loads((reward.folder / STATISTICS).read_text())
    assert statistics["mean"] == pytest.approx(vector["rm_mean"][member], abs=1e-6)
    assert statistics["std"] == pytest.approx(vector["rm_std_unbiased"][member], abs=1e-6)
    assert (statistics["n"], statistics["ddof"], statistics["over"]) == (4, 1, "policy_samples")
    reward.load("cpu")
    found = reward([""] * 4, list(table))
    torch.testing.assert_close(found, torch.tensor(vector["z"][member]), atol=1e-6, rtol=0)


def test_normalisation_of_new_scores(classifier, tmp_path: Path, monkeypatch) -> None:
    """The vector divides by the population deviation, ours is unbiased: sqrt((n - 1) / n) apart."""
    vector = json.loads((VECTORS / "ppo.json").read_text())["reward_normalisation"]
    reference, new = vector["inputs"]["reference_scores"], vector["inputs"]["new_scores"]
    table = dict(zip("abcdef", [*reference, *new], strict=True))
    reward = Pairwise(path=str(classifier()), train=False, normalise="policy_samples")
    with_raw_scores(reward, table, monkeypatch)
    reward.fit(fitting(Store(tmp_path), samples=[("", c) for c in "abcd"], policy="start"))
    reward.load("cpu")
    found = reward(["", ""], ["e", "f"])
    shifted = torch.tensor(vector["expected"]["shift_only"])
    torch.testing.assert_close(found * reward.std, shifted, atol=1e-6, rtol=0)
    scaled = torch.tensor(vector["expected"]["shift_scale"]) * (3 / 4) ** 0.5
    torch.testing.assert_close(found, scaled, atol=1e-6, rtol=0)


def test_statistics_over_other_samples_are_another_artifact(
    classifier, tmp_path, monkeypatch
) -> None:
    """Lower policy.temperature, or other prompts, and the same start policy gives other samples."""
    reward = Pairwise(path=str(classifier()), train=False, normalise="policy_samples")
    with_raw_scores(reward, {"a": 1.0, "b": 2.0, "c": 5.0}, monkeypatch)
    folders = []
    for samples in ("ab", "ab", "bc"):
        reward.fit(fitting(Store(tmp_path), samples=[("", c) for c in samples], policy="start"))
        folders.append(reward.folder)
    assert folders[0] == folders[1]
    assert folders[0] != folders[2]


def test_model_that_gives_one_score_to_all_is_refused(classifier, tmp_path, monkeypatch) -> None:
    reward = Pairwise(path=str(classifier()), train=False, normalise="policy_samples")
    with_raw_scores(reward, {"a": 1.0, "b": 1.0}, monkeypatch)
    with pytest.raises(ValueError, match="gives all 2 calibration texts one score"):
        reward.fit(fitting(Store(tmp_path), samples=[("", "a"), ("", "b")], policy="start"))
    assert [p for p in (tmp_path / "reward").iterdir() if p.suffix != ".lock"] == []


def test_used_as_it_is_nothing_is_asked_for(classifier, tmp_path: Path) -> None:
    folder = classifier()
    reward = Pairwise(path=str(folder), train=False, normalise="none")
    reward.fit(fitting(Store(tmp_path)))
    reward.load("cpu")
    assert torch.equal(reward(*split(MANY)), ready(folder)(*split(MANY)))
    assert list(tmp_path.iterdir()) == []


def preference_pairs(folder: Path) -> Path:
    """Pairs that differ in one word, which a tiny model can learn."""
    folder.mkdir()
    films = ["drama", "comedy", "satire", "musical"]
    rows = [
        {
            "prompt": f"a {a} {b} :",
            "chosen": f" the {c} was wonderful .",
            "rejected": f" the {c} was awful .",
        }
        for a in ("slow", "loud", "quiet", "dark")
        for b in films
        for c in ("plot", "music", "cast", "camera")
    ]
    write_jsonl(folder / "train.jsonl", rows[:48])
    write_jsonl(folder / "evaluation.jsonl", rows[48:])
    return folder


@pytest.mark.slow
def test_fitted_reward_model_learns_and_applies_its_statistics(tiny_base, tmp_path: Path) -> None:
    pairs = preference_pairs(tmp_path / "pairs")
    store = Store(tmp_path / "artifacts")
    settings = {"epochs": 8, "lr": 3e-3, "batch": 16, "micro_batch": 8, "max_length": 60}
    first, again, other = (Pairwise(seed=seed, **settings) for seed in (0, 0, 1))
    first.fit(fitting(store, pairs=pairs, policy=tiny_base()))
    folder = first.folder
    assert isinstance(folder, Path)

    report = json.loads((folder / "report.json").read_text())
    assert report["accuracy"] >= 0.9
    assert (report["pairs_kept"], report["pairs_total"], report["evaluation_pairs"]) == (48, 48, 16)
    assert not (folder / "trainer").exists()

    first.load("cpu")
    rows = [json.loads(line) for line in (pairs / "evaluation.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    better, worse = (first(prompts, [row[k] for row in rows]) for k in ("chosen", "rejected"))
    assert float((better > worse).float().mean()) == pytest.approx(report["accuracy"])
    both = torch.cat([better, worse])
    assert float(both.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(both.std()) == pytest.approx(1.0, abs=1e-4)
    statistics = json.loads((folder / STATISTICS).read_text())
    assert (statistics["n"], statistics["ddof"], statistics["over"]) == (32, 1, "eval_set")
    assert abs(statistics["std"] - 1) > 1e-3, "raw scores standardised already: nothing is shown"

    again.fit(fitting(store, pairs=pairs, policy=tiny_base()))
    assert again.folder == folder, "reused"
    assert store.used[str(folder)] == "reused"
    other.fit(fitting(store, pairs=pairs, policy=tiny_base()))
    assert other.folder != folder
    other.load("cpu")
    assert not torch.allclose(other(prompts, [row["chosen"] for row in rows]), better)

    renewed = Pairwise(seed=0, **settings)
    renewed.fit(fitting(Store(tmp_path / "elsewhere"), pairs=pairs, policy=tiny_base()))
    renewed.load("cpu")
    assert torch.equal(renewed(prompts, [row["chosen"] for row in rows]), better), (
        "same seed, same model"
    )


def margin(reward: Pairwise, pairs: Path, room: Fitting) -> float:
    """Mean of what the fitted reward model gives the better text more, in log-odds."""
    reward.fit(room)
    reward.load("cpu")
    rows = read_jsonl(pairs / "train.jsonl")
    prompts = [row["prompt"] for row in rows]
    better, worse = (reward(prompts, [row[k] for row in rows]) for k in ("chosen", "rejected"))
    return float((better - worse).mean()) * reward.std


@pytest.mark.slow
def test_soft_labels_and_smoothing_are_what_a_reward_model_learns(
    tiny_base, tmp_path: Path
) -> None:
    """TRL's trainer knows of neither."""
    certain = preference_pairs(tmp_path / "certain")
    soft = tmp_path / "soft"
    soft.mkdir()
    for name in ("train", "evaluation"):
        rows = read_jsonl(certain / f"{name}.jsonl")
        write_jsonl(soft / f"{name}.jsonl", [row | {"probability": 0.75} for row in rows])
    found = {}
    for pairs, smoothing in ((certain, 0.0), (soft, 0.0), (certain, 0.25)):
        reward = Pairwise(
            epochs=8, lr=3e-3, batch=16, micro_batch=16, max_length=60, label_smoothing=smoothing
        )
        room = fitting(Store(tmp_path / "artifacts"), pairs=pairs, policy=tiny_base())
        found[pairs.name, smoothing] = margin(reward, pairs, room)
    assert found["soft", 0.0] == pytest.approx(math.log(3), abs=0.4), "the odds of 0.75"
    assert found["certain", 0.0] > 2 * found["soft", 0.0]
    assert found["certain", 0.25] == found["soft", 0.0], "the same labels, said in another way"


@pytest.mark.slow
def test_reward_model_with_adapter_is_saved_whole(tiny_base, tmp_path: Path) -> None:
    lora = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "fan_in_fan_out": True}
    reward = Pairwise(epochs=8, lr=1e-2, batch=16, micro_batch=16, max_length=60, lora=lora)
    pairs = preference_pairs(tmp_path / "pairs")
    reward.fit(fitting(Store(tmp_path / "artifacts"), pairs=pairs, policy=tiny_base()))
    assert isinstance(reward.folder, Path)
    report = json.loads((reward.folder / "report.json").read_text())
    assert report["accuracy"] >= 0.9
    assert (reward.folder / "model.safetensors").exists()
    assert not list(reward.folder.glob("adapter*"))


@pytest.mark.slow
def test_pairs_that_do_not_fit_are_counted_or_refused(tiny_base, tmp_path: Path) -> None:
    pairs = preference_pairs(tmp_path / "pairs")
    store = Store(tmp_path / "artifacts")
    reward = Pairwise(epochs=0.1, batch=8, micro_batch=8, max_length=3)
    with pytest.raises(ValueError, match=r"none of 48 preference pairs fits reward\.max_length=3"):
        reward.fit(fitting(store, pairs=pairs, policy=tiny_base()))
    assert [p for p in (store.root / "reward").iterdir() if p.suffix != ".lock"] == []
