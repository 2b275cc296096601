"""Checks of the first steps of a fit, and explanations of their errors."""

import inspect
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.loss import check_scalar
from framework.contracts.loss_properties import loss_name
from framework.contracts.task import LossTask, Step, Task
from framework.data.dataset import Batch
from framework.errors import DataError, FrameworkError, SettingError, short
from framework.errors.user_code import describe, text_of, user_place
from framework.runtime.batch import is_flat, tensors_of
from framework.runtime.dtensors import has_dtensors, is_dtensor
from framework.runtime.memory import is_full


def check_result(task: Task, result: Any, parameters: Sequence[Tensor] = ()) -> None:
    """Raise SettingError for a result of a task that cannot be trained with or measured.

    Args:
        task: for the message.
        result: the return value of its `step`.
        parameters: those that are trained; empty in an evaluation.
    """
    if not isinstance(result, Step):
        got = "None" if result is None else type(result).__name__
        raise SettingError(
            f"{type(task).__name__}.step: "
            f"expected a framework.Step(loss, outputs, targets), got {got}"
        )
    loss = result.loss
    check_scalar(loss_of_task(task), loss)
    if not parameters or loss.requires_grad:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        raise SettingError(
            "model: every parameter of the optimizer is frozen (requires_grad=False), "
            "so that nothing would be trained"
        )
    raise SettingError(
        f"{loss_of_task(task)} has no gradient: it does not depend on the parameters "
        "(detach(), item(), argmax or no_grad() between the model and the loss?)"
    )


def loss_of_task(task: Task) -> str:
    """Return the name of the loss of a task for a message."""
    loss = task.loss if isinstance(task, LossTask) else task.criterion
    if loss is None:
        return f"the loss of {type(task).__name__}"
    return f"the loss {loss_name(loss)}"


def count_of(task: Task, batch: Batch) -> int | Tensor:
    """Return the number of items that the mean loss of a task is over (see `Task.count`).

    Raises:
        SettingError: `count` does not return a number.
    """
    count = task.count(batch)
    if isinstance(count, int | Tensor):
        return count
    if isinstance(count, Integral):
        return int(count)
    if isinstance(count, Real):  # a fraction of a sample, for inputs of different size
        device = tensors_of(batch)[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(float(count), dtype=dtype, device=device)
    raise SettingError(
        f"{type(task).__name__}.count: expected an int or a tensor with one number, "
        f"got {short(count)}"
    )


def check_gradients(parameters: Sequence[Tensor]) -> None:
    """Warn if no parameter has a gradient after the first step.

    It is not an error: a hook may have used and deleted the gradients, and the optimizer may hold a
    part of the model that this batch does not use.
    """
    if parameters and all(parameter.grad is None for parameter in parameters):
        warnings.warn(
            "task: in the first step the loss does not depend on any parameter of the optimizer; "
            "perhaps nothing is trained",
            stacklevel=2,
        )


def check_parameters_reached(task: Task, loss: Tensor, model: nn.Module) -> None:
    """Check the parameters that the loss depends on and that do not belong to the model.

    A parameter of the task, or of a function that is its loss, is an error. Another one gives a
    warning: it may belong to a teacher that is called without `no_grad`, or the task may train it
    itself. A loss without a graph, as of a compiled step, is not checked. With a sharded model only
    the error is found, since its forward pass uses other tensors than its parameters.

    Raises:
        SettingError: the loss depends on a parameter of the task or of its loss.
    """
    own = set(model.parameters())
    sharded = has_dtensors(model)
    of_task = parameters_of_task(task)
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf not in own:
            parameter = f"a parameter of shape {tuple(leaf.shape)}"
            message = parameter_not_trained("the task or its loss", parameter)
            if leaf in of_task:
                raise SettingError(message)
            if sharded:
                continue
            warnings.warn(message, stacklevel=2)
            return
        for previous, _ in getattr(node, "next_functions", ()):
            if previous is not None and previous not in seen:
                seen.add(previous)
                waiting.append(previous)


def parameters_of_task(task: Task) -> set[nn.Parameter]:
    """Return the parameters that are attributes of a task, and those that its loss refers to."""
    found = {value for value in vars(task).values() if isinstance(value, nn.Parameter)}
    loss = task.loss if isinstance(task, LossTask) else None
    if not inspect.isfunction(loss):
        return found
    captured = inspect.getclosurevars(loss)
    for value in (*captured.nonlocals.values(), *captured.globals.values()):
        if isinstance(value, nn.Module):
            found.update(value.parameters())
        elif isinstance(value, nn.Parameter):
            found.add(value)
    return found


def parameter_not_trained(owner: str, parameter: str) -> str:
    """Return the message that a parameter outside of the model would not be trained."""
    return (
        f"task: {owner} has {parameter} to train, but only parameters of the model are trained and "
        "saved: make it part of the model, or freeze it with requires_grad_(False)"
    )


def first_update_error(optimizer: Optimizer, error: Exception) -> SettingError | None:
    """Return an explanation of an error of the first `step()` of an optimizer.

    The trainer calls `step()` after one backward pass. An optimizer that needs more (a closure,
    gradients of gradients, another layout) fails only then.

    Returns:
        None for an error of user code.
    """
    if isinstance(error, FrameworkError) or is_full(error):
        return None
    hints = ("closure", "create_graph", "grad_fn", "does not require grad")
    text = text_of(error).lower()
    needs_more = any(hint in text for hint in hints)
    if not needs_more and user_place(error) is not None:
        return None
    problem = f"optimizer={type(optimizer).__name__}: its first step fails: {describe(error)}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(map(is_dtensor, parameters)):
        return SettingError(
            f"optimizer={type(optimizer).__name__} does not support sharded parameters: use "
            f"another one, or strategy=ddp. torch reports: {describe(error)}"
        )
    if not needs_more:
        return SettingError(problem)
    return SettingError(
        f"{problem}; the trainer calls step() after one backward pass, "
        "without a closure and without create_graph=True"
    )


def check_input_dtype(error: Exception, model: nn.Module, batch: Batch) -> None:
    """Raise DataError if inputs of another dtype than the model's explain an error of a step."""
    if not is_flat(batch):
        return  # the inputs of the model are not known here
    inputs = batch[0]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if is_full(error) or weight is None or inputs.dtype == weight.dtype:
        return
    embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    if embeds and not inputs.is_floating_point():
        return
    text = (str(error).strip() or "it failed").splitlines()[0]
    raise DataError(
        f"the inputs are {inputs.dtype}, but the model's parameters {weight.dtype}: convert the "
        f"inputs with .to({weight.dtype}), or the model. torch reports: {text}"
    ) from error
