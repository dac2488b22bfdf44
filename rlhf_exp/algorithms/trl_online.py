"""GRPO (Shao et al. 2024, arXiv 2402.03300) and RLOO (Ahmadian et al. 2024, arXiv 2402.14740) by
TRL's trainers, with any reward of ours: the same prompts in the same order as `online.Online`, the
same scores, metrics and evaluation.

A step of the trial is one batch of completions, from sampling it to the last update on it, so no
checkpoint falls between. Two things are ours inside the trainer. Position ids count from the first
token of a prompt, as they do when sampling: TRL leaves them out when it scores left-padded
batches, which moves every token of a model with absolute positions. And the reference is
`trial.reference`, where TRL would load one by the policy's name.

Left out: generation on another server, tools, and several rewards at once (that is reward=mix).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_exp import losses, processes, weights
from rlhf_exp.algorithms.online import prompts_at
from rlhf_exp.algorithms.trainer import TrainerAlgorithm, Training, mixed, one_device
from rlhf_exp.choices import require
from rlhf_exp.data.rows import Dataset
from rlhf_exp.policy import Batch, Policy, Rollouts
from rlhf_exp.reference import Reference
from rlhf_exp.rewards import Reward, scored
from rlhf_exp.trial import Trial

GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


class OnlineTraining(Training):
    """Asks the policy as it asks itself, and the trial's reference."""

    policy: Policy

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.policy.encode(prompts), None, {}

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, ids: Tensor, mask: Tensor, length: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not isinstance(model, Reference):
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, ids, mask, length, *args, **kwargs
            )
        found = []
        for rows in torch.arange(len(ids), device=ids.device).split(self.args.train_batch_size):
            batch = Batch(rows, ids[rows], mask[rows], length)
            logits = model.logits(batch)
            found.append(losses.selective_log_softmax(logits, batch.response_ids, self.temperature))
        return torch.cat(found), None, None


@dataclass(kw_only=True)
class TRLOnline(TrainerAlgorithm):
    """Settings that GRPO and RLOO share; see conf/algo/ for the numbers."""

    samples_itself: ClassVar[bool] = True  # by TRL's trainer, and not by Policy.sample
    renamed: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "entropy": "entropy",
        "kl": "kl_per_token",
        "clip_ratio/region_mean": "clip_fraction",
        "frac_reward_zero_std": "flat_groups",  # prompts whose completions all score the same
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
    }

    steps: int  # times completions are sampled
    samples: int = 8  # completions per prompt
    iterations: int = 1  # optimizer steps on each batch of completions
    kl_coef: float = 0.0
    clip: float = 0.2  # of the probability ratio
    clip_high: float | None = None  # of ratios above 1; null: clip
    mask_truncated: bool = False  # learn nothing from completions without end-of-text

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.iterations) < 1:
            raise ValueError(
                f"algo.steps={self.steps}, algo.batch={self.batch} and "
                f"algo.iterations={self.iterations} must be positive"
            )
        if self.samples < 2:
            raise ValueError(
                f"algo.samples={self.samples}: a completion is compared with the others of its "
                "prompt; set algo.samples to at least 2"
            )
        if self.kl_coef < 0:
            raise ValueError(f"algo.kl_coef={self.kl_coef} must not be negative")
        super().__post_init__()

    @property
    def rows_per_step(self) -> int:
        return self.batch * self.samples

    @property
    def stride(self) -> int:
        return self.iterations

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse a policy whose sampling would make the KL wrong."""
        super().check(policy, data)
        if self.kl_coef:
            policy.require_plain_sampling(type(self).__name__)

    def run(self, policy: Policy, reward: Reward, data: Dataset, trial: Trial) -> None:
        """Train `policy` in place."""
        self.rollouts: Rollouts
        start, resume = self.begin(policy, trial, self.steps)
        prompts = prompts_at(data.prompts, 0, self.steps * self.batch, trial.seed)

        def judge(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            parts = processes.gather((prompts, completion_ids))
            asked = [prompt for part in parts for prompt in part[0]]
            drawn = [ids for part in parts for ids in part[1]]
            self.rollouts = scored(policy.assemble(asked, drawn), reward)
            mine = sum(len(part[0]) for part in parts[: processes.rank()])
            scores = self.rollouts.scores.tolist()  # type: ignore[union-attr]
            return scores[mine : mine + len(prompts)]

        def build(folder: str) -> Any:
            policy.model.generation_config = weights.generation_config(policy)  # its end of text
            return self._trainer(folder, policy, judge, prompts, trial)

        if start < self.steps:
            with counted_positions(policy.model):
                self.fit(build, policy, trial, resume=resume)

    def record(self, trial: Trial, step: int, metrics: dict[str, float], seconds: float) -> None:
        trial.log_step(step, self.rollouts, metrics, {"step": seconds})

    def _trainer(
        self, folder: str, policy: Policy, judge: Any, prompts: list[str], trial: Trial
    ) -> Any:
        from datasets import Dataset as Rows

        config, trainer_class = self.library()
        arguments = config(
            output_dir=folder,
            num_generations=self.samples,
            num_iterations=self.iterations,
            shuffle_dataset=False,
            max_completion_length=policy.max_new_tokens,
            temperature=policy.temperature,
            top_k=policy.top_k,
            top_p=policy.top_p,
            generation_kwargs={
                "min_new_tokens": policy.min_new_tokens or None,
                "suppress_tokens": policy.control or None,
            },
            beta=0.0,  # or TRL would load a reference
            epsilon=self.clip,
            epsilon_high=self.clip_high,
            mask_truncated_completions=self.mask_truncated,
            disable_dropout=True,
            **self.own_settings(),
            **self.arguments(policy, self.steps * self.iterations, trial.seed),
        )
        trainer = mixed(OnlineTraining, trainer_class)(
            model=policy.model,
            reward_funcs=judge,
            args=one_device(arguments),
            train_dataset=Rows.from_dict({"prompt": prompts}),
            processing_class=policy.tokenizer,
        )
        trainer.policy, trainer.beta, trainer.ref_model = policy, self.kl_coef, trial.reference
        return trainer

    def library(self) -> tuple[Any, Any]:
        """TRL's config and trainer."""
        raise NotImplementedError

    def own_settings(self) -> dict[str, Any]:
        """Settings of this trainer only, in its words."""
        raise NotImplementedError


@dataclass(kw_only=True)
class GRPO(TRLOnline):
    """Advantages are scores minus the mean of their prompt; the KL is a term of the loss."""

    name: ClassVar[str] = "grpo"

    loss: str = "dapo"  # how tokens are averaged and ratios clipped
    scale: str = "group"  # advantages over the spread of a prompt (group), of the batch, or none

    def __post_init__(self) -> None:
        require(self.loss, GRPO_LOSSES, "algo.loss")
        require(self.scale, ("group", "batch", "none"), "algo.scale")
        super().__post_init__()

    def library(self) -> tuple[Any, Any]:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        return GRPOConfig, GRPOTrainer

    def own_settings(self) -> dict[str, Any]:
        level = "sequence" if self.loss == "luspo" else "token"
        told = {"loss_type": self.loss, "scale_rewards": self.scale}
        return told | {"importance_sampling_level": level}


@dataclass(kw_only=True)
class RLOO(TRLOnline):
    """Advantages are scores minus the mean of the prompt's other completions; the KL is taken off
    the score.
    """

    name: ClassVar[str] = "rloo"

    normalize_advantages: bool = False  # over the batch
    score_clip: float | None = None  # clips scores to +- this; null: off

    def library(self) -> tuple[Any, Any]:
        from trl.trainer.rloo_config import RLOOConfig
        from trl.trainer.rloo_trainer import RLOOTrainer

        return RLOOConfig, RLOOTrainer

    def own_settings(self) -> dict[str, Any]:
        clip = None if self.score_clip is None else (-self.score_clip, self.score_clip)
        return {"normalize_advantages": self.normalize_advantages, "reward_clip_range": clip}


@contextmanager
def counted_positions(model: Any) -> Iterator[None]:
    """Forward passes that are given a mask and no position ids count positions over the mask."""

    def count(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None:
            kwargs = kwargs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return args, kwargs

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
