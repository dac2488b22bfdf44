"""Every formula as a pure function of tensors; nothing here knows a model, a config or a device.

`mask` is 1.0 on response tokens. Losses come back per token, because a mean over one micro-batch is
not the mean over the batch: the caller divides the sum by the token count of the whole batch.

Sources: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (Schulman et al. 2016, 1506.02438),
per-token KL shaping and the adaptive coefficient (Ziegler et al. 2019, 1909.08593), k1/k2/k3
(Schulman, "Approximating KL divergence", 2020), ensemble objectives (Coste et al. 2023, 2310.02743,
eqs. 3-5), pairwise loss (Stiennon et al. 2020, 2009.01325).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_exp.choices import pick

# ---- tokens


def selective_log_softmax(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) at `ids`, without a full-vocabulary copy kept: [b, t, v], [b, t] ->
    [b, t] float32.
    """
    picked = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float() / temperature
    if logits.dtype == torch.float32:
        return picked - (logits if temperature == 1.0 else logits / temperature).logsumexp(-1)
    rows = [(row.float() / temperature).logsumexp(-1) for row in logits]  # one row's copy at a time
    return picked - torch.stack(rows)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / T) in nats: [..., v] -> [...]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def full_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Exact KL(policy || reference) over the vocabulary in nats: [..., v] -> [...]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    ref_logprobs = (ref_logits.float() / temperature).log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def without(logits: Tensor, ids: list[int]) -> Tensor:
    """`logits` without those of the columns `ids` that there are: [..., v] -> [..., v - k]."""
    dropped = sorted(i for i in ids if i < logits.shape[-1])
    if dropped == list(range(logits.shape[-1] - len(dropped), logits.shape[-1])):
        return logits[..., : logits.shape[-1] - len(dropped)]  # the last ones: no copy
    kept = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    kept[dropped] = False
    return logits[..., kept]


KL_ESTIMATORS = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: 0.5 * d.square(),
    "k3": lambda d: torch.expm1(-d) + d,
}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, in nats: [b, t] ->
    [b, t].

    With d = log(policy / reference): k1 = d, abs = |d|, k2 = d^2 / 2 (TRL's "mse"), k3 = exp(-d) -
    1 + d.
    """
    return pick(estimator, KL_ESTIMATORS, "algo.kl_estimator")(logprobs - ref_logprobs)


# ---- rewards, advantages


def shape_rewards(kl: Tensor, scores: Tensor, mask: Tensor, coef: float) -> Tensor:
    """-coef * KL on every response token, plus the score on the last one: [b, t], [b] -> [b, t].

    Zero where the mask is; a response of no tokens has nowhere to receive its score.
    """
    rewards = -coef * kl * mask
    length = mask.sum(1).long()
    rows = length.nonzero().squeeze(1)
    rewards[rows, length[rows] - 1] += scores[rows].to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [b, t]; the value after the last response token is 0 (GAE eq. 16)."""
    advantages = torch.zeros_like(rewards)
    future = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(future)
    values = values * mask
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        future = (delta + gamma * lam * future) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = future
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens the mask keeps; 0 if it keeps none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over all kept tokens of the batch, zero
    elsewhere: [b, t] -> [b, t].

    Call it on the whole batch, never on a micro-batch: two tokens whiten to +-0.7071 whatever their
    reward. One token has no variance; it is centred (to 0) and not scaled.
    """
    count = mask.sum()
    mean = masked_mean(x, mask)
    centred = (x - mean) * mask
    if count < 2:
        return centred if shift_mean else x * mask
    scaled = centred * torch.rsqrt(centred.square().sum() / (count - 1) + 1e-8)
    return scaled if shift_mean else scaled + mean * mask


# ---- PPO losses


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate per token (PPO eq. 7, negated) and whether the clip decided: [b, t] -> [b,
    t], [b, t] bool.
    """
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2) per token, and whether the clip decided:
    [b, t] -> 2 x [b, t].
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """coef * (1 + clip(KL / target - 1, +-0.2) * samples / horizon) (Ziegler et al. 2019, section
    2.2).
    """
    return coef * (1.0 + min(max(kl / target - 1.0, -0.2), 0.2) * samples / horizon)


def lr_scale(step: int, *, total: int, warmup: int, schedule: str, floor: float) -> float:
    """Multiplier of the learning rate: linear warm-up from 0, then constant, linear or cosine down
    to `floor`.
    """
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }
    return floor + (1.0 - floor) * pick(schedule, shape, "algo.schedule")


# ---- reward models


def combine(scores: Tensor, objective: str, weight: float, variance: str) -> Tensor:
    """Ensemble objective over members: [members, n] -> [n] (Coste et al. 2023, eqs. 3-5).

    mean; wco = the worst member; uwo = mean - weight * variance over the members. `variance` is
    population (divide by k: the paper and its best-of-n code) or unbiased (k - 1: its released PPO
    code). One member has variance 0.
    """
    objectives = {
        "mean": lambda: scores.mean(0),
        "wco": lambda: scores.min(0).values,
        "uwo": lambda: scores.mean(0) - weight * ensemble_variance(scores, variance),
    }
    return pick(objective, objectives, "reward.objective")()


def ensemble_variance(scores: Tensor, variance: str) -> Tensor:
    """Variance over the members: [members, n] -> [n]; 0 for one member."""
    correction = pick(variance, {"population": 0, "unbiased": 1}, "reward.variance")
    if scores.shape[0] == 1:
        return torch.zeros_like(scores[0])
    centred = scores - scores.mean(0)  # torch.var takes three times as long over few members
    return centred.square().sum(0) / (scores.shape[0] - correction)


def preference_loss(
    better: Tensor, worse: Tensor, l2: float = 0.0, probability: Tensor | float = 1.0
) -> Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) + l2 / 2 * (better^2 + worse^2) per pair, with
    d = better - worse and p the probability that `better` is: [n] -> [n].

    That is the cross-entropy between a soft label and the softmax of the two rewards (Lee et al.
    2023, RLAIF, arXiv 2309.00267); p = 1 is Bradley-Terry.
    """
    ahead = better - worse
    loss = -probability * F.logsigmoid(ahead) - (1 - probability) * F.logsigmoid(-ahead)
    return loss + 0.5 * l2 * (better.square() + worse.square())


def smoothed(probability: Tensor, rate: float) -> Tensor:
    """Soft labels [n] in the belief that a share `rate` of them is the wrong way round."""
    return (1 - rate) * probability + rate * (1 - probability)
