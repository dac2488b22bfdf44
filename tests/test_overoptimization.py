"""Peaks that noise does not make, gold at equal KL, fits, and settings against each other."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from stored import stored

from rlhf_exp.report import records
from rlhf_exp.report.contrasts import contrasts, relative_gains
from rlhf_exp.report.overoptimization import (
    arms,
    at_kl,
    course,
    fit,
    measured,
    shared_seeds,
    summaries,
)
from rlhf_exp.report.statistics import iqm

PROMPTS = 6


def run(folder: Path, gold: Any, kl: Any, *overrides: str, steps: Any = None, **columns: Any):
    """A stored run with gold [E, P] or [E] and KL [E] by evaluation."""
    steps = range(len(kl)) if steps is None else steps
    columns = {k: list(v) for k, v in columns.items()}
    evaluations = [
        {"step": step, "gold": np.broadcast_to(g, PROMPTS).tolist(), "k1": float(k)}
        | {name: values[i] for name, values in columns.items()}
        for i, (step, g, k) in enumerate(zip(steps, gold, kl, strict=True))
    ]
    return stored(folder, overrides, evaluations=evaluations)


def read(folder: Path) -> list[records.Record]:
    found, left_out = records.read([str(folder)])
    assert left_out == []
    return found


# --------------------------------------------------------------------------------------- one run


def test_a_peak_is_picked_on_other_prompts_than_those_that_measure_it(tmp_path: Path) -> None:
    even, odd = slice(0, None, 2), slice(1, None, 2)
    gold = np.zeros((4, PROMPTS))
    gold[1, even], gold[1, odd] = 3.0, 1.0  # even prompts are highest at 1, odd ones at 2
    gold[2, even], gold[2, odd] = 2.0, 5.0
    gold[3] = 1.5
    run(tmp_path, gold, [0, 1, 4, 9], proxy=[0, 1, 2, 4])
    [record] = read(tmp_path)
    found = course(record)
    assert (found.start, found.final) == (0.0, 1.5)
    assert found.peak == (2.0 + 1.0) / 2, "even prompts at 2, odd ones at 1"
    assert found.gap == 0.0
    assert (found.peak_step, found.peak_kl, found.kl) == (2, 4.0, 9.0), "3.5 on all prompts"
    assert (found.proxy_change, found.gold_change) == (4.0, 1.5)
    assert found.share == 0.0


def test_a_run_that_ends_at_its_peak_has_no_gap_and_one_that_falls_has(tmp_path: Path) -> None:
    run(tmp_path / "rises", [0, 1, 2], [0, 1, 2], "seed=0")
    run(tmp_path / "falls", [0, 4, 1], [0, 1, 2], "seed=1")
    run(tmp_path / "sinks", [0, -1, -2], [0, 1, 2], "seed=2")
    falls, rises, sinks = map(course, read(tmp_path))
    assert (rises.peak, rises.gap, rises.share) == (2.0, 0.0, 0.0)
    assert (falls.peak, falls.gap, falls.share) == (4.0, 3.0, 0.75)
    assert (sinks.peak, sinks.gap, sinks.share) == (0.0, 2.0, None), "nothing was gained"


def test_noise_alone_makes_no_gap(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gaps, naive = [], []
    for seed in range(40):
        gold = rng.normal(size=(7, PROMPTS))
        run(tmp_path / str(seed), gold, range(7), f"seed={seed}")
        naive.append(gold.mean(1).max() - gold[-1].mean())
    gaps = [course(record).gap for record in read(tmp_path)]
    error = np.std(gaps) / math.sqrt(40)
    assert abs(np.mean(gaps)) < 2.5 * error
    assert np.mean(naive) > 5 * error


def test_one_prompt_has_no_halves(tmp_path: Path) -> None:
    stored(tmp_path, evaluations=[{"step": 0, "gold": [1.0], "k1": 0.0}], prompts=["only"])
    with pytest.raises(ValueError, match=r"evaluated on one prompt.*raise evaluation\.prompts$"):
        course(read(tmp_path)[0])


def test_gold_at_a_kl_lies_on_the_way_to_the_first_crossing(tmp_path: Path) -> None:
    gold = np.array([[0.0], [2.0], [6.0], [1.0], [9.0]]) + np.arange(PROMPTS)
    run(tmp_path, gold, [0, 1, 3, 2, 5])
    [record] = read(tmp_path)

    def mean_at(kl: float) -> float:
        found = at_kl(record, kl)
        assert found is not None
        assert found - found[0] == pytest.approx(np.arange(PROMPTS)), "by prompt"
        return found[0]

    assert [mean_at(kl) for kl in (0, 0.25, 1, 2.5, 3)] == [0, 0.5, 2, 5, 6]
    assert mean_at(4) == pytest.approx(1 + (9 - 1) * (4 - 2) / 3), "after the way back to 2"
    assert at_kl(record, 5.1) is None
    assert at_kl(record, -0.1) is None
    kls, means = [0, 1, 3], gold[:3].mean(1)
    for kl in (0.3, 1.7, 2.9):
        found = at_kl(record, kl)
        assert found is not None
        assert found.mean() == pytest.approx(np.interp(kl, kls, means))


def test_best_of_n_goes_by_its_nominal_kl_and_extrapolates_to_no_start(tmp_path: Path) -> None:
    ns = [2, 4, 8]
    kls = [math.log(n) - (n - 1) / n for n in ns]
    run(tmp_path, [1, 2, 3], kls, "algo=best_of_n", steps=ns)
    [record] = read(tmp_path)
    assert record.nominal
    assert at_kl(record, kls[0] / 2) is None
    found = at_kl(record, (kls[1] + kls[2]) / 2)
    assert found is not None
    assert found.mean() == pytest.approx(2.5)
    assert fit([record]) is None, "it does not begin at the start policy"


def test_measures_by_name(tmp_path: Path) -> None:
    run(tmp_path, [1, 5, 3], [0, 1, 2], proxy=[0, 1, 2], length=[10, 11, 12])
    [record] = read(tmp_path)
    expected = {"final": 3, "peak": 5, "gap": 2, "gain": 2, "proxy_gain": 2, "length": 12}
    for measure, value in (expected | {("kl", 0.5): 3}).items():
        assert measured(record, measure).tolist() == [value] * PROMPTS  # type: ignore[union-attr]
    assert measured(record, "win") is None
    assert measured(record, ("kl", 3.0)) is None


# ------------------------------------------------------------------------------------------- fits


def points(form: str, rng: Any, noise: float) -> tuple[np.ndarray, np.ndarray]:
    d = np.array([0, 0.5, 1, 1.5, 2.5, 3])
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = d * (1.3 - 0.2 * d) if form == "best_of_n" else d * (1.3 - 0.8 * np.log(d))
    return d, np.nan_to_num(gain) + noise * rng.normal(size=6) * (d > 0)


@pytest.mark.parametrize("form", ["best_of_n", "ppo"])
def test_a_fit_is_that_of_least_squares_on_all_points(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(1)
    seen = []
    for seed in range(5):
        d, gain = points(form, rng, 0.05)
        seen.append((d[1:], gain[1:]))
        run(tmp_path / str(seed), 0.7 + gain, d**2, f"algo={form}", f"seed={seed}")
    found = fit(read(tmp_path))
    assert found is not None

    def curve(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        return d * (alpha - beta * (d if form == "best_of_n" else np.log(d)))

    x, y = (np.concatenate(part) for part in zip(*seen, strict=True))
    (alpha, beta), _ = curve_fit(curve, x, y)
    assert (found.alpha.mean, found.beta.mean) == pytest.approx((alpha, beta), abs=1e-6)
    slope, height = np.polyfit(x if form == "best_of_n" else np.log(x), y / x, 1, w=x)
    assert (height, -slope) == pytest.approx((alpha, beta), abs=1e-6)
    assert found.r2 == pytest.approx(1 - np.var(y - curve(x, alpha, beta)) / np.var(y), abs=0.01)
    assert (found.points, found.runs, found.reached) == (25, 5, 3.0)
    peak = alpha / (2 * beta) if form == "best_of_n" else math.exp(alpha / beta - 1)
    assert found.peak == pytest.approx(peak)
    grid = np.linspace(0.01, 10, 100_000)
    assert grid[found(grid).argmax()] == pytest.approx(peak, abs=1e-3)
    assert found.alpha.low is not None
    assert found.alpha.high is not None
    assert found.alpha.low < 1.3 < found.alpha.high
    means = []
    for _ in range(500):
        drawn = [seen[i] for i in rng.integers(0, 5, 5)]
        x, y = (np.concatenate(part) for part in zip(*drawn, strict=True))
        means.append(curve_fit(curve, x, y)[0][0])
    low, high = np.quantile(means, [0.005, 0.995])
    assert (found.alpha.low, found.alpha.high) == pytest.approx((low, high), abs=0.02)


def test_fits_that_cannot_be_and_peaks_that_never_come(tmp_path: Path) -> None:
    run(tmp_path / "two", [0, 1, 2], [0, 1, 4], "seed=0")
    run(tmp_path / "rises", [0, 1, 2, 3.1], [0, 1, 4, 9], "seed=1")
    rises, two = read(tmp_path)
    assert fit([two]) is None, "two points always fit"
    found = fit([rises])
    assert found is not None
    assert found.beta.mean < 0
    assert (found.peak, found.alpha.low, found.form) == (None, None, "training")


# ------------------------------------------------------------------------------------------- arms


@pytest.fixture
def study(tmp_path: Path) -> list[records.Record]:
    """Two rewards x two KL coefficients x five seeds; one combination is missing a seed."""
    for reward, bonus in (("pairwise", 0.0), ("ensemble", 1.0)):
        for kl, fall in (("0", 2.0), ("0.1", 0.0)):
            for seed in range(5):
                if (reward, kl, seed) == ("ensemble", "0.1", 4):
                    continue
                wiggle = 0.1 * np.array([seed, -seed, 0, 1, 0, 0]) + 0.02 * seed
                gold = [0 * wiggle, 4 + bonus + wiggle, 4 + bonus - fall + wiggle]
                overrides = f"reward={reward}", f"algo.kl_coef={kl}", f"seed={seed}"
                folder = tmp_path / f"{reward}-{kl}-{seed}"
                run(folder, gold, [0, 4, 9], *overrides, proxy=[0, 4, 8])
    return read(tmp_path)


def test_arms_and_what_their_seeds_share(study) -> None:
    found = arms(study)
    assert {arm: [r.seed for r in runs] for arm, runs in found.items()} == {
        "reward=ensemble, kl_coef=0": list("01234"),
        "reward=ensemble, kl_coef=0.1": list("0123"),
        "reward=pairwise, kl_coef=0": list("01234"),
        "reward=pairwise, kl_coef=0.1": list("01234"),
    }
    shared = shared_seeds(study)
    assert {"preferences.seed", "data.seed", "reward.member.seed", "reward.seed"} <= set(shared)
    assert shared_seeds(study[:1]) == []


def test_summaries_over_seeds(study) -> None:
    runs = arms(study)["reward=pairwise, kl_coef=0"]
    found = summaries(runs, resamples=2000)
    finals = [float(np.mean(record.last.values["gold"])) for record in runs]
    assert found["final"].mean == pytest.approx(np.mean(finals))
    assert found["final"].iqm.mean == pytest.approx(iqm(np.array(finals)))
    assert (found["final"].seeds, found["final"].prompts) == (5, PROMPTS)
    assert found["final"].scope == "seeds and prompts"
    assert (found["gap"].mean, found["kl"].mean) == pytest.approx((2.0, 9.0))
    assert (found["peak_step"].mean, found["peak_kl"].mean) == (1.0, 4.0)
    assert (found["peak_kl"].prompts, found["peak_kl"].scope) == (None, "seeds")
    assert found["proxy_gain"].mean == 8.0
    assert "win" not in found, "no run has it"
    alone = summaries(runs[:1], resamples=2000)["final"]
    assert (alone.scope, alone.iqm.low) == ("prompts", None)
    assert alone.low is not None


def test_a_contrast_pairs_seeds_and_prompts_within_strata(study) -> None:
    [found] = contrasts(study, "reward", baseline="pairwise")
    assert (found.value, found.against, found.measure) == ("ensemble", "pairwise", "final")
    without, with_kl = found.strata
    assert without.settings == {"algo.kl_coef": "0"}
    assert without.seeds == tuple("01234")
    assert with_kl.seeds == tuple("0123")
    assert found.notes == (
        "seeds that only one of reward=ensemble, kl_coef=0.1 and reward=pairwise, kl_coef=0.1 has "
        "are left out: 4",
    )
    for stratum in found.strata:
        assert stratum.difference.mean == pytest.approx(1.0)
        assert stratum.difference.low == pytest.approx(1.0), "the wiggle is common"
        assert stratum.difference.verdict == "higher"
        assert stratum.difference.win_rate is not None
        assert stratum.difference.win_rate.mean == 1.0
    assert found.overall is not None
    assert (found.overall.strata, found.overall.seeds) == (2, 4)
    [gap] = contrasts(study, "algo.kl_coef", measure="gap")
    assert (gap.value, gap.against) == ("0.1", "0")
    assert gap.overall is not None
    assert gap.overall.mean == pytest.approx(-2.0)
    assert gap.overall.verdict == "lower"
    [equal] = contrasts(study, "reward", measure=("kl", 1.0))
    assert equal.overall is not None
    assert equal.overall.mean == pytest.approx(-1.0 / 4), "pairwise after ensemble, a quarter of 1"


def test_what_cannot_be_contrasted_is_named(study) -> None:
    lacking = [r for r in study if r.settings != {"reward": "ensemble", "algo.kl_coef": "0.1"}]
    [found] = contrasts(lacking, "reward")
    assert found.notes == ("reward=ensemble has no run with kl_coef=0.1 to compare",)
    assert len(found.strata) == 1
    assert found.overall is found.strata[0].difference
    [far] = contrasts(study, "reward", measure=("kl", 10.0))
    assert (far.overall, far.strata) == (None, ())
    assert far.notes[0] == f"{study[-10].run.directory} never comes to a KL of 10"
    with pytest.raises(ValueError, match=r"rewrd is not known.*did you mean reward\?"):
        contrasts(study, "rewrd")
    with pytest.raises(ValueError, match=r"the baseline of reward=pair is not known"):
        contrasts(study, "reward", baseline="pair")


def test_settings_that_only_one_value_has_belong_to_the_value(tmp_path: Path) -> None:
    for seed in (0, 1):
        for kl in ("0", "0.1"):
            run(tmp_path / f"ppo{kl}{seed}", [0, 2], [0, 1], f"algo.kl_coef={kl}", f"seed={seed}")
        folder = tmp_path / f"bon{seed}"
        run(folder, [0, 3], [0, 1], "algo=best_of_n", f"seed={seed}", steps=[1, 2])
    found = contrasts(read(tmp_path), "algo")
    names = {(c.value, c.against) for c in found}
    assert {name for pair in names for name in pair} == {
        "best_of_n", "PPO, kl_coef=0", "PPO, kl_coef=0.1",
    }  # fmt: skip
    assert all(c.overall is not None and not c.notes for c in found)
    for c in found:
        assert c.overall is not None
        mixed = "best_of_n" in (c.value, c.against)
        assert (c.overall.win_rate is None) == mixed, "expected values are no completions"


def test_runs_that_share_no_seeds_or_prompts_are_compared_unpaired(tmp_path: Path) -> None:
    for seed in range(4):
        reward = "pairwise" if seed < 2 else "ensemble"
        run(tmp_path / str(seed), [0, 1 + (seed > 1)], [0, 1], f"reward={reward}", f"seed={seed}")
    [found] = contrasts(read(tmp_path), "reward")
    assert found.overall is not None
    assert not found.overall.paired
    assert found.overall.mean == 1.0
    assert found.notes == ("reward=ensemble and reward=pairwise have no common seeds: not paired",)
    assert sorted(found.strata[0].seeds) == list("0123")


def test_relative_gains_are_told_only_where_the_single_one_surely_gains(study) -> None:
    found = {gain.arm: gain for gain in relative_gains(study, "reward", "pairwise")}
    assert set(found) == {"reward=ensemble, kl_coef=0", "reward=ensemble, kl_coef=0.1"}
    single = arms(study)["reward=pairwise, kl_coef=0"]
    base = np.mean([r.last.mean("gold") - r.first.mean("gold") for r in single])
    gain = found["reward=ensemble, kl_coef=0"]
    assert gain.gain is not None
    assert gain.gain.mean == pytest.approx(1 / base)
    assert (gain.scope, gain.reason) == ("seeds and prompts", None)
    flat = [r for r in study if r.settings["reward"] == "ensemble"]
    with pytest.raises(ValueError, match="the single reward=pairwise is not known"):
        relative_gains(flat, "reward", "pairwise")


def test_a_single_one_that_may_gain_nothing_divides_nothing(tmp_path: Path) -> None:
    for seed in range(3):
        run(tmp_path / f"a{seed}", [0, seed - 1], [0, 1], "reward=pairwise", f"seed={seed}")
        run(tmp_path / f"b{seed}", [0, 5], [0, 1], "reward=ensemble", f"seed={seed}")
    [found] = relative_gains(read(tmp_path), "reward", "pairwise")
    assert (found.gain, found.scope) == (None, None)
    assert found.reason is not None
    assert found.reason.startswith("reward=pairwise gains 0.0 [-")
    assert found.reason.endswith("], which may be nothing or a loss")


def test_data_that_follow_the_seed_nest_the_prompts_in_the_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        for reward, gold in (("pairwise", 1), ("ensemble", 2)):
            asked = [f"{seed}: {i}" for i in range(4)]
            evaluations = [{"step": 0, "gold": 0.0, "k1": 0.0}, {"step": 1, "gold": gold, "k1": 1}]
            overrides = [f"reward={reward}", f"seed={seed}", "data.seed=${seed}"]
            folder = tmp_path / f"{reward}{seed}"
            stored(folder, overrides, evaluations=evaluations, prompts=asked)
    [found] = contrasts(read(tmp_path), "reward")
    assert found.notes == ()
    assert found.overall is not None
    assert (found.overall.scope, found.overall.paired) == ("seeds", True)
    assert (found.value, found.overall.mean) == ("pairwise", -1.0)
