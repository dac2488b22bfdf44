"""The models behind rewards: what they weigh, what fitting and scoring take.

Rewards that have no model of their own (a lexicon, a function, right answers) have no scorer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from rlhf_exp.plan import passes
from rlhf_exp.plan.live import Parts
from rlhf_exp.plan.skeleton import Skeleton, read_config
from rlhf_exp.rewards.ensemble import Ensemble
from rlhf_exp.rewards.mix import Mix
from rlhf_exp.rewards.pairwise import Pairwise
from rlhf_exp.rewards.probe import Probe
from rlhf_exp.rewards.toxicity import Toxicity


@dataclass
class Scorer:
    """One model that scores."""

    name: str  # in the table
    key: str  # where its settings are
    skeleton: Skeleton
    token_budget: int  # of a forward pass
    length: int  # tokens of a text
    training: Pairwise | None = None  # the settings it is fitted by, if it trains
    shared: bool = False  # it is the policy itself

    @property
    def bytes(self) -> float:
        """On every process."""
        return 0.0 if self.shared else self.skeleton.frozen().counts.bytes

    @property
    def knob(self) -> str:
        return f"{self.key}.token_budget"

    @property
    def gold(self) -> bool:
        return self.key.split(".")[0] == "gold"

    @property
    def fits(self) -> bool:
        """Whether the stage reward trains it."""
        return self.training is not None and self.training.train

    def scoring(self, job: Any, count: int) -> Parts:
        """What scoring `count` completions makes."""
        rows = max(1, min(count, self.token_budget // self.length))
        work = passes.classify if self.skeleton.head == "classifier" else passes.read
        return job.trace(self.skeleton.frozen(), work, rows, self.length)


@dataclass
class Given:
    """What scorers may start from."""

    policy: Skeleton
    length: int  # tokens of the longest prompt with the longest completion


@singledispatch
def scorers(reward: Any, key: str, name: str, given: Given) -> Iterator[Scorer]:
    """The models of a reward whose settings are at `key`."""
    yield from ()


@scorers.register
def _(reward: Pairwise, key: str, name: str, given: Given) -> Iterator[Scorer]:
    config = (
        given.policy.config if reward.path is None else read_config(reward.path, reward.package)
    )
    skeleton = Skeleton(config, "classifier", reward.dtype, lora=reward.lora, trained=reward.train)
    length = min(reward.max_length, given.length)
    trains = reward if reward.train else None
    yield Scorer(name, key, skeleton, reward.token_budget, length, trains)


@scorers.register
def _(reward: Ensemble, key: str, name: str, given: Given) -> Iterator[Scorer]:
    for member, each in reward.members.items():
        inner = f"named.{member}" if reward.named else "member"
        yield from scorers(each, f"{key}.{inner}", f"{name} {member}", given)


@scorers.register
def _(reward: Mix, key: str, name: str, given: Given) -> Iterator[Scorer]:
    for part, each in reward.parts.items():
        yield from scorers(each.reward, f"{key}.parts.{part}.reward", f"{name} {part}", given)


@scorers.register
def _(reward: Probe, key: str, name: str, given: Given) -> Iterator[Scorer]:
    reader = reward.model
    if reward.hidden_states is not None:
        return
    config = (
        given.policy.config if reader.path is None else read_config(reader.path, reader.package)
    )
    head = "causal" if reader.path is None and not config.is_encoder_decoder else "none"
    skeleton = Skeleton(config, head, reader.dtype, trained=False)
    length = min(reader.max_length or given.length, given.length)
    yield Scorer(name, f"{key}.model", skeleton, reader.token_budget, length, shared=reader.share)


@scorers.register
def _(reward: Toxicity, key: str, name: str, given: Given) -> Iterator[Scorer]:
    if reward.path is None:
        return
    skeleton = Skeleton(read_config(reward.path), "classifier", reward.dtype, trained=False)
    length = min(reward.max_length or given.length, given.length)
    yield Scorer(name, key, skeleton, reward.token_budget, length)
