"""The training step: from the batches of a step to the updated parameters.

`TrainingStep` is the step: `__call__`, `backward_and_update` and `backward`. Forward and backward
run eagerly, compiled or as a CUDA graph; `select_step` chooses once, when a fit starts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.context import Context
from framework.contracts.loss import portion, share_of
from framework.contracts.metric import Mark, Measures
from framework.contracts.schedule import factor_of
from framework.contracts.strategy import Strategy
from framework.contracts.task import Phase, Step, Task
from framework.contracts.transform import Transform, transformed_all
from framework.data.dataset import Batch
from framework.errors.terminal import print_note
from framework.runtime import seeds
from framework.runtime.batch import count_rows, move_batch
from framework.runtime.clock import Clock
from framework.runtime.memory import MicroBatches, versions
from framework.runtime.precision import Precision
from framework.runtime.torch_internals.backward_engine import run_backward

from .acceleration.callbacks import GradientCallbacks
from .acceleration.compile_choice import CompileChoice, MeasuredStep
from .acceleration.compiled_step import (
    Compile,
    Compiled,
    CompiledSingleCall,
    CompiledStep,
    ExplainedStep,
)
from .acceleration.cuda_graph import CudaGraph, GraphedSingleCall, GraphedStep
from .acceleration.fused_selection import prepare_step
from .acceleration.fused_update import FusedUpdate
from .agreement import StepTotals, own_random_numbers, step_totals
from .parameters import ModelParameters
from .step_checks import (
    check_gradients,
    check_input_dtype,
    check_parameters_reached,
    check_result,
    count_of,
    first_update_error,
)


class StepContext(Context, Protocol):
    """The trainer as the training step uses it: a `Context` with transforms and events."""

    transforms: list[Transform]

    def emit(self, event: str) -> None:
        """Call the callbacks that listen to an event."""


class StepImplementation(Protocol):
    """Runs forward and backward of a batch, and with some implementations the update too."""

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Add the gradients of the loss of a batch to the existing gradients.

        Args:
            batch: a batch of the step, or a part of one, on the device.
            share: the share of the batch in the items of the step, a factor on the loss; None if
                it is the only batch of the step.
            phase: the phase of the step. Only eager steps have phases (see `check_phases`).

        Returns:
            The result of the task, and whether the parameters are updated already.
        """


@dataclass(kw_only=True, eq=False)
class TrainingStep:
    """The training step of a fit.

    Attributes:
        measures: receive the loss, outputs and targets of each batch.
        forward_backward: runs forward and backward.
        update: does the same as `optimizer.step()`.
        strategy: the processes that share the step.
        totals: of the step, over all processes; None in a single process.
        is_first: no step is done yet.
        is_first_update: no update is done yet.
        checked_reach: names of the phases for which `check_parameters_reached` has run.
        checked_task: names of the phases for which `Task.check_first` has run.
    """

    model: nn.Module
    task: Task
    optimizer: Optimizer
    device: torch.device
    precision: Precision
    micro_batches: MicroBatches
    measures: Measures
    clock: Clock
    parameters: ModelParameters
    forward_backward: StepImplementation
    update: Callable[[], None]
    strategy: Strategy
    totals: StepTotals | None = field(default=None, init=False)
    is_first: bool = field(default=True, init=False)
    is_first_update: bool = field(default=True, init=False)
    checked_reach: set[str | None] = field(default_factory=set, init=False)
    checked_task: set[str | None] = field(default_factory=set, init=False)

    def __call__(self, trainer: StepContext, window: Sequence[Batch]) -> None:
        """Train on the batches of a step, with one update, or one for each phase of the task.

        Args:
            trainer: the fit, whose `loss` is set.
            window: the batches of the step; their gradients are accumulated. With several
                processes, each has a part of the rows of a batch, perhaps none (`NO_ROWS`).
        """
        if self.parameters.others:
            self.parameters.clear_other_gradients()
        trainer.emit("step_start")
        with self.clock.detail("copy"):
            batches = self.read(trainer, window)
        set_learning_rates(self.optimizer, trainer.schedule, trainer.state.step)

        if not self.task.phases:
            self.backward_and_update(trainer, batches)
        for number, phase in enumerate(self.task.phases):
            with only_trains(self.model, phase):
                self.backward_and_update(trainer, batches, phase, number)
        self.strategy.share_buffers()
        self.is_first = False

    def read(self, trainer: StepContext, window: Sequence[Batch]) -> list[Batch]:
        """Return the batches of a step that have rows, on the device and after all transforms."""
        batches = [move_batch(batch, self.device) for batch in window if batch]
        if trainer.transforms and batches:
            with self.own_random_numbers(trainer, "transforms"):
                batches = transformed_all(batches, trainer.transforms, self.task.fields)
        if self.strategy.world_size > 1:
            self.totals = self.count_totals(window, batches)
        return batches

    def own_random_numbers(
        self, trainer: StepContext, part: object
    ) -> AbstractContextManager[None]:
        """Return the context manager in which this process draws random numbers of its own."""
        return own_random_numbers(self.strategy, trainer.seed, trainer.state.step, part)

    def count_totals(self, window: Sequence[Batch], batches: Sequence[Batch]) -> StepTotals:
        """Return the sums of a step over all processes (collective).

        Args:
            window: the batches of the step.
            batches: those that have rows in this process.
        """
        counts = [count_of(self.task, batch) for batch in batches]
        collective = self.strategy.forward_is_collective or not self.task.splits_batches
        needed = len(window) if collective else 0
        return step_totals(self.strategy, batches, counts, self.device, needed)

    def backward_and_update(
        self,
        trainer: StepContext,
        batches: Sequence[Batch],
        phase: Phase | None = None,
        number: int = 0,
    ) -> None:
        """Compute the gradients of the batches, and update the parameters with them.

        Args:
            trainer: the fit.
            batches: those of the step, on the device.
            phase: the phase of the step, or None.
            number: of the phase in the step.
        """
        backward = self.backward_with_retry if self.micro_batches.auto else self.backward
        try:
            with self.own_random_numbers(trainer, number):
                trainer.loss, updated = backward(batches, phase)
        except RuntimeError as error:
            if batches:
                check_input_dtype(error, self.model, batches[0])
            raise
        if not updated:
            trainer.loss = self.sum_gradients(trainer.loss)
            if self.is_first:
                check_gradients(self.parameters.optimized)
            self.precision.unscale(self.optimizer)
            trainer.batches = batches
            trainer.emit("gradients")
            trainer.batches = ()
            with self.clock.detail("optimizer"):
                if self.is_first_update:
                    self.first_update()
                else:
                    self.update()
        for parameter in self.parameters.optimized:
            parameter.grad = None

    def backward(self, batches: Sequence[Batch], phase: Phase | None) -> tuple[Tensor, bool]:
        """Compute the gradients of the mean loss over all items of the step.

        Returns:
            The mean loss, shape (), and whether the parameters are updated already. With several
            processes, their sum is the mean loss, and that of their gradients its gradient.
        """
        self.parameters.refresh()
        parts: list[Batch] = []
        for batch in batches:
            parts += self.micro_batches.split(batch)
        counts = [count_of(self.task, part) for part in parts]  # a model may change its inputs
        shares: Sequence[float | Tensor | None] = [None]  # a single part needs no factor
        if self.totals is not None:
            shares = [share_of(count, self.totals.items) for count in counts]
        elif len(parts) > 1:
            shares = shares_of(counts)

        losses = []
        for part, count, share in zip(parts, counts, shares, strict=True):
            result, updated = self.forward_backward(part, share, phase)
            self.check_first(result, phase, count_rows(part))
            outputs: Tensor | None = result.outputs
            targets: Tensor | None = result.targets
            if phase is not None:  # metrics are for outputs of evaluation, which may differ
                outputs = None
                targets = None
            self.measures.add(result.loss, outputs, targets, count, result.values)
            loss = result.loss.detach()
            losses.append(loss if share is None else portion(loss, share))
        if not losses:  # other processes have all rows
            return torch.zeros((), device=self.device), False
        return sum(losses[1:], losses[0]), updated

    def sum_gradients(self, loss: Tensor) -> Tensor:
        """Sum the gradients of all processes; return the sum of the losses (collective)."""
        return self.strategy.sum_gradients(self.parameters.optimized, loss)

    def backward_with_retry(
        self,
        batches: Sequence[Batch],
        phase: Phase | None,
    ) -> tuple[Tensor, bool]:
        """Run `backward`; if memory is full, repeat it with smaller micro-batches."""
        before = StepSnapshot(
            measures=self.measures.mark(),
            buffers=[buffer.clone() for buffer in self.model.buffers()],
            random=seeds.capture(),
        )
        unchanged = versions(batches)
        while True:
            try:
                return self.backward(batches, phase)
            except (MemoryError, RuntimeError) as error:
                if not self.micro_batches.halve(error, versions(batches) == unchanged):
                    raise
            self.undo(before)  # not in `except`: its traceback keeps the tensors of the pass

    def undo(self, before: "StepSnapshot") -> None:
        """Restore the state before a backward pass that failed."""
        self.measures.undo(before.measures)
        for buffer, saved in zip(self.model.buffers(), before.buffers, strict=True):
            buffer.copy_(saved)  # running statistics include a part of the batch
        seeds.restore(before.random)
        for parameter in (*self.parameters.optimized, *self.parameters.others):
            parameter.grad = None

    def first_update(self) -> None:
        """Run the first update.

        Raises:
            SettingError: the optimizer needs more than one backward pass and `step()`.
        """
        self.is_first_update = False
        try:
            self.update()
        except Exception as error:
            if self.precision.scaler is not None:
                raise
            explained = first_update_error(self.optimizer, error)
            if explained is None:
                raise
            raise explained from error

    def check_first(self, result: Step, phase: Phase | None, samples: int) -> None:
        """Check the first step of each phase before the update.

        The task checks the first batch of several samples, since a single sample hides some errors.
        """
        name = None if phase is None else phase.name
        if name in self.checked_task:
            return
        if name not in self.checked_reach:
            self.checked_reach.add(name)
            check_parameters_reached(self.task, result.loss, self.model)
        if samples > 1:
            self.checked_task.add(name)
            self.task.check_first(result)


class StepSnapshot(NamedTuple):
    """The state that a backward pass changes, apart from gradients."""

    measures: Mark
    buffers: list[Tensor]
    random: dict[str, Any]


class EagerStep:
    """Forward and backward by PyTorch operations; the model alone may be compiled.

    Args:
        forward: the model, or a compiled function that computes the same.
        parameters: the trained parameters, for error messages.
        precision: autocast and gradient scaler.
        clock: for the profiler.
        strategy: runs the forward pass.
    """

    def __init__(
        self,
        forward: nn.Module | Callable[..., Any],
        task: Task,
        parameters: ModelParameters,
        precision: Precision,
        clock: Clock,
        strategy: Strategy,
    ):
        self.forward: Any = forward
        self.task = task
        self.parameters = parameters
        self.precision = precision
        self.clock = clock
        self.run = strategy.forward

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Run forward and backward; never update the parameters."""
        with self.clock.detail("forward"), self.precision.autocast():
            if phase is None:
                result = self.run(self.task.step, self.forward, batch)
            else:
                result = self.run(partial(self.task.phase, phase.name), self.forward, batch)
        with self.clock.detail("backward"):
            try:
                loss = result.loss if share is None else result.loss * share
                run_backward(self.precision.scaled(loss))
            except (AttributeError, TypeError, RuntimeError):
                check_result(self.task, result, self.parameters.optimized)
                raise
        return result, False


def select_step(  # noqa: PLR0913  # all by keyword, from one place
    *,
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    parameters: ModelParameters,
    precision: Precision,
    micro_batches: MicroBatches,
    clock: Clock,
    compile: Compile,  # noqa: A002  # the name of the setting
    compile_choice: CompileChoice,
    cuda_graph: CudaGraph,
    callbacks: GradientCallbacks,
    call_recordable: Callable[[Tensor], None],
    strategy: Strategy,
) -> StepImplementation:
    """Return the implementation of forward and backward for a fit.

    Args:
        model: the model in training.
        task: computes the loss; one with phases runs eagerly.
        optimizer: its update is a part of the step if possible.
        parameters: those of the model and the optimizer.
        precision: autocast and gradient scaler.
        micro_batches: if `auto`, no step includes the update.
        clock: receives the time of compilations; for the profiler.
        compile: off, model, step, or auto to compile steps only if they are faster.
        compile_choice: receives the choice of auto.
        cuda_graph: off, on, or auto to capture graphs only if they are faster.
        callbacks: those that listen to `gradients`.
        call_recordable: calls the recordable ones of them, with the loss of the step.
        strategy: with several processes each computes a part of the gradients, so that no step can
            include the update.
    """
    forward = Compiled(model, compile, clock) if compile == "model" else model
    eager = EagerStep(forward, task, parameters, precision, clock, strategy)
    step: StepImplementation = eager
    # An update cannot be undone if memory is full.
    with_update = not micro_batches.auto and strategy.world_size == 1
    if compile in ("step", "auto") and not task.phases:
        compiled_call = None
        if with_update:
            compiled_call = CompiledSingleCall(
                model, task, optimizer, precision, clock, callbacks, compile
            )
        step = CompiledStep(model, task, parameters, precision, clock, compiled_call, compile)
        if compile == "auto":
            step = MeasuredStep(eager, step, compile_choice, precision.device)
            if compile_choice.kind is not None:
                print_note(f"compile=auto: {compile_choice.kind} steps, as in the resumed run")
    elif compile == "auto":
        compile_choice.kind = "eager"
        print_note(f"compile=auto: eager steps, as {type(task).__name__} updates in phases")
    elif cuda_graph != "off" and not task.phases:
        graphed_call = None
        if with_update:
            graphed_call = GraphedSingleCall(
                eager=eager,
                optimizer=optimizer,
                precision=precision,
                mode=cuda_graph,
                model=model,
                callbacks=callbacks,
                call_recordable=call_recordable,
            )
        step = GraphedStep(eager, parameters, cuda_graph, model, graphed_call, clock)
    if compile != "off":
        step = ExplainedStep(step, model, task, parameters, precision)
    return step


def select_update(optimizer: Optimizer, precision: Precision) -> Callable[[], None]:
    """Return a function that does the same as `optimizer.step()`, with the scaler of fp16."""
    if precision.scaler is None:
        return FusedUpdate(optimizer)

    def update() -> None:
        prepare_step(optimizer)
        precision.step(optimizer, optimizer.step)

    return update


def set_learning_rates(
    optimizer: Optimizer,
    schedule: Callable[[int], float] | None,
    step: int,
) -> None:
    """Set the learning rate of each group for a step: its initial rate times the factor."""
    if schedule is None:
        return
    factor = factor_of(schedule, step)
    for group in optimizer.param_groups:
        base = group.setdefault("initial_lr", group["lr"])  # a callback may have added the group
        group["lr"] = base * factor


def shares_of(counts: Sequence[int | Tensor]) -> list[float | Tensor]:
    """Return the share of each batch in the items of a step.

    The sum of the mean losses times their shares is the mean over all items.
    """
    total = sum(counts)
    return [share_of(count, total) for count in counts]


@contextmanager
def only_trains(model: nn.Module, phase: Phase) -> Iterator[None]:
    """Disable gradients of the parameters that a phase does not move."""
    frozen = []
    for name, parameter in model.named_parameters():
        moves = any(fnmatch(name, pattern) for pattern in phase.moves)
        if parameter.requires_grad and not moves:
            frozen.append(parameter)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
