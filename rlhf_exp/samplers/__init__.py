"""Who draws the completions: the processes of the run themselves (local), or a server (vllm).

`Policy.sample` asks its `sampler`; whichever it is, the rollouts have the same form.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rlhf_exp.policy import Policy, Rollouts


class Sampler(Protocol):
    """What a run needs of it."""

    def check(self, policy: "Policy", algorithm: Any, prompts: list[str]) -> None:
        """Refuse what can be known to fail before any weights load."""
        ...

    def open(self, directory: Path) -> None:
        """Use what is in the run's `directory`."""
        ...

    def sample(self, policy: "Policy", prompts: list[str], n: int, *, fresh: bool) -> "Rollouts":
        """As `Policy.sample`."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to tell of the last sampling."""
        ...
