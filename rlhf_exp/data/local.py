"""`data=local`: prompts, demonstrations and preference pairs from files of the user; and how any
data file is read.
"""

import gzip
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_exp.artifacts import file_hash, write_text
from rlhf_exp.data.rows import Dataset, Demonstration, Pair, Statement, subject

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


def read_jsonl(path: Path, *, lists: bool = False) -> list[dict[str, Any]]:
    """One object per line; ValueError with the line's number for anything else, blank lines
    included. With `lists` a line may be a list, which becomes the column `row`.
    """
    return list(_each_line(path, lists))


def _each_line(path: Path, lists: bool) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        row = _parsed(f"{path}, line {number}", line.rstrip("\n"))
        yield _columns(path, number, row, lists)


def _lines(path: Path) -> Iterator[str]:
    """One after the other, so that a pool of many gigabytes never lies in memory."""
    unpacked = gzip.open if path.suffix == ".gz" else open
    try:
        with unpacked(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); fetch it again") from None


def _parsed(where: Any, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); mend or remove the line") from None


def _columns(path: Path, number: int, row: Any, lists: bool) -> dict[str, Any]:
    if lists and isinstance(row, list):
        return {"row": row}
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, line {number}: expected an object with columns, found "
            f"{json.dumps(row, ensure_ascii=False)[:40]}"
        )
    return row


def _json_rows(path: Path, lists: bool) -> list[dict[str, Any]]:
    """Of a file that is one list of rows, or a row per line in spite of its name."""
    try:
        whole = json.loads("".join(_lines(path)))
    except ValueError as error:
        if "Extra data" in str(error):  # a first value, and more
            return read_jsonl(path, lists=lists)
        raise ValueError(f"{path}: not valid JSON ({error}); mend the file") from None
    rows = whole if isinstance(whole, list) else [whole]
    return [_columns(path, number, row, lists) for number, row in enumerate(rows, 1)]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """In small batches: Arrow cannot hold many rows of thousands of texts each in one table."""
    import pyarrow.parquet as parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except Exception as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error})") from None


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One object per line; the file is there whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def require_file(path: Path) -> None:
    """FileNotFoundError naming `path` unless there is a file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no data file at {path}; check the path (relative to the working directory)"
        )


def read_rows(path: Path, *, lists: bool = False) -> list[dict[str, Any]]:
    """Rows of a data file; FileNotFoundError or ValueError naming the file."""
    return list(each_row(path, lists=lists))


def each_row(path: Path, *, lists: bool = False) -> Iterator[dict[str, Any]]:
    """Row after row, as `read_rows` gives them."""
    require_file(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix == ".jsonl":
        rows = _each_line(path, lists)
    elif suffix == ".json":
        rows = iter(_json_rows(path, lists))
    else:
        raise ValueError(f"{path}: data files end in .jsonl or .parquet (or .json, or .jsonl.gz)")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} is empty; it must hold at least one row")


def text_column(path: Path, row: dict[str, Any], number: int, column: str) -> str:
    """`row[column]`, which must be text with something in it."""
    if column not in row:
        raise ValueError(
            f"{path}, line {number}: no column {column!r}; it has {', '.join(row) or 'none'}"
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{path}, line {number}: column {column!r} must be text that is not empty, not "
            f"{value!r}"
        )
    return value


@dataclass(kw_only=True)
class Local:
    """Files of the user; only `prompts` must be given."""

    prompts: str  # file of prompts to train on
    prompt_column: str = "prompt"
    # file of prompts to evaluate on; null keeps `held_out_share` of `prompts` for that
    held_out: str | None = None
    held_out_share: float = 0.1
    demonstrations: str | None = None  # file with prompt and completion, for the sft stage
    completion_column: str = "completion"
    # file with prompt, chosen and rejected, for labeller=dataset; a column probability, from 0.5 to
    # 1, says how sure it is that chosen is better
    preferences: str | None = None
    held_out_preferences: str | None = None  # null keeps `held_out_share` of `preferences`
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    answer_column: str | None = None  # of the prompt files: the right completion, for gold=answers
    # file of labelled statements for reward=probe, with a label and what its templates speak of,
    # such as prompt and completion
    statements: str | None = None
    held_out_statements: str | None = None  # null keeps `held_out_share` of `statements`
    label_column: str = "label"  # which answer of the template is right, from 0
    templates: str | None = None  # a set of templates or a YAML file
    seed: int = 0  # draws the held-out split

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"data.held_out_share={self.held_out_share} must be between 0 and 1")

    def identity(self) -> dict:
        """Hashes of the files by role, so that an edited file is another data set."""
        roles = (
            "prompts",
            "held_out",
            "demonstrations",
            "preferences",
            "held_out_preferences",
            "statements",
            "held_out_statements",
        )
        named = {role: getattr(self, role) for role in roles}
        found = {role: Path(name).expanduser() for role, name in named.items() if name is not None}
        for path in found.values():
            require_file(path)
        return {role: file_hash(path) for role, path in found.items()}

    def load(self) -> Dataset:
        prompts = self._read(self.prompts, self._prompt)
        if self.held_out is not None:
            held_out = self._read(self.held_out, self._prompt)
        else:
            random.Random(self.seed).shuffle(prompts)
            cut = max(1, round(self.held_out_share * len(prompts)))
            held_out, prompts = prompts[:cut], prompts[cut:]
        if not prompts:
            raise ValueError(
                f"{self.prompts} has too few rows to keep some for evaluation: add rows or give "
                "data.held_out"
            )
        if shared := set(prompts) & set(held_out):
            raise ValueError(
                f"{len(shared)} prompts are both trained on and held out, for example "
                f"{min(shared)[:60]!r}: remove the repeated rows"
            )
        statements = self._read(self.statements, self._statement)
        held_out_statements = self._read(self.held_out_statements, self._statement)
        if self.held_out_statements is None:
            statements, held_out_statements = self._divided(statements)
        stated = {subject(s.fields) for s in statements}
        if shared := stated & {subject(s.fields) for s in held_out_statements}:
            raise ValueError(
                f"{len(shared)} prompts have statements both to fit on and held out, for example "
                f"{min(shared)[:60]!r}: remove them from one of the files"
            )
        if shared := stated & set(prompts):
            logger.info("%d prompts are trained on and have statements to fit on", len(shared))
        answers: dict[str, str] = {}
        if self.answer_column is not None:
            for name in (self.prompts, self.held_out):
                answers |= dict(self._read(name, self._answer))
        pairs = self._read(self.preferences, self._pair)
        held_out_pairs = self._read(self.held_out_preferences, self._pair)
        if self.held_out_preferences is None and pairs:
            cut = min(len(pairs) - 1, max(2, round(self.held_out_share * len(pairs))))
            held_out_pairs, pairs = pairs[:cut], pairs[cut:]
        return Dataset(
            prompts=prompts,
            held_out=held_out,
            demonstrations=self._read(self.demonstrations, self._demonstration),
            pairs=pairs,
            held_out_pairs=held_out_pairs,
            statements=statements,
            held_out_statements=held_out_statements,
            templates=self.templates,
            answers=answers,
        )

    def _read(
        self, name: str | None, parse: Callable[[Path, dict[str, Any], int], Row]
    ) -> list[Row]:
        if name is None:
            return []
        path = Path(name).expanduser()
        return [parse(path, row, number) for number, row in enumerate(read_rows(path), 1)]

    def _prompt(self, path: Path, row: dict[str, Any], number: int) -> str:
        return text_column(path, row, number, self.prompt_column)

    def _divided(self, statements: list[Statement]) -> tuple[list[Statement], list[Statement]]:
        """A share held out, by prompt, so that all statements about one prompt stay together."""
        subjects = list(dict.fromkeys(subject(s.fields) for s in statements))
        random.Random(self.seed).shuffle(subjects)
        part = set(subjects[: max(1, round(self.held_out_share * len(subjects)))])
        held = [s for s in statements if subject(s.fields) in part]
        return [s for s in statements if subject(s.fields) not in part], held

    def _answer(self, path: Path, row: dict[str, Any], number: int) -> tuple[str, str]:
        assert self.answer_column is not None
        answer = text_column(path, row, number, self.answer_column)
        return self._prompt(path, row, number), answer

    def _statement(self, path: Path, row: dict[str, Any], number: int) -> Statement:
        label = row.get(self.label_column)
        if not isinstance(label, int) or label < 0:
            raise ValueError(
                f"{path}, line {number}: column {self.label_column!r} must be the index of the "
                f"right answer (0, 1, ...), not {label!r}"
            )
        for column in ("prompt", "completion"):
            if column in row and not isinstance(row[column], str):
                raise ValueError(
                    f"{path}, line {number}: column {column!r} must be text, not {row[column]!r}"
                )
        return Statement({k: v for k, v in row.items() if k != self.label_column}, int(label))

    def _demonstration(self, path: Path, row: dict[str, Any], number: int) -> Demonstration:
        return Demonstration(
            self._prompt(path, row, number), text_column(path, row, number, self.completion_column)
        )

    def _pair(self, path: Path, row: dict[str, Any], number: int) -> Pair:
        chosen = text_column(path, row, number, self.chosen_column)
        rejected = text_column(path, row, number, self.rejected_column)
        if chosen == rejected:
            raise ValueError(
                f"{path}, line {number}: chosen and rejected are equal, so the pair says nothing; "
                "remove it"
            )
        sure = row.get("probability")
        sure = 1.0 if sure is None else sure
        if not isinstance(sure, int | float) or not 0.5 <= sure <= 1:
            raise ValueError(
                f"{path}, line {number}: column 'probability' says how sure it is that chosen is "
                f"better, so it must be between 0.5 and 1, not {sure!r}"
            )
        return Pair(self._prompt(path, row, number), chosen, rejected, float(sure))
