"""Write predictions to a file, chunk by chunk: CSV, JSON lines, Parquet, arrays or images."""

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from framework.errors import FrameworkError, RunError
from framework.errors.paths import expanded, real_path
from framework.system.files import make_folder, unwritable, write_file

FORMATS = ("csv", "jsonl", "parquet", "npy", "npz", "images")
TEXT_FORMATS = ("csv", "jsonl")  # of the terminal
EXPECTED = ", ".join(f".{name}" for name in FORMATS if name != "images")
PIECE_BYTES = 2**20

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


def choose_format(output: str, chosen: str | None = None) -> str:
    """Return the format of an output, before anything is computed.

    Args:
        output: a file; a folder for images; or "-" for stdout.
        chosen: one of FORMATS; None: by the suffix of the file, CSV for stdout.

    Raises:
        FrameworkError: the format is unknown, or the output cannot have it or be written.
    """
    if output == "-":
        if chosen not in (None, *TEXT_FORMATS):
            raise FrameworkError(f"--format {chosen}: --output - prints only csv or jsonl")
        return chosen or "csv"
    path = expanded(output)
    if chosen is None and (output.endswith("/") or (path.is_dir() and not path.suffix)):
        chosen = "images"
    suffix = path.suffix.removeprefix(".")
    if chosen is None and suffix not in FORMATS[:-1]:
        raise FrameworkError(
            f"--output {output}: expected a {EXPECTED} file, a folder for images (with a / at the "
            "end), or - for the terminal"
        )
    form = chosen or suffix
    if form == "images":
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FrameworkError(f"--output {output}: expected a new or empty folder for images")
        check_pillow()
    elif path.is_dir():
        raise FrameworkError(f"--output {output}: is a folder")
    if not path.parent.is_dir():
        raise FrameworkError(f"--output {output}: no folder {path.parent}")
    return form


def check_pillow() -> None:
    """Raise FrameworkError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401  # only whether it can be imported
    except ImportError as error:
        raise FrameworkError("images need Pillow: pip install 'framework[images]'") from error


def write_predictions(
    chunks: Iterable[Chunk], form: Form, output: str, chosen: str | None = None
) -> int:
    """Write predictions to a file or folder, and return the number of rows.

    Args:
        chunks: the rows.
        form: how they are written.
        output: see `choose_format`; not "-".
        chosen: the format.

    Raises:
        FrameworkError: the output cannot be written.
    """
    name = choose_format(output, chosen)
    path = expanded(output)
    counter = Counter(chunks)
    try:
        if name == "images":
            write_images(counter, form, path)
        else:
            write_pieces(PIECES[name](counter, form), path)
    except RunError as error:
        raise FrameworkError(f"--output {output}: {error}") from error
    return counter.rows


class Counter:
    """An iterable of chunks that counts their rows."""

    def __init__(self, chunks: Iterable[Chunk]):
        self.chunks = chunks
        self.rows = 0

    def __iter__(self) -> Iterator[Chunk]:
        for names, predictions in self.chunks:
            self.rows += len(next(iter(predictions.values())))
            yield names, predictions


def write_pieces(pieces: Iterable[bytes], path: Path) -> None:
    """Write bytes to a file.

    A regular file, also behind a link, is replaced atomically. A device or pipe is written to.

    Raises:
        RunError: it cannot be written.
    """
    target = real_path(path)
    pieces = iter(pieces)
    first = next(pieces, b"")  # errors of the input come before the output is opened
    pieces = chain([first], pieces)
    if target.is_file() or not target.exists():
        write_file(target.parent, target.name, pieces)
        return
    try:
        with open(target, "wb") as file:
            file.writelines(pieces)
    except OSError as error:
        raise unwritable(path, error) from error


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


def csv_pieces(
    chunks: Iterable[Chunk], form: Form, shown: Callable[[Any], str] = str
) -> Iterator[bytes]:
    """Yield predictions as CSV; names and texts pass through `shown`."""
    is_first = True
    for chunk in chunks:
        columns = plain_columns(flatten(chunk, form), form)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if is_first:
            writer.writerow(map(shown, columns))
        is_first = False
        for name, cells in columns.items():
            if any(isinstance(cell, str) for cell in cells):
                columns[name] = [shown(cell) if isinstance(cell, str) else cell for cell in cells]
        writer.writerows(zip(*columns.values(), strict=True))
        yield text.getvalue().encode(errors="backslashreplace")


def json_pieces(chunks: Iterable[Chunk], form: Form) -> Iterator[bytes]:
    """Yield predictions as one JSON object per row."""
    for chunk in chunks:
        columns = plain_columns(flatten(chunk, form), form)
        lines = []
        for row in zip(*columns.values(), strict=True):
            values_by_name = dict(zip(columns, row, strict=True))
            # JSON has no complex numbers.
            lines.append(json.dumps(values_by_name, default=str) + "\n")
        yield "".join(lines).encode()


class Pieces(io.RawIOBase):
    """A file to write to, whose content is taken piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        content = b"".join(self.pieces)
        self.pieces = []
        return content


def parquet_pieces(chunks: Iterable[Chunk], form: Form) -> Iterator[bytes]:
    """Yield predictions as a Parquet file, with a row group for each chunk.

    Raises:
        FrameworkError: a column has another type than in the first chunk.
    """
    import pyarrow
    import pyarrow.parquet

    sink = Pieces()
    writer: Any = None
    for chunk in chunks:
        arrays = {name: arrow_array(values) for name, values in flatten(chunk, form).items()}
        table = pyarrow.table(arrays)
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(sink, table.schema)
        try:
            writer.write_table(table.cast(writer.schema))
        except (pyarrow.ArrowInvalid, ValueError) as error:
            raise FrameworkError(
                f"the columns {', '.join(arrays)} have other types than in the first rows; write "
                ".csv or .jsonl"
            ) from error
        yield sink.take()
    if writer is not None:
        writer.close()
    yield sink.take()


def arrow_array(values: Any) -> Any:
    """Return a column for a Parquet file; values without a type there become texts."""
    import numpy
    import pyarrow

    if isinstance(values, numpy.ndarray) and values.dtype.kind != "c":
        return pyarrow.array(numpy.ascontiguousarray(values))
    try:
        array = pyarrow.array(values)
    except pyarrow.ArrowException:
        array = pyarrow.array([str(value) for value in values])
    return array.cast("string") if pyarrow.types.is_null(array.type) else array


def npz_pieces(chunks: Iterable[Chunk], form: Form) -> Iterator[bytes]:
    """Yield predictions as an archive of NumPy arrays, which are collected in memory."""
    import numpy

    parts: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in flatten(chunk, form).items():
            parts.setdefault(name, []).append(numpy.asarray(values))
    content = io.BytesIO()
    arrays = {name: numpy.concatenate(columns) for name, columns in parts.items()}
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                numpy.lib.format.write_array(member, array, allow_pickle=False)
    yield content.getvalue()


def npy_pieces(chunks: Iterable[Chunk], form: Form) -> Iterator[bytes]:
    """Yield the numbers of predictions as one array, shape (rows, ...); see `main_array`.

    The number of rows is at the beginning of the file, so the rows are first written to a temporary
    file.

    Raises:
        FrameworkError: there are no numbers.
        RunError: the temporary file cannot be written.
    """
    import numpy

    rows = 0
    shape: tuple[int, ...] = ()
    dtype: Any = None
    try:
        with tempfile.TemporaryFile() as file:
            for _, predictions in chunks:
                array = main_array(predictions)
                rows += len(array)
                shape = array.shape[1:]
                dtype = array.dtype
                file.write(array.tobytes())
            header = io.BytesIO()
            description = numpy.lib.format.dtype_to_descr(dtype)
            fields = {"descr": description, "fortran_order": False, "shape": (rows, *shape)}
            numpy.lib.format.write_array_header_1_0(header, fields)
            yield header.getvalue()
            file.seek(0)
            yield from read_pieces(file)
    except OSError as error:
        raise unwritable(Path(tempfile.gettempdir()), error) from error


def read_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a file from its position on."""
    while piece := file.read(PIECE_BYTES):
        yield piece


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


PIECES: dict[str, Callable[[Iterable[Chunk], Form], Iterator[bytes]]] = {
    "csv": csv_pieces,
    "jsonl": json_pieces,
    "parquet": parquet_pieces,
    "npy": npy_pieces,
    "npz": npz_pieces,
}


def write_images(chunks: Iterable[Chunk], form: Form, folder: Path) -> None:
    """Write predictions that are images as PNG files: FOLDER/000001.png, or 000001-NAME.png.

    Raises:
        FrameworkError: the predictions are not images.
        RunError: a file cannot be written. Then those that were written are removed.
    """
    is_new = not folder.exists()
    names: list[str] = []
    try:
        for name, content in image_files(chunks, form):
            if not names:
                make_folder(folder)
            write_file(folder, name, content)
            names.append(name)
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if is_new and folder.is_dir():
            folder.rmdir()
        raise


def image_files(chunks: Iterable[Chunk], form: Form) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of a PNG file for each row.

    Raises:
        FrameworkError: the predictions are not images.
    """
    import numpy
    from PIL import Image

    number = 0
    for names, predictions in chunks:
        images = images_of(predictions)
        pixels = stretched(images) if form.to_pixels is None else form.to_pixels(images)
        pixels = (pixels.clip(0, 1) * 255).round().astype(numpy.uint8)
        for row, channels in enumerate(pixels):
            number += 1
            is_gray = len(channels) == 1
            picture = Image.fromarray(channels[0] if is_gray else channels.transpose(1, 2, 0))
            content = io.BytesIO()
            picture.save(content, "PNG")
            stem = f"-{Path(names['file'][row]).stem}" if "file" in names else ""
            yield f"{number:06}{stem}.png", content.getvalue()


def stretched(images: Any) -> Any:
    """Return images whose smallest number is 0 and whose largest is 1, each by itself."""
    low = images.min(axis=(1, 2, 3), keepdims=True)
    high = images.max(axis=(1, 2, 3), keepdims=True)
    return (images - low) / (high - low).clip(min=1e-12)


def images_of(predictions: Mapping[str, Any]) -> Any:
    """Return the predictions that are images, shape (rows, 1 or 3, height, width)."""
    for values in predictions.values():
        array = as_array(values)
        if getattr(array, "ndim", 0) == 4 and array.shape[1] in (1, 3):
            return array
    raise FrameworkError(
        f"the predictions ({', '.join(predictions)}) are not images; --format csv, jsonl, parquet, "
        "npy and npz are possible"
    )
