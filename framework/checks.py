"""What a Trainer is given by hand: what cannot be is told before the first step, and by its name."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .callback import Callback
from .data import Batch
from .errors import DataError, SettingError, did_you_mean, short
from .loss import modules_in
from .memory import MicroBatches, is_full
from .metric import Metric
from .task import Task


def check_callbacks(callbacks: Sequence[Any]) -> list[Callback]:
    """Return them. Raises SettingError for what is no callback, and for a method with the name of no event."""
    known = [name for name in dir(Callback) if name.startswith("on_")]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise SettingError(f"callbacks: {wrong(callback, 'callbacks')}")
        for name in dir(type(callback)):
            if name.startswith("on_") and name not in known:
                said = f"{type(callback).__name__}.{name} would never be called: no event has that name"
                raise SettingError(f"{said}; {did_you_mean(name, known)}")
    return list(callbacks)


def check_metrics(metrics: Sequence[Any]) -> None:
    """Raise SettingError for what is no metric, and for two that would be logged by one name."""
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise SettingError(f"metrics: {wrong(metric, 'metrics')}")
        if not metric.name:
            raise SettingError(f"metrics: {type(metric).__name__} has no `name` to be logged by")
    names = [metric.name for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(f"metrics: two are logged by the name {twice!r}: give one of them another `name`")


def check_fit(model: nn.Module, task: Any, optimizer: Any, schedule: Any, metrics: Sequence[Any]) -> None:
    """Raise SettingError for what `fit` cannot train with."""
    check_task(task)
    check_loss_parameters(task, model)
    check_metrics(metrics)
    if not isinstance(optimizer, Optimizer):
        raise SettingError(f"optimizer: {wrong(optimizer, 'optimizers', ', model.parameters()')}")
    if schedule is not None and not isinstance(schedule, Callable):  # type: ignore[arg-type]
        advice = "one of torch's changes the optimizer by itself" if isinstance(schedule, LRScheduler) else ""
        made = "a function from the step to a factor of the learning rate, lambda step: 0.99**step say"
        raise SettingError(f"schedule: should be {made}, not {short(schedule)}; {advice}".rstrip("; "))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise SettingError("optimizer: it holds no parameter of this model, so that nothing would be trained")


def check_phases(task: Task, compile: str, cuda_graph: str) -> None:
    """Raise SettingError for settings that make one call of a step, when the task updates in phases."""
    for said, chosen in (("compile=step", compile == "step"), ("cuda_graph=on", cuda_graph == "on")):
        if chosen and task.phases:
            raise SettingError(f"{said}: {type(task).__name__} updates in phases")


def check_micro_batches(task: Task, micro_batches: MicroBatches) -> None:
    """Raise SettingError for micro-batches of a task whose batches cannot be split."""
    splits = micro_batches.auto or micro_batches.size is not None
    if splits and not task.splits_batches:
        name = type(task).__name__
        raise SettingError(f"micro_batch: expected null, as {name} compares the samples of a batch")


def check_task(task: Any) -> None:
    """Raise SettingError for what is neither a task nor a loss."""
    if not isinstance(task, Task) and not callable(task):
        raise SettingError(f"task: {wrong(task, 'tasks')}")


def check_loss_parameters(task: Any, model: nn.Module) -> None:
    """Raise SettingError for a loss with parameters of its own that require gradients.

    Only parameters of the model are trained and saved.
    """
    loss = task.criterion if isinstance(task, Task) else task
    if loss is None:
        return
    own = set(model.parameters())
    for module in modules_in(loss):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in own:
                raise SettingError(lost_parameter(f"the loss {type(module).__name__}", f"`{name}`"))


def check_parameters_reached(loss: Tensor, model: nn.Module) -> None:
    """Raise SettingError where the gradients of a loss reach a parameter that is not the model's.

    Nothing is said of a loss without a graph, as of a compiled step.
    """
    own = set(model.parameters())
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf not in own:
            found = f"a parameter of shape {tuple(leaf.shape)}"
            raise SettingError(lost_parameter("the task or its loss", found))
        for before, _ in getattr(node, "next_functions", ()):
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


def lost_parameter(owner: str, parameter: str) -> str:
    return (
        f"task: {owner} has {parameter} to train, but only parameters of the model are trained and "
        "saved: make it part of the model, or freeze it with requires_grad_(False)"
    )


def check_input_dtype(error: Exception, model: nn.Module, batch: Batch) -> None:
    """Raise DataError when an error of a step goes with inputs of another type than the model's."""
    inputs = batch[0]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if is_full(error) or weight is None or inputs.dtype == weight.dtype:
        return
    embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    if embeds and not inputs.is_floating_point():
        return
    words = (str(error).strip() or "it failed").splitlines()[0]
    raise DataError(
        f"the inputs are {inputs.dtype}, but the model's parameters {weight.dtype}: convert the inputs "
        f"with .to({weight.dtype}), or the model. torch says: {words}"
    ) from error


def wrong(thing: Any, registry: str, more: str = "") -> str:
    """Say that it is not such a part, and how one is made by its name."""
    example = f"{thing!r}{more}" if isinstance(thing, str) else f'"..."{more}'
    return f"{short(thing)} is none; by name one is made with fw.{registry}.build({example})"
