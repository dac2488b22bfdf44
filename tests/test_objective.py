"""What a sweeper optimizes, from hand-written summaries."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.objective import After, Budget, Frontier, Ratio, outcome

ROOT = Path(__file__).parents[1]
NODE = {"_target_": "rlhf_exp.objective.Budget", "reward": "gold", "budget": 5.0, "weight": 0.5}


def summary(folder: Path, **after: float) -> Path:
    """A run directory whose summary says these means."""
    means = {"gold": 2.0, "proxy": 3.0, "kl": 7.0, "length": 11.0} | after
    table: dict[str, Any] = {"step": 60} | {k: {"after": {"mean": v}} for k, v in means.items()}
    (folder / "summary.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (After(metric="gold"), 2.0),
        (After(metric="proxy"), 3.0),
        (After(metric="kl", direction="minimize"), 7.0),
        (After(metric="length"), 11.0),
        (Budget(budget=5.0, weight=0.5), 2.0 - 0.5 * 2.0),
        (Budget(budget=8.0, weight=0.5), 2.0),
        (Budget(reward="proxy", budget=6.0), 3.0 - 1.0),
        (Ratio(budget=7.0), 1.0),
        (Ratio(reward="proxy", budget=3.5), 1.0),
        (Frontier(), [2.0, 7.0]),
        (Frontier(reward="proxy"), [3.0, 7.0]),
    ],
    ids=str,
)
def test_value_of_a_run(objective: Any, value: Any, tmp_path: Path) -> None:
    assert objective.value(summary(tmp_path)) == pytest.approx(value)
    numbers = len(value) if isinstance(value, list) else 1
    assert len(objective.directions) == len(objective.names) == numbers


@pytest.mark.parametrize("reward", [-2.0, -1e-9, 0.0, 2.0])
def test_ratio_rewards_less_kl_and_more_reward_whatever_the_sign(reward: float) -> None:
    def ratio(gold: float, kl: float) -> float:
        return Ratio(budget=4.0).of({"gold": gold, "kl": kl})

    assert ratio(reward, 1.0) >= ratio(reward, 3.0)
    assert ratio(reward + 0.1, 3.0) > ratio(reward, 3.0)
    assert ratio(-2.0, 4.0) == -4.0
    assert ratio(reward, -0.3) == reward  # an estimate below 0 is no KL


def test_directions_and_what_can_be_watched() -> None:
    assert After().directions == ("maximize",)
    assert After(metric="kl", direction="minimize").directions == ("minimize",)
    assert Frontier().directions == ("maximize", "minimize")
    watched = [After(), After(metric="kl"), Budget(reward="proxy"), Ratio(), Frontier()]
    assert [o.watched for o in watched] == [
        "reward/gold", None, "reward/proxy", "reward/gold", None,
    ]  # fmt: skip


def test_outcome_of_a_directory(tmp_path: Path) -> None:
    assert outcome(tmp_path, NODE) is None
    assert outcome(summary(tmp_path), NODE) == 1.0
    found = outcome(summary(tmp_path, gold=float("nan")), NODE)
    assert isinstance(found, float)
    assert math.isnan(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: After(metric="glod"), r"objective\.metric=glod .* did you mean gold"),
        (lambda: After(direction="up"), r"objective\.direction=up .* maximize, minimize"),
        (lambda: Budget(reward="kl"), r"objective\.reward=kl .* gold, proxy"),
        (lambda: Budget(budget=0), r"objective\.budget=0 must be above 0"),
        (lambda: Budget(weight=-1), r"objective\.weight=-1 .* give 0 or more"),
        (lambda: Ratio(budget=-1), r"objective\.budget=-1"),
        (lambda: Frontier(reward="length"), r"objective\.reward=length"),
    ],
)
def test_impossible_objective_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_asking_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf_exp.objective import outcome\n"
        f"assert outcome(Path({str(summary(tmp_path))!r}), {NODE!r}) == 1.0\n"
        "print({'torch', 'numpy', 'optuna', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "set()", done.stderr
