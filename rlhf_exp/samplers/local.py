"""Completions by the policy's own model: every process draws a part, with transformers' generate().

Prompts are padded on the left. Generation settings are complete, so none is inherited from the
checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_exp import processes, tokens, weights

if TYPE_CHECKING:
    from rlhf_exp.policy import Policy, Rollouts


@dataclass(kw_only=True)
class Local:
    """The processes of the run; how much is drawn at once is `policy.sample_batch`."""

    def check(self, policy: "Policy", algorithm: Any, prompts: list[str]) -> None:
        """Whatever samples can sample here."""

    def open(self, directory: Path) -> None:
        """Nothing is kept."""

    def sample(self, policy: "Policy", prompts: list[str], n: int, *, fresh: bool) -> "Rollouts":
        """As `Policy.sample`; the weights are always the newest."""
        repeated = [p for p in prompts for _ in range(n)]
        encoded = policy.encode(repeated)
        with policy.whole(), _own_randomness(policy.device):
            mine = _responses(policy, encoded[processes.share(len(encoded))])
        return policy.assemble(repeated, [r for part in processes.gather(mine) for r in part])

    def metrics(self) -> dict[str, float]:
        """Nothing that the loop does not know."""
        return {}


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Of several processes, each draws other numbers in this block, and all draw the same ones
    again after it.
    """
    if processes.count() == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + processes.rank())
        yield


def _responses(policy: "Policy", encoded: list[list[int]]) -> list[list[int]]:
    """A response to each prompt (token ids, with the end of text where there is one)."""
    if not encoded:
        return []
    width = max(map(len, encoded))
    pieces = [
        _generate(policy, encoded[i : i + policy.sample_batch], width)
        for i in range(0, len(encoded), policy.sample_batch)
    ]
    end = policy.tokenizer.eos_token_id
    return [tokens.until(row[width:], end) for piece in pieces for row in piece.tolist()]


def _generate(policy: "Policy", encoded: list[list[int]], width: int) -> Tensor:
    """[b, width + r]"""
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded], device=policy.device)
    mask = torch.tensor(
        [[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=policy.device
    )
    policy.model.generation_config = weights.generation_config(policy)
    with policy.precision():
        return policy.model.generate(input_ids=ids, attention_mask=mask)
