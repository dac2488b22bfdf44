"""What a policy is worth on held-out prompts: proxy, gold, KL to the start, lengths, diversity.

Evaluation draws from its own random generator, so evaluating more often does not change what is
trained.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_exp import losses
from rlhf_exp.artifacts import write_json
from rlhf_exp.evaluation.toxicity import expected_maximum_toxicity, toxicity_probability
from rlhf_exp.policy import (
    MAX_ROLLOUT_TOKENS,
    Batch,
    Policy,
    Rollouts,
    by_token,
    cut,
)
from rlhf_exp.reference import Reference
from rlhf_exp.rewards import score

# What every evaluation has; the members of the reward come on top.
COLUMNS = {
    "proxy": "reward/proxy",
    "gold": "reward/gold",
    "k1": "kl/k1",
    "k3": "kl/k3",
    "length": "length/mean",
    "ended": "length/ended",
}
DISTINCT = {f"text/distinct_{n}": n for n in (1, 2, 3)}
INSANE = 1e4  # perplexities from here on are left out of the mean (Lu et al. 2022, Quark)
METRICS = (*COLUMNS.values(), "reward/variance", *DISTINCT)


@dataclass(kw_only=True)
class Evaluation:
    """How often and on what; sampling is the policy's own (temperature, top_k, top_p)."""

    # steps between evaluations; start and end are always evaluated; null: a sixth of the run
    every: int | None = None
    prompts: int = 256  # held-out prompts used
    samples: int = 1  # completions per prompt
    seed: int = 1234  # draws the completions
    harness: Any = None  # benchmarks of the start and the final policy

    def __post_init__(self) -> None:
        if min(1 if self.every is None else self.every, self.prompts, self.samples) < 1:
            raise ValueError(
                "evaluation.every, evaluation.prompts and evaluation.samples must be at least 1"
            )


class Evaluator:
    """Writes evaluation/step-<k>.json, one row per completion, and returns the means."""

    def __init__(
        self, settings: Evaluation, prompts: list[str], proxy: Any, gold: Any, directory: Path
    ) -> None:
        self.settings, self.proxy, self.gold = settings, proxy, gold
        self.prompts = prompts[: settings.prompts]
        self.folder = directory / "evaluation"

    def due(self, step: int, last: int) -> bool:
        every = self.settings.every or max(1, last // 6)
        return step % every == 0 or step == last

    def __call__(self, step: int, policy: Policy, reference: Reference) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            rollouts = policy.sample(self.prompts, self.settings.samples)
        proxy = score(self.proxy, rollouts.prompts, rollouts.completions)
        gold = score(self.gold, rollouts.prompts, rollouts.completions, "gold")
        log_ratio, surprise = against_reference(policy, reference, rollouts)
        zero = torch.zeros_like(log_ratio)
        columns: dict[str, Any] = {
            "prompt": rollouts.prompts,
            "completion": rollouts.completions,
            "proxy": proxy.objective.tolist(),
            "gold": gold.objective.tolist(),
            "length": rollouts.response.sum(1).tolist(),
            "ended": rollouts.ended.tolist(),
            "perplexity": surprise.exp().tolist(),
        }
        columns |= {k: losses.kl_estimate(log_ratio, zero, k).sum(1).tolist() for k in ("k1", "k3")}
        columns |= {f"proxy/{k}": v.tolist() for k, v in proxy.members.items()}
        facets = gold.facets | proxy.facets
        columns |= {f"facet/{k}": v.tolist() for k, v in facets.items()}
        return write_evaluation(self.folder, step, columns, policy, self.settings.seed)


def write_evaluation(
    folder: Path, step: int, columns: dict[str, list[Any]], policy: Policy, seed: int
) -> dict[str, float]:
    """Write `folder`/step-<step>.json, one row per entry of the columns, and return the means."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    sampling = {k: getattr(policy, k) for k in ("temperature", "top_k", "top_p", "max_new_tokens")}
    means = summarise(rows)
    about = {"step": step, "seed": seed, "sampling": sampling}
    write_json(folder / f"step-{step:06d}.json", about | {"metrics": means, "rows": rows})
    return means


@torch.no_grad()
def against_reference(
    policy: Policy, reference: Reference, rollouts: Rollouts
) -> tuple[torch.Tensor, torch.Tensor]:
    """log policy - log reference of each response token [n, r], zero elsewhere, and the mean
    negative log-likelihood of each completion under the reference [n]; on the CPU, in nats.

    The reference is asked as it was at the start, without what conditioning has put before the
    prompts since.
    """
    asked = rollouts
    if policy.prefix != reference.prefix:
        before = [reference.prefix] * len(rollouts)
        asked = policy.assemble(rollouts.prompts, rollouts.responses(), before)

    def ask(batch: Batch) -> tuple[torch.Tensor, ...]:
        logits = losses.without(policy.logits(batch), policy.control)
        ref_batch = batch if asked is rollouts else cut(asked, batch.rows)
        ref_logits = losses.without(reference.logits(ref_batch), policy.control)
        new, ref = (
            losses.selective_log_softmax(x, batch.response_ids, policy.temperature)
            for x in (logits, ref_logits)
        )
        return new - ref, -losses.selective_log_softmax(ref_logits, batch.response_ids)

    with policy.whole(), reference.ready():
        found, nll = by_token(rollouts, MAX_ROLLOUT_TOKENS, ask)
    return found.cpu(), (nll.sum(1) / rollouts.response.sum(1).clamp(min=1)).cpu()


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the completions, under the names that metrics and figures use."""

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    members = [k for k in rows[0] if k.startswith("proxy/")]
    spread = [row.get("variance", np.var([row[m] for m in members] or [0.0])) for row in rows]
    facets = {k: k.replace("facet/", "reward/") for k in rows[0] if k.startswith("facet/")}
    sane = [row["perplexity"] for row in rows if row.get("perplexity", INSANE) < INSANE]
    names = COLUMNS | {m: f"reward/{m}" for m in members} | facets
    texts = [row["completion"] for row in rows]
    return (
        {name: mean(key) for key, name in names.items()}
        | {"reward/variance": float(sum(spread) / len(spread))}
        | {name: distinct(texts, n) for name, n in DISTINCT.items()}
        | ({"text/perplexity": sum(sane) / len(sane)} if sane else {})
        | _worst_toxicity(rows)
    )


def _worst_toxicity(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over the completions of each prompt, where a reward tells their toxicity."""
    if "facet/toxicity" not in rows[0]:
        return {}
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row["facet/toxicity"])
    samples = min(map(len, by_prompt.values()))
    table = torch.tensor([values[:samples] for values in by_prompt.values()])
    return {
        "toxicity/expected_maximum": expected_maximum_toxicity(table),
        "toxicity/probability": toxicity_probability(table),
    }


def distinct(texts: list[str], n: int) -> float:
    """Share of different n-grams among all n-grams of whitespace-separated words; 0 if there are
    none.
    """
    grams = [
        tuple(words[i : i + n])
        for words in map(str.split, texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, by step."""
    return [
        json.loads(p.read_text()) for p in sorted((directory / "evaluation").glob("step-*.json"))
    ]


def bootstrap_interval(
    values: list[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    x = np.asarray(values)
    means = x[np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _by_prompt(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Mean over each prompt's completions: those are not independent of each other."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row[key])
    return [math.fsum(values) / len(values) for values in found.values()]


def summary(directory: Path) -> dict[str, Any]:
    """Before and after with 95 % intervals over held-out prompts, the change paired by prompt, and
    the peak of gold.
    """
    evaluations = read_evaluations(directory)
    first, last = evaluations[0], evaluations[-1]
    table: dict[str, Any] = {"step": last["step"], "completions": len(last["rows"])}
    for key, name in (("proxy", "proxy"), ("gold", "gold"), ("k1", "kl"), ("length", "length")):
        before, after = (_by_prompt(e["rows"], key) for e in (first, last))
        table["prompts"] = len(after)
        change = [b - a for a, b in zip(before, after, strict=True)]
        table[name] = {
            side: {"mean": math.fsum(x) / len(x), "interval": bootstrap_interval(x)}
            for side, x in (("before", before), ("after", after), ("change", change))
        }
    peak = max(evaluations, key=lambda e: e["metrics"]["reward/gold"])
    table["gold_peak"] = {
        "step": peak["step"],
        "mean": peak["metrics"]["reward/gold"],
        "kl": peak["metrics"]["kl/k1"],
    }
    return table
