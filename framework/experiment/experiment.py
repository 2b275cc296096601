"""Where names become objects: a checked Spec is built into parts, run in a folder, and read back from one."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framework.composition.spec import Spec
from framework.contracts.callback import SavingCallback, changes_training
from framework.contracts.optimizer import build_optimizer
from framework.contracts.task import Task
from framework.data.accumulation import count_steps, count_total
from framework.data.dataset import Data, Loader
from framework.errors import BuildError, RunError, short
from framework.errors.exits import no_exit
from framework.errors.terminal import print_message
from framework.errors.user_code import describe, user_errors
from framework.runs.folder import RunFolder, dump, provenance, read_facts
from framework.runs.status_file import Status
from framework.runtime.clock import slow_data
from framework.runtime.device import intra_op_threads, suitable_threads
from framework.system.signals import stopping
from framework.training.trainer import Trainer
from framework.training.trainer_state import WRONG_FORM
from framework.training.validation import (
    check_has_rate,
    check_loss_parameters,
    check_schedule,
    check_step_alone,
)

from .build import (
    build_data,
    build_groups,
    build_loader,
    build_metrics,
    build_model,
    check_output_shape,
    check_smallest_batch,
)
from .config_changes import fingerprint
from .find_run import find_run
from .log_start import first_batch, introduce
from .model_limits import model_limits
from .result import Result, earlier_result, which_weights
from .resume import Resumed, check_fits, check_optimizer, open_folder
from .run_facts import content_changes, fact_changes, facts_of
from .weights import load_weights, shapes, start_from

if TYPE_CHECKING:
    from .plan import Plan

UNSAVED = "no checkpoints are saved, so the run cannot be resumed or evaluated: +callbacks=checkpoint saves them"
DESCRIPTION = ("status.json", "facts.json", "overrides.yaml", "provenance.json", "config.yaml")
WATCHING = ("run", "plugins", "loggers", "metrics", "log_every", "validate_every", "device")


class Experiment:
    """The objects of a Spec: data, task, metrics, model, optimizer, schedule, trainer.

    Raises DataError or BuildError when parts do not fit each other.
    """

    @user_errors()
    def __init__(
        self, spec: Spec, data: Data | None = None, saved: Mapping[str, Sequence[int]] | None = None
    ):
        """Build the objects.

        Args:
            saved: the shapes of the tensors of a checkpoint, than which the model is not to be much larger.
        """
        self.spec = spec
        self.data = build_data(spec) if data is None else data
        self.task: Task = spec.parts["task"]()
        self.task.check(self.data)
        self.metrics = build_metrics(spec, self.data, self.task)
        self.out_shape = self.task.targets_of(self.data)[1]
        with nullcontext() if saved is None else model_limits(spec, saved):
            self.model = build_model(spec, self.data.in_shape, self.out_shape, self.data.columns)
        self.task.check_model(self.model)
        check_loss_parameters(self.task, self.model)
        check_output_shape(self.model, self.data, self.out_shape)
        self.optimizer = build_optimizer(spec.parts["optimizer"], build_groups(spec, self.model))
        check_step_alone(self.optimizer)
        self.transforms = [
            maker(self.data.in_shape, self.data.out_shape) for maker in spec.parts["transform"]
        ]
        self.train_batches = self.batches("train")
        limits = spec.sections["trainer"]
        parts = limits["micro_batch"] if isinstance(limits["micro_batch"], int) else None
        check_smallest_batch(self.model, self.train_batches, parts)
        self.status = Status()
        self.steps_per_epoch = count_steps(self.train_batches, limits["accumulate"])
        self.total_steps = count_total(
            self.steps_per_epoch, limits["max_epochs"], limits["max_steps"]
        )
        scheduler = spec.parts["scheduler"]
        self.schedule = None
        if scheduler is not None:
            check_has_rate(self.optimizer)
            self.schedule = scheduler(self.total_steps)
            if not callable(self.schedule):
                said = f"expected a function from the step to a factor, got {short(self.schedule)}"
                raise BuildError(f"{scheduler.entry} ({scheduler.entry.registered}): {said}")
        check_schedule(self.schedule, self.data.val is not None)

    def batches(self, split: str) -> Loader:
        """Return the reader of a split. Raises DataError when the data has none of that name."""
        return build_loader(self.spec, self.model, self.data, split, shuffle=split == "train")

    def trainer(self) -> Trainer:
        """Return the trainer; it has no folder yet."""
        parts = self.spec.parts
        trainer = Trainer(
            **self.spec.sections["trainer"],
            seed=self.spec.seed,
            callbacks=[*self.transforms, *(maker() for maker in parts["callback"]), self.status],
            loggers=[maker() for maker in parts["logger"]],
        )
        trainer.metrics = self.metrics  # loggers are opened before `fit` and want their names
        return trainer

    def threads(self) -> int:
        """Return how many threads an operation on the CPU may use."""
        loader, shape = self.spec.sections["loader"], self.data.in_shape
        tokens = len(shape) == 1 and not torch.as_tensor(self.data.train[0][0]).is_floating_point()
        features = (
            1 if tokens else shape[0] if len(shape) == 3 else shape[-1]
        )  # images have theirs first
        rows = loader["batch_size"] * math.prod(shape) // features
        return suitable_threads(self.model, rows, loader["workers"])

    def plan(self) -> "Plan":
        """Return what a run would be, without training."""
        from .plan import make_plan  # not at the top: a run does without tables

        made = make_plan(
            self.model,
            first_batch(self.train_batches),
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            data=self.data,
            threads=self.threads(),
            loader=self.train_batches.manner,
            transforms=[repr(maker).partition("/")[2] for maker in self.spec.parts["transform"]],
        )
        trainer = self.trainer()
        made.batches_per_step = trainer.accumulate
        for callback in trainer.callbacks:
            pace = callback.pace(trainer, len(self.train_batches))
            if pace is not None:
                made.follow(pace, self.optimizer, self.schedule)
        return made


@dataclass
class Prepared:
    """An experiment that is built. A new run has no folder until it is claimed, so that a failure leaves none."""

    built: Experiment
    trainer: Trainer
    threads: int
    resumed: Resumed | None
    experiment: str
    overrides: list[str]
    started: float
    folder: RunFolder | None = None

    def claim(self) -> Path:
        """Make the run's folder, unless it is resumed, and describe in it what will run."""
        spec = self.built.spec
        if self.resumed is None:
            folder = RunFolder(**spec.sections["run"], experiment=self.experiment)
            try:
                self.trainer.folder = folder.path
                self.built.status.claim(self.trainer)
                describe_run(folder, self.built, self.overrides)
            except BaseException:
                discard_run(folder)
                raise
        else:
            folder = self.resumed.folder
            self.resumed.rewind()
            if self.resumed.changed:
                folder.write("config.yaml", spec.tree)
        self.folder, self.trainer.folder = (
            folder,
            folder.path,
        )  # the lock lives as long as the object
        manifest = {
            "run": str(folder.path),
            "config": fingerprint(spec.tree),
            "threads": self.threads,
        }
        self.trainer.manifest = manifest
        return folder.path

    def tell_failure(self) -> None:
        """Write into status.json what the run fails of, in the handler of an error before or after the training."""
        if self.folder is not None:
            self.built.status.on_exception(self.trainer)

    def fit_arguments(self) -> dict[str, Any]:
        """What `Trainer.fit` takes."""
        built = self.built
        return {
            "model": built.model,
            "data": built.train_batches,
            "val": None if built.data.val is None else built.batches("val"),
            "task": built.task,
            "optimizer": built.optimizer,
            "schedule": built.schedule,
            "metrics": built.metrics,
            "batch_size": built.train_batches.batch_size,
            "resume": None if self.resumed is None else self.resumed.training,
        }

    def release(self) -> None:
        """Let another process, or another object of this one, write into the run's folder."""
        folder = self.resumed.folder if self.resumed is not None else self.folder
        if folder is not None:
            folder.lock.close()

    def introduce(self, layers: str | None = None) -> str | None:
        """Show the loggers what runs, if it has not run before. layers, and what is returned: see `introduce`."""
        if self.trainer.state.step != 0:
            return layers
        built = self.built
        given = self.trainer.loggers, built.spec.tree, built.model, built.task, built.train_batches
        return introduce(*given, layers)

    @no_exit()
    def result(self, stopped: Sequence[int] = ()) -> Result:
        """After the training, measure what is to be measured. stopped: the signals that came."""
        trainer, state = self.trainer, self.trainer.state
        assert trainer.folder is not None
        result = Result(trainer.folder, stopped=state.stop, steps=state.step)
        result.shares = trainer.clock.shares()
        if self.built.data.test is None:
            result.split = None if self.built.data.val is None else "val"
        result.fit_seconds = trainer.clock.elapsed
        result.fit_steps = state.step - (trainer.resumed_from or 0)
        result.advice = data_advice(self.built.train_batches, result.shares, result.fit_seconds)
        if trainer.validated_step > 0:
            result.weights["val"] = which_weights(trainer.validated_step, state.step)
        if state.stop is None or not stopped:
            measured = finish(trainer, self.built) or state.step
            if self.built.data.test is not None:
                result.weights["test"] = which_weights(measured, state.step)
        else:
            self.built.status.on_fit_end(trainer)  # again, for a signal that came after the fit
        result.signal = stopped[0] if stopped else None
        result.metrics = dict(state.metrics)
        result.seconds = time.monotonic() - self.started
        return result


@no_exit()
def train(*given: Any, **named: Any) -> Result:
    """Run what `prepare_run` builds of these arguments: fit, then measure the best checkpoint on the test split."""
    ready = prepare_run(*given, **named)
    if isinstance(ready, Result):
        return ready
    try:
        ready.claim()
        with ready.trainer, stopping([ready.trainer]) as stopped, intra_op_threads(ready.threads):
            ready.introduce()
            ready.trainer.fit(**ready.fit_arguments())
            return ready.result(stopped)
    except Exception:
        ready.tell_failure()
        raise
    finally:
        ready.release()


@no_exit()
def prepare_run(
    spec: Spec,
    experiment: str,
    overrides: Sequence[str],
    started: float | None = None,
    *,
    inexact: bool = False,
    say: Callable[[str], None] = print_message,
    data: Data | None = None,
) -> Prepared | Result:
    """Build an experiment, up to its training; a run that is done already has its result.

    With `resume` in the spec, it will go on with a run that was cut off, as if it had not been; a finished one stays as
    it is.
    started: when the process did, in seconds of `time.monotonic`. inexact: allow settings that make the rest of a
    resumed run differ. say: takes lines for the person who waits. data: that of the spec, if it is there already.
    """
    started = time.monotonic() if started is None else started
    run = find_run(spec, experiment)
    resumed = None if run is None else open_folder(run, spec, inexact)
    if resumed is not None and resumed.done:
        say(f"{run} is done already")
        resumed.folder.lock.close()
        return earlier_result(resumed.folder.path)
    if resumed is not None and spec.fold is not None:
        refit = "fold" in read_facts(resumed.folder.path)  # a run of an older version has none
        data = data if refit else build_data(spec, refit=False)
    saved = (
        None if resumed is None or resumed.training is None else shapes(resumed.training["model"])
    )
    built = Experiment(spec, data, saved)
    if spec.init_from is not None and resumed is None:
        say(start_from(built.model, spec.init_from))
    trainer, threads = built.trainer(), built.threads()
    if not any(isinstance(callback, SavingCallback) for callback in trainer.callbacks):
        say(UNSAVED)
    if resumed is not None:
        check_same_data(resumed, built, inexact, say)
        try:
            check_fits(resumed, built.model, built.optimizer)
            check_optimizer(resumed, built.model, built.optimizer)
        except WRONG_FORM as error:
            path = resumed.folder.path
            raise RunError(
                f"{path} cannot go on: its checkpoint has another form: {describe(error)}"
            ) from error
        trainer.state.step = resumed.step  # loggers go on from there
        threads = resumed.threads or threads  # as many make the same bits
        for line in (
            f"going on with {resumed.folder.path} after step {resumed.step}",
            *resumed.notes,
        ):
            say(line)
        for line in schedule_notes(built, resumed):
            say(line)
    return Prepared(built, trainer, threads, resumed, experiment, list(overrides), started)


def schedule_notes(built: Experiment, resumed: Resumed) -> Iterator[str]:
    """Yield a line when a schedule that is laid out over the run follows its new length."""
    scheduler = built.spec.parts["scheduler"]
    if scheduler is None or built.schedule is None or 0 < built.total_steps <= resumed.step:
        return
    if not resumed.changes("trainer.max_epochs") and not resumed.changes("trainer.max_steps"):
        return
    limits = resumed.config["trainer"]
    before = count_total(built.steps_per_epoch, limits.get("max_epochs"), limits.get("max_steps"))
    old, new = scheduler(before), built.schedule
    span = max(before, built.total_steps)
    places = range(0, span, max(1, span // 1000))
    if all(old(step) == new(step) for step in places):
        return
    yield (
        f"scheduler={scheduler.entry.name} is laid out anew over {built.total_steps:,} steps "
        f"(was {before:,}): from step {resumed.step:,} on the learning rate is that of a run of the "
        "new length"
    )


def finish(trainer: Trainer, built: Experiment) -> Path | None:
    """Measure the best checkpoint on the test split; log the settings with the final metrics.

    Returns that checkpoint; None where there is none, or no test split.
    """
    assert trainer.folder is not None
    chosen = None
    if built.data.test is not None:
        chosen = load_weights(built.model, trainer.folder)
        trainer.evaluate(built.batches("test"))
    for logger in trainer.loggers:
        logger.hparams(hyperparameters(built.spec), trainer.state.metrics)
    built.status.done(trainer)
    return chosen


def data_advice(loader: Loader, shares: Mapping[str, float], seconds: float) -> str | None:
    """Say how to wait less for data, if that took much time and the data is not in memory.

    Args:
        loader: what the training batches came from.
        shares: of the time, by what it was spent on.
        seconds: the whole time of training.
    """
    share = slow_data(shares, seconds)
    if share is None or loader.in_memory:
        return None
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    ways = [f"loader.workers={max(cores, 2)} reads ahead"] if loader.workers < cores else []
    ways.append("loader.read=memory reads samples only once (of one shape, nothing random in them)")
    return f"{share:.0%} of the time waited for data: {'; '.join(ways)}"


def hyperparameters(spec: Spec) -> dict[str, Any]:
    """Return the settings that the outcome may depend on: not where a run lies, nor how it is watched."""
    kept = {key: value for key, value in spec.tree.items() if key not in WATCHING}
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in WATCHING}
    watching = [m.entry.name for m in spec.parts["callback"] if not changes_training(m.entry.part)]
    kept["callbacks"] = {
        name: value for name, value in kept["callbacks"].items() if name not in watching
    }
    return kept


def check_same_data(
    resumed: Resumed, built: Experiment, inexact: bool, say: Callable[[str], None]
) -> None:
    """Raise RunError when the data of a resumed run is not what it was.

    Other content at the same path, such as a picture that was repaired, is told only.
    """
    if inexact:
        return
    before = read_facts(resumed.folder.path)
    now = json.loads(dump("facts.json", facts_of(built.data, built.task, built.out_shape)))
    changed = list(fact_changes(before, now))
    other_content = list(content_changes(before.get("content"), now["content"]))
    if resumed.data_moved:
        changed += other_content
    if changed:
        said = (
            f"the data of {resumed.folder.path} has changed since it began ({'; '.join(changed)})"
        )
        raise RunError(f"{said}: --inexact goes on all the same")
    if other_content:
        say(f"the data has changed since the run began: {'; '.join(other_content)}")


def describe_run(folder: RunFolder, built: Experiment, overrides: list[str]) -> None:
    """Write what the run is made of, before it starts."""
    parts = [
        maker
        for made in built.spec.parts.values()
        for maker in (made if isinstance(made, list) else [made])
    ]
    sources = {str(maker.entry): str(maker.entry.source) for maker in parts if maker is not None}
    folder.write("facts.json", facts_of(built.data, built.task, built.out_shape))
    folder.write("overrides.yaml", overrides)
    loaded = {"plugins": built.spec.plugins, "without_plugins": built.spec.without}
    folder.write("provenance.json", provenance(sources) | loaded)
    folder.write(
        "config.yaml", built.spec.tree
    )  # the last one: with it there is a run to go on with


def discard_run(folder: RunFolder) -> None:
    """Remove what was written into the folder of a run that cannot begin; then the folder, if nothing else is in it."""
    folder.lock.close()
    with suppress(OSError):
        for name in (*DESCRIPTION, ".lock"):
            (folder.path / name).unlink(missing_ok=True)
        folder.path.rmdir()
