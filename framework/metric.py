"""The contract of a metric: sums that add over batches, and a formula over the sums."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
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


class Measures:
    """The mean loss and some metrics over the batches added since the last reading, as sums on the device."""

    def __init__(self, metrics: Sequence[Metric], device: torch.device):
        self.metrics = list(metrics)
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.loss = torch.zeros(2, dtype=self.dtype, device=device)
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor, count: int | Tensor) -> None:
        """Add a batch: its mean loss over `count` items, its outputs and targets. Reads nothing off the device."""
        if isinstance(count, Tensor):
            self.loss += torch.stack([loss.detach().to(self.dtype) * count, count.to(self.dtype)])
        else:
            self.loss[0].add_(loss.detach(), alpha=count)
            self.loss[1].add_(count)
        fresh = [metric.sums(outputs.detach(), targets).to(self.dtype) for metric in self.metrics]
        if self.sums:
            for total, part in zip(self.sums, fresh, strict=True):
                total += part
        else:
            self.sums = fresh

    def read(self) -> dict[str, float]:
        """Return {"loss": ..., "accuracy": ...} over what was added, in one transfer, and begin anew."""
        sizes = [2, *(total.numel() for total in self.sums)]
        flat = torch.cat([self.loss, *(total.reshape(-1) for total in self.sums)]).to("cpu", torch.float64)
        parts = flat.split(sizes)
        values = {"loss": float(parts[0][0] / parts[0][1])}
        for metric, total, part in zip(self.metrics, self.sums, parts[1:], strict=False):
            values[metric.name] = metric.compute(part.reshape(total.shape))
        self.loss.zero_()
        self.sums = []
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading."""
        return {"loss": self.loss.clone(), "sums": [total.clone() for total in self.sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; sums of other metrics than these are left."""
        self.loss.copy_(state["loss"])
        if len(state["sums"]) in (0, len(self.metrics)):
            self.sums = [total.to(self.loss) for total in state["sums"]]
