"""The stages of a run, in order, and what they hand over.

What a stage makes is an artifact, named by the fingerprint of everything that decides it. A
finished artifact is reused, so the second command on a machine starts at `align`. A stage seeds
itself: what it makes does not depend on whether the stages before it were made or found.
"""

import gc
import json
import logging
import platform
import subprocess
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import __version__, frozen, precision, processes
from rlhf_exp.artifacts import Store, write_directory, write_json
from rlhf_exp.choices import require
from rlhf_exp.config import build, last_hardware
from rlhf_exp.data.rows import Dataset
from rlhf_exp.evaluation.scoring import Evaluator, settle
from rlhf_exp.evaluation.summary import summary
from rlhf_exp.export import Export
from rlhf_exp.hardware import Hardware
from rlhf_exp.hardware.engine import whole
from rlhf_exp.policy import Policy
from rlhf_exp.pruning import Pruning
from rlhf_exp.reference import Reference
from rlhf_exp.report.text import as_table, model_card
from rlhf_exp.rewards import Fitting
from rlhf_exp.runs import config_fingerprint
from rlhf_exp.samplers import Sampler
from rlhf_exp.samplers.local import Local
from rlhf_exp.tracking import Log
from rlhf_exp.trial import Look, Looked, Trial, seed_everything

logger = logging.getLogger(__name__)

STAGES = (
    "prepare", "sft", "preferences", "reward", "generate", "merge", "align", "evaluate", "export",
    "compare",
)  # fmt: skip
NO_POLICY = {"prepare", "merge", "export", "compare"}  # need no policy of this config
ALONE = (
    "prepare",
    "generate",
    "merge",
    "evaluate",
    "export",
    "compare",
)  # done by the main process


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """What run.json says before the run has done anything."""
    return {
        "fingerprint": config_fingerprint(config),
        "seed": config["seed"],
        "config": config,
    } | _circumstances()


@cache
def _circumstances() -> dict[str, Any]:
    """Versions, revision and machine."""
    root = Path(__file__).parent.parent
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    revision = ""
    with suppress(OSError):  # no git here
        revision = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    packages = (
        "torch", "transformers", "trl", "peft", "accelerate", "datasets", "hydra-core", "omegaconf",
    )  # fmt: skip
    return {
        "versions": {"rlhf_exp": __version__, "python": platform.python_version()}
        | {p: metadata.version(p) for p in packages},
        "git": revision or None,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "gpus": torch.cuda.device_count(),
        },
    }


class Stages:
    """One run: the objects its config describes, and a method for each stage."""

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
        if self.about.get("harness"):  # asked for after the run
            self.evaluation.harness = build(self.about["harness"], "evaluation.harness")
        self.prepare, self.generations = built["prepare"], built["generations"]
        self.sampler: Sampler = built.get("sampler") or Local()  # older runs name none
        self.export: Export = built.get("export") or Export()
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
        self.hardware.alone()  # until align
        self.fitting = Fitting(
            store=self.store,
            data=lambda: self.data,
            trained=self.policy,
            pairs=lambda: self.pairs,
            policy=lambda: self.start,
            samples=self._start_samples,
            device=self.device,
            scoring=bool({"generate", "align", "evaluate"} & set(config["stages"])),
        )
        if self.labeller.source == "sampled" and self.gold.learns_from_pairs:
            raise ValueError(
                f"the gold reward learns from pairs, and labeller={config['labeller']['_target_']} "
                "asks the gold for them: use labeller=dataset, or a gold that learns from none"
            )
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

    def look(self) -> None:
        """Evaluate the run as it stands, whatever has become of it: its newest checkpoint, if it
        was not, and what the gold has not judged.
        """
        if not self.directory.joinpath("policy").exists():
            if not self.algo.trains:
                raise ValueError(
                    f"{self.directory} was interrupted, and its algorithm trains nothing: continue "
                    f"it with resume={self.directory}"
                )
            self.run_reward()
            with frozen.placed(self.hardware.frozen):
                self._align(Look)
        if self.evaluation.harness is not None:
            processes.first(self.evaluation.harness.check)
        processes.first(self.run_evaluate)

    def run(self) -> None:
        """Do the stages asked for."""
        stages = self.config["stages"]
        if "align" in stages:
            self.algo.check(self.policy, self.data)
        if "export" in stages:
            self.export.target(self.directory)
            if "align" not in stages:
                self.export.source(self.directory)
        if set(stages) - NO_POLICY:
            self.policy.check_prompts(self.data.prompts + self.data.held_out, self.base)
        if "align" in stages:
            self.sampler.check(self.policy, self.algo, self.data.prompts + self.data.held_out)
        if "evaluate" in stages and self.evaluation.harness is not None:
            processes.first(self.evaluation.harness.check)
        for name in stages:
            if name != "compare":  # which wants a finished run
                logger.info("stage %s", name)
                stage = getattr(self, f"run_{name}")
                processes.first(stage) if name in ALONE else stage()
        done = {
            "artifacts": self.store.used,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.directory / "run.json", self.about | done)
        if "compare" in stages:
            processes.first(self.run_compare)

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
        """The start policy: fine-tuned on demonstrations, if the policy asks for it."""
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

        def make(folder: Path) -> None:
            self.policy.load(self.base, trainable=True, device=self.device)
            self.sft_settings.make(folder, self.data, self.policy)

        return self.store.get("sft", "policy", spec, make)

    @cached_property
    def pairs(self) -> Path:
        """Preference pairs, labelled and made noisy."""
        gold = self.config["gold"] if self.labeller.source == "sampled" else None
        spec = {
            "version": __version__,
            "data": self.data_spec,
            "labeller": self.config["labeller"],
            "gold": gold,
        }
        spec |= {"preferences": self.config["preferences"]}
        if self.labeller.source == "sampled":
            spec |= self._sampling_spec()

        def make(folder: Path) -> None:
            self.gold.fit(self.fitting)
            self.policy.load(self.start, device=self.device)
            self.labeller.load(self.gold, self.device)
            self.settings.make(folder, self.data, self.policy, self.labeller)

        return self.store.get("preferences", "pairs", spec, make)

    def _sampling_spec(self) -> dict[str, Any]:
        """What decides the completions of the start policy."""
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
        start = self.start.name if isinstance(self.start, Path) else self.start
        identity = self.policy.identity() if not self.policy.sft else None
        return {
            "start": start,
            "base": identity,
            "sampling": {k: self.config["policy"][k] for k in sampling},
        }

    def _start_samples(self) -> list[tuple[str, str]]:
        """Held-out prompts with completions of the start policy, for score statistics."""
        start = self.start

        def draw() -> list[tuple[str, str]]:
            self.policy.load(start, device=self.device)
            seed_everything(self.settings.seed)
            rollouts = self.policy.sample(self.data.held_out[:512])
            return list(zip(rollouts.prompts, rollouts.completions, strict=True))

        return processes.first(draw)

    # ---- stages

    def run_prepare(self) -> None:
        self.prepare.write(self.data, self.data_spec, self.directory)

    def run_generate(self) -> None:
        decided: dict[str, Any] = {}
        if self.generations.scored:
            self._fit_rewards()
            self.reward.load(self.device)
            self.gold.load(self.device)
            fitted = [Path(p) for p in self.store.used]
            decided = {"reward": self.config["reward"], "gold": self.config["gold"]}
            decided["fitted"] = sorted(p.name for p in fitted if p.parent.name == "reward")
        self.policy.load(self.start, device=self.device)
        decided |= self._sampling_spec() | {"prefix": self.policy.prefix}
        self.generations.generate(
            self.policy, self.data, self.reward, self.gold, decided, self.directory
        )

    def run_merge(self) -> None:
        self.generations.merge(self.directory)

    def run_sft(self) -> None:
        logger.info("start policy: %s", self.start)

    def run_preferences(self) -> None:
        if "reward" in self.config["stages"] and not self.reward.learns_from_pairs:
            logger.info("skipped: this reward learns from no pairs")
            return
        logger.info("preference pairs: %s", self.pairs)

    def run_reward(self) -> None:
        self.gold.fit(self.fitting)
        self.reward.fit(self.fitting)

    def run_align(self) -> None:
        self._fit_rewards()
        if getattr(self.algo, "pairs", None) == "dataset":
            _ = self.pairs  # made before the group is, and by the policy's own model
        with frozen.placed(self.hardware.frozen):
            self._align()

    def _align(self, kind: type[Trial] = Trial) -> None:
        seed_everything(self.config["seed"])  # adapters and value heads are drawn from here on
        self.policy.load(self.start, trainable=True, device=self.device)
        self.sampler.open(self.directory)
        self.policy.sampler = self.sampler
        self.reward.load(self.device)
        gold = self.gold if self.evaluation.gold == "during" else None
        if gold is not None:
            gold.load(self.device)
        accelerator = self.hardware.accelerator()
        self.policy.whole = lambda: whole(accelerator)
        self.policy.precision = precision.Autocast(
            self.hardware.mixed_precision, self.hardware.kind
        )
        trial = kind(
            directory=self.directory,
            seed=self.config["seed"],
            accelerator=accelerator,
            reference=Reference(self.policy),
            log=Log(self.directory, self.tracker, show_every=self.config["show_every"]),
            checkpoints=self.checkpoints,
            evaluator=Evaluator(
                self.evaluation,
                self.data.held_out,
                self.reward,
                gold,
                self.directory,
                self.data.answers,
            ),
            pairs=lambda: self.pairs,
            labeller=self._loaded_labeller,
            pruning=self.pruning,
            mixed_precision=self.hardware.mixed_precision,
            peak_tflops=self.hardware.peak_tflops,
        )
        self.checkpoints.open(self.directory)
        with suppress(Looked):
            self._train(trial)
        self.hardware.release(accelerator)

    def _train(self, trial: Trial) -> None:
        """Let the algorithm do its work, and save what comes out."""
        trial.log.tracker.start(self.config, self.directory)
        with trial.listening():
            self.algo.run(self.policy, self.reward, self.data, trial)
        trial.log.tracker.finish()
        folder = self.directory / "policy"
        if not folder.exists():
            with self.policy.whole():
                write_directory(
                    folder,
                    lambda f: self.policy.save(f, self._model_card()),
                    {"run": self.about["fingerprint"]},
                )

    def _fit_rewards(self) -> None:
        """Find what the stage reward made, in this run or an earlier one."""
        if "reward" not in self.config["stages"]:
            self.run_reward()

    def _loaded_labeller(self) -> Any:
        self.labeller.load(self.gold, self.device)
        return self.labeller

    def _model_card(self) -> str:
        judged = (self.directory / "evaluation").exists()  # else the gold is asked later
        return model_card(self.about, summary(self.directory) if judged else None)

    def run_evaluate(self) -> None:
        self._settle()
        if not (self.directory / "evaluation").exists():
            raise ValueError(
                "there is nothing to evaluate yet: add align to stages, or name a run with run="
            )
        from rlhf_exp.report.figures import draw

        table = summary(self.directory) | {
            "seed": self.config["seed"],
            "fingerprint": self.about["fingerprint"],
        }
        if self.config.get("figures", True):
            draw(self.directory)
        if benchmarks := self._benchmarks():
            table["benchmarks"] = benchmarks
        write_json(self.directory / "summary.json", table)
        print(as_table(table))
        if benchmarks:
            print(self.evaluation.harness.as_text(**benchmarks))

    def _benchmarks(self) -> dict[str, Any] | None:
        """Of the start policy, made once, and of the one that this run has trained, with the prefix
        that it was saved with; None if none are asked for, or nothing was saved yet.
        """
        harness, trained = self.evaluation.harness, self.directory / "policy"
        if harness is None or not trained.exists():
            return None
        self._make_room()
        before = None
        if harness.start:
            spec = {"version": __version__, "harness": harness.identity()} | self._sampling_spec()

            def make(folder: Path) -> None:
                write_json(folder / "results.json", self._measured(self.start))

            made = self.store.get("benchmark", "start", spec, make)
            before = json.loads((made / "results.json").read_text())
        return {"before": before, "after": self._measured(trained)}

    def _measured(self, source: Path | str) -> dict[str, dict[str, float]]:
        """Benchmarks of a policy as it was saved."""
        policy: Policy = build(self.config["policy"], "policy")
        policy.load(source, device=self.device)
        return self.evaluation.harness.measure(policy)

    def _settle(self) -> None:
        """Have the gold judge what it has not seen; nothing else is in memory then."""

        @cache
        def gold() -> Any:
            logger.info("the gold judges what was evaluated")
            self._make_room()
            self.gold.fit(self.fitting)
            self.gold.load(self.device)
            return self.gold

        if hasattr(self.algo, "settle"):
            self.algo.settle(gold, self.policy, self.directory, self.data.answers)
        settle(self.directory, gold)

    def _make_room(self) -> None:
        """Let go of everything that training needed."""
        self.policy.model = self.algo = self.reward = None
        self.policy.whole = nullcontext
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def run_compare(self) -> None:
        """This run beside config's `against`."""
        from rlhf_exp.report import compare

        against = self.config.get("against")
        assert against is not None
        print(compare.as_text(found := compare.compare(self.directory, Path(against))))
        compare.write(self.directory, found)

    def run_export(self) -> None:
        self.policy.model = None  # makes room
        self.export.write(self.directory, self.device)
