"""What a run's files say has become of it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp import runs
from rlhf_exp.artifacts import fingerprint

CONFIG = {"seed": 0, "objective": "gold", "algo": {"_target_": "x.PPO", "steps": 60}}
LIVE = "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=00\nduration=120.0\n"
JOB = {"id": "123_4", "log": "/logs/123_4.out"}
PRUNED = {"step": 20, "metric": "reward/gold", "value": 0.1234, "bound": 0.5}
LOG = "its log is /logs/123_4.out"


def begun(directory: Path, seed: int = 0, **about: Any) -> Path:
    """A run that was started."""
    config = CONFIG | {"seed": seed}
    directory.mkdir(parents=True, exist_ok=True)
    told = {"fingerprint": runs.config_fingerprint(config), "config": config} | about
    (directory / "run.json").write_text(json.dumps(told))
    (directory / "run.log").touch()
    return directory


def put(directory: Path, **files: Any) -> Path:
    """JSON files by stem."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


# ------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_leaves_out_what_decides_no_outcome() -> None:
    idle = ("artifacts", "tracker", "resume", "show_every", "objective", "pruning", "runs", "sweep")
    idle += ("checkpoints",)
    assert runs.config_fingerprint(CONFIG | dict.fromkeys(idle, "x")) == fingerprint(
        {"seed": 0, "algo": CONFIG["algo"]}
    )
    assert runs.config_fingerprint(CONFIG | {"seed": 1}) != runs.config_fingerprint(CONFIG)
    patient, other = ({"hardware": {"processes": 2, "timeout": t}} for t in (60, 600))
    assert runs.config_fingerprint(patient) == runs.config_fingerprint(other)
    assert runs.config_fingerprint(patient) != runs.config_fingerprint({"hardware": {}})


def test_an_older_run_is_known_by_the_name_it_would_get_now(tmp_path: Path) -> None:
    begun(tmp_path, fingerprint=fingerprint(CONFIG))  # which left objective in
    assert runs.read(tmp_path).fingerprint == runs.config_fingerprint(CONFIG)


# ------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("key", ["finished", "artifacts"])
def test_finished_beats_every_other_sign(tmp_path: Path, key: str) -> None:
    put(begun(tmp_path, **{key: {}}), failed={"error": "x"}, job=JOB, pruned=PRUNED)
    assert runs.read(tmp_path, {"123_4": "RUNNING"}).state == "finished"


def test_a_live_lease_is_a_run_at_work_and_an_old_one_is_not(tmp_path: Path) -> None:
    put(begun(tmp_path), failed={"error": "of an earlier attempt"})
    (tmp_path / ".running").write_text(LIVE)
    assert runs.read(tmp_path).state == "running"
    os.utime(tmp_path / ".running", (0, 0))
    run = runs.read(tmp_path)
    assert (run.state, run.error) == ("failed", "of an earlier attempt")


@pytest.mark.parametrize(
    ("slurm", "state", "error"),
    [
        ("PENDING", "queued", None),
        ("REQUEUE_HOLD", "queued", None),
        ("RUNNING", "running", None),
        ("COMPLETING", "running", None),
        (
            None,
            "failed",
            "SLURM no longer knows job 123_4, which left no result (killed, or out of time?); "
            + LOG,
        ),
        ("TIMEOUT", "failed", f"SLURM ended job 123_4 as TIMEOUT, and it left no result; {LOG}"),
        (
            "CANCELLED by 1000",
            "failed",
            f"SLURM ended job 123_4 as CANCELLED by 1000, and it left no result; {LOG}",
        ),
        (
            "OUT_OF_ME+",
            "failed",
            f"SLURM ended job 123_4 as OUT_OF_ME+, and it left no result; {LOG}",
        ),
    ],
)
def test_what_slurm_says_of_its_job(tmp_path: Path, slurm, state: str, error) -> None:
    put(begun(tmp_path), job=JOB)
    run = runs.read(tmp_path, {"123_4": slurm} if slurm else {"123_5": "RUNNING"})
    assert (run.state, run.error, run.job) == (state, error, "123_4")
    assert runs.read(tmp_path).state == "partial", "SLURM was not asked"
    assert runs.read(begun(tmp_path / "local"), {}).state == "partial", "never was SLURM's"


def test_a_job_that_waits_again_is_queued_whatever_its_last_attempt_left(tmp_path: Path) -> None:
    put(begun(tmp_path), job=JOB, failed={"error": "disk full"})
    assert runs.read(tmp_path, {"123_4": "PENDING"}).state == "queued"
    assert runs.read(tmp_path, {}).error == "disk full", "its own word says more than SLURM's"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"error": "algo.lr=9 is\\n too large", "rank": 0}', "algo.lr=9 is too large"),
        ('{"err', "its failed.json is damaged; run.log may tell why"),
    ],
)
def test_a_failed_run_says_why_in_one_line(tmp_path: Path, content: str, error: str) -> None:
    (begun(tmp_path) / "failed.json").write_text(content)
    run = runs.read(tmp_path)
    assert (run.state, run.error) == ("failed", error)


def test_a_pruned_run_tells_its_bound(tmp_path: Path) -> None:
    run = runs.read(put(begun(tmp_path), pruned=PRUNED))
    told = "given up after step 20: reward/gold was 0.123, the bound 0.5"
    assert (run.state, run.error) == ("pruned", told)


def test_a_partial_run_tells_how_far_it_got(tmp_path: Path) -> None:
    assert runs.read(begun(tmp_path)).step is None
    rows = [{"step": 6, "kl/k1": 1.0}, {"step": 7, "kl/k1": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "kl')  # cut short by a kill
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    run = runs.read(tmp_path)
    assert (run.state, run.step, run.steps, run.checkpoint) == ("partial", 8, 60, 10)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "evaluation/kl/k1": 1.0}\n')
    assert runs.read(tmp_path).step == 8


# --------------------------------------------------------------------------------- damaged, foreign


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "damaged"),
        ('{"fingerprint": ', "damaged"),
        ("[1]", "damaged"),
        ('{"runs": 3}', "edited, or of another program"),
        (json.dumps({"fingerprint": "0" * 12, "config": CONFIG}), "edited, or of another program"),
    ],
)
def test_a_run_json_that_cannot_be_used_is_left_out_and_named(tmp_path, content, what) -> None:
    begun(tmp_path / "1")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "run.json").write_text(content)
    found = runs.find([tmp_path])
    assert [run.directory.name for run in found.values()] == ["1"]
    [sentence] = found.left_out
    assert sentence.startswith(f"{tmp_path}/2/run.json is {what}")


# --------------------------------------------------------------------------------------- many runs


def test_runs_are_found_in_every_layout_and_not_inside_runs(tmp_path: Path) -> None:
    begun(tmp_path / "0", seed=0)
    begun(tmp_path / "0" / "export" / "0", seed=9)
    begun(tmp_path / "2026-01-31" / "12-00-00" / "1", seed=1)
    begun(tmp_path / "2026-01-31" / "12-00-00" / "ppo" / "cpu", seed=2)
    begun(tmp_path / "a" / "b" / "c" / "d" / "e", seed=8)
    found = runs.find([tmp_path, tmp_path / "2026-01-31", tmp_path / "nowhere"])
    assert sorted(run.config["seed"] for run in found.values()) == [0, 1, 2]
    assert found.keys() == {runs.config_fingerprint(CONFIG | {"seed": s}) for s in (0, 1, 2)}
    assert found.left_out == []
    assert list(runs.find([tmp_path / "0"]).values()) == [runs.read(tmp_path / "0")]


def test_of_the_same_run_the_one_that_got_furthest_counts(tmp_path: Path) -> None:
    queue = {"123_4": "PENDING"}
    put(begun(tmp_path / "failed"), failed={"error": "x"})
    put(begun(tmp_path / "queued"), job=JOB)
    put(begun(tmp_path / "pruned"), pruned=PRUNED)
    (begun(tmp_path / "running") / ".running").write_text(LIVE)
    begun(tmp_path / "finished", finished="now")
    begun(tmp_path / "partial")
    (begun(tmp_path / "missing") / "run.log").unlink()
    for state in runs.ORDER:  # take away the best, and the next one counts
        [run] = runs.find([tmp_path], queue).values()
        assert (run.state, run.directory) == (state, tmp_path / state)
        (tmp_path / state / "run.json").unlink()
    assert runs.find([tmp_path], queue) == {}


def test_of_equals_the_newest_counts(tmp_path: Path) -> None:
    for name, age in (("1", 100), ("2", 0), ("3", 200)):
        path = begun(tmp_path / name) / "run.json"
        os.utime(path, (time.time() - age,) * 2)
    [run] = runs.find([tmp_path]).values()
    assert run.directory.name == "2"


# ------------------------------------------------------------------------------------------ sweeps


def test_the_jobs_of_a_sweep_wherever_they_lie(tmp_path: Path) -> None:
    old, new = begun(tmp_path / "old" / "7", finished="now"), tmp_path / "new"
    put(begun(new / "1", seed=1), failed={"error": "x"})
    (new / "2").mkdir()
    (new / "2" / "run.json").mkdir()
    jobs = [
        {"number": n, "overrides": [f"seed={n}"], "directory": str(d), "fingerprint": "f"}
        for n, d in ((3, new / "3"), (1, new / "1"), (0, old), (2, new / "2"))
    ]
    found = runs.sweep(put(new, sweep={"jobs": jobs}))
    assert [(r.number, r.state, r.overrides) for r in found] == [
        (0, "finished", ("seed=0",)),
        (1, "failed", ("seed=1",)),
        (2, "missing", ("seed=2",)),
        (3, "missing", ("seed=3",)),
    ]
    assert [r.error for r in found[1::2]] == ["x", None]
    assert "2/run.json is damaged" in str(found[2].error)


@pytest.mark.parametrize("content", ["", "[]", '{"jobs": [{"number": 0}]}'])
def test_a_damaged_sweep_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no sweep\.json: give the directory"):
        runs.sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/sweep\.json is damaged"):
        runs.sweep(tmp_path)
