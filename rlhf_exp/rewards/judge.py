"""A judge scores completions from 1 to 10, and the expected score is the reward (direct RLAIF: Lee
et al. 2023, arXiv 2309.00267).

"10" may be two tokens. A local model then reads the first and is asked for the second, and "1" is
what does not go on so. An endpoint tells of a second token only after the first one that it said:
if that was "1", the same is done; else "10" counts as unlikely, and "1" keeps the share of both.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.feedback import Question, Verdict
from rlhf_exp.feedback.asking import Asker
from rlhf_exp.feedback.fences import NOTICE, fenced
from rlhf_exp.rewards import Fitting, Reward

logger = logging.getLogger(__name__)

SCORES = tuple(str(i) for i in range(1, 11))
REPLY_TOKENS = 4  # enough to see that a reply in words is more than a score


def expected_score(log_probabilities: Tensor) -> Tensor:
    """Expected score, rescaled from [1, 10] to [-1, 1]: [n, 10] -> [n]. Log-probabilities of the
    scores in ascending order, up to a constant.
    """
    points = torch.arange(1, 11, dtype=log_probabilities.dtype)
    expected = (log_probabilities.softmax(-1) * points).sum(-1)
    return 2 * (expected - 1) / 9 - 1


@dataclass(kw_only=True)
class JudgeScore(Reward):
    """In [-1, 1]. A text that gets no usable score gets `missing`, in the whole run; a second one
    in a batch stops the run if that makes too large a share of it.
    """

    judge: Any  # who is asked
    instruction: str  # what is judged
    tries: int = 5  # times a question is asked before its replies count as off format
    # JSONL file of replies, shared by the runs that name it; null: nothing is kept
    cache: str | None = "artifacts/judge.jsonl"
    missing: float = -1.0  # the score of a text without one
    most_missing: float = 0.1  # share of a batch that may be without one

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"reward.tries={self.tries} must be at least 1")
        if not -1 <= self.missing <= 1:
            raise ValueError(f"reward.missing={self.missing} must be in [-1, 1], as all scores are")
        if not 0 <= self.most_missing <= 1:
            raise ValueError(f"reward.most_missing={self.most_missing} must be in [0, 1]")
        if not self.instruction.strip():
            raise ValueError("reward.instruction is empty: say what the judge is to look for")
        self.asker = Asker(self.judge, self.tries)
        self._known: dict[bytes, float] = {}  # score by hash of the texts, NaN: it got none

    def check(self, fitting: Fitting) -> None:
        self.judge.check_options(SCORES)
        self.judge.check()

    def load(self, device: str | torch.device) -> None:
        self.judge.load(device)
        if self.cache is not None:
            self.asker.open(Path(self.cache), "reward.cache")

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        scores = self._scores(prompts, completions)
        self._count(int(scores.isnan().sum()), len(scores))
        return torch.where(scores.isnan(), torch.tensor(self.missing), scores)

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Which completions have no score of their own."""
        return {"judge_missing": self._scores(prompts, completions).isnan().float()}

    def _scores(self, prompts: list[str], completions: list[str]) -> Tensor:
        """Score of each text [n], NaN without one; no text is asked twice."""
        rows = list(zip(prompts, completions, strict=True))
        keys = [hashlib.sha256("\0".join(row).encode()).digest() for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        if new:
            questions = [self._question(*row) for row in new.values()]
            answers = self.asker.choices(questions, SCORES)
            unknown = [torch.nan] * len(SCORES)
            told = torch.tensor([unknown if a is None else a for a in answers])
            self._known |= zip(new, expected_score(told).tolist(), strict=True)
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float32)

    def _count(self, missing: int, texts: int) -> None:
        """Tell of texts without a score; ValueError if there are too many."""
        if not missing:
            return
        counts = self.asker.counts
        so_far = f"{counts['malformed']} replies off format and {counts['failed']} missing so far"
        if missing > 1 and missing > self.most_missing * texts:
            raise ValueError(
                f"the judge gave no score to {missing} of {texts} texts ({so_far}), more than "
                f"reward.most_missing={self.most_missing} allows: see to reward.judge and "
                "reward.instruction, or raise reward.most_missing"
            )
        logger.info("judge: %d of %d texts get reward.missing (%s)", missing, texts, so_far)

    def _question(self, prompt: str, completion: str) -> Question:
        shown = [fenced("prompt", prompt), fenced("answer", completion)]
        asked = f"You rate an answer to a prompt. {NOTICE}"
        form = "Reply with a whole number from 1, the worst, to 10, the best, and nothing else."
        text = "\n\n".join([asked, *shown, f"{self.instruction}\n{form}\nAnswer:"])
        return Question((("user", text),), REPLY_TOKENS, prompt, completion, _in_points)


def _in_points(verdict: Verdict) -> str:
    """The score that rules would reply with."""
    return str(1 + round(9 * verdict.quality))
