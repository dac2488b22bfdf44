"""How fast a run is: tokens per second of each phase and, where the device's peak is known, the
share of it that is put to use (MFU).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_exp import processes
from rlhf_exp.policy import Policy, Rollouts

PHASES = ("sample", "learn")  # the reward's own work is not counted


@dataclass(kw_only=True)
class Speed:
    """Measures the steps of one algorithm that trains one policy."""

    algorithm: Any
    policy: Policy
    peak_tflops: float | None  # of each process's device; null: no MFU

    def __call__(self, rollouts: Rollouts, seconds: dict[str, float]) -> dict[str, float]:
        """Of a step that took so many `seconds` in each phase: response tokens per second of all
        processes together, as they were sampled or learned from, and the MFU (plan/work.py).
        """
        tokens = float(rollouts.response.sum())
        known = [phase for phase in PHASES if seconds.get(phase)]
        found = {f"tokens_per_second/{phase}": tokens / seconds[phase] for phase in known}
        if self.peak_tflops is None or not known:
            return found
        from rlhf_exp.plan.work import Texts, mfu, step_flops

        prompt = float(rollouts.mask[:, : rollouts.width].sum()) / len(rollouts)
        texts = Texts(len(rollouts), prompt, tokens / len(rollouts))
        flops = step_flops(self.algorithm, self._counts, [], texts)
        return found | {
            f"mfu/{phase}": mfu(flops[phase], seconds[phase], self.peak_tflops, processes.count())
            for phase in known
        }

    @cached_property
    def _counts(self) -> Any:
        """Of the policy's parameters, which are all there when the first step has been taken."""
        from rlhf_exp.plan.skeleton import count

        return count(self.policy.model, self.policy.quantization)
