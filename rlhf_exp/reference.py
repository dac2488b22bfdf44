"""The start policy, kept to measure how far training has gone: KL(policy || reference).

Three ways to keep it, the cheapest that is exact: the adapter switched off (LoRA), copies of the
trained top blocks on a trunk shared with the policy (frozen bottom layers), or a full copy. The
shared trunk is computed once: the hidden states that enter the policy's first trained block are
handed to the reference's. What the reference has of its own lies as hardware.frozen says.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import weights
from rlhf_exp.frozen import Frozen
from rlhf_exp.policy import Batch, Policy, response_logits


class Reference:
    """Frozen logits of `policy` as it is now."""

    def __init__(self, policy: Policy, *, apart: bool = False) -> None:
        self.prefix = policy.prefix or ""  # what it was asked with
        self.precision = policy.precision
        if apart:  # shares nothing, for a policy that is no longer the one its adapter started from
            with policy.whole():
                self.kind: Any = _Copy(policy.model, policy.device)
        elif policy.lora is not None:
            self.kind = _AdapterOff(policy.model)
        elif policy.train_top is not None:
            self.kind = _SharedTrunk(policy.model, policy.train_top, policy.device)
        else:
            self.kind = _Copy(policy.model, policy.device)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[b, r, v] as `response_logits` would give for the start policy."""
        with self.precision(), self.ready():
            return self.kind.logits(batch)

    def ready(self) -> AbstractContextManager[None]:
        """A block of many questions: weights that lie elsewhere are brought once."""
        return self.kind.frozen.ready() if hasattr(self.kind, "frozen") else nullcontext()


class _Copy:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.frozen = Frozen(self.model, device)

    def logits(self, batch: Batch) -> Tensor:
        return response_logits(self.model, batch)[0]


class _AdapterOff:
    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, batch: Batch) -> Tensor:
        with self.model.disable_adapter():
            return response_logits(self.model, batch)[0]


class _SharedTrunk:
    """The reference's list of blocks holds the copied top only; a hook feeds it the policy's hidden
    states.
    """

    def __init__(self, model: nn.Module, top: int, device: torch.device) -> None:
        frozen = weights.blocks(model)[:-top]
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.top = (
            copy.deepcopy(model, shared | {id(b): b for b in frozen}).requires_grad_(False).eval()
        )
        self.policy, self.states, self.batch = model, torch.empty(0), torch.empty(0)
        model.register_forward_pre_hook(self._remember_batch, with_kwargs=True)
        weights.blocks(model)[-top].register_forward_pre_hook(
            self._remember_states, with_kwargs=True
        )
        layers = weights.blocks(self.top)
        del layers[:-top]
        layers[0].register_forward_pre_hook(self._feed_states, with_kwargs=True)
        own = [p for p in self.top.parameters() if id(p) not in shared]
        self.frozen = Frozen(self.top, device, own)

    def _remember_batch(self, _module, _args, kwargs) -> None:
        self.batch = kwargs["input_ids"]

    def _remember_states(self, _module, args, kwargs) -> None:
        self.states = (args[0] if args else kwargs["hidden_states"]).detach()

    def _feed_states(self, _module, args, kwargs):
        if args:
            return (self.states, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.states}

    def logits(self, batch: Batch) -> Tensor:
        if self.batch is not batch.ids:  # the policy's last forward pass was over something else
            response_logits(self.policy, batch)
        return response_logits(self.top, batch)[0]
