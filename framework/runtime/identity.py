"""Checks that a cache still describes the same objects.

Objects are compared by identity, and references to them are held: a count of objects, or an `id()`
that a new object has taken over, cannot show that one of them was replaced.
"""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from .torch_internals.module_contents import direct_buffers, direct_parameters, direct_submodules


def identical(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether two sequences hold the same objects in the same order."""
    return len(first) == len(second) and all(map(is_, first, second))


def kept_tensors(state: Mapping[Any, Any]) -> list[Tensor]:
    """Return all tensors of an optimizer's state, given as `optimizer.state`."""
    tensors = []
    for values in state.values():
        if isinstance(values, dict):
            tensors += [value for value in values.values() if isinstance(value, Tensor)]
    return tensors


class ModelContents:
    """The parameters, buffers and submodules of a model at one moment.

    Args:
        model: any module.
        buffers: whether buffers count.
    """

    def __init__(self, model: nn.Module, buffers: bool = True):
        self.model = model
        self.buffers = buffers
        self.remember()

    def remember(self) -> None:
        """Store the present contents, with which `changed` compares."""
        self.tensor_owners: list[Mapping[str, Any]] = []
        self.module_owners: list[Mapping[str, Any]] = []
        self.modules = list(self.model.modules())
        for module in self.modules:
            self.tensor_owners.append(direct_parameters(module))
            if self.buffers:
                self.tensor_owners.append(direct_buffers(module))
            self.module_owners.append(direct_submodules(module))
        self.tensors = all_values(self.tensor_owners)
        self.submodules = all_values(self.module_owners)

    def changed(self) -> bool:
        """Return whether an object was added, removed or replaced since `remember`."""
        if not identical(all_values(self.tensor_owners), self.tensors):
            return True
        return not identical(all_values(self.module_owners), self.submodules)

    def addresses(self) -> list[int]:
        """Return the memory addresses of the tensors, which `tensor.data = other` changes."""
        return [tensor.data_ptr() for tensor in self.tensors if isinstance(tensor, Tensor)]

    def modes(self) -> tuple[bool, ...]:
        """Return for each module whether it is in training mode."""
        return tuple([module.training for module in self.modules])


def all_values(mappings: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the values of all mappings in one list."""
    values: list[Any] = []
    for mapping in mappings:
        values += mapping.values()
    return values
