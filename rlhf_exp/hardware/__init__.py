"""Where a run works: its processes and their devices, and the accelerator that joins them.

`Hardware` is one process, or several with a whole copy of the model each (DDP); deepspeed.py and
fsdp.py divide the model's state among them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlhf_exp import processes
from rlhf_exp.choices import require

PLACEMENTS = ("replicated", "offloaded", "sharded")  # frozen.py says what they mean


@dataclass(kw_only=True)
class Hardware:
    """Processes that hold a whole copy of the model each."""

    device: str | None = "cpu"  # cpu or cuda; null: cuda where torch sees a GPU
    processes: int = 1  # per node, each with a device of its own
    nodes: int = 1  # more than one are started by srun or torchrun
    threads: int | None = None  # CPU threads of a process; null: the cores, divided
    mixed_precision: str = "no"  # no, bf16 or fp16: what matrices are multiplied in
    # where models lie that are asked and never trained: replicated, offloaded or sharded
    frozen: str = "replicated"
    timeout: int = 1800  # seconds after which a collective counts as hanging
    device_memory: float | None = None  # GiB of one device; null: what torch finds here
    peak_tflops: float | None = None  # dense bf16 TFLOP/s of one device; null: unknown

    def __post_init__(self) -> None:
        if self.device is not None:
            require(self.device, ("cpu", "cuda"), "hardware.device")
        require(self.mixed_precision, ("no", "bf16", "fp16"), "hardware.mixed_precision")
        require(self.frozen, PLACEMENTS, "hardware.frozen")
        for name in ("processes", "nodes", "timeout", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"hardware.{name}={value} must be at least 1")

    # ---- facts for a plan

    @property
    def stage(self) -> int:
        """What the processes divide: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights
        too.
        """
        return 0

    @property
    def masters(self) -> bool:
        """Whether the optimizer keeps float32 copies of the weights it trains."""
        return False

    @property
    def offload_optimizer(self) -> bool:
        """Whether optimizer state lies outside the device."""
        return False

    @property
    def offload_parameters(self) -> bool:
        """Whether weights lie outside the device while they are not used."""
        return False

    @property
    def grouped(self) -> bool:
        """Whether the run needs a process group."""
        return self.processes * self.nodes > 1

    @property
    def kind(self) -> str:
        """cpu or cuda, the one torch finds if none was named."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def memory(self) -> float | None:
        """GiB of one device: `device_memory`, or what torch finds here; None if there is none."""
        import torch

        if self.device_memory is not None or self.kind == "cpu" or not torch.cuda.is_available():
            return self.device_memory
        return torch.cuda.get_device_properties(0).total_memory / 2**30

    # ---- start

    def env(self) -> dict[str, str]:
        """Environment variables that must be set before torch is imported in a worker."""
        threads = self.threads
        if threads is None and self.processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, (os.cpu_count() or 1) // self.processes)
        return {"OMP_WAIT_POLICY": "PASSIVE"} | (
            {"OMP_NUM_THREADS": str(threads)} if threads else {}
        )

    def check(self) -> None:
        """Refuse what cannot start here: ValueError, before anything is written or loaded."""
        import torch

        if self.kind == "cuda":
            there = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if not there:
                raise ValueError("hardware.device=cuda, but torch sees no GPU: use hardware=cpu")
            if there < self.processes:
                raise ValueError(
                    f"hardware.processes={self.processes} needs as many GPUs on a node, but torch "
                    f"sees {there}: use hardware.processes={there}"
                )
        asked = self.processes * self.nodes
        if processes.joined() and processes.count() != asked:
            raise ValueError(
                f"torchrun or srun started {processes.count()} processes (WORLD_SIZE), but "
                f"hardware.processes={self.processes} times hardware.nodes={self.nodes} is "
                f"{asked}: give both the same number"
            )
        if self.nodes > 1 and not processes.joined() and processes.node() is None:
            raise ValueError(
                f"hardware.nodes={self.nodes} needs a command on every node: start it with "
                "-m hydra/launcher=slurm, or with srun or torchrun, as in launchers/slurm.sh"
            )

    def check_training(self, policy: Any, algo: Any) -> None:
        """Refuse a policy or an algorithm that cannot be trained here: ValueError, before anything
        is loaded.
        """

    def launch(self, directory: Path) -> None:
        """Do the run that `directory` describes: in place, as one of the group that torchrun or
        srun started, or in processes of its own.
        """
        from rlhf_exp import worker

        if processes.joined() or not self.grouped:
            worker.work(directory)
            return
        from rlhf_exp.hardware.launch import run_workers

        worker.at_work = directory
        run_workers(directory, self.processes, self.env(), processes.node())

    # ---- in a worker

    def place(self) -> Any:
        """This process's device (torch.device); sets its threads."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.kind == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read where a library imports deepspeed
            return torch.device("cpu")
        torch.cuda.set_device(processes.local_rank())
        return torch.device("cuda", processes.local_rank())

    def alone(self) -> Any:
        """The Accelerator of a process that works by itself; libraries read its precision."""
        from accelerate import Accelerator

        return Accelerator(cpu=self.kind == "cpu", mixed_precision=self.mixed_precision)

    def accelerator(self) -> Any:
        """The Accelerator of all processes, which join their group here.

        Models are loaded before, each process a whole one.
        """
        self.place()
        if not self.grouped:
            accelerator = self.alone()
        else:
            forget_accelerator()
            processes.reveal()
            accelerator = self._together()
        self._assert_as_asked(accelerator)
        return accelerator

    def _together(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        return Accelerator(
            cpu=self.kind == "cpu",
            mixed_precision=self.mixed_precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=self.timeout))],
        )

    @property
    def distributed_type(self) -> str:
        """Accelerate's name for what was asked for."""
        if not self.grouped:
            return "NO"
        return "MULTI_CPU" if self.kind == "cpu" else "MULTI_GPU"

    def _assert_as_asked(self, accelerator: Any) -> None:
        """Accelerate turns silently to another mode where it misses something."""
        got = accelerator.distributed_type.value, accelerator.num_processes, accelerator.device.type
        asked = self.distributed_type, self.processes * self.nodes, self.kind
        assert got == asked, f"asked for {asked}, got {got}"

    def release(self, accelerator: Any) -> None:
        """Take the group down, so that what comes after it may take as long as it likes."""
        if not self.grouped:
            return
        import gc

        accelerator.wait_for_everyone()
        for model in accelerator._models:
            if hasattr(model, "destroy"):  # an engine of DeepSpeed
                model.destroy()
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()


def forget_accelerator() -> None:
    """Let the next Accelerator of this process start from nothing."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
