"""Closed choices: a miss lists the options and names the nearest."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

Option = TypeVar("Option")


def nearest(name: str, options: Iterable[str]) -> str:
    """'; did you mean x?' for the option nearest to `name`, or nothing."""
    found = get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def pick(name: str, options: Mapping[str, Option], key: str) -> Option:
    """`options[name]`; ValueError naming the setting `key` if there is no such option."""
    if name not in options:
        raise ValueError(
            f"{key}={name} is not known; choose one of {', '.join(options)}{nearest(name, options)}"
        )
    return options[name]


def require(name: str, options: Iterable[str], key: str) -> None:
    """ValueError unless `name` is one of `options`."""
    pick(name, dict.fromkeys(options), key)
