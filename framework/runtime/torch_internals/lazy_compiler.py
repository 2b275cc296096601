"""Training without the import of torch's compiler.

torch decorates methods of its optimizers (and of dispatch modes, such as its counter of FLOPs) so
that the compiler does not compile them. Each decorator imports the compiler when the method is
called. Before the import nothing is compiled and the decorators have no effect, so `defer_compiler`
removes them. An import hook puts them back before any code imports the compiler.

Gain: 2.0 of 5.8 s of processor time from the start of `framework train` to the end of its first
step with torch 2.13 (medians of 9 runs), 2.4 of 6.8 s with torch 2.15 (of 3).

The environment variable FRAMEWORK_LAZY_COMPILER=off leaves torch unchanged. In a release of torch
with other decorators, `defer_compiler` has no effect.
"""

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

COMPILER = "torch._dynamo"
SWITCH = "FRAMEWORK_LAZY_COMPILER"


def defer_compiler() -> None:
    """Keep the first call of an optimizer from importing torch's compiler."""
    if COMPILER in sys.modules or os.environ.get(SWITCH) == "off":
        return
    decorated: dict[Any, Any] = {}
    for cls, name, method in methods():
        plain = undecorated(method)
        if plain is not None:
            decorated[plain] = method
            setattr(cls, name, plain)
    if decorated:
        sys.meta_path.insert(0, CompilerImportHook(decorated))


def methods() -> list[tuple[type, str, Any]]:
    """Return (class, name, method) of all optimizers and dispatch modes."""
    classes: list[type[Any]] = [Optimizer, TorchDispatchMode]
    for cls in classes:  # the list grows during the loop, until it has all subclasses
        classes += cls.__subclasses__()
    found = []
    for cls in classes:
        for name, method in vars(cls).items():
            if inspect.isfunction(method):
                found.append((cls, name, method))
    return found


def undecorated(method: Any) -> Callable[..., Any] | None:
    """Return a method without the decorator that imports the compiler; None if it has none."""
    module = getattr(method, "__globals__", {}).get("__name__")
    inner = getattr(method, "__wrapped__", None)
    if module == "torch._compile":  # `torch._disable_dynamo`
        return inner
    is_step = module == "torch.optim.optimizer" and method.__code__.co_name == "_use_grad"
    if is_step and inner is not None:
        return with_grad_if_differentiable(inner)
    return None


def with_grad_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a step as torch's `_use_grad_for_differentiable` does while nothing is compiled."""

    @wraps(step)
    def with_grad(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return with_grad


class CompilerImportHook(MetaPathFinder):
    """Puts the decorators back before the compiler is imported; finds no module itself.

    Args:
        decorated: the decorated method for each plain one.
    """

    def __init__(self, decorated: dict[Any, Any]):
        self.decorated = decorated

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != COMPILER or not self.decorated:
            return
        for cls, method_name, method in methods():
            if method in self.decorated:
                setattr(cls, method_name, self.decorated[method])
            elif getattr(method, "hooked", False) and method.__wrapped__ in self.decorated:
                # `Optimizer.__init__` has wrapped the undecorated method to call hooks.
                hooked: Any = Optimizer.profile_hook_step(self.decorated[method.__wrapped__])
                hooked.hooked = True
                setattr(cls, method_name, hooked)
        self.decorated = {}
