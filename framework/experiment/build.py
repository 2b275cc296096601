"""Build the objects of a Spec one by one, and check that they fit each other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from framework.composition.spec import Spec
from framework.contracts.fields import unnamed_error
from framework.contracts.metric import InUnits, Metric
from framework.contracts.optimizer import Parameters
from framework.contracts.task import Task, check_tensor_output
from framework.data.dataset import Data, Loader, Scale, check_data, splits_of
from framework.data.folds import take_fold
from framework.data.workers import stack_samples
from framework.errors import BuildError, DataError, FrameworkError, did_you_mean, short
from framework.errors.torch_errors import batch_norm_reason, is_batch_norm
from framework.errors.user_code import describe, reason_of, text_of, user_errors, user_place
from framework.registry.annotations import strip
from framework.registry.registry import Maker, Registry
from framework.registry.signatures import signature_parameters
from framework.runtime import seeds
from framework.runtime.batch import Batch, describe_fields, tensors_of
from framework.runtime.shapes import ShapeError, dry_run, first_output, message_at
from framework.training.layer_table import model_undisturbed
from framework.training.single_sample import single_sample


def build_data(spec: Spec, refit: bool = True) -> Data:
    """Build the data of a spec, and take its fold.

    Args:
        refit: see `take_fold`; False for a run of an older version, whose data was normalized by
            the original training split.
    """
    data: Data = spec.parts["data"]()
    check_data_contract(data)
    with user_errors(f"reading the length of a split of {type(data).__name__}", DataError):
        check_data(data)
    if spec.fold is not None:
        take_fold(data, spec.fold, refit)
    data.refit = None  # it refers to all data that was read
    return data


def check_data_contract(data: Data) -> None:
    """Raise DataError if a data set has no shapes, or a split that is not a sequence of samples."""
    owner = type(data).__name__
    for name in ("in_shape", "out_shape"):
        shape = getattr(data, name, None)
        sizes = shape if isinstance(shape, tuple | list) else [None]
        if not all(isinstance(size, Integral) for size in sizes):
            raise DataError(f"{owner}.{name}: expected a tuple of ints, got {short(shape)}")
    for name, split in splits_of(data).items():
        if not hasattr(split, "__len__") or not hasattr(split, "__getitem__"):
            raise DataError(
                f"{owner}.{name}: expected a split with __len__ and __getitem__, "
                f"got a {type(split).__name__}"
            )


def build_loader(
    spec: Spec, model: nn.Module, data: Data, split: str, shuffle: bool = False
) -> Loader:
    """Return the loader of a split for a model.

    Raises:
        DataError: the data has no such split.
    """
    chosen = splits_of(data).get(split)
    if chosen is None:
        known = [name for name, each in splits_of(data).items() if each is not None]
        advice = did_you_mean(split, known)
        raise DataError(f"{type(data).__name__} has no {split} split; {advice}")
    image_model = model if len(data.in_shape) == 3 else None
    return Loader(
        chosen, **spec.sections["loader"], shuffle=shuffle, seed=spec.seed, model=image_model
    )


def build_metrics(spec: Spec, data: Data, task: Task) -> list[Metric]:
    """Build the metrics.

    Raises:
        DataError: a metric does not support the targets of the task.
    """
    target, _ = task.targets_of(data)
    metrics = [maker() for maker in spec.parts["metric"]]
    owner = type(data if target == data.target else task).__name__
    for maker, metric in zip(spec.parts["metric"], metrics, strict=True):
        if target not in metric.targets:
            entries = Registry.every[maker.entry.kind.name]
            fitting = [e.name for e in entries if target in getattr(e.part, "targets", ())]
            raise DataError(
                f"metrics={maker.entry.name}: it measures {' or '.join(metric.targets)} targets, "
                f"but {owner} has {target} targets; available: {', '.join(fitting)}"
            )
    scale = scale_of(data, task)
    return metrics if scale is None else [InUnits(metric, scale) for metric in metrics]


def scale_of(data: Data, task: Task) -> Scale | None:
    """Return the scale of the task's targets; None without one, or if they are not the data's."""
    return data.scale if task.targets_of(data) == (data.target, tuple(data.out_shape)) else None


def build_model(
    spec: Spec,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    columns: Sequence[int] = (),
    trained: bool = True,
) -> nn.Module:
    """Build the model from its own random stream, and initialize its weights.

    Args:
        columns: the number of categories of each input column, 0 for a numeric one.
        trained: False if the weights are replaced by those of a checkpoint. If True, no other
            thread may use the random generators meanwhile.

    Raises:
        BuildError: the data has indices of categories, which the model does not embed.
    """
    maker = spec.parts["model"]
    if any(columns):
        check_embeds(maker)
    initialize = spec.parts["initializer"]
    with seeds.fitting() if trained else seeds.measuring():
        torch.manual_seed(seeds.derive(spec.seed, "init"))
        model: nn.Module = maker(tuple(in_shape), tuple(out_shape), tuple(columns))
        if initialize is None:
            return model
        if any(is_lazy(parameter) for parameter in model.parameters()):
            first_output(model, tuple(in_shape))  # materializes the weights
        for weight in model.parameters():
            if weight.ndim >= 2:  # the others are biases and scales of norms
                initialize(weight)
    return model


@contextmanager
def image_advice(spec: Spec, data: Data) -> Iterator[None]:
    """Advise data.image=true if a part needs images and the data set has this setting."""
    try:
        yield
    except ShapeError as error:
        maker = spec.parts["data"]
        setting = maker.entry.settings.get("image")
        can_give_images = (
            setting is not None
            and strip(setting.annotation) is bool
            and not maker.settings.get("image", setting.default)
        )
        if can_give_images and 3 in error.axes and error.in_shape == tuple(data.in_shape):
            raise error.with_text(f"{error}; data.image=true gives images") from error
        raise


def check_embeds(maker: Maker) -> None:
    """Raise BuildError if a model does not embed categories."""
    if "columns" in maker.entry.asks_for:
        return
    fitting = [entry.name for entry in Registry.every["model"] if "columns" in entry.asks_for]
    raise BuildError(
        f"model={maker.entry.name} would use the category indices of the data as numbers: choose "
        f"a model that embeds them ({', '.join(fitting) or 'one with `columns`'}), or one-hot "
        "encoding in the data"
    )


def build_groups(spec: Spec, model: nn.Module) -> list[Any]:
    """Return the groups of parameters.

    Raises:
        BuildError: the model has no parameters.
    """
    if next(model.parameters(), None) is None:
        name = spec.parts["model"].entry.name
        raise BuildError(f"model={name}: it has no parameters to train")
    return Parameters(**spec.sections["parameters"]).groups(model, spec.parts["optimizer"])


def build_spec_optimizer(spec: Spec, model: nn.Module) -> Optimizer:
    """Build the optimizer; trainer.fused=false leaves the choice of its implementation to torch."""
    maker = spec.parts["optimizer"]
    fused = signature_parameters(maker.entry.part).get("fused")
    if not spec.sections["trainer"]["fused"] and fused is not None and fused.default is None:
        maker = Maker(maker.entry, {"fused": None, **maker.settings})
    optimizer: Optimizer = maker(build_groups(spec, model))
    return optimizer


def check_output_shape(model: nn.Module, data: Data, out_shape: Sequence[int], task: Task) -> None:
    """Run a training sample through the model, with the fields that the task names.

    Raises:
        BuildError: the model refuses the sample, or its outputs have a wrong shape.
    """
    name = type(model).__name__
    outputs_of: Callable[[Any], Any] = model
    if task.fields.named:
        sample = first_batch_of_one(data)
        task.count(sample)  # it reads the targets
        outputs_of = partial(tensor_of, task, model)
    else:
        sample = first_input(data, task)
    try:
        shape = tuple(dry_run(model, sample, outputs_of).shape[1:])
    except BuildError as error:
        raise BuildError(message_at(name, name, error)) from error
    except FrameworkError:
        raise
    except Exception as error:
        if user_place(error) is None:
            raise BuildError(
                f"{name} cannot take a sample of {type(data).__name__}: {text_of(error)}"
            ) from error
        raise BuildError(
            f"{describe(error)}, while running {name} on one training sample of {described(sample)}"
        ) from error
    if shape != tuple(out_shape):
        raise BuildError(
            f"{name} gives outputs of shape {shape}; the task needs {tuple(out_shape)}"
        )


def first_sample(data: Data) -> Any:
    """Return the first training sample.

    Raises:
        DataError: it cannot be read.
    """
    name = type(data).__name__
    with user_errors(f"reading the first training sample of {name}", DataError):
        return data.train[0]


def first_batch_of_one(data: Data) -> Batch:
    """Return the first training sample as a batch.

    Raises:
        DataError: it cannot be read, or is not a sample of a batch.
    """
    batch = stack_samples([first_sample(data)])
    if isinstance(batch, FrameworkError):
        raise batch
    return batch


def described(sample: Batch) -> str:
    """Return the shape of a tensor, or the fields of a batch with their shapes."""
    if isinstance(sample, Tensor):
        return f"shape {tuple(sample.shape)}"
    return f"the fields {describe_fields(sample)}"


def tensor_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return the output that a task uses of a model.

    Raises:
        DataError: it is not a tensor.
    """
    outputs = task.model_outputs(model, batch)
    check_tensor_output(model, outputs)
    tensor: Tensor = outputs
    return tensor


def first_input(data: Data, task: Task) -> Tensor:
    """Return the first training input as a batch of one.

    It is the first field with a tensor that the task names, or the first tensor of (input, target).

    Raises:
        DataError: it cannot be read, or is not a tensor.
    """
    name = type(data).__name__
    if task.fields.named:
        positional, by_name = task.fields.arguments(first_batch_of_one(data))
        tensors = tensors_of([*positional, *by_name.values()])
        if tensors:
            return tensors[0]
    sample = first_sample(data)
    if isinstance(sample, Mapping) or is_dataclass(sample):
        raise unnamed_error(first_batch_of_one(data))
    try:
        return torch.as_tensor(sample[0]).unsqueeze(0)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        reason = f" ({reason_of(error)})" if isinstance(sample, tuple | list) else ""
        raise DataError(
            f"the first training sample of {name}: expected a tuple (input, target) of tensors, "
            f"got a {type(sample).__name__}{reason}"
        ) from error


def check_smallest_batch(
    model: nn.Module,
    batches: Loader,
    micro_batch: int | None = None,
    task: Task | None = None,
) -> None:
    """Raise DataError if a training batch has one sample and the model (batch norm) needs more.

    Args:
        micro_batch: samples that go through the model at once; None for whole batches.
        task: which names the fields of a batch.
    """
    single = single_sample(batches, micro_batch)
    if single is None:
        return
    sample = None
    if task is None or not task.fields.named:
        sample = torch.as_tensor(batches.split[0][0]).unsqueeze(0)
    try:
        with model_undisturbed(model, train=True), torch.no_grad():
            if task is None or not task.fields.named:
                model(sample)
            else:
                task.model_outputs(model, stack_samples([batches.split[0]]))
    except ValueError as error:
        section = "trainer" if single.setting == "micro_batch" else "loader"
        reason = reason_of(error)
        if is_batch_norm(error):
            reason = batch_norm_reason(error)
        raise DataError(f"{section}.{single}: {reason}") from error
