"""Limits on the size of a model that is built from the config of an untrusted source.

The checkpoint of the run contains the size of its model. A config that asks for a much larger model
is refused while it is built, before its tensors take memory.
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

MOST_TIMES = 8  # elements per element of the checkpoint: tied and replaced weights count again
MOST_MORE = 2**22  # elements in any case
FLOAT_BYTES = 4
MODULES_PER_TENSOR = 10
MOST_MODULES = 20_000  # in any case
MOST_TENSOR_BYTES = 2**28  # in any case: a mask of 16,384 positions, of one byte each
LARGEST_SETTING = 2**18  # a count of layers becomes a list before the layers are built
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
    """Raise BuildError in this context if a config asks for a far larger model than its checkpoint.

    Args:
        saved: the shapes of the checkpoint's tensors.
    """
    numbers = sum(map(math.prod, saved.values()))
    check_settings(spec.parts["model"], numbers)
    sizes = SizeLimits(
        numbers=MOST_TIMES * numbers + MOST_MORE,
        modules=MODULES_PER_TENSOR * len(saved) + MOST_MODULES,
    )
    tensors = TensorLimits(most=MOST_TIMES * FLOAT_BYTES * numbers + MOST_TENSOR_BYTES)
    with sizes, tensors:
        yield


class TensorLimits(TorchFunctionMode):
    """Raises BuildError in this context instead of making a tensor of more than `most` bytes."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in TENSOR_MAKERS:
            numbers = requested_numbers(function, args, kwargs)
            dtype = kwargs.get("dtype")
            size = dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT_BYTES
            if numbers * size > self.most:
                raise BuildError(
                    f"the config needs a tensor of {numbers:,} elements; its checkpoint has fewer"
                )
        return function(*args, **kwargs)


def requested_numbers(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the number of elements of the tensor that a function such as `torch.empty` makes."""
    if function is torch.arange:
        ends = [float(end) for end in args[:2] if isinstance(end, int | float)]
        if len(ends) == 2:
            return int(abs(ends[1] - ends[0]))
        return int(abs(ends[0])) if ends else 0
    sizes = kwargs.get("size", args)
    if len(sizes) and isinstance(sizes[0], list | tuple):
        sizes = sizes[0]
    return math.prod(size for size in sizes if isinstance(size, int))


def check_settings(value: Any, numbers: int) -> None:
    """Raise BuildError if a setting of a part, or of a part in its settings, is too large a count.

    Args:
        value: a part, or settings that contain parts.
        numbers: of elements in the checkpoint.
    """
    if not isinstance(value, Maker):
        for part in makers_in(value):
            check_settings(part, numbers)
        return
    is_own = value.entry.registered.module.partition(".")[0] == OWN
    most = max(numbers, LARGEST_SETTING if is_own else LARGEST_OTHER_SETTING)
    largest = max(integers(value.settings), default=0)
    if largest > most:
        raise BuildError(
            f"{value.entry.kind.name}={value.entry.name}: a setting is {largest:,}, "
            f"but its checkpoint has only {numbers:,} numbers"
        )
    check_settings(value.settings, numbers)


def makers_in(value: Any) -> Iterator[Maker]:
    """Yield the parts in a value, without the parts in their settings."""
    if isinstance(value, Maker):
        yield value
    elif isinstance(value, Mapping):
        yield from makers_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from makers_in(item)


def integers(value: Any) -> Iterator[int]:
    """Yield the integers in a value, without those of the parts in it."""
    if isinstance(value, Mapping):
        yield from integers(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from integers(item)
    elif type(value) is int:
        yield value


class SizeLimits:
    """Raises BuildError in this context if modules register too many parameters and buffers.

    Args:
        numbers: the largest number of elements of parameters; buffers are limited by the free
            memory.
        modules: the largest number of modules, parameters and buffers.
    """

    def __init__(self, numbers: int, modules: int):
        self.numbers = numbers
        self.modules = modules
        self.parameter_numbers = 0
        self.bytes = 0
        self.count = 0
        self.free_bytes = available_bytes()
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
        if parameter is not None and not is_lazy(parameter) and self.in_thread():
            self.parameter_numbers += parameter.numel()
        self.add_buffer(module, name, parameter)

    def add_buffer(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and not is_lazy(tensor) and self.in_thread():
            self.bytes += tensor.nbytes
        self.add_module(module, name, None)

    def in_thread(self) -> bool:
        return threading.get_ident() == self.thread

    def add_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if not self.in_thread():
            return
        self.count += 1
        if self.parameter_numbers > self.numbers:
            raise BuildError(
                f"the config needs more than {self.numbers:,} parameters; its checkpoint has fewer"
            )
        if self.free_bytes is not None and self.bytes > self.free_bytes:
            raise BuildError(
                f"the config needs a model of {self.bytes:,} bytes; "
                f"{self.free_bytes:,} bytes are free"
            )
        if self.count > self.modules:
            raise BuildError(
                f"the config needs more than {self.modules:,} layers; its checkpoint has fewer"
            )
