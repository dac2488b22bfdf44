"""Which algorithm runs with which reward, read from what runs left behind.

    python -m rlhf_exp.report.matrix <folder> > docs/support-matrix.md

`<folder>` holds runs as <algorithm>/<reward>/, anywhere below it, as tests/test_matrix.py makes
them; so does a sweep whose hydra.sweep.subdir is
${hydra:runtime.choices.algo}/${hydra:runtime.choices.reward}.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """\
# Which algorithm runs with which reward

Made from {count} runs by `python -m rlhf_exp.report.matrix`; tests/test_matrix.py tells how to make
it again. Each cell is one short run on the embedded world, on a CPU: the change of the reward that
the run was given, on held-out prompts, in standard deviations of that reward before training.
**Bold**: the 95 % interval of the change lies above 0. "none": no run that finished.

"""
FOOT = """
Versions: {versions}. `sft` learns from demonstrations, `alt_lmc`, `alt_lmu` and `steerlm` from a
judge's feedback, so nothing says that the run's reward should rise with them; in all other rows it
should. `best_of_n` trains nothing: its row is what the best of n answers is worth.
"""


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Finished runs below `folder` by algorithm and reward; ValueError if there are none."""
    found = {}
    for path in sorted(folder.rglob("summary.json")):
        run = path.parent
        found[run.parent.name, run.name] = {
            "summary": json.loads(path.read_text()),
            "about": json.loads((run / "run.json").read_text()),
            "spread": _spread(run),
        }
    if not found:
        raise ValueError(
            f"{folder} holds no finished run: give a folder with runs as <algorithm>/<reward>/"
        )
    return found


def _spread(run: Path) -> float:
    """Standard deviation of the reward over the completions before training."""
    first = min((run / "evaluation").glob("step-*.json"))
    scores = [row["proxy"] for row in json.loads(first.read_text())["rows"]]
    mean = sum(scores) / len(scores)
    return (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5


def as_markdown(runs: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The page."""
    algorithms, rewards = (list(dict.fromkeys(names)) for names in zip(*runs, strict=True))
    lines = [f"| | {' | '.join(rewards)} |", "|---|" + "---|" * len(rewards)]
    for algorithm in algorithms:
        cells = [_cell(runs.get((algorithm, reward))) for reward in rewards]
        lines.append(f"| `{algorithm}` | {' | '.join(cells)} |")
    versions = next(iter(runs.values()))["about"]["versions"]
    named = ", ".join(f"{k} {versions[k]}" for k in ("rlhf_exp", "torch", "transformers", "trl"))
    table = "\n".join(lines) + "\n"
    return HEAD.format(count=len(runs)) + table + FOOT.format(versions=named)


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return "none"
    change = run["summary"]["proxy"]["change"]
    text = f"{change['mean'] / max(run['spread'], 1e-9):+.1f}"
    return f"**{text}**" if change["interval"][0] > 0 else text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rlhf_exp.report.matrix <folder of runs>")
    try:
        print(as_markdown(read(Path(sys.argv[1]))), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")
