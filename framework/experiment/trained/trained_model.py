"""A trained run in Python: its model, predictions for raw inputs, measurements and history."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.history import History
from framework.data.accumulation import Source
from framework.data.dataset import Data
from framework.errors import DataError, short
from framework.errors.paths import expanded
from framework.experiment.build import build_data, build_metrics
from framework.runs.folder import read_config
from framework.runs.run_files import RunFiles
from framework.runtime.batch import join_rows
from framework.runtime.display import html

from .load import Trained, open_run

EXPECTED = (
    "expected an array or tensor of samples, a text or a list of texts, the path of a file or a "
    "list of paths, images, or rows of a table (a DataFrame, a list of dicts, a dict of columns)"
)
ARRAY_FILE = "inputs.npy"
TEXTS_FILE = "inputs.jsonl"
TABLE_FILE = "inputs.parquet"
ARROW_FILE = "inputs.arrow"
FILES = {
    ARRAY_FILE: "the array",
    TEXTS_FILE: "the texts",
    TABLE_FILE: "the table",
    ARROW_FILE: "the table",
}
"""What the temporary files contain, for messages."""
SHOWN = ("data", "model", "task", "loss", "optimizer", "scheduler")
"""Sections of the config that a notebook shows."""


class TrainedModel:
    """A model with the weights of a checkpoint, and the files of its run.

    Attributes:
        path: the folder of the run.
        checkpoint: the folder of the checkpoint that the weights are from.
        config: the composed config of the run.
        model: in evaluation mode, on the CPU until `predict` or `evaluate` moves it.
        classes: the names of the classes; empty if the targets are not classes.
    """

    def __init__(self, trained: Trained):
        self._trained = trained
        self._history: History | None = None
        self.path = trained.run
        self.checkpoint = trained.checkpoint
        self.config: dict[str, Any] = dict(read_config(trained.run))
        self.model: nn.Module = trained.model.eval()
        self.classes: list[str] = list(trained.facts.get("classes") or [])

    def __repr__(self) -> str:
        return f"TrainedModel({str(self.path)!r}, checkpoint={self.checkpoint.name!r})"

    def _repr_html_(self) -> str:
        """Return the parts of the run with their settings, and its curves, for notebooks."""
        rows = [("checkpoint", self.checkpoint.name)]
        for name in SHOWN:
            section = self.config.get(name)
            if section is not None:
                rows.append((name, section_text(section)))
        rows.append(("parameters", f"{sum(each.numel() for each in self.model.parameters()):,}"))
        if self.classes:
            rows.append(("classes", ", ".join(map(str, self.classes))))
        heading = html.paragraph(f"TrainedModel {self.path}", bold=True)
        return heading + html.table(rows) + self.history._repr_html_()

    @property
    def history(self) -> History:
        """All logged values, from metrics.jsonl; empty if the run did not write it."""
        if self._history is None:
            files = RunFiles(self.path)
            directions: dict[str, Any] = dict(files.directions)
            self._history = History(directions)
            for row in files.rows():
                self._history.add(row.step, row.values)
        return self._history

    def predict(self, inputs: Any) -> dict[str, Any]:
        """Return the predictions for raw inputs, which are prepared as in training.

        The inputs are read by the data set of the run, as `framework predict --input` reads a file:
        pixels are scaled, texts are split into tokens, cells of a table are encoded.

        Args:
            inputs: a sample or several ones, in the form in which the data set has them on the
                disk: an array or tensor, shape (samples, ...); a text or a list of texts; the path
                of a file or folder, or a list of paths; a Pillow image or a list of them; or rows
                of a table, as a pandas DataFrame, a list of dicts, or a dict of columns. A str is a
                text, or a path if a file with this name exists.

        Returns:
            Columns by name, with a value for each sample: for classes "class" (the name of the most
            likely class), "class_index", "probability" and "probabilities". conf/README.md lists
            those of all tasks.

        Raises:
            DataError: the data set cannot read these inputs, or they do not fit the model.
        """
        suffixes = self._trained.spec.parts["data"].entry.part.input_suffixes
        with files_of(inputs, self._trained.facts["data"], suffixes) as files:
            batches = [self._trained.read_inputs(file) for file in files]
        return dict(self._trained.predict(join_rows(batches)))

    def evaluate(self, data: str | Source = "test") -> dict[str, float]:
        """Return the loss and the metrics of the run on some data.

        Args:
            data: the name of a split of the run's data, or other data in the form that the model
                takes: a `Data` (its test split), a split, or an iterable of batches.

        Returns:
            Values by tag, such as {"test/loss": 0.3, "test/accuracy": 0.9}.

        Raises:
            DataError: there is no such split, or the data does not fit the model.
        """
        if isinstance(data, str):
            return self._trained.evaluate(data)
        spec = self._trained.spec
        known = data if isinstance(data, Data) else build_data(spec)
        return self._trained.trainer().evaluate(
            data,
            model=self.model,
            task=self._trained.task,
            metrics=build_metrics(spec, known, self._trained.task),
            batch_size=spec.sections["loader"]["eval_batch_size"],
        )


def section_text(section: Any) -> str:
    """Return a section of the config on one line: the name of the part, then its settings."""
    if not isinstance(section, Mapping):
        return str(section)
    texts = []
    if "name" in section:
        texts.append(str(section["name"]))
    for key, value in section.items():
        shown = value.get("name", "...") if isinstance(value, Mapping) else value
        if key != "name" and shown is not None:
            texts.append(f"{key}={shown}")
    return ", ".join(texts)


def load(run: str | Path, checkpoint: str | None = None) -> TrainedModel:
    """Load the trained model of a run. The training data is not read.

    Args:
        run: the folder of a run, or of one of its checkpoints.
        checkpoint: best, last, or the folder of a checkpoint; by default best, or `run` itself if
            it is a checkpoint.

    Raises:
        RunError: there is no such run or checkpoint.
        ConfigError: a part of the run is not available.
    """
    return TrainedModel(open_run(run, checkpoint))


@contextmanager
def files_of(
    inputs: Any, facts: Mapping[str, Any], suffixes: Sequence[str]
) -> Iterator[list[Path]]:
    """Provide raw inputs as files that `Data.read_inputs` reads; temporary ones are removed.

    Args:
        inputs: see `TrainedModel.predict`.
        facts: of the data set.
        suffixes: those of the files that the data set reads, see `Data.input_suffixes`.

    Raises:
        DataError: the inputs have none of the known forms.
    """
    paths = as_paths(inputs)
    if paths is not None:
        yield paths
        return
    with TemporaryDirectory(prefix="framework-") as folder:
        try:
            yield write_inputs(inputs, facts, Path(folder), suffixes)
        except DataError as error:
            raise DataError(without_files(str(error), folder)) from error


def without_files(message: str, folder: str) -> str:
    """Return an error about temporary files as one about the inputs of the user."""
    for file, inputs in FILES.items():
        message = message.replace(f"{folder}/{file}", f"predict: {inputs}")
    return message.replace(f"{folder}/", "predict: ")


def as_paths(inputs: Any) -> list[Path] | None:
    """Return inputs that are paths; None for other inputs."""
    if isinstance(inputs, Path):
        return [expanded(inputs)]
    if isinstance(inputs, str):
        return [Path(inputs)] if is_file_name(inputs) else None
    if not isinstance(inputs, list | tuple) or not inputs:
        return None
    if all(isinstance(each, Path) for each in inputs):
        return [expanded(each) for each in inputs]
    if all(isinstance(each, str) and is_file_name(each) for each in inputs):
        return [Path(each) for each in inputs]
    return None


def is_file_name(text: str) -> bool:
    """Return whether a file or folder with this name exists."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def write_inputs(
    inputs: Any, facts: Mapping[str, Any], folder: Path, suffixes: Sequence[str]
) -> list[Path]:
    """Write raw inputs into files of the format that the data set reads."""
    table = folder / (ARROW_FILE if ".arrow" in suffixes else TABLE_FILE)
    if isinstance(inputs, str):
        return [write_texts([inputs], facts, folder)]
    if is_image(inputs):
        return write_images([inputs], folder)
    if hasattr(inputs, "columns") and hasattr(inputs, "to_dict"):  # of pandas
        return [write_table(inputs.to_dict("list"), table)]
    if isinstance(inputs, Mapping):
        is_row = not any(
            isinstance(cells, list | tuple) or is_array(cells) for cells in inputs.values()
        )
        columns = {key: [cell] for key, cell in inputs.items()} if is_row else inputs
        return [write_table(columns, table)]
    if isinstance(inputs, list | tuple) and inputs:
        if all(isinstance(each, str) for each in inputs):
            return [write_texts(inputs, facts, folder)]
        if all(is_image(each) for each in inputs):
            return write_images(inputs, folder)
        if all(isinstance(each, Mapping) for each in inputs):
            return [write_table(columns_of(inputs), table)]
    return [write_array(inputs, folder)]


def is_image(value: Any) -> bool:
    """Return whether a value is an image of Pillow, which need not be installed."""
    return type(value).__module__.startswith("PIL.") and callable(getattr(value, "save", None))


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, an array of NumPy, or a series of pandas."""
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0


def write_array(inputs: Any, folder: Path) -> Path:
    """Write numbers as a .npy file."""
    import numpy

    if isinstance(inputs, Tensor):
        inputs = inputs.detach().cpu()
        inputs = (inputs.float() if inputs.dtype == torch.bfloat16 else inputs).numpy()
    try:
        array = numpy.asarray(inputs)
    except ValueError as error:  # lists of different lengths
        raise DataError(f"predict: {EXPECTED}: {error}") from error
    if array.dtype.kind not in "biuf" or array.size == 0 or array.ndim == 0:
        raise DataError(f"predict: {EXPECTED}, got {short(inputs)}")
    path = folder / ARRAY_FILE
    numpy.save(path, array, allow_pickle=False)
    return path


def write_texts(texts: Sequence[str], facts: Mapping[str, Any], folder: Path) -> Path:
    """Write texts as JSON lines, so that they may contain line breaks."""
    path = folder / TEXTS_FILE
    column = facts.get("text") or "text"
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({column: text}) + "\n")
    return path


def write_images(images: Sequence[Any], folder: Path) -> list[Path]:
    """Write images of Pillow as PNG files."""
    paths = []
    for number, image in enumerate(images):
        path = folder / f"{number:08d}.png"
        image.save(path)
        paths.append(path)
    return paths


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows of a table as columns; a missing cell is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def write_table(columns: Mapping[str, Any], path: Path) -> Path:
    """Write the columns of a table as a Parquet or Arrow file.

    Raises:
        DataError: the columns have different lengths, or the cells of one have different types.
    """
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    arrays = {}
    for name, cells in columns.items():
        values = cells.tolist() if is_array(cells) else list(cells)
        try:
            arrays[str(name)] = pyarrow.array(values, from_pandas=True)
        except (pyarrow.ArrowException, TypeError) as error:
            raise DataError(f"predict: column {name!r}: {error}") from error
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1:
        raise DataError(f"predict: expected columns of one length, got {sorted(lengths)}")
    content = pyarrow.table(arrays)
    if path.name == ARROW_FILE:
        with pyarrow.ipc.new_file(path, content.schema) as writer:
            writer.write_table(content)
    else:
        pyarrow.parquet.write_table(content, path)
    return path
