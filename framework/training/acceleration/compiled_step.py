"""torch's compiler: for the model, for forward and backward, or for a whole step with its update."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.pure_optimizer import PureUpdate, State, pure_updates, tensors_of
from framework.contracts.task import Step, Task
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.runtime.clock import Clock
from framework.runtime.device import Precision
from framework.runtime.torch_internals.compiler import CompilationError, CompiledFunction

from .fused_update import has_hooks
from .single_call_step import Whole

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
                cause = f"it does not work from a folder with a space in its name ({torch.__path__[0]})"
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
        warnings.warn(f"compile={self.what}: compiled {self.times} times ({why}){last}", stacklevel=2)


class CompiledStep(Whole):
    """Forward, backward and the optimizer's update as one compiled function.

    Where callbacks listen, an update that is not finite is left out, and the gradients are kept for them.
    """

    def __init__(self, model: nn.Module, task: Task, optimizer: Optimizer, precision: Precision, clock: Clock):
        super().__init__(optimizer)
        self.model, self.task, self.precision = model, task, precision
        self.update: PureUpdate | None = None if precision.scaler is not None else pure_updates.find(optimizer)
        self.compiled = Compiled(self._step, "step", clock)
        self.states: list[State] = []

    @property
    def guarded(self) -> bool:
        return bool(self.listening)

    def able(self) -> bool:
        waits = self.guarded and self.precision.device.type != "cpu"  # each step would wait for the device
        if self.update is None or waits or has_hooks(self.optimizer):
            return False
        return pure_updates.find(self.optimizer) is self.update  # its settings may have changed

    def begun(self) -> bool:
        groups, state = self.optimizer.param_groups, self.optimizer.state
        self.states = [tensors_of(state.get(p)) for p in self.trained]
        return all(state.get(p) for p in self.trained) or all(map(self._stateless, groups))

    def _stateless(self, group: dict[str, Any]) -> bool:
        """Whether the update keeps nothing (SGD without momentum)."""
        assert self.update is not None
        number = torch.zeros(1)
        try:
            return not self.update(number, number, {}, group)[1]
        except KeyError:
            return False

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        self.set_rates()
        made, gradients, finite = self.compiled(batch, self.rates, settings)
        updated = not self.guarded or bool(finite)
        if not updated:
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                parameter.grad = gradient
        return made, updated

    def _step(self, batch: Batch, rates: list[Tensor], settings: list[dict[str, Any]]) -> Any:
        assert self.update is not None
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        gradients = torch.autograd.grad(made.loss, self.trained, allow_unused=True)
        finite = all_finite([made.loss, *gradients]) if self.guarded else None
        with torch.no_grad():
            for p, g, state, number in zip(self.trained, gradients, self.states, self.groups, strict=True):
                if g is not None:
                    p_new, state_new = self.update(p, g, state, {**settings[number], "lr": rates[number]})
                    put(p, p_new, finite)
                    for name, tensor in state_new.items():
                        put(state[name], tensor, finite)
        return made.detach(), gradients if self.guarded else (), finite


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None])
    return finite.all()


def put(old: Tensor, new: Tensor, wanted: Tensor | None) -> None:
    old.copy_(new if wanted is None else torch.where(wanted, new, old))
