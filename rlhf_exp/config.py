"""From a config node to the object it describes, with the dataclass its `_target_` names as the
schema.
"""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.choices import nearest
from rlhf_exp.pruning import Pruning


@dataclass
class Root:
    """Types of the settings at the root; the nodes below have schemas of their own."""

    stages: list[str]
    seed: int
    artifacts: str
    objective: Any
    show_every: int | None
    figures: bool
    resume: str | None
    pruning: Pruning | None
    plan: Any  # true, false or force
    planning: Any
    report: Any
    runs: str
    arm: str | None  # a name in reports
    run: str | None
    against: str | None
    sweep: str  # run or status
    data: Any
    policy: Any
    labeller: Any
    reward: Any
    gold: Any
    algo: Any
    sft: Any
    hardware: Any
    sampler: Any
    tracker: Any
    critique: Any
    preferences: Any
    evaluation: Any
    checkpoints: Any
    prepare: Any
    generations: Any
    export: Any


ROOT_KEYS = [f.name for f in fields(Root)]


_sound: set[str] = set()  # nodes that were checked: the jobs of a sweep share most


@cache
def conf_directory() -> Path:
    """conf/ inside the installed package, else at the root of the repository."""
    package = Path(__file__).parent
    return next(
        p for p in (package / "conf", package.parent / "conf") if (p / "config.yaml").exists()
    )


def check(config: DictConfig) -> None:
    """Compare the root and every node that names a `_target_` with their schemas.

    Nothing is instantiated. ValueError for a value that is missing, an unknown key or a wrong type.
    """
    settled = config.copy()
    OmegaConf.resolve(settled)
    check_fields(settled, Root, "")
    _check(settled, "")


def _check(value: Any, key: str) -> None:
    if isinstance(value, ListConfig):
        for i in range(len(value)):
            _check(value[i], f"{key}[{i}]")
    if not isinstance(value, DictConfig):
        return
    names: list[Any] = list(value)  # numbers, in a table
    for name in names:
        inner = f"{key}.{name}" if key else name
        if OmegaConf.is_missing(value, name):
            raise ValueError(f"{inner} has no default and must be given: add {inner}=<value>")
        _check(value[name], inner)
    if "_target_" in value:
        check_node(value, key)


def check_node(node: DictConfig, key: str) -> None:
    """Compare the node `key` with the dataclass that its `_target_` names, as `check` does."""
    try:
        schema = get_class(node._target_)
    except Exception as error:
        raise ValueError(f"{key}._target_={node._target_} cannot be imported ({error})") from None
    if not is_dataclass(schema):
        return
    content = f"{key} {OmegaConf.to_container(node)}"
    if content not in _sound:
        check_fields(node, schema, f"{key}.")
        _sound.add(content)


def check_fields(node: DictConfig, schema: Any, prefix: str) -> None:
    """Compare keys and types of `node` with the fields of the dataclass `schema`."""
    values = {str(k): v for k, v in node.items() if k != "_target_"}
    known = {f.name: f.type for f in fields(schema) if f.init}
    for name in values:
        if name not in known:
            what = f"a setting of {schema.__name__}" if prefix else "a setting"
            raise ValueError(f"{prefix}{name} is not {what}{nearest(name, known)}")
    plain = {
        k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v
        for k, v in values.items()
        if known[k] is not Any
    }
    with suppress(OmegaConfBaseException):
        OmegaConf.merge(_typed(schema), plain)
        return
    for name, value in plain.items():  # one by one, to tell which it is
        try:
            OmegaConf.merge(_typed(schema), {name: value})
        except OmegaConfBaseException as error:
            where = getattr(error, "full_key", None) or name
            raise ValueError(f"{prefix}{where}: {str(error).splitlines()[0]}") from None


@cache
def _typed(schema: Any) -> Any:
    """An empty config of the dataclass `schema`, which is slow to make."""
    return OmegaConf.structured(schema)


def build(node: Any, key: str) -> Any:
    """The object that a plain, checked node describes. ValueErrors of its `__post_init__` come
    through as they are.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise ValueError(f"{key}: {error}") from error


def imported(reference: str, key: str) -> Callable[..., Any]:
    """The function that `reference` (module:function) names; modules in the working directory are
    found. ValueError naming the setting `key` if there is none.
    """
    module, _, name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{key}={reference} cannot be imported ({error}); check module and name"
        ) from None
    if not callable(found):
        raise ValueError(f"{key}={reference} is not a function")
    return found


def overridden(group: str, node: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """What the overrides `arguments`, all of them of `group`, make of its `node`: another option,
    other values. ValueError as on the command line.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    option = [a for a in arguments if a.startswith(f"{group}=")]
    values = [a for a in arguments if not a.startswith(f"{group}=")]
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = compose("config", overrides=option)
        if not option:  # with the defaults of what is newer than the node
            known = OmegaConf.to_container(_typed(get_class(node["_target_"])))
            OmegaConf.update(config, group, {**known, **node}, merge=False)  # type: ignore[dict-item]
        for override in OverridesParser.create().parse_overrides(values):
            if override.is_sweep_override():
                raise ValueError(f"{override.input_line} is a sweep: give one value")
            OmegaConf.update(config, override.key_or_group, override.value())
        check(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, list(arguments))) from None
    return resolved(config)[group]


def last_hardware(about: dict[str, Any]) -> Any:
    """The node of the hardware that a run had last, of its run.json: a run that is resumed
    elsewhere keeps its config. None for a foreign one that names none.
    """
    return about.get("continued_on", [about["config"].get("hardware")])[-1]


def explain(error: Exception, arguments: list[str]) -> str:
    """One sentence for an error of Hydra's, with the nearest key, group or option."""
    text = str(error)
    if override := getattr(error, "override", None):
        return f"{override} cannot be read as an override ({text.splitlines()[0]})"
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = sorted(p.stem for p in (conf_directory() / group).glob("*.yaml"))
        known = ", ".join(options)
        return f"{group}={option} is not an option; there are {known}{nearest(option, options)}"
    if found := re.search(r"Could not override '([^']+)'|full_key: (\S+)", text):
        name = found.group(1) or found.group(2)
        if "." in name:
            return f"{name} is not a setting{nearest(name, _keys_beside(name, arguments))}"
        groups = [p.name for p in conf_directory().iterdir() if p.is_dir()]
        known = sorted({*groups, *ROOT_KEYS})
        return f"{name} is neither a setting nor a config group{nearest(name, known)}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _keys_beside(key: str, arguments: list[str]) -> list[str]:
    """Full names of the settings that `key` could have meant, under the options chosen on the
    command line.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    groups = {p.name for p in conf_directory().iterdir() if p.is_dir()}
    chosen = [
        a.split(",")[0]
        for a in arguments
        if a.split("=")[0].split("@")[0].split("/")[0] in groups and "." not in a.split("=")[0]
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        node: Any = compose("config", overrides=chosen, return_hydra_config=True)
    parent = key.rpartition(".")[0]
    while parent and not isinstance(OmegaConf.select(node, parent), DictConfig):
        parent = parent.rpartition(".")[0]
    beside = OmegaConf.select(node, parent) if parent else node
    return [f"{parent}.{k}" if parent else str(k) for k in beside if k != "_target_"]


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
