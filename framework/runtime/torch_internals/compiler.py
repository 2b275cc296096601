"""torch's compiler: functions that are compiled independently of each other."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable
from time import perf_counter
from types import FunctionType
from typing import Any

import torch


class CompiledFunction:
    """A function through torch.compile, for fixed shapes, independent of all other functions.

    torch counts by code object how often a function was compiled, and gives up at its limit. Each
    object has a code object of its own, so that a fifth fit in a process may still compile, and no
    function of the user is affected.

    Args:
        function: what is compiled.
        traces_backward: whether it calls `torch.autograd.grad`. Gain: forward and backward pass are
            one graph. Before torch 2.11 the backward pass is a graph of its own.
        backend: "inductor", or another one of torch's.

    Attributes:
        compile_seconds: how long the last call took if it compiled something, else 0. It stays 0
            where a release of torch does not count compilations.
        limit: after how many compilations torch runs eagerly what does not fit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        traces_backward: bool = False,
        backend: str = "inductor",
    ):
        import torch._dynamo  # takes a second, which only those who compile should pay

        self.config = torch._dynamo.config
        self.failure = getattr(torch._dynamo.exc, "TorchDynamoException", ())
        counters = getattr(torch._dynamo.utils, "counters", defaultdict(Counter))
        self.frames = counters["frames"]
        self.limit: int = getattr(self.config, "recompile_limit", 8)
        self.compile_seconds = 0.0
        self.traces_backward = traces_backward and hasattr(self.config, "trace_autograd_ops")
        arguments: dict[str, Any] = {"dynamic": False, "backend": backend}
        if backend == "inductor":
            arguments["options"] = {
                "fallback_random": True,  # the random numbers of the eager function
                "cpp_wrapper": not torch.cuda.is_available(),  # a fifth less for a small model
            }
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            arguments["isolate_recompiles"] = True  # parts after a graph break count separately too
        self.code_owner = with_own_code(function)
        self.compiled = torch.compile(self.code_owner, **arguments)
        self.earlier_reasons = len(self._reasons())

    def __call__(self, *inputs: Any) -> Any:
        """Raises CompilationError when torch cannot compile the function."""
        frames_before = self.frames["total"]
        start = perf_counter()
        try:
            result = self._call_traced(inputs) if self.traces_backward else self.compiled(*inputs)
        except self.failure as error:
            raise CompilationError(str(error).strip().splitlines()[0]) from error
        has_compiled = self.frames["total"] != frames_before
        self.compile_seconds = perf_counter() - start if has_compiled else 0.0
        return result

    def _call_traced(self, inputs: tuple[Any, ...]) -> Any:
        """Let the compiler trace `torch.autograd.grad` during this call.

        `config.patch` does the same in twice the time, a hundredth of a small model's step.
        """
        config: Any = self.config
        before = config.trace_autograd_ops
        config.trace_autograd_ops = True
        try:
            return self.compiled(*inputs)
        finally:
            config.trace_autograd_ops = before

    def reason(self) -> str | None:
        """Return why it was compiled again last, or None when torch does not say."""
        reasons = self._reasons()
        return reasons[-1] if len(reasons) > self.earlier_reasons else None

    def _reasons(self) -> list[str]:
        """Return why this code, or code equal to it, was compiled again each time."""
        failures: dict[Any, list[str]] = getattr(torch._dynamo.utils, "guard_failures", {})
        return failures.get(self.code_owner.__code__, [])


class CompilationError(Exception):
    """torch cannot compile a function."""


def with_own_code(function: Callable[..., Any]) -> FunctionType:
    """Return a function that calls another one, with a code object that no other function has."""

    def call(*inputs: Any) -> Any:
        return function(*inputs)

    code = call.__code__.replace()
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
