"""An AI judge says which of two completions is better (RLAIF: Lee et al. 2023, arXiv 2309.00267;
Bai et al. 2022, arXiv 2212.08073).

It is asked under a principle, in both orders, and may explain itself first; its label is how sure
it is of "1" against "2". The texts are fenced, as they may try to give it orders.

Left out: examples in the question, several explanations of one pair (self-consistency).
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import constitution
from rlhf_exp.artifacts import file_hash
from rlhf_exp.choices import require
from rlhf_exp.constitution import Principle
from rlhf_exp.feedback import Question, Verdict
from rlhf_exp.feedback.asking import Asker
from rlhf_exp.feedback.fences import NOTICE, fenced, harmless
from rlhf_exp.labellers import Labeller, draw
from rlhf_exp.labellers.gold import Gold
from rlhf_exp.labellers.self_preference import read_own, self_preference

OPTIONS = ("1", "2")
REPLY_TOKENS = 4  # enough to see that a reply in words is more than an option
Row = tuple[str, str, str, Principle]  # prompt, answer 1, answer 2, what decides

# ---- formulas


def soft_label(one_way: Tensor, other_way: Tensor) -> Tensor:
    """P(A is better) [n], the mean over both orders.

    `one_way` [n, 2] are log-probabilities of "1" and "2" with A first, `other_way` with B first.
    """
    return (one_way.softmax(-1)[:, 0] + other_way.softmax(-1)[:, 1]) / 2


def same_position(one_way: Tensor, other_way: Tensor) -> Tensor:
    """Whether the answer in the same place is preferred in both orders [n] bool; see soft_label."""
    ahead, behind = ((way[:, 0] - way[:, 1]).sign() for way in (one_way, other_way))
    return ahead * behind > 0


# ---- questions


def choice(row: Row, rationale: str | None = None) -> Question:
    """Which answer is better? After its own `rationale`, if it gave one."""
    last = "Reply with 1 or 2 and nothing else.\nAnswer:"
    if rationale is None:
        return _question(row, [("user", f"{_shown(row)}\n{last}")], REPLY_TOKENS)
    told = [*_explained(row), ("assistant", harmless(rationale))]
    return _question(row, [*told, ("user", f"{row[3].compare}\n{last}")], REPLY_TOKENS)


def explanation(row: Row, max_tokens: int) -> Question:
    """How do the answers compare?"""
    return _question(row, _explained(row), max_tokens)


def _explained(row: Row) -> list[tuple[str, str]]:
    wanted = "Compare the answers in this respect in a few sentences; do not decide yet."
    return [("user", f"{_shown(row)}\n{wanted}\nExplanation:")]


def _shown(row: Row) -> str:
    prompt, first, second, principle = row
    shown = {"prompt": prompt, "answer 1": first, "answer 2": second}
    fences = [fenced(name, text) for name, text in shown.items()]
    asked = f"You compare two answers to a prompt. {NOTICE}"
    return "\n\n".join([asked, *fences, principle.compare])


def _question(row: Row, turns: list[tuple[str, str]], max_tokens: int) -> Question:
    prompt, first, second, _ = row
    return Question(tuple(turns), max_tokens, prompt, first, _of_first, second)


def _of_first(verdict: Verdict) -> str:
    """What rules have to explain."""
    return f"The first answer: {verdict.sentence}"


# ---- the labeller


@dataclass(kw_only=True)
class FromJudge(Labeller):
    """Certain only where `judge` is, whichever answer it sees first. A pair of which one question
    got no usable answer has no label.
    """

    judge: Any  # who is asked
    constitution: str = "reviews"  # one of our own by name, or a YAML file
    principles: str = "all"  # all: the mean over them; one: drawn for each pair
    hard: bool = False  # say 1, 0, or 1/2 for a tie, whatever the certainty
    rationale: bool = False  # let the judge explain itself first
    rationale_tokens: int = 256  # longest explanation
    # with a rationale, which makes judges too sure, labels are kept within these (Bai et al.)
    clamp: list[float] = field(default_factory=lambda: [0.4, 0.6])
    tries: int = 5  # times a question is asked before its replies count as off format
    # JSONL file of replies, shared by the runs that name it; null: judge.jsonl of each run
    cache: str | None = "artifacts/judge.jsonl"
    # JSONL file with prompt, own (by the judge or its family) and other (by another writer):
    # labels.json then tells how much the judge prefers its own; null: not measured
    own: str | None = None
    seed: int = 0  # draws principles

    def __post_init__(self) -> None:
        require(self.principles, ("all", "one"), "labeller.principles")
        for name in ("rationale_tokens", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"labeller.{name}={getattr(self, name)} must be at least 1")
        if len(self.clamp) != 2 or not 0 <= self.clamp[0] <= 0.5 <= self.clamp[1] <= 1:
            raise ValueError(
                f"labeller.clamp={self.clamp} must be two numbers in [0, 1], 1/2 between them"
            )
        self.dear = True
        self.asker = Asker(self.judge, self.tries)
        self._labels: list[Tensor] = []  # [pairs] each
        self._ways: list[Tensor] = []  # [comparisons, 2 orders, 2 options] each

    @cached_property
    def rules(self) -> list[Principle]:
        return constitution.read(self.constitution, "labeller.constitution")

    def identity(self) -> dict[str, Any]:
        own = None if self.own is None else file_hash(Path(self.own).expanduser())
        found = {"constitution": [vars(rule) for rule in self.rules], "own": own, "cache": None}
        judge = self.judge.identity()
        return found if judge is None else found | {"judge": judge}  # else its settings decide

    def check(self) -> None:
        _ = self.rules
        if self.own is not None:
            read_own(self.own)
        self.judge.check_options(OPTIONS)
        self.judge.check()

    def open(self, directory: Path) -> None:
        path = directory / "judge.jsonl" if self.cache is None else Path(self.cache)
        self.asker.open(path, "labeller.cache")

    def load(self, gold: Any, device: str | torch.device) -> None:
        self.gold, self.device = gold, device
        self.judge.load(device)

    def __call__(self, prompts: list[str], left: list[str], right: list[str]) -> Tensor:
        labels, ways = self._asked(prompts, left, right)
        self._labels.append(labels)
        self._ways.append(ways)
        return labels

    def report(self) -> dict[str, float]:
        """How often it was asked and could not say, how sure it was, and its biases."""
        counts = self.asker.counts
        labels, ways = torch.cat([torch.empty(0), *self._labels]), self._told()
        found: dict[str, float] = {name: counts[name] for name in ("asked", "cached", "retried")}
        found["cannot_say"] = int(labels.isnan().sum())  # pairs, for one of these reasons
        found["questions_off_format"] = counts["malformed"]
        found["questions_without_reply"] = counts["failed"]
        if len(ways):
            known = labels[~labels.isnan()]
            found["certainty"] = float(torch.maximum(known, 1 - known).mean())
            found["same_position"] = float(same_position(ways[:, 0], ways[:, 1]).float().mean())
            found["mean_first"] = float(ways.softmax(-1)[..., 0].mean())
        return found if self.own is None else found | self._self_preference(self.own)

    # ---- inside

    def _asked(
        self, prompts: list[str], left: list[str], right: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Labels [n], and log-probabilities [n * principles, 2 orders, 2 options]; NaN where the
        judge cannot say.
        """
        rows = [
            (prompt, one, other, rule)
            for prompt, one, other in zip(prompts, left, right, strict=True)
            for rule in self._deciding(prompt, one, other)
        ]
        swapped = [(prompt, other, one, rule) for prompt, one, other, rule in rows]
        one_way, other_way = self._chances(rows + swapped).chunk(2)
        principles = len(self.rules) if self.principles == "all" else 1
        labels = soft_label(one_way, other_way).view(-1, principles).mean(1)
        labels = labels.round(decimals=6)  # or rounding would decide a tie
        if self.rationale:
            labels = labels.clamp(*self.clamp)
        if self.hard:
            labels = torch.where(labels.isnan(), labels, 0.5 + 0.5 * (labels - 0.5).sign())
        return labels, torch.stack([one_way, other_way], 1)

    def _deciding(self, prompt: str, one: str, other: str) -> list[Principle]:
        """The principles of a pair, the same whichever completion is left."""
        if self.principles == "all":
            return self.rules
        return [self.rules[draw(self.seed, prompt, one, other) % len(self.rules)]]

    def _chances(self, rows: list[Row]) -> Tensor:
        """Log-probabilities of "1" and "2" [n, 2], NaN where no usable answer came."""
        found = torch.full((len(rows), 2), torch.nan)
        said: list[str | None] = [None] * len(rows)
        asked = list(range(len(rows)))
        if self.rationale:
            questions = [explanation(row, self.rationale_tokens) for row in rows]
            said = self.asker.replies(questions, lambda reply: reply.strip() or None)
            asked = [i for i in asked if said[i] is not None]
        answers = self.asker.choices([choice(rows[i], said[i]) for i in asked], OPTIONS)
        for i, answer in zip(asked, answers, strict=True):
            if answer is not None:
                found[i] = torch.tensor(answer)
        return found

    def _told(self) -> Tensor:
        """Log-probabilities of the comparisons that were answered in both orders [n, 2, 2]."""
        ways = torch.cat([torch.empty(0, 2, 2), *self._ways])
        return ways[~ways.isnan().any(-1).any(-1)]

    def _self_preference(self, file: str) -> dict[str, float]:
        """Of pairs whose writers are known, beside what the gold says of them, if there is one."""
        prompts, own, other = read_own(file)
        judged, _ = self._asked(prompts, own, other)
        said = None
        if self.gold is not None and not self.gold.learns_from_pairs:
            gold = Gold()
            gold.load(self.gold, self.device)
            said = gold(prompts, own, other)
        return self_preference(judged, said)
