"""What trials differ in besides their weights. Numbers become tensors, with a value a trial; other things part them.

Nothing may differ unseen, or all trials would train with what the first has. So what cannot be looked into, a library's
object say, counts as different.
"""

from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from framework.contracts.task import Task
from framework.errors import short
from framework.runtime.torch_internals.module_contents import buffers_of, hooks_of, parameters_of

from .stacked_update import NotStackable

Key = tuple[Any, ...]
"""Where something is: the path of a module ("task": in the task), an attribute, the way into its dicts and lists."""
Description = dict[Key, Any]
OWN = frozenset(vars(nn.Module()))  # what every module has: its parameters, modules, hooks
LOSS = "criterion"
DEEPEST = 50  # levels of things within things


class Together(nn.Module):
    """A model with its task, as one module that goes from a batch to a loss."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task
        self.criterion = task.criterion

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        loss, outputs, targets, values = self.task.step(self.model, batch)
        return loss, outputs, targets, dict(values)


def differences(trials: Sequence[Description], like: Tensor) -> dict[Key, Tensor]:
    """Return the floats, and the tensors of the loss, that differ between trials: (trials, ...) each, floats as `like`.

    Raises NotStackable for the first other thing that differs.
    """
    found = {}
    for key in dict.fromkeys(key for each in trials for key in each):
        values: list[Any] = [each.get(key) for each in trials]
        if all(same(value, values[0]) for value in values[1:]):
            continue
        if all(isinstance(value, float) for value in values):
            found[key] = like.new_tensor(values)
        elif of_loss(key) and all(
            isinstance(value, Tensor) and value.shape == values[0].shape for value in values
        ):
            found[key] = torch.stack([value.detach() for value in values])
        else:
            raise NotStackable(
                f"{named(key)} is not the same: {short(values[0])}, {short(values[-1])}"
            )
    return found


def changed(before: Description, now: Description) -> str | None:
    """Return the name of something that is not what it was."""
    keys = dict.fromkeys([*before, *now])
    return next((named(key) for key in keys if not same(before.get(key), now.get(key))), None)


def named(key: Key) -> str:
    return ".".join(str(part) for part in key if part != "")


def of_loss(key: Key) -> bool:
    """Whether something belongs to the loss."""
    return bool(key[0].partition(".")[0] == LOSS)


def describe_trial(whole: Together) -> Description:
    """Return what a model and its task are made of, but for the model's parameters and buffers."""
    return dict(described_by(whole))


def described_by(whole: Together) -> Iterator[tuple[Key, Any]]:
    stacked = set(map(id, whole.model.parameters()))
    for path, owner in [*whole.named_modules(), ("task", whole.task)]:
        yield (path, ""), type(owner)
        held = dict(vars(owner))
        if isinstance(owner, nn.Module):
            held = {name: value for name, value in held.items() if name not in OWN} | hooks_of(
                owner
            )
            if of_loss((path,)):
                held |= {**buffers_of(owner), **parameters_of(owner)}
        for name, value in held.items():
            if value is not whole.task and value is not whole.criterion:
                yield from (
                    leaf for leaf in leaves((path, name), value) if id(leaf[1]) not in stacked
                )


def leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """Yield what is in dicts and lists, with the way there."""
    if isinstance(value, dict | list) and value:
        for part, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves((*key, part), each)
    elif not isinstance(value, ref):
        yield key, value


def holder(whole: Together, key: Key) -> tuple[Any, Any]:
    """Return the dict or list that holds something, and its key there."""
    path, *way = key
    owner = whole.task if path == "task" else whole.get_submodule(path)
    held: Any = vars(owner)
    if isinstance(owner, nn.Module):
        held = next(
            (each for each in (buffers_of(owner), parameters_of(owner)) if way[0] in each), held
        )
    for part in way[:-1]:
        held = held[part]
    return held, way[-1]


def same(one: Any, other: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether two things are alike in all that they consist of. `within`: what `one` is a part of."""
    if isinstance(one, torch.Generator):
        return False  # all would draw from one
    if one is other or id(one) in within:
        return True
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if type(one) is not type(other) or len(within) > DEEPEST:
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    inside, theirs = parts(one), parts(other)
    if inside is None or theirs is None:
        return bool(one == other)
    within |= {id(one)}
    return len(inside) == len(theirs) and all(
        same(*pair, within) for pair in zip(inside, theirs, strict=True)
    )


def parts(thing: Any) -> list[Any] | None:
    """Return what a thing consists of: what `copy.copy` would make it from anew. None where `==` has to tell."""
    try:
        if isinstance(thing, str | bytes):
            return None
        if isinstance(thing, FunctionType):
            cells = [cell.cell_contents for cell in thing.__closure__ or ()]
            return [thing.__code__, thing.__defaults__, thing.__kwdefaults__, *cells]
        if isinstance(thing, list | tuple):
            return list(thing)
        if isinstance(thing, dict):
            return [*thing.keys(), *thing.values()]
        if isinstance(thing, MethodType):
            return [thing.__func__, thing.__self__]
        made_from = thing.__reduce_ex__(2)
        return None if isinstance(made_from, str) else list(made_from)
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None
