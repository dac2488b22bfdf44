"""Sweeps on a real SLURM: arrays, signals, preemption; its daemons and two nodes on this host."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster, missing, until
from runs import command, command_line, environment, rows, timeless, weights, worker_of

from rlhf_exp.artifacts import verify

pytest_plugins = ["runs_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.poll=0.3")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(
            f"no SLURM here ({', '.join(lacking)}): apt install slurmctld slurmd slurm-client"
        )
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def asked(artifacts: Path, *overrides: object) -> list[str]:
    """A sweep of debug runs into sweep/."""
    given = ("experiment=debug", f"artifacts={artifacts}", "hydra.sweep.dir=sweep")
    return [*SLURM, *given, *map(str, overrides)]


def job_of(directory: Path) -> str:
    return json.loads((directory / "job.json").read_text())["id"]


def log_of(directory: Path) -> str:
    return Path(json.loads((directory / "job.json").read_text())["log"]).read_text()


def settings(folder: Path) -> dict[str, str]:
    """The #SBATCH lines of what was submitted, and the srun that follows."""
    [script] = folder.glob(".submitit/*/*_submission.sh")
    lines = script.read_text().splitlines()
    told = dict(x.removeprefix("#SBATCH --").partition("=")[::2] for x in lines if "#SBATCH" in x)
    return told | {"srun": next(x for x in lines if x.startswith("srun"))}


@contextmanager
def watching(cwd: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command, while it waits for its jobs; ended with the block."""
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def began(directory: Path, steps: int) -> bool:
    """Whether the run has got that far."""
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) >= steps


def test_an_array_of_four_runs_on_artifacts_made_once(cluster: Cluster, tmp_path: Path) -> None:
    done = command_line(
        *asked(tmp_path / "artifacts", "algo.steps=2", "seed=range(4)"),
        "hydra.launcher.set_up=['export HELLO=1']",
        "hydra.launcher.constraint=null",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    made: list[str] = []
    for number in range(4):
        directory = tmp_path / "sweep" / str(number)
        assert (directory / "summary.json").exists()
        assert (directory / ".hydra" / "overrides.yaml").read_text().count(f"seed={number}") == 1
        about = json.loads((directory / "run.json").read_text())
        assert about["finished"]
        made += [path for path, how in about["artifacts"].items() if how == "made"]
        assert cluster.job(job_of(directory))["JobState"] == "COMPLETED"
    assert len(made) == len(set(made)) == 5  # base, sft, preferences, two members: once each
    told = settings(tmp_path / "sweep")
    assert told["array"] == "0-3%4"
    assert told["signal"] == "USR2@300"
    assert told["requeue"] == ""
    assert "--kill-on-bad-exit=1 --cpus-per-task=1" in told["srun"]
    assert "4 finished" in done.stdout

    again = command_line(
        *asked(tmp_path / "artifacts", "algo.steps=2", "seed=range(4)"), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert "4 finished, 0 to do" in again.stdout + again.stderr


@pytest.mark.parametrize("tasks", ["process", "node"])
def test_two_nodes_with_two_processes_each(
    cluster: Cluster, artifacts: Path, tmp_path: Path, tasks: str
) -> None:
    done = command_line(
        *asked(artifacts, "algo.steps=2", "hydra.run.dir=x", f"hydra.launcher.tasks={tasks}"),
        "hardware.processes=2",
        "hardware.nodes=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "sweep" / "0"
    job = cluster.job(job_of(directory))
    assert job["NumNodes"] == "2"
    assert job["NumTasks"] == ("4" if tasks == "process" else "2")
    saved = max((directory / "checkpoints").glob("step-*"))
    import torch

    states = torch.load(saved / "state.pt", weights_only=True)["random"]
    assert len(states) == 4  # the generators of four processes
    verify(directory / "policy")
    assert (directory / ".hydra" / "config.yaml").exists()


RAISES = """
import os, time
def score(prompts, completions):
    if os.environ["SLURM_PROCID"] == "1":
        raise ValueError("rank one cannot count")
    return [float(len(c)) for c in completions]
"""


def test_a_rank_that_raises_fails_the_job_with_its_own_error(
    cluster: Cluster, artifacts: Path, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text(RAISES)
    done = command_line(
        *asked(artifacts, "algo.steps=2", "hardware.processes=2"),
        "reward=function",
        "reward.function=raising:score",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    directory = tmp_path / "sweep" / "0"
    failed = json.loads((directory / "failed.json").read_text())
    assert "rank one cannot count" in failed["error"]
    assert failed["rank"] == 1
    assert "rank one cannot count" in done.stderr
    job = cluster.job(job_of(directory))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")


def test_a_killed_job_is_told_of_and_goes_on_when_asked_again(
    cluster: Cluster, artifacts: Path, tmp_path: Path
) -> None:
    """kill -9 leaves no word; the queue tells."""
    long = ("algo.steps=8", "checkpoints.every=2", "evaluation.every=100")
    expected = command_line(
        "experiment=debug", f"artifacts={artifacts}", *long, "hydra.run.dir=whole", cwd=tmp_path
    )
    assert expected.returncode == 0, expected.stderr
    directory = tmp_path / "sweep" / "0"
    with watching(tmp_path, *asked(artifacts, *long)) as waiting:
        until(lambda: list((directory / "checkpoints").glob("step-000002*")))
        os.kill(worker_of(directory), signal.SIGKILL)
        _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 1, err
    assert "as FAILED (NonZeroExitCode), 127.0.0.1: task 0: Killed, and it left no result" in err
    assert cluster.job(job_of(directory))["JobState"] == "FAILED"

    done = command_line(*asked(artifacts, *long), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 failed, 1 to do" in done.stdout + done.stderr
    assert weights(directory) == weights(tmp_path / "whole")
    assert timeless(directory / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_a_preempted_run_goes_on_and_ends_with_the_same_bytes(
    cluster: Cluster, artifacts: Path, tmp_path: Path
) -> None:
    long = (
        "hardware.processes=2",
        "algo.steps=14",
        "checkpoints.every=100",
        "evaluation.every=100",
        "algo.epochs=4",
    )
    expected = command_line(
        "experiment=debug", f"artifacts={artifacts}", *long, "hydra.run.dir=whole", cwd=tmp_path
    )
    assert expected.returncode == 0, expected.stderr
    directory = tmp_path / "sweep" / "0"
    with watching(tmp_path, *asked(artifacts, *long)) as waiting:
        until(lambda: began(directory, 3))
        job = job_of(directory)
        urgent = ("-p", "high", "-N2", "--exclusive", "--wrap", "sleep 2", "-o", "/dev/null")
        cluster.run("sbatch", *urgent)
        until(lambda: cluster.job(job)["JobState"] == "PENDING")
        assert len(list((directory / "checkpoints").glob("step-*"))) == 1
        assert "goes back into the queue (1 of 20)" in log_of(directory)
        cluster.restart_now(job)
        _, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert cluster.job(job)["Restarts"] == "1"
    assert weights(directory) == weights(tmp_path / "whole")
    assert timeless(directory / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_a_run_out_of_time_goes_back_into_the_queue(
    cluster: Cluster, artifacts: Path, tmp_path: Path
) -> None:
    """As often as it may; its time is cut short while it works."""
    many = ("algo.steps=1000", "checkpoints.every=1000", "evaluation.every=1000")
    given = ("hydra.launcher.signal_delay_s=45", "hydra.launcher.max_requeues=1")
    directory = tmp_path / "sweep" / "0"
    with watching(tmp_path, *asked(artifacts, *many), *given) as waiting:
        until(lambda: began(directory, 3))
        job = job_of(directory)
        cluster.cut_short(job)
        until(lambda: cluster.job(job)["JobState"] == "PENDING")
        [first] = (directory / "checkpoints").glob("step-*")
        done = len(rows(directory / "metrics.jsonl"))
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
        cluster.restart_now(job)
        until(lambda: began(directory, done + 2))
        cluster.cut_short(job)
        _, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 1
    assert "was requeued 1 times already (hydra.launcher.max_requeues=1)" in err
    assert "was requeued 1 times" in json.loads((directory / "failed.json").read_text())["error"]
    second = max((directory / "checkpoints").glob("step-*"))
    assert second.name > first.name  # it had gone on from there
    assert [r["step"] for r in rows(directory / "metrics.jsonl") if "reward/proxy" in r] == list(
        range(int(second.name.removeprefix("step-")))
    )


def test_more_points_than_an_array_holds_are_taken_in_chunks(
    cluster: Cluster, artifacts: Path, tmp_path: Path
) -> None:
    done = command_line(
        *asked(artifacts, "algo.steps=2", "seed=range(1100)", "hydra.launcher.wait=false"),
        "+hydra.launcher.additional_parameters.hold=true",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    queued = cluster.run("squeue", "-h", "-r", "-t", "pending", "-o", "%i").split()
    assert len(queued) == 1100
    assert len({job.split("_")[0] for job in queued}) == 2
    assert job_of(tmp_path / "sweep" / "1099") in queued
    cluster.run("scancel", *{job.split("_")[0] for job in queued})
