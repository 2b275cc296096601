"""The files next to an exported model that tell how to use it: metadata.json and example.py."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from framework.contracts.exporter import ExportedModel, Exporter
from framework.data.preparation import Axis, Preparation
from framework.errors import FrameworkError
from framework.runs import checkpoint

from .load import Trained
from .pipeline import Pipeline

EXAMPLE = "example.py"
METADATA = "metadata.json"


def describe(
    trained: Trained, model: ExportedModel, pipeline: Pipeline, exporter: str
) -> dict[str, Any]:
    """Return the metadata of an export, as JSON types."""
    inputs = {}
    for name, each in model.raw.items():
        inputs[name] = {
            "dtype": str(each.dtype).removeprefix("torch."),
            "shape": ["batch", *map(size_as_json, each.shape)],
            "smallest": list(each.smallest_shape),
            "text": each.text,
        }
    is_dynamic = any(each.is_dynamic for each in model.raw.values())
    with torch.no_grad():
        values = pipeline.named_outputs(pipeline.preparation(*model.samples))
    outputs = {}
    for name, value in values.items():
        dtype = str(value.dtype).removeprefix("torch.")
        shape = ["batch", *value.shape[1:]]
        if is_dynamic and value.ndim > 2:
            shape[1] = "length"
        outputs[name] = {"dtype": dtype, "shape": shape}
    parts = trained.spec.parts
    return {
        "format": exporter,
        "model": parts["model"].entry.name,
        "data": parts["data"].entry.name,
        "task": parts["task"].entry.name,
        "checkpoint": trained.checkpoint.name,
        "step": checkpoint_step(trained.checkpoint),
        "inputs": inputs,
        "outputs": outputs,
        "classes": list(trained.facts["classes"]),
        **pipeline.preparation.metadata,
    }


def size_as_json(size: int | Axis) -> int | str:
    """Return the size of an axis, or the range of its sizes as text."""
    return f"{size.smallest} to {size.largest}" if isinstance(size, Axis) else size


def checkpoint_step(path: Path) -> int | None:
    """Return the step of a checkpoint, or None if its name does not tell."""
    with suppress(FrameworkError, OSError, ValueError, AttributeError):
        return checkpoint.step_in(checkpoint.target_of(path))
    return None


def example_script(exporter: Exporter, model: ExportedModel, preparation: Preparation) -> str:
    """Return a script that applies the exported files to a file of raw inputs."""
    imports, statements = exporter.example(model)
    modules = sorted({"json", "sys", *preparation.imports})
    lines = [
        f'"""Uses the exported model without the framework: python {EXAMPLE} FILE"""',
        "",
        *[f"import {module}" for module in modules],
        "from pathlib import Path",
        "",
        "import numpy as np",
        *imports,
        "",
        "file = sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__)",
        "here = Path(__file__).parent",
        f'about = json.loads((here / "{METADATA}").read_text("utf-8"))',
        preparation.example,
        statements,
        preparation.result,
    ]
    return "\n".join(lines) + "\n"
