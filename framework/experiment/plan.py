"""A run before it runs: layers with shapes and costs, steps, the schedule as a curve, memory. Nothing is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from framework.contracts.callback import Pace
from framework.contracts.schedule import factor_of
from framework.contracts.task import Task
from framework.data.dataset import Batch, Data, TensorSplit, splits_of
from framework.training.layer_table import (
    Layer,
    activation_bytes,
    optimizer_bytes,
    read_layers,
    size_in_bytes,
)

Schedule = Callable[[int], float]  # step to factor on the learning rate
CURVE_COLUMNS = 120
MOST_POINTS = 10_000


@dataclass
class SplitSize:
    """A split: samples, and bytes when it lies in memory."""

    name: str
    samples: int
    bytes: int | None


@dataclass
class ParameterGroup:
    """Parameters that the optimizer treats alike: how many numbers, and what is theirs alone."""

    name: str
    parameters: int
    lr_factor: float
    weight_decay: float


@dataclass
class Curve:
    """The learning rate over the run, as points evenly spread over its steps; `peak_step` is among all of them."""

    start: float
    peak: float
    peak_step: int
    end: float
    rates: list[float]


@dataclass
class Memory:
    """Estimated bytes of training; buffers of kernels and of the allocator come on top.

    Attributes:
        optimizer: its state after a step; None when the optimizer cannot be tried out.
        activations: what the forward pass of a batch keeps for the backward pass (the batch itself included).
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int | None
    activations: int
    total: int = 0

    def __post_init__(self):
        self.total = (
            self.parameters
            + self.buffers
            + self.gradients
            + (self.optimizer or 0)
            + self.activations
        )


@dataclass
class Plan:
    """What a run will do and need."""

    model: str
    layers: list[Layer]
    parameters: int
    trainable: int
    unused: list[str]
    flops: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    memory: Memory
    optimizer: str | None = None
    groups: list[ParameterGroup] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    curve: Curve | None = None
    splits: list[SplitSize] = field(default_factory=list)
    threads: int | None = None
    loader: str | None = None
    batches_per_step: float = 1
    pace: str | None = None  # which epochs have how many steps, where they differ

    def follow(self, pace: Pace, optimizer: Optimizer, schedule: Schedule | None) -> None:
        """Use the steps and learning rates of a callback that changes how batches make steps."""
        self.total_steps = pace.total_steps
        self.batches_per_step = pace.batches_per_step
        self.pace = pace.text
        place = pace.schedule_step
        if schedule is None or place is None:
            self.curve = read_curve(optimizer, schedule, pace.total_steps)
        else:
            self.curve = read_curve(optimizer, lambda step: schedule(place(step)), pace.total_steps)


def make_plan(
    model: nn.Module,
    batch: Batch,
    *,
    steps_per_epoch: int,
    total_steps: int,
    task: Task | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    data: Data | None = None,
    threads: int | None = None,
    loader: str | None = None,
    transforms: Sequence[str] = (),
) -> Plan:
    """Return the plan of a run.

    Args:
        batch: one training batch, on the model's device; its first four samples are run.
        steps_per_epoch, total_steps: optimizer steps.
        task: runs the model as in training, loss included; without it, the model is called with the inputs.
        schedule: the factor on the learning rate, by step.
        threads: that an operation may use on the CPU.
        loader: how batches are read, in words.
        transforms: of training batches, in words.
    """
    layers, unused = read_layers(model, batch, task)
    every = list(model.parameters())
    trainable = [p for p in every if p.requires_grad]
    splits = {} if data is None else splits_of(data)
    memory = Memory(
        parameters=size_in_bytes(every),
        buffers=size_in_bytes(model.buffers()),
        gradients=size_in_bytes(trainable),
        optimizer=None if optimizer is None else optimizer_bytes(optimizer),
        activations=activation_bytes(model, batch, task),
    )
    return Plan(
        model=type(model).__name__,
        layers=layers,
        parameters=sum(p.numel() for p in every),
        trainable=sum(p.numel() for p in trainable),
        unused=unused,
        flops=sum(layer.flops for layer in layers),
        batch_size=len(batch[0]),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        memory=memory,
        optimizer=None if optimizer is None else type(optimizer).__name__,
        groups=[] if optimizer is None else read_groups(optimizer),
        transforms=list(transforms),
        curve=read_curve(optimizer, schedule, total_steps),
        splits=[SplitSize(name, len(split), split_bytes(split)) for name, split in splits.items()],
        threads=threads,
        loader=loader,
    )


def read_curve(
    optimizer: Optimizer | None, schedule: Schedule | None, total_steps: int
) -> Curve | None:
    """Return the learning rate over the run: the optimizer's own, of which a group may have its factor."""
    if optimizer is None or total_steps < 1:
        return None
    base = base_rate(optimizer)
    if base is None:
        return None
    points = min(total_steps, MOST_POINTS)
    steps = [round(i * (total_steps - 1) / max(points - 1, 1)) for i in range(points)]
    rates = [base * (1.0 if schedule is None else factor_of(schedule, step)) for step in steps]
    peak = max(range(points), key=rates.__getitem__)
    columns = min(points, CURVE_COLUMNS)
    shown = [rates[round(i * (points - 1) / max(columns - 1, 1))] for i in range(columns)]
    return Curve(rates[0], rates[peak], steps[peak], rates[-1], shown)


def base_rate(optimizer: Optimizer) -> float | None:
    """Return the optimizer's own learning rate; None where it has none."""
    rate = optimizer.defaults.get("lr", optimizer.param_groups[0].get("lr"))
    return None if rate is None else float(rate)


def read_groups(optimizer: Optimizer) -> list[ParameterGroup]:
    """Return the groups; those of `Parameters` have names, which may end in their factor."""
    base, found = base_rate(optimizer), []
    for number, group in enumerate(optimizer.param_groups, 1):
        name = str(
            group.get("name", number if len(optimizer.param_groups) > 1 else "all")
        ).partition(" x ")[0]
        rate = group.get("initial_lr", group.get("lr"))
        factor = float(rate) / base if base and rate is not None else 1.0
        size = sum(parameter.numel() for parameter in group["params"])
        found.append(ParameterGroup(name, size, factor, float(group.get("weight_decay", 0.0))))
    return found


def split_bytes(split: Any) -> int | None:
    return size_in_bytes(split.tensors) if isinstance(split, TensorSplit) else None
