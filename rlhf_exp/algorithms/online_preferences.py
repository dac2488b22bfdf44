"""Online preference learning (Christiano et al. 2017, arXiv 1706.03741; Ziegler et al. 2019): the
reward is fitted while the policy improves, on labels asked for where they tell most.

Any algorithm of the loop learns from the reward ensemble, and every few steps completions of the
policy as it is are paired, the pairs on which the members disagree most are put to the labeller,
and the members are fitted anew (rewards/refitting.py). "Segments" are completions of one prompt.

What a learner keeps from earlier steps (the pools of Quark, and of ReST with accumulate=true) keeps
the scores of its time.

Left out: asking people while the policy trains on; a run waits for them.
"""

import logging
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rlhf_exp import processes
from rlhf_exp.algorithms.online import Online
from rlhf_exp.artifacts import write_json
from rlhf_exp.checkpoints import random_state, set_random_state
from rlhf_exp.choices import require
from rlhf_exp.data.local import read_jsonl, write_jsonl
from rlhf_exp.data.rows import Dataset, Pair
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.preferences import agreement, ask, ordered
from rlhf_exp.rewards import score
from rlhf_exp.rewards.ensemble import Ensemble
from rlhf_exp.rewards.pairwise import Pairwise
from rlhf_exp.rewards.refitting import Refitting, odds_scale
from rlhf_exp.trial import Trial, seed_everything

logger = logging.getLogger(__name__)

FEWEST = 8  # labels that a member is fitted on, at the least

Question = tuple[str, str, str]  # prompt, left, right
PARTS = ("prompt", "chosen", "rejected", "probability")  # of a label


def disagreement(left: Tensor, right: Tensor) -> Tensor:
    """Variance over the members of the predicted P(left is better) [n], from their scores of either
    side [members, n] in log-odds; a label tells most where it is high (section 2.2.4).
    """
    return (left - right).sigmoid().var(0, correction=0)


def label_counts(total: int, first: float, times: int, half: float | None) -> list[int]:
    """Labels to ask for before the first step and at each of `times` later moments; they sum to
    `total`.

    The share `first` comes first. What follows is spread evenly, or, as the label rate anneals, in
    proportion to half / (half + moment): at moment `half` it is half of what it was.
    """
    if times == 0:
        return [total]
    opening = round(total * first)
    weights = np.ones(times) if half is None else half / (half + np.arange(times))
    ends = np.rint((total - opening) * weights.cumsum() / weights.sum()).astype(int)
    return [opening, *np.diff(ends, prepend=0).tolist()]


@dataclass(kw_only=True)
class OnlinePreferences(Online):
    """`learner` learns from a reward that learns from `labels` labels."""

    fits_reward: ClassVar[bool] = True  # so that no stage before it needs to

    # the learner's, for the loop is one
    steps: int = field(init=False)
    batch: int = field(init=False)
    samples: int = field(init=False)

    learner: Any  # an algorithm of the loop
    labels: int = 400  # asked for in the whole run
    first: float = 0.25  # share of them before the first step
    every: int = 5  # steps between the moments at which labels are asked for
    # moments after which half as many labels are asked for as at the first; null: always as many
    annealing: float | None = None
    pick: str = "disagreement"  # of the members; or uniform
    candidates: int = 10  # pairs among which one is picked (Christiano et al. 2017: 10)
    bootstrap: bool = True  # members learn from resamples; false: from all but 1/e of the labels
    buffer: int = 3000  # last labels that members are fitted on
    weight_decay: float = 1.0  # of the members, at first
    # validation loss over training loss, between which the weight decay of a member keeps them
    loss_band: list[float] = field(default_factory=lambda: [1.1, 1.5])
    seed: int = 0  # draws prompts and resamples; together with the run's

    def __post_init__(self) -> None:
        if not isinstance(self.learner, Online) or isinstance(self.learner, OnlinePreferences):
            raise ValueError(
                f"algo.learner is {type(self.learner).__name__}, which is no algorithm of the "
                "online loop: use algo@algo.learner=ppo, rest, raft or quark"
            )
        self.steps, self.batch = self.learner.steps, self.learner.batch
        self.samples = self.learner.samples
        require(self.pick, ("disagreement", "uniform"), "algo.pick")
        if not 0 < self.first <= 1 or min(self.every, self.candidates, self.buffer) < 1:
            raise ValueError(
                f"algo.first={self.first} must be above 0 and at most 1; algo.every={self.every}, "
                f"algo.candidates={self.candidates} and algo.buffer={self.buffer} positive"
            )
        if self.annealing is not None and self.annealing <= 0:
            raise ValueError(f"algo.annealing={self.annealing} must be positive, or null")
        if self.weight_decay < 0:
            raise ValueError(f"algo.weight_decay={self.weight_decay} must not be negative")
        if len(self.loss_band) != 2 or not 0 < self.loss_band[0] < self.loss_band[1]:
            raise ValueError(f"algo.loss_band={self.loss_band} must be two rising positive numbers")
        moments = (self.steps - 1) // self.every
        self.counts = label_counts(self.labels, self.first, moments, self.annealing)
        if min(self.counts[0], self.buffer) < FEWEST:
            raise ValueError(
                f"algo.labels={self.labels} with algo.first={self.first} begins with "
                f"{self.counts[0]} labels, and algo.buffer={self.buffer} keeps so many: a reward "
                f"model takes at least {FEWEST}"
            )
        for name in ("weighs_importance", "tokens"):  # what a sampler wants to know
            if hasattr(self.learner, name):
                setattr(self, name, getattr(self.learner, name))

    # ---- the loop

    def check(self, policy: Policy, data: Dataset) -> None:
        """As the learner."""
        self.learner.check(policy, data)

    def prompts(self, data: Dataset) -> list[str]:
        """The learner's."""
        return self.learner.prompts(data)

    def setup(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        """Ask for the first labels and fit the reward on them, unless a checkpoint has them."""
        self.policy, self.reward, self.trial, self.data = policy, reward, trial, data
        self.labeller = trial.labeller()
        self.refit = Refitting(
            reward=reward,
            fitting=trial.fitting,
            folder=trial.directory / "rewards",
            bootstrap=self.bootstrap,
            band=self.loss_band,
            weight_decay=self.weight_decay,
        )
        self.rows: list[dict[str, Any]] = []
        self.unsaid: list[Question] = []  # what the labeller could not say
        self.round = 0
        self.finished = False  # whether the labeller is to be asked no more
        if trial.checkpoints.latest() is None:
            self._learn_reward()
        self.learner.setup(policy, reward, data, trial)

    def check_reward(self, reward: Any, labeller: Any) -> None:
        """Refuse a reward that cannot be fitted here, and a labeller that cannot be asked."""
        members = list(reward.members.values()) if isinstance(reward, Ensemble) else []
        if not members or not all(isinstance(m, Pairwise) and m.train for m in members):
            raise ValueError(
                "algo=online_preferences fits an ensemble of reward models: use reward=ensemble, "
                "single, mean, wco or uwo"
            )
        if any(m.normalise != "eval_set" for m in members):
            raise ValueError(
                "algo=online_preferences standardises members over the labels that they have not "
                "seen: set reward.member.normalise=eval_set"
            )
        if self.pick == "disagreement" and len(members) < 2:
            raise ValueError(
                "algo.pick=disagreement needs members that can disagree: set reward.size to 2 or "
                "more, or algo.pick=uniform"
            )
        if labeller.source == "dataset":
            raise ValueError(
                "algo=online_preferences asks about new completions, and labeller=dataset knows "
                "the data's own pairs only: use labeller=gold, judge or person"
            )

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        """The learner's step, and then, where labels are due, the reward's."""
        metrics = self.learner.learn(rollouts, step)
        done = step + 1
        if done % self.every == 0 and done < self.steps:
            metrics |= self._learn_reward()
        return metrics

    def state(self) -> dict[str, Any]:
        names = ("rows", "unsaid", "round", "finished")
        return {"learner": self.learner.state(), **{n: getattr(self, n) for n in names}} | {
            "decay": self.refit.decay,
            "ratios": self.refit.ratios,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The members are found, or fitted again."""
        self.rows, self.unsaid = state["rows"], [tuple(pair) for pair in state["unsaid"]]
        self.round, self.finished = state["round"], state["finished"]
        self.refit.decay, self.refit.ratios = state["decay"], state["ratios"]
        self.refit(self.rows[-self.buffer :], self._seed(self.round - 1))
        self.learner.load_state(state["learner"])

    # ---- labels

    def _seed(self, number: int) -> str:
        """Of round `number`."""
        return f"{self.seed}/{self.trial.seed}/{number}"

    def _learn_reward(self) -> dict[str, float]:
        """Ask for the labels of this round and fit the members on all; the generators of the run
        are left where they were.
        """
        before, seed = random_state(), self._seed(self.round)
        seed_everything(random.Random(seed).randrange(2**32))
        found = self._ask(self.counts[self.round], random.Random(seed))
        self.refit.adapt()
        found |= self.refit(self.rows[-self.buffer :], seed)
        self.round += 1
        set_random_state(before)
        logger.info("labels: %s", ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        return {f"preferences/{name}": value for name, value in found.items()}

    def _ask(self, count: int, rng: random.Random) -> dict[str, float]:
        """Put `count` of the candidates to the labeller, and remember what it says."""
        count = 0 if self.finished else count
        pairs = self._candidates(count * (self.candidates if self._ranks else 2), rng)
        spread = self._spread(pairs)
        picked = list(range(len(pairs)))[:count]  # candidates come in random order
        if self._ranks:
            picked = spread.argsort(descending=True, stable=True)[:count].tolist()
        self._label(self._kept([pairs[i] for i in picked]))
        found = {"labels": float(len(self.rows)), "cannot_say": float(len(self.unsaid))}
        if self._ranks and picked:
            found["disagreement"] = float(spread[picked].mean())
            found["disagreement_of_candidates"] = float(spread.mean())
        return found

    @property
    def _ranks(self) -> bool:
        """Whether the members, fitted by now, say what is asked."""
        return self.pick == "disagreement" and self.round > 0

    def _kept(self, pairs: list[Question]) -> list[Question]:
        """`pairs`, or those that this round was about to ask when the run was interrupted, of which
        some may have been answered: on a GPU a policy does not say the same again.
        """
        path = self.trial.directory / "questions" / f"round-{self.round}.jsonl"

        def kept() -> list[Question]:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_jsonl(path, [{"prompt": p, "left": x, "right": y} for p, x, y in pairs])
            rows = read_jsonl(path) if path.stat().st_size else []
            return [(row["prompt"], row["left"], row["right"]) for row in rows]

        return processes.first(kept)

    def _label(self, pairs: list[Question]) -> None:
        """Ask about `pairs`; ValueError if there are too few labels to learn from."""
        prompts, left, right = ([pair[side] for pair in pairs] for side in range(3))
        said = ask(self.labeller, prompts, left, right).tolist()
        for pair, ahead in zip(pairs, said, strict=True):
            if ahead == ahead:
                self.rows.append(vars(ordered(*pair, ahead)) | {"round": self.round})
            else:
                self.unsaid.append(pair)
        self.finished = self.finished or processes.agreed(self.labeller.finished())
        if len(self.rows) < FEWEST:
            raise ValueError(
                f"only {len(self.rows)} labels came of {len(self.rows) + len(self.unsaid)} pairs "
                f"that the labeller was asked about, and a reward model takes {FEWEST}: answer "
                "more of them, raise algo.labels, or let the policy vary more (policy.temperature)"
            )
        self._tell()

    def _tell(self) -> None:
        """labels.jsonl, and in labels.json what the labeller and the gold tell of them."""
        pairs = [Pair(**{k: row[k] for k in PARTS}) for row in self.rows]
        gold = None if self.labeller.asks_gold else self.trial.evaluator.gold
        found = agreement(pairs, gold)
        if processes.main():
            write_jsonl(self.trial.directory / "labels.jsonl", self.rows)
            if told := self.labeller.report() | found:
                write_json(self.trial.directory / "labels.json", told)

    def _candidates(self, count: int, rng: random.Random) -> list[Question]:
        """Pairs of the policy as it is, no two texts the same, none asked about before."""
        if not count:
            return []
        prompts = [rng.choice(self.data.prompts) for _ in range(count)]
        completions = self.policy.sample(prompts, 2).completions
        known = {_cell(r["prompt"], r["chosen"], r["rejected"]) for r in self.rows}
        known |= {_cell(*pair) for pair in self.unsaid}
        found: list[Question] = []
        for pair in zip(prompts, completions[::2], completions[1::2], strict=True):
            if pair[1] != pair[2] and _cell(*pair) not in known:
                known.add(_cell(*pair))
                found.append(pair)
        return found

    def _spread(self, pairs: list[Question]) -> Tensor:
        """How much the members disagree on each pair [n]; 0 where nobody wants to know."""
        if not self._ranks or not pairs:
            return torch.zeros(len(pairs))
        prompts, left, right = ([pair[side] for pair in pairs] for side in range(3))
        return disagreement(self._log_odds(prompts, left), self._log_odds(prompts, right))

    def _log_odds(self, prompts: list[str], completions: list[str]) -> Tensor:
        """What each member says of completions, up to a constant [members, n]."""
        scores = score(self.reward, prompts, completions).members
        return torch.stack([scores[n] * odds_scale(m) for n, m in self.reward.members.items()])


def _cell(prompt: str, one: str, other: str) -> tuple[str, str, str]:
    """A pair, whichever way round."""
    return (prompt, min(one, other), max(one, other))
