"""Optimizer steps where PyTorch's `fully_shard` (FSDP2) divides weights, gradients and optimizer
state among the processes, over NCCL or gloo (Zhao et al. 2023, arXiv 2304.11277, describe the first
version).

A unit's weights are gathered for its own forward and backward pass: each transformer block is one,
the language model around them another, and the module that is trained, with a value head, the
last. Gradients are averaged over the processes. State is saved whole, in the form of torch's own
AdamW, as by engine.py.

Left out: fp16, quantized weights, weights in the host's memory, and shards that only the processes
of one node divide.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import processes, weights


@dataclass
class Sharding:
    """How an accelerator's module is to be divided, and by whom it is."""

    reshard_after_forward: bool
    engine: "Sharded | None" = None


class Sharded:
    """`module` and AdamW `optimizer` as one; every process calls everything, as often as the others
    do.
    """

    def __init__(
        self, accelerator: Any, module: nn.Module, optimizer: Any, max_grad_norm: float | None
    ) -> None:
        assert accelerator.sharding.engine is None, "one module is divided in a run"
        accelerator.sharding.engine = self
        self.module, self.wrapper = module, optimizer  # names that engine.py has, too
        self.limit = math.inf if max_grad_norm is None else max_grad_norm
        self.held_whole = False
        before = dict(module.named_parameters())
        # for its autocast alone: neither DDP nor a move to another device
        accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
        self.units = _divided(module, accelerator)
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        self.places = [
            (owner, key, p)
            for owner in module.modules()
            for key, p in owner._parameters.items()
            if p is not None
        ]
        self._hand_on_hooks(before)
        now = {id(p): self.parameters[name] for name, p in before.items()}
        for group in optimizer.param_groups:
            group["params"] = [now[id(p)] for p in group["params"]]

    def _hand_on_hooks(self, before: dict[str, nn.Parameter]) -> None:
        """Let what was registered on parameters reach the gradients of those in their place."""
        hooked = {name: p._backward_hooks for name, p in before.items() if p._backward_hooks}
        if not hooked:
            return
        for unit in self.units:
            unit.unshard()
        gathered = dict(self.module.named_parameters())  # the same ones at every gathering
        for name, hooks in hooked.items():
            for hook in hooks.values():
                gathered[name].register_hook(hook)
        for unit in self.units:
            unit.reshard()

    # ---- steps

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, averaged over the processes."""
        loss.backward()

    @torch.no_grad()
    def step(self, *, hold: bool = False) -> tuple[float, bool]:
        """As `Descent.step`; clips by the norm over all shards."""
        gradients = [p.grad.to_local() for p in self.parameters.values() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square()
        norm = processes.total(square).sqrt()
        finite = bool(torch.isfinite(norm))
        if finite and not hold:
            factor = (self.limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
            self.wrapper.step()
        self.wrapper.zero_grad(set_to_none=True)
        return float(norm) if finite else 0.0, finite

    def restart(self) -> None:
        """As `Descent.restart`."""
        self.wrapper.state.clear()

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """What the state_dict of torch's AdamW would be in one process."""
        found = self.wrapper.state_dict()
        state = {
            i: {name: _gathered(value) for name, value in moments.items()}
            for i, moments in found["state"].items()
        }
        return {"state": state, "param_groups": found["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave, here or elsewhere."""
        owners = [p for group in self.wrapper.param_groups for p in group["params"]]
        divided = {
            i: {
                name: _share(value, owners[i]) if value.ndim else value
                for name, value in moments.items()
            }
            for i, moments in state["state"].items()
        }
        self.wrapper.load_state_dict(state | {"state": divided})

    # ---- all weights

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In this block the module is as if nobody had divided it: plain, with whole parameters of
        its own on every process. What they are after it goes back to the shards, so whoever loads
        weights loads the same ones on every process.
        """
        if self.held_whole:  # a block within this one has nothing to do
            yield
            return
        taken = [_taken_off(unit) for unit in self.units]
        with torch.no_grad():
            held = {
                id(p): nn.Parameter(p.full_tensor(), requires_grad=p.requires_grad)
                for p in self.parameters.values()
            }
        for owner, key, p in self.places:
            owner._parameters[key] = held[id(p)]
        self.held_whole = True
        try:
            yield
        finally:
            self.held_whole = False
            for owner, key, p in self.places:
                owner._parameters[key] = p
            with torch.no_grad():
                for p in self.parameters.values():
                    p.to_local().copy_(_share(held[id(p)], p).to_local())
            for unit, fully_sharded in zip(self.units, taken, strict=True):
                _put_back(unit, *fully_sharded)


def _divided(module: nn.Module, accelerator: Any) -> list[Any]:
    """The units of `module`, inner ones first, each with its shards from here on."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = next(m for m in module.modules() if hasattr(m, "generate"))
    units: list[Any] = [*weights.blocks(model), model]
    units += [module] if model is not module else []
    mesh = init_device_mesh(accelerator.device.type, (processes.count(),))
    reshard = accelerator.sharding.reshard_after_forward
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    for state in [unit._get_fsdp_state() for unit in units]:
        for parameter in [p for group in state._fsdp_param_groups for p in group.fsdp_params]:
            parameter._post_load_hook_handle.remove()  # weights are loaded whole
    # the root is what runs forward first, but samplers and references ask the inner model
    units[-1]._get_fsdp_state()._lazy_init()
    return units


def _taken_off(unit: Any) -> tuple[type, dict[str, Any]]:
    """Make `unit` what it was before `fully_shard`, which knows no way back; returns what that had
    made of it: its class, and what it keeps in it.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    unit.reshard()
    state, kind = unit._get_fsdp_state(), type(unit)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    unit.__class__ = kind.__mro__[kind._orig_cls_mro_index]
    return kind, {key: vars(unit).pop(key) for key in (STATE_KEY, REGISTRY_KEY)}


def _put_back(unit: Any, kind: type, kept: dict[str, Any]) -> None:
    """Undo `_taken_off`."""
    vars(unit).update(kept)
    unit.__class__ = kind
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle = unit.register_forward_pre_hook(
        state._pre_forward, prepend=True, with_kwargs=True
    )
    state._post_forward_hook_handle = unit.register_forward_hook(state._post_forward)


def _gathered(value: Any) -> Any:
    """The whole of what may be divided, in the host's memory."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().clone()


def _share(value: Tensor, like: Any) -> Any:
    """The parts of a whole tensor, divided as `like` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
