"""What a module holds itself, without its submodules: parameters, buffers, submodules, hooks."""

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HAS_DICTIONARIES = {"_parameters", "_buffers", "_modules", *HOOKS} <= vars(nn.Module()).keys()


class PublicContents(MutableMapping[str, Any]):
    """Items of a module by name, read anew each time through its public methods."""

    def __init__(self, module: nn.Module, read: Callable[[], Iterator[tuple[str, Any]]]):
        self.module, self.read = module, read

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.module, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __contains__(self, name: object) -> bool:
        return name in dict(self.read())

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self[name], nn.Parameter) and not isinstance(value, nn.Parameter):
            delattr(self.module, name)  # a module accepts no plain tensor for a parameter
        setattr(self.module, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.read()))

    def __len__(self) -> int:
        return len(dict(self.read()))


def parameters_of(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """Return the module's own parameters by name; the mapping follows the module.

    Gain: to compare all of a model takes a fifth of the time of `model.named_parameters()`, which
    callbacks that follow the weights would need in each step. A plain tensor can also stand in for
    a parameter, as vmap needs.
    """
    if HAS_DICTIONARIES:
        return module._parameters
    read = partial(module.named_parameters, recurse=False, remove_duplicate=False)
    return PublicContents(module, read)


def buffers_of(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """Return the module's own buffers by name (see `parameters_of`)."""
    if HAS_DICTIONARIES:
        return module._buffers
    read = partial(module.named_buffers, recurse=False, remove_duplicate=False)
    return PublicContents(module, read)


def submodules_of(module: nn.Module) -> MutableMapping[str, nn.Module | None]:
    """Return the module's direct submodules by name (see `parameters_of`)."""
    if HAS_DICTIONARIES:
        return module._modules
    return PublicContents(module, module.named_children)


def hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    """Return the hooks of forward and backward, by kind.

    Gain: trials whose modules have different hooks are not trained together. torch has no public
    list of hooks; where their names have changed none are found, and the comparison of stacked and
    single losses has to tell.
    """
    if not HAS_DICTIONARIES:
        return {}
    return {name: list(vars(module)[name].values()) for name in HOOKS}


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return whether a hook is called for the gradient of a parameter.

    Gain: there is no public way to ask. Where torch has renamed the attributes, none are found.
    """
    hooks = getattr(parameter, "_backward_hooks", None)
    hooks_after = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks or hooks_after)
