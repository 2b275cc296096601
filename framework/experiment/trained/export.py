"""Export a trained model as files that need no framework, and verify them on real samples."""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.exporter import ExportedModel, Exporter
from framework.contracts.task import GeneratorTask, Task
from framework.data.dataset import Data, GatheredSplit, Scale, Split, splits_of
from framework.data.preparation import Axis, Preparation, RawInput, Unchanged
from framework.errors import BuildError, FrameworkError, RunError, short
from framework.errors.user_code import user_errors
from framework.registry.kinds import exporters
from framework.runs.run_files import RunFiles
from framework.system.files import make_folder, unwritable

from .load import Trained, facts_that_fit
from .model_card import model_card

TOLERANCE = 1e-5
BATCH_SIZES = (1, 2, 7, 32)
CARD = "README.md"
EXAMPLE = "example.py"
METADATA = "metadata.json"
EXPORTS = "exports"  # in the folder of a run


@dataclass
class Export:
    """A finished export.

    Attributes:
        folder: with the files.
        files: their names and sizes in bytes.
        difference: the largest difference between the exported files and the run, see `verify`.
        samples: the number of samples on which they were compared.
        split: of these samples; "noise" for a generator.
        metrics: on this split, of the exported weights.
        seconds: that the export took, with reading of the data.
    """

    folder: Path
    files: dict[str, int]
    difference: float
    samples: int
    split: str
    metrics: dict[str, float]
    seconds: float


class Pipeline(nn.Module):
    """The raw inputs through preprocessing, model and postprocessing, to a tuple of outputs.

    Args:
        preparation: preprocessing.
        model: the trained model.
        task: whose `exported` makes readable outputs.
        scale: of the targets, or None.
    """

    def __init__(
        self, preparation: Preparation, model: nn.Module, task: Task | None, scale: Scale | None
    ):
        super().__init__()
        self.preparation = preparation
        self.model = model
        self.task = task
        self.scale = scale

    def forward(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `named_outputs`."""
        return tuple(self.named_outputs(self.preparation(*raw)).values())

    def named_outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name for inputs of the model."""
        outputs = self.model(inputs)
        if self.scale is not None:
            outputs = self.scale.inverse_transform(outputs)
        if self.task is None:
            return {"samples": outputs}
        return self.task.exported(outputs)


class Noise(Preparation):
    """The inputs of a generator: numbers drawn from a standard normal distribution."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        text = "drawn from a standard normal distribution"
        self.raw = {"noise": RawInput(torch.float32, tuple(shape), text)}
        sizes = ", ".join(map(str, shape))
        self.example = "\n".join(
            [
                "count = int(file)  # the number of samples to generate",
                f"noise = np.random.default_rng().standard_normal((count, {sizes}))",
                'raw = {"noise": noise.astype("float32")}',
            ]
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the noise."""
        return (inputs,)


def export_run(
    trained: Trained,
    to: str,
    output: Path | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Export:
    """Write a trained model in a format, verified on real samples, to a new folder.

    The data of the run is read: the exported files must give the outputs of the run for samples of
    its test split (or validation or training split, if there is no other). Otherwise nothing is
    written.

    Args:
        trained: an open run.
        to: the name of an exporter.
        output: the folder to create; None: exports/NAME in the folder of the run.
        settings: of the exporter.

    Raises:
        FrameworkError: the exporter does not exist, or a package is missing.
        RunError: the folder exists, cannot be written, or the exported outputs are different.
        BuildError: the model cannot be exported.
    """
    started = time.monotonic()
    maker = exporters.maker(to, **settings)
    exporter: Exporter = maker()
    exporter.check(maker.entry.name)
    folder = trained.run / EXPORTS / maker.entry.name if output is None else output
    check_new(folder)
    data = trained.read_data()
    split, rows = choose_split(data)
    metrics = trained.evaluate(split, data)
    pipeline = build_pipeline(trained, rows)
    batches = real_batches(pipeline, rows)
    model = exported_model(trained, pipeline, batches[-1])
    with temporary_folder(folder) as temporary:
        doing = f"exporting to {maker.entry.name}"
        with user_errors(doing, BuildError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnx about their own code
            model = write(exporter, model, temporary)
            run = exporter.load(model, temporary)
            difference = verify(pipeline, run, model, batches, maker.entry.name)
        samples = sum(len(batch) for batch in batches)
        about = describe(trained, model, pipeline, maker.entry.name)
        about["verified"] = {
            "split": "noise" if isinstance(trained.task, GeneratorTask) else split,
            "samples": samples,
            "batch_sizes": [len(batch) for batch in batches],
            "largest_difference": difference,
        }
        about["metrics"] = metrics
        files = dict(pipeline.preparation.files)
        files[METADATA] = json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n"
        files[EXAMPLE] = example_script(exporter, model, pipeline.preparation)
        files[CARD] = model_card(RunFiles(trained.run), trained, about, split)
        for name, content in files.items():
            (temporary / name).write_text(content, encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(temporary / "__pycache__", ignore_errors=True)  # of code that was imported
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        publish(temporary, folder)
    seconds = time.monotonic() - started
    verified_on = about["verified"]["split"]
    return Export(folder, sizes, difference, samples, verified_on, metrics, seconds)


def check_new(folder: Path) -> None:
    """Raise RunError if an export cannot be written to a folder."""
    if os.path.lexists(folder):
        raise RunError(f"{folder} exists already; choose another --output, or remove it")
    parent = folder.parent
    if parent.name == EXPORTS and parent.is_symlink():
        raise RunError(f"{parent} is a symbolic link; give another folder by --output")
    if os.path.lexists(parent) and not parent.is_dir():
        raise RunError(f"--output {folder}: {parent} is not a folder")


def choose_split(data: Data) -> tuple[str, Split]:
    """Return the name and samples of the split on which an export is verified."""
    splits = splits_of(data)
    name = next(name for name in ("test", "val", "train") if name in splits)
    return name, splits[name]


def build_pipeline(trained: Trained, rows: Split) -> Pipeline:
    """Return preprocessing, model and postprocessing, in evaluation mode on the CPU.

    The model of the run is brought into this form, too, with weights that need no gradient.
    """
    model = trained.model.eval().float().cpu().requires_grad_(False)
    if isinstance(trained.task, GeneratorTask):
        generator, shape = trained.task.generator(model)
        return Pipeline(Noise(shape), generator, None, None).eval()
    in_shape = tuple(trained.facts["in_shape"])
    part = trained.spec.parts["data"].entry.part
    preparation = None
    with facts_that_fit(trained.run), user_errors("describing the raw inputs", BuildError):
        describes = getattr(part, "preparation", None)
        if describes is not None:
            preparation = describes(trained.facts.get("data", {}), in_shape)
    if preparation is None:
        preparation = Unchanged(take(rows, [0]).dtype, in_shape)
    scale = trained.facts.get("scale")
    fitted = None if scale is None else Scale(*scale)
    return Pipeline(preparation, model, trained.task, fitted).eval()


def real_batches(pipeline: Pipeline, rows: Split) -> list[Tensor]:
    """Return batches of inputs of several sizes, evenly spaced in a split; or of noise."""
    batches = []
    start = 0
    for size in BATCH_SIZES:
        if isinstance(pipeline.preparation, Noise):
            shape = pipeline.preparation.raw["noise"].shape
            generator = torch.Generator().manual_seed(size)
            batches.append(torch.randn(size, *shape, generator=generator))  # type: ignore[arg-type]
            continue
        numbers = range(start, start + size)
        start += size
        total = len(rows)
        batches.append(take(rows, [number * total // sum(BATCH_SIZES) for number in numbers]))
    return batches


def take(rows: Split, numbers: Sequence[int]) -> Tensor:
    """Return the inputs of some samples of a split as a batch."""
    with user_errors("reading samples to verify the export"):
        if isinstance(rows, GatheredSplit):
            inputs: Tensor = rows.gather(torch.tensor(numbers))[0]
            return inputs
        samples: list[Any] = [rows[number] for number in numbers]
        return torch.stack([torch.as_tensor(sample[0]) for sample in samples])


def exported_model(trained: Trained, pipeline: Pipeline, inputs: Tensor) -> ExportedModel:
    """Return what an exporter receives.

    Raises:
        BuildError: the model fails for real samples.
    """
    name = type(trained.model).__name__
    with torch.no_grad(), user_errors(f"running {name}", BuildError):
        outputs = pipeline.named_outputs(inputs)
    for key, value in outputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise BuildError(f"{name}: expected a row for each sample, got {key}={short(value)}")
    raw = pipeline.preparation.recover(inputs)
    return ExportedModel(pipeline, pipeline.preparation.raw, list(outputs), raw, name)


def write(exporter: Exporter, model: ExportedModel, folder: Path) -> ExportedModel:
    """Write a model; with the largest size for the axes that cannot be dynamic.

    Returns:
        The model, with the raw inputs as they were exported.
    """
    axes = any(isinstance(size, Axis) for each in model.raw.values() for size in each.shape)
    if axes and any(isinstance(module, nn.RNNBase) for module in model.module.modules()):
        model = with_fixed_axes(model)  # torch.export would unroll the steps, for minutes, and fail
        axes = False
    try:
        exporter.write(model, folder)
    except BuildError:
        if not axes:
            raise
        for path in folder.iterdir():
            path.unlink()
        model = with_fixed_axes(model)
        exporter.write(model, folder)
    return model


def with_fixed_axes(model: ExportedModel) -> ExportedModel:
    """Return the model for raw inputs of the largest size in each axis but that of the batch."""
    raw = {}
    for name, each in model.raw.items():
        sizes = tuple(size.largest if isinstance(size, Axis) else size for size in each.shape)
        raw[name] = each._replace(shape=sizes)
    return replace(model, raw=raw, samples=fitted_to(raw, model.samples))


def fitted_to(raw: Mapping[str, RawInput], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return raw inputs, padded with zeros at the end to the (smallest) size of each axis."""
    fitted = []
    for each, tensor in zip(raw.values(), tensors, strict=True):
        padding: list[int] = []
        for size, found in zip(each.shape, tensor.shape[1:], strict=True):
            smallest = size.smallest if isinstance(size, Axis) else size
            padding = [0, max(0, smallest - found), *padding]
        fitted.append(nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return tuple(fitted)


def verify(
    pipeline: Pipeline,
    run: Any,
    model: ExportedModel,
    batches: Sequence[Tensor],
    name: str,
) -> float:
    """Compare the exported files with the run.

    The difference of floats is relative to the largest output of the batch if that is above 1:
    max |exported - expected| / max(1, max |expected|). Other outputs must be equal.

    Returns:
        The largest difference.

    Raises:
        RunError: it is above `TOLERANCE`, or outputs are missing or of another shape or type.
    """
    largest = 0.0
    for inputs in batches:
        with torch.no_grad():
            expected = pipeline.named_outputs(inputs)
            raw = fitted_to(model.raw, pipeline.preparation.recover(inputs))
            found = run(*raw)
        if len(found) != len(expected):
            raise RunError(f"--to {name}: {len(found)} outputs; the run has {len(expected)}")
        for (key, value), other in zip(expected.items(), found, strict=True):
            actual = trimmed(torch.as_tensor(other), value)
            if actual.shape != value.shape or actual.dtype != value.dtype:
                raise RunError(
                    f"--to {name}: output {key} of {len(inputs)} samples is {actual.dtype} "
                    f"{tuple(actual.shape)}; that of the run is {value.dtype} {tuple(value.shape)}"
                )
            difference = difference_of(actual, value)
            if not difference <= TOLERANCE:
                raise RunError(
                    f"--to {name}: output {key} of {len(inputs)} samples differs from that of the "
                    f"run by {difference:.3g}, more than {TOLERANCE:g}; nothing is written"
                )
            largest = max(largest, difference)
    return largest


def trimmed(outputs: Tensor, like: Tensor) -> Tensor:
    """Return outputs for each position without those of the padding."""
    if outputs.ndim == like.ndim and outputs.ndim > 2 and outputs.shape[1] > like.shape[1]:
        return outputs[:, : like.shape[1]]
    return outputs


def difference_of(actual: Tensor, expected: Tensor) -> float:
    """Return the difference of outputs, see `verify`; infinity if integers are not equal."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if expected.numel() == 0:
        return 0.0
    unequal = torch.where(actual == expected, 0.0, (actual - expected).abs())  # equal infinities
    finite = expected[expected.isfinite()]
    size = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    return float(unequal.max()) / size


def describe(
    trained: Trained, model: ExportedModel, pipeline: Pipeline, exporter: str
) -> dict[str, Any]:
    """Return the metadata of an export, as JSON types."""
    inputs = {}
    for name, each in model.raw.items():
        sizes: list[Any] = ["batch"]
        smallest: list[int] = []
        for size in each.shape:
            sizes.append(f"{size.smallest} to {size.largest}" if isinstance(size, Axis) else size)
            smallest.append(size.smallest if isinstance(size, Axis) else size)
        dtype = str(each.dtype).removeprefix("torch.")
        about = {"dtype": dtype, "shape": sizes, "smallest": smallest, "text": each.text}
        inputs[name] = about
    with torch.no_grad():
        values = pipeline.named_outputs(pipeline.preparation(*model.samples))
    outputs = {}
    for name, value in values.items():
        dtype = str(value.dtype).removeprefix("torch.")
        shape = ["batch", *value.shape[1:]]
        axes = [each.shape for each in model.raw.values()]
        if any(isinstance(size, Axis) for shape_of in axes for size in shape_of) and value.ndim > 2:
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


def checkpoint_step(path: Path) -> int | None:
    """Return the step of a checkpoint, or None if its name does not tell."""
    from framework.runs import checkpoint

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


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a new folder next to another one; remove it at the end unless it was renamed."""
    make_folder(folder.parent)
    try:
        prefix = f".{folder.name}."
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
        path.chmod(0o777 & ~current_umask())
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if folder.parent.name == EXPORTS:
            with suppress(OSError):
                folder.parent.rmdir()  # if it is empty


def current_umask() -> int:
    """Return the mask of the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def publish(temporary: Path, folder: Path) -> None:
    """Write the files to the disk, and rename their folder.

    Raises:
        RunError: the folder exists meanwhile, or cannot be written.
    """
    try:
        for path in temporary.iterdir():
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        check_new(folder)
        temporary.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
