"""Sweeps on this machine: each run is done once, whatever happened to the command before."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cluster import until
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobStatus
from hydra.utils import get_class
from omegaconf import DictConfig
from runs import (
    DebugRun,
    command,
    command_line,
    contents,
    environment,
    rows,
    same_outcome,
    the_error,
    worker_of,
)

from rlhf_exp import runs
from rlhf_exp.checkpoints import Checkpoints
from rlhf_exp.config import check_node, conf_directory
from rlhf_exp.launching import Job, Points, Sweeping, asked

pytest_plugins = ["runs_fixtures"]
slow = pytest.mark.slow


# ------------------------------------------------------------------------------ what is to be done


class Pretended(Sweeping):
    """Does jobs by writing that they are done, or fails them."""

    def __init__(self) -> None:
        self.done: list[Job] = []
        self.report = False

    def check(self) -> None:
        pass

    def do(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert job.directory is not None
            self.done.append(job)
            about = json.loads((job.directory / "run.json").read_text())
            end(job.directory, about)


def end(directory: Path, about: dict[str, Any], **after: float) -> None:
    """Leave what a finished run leaves."""
    means = {"gold": 0.5, "proxy": 1.0, "kl": 2.0, "length": 9.0} | after
    table = {k: {"after": {"mean": v, "interval": [v, v]}} for k, v in means.items()}
    (directory / "summary.json").write_text(json.dumps(table))
    (directory / "run.json").write_text(json.dumps(about | {"finished": "now"}))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Launches points of a sweep as Hydra would, in `tmp_path`; gives launcher and JobReturns."""
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):

        def launch(*points: str, folder: str = "sweep", settings: str = "sweep=run") -> Any:
            given = ["experiment=debug", f"hydra.sweep.dir={folder}", settings, "hydra.job.num=0"]
            config = compose("config", overrides=given, return_hydra_config=True)
            launcher = Pretended()
            loader = GlobalHydra.instance().config_loader()
            launcher.points, launcher.config = Points(loader, config), config
            jobs = [[*given[:1], *point.split()] for point in points]
            return launcher, launcher.launch(jobs, 0)

        yield launch
    GlobalHydra.instance().clear()


def test_what_is_there_is_not_done_again(sweep: Any, tmp_path: Path) -> None:
    first, returned = sweep("seed=0", "seed=1")
    assert [job.directory for job in first.done] == [tmp_path / "sweep" / n for n in "01"]
    assert [r.return_value for r in returned] == [0.5, 0.5]
    again, returned = sweep("seed=0", "seed=1", "seed=2")
    assert [(job.number, job.directory) for job in again.done] == [(2, tmp_path / "sweep" / "2")]
    assert [r.working_dir for r in returned] == [str(tmp_path / "sweep" / n) for n in "012"]


def test_runs_are_found_in_other_sweeps_too(sweep: Any, tmp_path: Path) -> None:
    sweep("seed=0", "seed=1", folder="multirun/2026-01-01/10-00-00")
    second, _ = sweep("seed=1", "seed=2", folder="multirun/2026-01-02/10-00-00")
    [job] = second.done
    assert job.directory == tmp_path / "multirun/2026-01-02/10-00-00/1"
    noted = json.loads((tmp_path / "multirun/2026-01-02/10-00-00/sweep.json").read_text())["jobs"]
    assert [j["directory"] for j in noted] == [
        str(tmp_path / "multirun" / d) for d in ("2026-01-01/10-00-00/1", "2026-01-02/10-00-00/1")
    ]


def test_each_arm_is_combined_with_what_is_swept() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra_plugins.rlhf_exp_launchers import GridSweeper

    arms = {"free": ["algo=ppo", "algo.kl_coef=0"], "rest": ["algo=rest"], "idle": ["algo=sft"]}
    sweeper = GridSweeper(None, arms=arms, only=["rest", "free"])
    given = OverridesParser.create().parse_overrides(["seed=range(2)", "policy=tiny"])
    assert sweeper.split_arguments(given, 3) == [
        [
            ["arm=free", "algo=ppo", "algo.kl_coef=0", "seed=0", "policy=tiny"],
            ["arm=free", "algo=ppo", "algo.kl_coef=0", "seed=1", "policy=tiny"],
            ["arm=rest", "algo=rest", "seed=0", "policy=tiny"],
        ],
        [["arm=rest", "algo=rest", "seed=1", "policy=tiny"]],
    ]
    clash = OverridesParser.create().parse_overrides(["algo=dpo"])
    with pytest.raises(ValueError, match=r"^algo is what the arms.*hydra.sweeper.only=\[free\]"):
        sweeper.split_arguments(clash, None)
    with pytest.raises(ValueError, match=r"hydra.sweeper.only=rast.*rest"):
        GridSweeper(None, arms=arms, only=["rast"]).split_arguments(given, None)


def test_a_changed_setting_is_a_new_run_beside_the_old(sweep: Any, tmp_path: Path) -> None:
    sweep("seed=0", "seed=1")
    before = (tmp_path / "sweep/0/run.json").read_bytes()
    changed, _ = sweep("seed=0 algo.lr=1e-5", "seed=1")
    assert [job.directory for job in changed.done] == [tmp_path / "sweep" / "2"]
    assert (tmp_path / "sweep/0/run.json").read_bytes() == before


def test_what_decides_nothing_makes_no_new_run(sweep: Any) -> None:
    sweep("seed=0")
    second, [found] = sweep("seed=0 artifacts=elsewhere tracker=wandb objective=kl show_every=3")
    assert not second.done
    assert found.return_value == 2.0


def test_the_same_point_twice_is_one_run(sweep: Any) -> None:
    launcher, returned = sweep("seed=3", "seed=3 show_every=2")
    assert len(launcher.done) == 1
    assert returned[0].working_dir == returned[1].working_dir


def test_a_partial_and_a_failed_run_go_on_in_their_directories(sweep: Any, tmp_path: Path) -> None:
    sweep("seed=0", "seed=1", "seed=2")
    for number in (0, 1):
        about = json.loads((tmp_path / f"sweep/{number}/run.json").read_text())
        del about["finished"]
        (tmp_path / f"sweep/{number}/run.json").write_text(json.dumps(about))
        (tmp_path / f"sweep/{number}/summary.json").unlink()
        (tmp_path / f"sweep/{number}/run.log").touch()
    (tmp_path / "sweep/1/failed.json").write_text(json.dumps({"error": "the disk is full"}))
    again, _ = sweep("seed=0", "seed=1 show_every=7", "seed=2")
    assert [(j.state, j.directory) for j in again.done] == [
        ("partial", tmp_path / "sweep/0"),
        ("failed", tmp_path / "sweep/1"),
    ]
    about = json.loads((tmp_path / "sweep/1/run.json").read_text())
    assert about["config"]["show_every"] == 7  # it decides nothing, so it follows the command


def test_a_pruned_run_goes_on_when_nothing_prunes_any_more(sweep: Any, tmp_path: Path) -> None:
    sweep("seed=0")
    about = json.loads((tmp_path / "sweep/0/run.json").read_text())
    del about["finished"]
    (tmp_path / "sweep/0/run.json").write_text(json.dumps(about))
    pruned = {"step": 2, "value": 0.1, "bound": 0.5, "metric": "reward/gold"}
    (tmp_path / "sweep/0/pruned.json").write_text(json.dumps(pruned))
    assert not sweep("seed=0 pruning={bounds:{2:0.5}}")[0].done
    [job] = sweep("seed=0")[0].done
    assert job.state == "pruned"


def test_an_impossible_point_fails_and_the_others_run(sweep: Any, tmp_path: Path) -> None:
    launcher, returned = sweep("algo.lr=-1", "seed=1", "algo.lr=abc")
    assert [job.number for job in launcher.done] == [1]
    assert [r.status for r in returned] == [JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.FAILED]
    assert "algo.lr=-1" in str(returned[0]._return_value)
    assert "algo.lr" in str(returned[2]._return_value)
    jobs = runs.sweep(tmp_path / "sweep")
    assert [j.state for j in jobs] == ["missing", "finished", "missing"]
    assert "algo.lr=-1" in str(jobs[0].error)


def test_a_search_goes_on_after_impossible_points(sweep: Any) -> None:
    launcher, returned = sweep("algo.lr=-1", "algo.lr=-2")
    assert not launcher.done
    assert [r.status for r in returned] == [JobStatus.FAILED] * 2


def test_looking_changes_nothing(
    sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("seed=0")
    before = contents(tmp_path)
    launcher, _ = sweep("seed=0", "seed=1", settings="sweep=status")
    assert not launcher.done
    assert contents(tmp_path) == before
    assert "1 finished, 1 missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "point",
    ["seed=4", "algo=dpo seed=1", "policy.lora={r:4}", "stages=[reward]", "+algo.x=1 seed=2"],
)
def test_points_are_composed_as_hydra_composes_them(sweep: Any, point: str) -> None:
    config = compose("config", overrides=["hydra.job.num=0"], return_hydra_config=True)
    loader = GlobalHydra.instance().config_loader()
    overrides = ["experiment=debug", *point.split()]
    whole = loader.load_sweep_config(config, overrides)
    points = Points(loader, config)
    points(["experiment=debug", "seed=9", "algo.lr=3"])  # leaves nothing in what is shared
    found = points(overrides)
    assert isinstance(whole, DictConfig)
    assert {k: whole[k] for k in whole if k != "hydra"} == dict(found)


# -------------------------------------------------------------------------------- the command line


def test_a_forked_run_is_the_same_bit_for_bit(debug_run: DebugRun, tmp_path: Path) -> None:
    """And it tells what it does in a log of its own, where several run at once."""
    asked_for = ["-m", "experiment=debug", "seed=0,1", f"artifacts={debug_run.artifacts}"]
    done = command_line(*asked_for, "hydra.sweep.dir=sweep", "hydra.launcher.jobs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_outcome(tmp_path / "sweep/0", debug_run.directory)
    assert "stage evaluate" in (tmp_path / "sweep/1/output.log").read_text()
    assert not (tmp_path / "sweep/0/.running").exists()


@slow
def test_a_sweep_of_twelve_that_is_killed_is_completed_by_the_same_command(
    artifacts: Path, tmp_path: Path
) -> None:
    """One run is killed, then the command itself; only what is missing runs."""
    asked_for = ["-m", "experiment=debug", "algo.steps=4", "checkpoints.every=1", "seed=range(12)"]
    asked_for += [f"artifacts={artifacts}", "hydra.sweep.dir=sweep", "hydra.launcher.jobs=2"]
    folder = tmp_path / "sweep"
    first = subprocess.Popen(
        command(*asked_for), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: (folder / "1/checkpoints/step-000001").exists())
        os.kill(worker_of(folder / "1"), signal.SIGKILL)
        until(lambda: (folder / "4/checkpoints/step-000001").exists())
    finally:
        first.kill()
        first.wait()
    until(lambda: "running" not in [run.state for run in runs.sweep(folder)])
    states = [run.state for run in runs.sweep(folder)]
    assert states[1] == "failed"
    assert {"finished", "partial", "missing"} <= set(states)
    done = [n for n, state in enumerate(states) if state == "finished"]
    before = {n: (folder / f"{n}/run.json").stat().st_mtime_ns for n in done}

    looked = command_line(*asked_for, "sweep=status", cwd=tmp_path)
    assert looked.returncode == 0, looked.stderr
    assert f"{len(done)} finished" in looked.stdout
    assert "ended by SIGKILL" in looked.stdout

    second = command_line(*asked_for, cwd=tmp_path, timeout=600)
    assert second.returncode == 0, second.stderr
    assert f"12 jobs, {len(done)} finished" in second.stdout + second.stderr
    assert {n: (folder / f"{n}/run.json").stat().st_mtime_ns for n in done} == before
    assert [run.state for run in runs.sweep(folder)] == ["finished"] * 12
    assert "12 finished" in second.stdout
    for number in range(12):  # no step was taken twice, none left out
        steps = [r["step"] for r in rows(folder / f"{number}/metrics.jsonl") if "reward/proxy" in r]
        assert steps == [0, 1, 2, 3]
    assert (folder / "sweep.csv").read_text().count("finished") == 12
    assert {p.name for p in (folder / "figures").iterdir()} == {
        "gold_and_proxy_by_kl.png",
        "gold_by_step.png",
        "final_gold.png",
    }
    assert (folder / "0" / "output.log").read_text().count("gold was highest") == 1


WHERE = """
import os, pathlib, rlhf_exp
def score(prompts, completions):
    pathlib.Path(f"where-{os.getpid()}").write_text(rlhf_exp.__file__)
    return [float(len(c)) for c in completions]
"""


@slow
def test_submitit_without_slurm_two_processes_on_copied_code(
    artifacts: Path, tmp_path: Path
) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    done = command_line(
        *("-m", "hydra/launcher=submitit_local", "hydra.launcher.snapshot=true"),
        *("experiment=debug", "algo.steps=1", f"artifacts={artifacts}", "hydra.sweep.dir=sweep"),
        *("hardware.processes=2", "reward=function", "reward.function=where:score"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = [p.read_text() for p in tmp_path.glob("where-*")]
    [code] = (tmp_path / "sweep" / "code").iterdir()
    assert said == [str(code / "rlhf_exp" / "__init__.py")] * 2
    assert json.loads((tmp_path / "sweep/0/run.json").read_text())["finished"]


@slow
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["hydra/launcher=slurm", "seed=1"], ["python -m rlhf_exp -m hydra/launcher=slurm seed=1"]),
        (["-m", "hydra.launcher.jobs=0"], ["hydra.launcher.jobs=0 must be at least 1"]),
        (
            ["-m", "hydra/launcher=submitit_local", "hydra.launcher.partion=x"],
            ["hydra.launcher.partion is not a setting", "hydra.launcher.partition"],
        ),
        (
            ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=soon"],
            ["hydra.launcher.timeout_min", "soon"],
        ),
        (
            ["-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks=gpu"],
            ["hydra.launcher.tasks", "process, node"],
        ),
        (
            ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
            ["hydra.launcher.timeout_min=5", "more than 6"],
        ),
        (
            ["-m", "hydra/launcher=submitit_local", "hardware=zero2"],
            ["hardware.device=null", "hardware.device=cuda or hardware.device=cpu"],
        ),
        (["-m", "hydra/launcher=slurm", "seed=1"], ["there is no sbatch here", "login node"]),
        (["-m", "algo.lr=-1,-2"], ["algo.lr=-1 must not be negative"]),
        (["-m", "sweep=all"], ["sweep", "run, status"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith(("-m", "hydra/")) else "",
)
def test_mistakes_in_how_a_sweep_is_launched(
    arguments: list[str], fragments: list[str], tmp_path: Path
) -> None:
    env = environment(PATH=str(Path(sys.executable).parent))  # no SLURM in it
    done = subprocess.run(
        command(*arguments), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    for fragment in fragments:
        assert fragment in the_error(done.stderr)
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (conf_directory() / "hydra/launcher").glob("*"))
)
def test_launchers_take_the_settings_of_their_files(sweep: Any, name: str) -> None:
    config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    check_node(config.hydra.launcher, "hydra.launcher")
    schema = get_class(config.hydra.launcher._target_)
    given = {f.name for f in fields(schema)}
    assert set(config.hydra.launcher) == given | {"_target_"}


@slow
def test_every_run_there_is(debug_run: DebugRun, tmp_path: Path) -> None:
    done = command_line("sweep=status", f"runs={debug_run.directory.parent}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 finished" in done.stdout
    gold = json.loads((debug_run.directory / "summary.json").read_text())["gold"]["after"]["mean"]
    assert f"{gold:.3f}" in done.stdout
    assert contents(tmp_path) == set()


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rlhf_exp.checkpoints.time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(every=100, minutes=2)
    checkpoints.open(tmp_path)
    found = []
    for step in range(1, 8):
        now[0] += 50
        if checkpoints.due(step, 200):
            checkpoints.save(step, {}, None)
            found.append(step)
    assert found == [3, 6]  # the first after more than 120 seconds each time
    assert not Checkpoints(every=100, minutes=None).due(7, 200)
    with pytest.raises(ValueError, match=r"checkpoints\.minutes=0"):
        Checkpoints(minutes=0)


# ----------------------------------------------------------------------------------------- signals


def test_forked_children_can_be_ended_and_outlive_the_warning() -> None:
    code = """
import os, signal, sys, time
from rlhf_exp import signals
signals.listen()
children = []
for _ in range(2):
    if not (pid := os.fork()):
        time.sleep(60)
        os._exit(9)
    children.append(pid)
time.sleep(0.2)
os.kill(children[0], signal.SIGTERM)
os.kill(children[1], signal.SIGUSR2)
time.sleep(0.2)
ended = os.waitpid(children[0], 0)[1]
alive = os.waitpid(children[1], os.WNOHANG)
os.kill(children[1], signal.SIGTERM)
os.waitpid(children[1], 0)
print(os.WTERMSIG(ended) == signal.SIGTERM, alive == (0, 0), signals.received)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.split(maxsplit=2) == ["True", "True", "[]\n"], done.stderr


@pytest.mark.parametrize(
    ("code", "received", "failed", "expected"),
    [
        (0, [], False, 0),  # done
        (1, [], False, 1),  # a mistake
        (130, [signal.SIGTERM], True, 1),  # another process failed, SLURM clears up
        (140, [signal.SIGUSR2], False, "requeued"),
        (140, [], False, "requeued"),  # another process was warned first
        (143, [signal.SIGTERM], False, "waited"),  # a preemption without a warning, or scancel
    ],
)
def test_how_a_process_of_a_slurm_job_ends(
    code: int,
    received: list[int],
    failed: bool,
    expected: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlhf_exp import signals

    done: list[str] = []
    monkeypatch.setattr(signals, "received", received)
    monkeypatch.setattr(signals, "_requeue", lambda: done.append("requeued"))
    monkeypatch.setattr(signals, "_wait_to_be_killed", lambda: done.append("waited"))
    monkeypatch.setenv(signals.LIMIT, "3")
    found = signals.instead_of_leaving(code, main=True, failed=failed)
    assert (done[0] if done else found) == expected
    done.clear()
    monkeypatch.delenv(signals.LIMIT)
    assert signals.instead_of_leaving(code, main=True, failed=failed) == code
    assert not done


def test_asked_is_plain_and_complete(sweep: Any) -> None:
    plain = asked(compose("config", overrides=["artifacts=here"]))
    assert plain["artifacts"] == str(Path.cwd() / "here")
    assert type(plain["algo"]) is dict
