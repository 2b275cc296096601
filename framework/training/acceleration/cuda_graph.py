"""CUDA graphs of forward and backward, or of the whole step: one launch, where a small model waits for hundreds."""

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
from torch.utils._pytree import tree_map

from framework.contracts.loss import copied
from framework.contracts.pure_optimizer import PureOptimizer
from framework.contracts.task import Step
from framework.data.dataset import Batch
from framework.errors.terminal import print_note
from framework.runtime.device import Precision
from framework.runtime.identity import ModelContents, identical

from .fused_update import is_hooked, may_leave_out
from .single_call_step import Whole

CudaGraph = Literal["auto", "on", "off"]
WARM_UP = 3  # eager passes of a form, after which lazily made things (handles, caches, the scaler's scale) are there
TRIED = 8  # steps that `auto` times each way
MOST = 2  # forms: the usual batch, and the last of an epoch


class Captured(NamedTuple):
    """A graph, and the memory that it reads and writes each time."""

    graph: Any
    inputs: Batch
    made: Step
    gradients: list[Tensor | None]


def record(run: Callable[[], Step]) -> tuple[Any, Step]:
    """Return the graph of what is run, and the tensors that it fills. Nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = run()
    return graph, made


@contextmanager
def aside() -> Iterator[None]:
    """Run on another stream than the default one, as what is captured later must have been."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def now() -> float:
    """Return the time when the device has done all that it was told."""
    torch.cuda.synchronize()
    return perf_counter()


class Graphed:
    """Replays what is done with a batch, for batches of the same form; does it for others, and where it must.

    It is captured with what Python did in it then: a model that counts its calls, say, must not be captured.

    Attributes:
        refused: it is not captured, or no more: an operation does not allow it, or it is no quicker (mode auto).
    """

    def __init__(
        self,
        what: str,
        run: Callable[[Batch], Step],
        parameters: Callable[[], list[nn.Parameter]],
        mode: CudaGraph,
        model: nn.Module | None = None,
    ):
        """Prepare to capture.

        Args:
            what: its name in messages.
            run: what is done with a batch.
            parameters: returns those whose gradients it fills.
            mode: on, auto or off.
            model: the model whose tensors it reads; None where these never move.
        """
        self.what, self.run, self.parameters = what, run, parameters
        self.contents = None if model is None else ModelContents(model)
        # What the captured graphs were made from:
        self.captured_for: list[nn.Parameter] = []
        self.read_from: list[int] = []  # addresses
        self.modes: tuple[bool, ...] = ()
        self.seen: Counter[Any] = Counter()
        self.captured: dict[Any, Captured] = {}
        self.refused = mode == "off"
        self.times: dict[str, list[float]] | None = {"eager": [], "replayed": []} if mode == "auto" else None

    def __call__(self, batch: Batch, beside: Any = None) -> Step:
        """Do it; `beside` is whatever else what is done depends on."""
        if self.refused:
            return self.run(batch)
        if self.times is None:
            return self._either(batch, beside)[0]
        began = now()
        made, manner = self._either(batch, beside)
        self._choose(manner, now() - began)
        return made

    def _either(self, batch: Batch, beside: Any) -> tuple[Step, str]:
        """Return what was made, and how: eager, replayed, or another way that says nothing of its speed."""
        if self.captured and self._moved():
            self.captured.clear()
            self.seen.clear()
        frozen = tuple(parameter.requires_grad for parameter in self.parameters())
        form = (tuple((tensor.shape, tensor.dtype) for tensor in batch), frozen, beside)
        self.seen[form] += 1
        known = form in self.captured
        first = WARM_UP + (0 if self.times is None else TRIED)
        if not known and (self.seen[form] <= first or len(self.captured) == MOST):
            with aside():
                return self.run(batch), "eager" if self.seen[form] > WARM_UP else "warm-up"
        if not known and not self._capture(form, batch):
            return self.run(batch), "refused"
        captured = self.captured[form]
        for static, tensor in zip(captured.inputs, batch, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        loss, outputs, targets, values = captured.made.detach()
        copies = {name: value.clone() for name, value in values.items()}
        outputs = tree_map(copied, outputs)
        copy = Step(loss.clone(), outputs, targets.clone(), copies)
        return copy, "replayed" if known else "captured"

    def _moved(self) -> bool:
        """Whether a tensor was replaced or moved, or a mode has changed, since the capture."""
        if not identical(self.parameters(), self.captured_for):
            return True
        if self.contents is None:
            return False
        if self.contents.changed() or self.contents.modes() != self.modes:
            return True
        return self.contents.addresses() != self.read_from

    def _capture(self, form: Any, batch: Batch) -> bool:
        """Record it. Returns False, and says why, when an operation does not allow it."""
        inputs = tuple(tensor.clone() for tensor in batch)
        try:
            graph, made = record(lambda: self.run(inputs))
        except RuntimeError as error:
            lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
            where = f"{lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else str(error)
            warnings.warn(f"cuda_graph: {self.what} cannot be captured, so it runs eagerly ({where})", stacklevel=2)
            self.refused = True
            for parameter in self.parameters():
                parameter.grad = None
            return False
        self.captured_for = list(self.parameters())
        if self.contents is not None:
            self.contents.remember()
            self.read_from = self.contents.addresses()
            self.modes = self.contents.modes()
        self.captured[form] = Captured(graph, inputs, made, [parameter.grad for parameter in self.parameters()])
        return True

    def _choose(self, manner: str, seconds: float) -> None:
        """Take in how long a step took; once there are enough of each manner, say which one it will be."""
        assert self.times is not None
        self.times.setdefault(manner, []).append(seconds)
        if self.refused or len(self.times["replayed"]) < TRIED:
            return
        eager, replayed = (median(self.times[name]) * 1e3 for name in ("eager", "replayed"))
        self.refused, self.times = replayed >= eager, None
        chosen = "eager" if self.refused else "as a graph"
        times = f"{replayed:.3g} ms as a graph, {eager:.3g} ms eager"
        print_note(f"cuda_graph=auto: {self.what} takes {times}: {chosen} from now on")
        if self.refused:
            self.captured.clear()


class GraphedStep(Whole):
    """The whole step, just as the trainer does it, as one graph; learning rates are tensors in it.

    Callbacks whose `on_gradients` is `recordable` are part of it. A step that another one must see is none, and nor is
    any for an optimizer that may count its steps in Python: it has to be a fused one of torch, or a `PureOptimizer`.
    """

    rate_type = torch.float32  # which fused kernels read

    def __init__(
        self,
        run: Callable[[Batch], Step],
        optimizer: Optimizer,
        precision: Precision,
        mode: CudaGraph,
        model: nn.Module,
    ):
        super().__init__(optimizer)
        self.run, self.precision = run, precision
        self.graphed = Graphed("the whole step", self._step, lambda: self.trained, mode, model)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.possible = fused or isinstance(optimizer, PureOptimizer)

    def wanted(self) -> bool:
        others = [each for each in self.listening if not each.recordable]
        guarded = self.precision.scaler is not None or may_leave_out(self.optimizer)  # by the device itself
        return any(not guarded or each.needs_gradients(self.trainer) for each in others)

    def able(self) -> bool:
        return self.possible and not self.graphed.refused and not is_hooked(self.optimizer)

    def begun(self) -> bool:
        self.graphed.captured.clear()  # they write to the memory of another state
        stateless = all(group.get("momentum") == 0 for group in self.optimizer.param_groups)
        states = [self.optimizer.state.get(p) for p in self.trained]
        tensors = [(p, t) for p, s in zip(self.trained, states, strict=True) if s for t in s.values()]
        there = all(isinstance(t, Tensor) and t.device == p.device for p, t in tensors)
        return there and (stateless or all(states))

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        self.set_rates()
        numbers = [(k, v) for g in self.optimizer.param_groups for k, v in g.items() if k not in ("params", "lr")]
        return self.graphed(batch, repr(numbers)), True

    def _step(self, batch: Batch) -> Step:
        made = self.run(batch)
        self.trainer.loss = made.loss.detach()
        self.precision.unscale(self.optimizer)
        for each in self.listening:
            if each.recordable:
                each.on_gradients(self.trainer)
        with self._rates_on_device():
            self.precision.step(self.optimizer, self.optimizer.step)
        for parameter in self.trained:
            parameter.grad = None
        return made

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Let the update read its learning rates from tensors, and know that it may be captured."""
        groups = self.optimizer.param_groups
        capturing = self.precision.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        before = [{k: value for k, value in group.items() if k in ("lr", "capturable")} for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update({"lr": rate} | ({"capturable": True} if capturing and "capturable" in group else {}))
        try:
            yield
        finally:
            for group, kept in zip(groups, before, strict=True):
                group.update(kept)
