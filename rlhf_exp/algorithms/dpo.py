"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) through TRL's DPOTrainer,
on the pairs that reward models are fitted on, or in rounds on pairs sampled from the policy itself.

The loss needs log-probabilities of the reference for every pair, and these are computed once,
before a round: no second model lies in memory while it trains, `trial.reference` may be a copy, an
adapter switched off or a shared trunk, and a round continues after an interruption from the pairs
in its file. They are sums over the completion's tokens, the end of text included, at temperature 1.

Conservative DPO (Mitchell 2023) is cross-entropy against labels that are wrong with probability
eps: -(1 - eps) log s(x) - eps log s(-x) with x = beta h. TRL has no such loss, but its `robust`
one, [-(1 - e) log s(x) + e log s(-x)] / (1 - 2 e), is the same function at e = -eps / (1 - 2 eps).
So it is with soft labels, where eps is a pair's own: the sigmoid loss becomes the conservative one.

Left out: several losses at once, f-divergences other than the reverse KL.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.algorithms.online import prompts_at
from rlhf_exp.algorithms.trainer import (
    TrainerAlgorithm,
    Training,
    completion_ids,
    mixed,
    one_device,
)
from rlhf_exp.choices import require
from rlhf_exp.data.local import read_jsonl, write_jsonl
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import (
    MAX_ROLLOUT_TOKENS,
    Batch,
    Policy,
    Rollouts,
    by_token,
)
from rlhf_exp.preferences import paired, wins
from rlhf_exp.rewards import score
from rlhf_exp.trial import Trial

logger = logging.getLogger(__name__)

LOSSES = (
    "sigmoid", "conservative", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Losses that `label_smoothing` changes, and whether they can do without.
SMOOTHED = {"conservative": False, "robust": False, "exo_pair": False, "aot": True,
            "aot_unpaired": True}  # fmt: skip
SIDES = ("chosen", "rejected")

# prompt, chosen, rejected, perhaps probability; prompt_ids, <side>_ids, ref_<side>_logps
Row = dict[str, Any]


class PairTraining(Training):
    """Rows come tokenized and with the reference's log-probabilities; soft ones also with the
    probability that their chosen side is the better one.
    """

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "probability" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "probability"]

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """TRL's; its robust loss takes the labels of this batch for as sure as they are."""
        if "probability" in inputs:
            self.label_smoothing = robust_rate(inputs.pop("probability"))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset


def robust_rate(probability: Tensor) -> Tensor:
    """The e at which TRL's robust loss is the cross-entropy to soft labels [n]; even odds, at which
    there is none, count as 0.5001.
    """
    wrong = (1 - probability).clamp(max=0.4999)
    return -wrong / (1 - 2 * wrong)


def soft(collator: Callable[[list[Row]], dict[str, Any]]) -> Callable[[list[Row]], dict[str, Any]]:
    """`collator`, which also hands on the probability of each row [b]."""

    def collate(rows: list[Row]) -> dict[str, Any]:
        return collator(rows) | {"probability": torch.tensor([row["probability"] for row in rows])}

    return collate


@dataclass(kw_only=True)
class DPO(TrainerAlgorithm):
    """Settings; see conf/algo/dpo.yaml for the numbers."""

    name: ClassVar[str] = "dpo"
    renamed: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "rejected_reward",
        "logps/chosen": "chosen_logprob",
        "logps/rejected": "rejected_logprob",
        "entropy": "entropy",
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
        "epoch": "epoch",
    }

    pairs: str = "dataset"  # dataset: of the stage preferences; sampled: of the policy
    epochs: float = 1.0  # passes over the pairs, in each round
    steps: int | None = None  # optimizer steps of a round; null: as many as `epochs` takes
    loss: str = "sigmoid"
    beta: float = 0.1  # of the KL to the reference; for ipo its tau
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    reference: str = "start"  # start; previous: the policy before the round; none: reference-free
    max_length: int = 512  # tokens of prompt and completion; longer pairs are left out and counted
    rounds: int = 1  # times pairs are sampled
    pairs_per_round: int = 1024
    samples: int = 4  # completions per prompt that pairs are made of
    pairing: str = "best_worst"  # best_worst: one pair per prompt; all: every two that differ
    ranked_by: str = "reward"  # reward or labeller

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pairs, ("dataset", "sampled"), "algo.pairs")
        require(self.loss, LOSSES, "algo.loss")
        require(self.reference, ("start", "previous", "none"), "algo.reference")
        require(self.pairing, ("best_worst", "all"), "algo.pairing")
        require(self.ranked_by, ("reward", "labeller"), "algo.ranked_by")
        if self.beta <= 0 or self.epochs <= 0 or min(self.rounds, self.pairs_per_round) < 1:
            raise ValueError(
                f"algo.beta={self.beta}, algo.epochs={self.epochs}, algo.rounds={self.rounds} and "
                f"algo.pairs_per_round={self.pairs_per_round} must be positive"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"algo.steps={self.steps} must be positive, or null")
        self._check_smoothing()
        if self.pairs == "sampled" and self.samples < 2:
            raise ValueError(
                f"algo.samples={self.samples}: a pair takes two completions of a prompt; set "
                "algo.samples to at least 2"
            )
        if self.pairs == "dataset" and self.rounds > 1:
            raise ValueError(
                f"algo.rounds={self.rounds} samples new pairs in each round: set "
                "algo.pairs=sampled, or raise algo.epochs for more passes over the same ones"
            )

    def _check_smoothing(self) -> None:
        told = f"algo.label_smoothing={self.label_smoothing}"
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"{told} must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(
                f"{told} has no effect on algo.loss={self.loss}: set it to 0, or algo.loss to one "
                f"of {', '.join(SMOOTHED)}"
            )
        if not self.label_smoothing and not SMOOTHED.get(self.loss, True):
            raise ValueError(
                f"algo.loss={self.loss} is about labels that may be wrong: give "
                "algo.label_smoothing, such as 0.1 (exo_pair: 0.001)"
            )

    # ---- rounds

    def run(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        """Train `policy` in place; steps count on through the rounds."""
        stored, held_out = self._stored(policy, trial) if self.pairs == "dataset" else ([], [])
        length = self.steps_on(len(stored) or self.pairs_per_round)
        start, resume = self.begin(policy, trial, self.rounds * length)
        for number in range(start // length, self.rounds):
            file = trial.directory / "pairs" / f"round-{number}.jsonl"
            if start > number * length:  # in the midst of a round
                rows, self.counts = read_jsonl(file), {}
            else:
                rows, resume = stored or self._sampled(policy, reward, data, trial, number), None
                self._ask_reference(rows, policy, trial, number)
                write_jsonl(file, rows)
            self._ask_reference(held_out, policy, trial, number)

            def build(folder: str, rows: list[Row] = rows, seed: int = trial.seed + number) -> Any:
                return self._trainer(folder, policy, rows, held_out, seed)

            self.fit(build, policy, trial, done=number * length, resume=resume)

    def steps_on(self, pairs: int) -> int:
        """Optimizer steps of a round."""
        return self.steps or math.ceil(self.epochs * math.ceil(pairs / self.batch))

    def record(self, trial: Trial, step: int, metrics: dict[str, float], seconds: float) -> None:
        """The first step of a round also tells of its pairs."""
        counts = {f"dpo/{k}": float(v) for k, v in self.counts.items()}
        super().record(trial, step, metrics | counts, seconds)
        self.counts = {}

    def _ours(self, logs: dict[str, Any], prefix: str = "") -> dict[str, float]:
        found = super()._ours(logs, prefix)
        rewards = [k for k in found if k.endswith("_reward")]  # beta * (log policy - log reference)
        ratios = {k.replace("_reward", "_log_ratio"): found.pop(k) / self.beta for k in rewards}
        return found | ratios

    def _trainer(
        self, folder: str, policy: Policy, rows: list[Row], held_out: list[Row], seed: int
    ) -> Any:
        from datasets import Dataset as Rows
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        robust = self.loss == "conservative" or (self.loss == "sigmoid" and _unsure(rows))
        if self.loss not in ("sigmoid", "conservative") and _unsure(rows):
            logger.warning("algo.loss=%s takes soft labels for certain", self.loss)
        if robust:
            rows, held_out = ([self._smoothed(row) for row in part] for part in (rows, held_out))
        arguments = DPOConfig(
            output_dir=folder,
            loss_type=["robust" if robust else self.loss],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            max_length=None,
            precompute_ref_log_probs=True,
            **self.arguments(policy, self.steps_on(len(rows)), seed),
        )
        trainer = mixed(PairTraining, DPOTrainer)(
            model=policy.model,
            args=one_device(arguments),
            train_dataset=Rows.from_list(rows),
            eval_dataset=Rows.from_list(held_out) if held_out else None,
            processing_class=policy.tokenizer,
        )
        if robust:
            trainer.data_collator = soft(trainer.data_collator)
        return trainer

    def _smoothed(self, row: Row) -> Row:
        label = torch.tensor(row.get("probability", 1.0))
        return row | {"probability": float(losses.smoothed(label, self.label_smoothing))}

    # ---- pairs

    def _stored(self, policy: Policy, trial: Trial) -> tuple[list[Row], list[Row]]:
        """The training pairs of the stage `preferences`, and its clean evaluation pairs."""
        model = policy.model  # if the pairs have yet to be made, the start policy is loaded anew
        folder = trial.pairs()
        policy.model = model
        clean, _ = self._short(_encoded(policy, read_jsonl(folder / "evaluation.jsonl")))
        train, too_long = self._short(_encoded(policy, read_jsonl(folder / "train.jsonl")))
        if not train:
            raise ValueError(
                f"none of {too_long} preference pairs fits algo.max_length={self.max_length} "
                "tokens: raise it"
            )
        self._tell({"pairs": len(train), "too_long": too_long})
        return train, clean

    def _sampled(
        self, policy: Policy, reward: Any, data: Dataset, trial: Trial, number: int
    ) -> list[Row]:
        """`pairs_per_round` pairs of completions of the policy as it is."""
        rank = self._judge(reward, trial)
        wanted, seed = self.pairs_per_round, trial.seed + number
        batch = max(1, policy.sample_batch // self.samples)
        rows: list[Row] = []
        counts = Counter(pairs=0, ties=0, equal_texts=0, too_long=0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            while len(rows) < wanted and counts["prompts"] < 4 * wanted:
                prompts = prompts_at(data.prompts, counts["prompts"] // batch, batch, seed)
                counts["prompts"] += batch
                rollouts = policy.sample(prompts, self.samples)
                completions = rollouts.completions
                found, dropped = paired(completions, rank(rollouts), self.samples, self.pairing)
                short, too_long = self._short(_rows(policy, rollouts, found))
                counts.update(dropped | {"too_long": too_long})
                rows += short
                if not rows:  # no reason to think that more would be found
                    break
        if len(rows) < wanted:
            raise ValueError(
                f"only {len(rows)} of algo.pairs_per_round={wanted} pairs came of "
                f"{counts['prompts']} prompts with {self.samples} completions each "
                f"({counts['ties']} ties by algo.ranked_by={self.ranked_by}, "
                f"{counts['equal_texts']} equal texts, {counts['too_long']} longer than "
                f"algo.max_length={self.max_length}): lower algo.pairs_per_round, raise "
                "algo.samples, or let the policy vary more (policy.temperature)"
            )
        self._tell(counts | {"pairs": wanted})
        return rows[:wanted]

    def _tell(self, counts: dict[str, int]) -> None:
        self.counts = counts
        logger.info("dpo: %s", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items()))

    def _judge(self, reward: Any, trial: Trial) -> Callable[[Rollouts], Tensor]:
        """What ranks completions: rollouts -> [n], higher is better among those of a prompt."""
        if self.ranked_by == "reward":
            return lambda r: score(reward, r.prompts, r.completions).objective
        labeller = trial.labeller()
        if labeller.source == "dataset":
            raise ValueError(
                "algo.ranked_by=labeller needs a labeller that can judge new completions, and "
                "labeller=dataset knows the data's own pairs only: use labeller=gold, or "
                "algo.ranked_by=reward"
            )
        n = self.samples
        return lambda r: wins(r.prompts[::n], r.completions, labeller, n)

    def _short(self, rows: list[Row]) -> tuple[list[Row], int]:
        """Those within `max_length`, and how many are not."""
        kept = [
            row
            for row in rows
            if len(row["prompt_ids"]) + max(len(row[f"{s}_ids"]) for s in SIDES) <= self.max_length
        ]
        return kept, len(rows) - len(kept)

    def _ask_reference(self, rows: list[Row], policy: Policy, trial: Trial, number: int) -> None:
        """Add the reference's log-probability of either side to each row."""
        ask = trial.reference.logits
        if self.reference == "previous" and number > 0:
            ask = policy.logits
        for side in SIDES if rows else ():
            values = [0.0] * len(rows)
            if self.reference != "none":
                rollouts = policy.assemble(
                    [row["prompt"] for row in rows], [row[f"{side}_ids"] for row in rows]
                )
                with trial.reference.ready():
                    values = sequence_logprobs(ask, rollouts).tolist()
            for row, value in zip(rows, values, strict=True):
                row[f"ref_{side}_logps"] = value


@torch.no_grad()
def sequence_logprobs(ask: Callable[[Batch], Tensor], rollouts: Rollouts) -> Tensor:
    """Log-probability of each response [n], from logits [b, r, v] of its micro-batches."""

    def logprobs(batch: Batch) -> tuple[Tensor]:
        return (losses.selective_log_softmax(ask(batch), batch.response_ids),)

    (found,) = by_token(rollouts, MAX_ROLLOUT_TOKENS, logprobs)
    return found.sum(1).cpu()


def _unsure(rows: list[Row]) -> bool:
    return any(row.get("probability", 1.0) != 1.0 for row in rows)


def _rows(policy: Policy, rollouts: Rollouts, pairs: list[tuple[int, int]]) -> list[Row]:
    asked, ids = policy.encode(rollouts.prompts), rollouts.responses()
    return [
        {"prompt": rollouts.prompts[better], "prompt_ids": asked[better]}
        | {"chosen": rollouts.completions[better], "chosen_ids": ids[better]}
        | {"rejected": rollouts.completions[worse], "rejected_ids": ids[worse]}
        for better, worse in pairs
    ]


def _encoded(policy: Policy, pairs: list[dict[str, Any]]) -> list[Row]:
    prompts = [pair["prompt"] for pair in pairs]
    columns = {"prompt_ids": policy.encode(prompts)}
    for side in SIDES:
        columns[f"{side}_ids"] = completion_ids(policy, prompts, [pair[side] for pair in pairs])
    return [pair | {k: v[i] for k, v in columns.items()} for i, pair in enumerate(pairs)]
