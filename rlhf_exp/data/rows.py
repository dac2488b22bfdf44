"""What every data set hands to the stages: prompts, demonstrations and preference pairs."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Demonstration:
    """One supervised example: the loss falls on the completion only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the better one first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(kw_only=True)
class Dataset:
    """The splits of one data set. `held_out` prompts are never trained on."""

    prompts: list[str]
    held_out: list[str]
    demonstrations: list[Demonstration] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    held_out_pairs: list[Pair] = field(default_factory=list)
