"""The contract of a metric: sums that add over batches, and a formula over the sums."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from framework.data.dataset import Scale
from framework.errors import DataError, SettingError, short

from .alignment import call_aligned
from .loss import describe_outputs, portion


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


class InUnits(Metric):
    """A metric that sees scaled values in their own unit, in float64."""

    def __init__(self, metric: Metric, scale: Scale):
        self.metric, self.scale, self.name = metric, scale, metric.name
        self.better, self.targets = metric.better, metric.targets  # type: ignore[misc]

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.metric.sums(
            self.scale.inverse_transform(outputs), self.scale.inverse_transform(targets)
        )

    def compute(self, sums: Tensor) -> float:
        return self.metric.compute(sums)


class BufferedBatch(NamedTuple):
    """A batch that is not summed up yet; without outputs and targets where no metric asks for them."""

    loss: Tensor
    items: int | Tensor
    outputs: Tensor | None
    targets: Tensor | None
    values: Mapping[str, Tensor] = {}

    def number(self) -> float | None:
        """The number of items, if it can be known without reading the device."""
        return None if isinstance(self.items, Tensor) else self.items

    def form(self) -> Any:
        """Equal for batches that can be put together along their first axis."""
        return [(t.shape[1:], t.dtype) for t in (self.outputs, self.targets) if t is not None]


Mark = tuple[Tensor, list[Tensor], dict[str, Tensor], list[BufferedBatch], int]


def together(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return tensors as one, along the first axis."""
    there = [tensor for tensor in tensors if tensor is not None]
    return there[0] if len(there) == 1 else torch.cat(there)


def sums_of(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a metric's sums. Raises DataError when it broadcasts outputs and targets."""
    sums = call_aligned(f"the metric {metric.name}", metric.sums, outputs, targets)
    if not isinstance(sums, Tensor):
        said = f"its `sums` should return a tensor, not a {type(sums).__name__}"
        raise SettingError(f"the metric {type(metric).__name__}: {said}")
    return sums


def add_sums(
    metric: Metric, before: Tensor | None, fresh: Tensor, restored: bool = False
) -> Tensor:
    """Return the sums of a metric with those of further batches.

    Args:
        metric: the metric.
        before: its sums so far, None for none.
        fresh: the sums of further batches.
        restored: the sums so far may come from a checkpoint, and so from another version of the metric.

    Raises SettingError when the shape of the sums changes.
    """
    if before is None:
        return fresh.clone()  # it may be a view of the outputs
    if before.shape == fresh.shape:
        return before + fresh
    if not restored:
        shapes = f"{tuple(fresh.shape)} follows {tuple(before.shape)}"
        said = f"its `sums` should always have one shape, but {shapes}"
        raise SettingError(f"the metric {type(metric).__name__}: {said}")
    warnings.warn(
        f"the metric {metric.name}: the checkpoint has sums of another version of it, which are left out until "
        "it is logged",
        stacklevel=2,
    )
    return fresh


def computed(metric: Metric, sums: Tensor) -> float:
    """Return a metric's value. Raises SettingError when its `compute` returns no number."""
    value = metric.compute(sums)
    if type(value) is float:
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        said = f"its `compute` should return a number, not {found(value)}"
        raise SettingError(f"the metric {type(metric).__name__}: {said}") from None


def detached(name: str, value: Any) -> Tensor:
    """Return one of a task's other means without its graph. Raises SettingError for no number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        expected = "expected a tensor with one number"
        raise SettingError(f"the task's value {name!r}: {expected}, got {found(value)}")
    return value.detach()


def found(value: Any) -> str:
    """Return what a value is, for a message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else short(value)


class Measures:
    """The mean loss and some metrics over the batches added since the last reading, as sums on the device.

    Small batches are held back and summed up many at a time, which for a small model is most of the cost of measuring.

    hold: most batches to hold back; 1 where a batch's memory may be written again by whoever gave it.
    """

    large = 2**16  # numbers in the outputs held back, above which they are summed up at once

    def __init__(self, metrics: Sequence[Metric], device: torch.device, hold: int = 16):
        self.metrics, self.hold = list(metrics), hold
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.loss = torch.zeros(2, dtype=self.dtype, device=device)
        self.sums: list[Tensor] = []
        self.restored = False  # whether `sums` may come from a checkpoint
        self.values: dict[str, Tensor] = {}  # of each name the sum, and over how many items
        self.held: list[BufferedBatch] = []
        self.numbers = 0
        self.first: list[Tensor] = []  # the tensors of the first batch, until the second comes
        self.checked_memory = self.hold == 1

    def add(
        self,
        loss: Tensor,
        outputs: Tensor | None,
        targets: Tensor | None,
        count: int | Tensor,
        values: Mapping[str, Tensor] = {},
    ) -> None:
        """Add a batch: its mean loss over `count` items, its outputs and targets. Reads nothing off the device.

        outputs, targets: None where no metric shall see them. values: other means over the items, by name.
        """
        if self.metrics and outputs is not None and not isinstance(outputs, Tensor):
            raise DataError(
                f"metrics={self.metrics[0].name}: a metric takes outputs as one tensor, but the task "
                f"gives {describe_outputs(outputs)}: write a Task whose `step` returns "
                "Step(loss, outputs, targets) with a tensor"
            )
        seen = (outputs.detach(), targets) if self.metrics and outputs is not None else (None, None)
        means = values
        if values:
            means = {name: detached(name, value) for name, value in values.items()}
        one = BufferedBatch(loss.detach(), count, seen[0], seen[1], means)
        if not self.checked_memory:
            one = self._own(one)
        if self.held and one.form() != self.held[0].form():
            self._sum_up()
        self.held.append(one)
        self.numbers += 0 if one.outputs is None else one.outputs.numel()
        if len(self.held) >= self.hold or self.numbers > self.large:
            self._sum_up()

    def _own(self, one: BufferedBatch) -> BufferedBatch:
        """Return a batch that can be held back: for the first one, copies of its tensors.

        If a tensor of the second batch is in the same memory as that of the first, the model or the
        task reuses its memory, as a module replayed by a CUDA graph does. Then nothing is held back
        any more.
        """
        tensors = [tensor for tensor in (one.loss, one.outputs, one.targets) if tensor is not None]
        if not self.first:
            self.first = tensors
            loss, outputs, targets = one.loss.clone(), one.outputs, one.targets
            if outputs is not None and targets is not None:
                outputs, targets = outputs.clone(), targets.clone()
            return one._replace(loss=loss, outputs=outputs, targets=targets)
        pairs = zip(tensors, self.first, strict=False)
        if any(new.data_ptr() == old.data_ptr() for new, old in pairs):
            self._sum_up()
            self.hold = 1
        self.first, self.checked_memory = [], True
        return one

    @torch.no_grad()
    def _sum_up(self) -> None:
        """Add what is held back to the sums."""
        for is_number, alike in groupby(self.held, BufferedBatch.number):
            losses, counts = zip(*((one.loss, one.items) for one in alike), strict=True)
            if is_number is None:
                weights = torch.stack(counts).to(self.loss)
                weighted = portion(torch.stack(losses).to(self.dtype), weights)
                self.loss += torch.stack([weighted.sum(), weights.sum()])
            elif is_number:
                self.loss[0].add_(torch.stack(losses).to(self.dtype).sum(), alpha=is_number)
                self.loss[1].add_(is_number * len(losses))
        if self.held and self.held[0].outputs is not None:
            outputs = together([one.outputs for one in self.held])
            targets = together([one.targets for one in self.held])
            fresh = [sums_of(metric, outputs, targets).to(self.loss) for metric in self.metrics]
            before: list[Tensor | None] = [*self.sums] or [None] * len(fresh)
            triples = zip(self.metrics, before, fresh, strict=True)
            self.sums = [add_sums(*each, self.restored) for each in triples]
        for name in dict.fromkeys(name for one in self.held for name in one.values):
            there = [one for one in self.held if name in one.values]
            weights = torch.stack([torch.as_tensor(one.items).to(self.loss) for one in there])
            means = torch.stack([one.values[name].to(self.dtype) for one in there])
            total = torch.stack([portion(means, weights).sum(), weights.sum()])
            self.values[name] = self.values[name] + total if name in self.values else total
        self.held, self.numbers = [], 0

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last reading. It reads the device."""
        return not self.held and float(self.loss[1]) == 0

    def read(self) -> dict[str, float]:
        """Return {"loss": ..., "accuracy": ...} over what was added, in one transfer, and begin anew."""
        self._sum_up()
        totals = [self.loss, *self.values.values(), *(total.reshape(-1) for total in self.sums)]
        parts = (
            torch.cat(totals).to("cpu", torch.float64).split([total.numel() for total in totals])
        )
        values = {
            name: float(part[0] / part[1])
            for name, part in zip(["loss", *self.values], parts, strict=False)
        }
        for metric, total, part in zip(self.metrics, self.sums, parts[len(values) :], strict=False):
            values[metric.name] = computed(metric, part.reshape(total.shape))
        self.loss.zero_()
        self.sums, self.values = [], {}
        self.restored = False
        return values

    def mark(self) -> Mark:
        """Return where the sums stand, for `undo`."""
        return self.loss.clone(), list(self.sums), dict(self.values), list(self.held), self.numbers

    def undo(self, mark: Mark) -> None:
        """Forget what was added since the mark."""
        loss, sums, values, held, self.numbers = mark
        self.loss.copy_(loss)
        self.sums, self.values, self.held = list(sums), dict(values), list(held)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading, and what is held back, as few tensors."""
        names = [metric.name for metric in self.metrics]
        sums = [total.clone() for total in self.sums]
        state: dict[str, Any] = {"loss": self.loss.clone(), "sums": sums, "metrics": names}
        state |= {"values": dict(self.values)} if self.values else {}
        if self.held:
            state["held"] = {
                "losses": torch.stack([one.loss for one in self.held]),
                "counts": [one.items for one in self.held],
                "sizes": [0 if one.outputs is None else len(one.outputs) for one in self.held],
                "outputs": None
                if self.held[0].outputs is None
                else together([one.outputs for one in self.held]),
                "targets": None
                if self.held[0].targets is None
                else together([one.targets for one in self.held]),
            }
            if any(one.values for one in self.held):
                state["held"]["values"] = [dict(one.values) for one in self.held]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; sums of other metrics than these are left."""
        self.loss.copy_(state["loss"])
        same = state["metrics"] == [metric.name for metric in self.metrics]
        self.sums = [total.to(self.loss) for total in state["sums"]] if same else []
        self.restored = True
        self.values = {name: total.to(self.loss) for name, total in state.get("values", {}).items()}
        held = state.get("held", {"losses": (), "counts": (), "sizes": ()})
        parts: list[Any] = [[None] * len(held["sizes"])] * 2
        if same and held.get("outputs") is not None:
            parts = [
                held[name].to(self.loss.device).split(held["sizes"])
                for name in ("outputs", "targets")
            ]
        losses = (loss.to(self.loss.device) for loss in held["losses"])
        kept = held.get("values", [{}] * len(held["sizes"]))
        values = (
            {name: value.to(self.loss.device) for name, value in each.items()} for each in kept
        )
        self.held = [
            BufferedBatch(*one) for one in zip(losses, held["counts"], *parts, values, strict=True)
        ]
        self.numbers = sum(one.outputs.numel() for one in self.held if one.outputs is not None)
