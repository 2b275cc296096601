"""The forward pass of many trials of one architecture, by `torch.func.vmap` over the trials.

Numbers that differ between trials, such as dropout rates, become tensors with a value for each.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from framework.contracts.loss import portion
from framework.contracts.metric import BufferedBatch, Measures, Metric, add_sums, computed
from framework.contracts.task import Step, Task
from framework.data.dataset import Batch
from framework.errors.user_code import text_of
from framework.runtime.precision import Precision

from .differences import (
    Key,
    ModelWithTask,
    describe_trial,
    differences,
    find_container,
    first_change,
    is_of_loss,
)
from .stacked_update import NotStackable, StackedState, tensor_slots


class StackedForward:
    """The forward pass of all trials.

    Args:
        models: the model of each trial.
        tasks: the task of each trial.
        precision: the number format.
        frozen_modes: names of the modules that stay in evaluation mode during training.

    Raises:
        NotStackable: the trials differ in anything but numbers.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tasks: Sequence[Task],
        precision: Precision,
        frozen_modes: Sequence[str] = (),
    ):
        if tasks[0].phases:
            raise NotStackable(f"{type(tasks[0]).__name__} updates in phases")
        trials = [ModelWithTask(*pair) for pair in zip(models, tasks, strict=True)]
        descriptions = [describe_trial(trial) for trial in trials]
        self.description = descriptions[0]
        self.values = differences(descriptions, next(models[0].parameters()))
        try:
            self.skeleton = copy.deepcopy(trials[0])
        except Exception as error:
            raise NotStackable(
                f"the model or the task cannot be copied: {text_of(error)}"
            ) from error
        self.precision = precision
        self.frozen_modes = frozen_modes
        self._set_mode(True)
        self.slots = tensor_slots(self.skeleton.model)
        self.containers = {key: find_container(self.skeleton, key) for key in self.values}

    def __call__(
        self, state: StackedState, batch: Batch, shared: bool, training: bool = True
    ) -> Step:
        """Run the forward pass.

        Args:
            state: the tensors of all trials.
            batch: a batch for all trials; if it is not shared, its first axis is that of trials.
            shared: whether all trials get the same batch.
            training: whether the models are in training mode.

        Returns:
            The losses (trials,), and the outputs and targets (trials, batch, ...).
        """
        if self.mode != training:
            self._set_mode(training)
        tensors = state.leaves | state.fixed | state.buffers
        run = vmap(
            self._run_one,
            in_dims=(0, 0, None if shared else 0),
            randomness="different" if training else "same",  # evaluation is equal for equal trials
        )
        with self.precision.autocast(), BatchedFunctions():
            return Step(*run(tensors, self.values, batch))

    def _set_mode(self, training: bool) -> None:
        """Set the mode of the model only: a trainer does not change that of the loss."""
        model = self.skeleton.model
        model.train(training)
        for name in self.frozen_modes:
            model.get_submodule(name).training = False
        self.mode = training

    @property
    def counts_differ(self) -> bool:
        """Whether losses or tasks differ between trials, so that a mean may be over other items."""
        return any(key[0] == "task" or is_of_loss(key) for key in self.values)

    def _run_one(self, tensors: dict[str, Tensor], values: dict[Key, Tensor], batch: Batch) -> Any:
        """Run the forward pass of one trial.

        Like `torch.func.functional_call`, which searches the slots of tensors in each call.
        """
        assigned = []
        for name, tensor in tensors.items():
            for container, key in self.slots[name]:
                assigned.append((container, key, tensor))
        for path, tensor in values.items():
            container, key = self.containers[path]
            assigned.append((container, key, tensor))
        before = [container[key] for container, key, _ in assigned]
        try:
            for container, key, tensor in assigned:
                container[key] = tensor
            outputs = self.skeleton(batch)
            for container, key, tensor in assigned:
                if container[key] is not tensor:
                    raise NotStackable(
                        "the model replaces a buffer instead of changing it in place"
                    )
            return outputs
        finally:
            for (container, key, _), value in zip(assigned, before, strict=True):
                container[key] = value

    def changed_attribute(self) -> str | None:
        """Return the name of an attribute, not a tensor, that a forward pass has changed."""
        return first_change(self.description, describe_trial(self.skeleton))

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the trials."""
        self.values = {key: value[list(rows)] for key, value in self.values.items()}


class BatchedFunctions(TorchFunctionMode):
    """Replaces functions of torch by versions that work under vmap (see `REPLACEMENTS`)."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        replacement = REPLACEMENTS.get(function, function)
        return replacement(*args, **(kwargs or {}))


def vmap_linear(
    input: Tensor,  # noqa: A002  # as in torch
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear map, as `F.linear`, which under vmap scales the bias before it is added."""
    product = F.linear(input, weight)
    return product if bias is None else product.add_(bias.to(product.dtype))


def vmap_dropout(
    input: Tensor,  # noqa: A002  # as in torch
    p: Any = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Apply dropout, as `F.dropout`, with a rate that may be a tensor."""
    if not isinstance(p, Tensor):
        return F.dropout(input, p, training, inplace)
    kept = input * (torch.rand_like(input) >= p)  # none for p=1
    return kept / torch.where(p < 1, 1 - p, 1) if training else input


def vmap_cross_entropy(
    input: Tensor,  # noqa: A002  # as in torch
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,  # deprecated in torch, as is `reduce`
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Tensor:
    """Return the mean cross entropy, as `F.cross_entropy`, with smoothing that may be a tensor.

    Under vmap, torch decomposes `F.cross_entropy` in Python, with an import that takes a second.
    """
    if input.ndim != 2 or target.is_floating_point() or reduction != "mean":
        if isinstance(label_smoothing, Tensor):
            raise TypeError(
                "label_smoothing differs, and the loss is not a plain mean over class indices"
            )
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    logarithms = input.log_softmax(1)
    if weight is not None:
        logarithms = logarithms * weight
    counts: Tensor = target != ignore_index
    classes = torch.where(counts, target, 0)
    losses = -logarithms.gather(1, classes.unsqueeze(1)).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing:
        losses = losses + (-logarithms.mean(1) - losses) * label_smoothing
    total = (counts if weight is None else counts * weight[classes]).sum()
    mean = torch.where(counts, losses, 0).sum() / torch.where(total == 0, 1, total)
    return torch.where(total == 0, torch.nan, mean)  # NaN without targets, with gradients of 0


def vmap_embedding(
    input: Tensor,  # noqa: A002  # as in torch
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Look up embeddings, as `F.embedding`, which under vmap freezes padding in one trial only."""
    if padding_idx is None:
        return F.embedding(input, weight, None, max_norm, *args, **kwargs)
    if max_norm is not None:
        raise TypeError(
            "an embedding with padding_idx and max_norm changes its weights in each pass"
        )
    rows = torch.arange(len(weight), device=weight.device).unsqueeze(1)
    is_padding = rows == padding_idx % len(weight)
    weight = torch.where(is_padding, weight.detach(), weight)
    return F.embedding(input, weight, None, max_norm, *args, **kwargs)


REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: vmap_linear,
    F.dropout: vmap_dropout,
    F.cross_entropy: vmap_cross_entropy,
    F.embedding: vmap_embedding,
}
"""Versions for vmap, which give each trial its own result, or take tensors instead of numbers.

Gain: 3 to 5 times as many trials a second for 128 small models (`scripts/bench`).
"""


class StackedMeasures:
    """The mean loss and the metrics of all trials, buffered and summed like `Measures` for one."""

    def __init__(
        self, metrics: Sequence[Metric], trials: int, device: torch.device, max_buffered: int
    ):
        self.metrics = list(metrics)
        self.max_buffered = max_buffered
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(trials, 2, dtype=self.dtype, device=device)
        self.sums: list[Tensor] = []
        self.values: dict[str, Tensor] = {}  # by name: (trials, 2), sum and number of items
        self.buffered: list[BufferedBatch] = []

    def add(self, step: Step, count: int | Tensor) -> None:
        """Add a batch of each trial.

        Args:
            step: the result of the forward pass.
            count: number of items of each mean loss: one for all trials, or (trials,).
        """
        values = {name: mean.detach() for name, mean in step.values.items()}
        outputs = step.outputs.detach() if self.metrics else None
        targets = step.targets if self.metrics else None
        batch = BufferedBatch(step.loss.detach(), count, outputs, targets, values)
        if self.buffered and batch_shapes(batch) != batch_shapes(self.buffered[0]):
            self.sum_up()
        self.buffered.append(batch)
        is_large = len(self.buffered) * step.outputs.numel() > Measures.large * 2
        if len(self.buffered) >= self.max_buffered or is_large:
            self.sum_up()

    @torch.no_grad()
    def sum_up(self) -> None:
        """Add the buffered batches to the sums."""
        buffered = self.buffered
        self.buffered = []
        for batch in buffered:
            count = batch.items
            if not isinstance(count, Tensor):
                count = self.loss.new_full((), count)
            counts = count.to(self.dtype).expand(len(batch.loss))
            self.loss += self._weighted(batch.loss, counts)
            for name, means in batch.values.items():
                add_total(self.values, name, self._weighted(means, counts))
        all_outputs = [batch.outputs for batch in buffered if batch.outputs is not None]
        all_targets = [batch.targets for batch in buffered if batch.targets is not None]
        if not all_outputs:
            return
        outputs = torch.cat(all_outputs, 1)
        targets = torch.cat(all_targets, 1)
        sums = [stacked_sums(metric, outputs, targets).to(self.dtype) for metric in self.metrics]
        if self.sums:
            sums = [total + new for total, new in zip(self.sums, sums, strict=True)]
        self.sums = sums

    def _weighted(self, means: Tensor, counts: Tensor) -> Tensor:
        """Return the sums of means over items, and the number of items: (trials, 2)."""
        return torch.stack([portion(means.to(self.dtype), counts), counts], 1)

    def read(self) -> list[dict[str, float]]:
        """Return the values of each trial, in one transfer."""
        self.sum_up()
        means = {}
        for name, total in {"loss": self.loss, **self.values}.items():
            means[name] = (total[:, 0] / total[:, 1]).tolist()
        sums = [total.to("cpu", torch.float64) for total in self.sums]
        trials = []
        for row in range(len(self.loss)):
            values = {name: mean[row] for name, mean in means.items()}
            for metric, total in zip(self.metrics, sums, strict=False):
                values[metric.name] = computed(metric, total[row])
            trials.append(values)
        return trials

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the trials."""
        self.sum_up()
        index = list(rows)
        self.loss = self.loss[index]
        self.sums = [total[index] for total in self.sums]
        self.values = {name: total[index] for name, total in self.values.items()}

    def take(self, row: int) -> tuple[Tensor, list[Tensor], Mapping[str, Tensor]]:
        """Return the sums of a trial (loss, metrics, logged values), and set them to zero."""
        self.sum_up()
        loss = self.loss[row].clone()
        sums = [total[row].clone() for total in self.sums]
        values = {name: total[row].clone() for name, total in self.values.items()}
        for total in (self.loss, *self.sums, *self.values.values()):
            total[row] = 0
        return loss, sums, values


def add_total(totals: dict[str, Tensor], name: str, total: Tensor) -> None:
    """Add to the total of a name, which may be new."""
    totals[name] = totals[name] + total if name in totals else total


def batch_shapes(batch: BufferedBatch) -> list[torch.Size]:
    """Return the shapes of outputs and targets, if they are buffered."""
    return [tensor.shape for tensor in (batch.outputs, batch.targets) if tensor is not None]


def stacked_sums(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of a metric for each trial, (trials, ...)."""
    try:
        return vmap(metric.sums)(outputs, targets)
    except RuntimeError:  # an operation without vmap, such as counting by value
        trials = zip(outputs, targets, strict=True)
        return torch.stack([metric.sums(*trial) for trial in trials])


class TrialMeasures(Measures):
    """The measures of one trial, kept as a row of those of all trials."""

    def __init__(self, stacked: StackedMeasures, row: int):
        super().__init__(stacked.metrics, stacked.loss.device)
        self.stacked: StackedMeasures | None = stacked
        self.row = row

    def leave(self) -> None:
        """Take the sums of the trial, and use those of all no more."""
        self._sum_up()
        self.stacked = None

    def _sum_up(self) -> None:
        """Take the sums of the trial out of those of all."""
        super()._sum_up()
        if self.stacked is None:
            return
        loss, sums, values = self.stacked.take(self.row)
        self.loss += loss
        if sums:
            before: list[Tensor | None] = [*self.sums] or [None] * len(sums)
            triples = zip(self.metrics, before, sums, strict=True)
            self.sums = [add_sums(*triple, self.restored) for triple in triples]
        for name, total in values.items():
            add_total(self.values, name, total)

    @property
    def empty(self) -> bool:
        self._sum_up()
        return super().empty

    def state_dict(self) -> dict[str, Any]:
        self._sum_up()
        return super().state_dict()
