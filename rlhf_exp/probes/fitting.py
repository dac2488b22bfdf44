"""From hidden states to a fitted probe and its report.

Three splits, by example: probes are fitted on the first, the layer (and, if asked, the family) is
chosen on the second, and what is reported comes from the third.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.artifacts import write_json
from rlhf_exp.probes import head, metrics, normalise
from rlhf_exp.probes.families import FAMILIES
from rlhf_exp.probes.head import Family, Head, statements
from rlhf_exp.probes.logistic import SEPARABLE, fit_logistic
from rlhf_exp.probes.normalise import Normaliser
from rlhf_exp.probes.states import States

logger = logging.getLogger(__name__)

FILE = "probe.safetensors"
RESAMPLES = 1000  # bootstrap resamples behind an interval


@dataclass
class Fitted:
    """Statement logits scale * head(normaliser(x)) + bias of the states of one layer."""

    family: str
    layer: int
    normaliser: Normaliser
    head: Head
    scale: float = 1.0
    bias: float = 0.0
    sign: str = ""  # how the direction came to point towards truth, in words

    def __call__(self, x: Tensor) -> Tensor:
        """[n, v, 2, d] -> [n, v, 2], in float32; the normaliser is applied here and only here."""
        return self.scale * self.head(self.normaliser(x.float())) + self.bias

    def save(self, folder: Path) -> None:
        """Tensors as safetensors, the rest as JSON."""
        from safetensors.torch import save_file

        named = {f"head.{k}": v.contiguous() for k, v in self.head.tensors().items()}
        named |= {f"normaliser.{k}": v.contiguous() for k, v in self.normaliser.tensors().items()}
        save_file(named, folder / FILE)
        about = {k: getattr(self, k) for k in ("family", "layer", "scale", "bias", "sign")}
        about |= {"activation": self.head.activation, "layer_norm": self.head.layer_norm}
        write_json(folder / "probe.json", about)

    @staticmethod
    def load(folder: Path) -> "Fitted":
        """What `save` wrote."""
        from safetensors.torch import load_file

        about = json.loads((folder / "probe.json").read_text())
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "normaliser": {}}
        for name, tensor in load_file(folder / FILE).items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        restored = head.restore(parts["head"], about.pop("activation"), about.pop("layer_norm"))
        return Fitted(normaliser=Normaliser(**parts["normaliser"]), head=restored, **about)


@dataclass(kw_only=True)
class Sign:
    """How an unsupervised direction is turned towards truth. `platt`: the scale and bias that fit
    the labels of the training statements best, a negative scale turning the direction; `k_labels`:
    the turn that is right on most of `k` training examples; `none`: as it was found.
    """

    how: str = "platt"
    k: int = 16

    def resolve(
        self, family: Family, logits: Tensor, labels: Tensor, seed: int
    ) -> tuple[float, float, str]:
        """Scale, bias and the words for it, from training logits [n, v, 2] and labels [n].

        Supervised families need no turn; those whose logits are not log-odds are scaled by Platt.
        """
        if family.supervised and family.log_odds:
            return 1.0, 0.0, f"by the fit itself, on {len(labels)} labelled examples"
        if family.supervised or self.how == "platt":
            rows, truth = statements(logits[..., None], labels)
            scale, bias = metrics.platt(rows[:, 0], truth)
            turned = ", which turned it round" if scale < 0 else ""
            return scale, bias, f"by Platt scaling on {len(labels)} labelled examples{turned}"
        if self.how == "none":
            return 1.0, 0.0, "not set: this direction may point either way"
        picked = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        picked = picked[: self.k]
        apart = (logits[picked, :, 1] - logits[picked, :, 0]).mean(1)
        right = float(((apart > 0).long() == labels[picked]).float().mean())
        turned = ", which turned it round" if right < 0.5 else ""
        words = f"by the labels of {len(picked)} examples{turned}"
        return (1.0 if right >= 0.5 else -1.0), 0.0, words


def fit_probe(
    name: str, family: Family, states: States, layer: int, sign: Sign, seed: int
) -> Fitted:
    """One family on one layer of training states."""
    x = states.hidden[layer].float()
    normaliser = normalise.fit(x, family.normalise)
    found = family.fit(normaliser(x), states.labels, seed)
    fitted = Fitted(name, layer, normaliser, found)
    fitted.scale, fitted.bias, fitted.sign = sign.resolve(family, fitted(x), states.labels, seed)
    return fitted


def answer_auroc(fitted: Fitted, states: States) -> float:
    """AUROC of the logit differences, each template by itself."""
    logits = fitted(states.hidden[fitted.layer])
    scores = (logits[..., 1] - logits[..., 0]).flatten()
    return metrics.auroc(scores, states.labels.repeat_interleave(logits.shape[1]))


def separability(normaliser: Normaliser, train: Tensor, held: Tensor) -> float:
    """AUROC with which a linear model tells answer 1 from answer 0 in held-out states; 0.5 means
    the normalised states no longer say which answer they end in.
    """

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        y = normaliser(x.float())
        return y.flatten(0, 2), torch.arange(2).repeat(len(x) * x.shape[1]).to(y)

    x, y = rows(train)
    scale = x.std(0, correction=0).clamp(min=1e-6)
    theta = fit_logistic(x / scale, y, l2=0.01, iterations=50, tolerance=1e-4)
    x, y = rows(held)
    return metrics.auroc(x / scale @ theta[:-1], y)


def split(
    given: States, selection_share: float, *, seed: int, resample: bool = False
) -> tuple[States, States]:
    """Training and selection examples, both with both labels; examples of one prompt stay together.
    `resample` draws the training examples again, with replacement.
    """
    n = len(given.labels)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor(given.about.get("groups", range(n)))
    rank = torch.randperm(int(groups.max()) + 1, generator=generator)[groups]
    held = rank < max(1, round(selection_share * len(groups.unique())))
    train, selection = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    if resample:
        train = train[torch.randint(len(train), (len(train),), generator=generator)]
    for name, index in (("train", train), ("selection", selection)):
        if len(set(given.labels[index].tolist())) < 2:
            raise ValueError(
                f"the {name} split of {n} examples holds one class only: give more examples, or "
                "another reward.selection_share"
            )
    return given.rows(train), given.rows(selection)


@dataclass(kw_only=True)
class Study:
    """Which probes are fitted, and how one is chosen."""

    families: dict[str, Family]  # the first is the one asked for
    layer: int | None  # null: chosen by the selection split
    choose_family: bool
    sign: Sign
    seed: int

    def run(self, train: States, selection: States, report: States) -> tuple[Fitted, dict]:
        """The chosen probe, and the report as plain values (see report/probes.py)."""
        layers = list(train.hidden) if self.layer is None else [self.layer]
        if odd := set(layers) - set(train.hidden):
            raise ValueError(
                f"reward.layer={min(odd)} was not read, only {', '.join(map(str, train.hidden))}: "
                "choose one of them, or give reward.model.layers"
            )
        fits: dict[tuple[str, int], Fitted] = {}
        for name, family in self.families.items():
            for layer in layers:
                fits[name, layer] = fit_probe(name, family, train, layer, self.sign, self.seed)
        worth = {key: answer_auroc(fitted, selection) for key, fitted in fits.items()}
        asked = next(iter(self.families))
        candidates = [k for k in fits if self.choose_family or k[0] == asked]
        chosen = fits[max(candidates, key=lambda k: (worth[k], k[1]))]  # ties: the last layer
        best = {name: max(layers, key=lambda n: (worth[name, n], n)) for name in self.families}
        rows = []
        for (name, layer), fitted in fits.items():
            shown = name == chosen.family or layer == best[name]  # with an interval
            for split, states, resamples in (
                ("train", train, 0),
                ("selection", selection, 0),
                ("report", report, RESAMPLES if shown else 0),
            ):
                logits = fitted(states.hidden[layer])
                rows += _rows(split, name, layer, logits, states, resamples)
        zero_shot = None
        if report.lm is not None:
            found = _rows("report", "LM zero-shot", None, report.lm, report, RESAMPLES)
            zero_shot = next(row for row in found if row["ensembling"] == "partial")
        normalisers = {layer: fits[chosen.family, layer].normaliser for layer in layers}
        return chosen, {
            "chosen": {
                "probe": chosen.family,
                "layer": chosen.layer,
                "sign": chosen.sign,
                "selected_by": "AUROC on the selection split, ties to the last layer",
                "selection_auroc": worth[chosen.family, chosen.layer],
            },
            "rows": rows,
            "separability": {
                str(layer): separability(n, train.hidden[layer], selection.hidden[layer])
                for layer, n in normalisers.items()
            },
            "zero_shot": zero_shot,
            "transfer": None,
            "notes": self._notes(fits.values(), best),
        }

    def transfer(self, chosen: Fitted, sets: dict[str, tuple[States, States]]) -> dict[str, Any]:
        """AUROC of the chosen family and layer fitted on the training states of each data set (and
        on all of them pooled), on the held-out states of each. All have as many templates.
        """
        trained = {title: train for title, (train, _) in sets.items()}
        hidden = torch.cat([x.hidden[chosen.layer] for x in trained.values()])
        labels = torch.cat([x.labels for x in trained.values()])
        trained["pooled"] = States({chosen.layer: hidden}, labels)
        family = self.families[chosen.family]
        table = []
        for train in trained.values():
            fitted = fit_probe(chosen.family, family, train, chosen.layer, self.sign, self.seed)
            table.append([answer_auroc(fitted, held) for _, held in sets.values()])
        return {"names": list(sets), "trained_on": list(trained), "auroc": table}

    def _notes(self, fits: Iterable[Fitted], best: dict[str, int]) -> list[str]:
        """What fits noted at each family's best layer, and separable classes at any."""
        notes = []
        for fitted in fits:
            for note in fitted.head.notes:
                where = f"{fitted.family}, layer {fitted.layer}: {note}"
                if note == SEPARABLE:
                    logger.warning("probe %s", where)
                if note == SEPARABLE or fitted.layer == best[fitted.family]:
                    notes.append(where)
        return notes


def _rows(
    split: str, name: str, layer: int | None, logits: Tensor, states: States, resamples: int
) -> list[dict[str, Any]]:
    found = metrics.evaluate(logits, states.labels, resamples=resamples)
    return [
        {"split": split, "probe": name, "layer": layer, "ensembling": mode, "n": len(states.labels)}
        | {metric: asdict(interval) for metric, interval in values.items()}
        for mode, values in found.items()
    ]


def families(asked: Family, compare: list[str]) -> dict[str, Family]:
    """The family asked for, under its name, and others with their defaults."""
    own = next((n for n, kind in FAMILIES.items() if isinstance(asked, kind)), type(asked).__name__)
    return {own: asked} | {n: FAMILIES[n]() for n in compare if n != own}
