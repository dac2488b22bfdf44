"""Where rows lie: on the hub, in a folder, in a file.

With `files` the hub's files are fetched once and read like local ones. That serves repositories
whose loading script the library datasets refuses, names file and line of a bad row, and never puts
12,600 answers a row into one Arrow table, whose offsets would overflow. Without `files`, datasets
finds configuration and split.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_exp.artifacts import file_hash
from rlhf_exp.data.local import each_row


class Row(NamedTuple):
    """What a row holds, and where it stands."""

    file: Path  # or the hub's id
    number: int  # from 1
    values: dict[str, Any]

    def bad(self, what: str) -> ValueError:
        """The error that says where."""
        return ValueError(f"{self.file}, line {self.number}: {what}")

    def at(self, column: str) -> Any:
        """The value of a column; `prompt.text` and `answers.0` lead into what it holds."""
        value: Any = self.values
        try:
            for step in [column] if column in value else column.split("."):
                value = value[int(step) if isinstance(value, list) else step]
        except (KeyError, IndexError, TypeError, ValueError):
            names = ", ".join(self.values) or "none"
            raise self.bad(f"no column {column!r}; it has {names}") from None
        return value

    def has(self, column: str) -> bool:
        """Whether `at` finds something."""
        try:
            self.at(column)
        except ValueError:
            return False
        return True

    def text(self, column: str) -> str:
        """The text of a column, empty where there is none."""
        value = self.at(column)
        if value is not None and not isinstance(value, str):
            raise self.bad(f"column {column!r} must be text, not {value!r}"[:200])
        return value or ""


class Place(NamedTuple):
    """All that decides the rows of a source."""

    path: str
    config: str | None
    split: str
    files: str | None
    revision: str | None
    streaming: bool
    answers: int | None

    def local(self) -> list[Path] | None:
        """The files on this machine, or None if the hub is meant; FileNotFoundError if it cannot
        be.
        """
        here = Path(self.path).expanduser()
        if here.is_file():
            return [here]
        if here.is_dir():
            return self._matching(here)
        if self.path.startswith((".", "/", "~")) or self.path.count("/") != 1:
            raise FileNotFoundError(
                f"there is no data at {self.path}: give a hub id (owner/name), a folder or a file"
            )
        return None

    def _matching(self, folder: Path) -> list[Path]:
        pattern = self.files or f"{self.split}*"
        if found := sorted(f for f in folder.glob(pattern) if f.is_file()):
            return found
        raise FileNotFoundError(
            f"{self.path} holds no {pattern}: put the file there, or name the files that are there "
            "with `files` or `split` of the source"
        )

    def identity(self) -> dict[str, Any]:
        """Hashes of the files; of the hub, what names the rows there."""
        files = self.local()
        if files is None:
            names = ("path", "config", "split", "files", "revision")
            return {name: getattr(self, name) for name in names}
        base = Path(self.path).expanduser()
        return {str(f.relative_to(base)) if f != base else f.name: file_hash(f) for f in files}

    def rows(self) -> Iterator[Row]:
        """All of them, lists cut to `answers` entries."""
        files = self.local()
        found = self._from_hub() if files is None else _from_files(files)
        for row in found:
            if self.answers is not None:
                cut = {
                    k: v[: self.answers] if isinstance(v, list) else v
                    for k, v in row.values.items()
                }
                row = row._replace(values=cut)
            yield row

    def _from_hub(self) -> Iterator[Row]:
        try:
            self._require_reachable()
            found = self._loaded() if self.files is None else self._fetched()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            raise FileNotFoundError(
                f"the data set {self.path} is neither a local folder nor to be had from the hub "
                f"({why}): check the name and the network, or give data.path"
            ) from None
        if isinstance(found, Path):
            return _from_files(self._matching(found))
        return (Row(Path(self.path), n, dict(values)) for n, values in enumerate(found, 1))

    def _loaded(self) -> Any:
        import datasets

        return datasets.load_dataset(
            self.path,
            self.config,
            split=self.split,
            revision=self.revision,
            streaming=self.streaming,
        )

    def _fetched(self) -> Path:
        from huggingface_hub import snapshot_download

        wanted = [self.files, ".gitattributes"]
        return Path(
            snapshot_download(
                self.path, repo_type="dataset", revision=self.revision, allow_patterns=wanted
            )
        )

    def _require_reachable(self) -> None:
        """One request without the library's retries, which take half a minute, unless a file that
        every repository has is in the cache.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        file = "README.md" if self.files is None else ".gitattributes"
        where: Any = {"repo_type": "dataset", "revision": self.revision}
        if isinstance(try_to_load_from_cache(self.path, file, **where), str):
            return
        with suppress(EntryNotFoundError):  # which is an answer, too
            get_hf_file_metadata(hf_hub_url(self.path, file, **where), timeout=5)


def _from_files(files: list[Path]) -> Iterator[Row]:
    for file in files:
        for number, values in enumerate(each_row(file, lists=True), 1):
            yield Row(file, number, values)
