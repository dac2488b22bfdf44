"""The study of over-optimization from one command, in small: every arm runs, the report tells what
the files hold, and the same command again does nothing twice.
"""

import csv
import json
from pathlib import Path

import pytest
from runs import command_line, the_error

from rlhf_exp import runs

ARMS = ("best_of_n", "ppo_kl_0", "ppo_kl_0.01", "ppo_kl_0.2", "rest", "quark")
STUDY = ["experiment=overoptimization_debug", "hydra.sweep.dir=study", "hydra.launcher.jobs=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the study was done, from nothing."""
    folder = tmp_path_factory.mktemp("study")
    done = command_line(*STUDY, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "24 finished" in done.stdout
    assert f"report: {folder / 'study/report/report.html'}" in done.stdout
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def gold(directory: str) -> list[float]:
    """Of each evaluation of a run, the mean."""
    files = sorted((Path(directory) / "evaluation").glob("step-*.json"))
    rows = [json.loads(file.read_text())["rows"] for file in files]
    return [sum(row["gold"] for row in found) / len(found) for found in rows]


@pytest.mark.slow
def test_every_arm_ran_with_every_reward_and_seed(folder: Path) -> None:
    jobs = runs.sweep(folder / "study")
    asked = [(job.config["arm"], job.config["reward"]["size"], job.config["seed"]) for job in jobs]
    assert sorted(asked) == sorted((a, size, s) for a in ARMS for size in (1, 5) for s in (0, 1))
    for job in jobs:
        assert job.config["preferences"]["seed"] == job.config["seed"]
        assert job.config["reward"]["member"]["seed"] == job.config["seed"]
    pairs = {json.loads((job.directory / "run.json").read_text())["seed"] for job in jobs}
    assert pairs == {0, 1}
    assert len(list((folder / "artifacts/preferences").iterdir())) == 2, "pairs of each seed"
    assert len(list((folder / "artifacts/reward").iterdir())) == 10, "five members for each"


@pytest.mark.slow
def test_the_report_tells_what_the_files_hold(folder: Path) -> None:
    told = table(folder / "study/report/tables/runs.csv")
    assert len(told) == 24
    for row in told:
        curve = gold(row["directory"])
        assert float(row["final"]) == pytest.approx(curve[-1], abs=1e-9)
    arms = table(folder / "study/report/tables/arms.csv")
    assert len(arms) == 12
    for row in arms:
        same = [r for r in told if f"arm={r['arm']}, reward={r['reward']}" == row["arm"]]
        assert len(same) == 2
        mean = sum(float(r["final"]) for r in same) / 2
        assert float(row["final"]) == pytest.approx(mean, abs=1e-9)
    page = (folder / "study/report/report.html").read_text()
    assert all(f"arm={arm}, reward=uwo" in page for arm in ARMS)


@pytest.mark.slow
def test_the_same_command_and_the_stage_report_do_nothing_again(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (folder / "study").glob("*/run.json")}
    assert len(before) == 24
    tables = {p.name: p.read_bytes() for p in (folder / "study/report/tables").glob("*.csv")}
    again = command_line(*STUDY, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "24 jobs, 24 finished, 0 to do" in again.stdout + again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before

    named = "report.baseline={reward: single}"
    asked = ["stages=[report]", "runs=study/*", named, "hydra.run.dir=seen"]
    seen = command_line(*asked, cwd=folder)
    assert seen.returncode == 0, seen.stderr
    found = {p.name: p.read_bytes() for p in (folder / "seen/report/tables").glob("*.csv")}
    assert found == tables
    assert not (folder / "seen/run.json").exists()


@pytest.mark.slow
def test_two_runs_side_by_side(folder: Path) -> None:
    one, two = (str(folder / "study" / n) for n in ("8", "16"))
    done = command_line(
        "stages=[compare]", f"run={one}", f"against={two}", "hydra.run.dir=compared", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "compared/compare.json").read_text())
    assert found["after"]["gold"]["means"] == pytest.approx([gold(one)[-1], gold(two)[-1]])
    assert "one seed a side" in done.stdout
    for wanted, missing in (
        (["stages=[compare]", f"run={one}"], "against="),
        (["stages=[compare]", f"run={one}", "against=nowhere"], "against=nowhere"),
        (["stages=[report]", "runs=nothing/*"], "runs=nothing/*"),
    ):
        refused = command_line(*wanted, "hydra.run.dir=refused", cwd=folder)
        assert refused.returncode == 1
        assert missing in the_error(refused.stderr)
