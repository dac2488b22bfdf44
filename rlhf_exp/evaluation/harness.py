"""Benchmarks through lm-evaluation-harness 0.4 (github.com/EleutherAI/lm-evaluation-harness): its
own tasks, those in tasks/ beside this file, of which most need no network, and a user's.

Of a group (mmlu, qnli_prompts) the unweighted mean of its members is told, and how far apart they
are; the average over all that was asked for is plain, too, as in the Open LLM leaderboard.
Standard errors are those of means: sd / sqrt(n) over the examples. Members of a group that ask the
same examples are averaged by example first, others count as independent.

Left out: standard errors of metrics that are no means (perplexity, F1). The main process measures,
the others wait. lm_eval is imported inside the functions: it is optional and costs seconds.
"""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rlhf_exp.artifacts import file_hash
from rlhf_exp.choices import nearest
from rlhf_exp.data.local import read_rows
from rlhf_exp.evaluation.benchmark import Benchmark
from rlhf_exp.evaluation.benchmark_scores import (
    Results,
    average,
    headline,
    metric_of,
    plus_minus,
    pooled,
    scores_of,
    spread,
    told,
)
from rlhf_exp.policy import Policy

logger = logging.getLogger(__name__)

OWN = Path(__file__).parent / "tasks"
SHOWN = 8  # members of a group that are listed one by one


@dataclass(kw_only=True)
class Harness:
    """Which benchmarks, and how they are asked."""

    # names of tasks or groups, or mappings of Benchmark's keys: {name: arc_challenge, shots: 25}
    tasks: list[Any]
    shots: int | None = None  # examples in the context; null: as many as the task says
    limit: int | None = None  # questions of each task; null: all
    batch: int = 16  # sequences in one forward pass
    folder: str | None = None  # task files (YAML) of your own; data_files are relative to them
    seed: int = 1234  # draws the examples in contexts, and samples of tasks that want some
    start: bool = True  # measure the start policy, too

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("evaluation.harness.tasks is empty: name a task")
        if self.batch < 1 or (self.shots or 0) < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"evaluation.harness.batch={self.batch}, .shots={self.shots} and .limit="
                f"{self.limit} must be at least 1, 0 and 1"
            )
        self.benchmarks = [Benchmark.of(task) for task in self.tasks]
        names = [b.name for b in self.benchmarks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"evaluation.harness.tasks names {twice[0]} twice: remove one")

    # ---- what there is

    def check(self) -> None:
        """Refuse what could not be measured: no lm_eval, unknown names, broken files, data that
        cannot be had. Loads the data, and so asks the hub for those that need it, but no weights.
        """
        if find_spec("lm_eval") is None:
            raise ValueError(
                "evaluation.harness needs lm_eval: pip install 'rlhf_exp[evaluation]', or set "
                "evaluation.harness=null"
            )
        self._check_folder()
        known = self._manager.task_index
        for benchmark in self.benchmarks:
            if benchmark.name not in known:
                raise ValueError(
                    f"evaluation.harness.tasks: {benchmark.name} is no task of lm_eval, of "
                    f"rlhf_exp or of evaluation.harness.folder={self.folder}"
                    f"{nearest(benchmark.name, known)}"
                )
            with _quiet():
                leaves = self._load(benchmark)
            there = list(next(iter(leaves.values())).aggregation())
            if benchmark.metric not in (None, *there):
                raise ValueError(
                    f"evaluation.harness.tasks: {benchmark.name} has no metric "
                    f"{benchmark.metric}; it has {', '.join(there)}"
                )

    def identity(self) -> dict[str, Any]:
        """What decides the results beside the policy, for fingerprints."""
        folders = [*self._folders, *(Path(b.data).expanduser() for b in self.benchmarks if b.data)]
        files = [p for f in folders for p in sorted(f.rglob("*")) if p.is_file()]
        return {k: getattr(self, k) for k in ("tasks", "shots", "limit", "seed")} | {
            "lm_eval": metadata.version("lm_eval"),
            "files": [[p.name, file_hash(p)] for p in files if p.suffix != ".pyc"],
        }

    @property
    def _folders(self) -> list[Path]:
        """Ours, and the user's."""
        return [OWN] if self.folder is None else [OWN, Path(self.folder).expanduser().absolute()]

    def _check_folder(self) -> None:
        for folder in self._folders[1:]:
            files = sorted(folder.rglob("*.yaml"))
            if not files:
                raise FileNotFoundError(
                    f"evaluation.harness.folder={self.folder} holds no task file (*.yaml)"
                )
            for file in files:
                try:
                    yaml.compose(file.read_text())
                except yaml.YAMLError as error:
                    why = " ".join(str(error).split())
                    raise ValueError(f"{file} is no valid YAML ({why}): mend it") from None

    @cached_property
    def _manager(self) -> Any:
        """Of our tasks alone if they are all that is asked for: lm_eval's take ten seconds."""
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=[*self._folders], include_defaults=False)
        if all(b.name in own.task_index for b in self.benchmarks):
            return own
        return TaskManager(include_path=[*self._folders])

    def _load(self, benchmark: Benchmark) -> dict[str, Any]:
        """lm_eval's tasks of the benchmark, by name: itself, or the members of the group."""
        entry = self._manager.task_index[benchmark.name]
        home = self._home(entry)
        if home is not None:
            self._check_rows(entry, home)
        asked: Any = benchmark.name
        if changes := benchmark.changes():
            members = [member | changes for member in self._members(benchmark.name)]
            asked = {"group": "changed", "task": members}
        try:
            with nullcontext() if home is None else chdir(home):
                leaves = self._manager.load([asked])["tasks"]
        except Exception as error:  # whatever a task's code, its data set or the hub raises
            raise ValueError(
                f"evaluation.harness.tasks: {benchmark.name} cannot be loaded "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): mend its files, "
                "or give it a network or data=<folder of parquet files>"
            ) from error
        for leaf in leaves.values():
            leaf.set_config("num_fewshot", self._shots(benchmark, leaf.get_config("num_fewshot")))
            leaf.set_fewshot_seed(self.seed)
        return leaves

    def _shots(self, benchmark: Benchmark, usual: int | None) -> int:
        """A task that is asked without examples by design keeps to it, unless told by name."""
        if benchmark.shots is not None:
            return benchmark.shots
        return usual or 0 if self.shots is None or usual == 0 else self.shots

    def _home(self, entry: Any) -> Path | None:
        """The folder of a task file of ours or the user's, to which its data files are relative."""
        home = entry.yaml_path.parent if entry.yaml_path else None
        return home if home and any(map(home.is_relative_to, self._folders)) else None

    def _members(self, name: str) -> list[dict[str, Any]]:
        """A task itself, or all that a group or tag stands for, as lm_eval's groups list them."""
        entry = self._manager.task_index.get(name)
        if name in self._manager.all_groups:
            below = entry.cfg["task"]
        elif name in self._manager.all_tags:
            below = sorted(entry.tags)
        else:
            return [{"task": name}]
        each = [self._members(m) if isinstance(m, str) else [m] for m in below]
        return [member for members in each for member in members]

    def _check_rows(self, entry: Any, home: Path) -> None:
        """Read the local JSON of the task or of the members: a broken line is told by number."""
        for member in self._members(entry.name):
            known = self._manager.task_index.get(member.get("task"))
            config = known.cfg if known is not None else {}
            files = (config.get("dataset_kwargs") or {}).get("data_files")
            if config.get("dataset_path") != "json" or files is None:
                continue
            for value in files.values() if isinstance(files, dict) else [files]:
                for file in [value] if isinstance(value, str) else value:
                    if "://" not in file and "*" not in file:
                        read_rows(home / file)

    # ---- measuring

    def measure(self, policy: Policy) -> Results:
        """Metrics of each benchmark, with `<metric>_stderr`; of the members of a group as
        group/member, with `<metric>_spread` of the group; and the average of all. Random generators
        are left as they were found.
        """
        from rlhf_exp.checkpoints import random_state, set_random_state
        from rlhf_exp.evaluation.benchmark_model import PolicyLM
        from rlhf_exp.trial import seed_everything

        before, results, headlines = random_state(), {}, []
        try:
            with policy.whole():
                for benchmark in self.benchmarks:
                    seed_everything(self.seed)
                    logger.info("benchmark %s", benchmark.name)
                    found = self._measured(benchmark, PolicyLM(policy, self.batch))
                    results |= found
                    headlines.append(headline(benchmark.metric, found[benchmark.name]))
        finally:
            set_random_state(before)
        return results | average(headlines)

    def _measured(self, benchmark: Benchmark, model: Any) -> Results:
        from lm_eval.evaluator import evaluate

        with _quiet():
            leaves = self._load(benchmark)
            out = evaluate(
                model,
                {"tasks": leaves, "groups": {}},
                limit=benchmark.limit or self.limit,
                bootstrap_iters=0,
                apply_chat_template=model.policy.chat,
            )
        members = {name: scores_of(leaf, name, out) for name, leaf in leaves.items()}
        if list(members) == [benchmark.name]:
            return {benchmark.name: told(members[benchmark.name])}
        together = told(pooled(list(members.values()))) | spread(list(members.values()))
        each = {f"{benchmark.name}/{name}": told(scores) for name, scores in members.items()}
        return {benchmark.name: together} | each

    # ---- in words

    def as_text(self, before: Results | None, after: Results) -> str:
        """A line per benchmark: before, after and change, each ± its standard error; that of the
        change as if other examples had been asked, which is too much rather than too little.
        """
        lines = [f"{'benchmark':44} {'before':>16} {'after':>16} {'change':>16}"]
        wanted = {b.name: b.metric for b in self.benchmarks}
        for name, scores in after.items():
            group, _, member = name.partition("/")
            if member and sum(n.startswith(f"{group}/") for n in after) > SHOWN:
                continue
            metric = metric_of(wanted.get(group), scores)
            new = scores[metric], scores.get(f"{metric}_stderr")
            columns = ["", plus_minus(*new), ""]
            if before is not None:
                old = before[name][metric], before[name].get(f"{metric}_stderr")
                error = None if None in (old[1], new[1]) else math.hypot(old[1] or 0, new[1] or 0)
                columns = [plus_minus(*old), columns[1], plus_minus(new[0] - old[0], error)]
            label = f"{'  ' + member if member else name} {metric}"[:44]
            lines.append(f"{label:44} " + " ".join(f"{c:>16}" for c in columns).rstrip())
        return "\n".join(lines)


@contextmanager
def _quiet() -> Iterator[None]:
    """Messages and progress bars of lm_eval and the hub are not ours."""
    theirs = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [one.level for one in theirs]
    for one in theirs:
        one.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for one, level in zip(theirs, levels, strict=True):
            one.setLevel(level)
