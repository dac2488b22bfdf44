"""The gold of data sets with one right answer per prompt: is the completion that answer?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.rewards import Fitting, Reward
from rlhf_exp.rewards.format import plain


@dataclass(kw_only=True)
class Answers(Reward):
    """1 where the completion is the right answer of its prompt, up to whitespace in front and
    punctuation behind, else 0.
    """

    def __post_init__(self) -> None:
        self.right: dict[str, str] = {}  # by prompt, once fitted

    def check(self, fitting: Fitting) -> None:
        self.fit(fitting)

    def fit(self, fitting: Fitting) -> None:
        self.right = {p: plain(answer) for p, answer in fitting.data().answers.items()}
        if not self.right:
            raise ValueError(
                "reward=answers needs a data set that knows the right answers: use data=facts, "
                "data=qnli or another reward"
            )

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        if unknown := [p for p in prompts if p not in self.right]:
            raise ValueError(
                f"reward=answers knows no right answer for the prompt {unknown[0][-60:]!r}: use "
                "another reward, or a data set that has one for each prompt"
            )
        told = zip(prompts, completions, strict=True)
        return torch.tensor([float(plain(c) == self.right[p]) for p, c in told])
