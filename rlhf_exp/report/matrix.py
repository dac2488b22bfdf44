"""Which algorithm runs with which reward, or on which hardware, read from what runs left behind.

    python -m rlhf_exp.report.matrix reward <folder> > docs/support-matrix.md
    python -m rlhf_exp.report.matrix hardware <folder> >> docs/support-matrix.md

`<folder>` holds runs as <algorithm>/<reward>/ or <algorithm>/<hardware>/, anywhere below it.
tests/test_matrix.py makes the first; a sweep whose hydra.sweep.subdir is
${hydra:runtime.choices.algo}/${hydra:runtime.choices.hardware} makes the second:

    python -m rlhf_exp -m experiment=debug reward=lexicon algo=ppo,rest,quark,dpo \\
        hardware=cpu,zero2,zero3 hardware.processes=2 hydra.sweep.dir=<folder> \\
        'hydra.sweep.subdir=${hydra:runtime.choices.algo}/${hydra:runtime.choices.hardware}'
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = {
    "reward": """\
# Which algorithm runs with which reward

Made from {count} runs by `python -m rlhf_exp.report.matrix reward`; tests/test_matrix.py tells how
to make it again. Each cell is one short run on the embedded world, on a CPU: the change of the
reward that the run was given, on held-out prompts, in standard deviations of that reward before
training. **Bold**: the 95 % interval of the change lies above 0. "none": no run that finished.

""",
    "hardware": """
# Which algorithm runs on which hardware

Made from {count} runs by `python -m rlhf_exp.report.matrix hardware`, whose source tells how to
make it again. Each cell is one run of a few steps (experiment=debug reward=lexicon) in as many
processes as it says, from the start to the evaluation: the change of the reward, too short to be
more than noise. That several processes learn what one does is tested (tests/test_divided.py,
tests/test_fsdp.py). "none": no run that finished.

""",
}
FOOT = {
    "reward": """
Versions: {versions}. `sft` learns from demonstrations, `alt_lmc`, `alt_lmu` and `steerlm` from a
judge's feedback, so nothing says that the run's reward should rise with them; in all other rows it
should. `best_of_n` trains nothing: its row is what the best of n answers is worth.
""",
    "hardware": """
Versions: {versions}; devices: {devices}. Under `fsdp2` TRL's trainers (`sft`, `dpo`, `grpo`,
`rloo`) are refused.
""",
}


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Finished runs below `folder` by algorithm and column; ValueError if there are none."""
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
            f"{folder} holds no finished run: give a folder with runs as <algorithm>/<reward>/ or "
            "<algorithm>/<hardware>/"
        )
    return found


def _spread(run: Path) -> float:
    """Standard deviation of the reward over the completions before training."""
    first = min((run / "evaluation").glob("step-*.json"))
    scores = [row["proxy"] for row in json.loads(first.read_text())["rows"]]
    mean = sum(scores) / len(scores)
    return (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5


def as_markdown(by: str, runs: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The page, or its part, of algorithms `by` reward or hardware."""
    algorithms, columns = (list(dict.fromkeys(names)) for names in zip(*runs, strict=True))
    heads = [_column(by, name, runs) for name in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    for algorithm in algorithms:
        cells = [_cell(runs.get((algorithm, column))) for column in columns]
        lines.append(f"| `{algorithm}` | {' | '.join(cells)} |")
    versions = next(iter(runs.values()))["about"]["versions"]
    packages = ("rlhf_exp", "torch", "transformers", "trl")
    named = ", ".join(f"{k} {versions[k]}" for k in packages if k in versions)
    kinds = {_device(run["about"]) for run in runs.values()}
    table = "\n".join(lines) + "\n"
    foot = FOOT[by].format(versions=named, devices=", ".join(sorted(kinds)))
    return HEAD[by].format(count=len(runs)) + table + foot


def _device(about: dict[str, Any]) -> str:
    found = "cuda" if about["machine"]["gpus"] else "cpu"
    return about["config"]["hardware"]["device"] or found


def _column(by: str, name: str, runs: dict[tuple[str, str], dict[str, Any]]) -> str:
    if by == "reward":
        return name
    first = next(run for (_, column), run in runs.items() if column == name)
    return f"{name} x {first['about']['config']['hardware']['processes']}"


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return "none"
    change = run["summary"]["proxy"]["change"]
    text = f"{change['mean'] / max(run['spread'], 1e-9):+.1f}"
    return f"**{text}**" if change["interval"][0] > 0 else text


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in HEAD:
        sys.exit("usage: python -m rlhf_exp.report.matrix reward|hardware <folder of runs>")
    try:
        print(as_markdown(sys.argv[1], read(Path(sys.argv[2]))), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")
