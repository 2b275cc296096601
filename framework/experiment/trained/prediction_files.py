"""Write predictions to a file, chunk by chunk: CSV, JSON lines, Parquet, arrays or images."""

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from framework.errors import FrameworkError, RunError, wrong_option
from framework.errors.paths import expanded, real_path
from framework.system.files import unwritable, write_file

from .prediction_columns import Chunk, Form, flatten, main_array, plain_columns
from .prediction_images import check_pillow, write_images

FORMATS = ("csv", "jsonl", "parquet", "npy", "npz", "images")
TEXT_FORMATS = ("csv", "jsonl")  # of the terminal
EXPECTED = ", ".join(f".{name}" for name in FORMATS if name != "images")
PIECE_BYTES = 2**20


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
            raise wrong_option("--format", chosen, "csv or jsonl for --output -")
        return chosen or "csv"
    path = expanded(output)
    if chosen is None and (output.endswith("/") or (path.is_dir() and not path.suffix)):
        chosen = "images"
    suffix = path.suffix.removeprefix(".")
    if chosen is None and suffix not in FORMATS[:-1]:
        expected = f"a {EXPECTED} file, a folder for images (with a / at the end), or -"
        raise wrong_option("--output", output, expected)
    form = chosen or suffix
    if form == "images":
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise wrong_option("--output", output, "a new or empty folder for images")
        check_pillow()
    elif path.is_dir():
        raise wrong_option("--output", output, "a file, not a folder")
    if not path.parent.is_dir():
        raise FrameworkError(f"--output {output}: no folder {path.parent}")
    return form


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


PIECES: dict[str, Callable[[Iterable[Chunk], Form], Iterator[bytes]]] = {
    "csv": csv_pieces,
    "jsonl": json_pieces,
    "parquet": parquet_pieces,
    "npy": npy_pieces,
    "npz": npz_pieces,
}
