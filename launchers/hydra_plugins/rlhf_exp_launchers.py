"""hydra/launcher=local, hydra/launcher=slurm and hydra/sweeper=grid, where Hydra looks for them: it
takes plugins from the namespace package hydra_plugins alone, which must have no __init__.py.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus

from rlhf_exp.launching import Local
from rlhf_exp.slurm import Slurm


class LocalLauncher(Local):
    """Jobs of a sweep on this machine."""


class SlurmLauncher(Slurm):
    """Jobs of a sweep as array jobs of SLURM."""


class GridSweeper(BasicSweeper):
    """Every combination, as Hydra's own sweeper makes them; launchers compose each job anyway."""

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
