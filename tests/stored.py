"""Directories of finished runs with chosen numbers, as training would have left them."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rlhf_exp import runs
from rlhf_exp.config import ROOT_KEYS, conf_directory, resolved
from rlhf_exp.evaluation.summary import summary
from rlhf_exp.launching import UNSAID

METRICS = {
    "proxy": "reward/proxy",
    "gold": "reward/gold",
    "k1": "kl/k1",
    "k3": "kl/k3",
    "exact": "kl/exact",
    "length": "length/mean",
    "ended": "length/ended",
    "win": "win/start",
    "repetition": "text/repetition",
    "correct": "task/accuracy",
}
Columns = Mapping[str, Any]  # of an evaluation: a value for all completions, or one for each


def stored(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    evaluations: Sequence[Columns],
    prompts: Sequence[str] | None = None,
    samples: int = 1,
    seconds: float = 2.0,
    tokens: float | None = 100.0,
) -> Path:
    """Write the directory of a finished run and return it.

    `overrides` are those of the command line. An evaluation has `step`, `gold` and `k1`, and any
    other column of the rows; `proxy` is gold, `length` 10 and `ended` true unless given. There are
    as many prompts as gold has values for each of the `samples` completions (8, if it has one).
    Each of the steps before the last takes `seconds` and samples `tokens` tokens.
    """
    config = configured(*overrides)
    about = {"fingerprint": runs.config_fingerprint(config), "seed": config["seed"]}
    about |= {"config": config, "versions": {"rlhf_exp": "0"}, "git": None}
    _write(folder / "run.json", about | {"artifacts": {}, "finished": "2026-01-31T12:00:00+00:00"})
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / "run.log").touch()
    rows: dict[int, dict[str, float]] = {}
    for columns in evaluations:
        content = _evaluation(columns, prompts, samples)
        _write(folder / "evaluation" / f"step-{content['step']:06d}.json", content)
        rows[content["step"]] = {f"evaluation/{k}": v for k, v in content["metrics"].items()}
    _metrics(folder / "metrics.jsonl", rows, seconds, tokens)
    _write(folder / "summary.json", summary(folder))
    return folder


def configured(*overrides: str) -> dict[str, Any]:
    """The resolved config that a run with these overrides writes down."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = [o for o in parsed if "." in o.key_or_group or o.key_or_group in ROOT_KEYS]
    values = [o for o in plain if o.package is None and not _group(o.key_or_group)]
    chosen = tuple(o.input_line or "" for o in parsed if o not in values)
    config = deepcopy(_composed(*chosen))
    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    return {k: v for k, v in resolved(config).items() if k not in UNSAID}


def _group(name: str) -> bool:
    return (conf_directory() / name).is_dir()


@cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _evaluation(columns: Columns, prompts: Sequence[str] | None, samples: int) -> dict[str, Any]:
    given = {k: np.asarray(v) for k, v in columns.items() if k != "step"}
    count = max(values.size for values in given.values())
    names = prompts or [f"prompt {i}" for i in range(8 if count == 1 else count // samples)]
    asked = [name for name in names for _ in range(samples)]
    usual = {"proxy": given.get("gold", 0.0), "k3": given.get("k1", 0.0), "length": 10.0}
    filled = {
        k: np.broadcast_to(v, len(asked)).tolist()
        for k, v in (usual | {"ended": np.True_} | given).items()
    }
    texts = {"prompt": asked, "completion": [f"{p} at {columns['step']}" for p in asked]}
    every = texts | filled
    rows = [dict(zip(every, values, strict=True)) for values in zip(*every.values(), strict=True)]
    names_of = {k: METRICS.get(k, k.replace("facet/", "reward/")) for k in filled}
    names_of |= {k: f"reward/{k}" for k in filled if k.startswith("proxy/")}
    means = {names_of[k]: float(np.mean(v)) for k, v in filled.items()}
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
    about = {"step": columns["step"], "seed": 1234, "sampling": sampling}
    return about | {"metrics": means, "rows": rows}


def _metrics(
    path: Path, evaluated: dict[int, dict[str, float]], seconds: float, tokens: float | None
) -> None:
    lines = []
    for step in range(max(evaluated) + 1):
        if step in evaluated:
            lines.append({"step": step} | evaluated[step])
        if step < max(evaluated):
            row = {"step": step, "time/sample": seconds / 2, "time/learn": seconds / 2}
            lines.append(row | ({} if tokens is None else {"tokens_per_second": tokens / seconds}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
