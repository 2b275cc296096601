"""The base class of the sweepers."""

from collections.abc import Iterable

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.composition.compose import Composing
from framework.composition.hydra_internals import make_launcher
from framework.composition.overrides import Overrides, rewrite
from framework.errors import ConfigError

from .trial_runner import TrialRunner, check_task_function


class TrialSweeper(Sweeper):
    """A sweeper that runs trials with a launcher."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Create the launcher."""
        self.runner: TrialRunner = check_task_function(task_function)
        self.loader = hydra_context.config_loader
        self.trial_launcher = make_launcher(hydra_context, config, task_function)


def rewrite_params(params: Iterable[str], composing: Composing) -> Overrides:
    """Rewrite the overrides of the setting `params` of a sweeper for Hydra.

    Raises:
        ConfigError: one of them is invalid.
    """
    rewritten = rewrite(params, composing.folders, multirun=True)
    if rewritten.problems:
        place = "(hydra.sweeper.params)"
        raise ConfigError([text.replace("(command line)", place) for text in rewritten.problems])
    return rewritten
