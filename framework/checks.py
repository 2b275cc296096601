"""What a Trainer is given by hand: what cannot be is told before the first step, and by its name."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .callback import Callback
from .errors import SettingError, did_you_mean, short
from .metric import Metric
from .scheduler import observes
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
    check_metrics(metrics)
    if not isinstance(optimizer, Optimizer):
        raise SettingError(f"optimizer: {wrong(optimizer, 'optimizers', ', model.parameters()')}")
    if schedule is not None and not isinstance(schedule, Callable):  # type: ignore[arg-type]
        advice = "one of torch's changes the optimizer by itself" if isinstance(schedule, LRScheduler) else ""
        made = "a function from the step to a factor of the learning rate, lambda step: 0.99**step say"
        raise SettingError(f"schedule: should be {made}, not {short(schedule)}; {advice}".rstrip("; "))
    check_values(model)
    check_parameters(model, task, optimizer)


def check_values(model: nn.Module) -> None:
    """Raise SettingError for a tensor of the model that has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SettingError(f"model: {name} is on the device meta and has no values")


def check_parameters(model: nn.Module, task: Any, optimizer: Optimizer) -> None:
    """Raise SettingError when the optimizer holds other parameters instead of the model's.

    It may hold only some of the model's parameters, and parameters of the task or its loss.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = {parameter: name for name, parameter in model.named_parameters()}
    if not held & own.keys():
        raise SettingError("optimizer: it holds no parameter of this model, so that nothing would be trained")
    foreign = held - own.keys() - parameters_of(task)
    if not foreign:
        return
    said = f"optimizer: {len(foreign)} of its {len(held)} parameters do not belong to the model"
    trained = {parameter: name for parameter, name in own.items() if parameter.requires_grad}
    missing = [name for parameter, name in trained.items() if parameter not in held]
    if missing:
        raise SettingError(
            f"{said}, and {len(missing)} of the model's {len(own)} are not in the optimizer "
            f"(such as {missing[0]}): build the optimizer after the last change of the model; "
            "a loss with parameters must be a module that holds them"
        )
    warnings.warn(f"{said}: checkpoints do not contain them", stacklevel=5)


def parameters_of(task: Any) -> set[nn.Parameter]:
    """Return the parameters of a task or a loss, and of the modules among its attributes."""
    found: set[nn.Parameter] = set()
    for part in (task, *vars(task).values()) if hasattr(task, "__dict__") else ():
        if isinstance(part, nn.Module):
            found.update(part.parameters())
        elif isinstance(part, nn.Parameter):
            found.add(part)
    return found


def check_schedule(schedule: Any, validates: bool) -> None:
    """Raise SettingError for a schedule that reacts to validations where there are none."""
    if observes(schedule) and not validates:
        name = type(schedule).__name__
        raise SettingError(
            f"scheduler: {name} reacts to validation, but there is no validation split "
            "(`fit(val=...)`, data.val_fraction): the learning rate would never change"
        )


def check_phases(task: Task, compile: str, cuda_graph: str) -> None:
    """Raise SettingError for settings that make one call of a step, when the task updates in phases."""
    for said, chosen in (("compile=step", compile == "step"), ("cuda_graph=on", cuda_graph == "on")):
        if chosen and task.phases:
            raise SettingError(f"{said}: {type(task).__name__} updates in phases")


def check_task(task: Any) -> None:
    """Raise SettingError for what is neither a task nor a loss."""
    if not isinstance(task, Task) and not callable(task):
        raise SettingError(f"task: {wrong(task, 'tasks')}")


def wrong(thing: Any, registry: str, more: str = "") -> str:
    """Say that it is not such a part, and how one is made by its name."""
    example = f"{thing!r}{more}" if isinstance(thing, str) else f'"..."{more}'
    return f"{short(thing)} is none; by name one is made with fw.{registry}.build({example})"
