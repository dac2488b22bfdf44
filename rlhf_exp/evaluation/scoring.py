"""What a policy is worth on held-out prompts: proxy, gold, KL to the start, win rate against it,
lengths, diversity, repetition, perplexity, right answers.

Evaluation draws from its own random generator, so evaluating more often does not change what is
trained. The gold may be asked later (`settle`), when the memory of training is free.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_exp import losses
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.evaluation.summary import evaluation_files
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
from rlhf_exp.rewards import Scores, ask, score
from rlhf_exp.rewards.format import plain

# What a row may have, and the name of its mean; the members of the reward come on top.
COLUMNS = {
    "proxy": "reward/proxy",
    "gold": "reward/gold",
    "win": "win/start",
    "correct": "task/accuracy",
    "k1": "kl/k1",
    "k3": "kl/k3",
    "exact": "kl/exact",
    "length": "length/mean",
    "ended": "length/ended",
    "repetition": "text/repetition",
}
DISTINCT = {f"text/distinct_{n}": n for n in (1, 2, 3)}
INSANE = 1e4  # perplexities from here on are left out of the mean (Lu et al. 2022, Quark)
NOT_ALWAYS = ("correct", "exact")
METRICS = (  # that every run can be judged by
    *(name for key, name in COLUMNS.items() if key not in NOT_ALWAYS), "reward/variance", *DISTINCT,
)  # fmt: skip


@dataclass(kw_only=True)
class Evaluation:
    """How often and on what; sampling is the policy's own (temperature, top_k, top_p)."""

    # steps between evaluations; start and end are always evaluated; null: a sixth of the run
    every: int | None = None
    prompts: int = 256  # held-out prompts used
    samples: int = 1  # completions per prompt
    seed: int = 1234  # draws the completions
    exact_kl: bool = True  # the KL over the whole vocabulary, too, beside its estimates
    # during: the gold judges each evaluation at once; after: when training has ended and its memory
    # is free
    gold: str = "during"
    harness: Any = None  # benchmarks before and after training, or null

    def __post_init__(self) -> None:
        require(self.gold, ("during", "after"), "evaluation.gold")
        if min(1 if self.every is None else self.every, self.prompts, self.samples) < 1:
            raise ValueError(
                "evaluation.every, evaluation.prompts and evaluation.samples must be at least 1"
            )


class Evaluator:
    """Writes evaluation/step-<k>.json, one row per completion, and returns the means. A `gold` of
    None is asked later; `answers` are the right ones, by prompt, where the data knows them.
    """

    def __init__(
        self,
        settings: Evaluation,
        prompts: list[str],
        proxy: Any,
        gold: Any,
        directory: Path,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self.proxy, self.gold = settings, proxy, gold
        self.prompts = prompts[: settings.prompts]
        self.answers = answers or {}
        self.folder = directory / "evaluation"

    def due(self, step: int, last: int) -> bool:
        every = self.settings.every or max(1, last // 6)
        return step % every == 0 or step == last

    def tidy(self, last: int) -> None:
        """Drop evaluations that a run of `last` steps does not make: somebody has looked at it
        meanwhile.
        """
        for path in evaluation_files(self.folder):
            if not self.due(int(path.stem.removeprefix("step-")), last):
                path.unlink()

    def written(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return (self.folder / f"step-{step:06d}.json").exists()

    def __call__(self, step: int, policy: Policy, reference: Reference) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            rollouts = policy.sample(self.prompts, self.settings.samples)
        texts = rollouts.completions
        proxy = score(self.proxy, rollouts.prompts, texts)
        found = against_reference(policy, reference, rollouts, exact=self.settings.exact_kl)
        zero = torch.zeros_like(found.log_ratio)
        columns: dict[str, Any] = {
            "prompt": rollouts.prompts,
            "completion": texts,
            "proxy": proxy.objective.tolist(),
            "length": rollouts.response.sum(1).tolist(),
            "ended": rollouts.ended.tolist(),
            "perplexity": found.surprise.exp().tolist(),
            "repetition": [repetition(text) for text in texts],
        }
        for k in ("k1", "k3"):
            columns[k] = losses.kl_estimate(found.log_ratio, zero, k).sum(1).tolist()
        if found.exact is not None:
            columns["exact"] = found.exact.sum(1).tolist()
        columns |= {f"proxy/{k}": v.tolist() for k, v in proxy.members.items()}
        if right := correct(self.answers, rollouts.prompts, texts):
            columns["correct"] = right
        if self.gold is not None:
            columns |= gold_columns(self.gold, rollouts.prompts, texts)
        columns |= {f"facet/{k}": v.tolist() for k, v in proxy.facets.items()}
        return write_evaluation(self.folder, step, columns, policy, self.settings.seed)


def gold_columns(
    gold: Any,
    prompts: list[str],
    completions: list[str],
    asked: Callable[..., Scores] = score,
) -> dict[str, list[float]]:
    """What the gold says of completions: its score, and what else it has to tell. `asked` as
    `rewards.ask` where one process of several does it.
    """
    found = asked(gold, prompts, completions, "gold")
    return {"gold": found.objective.tolist()} | {
        f"facet/{k}": v.tolist() for k, v in found.facets.items()
    }


def correct(
    answers: Mapping[str, str], prompts: list[str], completions: list[str]
) -> list[bool] | None:
    """Whether each completion is the right answer, up to space and punctuation around it; None
    unless all prompts have one.
    """
    if not answers or any(prompt not in answers for prompt in prompts):
        return None
    told = zip(prompts, completions, strict=True)
    return [plain(text) == plain(answers[prompt]) for prompt, text in told]


def write_evaluation(
    folder: Path, step: int, columns: dict[str, list[Any]], policy: Policy, seed: int
) -> dict[str, float]:
    """Write `folder`/step-<step>.json, one row per entry of the columns, and return the means."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    sampling = {k: getattr(policy, k) for k in ("temperature", "top_k", "top_p", "max_new_tokens")}
    return _write(folder, {"step": step, "seed": seed, "sampling": sampling}, rows)


def _write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Write an evaluation, with its win rate against the run's first one, and return the means."""
    if "gold" in rows[0] and "win" not in rows[0]:
        first = next((e for e in evaluation_files(folder)), None)
        start = None if first is None else json.loads(first.read_text())
        before = rows if start is None or start["step"] >= about["step"] else start["rows"]
        for row, win in zip(rows, wins(rows, before), strict=True):
            row["win"] = win
    means = summarise(rows)
    write_json(folder / f"step-{about['step']:06d}.json", about | {"metrics": means, "rows": rows})
    return means


def wins(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Of each row, the share of the `others` with its prompt that it beats by gold; a tie counts
    half.
    """
    gold: dict[str, list[float]] = {}
    for other in others:
        gold.setdefault(other["prompt"], []).append(other["gold"])
    return [
        math.fsum((row["gold"] > g) + (row["gold"] == g) / 2 for g in gold[row["prompt"]])
        / len(gold[row["prompt"]])
        for row in rows
    ]


def settle(directory: Path, gold: Callable[[], Any]) -> None:
    """Have the gold judge the evaluations of a run that it has not seen, by this process alone; it
    is not loaded if there are none.
    """
    for path in evaluation_files(directory / "evaluation"):
        about = json.loads(path.read_text())
        rows = about.pop("rows")
        if "gold" in rows[0]:
            continue
        prompts, texts = ([row[k] for row in rows] for k in ("prompt", "completion"))
        for name, values in gold_columns(gold(), prompts, texts, ask).items():
            for row, value in zip(rows, values, strict=True):
                row.setdefault(name, value)
        _write(path.parent, about, rows)


@dataclass
class AgainstReference:
    """Of each response token [n, r], zero elsewhere: log policy - log reference, and the exact KL
    over the vocabulary unless it was not asked for; of each completion [n], its mean negative
    log-likelihood under the reference. On the CPU, in nats.
    """

    log_ratio: torch.Tensor
    surprise: torch.Tensor
    exact: torch.Tensor | None


@torch.no_grad()
def against_reference(
    policy: Policy, reference: Reference, rollouts: Rollouts, *, exact: bool = False
) -> AgainstReference:
    """How far the policy has gone, on its own rollouts.

    The reference is asked as it was at the start, without what conditioning has put before the
    prompts since. The sum of the exact KL over a completion's tokens estimates the same KL as k1
    does, with less variance: only the completion is drawn, not each token's log ratio.
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
        found = new - ref, -losses.selective_log_softmax(ref_logits, batch.response_ids)
        if not exact:
            return found
        rows = zip(logits, ref_logits, strict=True)  # one by one: copies of one at a time
        return *found, torch.stack([losses.full_kl(x, y, policy.temperature) for x, y in rows])

    with policy.whole(), reference.ready():
        log_ratio, nll, *kl = by_token(rollouts, MAX_ROLLOUT_TOKENS, ask)
    surprise = (nll.sum(1) / rollouts.response.sum(1).clamp(min=1)).cpu()
    return AgainstReference(log_ratio.cpu(), surprise, kl[0].cpu() if kl else None)


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the completions, under the names that metrics and figures use."""

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    members = [k for k in rows[0] if k.startswith("proxy/")]
    spread = [row.get("variance", np.var([row[m] for m in members] or [0.0])) for row in rows]
    facets = {k: k.replace("facet/", "reward/") for k in rows[0] if k.startswith("facet/")}
    sane = [row["perplexity"] for row in rows if row.get("perplexity", INSANE) < INSANE]
    names = {k: v for k, v in COLUMNS.items() if k in rows[0]}
    names |= {m: f"reward/{m}" for m in members} | facets
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


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that were in it before, 0 to 1: seq-rep-n of Welleck et
    al. 2020 (arXiv 1908.04319).
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
