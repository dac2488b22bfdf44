"""In which settings runs differ: as their sweep was told, or as comparing their configs shows."""

import json
import re
from collections.abc import Sequence
from typing import Any

from rlhf_exp.runs import NO_MATTER, Run

SEED, ARM = "seed", "arm"
UNKNOWN = "-"
GROUPS = {"gold": "reward@gold", "sft": "algo@sft"}  # nodes whose option is chosen by another name
Settings = dict[str, str]


def differing(jobs: Sequence[Run]) -> list[Settings]:
    """The settings in which the jobs differ, of each job, by name and as short text; the seed last.

    The overrides of a sweep say it in the words of the command line, if they tell all jobs apart
    whose fingerprints differ, and not by the seed alone; otherwise the configs are compared, and
    an option is shown by its class.
    """
    told, configured = _by_override(jobs), _by_config(jobs)
    different = len({tuple(settings.items()) for settings in told})
    if different < len({job.fingerprint for job in jobs}) or _merges(told, configured, jobs):
        told = configured
    names = sorted(told[0] if told else (), key=lambda name: name == SEED)
    return [{name: settings[name] for name in names} for settings in told]


def _merges(told: list[Settings], configured: list[Settings], jobs: Sequence[Run]) -> bool:
    """Whether jobs are told apart by nothing but the seed though their configs differ in more."""
    seen: dict[Any, set[Any]] = {}
    for job, *both in zip(jobs, told, configured, strict=True):
        if job.config:
            name, whole = (tuple(without_seed(settings).items()) for settings in both)
            seen.setdefault(name, set()).add(whole)
    return any(len(found) > 1 for found in seen.values())


def short(names: Sequence[str]) -> list[str]:
    """The last part of each name, unless that is ambiguous."""
    parts = [name.rsplit(".", 1)[-1] for name in names]
    return [p if parts.count(p) == 1 else name for p, name in zip(parts, names, strict=True)]


def without_seed(settings: Settings) -> Settings:
    """What the seeds of a setting have in common."""
    return {name: text for name, text in settings.items() if name != SEED}


def label(settings: Settings) -> str:
    """On one line."""
    names = short(list(settings))
    return ", ".join(f"{n}={text}" for n, text in zip(names, settings.values(), strict=True))


def _by_override(jobs: Sequence[Run]) -> list[Settings]:
    given = [dict(map(_parted, job.overrides)) for job in jobs]
    names = dict.fromkeys(name for overrides in given for name in overrides)
    passed_over = {*NO_MATTER, "hydra"} - {ARM}
    kept = [n for n in names if re.split("[./]", n)[0] not in passed_over]
    return _settings({name: _column(jobs, given, name) for name in kept}, len(jobs))


def _column(jobs: Sequence[Run], given: Sequence[Settings], name: str) -> list[str]:
    """What the overrides say of `name`; of a job that says nothing, what its config has: a class
    by the word with which others chose it, if that is one.
    """
    configured = [_configured(job.config, name) for job in jobs]
    words: dict[str, set[str]] = {}
    for shown, overrides in zip(configured, given, strict=True):
        if name in overrides and shown[:1].isupper():
            words.setdefault(shown, set()).add(overrides[name])
    one = {shown: next(iter(found)) for shown, found in words.items() if len(found) == 1}
    texts = [o.get(name) or one.get(c, c) for o, c in zip(given, configured, strict=True)]
    return [c if "$" in text else text for text, c in zip(texts, configured, strict=True)]


def _parted(override: str) -> tuple[str, str]:
    name, _, text = override.lstrip("+").partition("=")
    return name, _number(text.strip("'\""))


def _configured(config: dict[str, Any], name: str) -> str:
    """What the config has where no override says it."""
    node: Any = config
    name = next((key for key, group in GROUPS.items() if group == name), name)
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            return UNKNOWN
        node = node[part]
    return _shown(node)


def _by_config(jobs: Sequence[Run]) -> list[Settings]:
    columns: dict[str, list[str]] = {}

    def compare(nodes: dict[int, Any], name: str) -> None:
        """Look for differences between the values that jobs, by index, have at `name`."""
        groups: dict[Any, dict[int, Any]] = {}
        for i, node in nodes.items():
            groups.setdefault(_kind(node), {})[i] = node
        if len(groups) > 1:
            column = columns.setdefault(GROUPS.get(name, name), [UNKNOWN] * len(jobs))
            for i, node in nodes.items():
                column[i] = _shown(node)
        for group in groups.values():
            if isinstance(next(iter(group.values())), dict):
                for key in dict.fromkeys(key for node in group.values() for key in node):
                    inner = {i: node[key] for i, node in group.items() if key in node}
                    compare(inner, f"{name}.{key}" if name else key)

    configs = {i: job.config for i, job in enumerate(jobs) if job.config}
    compare({i: {k: c[k] for k in c if k not in NO_MATTER} for i, c in configs.items()}, "")
    columns[ARM] = [str(job.config.get(ARM) or UNKNOWN) for job in jobs]
    outer_first = sorted(columns, key=lambda name: name.count("."))
    return _settings({name: columns[name] for name in outer_first}, len(jobs))


def _kind(node: Any) -> Any:
    """Equal for values whose difference lies within them, or that do not differ."""
    if isinstance(node, dict):
        return "object", node.get("_target_")
    return json.dumps(node)


def _settings(columns: dict[str, list[str]], count: int) -> list[Settings]:
    """The columns that are not the same all over, nor follow the seed or the arm, by job."""
    seeds, arms = columns.get(SEED, []), columns.get(ARM, [])

    def told_by_arm(name: str) -> bool:
        """Whether the name of the arm says it; then the arms' names say more than it does."""
        if name == ARM or len(set(arms)) < 2 or UNKNOWN in arms:
            return False
        return len(set(zip(arms, columns[name], strict=True))) == len(set(arms))

    def follows(name: str, column: list[str]) -> bool:
        if not name.endswith(SEED):
            return False
        known = [(text, seed) for text, seed in zip(column, seeds, strict=False) if text != UNKNOWN]
        return len(set(known)) > 1 and all(text == seed for text, seed in known)

    kept = {
        name: column
        for name, column in columns.items()
        if len(set(column)) > 1
        and (name == SEED or not (follows(name, column) or told_by_arm(name)))
    }
    return [{name: column[i] for name, column in kept.items()} for i in range(count)]


def _shown(node: Any) -> str:
    if isinstance(node, dict) and "_target_" in node:
        return node["_target_"].rsplit(".", 1)[-1]
    if isinstance(node, str):
        return node
    return _number(json.dumps(node, separators=(",", ":")).replace('"', ""))


def _number(text: str) -> str:
    """A number as Python writes it, to four digits if it is long; other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    if len(text) > 7:
        return f"{number:.4g}"
    return text if text.lstrip("-").isdigit() else repr(number)
