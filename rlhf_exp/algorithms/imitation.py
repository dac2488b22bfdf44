"""Learning from completions that were judged and chosen: negative log-likelihood, weighted, with a
KL to a reference and a bonus for entropy on top. ReST, Quark and ALT differ in what they choose and
in what they put before the prompts; the update is this one.

All means are over the tokens of a whole minibatch, whatever the micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.algorithms.descent import Descent, over_processes
from rlhf_exp.algorithms.groups import Rates
from rlhf_exp.algorithms.online import Online
from rlhf_exp.choices import require
from rlhf_exp.data.rows import Dataset
from rlhf_exp.feedback import Feedback
from rlhf_exp.generated import read_generations
from rlhf_exp.policy import (
    MAX_ROLLOUT_TOKENS,
    Batch,
    Policy,
    Rollouts,
    cut,
    divided_batches,
    response_logits,
)
from rlhf_exp.reference import Reference
from rlhf_exp.rewards import score, scored
from rlhf_exp.trial import Trial

KL_DIRECTIONS = ("policy_to_reference", "reference_to_policy")


@dataclass
class Examples:
    """What to imitate."""

    rollouts: Rollouts
    weights: Tensor  # [n], of each completion's tokens
    asked: Rollouts | None = None  # the same completions as the reference is asked for them


def stream(count: int, minibatch: int, updates: int) -> Iterator[Tensor]:
    """`updates` minibatches of rows of an endless series of shuffled passes: any two rows come up
    equally often, give or take one. Fewer rows than `minibatch` are taken all, each time.
    """
    size = min(minibatch, count)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(updates):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(count)])
        yield left[:size]
        left = left[size:]


@dataclass(kw_only=True)
class Imitation(Online, Rates):
    """Settings of the update."""

    # file of completions to learn from beside those sampled in the first step, see generated.py
    start: str | None = None
    minibatch: int = 64  # completions per optimizer step
    # padded tokens per forward pass; changes memory, not the gradient
    token_budget: int = MAX_ROLLOUT_TOKENS
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # null: no clipping
    kl_coef: float = 0.0  # of the exact KL over the vocabulary; 0: no reference is asked
    # policy_to_reference: KL(policy || reference), Quark; reference_to_policy: the reverse, ALT
    kl_direction: str = "policy_to_reference"
    # nats per completion that an adaptive kl_coef steers to; null: fixed
    kl_target: float | None = None
    entropy_coef: float = 0.0  # of the entropy bonus
    entropy_target: float | None = None  # the same for entropy_coef
    coef_horizon: float = 2500.0  # completions over which adaptive coefficients move

    def __post_init__(self) -> None:
        Online.__post_init__(self)
        Rates.__post_init__(self)
        require(self.kl_direction, KL_DIRECTIONS, "algo.kl_direction")
        if self.minibatch < 1 or self.token_budget < 1:
            raise ValueError(
                f"algo.minibatch={self.minibatch} and algo.token_budget={self.token_budget} must "
                "be positive"
            )
        if any(target is not None and target <= 0 for target in self._targets().values()):
            raise ValueError(
                f"algo.kl_target={self.kl_target} and algo.entropy_target={self.entropy_target} "
                "must be positive, or null for fixed coefficients"
            )
        if min(self.kl_coef, self.entropy_coef) < 0:
            raise ValueError(
                f"algo.kl_coef={self.kl_coef} and algo.entropy_coef={self.entropy_coef} must not "
                "be negative"
            )
        for name, target in self._targets().items():
            if target is not None and getattr(self, f"{name}_coef") == 0:
                raise ValueError(
                    f"algo.{name}_target={target} steers algo.{name}_coef, which is 0 and stays 0: "
                    f"give it a value to start from, or set algo.{name}_target=null"
                )

    def _targets(self) -> dict[str, float | None]:
        return {"kl": self.kl_target, "entropy": self.entropy_target}

    def check(self, policy: Policy, data: Dataset) -> None:
        if self.start is not None:
            self.known = read_generations(Path(self.start).expanduser())

    def setup(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        self.policy, self.reward, self.trial = policy, reward, trial
        self.reference: Reference = trial.reference

    def prepare(self) -> None:
        """Make the optimizer. That waits for the first step, when the policy has all its
        parameters.
        """
        if hasattr(self, "descent"):
            return
        self.descent = Descent(
            self.trial.accelerator,
            self.policy.model,
            self.by_rate(self.policy.model),
            betas=self.betas,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )

    def given(self) -> tuple[Rollouts, list[Feedback | None] | None]:
        """What `start` holds: completions, scored by the run's reward whatever the file says, and
        what was said of them.
        """
        rows = self.known
        prompts = [row.prompt for row in rows for _ in row.generations]
        tokenizer, limit = self.policy.tokenizer, self.policy.max_new_tokens
        texts = [text for row in rows for text in row.generations]
        responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ends = [e for row in rows for e in row.ended or [None] * len(row.generations)]
        for response, ended in zip(responses, ends, strict=True):
            if ended or (ended is None and len(response) < limit):
                response.append(tokenizer.eos_token_id)
        rollouts = scored(self.policy.assemble(prompts, responses), self.reward)
        if any(row.feedbacks is None for row in rows):
            return rollouts, None
        grades = [g for row in rows for g in row.scores or [None] * len(row.generations)]
        said = [f for row in rows for f in row.feedbacks or []]
        pairs = zip(said, grades, strict=True)
        return rollouts, [Feedback(f, g) if isinstance(f, str) else None for f, g in pairs]

    def look(self, prompts: list[str], samples: int = 1) -> float:
        """Mean reward of fresh completions, drawn from one seed at every time; training goes on as
        if nobody had looked.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.trial.seed)
            rollouts = self.policy.sample(prompts, samples)
        return float(score(self.reward, rollouts.prompts, rollouts.completions).objective.mean())

    def imitate(
        self,
        examples: Examples,
        updates: int,
        *,
        done: int = 0,
        total: int | None = None,
        scale: float = 1.0,
    ) -> dict[str, float]:
        """`updates` optimizer steps on `examples`, the learning rate `scale` times its schedule,
        of whose `total` steps `done` have been taken; returns means over the updates.
        """
        total = total or updates
        sums: dict[str, float] = {}
        applied = 0
        for i, rows in enumerate(stream(len(examples.rollouts), self.minibatch, updates)):
            self.descent.scale(scale * self.lr_scale(done + i, total))
            stats = self._update(examples, rows)
            self._adapt(stats, len(rows))
            applied += int(stats.pop("applied"))
            sums = {k: sums.get(k, 0.0) + v for k, v in stats.items()}
        if applied == 0:
            raise ValueError(
                "no update of this step had a finite loss and gradient: start again with a lower "
                "algo.lr"
            )
        means = {f"imitation/{k}": v / applied for k, v in sums.items()}
        return means | {
            "imitation/lr": self.descent.lr,
            "imitation/updates": float(updates),
            "kl/coef": self.kl_coef,
            "imitation/entropy_coef": self.entropy_coef,
            "imitation/skipped_updates": float(self.descent.skipped),
        }

    def _update(self, examples: Examples, rows: Tensor) -> dict[str, float]:
        """One optimizer step."""
        rollouts = examples.rollouts
        count = rollouts.response[rows].sum().clamp(min=1)
        sums: dict[str, Tensor] = {}
        for batch, counts in divided_batches(rollouts, rows, self.token_budget):
            mask = rollouts.response[batch.rows, : batch.length]
            terms = self._terms(examples, batch)
            weighted = terms["nll"] * examples.weights[batch.rows, None]
            loss = weighted
            if "kl" in terms:
                loss = loss + self.kl_coef * terms["kl"]
            if "entropy" in terms:
                loss = loss - self.entropy_coef * terms["entropy"]
            self.descent.backward((loss * mask).sum() / count * counts)
            terms["loss"] = loss
            sums = {
                k: sums.get(k, torch.zeros(())) + (v.detach() * mask).sum() * counts
                for k, v in terms.items()
            }
        sums = over_processes(sums)
        norm, finite = self.descent.step()
        stats = {k: float(v / count) for k, v in sums.items()}
        if not finite:
            return {"applied": 0.0}
        stats |= {f"{k}_sequence": float(sums[k]) / len(rows) for k in self._targets() if k in sums}
        return stats | {"grad_norm": norm, "applied": 1.0}

    def _adapt(self, stats: dict[str, float], count: int) -> None:
        """Coefficients with a target follow it: more KL than wanted raises kl_coef, more entropy
        than wanted lowers entropy_coef (Lu et al. 2022, Quark; Ziegler et al. 2019, section 2.2).
        """
        for name, target in self._targets().items():
            if target is None or f"{name}_sequence" not in stats:
                continue
            key = f"{name}_coef"
            found = losses.adapt_kl_coef(
                getattr(self, key),
                stats[f"{name}_sequence"],
                target=target,
                horizon=self.coef_horizon,
                samples=count if name == "kl" else -count,
            )
            setattr(self, key, found)

    def _terms(self, examples: Examples, batch: Batch) -> dict[str, Tensor]:
        """Negative log-likelihood of each token of a micro-batch [b, r], and its KL and entropy
        where they have a coefficient.

        Likelihood and entropy are over all logits, control tokens included; the KL is over the
        vocabulary that both models share (Lu et al. 2022, Quark, eq. 3).
        """
        logits = response_logits(self.descent.module, batch)[0]
        nll = -losses.selective_log_softmax(logits, batch.response_ids)
        terms = {"nll": nll}
        if self.kl_coef:
            terms["kl"] = self._kl(logits, examples, batch)
        if self.entropy_coef:
            terms["entropy"] = losses.entropy(logits)
        return terms

    def _kl(self, logits: Tensor, examples: Examples, batch: Batch) -> Tensor:
        """[b, r], in nats."""
        asked = batch if examples.asked is None else cut(examples.asked, batch.rows)
        ref_logits = self.reference.logits(asked)
        ours, theirs = (losses.without(x, self.policy.control) for x in (logits, ref_logits))
        if self.kl_direction == "policy_to_reference":
            return losses.full_kl(ours, theirs)
        return losses.full_kl(theirs, ours)

    def state(self) -> dict[str, Any]:
        coefs = {"kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef}
        return self.descent.state() | coefs

    def load_state(self, state: dict[str, Any]) -> None:
        self.prepare()
        self.descent.load_state(state)
        self.kl_coef, self.entropy_coef = state["kl_coef"], state["entropy_coef"]
