"""PPO's module divided between two processes beside the same in one, for test_engine.py and
test_fsdp.py.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp import processes
from rlhf_exp.algorithms.descent import Descent, Group
from rlhf_exp.algorithms.ppo import PolicyWithValue
from rlhf_exp.hardware import Hardware
from rlhf_exp.hardware.deepspeed import DeepSpeed
from rlhf_exp.hardware.engine import whole
from rlhf_exp.hardware.fsdp import FSDP
from rlhf_exp.policy import Batch

ROWS, RESPONSE, CLIP = 7, 6, 0.5  # rollouts of a step: 3 for one process, 4 for the other
IDS = torch.tensor([[5, 6, 7]])


def built() -> PolicyWithValue:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 100}
    ends = {"pad_token_id": 0, "bos_token_id": 99, "eos_token_id": 99}
    module = PolicyWithValue(GPT2LMHeadModel(GPT2Config(**shape, **ends)).eval(), None)
    nn.init.normal_(module.value_head.weight, std=0.1)  # type: ignore[arg-type]
    return module


def descent(accelerator: object, module: PolicyWithValue) -> Descent:
    body, head = (list(m.parameters()) for m in (module.model, module.value_head))
    groups = [Group(body, 1e-3, 0.0), Group(head, 5e-3, 0.1)]
    return Descent(accelerator, module, groups, betas=[0.9, 0.95], eps=1e-8, max_grad_norm=CLIP)


def loss(trained: Descent, rows: Tensor) -> Tensor:
    """A sum over the response tokens of `rows`."""
    batch = Batch(torch.arange(len(rows)), rows, torch.ones_like(rows), RESPONSE)
    logits, values = trained.module(batch)
    new = torch.log_softmax(logits, -1).gather(-1, batch.response_ids[..., None])
    return -new.sum() + (values - 1).square().sum()


def accumulate(trained: Descent, step: int, *, spoilt: bool = False) -> None:
    """Gradients of a mean over all tokens of all processes, each with rows of its own.

    Engines average over the processes, and every one must go backward as often as the others.
    """
    drawn = torch.randint(1, 98, (ROWS, 10), generator=torch.Generator().manual_seed(step))
    parts = drawn[processes.share(ROWS)].split(1 + processes.rank())
    for i in range(max(processes.gather(len(parts)))):
        part, weight = (parts[i], 1.0) if i < len(parts) else (parts[-1], 0.0)
        scale = weight / (ROWS * RESPONSE)
        broken = float("nan") if spoilt and processes.rank() == 1 else 1.0
        trained.backward(loss(trained, part) * scale * broken)


def weights(accelerator: object, module: nn.Module) -> list[Tensor]:
    with whole(accelerator):
        return [p.detach().clone() for p in module.parameters()]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def two(name: str) -> Hardware:
    """Two processes on the CPU: ddp, zero2, zero3 (which divides even the smallest weights) or
    fsdp2.
    """
    where: dict[str, Any] = {"device": "cpu", "processes": 2, "timeout": 60}
    if not name.startswith("zero"):
        return {"ddp": Hardware, "fsdp2": FSDP}[name](**where)
    zero = {"stage": int(name[-1])}
    zero |= {"stage3_param_persistence_threshold": 0} if name == "zero3" else {}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return DeepSpeed(deepspeed=settings, **where)


def compare(name: str) -> None:
    hardware = two(name)
    with processes.alone():  # what one process does
        one = Hardware().accelerator()
        plain = descent(one, built())
        alone, norms = [], []
        for step in range(4):
            accumulate(plain, step)
            norms.append(plain.step()[0])
            alone.append([p.detach().clone() for p in plain.module.parameters()])
            if step == 1:
                halfway = copy.deepcopy(plain.state())

    module = built()
    accelerator = hardware.accelerator()
    trained = descent(accelerator, module)
    for step in range(2):
        accumulate(trained, step)
        norm, finite = trained.step()
        assert finite
        assert abs(norm / norms[step] - 1) < 1e-5
    assert norms[0] > CLIP  # else clipping was not tried
    assert worst(weights(accelerator, module), alone[1]) < 5e-6

    # steps not taken leave no trace
    accumulate(trained, 2, spoilt=True)
    assert trained.step() == (0.0, False)
    accumulate(trained, 2)
    norm, finite = trained.step(hold=True)
    assert finite
    assert abs(norm / norms[2] - 1) < 1e-5
    assert trained.skipped == 2
    assert worst(weights(accelerator, module), alone[1]) < 5e-6

    # state is that of one process
    state = trained.state()
    assert state["optimizer"]["state"].keys() == halfway["optimizer"]["state"].keys()
    for i, theirs in halfway["optimizer"]["state"].items():
        ours = state["optimizer"]["state"][i]
        assert ours["step"] == theirs["step"] == 2
        assert worst([ours["exp_avg"]], [theirs["exp_avg"]]) < 1e-6

    # each process samples with whole weights, as long as it likes
    with torch.no_grad(), whole(accelerator):
        longest = 4 + 4 * processes.rank()
        said = module.model.generate(input_ids=IDS, max_new_tokens=longest, do_sample=False)
    assert said.shape == (1, 3 + longest) or said[0, -1] == 99

    for step in (2, 3):
        accumulate(trained, step)
        trained.step()
    there = weights(accelerator, module)
    assert worst(there, alone[3]) < 1e-5
    # back to the state of one process, and the same way again
    with torch.no_grad(), whole(accelerator):
        for p, value in zip(module.parameters(), alone[1], strict=True):
            p.copy_(value)
    trained.load_state(halfway)
    for step in (2, 3):
        accumulate(trained, step)
        trained.step()
    assert worst(weights(accelerator, module), there) < 1e-5
    hardware.release(accelerator)
