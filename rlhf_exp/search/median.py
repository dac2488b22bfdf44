"""The median stopping rule: which bounds a new run gets from those that are finished.

Golovin et al. 2017 (Google Vizier, section 3.2.2) stop a run at a step if its best value so far is
worse than the median, over finished runs, of their values' averages up to that step. Here the
median is of their best values up to that step, so that like is compared with like.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_exp.pruning import best_so_far


@dataclass(kw_only=True)
class MedianStopping:
    """How hard it is to be hopeless."""

    startup: int = 5  # finished runs that a bound needs
    percentile: float = 50.0  # of them a run must reach; 50: the median; lower: more patience
    from_step: int = 0  # no run gives up before

    def __post_init__(self) -> None:
        if self.startup < 1 or self.from_step < 0:
            raise ValueError(
                f"hydra.sweeper.pruning.startup={self.startup} must be at least 1, and from_step="
                f"{self.from_step} at least 0"
            )
        if not 0 < self.percentile < 100:
            raise ValueError(
                f"hydra.sweeper.pruning.percentile={self.percentile} must be between 0 and 100: "
                "50 is the median"
            )

    def bounds(self, runs: Sequence[dict[int, float]], *, maximize: bool) -> dict[int, float]:
        """By step, what the best value so far must reach; `runs` are the values of each finished
        run by the steps it evaluated at. A run counts from its first step to its last.
        """
        import numpy as np

        share = self.percentile if maximize else 100 - self.percentile
        found = {}
        for step in sorted({s for run in runs for s in run if s >= self.from_step}):
            reached = [r for r in runs if r and min(r) <= step <= max(r)]
            if len(reached) >= self.startup:
                upto = [{s: v for s, v in r.items() if s <= step} for r in reached]
                best = [[*best_so_far(r, maximize=maximize).values()][-1] for r in upto]
                found[step] = float(np.percentile(best, share))
        return found
