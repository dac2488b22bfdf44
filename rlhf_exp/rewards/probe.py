"""A reward read off the hidden states of a frozen language model: latent knowledge.

Each completion is put before the model as a statement with two answers, "this is wrong" and "this
is right" in the words of a template, and a probe fitted on statements of known truth says how much
more it believes the second: reward = sigma(logit of right - logit of wrong), as in Macijauskas 2023
("Eliciting latent knowledge from language models by reinforcement learning"). Several templates are
averaged before the difference.

Left out: fitting the probe again while the policy trains.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import __version__, adapters, weights
from rlhf_exp.artifacts import fingerprint, verify, write_json
from rlhf_exp.choices import pick, require
from rlhf_exp.data.rows import Dataset, Statement
from rlhf_exp.probes import fitting as probes
from rlhf_exp.probes.families import FAMILIES
from rlhf_exp.probes.npy import read_npy
from rlhf_exp.probes.states import States
from rlhf_exp.probes.templates import Contrast, Template, balanced, contrasts, read_templates
from rlhf_exp.report.probes import as_text, write
from rlhf_exp.rewards import Fitting, Reward
from rlhf_exp.rewards.format import postprocess

logger = logging.getLogger(__name__)

RECORD = "reward.json"
OWN = "this"  # the data set itself, in a table of transfer
SEEN = ("states", "token", "end_of_text", "dtype", "max_length")  # of the model, what a probe sees
FITTED = (
    "family",
    "selection_share",
    "layer",
    "compare",
    "choose_family",
    "sign",
    "sign_labels",
    "score",
    "seed",
    "resample",
)  # of the settings, what decides the fit


@dataclass(kw_only=True)
class Probe(Reward):
    """sigma(logit difference) of `prompt + completion` under a probe; minus `baseline`, then the
    format rule.
    """

    model: Any  # whose hidden states are read: a probes.states.Reader
    family: Any  # how the direction is found: see rlhf_exp/probes/families.py
    # a set of templates in rlhf_exp/probes/wording/ or a YAML file; null: the data set's own
    templates: str | None = None
    template_names: list[str] | None = None  # which of the set; null: all
    examples: int | None = None  # labelled examples used, balanced by class; null: all
    binarize: bool = False  # of more than two answers keep the right one and a wrong one
    shots: int = 0  # solved examples in front of each statement
    selection_share: float = 0.2  # of the examples, to choose the layer on
    layer: int | None = None  # null: chosen by AUROC on the selection split
    # families beside the asked one, for the report
    compare: list[str] = field(default_factory=list)
    choose_family: bool = False  # let the selection split choose among those too
    # how an unsupervised direction is turned towards truth: platt, k_labels or none
    sign: str = "platt"
    sign_labels: int = 16  # examples for sign=k_labels
    score: str = "probability"  # probability: sigma(difference); logit: the difference itself
    standardise: bool = False  # by mean and spread over the selection split, to mix with others
    baseline: float = 0.0  # subtracted from every score
    format_rule: Any = None  # what becomes of malformed completions; after the baseline
    strip: bool = True  # drop trailing punctuation and space from completions first
    seed: int = 0  # draws the splits, the restarts of a family and the shots
    resample: bool = False  # fit on a bootstrap resample of the examples
    # other data sets by name, to see where the probe's direction still holds
    transfer: dict[str, Any] = field(default_factory=dict)
    fitted: str | None = None  # folder of a fitted probe, used as it is
    # folder of .npy states as collin-burns/discovering_latent_knowledge writes them, read in place
    # of a model, and which split of them
    hidden_states: str | None = None
    hidden_states_split: str = "test"

    def __post_init__(self) -> None:
        require(self.sign, ("platt", "k_labels", "none"), "reward.sign")
        require(self.score, ("probability", "logit"), "reward.score")
        for name in self.compare:
            pick(name, FAMILIES, "reward.compare")
        if not 0 < self.selection_share < 1:
            raise ValueError(
                f"reward.selection_share={self.selection_share} must be between 0 and 1"
            )
        for name, least in (("sign_labels", 1), ("shots", 0), ("examples", 4)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"reward.{name}={value} must be at least {least}")
        if taken := {OWN, "pooled"} & set(self.transfer):
            raise ValueError(
                f"reward.transfer.{min(taken)}: the report uses this name itself; choose another"
            )
        if self.fitted is not None and self.hidden_states is not None:
            raise ValueError("reward.fitted and reward.hidden_states exclude each other")
        self.folder: Path | None = None if self.fitted is None else Path(self.fitted).expanduser()
        self.cut = 0  # passages shortened while scoring

    # ---- what can be known beforehand

    def check(self, fitting: Fitting) -> None:
        if self.model.path is not None:
            weights.locate(self.model.path, self.model.package)
        if self.model.share and fitting.trained.lora is None:
            raise ValueError(
                "reward.model.share=true reads the policy with its adapters off: give policy.lora, "
                "or set reward.model.share=false"
            )
        if self.model.share and fitting.trained.quantization is not None:
            raise ValueError(
                "reward.model.share=true reads quantized weights with policy.quantization="
                f"{fitting.trained.quantization}, and a probe is fitted on the plain ones: set "
                "reward.model.share=false"
            )
        if self.model.path is None and fitting.trained.adapter and not fitting.trained.sft:
            raise ValueError(
                "reward.model.path=null reads the start policy, and policy.adapter is merged into "
                "that only in memory: give reward.model.path, or merge the adapter first"
            )
        if self.fitted is not None:
            self._compare(fitting.data())
        elif self.hidden_states is not None:
            self._npy()
        else:
            self._check_examples(fitting.data())
        if fitting.scoring:
            self._fill_rule(fitting.data())

    def _check_examples(self, data: Dataset) -> None:
        """Build every pair once, and count templates: transfer compares like with like."""
        others = {name: other.load() for name, other in self.transfer.items()}
        counts = {}
        for name, given in ({OWN: data} | others).items():
            (pairs, _), _ = self._pairs(given)
            counts[name] = len(pairs[0])
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"the data sets of reward.transfer differ in their number of templates ({said}): "
                "give reward.templates, or as many of each by reward.template_names"
            )

    def _fill_rule(self, data: Dataset) -> None:
        if self.format_rule is not None:
            self.format_rule.fill(sorted(set(data.answers.values())))

    def _pairs(self, data: Dataset) -> list[tuple[list[list[Contrast]], list[int]]]:
        """Contrast pairs and labels to fit on, and to report on."""
        if not data.statements or not data.held_out_statements:
            raise ValueError(
                "reward=probe needs statements whose truth is known and the data set has none: use "
                "data=facts or data=qnli, or give data.statements"
            )
        words, found = self._templates(data), []
        for rows in (data.statements, data.held_out_statements):
            rows = rows if self.examples is None else balanced(rows, self.examples)
            pairs, labels = self._contrasts(rows, words, data)
            if len(set(labels)) < 2:
                raise ValueError(
                    f"all {len(labels)} statements have the label {labels[0]}: a probe needs both"
                )
            found.append((pairs, labels))
        return found

    def _contrasts(
        self, rows: list[Statement], words: list[Template], data: Dataset
    ) -> tuple[list[list[Contrast]], list[int]]:
        return contrasts(
            rows,
            words,
            binarize=self.binarize,
            shots=self.shots,
            shot_statements=data.statements,
            seed=self.seed,
        )

    def _templates(self, data: Dataset) -> list[Template]:
        source = self.templates or data.templates
        if source is None:
            raise ValueError(
                "this data set names no templates: give reward.templates, for example truthful"
            )
        return read_templates(source, self.template_names)

    def _compare(self, data: Dataset) -> None:
        """Refuse a fitted probe that reads other words, another layer or other states than asked
        for; other weights are refused on loading.
        """
        assert self.folder is not None
        if not (self.folder / RECORD).is_file():
            raise FileNotFoundError(
                f"reward.fitted={self.fitted} is not a fitted probe: give the folder of one, "
                "artifacts/reward/probe-..."
            )
        record = self._record()
        if record["model"] is None:
            raise ValueError(
                f"reward.fitted={self.fitted} was fitted on stored states, so there is no model to "
                "score text with: fit a probe on a model"
            )
        for key in SEEN:
            if record["model"][key] != getattr(self.model, key):
                raise ValueError(
                    f"reward.fitted={self.fitted} was fitted with model.{key}="
                    f"{record['model'][key]}, not {getattr(self.model, key)}: set "
                    f"reward.model.{key}={record['model'][key]}, or fit again"
                )
        for key in ("shots", "score"):
            if record[key] != getattr(self, key):
                raise ValueError(
                    f"reward.fitted={self.fitted} was fitted with reward.{key}={record[key]}, not "
                    f"{getattr(self, key)}: set reward.{key}={record[key]}, or fit again"
                )
        if self.layer not in (None, record["layer"]):
            raise ValueError(
                f"reward.fitted={self.fitted} reads layer {record['layer']}, not {self.layer}: set "
                "reward.layer=null, or fit again"
            )
        if record["templates"] != _plain([asdict(t) for t in self._templates(data)]):
            names = ", ".join(t["name"] for t in record["templates"])
            raise ValueError(
                f"reward.fitted={self.fitted} was fitted under other templates ({names}): give "
                "those by reward.templates and reward.template_names, or fit again"
            )

    def _record(self) -> dict[str, Any]:
        assert self.folder is not None
        verify(self.folder)
        return json.loads((self.folder / RECORD).read_text())

    # ---- fitting

    def fit(self, fitting: Fitting) -> None:
        """Read the states, fit, choose and report; the states and the probe are artifacts."""
        self.data, self.trained = fitting.data(), fitting.trained
        if fitting.scoring:
            self._fill_rule(self.data)
        if self.hidden_states is not None:
            self.folder = self._fit_stored(fitting)
            return
        if self.model.share:
            self.model.dtype = fitting.trained.dtype
        self.source = (
            fitting.policy()
            if self.model.path is None
            else weights.loadable(
                weights.locate(self.model.path, self.model.package), fitting.store
            )
        )
        if self.fitted is not None:
            return
        own = self._read(self.data, fitting)
        others = {k: self._read(data.load(), fitting) for k, data in self.transfer.items()}
        spec = {"states": [p.name for p in own]}
        spec |= {"transfer": {k: [p.name for p in paths] for k, paths in others.items()}}

        def make(folder: Path) -> None:
            train, report = map(States.load, own)
            sets = {k: (States.load(a), States.load(b)) for k, (a, b) in others.items()}
            record = {
                "model": {k: getattr(self.model, k) for k in SEEN} | {"source": str(self.source)},
                "weights": train.about["weights"],
                "templates": [asdict(t) for t in self._templates(self.data)],
            }
            self._make(folder, train, report, sets, record)

        self.folder = self._stored(spec, make, fitting)

    def _stored(self, spec: dict[str, Any], make: Callable[[Path], None], fitting: Fitting) -> Path:
        mine = asdict(self)
        spec |= {k: mine[k] for k in FITTED} | {"version": __version__}
        spec |= {"kind": type(self.family).__name__}
        folder = fitting.store.get("reward", "probe", spec, make)
        report = json.loads((folder / "report.json").read_text())
        logger.info("%s\nreport: %s", as_text(report), folder / "report.md")
        return folder

    def _fit_stored(self, fitting: Fitting) -> Path:
        """States from .npy files: the first half to fit and choose on, the second to report."""
        found = self._npy()
        half = torch.arange(len(found.labels)).chunk(2)
        record = {"model": None, "weights": None, "templates": []}
        return self._stored(
            {"states": weights.file_states(Path(str(self.hidden_states)).expanduser())},
            lambda to: self._make(to, found.rows(half[0]), found.rows(half[1]), {}, record),
            fitting,
        )

    def _npy(self) -> States:
        return read_npy(str(self.hidden_states), self.hidden_states_split)

    def _read(self, data: Dataset, fitting: Fitting) -> list[Path]:
        """The states of the data set's training and held-out statements, as artifacts."""
        paths = []
        for pairs, labels in self._pairs(data):
            texts = [[c.texts() for c in row] for row in pairs]
            spec = {
                "version": __version__,
                "source": weights.source_identity(self.source),
                "reader": {k: getattr(self.model, k) for k in (*SEEN, "layers", "store")},
                "statements": fingerprint([texts, labels]),
            }

            def make(folder: Path, pairs: Any = pairs, labels: list[int] = labels) -> None:
                self.model.open(self.source, fitting.device)
                self.model.states_of(pairs, labels).save(folder)

            paths.append(fitting.store.get("states", "contrasts", spec, make))
        return paths

    def _make(
        self,
        folder: Path,
        given: States,
        report: States,
        others: dict[str, tuple[States, States]],
        record: dict[str, Any],
    ) -> None:
        train, selection = probes.split(
            given, self.selection_share, seed=self.seed, resample=self.resample
        )
        study = probes.Study(
            families=probes.families(self.family, self.compare),
            layer=self.layer,
            choose_family=self.choose_family,
            sign=probes.Sign(how=self.sign, k=self.sign_labels),
            seed=self.seed,
        )
        chosen, found = study.run(train, selection, report)
        if others:
            found["transfer"] = study.transfer(chosen, {OWN: (train, report)} | others)
        found["data"] = {
            "train": len(train.labels),
            "selection": len(selection.labels),
            "report": len(report.labels),
            "templates": [t["name"] for t in record["templates"]],
            "cut": given.about.get("cut", 0) + report.about.get("cut", 0),
        }
        chosen.save(folder)
        scores = self._scores(chosen(selection.hidden[chosen.layer]))
        record |= {"layer": chosen.layer, "lowest": float(scores.min())}
        record |= {"mean": float(scores.mean()), "std": float(scores.std(correction=0))}
        record |= {"shots": self.shots, "score": self.score, "seed": self.seed}
        write_json(folder / RECORD, record)
        write(folder, found)

    # ---- scoring

    def load(self, device: str | torch.device) -> None:
        if self.folder is None:
            raise ValueError("this probe has not been fitted: run the stage reward first")
        if self.binarize:
            raise ValueError(
                "reward.binarize=true compares the right answer with a wrong one, and of a "
                "completion neither is known: score with templates of two answers"
            )
        record = self._record()
        if record["model"] is None:
            raise ValueError(
                "this probe was fitted on stored states (reward.hidden_states), so there is no "
                "model to score text with: fit it on a model"
            )
        self.probe = probes.Fitted.load(self.folder)
        self.words = self._templates(self.data)
        self.mean, self.std = (record["mean"], record["std"]) if self.standardise else (0.0, 1.0)
        if not self.std > 0:
            raise ValueError(
                "the probe gives all examples of the selection split one score, which cannot be "
                "standardised: it has learnt nothing"
            )
        lowest = (record["lowest"] - self.mean) / self.std - self.baseline
        if self.format_rule is not None and self.format_rule.otherwise >= lowest:
            logger.warning(
                "malformed completions score %.2f and well-formed ones as little as %.2f, so "
                "malformed ones can pay: lower reward.format_rule.otherwise",
                self.format_rule.otherwise,
                lowest,
            )
        self.model.open(self.source, device, self.trained.model if self.model.share else None)
        if adapters.fingerprint(self.model.model) != record["weights"]:
            raise ValueError(
                f"the probe at {self.folder} was fitted on {record['model']['source']} and the "
                f"weights at {self.source} are others: give that model, or fit again"
            )

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        told = [postprocess(c) if self.strip else c for c in completions]
        rows = [
            Statement({"prompt": p, "completion": c}, 0) for p, c in zip(prompts, told, strict=True)
        ]
        pairs, _ = self._contrasts(rows, self.words, self.data)
        hidden, _, cut = self.model.read(pairs, [self.probe.layer])
        if cut and not self.cut:
            logger.warning("passages cut to model.max_length while scoring: %d of this batch", cut)
        self.cut += cut
        scores = self._scores(self.probe(hidden[self.probe.layer]))
        scores = (scores - self.mean) / self.std - self.baseline
        return scores if self.format_rule is None else self.format_rule(scores, completions)

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """`valid`: 1 for the completions that the format rule lets keep their score."""
        if self.format_rule is None:
            return {}
        return {"valid": self.format_rule.valid(completions).float()}

    def _scores(self, logits: Tensor) -> Tensor:
        """[n, v, 2] -> [n]: templates averaged, then wrong from right."""
        apart = logits.mean(1)[:, 1] - logits.mean(1)[:, 0]
        return apart.sigmoid() if self.score == "probability" else apart


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))
