"""Launchers that train many trials as one where they can, and the others one by one."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
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
from framework.registry.schema import PositiveInt
from framework.runtime.memory import OutOfMemory, free_bytes, is_full
from framework.system.files import check_exists
from framework.system.signals import received, stopping
from framework.training.layer_table import read_layers

from ..sweep.display import Elsewhere, Output
from ..sweep.folder import Trial
from ..sweep.isolation import isolated
from ..sweep.launcher import OneByOne
from ..sweep.trials import outcome
from .processes import bins, most_processes, shared_out
from .stacked_update import NotStackable
from .trainer import StackedTrainer

APART = (
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
"""What each trial of a group may have of its own, whole sections."""
STRICT = ("data", "loader", "trainer")  # where a number decides what is computed
LIMITS = ("max_epochs", "max_steps")
A_PROCESS = 8  # trials that one is worth, if nobody asked for it


@dataclass
class Ready:
    """A trial that is built."""

    place: int  # among the jobs
    job: Job
    prepared: Prepared
    row: Trial | None = None


@dataclass
class Share:
    """Jobs of one group, and their data when it is there."""

    jobs: dict[int, Job]  # by their places
    data: Data | None = None


class Vectorized(OneByOne):
    """Trains trials of one architecture, which differ in numbers and seeds, as one stacked model."""

    at_once = 8  # trials that a search asks for, before it knows of their results

    def __init__(
        self, most: PositiveInt = 256, fewest: PositiveInt = 2, processes: PositiveInt | None = None
    ):
        """Say how many trials may train as one.

        Args:
            most: trials at once, if memory allows.
            fewest: trials of a group below which they train one by one.
            processes: that trials are shared out to; by default as many as there are cores for models that one core
                suits, eight trials for each at least, and without an accelerator; else this one.
        """
        self.most, self.fewest, self.processes = most, fewest, processes
        self.beside = 1  # processes that share the memory

    def run(self, jobs: list[Job]) -> list[Trial]:
        """Run jobs, group by group, until a signal; the rows come in the order of the jobs."""
        rows = {
            place: row
            for place, job in enumerate(jobs)
            if (row := self.trials.finished(job)) is not None
        }
        found = [{place: jobs[place] for place in group} for group in groups(jobs, rows)]
        left, worth = len(jobs) - len(rows), self.fewest if self.processes else A_PROCESS
        number = min(self.processes or most_processes(), left // worth)
        rows |= self._apart(found, number) if number > 1 else {}
        for group in found:
            rows |= self._here(
                Share({place: job for place, job in group.items() if place not in rows}), rows
            )
        return [rows[place] for place in sorted(rows)]

    def _apart(self, found: Sequence[dict[int, Job]], number: int) -> dict[int, Trial]:
        """Run groups in so many processes; returns the rows of those for which that is right."""
        most = math.ceil(sum(map(len, found)) / number)
        shares = [share for group in found for share in self._shares(group, most)]
        filled = [
            [shares[place] for place in each]
            for each in bins([len(share.jobs) for share in shares], number)
        ]
        if len(filled) < 2:
            return {}
        works = [partial(self._process, each, len(filled)) for each in filled]
        rows: dict[int, Trial] = {}
        for each, ended in zip(filled, shared_out(works, self.trials.show()), strict=True):
            rows |= ended or {}
            if ended is None and received() is None:
                print_note("a process died: its trials go on in this one")
                for job in (job for share in each for job in share.jobs.values()):
                    job.spec = replace(job.spec, resume="auto")  # its run folder may be there
        return rows

    def _shares(self, jobs: dict[int, Job], most: int) -> list[Share]:
        """Cut a group into shares of so many trials or fewer; into none where a trial has use for more than one core,
        and the number of processes was not asked for.
        """
        first, places = next(iter(jobs.values())), list(jobs)
        number = math.ceil(len(jobs) / most)
        try:
            data = build_data(first.spec)
            if self.processes is None and Experiment(first.spec, data).threads() > 1:
                return []
        except Exception:  # it is told when the trial is built to train
            return []
        return [
            Share({place: jobs[place] for place in places[one::number]}, data)
            for one in range(number)
        ]

    def _process(self, shares: Sequence[Share], beside: int, shown: Elsewhere) -> dict[int, Trial]:
        """Run jobs in a process that is for them, one of so many."""
        self.trials.shown, self.beside = shown, beside
        rows: dict[int, Trial] = {}
        for share in shares:
            rows |= self._here(share, rows)
        return rows

    def _here(self, share: Share, before: Mapping[int, Trial]) -> dict[int, Trial]:
        """Run jobs of one group in this process, as one, and those with which that did not work one by one; none after
        a signal."""
        rows: dict[int, Trial] = {}
        places = list(share.jobs)
        for start in range(0, len(places), self.most):
            part = {place: share.jobs[place] for place in places[start : start + self.most]}
            if len(part) >= self.fewest and not is_over({**before, **rows}):
                rows |= self._together(part, share.data)
            for place in (each for each in part if each not in rows):
                if is_over({**before, **rows}):
                    break
                rows[place] = self.trials.run(part[place])
        return rows

    def _together(self, jobs: dict[int, Job], data: Data | None) -> dict[int, Trial]:
        """Train jobs as one; returns the rows of those that were. What stands in the way is said."""
        rows: dict[int, Trial] = {}
        ready: list[Ready] = []
        try:
            with isolated(), Output(self.trials.folder.path, self.trials.show()).capturing():
                ready = self._prepare(jobs, rows, data)
                at_once = max(room(ready[0].prepared) // self.beside, self.fewest) if ready else 1
                for alike in at_the_same_step(ready):
                    for start in range(0, len(alike) if len(alike) >= self.fewest else 0, at_once):
                        if is_over(rows):
                            return rows
                        self._train(alike[start : start + at_once], rows)
        except (NotStackable, OutOfMemory) as why:
            go = "go on" if any(each.row for each in ready) else "train"
            told = "memory is full" if isinstance(why, OutOfMemory) else why
            print_note(f"{len(jobs.keys() - rows)} trials {go} one by one: {told}")
        except (
            Exception
        ) as error:  # of the step that they take together: it is each one's row by now
            if not any(each.row for each in ready):
                print_note(f"{len(jobs)} trials train one by one: {describe(error)}")
            elif not all(each.place in rows for each in ready if each.row is not None):
                raise
        finally:
            for each in ready:
                each.prepared.release()
        return rows

    def _prepare(
        self, jobs: dict[int, Job], rows: dict[int, Trial], data: Data | None
    ) -> list[Ready]:
        """Build the trials; the rows of those that cannot be, or need not be, are set."""
        ready = []
        for place, job in jobs.items():
            try:
                if data is None:
                    data = build_data(job.spec)
                made = prepare_run(
                    job.spec, job.experiment, job.overrides, inexact=job.inexact, data=data
                )
            except Exception as error:
                rows[place] = self.trials.end(
                    self.trials.failed(self.trials.begin(job), error, 0.0)
                )
                continue
            if isinstance(made, Result):
                rows[place] = self.trials.end(outcome(self.trials.begin(job), made))
            else:
                ready.append(Ready(place, job, made))
        return ready

    def _train(self, ready: list[Ready], rows: dict[int, Trial]) -> None:
        """Train what is built as one, and set its rows. Raises NotStackable before anything of it is on the disk."""
        trainers = [each.prepared.trainer for each in ready]
        with ExitStack() as opened, stopping(trainers) as signals:
            ended = partial(self._ended, ready, rows, signals)
            stacked = StackedTrainer(
                trainers, [each.prepared.fit_arguments() for each in ready], ended
            )
            layers: str | None = None
            check_exists(self.trials.folder.path)
            try:
                for each in ready:
                    each.prepared.claim()
                    each.row = self.trials.begin(each.job)
                    opened.enter_context(each.prepared.trainer)
                    layers = each.prepared.log_start(layers)
            except RunError as error:  # of a full disk: each trial tells it for itself
                for each in (each for each in ready if each.row is not None):
                    each.job.spec = replace(each.job.spec, resume="auto")
                raise NotStackable(str(error)) from error
            stacked.run()

    def _ended(
        self,
        ready: Sequence[Ready],
        rows: dict[int, Trial],
        signals: list[int],
        number: int,
        error: Any,
    ) -> None:
        """Record how a trial ended, after its last measurements; not of one that cannot go on among the others."""
        each = ready[number]
        assert each.row is not None
        if isinstance(error, NotStackable) or (error is not None and is_full(error)):
            each.job.spec = replace(
                each.job.spec, resume="auto"
            )  # it goes on alone, in the folder that is there
            return
        try:
            if error is not None:
                raise error
            result = each.prepared.result(signals)
            result.seconds /= len(ready)  # its share of the time of all, so that the sum is right
            row = outcome(each.row, result)
        except Exception as failed:
            each.prepared.record_failure()
            row = self.trials.failed(each.row, failed, each.prepared.trainer.state.wall_seconds)
        rows[each.place] = self.trials.end(row)


class Auto(Vectorized):
    """Trains trials as one where that pays: eight or more of them."""

    def __init__(
        self, most: PositiveInt = 256, fewest: PositiveInt = 8, processes: PositiveInt | None = None
    ):
        """Say how many trials may train as one.

        Args:
            most: trials at once, if memory allows.
            fewest: trials of a group below which they train one by one.
            processes: as for the launcher `vectorized`.
        """
        super().__init__(most, fewest, processes)


def at_the_same_step(ready: Sequence[Ready]) -> Iterator[list[Ready]]:
    """Yield the trials that go on after the same step, as those of a sweep that was cut off may not."""
    steps = [each.prepared.trainer.state.step for each in ready]
    for step in sorted(set(steps)):
        yield [each for each, own in zip(ready, steps, strict=True) if own == step]


def is_over(rows: dict[int, Trial]) -> bool:
    """Return whether no more trials should begin, because of a signal."""
    return received() is not None or any(row.state == "stopped" for row in rows.values())


def groups(jobs: Sequence[Job], without: Any = ()) -> list[list[int]]:
    """Return the places of jobs that may train as one; whether they can, `StackedTrainer` finds out."""
    found: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        if place not in without:
            found.setdefault(form(job.spec.tree), []).append(place)
    return list(found.values())


def told(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a line on how many trials there are, and one on each group: its size, what is its own, what can be done."""
    found = groups(jobs)
    yield f"{len(jobs)} trials in {len(found)} group{'s' * (len(found) > 1)} for hydra/launcher=vectorized"
    for places in found:
        own = [jobs[place].settings for place in places]
        common = {
            key: value
            for key, value in own[0].items()
            if all(each.get(key) == value for each in own)
        }
        apart = {
            key: value
            for key, value in common.items()
            if any(job.settings.get(key) != value for job in jobs)
        }
        named = " ".join(f"{key}={value}" for key, value in apart.items())
        yield f"{len(places):>4}  {manner([jobs[place] for place in places]):<12}{named}".rstrip()


def manner(jobs: Sequence[Job]) -> str:
    """Return how the trials of a group can train, found out with two of them."""
    if len(jobs) < 2:
        return "alone"
    data = build_data(jobs[0].spec)
    ready = [
        prepare_run(replace(job.spec, resume="never"), job.experiment, [], data=data)
        for job in (jobs[0], jobs[-1])
    ]
    try:
        pairs = [
            (each.trainer, each.fit_arguments()) for each in ready if isinstance(each, Prepared)
        ]
        StackedTrainer([trainer for trainer, _ in pairs], [fit for _, fit in pairs])
    except NotStackable as why:
        return f"one by one: {why} "
    return "as one"


def form(tree: dict[str, Any]) -> str:
    """Return what the configs of a group have in common, as a text."""
    common = {
        key: tree[key] if key in STRICT else without_numbers(tree[key])
        for key in tree.keys() - {*APART}
    }
    common["trainer"] = {key: value for key, value in tree["trainer"].items() if key not in LIMITS}
    return json.dumps(common, sort_keys=True, default=str)


def without_numbers(value: Any) -> Any:
    """Return a part's settings without their numbers, but for counts, which decide on shapes."""
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_numbers(each) for each in value]
    return "a number" if isinstance(value, float) else value


def room(prepared: Prepared) -> int:
    """Return for how many such trials there is memory: for weights, gradients, what the optimizer keeps and copies,
    and for each layer's output, its gradient and a copy."""
    built, device = prepared.built, prepared.trainer.device
    batch = first_batch(built.train_batches)
    layers, _ = read_layers(built.model, batch, built.task)
    numbers = sum(math.prod(layer.out_shape) for layer in layers) * len(batch[0])
    numbers += 2 * sum(parameter.numel() for parameter in built.model.parameters())
    free = free_bytes(device)
    return 2**31 if free is None else max(int(0.8 * free / (12 * max(numbers, 1))), 1)
