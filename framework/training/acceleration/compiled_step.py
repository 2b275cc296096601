"""`torch.compile` of the model, of forward and backward, or of a step with its update.

`select_step` in `training/step.py` chooses:

- compile=model: `Compiled` is the model of the eager step.
- compile=step: `CompiledStep`; it passes steps of one batch to `CompiledSingleCall` if it can.
- compile=auto: the same or the eager step, whichever is faster (`compile_choice.py`).

All are run by `ExplainedStep`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
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
from framework.training.parameters import ModelParameters
from framework.training.step_checks import check_result

from .callbacks import GradientCallbacks
from .fused_update import skips_on_device
from .single_call_step import SingleCallStep

Compile = Literal["off", "model", "step", "auto"]
EXPECTED_COMPILATIONS = 2  # for the usual batch, and for the smaller last one of an epoch


class Compiled:
    """A function compiled for fixed shapes, with the random numbers of the eager function.

    It warns if it is compiled more often than expected.

    Args:
        function: a function of tensors.
        setting: the value of the setting `compile`, for messages.
        clock: receives the time of compilations as "compiling".
    """

    def __init__(self, function: Callable[..., Any], setting: Compile, clock: Clock):
        self.function = CompiledFunction(function, traces_backward=setting != "model")
        self.setting = setting
        self.clock = clock
        self.compilations = 0
        self.split = False  # whether a graph break was reported

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the result of the function.

        Raises:
            FrameworkError: torch cannot compile the function.
        """
        try:
            result = self.function(*inputs, **named)
        except CompilationError as error:
            raise self._compilation_error(error) from error
        if self.function.compile_seconds:
            self._count_compilation(self.function.compile_seconds)
            self._report_graph_break(self.function.graph_break)
        return result

    def _compilation_error(self, error: CompilationError) -> FrameworkError:
        cause = str(error)
        folder = torch.__path__[0]
        if " " in folder:
            cause = f"it does not work from a folder with a space in its name ({folder})"
        return FrameworkError(
            f"compile={self.setting}: torch cannot compile this; use compile=off: {cause}"
        )

    def _report_graph_break(self, reason: str | None) -> None:
        """Warn once if torch has split the function."""
        if reason is None or self.split:
            return
        self.split = True
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        explanation = [line for line in lines if line.startswith("Explanation:")]
        text = explanation[0].removeprefix("Explanation:").strip() if explanation else lines[0]
        warnings.warn(
            f"compile={self.setting}: torch cannot compile a part of the model or the loss, which "
            f"runs as Python code between compiled parts and is slower: {text}",
            stacklevel=2,
        )

    def _count_compilation(self, seconds: float) -> None:
        self.clock.add("compiling", seconds)
        self.compilations += 1
        if self.compilations <= EXPECTED_COMPILATIONS:
            return
        reason = self.function.reason() or "torch gives no reason"
        reason = " ".join(reason.splitlines()[0].partition("#")[0].split())
        warnings.warn(
            f"compile={self.setting}: compiled {self.compilations} times ({reason});"
            f" after {self.function.limit} times torch runs other inputs eagerly",
            stacklevel=2,
        )


class CompiledStep:
    """Forward and backward as one compiled function, with the update if possible.

    It is a `StepImplementation` (see `training/step.py`).

    Args:
        model: called by the task.
        task: computes the loss; it has no phases.
        parameters: those whose gradients are computed.
        precision: autocast and gradient scaler.
        clock: receives the time of compilations.
        single_call: the step with its update, for steps of one batch; None if batches may have to
            be split.
        setting: the value of the setting `compile`, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        parameters: ModelParameters,
        precision: Precision,
        clock: Clock,
        single_call: "CompiledSingleCall | None",
        setting: Compile = "step",
    ):
        self.model = model
        self.task = task
        self.parameters = parameters
        self.precision = precision
        self.clock = clock
        self.single_call = single_call
        self.compiled_gradients = Compiled(self._gradients, setting, clock)

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Run the step with its update if possible, else forward and backward only."""
        batch = self.task.fields.used(batch)
        if share is None and self.single_call is not None and self.single_call.is_ready():
            with self.clock.detail("forward, backward and update"):
                return self.single_call(batch)
        factor = self._loss_factor(share)
        with self.clock.detail("forward and backward"):
            result, gradients = self.compiled_gradients(batch, factor)
        for parameter, gradient in zip(self.parameters.optimized, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad = parameter.grad + gradient
        return result, False

    def _loss_factor(self, share: float | Tensor | None) -> Tensor | None:
        """Return the factor on the loss: its share in the step, times the scale of fp16."""
        device = self.precision.device
        factor = None if share is None else torch.as_tensor(share, device=device)
        if self.precision.scaler is None:
            return factor
        if factor is None:
            factor = torch.ones((), device=device)
        return self.precision.scaled(factor)

    def _gradients(self, batch: Batch, factor: Tensor | None) -> tuple[Step, list[Tensor | None]]:
        """Return the result, and the gradient of each optimized parameter (compiled)."""
        with self.precision.autocast():
            result = self.task.step(self.model, batch)
        loss = result.loss if factor is None else result.loss * factor
        parameters = self.parameters.optimized
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        computed = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
        gradients = [next(computed) if p.requires_grad else None for p in parameters]
        return result.detach(), gradients


class CompiledSingleCall(SingleCallStep):
    """Forward, backward and the update of a pure optimizer as one compiled function.

    If callbacks listen to `gradients` and the loss or a gradient is not finite, the update is
    skipped, and the gradients are kept for the callbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        precision: Precision,
        clock: Clock,
        callbacks: GradientCallbacks,
        setting: Compile = "step",
    ):
        super().__init__(optimizer, callbacks)
        self.model = model
        self.task = task
        self.precision = precision
        self.update: PureUpdate | None = None
        if precision.scaler is None:
            self.update = pure_updates.find(optimizer)
        self.step_numbers = pure_updates.step_numbers(optimizer)
        self.checks_finite = bool(callbacks.callbacks)
        self.compiled = Compiled(self._step, setting, clock)
        self.states: list[State] = []
        self.counters: list[list[Tensor]] = []  # of steps, by group
        self.step_tensors: dict[tuple[int, str], Tensor] = {}  # by group and name

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        """Run the step; not updated if the loss or a gradient is not finite."""
        self.set_learning_rates()
        settings = [constant_settings(group) for group in self.optimizer.param_groups]
        result, gradients, finite = self.compiled(batch, self.group_numbers(), settings)
        if not self.checks_finite or bool(finite):
            return result, True
        for parameter, gradient in zip(self.trainable, gradients, strict=True):
            parameter.grad = gradient
        return result, False

    def is_supported(self) -> bool:
        """Return whether the optimizer has the pure update that the function was compiled with."""
        if self.update is None or has_step_hooks(self.optimizer) or skips_on_device(self.optimizer):
            return False
        if self.checks_finite and self.precision.device.type != "cpu":
            return False  # each step would wait for the device
        return pure_updates.find(self.optimizer) is self.update  # its settings may have changed

    def prepare_state(self) -> bool:
        """Collect the state tensors; return whether each parameter has its state."""
        state = self.optimizer.state
        self.states = [tensors_of(state.get(p)) for p in self.trainable]
        self.counters = [[] for _ in self.optimizer.param_groups]
        self.step_tensors = {}
        for index, own in zip(self.group_indices, self.states, strict=True):
            if "step" in own:
                self.counters[index].append(own["step"])
        if all(state.get(p) for p in self.trainable):
            return True
        return all(self._is_stateless(group) for group in self.optimizer.param_groups)

    def group_numbers(self) -> list[dict[str, Tensor]]:
        """Return tensors with the numbers of each group that the call reads.

        They are the learning rate and, on a CPU, the numbers that depend on the step only (see
        `StepNumbers`). Gain: compiled for a CPU, the powers in the bias corrections of Adam are
        computed for each vector of elements, a fifth of the time of a step of the tiny MLP.
        """
        numbers = [{"lr": rate} for rate in self.learning_rates]
        if self.step_numbers is None or self.precision.device.type != "cpu":
            return numbers
        for index, group in enumerate(self.optimizer.param_groups):
            steps = {counter.item() for counter in self.counters[index]}
            if len(steps) != 1:
                continue  # a parameter was not updated in some steps
            for name, value in self.step_numbers(steps.pop() + 1, group).items():
                key = (index, name)
                if key not in self.step_tensors:
                    self.step_tensors[key] = torch.zeros_like(self.learning_rates[index])
                numbers[index][name] = self.step_tensors[key].fill_(value)
        return numbers

    def _is_stateless(self, group: dict[str, Any]) -> bool:
        """Return whether the update has no state, as SGD without momentum."""
        if self.update is None:
            return False
        zero = torch.zeros(1)
        try:
            return not self.update(zero, zero, {}, group)[1]
        except KeyError:
            return False

    def _step(
        self, batch: Batch, numbers: list[dict[str, Tensor]], settings: list[dict[str, Any]]
    ) -> tuple[Step, Sequence[Tensor | None], Tensor | None]:
        """Run the step; the function that is compiled.

        Args:
            batch: tensors of shape (samples, ...).
            numbers: the learning rate of each group, and numbers that depend on the step.
            settings: the other settings of each group, which are constants of the compiled code.

        Returns:
            The result; and if the step checks whether the loss and the gradients are finite, the
            gradients, and whether they are.
        """
        with self.precision.autocast():
            result = self.task.step(self.model, batch)
        gradients = torch.autograd.grad(result.loss, self.trainable, allow_unused=True)
        if not self.checks_finite:
            self._update_parameters(gradients, numbers, settings, None)
            return result.detach(), (), None
        finite = all_finite([result.loss, *gradients])
        self._update_parameters(gradients, numbers, settings, finite)
        return result.detach(), gradients, finite

    def _update_parameters(
        self,
        gradients: Sequence[Tensor | None],
        numbers: list[dict[str, Tensor]],
        settings: list[dict[str, Any]],
        condition: Tensor | None,
    ) -> None:
        """Update parameters and state in place if the condition is None or true (compiled)."""
        assert self.update is not None
        with torch.no_grad():
            for parameter, gradient, state, index in zip(
                self.trainable, gradients, self.states, self.group_indices, strict=True
            ):
                if gradient is None:
                    continue
                group = {**settings[index], **numbers[index]}
                new_parameter, new_state = self.update(parameter, gradient, state, group)
                write_if(condition, parameter, new_parameter)
                for name, tensor in new_state.items():
                    write_if(condition, state[name], tensor)


class ExplainedStep:
    """Runs a compiled step; if it fails, runs the task eagerly for a clearer error.

    Both this class and the step that it runs are a `StepImplementation` (see `training/step.py`).
    """

    def __init__(
        self,
        step: Callable[..., tuple[Step, bool]],
        model: nn.Module,
        task: Task,
        parameters: ModelParameters,
        precision: Precision,
    ):
        self.step = step
        self.model = model
        self.task = task
        self.parameters = parameters
        self.precision = precision

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Run the step.

        Raises:
            FrameworkError: the error of the eager task if it fails too, else that of the step.
        """
        try:
            return self.step(batch, share, phase)
        except (FrameworkError, AttributeError, TypeError, RuntimeError) as error:
            if not is_full(error):
                self._run_eagerly(batch)
            raise

    def _run_eagerly(self, batch: Batch) -> None:
        with self.precision.autocast():
            result = self.task.step(self.model, batch)
        check_result(self.task, result, self.parameters.optimized)


def constant_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group but its learning rate, which the call reads as a tensor."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return whether all elements of some tensors are finite, as a bool tensor of shape ()."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor is not None]
    return torch.stack(finite).all()


def write_if(condition: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Copy a new tensor into an old one if the condition is None or true."""
    old.copy_(new if condition is None else torch.where(condition, new, old))
