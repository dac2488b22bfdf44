"""hydra/launcher=local, hydra/launcher=slurm and hydra/sweeper=grid, where Hydra looks for them: it
takes plugins from the namespace package hydra_plugins alone, which must have no __init__.py.
"""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

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
