"""Repeat the step of a run whose loss or gradient was not finite, and find where that began.

The order of the samples and the random numbers of a step depend only on the seed and the step, so
the steps since the last checkpoint can be repeated exactly. When the loss or a gradient of a
repeated step is not finite, its forward and backward pass runs once more, and each layer is
checked. The folder of the run is only read.
"""

import io
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from framework.composition.spec import Spec, read_spec
from framework.contracts.callback import Callback, changes_training
from framework.contracts.context import Context
from framework.contracts.strategy import Strategy
from framework.contracts.task import Step, Task
from framework.errors import CheckpointError, FrameworkError, RunError, short
from framework.errors.terminal import print_message
from framework.experiment.build import build_model
from framework.experiment.experiment import Experiment
from framework.experiment.resumption.resume import threads_in
from framework.experiment.steering import OptimizerSettings, Steering
from framework.experiment.trained.load import read_spec_of
from framework.experiment.weights import initialize_from
from framework.registry.discovery import discover, is_loaded
from framework.runs import checkpoint
from framework.runs.folder import plugins_of
from framework.runs.requests import EVENTS
from framework.runs.run_files import RunFiles
from framework.runtime import seeds
from framework.runtime.batch import Batch
from framework.runtime.threads import intra_op_threads
from framework.system.files import make_folder, open_file, read_bytes, read_json, write_file
from framework.training.trainer import Trainer

RECORD = "non_finite.json"
"""The file in which the callback `non_finite` describes the step that it has found."""
STEP_FILE = "step.pt"
SCRIPT_FILE = "replay.py"
MOST_RECORD = 2**20  # bytes
EXACT = {"compile": "off", "cuda_graph": "off", "profile": False, "devices": None}


@dataclass(frozen=True)
class Record:
    """The steps of which one was not finite: a single one, unless the check was deferred."""

    first: int
    last: int


@dataclass
class Call:
    """A forward pass of a step: what it was called with, and the state before it."""

    run: Callable[[Any, Batch], Step]
    model: Any
    batch: Batch
    random: dict[str, Any]
    buffers: dict[str, Tensor]
    phase: str | None = None


@dataclass
class Finding:
    """Where a step is not finite; names are those of modules and parameters of the model.

    Attributes:
        step: its number, from 1.
        loss: of the step.
        samples: the indices of those of the batch, in the training split; None if not known.
        inputs: the samples whose inputs or targets are not finite.
        weights: the parameters and buffers that are not finite before the step.
        layer: the first module whose output is not finite, with finite inputs if possible.
        layer_type: its class.
        layer_inputs_finite: whether all its inputs are finite.
        layer_values: the number of its outputs that are not finite, and of all outputs.
        layer_samples: the samples for which its output is not finite; None if not known.
        gradient_layer: the module at whose output the gradient is not finite first.
        operation: what autograd reports of the backward pass.
        parameter: the first parameter, in the order of the model, whose gradient is not finite.
        parameters: the number of parameters with such a gradient, and of all with a gradient.
    """

    step: int
    loss: float
    samples: list[int] | None = None
    inputs: list[int] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    layer: str | None = None
    layer_type: str = ""
    layer_inputs_finite: bool = True
    layer_values: tuple[int, int] = (0, 0)
    layer_samples: list[int] | None = None
    gradient_layer: str | None = None
    operation: str = ""
    parameter: str | None = None
    parameters: tuple[int, int] = (0, 0)


@dataclass
class Replay:
    """The result of `replay`.

    Attributes:
        run: the folder of the run.
        start: the step of the checkpoint from which the run was repeated; 0 without one.
        last: the last step that was repeated.
        finding: None if no step was found that is not finite.
        notes: differences between the run and its repetition.
        files: the files that repeat the step alone.
    """

    run: Path
    start: int
    last: int
    finding: Finding | None = None
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the result in plain values."""
        content = asdict(self) | {"run": str(self.run), "files": [str(file) for file in self.files]}
        if self.finding is not None and not math.isfinite(self.finding.loss):
            content["finding"]["loss"] = None
        return content


class Found(Exception):  # ends the repetition, is no error
    """The step is found."""


def replay(run: RunFiles, output: Path | None, say: Callable[[str], None]) -> Replay:
    """Repeat a run from its last checkpoint to the step that was not finite, and examine it.

    Args:
        run: the files of the run.
        output: the folder for the files that repeat the step alone; None to write none.
        say: prints a line.

    Raises:
        RunError: the run was not stopped by a step that is not finite.
        FrameworkError: the run cannot be repeated.
    """
    record = read_record(run)
    spec = read_spec_of(run.path, run.config)
    start, state, threads = last_state(run, record, say)
    first = record.first if record is not None else start + 1
    last = record.last if record is not None else steps_of(run) + 1
    if last <= start:
        raise RunError(f"{run.path} has not been stopped by a step that is not finite")
    result = Replay(run.path, start, last, notes=list(differences(run, spec)))
    spec = replace(spec, sections=spec.sections | {"trainer": spec.sections["trainer"] | EXACT})
    say(f"repeating steps {start + 1:,} to {last:,} of {run.path}")
    built = Experiment(spec)
    if state is None and spec.init_from is not None:
        say(initialize_from(built.model, spec.init_from))
    finder = Finder(first, last)
    with TemporaryDirectory(prefix="framework-replay-") as name:
        folder = Path(name)
        copy_needed_files(run, folder, spec)
        trainer = make_trainer(built, finder, folder)
        with intra_op_threads(threads or built.threads()), finder.recording(built.task):
            try:
                with trainer:
                    trainer.fit(**built.fit_arguments(), resume=state)
            except Found:
                pass
    result.finding = finder.finding
    if finder.call is not None and output is not None:
        result.files = write_step(output, run, spec, finder, finder.call)
    return result


def read_record(run: RunFiles) -> Record | None:
    """Return the steps that the callback `non_finite` has recorded; None without a record.

    Raises:
        RunError: the run has no record, and did not fail either; or the record is damaged.
    """
    try:
        content = read_json(run.path, RECORD, MOST_RECORD)
    except FileNotFoundError:
        if run.state == "failed":
            return None
        raise RunError(
            f"{run.path} has not been stopped by a step that is not finite: it is {run.state}"
        ) from None
    except OSError as error:
        raise RunError(f"{run.path / RECORD} cannot be read: {error.strerror}") from error
    steps = [content.get(key) if isinstance(content, dict) else None for key in ("first", "last")]
    first, last = steps
    if type(first) is not int or type(last) is not int or not 1 <= first <= last:
        raise RunError(f"{run.path / RECORD}: expected first and last step, got {short(content)}")
    return Record(first, last)


def steps_of(run: RunFiles) -> int:
    """Return the number of steps that a run has done."""
    step = run.status.get("step")
    return step if type(step) is int and step >= 0 else 0


def last_state(
    run: RunFiles, record: Record | None, say: Callable[[str], None]
) -> tuple[int, dict[str, Any] | None, int | None]:
    """Return the step, the state and the number of threads of the last good earlier checkpoint.

    Without one it is step 0, and no state: the run is repeated from its begin.
    """
    checkpoints = run.path / "checkpoints"
    checkpoint.refuse_links(checkpoints)
    saved = checkpoint.listed(checkpoints) if checkpoints.is_dir() else []
    for path in reversed(saved):
        if record is not None and checkpoint.step_of(path) >= record.first:
            continue
        try:
            if checkpoint.verify(path)["nan"]:
                continue
            weights, training = checkpoint.load(path)
            threads = threads_in(checkpoint.read_manifest(path))
        except CheckpointError as error:
            say(f"skipped {error}")
            continue
        return checkpoint.step_in(path), training | {"model": weights}, threads
    return 0, None, None


def differences(run: RunFiles, spec: Spec) -> Iterator[str]:
    """Yield what the repetition does in another way than the run."""
    trainer = spec.sections["trainer"]
    changed = [f"trainer.{name}={trainer[name]}" for name in ("compile", "cuda_graph")]
    for text in changed:
        if not text.endswith("=off"):
            yield f"{text} is off in the repetition, so that each layer can be checked"
    if run.processes is not None and run.processes > 1:
        yield f"the run had {run.processes} processes, the repetition has one: sums differ by bits"
    version = run.provenance.get("packages")
    before = version.get("torch") if isinstance(version, dict) else None
    if before is not None and before != torch.__version__:
        yield f"torch is {torch.__version__}, was {short(before, quote=False)}"


def copy_needed_files(run: RunFiles, folder: Path, spec: Spec) -> None:
    """Copy what the repeated steps read: changes by `framework tell`, and a good checkpoint."""
    with suppress(FileNotFoundError):
        write_file(folder, EVENTS, read_bytes(run.path, EVENTS))
    rewinds = [
        maker for maker in spec.parts["callback"] if maker.settings.get("policy") == "rewind"
    ]
    source = run.path / "checkpoints"
    if rewinds and source.is_dir():
        newest, _ = checkpoint.newest(source)
        if newest is not None:
            shutil.copytree(newest, folder / "checkpoints" / newest.name, symlinks=True)


def make_trainer(built: Experiment, finder: "Finder", folder: Path) -> Trainer:
    """Return a trainer with the callbacks that change the training, and no loggers."""
    makers = [m for m in built.spec.parts["callback"] if changes_training(m.entry.part)]
    decays_all = built.spec.sections["parameters"]["decay"] == "all"
    settings = OptimizerSettings(built.spec.parts["optimizer"], decays_all)
    callbacks = [maker() for maker in makers]
    steering = Steering(settings, built.status)
    return Trainer(
        **built.spec.sections["trainer"],
        seed=built.spec.seed,
        strategy=Strategy(),
        callbacks=[finder, *built.transforms, *callbacks, steering],
        folder=folder,
    )


class Finder(Callback):
    """Checks the loss and the gradients of some steps before the update, and examines the first
    step of which one is not finite.

    Args:
        first: the first step that is checked, from 1.
        last: the last one.
    """

    changes_training = False

    def __init__(self, first: int, last: int):
        self.first = first
        self.last = last
        self.calls: list[Call] = []
        self.finding: Finding | None = None
        self.call: Call | None = None  # that is not finite
        self.model: nn.Module | None = None
        self.is_checking = False

    @contextmanager
    def recording(self, task: Task) -> Iterator[None]:
        """Record the calls of a task in the checked steps."""
        step = task.step
        phase = task.phase

        def recorded_step(model: Any, batch: Batch) -> Step:
            self._record(step, model, batch, None)
            return step(model, batch)

        def recorded_phase(name: str, model: Any, batch: Batch) -> Step:
            self._record(partial(phase, name), model, batch, name)
            return phase(name, model, batch)

        replaced: Any = task
        replaced.step = recorded_step
        replaced.phase = recorded_phase
        try:
            yield
        finally:
            del replaced.step
            del replaced.phase

    def _record(
        self, run: Callable[[Any, Batch], Step], model: Any, batch: Batch, phase: str | None
    ) -> None:
        if not self.is_checking or self.model is None:
            return
        self.calls.append(
            Call(
                run=run,
                model=model,
                batch=tuple(tensor.clone() for tensor in batch),
                random=seeds.capture(),
                buffers={name: each.clone() for name, each in self.model.named_buffers()},
                phase=phase,
            )
        )

    def on_step_start(self, trainer: Context) -> None:
        self.model = trainer.model
        self.is_checking = trainer.state.step + 1 >= self.first
        self.calls = []

    def on_gradients(self, trainer: Context) -> None:
        if not self.is_checking:
            return
        gradients = gradients_of(trainer.model)
        checked = [trainer.loss]
        if trainer.precision.scaler is None:  # a scaler checks the gradients itself
            checked += gradients.values()
        if all(map(is_finite, checked)):
            self.calls = []  # of this phase of the step
            return
        self.is_checking = False
        finding = Finding(trainer.state.step + 1, float(trainer.loss))
        finding.samples = trainer.sample_indices()
        bad = [name for name, gradient in gradients.items() if not is_finite(gradient)]
        finding.parameter = bad[0] if bad else None
        finding.parameters = (len(bad), len(gradients))
        self.finding = finding
        self.call = examine(trainer, self.calls, finding)
        raise Found

    def on_step_end(self, trainer: Context) -> None:
        if trainer.state.step >= self.last:
            trainer.stop("replay", "the last step is repeated")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model by the names of its parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return bool(tensor.isfinite().all())


# the step once more


def examine(trainer: Context, calls: Sequence[Call], finding: Finding) -> Call | None:
    """Run forward and backward of a step once more, and note where they are not finite.

    Returns:
        The first forward pass that is not finite, or whose gradients are not; None without one.
    """
    if calls:
        repeat_state(trainer.model, calls[0])
    tensors = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    finding.weights = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    rows = sum(len(call.batch[0]) for call in calls)
    offset = 0
    for call in calls:
        samples = None
        if finding.samples is not None and len(finding.samples) == rows:
            samples = finding.samples[offset : offset + len(call.batch[0])]
        offset += len(call.batch[0])
        finding.inputs += rows_not_finite(call.batch, samples)
        repeat_state(trainer.model, call)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        with ExitStack() as hooks:
            watch = Watch(trainer.model, hooks)
            with trainer.precision.autocast():
                result = call.run(call.model, call.batch)
            watch.fill(finding, samples, len(call.batch[0]))
            loss_is_finite = is_finite(result.loss.detach())
            finding.operation = backward(result.loss)
            finding.gradient_layer = watch.gradient_layer
        gradients_are_finite = all(map(is_finite, gradients_of(trainer.model).values()))
        if finding.layer is not None or not loss_is_finite or not gradients_are_finite:
            return call
        if finding.operation:
            return call
    return None


def repeat_state(model: nn.Module, call: Call) -> None:
    """Restore the random numbers and buffers before a forward pass."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in call.buffers.items():
            buffers[name].copy_(value)
    seeds.restore(call.random)


def backward(loss: Tensor) -> str:
    """Run the backward pass, and return what autograd reports if it makes a NaN; else ""."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
            loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


class Watch:
    """Hooks on all modules that note the first output, and the first gradient of an output, that
    is not finite.
    """

    def __init__(self, model: nn.Module, hooks: ExitStack):
        self.layer: tuple[str, nn.Module, bool, Tensor] | None = None
        self.gradient_layer: str | None = None
        for name, module in model.named_modules():
            handle = module.register_forward_hook(partial(self._after, name or "model"))
            hooks.callback(handle.remove)

    def _after(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._at_gradient, name))
            if self.layer is None and not is_finite(tensor.detach()):
                finite = all(is_finite(each.detach()) for each in tensors_in(inputs))
                self.layer = (name, module, finite, tensor.detach())

    def _at_gradient(self, name: str, gradient: Tensor) -> None:
        if self.gradient_layer is None and not is_finite(gradient):
            self.gradient_layer = name

    def fill(self, finding: Finding, samples: list[int] | None, size: int) -> None:
        """Write the first layer that is not finite into the finding."""
        if self.layer is None:
            return
        finding.layer, module, finding.layer_inputs_finite, output = self.layer
        finding.layer_type = type(module).__name__
        wrong = ~output.isfinite()
        finding.layer_values = (int(wrong.sum()), output.numel())
        if output.ndim > 0 and len(output) == size:
            rows = wrong.reshape(size, -1).any(1).nonzero().flatten().tolist()
            finding.layer_samples = rows if samples is None else [samples[row] for row in rows]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def rows_not_finite(batch: Batch, samples: list[int] | None) -> list[int]:
    """Return the rows of a batch with values that are not finite, as samples if they are known."""
    rows: set[int] = set()
    for tensor in batch:
        if tensor.is_floating_point():
            wrong = ~tensor.isfinite().reshape(len(tensor), -1)
            rows.update(wrong.any(1).nonzero().flatten().tolist())
    return [row if samples is None else samples[row] for row in sorted(rows)]


# the step alone


SCRIPT = '''\
"""Repeat step {step} of the run {run}, whose loss or gradient is not finite.

Run it with `python {script}`. The weights, the batch and the random state before the
step are in {file}; plugins of the run are loaded from their files.
"""

from pathlib import Path

from framework.experiment.recorded.replay import load_step

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
        "batch": [tensor.cpu() for tensor in call.batch],
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
        batch = tuple(content["batch"])
        return SavedStep(model.train(), task, batch, content["phase"], content["random"])
    except FrameworkError:
        raise
    except Exception as error:  # torch.load raises errors of many classes
        raise RunError(f"{file} cannot be read: {short(str(error), 200, quote=False)}") from error


def explain_nan(run: RunFiles, output: Path | None) -> Replay:
    """Run `replay`, with its progress on standard error."""
    return replay(run, output, print_message)
