"""Steps of `Sharded` in two processes beside plain AdamW in one, and optimizer state that goes from
one to the other, for test_fsdp.py.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_steps import accumulate, built, two, worst
from torch import Tensor, nn

from rlhf_exp import adapters, processes
from rlhf_exp import weights as policy_weights
from rlhf_exp.algorithms.descent import Descent, Group
from rlhf_exp.algorithms.ppo import PolicyWithValue
from rlhf_exp.hardware import Hardware
from rlhf_exp.hardware.engine import whole
from rlhf_exp.hardware.sharded import Sharding

State = dict[str, Any]


def adapted() -> PolicyWithValue:
    """LoRA over a frozen base."""
    module = built()
    fields = {"r": 2, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": False}
    module.model = adapters.add_lora(module.model, fields).eval()
    return module


def mixed() -> PolicyWithValue:
    """The top block, and two rows of the embeddings, which are tied to the head."""
    module = built()
    policy_weights.freeze_bottom(module.model, 1)
    policy_weights._train_rows(module.model.get_input_embeddings().weight, [98, 99])  # type: ignore[operator]
    return module


MODULES: dict[str, Callable[[], PolicyWithValue]] = {
    "full": built,
    "adapted": adapted,
    "mixed": mixed,
}


def descent(accelerator: Any, module: PolicyWithValue) -> Descent:
    """Two groups: matrices decay, all else (rows that are trained alone, too) does not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim > 1 and not policy_weights.trains_rows(p)]
    others = [p for p in trained if not any(p is q for q in decays)]
    groups = [Group(decays, 5e-4, 0.1), Group(others, 1e-3, 0.0)]
    return Descent(accelerator, module, groups, betas=[0.9, 0.95], eps=1e-8, max_grad_norm=0.5)


def steps(trained: Descent, *numbers: int) -> list[float]:
    """Gradient norms of steps, the data of which follow from their numbers."""
    norms = []
    for number in numbers:
        accumulate(trained, number)
        norms.append(trained.step()[0])
    return norms


def values(accelerator: Any, module: nn.Module) -> dict[str, Tensor]:
    with whole(accelerator):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def load(accelerator: Any, module: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad(), whole(accelerator):
        for name, p in module.named_parameters():
            p.copy_(saved[name])


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return worst(list(ours.values()), list(theirs.values()))


def alone(build: Callable[[], PolicyWithValue], *numbers: int, **start: Any) -> Any:
    """What one process makes of it: norms, weights and state."""
    with processes.alone():
        accelerator, module = Hardware().accelerator(), build()
        trained = descent(accelerator, module)
        if start:
            load(accelerator, module, start["weights"])
            trained.load_state(copy.deepcopy(start["state"]))  # or its steps would be counted on
        norms = steps(trained, *numbers)
        return norms, values(accelerator, module), copy.deepcopy(trained.state())


def compare(folder: Path) -> None:
    """Full weights, an adapter, and a mixture of trained and frozen take the steps of plain AdamW;
    the state of the first is left in `folder`.
    """
    expected = {name: alone(build, 0, 1, 2) for name, build in MODULES.items()}
    hardware = two("fsdp2")
    accelerator = hardware.accelerator()
    for name, build in MODULES.items():
        accelerator.sharding = Sharding(reshard_after_forward=name != "adapted")
        module = build()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        trained = descent(accelerator, module)
        norms, there, state = expected[name]
        assert np.allclose(steps(trained, 0, 1, 2), norms, rtol=1e-5)
        found = values(accelerator, module)
        assert apart(found, there) < 1e-6, (name, apart(found, there))
        assert all(torch.equal(found[key], before[key]) for key in frozen)
        assert bool(frozen) == (name != "full")
        _assert_divided(module)
        kept = trained.state()
        ours, theirs = kept["optimizer"], state["optimizer"]
        assert ours["state"].keys() == theirs["state"].keys()
        assert [g["params"] for g in ours["param_groups"]] == [
            g["params"] for g in theirs["param_groups"]
        ]
        for i, moments in theirs["state"].items():
            assert type(ours["state"][i]["exp_avg"]) is Tensor
            assert ours["state"][i]["step"] == moments["step"] == 3
            assert worst([ours["state"][i]["exp_avg"]], [moments["exp_avg"]]) < 1e-6
        if name == "full" and processes.main():
            torch.save({"weights": found, "state": kept}, folder / "after-3.pt")
        if name == "mixed":  # the other rows of the embeddings have not moved
            moved = found["model.transformer.wte.weight"] - before["model.transformer.wte.weight"]
            assert moved.abs().amax(1).nonzero().flatten().tolist() == [98, 99]
    hardware.release(accelerator)


def _assert_divided(module: nn.Module) -> None:
    """Each process holds its rows of every parameter, and of its moments, and no more."""
    for name, p in module.named_parameters():
        local: Tensor = p.to_local()  # type: ignore[operator]
        rows = -(-p.shape[0] // 2)
        mine = rows if processes.rank() == 0 else p.shape[0] - rows
        assert local.shape == (mine, *p.shape[1:]), name
        assert local.untyped_storage().nbytes() <= 4 * rows * p[:1].numel(), name
    total = sum(p.numel() for p in module.parameters())
    held = sum(p.to_local().numel() for p in module.parameters())  # type: ignore[operator]
    assert abs(held / total - 0.5) < 0.02


def go_on(folder: Path) -> None:
    """ZeRO-3 continues from what FSDP left in `folder` as one process does."""
    saved = torch.load(folder / "after-3.pt")
    norms, there, _ = alone(built, 3, **saved)
    hardware = two("zero3")
    accelerator, module = hardware.accelerator(), built()
    trained = descent(accelerator, module)
    load(accelerator, module, saved["weights"])
    trained.load_state(saved["state"])
    assert np.allclose(steps(trained, 3), norms, rtol=1e-5)
    assert apart(values(accelerator, module), there) < 1e-6
    hardware.release(accelerator)
