"""Checks that a cache still describes the same objects.

Objects are compared by identity while references to them are held: a number of objects, or an
`id()` that is free again, does not tell that one of them was replaced.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from .torch_internals.module_contents import buffers_of, parameters_of, submodules_of


def identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether two sequences hold the same objects in the same order."""
    return len(first) == len(second) and all(map(is_, first, second))


def kept_tensors(state: Mapping[Any, Any]) -> list[Tensor]:
    """Return the tensors that an optimizer keeps of all its parameters, in one list."""
    of_parameters = [values.values() for values in state.values() if isinstance(values, dict)]
    return [value for value in chain.from_iterable(of_parameters) if isinstance(value, Tensor)]


class ModelContents:
    """The parameters, buffers and submodules that a model had at one moment.

    Args:
        model: the model to watch.
        buffers: whether buffers count.
    """

    def __init__(self, model: nn.Module, buffers: bool = True):
        self.model = model
        self.buffers = buffers
        self.remember()

    def remember(self) -> None:
        """Take the present contents as those to compare with."""
        self.tensor_owners: list[Mapping[str, Any]] = []
        self.module_owners: list[Mapping[str, Any]] = []
        self.modules = list(self.model.modules())
        for module in self.modules:
            self.tensor_owners.append(parameters_of(module))
            if self.buffers:
                self.tensor_owners.append(buffers_of(module))
            self.module_owners.append(submodules_of(module))
        self.tensors = values_of(self.tensor_owners)
        self.submodules = values_of(self.module_owners)

    def changed(self) -> bool:
        """Return whether one was added, removed or replaced since `remember`."""
        if not identical(values_of(self.tensor_owners), self.tensors):
            return True
        return not identical(values_of(self.module_owners), self.submodules)

    def addresses(self) -> list[int]:
        """Return where the remembered tensors are: `tensor.data = other` moves one in place."""
        return [tensor.data_ptr() for tensor in self.tensors if isinstance(tensor, Tensor)]

    def modes(self) -> tuple[bool, ...]:
        """Return which of the remembered modules are in training mode."""
        return tuple([module.training for module in self.modules])


def values_of(owners: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [value for owner in owners for value in owner.values()]
