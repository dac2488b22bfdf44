"""A reward that is any Python function, with the signature of TRL's `reward_funcs`."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.config import imported
from rlhf_exp.rewards import Fitting, Reward


@dataclass(kw_only=True)
class Function(Reward):
    """`module:function`, called as f(prompts=[...], completions=[...]) -> one number per
    completion.
    """

    function: str  # e.g. my_rewards:politeness; modules in the working directory are found

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":")
        if not module or not name:
            raise ValueError(f"reward.function={self.function} must have the form module:function")

    def check(self, fitting: Fitting) -> None:
        self.load("cpu")

    def load(self, device: str | torch.device) -> None:
        self.call = imported(self.function, "reward.function")

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        try:
            scores = self.call(prompts=prompts, completions=completions)
        except Exception as error:
            where = getattr(inspect.getmodule(self.call), "__file__", None) or self.function
            raise ValueError(
                f"reward.function={self.function} ({where}) raised {type(error).__name__}: {error}"
            ) from error
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"reward.function={self.function} gave {repr(scores)[:60]}; it must return one "
                "number per completion"
            ) from None
