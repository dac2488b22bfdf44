"""The stage `prepare`: a data set's splits as files that data=local reads, with a manifest.

manifest.json has rows and SHA-256 of every file, the rows dropped by role and reason, what was
asked for (seeds included), and the command that reads the files.
"""

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_exp import __version__
from rlhf_exp.artifacts import file_hash, verify, write_directory, write_json
from rlhf_exp.choices import pick, require
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset, Pair, Statement

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(kw_only=True)
class Prepare:
    """Where the files go, and in what form."""

    folder: str | None = None  # null: <run directory>/data
    format: str = "jsonl"  # or parquet
    push: str | None = None  # also to this data set on the hub (owner/name)
    private: bool = True  # if it is new there

    def __post_init__(self) -> None:
        require(self.format, WRITERS, "prepare.format")
        if self.push is not None and self.push.count("/") != 1:
            raise ValueError(
                f"prepare.push={self.push} must be owner/name of a data set on the hub"
            )

    def write(self, data: Dataset, spec: dict[str, Any], directory: Path) -> None:
        """Make the folder, whole or not at all, unless it was made of the same data before."""
        token = self._token()
        folder = Path(self.folder).expanduser() if self.folder else directory / "data"
        asked = json.loads(
            json.dumps({"data": spec, "format": self.format, "version": __version__})
        )
        if folder.exists():
            self._require_same(folder, asked)
        else:
            write_directory(folder, lambda f: self._fill(f, data, asked), {"kind": "data"})
        logger.info("prepared data: %s (%s says how to read it)", folder, MANIFEST)
        if self.push is not None:
            self._push(folder, token)

    def _fill(self, folder: Path, data: Dataset, asked: dict[str, Any]) -> None:
        files: dict[str, dict[str, Any]] = {}
        for role, rows in columns(data).items():
            if rows:
                file = folder / f"{role}.{self.format}"
                pick(self.format, WRITERS, "prepare.format")(file, rows)
                files[role] = {"file": file.name, "rows": len(rows), "sha256": file_hash(file)}
        about = {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": asked["data"]["config"].get("seed"),
            "files": files,
            "dropped": data.dropped,
            "read": command(files, data),
        }
        write_json(folder / MANIFEST, about | asked)
        (folder / "README.md").write_text(card(files))

    def _require_same(self, folder: Path, asked: dict[str, Any]) -> None:
        if (folder / MANIFEST).exists():
            verify(folder)
            found = json.loads((folder / MANIFEST).read_text())
            if {key: found.get(key) for key in asked} == asked:
                return
        raise ValueError(
            f"{folder} exists and holds something else: choose another prepare.folder, or delete it"
        )

    def _token(self) -> str | None:
        """The hub's, needed before anything is written; ValueError if there is none."""
        if self.push is None:
            return None
        from huggingface_hub import get_token

        if (token := get_token()) is None:
            raise ValueError(
                f"prepare.push={self.push} needs a token of the hub: set HF_TOKEN, or log in with "
                "`hf auth login`"
            )
        return token

    def _push(self, folder: Path, token: str | None) -> None:
        from huggingface_hub import HfApi

        assert self.push is not None
        api = HfApi(token=token)
        try:
            api.create_repo(self.push, repo_type="dataset", private=self.private, exist_ok=True)
            api.upload_folder(repo_id=self.push, folder_path=folder, repo_type="dataset")
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            raise ValueError(
                f"prepare.push={self.push} failed ({why}), but the files are in {folder}: check "
                "the name, the token's rights and the network"
            ) from None
        logger.info("pushed to %s", self.push)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """One column per key of any row."""
    import pyarrow
    import pyarrow.parquet as parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in names}
    parquet.write_table(pyarrow.table(table), path)


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def columns(data: Dataset) -> dict[str, list[dict[str, Any]]]:
    """The rows of each role, in the columns that data=local reads."""
    return {
        "prompts": [_prompt(p, data.answers) for p in data.prompts],
        "held_out": [_prompt(p, data.answers) for p in data.held_out],
        "demonstrations": [vars(d) for d in data.demonstrations],
        "preferences": [_pair(p) for p in data.pairs],
        "held_out_preferences": [_pair(p) for p in data.held_out_pairs],
        "statements": [_statement(s) for s in data.statements],
        "held_out_statements": [_statement(s) for s in data.held_out_statements],
    }


def _prompt(prompt: str, answers: dict[str, str]) -> dict[str, str]:
    return {"prompt": prompt} | ({"answer": answers[prompt]} if answers else {})


def _pair(pair: Pair) -> dict[str, Any]:
    """A certain label says so by saying nothing."""
    return {k: v for k, v in vars(pair).items() if (k, v) != ("probability", 1.0)}


def _statement(statement: Statement) -> dict[str, Any]:
    return statement.fields | {"label": statement.label}


def command(files: dict[str, dict[str, Any]], data: Dataset) -> str:
    """What reads the files again, in their folder."""
    words = [f"data.{role}={about['file']}" for role, about in files.items()]
    if data.answers:
        words.append("data.answer_column=answer")
    if data.templates is not None:
        words.append(f"data.templates={data.templates}")
    return " ".join(["python -m rlhf_exp data=local", *words])


def card(files: dict[str, dict[str, Any]]) -> str:
    """The card of the data set on the hub: each role is a configuration."""
    lines = ["---", "configs:"]
    for role, about in files.items():
        lines += [f"- config_name: {role}", f"  data_files: {about['file']}"]
    counts = [f"- `{about['file']}`: {about['rows']} rows" for about in files.values()]
    told = "Prepared by rlhf_exp; manifest.json says from what, and what was dropped."
    return "\n".join([*lines, "---", "", told, "", *counts, ""])
