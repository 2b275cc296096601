"""CUDA graphs of forward and backward, or of the step with its update.

A graph is launched once; without it, a small model waits for hundreds of launches in each step.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
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
from framework.runtime.batch import is_flat, map_tensors, tensors_of
from framework.runtime.clock import Clock
from framework.runtime.identity import ModelContents, identical
from framework.runtime.precision import Precision
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks
from framework.runtime.torch_internals.pytree import tree_map
from framework.training.parameters import ModelParameters

from .callbacks import GradientCallbacks
from .fused_update import skips_on_device
from .single_call_step import SingleCallStep

CudaGraph = Literal["auto", "on", "off"]
WARM_UP_PASSES = 3  # eager passes before a capture, which create handles, caches and the scale
TIMED_STEPS = 8  # steps that `auto` times, eager and replayed
MAX_GRAPHS = 2  # for the usual batch, and for the smaller last one of an epoch


class Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes at each replay."""

    graph: Any
    inputs: Batch
    result: Step
    gradients: list[Tensor | None]


def record_graph(run: Callable[[], Step]) -> tuple[Any, Step]:
    """Record a function without computing anything.

    Returns:
        The graph, and the result, whose tensors each replay fills.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph, result


@contextmanager
def side_stream() -> Iterator[None]:
    """Run a block on another stream than the default, as the passes before a capture must."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def form_of(batch: Batch) -> Hashable:
    """Return a value that is equal for batches of one structure, shapes, dtypes and other values.

    A graph has the texts and numbers of a batch as constants.
    """
    if is_flat(batch):
        return tuple([(tensor.shape, tensor.dtype) for tensor in batch])
    form = tree_map(
        lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, batch
    )
    return hash(repr(form))


def synchronized_time() -> float:
    """Return the time at which the device has finished its work."""
    torch.cuda.synchronize()
    return perf_counter()


class Graphed:
    """A function of a batch that is replayed as a CUDA graph.

    There are graphs for at most two forms of a batch (shapes and dtypes); others run eagerly. Only
    operations on the device are replayed, not Python code, such as that of a model that counts its
    calls.

    Args:
        name: the name of the function, for messages.
        run: computes the result of a step for a batch.
        parameters: returns the parameters whose gradients it computes.
        mode: off, on, or auto to time some steps of both kinds and choose the faster.
        model: the model whose tensors it reads; None if these never move.

    Attributes:
        refused: the function runs eagerly from now on, since it cannot be captured or the graph is
            not faster.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Batch], Step],
        parameters: Callable[[], list[nn.Parameter]],
        mode: CudaGraph,
        model: nn.Module | None = None,
    ):
        self.name = name
        self.run = run
        self.parameters = parameters
        self.contents = None if model is None else ModelContents(model)
        # The tensors and modes that the graphs were captured with:
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
            batch: the argument of the function.
            settings: other values that the function depends on; each needs its own graph.
        """
        if self.refused:
            return self.run(batch)
        if self.times is None:
            return self._replay_or_run(batch, settings)[0]
        began = synchronized_time()
        result, kind = self._replay_or_run(batch, settings)
        self._compare_times(self.times, kind, synchronized_time() - began)
        return result

    def _replay_or_run(self, batch: Batch, settings: Any) -> tuple[Step, str]:
        """Return the result, and the kind of the step.

        "eager" and "replayed" steps are typical of their times; "warm-up", "captured" and "refused"
        ones are not.
        """
        if self.captured and self._is_outdated():
            self.captured.clear()
            self.seen.clear()
        trained = tuple(parameter.requires_grad for parameter in self.parameters())
        form = (form_of(batch), trained, settings)
        self.seen[form] += 1
        if form in self.captured:
            return self._replay(form, batch), "replayed"
        eager_passes = WARM_UP_PASSES
        if self.times is not None:
            eager_passes += TIMED_STEPS
        if self.seen[form] <= eager_passes or len(self.captured) == MAX_GRAPHS:
            with side_stream():
                result = self.run(batch)
            return result, "eager" if self.seen[form] > WARM_UP_PASSES else "warm-up"
        if not self._capture(form, batch):
            return self.run(batch), "refused"
        return self._replay(form, batch), "captured"

    def _replay(self, form: Any, batch: Batch) -> Step:
        captured = self.captured[form]
        tensors = zip(tensors_of(captured.inputs), tensors_of(batch), strict=True)
        for static, tensor in tensors:
            static.copy_(tensor)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        # Copies, since the next replay writes to the same tensors.
        loss, outputs, targets, values = captured.result.detach()
        copies = {name: value.clone() for name, value in values.items()}
        return Step(loss.clone(), tree_map(copied_tensors, outputs), targets.clone(), copies)

    def _is_outdated(self) -> bool:
        """Return whether a tensor was replaced or moved, or a mode changed, since the capture."""
        if not identical(self.parameters(), self.captured_for):
            return True
        if self.contents is None:
            return False
        if self.contents.changed() or self.contents.modes() != self.modes:
            return True
        return self.contents.addresses() != self.addresses

    def _capture(self, form: Any, batch: Batch) -> bool:
        """Record the graph for a form of batches.

        Returns:
            False, after a warning, if an operation cannot be captured.
        """
        inputs = map_tensors(Tensor.clone, batch)
        try:
            graph, result = record_graph(lambda: self.run(inputs))
        except RuntimeError as error:
            trace = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in trace if frame.filename != __file__]
            cause = str(error)
            if frames:
                cause = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
            warnings.warn(
                f"cuda_graph: {self.name} cannot be captured, so it runs eagerly ({cause})",
                stacklevel=2,
            )
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
        self.captured[form] = Captured(graph, inputs, result, gradients)
        return True

    def _compare_times(self, times: dict[str, list[float]], kind: str, seconds: float) -> None:
        """Add the time of a step; with enough of them, print them and choose the faster kind."""
        times.setdefault(kind, []).append(seconds)
        if self.refused or len(times["replayed"]) < TIMED_STEPS:
            return
        eager = median(times["eager"]) * 1e3
        replayed = median(times["replayed"]) * 1e3
        self.refused = replayed >= eager
        self.times = None
        chosen = "eager" if self.refused else "as a graph"
        compared = f"{replayed:.3g} ms as a graph, {eager:.3g} ms eager"
        print_note(f"cuda_graph=auto: {self.name} takes {compared}: {chosen} from now on")
        if self.refused:
            self.captured.clear()


class GraphedStep:
    """Forward and backward as a CUDA graph, with the update if possible.

    Both this class and `eager` are a `StepImplementation` (see `training/step.py`).

    Args:
        eager: the eager step, which the graphs record, and which runs steps of several batches.
        parameters: those whose gradients are computed.
        mode: on or auto.
        model: the model that the eager step calls.
        single_call: the step with its update, for steps of one batch; None if batches may have to
            be split.
        clock: for the profiler.
    """

    def __init__(
        self,
        eager: Callable[..., tuple[Step, bool]],
        parameters: ModelParameters,
        mode: CudaGraph,
        model: nn.Module,
        single_call: "GraphedSingleCall | None",
        clock: Clock,
    ):
        self.eager = eager
        self.single_call = single_call
        self.clock = clock
        self.gradients = Graphed(
            name="forward and backward",
            run=lambda batch: eager(batch, None)[0],
            parameters=lambda: parameters.optimized,
            mode=mode,
            model=model,
        )

    def __call__(
        self,
        batch: Batch,
        share: float | Tensor | None,
        phase: Phase | None = None,
    ) -> tuple[Step, bool]:
        """Replay the step with its update, or forward and backward; eager for several batches."""
        if share is not None:
            return self.eager(batch, share, phase)
        if self.single_call is not None and self.single_call.is_ready():
            with self.clock.detail("forward, backward and update"):
                return self.single_call(batch)
        return self.gradients(batch), False


class GraphedSingleCall(SingleCallStep):
    """Forward, backward, recordable callbacks and update as one CUDA graph.

    The graph reads the learning rates from tensors. The optimizer must be a fused one of torch or a
    `PureOptimizer`: others may count their steps in Python.

    Args:
        eager: the eager step, which the graph records.
        optimizer: updates the parameters.
        precision: with the scaler of fp16.
        mode: on or auto.
        model: the model that the eager step calls.
        callbacks: those that listen to `gradients`.
        call_recordable: calls the recordable ones of them, with the loss of the step.
    """

    rate_dtype = torch.float32  # fused kernels read this dtype

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
        self.eager = eager
        self.precision = precision
        self.call_recordable = call_recordable
        self.graphed = Graphed("the whole step", self._step, lambda: self.trainable, mode, model)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.keeps_state_on_device = fused or isinstance(optimizer, PureOptimizer)

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        """Replay the step with the present learning rates and settings of the optimizer."""
        self.set_learning_rates()
        settings = []
        for group in self.optimizer.param_groups:
            settings += [(k, v) for k, v in group.items() if k not in ("params", "lr")]
        return self.graphed(batch, settings=repr(settings)), True

    def gradients_needed(self) -> bool:
        """Return whether a callback that cannot be recorded needs the gradients of this step."""
        if self.callbacks.all_recorded():
            return False
        scaled = self.precision.scaler is not None
        if not scaled and not skips_on_device(self.optimizer):
            return True  # they must see a gradient that is not finite before the update
        return self.callbacks.need_gradients(except_recorded=True)

    def is_supported(self) -> bool:
        """Return whether the optimizer keeps its state on the device and has no hooks."""
        if not self.keeps_state_on_device or self.graphed.refused:
            return False
        return not has_step_hooks(self.optimizer)

    def prepare_state(self) -> bool:
        """Drop the graphs of an earlier state; return whether the state is complete."""
        self.graphed.captured.clear()  # they write to the memory of that state
        states = [self.optimizer.state.get(p) for p in self.trainable]
        for parameter, state in zip(self.trainable, states, strict=True):
            for value in (state or {}).values():
                if not isinstance(value, Tensor) or value.device != parameter.device:
                    return False
        stateless = all(group.get("momentum") == 0 for group in self.optimizer.param_groups)
        return stateless or all(states)

    def _step(self, batch: Batch) -> Step:
        result, _ = self.eager(batch, None)
        self.precision.unscale(self.optimizer)
        self.call_recordable(result.loss.detach())
        with self._learning_rates_on_device():
            self.precision.step(self.optimizer, self.optimizer.step)
        for parameter in self.trainable:
            parameter.grad = None
        return result

    @contextmanager
    def _learning_rates_on_device(self) -> Iterator[None]:
        """Put tensors into the groups as learning rates, and "capturable" during a capture."""
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
