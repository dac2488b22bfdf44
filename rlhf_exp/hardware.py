"""Where a run works: the environment of its process, the device, the accelerator."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.choices import require


class WorkerFailed(Exception):
    """A worker process ended badly; it has already said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the run's worker process ended with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(kw_only=True)
class Hardware:
    """One process on one device."""

    device: str = "cpu"  # cpu or cuda
    threads: int | None = None  # CPU threads; null: torch's default, all cores
    mixed_precision: str = "no"  # no, bf16 or fp16, through Accelerate

    def __post_init__(self) -> None:
        require(self.device, ("cpu", "cuda"), "hardware.device")
        require(self.mixed_precision, ("no", "bf16", "fp16"), "hardware.mixed_precision")

    def env(self) -> dict[str, str]:
        """Environment variables that must be set before torch is imported in a worker."""
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return {"OMP_WAIT_POLICY": "PASSIVE"} | threads

    def accelerator(self) -> Any:
        """The process's Accelerator; ValueError if the device is not there."""
        import torch
        from accelerate import Accelerator

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("hardware.device=cuda, but torch sees no GPU: use hardware=cpu")
        if self.threads:
            torch.set_num_threads(self.threads)
        accelerator = Accelerator(cpu=self.device == "cpu", mixed_precision=self.mixed_precision)
        assert accelerator.device.type == self.device, (
            f"asked for {self.device}, got {accelerator.device}"
        )
        return accelerator

    def launch(self, directory: Path, *, isolated: bool) -> None:
        """Do the run that `directory` describes: in place, or in a fresh process (jobs of a sweep
        share nothing).
        """
        if not isolated:
            from rlhf_exp.worker import work

            work(directory)
            return
        command = [sys.executable, "-m", "rlhf_exp.worker", str(directory)]
        worker = subprocess.Popen(command, env=os.environ | self.env())
        interrupted = False
        while (code := worker.poll()) is None:
            try:
                worker.wait()
            except KeyboardInterrupt:  # Ctrl-C reached the worker too; let it save
                interrupted = True
        if interrupted:
            raise KeyboardInterrupt
        if code:
            raise WorkerFailed(code if code > 0 else 128 - code)
