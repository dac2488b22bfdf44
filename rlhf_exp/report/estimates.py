"""What statistics tell: a number with its interval, a difference with its verdict."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

# what an interval covers: other seeds and other prompts, or one of the two; see statistics.py
Scope = Literal["seeds and prompts", "seeds", "prompts"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; low and high are None where there can be none."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def told(self) -> str:
        """0.12 [0.03, 0.21]"""
        digits = _digits(self.low, self.high)
        return f"{self.mean:.{digits}f}{_range(self.low, self.high, digits)}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one arm has more than another."""

    mean: float
    low: float | None
    high: float | None
    seeds: int  # per stratum, in the one that has fewest
    strata: int  # settings that both arms have, over which the mean goes
    prompts: int
    scope: Scope
    paired: bool  # by seed and prompt
    improvement: Estimate | None  # P(a run of the one is above a run of the other); None for 1 seed
    win_rate: Estimate | None  # share of pairs (seed, prompt) in which the one is above; ties half
    more_seeds: int | None  # that would settle it, were the difference what it seems to be

    @property
    def verdict(self) -> Literal["higher", "lower", "open"]:
        """Higher or lower only where the interval excludes 0."""
        if self.low is not None and self.low > 0:
            return "higher"
        return "lower" if self.high is not None and self.high < 0 else "open"

    @property
    def told(self) -> str:
        """+0.02 [-0.05, 0.09] over 5 seeds: open; about 14 more seeds would settle it if the
        difference is real
        """
        digits = _digits(self.low, self.high)
        what = f"{self.mean:+.{digits}f}{_range(self.low, self.high, digits)}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds != 1)}"
        if self.strata > 1:
            seeds = f"{self.strata} settings of {seeds}"
        if self.scope == "prompts":
            seeds = f"{self.prompts} prompts of {seeds}"
        pairing = "" if self.paired else ", unpaired"
        return f"{what} over {seeds}{pairing}: {self.verdict}{self._outlook()}"

    def _outlook(self) -> str:
        if self.scope == "prompts":
            return "; other seeds may differ"
        if self.verdict != "open" or self.more_seeds is None:
            return ""
        if not self.more_seeds:
            return "; more prompts would tell more than more seeds"
        more = f"{self.more_seeds} more seed{'s' * (self.more_seeds != 1)}"
        return f"; about {more} would settle it if the difference is real"


def _digits(low: float | None, high: float | None) -> int:
    """Decimals that show the width of an interval to two digits, and on which side of 0 it is."""
    if low is None or high is None or low == high:
        return 3
    digits = int(np.clip(1 - math.floor(math.log10(high - low)), 0, 9))
    nearest = min(abs(low), abs(high)) if low * high > 0 else 1.0
    while digits < 9 and round(nearest, digits) == 0:
        digits += 1
    return digits


def _range(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
