"""Runs the trials of a sweep and records them. It is also the function that Hydra's launchers call for each job."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from framework.composition.cached_composer import Composer
from framework.composition.compose import Composing, Job
from framework.errors import ConfigError, DiskFull, FrameworkError
from framework.errors.terminal import print_traceback
from framework.experiment.config_changes import fingerprint
from framework.experiment.result import Result
from framework.system.signals import received
from framework.system.streams import prepare_streams

from .display import Lines, Output, Shown, display
from .folder import State, SweepFolder, Trial, run_name
from .isolation import isolated
from .settings import Sweep
from .table import Direction, best_trial

Plan = Callable[[Sequence[Job]], Iterator[str]]
PRUNE = "prune"  # the callback that ends bad trials


@dataclass
class Trials:
    """The trials of one sweep.

    Attributes:
        sweep: the section of the config.
        by: "min" or "max", by metric that trials are compared by.
        folder: of the sweep; made, or found again, when it is first asked for.
        ready: jobs that are composed already, by Hydra's number.
        numbers: those of trials, by Hydra's number, where a resumed sweep has other ones.
        planned: how many trials there will be, when that is known.
    """

    composing: Composing
    task: Callable[[Job], Result | None]
    explain: Callable[[Exception], Sequence[str]]
    sweep: Sweep
    by: Direction
    opening: Callable[[], SweepFolder]
    composer: Composer | None = None
    gives_value: bool = False  # to a sweeper that is not ours, which wants the metric
    plan: Plan | None = None  # yields the lines of `plan -m`; then no trial is run
    ready: dict[int, Job] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    planned: int | None = None
    opened: SweepFolder | None = None
    shown: Shown | None = None

    @property
    def folder(self) -> SweepFolder:
        if self.opened is None:
            self.opened = self.opening()
        return self.opened

    def __getstate__(self) -> dict[str, Any]:
        """For a launcher's process: the sweep's folder without its lock, and nothing that is for this one."""
        away: dict[str, Any] = {
            "composer": None,
            "plan": None,
            "ready": {},
            "shown": None,
            "opened": SweepFolder(self.folder.path),
            "opening": None,
        }
        return self.__dict__ | away

    def __call__(self, config: Any) -> Any:
        """Run the trial of a config that Hydra composed, or go on with it where its job is queued again."""
        prepare_streams()  # of a launcher's process, which has begun with others than the command's
        job = self.place(self.composing.job(config))
        number = received()
        if number is not None:
            assert job.number is not None
            return self.returned(
                Trial(job.number, job.settings, state="stopped", exit_status=128 + number)
            )
        earlier = self.earlier(job)
        if earlier is not None and earlier.config == fingerprint(job.spec.tree):
            job.spec = replace(job.spec, resume="auto")
        trial = self.run(job)
        if (
            trial.exit_status == 128 + signal.SIGTERM
            and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        ):
            sys.exit(
                trial.exit_status
            )  # without a result: submitit then waits for SLURM, which queues the job again
        return self.returned(trial)

    def returned(self, trial: Trial) -> Any:
        return trial.metrics.get(next(iter(self.by)), math.nan) if self.gives_value else trial

    def jobs(self, overrides: Iterable[Sequence[str]], first: int) -> list[Job]:
        """Return the jobs for these overrides, numbered from `first` on. Raises ConfigError."""
        assert self.composer is not None
        numbered = enumerate(overrides, first)
        return [
            self.ready[n] if n in self.ready else self.place(self.composer.job(each, n))
            for n, each in numbered
        ]

    def place(self, job: Job) -> Job:
        """Give a job its number among the trials, and its run a folder in that of the sweep."""
        path, run = self.folder.path, job.spec.sections["run"]
        assert job.number is not None
        job.number, job.sweep, job.experiment = (
            self.numbers.get(job.number, job.number),
            path,
            path.name,
        )
        run |= {"name": run["name"] or run_name(job.number, job.settings), "root": path.parent}
        job.spec.tree["run"] = {"root": str(path.parent), "name": run["name"]}
        return job

    def run(self, job: Job) -> Trial:
        """Train a job as a trial, unless that is done; what goes wrong is in its row."""
        earlier = self.finished(job)
        if earlier is not None:
            return earlier
        trial, began = self.begin(job), time.monotonic()
        try:
            with isolated(), Output(self.folder.path / trial.folder, self.show()).capturing():
                result = self.task(job)
        except Exception as error:
            if job.traceback:
                print_traceback(error)
            return self.end(self.failed(trial, error, time.monotonic() - began))
        except BaseException:  # a second signal, or one before the training
            self.end(
                replace(
                    trial, state="stopped", seconds=total_seconds(trial, time.monotonic() - began)
                )
            )
            raise
        return self.end(outcome(trial, result))

    def finished(self, job: Job) -> Trial | None:
        """Return the row of a trial that is over, with the same config."""
        row = None if job.spec.resume == "never" else self.earlier(job)
        return (
            row
            if row is not None and row.over and row.config == fingerprint(job.spec.tree)
            else None
        )

    def earlier(self, job: Job) -> Trial | None:
        """Return the row of a job's trial, if it has begun before."""
        return next((row for row in self.folder.trials() if row.number == job.number), None)

    def begin(self, job: Job) -> Trial:
        """Record that a trial begins."""
        assert job.number is not None
        name = str(job.spec.sections["run"]["name"])
        cut_off = None if job.spec.resume == "never" else self.earlier(job)
        seconds = 0.0 if cut_off is None else cut_off.seconds
        trial = Trial(
            job.number, job.settings, name, seconds=seconds, config=fingerprint(job.spec.tree)
        )
        self.folder.record(trial)
        self.show().begins(trial)
        return trial

    def failed(self, trial: Trial, error: Exception, seconds: float) -> Trial:
        """Return the row of a trial that failed; one that failed of a full disk is left for a resumed sweep."""
        state: State = "stopped" if isinstance(error, DiskFull) else "failed"
        status = error.exit_status if isinstance(error, FrameworkError) else 1
        said = "; ".join(self.explain(error))
        return replace(
            trial,
            state=state,
            error=said,
            exit_status=status,
            seconds=total_seconds(trial, seconds),
        )

    def end(self, trial: Trial) -> Trial:
        """Record how a trial ended, and point to the best so far."""
        self.folder.record(trial)
        best = best_trial(self.folder.trials(), self.by)
        if best is not None:
            self.folder.link_best(best)
        self.show().ends(trial)
        return trial

    def show(self) -> Shown:
        return self.shown or Lines(self.by)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the trials at the terminal, from the moment that they run."""
        if self.shown is not None:
            yield
            return
        self.shown = display(self.by, self.folder.trials(), self.planned)
        try:
            yield
        finally:
            self.shown.close()
            self.shown = None


def outcome(trial: Trial, result: Result | None) -> Trial:
    """Return the row of a trial whose training came back."""
    if result is None:
        return replace(trial, state="done")
    numbers: dict[str, Any] = {"metrics": dict(result.metrics), "steps": result.steps}
    numbers["seconds"] = total_seconds(trial, result.seconds)
    if result.signal is not None:
        return replace(trial, state="stopped", exit_status=128 + result.signal, **numbers)
    pruned = result.stopped is not None and result.stopped.by == PRUNE
    return replace(trial, state="pruned" if pruned else "done", **numbers)


def total_seconds(trial: Trial, seconds: float) -> float:
    """Return how long a trial took, together with what it took before it was cut off."""
    return round(trial.seconds + seconds, 3)


def composed(trials: Trials, overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Compose every job of a sweep without running any. Raises ConfigError with all their problems."""
    assert trials.composer is not None
    problems: dict[str, None] = {}
    jobs: list[Job] = []
    for number, each in enumerate(overrides):
        try:
            jobs.append(trials.composer.job(each, number))
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    names = [str(job.spec.sections["run"]["name"]) for job in jobs]
    taken = next((name for name in names if name != "None" and names.count(name) > 1), None)
    if taken is not None:
        problems[
            f"run.name={taken}: each job of a sweep needs a folder of its own: leave the name out"
        ] = None
    problems.update(dict.fromkeys(identical_trials(jobs)))
    if problems:
        raise ConfigError(problems)
    return jobs


def identical_trials(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield which trials train the same: they would count as independent, in the mean over seeds for instance."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(fingerprint(job.spec.tree), []).append(job)
    for first, *others in found.values():
        labels = list(dict.fromkeys(job.label for job in (first, *others)))
        if others and len(labels) == 1:
            yield f"{first.label or 'the experiment'} is given {1 + len(others)} times: give each value once"
        elif others:
            yield f"{' and '.join(labels[:3])} are one experiment: what differs has no effect"
