"""The plan as a whole: what ZeRO divides, what is refused and with which cure, operations, and the
command line.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from hydra import compose, initialize_config_dir
from runs import command_line, contents, says
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.config import build, conf_directory, resolved
from rlhf_exp.hardware import Hardware
from rlhf_exp.plan import Planning, memory, refuse, work
from rlhf_exp.plan.cures import changed
from rlhf_exp.plan.estimate import Plan, as_table, make, verdict
from rlhf_exp.plan.memory import GIB
from rlhf_exp.plan.skeleton import Skeleton
from rlhf_exp.plan.work import Texts, mfu

pytest_plugins = ["runs_fixtures"]

SHAPE = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = ("stages=[align]", "reward=lexicon", "reward@gold=lexicon", "data.prompts=20",
         "data.held_out=8", "data.demonstrations=20", "evaluation.prompts=8", "algo.batch=8",
         "algo.minibatch=8", "policy.sft=false", "policy.architecture.n_layer=1")  # fmt: skip


@dataclass(kw_only=True)
class Device(Hardware):
    """Hardware that says all that a plan asks."""

    processes: int = 1
    nodes: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    device_memory: float | None = None
    peak_tflops: float | None = 1.0

    @property
    def masters(self) -> bool:
        return self.stage > 0


def config(*overrides: str, **hardware: Any) -> dict[str, Any]:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        plain = resolved(compose("config", overrides=[*SMALL, *overrides]))
    plain["hardware"] |= {"_target_": "test_plan.Device"} | vars(Device(**hardware))
    return plain


def skeleton(**settings: Any) -> Skeleton:
    return Skeleton(AutoConfig.for_model("llama", vocab_size=300, **SHAPE), **settings)


def job(**hardware: Any) -> Any:
    return memory.Job(
        stages=[], skeleton=skeleton(dtype="bfloat16"), policy=tiny_policy(), algo=None, sft=None,
        evaluation=None, labeller=None, preferences=None, hardware=Device(**hardware), scorers=[],
        prompts=[1], held_out=[1], demonstrations=[1],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 4, 4), (1, 2, 4, 12 / 4), (2, 2, 2.5, 12 / 4), (3, 2 + 0.5, 2.5, 12 / 4)],
)
def test_what_each_stage_of_zero_divides(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """Bytes per parameter of a bfloat16 model on 4 processes; gradients with those on their way."""
    told = job(processes=2, nodes=2, stage=stage)
    counts = told.skeleton.counts
    parts = memory.held(told, counts)
    made = memory._divided(told, counts, {"gradients": 2.0 * counts.total})
    found = (parts["weights"], made["gradients"], parts["optimizer"])
    assert [f / counts.total for f in found] == pytest.approx([weights, gradients, optimizer])


def test_what_offloading_takes_off_the_device() -> None:
    told = job(processes=4, stage=3, offload_optimizer=True, offload_parameters=True)
    counts = told.skeleton.counts
    assert memory.held(told, counts) == {"weights": counts.bytes, "optimizer": 0.0}
    made = memory._divided(told, counts, {"gradients": counts.trained_bytes})
    assert made["gradients"] == counts.trained_bytes  # the bucket on its way


def test_micro_batches_are_cut_as_the_policy_cuts_them() -> None:
    told = job()
    told.prompts = [2, 3, 4, 8]
    told.policy.max_new_tokens = 10
    assert told.widest(4, 72) == (4, 8)
    assert told.widest(4, 71) == (3, 4)
    assert told.widest(2, 71) == (2, 8)  # two prompts, spread over all
    assert told.widest(4, 1) == (1, 2)


# ------------------------------------------------------------------------------------------ refusal


@pytest.fixture(scope="module")
def need() -> float:
    """GiB that the small run takes at its largest."""
    return make(config(device_memory=100.0)).largest.total / GIB


def test_a_run_that_cannot_fit_is_refused_with_its_cure(need: float) -> None:
    asked = config("algo.token_budget=4096", device_memory=0.9 * need)
    with pytest.raises(ValueError, match="the largest phase, align: update, takes") as caught:
        refuse(asked)
    says(str(caught.value), "does not fit into", "plan=force runs anyway")
    key, value = str(caught.value).split("this would fit: '")[1].split("'")[0].split("=")
    assert key == "algo.token_budget"
    assert make(changed(asked, {key: int(value)})).fits
    assert not make(changed(asked, {key: 2 * int(value)})).fits


def test_where_nothing_helps_that_is_said() -> None:
    asked = config("stages=[preferences]", "policy.sample_batch=1", device_memory=1e-6)
    with pytest.raises(ValueError, match="no setting tried here would do"):
        refuse(asked)


def on(*hardware: str) -> dict[str, Any]:
    """A larger run, on a hardware of conf/."""
    big = ("+policy.architecture.n_ctx=128", "policy.architecture.n_embd=512", "reward=pairwise")
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return resolved(compose("config", overrides=[*SMALL, *big, *hardware]))


def test_the_next_stage_of_zero_comes_first() -> None:
    eight = ("hardware.processes=8", "hardware.peak_tflops=1")
    room = (
        make(on("hardware=zero1", "hardware.device_memory=100", *eight)).largest.total / GIB / 0.94
    )
    told = r"this would fit: 'hardware=zero1' .*'hardware\.processes=8' 'hardware\.device_memory="
    with pytest.raises(ValueError, match=told):
        refuse(on("hardware=cpu", f"hardware.device_memory={room}", *eight))


def test_models_that_are_never_trained_may_lie_elsewhere() -> None:
    gpu = ("hardware=gpu", "hardware.peak_tflops=1", "hardware.device_memory=100")
    whole, away = make(on(*gpu)), make(on(*gpu, "hardware.frozen=offloaded"))
    update = {p.name: p for p in whole.phases}["update"], {p.name: p for p in away.phases}["update"]
    assert update[0].parts["reference"] > 1e6
    assert update[1].parts.get("reference", 0.0) == 0.0
    back = {p.name: p for p in away.phases}["look-back"]
    assert back.parts["reference"] == update[0].parts["reference"]  # while it is asked
    shared = make(on(*gpu, "hardware.frozen=sharded", "hardware.processes=4"))
    part = {p.name: p for p in shared.phases}["update"].parts["reference"]
    assert part == update[0].parts["reference"] / 4
    least = max(p.total for p in away.phases) / GIB / 0.94
    with pytest.raises(ValueError, match=r"would fit: '(hardware=zero3_offload|hardware.frozen)"):
        refuse(on(*gpu[:2], f"hardware.device_memory={least}"))


def test_what_fits_and_what_is_not_known_is_let_through(need: float) -> None:
    refuse(config(device_memory=2 * need))
    refuse(config())  # a CPU whose memory nobody has stated
    phase = memory.Phase("align", "update", {"weights": 10 * GIB})
    unknown = Plan([phase], [], {}, "no rate", None)
    assert unknown.fits
    assert "takes 10 GiB; the device is not known: give hardware.device_memory" in verdict(unknown)


# -------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    "settings", [{}, {"train_top": 1}, {"lora": {"r": 4, "target_modules": "all-linear"}}]
)
def test_operations_are_those_that_torch_counts(settings: dict[str, Any]) -> None:
    """Every product of a forward and a backward pass."""
    config = AutoConfig.for_model("llama", vocab_size=300, attn_implementation="eager", **SHAPE)
    told = Skeleton(config, **settings)
    model = told.build()
    ids = torch.ones(4, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=16).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    texts = Texts(rows=4, prompt=16, response=16)
    assert work.forward(told.counts, texts) == pytest.approx(forward.get_total_flops(), rel=0.01)
    expected = backward.get_total_flops()
    assert work.backward(told.counts, texts) == pytest.approx(expected, rel=0.05)


def test_a_parameter_takes_six_operations_a_token() -> None:
    counts = skeleton().counts
    one = Texts(rows=1, prompt=0, response=1)
    both = work.forward(counts, one) + work.backward(counts, one)
    attention = 12 * counts.layers * counts.width  # of one token that sees itself
    assert both == 6 * (counts.total - counts.embeddings) + attention
    assert work.sampling(counts, one) == both / 3 - 2 * counts.layers * counts.width


def test_utilization_is_a_share_of_the_peak() -> None:
    assert mfu(3e12, seconds=2.0, peak_tflops=3.0, processes=1) == pytest.approx(0.5)
    assert mfu(3e12, seconds=2.0, peak_tflops=3.0, processes=4) == pytest.approx(0.125)


def test_a_ppo_step_is_counted_by_kind() -> None:
    counts, texts = skeleton().counts, Texts(rows=8, prompt=10, response=20)
    found = work.step_flops(PPO(steps=1, batch=8, minibatch=8, epochs=3), counts, [counts], texts)
    there, back = work.forward(counts, texts), work.backward(counts, texts)
    expected = {"sample": work.sampling(counts, texts), "score": there}
    assert found == expected | {"learn": 5 * there + 3 * back}


def test_hours_follow_the_stated_share_of_the_peak() -> None:
    plan = make(config(processes=2, peak_tflops=2.0))
    (align,) = plan.works
    shares = Planning().utilization
    seconds = sum(align.flops[k] / (shares[k] * 2 * 2e12) for k in shares)
    assert plan.seconds(align) == pytest.approx(seconds)
    assert align.generated == 24 * (60 * 8 + 7 * 8)
    assert f"{seconds / 3600:.3g}" in as_table(plan)


def test_shares_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match=r"planning\.utilization=.* sample, score, learn"):
        Planning(utilization={"sample": 2.0, "score": 0.1, "learn": 0.1})


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_directory() / "algo").glob("*.yaml")))
def test_every_algorithm_has_its_operations(name: str) -> None:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        algo = build(resolved(compose("config", overrides=[f"algo={name}"]))["algo"], "algo")
    counts, texts = skeleton().counts, Texts(rows=8, prompt=4, response=4)
    once = work.forward(counts, texts)
    found = work.learning(algo, counts, texts)
    assert found == 0 if name == "best_of_n" else found > 2 * once


# ------------------------------------------------------------------------------------ command line


def test_a_plan_is_printed_and_nothing_is_made(tmp_path: Path) -> None:
    process = command_line(
        *SMALL, "plan=true", "reward=pairwise", "policy.sft=true", f"hydra.run.dir={tmp_path}/run",
        "stages=[sft,preferences,reward,align]", "sft.epochs=1", cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    heads = [line.split("  ")[0] for line in lines if ": " in line]
    expected = ["sft: update", "preferences: sampling", "reward: reward", "align: sampling"]
    expected += ["align: scoring: reward", "align: look-back", "align: update"]
    expected += ["align: evaluation: sampling", "align: evaluation: KL"]
    assert heads[: len(expected)] == expected
    assert "fits into" in lines[-1]
    made = contents(tmp_path)
    assert not [name for name in made if not name.startswith("run/.hydra") and name != "run"], made


def test_a_run_can_lend_its_speed(debug_run: Any, tmp_path: Path) -> None:
    plain = config()
    plain["planning"]["measured"] = str(debug_run.directory)
    plan = make(plain)
    rows = [json.loads(x) for x in (debug_run.directory / "metrics.jsonl").read_text().splitlines()]
    learned = [row["time/learn"] for row in rows if "time/learn" in row]
    assert plan.source == f"as {debug_run.directory} has reached"
    assert 1e6 < plan.rates["learn"] < 1e13
    assert plan.rates["learn"] * sum(learned) / len(learned) > 1e6
    plain["planning"]["measured"] = str(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"planning\.measured=.* not the directory of a run"
    ):
        make(plain)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["plan=maybe"], ["plan=maybe", "true, false, force"]),
        (["plan=true", "policy=hub", "policy.path=nowhere/atall"], ["nowhere/atall", "reachable"]),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    overrides: list[str], fragments: list[str], refused: Callable[..., str]
) -> None:
    plain = [o for o in SMALL if "n_layer" not in o]  # which no model of the hub has
    says(refused(*plain, *overrides), *fragments)
