"""TRL's trainers as algorithms: the loss is theirs, what happens between steps is the trial's.

`Training` is mixed into a trainer class of TRL. It reports every step to the algorithm, which hands
it to the trial (metrics, evaluation, checkpoint, stop), and it continues from what
`TrainerAlgorithm.state` kept: optimizer, schedule, position in the data. Weights and random
generators are the trial's to save and restore, so the trainer itself writes nothing.

Rows come tokenized, as the policy meets prompts and completions when it samples (prefix, chat
template, end of text); no trainer tokenizes in a way of its own.

Left out: the state of fp16's loss scaler.
"""

import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from rlhf_exp import processes
from rlhf_exp.algorithms.groups import Rates
from rlhf_exp.checkpoints import random_state, set_random_state
from rlhf_exp.data.rows import Dataset
from rlhf_exp.hardware.engine import Engine, whole
from rlhf_exp.policy import Policy
from rlhf_exp.trial import Trial

# The trainers' own "constant" knows no warm-up.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class Training:
    """Mixin over a trainer of TRL: tells of its steps, and continues from `resume`."""

    listener: Callable[[dict[str, Any]], None] | None = None  # gets what the trainer logs of a step
    resume: dict[str, Any] | None = None  # from `TrainerAlgorithm.begin`
    settings: Rates

    def log(self: Any, logs: dict[str, Any], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]  # fills `logs` with TRL's means
        self.state.log_history.clear()  # metrics.jsonl has it
        if self.listener is not None and "loss" in logs:  # neither an evaluation nor the summary
            self.listener(logs)

    def run(self: Any) -> None:
        """Train to the last step, from the first one or from `resume`."""
        from transformers import PrinterCallback

        self.remove_callback(PrinterCallback)
        if self.resume is None:
            self.train()
            return
        folder = Path(self.args.output_dir)
        (folder / "trainer_state.json").write_text(json.dumps(self.resume["trainer"]))
        with _no_checkpoint_of_deepspeed():
            self.train(resume_from_checkpoint=str(folder))

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        rate = self.settings.rates(self.model)
        optimizer.param_groups = [
            by_rate for group in optimizer.param_groups for by_rate in _split(group, rate)
        ]
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        total = self.settings.schedule_steps or num_training_steps
        scheduler = super().create_scheduler(total, optimizer)  # type: ignore[misc]
        floor, rising = self.settings.lr_floor, self.args.warmup_steps
        scheduler.lr_lambdas = [_floored(f, floor, rising, total) for f in scheduler.lr_lambdas]
        return scheduler

    @property
    def stateful(self: Any) -> Any:
        """What keeps the optimizer's state, as one process would have it."""
        if not self.is_deepspeed_enabled:
            return self.optimizer
        return Engine.around(self.model_wrapped, self.optimizer, self.groups)

    def _load_from_checkpoint(self, *_: Any) -> None:
        """The trial has restored the weights."""

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.stateful.load_state_dict(self.resume["optimizer"])
            self.lr_scheduler.load_state_dict(self.resume["scheduler"])

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        set_random_state(self.resume["random"])


def _split(group: dict[str, Any], rate: Callable[[Any], float]) -> Iterator[dict[str, Any]]:
    """A group of an optimizer for each rate among its parameters."""
    rates = [rate(parameter) for parameter in group["params"]]
    for lr in dict.fromkeys(rates):
        members = [p for p, own in zip(group["params"], rates, strict=True) if own == lr]
        yield group | {"params": members, "lr": lr}


def _floored(
    shape: Callable[[int], float], floor: float, rising: int, total: int
) -> Callable[[int], float]:
    """`shape` of a schedule of transformers, which falls to `floor` in `total` steps and stays."""

    def multiplier(step: int) -> float:
        if step < rising:
            return shape(step)
        return floor + (1.0 - floor) * shape(min(step, total))

    return multiplier


@contextmanager
def _no_checkpoint_of_deepspeed() -> Iterator[None]:
    """transformers would look for one, but state is ours to restore."""
    from transformers import trainer as transformers_trainer

    trainer: Any = transformers_trainer
    load = trainer.deepspeed_load_checkpoint
    trainer.deepspeed_load_checkpoint = lambda *_, **__: None
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = load


@contextmanager
def _unrounded(policy: Policy) -> Iterator[None]:
    """TRL would put adapters over quantized weights into bfloat16, where small updates are lost;
    they are what they were after this block.
    """
    kept = [(p, p.data) for p in policy.model.parameters() if p.requires_grad]
    yield
    for parameter, values in kept:
        parameter.data = values


def mixed(kind: type[Training], trainer: type) -> Any:
    """The class `trainer` of TRL, as `kind` changes it."""
    return type(trainer.__name__, (kind, trainer), {})


@dataclass(kw_only=True)
class TrainerAlgorithm(Rates):
    """Settings of every trainer, and its steps; a subclass adds rows and the trainer itself."""

    name: ClassVar[str]  # prefix of the metrics
    renamed: ClassVar[dict[str, str]]  # metrics: the trainer's name -> ours; others are dropped

    trains: ClassVar[bool] = True  # the policy

    max_grad_norm: float = 1.0
    batch: int
    micro_batch: int  # rows per forward pass; fewer than a step has accumulates gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch, self.micro_batch) < 1 or self.rows_per_step % self.micro_batch:
            raise ValueError(
                f"the {self.rows_per_step} rows of a step ({self.key}.batch={self.batch}) must be "
                f"a positive multiple of {self.key}.micro_batch={self.micro_batch}"
            )

    @property
    def rows_per_step(self) -> int:
        """What one optimizer step learns from."""
        return self.batch

    @property
    def stride(self) -> int:
        """Optimizer steps in a step of the trial."""
        return 1

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse an adapter that TRL would pass by, and rows that the processes cannot share."""
        self._rows_per_process()
        if "lm_head" in ((policy.lora or {}).get("target_modules") or ()):
            raise ValueError(
                "policy.lora.target_modules names lm_head, whose adapter TRL's trainers would "
                "never train: remove it from the list"
            )

    # ---- one trainer

    def arguments(self, policy: Policy, steps: int, seed: int) -> dict[str, Any]:
        """Settings for `steps` optimizer steps, in the trainer's words."""
        rows = self._rows_per_process()
        micro_batch = min(self.micro_batch, rows)
        return quiet(policy.device, seed) | {
            "max_steps": steps,
            "learning_rate": self.lr,
            "lr_scheduler_type": SCHEDULES[self.schedule],
            "warmup_steps": self.warmup_steps(steps),
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "per_device_train_batch_size": micro_batch,
            "per_device_eval_batch_size": micro_batch,
            "gradient_accumulation_steps": rows // micro_batch,
            "logging_strategy": "steps",
            "logging_steps": self.stride,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
        }

    def _rows_per_process(self) -> int:
        """Of a step; ValueError where the processes cannot share its rows equally."""
        rows, rest = divmod(self.rows_per_step, processes.count())
        if rest or rows % min(rows, self.micro_batch):
            raise ValueError(
                f"the {self.rows_per_step} rows of a step ({self.key}.batch={self.batch}) cannot "
                f"be shared by {processes.count()} processes in micro-batches of "
                f"{self.key}.micro_batch={self.micro_batch}: change one of them"
            )
        return rows

    def fit(
        self,
        build: Callable[[str], Any],
        policy: Policy,
        trial: Trial,
        *,
        done: int = 0,
        resume: dict[str, Any] | None = None,
    ) -> None:
        """Train `policy` with what `build` makes, given a folder to scribble in; its steps are
        those of `trial` after `done`.
        """
        with scratch(policy) as folder:
            with _unrounded(policy):
                self.trainer = build(folder)
            self.trainer.settings = self
            policy.whole = lambda: whole(self.trainer.accelerator)
            if policy.lora is not None and "ref" in policy.model.peft_config:
                policy.model.delete_adapter("ref")  # TRL's own reference
            self.clock = time.perf_counter()
            self.trainer.resume = resume
            self.trainer.listener = lambda logs: self._after_step(logs, policy, trial, done)
            self.trainer.run()

    def _after_step(self, logs: dict[str, Any], policy: Policy, trial: Trial, done: int) -> None:
        step = done + self.trainer.state.global_step // self.stride
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss of step {step} is {logs['loss']}: start again with a lower {self.key}.lr"
            )
        seconds = time.perf_counter() - self.clock
        metrics = self._ours(logs)
        if self.trainer.eval_dataset is not None and trial.evaluator.due(step, trial.steps):
            with torch.random.fork_rng():  # looking changes nothing
                metrics |= self._ours(self.trainer.evaluate(), "eval_")
        policy.model.eval()  # the trainer's next step switches back
        self.record(trial, step - 1, metrics, seconds)
        trial.end_step(step, policy, self)
        self.clock = time.perf_counter()

    def _ours(self, logs: dict[str, Any], prefix: str = "") -> dict[str, float]:
        """The trainer's numbers under our names; those with a prefix are of held-out rows."""
        held_out = "held_out_" if prefix else ""
        return {
            f"{self.name}/{held_out}{ours}": float(logs[prefix + theirs])
            for theirs, ours in self.renamed.items()
            if logs.get(prefix + theirs) is not None
        }

    def record(self, trial: Trial, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Log step `step` (from 0), which took `seconds`."""
        trial.log_metrics(step, metrics | {"time/learn": seconds})

    # ---- resume

    def begin(self, policy: Policy, trial: Trial, steps: int) -> tuple[int, dict[str, Any] | None]:
        """The step to start from and, if it is not the first, what a trainer continues from."""
        start = trial.begin(policy, self, steps)
        return start, self.saved | {"random": random_state()} if start else None

    def state(self) -> dict[str, Any]:
        """Everything beside weights and random generators that the trainer's next step depends
        on.
        """
        return {
            "optimizer": self.trainer.stateful.state_dict(),
            "scheduler": self.trainer.lr_scheduler.state_dict(),
            "trainer": asdict(self.trainer.state),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Keep it for the trainer, which is not built yet."""
        self.saved = state


def quiet(device: Any, seed: int) -> dict[str, Any]:
    """What every trainer of a library is told: it saves, reports and prints nothing by itself."""
    from accelerate.state import AcceleratorState, is_initialized

    precision = AcceleratorState().mixed_precision if is_initialized() else "no"  # one per process
    return {
        "seed": seed,
        "data_seed": seed,
        "use_cpu": torch.device(device).type == "cpu",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": not sys.stderr.isatty(),
    }


def one_device(arguments: Any) -> Any:
    """A trainer's `arguments`, told that this process has one GPU at most: transformers would put
    a model on all it sees, and multiply the batch.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


@contextmanager
def scratch(policy: Policy) -> Iterator[str]:
    """A temporary folder for a trainer; what it hung in the place of `forward` is taken down after
    it, and the policy is ready to sample again.
    """
    model = policy.model
    modules = {model, model.get_base_model()} if policy.lora is not None else {model}
    before = {m: vars(m).get("forward") for m in modules}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # TRL asks transformers by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield folder
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        policy.model.eval()


def completion_ids(policy: Policy, prompts: list[str], completions: list[str]) -> list[list[int]]:
    """Token ids of completions as they continue their prompts, with the end of text [n]."""
    alone = policy.tokenizer(completions, add_special_tokens=False)["input_ids"]
    end = policy.tokenizer.eos_token_id
    if policy.chat:  # a header ends before the completion
        return [[*ids, end] for ids in alone]
    asked = policy.encode(prompts)
    both = policy.encode([p + c for p, c in zip(prompts, completions, strict=True)])
    return [
        [*(whole[len(ids) :] if whole[: len(ids)] == ids else text), end]
        for ids, whole, text in zip(asked, both, alone, strict=True)
    ]
