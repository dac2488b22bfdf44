"""Bytes that one process holds, phase by phase: what lies there throughout, divided as ZeRO divides
it, and what a phase makes on top (passes.py).

With P processes, the optimizer's states are divided by P from stage 1 on, gradients from stage 2,
weights from stage 3 (Rajbhandari et al. 2020, ZeRO, section 5). Under ZeRO the optimizer keeps
float32 weights of its own: 12 bytes for each trained parameter; without, AdamW keeps two moments in
the parameter's own dtype. Reference and reward models lie as hardware.frozen says.

Left out: the buffers of collective operations beyond one bucket of gradients, and what an allocator
loses to fragments; `fits` keeps 5 % of a device for these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_exp.algorithms.best_of_n import BestOfN
from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.imitation import Imitation
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.algorithms.rest import ReST
from rlhf_exp.algorithms.sft import SFT
from rlhf_exp.algorithms.trainer import TrainerAlgorithm
from rlhf_exp.algorithms.trl_online import TRLOnline
from rlhf_exp.plan import passes
from rlhf_exp.plan.live import Parts
from rlhf_exp.plan.scorers import Scorer
from rlhf_exp.plan.skeleton import Counts, Skeleton
from rlhf_exp.policy import MAX_ROLLOUT_TOKENS

GIB = 2.0**30
BUCKET = 500_000_000  # gradients that ZeRO hands over at once (DeepSpeed's reduce_bucket_size)
GATHERED = 1_000_000_000  # weights whole at once under ZeRO-3 (its stage3_max_live_parameters)


@dataclass
class Job:
    """What a plan is about: the objects of a config, and how long its texts are."""

    stages: list[str]
    skeleton: Skeleton  # of the policy
    policy: Any
    algo: Any
    sft: Any
    evaluation: Any
    labeller: Any
    preferences: Any
    hardware: Any
    scorers: list[Scorer]
    prompts: list[int]  # tokens, shortest first
    held_out: list[int]
    demonstrations: list[int]  # tokens of prompt and completion, shortest first
    known: dict[str, Parts] = field(default_factory=dict)  # passes traced before

    @property
    def processes(self) -> int:
        """On all nodes together."""
        return self.hardware.processes * self.hardware.nodes

    @property
    def mixed(self) -> str:
        return self.hardware.mixed_precision

    def share(self, rows: int) -> int:
        """Of `rows`, those of one process."""
        return -(-rows // self.processes)

    def trace(self, skeleton: Skeleton, what: Callable[..., Any], *args: Any) -> Parts:
        """`passes.trace`, each pass once."""
        key = f"{skeleton.key}{what.__name__}{[_decides(a) for a in args]}"
        if key not in self.known:
            work = what(*args)
            self.known[key] = {} if work is None else passes.trace(skeleton, work)
        return self.known[key]

    def widest(self, count: int, budget: int) -> tuple[int, int]:
        """Rows and prompt length of the micro-batch with most logits among `count` rollouts that
        are as long as they may be: policy.micro_batches sorts, and the shortest prompts go first.
        """
        last = len(self.prompts) - 1
        spaced = [self.prompts[i * last // max(1, count - 1)] for i in range(count)]
        rows = 1
        while rows < count:
            if (rows + 1) * (spaced[rows] + self.policy.max_new_tokens) > budget:
                break
            rows += 1
        return rows, spaced[rows - 1]


def _decides(argument: Any) -> Any:
    """What of an argument decides a pass: sizes of batches reach it as numbers of their own."""
    apart = ("token_budget", "micro_batch", "sample_batch", "tokenizer", "prefix")
    if isinstance(argument, int | str):
        return argument
    return {k: str(v) for k, v in vars(argument).items() if k not in apart}


@dataclass
class Phase:
    """One process's bytes while a part of a stage runs."""

    stage: str
    name: str
    parts: Parts
    knob: str | None = None  # the setting that a smaller micro-batch is asked for by

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def add(*parts: Parts) -> Parts:
    """Sums by name, in order of appearance."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: sum(each.get(name, 0.0) for each in parts) for name in names}


def most(*parts: Parts) -> Parts:
    """The largest."""
    return max(parts, key=lambda each: sum(each.values()))


def phases(job: Job) -> Iterator[Phase]:
    """Every phase of the stages asked for, as if no artifact were there yet."""
    made = {
        "sft": _sft, "preferences": _preferences, "reward": _reward, "align": _align,
        "generate": _generate,
    }  # fmt: skip
    for stage in job.stages:
        if stage in made:
            yield from made[stage](job)


# ---- what lies there


def held(job: Job, counts: Counts, *, trains: bool = True, whole: bool = False) -> Parts:
    """The policy's weights, and the states of its optimizer if it `trains`; under ZeRO-3 with the
    weights that are gathered, all of them if `whole` (to sample).
    """
    stage, count = job.hardware.stage, job.processes
    parts = {"weights": counts.bytes}
    if stage == 3:
        shard = 0.0 if job.hardware.offload_parameters else counts.bytes / count
        gathered = 1.0 if whole else min(1.0, GATHERED / counts.total)
        parts["weights"] = shard + gathered * counts.bytes
    if trains:
        parts["optimizer"] = _states(job, counts.trained, counts.trained_bytes)
    return parts


def _states(job: Job, trained: int, size: float) -> float:
    if not job.hardware.masters:
        return 2 * size / (job.processes if job.hardware.stage else 1)
    offloaded = job.hardware.offload_optimizer
    return 0.0 if offloaded else 12.0 * trained / job.processes


def _divided(job: Job, counts: Counts, made: Parts) -> Parts:
    """What a backward pass made, with gradients as the processes keep and exchange them."""
    stage = job.hardware.stage
    gradients = made.get("gradients", 0.0)
    if job.processes > 1 or stage:
        bucket = counts.trained_bytes * min(1.0, BUCKET / max(1, counts.trained))
        kept = gradients / job.processes if stage >= 2 else gradients
        if stage >= 2 and job.hardware.offload_optimizer:
            kept = 0.0
        gradients = kept + (bucket if stage else counts.trained_bytes)
    return made | {"gradients": gradients}


def _standing(job: Job, *, whole: bool = False) -> Parts:
    """What lies there throughout the stage align."""
    counts = job.skeleton.counts
    parts = held(job, counts, trains=not isinstance(job.algo, BestOfN), whole=whole)
    if isinstance(job.algo, PPO):
        size = _value_head(job)
        parts["value head"] = 4.0 * size
        parts["optimizer"] += _states(job, size, 4.0 * size)
    return parts | {name: _put_away(job, size) for name, size in _frozen(job).items() if size}


def _frozen(job: Job) -> Parts:
    """Models that the stage align asks and never trains, whole; see frozen.py."""
    reference = _reference(job)
    if getattr(job.algo, "kl_coef", 0) and isinstance(job.algo, ReST):
        reference += job.skeleton.counts.bytes  # the behavior policy
    return {"reference": reference} | {s.name: s.bytes for s in job.scorers}


def _put_away(job: Job, size: float) -> float:
    """Of a model of `size` bytes, what lies on a device while nobody asks it."""
    if job.hardware.frozen == "sharded":
        return size / job.processes
    offloaded = job.hardware.frozen == "offloaded" and job.hardware.kind == "cuda"
    return 0.0 if offloaded else size


def _asked(job: Job, standing: Parts, name: str) -> Parts:
    """`standing`, with the whole of the frozen model `name`."""
    return standing | {name: _frozen(job)[name]} if name in standing else standing


def _value_head(job: Job) -> int:
    width = job.skeleton.config.get_text_config().hidden_size
    hidden = job.algo.value_hidden
    return width + 1 if hidden is None else width * hidden + 2 * hidden + 1


def _reference(job: Job) -> float:
    """See reference.py."""
    if job.policy.lora is not None:
        return 0.0
    counts = job.skeleton.counts
    return counts.trained_bytes if job.policy.train_top is not None else counts.bytes


# ---- stages


def _sft(job: Job) -> Iterator[Phase]:
    if job.policy.sft:
        weights = held(job, job.skeleton.counts)
        yield Phase("sft", "update", add(weights, _by_trainer(job, job.sft)), "sft.micro_batch")


def _by_trainer(job: Job, algo: TrainerAlgorithm) -> Parts:
    longest = max(job.demonstrations) if isinstance(algo, SFT) else job.prompts[-1] + _new(job) + 1
    length = min(getattr(algo, "max_length", longest), longest)
    again = job.share(algo.rows_per_step) > algo.micro_batch
    made = job.trace(
        job.skeleton, passes.learn, algo, job.policy, algo.micro_batch, length - _new(job), again,
        job.mixed,
    )  # fmt: skip
    return _divided(job, job.skeleton.counts, made)


def _new(job: Job) -> int:
    return job.policy.max_new_tokens


def _sampled(job: Job, skeleton: Skeleton, count: int, longest: int) -> Parts:
    rows = min(job.policy.sample_batch, count)
    return most(
        job.trace(skeleton, passes.prefill, job.policy, rows, longest),
        job.trace(skeleton, passes.decode, job.policy, rows, longest),
    )


def _preferences(job: Job) -> Iterator[Phase]:
    if job.labeller.source != "sampled":
        return
    frozen = job.skeleton.frozen()
    parts = held(job, frozen.counts, trains=False, whole=True)
    parts |= {s.name: s.bytes for s in job.scorers if s.gold}
    made = _sampled(job, frozen, min(1024, 2 * job.preferences.pairs), job.prompts[-1])
    yield Phase("preferences", "sampling", add(parts, made), "policy.sample_batch")


def _generate(job: Job) -> Iterator[Phase]:
    frozen = job.skeleton.frozen()
    parts = held(job, frozen.counts, trains=False, whole=True)
    parts |= {s.name: s.bytes for s in job.scorers}
    made = _sampled(job, frozen, job.policy.sample_batch, job.prompts[-1])
    yield Phase("generate", "sampling", add(parts, made), "policy.sample_batch")


def _reward(job: Job) -> Iterator[Phase]:
    """Members are fitted one after the other; those before, and the start policy, stay."""
    fitted = held(job, job.skeleton.frozen().counts, trains=False)
    for scorer in job.scorers:
        if scorer.training is not None and not (scorer.gold and not scorer.fits):
            counts = scorer.skeleton.counts
            states = {"weights": counts.bytes, "optimizer": 2 * counts.trained_bytes}
            settings = scorer.training
            again = settings.batch > settings.micro_batch
            length = min(settings.max_length, scorer.length)
            made = job.trace(
                scorer.skeleton, passes.fit, settings.micro_batch, length, again, job.mixed
            )
            yield Phase(
                "reward", scorer.name, add(fitted, states, made), f"{scorer.key}.micro_batch"
            )
        fitted = add(fitted, {scorer.name: scorer.bytes})


def _align(job: Job) -> Iterator[Phase]:
    standing, algo = _standing(job), job.algo
    sampled = {**standing, **held(job, job.skeleton.counts, trains=False, whole=True)}
    count = job.share(getattr(algo, "batch", 1) * getattr(algo, "samples", 1))
    if not isinstance(algo, SFT) and not (isinstance(algo, DPO) and algo.pairs == "dataset"):
        by_trl = isinstance(algo, TRLOnline)  # samples all at once
        rows = count if by_trl else min(job.policy.sample_batch, count)
        made = most(
            job.trace(job.skeleton, passes.prefill, job.policy, rows, job.prompts[-1]),
            job.trace(job.skeleton, passes.decode, job.policy, rows, job.prompts[-1]),
        )
        knob = "algo.batch" if by_trl else "policy.sample_batch"
        yield Phase("align", "sampling", add(sampled, made), knob)
    for scorer in job.scorers:
        if (made := scorer.scoring(job, count)) is not None:
            yield Phase(
                "align",
                f"scoring: {scorer.name}",
                add(_asked(job, standing, scorer.name), made),
                scorer.knob,
            )
    yield from _learning(job, standing)
    yield from _evaluation(job, standing, sampled)


def _learning(job: Job, standing: Parts) -> Iterator[Phase]:
    algo, policy, skeleton = job.algo, job.policy, job.skeleton
    if isinstance(algo, TrainerAlgorithm):
        yield Phase("align", "update", add(standing, _by_trainer(job, algo)), "algo.micro_batch")
    if isinstance(algo, DPO):
        rows, prompt = job.widest(4096, MAX_ROLLOUT_TOKENS)
        made = job.trace(skeleton, passes.compare, policy, rows, prompt, True, False)
        yield Phase("align", "reference", add(_asked(job, standing, "reference"), made))
    if not isinstance(algo, PPO | Imitation):
        return
    count = job.share(algo.batch * algo.samples)
    if isinstance(algo, PPO):
        rows, prompt = job.widest(count, algo.token_budget)
        made = job.trace(skeleton, passes.looking_back, algo, policy, rows, prompt, job.mixed)
        asked = _asked(job, standing, "reference")
        yield Phase("align", "look-back", add(asked, made), "algo.token_budget")
    minibatch = job.share(min(algo.minibatch, algo.batch * algo.samples))
    rows, prompt = job.widest(minibatch, algo.token_budget)
    again = rows < minibatch
    made = job.trace(skeleton, passes.learn, algo, policy, rows, prompt, again, job.mixed)
    if algo.kl_loss_coef if isinstance(algo, PPO) else algo.kl_coef:
        standing = _asked(job, standing, "reference")
    update = add(standing, _divided(job, skeleton.counts, made))
    yield Phase("align", "update", update, "algo.token_budget")


def _evaluation(job: Job, standing: Parts, sampled: Parts) -> Iterator[Phase]:
    """Samples, and asks the reference within a budget of its own."""
    count = min(job.evaluation.prompts, len(job.held_out)) * job.evaluation.samples
    made = _sampled(job, job.skeleton, count, job.held_out[-1])
    yield Phase("align", "evaluation: sampling", add(sampled, made), "policy.sample_batch")
    if not isinstance(job.algo, BestOfN):
        rows, prompt = job.widest(count, MAX_ROLLOUT_TOKENS)
        made = job.trace(job.skeleton, passes.compare, job.policy, rows, prompt, rows < count)
        asked = _asked(job, standing, "reference")
        yield Phase("align", "evaluation: KL", add(asked, made), "evaluation.prompts")
