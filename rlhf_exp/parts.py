"""What the stages of a run work with: the objects that its config describes, and what one stage
hands to the next.

What a stage makes is an artifact, named by the fingerprint of everything that decides it, and found
again by whoever asks for the same.
"""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_exp import __version__, critique, precision, processes
from rlhf_exp.artifacts import Store
from rlhf_exp.choices import require
from rlhf_exp.config import build, last_hardware
from rlhf_exp.data.rows import Dataset
from rlhf_exp.export import Export
from rlhf_exp.hardware import Hardware
from rlhf_exp.policy import Policy
from rlhf_exp.pruning import Pruning
from rlhf_exp.rewards import Fitting
from rlhf_exp.samplers import Sampler
from rlhf_exp.samplers.local import Local
from rlhf_exp.trial import seed_everything

STAGES = (
    "prepare", "critique", "sft", "preferences", "reward", "generate", "merge", "align", "evaluate",
    "export", "compare",
)  # fmt: skip
NO_POLICY = {"prepare", "merge", "export", "compare"}  # need no policy of this config


class Parts:
    """Built, checked, and made when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.about: dict[str, Any] = json.loads((directory / "run.json").read_text())
        self.config = config = self.about["config"]
        for name in config["stages"]:
            require(name, STAGES, "stages")
        nodes = config | {"hardware": last_hardware(self.about)}
        built = {
            k: build(v, k) for k, v in nodes.items() if isinstance(v, dict) and "_target_" in v
        }
        self.policy: Policy = built["policy"]
        self.source, self.labeller, self.gold = (built[k] for k in ("data", "labeller", "gold"))
        self.reward: Any = built["reward"]
        self.algo: Any = built["algo"]
        self.sft_settings, self.tracker = built["sft"], built["tracker"]
        self.settings, self.evaluation, self.checkpoints = (
            built[k] for k in ("preferences", "evaluation", "checkpoints")
        )
        self.prepare, self.generations = built["prepare"], built["generations"]
        self.sampler: Sampler = built.get("sampler") or Local()  # older runs name none
        self.export: Export = built.get("export") or Export()
        self.critique: critique.Critique = built.get("critique") or critique.Critique()
        self.pruning = Pruning(**config["pruning"]) if config.get("pruning") else None
        if not 0 <= config["seed"] < 2**32:
            raise ValueError(f"seed={config['seed']} must be between 0 and 2**32 - 1")
        if config["show_every"] is not None and config["show_every"] < 1:
            raise ValueError(f"show_every={config['show_every']} must be at least 1")
        if "compare" in config["stages"] and config.get("against") is None:
            raise ValueError("stages=[..., compare] needs the run to compare with: add against=")
        self.store = Store(Path(config["artifacts"]).expanduser().absolute())
        self.data_spec = {"config": config["data"], "files": self.source.identity()}
        self.policy.identity()  # a path that leads nowhere ends the run here
        self.hardware: Hardware = built["hardware"]
        aligned = "align" in config["stages"] and self.algo.trains
        tuned = self.policy.sft and bool(set(config["stages"]) - NO_POLICY)
        trains = aligned or tuned
        precision.check(self.policy, self.hardware, trains=trains)
        self.device = self.hardware.place()
        self.asks_labeller = False  # until it does
        self.hardware.alone()  # until align
        self.fitting = Fitting(
            store=self.store,
            data=lambda: self.data,
            trained=self.policy,
            pairs=lambda: self.pairs,
            policy=lambda: self.start,
            samples=lambda: self._samples_of(self.start),
            device=self.device,
            scoring=bool({"generate", "align", "evaluate"} & set(config["stages"])),
        )
        if self.labeller.asks_gold and self.gold.learns_from_pairs:
            raise ValueError(
                f"the gold reward learns from pairs, and labeller={config['labeller']['_target_']} "
                "asks the gold for them: use labeller=dataset, or a gold that learns from none"
            )
        if "critique" in config["stages"]:
            critique.check_order(config["stages"])
            self.critique.check(self.policy)
        if {"preferences", "reward", "align"} & set(config["stages"]):
            self.labeller.check()
        if self.fits_later:
            self.algo.check_reward(self.reward, self.labeller)
        self.gold.check(self.fitting)
        self.reward.check(self.fitting)
        if "align" in config["stages"]:
            self.hardware.check_training(self.policy, self.algo)
            self._check_gold()

    def _check_gold(self) -> None:
        """Refuse settings that watch the gold while the policy trains, if it is asked later."""
        if self.evaluation.gold == "during":
            return
        watched = {"checkpoints.best": self.checkpoints.best}
        if self.pruning is not None:
            watched["pruning.metric"] = self.pruning.metric
        for key, metric in watched.items():
            if metric in ("reward/gold", "win/start"):
                raise ValueError(
                    f"{key}={metric} watches the gold while the policy trains, and "
                    "evaluation.gold=after asks it later: set evaluation.gold=during, or watch "
                    "reward/proxy"
                )

    @property
    def fits_later(self) -> bool:
        """Whether the reward is fitted while the policy improves, and not before."""
        return "align" in self.config["stages"] and getattr(self.algo, "fits_reward", False)

    # ---- what stages hand over

    @cached_property
    def data(self) -> Dataset:
        return self.source.load()

    @cached_property
    def base(self) -> Path | str:
        """Weights before any training of ours."""
        told = [d.completion for d in self.data.demonstrations]
        return self.policy.base(self.store, self.data.prompts + told)

    @cached_property
    def start(self) -> Path | str:
        """The start policy: fine-tuned, if the policy asks for it, on demonstrations or on what the
        stage critique made.
        """
        return self._tuned(self.revisions if "critique" in self.config["stages"] else None)

    def _tuned(self, revisions: Path | None = None) -> Path | str:
        """The base policy fine-tuned on the data's demonstrations, or on `revisions`."""
        if not self.policy.sft:
            return self.base
        policy = self.config["policy"]
        spec = {
            "version": __version__,
            "data": self.data_spec,
            "policy": self.policy.identity()
            | {k: policy[k] for k in ("lora", "train_top", "chat", "prefix")},
            "sft": self.config["sft"],
        }
        if revisions is not None:
            spec["critique"] = revisions.name

        def make(folder: Path) -> None:
            told = self.data.demonstrations if revisions is None else critique.read(revisions)
            self.policy.load(self.base, trainable=True, device=self.device)
            self.sft_settings.make(folder, replace(self.data, demonstrations=told), self.policy)

        return self.store.get("sft", "policy", spec, make)

    @cached_property
    def revisions(self) -> Path:
        """Answers that a critic has revised, and the demonstrations made of them."""
        source = self._tuned() if self.critique.answers == "start" else self.base
        spec = {"version": __version__, "data": self.data_spec, "gold": self.config["gold"]}
        spec |= {"critique": self.critique.identity(), **self._sampling_spec(source)}

        def make(folder: Path) -> None:
            gold = None
            if not self.gold.learns_from_pairs:  # which would be of the policy that is to come
                gold = self.gold
                of_source = {"policy": lambda: source, "samples": lambda: self._samples_of(source)}
                gold.fit(replace(self.fitting, **of_source))
                gold.load(self.device)
            self.policy.load(source, device=self.device)
            cache = self.store.root / "critique" / "replies.jsonl"
            self.critique.make(folder, self.data, self.policy, gold, cache)

        return self.store.get("critique", "revisions", spec, make)

    @cached_property
    def pairs(self) -> Path:
        """Preference pairs, labelled and made noisy."""
        sampled = self.labeller.source == "sampled"
        spec = {
            "version": __version__,
            "data": self.data_spec,
            "labeller": decided(self.config["labeller"], self.labeller.identity()),
            "gold": self.config["gold"] if sampled else None,
        }
        spec |= {"preferences": self.config["preferences"]}
        if sampled:
            spec |= self._sampling_spec(self.start)

        def make(folder: Path) -> None:
            gold = None
            if sampled and not self.gold.learns_from_pairs:
                gold = self.gold
                gold.fit(self.fitting)
                gold.load(self.device)
            self.policy.load(self.start, device=self.device)
            labeller = self.loaded_labeller()
            self.settings.make(
                folder, self.data, self.policy, labeller, None if labeller.asks_gold else gold
            )

        return self.store.get("preferences", "pairs", spec, make)

    def loaded_labeller(self) -> Any:
        """The labeller, ready to be asked."""
        self.asks_labeller = True
        self.labeller.open(self.directory)
        self.labeller.load(self.gold, self.device)
        return self.labeller

    def _sampling_spec(self, policy: Path | str) -> dict[str, Any]:
        """What decides the completions of `policy`, which is the start policy or the base."""
        sampling = (
            "temperature",
            "top_k",
            "top_p",
            "max_new_tokens",
            "min_new_tokens",
            "prefix",
            "chat",
            "dtype",
            "quantization",
        )
        start = policy.name if isinstance(policy, Path) else policy
        identity = self.policy.identity() if policy == self.base else None
        return {
            "start": start,
            "base": identity,
            "sampling": {k: self.config["policy"][k] for k in sampling},
        }

    def _samples_of(self, source: Path | str) -> list[tuple[str, str]]:
        """Held-out prompts with completions of the policy `source`, for score statistics."""

        def draw() -> list[tuple[str, str]]:
            self.policy.load(source, device=self.device)
            seed_everything(self.settings.seed)
            rollouts = self.policy.sample(self.data.held_out[:512])
            return list(zip(rollouts.prompts, rollouts.completions, strict=True))

        return processes.first(draw)


def decided(labeller: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the labels, from the settings of a labeller and its `identity`; one may hold
    another, as `noisy` does.
    """
    found = labeller | identity
    if "labeller" in identity:
        found["labeller"] = decided(labeller["labeller"], identity["labeller"])
    return found
