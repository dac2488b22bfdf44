"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) divided among the
processes (Rajbhandari et al. 2020).

Left out: pipelines and tensor parallelism, and several trained engines in one process.
"""

import copy
import importlib.util
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rlhf_exp.choices import require
from rlhf_exp.hardware import Hardware


@dataclass(kw_only=True)
class DeepSpeed(Hardware):
    """Processes that divide the model's state; `deepspeed` is DeepSpeed's own configuration."""

    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "hardware.deepspeed.zero_optimization.stage"
        require(str(self.stage), ("1", "2", "3"), key)
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"{key}={self.stage} keeps weights on the device: use stage 3, or remove "
                "hardware.deepspeed.zero_optimization.offload_param"
            )
        if self.mixed_precision == "fp16" and self.device == "cpu":
            raise ValueError("hardware.mixed_precision=fp16 is not for a CPU: use bf16, or no")

    @property
    def stage(self) -> int:
        return self._zero.get("stage", 0)

    @property
    def masters(self) -> bool:
        return True

    @property
    def offload_optimizer(self) -> bool:
        return self._offloads("offload_optimizer")

    @property
    def offload_parameters(self) -> bool:
        return self._offloads("offload_param")

    @property
    def grouped(self) -> bool:
        return True

    @property
    def distributed_type(self) -> str:
        return "DEEPSPEED"

    @property
    def _zero(self) -> dict[str, Any]:
        return self.deepspeed.get("zero_optimization") or {}

    def _offloads(self, name: str) -> bool:
        return (self._zero.get(name) or {}).get("device", "none") != "none"

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "this hardware needs the package deepspeed: pip install deepspeed, or use "
                "hardware=cpu or gpu"
            )
        for name in ("offload_optimizer", "offload_param"):
            settings = self._zero.get(name) or {}
            if settings.get("device") == "nvme":
                key = f"hardware.deepspeed.zero_optimization.{name}.nvme_path"
                _require_writable(settings.get("nvme_path"), key)

    def configuration(self) -> dict[str, Any]:
        """`deepspeed`, with bf16 as autocast over fp32 weights: DeepSpeed's own bf16 wants every
        trained weight (value heads, adapters) in one dtype.
        """
        asked = copy.deepcopy(self.deepspeed)
        if self.mixed_precision == "bf16" and "bf16" not in asked:
            asked.setdefault("torch_autocast", {"enabled": True, "dtype": "bfloat16"})
        return asked

    def _together(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        if self.kind == "cpu":
            import deepspeed.ops

            # an operation for tensor parallelism that would be compiled now and never used
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _quiet()
        own = "bf16" in self.deepspeed or self.mixed_precision != "bf16"
        # gloo, and no cpu=True: with that, Accelerate leaves DeepSpeed out without a word
        group = InitProcessGroupKwargs(
            backend="gloo" if self.kind == "cpu" else None,
            timeout=timedelta(seconds=self.timeout),
        )
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self.configuration()),
            mixed_precision=self.mixed_precision if own else "no",
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[group],
        )
        _load_whole_models()
        return accelerator


def _require_writable(path: str | None, key: str) -> None:
    if path is None:
        raise ValueError(
            f"{key} must be given with device=nvme: name a folder on a fast local disk"
        )
    try:
        with tempfile.TemporaryFile(dir=path):
            return
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{key}={path} cannot be written to ({reason}): name a folder on a fast local disk"
        ) from None


def _quiet() -> None:
    """DeepSpeed speaks of errors only, and its calls of names that torch has renamed go unsaid."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)


def _load_whole_models() -> None:
    """Under ZeRO-3 transformers would divide what `from_pretrained` loads from here on; a frozen
    reward model or a policy that is saved alone must stay whole.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
