"""`python -m rlhf_exp`: compose the config, check it, hand it to the hardware.

Nothing heavy is imported before the config is known to be sound, so --help and --cfg job answer at
once.
"""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp import processes
from rlhf_exp.choices import require
from rlhf_exp.config import build, check, conf_directory, explain, resolved
from rlhf_exp.objective import outcome
from rlhf_exp.worker import guarded

# of a process that shares its run with the main one: no .hydra, no log of Hydra's
QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
SWEEPS = (
    "a sweep starts the processes of its jobs itself: run it with -m and without torchrun or "
    "srun, or one run with them"
)


@hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")
def main(config: DictConfig) -> float | list[float] | None:
    """One job: returns the objective, so that a sweeper can optimise it."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    if not sweep and (code := guarded(lambda: run(config, directory, isolated=False))):
        processes.leave(code)
    if sweep and processes.joined():
        raise ValueError(SWEEPS)
    if sweep:
        run(config, directory, isolated=True)
    return outcome(directory, resolved(config)["objective"])


def run(config: DictConfig, directory: Path, *, isolated: bool) -> None:
    """Check the config, write down what was asked, and do it."""
    check(config)
    plain = resolved(config)
    plain["artifacts"] = str(Path(plain["artifacts"]).expanduser().absolute())
    hardware = build(plain["hardware"], "hardware")
    os.environ.update(hardware.env())
    if plain["plan"] is not True:  # a plan is made anywhere
        hardware.check()
    told = {key: plain.pop(key) for key in ("plan", "planning")}  # they decide nothing of a run
    if processes.first(lambda: planned(plain | told)):
        return
    if (shared := processes.agreed(directory)) != directory:
        raise ValueError(
            f"the processes of the run would write to {shared} and to {directory}: give one "
            "hydra.run.dir to all, with ${started:} in it rather than ${now:}"
        )
    processes.first(lambda: write_down(plain, directory))
    hardware.launch(directory, isolated=isolated)


def write_down(plain: dict[str, Any], directory: Path) -> None:
    """run.json, in a directory that holds no run yet."""
    from rlhf_exp.artifacts import write_json
    from rlhf_exp.run import describe

    if (directory / "run.json").exists():
        raise ValueError(
            f"{directory} already holds a run: choose another hydra.run.dir, "
            f"or continue it with resume={directory}"
        )
    write_json(directory / "run.json", describe(plain))
    print(f"run directory: {directory}", file=sys.stderr)


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
    wanted = [a.removeprefix("resume=") for a in sys.argv[1:] if a.startswith("resume=")]
    others = [a for a in sys.argv[1:] if not a.startswith("resume=")]
    if wanted and not all(a.startswith(("hardware=", "hardware.")) for a in others):
        sys.exit(
            "error: resume=<run directory> takes its settings from the run; hardware alone may be "
            "given anew beside it"
        )
    if wanted:
        from rlhf_exp.worker import resume

        processes.leave(guarded(lambda: resume(Path(wanted[0]).absolute(), others)))
    processes.leave(guarded(compose_and_run))


def compose_and_run() -> None:
    """Hydra's own run, its composition errors explained."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them
    if processes.joined() and {"-m", "--multirun"} & set(sys.argv):
        raise ValueError(SWEEPS)
    if not processes.main():
        sys.argv += QUIET
    now = processes.agreed(datetime.now())  # one clock for all, as they share a directory
    OmegaConf.register_new_resolver("started", now.strftime)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, sys.argv[1:])) from None


if __name__ == "__main__":
    cli()
