"""Many trials of one architecture as one model: forward and backward by `torch.func.vmap`, a trial a row.

What differs between trials in numbers (a dropout rate, the smoothing of labels) becomes a tensor, a value a trial.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..data import Batch
from ..device import Precision
from ..metric import Held, Measures, Metric
from ..task import Step, Task
from .rows import NotStackable, Rows


class Together(nn.Module):
    """A model with its task, as one module that goes from a batch to a loss."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task
        self.criterion = task.criterion

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        loss, outputs, targets, values = self.task.step(self.model, batch)
        if values:
            raise NotStackable(f"{type(self.task).__name__} measures more than its loss: {', '.join(values)}")
        return loss, outputs, targets


class Stack:
    """The forward pass of all trials.

    Raises NotStackable when the trials differ in something that is no number, naming it.
    """

    def __init__(self, models: Sequence[nn.Module], tasks: Sequence[Task], precision: Precision):
        if tasks[0].phases:
            raise NotStackable(f"{type(tasks[0]).__name__} updates in phases")
        wholes = [Together(model, task) for model, task in zip(models, tasks, strict=True)]
        weight = next(models[0].parameters())
        self.values = {path: weight.new_tensor(values) for path, values in differences(wholes).items()}
        self.skeleton, self.precision = copy.deepcopy(wholes[0]), precision
        self.slots = dict(slots(self.skeleton.model))

    def __call__(self, rows: Rows, batch: Batch, shared: bool, training: bool = True) -> Step:
        """Return the losses (trials,), and the outputs and targets of all trials, (trials, batch, ...).

        shared: all trials get the same batch; otherwise it has a first axis of trials.
        """
        if self.skeleton.training != training:
            self.skeleton.train(training)
        state = rows.leaves | rows.fixed | rows.buffers
        run = vmap(self._one, in_dims=(0, 0, None if shared else 0), randomness="different")
        with self.precision.autocast(), Forms():
            return Step(*run(state, self.values, batch))

    def _one(self, state: dict[str, Tensor], values: dict[tuple[str, str], Tensor], batch: Batch) -> Any:
        """The pass of one trial. As `torch.func.functional_call`, which looks for the places of tensors each time."""
        places = [(place, name) for name in state for place in self.slots[name]]
        before = [owner[key] for (owner, key), _ in places]
        try:
            for (owner, key), name in places:
                owner[key] = state[name]
            with settings(self.skeleton, values):
                return self.skeleton(batch)
        finally:
            for ((owner, key), _), tensor in zip(places, before, strict=True):
                owner[key] = tensor

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the trials."""
        self.values = {path: value[list(rows)] for path, value in self.values.items()}


def slots(model: nn.Module) -> Iterator[tuple[str, list[tuple[dict[str, Any], str]]]]:
    """Yield each parameter and buffer by its first name, and all (dictionary, key) where modules keep it."""
    kept = [(each, key) for module in model.modules() for each in (module._parameters, module._buffers) for key in each]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, [(owner, key) for owner, key in kept if owner[key] is tensor]  # type: ignore[misc]


def differences(wholes: Sequence[Together]) -> dict[tuple[str, str], list[float]]:
    """Return the floats that differ between trials, by module and attribute. Raises NotStackable for other things."""
    described = [dict(described_by(whole)) for whole in wholes]
    found = {}
    for key in described[0]:
        values = [each.get(key) for each in described]
        if all(same(value, values[0]) for value in values):
            continue
        if not all(isinstance(value, float) for value in values):
            named = ".".join(filter(None, key))
            raise NotStackable(f"{named} is not the same: {short(values[0])}, {short(values[-1])}")
        found[key] = values
    return found  # type: ignore[return-value]


def described_by(whole: Together) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield what a model and its task are made of, but for their parameters and buffers."""
    for path, owner in [*whole.named_modules(), ("task", whole.task)]:
        yield (path, ""), type(owner)
        for name, value in vars(owner).items():
            if name == "training" or isinstance(value, nn.Module):
                continue
            if not name.startswith("_"):
                yield (path, name), value
    for name, buffer in whole.criterion.named_buffers() if whole.criterion is not None else ():
        yield ("criterion", name), buffer


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    simple = (str, int, float, bool, type(None), type)
    return one == other if isinstance(one, simple) or isinstance(other, simple) else type(one) is type(other)


def short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)[:60]


@contextmanager
def settings(whole: Together, values: dict[tuple[str, str], Tensor]) -> Iterator[None]:
    """Put tensors where numbers are, in a module or a task, for as long as a pass takes."""
    if not values:
        yield
        return
    owners = {path: whole.task if path == "task" else whole.get_submodule(path) for path, _ in values}
    before = {key: vars(owners[key[0]])[key[1]] for key in values}
    try:
        for (path, name), value in values.items():
            vars(owners[path])[name] = value
        yield
    finally:
        for (path, name), value in before.items():
            vars(owners[path])[name] = value


class Forms(TorchFunctionMode):
    """Functions in a form for many trials, which take a tensor for a number: dropout's rate, the labels' smoothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FORMS.get(function, function)(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Under vmap torch's scales the bias before it adds it."""
    product = F.linear(x, weight)
    return product if bias is None else product.add_(bias.to(product.dtype))


def dropout(x: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not isinstance(p, Tensor):
        return F.dropout(x, p, training, inplace)
    return x * (torch.rand_like(x) >= p) / (1 - p) if training else x


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,  # what torch once called the reduction
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Tensor:
    """The mean over the targets, with the smoothing of `F.cross_entropy`: from the target's own loss to that of all
    classes alike. Under vmap torch's takes a detour through Python, and a second of imports for it."""
    if weight is not None or outputs.ndim != 2 or targets.is_floating_point() or reduction != "mean":
        if isinstance(label_smoothing, Tensor):
            raise TypeError("label_smoothing differs, and the loss is not a plain mean over class indices")
        named: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return F.cross_entropy(outputs, targets, weight, reduction=reduction, **named)
    logarithms = outputs.log_softmax(1)
    counts = targets != ignore_index
    losses = -logarithms.gather(1, torch.where(counts, targets, 0).unsqueeze(1)).squeeze(1)
    if isinstance(label_smoothing, Tensor) or label_smoothing:
        losses = losses + (-logarithms.mean(1) - losses) * label_smoothing
    return (losses * counts).sum() / counts.sum()


FORMS: dict[Any, Callable[..., Tensor]] = {F.linear: linear, F.dropout: dropout, F.cross_entropy: cross_entropy}


class Sums:
    """The mean loss and the metrics of all trials, held back and summed up as `Measures` does for one."""

    def __init__(self, metrics: Sequence[Metric], trials: int, device: torch.device, hold: int):
        self.metrics, self.hold = list(metrics), hold
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(trials, 2, dtype=self.dtype, device=device)
        self.sums: list[Tensor] = []
        self.held: list[Held] = []

    def add(self, step: Step, count: int | Tensor) -> None:
        """Add a batch of each trial. count: of the items that each mean loss is over, one number or (trials,)."""
        seen = (step.outputs.detach(), step.targets) if self.metrics else (None, None)
        one = Held(step.loss.detach(), count, *seen)
        if self.held and shapes(one) != shapes(self.held[0]):
            self.sum_up()
        self.held.append(one)
        if len(self.held) >= self.hold or len(self.held) * step.outputs.numel() > Measures.large * 2:
            self.sum_up()

    @torch.no_grad()
    def sum_up(self) -> None:
        """Add what is held back to the sums."""
        held, self.held = self.held, []
        for losses, count, *_ in held:
            counts = torch.as_tensor(count, dtype=self.dtype, device=self.loss.device).expand(len(losses))
            self.loss += torch.stack([losses.to(self.dtype) * counts, counts], 1)
        if not held or held[0].outputs is None:
            return
        outputs, targets = (torch.cat([one[n] for one in held], 1) for n in (2, 3))  # type: ignore[misc]
        fresh = [sums_of(metric, outputs, targets).to(self.dtype) for metric in self.metrics]
        self.sums = [a + b for a, b in zip(self.sums, fresh, strict=True)] if self.sums else fresh

    def read(self) -> list[dict[str, float]]:
        """Return the values of each trial, in one transfer."""
        self.sum_up()
        loss, sums = self.loss.cpu(), [each.to("cpu", torch.float64) for each in self.sums]
        means = (loss[:, 0] / loss[:, 1]).tolist()
        pairs = list(zip(self.metrics, sums, strict=False))
        return [
            {"loss": mean} | {metric.name: metric.compute(each[row]) for metric, each in pairs}
            for row, mean in enumerate(means)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the trials."""
        self.sum_up()
        self.loss, self.sums = self.loss[list(rows)], [each[list(rows)] for each in self.sums]


def shapes(held: Held) -> list[torch.Size]:
    return [tensor.shape for tensor in (held.outputs, held.targets) if tensor is not None]


def sums_of(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
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
        self.sums = [a + b for a, b in zip(self.sums, mine, strict=True)] if self.sums else mine
        self.all.loss[self.row] = 0
        for each in self.all.sums:
            each[self.row] = 0

    @property
    def empty(self) -> bool:
        self._sum_up()
        return super().empty

    def state_dict(self) -> dict[str, Any]:
        self._sum_up()
        return super().state_dict()
