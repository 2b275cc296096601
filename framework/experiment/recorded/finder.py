"""Check the steps of a repeated run, and find where one of them is not finite.

When the loss or a gradient of a step is not finite, its forward and backward pass runs once more,
and the output of each layer is checked.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.callback import Callback
from framework.contracts.context import Context
from framework.contracts.task import Step, Task
from framework.data.batch_slice import BatchSlice
from framework.runtime import seeds
from framework.runtime.batch import Batch, count_rows, map_tensors, tensors_of


@dataclass
class Call:
    """A forward pass of a step: what it was called with, and the state before it."""

    run: Callable[[Any, Batch], Step]
    model: Any
    batch: Batch
    random: dict[str, Any]
    buffers: dict[str, Tensor]
    phase: str | None = None


@dataclass
class Finding:
    """Where a step is not finite; names are those of modules and parameters of the model.

    Attributes:
        step: its number, from 1.
        loss: of the step.
        samples: the indices of those of the step, in the training split; None if not known.
        inputs: the samples whose inputs or targets are not finite; if `samples` is None, their rows
            in the batches of the step, from 0.
        weights: the parameters and buffers that are not finite before the step.
        layer: the first module whose output is not finite, with finite inputs if possible.
        layer_type: its class.
        layer_inputs_finite: whether all its inputs are finite.
        layer_values: the number of its outputs that are not finite, and of all outputs.
        layer_samples: the samples for which its output is not finite, in the same way; None if
            its output has no row for each of them.
        gradient_layer: the module at whose output the gradient is not finite first.
        operation: what autograd reports of the backward pass.
        parameter: the first parameter, in the order of the model, whose gradient is not finite.
        parameters: the number of parameters with such a gradient, and of all with a gradient.
    """

    step: int
    loss: float
    samples: list[int] | None = None
    inputs: list[int] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    layer: str | None = None
    layer_type: str = ""
    layer_inputs_finite: bool = True
    layer_values: tuple[int, int] = (0, 0)
    layer_samples: list[int] | None = None
    gradient_layer: str | None = None
    operation: str = ""
    parameter: str | None = None
    parameters: tuple[int, int] = (0, 0)


class Found(Exception):  # not an error: it ends the repetition
    """The step is found."""


class Finder(Callback):
    """Checks the loss and the gradients of some steps before the update, and examines the first
    step of which one is not finite.

    Args:
        first: the first step that is checked, from 1.
        last: the last one.
        batch_size: of the loader.
        shards: of the trainer.
    """

    changes_training = False

    def __init__(self, first: int, last: int, batch_size: int, shards: int | None):
        self.first = first
        self.last = last
        self.batch_size = batch_size
        self.shards = shards
        self.calls: list[Call] = []
        self.finding: Finding | None = None
        self.call: Call | None = None  # that is not finite
        self.model: nn.Module | None = None
        self.is_checking = False

    @contextmanager
    def recording(self, task: Task) -> Iterator[None]:
        """Record the calls of a task in the checked steps."""
        step = task.step
        phase = task.phase

        def recorded_step(model: Any, batch: Batch) -> Step:
            self._record(step, model, batch, None)
            return step(model, batch)

        def recorded_phase(name: str, model: Any, batch: Batch) -> Step:
            self._record(partial(phase, name), model, batch, name)
            return phase(name, model, batch)

        replaced: Any = task
        replaced.step = recorded_step
        replaced.phase = recorded_phase
        try:
            yield
        finally:
            del replaced.step
            del replaced.phase

    def _record(
        self, run: Callable[[Any, Batch], Step], model: Any, batch: Batch, phase: str | None
    ) -> None:
        if not self.is_checking or self.model is None:
            return
        self.calls.append(
            Call(
                run=run,
                model=model,
                batch=map_tensors(Tensor.clone, batch),
                random=seeds.capture(),
                buffers={name: each.clone() for name, each in self.model.named_buffers()},
                phase=phase,
            )
        )

    def on_step_start(self, trainer: Context) -> None:
        self.model = trainer.model
        self.is_checking = trainer.state.step + 1 >= self.first
        self.calls = []

    def on_gradients(self, trainer: Context) -> None:
        if not self.is_checking:
            return
        gradients = gradients_of(trainer.model)
        checked = [trainer.loss]
        if trainer.precision.scaler is None:  # a scaler checks the gradients itself
            checked += gradients.values()
        if all(map(is_finite, checked)):
            self.calls = []  # of this phase of the step
            return
        self.is_checking = False
        finding = Finding(trainer.state.step + 1, float(trainer.loss))
        samples = trainer.sample_indices()
        finding.samples = samples
        if samples is not None and self.shards is not None:
            samples = in_order_of_shards(samples, self.batch_size, self.shards)
        bad = [name for name, gradient in gradients.items() if not is_finite(gradient)]
        finding.parameter = bad[0] if bad else None
        finding.parameters = (len(bad), len(gradients))
        self.finding = finding
        self.call = examine(trainer, self.calls, samples, finding)
        raise Found

    def on_step_end(self, trainer: Context) -> None:
        if trainer.state.step >= self.last:
            trainer.stop("replay", "the last step is repeated")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model by the names of its parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return bool(tensor.isfinite().all())


def in_order_of_shards(samples: Sequence[int], batch_size: int, shards: int) -> list[int]:
    """Return the samples of some batches in the order in which a step with shards reads them.

    A shard consists of a part of each batch of the step.
    """
    indices = torch.tensor(samples)
    slices = [BatchSlice(number, number + 1, shards) for number in range(shards)]
    return torch.cat([each.of_batches(indices, batch_size) for each in slices]).tolist()


def examine(
    trainer: Context, calls: Sequence[Call], samples: Sequence[int] | None, finding: Finding
) -> Call | None:
    """Run forward and backward of a step once more, and note where they are not finite.

    Args:
        trainer: of the step.
        calls: the forward passes of the step, or of its phase.
        samples: those of the step in the order of the calls; None if they are not known.
        finding: receives the result.

    Returns:
        The first forward pass that is not finite, or whose gradients are not; None without one.
    """
    if calls:
        repeat_state(trainer.model, calls[0])
    tensors = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    finding.weights = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    rows = sum(count_rows(call.batch) for call in calls)
    offset = 0
    if samples is None or len(samples) != rows:
        finding.samples = None
        samples = range(rows)
    for call in calls:
        size = count_rows(call.batch)
        own_samples = samples[offset : offset + size]
        offset += size
        finding.inputs += [own_samples[row] for row in rows_not_finite(call.batch)]
        repeat_state(trainer.model, call)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        with ExitStack() as hooks:
            watch = Watch(trainer.model, hooks)
            with trainer.precision.autocast():
                result = call.run(call.model, call.batch)
            watch.fill(finding, own_samples)
            loss_is_finite = is_finite(result.loss.detach())
            finding.operation = backward(result.loss)
            finding.gradient_layer = watch.gradient_layer
        gradients_are_finite = all(map(is_finite, gradients_of(trainer.model).values()))
        if finding.layer is not None or not loss_is_finite or not gradients_are_finite:
            return call
        if finding.operation:
            return call
    return None


def repeat_state(model: nn.Module, call: Call) -> None:
    """Restore the random numbers and buffers before a forward pass."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in call.buffers.items():
            buffers[name].copy_(value)
    seeds.restore(call.random)


def backward(loss: Tensor) -> str:
    """Run the backward pass, and return what autograd reports if it makes a NaN; else ""."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
            loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


class Watch:
    """Hooks on all modules that note the first output, and the first gradient of an output, that
    is not finite.
    """

    def __init__(self, model: nn.Module, hooks: ExitStack):
        self.layer: tuple[str, nn.Module, bool, Tensor] | None = None
        self.gradient_layer: str | None = None
        for name, module in model.named_modules():
            hook = partial(self._after, name or "model")
            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

    def _after(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any
    ) -> None:
        for tensor in floats_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._at_gradient, name))
            if self.layer is None and not is_finite(tensor.detach()):
                finite = all(is_finite(each.detach()) for each in floats_in((args, kwargs)))
                self.layer = (name, module, finite, tensor.detach())

    def _at_gradient(self, name: str, gradient: Tensor) -> None:
        if self.gradient_layer is None and not is_finite(gradient):
            self.gradient_layer = name

    def fill(self, finding: Finding, samples: Sequence[int]) -> None:
        """Write the first layer that is not finite into the finding."""
        if self.layer is None:
            return
        finding.layer, module, finding.layer_inputs_finite, output = self.layer
        finding.layer_type = type(module).__name__
        wrong = ~output.isfinite()
        finding.layer_values = (int(wrong.sum()), output.numel())
        if output.ndim > 0 and len(output) == len(samples):
            rows = wrong.reshape(len(samples), -1).any(1).nonzero().flatten().tolist()
            finding.layer_samples = [samples[row] for row in rows]


def floats_in(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested tuples, lists, mappings and dataclasses."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def rows_not_finite(batch: Batch) -> list[int]:
    """Return the rows of a batch with values that are not finite."""
    rows: set[int] = set()
    for tensor in floats_in(batch):
        if tensor.ndim:
            wrong = ~tensor.isfinite().reshape(len(tensor), -1)
            rows.update(wrong.any(1).nonzero().flatten().tolist())
    return sorted(rows)
