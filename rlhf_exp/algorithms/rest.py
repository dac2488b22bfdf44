"""Reinforced self-training (Gulcehre et al. 2023, arXiv 2308.08998): Grow, then Improve.

Each step of the loop is one Grow: sample many completions per prompt and score them. Then come the
Improve steps: keep what lies above a rising threshold, and imitate it at a falling learning rate.
The weights that do best on prompts set aside for the whole run are kept. Demonstrations stay in the
mixture if they pass the threshold too. RAFT (Dong et al. 2023) is one Improve step at a fixed
quantile.

Left out: the paper's offline actor-critic losses; it found behavior cloning best (section 4).
"""

import logging
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rlhf_exp.algorithms.imitation import Examples, Imitation
from rlhf_exp.algorithms.pool import Pool, numbered, rank
from rlhf_exp.choices import pick, require
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.reference import Reference
from rlhf_exp.rewards import scored
from rlhf_exp.trial import Trial

logger = logging.getLogger(__name__)

THRESHOLDS = ("quantile", "absolute", "prompt_quantile", "gamma", "top_k")
LOSSES = ("bc", "reward_weighted", "advantage_weighted")


def passing(kind: str, level: float, rewards: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Which rows an Improve step keeps: bool [n]. All but top_k keep reward > threshold, strictly.

    quantile: the threshold is that quantile of all rewards (linear interpolation); absolute: it is
    `level` itself; prompt_quantile: the quantile of each prompt's own rewards; gamma: level * max +
    (1 - level) * mean of each prompt; top_k: the `level` best of each prompt, the first of equals.
    """
    if kind == "top_k":
        return rank([-rewards], prompts) < level
    thresholds = {
        "quantile": lambda: np.quantile(rewards, level),
        "absolute": lambda: np.float64(level),
        "prompt_quantile": lambda: _by_prompt(rewards, prompts, lambda r: np.quantile(r, level)),
        "gamma": lambda: _by_prompt(
            rewards, prompts, lambda r: level * r.max() + (1 - level) * r.mean()
        ),
    }
    return rewards > pick(kind, thresholds, "algo.threshold")()


def _by_prompt(rewards: np.ndarray, prompts: np.ndarray, of: Any) -> np.ndarray:
    """`of` the rewards of each row's prompt: [n]."""
    order = np.argsort(prompts, kind="stable")
    cuts = np.flatnonzero(np.diff(prompts[order])) + 1
    values = np.array([of(part) for part in np.split(rewards[order], cuts)])
    return values[numbered(prompts[order].tolist())][np.argsort(order, kind="stable")]


def set_aside(data: Dataset, count: int, seed: int) -> tuple[list[str], Dataset]:
    """`count` prompts drawn at random, and the data without them."""
    prompts = list(dict.fromkeys(data.prompts))
    if count >= len(prompts):
        raise ValueError(
            f"algo.validation={count} prompts cannot be set aside from the {len(prompts)} of the "
            "data: lower it"
        )
    aside = random.Random(seed).sample(prompts, count)
    apart = set(aside)
    return aside, replace(
        data,
        prompts=[p for p in data.prompts if p not in apart],
        demonstrations=[d for d in data.demonstrations if d.prompt not in apart],
    )


@dataclass(kw_only=True)
class ReST(Imitation):
    """Settings; conf/experiment/rest_paper.yaml holds the paper's numbers."""

    threshold: str = "quantile"  # quantile, absolute, prompt_quantile, gamma or top_k
    # one for each Improve step, never less strict than the one before
    levels: list[float] = field(default_factory=lambda: [0.0, 0.7, 0.8, 0.9])
    loss: str = "bc"  # bc, reward_weighted or advantage_weighted
    temperature: float = 0.5  # of advantage_weighted: exp(advantage / temperature)
    normalise: bool = True  # rewards of a Grow to [0, 1]; false: as they are
    demonstrations: int | None = 128  # in each Grow's mixture, drawn at random; null: all
    accumulate: bool = False  # completions of earlier Grow steps stay in the mixture
    deduplicate: bool = True  # equal completions of a prompt count once
    epochs: float = 2.0  # passes over what is kept, each Improve step
    lr_decay: float = 0.7  # learning rate of an Improve step, as a share of the one before
    # prompts set aside; the weights of a Grow that do best on them are kept; 0: the last
    validation: int = 16
    validation_samples: int = 4  # completions of each of them

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold, THRESHOLDS, "algo.threshold")
        require(self.loss, LOSSES, "algo.loss")
        rising = self.levels == sorted(self.levels, reverse=self.threshold == "top_k")
        if not self.levels or not rising:
            order = "fall" if self.threshold == "top_k" else "rise"
            raise ValueError(
                f"algo.levels={self.levels} must be one or more numbers that never "
                f"{'rise' if order == 'fall' else 'fall'} under algo.threshold={self.threshold}: "
                f"let them {order}"
            )
        if self.threshold in ("quantile", "prompt_quantile", "gamma") and not all(
            0 <= level <= 1 for level in self.levels
        ):
            raise ValueError(
                f"algo.levels={self.levels} are shares between 0 and 1 under "
                f"algo.threshold={self.threshold}"
            )
        if self.epochs <= 0 or self.lr_decay <= 0 or self.temperature <= 0:
            raise ValueError(
                f"algo.epochs={self.epochs}, algo.lr_decay={self.lr_decay} and "
                f"algo.temperature={self.temperature} must be positive"
            )
        if (self.demonstrations or 0) < 0 or self.validation_samples < 1:
            raise ValueError(
                f"algo.demonstrations={self.demonstrations} must not be negative, and "
                f"algo.validation_samples={self.validation_samples} must be positive"
            )
        if self.threshold == "top_k" and not 1 <= self.levels[0] <= self.samples:
            raise ValueError(
                f"algo.levels={self.levels} keeps more completions of a prompt than "
                f"algo.samples={self.samples}: lower it, or sample more"
            )
        if self.validation < 0:
            raise ValueError(f"algo.validation={self.validation} must not be negative")
        self.aside: list[str] = []

    def prompts(self, data: Dataset) -> list[str]:
        """All but those set aside."""
        return self.others

    def setup(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        self.aside, data = set_aside(data, self.validation, trial.seed)
        self.others = data.prompts
        self.pool, self.rng = Pool(), np.random.default_rng(trial.seed)
        self.told = data.demonstrations
        super().setup(policy, reward, data, trial)

    # ---- one Grow and its Improve steps

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        self.prepare()
        self._grow(rollouts, step)
        if self.kl_coef:
            self.reference = Reference(self.policy, apart=True)  # the behavior policy
        metrics = self._keep_if_best(0)
        for number, level in enumerate(self.levels, 1):
            rows = self._passing(level)
            metrics[f"rest/kept/{number}"] = float(len(rows))
            if len(rows) == 0:
                self._nothing_passes(number, level)
                break
            self.descent.restart()
            found = self._improve(rows, self.lr_decay ** (number - 1))
            metrics |= found | {f"rest/lr/{number}": found["imitation/lr"]}
            metrics[f"rest/nll/{number}"] = found["imitation/nll"]
            metrics |= self._keep_if_best(number)
        if self.aside:
            self.policy.load_trainable_state(self.kept)
        return {"rest/pool": float(len(self.pool))} | self.counts | metrics

    def _keep_if_best(self, number: int) -> dict[str, float]:
        """Remember the weights after Improve step `number` (0: before the first) if no others of
        this Grow did as well on the prompts set aside.
        """
        if not self.aside:
            return {"rest/improved": float(number)}
        reward = self.look(self.aside, self.validation_samples)
        if number == 0 or reward > self.best:
            self.best, self.kept = reward, self.policy.trainable_state()
            return {f"rest/validation/{number}": reward, "rest/improved": float(number)}
        return {f"rest/validation/{number}": reward}

    def _grow(self, rollouts: Rollouts, step: int = 0) -> None:
        """The new mixture."""
        if not self.accumulate:
            self.pool = Pool()
        self.pool.add(rollouts)
        if step == 0 and self.start is not None:
            given, apart = self.given()[0], set(self.aside)
            others = [i for i, prompt in enumerate(given.prompts) if prompt not in apart]
            self.pool.add(given.select(torch.tensor(others, dtype=torch.long)))
        self._add_demonstrations()
        self.counts = {"rest/duplicates": 0.0}
        if self.deduplicate:
            cells = list(zip(self.pool.prompts, map(tuple, self.pool.responses), strict=True))
            before = len(self.pool)
            self.pool.keep(np.unique(numbered(cells), return_index=True)[1])
            self.counts["rest/duplicates"] = float(before - len(self.pool))
        rewards = np.asarray(self.pool.scores)
        if rewards.min() == rewards.max():
            raise ValueError(
                f"the reward gives all {len(rewards)} completions of this Grow {rewards[0]:.4g}, "
                "so none is better than another: use another reward, or let the policy vary more "
                "(policy.temperature)"
            )
        if self.normalise:
            rewards = (rewards - rewards.min()) / (rewards.max() - rewards.min())
        self.rewards, self.groups = rewards, self.pool.groups()

    def _add_demonstrations(self) -> None:
        """The original data, scored by the same reward."""
        told = self.told
        if self.demonstrations is not None and self.demonstrations < len(told):
            picked = self.rng.choice(len(told), self.demonstrations, replace=False)
            told = [self.told[i] for i in sorted(picked)]
        if not told:
            return
        tokenizer = self.policy.tokenizer
        encoded = tokenizer([d.completion for d in told], add_special_tokens=False)["input_ids"]
        responses = [[*ids, tokenizer.eos_token_id] for ids in encoded]
        rollouts = self.policy.assemble([d.prompt for d in told], responses)
        self.pool.add(scored(rollouts, self.reward))

    def _passing(self, level: float) -> np.ndarray:
        return np.flatnonzero(passing(self.threshold, level, self.rewards, self.groups))

    def _nothing_passes(self, number: int, level: float) -> None:
        """No silent reuse of old data: the first Improve step is an error, a later one ends the
        Grow.
        """
        found = (
            f"no completion of {len(self.pool)} lies above the threshold of Improve step {number} "
            f"(algo.threshold={self.threshold}, level {level:g}); rewards go from "
            f"{self.rewards.min():.4g} to {self.rewards.max():.4g}"
        )
        if number == 1:
            raise ValueError(f"{found}: lower algo.levels, or sample more (algo.samples)")
        logger.warning("%s: no further Improve step in this Grow", found)

    def _improve(self, rows: np.ndarray, scale: float) -> dict[str, float]:
        prompts = [self.pool.prompts[i] for i in rows]
        rollouts = self.policy.assemble(prompts, [self.pool.responses[i] for i in rows])
        weights = torch.tensor(self._weights(rows), dtype=torch.float32, device=self.policy.device)
        updates = max(1, round(self.epochs * len(rows) / self.minibatch))
        return self.imitate(Examples(rollouts, weights), updates, scale=scale)

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """Of each kept completion, with mean 1: float64 [m]."""
        rewards = self.rewards[rows]
        if self.loss == "bc":
            return np.ones(len(rows))
        if self.loss == "reward_weighted":
            if rewards.min() < 0 or rewards.sum() == 0:
                raise ValueError(
                    "algo.loss=reward_weighted needs rewards that are not negative: set "
                    "algo.normalise=true"
                )
            return rewards / rewards.mean()
        values = _by_prompt(self.rewards, self.groups, np.mean)[rows]
        found = np.exp(np.clip((rewards - values) / self.temperature, None, 20.0))
        return found / found.mean()

    # ---- resume

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "pool": vars(self.pool) if self.accumulate else {},
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pool = Pool(**state["pool"])
        self.rng.bit_generator.state = state["rng"]
