"""Your own parts. After installation they are found by name: `framework show bent_identity`."""

import torch
from torch import Tensor, nn

from framework import Metric, PositiveFloat, activations, metrics


@activations.register("bent_identity")
class BentIdentity(nn.Module):
    """x + (√(x² + b²) - b) / 2: the identity with a bend at 0.

    Args:
        bend: b, the width of the bend.
    """

    def __init__(self, bend: PositiveFloat = 1.0):
        super().__init__()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x * x + self.bend**2).sqrt() - self.bend) / 2


@metrics.register("confidence")
class Confidence(Metric):
    """The mean probability of the predicted class; above the accuracy, a model is overconfident."""

    name = "confidence"
    targets = ("class",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        highest = outputs.softmax(1).amax(1)
        return torch.stack([highest.sum(), torch.full_like(highest, 1).sum()])

    def compute(self, sums: Tensor) -> float:
        total, number = sums.tolist()
        return total / number
