"""Runs a model without training it: measures it on data, or predicts with it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .batches import Batches, Source, as_batches
from .data import Batch, Data, TensorSplit
from .device import Format, Precision, deterministic_algorithms, find_device
from .errors import DataError, SettingError
from .memory import MicroBatches, OutOfMemory, memory_errors
from .metric import Measures, Metric
from .task import LossTask, Task


class Evaluator:
    """What evaluates and predicts. A Trainer is one that fits too."""

    model: nn.Module
    task: Task

    def __init__(self, device: str, precision: Format, deterministic: bool, seed: int, micro_batches: MicroBatches):
        self.device = find_device(device)
        self.precision = Precision(precision, self.device)
        self.deterministic, self.seed, self.micro_batches = deterministic, seed, micro_batches
        self.metrics: list[Metric] = []

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
        """Return {"test/loss": ..., "test/accuracy": ...} of the fitted (or given) model on a split or loader.

        Of a `Data`, the split `name` is taken. While a trainer is open (`with trainer:`), loggers get the values too.
        """
        self._use(model, task, "model", "task")
        if metrics is not None:
            self.metrics = list(metrics)
        if isinstance(data, Data):
            data = getattr(data, name, data)
        if data is None:
            raise DataError(f"the data has no {name} split")
        values = self._measure(self._batches(data, batch_size))
        named = {f"{name}/{key}": value for key, value in values.items()}
        self._report(named)
        return named

    def predict(
        self,
        data: Source | Tensor,
        *,
        model: nn.Module | None = None,
        task: Task | Callable[[Tensor, Tensor], Tensor] | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Return the model's outputs for inputs (rows, *in_shape), or for every sample of a split.

        They are on the CPU, and float32, or float64 if the model's are.
        """
        self._use(model, task, "model")
        batches = self._batches(TensorSplit(data) if isinstance(data, Tensor) else data, batch_size)
        with self._inference():
            outputs = []
            for batch in batches.epoch():
                for part in self.micro_batches.split(self._place(batch)):
                    found = self.model(part[0])
                    wide = torch.promote_types(found.dtype, torch.float32)
                    outputs.append(found.to(wide).cpu())
        if not outputs:
            raise DataError("there is nothing to predict: the inputs have no row")
        return torch.cat(outputs)

    def _measure(self, batches: Batches) -> dict[str, float]:
        """Return the loss and metrics of the model over all batches, in eval mode. Raises DataError for no batch."""
        while True:
            try:
                return self._measure_once(batches)
            except OutOfMemory as error:
                if not self.micro_batches.halve(error):
                    raise

    def _measure_once(self, batches: Batches) -> dict[str, float]:
        measures = Measures(self.metrics, self.device, batches.hold)
        with self._inference():
            for batch in batches.epoch():
                for part in self.micro_batches.split(self._place(batch)):
                    loss, outputs, targets, values = self.task.step(self.model, part)
                    measures.add(loss, outputs, targets, self.task.count(part), values)
            if measures.empty:
                raise DataError("the data to measure on has no batch: it is empty")
            return measures.read()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        deterministic = deterministic_algorithms(self.deterministic)
        with self.precision.inference(self.model), deterministic, memory_errors(self.device):
            yield

    def _use(self, model: nn.Module | None, task: Task | Callable | None, *needed: str) -> None:
        if model is not None:
            self.model = model.to(self.device)
        if task is not None:
            self.task = task if isinstance(task, Task) else LossTask(task)
        for name in needed:
            if not hasattr(self, name):
                raise SettingError(f"nothing was fitted yet: pass `{name}=`")
        criterion = getattr(getattr(self, "task", None), "criterion", None)
        if criterion is not None:
            criterion.to(self.device)

    def _report(self, values: dict[str, float]) -> None:
        """Do with measured values what else there is to do."""

    def _batches(self, source: Source, batch_size: int, *, shuffle: bool = False) -> Batches:
        return as_batches(source, batch_size, shuffle=shuffle, seed=self.seed, device=self.device)

    def _place(self, batch: Batch) -> Batch:
        if all(tensor.device == self.device for tensor in batch):
            return batch
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
