"""Callbacks that only look: gradient norms, learning rates, histograms."""

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Callback,
    Context,
    Every,
    PositiveInt,
    SettingError,
    Transform,
    callbacks,
    numbers_of,
)
from framework.contracts.state import Cadence


@callbacks.register("gradient_norm")
class GradientNorm(Callback):
    """Logs the 2-norm of all gradients together as train/gradient_norm, of the steps that are logged."""

    changes_training = False

    def __init__(self) -> None:
        self.measured: Tensor | None = None

    def needs_gradients(self, trainer: Context) -> bool:
        return will_log(trainer)

    def on_gradients(self, trainer: Context) -> None:
        self.measured = None
        if will_log(trainer):
            groups = trainer.optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            self.measured = total_norm(gradients)

    def on_log(self, trainer: Context) -> None:
        if self.measured is not None:
            trainer.log({"train/gradient_norm": self.measured})


@callbacks.register("learning_rate")
class LearningRate(Callback):
    """Logs the learning rate of each group of parameters, where there are several; the largest is always logged.

    Keys are train/learning_rate/<the group's "name", or its number>.
    """

    changes_training = False

    def on_log(self, trainer: Context) -> None:
        groups = trainer.optimizer.param_groups
        for number, group in enumerate(groups if len(groups) > 1 else ()):
            if "lr" in group:
                name = group.get("name", number)
                trainer.log({f"train/learning_rate/{name}": float(group["lr"])})


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of gradients together, some of which may be sparse."""
    try:
        return nn.utils.get_total_norm(gradients)
    except NotImplementedError:  # torch has none for sparse ones
        return nn.utils.get_total_norm([numbers_of(gradient) for gradient in gradients])


def will_log(trainer: Context) -> bool:
    """Whether the step under way ends with a log point, or may (by the clock, or in epochs of unknown length)."""
    state, cadence = trainer.state, trainer.log_every
    step = state.step + 1
    if state.steps_per_epoch == 0 or cadence.unit not in ("step", "epoch"):
        return True
    by_steps = cadence.unit == "step" and step % int(cadence.number) == 0
    epoch_ends = state.batch // trainer.accumulate + 1 >= state.steps_per_epoch
    return by_steps or epoch_ends or step == state.total_steps


@callbacks.register("histograms", aliases=["histogram"])
class Histograms(Callback):
    """Gives every logger the distribution of each parameter and its gradient, from before the first update on.

    Tags are weights/<parameter> and gradients/<parameter>. Values that are not finite are left out.
    Of a sparse gradient the values that it stores count, of complex numbers both parts.
    """

    changes_training = False

    def __init__(self, every: Every = "1epoch"):
        """Say how often.

        Args:
            every: how often; each time reads the whole model off the device.
        """
        self.cadence = Cadence(every)

    def needs_gradients(self, trainer: Context) -> bool:
        by_clock = self.cadence.unit not in ("step", "epoch")  # which may be asked but once a step
        return by_clock or self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0)

    def on_gradients(self, trainer: Context) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            self._show(trainer, "weights", dict(trainer.model.named_parameters()))
            self._show(
                trainer, "gradients", {name: p.grad for name, p in trainer.model.named_parameters()}
            )

    def on_fit_end(self, trainer: Context) -> None:
        self._show(trainer, "weights", dict(trainer.model.named_parameters()))

    def _show(self, trainer: Context, what: str, tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is None or not len(values := finite(tensor)):
                continue
            for logger in trainer.loggers:
                logger.histogram(f"{what}/{name}", values, trainer.state.step)


@callbacks.register("augmented")
class Augmented(Transform):
    """Gives the loggers the first pictures of a training batch, side by side, as the model got them: transformed.

    After the first step, and then at its cadence.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        """Say how many.

        Args:
            count: pictures, at most a batch.
            every: how often.
        """
        self.count, self.cadence = count, Cadence(every)
        self.shown: Tensor | None = None

    def __call__(self, batch: Batch) -> Batch:
        self.shown = batch[0][: self.count].clone()  # a loader may write there before the step ends
        return batch

    def on_step_end(self, trainer: Context) -> None:
        due = self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0)
        if self.shown is not None and (due or trainer.state.step == 1):
            picture = side_by_side(as_pictures(self.shown))
            for logger in trainer.loggers:
                logger.images("augmented", picture[None], trainer.state.step)
        self.shown = None


def as_pictures(inputs: Tensor) -> Tensor:
    """Return images (N, C, H, W) between 0 and 1, in colour or grey. Raises SettingError for what are no images."""
    if inputs.ndim != 4 or not inputs.is_floating_point():
        shape = tuple(inputs.shape[1:])
        raise SettingError(
            f"callbacks.augmented: it shows images (C, H, W); the inputs are {inputs.dtype} {shape}"
        )
    images = inputs.detach().float()
    images = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
    low, high = images.aminmax()
    return (images - low) / (high - low).clamp(min=1e-6)


def side_by_side(images: Tensor, most: int = 8) -> Tensor:
    """Return images (N, C, H, W) as one, in rows of at most so many; what the last row lacks is black."""
    columns = min(len(images), most)
    lacking = -len(images) % columns
    whole = torch.cat([images, images.new_zeros(lacking, *images.shape[1:])])
    return torch.cat([torch.cat(list(row), 2) for row in whole.split(columns)], 1)


def finite(tensor: Tensor) -> Tensor:
    """Return the finite values (of a sparse tensor, those stored), flat, as float32 on the CPU."""
    values = numbers_of(tensor.detach()).flatten().float().cpu()
    return values[values.isfinite()]
