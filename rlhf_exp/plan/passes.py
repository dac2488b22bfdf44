"""The forward and backward passes of a run, done over tensors that have shapes and no data.

Each function gives a `Pass`: from a model it makes what the pass starts from, and the pass itself.
The losses are the algorithms' own methods wherever these can work on shapes alone; what depends on
values (cutting micro-batches, early stops) is said by the caller.

Left out: eager attention, whose scores are not kept by the kernels traced here; judges of ALT that
are local models; temporaries of an algorithm outside its passes.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import singledispatch
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_exp import losses
from rlhf_exp.algorithms.dpo import DPO
from rlhf_exp.algorithms.imitation import Imitation
from rlhf_exp.algorithms.ppo import PPO, Experience, PolicyWithValue
from rlhf_exp.algorithms.trainer import TrainerAlgorithm
from rlhf_exp.algorithms.trl_online import TRLOnline
from rlhf_exp.plan.live import Live, Parts
from rlhf_exp.plan.skeleton import Skeleton, settle
from rlhf_exp.policy import Batch, Policy, response_logits
from rlhf_exp.reference import Reference
from rlhf_exp.rewards.pairwise import Pairwise

Run = Callable[[Live], None]
Pass = Callable[[Any], tuple[Iterable[Tensor], Run]]  # model -> what lies there already, the pass
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Shapes(FakeTensorMode):
    """Tensors are shapes; a copied module stays under the mode it was made in."""

    def __deepcopy__(self, memo: Any) -> "Shapes":
        return self


def trace(skeleton: Skeleton, work: Pass) -> Parts:
    """What `work` makes on a model of this kind at its peak, by name, in bytes.

    Blocks are alike, so of a deep model two shallow ones are traced, and each block more takes what
    their difference shows. Either the widest point or the end, where all gradients are, may be the
    peak of the deep one.
    """
    low = (skeleton.train_top or 1) + 1
    high = low + 2
    if skeleton.depth <= high:
        return _once(skeleton, work)[0]
    shallow, deeper = (_once(skeleton.cut(depth), work) for depth in (low, high))
    share = (skeleton.depth - low) / (high - low)
    found = [
        {k: (1 - share) * a.get(k, 0.0) + share * b.get(k, 0.0) for k in {*a, *b}}
        for a, b in zip(shallow, deeper, strict=True)
    ]
    return max(found, key=lambda parts: sum(parts.values()))


def _once(skeleton: Skeleton, work: Pass) -> tuple[Parts, Parts]:
    """At the peak, and at the end."""
    vocabulary = skeleton.config.get_text_config().vocab_size
    with torch.device("meta"):
        model = skeleton.build()
    with Shapes():
        settle(model)
        return watch(model, work, vocabulary)


def watch(model: Any, work: Pass, vocabulary: int | None = None) -> tuple[Parts, Parts]:
    """What `work` makes on `model`, at its peak and its end; over real tensors, a measurement."""
    there, run = work(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    resident = [*model.parameters(), *model.buffers(), *there]
    live = Live(resident, vocabulary)
    with live:
        run(live)
    for parameter in [*trained, *resident]:
        if parameter.grad is not None:
            live.hold(parameter.grad, "gradients")
    return live.peak, live.end


def _sequence(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, length]."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return ids, torch.ones_like(ids)


# ---- sampling


def prefill(policy: Policy, rows: int, prompt: int) -> Pass:
    """The first token of `rows` completions."""

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(rows, prompt)
        model.eval()

        def run(live: Live) -> None:
            cache = _next(model, policy, ids, mask, None)[0]
            _name_cache(live, cache)

        return [ids, mask], run

    return work


def decode(policy: Policy, rows: int, prompt: int) -> Pass:
    """The last token of `rows` completions as long as the policy may make them."""

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(rows, prompt + policy.max_new_tokens)
        model.eval()
        with torch.no_grad(), policy.precision():
            cache = model(input_ids=ids[:, :-2], attention_mask=mask[:, :-2], logits_to_keep=1,
                          use_cache=True).past_key_values  # fmt: skip

        def run(live: Live) -> None:
            _name_cache(live, cache)
            _, *before = _next(model, policy, ids[:, -2:-1], mask[:, :-1], cache)
            del before[1:]  # the scores of a step are there until those of the next are
            _next(model, policy, ids[:, -1:], mask, cache)
            _name_cache(live, cache)

        return [ids, mask], run

    return work


@torch.no_grad()
def _next(model: Any, policy: Policy, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Any, ...]:
    """The cache, and what generate() has drawn the next token from."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    with policy.precision():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits = scores = out.logits[:, -1].to(copy=True, dtype=torch.float32)
    if policy.min_new_tokens or policy.control:
        scores = torch.where(scores > 0, -torch.inf, scores.clone())  # tokens not to be drawn
    if policy.temperature != 1.0:
        scores = TemperatureLogitsWarper(policy.temperature)(ids, scores)  # type: ignore[arg-type]
    if policy.top_k:
        scores = TopKLogitsWarper(policy.top_k)(ids, scores)  # type: ignore[arg-type]
    if policy.top_p < 1.0:
        scores = TopPLogitsWarper(policy.top_p)(ids, scores)  # type: ignore[arg-type]
    chances = scores.softmax(-1)
    torch.multinomial(chances, 1)
    return out.past_key_values, (logits, scores, chances)


def _name_cache(live: Live, cache: Any) -> None:
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                live.hold(tensor, "KV cache")


# ---- scoring


def classify(rows: int, length: int) -> Pass:
    """Scores of `rows` texts under a reward model."""

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(rows, length)
        asked: Any = SimpleNamespace(model=model)

        @torch.no_grad()
        def run(live: Live) -> None:
            Pairwise._forward(asked, ids, mask)

        return [ids, mask], run

    return work


def read(rows: int, length: int) -> Pass:
    """Hidden states of `rows` texts."""

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(rows, length)
        double = getattr(model.config, "is_encoder_decoder", False)
        answer = {"decoder_input_ids": ids[:, :4]} if double else {}

        @torch.no_grad()
        def run(live: Live) -> None:
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **answer)

        return [ids, mask], run

    return work


def compare(
    policy: Policy, rows: int, prompt: int, again: bool = False, apart: bool = True
) -> Pass:
    """Log-probabilities of responses under policy and reference, as an evaluation asks for them; or
    under the reference alone.
    """

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        batch, reference = _batch(policy, rows, prompt), _reference(policy, model)

        @torch.no_grad()
        def run(live: Live) -> None:
            logits = ref_logits = None  # those of a micro-batch stay until the next has its own
            for _ in range(1 + again):
                with policy.precision():
                    logits = response_logits(model, batch)[0] if apart else None
                ref_logits = reference.logits(batch)
                _asked(batch, policy, *(x for x in (logits, ref_logits) if x is not None))

        return [*_held(batch), *_own(reference, model)], run

    return work


def _asked(batch: Batch, policy: Policy, *logits: Tensor) -> list[Tensor]:
    return [losses.selective_log_softmax(x, batch.response_ids, policy.temperature) for x in logits]


# ---- learning


@singledispatch
def learn(
    algo: Any, policy: Policy, rows: int, prompt: int, again: bool, mixed: str
) -> Pass | None:
    """Forward and backward over a micro-batch of `rows` rollouts, once more on top of the gradients
    of the first if `again`; None for an algorithm that trains nothing.
    """
    return None


@learn.register
def _(algo: PPO, policy: Policy, rows: int, prompt: int, again: bool, mixed: str) -> Pass:
    algo = copy.copy(algo)

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        module = PolicyWithValue(model, algo.value_hidden)
        batch = _batch(policy, rows, prompt)
        algo.policy, algo.reference, algo.kept_forward = policy, _reference(policy, model), None
        algo.descent = SimpleNamespace(module=_precise(module, mixed))  # type: ignore[assignment]
        rollouts, seen = _experience(rows, policy.max_new_tokens)

        def run(live: Live) -> None:
            if not again and algo.minibatch == algo.batch * algo.samples:
                look_back(algo, batch, reusable=True)
            for _ in range(1 + again):
                loss, _stats = algo._token_sums(rollouts, seen, seen.advantages, batch)
                (loss / batch.mask.sum()).backward()

        there = [*module.parameters(), *_held(batch), *_own(algo.reference, model)]
        return [*there, rollouts.response, *vars(seen).values()], run

    return work


def looking_back(algo: PPO, policy: Policy, rows: int, prompt: int, mixed: str) -> Pass:
    """Log-probabilities, values and KL of a micro-batch, no graph kept."""
    algo = copy.copy(algo)

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        module, batch = PolicyWithValue(model, algo.value_hidden), _batch(policy, rows, prompt)
        algo.policy, algo.reference = policy, _reference(policy, model)
        algo.descent = SimpleNamespace(module=_precise(module, mixed))  # type: ignore[assignment]
        there = [*module.parameters(), *_held(batch), *_own(algo.reference, model)]
        return there, lambda live: look_back(algo, batch, reusable=False)

    return work


@torch.no_grad()
def look_back(algo: PPO, batch: Batch, *, reusable: bool) -> None:
    """What PPO.look_back makes of a micro-batch."""
    with torch.set_grad_enabled(reusable):
        output = algo.descent.module(batch)
    algo.kept_forward = output if reusable else None
    logits = output[0].detach()
    ref_logits = algo.reference.logits(batch)
    _asked(batch, algo.policy, logits, ref_logits)
    if algo.kl_estimator == "full":
        losses.full_kl(logits, ref_logits, algo.policy.temperature)


@learn.register
def _(algo: Imitation, policy: Policy, rows: int, prompt: int, again: bool, mixed: str) -> Pass:
    algo = copy.copy(algo)

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        batch = _batch(policy, rows, prompt)
        algo.policy, algo.reference = policy, _reference(policy, model)
        algo.descent = SimpleNamespace(module=_precise(model, mixed))  # type: ignore[assignment]
        examples: Any = SimpleNamespace(asked=None)

        def run(live: Live) -> None:
            for _ in range(1 + again):
                terms = algo._terms(examples, batch)
                loss = terms["nll"] + sum(terms[k] for k in ("kl", "entropy") if k in terms)
                loss.sum().backward()

        return [*_held(batch), *_own(algo.reference, model)], run

    return work


@learn.register
def _(
    algo: TrainerAlgorithm, policy: Policy, rows: int, prompt: int, again: bool, mixed: str
) -> Pass:
    """TRL's trainers, whose head is fused with the loss. DPO has both sides of a pair in a row."""
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy") if isinstance(algo, DPO | TRLOnline) else (
        "log_probs", "entropy", "is_top1")  # fmt: skip

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(rows * (1 + isinstance(algo, DPO)), prompt + policy.max_new_tokens)
        add_fused_lm_head(model.get_base_model() if hasattr(model, "peft_config") else model,
                          outputs=outputs)  # fmt: skip
        ask = _precise(model.train(), mixed)

        def run(live: Live) -> None:
            for _ in range(1 + again):
                out = ask(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False,
                          fused_lm_head=True)  # fmt: skip
                out.log_probs.sum().backward()

        return [ids, mask], run

    return work


def fit(rows: int, length: int, again: bool, mixed: str) -> Pass:
    """A step of TRL's RewardTrainer over `rows` pairs."""

    def work(model: Any) -> tuple[Iterable[Tensor], Run]:
        ids, mask = _sequence(2 * rows, length)
        ask = _precise(model, mixed)

        def run(live: Live) -> None:
            for _ in range(1 + again):
                better, worse = ask(input_ids=ids, attention_mask=mask).logits.squeeze(-1).chunk(2)
                losses.preference_loss(better, worse, 0.001).mean().backward()

        return [ids, mask], run

    return work


# ---- what they stand on


def _batch(policy: Policy, rows: int, prompt: int) -> Batch:
    ids, mask = _sequence(rows, prompt + policy.max_new_tokens)
    return Batch(torch.arange(rows), ids, mask, policy.max_new_tokens)


def _held(batch: Batch) -> list[Tensor]:
    return [batch.rows, batch.ids, batch.mask]


def _experience(rows: int, response: int) -> tuple[Any, Experience]:
    seen = [torch.ones(rows, response) for _ in range(6)]
    rollouts = SimpleNamespace(response=torch.ones(rows, response), importance=None)
    return rollouts, Experience(*seen)


def _reference(policy: Policy, model: Any) -> Reference:
    """Of `model` as it is; its copies are no part of a pass."""
    told: Any = SimpleNamespace(
        model=model, lora=policy.lora, train_top=policy.train_top, prefix=policy.prefix,
        precision=policy.precision, device=next(model.parameters()).device,
    )  # fmt: skip
    with warnings.catch_warnings():  # copies of tensors without data ask where their data lies
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        return Reference(told)


def _kept(reference: Any, model: Any) -> Any:
    """The model that a reference asks beside `model`; `model` itself, if there is none."""
    return getattr(reference.kind, "model", getattr(reference.kind, "top", model))


def _own(reference: Any, model: Any) -> list[Tensor]:
    """The copies of a reference."""
    kept = _kept(reference, model)
    return [] if kept is model else [*kept.parameters(), *kept.buffers()]


def _precise(module: nn.Module, mixed: str) -> Callable[..., Any]:
    """`module` as Accelerate prepares it for mixed precision."""
    if mixed not in AUTOCAST:
        return module
    from accelerate.utils import convert_outputs_to_fp32

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", AUTOCAST[mixed]):
            return module(*args, **kwargs)

    return convert_outputs_to_fp32(forward)
