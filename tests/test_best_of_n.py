"""Best-of-n: the estimator against hand-worked numbers and all subsets, rankings by ensembles, runs
that draw or read answers, resume, and merging.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import inside, logged, rows, says, the_error, timeless

from rlhf_exp.algorithms import best_of_n as algorithm
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.evaluation.best_of_n import (
    NS,
    RESULTS,
    SORTED,
    Curves,
    combined,
    expected,
    kl_bon,
    read_scores,
    usable,
    weights,
)
from rlhf_exp.generated import Generated, read_generations
from rlhf_exp.generations import PoolFile
from rlhf_exp.report import best_of_n as report
from rlhf_exp.worker import resume

pytest_plugins = ["runs_fixtures"]

VECTORS = json.loads((Path(__file__).parent / "vectors" / "best_of_n.json").read_text())[
    "best_of_n"
]
PROXY, GOLD = (np.array([p[k] for p in VECTORS["prompts_unsorted"]]) for k in ("proxy", "gold"))


def over_subsets(proxy: np.ndarray, value: np.ndarray, n: int) -> float:
    """The average over all subsets of n answers of the value at the subset's best; ties share."""
    found = []
    for subset in map(list, combinations(range(len(proxy)), n)):
        best = proxy[subset] == proxy[subset].max()
        found.append(value[subset][best].mean())
    return float(np.mean(found))


# ---- the estimator


@pytest.mark.parametrize("row", VECTORS["results"], ids=lambda row: f"n={row['n']}")
def test_worked_numbers(row: dict[str, Any]) -> None:
    found = expected(PROXY, {"gold": GOLD}, [row["n"]])
    for name in ("proxy", "gold"):
        exact = [float(Fraction(x)) for x in row[f"per_prompt_{name}_exact"]]
        assert found[name][:, 0].tolist() == pytest.approx(exact, abs=1e-12)
        assert found[name].mean() == pytest.approx(row[f"{name}_score"], abs=1e-11)
    assert kl_bon(row["n"]) == pytest.approx(row["kl_bon"], abs=1e-11)


def test_worked_weights() -> None:
    for n, exact in VECTORS["weights_N6"].items():
        assert weights(6, [int(n)])[:, 0].tolist() == pytest.approx([*map(Fraction, exact)])


def test_ties_share_their_weight_whatever_their_order() -> None:
    ties = VECTORS["ties"]
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        proxy, gold = (np.array([ties["input"][k]])[:, order] for k in ("proxy", "gold"))
        found = expected(proxy, {"gold": gold}, [1, 2, 3, 4])
        for i, n in enumerate("1234"):
            exact = ties["expected"][n]
            assert found["proxy"][0, i] == pytest.approx(float(Fraction(exact["proxy"])))
            assert found["gold"][0, i] == pytest.approx(float(Fraction(exact["gold_ties_split"])))


@pytest.mark.parametrize("decimals", [0, 8])
def test_all_subsets_agree(decimals: int) -> None:
    """With `decimals=0` most scores are tied."""
    rng = np.random.default_rng(decimals)
    proxy, gold = rng.normal(size=(3, 8)).round(decimals), rng.normal(size=(3, 8))
    assert (len(np.unique(proxy[0])) < 8) == (decimals == 0)
    ns = range(1, 9)
    found = expected(proxy, {"gold": gold}, ns)["gold"]
    brute = [[over_subsets(p, g, n) for n in ns] for p, g in zip(proxy, gold, strict=True)]
    assert np.abs(found - brute).max() < 1e-12


def test_many_answers() -> None:
    """At N = 12,600 the weights sum to 1, and ranks as scores give n (N + 1) / (n + 1)."""
    assert np.abs(weights(12600, NS).sum(0) - 1).max() < 1e-9
    shuffled = np.random.default_rng(0).permutation(12600)[None] + 1.0
    found = expected(shuffled, {"gold": -shuffled}, NS)
    large = VECTORS["large_N"]["rows"]
    assert [row["n"] for row in large] == list(NS)
    for i, row in enumerate(large):
        closed = row["n"] * 12601 / (row["n"] + 1)
        assert closed == pytest.approx(row["expected_score_when_score_i_equals_rank_i"])
        assert found["proxy"][0, i] == pytest.approx(closed, rel=1e-9)
        assert found["gold"][0, i] == pytest.approx(-closed, rel=1e-9)
        assert kl_bon(row["n"]) == pytest.approx(row["kl_bon"], abs=1e-10)


def test_one_answer() -> None:
    found = expected(np.array([[3.0], [5.0]]), {"gold": np.array([[1.0], [2.0]])}, [1])
    assert found["proxy"].tolist() == [[3.0], [5.0]]
    assert found["gold"].tolist() == [[1.0], [2.0]]
    assert usable(None, 1, "error") == [1]


def test_which_n_the_answers_can_tell_of() -> None:
    assert usable(None, 100, "error") == [1, 2, 4, 8, 16, 32, 64]
    assert usable([1, 100], 100, "error") == [1, 100]
    assert usable([1, 100, 200], 100, "skip") == [1, 100]
    with pytest.raises(ValueError, match=r"algo\.ns=\[1, 200\] .* best of 200 .* 100 answers"):
        usable([1, 200], 100, "error")
    with pytest.raises(ValueError, match=r"algo\.ns=\[200\] .* best of 200"):
        usable([200], 100, "skip")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    broken = np.array([[0.0, bad]])
    with pytest.raises(ValueError, match=r"^gold holds a score that is no finite number"):
        expected(np.zeros((1, 2)), {"gold": broken}, [1])


# ---- ensembles

MEMBERS = [np.random.default_rng(i).normal(size=(4, 7)) for i in range(3)]
TRUTH = np.random.default_rng(9).normal(size=(4, 7))


def stored(folder: Path, **changes: Any) -> Path:
    """A pool of four prompts with seven answers, scored by three members, the first two answers of
    each prompt with one text.
    """
    folder.mkdir(exist_ok=True)
    pool = PoolFile(
        folder / "pool.jsonl",
        {},
        ensemble=True,
        names={f"member_{i}": f"seed{i + 1}" for i in range(3)},
    )
    for i in range(4):
        settings: dict[str, Any] = {
            "rewards": MEMBERS[0][i].tolist(),
            "gold_scores": TRUTH[i].tolist(),
            "members": {f"member_{k}": m[i].tolist() for k, m in enumerate(MEMBERS)},
            "lengths": [1, 1, 2, 3, 4, 5, 6 + i],
        }
        texts = ["a", "a", "b c", "c", "d", "e", "f"]
        row = Generated(index=i, prompt=f"p{i}", generations=texts, **settings)
        pool.append([row])
    pool.finish()
    return pool.path


def results(folder: Path) -> dict[str, list[dict[str, float]]]:
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob(f"*/{RESULTS}")}


def test_every_ranking_sorts_the_gold_scores_by_itself(tmp_path: Path) -> None:
    Curves(ns=[1, 3, 7], uwo_weights=[0.0, 0.5]).write(stored(tmp_path), tmp_path)
    found = results(tmp_path)
    stacked = np.stack(MEMBERS)
    proxies = {
        "seed1": MEMBERS[0],
        "seed2": MEMBERS[1],
        "seed3": MEMBERS[2],
        "ensemble_mean_seeds1-2-3": stacked.mean(0),
        "ensemble_WCO_seeds1-2-3": stacked.min(0),
        "ensemble_UWO-0_seeds1-2-3": stacked.mean(0),
        "ensemble_UWO-0.5_seeds1-2-3": stacked.mean(0) - 0.5 * stacked.var(0),
    }
    assert found.keys() == proxies.keys()
    for name, proxy in proxies.items():
        for row in found[name]:
            n = row["n"]
            gold = np.mean([over_subsets(proxy[i], TRUTH[i], n) for i in range(4)])
            own = np.mean([over_subsets(proxy[i], proxy[i], n) for i in range(4)])
            assert row == pytest.approx(
                {"n": n, "proxy_score": own, "gold_score": gold, "kl_bon": kl_bon(n)}
            )
    curves = {tuple(row["gold_score"] for row in curve) for curve in found.values()}
    assert len(curves) == 6  # all differ, but for UWO-0, which is the mean


def test_the_variance_of_uwo_is_the_one_asked_for() -> None:
    for variance, ddof in (("population", 0), ("unbiased", 1)):
        proxy = combined(MEMBERS, "uwo", 2.0, variance)
        expected_scores = np.mean(MEMBERS, 0) - 2 * np.var(MEMBERS, 0, ddof=ddof)
        assert np.abs(proxy - expected_scores).max() < 1e-12
    assert (combined(MEMBERS[:1], "uwo", 2.0, "unbiased") == MEMBERS[0]).all()


def test_equal_texts_keep_their_own_scores(tmp_path: Path) -> None:
    Curves().write(stored(tmp_path), tmp_path)
    sorted_rows = json.loads((tmp_path / "seed2" / SORTED).read_text())
    assert len(sorted_rows) == 4
    for i, row in enumerate(sorted_rows):
        order = MEMBERS[1][i].argsort()
        assert row["proxy_scores"] == MEMBERS[1][i][order].tolist()
        assert row["gold_scores"] == TRUTH[i][order].tolist()
        assert row["answers"] == [["a", "a", "b c", "c", "d", "e", "f"][j] for j in order]
        assert (row["instruction"], row["input"]) == (f"p{i}", "")
    assert [r.rewards for r in read_generations(tmp_path / "seed2" / SORTED)] == [
        sorted(x) for x in MEMBERS[1].tolist()
    ]


def test_big_n_cuts_answers_not_prompts(tmp_path: Path) -> None:
    Curves(big_n=4, objectives=[]).write(stored(tmp_path), tmp_path)
    found = results(tmp_path)
    assert [row["n"] for row in found["seed1"]] == [1, 2, 4]
    best = MEMBERS[0][:, :4].argmax(1)
    assert found["seed1"][-1]["gold_score"] == pytest.approx(TRUTH[range(4), best].mean())
    statistics = json.loads((tmp_path / "seed1" / "statistics.json").read_text())
    assert (statistics["prompts"], statistics["answers"]) == (4, 4)
    assert statistics["answer_length"] == {"words": 1.25, "tokens": 1.75}
    assert statistics["gold"]["std"] == pytest.approx(TRUTH[:, :4].std())
    assert len(json.loads((tmp_path / "seed1" / SORTED).read_text())[0]["answers"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ns": [2, 1]}, r"algo\.ns=\[2, 1\] must be rising"),
        ({"ns": []}, r"algo\.ns=\[\] must be rising"),
        ({"ns": [0, 1]}, r"algo\.ns=\[0, 1\] must be rising numbers from 1"),
        ({"on_too_large": "skp"}, r"algo\.on_too_large=skp .* did you mean skip"),
        ({"objectives": ["worst"]}, r"algo\.objectives=worst .* wco"),
        ({"variance": "sample"}, r"algo\.variance=sample .* unbiased"),
        ({"uwo_weights": [0.1, 0.1]}, r"algo\.uwo_weights=\[0\.1, 0\.1\] holds a weight twice"),
        ({"big_n": 0}, r"algo\.big_n=0 must be at least 1"),
        ({"samples": 0}, r"algo\.samples=0"),
        ({"prompts": 0}, r"algo\.prompts=0"),
        ({"samples": 8, "ns": [1, 16]}, r"best of 16 .* 8 answers: draw more \(algo\.samples\)"),
        ({"samples": 8, "big_n": 9}, r"algo\.big_n=9 is more than the 8 answers of algo\.samples"),
        ({"samples": 8, "big_n": 4, "ns": [8]}, r"best of 8 .* 4 answers"),
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm.BestOfN(**settings)


def test_a_pool_that_lacks_scores_or_answers(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    whole = {"prompt": "p", "generations": ["a", "b"], "rewards": [0, 1], "gold_scores": [0, 1]}
    write_jsonl(path, [whole, {k: v for k, v in whole.items() if k != "gold_scores"}])
    with pytest.raises(ValueError, match=r"pool\.jsonl, line 2: no gold scores"):
        read_scores(path, None)
    write_jsonl(path, [whole, whole | {"members": {"a": [0, 1]}}])
    with pytest.raises(ValueError, match=r"only 1 of 2 rows have members/a"):
        read_scores(path, None)
    single = {"prompt": "p", "generations": ["a"], "rewards": [0], "gold_scores": [0]}
    write_jsonl(path, [whole, single])
    with pytest.raises(ValueError, match=r"between 1 and 2 answers: .* algo\.big_n=1"):
        read_scores(path, None)
    with pytest.raises(ValueError, match=r"line 2: 1 answers are fewer than algo\.big_n=2"):
        read_scores(path, 2)
    assert read_scores(path, 1)["gold"].tolist() == [[0.0], [0.0]]


# ---- runs

# The artifacts of experiment=debug, and four steps of four prompts with six answers each.
SMALL = [
    "reward=ensemble_small",
    "sft.epochs=0.32",
    "sft.batch=32",
    "sft.micro_batch=32",
    "preferences.pairs=64",
    "preferences.evaluation_pairs=16",
]
ASKED = ["algo=best_of_n", *SMALL, "evaluation.prompts=16", "algo.samples=6"]
ASKED += ["policy.sample_batch=24", "algo.ns=[1,2,6]", "algo.uwo_weights=[0.5]"]


def outcome(directory: Path) -> dict[str, bytes]:
    """Everything a run leaves that the clock does not decide."""
    kept = [
        p for name in ("best_of_n", "evaluation", "policy") for p in (directory / name).rglob("*")
    ]
    kept += [directory / "summary.json"]
    named = {str(p.relative_to(directory)): p for p in kept if p.is_file()}
    dated = ("artifact.json", "README.md", "curves.json", "curves.png")
    return {name: p.read_bytes() for name, p in named.items() if p.name not in dated}


@pytest.fixture(scope="module")
def drawn(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drawn") / "run"
    assert inside(directory, *ASKED, f"artifacts={artifacts}") == 0
    return directory


def test_a_run_goes_from_n_1_to_the_largest_n(drawn: Path) -> None:
    scores = read_scores(drawn / "best_of_n" / "pool.jsonl", None)
    assert {name: x.shape for name, x in scores.items()} == dict.fromkeys(
        ("rewards", "gold", "members/member_0", "members/member_1"), (16, 6)
    )
    files = sorted(p.name for p in (drawn / "evaluation").iterdir())
    assert files == ["step-000001.json", "step-000002.json", "step-000006.json"]
    best = scores["rewards"].argmax(1)
    summary = json.loads((drawn / "summary.json").read_text())
    for name, x in (("proxy", scores["rewards"]), ("gold", scores["gold"])):
        assert summary[name]["before"]["mean"] == pytest.approx(x.mean())
        assert summary[name]["after"]["mean"] == pytest.approx(x[range(16), best].mean())
    assert summary["kl"]["after"]["mean"] == pytest.approx(kl_bon(6))
    last = json.loads((drawn / "evaluation" / files[-1]).read_text())
    pool = read_generations(drawn / "best_of_n" / "pool.jsonl")
    for i, (row, stored_row) in enumerate(zip(last["rows"], pool, strict=True)):
        assert stored_row.lengths is not None
        assert row["completion"] == stored_row.generations[best[i]]
        assert row["length"] == stored_row.lengths[best[i]]
        assert row["variance"] == pytest.approx(
            np.var([row["proxy/member_0"], row["proxy/member_1"]])
        )
    steps = [row for row in rows(drawn / "metrics.jsonl") if "reward/gold" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert steps[1]["reward/gold"] == pytest.approx(scores["gold"][4:8].mean())


def test_rankings_of_a_run_are_named_after_their_seeds(drawn: Path) -> None:
    found = results(drawn / "best_of_n")
    together = [f"ensemble_{name}_seeds0-1" for name in ("UWO-0.5", "WCO", "mean")]
    assert sorted(found) == [*together, "seed0", "seed1"]
    last = json.loads((drawn / "evaluation" / "step-000006.json").read_text())["metrics"]
    own = found["ensemble_UWO-0.5_seeds0-1"][-1]  # what the run's reward is
    assert own["proxy_score"] == pytest.approx(last["reward/proxy"], rel=1e-6)
    assert own["gold_score"] == pytest.approx(last["reward/gold"])
    table = json.loads((drawn / "best_of_n" / "curves.json").read_text())
    single = [found[f"seed{s}"][-1]["gold_score"] for s in (0, 1)]
    assert table["curves"]["single"][-1]["gold_mean"] == pytest.approx(np.mean(single))
    assert table["curves"]["single"][-1]["gold_std"] == pytest.approx(np.std(single))
    assert (drawn / "best_of_n" / "curves.png").read_bytes()[:4] == b"\x89PNG"


class Power(Exception):
    """The machine is gone."""


@pytest.mark.parametrize("written", [0, 2])
def test_killed_in_the_middle_of_a_block(
    written: int, drawn: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 1 comes to the disk with `written` rows and half of the next."""
    append = PoolFile.append

    def cut_off(self: PoolFile, block: list[Generated]) -> None:
        if self.rows < 4:
            append(self, block)
            return
        append(self, block[:written])
        with self.path.open("a") as file:
            file.write(block[written].line()[:40])
        raise Power

    with monkeypatch.context() as patch:
        patch.setattr(PoolFile, "append", cut_off)
        with pytest.raises(Power):
            inside(tmp_path / "run", *ASKED, f"artifacts={artifacts}")
    assert not (tmp_path / "run" / "evaluation").exists()
    assert logged(lambda: resume(tmp_path / "run")) == 0
    assert outcome(tmp_path / "run") == outcome(drawn)
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(drawn / "metrics.jsonl")


def test_stopped_by_a_signal(
    drawn: Path,
    artifacts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = algorithm.score_rewards

    def interrupted(block: list[Generated], reward: Any) -> None:
        score(block, reward)
        if block[0].index == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(algorithm, "score_rewards", interrupted)
        code = inside(tmp_path / "run", *ASKED, f"artifacts={artifacts}")
    assert code == 128 + signal.SIGTERM
    assert "stopped after step 2, state saved" in capsys.readouterr().err
    assert logged(lambda: resume(tmp_path / "run")) == 0
    assert outcome(tmp_path / "run") == outcome(drawn)


def test_answers_of_a_file_are_scored_by_the_reward_and_keep_their_gold(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    answers = [
        {
            "instruction": "Say",
            "input": "",
            "answers": ["a", "ccc", "bb"],
            "gold_scores": [1, 2, 4],
        },
        {
            "instruction": "Say",
            "input": "it",
            "answers": ["dd", "e", "dd"],
            "gold_scores": [3, 0, 9],
        },
    ]
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(answers))
    asked = ["algo=best_of_n", *SMALL[1:], f"algo.answers={path}", "policy.sample_batch=3"]
    asked += ["reward=function", "reward.function=own_rewards:length", "algo.ns=[1,3]"]
    assert inside(tmp_path / "run", *asked, f"artifacts={artifacts}") == 0
    pool = read_generations(tmp_path / "run" / "best_of_n" / "pool.jsonl")
    assert [row.prompt for row in pool] == ["Say", "Say\nit"]
    assert [row.rewards for row in pool] == [[1, 3, 2], [2, 1, 2]]
    assert [row.gold_scores for row in pool] == [[1, 2, 4], [3, 0, 9]]
    curve = results(tmp_path / "run" / "best_of_n")["reward"]
    assert curve[0] == pytest.approx(
        {"n": 1, "proxy_score": 11 / 6, "gold_score": 19 / 6, "kl_bon": 0}
    )
    assert curve[1]["gold_score"] == pytest.approx((2 + 6) / 2)  # the two best of the second tie


# ---- refused


@pytest.mark.parametrize(
    ("answers", "settings", "fragments"),
    [
        ([{"gold_scores": [1, None]}], [], ["line 1", "gold_scores", "None", "finite numbers"]),
        ([{"gold_scores": [1, math.nan]}], [], ["line 1", "gold_scores", "nan"]),
        ([{"gold_scores": [1]}], [], ["line 1", "gold_scores", "1 entries", "2 generations"]),
        ([{}, {"gold_scores": [1, 2]}], [], ["line 2", "some have none", "this run's gold"]),
        ([{}, {"answers": ["a"]}], [], ["line 2", "1 answers", "algo.big_n=1"]),
        ([{}], ["algo.big_n=3"], ["algo.big_n=3", "2 answers", "line 1"]),
        ([{}], ["algo.ns=[1,4]"], ["algo.ns=[1, 4]", "best of 4", "2 answers"]),
        ([{}], ["algo.prompts=2"], ["algo.prompts=2", "1 rows of", "lower it"]),
        ([{"answers": []}], [], ["line 1", "must be a list of texts"]),
        ([], [], ["answers.jsonl is empty"]),
    ],
    ids=str,
)
def test_answers_that_cannot_be_used(
    answers: list[dict[str, Any]],
    settings: list[str],
    fragments: list[str],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    write_jsonl(
        tmp_path / "answers.jsonl",
        [{"instruction": "i", "answers": ["a", "b"]} | a for a in answers],
    )
    asked = ["algo=best_of_n", "reward=lexicon", "algo.answers=answers.jsonl"]
    says(refused(*asked, *settings), *fragments)


def test_answers_that_are_not_there(refused: Callable[..., str]) -> None:
    says(refused("algo=best_of_n", "algo.answers=no.jsonl"), "no data file at no.jsonl")


def test_more_prompts_than_are_held_out(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*ASKED, "algo.prompts=300", f"artifacts={artifacts}"]
    assert inside(tmp_path / "run", *asked) == 1
    sentence = the_error(capsys.readouterr().err)
    says(sentence, "algo.prompts=300", "256 held-out prompts", "lower it")
    assert not (tmp_path / "run" / "best_of_n" / "pool.jsonl").exists()


# ---- merging and other rankings


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["best_of_n", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def curve(folder: Path, gold: list[float], *, at: tuple[int, ...] = (1, 2)) -> None:
    """Results as llm_optimization writes them."""
    folder.mkdir(parents=True)
    found = [{"n": n, "proxy_score": 2 * g, "gold_score": g} for n, g in zip(at, gold, strict=True)]
    (folder / RESULTS).write_text(json.dumps(found))


def test_runs_are_merged_by_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, offset in (("a", 0.0), ("b", 4.0)):
        for seed in (1, 2):
            curve(tmp_path / run / f"seed{seed}", [offset, offset + seed])
        curve(tmp_path / run / "ensemble_mean_seeds1-2", [offset, offset + 5])
    out = tmp_path / "out"
    assert command(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", out) == 0
    table = json.loads((out / "curves.json").read_text())
    assert table["curves"].keys() == {"single", "ensemble_mean"}
    one, two = table["curves"]["single"]
    assert one == pytest.approx(
        {
            "n": 1,
            "kl_bon": 0,
            "curves": 4,
            "proxy_mean": 4,
            "gold_mean": 2,
            "proxy_std": 4,
            "gold_std": 2,
        }
    )
    assert two["gold_mean"] == pytest.approx(3.5)
    assert two["gold_std"] == pytest.approx(np.std([1, 2, 5, 6]))
    assert two["kl_bon"] == pytest.approx(math.log(2) - 0.5)
    lines = (out / "curves.csv").read_text().splitlines()
    assert lines[0] == "ranking,n,kl_bon,curves,proxy_mean,gold_mean,proxy_std,gold_std"
    assert len(lines) == 5
    assert (out / "curves.png").stat().st_size > 10_000


def test_merging_refuses_other_n_and_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curve(tmp_path / "a" / "seed1", [0, 1])
    curve(tmp_path / "a" / "seed2", [0, 1], at=(1, 4))
    assert command(monkeypatch, tmp_path / "a", "--out", tmp_path / "out") == 1
    says(the_error(capsys.readouterr().err), "seed2", "seed1", "other n", "--ns")
    assert command(monkeypatch, tmp_path / "nothing") == 1
    says(the_error(capsys.readouterr().err), "nothing", RESULTS, "algo=best_of_n")
    assert not (tmp_path / "out").exists()


def test_standardised_curves_start_at_0(tmp_path: Path) -> None:
    Curves(ns=[1, 7]).write(stored(tmp_path), tmp_path)
    table = report.report([tmp_path], tmp_path / "out", standardise=True)
    for ranking in table["curves"].values():
        assert ranking[0]["gold_mean"] == pytest.approx(0, abs=1e-12)
        assert ranking[0]["proxy_mean"] == pytest.approx(0, abs=1e-12)
    best = np.mean([TRUTH[range(4), m.argmax(1)].mean() for m in MEMBERS])
    found = table["curves"]["single"][1]["gold_mean"]
    assert found == pytest.approx((best - TRUTH.mean()) / TRUTH.std())
    assert table["answer_length"] == pytest.approx({"words": 8 / 7, "tokens": (22 + 1.5) / 7})


def test_other_rankings_from_stored_scores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(stored(tmp_path / "kept").parent, tmp_path / "run" / "best_of_n")
    asked = [tmp_path / "run", "--out", tmp_path / "out", "--uwo-weights", 0, 2, "--ns", 1, 5]
    asked += ["--objectives", "uwo", "--variance", "unbiased"]
    assert command(monkeypatch, *asked) == 0
    found = results(tmp_path / "out" / "0")
    assert sorted(found) == [f"ensemble_UWO-{w}_seeds1-2-3" for w in "02"] + [
        f"seed{i}" for i in "123"
    ]
    proxy = np.mean(MEMBERS, 0) - 2 * np.var(MEMBERS, 0, ddof=1)
    gold = np.mean([over_subsets(p, g, 5) for p, g in zip(proxy, TRUTH, strict=True)])
    assert found["ensemble_UWO-2_seeds1-2-3"][1]["gold_score"] == pytest.approx(gold)
    assert command(monkeypatch, *asked) == 1
    says(the_error(capsys.readouterr().err), "out/0", "give another --out")
    assert command(monkeypatch, tmp_path / "run", "--ns", 1) == 1
    says(the_error(capsys.readouterr().err), "give --out")
