"""hydra/launcher=local, hydra/launcher=slurm and hydra/sweeper=grid, where Hydra looks for them: it
takes plugins from the namespace package hydra_plugins alone, which must have no __init__.py.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus

from rlhf_exp.launching import Local, chosen
from rlhf_exp.slurm import Slurm


class LocalLauncher(Local):
    """Jobs of a sweep on this machine."""


class SlurmLauncher(Slurm):
    """Jobs of a sweep as array jobs of SLURM."""


class GridSweeper(BasicSweeper):
    """Every combination, as Hydra's own sweeper makes them; launchers compose each job anyway.

    `arms` are what a study compares, by name: overrides that belong together. Each arm is combined
    with all values of what is swept beside it, and the run is told its arm's name.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        arms: dict[str, list[str]] | None = None,
        only: list[str] | None = None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.arms, self.only = arms or {}, only

    def split_arguments(  # type: ignore[override]  # Hydra's is static, and knows no arms
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The overrides of each job, in batches."""
        product = BasicSweeper.split_arguments
        if not self.arms:
            return product(overrides, max_batch_size)
        parser = OverridesParser.create()
        given = {override.get_key_element() for override in overrides}
        jobs: list[list[str]] = []
        for name in chosen(self.arms, self.only):
            own = parser.parse_overrides([f"arm={name}", *self.arms[name]])
            if clash := sorted(given & {override.get_key_element() for override in own}):
                raise ValueError(
                    f"{clash[0]} is what the arms of this sweep differ in: choose among them with "
                    f"hydra.sweeper.only=[{name}], or give hydra.sweeper.arms anew"
                )
            jobs += product([*own, *overrides], None)[0]
        return [list(part) for part in self.split_overrides_to_chunks(jobs, max_batch_size)]

    def validate_batch_is_legal(self, batch: object) -> None:
        """Left to the launcher, which tells what is wrong with which job."""

    def sweep(self, arguments: list[str]) -> Any:
        """All batches, and only then the first error."""
        assert self.launcher is not None
        launch, failed = self.launcher.launch, list[JobReturn]()

        def gently(*args: Any, **settings: Any) -> list[JobReturn]:
            returns = launch(*args, **settings)
            failed.extend(r for r in returns if r.status == JobStatus.FAILED)
            return [r for r in returns if r.status != JobStatus.FAILED]

        self.launcher.launch = gently  # type: ignore[method-assign]
        returns = super().sweep(arguments)
        _ = [r.return_value for r in failed]  # raises
        return returns
