"""PyTorch's fully sharded data parallelism, second version: weights, gradients and optimizer state
divided among GPUs.

Left out: CPUs (Accelerate would run unsynchronized replicas there, without a word).
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rlhf_exp.hardware import Hardware


@dataclass(kw_only=True)
class FSDP(Hardware):
    """Processes that divide the model's state; `fsdp` are fields of Accelerate's
    FullyShardedDataParallelPlugin.
    """

    fsdp: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu":
            raise ValueError(
                "hardware.device=cpu cannot hold FSDP, which needs GPUs: use hardware=zero3"
            )

    @property
    def stage(self) -> int:
        return 3

    @property
    def offload_optimizer(self) -> bool:
        return bool(self.fsdp.get("cpu_offload"))

    @property
    def offload_parameters(self) -> bool:
        return bool(self.fsdp.get("cpu_offload"))

    @property
    def grouped(self) -> bool:
        return True

    @property
    def distributed_type(self) -> str:
        return "FSDP"

    def check(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("FSDP needs GPUs and torch sees none: use hardware=zero3 on a CPU")
        super().check()
        raise ValueError(
            "hardware=fsdp2 cannot sample and save policies yet: use hardware=zero3, which divides "
            "the same"
        )

    def plugin(self) -> Any:
        """Accelerate's FullyShardedDataParallelPlugin."""
        from accelerate.utils import FullyShardedDataParallelPlugin

        return FullyShardedDataParallelPlugin(fsdp_version=2, **self.fsdp)

    def _together(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        return Accelerator(
            fsdp_plugin=self.plugin(),
            mixed_precision=self.mixed_precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=self.timeout))],
        )
