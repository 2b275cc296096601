"""Callbacks that only log: gradient norms, learning rates, histograms, augmented images."""

from collections.abc import Callable
from typing import Any

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
    check_read_again,
    class_names,
    drawing,
    dtensors,
    numbers_of,
)
from framework.contracts.state import Cadence
from framework_plugins.callbacks.gradients import gradients_of

from .samples import as_pictures, model_outputs, spread_samples, target_texts

UNCHANGED = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


@callbacks.register("gradient_norm")
class GradientNorm(Callback):
    """Logs the 2-norm of all gradients together as train/gradient_norm, at logged steps.

    For a task with phases, such as `adversarial`, these are the gradients of all phases of a step.
    """

    changes_training = False

    def __init__(self) -> None:
        self.measured: Tensor | None = None
        self.measured_step = -1

    def reset(self) -> None:
        super().reset()
        self.measured = None
        self.measured_step = -1

    def needs_gradients(self, trainer: Context) -> bool:
        return will_log(trainer)

    def on_gradients(self, trainer: Context) -> None:
        if not will_log(trainer):
            self.measured = None
            return
        norm = total_norm(gradients_of(trainer.optimizer))
        step = trainer.state.step
        is_later_phase = self.measured is not None and self.measured_step == step
        self.measured = torch.hypot(self.measured, norm) if is_later_phase else norm
        self.measured_step = step

    def on_log(self, trainer: Context) -> None:
        if self.measured is not None:
            trainer.log({"train/gradient_norm": self.measured})


@callbacks.register("learning_rate")
class LearningRate(Callback):
    """Logs the learning rate of each parameter group, if there are several.

    The tags are train/learning_rate/<the group's "name", or its number>. The Trainer itself logs
    the largest rate.
    """

    changes_training = False

    def on_log(self, trainer: Context) -> None:
        groups = trainer.optimizer.param_groups
        if len(groups) == 1:
            return
        for number, group in enumerate(groups):
            if "lr" in group:
                name = group.get("name", number)
                trainer.log({f"train/learning_rate/{name}": float(group["lr"])})


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together; some may be sparse."""
    try:
        return dtensors.full_tensor(nn.utils.get_total_norm(gradients))
    except NotImplementedError:  # torch does not support sparse gradients
        return nn.utils.get_total_norm([numbers_of(gradient) for gradient in gradients])


def will_log(trainer: Context) -> bool:
    """Return whether the current step is or may be logged.

    A cadence in minutes, or an epoch of unknown length, may end with any step.
    """
    state = trainer.state
    cadence = trainer.log_every
    step = state.step + 1
    if state.steps_per_epoch == 0 or cadence.unit not in ("step", "epoch"):
        return True
    by_steps = cadence.unit == "step" and step % int(cadence.number) == 0
    epoch_ends = state.batch // trainer.accumulate + 1 >= state.steps_per_epoch
    return by_steps or epoch_ends or step == state.total_steps


@callbacks.register("histograms", aliases=["histogram"])
class Histograms(Callback):
    """Logs histograms of each parameter and its gradient, first before the first update.

    Tags are weights/<parameter>, gradients/<parameter> and activations/<module>. Values that are
    not finite are left out. A sparse gradient counts with its stored values, a complex number with
    both parts. Activations are the outputs of the innermost modules in evaluation mode for some
    samples of the validation split, or of the training split without one. The step is that whose
    update follows; the last values are those of the trained model, unless its step is logged or a
    signal ends the run.

    Args:
        every: how often to log them; each time copies all parameters from the device.
        activations: also log the activations; each time runs the model on `samples` samples.
        samples: for the activations.
    """

    changes_training = False

    def __init__(
        self, every: Every = "1epoch", activations: bool = False, samples: PositiveInt = 64
    ):
        self.cadence = Cadence(every)
        self.activations = activations
        self.samples = samples
        self.logged_step = 0

    def reset(self) -> None:
        super().reset()
        self.logged_step = 0

    def on_fit_start(self, trainer: Context) -> None:
        if self.activations:
            batches = trainer.train_batches
            if trainer.val_batches is not None:
                batches = trainer.val_batches
            check_read_again(batches, "callbacks.histograms.activations")

    def needs_gradients(self, trainer: Context) -> bool:
        in_minutes = self.cadence.unit not in ("step", "epoch")  # `due` would restart the clock
        return in_minutes or self.cadence.due(trainer.state)

    def cost(self) -> str:
        also = f" and runs the model on {self.samples:,} samples" if self.activations else ""
        return f"copies all weights and gradients{also}, {self.cadence}"

    def on_gradients(self, trainer: Context) -> None:
        step = trainer.state.step + 1  # a resumed run logs it again, and readers discard the first
        is_later_phase = self.logged_step == step
        if not is_later_phase:
            if not self.cadence.due(trainer.state):
                return
            self._log_model(trainer, step)
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                log_histogram(trainer, f"gradients/{name}", parameter.grad, step)

    def on_fit_end(self, trainer: Context) -> None:
        stop = trainer.state.stop
        is_interrupted = stop is not None and stop.signal is not None  # a resumed run goes on
        if self.logged_step < trainer.state.step and not is_interrupted:
            self._log_model(trainer, trainer.state.step)

    def _log_model(self, trainer: Context, step: int) -> None:
        self.logged_step = step
        for name, parameter in trainer.model.named_parameters():
            log_histogram(trainer, f"weights/{name}", parameter, step)
        if self.activations:
            self._log_activations(trainer, step)

    def _log_activations(self, trainer: Context, step: int) -> None:
        outputs: dict[str, Tensor] = {}

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point():
                    outputs[name] = output.clone()  # a later module may change it in place

            return keep_output

        hooks = []
        for name, module in trainer.model.named_modules():
            if not list(module.children()) and not isinstance(module, UNCHANGED):
                hooks.append(module.register_forward_hook(hook_of(name or "model")))
        try:
            model_outputs(trainer, spread_samples(trainer, self.samples))
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in outputs.items():
            log_histogram(trainer, f"activations/{name}", output, step)


def log_histogram(trainer: Context, tag: str, tensor: Tensor, step: int) -> None:
    """Pass the finite values of a tensor to the loggers, unless there are none."""
    values = finite_values(tensor)
    if len(values) == 0:
        return
    for logger in trainer.loggers:
        logger.histogram(tag, values, step)


def finite_values(tensor: Tensor) -> Tensor:
    """Return the finite values (of a sparse tensor, the stored ones), flat, float32 on the CPU."""
    values = numbers_of(dtensors.full_tensor(tensor.detach())).flatten().float().cpu()
    return values[values.isfinite()]


@callbacks.register("augmented")
class Augmented(Transform):
    """Logs the first images of a training batch side by side, as the model gets them: transformed.

    Below each is its class or number; for mixed targets, the two largest shares. It logs them after
    the first step, and then at its cadence. List it after the other transforms.

    Args:
        count: number of images, at most a batch.
        every: how often to log them.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 16, every: Every = "1epoch"):
        self.count = count
        self.cadence = Cadence(every)
        self.inputs: Tensor | None = None
        self.targets: Any = None

    def __call__(self, batch: Batch) -> Batch:
        """Copy the first inputs and targets; return the batch unchanged."""
        self.inputs = batch[0][: self.count].clone()  # a loader may reuse their memory
        self.targets = batch[1][: self.count].clone() if len(batch) > 1 else None
        return batch

    def on_step_end(self, trainer: Context) -> None:
        state = trainer.state
        due = self.cadence.due(state)
        if self.inputs is not None and (due or state.step == 1):
            images = as_pictures(self.inputs)
            if images is None:
                shape = tuple(self.inputs.shape[1:])
                raise SettingError(
                    f"callbacks.augmented: expected images (C, H, W), got {self.inputs.dtype} "
                    f"{shape}"
                )
            captions = [""] * len(images)
            if isinstance(self.targets, Tensor):
                captions = target_texts(self.targets, class_names(trainer.folder))
            image = drawing.captioned(images, captions)
            for logger in trainer.loggers:
                logger.images("augmented", image, state.step)
        self.inputs = None
        self.targets = None
