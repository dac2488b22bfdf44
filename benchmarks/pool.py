"""How long a large pool takes to be cut into quantiles, thinned, and chosen from.

python benchmarks/pool.py [rows]
"""

import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from rlhf_exp.algorithms.pool import balanced, numbered, quantiles, survivors

PROMPTS, LABELS = 10_000, 5


def main(rows: int) -> None:
    """Print CPU-seconds of each operation on `rows` rows."""
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=rows), rng.integers(0, PROMPTS, rows)
    prompts = [f"prompt {i}" for i in groups]
    one = np.zeros(rows, dtype=np.int64)
    labels = quantiles(scores, groups, LABELS)
    ended = rng.random(rows) < 0.8
    work: dict[str, Callable[[], object]] = {
        "number the prompts": lambda: numbered(prompts),
        "quantiles of the whole pool": lambda: quantiles(scores, one, LABELS),
        "quantiles of each prompt": lambda: quantiles(scores, groups, LABELS),
        "forget half, by prompt": lambda: survivors(groups, 0.5, rng),
        "choose 10 of each prompt": lambda: balanced(
            groups, labels, ended, count=10, kinds=LABELS, fill=True, rng=rng
        ),
    }
    for name, call in work.items():
        started = time.process_time()
        call()
        print(f"{name:30} {time.process_time() - started:6.2f} CPU-s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
