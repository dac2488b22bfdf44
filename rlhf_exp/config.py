"""From a config node to the object it describes, with the dataclass its `_target_` names as the
schema.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from rlhf_exp.choices import nearest

ROOT_KEYS = [
    "stages",
    "seed",
    "artifacts",
    "objective",
    "show_every",
    "resume",
    "data",
    "policy",
    "labeller",
    "reward",
    "gold",
    "algo",
    "sft",
    "hardware",
    "tracker",
    "preferences",
    "evaluation",
    "checkpoints",
]


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
    for name in config:
        if str(name) not in ROOT_KEYS:
            raise ValueError(f"{name} is not a setting{nearest(str(name), ROOT_KEYS)}")
    settled = config.copy()
    OmegaConf.resolve(settled)
    _check(settled, "")


def _check(value: Any, key: str) -> None:
    if isinstance(value, ListConfig):
        for i in range(len(value)):
            _check(value[i], f"{key}[{i}]")
    if not isinstance(value, DictConfig):
        return
    for name in map(str, value):
        inner = f"{key}.{name}" if key else name
        if OmegaConf.is_missing(value, name):
            raise ValueError(f"{inner} has no default and must be given: add {inner}=<value>")
        _check(value[name], inner)
    if "_target_" in value:
        _check_node(value, key)


def _check_node(node: DictConfig, key: str) -> None:
    schema = get_class(node._target_)
    if not is_dataclass(schema):
        return
    values = {str(k): v for k, v in node.items() if k != "_target_"}
    known = [f.name for f in fields(schema) if f.init]
    for name in values:
        if name not in known:
            raise ValueError(
                f"{key}.{name} is not a setting of {schema.__name__}{nearest(name, known)}"
            )
    plain = {
        k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()
    }
    try:
        OmegaConf.merge(OmegaConf.structured(schema), plain)
    except (ConfigKeyError, ValidationError, OmegaConfBaseException) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{key}.{getattr(error, 'key', None) or ''}: {first}".replace(".:", ":")
        ) from None


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


def explain(error: Exception, arguments: list[str]) -> str:
    """One sentence for an error of Hydra's, with the nearest key, group or option."""
    text = str(error)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        options = sorted(p.stem for p in (conf_directory() / group).glob("*.yaml"))
        known = ", ".join(options)
        return f"{group}={option} is not an option; there are {known}{nearest(option, options)}"
    if found := re.search(r"full_key: (\S+)", text):
        key = found.group(1)
        return f"{key} is not a setting{nearest(key, _keys_beside(key, arguments))}"
    if found := re.search(r"Could not override '([^']+)'", text):
        groups = sorted(p.name for p in conf_directory().iterdir() if p.is_dir())
        name, known = found.group(1), [*groups, *ROOT_KEYS]
        return f"{name} is neither a setting nor a config group{nearest(name, known)}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _keys_beside(key: str, arguments: list[str]) -> list[str]:
    """Full names of the settings that `key` could have meant, under the options chosen on the
    command line.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    groups = {p.name for p in conf_directory().iterdir() if p.is_dir()}
    chosen = [a.split(",")[0] for a in arguments if a.split("=")[0].split("@")[0] in groups]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        node: Any = compose("config", overrides=chosen)
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(node, parent) if parent else node
    return (
        [f"{parent}.{k}" if parent else str(k) for k in node]
        if isinstance(node, DictConfig)
        else []
    )


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
