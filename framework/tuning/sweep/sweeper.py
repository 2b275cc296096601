"""The base class of the sweepers."""

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.composition.hydra_internals import make_launcher

from .trial_runner import TrialRunner, check_task


class TrialSweeper(Sweeper):
    """A sweeper that runs trials with a launcher."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Create the launcher."""
        self.runner: TrialRunner = check_task(task_function)
        self.loader = hydra_context.config_loader
        self.trial_launcher = make_launcher(hydra_context, config, task_function)
