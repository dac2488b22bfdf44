"""Two runs side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
from stored import stored

from rlhf_exp.report.compare import as_text, compare, write

RISES = np.array([0.0, 1.0, 2.0, 3.0])


def run(folder: Path, gold: float, kl: float, *overrides: str, **more) -> Path:
    """Gold of the four prompts goes to 0, 1, 2, 3 above `gold`, the KL to `kl`."""
    evaluations = [
        {"step": 0, "gold": np.zeros(4), "k1": 0.0, "proxy": 0.0},
        {"step": 2, "gold": gold + RISES, "k1": kl, "proxy": 9.0, "length": 12.0},
    ]
    return stored(folder, overrides, evaluations=evaluations, **more)


def test_two_runs_are_compared_by_prompt(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 1.0, 4.0, "reward=ensemble", "seed=1")
    second = run(tmp_path / "b", 0.5, 8.0, "reward=pairwise", "seed=2", tokens=None)
    found = compare(first, second)
    assert found["settings"] == {"reward": ["ensemble", "pairwise"], "seed": ["1", "2"]}
    assert (found["paired"], found["prompts"]) == (True, [4, 4])
    gold = found["after"]["gold"]
    assert gold["means"] == [2.5, 2.0]
    told = gold["difference"]
    assert (told["mean"], told["low"], told["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (told["scope"], told["seeds"], told["verdict"]) == ("prompts", 1, "higher")
    assert told["win_rate"]["mean"] == 1.0
    assert found["after"]["k1"]["difference"]["verdict"] == "lower"
    equal = {e["kl"]: e["means"] for e in found["equal_kl"]}
    assert equal == {4.0: [2.5, 1.0], 3.0: [1.875, 0.75], 2.0: [1.25, 0.5], 1.0: [0.625, 0.25]}
    assert found["metrics"]["length/mean"] == [12.0, 12.0]
    assert found["cost"] == [
        {"steps": 2, "seconds": 4.0, "tokens": 200},
        {"steps": 2, "seconds": 4.0, "tokens": None},
    ]
    assert "one seed a side" in found["note"]
    assert json.loads(write(tmp_path, found).read_text()) == found


def test_the_terminal_is_told_in_120_columns_that_it_is_one_seed(tmp_path: Path) -> None:
    name = "a_folder_with_a_long_name_" * 6
    first, second = run(tmp_path / name, 1.0, 4.0, "seed=1"), run(tmp_path / "b", 0.5, 8.0)
    lines = as_text(compare(first, second)).splitlines()
    assert max(map(len, lines)) == 120, "the directory's name is cut"
    assert [" ".join(line.split()) for line in lines if line.startswith(("seed ", "gold  "))] == [
        "seed 1 0",
        "gold 2.500 2.000 +0.500 [0.500, 0.500] over 4 prompts of 1 seed: higher",
    ]
    assert "gold is higher than against's for 1.000 [1.000, 1.000] of prompts, ties half" in lines
    assert any(line.startswith("gold at 4.00 nats  2.500    1.000  +1.5") for line in lines)
    assert lines[-1].startswith("one seed a side")


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 1.0, 4.0, "seed=1")
    second = run(tmp_path / "b", 0.5, 8.0, prompts=["w", "x", "y", "z"])
    found = compare(first, second)
    told = found["after"]["gold"]["difference"]
    assert (found["paired"], told["paired"], told["win_rate"]) == (False, False, None)
    assert told["mean"] == 0.5
    assert told["verdict"] == "open", "prompts of either side are drawn by themselves"
    assert "unpaired" in as_text(found)
    assert found["note"].endswith("they were asked other prompts, so that nothing is paired")


def test_runs_that_never_leave_the_start_share_no_kl(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 1.0, 0.0, "seed=1"), run(tmp_path / "b", 0.5, 8.0)
    found = compare(first, second)
    assert found["equal_kl"] == []
    assert "no KL is reached by both" in as_text(found)


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path: Path) -> None:
    whole, partial = run(tmp_path / "a", 1.0, 4.0), run(tmp_path / "b", 1.0, 4.0, "seed=1")
    about = json.loads((partial / "run.json").read_text())
    del about["finished"], about["artifacts"]
    (partial / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"/b is not finished \(partial, 2 of 60 .*resume=/.*/b$"):
        compare(whole, partial)
    with pytest.raises(FileNotFoundError, match=r"against=/nowhere is no directory: give that of"):
        compare(whole, Path("/nowhere"))
    with pytest.raises(ValueError, match=r"/a and against=.*/a are one directory: give two"):
        compare(whole, whole)
    with pytest.raises(ValueError, match=r"/c is the same run as .*/a$"):
        compare(whole, run(tmp_path / "c", 1.0, 4.0))
    (partial / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"/b/run\.json is damaged"):
        compare(whole, partial)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"/none/run\.json is missing"):
        compare(tmp_path / "none", whole)
