"""Giving up: verdicts and median bounds by hand, and a toy that loses hope."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from omegaconf import OmegaConf

from rlhf_exp.algorithms.online import Online
from rlhf_exp.config import Root, check_fields
from rlhf_exp.evaluation.scoring import Evaluation
from rlhf_exp.evaluation.summary import read_evaluations
from rlhf_exp.policy import Rollouts
from rlhf_exp.pruning import Pruned, Pruning, best_so_far, gave_up, give_up, reported
from rlhf_exp.search.median import MedianStopping

pytest_plugins = ["lab_fixtures"]


def evaluated(folder: Path, metric: str = "reward/gold", **values: float) -> Path:
    """A run directory with evaluations: step_4=0.3."""
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        step = int(name.removeprefix("step_"))
        told = {"step": step, "metrics": {metric: value}}
        (folder / "evaluation" / f"step-{step:06d}.json").write_text(json.dumps(told))
    return folder


# ---- verdicts


def test_best_so_far_goes_one_way() -> None:
    values = {4: 0.1, 0: 0.2, 2: 0.5}
    assert best_so_far(values, maximize=True) == {0: 0.2, 2: 0.5, 4: 0.5}
    assert best_so_far(values, maximize=False) == {0: 0.2, 2: 0.2, 4: 0.1}


@pytest.mark.parametrize(
    ("settings", "step", "value"),
    [
        ({"bounds": {2: 0.5}}, 2, 0.4),
        ({"bounds": {2: 0.4}}, 2, None),  # reached is not below
        ({"bounds": {2: 0.5}}, 0, None),  # no bound yet
        ({"bounds": {2: 0.5}}, 4, 0.4),  # a bound holds on
        ({"bounds": {2: 0.1, 3: 0.5}}, 4, 0.4),  # until the next
        ({"bounds": {2: 0.9, 4: 0.1}}, 4, None),
        ({"bounds": {2: 0.5}, "from_step": 3}, 2, None),
        ({"bounds": {2: 0.5}, "from_step": 3}, 4, 0.4),
        ({"bounds": {4: 0.0}, "maximize": False}, 4, 0.2),
        ({"bounds": {4: 0.2}, "maximize": False}, 4, None),
    ],
)
def test_verdict(settings: dict[str, Any], step: int, value: float | None, tmp_path: Path) -> None:
    run = evaluated(tmp_path, step_0=0.3, step_2=0.4, step_4=0.2, step_6=0.9)  # 6 was undone
    found = Pruning(**settings).verdict(step, run)
    assert (found and found.value) == value
    assert found is None or (found.step, found.metric) == (step, "reward/gold")


def test_a_run_that_gave_up_is_not_judged_again(tmp_path: Path) -> None:
    run, rule = evaluated(tmp_path, step_2=0.4), Pruning(bounds={2: 0.5})
    verdict = rule.verdict(2, run)
    assert verdict is not None
    give_up(verdict, run)
    assert json.loads((run / "pruned.json").read_text()) == {
        "step": 2, "value": 0.4, "bound": 0.5, "metric": "reward/gold",
    }  # fmt: skip
    assert gave_up(run)
    assert rule.verdict(2, run) is None
    (run / "summary.json").write_text("{}")
    assert not gave_up(run)  # somebody made it go on


def test_bounds_survive_json_and_config() -> None:
    told = json.loads(json.dumps({"bounds": {20: 0.5}}))
    assert Pruning(**told).bounds == {20: 0.5}
    check_fields(OmegaConf.create({"pruning": {"bounds": {20: 0.5}}}), Root, "")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"bound": {20: 0.5}}, r"^pruning\.bound: .*'bound'"),
        ({"bounds": {20: "high"}}, r"^pruning\.bounds\.20: .*'high'"),
        ({"from_step": 1.5}, r"^pruning\.from_step: .*1\.5"),
    ],
)
def test_wrong_settings_are_named(node: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fields(OmegaConf.create({"pruning": node}), Root, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"pruning\.bounds={} names no step: give pruning="),
        ({"bounds": {1: 0.0}, "metric": "reward/glod"}, r"did you mean reward/gold"),
    ],
)
def test_impossible_pruning_is_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(**settings)


# ---- bounds from finished runs

RUNS = [
    {0: 0.0, 2: 0.4, 4: 0.3},  # best so far 0.0 0.4 0.4
    {0: 0.1, 2: 0.0, 4: 0.6},  # 0.1 0.1 0.6
    {0: 0.0, 2: 0.2, 4: 0.1},  # 0.0 0.2 0.2
    {0: 0.0, 3: 0.9},  # 0.0 - -: it counts at 2 with 0.0, and not at 4
]


@pytest.mark.parametrize(
    ("rule", "maximize", "expected"),
    [
        ({"startup": 3}, True, {0: 0.0, 2: 0.15, 3: 0.3, 4: 0.4}),
        ({"startup": 4}, True, {0: 0.0, 2: 0.15, 3: 0.3}),
        ({"startup": 5}, True, {}),
        ({"startup": 3, "from_step": 3}, True, {3: 0.3, 4: 0.4}),
        ({"startup": 3, "percentile": 25}, True, {0: 0.0, 2: 0.075, 3: 0.175, 4: 0.3}),
        ({"startup": 3, "percentile": 25}, False, {0: 0.025, 2: 0.0, 3: 0.0, 4: 0.0}),
    ],
)
def test_median_bounds(rule: Any, maximize: bool, expected: dict[int, float]) -> None:
    assert MedianStopping(**rule).bounds(RUNS, maximize=maximize) == pytest.approx(expected)


@pytest.mark.parametrize("rule", [{"startup": 0}, {"percentile": 100.0}, {"from_step": -1}])
def test_impossible_rule_is_named(rule: Any) -> None:
    with pytest.raises(ValueError, match=rf"{min(rule)}={next(iter(rule.values()))}"):
        MedianStopping(**rule)


# ---- a run


class Idle(Online):
    """Learns nothing, so that its evaluations stay what they are."""

    def setup(self, *_: Any) -> None:
        """Nothing to set up."""

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def test_a_hopeless_run_saves_tells_and_ends_and_can_be_made_to_go_on(
    base: Path, tmp_path: Path
) -> None:
    def start() -> Any:
        made = Lab(base, tmp_path / "run")
        made.trial.evaluator.settings = Evaluation(every=2, prompts=4)
        made.trial.pruning = Pruning(bounds={0: -1.0, 3: 1000.0})
        return made

    with pytest.raises(
        Pruned, match=r"gave up after step 4: .* asks for 1000\.000.*resume="
    ) as end:
        start().run(Idle(steps=8, batch=2))
    assert end.value.exit_code == 3
    run = tmp_path / "run"
    told = json.loads((run / "pruned.json").read_text())
    assert told["value"] == max(reported(run, "reward/gold").values())
    assert (told["step"], told["bound"], told["metric"]) == (4, 1000.0, "reward/gold")
    assert [e["step"] for e in read_evaluations(run)] == [0, 2, 4]
    assert (run / "checkpoints" / "step-000004" / "state.pt").exists()

    again = start()
    assert len(again.run(Idle(steps=8, batch=2))) == 8
    assert [e["step"] for e in read_evaluations(run)] == [0, 2, 4, 6, 8]
