"""Metrics: sums that add over batches of any size, and a formula over them.

Outputs are logits (batch, classes or labels, ...) or values (batch, ...). Class targets are indices, of which negative
ones count for nothing: a task gives metrics a negative index for each target that its loss ignores. Label targets are
floats of 0 and 1, and a label is predicted when its logit is above 0.
Without a single target a value is nan.
"""

import math
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import Metric, PositiveInt, metrics
from framework.contracts.alignment import class_shape, same_shape

Average = Literal["macro", "micro", "weighted"]
Targets = tuple[str, ...]


def class_rows(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (rows, classes) and indices (rows,), whatever axes follow the classes."""
    targets = class_shape(outputs, targets)
    return outputs.movedim(1, -1).flatten(0, -2), targets.flatten()


def decisions(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return two boolean tables (rows, classes or labels): what is predicted, what is true."""
    if targets.is_floating_point():
        return outputs > 0, same_shape(outputs, targets) > 0.5
    outputs, targets = class_rows(outputs, targets)
    index = torch.arange(
        outputs.shape[1], device=outputs.device
    )  # not one_hot, which reads the values on the host
    predicted = (outputs.argmax(1, keepdim=True) == index) & (targets >= 0).unsqueeze(1)
    return predicted, targets.unsqueeze(1) == index


def sum_and_number(values: Tensor) -> Tensor:
    total = values.sum()
    return torch.stack([total, torch.full_like(total, values.numel())])


def wide(numbers: Tensor) -> Tensor:
    """Return float64 numbers, or float32 ones where the device (mps) has no float64."""
    return numbers.float() if numbers.device.type == "mps" else numbers.double()


def ratio(part: float | Tensor, whole: float | Tensor) -> float:
    return float(part) / float(whole) if whole else math.nan


def mean_of(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


class Share(Metric):
    """A metric with two sums: how many are right, of how many."""

    def compute(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


@metrics.register("accuracy", aliases=["acc"])
class Accuracy(Share):
    """The share of targets that are predicted: of classes, or of all single labels."""

    name = "accuracy"
    targets: ClassVar[Targets] = ("class", "labels")

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            right = (outputs > 0) == (same_shape(outputs, targets) > 0.5)
            return sum_and_number(right)
        targets = class_shape(outputs, targets)
        return torch.stack([(outputs.argmax(1) == targets).sum(), (targets >= 0).sum()])


@metrics.register("top_k")
class TopK(Share):
    """The share of class targets among the k highest outputs; 1 when there are no more than k classes.

    Args:
        k: how many of the highest outputs count.
    """

    targets: ClassVar[Targets] = ("class",)

    def __init__(self, k: PositiveInt = 5):
        self.k, self.name = k, f"top{k}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = class_rows(outputs, targets)
        best = outputs.topk(min(self.k, outputs.shape[1]), dim=1).indices
        return torch.stack([(best == targets.unsqueeze(1)).sum(), (targets >= 0).sum()])


@metrics.register("exact_match", aliases=["subset_accuracy"])
class ExactMatch(Share):
    """The share of samples whose labels are all predicted rightly."""

    name = "exact_match"
    targets: ClassVar[Targets] = ("labels",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        right = ((outputs > 0) == (same_shape(outputs, targets) > 0.5)).flatten(1).all(1)
        return sum_and_number(right)


class Counts(Metric):
    """A metric on three counts a class or label: rightly predicted, predicted, true; sums (3, classes)."""

    targets: ClassVar[Targets] = ("class", "labels")

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        predicted, true = decisions(outputs, targets)
        return torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)])


class Averaged(Counts):
    """A score of each class or label, averaged; those that occur neither in targets nor predictions are left out."""

    measure: ClassVar[str]

    def __init__(self, average: Average = "macro"):
        self.average = average
        self.name = self.measure if average == "macro" else f"{self.measure}_{average}"

    def compute(self, sums: Tensor) -> float:
        if self.average == "micro":
            sums = sums.sum(1, keepdim=True)
        right, predicted, true = sums[:, sums[1] + sums[2] > 0]
        scores = right / self.whole(predicted, true).clamp_min(
            1
        )  # without a whole nothing is right: 0
        if self.average == "weighted":
            return ratio((scores * true).sum(), true.sum())
        return mean_of(scores)

    def whole(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return what the rightly predicted are a share of."""
        raise NotImplementedError


@metrics.register("precision")
class Precision(Averaged):
    """The share of the predictions of a class or label that are right.

    Args:
        average: macro: the mean over classes; weighted: by how often each is true; micro: one score of all counts.
    """

    measure = "precision"

    def whole(self, predicted: Tensor, true: Tensor) -> Tensor:
        return predicted


@metrics.register("recall")
class Recall(Averaged):
    """The share of a class's or label's targets that are predicted.

    Args:
        average: macro: the mean over classes; weighted: by how often each is true; micro: one score of all counts.
    """

    measure = "recall"

    def whole(self, predicted: Tensor, true: Tensor) -> Tensor:
        return true


@metrics.register("f1")
class F1(Averaged):
    """The harmonic mean of precision and recall.

    Args:
        average: macro: the mean over classes; weighted: by how often each is true; micro: one score of all counts.
    """

    measure = "f1"

    def whole(self, predicted: Tensor, true: Tensor) -> Tensor:
        return (predicted + true) / 2


@metrics.register("balanced_accuracy")
class BalancedAccuracy(Counts):
    """The mean over the classes that occur in the targets of the share that is predicted."""

    name = "balanced_accuracy"
    targets: ClassVar[Targets] = ("class",)

    def compute(self, sums: Tensor) -> float:
        right, _, true = sums[:, sums[2] > 0]
        return mean_of(right / true)


@metrics.register("matthews", aliases=["mcc"])
class Matthews(Counts):
    """The correlation of predicted and true classes, in [-1, 1]; 0 is chance (Gorodkin 2004, for many classes)."""

    name = "matthews"
    targets: ClassVar[Targets] = ("class",)

    def compute(self, sums: Tensor) -> float:
        # As integers, for the squares of large counts differ by little.
        right, predicted, true = sums.long().tolist()
        number = sum(true)
        covariance = number * sum(right) - sum(p * t for p, t in zip(predicted, true, strict=True))
        of_predicted = number**2 - sum(count**2 for count in predicted)
        of_true = number**2 - sum(count**2 for count in true)
        spread = of_predicted * of_true
        return covariance / math.sqrt(spread) if spread else ratio(0.0, number)


@metrics.register("perplexity")
class Perplexity(Metric):
    """exp of the mean cross entropy of class targets; the number of equally likely classes that would do as well."""

    name = "perplexity"
    better = "lower"
    targets: ClassVar[Targets] = ("class",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = class_rows(outputs, targets)
        counted = targets >= 0
        losses = F.cross_entropy(wide(outputs), targets.clamp_min(0), reduction="none")
        return torch.stack([(losses * counted).sum(), counted.sum()])

    def compute(self, sums: Tensor) -> float:
        entropy = ratio(*sums.tolist())
        return math.exp(entropy) if entropy < 700 else entropy * math.inf


def residuals(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return errors and targets (batch, values); one of (batch,) and (batch, 1) cannot spread the other."""
    targets = same_shape(outputs, targets)
    outputs = wide(outputs).reshape(len(outputs), -1)
    targets = wide(targets).reshape(outputs.shape)
    return outputs - targets, targets


@metrics.register("mae")
class MeanAbsoluteError(Share):
    """The mean absolute difference of outputs and targets, in the targets' unit."""

    name = "mae"
    better = "lower"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sum_and_number(residuals(outputs, targets)[0].abs())


@metrics.register("mse")
class MeanSquaredError(Share):
    """The mean squared difference of outputs and targets, in the square of the targets' unit."""

    name = "mse"
    better = "lower"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sum_and_number(residuals(outputs, targets)[0].square())


@metrics.register("rmse")
class RootMeanSquaredError(MeanSquaredError):
    """The root of the mean squared difference of outputs and targets, in the targets' unit."""

    name = "rmse"

    def compute(self, sums: Tensor) -> float:
        return math.sqrt(super().compute(sums))


@metrics.register("r2")
class R2(Metric):
    """1 - squared error / variance of the targets, a mean over the values; 1 is perfect, 0 is their mean.

    A value whose targets are all equal scores 1 when it is met exactly, else 0. Fewer than two
    samples give nan. The variance is exact however far the targets are from 0: the sums are of
    parts of targets (see `exact_parts`).
    """

    name = "r2"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return squared error, number and sums of parts and products of each, (16, values)."""
        error, targets = residuals(outputs, targets)
        number = torch.full_like(error[0], len(error))
        parts = exact_parts(targets)
        products = [parts[first] * parts[second] for first, second in PAIRS]
        totals = torch.stack([error.square(), *parts, *products]).sum(1)
        return torch.cat([totals[:1], number.unsqueeze(0), totals[1:]])

    def compute(self, sums: Tensor) -> float:
        if len(sums) != 2 + PARTS + len(PAIRS):  # of an older version, from a checkpoint
            return math.nan
        if sums[1, 0] < 2:
            return math.nan
        scores = [r2_of_one(column) for column in sums.T.tolist()]
        return sum(scores) / len(scores) if scores else math.nan


@metrics.register("r2_log")
class R2OfLogarithms(R2):
    """R² of the logarithms of outputs and targets, for amounts above 0 with relative errors."""

    name = "r2_log"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # What is predicted below 0 has no logarithm, and is as wrong as the smallest amount.
        smallest = torch.finfo(torch.float32).tiny
        outputs, targets = wide(outputs), wide(targets)
        return super().sums(outputs.clamp_min(smallest).log(), targets.clamp_min(smallest).log())


PART_BITS = 13  # a product of two has 26 bits: float64 sums of 2^27 of like size are exact
PARTS = 4  # 4 x 13 bits, and a sign, hold the 53 bits of a float64
EXACT_NUMBER = 2**27
ROUNDING = 2.0**-50  # of the sums of more products than that, as a share of the sum of squares
PAIRS = [(first, second) for first in range(PARTS) for second in range(first, PARTS)]


def exact_parts(numbers: Tensor) -> list[Tensor]:
    """Return parts that add up to the numbers, multiples of a power of 2 with at most 13 bits.

    Numbers of like size are cut at the same places: sums of the parts, and of their products, are
    then exact in float64, where a sum of squares would lose the digits that the variance is made
    of. (The splitting of Dekker 1971, "A floating-point technique for extending the available
    precision", at fixed places.)
    """
    if numbers.dtype != torch.float64:  # mps
        nothing = torch.zeros_like(numbers)
        return [numbers, *[nothing] * (PARTS - 1)]
    exponent = numbers.view(torch.int64) & 0x7FF0000000000000
    # The largest power of 2 that is not above the number.
    power = exponent.view(torch.float64).clamp_min(2.0**-900)
    parts = []
    rest = numbers
    for number in range(1, PARTS):
        unit = power * 2.0 ** (1 - number * PART_BITS)
        part = (rest / unit).round() * unit
        rest = rest - part
        parts.append(part)
    return [*parts, rest]


def r2_of_one(sums: list[float]) -> float:
    """Return R² of one value, from its column of `R2.sums`, by exact arithmetic."""
    squared_error, number, *rest = sums
    if not all(map(math.isfinite, sums)):
        return -math.inf if squared_error == math.inf else math.nan
    total = sum(Fraction(part) for part in rest[:PARTS])
    squares = Fraction(0)
    for (first, second), product in zip(PAIRS, rest[PARTS:], strict=True):
        squares += Fraction(product) * (1 if first == second else 2)
    variation = squares - total**2 / Fraction(number)
    rounding = 0.0 if number <= EXACT_NUMBER else ROUNDING
    if variation <= Fraction(rounding) * squares:
        return 1.0 if squared_error == 0 else 0.0
    share = Fraction(squared_error) / variation
    return 1 - float(share) if share < 1e300 else -math.inf
