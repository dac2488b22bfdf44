"""The real command line, in a subprocess, in a temporary directory."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import DebugRun, command, command_line, contents, environment, rows

from rlhf_exp.artifacts import verify

pytest_plugins = ["runs_fixtures"]
pytestmark = pytest.mark.slow  # each subprocess imports torch, transformers and what it needs

COUNT_E = (
    "def count(prompts, completions):\n    return [float(c.count('e')) for c in completions]\n"
)


def finished(directory: Path) -> dict:
    """summary.json of a run that must be complete."""
    for name in (
        "run.json",
        ".hydra/config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation/step-000000.json",
        "checkpoints",
        "policy/policy.json",
    ):
        assert (directory / name).exists(), f"{name} is missing from {contents(directory)}"
    drawn = {"scores_by_step", "scores_by_kl"}
    drawn |= {"members"} if members(directory) else set()
    drawn |= {"kl_coefficient"} if "kl/coef" in (directory / "metrics.jsonl").read_text() else set()
    assert contents(directory / "figures") == {f"{name}.png" for name in drawn}
    for name in drawn:
        image = (directory / "figures" / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 5_000
    assert not [name for name in contents(directory) if ".tmp-" in name]
    verify(directory / "policy")
    return json.loads((directory / "summary.json").read_text())


def members(directory: Path) -> set[str]:
    """What the reward was made of, as the metrics show it."""
    row = next(r for r in rows(directory / "metrics.jsonl") if "reward/proxy" in r)
    return {k.removeprefix("reward/proxy/") for k in row if k.startswith("reward/proxy/")}


def trains(directory: Path, start: Path) -> None:
    """The saved policy differs from the one it started from, and answers."""
    from transformers import AutoModelForCausalLM

    trained, before = (
        AutoModelForCausalLM.from_pretrained(p) for p in (directory / "policy", start)
    )
    change = [
        (a - b).abs().max() for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert max(change) > 1e-5
    assert trained(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


# ---- one run after another


def test_a_debug_run_leaves_everything_a_reader_needs(debug_run: DebugRun) -> None:
    summary = finished(debug_run.directory)
    for name in ("gold", "proxy", "kl", "length"):
        for side in ("before", "after", "change"):
            low, high = summary[name][side]["interval"]
            assert low <= summary[name][side]["mean"] <= high
    assert summary["kl"]["before"]["mean"] == pytest.approx(0, abs=1e-5)
    assert summary["kl"]["after"]["mean"] != 0

    about = json.loads((debug_run.directory / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert about["config"]["algo"]["steps"] == summary["step"]
    assert set(about["artifacts"].values()) == {"made"}
    kinds = [Path(path).parent.name for path in about["artifacts"]]
    assert kinds == ["base", "sft", "preferences", "reward", "reward"]
    start = next(Path(path) for path in about["artifacts"] if Path(path).parent.name == "sft")
    trains(debug_run.directory, start)

    metrics = rows(debug_run.directory / "metrics.jsonl")
    assert [r["step"] for r in metrics if "reward/proxy" in r] == list(range(summary["step"]))
    sample = rows(debug_run.directory / "samples.jsonl")[0]
    assert sample.keys() == {"step", "prompt", "completion", "proxy", "members"}


def test_a_debug_run_ends_with_a_table(debug_run: DebugRun) -> None:
    lines = debug_run.process.stdout.splitlines()
    summary = json.loads((debug_run.directory / "summary.json").read_text())
    for label, key in (("gold", "gold"), ("proxy", "proxy"), ("KL (nats)", "kl")):
        line = next(x for x in lines if x.startswith(label + " "))
        shown = [float(x) for x in line.removeprefix(label).split("[")[0].split()]
        sides = ("before", "after", "change")
        assert shown == pytest.approx([summary[key][s]["mean"] for s in sides], abs=6e-4)


def test_a_second_run_reuses_the_artifacts_and_writes_event_files(
    debug_run: DebugRun, tmp_path: Path
) -> None:
    before = contents(debug_run.artifacts)
    done = command_line(
        "experiment=debug",
        f"artifacts={debug_run.artifacts}",
        "hydra.run.dir=again",
        "tracker=tensorboard",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    finished(tmp_path / "again")
    about = json.loads((tmp_path / "again" / "run.json").read_text())
    assert set(about["artifacts"].values()) == {"reused"}
    assert contents(debug_run.artifacts) == before
    # what was reused is as good as what was made, and a tracker only watches
    first, second = (
        d / "policy" / "model.safetensors" for d in (debug_run.directory, tmp_path / "again")
    )
    assert first.read_bytes() == second.read_bytes()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "again" / "tensorboard"))
    events.Reload()
    told = [e.value for e in events.Scalars("reward/proxy")]
    kept = [
        r["reward/proxy"] for r in rows(tmp_path / "again" / "metrics.jsonl") if "reward/proxy" in r
    ]
    assert told == pytest.approx(kept, rel=1e-5)


def test_wandb_works_offline(artifacts: Path, tmp_path: Path) -> None:
    done = command_line(
        "experiment=debug",
        "algo.steps=2",
        f"artifacts={artifacts}",
        "hydra.run.dir=run",
        "tracker=wandb",
        "tracker.mode=offline",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    finished(tmp_path / "run")
    [stored] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert stored.stat().st_size > 1_000
    assert contents(tmp_path) == {"run"} | {f"run/{x}" for x in contents(tmp_path / "run")}


# ---- sweeps


def test_a_sweep_runs_each_job_in_a_directory_of_its_own(artifacts: Path, tmp_path: Path) -> None:
    done = command_line(
        "-m",
        "experiment=debug",
        "algo.steps=2",
        "seed=0,1",
        f"artifacts={artifacts}",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    summaries = [finished(tmp_path / "sweep" / str(job)) for job in (0, 1)]
    assert [s["seed"] for s in summaries] == [0, 1]
    assert summaries[0]["proxy"]["after"] != summaries[1]["proxy"]["after"]
    assert summaries[0]["proxy"]["before"] == summaries[1]["proxy"]["before"]
    weights = {
        (tmp_path / "sweep" / str(job) / "policy" / "model.safetensors").read_bytes()
        for job in (0, 1)
    }
    assert len(weights) == 2
    assert done.stdout.count("gold was highest") == 2


def test_a_failing_job_does_not_stop_the_sweep(artifacts: Path, tmp_path: Path) -> None:
    done = command_line(
        "-m",
        "experiment=debug",
        "algo.steps=2",
        "policy.max_new_tokens=1000,24",
        f"artifacts={artifacts}",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "policy.max_new_tokens=1000" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweep" / "0" / "summary.json").exists()
    finished(tmp_path / "sweep" / "1")


def test_interrupting_a_sweep_lets_its_job_save(artifacts: Path, tmp_path: Path) -> None:
    arguments = ["experiment=debug", "algo.steps=500", "checkpoints.every=1000", "show_every=1000"]
    arguments += ["evaluation.every=1000", f"artifacts={artifacts}", "hydra.sweep.dir=sweep"]
    arguments += ["algo.batch=256", "algo.minibatch=64", "algo.epochs=4"]  # steps of a second
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    sweep = subprocess.Popen(
        command("-m", *arguments),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert sweep.poll() is None
            time.sleep(0.05)
        os.killpg(sweep.pid, signal.SIGINT)  # what Ctrl-C does: the whole process group gets it
        stderr = sweep.communicate(timeout=60)[1]
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
            sweep.wait()
    assert sweep.returncode == 130
    assert f"resume={tmp_path / 'sweep' / '0'}" in stderr
    [saved] = (tmp_path / "sweep" / "0" / "checkpoints").glob("step-*")
    verify(saved)


# ---- other rewards, policies, data


def two_steps(tmp_path: Path, artifacts: Path, *overrides: str) -> dict:
    """A small run in `tmp_path`/run that must succeed; its summary."""
    asked = ("experiment=debug", "algo.steps=2", f"artifacts={artifacts}", "hydra.run.dir=run")
    done = command_line(*asked, *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return finished(tmp_path / "run")


def test_lexicon_reward_with_a_lora_policy(artifacts: Path, tmp_path: Path) -> None:
    two_steps(
        tmp_path,
        artifacts,
        "reward=lexicon",
        "policy.lora={r: 4, target_modules: [c_attn]}",
    )
    used = json.loads((tmp_path / "run" / "run.json").read_text())["artifacts"]
    assert {Path(path).parent.name for path in used} == {"base", "sft"}  # a lexicon needs no pairs

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run" / "policy"
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "policy.json").read_text())["base"]
    )
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits.detach()
    model = PeftModel.from_pretrained(base, folder)
    assert model.peft_config["default"].r == 4
    assert not torch.equal(model(ids).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)


def test_function_reward_with_a_policy_trained_at_the_top(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "letters_reward.py").write_text(COUNT_E)
    two_steps(
        tmp_path,
        artifacts,
        "reward=function",
        "reward.function=letters_reward:count",
        "policy.train_top=1",
        "policy.sft=false",
    )
    for row in json.loads((tmp_path / "run" / "evaluation" / "step-000002.json").read_text())[
        "rows"
    ]:
        assert row["proxy"] == row["completion"].count("e")

    from transformers import AutoModelForCausalLM

    used = json.loads((tmp_path / "run" / "run.json").read_text())["artifacts"]
    start = next(path for path in used if Path(path).parent.name == "base")
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(p).named_parameters())
        for p in (start, tmp_path / "run" / "policy")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n.split(".")[2] for n in moved if ".h." in n} == {"1"}
    assert not {n for n in moved if "wte" in n or "wpe" in n}


def test_a_mix_of_rewards(artifacts: Path, tmp_path: Path) -> None:
    two_steps(
        tmp_path,
        artifacts,
        "reward=mix",
        "reward.parts.proxy.reward.size=2",
        "reward.parts.proxy.reward.member.epochs=1",
        "reward.parts.lexicon.weight=2",
    )
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(about["artifacts"].values()) == {"reused"}
    assert members(tmp_path / "run") == {"proxy", "lexicon"}
    for row in json.loads((tmp_path / "run" / "evaluation" / "step-000002.json").read_text())[
        "rows"
    ]:
        assert row["proxy"] == pytest.approx(
            row["proxy/proxy"] + 2 * row["proxy/lexicon"], abs=1e-5
        )


def test_prompts_of_ones_own(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"tell me about film {i}:"}) + "\n" for i in range(40))
    )
    assert (
        two_steps(
            tmp_path,
            artifacts,
            "data=local",
            "data.prompts=prompts.jsonl",
            "data.held_out_share=0.2",
            "policy=tiny",
            "policy.sft=false",
            "reward=lexicon",
        )["prompts"]
        == 8
    )
    held_out = {
        row["prompt"]
        for row in json.loads((tmp_path / "run" / "evaluation" / "step-000000.json").read_text())[
            "rows"
        ]
    }
    trained = {row["prompt"] for row in rows(tmp_path / "run" / "samples.jsonl")}
    assert trained
    assert not trained & held_out
