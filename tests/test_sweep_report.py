"""The runs of a sweep side by side: which settings differ, the tables, the figures."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp import runs
from rlhf_exp.report import sweep
from rlhf_exp.report.settings import differing, label
from rlhf_exp.report.sweep_figures import COLORS, _grouped, _looks

PPO = {"_target_": "rlhf_exp.algorithms.ppo.PPO", "steps": 4, "kl_coef": 0.1}
REST = {"_target_": "rlhf_exp.algorithms.rest.ReST", "steps": 2, "levels": [0.5, 0.7]}
PAIRWISE = {"_target_": "rlhf_exp.rewards.pairwise.Pairwise", "seed": 0}
BASE = {"seed": 0, "artifacts": "/a", "algo": PPO, "reward": PAIRWISE, "data": None}
ERROR = "algo.minibatch=48 must divide the 64 rollouts of a step: choose 32 | 64"


def job(number: int, *overrides: str, state: str = "finished", error: str | None = None, **config):
    settings = BASE | config
    return runs.Run(
        directory=Path("/nowhere") / str(number),
        state=state,
        fingerprint=runs.config_fingerprint(settings),
        config=settings,
        error=error,
        number=number,
        overrides=overrides,
    )


def ran(folder: Path, gold: float, seed: int = 0, **config: Any) -> runs.Run:
    """A finished run, found in its files; its gold rises from 0, one KL a step."""
    settings = BASE | {"seed": seed} | config
    folder.mkdir(parents=True)
    about = {
        "fingerprint": runs.config_fingerprint(settings),
        "config": settings,
        "finished": "now",
    }
    (folder / "run.json").write_text(json.dumps(about))
    rows: list[dict[str, float]] = []
    for step in (0, 2, 4):
        means = {"reward/gold": gold * step / 4, "reward/proxy": step, "kl/k1": step}
        rows += [{"step": step, **{f"evaluation/{k}": v for k, v in means.items()}}]
        rows += [{"step": s, "time/sample": 1, "time/learn": 0.5} for s in (step, step + 1)]
    (folder / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, rows[:-2])) + '\n{"step": 4, "ti'
    )
    ends = {"gold": gold, "proxy": 4.0, "kl": 4.0 + gold, "length": 12.0}
    summary = {k: {"after": {"mean": v, "interval": [v - 1, v + 1]}} for k, v in ends.items()}
    (folder / "summary.json").write_text(json.dumps(summary))
    return runs.read(folder)


# ---------------------------------------------------------------------------------------- settings


def test_an_arm_stands_for_the_settings_that_it_is_made_of() -> None:
    """Whether the overrides tell, or the configs; what differs within an arm is named beside it."""
    free = PPO | {"kl_coef": 0}
    told = [
        job(0, "arm=free", "algo=ppo", "algo.kl_coef=0", "seed=0", algo=free, arm="free"),
        job(1, "arm=free", "algo=ppo", "algo.kl_coef=0", "seed=1", algo=free, arm="free", seed=1),
        job(2, "arm=rest", "algo=rest", "seed=0", algo=REST, arm="rest"),
        job(3, "arm=rest", "algo=rest", "seed=1", algo=REST, arm="rest", seed=1),
    ]
    expected = [{"arm": a, "seed": s} for a in ("free", "rest") for s in "01"]
    assert differing(told) == expected
    assert differing([replace(run, overrides=()) for run in told]) == expected
    other = replace(told[3], config=told[3].config | {"reward": PAIRWISE | {"seed": 9}})
    other = replace(other, fingerprint="other")
    plain = [replace(run, overrides=()) for run in [*told[:3], other]]
    assert differing(plain)[3] == {"arm": "rest", "reward.seed": "9", "seed": "1"}


def test_settings_are_told_in_the_words_of_the_command_line() -> None:
    jobs = [
        job(0, "seed=0", "algo=rest", "data=reviews", algo=REST),
        job(1, "seed=1", "algo=raft", "data=reviews", algo=REST, seed=1),
        job(2, "seed=1", "data=reviews", "+algo.lr='0.00031234567'", seed=1),
    ]
    assert differing(jobs) == [
        {"algo": "rest", "algo.lr": "-", "seed": "0"},
        {"algo": "raft", "algo.lr": "-", "seed": "1"},
        {"algo": "PPO", "algo.lr": "0.0003123", "seed": "1"},  # as configured
    ]


def test_configs_are_compared_where_no_overrides_tell_the_jobs_apart() -> None:
    jobs = [
        job(0, "seed=0"),
        job(1, "seed=0", algo=PPO | {"kl_coef": 0.05}, artifacts="/b"),
        job(2, "seed=0", algo=REST, data={"folder": "x"}),
    ]
    assert differing(jobs) == [
        {"algo": "PPO", "data": "null", "algo.kl_coef": "0.1"},
        {"algo": "PPO", "data": "null", "algo.kl_coef": "0.05"},
        {"algo": "ReST", "data": "{folder:x}", "algo.kl_coef": "-"},
    ]


def test_what_follows_the_seed_is_the_seed() -> None:
    jobs = [job(i, seed=i, reward=PAIRWISE | {"seed": i}) for i in range(2)]
    assert differing(jobs) == [{"seed": "0"}, {"seed": "1"}]
    jobs = [job(i, seed=i, reward=PAIRWISE | {"seed": 1 - i}) for i in range(2)]
    assert differing(jobs)[0] == {"reward.seed": "1", "seed": "0"}


def test_a_missing_job_is_told_by_its_overrides() -> None:
    missing = runs.Run(
        directory=Path("/x"), state="missing", fingerprint="f", overrides=("seed=7",)
    )
    assert differing([job(0, "seed=0"), missing]) == [{"seed": "0"}, {"seed": "7"}]
    assert differing([]) == []
    assert differing([job(0)]) == [{}]


def test_labels_are_short_where_they_can_be() -> None:
    assert label({"algo": "ppo", "algo.kl_coef": "0"}) == "algo=ppo, kl_coef=0"
    assert label({"algo.lr": "1", "sft.lr": "2"}) == "algo.lr=1, sft.lr=2"


# ------------------------------------------------------------------------------------------- tables


@pytest.fixture
def jobs(tmp_path: Path) -> list[runs.Run]:
    """Two settings by three seeds, of which one failed and one waits."""
    found = [ran(tmp_path / str(i), gold, seed=i) for i, gold in enumerate((1.0, 2.0, 6.0))]
    found.append(ran(tmp_path / "3", 3.0, seed=0, algo=REST))
    failed = job(4, algo=REST, seed=1, state="failed", error=ERROR)
    return [*found, failed, job(5, algo=REST, seed=2, state="queued")]


def test_a_row_tells_what_the_files_hold(jobs: list[runs.Run]) -> None:
    first, *_, failed, _ = sweep.rows(jobs)
    assert first == {
        "number": 0,
        "settings": {"algo": "PPO", "seed": "0"},
        "state": "finished",
        "step": 4,
        "steps": 4,
        "gold": 1.0,
        "gold_low": 0.0,
        "gold_high": 2.0,
        "proxy": 4.0,
        "kl": 5.0,
        "length": 12.0,
        "seconds": 6.0,  # four steps; what was cut short does not count
        "error": None,
    }
    assert failed["settings"] == {"algo": "ReST", "seed": "1"}
    assert (failed["gold"], failed["seconds"], failed["error"]) == (None, None, ERROR)


def test_seeds_are_gathered_by_setting(jobs: list[runs.Run]) -> None:
    table = sweep.rows(jobs)
    assert sweep.over_seeds(table) == [
        {
            "settings": {"algo": "PPO"},
            "count": 3,
            "gold": (3.0, 1.0, 6.0),
            "proxy": (4.0, 4.0, 4.0),
            "kl": (7.0, 5.0, 10.0),
        },
        {
            "settings": {"algo": "ReST"},
            "count": 1,
            "gold": (3.0, 3.0, 3.0),
            "proxy": (4.0, 4.0, 4.0),
            "kl": (7.0, 7.0, 7.0),
        },
    ]
    assert sweep.over_seeds(sweep.rows([jobs[0], jobs[3]])) == [], "one seed each"


def test_the_terminal_shows_every_job_why_it_failed_and_how_many_are_where(jobs) -> None:
    lines = sweep.show(jobs).splitlines()
    assert lines[0].split() == [
        "job", "algo", "seed", "state", "step", "gold", "95", "%", "interval", "proxy", "KL",
        "tokens", "seconds",
    ]  # fmt: skip
    told = "0 PPO 0 finished 4/4 1.000 [0.000, 2.000] 4.000 5.00 12.0 6"
    assert lines[1].split() == told.split()
    assert lines[6].split() == ["5", "ReST", "2", "queued", *"-------"]
    assert lines[7:] == [f"job 4 failed: {ERROR}", "4 finished, 1 queued, 1 failed"]
    assert sweep.show([]).endswith("no jobs")


def test_the_terminal_keeps_to_120_columns() -> None:
    wide = [
        job(
            i, *(f"setting_{k}.of_a_long_name={'x' * 40}{i}" for k in range(9)), f"seed={i}", seed=i
        )
        for i in range(3)
    ]
    wide[1] = job(1, *wide[1].overrides, seed=1, state="failed", error="word " * 60)
    *lines, counts = sweep.show(wide).splitlines()
    assert max(map(len, lines)) <= 120
    assert counts == "2 finished, 1 failed"
    assert "seed" in lines[0].split(), "the seed stays"
    [left_out] = [line for line in lines if "more settings differ: " in line]
    shown = sum(name.startswith("setting") for name in lines[0].split())
    assert shown >= 2
    assert left_out.startswith(f"{9 - shown} more settings differ: setting_{shown}.of_a_long_name,")


def test_files_hold_the_tables_and_name_what_is_not_finished(jobs, tmp_path: Path) -> None:
    sweep.write(tmp_path / "sweep", jobs)
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| 0 | PPO | 0 | finished | 4/4 | 1.000 | [0.000, 2.000] | 4.000 | 5.00 |" in text
    assert (
        "| PPO | 3 | 3.000 [1.000, 6.000] | 4.000 [4.000, 4.000] | 7.000 [5.000, 10.000] |" in text
    )
    assert (
        f"- job 4 (algo=ReST, seed=1): failed: {ERROR}\n- job 5 (algo=ReST, seed=2): queued" in text
    )
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert (first["number"], first["algo"], first["seed"], first["gold_high"]) == (
        "0", "PPO", "0", "2.0",
    )  # fmt: skip
    assert (last["state"], last["gold"]) == ("queued", "")
    drawn = {"gold_and_proxy_by_kl.png", "gold_by_step.png", "final_gold.png"}
    assert {path.name for path in (tmp_path / "sweep" / "figures").iterdir()} == drawn
    for name in drawn:
        assert f"](figures/{name})" in text
        image = (tmp_path / "sweep" / "figures" / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 10_000


def test_without_a_finished_run_there_are_no_figures(tmp_path: Path) -> None:
    sweep.write(tmp_path, [job(0, state="running")])
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.md", "sweep.csv"}
    assert "figures/" not in (tmp_path / "sweep.md").read_text()


# ------------------------------------------------------------------------------------------ figures


def test_figures_hold_the_finished_runs_by_setting(jobs: list[runs.Run]) -> None:
    groups = _grouped(jobs, sweep.rows(jobs))
    golds = {
        name: [run[1][-1]["evaluation/reward/gold"] for run in g] for name, g in groups.items()
    }
    assert golds == {"algo=PPO": [1.0, 2.0, 6.0], "algo=ReST": [3.0]}


def test_evaluations_that_were_not_logged_are_read_from_their_files(tmp_path: Path) -> None:
    tmp_path = tmp_path / "run"
    run = ran(tmp_path, 1.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time/sample": 1}\n')
    (tmp_path / "evaluation").mkdir()
    means = {"reward/gold": 0.25, "reward/proxy": 1.0, "kl/k1": 2.0}
    (tmp_path / "evaluation" / "step-000003.json").write_text(
        json.dumps({"step": 3, "metrics": means})
    )
    [[(_, evaluations)]] = _grouped([run], sweep.rows([run])).values()
    assert [(e["step"], e["evaluation/reward/gold"]) for e in evaluations] == [(3, 0.25)]


def test_settings_beyond_the_colors_have_other_markers() -> None:
    looks = _looks({str(i): [] for i in range(3 * len(COLORS))})
    assert len({(look["color"], look["marker"]) for look in looks}) == 36
