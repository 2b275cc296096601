"""What a Trainer is given by hand: what cannot be is told before the first step, and by its name."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from framework.contracts.callback import Callback, SavingCallback
from framework.contracts.logger import Logger
from framework.contracts.loss import check_scalar
from framework.contracts.loss_properties import loss_modules, loss_name
from framework.contracts.metric import Metric
from framework.contracts.schedule import observes
from framework.contracts.state import Cadence
from framework.contracts.task import LossTask, Step, Task
from framework.data.dataset import Batch, Data, ForeignLoader, Loader
from framework.data.workers import as_batch
from framework.errors import DataError, FrameworkError, SettingError, did_you_mean, short
from framework.errors.paths import expanded
from framework.errors.torch_errors import is_batch_norm
from framework.errors.user_code import describe, text_of, user_place
from framework.registry.registry import Registry
from framework.runtime.device import Precision, find_device
from framework.runtime.memory import MicroBatches, is_full
from framework.runtime.torch_internals.norms import has_statistics


def settings_refused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return why a Trainer refuses some of its settings, by name. They have the right types.

    `Trainer` raises the first; an experiment is told all of them before any data is read.
    """
    refused: dict[str, str] = {}
    try:
        device = find_device(settings["device"])
    except SettingError as error:
        refused["device"] = str(error)
    else:
        replays = settings["cuda_graph"] == "on"
        if replays and (device.type != "cuda" or settings["compile"] == "step"):
            refused["cuda_graph"] = (
                f"cuda_graph=on needs a CUDA device, not {device}, and no compile=step"
            )
    for name in ("validate_every", "log_every"):
        try:
            Cadence(settings[name], name)
        except SettingError as error:
            refused[name] = str(error)
    return refused


def as_list(name: str, given: Any, registry: str) -> list[Any]:
    """Return the items of a list of parts. Raises SettingError for a single one, a text or None."""
    if isinstance(given, Iterable) and not isinstance(given, str):
        return list(given)
    if isinstance(given, str):
        raise SettingError(f"{name}: expected a list, got a text; {wrong(given, registry)}")
    got = "None" if given is None else f"a single {type(given).__name__}"
    raise SettingError(f"{name}: expected a list, got {got}; write {name}=[...]")


def check_callbacks(given: Any) -> list[Callback]:
    """Return them. Raises SettingError for what is no callback, and for methods that would never be called."""
    callbacks = as_list("callbacks", given, "callbacks")
    known = [name for name in dir(Callback) if name.startswith("on_")]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise SettingError(f"callbacks: {wrong(callback, 'callbacks')}")
        if hasattr(callback, "finish_saving") and not isinstance(callback, SavingCallback):
            name = type(callback).__name__
            raise SettingError(
                f"{name}.finish_saving would never be called: derive {name} from SavingCallback"
            )
        for name in dir(type(callback)):
            if name.startswith("on_") and name not in known:
                said = f"{type(callback).__name__}.{name} would never be called: no event has that name"
                raise SettingError(f"{said}; {did_you_mean(name, known)}")
    return callbacks


def check_loggers(given: Any) -> list[Logger]:
    """Return them. Raises SettingError for what has not the methods of a logger that each run calls."""
    loggers = as_list("loggers", given, "loggers")
    for logger in loggers:
        able = all(callable(getattr(logger, name, None)) for name in ("open", "scalars", "close"))
        if isinstance(logger, type) or not able:
            raise SettingError(f"loggers: {wrong(logger, 'loggers')}")
    return loggers


def check_folder(folder: Any) -> Path | None:
    """Return the folder of a run as a path. Raises SettingError for what is no path, or a file."""
    if folder is None:
        return None
    if not isinstance(folder, str | os.PathLike):
        raise SettingError(f"folder: expected a path, got {short(folder)}")
    path = expanded(os.fspath(folder))
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    if file is not None:
        raise SettingError(f"folder={path}: expected a folder, but {file} is a file")
    return path


def check_metrics(given: Any) -> list[Metric]:
    """Return them. Raises SettingError for what is no metric, and for two of one name."""
    metrics = as_list("metrics", given, "metrics")
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise SettingError(f"metrics: {wrong(metric, 'metrics')}")
        if not metric.name:
            raise SettingError(f"metrics: {type(metric).__name__} has no `name` to be logged by")
    names = [metric.name for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(
            f"metrics: two are logged by the name {twice!r}: give one of them another `name`"
        )
    return metrics


def check_source(name: str, source: Any, needs_targets: bool) -> None:
    """Raise SettingError, or DataError, for data that holds no batches.

    Args:
        name: of the argument, such as data or val.
        source: what was given.
        needs_targets: whether a batch must be a pair (inputs, targets), as for a plain loss.
    """
    ours = isinstance(source, Data | Loader | ForeignLoader)
    readable = ours or hasattr(source, "__iter__") or hasattr(source, "__getitem__")
    if isinstance(source, str | bytes | type) or not readable:
        expected = "expected a split, a Data or an iterable of batches"
        raise SettingError(f"{name}: {expected}, got {short(source)}")
    if isinstance(source, list | tuple) and source:
        as_batch(source[0])
    if isinstance(source, Mapping) and len(source) and 0 not in source:
        keys = ", ".join(map(str, source))
        raise SettingError(f"{name}: expected a split, got a {type(source).__name__} of {keys}")
    pair = isinstance(source, tuple) and all(isinstance(each, Tensor) for each in source)
    if needs_targets and (pair or hasattr(source, "__array__")):
        expected = "expected batches of (inputs, targets)"
        advice = "framework.TensorSplit(inputs, targets) makes a split"
        raise SettingError(f"{name}: {expected}, got a {type(source).__name__}; {advice}")


def check_resume(resume: Any) -> None:
    """Raise SettingError for what is no state of a trainer."""
    if resume is not None and not isinstance(resume, Mapping):
        expected = "expected what `Trainer.state_dict()` returned"
        raise SettingError(f"resume: {expected}, got {short(resume)}")


def check_batch_size(batch_size: Any) -> None:
    """Raise SettingError for what is no number of samples."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise SettingError(f"batch_size={batch_size!r}: expected an int from 1 on")


def check_fit(model: Any, task: Any, optimizer: Any, schedule: Any) -> None:
    """Raise SettingError for what `fit` cannot train with."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: {wrong(model, 'models', ', in_shape, out_shape')}")
    check_task(task)
    check_loss_parameters(task, model)
    if not isinstance(optimizer, Optimizer):
        raise SettingError(f"optimizer: {wrong(optimizer, 'optimizers', ', model.parameters()')}")
    check_step_alone(optimizer)
    if isinstance(schedule, type):
        raise SettingError(f"schedule: {wrong(schedule, 'schedulers', ', total_steps')}")
    if schedule is not None and not isinstance(schedule, Callable):  # type: ignore[arg-type]
        advice = (
            "one of torch's changes the optimizer by itself"
            if isinstance(schedule, LRScheduler)
            else ""
        )
        made = (
            "a function from the step to a factor of the learning rate, lambda step: 0.99**step say"
        )
        raise SettingError(
            f"schedule: should be {made}, not {short(schedule)}; {advice}".rstrip("; ")
        )
    check_values(model)
    check_parameters(model, optimizer)
    if schedule is not None:
        check_has_rate(optimizer)


def check_values(model: nn.Module) -> None:
    """Raise SettingError for a tensor of the model that has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SettingError(f"model: {name} is on the device meta and has no values")


def check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError when the optimizer holds parameters that are not the model's.

    It may hold only some of the model's parameters.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = {parameter: name for name, parameter in model.named_parameters()}
    if not held & own.keys():
        raise SettingError(
            "optimizer: it holds no parameter of this model, so that nothing would be trained"
        )
    foreign = held - own.keys()
    if not foreign:
        return
    said = f"optimizer: {len(foreign)} of its {len(held)} parameters do not belong to the model"
    trained = {parameter: name for parameter, name in own.items() if parameter.requires_grad}
    missing = [name for parameter, name in trained.items() if parameter not in held]
    if missing:
        raise SettingError(
            f"{said}, and {len(missing)} of the model's {len(own)} are not in the optimizer "
            f"(such as {missing[0]}): build the optimizer after the last change of the model"
        )
    warnings.warn(f"{said}: checkpoints do not contain them", stacklevel=5)


def check_schedule(schedule: Any, validates: bool) -> None:
    """Raise SettingError for a schedule that reacts to validations where there are none."""
    if observes(schedule) and not validates:
        name = type(schedule).__name__
        raise SettingError(
            f"scheduler: {name} reacts to validation, but there is no validation split "
            "(`fit(val=...)`, data.val_fraction): the learning rate would never change"
        )


def check_step_alone(optimizer: Optimizer) -> None:
    """Raise SettingError for an optimizer whose `step` must be given a closure, as LBFGS's."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        name = type(optimizer).__name__
        said = "its step() needs a closure that computes the loss again"
        advice = "the trainer computes it once a step: choose another optimizer"
        raise SettingError(f"optimizer={name}: {said}; {advice}")


def check_has_rate(optimizer: Optimizer) -> None:
    """Raise SettingError for an optimizer without a learning rate that a schedule could change."""
    if not all("lr" in group for group in optimizer.param_groups):
        name = type(optimizer).__name__
        said = f"{name} has no learning rate ('lr') in its groups"
        raise SettingError(f"schedule: {said}; leave it out (scheduler=null)")


def check_initialized(model: nn.Module, reader: str) -> None:
    """Raise SettingError when a parameter of a lazy module has no values yet.

    Args:
        model: that is about to be trained.
        reader: what needs the values, such as "ema".
    """
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        said = f"the parameter {lazy} is uninitialized (a lazy module)"
        raise SettingError(f"{reader}: {said}: call the model on a batch of inputs before `fit`")


def check_gradients(parameters: Sequence[Tensor]) -> None:
    """Warn when the first step gave no parameter a gradient.

    That is no error: a hook may have used and deleted the gradients, and the optimizer may hold a
    part of the model that this batch does not use.
    """
    if parameters and all(parameter.grad is None for parameter in parameters):
        warnings.warn(
            "task: in the first step the loss depends on no parameter of the optimizer: is anything trained?",
            stacklevel=2,
        )


def check_made(task: Task, made: Any, parameters: Sequence[Tensor] = ()) -> None:
    """Raise SettingError when what a task made of a batch cannot be trained with or measured.

    Args:
        task: the task.
        made: what its `step` returned.
        parameters: those to be trained; empty where nothing is.
    """
    if not isinstance(made, Step):
        expected = "expected a framework.Step(loss, outputs, targets)"
        got = "None" if made is None else type(made).__name__
        raise SettingError(f"{type(task).__name__}.step: {expected}, got {got}")
    loss = made.loss
    check_scalar(loss_of_task(task), loss)
    if not parameters or loss.requires_grad:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        said = "every parameter of the optimizer is frozen (requires_grad=False)"
        raise SettingError(f"model: {said}, so that nothing would be trained")
    causes = "detach(), item(), argmax or no_grad() on the way from the model to the loss"
    said = f"it does not depend on the parameters ({causes}?)"
    raise SettingError(f"{loss_of_task(task)} has no gradient: {said}")


def loss_of_task(task: Task) -> str:
    """Return what to call the loss of a task in a message."""
    loss = task.loss if isinstance(task, LossTask) else task.criterion
    if loss is None:
        return f"the loss of {type(task).__name__}"
    return f"the loss {loss_name(loss)}"


class SingleSample(NamedTuple):
    """Why a training batch, or a part of one, is one sample: a setting, its value, which batch."""

    setting: str
    value: int
    which: str = ""

    def __str__(self) -> str:
        return f"{self.setting}={self.value} makes a batch of one sample{self.which}"


def single_sample(batches: Any, micro_batch: int | None) -> SingleSample | None:
    """Return why a training batch, or a part of one, will be one sample; None if that is not known.

    Args:
        batches: the reader of the training data.
        micro_batch: samples that go through the model at once, None for whole batches.
    """
    rows, size, drop_last = batch_sizes(batches)
    if size is None:
        return None
    last = rows % size if rows is not None and not drop_last else 0
    if micro_batch is not None:
        rests = [samples % micro_batch for samples in (size, last) if samples]
        if micro_batch == 1 or 1 in rests:
            return SingleSample("micro_batch", micro_batch)
    if size == 1:
        return SingleSample("batch_size", size)
    if last == 1:
        which = f" (the last of {rows:,}; drop_last=true leaves it out)"
        return SingleSample("batch_size", size, which)
    return None


def batch_sizes(batches: Any) -> tuple[int | None, int | None, bool]:
    """Return the samples of an epoch and of a batch, and whether a smaller last one is left out."""
    if isinstance(batches, Loader):
        rows = len(batches.split)
        most = rows if batches.limit is None else batches.limit * batches.batch_size
        return min(rows, most), batches.batch_size, batches.drop_last
    loader = batches.batches
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None, None, False
    try:
        return len(loader.sampler), loader.batch_size, loader.drop_last  # type: ignore[arg-type]
    except TypeError:
        return None, loader.batch_size, loader.drop_last


def check_single_sample(
    model: nn.Module,
    task: Task,
    batch: Batch,
    precision: Precision,
    why: SingleSample,
) -> None:
    """Raise DataError when a batch norm of the model cannot train on a batch of one sample to come.

    Args:
        model: in the middle of its training; nothing remembers that it was run.
        task: the task.
        batch: a batch on the model's device, of which the first sample is taken.
        precision: of the training.
        why: what makes a batch of one sample.
    """
    normalised = any(map(has_statistics, model.modules()))
    if not normalised or task.phases or not all(isinstance(part, Tensor) for part in batch):
        return
    from .layer_table import (
        model_undisturbed,
    )  # not at the top: it imports torch's counter of FLOPs

    try:
        with model_undisturbed(model, train=None), torch.no_grad(), precision.autocast():
            task.step(model, tuple(part[:1] for part in batch))
    except Exception as error:  # any other error is of that batch alone, or of this try
        if is_batch_norm(error):
            raise DataError(f"{why}: {text_of(error)}. A batch norm needs two") from error


def count_of(task: Task, batch: Batch) -> int | Tensor:
    """Return over how many items the task averages the loss. Raises SettingError for no number."""
    count = task.count(batch)
    if isinstance(count, int | Tensor):
        return count
    if isinstance(count, Integral):
        return int(count)
    if isinstance(count, Real):  # a share of a sample, where inputs differ in size
        device = batch[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(float(count), dtype=dtype, device=device)
    expected = "expected an int or a tensor with one number"
    raise SettingError(f"{type(task).__name__}.count: {expected}, got {short(count)}")


def first_update_error(optimizer: Optimizer, error: Exception) -> SettingError | None:
    """Return what an optimizer lacks whose first `step()` failed; None for an error of user code.

    The trainer calls `step()` after one backward pass. An optimizer that needs more than that (a
    closure, gradients of gradients, another layout) says so only then, in words of its own.
    """
    if isinstance(error, FrameworkError) or is_full(error):
        return None
    words = ("closure", "create_graph", "grad_fn", "does not require grad")
    said = text_of(error).lower()
    needs_more = any(word in said for word in words)
    if not needs_more and user_place(error) is not None:
        return None
    told = f"optimizer={type(optimizer).__name__}: its first step fails: {describe(error)}"
    if needs_more:
        told += "; the trainer calls step() after one backward pass, "
        told += "without a closure and without create_graph=True"
    return SettingError(told)


def check_phases(task: Task, compile: str, cuda_graph: str) -> None:
    """Raise SettingError for settings that make one call of a step, when the task updates in phases."""
    for said, chosen in (
        ("compile=step", compile == "step"),
        ("cuda_graph=on", cuda_graph == "on"),
    ):
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
    if isinstance(task, type) or not (isinstance(task, Task) or callable(task)):
        raise SettingError(f"task: {wrong(task, 'tasks')}")


def check_loss_parameters(task: Any, model: nn.Module) -> None:
    """Raise SettingError for a loss with parameters of its own that require gradients.

    Only parameters of the model are trained and saved.
    """
    loss = task.criterion if isinstance(task, Task) else task
    if loss is None:
        return
    own = set(model.parameters())
    for module in loss_modules(loss):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in own:
                raise SettingError(lost_parameter(f"the loss {type(module).__name__}", f"`{name}`"))


def check_parameters_reached(task: Task, loss: Tensor, model: nn.Module) -> None:
    """Check the parameters that the gradients of a loss reach and that are not the model's.

    One of the task, or of a function that is the loss, is an error. Any other one gives a warning: it
    may be one of a teacher that is called without `no_grad`, or that the task trains by itself. Nothing
    is said of a loss without a graph, as of a compiled step.

    Raises SettingError for a parameter of the task or of its loss.
    """
    own = set(model.parameters())
    held = parameters_held(task)
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf not in own:
            said = lost_parameter(
                "the task or its loss", f"a parameter of shape {tuple(leaf.shape)}"
            )
            if leaf in held:
                raise SettingError(said)
            warnings.warn(said, stacklevel=2)
            return
        for before, _ in getattr(node, "next_functions", ()):
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)


def parameters_held(task: Task) -> set[nn.Parameter]:
    """Return the parameters that are attributes of a task, and all that a function as its loss refers to."""
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
    if isinstance(thing, type):
        return f"expected an instance, got the class {thing.__name__}; write {thing.__name__}(...)"
    example = f"{thing!r}{more}" if isinstance(thing, str) else f'"..."{more}'
    if registry == "tasks" and thing in Registry.every["loss"]:
        registry = "losses"
    return f"{short(thing)} is none; by name one is made with fw.{registry}.build({example})"
