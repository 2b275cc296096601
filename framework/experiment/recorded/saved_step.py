"""A step that is not finite, saved with a Python script that repeats it alone."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.composition.spec import Spec, read_spec
from framework.contracts.task import Step, Task
from framework.errors import FrameworkError, RunError, short
from framework.experiment.build import build_model
from framework.registry.discovery import discover, is_loaded
from framework.runs.folder import plugins_of
from framework.runs.run_files import RunFiles
from framework.runtime import seeds
from framework.runtime.batch import Batch, map_tensors
from framework.system.files import make_folder, open_file, write_file

from .finder import Call, Finder

STEP_FILE = "step.pt"
SCRIPT_FILE = "replay.py"
SCRIPT = '''\
"""Repeat step {step} of the run {run}, whose loss or gradient is not finite.

Run it with `python {script}`. The weights, the batch and the random state before the
step are in {file}; plugins of the run are loaded from their files.
"""

from pathlib import Path

from framework.experiment.recorded.saved_step import load_step

step = load_step(Path(__file__).with_name("{file}"))
result = step.forward()
print("loss", result.loss.item())
result.loss.backward()
for name, parameter in step.model.named_parameters():
    if parameter.grad is not None and not parameter.grad.isfinite().all():
        print("gradient not finite:", name)
'''


def write_step(folder: Path, run: RunFiles, spec: Spec, finder: Finder, call: Call) -> list[Path]:
    """Write the step and a script that repeats it into a folder; return the files.

    Raises:
        RunError: they cannot be written.
    """
    assert finder.finding is not None
    assert finder.model is not None
    plugins = [plugin for plugin in plugins_of(run.path) if is_loaded(plugin)]
    content = {
        "tree": json.loads(json.dumps(spec.tree, default=str)),
        "plugins": plugins,
        "facts": {key: run.facts.get(key) for key in ("in_shape", "out_shape", "columns")},
        "model": {name: each.cpu() for name, each in finder.model.state_dict().items()},
        "buffers": {name: each.cpu() for name, each in call.buffers.items()},
        "batch": map_tensors(Tensor.cpu, plain_batch(call.batch)),
        "random": call.random,
        "phase": call.phase,
        "step": finder.finding.step,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    script = SCRIPT.format(
        step=finder.finding.step,
        run=run.name,
        script=SCRIPT_FILE,
        file=STEP_FILE,
    )
    make_folder(folder)
    write_file(folder, STEP_FILE, buffer.getvalue())
    write_file(folder, SCRIPT_FILE, script)
    return [folder / SCRIPT_FILE, folder / STEP_FILE]


def plain_batch(batch: Batch) -> Batch:
    """Return a batch whose class can be unpickled by `load_step`: a mapping as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


@dataclass
class SavedStep:
    """A step that `framework explain nan` has written.

    Attributes:
        model: in training mode, with the weights before the step.
        task: of the run.
        batch: the first batch, or micro-batch, that the step passed to the task.
        phase: the phase of the step, for a task with phases.
        random: the state of the random number generators before the step.
    """

    model: nn.Module
    task: Task
    batch: Batch
    phase: str | None
    random: dict[str, Any]

    def forward(self) -> Step:
        """Run the forward pass with the random numbers of the step; return the result."""
        seeds.restore(self.random)
        if self.phase is None:
            return self.task.step(self.model, self.batch)
        return self.task.phase(self.phase, self.model, self.batch)


def load_step(file: Path) -> SavedStep:
    """Load a step that `framework explain nan` has written.

    Args:
        file: the .pt file. Only tensors and plain types are unpickled; the plugins that it names
            are loaded, which runs their code.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with open_file(file.parent, file.name) as opened:
            content = torch.load(opened, map_location="cpu", weights_only=True)
        discover(content["plugins"])
        spec = read_spec(content["tree"])
        facts = content["facts"]
        shapes = (facts["in_shape"], facts["out_shape"], facts["columns"] or ())
        model = build_model(spec, *shapes, trained=False)
        model.load_state_dict(content["model"])
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, value in content["buffers"].items():
                buffers[name].copy_(value)
        task: Task = spec.parts["task"]()
        return SavedStep(model.train(), task, content["batch"], content["phase"], content["random"])
    except FrameworkError:
        raise
    except Exception as error:  # torch.load raises errors of many classes
        raise RunError(f"{file} cannot be read: {short(str(error), 200, quote=False)}") from error
