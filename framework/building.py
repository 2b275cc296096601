"""The objects behind the names of a Spec, one by one, and whether they fit each other."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from . import seeds
from .checks import single_sample
from .data import Data, Loader, Scale, check_data
from .discovery import OWN
from .errors import BuildError, DataError, FrameworkError, short
from .folds import take_fold
from .memory import free_bytes
from .metric import InUnits, Metric
from .optimizer import Parameters
from .probe import undisturbed
from .registry import Maker, Registry
from .shapes import after, dry_run, first_output
from .spec import Spec
from .task import Task
from .torch_errors import is_batch_norm
from .user_code import describe, reason_of, text_of, user_errors, user_place

MOST_TIMES = 8  # as many numbers as a checkpoint has: tied and replaced weights count several times
MOST_MORE = 2**22
FLOAT_BYTES = 4
MODULES_PER_TENSOR = 10
MOST_MODULES = 20_000
MOST_TENSOR_BYTES = 2**28  # more than those of the checkpoint: a mask of 16,384 positions, of one byte each
LARGEST_SETTING = 2**18  # a count of layers becomes a list before there are any
LARGEST_OTHER_SETTING = 2**32  # of a user's plugin, where it may be a seed
TENSOR_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full, torch.eye, torch.arange}


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
        if not isinstance(shape, tuple | list) or not all(isinstance(size, Integral) for size in shape):
            expected = f"its __init__ should set {name} to a tuple of ints"
            raise DataError(f"{owner}: {expected}, not {short(shape)}")
    for name in ("train", "val", "test"):
        split = getattr(data, name, None)
        able = hasattr(split, "__len__") and hasattr(split, "__getitem__")
        if split is not None and not able:
            expected = f"its {name} split should have __len__ and __getitem__"
            raise DataError(f"{owner}: {expected}, as a {type(split).__name__} has not")


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
        fitting = ", ".join(e.name for e in Registry.every["model"] if "columns" in e.asks_for) or "one with `columns`"
        raise BuildError(
            f"model={maker.entry.name} would take the data's indices of categories for amounts: "
            f"choose one that embeds them ({fitting}), or have the data encode them one-hot"
        )
    with seeds.fitting() if trained else seeds.measuring():
        torch.manual_seed(seeds.derive(spec.seed, "init"))
        model = maker(tuple(in_shape), tuple(out_shape), tuple(columns))
        if spec.parts["initializer"] is not None:
            if any(is_lazy(parameter) for parameter in model.parameters()):
                first_output(model, tuple(in_shape))  # makes the weights, which have no shape before
            for weight in model.parameters():
                if weight.ndim >= 2:  # the rest are biases and scales of norms
                    spec.parts["initializer"](weight)
    return model


@contextmanager
def model_limits(spec: Spec, saved: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Within this context, a config that asks for a much larger model than its checkpoint holds raises BuildError.

    Args:
        saved: the shapes of the checkpoint's tensors.
    """
    numbers = sum(map(math.prod, saved.values()))
    check_settings(spec.parts["model"], numbers)
    with (
        SizeLimits(MOST_TIMES * numbers + MOST_MORE, MODULES_PER_TENSOR * len(saved) + MOST_MODULES),
        LimitedTensors(MOST_TIMES * FLOAT_BYTES * numbers + MOST_TENSOR_BYTES),
    ):
        yield


class LimitedTensors(TorchFunctionMode):
    """Within this context, a call that would make a tensor of more than `most` bytes raises BuildError instead."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(
        self, function: Any, types: Any, given: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        settings = settings or {}
        if function in TENSOR_MAKERS:
            numbers = requested(function, given, settings)
            dtype = settings.get("dtype")
            size = dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT_BYTES
            if numbers * size > self.most:
                raise BuildError(f"the config asks for a tensor of {numbers:,} numbers; its checkpoint has fewer")
        return function(*given, **settings)


def requested(function: Any, given: Sequence[Any], settings: Mapping[str, Any]) -> int:
    """Return how many numbers the tensor has that a function such as `torch.empty` is asked for."""
    if function is torch.arange:
        ends = [float(each) for each in given[:2] if isinstance(each, int | float)] or [0.0]
        return int(abs(ends[-1] - (ends[0] if len(ends) > 1 else 0.0)))
    sizes = settings.get("size", given)
    if len(sizes) and isinstance(sizes[0], list | tuple):
        sizes = sizes[0]
    return math.prod(size for size in sizes if isinstance(size, int))


def check_settings(value: Any, numbers: int) -> None:
    """Raise BuildError for a part with a setting that is too large a count, also in what is nested in it.

    Args:
        numbers: how many the checkpoint holds.
    """
    if not isinstance(value, Maker):
        for part in makers_in(value):
            check_settings(part, numbers)
        return
    is_own = value.entry.registered.module.partition(".")[0] == OWN
    most = max(numbers, LARGEST_SETTING if is_own else LARGEST_OTHER_SETTING)
    largest = max(integers(value.settings), default=0)
    if largest > most:
        name = f"{value.entry.kind.name}={value.entry.name}"
        raise BuildError(f"{name}: a setting is {largest:,}; its checkpoint has {numbers:,} numbers")
    check_settings(value.settings, numbers)


def makers_in(value: Any) -> Iterator[Maker]:
    """Yield the parts in the settings of a part, but not those within them."""
    if isinstance(value, Maker):
        yield value
    elif isinstance(value, Mapping):
        yield from makers_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from makers_in(each)


def integers(value: Any) -> Iterator[int]:
    """Yield the integers in the settings of a part, but not those of parts within them."""
    if isinstance(value, Mapping):
        yield from integers(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from integers(each)
    elif type(value) is int:
        yield value


class SizeLimits:
    """Within this context, a module of this thread that registers too many parameters and buffers raises BuildError.

    Args:
        numbers: the largest count of numbers in parameters; that of buffers is limited by the free memory.
        modules: the largest count of modules, parameters and buffers.
    """

    def __init__(self, numbers: int, modules: int):
        self.numbers, self.modules = numbers, modules
        self.parameter_numbers = self.bytes = self.count = 0
        self.room = free_bytes(torch.device("cpu"))
        self.handles: list[Any] = []
        self.thread = threading.get_ident()  # the hooks are called for modules of all threads

    def __enter__(self) -> "SizeLimits":
        self.handles = [
            register_module_parameter_registration_hook(self.add_parameter),
            register_module_buffer_registration_hook(self.add_buffer),
            register_module_module_registration_hook(self.add_module),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def add_parameter(self, module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None and not is_lazy(parameter) and self.counts():
            self.parameter_numbers += parameter.numel()
        self.add_buffer(module, name, parameter)

    def add_buffer(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and not is_lazy(tensor) and self.counts():
            self.bytes += tensor.nbytes
        self.add_module(module, name, None)

    def counts(self) -> bool:
        return threading.get_ident() == self.thread

    def add_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if not self.counts():
            return
        self.count += 1
        if self.parameter_numbers > self.numbers:
            raise BuildError(f"the config asks for more than {self.numbers:,} parameters; its checkpoint has fewer")
        if self.room is not None and self.bytes > self.room:
            raise BuildError(f"the config asks for a model of {self.bytes:,} bytes; {self.room:,} bytes are free")
        if self.count > self.modules:
            raise BuildError(f"the config asks for more than {self.modules:,} layers; its checkpoint has fewer")


def build_groups(spec: Spec, model: nn.Module) -> list[Any]:
    if next(model.parameters(), None) is None:
        name = spec.parts["model"].entry.name
        raise BuildError(f"model={name}: it has no parameters, so that nothing can be trained")
    return Parameters(**spec.sections["parameters"]).groups(model, spec.parts["optimizer"])


def check_fit(model: nn.Module, data: Data, out_shape: Sequence[int]) -> None:
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
        raise BuildError(f"{type(model).__name__} gives outputs of shape {shape}; the task needs {tuple(out_shape)}")


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
        with undisturbed(model, train=True), torch.no_grad():
            model(sample)
    except ValueError as error:
        section = "trainer" if single.setting == "micro_batch" else "loader"
        said = reason_of(error)
        if is_batch_norm(error):
            said = f"{text_of(error)}. A batch norm needs two"
        raise DataError(f"{section}.{single}: {said}") from error
