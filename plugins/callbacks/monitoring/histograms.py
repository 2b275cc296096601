"""A callback that logs histograms of weights, gradients and activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from framework import (
    Context,
    Every,
    PositiveInt,
    callbacks,
    check_read_again,
    dtensors,
    numbers_of,
)
from framework.contracts.periodic_callback import PeriodicCallback

from .samples import measured_batches, measured_samples, model_outputs


@callbacks.register("histograms", aliases=["histogram"])
class Histograms(PeriodicCallback):
    """Logs histograms of each parameter and its gradient, first before the first update.

    Tags are weights/<parameter>, gradients/<parameter> and activations/<module>. Values that are
    not finite are left out. A sparse gradient counts with its stored values, a complex number with
    both parts. Activations are the outputs of the innermost modules in evaluation mode for some
    samples of the validation split, or of the training split without one. Modules that only reshape
    or return their input, such as dropout, have none. The step is that whose update follows; the
    last values are those of the trained model, unless its step is logged or a signal ends the run.

    Args:
        every: how often to log them; each time copies all parameters from the device.
        activations: also log the activations; each time runs the model on `samples` samples.
        samples: for the activations.
    """

    def __init__(
        self, every: Every = "1epoch", activations: bool = False, samples: PositiveInt = 64
    ):
        super().__init__(every)
        self.activations = activations
        self.samples = samples
        self.logged_gradients: set[str] = set()  # the parameters at the shown step

    def reset(self) -> None:
        super().reset()
        self.logged_gradients = set()

    def on_fit_start(self, trainer: Context) -> None:
        if self.activations:
            check_read_again(measured_batches(trainer), "callbacks.histograms.activations")

    def needs_gradients(self, trainer: Context) -> bool:
        return self.cadence.due(trainer.state)

    def cost(self) -> str:
        also = f" and runs the model on {self.samples:,} samples" if self.activations else ""
        return f"copies all weights and gradients{also}, {self.cadence}"

    def on_gradients(self, trainer: Context) -> None:
        step = trainer.state.step + 1  # a resumed run logs it again, and readers discard the first
        if step != self.shown_step:
            if not self.cadence.due(trainer.state):
                return
            self.shown_step = step
            self._log_model(trainer, step)
            self.logged_gradients.clear()
        # once per step: a task may have several phases in a step, each with gradients
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None and name not in self.logged_gradients:
                self.logged_gradients.add(name)
                log_histogram(trainer, f"gradients/{name}", parameter.grad, step)

    def show(self, trainer: Context) -> None:
        self._log_model(trainer, trainer.state.step)

    def _log_model(self, trainer: Context, step: int) -> None:
        for name, parameter in trainer.model.named_parameters():
            log_histogram(trainer, f"weights/{name}", parameter, step)
        if self.activations:
            self._log_activations(trainer, step)

    def _log_activations(self, trainer: Context, step: int) -> None:
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep_input(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                inputs[module] = arguments[0].clone()  # the module may change it in place

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                before = inputs.pop(module, None)
                if not isinstance(output, Tensor) or not output.is_floating_point():
                    return
                if before is None or not passes_through(before, arguments[0], output):
                    outputs[name] = output.clone()  # a later module may change it in place

            return keep_output

        hooks = []
        for name, module in trainer.model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_pre_hook(keep_input))
                hooks.append(module.register_forward_hook(hook_of(name or "model")))
        try:
            model_outputs(trainer, measured_samples(trainer, self.samples))
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in outputs.items():
            log_histogram(trainer, f"activations/{name}", output, step)


def passes_through(before: Tensor, after: Tensor, output: Tensor) -> bool:
    """Return whether a module only reshapes or returns its input.

    Equal values are not enough: a ReLU has them if all its inputs are positive.

    Args:
        before: a copy of the input before the call.
        after: the input after the call.
        output: of the module.
    """
    if output.layout != torch.strided or before.numel() != output.numel():
        return False
    if before.shape == output.shape and after.data_ptr() != output.data_ptr():
        return False
    return torch.equal(before.flatten(), output.flatten())


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
