"""Best-of-n: trains nothing, and asks what picking the best of n answers would have given.

N completions of every held-out prompt are drawn from the policy, with its prefix, or read from a
file; the reward scores them, then the gold; and E_n of both is estimated for many n at once. The
run's evaluation/step-<n>.json is the best of n, so that its table and figures go from n = 1 to the
largest n, over the nominal KL.

One step is a block of prompts. The pool on the disk is all there is to remember: no checkpoint
copies the weights, which do not change.

Left out: perplexity and exact KL of the answers, which the proxy and the nominal KL stand for.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from rlhf_exp import processes
from rlhf_exp.artifacts import file_hash, fingerprint
from rlhf_exp.data.rows import Dataset
from rlhf_exp.evaluation.best_of_n import (
    Curves,
    expected,
    kl_bon,
    read_scores,
    usable,
    win_shares,
)
from rlhf_exp.evaluation.scoring import correct, repetition, write_evaluation
from rlhf_exp.generated import (
    Generated,
    block_size,
    blocks,
    draw,
    each_generated,
    score_gold,
    score_rewards,
)
from rlhf_exp.generations import PoolFile, judge, read_manifest
from rlhf_exp.policy import Policy
from rlhf_exp.rewards.ensemble import Ensemble
from rlhf_exp.trial import Stopped, Trial

Take = Callable[[range], list[Generated]]


@dataclass(kw_only=True)
class BestOfN(Curves):
    """What is drawn, or read."""

    trains: ClassVar[bool] = False

    samples: int = 64  # N, completions per prompt
    prompts: int | None = None  # held-out prompts, or rows of `answers`; null: those of evaluation
    # a file of answers to rank in place of completions of the policy; gold scores in it are kept
    answers: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or (self.prompts is not None and self.prompts < 1):
            raise ValueError(
                f"algo.samples={self.samples} and algo.prompts={self.prompts} must be at least 1"
            )
        if self.answers is None:
            self._check_size(self.samples, "algo.samples")

    def check(self, policy: Policy, data: Dataset) -> None:
        """Any policy can be drawn from; a file must hold what is asked for."""
        if self.answers is None:
            return
        path, rated, widths = Path(self.answers).expanduser(), 0, []
        for number, row in enumerate(islice(each_generated(path), self.prompts), 1):
            widths.append(len(row.generations))
            self._check_size(widths[-1], f"{path}, line {number}")
            if self.big_n is None and widths[-1] != widths[0]:
                raise ValueError(
                    f"{path}, line {number}: {widths[-1]} answers, and line 1 has {widths[0]}: use "
                    f"as many of each with algo.big_n={min(widths)} or fewer"
                )
            rated += row.gold_scores is not None
            if rated not in (0, number):
                raise ValueError(
                    f"{path}, line {number}: some rows have gold_scores and some have none: give "
                    "them to all, or to none to have all scored by this run's gold"
                )
        self._check_count(len(widths), f"rows of {path}")
        self.count, self.width = len(widths), self.big_n or widths[0]

    def _check_size(self, size: int, where: str) -> None:
        if size < (self.big_n or 1):
            raise ValueError(f"algo.big_n={self.big_n} is more than the {size} answers of {where}")
        usable(self.ns, self.big_n or size, self.on_too_large)

    def _check_count(self, count: int, where: str) -> None:
        if count < (self.prompts or 1):
            raise ValueError(
                f"algo.prompts={self.prompts} is more than the {count} {where}: lower it"
            )

    # ---- drawing and scoring

    def run(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        """Fill the pool, estimate, and leave the policy as it is."""
        folder = trial.directory / "best_of_n"
        folder.mkdir(exist_ok=True)
        count, size, take, spec = self._source(policy, data, trial)
        pool = PoolFile(folder / "pool.jsonl", spec, **_names(reward))
        steps, step = math.ceil(count / size), pool.rows // size
        trial.log.begin(step, steps)
        for block, missing in blocks(count, size, range(pool.rows, count)):
            started = time.perf_counter()
            rows = take(block)
            drawn = time.perf_counter()
            score_rewards(rows, reward)
            gold = trial.evaluator.gold  # None: it is asked later
            if gold is not None and any(row.gold_scores is None for row in rows):
                score_gold(rows, gold)
            seconds = {"sample": drawn - started, "score": time.perf_counter() - drawn}
            trial.log_metrics(step, _metrics(rows, seconds))
            pool.append([row for row in rows if row.index in missing])
            step += 1
            if (stopped := trial.stopped()) and step < steps:
                raise Stopped(step, trial.directory, stopped)
        pool.finish()
        answers = trial.evaluator.answers
        if trial.evaluator.gold is not None:
            processes.first(lambda: self._estimate(policy, trial.directory, answers))

    def settle(
        self,
        gold: Callable[[], Any],
        policy: Policy,
        directory: Path,
        answers: Mapping[str, str],
    ) -> None:
        """Estimate from a finished run's pool what was not yet, as its gold was to be asked later;
        `gold` loads it.
        """
        if (directory / "best_of_n" / "curves.json").exists():  # which is written last
            return
        judge(directory / "best_of_n" / "pool.jsonl", gold)
        if not hasattr(policy, "tokenizer"):
            policy.open(directory / "policy")
        self._estimate(policy, directory, answers)

    def _estimate(self, policy: Policy, directory: Path, answers: Mapping[str, str]) -> None:
        """All that follows from the pool."""
        from rlhf_exp.report.best_of_n import report

        folder = directory / "best_of_n"
        self.write(folder / "pool.jsonl", folder)
        self._evaluate(folder / "pool.jsonl", policy, directory, answers)
        report([directory], folder)

    def _source(
        self, policy: Policy, data: Dataset, trial: Trial
    ) -> tuple[int, int, Take, dict[str, Any]]:
        """How many prompts, how many in a block, what gives their completions, and what decides
        those.
        """
        if self.answers is not None:
            return self._from_file(Path(self.answers).expanduser(), policy)
        prompts = trial.evaluator.prompts if self.prompts is None else data.held_out
        self._check_count(len(prompts), "held-out prompts of the data")
        prompts = prompts[: self.prompts]

        def take(block: range) -> list[Generated]:
            asked = [prompts[i] for i in block]
            return draw(policy, asked, block.start, self.samples, trial.seed)

        spec = {"prompts": fingerprint(prompts), "samples": self.samples, "seed": trial.seed}
        spec |= {"prefix": policy.prefix, "sample_batch": policy.sample_batch}
        spec |= {"processes": processes.count()}  # each draws from a generator of its own
        return len(prompts), block_size(self.samples, policy.sample_batch), take, spec

    def _from_file(self, path: Path, policy: Policy) -> tuple[int, int, Take, dict[str, Any]]:
        rows, position = each_generated(path), 0

        def take(block: range) -> list[Generated]:
            nonlocal position
            found = list(islice(rows, block.start - position, block.stop - position))
            position = block.stop
            for i, row in zip(block, found, strict=True):
                row.index = i
                row.cut(self.big_n)
            return found

        spec = {"answers": file_hash(path), "big_n": self.big_n, "prompts": self.count}
        return self.count, block_size(self.width, policy.sample_batch), take, spec

    # ---- the run's own table and figures

    def _evaluate(
        self, pool: Path, policy: Policy, directory: Path, answers: Mapping[str, str]
    ) -> None:
        """evaluation/step-<n>.json: E_n by prompt, and as text the best of the first n drawn."""
        scores = read_scores(pool, self.big_n)
        ns = usable(self.ns, scores["gold"].shape[1], self.on_too_large)
        ns = sorted({1, *ns})  # one draw is the start policy
        proxy = scores.pop("rewards")
        values = {
            k.replace("members/", "proxy/").replace("facets/", "facet/"): v
            for k, v in scores.items()
        }
        members = [v for k, v in values.items() if k.startswith("proxy/")]
        if members:
            values["variance"] = np.stack(members).var(0)
        values["win"] = win_shares(scores["gold"])
        values |= _of_texts(pool, answers, self.big_n)
        found = expected(proxy, values, ns)
        picks = np.stack([proxy[:, :n].argmax(1) for n in ns], 1)  # [P, len(ns)]
        lines = [f"{'n':>6} {'KL':>7} {'proxy':>8} {'gold':>8}   (KL nominal, in nats)"]
        for i, (n, texts) in enumerate(zip(ns, _picked(pool, picks, policy), strict=True)):
            columns = texts | {k: v[:, i].tolist() for k, v in found.items()}
            columns |= dict.fromkeys(("k1", "k3"), [kl_bon(n)] * len(picks))
            seed = read_manifest(pool)["spec"].get("seed", 0)
            means = write_evaluation(directory / "evaluation", n, columns, policy, seed)
            gains = f"{means['reward/proxy']:8.3f} {means['reward/gold']:8.3f}"
            lines.append(f"{n:6} {kl_bon(n):7.3f} {gains}")
        tqdm.write("\n" + "\n".join(lines))


def _of_texts(pool: Path, answers: Mapping[str, str], big_n: int | None) -> dict[str, np.ndarray]:
    """What the text alone tells of the pool's answers [P, N]: repetition, and where that is known
    whether they are right.
    """
    repeated, right = [], []
    for row in each_generated(pool):
        texts = row.generations[:big_n]
        repeated.append([repetition(text) for text in texts])
        right.append(correct(answers, [row.prompt] * len(texts), texts))
    found = {"repetition": np.array(repeated)}
    return found if None in right else found | {"correct": np.array(right, float)}


def _picked(pool: Path, picks: np.ndarray, policy: Policy) -> list[dict[str, list[Any]]]:
    """Columns of the answers `picks` [P, K] of every prompt, for each of K. What a file of answers
    does not say: tokens are counted, and answers count as ended.
    """
    found = [{k: [] for k in ("prompt", "completion", "length", "ended")} for _ in picks.T]
    for row, chosen in zip(each_generated(pool), picks.tolist(), strict=True):
        for columns, pick in zip(found, chosen, strict=True):
            text = row.generations[pick]
            length = row.lengths[pick] if row.lengths else len(policy.tokenizer(text).input_ids)
            ended = row.ended[pick] if row.ended else True
            values = (row.prompt, text, length, ended)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return found


def _names(reward: Any) -> dict[str, Any]:
    """How the rankings of a reward are called: by seed where members differ by nothing else."""
    if isinstance(reward, Ensemble):
        names = {k: k if reward.named else f"seed{m.seed}" for k, m in reward.members.items()}
        return {"ensemble": True, "names": names}
    seed = getattr(reward, "seed", None)
    return {"ensemble": False, "name": "reward" if seed is None else f"seed{seed}"}


def _metrics(rows: list[Generated], seconds: dict[str, float]) -> dict[str, float]:
    """Means over all completions of a block."""

    def mean(lists: list[Any]) -> float:
        values = [value for values in lists for value in values]
        return math.fsum(values) / len(values)

    found = {"reward/proxy": [r.rewards for r in rows]}
    if all(row.gold_scores for row in rows):
        found |= {"reward/gold": [r.gold_scores for r in rows]}
    if all(row.lengths and row.ended for row in rows):
        found |= {"length/mean": [r.lengths for r in rows], "length/ended": [r.ended for r in rows]}
    metrics = {name: mean(lists) for name, lists in found.items()}
    tokens = sum(sum(row.lengths or []) for row in rows)
    metrics["tokens_per_second"] = tokens / sum(seconds.values())
    return metrics | {f"time/{k}": v for k, v in seconds.items()}
