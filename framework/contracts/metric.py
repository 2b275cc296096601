"""The contract of a metric: sums that add over batches, and a formula over the sums.

`Measures` keeps the sums of the loss and of all metrics of a run.
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from framework.data.dataset import Scale
from framework.errors import DataError, SettingError, short

from .alignment import call_aligned
from .loss import portion
from .loss_properties import describe_outputs
from .strategy import Strategy


class Metric:
    """A measure of outputs against targets. It is computed from sums, so that batches add exactly.

    The Trainer keeps the sums in float64 on the device, and reads them only when it logs.

        class MeanAbsoluteError(Metric):
            name = "mae"
            better = "lower"
            targets = ("value",)

            def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
                error = (outputs - targets).abs()
                return torch.stack([error.sum(), error.new_tensor(error.numel())])

            def compute(self, sums: Tensor) -> float:
                return float(sums[0] / sums[1])

    Attributes:
        name: by which it is logged. A metric whose name depends on a setting, such as top-3, sets
            it in `__init__`.
        better: whether higher or lower values are better.
        targets: the kinds of targets that it measures (see `Data.target`).
    """

    name: str = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    targets: ClassVar[tuple[str, ...]] = ("class", "labels", "value")

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of a batch.

        Args:
            outputs: logits of shape (batch, classes) or (batch, labels), or values of shape
                (batch, values).
            targets: class indices, labels or values (see `Data.target`).

        Returns:
            A tensor on the device of the outputs, whose shape is the same for all batches.
        """
        raise NotImplementedError

    def compute(self, sums: Tensor) -> float:
        """Return the value of the metric.

        Args:
            sums: the total of `sums` over all batches, float64 on the CPU.
        """
        raise NotImplementedError


class InUnits(Metric):
    """A metric of scaled targets, computed in their original unit and in float64."""

    def __init__(self, metric: Metric, scale: Scale):
        self.metric = metric
        self.scale = scale
        self.name = metric.name
        # Attributes of this object, though a metric declares them for its class.
        self.better = metric.better  # type: ignore[misc]
        self.targets = metric.targets  # type: ignore[misc]

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of the wrapped metric for unscaled outputs and targets."""
        return self.metric.sums(
            self.scale.inverse_transform(outputs), self.scale.inverse_transform(targets)
        )

    def compute(self, sums: Tensor) -> float:
        """Return the value of the wrapped metric."""
        return self.metric.compute(sums)


class BufferedBatch(NamedTuple):
    """A batch that is not summed up yet.

    Attributes:
        loss: its mean loss, shape ().
        items: the number of items that the mean is over.
        outputs: shape (batch, ...); None if no metric needs them.
        targets: shape (batch, ...); None if no metric needs them.
        values: other means over the items, by name.
    """

    loss: Tensor
    items: int | Tensor
    outputs: Tensor | None
    targets: Tensor | None
    values: Mapping[str, Tensor] = {}

    def known_items(self) -> int | None:
        """Return the number of items; None if only the device knows it."""
        return None if isinstance(self.items, Tensor) else self.items

    def form(self) -> Any:
        """Return a value that is equal for batches that can be concatenated."""
        return [(t.shape[1:], t.dtype) for t in (self.outputs, self.targets) if t is not None]


Mark = tuple[Tensor, list[Tensor], dict[str, Tensor], list[BufferedBatch], int]


def concatenated(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors as one, along the first axis; None if there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    if len(present) == 1:
        return present[0]
    return torch.cat(present)


def sums_of(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of a metric for a batch.

    Raises:
        DataError: the metric broadcasts outputs and targets along the wrong axis.
        SettingError: `sums` does not return a tensor.
    """
    sums = call_aligned(f"the metric {metric.name}", metric.sums, outputs, targets)
    if not isinstance(sums, Tensor):
        raise SettingError(
            f"{type(metric).__name__}.sums: expected a tensor, got {type(sums).__name__}"
        )
    return sums


def add_sums(
    metric: Metric, before: Tensor | None, fresh: Tensor, restored: bool = False
) -> Tensor:
    """Return the sums of a metric after further batches.

    Args:
        metric: for messages.
        before: its sums so far; None before the first batch.
        fresh: the sums of the further batches.
        restored: whether `before` may come from a checkpoint, and so from another version of the
            metric. Then sums of another shape are dropped with a warning.

    Raises:
        SettingError: the shape of the sums changes.
    """
    if before is None:
        return fresh.clone()  # it may be a view of the outputs
    if before.shape == fresh.shape:
        return before + fresh
    if not restored:
        raise SettingError(
            f"{type(metric).__name__}.sums: expected the shape {tuple(before.shape)} of earlier "
            f"batches, got {tuple(fresh.shape)}"
        )
    warnings.warn(
        f"the metric {metric.name}: the checkpoint has sums of another version of this "
        "metric; the next logged value does not include them",
        stacklevel=2,
    )
    return fresh


def computed(metric: Metric, sums: Tensor) -> float:
    """Return the value of a metric.

    Raises:
        SettingError: `compute` does not return a number.
    """
    value = metric.compute(sums)
    if type(value) is float:
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(
            f"{type(metric).__name__}.compute: expected a number, got {describe_value(value)}"
        ) from None


def detached(name: str, value: Any) -> Tensor:
    """Return an additional mean of a task (see `Step.values`) without its autograd graph.

    Raises:
        SettingError: the value is not a tensor with one element.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise SettingError(
            f"the task's value {name!r}: expected a tensor with one number, "
            f"got {describe_value(value)}"
        )
    return value.detach()


def describe_value(value: Any) -> str:
    """Return a description of a value for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return short(value)


class Measures:
    """Sums of the loss and of metrics over the batches since the last reading, on the device.

    Small batches are buffered and summed up several at a time: for a small model, the sums of each
    single batch would be most of the cost of measuring.

    Args:
        metrics: the metrics; the loss is always measured.
        device: the device of the sums.
        max_buffered: the maximum number of batches in the buffer; 1 if their memory may be reused.
        strategy: the processes that measure parts of each batch; `read` and `agreed_empty` are
            collective.
    """

    large = 2**16  # elements of the buffered outputs, above which they are summed up at once

    def __init__(
        self,
        metrics: Sequence[Metric],
        device: torch.device,
        max_buffered: int = 16,
        strategy: Strategy | None = None,
    ):
        self.metrics = list(metrics)
        self.strategy = Strategy() if strategy is None else strategy
        self.max_buffered = max_buffered
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.loss = torch.zeros(2, dtype=self.dtype, device=device)  # the sum, the items
        self.sums: list[Tensor] = []
        self.restored = False  # whether `sums` may come from a checkpoint
        self.values: dict[str, Tensor] = {}  # by name: the sum, the items
        self.buffer: list[BufferedBatch] = []
        self.buffered_numbers = 0  # elements of the buffered outputs
        self.first_tensors: list[Tensor] = []  # of the first batch, until the second one comes
        self.checked_memory = self.max_buffered == 1

    def add(
        self,
        loss: Tensor,
        outputs: Tensor | None,
        targets: Tensor | None,
        count: int | Tensor,
        values: Mapping[str, Tensor] = {},
    ) -> None:
        """Add a batch, without reading the device.

        Args:
            loss: the mean loss of the batch, shape ().
            outputs: shape (batch, ...); None to leave the batch out of the metrics.
            targets: shape (batch, ...); None to leave the batch out of the metrics.
            count: the number of items that the mean is over.
            values: other means over the items, by name.

        Raises:
            DataError: there are metrics, and the outputs are not one tensor.
            SettingError: one of `values` is not a tensor with one element.
        """
        if self.metrics and outputs is not None and not isinstance(outputs, Tensor):
            raise DataError(
                f"metrics={self.metrics[0].name}: a metric takes outputs as one tensor, but the "
                f"task gives {describe_outputs(outputs)}: write a Task whose `step` returns "
                "Step(loss, outputs, targets) with a tensor"
            )
        means = values
        if values:
            means = {name: detached(name, value) for name, value in values.items()}
        if self.metrics and outputs is not None:
            batch = BufferedBatch(loss.detach(), count, outputs.detach(), targets, means)
        else:
            batch = BufferedBatch(loss.detach(), count, None, None, means)
        if not self.checked_memory:
            batch = self._check_memory(batch)
        if self.buffer and batch.form() != self.buffer[0].form():
            self._sum_up()
        self.buffer.append(batch)
        if batch.outputs is not None:
            self.buffered_numbers += batch.outputs.numel()
        if len(self.buffer) >= self.max_buffered or self.buffered_numbers > self.large:
            self._sum_up()

    def _check_memory(self, batch: BufferedBatch) -> BufferedBatch:
        """Find out from the first two batches whether their memory is reused.

        If a tensor of the second batch has the address of that of the first one, the model or the
        task reuses its memory, as a module replayed by a CUDA graph does. Then no further batch is
        buffered. The first batch is copied, since it is in the buffer by then.
        """
        tensors = [t for t in (batch.loss, batch.outputs, batch.targets) if t is not None]
        if not self.first_tensors:
            self.first_tensors = tensors
            loss = batch.loss.clone()
            if batch.outputs is None or batch.targets is None:
                return batch._replace(loss=loss)
            outputs = batch.outputs.clone()
            return batch._replace(loss=loss, outputs=outputs, targets=batch.targets.clone())
        for new, old in zip(tensors, self.first_tensors, strict=False):
            if new.data_ptr() == old.data_ptr():
                self._sum_up()
                self.max_buffered = 1
                break
        self.first_tensors = []
        self.checked_memory = True
        return batch

    @torch.no_grad()
    def _sum_up(self) -> None:
        """Add the buffered batches to the sums."""
        if not self.buffer:
            return
        for items, group in groupby(self.buffer, BufferedBatch.known_items):
            batches = list(group)
            losses = torch.stack([batch.loss for batch in batches]).to(self.dtype)
            if items is None:
                weights = torch.stack([torch.as_tensor(each.items) for each in batches])
                weights = weights.to(self.loss)
                self.loss += torch.stack([portion(losses, weights).sum(), weights.sum()])
            elif items:
                self.loss[0].add_(losses.sum(), alpha=items)
                self.loss[1].add_(items * len(batches))
        outputs = concatenated([batch.outputs for batch in self.buffer])
        targets = concatenated([batch.targets for batch in self.buffer])
        if outputs is not None and targets is not None:
            fresh = [sums_of(metric, outputs, targets).to(self.loss) for metric in self.metrics]
            before: list[Tensor | None] = [*self.sums] or [None] * len(fresh)
            triples = zip(self.metrics, before, fresh, strict=True)
            self.sums = [add_sums(*triple, self.restored) for triple in triples]
        self._sum_up_values()
        self.buffer = []
        self.buffered_numbers = 0

    def _sum_up_values(self) -> None:
        names: dict[str, None] = {}
        for batch in self.buffer:
            names.update(dict.fromkeys(batch.values))
        for name in names:
            batches = [batch for batch in self.buffer if name in batch.values]
            weights = torch.stack([torch.as_tensor(each.items).to(self.loss) for each in batches])
            means = torch.stack([each.values[name].to(self.dtype) for each in batches])
            total = torch.stack([portion(means, weights).sum(), weights.sum()])
            if name in self.values:
                total = self.values[name] + total
            self.values[name] = total

    @property
    def empty(self) -> bool:
        """Whether no batch was added since the last reading; it reads the device."""
        return not self.buffer and float(self.loss[1]) == 0

    def agreed_empty(self) -> bool:
        """Return whether no process has added a batch since the last reading (collective)."""
        return all(self.strategy.gather(self.empty))

    def read(self) -> dict[str, float]:
        """Return the means over all batches since the last reading, in one transfer (collective).

        Returns:
            Values by name, such as {"loss": 0.3, "accuracy": 0.9}.
        """
        self._collect()
        totals = [self.loss, *self.values.values(), *self.sums]
        numbers = torch.cat([total.reshape(-1) for total in totals]).to("cpu", torch.float64)
        parts = iter(torch.split(numbers, [total.numel() for total in totals]))
        values = {}
        for name in ["loss", *self.values]:
            part = next(parts)
            values[name] = float(part[0] / part[1])
        for metric, total in zip(self.metrics, self.sums, strict=False):
            values[metric.name] = computed(metric, next(parts).reshape(total.shape))
        self._clear()
        return values

    def take(self) -> dict[str, Any]:
        """Return the sums of this process since the last reading, and begin with new ones."""
        self._sum_up()
        state = self.state_dict()
        self._clear()
        return state

    def _clear(self) -> None:
        self.loss.zero_()
        self.sums = []
        self.values = {}
        self.restored = False

    def _collect(self) -> None:
        """Replace the sums by those over all processes; one without a batch has none."""
        self._sum_up()
        if self.strategy.world_size == 1:
            return
        states = self.strategy.gather(self.state_dict())
        self.load_state_dict(states[0])
        for state in states[1:]:
            self.add_state(state)
        self.restored = False

    def mark(self) -> Mark:
        """Return the present sums, for `undo`."""
        sums = list(self.sums)
        values = dict(self.values)
        return self.loss.clone(), sums, values, list(self.buffer), self.buffered_numbers

    def undo(self, mark: Mark) -> None:
        """Remove the batches that were added since `mark`."""
        loss, sums, values, buffer, self.buffered_numbers = mark
        self.loss.copy_(loss)
        self.sums = list(sums)
        self.values = dict(values)
        self.buffer = list(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading, and the buffer as a few tensors."""
        state: dict[str, Any] = {
            "loss": self.loss.clone(),
            "sums": [total.clone() for total in self.sums],
            "metrics": [metric.name for metric in self.metrics],
        }
        if self.values:
            state["values"] = dict(self.values)
        if not self.buffer:
            return state
        outputs = [batch.outputs for batch in self.buffer]
        losses = [batch.loss for batch in self.buffer]
        counts = [batch.items for batch in self.buffer]
        sizes = [0 if each is None else len(each) for each in outputs]
        targets = [batch.targets for batch in self.buffer]
        held: dict[str, Any] = {
            "losses": torch.stack(losses),
            "counts": counts,
            "sizes": sizes,
            "outputs": concatenated(outputs),
            "targets": concatenated(targets),
        }
        if any(batch.values for batch in self.buffer):
            held["values"] = [dict(batch.values) for batch in self.buffer]
        state["held"] = held
        return state

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the sums in a result of `state_dict`, as of another process."""
        other = Measures(self.metrics, self.loss.device, self.max_buffered)
        other.load_state_dict(state)
        self._sum_up()
        other._sum_up()
        self.loss += other.loss
        for name, total in other.values.items():
            before = self.values.get(name)
            self.values[name] = total if before is None else before + total
        if self.sums and other.sums:
            self.sums = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        else:
            self.sums = self.sums or other.sums

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a result of `state_dict`; the sums of other metrics are dropped."""
        device = self.loss.device
        self.loss.copy_(state["loss"])
        self.restored = True
        self.sums = []
        same_metrics = state["metrics"] == [metric.name for metric in self.metrics]
        if same_metrics:
            self.sums = [total.to(self.loss) for total in state["sums"]]
        self.values = {name: total.to(self.loss) for name, total in state.get("values", {}).items()}

        held = state.get("held", {"losses": (), "counts": (), "sizes": ()})
        batches = len(held["sizes"])
        outputs: Sequence[Tensor | None] = [None] * batches
        targets: Sequence[Tensor | None] = [None] * batches
        if same_metrics and held.get("outputs") is not None:
            outputs = torch.split(held["outputs"].to(device), held["sizes"])
            targets = torch.split(held["targets"].to(device), held["sizes"])
        means = held.get("values", [{}] * batches)
        rows = zip(held["losses"], held["counts"], outputs, targets, means, strict=True)
        self.buffer = []
        self.buffered_numbers = 0
        for loss, items, output, target, values in rows:
            own = {name: value.to(device) for name, value in values.items()}
            self.buffer.append(BufferedBatch(loss.to(device), items, output, target, own))
            if output is not None:
                self.buffered_numbers += output.numel()


def predicted_classes(outputs: Tensor) -> Tensor:
    """Return the class with the highest output, shape (batch, ...).

    A row with NaN is no prediction: its result is the number of classes, which is no class.

    Args:
        outputs: shape (batch, classes, ...).
    """
    highest, classes = outputs.max(1)
    return torch.where(highest.isnan(), outputs.shape[1], classes)
