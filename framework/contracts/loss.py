"""The contract of a loss: a mean over the items of a batch.

A loss is a function or module of (outputs, targets) that returns their mean, a scalar. Steps of
several batches, and evaluations, weight the mean of each batch by its number of items. `Mean` finds
the items of a loss of torch (a module or a function), a `functools.partial` of one, a loss with a
method `count`, and a loss with class weights or ignored targets.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework.data.dataset import Batch, Data, TensorSplit, splits_of
from framework.errors import DataError, SettingError

from .alignment import class_shape, probability_shape, same_shape
from .loss_properties import (
    CLASS_LOSSES,
    IGNORED as IGNORED,
    class_loss,
    class_weights as class_weights,
    describe_outputs,
    ignored_index as ignored_index,
    known_function,
    loss_function,
    loss_name,
    loss_setting,
    own_count,
)
from .loss_trials import (
    check_alignment,
    cross_entropy_arguments,
    is_sum,
    trial_copy,
    without_side_effects,
)

Form = Literal["classes", "indices", "values", "label sets", "classes or labels", "any"]
Items = Literal["weights", "kept", "targets", "vectors", "rows", "own"]


@runtime_checkable
class DataDependentLoss(Protocol):
    """A loss that depends on the training targets, for example through balanced class weights."""

    def learn(self, data: Data) -> None:
        """Compute from the training split what the loss needs. A task calls it before training."""


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
ONE_DTYPE = (F.huber_loss, F.binary_cross_entropy)  # without type promotion in torch


@dataclass(frozen=True)
class Mean:
    """The targets that a loss takes, and the items that its mean is over.

    Attributes:
        form: of the targets. classes: class indices or probabilities; indices: class indices;
            values: numbers in the shape of the outputs; label sets: indices in the shape of the
            outputs; classes or labels: class indices, or floats in the shape of the outputs; any:
            not known. A loss may define it as its attribute `target_form`.
        items: weights: the targets that are not ignored, weighted by their classes; kept: these
            targets, unweighted; targets: all numbers of the targets; vectors: the rows of the
            targets along the last axis; rows: the samples; own: the loss has a method `count`.
        ignored: the class index of targets that the loss ignores, or None.
        one_dtype: outputs and targets must have the same floating dtype.
        zero_weights: a class has the weight 0, so that all targets of a batch may count nothing.
        certain: the loss is computed by torch, so that it is a mean and broadcasts nothing.
        weight: the class weights that a function passes to a loss of torch, shape (classes,).
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
        """Return the mean of a loss. It may call a copy of the loss, and read class weights.

        Raises:
            SettingError: a loss of torch does not return a mean.
        """
        function, overridden = known_function(loss)
        form, items = MEANS.get(function, ("any", "targets"))
        if overridden:  # it may take other outputs and targets than its base class
            form = "any"
        form = getattr(loss, "target_form", form)
        ignored = ignored_index(loss)
        if own_count(loss) is not None:
            return cls(form, "own", ignored)
        if function is None and not isinstance(loss_function(loss), nn.Module):
            return cls.of_function(loss)
        weight = class_weights(loss)
        certain = False
        if function is not None and not overridden:
            certain = True
            check_reduction(loss, function)
            if loss_setting(loss, "reduction", "mean") == "batchmean":
                items = "rows"
        elif isinstance(loss, nn.Module):
            if weight is None and ignored is None:
                return replace(cls.of_function(loss), form=form)
            is_class_loss = function in CLASS_LOSSES or class_loss(loss) is not loss
            items = measure_items(loss, fallback="weights" if is_class_loss else "kept")
        if items == "weights" and weight is None:
            items = "kept"  # so that steps do not look for weights
        zero = items == "weights" and has_zero(weight)
        return cls(form, items, ignored, function in ONE_DTYPE, zero, certain)

    @classmethod
    def of_function(cls, loss: Callable[..., Any]) -> "Mean":
        """Return the mean of a function, which is that of the cross entropy that it calls."""
        arguments = cross_entropy_arguments(loss)
        if arguments is None:
            return cls("any", "targets")
        weight = arguments.get("weight")
        ignored = arguments.get("ignore_index", IGNORED)
        return cls("any", "weights", ignored, zero_weights=has_zero(weight), weight=weight)

    def fit(self, loss: Callable[..., Any], outputs: Any, targets: Tensor) -> Tensor:
        """Return targets in the shape and dtype that the loss takes.

        Args:
            loss: the loss, for messages.
            outputs: of the model, shape (batch, ...).
            targets: of the batch.

        Raises:
            DataError: the targets do not fit the outputs.
        """
        if self.form == "any":
            return targets
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the loss {loss_name(loss)} takes one tensor, but the model returns "
                f"{describe_outputs(outputs)}: choose one with `task=lambda outputs, targets: "
                "...`, or write a Task"
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
        """Return the mean loss; 0 with gradients of 0 if no target counts.

        Args:
            loss: the loss of this mean.
            outputs: of the model.
            targets: a result of `fit`.
            all_kept: whether it is known that no target is ignored.
        """
        if self.one_dtype and outputs.dtype != targets.dtype:
            outputs = outputs.to(torch.promote_types(outputs.dtype, targets.dtype))
        if targets.is_floating_point() or self.items not in ("weights", "kept"):
            return loss(outputs, targets)
        if self.zero_weights:
            counts_any = torch.as_tensor(self.count(loss, targets, all_kept)) > 0
            if isinstance(outputs, Tensor):
                outputs = torch.where(counts_any, outputs, 0.0)  # torch's gradient would be nan
            return zero_of_none(loss(outputs, targets), counts_any)
        if all_kept or self.ignored is None:
            return loss(outputs, targets)
        return zero_of_none(loss(outputs, targets), torch.ne(targets, self.ignored).any())

    def count(self, loss: Any, targets: Tensor, all_kept: bool = False) -> int | Tensor:
        """Return the number of items of a batch, which the mean divides by.

        Args:
            loss: the loss of this mean, which may count the items itself.
            targets: of the batch.
            all_kept: whether it is known that no target is ignored.
        """
        if self.items == "own":
            items: int | Tensor = loss.count(targets)
            return items
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
        """Return the targets for metrics: the likeliest classes, and -100 for ignored targets."""
        if self.form == "classes" and targets.is_floating_point():
            return targets.argmax(1)
        if all_kept or targets.is_floating_point():
            return targets
        return without_ignored(targets, self.ignored)

    def none_ignored(self, targets: Sequence[Tensor] | None) -> bool:
        """Return whether it is known that no target is ignored. It reads the device.

        Args:
            targets: all targets, or None if they are not in memory.
        """
        if targets is None or self.ignored is None:
            return False
        indices = [each for each in targets if not each.is_floating_point()]
        return not any(bool((each == self.ignored).any()) for each in indices)


def check_call(loss: Callable[..., Any]) -> None:
    """Raise SettingError for a loss that cannot be called with outputs and targets only."""
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
            f"the loss {loss_name(loss)} cannot be called with (outputs, targets): {error}. Write "
            "a function of these two, or a Task"
        ) from error


def check_reduction(loss: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Raise SettingError for a loss of torch that does not return a mean."""
    fitting = ("mean", "batchmean") if function is F.kl_div else ("mean",)
    reduction = loss_setting(loss, "reduction", "mean")
    got = None if reduction in fitting else f"reduction={reduction!r}"
    for older in ("reduce", "size_average"):
        if loss_setting(loss, older, None) is not None:
            got = older
    if got is not None:
        expected = " or ".join(map(repr, fitting))
        raise SettingError(f"the loss {loss_name(loss)}: expected reduction={expected}, got {got}")


def check_classes(
    data: Data, ignored: int | None, targets_of: Callable[[Batch], Tensor | None]
) -> None:
    """Raise DataError if a split in memory has a target that is not a class index.

    Args:
        data: the data set.
        ignored: the class index that the loss ignores, or None.
        targets_of: returns the targets of all samples of a split, None if they are not known.
    """
    for name, split in splits_of(data).items():
        if not isinstance(split, TensorSplit):
            continue
        targets = targets_of(split.as_batch(split.tensors))
        if targets is not None and not targets.is_floating_point():
            place = f"the {name} split of {type(data).__name__}"
            check_range(place, targets, data.out_shape[0], ignored)


def check_range(place: str, targets: Tensor, classes: int, ignored: int | None) -> None:
    """Raise DataError for a target that is not a class index; on a GPU it would end the process."""
    counting = targets if ignored is None else targets[targets != ignored]
    if not len(counting):
        return
    low, high = counting.aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        raise DataError(
            f"{place} has a target {wrong}: expected class indices from 0 to {classes - 1}"
        )


def check_first(loss: Callable[..., Any], outputs: Any, targets: Tensor) -> None:
    """Raise DataError if a loss broadcasts its arguments, or returns a sum.

    It calls a copy of the loss with copies of its arguments, and restores all random generators. A
    loss that may have side effects is not called.
    """
    name = f"the loss {loss_name(loss)}"
    trial = trial_copy(loss)
    if trial is None:
        return
    with without_side_effects(trial):
        check_alignment(name, trial, outputs, targets)
        summed = own_count(loss) is None and is_sum(trial, outputs, targets)
    if summed:
        raise DataError(f"{name} is a sum over the samples of a batch: expected their mean")


def check_scalar(loss: Callable[..., Any] | str, value: Any) -> None:
    """Raise DataError if the value of a loss is not one real number.

    Args:
        loss: the loss, or its name for the message.
        value: the value that it returned.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return
    name = loss if isinstance(loss, str) else f"the loss {loss_name(loss)}"
    if not isinstance(value, Tensor):
        raise DataError(f"{name}: expected a tensor with one number, got {describe_outputs(value)}")
    dtype = str(value.dtype).removeprefix("torch.")
    raise DataError(
        f"{name}: expected one real number, the mean over the batch, "
        f"got {dtype} of shape {tuple(value.shape)}"
    )


def measure_items(loss: nn.Module, fallback: Items) -> Items:
    """Return the items of the mean of a loss with class weights or ignored targets.

    A copy of the loss is called with eight targets and with both halves of them, which differ in
    weights and in ignored targets. The mean of all must be that of the halves, weighted by their
    counts. A loss that cannot be called like this gets the fallback.
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
    trial = trial_copy(loss)
    if trial is None:
        return fallback
    try:
        with without_side_effects(trial):
            of_all = float(trial(outputs, targets))
            of_first = float(trial(outputs[:4], targets[:4]))
            of_second = float(trial(outputs[4:], targets[4:]))
    except Exception:  # a loss of other outputs may fail in any way
        return fallback
    candidates: tuple[Items, ...] = ("weights", "kept", "targets")
    for items in candidates:
        mean = Mean("classes", items, ignored)
        first_count = float(mean.count(loss, targets[:4]))
        second_count = float(mean.count(loss, targets[4:]))
        total = 0.0
        if first_count:
            total += first_count * of_first
        if second_count:
            total += second_count * of_second
        expected = total / max(first_count + second_count, 1e-12)
        if math.isclose(of_all, expected, rel_tol=1e-4):
            return items
    warnings.warn(
        f"the loss {loss_name(loss)}: it is not a mean over all targets, the targets that are not "
        "ignored, or the class weights. Batches are weighted by their number of targets; if that "
        "is wrong, give the loss a method `count(targets)`",
        stacklevel=2,
    )
    return "targets"


def has_zero(weight: Tensor | None) -> bool:
    """Return whether a class has the weight 0. It reads the device."""
    return weight is not None and not weight.is_meta and bool((weight == 0).any())


def without_ignored(targets: Tensor, ignored: int | None) -> Tensor:
    """Return class indices with -100, which metrics leave out, instead of the ignored index."""
    if ignored is None or ignored < 0:
        return targets
    return torch.where(targets == ignored, IGNORED, targets)


def count_targets(targets: Tensor, weight: Tensor | None, ignored: int | None) -> int | Tensor:
    """Return the number of targets that are not ignored, or the sum of their class weights.

    Args:
        targets: class indices, any shape.
        weight: the class weights, shape (classes,), or None.
        ignored: the ignored class index, or None.
    """
    weights = weights_of(targets, weight, ignored)
    if weights is None:
        return targets.numel()
    return weights.sum()


def weights_of(targets: Tensor, weight: Tensor | None, ignored: int | None) -> Tensor | None:
    """Return the weight of each target, in the shape of the targets; None if all are 1.

    The arguments are those of `count_targets`.
    """
    kept = None if ignored is None else targets != ignored
    if weight is None:
        return kept
    indices = targets.long()  # an index of type uint8 would be a mask
    if kept is None:
        return weight[indices]
    return weight[torch.where(kept, indices, 0)] * kept


def distributions(targets: Tensor) -> int:
    """Return the number of distributions in class probabilities of shape (batch, classes, ...)."""
    if targets.ndim < 2:
        return targets.numel()  # `fit` rejects them
    return targets.numel() // targets.shape[1]


def zero_of_none(loss: Tensor, some: Tensor) -> Tensor:
    """Return the loss, or 0 if no target counts.

    Args:
        loss: shape ().
        some: whether some targets count, shape (), bool.
    """
    return torch.where(some, loss, 0.0)


def share_of(count: int | Tensor, total: float | Tensor) -> float | Tensor:
    """Return the share of a batch in the items of a step; 0 if the step has none."""
    if isinstance(total, Tensor):
        return count / torch.where(total == 0, 1, total)
    return count / total if total else 0.0


def portion(loss: Tensor, share: float | Tensor) -> Tensor:
    """Return loss times share; 0 for a share of 0, also if the loss is nan."""
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0.0, loss * share)
    return loss * share if share else torch.zeros_like(loss)


def without_graph(value: Any) -> Any:
    """Return a tensor without its autograd graph; other values as they are."""
    return value.detach() if isinstance(value, Tensor) else value
