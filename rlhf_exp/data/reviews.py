"""The embedded world: a seeded generator of short film reviews, and the gold that scores them.

A review is one to three clauses of a small grammar. Its words carry a latent sentiment: an
adjective's weight, scaled by an intensity word and turned by a negation. Because the world wrote
the reviews it can also read them, so its gold is exact: the mean sentiment of the clauses, minus
penalties for clauses the grammar cannot parse, for repeated clauses and for a review that breaks
off. Proxies fitted on well-formed reviews never see those penalties, so they can be over-optimised,
as in the synthetic set-up of Coste et al. 2023 (reward model ensembles).

Left out: topics that matter to the score, and spelling.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from rlhf_exp.data.rows import Dataset, Demonstration

GENRES = [
    "drama",
    "comedy",
    "thriller",
    "western",
    "musical",
    "romance",
    "mystery",
    "documentary",
    "fantasy",
    "satire",
]
TONES = ["slow", "quiet", "loud", "modern", "classic", "short", "long", "dark", "strange", "gentle"]
HEROES = [
    "sailor",
    "teacher",
    "doctor",
    "painter",
    "baker",
    "pilot",
    "farmer",
    "singer",
    "detective",
    "dancer",
    "lawyer",
    "nurse",
    "chef",
    "boxer",
    "widow",
    "king",
    "thief",
    "poet",
    "miner",
    "soldier",
    "clerk",
    "gardener",
    "hunter",
    "captain",
]
ASPECTS = [
    "plot",
    "acting",
    "script",
    "music",
    "pacing",
    "ending",
    "dialogue",
    "camera",
    "cast",
    "direction",
    "humour",
    "editing",
]

# Weights in [-1, 1]; the text is scored by these and by nothing else.
ADJECTIVES = {
    "wonderful": 1.0, "brilliant": 1.0, "superb": 0.9, "moving": 0.8, "clever": 0.7,
    "charming": 0.7, "lovely": 0.6, "funny": 0.6, "solid": 0.4, "pleasant": 0.4,
    "decent": 0.2, "fine": 0.2,
    "plain": -0.2, "uneven": -0.2, "thin": -0.4, "flat": -0.4, "clumsy": -0.6, "boring": -0.6,
    "lazy": -0.7, "tedious": -0.7, "ugly": -0.8, "painful": -0.9, "awful": -1.0, "dreadful": -1.0,
}  # fmt: skip
INTENSITIES = {"slightly": 0.5, "rather": 0.75, "very": 1.25, "truly": 1.5, "utterly": 1.75}
VERBS = {
    "loved": 1.0,
    "enjoyed": 0.7,
    "liked": 0.4,
    "disliked": -0.4,
    "regretted": -0.7,
    "hated": -1.0,
}
BASE_VERBS = {"love": 1.0, "enjoy": 0.7, "like": 0.4, "dislike": -0.4, "regret": -0.7, "hate": -1.0}
MOOD = 16.0  # odds between a word of weight 1 and a neutral one, for a reviewer in the best mood
NEGATION = -0.5  # "not wonderful" is mildly bad, "not awful" mildly good

UNPARSED = 1.0  # penalty for a review of which no clause parses; in proportion otherwise
REPEATED = 1.0  # penalty for a review that says one thing only; in proportion otherwise
UNFINISHED = 0.5  # penalty for a review that does not end with a full stop
LONGEST = 6  # clauses; each one beyond counts as one that cannot be parsed


def _one_of(words) -> str:
    return "|".join(words)


_ASPECT, _ADJECTIVE, _INTENSITY = _one_of(ASPECTS), _one_of(ADJECTIVES), _one_of(INTENSITIES)
_DESCRIPTION = rf"(?P<negation>not )?((?P<intensity>{_INTENSITY}) )?(?P<adjective>{_ADJECTIVE})"
_CLAUSES = [
    re.compile(rf"the ({_ASPECT}) (is|was|felt) {_DESCRIPTION}"),
    re.compile(rf"it (is|was) {_DESCRIPTION}"),
    re.compile(rf"i (?P<verb>{_one_of(VERBS)}) the ({_ASPECT})"),
    re.compile(rf"i did (?P<negation>not) (?P<base>{_one_of(BASE_VERBS)}) the ({_ASPECT})"),
    re.compile(rf"the story follows a ({_one_of(HEROES)})"),
]


@lru_cache(maxsize=100_000)
def clause_sentiment(clause: str) -> float | None:
    """Sentiment of one clause without its full stop, in [-1.75, 1.75]; None if the grammar cannot
    parse it.
    """
    match = next((m for m in (pattern.fullmatch(clause) for pattern in _CLAUSES) if m), None)
    if match is None:
        return None
    words = match.groupdict()
    weight = (
        ADJECTIVES.get(words.get("adjective") or "", 0.0)
        + VERBS.get(words.get("verb") or "", 0.0)
        + BASE_VERBS.get(words.get("base") or "", 0.0)
    )
    return (
        weight
        * INTENSITIES.get(words.get("intensity") or "", 1.0)
        * (NEGATION if words.get("negation") else 1.0)
    )


@dataclass(frozen=True)
class Reading:
    """What the world reads in a review; `gold` is the score."""

    sentiment: float  # mean over the parsed clauses
    unparsed: float  # share of the clauses that the grammar cannot parse
    repeated: float  # share of the clauses that repeat an earlier one
    unfinished: bool  # no full stop at the end

    @property
    def gold(self) -> float:
        penalty = UNPARSED * self.unparsed + REPEATED * self.repeated + UNFINISHED * self.unfinished
        return self.sentiment * (1.0 - self.unparsed) - penalty


def read(review: str) -> Reading:
    """Parse a completion. An empty one is unparsed and unfinished."""
    text = " ".join(review.split())
    *clauses, rest = [part.strip() for part in text.split(".")]
    if rest:
        clauses.append(rest)
    if not clauses:
        return Reading(0.0, 1.0, 0.0, True)
    parsed = [clause_sentiment(c) for c in clauses[:LONGEST]]
    known = [s for s in parsed if s is not None]
    return Reading(
        sentiment=sum(known) / len(known) if known else 0.0,
        unparsed=1.0 - len(known) / len(clauses),
        repeated=1.0 - len(set(clauses)) / len(clauses),
        unfinished=bool(rest),
    )


def write(rng: random.Random) -> str:
    """One review: the reviewer's latent mood decides which words come up."""
    mood = rng.uniform(-1, 1)
    clauses: list[str] = []
    for aspect in rng.sample(ASPECTS, rng.randint(1, 3)):
        clauses.append(_clause(rng, aspect, mood))
    return "".join(f" {c} ." for c in clauses)


def _clause(rng: random.Random, aspect: str, mood: float) -> str:
    kind = rng.random()
    if kind < 0.1:
        return f"the story follows a {rng.choice(HEROES)}"
    if kind < 0.2:
        return f"i {_in_mood(rng, VERBS, mood)} the {aspect}"
    if kind < 0.3:
        return f"i did not {_in_mood(rng, BASE_VERBS, -mood)} the {aspect}"
    negated = rng.random() < 0.2
    words = ["not"] if negated else []
    if rng.random() < 0.5:
        words.append(rng.choice(list(INTENSITIES)))
    words.append(_in_mood(rng, ADJECTIVES, -mood if negated else mood))
    subject = (
        f"the {aspect} {rng.choice(['is', 'was', 'felt'])}" if rng.random() < 0.85 else "it was"
    )
    return f"{subject} {' '.join(words)}"


def _in_mood(rng: random.Random, weights: dict[str, float], mood: float) -> str:
    return rng.choices(list(weights), [MOOD ** (mood * w) for w in weights.values()])[0]


@dataclass(kw_only=True)
class Reviews:
    """Prompts name a film, completions review it. Same seed, same world."""

    seed: int = 0  # draws the demonstrations and shuffles the films
    demonstrations: int = 6000  # reviews written by the grammar
    prompts: int = 1600  # films whose reviews are trained on
    held_out: int = 256  # films kept for evaluation

    def __post_init__(self) -> None:
        films = len(TONES) * len(GENRES) * len(HEROES)
        if self.prompts < 1 or self.held_out < 1 or self.prompts + self.held_out > films:
            raise ValueError(
                f"data.prompts={self.prompts} and data.held_out={self.held_out} must be positive "
                "and together "
                f"at most {films}, the films this world has; lower one of them"
            )

    def identity(self) -> dict:
        """Nothing outside the config decides what this data set holds."""
        return {}

    def load(self) -> Dataset:
        rng = random.Random(self.seed)
        films = [f"a {t} {g} about a {h} :" for t, g, h in product(TONES, GENRES, HEROES)]
        rng.shuffle(films)
        prompts, held_out = (
            films[: self.prompts],
            films[self.prompts : self.prompts + self.held_out],
        )
        told = [Demonstration(rng.choice(prompts), write(rng)) for _ in range(self.demonstrations)]
        return Dataset(prompts=prompts, held_out=held_out, demonstrations=told)
