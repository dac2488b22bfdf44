"""Learning rates: of which parameters, and how they go over the steps; for our own algorithms and
TRL's alike.

`lr` is of everything, unless a group has a rate of its own: adapters, embeddings, the head. With
`layer_decay` d, the k-th block from the top learns at d^k times its rate and what comes before the
first of L blocks at d^(L+1) (Howard and Ruder 2018, arXiv 1801.06146, section 3.2: d = 1/2.6; Clark
et al. 2020, ELECTRA, appendix A: d = 0.8). A head that is tied to the embeddings is one of them.

Left out: rates that move differently over time (Howard and Ruder's gradual unfreezing).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from rlhf_exp import losses, weights
from rlhf_exp.algorithms.descent import Group
from rlhf_exp.choices import require

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class Rates:
    """AdamW's settings for a policy."""

    key: ClassVar[str] = "algo"  # where the settings are given

    lr: float = 1e-4
    adapter_lr: float | None = None  # of LoRA's matrices; null: lr
    embedding_lr: float | None = None  # null: lr, as layer_decay says
    head_lr: float | None = None  # of an output layer that is not tied; null: lr
    layer_decay: float = 1.0  # rate of a block as a share of that of the block above it
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant, linear or cosine
    # steps after which the schedule has reached its floor; null: all
    schedule_steps: int | None = None
    warmup: float = 0.0  # steps with a rising learning rate; below 1: a share of all steps
    lr_floor: float = 0.0  # last learning rate as a share of lr

    def __post_init__(self) -> None:
        require(self.schedule, SCHEDULES, f"{self.key}.schedule")
        for name in ("lr", "adapter_lr", "embedding_lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{self.key}.{name}={value} must not be negative")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ValueError(f"{self.key}.schedule_steps={self.schedule_steps} must be positive")
        if self.warmup < 0 or (self.warmup > 1 and self.warmup != int(self.warmup)):
            raise ValueError(
                f"{self.key}.warmup={self.warmup} must be a number of steps, or a share of them "
                "below 1"
            )
        if not 0 < self.layer_decay <= 1 or not 0 <= self.lr_floor <= 1:
            raise ValueError(
                f"{self.key}.layer_decay={self.layer_decay} must be above 0 and at most 1, and "
                f"{self.key}.lr_floor={self.lr_floor} between 0 and 1"
            )
        if len(self.betas) != 2 or self.weight_decay < 0:
            raise ValueError(
                f"{self.key}.weight_decay={self.weight_decay} must not be negative, and "
                f"{self.key}.betas={self.betas} two numbers"
            )

    # ---- over the steps

    def warmup_steps(self, steps: int) -> int:
        """Of `steps`."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def lr_scale(self, step: int, steps: int) -> float:
        """Multiplier of every rate at `step` of `steps`."""
        return losses.lr_scale(
            step,
            total=self.schedule_steps or steps,
            warmup=self.warmup_steps(steps),
            schedule=self.schedule,
            floor=self.lr_floor,
        )

    # ---- of which parameters

    def by_rate(self, model: Any) -> list[Group]:
        """The parameters of `model` that are trained, by rate. Rows that are trained alone (control
        tokens) come last and do not decay: that would reach the other rows.
        """
        rates = self.rates(model)
        found: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                kind = weights.trains_rows(parameter), rates(parameter)
                found.setdefault(kind, []).append(parameter)
        return [
            Group(found[rows, lr], lr, 0.0 if rows else self.weight_decay)
            for rows, lr in sorted(found, key=lambda kind: kind[0])
        ]

    def rates(self, model: Any) -> Callable[[nn.Parameter], float]:
        """The rate of each parameter of `model`, a policy's; parameters of other modules (a value
        head) have `lr`.
        """
        found = dict(self._rates(model))
        return lambda parameter: found.get(id(parameter), self.lr)

    def _rates(self, model: Any) -> Iterator[tuple[int, float]]:
        """Identity and rate, of each parameter once."""
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        depths = self._depths(inner)
        head = {id(p) for p in inner.get_output_embeddings().parameters()}
        looked_up = {
            id(module.weight) for module in inner.modules() if isinstance(module, nn.Embedding)
        }
        bottom, above = max(depths.values(), default=0) + 1, False
        for name, parameter in model.named_parameters():
            above = above or id(parameter) in depths
            own, depth = None, depths.get(id(parameter), 0 if above else bottom)
            if "lora_" in name:
                base = self.lr if self.adapter_lr is None else self.adapter_lr
                yield id(parameter), base * self.layer_decay**depth
                continue
            if id(parameter) in looked_up:
                own, depth = self.embedding_lr, bottom
            elif id(parameter) in head:
                own = self.head_lr
            yield id(parameter), self.lr * self.layer_decay**depth if own is None else own

    def _depths(self, inner: Any) -> dict[int, int]:
        """How far from the top the block of a parameter is: 1 for the last block."""
        if self.layer_decay == 1.0:
            return {}
        blocks = weights.blocks(inner)
        return {
            id(p): len(blocks) - i for i, block in enumerate(blocks) for p in block.parameters()
        }
