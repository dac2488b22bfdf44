"""The one loop every on-policy algorithm shares: sample, score, learn.

A new algorithm writes `learn`, and `state`/`load_state` for what it must remember. Nothing here
asks which one it is.
"""

import random
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.rewards import Reward, scored
from rlhf_exp.trial import Trial


def prompts_at(prompts: list[str], step: int, batch: int, seed: int) -> list[str]:
    """The `batch` prompts of `step`: every epoch is a seeded permutation, so a position is all a
    resume needs.
    """
    picked: list[str] = []
    order: list[int] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, len(prompts))
        if not order or place == 0:
            order = list(range(len(prompts)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
        picked.append(prompts[order[place]])
    return picked


@dataclass(kw_only=True)
class Online:
    """Settings of the loop; see conf/algo/ for the numbers."""

    trains: ClassVar[bool] = True  # the policy

    steps: int  # times round the loop
    batch: int  # prompts per step
    samples: int = 1  # completions per prompt

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.samples) < 1:
            raise ValueError(
                f"algo.steps={self.steps}, algo.batch={self.batch}, algo.samples={self.samples} "
                "must be positive"
            )

    def run(self, policy: Policy, reward: Reward, data: Dataset, trial: Trial) -> None:
        """Train `policy` in place."""
        self.setup(policy, reward, data, trial)
        step = trial.begin(policy, self, self.steps)
        while step < self.steps:
            started = time.perf_counter()
            prompts = prompts_at(self.prompts(data), step, self.batch, trial.seed)
            rollouts = policy.sample(prompts, self.samples, fresh=False)
            sampled = time.perf_counter()
            scored(rollouts, reward)
            judged = time.perf_counter()
            metrics = self.learn(rollouts, step)
            learned = time.perf_counter()
            seconds = {
                "sample": sampled - started,
                "score": judged - sampled,
                "learn": learned - judged,
            }
            trial.log_step(step, rollouts, metrics, seconds)
            step += 1
            trial.end_step(step, policy, self)

    def prompts(self, data: Dataset) -> list[str]:
        """Those to sample for, once set up."""
        return data.prompts

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse what can be known to fail before any weights load."""

    def setup(self, policy: Policy, reward: Reward, data: Dataset, trial: Trial) -> None:
        """Build optimizers and whatever else needs what `run` was given."""
        raise NotImplementedError

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        """Update the policy from scored rollouts; returns metrics."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Everything beside the policy's weights that the next step depends on."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        raise NotImplementedError
