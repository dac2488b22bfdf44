"""What the report of a probe says, on a made-up study of three families and two layers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.report.probes import as_markdown, as_text, ranked, write

PNG = b"\x89PNG"
# AUROC on the selection and on the report split, by layer.
STUDY = {
    "logistic": {0: (0.6, 0.70), 8: (0.9, 0.85)},
    "ccs": {0: (0.8, 0.75), 8: (0.8, 0.65)},
    "random": {0: (0.55, 0.52), 8: (0.5, 0.51)},
}


def row(split: str, probe: str, layer: int | None, ensembling: str, auroc: float) -> dict[str, Any]:
    spread = {"value": auroc, "low": auroc - 0.03, "high": auroc + 0.03}
    names = {"split": split, "probe": probe, "layer": layer, "ensembling": ensembling, "n": 200}
    return names | dict.fromkeys(("accuracy", "auroc", "calibrated_accuracy", "ece"), spread)


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "chosen": {
            "probe": "logistic",
            "layer": 8,
            "sign": "by the fit itself, on 80 labelled examples",
            "selected_by": "AUROC on the selection split",
        },
        "data": {
            "train": 80,
            "selection": 20,
            "report": 200,
            "templates": ["yes_no", "truthful"],
            "cut": 3,
        },
        "rows": [
            row(split, probe, layer, mode, aurocs[i] + (0.02 if mode == "full" else 0))
            for probe, layers in STUDY.items()
            for layer, aurocs in layers.items()
            for i, split in enumerate(("selection", "report"))
            for mode in ("none", "partial", "full")
        ],
        "separability": {"0": 0.512, "8": 0.498},
        "zero_shot": row("report", "LM zero-shot", None, "partial", 0.72),
        "transfer": {
            "names": ["this", "imdb"],
            "trained_on": ["this", "imdb", "pooled"],
            "auroc": [[0.85, 0.61], [0.58, 0.93], [0.84, 0.92]],
        },
        "notes": ["ccs, layer 0: all restarts agree"],
    }


def test_probes_are_ranked_at_the_layer_the_selection_split_chose(report: dict[str, Any]) -> None:
    found = [(r["probe"], r["layer"], r["auroc"]["value"]) for r in ranked(report)]
    assert found == [  # ccs ties on selection: the last layer, though worse on the report split
        ("logistic", 8, 0.85),
        ("LM zero-shot", None, 0.72),
        ("ccs", 8, 0.65),
        ("random", 0, 0.52),
    ]
    report["chosen"]["layer"] = 0  # the user's wish
    assert [r["layer"] for r in ranked(report) if r["probe"] == "logistic"] == [0]


def test_markdown_tells_choice_sign_and_every_table(report: dict[str, Any]) -> None:
    text = as_markdown(report)
    for line in (
        "# Probe logistic, layer 8",
        "- Chosen by AUROC on the selection split.",
        "- Sign: by the fit itself, on 80 labelled examples.",
        "- Fitted on 80 examples, chosen on 20, reported on 200; 3 passages were cut to fit.",
        "- Templates: yes_no, truthful.",
        "| **logistic** | 8 | 0.900 |" + " 0.850 [0.820, 0.880] |" * 4,
        "| LM zero-shot | - | - |" + " 0.720 [0.690, 0.750] |" * 4,
        "| random (control) | 0 | 0.550 |" + " 0.520 [0.490, 0.550] |" * 4,
        "| full |" + " 0.870 [0.840, 0.900] |" * 4,
        "| layer | selection AUROC | AUROC | accuracy | ECE | separability |",
        "| 0 | 0.600 |" + " 0.700 [0.670, 0.730] |" * 3 + " 0.512 |",
        "| trained on | this | imdb |",
        "| **pooled** | 0.840 | 0.920 |",
        "- ccs, layer 0: all restarts agree",
    ):
        assert f"\n{line}\n" in f"\n{text}", line
    report["rows"] += [row("train", "logistic", layer, "partial", 0.99) for layer in (0, 8)]
    assert "| 8 | 0.990 | 0.900 | 0.850 " in as_markdown(report)


def test_terminal_table_is_short_and_keeps_the_controls(report: dict[str, Any]) -> None:
    for i in range(12):
        for split in ("selection", "report"):
            report["rows"].append(row(split, f"probe {i}", 0, "partial", 0.99 - i / 1000))
    lines = as_text(report).splitlines()
    assert len(lines) == 15
    assert lines[0] == "probe logistic at layer 8, by AUROC on the selection split"
    assert lines[1] == "sign: by the fit itself, on 80 labelled examples"
    assert [line[2:].split("  ")[0] for line in lines[3:]] == [
        *(f"probe {i}" for i in range(8)),
        "logistic",
        "LM zero-shot",
        "random",
        "and 5 more in report.md",
    ]
    assert " ".join(lines[11].split()) == "* logistic 8 0.850 [0.820, 0.880] 0.850 0.850"


def test_files_of_a_report(report: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == as_markdown(report)
    with (tmp_path / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["rows"]) + 1
    last = lines[-1]
    assert (last["probe"], last["layer"], last["ensembling"]) == ("LM zero-shot", "", "partial")
    assert [float(last[k]) for k in ("ece", "auroc_low", "auroc_high")] == pytest.approx(
        [0.72, 0.69, 0.75]
    )
    for name in ("by_layer", "transfer"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10_000


def test_a_report_of_one_layer_without_model_or_transfer(
    report: dict[str, Any], tmp_path: Path
) -> None:
    report["rows"] = [r for r in report["rows"] if r["layer"] == 8]
    report |= {"separability": {}, "zero_shot": None, "transfer": None, "notes": []}
    report["data"]["templates"] = []
    write(tmp_path, report)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "by_layer.png",
        "report.csv",
        "report.json",
        "report.md",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "- Templates: unknown." in text
    assert "| 8 | 0.900 |" + " 0.850 [0.820, 0.880] |" * 3 + " - |" in text
    assert not any(word in text for word in ("zero-shot", "Transfer", "Notes"))
    assert [r["probe"] for r in ranked(report)] == ["logistic", "ccs", "random"]


def test_by_layer_figure_shows_the_chosen_interval_and_the_controls(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    write(tmp_path, report)
    monkeypatch.undo()
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["logistic (chosen)"]) == [0.70, 0.85]
    assert list(lines["ccs"]) == [0.75, 0.65]
    assert list(lines["LM zero-shot"]) == [0.72, 0.72]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.67, 0.88))
    assert [t.get_text() for t in drawn[1].axes[0].texts][-2:] == ["0.84", "0.92"]
    plt.close("all")
