"""Sweep files in the format of Weights & Biases, read without it.

`method` is bayes (tpe), random or grid; `metric` names the objective; `parameters` span the space;
`early_terminate` turns on median stopping. Left out, and refused by name: what needs a server
(`program`, `command`, `project`, `entity`), normal and beta distributions, probabilities of values.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution
from yaml import YAMLError

from rlhf_exp.choices import nearest, pick
from rlhf_exp.objective import WATCHED
from rlhf_exp.search.space import as_override, between

METHODS = {"bayes": "tpe", "random": "random", "grid": "grid"}
KEYS = ("method", "metric", "parameters", "early_terminate", "name", "description")
# how these metrics are called in metrics.jsonl, and so in a project of Weights & Biases
LOGGED = {logged: name for name, logged in WATCHED.items()}


@dataclass(kw_only=True)
class SweepFile:
    """What a file asks for, in this project's words."""

    sampler: str
    objective: str | None = None  # option of the group objective
    goal: str | None = None  # maximize or minimize
    name: str | None = None
    fixed: list[str] = field(default_factory=list)  # overrides
    space: dict[str, BaseDistribution] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None  # fields of MedianStopping


def read(path: Path) -> SweepFile:
    """The sweep file at `path`; ValueError naming what it has that has no counterpart here."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))  # reads 1e-6 as a number
    except OSError:
        raise FileNotFoundError(
            f"hydra.sweeper.file={path} cannot be read: give the path of a sweep file"
        ) from None
    except YAMLError as error:
        what = " ".join(str(error).split())
        raise ValueError(f"hydra.sweeper.file={path} is no YAML: {what}") from None
    if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict):
        raise ValueError(f"hydra.sweeper.file={path} needs a key parameters with settings below it")
    _known(found, KEYS, str(path))
    metric = found.get("metric") or {}
    _known(metric, ("name", "goal"), f"{path}: metric")
    name = metric.get("name")
    asked = SweepFile(
        sampler=pick(found.get("method", "bayes"), METHODS, f"{path}: method"),
        objective=LOGGED.get(name.removeprefix("evaluation/"), name) if name else None,
        goal=metric.get("goal"),
        name=found.get("name"),
        pruning=_pruning(found.get("early_terminate"), f"{path}: early_terminate"),
    )
    for key, spec in _flat(found["parameters"]).items():
        _add(asked, key, spec, f"{path}: {key}")
    return asked


def _known(node: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{where} must be a dictionary with keys of {', '.join(keys)}")
    for key in map(str, node):
        if key not in keys:
            raise ValueError(
                f"{where}: {key} has no meaning here, remove it (there are {', '.join(keys)})"
                f"{nearest(key, keys)}"
            )


def _pruning(node: Any, where: str) -> dict[str, Any] | None:
    """Median stopping in place of hyperband: a run's first `min_iter` steps are safe from both."""
    if node is None:
        return None
    if isinstance(node, dict) and node.get("type") == "hyperband":
        _known(node, ("type", "min_iter"), where)
        return {"from_step": node["min_iter"]} if "min_iter" in node else {}
    _known(node, ("type", "startup", "percentile", "from_step"), where)
    pick(str(node.get("type")), dict.fromkeys(("hyperband", "median")), f"{where}: type")
    return {k: v for k, v in node.items() if k != "type"}


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters under dotted keys."""
    found: dict[str, Any] = {}
    for name, spec in parameters.items():
        if isinstance(spec, dict) and isinstance(spec.get("parameters"), dict):
            found |= _flat(spec["parameters"], f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = spec
    return found


def _add(asked: SweepFile, key: str, spec: Any, where: str) -> None:
    """Put one parameter where it belongs."""
    _known(spec, ("value", "values", "distribution", "min", "max", "q"), where)
    kind = spec.get("distribution") or _implied(spec, where)
    needed, make = pick(kind, KINDS, f"{where}: distribution")
    given = set(spec) - {"distribution"}
    if not needed <= given or given - needed - ({"q"} if kind == "q_uniform" else set()):
        raise ValueError(
            f"{where}: distribution {kind} takes {' and '.join(sorted(needed))}, not "
            f"{', '.join(sorted(given)) or 'nothing'}"
        )
    try:
        made = make(spec)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {spec} spans nothing that can be searched: {error}") from None
    if kind == "constant":
        asked.fixed.append(as_override(key, _plain(made)))
    else:
        asked.space[key] = made


def _implied(spec: dict[str, Any], where: str) -> str:
    """The distribution that a parameter means without saying so."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    if not {"min", "max"} <= set(spec):
        raise ValueError(f"{where}: give value, values, or min and max")
    return (
        "int_uniform"
        if isinstance(spec["min"], int) and isinstance(spec["max"], int)
        else ("uniform")
    )


def _plain(value: Any) -> Any:
    """Lists and dictionaries as an override has them."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _multiples(spec: dict[str, Any]) -> BaseDistribution:
    """The multiples of q that lie between min and max."""
    q = float(spec.get("q", 1))
    low, high = math.ceil(spec["min"] / q - 1e-9) * q, math.floor(spec["max"] / q + 1e-9) * q
    return between(low, high, whole=False, step=q)


Make = Callable[[dict[str, Any]], Any]
BOUNDS = {"min", "max"}
# distribution: the keys it needs, what it is here
KINDS: dict[str, tuple[set[str], Make]] = {
    "constant": ({"value"}, lambda s: s["value"]),
    "categorical": ({"values"}, lambda s: CategoricalDistribution([*map(_plain, s["values"])])),
    "int_uniform": (BOUNDS, lambda s: between(s["min"], s["max"], whole=True)),
    "uniform": (BOUNDS, lambda s: between(s["min"], s["max"], whole=False)),
    "q_uniform": (BOUNDS, _multiples),
    "log_uniform": (  # the bounds are exponents of e
        BOUNDS,
        lambda s: between(math.exp(s["min"]), math.exp(s["max"]), whole=False, log=True),
    ),
    "log_uniform_values": (BOUNDS, lambda s: between(s["min"], s["max"], whole=False, log=True)),
}
