"""Curves of decisions: precision and recall, ROC, calibration; computed by scikit-learn."""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from framework.data.dataset import names_or_numbers
from framework.runtime.display.drawing import COLORS, GRAY, Axis, Chart, with_height

from .decisions import Decision

BINS = 15  # of the confidence, as in Guo et al. 2017
MOST_CURVES = 8  # in a chart


@dataclass
class ClassCurves:
    """The curves of one class against all others, or of one label.

    Attributes:
        name: of the class.
        positives: the number of its samples.
        average_precision: sum of precision times the step in recall; None without a positive.
        auc: area under the ROC curve; None without a positive or without a negative.
        precision, recall: points of the curve of precision and recall.
        pr_thresholds: of these points but the last one, which has none.
        false_positive_rate, true_positive_rate: points of the ROC curve.
        roc_thresholds: of these points; infinite for the first one.
    """

    name: str
    positives: int
    average_precision: float | None = None
    auc: float | None = None
    precision: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    pr_thresholds: list[float] = field(default_factory=list)
    false_positive_rate: list[float] = field(default_factory=list)
    true_positive_rate: list[float] = field(default_factory=list)
    roc_thresholds: list[float] = field(default_factory=list)


@dataclass
class Calibration:
    """Confidence and accuracy of the decisions, in bins of equal width (Guo et al. 2017).

    The decision is the most likely class, and its confidence the probability of it. With labels,
    each label of each sample is a decision, whose confidence is at least 1/2.

    Attributes:
        error: the expected calibration error: the mean difference of confidence and accuracy over
            the bins, weighted by their decisions (arXiv:1706.04599, equation 3).
        confidence: the mean of each bin that has decisions.
        accuracy: of each of these bins.
        counts: the number of decisions in each of these bins.
    """

    error: float
    confidence: list[float]
    accuracy: list[float]
    counts: list[int]


@dataclass
class DecisionCurves:
    """The curves of all classes, and the calibration.

    Attributes:
        classes: one entry for each class or label.
        calibration: of the decisions.
        samples: the number of samples.
    """

    classes: list[ClassCurves]
    calibration: Calibration
    samples: int

    def mean(self, name: str) -> float | None:
        """Return the mean of a value over the classes that have it; None if none has it."""
        values = [getattr(each, name) for each in self.classes]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def summary(self) -> dict[str, Any]:
        """Return the values without the points of the curves."""
        return {
            "samples": self.samples,
            "average_precision": self.mean("average_precision"),
            "auc": self.mean("auc"),
            "calibration_error": self.calibration.error,
            "classes": [
                {
                    "class": each.name,
                    "positives": each.positives,
                    "average_precision": each.average_precision,
                    "auc": each.auc,
                }
                for each in self.classes
            ],
        }


def compute_curves(decision: Decision, classes: Sequence[str]) -> DecisionCurves:
    """Return the curves of each class against all others, and the calibration.

    Args:
        decision: probabilities and true classes.
        classes: the names of the classes; empty if unknown.
    """
    names = names_or_numbers(classes, decision.probabilities.shape[1])
    found = [
        class_curves(name, positives(decision, index), scores(decision, index))
        for index, name in enumerate(names)
    ]
    return DecisionCurves(found, compute_calibration(decision), len(decision.targets))


def positives(decision: Decision, index: int) -> Tensor:
    """Return whether each sample is of a class, or has a label; shape (samples,)."""
    if decision.is_multilabel:
        return decision.targets[:, index] == 1
    return decision.targets == index


def scores(decision: Decision, index: int) -> Tensor:
    """Return the probability of a class or label for each sample, shape (samples,)."""
    return decision.probabilities[:, index]


def class_curves(name: str, positive: Tensor, score: Tensor) -> ClassCurves:
    """Return the curves of one class.

    Args:
        name: of the class.
        positive: whether a sample is of it, shape (samples,).
        score: its probability, shape (samples,).
    """
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_curve,
        roc_auc_score,
        roc_curve,
    )

    curves = ClassCurves(name, int(positive.sum()))
    if curves.positives == 0 or not bool(score.isfinite().all()):
        return curves
    truth = positive.numpy()
    values = score.numpy()
    precision, recall, thresholds = precision_recall_curve(truth, values, drop_intermediate=True)
    curves.average_precision = float(average_precision_score(truth, values))
    curves.precision = precision.tolist()
    curves.recall = recall.tolist()
    curves.pr_thresholds = thresholds.tolist()
    if curves.positives == len(positive):
        return curves
    false_rate, true_rate, thresholds = roc_curve(truth, values)
    curves.auc = float(roc_auc_score(truth, values))
    curves.false_positive_rate = false_rate.tolist()
    curves.true_positive_rate = true_rate.tolist()
    curves.roc_thresholds = thresholds.tolist()
    return curves


def compute_calibration(decision: Decision) -> Calibration:
    """Return the calibration of the decisions in 15 bins."""
    import numpy
    from sklearn.calibration import calibration_curve

    probabilities = decision.probabilities
    if decision.is_multilabel:
        confidence = torch.maximum(probabilities, 1 - probabilities).flatten()
        is_right = ((probabilities > 0.5) == (decision.targets == 1)).flatten()
    else:
        confidence, chosen = probabilities.max(1)
        is_right = chosen == decision.targets
    if not bool(confidence.isfinite().all()):
        return Calibration(math.nan, [], [], [])
    confidence = confidence.clamp(0, 1)  # a sum of rounded probabilities may exceed 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decisions that are all right, or all wrong
        accuracy, means = calibration_curve(
            is_right.numpy(), confidence.numpy(), n_bins=BINS, pos_label=True
        )
    # `calibration_curve` does not return the number of decisions in the bins, which it finds so
    edges = numpy.linspace(0, 1, BINS + 1)
    counts = numpy.bincount(numpy.searchsorted(edges[1:-1], confidence.numpy()), minlength=BINS)
    counts = counts[counts > 0]
    error = float((abs(accuracy - means) * counts).sum() / counts.sum())
    return Calibration(error, means.tolist(), accuracy.tolist(), counts.tolist())


def curves_csv(curves: DecisionCurves) -> str:
    """Return the points of all curves as CSV: curve, class, threshold, x, y, count.

    x and y are recall and precision (pr), the rates of false and true positives (roc), and
    confidence and accuracy (calibration).
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "class", "threshold", "x", "y", "count"])
    for each in curves.classes:
        thresholds = [*each.pr_thresholds, ""]
        for threshold, x, y in zip(thresholds, each.recall, each.precision, strict=False):
            writer.writerow(["pr", each.name, threshold, x, y, ""])
        points = zip(
            each.roc_thresholds, each.false_positive_rate, each.true_positive_rate, strict=True
        )
        for threshold, x, y in points:
            writer.writerow(["roc", each.name, threshold, x, y, ""])
    calibration = curves.calibration
    bins = zip(calibration.confidence, calibration.accuracy, calibration.counts, strict=True)
    for x, y, count in bins:
        writer.writerow(["calibration", "", "", x, y, count])
    return text.getvalue()


def draw_curves(curves: DecisionCurves) -> list[Tensor]:
    """Return three charts of the same size, as images (1, 3, height, width) in [0, 1]."""
    charts = [draw_pr(curves), draw_roc(curves), draw_calibration(curves.calibration)]
    height = max(chart.shape[2] for chart in charts)
    return [with_height(chart, height) for chart in charts]


def draw_pr(curves: DecisionCurves) -> Tensor:
    """Draw precision over recall of the classes with the lowest average precision."""
    shown = lowest(curves, "average_precision")
    mean = curves.mean("average_precision")
    title = f"precision and recall, mean AP {three_decimals(mean)}{shown_text(shown, curves)}"
    chart = Chart(title, Axis(0, 1), Axis(0, 1), "recall", "precision")
    for index, each in enumerate(shown):
        points = steps(each.recall[::-1], each.precision[::-1])
        label = f"{each.name[:16]} {three_decimals(each.average_precision)}"
        chart.line(points, COLORS[index], label)
    return chart.tensor()


def draw_roc(curves: DecisionCurves) -> Tensor:
    """Draw the ROC curves of the classes with the smallest areas."""
    shown = lowest(curves, "auc")
    title = f"ROC, mean AUC {three_decimals(curves.mean('auc'))}{shown_text(shown, curves)}"
    chart = Chart(title, Axis(0, 1), Axis(0, 1), "false positive rate", "true positive rate")
    chart.line([(0, 0), (1, 1)], GRAY)
    for index, each in enumerate(shown):
        points = list(zip(each.false_positive_rate, each.true_positive_rate, strict=True))
        chart.line(points, COLORS[index], f"{each.name[:16]} {three_decimals(each.auc)}")
    return chart.tensor()


def draw_calibration(calibration: Calibration) -> Tensor:
    """Draw accuracy over confidence; the size of a point grows with the decisions in its bin."""
    title = f"calibration, expected error {three_decimals(calibration.error)}"
    chart = Chart(title, Axis(0, 1), Axis(0, 1), "confidence", "accuracy")
    chart.line([(0, 0), (1, 1)], GRAY, "perfect")
    points = list(zip(calibration.confidence, calibration.accuracy, strict=True))
    chart.line(points, COLORS[0], "model")
    most = max(calibration.counts, default=1)
    for point, count in zip(points, calibration.counts, strict=True):
        chart.points([point], COLORS[0], radius=2 + 5 * math.sqrt(count / most))
    return chart.tensor()


def lowest(curves: DecisionCurves, name: str) -> list[ClassCurves]:
    """Return the classes with the lowest value, at most `MOST_CURVES`."""
    known = [each for each in curves.classes if getattr(each, name) is not None]
    return sorted(known, key=lambda each: getattr(each, name))[:MOST_CURVES]


def shown_text(shown: Sequence[ClassCurves], curves: DecisionCurves) -> str:
    """Return a note if a chart has not all classes."""
    if len(shown) == len(curves.classes):
        return ""
    return f" ({len(shown)} lowest of {len(curves.classes)})"


def steps(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Return a curve as steps: up to a point, its value is that of the point."""
    points = []
    before: float | None = None
    for across, up in zip(x, y, strict=True):
        if before is not None:
            points.append((before, up))
        points.append((across, up))
        before = across
    return points


def three_decimals(value: float | None) -> str:
    """Return a value with three digits; "-" if there is none."""
    return "-" if value is None else f"{value:.3f}"
