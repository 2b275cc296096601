"""The graph of a model for TensorBoard, recorded in one forward pass."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from framework import model_undisturbed
from framework.contracts.alignment import tensors_in
from framework.contracts.model import GenerativeModel


def trace_graph(model: nn.Module, inputs: Any) -> bytes:
    """Return the graph of a model as a serialized GraphDef.

    One forward pass in eval mode records it and leaves the model unchanged. If it does not use all
    parameters of a model that draws samples, such as a GAN, the graph also shows how it draws one.

    Args:
        model: the model.
        inputs: the only argument of the model, a tuple of its positional arguments, or a dict of
            its keyword arguments.
    """
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    recorder = GraphRecorder(model, inputs)
    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        hooks += recorder.add_hooks(name, module)
    try:
        with model_undisturbed(model), torch.no_grad(), recorder:
            outputs = call(model, inputs)
            recorder.add_results("output", outputs)
            if isinstance(model, GenerativeModel) and not recorder.has_all(model.parameters()):
                with suppress(Exception):  # the graph of the forward pass is enough
                    recorder.add_results("samples", model.sample(1))
    finally:
        for hook in hooks:
            hook.remove()
    return GraphDef(node=recorder.nodes, versions={"producer": 22}).SerializeToString()


def call(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs of a model for inputs as of `trace_graph`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class GraphRecorder(TorchFunctionMode):
    """Records each call of a torch function as a node, named after the calling module."""

    def __init__(self, model: nn.Module, inputs: Any):
        super().__init__()
        named_tensors = [*model.named_parameters(), *model.named_buffers()]
        self.weight_names = {tensor: name for name, tensor in named_tensors}
        self.nodes: list[dict[str, Any]] = []
        self.scopes = [""]  # of the modules whose forward passes run, the innermost last
        self.scope_of: dict[str, str] = {}
        self.producers: dict[Tensor, str] = {}  # the node that returns a tensor
        self.calls: Counter[str] = Counter()
        named = {"input": inputs}
        if isinstance(inputs, Mapping):
            named = {f"input/{name}": value for name, value in inputs.items()}
        elif isinstance(inputs, tuple):
            named = {f"input/{number}": value for number, value in enumerate(inputs)}
        for name, value in named.items():
            self.add_node(name, "input", [], tensors_in(value))

    def add_hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Make the forward pass of a module use its scope, such as "features/0 (Conv2d)/"."""
        parent, _, leaf = name.rpartition(".")
        label = leaf if isinstance(module, nn.Sequential) else f"{leaf} ({type(module).__name__})"
        scope = f"{self.scope_of.get(parent, '')}{label}/" if name else ""
        self.scope_of[name] = scope

        def enter(module: nn.Module, inputs: Any) -> None:
            self.scopes.append(scope)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.scopes.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        outputs = tensors_in(output)
        if outputs:
            operation = function.__name__.strip("_")
            name = self.unique_name(self.scopes[-1] + operation)
            self.add_node(name, operation, tensors_in((args, kwargs)), outputs)
        return output

    def has_all(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether the graph has all parameters."""
        return all(parameter in self.producers for parameter in parameters)

    def add_results(self, name: str, results: Any) -> None:
        """Add a node for each tensor in the results of a model: "output", "output_1"."""
        for number, tensor in enumerate(tensors_in(results)):
            self.add_node(f"{name}_{number}" if number else name, name, [tensor], [])

    def unique_name(self, name: str) -> str:
        """Return "linear" for the first call with this name, then "linear_2", "linear_3"."""
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"

    def add_node(
        self, name: str, operation: str, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Add a node with edges from its inputs; a weight becomes a node at its first use."""
        for tensor in inputs:
            if tensor in self.weight_names and tensor not in self.producers:
                leaf = self.weight_names[tensor].rpartition(".")[2]
                self.add_node(self.unique_name(self.scopes[-1] + leaf), "parameter", [], [tensor])
        edges = [self.producers[tensor] for tensor in inputs if tensor in self.producers]
        node: dict[str, Any] = {"name": name, "op": operation, "input": edges}
        shapes = []
        for tensor in outputs:
            dimensions = [{"size": size} for size in tensor.shape]
            shapes.append({"dim": dimensions})
            self.producers[tensor] = name
        if shapes:
            node["attr"] = {"_output_shapes": {"list": {"shape": shapes}}}
        self.nodes.append(node)
