"""Optimizer steps through an engine of DeepSpeed: any number of backward passes, then a step.

The engine averages gradients over the processes, clips by the norm of all of them, and takes no
step where that norm is not finite. State is saved whole, in the form of torch's own AdamW, so that
any number of processes, any stage and plain hardware continue from it.

Left out: fp16, whose loss scaler has a state of its own, and several engines in one process.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import processes
from rlhf_exp.hardware.sharded import Sharded

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


class Engine:
    """`module` and AdamW `optimizer` as one engine; every process calls everything, as often as
    the others do.
    """

    def __init__(
        self, accelerator: Any, module: nn.Module, optimizer: Any, max_grad_norm: float | None
    ) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        config = accelerator.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = max_grad_norm or 0.0
        config["managed_gradient_accumulation"] = False  # step() is when it is called
        engine, wrapper = accelerator.prepare(module, optimizer)
        self._adopt(engine, wrapper, groups)

    @classmethod
    def around(cls, module: Any, wrapper: Any, groups: list[list[nn.Parameter]]) -> "Engine":
        """What somebody else prepared: DeepSpeed's engine, Accelerate's wrapper of its optimizer,
        and the groups of parameters this was made for.
        """
        found = cls.__new__(cls)
        found._adopt(module, wrapper, groups)
        return found

    def _adopt(self, module: Any, wrapper: Any, groups: list[list[nn.Parameter]]) -> None:
        self.parameters = [p for group in groups for p in group]
        self.sizes = [len(group) for group in groups]
        self.module, self.wrapper = module, wrapper
        self.optimizer = wrapper.optimizer  # DeepSpeed's, around torch's
        self.sharded = module.zero_optimization_stage() == 3
        self.reloaded = False  # weights were loaded since the last step

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, averaged over the processes."""
        self.module.backward(loss)

    def step(self, *, hold: bool = False) -> tuple[float, bool]:
        """As `Descent.step`."""
        if self.reloaded:
            self.optimizer.refresh_fp32_params()
            self.reloaded = False
        with _refusing(self.optimizer) if hold else nullcontext([]) as norms:
            self.module.step()
        norm = float(norms[0] if hold else self.module.get_global_grad_norm())
        finite = math.isfinite(norm) and norm >= 0  # DeepSpeed says -1 for some that are not
        return norm if finite else 0.0, finite

    def restart(self) -> None:
        """As `Descent.restart`; weights may have been put back, too."""
        self.reloaded = True
        for moments in self._adam.state.values():
            for value in moments.values():
                value.zero_()

    # ---- resume

    @property
    def _adam(self) -> Any:
        return self.optimizer.optimizer

    @property
    def _flat(self) -> list[Tensor]:
        """The fp32 weights that this process updates, as torch's optimizer knows them."""
        if self.sharded:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def state_dict(self) -> dict[str, Any]:
        """What the state_dict of torch's AdamW would be in one process."""
        state: dict[int, dict[str, Tensor]] = {}
        if self._adam.state:
            self._link()
            step = torch.as_tensor(self._adam.state[self._flat[0]]["step"]).cpu()
            for i, parameter in enumerate(self.parameters):
                moments = {name: self._get(parameter, name) for name in MOMENTS}
                state[i] = {"step": step.clone()} | moments
        return {"state": state, "param_groups": self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        return [
            {k: v for k, v in group.items() if k != "params"} | {"params": list(range(a, b))}
            for group, a, b in zip(self._adam.param_groups, ends, ends[1:], strict=False)
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave, here or elsewhere; weights are loaded before the next
        step.
        """
        self.reloaded = True
        for group, saved in zip(self._adam.param_groups, state["param_groups"], strict=True):
            group |= {k: v for k, v in saved.items() if k != "params"}
        if not state["state"]:
            return
        for flat in self._flat:
            step = state["state"][0]["step"].clone().to(flat.device)
            self._adam.state[flat] = {"step": step}
            self._adam.state[flat] |= {name: torch.zeros_like(flat) for name in MOMENTS}
        self._link()
        for i, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                self._put(parameter, state["state"][i][name].to(parameter.device), name)

    def _link(self) -> None:
        """Let parameters find their moments: stages 1 and 2 do so for the first group only."""
        if not self.sharded:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: Any, name: str) -> Tensor:
        """The whole moment `name` of a parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = safe_get_full_optimizer_state(parameter, name)
        assert found is not None, f"DeepSpeed keeps no {name} of a trained parameter"
        return found.cpu().clone()

    def _put(self, parameter: Any, value: Tensor, name: str) -> None:
        """Keep this process's part of the moment `name`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self.sharded:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        size, rank = parameter.ds_tensor.numel(), processes.rank()
        padded = nn.functional.pad(value.flatten(), (0, size * processes.count() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], name)


@contextmanager
def _refusing(optimizer: Any) -> Iterator[list[Tensor]]:
    """DeepSpeed's optimizer takes gradients for not finite and drops them, in this block, which
    gets their norm.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    by_group = hasattr(optimizer, "_get_norm_groups")
    name = "_get_norm_groups" if by_group else "scaled_global_norm"
    measure, norms = getattr(optimizer, name), []

    def refuse() -> Any:
        found = measure()
        norms.append(combine_grad_norm_groups(found) if by_group else found)
        return [torch.tensor(math.inf)] if by_group else torch.tensor(math.inf)

    setattr(optimizer, name, refuse)
    try:
        yield norms
    finally:
        delattr(optimizer, name)


def dividing(
    accelerator: Any, module: nn.Module, optimizer: Any, max_grad_norm: float | None
) -> Engine | Sharded | None:
    """What trains `module` where the processes of `accelerator` divide its state; None where each
    holds all of it.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        return Engine(accelerator, module, optimizer, max_grad_norm)
    if hasattr(accelerator, "sharding"):
        return Sharded(accelerator, module, optimizer, max_grad_norm)
    return None


@contextmanager
def whole(accelerator: Any) -> Iterator[None]:
    """Every process holds all weights of what `accelerator` prepared, in this block: to sample by
    an inner model, to read weights or to load them (the main process's values are kept).

    Under ZeRO-3 and FSDP only; elsewhere weights are whole.
    """
    sharding = getattr(accelerator, "sharding", None)
    if sharding is not None and sharding.engine is not None:
        with sharding.engine.whole():
            yield
        return
    divided = [
        module
        for module in accelerator._models
        if getattr(module, "zero_optimization_stage", lambda: 0)() == 3
    ]
    if not divided or getattr(divided[0], "held_whole", False):
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    (module,) = divided
    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        remove_hooks(module)
        module.held_whole = True  # a block within this one has nothing to do
        try:
            yield
        finally:
            module.held_whole = False
            add_hooks(module)
