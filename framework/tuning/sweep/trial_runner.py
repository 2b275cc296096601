"""Runs and records the trials of a sweep; the function that Hydra's launchers call for each job."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from framework.composition.cached_composer import Composer
from framework.composition.compose import Composing, Job
from framework.errors import ConfigError, DiskFull, FrameworkError
from framework.errors.terminal import print_line, print_traceback
from framework.experiment.result import Result
from framework.experiment.resumption.config_changes import fingerprint
from framework.experiment.steering import TELL
from framework.runs.sweep_files import Trial
from framework.system.locks import lock_holder
from framework.system.signals import received
from framework.system.streams import prepare_streams

from .display import Display, LineDisplay, OutputCapture, make_display
from .folder import SweepFolder, run_name
from .isolation import isolated
from .settings import Sweep
from .table import Objectives, best_trial

PlanLines = Callable[[Sequence[Job]], Iterator[str]]
PRUNE = "prune"  # the callback that prunes trials
WAIT_SECONDS = 1.0  # between two checks whether another job still runs a trial


@dataclass
class TrialRunner:
    """Runs the trials of one sweep.

    Attributes:
        composing: the composition of the sweep.
        task: trains a job.
        explain: returns the lines of an error message.
        sweep: the section of the config.
        objectives: the direction of each metric that trials are compared by.
        open_folder: creates or finds the folder of the sweep, on first use.
        composer: composes jobs; None in the process of a launcher.
        returns_metric: whether jobs return the metric, as sweepers of other packages expect.
        plan: yields the lines of `plan -m`; with it, no trial is run.
        composed_jobs: jobs that are composed already, by Hydra's number.
        numbers: trial numbers by Hydra's number, in a resumed sweep where they differ.
        planned: number of trials, if it is known.
        opened: the folder, once it is open.
        display: the display, once trials run.
    """

    composing: Composing
    task: Callable[[Job], Result | None]
    explain: Callable[[Exception], Sequence[str]]
    sweep: Sweep
    objectives: Objectives
    open_folder: Callable[[], SweepFolder]
    composer: Composer | None = None
    returns_metric: bool = False
    plan: PlanLines | None = None
    composed_jobs: dict[int, Job] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    planned: int | None = None
    opened: SweepFolder | None = None
    display: Display | None = None

    @property
    def folder(self) -> SweepFolder:
        if self.opened is None:
            self.opened = self.open_folder()
        return self.opened

    @property
    def required_composer(self) -> Composer:
        if self.composer is None:
            raise FrameworkError("jobs cannot be composed in a launcher's process")
        return self.composer

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a launcher's process: the folder without its lock."""
        local: dict[str, Any] = {
            "composer": None,
            "plan": None,
            "composed_jobs": {},
            "display": None,
            "opened": SweepFolder(self.folder.path),
            "open_folder": None,
        }
        return self.__dict__ | local

    def __call__(self, config: Any) -> Any:
        """Run the trial of a config from Hydra, or resume it if its job is queued again."""
        prepare_streams()  # a launcher's process has other streams than the command
        job = self.assign_folder(self.composing.job(config))
        self.wait_for_other_process(str(job.spec.sections["run"]["name"]))
        number = received()
        if number is not None:
            status = 128 + number
            trial = Trial(number_of(job), job.settings, state="stopped", exit_status=status)
            return self.task_result(trial)
        earlier = self.earlier_row(job)
        if earlier is not None and earlier.config == fingerprint(job.spec.tree):
            job.spec = replace(job.spec, resume="auto")
        trial = self.run(job)
        is_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        if is_slurm and trial.exit_status == 128 + signal.SIGTERM:
            # Without a result submitit waits for SLURM, which queues the job again.
            sys.exit(trial.exit_status)
        return self.task_result(trial)

    def wait_for_other_process(self, name: str) -> None:
        """Wait while another process writes in the run folder of a trial.

        If the command of a sweep was killed, the jobs that it has submitted to a cluster continue,
        and the same command submits their trials again.

        Args:
            name: the name of the run folder.
        """
        run = self.folder.path / name
        holder = lock_holder(run)
        if holder is None:
            return
        print_line(f"{run} is being written by {holder}: waiting for its end", flush=True)
        while lock_holder(run) is not None and received() is None:
            time.sleep(WAIT_SECONDS)
        time.sleep(WAIT_SECONDS)  # a process unlocks its run before it records the result

    def task_result(self, trial: Trial) -> Any:
        """Return the result of a job for its sweeper."""
        if not self.returns_metric:
            return trial
        return trial.metrics.get(next(iter(self.objectives)), math.nan)

    def jobs(self, overrides: Iterable[Sequence[str]], first: int) -> list[Job]:
        """Return the jobs of overrides, numbered from `first` on.

        Raises:
            ConfigError: a job has problems.
        """
        jobs = []
        for number, each in enumerate(overrides, first):
            job = self.composed_jobs.get(number)
            if job is None:
                job = self.assign_folder(self.required_composer.job(each, number))
            jobs.append(job)
        return jobs

    def assign_folder(self, job: Job) -> Job:
        """Set the trial number of a job, and the run folder inside that of the sweep."""
        path = self.folder.path
        hydra_number = number_of(job)
        number = self.numbers.get(hydra_number, hydra_number)
        job.number = number
        job.sweep = path
        job.experiment = path.name
        run = job.spec.sections["run"]
        run["name"] = run["name"] or self.run_name(number, job.settings)
        run["root"] = path.parent
        job.spec.tree["run"] = {"root": str(path.parent), "name": run["name"]}
        return job

    def run_name(self, number: int, settings: Mapping[str, Any]) -> str:
        """Return the name of a trial's run folder: that of a sweep which is resumed stays."""
        for row in self.folder.trials():
            if row.number == number and row.folder and row.settings == settings:
                return row.folder
        return run_name(number, settings)

    def run(self, job: Job) -> Trial:
        """Train and record a job, unless it is finished; a failure is recorded."""
        finished = self.finished_row(job)
        if finished is not None:
            return finished
        trial = self.start(job)
        began = time.monotonic()
        capture = OutputCapture(self.folder.path / trial.folder, self.active_display())
        try:
            with isolated(), capture.capturing():
                result = self.task(job)
        except Exception as error:
            if job.traceback:
                print_traceback(error)
            return self.finish(self.failed(trial, error, time.monotonic() - began))
        except BaseException:  # a second signal, or one before the training
            seconds = total_seconds(trial, time.monotonic() - began)
            self.finish(replace(trial, state="stopped", seconds=seconds))
            raise
        return self.finish(outcome(trial, result))

    def finished_row(self, job: Job) -> Trial | None:
        """Return the row of a job if its trial is finished and the config is the same."""
        row = None if job.spec.resume == "never" else self.earlier_row(job)
        if row is None or not row.is_finished or row.config != fingerprint(job.spec.tree):
            return None
        return row

    def earlier_row(self, job: Job) -> Trial | None:
        """Return the row of a job if its trial was started before."""
        for row in self.folder.trials():
            if row.number == job.number:
                return row
        return None

    def start(self, job: Job) -> Trial:
        """Record that a trial starts."""
        interrupted = None if job.spec.resume == "never" else self.earlier_row(job)
        trial = Trial(
            number_of(job),
            job.settings,
            str(job.spec.sections["run"]["name"]),
            seconds=interrupted.seconds if interrupted else 0.0,
            config=fingerprint(job.spec.tree),
        )
        self.folder.record(trial)
        self.active_display().trial_started(trial)
        return trial

    def failed(self, trial: Trial, error: Exception, seconds: float) -> Trial:
        """Return the row of a trial that failed.

        One that found a full disk is stopped, and left for a resumed sweep.
        """
        return replace(
            trial,
            state="stopped" if isinstance(error, DiskFull) else "failed",
            error="; ".join(self.explain(error)),
            exit_status=error.exit_status if isinstance(error, FrameworkError) else 1,
            seconds=total_seconds(trial, seconds),
        )

    def finish(self, trial: Trial) -> Trial:
        """Record how a trial ended, and link the best trial so far."""
        self.folder.record(trial)
        best = best_trial(self.folder.trials(), self.objectives)
        if best is not None:
            self.folder.link_best(best)
        self.active_display().trial_ended(trial)
        return trial

    def active_display(self) -> Display:
        return self.display or LineDisplay(self.objectives)

    @contextmanager
    def displayed(self) -> Iterator[None]:
        """Display the trials at the terminal while they run."""
        if self.display is not None:
            yield
            return
        self.display = make_display(self.objectives, self.folder.trials(), self.planned)
        try:
            yield
        finally:
            self.display.close()
            self.display = None


def check_task_function(task: Any) -> TrialRunner:
    """Return the task function of a sweeper or launcher.

    Raises:
        FrameworkError: Hydra runs it in another program than `framework train -m`.
    """
    if not isinstance(task, TrialRunner):
        raise FrameworkError(
            "sweepers and launchers of framework run trials of `framework train -m` only, "
            f"got the task function {task!r}"
        )
    return task


def number_of(job: Job) -> int:
    """Return the number of a job.

    Raises:
        FrameworkError: the job has none.
    """
    if job.number is None:
        raise FrameworkError("the job of a sweep has no number (hydra.job.num)")
    return job.number


def outcome(trial: Trial, result: Result | None) -> Trial:
    """Return the row of a trial from the result of its training."""
    if result is None:
        return replace(trial, state="done")
    measured = replace(
        trial,
        metrics=dict(result.metrics),
        steps=result.steps,
        seconds=total_seconds(trial, result.seconds),
    )
    if result.stopped is not None and result.stopped.by == TELL:
        return replace(measured, state="pruned")  # by the user, as PRUNE does: the sweep continues
    if result.signal is not None:
        return replace(measured, state="stopped", exit_status=128 + result.signal)
    if result.stopped is not None and result.stopped.by == PRUNE:
        return replace(measured, state="pruned")
    return replace(measured, state="done")


def total_seconds(trial: Trial, seconds: float) -> float:
    """Return the time of a trial, including that of interrupted attempts."""
    return round(trial.seconds + seconds, 3)


def compose_all(runner: TrialRunner, overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Compose all jobs of a sweep without running them.

    Raises:
        ConfigError: with the problems of all jobs.
    """
    problems: list[str] = []
    jobs: list[Job] = []
    for number, each in enumerate(overrides):
        try:
            jobs.append(runner.required_composer.job(each, number))
        except ConfigError as error:
            problems += error.problems
    names = [job.spec.sections["run"]["name"] for job in jobs]
    for name in names:
        if name is not None and names.count(name) > 1:
            problems.append(
                f"run.name={name}: each job of a sweep needs its own folder: leave the name out"
            )
            break
    problems += identical_trials(jobs)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return jobs


def identical_trials(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the trials that train the same, and would count as independent in a mean over seeds."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(fingerprint(job.spec.tree), []).append(job)
    for group in groups.values():
        if len(group) == 1:
            continue
        labels = list(dict.fromkeys(job.label for job in group))
        if len(labels) == 1:
            label = labels[0] or "the experiment"
            yield f"{label} is given {len(group)} times: list each value once"
        else:
            names = " and ".join(labels[:3])
            yield f"{names} are the same experiment: the difference has no effect"
