"""Format rules, right answers as gold, and hidden states in the files of the reference code."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.probes.npy import read_npy
from rlhf_exp.rewards.answers import Answers
from rlhf_exp.rewards.format import ExactAnswers, Pattern, plain, postprocess

# ------------------------------------------------------------------------------------- format rules


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Yes.", "Yes"),
        ("No\n", "No"),
        (" Yes", " Yes"),
        ("Yes!?\n ", "Yes"),
        ("", ""),
        ("...", ""),
        ("Yes no", "Yes no"),
        ("No\t", "No\t"),
        ("YES", "YES"),
    ],
)
def test_only_the_end_is_postprocessed(text: str, left: str) -> None:
    assert postprocess(text) == left
    assert plain("\n " + text) == left.lstrip()


RESPONSES = ["Yes.", "No", "Maybe", "No\n", "Yes, it does"]
REWARDS = torch.tensor([2.0, -0.5, 0.1, 3.0, -2.0]).sub(torch.tensor([-1.0, 0.5, 0.1, 2.5, 1.0]))
FINAL = [0.952574126822, 0.26894142137, -1.0, 0.622459331202, -1.0]  # of the thesis' reward


@pytest.mark.parametrize("space", ["", " "])
def test_reward_of_the_thesis(space: str) -> None:
    told = [space + text for text in RESPONSES]
    found = ExactAnswers(answers=["Yes", "No"])(REWARDS.sigmoid(), told)
    assert found.tolist() == pytest.approx(FINAL, abs=1e-6)
    found = Pattern(pattern=r" ?(Yes|No)[.\n]?")(REWARDS.sigmoid(), told)
    assert found.tolist() == pytest.approx(FINAL, abs=1e-6)


def test_answers_of_the_data_set_unless_given() -> None:
    scores, told = torch.zeros(4), ["Yes", "Maybe.", "yes", ""]
    rule = ExactAnswers(otherwise=-3.0)
    rule.fill(["Maybe", "Yes."])
    assert rule(scores, told).tolist() == [0.0, 0.0, -3.0, -3.0]
    given = ExactAnswers(answers=["yes"], otherwise=-3.0)
    given.fill(["Maybe", "Yes"])
    assert given(scores, told).tolist() == [-3.0, -3.0, 0.0, -3.0]
    assert (rule.answers, given.answers) == (None, ["yes"]), "settings stay as they were given"


def test_rules_that_allow_nothing() -> None:
    with pytest.raises(ValueError, match=r"no answers to allow: give reward\.format_rule\.answers"):
        ExactAnswers().fill([])
    with pytest.raises(ValueError, match="no answers to allow"):
        ExactAnswers(answers=[])
    with pytest.raises(ValueError, match=r"pattern=\(Yes is not a regular expression"):
        Pattern(pattern="(Yes")


def test_pattern_must_match_the_whole_completion() -> None:
    rule = Pattern(pattern=r"\d+", otherwise=-2.0)
    rule.fill(["Yes"])
    assert rule(torch.ones(4), ["12", "12.", " 12", ""]).tolist() == [1.0, -2.0, -2.0, -2.0]


# ----------------------------------------------------------------------------------- right answers


def of_data(answers: dict[str, str]) -> Any:
    return SimpleNamespace(data=lambda: SimpleNamespace(answers=answers))


def test_right_answers_score_one() -> None:
    reward = Answers()
    reward.fit(of_data({"p": "Yes", "q": " No."}))
    found = reward(["p", "p", "p", "q", "q"], [" Yes.\n", "No", "yes", "No", "Yes no"])
    assert found.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert found.dtype == torch.float32
    with pytest.raises(ValueError, match="no right answer for the prompt 'other'"):
        reward(["p", "other"], ["Yes", "Yes"])
    for refuse in (reward.fit, reward.check):
        with pytest.raises(ValueError, match="needs a data set that knows the right answers"):
            refuse(of_data({}))


# --------------------------------------------------------------------------------------- .npy files

NAME = (
    "{kind}__model_name_T5__parallelize_False__dataset_name_imdb__split_{split}__prompt_idx_0"
    "__batch_size_{batch}__num_examples_4__use_decoder_False__layer_{layer}__all_layers_{all}"
    "__token_idx_-1.npy"
)


def written(folder: Path, split: str = "test", batch: int = 8, **changes: Any) -> dict[str, Any]:
    """Files as generate.py writes them; `changes` replace arrays by kind."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "negative_hidden_states": rng.normal(size=(4, 3, 2)).astype(np.float32),
        "positive_hidden_states": rng.normal(size=(4, 3, 2)).astype(np.float32),
        "labels": np.array([0, 1, 1, 0]),
    } | changes
    every = arrays["negative_hidden_states"].shape[-1] > 1
    for kind, array in arrays.items():
        name = NAME.format(kind=kind, split=split, batch=batch, layer=-1, all=every)
        np.save(folder / name, array)
    return arrays


def test_all_layers(tmp_path: Path) -> None:
    arrays = written(tmp_path)
    written(tmp_path, split="train", labels=np.array([1, 1, 1, 1]))
    states = read_npy(tmp_path, "test")
    assert list(states.hidden) == [0, 1]
    for layer, hidden in states.hidden.items():
        assert (hidden.shape, hidden.dtype) == ((4, 1, 2, 3), torch.float32)
        for side, kind in enumerate(("negative_hidden_states", "positive_hidden_states")):
            expected = torch.from_numpy(arrays[kind][:, :, layer])
            assert torch.equal(hidden[:, 0, side], expected)
    assert states.labels.tolist() == [0, 1, 1, 0]
    assert states.labels.dtype == torch.int64
    assert states.lm is None
    assert states.about["split"] == "test"
    assert read_npy(tmp_path, "train").labels.tolist() == [1, 1, 1, 1]


def test_one_layer_of_t5_in_half_precision(tmp_path: Path) -> None:
    one = np.arange(12, dtype=np.float16).reshape(4, 1, 3, 1)
    written(tmp_path, batch=1, negative_hidden_states=one, positive_hidden_states=-one)
    states = read_npy(tmp_path, "test")
    assert list(states.hidden) == [-1]
    assert states.hidden[-1][2, 0].tolist() == [[6.0, 7.0, 8.0], [-6.0, -7.0, -8.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 2, 0])}, r"labels must be 0 or 1, not \{0, 1, 2\}"),
        ({"labels": np.array([0, 1])}, r"with labels \(2,\) do not belong together"),
        ({"positive_hidden_states": np.ones((4, 2, 2))}, r"\(4, 3, 2\) and \(4, 2, 2\)"),
        ({"negative_hidden_states": np.ones((4, 6))}, r"must be \[n, d, layers\] twice"),
        ({"positive_hidden_states": np.full((4, 3, 2), np.inf)}, "states are not finite"),
        ({"labels": np.array([None] * 4)}, "is not an array of numbers .*allow_pickle"),
        ({"batch": 1}, "with --all_layers and batch size 1"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, changes: Any, message: str) -> None:
    written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_npy(tmp_path, "test")


def test_missing_and_several_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 0 files negative_hidden_states__"):
        read_npy(tmp_path, "test")
    written(tmp_path)
    written(tmp_path, batch=16)
    with pytest.raises(FileNotFoundError, match=r"holds 2 files .*give a folder with one run"):
        read_npy(tmp_path, "test")
