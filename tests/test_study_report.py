"""The report of a study: its numbers, computed anew from the stored files, its words, its page."""

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import environment
from scipy.optimize import curve_fit
from stored import stored

from rlhf_exp.report.estimates import Estimate
from rlhf_exp.report.study import Report
from rlhf_exp.report.tables import Column, Table, shown

ATTACK = "</script><img src=x onerror=alert(1)> | *b*"
PROMPTS = [f"{ATTACK} {i}" for i in range(6)]
KL = (0.0, 1.0, 4.0, 9.0)
SINGLE, ENSEMBLE = "pairwise", "ensemble_small"
ALPHA = {SINGLE: 0.8, ENSEMBLE: 1.1}
BETA = 0.6
SEEDS = 4
Rows = list[dict[str, str]]


def evaluations(reward: str, coefficient: int, seed: int) -> Iterator[dict[str, Any]]:
    """Gold as in Gao's form, with an offset by prompt and seed and noise by all; proxy rises."""
    noise = np.random.default_rng([seed, coefficient, len(reward)])
    for step, kl in enumerate(KL):
        d = math.sqrt(kl)
        rise = d * (ALPHA[reward] - BETA * math.log(d)) if d else 0.0
        gold = np.linspace(-1, 1, len(PROMPTS)) + rise + (noise.normal(0, 0.02, 6) if d else 0)
        win = (noise.random(6) < 0.7) * 1.0
        yield {"step": 10 * step, "gold": gold, "proxy": gold + d, "k1": kl, "win": win}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rewards by two KL coefficients by four seeds; one seed is missing, one run not done."""
    root = tmp_path_factory.mktemp("study")
    for reward in (SINGLE, ENSEMBLE):
        for i, coefficient in enumerate((0, 0.1)):
            for seed in range(SEEDS - (reward == ENSEMBLE and i)):
                asked = [f"reward={reward}", f"algo.kl_coef={coefficient}", f"seed={seed}"]
                found = list(evaluations(reward, i, seed))
                name = f"{reward}-{coefficient}-{seed}"
                stored(root / name, asked, evaluations=found, prompts=PROMPTS)
    partial = stored(root / "partial", ["seed=9"], evaluations=[{"step": 0, "gold": 0, "k1": 0}])
    about = json.loads((partial / "run.json").read_text())
    del about["finished"], about["artifacts"]
    (partial / "run.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    settings = Report(baseline={"reward": SINGLE}, kl=[1.0, 2.0], resamples=400, samples=2)
    return settings.write([str(folder)], folder / "report").parent


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "report.html").read_text()


def rows(report: Path, name: str) -> Rows:
    with (report / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path, reward: str, coefficient: object) -> list[list[dict[str, Any]]]:
    """The evaluation files of an arm, by seed."""
    runs = sorted(folder.glob(f"{reward}-{coefficient}-*"))
    return [[json.loads(p.read_text()) for p in sorted(r.glob("evaluation/*.json"))] for r in runs]


def column(evaluation: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in evaluation["rows"]]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def peak(run: list[dict[str, Any]]) -> float:
    """Picked on every other prompt, measured on the rest, both ways."""
    golds = [column(e, "gold") for e in run]
    halves = []
    for one, other in ((0, 1), (1, 0)):
        best = max(range(len(golds)), key=lambda i: mean(golds[i][one::2]))
        halves.append(mean(golds[best][other::2]))
    return mean(halves)


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("reward", [SINGLE, ENSEMBLE])
def test_arms_are_what_the_stored_files_give(folder: Path, report: Path, reward: str) -> None:
    arm = f"reward={reward}, kl_coef=0"
    [told] = [row for row in rows(report, "arms") if row["arm"] == arm]
    runs = files(folder, reward, 0)
    finals = [mean(column(run[-1], "gold")) for run in runs]
    peaks = [peak(run) for run in runs]
    assert told["seeds"] == str(SEEDS)
    assert float(told["final"]) == pytest.approx(mean(finals))
    assert float(told["final_iqm"]) == pytest.approx(mean(sorted(finals)[1:3]))
    assert float(told["peak"]) == pytest.approx(mean(peaks))
    assert float(told["gap"]) == pytest.approx(mean(peaks) - mean(finals))
    assert float(told["final_low"]) < mean(finals) < float(told["final_high"])
    [other] = [row for row in rows(report, "behavior") if row["arm"] == arm]
    assert float(other["win"]) == pytest.approx(mean([mean(column(r[-1], "win")) for r in runs]))
    assert float(other["kl"]) == pytest.approx(9.0)
    assert float(other["proxy"]) == pytest.approx(mean(finals) + 3)


def test_relative_gain_is_told_over_the_single_reward(folder: Path, report: Path) -> None:
    gains = {
        reward: mean(
            [
                mean(column(r[-1], "gold")) - mean(column(r[0], "gold"))
                for r in files(folder, reward, 0)
            ]
        )
        for reward in (SINGLE, ENSEMBLE)
    }
    [told] = [r for r in rows(report, "arms") if r["arm"] == f"reward={ENSEMBLE}, kl_coef=0"]
    assert float(told["relative_gain"]) == pytest.approx(gains[ENSEMBLE] / gains[SINGLE] - 1)


def test_contrasts_are_paired_by_seed_and_prompt(folder: Path, report: Path) -> None:
    told = {(r["setting"], r["stratum"]): r for r in rows(report, "contrasts")}
    found = told["reward", "kl_coef=0"]
    pairs = [
        (a, b)
        for one, two in zip(files(folder, ENSEMBLE, 0), files(folder, SINGLE, 0), strict=True)
        for a, b in zip(column(one[-1], "gold"), column(two[-1], "gold"), strict=True)
    ]
    assert (found["value"], found["against"]) == (ENSEMBLE, SINGLE)
    assert float(found["difference"]) == pytest.approx(mean([a - b for a, b in pairs]))
    assert float(found["win_rate"]) == pytest.approx(
        mean([(a > b) + (a == b) / 2 for a, b in pairs])
    )
    assert (found["seeds"], found["paired"], found["verdict"]) == ("4", "true", "higher")
    assert ("reward", "all 2 strata") in told
    assert told["reward", "all 2 strata"]["seeds"] == "3", "one seed is missing in a stratum"


def test_gold_at_equal_kl_is_read_off_the_way(folder: Path, report: Path) -> None:
    told = {(r["arm"], float(r["kl"])): r for r in rows(report, "equal_kl")}
    arm = f"reward={SINGLE}, kl_coef=0"
    golds = [[mean(column(e, "gold")) for e in run] for run in files(folder, SINGLE, 0)]
    assert float(told[arm, 1.0]["gold"]) == pytest.approx(mean([g[1] for g in golds]))
    between = mean([g[1] + (g[2] - g[1]) / 3 for g in golds])  # 2 nats: a third from 1 to 4
    assert float(told[arm, 2.0]["gold"]) == pytest.approx(between)
    assert told[arm, 2.0]["reached"] == "4"


def test_fits_agree_with_another_optimizer(folder: Path, report: Path) -> None:
    [told] = [r for r in rows(report, "fits") if r["arm"] == f"reward={ENSEMBLE}, kl_coef=0"]
    points = [
        (math.sqrt(mean(column(e, "k1"))), mean(column(e, "gold")) - mean(column(run[0], "gold")))
        for run in files(folder, ENSEMBLE, 0)
        for e in run[1:]
    ]
    d, gain = np.array(points).T
    (alpha, beta), _ = curve_fit(lambda d, a, b: d * (a - b * np.log(d)), d, gain, p0=(0.1, 0.1))
    assert float(told["alpha"]) == pytest.approx(alpha, abs=1e-6)
    assert float(told["beta"]) == pytest.approx(beta, abs=1e-6)
    assert float(told["peak"]) == pytest.approx(math.exp(alpha / beta - 1), rel=1e-5)
    assert (alpha, beta) == pytest.approx((ALPHA[ENSEMBLE], BETA), abs=0.05), "as it was made"


def test_every_run_has_a_row(folder: Path, report: Path) -> None:
    told = rows(report, "runs")
    assert len(told) == 4 * SEEDS - 1
    for row in told:
        last = json.loads((Path(row["directory"]) / "evaluation" / "step-000030.json").read_text())
        assert float(row["final"]) == pytest.approx(mean(column(last, "gold")))
        assert (row["tokens"], row["seconds"]) == ("3000", "60.0")
    assert {row["runs"] for row in rows(report, "cost")} == {"4", "3"}


# ------------------------------------------------------------------------------------------- words


def test_nothing_is_claimed_where_an_interval_includes_zero(report: Path, page: str) -> None:
    told = rows(report, "contrasts")
    for row in told:
        low, high = float(row["difference_low"]), float(row["difference_high"])
        assert row["verdict"] == ("higher" if low > 0 else "lower" if high < 0 else "open")
    assert {row["verdict"] for row in told} >= {"higher", "open"}, "the data hold both"
    lead = page[page.index("<header>") : page.index("</header>")]
    lead = " ".join(re.sub("<[^>]*>", " ", lead.split("</h1>")[1]).split())
    assert lead.startswith("15 finished runs: 4 arms of 3 to 4 seeds; 1 directory left out")
    lead, gaps = lead.split("The over-optimization gap (")
    [gap] = [row for row in rows(report, "gap_contrasts") if row["stratum"].startswith("all")]
    assert f"reward, {ENSEMBLE} \u2212 {SINGLE}: " in gaps
    assert gaps.endswith(f": {gap['verdict']}")
    settled, is_open = re.split(r"1 is open: ", lead)
    assert "1 has an interval that excludes 0: reward, ensemble_small" in settled
    assert "higher" in settled
    assert is_open.startswith("algo.kl_coef, 0.1 \u2212 0")
    assert "higher" not in is_open
    assert "lower" not in is_open
    assert "better" not in lead


def test_what_was_left_out_is_named_before_anything_is_shown(folder: Path, page: str) -> None:
    [told] = re.findall(r'<section id="left-out".*?</section>', page, re.DOTALL)
    assert f"{folder / 'partial'} is not finished (partial" in told
    assert f"Arms with fewer than 4 seeds: reward={ENSEMBLE}, kl_coef=0.1 (3)." in told
    assert page.index('id="left-out"') < page.index('id="figures"')


def test_one_seed_says_so(folder: Path, tmp_path: Path) -> None:
    names = [str(folder / f"{reward}-0-0") for reward in (SINGLE, ENSEMBLE)]
    path = Report(resamples=200, samples=0).write(names, tmp_path)
    text = path.read_text()
    assert "One seed per arm: intervals are over prompts" in text
    assert "other seeds may differ" in text
    assert 'id="completions"' not in text, "samples=0"
    assert 'id="left-out"' in text


# -------------------------------------------------------------------------------------------- page


class Parsed(HTMLParser):
    """The page as a browser reads it: tags, ids, addresses."""

    VOID = ("meta", "br", "img", "link", "input", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            self.ids += [value or ""] if name == "id" else []
            self.addresses += [value or ""] if name in ("src", "href", "xlink:href") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(report: Path, page: str) -> None:
    parsed = Parsed(page)
    assert parsed.open == [], "every tag is closed"
    assert len(parsed.ids) == len(set(parsed.ids)) > 100
    assert {"table", "svg", "nav", "details"} <= set(parsed.tags)
    assert parsed.tags.count("script") == 1
    assert not {"img", "link", "iframe"} & set(parsed.tags)
    inner = [a for a in parsed.addresses if a.startswith("#")]
    assert inner
    assert {a[1:] for a in inner} <= set(parsed.ids)
    outer = set(parsed.addresses) - set(inner)
    assert outer == {str(p.relative_to(report)) for p in report.glob("*/*")}, "each file has a link"
    assert not re.search(r"url\((?!#)|@import", page)


def test_texts_cannot_become_markup(page: str) -> None:
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("<script>") == page.count("</script>") == 1


def test_completions_are_the_first_prompts_of_the_first_seed(page: str) -> None:
    [told] = re.findall(r'<section id="completions".*?</section>', page, re.DOTALL)
    assert "The first 2 held-out prompts" in told
    assert told.count("start policy</header>") == 2
    assert told.count("seed 0</header>") == 2 * 4
    assert " 0 at 30</p>" in told
    assert " 2 at 30</p>" not in told


def test_the_same_runs_give_the_same_bytes_without_torch(
    folder: Path, report: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf_exp.report.study import Report; "
        f"Report(baseline={{'reward': {SINGLE!r}}}, kl=[1.0, 2.0], resamples=400, samples=2)"
        f".write([{str(folder)!r}], Path({str(tmp_path)!r})); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    made = {p.relative_to(report): p.read_bytes() for p in report.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert made == again
    assert len(made) > 25


# ------------------------------------------------------------------------------------------ tables

MADE = Table(
    name="t",
    title="T",
    note="How to read it.",
    columns=[
        Column(key="arm", head="a|b", colors={"x|<y>": "#123456"}),
        Column(key="gold", head="gold", interval=True, signed=True),
        Column(key="paired", head="paired"),
    ],
    rows=[
        {"arm": "x|<y>", "gold": Estimate(mean=1 / 3, low=-0.25, high=0.5), "paired": True},
        {"arm": "z", "gold": None},
    ],
)


def test_tables_have_full_numbers_for_machines_and_rounded_ones_for_people() -> None:
    assert MADE.to_csv().splitlines() == [
        "arm,gold,gold_low,gold_high,paired",
        f"x|<y>,{1 / 3},-0.25,0.5,true",
        "z,,,,",
    ]
    *_, head, _, first, last = MADE.to_markdown().splitlines()
    assert head == "| a\\|b | gold | paired |"
    assert first == "| x\\|&lt;y> | +0.333 [\u22120.250, +0.500] | yes |"
    assert last == "| z | \u2013 | \u2013 |"


def test_tables_are_sortable_and_escaped() -> None:
    text = str(MADE.to_html())
    assert text.count('<th scope="col" aria-sort="none"') == 3
    assert '<button type="button">a|b</button>' in text
    assert f'class="number" data-value="{1 / 3}">+0.333' in text
    assert 'style="background:#123456"></span>x|&lt;y&gt;</td>' in text
    assert "<details>" not in text
    long = Table(**vars(MADE) | {"rows": MADE.rows * 20})
    assert "<details><summary>40 rows</summary>" in str(long.to_html())


def test_numbers_as_people_read_them() -> None:
    told = [shown(-0.0004), shown(1234567.0, 0), shown(0.5, 2, signed=True), shown(None)]
    assert told == ["0.000", "1\u202f234\u202f567", "+0.50", "\u2013"]


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"baseline": {"rewards": "x"}}, "report.baseline=rewards is not known; choose one of"),
        (
            {"baseline": {"reward": "x"}},
            f"report.baseline.reward=x is not known; choose one of {ENSEMBLE}, {SINGLE}",
        ),
        ({"kl": [0.0]}, "report.kl=0.0 is no KL at which arms can be compared: give nats above 0"),
        ({"resamples": 5}, "report.resamples=5 is too few for an interval: give at least 100"),
        ({"samples": -1}, "report.samples=-1 must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(folder: Path, tmp_path: Path, settings: Any, told: str) -> None:
    names = [str(folder / f"{reward}-0-0") for reward in (SINGLE, ENSEMBLE)]
    with pytest.raises(ValueError, match=re.escape(told)):
        Report(**settings).write(names, tmp_path)
    assert not list(tmp_path.iterdir())
