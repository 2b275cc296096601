"""Build the objects of a checked Spec, and run them in a folder."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.composition.spec import Spec
from framework.contracts.callback import SavingCallback, changes_training
from framework.contracts.direction import metric_directions
from framework.contracts.strategy import Strategy
from framework.contracts.task import Task
from framework.data.accumulation import count_steps, count_total
from framework.data.dataset import Data, Loader
from framework.errors import BuildError, RunError, short
from framework.errors.exits import no_exit
from framework.errors.terminal import print_message
from framework.errors.user_code import describe, user_errors
from framework.runs.folder import RunFolder, dump, provenance, read_facts
from framework.runs.status_file import Status
from framework.runtime.batch import count_rows
from framework.runtime.clock import slow_data
from framework.runtime.threads import intra_op_threads, suitable_threads
from framework.system.files import read_json
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
    build_loader,
    build_metrics,
    build_model,
    build_spec_optimizer,
    check_output_shape,
    check_smallest_batch,
    first_input,
    image_advice,
)
from .distributed import (
    agreed_signals,
    be_silent,
    check_alike,
    check_processes,
    connected,
    open_shared,
)
from .log_start import first_batch, log_run_start
from .model_limits import model_limits
from .result import Result, read_result, weights_label
from .resumption.config_changes import fingerprint, setting_leaves
from .resumption.find_run import find_run
from .resumption.resume import INEXACT_ADVICE, Resumed, check_exact, check_fits, check_optimizer
from .run_facts import content_changes, data_facts, fact_changes
from .steering import OptimizerSettings, Steering
from .weights import initialize_from, load_weights, shapes

if TYPE_CHECKING:
    from .plan import Plan

UNSAVED = (
    "no checkpoints are saved, so the run cannot be resumed or evaluated: "
    "+callbacks=checkpoint saves them"
)
DESCRIPTION = ("status.json", "facts.json", "overrides.yaml", "provenance.json", "config.yaml")
NO_HYPERPARAMETERS = (
    "run",
    "plugins",
    "loggers",
    "metrics",
    "log_every",
    "validate_every",
    "device",
)


class Experiment:
    """The objects of a Spec: data, task, metrics, model, optimizer, schedule, trainer."""

    @user_errors()
    def __init__(
        self, spec: Spec, data: Data | None = None, saved: Mapping[str, Sequence[int]] | None = None
    ):
        """Build the objects.

        Args:
            spec: the checked experiment.
            data: of the spec, if it is built already.
            saved: the shapes of the tensors of a checkpoint; a much larger model is refused.

        Raises:
            DataError: the data does not fit the task or the model.
            BuildError: a part cannot be built, or parts do not fit each other.
        """
        self.spec = spec
        self.data = build_data(spec) if data is None else data
        self.task: Task = spec.parts["task"]()
        self.task.check(self.data)
        self.metrics = build_metrics(spec, self.data, self.task)
        self.out_shape = self.task.targets_of(self.data)[1]
        limits = nullcontext() if saved is None else model_limits(spec, saved)
        with image_advice(spec, self.data), limits:
            self.model = build_model(spec, self.data.in_shape, self.out_shape, self.data.columns)
        self.task.check_model(self.model)
        check_loss_parameters(self.task, self.model)
        check_output_shape(self.model, self.data, self.out_shape, self.task)
        self.optimizer = build_spec_optimizer(spec, self.model)
        check_step_alone(self.optimizer)
        with image_advice(spec, self.data):
            self.transforms = [
                maker(self.data.in_shape, self.data.out_shape) for maker in spec.parts["transform"]
            ]
        self.train_batches = self.batches("train")
        settings = spec.sections["trainer"]
        micro_batch = settings["micro_batch"] if isinstance(settings["micro_batch"], int) else None
        check_smallest_batch(self.model, self.train_batches, micro_batch, self.task)
        self.status = Status()
        self.steps_per_epoch = count_steps(self.train_batches, settings["accumulate"])
        self.total_steps = count_total(
            self.steps_per_epoch, settings["max_epochs"], settings["max_steps"]
        )
        self.schedule = self.build_schedule()
        check_schedule(self.schedule, self.data.val is not None)

    def build_schedule(self) -> Any:
        """Return the schedule over all steps; None without one."""
        scheduler = self.spec.parts["scheduler"]
        if scheduler is None:
            return None
        check_has_rate(self.optimizer)
        schedule = scheduler(self.total_steps)
        if not callable(schedule):
            raise BuildError(
                f"{scheduler.entry} ({scheduler.entry.registered}): expected a function from the "
                f"step to a factor, got {short(schedule)}"
            )
        return schedule

    def batches(self, split: str) -> Loader:
        """Return the loader of a split.

        Raises:
            DataError: the data has no such split.
        """
        return build_loader(self.spec, self.model, self.data, split, shuffle=split == "train")

    def trainer(self, strategy: Strategy | None = None) -> Trainer:
        """Return the trainer, which has no folder yet.

        Args:
            strategy: the processes of the run; by default there is one.
        """
        parts = self.spec.parts
        callbacks = [maker() for maker in parts["callback"]]
        settings = self.spec.sections["trainer"]
        if strategy is None:
            settings = settings | {"devices": None}
        trainer = Trainer(
            **settings,
            seed=self.spec.seed,
            strategy=strategy or Strategy(),
            callbacks=[*self.transforms, *callbacks, self.status],
            loggers=[maker() for maker in parts["logger"]],
        )
        trainer.metrics = self.metrics  # loggers are opened before `fit` and need their names
        return trainer

    def fit_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Trainer.fit` for the training of the experiment."""
        return {
            "model": self.model,
            "data": self.train_batches,
            "val": None if self.data.val is None else self.batches("val"),
            "task": self.task,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "metrics": self.metrics,
            "batch_size": self.train_batches.batch_size,
        }

    def threads(self) -> int:
        """Return the number of threads for an operation on the CPU."""
        if self.spec.sections["trainer"]["shards"] is not None:
            return 1  # on any machine: the rounding depends on it
        loader = self.spec.sections["loader"]
        shape = self.data.in_shape
        if len(shape) == 1 and not first_input(self.data, self.task).is_floating_point():
            features = 1  # tokens
        elif len(shape) == 3:
            features = shape[0]  # the channels of images
        else:
            features = shape[-1]
        rows = loader["batch_size"] * math.prod(shape) // features
        return suitable_threads(self.model, rows, loader["workers"])

    def plan(self) -> "Plan":
        """Return the plan of a run, without training."""
        from .plan import make_plan  # not at the top: a run does not need it

        settings = self.spec.sections["trainer"]
        processes = settings["devices"] or 1
        check_processes(self.spec, processes)
        batch = first_batch(self.train_batches)
        plan = make_plan(
            self.model,
            batch,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            data=self.data,
            rows=math.ceil(count_rows(batch) / (settings["shards"] or processes)),
        )
        plan.threads = self.threads()
        plan.loader = self.train_batches.description
        plan.transforms = [repr(maker).partition("/")[2] for maker in self.spec.parts["transform"]]
        trainer = self.trainer()
        plan.batches_per_step = trainer.accumulate
        own = trainer.callbacks[len(self.transforms) :]
        for maker, callback in zip(self.spec.parts["callback"], own, strict=False):
            cost = callback.cost()
            if cost is not None:
                plan.callbacks.append(f"{maker.entry.name} {cost}")
        for callback in trainer.callbacks:
            pace = callback.pace(trainer, len(self.train_batches))
            if pace is not None:
                plan.use_pace(pace, self.optimizer, self.schedule)
        strategy = self.spec.parts["strategy"]
        if processes > 1 and strategy is not None:
            estimate = strategy().estimate(
                self.model,
                plan.memory,
                processes,
                passes=plan.batches_per_step * max(1, len(self.task.phases)),
                pairwise=settings["shards"] is not None,
            )
            plan.use_estimate(estimate, processes, strategy.entry.name)
        return plan


@dataclass
class Prepared:
    """A built experiment. A new run has no folder before `claim`, so a failure leaves none."""

    built: Experiment
    trainer: Trainer
    threads: int
    resumed: Resumed | None
    experiment: str
    overrides: list[str]
    started: float
    folder: RunFolder | None = None

    def claim(self) -> Path:
        """Make the folder of the run, unless it is resumed, and write its description (collective).

        The main process makes and locks it.
        """
        spec = self.built.spec
        strategy = self.trainer.strategy
        self.built.status.started = self.started
        if strategy.is_main:
            self.folder = self._claimed_folder()  # its lock is released with the object
        path: Path = strategy.from_main(None if self.folder is None else self.folder.path)
        self.trainer.folder = path
        self.trainer.manifest = {
            "run": str(path),
            "config": fingerprint(spec.tree),
            "threads": self.threads,
        }
        return path

    def _claimed_folder(self) -> RunFolder:
        """Return the new folder of a run, or that of the resumed run."""
        if self.resumed is None:
            return self._new_folder()
        folder = self.resumed.folder
        self.resumed.rewind()
        if self.resumed.changed:
            record_changes(self.resumed, self.built.spec)
            folder.write("config.yaml", self.built.spec.tree)
        return folder

    def _new_folder(self) -> RunFolder:
        """Return the folder of a new run; if its description cannot be written, it is removed."""
        spec = self.built.spec
        folder = RunFolder(**spec.sections["run"], experiment=self.experiment)
        try:
            self.trainer.folder = folder.path
            self.built.status.claim(self.trainer)
            describe_run(folder, self.built, self.overrides)
        except BaseException:
            discard_run(folder)
            raise
        return folder

    def record_failure(self) -> None:
        """Write an error before or after the training into status.json; call it in the handler."""
        if self.folder is not None:
            self.built.status.on_exception(self.trainer)

    def fit_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Trainer.fit`."""
        resume = None if self.resumed is None else self.resumed.training
        return self.built.fit_arguments() | {"resume": resume}

    def release(self) -> None:
        """Release the lock of the folder, for another process or another object of this one."""
        folder = self.resumed.folder if self.resumed is not None else self.folder
        if folder is not None:
            folder.release()

    def log_start(self, layers: str | None = None) -> str | None:
        """Log the config, the layers and the graph of a new run. See `log_run_start`."""
        if self.trainer.state.step != 0 or not self.trainer.strategy.is_main:
            return layers
        built = self.built
        return log_run_start(
            self.trainer.loggers,
            built.spec.tree,
            built.model,
            built.task,
            built.train_batches,
            layers,
        )

    @no_exit()
    def result(self, stopped: Sequence[int] = ()) -> Result:
        """Measure the test split after the training, and return the result.

        Args:
            stopped: the signals that stopped the run.
        """
        trainer = self.trainer
        state = trainer.state
        assert trainer.folder is not None
        result = Result(trainer.folder, stopped=state.stop, steps=state.step)
        result.is_main = trainer.strategy.is_main
        result.shares = trainer.clock.shares()
        result.step_kind = trainer.step_kind
        result.processes = trainer.process_times
        if self.built.data.test is None:
            result.split = None if self.built.data.val is None else "val"
        result.fit_seconds = trainer.clock.elapsed
        result.fit_steps = state.step - (trainer.resumed_from or 0)
        result.advice = data_advice(self.built.train_batches, result.shares, result.fit_seconds)
        stopped = agreed_signals(trainer.strategy, stopped)
        if not stopped and state.stop is not None and state.stop.signal is not None:
            stopped = [state.stop.signal]  # by `framework tell`, which sends no signal
        if trainer.validated_step > 0:
            result.weights["val"] = weights_label(trainer.validated_step, state.step)
        if state.stop is None or not stopped:
            measured = finish(trainer, self.built) or state.step
            if self.built.data.test is not None:
                result.weights["test"] = weights_label(measured, state.step)
        else:
            if trainer.strategy.is_main:
                self.built.status.on_fit_end(trainer)  # again, for a signal that came after the fit
        result.signal = stopped[0] if stopped else None
        result.metrics = dict(state.metrics)
        result.seconds = time.monotonic() - self.started
        return result


@no_exit()
def train(spec: Spec, *args: Any, **settings: Any) -> Result:
    """Fit, then measure the best checkpoint on the test split.

    Args: as for `prepare_run`.
    """
    with connected(spec) as strategy:
        return train_connected(spec, *args, strategy=strategy, **settings)


def train_connected(*args: Any, **settings: Any) -> Result:
    """Run `train` in a process that is connected with the others of the run."""
    prepared = prepare_run(*args, **settings)
    if isinstance(prepared, Result):
        return prepared
    try:
        prepared.claim()
        trainer = prepared.trainer
        noting = prepared.built.status.noting_warnings()
        threads = intra_op_threads(prepared.threads)
        with trainer, stopping([trainer]) as stopped, threads, noting:
            prepared.log_start()
            trainer.fit(**prepared.fit_arguments())
            return prepared.result(stopped)
    except Exception:
        prepared.record_failure()
        raise
    finally:
        prepared.release()


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
    strategy: Strategy | None = None,
) -> Prepared | Result:
    """Build an experiment before its training; for a finished run return its result.

    With `resume` in the spec, an unfinished run is continued as if it had not been interrupted.

    Args:
        experiment: the name of the experiment.
        overrides: the command line, which is written into the folder.
        started: the start of the process, in seconds of `time.monotonic`.
        inexact: allow settings that change the rest of a resumed run.
        say: prints a line for the user.
        data: of the spec, if it is built already.
        strategy: the processes of the run, connected; by default there is one.
    """
    strategy = strategy or Strategy()
    if not strategy.is_main:
        say = be_silent
    started = time.monotonic() if started is None else started
    run = strategy.from_main(find_run(spec, experiment) if strategy.is_main else None)
    resumed = None if run is None else open_shared(run, spec, strategy)
    if resumed is not None and resumed.done:
        say(f"{run} is complete: nothing is left to train")
        resumed.folder.release()
        result = read_result(resumed.folder.path)
        result.is_main = strategy.is_main
        return result
    saved = None
    if resumed is not None:
        if spec.fold is not None:
            refit = "fold" in read_facts(resumed.folder.path)  # not in a run of an older version
            data = data if refit else build_data(spec, refit=False)
        if resumed.training is not None:
            saved = shapes(resumed.training["model"])
    built = Experiment(spec, data, saved)
    if spec.init_from is not None and resumed is None:
        say(initialize_from(built.model, spec.init_from))
    check_alike(strategy, spec, built.data, built.task, built.out_shape)
    trainer = built.trainer(strategy)
    threads = built.threads()
    if not any(isinstance(callback, SavingCallback) for callback in trainer.callbacks):
        say(UNSAVED)
    if resumed is not None:
        check_resumed(resumed, built, inexact, say)
        trainer.state.step = resumed.step  # loggers continue from there
        threads = resumed.threads or threads  # the same number gives the same bits
        say(f"resuming {resumed.folder.path} after step {resumed.step}")
        notes = [*resumed.notes, *schedule_notes(built, resumed)]
        notes += process_notes(strategy, resumed, trainer.shards)
        for line in notes:
            say(line)
    trainer.callbacks.append(steering(built, resumed))
    return Prepared(built, trainer, threads, resumed, experiment, list(overrides), started)


def steering(built: Experiment, resumed: Resumed | None) -> Steering:
    """Return the callback that carries out the requests of `framework tell`."""
    spec = built.spec
    decays_all = spec.sections["parameters"]["decay"] == "all"
    settings = OptimizerSettings(spec.parts["optimizer"], decays_all)
    return Steering(settings, built.status, () if resumed is None else resumed.changed)


def check_resumed(
    resumed: Resumed, built: Experiment, inexact: bool, say: Callable[[str], None]
) -> None:
    """Raise RunError if the data, the model or the optimizer of a resumed run are not the same.

    A change that even --inexact does not allow comes first, so that no message advises it in vain.
    """
    path = resumed.folder.path
    data_changes = [] if inexact else changes_of_data(resumed, built, say)
    changed_data = None
    if data_changes:
        changed_data = f"the data of {path} has changed since it began ({'; '.join(data_changes)})"
    try:
        check_fits(resumed, built.model, built.optimizer)
        check_optimizer(resumed, built.model, built.optimizer)
    except RunError as error:
        if changed_data is not None:
            raise error.with_text(f"{changed_data}; {error}") from error
        raise
    except WRONG_FORM as error:
        raise RunError(
            f"{path} cannot be resumed: the checkpoint has an unexpected structure: "
            f"{describe(error)}"
        ) from error
    if not inexact:
        check_exact(resumed)
    if changed_data is not None:
        raise RunError(f"{changed_data}: {INEXACT_ADVICE}")


def changes_of_data(resumed: Resumed, built: Experiment, say: Callable[[str], None]) -> list[str]:
    """Return the changes of a resumed run's data that change its weights.

    Other content at the same path, such as a repaired image, is only a note.
    """
    before = read_facts(resumed.folder.path)
    facts = data_facts(built.data, built.task, built.out_shape)
    now = json.loads(dump("facts.json", facts))
    changed = list(fact_changes(before, now))
    other_content = list(content_changes(before.get("content"), now["content"]))
    if resumed.data_moved:
        changed += other_content
    elif other_content:
        say(f"the data has changed since the run began: {'; '.join(other_content)}")
    return changed


def process_notes(strategy: Strategy, resumed: Resumed, shards: int | None) -> Iterator[str]:
    """Yield a note if the number of processes has changed, and with it the rounding of sums.

    Args:
        strategy: the processes of the run.
        resumed: the run until now.
        shards: the number of virtual shards, with which the rounding stays the same.
    """
    before = 1 if resumed.training is None else resumed.training.get("processes", 1)
    if before != strategy.world_size and resumed.training is not None and shards is None:
        yield (
            f"the number of processes is now {strategy.world_size} (was {before}): from here on "
            "results differ by rounding from those of an uninterrupted run"
        )


def schedule_notes(built: Experiment, resumed: Resumed) -> Iterator[str]:
    """Yield a note if the schedule depends on the length of the run, which has changed."""
    scheduler = built.spec.parts["scheduler"]
    if scheduler is None or built.schedule is None or 0 < built.total_steps <= resumed.step:
        return
    if not {"trainer.max_epochs", "trainer.max_steps"} & resumed.changed.keys():
        return
    limits = resumed.config["trainer"]
    before = count_total(built.steps_per_epoch, limits.get("max_epochs"), limits.get("max_steps"))
    old = scheduler(before)
    span = max(before, built.total_steps)
    steps = range(0, span, max(1, span // 1000))
    if all(old(step) == built.schedule(step) for step in steps):
        return
    yield (
        f"scheduler={scheduler.entry.name} covers {built.total_steps:,} steps (was {before:,}): "
        f"from step {resumed.step:,} on the learning rate is that of a run with "
        f"{built.total_steps:,} steps"
    )


def finish(trainer: Trainer, built: Experiment) -> Path | None:
    """Measure the best checkpoint on the test split; log the settings with the final metrics.

    Returns:
        That checkpoint; None without one, or without a test split.
    """
    assert trainer.folder is not None
    measured = None
    if built.data.test is not None:
        measured = load_weights(built.model, trainer.folder)
        trainer.evaluate(built.batches("test"))
    for logger in trainer.loggers:
        logger.hparams(hyperparameters(built.spec), trainer.state.metrics)
    if trainer.strategy.is_main:
        built.status.done(trainer)
    return measured


def data_advice(loader: Loader, shares: Mapping[str, float], seconds: float) -> str | None:
    """Return advice on reading data faster; None if that took little time or the data is in memory.

    Args:
        loader: of the training batches.
        shares: the fractions of the time, by activity.
        seconds: of the training.
    """
    share = slow_data(shares, seconds)
    if share is None or loader.in_memory:
        return None
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    options = []
    if loader.workers < cores:
        options.append(f"loader.workers={max(cores, 2)} reads ahead")
    options.append("loader.read=memory reads each sample once (samples of one shape, not random)")
    return f"{share:.0%} of the time was spent waiting for data: {'; '.join(options)}"


def hyperparameters(spec: Spec) -> dict[str, Any]:
    """Return the settings that may affect the metrics: not the folder, nor what is logged."""
    kept = without_keys(spec.tree, NO_HYPERPARAMETERS)
    kept["trainer"] = without_keys(kept["trainer"], NO_HYPERPARAMETERS)
    callbacks = [maker.entry for maker in spec.parts["callback"]]
    observing = [entry.name for entry in callbacks if not changes_training(entry.part)]
    kept["callbacks"] = without_keys(kept["callbacks"], observing)
    return kept


def without_keys(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return settings without some keys."""
    return {key: value for key, value in settings.items() if key not in keys}


def describe_run(folder: RunFolder, built: Experiment, overrides: list[str]) -> None:
    """Write the files that describe a run, before it starts."""
    sources = {}
    for parts in built.spec.parts.values():
        for maker in parts if isinstance(parts, list) else [parts]:
            if maker is not None:
                sources[str(maker.entry)] = str(maker.entry.source)
    plugins = {"plugins": built.spec.plugins, "without_plugins": built.spec.without}
    folder.write("facts.json", data_facts(built.data, built.task, built.out_shape))
    folder.write("overrides.yaml", overrides)
    directions = {"directions": metric_directions(built.metrics)}
    settings = {"settings": built.spec.origins}
    folder.write("provenance.json", provenance(sources) | plugins | directions | settings)
    folder.write("config.yaml", built.spec.tree)  # last: with it the run can be resumed


def record_changes(resumed: Resumed, spec: Spec) -> None:
    """Add the settings that a resume changes to those in provenance.json, if that is readable."""
    run = resumed.folder.path
    try:
        content = read_json(run, "provenance.json")
    except (OSError, RunError):
        return
    if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
        return
    settings = dict(content.get("settings", {}))
    after = dict(setting_leaves(spec.tree))
    for path in resumed.changed:
        place = f"resumed after step {resumed.step}"
        before = settings.get(path)
        origins = list(before) if isinstance(before, list) else []
        settings[path] = [*origins, {"place": place, "value": after.get(path), "by": ""}]
    resumed.folder.write("provenance.json", content | {"settings": settings})


def discard_run(folder: RunFolder) -> None:
    """Remove the files of a run that cannot begin, and its folder if nothing else is in it."""
    folder.release()
    with suppress(OSError):
        for name in (*DESCRIPTION, ".lock"):
            (folder.path / name).unlink(missing_ok=True)
        folder.path.rmdir()
