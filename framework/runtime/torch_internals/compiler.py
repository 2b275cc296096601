"""Functions that torch compiles independently of each other."""

import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from time import perf_counter
from types import FunctionType
from typing import Any

import torch


class CompiledFunction:
    """A function compiled by torch for fixed shapes, independently of all other functions.

    torch counts compilations by code object, and stops at a limit. Each `CompiledFunction` has a
    separate code object, so that the fifth fit in a process can still compile, and functions of the
    user are not affected.

    Args:
        function: the function to compile.
        traces_backward: whether it calls `torch.autograd.grad`. Gain: forward and backward pass are
            one graph. Before torch 2.11 the backward pass is a separate graph.
        backend: the backend of torch.compile.

    Attributes:
        compile_seconds: duration of the last call if it compiled anything, else 0. It is always 0
            in a release of torch that does not count compilations.
        graph_break: why torch split the function in the last call, with Python code between the
            compiled parts; None if it did not.
        limit: number of compilations after which torch runs further shapes eagerly.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        traces_backward: bool = False,
        backend: str = "inductor",
    ):
        import torch._dynamo  # takes a second, so only runs that compile import it

        self.config: Any = torch._dynamo.config
        self.failure = getattr(torch._dynamo.exc, "TorchDynamoException", ())
        counters = getattr(torch._dynamo.utils, "counters", defaultdict(Counter))
        self.frames = counters["frames"]
        self.graph_breaks: dict[str, int] = counters["graph_break"]  # by reason
        self.limit: int = getattr(self.config, "recompile_limit", 8)
        self.compile_seconds = 0.0
        self.graph_break: str | None = None
        self.settings: dict[str, bool] = {}  # of torch's compiler, during a call
        can_trace_backward = hasattr(self.config, "trace_autograd_ops")
        if traces_backward and can_trace_backward:
            self.settings["trace_autograd_ops"] = True
        # Without that setting torch always splits at `autograd.grad`: a break says nothing new.
        self.reports_breaks = can_trace_backward or not traces_backward
        if getattr(self.config, "use_recursive_dict_tags_for_guards", False):
            # Otherwise torch 2.10 does not notice that `requires_grad` of a parameter has changed,
            # and an unfrozen parameter is not trained.
            self.settings["skip_tensor_guards_with_matching_dict_tags"] = False
        arguments: dict[str, Any] = {"dynamic": False, "backend": backend}
        if backend == "inductor":
            arguments["options"] = {
                "fallback_random": True,  # the same random numbers as without the compiler
                "cpp_wrapper": not torch.cuda.is_available(),  # saves a fifth for a small model
            }
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            arguments["isolate_recompiles"] = True  # count parts after a graph break separately
        self.code_owner = with_own_code(function)
        self.compiled = torch.compile(self.code_owner, **arguments)
        self.earlier_reasons = len(self._reasons())

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the compiled function.

        Raises:
            CompilationError: torch cannot compile the function.
        """
        frames_before = self.frames["total"]
        breaks_before = dict(self.graph_breaks)
        start = perf_counter()
        try:
            if self.reports_breaks:
                result = self._call_with_settings(inputs, named)
            else:
                result = self._call_without_warnings(inputs, named)
        except self.failure as error:
            raise CompilationError(str(error).strip().splitlines()[0]) from error
        has_compiled = self.frames["total"] != frames_before
        self.compile_seconds = perf_counter() - start if has_compiled else 0.0
        self.graph_break = self._new_break(breaks_before) if has_compiled else None
        return result

    def _call_with_settings(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call the compiled function with the settings of the compiler.

        `config.patch` does the same in twice the time, a hundredth of a small model's step.
        """
        before = {name: getattr(self.config, name) for name in self.settings}
        for name, value in self.settings.items():
            setattr(self.config, name, value)
        try:
            return self.compiled(*inputs, **named)
        finally:
            for name, value in before.items():
                setattr(self.config, name, value)

    def _call_without_warnings(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call it without a warning of torch 2.10, which reads `grad` of tensors at the break."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            return self._call_with_settings(inputs, named)

    def _new_break(self, before: dict[str, int]) -> str | None:
        """Return the reason of the first graph break since the given counts."""
        if not self.reports_breaks:
            return None
        for reason, count in self.graph_breaks.items():
            if count > before.get(reason, 0):
                return reason
        return None

    def reason(self) -> str | None:
        """Return the reason of the last recompilation, or None if it is not known."""
        reasons = self._reasons()
        return reasons[-1] if len(reasons) > self.earlier_reasons else None

    def _reasons(self) -> list[str]:
        """Return the reason of each recompilation of this code, or of equal code."""
        failures: dict[Any, list[str]] = getattr(torch._dynamo.utils, "guard_failures", {})
        return failures.get(self.code_owner.__code__, [])


class CompilationError(Exception):
    """torch cannot compile a function."""


def with_own_code(function: Callable[..., Any]) -> FunctionType:
    """Return a function that calls another one, with a code object that is not shared."""

    def call(*inputs: Any, **named: Any) -> Any:
        return function(*inputs, **named)

    code = call.__code__.replace()
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
