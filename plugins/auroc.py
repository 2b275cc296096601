"""The area under the receiver operating characteristic, from counts that are added over batches.

Scores are counted in histograms of several resolutions. The coarsest one covers all scores. Each
finer one wraps around: a score is counted in bin (key modulo number of bins). The coarser histogram
tells which of the keys that share a bin occur, so that scores of any magnitude and offset are
resolved.

One histogram is not enough: with an offset of 100 or more, bins that cover all scores are too wide.
With 65,536 bins, the area for 20,000 normal scores of standard deviation 1 has an error of 0.003 at
an offset of 100, and of 0.09 at 1000.

With 4096 bins, the counts are 65,536 numbers for each class (2 x 8 histograms x 4096 bins; the
Trainer sums them in float64, 0.5 MiB) up to 64 classes, and 4.7 million (36 MiB) for 65 to 256
classes. Beyond that each histogram has 1,024 bins, and the counts are 18,432 numbers for each
class: 18.4 million (141 MiB) for 1,000 classes.
"""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from framework import Metric, Range, metrics
from framework.contracts.alignment import same_shape

from .metrics import class_rows, mean_or_nan, wide

MANTISSA_BITS = 31  # an offset of 2^20 standard deviations leaves 2^11 steps in each
EXPONENT_BITS = 8
LOWEST_EXPONENT = -120  # scores between -2^-120 and 2^-120 count as 0
KEY_BITS = 1 + EXPONENT_BITS + MANTISSA_BITS
STEP_BITS = 4  # a bin of one histogram is 2^4 bins of the next
MOST_BINS = 2**18  # of one resolution, of all classes together, if each has 1,024 at least
NEGLIGIBLE = 1e-7  # a bin with a smaller fraction of all pairs is not resolved further


@metrics.register("auroc", aliases=["auc"])
class AreaUnderCurve(Metric):
    """The probability that a sample of a class has a higher score than another sample.

    This is the area under the receiver operating characteristic (Hanley and McNeil 1982), with an
    error of about 0.001, averaged over classes or labels. The score of a class is its log odds,
    log p - log(1 - p), which does not saturate as p does; the score of a label is its logit.

    Args:
        bins: number of bins of each histogram of scores (with 4096 bins there are eight
            histograms); reduced for more than 64 classes, down to 1,024 for 256 or more, to
            save memory.
    """

    name = "auroc"
    targets: ClassVar[tuple[str, ...]] = ("class", "labels")

    def __init__(self, bins: Annotated[int, Range("[2, inf)")] = 4096):
        self.bins = bins

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return counts of the negatives and of the positives of each class.

        Returns:
            (2, classes, histograms, bins).
        """
        if targets.is_floating_point():
            scores = wide(outputs).reshape(len(outputs), -1)
            positive = same_shape(outputs, targets).reshape(scores.shape) > 0.5
            counted = torch.ones_like(positive)
        else:
            rows, targets = class_rows(outputs, targets)
            scores = log_odds(wide(rows))
            positive = targets.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
            counted = (targets >= 0).unsqueeze(1).expand_as(positive)
        classes = scores.shape[1]
        bins = min(self.bins, max(1024, MOST_BINS // classes))
        shifts = shifts_of(bins)
        keys = as_keys(scores)
        wrapped = torch.stack([(keys >> shift) % bins for shift in shifts], dim=2)
        kind = torch.arange(classes, device=scores.device) + classes * positive
        level = torch.arange(len(shifts), device=scores.device)
        histogram = kind.unsqueeze(2) * len(shifts) + level
        cells = histogram * bins + wrapped
        weights = torch.where(scores.isnan(), torch.nan, 1.0) * counted
        weights = weights.float().unsqueeze(2).expand_as(cells)
        counts = torch.zeros(2 * classes * len(shifts) * bins, device=scores.device)
        counts = counts.scatter_add(0, cells.flatten(), weights.flatten())
        return counts.reshape(2, classes, len(shifts), bins)

    def compute(self, sums: Tensor) -> float:
        if sums.ndim != 4:  # from a checkpoint of an older version
            return float("nan")
        if sums.isnan().any():
            return float("nan")
        areas = []
        for negatives, positives in zip(*sums, strict=True):
            pairs = negatives[0].sum() * positives[0].sum()
            if pairs > 0:
                areas.append(area(torch.stack([negatives, positives])) / pairs)
        return mean_or_nan(torch.stack(areas)) if areas else float("nan")


def shifts_of(bins: int) -> list[int]:
    """Return the right shift of keys for each histogram, the coarsest one first."""
    coarsest = KEY_BITS - (bins.bit_length() - 1)
    return [*range(coarsest, 0, -STEP_BITS), 0]


def area(histograms: Tensor) -> Tensor:
    """Return the number of pairs where the positive has the higher score, plus half of the ties.

    Args:
        histograms: counts of the negatives and of the positives, (2, histograms, bins).
    """
    keys, counts = resolve(histograms)
    negatives, positives = counts[:, keys.argsort()]
    below = negatives.cumsum(0) - negatives / 2
    return (positives * below).sum()


def resolve(histograms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest keys of the bins that are not negligible, and their counts, (2, bins)."""
    bins = histograms.shape[2]
    pairs = histograms[:, 0].sum(1).prod()
    coarser, *finer = shifts_of(bins)
    keys = torch.arange(bins) - bins // 2
    counts = histograms[:, 0, keys % bins]
    settled_keys = []
    settled_counts = []
    for level, shift in enumerate(finer, 1):
        split = counts.prod(0) > NEGLIGIBLE * pairs
        settled_keys.append(keys[~split] << coarser)
        settled_counts.append(counts[:, ~split])
        children = torch.arange(2 ** (coarser - shift))
        keys = (keys[split].unsqueeze(1) << (coarser - shift)) + children
        background = torch.cat(settled_counts, dim=1).sum(1) / bins
        split_histograms = []
        for kind in range(2):
            coarse = counts[kind, split]
            inner = split_counts(coarse, histograms[kind, level], keys % bins, background[kind])
            split_histograms.append(inner.flatten())
        counts = torch.stack(split_histograms)
        keys = keys.flatten()
        coarser = shift
    return torch.cat([*settled_keys, keys]), torch.cat([*settled_counts, counts], dim=1)


def split_counts(counts: Tensor, histogram: Tensor, bins: Tensor, background: Tensor) -> Tensor:
    """Split the counts of bins into those of the finer bins inside, (bins, inside).

    If a wrapped bin belongs to several coarser bins, its count is divided in proportion to their
    counts. Then the finer counts of each coarser bin are rescaled to its count.

    Args:
        counts: counts of the coarser bins, (bins,).
        histogram: the finer, wrapped histogram.
        bins: indices of the finer bins in the histogram, (bins, inside).
        background: average count of a wrapped bin from bins that are not resolved.
    """
    inside = bins.shape[1]
    expected = (counts / inside).unsqueeze(1).expand_as(bins)
    crowd = torch.full_like(histogram, float(background))
    crowd = crowd.index_add(0, bins.flatten(), expected.flatten())
    found = expected * (histogram / crowd.clamp_min(1e-300))[bins]
    total = found.sum(1, keepdim=True)
    return torch.where(total > 0, found * (counts.unsqueeze(1) / total.clamp_min(1e-300)), expected)


def log_odds(logits: Tensor) -> Tensor:
    """Return log p - log(1 - p) of each class without computing p, which may round to 0 or 1."""
    if logits.shape[1] == 2:
        return logits - logits.flip(1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    likeliest = logits.argmax(1, keepdim=True) == classes
    logarithms = logits.log_softmax(1)
    others = logits.masked_fill(likeliest, -torch.inf).logsumexp(1, keepdim=True)
    # 1 - p is precise for p <= 1/2, which holds for every class but the most likely one.
    return torch.where(likeliest, logits - others, logarithms - torch.log1p(-logarithms.exp()))


def as_keys(scores: Tensor) -> Tensor:
    """Return integers in the order of the scores, from -2^39 to 2^39 - 1, from their bits."""
    if scores.dtype == torch.float64:
        integers = torch.int64
        mantissa_bits = 52
        bias = 1023
    else:
        integers = torch.int32
        mantissa_bits = 23
        bias = 127
    highest = 2.0 ** (2**EXPONENT_BITS + LOWEST_EXPONENT - 2)
    highest = min(highest, torch.finfo(scores.dtype).max)
    sizes = scores.abs().clamp(max=highest).view(integers).long()
    surplus = mantissa_bits - MANTISSA_BITS
    sizes = sizes >> surplus if surplus > 0 else sizes << -surplus
    sizes = (sizes - ((bias + LOWEST_EXPONENT) << MANTISSA_BITS)).clamp(min=0)
    return torch.where(scores < 0, -1 - sizes, sizes)
