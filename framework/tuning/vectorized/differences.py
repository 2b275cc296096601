"""Finds the differences between trials apart from their weights.

Numbers that differ become tensors with a value for each trial; other differences prevent stacking.
A missed difference would train all trials with the settings of the first, so objects that cannot be
inspected, such as those of a library in C, count as different.
"""

from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from framework.contracts.task import Task
from framework.errors import short
from framework.runtime.torch_internals.module_contents import (
    direct_buffers,
    direct_parameters,
    module_hooks,
)

from .stacked_update import NotStackable

Key = tuple[Any, ...]
"""The path of a module ("task" for the task), an attribute, and keys of nested dicts and lists."""
Description = dict[Key, Any]
"""The attributes of a model and its task."""
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, modules, hooks, ...
LOSS = "criterion"
MAX_DEPTH = 50  # of nested objects


class ModelWithTask(nn.Module):
    """A model and its task as one module that computes the loss of a batch."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.task = task
        self.criterion = task.criterion

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return loss, outputs, targets and logged values of a training step."""
        loss, outputs, targets, values = self.task.step(self.model, batch)
        return loss, outputs, targets, dict(values)


def differences(trials: Sequence[Description], like: Tensor) -> dict[Key, Tensor]:
    """Return the floats, and the tensors of the loss, that differ between trials.

    Args:
        trials: the description of each trial.
        like: a tensor with the dtype and device for floats.

    Returns:
        Tensors of shape (trials, ...) by key.

    Raises:
        NotStackable: there is another difference.
    """
    stacked = {}
    keys: dict[Key, None] = {}
    for trial in trials:
        keys.update(dict.fromkeys(trial))
    for key in keys:
        values: list[Any] = [trial.get(key) for trial in trials]
        if all(is_same(value, values[0]) for value in values[1:]):
            continue
        if all(isinstance(value, float) for value in values):
            stacked[key] = like.new_tensor(values)
        elif is_of_loss(key) and have_one_shape(values):
            stacked[key] = torch.stack([value.detach() for value in values])
        else:
            raise NotStackable(
                f"{key_text(key)} differs between trials: {short(values[0])}, {short(values[-1])}"
            )
    return stacked


def have_one_shape(values: Sequence[Any]) -> bool:
    """Return whether all values are tensors of one shape."""
    if not all(isinstance(value, Tensor) for value in values):
        return False
    return all(value.shape == values[0].shape for value in values)


def first_change(before: Description, after: Description) -> str | None:
    """Return the name of the first attribute that changed."""
    for key in dict.fromkeys([*before, *after]):
        if not is_same(before.get(key), after.get(key)):
            return key_text(key)
    return None


def key_text(key: Key) -> str:
    """Return a key as text: model.0.p."""
    return ".".join(str(part) for part in key if part != "")


def is_of_loss(key: Key) -> bool:
    """Return whether a key is an attribute of the loss."""
    return bool(key[0].partition(".")[0] == LOSS)


def describe_trial(trial: ModelWithTask) -> Description:
    """Return all attributes of a model and its task except the model's parameters and buffers."""
    description: Description = {}
    parameters = set(trial.model.parameters())
    for path, owner in [*trial.named_modules(), ("task", trial.task)]:
        description[path, ""] = type(owner)
        for name, value in own_attributes(path, owner).items():
            if value is trial.task or value is trial.criterion:
                continue
            for key, leaf in leaves((path, name), value):
                if isinstance(leaf, Tensor) and leaf in parameters:
                    continue
                description[key] = leaf
    return description


def own_attributes(path: str, owner: Any) -> dict[str, Any]:
    """Return the attributes of an object; of a module also hooks, of the loss also its tensors."""
    attributes = dict(vars(owner))
    if not isinstance(owner, nn.Module):
        return attributes
    for name in MODULE_ATTRIBUTES:
        attributes.pop(name, None)
    attributes.update(module_hooks(owner))
    if is_of_loss((path,)):
        attributes.update(direct_buffers(owner))
        attributes.update(direct_parameters(owner))
    return attributes


def leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """Yield the keys and values in nested dicts and lists."""
    if isinstance(value, ref):
        return
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = list(enumerate(value))
    else:
        yield key, value
        return
    for part, item in items:
        yield from leaves((*key, part), item)


def find_container(trial: ModelWithTask, key: Key) -> tuple[Any, Any]:
    """Return the dict or list that contains a value, and the value's key in it."""
    path, attribute, *rest = key
    owner = trial.task if path == "task" else trial.get_submodule(path)
    container: Any = vars(owner)
    if isinstance(owner, nn.Module):
        for tensors in (direct_parameters(owner), direct_buffers(owner)):
            if attribute in tensors:
                container = tensors
    for part in rest:
        container = container[attribute]
        attribute = part
    return container, attribute


def is_same(one: Any, other: Any, parents: tuple[Any, ...] = ()) -> bool:
    """Return whether two objects are equal in all their components.

    Args:
        one: any object.
        other: the object that it is compared with.
        parents: the objects that contain `one`, to end at reference cycles.
    """
    if isinstance(one, torch.Generator):
        return False  # trials would share its random numbers
    if one is other or any(one is parent for parent in parents):
        return True
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if type(one) is not type(other) or len(parents) > MAX_DEPTH:
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    components = components_of(one)
    other_components = components_of(other)
    if components is None or other_components is None:
        return bool(one == other)
    if len(components) != len(other_components):
        return False
    parents = (*parents, one)
    pairs = zip(components, other_components, strict=True)
    return all(is_same(*pair, parents) for pair in pairs)


def components_of(value: Any) -> list[Any] | None:
    """Return the components of an object, from which `copy.copy` would create it.

    None if it has to be compared by `==`.
    """
    try:
        if isinstance(value, str | bytes):
            return None
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [value.__code__, value.__defaults__, value.__kwdefaults__, *cells]
        if isinstance(value, list | tuple):
            return list(value)
        if isinstance(value, dict):
            return [*value.keys(), *value.values()]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        reduced = value.__reduce_ex__(2)
        return None if isinstance(reduced, str) else list(reduced)
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None
