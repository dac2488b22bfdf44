"""The plan: what a run will hold in memory, how much it computes and how long that takes, told
before any weights load.

    python -m rlhf_exp algo=ppo policy=pythia_1.4b hardware=zero3 plan=true

Every model is known by its config, every pass is done over shapes (passes.py), and the arithmetic
of ZeRO comes on top (memory.py). Stages count as if no artifact were there yet. Where a phase does
not fit into the device, the nearest settings that would are found by planning again (cures.py).

Nothing heavy is imported before a plan is asked for.
"""

from dataclasses import dataclass, field
from typing import Any

KINDS = ("sample", "score", "learn")  # as in time/<kind> of the metrics


@dataclass(kw_only=True)
class Planning:
    """What the plan takes for granted about speed."""

    # share of hardware.peak_tflops that is reached in each kind of work, if no run has shown it
    utilization: dict[str, float] = field(
        default_factory=lambda: {"sample": 0.03, "score": 0.4, "learn": 0.4}
    )
    measured: str | None = None  # run directory whose speed is taken in its place

    def __post_init__(self) -> None:
        odd = sorted(set(KINDS) ^ set(self.utilization))
        if odd or not all(0 < share <= 1 for share in self.utilization.values()):
            raise ValueError(
                f"planning.utilization={self.utilization} must give a share above 0 and up to 1 "
                f"for each of {', '.join(KINDS)}"
            )


def show(config: dict[str, Any]) -> None:
    """Print the plan, and what to change if it does not fit."""
    from rlhf_exp.plan.cures import cure
    from rlhf_exp.plan.estimate import as_table, make

    known: dict[str, Any] = {}
    plan = make(config, known)
    print(as_table(plan))
    if not plan.fits:
        print(cure(config, known))


def refuse(config: dict[str, Any]) -> None:
    """ValueError if the device is known and the run cannot fit into it."""
    if not _device_known(config["hardware"]):
        return
    from rlhf_exp.plan.cures import cure
    from rlhf_exp.plan.estimate import make, verdict

    known: dict[str, Any] = {}
    plan = make(config, known)
    if not plan.fits:
        raise ValueError(
            f"{verdict(plan)}: {cure(config, known)}; plan=true shows all, plan=force runs anyway"
        )


def _device_known(hardware: dict[str, Any]) -> bool:
    """A CPU's memory counts only where it is stated: what else runs there is not known."""
    if hardware.get("device_memory") is not None or hardware["device"] == "cpu":
        return hardware.get("device_memory") is not None
    import torch

    return torch.cuda.is_available()
