"""`hydra/sweeper=optuna`: Hydra finds sweepers in this namespace package only; the search itself is
`rlhf_exp.search`. Every command imports this file, so it imports nothing heavy.
"""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Hands Hydra's parser, composer and launcher to a Search."""

    launcher: Launcher
    config: DictConfig

    def __init__(self, **settings: Any) -> None:
        self.settings = settings  # fields of rlhf_exp.search.settings.Settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not getattr(self.launcher, "wait", True):
            raise ValueError(
                "hydra.launcher.wait=false leaves before a search could learn anything: leave it "
                "true"
            )
        self.launcher.report = False  # type: ignore[attr-defined]  # the search has its own

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Search; what is left of it lies in the sweep directory."""
        if self.config.sweep == "status":
            raise ValueError(
                "sweep=status lists the points of a grid, which a search does not know before: "
                "leave -m and the sweeper away to list all runs, or see search.csv of the search"
            )
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError(
                "hydra/sweeper=optuna needs the package optuna: pip install 'rlhf_exp[optuna]'"
            ) from None
        from rlhf_exp.config import check_fields
        from rlhf_exp.launching import Points
        from rlhf_exp.search.search import Search
        from rlhf_exp.search.settings import Settings

        node = OmegaConf.create(self.settings)
        check_fields(node, Settings, "hydra.sweeper.")
        plain: dict[str, Any] = OmegaConf.to_container(node)  # type: ignore[assignment]
        directory = Path(self.config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, directory / "multirun.yaml")
        search = Search(
            settings=Settings(**plain),
            parse=self._parse,
            compose=Points(self.loader, self.config),
            launch=self.launcher.launch,
            directory=directory,
        )
        return search.run(arguments)

    def _parse(self, lines: list[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self.loader).parse_overrides(lines)
