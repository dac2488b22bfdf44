"""Where the weights of a model lie that is asked and never trained (a reference, a reward model)
while nobody asks it.

replicated: on the device of every process; no transfers.
offloaded:  in the memory of the host; a question brings them to the device and drops them after it.
sharded:    divided among the processes, gathered for a question, as ZeRO-3 does with a policy that
            samples.

A model must fit on a device by itself. Left out: larger ones, and a sharded model that one process
asks alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_exp import processes

_chosen = "replicated"


@contextmanager
def placed(placement: str) -> Iterator[None]:
    """Models that become `Frozen` in this block lie as `placement` says."""
    global _chosen
    before, _chosen = _chosen, placement
    try:
        yield
    finally:
        _chosen = before


def placement() -> str:
    """Where models lie that become `Frozen` now."""
    return _chosen


class Frozen:
    """`model`, of which the parameters (all, or those given) are put away until `ready`."""

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.device, self.depth = model, torch.device(device), 0
        self.placement = _chosen
        if self.placement == "sharded" and processes.count() == 1:
            self.placement = "replicated"  # there is nobody to share with
        if self.placement == "replicated":
            if {p.device for p in model.parameters()} - {self.device}:
                model.to(device)
            return
        self.processes = processes.count()
        found = list(model.parameters() if parameters is None else parameters)
        self.parameters = [p for p in found if p.is_floating_point()]  # quantized ones stay
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        self.shapes = [p.shape for p in self.parameters]
        self.kept = [self._keep(p.detach()) for p in self.parameters]
        self._drop()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """All weights are on the device, in this block. Every process comes here as often as the
        others, if they are sharded.
        """
        if self.placement != "replicated" and self.depth == 0:
            self._bring()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.placement != "replicated" and self.depth == 0:
                self._drop()

    def _keep(self, weight: Tensor) -> Tensor:
        """What of a weight stays between questions: the whole on the host, or a part [m] on the
        device.
        """
        if self.placement == "offloaded":
            kept = weight.to("cpu")
            return kept.pin_memory() if self.device.type == "cuda" else kept
        flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % self.processes))
        return flat.chunk(self.processes)[processes.rank()].to(self.device, copy=True)

    def _bring(self) -> None:
        if self.placement == "sharded" and processes.count() != self.processes:
            raise ValueError(
                "hardware.frozen=sharded divides a model that one process now asks alone: use "
                "hardware.frozen=offloaded or replicated"
            )
        for parameter, kept, shape in zip(self.parameters, self.kept, self.shapes, strict=True):
            if self.placement == "offloaded":
                parameter.data = kept.to(self.device, non_blocking=True)
                continue
            whole = kept.new_empty(self.processes * kept.numel())
            torch.distributed.all_gather_into_tensor(whole, kept)
            parameter.data = whole[: shape.numel()].view(shape)

    def _drop(self) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            offloaded = self.placement == "offloaded"
            parameter.data = kept if offloaded else kept.new_empty(0)
