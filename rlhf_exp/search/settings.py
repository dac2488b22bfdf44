"""What can be set of a search: `hydra.sweeper`, see conf/hydra/sweeper/optuna.yaml."""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_exp.choices import nearest, require
from rlhf_exp.search.median import MedianStopping

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}


@dataclass(kw_only=True)
class Settings:
    """How points of the space are chosen, how many, and where they are kept."""

    sampler: str | None = None  # tpe, random, nsga2 or grid; null: the file's method, or tpe
    seed: int = 0  # of the sampler
    options: dict[str, Any] | None = None  # arguments of optuna's sampler
    n_trials: int = 20  # in all, those of an earlier attempt included
    n_jobs: int = 1  # handed to the launcher at once
    storage: str | None = None  # null: in memory
    study_name: str | None = None  # null: the file's name, or search
    params: dict[str, Any] | None = None  # key: override
    file: str | None = None  # sweep file in the format of Weights & Biases
    pruning: MedianStopping | None = None

    def __post_init__(self) -> None:
        if self.n_trials < 1 or self.n_jobs < 1:
            raise ValueError(
                f"hydra.sweeper.n_trials={self.n_trials} and hydra.sweeper.n_jobs={self.n_jobs} "
                "must be at least 1"
            )
        if self.sampler is not None:
            require(self.sampler, (*SAMPLERS, "grid"), "hydra.sweeper.sampler")
        if isinstance(self.pruning, dict):
            self.pruning = MedianStopping(**self.pruning)

    def build_sampler(self, name: str, done: int) -> Any:
        """Optuna's sampler `name` for a search with `done` trials behind it: the seed moves on
        with them, so that a resumed search does not draw its first points again.
        """
        import optuna

        options = dict(self.options or {})
        if name == "tpe":  # runs of one batch keep away from each other
            options.setdefault("constant_liar", self.n_jobs > 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _kind(name)(seed=self.seed + done, **options)

    def check_sampler(self, name: str, directions: Sequence[Any], space: dict[str, Any]) -> None:
        """Draw a point that nobody uses; ValueError if the options do not let the sampler do so."""
        import optuna

        known = set(inspect.signature(_kind(name)).parameters) - {"seed"}
        for option in self.options or {}:
            if option not in known:
                raise ValueError(
                    f"hydra.sweeper.options.{option} is no argument of optuna's "
                    f"{_kind(name).__name__}{nearest(option, known)}"
                )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(directions=directions, sampler=self.build_sampler(name, 0))
            study.ask(space)
        except (TypeError, ValueError) as error:
            raise ValueError(f"hydra.sweeper.options={self.options}: {error}") from None


def _kind(name: str) -> Any:
    """Optuna's class. The points of a grid are queued, so whatever its sampler, it is not asked."""
    import optuna

    return getattr(optuna.samplers, SAMPLERS.get(name, "RandomSampler"))
