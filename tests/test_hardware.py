"""Hardware presets, what they refuse, and worker processes that start and end together."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from hydra import compose, initialize_config_dir

from rlhf_exp import precision, processes
from rlhf_exp.config import build, conf_directory, overridden, resolved
from rlhf_exp.hardware import Hardware, launch
from rlhf_exp.hardware.deepspeed import DeepSpeed
from rlhf_exp.hardware.fsdp import FSDP


def preset(name: str, *overrides: str) -> Hardware:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("config", overrides=[f"hardware={name}", *overrides])
    return build(resolved(config)["hardware"], "hardware")


# ---- presets


@pytest.mark.parametrize(
    ("name", "kind", "processes", "nodes", "stage", "offloads", "grouped"),
    [
        ("cpu", Hardware, 1, 1, 0, False, False),
        ("gpu", Hardware, 1, 1, 0, False, False),
        ("zero1", DeepSpeed, 1, 1, 1, False, True),
        ("zero2", DeepSpeed, 1, 1, 2, False, True),
        ("zero3", DeepSpeed, 1, 1, 3, False, True),
        ("zero3_offload", DeepSpeed, 1, 1, 3, True, True),
        ("fsdp2", FSDP, 1, 1, 3, False, True),
        ("a100x8_zero2", DeepSpeed, 8, 1, 2, False, True),
        ("a100x8_zero3", DeepSpeed, 8, 1, 3, False, True),
        ("multinode", DeepSpeed, 8, 2, 3, False, True),
    ],
)
def test_facts_of_a_preset(
    name: str, kind: type, processes: int, nodes: int, stage: int, offloads: bool, grouped: bool
) -> None:
    hardware = preset(name)
    assert type(hardware) is kind
    assert (hardware.processes, hardware.nodes, hardware.stage) == (processes, nodes, stage)
    assert hardware.offload_optimizer == hardware.offload_parameters == offloads
    assert hardware.grouped == grouped
    a100 = name.startswith(("a100", "multi"))
    assert hardware.memory() == hardware.device_memory == (80 if a100 else None)
    assert hardware.peak_tflops == (312 if a100 else None)


def test_every_preset_is_tested() -> None:
    marks = test_facts_of_a_preset.pytestmark  # type: ignore[attr-defined]
    tested = {case[0] for case in marks[0].args[1]}
    assert tested == {p.stem for p in (conf_directory() / "hardware").glob("*.yaml")}


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Hardware(processes=4).env()["OMP_NUM_THREADS"] == "4"
    assert Hardware(processes=4, threads=2).env()["OMP_NUM_THREADS"] == "2"
    assert Hardware().env() == {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # of whoever starts it
    assert Hardware(processes=4).env() == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert Hardware(processes=4, threads=2).env()["OMP_NUM_THREADS"] == "2"


def test_bf16_leaves_weights_in_fp32() -> None:
    hardware = preset("zero2", "hardware.mixed_precision=bf16")
    assert isinstance(hardware, DeepSpeed)
    asked = hardware.configuration()
    assert asked["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "torch_autocast" not in hardware.deepspeed  # what was asked for stays as it is
    own = preset("zero2", "hardware.mixed_precision=bf16", "+hardware.deepspeed.bf16.enabled=true")
    assert isinstance(own, DeepSpeed)
    assert "torch_autocast" not in own.configuration()


# ---- refusals


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"hardware\.processes=8 .* sees 2: use .*processes=2"):
        preset("a100x8_zero3").check()
    Hardware(device="cuda", processes=2).check()


def test_a_group_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    four = processes.Group(1, 4, 1, None, {}, keeps_store=False)
    monkeypatch.setattr(processes, "_group", four)
    with pytest.raises(ValueError, match=r"started 4 processes \(WORLD_SIZE\).*processes=3"):
        Hardware(processes=3).check()
    Hardware(processes=2, nodes=2).check()


def test_several_nodes_are_not_started_from_one() -> None:
    with pytest.raises(ValueError, match=r"hardware\.nodes=2 .* srun or torchrun"):
        Hardware(processes=2, nodes=2).check()


def test_deepspeed_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the package deepspeed: pip install deepspeed"):
        preset("zero2").check()


@pytest.mark.parametrize("path", ["null", "/dev/null/x", "/nowhere"])
def test_an_offload_folder_that_cannot_be_written_to(path: str, tmp_path: Path) -> None:
    key = "hardware.deepspeed.zero_optimization.offload_param"
    hardware = preset("zero3_offload", f"{key}.device=nvme", f"{key}.nvme_path={path}")
    if path == "null":
        with pytest.raises(
            ValueError, match=r"offload_param\.nvme_path must be given .* name a folder"
        ):
            hardware.check()
        return
    with pytest.raises(ValueError, match=rf"offload_param\.nvme_path={path} cannot be written to"):
        hardware.check()
    preset("zero3_offload", f"{key}.device=nvme", f"{key}.nvme_path={tmp_path}").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 0}, r"hardware\.processes=0 must be at least 1"),
        ({"timeout": 0}, r"hardware\.timeout=0"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, r"zero_optimization\.stage=4"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}},
            r"stage=2 keeps weights on the device: use stage 3",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}, "mixed_precision": "fp16"},
            r"fp16 is not for a CPU",
        ),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSpeed(**settings)


# ---- workers, with something lighter than a run in them


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Starts `count` workers that do `code`, which knows its `rank`; gives them, dead."""
    started: list[subprocess.Popen[bytes]] = []

    def start(directory: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        told = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + start.code
        command = [sys.executable, "-c", told]
        started.append(
            subprocess.Popen(command, env=os.environ | env, cwd=tmp_path, start_new_session=True)
        )
        return started[-1]

    def run(code: str) -> None:
        start.code = code
        launch.run_workers(tmp_path, 2, {})

    start.code = ""
    monkeypatch.setattr(launch, "start", start)
    yield run
    assert len(started) == 2
    assert None not in [worker.returncode for worker in started]


def test_workers_that_end_well(workers) -> None:
    workers("time.sleep(0.2 * rank)")


def test_one_that_fails_ends_all(workers) -> None:
    began = time.monotonic()
    with pytest.raises(processes.WorkerFailed) as failed:
        workers("time.sleep(60) if rank == 0 else sys.exit(5)")
    assert failed.value.exit_code == 5
    assert time.monotonic() - began < 4


def test_one_that_will_not_end_is_killed(workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    stubborn = "signal.signal(signal.SIGQUIT, signal.SIG_IGN); open('up', 'w'); time.sleep(60)"
    other = "while not os.path.exists('up'): time.sleep(0.02)\n    sys.exit(1)"
    with pytest.raises(processes.WorkerFailed):
        workers(f"if rank == 0:\n    {stubborn}\nelse:\n    {other}")


def test_one_that_is_killed_is_told_of(workers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"process 1 .* SIGKILL .*resume={tmp_path}"):
        workers("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)")


SAVING = """
def save(number, frame):
    time.sleep(0.6 * rank)  # a step that takes longer than that of the other
    open(f"saved-{rank}", "w").close()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, save)
open(f"up-{rank}", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_workers_which_save(workers, tmp_path: Path, number: signal.Signals) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("up-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(processes.WorkerFailed) as ended:
        workers(SAVING)
    thread.join()
    assert ended.value.exit_code == 128 + number
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert signal.getsignal(number) == before


def test_a_parent_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    child = (
        "import time\nfrom rlhf_exp.worker import die_with_parent\n"
        "die_with_parent()\nopen('up', 'w').close()\ntime.sleep(60)"
    )
    code = (
        "import os, subprocess, sys, time\n"
        "os.environ['RLHF_EXP_PARENT'] = str(os.getpid())\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "print(p.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _state(pid: int) -> str:
    """R, S, Z ... as in /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


# ---- what a resumed run may change


def test_overrides_of_a_hardware_that_is_written_down() -> None:
    written = {"_target_": "rlhf_exp.hardware.Hardware", **asdict(Hardware(processes=2))}
    more = overridden("hardware", written, ["hardware.processes=4", "hardware.timeout=60"])
    assert more == written | {"processes": 4, "timeout": 60}
    other = overridden("hardware", written, ["hardware=zero2", "hardware.processes=1"])
    assert other["deepspeed"]["zero_optimization"]["stage"] == 2
    assert other["processes"] == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hardware=zero9", "hardware=zero9 is not an option; there are .* did you mean zero"),
        ("hardware.processs=2", "hardware.processs is not a setting.*hardware.processes"),
        ("hardware.processes=many", "hardware.processes: .*many"),
        ("hardware.processes=[2", "cannot be read as an override"),
    ],
)
def test_overrides_that_cannot_be(argument: str, message: str) -> None:
    written = {"_target_": "rlhf_exp.hardware.Hardware", **asdict(Hardware())}
    with pytest.raises(ValueError, match=message):
        overridden("hardware", written, [argument])


def test_fsdp_has_no_copies_of_half_precision_weights() -> None:
    policy = tiny_policy(dtype="bfloat16", sft=False)
    precision.check(policy, preset("zero2"), trains=True)
    for name in ("cpu", "fsdp2"):
        with pytest.raises(ValueError, match=r"policy\.dtype=bfloat16 rounds away"):
            precision.check(policy, preset(name), trains=True)
