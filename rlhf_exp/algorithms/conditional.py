"""Learning under labels that tell how good a completion is, and asking for the best one: Quark (Lu
et al. 2022, arXiv 2205.13636), ALT (2024, arXiv 2407.16970) with its RM, LMC and LMU variants, and
SteerLM.

Each step labels the completions of the pool, puts the label before the prompt, and imitates
(imitation.py). From then on the policy is sampled with the best label as its prefix, which is saved
with it. What tells the methods apart is the labelling (labels.py) and numbers (conf/algo/).

Left out: the unused extra token of Quark's release, and its token-regression head.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlhf_exp import tokens
from rlhf_exp.algorithms.imitation import Examples, Imitation
from rlhf_exp.algorithms.pool import Pool, balanced, survivors
from rlhf_exp.choices import require
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset
from rlhf_exp.feedback import Feedback
from rlhf_exp.policy import Policy, Rollouts
from rlhf_exp.trial import Trial

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Conditional(Imitation):
    """Settings; conf/algo/quark.yaml, alt_rm.yaml, alt_lmc.yaml, alt_lmu.yaml and steerlm.yaml hold
    the methods.
    """

    labels: Any  # what is said of completions, see labels.py
    form: str = "{label}"  # what stands before the prompt
    tokens: list[str] = field(default_factory=list)  # control tokens the vocabulary gets
    token_start: str = "distribution"  # their embeddings: distribution of the others, or end
    # share of the pool forgotten before new completions are added, drawn alike from every label (of
    # every prompt, where labels are each prompt's own), or under a judge from every prompt
    drop_factor: float = 0.0
    # completions of each distinct prompt to learn from, balanced by label; null: the whole pool
    per_prompt: int | None = None
    fill: bool = False  # top up what balance leaves short of per_prompt
    # completions cut off by length end after all where they end a sentence
    end_sentences: bool = False
    updates: int | None = 30  # optimizer steps per step; null: by epochs
    epochs: float | None = None  # passes over what is learned from, in place of updates
    restart_optimizer: bool = False  # and schedule, every step
    reference_sees_label: bool = False  # Quark's reference sees the bare prompt, ALT's the label
    compare: int = 64  # held-out prompts sampled under the best and the worst label; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{label}" not in self.form:
            raise ValueError(f"algo.form={self.form!r} must hold {{label}}")
        require(self.token_start, ("distribution", "end"), "algo.token_start")
        if (self.updates is None) == (self.epochs is None):
            raise ValueError(
                f"algo.updates={self.updates} and algo.epochs={self.epochs}: give one of them and "
                "set the other to null"
            )
        if not 0 <= self.drop_factor <= 1:
            raise ValueError(f"algo.drop_factor={self.drop_factor} must be between 0 and 1")
        if self.per_prompt is not None and self.per_prompt < self.labels.kinds:
            raise ValueError(
                f"algo.per_prompt={self.per_prompt} is less than one completion for each of "
                f"{self.labels.kinds} labels: raise it, or set it to null"
            )
        quantiles, whole = self.labels.quantiles, self.batch * self.samples
        if self.labels.scope == "prompt" and self.samples < quantiles:
            raise ValueError(
                f"algo.samples={self.samples} completions of a prompt cannot be cut into "
                f"{quantiles} quantiles: raise it, or name fewer labels"
            )
        if self.labels.scope == "pool" and whole < quantiles:
            raise ValueError(
                f"algo.batch={self.batch} * algo.samples={self.samples} completions cannot be cut "
                f"into {quantiles} quantiles: raise one of them, or name fewer labels"
            )
        if self.fill and self.per_prompt is None:
            raise ValueError("algo.fill=true tops up algo.per_prompt, which is null: give it")
        if not self.fill and (self.per_prompt or 0) % self.labels.kinds:
            raise ValueError(
                f"algo.per_prompt={self.per_prompt} cannot be shared equally among "
                f"{self.labels.kinds} labels: give a multiple, or set algo.fill=true"
            )
        if (self.updates is not None and self.updates < 1) or (self.epochs or 1) <= 0:
            raise ValueError(
                f"algo.updates={self.updates} or algo.epochs={self.epochs} must be positive"
            )
        if self.compare < 0:
            raise ValueError(f"algo.compare={self.compare} must not be negative")
        if self.tokens and self.reference_sees_label and self.kl_coef:
            raise ValueError(
                "algo.tokens are unknown to the reference: set algo.reference_sees_label=false"
            )

    def check(self, policy: Policy, data: Dataset) -> None:
        """Refuse prompts that hold a control token, and a judge that cannot be asked."""
        super().check(policy, data)
        self.labels.check()
        for text in [*data.prompts, *data.held_out]:
            if found := [name for name in self.tokens if name.strip() in text]:
                raise ValueError(
                    f"the prompt {text[:60]!r} contains the control token {found[0].strip()!r}: "
                    "remove the prompt, or choose other algo.tokens"
                )

    def setup(self, policy: Policy, reward: Any, data: Dataset, trial: Trial) -> None:
        if known := [t for t in self.tokens if t in policy.tokenizer.get_vocab()]:
            raise ValueError(
                f"the policy knows the control token {known[0]!r} already: start from one that was "
                "not trained with it, or choose other algo.tokens and algo.labels.names"
            )
        self.missing = list(self.tokens)  # not in the vocabulary yet
        self.plain = policy.plain  # what stands before prompts whatever the label
        self._check_room(policy, [*data.prompts, *data.held_out])
        self.labels.load(policy.device, trial.directory)
        self.pool, self.rng = Pool(), np.random.default_rng(trial.seed)
        self.held_out = data.held_out[: self.compare]
        super().setup(policy, reward, data, trial)

    def _check_room(self, policy: Policy, prompts: list[str]) -> None:
        """Every prompt fits into the context behind the longest label. Of labels in free words
        `self.room` says how many tokens they may have; null: as many as they like.
        """
        context = getattr(policy.model.config, "max_position_embeddings", None)
        names = [] if self.tokens else self.labels.names
        longest = max(names, key=lambda n: len(policy.encode([n])[0]), default="")
        encoded = policy.encode(prompts, [self._before(longest)] * len(prompts))
        tokens.check_lengths(encoded, prompts, context, policy.max_new_tokens)
        left = None if context is None else context - max(map(len, encoded))
        self.room = None if left is None else left - policy.max_new_tokens

    def _add_tokens(self) -> None:
        """Teach the policy the control tokens; the start is evaluated without them, so that it is
        the same for all algorithms.
        """
        if self.missing:
            self.policy.add_control_tokens(self.missing, self.token_start)
        self.missing = []

    # ---- one step

    def learn(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        self._add_tokens()
        self.prepare()
        # 1. the pool forgets, and takes in what could be judged
        metrics = self._collect(rollouts, step)
        # 2. every row is labelled anew, and some are chosen
        labels, ranks = self.labels.label(self.pool)
        rows = self._chosen(ranks)
        # 3. imitate the chosen ones behind their labels
        if self.restart_optimizer:
            self.descent.restart()
        updates = self.updates
        if updates is None:
            assert self.epochs is not None
            updates = max(1, round(self.epochs * len(rows) / self.minibatch))
        spans = 1 if self.restart_optimizer else self.steps
        metrics |= self.imitate(
            self._examples(rows, labels),
            updates,
            done=0 if spans == 1 else step * updates,
            total=spans * updates,
        )
        # 4. from here on, ask for the best
        self.policy.prefix = self._before(self.labels.best(self.pool, self.rng))
        self._write_new_rows(step)
        return metrics | self._counts(ranks, rows) | self._comparison(labels, ranks)

    def _collect(self, rollouts: Rollouts, step: int) -> dict[str, float]:
        """Drop, judge, add."""
        unjudged = 0
        if step == 0 and self.start is not None:
            unjudged = self._add(*self.given())
        elif self.drop_factor and len(self.pool):
            cells = self.labels.cells(self.pool)
            self.pool.keep(survivors(cells, self.drop_factor, self.rng))
        self.new = len(self.pool) if step else 0  # first row that this step brings
        return {"pool/unjudged": float(unjudged + self._add(rollouts, None))}

    def _add(self, rollouts: Rollouts, said: list[Feedback | None] | None) -> int:
        """Completions of which nothing usable is said are not added; returns how many those are."""
        if said is not None and self.labels.asks:
            said = [self.labels.usable(f) for f in said]  # a file may say what no judge could
        else:
            said = self.labels.judge(rollouts)
        if said is None:
            self.pool.add(rollouts)
            return 0
        kept = [i for i, f in enumerate(said) if f is not None and self._fits(f.text)]
        if not kept and not len(self.pool):
            raise ValueError(
                f"the judge said nothing usable of any of {len(said)} completions: try it on one "
                "by hand, or use feedback@algo.labels.feedback=rules"
            )
        usable = [f for i in kept if (f := said[i]) is not None]
        if kept:
            self.pool.add(
                rollouts.select(torch.tensor(kept)),
                [f.text for f in usable],
                [0.0 if f.score is None else f.score for f in usable],
            )
        return len(said) - len(kept)

    def _fits(self, text: str) -> bool:
        """Whether a label in free words leaves room for prompt and completion."""
        if self.room is None or self.labels.names:
            return True
        return len(self.policy.encode([""], [text])[0]) <= self.room

    def _chosen(self, ranks: np.ndarray) -> np.ndarray:
        if self.per_prompt is None:
            return np.arange(len(self.pool))
        return balanced(
            self.pool.groups(),
            ranks,
            np.asarray(self.pool.ended),
            count=self.per_prompt,
            kinds=self.labels.kinds,
            fill=self.fill,
            rng=self.rng,
        )

    def _before(self, label: str) -> str:
        """What stands before a prompt under `label`."""
        return self.form.replace("{label}", label) + self.plain

    def _examples(self, rows: np.ndarray, labels: list[str]) -> Examples:
        prompts = [self.pool.prompts[i] for i in rows]
        responses = [self._target(i) for i in rows]
        conditioned = self.policy.assemble(
            prompts, responses, [self._before(labels[i]) for i in rows]
        )
        bare = None
        if self.kl_coef and not self.reference_sees_label:
            bare = self.policy.assemble(prompts, responses, [self.plain] * len(rows))
        weights = torch.ones(len(rows), device=self.policy.device)
        return Examples(conditioned, weights, bare)

    def _target(self, row: int) -> list[int]:
        """What was sampled; a completion cut off by length gets no end-of-text token, unless it
        happens to end a sentence and `end_sentences` says that this will do.
        """
        response = self.pool.responses[row]
        if self.pool.ended[row] or not self.end_sentences:
            return response
        if self.pool.completions[row].rstrip().endswith((".", "?", "!")):
            return [*response, self.policy.tokenizer.eos_token_id]
        return response

    # ---- what is reported

    def _counts(self, ranks: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        sizes = np.bincount(ranks, minlength=self.labels.kinds)
        scores = np.asarray(self.pool.scores)
        means = {
            f"labels/{i}/reward": float(scores[ranks == i].mean())
            for i in range(self.labels.kinds)
            if sizes[i]
        }
        counts = {f"labels/{i}/rows": float(n) for i, n in enumerate(sizes)}
        pool = {"pool/rows": float(len(self.pool)), "pool/learned": float(len(rows))}
        return pool | counts | means | self.labels.metrics()

    def _comparison(self, labels: list[str], ranks: np.ndarray) -> dict[str, float]:
        """Mean reward on held-out prompts under the best and the worst label of the pool."""
        if not self.held_out:
            return {}
        asked = self.policy.prefix
        found = {"labels/best_asked": self.look(self.held_out)}
        self.policy.prefix = self._before(labels[int(np.argmax(ranks))])
        found["labels/worst_asked"] = self.look(self.held_out)
        self.policy.prefix = asked
        return found

    def _write_new_rows(self, step: int) -> None:
        """pool/step-<k>.jsonl: what this step brought, under the keys of published files."""
        file = self.trial.directory / "pool" / f"step-{step + 1:06d}.jsonl"
        write_jsonl(file, self.pool.rows(self.new))

    # ---- resume

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "pool": vars(self.pool),
            "prefix": self.policy.prefix,
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._add_tokens()
        super().load_state(state)
        self.pool = Pool(**state["pool"])
        self.policy.prefix = state["prefix"]
        self.rng.bit_generator.state = state["rng"]
