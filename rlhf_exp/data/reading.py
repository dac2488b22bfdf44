"""From the rows of many sources to the prompts, demonstrations and pairs of each role.

Held-out roles are read first; training rows about their prompts are dropped, so nothing leaks. Rows
that say nothing (an empty text, two equal completions, a tie) or that a filter refuses are dropped
too; every drop is counted under its reason. A row of the wrong kind is an error with file and line.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from rlhf_exp import weights
from rlhf_exp.data.places import Place, Row
from rlhf_exp.data.prompt_formats import PromptFormat, prompt_format
from rlhf_exp.data.rows import Demonstration, Pair
from rlhf_exp.data.schemas import SCHEMAS, Dropped, Reply
from rlhf_exp.data.sources import Source

if TYPE_CHECKING:
    from rlhf_exp.data.table import Tables

logger = logging.getLogger(__name__)

# Each role with the completions it wants of a row.
WANTED: dict[str, tuple[str, ...]] = {
    "held_out": (),
    "held_out_preferences": ("chosen", "rejected"),
    "prompts": (),
    "demonstrations": ("completion",),
    "preferences": ("chosen", "rejected"),
}
HELD_OUT = {"held_out": "prompts", "held_out_preferences": "preferences"}


class Reading:
    """One pass over all roles: a set that serves several is read once, drops are counted, and
    `taken` has the prompts that training rows must not be about.
    """

    def __init__(self, tables: "Tables") -> None:
        self.tables = tables
        self.tokenizer: Any = None
        if tables.tokenizer is not None:
            self.tokenizer = weights.load_tokenizer(weights.locate(tables.tokenizer))
        self.forms = {source.key: self._format(source) for _, source in tables.sources()}
        self.rows: dict[Place, list[Row]] = {}
        self.taken: set[str] = set()
        self.dropped: dict[str, Counter[str]] = {}

    def __call__(self, role: str) -> list[Any]:
        """All that `role` gets: prompts, demonstrations or pairs."""
        dropped = self.dropped[role] = Counter()
        sources: list[tuple[Source, bool]] = [
            (s, False) for s in getattr(self.tables, role).values()
        ]
        if role in HELD_OUT:
            others = getattr(self.tables, HELD_OUT[role]).values()
            sources += [(s, True) for s in others if s.hold_out]
        if not sources:
            return []
        seen: set[str] = set()
        parts = [self._part(role, source, held, seen) for source, held in sources]
        found = mixed(parts, [s.weight for s, _ in sources], self.tables.seed)
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        if not found:
            raise ValueError(f"nothing is left of data.{role} (dropped: {why}): change its filters")
        logger.info("data.%s: %d%s", role, len(found), f" (dropped: {why})" if why else "")
        return found

    def length(self, text: str) -> int:
        """In tokens of the tokenizer, or in words without one."""
        if self.tokenizer is None:
            return len(text.split())
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _format(self, source: Source) -> PromptFormat:
        own = source.format is not None
        key, wanted = f"{source.key}.format" if own else "data.format", source.format
        form = prompt_format(wanted if own else self.tables.format, self.tokenizer, key)
        if source.schema in ("turns", "transcripts", "text") and not form.holds_turns:
            raise ValueError(
                f"{key} has no place for what {source.key}.schema={source.schema} reads: use "
                "plain, chat, open_assistant or human_assistant"
            )
        return form

    def _part(self, role: str, source: Source, held: bool, seen: set[str]) -> list[Any]:
        place = source.place(self.tables.path)
        if place not in self.rows:
            self.rows[place] = list(place.rows())
        rows = source.part(self.rows[place], held=held)
        size = None if held else source.size
        kept = list(islice(self._kept(role, source, rows, seen), size))
        if size is not None and len(kept) < size:
            raise ValueError(
                f"{source.key}.size={size} is more than the {len(kept)} rows that are left of "
                f"{len(rows)}: lower it"
            )
        return [item for items in kept for item in items]

    def _kept(
        self, role: str, source: Source, rows: list[Row], seen: set[str]
    ) -> Iterator[list[Any]]:
        """What each row gives, of those that give something."""
        for row in rows:
            try:
                yield self._items(role, source, row, seen)
            except Dropped as reason:
                self.dropped[role][str(reason)] += 1

    def _items(self, role: str, source: Source, row: Row, seen: set[str]) -> list[Any]:
        if not source.keeps(row):
            raise Dropped("filter")
        wanted, form = WANTED[role], self.forms[source.key]
        prompt_of, replies_of = SCHEMAS[source.schema]
        prompt = form.render(prompt_of(row, source, form))
        self._check("prompt", source.prompt_length, prompt)
        replies = self._usable(source, replies_of(row, source, wanted)) if wanted else []
        if prompt in self.taken:
            raise Dropped("held out")
        if len(wanted) == 2:
            return pairs(prompt, replies, source)
        if wanted:
            return [Demonstration(prompt, min(replies, key=lambda reply: reply[0])[1])]
        if prompt in seen:
            raise Dropped("repeated")
        seen.add(prompt)
        return [prompt]

    def _usable(self, source: Source, replies: list[Reply]) -> list[Reply]:
        """The replies that pass the filters, with the lead in front; of two, both must."""
        lead = self.tables.lead if source.lead is None else source.lead
        kept, why = [], "empty"
        for rank, text in replies:
            try:
                self._check("completion", source.completion_length, lead + text.strip())
                kept.append((rank, lead + text.strip()))
            except Dropped as reason:
                why = str(reason)
        if len(kept) < max(1, min(2, len(replies))):
            raise Dropped(why)
        return kept

    def _check(self, what: str, limits: list[Any] | None, text: str) -> None:
        if not text.strip():
            raise Dropped("empty")
        if any(phrase.lower() in text.lower() for phrase in self.tables.drop_phrases):
            raise Dropped("phrase")
        least, most = limits or (None, None)
        length = self.length(text) if limits else 0
        if least is not None and length < least:
            raise Dropped(f"{what} too short")
        if most is not None and length > most:
            raise Dropped(f"{what} too long")


def pairs(prompt: str, replies: list[Reply], source: Source) -> list[Pair]:
    """Every two replies of which one is better, or as many of these as the source asks for."""
    ranked = sorted(replies, key=lambda reply: reply[0])
    found = [
        Pair(prompt, better, worse)
        for (first, better), (second, worse) in combinations(ranked, 2)
        if first < second and better != worse
    ]
    if not found:
        raise Dropped("equal pair" if len({text for _, text in replies}) < 2 else "tie")
    if source.pairs is None or len(found) <= source.pairs:
        return found
    return random.Random(f"{source.seed}/{prompt}").sample(found, source.pairs)


def mixed(parts: list[list[Any]], shares: list[float | None], seed: int) -> list[Any]:
    """All parts, shuffled if there are several; with shares, as much of each as keeps them in
    proportion.
    """
    given = [share for share in shares if share is not None]
    if len(given) == len(parts):
        total = min(len(part) / share for part, share in zip(parts, given, strict=True))
        parts = [part[: round(total * share)] for part, share in zip(parts, given, strict=True)]
    found = [item for part in parts for item in part]
    if len(parts) > 1:
        random.Random(seed).shuffle(found)
    return found
