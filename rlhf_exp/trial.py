"""One training run as an algorithm sees it: seed, accelerator, reference, and what happens between
steps.

`begin` restores or evaluates, `log_step` records, `end_step` evaluates, saves and stops when asked
to. The loop calls these three and knows nothing of files, signals or schedules.
"""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from rlhf_exp import processes, signals
from rlhf_exp.checkpoints import Checkpoints, random_state, set_random_state
from rlhf_exp.evaluation.scoring import Evaluator
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.pruning import Pruned, Pruning, give_up
from rlhf_exp.reference import Reference
from rlhf_exp.speed import Speed
from rlhf_exp.tracking import Log


class Looked(Exception):
    """The newest state of a run was evaluated, which was all there was to do."""


class Stopped(Exception):
    """A signal asked for a stop; the state is saved."""

    def __init__(self, step: int, directory: Path, number: int) -> None:
        super().__init__(
            f"stopped after step {step}, state saved; continue with: python -m rlhf_exp "
            f"resume={directory}"
        )
        self.exit_code = 128 + number


@dataclass(kw_only=True)
class Trial:
    """What `Algorithm.run` gets beside policy, reward and data."""

    directory: Path
    seed: int
    accelerator: Any
    reference: Reference
    log: Log
    checkpoints: Checkpoints
    evaluator: Evaluator
    pairs: Callable[[], Path]  # preference artifact: train.jsonl and evaluation.jsonl
    labeller: Callable[[], Any]  # loaded; says which of two completions is better
    fitting: Any = None  # what a reward may use to fit itself
    pruning: Pruning | None = None  # when to give up
    mixed_precision: str = "no"  # what matrices are multiplied in: no, bf16 or fp16
    peak_tflops: float | None = None  # of one device, in bf16
    signalled: int = field(default=0, init=False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 ask for a save and a stop after the step."""
        before = {n: signal.signal(n, self._remember) for n in signals.STOPS}
        try:
            yield
        finally:
            self.log.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signalled and signals.requeues():  # after the last look at it
            raise KeyboardInterrupt

    def begin(self, policy: Policy, algorithm: Any, steps: int) -> int:
        """The step to start from: 0 after a first evaluation, or that of the newest checkpoint,
        restored.
        """
        self.steps, self.sampler = steps, policy.sampler
        self.speed = Speed(algorithm=algorithm, policy=policy, peak_tflops=self.peak_tflops)
        found = self.checkpoints.latest()
        if found is None:
            self.log.begin(0, steps)
            seed_everything(self.seed)
            self._evaluate(0, policy)
            return 0
        step, state = found
        self.log.begin(step, steps)
        processes.first(lambda: self.evaluator.tidy(steps))
        self._restore(policy, algorithm, state)
        states = state["random"]  # of every process
        set_random_state(states[processes.rank() % len(states)])
        return step

    def _restore(self, policy: Policy, algorithm: Any, state: dict[str, Any]) -> None:
        with policy.whole():
            algorithm.load_state(state["algorithm"])  # may make room in the policy: first
            policy.load_trainable_state(state["policy"])

    def log_step(
        self, step: int, rollouts: Rollouts, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Record what one step sampled, scored and learned."""
        metrics = metrics | self.sampler.metrics() | self.speed(rollouts, seconds)
        self.log.step(step, rollouts, metrics, seconds)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of step `step` (from 0) of an algorithm that samples elsewhere, or not."""
        self.log.metrics(step, metrics)

    def end_step(self, step: int, policy: Policy, algorithm: Any) -> None:
        """After `step` steps: evaluate and save when due, and stop if a signal came or the run is
        hopeless.
        """
        evaluated = self.evaluator.due(step, self.steps)
        improved = processes.agreed(evaluated and self._evaluate(step, policy))
        hopeless = None
        if self.pruning is not None and evaluated and step < self.steps:
            judge = self.pruning.verdict
            hopeless = processes.first(lambda: judge(step, self.directory))
        due = self.checkpoints.due(step, self.steps)
        stopped = self.stopped()
        if stopped or due or improved or hopeless:
            with policy.whole():
                state = {
                    "policy": policy.trainable_state(),
                    "algorithm": algorithm.state(),
                    "random": processes.gather(random_state()),
                }
            self.checkpoints.save(step, state, self.checkpoints.best_so_far()[0])
        if hopeless:
            give_up(hopeless, self.directory)
            raise Pruned(hopeless, self.directory)
        if stopped and (step < self.steps or signals.requeues()):
            raise Stopped(step, self.directory, stopped)

    def stopped(self) -> int:
        """The signal that has asked a process of the run to stop, or 0; the same on all of them."""
        here = self.signalled or (signals.received[-1] if signals.ended_by_signal() else 0)
        return max(processes.gather(here))

    def _evaluate(self, step: int, policy: Policy) -> bool:
        """Evaluate and tell whether this is the best so far."""
        result = self.evaluator(step, policy, self.reference)
        self.log.evaluation(step, result)
        name = self.checkpoints.best
        best_step, best = self.checkpoints.best_so_far()
        if step == 0 or (result[name] <= best and step != best_step):
            return False  # the best step itself comes again if its checkpoint was never written
        self.checkpoints.mark_best(step, result[name])
        return True

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks for a stop after this step; a second one stops at once, but under
        SLURM, which may say it twice.
        """
        if self.signalled and signals.requeues():
            return
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = number
        signals.received.append(number)
        again = "" if signals.requeues() else "; once more stops at once, without saving"
        self.log.say(f"stopping after this step (signal {number}){again}")


class Look(Trial):
    """A trial that only looks: the newest checkpoint is evaluated, if it was not before."""

    def begin(self, policy: Policy, algorithm: Any, steps: int) -> int:
        """Raises Looked."""
        self.steps, self.sampler = steps, policy.sampler
        found = self.checkpoints.latest()
        assert found is not None, "who looks has seen that there is a checkpoint"
        step, state = found
        if not self.evaluator.written(step):
            self._restore(policy, algorithm, state)
            self.evaluator(step, policy, self.reference)
        raise Looked


def seed_everything(seed: int) -> None:
    """Seed every random generator a stage draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
