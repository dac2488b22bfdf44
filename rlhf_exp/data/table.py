"""`data=` presets of public sets: each role is a mixture of sources, each with its columns, schema
and format. One reader for the hub and for local files; reading.py does the reading.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_exp import weights
from rlhf_exp.choices import require
from rlhf_exp.data.places import Place
from rlhf_exp.data.reading import HELD_OUT, WANTED, Reading
from rlhf_exp.data.rows import Dataset
from rlhf_exp.data.schemas import SCHEMAS
from rlhf_exp.data.sources import Source


@dataclass(kw_only=True)
class Tables:
    """Sources by role and name."""

    path: str | None = None  # folder with the files of all sources; null: each source's own path
    prompts: dict[str, Any]  # of settings of rlhf_exp.data.sources.Source
    held_out: dict[str, Any] = field(default_factory=dict)
    demonstrations: dict[str, Any] = field(default_factory=dict)
    preferences: dict[str, Any] = field(default_factory=dict)
    held_out_preferences: dict[str, Any] = field(default_factory=dict)
    format: Any = "plain"  # of prompts, see rlhf_exp/data/prompt_formats.py
    lead: str = ""  # every completion starts with it
    tokenizer: str | None = None  # hub id or folder: counts lengths, and has the chat template
    # rows with one of these phrases, in whatever case, are dropped
    drop_phrases: list[str] = field(default_factory=list)
    seed: int = 0  # mixes the sources of a role

    def __post_init__(self) -> None:
        for role in WANTED:
            named = getattr(self, role).items()
            setattr(self, role, {n: Source.of(node, f"data.{role}.{n}") for n, node in named})
        for role, source in self.sources():
            require(source.schema, SCHEMAS, f"{source.key}.schema")
            if source.hold_out and role not in HELD_OUT.values():
                raise ValueError(
                    f"{source.key}.hold_out={source.hold_out} has no role to go to: set it to 0, "
                    "rows about held-out prompts are dropped anyway"
                )
        for role in WANTED:
            weighted = {source.weight is not None for source in getattr(self, role).values()}
            if len(weighted) > 1:
                raise ValueError(f"data.{role}: give a weight to every source, or to none")
        if not self.prompts:
            raise ValueError("data.prompts has no source: give it one")
        if not self.held_out and not any(s.hold_out for s in self.prompts.values()):
            raise ValueError(
                "data has no held-out prompts: give data.held_out a source, or hold_out to a "
                "source of data.prompts"
            )

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Each with its role."""
        return ((role, source) for role in WANTED for source in getattr(self, role).values())

    def identity(self) -> dict[str, Any]:
        """By source, hashes of its files or what names it on the hub."""
        found: dict[Place, Any] = {}
        identities: dict[str, Any] = {}
        for _, source in self.sources():
            place = source.place(self.path)
            found[place] = found.get(place) or place.identity()
            identities[source.key] = found[place]
        if self.tokenizer is not None:
            identities["tokenizer"] = weights.source_identity(weights.locate(self.tokenizer))
        return identities

    def load(self) -> Dataset:
        reading = Reading(self)
        held_out, held_out_pairs = reading("held_out"), reading("held_out_preferences")
        reading.taken = {*held_out, *(pair.prompt for pair in held_out_pairs)}
        return Dataset(
            prompts=reading("prompts"),
            held_out=held_out,
            demonstrations=reading("demonstrations"),
            pairs=reading("preferences"),
            held_out_pairs=held_out_pairs,
            dropped={role: dict(reasons) for role, reasons in reading.dropped.items() if reasons},
        )
