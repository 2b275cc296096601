"""A callback that logs histograms of weights, gradients and activations."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from framework import Context, Every, PositiveInt, callbacks, dtensors, numbers_of
from framework.contracts.periodic_callback import PeriodicCallback

from .samples import measured_samples, model_outputs

UNCHANGED = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


@callbacks.register("histograms", aliases=["histogram"])
class Histograms(PeriodicCallback):
    """Logs histograms of each parameter and its gradient, first before the first update.

    Tags are weights/<parameter>, gradients/<parameter> and activations/<module>. Values that are
    not finite are left out. A sparse gradient counts with its stored values, a complex number with
    both parts. Activations are the outputs of the innermost modules in evaluation mode for some
    samples of the validation split, or of the training split without one. The step is that whose
    update follows; the last values are those of the trained model, unless its step is logged.

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
            model_outputs(trainer, measured_samples(trainer, self.samples))
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
