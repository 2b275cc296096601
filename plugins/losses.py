"""Losses: loss(outputs, targets) returns a mean, a scalar.

Outputs are logits of classes or labels, or values. Targets are class indices (batch,), labels of 0
and 1 (batch, labels) or values (batch, values). A new loss is a registered `nn.Module`. If its mean
is not over all elements of the targets (or those that it does not ignore), it needs a method
`count(targets)`; otherwise batches of unequal size get wrong weights.
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

REDUCTION = ("reduction", "size_average", "reduce")  # the trainer expects a mean
NEVER = -(2**63)  # an index that no target has
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


class ByClass:
    """Base of losses with a weight per class, either a list or `balanced`."""

    target_form = "classes"
    weight: Tensor | None
    ignore_index: int | None

    def set(self, weight: Weight, ignore_index: int | None) -> None:
        """Set the class weights; balanced ones are computed by `learn`."""
        self.ignore_index = ignore_index
        self.balanced = weight == "balanced"
        self.zero_weights = isinstance(weight, list) and 0 in weight
        if weight == "balanced":
            self.weight = torch.empty(0)  # a buffer, so that it moves to the device
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
        """Return the mean of a loss of torch, or 0 if no target counts."""
        ignored = NEVER if self.ignore_index is None else self.ignore_index
        maybe_zero_sum = self.zero_weights and not targets.is_floating_point()
        if maybe_zero_sum:
            any_counts = torch.as_tensor(self.count(targets)) > 0
            outputs = torch.where(any_counts, outputs, 0.0)  # the gradient of torch would be nan
        mean = loss(outputs, targets, self.factors(), ignore_index=ignored, **settings)
        if maybe_zero_sum:
            return zero_of_none(mean, any_counts)
        if self.ignore_index is not None:
            return zero_of_none(mean, (targets != ignored).any())
        return mean

    def learn(self, data: Data) -> None:
        """Compute balanced weights from the training targets; a task calls this before training."""
        if self.balanced and self.weight is not None:
            weight = balanced_weights(training_targets(data), data.out_shape[0], self.ignore_index)
            self.weight = weight.to(self.weight)

    def factors(self) -> Tensor | None:
        """Return the weight of each class.

        Raises:
            DataError: the weights are balanced, but `learn` was not called.
        """
        if self.balanced and self.weight is not None and not len(self.weight):
            raise DataError(
                "loss.weight=balanced: this task does not give the loss the training data;"
                " set one number per class instead"
            )
        return self.weight


def balanced_weights(targets: Tensor, classes: int, ignored: int | None = None) -> Tensor:
    """Return n / (K n_k) for each of K classes, n_k of the n targets being of class k.

    A class without targets counts as if it had one: in another fold it may have some (King and Zeng
    2001).
    """
    counted = targets.flatten() if ignored is None else targets[targets != ignored]
    if not len(counted):
        raise DataError("loss.weight=balanced: all training targets are ignored")
    low, high = counted.aminmax()
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        raise DataError(
            f"loss.weight=balanced: expected training targets from 0 to {classes - 1}"
            f" ({classes} classes), got {wrong}"
        )
    return len(counted) / (classes * counted.cpu().bincount(minlength=classes).clamp(min=1))


def training_targets(data: Data) -> Tensor:
    """Return the training targets.

    Raises:
        DataError: the targets are no classes, or are known only after reading every sample.
    """
    split = data.train
    targets: Any = None
    if isinstance(split, LabelledSplit):
        targets = split.labels
    elif isinstance(split, TensorDataset) or (isinstance(split, TensorSplit) and not split.names):
        targets = split.tensors[-1]
    elif isinstance(split, RaggedSplit) and split.others:
        targets = split.others[-1]
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        raise DataError(
            f"loss.weight=balanced: the training split of {type(data).__name__} does not list its"
            " classes; set one number per class instead"
        )
    return targets


@losses.register("cross_entropy", aliases=["ce"])
class CrossEntropy(ByClass, nn.CrossEntropyLoss):
    """Cross entropy of class logits (batch, classes, ...) and class indices or probabilities.

    Args:
        weight: one weight per class, for a weighted mean; balanced: all classes have the same total
            weight in the training targets.
        ignore_index: targets with this value are ignored.
        label_smoothing: fraction of each target that is spread evenly over all classes (Szegedy et
            al. 2016, section 7).
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
    """Cross entropy with smoothed targets: 1 - smoothing, and the rest spread over all classes.

    Szegedy et al. 2016, arXiv:1512.00567, section 7.

    Args:
        smoothing: fraction of each target that is spread evenly over all classes.
        weight: one weight per class, or balanced, as in cross_entropy.
        ignore_index: targets with this value are ignored.
    """

    def __init__(
        self, smoothing: Fraction = 0.1, weight: Weight = None, ignore_index: int | None = None
    ):
        super().__init__(weight, ignore_index, smoothing)


@losses.register("nll")
class NegativeLogLikelihood(ByClass, nn.NLLLoss):
    """Negative log likelihood of class indices, for outputs that are log-probabilities.

    Args:
        weight: one weight per class, or balanced, as in cross_entropy.
        ignore_index: targets with this value are ignored.
    """

    def __init__(self, weight: Weight = None, ignore_index: int | None = None):
        super().__init__()
        self.set(weight, ignore_index)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mean(F.nll_loss, outputs, targets)


@losses.register("bce_with_logits", aliases=["bce"])
class BinaryCrossEntropy(nn.BCEWithLogitsLoss):
    """Binary cross entropy of label logits and labels of 0 and 1, averaged over samples and labels.

    Args:
        pos_weight: one weight per label for its positive targets.
    """

    def __init__(self, pos_weight: list[float] | None = None):
        super().__init__(pos_weight=None if pos_weight is None else torch.tensor(pos_weight))


@losses.register("kl_div", aliases=["kl"])
class KLDivergence(nn.Module):
    """KL(targets || softmax(outputs)), averaged over samples.

    Targets are class probabilities (batch, classes).
    """

    target_form = "values"

    def count(self, targets: Tensor) -> int:
        return len(targets)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(outputs, dim=1), targets, reduction="batchmean")


@losses.register("focal")
class Focal(nn.Module):
    """-alpha_t (1 - p_t)^gamma log(p_t), which down-weights easy samples (Lin et al. 2017).

    Integer targets are classes (softmax); floating-point targets are labels (sigmoid), averaged
    over samples and labels. arXiv:1708.02002, section 3.

    Args:
        gamma: focusing parameter; 0 is cross entropy.
        alpha: weight of positive labels (negative ones have 1 - alpha), or one weight per class or
            label.

    Raises:
        DataError: `alpha` is one number but the targets are classes.
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
        if targets.is_floating_point():
            return self.of_labels(outputs, targets)
        return self.of_classes(outputs, targets)

    def of_classes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss for class indices."""
        loss = F.cross_entropy(outputs, targets, reduction="none", ignore_index=NEVER)
        loss = self.focus(loss) * loss
        if self.alpha is None:
            return loss.mean()
        if self.alpha.ndim == 0:
            raise DataError(
                f"loss.alpha={self.alpha:g}: expected one number per class, such as "
                "alpha=[0.2, 0.8] (a single number is for targets of kind labels)"
            )
        return (self.alpha[targets] * loss).mean()

    def of_labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss for labels of 0 and 1."""
        loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        loss = self.focus(loss) * loss
        if self.alpha is not None:
            loss = (self.alpha * targets + (1 - self.alpha) * (1 - targets)) * loss
        return loss.mean()

    def focus(self, loss: Tensor) -> Tensor:
        """Return (1 - p_t)^gamma for the cross entropy -log(p_t).

        The clamp keeps the gradient of a fractional power finite where p_t rounds to 1.
        """
        tiny = torch.finfo(loss.dtype).tiny
        return (-torch.expm1(-loss)).clamp_min(tiny) ** self.gamma


@losses.register("dice")
class Dice(nn.Module):
    """1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth) for probabilities p and targets t.

    The sums are over all axes but the batch, and the loss is averaged over samples. Integer targets
    are classes (softmax over axis 1); floating-point targets are labels (sigmoid) of the shape of
    the outputs (Milletari et al. 2016, arXiv:1606.04797).

    Args:
        smooth: added to numerator and denominator, so that a sample without labels has a gradient.
    """

    target_form = "classes or labels"

    def __init__(self, smooth: PositiveFloat = 1.0):
        super().__init__()
        self.smooth = smooth

    def count(self, targets: Tensor) -> int:
        return len(targets)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Half precision is too coarse for the sums.
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if targets.is_floating_point():
            probabilities = outputs.sigmoid()
        else:
            probabilities = outputs.softmax(1)
            targets = F.one_hot(targets, outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)
        p = probabilities.flatten(1)
        t = targets.flatten(1)
        overlap = 2 * (p * t).sum(1) + self.smooth
        return (1 - overlap / (p.square().sum(1) + t.square().sum(1) + self.smooth)).mean()


@losses.register("hinge")
class Hinge(nn.Module):
    """max(0, margin - s outputs) with s = 2 targets - 1, for labels of 0 and 1.

    The loss is averaged over samples and labels.

    Args:
        margin: outputs beyond it on the correct side have loss 0.
        squared: square the loss.
    """

    target_form = "values"

    def __init__(self, margin: PositiveFloat = 1.0, squared: bool = False):
        super().__init__()
        self.margin = margin
        self.power = 2 if squared else 1

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.margin - (2 * targets - 1) * outputs).relu().pow(self.power).mean()


@losses.register("quantile", aliases=["pinball"])
class Quantile(nn.Module):
    """max(q e, (q - 1) e) with e = targets - outputs; the q-quantile minimizes it.

    Koenker and Bassett 1978, "Regression quantiles".

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
    """log(cosh(outputs - targets)): quadratic near 0, linear far from 0, smooth everywhere."""

    target_form = "values"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = (outputs - targets).abs()
        return (error + F.softplus(-2 * error) - math.log(2)).mean()  # cosh would overflow
