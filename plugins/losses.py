"""Losses: loss(outputs, targets) -> mean, a scalar. Outputs are logits of classes or labels, or values.

Targets are class indices (batch,), labels of 0 and 1 (batch, labels) or values (batch, values). torch's own come by
table; a loss of your own is an `nn.Module` with a decorator. A loss whose mean is over anything but all
numbers of the targets, or those that it does not ignore, has a method `count(targets)`: otherwise unequal
batches are weighted wrongly.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from framework import (
    Data,
    DataError,
    Fraction,
    LabelledSplit,
    NonNegativeFloat,
    PositiveFloat,
    RaggedSplit,
    Range,
    TensorSplit,
    losses,
)
from framework.contracts.loss import count_targets, distributions, zero_of_none

REDUCTION = ("reduction", "size_average", "reduce")  # a loss is a mean: the trainer relies on it
NEVER = -(2**63)  # the index that no target has
Weight = list[float] | Literal["balanced"] | None

losses.register("mse", nn.MSELoss, aliases=["l2"], hide=REDUCTION)
losses.register("l1", nn.L1Loss, aliases=["mae"], hide=REDUCTION)
losses.register("smooth_l1", nn.SmoothL1Loss, hide=REDUCTION, types={"beta": NonNegativeFloat})
losses.register("huber", nn.HuberLoss, hide=REDUCTION, types={"delta": PositiveFloat})
losses.register("poisson_nll", nn.PoissonNLLLoss, hide=REDUCTION, types={"eps": PositiveFloat})
losses.register(
    "multi_margin", nn.MultiMarginLoss, hide=(*REDUCTION, "weight"), types={"p": Literal[1, 2]}
)
losses.register("multilabel_soft_margin", nn.MultiLabelSoftMarginLoss, hide=(*REDUCTION, "weight"))


def at_least_single(outputs: Tensor) -> Tensor:
    """Return half-precision outputs as float32, and others as they are."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def tensor_or_none(numbers: list[float] | None) -> Tensor | None:
    return None if numbers is None else torch.tensor(numbers)


class ByClass:
    """Of losses with a factor a class: those that were given, or such that all classes weigh the same in training."""

    target_form = "classes"
    weight: Tensor | None
    ignore_index: int | None

    def set(self, weight: Weight, ignore_index: int | None) -> None:
        self.ignore_index, self.balanced = ignore_index, weight == "balanced"
        self.zero_weights = isinstance(weight, list) and 0 in weight
        if weight == "balanced":
            self.weight = torch.empty(0)  # a buffer, which goes to the device with the others
        elif weight is not None:
            self.weight = torch.tensor(weight)

    def count(self, targets: Tensor) -> int | Tensor:
        """Return the number of targets that are not ignored, or the sum of their weights."""
        if targets.is_floating_point():
            return distributions(targets)
        return count_targets(targets, self.factors(), self.ignore_index)

    def mean(
        self, loss: Callable[..., Tensor], outputs: Tensor, targets: Tensor, **settings: float
    ) -> Tensor:
        """Return the mean of a loss of torch, or 0 when no target counts."""
        ignored = NEVER if self.ignore_index is None else self.ignore_index
        none_counts = self.zero_weights and not targets.is_floating_point()
        if none_counts:
            some = torch.as_tensor(self.count(targets)) > 0
            outputs = torch.where(some, outputs, 0.0)  # torch's gradient would be nan
        mean = loss(outputs, targets, self.factors(), ignore_index=ignored, **settings)
        if none_counts:
            return zero_of_none(mean, some)
        return mean if self.ignore_index is None else zero_of_none(mean, (targets != ignored).any())

    def learn(self, data: Data) -> None:
        """Take from the training targets what `balanced` needs; a task that is given data calls this first."""
        if self.balanced and self.weight is not None:
            self.weight = balanced(targets_of(data), data.out_shape[0], self.ignore_index).to(
                self.weight
            )

    def factors(self) -> Tensor | None:
        """Return the factor of each class. Raises DataError when they were to be learnt, and were not."""
        if self.balanced and self.weight is not None and not len(self.weight):
            raise DataError(
                "loss.weight=balanced: this task shows the loss no data; give one number a class instead"
            )
        return self.weight


def balanced(targets: Tensor, classes: int, ignored: int | None = None) -> Tensor:
    """Return n / (K n_k) for each of the K classes, n_k of the n targets being of class k (King and Zeng 2001).

    A class that has no target counts as if it had one: in a fold, it may have some elsewhere.
    """
    known = targets.flatten() if ignored is None else targets[targets != ignored]
    if not len(known):
        raise DataError("loss.weight=balanced: every training target is ignored")
    low, high = known.aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        allowed = f"with {classes} classes they go from 0 to {classes - 1}"
        raise DataError(f"loss.weight=balanced: a training target is {wrong}; {allowed}")
    return len(known) / (classes * known.cpu().bincount(minlength=classes).clamp(min=1))


def targets_of(data: Data) -> Tensor:
    """Return the training targets. Raises DataError where every sample would have to be read for them."""
    split = data.train
    targets: Any = None
    if isinstance(split, TensorSplit | TensorDataset):
        targets = split.tensors[-1]
    elif isinstance(split, RaggedSplit) and split.others:
        targets = split.others[-1]
    elif isinstance(split, LabelledSplit):
        targets = split.labels
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        what = f"the training split of {type(data).__name__} does not give its classes beforehand"
        raise DataError(f"loss.weight=balanced: {what}; give one number a class instead")
    return targets


@losses.register("cross_entropy", aliases=["ce"])
class CrossEntropy(ByClass, nn.CrossEntropyLoss):
    """Cross entropy of class logits (batch, classes, ...) with class indices, or with class probabilities.

    Args:
        weight: one factor a class, the mean being over the weights of the targets; balanced: such that each class
            weighs the same in the training targets, however rare it is.
        ignore_index: targets with this value count for nothing.
        label_smoothing: share of each target that is spread evenly over all classes (Szegedy et al. 2016, section 7).
    """

    def __init__(
        self,
        weight: Weight = None,
        ignore_index: int | None = None,
        label_smoothing: Fraction = 0.0,
    ):
        super().__init__(label_smoothing=label_smoothing)
        self.set(weight, ignore_index)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(F.cross_entropy, outputs, targets, label_smoothing=self.label_smoothing)


@losses.register("label_smoothing")
class LabelSmoothing(CrossEntropy):
    """Cross entropy whose targets keep 1 - smoothing and spread the rest over all classes (Szegedy et al. 2016).

    Args:
        smoothing: share of each target that is spread evenly over all classes.
        weight: one factor a class, or balanced: as in cross_entropy.
        ignore_index: targets with this value count for nothing.
    """

    def __init__(
        self, smoothing: Fraction = 0.1, weight: Weight = None, ignore_index: int | None = None
    ):
        super().__init__(weight, ignore_index, smoothing)


@losses.register("nll")
class NegativeLogLikelihood(ByClass, nn.NLLLoss):
    """Negative log likelihood of class indices, for a model whose outputs are log-probabilities.

    Args:
        weight: one factor a class, or balanced: as in cross_entropy.
        ignore_index: targets with this value count for nothing.
    """

    def __init__(self, weight: Weight = None, ignore_index: int | None = None):
        super().__init__()
        self.set(weight, ignore_index)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(F.nll_loss, outputs, targets)


@losses.register("bce_with_logits", aliases=["bce"])
class BinaryCrossEntropy(nn.BCEWithLogitsLoss):
    """Binary cross entropy of label logits with labels of 0 and 1, a mean over samples and labels.

    Args:
        pos_weight: one factor a label on its positive targets, against their rarity.
    """

    def __init__(self, pos_weight: list[float] | None = None):
        super().__init__(pos_weight=tensor_or_none(pos_weight))


@losses.register("kl_div", aliases=["kl"])
class KLDivergence(nn.Module):
    """KL(targets || softmax(outputs)), a mean over samples; targets are class probabilities (batch, classes)."""

    target_form = "values"

    def count(self, targets: Tensor) -> int:
        return len(targets)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(outputs, dim=1), targets, reduction="batchmean")


@losses.register("focal")
class Focal(nn.Module):
    """-alpha_t (1 - p_t)^gamma log(p_t): the easy samples count less (Lin et al. 2017, section 3, arXiv:1708.02002).

    Integer targets are classes (softmax); floating ones are labels (sigmoid; a mean over samples and labels).
    Raises DataError when `alpha` is one number but the targets are classes.

    Args:
        gamma: how much the easy samples count less; 0 is cross entropy.
        alpha: weight of the positive labels (1 - alpha is that of the negative), or one weight a class or label.
    """

    target_form = "classes or labels"

    def __init__(
        self, gamma: NonNegativeFloat = 2.0, alpha: Fraction | list[Fraction] | None = None
    ):
        super().__init__()
        self.gamma = gamma
        self.alpha: Tensor | None
        self.register_buffer("alpha", None if alpha is None else torch.tensor(alpha))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            self.of_labels(outputs, targets)
            if targets.is_floating_point()
            else self.of_classes(outputs, targets)
        )

    def of_classes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets, reduction="none", ignore_index=NEVER)
        loss = self.focus(loss) * loss
        if self.alpha is None:
            return loss.mean()
        if self.alpha.ndim == 0:
            raise DataError(
                "focal: one number as `alpha` is for labels; for classes give one a class: alpha=[0.2, 0.8]"
            )
        return (self.alpha[targets] * loss).mean()

    def of_labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        loss = self.focus(loss) * loss
        if self.alpha is not None:
            loss = (self.alpha * targets + (1 - self.alpha) * (1 - targets)) * loss
        return loss.mean()

    def focus(self, loss: Tensor) -> Tensor:
        """(1 - p_t)^gamma. The clamp keeps the slope of a fractional power finite where p_t rounds to 1."""
        tiny = torch.finfo(loss.dtype).tiny
        return (-torch.expm1(-loss)).clamp_min(tiny) ** self.gamma


@losses.register("dice")
class Dice(nn.Module):
    """1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth) of probabilities p (Milletari et al. 2016).

    The sums are over all but the batch axis, and the loss is their mean over samples. Integer targets are classes
    (softmax over axis 1); floating ones are labels (sigmoid), of the outputs' shape.

    Args:
        smooth: keeps the gradient of a sample without any label.
    """

    target_form = "classes or labels"

    def __init__(self, smooth: PositiveFloat = 1.0):
        super().__init__()
        self.smooth = smooth

    def count(self, targets: Tensor) -> int:
        return len(targets)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = at_least_single(outputs)
        if targets.is_floating_point():
            probabilities = outputs.sigmoid()
        else:
            probabilities = outputs.softmax(1)
            targets = F.one_hot(targets, outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)
        p, t = probabilities.flatten(1), targets.flatten(1)
        overlap = 2 * (p * t).sum(1) + self.smooth
        return (1 - overlap / (p.square().sum(1) + t.square().sum(1) + self.smooth)).mean()


@losses.register("hinge")
class Hinge(nn.Module):
    """max(0, margin - s outputs), s = 2 targets - 1, for labels of 0 and 1; a mean over samples and labels.

    Args:
        margin: beyond it an output on the right side costs nothing.
        squared: take the square.
    """

    target_form = "values"

    def __init__(self, margin: PositiveFloat = 1.0, squared: bool = False):
        super().__init__()
        self.margin, self.power = margin, 2 if squared else 1

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.margin - (2 * targets - 1) * outputs).relu().pow(self.power).mean()


@losses.register("quantile", aliases=["pinball"])
class Quantile(nn.Module):
    """max(q e, (q - 1) e), e = targets - outputs: its minimum is the q-quantile (Koenker and Bassett 1978).

    Args:
        q: the quantile; 0.5 is the median.
    """

    target_form = "values"

    def __init__(self, q: Annotated[float, Range("(0, 1)")] = 0.5):
        super().__init__()
        self.q = q

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = targets - outputs
        return torch.maximum(self.q * error, (self.q - 1) * error).mean()


@losses.register("log_cosh")
class LogCosh(nn.Module):
    """log(cosh(outputs - targets)): quadratic near 0, linear far off, smooth everywhere."""

    target_form = "values"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        size = (outputs - targets).abs()
        return (size + F.softplus(-2 * size) - math.log(2)).mean()  # cosh itself overflows
