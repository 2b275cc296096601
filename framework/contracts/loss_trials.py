"""Trial calls of a loss, which leave the user's objects and the random generators unchanged.

They find out properties that cannot be read from a loss: the cross entropy that a function calls,
whether it is a sum, whether it broadcasts outputs and targets.
"""

import copy
import dis
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from framework.errors import DataError
from framework.runtime.seeds import undisturbed
from framework.runtime.torch_internals.pytree import tree_leaves, tree_map

from .alignment import call_aligned, misaligned_outputs
from .loss_properties import CLASS_LOSSES, loss_modules

CONSTANT_TYPES = (
    bool,
    int,
    float,
    str,
    bytes,
    Tensor,
    torch.dtype,
    torch.device,
    ModuleType,
    type,
    BuiltinFunctionType,
)
TRUSTED_PACKAGES = ("torch", "framework", "framework_plugins")  # their functions are constant


def trial_copy(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a loss that can be called without side effects; None if that is not certain.

    A module, or another object, is copied. A function is returned as it is if everything that it
    refers to is constant: numbers, texts, tensors, losses of torch, other such functions.
    """
    if isinstance(loss, partial):
        inner = trial_copy(loss.func)
        if inner is None or not all_constant([*loss.args, *loss.keywords.values()], set()):
            return None
        return partial(inner, *loss.args, **loss.keywords)
    if inspect.isroutine(loss) and not isinstance(loss, MethodType):
        return loss if is_constant(loss, set()) else None
    try:
        return copy.deepcopy(loss)
    except Exception:  # an object may refuse it in any way
        return None


def is_constant(value: Any, seen: set[Any]) -> bool:
    """Return whether calling a function that refers to a value cannot change the value.

    Args:
        value: a value that the function refers to.
        seen: the functions that are checked already.
    """
    if value is None or isinstance(value, CONSTANT_TYPES):
        return True
    if isinstance(value, tuple):
        return all_constant(value, seen)
    if isinstance(value, partial):
        return all_constant([value.func, *value.args, *value.keywords.values()], seen)
    if isinstance(value, nn.Module):
        return type(value).__module__ == nn.CrossEntropyLoss.__module__  # the losses of torch
    if not inspect.isfunction(value):
        return False
    if value in seen or value.__module__.partition(".")[0] in TRUSTED_PACKAGES:
        return True
    seen.add(value)
    if vars(value) or writes_variables(value):
        return False
    captured = inspect.getclosurevars(value)
    referenced = [*captured.nonlocals.values(), *captured.globals.values()]
    return all_constant([*referenced, *(value.__defaults__ or ())], seen)


def all_constant(values: Any, seen: set[Any]) -> bool:
    """Return whether `is_constant` holds for each of some values."""
    return all(is_constant(value, seen) for value in values)


def writes_variables(function: Any) -> bool:
    """Return whether a function assigns to global variables, or to variables of its closure."""
    free = function.__code__.co_freevars
    for instruction in dis.get_instructions(function):
        if instruction.opname == "STORE_GLOBAL":
            return True
        if instruction.opname == "STORE_DEREF" and instruction.argval in free:
            return True
    return False


@contextmanager
def without_side_effects(loss: Callable[..., Any]) -> Iterator[None]:
    """Run a block without gradients, then restore the loss's buffers and all random generators."""
    buffers: list[Tensor] = []
    for module in loss_modules(loss):
        buffers += module.buffers()
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.no_grad(), undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would be about data that is not the user's
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in zip(buffers, before, strict=True):
                buffer.copy_(saved)


class FlexibleOutputs(Tensor):
    """Outputs with every attribute, as the output classes of some libraries need."""

    def __getattr__(self, name: str) -> Any:
        return self


class CrossEntropyRecorder(TorchFunctionMode):
    """Records the arguments of each cross entropy, and returns a fixed number as its value.

    An operation that fails because of the shape of the outputs returns the outputs.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.tensor(value)
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in CLASS_LOSSES:
            bound = inspect.signature(function).bind(*args, **kwargs)
            self.calls.append(bound.arguments)
            return self.value
        try:
            return function(*args, **kwargs)
        except Exception:
            outputs = [value for value in args if isinstance(value, FlexibleOutputs)]
            if not outputs:
                raise
            return outputs[0]


def cross_entropy_arguments(loss: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the arguments of the cross entropy whose mean a function returns, times a constant.

    The function is called with eight samples of four classes. The result is None if it calls
    several cross entropies or none, or one of other targets, adds another term, takes other
    outputs, or may have side effects.
    """
    trial = trial_copy(loss)
    if trial is None:
        return None
    targets = torch.tensor([0, 2, 1, 3, 3, 0, 2, 1])
    outputs = torch.linspace(-1, 1, 32).reshape(8, 4).as_subclass(FlexibleOutputs)
    values: list[float] = []
    calls: list[dict[str, Any]] = []
    for value in (1.0, 3.0):
        recorder = CrossEntropyRecorder(value)
        try:
            with without_side_effects(trial), recorder:
                values.append(float(trial(outputs, targets)))
        except Exception:  # a loss of other outputs may fail in any way
            return None
        if len(recorder.calls) != 1:
            return None
        calls = recorder.calls
    if not math.isclose(values[1], 3 * values[0], rel_tol=1e-6):
        return None  # it adds another term to the cross entropy
    call = calls[0]
    if call.get("size_average") is not None or call.get("reduce") is not None:
        return None
    if call.get("reduction", "mean") != "mean":
        return None
    return call if torch.equal(call["target"].flatten(), targets) else None


def check_alignment(name: str, loss: Callable[..., Any], outputs: Any, targets: Tensor) -> None:
    """Raise DataError if a loss broadcasts outputs and targets along the wrong axis.

    Args:
        name: the name of the loss, for the message.
        loss: a result of `trial_copy`.
        outputs: of the model; they are copied.
        targets: of the batch; they are copied.
    """
    if not misaligned_outputs(outputs, targets):
        return
    try:
        call_aligned(name, loss, tree_map(copied_tensors, outputs), targets.clone())
    except DataError:
        raise
    except Exception:  # ignored targets are -100 by now, which the loss may refuse
        return


def is_sum(loss: Callable[..., Any], outputs: Any, targets: Tensor) -> bool:
    """Return whether the loss of a batch is the sum of the losses of its parts.

    It reads the device. The arguments are those of `check_alignment`.
    """
    samples = len(targets)
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.ndim]
    if samples < 2 or any(len(leaf) != samples for leaf in leaves):
        return False
    few = min(samples, 4)
    losses = []
    try:
        for part in (slice(few), slice(few // 2), slice(few // 2, few)):
            chosen = tree_map(partial(copied_rows, rows=part), outputs)
            losses.append(float(loss(chosen, targets[part].clone())))
    except Exception:  # a loss may require a certain number of samples
        return False
    total, first, second = losses
    if not math.isfinite(total) or not math.isclose(total, first + second, rel_tol=1e-4):
        return False
    return not math.isclose(total, (first + second) / 2, rel_tol=1e-4)


def copied_rows(value: Any, rows: slice) -> Any:
    """Return a copy of some rows of a tensor; other values, and scalars, as they are."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return value[rows].detach().clone()
    return value


def copied_tensors(value: Any) -> Any:
    """Return a copy of a tensor without its autograd graph; other values as they are."""
    return value.detach().clone() if isinstance(value, Tensor) else value
