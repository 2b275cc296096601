"""Limits to the size of the model of a run from elsewhere, whose config may ask for any size.

The checkpoint of the run says how large its model is. A model that is much larger is refused while it is built, before
its tensors take memory.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from framework.composition.spec import Spec
from framework.errors import BuildError
from framework.registry.discovery import OWN
from framework.registry.registry import Maker
from framework.runtime.memory import available_bytes

MOST_TIMES = 8  # as many numbers as a checkpoint has: tied and replaced weights count several times
MOST_MORE = 2**22
FLOAT_BYTES = 4
MODULES_PER_TENSOR = 10
MOST_MODULES = 20_000
MOST_TENSOR_BYTES = (
    2**28
)  # more than those of the checkpoint: a mask of 16,384 positions, of one byte each
LARGEST_SETTING = 2**18  # a count of layers becomes a list before there are any
LARGEST_OTHER_SETTING = 2**32  # of a user's plugin, where it may be a seed
TENSOR_MAKERS = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.full,
    torch.eye,
    torch.arange,
}


@contextmanager
def model_limits(spec: Spec, saved: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Within this context, a config that asks for a much larger model than its checkpoint holds raises BuildError.

    Args:
        saved: the shapes of the checkpoint's tensors.
    """
    numbers = sum(map(math.prod, saved.values()))
    check_settings(spec.parts["model"], numbers)
    with (
        SizeLimits(
            MOST_TIMES * numbers + MOST_MORE, MODULES_PER_TENSOR * len(saved) + MOST_MODULES
        ),
        LimitedTensors(MOST_TIMES * FLOAT_BYTES * numbers + MOST_TENSOR_BYTES),
    ):
        yield


class LimitedTensors(TorchFunctionMode):
    """Within this context, a call that would make a tensor of more than `most` bytes raises BuildError instead."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        given: tuple[Any, ...] = (),
        settings: dict[str, Any] | None = None,
    ) -> Any:
        settings = settings or {}
        if function in TENSOR_MAKERS:
            numbers = requested(function, given, settings)
            dtype = settings.get("dtype")
            size = dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT_BYTES
            if numbers * size > self.most:
                raise BuildError(
                    f"the config asks for a tensor of {numbers:,} numbers; its checkpoint has fewer"
                )
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
        raise BuildError(
            f"{name}: a setting is {largest:,}; its checkpoint has {numbers:,} numbers"
        )
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
        self.room = available_bytes()
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
            raise BuildError(
                f"the config asks for more than {self.numbers:,} parameters; its checkpoint has fewer"
            )
        if self.room is not None and self.bytes > self.room:
            raise BuildError(
                f"the config asks for a model of {self.bytes:,} bytes; {self.room:,} bytes are free"
            )
        if self.count > self.modules:
            raise BuildError(
                f"the config asks for more than {self.modules:,} layers; its checkpoint has fewer"
            )
