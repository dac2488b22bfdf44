"""A run that gives up when it falls behind: bounds in, `pruned.json` out, files only, so that it
works under any launcher.

After each evaluation the best value so far is compared with the bound of that step. What the bounds
are is somebody else's affair: a search takes them from the runs it has finished (search/median.py).
"""

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require

FILE = "pruned.json"
EXIT_CODE = 3  # of a run that gave up


@dataclass(kw_only=True)
class Verdict:
    """Why a run gave up, as `pruned.json` has it."""

    step: int
    value: float
    bound: float
    metric: str


class Pruned(Exception):
    """The run is hopeless; its state is saved."""

    exit_code = EXIT_CODE

    def __init__(self, verdict: Verdict, directory: Path) -> None:
        super().__init__(
            f"gave up after step {verdict.step}: {verdict.metric} was {verdict.value:.3f} at best "
            f"where pruning.bounds asks for {verdict.bound:.3f}; state saved, to go on all the "
            f"same: python -m rlhf_exp resume={directory}"
        )


@dataclass(kw_only=True)
class Pruning:
    """When to give up. A bound holds from its step until the next one's."""

    bounds: dict[int, float] = field(default_factory=dict)  # step: what the best so far must reach
    metric: str = "reward/gold"  # of an evaluation
    maximize: bool = True  # false: the best is the lowest
    from_step: int = 0  # no run gives up before

    def __post_init__(self) -> None:
        from rlhf_exp.evaluation.scoring import METRICS

        if not self.bounds:
            raise ValueError(
                f"pruning.bounds={self.bounds} names no step: give pruning='{{bounds: {{20: "
                "0.5}}' for at least 0.5 by step 20, or pruning=null"
            )
        self.bounds = {int(step): float(value) for step, value in self.bounds.items()}  # JSON's
        require(self.metric, METRICS, "pruning.metric")

    def verdict(self, step: int, directory: Path) -> Verdict | None:
        """Whether the run in `directory` gives up after `step`; never again once it did, because
        who continues it wants to see its end.
        """
        due = [s for s in self.bounds if s <= step]
        if step < self.from_step or not due or (directory / FILE).exists():
            return None
        seen = {s: v for s, v in reported(directory, self.metric).items() if s <= step}
        best, bound = best_so_far(seen, maximize=self.maximize)[step], self.bounds[max(due)]
        worse = operator.lt if self.maximize else operator.gt
        if not worse(best, bound):
            return None
        return Verdict(step=step, value=best, bound=bound, metric=self.metric)


def give_up(verdict: Verdict, directory: Path) -> None:
    """Write down why."""
    write_json(directory / FILE, asdict(verdict))


def gave_up(directory: Path) -> bool:
    """Whether the run in `directory` gave up, and nobody made it go on to its end."""
    ended = ("summary.json", "failed.json")
    return (directory / FILE).exists() and not any((directory / name).exists() for name in ended)


def reported(directory: Path, metric: str) -> dict[int, float]:
    """`metric` in each evaluation of a run, by step, in order."""
    found = [json.loads(p.read_text()) for p in (directory / "evaluation").glob("step-*.json")]
    return {e["step"]: e["metrics"][metric] for e in sorted(found, key=operator.itemgetter("step"))}


def best_so_far(values: Mapping[int, float], *, maximize: bool) -> dict[int, float]:
    """The best of `values` up to each step."""
    steps = sorted(values)
    best = accumulate((values[s] for s in steps), max if maximize else min)
    return dict(zip(steps, best, strict=True))
