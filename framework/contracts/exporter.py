"""The contract of an exporter, which writes a trained model as files for use without the framework.

@exporters.register("torchscript")
class TorchScript(Exporter):
    def write(self, model, folder):
        torch.jit.trace(model.module, model.samples).save(folder / "model.pt")

    def load(self, model, folder):
        return torch.jit.load(folder / "model.pt")

    def example(self, model):
        call = 'torch.jit.load(here / "model.pt")(*map(torch.from_numpy, raw.values()))'
        return ["import torch"], f"outputs = {call}"
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.data.preparation import Axis, RawInput
from framework.errors import BuildError, SettingError
from framework.errors.user_code import text_of

Run = Callable[..., Sequence[Any]]
"""Runs an exported file: takes the raw inputs as tensors, returns the outputs in order."""


@dataclass
class ExportedModel:
    """A model with its preprocessing and postprocessing, for an exporter.

    Attributes:
        module: in evaluation mode, on the CPU, in float32; takes the raw inputs in the order of
            `raw`, and returns a tuple of tensors in the order of `outputs`.
        raw: the raw inputs by name; the first axis is the batch, of any size.
        outputs: the names of the outputs.
        samples: raw inputs of some real samples, to trace the module with.
        name: of the model, for errors.
    """

    module: nn.Module
    raw: Mapping[str, RawInput]
    outputs: Sequence[str]
    samples: tuple[Tensor, ...]
    name: str

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Return the dynamic axes of each raw input, as `torch.export.export` takes them."""
        batch = torch.export.Dim("batch")
        shapes = []
        dims: dict[Axis, Any] = {}
        for each in self.raw.values():
            axes: dict[int, Any] = {0: batch}
            for number, size in enumerate(each.shape, 1):
                if isinstance(size, Axis):
                    if size not in dims:
                        dim = torch.export.Dim(size.name, min=size.smallest, max=size.largest)
                        dims[size] = dim
                    axes[number] = dims[size]
            shapes.append(axes)
        return tuple(shapes)

    def program(self) -> torch.export.ExportedProgram:
        """Return the program that torch.export makes of the module.

        Raises:
            BuildError: torch.export cannot trace the module.
        """
        shapes = (self.dynamic_shapes(),)  # of the one parameter *raw
        try:
            with torch.no_grad():
                program = torch.export.export(self.module, self.samples, dynamic_shapes=shapes)
        except Exception as error:
            raise BuildError(
                f"torch.export cannot trace {self.name}: {text_of(error).splitlines()[0]}"
            ) from error
        for module in program.graph_module.modules():
            for node in getattr(module, "graph", program.graph).nodes:
                node.meta.pop("stack_trace", None)  # has paths of this machine
        return program


class Exporter:
    """Base of exporters. All methods must be overridden.

    Attributes:
        packages: packages that must be installed, as modules.
        extra: the extra of the framework that installs them.
    """

    packages: Sequence[str] = ()
    extra: str = ""

    def check(self, name: str) -> None:
        """Raise SettingError if a package is missing.

        Args:
            name: of the exporter, for the message.
        """
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            advice = f"framework[{self.extra}]" if self.extra else " ".join(missing)
            raise SettingError(
                f"--to {name} needs the package {', '.join(missing)}: pip install '{advice}'"
            )

    def write(self, model: ExportedModel, folder: Path) -> None:
        """Write the model into an empty folder.

        Raises:
            BuildError: the format does not support the model.
        """
        raise NotImplementedError

    def load(self, model: ExportedModel, folder: Path) -> Run:
        """Load the files as a user without the framework does; the result verifies them."""
        raise NotImplementedError

    def example(self, model: ExportedModel) -> tuple[list[str], str]:
        """Return import statements, and statements that set `outputs`, for the example script.

        The statements may use `raw` (the raw inputs by name, NumPy arrays) and `here` (the folder,
        a Path). `outputs` is a sequence of arrays or tensors.
        """
        raise NotImplementedError
