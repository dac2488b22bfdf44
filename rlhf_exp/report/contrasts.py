"""One setting against another, all else the same: by stratum, and over all strata that have both.

A stratum is the runs whose other settings are the same. Settings below the one that is compared
(algo.kl_coef below algo) which some of its values lack belong to the value, not to the stratum.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_exp.choices import require
from rlhf_exp.report.overoptimization import Measure, measured, stacked
from rlhf_exp.report.records import Record
from rlhf_exp.report.settings import UNKNOWN, Settings, label
from rlhf_exp.report.statistics import (
    RESAMPLES,
    Difference,
    Estimate,
    Scope,
    crossed,
    crossed_mean,
    difference,
    estimate,
    scope_of,
    sizes,
)

Groups = dict[str, dict[tuple[tuple[str, str], ...], list[Record]]]  # by value, by other settings


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """A contrast where all other settings are the same."""

    settings: Settings  # the other settings
    seeds: tuple[str, ...]  # in common if paired, else of either arm
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`value` minus `against`, two values of the setting `axis`."""

    axis: str
    value: str
    against: str
    measure: Measure
    overall: Difference | None  # None where no stratum has both
    strata: tuple[Stratum, ...]
    notes: tuple[str, ...]  # strata that lack one of the two, runs left out, what is not paired


@dataclass(frozen=True, kw_only=True)
class RelativeGain:
    """What an arm gains over the mean of the arms with the single reward, as a share of the
    latter's gain: 0.3 is 30 % more.
    """

    arm: str
    settings: Settings
    gain: Estimate | None
    scope: Scope | None
    reason: str | None  # why there is none


def contrasts(
    records: Sequence[Record],
    axis: str,
    baseline: str | None = None,
    measure: Measure = "final",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Contrast]:
    """Every value of `axis` against `baseline`, or if that is None every pair of its values, the
    later one minus the earlier. Paired by seed and prompt where both arms have common seeds and
    the same prompts. ValueError for an axis or baseline that the records do not have.
    """
    values = _by_value(records, axis)
    bases = [] if baseline is None else _named(baseline, values)
    if baseline is not None and not bases:
        require(baseline, values, f"the baseline of {axis}")
    pairs = [
        (value, against)
        for i, value in enumerate(values)
        for against in (list(values)[:i] if baseline is None else bases)
        if value not in bases
    ]
    return [
        _contrast(axis, value, against, values, measure, resamples=resamples, seed=seed)
        for value, against in pairs
    ]


def _named(value: str, values: Groups) -> list[str]:
    """The values that `value` means: itself, or those with settings of their own below it."""
    return [name for name in values if name == value or name.startswith(f"{value}, ")]


def _by_value(records: Sequence[Record], axis: str) -> Groups:
    """Runs by value of the axis, and within by stratum."""
    require(axis, records[0].settings if records else (), "axis")
    names = list(records[0].settings)
    below = [
        name
        for name in names
        if name.startswith(f"{axis}.") and any(r.settings[name] == UNKNOWN for r in records)
    ]
    found: Groups = {}
    for record in records:
        settings = record.settings
        own = {k: settings[k] for k in below if settings[k] != UNKNOWN}
        value = ", ".join(filter(None, (settings[axis], label(own))))
        other = tuple((k, v) for k, v in settings.items() if k != axis and k not in below)
        found.setdefault(value, {}).setdefault(other, []).append(record)
    return found


def _contrast(
    axis: str, value: str, against: str, values: Groups, measure: Measure, **drawing: int
) -> Contrast:
    notes: list[str] = []
    found: list[tuple[Settings, Pair]] = []
    for other in dict.fromkeys([*values[value], *values[against]]):
        arms = [_Side.of(values[v].get(other, []), measure, notes) for v in (value, against)]
        for name, arm in zip((value, against), arms, strict=True):
            if not arm.runs:
                where = f" with {label(dict(other))}" if other else ""
                notes.append(f"{axis}={name} has no run{where} to compare")
        if all(arm.runs for arm in arms):
            found.append((dict(other), _aligned(arms[0], arms[1], notes)))
    strata = tuple(
        Stratum(
            settings=other,
            seeds=tuple(r.seed for r in (one.runs if paired else one.runs + two.runs)),
            difference=_difference([(one, two, paired)], measure, **drawing),
        )
        for other, (one, two, paired) in found
    )
    pairs = [pair for _, pair in found]
    overall = strata[0].difference if len(strata) == 1 else None
    return Contrast(
        axis=axis,
        value=value,
        against=against,
        measure=measure,
        overall=_difference(pairs, measure, **drawing) if len(strata) > 1 else overall,
        strata=strata,
        notes=tuple(notes),
    )


@dataclass
class _Side:
    """Runs of an arm and what was measured of each [P]."""

    runs: list[Record]
    values: list[np.ndarray]

    @classmethod
    def of(cls, records: Sequence[Record], measure: Measure, notes: list[str]) -> "_Side":
        """Without the runs that have no such measure, of which `notes` tell."""
        side = cls([], [])
        for record in records:
            value = measured(record, measure)
            if value is None:
                kl = isinstance(measure, tuple)
                why = f"never comes to a KL of {measure[1]:g}" if kl else f"has no {measure}"
                notes.append(f"{record.run.directory} {why}")
            else:
                side.runs.append(record)
                side.values.append(value)
        return side

    def only(self, seeds: Sequence[str]) -> "_Side":
        """The runs with these seeds, in their order."""
        places = [[r.seed for r in self.runs].index(seed) for seed in seeds]
        return _Side([self.runs[i] for i in places], [self.values[i] for i in places])

    @property
    def table(self) -> np.ndarray:
        return stacked(self.values, self.runs)


Pair = tuple[_Side, _Side, bool]  # of a stratum, and whether they are paired


def _aligned(first: _Side, second: _Side, notes: list[str]) -> Pair:
    """The common seeds of both, or where these were asked other prompts, all; whether paired."""
    seeds = [[r.seed for r in side.runs] for side in (first, second)]
    common = [seed for seed in seeds[0] if seed in seeds[1]]
    one, two = first.only(common), second.only(common)
    same = all(a.prompts == b.prompts for a, b in zip(one.runs, two.runs, strict=True))
    if not common or not same:
        why = "other prompts" if common else "no common seeds"
        notes.append(f"{first.runs[0].arm} and {second.runs[0].arm} have {why}: not paired")
        return first, second, False
    if alone := sorted(set(seeds[0]) ^ set(seeds[1])):
        arms = f"{first.runs[0].arm} and {second.runs[0].arm}"
        notes.append(f"seeds that only one of {arms} has are left out: {', '.join(alone)}")
    return one, two, True


def _difference(pairs: Sequence[Pair], measure: Measure, **drawing: int) -> Difference:
    """Over strata; unpaired as soon as one of them is."""
    paired = all(pair[2] for pair in pairs)
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    sides = first if paired else first + second
    tables = [side.table for side in first], [side.table for side in second]
    wins = measure != "gap" and all(
        comparable(a.runs[0], b.runs[0]) and a.table.shape[1] == len(a.values[0])
        for a, b in zip(first, second, strict=True)
    )
    seeds = [tuple(r.seed for r in side.runs) for side in sides]
    return difference(
        *tables, paired=paired, prompts=_asked(sides), runs=seeds, wins=wins, **drawing
    )


def comparable(one: Record, other: Record) -> bool:
    """Whether either wins by prompt can be counted: expected values of best-of-n win more often
    over single completions than the completions would that they are the mean of.
    """
    return one.nominal == other.nominal


def _asked(sides: Sequence[_Side]) -> list[Hashable]:
    """What tells prompts apart: the prompts, or where they differ within an arm, the arm."""
    return [
        side.runs[0].prompts if len({r.prompts for r in side.runs}) == 1 else i
        for i, side in enumerate(sides)
    ]


def relative_gains(
    records: Sequence[Record],
    axis: str,
    value: str,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[RelativeGain]:
    """The gain (final - start gold) of each arm relative to that of the runs with `axis` = `value`
    and the same other settings, where the latter is positive with an interval that excludes 0.
    """
    values = _by_value(records, axis)
    named = _named(value, values)
    if not named:
        require(value, values, f"the single {axis}")
    if len(named) > 1:  # which of them is meant nobody says
        return []
    value, found = named[0], []
    for name, strata in values.items():
        for other, runs in strata.items() if name != value else ():
            gain, reason = None, f"there is no run of {axis}={value} with the same other settings"
            sides = [_Side.of(some, "gain", []) for some in (runs, values[value].get(other, []))]
            if sides[1].runs:
                gain, reason = _relative(*sides, resamples=resamples, seed=seed)
            shape = sizes([side.table for side in sides if side.runs])
            found.append(
                RelativeGain(
                    arm=runs[0].arm,
                    settings=runs[0].settings,
                    gain=gain,
                    scope=scope_of(*shape) if gain else None,
                    reason=reason,
                )
            )
    return found


def _relative(
    arm: _Side, single: _Side, *, resamples: int, seed: int
) -> tuple[Estimate | None, str | None]:
    """Of the arm's gain, or why it cannot be told."""
    base = crossed_mean(single.table, resamples=resamples, seed=seed)
    if base.low is None or base.low <= 0:
        return None, f"{single.runs[0].arm} gains {base.told}, which may be nothing or a loss"
    tables = [arm.table, single.table]
    seeds, prompts = sizes(tables)
    if seeds == 1:
        tables = [table.mean(0, keepdims=True) for table in tables]
    runs = [tuple(r.seed for r in side.runs) for side in (arm, single)]
    runs = None if seeds == 1 else runs
    drawn = crossed(tables, _asked([arm, single]), runs, resamples=resamples, seed=seed)
    ratio = float(tables[0].mean() / tables[1].mean()) - 1
    return estimate(ratio, drawn[0] / drawn[1] - 1, prompts if seeds == 1 else seeds), None
