"""`python -m rlhf_exp`: compose the config, check it, hand it to the hardware.

Nothing heavy is imported before the config is known to be sound, so --help and --cfg job answer at
once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp.choices import require
from rlhf_exp.config import build, check, conf_directory, explain, resolved
from rlhf_exp.worker import guarded


@hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")
def main(config: DictConfig) -> float | None:
    """One job: returns the objective, so that a sweeper can optimise it."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    if not sweep and (code := guarded(lambda: run(config, directory, isolated=False))):
        sys.exit(code)
    if sweep:
        run(config, directory, isolated=True)
    result = directory / "summary.json"
    if not result.exists():
        return None
    return json.loads(result.read_text())[config.objective]["after"]["mean"]


def run(config: DictConfig, directory: Path, *, isolated: bool) -> None:
    """Check the config, write down what was asked, and do it."""
    check(config)
    plain = resolved(config)
    plain["artifacts"] = str(Path(plain["artifacts"]).expanduser().absolute())
    hardware = build(plain["hardware"], "hardware")
    os.environ.update(hardware.env())
    if planned(plain):
        return
    from rlhf_exp.artifacts import write_json
    from rlhf_exp.run import describe

    if (directory / "run.json").exists():
        raise ValueError(
            f"{directory} already holds a run: choose another hydra.run.dir, "
            f"or continue it with resume={directory}"
        )
    write_json(directory / "run.json", describe(plain))
    print(f"run directory: {directory}", file=sys.stderr)
    hardware.launch(directory, isolated=isolated)


def planned(config: dict[str, Any]) -> bool:
    """Whether a plan was all that was asked for; a run that cannot fit is refused, unless forced.
    What is said of plans is dropped from `config`, for it decides nothing of the outcome.
    """
    require(str(config["plan"]).lower(), ("true", "false", "force"), "plan")
    from rlhf_exp import plan

    asked = dict(config)
    wanted = config.pop("plan")
    del config["planning"]
    if wanted is True:
        plan.show(asked)
    elif wanted is False:
        plan.refuse(asked)
    return wanted is True


def cli() -> None:
    """The command line, with errors as one sentence."""
    wanted = [a.removeprefix("resume=") for a in sys.argv[1:] if a.startswith("resume=")]
    if wanted and len(sys.argv) > 2:
        sys.exit("error: resume=<run directory> takes its settings from the run and stands alone")
    if wanted:
        from rlhf_exp.worker import resume

        sys.exit(guarded(lambda: resume(Path(wanted[0]).absolute())))
    sys.exit(guarded(compose_and_run))


def compose_and_run() -> None:
    """Hydra's own run, its composition errors explained."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on instead of printing them
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, sys.argv[1:])) from None


if __name__ == "__main__":
    cli()
