"""Supervised fine-tuning on demonstrations, through TRL's SFTTrainer; the loss falls on the
completion only.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Policy
from rlhf_exp.trial import Trial


@dataclass(kw_only=True)
class SFT:
    """Makes the start policy out of the base policy."""

    epochs: float = 3.0
    lr: float = 1e-3
    batch: int = 64  # demonstrations per optimizer step
    # demonstrations per forward pass; fewer than `batch` accumulates gradients
    micro_batch: int = 64
    max_length: int = 512  # tokens of prompt and completion; longer demonstrations are cut
    warmup: float = 0.03  # share of the steps with a rising learning rate
    seed: int = 0  # order of the demonstrations

    def __post_init__(self) -> None:
        if self.batch % self.micro_batch:
            raise ValueError(
                f"sft.batch={self.batch} must be a multiple of sft.micro_batch={self.micro_batch}"
            )

    def check(self, policy: Policy) -> None:
        """Any policy can be fine-tuned."""

    def run(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        """As an algorithm of its own: one step that trains on all demonstrations."""
        if trial.begin(policy, self, steps=1) == 0:
            with TemporaryDirectory() as folder:
                self.train(Path(folder), data, policy)
            trial.end_step(1, policy, self)

    def state(self) -> dict[str, Any]:
        """Nothing outlives the one step."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def make(self, folder: Path, data: Dataset, policy: Policy) -> None:
        """Train `policy`, loaded and trainable, and save weights and tokenizer to `folder`."""
        self.train(folder, data, policy)
        model = policy.model.merge_and_unload() if policy.lora is not None else policy.model
        model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    def train(self, folder: Path, data: Dataset, policy: Policy) -> None:
        """Train `policy` in place; `folder` is scratch space for the trainer."""
        from datasets import Dataset as Rows
        from transformers import PrinterCallback, set_seed
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        if not data.demonstrations:
            raise ValueError(
                "the stage sft needs demonstrations and the data has none: give "
                "data.demonstrations or policy.sft=false"
            )
        set_seed(self.seed)
        steps = max(1, round(self.epochs * len(data.demonstrations) / self.batch))
        settings = SFTConfig(
            output_dir=str(folder / "trainer"),
            num_train_epochs=self.epochs,
            learning_rate=self.lr,
            lr_scheduler_type="cosine",
            warmup_steps=round(self.warmup * steps),
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.batch // self.micro_batch,
            max_length=self.max_length,
            seed=self.seed,
            data_seed=self.seed,
            completion_only_loss=True,
            use_cpu=policy.device.type == "cpu",
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
        )
        rows: Any = Rows.from_list([vars(d) for d in data.demonstrations])
        trainer = SFTTrainer(
            model=policy.model, args=settings, train_dataset=rows, processing_class=policy.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        policy.model.eval()
