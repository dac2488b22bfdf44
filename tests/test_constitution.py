"""Constitutions: ours, one of the user's, and what is wrong with a file."""

from pathlib import Path

import pytest
import yaml

from rlhf_exp.constitution import PARTS, read

GOOD = {"name": "short", "compare": "Which is shorter?", "critique": "Name.", "revise": "Cut."}


def written(folder: Path, content: object) -> str:
    """The path of a YAML file with this content."""
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_our_own_by_name() -> None:
    assert [p.name for p in read("reviews", "constitution")] == ["kind", "warm", "sound"]
    assert "honest" in [p.name for p in read("assistant", "constitution")]


def test_one_from_a_file(tmp_path: Path) -> None:
    (principle,) = read(written(tmp_path, {"principles": [GOOD]}), "constitution")
    assert {part: getattr(principle, part) for part in PARTS} == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"principles": []}, r"mine.yaml needs a list `principles` with at least one"),
        ({"rules": [GOOD]}, r"mine.yaml needs a list `principles`"),
        ([GOOD], r"mine.yaml needs a list `principles`"),
        ({"principles": ["be kind"]}, r"principle 1 must have name, compare, critique, revise"),
        ({"principles": [GOOD | {"critic": "x"}]}, r"unknown 'critic'; did you mean critique\?"),
        ({"principles": [GOOD, GOOD]}, r"two principles with the name short"),
        ({"principles": [GOOD | {"revise": " "}]}, r"principle 1 needs a text for `revise`"),
        ({"principles": [GOOD | {"compare": 3}]}, r"principle 1 needs a text for `compare`"),
        ("principles: [", r"mine.yaml is no YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^critique.constitution=.*{message}"):
        read(written(tmp_path, content), "critique.constitution")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"constitution=revews: .* assistant or reviews$"):
        read("revews", "critique.constitution")
