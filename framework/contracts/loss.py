"""Losses: what their mean is over, which targets they leave out, and what they can be called with.

A training step of several batches and an evaluation weight the mean loss of each batch by the number
of items that it is over. `Mean` finds out what the items are: for a loss of torch (a module or a
function), a `functools.partial` of one, a loss with a method `count`, and a loss with class weights
or ignored targets.
"""

import copy
import dis
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, MethodType, ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from framework.data.dataset import Data, TensorSplit, splits_of
from framework.errors import DataError, SettingError
from framework.runtime.seeds import undisturbed
from framework.runtime.torch_internals.pytree import tree_leaves, tree_map

from .alignment import call_aligned, class_shape, misaligned_outputs, probability_shape, same_shape

IGNORED = -100
"""The class index that metrics see in the place of a target that the loss ignores."""

Form = Literal["classes", "indices", "values", "label sets", "classes or labels", "any"]
Items = Literal["weights", "kept", "targets", "vectors", "rows", "own"]


@runtime_checkable
class DataDependentLoss(Protocol):
    """A loss with something that is measured on the training targets, such as class weights."""

    def learn(self, data: Data) -> None:
        """Measure it. A task calls this before the first step."""


MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.KLDivLoss: F.kl_div,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}
MEANS: dict[Any, tuple[Form, Items]] = {
    F.cross_entropy: ("classes", "weights"),
    F.nll_loss: ("classes", "weights"),
    F.binary_cross_entropy: ("values", "targets"),
    F.binary_cross_entropy_with_logits: ("values", "targets"),
    F.mse_loss: ("values", "targets"),
    F.l1_loss: ("values", "targets"),
    F.smooth_l1_loss: ("values", "targets"),
    F.huber_loss: ("values", "targets"),
    F.poisson_nll_loss: ("values", "targets"),
    F.soft_margin_loss: ("values", "targets"),
    F.hinge_embedding_loss: ("values", "targets"),
    F.kl_div: ("values", "targets"),
    F.multi_margin_loss: ("indices", "targets"),
    F.multilabel_margin_loss: ("label sets", "rows"),
    F.multilabel_soft_margin_loss: ("values", "vectors"),
}
CLASS_LOSSES = (F.cross_entropy, F.nll_loss)
ONE_DTYPE = (F.huber_loss, F.binary_cross_entropy)  # without type promotion in torch


@dataclass(frozen=True)
class Mean:
    """What a loss takes as targets, and what its mean is over.

    Attributes:
        form: of the targets. classes: indices or probabilities; indices: of classes; values: in the outputs' shape;
            label sets: indices in the outputs' shape; classes or labels: indices of classes, or floating
            labels in the outputs' shape; any: not known. A loss of one's own may have it as `target_form`.
        items: weights: the targets that are not ignored, by the weights of their classes; kept: those targets, each
            alike; targets: all numbers of the targets; vectors: their rows along the last axis; rows: the samples;
            own: the loss says so in its method `count`.
        ignored: the class index whose targets the loss ignores.
        one_dtype: outputs and targets must be of one floating type.
        zero_weights: some class has the weight 0, so that a batch may count for nothing.
        certain: the loss is computed by torch, so that it is no sum and broadcasts nothing.
        weight: of the classes, where a function calls a loss of torch with them.
    """

    form: Form
    items: Items
    ignored: int | None = None
    one_dtype: bool = False
    zero_weights: bool = False
    certain: bool = False
    weight: Tensor | None = None

    @classmethod
    def of(cls, loss: Callable[..., Any]) -> "Mean":
        """Find out what a loss's mean is over. It reads class weights from the device.

        Raises SettingError for a loss of torch that is not a mean.
        """
        function, written_anew = known_function(loss)
        form, items = MEANS.get(function, ("any", "targets"))
        if written_anew:  # it may take other outputs and targets than the class that it extends
            form = "any"
        form = getattr(loss, "target_form", form)
        ignored = ignored_index(loss)
        if own_count(loss) is not None:
            return cls(form, "own", ignored)
        if function is None and not isinstance(loss_function(loss), nn.Module):
            return cls.of_function(loss)
        certain = function is not None and not written_anew
        weight = class_weights(loss)
        if function is not None and certain:
            check_reduction(loss, function)
            if loss_setting(loss, "reduction", "mean") == "batchmean":
                items = "rows"
        elif isinstance(loss, nn.Module) and (weight is not None or ignored is not None):
            weights = function in CLASS_LOSSES or with_classes(loss) is not loss
            items = measure_items(loss, fallback="weights" if weights else "kept")
        elif isinstance(loss, nn.Module):
            return replace(cls.of_function(loss), form=form)
        if items == "weights" and weight is None:
            items = "kept"  # without a look for weights in each step
        zero = items == "weights" and has_zero(weight)
        return cls(form, items, ignored, function in ONE_DTYPE, zero, certain)

    @classmethod
    def of_function(cls, loss: Callable[..., Any]) -> "Mean":
        """Find out what the mean of a function is over, by the cross entropy that it calls."""
        call = recorded(loss)
        if call is None:
            return cls("any", "targets")
        weight = call.get("weight")
        ignored = call.get("ignore_index", IGNORED)
        return cls("any", "weights", ignored, zero_weights=has_zero(weight), weight=weight)

    def fit(self, loss: Callable[..., Any], outputs: Any, targets: Tensor) -> Tensor:
        """Return targets in the shape and type that the loss takes.

        Raises DataError when they do not fit the outputs.
        """
        if self.form == "any":
            return targets
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the loss {loss_name(loss)} takes one tensor, but the model returns "
                f"{describe_outputs(outputs)}: choose one with `task=lambda outputs, targets: ...`, or write a Task"
            )
        if self.form == "values":
            floating = targets.is_floating_point() or targets.is_complex()
            return same_shape(outputs, targets if floating else targets.float())
        if self.form == "label sets":
            return same_shape(outputs, targets).long()
        if self.form == "classes or labels" and targets.is_floating_point():
            return same_shape(outputs, targets)
        if self.form == "classes" and targets.is_floating_point():
            return probability_shape(outputs, targets)
        return class_shape(outputs, targets).long()

    def call(
        self, loss: Callable[..., Any], outputs: Any, targets: Tensor, all_kept: bool = False
    ) -> Any:
        """Return the mean loss, and 0 with gradients of 0 when no target counts.

        all_kept: it is known that no target is ignored.
        """
        if self.one_dtype and outputs.dtype != targets.dtype:
            outputs = outputs.to(torch.promote_types(outputs.dtype, targets.dtype))
        if targets.is_floating_point() or self.items not in ("weights", "kept"):
            return loss(outputs, targets)
        if self.zero_weights:
            some = torch.as_tensor(self.count(loss, targets, all_kept)) > 0
            if isinstance(outputs, Tensor):
                outputs = torch.where(some, outputs, 0.0)  # torch's gradient would be nan
            return zero_of_none(loss(outputs, targets), some)
        if all_kept or self.ignored is None:
            return loss(outputs, targets)
        return zero_of_none(loss(outputs, targets), torch.ne(targets, self.ignored).any())

    def count(self, loss: Any, targets: Tensor, all_kept: bool = False) -> int | Tensor:
        """Return the number of items of a batch: what the loss's mean divides by."""
        if self.items == "own":
            return loss.count(targets)
        if self.items == "rows":
            return len(targets)
        if self.items == "vectors":
            return targets.numel() // targets.shape[-1]
        if self.form == "classes" and targets.is_floating_point():
            return distributions(targets)
        if self.items == "targets" or targets.is_floating_point():
            return targets.numel()
        weight = None
        if self.weight is not None:
            weight = self.weight.to(targets.device)
        elif self.items == "weights":
            weight = class_weights(loss)
        return count_targets(targets, weight, None if all_kept else self.ignored)

    def shown(self, targets: Tensor, all_kept: bool = False) -> Tensor:
        """Return the targets that metrics see: likeliest classes, and -100 for ignored targets."""
        if self.form == "classes" and targets.is_floating_point():
            return targets.argmax(1)
        if all_kept or targets.is_floating_point():
            return targets
        return without_ignored(targets, self.ignored)

    def none_ignored(self, targets: Sequence[Tensor] | None) -> bool:
        """Whether it is known that no target is ignored. It reads the device.

        targets: all of them, or None if they are not known.
        """
        if targets is None or self.ignored is None:
            return False
        indices = [each for each in targets if not each.is_floating_point()]
        return not any(bool((each == self.ignored).any()) for each in indices)


def own_count(loss: Callable[..., Any]) -> Callable[[Tensor], Any] | None:
    """Return the `count` of a loss that says itself over how many items its mean is.

    It is a method of a module, or an attribute of a function. A module may have a number or a
    buffer of that name, which is something else.
    """
    count = getattr(loss, "count", None)
    return count if callable(count) else None


def check_range(where: str, targets: Tensor, classes: int, ignored: int | None) -> None:
    """Raise DataError for an index that is no class, which would end a process on a GPU."""
    counting = targets if ignored is None else targets[targets != ignored]
    if not len(counting):
        return
    low, high = counting.aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        allowed = f"with {classes} classes they go from 0 to {classes - 1}"
        raise DataError(f"{where} has a target {wrong}; {allowed}")


def check_classes(data: Data, ignored: int | None) -> None:
    """Raise DataError when a split in memory has a target that is no class."""
    for name, split in splits_of(data).items():
        if not isinstance(split, TensorSplit) or len(split.tensors) != 2:
            continue
        if not split.tensors[1].is_floating_point():
            where = f"the {name} split of {type(data).__name__}"
            check_range(where, split.tensors[1], data.out_shape[0], ignored)


def without_ignored(targets: Tensor, ignored: int | None) -> Tensor:
    """Return class indices with -100 in the place of the ignored one, which metrics leave out."""
    if ignored is None or ignored < 0:
        return targets
    return torch.where(targets == ignored, IGNORED, targets)


def count_targets(targets: Tensor, weight: Tensor | None, ignored: int | None) -> int | Tensor:
    """Return the number of targets that are not ignored, or the sum of their classes' weights."""
    weights = weights_of(targets, weight, ignored)
    return targets.numel() if weights is None else weights.sum()


def weights_of(targets: Tensor, weight: Tensor | None, ignored: int | None) -> Tensor | None:
    """Return by how much each class index counts; None where all count alike."""
    kept = None if ignored is None else targets != ignored
    if weight is None:
        return kept
    indices = targets.long()  # an index of type uint8 would be a mask
    if kept is None:
        return weight[indices]
    return weight[torch.where(kept, indices, 0)] * kept


def distributions(targets: Tensor) -> int:
    """Return the number of distributions in class probabilities (batch, classes, ...)."""
    if targets.ndim < 2:
        return targets.numel()  # they are refused when the outputs are known
    return targets.numel() // targets.shape[1]


def zero_of_none(loss: Tensor, some: Tensor) -> Tensor:
    """Return the loss where `some` (a boolean scalar) target counts, else 0."""
    return torch.where(some, loss, 0.0)


def share_of(count: int | Tensor, total: int | Tensor) -> float | Tensor:
    """Return the share of a batch in a step; 0 when no batch of the step has an item."""
    if isinstance(total, Tensor):
        return count / torch.where(total == 0, 1, total)
    return count / total if total else 0.0


def portion(loss: Tensor, share: float | Tensor) -> Tensor:
    """Return loss times share; 0 for a share of 0, also where the loss is nan."""
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0.0, loss * share)
    return loss * share if share else torch.zeros_like(loss)


def known_function(loss: Callable[..., Any]) -> tuple[Callable[..., Tensor] | None, bool]:
    """Return the function of `torch.nn.functional` that a loss is, and whether a subclass overrides it."""
    loss = loss_function(loss)
    if not isinstance(loss, nn.Module):
        return next((function for function in MEANS if function is loss), None), False
    for module, function in MODULES.items():
        if isinstance(loss, module):
            return function, type(loss).forward is not module.forward
    return None, False


def loss_function(loss: Callable[..., Any]) -> Any:
    """Return what a partial, or the method of a module, calls."""
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, MethodType) and isinstance(loss.__self__, nn.Module):
        return loss.__self__
    return loss


def loss_setting(loss: Callable[..., Any], name: str, default: Any) -> Any:
    """Return a setting of a loss: an argument of a partial, or an attribute of a module."""
    while isinstance(loss, partial):
        if name in loss.keywords:
            return loss.keywords[name]
        loss = loss.func
    return getattr(loss_function(loss), name, default)


def class_weights(loss: Callable[..., Any]) -> Tensor | None:
    """Return the weights of the classes, shape (classes,), of a loss that has such."""
    weight = loss_setting(with_classes(loss), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 1 else None


def ignored_index(loss: Callable[..., Any]) -> int | None:
    """Return the class index whose targets a loss ignores, if it has such."""
    loss = with_classes(loss)
    standard = IGNORED if known_function(loss)[0] in CLASS_LOSSES else None
    index = loss_setting(loss, "ignore_index", standard)
    return index if isinstance(index, int) else None


def with_classes(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the only cross entropy in a module without class weights and ignored index."""
    module = loss_function(loss)
    if not isinstance(module, nn.Module) or hasattr(module, "ignore_index"):
        return loss
    if isinstance(getattr(module, "weight", None), Tensor):
        return loss
    inner = [
        each for each in module.modules() if isinstance(each, nn.CrossEntropyLoss | nn.NLLLoss)
    ]
    return inner[0] if len(inner) == 1 else loss


def has_zero(weight: Tensor | None) -> bool:
    """Whether a class has the weight 0. It reads the device."""
    return weight is not None and not weight.is_meta and bool((weight == 0).any())


def check_reduction(loss: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Raise SettingError for a loss of torch that is not a mean."""
    reduction = loss_setting(loss, "reduction", "mean")
    older = [
        name for name in ("size_average", "reduce") if loss_setting(loss, name, None) is not None
    ]
    fitting = ("mean", "batchmean") if function is F.kl_div else ("mean",)
    if reduction not in fitting or older:
        got = older[0] if older else f"reduction={reduction!r}"
        expected = " or ".join(map(repr, fitting))
        raise SettingError(f"the loss {loss_name(loss)}: expected reduction={expected}, got {got}")


def check_call(loss: Callable[..., Any]) -> None:
    """Raise SettingError for a loss that cannot be called with outputs and targets alone."""
    called = loss
    if isinstance(loss, nn.Module) and type(loss).__call__ is nn.Module.__call__:
        called = loss.forward
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise SettingError(
            f"the loss {loss_name(loss)} cannot be called with (outputs, targets): {error}. Write a "
            "function of the two, or a Task"
        ) from error


def harmless(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a loss whose calls leave the user's objects as they are, or None where that is not known.

    A module, or another object, is copied. A function is taken as it is if all that it refers to is
    fixed: numbers, texts, tensors, losses of torch, other such functions.
    """
    if isinstance(loss, partial):
        inner = harmless(loss.func)
        fixed = all(is_fixed(value, set()) for value in (*loss.args, *loss.keywords.values()))
        return partial(inner, *loss.args, **loss.keywords) if inner is not None and fixed else None
    if inspect.isroutine(loss) and not isinstance(loss, MethodType):
        return loss if is_fixed(loss, set()) else None
    try:
        return copy.deepcopy(loss)
    except Exception:  # an object may refuse it in any way
        return None


def is_fixed(value: Any, seen: set[Any]) -> bool:
    """Whether a value that a function refers to stays as it is when the function is called."""
    if value is None or isinstance(value, FIXED_TYPES):
        return True
    if isinstance(value, tuple):
        return all(is_fixed(item, seen) for item in value)
    if isinstance(value, partial):
        return all(
            is_fixed(item, seen) for item in (value.func, *value.args, *value.keywords.values())
        )
    if isinstance(value, nn.Module):
        return type(value).__module__ == nn.CrossEntropyLoss.__module__  # the losses of torch
    if not inspect.isfunction(value) or value in seen:
        return value in seen if inspect.isfunction(value) else False
    if value.__module__.partition(".")[0] in ("torch", "framework", "framework_plugins"):
        return True
    seen.add(value)
    free = value.__code__.co_freevars
    for instruction in dis.get_instructions(value):
        writes_closure = instruction.opname == "STORE_DEREF" and instruction.argval in free
        if writes_closure or instruction.opname == "STORE_GLOBAL":
            return False
    captured = inspect.getclosurevars(value)
    referred = [
        *captured.nonlocals.values(),
        *captured.globals.values(),
        *(value.__defaults__ or ()),
    ]
    return not vars(value) and all(is_fixed(each, seen) for each in referred)


FIXED_TYPES = (
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


class AnyOutputs(Tensor):
    """Outputs of which any field can be taken, as of the output classes of some libraries."""

    def __getattr__(self, name: str) -> Any:
        return self


class Recorder(TorchFunctionMode):
    """Notes the arguments of each cross entropy that is called, and gives a number for it.

    An operation that fails, since the outputs do not have the shape that it expects, returns them.
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
            outputs = [value for value in args if isinstance(value, AnyOutputs)]
            if not outputs:
                raise
            return outputs[0]


def recorded(loss: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the arguments of the one cross entropy of its targets whose mean a function takes.

    The function is called with eight samples of four classes. None where it calls several, or one of
    other targets, adds something to it, takes other outputs, or may change something when it is called.
    """
    tried = harmless(loss)
    if tried is None:
        return None
    targets = torch.tensor([0, 2, 1, 3, 3, 0, 2, 1])
    outputs = torch.linspace(-1, 1, 32).reshape(8, 4).as_subclass(AnyOutputs)
    values: list[float] = []
    calls: list[dict[str, Any]] = []
    for value in (1.0, 3.0):
        recorder = Recorder(value)
        try:
            with unchanged(tried), recorder:
                values.append(float(tried(outputs, targets)))
        except Exception:  # a loss of other outputs may fail in any way
            return None
        if len(recorder.calls) != 1:
            return None
        calls = recorder.calls
    if not math.isclose(values[1], 3 * values[0], rel_tol=1e-6):
        return None  # it adds something else to the cross entropy
    call = calls[0]
    older = call.get("size_average") is not None or call.get("reduce") is not None
    mean = call.get("reduction", "mean") == "mean" and not older
    return call if mean and torch.equal(call["target"].flatten(), targets) else None


def measure_items(loss: nn.Module, fallback: Items) -> Items:
    """Return what the mean of a loss with class weights or ignored targets is over, by calling it.

    Of eight targets, its mean must be that of the two halves, weighted by their counts. The halves
    differ in weights and in ignored targets. A loss that cannot be called so gets the fallback.
    """
    weight = class_weights(loss)
    ignored = ignored_index(loss)
    classes = 4 if weight is None else len(weight)
    if weight is None and ignored is not None and 4 <= ignored < 1000:
        classes = ignored + 1
    if classes == 0:
        return fallback
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(8, classes, generator=generator)
    if weight is not None:
        outputs = outputs.to(weight)
    targets = torch.arange(8) % classes
    if ignored is not None:
        targets = torch.where(targets == ignored, (ignored + 1) % classes, targets)
        targets[1:3] = ignored
    targets = targets.to(outputs.device)
    tried = harmless(loss)
    if tried is None:
        return fallback
    try:
        with unchanged(tried):
            whole = float(tried(outputs, targets))
            first = float(tried(outputs[:4], targets[:4]))
            second = float(tried(outputs[4:], targets[4:]))
    except Exception:  # a loss of other outputs may fail in any way
        return fallback
    candidates: tuple[Items, ...] = ("weights", "kept", "targets")
    for items in candidates:
        mean = Mean("classes", items, ignored)
        here = float(mean.count(loss, targets[:4]))
        there = float(mean.count(loss, targets[4:]))
        parts = [count * value for count, value in ((here, first), (there, second)) if count]
        expected = sum(parts) / max(here + there, 1e-12)
        if math.isclose(whole, expected, rel_tol=1e-4):
            return items
    warnings.warn(
        f"the loss {loss_name(loss)}: its mean is neither over the targets that it does not ignore nor over their "
        "weights. Batches of a step and of an evaluation are weighted by their targets: give the loss a method "
        "`count(targets)` if that is wrong",
        stacklevel=2,
    )
    return "targets"


def check_first(loss: Callable[..., Any], outputs: Any, targets: Tensor) -> None:
    """Raise DataError when a loss that torch does not know broadcasts its arguments, or is a sum.

    It calls a copy of the loss with copies, and restores all random generators. A function that may
    change something when it is called is not called.
    """
    name = f"the loss {loss_name(loss)}"
    tried = harmless(loss)
    if tried is None:
        return
    with unchanged(tried):
        check_alignment(name, tried, outputs, targets)
        summed = own_count(loss) is None and is_sum(tried, outputs, targets)
    if summed:
        raise DataError(f"{name} is a sum over the samples of a batch: expected their mean")


def check_alignment(name: str, loss: Callable[..., Any], outputs: Any, targets: Tensor) -> None:
    """Raise DataError when a loss broadcasts outputs and targets along the wrong axis."""
    if not misaligned_outputs(outputs, targets):
        return
    try:
        call_aligned(name, loss, tree_map(copied_tensors, outputs), targets.clone())
    except DataError:
        raise
    except Exception:  # ignored targets are -100 by now, which the loss may refuse
        return


@contextmanager
def unchanged(loss: Callable[..., Any]) -> Iterator[None]:
    """Call a loss without gradients, and restore its buffers and all random generators."""
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
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)


def is_sum(loss: Callable[..., Any], outputs: Any, targets: Tensor) -> bool:
    """Whether the loss of a batch is the sum of the losses of its parts. It reads the device."""
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
    except Exception:  # a loss may ask for a certain number of samples
        return False
    whole, first, second = losses
    added = math.isclose(whole, first + second, rel_tol=1e-4)
    return (
        math.isfinite(whole)
        and added
        and not math.isclose(whole, (first + second) / 2, rel_tol=1e-4)
    )


def is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def copied_rows(value: Any, rows: slice) -> Any:
    return value[rows].detach().clone() if is_batch(value) else value


def copied_tensors(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def check_scalar(loss: Callable[..., Any] | str, value: Any) -> None:
    """Raise DataError when the value of a loss is not one real number.

    Args:
        loss: the loss, or what to call it in the message.
        value: what it returned.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return
    name = loss if isinstance(loss, str) else f"the loss {loss_name(loss)}"
    if not isinstance(value, Tensor):
        raise DataError(f"{name}: expected a tensor with one number, got {describe_outputs(value)}")
    kind = str(value.dtype).removeprefix("torch.")
    expected = "expected one real number, the mean over the batch"
    raise DataError(f"{name}: {expected}, got {kind} of shape {tuple(value.shape)}")


def loss_modules(loss: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules of a loss: itself, the arguments of a partial, the owner of a method."""
    held: list[Any] = []
    while isinstance(loss, partial):
        held += [*loss.args, *loss.keywords.values()]
        loss = loss.func
    held.append(loss_function(loss))
    return [value for value in held if isinstance(value, nn.Module)]


def loss_name(loss: Callable[..., Any]) -> str:
    inner = loss_function(loss)
    return str(getattr(inner, "__name__", type(inner).__name__))


def describe_outputs(value: Any) -> str:
    """Write what a value is: "a dict (logits, loss)", "a tuple of 2", "a float"."""
    name = type(value).__name__
    if isinstance(value, dict):
        return f"a {name} ({', '.join(map(str, value))})"
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)}"
    return "None" if value is None else f"a {name}"
