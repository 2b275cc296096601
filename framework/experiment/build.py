"""The objects behind the names of a Spec, one by one, and whether they fit each other."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from framework.composition.spec import Spec
from framework.contracts.metric import InUnits, Metric
from framework.contracts.optimizer import Parameters
from framework.contracts.task import Task
from framework.data.dataset import Data, Loader, Scale, check_data, splits_of
from framework.data.folds import take_fold
from framework.errors import BuildError, DataError, FrameworkError, short
from framework.errors.torch_errors import is_batch_norm
from framework.errors.user_code import describe, reason_of, text_of, user_errors, user_place
from framework.registry.registry import Maker, Registry
from framework.runtime import seeds
from framework.runtime.shapes import after, dry_run, first_output
from framework.training.layer_table import model_undisturbed
from framework.training.single_sample import single_sample


def build_data(spec: Spec, refit: bool = True) -> Data:
    """Build the data of a spec, and take its fold.

    refit: see `take_fold`; False for a run of an older version, which was normalised by the
        original training split.
    """
    data = spec.parts["data"]()
    check_contract(data)
    with user_errors(f"reading the length of a split of {type(data).__name__}", DataError):
        check_data(data)
    if spec.fold is not None:
        take_fold(data, spec.fold, refit)
    data.refit = None  # it holds all that was read
    return data


def check_contract(data: Data) -> None:
    """Raise DataError when a data set has no shapes, or a split that is no sequence of samples."""
    owner = type(data).__name__
    for name in ("in_shape", "out_shape"):
        shape = getattr(data, name, None)
        if not isinstance(shape, tuple | list) or not all(
            isinstance(size, Integral) for size in shape
        ):
            expected = f"its __init__ should set {name} to a tuple of ints"
            raise DataError(f"{owner}: {expected}, not {short(shape)}")
    for name, split in splits_of(data).items():
        able = hasattr(split, "__len__") and hasattr(split, "__getitem__")
        if not able:
            expected = f"its {name} split should have __len__ and __getitem__"
            raise DataError(f"{owner}: {expected}, as a {type(split).__name__} has not")


def build_loader(
    spec: Spec, model: nn.Module, data: Data, split: str, shuffle: bool = False
) -> Loader:
    """Return the reader of a split for a model. Raises DataError when the data has none of that name."""
    chosen = splits_of(data).get(split)
    if chosen is None:
        raise DataError(f"{type(data).__name__} has no {split} split")
    reader = model if len(data.in_shape) == 3 else None
    return Loader(chosen, **spec.sections["loader"], shuffle=shuffle, seed=spec.seed, model=reader)


def build_metrics(spec: Spec, data: Data, task: Task) -> list[Metric]:
    """Build the metrics. Raises DataError for one that does not measure the task's kind of target."""
    target, _ = task.targets_of(data)
    metrics = [maker() for maker in spec.parts["metric"]]
    owner = type(data if target == data.target else task).__name__
    for maker, metric in zip(spec.parts["metric"], metrics, strict=True):
        if target not in metric.targets:
            fitting = [e.name for e in all_metrics(maker) if target in e.part.targets]  # type: ignore[attr-defined]
            raise DataError(
                f"metrics={maker.entry.name}: it measures {' or '.join(metric.targets)} targets, but "
                f"{owner} has {target} targets: choose from {', '.join(fitting)}"
            )
    scale = scale_of(data, task)
    return metrics if scale is None else [InUnits(metric, scale) for metric in metrics]


def scale_of(data: Data, task: Task) -> Scale | None:
    """Return how the task's targets are scaled: None where they are not, or are not those of the data."""
    return data.scale if task.targets_of(data) == (data.target, tuple(data.out_shape)) else None


def all_metrics(maker: Maker) -> Iterator[Any]:
    return (
        entry for entry in Registry.every[maker.entry.kind.name] if isinstance(entry.part, type)
    )


def build_model(
    spec: Spec,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    columns: Sequence[int] = (),
    trained: bool = True,
) -> nn.Module:
    """Build the model from the seed's own stream, and fill its weights if an initializer is chosen.

    Args:
        trained: whether it will be trained from these weights, so that no other thread may draw from the generators
            meanwhile; otherwise its weights are replaced by those of a checkpoint.

    Raises BuildError when the data has indices of categories and the model would take them for amounts.
    """
    maker = spec.parts["model"]
    if any(columns) and "columns" not in maker.entry.asks_for:
        fitting = (
            ", ".join(e.name for e in Registry.every["model"] if "columns" in e.asks_for)
            or "one with `columns`"
        )
        raise BuildError(
            f"model={maker.entry.name} would take the data's indices of categories for amounts: "
            f"choose one that embeds them ({fitting}), or have the data encode them one-hot"
        )
    with seeds.fitting() if trained else seeds.measuring():
        torch.manual_seed(seeds.derive(spec.seed, "init"))
        model = maker(tuple(in_shape), tuple(out_shape), tuple(columns))
        if spec.parts["initializer"] is not None:
            if any(is_lazy(parameter) for parameter in model.parameters()):
                first_output(
                    model, tuple(in_shape)
                )  # makes the weights, which have no shape before
            for weight in model.parameters():
                if weight.ndim >= 2:  # the rest are biases and scales of norms
                    spec.parts["initializer"](weight)
    return model


def build_groups(spec: Spec, model: nn.Module) -> list[Any]:
    if next(model.parameters(), None) is None:
        name = spec.parts["model"].entry.name
        raise BuildError(f"model={name}: it has no parameters, so that nothing can be trained")
    return Parameters(**spec.sections["parameters"]).groups(model, spec.parts["optimizer"])


def check_output_shape(model: nn.Module, data: Data, out_shape: Sequence[int]) -> None:
    """Run one training sample through the model. Raises BuildError when the output has another shape than it must."""
    sample = first_input(data)
    name = type(model).__name__
    try:
        shape = tuple(dry_run(model, sample).shape[1:])
    except BuildError as error:
        raise BuildError(after(name, name, error)) from error
    except FrameworkError:
        raise
    except Exception as error:
        if user_place(error) is None:
            said = f"{name} cannot take a sample of {type(data).__name__}: {text_of(error)}"
            raise BuildError(said) from error
        situation = f"while running {name} on one training sample of shape {tuple(sample.shape)}"
        raise BuildError(f"{describe(error)}, {situation}") from error
    if shape != tuple(out_shape):
        raise BuildError(
            f"{type(model).__name__} gives outputs of shape {shape}; the task needs {tuple(out_shape)}"
        )


def first_input(data: Data) -> Tensor:
    """Return the first training input as a batch of one.

    Raises DataError when it cannot be read or is no tensor.
    """
    name = type(data).__name__
    with user_errors(f"reading the first training sample of {name}", DataError):
        sample: Any = data.train[0]
    try:
        return torch.as_tensor(sample[0]).unsqueeze(0)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        reason = f" ({reason_of(error)})" if isinstance(sample, tuple | list) else ""
        said = f"expected a tuple (input, target) of tensors, got a {type(sample).__name__}{reason}"
        raise DataError(f"the first training sample of {name}: {said}") from error


def check_smallest_batch(model: nn.Module, batches: Loader, micro_batch: int | None = None) -> None:
    """Raise DataError when a training batch is one sample and the model (batch norm) needs more.

    micro_batch: samples that go through the model at once; None for whole batches.
    """
    single = single_sample(batches, micro_batch)
    if single is None:
        return
    sample = torch.as_tensor(batches.split[0][0]).unsqueeze(0)
    try:
        with model_undisturbed(model, train=True), torch.no_grad():
            model(sample)
    except ValueError as error:
        section = "trainer" if single.setting == "micro_batch" else "loader"
        said = reason_of(error)
        if is_batch_norm(error):
            said = f"{text_of(error)}. A batch norm needs two"
        raise DataError(f"{section}.{single}: {said}") from error
