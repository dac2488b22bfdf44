"""Stored runs as arrays, and every directory that is no usable run named with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import configured, stored

from rlhf_exp import runs
from rlhf_exp.report import records

EVALUATIONS = [
    {"step": 0, "gold": [0.0, 1.0, 2.0], "k1": 0.0},
    {"step": 4, "gold": [3.0, 4.0, 8.0], "k1": [1.0, 2.0, 3.0], "proxy": 7.0, "ended": [1, 0, 0]},
]


def one(folder: Path, *overrides: str, **more: Any) -> Path:
    return stored(folder, overrides, **({"evaluations": EVALUATIONS} | more))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only(*patterns: object) -> records.Record:
    found, left_out = records.read([str(pattern) for pattern in patterns])
    assert left_out == []
    [record] = found
    return record


# ------------------------------------------------------------------------------------ what is read


def test_a_record_holds_what_the_files_hold(tmp_path: Path) -> None:
    record = only(one(tmp_path / "run", "seed=3"))
    assert (record.seed, record.arm, record.settings) == ("3", "all runs", {})
    assert record.prompts == ("prompt 0", "prompt 1", "prompt 2")
    assert [evaluated.step for evaluated in record.evaluations] == [0, 4]
    assert record.last.values["gold"].tolist() == [3.0, 4.0, 8.0]
    assert record.last.values["ended"].tolist() == [1.0, 0.0, 0.0]
    assert "completion" not in record.last.values, "no number"
    assert record.last.metrics["reward/gold"] == record.last.mean("gold") == 5.0
    assert record.curve("k1").tolist() == [0.0, 2.0]
    assert record.table("proxy").tolist() == [[0.0, 1.0, 2.0], [7.0, 7.0, 7.0]]
    assert (record.tokens, record.seconds) == (400, 8.0), "four steps"
    assert record.summary["gold"]["after"]["mean"] == 5.0
    assert (record.about["seed"], "config" in record.about) == (3, False)
    assert record.first_rows[1]["completion"] == "prompt 1 at 0"
    assert record.last_rows[2]["gold"] == 8.0
    assert not record.nominal


def test_completions_of_a_prompt_are_averaged_wherever_they_stand(tmp_path: Path) -> None:
    run = one(tmp_path, samples=2, evaluations=[{"step": 0, "gold": [1.0, 2, 3, 5], "k1": 0.0}])
    path = run / "evaluation" / "step-000000.json"
    rows = json.loads(path.read_text())["rows"]
    edited(path, rows=[rows[i] for i in (2, 0, 3, 1)])
    record = only(run)
    assert record.prompts == ("prompt 1", "prompt 0")
    assert record.last.values["gold"].tolist() == [4.0, 1.5]


def test_what_is_new_or_missing_in_a_file_is_no_obstacle(tmp_path: Path) -> None:
    evaluations = [EVALUATIONS[0] | {"win": [0.5, 1, 0], "proxy/a": 1.0}]
    run = one(tmp_path, "algo=best_of_n", evaluations=evaluations, tokens=None)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    record = only(run)
    assert record.nominal
    assert record.last.values["win"].tolist() == [0.5, 1.0, 0.0]
    assert record.last.metrics["reward/proxy/a"] == 1.0
    assert (record.summary, record.tokens, record.seconds) == ({}, None, 0.0)


def test_a_folder_a_glob_and_a_sweep_name_the_same_runs(tmp_path: Path) -> None:
    sweep = tmp_path / "date" / "time"
    here, elsewhere = one(sweep / "0", "seed=0"), one(tmp_path / "old" / "7", "seed=1")
    (sweep / "sweep.md").touch()
    jobs = [
        {"number": i, "directory": str(d), "overrides": [f"seed={i}"], "fingerprint": str(i)}
        for i, d in enumerate((here, elsewhere, sweep / "2"))
    ]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    found, left_out = records.read([str(sweep)])
    assert [record.run.directory for record in found] == [here, elsewhere], "wherever it ran"
    assert left_out == [
        f"{sweep / '2'} is not finished (missing); start the command that asked for it again"
    ]
    assert only(f"{tmp_path}/date/*/*").run.directory == here, "plain files are passed over"
    found, _ = records.read([f"{sweep}/*", str(tmp_path / "old")])
    assert [record.seed for record in found] == ["0", "1"]


def test_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    one(tmp_path / "runs" / "a[1]")
    assert only("~/runs").seed == only("~/runs/a[1]").seed == "0"


# ------------------------------------------------------------------------------- what makes an arm


def arms(tmp_path: Path, *asked: tuple[str, ...]) -> list[str]:
    for i, overrides in enumerate(asked):
        one(tmp_path / str(i), *overrides)
    return [record.arm for record in records.read([str(tmp_path)])[0]]


def test_what_follows_the_seed_splits_no_arm(tmp_path: Path) -> None:
    follow = ("preferences.seed=${seed}", r"reward.member.seed=$\{seed\}")
    asked = [(f"seed={seed}", *follow) for seed in (0, 1, 2)]
    assert arms(tmp_path / "all", *asked) == ["all runs"] * 3
    asked = [(*a, f"algo.kl_coef={kl}") for a in asked for kl in (0, 1)]
    assert arms(tmp_path / "two", *asked) == ["kl_coef=0", "kl_coef=1"] * 3


def test_what_decides_nothing_splits_no_arm(tmp_path: Path) -> None:
    asked = [("seed=0", "tracker=wandb"), ("seed=1", "checkpoints.keep=1"), ("seed=2",)]
    assert arms(tmp_path, *asked) == ["all runs"] * 3


def test_the_same_setting_in_other_words_is_one_arm(tmp_path: Path) -> None:
    asked = [
        ("seed=0", "reward=pairwise", "algo.lr=1e-3"),
        ("seed=1", "reward=pairwise", "algo.lr=0.001"),
        ("seed=0", "reward=ensemble", "algo.lr=0.001"),
        ("seed=1", "algo.lr=0.001"),  # whose reward is the ensemble, too
    ]
    assert arms(tmp_path, *asked) == ["reward=pairwise"] * 2 + ["reward=ensemble"] * 2


def test_seeds_of_sweeps_that_differ_in_more_are_kept_apart(tmp_path: Path) -> None:
    first, second = one(tmp_path / "a" / "0", "seed=0"), one(tmp_path / "b" / "0", "seed=1")
    config = configured("seed=1", "algo.kl_coef=0.7")
    edited(second / "run.json", config=config, fingerprint=runs.config_fingerprint(config))
    found, _ = records.read([str(tmp_path)])
    assert [r.run.directory for r in found] == [first, second]
    assert [r.arm for r in found] == ["kl_coef=0.1", "kl_coef=0.7"], "the overrides do not say it"


# ------------------------------------------------------------------------------- what is left out


def not_finished(run: Path, **files: Any) -> Path:
    about = json.loads((run / "run.json").read_text())
    about = {k: v for k, v in about.items() if k not in ("finished", "artifacts")}
    (run / "run.json").write_text(json.dumps(about))
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def cut(run: Path) -> None:
    path = run / "evaluation" / "step-000004.json"
    path.write_text(path.read_text()[:300])


def rows_of(run: Path, change: Any) -> None:
    path = run / "evaluation" / "step-000004.json"
    rows = json.loads(path.read_text())["rows"]
    edited(path, rows=[change(i, row) for i, row in enumerate(rows)])


PRUNED = {"step": 20, "metric": "reward/gold", "value": 0.1234, "bound": 0.5}
STEP = "evaluation/step-000004.json"
BROKEN: dict[str, tuple[Any, str]] = {
    "damaged": (lambda d: (d / "run.json").write_text('{"co'), "/run.json is damaged"),
    "edited": (
        lambda d: edited(d / "run.json", fingerprint="0"),
        "/run.json is edited, or of another program",
    ),
    "foreign": (
        lambda d: (d / "run.json").write_text('{"name": "theirs"}'),
        "/run.json is edited, or of another program",
    ),
    "another algo": (
        lambda d: edited(
            d / "run.json", config={"seed": 0}, fingerprint=runs.config_fingerprint({"seed": 0})
        ),
        "/run.json names no algo or seed: it is no run of rlhf_exp",
    ),
    "partial": (
        not_finished,
        " is not finished (partial, 4 of 60 steps done); continue it with: python -m rlhf_exp "
        "resume=/",
    ),
    "failed": (
        lambda d: not_finished(d, failed={"error": "disk full"}),
        " is not finished (failed, 4 of 60 steps done: disk full); mend that and continue",
    ),
    "pruned": (
        lambda d: not_finished(d, pruned=PRUNED),
        "given up after step 20: reward/gold was 0.123, the bound 0.5); start it with pruning=null",
    ),
    "running": (
        lambda d: (not_finished(d) / ".running").write_text(
            "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=00\nduration=120.0\n"
        ),
        " is not finished (running, 4 of 60 steps done); wait for it",
    ),
    "never begun": (
        lambda d: (not_finished(d) / "run.log").unlink(),
        " is not finished (missing, 4 of 60 steps done); start the command",
    ),
    "no evaluation": (
        lambda d: [p.unlink() for p in (d / "evaluation").iterdir()],
        " is finished and has no evaluation/step-*.json: give runs with the stage align",
    ),
    "cut short": (cut, f"/{STEP} is damaged or cut short: copy it again"),
    "no rows": (lambda d: edited(d / STEP, rows=[]), f"/{STEP} is damaged or cut short"),
    "no object": (lambda d: (d / STEP).write_text("[1]"), f"/{STEP} is damaged or cut short"),
    "no prompts": (
        lambda d: rows_of(d, lambda i, row: {k: v for k, v in row.items() if k != "prompt"}),
        f"/{STEP} is damaged or cut short",
    ),
    "a mean that is none": (
        lambda d: edited(d / STEP, metrics={"text/distinct_1": float("nan")}),
        f"/{STEP} holds text/distinct_1 that is no finite number",
    ),
    "no gold": (
        lambda d: rows_of(d, lambda i, row: row if i else row | {"gold": None}),
        f"/{STEP} is damaged: not every row has a number as gold",
    ),
    "gold not asked": (
        lambda d: rows_of(d, lambda i, row: {k: v for k, v in row.items() if k != "gold" or i}),
        f"/{STEP} has rows without gold: add it with: python -m rlhf_exp stages=[evaluate] run=/",
    ),
    "nan": (
        lambda d: rows_of(d, lambda i, row: row | {"k3": float("nan")} if i == 2 else row),
        f"/{STEP} holds k3 that is no finite number",
    ),
    "infinite": (
        lambda d: rows_of(d, lambda i, row: row | {"proxy": float("inf")}),
        f"/{STEP} holds proxy that is no finite number",
    ),
    "other prompts": (
        lambda d: rows_of(d, lambda i, row: row | {"prompt": f"other {i}"}),
        f"/{STEP} has other prompts than step-000000.json",
    ),
    "a row lost": (
        lambda d: edited(d / STEP, rows=json.loads((d / STEP).read_text())["rows"][:2]),
        f"/{STEP} has other prompts than step-000000.json",
    ),
    "damaged summary": (
        lambda d: (d / "summary.json").write_text("{"),
        "/summary.json is damaged: write it again with: python -m rlhf_exp stages=[evaluate] run=/",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_used_is_named_with_the_reason(tmp_path: Path, kind: str) -> None:
    whole, broken = one(tmp_path / "a", "seed=0"), one(tmp_path / "b", "seed=1")
    damage, told = BROKEN[kind]
    damage(broken)
    found, left_out = records.read([str(tmp_path)])
    assert [record.run.directory for record in found] == [whole]
    [reason] = left_out
    assert reason.startswith(str(broken))
    assert told in reason
    assert "\n" not in reason


def test_one_run_counts_once_and_a_usable_copy_stands_for_a_damaged_one(tmp_path: Path) -> None:
    first, second, third = (one(tmp_path / name, "seed=0") for name in "abc")
    cut(first)
    found, left_out = records.read([str(tmp_path), f"{tmp_path}/*"])
    assert [record.run.directory for record in found] == [second]
    assert left_out[0].startswith(f"{first}/{STEP} is damaged")
    assert left_out[1:] == [f"{third} is the same run as {second}"]


def test_a_run_of_another_version_is_no_further_seed(tmp_path: Path) -> None:
    first, second = one(tmp_path / "a"), one(tmp_path / "b")
    config = configured()
    del config["sampler"]
    edited(first / "run.json", config=config, fingerprint=runs.config_fingerprint(config))
    _, left_out = records.read([str(tmp_path)])
    assert left_out == [
        f"{second} has the settings and the seed of {first}, though another version wrote its "
        "config"
    ]


def test_directories_without_runs_and_damaged_sweeps_are_named(tmp_path: Path) -> None:
    one(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep.json").write_text("{")
    _, left_out = records.read([f"{tmp_path}/*", str(tmp_path)])
    assert left_out == [
        f"{tmp_path}/empty has no run.json, nor a run below it: give run directories",
        f"{tmp_path}/sweep.json is damaged: start the sweep again to have it written",
    ]


def test_nothing_matched_and_nothing_usable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"runs=/nowhere/\* matches nothing: give run dir"):
        records.read(["/nowhere/*"])
    for name in "abcde":
        (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=r"holds no finished run .*/a has no run.json.* \(and 2 more\)$"
    ):
        records.read([f"{tmp_path}/*"])


def test_values_are_plain_numbers(tmp_path: Path) -> None:
    record = only(one(tmp_path))
    assert all(v.dtype == np.float64 for v in record.last.values.values())
    assert {"gold", "proxy", "k1", "k3", "length", "ended"} == set(record.last.values)
