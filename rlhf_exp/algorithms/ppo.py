"""Proximal policy optimisation for language models (Schulman et al. 2017; Ziegler et al. 2019;
Stiennon et al. 2020).

One module holds policy and value function, so that a trunk is run once for both. Everything that is
a statistic of the batch (score scaling, whitening, the mean in the loss) is computed over the whole
batch or minibatch, never over the micro-batch that happens to fit into memory. The steps of an
update are numbered in `learn`.

Left out: a separate value trunk, dense rewards from the reward model, encoder-decoder policies.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_exp import losses, processes
from rlhf_exp.algorithms.descent import Descent, Group, over_processes
from rlhf_exp.algorithms.groups import Rates
from rlhf_exp.algorithms.online import Online
from rlhf_exp.algorithms.scaling import ScoreScaling, apply_missing_eos
from rlhf_exp.choices import require
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import (
    MAX_ROLLOUT_TOKENS,
    Batch,
    Policy,
    Rollouts,
    by_token,
    divided_batches,
    response_logits,
)
from rlhf_exp.trial import Trial


class PolicyWithValue(nn.Module):
    """A causal language model and a value head on its last hidden states."""

    def __init__(self, model: nn.Module, hidden: int | None) -> None:
        super().__init__()
        self.model = model
        width: int = model.get_output_embeddings().in_features  # type: ignore[operator]
        device = next(model.parameters()).device
        if hidden is None:
            self.value_head: nn.Module = nn.Linear(width, 1, device=device)
            last = self.value_head
        else:
            last = nn.Linear(hidden, 1, device=device)
            self.value_head = nn.Sequential(
                nn.Linear(width, hidden, device=device), nn.ReLU(), last
            )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [b, r, v] that predict the response tokens, and the values [b, r] of the states
        before them.
        """
        logits, states = response_logits(self.model, batch, hidden=True)
        assert states is not None
        return logits, self.value_head(states.float()).squeeze(-1)


@dataclass
class Experience:
    """What the update knows of the rollouts, all [n, r] on response tokens and zero elsewhere."""

    logprobs: Tensor
    values: Tensor
    kl: Tensor  # the penalty's estimate
    log_ratio: Tensor  # log policy - log reference
    advantages: Tensor
    returns: Tensor


@dataclass(kw_only=True)
class PPO(Online, Rates):
    """Settings; numbers of published runs are in conf/experiment/."""

    weighs_importance: ClassVar[bool] = True  # of tokens, where the sampler tells it

    epochs: int = 4  # passes over each batch of rollouts
    minibatch: int = 64  # rollouts per optimizer step
    # padded tokens per forward pass; changes memory, not the gradient
    token_budget: int = MAX_ROLLOUT_TOKENS
    value_lr: float | None = None  # learning rate of the value head; null: lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2  # of the probability ratio
    value_clip: float | None = 0.2  # of the change in value; null: off
    vf_coef: float = 0.1
    # width of a hidden layer in the value head; null: a linear head
    value_hidden: int | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.05  # of the per-token penalty in the reward
    kl_estimator: str = "k1"  # k1, abs, k2, k3 or full (over the vocabulary)
    # nats per completion that an adaptive coefficient steers to; null: fixed
    kl_target: float | None = None
    kl_horizon: float = 10_000.0  # samples over which the adaptive coefficient moves
    kl_loss_coef: float = 0.0  # of the full KL as a term of the loss (ARENA)
    score_scaling: str = "none"  # none, running, first_batch or batch
    score_clip: float | None = None  # clips scores to +- this; null: off
    whiten: str = "batch"  # advantages: batch, minibatch or none
    whiten_rewards: bool = False  # scale the shaped rewards to unit variance
    missing_eos: str = "keep"  # completions without end-of-text: keep, subtract or replace
    missing_eos_value: float = 1.0
    # end the epochs when mean(old - new log-prob) exceeds this; null: off
    stop_kl: float | None = None
    ratio_guard: float | None = None  # skip a minibatch whose mean ratio exceeds this; null: off

    def __post_init__(self) -> None:
        Online.__post_init__(self)
        Rates.__post_init__(self)
        zero = torch.zeros(1)
        if self.kl_estimator != "full":
            losses.kl_estimate(zero, zero, self.kl_estimator)
        require(self.whiten, ("batch", "minibatch", "none"), "algo.whiten")
        apply_missing_eos(zero, zero.bool(), self.missing_eos, self.missing_eos_value)
        ScoreScaling(self.score_scaling)
        if self.epochs < 1:
            raise ValueError(f"algo.epochs={self.epochs} must be at least 1")
        if self.minibatch < 1 or (self.batch * self.samples) % self.minibatch:
            raise ValueError(
                f"algo.minibatch={self.minibatch} must divide the {self.batch * self.samples} "
                "rollouts of a step "
                f"(algo.batch={self.batch} * algo.samples={self.samples})"
            )
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(
                f"algo.kl_target={self.kl_target} must be positive, or null for a fixed coefficient"
            )

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse a policy whose sampling would make the KL wrong."""
        policy.require_plain_sampling("PPO")

    def setup(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        self.policy, self.accelerator, self.reference = policy, trial.accelerator, trial.reference
        self.mixed_precision = trial.mixed_precision
        self.coef = self.kl_coef
        self.scaling = ScoreScaling(self.score_scaling)
        self.kept_forward: tuple[Tensor, Tensor] | None = None
        module = PolicyWithValue(policy.model, self.value_hidden)
        head = list(module.value_head.parameters())
        value_lr = self.lr if self.value_lr is None else self.value_lr
        self.descent = Descent(
            trial.accelerator,
            module,
            [
                *self.by_rate(policy.model),
                Group(head, value_lr, self.weight_decay),
            ],
            betas=self.betas,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )

    # ---- one step

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        assert rollouts.scores is not None
        # 1. scores as the update sees them
        scores = apply_missing_eos(
            rollouts.scores, rollouts.ended, self.missing_eos, self.missing_eos_value
        )
        scores = self.scaling(scores)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        # 2. log-probabilities, values and KL of the policy that sampled
        experience = self.look_back(rollouts)
        if step == 0:
            self._assert_at_start(experience.log_ratio)
        # 3. per-token rewards, advantages, returns
        mask = rollouts.response
        rewards = losses.shape_rewards(experience.kl, scores, mask, self.coef)
        if self.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        experience.advantages, experience.returns = losses.gae(
            rewards, experience.values, mask, self.gamma, self.lam
        )
        if self.whiten == "batch":
            experience.advantages = losses.whiten(experience.advantages, mask)
        # 4. epochs of minibatch updates
        metrics = self.optimize(rollouts, experience, step)
        # 5. the coefficient follows the KL
        metrics |= self._kl_metrics(experience.log_ratio, mask) | {"kl/coef": self.coef}
        if self.kl_target is not None:
            self.coef = losses.adapt_kl_coef(
                self.coef,
                metrics["kl/k1"],
                target=self.kl_target,
                horizon=self.kl_horizon,
                samples=len(rollouts),
            )
        unexplained = (
            (experience.returns - experience.values)[mask.bool()].var()
            if mask.sum() > 1
            else torch.zeros(())
        )
        spread = experience.returns[mask.bool()].var() if mask.sum() > 1 else torch.ones(())
        metrics |= {
            "reward/shaped": float(rewards.sum(1).mean()),
            "ppo/return": float(losses.masked_mean(experience.returns, mask)),
            "ppo/explained_variance": float(1 - unexplained / spread.clamp(min=1e-8)),
        }
        return metrics

    @torch.no_grad()
    def look_back(self, rollouts: Rollouts) -> Experience:
        """Log-probs, values and KL of every response token under the policy as it is now."""
        temperature = self.policy.temperature
        # Where one forward pass covers all rollouts and the minibatch is all of them, it is also
        # the forward pass of the first update: keep its graph.
        reusable = (
            processes.count() == 1
            and rollouts.mask.numel() <= self.token_budget
            and self.minibatch == len(rollouts)
        )

        def ask(batch: Batch) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(reusable):
                output = self.descent.module(batch)
            self.kept_forward = output if reusable else None
            logits, value = (x.detach() for x in output)
            ref_logits = self.reference.logits(batch)
            new = losses.selective_log_softmax(logits, batch.response_ids, temperature)
            ref = losses.selective_log_softmax(ref_logits, batch.response_ids, temperature)
            if self.kl_estimator == "full":
                penalty = losses.full_kl(logits, ref_logits, temperature)
            else:
                penalty = losses.kl_estimate(new, ref, self.kl_estimator)
            return new, value, penalty, new - ref

        with self.reference.ready():
            logprobs, values, kl, log_ratio = by_token(rollouts, self.token_budget, ask)
        if not kl.isfinite().all():
            raise ValueError(
                "the KL to the reference is no longer finite: start again with a lower algo.lr, or "
                "a higher algo.kl_coef"
            )
        return Experience(logprobs, values, kl, log_ratio, advantages=values, returns=values)

    def optimize(self, rollouts: Rollouts, experience: Experience, step: int) -> dict[str, float]:
        """`epochs` passes in shuffled minibatches; stops early on `stop_kl`."""
        scale = self.lr_scale(step, self.steps)
        self.descent.scale(scale)
        totals: dict[str, float] = {}
        stats: dict[str, float] = {}
        updates = applied = 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(rollouts)).split(self.minibatch):
                stats = self.update(rollouts, experience, rows)
                if updates == 0:
                    self._assert_first_ratio(stats["ppo/ratio_error"])
                updates += 1
                applied += int(stats.pop("applied"))
                totals = {k: totals.get(k, 0.0) + v for k, v in stats.items()}
            if self.stop_kl is not None and stats["ppo/policy_kl"] > self.stop_kl:
                break
        if applied == 0:
            raise ValueError(
                "no update of this step had a finite loss and gradient: start again with a lower "
                "algo.lr"
            )
        means = {k: v / updates for k, v in totals.items() if k != "ppo/ratio_error"}
        return means | {
            "ppo/updates": float(updates),
            "ppo/skipped_updates": float(self.descent.skipped),
            "ppo/lr": self.lr * scale,
        }

    def update(self, rollouts: Rollouts, experience: Experience, rows: Tensor) -> dict[str, float]:
        """One optimizer step on the rollouts at `rows`; means are over all their tokens, whatever
        the micro-batches.
        """
        mask = rollouts.response[rows]
        advantages = experience.advantages
        if self.whiten == "minibatch":
            advantages = advantages.clone()
            advantages[rows] = losses.whiten(advantages[rows], mask)
        count = mask.sum().clamp(min=1)
        sums: dict[str, Tensor] = {}
        errors = [0.0]
        for batch, counts in divided_batches(rollouts, rows, self.token_budget):
            loss, stats = self._token_sums(rollouts, experience, advantages, batch)
            self.descent.backward(loss / count * counts)
            errors.append(float(stats.pop("ppo/ratio_error")))
            sums = {k: sums.get(k, torch.zeros(())) + v * counts for k, v in stats.items()}
        sums = over_processes(sums)
        stats = {k: float(v / count) for k, v in sums.items()}
        guarded = self.ratio_guard is not None and stats["ppo/ratio"] > self.ratio_guard
        norm, finite = self.descent.step(hold=guarded)
        return stats | {
            "ppo/grad_norm": norm,
            "ppo/ratio_error": max(processes.gather(max(errors))),
            "applied": float(finite),
        }

    def _token_sums(
        self, rollouts: Rollouts, experience: Experience, advantages: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics summed over the response tokens of a micro-batch."""
        rows, columns = batch.rows, slice(0, batch.length)
        mask = rollouts.response[rows, columns]
        old = experience.logprobs[rows, columns]
        logits, values = self.kept_forward or self.descent.module(batch)
        self.kept_forward = None
        new = losses.selective_log_softmax(logits, batch.response_ids, self.policy.temperature)
        new = torch.where(mask.bool(), new, old)
        policy, clipped = losses.policy_loss(new, old, advantages[rows, columns], self.clip)
        if rollouts.importance is not None:
            policy = policy * rollouts.importance[rows, columns]
        value, value_clipped = losses.value_loss(
            values,
            experience.values[rows, columns],
            experience.returns[rows, columns],
            self.value_clip,
        )
        per_token = policy + self.vf_coef * value
        stats = {"ppo/policy_loss": policy, "ppo/value_loss": value}
        if self.entropy_coef:
            entropy = losses.entropy(logits, self.policy.temperature)
            per_token = per_token - self.entropy_coef * entropy
        else:
            entropy = -new  # an unbiased estimate, at no cost
        if self.kl_loss_coef:
            kl = losses.full_kl(logits, self.reference.logits(batch), self.policy.temperature)
            per_token = per_token + self.kl_loss_coef * kl
            stats["ppo/kl_loss"] = kl
        change = (new - old).detach()
        stats |= {
            "ppo/entropy": entropy,
            "ppo/clip_fraction": clipped.float(),
            "ppo/value_clip_fraction": value_clipped.float(),
            "ppo/ratio": change.exp(),
            "ppo/approx_kl": 0.5 * change.square(),
            "ppo/policy_kl": -change,
        }
        summed = {k: (v.detach() * mask).sum() for k, v in stats.items()}
        summed["ppo/ratio_error"] = (change.exp() - 1).abs().max()
        return (per_token * mask).sum(), summed

    # ---- invariants

    @property
    def _tolerance(self) -> float:
        exact = self.policy.dtype == "float32" and self.mixed_precision == "no"
        return 1e-3 if exact else 0.25

    def _assert_at_start(self, log_ratio: Tensor) -> None:
        worst = float(log_ratio.abs().max())
        assert worst < self._tolerance, (
            f"before training the policy differs from its reference: log-ratio {worst:.2g}, not 0"
        )

    def _assert_first_ratio(self, error: float) -> None:
        assert error < self._tolerance, (
            f"before the first update the ratio is off by {error:.2g}: rollouts and training "
            "disagree"
        )

    @staticmethod
    def _kl_metrics(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
        """Nats per completion: token estimates summed over the response, batch mean."""
        zero = torch.zeros_like(log_ratio)
        return {
            f"kl/{name}": float((losses.kl_estimate(log_ratio, zero, name) * mask).sum(1).mean())
            for name in ("k1", "k2", "k3")
        }

    # ---- resume

    def state(self) -> dict[str, Any]:
        module: Any = self.accelerator.unwrap_model(self.descent.module)
        return self.descent.state() | {
            "value_head": module.value_head.state_dict(),
            "kl_coef": self.coef,
            "scaling": self.scaling.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        module: Any = self.accelerator.unwrap_model(self.descent.module)
        module.value_head.load_state_dict(state["value_head"])
        self.descent.load_state(state)
        self.coef = state["kl_coef"]
        self.scaling.load_state(state["scaling"])
