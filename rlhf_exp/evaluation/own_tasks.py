"""The rows of the benchmarks that need no network: of the embedded worlds, and of capitals.

    python -m rlhf_exp.evaluation.own_tasks    # writes rlhf_exp/evaluation/tasks/*.jsonl again

A row has a prompt, choices and the index of the right one. The files are kept, so that what a
benchmark asks stays the same when a world changes.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_exp.data import reviews
from rlhf_exp.data.facts import Facts
from rlhf_exp.data.local import read_jsonl, write_jsonl

TASKS = Path(__file__).parent / "tasks"
CAPITALS = Path(__file__).parents[2] / "examples" / "capitals" / "prompts.jsonl"
COUNT = 200  # rows about reviews, each of another film
STRONG = 0.6  # least weight of the adjectives that tell a mood

Rows = list[dict[str, Any]]


def facts() -> Rows:
    """Held-out questions of data=facts: half of the answers are yes."""
    data = Facts(demonstrations=0).load()
    return [
        {"prompt": p, "choices": ["yes", "no"], "answer": ["yes", "no"].index(data.answers[p][1:])}
        for p in data.held_out
    ]


def reviews_grammar() -> Rows:
    """A review's last clause as the world wrote it, or with two neighboring words swapped so that
    its grammar cannot parse it.
    """
    rng, rows = random.Random(0), []
    for film in _films():
        *opening, last = _clauses(rng)
        told = film + "".join(f" {clause} ." for clause in opening)
        rows.append(_row(rng, told, f"{last} .", [f"{_garbled(rng, last)} ."]))
    return rows


def reviews_mood() -> Rows:
    """A review in a strong mood goes on in it, or turns to the opposite: adjectives of the same
    weight, good and bad in half of the rows each.
    """
    good = sorted((w for w, x in reviews.ADJECTIVES.items() if x >= STRONG), key=_weight)
    bad = sorted((w for w, x in reviews.ADJECTIVES.items() if x <= -STRONG), key=_weight)
    rng, rows = random.Random(0), []
    for number, film in enumerate(_films()):
        same, opposite = (good, bad) if number % 2 else (bad, good)
        *aspects, last = rng.sample(reviews.ASPECTS, 3)
        opening = "".join(f" the {a} was {rng.choice(same)} ." for a in aspects)
        k = rng.randrange(len(same))
        right, wrong = (f"the {last} was {words[k]} ." for words in (same, opposite))
        rows.append(_row(rng, film + opening, right, [wrong]))
    return rows


def capitals() -> Rows:
    """The capital of each country of examples/capitals, among three others."""
    known = read_jsonl(CAPITALS)
    rng, rows = random.Random(0), []
    for row in known:
        others = [r["answer"] for r in known if r["answer"] != row["answer"]]
        rows.append(_row(rng, row["prompt"], row["answer"], rng.sample(others, 3)))
    return rows


FILES: dict[str, Callable[[], Rows]] = {
    "facts": facts,
    "reviews_grammar": reviews_grammar,
    "reviews_mood": reviews_mood,
    "capitals": capitals,
}


def write(folder: Path = TASKS) -> None:
    """Make every file in `folder`."""
    for name, make in FILES.items():
        write_jsonl(folder / f"{name}.jsonl", make())


def _films() -> list[str]:
    """Held-out prompts of data=reviews."""
    return reviews.Reviews(demonstrations=0).load().held_out[:COUNT]


def _weight(adjective: str) -> float:
    return abs(reviews.ADJECTIVES[adjective])


def _clauses(rng: random.Random) -> list[str]:
    """Two or three, without their full stops."""
    while True:
        found = reviews.write(rng).strip().removesuffix(" .").split(" . ")
        if len(found) > 1:
            return found


def _garbled(rng: random.Random, clause: str) -> str:
    words = clause.split()
    swapped = [
        " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])
        for i in range(len(words) - 1)
    ]
    return rng.choice([c for c in swapped if reviews.clause_sentiment(c) is None])


def _row(rng: random.Random, prompt: str, right: str, wrong: list[str]) -> dict[str, Any]:
    choices = rng.sample([right, *wrong], 1 + len(wrong))
    return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}


if __name__ == "__main__":
    write()
