"""The default launcher of sweeps: one trial after the other, in this process."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.composition.compose import Job
from framework.runs.sweep_files import Trial
from framework.system.signals import received

from .trial_runner import TrialRunner, check_task_function


class OneByOne(Launcher):
    """Composes jobs, without Hydra if they differ in values only, and runs them in order.

    Subclasses override `run`.
    """

    runner: TrialRunner

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.runner = check_task_function(task_function)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs; return a result for each, or fewer after a signal."""
        jobs = self.runner.jobs(job_overrides, initial_job_idx)
        with self.runner.displayed():
            ended = self.run(jobs)
        results = []
        for trial, job in zip(ended, jobs, strict=False):
            results.append(completed_job(self.runner.task_result(trial), job.overrides))
        return results

    def run(self, jobs: list[Job]) -> list[Trial]:
        """Run jobs in order, until a signal stops one."""
        ended: list[Trial] = []
        for job in jobs:
            ended.append(self.runner.run(job))
            if ended[-1].state == "stopped" or received() is not None:
                break
        return ended


def completed_job(value: Any, overrides: Sequence[str]) -> JobReturn:
    """Return the result of a job in the form that Hydra's sweepers expect."""
    result = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    result.return_value = value
    return result
