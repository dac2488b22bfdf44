"""Supervised fine-tuning on demonstrations, through TRL's SFTTrainer; the loss falls on the
completion only.

As the stage `sft` it makes the start policy; as `algo=sft` it is a trial like any other. Packing
puts several examples into one row. Attention keeps them apart by their position ids where the
model's attention mask is made from these (eager, sdpa and flash attention of Llama, Qwen, GPT-NeoX,
GPT-2, ...); OPT, whose positions come from the attention mask, lets every example read the one
before it. So it is tried on the very model before it trains, and refused if anything leaks.

Left out: loss on prompts, and packing that cuts examples in two.
"""

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from rlhf_exp.algorithms.trainer import (
    TrainerAlgorithm,
    Training,
    completion_ids,
    mixed,
    one_device,
    scratch,
)
from rlhf_exp.artifacts import write_json
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.policy import Policy
from rlhf_exp.trial import Trial

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SFT(TrainerAlgorithm):
    """Imitates the demonstrations."""

    key: ClassVar[str] = "sft"
    name: ClassVar[str] = "sft"
    renamed: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "mean_token_accuracy": "token_accuracy",
        "entropy": "entropy",
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
        "epoch": "epoch",
    }

    epochs: float = 3.0  # passes over the demonstrations
    steps: int | None = None  # optimizer steps; null: as many as `epochs` takes
    lr: float = 1e-3
    schedule: str = "cosine"  # constant, linear or cosine
    warmup: float = 0.03  # share of the steps with a rising learning rate
    batch: int = 64  # demonstrations per optimizer step; rows of several under `packing`
    micro_batch: int = 64
    max_length: int = 512  # tokens of prompt and completion; longer demonstrations are cut
    packing: bool = False  # several demonstrations in a row of `max_length` tokens
    held_out: int = 0  # last demonstrations, not trained on; their loss is reported
    seed: int = 0  # order of the demonstrations; as an algorithm, added to the run's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1) or self.held_out < 0:
            raise ValueError(
                f"{self.key}.epochs={self.epochs} and {self.key}.steps={self.steps} must be "
                f"positive, {self.key}.held_out={self.held_out} at least 0"
            )

    # ---- as an algorithm

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse data without demonstrations."""
        super().check(policy, data)
        self.require_demonstrations(data)

    def run(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        """Train `policy` in place, one step of the trial per optimizer step."""
        rows = self.rows(policy, data)
        start, resume = self.begin(policy, trial, self.steps_on(rows[0]))

        def build(folder: str) -> Any:
            return self._trainer(folder, policy, rows, seed=trial.seed + self.seed)

        if start < trial.steps:
            self.fit(build, policy, trial, resume=resume)

    # ---- as a stage

    def make(self, folder: Path, data: Dataset, policy: Policy) -> None:
        """Train `policy`, loaded and trainable, and save weights and tokenizer to `folder`."""
        self.train(folder, data, policy)
        model = policy.model.merge_and_unload() if policy.lora is not None else policy.model
        model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    def train(self, folder: Path, data: Dataset, policy: Policy) -> None:
        """Train `policy` in place; report.json in `folder` tells of the held-out demonstrations, if
        there are any.
        """
        rows = self.rows(policy, data)
        with scratch(policy) as scribbles:
            bar = {"disable_tqdm": not sys.stderr.isatty(), "logging_strategy": "no"}
            trainer = self._trainer(scribbles, policy, rows, seed=self.seed, **bar)
            trainer.settings = self
            trainer.run()
            if rows[1] is not None:
                found = self._ours(trainer.evaluate(), "eval_")
                logger.info("held-out demonstrations: %s", found)
                write_json(folder / "report.json", found)

    # ---- rows and trainer

    def rows(self, policy: Policy, data: Dataset) -> tuple[Any, Any]:
        """Tokenized demonstrations to train on, and those held out, or None."""
        self.require_demonstrations(data)
        told = data.demonstrations
        cut = len(told) - self.held_out
        held_out = self._encoded(policy, told[cut:]) if self.held_out else None
        train = self._encoded(policy, told[:cut])
        if self.packing:
            refuse_leaks(policy)
            train = self._packed(train)
        return train, held_out

    def _encoded(self, policy: Policy, told: list[Demonstration]) -> Any:
        from datasets import Dataset as Rows

        prompts, completions = [d.prompt for d in told], [d.completion for d in told]
        asked, answers = policy.encode(prompts), completion_ids(policy, prompts, completions)
        found, shortened = [], 0
        for prompt, answer in zip(asked, answers, strict=True):
            ids, labels = prompt + answer, [-100] * len(prompt) + answer
            shortened += len(ids) > self.max_length
            if len(prompt) < self.max_length:
                ids, labels = ids[: self.max_length], labels[: self.max_length]
                found.append({"input_ids": ids, "labels": labels})
        if not found:
            raise ValueError(
                f"no demonstration has a prompt shorter than {self.key}.max_length="
                f"{self.max_length} tokens: raise it"
            )
        if shortened:
            logger.info(
                "%d of %d demonstrations exceed %d tokens: %d are cut, %d dropped, whose prompt "
                "alone is longer",
                shortened,
                len(told),
                self.max_length,
                shortened - len(told) + len(found),
                len(told) - len(found),
            )
        return Rows.from_list(found)

    def _packed(self, rows: Any) -> Any:
        from trl.data_utils import pack_dataset

        packed = pack_dataset(rows, self.max_length, "bfd")
        logger.info("%d demonstrations packed into %d rows", len(rows), len(packed))
        return packed

    def require_demonstrations(self, data: Dataset) -> None:
        """ValueError if there are none to train on."""
        told = len(data.demonstrations)
        if not told:
            raise ValueError(
                "sft needs demonstrations and the data has none: give data.demonstrations, or "
                "policy.sft=false and another algo than sft"
            )
        if told <= self.held_out:
            raise ValueError(
                f"{self.key}.held_out={self.held_out} leaves none of {told} demonstrations to "
                "train on: lower it"
            )

    def steps_on(self, rows: Any) -> int:
        """Optimizer steps on `rows`."""
        return self.steps or math.ceil(self.epochs * math.ceil(len(rows) / self.batch))

    def _trainer(
        self, folder: str, policy: Policy, rows: tuple[Any, Any], *, seed: int, **settings: Any
    ) -> Any:
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        told = self.arguments(policy, self.steps_on(rows[0]), seed) | settings
        prepared = {"skip_prepare_dataset": True}
        return mixed(Training, SFTTrainer)(
            model=policy.model,
            args=one_device(
                SFTConfig(output_dir=folder, max_length=None, dataset_kwargs=prepared, **told)
            ),
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=policy.tokenizer,
            data_collator=Collator(policy.tokenizer.pad_token_id) if self.packing else None,
        )


@dataclass
class Collator:
    """Batches packed rows: position ids start anew with each example, and no attention mask hides
    that.
    """

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, labels and position_ids, each [b, t]."""
        for row in rows:
            lengths = row.get("seq_lengths", [len(row["input_ids"])])
            row["position_ids"] = [i for length in lengths for i in range(length)]
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad, "labels": -100, "position_ids": 0}
        return {
            name: torch.tensor([r[name] + [value] * (width - len(r[name])) for r in rows])
            for name, value in fill.items()
        }


@torch.no_grad()
def refuse_leaks(policy: Policy) -> None:
    """ValueError if an example changes what the model says of the one packed behind it."""
    first, second = ([i % 7 + 10 * k for i in range(8)] for k in (1, 2))
    row = {"input_ids": first + second, "labels": first + second, "seq_lengths": [8, 8]}
    batch = Collator(policy.tokenizer.pad_token_id)([row])
    del batch["labels"]
    inputs = {name: x.to(policy.device) for name, x in batch.items()}
    alone = {name: x[:, 8:] for name, x in inputs.items()}
    together, apart = (
        policy.model(**x, use_cache=False).logits[:, -8:].float() for x in (inputs, alone)
    )
    leak = float((together - apart).abs().max() / apart.abs().max())
    if leak > (1e-3 if policy.dtype == "float32" else 0.05):
        model = policy.model.config
        raise ValueError(
            f"sft.packing=true lets examples read each other in a {model.model_type} model with "
            f"{model._attn_implementation} attention (logits differ by {leak:.0%}): set "
            "sft.packing=false"
        )
