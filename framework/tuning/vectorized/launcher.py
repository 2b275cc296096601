"""Launchers that train trials as one stacked model if possible, and the others one by one."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from framework.composition.compose import Job
from framework.data.dataset import Data
from framework.errors import RunError
from framework.errors.terminal import print_note
from framework.errors.user_code import describe
from framework.experiment.build import build_data
from framework.experiment.experiment import Experiment, Prepared, prepare_run
from framework.experiment.log_start import first_batch
from framework.experiment.result import Result
from framework.registry.annotations import PositiveInt
from framework.runs.sweep_files import Trial
from framework.runtime.batch import count_rows
from framework.runtime.memory import OutOfMemory, free_bytes, is_full
from framework.system.files import check_exists
from framework.system.signals import received, stopping
from framework.training.layer_table import read_layers
from framework.tuning.sweep.display import ForwardingDisplay, OutputCapture
from framework.tuning.sweep.isolation import isolated
from framework.tuning.sweep.launcher import OneByOne
from framework.tuning.sweep.trial_runner import outcome

from .processes import partition, run_in_processes, usable_processes
from .stacked_update import NotStackable
from .trainer import StackedTrainer

PER_TRIAL = (
    "seed",
    "run",
    "initializer",
    "scheduler",
    "loggers",
    "resume",
    "init_from",
    "plugins",
    "sweep",
)
"""Sections that may differ between the trials of a group."""
EQUAL_NUMBERS = ("data", "loader", "trainer")
"""Sections in which also numbers must be equal in a group."""
LIMITS = ("max_epochs", "max_steps")
TRIALS_PER_PROCESS = 8  # at least, if the number of processes is chosen automatically
UNLIMITED = 2**31
MEMORY_SHARE = 0.8  # of the free memory
BYTES_PER_NUMBER = 12  # a float32 and two more of its kind, see `memory_capacity`


@dataclass
class PreparedTrial:
    """A trial that is built."""

    index: int  # of its job
    job: Job
    prepared: Prepared
    row: Trial | None = None  # once it has started

    def resume_alone(self) -> None:
        """Let the trial continue one by one, in its run folder."""
        self.job.spec = replace(self.job.spec, resume="auto")


@dataclass
class JobGroup:
    """Jobs that may train as one stacked model, and their data if it is loaded."""

    jobs: dict[int, Job]  # by index
    data: Data | None = None


class Vectorized(OneByOne):
    """Trains trials of one architecture that differ in numbers and seeds as one stacked model."""

    default_parallel = 8  # trials that a search proposes at once

    def __init__(
        self, most: PositiveInt = 256, fewest: PositiveInt = 2, processes: PositiveInt | None = None
    ):
        """Set the numbers of trials and processes.

        Args:
            most: maximum number of stacked trials, if memory allows.
            fewest: minimum number of stacked trials; smaller groups train one by one.
            processes: number of processes that share the trials; null: without an accelerator, and
                for models that use one core, one for each core and at least eight trials;
                otherwise one.
        """
        self.most = most
        self.fewest = fewest
        self.processes = processes
        self.sharing_memory = 1  # number of processes

    def run(self, jobs: list[Job]) -> list[Trial]:
        """Run jobs, group by group, until a signal; the rows are in the order of the jobs."""
        rows: dict[int, Trial] = {}
        for index, job in enumerate(jobs):
            row = self.runner.finished_row(job)
            if row is not None:
                rows[index] = row
        groups = find_groups(jobs, rows)
        per_process = self.fewest if self.processes else TRIALS_PER_PROCESS
        number = min(self.processes or usable_processes(), (len(jobs) - len(rows)) // per_process)
        if number > 1 and not any(map(has_processes, jobs)):
            rows |= self._run_in_processes(groups, number)
        for group in groups:
            rest = {index: job for index, job in group.items() if index not in rows}
            rows |= self._run_group(JobGroup(rest), rows)
        return [rows[index] for index in sorted(rows)]

    def _run_in_processes(self, groups: Sequence[dict[int, Job]], number: int) -> dict[int, Trial]:
        """Run the groups that suit several processes; return the rows of their trials."""
        size = math.ceil(sum(map(len, groups)) / number)
        parts: list[JobGroup] = []
        for group in groups:
            parts += self._split(group, size)
        shares: list[list[JobGroup]] = []  # by process
        for indices in partition([len(part.jobs) for part in parts], number):
            share = [parts[index] for index in indices]
            shares.append(share)
        if len(shares) < 2:
            return {}
        works = [partial(self._run_share, share, len(shares)) for share in shares]
        results = run_in_processes(works, self.runner.active_display())
        rows: dict[int, Trial] = {}
        for share, share_rows in zip(shares, results, strict=True):
            if share_rows is not None:
                rows |= share_rows
            elif received() is None:
                print_note("a worker process died; its trials continue in the main process")
                for part in share:
                    for job in part.jobs.values():
                        job.spec = replace(job.spec, resume="auto")  # its run folder may exist
        return rows

    def _split(self, jobs: dict[int, Job], size: int) -> list[JobGroup]:
        """Split a group into parts of at most `size` trials.

        It gives no parts if the number of processes is chosen automatically and a trial uses more
        than one core.
        """
        first = next(iter(jobs.values()))
        indices = list(jobs)
        number = math.ceil(len(jobs) / size)
        try:
            data = build_data(first.spec)
            if self.processes is None and Experiment(first.spec, data).threads() > 1:
                return []
        except Exception:  # reported when the trial is built for training
            return []
        parts = []
        for start in range(number):
            part = {index: jobs[index] for index in indices[start::number]}
            parts.append(JobGroup(part, data))
        return parts

    def _run_share(
        self, parts: Sequence[JobGroup], processes: int, display: ForwardingDisplay
    ) -> dict[int, Trial]:
        """Run the parts of one of several processes, in that process."""
        self.runner.display = display
        self.sharing_memory = processes
        rows: dict[int, Trial] = {}
        for part in parts:
            rows |= self._run_group(part, rows)
        return rows

    def _run_group(self, group: JobGroup, earlier: Mapping[int, Trial]) -> dict[int, Trial]:
        """Run a group in this process, stacked if possible, until a signal.

        Args:
            group: the jobs, which may train as one.
            earlier: rows of other groups.
        """
        rows: dict[int, Trial] = {}
        indices = list(group.jobs)
        for start in range(0, len(indices), self.most):
            part = {index: group.jobs[index] for index in indices[start : start + self.most]}
            if len(part) >= self.fewest and not is_stopped({**earlier, **rows}):
                rows |= self._train_stacked(part, group.data)
            for index, job in part.items():
                if index in rows:
                    continue
                if is_stopped({**earlier, **rows}):
                    break
                rows[index] = self.runner.run(job)
        return rows

    def _train_stacked(self, jobs: dict[int, Job], data: Data | None) -> dict[int, Trial]:
        """Train jobs as one stacked model.

        Returns:
            The rows of the jobs that were trained; a note gives the reason for the others.
        """
        rows: dict[int, Trial] = {}
        trials: list[PreparedTrial] = []
        capture = OutputCapture(self.runner.folder.path, self.runner.active_display())
        try:
            with isolated(), capture.capturing():
                trials = self._prepare(jobs, rows, data)
                for group in self._groups_that_fit_in_memory(trials):
                    if is_stopped(rows):
                        return rows
                    self._train(group, rows)
        except (NotStackable, OutOfMemory) as error:
            action = "continue" if any(trial.row for trial in trials) else "train"
            reason = "memory is full" if isinstance(error, OutOfMemory) else error
            print_note(f"{len(jobs.keys() - rows)} trials {action} one by one: {reason}")
        except Exception as error:
            started = [trial for trial in trials if trial.row is not None]
            if not started:
                print_note(f"{len(jobs)} trials train one by one: {describe(error)}")
            elif not all(trial.index in rows for trial in started):
                raise  # otherwise an error of the common step, recorded for each trial
        finally:
            for trial in trials:
                trial.prepared.release()
        return rows

    def _prepare(
        self, jobs: dict[int, Job], rows: dict[int, Trial], data: Data | None
    ) -> list[PreparedTrial]:
        """Build the trials; set the rows of those that fail, or have nothing left to train."""
        trials = []
        for index, job in jobs.items():
            try:
                if data is None:
                    data = build_data(job.spec)
                prepared = prepare_run(
                    job.spec, job.experiment, job.overrides, inexact=job.inexact, data=data
                )
            except Exception as error:
                failed = self.runner.failed(self.runner.start(job), error, 0.0)
                rows[index] = self.runner.finish(failed)
                continue
            if isinstance(prepared, Result):
                rows[index] = self.runner.finish(outcome(self.runner.start(job), prepared))
            else:
                trials.append(PreparedTrial(index, job, prepared))
        return trials

    def _groups_that_fit_in_memory(
        self, trials: Sequence[PreparedTrial]
    ) -> Iterator[Sequence[PreparedTrial]]:
        """Yield trials to stack: as many as fit in memory, all of them at the same step."""
        if not trials:
            return
        capacity = memory_capacity(trials[0].prepared) // self.sharing_memory
        size = max(capacity, self.fewest)
        by_step: dict[int, list[PreparedTrial]] = {}  # they differ in a resumed sweep
        for trial in trials:
            by_step.setdefault(trial.prepared.trainer.state.step, []).append(trial)
        for step in sorted(by_step):
            group = by_step[step]
            if len(group) >= self.fewest:
                for start in range(0, len(group), size):
                    yield group[start : start + size]

    def _train(self, trials: Sequence[PreparedTrial], rows: dict[int, Trial]) -> None:
        """Train built trials as one and set their rows.

        Raises:
            NotStackable: they cannot be trained as one; nothing is written to disk by then.
        """
        trainers = [trial.prepared.trainer for trial in trials]
        fits = [trial.prepared.fit_arguments() for trial in trials]
        with ExitStack() as opened, stopping(trainers) as signals:
            ended = partial(self._record, trials, rows, signals)
            stacked = StackedTrainer(trainers, fits, ended)
            layers: str | None = None
            check_exists(self.runner.folder.path)
            try:
                for trial in trials:
                    trial.prepared.claim()
                    trial.row = self.runner.start(trial.job)
                    opened.enter_context(trial.prepared.trainer)
                    layers = trial.prepared.log_start(layers)
            except RunError as error:  # of a full disk: each trial reports it itself
                for trial in trials:
                    if trial.row is not None:
                        trial.resume_alone()
                raise NotStackable(str(error)) from error
            stacked.run()

    def _record(
        self,
        trials: Sequence[PreparedTrial],
        rows: dict[int, Trial],
        signals: list[int],
        number: int,
        error: BaseException | None,
    ) -> None:
        """Record how a trial ended, except one that continues alone.

        The trials have equal shares of their common time.
        """
        trial = trials[number]
        assert trial.row is not None
        if error is not None and (isinstance(error, NotStackable) or is_full(error)):
            trial.resume_alone()
            return
        try:
            if error is not None:
                raise error
            result = trial.prepared.result(signals)
            result.seconds /= len(trials)
            row = outcome(trial.row, result)
        except Exception as failure:
            trial.prepared.record_failure()
            seconds = trial.prepared.trainer.state.wall_seconds
            row = self.runner.failed(trial.row, failure, seconds / len(trials))
        rows[trial.index] = self.runner.finish(row)


class Auto(Vectorized):
    """Trains trials as one stacked model from eight trials on, and otherwise one by one."""

    def __init__(
        self, most: PositiveInt = 256, fewest: PositiveInt = 8, processes: PositiveInt | None = None
    ):
        """Set the numbers of trials and processes.

        Args:
            most: maximum number of stacked trials, if memory allows.
            fewest: minimum number of stacked trials; smaller groups train one by one.
            processes: as for the launcher `vectorized`.
        """
        super().__init__(most, fewest, processes)


def is_stopped(rows: Mapping[int, Trial]) -> bool:
    """Return whether no more trials should start, because of a signal."""
    return received() is not None or any(row.state == "stopped" for row in rows.values())


def find_groups(jobs: Sequence[Job], finished: Iterable[int] = ()) -> list[dict[int, Job]]:
    """Return the jobs that may train as one, by index.

    Whether they can is checked by `StackedTrainer`.

    Args:
        jobs: the jobs of a sweep.
        finished: indices of jobs to leave out.
    """
    skipped = set(finished)
    groups: dict[str, dict[int, Job]] = {}
    for index, job in enumerate(jobs):
        if index not in skipped:
            alone = f" {index}" if has_processes(job) else ""
            groups.setdefault(group_key(job.spec.tree) + alone, {})[index] = job
    return list(groups.values())


def has_processes(job: Job) -> bool:
    """Return whether a trial has several processes, which no other trial can share."""
    return (job.spec.tree["trainer"].get("devices") or 1) > 1


def describe_groups(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a line with the number of trials, and one for each group.

    That has the number of trials, how they train, and the settings that only this group has.
    """
    groups = [list(group.values()) for group in find_groups(jobs)]
    plural = "s" if len(groups) > 1 else ""
    yield f"{len(jobs)} trials in {len(groups)} group{plural} for hydra/launcher=vectorized"
    for group in groups:
        texts = []
        for key, value in group[0].settings.items():
            is_common = all(job.settings.get(key) == value for job in group)
            if is_common and any(job.settings.get(key) != value for job in jobs):
                texts.append(f"{key}={value}")
        yield f"{len(group):>4}  {describe_training(group):<12}{' '.join(texts)}".rstrip()


def describe_training(jobs: Sequence[Job]) -> str:
    """Return how the trials of a group train, found out with two of them."""
    if len(jobs) < 2:
        return "alone"
    data = build_data(jobs[0].spec)
    trainers = []
    fits = []
    for job in (jobs[0], jobs[-1]):
        spec = replace(job.spec, resume="never")
        prepared = prepare_run(spec, job.experiment, [], data=data)
        if isinstance(prepared, Prepared):
            trainers.append(prepared.trainer)
            fits.append(prepared.fit_arguments())
    try:
        StackedTrainer(trainers, fits)
    except NotStackable as error:
        return f"one by one: {error} "
    return "as one"


def group_key(tree: dict[str, Any]) -> str:
    """Return the parts of a config that are equal in a group, as text."""
    common = {}
    for name in tree.keys() - set(PER_TRIAL):
        section = tree[name]
        common[name] = section if name in EQUAL_NUMBERS else without_numbers(section)
    trainer = tree["trainer"]
    common["trainer"] = {name: trainer[name] for name in trainer if name not in LIMITS}
    return json.dumps(common, sort_keys=True, default=str)


def without_numbers(value: Any) -> Any:
    """Return settings without real numbers; integers stay, as they determine shapes."""
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_numbers(each) for each in value]
    return "a number" if isinstance(value, float) else value


def memory_capacity(prepared: Prepared) -> int:
    """Return the number of stacked trials that fit in memory.

    Counted are weights, gradients, optimizer state and copies, and for each layer the output, its
    gradient and a copy.
    """
    built = prepared.built
    batch = first_batch(built.train_batches)
    layers, _ = read_layers(built.model, batch, built.task)
    outputs = sum(math.prod(layer.out_shape) for layer in layers) * count_rows(batch)
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    numbers = max(outputs + 2 * parameters, 1)
    free = free_bytes(prepared.trainer.device)
    if free is None:
        return UNLIMITED
    return max(int(MEMORY_SHARE * free / (BYTES_PER_NUMBER * numbers)), 1)
