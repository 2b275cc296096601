"""The interface of a running fit for callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.data.accumulation import Batches, Source
from framework.data.dataset import Batch
from framework.runtime.clock import Clock
from framework.runtime.memory import MicroBatches
from framework.runtime.precision import Precision

from .logger import Logger
from .metric import Measures, Metric
from .state import Cadence, State
from .strategy import Strategy
from .task import Task


class Context(Protocol):
    """A running fit, which each event passes to the callbacks. The Trainer implements it.

    A callback may read everything at any event. It may change parameters and modules of the model,
    groups of the optimizer, and gradients in place. Of the attributes it may replace `accumulate`
    and `schedule` only.

    Attributes:
        state: counters, the last value of each logged scalar, and the reason to stop.
        model: the model in training, on `device`.
        task: computes outputs and the loss of a batch.
        optimizer: the optimizer over the parameters of the model.
        schedule: maps a step to a factor on the learning rate of each group; None for a constant
            rate.
        metrics: measured in training and validation, in addition to the loss.
        callbacks: all callbacks of the run, in the order in which they receive events.
        loggers: receive each scalar through `log`; a callback calls them for texts, images and
            histograms.
        device: the device of the model and of the batches that the task receives.
        precision: `autocast()` for a forward pass in training, `inference(model)` for a
            measurement; `scaler` for fp16, else None.
        strategy: the processes of the run; its collective methods must be called by all of them.
        folder: the folder of the run, where callbacks write their files; None without one.
        manifest: facts of the run that its checkpoints store.
        seed: the seed of all random numbers in training.
        train_batches: `epoch(number)` yields the training batches, on the device or not; `split` is
            the split that they are read from, or None.
        val_batches: the same for validation; None without validation data.
        max_epochs: limit of the run in epochs, or None. The run ends at the first limit reached.
        max_steps: limit of the run in optimizer steps, or None.
        accumulate: the number of batches in a step.
        micro_batches: `split(batch)` splits a batch as the step does when memory is short.
        log_every: the cadence at which values of training are read from the device and logged.
        measures: sums of the loss and metrics over the training batches since the last log.
        loss: the mean loss of the last step, shape () on the device; reading it synchronizes.
        batches: in `on_gradients` the batches of the step that have rows in this process, on the
            device and after all transforms; otherwise empty.
        clock: the time spent in parts of the fit; `part(name)` adds the time of a `with` block.
        at_boundary: no step is in progress, so that a run resumed from `capture()` is exact.
        resumed_from: the step that the fit resumed from, or None.
        optimizer_settings: the settings of the optimizer's groups when the fit began.
    """

    state: State
    model: nn.Module
    task: Task
    optimizer: Optimizer
    schedule: Callable[[int], float] | None
    metrics: list[Metric]
    callbacks: list[Any]  # of Callback, whose module imports this one
    loggers: list[Logger]
    device: torch.device
    precision: Precision
    strategy: Strategy
    folder: Path | None
    manifest: dict[str, Any]
    seed: int
    train_batches: Batches
    val_batches: Batches | None
    max_epochs: int | None
    max_steps: int | None
    accumulate: int
    micro_batches: MicroBatches
    log_every: Cadence
    measures: Measures
    loss: Tensor
    batches: Sequence[Batch]
    clock: Clock
    at_boundary: bool
    resumed_from: int | None
    optimizer_settings: list[dict[str, Any]]

    @property
    def stopping(self) -> bool:
        """Whether this process has a reason to end the run; the others may not know it yet."""

    @property
    def compile(self) -> str:
        """The part that `torch.compile` compiles: "off", "model", "step" or "auto"."""

    @property
    def step_kind(self) -> Literal["compiled", "eager"] | None:
        """The kind of steps that `compile=auto` has kept; None if it has kept none."""

    @property
    def cuda_graph(self) -> str:
        """Whether steps are replayed as a CUDA graph: "off", "on" or "auto"."""

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Log values with the current step.

        Args:
            values: numbers by tag, such as "weights/largest". Tensors must have one element; they
                are read when the step is done.

        Raises:
            SettingError: a value is not a number.
        """

    def stop(self, by: str, reason: str, signal: Signals | None = None) -> None:
        """End the run after the current step. Of several calls the first one counts.

        Args:
            by: the name of the callback, such as "early_stop".
            reason: a text for the user, printed as "by: reason".
            signal: the signal that ends the run; set by the framework only.
        """

    def sample_indices(self) -> list[int] | None:
        """Return the indices of the samples of the training split that the current step reads.

        None if the training data is not a split.
        """

    def evaluate(
        self,
        data: Source,
        *,
        batch_size: int = 256,
        name: str = "test",
    ) -> dict[str, float]:
        """Measure the model on a split or loader, log the values, and return them.

        Args:
            data: a split, a `Data` (of which the split `name` is measured), or a loader.
            batch_size: samples in a batch, for a split.
            name: prefix of the tags, as in "test/loss".
        """

    def predict(self, data: Source | Tensor, *, batch_size: int = 256) -> Tensor:
        """Return the outputs of the model, shape (samples, ...) on the CPU.

        Args:
            data: inputs of shape (samples, *in_shape), a split, or a loader.
            batch_size: samples in a batch, for inputs and splits.
        """

    def capture(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as plain types and tensors (collective).

        The tensors are not copied, and the next step changes them: copy or write them before.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the result of `capture`, for `fit(resume=...)`."""
