"""Fixtures on top of lab.py; a module asks for them with `pytest_plugins = ["lab_fixtures"]`."""

from pathlib import Path
from typing import Any

import pytest
from lab import PROMPTS, SHAPE, Lab, MakeLab

from rlhf_exp.artifacts import Store
from rlhf_exp.policy import Policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    """Random weights, and a tokenizer that knows letters."""
    policy = Policy(architecture=dict(SHAPE), vocabulary=300)
    return policy.base(Store(tmp_path_factory.mktemp("base")), PROMPTS)


@pytest.fixture
def lab(base: Path | str, tmp_path: Path) -> MakeLab:
    made: list[Lab] = []

    def make(**kwargs: Any) -> Lab:
        made.append(Lab(base, tmp_path / str(len(made)), **kwargs))
        return made[-1]

    return make
