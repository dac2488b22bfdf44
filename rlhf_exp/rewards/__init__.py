"""A reward says how good completions are. It sees text, so it never has to share a tokenizer with
the policy.

`score` is the one place where the loop, the evaluation and the labellers ask a reward, and where
its answer is checked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_exp import processes
from rlhf_exp.artifacts import Store
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Policy, Rollouts


@dataclass(kw_only=True)
class Fitting:
    """What a reward may use to fit itself; what it does not ask for is not made."""

    store: Store
    data: Callable[[], Dataset]
    trained: Policy  # the policy that is or will be trained; not loaded at every time
    pairs: Callable[[], Path]  # artifact with train.jsonl and evaluation.jsonl
    policy: Callable[[], Path | str]  # the start policy, for rewards that begin from its weights
    samples: Callable[[], list[tuple[str, str]]]  # prompts with completions of the start policy
    device: str | torch.device
    scoring: bool = True  # whether completions will be scored; false: a report is all


class Reward(Protocol):
    """Higher is better. A reward that fits or loads nothing writes `__call__` alone."""

    @property
    def learns_from_pairs(self) -> bool:
        """Whether `fit` asks for preference pairs."""
        return False

    def check(self, fitting: Fitting) -> None:
        """Refuse what can be known to fail before anything trains or loads."""

    def fit(self, fitting: Fitting) -> None:
        """Make or find what the reward needs."""

    def load(self, device: str | torch.device) -> None:
        """Bring it to a device."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        """float32 [n]"""
        ...


@runtime_checkable
class HasMembers(Protocol):
    """A reward made of others, which metrics want to see one by one."""

    def member_scores(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]: ...

    def combine(self, members: dict[str, Tensor]) -> Tensor: ...


@runtime_checkable
class HasFacets(Protocol):
    """A reward that can tell more of a completion than its score, by name [n]."""

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]: ...


def facets(rewards: Iterable[Any], prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
    """What `rewards` have to tell beside their scores, which may be nothing; the last of those that
    use one name is heard.
    """
    found: dict[str, Tensor] = {}
    for reward in rewards:
        if isinstance(reward, HasFacets):
            found |= reward.facets(prompts, completions)
    return found


@dataclass
class Scores:
    """`objective` [n] is what to optimise; `members` the scores [n] it was made from; `facets`
    what else is worth seeing [n], such as whether a completion is well formed.
    """

    objective: Tensor
    members: dict[str, Tensor]
    facets: dict[str, Tensor]


def score(reward: Any, prompts: list[str], completions: list[str], name: str = "reward") -> Scores:
    """Ask `reward` once; ValueError if the answer is not one finite number per completion. Each
    process asks about a part, and gets the whole.
    """
    if len(completions) < processes.count() or processes.count() == 1:  # not enough to divide
        return ask(reward, prompts, completions, name)
    part = processes.share(len(completions))
    asked = prompts[part], completions[part]
    with torch.random.fork_rng(_devices()):  # a reward may draw, each process as often as it likes
        mine = ask(reward, *asked, name) if asked[0] else None
    found = [scores for scores in processes.gather(mine) if scores is not None]

    def joined(of: Callable[[Scores], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.cat([of(scores)[k] for scores in found]) for k in of(found[0])}

    objective = torch.cat([scores.objective for scores in found])
    return Scores(objective, joined(lambda s: s.members), joined(lambda s: s.facets))


def _devices() -> list[int]:
    """The GPU that this process draws on, if any."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def ask(reward: Any, prompts: list[str], completions: list[str], name: str = "reward") -> Scores:
    """As `score`, by this process for itself: what a reward uses that is made of others."""
    more = {k: v.cpu() for k, v in facets([reward], prompts, completions).items()}
    if isinstance(reward, HasMembers):
        members = {
            k: _checked(v, completions, f"{name} {k}")
            for k, v in reward.member_scores(prompts, completions).items()
        }
        return Scores(reward.combine(members), members, more)
    return Scores(_checked(reward(prompts, completions), completions, name), {}, more)


def scored(rollouts: Rollouts, reward: Any) -> Rollouts:
    """`rollouts`, with what `reward` says of them filled in."""
    found = score(reward, rollouts.prompts, rollouts.completions)
    rollouts.scores = found.objective.to(rollouts.ids.device)
    rollouts.members, rollouts.facets = found.members, found.facets
    return rollouts


def _checked(scores: Any, completions: list[str], name: str) -> Tensor:
    count = len(completions)
    if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) != count:
        got = (
            f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        )
        raise ValueError(
            f"{name} must give a tensor with one score for each of {count} completions, not {got}"
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        text = completions[int(bad[0])][:60]
        raise ValueError(
            f"{name} gave {float(scores[bad[0]])} for the completion {text!r}; scores must be "
            "finite"
        )
    return scores.float().cpu()
