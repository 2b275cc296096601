"""Predictions as columns of single values, in the form in which files have them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.errors import FrameworkError

Chunk = tuple[Mapping[str, Sequence[Any]], Mapping[str, Any]]
"""The columns that identify the rows of a chunk, and its predictions; by name."""
Columns = dict[str, Any]
"""Columns of single values, each a list or a NumPy array."""


@dataclass(frozen=True)
class Form:
    """How predictions are written.

    Attributes:
        classes: the names of the classes or labels, for the columns of a matrix.
        is_float32: whether float32 holds the digits of numbers that are float64.
        to_pixels: converts an image from the scale of the model to 0 to 1; None if unknown.
    """

    classes: Sequence[str] = ()
    is_float32: bool = True
    to_pixels: Callable[[Any], Any] | None = None


def flatten(chunk: Chunk, form: Form) -> Columns:
    """Return columns of single values: a matrix becomes one column for each class or index.

    Raises:
        FrameworkError: a column of the file has the name of a prediction.
    """
    names, predictions = chunk
    columns: Columns = {}
    for name, values in predictions.items():
        array = as_array(values)
        ndim = getattr(array, "ndim", 1)
        if ndim == 1:
            columns[name] = array
        else:
            width = array.shape[1]
            labels = form.classes if len(form.classes) == width else range(width)
            for index, label in enumerate(labels):
                column = array[:, index]
                columns[f"{name}:{label}"] = column if ndim == 2 else column.tolist()
    for name in names:
        if name in columns:
            raise FrameworkError(f"--id {name}: the predictions have a column of this name")
    return {**names, **columns}


def as_array(values: Any) -> Any:
    """Return a tensor or a list of numbers as a NumPy array; other values as a list."""
    import numpy

    if hasattr(values, "detach"):
        return values.detach().cpu().numpy()
    if isinstance(values, numpy.ndarray):
        return values
    values = list(values)
    try:
        array = numpy.asarray(values)
    except ValueError:  # lists of unequal length
        return values
    return array if array.dtype.kind in "biufc" else values


def plain_columns(columns: Columns, form: Form) -> dict[str, list[Any]]:
    """Return columns as lists of Python values, with as many digits as float32 has.

    The number of digits is the smallest that distinguishes a float32 from its neighbours.
    """
    import numpy
    import pyarrow

    plain: dict[str, list[Any]] = {}
    for name, values in columns.items():
        if not isinstance(values, numpy.ndarray):
            plain[name] = list(values)
            continue
        array = values
        if values.dtype == numpy.float64 and form.is_float32:
            with numpy.errstate(over="ignore"):
                narrow = values.astype(numpy.float32)
            fits = numpy.isfinite(narrow) == numpy.isfinite(values)
            array = narrow if fits.all() else values
        if array.dtype == numpy.float32:
            texts = pyarrow.array(numpy.ascontiguousarray(array)).cast("string")
            plain[name] = [float(text) for text in texts.to_pylist()]
        else:
            plain[name] = array.tolist()
    return plain


def main_array(predictions: Mapping[str, Any]) -> Any:
    """Return the last prediction with several numbers per row, such as the probabilities.

    If there is none: all columns of numbers side by side, or the only one, shape (rows,).

    Raises:
        FrameworkError: there are no numbers.
    """
    import numpy

    arrays = []
    for values in predictions.values():
        array = as_array(values)
        if isinstance(array, numpy.ndarray):
            arrays.append(array)
    if not arrays:
        raise FrameworkError("the predictions are not numbers; write .csv, .jsonl or .parquet")
    wide = [array for array in arrays if array.ndim > 1]
    if wide:
        return wide[-1]
    return arrays[0] if len(arrays) == 1 else numpy.stack(arrays, axis=1)
