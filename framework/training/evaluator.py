"""Evaluation and prediction with a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.fields import first_tensor
from framework.contracts.loss_properties import describe_outputs
from framework.contracts.metric import Measures, Metric
from framework.contracts.strategy import Strategy
from framework.contracts.task import LossTask, Task
from framework.data.accumulation import Batches, Source, as_batches, known_targets
from framework.data.batch_slice import WHOLE, with_stand_ins
from framework.data.dataset import Batch, Data, ForeignLoader, TensorSplit, split_of
from framework.errors import DataError, SettingError
from framework.errors.torch_errors import torch_errors
from framework.runtime import seeds
from framework.runtime.batch import (
    count_rows,
    join_rows,
    map_tensors,
    move_batch,
    tensors_of,
)
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.device import find_device
from framework.runtime.dtensors import has_dtensors
from framework.runtime.memory import MicroBatches, memory_errors, versions
from framework.runtime.memory_format import ChannelsLast
from framework.runtime.precision import Format, Precision

from .agreement import compared, share_generators
from .shards import ShardedMeasures, slice_of
from .step_checks import check_input_dtype, check_result, count_of
from .validation import (
    check_batch_size,
    check_evaluated_rows,
    check_metrics,
    check_source,
    check_task,
)


class Evaluator:
    """Evaluates a model and predicts with it. A Trainer is one that also trains."""

    model: nn.Module
    task: Task

    def __init__(
        self,
        device: str,
        precision: Format,
        deterministic: bool,
        seed: int,
        micro_batches: MicroBatches,
        strategy: Strategy | None = None,
        shards: int | None = None,
    ):
        self.strategy = Strategy() if strategy is None else strategy
        self.device = self.strategy.start(find_device(device))
        self.precision = Precision(precision, self.device)
        self.deterministic = deterministic
        self.seed = seed
        self.micro_batches = micro_batches
        self.shards = shards
        self.metrics: list[Metric] = []
        self._checked_first = False  # whether the task has checked a step of this measurement

    @seeds.measuring()
    def evaluate(
        self,
        data: Source,
        *,
        model: nn.Module | None = None,
        task: Task | Callable[[Tensor, Tensor], Tensor] | None = None,
        metrics: Sequence[Metric] | None = None,
        batch_size: int = 256,
        name: str = "test",
    ) -> dict[str, float]:
        """Measure a model on a split or loader.

        While a trainer is open (`with trainer:`), its loggers receive the values.

        Args:
            data: a split, an iterable of batches, or a `Data`, of which the split `name` is taken.
            model: a model other than the fitted one.
            task: a `Task`, or a loss of (outputs, targets); by default that of the fit.
            metrics: measured in addition to the loss; by default those of the fit.
            batch_size: samples in a batch, for a split.
            name: prefix of the tags.

        Returns:
            Values by tag, such as {"test/loss": 0.3, "test/accuracy": 0.9}.

        Raises:
            DataError: there is no data, or it does not fit the task.
            FrameworkError: another thread of the process fits.
        """
        if task is not None:
            check_task(task)
        self._use(model, task, "model", "task")
        if metrics is not None:
            self.metrics = check_metrics(metrics)
        if isinstance(data, Data):
            data = getattr(data, name, data)
        if data is None:
            raise DataError(f"the data has no {name} split")
        check_source("data", data, isinstance(self.task, LossTask))
        batches = self._batches(data, batch_size)
        self._checked_first = False
        all_kept = self.task.all_kept
        self.task.know_targets(known_targets(self.task.fields.known_targets, batches))
        try:
            values = self._measure(batches)
        finally:
            self.task.all_kept = all_kept
        named = {f"{name}/{key}": value for key, value in values.items()}
        self._report(named)
        return named

    @contextmanager
    def reading(
        self, data: Source, *, model: nn.Module, task: Task, batch_size: int = 256
    ) -> Iterator[Batches]:
        """Prepare to read data for other measurements than `evaluate`; yield its batches.

        Args:
            data: a split, or an iterable of batches.
            model: moved to the device.
            task: becomes that of this object, as the model.
            batch_size: samples in a batch, for a split.
        """
        self._use(model, task)
        batches = self._batches(data, batch_size)
        all_kept = task.all_kept
        task.know_targets(known_targets(task.fields.known_targets, batches))
        deterministic = deterministic_algorithms(self.deterministic)
        try:
            with seeds.measuring(), deterministic, memory_errors(self.device), torch_errors():
                yield batches
        finally:
            task.all_kept = all_kept

    @seeds.measuring()
    def predict(
        self,
        data: Source | Tensor | Mapping[str, Tensor],
        *,
        model: nn.Module | None = None,
        task: Task | Callable[[Tensor, Tensor], Tensor] | None = None,
        batch_size: int = 256,
    ) -> Any:
        """Return the outputs of a model for inputs, or for each sample of a split.

        Args:
            data: inputs of shape (samples, *in_shape), a dict of them by field, a split, or an
                iterable of batches.
            model: a model other than the fitted one.
            task: as for `evaluate`; it calls the model (`Task.model_outputs`).
            batch_size: samples in a batch, for inputs and splits.

        Returns:
            The outputs, shape (samples, ...) on the CPU. bf16 and fp16 become float32. For a model
            with several outputs they have its structure, such as a dict of tensors.

        Raises:
            DataError: there is no sample, or an output is not a tensor of shape (samples, ...).
            FrameworkError: another thread of the process fits.
        """
        self._use(model, task, "model")
        if isinstance(data, Tensor):
            data = TensorSplit(data)
        elif isinstance(data, Mapping) and not isinstance(data, Data) and is_fields(data):
            data = split_of(data)
        check_source("data", data, needs_targets=False)
        batches = self._batches(data, batch_size)
        batches.slice = WHOLE  # each process returns all outputs
        outputs: list[Any] = []
        with self._inference():
            for batch in batches.epoch():
                for part in self.micro_batches.split(move_batch(batch, self.device)):
                    output = self._output(part)
                    outputs.append(map_tensors(on_cpu, output))
        if not outputs:
            raise DataError("predict: expected at least one sample, got none")
        try:
            return join_rows(outputs)
        except DataError as error:
            name = type(self.model).__name__
            raise DataError(
                f"predict: the outputs of {name} {error}; name one of them (task.output)"
            ) from error

    def _output(self, batch: Batch) -> Any:
        """Return the outputs of the model for a batch."""
        task: Task | None = getattr(self, "task", None)
        call = outputs_of if task is None else task.model_outputs
        try:
            output = self.strategy.forward(call, self.model, batch)
        except RuntimeError as error:
            check_input_dtype(error, self.model, batch)
            raise
        if not tensors_of(output):
            raise DataError(
                "predict: expected tensors from the model, but "
                f"{type(self.model).__name__} returns {describe_outputs(output)}"
            )
        return output

    def _measure(self, batches: Batches) -> dict[str, float]:
        """Return the loss and metrics of the model in evaluation mode over all batches.

        Raises:
            DataError: there is no batch.
        """
        measures = self._new_measures(batches)
        unused = Measures(self.metrics, self.device, batches.max_buffered)
        # The main process counts the rows of whole batches, which all processes read.
        counts_rows = self.strategy.is_main or not batches.slice.is_whole
        empty = True
        all_run = has_dtensors(self.model)  # each forward pass is collective
        if all_run:
            check_evaluated_rows(self.strategy, batches)
        if isinstance(batches, ForeignLoader):
            share_generators(self.strategy, batches)
        with self._inference():
            read = compared(self.strategy, batches, batches.epoch())
            for batch, counts in with_stand_ins(read, all_run):
                empty = False
                if not batch:
                    continue  # other processes have its rows
                moved = move_batch(batch, self.device)
                if not counts or not counts_rows:
                    self._measure_batch(moved, unused)
                    continue
                parts = measures.parts(moved) if isinstance(measures, ShardedMeasures) else [moved]
                for part in parts:
                    self._measure_batch(part, measures)
            if empty:
                raise DataError("the evaluation data has no batch: it is empty or was already read")
            return measures.read()

    def _new_measures(self, batches: Batches) -> Measures:
        if self.shards is None:
            return Measures(self.metrics, self.device, batches.max_buffered, self.strategy)
        own = self.shards // self.strategy.world_size
        return ShardedMeasures(self.metrics, self.device, batches.max_buffered, self.strategy, own)

    def _measure_batch(self, batch: Batch, measures: Measures) -> None:
        """Add a batch to the measures; with `micro_batch=auto` in parts that fit into memory."""
        if not self.micro_batches.auto:
            self._measure_parts(batch, measures)
            return
        mark = measures.mark()
        before = versions([batch])
        while True:
            try:
                self._measure_parts(batch, measures)
                return
            except (MemoryError, RuntimeError) as error:
                if not self.micro_batches.halve(error, versions([batch]) == before):
                    raise
            measures.undo(mark)  # not in `except`: its traceback keeps the tensors of the pass

    def _measure_parts(self, batch: Batch, measures: Measures) -> None:
        for part in self.micro_batches.split(batch):
            count = count_of(self.task, part)  # before the model may change the inputs
            try:
                result = self.strategy.forward(self.task.step, self.model, part)
            except RuntimeError as error:
                check_input_dtype(error, self.model, part)
                raise
            check_result(self.task, result)
            if not self._checked_first and count_rows(part) > 1:
                self.task.check_first(result)
                self._checked_first = True
            measures.add(result.loss, result.outputs, result.targets, count, result.values)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        deterministic = deterministic_algorithms(self.deterministic)
        inference = self.precision.inference(self.model)
        with inference, deterministic, memory_errors(self.device), torch_errors():
            yield

    def _use(
        self,
        model: nn.Module | None,
        task: Task | Callable[[Tensor, Tensor], Tensor] | None,
        *needed: str,
    ) -> None:
        """Set the model and the task, and move them to the device; None keeps the present ones.

        Raises:
            SettingError: one of the `needed` attributes was never set.
        """
        if model is not None:
            self.model = model.to(self.device)
        if task is not None:
            self.task = task if isinstance(task, Task) else LossTask(task)
            self.task.strategy = self.strategy
        for name in needed:
            if not hasattr(self, name):
                raise SettingError(f"nothing was fitted yet: pass `{name}=`")
        criterion = getattr(getattr(self, "task", None), "criterion", None)
        if criterion is not None:
            criterion.to(self.device)

    def _report(self, values: dict[str, float]) -> None:
        """Report the values of an evaluation; a Trainer logs them."""

    def _batches(
        self,
        source: Source,
        batch_size: int,
        *,
        shuffle: bool = False,
        channels_last: ChannelsLast = False,
    ) -> Batches:
        check_batch_size(batch_size)
        batches = as_batches(
            source,
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            device=self.device,
            channels_last=channels_last,
            model=self.model,
        )
        batches.slice = slice_of(self.strategy, self.shards)
        task: Task | None = getattr(self, "task", None)
        if not shuffle and task is not None and not task.splits_batches:
            batches.slice = WHOLE
        return batches


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """Return the outputs of a model for the first tensor, or for all fields of a dict."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(first_tensor(batch))


def is_fields(value: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is one of tensors by name."""
    return len(value) > 0 and all(
        isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items()
    )


def on_cpu(output: Tensor) -> Tensor:
    """Return a copy on the CPU: the tensor may share the memory of the batch or other outputs."""
    return output.to("cpu", at_least_float32(output.dtype), copy=True)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of predictions: float32 for smaller floats, since NumPy has no bf16."""
    small = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    return torch.float32 if small else dtype
