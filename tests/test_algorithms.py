"""What every algorithm owes: it continues bit for bit where it was killed, the files it leaves are
those of any other, and the loop knows none of them by name.
"""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from runs import REPOSITORY, contents, inside, logged, rewound, rows, same_outcome

from rlhf_exp.config import conf_directory
from rlhf_exp.worker import resume

pytest_plugins = ["runs_fixtures"]

ALGORITHMS = sorted(p.stem for p in (conf_directory() / "algo").glob("*.yaml"))
EVERY_STEP = ["checkpoints.every=1", "checkpoints.keep=99", "evaluation.every=1", "show_every=1"]


def total(directory: Path) -> int:
    """Steps of a finished run."""
    return max(
        int(p.name.removeprefix("step-")) for p in (directory / "checkpoints").glob("step-*")
    )


def test_every_algorithm_has_its_small_steps() -> None:
    assert sorted(p.stem for p in (conf_directory() / "quick").glob("*.yaml")) == ALGORITHMS
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        for name in ALGORITHMS:
            full, quick = (
                compose("config", overrides=[f"algo={name}", *more]).algo
                for more in ([], ["experiment=debug"])
            )
            assert full._target_ == quick._target_
            assert full != quick


# Best-of-n keeps its state in the file of completions it draws; test_best_of_n.py kills it.
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "best_of_n"])
def test_killed_and_resumed_bit_for_bit(algorithm: str, artifacts: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    asked = ["experiment=debug", f"algo={algorithm}", *EVERY_STEP, f"artifacts={artifacts}"]
    asked += ["figures=true"]
    assert inside(whole, *asked) == 0
    assert {"policy", "summary.json", "evaluation", "figures"} <= contents(whole)
    table = json.loads((whole / "summary.json").read_text())
    assert table["gold"]["after"]["mean"] == pytest.approx(
        json.loads(max((whole / "evaluation").iterdir()).read_text())["metrics"]["reward/gold"]
    )
    middle = total(whole) // 2
    again = rewound(whole, tmp_path / "again", middle)
    assert logged(lambda: resume(again)) == 0
    same_outcome(again, whole)
    assert len(rows(again / "metrics.jsonl")) == len(rows(whole / "metrics.jsonl"))


def test_the_loop_names_no_algorithm() -> None:
    loop = (REPOSITORY / "rlhf_exp" / "algorithms" / "online.py").read_text().lower()
    for name in [*ALGORITHMS, "conditional", "imitation", "isinstance", "hasattr", "getattr"]:
        assert name not in loop.replace("algorithm", ""), name
