"""Export a trained model as files that need no framework, and verify them on real samples."""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.exporter import ExportedModel, Exporter
from framework.contracts.task import GeneratorTask
from framework.errors import BuildError, RunError, short
from framework.errors.user_code import user_errors
from framework.registry.kinds import exporters
from framework.runs.run_files import RunFiles
from framework.runtime.batch import count_rows
from framework.system.files import disk_errors, make_folder, unwritable

from .export_files import EXAMPLE, METADATA, describe, example_script
from .load import Trained
from .model_card import model_card
from .pipeline import Inputs, Pipeline, build_pipeline, choose_split, real_batches
from .verification import fitted_to, verify

CARD = "README.md"
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
    with temporary_folder(folder) as temporary, disk_errors(folder.parent):
        doing = f"exporting to {maker.entry.name}"
        ignored = warnings.catch_warnings()
        with user_errors(doing, BuildError), disk_errors(folder.parent), ignored:
            warnings.simplefilter("ignore")  # of torch and onnx about their own code
            model = write(exporter, model, temporary)
            run = exporter.load(model, temporary)
            difference = verify(pipeline, run, model, batches, maker.entry.name)
        sizes = [count_rows(inputs) for inputs in batches]
        about = describe(trained, model, pipeline, maker.entry.name)
        about["verified"] = {
            "split": "noise" if isinstance(trained.task, GeneratorTask) else split,
            "samples": sum(sizes),
            "batch_sizes": sizes,
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
        written = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        publish(temporary, folder)
    seconds = time.monotonic() - started
    verified_on = about["verified"]["split"]
    return Export(folder, written, difference, sum(sizes), verified_on, metrics, seconds)


def check_new(folder: Path) -> None:
    """Raise RunError if an export cannot be written to a folder."""
    if os.path.lexists(folder):
        raise RunError(f"{folder} exists already; choose another --output, or remove it")
    parent = folder.parent
    if parent.name == EXPORTS and parent.is_symlink():
        raise RunError(f"{parent} is a symbolic link; give another folder by --output")
    if os.path.lexists(parent) and not parent.is_dir():
        raise RunError(f"--output {folder}: {parent} is not a folder")


def exported_model(trained: Trained, pipeline: Pipeline, inputs: Inputs) -> ExportedModel:
    """Return what an exporter receives.

    Raises:
        BuildError: the model fails for real samples.
    """
    name = type(trained.model).__name__
    with torch.no_grad(), user_errors(f"running {name}", BuildError):
        outputs = pipeline.named_outputs(inputs)
        raw = pipeline.preparation.recover(inputs)
    for key, value in outputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise BuildError(f"{name}: expected a row for each sample, got {key}={short(value)}")
    return ExportedModel(pipeline, pipeline.preparation.raw, list(outputs), raw, name)


def write(exporter: Exporter, model: ExportedModel, folder: Path) -> ExportedModel:
    """Write a model; with the largest size for the axes that cannot be dynamic.

    Returns:
        The model, with the raw inputs as they were exported.
    """
    is_dynamic = any(each.is_dynamic for each in model.raw.values())
    if is_dynamic and any(isinstance(module, nn.RNNBase) for module in model.module.modules()):
        model = with_fixed_axes(model)  # torch.export would unroll the steps, for minutes, and fail
        is_dynamic = False
    try:
        exporter.write(model, folder)
    except BuildError:
        if not is_dynamic:
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
        raw[name] = each._replace(shape=each.largest_shape)
    return replace(model, raw=raw, samples=fitted_to(raw, model.samples))


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
