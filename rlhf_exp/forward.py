"""How the blocks of a decoder are computed: again on the way back, or compiled.

Both replace the `forward` of each block, so that modules and parameters keep their names, hooks
stay where they are, and a deep copy of the model computes with its own weights. transformers' own
checkpointing is bound to the training mode, which would switch dropout on.

Left out: compiling what is outside of the blocks; sampling, whose shapes change with every token.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_exp.weights import blocks


def recompute(model: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass, which computes the rest again:
    less memory for one more forward pass (Chen et al. 2016, arXiv 1604.06174).
    """
    for block in blocks(model):
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compiled(model: nn.Module) -> None:
    """Compile each block, for whatever batch and length, at its first use."""
    for block in blocks(model):
        block.forward = _Compiled(block.forward)


class _Compiled:
    """The `forward` of a block, compiled where no keys and values are kept."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.made: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.cache_utils import Cache

        if any(isinstance(each, Cache) for each in (*args, *kwargs.values())):
            return self.forward(*args, **kwargs)
        if self.made is None:
            self.made = torch.compile(self.forward, dynamic=True)
        return self.made(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Compiled":
        return _Compiled(copy.deepcopy(self.forward, memo))
