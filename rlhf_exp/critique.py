"""The stage `critique`: a policy's answers, criticized and revised by the principles of a
constitution, for the stage `sft` to learn from (Bai et al. 2022, arXiv 2212.08073, section 3.1).

    python -m rlhf_exp stages=[critique,sft] judge@critique.critic=rules
    python -m rlhf_exp stages=[critique,sft,evaluate] policy=smollm2_135m policy.sft=true \
        critique.answers=base critique.constitution=assistant data=local data.prompts=prompts.jsonl

A policy answers training prompts; a critic, by default the same policy, finds fault by a principle
drawn at random and writes the answer anew, round after round. The base policy is then fine-tuned on
the revisions of all rounds and some of the data's own demonstrations. Where a reply cannot be used,
the text stays as it was, is counted, and is not learned from. Runs whose stages name no critique
start from the demonstrations alone.

Left out: red-team prompts written by a model.
"""

import logging
import random
from collections import Counter
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import constitution, critique_rules, rewards, weights
from rlhf_exp.artifacts import write_json
from rlhf_exp.choices import require
from rlhf_exp.constitution import Principle
from rlhf_exp.critique_requests import CRITIQUE, FAULTS, REVISION, Request
from rlhf_exp.data.local import read_jsonl, write_jsonl
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.feedback import Provider
from rlhf_exp.feedback.models import LocalModel
from rlhf_exp.feedback.rules import Rules
from rlhf_exp.policy import Policy

logger = logging.getLogger(__name__)

OUTCOMES = ("changed", "unchanged", *FAULTS, "unanswered")  # of a round, for one text


@dataclass(frozen=True)
class Step:
    """What became of one text in one round."""

    principle: str
    critique: str | None  # None: not asked for, or no usable reply
    revision: str | None  # None: no usable reply, so that the text stays as it was
    outcome: str  # one of `OUTCOMES`


@dataclass
class Draft:
    """An answer on its way through the rounds."""

    prompt: str
    answer: str  # what the policy wrote
    text: str  # as it stands
    rounds: list[Step] = field(default_factory=list)


@dataclass(kw_only=True)
class Critique:
    """How many answers are revised, by what principles, how often, and by whom."""

    prompts: int = 1000  # training prompts that are answered; each in turn, in random order
    rounds: int = 4  # of critique and revision; the paper has 4
    answers: str = "start"  # who answers: start (fine-tuned on the data's demonstrations) or base
    # reviews, assistant, or a YAML file; each round draws one of its principles for each text
    constitution: str = "reviews"
    direct: bool = False  # ask for the revision alone, without a critique
    helpful: float = 0.25  # share of the data's own demonstrations that is learned from, too
    critic: Any = None  # a judge of rlhf_exp.feedback; null: the policy that answers
    max_tokens: int = 200  # longest reply of the critic
    cache: str | None = None  # JSONL file of replies; null: beside the artifacts of this stage
    seed: int = 0  # draws prompts, answers, principles and demonstrations

    def __post_init__(self) -> None:
        require(self.answers, ("start", "base"), "critique.answers")
        for name in ("prompts", "rounds", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"critique.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.helpful <= 1:
            raise ValueError(f"critique.helpful={self.helpful} must be between 0 and 1")

    @cached_property
    def principles(self) -> list[Principle]:
        """Those of the constitution."""
        return constitution.read(self.constitution, "critique.constitution")

    def check(self, policy: Policy) -> None:
        """Refuse what can be known to fail before anything loads."""
        principles = self.principles
        if not policy.sft:
            raise ValueError(
                "stages=[critique,...] is for the stage sft, which policy.sft=false skips: set "
                "policy.sft=true"
            )
        if self.critic is not None:
            self.critic.check()
        elif policy.architecture is not None:
            raise ValueError(
                "critique.critic=null has the policy criticize itself, and one built from "
                "policy.architecture has never seen an instruction: add "
                "judge@critique.critic=rules, the stand-in of data=reviews, or local or openai"
            )
        if isinstance(self.critic, Rules):
            self._check_rules(principles)

    def _check_rules(self, principles: list[Principle]) -> None:
        known = list(critique_rules.RULES)
        if self.critic.rules != "reviews":
            raise ValueError(
                f"critique.critic.rules={self.critic.rules} can judge and not revise: use reviews "
                "for data=reviews, or judge@critique.critic=local or openai for real text"
            )
        if unknown := [p.name for p in principles if p.name not in known]:
            raise ValueError(
                f"judge@critique.critic=rules knows the principles {', '.join(known)}, and "
                f"critique.constitution={self.constitution} has {unknown[0]}: use "
                "critique.constitution=reviews, or judge@critique.critic=local or openai"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the revisions, beside data and policy."""
        decisive = [f.name for f in fields(self) if f.name not in ("cache", "critic")]
        settings = {name: getattr(self, name) for name in decisive}
        critic = None
        if self.critic is not None:
            judge = type(self.critic)
            critic = [f"{judge.__module__}.{judge.__qualname__}", self.critic.identity()]
        return settings | {"constitution": [asdict(p) for p in self.principles], "critic": critic}

    # ---- the stage

    def make(
        self,
        folder: Path,
        data: Dataset,
        policy: Policy,
        gold: Any = None,
        cache: Path | None = None,
    ) -> None:
        """Write revisions.jsonl, demonstrations.jsonl, which the stage sft learns from, and
        report.json. `policy` is loaded and answers; `gold`, a loaded reward, only looks on; replies
        are remembered in `cache`, unless the settings name another file.
        """
        drafts = self._answered(data.prompts, policy)
        provider = self._provider(policy, cache)
        report = [
            self._round(number, drafts, provider, gold) for number in range(1, self.rounds + 1)
        ]
        logger.info("replies of the critic: %s", provider.counts)
        told = self._demonstrations(drafts, data)
        write_jsonl(folder / "revisions.jsonl", [_row(draft) for draft in drafts])
        write_jsonl(folder / "demonstrations.jsonl", [vars(d) for d in told])
        write_json(folder / "report.json", {"prompts": self.prompts, "rounds": report})

    def _answered(self, prompts: list[str], policy: Policy) -> list[Draft]:
        """What the policy says to the prompts that are drawn."""
        rng = random.Random(self.seed)
        asked: list[str] = []
        while len(asked) < self.prompts:
            asked += rng.sample(prompts, min(len(prompts), self.prompts - len(asked)))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            answers = policy.sample(asked).completions
        return [Draft(p, a, a) for p, a in zip(asked, answers, strict=True)]

    def _provider(self, policy: Policy, cache: Path | None) -> Provider:
        """Who asks the critic, and remembers what it said."""
        critic = Itself(policy) if self.critic is None else copy(self.critic)
        critic.load(policy.device)  # the copy, so that a model does not outlive the stage
        where = self.cache if self.cache is not None else str(cache) if cache else None
        provider = Provider(task=None, judge=critic, tries=1, cache=where)
        if where is not None:
            provider.open(Path(where).parent)
        return provider

    def _round(
        self, number: int, drafts: list[Draft], provider: Provider, gold: Any
    ) -> dict[str, Any]:
        """One critique and revision of every text; what came of it."""
        before = [draft.text for draft in drafts]
        by_principle: dict[Principle, list[Draft]] = {}
        for index, draft in enumerate(drafts):
            by_principle.setdefault(self._drawn(index, number), []).append(draft)
        for principle in filter(by_principle.__contains__, self.principles):
            self._revise(principle, by_principle[principle], provider)
        found = self._summary(number, drafts, before, gold)
        logger.info("critique: %s", _in_words(found, self.rounds))
        return found

    def _drawn(self, index: int, number: int) -> Principle:
        """The principle for text `index` in round `number`."""
        return random.Random(f"{self.seed} {index} {number}").choice(self.principles)

    def _revise(self, principle: Principle, drafts: list[Draft], provider: Provider) -> None:
        """Have `drafts` criticized by one principle, and written anew."""
        heard = {}
        if not self.direct:
            heard = self._ask(CRITIQUE, principle, drafts, {}, provider)
        critiques = {key: text for key, (text, _) in heard.items() if text}
        open_to = [d for d in drafts if self.direct or (d.prompt, d.text) in critiques]
        replies = heard | self._ask(REVISION, principle, open_to, critiques, provider)
        for draft in drafts:
            key = draft.prompt, draft.text
            _advance(draft, principle.name, critiques.get(key), *replies[key])

    def _ask(
        self,
        kind: str,
        principle: Principle,
        drafts: list[Draft],
        critiques: dict[tuple[str, str], str],
        provider: Provider,
    ) -> dict[tuple[str, str], tuple[str, str]]:
        """Usable text ("" if there is none) and outcome of the reply, by prompt and text."""
        provider.task = Request(principle, kind, self.max_tokens, critiques)
        prompts, texts = [d.prompt for d in drafts], [d.text for d in drafts]
        said = provider(prompts, texts)
        return {
            key: ("", "unanswered") if reply is None else (reply.text, reply.analysis or "")
            for key, reply in zip(zip(prompts, texts, strict=True), said, strict=True)
        }

    # ---- what comes out

    def _demonstrations(self, drafts: list[Draft], data: Dataset) -> list[Demonstration]:
        """The revisions of all rounds and the share of helpful answers, shuffled."""
        revisions = [
            Demonstration(draft.prompt, step.revision)
            for draft in drafts
            for step in draft.rounds
            if step.revision is not None
        ]
        if not revisions:
            raise ValueError(
                f"critique: none of {len(drafts) * self.rounds} revisions could be used (the log "
                "counts why): take another critic, with judge@critique.critic=local or openai"
            )
        rng = random.Random(self.seed)
        own = data.demonstrations
        told = revisions + rng.sample(own, round(self.helpful * len(own)))
        rng.shuffle(told)
        return told

    def _summary(
        self, number: int, drafts: list[Draft], before: list[str], gold: Any
    ) -> dict[str, Any]:
        """Counts of a round; lengths in words; mean gold before and after, if there is a gold."""
        steps = [draft.rounds[-1] for draft in drafts]
        after = [draft.text for draft in drafts]
        counts = Counter(step.outcome for step in steps)
        words = [len(a.split()) - len(b.split()) for a, b in zip(after, before, strict=True)]
        scores = {}
        if gold is not None:
            prompts = [draft.prompt for draft in drafts]
            for name, texts in (("gold_before", before), ("gold_after", after)):
                found = rewards.score(gold, prompts, texts, "gold").objective
                scores[name] = float(found.mean())
        return {
            "round": number,
            **{outcome: counts[outcome] for outcome in OUTCOMES},
            "length_change": sum(words) / len(words),
            **scores,
            "principles": dict(sorted(Counter(step.principle for step in steps).items())),
        }


class Itself(LocalModel):
    """A loaded policy as its own critic: it replies greedily, as any local model does."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(path=policy.source, dtype=policy.dtype)
        self.policy = policy

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"policy": self.policy.identity()}

    def load(self, device: str | torch.device) -> None:
        self.model, self.tokenizer = self.policy.model, self.policy.tokenizer
        self.context = weights.context_length(self.path) or 10**9


def check_order(stages: list[str]) -> None:
    """ValueError unless the stage critique comes before all that start from its policy."""
    before = [name for name in stages[: stages.index("critique")] if name != "prepare"]
    if before:
        rest = [name for name in stages if name != "critique"]
        raise ValueError(
            f"stages=[{','.join(stages)}] has {before[0]} before critique, which makes what the "
            f"policy of all other stages learns from: stages=[critique,{','.join(rest)}]"
        )


def read(folder: Path) -> list[Demonstration]:
    """What the stage sft learns from, of a finished artifact."""
    return [Demonstration(**row) for row in read_jsonl(folder / "demonstrations.jsonl")]


def _advance(
    draft: Draft, principle: str, critique: str | None, revision: str, outcome: str
) -> None:
    """Write a round down, and take the revision over if there is one; it begins with the space that
    the answer began with.
    """
    if not revision:
        draft.rounds.append(Step(principle, critique, None, outcome))
        return
    space = draft.answer[: len(draft.answer) - len(draft.answer.lstrip())]
    text = space + revision
    outcome = "unchanged" if text == draft.text else "changed"
    draft.rounds.append(Step(principle, critique, text, outcome))
    draft.text = text


def _row(draft: Draft) -> dict[str, Any]:
    rounds = [vars(step) for step in draft.rounds]
    return {"prompt": draft.prompt, "answer": draft.answer, "rounds": rounds}


def _in_words(found: dict[str, Any], rounds: int) -> str:
    """A round on one line."""
    counts = ", ".join(f"{found[o]} {o.replace('_', ' ')}" for o in OUTCOMES if found[o])
    line = f"round {found['round']} of {rounds}: {counts}; {found['length_change']:+.1f} words"
    if "gold_before" in found:
        line += f"; gold {found['gold_before']:.3f} -> {found['gold_after']:.3f}"
    return line
