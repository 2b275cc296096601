"""Load a trained model from the folder of its run."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from framework.composition.sources import Sources
from framework.composition.spec import Spec, read_spec
from framework.contracts.loss import DataDependentLoss
from framework.contracts.task import Task, TextTask
from framework.data.dataset import Data, Scale
from framework.data.input_rows import (
    STDIN,
    InputFile,
    InputRows,
    chunk_rows,
    find_input_files,
    joined_inputs,
    name_columns,
    opened,
    regrouped,
)
from framework.data.workers import Split
from framework.errors import ConfigError, DataError, Facts, RunError, short
from framework.errors.paths import expanded, pasted, shorter
from framework.errors.user_code import describe, user_errors
from framework.experiment.build import (
    build_data,
    build_loader,
    build_metrics,
    build_model,
    scale_of,
)
from framework.experiment.model_limits import model_limits
from framework.experiment.weights import find_checkpoint, load_into, no_checkpoint
from framework.registry.discovery import is_loaded
from framework.runs import checkpoint
from framework.runs.folder import (
    dump,
    plugins_of,
    read_config,
    read_facts,
    resolve_run,
    run_of_checkpoint,
)
from framework.runtime.batch import Batch
from framework.training.trainer import Trainer
from framework.training.trainer_state import WRONG_FORM

from .prediction_columns import Form

MAX_FLOAT32_OFFSET = 1000  # deviations between 0 and the mean of targets
# Errors of a model that is built from the config of an untrusted source.
BUILD_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, MemoryError)


@dataclass
class Trained:
    """A trained model with the objects that prediction needs; the training data is not read.

    Attributes:
        spec: of the run.
        run: its folder.
        facts: of its data, from facts.json.
        checkpoint: from which the weights are.
    """

    spec: Spec
    run: Path
    model: nn.Module
    task: Task
    facts: dict[str, Any]
    checkpoint: Path

    def trainer(self) -> Trainer:
        """Return a trainer with the device and precision of the run."""
        settings = self.spec.sections["trainer"]
        return Trainer(
            max_steps=1,
            device=settings["device"],
            precision=settings["precision"],
            deterministic=settings["deterministic"],
            seed=self.spec.seed,
        )

    def read_data(self) -> Data:
        """Read the data of the run, and check that it is that of the training."""
        data = build_data(self.spec, refit="fold" in self.facts)
        self.task.check(data)
        self.check_scale(data)
        now = json.loads(dump("facts.json", data.facts()))
        if now != self.facts.get("data", now):
            warnings.warn(f"the data of {self.run} has changed since it was trained", stacklevel=3)
        return data

    def evaluate(self, split: str = "test", data: Data | None = None) -> dict[str, float]:
        """Return the loss and metrics on a split.

        Args:
            split: its name.
            data: the result of `read_data`; None reads it.
        """
        if data is None:
            data = self.read_data()
        loader = build_loader(self.spec, self.model, data, split)
        metrics = build_metrics(self.spec, data, self.task)
        return self.trainer().evaluate(
            loader, model=self.model, task=self.task, metrics=metrics, name=split
        )

    def evaluate_file(self, path: Path) -> dict[str, float]:
        """Return the loss and metrics on a file or folder of other data with targets.

        Raises:
            DataError: as `read_labelled` does.
        """
        data = self.read_labelled(path)
        loader = build_loader(self.spec, self.model, data, "test")
        metrics = build_metrics(self.spec, data, self.task)
        return self.trainer().evaluate(
            loader, model=self.model, task=self.task, metrics=metrics, name="data"
        )

    def read_labelled(self, path: Path) -> Data:
        """Return a file or folder of other data with targets, as the test split of a data set.

        Args:
            path: in the format of the run's data.

        Raises:
            DataError: it cannot be read, or the data set of the run does not support it.
        """
        if not path.exists():
            error = DataError(f"--data {path}: no such file or folder")
            raise error.with_facts(Facts("--data", str(path)))
        maker = self.spec.parts["data"]
        settings = {name: setting.default for name, setting in maker.entry.settings.items()}
        settings |= maker.settings
        facts = {"classes": self.facts["classes"], **self.facts["data"]}
        with facts_that_fit(self.run), user_errors(f"reading {path}", DataError):
            split = maker.entry.part.read_labelled(path, facts, settings, self.scale)
        data = Data()
        data.train = data.test = split
        data.in_shape = tuple(self.facts["in_shape"])
        data.target = facts.get("target", "class")
        data.classes = self.facts["classes"]
        data.out_shape = (len(data.classes),) if data.classes else tuple(self.facts["out_shape"])
        data.scale = self.scale
        self.task.check(data)
        if isinstance(self.task.criterion, DataDependentLoss):
            self.task.criterion.learn(TrainingData(self.spec, data))
        return data

    @property
    def scale(self) -> Scale | None:
        """The scale of the targets in training."""
        scale = self.facts.get("scale")
        return None if scale is None else Scale(*scale)

    def check_scale(self, data: Data) -> None:
        """Raise RunError if the targets have another scale than in training."""
        now = scale_of(data, self.task)
        if not nearly_equal(self.scale, now):
            raise RunError(
                f"{self.run}: the targets were scaled by {self.scale} in training, but by {now} "
                "now; the data has changed, or the run is of an older version: train it again"
            )

    def read_inputs(self, file: Path) -> Batch:
        """Read a file of inputs with the data set of the run.

        Raises:
            DataError: the file cannot be read, or does not fit the model.
        """
        if not file.exists():
            raise DataError(f"there is no file {file}")
        with facts_that_fit(self.run), user_errors(f"reading {file}", DataError):
            inputs = self.spec.parts["data"].entry.part.read_inputs(file, self.facts["data"])
        self.check_inputs(inputs, file)
        return inputs

    def check_inputs(self, inputs: Any, file: Path) -> None:
        """Raise DataError unless the inputs are rows for the model, or a dict of them."""
        if isinstance(inputs, Mapping):
            return  # the task checks the fields
        if not isinstance(inputs, Tensor):
            found = type(inputs).__name__
            raise DataError(f"{file}: expected a tensor from `read_inputs`, got a {found}")
        shape = tuple(inputs.shape[1:])
        expected = self.facts["in_shape"]
        if list(shape) != expected:
            raise DataError(f"{file}: a row has shape {shape}; the model takes {expected}")

    def predict_files(
        self, names: Sequence[str], ids: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, list[Any]], Mapping[str, Any]]]:
        """Read and predict files in chunks of bounded size.

        Args:
            names: files, folders, patterns, or "-" for standard input.
            ids: the columns of the files that identify a row.

        Yields:
            For the rows of a chunk, the columns that identify them, and the predictions of the
            task; both by name.

        Raises:
            DataError: a file cannot be read, or does not fit the model.
        """
        part = self.spec.parts["data"].entry.part
        files = find_input_files(names, part.input_suffixes)
        batch_size = self.spec.sections["loader"]["eval_batch_size"]
        rows = chunk_rows(self.facts["in_shape"], batch_size)
        with_file = len(files) > 1 or files != [expanded(name) for name in names]
        single = tuple(part.single_input_suffixes)
        with_row = not ids and not all(
            file.name.lower().endswith(single or ("/",)) for file in files
        )
        trainer = self.trainer()
        chunks = self.read_chunks(files, ids, rows)
        for group in regrouped(chunks, rows):
            columns = name_columns(group, with_file or not (with_row or ids), with_row)
            yield columns, self.predict(joined_inputs(group), trainer)

    def prediction_form(self) -> Form:
        """Return how the predictions are written to files."""
        scale = self.scale
        is_float32 = True
        if scale is not None and not scale.log:
            mean = torch.as_tensor(scale.mean, dtype=torch.float64)
            std = torch.as_tensor(scale.std, dtype=torch.float64)
            is_float32 = bool((mean.abs() <= MAX_FLOAT32_OFFSET * std).all())
        largest = self.spec.parts["data"].entry.part.max_pixel
        facts = self.facts["data"]
        to_pixels = None
        if largest is not None and "mean" in facts:
            to_pixels = partial(self.as_pixels, largest=largest)
        return Form(self.facts["classes"], is_float32, to_pixels)

    def as_pixels(self, images: Any, largest: float) -> Any:
        """Return images of the model as pixels, 0 for black and 1 for white.

        Args:
            images: an array in the scale of the inputs.
            largest: the value of a white pixel before the inputs were scaled.
        """
        facts = self.facts["data"]
        with facts_that_fit(self.run):
            mean = torch.as_tensor(facts["mean"], dtype=torch.float64)
            std = torch.as_tensor(facts["std"], dtype=torch.float64)
            return ((torch.as_tensor(images).double() * std + mean) / largest).numpy()

    def read_chunks(
        self, files: Sequence[Path], ids: Sequence[str], rows: int
    ) -> Iterator[InputRows]:
        """Yield the rows of files, in chunks of about `rows` rows."""
        read = chunk_reader(self.spec.parts["data"].entry.part)
        for file in files:
            if file != Path(STDIN) and not file.exists():
                raise DataError(f"there is no file {file}")
            with facts_that_fit(self.run), user_errors(f"reading {file}", DataError):
                for chunk in read(opened(file, ids, rows), self.facts["data"]):
                    self.check_inputs(chunk.inputs, file)
                    chunk.file = str(file)
                    yield chunk

    def predict(self, inputs: Batch, trainer: Trainer | None = None) -> Mapping[str, Any]:
        """Return the predictions of the task as columns by name, and the names of the classes.

        Args:
            inputs: shape (rows, *in_shape), prepared as in training; or named tensors.
            trainer: the result of `trainer`; None makes one.
        """
        batch_size = self.spec.sections["loader"]["eval_batch_size"]
        trainer = trainer or self.trainer()
        outputs = trainer.predict(inputs, model=self.model, task=self.task, batch_size=batch_size)
        scale = self.scale
        if scale is not None and isinstance(outputs, Tensor):
            outputs = scale.inverse_transform(outputs)
        columns = self.task.predict(outputs)
        if not isinstance(columns, Mapping):
            name = type(self.task).__name__
            raise DataError(f"{name}.predict: expected a dict of columns, got {short(columns)}")
        return self.with_class_names(columns)

    def with_class_names(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return columns with the column `class`, the names of `class_index`, before it."""
        indices = columns.get("class_index")
        classes = self.facts["classes"]
        if not classes or not isinstance(indices, Tensor) or indices.ndim != 1:
            return columns
        with facts_that_fit(self.run):
            names = [classes[index] for index in indices.tolist()]
        return {"class": names, **columns}

    def generate(self, prompt: str, **sampling: Any) -> tuple[str, str]:
        """Continue a text with a language model.

        Args:
            prompt: the beginning of the text.
            sampling: settings of the task's `generate`, such as the temperature.

        Returns:
            The part of the prompt that the model knows, and the prompt with its continuation.
        """
        data = self.spec.parts["data"].entry.part
        with facts_that_fit(self.run):
            tokens = data.encode(prompt, self.facts["data"])
            known = data.decode(tokens.tolist(), self.facts["data"])
        if not isinstance(self.task, TextTask):
            raise RunError(
                f"the task of {self.run} does not generate text: --prompt is for "
                "task=language_modelling"
            )
        generated = self.task.generate(self.model, tokens, self.facts["in_shape"][0], **sampling)
        with facts_that_fit(self.run):
            return known, data.decode([*tokens.tolist(), *generated], self.facts["data"])


def chunk_reader(part: type[Data]) -> Callable[[InputFile, Any], Iterator[InputRows]]:
    """Return the function that reads files to predict in chunks.

    A subclass may override only `read_inputs` of a class with `read_chunks`: then it is called.
    """
    for base in part.__mro__:
        if "read_chunks" in vars(base):
            return part.read_chunks
        if "read_inputs" in vars(base):
            break
    function: Any = Data.read_chunks
    return partial(function.__func__, part)


@contextmanager
def facts_that_fit(run: Path) -> Iterator[None]:
    """Raise RunError if the data set of a run cannot use the facts in its facts.json."""
    try:
        yield
    except WRONG_FORM as error:
        raise RunError(
            f"{run / 'facts.json'} does not match the data of the run: {describe(error)}"
        ) from error


def nearly_equal(first: Scale | None, second: Scale | None) -> bool:
    """Return whether two scales give the same targets, to within a thousandth of a deviation."""
    if first is None or second is None:
        return first is second
    mean = torch.as_tensor(first.mean, dtype=torch.float64)
    std = torch.as_tensor(first.std, dtype=torch.float64)
    other_mean = torch.as_tensor(second.mean, dtype=torch.float64)
    other_std = torch.as_tensor(second.std, dtype=torch.float64)
    if first.log != second.log or mean.shape != other_mean.shape:
        return False
    difference = (mean - other_mean).abs() + (std - other_std).abs()
    return bool((difference <= 1e-3 * std).all())


class TrainingData(Data):
    """The training data of a run, which is only built if it is read.

    Args:
        spec: of the run.
        other: data with the same shapes and classes.
    """

    def __init__(self, spec: Spec, other: Data):
        self.spec = spec
        self.target = other.target
        self.in_shape = other.in_shape
        self.out_shape = other.out_shape
        self.classes = other.classes

    @cached_property
    def train(self) -> Split:  # type: ignore[override]
        return build_data(self.spec).train


def open_run(run: str | Path, which: str | None = None) -> Trained:
    """Load a trained model.

    Args:
        run: the folder of a run, or of one of its checkpoints.
        which: best, last, or the folder of a checkpoint; None: `run` itself if it is a checkpoint,
            otherwise best.

    Raises:
        RunError: there is no such run or checkpoint.
        ConfigError: a part of the run is not available.
    """
    run = resolve_run(expanded(run))
    run_above = run_of_checkpoint(run)
    if run_above is not None:
        if which is not None:
            raise RunError(
                f"{run} is a checkpoint: "
                f"leave out --checkpoint {which}, or give the run {run_above}"
            )
        which = str(run)
        run = run_above
    spec = read_spec_of(run, read_config(run))
    facts = read_facts(run)
    found = find_checkpoint(run, which or "best")
    if found is None:
        raise no_checkpoint(run)
    try:
        with model_limits(spec, checkpoint.read_shapes(found)):
            model = build_model(
                spec,
                facts["in_shape"],
                facts["out_shape"],
                facts.get("columns", ()),
                trained=False,
            )
    except BUILD_ERRORS as error:
        raise RunError(f"the model of {run} cannot be built: {describe(error)}") from error
    load_into(model, found, run)
    return Trained(spec, run, model, spec.parts["task"](), facts, found)


def read_spec_of(
    run: Path, tree: Mapping[str, Any], overrides: Mapping[str, str] = MappingProxyType({})
) -> Spec:
    """Check the config of a run.

    Args:
        tree: the config, perhaps with overrides.
        overrides: these overrides as typed, by path.

    Raises:
        ConfigError: the config has problems. If plugins of the run are not loaded, only the option
            that loads them is named.
    """
    try:
        return read_spec(tree, Sources(overrides, fallback=f"{run}/config.yaml"))
    except ConfigError as error:
        missing = [plugin for plugin in plugins_of(run) if not is_loaded(plugin)]
        if not missing:
            raise
        options = " ".join(f"--plugins {pasted(shorter(plugin))}" for plugin in missing)
        raise ConfigError([f"{run} was trained with plugins: give {options}"]) from error
