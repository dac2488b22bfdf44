"""How long the best-of-n estimate takes, and how much memory beside its input: 1,000 prompts with
12,600 answers each and the 16 n of Coste et al. 2023, for one ranking and for those of an ensemble.

    python benchmarks/best_of_n.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from rlhf_exp.evaluation.best_of_n import NS, combined, expected

RANKINGS = {
    "one reward model": None,
    "one reward model, tied scores": None,
    "mean of 5": ("mean", 0.0),
    "WCO of 5": ("wco", 0.0),
    "UWO of 5": ("uwo", 0.5),
}


def measured(ranking: str, prompts: int, answers: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and MiB beside the scores, in a process of its own."""
    rng = np.random.default_rng(0)
    members = [rng.normal(size=(prompts, answers)) for _ in range(5 if RANKINGS[ranking] else 1)]
    if "tied" in ranking:
        np.round(members[0], 2, out=members[0])
    gold = rng.normal(size=(prompts, answers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    settings = RANKINGS[ranking]
    proxy = combined(members, *settings, "population") if settings else members[0]
    found = expected(proxy, {"gold": gold}, NS)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    assert found["gold"].shape == (prompts, len(NS))
    return *seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=12600)
    args = parser.parse_args()
    print(f"{args.prompts} prompts, {args.answers} answers, {len(NS)} n; numpy {np.__version__}")
    print(f"{'':32} {'wall s':>7} {'CPU s':>7} {'MiB':>7}")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for name in RANKINGS:
            wall, cpu, memory = fresh.submit(measured, name, args.prompts, args.answers).result()
            print(f"{name:32} {wall:7.2f} {cpu:7.2f} {memory:7.0f}")


if __name__ == "__main__":
    main()
