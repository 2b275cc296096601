"""Checks of the arguments of a Trainer and of `fit`, before the first step.

The checks of the first steps themselves are in `step_checks.py`.
"""

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, DistributedSampler

from framework.contracts.callback import Callback, SavingCallback
from framework.contracts.logger import Logger
from framework.contracts.loss_properties import loss_modules
from framework.contracts.metric import Metric
from framework.contracts.schedule import observes
from framework.contracts.state import cadence_refused
from framework.contracts.strategy import Strategy
from framework.contracts.task import Task
from framework.data.accumulation import Batches
from framework.data.dataset import Data, ForeignLoader, Loader
from framework.data.workers import as_batch
from framework.errors import DataError, SettingError, did_you_mean, short
from framework.errors.paths import expanded
from framework.registry.registry import Registry
from framework.runtime.device import find_device
from framework.runtime.memory import MicroBatches
from framework.runtime.processes import launched

from .step_checks import parameter_not_trained

# the arguments of a Trainer


def settings_refused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the reasons why a Trainer refuses some of its settings, by name.

    `Trainer` raises the first one; an experiment reports all of them before it reads data. Both
    write the setting and its value before the reason.

    Args:
        settings: the settings of a Trainer, which have the right types.
    """
    refused: dict[str, str] = {}
    try:
        device = find_device(settings["device"])
    except SettingError as error:
        refused["device"] = str(error)
    else:
        replays = settings["cuda_graph"] == "on"
        if replays and (device.type != "cuda" or settings["compile"] in ("step", "auto")):
            refused["cuda_graph"] = (
                f"expected a CUDA device (got {device}), and compile=off or compile=model"
            )
    if settings["compile"] == "auto" and settings["deterministic"]:
        refused["compile"] = (
            "expected off, model or step with deterministic=true, as auto chooses by measured "
            "times, so that two runs may differ"
        )
    reason = shards_refused(settings)
    if reason is not None:
        refused["shards"] = reason
    for name in ("validate_every", "log_every"):
        reason = cadence_refused(settings[name])
        if reason is not None:
            refused[name] = reason
    return refused


def shards_refused(settings: Mapping[str, Any]) -> str | None:
    """Return the reason why a Trainer refuses `shards`, or settings together with it; or None."""
    shards = settings["shards"]
    if shards is None:
        return None
    if shards & (shards - 1):
        return "expected a power of two"
    devices = settings["devices"]
    if devices is not None and shards % devices:
        return f"expected a multiple of devices={devices}"
    if settings["compile"] != "off":
        return (
            "expected compile=off, as the result of compiled code depends on the shapes that a "
            "process has seen before"
        )
    if settings["cuda_graph"] != "off":
        return "expected cuda_graph=off, as its graphs have one batch each"
    if settings["micro_batch"] == "auto":
        return (
            "expected no micro_batch=auto, which depends on the memory of a process; a number is "
            "possible"
        )
    return None


def check_strategy(strategy: Strategy, is_default: bool, settings: Mapping[str, Any]) -> None:
    """Raise SettingError for settings that a run with several processes does not support.

    Args:
        strategy: of the run, started.
        is_default: whether the user has passed none.
        settings: the settings of the Trainer.
    """
    processes = launched().world_size
    if is_default and processes > 1:
        raise SettingError(
            f"strategy: this is one of {processes} processes (WORLD_SIZE), which would all train "
            "the same model: pass strategy=fw.strategies.build('ddp')"
        )
    strategy.check_processes(processes)
    devices = settings["devices"]
    if devices is not None and devices != strategy.world_size:
        raise SettingError(
            f"devices={devices}: expected {strategy.world_size}, the number of processes that were "
            f"started; start the program with torchrun --nproc-per-node {devices}, and pass "
            "strategy=fw.strategies.build('ddp')"
        )
    shards = settings["shards"]
    if shards is not None and shards % strategy.world_size:
        raise SettingError(
            f"shards={shards}: expected a multiple of the {strategy.world_size} processes of the "
            "run"
        )
    strategy.check_settings(settings)
    if strategy.world_size > 1 and settings["cuda_graph"] != "off":
        raise SettingError(
            f"cuda_graph={settings['cuda_graph']}: expected off with {strategy.world_size} "
            "processes, whose communication a graph cannot contain"
        )
    if strategy.world_size > 1 and settings["compile"] == "auto":
        raise SettingError(
            f"compile=auto: expected off, model or step with {strategy.world_size} processes, "
            "each of which would measure other times and might choose otherwise"
        )


def check_callbacks(value: Any) -> list[Callback]:
    """Return the list of callbacks.

    Raises:
        SettingError: one is not a callback, or has a method that would never be called.
    """
    callbacks = as_list("callbacks", value, "callbacks")
    known = [name for name in dir(Callback) if name.startswith("on_")]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise SettingError(f"callbacks: {expected_part(callback, 'a Callback', 'callbacks')}")
        kind = type(callback).__name__
        if hasattr(callback, "finish_saving") and not isinstance(callback, SavingCallback):
            raise SettingError(
                f"{kind}.finish_saving would never be called: derive {kind} from SavingCallback"
            )
        for name in dir(type(callback)):
            if name.startswith("on_") and name not in known:
                raise SettingError(
                    f"{kind}.{name} would never be called: no event has that name; "
                    f"{did_you_mean(name, known)}"
                )
    return callbacks


def check_loggers(value: Any) -> list[Logger]:
    """Return the list of loggers.

    Raises:
        SettingError: one lacks a method that each run calls.
    """
    loggers = as_list("loggers", value, "loggers")
    for logger in loggers:
        methods = [getattr(logger, name, None) for name in ("open", "scalars", "close")]
        if isinstance(logger, type) or not all(callable(method) for method in methods):
            raise SettingError(f"loggers: {expected_part(logger, 'a Logger', 'loggers')}")
    return loggers


def check_metrics(value: Any) -> list[Metric]:
    """Return the list of metrics.

    Raises:
        SettingError: one is not a metric, has no name, or has the name of another one.
    """
    metrics = as_list("metrics", value, "metrics")
    names = set()
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise SettingError(f"metrics: {expected_part(metric, 'a Metric', 'metrics')}")
        if not metric.name:
            raise SettingError(f"metrics: {type(metric).__name__} has no `name` to be logged by")
        if metric.name in names:
            raise SettingError(f"metrics: two metrics have the name {metric.name!r}; rename one")
        names.add(metric.name)
    return metrics


def check_folder(value: Any) -> Path | None:
    """Return the folder of a run as a path.

    Raises:
        SettingError: it is not a path, or a part of it is a file.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise SettingError(f"folder: expected a path, got {short(value)}")
    path = expanded(os.fspath(value))
    for part in (path, *path.parents):
        if part.is_file():
            raise SettingError(f"folder={path}: expected a folder, but {part} is a file")
    return path


# the arguments of `fit`, `evaluate` and `predict`


def check_source(name: str, source: Any, needs_targets: bool) -> None:
    """Raise SettingError or DataError for data without batches.

    Args:
        name: the name of the argument, such as data or val.
        source: its value.
        needs_targets: whether a batch must be a pair (inputs, targets), as for a loss.
    """
    known = isinstance(source, Data | Loader | ForeignLoader)
    readable = known or hasattr(source, "__iter__") or hasattr(source, "__getitem__")
    if isinstance(source, str | bytes | type) or not readable:
        raise SettingError(
            f"{name}: expected a split, a Data or an iterable of batches, got {short(source)}"
        )
    if isinstance(source, list | tuple) and source:
        as_batch(source[0])
    if isinstance(source, Mapping) and len(source) and 0 not in source:
        keys = ", ".join(map(str, source))
        raise SettingError(
            f"{name}: expected a split, got a {type(source).__name__} of {keys}; "
            "framework.TensorSplit(**fields) makes one of tensors by name"
        )
    pair = isinstance(source, tuple) and all(isinstance(each, Tensor) for each in source)
    if needs_targets and (pair or hasattr(source, "__array__")):
        raise SettingError(
            f"{name}: expected batches of (inputs, targets), got a {type(source).__name__}; "
            "framework.TensorSplit(inputs, targets) makes a split"
        )


def check_resume(resume: Any) -> None:
    """Raise SettingError for a value that is not the state of a trainer."""
    if resume is not None and not isinstance(resume, Mapping):
        raise SettingError(
            f"resume: expected a result of `Trainer.state_dict()`, got {short(resume)}"
        )


def check_batch_size(batch_size: Any) -> None:
    """Raise SettingError for a value that is not a number of samples."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise SettingError(f"batch_size={batch_size!r}: expected an int >= 1")


def check_channels_last(channels_last: Any) -> None:
    """Raise SettingError for a value that is neither a bool nor "auto"."""
    if not isinstance(channels_last, bool) and channels_last != "auto":
        raise SettingError(f"channels_last={channels_last!r}: expected True, False or 'auto'")


def check_fit(model: Any, task: Any, optimizer: Any, schedule: Any) -> None:
    """Raise SettingError for arguments that `fit` cannot train with."""
    if not isinstance(model, nn.Module):
        reason = expected_part(model, "an nn.Module", "models", ", in_shape, out_shape")
        raise SettingError(f"model: {reason}")
    check_task(task)
    check_loss_parameters(task, model)
    if not isinstance(optimizer, Optimizer):
        reason = expected_part(
            optimizer, "a torch.optim.Optimizer", "optimizers", ", model.parameters()"
        )
        raise SettingError(f"optimizer: {reason}")
    check_step_alone(optimizer)
    if schedule is not None:
        check_schedule_function(schedule)
    check_values(model)
    check_parameters(model, optimizer)
    if schedule is not None:
        check_has_rate(optimizer)


def check_task(task: Any) -> None:
    """Raise SettingError for a value that is neither a task nor a loss."""
    if isinstance(task, type) or not (isinstance(task, Task) or callable(task)):
        raise SettingError(f"task: {expected_part(task, 'a Task or a loss', 'tasks')}")


def check_loss_parameters(task: Any, model: nn.Module) -> None:
    """Raise SettingError for a loss with its own parameters that require gradients.

    Only parameters of the model are trained and saved.
    """
    loss = task.criterion if isinstance(task, Task) else task
    if loss is None:
        return
    own = set(model.parameters())
    for module in loss_modules(loss):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in own:
                owner = f"the loss {type(module).__name__}"
                raise SettingError(parameter_not_trained(owner, f"`{name}`"))


def check_step_alone(optimizer: Optimizer) -> None:
    """Raise SettingError for an optimizer whose `step` requires a closure, such as LBFGS."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SettingError(
            f"optimizer={type(optimizer).__name__}: its step() needs a closure that computes the "
            "loss again; the trainer computes it once in each step: choose another optimizer"
        )


def check_schedule_function(schedule: Any) -> None:
    """Raise SettingError for a schedule that cannot be called with a step."""
    if isinstance(schedule, type):
        reason = expected_part(schedule, "a schedule", "schedulers", ", total_steps")
        raise SettingError(f"schedule: {reason}")
    if callable(schedule):
        return
    got = f"got {short(schedule)}"
    if isinstance(schedule, LRScheduler):
        got += "; a scheduler of torch cannot be used, since it changes the optimizer itself"
    raise SettingError(
        "schedule: expected a function from the step to a factor on the learning rate, "
        f"such as lambda step: 0.99**step, {got}"
    )


def check_schedule(schedule: Any, validates: bool) -> None:
    """Raise SettingError for a schedule that depends on validation in a run without it.

    Args:
        schedule: the schedule, or its class.
        validates: whether the run has validation data.
    """
    if observes(schedule) and not validates:
        raise SettingError(
            f"scheduler: {type(schedule).__name__} reacts to validation, but there is no "
            "validation split (`fit(val=...)`, data.val_fraction): the learning rate would never "
            "change"
        )


def check_has_rate(optimizer: Optimizer) -> None:
    """Raise SettingError for an optimizer without a learning rate that a schedule could change."""
    if not all("lr" in group for group in optimizer.param_groups):
        raise SettingError(
            f"schedule: {type(optimizer).__name__} has no learning rate ('lr') in its groups; "
            "leave it out (scheduler=null)"
        )


def check_values(model: nn.Module) -> None:
    """Raise SettingError for a parameter or buffer of the model that has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SettingError(f"model: {name} is on the device meta and has no values")


def check_initialized(model: nn.Module, reader: str) -> None:
    """Raise SettingError if a parameter of a lazy module has no values yet.

    Args:
        model: the model, before training.
        reader: the part that needs the values, such as "ema", for the message.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SettingError(
                f"{reader}: the parameter {name} is uninitialized (a lazy module): "
                "call the model on a batch of inputs before `fit`"
            )


def check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError if the optimizer holds parameters that are not the model's.

    The optimizer may hold a part of the model's parameters only. Parameters of other modules give a
    warning if it holds all of the model's too.
    """
    in_groups: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        in_groups.update(group["params"])
    own = {parameter: name for name, parameter in model.named_parameters()}
    if not in_groups & own.keys():
        raise SettingError(
            "optimizer: it holds no parameter of this model, so that nothing would be trained"
        )
    foreign = in_groups - own.keys()
    if not foreign:
        return
    problem = (
        f"optimizer: {len(foreign)} of its {len(in_groups)} parameters do not belong to the model"
    )
    missing = [name for p, name in own.items() if p.requires_grad and p not in in_groups]
    if missing:
        raise SettingError(
            f"{problem}, and {len(missing)} of the model's {len(own)} are not in the optimizer "
            f"(such as {missing[0]}): build the optimizer after the last change of the model"
        )
    warnings.warn(f"{problem}: checkpoints do not contain them", stacklevel=5)


def check_phases(task: Task, compile: str, cuda_graph: str) -> None:  # noqa: A002  # the setting
    """Raise SettingError for settings that cannot be used with a task with phases."""
    if not task.phases:
        return
    name = type(task).__name__
    if compile == "step":
        raise SettingError(f"compile=step: {name} updates in phases")
    if cuda_graph == "on":
        raise SettingError(f"cuda_graph=on: {name} updates in phases")


def check_micro_batches(task: Task, micro_batches: MicroBatches) -> None:
    """Raise SettingError for micro-batches of a task whose batches cannot be split."""
    splits = micro_batches.auto or micro_batches.size is not None
    if splits and not task.splits_batches:
        raise SettingError(
            f"micro_batch: expected null, as {type(task).__name__} compares the samples of a batch"
        )


def check_shards(task: Task, shards: int | None) -> None:
    """Raise SettingError for shards of a task whose batches cannot be split."""
    if shards is not None and not task.splits_batches:
        raise SettingError(
            f"shards: expected null, as {type(task).__name__} compares the samples of a batch"
        )


def as_list(name: str, value: Any, registry: str) -> list[Any]:
    """Return the items of a list of parts.

    Raises:
        SettingError: the value is a single part, a text or None.
    """
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    if isinstance(value, str):
        raise SettingError(
            f"{name}: expected a list, got {value!r}; "
            f"write {name}=[{build_example(value, registry)}]"
        )
    got = "None" if value is None else f"a single {type(value).__name__}"
    raise SettingError(f"{name}: expected a list, got {got}; write {name}=[...]")


def expected_part(value: Any, expected: str, registry: str, more: str = "") -> str:
    """Return the message that a value is not a part of a kind, and how to build one.

    Args:
        value: an argument of `Trainer` or `fit`.
        expected: the expected type, with its article.
        registry: the public name of the registry, such as "callbacks".
        more: the further arguments of its `build`.
    """
    if isinstance(value, type):
        return f"expected an instance, got the class {value.__name__}; write {value.__name__}(...)"
    example = build_example(value, registry, more)
    return f"expected {expected}, got {short(value)}; build one with {example}"


def build_example(value: Any, registry: str, more: str = "") -> str:
    """Return the call that builds a part by its name, such as "fw.callbacks.build('ema')"."""
    name = f"{value!r}" if isinstance(value, str) else '"..."'
    if registry == "tasks" and value in Registry.every["loss"]:
        registry = "losses"
    return f"fw.{registry}.build({name}{more})"


def check_shared_batch(batch_size: int | None, processes: int) -> None:
    """Raise DataError if a batch has fewer samples than a run has processes."""
    if batch_size is not None and batch_size < processes:
        raise DataError(
            f"batch_size={batch_size}: expected at least one sample for each of the "
            f"{processes} processes that share a batch"
        )


def check_rows(
    strategy: Strategy,
    batches: Batches,
    micro_batches: MicroBatches,
    task: Task,
    shards: int | None = None,
) -> None:
    """Raise an error for training batches that the processes of a run cannot share.

    Args:
        strategy: of the run, after its `prepare`.
        batches: of the training.
        micro_batches: the parts in which the model processes a batch.
        task: of the training.
        shards: the number of virtual shards of a batch, if any.

    Raises:
        DataError: a batch has too few samples.
        SettingError: a setting does not go with the strategy or the loader.
    """
    if shards is not None:
        if strategy.forward_is_collective:
            raise SettingError(
                f"shards={shards}: expected strategy=ddp or a single process; "
                f"{type(strategy).__name__} communicates in the forward pass"
            )
        if batches.batch_size is not None and batches.batch_size < shards:
            raise DataError(
                f"shards={shards}: expected batch_size={shards} or more, got {batches.batch_size}"
            )
    processes = strategy.world_size
    if processes == 1:
        return
    divided = divided_loader(batches)
    if divided is not None:
        raise SettingError(
            f"data: the {divided} of the DataLoader already divides the samples among the "
            "processes, as the trainer does: pass a DataLoader of all samples"
        )
    collective = strategy.forward_is_collective or not task.splits_batches
    if collective and (micro_batches.auto or micro_batches.size is not None):
        raise SettingError(
            "micro_batch: expected none for a model whose forward pass communicates between "
            f"{processes} processes (batch normalization, or strategy=fsdp); use a smaller batch "
            "with trainer.accumulate"
        )
    if batches.batch_size is None:
        return
    check_shared_batch(batches.batch_size, processes)
    samples = len(batches.split)
    if samples < processes:
        raise DataError(
            f"the training split has {samples} samples: expected at least one for each of the "
            f"{processes} processes"
        )
    if not collective:
        return
    last = samples % batches.batch_size
    is_read = not batches.drop_last and len(batches) * batches.batch_size >= samples
    if 0 < last < processes and is_read:
        raise DataError(
            f"the last batch of an epoch has {last} of {samples} samples, fewer than the "
            f"{processes} processes, which communicate in the forward pass (batch normalization, "
            "strategy=fsdp, or a task that compares the samples of a batch): use "
            "loader.drop_last=true or another batch_size"
        )


def divided_loader(batches: Batches) -> str | None:
    """Return the name of a sampler that gives each process a part of the data, or None."""
    loader = batches.batches if isinstance(batches, ForeignLoader) else None
    if not isinstance(loader, DataLoader):
        return None
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            return type(sampler).__name__
    return None


def check_evaluated_rows(strategy: Strategy, batches: Batches) -> None:
    """Raise DataError for an evaluation of a sharded model that the processes cannot share.

    Args:
        strategy: of the run.
        batches: of the evaluation.
    """
    if batches.batch_size is None:
        return
    rows = min(batches.batch_size, len(batches.split))
    if rows < strategy.world_size:
        raise DataError(
            f"the evaluation data has batches of {rows} samples: expected at least one sample for "
            f"each of the {strategy.world_size} processes, which have parts of the model"
        )


def check_dtensor_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise SettingError for callbacks that cannot run a sharded model."""
    for callback in callbacks:
        if callback.runs_model:
            raise SettingError(
                f"callbacks: {type(callback).__name__} runs the model outside of the training "
                "step, which strategy=fsdp does not support: remove it, or use strategy=ddp"
            )
