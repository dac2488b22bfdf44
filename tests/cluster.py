"""A SLURM cluster on this machine, made for the tests and ended with them: real daemons, two
pretended nodes of eight pretended GPUs, no accounting, no cgroups, no munge.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
# Names that are also addresses: what SLURM calls the first node can be connected to.
NODES = ("127.0.0.1", "127.0.0.2")
GPUS = 8

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2
KillWait=5
CompleteWait=0
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=64 RealMemory=512000 Gres=gpu:a100:{gpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def missing() -> list[str]:
    """Programs of SLURM that are not here, or the right to start them."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return lacking or ([] if os.geteuid() == 0 else ["root's rights"])


@dataclass
class Cluster:
    """A running cluster; `conf` is what SLURM_CONF must name."""

    root: Path

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller, first, second = _free_ports()
        text = CONF.format(
            root=self.root, host=host, controller=controller, first=first, second=second, gpus=GPUS
        )
        self.conf.write_text(text)
        for number in range(GPUS):  # names that end in a number and lead to a character device
            (self.root / f"nvidia{number}").symlink_to("/dev/null")
        devices = f"{self.root}/nvidia[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text(
            f"NodeName=127.0.0.[1-2] Name=gpu Type=a100 File={devices} Flags=nvidia_gpu_env\n"
        )
        (self.root / "state").mkdir()
        os.environ["SLURM_CONF"] = str(self.conf)
        self.run("slurmctld")
        for node in NODES:
            self.run("slurmd", "-N", node)
        until(
            lambda: (
                self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").count("\n")
                == 2
            )
        )

    def stop(self) -> None:
        """End the daemons this cluster started, and what they still ran."""
        subprocess.run(["scancel", "-u", "root"], capture_output=True, check=False)
        until(lambda: not self.run("squeue", "-h"), patience=20, strict=False)
        for file in self.root.glob("*.pid"):
            subprocess.run(["kill", file.read_text().strip()], check=False, capture_output=True)
        os.environ.pop("SLURM_CONF", None)

    def run(self, *command: str) -> str:
        """What a program of SLURM's says."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job, by its names for things."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def restart_now(self, number: str) -> None:
        """A requeued job waits two minutes; not here, but for a second, or SLURM takes what starts
        for what has just been ended.
        """
        until(lambda: self.job(number)["JobState"] == "PENDING")
        time.sleep(1.5)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def cut_short(self, number: str) -> None:
        """Leave a running job less than a minute."""
        hours, minutes, _ = self.job(number)["RunTime"].split(":")
        limit = 60 * int(hours) + int(minutes) + 1
        self.run("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")


def until(done: Callable[[], object], patience: float = 180, *, strict: bool = True) -> None:
    """Wait for `done()`."""
    deadline = time.monotonic() + patience
    while not done():
        if time.monotonic() > deadline:
            assert not strict, "waited too long"
            return
        time.sleep(0.1)


def _free_ports() -> tuple[int, int, int]:
    """Three ports that nobody uses now, the last two beside each other; others for each process of
    the tests, as what is left of a killed cluster talks to the port it knew. Runs meet at ports
    from 20,000 on.
    """
    for base in [19_000 + 10 * ((os.getpid() + n) % 90) for n in range(90)]:
        sockets = []
        try:
            for port in (base, base + 1, base + 2):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return base, base + 1, base + 2
    raise AssertionError("no free ports")
