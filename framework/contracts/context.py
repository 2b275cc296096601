"""What callbacks, loggers and tasks may read and do during a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.data.accumulation import Batches, Source
from framework.runtime.clock import Clock
from framework.runtime.memory import MicroBatches
from framework.runtime.precision import Precision

from .logger import Logger
from .metric import Measures, Metric
from .state import Cadence, State
from .task import Task


class Context(Protocol):
    """A run, as each event of a callback gets it. The Trainer is one.

    Read anything here at any event. Change parameters and modules of the model, groups of the
    optimizer and gradients in place; of the attributes, only `accumulate` and `schedule` may be
    replaced.

    Attributes:
        state: counters, the last value of every logged scalar, and why the run stops.
        model: the module in training, on `device`.
        task: what a step means: forward pass, loss, what metrics see.
        optimizer: over the parameters of the model.
        schedule: step -> factor on the learning rate of each group; None for a constant rate.
        metrics: measured in training and validation, besides the loss.
        callbacks: all of the run, this one included, in the order in which events reach them.
        loggers: get every scalar by `log`; a callback gives them texts, pictures and histograms.
        device: of the model and of the batches that the task gets.
        precision: `autocast()` for a forward pass in training, `inference(model)` for a
            measurement; `scaler` for fp16, else None.
        folder: of the run, where callbacks write their files; None for a run without one.
        manifest: facts of the run that its checkpoints keep.
        seed: of everything random in training.
        train_batches: `epoch(number)` yields the training batches, on the device or not; `split`
            is the split that they are read from, or None.
        val_batches: the same of the validation split; None without one.
        max_epochs, max_steps: the limits of the run, at least one of them; the first that is
            reached ends it.
        accumulate: batches whose gradients make one step.
        micro_batches: `split(batch)` cuts a batch as the step does when memory is short.
        log_every: when training values are read from the device and logged.
        measures: sums of the loss and the metrics over the training batches since the last log.
        loss: mean loss of the last step, a scalar on the device; reading it waits for the device.
        clock: where the time of the fit went; `part(name)` adds the time of a `with` block.
        at_boundary: no step is under way, so that a run can go on exactly from `capture()`.
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
    clock: Clock
    at_boundary: bool
    resumed_from: int | None
    optimizer_settings: list[dict[str, Any]]

    @property
    def compile(self) -> str:
        """What `torch.compile` compiles; "off" for nothing."""

    @property
    def cuda_graph(self) -> str:
        """Whether a step is replayed as a CUDA graph; "off" if not."""

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Log values with this step.

        Args:
            values: by tag, such as "weights/largest": numbers, or tensors with one number, which
                are read when the step is done.

        Raises SettingError for a value that is no number.
        """

    def stop(self, by: str, reason: str, signal: Signals | None = None) -> None:
        """End the run after the step under way. If several callbacks do, the first reason stays.

        Args:
            by: the name of the callback, such as "early_stop".
            reason: a text for people, shown as "by: reason".
            signal: the signal that ends the run; only the framework sets it.
        """

    def sample_indices(self) -> list[int] | None:
        """Return which samples of the training split the step under way reads.

        None for batches of the user's own.
        """

    def evaluate(
        self,
        data: Source,
        *,
        batch_size: int = 256,
        name: str = "test",
    ) -> dict[str, float]:
        """Measure the model on a split or loader, log the values and return them."""

    def predict(self, data: Source | Tensor, *, batch_size: int = 256) -> Tensor:
        """Return the outputs of the model for inputs or for every sample of a split, on the CPU."""

    def capture(self) -> dict[str, Any]:
        """Return all that the next steps depend on, in plain types and tensors.

        The tensors are those in use, which the next step changes: copy or write them before.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what `capture` returns, for `fit(resume=...)`."""
