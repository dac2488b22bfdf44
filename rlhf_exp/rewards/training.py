"""TRL's RewardTrainer for rewards/pairwise.py; apart, because importing TRL costs seconds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from rlhf_exp import losses
from rlhf_exp.algorithms.trainer import one_device, quiet

if TYPE_CHECKING:
    from rlhf_exp.rewards.pairwise import Pairwise


def training_config(reward: "Pairwise", folder: Path, device: Any) -> RewardConfig:
    """The settings of `reward` in TRL's words."""
    found = RewardConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=reward.epochs,
        learning_rate=reward.lr,
        warmup_steps=reward.warmup,
        weight_decay=reward.weight_decay,
        adam_beta2=0.95,
        per_device_train_batch_size=reward.micro_batch,
        gradient_accumulation_steps=reward.batch // reward.micro_batch,
        max_length=reward.max_length,
        disable_dropout=True,
        **quiet(device, reward.seed),
    )
    return one_device(found)


class SoftPairs(DataCollatorForPreference):
    """Adds the probability that the chosen text is the better one [b]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """input_ids and attention_mask [2 b, t], chosen first; probability [b]."""
        batch = super().torch_call(examples)
        return batch | {"probability": torch.tensor([row["probability"] for row in examples])}


class RewardTraining(RewardTrainer):
    """Adds soft labels (TRL takes every label for certain), the L2 pull on scores, LoRA from plain
    fields, and tokenizing of all pairs at once.
    """

    def __init__(
        self, *, score_l2: float, label_smoothing: float, lora: dict[str, Any] | None, **kwargs
    ) -> None:
        if lora is not None:
            from peft import LoraConfig

            kwargs["peft_config"] = LoraConfig(
                task_type="SEQ_CLS", modules_to_save=["score"], **lora
            )
        pad = kwargs["processing_class"].pad_token_id
        super().__init__(data_collator=SoftPairs(pad_token_id=pad), **kwargs)
        self.score_l2, self.smoothing = score_l2, label_smoothing

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str
    ) -> Any:
        from datasets import Dataset

        end = processing_class.eos_token
        columns = {
            f"{side}_ids": processing_class(
                [text if text.endswith(end) else text + end for text in dataset[side]]
            )["input_ids"]
            for side in ("chosen", "rejected")
        }
        rows = Dataset.from_dict(columns | {"probability": dataset["probability"]})
        return super()._prepare_dataset(rows, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "probability"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        probability = losses.smoothed(inputs.pop("probability"), self.smoothing)
        outputs = model(**inputs)
        better, worse = outputs.logits.squeeze(-1).chunk(2)
        loss: Tensor = losses.preference_loss(better, worse, self.score_l2, probability).mean()
        return (loss, outputs) if return_outputs else loss

    def merged_model(self) -> Any:
        """The trained classifier, an adapter folded in."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
