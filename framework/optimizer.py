"""The contract of an optimizer, and the choice of the fastest implementation that runs where the parameters are.

An optimizer is any `torch.optim.Optimizer` that takes `params`: tensors, (name, tensor) pairs, or groups (dicts).
The trainer multiplies each group's own "lr" by the schedule's factor, and calls `step()` without a closure.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from .registry import Maker

COMPILER = "torch._dynamo"


def build_optimizer(maker: Maker, params: Iterable[Any]) -> Optimizer:
    """Build the optimizer, fused where it can be; a `fused` or `foreach` among the maker's settings is left alone."""
    unmark_for_compiler()
    params, entry = list(params), maker.entry
    if not maker.settings.keys() & {"fused", "foreach"}:
        entry = replace(entry, part=partial(entry.part, **implementation(entry.part, params)))
    return Maker(entry, maker.settings)(params)


def implementation(part: Callable[..., Optimizer], params: Iterable[Any]) -> dict[str, bool]:
    """Return {"fused": True} when the part has a fused step that runs on every device and dtype of the parameters.

    Else {}, which leaves the choice to the part. torch's own take their multi-tensor (foreach) step on accelerators;
    on the CPU they do not, and rightly: there it took 0.4 to 2.8 times as long as the plain step, as the rule may be.
    """
    if "fused" not in inspect.signature(part).parameters:
        return {}
    places = {(tensor.device, tensor.dtype) for tensor in tensors(params)}
    return {"fused": True} if places and all(runs_fused(part, *place) for place in places) else {}


def runs_fused(part: Callable[..., Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused step works there. One is tried, on one number: which kernels exist differs between releases."""
    tried = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
    tried.grad = torch.zeros_like(tried)
    try:
        part([tried], fused=True).step()
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True


def match_layout(optimizer: Optimizer) -> None:
    """Lay the state out in memory as its parameters are, since checkpoints keep no strides and fused kernels go by
    memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def tensors(params: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters, whether they come bare, as (name, tensor) pairs or in groups."""
    for item in params:
        if isinstance(item, Mapping):
            yield from tensors(item["params"] if not isinstance(item["params"], Tensor) else [item["params"]])
        else:
            yield item[1] if isinstance(item, tuple) else item


def unmark_for_compiler() -> None:
    """Let a run that compiles nothing do without the import of torch's compiler, as long as that of torch itself.

    torch marks methods of optimizers (and of modes, such as those that count FLOPs) for the compiler, and each mark
    imports it when the method is called. While it is not imported, nothing is compiled and a mark says nothing to
    anybody; when it is, `Marks` has put them back. Where a release of torch marks otherwise, all stays as it is.
    """
    if COMPILER in sys.modules:
        return
    marked: dict[Any, Any] = {}
    for cls, name, method in methods():
        plain = unmarked(method)
        if plain is not None:
            marked[plain] = method
            setattr(cls, name, plain)
    if marked:
        sys.meta_path.insert(0, Marks(marked))


def methods() -> list[tuple[type, str, Any]]:
    classes: list[type[Any]] = [Optimizer, TorchDispatchMode]
    for cls in classes:  # the list grows as it is walked, until all below them are in it
        classes += cls.__subclasses__()
    return [(cls, name, method) for cls in classes for name, method in vars(cls).items() if inspect.isfunction(method)]


def unmarked(method: Any) -> Callable[..., Any] | None:
    """Return a method without its mark: what `torch._disable_dynamo` or `_use_grad_for_differentiable` was put on."""
    home, inner = getattr(method, "__globals__", {}).get("__name__"), getattr(method, "__wrapped__", None)
    if home == "torch._compile":
        return inner
    step = home == "torch.optim.optimizer" and method.__code__.co_name == "_use_grad"
    return differentiable(inner) if step and inner is not None else None


def differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `_use_grad_for_differentiable` does in a program that compiles nothing."""

    @wraps(step)
    def with_grad(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return with_grad


class Marks(MetaPathFinder):
    """Puts the marks back before the compiler is imported, by whomever; it finds no module itself."""

    def __init__(self, marked: dict[Any, Any]):
        self.marked = marked

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != COMPILER or not self.marked:
            return
        for cls, method_name, method in methods():
            if method in self.marked:
                setattr(cls, method_name, self.marked[method])
            elif getattr(method, "hooked", False) and method.__wrapped__ in self.marked:  # by `Optimizer.__init__`
                hooked: Any = Optimizer.profile_hook_step(self.marked[method.__wrapped__])
                hooked.hooked = True
                setattr(cls, method_name, hooked)
        self.marked = {}
