"""Trains many trials as one: the arithmetic of a step is done for all of them at once.

`StackedTrainer` is a run of the trainer's loop (`training/loop.py`). It hands each part of the loop on to
the trainers of the trials, which keep their own counters, callbacks, loggers, schedule and folder;
only forward, backward, update, sums and validation are computed for all of them together.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from framework.contracts.callback import SavingCallback
from framework.contracts.loss import portion, share_of
from framework.contracts.task import Step
from framework.data.accumulation import steps
from framework.data.dataset import Batch, Loader
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

from .callbacks import check_stackable, clip_rows_of, prepare
from .differences import same
from .rehearsal import Rehearsal
from .stacked_forward import RowMeasures, Stack, Sums
from .stacked_update import NotStackable, Rows

Fit = dict[str, Any]
"""The arguments of `Trainer.fit`."""
Item = tuple[Batch, Batch]
"""A batch for all trials, shared or each with its own row, and that of one trial."""


class StackedTrial:
    """A trainer among those that train as one.

    Attributes:
        number: of the trial, from 0.
        trainer: its trainer.
        fit: the arguments of its fit.
        fitting: the context of its fit, entered before the first step and left after the last.
        gradient_callbacks: the callbacks that listen to `gradients`, in their order.
        for_one_trial: those of them that look at the gradients of one trial at a time.
    """

    def __init__(self, number: int, trainer: Trainer, fit: Fit):
        self.number, self.trainer, self.fit = number, trainer, fit
        self.fitting: AbstractContextManager[None] = trainer.fitting()
        self.gradient_callbacks = gradient_callbacks(trainer.callbacks)
        for_one_trial = [
            each for each in self.gradient_callbacks if clip_rows_of(type(each)) is None
        ]
        self.for_one_trial = GradientCallbacks(for_one_trial, trainer)


Ended = Callable[[int, BaseException | None], None]


class StackedTrainer:
    """Fits trainers together. `ended` is called with a trial's number when it is done, and with what it failed by.

    Raises NotStackable before anything is done when they cannot.
    """

    def __init__(
        self,
        trainers: Sequence[Trainer],
        fits: Sequence[Fit],
        ended: Ended = lambda number, error: None,
    ):
        check_alike(trainers)
        self.trials = [
            StackedTrial(number, *pair)
            for number, pair in enumerate(zip(trainers, fits, strict=True))
        ]
        self.first = trainers[0]
        self.ended = ended
        self._begin()
        models, tasks = [t.model for t in trainers], [t.task for t in trainers]
        self.orders: torch.Tensor | None = None
        batch = move_batch(next(self._batches(0, 0))[0], self.first.device)
        rehearsal = Rehearsal(models, tasks, batch, self.orders is None, self.first.precision)
        still = self.first.modes.names()
        if any(trainer.modes.names() != still for trainer in trainers):
            raise NotStackable("the modules that stay in evaluation mode are not the same")
        self.stack = Stack(models, tasks, self.first.precision, still)
        self.rows = Rows(models, [t.optimizer for t in trainers])
        self.graphed: Graphed | None = None
        if (
            self.first.cuda_graph != "off"
        ):  # without, nothing refers to itself, and all is freed when trials are done
            run, mode = self._forward_and_backward, self.first.cuda_graph
            self.graphed = Graphed("the step of all trials", run, lambda: [], mode)
        self.failed: dict[int, BaseException] = {}
        self._make_sums()
        rehearsal.together(self.stack, self.rows)

    def _begin(self) -> None:
        for name, loader, first in [pair for trial in self.trials for pair in self._loaders(trial)]:
            if not same(
                loader.split, first.split
            ):  # before `prepare_fit` moves the first one's to the device
                raise NotStackable(f"{name} is not the same")
        for trial in self.trials:
            prepare(trial.trainer.callbacks, len(self.trials))
            for _, loader, first in self._loaders(trial):
                loader.split = first.split  # one copy on the device for all
                loader.uncached = first.uncached
            trial.trainer.prepare_fit(**trial.fit)
        if not all(same(trial.trainer.metrics, self.first.metrics) for trial in self.trials):
            raise NotStackable("their metrics are not the same")
        if len({(t.trainer.state.step, t.trainer.state.batch) for t in self.trials}) > 1:
            raise NotStackable("they go on after different steps")
        loaders = [loader_of(trial.trainer) for trial in self.trials]
        if len({(len(loader), loader.batch_size) for loader in loaders}) > 1:
            raise NotStackable("loader.batch_size is not the same")
        orders = {
            (loader.shuffle, loader.class_sampler is None, loader.limit) for loader in loaders
        }
        if len(orders) > 1:
            raise NotStackable("loader.sampling or loader.limit is not the same")
        if len({trial.trainer.val_batches is None for trial in self.trials}) > 1:
            raise NotStackable("some have data to validate on, and some have none")
        if len({loader.seed for loader in loaders}) > 1 and loaders[0].tensors is None:
            raise NotStackable(
                "they read samples in different orders, and the data is not in memory"
            )

    def _loaders(self, trial: StackedTrial) -> Iterator[tuple[str, Loader, Loader]]:
        """Yield a trial's loaders, each with that of the first trial."""
        for name in ("data", "val"):
            loader, first = trial.fit[name], self.trials[0].fit[name]
            if isinstance(loader, Loader) and isinstance(first, Loader):
                yield name, loader, first

    def _make_sums(self) -> None:
        self.sums = Sums(
            self.first.metrics,
            len(self.trials),
            self.first.device,
            self.first.train_batches.max_buffered,
        )
        for row, trial in enumerate(self.trials):
            resumed = trial.trainer.measures
            trial.trainer.measures = RowMeasures(self.sums, row)
            trial.trainer.measures.load_state_dict(resumed.state_dict())

    def run(self) -> None:
        """Train until the last trial is done."""
        with deterministic_algorithms(self.first.deterministic), memory_errors(self.first.device):
            try:
                self._each(lambda trial: trial.fitting.__enter__())
                self._leave_done()
                with torch_errors():
                    while not self.done:
                        with no_exit():
                            run_epoch(self)
            except BaseException as error:
                for trial in self.trials:
                    self._close(trial, error)
                raise

    # the loop, see `training/loop.py`

    @property
    def done(self) -> bool:
        """Whether no trial is left."""
        return not self.trials

    def start_epoch(self) -> None:
        self._each(lambda trial: trial.trainer.start_epoch())

    def windows(self) -> Iterator[tuple[Sequence[Item], bool]]:
        if self.done:
            return
        state = self.trials[0].trainer.state
        steps_left = state.steps_per_epoch - state.batch // self.first.accumulate
        items = self._batches(state.epoch, state.batch)
        yield from steps(items, self.first.accumulate, steps_left)  # type: ignore[arg-type, misc]

    def train_step(self, window: Sequence[Item]) -> None:
        for trial in self.trials:
            trainer = trial.trainer
            trainer.at_boundary = False
            trainer.emit("step_start")
            set_learning_rates(trainer.optimizer, trainer.schedule, trainer.state.step)
        self._gradients([move_batch(batch, self.first.device) for batch, _ in window])
        for trial, loss in zip(self.trials, self.losses.unbind(), strict=True):
            trial.trainer.loss = loss
        self.rows.update(left_out=self._call_gradient_callbacks())
        failed, self.failed = self.failed, {}
        for row, error in failed.items():
            self._close(self.trials[row], error)
        self._keep([row for row in range(len(self.trials)) if row not in failed])

    def count_step(self, window: Sequence[Item], last: bool) -> None:
        batches = [one for _, one in window]
        self._each(lambda trial: trial.trainer.count_step(batches, last))

    def log_if_due(self, last: bool) -> None:
        self._each(lambda trial: trial.trainer.log_if_due(last))

    def validate_if_due(self, last: bool) -> None:
        due = [trial for trial in self.trials if trial.trainer.validation_is_due(last)]
        if due:
            self._validate(due)

    def finish_step(self, last: bool) -> None:
        self._each(lambda trial: trial.trainer.finish_step(last))
        self._leave_done()

    # the arithmetic

    def _batches(self, epoch: int, start: int) -> Iterator[Item]:
        """Yield the batches of an epoch from batch number `start` on."""
        loaders = [loader_of(trial.trainer) for trial in self.trials]
        if len({loader.seed for loader in loaders}) == 1 or not loaders[0].shuffle:
            self.orders = None
            for batch in loaders[0].epoch(epoch, start):
                kept = loaders[0].keep(batch) if self.first.accumulate > 1 else batch
                yield kept, kept
            return
        first, size = loaders[0], loaders[0].batch_size
        tensors = first.tensors
        assert tensors is not None  # or `_begin` had refused
        self.orders = torch.stack([loader.order(epoch)[: len(first) * size] for loader in loaders])
        self.orders = self.orders.to(tensors[0].device)
        for number in range(start, len(first)):
            chosen = self.orders[:, number * size : (number + 1) * size]
            rows = chosen.reshape(-1)
            read = [tensor.index_select(0, rows) for tensor in tensors]
            batch = tuple(tensor.view(*chosen.shape, *tensor.shape[1:]) for tensor in read)
            yield batch, tuple(tensor[0] for tensor in batch)

    def _gradients(self, batches: list[Batch]) -> None:
        """Put the gradients of the step into the rows, and its losses into `losses`."""
        shared = self.orders is None
        counts = [self._count(batch, shared) for batch in batches]
        if len(batches) == 1:
            step = self._forward_and_backward_replayed(batches[0])
            self.losses = step.loss.detach()
            self.sums.add(step, counts[0])
            return
        total = sum(counts)
        losses: Any = 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            step = self.stack(self.rows, batch, shared)
            share = share_of(count, total)
            self.rows.differentiate(step.loss * share, add=number > 0)
            losses = losses + portion(step.loss.detach(), share)
            self.sums.add(step, count)
        self.losses = losses

    def _forward_and_backward(self, batch: Batch) -> Step:
        step = self.stack(self.rows, batch, self.orders is None)
        self.rows.differentiate(step.loss)
        return step

    def _forward_and_backward_replayed(self, batch: Batch) -> Step:
        if self.graphed is None:
            return self._forward_and_backward(batch)
        return self.graphed(batch, settings=(self.orders is None, self.rows.weights.data_ptr()))

    def _count(self, batch: Batch, shared: bool) -> Any:
        """Return the number of items of a batch, or that of each trial where they differ."""
        count = self.first.task.count(batch if shared else tuple(tensor[0] for tensor in batch))
        is_alike = shared or isinstance(count, int)  # the number of samples
        if is_alike and not self.stack.weighs_apart:
            return count
        batches = [batch] * len(self.trials) if shared else zip(*batch, strict=True)
        counts = []
        for trial, own in zip(self.trials, batches, strict=True):
            counts.append(trial.trainer.task.count(own))
        if all(isinstance(each, int) and each == counts[0] for each in counts):
            return counts[0]
        tensors = [torch.as_tensor(each, device=self.first.device) for each in counts]
        return torch.stack(tensors)

    def _call_gradient_callbacks(self) -> list[int]:
        """Call the callbacks that listen to `gradients`, where they must see or change them.

        Returns the rows that get no update.
        """
        if not any(trial.gradient_callbacks for trial in self.trials):
            return []
        finite = (self.rows.gradients.sum(1) + self.losses).isfinite().tolist()
        lent = []
        for row, trial in enumerate(self.trials):
            if not finite[row] or trial.for_one_trial.need_gradients():
                lent.append(row)
                self.rows.lend_gradients(row)
        for position, callback in enumerate(self.trials[0].gradient_callbacks):
            clip_rows = clip_rows_of(type(callback))
            if clip_rows is None:
                for row in lent:
                    self._call_on_gradients(row, position)
                continue
            for row in lent:
                if self._take_gradients(row):  # a callback before it may have replaced them
                    self.rows.lend_gradients(row)
            clip_rows(
                [trial.gradient_callbacks[position] for trial in self.trials], self.rows.gradients
            )
        return [row for row in lent if not self._take_gradients(row) or row in self.failed]

    def _take_gradients(self, row: int) -> bool:
        try:
            return self.rows.take_gradients(row)
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
        self._each(lambda trial: trial.trainer.emit("validation_start"), due)
        values = self._measure()
        seconds = time.perf_counter() - began
        found = dict(zip(self.trials, values, strict=True))
        self._each(lambda trial: trial.trainer.record_validation(found[trial], seconds), due)

    @torch.no_grad()
    def _measure(self) -> list[dict[str, float]]:
        """Return the loss and metrics of each trial on the validation split."""
        batches = self.first.val_batches
        assert batches is not None
        sums = Sums(self.first.metrics, len(self.trials), self.first.device, batches.max_buffered)
        with undisturbed():
            for batch in batches.epoch():
                placed = move_batch(batch, self.first.device)
                sums.add(
                    self.stack(self.rows, placed, True, training=False), self._count(placed, True)
                )
        return sums.read()

    def _each(
        self,
        do: Callable[[StackedTrial], Any],
        trials: Sequence[StackedTrial] | None = None,
    ) -> None:
        """Do something with each trial, or with some; a trial that fails leaves."""
        failed = []
        for row, trial in enumerate(self.trials):
            if trials is not None and trial not in trials:
                continue
            try:
                with no_exit():
                    do(trial)
            except Exception as error:
                self._close(trial, error)
                failed.append(row)
        if failed:
            self._keep([row for row in range(len(self.trials)) if row not in failed])

    def _leave_done(self) -> None:
        """Let the trials go that are done; the others move together."""
        done = [row for row, trial in enumerate(self.trials) if trial.trainer.done]
        if not done:
            return
        leaving = [self.trials[row] for row in done]
        self._keep([row for row in range(len(self.trials)) if row not in done])
        for callback in (callback for trial in leaving for callback in trial.trainer.callbacks):
            if isinstance(callback, SavingCallback):
                callback.hurry_saving()  # all at once: below, each waits for its own writes
        for trial in leaving:
            self._close(trial, None)

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.trials):
            return
        for trial in (trial for row, trial in enumerate(self.trials) if row not in rows):
            trial.trainer.measures.leave()  # type: ignore[attr-defined]
        self.rows.keep(rows)
        if self.graphed is not None:
            self.graphed.captured.clear()  # they write to the memory of more rows
        self.stack.keep(rows)
        self.sums.keep(rows)
        self.trials = [self.trials[row] for row in rows]
        if self.orders is not None:
            self.orders = self.orders[rows]
        for row, trial in enumerate(self.trials):
            trial.trainer.measures.row = row  # type: ignore[attr-defined]

    def _close(self, trial: StackedTrial, error: BaseException | None) -> None:
        """End a trial's fit, well or not, and tell how."""
        try:
            trial.fitting.__exit__(
                type(error) if error else None, error, error.__traceback__ if error else None
            )
        except BaseException as raised:  # what it was given, or what ending it led to
            error = raised
        self.ended(trial.number, error)


def loader_of(trainer: Trainer) -> Loader:
    if not isinstance(trainer.train_batches, Loader):
        raise NotStackable("their data is an iterable of batches")
    return trainer.train_batches


def check_alike(trainers: Sequence[Trainer]) -> None:
    """Raise NotStackable for settings that train a model in another way than step by step, or not all in the same."""
    for trainer in trainers:
        check_stackable(trainer.callbacks)
        if (
            trainer.compile != "off"
            or trainer.profile
            or trainer.micro_batches.size
            or trainer.micro_batches.auto
        ):
            raise NotStackable(
                "trainer.compile, trainer.profile and trainer.micro_batch are for one trial"
            )
        if trainer.precision.scaler is not None:
            raise NotStackable(
                "trainer.precision=fp16 scales the loss of each trial by its own factor"
            )
    if len({tuple(map(type, trainer.callbacks)) for trainer in trainers}) > 1:
        raise NotStackable("their callbacks are not the same")
    for name in ("accumulate", "device", "deterministic"):
        if len({getattr(trainer, name) for trainer in trainers}) > 1:
            raise NotStackable(f"trainer.{name} is not the same")
    cadences = {
        (each.precision.dtype, each.log_every.every, each.validate_every.every) for each in trainers
    }
    if len(cadences) > 1:
        raise NotStackable("trainer.precision, log_every or validate_every are not the same")
