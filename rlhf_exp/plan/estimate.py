"""A plan, made and shown."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.plan import KINDS, Planning
from rlhf_exp.plan.job import describe
from rlhf_exp.plan.memory import GIB, Job, Phase, phases
from rlhf_exp.plan.work import Texts, Work, job_steps, step_flops, works

USABLE = 0.95  # of a device's memory; the rest is lost to its context and to fragments


@dataclass
class Plan:
    """What one process holds, and what all do together."""

    phases: list[Phase]
    works: list[Work]
    rates: dict[str, float]  # operations per second of all processes, by kind; {}: not known
    source: str  # of the rates, or why there are none
    memory: float | None  # bytes of a device; None: not known

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does; True if the device is not known."""
        return self.memory is None or self.largest.total <= USABLE * self.memory

    def seconds(self, work: Work) -> float:
        """What a stage takes."""
        return sum(flops / self.rates[kind] for kind, flops in work.flops.items())


def make(config: dict[str, Any], known: dict[str, Any] | None = None) -> Plan:
    """The plan of a plain, checked config. `known` carries what does not change from one plan to
    the next of the same data: lengths of texts, and passes already traced.
    """
    known = {} if known is None else known
    job = describe(config, known)
    planning = Planning(**{k: v for k, v in config["planning"].items() if k != "_target_"})
    if "rates" not in known:
        known["rates"] = _rates(job, planning)
    rates, source = known["rates"]
    return Plan(list(phases(job)), list(works(job)), rates, source, device_memory(job))


def device_memory(job: Job) -> float | None:
    """Bytes of the device of a process; a CPU's memory is shared by the processes of a node."""
    known = job.hardware.memory()
    if known is None and job.hardware.kind == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return pages / job.hardware.processes
    return None if known is None else known * GIB


# ---- speed


def _rates(job: Job, planning: Planning) -> tuple[dict[str, float], str]:
    if planning.measured is not None:
        return _measured(Path(planning.measured).expanduser())
    peak, source = job.hardware.peak_tflops, "hardware.peak_tflops"
    if peak is None:
        peak, source = _products_here(job.hardware.kind), "matrix products measured here"
    if peak is None:
        return {}, "no rate is known: give hardware.peak_tflops or planning.measured=<run>"
    shares = planning.utilization
    told = ", ".join(f"{kind} {shares[kind]:.0%}" for kind in KINDS)
    rates = {kind: peak * 1e12 * job.processes * shares[kind] for kind in KINDS}
    return rates, f"{peak:.3g} TFLOP/s per process ({source}), of which {told}"


def _products_here(device: str) -> float | None:
    """TFLOP/s of a product of square matrices on this machine's device; None if it is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    size, kind = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    x = torch.ones(size, size, device=device, dtype=kind)
    _ = float((x @ x)[0, 0])
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        _ = float((x @ x)[0, 0])  # waits for the device
        times += 1
    return times * 2 * size**3 / (time.perf_counter() - started) / 1e12


def _measured(directory: Path) -> tuple[dict[str, float], str]:
    """What the run in `directory` has reached, from its times and the operations of its steps."""
    try:
        config = json.loads((directory / "run.json").read_text())["config"]
        lines = (directory / "metrics.jsonl").read_text().splitlines()
    except (OSError, KeyError, ValueError):
        raise FileNotFoundError(
            f"planning.measured={directory} is not the directory of a run with metrics: give one"
        ) from None
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if "time/sample" in row]
    if not rows:
        raise ValueError(
            f"planning.measured={directory} has no step with time/sample, time/score and "
            "time/learn: give a run of an algorithm of the online loop, such as algo=ppo"
        )
    job = describe(config, {})
    prompt = sum(job.prompts) / len(job.prompts)
    response = sum(row["length/mean"] for row in rows) / len(rows)
    _, texts = job_steps(job, prompt, job.policy.max_new_tokens)
    texts = Texts(texts.rows, prompt, response)
    scored = [s.skeleton.counts for s in job.scorers if not s.gold]
    flops = step_flops(job.algo, job.skeleton.counts, scored, texts)
    seconds = {kind: sum(row[f"time/{kind}"] for row in rows) / len(rows) for kind in KINDS}
    rates = {kind: max(flops[kind], 1.0) / max(seconds[kind], 1e-9) for kind in KINDS}
    return rates, f"as {directory} has reached"


# ---- what a person sees


def as_table(plan: Plan) -> str:
    """Memory by phase, work by stage, and whether it fits."""
    names = list(dict.fromkeys(n for phase in plan.phases for n in phase.parts))
    names = [n for n in names if any(phase.parts.get(n) for phase in plan.phases)]
    header = ["GiB per process", *names, "total"]
    rows = [
        [f"{p.stage}: {p.name}", *(_gib(p.parts.get(n, 0.0)) for n in names), _gib(p.total)]
        for p in plan.phases
    ]
    work = [
        [
            w.stage,
            f"{w.generated:,.0f}",
            *(f"{w.flops.get(kind, 0.0):.2e}" for kind in KINDS),
            f"{plan.seconds(w) / 3600:.3g}" if plan.rates else "?",
        ]
        for w in plan.works
    ]
    titles = ["stage", "tokens generated", *(f"FLOPs {k}" for k in KINDS), "hours"]
    tables = [_columns([header, *rows]), _columns([titles, *work])]
    return "\n\n".join([*tables, f"speed: {plan.source}\n{verdict(plan)}"])


def verdict(plan: Plan) -> str:
    """One sentence on whether the largest phase fits."""
    phase = plan.largest
    told = f"the largest phase, {phase.stage}: {phase.name}, takes {_gib(phase.total)} GiB"
    if plan.memory is None:
        return f"{told}; the device is not known: give hardware.device_memory"
    room = f"{_gib(USABLE * plan.memory)} of the device's {_gib(plan.memory)} GiB"
    return f"{told} and {'fits into' if plan.fits else 'does not fit into'} {room}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size else "0"


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
