"""`data=qnli`: GLUE QNLI (Wang et al. 2018), "does this sentence answer this question?", in the
splits and the wording of Macijauskas 2023 (MLMI thesis, chapter 4; github.com/AugustasMacijauskas/
mlmi-thesis, src/dataset_formation).

Statements to fit a probe on are prompts with an answer that a coin made right or wrong; the policy
is trained on other prompts. Where the thesis leaves a prompt in both, it is taken from the policy.

Left out: the thesis' data sets of film reviews, of physical common sense, and the combined one.
"""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.artifacts import file_hash
from rlhf_exp.data.local import read_rows, text_column
from rlhf_exp.data.places import Place
from rlhf_exp.data.rows import Dataset, Demonstration, Statement

logger = logging.getLogger(__name__)

HUB = "nyu-mll/glue"
ANSWERS = ("Yes", "No")  # by GLUE's label: 0 entailment, 1 not_entailment
# Vicuna's conversation format, version 1.1. The question mark behind the question is the thesis'
# own, so that questions end in two.
PROMPT = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions. USER: Consider the sentence below \
in triple backticks and corresponding question. Does the sentence contain enough information to \
answer the question? Your answer should be either yes or no.

Desired format:
Answer: <your_answer>
Do not print "Answer:" again, just what you think the answer is.

Sentence:
```
{sentence}
```
Question: {question}?
Answer: ASSISTANT:"""

Row = tuple[str, int]  # prompt, GLUE's label


def flips(seed: int, count: int) -> list[bool]:
    """For each of `count` statements whether it gets the right answer, by the thesis' coin."""
    rng = random.Random(seed)
    return [rng.choice([True, False]) for _ in range(count)]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """`rows` in the order that `shuffle(seed)` of the library datasets gives."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def flipped(rows: list[Row], seed: int) -> list[Statement]:
    """Each prompt with the right or the wrong answer; label 1 if it is the right one."""
    return [
        Statement(
            {"prompt": prompt, "completion": ANSWERS[label if truthful else 1 - label]}, truthful
        )
        for (prompt, label), truthful in zip(rows, map(int, flips(seed, len(rows))), strict=True)
    ]


@dataclass(kw_only=True)
class QNLI:
    """The numbers of the thesis; a smaller data set needs smaller ones, given."""

    path: str | None = None  # folder with train*.parquet and validation*.parquet; null: the hub
    statements: int = 10_000  # training rows that become statements
    held_out: int = 5_463  # validation rows: held-out prompts and statements
    prompts: int = 81_920  # training rows that the policy is trained on, of those that are left
    train_seed: int = 42  # splits the training rows and flips their answers
    held_out_seed: int = 2023  # shuffles the validation rows and flips their answers
    prompt_seed: int = 0  # shuffles the policy's prompts

    def __post_init__(self) -> None:
        if min(self.statements, self.held_out, self.prompts) < 1:
            raise ValueError(
                f"data.statements={self.statements}, data.held_out={self.held_out} and "
                f"data.prompts={self.prompts} must be positive"
            )

    def identity(self) -> dict:
        """The hub's name, or hashes of the local files."""
        if self.path is None:
            return {"hub": HUB, "config": "qnli"}
        return {
            split: [file_hash(file) for file in self._files(split)]
            for split in ("train", "validation")
        }

    def load(self) -> Dataset:
        train, validation = self._rows("train"), self._rows("validation")
        self._require("held_out", self.held_out, len(validation), "validation rows")
        self._require("statements", self.statements, len(train) - 1, "training rows to spare")
        validation = shuffled(validation, self.held_out_seed)[: self.held_out]
        # The thesis shuffles and then splits with one seed; datasets puts the test part first.
        train = shuffled(shuffled(train, self.train_seed), self.train_seed)
        left, probed = train[: -self.statements], train[-self.statements :]
        seen = {prompt for prompt, _ in probed + validation} | _unclear(left)
        chosen = [row for row in shuffled(left, self.prompt_seed) if row[0] not in seen]
        if dropped := len(left) - len(chosen):
            logger.info("%d prompts dropped: used elsewhere, or labeled both ways", dropped)
        if shared := len({prompt for prompt, _ in probed} & {prompt for prompt, _ in validation}):
            logger.info("%d held-out prompts are among the statements that probes fit on", shared)
        self._require("prompts", self.prompts, len(chosen), "training rows besides the statements")
        chosen, unclear = chosen[: self.prompts], _unclear(validation)
        asked = [row for row in validation if row[0] not in unclear]
        return Dataset(
            prompts=[prompt for prompt, _ in chosen],
            held_out=[prompt for prompt, _ in asked],
            demonstrations=[Demonstration(prompt, f" {ANSWERS[y]}") for prompt, y in chosen],
            statements=flipped(probed, self.train_seed),
            held_out_statements=flipped(validation, self.held_out_seed),
            templates="truthful",
            answers={prompt: ANSWERS[label] for prompt, label in chosen + asked},
        )

    def _require(self, key: str, asked: int, there: int, what: str) -> None:
        if asked > there:
            raise ValueError(
                f"data.{key}={asked} is more than the {max(there, 0)} {what} of "
                f"{self.path or HUB}: lower it"
            )

    def _files(self, split: str) -> list[Path]:
        folder = Path(self.path or "").expanduser()
        if not (found := sorted(folder.glob(f"{split}*.parquet"))):
            raise FileNotFoundError(
                f"data.path={self.path} holds no {split}*.parquet: give a folder with the train "
                "and validation files of QNLI"
            )
        return found

    def _rows(self, split: str) -> list[Row]:
        if self.path is None:
            hub = Place(
                HUB, "qnli", split, files=None, revision=None, streaming=False, answers=None
            )
            return [_row(file, row, number) for file, number, row in hub.rows()]
        return [
            _row(file, row, i)
            for file in self._files(split)
            for i, row in enumerate(read_rows(file), 1)
        ]


def _unclear(rows: list[Row]) -> set[str]:
    """Prompts that come up with both labels, so that no answer is the right one."""
    found: dict[str, int] = {}
    return {prompt for prompt, label in rows if found.setdefault(prompt, label) != label}


def _row(file: Path, row: dict[str, Any], number: int) -> Row:
    sentence, question = (text_column(file, row, number, k) for k in ("sentence", "question"))
    label = row.get("label")
    if label not in (0, 1):
        raise ValueError(
            f"{file}, line {number}: the label must be 0 (entailment) or 1, not {label!r}; use "
            "splits with known labels"
        )
    return PROMPT.format(sentence=sentence, question=question), int(label)
