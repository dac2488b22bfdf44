"""What a run writes down, and when it speaks up."""

import json
import logging
from pathlib import Path

import pytest
import torch

from rlhf_exp.policy import Rollouts
from rlhf_exp.tracking import HEALTHY, Log, NoTracker

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(logging.getLogger("rlhf_exp"), "propagate", True)
    log = Log(tmp_path, NoTracker(), show_every=2)
    log.begin(0, 4)
    return log


def rollouts() -> Rollouts:
    ids = torch.ones(2, 3, dtype=torch.long)
    ended = torch.tensor([True, True])
    found = Rollouts(["p", "q"], [" a", " b"], ids, ids, torch.ones(2, 2), ended)
    found.scores = torch.tensor([1.0, 2.0])
    found.members = {"member_0": torch.tensor([1.0, 3.0])}
    return found


def record(log: Log, step: int, metrics: dict[str, float]) -> None:
    log.step(step, rollouts(), metrics, {"sample": 1.0, "learn": 1.0})


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_flat_row_with_members_and_speed(log: Log):
    record(log, 0, {"kl/k1": 0.5})
    (row,) = rows(log.directory / "metrics.jsonl")
    assert row["step"] == 0
    assert row["reward/proxy"] == 1.5
    assert row["reward/proxy/member_0"] == 2.0
    assert row["kl/k1"] == 0.5
    assert row["tokens_per_second"] == 2.0  # four response tokens in two seconds


def test_samples_come_every_show_every_steps(log: Log):
    for step in range(3):
        record(log, step, {})
    found = rows(log.directory / "samples.jsonl")
    assert [r["step"] for r in found] == [0, 0, 2, 2]
    assert found[1]["completion"] == " b"
    assert found[1]["members"] == {"member_0": 3.0}


def test_what_lies_beyond_a_resumed_step_is_dropped(log: Log):
    for step in range(3):
        record(log, step, {})
    log.evaluation(2, {"reward/gold": 0.1})
    log.evaluation(3, {"reward/gold": 0.2})
    with (log.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # killed while writing
    log.begin(2, 4)
    kept = rows(log.directory / "metrics.jsonl")
    assert [r["step"] for r in kept] == [0, 1, 2]
    assert kept[-1]["evaluation/reward/gold"] == 0.1


@pytest.mark.parametrize("metric", HEALTHY)
def test_leaving_the_healthy_range_is_said_once(
    log: Log, metric: str, caplog: pytest.LogCaptureFixture
):
    low, high, cure = HEALTHY[metric]
    sick = high + 1 if high < float("inf") else low - 1
    well = low if low > float("-inf") else high
    with caplog.at_level(logging.WARNING):
        record(log, 0, {metric: well})
        assert not caplog.records
        record(log, 1, {metric: sick})
        record(log, 2, {metric: sick})
    (said,) = caplog.records
    assert metric in said.getMessage()
    assert cure in said.getMessage()


def test_readme_documents_every_healthy_range():
    text = README.read_text()
    for metric, (low, high, cure) in HEALTHY.items():
        bound = f"{low:g} to {high:g}" if high < float("inf") else f"at least {low:g}"
        assert f"| `{metric}` | {bound} | {cure} |" in text
