"""Exports to PyTorch: a program of torch.export, and weights with plain PyTorch code."""

import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from framework import BuildError, ExportedModel, Exporter, exporters

HEADER = '''\
"""The model as PyTorch code, written by torch.export: `forward(weights, {inputs})`.

`weights` is the content of model.safetensors. The result has {outputs}.
"""
'''


@exporters.register("torch_export", aliases=["pt2"])
class TorchExport(Exporter):
    """A program of torch.export: model.pt2, for `torch.export.load` in PyTorch, also in C++."""

    def write(self, model: ExportedModel, folder: Path) -> None:
        content = io.BytesIO()  # torch ends the process if it cannot write a file
        torch.export.save(model.program(), content)
        (folder / "model.pt2").write_bytes(content.getbuffer())

    def load(self, model: ExportedModel, folder: Path) -> Any:
        return torch.export.load(folder / "model.pt2").module()

    def example(self, model: ExportedModel) -> tuple[list[str], str]:
        lines = ['program = torch.export.load(here / "model.pt2").module()']
        lines.append("outputs = program(*map(torch.from_numpy, raw.values()))")
        return ["import torch"], "\n".join(lines)


@exporters.register("safetensors")
class Safetensors(Exporter):
    """Weights in model.safetensors, and model.py: plain PyTorch code that uses them.

    The code is the graph of torch.export. Loading the weights executes nothing.
    """

    packages = ("safetensors",)

    def write(self, model: ExportedModel, folder: Path) -> None:
        from safetensors.torch import save

        program = model.program()
        if has_subgraphs(program):  # of torch.autocast; this inlines them, and unrolls an LSTM
            program = program.run_decompositions({})
        name_of: dict[str, str] = {}  # in the file, by the argument of the graph
        weights: dict[str, Tensor] = {}
        first: dict[tuple[Any, ...], str] = {}
        for argument, name, tensor in lifted(program):
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            is_shared = tensor.numel() > 0 and place in first
            name_of[argument] = first[place] if is_shared else name
            if not is_shared:
                first[place] = name
                weights[name] = tensor.detach().clone().contiguous()
        (folder / "model.safetensors").write_bytes(save(weights))
        source = source_of(program, name_of, model)
        (folder / "model.py").write_text(source, encoding="utf-8")

    def load(self, model: ExportedModel, folder: Path) -> Any:
        from safetensors.torch import load_file

        module = import_file(folder / "model.py")
        weights = load_file(folder / "model.safetensors")
        return lambda *raw: module.forward(weights, *raw)

    def example(self, model: ExportedModel) -> tuple[list[str], str]:
        imports = ["import torch", "from safetensors.torch import load_file"]
        imports.append("from model import forward  # model.py, next to this file")
        lines = ['weights = load_file(here / "model.safetensors")']
        lines.append("outputs = forward(weights, *map(torch.from_numpy, raw.values()))")
        return imports, "\n".join(lines)


def lifted(program: torch.export.ExportedProgram) -> list[tuple[str, str, Tensor]]:
    """Return the weights, buffers and constants of a program: argument, name and tensor."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found = []
    for argument, name in names.items():
        tensor = program.state_dict.get(name)
        if tensor is None:  # a buffer that is not persistent, or a constant
            tensor = program.constants[name]
        assert isinstance(tensor, Tensor)
        found.append((argument, name, tensor))
    return found


def has_subgraphs(program: torch.export.ExportedProgram) -> bool:
    """Return whether the graph of a program contains other graphs."""
    return any(node.op == "get_attr" for node in program.graph.nodes)


def source_of(
    program: torch.export.ExportedProgram, name_of: dict[str, str], model: ExportedModel
) -> str:
    """Return the graph of a program as a module of Python.

    Raises:
        BuildError: the graph contains other graphs, which have no code.
    """
    graph = program.graph
    if has_subgraphs(program):
        raise BuildError(
            f"--to safetensors: the graph of {model.name} has branches, which cannot be written as "
            "code; choose --to torch_export"
        )
    code = graph.python_code("self")
    lines = [HEADER.format(inputs=", ".join(model.raw), outputs=", ".join(model.outputs))]
    for name, value in sorted(code.globals.items()):
        if re.search(rf"\b{name}\b", code.src):
            lines.append(import_of(name, value))
    arguments = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines.append("\nWEIGHTS = [")
    lines += [f"    {name_of[name]!r}," for name in arguments if name in name_of]
    lines.append("]\n\n\ndef forward(weights, *raw):")
    lines.append("    with torch.no_grad():")
    lines.append("        return graph(None, *[weights[name] for name in WEIGHTS], *raw)\n\n")
    lines.append(code.src.strip().replace("def forward(", "def graph(", 1))
    return "\n".join(lines) + "\n"


def import_of(name: str, value: Any) -> str:
    """Return a statement that defines a global name of a graph's code."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
    if isinstance(value, float):
        return f'{name} = float("{value}")'
    module = getattr(value, "__module__", None)
    qualified: str = getattr(value, "__qualname__", "")
    if module is None or "." in qualified or not qualified:
        raise BuildError(f"--to safetensors: the graph uses {name}, which has no import")
    return f"from {module} import {qualified} as {name}"


def import_file(path: Path) -> ModuleType:
    """Import a file as a module that other code does not see."""
    spec = importlib.util.spec_from_file_location("exported_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
