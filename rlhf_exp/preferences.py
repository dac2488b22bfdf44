"""The `preferences` stage: pairs sampled from the start policy (or the data set's own), labelled,
with seeded noise.

Noise is drawn once and stored, so that all members of an ensemble see the same noisy data set, as
the paper speaks of (Coste et al. 2023, section 4); evaluation pairs stay clean. A wrong label stays
as certain as the right one was.
"""

import logging
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import processes, rewards
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset, Pair
from rlhf_exp.policy import Policy

logger = logging.getLogger(__name__)


def flip_all(count: int, rate: float, rng: random.Random) -> list[int]:
    """Exactly round(rate * count) indices."""
    return sorted(rng.sample(range(count), round(rate * count)))


def flip_randomised_half(count: int, rate: float, rng: random.Random) -> list[int]:
    """A random share 2 * rate of the labels is replaced by coin flips, so that `rate` of all are
    wrong on average.
    """
    return [
        i for i in sorted(rng.sample(range(count), round(2 * rate * count))) if rng.random() < 0.5
    ]


SCHEMES = {"flip": flip_all, "randomise_half": flip_randomised_half}


@dataclass(kw_only=True)
class Preferences:
    """How many pairs, and how wrong."""

    pairs: int = 1500  # training pairs; the data set's own are all used
    evaluation_pairs: int = 300  # clean pairs on which accuracy and score statistics are measured
    noise_rate: float = 0.25  # share of training pairs whose label is wrong
    # flip: exactly that share; randomise_half: twice that share gets a coin flip
    noise_scheme: str = "flip"
    ties: str = "drop"  # pairs of which the labeller says that neither is better: drop or keep
    seed: int = 0  # draws prompts, samples and noise

    def __post_init__(self) -> None:
        require(self.noise_scheme, SCHEMES, "preferences.noise_scheme")
        require(self.ties, ("drop", "keep"), "preferences.ties")
        limit = 1.0 if self.noise_scheme == "flip" else 0.5
        if not 0 <= self.noise_rate <= limit:
            raise ValueError(
                f"preferences.noise_rate={self.noise_rate} must be between 0 and {limit} for "
                f"noise_scheme={self.noise_scheme}"
            )
        if self.pairs < 1 or self.evaluation_pairs < 2:
            raise ValueError(
                "preferences.pairs must be at least 1 and preferences.evaluation_pairs at least 2"
            )

    def make(
        self, folder: Path, data: Dataset, policy: Policy, labeller: Any, gold: Any = None
    ) -> None:
        """Write train.jsonl, evaluation.jsonl, noise.json and labels.json, which tells how often
        the labeller agreed with `gold`, a loaded reward, if there is one.
        """
        if labeller.source == "dataset":
            train, evaluation, dropped = list(data.pairs), data.held_out_pairs, 0
            if not train or len(evaluation) < 2:
                raise ValueError(
                    "labeller=dataset needs a data set with preference pairs: give "
                    "data.preferences, or use labeller=gold"
                )
        else:
            train, evaluation, dropped = self._sampled(data.prompts, policy, labeller)
        labels = labeller.report() | agreement(train + evaluation, gold)
        flipped = SCHEMES[self.noise_scheme](len(train), self.noise_rate, random.Random(self.seed))
        for i in flipped:
            pair = train[i]
            train[i] = Pair(pair.prompt, pair.rejected, pair.chosen, pair.probability)
        logger.info(
            "%d pairs, %d labels flipped, %d sampled pairs dropped as ties or undecided",
            len(train),
            len(flipped),
            dropped,
        )
        write_jsonl(folder / "train.jsonl", [vars(p) for p in train])
        write_jsonl(folder / "evaluation.jsonl", [vars(p) for p in evaluation])
        write_json(folder / "noise.json", {"flipped": flipped, "dropped": dropped})
        write_json(folder / "labels.json", labels)
        if labels:
            logger.info("labels: %s", ", ".join(f"{k} {v:.4g}" for k, v in labels.items()))

    def _sampled(
        self, prompts: list[str], policy: Policy, labeller: Any
    ) -> tuple[list[Pair], list[Pair], int]:
        rng = random.Random(self.seed)
        wanted = self.pairs + self.evaluation_pairs
        found: list[Pair] = []
        asked = 0
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            while len(found) < wanted and asked < 4 * wanted and not labeller.finished():
                spare = 0 if labeller.dear else 32
                batch = [rng.choice(prompts) for _ in range(min(512, wanted - len(found) + spare))]
                completions = policy.sample(batch, 2).completions
                found += labelled(batch, completions, labeller, ties=self.ties)
                asked += len(batch)
        train = self.pairs
        if len(found) < wanted and labeller.finished() and len(found) > 2:  # these must do
            logger.warning("labelling was finished with %d of %d pairs", len(found), wanted)
            train = min(max(1, len(found) * train // wanted), len(found) - 2)
        elif len(found) < wanted:
            raise ValueError(
                f"only {len(found)} of {wanted} preference pairs survived: of {asked} sampled "
                "pairs the others were equal texts or ties, or the labeller could not say. "
                "Lower preferences.pairs, or let the policy vary more (policy.temperature)"
            )
        return found[:train], found[train:wanted], asked - len(found)


def ask(labeller: Any, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
    """P(left is better) [n], NaN where the labeller cannot say. Nobody is asked about two texts
    that are the same: 1/2.
    """
    found = torch.full((len(prompts),), 0.5)
    different = [i for i in range(len(prompts)) if left[i] != right[i]]
    if different:
        rows = [[column[i] for i in different] for column in (prompts, left, right)]
        said = processes.first(lambda: labeller(*rows)) if labeller.dear else labeller(*rows)
        found[different] = said.float().cpu()
    return found


def labelled(
    prompts: list[str], completions: list[str], labeller: Any, *, ties: str = "drop"
) -> list[Pair]:
    """Pairs of the two completions of each prompt, side by side, without equal texts, those of
    which the labeller cannot say, and ties unless these are to `keep`.
    """
    left, right = completions[::2], completions[1::2]
    rows = zip(prompts, left, right, ask(labeller, prompts, left, right).tolist(), strict=True)
    return [
        ordered(prompt, one, other, ahead)
        for prompt, one, other, ahead in rows
        if one != other and ahead == ahead and (ahead != 0.5 or ties == "keep")
    ]


def ordered(prompt: str, left: str, right: str, ahead: float) -> Pair:
    """The pair whose left text is better with probability `ahead`, the better one first."""
    if ahead >= 0.5:
        return Pair(prompt, left, right, ahead)
    return Pair(prompt, right, left, 1 - ahead)


def agreement(pairs: list[Pair], gold: Any) -> dict[str, float]:
    """Share of `pairs` that are in the order of `gold`, a loaded reward, ties of either left out;
    nothing without a gold, or without a pair that both can tell.
    """
    told = [pair for pair in pairs if pair.probability != 0.5]
    if gold is None or not told:
        return {}
    prompts = [pair.prompt for pair in told]
    better, worse = (
        rewards.score(gold, prompts, [getattr(p, side) for p in told], "gold").objective
        for side in ("chosen", "rejected")
    )
    apart = better != worse
    if not apart.any():
        return {}
    return {"agreement_with_gold": float((better > worse)[apart].float().mean())}


def wins(prompts: list[str], completions: list[str], labeller: Any, samples: int) -> Tensor:
    """How many of the other completions of its prompt each is expected to beat, from `samples` of
    every prompt side by side [n * samples]; where the labeller cannot tell, either wins half.
    """
    found = torch.zeros(len(prompts), samples)
    for i, j in combinations(range(samples), 2):
        left, right = completions[i::samples], completions[j::samples]
        ahead = ask(labeller, prompts, left, right).nan_to_num(0.5)
        found[:, i] += ahead
        found[:, j] += 1 - ahead
    return found.flatten()


def paired(
    completions: list[str], ranks: Tensor, samples: int, pairing: str = "all"
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Indices (better, worse) of pairs among the `samples` completions of each prompt, which rank
    [n]: all couples, or the best and the worst. And how many couples were no pair, because they
    are the same text or rank equal.
    """
    found: list[tuple[int, int]] = []
    dropped = {"ties": 0, "equal_texts": 0}
    for first in range(0, len(completions), samples):
        order = sorted(range(first, first + samples), key=lambda i: -float(ranks[i]))
        couples = combinations(order, 2) if pairing == "all" else [(order[0], order[-1])]
        for better, worse in couples:
            if completions[better] == completions[worse]:
                dropped["equal_texts"] += 1
            elif ranks[better] == ranks[worse]:
                dropped["ties"] += 1
            else:
                found.append((better, worse))
    return found, dropped
