"""The area under the receiver operating characteristic, from counts that add over batches.

Scores are counted in histograms of several resolutions. The coarsest one covers all scores; each
finer one is wrapped around: a score falls into the bin of its number modulo the number of bins.
Which of the numbers that share a bin was meant follows from the coarser histogram, so that scores
of any magnitude and offset are told apart.

One histogram cannot do that: scores may have offsets of 100 and more, where the bins that cover all
scores are wide. With 65,536 bins, the area of 20,000 normal scores of deviation 1 is 0.003 off at
an offset of 100, and 0.09 at 1000.

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

from .metrics import class_rows, mean_of, wide

MANTISSA_BITS = 31  # an offset of 2^20 standard deviations leaves 2^11 steps in each
EXPONENT_BITS = 8
LOWEST_EXPONENT = -120  # scores between -2^-120 and 2^-120 count as 0
KEY_BITS = 1 + EXPONENT_BITS + MANTISSA_BITS
STEP_BITS = 4  # a bin of one histogram is 2^4 bins of the next
MOST_BINS = 2**18  # of one resolution, of all classes together, if each has 1,024 at least
WORTH = 1e-7  # a bin that holds a smaller share of all pairs is not resolved further


@metrics.register("auroc", aliases=["auc"])
class AreaUnderCurve(Metric):
    """The chance that a sample of a class gets a higher score than another does.

    The area under the receiver operating characteristic (Hanley and McNeil 1982), within about
    0.001 of the exact one. The score of a class is the logarithm of its odds, log p - log(1 - p),
    which does not saturate as p does; that of a label is its logit. It is a mean over
    classes, or labels.
    """

    name = "auroc"
    targets: ClassVar[tuple[str, ...]] = ("class", "labels")

    def __init__(self, bins: Annotated[int, Range("[2, inf)")] = 4096):
        """Say how finely.

        Args:
            bins: of each of the histograms of scores, of which there are eight with 4096 bins;
                fewer for more than 64 classes, down to 1,024 for 256 and more, to save memory.
        """
        self.bins = bins

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return counts of the others and of a class's own, (2, classes, histograms, bins)."""
        if targets.is_floating_point():
            scores = wide(outputs).reshape(len(outputs), -1)
            own = same_shape(outputs, targets).reshape(scores.shape) > 0.5
            counted = torch.ones_like(own)
        else:
            rows, targets = class_rows(outputs, targets)
            scores = log_odds(wide(rows))
            own = targets.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
            counted = (targets >= 0).unsqueeze(1).expand_as(own)
        classes = scores.shape[1]
        bins = min(self.bins, max(1024, MOST_BINS // classes))
        shifts = shifts_of(bins)
        keys = as_keys(scores)
        wrapped = torch.stack([(keys >> shift) % bins for shift in shifts], dim=2)
        kind = torch.arange(classes, device=scores.device) + classes * own
        level = torch.arange(len(shifts), device=scores.device)
        histogram = kind.unsqueeze(2) * len(shifts) + level
        cells = histogram * bins + wrapped
        weights = torch.where(scores.isnan(), torch.nan, 1.0) * counted
        weights = weights.float().unsqueeze(2).expand_as(cells)
        counts = torch.zeros(2 * classes * len(shifts) * bins, device=scores.device)
        counts = counts.scatter_add(0, cells.flatten(), weights.flatten())
        return counts.reshape(2, classes, len(shifts), bins)

    def compute(self, sums: Tensor) -> float:
        if sums.ndim != 4:  # of an older version, from a checkpoint
            return float("nan")
        if sums.isnan().any():
            return float("nan")
        areas = []
        for others, own in zip(*sums, strict=True):
            pairs = others[0].sum() * own[0].sum()
            if pairs > 0:
                areas.append(area(torch.stack([others, own])) / pairs)
        return mean_of(torch.stack(areas)) if areas else float("nan")


def shifts_of(bins: int) -> list[int]:
    """Return by how many bits a key is shifted for each histogram, the coarsest one first."""
    coarsest = KEY_BITS - (bins.bit_length() - 1)
    return [*range(coarsest, 0, -STEP_BITS), 0]


def area(histograms: Tensor) -> Tensor:
    """Return the pairs whose own score is the higher one, and half of those with equal scores.

    histograms: counts of the others and of the own, (2, histograms, bins).
    """
    place, counts = resolve(histograms)
    others, own = counts[:, place.argsort()]
    below = others.cumsum(0) - others / 2
    return (own * below).sum()


def resolve(histograms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least keys of the bins worth telling apart, and their counts, (2, bins)."""
    bins = histograms.shape[2]
    pairs = histograms[:, 0].sum(1).prod()
    coarser, *finer = shifts_of(bins)
    place = torch.arange(bins) - bins // 2
    counts = histograms[:, 0, place % bins]
    settled_places = []
    settled_counts = []
    for level, shift in enumerate(finer, 1):
        worth = counts.prod(0) > WORTH * pairs
        settled_places.append(place[~worth] << coarser)
        settled_counts.append(counts[:, ~worth])
        children = torch.arange(2 ** (coarser - shift))
        place = (place[worth].unsqueeze(1) << (coarser - shift)) + children
        background = torch.cat(settled_counts, dim=1).sum(1) / bins
        shared = []
        for kind in range(2):
            coarse, wrapped = counts[kind, worth], histograms[kind, level]
            shared.append(share_out(coarse, wrapped, place % bins, background[kind]).flatten())
        counts = torch.stack(shared)
        place = place.flatten()
        coarser = shift
    return torch.cat([*settled_places, place]), torch.cat([*settled_counts, counts], dim=1)


def share_out(counts: Tensor, histogram: Tensor, bins: Tensor, background: Tensor) -> Tensor:
    """Return the counts of bins as those of the finer bins inside, (bins, inside).

    Of a wrapped bin that belongs to several coarser ones, each gets a share in proportion to its
    own count; then the finer counts of each are brought to the sum that is known.

    Args:
        counts: of the coarser bins, (bins,).
        histogram: the wrapped, finer one.
        bins: where in it the finer bins are counted, (bins, inside).
        background: what each wrapped bin holds, on average, of bins that are not resolved.
    """
    inside = bins.shape[1]
    expected = (counts / inside).unsqueeze(1).expand_as(bins)
    crowd = torch.full_like(histogram, float(background))
    crowd = crowd.index_add(0, bins.flatten(), expected.flatten())
    found = expected * (histogram / crowd.clamp_min(1e-300))[bins]
    total = found.sum(1, keepdim=True)
    return torch.where(total > 0, found * (counts.unsqueeze(1) / total.clamp_min(1e-300)), expected)


def log_odds(logits: Tensor) -> Tensor:
    """Return log p - log(1 - p) of each class, without p itself, which may round to 0 or 1."""
    if logits.shape[1] == 2:
        return logits - logits.flip(1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    likeliest = logits.argmax(1, keepdim=True) == classes
    logarithms = logits.log_softmax(1)
    others = logits.masked_fill(likeliest, -torch.inf).logsumexp(1, keepdim=True)
    # 1 - p has its digits where p is at most 1/2, and that is so for every class but the likeliest.
    return torch.where(likeliest, logits - others, logarithms - torch.log1p(-logarithms.exp()))


def as_keys(scores: Tensor) -> Tensor:
    """Return integers in the order of the scores, from -2^39 to 2^39 - 1, made of their bits."""
    if scores.dtype == torch.float64:
        integers, mantissa_bits, bias = torch.int64, 52, 1023
    else:
        integers, mantissa_bits, bias = torch.int32, 23, 127
    highest = 2.0 ** (2**EXPONENT_BITS + LOWEST_EXPONENT - 2)
    highest = min(highest, torch.finfo(scores.dtype).max)
    sizes = scores.abs().clamp(max=highest).view(integers).long()
    surplus = mantissa_bits - MANTISSA_BITS
    sizes = sizes >> surplus if surplus > 0 else sizes << -surplus
    sizes = (sizes - ((bias + LOWEST_EXPONENT) << MANTISSA_BITS)).clamp(min=0)
    return torch.where(scores < 0, -1 - sizes, sizes)
