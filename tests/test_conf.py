"""Every configuration that can be asked for composes, resolves, and fits the classes it names.

The full product of all options is thousands of configurations at 0.1 s each; all pairs of options
from any two groups are covered instead (about as many as the two largest groups have pairs).
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from rlhf_exp.config import ROOT_KEYS, build, check, conf_directory, explain, resolved

CONF = conf_directory()
ROOT = Path(__file__).parents[1]
# Values for the keys that an option leaves to the user (???), by the last part of their name.
GIVEN = {"path": "owner/model", "function": "my_rewards:politeness", "prompts": "prompts.jsonl"}
# Options that cannot be used without some of them.
REQUIRED = {
    "policy=hub": ["path"],
    "reward=hub": ["path"],
    "reward=function": ["function"],
    "data=local": ["prompts"],
}

# Not asked for by themselves: quick is part of experiment=debug, feedback of some algorithms, and
# critic of a stage.
WITHIN = ("hydra", "quick", "feedback", "critic")
FOLDERS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in WITHIN)
OPTIONS = {f: sorted(p.stem for p in (CONF / f).glob("*.yaml")) for f in FOLDERS}
PRESETS = OPTIONS.pop("experiment")
GOLDS = [o for o in OPTIONS["reward"] if o.endswith("_gold") or o in ("answers", "hub", "lexicon")]
OPTIONS["reward"] = [o for o in OPTIONS["reward"] if not o.endswith("_gold")]
GROUPS = OPTIONS | {"reward@gold": GOLDS}  # what can stand before = on the command line


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    """A fresh composer for each test: `explain` makes one of its own and drops ours."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def of_options(*choices: str) -> DictConfig:
    """The config under the options `choices` (group=option), with the keys that are ??? given."""
    required = [
        f"{choice.split('=')[0].split('@')[-1]}.{key}={GIVEN[key]}"
        for choice in choices
        for key in REQUIRED.get(choice.split("@")[0].split("=")[0] + "=" + choice.split("=")[1], ())
    ]
    config = compose("config", overrides=[*choices, *required])
    for key in OmegaConf.missing_keys(config):
        last = key.split(".")[-1]
        assert last in GIVEN, f"{key} is ???, and this test does not know what a user would give"
        OmegaConf.update(config, key, GIVEN[last])
    return config


def composed(*overrides: str) -> DictConfig:
    """What the command line would give: options through Hydra, single values merged in."""
    options = [o for o in overrides if o.split("=")[0] in {*GROUPS, "experiment"}]
    values = [o.removeprefix("+") for o in overrides if o not in options]
    config = copy.deepcopy(of_options(*options))
    OmegaConf.set_struct(config, False)
    return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist(values)))


def nodes(config: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node that names a class, with where it is."""
    if isinstance(config, ListConfig):
        for i, value in enumerate(config):
            yield from nodes(value, f"{key}[{i}]")
    if isinstance(config, DictConfig):
        if "_target_" in config:
            yield key, config
        for name, value in config.items():
            yield from nodes(value, f"{key}.{name}".lstrip("."))


def build_all(config: DictConfig) -> dict[str, Any]:
    """Every object that the config describes, as a run builds them."""
    return {
        key: build(node, key)
        for key, node in resolved(config).items()
        if isinstance(node, dict) and "_target_" in node
    }


def arguments_only(value: Any) -> str:
    """Names a test after what was typed."""
    return " ".join(value) if isinstance(value, list) else "-"


# ------------------------------------------------------------------------------------ combinations


def all_pairs() -> list[tuple[str, ...]]:
    """Few combinations of one option per group that hold every pair of options (greedy)."""
    names = list(GROUPS)
    wanted = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(names, 2)
        for x in GROUPS[a]
        for y in GROUPS[b]
    }
    found = []
    while wanted:
        chosen = dict(min(sorted(pair) for pair in wanted))  # a missing pair, then the best
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    GROUPS[name],
                    key=lambda o: sum(frozenset([(name, o), c]) in wanted for c in chosen.items()),
                )
        wanted -= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        found.append(tuple(chosen[name] for name in names))
    return found


COMBINATIONS = all_pairs()


def test_combinations_cover_all_pairs() -> None:
    rows = [dict(zip(GROUPS, choice, strict=True)) for choice in COMBINATIONS]
    for a, b in combinations(GROUPS, 2):
        assert {(r[a], r[b]) for r in rows} == {(x, y) for x in GROUPS[a] for y in GROUPS[b]}


@pytest.mark.parametrize("choice", COMBINATIONS, ids="-".join)
def test_combination_composes_and_resolves(choice: tuple[str, ...]) -> None:
    overrides = [f"{g}={o}" for g, o in zip(GROUPS, choice, strict=True)]
    config = composed(*overrides)
    check(config)
    plain = resolved(config)
    assert set(plain) == set(ROOT_KEYS)
    for group, option in zip(GROUPS, choice, strict=True):
        if "@" not in group:
            names_class = OmegaConf.load(CONF / group / f"{option}.yaml").get("_target_")
            assert names_class in (None, plain[group]["_target_"]), f"{group}={option} did not win"


def test_bare_command_needs_nothing_from_the_user() -> None:
    assert not OmegaConf.missing_keys(compose("config"))


@pytest.mark.parametrize(
    ("overrides", "gold"),
    [
        (["data=reviews"], "ReviewsGold"),
        (["data=local"], "Lexicon"),
        (["data=local", "reward@gold=hub"], "Pairwise"),
        (["reward@gold=lexicon"], "Lexicon"),
    ],
    ids=arguments_only,
)
def test_data_names_the_gold_that_fits_unless_told_otherwise(overrides, gold: str) -> None:
    assert composed(*overrides).gold["_target_"].split(".")[-1] == gold


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_composes_checks_and_builds(preset: str) -> None:
    config = composed(f"experiment={preset}")
    check(config)
    assert resolved(config) != resolved(composed()), "a preset that changes nothing"
    for key, built in build_all(config).items():
        assert isinstance(built, get_class(config[key]["_target_"]))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_can_be_overridden(preset: str) -> None:
    config = composed(f"experiment={preset}", "seed=7", "policy.temperature=0.5", "tracker=wandb")
    assert (config.seed, config.policy.temperature) == (7, 0.5)
    assert config.tracker.project == "rlhf_exp"


# ----------------------------------------------------------------------------- options and classes


@pytest.mark.parametrize("option", [f"{g}={o}" for g, options in GROUPS.items() for o in options])
def test_option_carries_the_keys_of_its_class(option: str) -> None:
    config = composed(option)
    group = option.split("=")[0].split("@")[-1]
    found = list(nodes(config[group], group))
    assert found, f"{option} names no class"
    for key, node in found:
        schema = get_class(node["_target_"])
        given = {str(k) for k in node} - {"_target_"}
        if not is_dataclass(schema):
            assert not given, f"{key}: {schema.__name__} takes no settings"
            continue
        assert given == {f.name for f in fields(schema) if f.init}, key
    check(config)
    plain = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(plain, dict)
    assert isinstance(build(plain, group), get_class(plain["_target_"]))


@pytest.mark.parametrize("judge", sorted(p.stem for p in (CONF / "feedback").glob("*.yaml")))
@pytest.mark.parametrize("algorithm", ["alt_lmc", "alt_lmu", "steerlm"])
def test_every_judge_can_be_asked_by_every_algorithm_that_asks(judge: str, algorithm: str) -> None:
    given = ["algo.labels.feedback.judge.path=owner/model", "algo.labels.feedback.judge.model=name"]
    chosen = f"feedback@algo.labels.feedback={judge}"
    needed = {"local": given[:1], "openai": given[1:]}.get(judge, [])
    config = compose("config", overrides=[f"algo={algorithm}", chosen, *needed])
    check(config)
    built = build(resolved(config)["algo"], "algo")
    classes = {"rules": "Rules", "local": "LocalModel", "openai": "OpenAI"}
    assert type(built.labels.feedback.judge).__name__ == classes[judge]


@pytest.mark.parametrize(
    "key", ["preferences", "evaluation", "checkpoints", "sft", "prepare", "generations"]
)
def test_settings_without_a_group_carry_the_keys_of_their_class(key: str) -> None:
    node = composed()[key]
    schema = get_class(node["_target_"])
    assert {str(k) for k in node} - {"_target_"} == {f.name for f in fields(schema)}  # type: ignore[arg-type]


def test_classes_named_by_the_config_are_keyword_only() -> None:
    for _, node in nodes(composed("data=local", "reward=mix")):
        schema = get_class(node["_target_"])
        if is_dataclass(schema):
            assert all(f.kw_only for f in fields(schema) if f.init), schema


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.clip=abc"], r"algo\.clip: .*'abc'"),
        (["algo.steps=1.5"], r"algo\.steps: .*1\.5"),
        (["algo.whiten_rewards=maybe"], r"algo\.whiten_rewards: .*'maybe'"),
        (["reward.member.epochs=two"], r"reward\.member\.epochs: .*'two'"),
        (["algo.betas=[0.9,x]"], r"algo\.betas\[1\]: .*'x'"),
        (["policy.lora=[1]"], r"policy\.lora"),
        (["preferences.pairs=many"], r"preferences\.pairs: .*'many'"),
        (["+algo.clips=0.2"], r"algo\.clips is not a setting of PPO; did you mean clip\?"),
        (["+reward.member.learnrate=1"], r"reward\.member\.learnrate is not a setting of Pairwise"),
        (["+reward.sise=3"], r"reward\.sise is not a setting of Ensemble; did you mean size\?"),
        (["+sead=3"], r"sead is not a setting; did you mean seed\?"),
        (
            ["reward=mix", "+reward.parts.lexicon.wieght=1"],
            r"reward\.parts\.lexicon\.wieght is not a setting of Part; did you mean weight\?",
        ),
    ],
    ids=arguments_only,
)
def test_wrong_key_or_type_is_named_before_anything_is_built(overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        check(composed(*overrides))


@pytest.mark.parametrize("override", ["seed=abc", "show_every=often", "stages=align", "seed=1.5"])
def test_wrong_type_at_the_root_is_named(override: str) -> None:
    with pytest.raises(ValueError, match=override.split("=")[0]):
        check(composed(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[sft,algin]", r"stages=algin .* did you mean align"),
    ],
)
def test_unknown_stage_is_named_before_the_run(override, message, tmp_path) -> None:
    from rlhf_exp.run import Stages

    (tmp_path / "run.json").write_text(json.dumps({"config": resolved(composed(override))}))
    with pytest.raises(ValueError, match=message):
        Stages(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo.clp=0.3"], r"^algo\.clp is not a setting; did you mean algo\.clip\?$"),
        (["algo.kl_coeff=0.3"], r"did you mean algo\.kl_coef\?"),
        (["sead=1"], r"^sead is .*; did you mean seed\?$"),
        (["reward=pairwise", "reward.epoch=1"], r"did you mean reward\.epochs\?"),
        (["reward.member.epoch=1"], r"did you mean reward\.member\.epochs\?"),
        (["reward=esemble"], r"^reward=esemble is not an option; .*; did you mean ensemble\?$"),
        (["reward@gold=lexcon"], r"^reward=lexcon is not an option; .*; did you mean lexicon\?$"),
        (
            ["policy=tinny"],
            r"^policy=tinny is not an option; there are .*hub.*; did you mean tiny\?$",
        ),
        (["experiment=debg"], r"did you mean debug\?$"),
        (["objective=golden"], r"^objective=golden is not an option; .*; did you mean gold\?$"),
        (["rewards=ensemble"], r"^rewards is .*; did you mean reward\?$"),
        (["zzz.yyy=1"], r"^zzz\S* is (not|neither) a setting[^;]*$"),
        (["algo.clip.x=1"], r"algo\.clip"),
    ],
    ids=arguments_only,
)
def test_composition_error_becomes_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose("config", overrides=arguments)
    sentence = explain(caught.value, arguments)
    assert "\n" not in sentence
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize(
    ("option", "key"), [("data=local", "data.prompts"), ("reward=function", "reward.function")]
)
def test_value_that_must_be_given_is_asked_for(option: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} .*must be given"):
        check(compose("config", overrides=[option]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.minibatch=48"], r"algo\.minibatch=48 must divide the 64 rollouts"),
        (["algo.kl_estimator=k9"], r"algo\.kl_estimator=k9"),
        (["algo.schedule=cosin"], r"did you mean cosine"),
        (["algo.kl_target=0"], r"algo\.kl_target=0"),
        (["reward.objective=worst"], r"reward\.objective=worst"),
        (["reward.size=0"], r"reward\.size=0"),
        (["reward=pairwise", "reward.normalise=zscore"], r"reward\.normalise=zscore"),
        (["reward=pairwise", "reward.train=false"], r"give reward\.path"),
        (["reward=pairwise", "reward.micro_batch=20"], r"multiple of reward\.micro_batch=20"),
        (["sft.micro_batch=48"], r"multiple of sft\.micro_batch=48"),
        (["policy.path=x/y"], r"either policy\.path .* or policy\.architecture"),
        (["policy.dtype=float8"], r"policy\.dtype=float8"),
        (["policy.temperature=0"], r"policy\.temperature=0"),
        (["policy.train_top=1", "policy.lora={r: 4}"], r"exclude each other"),
        (["policy.min_new_tokens=99"], r"policy\.min_new_tokens=99"),
        (["preferences.noise_scheme=flop"], r"did you mean flip"),
        (["data.prompts=0"], r"data\.prompts=0"),
        (["evaluation.every=0"], r"evaluation\.every"),
        (["checkpoints.keep=0"], r"checkpoints\.keep=0"),
        (["hardware.device=tpu"], r"hardware\.device=tpu"),
        (["reward=function", "reward.function=politeness"], r"module:function"),
        (
            ["reward=ensemble", "reward.member=${gold}"],
            r"reward\.member=ReviewsGold has no seed .* reward=mix",
        ),
    ],
    ids=arguments_only,
)
def test_impossible_value_is_named_with_its_key(overrides: list[str], message: str) -> None:
    config = composed(*overrides)
    check(config)
    with pytest.raises(ValueError, match=message):
        build_all(config)


# ------------------------------------------------------------------------------------ command line

ANSWER = """
import json, runpy, sys
sys.argv = ["rlhf_exp", *sys.argv[1:]]
try:
    runpy.run_module("rlhf_exp", run_name="__main__")
except SystemExit as error:
    assert not error.code, error.code
heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "numpy"}
print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "ppo, quark, raft, rest"),
        (["--cfg", "job"], "_target_: rlhf_exp.algorithms.ppo.PPO"),
        (["--cfg", "job", "reward=pairwise", "seed=3"], "seed: 3"),
    ],
    ids=arguments_only,
)
def test_help_and_cfg_answer_without_torch(arguments, expected: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert list(tmp_path.iterdir()) == [], "an answer leaves no files"


def test_help_lists_every_group_and_option(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_exp", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    for group in (*FOLDERS, "quick", "feedback"):
        options = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}" in lines
    assert "Examples:" in lines


def test_a_data_set_for_transfer_leaves_the_gold_alone() -> None:
    chosen = ["data=facts", "reward=probe", "+data@reward.transfer.other=reviews"]
    config = compose("config", overrides=chosen)
    assert config.gold._target_ == "rlhf_exp.rewards.answers.Answers"
    assert config.reward.transfer.other._target_ == "rlhf_exp.data.reviews.Reviews"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (
            ["reward=probe", "reward/family=ccs", "reward.family.restart=3"],
            "reward.family.restarts",
        ),
        (["reward=probe", "reward.modle.path=x"], "reward.model"),
    ],
)
def test_suggestions_below_a_picked_option(arguments: list[str], suggestion: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose("config", overrides=arguments)
    assert f"did you mean {suggestion}?" in explain(cast(Exception, caught.value), arguments)
