"""A pass of all trials before any of it counts: they must give what they give alone, or they train one by one."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framework.contracts.task import Task
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.errors.user_code import describe
from framework.runtime.precision import Precision
from framework.runtime.seeds import seed_everything, undisturbed

from .stacked_forward import Stack
from .stacked_update import NotStackable, Rows

SAMPLES, COMPARED = 8, 8  # of a batch; of the trials, from the first to the last
CLOSE = {
    torch.float64: 1e-8,
    torch.float32: 1e-2,
}  # of the largest number; by rounding, sums in another order differ


class Pass(NamedTuple):
    """What a pass in evaluation gives for one trial: its loss, and the gradient of each parameter."""

    loss: Tensor
    gradients: dict[str, Tensor | None]


class Rehearsal:
    """Takes down what some trials give alone, while their models are their own; then compares what they give together.

    Nothing is changed by it: not a weight, a buffer, a random number, nor what a forward pass keeps for itself.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tasks: Sequence[Task],
        batch: Batch,
        shared: bool,
        how: Precision,
    ):
        """Run some trials alone. batch: of all trials, or with a first axis of trials when it is not shared."""
        self.shared, self.how = shared, how
        self.batch = tuple(tensor[:SAMPLES] if shared else tensor[:, :SAMPLES] for tensor in batch)
        batches = [self.batch] * len(models) if shared else list(zip(*self.batch, strict=True))
        trials = list(zip(models, tasks, batches, strict=True))
        chosen = {round(n * (len(trials) - 1) / (COMPARED - 1)) for n in range(COMPARED)}
        self.alone = {row: self._aside(partial(self._one, *trials[row])) for row in sorted(chosen)}

    def _one(self, model: nn.Module, task: Task, batch: Batch) -> Pass:
        copied = copy.deepcopy(model).eval()
        trained = {
            name: parameter
            for name, parameter in copied.named_parameters()
            if parameter.requires_grad
        }
        with self.how.autocast():
            loss = task.step(copied, batch).loss
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return Pass(loss.detach(), dict(zip(trained, found, strict=True)))

    def _aside(self, run: Callable[[], Any]) -> Any:
        """Return what comes of a pass that begins with the same random numbers each time."""
        try:
            with undisturbed():
                seed_everything(0)
                return run()
        except FrameworkError:
            raise
        except Exception as error:
            raise NotStackable(describe(error)) from error

    def together(self, stack: Stack, rows: Rows) -> None:
        """Run all trials as one. Raises NotStackable where that cannot be, or is not what each gives alone."""
        loss, found = self._all(stack, rows, training=True)
        if loss.shape != (len(rows),):
            raise NotStackable(
                f"the task's loss has shape {tuple(loss.shape[1:])}, not that of a number"
            )
        missed = next((name for name, gradients in found.items() if gradients is None), None)
        if missed is not None:
            raise NotStackable(f"the loss does not reach {missed}, which alone would get no update")
        loss, found = self._all(stack, rows, training=False)
        for row, expected in self.alone.items():
            largest = max(size(each) for each in (expected.loss, *expected.gradients.values()))
            pairs = {
                f"the gradient of {name}": (found[name], expected.gradients[name]) for name in found
            }
            for what, (all_of_them, one) in ({"the loss": (loss, expected.loss)} | pairs).items():
                mine = None if all_of_them is None else all_of_them[row]
                if differ(mine, one, largest, self.how.dtype or loss.dtype):
                    raise NotStackable(f"{what} is not what it is alone")

    def _all(
        self, stack: Stack, rows: Rows, training: bool
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the losses of all trials, and the gradients of each parameter in all of them."""
        kept = [
            (tensor, tensor.clone())
            for tensor in (rows.weights, *rows.fixed.values(), *rows.buffers.values())
        ]
        try:
            return self._aside(partial(self._pass, stack, rows, training))
        finally:
            for tensor, before in kept:
                tensor.copy_(before)

    def _pass(
        self, stack: Stack, rows: Rows, training: bool
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        loss = stack(rows, self.batch, self.shared, training).loss
        what = stack.changed()
        if what is not None:
            raise NotStackable(
                f"a pass changes {what}, which each trial would have to keep for itself"
            )
        found = torch.autograd.grad(loss.sum(), list(rows.leaves.values()), allow_unused=True)
        return loss.detach(), dict(zip(rows.leaves, found, strict=True))


def size(tensor: Tensor | None) -> float:
    """Return the largest finite number of a tensor."""
    return (
        float(tensor.abs().nan_to_num(posinf=0.0).max())
        if tensor is not None and tensor.numel()
        else 0.0
    )


def differ(
    found: Tensor | None, expected: Tensor | None, largest: float, computed_in: torch.dtype
) -> bool:
    """Whether two tensors differ by more than rounding can do, next to the largest of all gradients too."""
    if found is None or expected is None:
        return size(found) != size(expected)
    close = CLOSE.get(computed_in)
    atol = 0.1 * largest if close is None else close * max(size(expected), 1e-4 * largest)
    return not torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True)
