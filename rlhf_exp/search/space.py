"""The search space: Hydra's override grammar on one side, optuna's distributions on the other.

`interval(0,1)` is continuous, `range(1,10)` whole numbers up to 9, `choice(a,b)` or `a,b` a choice;
`tag(log, ...)` searches on a logarithmic scale, `int(interval(1,10))` makes whole numbers.
"""

import json
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
)
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

WORD = re.compile(r"[A-Za-z_][\w./-]*")
NOT_WORDS = {"null", "true", "false", "nan", "inf"}  # quoted, or they would be values
DIGITS = 12  # after the point, of multiples of a step
KINDS = "interval(low,high), range(start,stop), choice(a,b) or tag(log,...)"


def split(overrides: Sequence[Override]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """What stays as it is, as overrides, and what is searched, by key. Of two overrides of one key
    the later one holds, so a value takes a key out of the space.
    """
    fixed: dict[str, str] = {}
    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        key = override.get_key_element()
        name = key.lstrip("+")
        for old in [k for k in (*fixed, *space) if k.lstrip("+") == name]:
            fixed.pop(old, None)
            space.pop(old, None)
        if override.is_sweep_override():
            space[key] = _distribution(override, key)
        else:
            assert override.input_line is not None, "it was parsed from a line"
            fixed[key] = override.input_line
    return list(fixed.values()), space


def _distribution(override: Override, key: str) -> BaseDistribution:
    """Of one sweep override; ValueError if it spans nothing, or in no way that can be searched."""
    value = override.value()
    text = f"{key}={override.get_value_string()}"
    log = "log" in getattr(value, "tags", ())
    if unknown := set(getattr(value, "tags", ())) - {"log"}:
        raise ValueError(f"{text}: the tag {min(unknown)} means nothing here; there is log")
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return between(value.start, value.end, whole=whole, log=log)
        if isinstance(value, RangeSweep):
            return _steps(value, log=log)
        if isinstance(value, ChoiceSweep) and not log:
            return CategoricalDistribution([_plain(e) for e in override.sweep_iterator()])
    except ValueError as error:
        raise ValueError(f"{text} spans nothing that can be searched: {error}") from None
    raise ValueError(f"{text} cannot be searched: give {KINDS}")


def between(
    low: Any, high: Any, *, whole: bool, log: bool = False, step: Any = None
) -> BaseDistribution:
    """From `low` to `high`, both included."""
    if low > high:
        raise ValueError(f"{low} is above {high}")
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=step or 1)
    if step is not None:
        low, high = round(low, DIGITS), round(high, DIGITS)
    return FloatDistribution(float(low), float(high), log=log, step=step)


def _steps(value: RangeSweep, *, log: bool) -> BaseDistribution:
    """Of `range`, whose end is not included."""
    values = list(value.range())
    if not values:
        raise ValueError("it is empty")
    low, high = min(values), max(values)
    whole = all(isinstance(v, int) for v in values)
    step = abs(int(value.step) if whole else float(value.step))
    return between(low, high, whole=whole, log=log, step=None if log and step == 1 else step)


def _plain(element: Any) -> Any:
    """A choice as optuna keeps it: null, a truth value, a number or a string; lists and
    dictionaries as they are written.
    """
    if isinstance(element, QuotedString):
        return element.text
    if element is None or isinstance(element, bool | int | float | str):
        return element
    return Override._get_value_element_as_str(element)


def as_override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar, so that it reads back as `value`."""
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}"
    plain = not isinstance(value, str) or value[:1] in ("[", "{") or WORD.fullmatch(value)
    if plain and str(value).lower() not in NOT_WORDS:
        return f"{key}={value}"
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def grid(space: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every point of the space, the last key fastest; ValueError if there is a continuous one."""
    axes = {key: _values(key, d) for key, d in space.items()}
    return [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]


def _values(key: str, distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        raise ValueError(
            f"a grid has no end over the continuous {key}: list its values with choice(...), or "
            "give another hydra.sweeper.sampler"
        )
    return [round(low + i * step, DIGITS) for i in range(round((high - low) / step) + 1)]
