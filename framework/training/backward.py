"""Forward and backward: the gradients of one optimizer step, from one or more micro-batches, eager or compiled."""

from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.loss import portion, share_of
from framework.contracts.metric import Measures
from framework.contracts.task import Phase, Step, Task
from framework.data.dataset import Batch
from framework.errors import FrameworkError
from framework.runtime import seeds
from framework.runtime.clock import Clock
from framework.runtime.device import Precision
from framework.runtime.identity import identical
from framework.runtime.memory import MicroBatches, is_full, versions

from .acceleration.compiled_step import Compile, Compiled, CompiledStep
from .acceleration.cuda_graph import CudaGraph, Graphed, GraphedStep
from .acceleration.single_call_step import Whole
from .validation import check_input_dtype, check_made, check_parameters_reached, count_of

ENGINE = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


class Backward:
    """Adds the gradients of batches to the parameters, and what the task made of them to the measures."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        measures: Measures,
        clock: Clock,
        precision: Precision,
        micro_batches: MicroBatches,
        compile: Compile,
        cuda_graph: CudaGraph,
    ):
        self.model, self.task, self.optimizer, self.measures = model, task, optimizer, measures
        self.clock, self.precision, self.micro_batches = clock, precision, micro_batches
        self.parameters: list[nn.Parameter] = []
        self.others: list[nn.Parameter] = []  # of the model, which the optimizer does not hold
        self.forward: nn.Module | Callable = Compiled(model, compile, clock) if compile == "model" else model
        self.gradients = Compiled(self._gradients, compile, clock) if compile == "step" else self._gradients
        self.compiled = compile != "off"
        self.whole: Whole | None = None
        self.updated = False  # whether the update was part of it
        self.checked: set[str | None] = set()  # phases whose first step of more than one sample was checked
        self.followed: set[str | None] = set()  # phases of whose first step the gradients were followed
        self.phase: Phase | None = None
        self.pass_through: Callable[..., Step] = self._eager
        if compile == "step":
            self.whole, self.pass_through = CompiledStep(model, task, optimizer, precision, clock), self._compiled
        elif cuda_graph != "off":
            alone = partial(self._eager, share=None)
            self.whole = GraphedStep(alone, optimizer, precision, cuda_graph, model)
            what = "forward and backward"
            self.graphed = Graphed(what, alone, lambda: self.parameters, cuda_graph, model)
            self.pass_through = self._graphed

    def in_phase(self, phase: Phase, batches: list[Batch]) -> Tensor:
        """Do what a call does, in a phase of the step: of its own loss, with gradients for its own parameters."""
        named = dict(self.model.named_parameters())
        still = [p for n, p in named.items() if p.requires_grad and not any(fnmatch(n, each) for each in phase.moves)]
        self.phase = phase
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            return self(batches)
        finally:
            self.phase = None
            for parameter in still:
                parameter.requires_grad_(True)

    def __call__(self, batches: list[Batch]) -> Tensor:
        """Return the mean loss over all items of the batches, whose gradients are then in the parameters.

        When memory is full and the micro-batches may become smaller, it is done again from where it began.
        """
        parameters: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            parameters += group["params"]
        if not identical(parameters, self.parameters):  # a callback may add or replace some
            self.parameters = parameters
            held = set(parameters)
            self.others = [parameter for parameter in self.model.parameters() if parameter not in held]
        self.updated = False
        mark = self._mark() if self.micro_batches.auto else None
        before = versions(batches) if self.micro_batches.auto else []
        while True:
            parts = [part for batch in batches for part in self.micro_batches.split(batch)]
            try:
                return self._all(parts)
            except (MemoryError, RuntimeError) as error:
                if mark is None or not self.micro_batches.halve(error, versions(batches) == before):
                    check_input_dtype(error, self.model, batches[0])
                    raise
            self._undo(mark)  # out of `except`, whose traceback keeps the tensors that filled the memory

    def _all(self, parts: list[Batch]) -> Tensor:
        counts = [count_of(self.task, part) for part in parts]
        total = sum(counts) if len(parts) > 1 else counts[0]
        mean: Tensor | None = None
        for part, count in zip(parts, counts, strict=True):
            share = None if len(parts) == 1 else share_of(count, total)  # so that the sum is the mean of the whole
            try:
                made = self._one(part, share)
            except (FrameworkError, AttributeError, TypeError, RuntimeError) as error:
                if self.compiled and not is_full(error):
                    self._step_eagerly(part)
                raise
            self._check_first(made, len(part[0]))
            outputs, targets = (made.outputs, made.targets) if self.phase is None else (None, None)
            self.measures.add(made.loss, outputs, targets, count, made.values)
            loss = made.loss.detach() if share is None else portion(made.loss.detach(), share)
            mean = loss if mean is None else mean + loss
        assert mean is not None
        return mean

    def _check_first(self, made: Step, samples: int) -> None:
        """Check the first step, and the first of more than one sample, before the parameters change."""
        phase = None if self.phase is None else self.phase.name
        if phase in self.checked:
            return
        if phase not in self.followed:
            self.followed.add(phase)
            check_parameters_reached(self.task, made.loss, self.model)
        if samples > 1:
            self.checked.add(phase)
            self.task.check_first(made)

    def _one(self, part: Batch, share: float | Tensor | None) -> Step:
        """Do the forward and the backward pass of one micro-batch, with the update where that is one call."""
        alone = share is None and not self.micro_batches.auto
        if alone and self.whole is not None and self.whole.ready():
            with self.clock.detail("forward, backward and update"):
                made, self.updated = self.whole(part)
                return made
        return self.pass_through(part, share)

    def _eager(self, batch: Batch, share: float | Tensor | None) -> Step:
        with self.clock.detail("forward"), self.precision.autocast():
            step = self.task.step if self.phase is None else partial(self.task.phase, self.phase.name)
            made = step(self.forward, batch)  # type: ignore[arg-type]
        with self.clock.detail("backward"):
            try:
                loss = made.loss if share is None else made.loss * share
                run_backward(self.precision.scaled(loss))
            except (AttributeError, TypeError, RuntimeError):
                check_made(self.task, made, self.parameters)
                raise
        return made

    def _graphed(self, batch: Batch, share: float | Tensor | None) -> Step:
        return self.graphed(batch) if share is None else self._eager(batch, share)

    def _compiled(self, batch: Batch, share: float | Tensor | None) -> Step:
        factor = None if share is None else torch.as_tensor(share, device=self.precision.device)
        if self.precision.scaler is not None:
            factor = self.precision.scaled(torch.ones((), device=self.precision.device) if factor is None else factor)
        with self.clock.detail("forward and backward"):
            made, gradients = self.gradients(batch, factor)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return made

    def _step_eagerly(self, batch: Batch) -> None:
        """Raise the error of a step that failed compiled, if it fails eagerly too: its message says more."""
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        check_made(self.task, made, self.parameters)

    def _gradients(self, batch: Batch, factor: Tensor | None) -> tuple[Step, list[Tensor | None]]:
        """What is compiled as a whole: from a batch to the gradients, times a factor."""
        with self.precision.autocast():
            made = self.task.step(self.model, batch)
        whole = made.loss if factor is None else made.loss * factor
        wanted = [parameter for parameter in self.parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(whole, wanted, allow_unused=True))
        gradients = [next(found) if parameter.requires_grad else None for parameter in self.parameters]
        return made.detach(), gradients

    def _mark(self) -> Any:
        return self.measures.mark(), [buffer.clone() for buffer in self.model.buffers()], seeds.capture()

    def _undo(self, mark: Any) -> None:
        sums, buffers, random = mark
        self.measures.undo(sums)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)  # running statistics have seen some of the batch
        seeds.restore(random)
        for parameter in (*self.parameters, *self.others):
            parameter.grad = None


@cache
def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def run_backward(loss: Tensor) -> None:
    """Do what `loss.backward()` does, without its checks, which cost a small model a tenth of its step."""
    if ENGINE is None or type(loss) is not Tensor or loss.ndim or not loss.requires_grad:
        loss.backward()
    else:
        gradient = one(loss.dtype, loss.device)
        if gradient._version:  # a hook or an autograd.Function has changed it in place
            one.cache_clear()
            gradient = one(loss.dtype, loss.device)
        ENGINE((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
