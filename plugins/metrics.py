"""Metrics: sums that are added over batches of any size, and a formula of the sums.

Outputs are logits (batch, classes or labels, ...) or values (batch, ...). Class targets are
indices; negative ones are ignored: a task passes a negative index for each target that its loss
ignores. Label targets are floats of 0 and 1, and a label is predicted if its logit is above 0.
An output of NaN is no prediction, which is wrong for any target; metrics of the size or order of
outputs are nan then. Without targets, the value is nan.
"""

import math
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import Metric, PositiveInt, metrics
from framework.contracts.alignment import class_shape, same_shape
from framework.contracts.metric import predicted_classes

Average = Literal["macro", "micro", "weighted"]
Targets = tuple[str, ...]


def class_rows(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (rows, classes) and indices (rows,), with all other axes flattened."""
    targets = class_shape(outputs, targets)
    return outputs.movedim(1, -1).flatten(0, -2), targets.flatten()


def decisions(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and targets as boolean tables (rows, classes or labels)."""
    if targets.is_floating_point():
        return outputs > 0, same_shape(outputs, targets) > 0.5
    outputs, targets = class_rows(outputs, targets)
    # one_hot would read the values on the host.
    index = torch.arange(outputs.shape[1], device=outputs.device)
    chosen = predicted_classes(outputs).unsqueeze(1)
    predicted = (chosen == index) & (targets >= 0).unsqueeze(1)
    return predicted, targets.unsqueeze(1) == index


def correct_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return whether each label is predicted correctly, in the shape of the outputs."""
    correct = (outputs > 0) == (same_shape(outputs, targets) > 0.5)
    return correct & ~outputs.isnan()


def sum_and_number(values: Tensor) -> Tensor:
    """Return the sum and the number of values, (2,)."""
    total = values.sum()
    return torch.stack([total, torch.full_like(total, values.numel())])


def wide(numbers: Tensor) -> Tensor:
    """Convert to float64, or to float32 on mps, which has no float64."""
    return numbers.float() if numbers.device.type == "mps" else numbers.double()


def ratio(numerator: float | Tensor, denominator: float | Tensor) -> float:
    """Return the ratio, or nan for a denominator of 0."""
    if not denominator:
        return math.nan
    return float(numerator) / float(denominator)


def mean_or_nan(values: Tensor) -> float:
    """Return the mean, or nan without values."""
    if not len(values):
        return math.nan
    return float(values.mean())


class Share(Metric):
    """A metric that is the ratio of two sums, such as the number correct and the number of all."""

    def compute(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


@metrics.register("accuracy", aliases=["acc"])
class Accuracy(Share):
    """The fraction of correct predictions of classes, or of all labels."""

    name = "accuracy"
    targets: ClassVar[Targets] = ("class", "labels")

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return sum_and_number(correct_labels(outputs, targets))
        targets = class_shape(outputs, targets)
        correct = predicted_classes(outputs) == targets
        return torch.stack([correct.sum(), (targets >= 0).sum()])


@metrics.register("top_k")
class TopK(Share):
    """The fraction of class targets among the k highest outputs; 1 with at most k classes.

    Args:
        k: number of highest outputs.
    """

    targets: ClassVar[Targets] = ("class",)

    def __init__(self, k: PositiveInt = 5):
        self.k = k
        self.name = f"top{k}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = class_rows(outputs, targets)
        highest, best = outputs.topk(min(self.k, outputs.shape[1]), dim=1)
        is_prediction = ~highest[:, :1].isnan()  # NaN is the highest
        correct = (best == targets.unsqueeze(1)) & is_prediction
        return torch.stack([correct.sum(), (targets >= 0).sum()])


@metrics.register("exact_match", aliases=["subset_accuracy"])
class ExactMatch(Share):
    """The fraction of samples with all labels predicted correctly."""

    name = "exact_match"
    targets: ClassVar[Targets] = ("labels",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sum_and_number(correct_labels(outputs, targets).flatten(1).all(1))


class Counts(Metric):
    """A metric on three counts per class or label: correct, predicted, true. Sums: (3, classes)."""

    targets: ClassVar[Targets] = ("class", "labels")

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        predicted, true = decisions(outputs, targets)
        return torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)])


class Averaged(Counts):
    """An average of scores of classes or labels that occur in targets or predictions."""

    measure: ClassVar[str]

    def __init__(self, average: Average = "macro"):
        self.average = average
        self.name = self.measure if average == "macro" else f"{self.measure}_{average}"

    def compute(self, sums: Tensor) -> float:
        if self.average == "micro":
            sums = sums.sum(1, keepdim=True)
        correct, predicted, true = sums[:, sums[1] + sums[2] > 0]
        scores = correct / self.denominator(predicted, true).clamp_min(1)  # 0 / 0 counts as 0
        if self.average == "weighted":
            return ratio((scores * true).sum(), true.sum())
        return mean_or_nan(scores)

    def denominator(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return the denominator of the score; the numerator is the number of correct ones."""
        raise NotImplementedError


@metrics.register("precision")
class Precision(Averaged):
    """The fraction of the predictions of a class or label that are correct.

    Args:
        average: macro: the mean over classes; weighted: weighted by the number of targets; micro:
            one score of the total counts.
    """

    measure = "precision"

    def denominator(self, predicted: Tensor, true: Tensor) -> Tensor:
        return predicted


@metrics.register("recall")
class Recall(Averaged):
    """The fraction of the targets of a class or label that are predicted.

    Args:
        average: macro: the mean over classes; weighted: weighted by the number of targets; micro:
            one score of the total counts.
    """

    measure = "recall"

    def denominator(self, predicted: Tensor, true: Tensor) -> Tensor:
        return true


@metrics.register("f1")
class F1(Averaged):
    """The harmonic mean of precision and recall.

    Args:
        average: macro: the mean over classes; weighted: weighted by the number of targets; micro:
            one score of the total counts.
    """

    measure = "f1"

    def denominator(self, predicted: Tensor, true: Tensor) -> Tensor:
        return (predicted + true) / 2


@metrics.register("balanced_accuracy")
class BalancedAccuracy(Counts):
    """The mean recall over the classes that occur in the targets."""

    name = "balanced_accuracy"
    targets: ClassVar[Targets] = ("class",)

    def compute(self, sums: Tensor) -> float:
        correct, _, true = sums[:, sums[2] > 0]
        return mean_or_nan(correct / true)


@metrics.register("matthews", aliases=["mcc"])
class Matthews(Counts):
    """The correlation of predicted and true classes, in [-1, 1]; 0 is chance.

    The form for several classes: Gorodkin 2004, "Comparing two K-category assignments".
    """

    name = "matthews"
    targets: ClassVar[Targets] = ("class",)

    def compute(self, sums: Tensor) -> float:
        # Python integers are exact, also for differences of the squares of large counts.
        correct, predicted, true = sums.long().tolist()
        number = sum(true)
        predicted.append(number - sum(predicted))  # the rows without a prediction, as a class
        true.append(0)
        covariance = number * sum(correct) - dot(predicted, true)
        variances = (number**2 - dot(predicted, predicted)) * (number**2 - dot(true, true))
        if not variances:
            return ratio(0.0, number)
        return covariance / math.sqrt(variances)


def dot(a: list[int], b: list[int]) -> int:
    """Return the scalar product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


@metrics.register("perplexity")
class Perplexity(Metric):
    """exp of the mean cross entropy of class targets.

    k equally likely classes have perplexity k.
    """

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
    """Return errors and targets, (batch, values); (batch,) and (batch, 1) are not broadcast."""
    targets = same_shape(outputs, targets)
    outputs = wide(outputs).reshape(len(outputs), -1)
    targets = wide(targets).reshape(outputs.shape)
    return outputs - targets, targets


@metrics.register("mae")
class MeanAbsoluteError(Share):
    """The mean absolute difference of outputs and targets, in the unit of the targets."""

    name = "mae"
    better = "lower"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sum_and_number(residuals(outputs, targets)[0].abs())


@metrics.register("mse")
class MeanSquaredError(Share):
    """The mean squared difference of outputs and targets, in the squared unit of the targets."""

    name = "mse"
    better = "lower"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return sum_and_number(residuals(outputs, targets)[0].square())


@metrics.register("rmse")
class RootMeanSquaredError(MeanSquaredError):
    """The root mean squared difference of outputs and targets, in the unit of the targets."""

    name = "rmse"

    def compute(self, sums: Tensor) -> float:
        return math.sqrt(super().compute(sums))


@metrics.register("r2")
class R2(Metric):
    """1 - squared error / variance of the targets, averaged over values (R²).

    1 is perfect; predicting the mean gives 0. A value with constant targets scores 1 if all errors
    are 0, else 0. Fewer than two samples give nan. The variance is exact, also for targets with a
    large mean, since the sums are of parts of targets (see `exact_parts`).
    """

    name = "r2"
    targets: ClassVar[Targets] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return squared error, number, and sums of parts and of their products, (16, values)."""
        error, targets = residuals(outputs, targets)
        number = torch.full_like(error[0], len(error))
        parts = exact_parts(targets)
        products = [parts[first] * parts[second] for first, second in PAIRS]
        totals = torch.stack([error.square(), *parts, *products]).sum(1)
        return torch.cat([totals[:1], number.unsqueeze(0), totals[1:]])

    def compute(self, sums: Tensor) -> float:
        if len(sums) != 2 + PARTS + len(PAIRS):  # from a checkpoint of an older version
            return math.nan
        if sums[1, 0] < 2:
            return math.nan
        scores = [exact_r2(column) for column in sums.T.tolist()]
        return sum(scores) / len(scores) if scores else math.nan


@metrics.register("r2_log")
class R2OfLogarithms(R2):
    """R² of the logarithms of outputs and targets, for positive values with relative errors."""

    name = "r2_log"

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Negative values have no logarithm and are replaced by the smallest positive number.
        smallest = torch.finfo(torch.float32).tiny
        outputs = wide(outputs).clamp_min(smallest).log()
        targets = wide(targets).clamp_min(smallest).log()
        return super().sums(outputs, targets)


PART_BITS = 13  # products have 26 bits: float64 sums of 2^27 products of similar size are exact
PARTS = 4  # 4 x 13 bits and a sign hold the 53 bits of a float64
EXACT_NUMBER = 2**27
ROUNDING = 2.0**-50  # error of longer sums, as a fraction of the sum of squares
PAIRS = list(combinations_with_replacement(range(PARTS), 2))


def exact_parts(numbers: Tensor) -> list[Tensor]:
    """Return parts that add up to the numbers, multiples of a power of 2 with at most 13 bits.

    Numbers of similar size are cut at the same bits. Sums of the parts and of their products are
    then exact in float64, while a plain sum of squares would lose the digits of the variance. This
    is the splitting of Dekker 1971, "A floating-point technique for extending the available
    precision", at fixed bits.
    """
    if numbers.dtype != torch.float64:  # mps
        zeros = torch.zeros_like(numbers)
        return [numbers] + [zeros] * (PARTS - 1)
    exponent = numbers.view(torch.int64) & 0x7FF0000000000000
    # Without the mantissa, this is the largest power of 2 that is not above the number.
    power = exponent.view(torch.float64).clamp_min(2.0**-900)
    parts = []
    rest = numbers
    for number in range(1, PARTS):
        unit = power * 2.0 ** (1 - number * PART_BITS)
        part = (rest / unit).round() * unit
        rest = rest - part
        parts.append(part)
    return [*parts, rest]


def exact_r2(sums: list[float]) -> float:
    """Return R² of one value by exact arithmetic from its column of `R2.sums`."""
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
    unexplained = Fraction(squared_error) / variation
    if unexplained >= 1e300:  # float() could overflow
        return -math.inf
    return 1 - float(unexplained)
