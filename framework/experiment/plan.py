"""The plan of a run: layers, cost, steps, learning rate and memory. Nothing is trained."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from framework.contracts.callback import Pace
from framework.contracts.schedule import factor_of
from framework.contracts.strategy import Estimate, Memory
from framework.contracts.task import Task
from framework.data.dataset import Batch, Data, TensorSplit, splits_of
from framework.runtime.batch import count_rows
from framework.training.layer_table import (
    Layer,
    activation_bytes,
    optimizer_bytes,
    read_layers,
    size_in_bytes,
)

ScheduleFunction = Callable[[int], float]  # step to factor on the learning rate
CURVE_POINTS = 120
MOST_POINTS = 10_000  # steps at which the schedule is evaluated


@dataclass
class SplitSize:
    """The size of a split: samples, and bytes if it is in memory."""

    name: str
    samples: int
    bytes: int | None


@dataclass
class ParameterGroup:
    """A group of parameters of the optimizer: how many numbers, and its own settings."""

    name: str
    parameters: int
    lr_factor: float
    weight_decay: float


@dataclass
class Curve:
    """The learning rate over the run.

    Attributes:
        start: the rate of the first step.
        peak: the largest rate, at `peak_step`.
        end: the rate of the last step.
        rates: at evenly spaced steps.
    """

    start: float
    peak: float
    peak_step: int
    end: float
    rates: list[float]


@dataclass
class Plan:
    """The work and memory of a run.

    Attributes:
        unused: parameters of layers that the forward pass does not call.
        flops: of the forward pass of a sample.
        steps_per_epoch, total_steps: optimizer steps.
        transforms: of training batches, as text.
        callbacks: what some callbacks add to the time of the run, as text.
        threads: for an operation on the CPU.
        loader: how batches are read, as text.
        pace: the steps of each epoch, as text, if they differ.
        memory: of a process.
        processes: their number.
        strategy: by which they share the work; None for a single process.
        sent: bytes that a process sends in a step.
    """

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
    callbacks: list[str] = field(default_factory=list)
    curve: Curve | None = None
    splits: list[SplitSize] = field(default_factory=list)
    threads: int | None = None
    loader: str | None = None
    batches_per_step: float = 1
    pace: str | None = None
    processes: int = 1
    strategy: str | None = None
    sent: int = 0

    def use_estimate(self, estimate: Estimate, processes: int, strategy: str) -> None:
        """Use the memory and the communication of several processes."""
        self.memory = estimate.memory
        self.sent = estimate.sent
        self.processes = processes
        self.strategy = strategy

    def use_pace(self, pace: Pace, optimizer: Optimizer, schedule: ScheduleFunction | None) -> None:
        """Use the steps and learning rates of a callback that changes the batches per step."""
        self.total_steps = pace.total_steps
        self.batches_per_step = pace.batches_per_step
        self.pace = pace.text
        schedule_step = pace.schedule_step
        if schedule is None or schedule_step is None:
            self.curve = read_curve(optimizer, schedule, pace.total_steps)
            return

        def paced(step: int) -> float:
            return schedule(schedule_step(step))

        self.curve = read_curve(optimizer, paced, pace.total_steps)


def make_plan(  # noqa: PLR0913  # all but two by keyword
    model: nn.Module,
    batch: Batch,
    *,
    steps_per_epoch: int,
    total_steps: int,
    task: Task | None = None,
    optimizer: Optimizer | None = None,
    schedule: ScheduleFunction | None = None,
    data: Data | None = None,
    rows: int | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        batch: a training batch on the device of the model; its first four samples are used.
        steps_per_epoch: optimizer steps.
        total_steps: optimizer steps.
        task: runs the model as in training, with the loss; without it the model is called with the
            inputs.
        schedule: the factor on the learning rate, by step.
        rows: the samples of a batch that a process has at once; None for all of them.
    """
    layers, unused = read_layers(model, batch, task)
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    memory = Memory(
        parameters=size_in_bytes(parameters),
        buffers=size_in_bytes(model.buffers()),
        gradients=size_in_bytes(trainable),
        optimizer=None if optimizer is None else optimizer_bytes(optimizer),
        activations=activation_bytes(model, batch, task, rows),
    )
    plan = Plan(
        model=type(model).__name__,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        unused=unused,
        flops=sum(layer.flops for layer in layers),
        batch_size=count_rows(batch),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        memory=memory,
    )
    if optimizer is not None:
        plan.optimizer = type(optimizer).__name__
        plan.groups = read_groups(optimizer)
        plan.curve = read_curve(optimizer, schedule, total_steps)
    if data is not None:
        for name, split in splits_of(data).items():
            size = size_in_bytes(split.tensors) if isinstance(split, TensorSplit) else None
            plan.splits.append(SplitSize(name, len(split), size))
    return plan


def read_curve(
    optimizer: Optimizer, schedule: ScheduleFunction | None, total_steps: int
) -> Curve | None:
    """Return the optimizer's own learning rate over the run, without the factors of its groups."""
    base = base_rate(optimizer)
    if base is None or total_steps < 1:
        return None
    steps = evenly_spaced(total_steps, MOST_POINTS)
    rates = [base * (1.0 if schedule is None else factor_of(schedule, step)) for step in steps]
    peak = rates.index(max(rates))
    shown = [rates[index] for index in evenly_spaced(len(rates), CURVE_POINTS)]
    return Curve(rates[0], rates[peak], steps[peak], rates[-1], shown)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` indices from 0 to count - 1, with both ends."""
    points = min(count, most)
    return [round(i * (count - 1) / max(points - 1, 1)) for i in range(points)]


def base_rate(optimizer: Optimizer) -> float | None:
    """Return the optimizer's own learning rate; None if it has none."""
    rate = optimizer.defaults.get("lr", optimizer.param_groups[0].get("lr"))
    return None if rate is None else float(rate)


def read_groups(optimizer: Optimizer) -> list[ParameterGroup]:
    """Return the groups of parameters; groups without a name are numbered."""
    base = base_rate(optimizer)
    groups = []
    for number, group in enumerate(optimizer.param_groups, 1):
        default = number if len(optimizer.param_groups) > 1 else "all"
        # The name of a group of `Parameters` may end in its factor on the learning rate.
        name = str(group.get("name", default)).partition(" x ")[0]
        rate = group.get("initial_lr", group.get("lr"))
        factor = float(rate) / base if base and rate is not None else 1.0
        size = sum(parameter.numel() for parameter in group["params"])
        groups.append(ParameterGroup(name, size, factor, float(group.get("weight_decay", 0.0))))
    return groups
