"""The callback `health`."""

import time
import warnings
from collections import deque
from contextlib import ExitStack
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Callback,
    Context,
    DataError,
    Every,
    FrameworkError,
    PositiveInt,
    callbacks,
    dtensors,
    model_undisturbed,
    pytree,
    select_rows,
    user_code,
)
from framework.contracts.model import GenerativeModel
from framework.contracts.state import Cadence

from .layers import QUANTITIES, Recorder, Weights, find_layers, joined, ratio, stuck_share
from .pages import heat_maps, layer_table
from .problems import PATIENCE, Observation, Watch, restored_watch

FIRST_STEPS = (16, 32, 64, 256)  # of the first observations
PERIOD = 1024  # steps between later ones
COLUMNS = 64  # of an image; older observations are thinned out
SHARE = 0.01  # of the time of the run that drawing takes
FIRST_DRAWING = 0.1  # seconds that the first drawing takes, with the import of Pillow
MANY_TRIALS = 8  # that train as one


class Pending:
    """An observation that waits for the end of the step.

    Attributes:
        weights: before the update.
        scalars: tensors with one element, by quantity and row; read at the end of the step.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self.scalars: dict[tuple[str, int], Tensor] = {}


@callbacks.register("health")
class Health(Callback):
    """Watches the layers during training, and warns about problems with what helps against them.

    For each layer with a weight it measures the mean and standard deviation of the activations (of
    its activation function if one follows), the share of saturated activations (for sigmoid, tanh
    and others that are flat at both ends: a derivative below 1 % of the largest) or of dead units
    (for relu and the like: such a derivative for all samples), the norm of the gradient, the norm
    of the change of its weights in the step relative to the weights (exact up to a million numbers
    of a weight, else at every k-th number), and the norm of the weights. The loggers get them as a
    table (text "health") and as images over the steps ("health/gradient" and others), drawn in at
    most 1 % of the time of the run.

    The warnings are about vanishing and exploding gradients, saturated and dead units, exploding
    activations, layers without a gradient, a learning rate that is too small or too large, inputs
    that are not scaled, and generators of adversarial training that collapse. A problem must
    persist over three observations. The thresholds, with sources, are in health/problems.py.

    The activations are those of an extra forward pass of some samples of a training batch, in
    training mode, which leaves buffers and random numbers as they were. So compiled steps and CUDA
    graphs stay as they are. An observation also copies the weights until the end of its step. With
    several processes, the activations are those of the main process. A function that is called in
    `forward`, such as F.relu, is no module: then the activations are those before it.

    Args:
        every: how often to observe. null: after 16, 32, 64 and 256 steps, then every 1,024 steps;
            for many trials that train as one: after 16, 64, 256, 1024, 4096, ... steps.
        samples: the number of samples for the activations, at most a batch.
        scalars: also log each number as a scalar, health/<quantity>/<layer>.
    """

    changes_training = False

    def __init__(
        self, every: Every | None = None, samples: PositiveInt = 32, scalars: bool = False
    ):
        self.cadence = None if every is None else Cadence(every)
        self.samples = samples
        self.scalars = scalars
        self.trials = 1
        self._forget()

    def _forget(self) -> None:
        self.recorder: Recorder | None = None
        self.pending: Pending | None = None
        self.seen: Observation | None = None
        self.watch = Watch()
        self.first_loss: Tensor | None = None
        self.steps: list[int] = []
        self.shown_step = -1
        self.names: list[str] = []
        self.history = torch.zeros(0, len(QUANTITIES), 0)
        self.messages: list[str] = []
        self.failed = False
        self.drawn = 0.0
        self.drawing_seconds = FIRST_DRAWING

    def reset(self) -> None:
        super().reset()
        self._forget()

    def among(self, trials: int) -> None:
        self.trials = trials

    def on_fit_start(self, trainer: Context) -> None:
        self.drawn = time.monotonic()

    def needs_gradients(self, trainer: Context) -> bool:
        return trainer.state.step == 0 or self._is_due(trainer)

    def _is_due(self, trainer: Context) -> bool:
        """Return whether to observe the step that follows the counted ones."""
        state = trainer.state
        step = state.step + 1
        if self.cadence is None:
            return is_due_by_default(step, self.trials)
        if self.cadence.unit == "step":
            return step % int(self.cadence.number) == 0
        return self.cadence.due(state)

    def on_gradients(self, trainer: Context) -> None:
        if trainer.state.step == 0 and self.first_loss is None:
            self.first_loss = trainer.loss.detach().clone()
        if self.pending is not None:  # a later phase of the step
            self.pending.weights.add_gradients()
        elif self._is_due(trainer):
            self._begin(trainer)

    @torch.no_grad()
    def _begin(self, trainer: Context) -> None:
        """Measure the activations, the gradients and the weights before the update."""
        if self.recorder is None or self.recorder.model is not trainer.model:
            self.recorder = Recorder(trainer.model, find_layers(trainer.model))
        self.pending = Pending(Weights(self.recorder.layers))
        if not self.failed and self._all_have_rows(trainer):
            try:
                self._measure_activations(trainer, self.recorder)
            except Exception as error:  # a model may fail in any way outside of its own step
                self.failed = True
                warnings.warn(
                    f"health: the activations are not measured: {user_code.describe(error)}",
                    stacklevel=1,
                )

    def _all_have_rows(self, trainer: Context) -> bool:
        """Return whether a forward pass is possible (collective if the pass is)."""
        has_rows = len(trainer.batches) > 0
        strategy = trainer.strategy
        if strategy.world_size == 1:
            return has_rows
        if not strategy.forward_is_collective and not dtensors.has_dtensors(trainer.model):
            return has_rows
        return all(strategy.gather(has_rows))

    def _measure_activations(self, trainer: Context, recorder: Recorder) -> None:
        assert self.pending is not None
        batch = first_samples(trainer.batches[0], self.samples)
        inputs = numeric_inputs(trainer, batch)
        scalars = self.pending.scalars
        if inputs is not None:
            variance, mean = torch.var_mean(inputs.float(), correction=0)
            scalars["inputs", 0] = mean
            scalars["inputs", 1] = variance.sqrt()
        criterion = trainer.task.criterion
        with ExitStack() as stack:
            stack.enter_context(model_undisturbed(trainer.model, train=None))
            if criterion is not None and next(criterion.buffers(), None) is not None:
                stack.enter_context(model_undisturbed(criterion, train=None))
            stack.enter_context(trainer.precision.autocast())
            # A task may differentiate within its step. With a sharded model, a forward pass with
            # gradients would need a backward pass.
            with_gradients = not dtensors.has_dtensors(trainer.model)
            stack.enter_context(torch.set_grad_enabled(with_gradients))
            stack.enter_context(recorder.recording())
            samples = trainer.strategy.forward(
                run_task, trainer.model, trainer, batch, recorder, inputs
            )
        if samples is not None and inputs is not None:
            of_samples = samples.detach().float().std(0, correction=0).mean()
            scalars["spread", 0] = of_samples / inputs.float().std(0, correction=0).mean()
        for row, total in recorder.totals.items():
            layer = recorder.layers[row]
            assert total.sums is not None
            mean, square = total.sums / total.count
            scalars["mean", row] = mean
            scalars["std", row] = (square - mean.square()).clamp(min=0).sqrt()
            share = stuck_share(layer, total)
            if share is not None:
                scalars["stuck", row] = share
            if total.dead is not None:
                masks = self.watch.dead.setdefault(row, deque(maxlen=PATIENCE))
                masks.append(total.dead)

    def on_step_end(self, trainer: Context) -> None:
        if self.pending is None:
            return
        self._finish(trainer, self.pending)
        self.pending = None

    @torch.no_grad()
    def _finish(self, trainer: Context, pending: Pending) -> None:
        """Read the numbers of the step, record them, and warn about new problems."""
        seen = self._read(trainer, pending)
        self.seen = seen
        messages = self.watch.messages(seen)
        for message in messages:
            warnings.warn(f"health: {message}", stacklevel=1)
        self.messages += messages
        self._remember(seen)
        if self.scalars:
            trainer.log(named_scalars(seen))
        if messages or time.monotonic() - self.drawn > self.drawing_seconds / SHARE:
            self._show(trainer)

    def _read(self, trainer: Context, pending: Pending) -> Observation:
        assert self.recorder is not None
        layers = self.recorder.layers
        scalars: dict[tuple[Any, ...], Tensor] = {("loss",): trainer.loss, **pending.scalars}
        if self.first_loss is not None:
            scalars["first_loss",] = self.first_loss
            self.first_loss = None
        weights = pending.weights
        changes, before = weights.changes()
        parts = {
            "gradient_norm": weights.gradient_norms,
            "weight_norm": weights.weight_norms,
            "change": changes,
            "before": before,
        }
        for name, norms in parts.items():
            for place, norm in norms.items():
                scalars[name, *place] = norm
        device = trainer.device
        columns = [
            tensor.detach().to(device, torch.float32).reshape(()) for tensor in scalars.values()
        ]
        values = dict(zip(scalars, torch.stack(columns).tolist(), strict=True))
        self.watch.first_loss = values.get(("first_loss",), self.watch.first_loss)

        def norm(name: str, row: int) -> float:
            places = range(len(layers[row].parameters))
            return joined(values[name, row, n] for n in places if (name, row, n) in values)

        numbers: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
        for row in range(len(layers)):
            for quantity in ("mean", "std", "stuck"):
                numbers[quantity].append(values.get((quantity, row), nan))
            numbers["gradient"].append(norm("gradient_norm", row))
            numbers["update"].append(ratio(norm("change", row), norm("before", row)))
            numbers["weight"].append(norm("weight_norm", row))
        rate, factor = learning_rate(trainer)
        return Observation(
            step=trainer.state.step,
            layers=layers,
            numbers=numbers,
            loss=values["loss",],
            rate=rate,
            factor=factor,
            inputs=(values.get(("inputs", 0), nan), values.get(("inputs", 1), nan)),
            spread=values.get(("spread", 0), nan),
            discriminator_loss=trainer.state.metrics.get("train/discriminator_loss", nan),
            has_phases=bool(trainer.task.phases),
        )

    def _remember(self, seen: Observation) -> None:
        """Add a column to the history."""
        names = [layer.name for layer in seen.layers]
        if names != self.names:
            self.names = names
            self.steps = []
            self.history = torch.zeros(0, len(QUANTITIES), len(names))
        column = torch.tensor([seen.numbers[quantity] for quantity in QUANTITIES])
        self.steps.append(seen.step)
        self.history = torch.cat([self.history, column[None]])
        if len(self.steps) > COLUMNS:
            self.steps = self.steps[::2]
            self.history = self.history[::2]

    def on_fit_end(self, trainer: Context) -> None:
        if self.seen is not None and self.seen.step != self.shown_step:
            self._show(trainer)

    def _show(self, trainer: Context) -> None:
        """Pass the table to the loggers, and the images if the run has lasted long enough."""
        assert self.seen is not None
        if not trainer.loggers:
            return
        step = self.seen.step
        self.shown_step = step
        table = layer_table(self.seen, self.messages)
        for logger in trainer.loggers:
            logger.text("health", table, step)
        began = time.monotonic()
        if began - self.drawn < self.drawing_seconds / SHARE:
            return
        for tag, image in heat_maps(self.seen, self.steps, self.history).items():
            for logger in trainer.loggers:
                logger.images(tag, image, step)
        self.drawn = time.monotonic()
        self.drawing_seconds = self.drawn - began

    def state_dict(self) -> dict[str, Any]:
        if self.first_loss is not None:
            self.watch.first_loss = float(self.first_loss)
            self.first_loss = None
        return {
            "watch": self.watch.state_dict(),
            "messages": list(self.messages),
            "names": list(self.names),
            "steps": list(self.steps),
            "history": [None if isnan(x) else x for x in self.history.flatten().tolist()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch = restored_watch(state.get("watch", {}))
        self.messages = list(state.get("messages", []))
        self.names = list(state.get("names", []))
        self.steps = list(state.get("steps", []))
        shape = (len(self.steps), len(QUANTITIES), len(self.names))
        numbers = [nan if x is None else x for x in state.get("history", [])]
        self.history = torch.tensor(numbers).reshape(shape)


def is_due_by_default(step: int, trials: int) -> bool:
    """Return whether a step is observed if no cadence is set."""
    if trials < MANY_TRIALS:
        return step % PERIOD == 0 or step in FIRST_STEPS
    is_power_of_4 = step & (step - 1) == 0 and step.bit_length() % 2 == 1
    return is_power_of_4 and step >= FIRST_STEPS[0]


def first_samples(batch: Batch, count: int) -> Batch:
    """Return copies of the first samples of a batch; of all if it cannot be split."""
    try:
        few = select_rows(batch, 0, count)
    except DataError:
        few = batch
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, few)


def numeric_inputs(trainer: Context, batch: Batch) -> Tensor | None:
    """Return the inputs of the model if they are one tensor of floating-point numbers."""
    try:
        inputs = trainer.task.fields.only_input(batch)
    except FrameworkError:
        return None
    return inputs.detach() if inputs.is_floating_point() else None


def run_task(
    model: nn.Module, trainer: Context, batch: Batch, recorder: Recorder, inputs: Tensor | None
) -> Tensor | None:
    """Run the model as the task does; return samples of a generator in adversarial training."""
    task = trainer.task
    if not task.phases:
        task.step(model, batch)
        recorder.end_forward()
        return None
    task.model_outputs(model, batch)
    recorder.end_forward()
    if inputs is None or not isinstance(model, GenerativeModel):
        return None
    samples = model.sample(len(inputs))
    recorder.end_forward()
    return samples


def learning_rate(trainer: Context) -> tuple[float, float]:
    """Return the largest learning rate without the schedule, and the factor of the schedule."""
    rates = []
    for group in trainer.optimizer.param_groups:
        if "lr" in group:
            now = float(group["lr"])
            base = float(group.get("initial_lr", now))
            rates.append((base, now / base if base else 1.0))
    return max(rates, default=(nan, 1.0))


def named_scalars(seen: Observation) -> dict[str, float]:
    """Return the known numbers by tag."""
    values = {}
    for quantity, numbers in seen.numbers.items():
        for layer, number in zip(seen.layers, numbers, strict=True):
            if not isnan(number):
                values[f"health/{quantity}/{layer.name}"] = number
    return values
