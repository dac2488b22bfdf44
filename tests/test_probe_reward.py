"""The probe as a reward: fitted, chosen, stored, refused where it does not fit, and scored."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor

from rlhf_exp.artifacts import Store
from rlhf_exp.data.rows import Dataset, Statement
from rlhf_exp.probes.families import FAMILIES
from rlhf_exp.probes.fitting import split
from rlhf_exp.probes.head import Head, linear
from rlhf_exp.probes.states import Reader, States
from rlhf_exp.probes.templates import Contrast, read_templates
from rlhf_exp.rewards import Fitting, score
from rlhf_exp.rewards.ensemble import Ensemble
from rlhf_exp.rewards.format import ExactAnswers, Pattern
from rlhf_exp.rewards.probe import Probe

VECTORS = json.loads((Path(__file__).parent / "vectors" / "probes.json").read_text())
WORDS = """\
templates:
  - name: one
    question: "{{ text }} . is that so ?"
    answers: ["no", "yes"]
  - name: two
    question: "said : {{ text }} . right ?"
    answers: ["wrong", "right"]
"""
TRUTH = torch.tensor([3.0, -4.0] + [0.0] * 6) / 5


@dataclass(kw_only=True)
class Believer(Reader):
    """In place of a language model: its states know that what says "good" is true. Layer 0 is
    noise, layer 1 knows a little, layer 2 more, layer 3 as much as layer 2.
    """

    weight: float = 1.0  # tells one model from another

    def open(self, source: Any, device: Any, shared: Any = None) -> None:
        self.kind, self.depth, self.limit, self.shared = "decoder", 3, 10**9, shared
        self.fingerprint = f"weights {self.weight}"

    def read(
        self, pairs: list[list[Contrast]], layers: list[int], *, lm: bool = False
    ) -> tuple[dict[int, Tensor], Tensor | None, int]:
        noise, truth = [], []
        for contrast in (c for row in pairs for c in row):
            question, *answers = contrast.texts()
            for k, answer in enumerate(answers):
                seed = int(hashlib.sha256(f"{question} {answer}".encode()).hexdigest()[:8], 16)
                noise.append(torch.randn(8, generator=torch.Generator().manual_seed(seed)))
                truth.append(1.0 if ("good" in question) == (k == 1) else -1.0)
        shape = (len(pairs), len(pairs[0]), 2)
        belief, level = torch.tensor(truth)[:, None] * TRUTH, [0.0, 1.0, 3.0, 3.0]
        hidden = {n: (torch.stack(noise) + level[n] * belief).unflatten(0, shape) for n in layers}
        found = torch.tensor(truth).unflatten(0, shape) if lm else None
        return hidden, found, 0


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.yaml").write_text(WORDS)
    return str(tmp_path / "words.yaml")


def dataset(words: str | None, n: int = 120, **settings: Any) -> Dataset:
    def statements(start: int, count: int) -> list[Statement]:
        return [
            Statement({"prompt": f"film {i} :", "completion": f" {('bad', 'good')[i % 2]}"}, i % 2)
            for i in range(start, start + count)
        ]

    return Dataset(
        prompts=["film 1 :"],
        held_out=["film 2 :"],
        statements=statements(0, n),
        held_out_statements=statements(n, 60),
        templates=words,
        answers={"film 1 :": "good", "film 2 :": "bad"},
        **settings,
    )


def handed(tmp_path: Path, data: Dataset, **policy: Any) -> Fitting:
    def not_asked() -> Any:
        raise AssertionError("asked for without need")

    return Fitting(
        store=Store(tmp_path / "store"),
        data=lambda: data,
        trained=tiny_policy(**policy),
        pairs=not_asked,
        policy=lambda: "the start policy",
        samples=not_asked,
        device="cpu",
    )


def probe(**settings: Any) -> Probe:
    return Probe(
        **{"model": Believer(), "family": FAMILIES["logistic"](), "format_rule": None} | settings
    )


def fitted(tmp_path: Path, words: str, **settings: Any) -> Probe:
    reward = probe(**settings)
    hands = handed(tmp_path, dataset(words))
    reward.check(hands)
    reward.fit(hands)
    reward.load("cpu")
    return reward


@dataclass(kw_only=True)
class Nothing:
    """A family that finds nothing at all."""

    normalise: str = "none"
    supervised: ClassVar[bool] = True
    log_odds: ClassVar[bool] = True

    def fit(self, x: Tensor, labels: Tensor, seed: int) -> Head:
        return linear(x.new_zeros(x.shape[-1]))


def folder_of(reward: Probe) -> Path:
    assert reward.folder is not None
    return reward.folder


def report_of(reward: Probe) -> dict[str, Any]:
    return json.loads((folder_of(reward) / "report.json").read_text())


SAID = ["film 3 :"] * 4, [" good", " bad", " good.", " great"]


# ---- scores


def test_true_completions_score_higher(tmp_path: Path, words: str) -> None:
    found = fitted(tmp_path, words)(*SAID)
    assert found.dtype == torch.float32
    assert found[0] > 0.9
    assert found[1] < 0.1
    assert found[0] == found[2], "trailing punctuation is dropped before the probe reads"
    logits = fitted(tmp_path, words, score="logit")(*SAID)
    torch.testing.assert_close(logits.sigmoid(), found)


def test_the_score_is_the_mean_over_templates_then_the_difference(
    tmp_path: Path, words: str
) -> None:
    """And the normaliser is applied once: elk applies it again in forward."""
    reward = fitted(tmp_path, words, score="logit")
    hidden, _, _ = reward.model.read(
        reward._contrasts(
            [Statement({"prompt": "film 3 :", "completion": " good"}, 0)], reward.words, reward.data
        )[0],
        [reward.probe.layer],
    )
    x = hidden[reward.probe.layer][0]  # [v, 2, d]
    by_hand = (x - reward.probe.normaliser.mean) / reward.probe.normaliser.scale
    logits = by_hand @ reward.probe.head.weights[0][0] + reward.probe.head.biases[0]
    expected = (logits[:, 1] - logits[:, 0]).mean()
    torch.testing.assert_close(reward(*SAID)[0], expected)


def test_published_rewards(tmp_path: Path, words: str, monkeypatch) -> None:
    """sigma of the logit difference, the baseline, then the format rule."""
    case = {
        "pos_logits": [2.0, -0.5, 0.1, 3.0, -2.0],
        "neg_logits": [-1.0, 0.5, 0.1, 2.5, 1.0],
        "responses": ["Yes.", "No", "Maybe", "No\n", "Yes, it does"],
        "raw": [0.952574126822, 0.26894142137, 0.5, 0.622459331202, 0.0474258731776],
    }
    logits = torch.tensor([case["neg_logits"], case["pos_logits"]]).T[:, None]
    rule = ExactAnswers(answers=["Yes", "No"])
    for baseline, otherwise in ((0.0, None), (0.0, -1.0), (0.25, -1.0)):
        reward = fitted(
            tmp_path,
            words,
            baseline=baseline,
            format_rule=None if otherwise is None else rule,
        )
        monkeypatch.setattr(type(reward.probe), "__call__", lambda *_: logits)
        found = reward(["film 3 :"] * 5, case["responses"]).tolist()
        monkeypatch.undo()
        expected = [r - baseline for r in case["raw"]]
        if otherwise is not None:
            expected[2] = expected[4] = otherwise  # exactly, after the baseline
        assert found == pytest.approx(expected, abs=1e-6)


def test_malformed_completions_get_the_rules_score(tmp_path: Path, words: str) -> None:
    found = fitted(tmp_path, words, format_rule=ExactAnswers(otherwise=-3.0))(*SAID)
    assert (found > 0).tolist() == [True, True, True, False]
    assert found[3] == -3.0  # " great" is no answer of the data set
    found = fitted(tmp_path, words, format_rule=Pattern(pattern=" good"))(*SAID)
    assert found[1:].tolist() == [-1.0] * 3


def test_standardised_scores(tmp_path: Path, words: str) -> None:
    plain = fitted(tmp_path, words)
    record = json.loads((folder_of(plain) / "reward.json").read_text())
    assert record["lowest"] <= record["mean"]
    reward = fitted(tmp_path, words, standardise=True)
    assert reward.folder == plain.folder, "standardising is no other fit"
    expected = (plain(*SAID) - record["mean"]) / record["std"]
    torch.testing.assert_close(reward(*SAID), expected)
    assert record["std"] > 0.3


# ---- choice and report


def test_the_layer_is_chosen_on_one_split_and_reported_on_another(
    tmp_path: Path, words: str
) -> None:
    reward = fitted(tmp_path, words, compare=["random", "ccs"])
    assert reward.probe.layer == 3, "layers 2 and 3 tie; the last one wins"
    report = report_of(reward)
    assert report["chosen"]["probe"] == "logistic"
    assert report["data"]["train"] == 96
    assert report["data"]["selection"] == 24
    assert report["data"]["report"] == 60
    assert report["data"]["templates"] == ["one", "two"]
    by = {
        (r["probe"], r["layer"]): r["auroc"]["value"]
        for r in report["rows"]
        if r["split"] == "report" and r["ensembling"] == "partial"
    }
    assert len(by) == 3 * 4
    assert by["logistic", 3] > 0.99
    assert by["ccs", 3] > 0.95
    assert by["logistic", 0] < 0.7
    assert report["zero_shot"]["auroc"]["value"] == 1.0
    assert all(0.3 < v < 0.7 for v in report["separability"].values())
    assert {p.name for p in folder_of(reward).iterdir()} >= {
        "report.md",
        "report.csv",
        "by_layer.png",
        "probe.safetensors",
    }


def test_a_family_can_be_chosen_too(tmp_path: Path, words: str) -> None:
    settings: dict[str, Any] = {"family": FAMILIES["random"](), "compare": ["logistic"]}
    assert fitted(tmp_path, words, **settings).probe.family == "random"
    assert fitted(tmp_path, words, choose_family=True, **settings).probe.family == "logistic"


def test_a_layer_can_be_given(tmp_path: Path, words: str) -> None:
    assert fitted(tmp_path, words, layer=1).probe.layer == 1


@pytest.mark.parametrize("name", ["ccs", "tpc", "bss", "vinc"])
@pytest.mark.parametrize("sign", ["platt", "k_labels"])
def test_unsupervised_directions_are_turned_and_the_report_says_how(
    tmp_path: Path, words: str, name: str, sign: str
) -> None:
    for seed in range(2):  # whatever way the direction came out
        reward = fitted(tmp_path, words, family=FAMILIES[name](), sign=sign, seed=seed)
        found = reward(*SAID)
        assert found[0] > 0.5 > found[1]
        report = report_of(reward)
        told = "Platt scaling on 96" if sign == "platt" else "the labels of 16 examples"
        assert told in report["chosen"]["sign"]
    unset = fitted(tmp_path, words, family=FAMILIES[name](), sign="none")
    assert unset.probe.sign == "not set: this direction may point either way"


@dataclass(kw_only=True)
class Elsewhere:
    """Another data set, in which good is false."""

    words: str
    inverted: bool = True

    def load(self) -> Dataset:
        data = dataset(self.words, n=200)
        turned = [replace(s, label=1 - s.label) for s in data.held_out_statements]
        return data if not self.inverted else replace(data, held_out_statements=turned)


def test_transfer_to_other_data_sets(tmp_path: Path, words: str) -> None:
    reward = fitted(tmp_path, words, transfer={"turned": Elsewhere(words=words)})
    report = report_of(reward)
    found = report["transfer"]
    assert found["names"] == ["this", "turned"]
    assert found["trained_on"] == ["this", "turned", "pooled"]
    for row in found["auroc"]:
        assert row[0] > 0.95
        assert row[1] < 0.05
    assert (folder_of(reward) / "transfer.png").exists()


# ---- seeds, ensembles, artifacts


def test_members_of_an_ensemble_differ_by_their_split(tmp_path: Path, words: str) -> None:
    ensemble = Ensemble(member=probe(), size=3)
    hands = handed(tmp_path, dataset(words))
    ensemble.check(hands)
    ensemble.fit(hands)
    ensemble.load("cpu")
    found = score(ensemble, *SAID)
    assert list(found.members) == ["member_0", "member_1", "member_2"]
    weights = [m.probe.head.weights[0] for m in ensemble.members.values()]
    assert not torch.allclose(weights[0], weights[1])
    assert found.objective[0] > found.objective[1]
    made = [p for p in hands.store.used if "/states/" in p]
    assert len(made) == 2, "members share the states"
    assert len([p for p in hands.store.used if "/reward/" in p]) == 3


def test_probes_and_other_rewards_are_members_together(tmp_path: Path, words: str, caplog) -> None:
    @dataclass(kw_only=True)
    class Length(Believer):
        standardise: bool = True
        learns_from_pairs = False

        def check(self, fitting: Fitting) -> None: ...

        def fit(self, fitting: Fitting) -> None: ...

        def load(self, device: Any) -> None: ...

        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.tensor([float(len(c)) for c in completions])

    members = {"probe": probe(standardise=True), "length": Length()}
    ensemble = Ensemble(named=members, objective="wco")
    assert "scale of their own" not in caplog.text
    hands = handed(tmp_path, dataset(words))
    ensemble.fit(hands)
    ensemble.load("cpu")
    found = score(ensemble, *SAID)
    assert list(found.members) == ["probe", "length"]
    torch.testing.assert_close(found.objective, torch.stack(list(found.members.values())).amin(0))
    with caplog.at_level(logging.WARNING):
        Ensemble(named={"probe": probe(), "length": Length()})
    assert "the scores of probe have a scale of their own" in caplog.text
    with pytest.raises(ValueError, match=r"either reward.size copies .* or the rewards in"):
        Ensemble(member=probe(), named=members)


def test_a_second_fit_finds_the_first(tmp_path: Path, words: str) -> None:
    first = fitted(tmp_path, words)
    hands = handed(tmp_path, dataset(words))
    again = probe(baseline=0.5, strip=False)  # of no matter to the fit
    again.fit(hands)
    assert again.folder == first.folder
    assert set(hands.store.used.values()) == {"reused"}
    other = probe(resample=True)
    other.fit(hands)
    assert other.folder != first.folder


def test_a_fitted_probe_is_used_as_it_is(tmp_path: Path, words: str) -> None:
    first = fitted(tmp_path, words)
    reward = fitted(tmp_path, words, fitted=str(first.folder))
    torch.testing.assert_close(reward(*SAID), first(*SAID), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": Believer(token="mean")}, r"fitted with model.token=last, not mean: set"),
        ({"model": Believer(dtype="float16")}, r"model.dtype=float32, not float16"),
        ({"layer": 1}, r"reads layer 3, not 1: set reward.layer=null, or fit again"),
        ({"template_names": ["two"]}, r"fitted under other templates \(one, two\): give those"),
    ],
)
def test_a_probe_fitted_for_something_else_is_refused(
    tmp_path: Path, words: str, settings: dict[str, Any], message: str
) -> None:
    first = fitted(tmp_path, words)
    reward = probe(fitted=str(first.folder), **settings)
    with pytest.raises(ValueError, match=message):
        reward.check(handed(tmp_path, dataset(words)))


def test_a_probe_fitted_on_other_weights_is_refused(tmp_path: Path, words: str) -> None:
    first = fitted(tmp_path, words)
    reward = probe(fitted=str(first.folder), model=Believer(weight=2.0))
    reward.fit(handed(tmp_path, dataset(words)))
    with pytest.raises(
        ValueError, match=r"fitted on the start policy and the weights at .* others"
    ):
        reward.load("cpu")


def test_a_damaged_probe_is_refused(tmp_path: Path, words: str) -> None:
    first = fitted(tmp_path, words)
    assert first.folder is not None
    (first.folder / "probe.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="is damaged"):
        probe(fitted=str(first.folder)).check(handed(tmp_path, dataset(words)))


def test_stored_states_give_a_report_and_no_score(tmp_path: Path, monkeypatch) -> None:
    found = Believer()
    found.open("", "cpu")
    (tmp_path / "words.yaml").write_text(WORDS)
    data = dataset(str(tmp_path / "words.yaml"))
    hands = handed(tmp_path, data)
    given = probe()
    (pairs, labels), _ = given._pairs(data)
    states = found.states_of([row[:1] for row in pairs], labels)
    monkeypatch.setattr(Probe, "_npy", lambda self: states)
    (tmp_path / "npy").mkdir()
    reward = probe(hidden_states=str(tmp_path / "npy"))
    reward.check(hands)
    reward.fit(hands)
    assert reward.folder is not None
    report = json.loads((reward.folder / "report.json").read_text())
    assert report["data"]["report"] == 60
    assert report["chosen"]["layer"] == 3
    with pytest.raises(ValueError, match=r"fitted on stored states .* fit it on a model"):
        reward.load("cpu")


# ---- refused at once


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"statements": []}, {}, "needs statements whose truth is known .* use data=facts"),
        ({"templates": None}, {}, "names no templates: give reward.templates"),
        ({}, {"template_names": ["three"]}, "template=three is not known; choose one of one, two"),
        ({"answers": {}}, {"format_rule": ExactAnswers()}, "no answers to allow"),
        ({}, {"model": Believer(share=True)}, "give policy.lora, or set reward.model.share=false"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    tmp_path: Path, words: str, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    data = replace(dataset(words), **change)
    with pytest.raises(ValueError, match=message):
        probe(**settings).check(handed(tmp_path, data))


def test_one_class_only(tmp_path: Path, words: str) -> None:
    data = dataset(words)
    data.statements[:] = [s for s in data.statements if s.label == 1]
    with pytest.raises(ValueError, match="all 60 statements have the label 1: a probe needs both"):
        probe().check(handed(tmp_path, data))
    few = replace(dataset(words), statements=dataset(words).statements[:2])
    with pytest.raises(ValueError, match="split of 2 examples holds one class only"):
        probe(selection_share=0.5).fit(handed(tmp_path, few))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sign": "plat"}, r"reward.sign=plat is not known.*did you mean platt\?"),
        ({"score": "sigma"}, "reward.score=sigma is not known"),
        ({"compare": ["cc"]}, r"reward.compare=cc is not known.*did you mean ccs\?"),
        ({"selection_share": 1.0}, "reward.selection_share=1.0 must be between 0 and 1"),
        ({"fitted": "a", "hidden_states": "b"}, "exclude each other"),
        ({"sign_labels": 0}, "reward.sign_labels=0 must be at least 1"),
        ({"shots": -1}, "reward.shots=-1 must be at least 0"),
        ({"examples": 0}, "reward.examples=0 must be at least 4"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**settings)


def test_examples_of_one_prompt_stay_together(tmp_path: Path, words: str) -> None:
    data = dataset(words)
    twice = [
        replace(s, fields=s.fields | {"prompt": f"film {i // 2} :"})
        for i, s in enumerate(data.statements)
    ]
    reward = probe()
    hands = handed(tmp_path, replace(data, statements=twice))
    reward.fit(hands)
    (folder, _) = reward._read(reward.data, hands)
    given = States.load(folder)
    groups = torch.tensor(given.about["groups"])
    assert len(groups.unique()) == 60
    order = States({0: groups[:, None, None, None].float()}, given.labels, None, given.about)
    train, selection = (set(x.hidden[0].flatten().tolist()) for x in split(order, 0.2, seed=0))
    assert not train & selection
    assert len(selection) == 12


def test_transfer_needs_as_many_templates(tmp_path: Path, words: str) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(WORDS.split("  - name: two")[0])
    reward = probe(transfer={"short": Elsewhere(words=str(other))})
    with pytest.raises(ValueError, match=r"number of templates \(this 2, short 1\): give"):
        reward.check(handed(tmp_path, dataset(words)))
    with pytest.raises(ValueError, match=r"reward.transfer.pooled: the report uses this name"):
        probe(transfer={"pooled": Elsewhere(words=words)})


@pytest.mark.parametrize(("key", "value"), [("score", "logit"), ("shots", 2)])
def test_a_fitted_probe_keeps_its_settings(tmp_path: Path, words: str, key: str, value) -> None:
    first = fitted(tmp_path, words)
    reward = probe(fitted=str(first.folder), **{key: value})
    with pytest.raises(ValueError, match=rf"was fitted with reward.{key}=.*, not {value}: set"):
        reward.check(handed(tmp_path, dataset(words)))


def test_a_folder_that_holds_no_probe(tmp_path: Path, words: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward.fitted=.* is not a fitted probe: give"):
        probe(fitted=str(tmp_path)).check(handed(tmp_path, dataset(words)))


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, False), ({"score": "logit"}, True), ({"standardise": True, "baseline": 2.0}, True)],
)
def test_malformed_completions_must_not_pay(
    tmp_path: Path, words: str, caplog, monkeypatch, settings: dict[str, Any], warns: bool
) -> None:
    """The rule's -1 lies below a probability, and not below every logit."""
    monkeypatch.setattr(logging.getLogger("rlhf_exp"), "propagate", True)
    fitted(tmp_path, words, format_rule=ExactAnswers(), **settings)
    assert ("malformed ones can pay: lower reward.format_rule.otherwise" in caplog.text) == warns


def test_a_report_alone_needs_no_answers(tmp_path: Path, words: str) -> None:
    hands = handed(tmp_path, replace(dataset(words), answers={}))
    hands.scoring = False
    reward = probe(format_rule=ExactAnswers())
    reward.check(hands)
    reward.fit(hands)
    assert reward.folder is not None


@pytest.mark.parametrize(
    ("policy", "model", "message"),
    [
        (
            {"adapter": "a", "sft": False},
            Believer(),
            r"reads the start policy, and policy.adapter .* give reward.model.path",
        ),
        (
            {"lora": {"r": 2}, "quantization": "int8", "sft": False},
            Believer(share=True),
            r"share=true reads quantized weights",
        ),
    ],
)
def test_policies_whose_weights_are_made_in_memory(
    tmp_path: Path, words: str, policy: dict[str, Any], model: Believer, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        probe(model=model).check(handed(tmp_path, dataset(words), **policy))


def test_a_probe_that_says_one_thing_cannot_be_standardised(tmp_path: Path, words: str) -> None:
    settings: dict[str, Any] = {"layer": 0, "family": Nothing()}
    assert fitted(tmp_path, words, **settings)(*SAID).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="one score, which cannot be standardised"):
        fitted(tmp_path, words, standardise=True, **settings)


def test_members_read_the_same_states_once(tmp_path: Path, words: str, monkeypatch) -> None:
    model = Reader()
    monkeypatch.setattr(model, "_opened", None)
    calls: list[int] = []
    monkeypatch.setattr(Reader, "_fitting", lambda self, flat: calls.append(len(flat)) or 1 / 0)
    row = [[Contrast(t, {"prompt": "a", "completion": "b"}) for t in read_templates(words)]]
    for layers in ([1], [1], [2]):
        with pytest.raises(ZeroDivisionError):
            model.read(row, layers)
    model._last = (([c.texts() for c in row[0]], [1], False, "last"), ({}, None, 7))
    assert model.read(row, [1])[2] == 7
    with pytest.raises(ZeroDivisionError):
        model.read(row, [2])
    assert len(calls) == 4
