"""CUDA graphs of forward and backward, or of the whole step.

A graph is one launch, where a small model waits for hundreds.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.loss_trials import copied_tensors
from framework.contracts.pure_optimizer import PureOptimizer
from framework.contracts.task import Phase, Step
from framework.data.dataset import Batch
from framework.errors.terminal import print_note
from framework.runtime.clock import Clock
from framework.runtime.device import Precision
from framework.runtime.identity import ModelContents, identical
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks
from framework.runtime.torch_internals.pytree import tree_map
from framework.training.parameters import Parameters

from .callbacks import GradientCallbacks
from .fused_update import skips_on_device
from .single_call_step import SingleCallStep

CudaGraph = Literal["auto", "on", "off"]
WARM_UP_PASSES = 3  # eager passes before a capture: they create handles, caches, the scaler's scale
TIMED_STEPS = 8  # steps that `auto` times each way
MAX_GRAPHS = 2  # for the usual batch, and for the last one of an epoch


class Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes at each replay."""

    graph: Any
    inputs: Batch
    made: Step
    gradients: list[Tensor | None]


def record(run: Callable[[], Step]) -> tuple[Any, Step]:
    """Return the graph of a function, and the tensors that it fills. Nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = run()
    return graph, made


@contextmanager
def side_stream() -> Iterator[None]:
    """Run on another stream than the default one, which a capture requires of earlier passes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def synchronized_time() -> float:
    """Return the time when the device has finished its work."""
    torch.cuda.synchronize()
    return perf_counter()


class Graphed:
    """A function of a batch that is replayed as a CUDA graph.

    There is a graph for each of two forms of a batch (shapes and dtypes); others run eagerly. What
    Python does in the function is not replayed, as in a model that counts its calls.

    Args:
        name: of the function, for messages.
        run: the function.
        parameters: returns the parameters whose gradients it fills.
        mode: off, on, or auto to time some steps each way and choose the faster.
        model: the model whose tensors it reads; None where these never move.

    Attributes:
        refused: the function runs eagerly from now on: it cannot be captured, or is not faster.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Batch], Step],
        parameters: Callable[[], list[nn.Parameter]],
        mode: CudaGraph,
        model: nn.Module | None = None,
    ):
        self.name, self.run, self.parameters = name, run, parameters
        self.contents = None if model is None else ModelContents(model)
        # What the captured graphs were made from:
        self.captured_for: list[nn.Parameter] = []
        self.addresses: list[int] = []
        self.modes: tuple[bool, ...] = ()
        self.seen: Counter[Any] = Counter()
        self.captured: dict[Any, Captured] = {}
        self.refused = mode == "off"
        self.times: dict[str, list[float]] | None = None  # seconds of steps, while `auto` compares
        if mode == "auto":
            self.times = {"eager": [], "replayed": []}

    def __call__(self, batch: Batch, settings: Any = None) -> Step:
        """Run the function.

        Args:
            batch: the batch.
            settings: what else the function depends on; another value needs another graph.
        """
        if self.refused:
            return self.run(batch)
        if self.times is None:
            return self._replay_or_run(batch, settings)[0]
        began = synchronized_time()
        made, how = self._replay_or_run(batch, settings)
        self._compare_times(self.times, how, synchronized_time() - began)
        return made

    def _replay_or_run(self, batch: Batch, settings: Any) -> tuple[Step, str]:
        """Return the result, and how it came about: "eager", "replayed", or untypical of both."""
        if self.captured and self._is_outdated():
            self.captured.clear()
            self.seen.clear()
        trained = tuple(parameter.requires_grad for parameter in self.parameters())
        form = (tuple((tensor.shape, tensor.dtype) for tensor in batch), trained, settings)
        self.seen[form] += 1
        if form in self.captured:
            return self._replay(form, batch), "replayed"
        eager_passes = WARM_UP_PASSES + (0 if self.times is None else TIMED_STEPS)
        if self.seen[form] <= eager_passes or len(self.captured) == MAX_GRAPHS:
            with side_stream():
                made = self.run(batch)
            return made, "eager" if self.seen[form] > WARM_UP_PASSES else "warm-up"
        if not self._capture(form, batch):
            return self.run(batch), "refused"
        return self._replay(form, batch), "captured"

    def _replay(self, form: Any, batch: Batch) -> Step:
        captured = self.captured[form]
        for static, tensor in zip(captured.inputs, batch, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        loss, outputs, targets, values = captured.made.detach()
        copies = {name: value.clone() for name, value in values.items()}
        return Step(loss.clone(), tree_map(copied_tensors, outputs), targets.clone(), copies)

    def _is_outdated(self) -> bool:
        """Return whether a tensor was replaced or moved, or a mode has changed, since the capture."""
        if not identical(self.parameters(), self.captured_for):
            return True
        if self.contents is None:
            return False
        if self.contents.changed() or self.contents.modes() != self.modes:
            return True
        return self.contents.addresses() != self.addresses

    def _capture(self, form: Any, batch: Batch) -> bool:
        """Record the graph. Returns False, with a warning, if an operation does not allow it."""
        inputs = tuple(tensor.clone() for tensor in batch)
        try:
            graph, made = record(lambda: self.run(inputs))
        except RuntimeError as error:
            trace = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in trace if frame.filename != __file__]
            where = str(error)
            if frames:
                where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
            said = f"{self.name} cannot be captured, so it runs eagerly ({where})"
            warnings.warn(f"cuda_graph: {said}", stacklevel=2)
            self.refused = True
            for parameter in self.parameters():
                parameter.grad = None
            return False
        self.captured_for = list(self.parameters())
        if self.contents is not None:
            self.contents.remember()
            self.addresses = self.contents.addresses()
            self.modes = self.contents.modes()
        gradients = [parameter.grad for parameter in self.captured_for]
        self.captured[form] = Captured(graph, inputs, made, gradients)
        return True

    def _compare_times(self, times: dict[str, list[float]], how: str, seconds: float) -> None:
        """Add the time of a step; with enough of them, choose how to go on, and print it."""
        times.setdefault(how, []).append(seconds)
        if self.refused or len(times["replayed"]) < TIMED_STEPS:
            return
        eager = median(times["eager"]) * 1e3
        replayed = median(times["replayed"]) * 1e3
        self.refused, self.times = replayed >= eager, None
        chosen = "eager" if self.refused else "as a graph"
        compared = f"{replayed:.3g} ms as a graph, {eager:.3g} ms eager"
        print_note(f"cuda_graph=auto: {self.name} takes {compared}: {chosen} from now on")
        if self.refused:
            self.captured.clear()


class GraphedStep:
    """Forward and backward as a CUDA graph, with the update where that is possible.

    It is a `StepImplementation` (see `training/step.py`), as is `eager`, which runs the steps of
    several batches and is what the graphs record.

    Args:
        eager: the eager step.
        parameters: whose gradients it computes.
        mode: on or auto.
        model: the model.
        single_call: the whole step, for steps of one batch; None if batches may have to be split.
        clock: for the profiler.
    """

    def __init__(
        self,
        eager: Callable[..., tuple[Step, bool]],
        parameters: Parameters,
        mode: CudaGraph,
        model: nn.Module,
        single_call: "GraphedSingleCall | None",
        clock: Clock,
    ):
        self.eager, self.single_call, self.clock = eager, single_call, clock
        self.gradients = Graphed(
            "forward and backward",
            lambda batch: eager(batch, None)[0],
            lambda: parameters.optimized,
            mode,
            model,
        )

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        if share is not None:
            return self.eager(batch, share, phase)
        if self.single_call is not None and self.single_call.is_ready():
            with self.clock.detail("forward, backward and update"):
                return self.single_call(batch)
        return self.gradients(batch), False


class GraphedSingleCall(SingleCallStep):
    """Forward, backward, recordable callbacks and update as one CUDA graph.

    The learning rates are tensors in it. The optimizer has to be a fused one of torch or a
    `PureOptimizer`: any other may count its steps in Python.

    Args:
        eager: the eager step, which is what the graph records.
        optimizer: the optimizer.
        precision: with the scaler of fp16.
        mode: on or auto.
        model: the model.
        callbacks: those that listen to `gradients`.
        call_recordable: calls the recordable ones of them; it takes the loss of the step.
    """

    rate_dtype = torch.float32  # which fused kernels read

    def __init__(
        self,
        eager: Callable[..., tuple[Step, bool]],
        optimizer: Optimizer,
        precision: Precision,
        mode: CudaGraph,
        model: nn.Module,
        callbacks: GradientCallbacks,
        call_recordable: Callable[[Tensor], None],
    ):
        super().__init__(optimizer, callbacks)
        self.eager, self.precision, self.call_recordable = eager, precision, call_recordable
        self.graphed = Graphed("the whole step", self._step, lambda: self.trainable, mode, model)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.keeps_state_on_device = fused or isinstance(optimizer, PureOptimizer)

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        self.set_learning_rates()
        settings = []
        for group in self.optimizer.param_groups:
            settings += [(k, v) for k, v in group.items() if k not in ("params", "lr")]
        return self.graphed(batch, settings=repr(settings)), True

    def gradients_needed(self) -> bool:
        if self.callbacks.all_recordable():
            return False
        scaled = self.precision.scaler is not None
        if not scaled and not skips_on_device(self.optimizer):
            return True  # they would see a gradient that is not finite after the update
        return self.callbacks.need_gradients(except_recordable=True)

    def is_supported(self) -> bool:
        if not self.keeps_state_on_device or self.graphed.refused:
            return False
        return not has_step_hooks(self.optimizer)

    def prepare_state(self) -> bool:
        self.graphed.captured.clear()  # the graphs write to the memory of another state
        states = [self.optimizer.state.get(p) for p in self.trainable]
        for parameter, state in zip(self.trainable, states, strict=True):
            for value in (state or {}).values():
                if not isinstance(value, Tensor) or value.device != parameter.device:
                    return False
        stateless = all(group.get("momentum") == 0 for group in self.optimizer.param_groups)
        return stateless or all(states)

    def _step(self, batch: Batch) -> Step:
        made, _ = self.eager(batch, None)
        self.precision.unscale(self.optimizer)
        self.call_recordable(made.loss.detach())
        with self._learning_rates_on_device():
            self.precision.step(self.optimizer, self.optimizer.step)
        for parameter in self.trainable:
            parameter.grad = None
        return made

    @contextmanager
    def _learning_rates_on_device(self) -> Iterator[None]:
        """Let the update read its learning rates from tensors, and know if it is captured."""
        groups = self.optimizer.param_groups
        on_cuda = self.precision.device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        before = []
        for group, rate in zip(groups, self.learning_rates, strict=True):
            before.append({k: v for k, v in group.items() if k in ("lr", "capturable")})
            group["lr"] = rate
            if capturing and "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)
