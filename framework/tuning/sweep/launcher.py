"""The launcher of sweeps, when none is chosen: one trial after the other, in this process."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.composition.compose import Job
from framework.system.signals import received

from .folder import Trial
from .trials import Trials


class OneByOne(Launcher):
    """Composes jobs without Hydra where only values differ, and runs them. One that runs them otherwise is a subclass
    with a `run` of its own.
    """

    trials: Trials

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        assert isinstance(task_function, Trials)
        self.trials = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs; returns as many results, or fewer after a signal."""
        jobs = self.trials.jobs(job_overrides, initial_job_idx)
        with self.trials.showing():
            ended = self.run(jobs)
        return [
            returned(self.trials.returned(trial), job.overrides)
            for trial, job in zip(ended, jobs, strict=False)
        ]

    def run(self, jobs: list[Job]) -> list[Trial]:
        """Run jobs in turn, until one is stopped by a signal."""
        ended: list[Trial] = []
        for job in jobs:
            ended.append(self.trials.run(job))
            if ended[-1].state == "stopped" or received() is not None:
                break
        return ended


def returned(value: Any, overrides: Sequence[str]) -> JobReturn:
    """Return what Hydra's sweepers take for the result of a job."""
    done = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    done.return_value = value
    return done
