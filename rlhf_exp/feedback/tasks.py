"""What a judge is asked of a completion, and how its reply is read (ALT, arXiv 2407.16970).

`Categories` is ALT_LMC: one of a few names, and nothing else is taken for one; the authors' code
takes any reply. `FreeForm` is ALT_LMU: an analysis, a sentence and a score, read as their code
does, but the score must be in its range.

Left out: several attributes at once.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from rlhf_exp.feedback import Feedback, Question, Verdict


@dataclass(kw_only=True)
class Categories:
    """Which of `names` fits the completion best?"""

    names: list[str]  # best first
    instruction: str  # how to choose
    # prompts and completions with their category, shown to the judge before it is asked
    examples: list[dict[str, str]] = field(default_factory=list)
    attributes: dict[str, str] | None = None  # of each name, for SteerLM; null: none
    max_tokens: int = 10  # longest reply

    def __post_init__(self) -> None:
        self._by_name = {_folded(name): name for name in self.names}
        if len(self.names) < 2 or len(self._by_name) < len(self.names) or "" in self._by_name:
            raise ValueError(
                f"feedback.task.names={self.names} must be at least two different names"
            )
        _check_examples(self.examples, "category")
        for example in self.examples:
            if self.parse(example["category"]) is None:
                raise ValueError(
                    f"feedback.task.examples: {example['category']!r} is none of "
                    f"feedback.task.names={self.names}: give examples of these, or "
                    "feedback.task.examples=[]"
                )
        if self.attributes is not None and set(self.attributes) != set(self.names):
            raise ValueError(
                f"feedback.task.attributes has {', '.join(self.attributes)}: give one for each of "
                f"feedback.task.names={self.names}, or feedback.task.attributes=null"
            )

    def question(self, prompt: str, completion: str) -> Question:
        """The instruction and the names; the examples, each with its category; the completion."""
        names = "\n".join(["Categories, best first:", *self.names])
        shown = [
            (_shown(e["prompt"], e["completion"], "Category:"), e["category"])
            for e in self.examples
        ]
        asked = _shown(prompt, completion, "Category:")
        turns = _turns(f"{self.instruction}\n\n{names}", shown, asked)
        return Question(turns, self.max_tokens, prompt, completion, self.write)

    def parse(self, reply: str) -> Feedback | None:
        """The name that is the whole reply, up to case, space around it and a full stop."""
        name = self._by_name.get(_folded(reply))
        return None if name is None else Feedback(name)

    def write(self, verdict: Verdict) -> str:
        """The name at the height of the verdict's quality."""
        return self.names[round((1 - verdict.quality) * (len(self.names) - 1))]


@dataclass(kw_only=True)
class FreeForm:
    """What is good and bad in the completion, in a sentence, and how many points does it earn?"""

    instruction: str  # what is judged
    criteria: list[str]  # a point for each
    words: int = 10  # asked for in the sentence
    # prompts and completions with analysis, feedback and score, shown to the judge
    examples: list[dict[str, Any]] = field(default_factory=list)
    max_tokens: int = 200  # longest reply

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("feedback.task.criteria is empty: name at least one thing to score")
        _check_examples(self.examples, "analysis", "feedback", "score")
        for example in self.examples:
            if self.parse(_reply(example)) is None:
                raise ValueError(
                    f"feedback.task.examples: {_reply(example)!r} is no reply that could be read; "
                    f"give analysis, feedback and a score from 0 to {self.highest}"
                )

    @property
    def highest(self) -> int:
        """The best score; 0 is the worst."""
        return len(self.criteria)

    def question(self, prompt: str, completion: str) -> Question:
        """The instruction, the criteria and the form of the reply; the examples; the completion."""
        form = (
            f"It earns a point for each of these: {', '.join(self.criteria)}. Reply in three "
            "lines:\n"
            "Analysis: <what it does well, and what it lacks>\n"
            f"Feedback: <one sentence of at most {self.words} words that names its strengths and "
            "weaknesses>\n"
            f"Score: <its points, from 0 to {self.highest}>"
        )
        shown = [(_shown(e["prompt"], e["completion"]), _reply(e)) for e in self.examples]
        turns = _turns(f"{self.instruction}\n\n{form}", shown, _shown(prompt, completion))
        return Question(turns, self.max_tokens, prompt, completion, self.write)

    def parse(self, reply: str) -> Feedback | None:
        """Analysis, feedback and score, each labelled at the start of a line; None if one is
        missing or empty, or the score is no number in its range.
        """
        found = REPLY.search(reply)
        if found is None or float(found["score"]) > self.highest:
            return None
        analysis, text = (" ".join(found[part].split()) for part in ("analysis", "feedback"))
        return Feedback(text, float(found["score"]), analysis)

    def write(self, verdict: Verdict) -> str:
        """The verdict in the three lines asked for."""
        score = f"{verdict.quality * self.highest:.3g}"
        return _reply({"analysis": verdict.analysis, "feedback": verdict.sentence, "score": score})


REPLY = re.compile(
    r"^\s*Analysis:\s*(?P<analysis>\S.*?)\s*"
    r"^\s*Feedback:\s*(?P<feedback>\S.*?)\s*"
    r"^\s*Score:\s*(?P<score>\d+(\.\d+)?)",
    re.MULTILINE | re.DOTALL,
)


def _folded(name: str) -> str:
    return name.strip().removesuffix(".").casefold()


def _shown(prompt: str, completion: str, *more: str) -> str:
    return "\n".join([f"Prompt: {prompt.strip()}", f"Answer: {completion.strip()}", *more])


def _turns(
    introduction: str, shown: list[tuple[str, str]], asked: str
) -> tuple[tuple[str, str], ...]:
    """A conversation: examples with the replies wanted, then what is asked. Small models keep to a
    form that they seem to have used before; told of it in one turn, they do not.
    """
    turns = [turn for text, reply in shown for turn in (("user", text), ("assistant", reply))]
    turns.append(("user", asked))
    turns[0] = ("user", f"{introduction}\n\n{turns[0][1]}")
    return tuple(turns)


def _reply(parts: dict[str, Any]) -> str:
    return f"Analysis: {parts['analysis']}\nFeedback: {parts['feedback']}\nScore: {parts['score']}"


def _check_examples(examples: list[dict[str, Any]], *more: str) -> None:
    for number, example in enumerate(examples, 1):
        wanted = {"prompt", "completion", *more}
        if set(example) != wanted:
            raise ValueError(
                f"feedback.task.examples: number {number} has {', '.join(sorted(example))}; it "
                f"needs {', '.join(sorted(wanted))}"
            )
