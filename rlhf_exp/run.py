"""The stages of a run, in order.

A finished artifact is reused, so the second command on a machine starts at `align`. A stage seeds
itself: what it makes does not depend on whether the stages before it were made or found.
"""

import gc
import json
import logging
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import __version__, frozen, precision, processes
from rlhf_exp.artifacts import write_directory, write_json
from rlhf_exp.config import build
from rlhf_exp.evaluation.scoring import Evaluator, settle
from rlhf_exp.evaluation.summary import summary
from rlhf_exp.hardware.engine import whole
from rlhf_exp.parts import NO_POLICY, Parts
from rlhf_exp.policy import Policy
from rlhf_exp.reference import Reference
from rlhf_exp.report.text import as_table, model_card
from rlhf_exp.tracking import Log, NoTracker
from rlhf_exp.trial import Look, Looked, Trial, seed_everything

logger = logging.getLogger(__name__)

ALONE = ("prepare", "generate", "merge", "evaluate", "export")  # done by the main process


class Stages(Parts):
    """A method for each stage."""

    def look(self, harness: Any) -> None:
        """Evaluate the run as it stands, whatever has become of it: its newest checkpoint, if it
        was not, what the gold has not judged, and the benchmarks of the node `harness`.
        """
        self.evaluation.harness = build(harness, "evaluation.harness") if harness else None
        if not self.directory.joinpath("policy").exists():
            if not self.algo.trains:
                raise ValueError(
                    f"{self.directory} was interrupted, and its algorithm trains nothing: continue "
                    f"it with resume={self.directory}"
                )
            self.checkpoints.open(self.directory)
            if self.checkpoints.latest() is None:
                raise ValueError(
                    f"{self.directory} has no checkpoint to evaluate: continue it with resume="
                    f"{self.directory}"
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
        decided |= self._sampling_spec(self.start) | {"prefix": self.policy.prefix}
        self.generations.generate(
            self.policy, self.data, self.reward, self.gold, decided, self.directory
        )

    def run_merge(self) -> None:
        self.generations.merge(self.directory)

    def run_critique(self) -> None:
        logger.info("revisions: %s", self.revisions)

    def run_sft(self) -> None:
        logger.info("start policy: %s", self.start)

    def run_preferences(self) -> None:
        idle = self.fits_later or not self.reward.learns_from_pairs
        if "reward" in self.config["stages"] and idle and not self.gold.learns_from_pairs:
            why = (
                "algo asks for pairs itself" if self.fits_later else "this reward learns from none"
            )
            logger.info("skipped: %s", why)
            return
        logger.info("preference pairs: %s", self.pairs)

    def run_reward(self) -> None:
        self.gold.fit(self.fitting)
        if self.fits_later:
            logger.info("skipped: the reward is fitted while the policy improves")
        else:
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
        if not self.fits_later:
            self.reward.load(self.device)
        gold = self.gold if self.evaluation.gold == "during" else None
        if gold is not None:
            gold.load(self.device)
        tracker = self.tracker if kind is Trial else NoTracker()  # a look is no run of its own
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
            log=Log(self.directory, tracker, show_every=self.config["show_every"]),
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
            labeller=self.loaded_labeller,
            fitting=self.fitting,
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
        if labels := self._labels():
            table["labels"] = labels
        if benchmarks := self._benchmarks():
            table["benchmarks"] = benchmarks
        write_json(self.directory / "summary.json", table)
        print(as_table(table))
        if benchmarks:
            print(self.evaluation.harness.as_text(**benchmarks))

    def _labels(self) -> dict[str, float]:
        """What is known of the labels that the run asked for, or of those of its pairs."""
        pairs = [Path(p) for p in self.store.used if Path(p).parent.name == "preferences"]
        for folder in (self.directory, *pairs):
            if (folder / "labels.json").exists():
                return json.loads((folder / "labels.json").read_text())
        return self.labeller.report() if self.asks_labeller else {}

    def _benchmarks(self) -> dict[str, Any] | None:
        """Of the start policy, made once, and of the one that this run has trained, with the prefix
        that it was saved with; None if none are asked for, or nothing was saved yet.
        """
        harness, trained = self.evaluation.harness, self.directory / "policy"
        if harness is not None and not trained.exists():
            logger.warning("no benchmarks: the run has saved no policy yet, as it is not finished")
        if harness is None or not trained.exists():
            return None
        self._make_room()
        before = None
        if harness.start:
            spec = {"version": __version__, "harness": harness.identity()} | self._sampling_spec(
                self.start
            )

            def make(folder: Path) -> None:
                prefix = self.config["policy"]["prefix"]
                write_json(folder / "results.json", self._measured(self.start, prefix))

            made = self.store.get("benchmark", "start", spec, make)
            before = json.loads((made / "results.json").read_text())
        return {"before": before, "after": self._measured(trained)}

    def _measured(
        self, source: Path | str, prefix: str | None = None
    ) -> dict[str, dict[str, float]]:
        """Benchmarks of a policy as it was saved, unless another `prefix` is given."""
        policy: Policy = build(self.config["policy"] | {"prefix": prefix}, "policy")
        policy.precision = precision.Autocast(self.hardware.mixed_precision, self.hardware.kind)
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
