"""What every probe family finds: a function from a hidden state to a statement's logit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}


@dataclass
class Head:
    """Layers [out, in] with biases [out], the last with out = 1, and an activation between them."""

    weights: list[Tensor]
    biases: list[Tensor]
    activation: str = "gelu"
    layer_norm: bool = False  # standardise each state over its features first
    notes: list[str] = field(default_factory=list)  # what the report should say about the fit

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [...] of the states x [..., d]."""
        return self._through(x, nn.functional.linear)

    def stacked(self, x: Tensor) -> Tensor:
        """Logits [r, ...] of r heads whose weights [r, out, in] and biases [r, out] are stacked."""

        def together(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if y.ndim == 2:  # the states, the same for all heads: one product
                wide = nn.functional.linear(y, weight.flatten(0, 1), bias.flatten())
                return wide.unflatten(-1, weight.shape[:2]).transpose(0, 1)
            return torch.baddbmm(bias[:, None], y, weight.mT)

        return self._through(x.flatten(0, -2), together).unflatten(1, x.shape[:-1])

    def _through(self, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        if self.layer_norm:
            x = nn.functional.layer_norm(x, x.shape[-1:])
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = linear(ACTIVATIONS[self.activation](x) if number else x, weight, bias)
        return x.squeeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for storage."""
        named = {f"weight_{i}": w for i, w in enumerate(self.weights)}
        return named | {f"bias_{i}": b for i, b in enumerate(self.biases)}


def linear(direction: Tensor, bias: float = 0.0, notes: list[str] | None = None) -> Head:
    """The head x -> direction . x + bias, for a direction [d]."""
    return Head([direction[None]], [direction.new_tensor([bias])], notes=notes or [])


def restore(tensors: dict[str, Tensor], activation: str, layer_norm: bool) -> Head:
    """The head whose `tensors()` were stored."""
    depth = sum(name.startswith("weight_") for name in tensors)
    weights = [tensors[f"weight_{i}"] for i in range(depth)]
    return Head(weights, [tensors[f"bias_{i}"] for i in range(depth)], activation, layer_norm)


class Family(Protocol):
    """How a probe is fitted; its fields are its settings."""

    normalise: str  # see probes/normalise.py
    supervised: ClassVar[bool]  # the labels decide the direction, and so its sign
    log_odds: ClassVar[bool]  # logits are log-odds already, so nothing rescales them

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        """From normalised states [n, v, 2, d] of n examples, v templates and both answers; labels
        int64 [n] is the index of the right answer. Unsupervised families do not look at it.
        """
        ...


def statements(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every statement a row: states [n v 2, d] and whether each is true, float [n v 2]."""
    true = torch.stack([labels == 0, labels == 1], -1)[:, None].expand(x.shape[:3])
    return x.flatten(0, 2), true.flatten().to(x.dtype)


def differences(x: Tensor) -> Tensor:
    """State of answer 1 minus state of answer 0, a row per example and template [n v, d]."""
    return (x[:, :, 1] - x[:, :, 0]).flatten(0, 1)
