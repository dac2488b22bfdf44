"""Optuna's study: opened or continued, and which of its trials count.

A trial counts when it is concluded: complete, pruned, or failed with a reason. One whose search was
interrupted has failed without a reason; its point is queued again, and the launcher finds the run
it had started.
"""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

Space = dict[str, BaseDistribution]
IDENTITY = "asked"  # user attribute of a study: what its values are values of
WHY = "why"  # user attribute of a trial: the reason it failed for
JOB = "job"  # number of the job it became


def open_study(
    *,
    storage: str | None,
    name: str,
    directions: Sequence[Any],
    objective: dict[str, Any],
    space: Space,
    fixed: str,
) -> optuna.Study:
    """The study `name`, new or as an earlier attempt left it; ValueError if that one asked for
    something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), load_if_exists=True
        )
    except Exception as error:  # of the database's own kind
        raise ValueError(
            f"hydra.sweeper.storage={storage} cannot be opened ({str(error).splitlines()[0]}): "
            "give sqlite:///<file> in a folder that exists, or null"
        ) from None
    identity = {
        "directions": list(directions),
        "objective": objective,
        "space": {key: distribution_to_json(space[key]) for key in sorted(space)},
        "set of fixed settings": fixed,
    }
    known = study.user_attrs.get(IDENTITY, {} if study.trials else identity)
    for what, asked in identity.items():
        if known.get(what) != asked:
            raise ValueError(
                f"the study {name} in {storage} has another {what} ({known.get(what)}, not {asked})"
                ": give another hydra.sweeper.study_name, or the same settings again"
            )
    study.set_user_attr(IDENTITY, identity)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # its search was killed
    return study


def concluded(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.trials if t.state in done or WHY in t.user_attrs]


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have values."""
    return study.get_trials(states=(TrialState.COMPLETE,))


def queue(study: optuna.Study, points: Sequence[dict[str, Any]]) -> None:
    """Have these points tried first, and those whose trials were interrupted; none twice."""
    trials = study.trials
    counted = {t.number for t in concluded(study)}
    waiting = [t for t in trials if t.state == TrialState.WAITING]
    known = [t.params for t in trials if t.number in counted]
    known += [t.system_attrs["fixed_params"] for t in waiting]
    lost = [t.params for t in trials if t.state == TrialState.FAIL and t.number not in counted]
    for point in [*lost, *points]:
        if point not in known:
            study.enqueue_trial(point)
            known.append(point)


def next_job(study: optuna.Study) -> int:
    """A number that no job of the study has had."""
    return 1 + max((t.user_attrs[JOB] for t in study.trials if JOB in t.user_attrs), default=-1)
