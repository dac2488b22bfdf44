"""A ready gold for real text: the compound sentiment of VADER (Hutto & Gilbert 2014), a bounded
rule-based lexicon.

Nothing in it forbids gibberish: a pile of happy words scores near 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.rewards import Reward


@dataclass(kw_only=True)
class Lexicon(Reward):
    """Sentiment of the completion in [-1, 1]; the prompt is not read."""

    def load(self, device: str | torch.device) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor(
            [self.analyzer.polarity_scores(c)["compound"] for c in completions], dtype=torch.float32
        )
