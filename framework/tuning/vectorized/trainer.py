"""Trains many trials as one: their trainers go in step, the arithmetic is done for all of them at once.

Each trainer keeps its own counters, callbacks, loggers, schedule and folder, and meets the events of `callback.py` in
their order; only what computes (forward, backward, update, sums, validation) is the stack's.
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
from framework.runtime.device import deterministic_algorithms
from framework.runtime.memory import memory_errors
from framework.runtime.seeds import undisturbed
from framework.training.acceleration.cuda_graph import Graphed
from framework.training.trainer import Trainer

from .callbacks import check_stackable, clip_rows_of, prepare
from .differences import same
from .rehearsal import Rehearsal
from .stacked_forward import RowMeasures, Stack, Sums
from .stacked_update import NotStackable, Rows

Fit = dict[str, Any]
"""The arguments of `Trainer.fit`."""


class Member:
    """A trainer on its way."""

    def __init__(self, number: int, trainer: Trainer, fit: Fit):
        self.number, self.trainer, self.fit = number, trainer, fit
        self.way: AbstractContextManager[None] = trainer.fitting()
        self.looking = [listener.__self__ for listener in trainer._listeners["gradients"]]  # type: ignore[attr-defined]
        self.alone = [each for each in self.looking if clip_rows_of(type(each)) is None]

    def wants_gradients(self) -> bool:
        """Whether somebody who cannot look at all rows at once must see them, though they are finite."""
        return any(each.needs_gradients(self.trainer) for each in self.alone)


Ended = Callable[[int, BaseException | None], None]


class Lockstep:
    """Fits trainers together. `ended` is called with a trial's number when it is done, and with what it failed by.

    Raises NotStackable before anything is done when they cannot.
    """

    def __init__(self, trainers: Sequence[Trainer], fits: Sequence[Fit], ended: Ended = lambda number, error: None):
        check_alike(trainers)
        self.trials = [Member(number, *pair) for number, pair in enumerate(zip(trainers, fits, strict=True))]
        self.first = trainers[0]
        self.ended = ended
        self._begin()
        models, tasks = [t.model for t in trainers], [t.task for t in trainers]
        self.orders: torch.Tensor | None = None
        batch = self.first._place(next(iter(self._batches(0, 0)))[0])
        rehearsal = Rehearsal(models, tasks, batch, self.orders is None, self.first.precision)
        still = self.first.modes.names()
        if any(trainer.modes.names() != still for trainer in trainers):
            raise NotStackable("the modules that stay in evaluation mode are not the same")
        self.stack = Stack(models, tasks, self.first.precision, still)
        self.rows = Rows(models, [t.optimizer for t in trainers])
        self.graphed: Graphed | None = None
        if self.first.cuda_graph != "off":  # without, nothing refers to itself, and all is freed when trials are done
            run, mode = self._forward_and_backward, self.first.cuda_graph
            self.graphed = Graphed("the step of all trials", run, lambda: [], mode)
        self.failed: dict[int, BaseException] = {}
        self._sum_anew()
        rehearsal.together(self.stack, self.rows)

    def _begin(self) -> None:
        for name, loader, first in [pair for trial in self.trials for pair in self._loaders(trial)]:
            if not same(loader.split, first.split):  # before `begin` moves the first one's to the device
                raise NotStackable(f"{name} is not the same")
        for trial in self.trials:
            prepare(trial.trainer.callbacks, len(self.trials))
            for _, loader, first in self._loaders(trial):
                loader.split, loader.whole = first.split, first.whole  # one copy on the device for all
            trial.trainer.begin(**trial.fit)
        if not all(same(trial.trainer.metrics, self.first.metrics) for trial in self.trials):
            raise NotStackable("their metrics are not the same")
        if len({(t.trainer.state.step, t.trainer.state.batch) for t in self.trials}) > 1:
            raise NotStackable("they go on after different steps")
        loaders = [loader_of(trial.trainer) for trial in self.trials]
        if len({(len(loader), loader.batch_size) for loader in loaders}) > 1:
            raise NotStackable("loader.batch_size is not the same")
        if len({(loader.shuffle, loader.even is None, loader.limit) for loader in loaders}) > 1:
            raise NotStackable("loader.sampling or loader.limit is not the same")
        if len({trial.trainer.val_batches is None for trial in self.trials}) > 1:
            raise NotStackable("some have data to validate on, and some have none")
        if len({loader.seed for loader in loaders}) > 1 and loaders[0].tensors is None:
            raise NotStackable("they read samples in different orders, and the data is not in memory")

    def _loaders(self, trial: Member) -> Iterator[tuple[str, Loader, Loader]]:
        """Yield a trial's loaders, each with that of the first trial."""
        for name in ("data", "val"):
            loader, first = trial.fit[name], self.trials[0].fit[name]
            if isinstance(loader, Loader) and isinstance(first, Loader):
                yield name, loader, first

    def _sum_anew(self) -> None:
        self.sums = Sums(self.first.metrics, len(self.trials), self.first.device, self.first.train_batches.hold)
        for row, trial in enumerate(self.trials):
            resumed = trial.trainer.measures
            trial.trainer.measures = RowMeasures(self.sums, row)
            trial.trainer.measures.load_state_dict(resumed.state_dict())

    def run(self) -> None:
        """Train until the last trial is done."""
        with deterministic_algorithms(self.first.deterministic), memory_errors(self.first.device):
            try:
                self._each(lambda trial: trial.way.__enter__())
                self._leave_done()
                with torch_errors():
                    while self.trials:
                        with no_exit():
                            self._epoch()
            except BaseException as error:
                for trial in self.trials:
                    self._close(trial, error)
                raise

    def _epoch(self) -> None:
        """Run one epoch, from the batch where the trials stand, or until the last of them is done."""
        state = self.trials[0].trainer.state
        for trial in self.trials:
            trial.trainer.modes.train()
        if state.batch == 0:
            self._each(lambda trial: trial.trainer._emit("epoch_start"))
        if not self.trials:
            return
        left = state.steps_per_epoch - state.batch // self.first.accumulate
        for window, last in steps(self._batches(state.epoch, state.batch), self.first.accumulate, left):
            self._step([batch for batch, _ in window])  # type: ignore[misc]
            self._after([sizes for _, sizes in window], last)  # type: ignore[misc]
            self._leave_done()
            if last or not self.trials:
                return

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield batches, shared by all trials or each with its own row, and one trial's batch to count samples by."""
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
        self.orders = torch.stack([loader._order(epoch)[: len(first) * size] for loader in loaders])
        self.orders = self.orders.to(tensors[0].device)
        for number in range(start, len(first)):
            chosen = self.orders[:, number * size : (number + 1) * size]
            batch = tuple(t.index_select(0, chosen.reshape(-1)).view(*chosen.shape, *t.shape[1:]) for t in tensors)
            yield batch, tuple(tensor[0] for tensor in batch)

    def _step(self, batches: list[Batch]) -> None:
        """The training step of all trials: forward, backward, gradients, update."""
        for trial in self.trials:
            trial.trainer.at_boundary = False
            trial.trainer._emit("step_start")
            trial.trainer._set_learning_rate()
        self._gradients([self.first._place(batch) for batch in batches])
        for trial, loss in zip(self.trials, self.losses.unbind(), strict=True):
            trial.trainer.loss = loss
        self.rows.update(self._look())

    def _gradients(self, batches: list[Batch]) -> None:
        shared = self.orders is None
        counts = [self._count(batch, shared) for batch in batches]
        whole = sum(counts)
        mean: Any = 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            if len(batches) == 1:
                beside = shared, self.rows.weights.data_ptr()
                step = self.graphed(batch, beside) if self.graphed else self._forward_and_backward(batch)
                mean = step.loss.detach()
            else:
                step = self.stack(self.rows, batch, shared)
                share = share_of(count, whole)
                self.rows.differentiate(step.loss * share, add=number > 0)
                mean = mean + portion(step.loss.detach(), share)
            self.sums.add(step, count)
        self.losses = mean

    def _forward_and_backward(self, batch: Batch) -> Step:
        step = self.stack(self.rows, batch, self.orders is None)
        self.rows.differentiate(step.loss)
        return step

    def _count(self, batch: Batch, shared: bool) -> Any:
        count = self.first.task.count(batch if shared else tuple(tensor[0] for tensor in batch))
        if not self.stack.weighs_apart and (shared or isinstance(count, int)):  # the number of samples is everybody's
            return count
        batches = [batch] * len(self.trials) if shared else zip(*batch, strict=True)
        counts = [trial.trainer.task.count(mine) for trial, mine in zip(self.trials, batches, strict=True)]
        if all(isinstance(each, int) and each == counts[0] for each in counts):
            return counts[0]
        return torch.stack([torch.as_tensor(each, device=self.first.device) for each in counts])

    def _look(self) -> list[int]:
        """Let those look at the gradients who want to, in their order; returns the rows that get no update."""
        if not any(trial.looking for trial in self.trials):
            return []
        finite = (self.rows.gradients.sum(1) + self.losses).isfinite().tolist()
        looked = [row for row, trial in enumerate(self.trials) if not finite[row] or trial.wants_gradients()]
        for row in looked:
            self.rows.lend_gradients(row)
        for position, listener in enumerate(self.trials[0].looking):
            clip_rows = clip_rows_of(type(listener))
            if clip_rows is not None:
                for row in looked:
                    if self._take_gradients(row):  # a callback before it may have put others in their place
                        self.rows.lend_gradients(row)
                clip_rows([trial.looking[position] for trial in self.trials], self.rows.gradients)
                continue
            for row in looked:
                self._show_gradients(row, position)
        return [row for row in looked if not self._take_gradients(row) or row in self.failed]

    def _take_gradients(self, row: int) -> bool:
        try:
            return self.rows.take_gradients(row)
        except FrameworkError as error:
            self.failed.setdefault(row, error)
            return False

    def _show_gradients(self, row: int, position: int) -> None:
        try:
            if row not in self.failed:
                self.trials[row].looking[position].on_gradients(self.trials[row].trainer)
        except Exception as error:
            self.failed[row] = error

    def _after(self, sizes: list[Batch], last: bool) -> None:
        """What follows a step, for each trial as its trainer does it; validation for all of them at once."""
        failed, self.failed = self.failed, {}
        for row in failed:
            self._close(self.trials[row], failed[row])
        self._keep([row for row in range(len(self.trials)) if row not in failed])
        self._each(lambda trial: self._count_and_log(trial.trainer, sizes, last))
        due = [trial for trial in self.trials if trial.trainer.validates(last)]
        if due:
            self._validate(due)
        self._each(lambda trial: trial.trainer.stepped(last))

    def _count_and_log(self, trainer: Trainer, sizes: list[Batch], last: bool) -> None:
        trainer.counted(sizes, last)
        if trainer.logs(last):
            trainer.log_training()

    def _validate(self, due: Sequence[Member]) -> None:
        began = time.perf_counter()
        self._each(lambda trial: trial.trainer._emit("validation_start") if trial in due else None)
        values = self._measure()
        seconds = time.perf_counter() - began
        found = dict(zip(self.trials, values, strict=True))
        self._each(lambda trial: trial.trainer.validated(found[trial], seconds) if trial in due else None)

    @torch.no_grad()
    def _measure(self) -> list[dict[str, float]]:
        """Return the loss and metrics of each trial on the validation split."""
        batches = self.first.val_batches
        assert batches is not None
        sums = Sums(self.first.metrics, len(self.trials), self.first.device, batches.hold)
        with undisturbed():
            for batch in batches.epoch():
                placed = self.first._place(batch)
                sums.add(self.stack(self.rows, placed, True, training=False), self._count(placed, True))
        return sums.read()

    def _each(self, do: Callable[[Member], Any]) -> None:
        """Do something with each trial; one that fails leaves."""
        failed = []
        for row, trial in enumerate(self.trials):
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

    def _close(self, trial: Member, error: BaseException | None) -> None:
        """End a trial's fit, well or not, and tell how."""
        try:
            trial.way.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
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
        if trainer.compile != "off" or trainer.profile or trainer.micro_batches.size or trainer.micro_batches.auto:
            raise NotStackable("trainer.compile, trainer.profile and trainer.micro_batch are for one trial")
        if trainer.precision.scaler is not None:
            raise NotStackable("trainer.precision=fp16 scales the loss of each trial by its own factor")
    if len({tuple(map(type, trainer.callbacks)) for trainer in trainers}) > 1:
        raise NotStackable("their callbacks are not the same")
    for name in ("accumulate", "device", "deterministic"):
        if len({getattr(trainer, name) for trainer in trainers}) > 1:
            raise NotStackable(f"trainer.{name} is not the same")
    cadences = {(each.precision.dtype, each.log_every.every, each.validate_every.every) for each in trainers}
    if len(cadences) > 1:
        raise NotStackable("trainer.precision, log_every or validate_every are not the same")
