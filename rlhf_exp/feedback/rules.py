"""A judge that reads no instructions and costs nothing: rules look at the text, and their verdict
is written in the form the task asks for, so it is read as any judge's reply is.

It can stand in for a judge that chooses, too: an option is as likely as the quality that the rules
find in what it stands for, so no language model's taste is in it.

Three points: kind (sentiment above 0), warm (above 0.5), sound (nothing wrong with the form).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlhf_exp.choices import require
from rlhf_exp.config import imported
from rlhf_exp.data import reviews
from rlhf_exp.evaluation.scoring import distinct
from rlhf_exp.feedback import Judge, Question, Verdict
from rlhf_exp.rewards.lexicon import Lexicon

WARM = 0.5  # sentiment above which a text is warm
VARIED = 0.8  # share of different word pairs below which a text repeats itself


@dataclass(kw_only=True)
class Rules(Judge):
    """`rules` reads a completion: reviews (what the embedded world reads in it), lexicon (VADER
    sentiment and form, for real text), or module:function, called as f(prompts=[...],
    completions=[...]) -> one reply per completion, in the form the task asks for.
    """

    rules: str = "reviews"
    temperature: float = 0.25  # of choices: difference in quality that turns even odds to 73 to 27
    position_bias: float = (
        0.0  # of choices: quality that standing first is worth, or last if below 0
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"judge.temperature={self.temperature} must be positive")
        if ":" not in self.rules:
            require(self.rules, (*RULES, "<module>:<function>"), "judge.rules")

    def check(self) -> None:
        self.load("cpu")

    def load(self, device: str | torch.device) -> None:
        if self.rules in RULES:
            self._judge: Callable[[str], Verdict] = RULES[self.rules]()
        else:
            self._function = imported(self.rules, "judge.rules")

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterator[tuple[int, str | None]]:
        if self.rules not in RULES:
            return enumerate(self._replies(questions))
        return enumerate(q.write(self._judge(q.completion)) for q in questions)

    def check_options(self, options: Sequence[str]) -> None:
        if self.rules not in RULES:
            raise ValueError(
                f"judge.rules={self.rules} writes replies and cannot say how likely an option is: "
                f"use {' or '.join(RULES)}"
            )

    def choose(
        self, questions: Sequence[Question], options: Sequence[str], attempt: int
    ) -> Iterator[tuple[int, list[float] | str | None]]:
        return enumerate(self._chosen(q, len(options)) for q in questions)

    def _chosen(self, question: Question, count: int) -> list[float]:
        """Of two completions, by their quality; of one, by how far each of the options, which are a
        scale with the best last, is from its quality.
        """
        quality = self._judge(question.completion).quality
        if question.other is None:
            heights = [-abs(i / (count - 1) - quality) for i in range(count)]
        else:
            heights = [quality + self.position_bias, self._judge(question.other).quality]
        return (torch.tensor(heights) / self.temperature).log_softmax(-1).tolist()

    def _replies(self, questions: Sequence[Question]) -> list[str]:
        """What the user's function says."""
        prompts, completions = [q.prompt for q in questions], [q.completion for q in questions]
        try:
            replies = list(self._function(prompts=prompts, completions=completions))
        except Exception as error:  # whatever it raises
            raise ValueError(
                f"judge.rules={self.rules} raised {type(error).__name__}: {error}"
            ) from error
        if len(replies) != len(questions) or not all(isinstance(r, str) for r in replies):
            raise ValueError(
                f"judge.rules={self.rules} gave {repr(replies)[:60]}; it must return one text per "
                f"completion, {len(questions)} here"
            )
        return replies


def of_review(review: str) -> Verdict:
    """The embedded world's own reading of a completion."""
    reading = reviews.read(review)
    faults = {
        "garbled": reading.unparsed > 0,
        "repetitive": reading.repeated > 0,
        "cut off": reading.unfinished,
    }
    analysis = (
        f"Mean sentiment {reading.sentiment:.2f}; {reading.unparsed:.0%} of the clauses make no "
        f"sense and {reading.repeated:.0%} repeat another."
    )
    return verdict(reading.sentiment, [fault for fault, found in faults.items() if found], analysis)


def by_lexicon() -> Callable[[str], Verdict]:
    """Reads real text: VADER's compound sentiment, repeated word pairs, a proper end."""
    lexicon = Lexicon()
    lexicon.load("cpu")

    def of_text(text: str) -> Verdict:
        sentiment = float(lexicon([""], [text])[0])
        variety = distinct([text], 2) if len(text.split()) > 1 else 1.0
        faults = {
            "repetitive": variety < VARIED,
            "cut off": not text.rstrip(" \n\"')").endswith((".", "!", "?")),
        }
        analysis = (
            f"VADER sentiment {sentiment:.2f}; {variety:.0%} of the word pairs are different."
        )
        return verdict(sentiment, [fault for fault, found in faults.items() if found], analysis)

    return of_text


RULES: dict[str, Callable[[], Callable[[str], Verdict]]] = {
    "reviews": lambda: of_review,
    "lexicon": by_lexicon,
}


def verdict(sentiment: float, faults: list[str], analysis: str) -> Verdict:
    """One point each for kind, warm and sound; a sentence of what is there and what is not."""
    points = {"kind": sentiment > 0, "warm": sentiment > WARM, "sound": not faults}
    merits = [name for name, earned in points.items() if earned]
    lacks = "not kind" if sentiment <= 0 else "not warm"
    misses = [lacks] * (sentiment <= WARM) + faults
    sentence = " but ".join(_listed(words) for words in (merits, misses) if words)
    return Verdict(
        quality=len(merits) / len(points),
        sentence=sentence[0].upper() + sentence[1:] + ".",
        analysis=analysis,
    )


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
