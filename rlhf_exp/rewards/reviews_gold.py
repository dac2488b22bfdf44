"""The gold of the embedded world: its own reading of a review. See data/reviews.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.data.reviews import read
from rlhf_exp.rewards import Reward


@dataclass(kw_only=True)
class ReviewsGold(Reward):
    """Sentiment of the clauses the grammar can parse, minus penalties; about -2 to 1.75."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor([read(c).gold for c in completions], dtype=torch.float32)
