"""Fixtures on top of judge_standin.py; a module asks for them with
`pytest_plugins = ["judge_fixtures"]`.
"""

from collections.abc import Iterator

import pytest
from judge_standin import KEY, Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TEST_KEY", KEY)
    made = Server()
    yield made
    made.close()
