"""One setting against another, all else the same: by stratum, and over all strata that have both.

A stratum is the runs whose other settings are the same. Settings below the one that is compared
(algo.kl_coef below algo) which some of its values lack belong to the value, not to the stratum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_exp.report.overoptimization import Measure
from rlhf_exp.report.records import Record
from rlhf_exp.report.settings import Settings
from rlhf_exp.report.statistics import RESAMPLES, Difference, Estimate, Scope


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

    settings: Settings  # of the arm
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
    raise NotImplementedError


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
    raise NotImplementedError
