"""What is taken out of hidden states before a probe reads them.

Statements of one answer all end alike, so their states share an offset that says which answer it
is and nothing about truth. Every method here is fitted on training states, stored, and applied once
to training and new states alike: one sample is enough at inference.

Sources: Burns et al. 2022 (arXiv 2212.03827) for the means, its released code for `paper_scale`,
EleutherAI's elk for `per_template` and the removal of correlations, Belrose et al. 2023 (arXiv
2306.03819, theorem 4.3) for `leace`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.choices import require

METHODS = (
    "none",
    "mean",
    "mean_var",
    "standard",
    "paper_scale",
    "per_template",
    "correlation",
    "correlation_template",
    "leace",
)
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest count as zero


@dataclass
class Normaliser:
    """x -> y - (y remove) restore^T + offset with y = (x - mean) / scale; x is [..., v, k, d] for v
    templates and k answers.
    """

    mean: Tensor  # [v or 1, k or 1, d]
    scale: Tensor  # [v or 1, k or 1, d or 1]
    offset: Tensor  # [1, 1, d]
    remove: Tensor  # [d, r]
    restore: Tensor  # [d, r]

    def __call__(self, x: Tensor) -> Tensor:
        y = (x - self.mean) / self.scale
        if self.remove.shape[1]:
            y = y - (y @ self.remove) @ self.restore.T
        return y + self.offset

    def tensors(self) -> dict[str, Tensor]:
        """By name, for storage."""
        return vars(self)


def fit(x: Tensor, method: str) -> Normaliser:
    """Statistics of training states [n, v, k, d].

    mean: per template and answer, minus the mean. mean_var: also divided by each column's standard
    deviation (ddof=0; constant columns become 0). standard: the same with statistics pooled over
    templates and answers. paper_scale: minus the mean, divided by the mean row norm, times sqrt(d).
    per_template: minus the mean, divided by one number per template, the mean of its standard
    deviations. correlation: projected off the directions that covary with the answer's index
    (correlation_template: with template and index); leace: the same by the least-squares change.
    """
    require(method, METHODS, "normalise")
    n, v, k, d = x.shape
    double = x.double()
    mean, scale = torch.zeros(1, 1, d), torch.ones(1, 1, 1)
    offset, remove, restore = torch.zeros(1, 1, d), torch.zeros(d, 0), torch.zeros(d, 0)
    if method in ("mean", "mean_var", "paper_scale") or (method == "per_template" and n > 1):
        mean = double.mean(0)
    if method == "mean_var":
        scale = _nonzero(double.std(0, correction=0))
    elif method == "standard":
        mean = double.mean((0, 1, 2)).expand(1, 1, d)
        scale = _nonzero((double - mean).square().mean((0, 1, 2)).sqrt()).expand(1, 1, d)
    elif method == "paper_scale":
        scale = _nonzero((double - mean).norm(dim=-1, keepdim=True).mean(0)) / d**0.5
    elif method == "per_template" and n > 1:
        scale = _nonzero(double.std(0, correction=0).mean((1, 2), keepdim=True))
    elif method in ("correlation", "correlation_template", "leace"):
        groups = torch.arange(v * k) if method == "correlation_template" else torch.arange(k)
        rows = double.reshape(n * v * k, d)
        index = groups.repeat(n if method == "correlation_template" else n * v)
        mean = rows.mean(0).expand(1, 1, d)
        remove, restore = _eraser(rows - mean[0], index, whiten=method == "leace")
        offset = mean if method == "leace" else offset
    parts = {"mean": mean, "scale": scale, "offset": offset, "remove": remove, "restore": restore}
    return Normaliser(**{name: t.to(x.dtype).contiguous() for name, t in parts.items()})


def _nonzero(scale: Tensor) -> Tensor:
    """Columns that do not vary, but for rounding, are centred to 0 and divided by 1."""
    floor = RANK_TOLERANCE * scale.max()
    return torch.where(scale > floor, scale, torch.ones_like(scale))


def _eraser(rows: Tensor, index: Tensor, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """`remove` and `restore` [d, r] such that centred `rows` [m, d] lose all covariance with the
    one-hot `index` [m].

    The basis is rank revealing: with k one-hot columns the covariance has rank k - 1 at most, and a
    basis of k columns would also delete a direction made of rounding noise.
    """
    hot = torch.nn.functional.one_hot(index).to(rows)
    covariance = rows.T @ (hot - hot.mean(0)) / len(rows)
    if not whiten:
        basis = _column_space(covariance, rows)
        return basis, basis
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = values > RANK_TOLERANCE * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()
    inverse = vectors[:, kept] / values[kept].sqrt()
    basis = _column_space(inverse @ (vectors[:, kept].T @ covariance), rows)
    return inverse @ (vectors[:, kept].T @ basis), root @ (vectors[:, kept].T @ basis)


def _column_space(matrix: Tensor, rows: Tensor) -> Tensor:
    """Orthonormal basis [d, r] of the columns that are not rounding noise beside `rows`."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    floor = torch.finfo(rows.dtype).eps * len(rows) ** 0.5 * rows.abs().max().clamp(min=1e-300)
    return left[:, values > torch.maximum(RANK_TOLERANCE * values[0], floor)]
