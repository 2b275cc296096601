"""Convert tables and folders of files to Arrow files, in constant memory.

The input is read in parts of some megabytes. Tables (CSV, JSON lines) are read twice: first to find
the type of each column, then to convert. The output is written to a temporary file, which is
renamed when it is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from framework.errors import DataError

BATCH_BYTES = 2**24  # of a record batch, about
BLOCK_BYTES = 2**22  # of a text file that is parsed at once
MAX_LINE_BYTES = 2**28  # of JSON
NULL_VALUES = ["", "?", "NA", "na", "N/A", "n/a", "NaN", "NAN", "nan", "NULL", "null", "None"]
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
CONTENTS = {
    "image": {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"},
    "audio": {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"},
    "text": {".txt"},
}
"""The suffixes of files in folders of classes, by the name of the column that contains them."""
TEMPORARY = ".tmp"


class Source(NamedTuple):
    """An input that is converted to one Arrow file.

    Attributes:
        path: its file or folder, for errors.
        schema: the Arrow schema.
        batches: yields its record batches.
    """

    path: Path
    schema: Any
    batches: Callable[[], Iterator[Any]]


def convert(source: Path, target: Path, overwrite: bool = False) -> dict[str, int]:
    """Convert a file or folder to Arrow.

    A file becomes a file: .csv, .tsv (also .gz), .parquet, .pq, .jsonl, .ndjson, or an Arrow file
    (.arrow, .feather, .ipc), which is written again without compression. A folder with a folder of
    images, sounds or texts (.txt) for each class becomes a file with a column image, audio or text,
    and the column label. If the folder has train, val or test folders with these, the output is a
    folder with train.arrow, val.arrow and test.arrow.

    Args:
        source: the file or folder.
        target: the file or folder to write.
        overwrite: replace an existing file or folder.

    Returns:
        The number of rows of each file.

    Raises:
        DataError: the input cannot be read, or the output exists or cannot be written.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder (looked in {Path.cwd()})")
    check_target(source, target, overwrite)
    if not source.is_dir():
        made = open_table(source)
        return {str(target): write_file(made, target)}
    parts = find_parts(source)
    classes = class_folders(parts["train"])
    kind = find_content(parts["train"], classes)
    if list(parts) == ["train"] and parts["train"] == source:
        return {str(target): write_file(open_folder(source, classes, kind), target)}
    return write_folder(parts, classes, kind, target)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise DataError if the output exists, or cannot be created."""
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise DataError(f"{target} exists already; --overwrite replaces it")
        if target.resolve() == source.resolve():
            raise DataError(f"{target} is the input; write to another path")
        if target.is_dir() and not is_output_folder(target):
            raise DataError(f"{target} is a folder with other files; write to another path")
    if not target.parent.is_dir():
        raise DataError(f"{target}: no such folder {target.parent}")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise DataError(f"{target} is inside of the input {source}; write to another path")


def is_output_folder(folder: Path) -> bool:
    """Return whether a folder contains nothing but the files of a converted folder."""
    names = {f"{part}.arrow" for part in PARTS}
    return all(entry.name in names for entry in folder.iterdir())


# tables


def open_table(path: Path) -> Source:
    """Return a file of rows as a source.

    Raises:
        DataError: the file has an unknown suffix, or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a regular file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".gz" and len(suffixes) > 1:
        suffix = suffixes[-2]
    opener = OPENERS.get(suffix)
    if opener is None:
        raise DataError(
            f"{path}: expected a folder, or a file with one of the suffixes "
            f"{', '.join(OPENERS)}; got {suffix or 'no suffix'}"
        )
    with arrow_errors(path):
        return opener(path)


def open_csv(path: Path) -> Source:
    """Return a CSV file as a source; a column is of integers, floats or texts."""
    import pyarrow
    from pyarrow import csv

    delimiter = find_delimiter(path)
    read_options = csv.ReadOptions(block_size=BLOCK_BYTES)
    parse_options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)

    def read(schema: Any) -> Iterator[Any]:
        options = csv.ConvertOptions(
            column_types=schema,
            null_values=NULL_VALUES,
            strings_can_be_null=True,
        )
        with (
            open_stream(path) as stream,
            csv.open_csv(stream, read_options, parse_options, options) as reader,
        ):
            yield from reader

    with open_stream(path) as stream, csv.open_csv(stream, read_options, parse_options) as reader:
        names = reader.schema.names
    for name in names:
        if not name or names.count(name) > 1:
            raise DataError(f"{path}: expected distinct names of columns in the first line")
    texts = pyarrow.schema([(name, pyarrow.string()) for name in names])
    kinds = dict.fromkeys(names, "int64")
    for batch in read(texts):
        for name in names:
            kinds[name] = narrowest(batch.column(name), kinds[name])
    types = {"int64": pyarrow.int64(), "double": pyarrow.float64(), "string": pyarrow.string()}
    schema = pyarrow.schema([(name, types[kinds[name]]) for name in names])
    return Source(path, schema, lambda: read(schema))


def narrowest(cells: Any, kind: str) -> str:
    """Return the first type, from `kind` on, that can hold the texts: int64, double, string."""
    import pyarrow

    for option in ("int64", "double"):
        if kind == option:
            try:
                cells.cast(option)
                return kind
            except pyarrow.ArrowInvalid:
                kind = "double" if option == "int64" else "string"
    return kind


def find_delimiter(path: Path) -> str:
    """Return the most frequent of , ; | and tab in the first line of a file."""
    with open_stream(path) as stream:
        start = bytes(stream.read(BLOCK_BYTES))
    line = re.match(rb"[^\r\n]*", start)
    first = line[0] if line else b""
    if not first.strip():
        raise DataError(f"{path} is empty; the first line must name the columns")
    return max((b",", b";", b"\t", b"|"), key=first.count).decode()


@contextmanager
def open_stream(path: Path) -> Iterator[Any]:
    """Open a file for reading from its start to its end; .gz is unpacked."""
    import pyarrow

    compression = "gzip" if path.suffix.lower() == ".gz" else None
    with pyarrow.input_stream(str(path), compression=compression) as stream:
        yield stream


def open_json_lines(path: Path) -> Source:
    """Return a file with a JSON object in each line as a source."""
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([])
    for number, block in json_blocks(path):
        with arrow_errors(f"{path}, from line {number} on"):
            found = arrow_json.read_json(pyarrow.BufferReader(block)).schema
            schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")

    def read() -> Iterator[Any]:
        for number, block in json_blocks(path):
            with arrow_errors(f"{path}, from line {number} on"):
                source = pyarrow.BufferReader(block)
                table = arrow_json.read_json(source, parse_options=options)
            yield from table.to_batches()

    return Source(path, schema, read)


def json_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of the first line, and some lines that are not empty."""
    with open_stream(path) as stream:
        rest = b""
        line = 1
        while chunk := bytes(stream.read(BLOCK_BYTES)):
            end = chunk.rfind(b"\n") + 1
            if end == 0:
                rest += chunk
                if len(rest) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {line}: the line is too long")
                continue
            block = rest + chunk[:end]
            rest = chunk[end:]
            if block.strip():
                yield line, block
            line += block.count(b"\n")
        if rest.strip():
            yield line, rest


def open_parquet(path: Path) -> Source:
    """Return a Parquet file as a source."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path, pre_buffer=False)  # the whole file would be buffered
    row_bytes = file.metadata.row_group(0).total_byte_size if file.metadata.num_row_groups else 0
    rows = file.metadata.row_group(0).num_rows if file.metadata.num_row_groups else 0
    per_batch = max(1, min(2**16, BATCH_BYTES * max(rows, 1) // max(row_bytes, 1)))
    return Source(path, file.schema_arrow, lambda: file.iter_batches(per_batch))


def open_arrow(path: Path) -> Source:
    """Return an Arrow IPC file or stream as a source."""
    import pyarrow

    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    source = pyarrow.memory_map(str(path))
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        reader = pyarrow.ipc.open_stream(source, options=options)
        return Source(path, reader.schema, lambda: iter(reader))
    file = pyarrow.ipc.open_file(source, options=options)

    def read() -> Iterator[Any]:
        for number in range(file.num_record_batches):
            yield file.get_batch(number)

    return Source(path, file.schema, read)


OPENERS: Mapping[str, Callable[[Path], Source]] = {
    ".csv": open_csv,
    ".tsv": open_csv,
    ".parquet": open_parquet,
    ".pq": open_parquet,
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".ipc": open_arrow,
}


@contextmanager
def arrow_errors(name: Path | str) -> Iterator[None]:
    """Raise errors of pyarrow and of reading as a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name} cannot be read: {reason}") from error


# folders of classes


def find_parts(root: Path) -> dict[str, Path]:
    """Return the folders of train, val and test; a root without a train folder is train itself."""
    found = {}
    for part, names in PARTS.items():
        for name in names:
            if (root / name).is_dir():
                found[part] = root / name
    return found if "train" in found else {"train": root}


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders of classes, sorted.

    Raises:
        DataError: there is none.
    """
    entries = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    names = sorted(name for name in entries if not name.startswith("."))
    if not names:
        raise DataError(
            f"{folder} has no folders; expected a folder of images, sounds or texts for each class"
        )
    return names


def find_content(folder: Path, classes: Sequence[str]) -> str:
    """Return what the files of the classes are: "image", "audio" or "text".

    Raises:
        DataError: there are no such files, or of several kinds.
    """
    known = [suffix for suffixes in CONTENTS.values() for suffix in suffixes]
    found: set[str] = set()
    for name in classes:
        for file in files_in(folder / name, known):
            for kind, suffixes in CONTENTS.items():
                if file.suffix.lower() in suffixes:
                    found.add(kind)
    if len(found) == 1:
        return found.pop()
    if not found:
        raise DataError(f"{folder} has no files with the suffixes {', '.join(sorted(known))}")
    raise DataError(f"{folder} has files of several kinds: {', '.join(sorted(found))}")


def files_in(folder: Path, suffixes: Sequence[str] | set[str]) -> list[Path]:
    """Return the files with one of the suffixes in a folder, at any depth, sorted."""
    found = [file for file in folder.rglob("*") if file.suffix.lower() in suffixes]
    return sorted(file for file in found if not file.name.startswith(".") and file.is_file())


def open_folder(folder: Path, classes: Sequence[str], kind: str) -> Source:
    """Return a folder of class folders as a source with the columns `kind` and label.

    The metadata of the schema describe them as Hugging Face does: Image, Audio, ClassLabel.
    """
    import pyarrow

    label = {"names": list(classes), "_type": "ClassLabel"}
    if kind == "text":
        content = pyarrow.large_string()
        features = {kind: {"dtype": "large_string", "_type": "Value"}, "label": label}
    else:
        content = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        features = {kind: {"_type": kind.capitalize()}, "label": label}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([(kind, content), ("label", pyarrow.int64())], metadata)

    def read() -> Iterator[Any]:
        for name in class_folders(folder):
            if name not in classes:
                raise DataError(f"{folder / name}: no such class in the folder train")
            for file in files_in(folder / name, CONTENTS[kind]):
                value = read_text(file) if kind == "text" else read_encoded(file)
                columns = [[value], [classes.index(name)]]
                arrays = []
                for cells, field in zip(columns, schema, strict=True):
                    arrays.append(pyarrow.array(cells, field.type))
                yield pyarrow.record_batch(arrays, schema=schema)

    return Source(folder, schema, read)


def read_encoded(file: Path) -> dict[str, Any]:
    """Return the bytes of an image or sound file, and its name."""
    with arrow_errors(file):
        content = file.read_bytes()
    if not content:
        raise DataError(f"{file} is an empty file; delete it or restore it")
    return {"bytes": content, "path": file.name}


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


# writing


def write_folder(
    parts: Mapping[str, Path], classes: Sequence[str], kind: str, target: Path
) -> dict[str, int]:
    """Write a file for each part into a folder; return their numbers of rows."""
    temporary = temporary_path(target)
    with writing(target):
        temporary.mkdir()
        try:
            rows = {}
            for part, folder in parts.items():
                source = open_folder(folder, classes, kind)
                count = write_rows(source, temporary / f"{part}.arrow")
                rows[str(target / f"{part}.arrow")] = count
            remove(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
    return rows


def write_file(source: Source, target: Path) -> int:
    """Write a source to a file; return the number of its rows."""
    temporary = temporary_path(target)
    with writing(target):
        try:
            rows = write_rows(source, temporary)
            if target.is_dir():
                remove(target)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    return rows


def temporary_path(target: Path) -> Path:
    """Return a new path next to a file or folder."""
    return target.parent / f".{target.name}.{os.urandom(8).hex()}{TEMPORARY}"


def remove(target: Path) -> None:
    """Remove a file, or a folder of converted files, if it exists."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write a folder to the disk, so that a renamed file remains after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise errors of writing as a DataError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise DataError(f"{target} cannot be written: {reason}") from error


def write_rows(source: Source, path: Path) -> int:
    """Write record batches of about BATCH_BYTES to a file; return the number of rows.

    Raises:
        DataError: the source has no rows.
    """
    import pyarrow

    schema = pyarrow.schema([plain_field(field) for field in source.schema], source.schema.metadata)
    rows = 0
    with open(path, "xb") as file:
        with pyarrow.ipc.new_file(file, schema) as writer:
            for batch in joined(source, schema):
                writer.write_batch(batch)
                rows += batch.num_rows
        file.flush()
        os.fsync(file.fileno())
    if rows == 0:
        raise DataError(f"{source.path} has no rows")
    return rows


def plain_field(field: Any) -> Any:
    """Return a field with a plain type: texts instead of dictionaries of texts."""
    import pyarrow

    if pyarrow.types.is_dictionary(field.type):
        return field.with_type(field.type.value_type)
    return field


def joined(source: Source, schema: Any) -> Iterator[Any]:
    """Yield record batches of about BATCH_BYTES, from smaller and larger ones of a source."""
    waiting: list[Any] = []
    size = 0
    with arrow_errors(source.path):
        for batch in source.batches():
            for piece in cut(batch):
                waiting.append(piece)
                size += piece.nbytes
                if size >= BATCH_BYTES:
                    yield one_batch(waiting, schema)
                    waiting = []
                    size = 0
        if waiting:
            yield one_batch(waiting, schema)


def cut(batch: Any) -> Iterator[Any]:
    """Yield a record batch in pieces of about BATCH_BYTES."""
    rows = max(1, batch.num_rows * BATCH_BYTES // max(batch.nbytes, 1))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def one_batch(batches: Sequence[Any], schema: Any) -> Any:
    """Return record batches as one, with the columns and types of a schema."""
    import pyarrow

    table = pyarrow.Table.from_batches(batches).select(schema.names).cast(schema)
    return table.combine_chunks().to_batches()[0]
