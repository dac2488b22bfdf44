"""Models that are asked and never trained: where they lie changes nothing that they say.

Two processes that share one: tests/group.py.
"""

from typing import Any

import pytest
import torch
from lab import MakeLab
from torch import nn

from rlhf_exp.frozen import Frozen, placed
from rlhf_exp.hardware import Hardware
from rlhf_exp.policy import cut, response_logits
from rlhf_exp.reference import Reference

pytest_plugins = ["lab_fixtures"]


@pytest.mark.parametrize("settings", [{}, {"train_top": 1}])
def test_an_offloaded_reference(lab: MakeLab, settings: dict[str, Any]) -> None:
    policy = lab(**settings).policy
    rollouts = policy.assemble(["big cat:", "old hat:"], [[5, 6, 7], [8, 9]])
    batch = cut(rollouts, [0, 1])
    whole = Reference(policy).logits(batch)
    with placed("offloaded"):
        reference = Reference(policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert not torch.equal(response_logits(policy.model, batch)[0], whole)
    assert torch.equal(reference.logits(batch), whole)


def test_weights_come_once_for_many_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    with placed("offloaded"):
        frozen = Frozen(nn.Linear(3, 2), "cpu")
    brought: list[int] = []
    bring = frozen._bring
    monkeypatch.setattr(frozen, "_bring", lambda: (brought.append(1), bring()))
    with frozen.ready():
        with frozen.ready():
            frozen.model(torch.ones(1, 3))
        frozen.model(torch.ones(1, 3))
    assert brought == [1]
    with pytest.raises(RuntimeError), frozen.ready():  # a question that fails
        frozen.model(torch.ones(1, 4))
    assert frozen.depth == 0


def test_where_a_model_lies_is_said_for_a_block() -> None:
    with placed("offloaded"), pytest.raises(RuntimeError), placed("sharded"):
        raise RuntimeError
    assert Frozen(nn.Linear(1, 1), "cpu").placement == "replicated"
    with placed("sharded"):  # one process has nobody to share with
        assert Frozen(nn.Linear(1, 1), "cpu").placement == "replicated"
    with pytest.raises(ValueError, match=r"hardware\.frozen=sharde.*did you mean sharded"):
        Hardware(frozen="sharde")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_model_leaves_the_gpu() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    expected = model(torch.ones(1, 1024))
    with placed("offloaded"):
        frozen = Frozen(model, "cuda")
    before = torch.cuda.memory_allocated()
    with frozen.ready():
        assert torch.cuda.memory_allocated() - before >= 4 * 1024**2
        found = frozen.model(torch.ones(1, 1024, device="cuda"))
    del found
    assert torch.cuda.memory_allocated() == before
    with frozen.ready():
        found = frozen.model(torch.ones(1, 1024, device="cuda")).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
