"""Compiled functions count their compilations separately."""

import warnings

import pytest
import torch
from torch import nn

from compiler import needs_compiler
from framework.runtime.clock import Clock
from framework.runtime.torch_internals.compiler import CompilationError, CompiledFunction
from framework.training.acceleration.compiled_step import Compiled

pytestmark = needs_compiler


class Step:
    def __init__(self):
        self.model = nn.Linear(3, 1)

    def gradients(self, batch):
        return torch.autograd.grad(self.model(batch).sum(), list(self.model.parameters()))

    def breaks(self, batch):
        torch._dynamo.graph_break()
        return self.part(batch)

    def part(self, batch):
        return self.model(batch) + 1


def times_compiled(function, sizes):
    times = 0
    for size in sizes:
        function(torch.ones(size, 3))
        times += function.compile_seconds > 0
    return times


@pytest.mark.parametrize("name", ["gradients", "model"])
def test_each_object_can_compile_up_to_the_limit_of_torch(name):
    import torch._dynamo

    kept = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            step = Step()
            function = CompiledFunction(
                getattr(step, name), traces_backward=name == "gradients", backend="eager"
            )
            kept += [step, function]
            assert times_compiled(function, [4, 5, 4, 5]) == 2
            assert "size mismatch" in function.reason()


def test_two_objects_of_the_same_function_compile_separately():
    step = Step()
    one = CompiledFunction(step.gradients, traces_backward=True, backend="eager")
    other = CompiledFunction(step.gradients, traces_backward=True, backend="eager")
    assert times_compiled(one, [4, 4]) == times_compiled(other, [4, 4]) == 1
    assert one.reason() is other.reason() is None
    for ours, theirs in zip(one(torch.ones(4, 3)), step.gradients(torch.ones(4, 3)), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_after_a_graph_break_count_for_their_object():
    import torch._dynamo

    if "isolate_recompiles" not in torch.compile.__kwdefaults__:
        pytest.skip("this release of torch counts them by code object")
    kept = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            step = Step()
            function = CompiledFunction(step.breaks, backend="eager")
            kept += [step, function]
            assert times_compiled(function, [4, 5]) == 2


def test_settings_of_the_compiler_are_as_before_the_call():
    import torch._dynamo

    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this release of torch traces no backward pass")
    seen = []

    def look(batch):
        seen.append(config.trace_autograd_ops)
        return batch

    traced = CompiledFunction(look, traces_backward=True, backend="eager")
    traced.compiled = look
    traced(torch.ones(2))
    assert seen == [True]
    assert not config.trace_autograd_ops

    def fails(batch):
        raise ValueError("uncompilable")

    traced.compiled = fails
    with pytest.raises(ValueError, match="uncompilable"):
        traced(torch.ones(2))
    assert not config.trace_autograd_ops


def test_a_function_that_cannot_be_compiled_raises_a_compilation_error():
    import torch._dynamo

    def fails(*inputs):
        raise torch._dynamo.exc.TorchDynamoException("first line\nsecond line")

    function = CompiledFunction(fails, backend="eager")
    function.compiled = fails
    with pytest.raises(CompilationError, match=r"^first line$"):
        function(torch.ones(2))


def test_without_the_counters_of_torch_a_function_is_still_compiled(monkeypatch):
    import torch._dynamo

    for owner, name in (
        (torch._dynamo.utils, "counters"),
        (torch._dynamo.utils, "guard_failures"),
        (torch._dynamo.exc, "TorchDynamoException"),
    ):
        monkeypatch.delattr(owner, name)
    step = Step()
    function = CompiledFunction(step.model, backend="eager")
    assert torch.equal(function(torch.ones(2, 3)), step.model(torch.ones(2, 3)))
    assert function.compile_seconds == 0
    assert function.reason() is None


@pytest.mark.parametrize("name", ["part", "breaks"])
def test_a_graph_break_is_reported_once(name):
    step = Step()
    compiled = Compiled(getattr(step, name), "model", Clock())
    compiled.function = CompiledFunction(getattr(step, name), backend="eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for size in (2, 3, 2):
            compiled(torch.ones(size, 3))
    texts = [str(warning.message) for warning in seen]
    if name == "part":
        assert texts == []
    else:
        (text,) = texts
        assert text.startswith("compile=model: torch cannot compile a part of the model")
        assert "User-inserted graph break" in text
