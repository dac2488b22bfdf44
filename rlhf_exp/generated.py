"""Completions of prompts, many of each: what is known of them, how they are drawn and scored, and
how files of them are read, ours and those of published systems.

Prompts are drawn in blocks of as many as make `policy.sample_batch` completions (one prompt at
least), counted from the first prompt of all; block after block the generator is seeded with the
seed and the index of the block's first prompt. So rows depend neither on shards nor on
interruptions: whoever begins inside a block draws it whole and keeps its part.

Left out: sampling on a server of its own (vLLM); what it writes can be read.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.data.local import each_row, text_column
from rlhf_exp.policy import Policy
from rlhf_exp.rewards import Scores, score


@dataclass(kw_only=True)
class Generated:
    """A prompt and its completions; each list has one entry per completion, None is not known."""

    index: int  # of the prompt in the pool
    prompt: str
    generations: list[str]
    rewards: list[float] | None = None  # what the policy is or would be trained on
    gold_scores: list[float] | None = None
    members: dict[str, list[float]] | None = None  # what each member of the reward said
    facets: dict[str, list[float]] | None = None  # what else the reward tells
    lengths: list[int] | None = None  # tokens, the end-of-text token included
    ended: list[bool] | None = None  # there is an end-of-text token
    feedbacks: list[Any] | None = None  # ALT: what was said of each
    scores: list[Any] | None = None  # ALT: the score that came with the feedback

    def cut(self, count: int | None) -> None:
        """Keep the first `count` completions; null: all."""
        for owner in (vars(self), self.members or {}, self.facets or {}):
            owner |= {k: v[:count] for k, v in owner.items() if isinstance(v, list)}

    def line(self) -> str:
        """The row as a line of JSON, without what is not known."""
        known = {k: v for k, v in asdict(self).items() if v is not None}
        return json.dumps(known, ensure_ascii=False) + "\n"


# ---- reading

NUMBERS = ("rewards", "gold_scores")  # finite, unlike what a judge may have failed to give
LISTS = (*NUMBERS, "lengths", "ended", "feedbacks", "scores")
# Names in the files of tlc4418/llm_optimization, and ours.
ALIASES = {"answers": "generations", "proxy_scores": "rewards"}


def read_generations(path: Path) -> list[Generated]:
    """The rows of a pool; see `each_generated`."""
    return list(each_generated(path))


def each_generated(path: Path) -> Iterator[Generated]:
    """Row after row of a .jsonl, .json (lines or one list) or .parquet file: ours, ALT's {prompt,
    generations, rewards} or llm_optimization's {instruction, input, answers, gold_scores}.

    ValueError or FileNotFoundError naming file and line.
    """
    for number, row in enumerate(each_row(path), 1):
        yield _parsed(path, row, number)


def _parsed(path: Path, row: dict[str, Any], number: int) -> Generated:
    where = f"{path}, line {number}"
    row = {ALIASES.get(k, k): v for k, v in row.items()}
    if "prompt" in row or "instruction" not in row:
        prompt = text_column(path, row, number, "prompt")
    else:
        prompt = text_column(path, row, number, "instruction")
        prompt += f"\n{row['input']}" if row.get("input") else ""
    texts = row.get("generations")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{where}: 'generations' (or 'answers') must be a list of texts")
    found: dict[str, Any] = {name: row[name] for name in LISTS if row.get(name) is not None}
    for name, values in found.items():
        _check_list(f"{where}: {name!r}", values, len(texts), numeric=name in NUMBERS)
    for name in ("members", "facets"):
        if more := row.get(name):
            found[name] = dict(more)
            for member, values in found[name].items():
                _check_list(f"{where}: {name} {member!r}", values, len(texts), numeric=True)
    return Generated(index=row.get("index", number - 1), prompt=prompt, generations=texts, **found)


def _check_list(what: str, values: Any, count: int, *, numeric: bool) -> None:
    """ValueError unless there is one entry per completion, all finite numbers if `numeric`."""
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} entries" if isinstance(values, list) else repr(values)[:40]
        raise ValueError(f"{what} must have one entry for each of {count} generations, not {got}")
    for i, value in enumerate(values if numeric else ()):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(
                f"{what} holds {value!r} for generation {i}, and scores must be finite numbers: "
                "score it again or remove it"
            )


# ---- drawing and scoring


def block_size(samples: int, batch: int) -> int:
    """Prompts of a block: `batch` completions at most, or one prompt."""
    return max(1, batch // samples)


def blocks(total: int, size: int, wanted: range) -> Iterator[tuple[range, range]]:
    """The blocks of `total` prompts that hold `wanted` ones, and which of theirs those are."""
    for start in range(wanted.start // size * size, wanted.stop if wanted else 0, size):
        block = range(start, min(start + size, total))
        yield block, range(max(start, wanted.start), min(block.stop, wanted.stop))


def draw(
    policy: Policy, prompts: list[str], first: int, samples: int, seed: int
) -> list[Generated]:
    """`samples` completions of each of the prompts `first`, `first` + 1, ...; the same ones
    whenever policy, prompts and numbers are the same.
    """
    with torch.random.fork_rng():
        torch.manual_seed(random.Random(f"{seed}/{first}").getrandbits(63))
        rollouts = policy.sample(prompts, samples)
    lengths, ended = rollouts.response.sum(1).int().tolist(), rollouts.ended.tolist()
    columns = zip(
        prompts,
        *(_cut(c, [samples] * len(prompts)) for c in (rollouts.completions, lengths, ended)),
        strict=True,
    )
    return [
        Generated(index=i, prompt=prompt, generations=texts, lengths=lengths, ended=ended)
        for i, (prompt, texts, lengths, ended) in enumerate(columns, first)
    ]


def score_rewards(rows: list[Generated], reward: Any) -> None:
    """Fill in `rewards`, and `members` and `facets` where the reward has any."""
    found = score(reward, *_flat(rows))
    sizes = [len(row.generations) for row in rows]
    for row, rewards in zip(rows, _cut(found.objective.tolist(), sizes), strict=True):
        row.rewards = rewards
    for name, more in (("members", found.members), ("facets", found.facets)):
        pieces = {k: _cut(v.tolist(), sizes) for k, v in more.items()}
        for i, row in enumerate(rows):
            setattr(row, name, {k: v[i] for k, v in pieces.items()} or None)


def score_gold(rows: list[Generated], gold: Any, asked: Callable[..., Scores] = score) -> None:
    """Fill in `gold_scores`; `asked` as `rewards.ask` where one process of several does it."""
    found = asked(gold, *_flat(rows), "gold").objective.tolist()
    for row, scores in zip(rows, _cut(found, [len(r.generations) for r in rows]), strict=True):
        row.gold_scores = scores


def _flat(rows: list[Generated]) -> tuple[list[str], list[str]]:
    prompts = [row.prompt for row in rows for _ in row.generations]
    return prompts, [text for row in rows for text in row.generations]


def _cut(values: list[Any], sizes: list[int]) -> list[list[Any]]:
    rest = iter(values)
    return [list(islice(rest, size)) for size in sizes]
