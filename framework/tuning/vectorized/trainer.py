"""Trains many trials as one: the tensors of a step are computed for all of them at once.

`StackedTrainer` runs the trainer's loop (`training/loop.py`). It hands each part of the loop on to
the trainers of the trials, which keep their own counters, callbacks, loggers, schedule and folder.
Forward, backward, update, sums and validation are computed for all of them together.
"""

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, TypeVar

import torch

from framework.contracts.callback import SavingCallback
from framework.contracts.loss import portion, share_of
from framework.contracts.task import Step
from framework.data.accumulation import step_windows
from framework.data.dataset import Batch, Loader, TensorSplit
from framework.errors import FrameworkError
from framework.errors.exits import no_exit
from framework.errors.torch_errors import torch_errors
from framework.runtime.batch import move_batch
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.memory import memory_errors
from framework.runtime.seeds import undisturbed
from framework.training.acceleration.callbacks import GradientCallbacks, gradient_callbacks
from framework.training.acceleration.cuda_graph import Graphed
from framework.training.loop import run_epoch
from framework.training.step import set_learning_rates
from framework.training.trainer import Trainer

from .callbacks import check_stackable, find_clip_rows, prepare
from .differences import is_same
from .equivalence_check import EquivalenceCheck, batches_of_trials
from .stacked_forward import StackedForward, StackedMeasures, TrialMeasures
from .stacked_update import NotStackable, StackedState

Compared = TypeVar("Compared")
FitArguments = dict[str, Any]
"""The arguments of `Trainer.fit`."""
BatchPair = tuple[Batch, Batch]
"""A batch for all trials, with a first axis of trials if it is not shared, and that of a trial."""


class StackedTrial:
    """A trainer among those that train as one.

    Attributes:
        number: the number of the trial, from 0.
        trainer: its trainer.
        fit: the arguments of its fit.
        fitting: the context of its fit, entered before the first step and left after the last.
        measures: the measures of its trainer.
        gradient_callbacks: the callbacks that listen to `gradients`, in their order.
        clip_rows: for each of them its function for all trials, or None.
        for_one_trial: those without such a function, which need the gradients of one trial.
    """

    def __init__(self, number: int, trainer: Trainer, fit: FitArguments):
        self.number = number
        self.trainer = trainer
        self.fit = fit
        self.fitting: AbstractContextManager[None] = trainer.fitting()
        self.measures: TrialMeasures
        self.gradient_callbacks = gradient_callbacks(trainer.callbacks)
        self.clip_rows = [find_clip_rows(type(each)) for each in self.gradient_callbacks]
        for_one_trial = []
        for callback, clip_rows in zip(self.gradient_callbacks, self.clip_rows, strict=True):
            if clip_rows is None:
                for_one_trial.append(callback)
        self.for_one_trial = GradientCallbacks(for_one_trial, trainer)


Ended = Callable[[int, BaseException | None], None]
"""Receives the number of a trial that has ended, and its error or None."""


class StackedTrainer:
    """Fits trainers together.

    Args:
        trainers: the trainer of each trial.
        fits: the arguments of `fit` of each trial.
        ended: called with the number of a trial when it ends, and with its error if it failed.

    Raises:
        NotStackable: the trainers cannot be fitted together.
    """

    def __init__(
        self,
        trainers: Sequence[Trainer],
        fits: Sequence[FitArguments],
        ended: Ended = lambda number, error: None,
    ):
        check_equal_settings(trainers)
        self.trials = []
        for number, (trainer, fit) in enumerate(zip(trainers, fits, strict=True)):
            self.trials.append(StackedTrial(number, trainer, fit))
        self.first = trainers[0]
        self.ended = ended
        self._prepare_fits()
        self._check_fits()
        models = [trainer.model for trainer in trainers]
        tasks = [trainer.task for trainer in trainers]
        self.orders: torch.Tensor | None = None
        batch = move_batch(next(self._batches(0, 0))[0], self.first.device)
        shared = self.orders is None
        check = EquivalenceCheck(models, tasks, batch, shared, self.first.precision)
        frozen_modes = self.first.modes.names()
        if any(trainer.modes.names() != frozen_modes for trainer in trainers):
            raise NotStackable("the modules that stay in evaluation mode differ")
        self.forward = StackedForward(models, tasks, self.first.precision, frozen_modes)
        self.state = StackedState(models, [trainer.optimizer for trainer in trainers])
        self.graphed: Graphed | None = None
        if self.first.cuda_graph != "off":
            # Only then, as it refers to the trainer: a reference cycle keeps memory allocated.
            self.graphed = Graphed(
                name="the step of all trials",
                run=self._forward_and_backward,
                parameters=list,  # none: `StackedState.differentiate` writes gradients into rows
                mode=self.first.cuda_graph,
            )
        self.failed: dict[int, BaseException] = {}
        self._stack_measures()
        check.compare(self.forward, self.state)

    def _prepare_fits(self) -> None:
        for trial in self.trials:
            for name, loader, first in self._loaders(trial):
                # Before `prepare_fit` moves the split of the first trial to the device.
                if not is_same(loader.split, first.split):
                    raise NotStackable(f"{name} differs between trials")
        for trial in self.trials:
            prepare(trial.trainer.callbacks, len(self.trials))
            for _, loader, first in self._loaders(trial):
                loader.split = first.split  # one copy on the device for all
                loader.uncached = first.uncached
            trial.trainer.prepare_fit(**trial.fit)

    def _loaders(self, trial: StackedTrial) -> Iterator[tuple[str, Loader, Loader]]:
        """Yield a trial's loaders, each with that of the first trial."""
        for name in ("data", "val"):
            loader = trial.fit[name]
            first = self.trials[0].fit[name]
            if isinstance(loader, Loader) and isinstance(first, Loader):
                yield name, loader, first

    def _check_fits(self) -> None:
        """Raise NotStackable when the trials have other metrics, steps or loaders."""
        trainers = [trial.trainer for trial in self.trials]
        if not all(is_same(trainer.metrics, self.first.metrics) for trainer in trainers):
            raise NotStackable("their metrics differ")
        if differs(trainers, lambda trainer: (trainer.state.step, trainer.state.batch)):
            raise NotStackable("they resume after different steps")
        loaders = [require_loader(trainer) for trainer in trainers]
        if differs(loaders, lambda loader: (len(loader), loader.batch_size)):
            raise NotStackable("loader.batch_size differs")
        if differs(
            loaders, lambda loader: (loader.shuffle, loader.class_sampler is None, loader.limit)
        ):
            raise NotStackable("loader.sampling or loader.limit differs")
        if differs(trainers, lambda trainer: trainer.val_batches is None):
            raise NotStackable("only some of them have validation data")
        if differs(loaders, attrgetter("seed")) and loaders[0].tensors is None:
            raise NotStackable("they read samples in different orders, from data not in memory")

    def _stack_measures(self) -> None:
        self.measures = StackedMeasures(
            metrics=self.first.metrics,
            trials=len(self.trials),
            device=self.first.device,
            max_buffered=self.first.train_batches.max_buffered,
        )
        for row, trial in enumerate(self.trials):
            trial.measures = TrialMeasures(self.measures, row)
            trial.measures.load_state_dict(trial.trainer.measures.state_dict())  # of a resumed fit
            trial.trainer.measures = trial.measures

    def run(self) -> None:
        """Train until the last trial is done."""
        with deterministic_algorithms(self.first.deterministic), memory_errors(self.first.device):
            try:
                self._for_each(lambda trial: trial.fitting.__enter__())
                self._end_done_trials()
                with torch_errors():
                    while not self.done:
                        with no_exit():
                            run_epoch(self)
            except BaseException as error:
                for trial in self.trials:
                    self._end(trial, error)
                raise

    # the methods that the loop calls (see `training/loop.py`)

    @property
    def done(self) -> bool:
        """Whether all trials have ended."""
        return not self.trials

    def start_epoch(self) -> None:
        self._for_each(lambda trial: trial.trainer.start_epoch())

    def windows(self) -> Iterator[tuple[Sequence[BatchPair], bool]]:
        if self.done:
            return
        state = self.trials[0].trainer.state
        steps_left = state.steps_per_epoch - state.batch // self.first.accumulate
        items = self._batches(state.epoch, state.batch)
        yield from step_windows(items, self.first.accumulate, steps_left)

    def train_step(self, window: Sequence[BatchPair]) -> None:
        for trial in self.trials:
            trainer = trial.trainer
            trainer.at_boundary = False
            trainer.emit("step_start")
            set_learning_rates(trainer.optimizer, trainer.schedule, trainer.state.step)
        batches = [move_batch(batch, self.first.device) for batch, _ in window]
        self._compute_gradients(batches)
        for trial, loss in zip(self.trials, self.losses.unbind(), strict=True):
            trial.trainer.loss = loss
        self.state.update(skipped=self._call_gradient_callbacks(batches))
        failed = self.failed
        self.failed = {}
        for row, error in failed.items():
            self._end(self.trials[row], error)
        self._leave(failed)

    def count_step(self, window: Sequence[BatchPair], last: bool) -> None:
        batches = [one for _, one in window]
        self._for_each(lambda trial: trial.trainer.count_step(batches, last))

    def log_if_due(self, last: bool) -> None:
        self._for_each(lambda trial: trial.trainer.log_if_due(last))

    def validate_if_due(self, last: bool) -> None:
        due = [trial for trial in self.trials if trial.trainer.validation_is_due(last)]
        if due:
            self._validate(due)

    def finish_step(self, last: bool) -> None:
        self._for_each(lambda trial: trial.trainer.finish_step(last))
        self._end_done_trials()

    # computation for all trials

    def _batches(self, epoch: int, start: int) -> Iterator[BatchPair]:
        """Yield the batches of an epoch from batch number `start` on."""
        loaders = [require_loader(trial.trainer) for trial in self.trials]
        first = loaders[0]
        if not first.shuffle or not differs(loaders, attrgetter("seed")):
            self.orders = None
            for batch in first.epoch(epoch, start):
                kept = first.keep(batch) if self.first.accumulate > 1 else batch
                yield kept, kept
            return
        size = first.batch_size
        tensors = first.tensors
        assert tensors is not None  # `_check_fits` has checked it
        orders = torch.stack([loader.order(epoch)[: len(first) * size] for loader in loaders])
        self.orders = orders.to(tensors[0].device)
        for number in range(start, len(first)):
            samples = self.orders[:, number * size : (number + 1) * size]
            stacked = []
            for tensor in tensors:
                selected = tensor.index_select(0, samples.reshape(-1))
                stacked.append(selected.view(*samples.shape, *tensor.shape[1:]))
            assert isinstance(first.split, TensorSplit)  # as it has tensors
            batch = first.split.as_batch(stacked)
            yield batch, first_trial(batch)

    def _compute_gradients(self, batches: list[Batch]) -> None:
        """Compute `state.gradients` and `losses` of a step."""
        shared = self.orders is None
        counts = [self._count(batch, shared) for batch in batches]
        if len(batches) == 1:
            step = self._forward_and_backward_replayed(batches[0])
            self.losses = step.loss.detach()
            self.measures.add(step, counts[0])
            return
        total = sum(counts)
        losses: Any = 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            step = self.forward(self.state, batch, shared)
            share = share_of(count, total)
            self.state.differentiate(step.loss * share, add=number > 0)
            losses = losses + portion(step.loss.detach(), share)
            self.measures.add(step, count)
        self.losses = losses

    def _forward_and_backward(self, batch: Batch) -> Step:
        step = self.forward(self.state, batch, self.orders is None)
        self.state.differentiate(step.loss)
        return step

    def _forward_and_backward_replayed(self, batch: Batch) -> Step:
        if self.graphed is None:
            return self._forward_and_backward(batch)
        return self.graphed(batch, settings=(self.orders is None, self.state.weights.data_ptr()))

    def _count(self, batch: Batch, shared: bool) -> Any:
        """Return the number of items of a batch, or that of each trial if they differ."""
        count = self.first.task.count(batch if shared else first_trial(batch))
        is_equal = shared or isinstance(count, int)  # the number of samples
        if is_equal and not self.forward.counts_differ:
            return count
        batches = [batch] * len(self.trials)
        if not shared:
            batches = batches_of_trials(batch, len(self.trials))
        counts = []
        for trial, own in zip(self.trials, batches, strict=True):
            counts.append(trial.trainer.task.count(own))
        if all(isinstance(each, int) and each == counts[0] for each in counts):
            return counts[0]
        tensors = [torch.as_tensor(each, device=self.first.device) for each in counts]
        return torch.stack(tensors)

    def _call_gradient_callbacks(self, batches: Sequence[Batch]) -> list[int]:
        """Call the callbacks that listen to `gradients`, if they need to see or change them.

        Args:
            batches: those of the step, on the device.

        Returns:
            The rows that get no update.
        """
        if not any(trial.gradient_callbacks for trial in self.trials):
            return []
        finite = (self.state.gradients.sum(1) + self.losses).isfinite().tolist()
        attached = []
        for row, trial in enumerate(self.trials):
            if not finite[row] or trial.for_one_trial.need_gradients():
                attached.append(row)
                self.state.attach_gradients(row)
                trial.trainer.batches = [self._batch_of(row, batch) for batch in batches]
        for position, clip_rows in enumerate(self.trials[0].clip_rows):
            if clip_rows is None:
                for row in attached:
                    self._call_on_gradients(row, position)
                continue
            for row in attached:
                if self._detach_gradients(row):  # an earlier callback may have replaced them
                    self.state.attach_gradients(row)
            callbacks = [trial.gradient_callbacks[position] for trial in self.trials]
            clip_rows(callbacks, self.state.gradients)
        for row in attached:
            self.trials[row].trainer.batches = ()
        return [row for row in attached if not self._detach_gradients(row) or row in self.failed]

    def _batch_of(self, row: int, batch: Batch) -> Batch:
        """Return the batch of a trial from a batch for all trials."""
        if self.orders is None:
            return batch
        return batches_of_trials(batch, len(self.trials))[row]

    def _detach_gradients(self, row: int) -> bool:
        try:
            return self.state.detach_gradients(row)
        except FrameworkError as error:
            self.failed.setdefault(row, error)
            return False

    def _call_on_gradients(self, row: int, position: int) -> None:
        if row in self.failed:
            return
        trial = self.trials[row]
        try:
            trial.gradient_callbacks[position].on_gradients(trial.trainer)
        except Exception as error:
            self.failed[row] = error

    def _validate(self, due: Sequence[StackedTrial]) -> None:
        began = time.perf_counter()
        self._for_each(lambda trial: trial.trainer.emit("validation_start"), due)
        values = dict(zip(self.trials, self._measure(), strict=True))
        seconds = time.perf_counter() - began
        self._for_each(lambda trial: trial.trainer.record_validation(values[trial], seconds), due)

    @torch.no_grad()
    def _measure(self) -> list[dict[str, float]]:
        """Return the loss and metrics of each trial on the validation split."""
        batches = self.first.val_batches
        assert batches is not None
        measures = StackedMeasures(
            metrics=self.first.metrics,
            trials=len(self.trials),
            device=self.first.device,
            max_buffered=batches.max_buffered,
        )
        with undisturbed():
            for batch in batches.epoch():
                moved = move_batch(batch, self.first.device)
                step = self.forward(self.state, moved, True, training=False)
                measures.add(step, self._count(moved, True))
        return measures.read()

    def _for_each(
        self,
        call: Callable[[StackedTrial], Any],
        trials: Sequence[StackedTrial] | None = None,
    ) -> None:
        """Call a function for all trials, or some; a trial for which it fails ends."""
        failed = []
        for row, trial in enumerate(self.trials):
            if trials is not None and trial not in trials:
                continue
            try:
                with no_exit():
                    call(trial)
            except Exception as error:
                self._end(trial, error)
                failed.append(row)
        self._leave(failed)

    def _end_done_trials(self) -> None:
        """End the trials that are done."""
        done = [row for row, trial in enumerate(self.trials) if trial.trainer.done]
        ending = [self.trials[row] for row in done]
        self._leave(done)
        for trial in ending:
            for callback in trial.trainer.callbacks:
                if isinstance(callback, SavingCallback):
                    callback.hurry_saving()  # of all at once: below, each waits for its own writes
        for trial in ending:
            self._end(trial, None)

    def _leave(self, rows: Collection[int]) -> None:
        """Continue without some of the trials."""
        if not rows:
            return
        kept = []
        for row, trial in enumerate(self.trials):
            if row in rows:
                trial.measures.leave()
            else:
                kept.append(row)
        self.state.select(kept)
        if self.graphed is not None:
            self.graphed.captured.clear()  # graphs write to the memory of all rows
        self.forward.select(kept)
        self.measures.select(kept)
        self.trials = [self.trials[row] for row in kept]
        if self.orders is not None:
            self.orders = self.orders[kept]
        for row, trial in enumerate(self.trials):
            trial.measures.row = row

    def _end(self, trial: StackedTrial, error: BaseException | None) -> None:
        """End a trial's fit, with the error if it failed, and report it to `ended`."""
        try:
            if error is None:
                trial.fitting.__exit__(None, None, None)
            else:
                trial.fitting.__exit__(type(error), error, error.__traceback__)
        except BaseException as raised:  # the same error, or one of the end itself
            error = raised
        self.ended(trial.number, error)


def require_loader(trainer: Trainer) -> Loader:
    """Return the training loader.

    Raises:
        NotStackable: the batches are those of another iterable.
    """
    if not isinstance(trainer.train_batches, Loader):
        raise NotStackable("their data is an iterable of batches")
    return trainer.train_batches


def first_trial(batch: Batch) -> Batch:
    """Return the batch of the first trial from one with a first axis of trials."""
    return batches_of_trials(batch, 1)[0]


def check_equal_settings(trainers: Sequence[Trainer]) -> None:
    """Raise NotStackable for settings that stacked trials do not support, or that differ."""
    for trainer in trainers:
        check_stackable(trainer.callbacks)
        has_micro_batches = trainer.micro_batches.size or trainer.micro_batches.auto
        if trainer.compile != "off" or trainer.profile or has_micro_batches:
            raise NotStackable(
                "trainer.compile, trainer.profile and trainer.micro_batch need a single trial"
            )
        if trainer.shards is not None:
            raise NotStackable("trainer.shards needs a single trial")
        if trainer.precision.scaler is not None:
            raise NotStackable("trainer.precision=fp16 needs its own loss scaling for each trial")
    if differs(trainers, lambda trainer: tuple(map(type, trainer.callbacks))):
        raise NotStackable("their callbacks differ")
    for name in (
        "accumulate",
        "device",
        "deterministic",
        "precision.dtype",
        "log_every.every",
        "validate_every.every",
    ):
        if differs(trainers, attrgetter(name)):
            raise NotStackable(f"trainer.{name.partition('.')[0]} differs")


def differs(objects: Iterable[Compared], key: Callable[[Compared], Hashable]) -> bool:
    """Return whether objects differ in a key."""
    return len(set(map(key, objects))) > 1
