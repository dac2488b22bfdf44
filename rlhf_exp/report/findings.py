"""Everything a study's page tells, computed once from the records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from rlhf_exp.choices import require
from rlhf_exp.report.contrasts import Contrast, RelativeGain, contrasts, relative_gains
from rlhf_exp.report.estimates import Estimate
from rlhf_exp.report.layout import Arm, Layout, arrange
from rlhf_exp.report.overoptimization import (
    Course,
    Fit,
    Summary,
    at_kl,
    course,
    fit,
    shared_seeds,
    summaries,
)
from rlhf_exp.report.records import Record
from rlhf_exp.report.settings import UNKNOWN
from rlhf_exp.report.statistics import RESAMPLES, crossed_mean, stratified

SINGLE = ("single", "pairwise", "Pairwise")  # values of a reward that are one reward model
SHARES = (0.25, 0.5, 1.0)  # of the KL that all arms reach: where they are compared by default


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm at one of its evaluations: means over its seeds."""

    step: int
    kl: float  # nats
    gold: Estimate
    proxy: Estimate


@dataclass(frozen=True, kw_only=True)
class AtKL:
    """Gold of an arm where its runs first come to a KL."""

    arm: Arm
    kl: float  # nats
    reached: int  # runs that get there
    gold: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The statistics of a study; each is computed when it is first asked for."""

    records: Sequence[Record]
    left_out: Sequence[str]
    baseline: Mapping[str, str] = field(default_factory=dict)
    kl: Sequence[float] | None = None  # nats; None: shares of what all arms reach
    resamples: int = RESAMPLES

    @cached_property
    def layout(self) -> Layout:
        """Arms, panels and colors. ValueError for a baseline that no run has."""
        axes = arrange(self.records).axes
        for name, value in self.baseline.items():
            require(name, axes, "report.baseline")
            require(value, axes[name], f"report.baseline.{name}")
        return arrange(self.records, next(iter(self.baseline), ""))

    @cached_property
    def courses(self) -> list[Course]:
        """How gold and proxy went, of each record."""
        return [course(record) for record in self.records]

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Measures over the seeds, by arm."""
        return {
            arm.name: summaries(arm.records, resamples=self.resamples) for arm in self.layout.arms
        }

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """Gao's, of the arms that have points enough."""
        found = {a.name: fit(a.records, resamples=self.resamples) for a in self.layout.arms}
        return {name: known for name, known in found.items() if known}

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """The way from the start, at the evaluations that all seeds of an arm have."""
        return {arm.name: self._curve(arm) for arm in self.layout.arms}

    def _curve(self, arm: Arm) -> list[Point]:
        by_step = [{e.step: e for e in record.evaluations} for record in arm.records]
        points = []
        for step in sorted(set.intersection(*map(set, by_step))):
            found = [evaluated[step] for evaluated in by_step]
            kl, gold, proxy = (
                np.array([e.mean(name) for e in found]) for name in ("k1", "gold", "proxy")
            )
            over = {
                name: stratified([x], resamples=self.resamples)
                for name, x in (("gold", gold), ("proxy", proxy))
            }
            points.append(Point(step=step, kl=float(kl.mean()), **over))
        return points

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Of final gold, for every setting that differs, the one that is compared first."""
        return [c for axis in self.layout.axes for c in self._contrasts(axis, "final")]

    @cached_property
    def gap_contrasts(self) -> list[Contrast]:
        """Of the over-optimization gap, for the setting that is compared."""
        axis = self.layout.compared
        return self._contrasts(axis, "gap") if axis in self.layout.axes else []

    def _contrasts(self, axis: str, measure: str | tuple) -> list[Contrast]:
        against = self.baseline.get(axis)
        found = contrasts(self.records, axis, against, measure, resamples=self.resamples)
        return [c for c in found if UNKNOWN not in (c.value, c.against)]

    @cached_property
    def levels(self) -> list[float]:
        """KLs in nats at which arms are compared."""
        if self.kl is not None:
            return sorted(self.kl)
        reached = min(float(r.curve("k1").max()) for r in self.records)
        return [_down(share * reached) for share in SHARES if reached > 0]

    @cached_property
    def equal_kl(self) -> list[AtKL]:
        """Gold of each arm at each level."""
        return [self._at(arm, kl) for kl in self.levels for arm in self.layout.arms]

    def _at(self, arm: Arm, kl: float) -> AtKL:
        found = [at_kl(record, kl) for record in arm.records]
        known = [x for x in found if x is not None]
        same = len({record.prompts for record in arm.records}) == 1
        gold = crossed_mean(np.stack(known), resamples=self.resamples) if known and same else None
        return AtKL(arm=arm, kl=kl, reached=len(known), gold=gold)

    @cached_property
    def equal_kl_contrasts(self) -> list[Contrast]:
        """Of gold at each level, for the setting that is compared."""
        axis = self.layout.compared
        return [
            c
            for kl in self.levels
            if axis in self.layout.axes
            for c in self._contrasts(axis, ("kl", kl))
        ]

    @cached_property
    def single(self) -> str | None:
        """The value of the setting that is compared which the others are to improve on."""
        axis = self.layout.compared
        values = self.layout.axes.get(axis, [])
        plain = next((v for v in SINGLE if v in values), None)
        return plain if self.baseline.get(axis) not in values else self.baseline[axis]

    @cached_property
    def relative(self) -> dict[str, RelativeGain]:
        """Gain relative to the single one, by arm; empty if there is none."""
        if self.single is None:
            return {}
        found = relative_gains(
            self.records, self.layout.compared, self.single, resamples=self.resamples
        )
        by_settings = {tuple(a.settings.items()): a.name for a in self.layout.arms}
        return {by_settings[tuple(g.settings.items())]: g for g in found}

    @cached_property
    def shared(self) -> list[str]:
        """Settings named seed that stand still while the runs' seeds differ."""
        return shared_seeds(self.records)


def _down(value: float) -> float:
    """To two digits, and not above."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / unit) * unit:.2g}")
