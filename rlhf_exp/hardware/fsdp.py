"""PyTorch's fully sharded data parallelism, second version: weights, gradients and optimizer state
divided among the processes, on GPUs or CPUs.

The group is a plain one: sharded.py divides the module where an algorithm makes its optimizer.
Accelerate's own FSDP is not used: it is for GPUs only, and would run unsynchronized replicas on
CPUs without a word. What trains through it, TRL's trainers, is refused.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from rlhf_exp.hardware import Hardware


@dataclass(kw_only=True)
class FSDP(Hardware):
    """Processes that divide the model's state by torch's `fully_shard`."""

    reshard_after_forward: bool = True  # false keeps gathered weights until the backward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixed_precision == "fp16":
            raise ValueError(
                "hardware.mixed_precision=fp16 needs a loss scaler, which hardware=fsdp2 has not: "
                "use bf16, or no"
            )

    @property
    def stage(self) -> int:
        return 3

    @property
    def grouped(self) -> bool:
        return True

    def check_training(self, policy: Any, algo: Any) -> None:
        from rlhf_exp.algorithms.trainer import TrainerAlgorithm

        if isinstance(algo, TrainerAlgorithm):
            raise ValueError(
                f"algo={algo.name} trains by a trainer of TRL, which hardware=fsdp2 cannot divide: "
                "use hardware=zero3, which divides the same"
            )
        if policy.quantization is not None:
            raise ValueError(
                f"policy.quantization={policy.quantization} makes weights that hardware=fsdp2 "
                "cannot divide: use hardware=zero3, or policy.quantization=null"
            )

    def _together(self) -> Any:
        from rlhf_exp.hardware.sharded import Sharding

        # logits are cut to the responses, and nothing changes them in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        accelerator = super()._together()
        accelerator.sharding = Sharding(self.reshard_after_forward)
        return accelerator
