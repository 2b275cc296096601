"""Many trials of one architecture as one model: forward and backward by `torch.func.vmap`, a trial a row.

What differs between trials in numbers (a dropout rate, the smoothing of labels) becomes a tensor, a value a trial.
"""

import copy
from collections.abc import Callable, Sequence
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

from .differences import Key, Together, changed, describe_trial, differences, holder, of_loss
from .stacked_update import NotStackable, Rows, slots


class Stack:
    """The forward pass of all trials.

    Args:
        models, tasks: those of the trials.
        precision: the number format.
        still: names of the modules that stay in evaluation mode while the others train.

    Raises NotStackable when the trials differ in something that is no number, naming it.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tasks: Sequence[Task],
        precision: Precision,
        still: Sequence[str] = (),
    ):
        if tasks[0].phases:
            raise NotStackable(f"{type(tasks[0]).__name__} updates in phases")
        wholes = [Together(model, task) for model, task in zip(models, tasks, strict=True)]
        descriptions = [describe_trial(whole) for whole in wholes]
        self.values, self.taken = (
            differences(descriptions, next(models[0].parameters())),
            descriptions[0],
        )
        try:
            self.skeleton, self.precision = copy.deepcopy(wholes[0]), precision
        except Exception as error:
            said = f"the model or the task cannot be copied: {text_of(error)}"
            raise NotStackable(said) from error
        self.still = still
        self._set_mode(True)
        self.slots = slots(self.skeleton.model)
        self.holders = {key: holder(self.skeleton, key) for key in self.values}

    def __call__(self, rows: Rows, batch: Batch, shared: bool, training: bool = True) -> Step:
        """Return the losses (trials,), and the outputs and targets of all trials, (trials, batch, ...).

        shared: all trials get the same batch; otherwise it has a first axis of trials.
        """
        if self.mode != training:
            self._set_mode(training)
        state = rows.leaves | rows.fixed | rows.buffers
        randomness = (
            "different" if training else "same"
        )  # a measurement with random numbers is alike for all
        run = vmap(self._one, in_dims=(0, 0, None if shared else 0), randomness=randomness)
        with self.precision.autocast(), Forms():
            return Step(*run(state, self.values, batch))

    def _set_mode(self, training: bool) -> None:
        """Set the mode of the model alone: a trainer leaves the loss as it is."""
        model = self.skeleton.model
        model.train(training)
        for name in self.still:
            model.get_submodule(name).training = False
        self.mode = training

    @property
    def weighs_apart(self) -> bool:
        """Whether the trials' losses or tasks differ, and so perhaps what a mean is over."""
        return any(key[0] == "task" or of_loss(key) for key in self.values)

    def _one(self, state: dict[str, Tensor], values: dict[Key, Tensor], batch: Batch) -> Any:
        """The pass of one trial. As `torch.func.functional_call`, which looks for the places of tensors each time."""
        places = [(place, tensor) for name, tensor in state.items() for place in self.slots[name]]
        places += [(self.holders[key], value) for key, value in values.items()]
        before = [owner[key] for (owner, key), _ in places]
        try:
            for (owner, key), tensor in places:
                owner[key] = tensor
            made = self.skeleton(batch)
            if any(owner[key] is not tensor for (owner, key), tensor in places):
                raise NotStackable(
                    "the model puts another tensor in the place of a buffer, instead of changing it"
                )
            return made
        finally:
            for ((owner, key), _), was in zip(places, before, strict=True):
                owner[key] = was

    def changed(self) -> str | None:
        """Return what a pass has changed for itself, beside tensors."""
        return changed(self.taken, describe_trial(self.skeleton))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the trials."""
        self.values = {key: value[list(rows)] for key, value in self.values.items()}


class Forms(TorchFunctionMode):
    """Functions in a form for many trials, which take a tensor for a number: dropout's rate, the labels' smoothing."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return FORMS.get(function, function)(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Under vmap torch's scales the bias before it adds it."""
    product = F.linear(input, weight)
    return product if bias is None else product.add_(bias.to(product.dtype))


def dropout(input: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not isinstance(p, Tensor):
        return F.dropout(input, p, training, inplace)
    kept = input * (torch.rand_like(input) >= p)  # none at 1
    return kept / torch.where(p < 1, 1 - p, 1) if training else input


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,  # what torch once called the reduction
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Tensor:
    """The mean over the targets, with the smoothing of `F.cross_entropy`: from the target's own loss to that of all
    classes alike. Under vmap torch's takes a detour through Python, and a second of imports for it."""
    if input.ndim != 2 or target.is_floating_point() or reduction != "mean":
        if isinstance(label_smoothing, Tensor):
            raise TypeError(
                "label_smoothing differs, and the loss is not a plain mean over class indices"
            )
        named: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return F.cross_entropy(input, target, weight, reduction=reduction, **named)
    logarithms = input.log_softmax(1) if weight is None else input.log_softmax(1) * weight
    counts: Tensor = target != ignore_index
    classes = torch.where(counts, target, 0)
    losses = -logarithms.gather(1, classes.unsqueeze(1)).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing:
        losses = losses + (-logarithms.mean(1) - losses) * label_smoothing
    over = (counts if weight is None else counts * weight[classes]).sum()
    mean = torch.where(counts, losses, 0).sum() / torch.where(over == 0, 1, over)
    return torch.where(over == 0, torch.nan, mean)  # of no targets, with gradients of 0


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Under vmap torch's keeps the padding's vector still in the first trial only."""
    if padding_idx is not None:
        if max_norm is not None:
            raise TypeError(
                "an embedding with padding_idx and max_norm changes its weights in each pass"
            )
        still = torch.arange(len(weight), device=weight.device).unsqueeze(1) == padding_idx % len(
            weight
        )
        weight = torch.where(still, weight.detach(), weight)
    return F.embedding(input, weight, None, max_norm, *more, **named)


FORMS: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    F.dropout: dropout,
    F.cross_entropy: cross_entropy,
}
FORMS[F.embedding] = embedding


class Sums:
    """The mean loss and the metrics of all trials, held back and summed up as `Measures` does for one."""

    def __init__(self, metrics: Sequence[Metric], trials: int, device: torch.device, hold: int):
        self.metrics, self.hold = list(metrics), hold
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(trials, 2, dtype=self.dtype, device=device)
        self.sums: list[Tensor] = []
        self.values: dict[
            str, Tensor
        ] = {}  # of each name the sums, and over how many items, (trials, 2)
        self.held: list[BufferedBatch] = []

    def add(self, step: Step, count: int | Tensor) -> None:
        """Add a batch of each trial. count: of the items that each mean loss is over, one number or (trials,)."""
        seen = (step.outputs.detach(), step.targets) if self.metrics else (None, None)
        values = {name: mean.detach() for name, mean in step.values.items()}
        one = BufferedBatch(step.loss.detach(), count, seen[0], seen[1], values)
        if self.held and batch_shapes(one) != batch_shapes(self.held[0]):
            self.sum_up()
        self.held.append(one)
        if (
            len(self.held) >= self.hold
            or len(self.held) * step.outputs.numel() > Measures.large * 2
        ):
            self.sum_up()

    @torch.no_grad()
    def sum_up(self) -> None:
        """Add what is held back to the sums."""
        held, self.held = self.held, []
        for losses, count, *_, values in held:
            one = (
                count.to(self.dtype) if isinstance(count, Tensor) else self.loss.new_full((), count)
            )
            counts = one.expand(len(losses))
            self.loss += torch.stack([portion(losses.to(self.dtype), counts), counts], 1)
            for name, means in values.items():
                total = torch.stack([portion(means.to(self.dtype), counts), counts], 1)
                self.values[name] = self.values[name] + total if name in self.values else total
        if not held or held[0].outputs is None:
            return
        outputs, targets = (torch.cat([one[n] for one in held], 1) for n in (2, 3))  # type: ignore[misc]
        fresh = [stacked_sums(metric, outputs, targets).to(self.dtype) for metric in self.metrics]
        self.sums = [a + b for a, b in zip(self.sums, fresh, strict=True)] if self.sums else fresh

    def read(self) -> list[dict[str, float]]:
        """Return the values of each trial, in one transfer."""
        self.sum_up()
        totals = {"loss": self.loss} | self.values
        means = {name: (total[:, 0] / total[:, 1]).tolist() for name, total in totals.items()}
        pairs = list(
            zip(self.metrics, [each.to("cpu", torch.float64) for each in self.sums], strict=False)
        )
        return [
            {name: mean[row] for name, mean in means.items()}
            | {metric.name: computed(metric, each[row]) for metric, each in pairs}
            for row in range(len(self.loss))
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the trials."""
        self.sum_up()
        self.loss, self.sums = self.loss[list(rows)], [each[list(rows)] for each in self.sums]
        self.values = {name: each[list(rows)] for name, each in self.values.items()}


def batch_shapes(held: BufferedBatch) -> list[torch.Size]:
    return [tensor.shape for tensor in (held.outputs, held.targets) if tensor is not None]


def stacked_sums(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a metric's sums for each trial, (trials, ...)."""
    try:
        return vmap(metric.sums)(outputs, targets)
    except RuntimeError:  # it does what cannot be done for many at once (counting by value, say)
        return torch.stack([metric.sums(*pair) for pair in zip(outputs, targets, strict=True)])


class RowMeasures(Measures):
    """A trial's share of the sums of all, as its trainer expects it."""

    def __init__(self, all: Sums, row: int):
        super().__init__(all.metrics, all.loss.device)
        self.all: Sums | None = all
        self.row = row

    def leave(self) -> None:
        """Be the sums of a trial alone from here on."""
        self._sum_up()
        self.all = None

    def _sum_up(self) -> None:
        """Take the trial's row out of the sums of all."""
        super()._sum_up()
        if self.all is None:
            return
        self.all.sum_up()
        self.loss += self.all.loss[self.row]
        mine = [each[self.row].clone() for each in self.all.sums]
        if mine:
            before: list[Tensor | None] = [*self.sums] or [None] * len(mine)
            triples = zip(self.metrics, before, mine, strict=True)
            self.sums = [add_sums(*each, self.restored) for each in triples]
        for name, total in self.all.values.items():
            self.values[name] = (
                self.values[name] + total[self.row]
                if name in self.values
                else total[self.row].clone()
            )
        for each in (self.all.loss, *self.all.sums, *self.all.values.values()):
            each[self.row] = 0

    @property
    def empty(self) -> bool:
        self._sum_up()
        return super().empty

    def state_dict(self) -> dict[str, Any]:
        self._sum_up()
        return super().state_dict()
