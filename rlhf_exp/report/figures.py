"""Figures of one run, from its stored files alone."""

import json
from pathlib import Path
from typing import Any

from rlhf_exp.evaluation.summary import read_evaluations
from rlhf_exp.report.look import GOLD, GREY, LOOK, PROXY


def draw(directory: Path) -> None:
    """Write figures/{scores_by_step,scores_by_kl}.png, members.png if the reward has members, and
    kl_coefficient.png if there is one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(LOOK)
    evaluations = read_evaluations(directory)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "reward/proxy" in row]
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    plots: dict[str, tuple[Any, Any]] = {
        "scores_by_step": (_by_step, evaluations),
        "scores_by_kl": (_by_kl, evaluations),
    }
    if any(k.startswith("reward/proxy/") for k in evaluations[0]["metrics"]):
        plots["members"] = _members, evaluations
    if any(row.get("kl/coef") for row in steps):
        plots["kl_coefficient"] = _kl_coefficient, steps
    for name, (plot, shown) in plots.items():
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        plot(axes, shown)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


def _series(evaluations: list[dict[str, Any]], key: str) -> list[float]:
    return [e["metrics"][key] for e in evaluations]


def _by_step(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    _scores(axes, [e["step"] for e in evaluations], evaluations)
    axes.set_xlabel("step")


def _by_kl(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    _scores(axes, [max(0.0, k) ** 0.5 for k in _series(evaluations, "kl/k1")], evaluations)
    axes.set_xlabel("√KL to the start (√nats)")


def _scores(axes: Any, x: list[float], evaluations: list[dict[str, Any]]) -> None:
    curves = (("reward/proxy", PROXY, "proxy (trained on)"), ("reward/gold", GOLD, "gold"))
    for key, color, label in curves:
        y = _series(evaluations, key)
        axes.plot(x, y, "o-", color=color, markersize=3, label=label)
    axes.set_ylabel("mean score on held-out prompts")
    axes.legend(frameon=False)


def _members(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    x = [e["step"] for e in evaluations]
    names = [k for k in evaluations[0]["metrics"] if k.startswith("reward/proxy/")]
    for i, name in enumerate(names):
        axes.plot(
            x,
            _series(evaluations, name),
            color=GREY,
            alpha=0.7,
            linewidth=1,
            label="members" if i == 0 else None,
        )
    axes.plot(
        x, _series(evaluations, "reward/proxy"), "o-", color=PROXY, markersize=3, label="objective"
    )
    axes.set(xlabel="step", ylabel="mean score on held-out prompts")
    axes.legend(frameon=False)


def _kl_coefficient(axes: Any, steps: list[dict[str, Any]]) -> None:
    x = [row["step"] for row in steps]
    axes.plot(x, [row["kl/coef"] for row in steps], color=PROXY)
    axes.set(xlabel="step", ylabel="KL coefficient")
    axes.set_ylim(bottom=0)
    if "kl/k1" not in steps[0]:
        return
    right = axes.twinx()
    right.plot(x, [row["kl/k1"] for row in steps], color=GREY)
    right.set_ylabel("KL to the start (nats)", color=GREY)
    right.grid(visible=False)
