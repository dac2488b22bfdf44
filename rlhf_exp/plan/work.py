"""Floating-point operations of a run, and how long they take.

A product of a token with N weights takes 2 N operations forward, and backward 2 N for the gradient
of the token and 2 N more for that of the weights, where these are trained: 6 N in all (Kaplan et
al. 2020, arXiv 2001.08361, section 2.1). N counts what is multiplied: embeddings that are looked up
are not in it, the head is where logits are made. Attention adds 4 * layers * width * context per
token forward and twice that backward, every token seeing the whole context (Chowdhery et al. 2022,
PaLM, appendix B); a token that is sampled sees what is before it. Recomputed activations do not
count, so the utilization is of useful operations (MFU).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from rlhf_exp.algorithms.best_of_n import BestOfN
from rlhf_exp.algorithms.conditional import Conditional
from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.imitation import Imitation
from rlhf_exp.algorithms.online_preferences import OnlinePreferences
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.rest import ReST
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.algorithms.trl_online import TRLOnline
from rlhf_exp.plan.memory import Job
from rlhf_exp.plan.skeleton import Counts


@dataclass(frozen=True)
class Texts:
    """`rows` prompts with completions, and their mean lengths in tokens."""

    rows: float
    prompt: float
    response: float

    @property
    def length(self) -> float:
        return self.prompt + self.response


def forward(counts: Counts, texts: Texts, logits: float | None = None) -> float:
    """Operations of one forward pass; `logits` are made for that many tokens of each text, by
    default for its response.
    """
    made = texts.response if logits is None else logits
    attention = 4.0 * counts.layers * counts.width * texts.length
    per_text = (2.0 * counts.body + attention) * texts.length + 2.0 * counts.head * made
    return texts.rows * per_text


def backward(counts: Counts, texts: Texts, logits: float | None = None) -> float:
    """Operations of one backward pass, which ends at the first trained parameter."""
    made = texts.response if logits is None else logits
    share = counts.reached / max(1, counts.body)
    attention = 8.0 * counts.layers * counts.width * texts.length * share
    products = 2.0 * (counts.reached + counts.trained_linear)
    head = 2.0 * (counts.head + counts.trained_head) * made
    return texts.rows * ((products + attention) * texts.length + head)


def sampling(counts: Counts, texts: Texts) -> float:
    """Operations of completing prompts, keys and values kept."""
    context = texts.prompt**2 + texts.response * (texts.prompt + texts.response / 2)
    attention = 4.0 * counts.layers * counts.width * context
    products = 2.0 * counts.body * texts.length + 2.0 * counts.head * texts.response
    return texts.rows * (products + attention)


def mfu(flops: float, seconds: float, peak_tflops: float, processes: int = 1) -> float:
    """Model FLOPs utilization: the share of what `processes` devices could have done in `seconds`
    at `peak_tflops` each (PaLM, appendix B).
    """
    return flops / (seconds * peak_tflops * 1e12 * processes)


# ---- what a step of an algorithm learns


@singledispatch
def learning(algo: Any, counts: Counts, texts: Texts) -> float:
    """Operations of one step's learning from `texts`, the completions it sampled or was given."""
    raise TypeError(f"no count of operations for {type(algo).__name__}")


@learning.register
def _(algo: OnlinePreferences, counts: Counts, texts: Texts) -> float:
    return learning(algo.learner, counts, texts)


@learning.register
def _(algo: BestOfN, counts: Counts, texts: Texts) -> float:
    return 0.0


@learning.register
def _(algo: PPO, counts: Counts, texts: Texts) -> float:
    """Policy and reference look back once; each epoch goes forward and backward."""
    asked = forward(counts, texts)
    return 2 * asked + algo.epochs * (asked + backward(counts, texts))


@learning.register
def _(algo: Imitation, counts: Counts, texts: Texts) -> float:
    rows = _imitated(algo, texts.rows)
    chosen = Texts(rows, texts.prompt, texts.response)
    asked = forward(counts, chosen)
    return asked * (2 if algo.kl_coef else 1) + backward(counts, chosen)


def _imitated(algo: Imitation, sampled: float) -> float:
    """Completions an imitation passes in a step, at most."""
    if isinstance(algo, ReST):
        return algo.epochs * sampled * len(algo.levels)
    if isinstance(algo, Conditional) and algo.updates is not None:
        return algo.updates * algo.minibatch
    return (getattr(algo, "epochs", None) or 1) * sampled


@learning.register
def _(algo: SFT, counts: Counts, texts: Texts) -> float:
    return forward(counts, texts, texts.length) + backward(counts, texts, texts.length)


@learning.register
def _(algo: DPO, counts: Counts, texts: Texts) -> float:
    """Both sides of each pair, every token through the head (TRL)."""
    both = Texts(2 * texts.rows, texts.prompt, texts.response)
    return forward(counts, both, both.length) + backward(counts, both, both.length)


@learning.register
def _(algo: TRLOnline, counts: Counts, texts: Texts) -> float:
    seen = forward(counts, texts, texts.length)
    asked = seen if algo.kl_coef else 0.0
    return asked + algo.iterations * (seen + backward(counts, texts, texts.length))


def step_flops(algo: Any, counts: Counts, scored: list[Counts], texts: Texts) -> dict[str, float]:
    """Operations of one step by kind (sample, score, learn), all processes together: what
    `time/<kind>` of the metrics is to be divided into. `scored` are the reward models' counts.
    """
    return {
        "sample": sampling(counts, texts),
        "score": sum(forward(each, texts) for each in scored),
        "learn": learning(algo, counts, texts),
    }


# ---- a whole run


@dataclass
class Work:
    """Of one stage, all processes together."""

    stage: str
    generated: float  # tokens, if every completion is as long as it may be
    flops: dict[str, float]  # by kind


def works(job: Job) -> Iterator[Work]:
    """Of every stage asked for, as if no artifact were there yet; completions as long as they may
    be.
    """
    new, counts = job.policy.max_new_tokens, job.skeleton.counts
    prompt = sum(job.prompts) / len(job.prompts)
    if "sft" in job.stages and job.policy.sft:
        told = sum(job.demonstrations) / len(job.demonstrations)
        rows = _passed(job.sft, len(job.demonstrations))
        yield Work("sft", 0.0, {"learn": learning(job.sft, counts, Texts(rows, told, 0.0))})
    pairs = job.preferences.pairs + job.preferences.evaluation_pairs
    if "preferences" in job.stages and job.labeller.source == "sampled":
        texts = Texts(2 * pairs, prompt, new)
        yield Work("preferences", texts.rows * new, {"sample": sampling(counts, texts)})
    if "reward" in job.stages and any(s.fits for s in job.scorers):
        flops = 0.0
        for scorer in job.scorers:
            if scorer.training is not None:
                both = Texts(2 * pairs * scorer.training.epochs, scorer.length, 0.0)
                flops += forward(scorer.skeleton.counts, both)
                flops += backward(scorer.skeleton.counts, both)
        yield Work("reward", 0.0, {"learn": flops})
    if "align" in job.stages:
        yield _align(job, prompt, new)


def _passed(algo: Any, rows: int) -> float:
    """Rows that a trainer sees."""
    return algo.steps * algo.batch if algo.steps is not None else algo.epochs * rows


def _align(job: Job, prompt: float, new: int) -> Work:
    steps, texts = job_steps(job, prompt, new)
    counts = job.skeleton.counts
    scored = [s.skeleton.counts for s in job.scorers if not s.gold]
    flops = {k: steps * v for k, v in step_flops(job.algo, counts, scored, texts).items()}
    sampled = texts.rows * steps
    if isinstance(job.algo, SFT) or (isinstance(job.algo, DPO) and job.algo.pairs == "dataset"):
        flops["sample"] = flops["score"] = sampled = 0.0
    looks = 7 if job.evaluation.every is None else 2 + steps // job.evaluation.every
    asked = Texts(
        min(job.evaluation.prompts, len(job.held_out)) * job.evaluation.samples, prompt, new
    )
    if not isinstance(job.algo, BestOfN):
        flops["sample"] += looks * sampling(counts, asked)
        flops["score"] += looks * sum(forward(s.skeleton.counts, asked) for s in job.scorers)
        flops["learn"] += looks * 2 * forward(counts, asked)
        sampled += looks * asked.rows
    return Work("align", sampled * new, flops)


def job_steps(job: Job, prompt: float, new: int) -> tuple[float, Texts]:
    """How many steps the algorithm takes, and on what."""
    algo = job.algo
    if isinstance(algo, BestOfN):
        return 1, Texts((algo.prompts or len(job.held_out)) * algo.samples, prompt, new)
    if isinstance(algo, SFT):
        told = sum(job.demonstrations) / len(job.demonstrations)
        return 1, Texts(_passed(algo, len(job.demonstrations)), told, 0.0)
    if isinstance(algo, DPO):
        pairs = job.preferences.pairs if algo.pairs == "dataset" else algo.pairs_per_round
        return algo.rounds, Texts(_passed(algo, pairs), prompt, new)
    return algo.steps, Texts(algo.batch * algo.samples, prompt, new)
