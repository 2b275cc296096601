"""Checks before training that stacked trials give the losses and gradients of single trials."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from framework.contracts.task import Task
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.errors.user_code import describe
from framework.runtime import seeds
from framework.runtime.batch import map_tensors, select_rows
from framework.runtime.precision import Precision

from .stacked_forward import StackedForward
from .stacked_update import NotStackable, StackedState

MAX_SAMPLES = 8  # of the batch
COMPARED_TRIALS = 8  # from the first to the last
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Allowed difference relative to the largest number; rounding depends on the order of sums."""
Gradients = dict[str, Tensor | None]
Result = TypeVar("Result")


class SingleResult(NamedTuple):
    """Results of a forward and backward pass of one trial, in evaluation mode."""

    loss: Tensor
    gradients: Gradients  # by name of the parameter

    @property
    def largest(self) -> float:
        return max(largest_number(each) for each in (self.loss, *self.gradients.values()))


def batches_of_trials(batch: Batch, trials: int) -> list[Batch]:
    """Return the batch of each trial from one whose tensors have a first axis of trials."""
    return [map_tensors(itemgetter(number), batch) for number in range(trials)]


class EquivalenceCheck:
    """Compares stacked trials with some of the single trials.

    It runs the single trials when it is created, while their models still have their own tensors.
    It changes no weights, buffers or random numbers, and no other state of a model.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tasks: Sequence[Task],
        batch: Batch,
        shared: bool,
        precision: Precision,
    ):
        """Run some trials alone.

        Args:
            models: the model of each trial.
            tasks: the task of each trial.
            batch: a batch for all trials; if it is not shared, its first axis is that of trials.
            shared: whether all trials get the same batch.
            precision: the number format.
        """
        self.shared = shared
        self.precision = precision
        if shared:
            self.batch = select_rows(batch, 0, MAX_SAMPLES)
            batches = [self.batch] * len(models)
        else:
            self.batch = map_tensors(lambda tensor: tensor[:, :MAX_SAMPLES], batch)
            batches = batches_of_trials(self.batch, len(models))
        last = len(models) - 1
        rows = {round(n * last / (COMPARED_TRIALS - 1)) for n in range(COMPARED_TRIALS)}
        self.single: dict[int, SingleResult] = {}
        for row in sorted(rows):
            run = partial(self._run_single, models[row], tasks[row], batches[row])
            self.single[row] = run_seeded(run)

    def _run_single(self, model: nn.Module, task: Task, batch: Batch) -> SingleResult:
        copied = copy.deepcopy(model).eval()
        parameters = {
            name: parameter
            for name, parameter in copied.named_parameters()
            if parameter.requires_grad
        }
        with self.precision.autocast():
            loss = task.step(copied, batch).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return SingleResult(loss.detach(), dict(zip(parameters, gradients, strict=True)))

    def compare(self, forward: StackedForward, state: StackedState) -> None:
        """Run all trials as one, and compare their results.

        Raises:
            NotStackable: that fails, or the results differ from those of single trials.
        """
        loss, gradients = self._run_stacked(forward, state, training=True)
        if loss.shape != (len(state),):
            raise NotStackable(
                f"the task's loss: expected a single number, got the shape {tuple(loss.shape[1:])}"
            )
        for name, gradient in gradients.items():
            if gradient is None:
                raise NotStackable(
                    f"the loss does not depend on {name}: a single trial would not update it"
                )
        loss, gradients = self._run_stacked(forward, state, training=False)
        for row, single in self.single.items():
            largest = single.largest
            dtype = self.precision.dtype or loss.dtype
            if exceeds_rounding(loss[row], single.loss, largest, dtype):
                raise NotStackable("the loss differs from that of a single trial")
            for name, gradient in gradients.items():
                own = None if gradient is None else gradient[row]
                if exceeds_rounding(own, single.gradients[name], largest, dtype):
                    raise NotStackable(
                        f"the gradient of {name} differs from that of a single trial"
                    )

    def _run_stacked(
        self, forward: StackedForward, state: StackedState, training: bool
    ) -> tuple[Tensor, Gradients]:
        """Return the loss of each trial, and the gradients of each parameter of all trials."""
        tensors = [state.weights, *state.fixed.values(), *state.buffers.values()]
        copies = [tensor.clone() for tensor in tensors]

        def run() -> tuple[Tensor, Gradients]:
            loss = forward(state, self.batch, self.shared, training).loss
            changed = forward.changed_attribute()
            if changed is not None:
                raise NotStackable(f"a forward pass changes {changed}, which trials would share")
            leaves = list(state.leaves.values())
            gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
            return loss.detach(), dict(zip(state.leaves, gradients, strict=True))

        try:
            return run_seeded(run)
        finally:
            for tensor, before in zip(tensors, copies, strict=True):
                tensor.copy_(before)


def run_seeded(run: Callable[[], Result]) -> Result:
    """Run a function with fixed random numbers, and restore the generators.

    Raises:
        NotStackable: the function raises an error.
    """
    try:
        with seeds.stream(0):
            return run()
    except FrameworkError:
        raise
    except Exception as error:
        raise NotStackable(describe(error)) from error


def largest_number(tensor: Tensor | None) -> float:
    """Return the largest finite magnitude in a tensor; 0 for None."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(posinf=0.0).max())


def exceeds_rounding(
    tensor: Tensor | None, expected: Tensor | None, largest: float, dtype: torch.dtype
) -> bool:
    """Return whether two tensors differ by more than rounding errors.

    Args:
        tensor: the tensor of stacked trials; None is a gradient of zeros.
        expected: the tensor of a single trial.
        largest: the largest magnitude in the loss and all gradients.
        dtype: the number format of the computation.
    """
    if tensor is None or expected is None:
        return largest_number(tensor) != largest_number(expected)
    tolerance = TOLERANCE.get(dtype)
    if tolerance is None:
        atol = 0.1 * largest
    else:
        atol = tolerance * max(largest_number(expected), 1e-4 * largest)
    return not torch.allclose(tensor, expected, rtol=0, atol=atol, equal_nan=True)
