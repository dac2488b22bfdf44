"""Best-of-n: what the best of n answers under a proxy is worth, estimated from N >= n answers.

With the answers of a prompt sorted ascending by the proxy and f_(i) the worth of the i-th smallest,

    E_n[f] = sum_i w_i f_(i),   w_i = C(i - 1, n - 1) / C(N, n),

which is the average, over all C(N, n) subsets of n answers, of f at the subset's best (Nakano et
al. 2021, arXiv 2112.09332; used by Coste et al. 2023, arXiv 2310.02743). Answers of one proxy score
share the weight of their ranks evenly, so that no sort decides between them.

`Curves` applies it to a pool of scored completions: no model is asked.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from rlhf_exp import losses
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.generated import each_generated
from rlhf_exp.generations import manifest_of, read_manifest

# Table 4 of Coste et al. 2023, for N = 12,600.
NS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 12500)
CHUNK = 50  # prompts sorted at a time: what the estimate needs beside its input stays small


def kl_bon(n: int) -> float:
    """Nominal KL(best-of-n || policy) in nats: ln n - (n - 1) / n.

    An upper bound of the true KL (Beirami et al. 2024, arXiv 2401.01879); Stiennon et al. 2020
    (2009.01325) give it as the KL itself.
    """
    return math.log(n) - (n - 1) / n


def check_ns(ns: Sequence[int] | None, on_too_large: str) -> None:
    """ValueError unless `ns` are positive and rise (null: the default list)."""
    require(on_too_large, ("error", "skip"), "algo.on_too_large")
    if ns is not None and (not ns or ns[0] < 1 or any(a >= b for a, b in pairwise(ns))):
        raise ValueError(f"algo.ns={list(ns)} must be rising numbers from 1 on, such as [1,2,4]")


def usable(ns: Sequence[int] | None, size: int, on_too_large: str) -> list[int]:
    """The n that `size` answers can tell of: the default list up to there, or `ns`, of which those
    above `size` are skipped or a ValueError.
    """
    check_ns(ns, on_too_large)
    fitting = [n for n in ns or NS if n <= size]
    if ns is not None and fitting != list(ns) and (on_too_large == "error" or not fitting):
        raise ValueError(
            f"algo.ns={list(ns)} asks for the best of {ns[-1]} and every prompt has {size} "
            "answers: draw more (algo.samples), ask for less, or set algo.on_too_large=skip"
        )
    return fitting


def weights(size: int, ns: Sequence[int]) -> np.ndarray:
    """w of the i-th smallest of N = `size` answers, for each n: float64 [N, len(ns)].

    From the top down, w_N = n / N and w_i = w_(i+1) (i + 1 - n) / i: no factorial is ever formed.
    """
    n = np.asarray(ns)
    rank = np.arange(size - 1, 0, -1)[:, None]
    ratios = np.maximum(rank + 1 - n, 0) / rank
    return np.vstack([n[None] / size, ratios]).cumprod(0)[::-1]


def expected(
    proxy: np.ndarray, values: Mapping[str, np.ndarray], ns: Sequence[int]
) -> dict[str, np.ndarray]:
    """E_n of the proxy and of everything in `values` (all [P, N]) when the proxy picks: name ->
    float64 [P, len(ns)], the proxy's own under "proxy".
    """
    for name, scores in {"proxy": proxy, **values}.items():
        if scores.shape != proxy.shape:
            raise ValueError(f"{name} has the shape {scores.shape}, and proxy {proxy.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"{name} holds a score that is no finite number; mend or remove it")
    w = weights(proxy.shape[1], ns)
    found = {name: np.empty((len(proxy), len(ns))) for name in ("proxy", *values)}
    for start in range(0, len(proxy), CHUNK):
        rows = slice(start, start + CHUNK)
        order = proxy[rows].argsort(1)
        ranked = np.take_along_axis(proxy[rows], order, 1)
        found["proxy"][rows] = ranked @ w
        for name, scores in values.items():
            found[name][rows] = evened(np.take_along_axis(scores[rows], order, 1), ranked) @ w
    return found


def win_shares(gold: np.ndarray) -> np.ndarray:
    """Of each answer, the share of its prompt's other answers that it beats, ties counting half:
    what it wins against one draw from the policy. [P, N] -> [P, N], 0.5 where N is 1.
    """
    size = gold.shape[1]
    if size == 1:
        return np.full(gold.shape, 0.5)
    ranked = np.sort(gold, 1)
    below, upto = (
        np.stack([np.searchsorted(r, g, side) for r, g in zip(ranked, gold, strict=True)])
        for side in ("left", "right")
    )
    return (below + (upto - below - 1) / 2) / (size - 1)


def evened(values: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """`values` with each replaced by the mean over its ties; both [P, N], sorted by `ranked`."""
    first = np.ones(ranked.shape, bool)
    np.not_equal(ranked[:, 1:], ranked[:, :-1], out=first[:, 1:])
    if first.all():
        return values
    starts = np.flatnonzero(first)
    sizes = np.diff(starts, append=first.size)
    means = np.add.reduceat(values.ravel(), starts, dtype=float) / sizes
    return np.repeat(means, sizes).reshape(values.shape)


# ---- from a pool to files

RESULTS, SORTED = "bon_sampled_results.json", "proxy_labelled_sorted.json"
STATISTICS = "statistics.json"


@dataclass(kw_only=True)
class Curves:
    """Which n, and which rankings of the same answers."""

    ns: list[int] | None = None  # null: 1, 2, 4, ... 12500, as far as the answers go
    on_too_large: str = "error"  # an n above the number of answers: error or skip
    big_n: int | None = None  # use the first this many answers of each prompt; null: all
    # rankings by all members of an ensemble, beside each member's own
    objectives: list[str] = field(default_factory=lambda: ["mean", "wco", "uwo"])
    uwo_weights: list[float] = field(default_factory=lambda: [0.1, 0.5, 1.0])  # a ranking for each
    variance: str = "population"  # of uwo: population or unbiased
    sorted_answers: bool = True  # write all answers in the order of each ranking

    def __post_init__(self) -> None:
        check_ns(self.ns, self.on_too_large)
        for name in self.objectives:
            require(name, ("mean", "wco", "uwo"), "algo.objectives")
        require(self.variance, ("population", "unbiased"), "algo.variance")
        if len(set(self.uwo_weights)) < len(self.uwo_weights):
            raise ValueError(f"algo.uwo_weights={self.uwo_weights} holds a weight twice")
        if self.big_n is not None and self.big_n < 1:
            raise ValueError(f"algo.big_n={self.big_n} must be at least 1, or null for all answers")

    def write(self, pool: Path, folder: Path) -> None:
        """For each ranking a folder with bon_sampled_results.json, statistics.json and, if wanted,
        proxy_labelled_sorted.json.
        """
        scores, length = read_scores(pool, self.big_n), answer_length(pool, self.big_n)
        ns = usable(self.ns, scores["gold"].shape[1], self.on_too_large)
        for label, proxy in self.rankings(pool, scores):
            found = expected(proxy, {"gold": scores["gold"]}, ns)
            rows = zip(ns, *(found[k].mean(0).tolist() for k in ("proxy", "gold")), strict=True)
            results = [
                {"n": n, "proxy_score": p, "gold_score": g, "kl_bon": kl_bon(n)} for n, p, g in rows
            ]
            write_json(folder / label / RESULTS, results)
            moments = {
                name: {"mean": float(x.mean()), "std": float(x.std())}
                for name, x in (("proxy", proxy), ("gold", scores["gold"]))
            }
            size = {"prompts": len(proxy), "answers": proxy.shape[1], "answer_length": length}
            write_json(folder / label / STATISTICS, size | moments)
            if self.sorted_answers:
                write_sorted(pool, proxy, folder / label / SORTED)

    def rankings(
        self, pool: Path, scores: dict[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Name and proxy [P, N] of the reward, or of each member and each way to combine them."""
        about = read_manifest(pool) if manifest_of(pool).exists() else {}
        names = about.get("names", {})
        members = {
            names.get(k, k): scores[f"members/{k}"]
            for k in (key.removeprefix("members/") for key in scores if key.startswith("members/"))
        }
        if not about.get("ensemble", bool(members)):
            yield about.get("name", "reward"), scores["rewards"]
        yield from members.items()
        if not about.get("ensemble", bool(members)):
            return
        suffix = "-".join(members)
        if all(re.fullmatch(r"seed\d+", name) for name in members):
            suffix = "seeds" + suffix.replace("seed", "")
        for label, objective, weight in self._ensembles():
            proxy = combined(list(members.values()), objective, weight, self.variance)
            yield f"ensemble_{label}_{suffix}", proxy

    def _ensembles(self) -> Iterator[tuple[str, str, float]]:
        """Name, objective and weight."""
        for objective in self.objectives:
            if objective == "uwo":
                yield from ((f"UWO-{weight:g}", "uwo", weight) for weight in self.uwo_weights)
            else:
                yield {"mean": "mean", "wco": "WCO"}[objective], objective, 0.0


def combined(members: list[np.ndarray], objective: str, weight: float, variance: str) -> np.ndarray:
    """An ensemble's score of every answer from those of its members [P, N]; see losses.combine."""
    found = np.empty_like(members[0])
    for start in range(0, len(found), CHUNK):
        rows = slice(start, start + CHUNK)
        stacked = torch.from_numpy(np.stack([member[rows] for member in members]))
        found[rows] = losses.combine(stacked, objective, weight, variance).numpy()
    return found


def read_scores(pool: Path, big_n: int | None) -> dict[str, np.ndarray]:
    """rewards, gold, members/<name> and facets/<name> of the first `big_n` answers of every prompt
    (null: all) as float64 [P, N]; ValueError where there are fewer, or scores are missing.
    """
    columns: dict[str, list[np.ndarray]] = {}
    number = 0
    for number, row in enumerate(each_generated(pool), 1):
        found = {"rewards": row.rewards, "gold": row.gold_scores}
        found |= {f"members/{k}": v for k, v in (row.members or {}).items()}
        found |= {f"facets/{k}": v for k, v in (row.facets or {}).items()}
        if len(row.generations) < (big_n or 1):
            raise ValueError(
                f"{pool}, line {number}: {len(row.generations)} answers are fewer than "
                f"algo.big_n={big_n}: lower it"
            )
        for name, values in found.items():
            if values is None:
                raise ValueError(f"{pool}, line {number}: no {name} scores: score the pool first")
            columns.setdefault(name, []).append(np.array(values[:big_n], float))
    for name, column in columns.items():
        sizes = {len(values) for values in column}
        if len(column) < number:
            raise ValueError(f"{pool}: only {len(column)} of {number} rows have {name}")
        if len(sizes) > 1:
            raise ValueError(
                f"{pool}: prompts have between {min(sizes)} and {max(sizes)} answers: use as many "
                f"of each with algo.big_n={min(sizes)}"
            )
    return {name: np.stack(column) for name, column in columns.items()}


def answer_length(pool: Path, big_n: int | None) -> dict[str, float]:
    """Mean length of the first `big_n` answers of every prompt, in words and, where they were
    counted, in tokens.
    """
    words = [len(a.split()) for row in each_generated(pool) for a in row.generations[:big_n]]
    tokens = [n for row in each_generated(pool) for n in (row.lengths or [])[:big_n]]
    found = {"words": math.fsum(words) / len(words)}
    return found | ({"tokens": math.fsum(tokens) / len(tokens)} if tokens else {})


def write_sorted(pool: Path, proxy: np.ndarray, path: Path) -> None:
    """The rows of a pool, answers ascending by `proxy` [P, N], with the keys of
    tlc4418/llm_optimization.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for i, row in enumerate(each_generated(pool)):
            order = proxy[i].argsort(kind="stable")
            assert row.gold_scores is not None
            entry = {
                "instruction": row.prompt,
                "input": "",
                "answers": [row.generations[j] for j in order],
                "gold_scores": [row.gold_scores[j] for j in order],
                "proxy_scores": proxy[i][order].tolist(),
            }
            file.write((",\n" if i else "[\n") + json.dumps(entry, ensure_ascii=False))
        file.write("\n]\n")
    temporary.replace(path)
