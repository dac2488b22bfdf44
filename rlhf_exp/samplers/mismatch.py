"""The server's log-probabilities beside ours: kernels, number formats and old weights make them
differ, and an algorithm that takes the one for the other is off-policy without knowing.
"""

import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.policy import (
    MAX_ROLLOUT_TOKENS,
    Batch,
    Policy,
    Rollouts,
    by_token,
)
from rlhf_exp.samplers.server import SUPPRESSED, Completion

OUTSIDE = -9999.0  # log-probability of what cannot be sampled; JSON knows no infinity


def served_logprobs(rollouts: Rollouts, drawn: list[Completion]) -> Tensor:
    """The server's log-probabilities [n, R] of the response tokens, zero elsewhere."""
    served = torch.zeros_like(rollouts.response)
    for row, completion in zip(served, drawn, strict=True):
        row[: len(completion.logprobs)] = torch.tensor(completion.logprobs)
    return served


def compared(rollouts: Rollouts, own: Tensor, served: Tensor) -> dict[str, float]:
    """How far the server's log-probabilities [n, R] are from ours, in nats: mean and largest
    difference, and the k3 estimate of KL(server || policy) per token (Schulman 2020).

    Tokens that top_k or top_p would not leave us are left out.
    """
    both = rollouts.response.bool() & (own > OUTSIDE)
    gap = (own - served)[both].abs()
    return {
        "sampler/logprob_gap": float(gap.mean()),
        "sampler/logprob_gap_max": float(gap.max()),
        "sampler/kl_k3": float(losses.kl_estimate(served, own, "k3")[both].mean()),
    }


def own_logprobs(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Log-probabilities [n, R] of the response tokens under what `policy` samples from, zero
    elsewhere.
    """

    def ask(batch: Batch) -> tuple[Tensor, ...]:
        logits = sampled_logits(policy, policy.logits(batch))
        return (losses.selective_log_softmax(logits, batch.response_ids).clamp(min=OUTSIDE),)

    with policy.whole():
        return by_token(rollouts, MAX_ROLLOUT_TOKENS, ask)[0]


def sampled_logits(policy: Policy, logits: Tensor) -> Tensor:
    """What the next token is drawn from, in the order of vLLM: control tokens and an early end
    suppressed, temperature, top_k, top_p; [b, r, v] -> float32 [b, r, v].
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = logits.float().clone()
    logits[..., policy.control] += SUPPRESSED
    logits[:, : policy.min_new_tokens, policy.tokenizer.eos_token_id] = -torch.inf
    rows = logits.flatten(0, 1) / policy.temperature
    ids = rows.new_zeros(0, dtype=torch.long)  # the warpers do not look at them
    if policy.top_k:
        rows = TopKLogitsWarper(policy.top_k)(ids, rows)  # type: ignore[arg-type]
    if policy.top_p < 1.0:
        rows = TopPLogitsWarper(policy.top_p)(ids, rows)  # type: ignore[arg-type]
    return rows.view_as(logits)
