"""The objects behind the names of a Spec, one by one, and whether they fit each other."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import seeds
from .data import Data, Loader, Scale, check_data
from .errors import BuildError, DataError, FrameworkError
from .folds import take_fold
from .metric import InUnits, Metric
from .optimizer import Parameters
from .probe import undisturbed
from .registry import Maker, Registry
from .shapes import dry_run
from .spec import Spec
from .task import Task


def build_data(spec: Spec, refit: bool = True) -> Data:
    """Build the data of a spec, and take its fold.

    refit: see `take_fold`; False for a run of an older version, which was normalised by the
        original training split.
    """
    data = spec.parts["data"]()
    check_data(data)
    if spec.fold is not None:
        take_fold(data, spec.fold, refit)
    data.refit = None  # it holds all that was read
    return data


def build_loader(spec: Spec, model: nn.Module, data: Data, split: str, shuffle: bool = False) -> Loader:
    """Return the reader of a split for a model. Raises DataError when the data has none of that name."""
    chosen = getattr(data, split, None)
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
    return (entry for entry in Registry.every[maker.entry.kind.name] if isinstance(entry.part, type))


def build_model(
    spec: Spec, in_shape: Sequence[int], out_shape: Sequence[int], columns: Sequence[int] = ()
) -> nn.Module:
    """Build the model from the seed's own stream, and fill its weights if an initializer is chosen.

    Raises BuildError when the data has indices of categories and the model would take them for amounts.
    """
    maker = spec.parts["model"]
    if any(columns) and "columns" not in maker.entry.asks_for:
        fitting = ", ".join(e.name for e in Registry.every["model"] if "columns" in e.asks_for) or "one with `columns`"
        raise BuildError(
            f"model={maker.entry.name} would take the data's indices of categories for amounts: "
            f"choose one that embeds them ({fitting}), or have the data encode them one-hot"
        )
    torch.manual_seed(seeds.derive(spec.seed, "init"))
    model = maker(tuple(in_shape), tuple(out_shape), tuple(columns))
    if spec.parts["initializer"] is not None:
        for weight in model.parameters():
            if weight.ndim >= 2:  # the rest are biases and scales of norms
                spec.parts["initializer"](weight)
    return model


def build_groups(spec: Spec, model: nn.Module) -> list[Any]:
    return Parameters(**spec.sections["parameters"]).groups(model, spec.parts["optimizer"])


def check_fit(model: nn.Module, data: Data, out_shape: Sequence[int]) -> None:
    """Run one training sample through the model. Raises BuildError when the output has another shape than it must."""
    sample = torch.as_tensor(data.train[0][0]).unsqueeze(0)
    try:
        shape = tuple(dry_run(model, sample).shape[1:])
    except FrameworkError:
        raise
    except Exception as error:
        raise BuildError(f"{type(model).__name__} cannot take a sample of {type(data).__name__}: {error}") from error
    if shape != tuple(out_shape):
        raise BuildError(f"{type(model).__name__} gives outputs of shape {shape}; the task needs {tuple(out_shape)}")


def check_smallest_batch(model: nn.Module, batches: Loader) -> None:
    """Raise DataError when a training batch is a single sample and the model (batch norm) cannot train on one."""
    rows, size = len(batches.split), batches.batch_size
    if size > 1 and (rows % size != 1 or batches.drop_last):
        return
    sample = torch.as_tensor(batches.split[0][0]).unsqueeze(0)
    try:
        with undisturbed(model, train=True), torch.no_grad():
            model(sample)
    except ValueError as error:
        where = f" (the last of {rows:,} in batches of {size:,}; loader.drop_last=true leaves it out)" * (size > 1)
        raise DataError(
            f"loader.batch_size={size} makes a batch of one sample{where}: {error}. A batch norm needs two"
        ) from error
