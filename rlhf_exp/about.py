"""What run.json says of a run before it has done anything: what was asked for, and where."""

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import __version__
from rlhf_exp.runs import config_fingerprint


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """What run.json says before the run has done anything."""
    return {
        "fingerprint": config_fingerprint(config),
        "seed": config["seed"],
        "config": config,
    } | _circumstances()


@cache
def _circumstances() -> dict[str, Any]:
    """Versions, revision and machine."""
    root = Path(__file__).parent.parent
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    revision = ""
    with suppress(OSError):  # no git here
        revision = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    packages = (
        "torch", "transformers", "trl", "peft", "accelerate", "datasets", "hydra-core", "omegaconf",
    )  # fmt: skip
    return {
        "versions": {"rlhf_exp": __version__, "python": platform.python_version()}
        | {p: metadata.version(p) for p in packages},
        "git": revision or None,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "gpus": torch.cuda.device_count(),
        },
    }
