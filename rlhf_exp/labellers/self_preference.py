"""How much more a judge likes what it, or a model of its family, wrote than the gold does
(Panickssery et al. 2024, arXiv 2404.13076, speak of self-preference).
"""

from pathlib import Path

from torch import Tensor

from rlhf_exp.data.local import read_rows, text_column

COLUMNS = ("prompt", "own", "other")


def self_preference(judged: Tensor, gold: Tensor | None) -> dict[str, float]:
    """Mean P(own is better) by the judge and by the gold, and the difference: above 0 the judge
    favors its own.

    `judged` and `gold` are [n], over pairs of an own and another's text, NaN where either cannot
    say: such pairs are left out. Without a gold there is the judge's share alone, and nothing
    without a pair.
    """
    kept = ~judged.isnan() if gold is None else ~(judged.isnan() | gold.isnan())
    if not kept.any():
        return {}
    found = {"prefers_own": float(judged[kept].mean())}
    if gold is not None:
        found["gold_prefers_own"] = float(gold[kept].mean())
        found["self_preference"] = found["prefers_own"] - found["gold_prefers_own"]
    return found


def read_own(file: str) -> tuple[list[str], list[str], list[str]]:
    """Prompts, own and other texts of a file; FileNotFoundError, or ValueError naming the line."""
    path = Path(file).expanduser()
    rows = read_rows(path)
    prompts, own, other = (
        [text_column(path, row, i, column) for i, row in enumerate(rows, 1)] for column in COLUMNS
    )
    return prompts, own, other
