"""Forward and backward as one CUDA graph: a single launch, where a small model waits for hundreds."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Batch
from .task import Step

WARM_UP = 3  # eager passes of a shape, after which lazily made things (handles, caches, the scaler's scale) are there
MOST = 2  # shapes: the usual batch, and the last of an epoch


class Captured(NamedTuple):
    """A graph, and the memory that it reads and writes each time."""

    graph: torch.cuda.CUDAGraph
    inputs: Batch
    made: Step
    gradients: list[Tensor | None]


class GraphedPass:
    """Replays a pass for batches of the same shapes; runs it eagerly for others, and where it cannot be captured.

    A pass is captured with what Python did in it then: a model that counts its calls, say, must not be captured.
    """

    def __init__(self, run: Callable[[Batch, Any], Step], parameters: Callable[[], list[torch.nn.Parameter]]):
        self.run, self.parameters = run, parameters
        self.seen: Counter[Any] = Counter()
        self.captured: dict[Any, Captured] = {}
        self.refused = False

    def __call__(self, batch: Batch, share: Any) -> Step:
        frozen = tuple(parameter.requires_grad for parameter in self.parameters())
        form = (tuple((tensor.shape, tensor.dtype) for tensor in batch), frozen)
        self.seen[form] += 1
        late = form not in self.captured and (self.seen[form] <= WARM_UP or len(self.captured) == MOST)
        if share is not None or self.refused or late:
            return self._beside(batch, share)
        if form not in self.captured and not self._capture(form, batch):
            return self.run(batch, share)
        captured = self.captured[form]
        for static, tensor in zip(captured.inputs, batch, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters(), captured.gradients, strict=True):
            parameter.grad = gradient
        loss, outputs, targets, values = captured.made.detach()
        copies = {name: value.clone() for name, value in values.items()}
        return Step(loss.clone(), outputs.clone(), targets.clone(), copies)

    def _beside(self, batch: Batch, share: Any) -> Step:
        """Run eagerly, on another stream than the default one, as what is captured later must have been."""
        if self.refused or share is not None:
            return self.run(batch, share)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made = self.run(batch, share)
        torch.cuda.current_stream().wait_stream(stream)
        return made

    def _capture(self, form: Any, batch: Batch) -> bool:
        """Record the pass; nothing is computed. Returns False, and says why, when an operation does not allow it."""
        inputs, graph = tuple(tensor.clone() for tensor in batch), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                made = self.run(inputs, None)
        except RuntimeError as error:
            lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
            where = f"{lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else str(error)
            warnings.warn(f"cuda_graph: this step cannot be captured, so it runs eagerly ({where})", stacklevel=2)
            self.refused = True
            for parameter in self.parameters():
                parameter.grad = None
            return False
        self.captured[form] = Captured(graph, inputs, made, [parameter.grad for parameter in self.parameters()])
        return True
