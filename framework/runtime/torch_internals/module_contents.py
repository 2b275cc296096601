"""The direct contents of a module: parameters, buffers, submodules and hooks."""

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HAS_DICTIONARIES = {"_parameters", "_buffers", "_modules", *HOOKS} <= vars(nn.Module()).keys()


class PublicContents(MutableMapping[str, Any]):
    """Direct contents of a module by name, read through public methods at each access."""

    def __init__(self, module: nn.Module, read: Callable[[], Iterator[tuple[str, Any]]]):
        self.module = module
        self.read = read

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.module, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __contains__(self, name: object) -> bool:
        return name in dict(self.read())

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self[name], nn.Parameter) and not isinstance(value, nn.Parameter):
            delattr(self.module, name)  # a module rejects a plain tensor for a parameter
        setattr(self.module, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.read()))

    def __len__(self) -> int:
        return len(dict(self.read()))


def direct_parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """Return the direct parameters of a module by name; changes of the mapping change the module.

    Gain: comparing the parameters of a model takes a fifth of the time of
    `model.named_parameters()`; callbacks that follow the weights compare them in each step. And a
    plain tensor can replace a parameter, as vmap needs.
    """
    if HAS_DICTIONARIES:
        return module._parameters
    read = partial(module.named_parameters, recurse=False, remove_duplicate=False)
    return PublicContents(module, read)


def direct_buffers(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """Return the direct buffers of a module by name (see `direct_parameters`)."""
    if HAS_DICTIONARIES:
        return module._buffers
    read = partial(module.named_buffers, recurse=False, remove_duplicate=False)
    return PublicContents(module, read)


def direct_submodules(module: nn.Module) -> MutableMapping[str, nn.Module | None]:
    """Return the direct submodules of a module by name (see `direct_parameters`)."""
    if HAS_DICTIONARIES:
        return module._modules
    return PublicContents(module, module.named_children)


def module_hooks(module: nn.Module) -> dict[str, list[Any]]:
    """Return the hooks of forward and backward passes, by kind.

    Gain: torch has no public list of hooks; trials whose modules have different hooks are not
    trained together. In a release of torch with other names it finds no hooks, and the comparison
    of stacked and single losses has to find the difference.
    """
    if not HAS_DICTIONARIES:
        return {}
    return {name: list(vars(module)[name].values()) for name in HOOKS}


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return whether a parameter has hooks for its gradient.

    Gain: the public API does not list them. In a release of torch with other names it finds none.
    """
    hooks = getattr(parameter, "_backward_hooks", None)
    hooks_after = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks or hooks_after)
