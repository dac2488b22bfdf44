"""The search: ask the study for points, have the launcher run them, tell the study what came out.

It sees runs through their directories and Hydra's JobReturns only, so any launcher will do. A run
that fails is a failed trial, and the search goes on.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from optuna import Study, Trial
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from rlhf_exp.config import build, check, resolved
from rlhf_exp.objective import Objective
from rlhf_exp.pruning import gave_up, reported
from rlhf_exp.runs import config_fingerprint
from rlhf_exp.search import report
from rlhf_exp.search.median import MedianStopping
from rlhf_exp.search.settings import Settings
from rlhf_exp.search.space import as_override, grid, split
from rlhf_exp.search.study import JOB, WHY, Space, complete, concluded, next_job, open_study, queue
from rlhf_exp.search.sweep_file import SweepFile, read
from rlhf_exp.worker import sentence

logger = logging.getLogger(__name__)

Parse = Callable[[list[str]], list[Override]]
Compose = Callable[[list[str]], DictConfig]


@dataclass(kw_only=True)
class Search:
    """One search, in the sweep's `directory`."""

    settings: Settings
    parse: Parse  # Hydra's override parser
    compose: Compose  # a job's config, from its overrides
    launch: Callable[..., Sequence[JobReturn]]  # (overrides of each job, initial_job_idx=)
    directory: Path

    def run(self, arguments: list[str]) -> list[JobReturn]:
        """Try `n_trials` points of the space that settings and `arguments` describe; the JobReturns
        of this attempt. ValueError before the first if something is wrong, or if all failed.
        """
        study, total = self._prepare(arguments)
        returns: list[JobReturn] = []
        while (left := total - len(concluded(study))) > 0:
            returns += self._batch(study, min(self.settings.n_jobs, left))
            report.write(study, self.objective.names, self.directory)
        report.write(study, self.objective.names, self.directory)
        if not complete(study):
            raise ValueError(f"no run of the search came to its end: {_reason(study)}")
        report.draw(study, self.objective.names, self.directory)
        print(report.table(study, self.objective.names))
        return returns

    # ---- before the first trial

    def _prepare(self, arguments: list[str]) -> tuple[Study, int]:
        """The study and how many trials it is to have, everything checked."""
        file = read(Path(self.settings.file)) if self.settings.file else SweepFile(sampler="tpe")
        self.fixed, self.space = self._space(file, arguments)
        config = self._checked()
        node = config["objective"]
        self.objective: Objective = build(node, "objective")
        if file.goal not in (None, self.objective.directions[0]):
            raise ValueError(
                f"{self.settings.file}: metric.goal={file.goal}, but this objective is to "
                f"{self.objective.directions[0]}: change it, or add objective.direction={file.goal}"
            )
        self.median = self.settings.pruning
        if self.median is None and file.pruning is not None:
            self.median = MedianStopping(**file.pruning)
        self._check_pruning(config)
        sampler = self.settings.sampler or file.sampler
        points = grid(self.space) if sampler == "grid" else []
        total = min(self.settings.n_trials, len(points) or self.settings.n_trials)
        self.settings.check_sampler(sampler, self.objective.directions, self.space)
        study = open_study(
            storage=self.settings.storage,
            name=self.settings.study_name or file.name or "search",
            directions=self.objective.directions,
            objective=node,
            space=self.space,
            fixed=self._fixed(config),
        )
        study.sampler = self.settings.build_sampler(sampler, len(concluded(study)))
        queue(study, points)
        return study, total

    def _space(self, file: SweepFile, arguments: list[str]) -> tuple[list[str], Space]:
        """Overrides that stay and the space, of the file, then `params`, then the command line."""
        lines = file.fixed + ([f"objective={file.objective}"] if file.objective else [])
        lines += [f"{key}={value}" for key, value in (self.settings.params or {}).items()]
        overrides = self.parse(lines + arguments)
        given = {o.get_key_element().lstrip("+") for o in overrides}
        fixed, space = split(overrides)
        space = {k: d for k, d in file.space.items() if k not in given} | space
        if not space:
            raise ValueError(
                "the search space is empty: add a range, such as algo.lr='tag(log,interval(1e-5,"
                "1e-3))', or hydra.sweeper.file=<sweep file>"
            )
        for key in space:
            if key.split(".")[0] in ("objective", "pruning", "stages"):
                raise ValueError(f"{key} cannot be searched: every trial must have the same")
        return fixed, space

    def _checked(self) -> dict[str, Any]:
        """The config of the space's first point, checked, as is that of every word in the space."""
        first = {
            key: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low  # type: ignore[attr-defined]
            for key, d in self.space.items()
        }
        points = [first] + [
            first | {key: word}
            for key, d in self.space.items()
            if isinstance(d, CategoricalDistribution)
            for word in d.choices[1:]
            if isinstance(word, str)
        ]
        configs = [
            self.compose(self.fixed + [as_override(k, v) for k, v in point.items()])
            for point in points
        ]
        for config in configs:
            check(config)
        plain = resolved(configs[0])
        if "evaluate" not in plain["stages"]:
            raise ValueError(
                f"stages={plain['stages']} ends without an objective: add evaluate to search"
            )
        return plain

    def _fixed(self, config: dict[str, Any]) -> str:
        """Names what is the same in all trials."""
        rest = OmegaConf.create(config)
        for key in self.space:
            OmegaConf.update(rest, key, None, merge=False)
        return config_fingerprint(OmegaConf.to_container(rest))  # type: ignore[arg-type]

    def _check_pruning(self, config: dict[str, Any]) -> None:
        if self.median is None:
            return
        if config["pruning"] is not None:
            raise ValueError(
                "pruning and hydra.sweeper.pruning exclude each other: leave one of them null"
            )
        if len(self.objective.directions) > 1 or self.objective.watched is None:
            raise ValueError(
                "hydra.sweeper.pruning needs an objective with one number that comes of a reward, "
                f"not {' and '.join(self.objective.names)}: set it to null, or choose "
                "objective=gold"
            )

    # ---- trials

    def _batch(self, study: Study, count: int) -> Sequence[JobReturn]:
        """Run `count` trials; if that is interrupted, none of them counts."""
        trials = [study.ask(self.space) for _ in range(count)]
        first = next_job(study)
        for number, trial in enumerate(trials, first):
            trial.set_user_attr(JOB, number)
        jobs = [
            self.fixed + [as_override(k, t.params[k]) for k in self.space] + self._bounds(study)
            for t in trials
        ]
        told = 0
        try:
            returns = self.launch(jobs, initial_job_idx=first)
            for told, (trial, found) in enumerate(zip(trials, returns, strict=True)):  # noqa: B007
                self._conclude(study, trial, found)
        except BaseException:
            for trial in trials[told:]:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        return returns

    def _bounds(self, study: Study) -> list[str]:
        """The override that tells a new run when to give up, once enough are finished."""
        if self.median is None:
            return []
        maximize = self.objective.directions == ("maximize",)
        runs = [t.intermediate_values for t in complete(study)]
        bounds = self.median.bounds(runs, maximize=maximize)
        if not bounds:
            return []
        inner = ",".join(f"{step}:{bound!r}" for step, bound in bounds.items())
        return [
            f"pruning={{metric:{self.objective.watched},maximize:{str(maximize).lower()},"
            f"bounds:{{{inner}}},from_step:{self.median.from_step}}}"
        ]

    def _conclude(self, study: Study, trial: Trial, found: JobReturn) -> None:
        """Tell the study how one run ended."""
        directory = _directory(found)
        trial.set_user_attr("directory", str(directory))
        if len(self.objective.directions) == 1 and self.objective.watched is not None:
            for step, value in reported(directory, self.objective.watched).items():
                trial.report(value, step)
        if gave_up(directory):
            study.tell(trial, state=TrialState.PRUNED)
            logger.info("trial %d gave up", trial.number)
            return
        values, why = self._values(found, directory)
        if why:
            trial.set_user_attr(WHY, why)
            study.tell(trial, state=TrialState.FAIL)
            logger.warning("trial %d failed: %s", trial.number, why)
            return
        study.tell(trial, values)
        logger.info("trial %d: %s", trial.number, ", ".join(f"{v:.4g}" for v in values))

    def _values(self, found: JobReturn, directory: Path) -> tuple[list[float], str]:
        """The objective's numbers, or why there are none."""
        if found.status != JobStatus.COMPLETED:
            told = directory / "failed.json"
            if told.exists():
                return [], json.loads(told.read_text())["error"]
            return [], sentence(found._return_value)
        value = found.return_value
        if value is None:
            return [], "it has no summary.json"
        values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
        if len(values) != len(self.objective.names):
            return [], f"its objective has {len(values)} numbers, not {len(self.objective.names)}"
        if not all(map(math.isfinite, values)):
            return [], f"its objective is {', '.join(map(str, values))}"
        return values, ""


def _directory(found: JobReturn) -> Path:
    """The run directory: what a launcher calls the working directory, or Hydra's output
    directory, if the job stayed where it was.
    """
    places = [Path(found.working_dir or ".")]
    if found.hydra_cfg is not None:
        places.append(Path(found.hydra_cfg.hydra.runtime.output_dir))
    return next((p for p in places if (p / "run.json").exists()), places[-1]).absolute()


def _reason(study: Study) -> str:
    """Why the last failed trial failed."""
    failed = [t for t in study.trials if WHY in t.user_attrs]
    if not failed:
        return "all gave up, so lower pruning.bounds"
    return f"trial {failed[-1].number} failed: {failed[-1].user_attrs[WHY]}"
