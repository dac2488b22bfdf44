"""What the runs of a study tell about over-optimization: proxy rises, gold rises, peaks and falls.

Of one run: start, final and peak gold, the gap between the last two, gold at equal KL. Of an arm:
the same over its seeds, and the fits of Gao et al. 2022 (arXiv 2210.10760).

What a careful reader should know. Peaks are picked on other prompts than those that measure them,
so that noise alone makes no gap; the gap of a run may then be negative. Gold is the gold model's
opinion of sampled completions, not a person's. The KL is the mean log ratio of sampled
completions, itself an estimate; that of best-of-n is nominal, an upper bound, so at equal KL
best-of-n looks worse than it is. Its rows are expected values, which win more often than single
completions do: no win rates are given against them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_exp.report.records import Record
from rlhf_exp.report.settings import SEED
from rlhf_exp.report.statistics import (
    RESAMPLES,
    Estimate,
    Scope,
    crossed_means,
    estimate,
    iqm_of_all,
    scope_of,
    share,
    stratified,
)
from rlhf_exp.runs import NO_MATTER

Measure = str | tuple[Literal["kl"], float]
Form = Literal["best-of-n", "training"]
BEST_OF_N = "best-of-n"
GAINS = {"gain": "gold", "proxy_gain": "proxy"}  # final - start of a column
WHOLE = ("text/", "toxicity/")  # metrics that are no means over the completions
BEGINS = 0.01  # nats up to which a run counts as begun at the start policy
SHARES = ("ended", "win", "correct", "repetition")  # columns between 0 and 1
LARGEST = 100  # alpha / beta beyond which a peak is not worth a name
UNUSED = (*NO_MATTER, "generations")


@dataclass(frozen=True, kw_only=True)
class Course:
    """How gold and proxy went in one run; means over its prompts."""

    start: float
    final: float
    peak: float  # gold at the step that the other half of the prompts picks
    gap: float  # peak - final
    share: float | None  # of the gain at the peak that was lost again; None if there was no gain
    peak_step: int  # where gold is highest on all prompts
    peak_kl: float  # nats, there
    kl: float  # nats, at the end
    proxy_change: float  # final - start
    gold_change: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A measure over the seeds of an arm."""

    mean: float
    low: float | None
    high: float | None
    iqm: Estimate
    seeds: int
    prompts: int | None  # None for what is measured of a run as a whole
    scope: Scope


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Gold over d = sqrt(KL) of an arm's runs: R(d) = d (alpha - beta d) for best-of-n, and
    d (alpha - beta ln d) for training (Gao et al. 2022, equations 1 and 2), R being gold - gold at
    the start.
    """

    form: Form
    alpha: Estimate
    beta: Estimate
    r2: float | None  # about the mean; negative where a constant would fit better
    peak: float | None  # the d at which R is highest, if beta > 0
    reached: float  # the largest d of the data; a peak beyond it is extrapolated
    points: int
    runs: int

    def __call__(self, d: np.ndarray) -> np.ndarray:
        """R at d > 0 (square root of nats)."""
        return d * (self.alpha.mean - self.beta.mean * (d if self.form == BEST_OF_N else np.log(d)))


def arms(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each arm, by its label, in order of first appearance; by seed within."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.arm, []).append(record)
    return {arm: sorted(runs, key=lambda r: _natural(r.seed)) for arm, runs in found.items()}


def _natural(seed: str) -> tuple[int, str]:
    return len(seed), seed


def course(record: Record) -> Course:
    """See Course. ValueError for a run that was evaluated on one prompt: halves need two."""
    gold, kl = record.curve("gold"), record.curve("k1")
    start, final, peak = float(gold[0]), float(gold[-1]), float(_peak(record).mean())
    highest = int(gold.argmax())
    return Course(
        start=start,
        final=final,
        peak=peak,
        gap=peak - final,
        share=(peak - final) / (peak - start) if peak > start else None,
        peak_step=record.evaluations[highest].step,
        peak_kl=float(kl[highest]),
        kl=float(kl[-1]),
        proxy_change=record.last.mean("proxy") - record.first.mean("proxy"),
        gold_change=final - start,
    )


def _peak(record: Record) -> np.ndarray:
    """Gold [P] of every other prompt, where the prompts between are highest on average."""
    gold = record.table("gold")  # [E, P]
    if gold.shape[1] < 2:
        raise ValueError(
            f"{record.run.directory} was evaluated on one prompt, and a peak is picked on half of "
            "them: raise evaluation.prompts"
        )
    found = np.empty(gold.shape[1])
    for half, other in (
        (slice(0, None, 2), slice(1, None, 2)),
        (slice(1, None, 2), slice(0, None, 2)),
    ):
        found[half] = gold[gold[:, other].mean(1).argmax(), half]
    return found


def at_kl(record: Record, kl: float, name: str = "gold") -> np.ndarray | None:
    """A column [P] where the run first comes to `kl` nats: along its evaluations in order, linear
    between the two around the first crossing of the mean k1 (best-of-n: its nominal KL over n).
    None where it never gets there, or begins above: nothing is extrapolated.

    The line is what a policy is worth that asks either of the two by a coin; its KL is `kl` or
    less, as KL is convex.
    """
    reached, values = record.curve("k1"), record.table(name)
    if kl < reached[0] or kl > reached.max():
        return None
    after = int((reached >= kl).argmax())
    if not after:
        return values[0]
    before = after - 1
    weight = (kl - reached[before]) / (reached[after] - reached[before])
    return values[before] + weight * (values[after] - values[before])


def measured(record: Record, measure: Measure) -> np.ndarray | None:
    """A measure of a run by prompt [P]: "final" (gold), "peak", "gap", "gain" (final - start),
    ("kl", nats) for gold at equal KL, or the last evaluation's column of that name (such as proxy,
    length, win). None if the run has none.
    """
    last, first = record.last.values, record.first.values
    if isinstance(measure, tuple):
        return at_kl(record, measure[1])
    if measure == "final":
        return last["gold"]
    if measure in ("peak", "gap"):
        return _peak(record) - (last["gold"] if measure == "gap" else 0.0)
    if measure in GAINS:
        return last[GAINS[measure]] - first[GAINS[measure]]
    return last.get(measure)


def summaries(
    records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Summary]:
    """Of the runs of one arm: start, final, peak, gap, gain, proxy_gain, peak_step, peak_kl, kl,
    every column of the last evaluation but gold, and those of its metrics that only a whole
    evaluation has (text/distinct_1, ...); of those that all the runs have.
    """
    values = {name: _of_all(records, name) for name in ("start", "final", "peak", "gap", *GAINS)}
    columns = [name for name in records[0].last.values if name != "gold"]
    values |= {"kl" if name == "k1" else name: _of_all(records, name) for name in columns}
    courses = [course(record) for record in records]
    whole = {"peak_step": [c.peak_step for c in courses], "peak_kl": [c.peak_kl for c in courses]}
    for name in records[0].last.metrics:
        if name.startswith(WHOLE) and all(name in r.last.metrics for r in records):
            whole[name] = [r.last.metrics[name] for r in records]
    by_prompt = {name: stacked(found, records) for name, found in values.items() if found}
    by_run = {name: np.array(found, float)[:, None] for name, found in whole.items()}
    told = _summaries(by_prompt, len(records[0].prompts), resamples, seed)
    return told | _summaries(by_run, None, resamples, seed)


def _of_all(records: Sequence[Record], name: str) -> list[np.ndarray]:
    """A measure of all runs [P], or nothing if one has none."""
    found = [r.first.values["gold"] if name == "start" else measured(r, name) for r in records]
    return [] if any(x is None for x in found) else [x for x in found if x is not None]


def _summaries(
    tables: dict[str, np.ndarray], prompts: int | None, resamples: int, seed: int
) -> dict[str, Summary]:
    """Of tables [S, P], all of one shape, in one go."""
    stack = np.stack(list(tables.values()), -1)  # [S, P, M]
    means = crossed_means([stack], resamples=resamples, seed=seed)
    within = [share if name in SHARES else lambda found: found for name in tables]
    means = [bounded(mean) for bounded, mean in zip(within, means, strict=True)]
    return {
        name: Summary(
            mean=mean.mean,
            low=mean.low,
            high=mean.high,
            iqm=stratified([table.mean(1)], iqm_of_all, resamples=resamples, seed=seed),
            seeds=len(table),
            prompts=prompts,
            scope=scope_of(*table.shape),
        )
        for (name, table), mean in zip(tables.items(), means, strict=True)
    }


def stacked(values: Sequence[np.ndarray], records: Sequence[Record]) -> np.ndarray:
    """Values by prompt of several runs as a table [S, P] in which prompts and seeds are crossed;
    [S, 1], the means of the runs, where they were asked other prompts.
    """
    same = all(record.prompts == records[0].prompts for record in records)
    return np.stack(values) if same else np.array([[x.mean()] for x in values])


def fit(records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> Fit | None:
    """Least squares in alpha and beta over all evaluations with KL > 0 of one arm's runs. None
    with fewer than 3 such points at different KLs, or where a run does not begin at KL 0.

    The points of a run depend on each other, so intervals come from drawing whole runs anew; none
    for one run. The measured KL has an error of its own, which pulls alpha towards 0.
    """
    form: Form = BEST_OF_N if records[0].nominal else "training"
    if any(abs(record.first.mean("k1")) > BEGINS for record in records):
        return None
    runs = [_points(record) for record in records]
    d, gain = (np.concatenate(part) for part in zip(*runs, strict=True))
    if len(np.unique(d)) < 3:
        return None
    designs = [_design(d, form) for d, _ in runs]
    grams = np.stack([x.T @ x for x in designs])  # [S, 2, 2]
    moments = np.stack([x.T @ y for x, (_, y) in zip(designs, runs, strict=True)])  # [S, 2]
    alpha, beta = np.linalg.lstsq(_design(d, form), gain)[0]
    drawn = np.random.default_rng(seed).multinomial(
        len(runs), [1 / len(runs)] * len(runs), resamples
    )
    inverse = np.linalg.pinv(np.einsum("bs,sij->bij", drawn, grams), hermitian=True)
    solved = np.einsum("bij,bs,sj->bi", inverse, drawn, moments)  # [B, 2]
    spread = float(((gain - gain.mean()) ** 2).sum())
    misfit = float(((gain - _design(d, form) @ [alpha, beta]) ** 2).sum())
    return Fit(
        form=form,
        alpha=estimate(float(alpha), solved[:, 0], len(runs)),
        beta=estimate(float(beta), solved[:, 1], len(runs)),
        r2=1 - misfit / spread if spread else None,
        peak=_highest(float(alpha), float(beta), form),
        reached=float(d.max()),
        points=len(d),
        runs=len(runs),
    )


def _points(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """d and gold - gold at the start of the evaluations with KL > 0."""
    kl, gold = record.curve("k1"), record.curve("gold")
    return np.sqrt(kl[kl > 0]), (gold - gold[0])[kl > 0]


def _design(d: np.ndarray, form: Form) -> np.ndarray:
    """What alpha and beta are multiplied with [N, 2]."""
    return np.stack([d, -d * (d if form == BEST_OF_N else np.log(d))], axis=1)


def _highest(alpha: float, beta: float, form: Form) -> float | None:
    """Where R stops rising: alpha / (2 beta), or exp(alpha / beta - 1)."""
    if beta <= 0 or (form == BEST_OF_N and alpha <= 0):
        return None
    if form == BEST_OF_N:
        return alpha / (2 * beta)
    return math.exp(alpha / beta - 1) if alpha / beta < LARGEST else None


def shared_seeds(records: Sequence[Record]) -> list[str]:
    """The settings named seed that stand still while the runs' seeds differ, such as
    preferences.seed: no interval tells what other values of theirs would do.
    """
    if len({record.seed for record in records}) < 2:
        return []
    found: dict[str, set[int]] = {}
    for record in records:
        for name, value in _seeds(record.run.config).items():
            found.setdefault(name, set()).add(value)
    return [name for name, values in found.items() if len(values) == 1]


def _seeds(node: dict[str, Any], above: str = "") -> dict[str, int]:
    """The settings named seed below the root, of what decides the outcome of a run."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict) and key not in UNUSED:
            found |= _seeds(value, f"{above}{key}.")
        elif key == SEED and above and value is not None:
            found[above + key] = value
    return found
