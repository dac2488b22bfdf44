"""What a sweeper optimizes: a number, or two, out of what a finished run says of itself.

Launchers and sweepers ask for it in processes that do not train: nothing heavy is imported here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.choices import require
from rlhf_exp.config import build

# metric of the summary: its name in an evaluation, where it can be watched while a run goes on
WATCHED = {"gold": "reward/gold", "proxy": "reward/proxy", "kl": "kl/k1", "length": "length/mean"}
REWARDS = ("gold", "proxy")
DIRECTIONS = ("maximize", "minimize")


class Objective:
    """Reads a run; `directions` and `names` have one entry per number that `of` gives.

    `watched` is the evaluation metric that tells early what a run will be worth, or None.
    """

    directions: tuple[str, ...] = ("maximize",)
    names: tuple[str, ...] = ()
    watched: str | None = None

    def value(self, directory: Path) -> float | list[float] | None:
        """The objective of the run in `directory`; None if it has no summary.json."""
        path = directory / "summary.json"
        if not path.exists():
            return None
        table = json.loads(path.read_text())
        return self.of({name: table[name]["after"]["mean"] for name in WATCHED})

    def of(self, after: dict[str, float]) -> float | list[float]:
        """The objective from means after training: gold, proxy, kl (nats), length (tokens)."""
        raise NotImplementedError


@dataclass(kw_only=True)
class After(Objective):
    """One metric as it is after training."""

    metric: str = "gold"  # gold, proxy, kl or length
    direction: str = "maximize"

    def __post_init__(self) -> None:
        require(self.metric, WATCHED, "objective.metric")
        require(self.direction, DIRECTIONS, "objective.direction")
        self.directions, self.names = (self.direction,), (self.metric,)
        self.watched = WATCHED[self.metric] if self.metric in REWARDS else None

    def of(self, after: dict[str, float]) -> float:
        return after[self.metric]


@dataclass(kw_only=True)
class WithinBudget(Objective):
    """A reward, less what the policy moved beyond a budget of KL: as both classes below have it."""

    reward: str = "gold"  # gold or proxy
    budget: float = 5.0  # nats

    def __post_init__(self) -> None:
        require(self.reward, REWARDS, "objective.reward")
        if self.budget <= 0:
            raise ValueError(f"objective.budget={self.budget} must be above 0 nats")
        self.watched = WATCHED[self.reward]


@dataclass(kw_only=True)
class Budget(WithinBudget):
    """reward - weight * max(0, KL - budget)."""

    weight: float = 1.0  # reward lost per nat beyond the budget
    names = ("budget",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(
                f"objective.weight={self.weight} would reward a KL beyond the budget: give 0 or "
                "more"
            )

    def of(self, after: dict[str, float]) -> float:
        return after[self.reward] - self.weight * max(0.0, after["kl"] - self.budget)


@dataclass(kw_only=True)
class Ratio(WithinBudget):
    """reward / (1 + KL / budget): at a KL of `budget`, half of the reward counts.

    Divided, a negative reward would gain from KL; it is multiplied by the same number instead, so
    that more reward and less KL are better on either side of 0, where the two meet. An estimate of
    KL below 0 counts as 0.
    """

    names = ("ratio",)

    def of(self, after: dict[str, float]) -> float:
        cost = 1 + max(0.0, after["kl"]) / self.budget
        reward = after[self.reward]
        return reward / cost if reward >= 0 else reward * cost


@dataclass(kw_only=True)
class Frontier(Objective):
    """Reward and KL, both at once: what is best for each KL."""

    reward: str = "gold"  # gold or proxy

    def __post_init__(self) -> None:
        require(self.reward, REWARDS, "objective.reward")
        self.directions, self.names = DIRECTIONS, (self.reward, "kl")

    def of(self, after: dict[str, float]) -> list[float]:
        return [after[self.reward], after["kl"]]


def outcome(directory: Path, node: dict[str, Any]) -> float | list[float] | None:
    """The objective that the config's `node` describes, of the run in `directory`; None if the run
    has not come to its summary.
    """
    return build(node, "objective").value(directory)
