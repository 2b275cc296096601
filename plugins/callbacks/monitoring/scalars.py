"""Callbacks that log scalars: the norm of the gradient, and learning rates."""

import torch
from torch import Tensor, nn

from framework import Callback, Context, callbacks, dtensors, numbers_of
from framework_plugins.callbacks.gradients import gradients_of


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


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together; some may be sparse."""
    try:
        return dtensors.full_tensor(nn.utils.get_total_norm(gradients))
    except NotImplementedError:  # torch does not support sparse gradients
        return nn.utils.get_total_norm([numbers_of(gradient) for gradient in gradients])


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
