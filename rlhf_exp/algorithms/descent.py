"""Optimizer steps as every own algorithm takes them: AdamW, learning rates that follow a schedule,
gradient clipping, and no step where loss or gradient is not finite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import processes
from rlhf_exp.hardware.engine import dividing


@dataclass
class Group:
    """Parameters that are trained alike."""

    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


class Descent:
    """Trains `groups` of parameters of `module`."""

    def __init__(
        self,
        accelerator: Any,
        module: nn.Module,
        groups: list[Group],
        *,
        betas: list[float],
        eps: float,
        max_grad_norm: float | None,
    ) -> None:
        optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups],
            betas=(betas[0], betas[1]),
            eps=eps,
            fused=True,
        )
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.engine = dividing(accelerator, module, optimizer, max_grad_norm)
        if self.engine is not None:
            self.module, self.optimizer = self.engine.module, self.engine.wrapper
        else:
            self.module, self.optimizer = accelerator.prepare(module, optimizer)
            self.trained = [p for group in groups for p in group.parameters]
        self.rates = [group.lr for group in groups]
        self.skipped = 0  # steps not taken

    def scale(self, factor: float) -> None:
        """Set every learning rate to `factor` times what it was built with."""
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * lr

    @property
    def lr(self) -> float:
        """The largest learning rate as it is now."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, of which every process has its summand."""
        (self.engine or self.accelerator).backward(loss * processes.count())  # they are averaged

    def restart(self) -> None:
        """Forget what the optimizer remembers of earlier gradients."""
        if self.engine is not None:
            self.engine.restart()
        else:
            self.optimizer.state.clear()

    def step(self, *, hold: bool = False) -> tuple[float, bool]:
        """One step down the gradients, unless they are not finite or `hold` says no; returns their
        norm and whether it is finite.
        """
        if self.engine is not None:
            norm, finite = self.engine.step(hold=hold)
            self.skipped += hold or not finite
            return norm, finite
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.trained, limit)
        finite = bool(torch.isfinite(norm))
        if finite and not hold:
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm) if finite else 0.0, finite

    def state(self) -> dict[str, Any]:
        """Optimizer state and count of skipped steps."""
        optimizer = (self.engine or self.optimizer).state_dict()
        return {"optimizer": optimizer, "skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        (self.engine or self.optimizer).load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]


def over_processes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums [] that every process has of its part, over all parts."""
    if processes.count() == 1:
        return sums
    return dict(zip(sums, processes.total(torch.stack(list(sums.values()))), strict=True))
