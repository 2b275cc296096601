"""The contract of a metric: sums that add over batches, and a formula over the sums."""

from typing import ClassVar, Literal

from torch import Tensor


class Metric:
    """A measure of predictions against targets, held as sums, so that batches of any size add up exactly.

    The Trainer keeps the sums in float64 on the device and reads them only when it logs.
    A metric that is told apart by a setting (top-3) sets `name` in its `__init__`.
    """

    name: str = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    targets: ClassVar[tuple[str, ...]] = ("class", "labels", "value")
    """The kinds of target that it measures (see `Data.target`)."""

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the batch's sums, a tensor of fixed shape, on the outputs' device.

        outputs: (batch, classes) logits, (batch, labels) logits or (batch, values); targets as in `Data.target`.
        """
        raise NotImplementedError

    def compute(self, sums: Tensor) -> float:
        """Return the value from the sums over all batches (a float64 tensor on the CPU)."""
        raise NotImplementedError
