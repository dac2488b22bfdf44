"""How the arms of a study are laid out: one color per value of the setting that is compared, one
panel per choice of all the other settings. Settings below the one that is compared which some of
its values lack belong to the value, as in contrasts.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf_exp.report.look import Look, looks
from rlhf_exp.report.records import ALL, Record
from rlhf_exp.report.settings import UNKNOWN, Settings, short

PREFERRED = ("reward", "algo")  # a study is mostly about these, or about a setting within them


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs that differ by the seed alone."""

    name: str
    value: str  # of the setting that is compared
    panel: str  # the other settings
    settings: Settings
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[str, ...]:
        """Sorted as numbers."""
        return tuple(sorted((r.seed for r in self.records), key=lambda s: (len(s), s)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The arms of a study, in the order of their runs."""

    compared: str  # name of the setting with the colors; "" if no setting differs
    arms: tuple[Arm, ...]

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Color and marker by value of the setting that is compared."""
        return looks([arm.value for arm in self.arms])

    @cached_property
    def colors(self) -> dict[str, str]:
        """Color by the name of an arm, and by value of the setting that is compared."""
        by_arm = {arm.name: self.looks[arm.value]["color"] for arm in self.arms}
        return by_arm | {value: look["color"] for value, look in self.looks.items()}

    @cached_property
    def panels(self) -> dict[str, list[Arm]]:
        """Arms by what they share beside the setting that is compared."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            found.setdefault(arm.panel, []).append(arm)
        return found

    @cached_property
    def axes(self) -> dict[str, list[str]]:
        """The settings that differ among the arms that have them, each with its values, the one
        that is compared first.
        """
        names = sorted(self.arms[0].settings, key=lambda name: name != self.compared)
        values = {n: dict.fromkeys(arm.settings[n] for arm in self.arms) for n in names}
        known = {name: [v for v in found if v != UNKNOWN] for name, found in values.items()}
        return {name: found for name, found in known.items() if len(found) > 1}

    def arm(self, record: Record) -> Arm:
        """The arm of a run."""
        return next(arm for arm in self.arms if arm.settings == record.settings)


def arrange(records: Sequence[Record], first: str = "") -> Layout:
    """Group the records by arm; `first` names the setting that gets the colors, "" chooses: a
    reward, then an algorithm, then what has the most values.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.arm, []).append(record)
    settings = [group[0].settings for group in groups.values()]
    compared = first or _compared(settings)
    within = [
        name
        for name in settings[0]
        if name == compared
        or (name.startswith(f"{compared}.") and any(s[name] == UNKNOWN for s in settings))
    ]
    return Layout(
        compared=compared,
        arms=tuple(_arm(group, within) for group in groups.values()),
    )


def named(settings: Settings) -> str:
    """The settings that an arm has, on one line."""
    names = short(list(settings))
    told = zip(names, settings.values(), strict=True)
    return ", ".join(f"{name}={text}" for name, text in told if text != UNKNOWN) or ALL


def _arm(records: list[Record], within: Sequence[str]) -> Arm:
    """`within`: the setting that is compared, and those that belong to its values."""
    settings = records[0].settings
    own = [settings[k] for k in within if settings[k] != UNKNOWN]
    others = {k: v for k, v in settings.items() if k not in within}
    return Arm(
        name=named(settings),
        value=", ".join(own) or ALL,
        panel=named(others) if others else "",
        settings=settings,
        records=tuple(records),
    )


def _compared(settings: Sequence[Settings]) -> str:
    def worth(name: str) -> tuple[int, int]:
        group = name.split(".")[0].split("@")[0]
        rank = PREFERRED.index(group) if group in PREFERRED else len(PREFERRED)
        return rank, -len({s[name] for s in settings})

    return min(settings[0], key=worth, default="")
