"""The contract of a logger, which records scalars, texts, images and more of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Logger:
    """Base of all loggers. Each method may be left out.

    Tags begin with "train/", "val/" or "test/" and are the same for all loggers:

        class PrintScalars(Logger):
            def scalars(self, values, *, step, epoch, wall_seconds):
                print(step, values)
    """

    def open(self, folder: Path | None, step: int, metrics: Sequence[str]) -> None:
        """Begin to record, or continue if the run resumes.

        Args:
            folder: the folder of the run, or None.
            step: the step at which the run starts; 0 if it does not resume.
            metrics: the names of the measured values: "loss", "accuracy", ...
        """

    def scalars(
        self, values: dict[str, float], *, step: int, epoch: int, wall_seconds: float
    ) -> None:
        """Record values of a step.

        Args:
            values: numbers by tag.
            step: the optimizer steps done.
            epoch: the epochs done.
            wall_seconds: seconds since the run began.
        """

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Record a text in Markdown."""

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Record the distribution of the elements of a tensor."""

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Record images, shape (N, C, H, W), values in [0, 1]."""

    def audio(self, tag: str, waves: Tensor, rate: int, step: int) -> None:
        """Record sounds.

        Args:
            tag: the name.
            waves: amplitudes in [-1, 1], shape (N, samples).
            rate: samples per second.
            step: the optimizer steps done.
        """

    def pr_curve(self, tag: str, labels: Tensor, scores: Tensor, step: int) -> None:
        """Record precision and recall of a binary decision at all thresholds.

        Args:
            tag: the name.
            labels: whether a sample is positive, bool of shape (N,).
            scores: the probability that it is, in [0, 1], shape (N,).
            step: the optimizer steps done.
        """

    def embedding(
        self,
        tag: str,
        vectors: Tensor,
        labels: Sequence[str],
        step: int,
        images: Tensor | None = None,
    ) -> None:
        """Record points of a space of several dimensions; a later call for a tag replaces them.

        Args:
            tag: the name.
            vectors: the points, shape (N, D).
            labels: a text for each point.
            step: the optimizer steps done.
            images: a thumbnail for each point, shape (N, 1 or 3, H, W), values in [0, 1].
        """

    def charts(self, title: str, charts: Mapping[str, str]) -> None:
        """Show several scalars in one chart, for all of the run; call it in `on_fit_start`.

        Args:
            title: of the charts together.
            charts: the prefix of the tags in each chart, by the name of the chart.
        """

    def graph(self, model: nn.Module, inputs: Any) -> None:
        """Record the graph of the model, traced with some inputs.

        Args:
            model: the model of the run.
            inputs: shape (samples, *in_shape). For a model with several arguments, a tuple of the
                positional arguments, or a dict of the keyword arguments.
        """

    def hparams(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the settings of the run together with its final metrics."""

    def close(self) -> None:
        """Write everything to the disk. Called once, also if the run fails."""
