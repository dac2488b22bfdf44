"""Searches: the space, the sweep file, and whole searches over a launcher that only calculates; at
the end the real command line.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from runs import DebugRun, command_line, contents, the_error

from rlhf_exp.config import conf_directory
from rlhf_exp.search.search import Search
from rlhf_exp.search.settings import Settings
from rlhf_exp.search.space import as_override, grid, split
from rlhf_exp.search.sweep_file import read

pytest_plugins = ["runs_fixtures"]

LR = "algo.lr=tag(log,interval(1e-5,1e-3))"
parse = OverridesParser.create().parse_overrides


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        yield


# ---- the space


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("tag(log,interval(1e-6,1e-3))", FloatDistribution(1e-6, 1e-3, log=True)),
        ("int(interval(1,10))", IntDistribution(1, 10)),
        ("range(1,10)", IntDistribution(1, 9)),
        ("range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("tag(log,range(1,65))", IntDistribution(1, 64, log=True)),
        ("range(0.5,2.0,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("choice(a,b)", CategoricalDistribution(["a", "b"])),
        ("1,2.5,null,true", CategoricalDistribution([1, 2.5, None, True])),
        ("choice([0.9,0.95],[0.9,0.999])", CategoricalDistribution(["[0.9,0.95]", "[0.9,0.999]"])),
    ],
)
def test_override_becomes_a_distribution(text: str, distribution: Any) -> None:
    assert split(parse([f"algo.x={text}"])) == ([], {"algo.x": distribution})


def test_a_value_given_later_leaves_the_space() -> None:
    lines = ["a=choice(1,2)", "b=interval(0,1)", "c=3", "+a=7", "c=range(3)"]
    assert split(parse(lines)) == (
        ["+a=7"],
        {"b": FloatDistribution(0, 1), "c": IntDistribution(0, 2)},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interval(2,1)", r"^x=interval\(2,1\) spans nothing .* 2\.0 is above 1\.0"),
        ("tag(log,interval(0,1))", r"spans nothing that can be searched: .*low > 0"),
        ("range(1,1)", r"it is empty"),
        ("tag(lgo,interval(1,2))", r"the tag lgo means nothing here; there is log"),
        ("tag(log,choice(1,2))", r"cannot be searched: give interval"),
    ],
)
def test_space_that_spans_nothing_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(parse([f"x={text}"]))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-05,
        0.1 + 0.2,
        "word",
        "two words",
        "true",
        "1e-3",
        "it's",
        "",
        "a,b",
        "ppo",
    ],
)
def test_a_value_reads_back_as_it_was(value: Any) -> None:
    [override] = parse([as_override("x.y", value)])
    assert (override.key_or_group, override.value()) == ("x.y", value)
    assert type(override.value()) is type(value)


def test_grid_is_the_product_and_refuses_what_is_continuous() -> None:
    space = split(parse(["a=choice(x,y)", "b=range(0,4,2)", "c=range(0.1,0.35,0.1)"]))[1]
    assert len(grid(space)) == 12
    assert [p["c"] for p in grid(space)[:3]] == [0.1, 0.2, 0.3]
    assert {(p["a"], p["b"]) for p in grid(space)} == {(a, b) for a in "xy" for b in (0, 2)}
    with pytest.raises(ValueError, match=r"no end over the continuous a: list its values"):
        grid({"a": FloatDistribution(0, 1)})


# ---- the sweep file

SWEEP = """
method: bayes
name: from_a_file
metric: {name: evaluation/reward/proxy, goal: maximize}
parameters:
  algo:
    parameters:
      lr: {distribution: log_uniform_values, min: 1e-6, max: 1e-3}
      clip: {min: 0.1, max: 0.3}
      epochs: {min: 1, max: 4}
  algo.kl_coef: {distribution: q_uniform, min: 0.1, max: 0.5, q: 0.2}
  algo.vf_coef: {distribution: log_uniform, min: -2, max: 0}
  algo.batch: {values: [32, 64]}
  algo.betas: {value: [0.9, 0.95]}
early_terminate: {type: hyperband, min_iter: 10}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def test_sweep_file_worked_example(tmp_path: Path) -> None:
    found = read(written(tmp_path, SWEEP))
    assert (found.sampler, found.objective, found.goal) == ("tpe", "proxy", "maximize")
    assert (found.name, found.pruning) == ("from_a_file", {"from_step": 10})
    assert found.fixed == ["algo.betas=[0.9, 0.95]"]
    assert found.space == {
        "algo.lr": FloatDistribution(1e-6, 1e-3, log=True),
        "algo.clip": FloatDistribution(0.1, 0.3),
        "algo.epochs": IntDistribution(1, 4),
        "algo.kl_coef": FloatDistribution(0.2, 0.4, step=0.2),  # multiples of 0.2 within
        "algo.vf_coef": FloatDistribution(math.exp(-2), 1.0, log=True),  # exponents of e
        "algo.batch": CategoricalDistribution([32, 64]),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: bayes", r"needs a key parameters"),
        ("methd: bayes\nparameters: {}", r"methd has no meaning here.* did you mean method\?"),
        ("program: train.py\nparameters: {}", r"program has no meaning here, remove it"),
        ("method: bayesian\nparameters: {}", r"method=bayesian .* did you mean bayes\?"),
        ("parameters: {a: {vals: [1]}}", r"a: vals has no meaning .* did you mean values\?"),
        ("parameters: {a: {min: 1}}", r"a: give value, values, or min and max"),
        ("parameters: {a: 3}", r"a must be a dictionary"),
        ("parameters: {a: {min: 1, max: 2, values: [1]}}", r"categorical takes values, not max"),
        ("parameters: {a: {distribution: normal, min: 0}}", r"distribution=normal is not known"),
        ("parameters: {a: {distribution: uniform}}", r"uniform takes max and min, not nothing"),
        ("parameters: {a: {min: 2, max: 1}}", r"a: .* 2 is above 1"),
        ("parameters: {}\nearly_terminate: {type: hyperband, eta: 3}", r"eta has no meaning here"),
        ("parameters: {}\nearly_terminate: {type: bandit}", r"type=bandit .* hyperband, median"),
        ("parameters: {}\nmetric: {goals: up}", r"goals has no meaning .* did you mean goal\?"),
        ("a: [", r"sweep\.yaml is no YAML"),
    ],
)
def test_sweep_file_that_cannot_be_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, text))


def test_missing_sweep_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hydra\.sweeper\.file=.*nowhere.*give the path"):
        read(tmp_path / "nowhere.yaml")


# ---- whole searches, on a launcher that calculates


class Stub:
    """Runs nothing: a job's objective is `worth` of its values; remembers what was asked."""

    def __init__(self, folder: Path, worth: Callable[[dict[str, Any]], Any]) -> None:
        self.folder, self.worth = folder, worth
        self.jobs: list[dict[str, Any]] = []
        self.batches: list[tuple[int, int]] = []  # first number, size

    def __call__(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.batches.append((initial_job_idx, len(jobs)))
        return [self.one(job, n) for n, job in enumerate(jobs, initial_job_idx)]

    def one(self, job: Sequence[str], number: int) -> JobReturn:
        values = {o.key_or_group: o.value() for o in parse(list(job))}
        directory = self.folder / str(number)
        directory.mkdir(parents=True)
        (directory / "run.json").write_text("{}")
        self.jobs.append(values | {"directory": directory})
        found = JobReturn(working_dir=str(directory), status=JobStatus.COMPLETED)
        try:
            found.return_value = self.worth(self.jobs[-1])
        except Exception as error:
            found.status, found._return_value = JobStatus.FAILED, error
        return found


def near(values: dict[str, Any]) -> float:
    """Best at lr = 1e-4."""
    return -((math.log10(values["algo.lr"]) + 4) ** 2)


def search(
    folder: Path, *arguments: str, worth: Callable[[dict[str, Any]], Any] = near, **settings: Any
) -> Stub:
    """A search that must come to its end; the launcher it used."""
    stub = Stub(folder / "runs", worth)
    Search(
        settings=Settings(**{"n_trials": 6} | settings),
        parse=lambda lines: parse(lines),
        compose=lambda overrides: compose("config", overrides=overrides),
        launch=stub,
        directory=folder,
    ).run([*arguments])
    return stub


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "search.json").read_text())["trials"]


def tried(stub: Stub) -> list[float]:
    return [job["algo.lr"] for job in stub.jobs]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_the_same_seed_tries_the_same_points(sampler: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "n_trials": 14}
    first, again, other = (
        tried(search(tmp_path / str(i), LR, seed=seed, **settings))
        for i, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 14
    assert all(1e-5 <= lr <= 1e-3 for lr in first)


def test_tpe_comes_nearer_than_it_began(tmp_path: Path) -> None:
    lrs = tried(search(tmp_path, LR, n_trials=30))
    away = [abs(math.log10(lr) + 4) for lr in lrs]
    assert sum(away[20:]) / 10 < sum(away[:10]) / 10


def test_what_a_search_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = search(tmp_path, LR, "seed=3", n_jobs=4)
    assert stub.batches == [(0, 4), (4, 2)]
    assert {job["seed"] for job in stub.jobs} == {3}
    found = results(tmp_path)
    assert [r["values"]["gold"] for r in found] == sorted(map(near, stub.jobs), reverse=True)
    assert [r["best"] for r in found] == [True] + [False] * 5
    for row in found:
        assert row["directory"] == str(stub.jobs[row["number"]]["directory"])
        assert row["params"] == {"algo.lr": stub.jobs[row["number"]]["algo.lr"]}
    table = list(csv.DictReader((tmp_path / "search.csv").read_text().splitlines()))
    assert [float(r["algo.lr"]) for r in table] == [r["params"]["algo.lr"] for r in found]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "gold", "algo.lr", "directory"]
    assert [int(line.split()[0]) for line in lines[1:]] == [r["number"] for r in found]
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_params_file_and_command_line_come_together(tmp_path: Path) -> None:
    file = written(tmp_path, SWEEP)
    params = {"algo.clip": "choice(0.1,0.2)", "algo.epochs": 2}
    stub = search(
        tmp_path, "algo.kl_coef=0.3", "algo.batch=64", n_trials=1, params=params, file=str(file)
    )
    [job] = stub.jobs
    given = {k: job[k] for k in ("algo.epochs", "algo.kl_coef", "algo.batch", "objective")}
    assert given == {"algo.epochs": 2, "algo.kl_coef": 0.3, "algo.batch": 64, "objective": "proxy"}
    assert set(results(tmp_path)[0]["params"]) == {"algo.lr", "algo.clip", "algo.vf_coef"}


def test_failures_are_failed_trials_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([float("nan"), None, ValueError("algo.lr is\ntoo high"), [1.0, 2.0], 0.5, 0.7])

    def worth(_: dict[str, Any]) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    search(tmp_path, LR, worth=worth)
    found = results(tmp_path)
    assert [r["number"] for r in found] == [5, 4, 0, 1, 2, 3]
    assert [r["why"] for r in found] == [
        None, None, "its objective is nan", "it has no summary.json", "algo.lr is too high",
        "its objective has 2 numbers, not 1",
    ]  # fmt: skip
    assert capsys.readouterr().out.count(" failed ") == 4


def test_the_run_directory_says_why_it_failed(tmp_path: Path) -> None:
    def worth(job: dict[str, Any]) -> float:
        (job["directory"] / "failed.json").write_text('{"error": "CUDA is out of memory"}')
        raise ValueError("exit code 1")

    with pytest.raises(ValueError, match=r"no run .* trial 1 failed: CUDA is out of memory"):
        search(tmp_path, LR, worth=worth, n_trials=2)
    assert [r["state"] for r in results(tmp_path)] == ["fail", "fail"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)], ids=repr)
def test_an_interrupted_search_goes_on_to_its_total(error: BaseException, tmp_path: Path) -> None:
    storage: dict[str, Any] = {"storage": f"sqlite:///{tmp_path / 'search.db'}", "n_jobs": 2}

    def dies(job: dict[str, Any]) -> float:
        if job["directory"].name == "3":
            raise error
        return near(job)

    with pytest.raises(type(error)):
        search(tmp_path, LR, worth=dies, **storage)
    first = {p.name for p in (tmp_path / "runs").iterdir()}
    assert first == {"0", "1", "2", "3"}
    assert len(results(tmp_path)) == 2

    stub = search(tmp_path, LR, **storage)
    assert stub.batches == [(4, 2), (6, 2)]  # in directories of their own
    found = results(tmp_path)
    assert len(found) == 6
    assert {r["state"] for r in found} == {"complete"}
    lost = [json.loads(json.dumps(t)) for t in tried(stub)[:2]]
    assert len({r["params"]["algo.lr"] for r in found}) == 6
    assert set(lost) <= {r["params"]["algo.lr"] for r in found}
    assert not search(tmp_path, LR, **storage).jobs  # nothing is left to do


def test_a_killed_search_repeats_the_points_it_lost(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    search(tmp_path, LR, storage=storage, n_trials=2)
    study = optuna.load_study(study_name="search", storage=storage)
    study.sampler = optuna.samplers.RandomSampler(seed=9)
    lost = study.ask({"algo.lr": FloatDistribution(1e-5, 1e-3, log=True)})  # never told: SIGKILL
    lost.set_user_attr("job", 2)
    stub = search(tmp_path, LR, storage=storage, n_trials=4)
    assert tried(stub)[0] == lost.params["algo.lr"]
    assert stub.batches == [(3, 1), (4, 1)]
    assert len(results(tmp_path)) == 4
    assert len(set(tried(stub))) == 2


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((LR, "objective=frontier"), "directions"),
        ((LR, "objective=proxy"), "objective"),
        (("algo.lr=interval(1e-5,1e-3)",), "space"),
        ((LR, "algo.clip=interval(0.1,0.3)"), "space"),
    ],
)
def test_another_search_cannot_go_on_with_a_study(
    arguments: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    search(tmp_path, LR, storage=storage, n_trials=1)
    with pytest.raises(ValueError, match=rf"study search in sqlite.* another {what} .*study_name"):
        search(tmp_path, *arguments, storage=storage, n_trials=2)


def test_two_objectives_end_in_a_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worth(job: dict[str, Any]) -> list[float]:
        x = job["algo.clip"]
        return [x, x * x] if x != 0.2 else [0.1, 0.9]

    stub = search(
        tmp_path, "algo.clip=choice(0.1,0.2,0.3)", "objective=frontier", worth=worth, sampler="grid"
    )
    assert len(stub.jobs) == 3
    found = results(tmp_path)
    assert [(r["params"]["algo.clip"], r["best"]) for r in found] == [
        (0.3, True), (0.1, True), (0.2, False),
    ]  # fmt: skip
    assert list(found[0]["values"].values()) == [0.3, 0.09]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "2*",
        "0*",
        "1",
    ]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_tpe_takes_two_objectives(tmp_path: Path) -> None:
    stub = search(
        tmp_path, LR, "objective=frontier", worth=lambda j: [near(j), j["algo.lr"]], n_trials=12
    )
    assert len(set(tried(stub))) == 12


# ---- pruning


def test_runs_get_the_median_of_those_before_and_may_give_up(tmp_path: Path) -> None:
    values = iter([[0.0, 0.1, 0.4], [0.0, 0.5, 0.2], [0.0, 0.3, 0.3], [0.0, 0.1]])

    def worth(job: dict[str, Any]) -> float:
        curve, folder = next(values), job["directory"] / "evaluation"
        folder.mkdir()
        for step, value in zip((0, 2, 4), curve, strict=False):
            told = {"step": step, "metrics": {"reward/gold": value}}
            (folder / f"step-{step}.json").write_text(json.dumps(told))
        if len(curve) == 2:
            (job["directory"] / "pruned.json").write_text("{}")
            raise ValueError("exit code 3")
        return curve[-1]

    stub = search(tmp_path, LR, worth=worth, n_trials=4, pruning={"startup": 2, "from_step": 2})
    common = {"metric": "reward/gold", "maximize": True, "from_step": 2}
    assert [job.get("pruning") for job in stub.jobs] == [
        None,
        None,
        common | {"bounds": {2: 0.3, 4: 0.45}},  # of 0.1 and 0.5, of 0.4 and 0.5
        common | {"bounds": {2: 0.3, 4: 0.4}},  # of 0.1, 0.3 and 0.5, of 0.3, 0.4 and 0.5
    ]
    assert [(r["number"], r["state"]) for r in results(tmp_path)][-1] == (3, "pruned")


def test_bounds_are_an_override_that_fits_the_config() -> None:
    told = "pruning={metric:reward/gold,maximize:true,bounds:{2:-1e-05,4:0.45},from_step:0}"
    assert OmegaConf.to_container(compose("config", overrides=[told]).pruning) == {
        "metric": "reward/gold", "maximize": True, "bounds": {2: -1e-05, 4: 0.45}, "from_step": 0,
    }  # fmt: skip


# ---- what is refused before the first trial


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["seed=3"], {}, r"the search space is empty: add a range"),
        ([LR], {"n_trials": 0}, r"n_trials=0 .* at least 1"),
        ([LR], {"sampler": "tpee"}, r"sampler=tpee .* did you mean tpe\?"),
        ([LR], {"options": {"n_startup": 3}}, r"options\.n_startup .* mean n_startup_trials\?"),
        ([LR], {"options": {"n_startup_trials": "x"}}, r"hydra\.sweeper\.options=.*'x'"),
        ([LR], {"sampler": "grid"}, r"no end over the continuous algo\.lr"),
        ([LR], {"storage": "sqlite:///no/where.db"}, r"storage=sqlite:///no/where\.db cannot be"),
        ([LR, "objective=frontier"], {"pruning": {}}, r"pruning needs an objective .* gold and kl"),
        ([LR, "objective=kl"], {"pruning": {}}, r"pruning needs .* not kl"),
        ([LR, "pruning={bounds: {2: 0}}"], {"pruning": {}}, r"exclude each other"),
        ([LR, "stages=[sft,align]"], {}, r"add evaluate"),
        (["objective=gold,kl"], {}, r"objective cannot be searched"),
        (["seed=interval(0,1)"], {}, r"seed: .*0\.0"),
        ([LR, "objective.metric=gld"], {}, r"did you mean gold"),
    ],
)
def test_mistakes_end_before_the_first_trial(
    arguments: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {k: v or {"startup": 2} if k == "pruning" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message):
        search(tmp_path, *arguments, **settings)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "search.json").exists()


def test_a_goal_against_the_objective_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, SWEEP.replace("goal: maximize", "goal: minimize"))
    with pytest.raises(
        ValueError, match=r"metric\.goal=minimize, .* objective\.direction=minimize"
    ):
        search(tmp_path, file=str(file))


# ---- the real command line


@pytest.mark.slow
def test_a_search_from_the_command_line(debug_run: DebugRun, tmp_path: Path) -> None:
    asked = [
        "experiment=ppo_search", "objective=frontier", "policy.temperature=1.0",
        "policy.max_new_tokens=24", "algo.batch=16", "algo.minibatch=16", "algo.steps=2",
        "reward=ensemble_small", "sft={epochs: 0.32, batch: 32, micro_batch: 32}",
        "preferences.pairs=64", "preferences.evaluation_pairs=16", "evaluation.prompts=16",
        f"artifacts={debug_run.artifacts}", "hydra.sweep.dir=found", "hydra.sweeper.n_trials=2",
    ]  # fmt: skip
    done = command_line(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "found")
    assert len(found) == 2
    for row in found:
        table = json.loads((Path(row["directory"]) / "summary.json").read_text())
        assert row["values"] == {k: table[k]["after"]["mean"] for k in ("gold", "kl")}
        assert set(row["params"]) == {"algo.lr", "algo.kl_coef", "algo.vf_coef"}
    assert {"search.csv", "frontier.png", "multirun.yaml"} <= contents(tmp_path / "found")
    kept = json.loads((Path(found[0]["directory"]) / "run.json").read_text())["artifacts"]
    assert set(kept.values()) == {"reused"}


@pytest.mark.slow
def test_a_run_gives_up_with_an_exit_code_of_its_own(debug_run: DebugRun, tmp_path: Path) -> None:
    done = command_line(
        "experiment=debug", f"artifacts={debug_run.artifacts}", "hydra.run.dir=run",
        "pruning={bounds: {2: 100}}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "gave up after step 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert {"pruned.json", "checkpoints/step-000002/state.pt"} <= contents(tmp_path / "run")
    same = command_line(f"resume={tmp_path / 'run'}", cwd=tmp_path)
    assert same.returncode == 0, same.stderr
    ends = [
        json.loads((d / "summary.json").read_text())
        for d in (tmp_path / "run", debug_run.directory)
    ]
    assert ends[0] == ends[1]  # bounds decide nothing of what is learned


def test_an_unknown_key_of_the_space_is_named(tmp_path: Path) -> None:
    done = command_line(
        "-m",
        "hydra/sweeper=optuna",
        "algo.lrr=interval(0,1)",
        "hydra.sweep.dir=found",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "algo.lrr is not a setting; did you mean algo.lr?" in the_error(done.stderr)
