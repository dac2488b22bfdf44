"""`python -m rlhf_exp`: compose the config, check it, hand it to the hardware.

Nothing heavy is imported before the config is known to be sound, so --help and --cfg job answer at
once.
"""

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp import processes
from rlhf_exp.choices import require
from rlhf_exp.config import build, conf_directory, explain, resolved
from rlhf_exp.launching import SWEEPS, UNSAID, asked, write_down
from rlhf_exp.objective import outcome
from rlhf_exp.worker import guarded

EVALUATE = "stages=[evaluate]"
SPELLED = (EVALUATE, "stages=['evaluate']", 'stages=["evaluate"]')
USUAL = {"hydra/launcher": "local", "hydra/sweeper": "grid"}
# of a process that shares its run with the main one: no .hydra, no log of Hydra's
QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


@hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")
def main(config: DictConfig) -> Any:
    """One run: returns the objective. The jobs of a sweep are the launcher's."""
    hydra_config = HydraConfig.get()
    directory = Path(hydra_config.runtime.output_dir)
    _check_groups(hydra_config.runtime.choices, hydra_config.mode == RunMode.MULTIRUN)
    require(config.sweep, ("run", "status"), "sweep")
    if list(config.stages) in (["report"], ["compare"]):
        if code := guarded(lambda: of_stored_runs(config, directory)):
            processes.leave(code)
        return None
    if config.sweep == "status":
        print(status(Path(config.runs)))
        return None
    if code := guarded(lambda: run(config, directory)):
        processes.leave(code)
    return outcome(directory, resolved(config)["objective"])


def _check_groups(chosen: dict[str, str], sweep: bool) -> None:
    """Refuse launchers that are not ours, and one that would not be used."""
    if sweep:
        raise ValueError(
            f"hydra/launcher={chosen['hydra/launcher']} starts no runs of rlhf_exp: use local or "
            "slurm"
        )
    for group, usual in USUAL.items():
        if chosen[group] not in (usual, "basic"):
            raise ValueError(
                f"{group}={chosen[group]} acts on sweeps only (one run is a sweep, too): type "
                f"python -m rlhf_exp -m {shlex.join(sys.argv[1:])}"
            )


def run(config: DictConfig, directory: Path) -> None:
    """Check the config, write down what was asked, and do it."""
    plain = asked(config)
    if plain["run"] is not None:
        raise ValueError(
            f"run={plain['run']} names a run that was done before, for stages=[evaluate] or "
            "stages=[compare], and for them alone: leave it out"
        )
    hardware = build(plain["hardware"], "hardware")
    os.environ.update(hardware.env())
    if plain["plan"] is not True:  # a plan is made anywhere
        hardware.check()
    if processes.first(lambda: planned(plain)):
        return
    if (shared := processes.agreed(directory)) != directory:
        raise ValueError(
            f"the processes of the run would write to {shared} and to {directory}: give one "
            "hydra.run.dir to all, with ${started:} in it rather than ${now:}"
        )
    told = {k: v for k, v in plain.items() if k not in UNSAID}
    processes.first(lambda: write_down(told, directory))
    if processes.main():
        print(f"run directory: {directory}", file=sys.stderr)
    hardware.launch(directory)


def of_stored_runs(config: DictConfig, directory: Path) -> None:
    """The stages that look at runs which were done before."""
    plain = asked(config)
    if config.stages[0] == "report":
        page = build(plain["report"], "report").write([plain["runs"]], directory / "report")
        print(f"report: {page}")
        return
    from rlhf_exp.report import compare

    for key in ("run", "against"):
        if plain[key] is None:
            raise ValueError(f"stages=[compare] compares two runs: add {key}=<run directory>")
    print(compare.as_text(found := compare.compare(Path(plain["run"]), Path(plain["against"]))))
    print(f"written to {compare.write(directory, found)}")


def status(folder: Path) -> str:
    """A table of every run below `folder` and how it is."""
    from rlhf_exp import runs
    from rlhf_exp.report import sweep
    from rlhf_exp.slurm import states

    return sweep.show(list(runs.find([folder], states()).values()))


def planned(config: dict[str, Any]) -> bool:
    """Whether a plan was all that was asked for; a run that cannot fit is refused, unless
    forced.
    """
    require(str(config["plan"]).lower(), ("true", "false", "force"), "plan")
    from rlhf_exp import plan

    if config["plan"] is True:
        plan.show(config)
    elif config["plan"] is False:
        plan.refuse(config)
    return config["plan"] is True


def cli() -> None:
    """The command line, with errors as one sentence; under torchrun or srun, one of several."""
    if code := guarded(processes.join):
        processes.leave(code)
    given = sys.argv[1:]
    if any(a.startswith("resume=") for a in given):
        processes.leave(guarded(lambda: _resume(given)))
    given = [EVALUATE if a.replace(" ", "") in SPELLED else a for a in given]
    if EVALUATE in given and any(a.startswith("run=") for a in given):
        processes.leave(guarded(lambda: _evaluate(given)))
    processes.leave(guarded(compose_and_run))


def _resume(given: list[str]) -> None:
    """resume=<run directory>, and hardware if it is given anew."""
    from rlhf_exp.worker import resume

    directory, others = _stored("resume", given, ("hardware",))
    resume(directory, others)


def _evaluate(given: list[str]) -> None:
    """stages=[evaluate] run=<run directory>, and other hardware or benchmarks."""
    from rlhf_exp.worker import evaluate

    others = [a for a in given if a != EVALUATE]
    directory, others = _stored("run", others, ("hardware", "evaluation"))
    evaluate(directory, others)


def _stored(key: str, given: list[str], free: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The directory that `key` names, and what is given beside it; ValueError unless that is of
    the groups `free`.
    """
    wanted = [a.removeprefix(f"{key}=") for a in given if a.startswith(f"{key}=")]
    others = [a for a in given if not a.startswith(f"{key}=")]
    starts = tuple(f"{group}{mark}" for group in free for mark in "=.")
    if not all(a.startswith(starts) for a in others):
        raise ValueError(
            f"{key}=<run directory> takes its settings from the run; {' and '.join(free)} alone "
            "may be given anew beside it"
        )
    return Path(wanted[0]).absolute(), others


def _use_our_own() -> None:
    """Make our launcher and sweeper what Hydra takes by default, in this program. A defaults list
    could do so, too, but experiments could not choose others then.
    """
    Plugins.instance()  # has Hydra's own registered first
    for group, name in USUAL.items():
        node = OmegaConf.load(conf_directory() / group / f"{name}.yaml")
        ConfigStore.instance().store(group=group, name="basic", node=node, provider="rlhf_exp")


def compose_and_run() -> None:
    """Hydra's own run, its composition errors explained."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them
    sweep = bool({"-m", "--multirun"} & set(sys.argv))
    if processes.joined() and sweep:
        raise ValueError(SWEEPS)
    if not processes.main():
        sys.argv += QUIET
    if "sweep=status" in sys.argv:
        sys.argv += QUIET if sweep else [*QUIET, "hydra.run.dir=."]
    _use_our_own()
    now = processes.agreed(datetime.now())  # one clock for all, as they share a directory
    OmegaConf.register_new_resolver("started", now.strftime)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, sys.argv[1:])) from None


if __name__ == "__main__":
    cli()
