"""Pools of completions as files: drawn in shards that a kill cannot spoil, merged when complete.

A pool is JSON lines, a prompt with all its completions on each, beside a manifest that says what
decided them (policy, sampling, prompts, seed) and, once finished, the SHA-256 of the file.
generated.py has the rows.
"""

import json
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from rlhf_exp import processes
from rlhf_exp.artifacts import file_hash, fingerprint, write_json
from rlhf_exp.choices import require
from rlhf_exp.data.rows import Dataset
from rlhf_exp.generated import (
    Generated,
    block_size,
    blocks,
    draw,
    each_generated,
    score_gold,
    score_rewards,
)
from rlhf_exp.policy import Policy
from rlhf_exp.rewards import ask

logger = logging.getLogger(__name__)


class PoolFile:
    """A file of rows in the order of their index, and its manifest; opened anew, it goes on where
    it was cut off, unless `spec` has changed. Of several processes, the main one reads and writes.
    """

    def __init__(self, path: Path, spec: dict[str, Any], **about: Any) -> None:
        self.path, self.note = path, manifest_of(path)
        self.manifest = {"fingerprint": fingerprint(spec), "spec": spec, **about}
        self.rows = processes.first(self._begun)

    def _begun(self) -> int:
        """Rows that are there already."""
        if self.path.exists():
            begun = read_manifest(self.path)
            _same(self.path, begun, self.manifest, "this run")
            self.manifest |= begun
        else:
            write_json(self.note, self.manifest)
        return _whole_lines(self.path)

    @property
    def finished(self) -> bool:
        return "sha256" in self.manifest

    def append(self, rows: list[Generated]) -> None:
        """Add rows, on the disk before this returns."""
        self.rows += len(rows)
        if not processes.main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(row.line() for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Seal the file."""
        processes.first(self._seal)

    def _seal(self) -> None:
        self.path.touch()
        self.manifest |= {"rows": self.rows, "sha256": file_hash(self.path)}
        write_json(self.note, self.manifest)


def judge(path: Path, gold: Callable[[], Any]) -> None:
    """Have the gold score the completions of a pool that have no gold scores, if there are any; by
    this process alone.
    """
    if all(row.gold_scores is not None for row in each_generated(path)):
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for row in each_generated(path):
            if row.gold_scores is None:
                score_gold([row], gold(), ask)
            file.write(row.line())
    temporary.replace(path)
    write_json(manifest_of(path), read_manifest(path) | {"sha256": file_hash(path)})


def manifest_of(path: Path) -> Path:
    """Where the manifest of the pool at `path` is."""
    return path.with_suffix(".manifest.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the pool at `path`; ValueError if there is none that can be read."""
    try:
        found = json.loads(manifest_of(path).read_text())
        assert isinstance(found["spec"], dict)
        assert isinstance(found["fingerprint"], str)
        return found
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(
            f"{path} has no readable manifest {manifest_of(path).name}: delete both and draw the "
            "shard again"
        ) from None


def _same(path: Path, one: dict[str, Any], other: dict[str, Any], whose: Any) -> None:
    """ValueError unless the pool at `path` was drawn with the settings of the other."""
    if one["fingerprint"] == other["fingerprint"]:
        return
    keys = sorted({*one["spec"], *other["spec"]})
    odd = [k for k in keys if one["spec"].get(k) != other["spec"].get(k)]
    raise ValueError(
        f"{path} was drawn with other settings than {whose} ({', '.join(odd)} differ): keep them "
        "apart with generations.folder, or delete the file and its manifest"
    )


def _whole_lines(path: Path) -> int:
    """Drop the last line if a kill cut it short; the number of lines left."""
    if not path.exists():
        return 0
    count = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


# ---- the stages


@dataclass(kw_only=True)
class Generations:
    """What is sampled, and which part of it."""

    folder: str | None = None  # null: <run directory>/generations
    split: str = "train"  # train or held_out
    # draw this many prompts of the split with replacement; null: each of them once
    prompts: int | None = None
    samples: int = 8  # completions per prompt
    seed: int = 0  # draws prompts and completions
    shard: str = "0/1"  # which part, and of how many
    scored: bool = True  # by reward and gold

    def __post_init__(self) -> None:
        require(self.split, ("train", "held_out"), "generations.split")
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        self.number, self.total = map(int, found.groups()) if found else (0, 0)
        if not self.number < self.total:
            raise ValueError(
                f"generations.shard={self.shard} must be <i>/<n> with i from 0 to n - 1, such as "
                "0/4"
            )
        if self.samples < 1 or (self.prompts is not None and self.prompts < 1):
            raise ValueError(
                f"generations.samples={self.samples} and generations.prompts={self.prompts} must "
                "be at least 1"
            )

    def generate(
        self,
        policy: Policy,
        data: Dataset,
        reward: Any,
        gold: Any,
        spec: dict[str, Any],
        directory: Path,
    ) -> None:
        """Draw this shard's completions, and score them if asked to; `spec` says what decides them
        beside these settings.
        """
        prompts = self._prompts(data)
        own = {k: getattr(self, k) for k in ("split", "samples", "seed", "scored")}
        own |= {"prompts": fingerprint(prompts), "count": len(prompts)}
        own |= {"sample_batch": policy.sample_batch}
        path = self._shard(directory, self.number, self.total)
        with _alone(path):
            pool = PoolFile(path, spec | own, shard=self.shard)
            if pool.finished:
                logger.info("%s is complete", path)
                return
            part = _part(len(prompts), self.number, self.total)
            size = block_size(self.samples, policy.sample_batch)
            left = range(part.start + pool.rows, part.stop)
            with _progress(len(part), pool.rows) as bar:
                for block, kept in blocks(len(prompts), size, left):
                    asked = [prompts[i] for i in block]
                    rows = draw(policy, asked, block.start, self.samples, self.seed)
                    if self.scored:
                        score_rewards(rows, reward)
                        score_gold(rows, gold)
                    pool.append([row for row in rows if row.index in kept])
                    bar.update(len(kept))
            pool.finish()

    def _prompts(self, data: Dataset) -> list[str]:
        prompts = data.prompts if self.split == "train" else data.held_out
        if self.prompts is None:
            return prompts
        return random.Random(f"{self.seed}/prompts").choices(prompts, k=self.prompts)

    def _folder(self, directory: Path) -> Path:
        return Path(self.folder).expanduser() if self.folder else directory / "generations"

    def _shard(self, directory: Path, number: int, total: int) -> Path:
        return self._folder(directory) / f"{self.split}_output_{number}_of_{total}.jsonl"

    def merge(self, directory: Path) -> None:
        """Join all shards in order; refuse unless every one is there, finished, unchanged and drawn
        with the same settings.
        """
        shards = self._shards(self._folder(directory))
        manifests = [_sealed(path, f"{i}/{len(shards)}") for i, path in enumerate(shards)]
        for path, manifest in zip(shards, manifests, strict=True):
            _same(path, manifest, manifests[0], shards[0])
        path = self._folder(directory) / f"{self.split}_output.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            rows = _joined(shards, temporary)
            if rows != manifests[0]["spec"]["count"]:
                raise ValueError(
                    f"{shards[-1]} ends with row {rows} of {manifests[0]['spec']['count']}: draw "
                    "it again"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        about = {k: manifests[0][k] for k in ("fingerprint", "spec")}
        parts = {shard.name: m["sha256"] for shard, m in zip(shards, manifests, strict=True)}
        about |= {"rows": rows, "sha256": file_hash(path), "shards": parts}
        write_json(manifest_of(path), about)
        logger.info("%s: %d rows from %d shards", path, rows, len(shards))

    def _shards(self, folder: Path) -> list[Path]:
        """The files of all shards, in order."""
        names = {
            path: re.fullmatch(rf"{self.split}_output_(\d+)_of_(\d+)", path.stem)
            for path in sorted(folder.glob(f"{self.split}_output_*_of_*.jsonl"))
        }
        totals = {int(name[2]): path for path, name in names.items() if name}
        if not totals:
            raise FileNotFoundError(
                f"{folder} holds no {self.split}_output_<i>_of_<n>.jsonl to merge: draw them with "
                "stages=[generate], or give generations.folder and generations.split"
            )
        if len(totals) > 1:
            (one, path), (two, other), *_ = totals.items()
            raise ValueError(
                f"{path} is one of {one} shards and {other} one of {two}: keep the shards of one "
                "draw in a folder of their own"
            )
        total = next(iter(totals))
        shards = [folder / f"{self.split}_output_{i}_of_{total}.jsonl" for i in range(total)]
        for i, path in enumerate(shards):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: draw it with stages=[generate] generations.shard={i}/"
                    f"{total}"
                )
        return shards


def _progress(total: int, done: int) -> tqdm:
    """A bar that counts prompts."""
    quick = sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc="generate", unit="prompt", mininterval=0.2 if quick else 30
    )


def _part(count: int, number: int, total: int) -> range:
    """Rows of a shard: [number c, (number + 1) c), c = floor(count / total) + 1 (sauc-abadal/ALT);
    the last may have fewer, or none.
    """
    size = count // total + 1
    return range(min(number * size, count), min((number + 1) * size, count))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """ValueError if another process is writing `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{path} is being written by another process: give every process its own "
            "generations.shard"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _sealed(path: Path, shard: str) -> dict[str, Any]:
    """The manifest of a finished shard that holds what its name and its manifest say."""
    manifest = read_manifest(path)
    if "sha256" not in manifest:
        raise ValueError(
            f"{path} is unfinished: continue it with stages=[generate] generations.shard={shard} "
            "and the same settings"
        )
    if manifest.get("shard") != shard:
        raise ValueError(
            f"{path} holds shard {manifest.get('shard')} and is named as {shard}, so one of them "
            "is there twice: draw it again"
        )
    if file_hash(path) != manifest["sha256"]:
        raise ValueError(
            f"{path} was changed after it was finished (its SHA-256 is another than its manifest "
            "says): delete both and draw the shard again"
        )
    return manifest


def _joined(shards: list[Path], target: Path) -> int:
    """Write the lines of all shards to `target`, which must count up from 0; how many there are."""
    row = 0
    with target.open("wb") as out:
        for path in shards:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if json.loads(line)["index"] != row:
                        raise ValueError(
                            f"{path}, line {number}: expected the row of prompt {row}; draw the "
                            "shard again"
                        )
                    out.write(line)
                    row += 1
        out.flush()
        os.fsync(out.fileno())
    return row
