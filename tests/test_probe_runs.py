"""Probe rewards from the command line to the summary, offline, on the embedded world of facts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import command_line, inside, rows, says, the_error

pytest_plugins = ["runs_fixtures"]

FACTS = ("data=facts", "reward=probe", "algo=ppo")
QUICK = ("experiment=debug", "data=facts", "reward=probe", "reward.compare=[random,ccs]")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts") / "artifacts"


@pytest.mark.slow
def test_latent_knowledge_raises_accuracy_over_three_seeds(tmp_path: Path, store: Path) -> None:
    """A policy that imitates a careless pupil learns from what its own states know."""
    for seed in range(3):
        run = tmp_path / str(seed)
        settings = (
            f"seed={seed}",
            f"artifacts={store}",
            "algo.steps=30",
            "reward.compare=[random]",
        )
        assert inside(run, *FACTS, *settings) == 0
        summary = json.loads((run / "summary.json").read_text())
        assert 0.5 < summary["gold"]["before"]["mean"] < 0.75
        assert summary["gold"]["after"]["mean"] > 0.85
        assert summary["gold"]["change"]["interval"][0] > 0.1
        (first, *_, last) = sorted((run / "evaluation").glob("step-*.json"))
        for path in (first, last):
            for row in json.loads(path.read_text())["rows"]:
                assert row["facet/valid"] == float(row["completion"].strip() in ("yes", "no"))
                assert (row["proxy"] == -1.0) == (row["facet/valid"] == 0.0)
        assert json.loads(last.read_text())["metrics"]["reward/valid"] > 0.95


@pytest.mark.slow
def test_a_format_that_collapses_is_told(tmp_path: Path) -> None:
    """A policy that hardly saw a demonstration answers with anything but yes and no."""
    assert inside(tmp_path / "run", *QUICK, f"artifacts={tmp_path}/a", "sft.epochs=0.02") == 0
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[1]["reward/valid"] < 0.5
    assert metrics[1]["reward/proxy"] < 0.0
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("reward/valid = ") == 1
    assert "the format has collapsed: raise algo.kl_coef" in log


def test_a_probe_is_fitted_and_reported_alone(tmp_path: Path) -> None:
    process = command_line("stages=[reward]", *QUICK, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "probe logistic at layer" in process.stderr + process.stdout
    (report,) = (tmp_path / "artifacts" / "reward").glob("probe-*/report.md")
    assert str(report) in process.stderr + process.stdout
    assert {p.name for p in report.parent.iterdir()} >= {
        "artifact.json",
        "probe.json",
        "probe.safetensors",
        "reward.json",
        "report.json",
        "report.csv",
        "by_layer.png",
    }
    assert len(list((tmp_path / "artifacts" / "states").glob("contrasts-*"))) == 2
    assert not (tmp_path / "artifacts" / "preferences").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ("reward=ensemble", "reward@reward.member=probe", "reward.size=2"),
        ("reward=committee", "reward.named.pairwise.epochs=1"),
        ("reward=mix", "reward@reward.parts.proxy.reward=probe"),
    ],
    ids=["ensemble", "committee", "mix"],
)
def test_probes_are_members_of_other_rewards(tmp_path: Path, store: Path, settings) -> None:
    run = tmp_path / "run"
    assert inside(run, *QUICK[:2], f"artifacts={store}", *settings) == 0
    first = rows(run / "metrics.jsonl")[1]
    assert len([k for k in first if k.startswith("reward/proxy/")]) == 2
    assert 0 <= first["reward/valid"] <= 1


def test_the_policys_own_base_is_the_reward_model(tmp_path: Path, store: Path) -> None:
    """The scores are those of a copy, while the adapter learns."""
    lora = "policy.lora={r: 4, lora_alpha: 16, target_modules: [c_attn], fan_in_fan_out: true}"
    for share in ("true", "false"):
        run = tmp_path / share
        settings = (lora, f"reward.model.share={share}", "algo.lr=0.01")
        assert inside(run, *QUICK, f"artifacts={store}", *settings) == 0
    shared, copied = (rows(tmp_path / share / "metrics.jsonl") for share in ("true", "false"))
    assert [r.get("reward/proxy") for r in shared] == [r.get("reward/proxy") for r in copied]
    assert shared[-1]["evaluation/kl/k1"] > 0.01


def test_a_family_that_is_none(tmp_path: Path) -> None:
    process = command_line(*QUICK, "reward/family=css", cwd=tmp_path)
    assert process.returncode == 1
    says(the_error(process.stderr), "reward/family=css is not an option", "did you mean ccs")


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("data=reviews", ("statements whose truth is known", "data=facts")),
        ("reward.model.share=true", ("policy.lora", "reward.model.share=false")),
        ("reward.model.path=no-such/model", ("no-such/model",)),
        ("reward.model.package=none", ("reward.model.package=none", "reward.model.path")),
        ("reward.model.layers=[7]", ("model.layers=[7]", "layers 0-2")),
        ("reward.layer=7", ("reward.layer=7", "0, 1, 2")),
        ("reward.templates=truthfull", ("truthfull", "did you mean truthful")),
        ("reward.template_names=[verdit]", ("verdit", "did you mean verdict")),
        ("reward.compare=[foo]", ("reward.compare=foo", "ccs")),
        ("reward.model.max_length=2", ("max_length=2", "never cut")),
        ("reward.family.l2=-1", ("l2=-1",)),
        ("reward.fitted=nowhere", ("nowhere", "is not a fitted probe")),
        ("reward.hidden_states=nowhere", ("nowhere",)),
    ],
)
def test_bad_input_is_one_sentence(
    store: Path, refused: Callable[..., str], setting: str, fragments: tuple[str, ...]
) -> None:
    says(refused("stages=[reward]", *QUICK, f"artifacts={store}", setting), *fragments)
