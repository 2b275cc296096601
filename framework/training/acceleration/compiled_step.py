"""torch's compiler: for the model, for forward and backward, or for a whole step with its update."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.pure_optimizer import PureUpdate, State, pure_updates, tensors_of
from framework.contracts.task import Phase, Step, Task
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.runtime.clock import Clock
from framework.runtime.memory import is_full
from framework.runtime.precision import Precision
from framework.runtime.torch_internals.compiler import CompilationError, CompiledFunction
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks
from framework.training.parameters import Parameters
from framework.training.validation import check_made

from .callbacks import GradientCallbacks
from .fused_update import skips_on_device
from .single_call_step import SingleCallStep

Compile = Literal["off", "model", "step"]
EXPECTED = 2  # times to compile: for the batches, and for the smaller last one of an epoch


class Compiled:
    """A function through torch.compile, for fixed shapes; its random numbers are those of the eager one.

    Warns when it is compiled again, with the reason; the time of compiling is the clock's "compiling".
    """

    def __init__(self, function: Callable, what: Compile, clock: Clock):
        self.function = CompiledFunction(function, traces_backward=what == "step")
        self.what = what
        self.clock = clock
        self.times = 0

    def __call__(self, *inputs: Any) -> Any:
        """Raises FrameworkError that says it was for `compile` when torch cannot compile the function."""
        try:
            result = self.function(*inputs)
        except CompilationError as error:
            cause = str(error)
            if " " in torch.__path__[0]:
                cause = (
                    f"it does not work from a folder with a space in its name ({torch.__path__[0]})"
                )
            raise FrameworkError(
                f"compile={self.what}: torch cannot compile this; with compile=off it runs: {cause}"
            ) from error
        if self.function.compile_seconds:
            self.clock.add("compiling", self.function.compile_seconds)
            self.times += 1
            if self.times > EXPECTED:
                self._warn()
        return result

    def _warn(self) -> None:
        reason = self.function.reason() or "torch does not say why"
        why = " ".join(reason.splitlines()[0].partition("#")[0].split())
        last = f"; after {self.function.limit} times torch runs what does not fit eagerly"
        warnings.warn(
            f"compile={self.what}: compiled {self.times} times ({why}){last}", stacklevel=2
        )


class CompiledStep:
    """Forward and backward as one compiled function, with the update where that is possible.

    It is a `StepImplementation` (see `training/step.py`).

    Args:
        model: the model.
        task: the task, which has no phases.
        parameters: whose gradients are computed.
        precision: the number format of the forward pass.
        clock: gets the time of compilations.
        single_call: the whole step, for steps of one batch; None if batches may have to be split.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        parameters: Parameters,
        precision: Precision,
        clock: Clock,
        single_call: "CompiledSingleCall | None",
    ):
        self.model, self.task, self.parameters = model, task, parameters
        self.precision, self.clock, self.single_call = precision, clock, single_call
        self.compiled_gradients = Compiled(self._gradients, "step", clock)

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        if share is None and self.single_call is not None and self.single_call.is_ready():
            with self.clock.detail("forward, backward and update"):
                return self.single_call(batch)
        factor = self._factor(share)
        with self.clock.detail("forward and backward"):
            made, gradients = self.compiled_gradients(batch, factor)
        for parameter, gradient in zip(self.parameters.optimized, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                gradient = parameter.grad + gradient
            parameter.grad = gradient
        return made, False

    def _factor(self, share: float | Tensor | None) -> Tensor | None:
        """Return the factor of the loss: its share in the step, times the scale of fp16."""
        device = self.precision.device
        factor = None if share is None else torch.as_tensor(share, device=device)
        if self.precision.scaler is None:
            return factor
        return self.precision.scaled(torch.ones((), device=device) if factor is None else factor)

    def _gradients(self, batch: Batch, factor: Tensor | None) -> tuple[Step, list[Tensor | None]]:
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        loss = made.loss if factor is None else made.loss * factor
        parameters = self.parameters.optimized
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
        gradients = [next(found) if parameter.requires_grad else None for parameter in parameters]
        return made.detach(), gradients


class CompiledSingleCall(SingleCallStep):
    """Forward, backward and the optimizer's update as one compiled function.

    If callbacks listen to `gradients`, an update with a loss or gradient that is not finite is left
    out, and the gradients are kept for the callbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        precision: Precision,
        clock: Clock,
        callbacks: GradientCallbacks,
    ):
        super().__init__(optimizer, callbacks)
        self.model, self.task, self.precision = model, task, precision
        self.update: PureUpdate | None = None
        if precision.scaler is None:
            self.update = pure_updates.find(optimizer)
        self.checks_finite = bool(callbacks.callbacks)
        self.compiled = Compiled(self._step, "step", clock)
        self.states: list[State] = []

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        settings = [tensor_free_settings(group) for group in self.optimizer.param_groups]
        self.set_learning_rates()
        made, gradients, finite = self.compiled(batch, self.learning_rates, settings)
        updated = not self.checks_finite or bool(finite)
        if not updated:
            for parameter, gradient in zip(self.trainable, gradients, strict=True):
                parameter.grad = gradient
        return made, updated

    def is_supported(self) -> bool:
        if self.update is None or has_step_hooks(self.optimizer) or skips_on_device(self.optimizer):
            return False
        if self.checks_finite and self.precision.device.type != "cpu":
            return False  # each step would wait for the device
        return pure_updates.find(self.optimizer) is self.update  # its settings may have changed

    def prepare_state(self) -> bool:
        state = self.optimizer.state
        self.states = [tensors_of(state.get(p)) for p in self.trainable]
        if all(state.get(p) for p in self.trainable):
            return True
        return all(self._is_stateless(group) for group in self.optimizer.param_groups)

    def _is_stateless(self, group: dict[str, Any]) -> bool:
        """Return whether the update keeps nothing (SGD without momentum)."""
        if self.update is None:
            return False
        number = torch.zeros(1)
        try:
            return not self.update(number, number, {}, group)[1]
        except KeyError:
            return False

    def _step(self, batch: Batch, rates: list[Tensor], settings: list[dict[str, Any]]) -> Any:
        assert self.update is not None
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        gradients = torch.autograd.grad(made.loss, self.trainable, allow_unused=True)
        finite = all_finite([made.loss, *gradients]) if self.checks_finite else None
        with torch.no_grad():
            for p, gradient, state, index in zip(
                self.trainable, gradients, self.states, self.group_indices, strict=True
            ):
                if gradient is None:
                    continue
                own = {**settings[index], "lr": rates[index]}
                p_new, state_new = self.update(p, gradient, state, own)
                write_if(finite, p, p_new)
                for name, tensor in state_new.items():
                    write_if(finite, state[name], tensor)
        return made.detach(), gradients if self.checks_finite else (), finite


class ExplainedStep:
    """Runs a compiled step; if it fails, runs the task eagerly, whose error says more.

    It is a `StepImplementation` (see `training/step.py`), as is the step that it runs.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Step, bool]],
        model: nn.Module,
        task: Task,
        parameters: Parameters,
        precision: Precision,
    ):
        self.step, self.model, self.task = step, model, task
        self.parameters, self.precision = parameters, precision

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        try:
            return self.step(batch, share, phase)
        except (FrameworkError, AttributeError, TypeError, RuntimeError) as error:
            if not is_full(error):
                self._run_eagerly(batch)
            raise

    def _run_eagerly(self, batch: Batch) -> None:
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        check_made(self.task, made, self.parameters.optimized)


def tensor_free_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group, without its parameters and learning rate."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return whether all numbers are finite, as a tensor."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor is not None]
    return torch.stack(finite).all()


def write_if(condition: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Write new numbers into a tensor, if the condition is None or true."""
    old.copy_(new if condition is None else torch.where(condition, new, old))
