"""The contract of a logger: where a run's scalars, texts and pictures go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Logger:
    """Every method may be left out. Keys are `train/...`, `val/...`, `test/...`, the same in every logger."""

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Begin (or go on) at a step. `folder`: the run's, or None. `metrics`: "loss", "accuracy" ..."""

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Record values at a step."""

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Record a text."""

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Record a distribution."""

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Record pictures, (N, C, H, W) in [0, 1]."""

    def graph(self, model: nn.Module, inputs: Tensor) -> None:
        """Record the model's graph."""

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the settings of the run beside its final metrics."""

    def close(self) -> None:
        """Write out everything; called once, also when the run fails."""
