"""Contrast-consistent search (Burns et al. 2022, arXiv 2212.03827, equations 1-3): a probe whose
answers to a statement and its negation add up to one and are not both a half. No labels.

Other losses and starting points are those of EleutherAI's elk, whose Jensen-Shannon terms are in
nats. Losses take probabilities [n, v] of n examples under v templates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_exp.choices import pick, require
from rlhf_exp.probes.head import ACTIVATIONS, Head, differences


def consistency(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """mean (p- + p+ - 1)^2"""
    return (p_neg + p_pos - 1).square().mean()


def confidence(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """mean min(p-, p+)^2"""
    return torch.minimum(p_neg, p_pos).square().mean()


def ccs_loss(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """consistency + confidence; 0.25 where both are a half"""
    return consistency(p_neg, p_pos) + confidence(p_neg, p_pos)


def prompt_variance(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """Population variance over the templates, mean over examples, of both members summed."""
    return (p_neg.var(-1, correction=0) + p_pos.var(-1, correction=0)).mean()


def _entropy(p: Tensor) -> Tensor:
    least = torch.finfo(p.dtype).eps  # at 0 and 1, where a sigmoid rounds to, the slope is infinite
    p = p.clamp(least, 1 - least)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def jensen_shannon(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """Divergence of p- and 1 - p+ as Bernoulli distributions, in nats."""
    p, q = p_neg, 1 - p_pos
    return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2).mean()


def jensen_shannon_confidence(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """Entropy of the even mixture of p- and 1 - p+, in nats."""
    return _entropy((p_neg + 1 - p_pos) / 2).mean()


def ccs_prompt_variance(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """ccs_loss + prompt_variance"""
    return ccs_loss(p_neg, p_pos) + prompt_variance(p_neg, p_pos)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ccs": ccs_loss,
    "ccs_prompt_var": ccs_prompt_variance,
    "consistency_squared": consistency,
    "confidence_squared": confidence,
    "prompt_var_squared": prompt_variance,
    "js": jensen_shannon,
    "js_confidence": jensen_shannon_confidence,
}


def credence(p_neg: Tensor, p_pos: Tensor) -> Tensor:
    """P(answer 1) = (p+ + 1 - p-) / 2"""
    return (p_pos + 1 - p_neg) / 2


def parse_loss(terms: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of terms written "name" or "coefficient*name"."""
    parts: list[tuple[float, Callable[[Tensor, Tensor], Tensor]]] = []
    for term in terms:
        number, star, name = term.rpartition("*")
        try:
            parts.append((float(number) if star else 1.0, pick(name.strip(), LOSSES, "loss")))
        except ValueError as error:
            if "could not convert" not in str(error):
                raise
            raise ValueError(f"loss={term}: {number!r} is not a number") from None
    if not parts:
        raise ValueError("loss is empty: name at least one term, such as ccs")
    return lambda p_neg, p_pos: sum(
        (c * f(p_neg, p_pos) for c, f in parts), torch.zeros((), device=p_neg.device)
    )


@dataclass(kw_only=True)
class CCS:
    """The best of `restarts` fits by the loss without weight decay."""

    normalise: str = "mean"
    loss: list[str] = field(default_factory=lambda: ["ccs"])
    layers: int = 1  # more than 1: hidden layers of `hidden` units with `activation` between
    hidden: int | None = None  # null: 4 d / 3
    activation: str = "gelu"
    layer_norm: bool = False  # standardise each state over its features first
    bias: bool = True
    init: str = "default"  # default (torch's), spherical, zero or pca
    optimizer: str = "lbfgs"  # lbfgs or adamw
    lr: float = 0.01  # adamw only
    epochs: int = 1000  # at most, with lbfgs; full passes or minibatches of `batch`, with adamw
    batch: int | None = None  # examples per adamw step; null: all
    weight_decay: float = 0.01  # lbfgs: half of it times the squared norm joins the loss
    restarts: int = 10
    supervised: ClassVar[bool] = False
    log_odds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.activation, ACTIVATIONS, "activation")
        require(self.init, ("default", "spherical", "zero", "pca"), "init")
        require(self.optimizer, ("lbfgs", "adamw"), "optimizer")
        parse_loss(self.loss)
        if min(self.layers, self.restarts, self.epochs, self.batch or 1, self.hidden or 1) < 1:
            raise ValueError("layers, restarts, epochs, batch and hidden must be at least 1")
        if self.init in ("spherical", "zero", "pca") and self.layers > 1:
            raise ValueError(f"init={self.init} is for layers=1: use init=default")

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        loss = parse_loss(self.loss)
        generator = torch.Generator().manual_seed(seed)
        principal = _principal(x) if self.init == "pca" else None
        tries = [self._start(x, number, generator, principal) for number in range(self.restarts)]
        if self.optimizer == "lbfgs":
            for head in tries:
                self._lbfgs(head, x, loss)
        else:
            tries = self._adamw(tries, x, loss, generator)
        with torch.no_grad():
            values = [float(_value(head, x, loss)) for head in tries]
        finite = [i for i, value in enumerate(values) if math.isfinite(value)]
        if not finite:
            raise ValueError(
                f"CCS ended with a loss that is not finite in all {self.restarts} tries: normalise "
                "the states, or lower lr"
            )
        best = min(finite, key=values.__getitem__)
        worst = max(values[i] for i in finite)
        found = tries[best]
        found.notes = [
            f"loss {values[best]:.4f}, the best of {self.restarts} restarts (worst {worst:.4f})"
        ]
        return found

    def _start(
        self, x: Tensor, number: int, generator: torch.Generator, principal: Tensor | None = None
    ) -> Head:
        d = x.shape[-1]
        if self.init in ("zero", "pca"):
            weight = x.new_zeros(1, d)
            if principal is not None:  # the i-th try starts from the i-th principal direction
                weight = principal[number % len(principal)][None].clone()
            return self._head([weight], [x.new_zeros(1)])
        if self.init == "spherical":
            theta = torch.randn(d + 1, generator=generator).to(x)
            theta /= theta.norm()
            return self._head([theta[None, :-1].clone()], [theta[-1:].clone()])
        hidden = self.hidden or 4 * d // 3
        widths = [d, *[hidden] * (self.layers - 1), 1]
        weights, biases = [], []
        for inner, outer in pairwise(widths):
            bound = inner**-0.5  # torch.nn.Linear's own
            draw = (torch.rand(outer, inner + 1, generator=generator) * 2 - 1).to(x) * bound
            weights.append(draw[:, :-1].clone())
            biases.append(draw[:, -1].clone())
        return self._head(weights, biases)

    def _head(self, weights: list[Tensor], biases: list[Tensor]) -> Head:
        if not self.bias:
            biases = [torch.zeros_like(b) for b in biases]
        return Head(weights, biases, self.activation, self.layer_norm)

    def _trained(self, head: Head) -> list[Tensor]:
        parameters = [*head.weights, *(head.biases if self.bias else [])]
        return [p.requires_grad_(True) for p in parameters]

    def _lbfgs(self, head: Head, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        parameters = self._trained(head)
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=self.epochs,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            decay = sum((p.square().sum() for p in parameters), x.new_zeros(()))
            total = _value(head, x, loss) + 0.5 * self.weight_decay * decay
            total.backward()
            return total

        try:
            optimizer.step(closure)  # type: ignore[arg-type]
        except RuntimeError:  # a line search that overflows; the other tries go on
            head.weights[0].data.fill_(math.nan)
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _adamw(
        self,
        tries: list[Head],
        x: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
    ) -> list[Head]:
        """All tries at once: AdamW is elementwise, so they do not touch each other."""
        together = Head(
            [torch.stack(ws) for ws in zip(*(h.weights for h in tries), strict=True)],
            [torch.stack(bs) for bs in zip(*(h.biases for h in tries), strict=True)],
            self.activation,
            self.layer_norm,
        )
        optimizer = torch.optim.AdamW(
            self._trained(together), lr=self.lr, weight_decay=self.weight_decay
        )
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator) if self.batch else None
            for start in range(0, len(x), self.batch or len(x)):
                rows = x if order is None else x[order[start : start + (self.batch or 0)]]
                optimizer.zero_grad()
                p = together.stacked(rows).sigmoid()
                (len(tries) * loss(p[..., 0], p[..., 1])).backward()  # losses are means over tries
                optimizer.step()
        return [
            Head(
                [w[i].detach().clone() for w in together.weights],
                [b[i].detach().clone() for b in together.biases],
                self.activation,
                self.layer_norm,
            )
            for i in range(len(tries))
        ]


def _principal(x: Tensor) -> Tensor:
    """Principal directions of the differences [d, d], the strongest first."""
    apart = differences(x).double()
    apart = apart - apart.mean(0)
    return torch.linalg.eigh(apart.T @ apart)[1].T.flip(0).to(x.dtype)


def _value(head: Head, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    p = head(x).sigmoid()
    return loss(p[..., 0], p[..., 1])
