"""Files of a run folder, which may come from a stranger or lie on a full disk.

Every module opens and writes the files of a run (and of a sweep) through the two functions `open_file` and
`write_file`. Below the folder that they are given they follow no link, they accept regular files only, and they
limit what is read.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from framework.errors import DiskFull, RunError

Mode = Literal["r", "r+", "a", "x"]
FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "a": os.O_RDWR | os.O_APPEND | os.O_CREAT,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
}
NO_LINKS = (
    os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
)  # non-blocking: opening a FIFO does not wait for a writer
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)

MOST_BYTES = 16 * 2**20  # of a file that is read at once
MOST_ROWS_BYTES = 4 * 2**30  # of a file that is read line by line
MOST_LINE_BYTES = 16 * 2**20
MOST_JSON_NODES = 1_000_000
MOST_YAML_NODES = 100_000  # aliases counted as often as they are used; libyaml takes 20 µs for one
MOST_DEPTH = 64


def open_file(folder: Path, name: str, mode: Mode = "r", most: int | None = None) -> BinaryIO:
    """Open a file below a folder, unbuffered if it is opened for writing.

    Args:
        folder: a folder that the user named; it may be reached through links.
        name: the file relative to `folder`, such as "checkpoints/step-00000001/MANIFEST.json".
            No component may be a link.
        mode: "r" to read, "r+" to change, "a" to append (and read; the file is created if it is missing),
            "x" to create.
        most: the largest size in bytes; None for any.

    Raises:
        RunError: the file or a folder on the way is a link, or the file is not a regular one, has several hard
            links, or is larger than `most`.
        OSError: the file is missing or cannot be opened.
    """
    path = folder / name
    directory = open_directory(folder, PurePosixPath(name).parent)
    try:
        descriptor = os.open(path.name, FLAGS[mode] | NO_LINKS, 0o666, dir_fd=directory)
    except OSError as error:
        raise refused(error, path) from None
    finally:
        os.close(directory)
    try:
        check_descriptor(descriptor, path, most)
        os.set_blocking(descriptor, True)
        if mode == "r":
            return open(descriptor, "rb")
        return open(descriptor, "wb" if mode == "x" else "r+b", buffering=0)  # type: ignore[return-value]
    except BaseException:
        os.close(descriptor)
        raise


def open_directory(folder: Path, below: PurePosixPath) -> int:
    """Return the descriptor of a folder below `folder`, reached without links."""
    if below.is_absolute() or ".." in below.parts:
        raise RunError(f"{folder / below}: leads out of {folder}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    path = folder
    for part in below.parts:
        path = path / part
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | NO_LINKS, dir_fd=descriptor)
        except OSError as error:
            raise refused(error, path) from None
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def refused(error: OSError, path: Path) -> Exception:
    """Return the error of opening `path` as a RunError if the file is not of a kind that is ever opened."""
    if path.is_symlink():
        return RunError(
            f"{path} is a symbolic link; files of a run are not read or written through links"
        )
    if error.errno in (errno.ENXIO, errno.EISDIR):
        return RunError(f"{path} is not a regular file")
    return OSError(error.errno, error.strerror, str(path))


def check_descriptor(descriptor: int, path: Path, most: int | None) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path} is not a regular file")
    if found.st_nlink > 1:
        raise RunError(
            f"{path} has {found.st_nlink} hard links, so it may be another file; copy the run (cp -r)"
        )
    if most is not None and found.st_size > most:
        raise RunError(f"{path} has {found.st_size:,} bytes; expected at most {most:,}")


def write_file(folder: Path, name: str, content: bytes | str | Iterable[bytes]) -> None:
    """Write a file below a folder whole or not at all; one of that name is replaced.

    The content goes to a new file with a random name first, which is then renamed.

    Args:
        folder: an existing folder; it is not created.
        name: the file relative to `folder`, as for `open_file`.
        content: a text, bytes, or pieces of bytes that are not held in memory all at once.

    Raises:
        RunError: a folder on the way is a link, or the file cannot be written. The message names the file and, if
            the disk is full, the bytes needed and free.
    """
    needed: int | None = None
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    if isinstance(content, bytes):
        needed = len(content)
        content = [content]
    path = folder / name
    temporary = f".{path.name}.{os.urandom(8).hex()}.tmp"
    try:
        directory = open_directory(folder, PurePosixPath(name).parent)
        try:
            write_in(directory, temporary, path.name, content)
        finally:
            os.close(directory)
    except OSError as error:
        raise unwritable(path, error, needed) from error


def write_in(directory: int, temporary: str, name: str, pieces: Iterable[bytes]) -> None:
    descriptor = os.open(temporary, FLAGS["x"] | NO_LINKS, 0o666, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises RunError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


class AppendFile:
    """A file to which records are appended, each whole or not at all.

    Attributes:
        path: of the file, for messages.
        file: the open file, unbuffered.
    """

    def __init__(self, folder: Path, name: str, mode: Literal["a", "x"] = "a"):
        """Open a file below a folder that exists; see `open_file`. Raises RunError."""
        self.path = folder / name
        try:
            self.file = open_file(folder, name, mode)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def append(self, record: bytes) -> None:
        """Append a record.

        Raises RunError naming the file if the record cannot be written; what was written of it is removed again. Also
        if the folder was deleted, where the system would go on writing to a file without a name.
        """
        found = os.fstat(self.file.fileno())
        if found.st_nlink == 0 and not self.path.parent.is_dir():
            raise unwritable(self.path, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        rest = memoryview(record)
        try:
            while rest:  # a full disk takes a part, and refuses what is left
                rest = rest[self.file.write(rest) :]
        except BaseException as error:
            with suppress(OSError):
                self.file.truncate(found.st_size)
                self.file.seek(found.st_size)
            if isinstance(error, OSError):
                raise unwritable(self.path, error, len(record)) from error
            raise

    def close(self) -> None:
        with suppress(
            OSError
        ):  # each record was written by a call of its own, which has told its error
            self.file.close()


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process left. Call it with the lock of the folder held."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path | None) -> Iterator[None]:
    """Do within a block what `check_disk_error` does."""
    try:
        yield
    except OSError as error:
        check_disk_error(error, folder)
        raise


def check_disk_error(error: OSError, folder: Path | None) -> None:
    """Raise RunError if an error is one of a disk that is full, failing, read-only or gone, or of a deleted folder.

    Args:
        error: of a part that writes files, perhaps not through this module.
        folder: of the run; it is named where the error names no file.
    """
    named = isinstance(error.filename, str | bytes)
    path = Path(os.fsdecode(error.filename)) if named else folder
    deleted = error.errno == errno.ENOENT and folder is not None and not folder.is_dir()
    if path is not None and (deleted or error.errno in DISK):
        raise unwritable(path, error) from error


def check_exists(folder: Path) -> None:
    """Raise RunError for the folder of a run that was deleted or renamed after its start."""
    if not folder.is_dir():
        raise RunError(f"the folder {folder} does not exist any more")


def unwritable(path: Path, error: OSError, needed: int | None = None) -> RunError:
    """Return the error of a file that cannot be written: why, and of a full disk the bytes needed and free."""
    return write_error(error)(f"{path} cannot be written: {failure_reason(path, error, needed)}")


def write_error(error: OSError) -> type[RunError]:
    """Return the class in which an error of writing is raised: DiskFull where the disk has no room."""
    return DiskFull if error.errno in FULL else RunError


def failure_reason(path: Path, error: OSError, needed: int | None = None) -> str:
    """Return why a file or folder cannot be written, in words for a message that names it."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        room = f"{free_disk_bytes(path):,} bytes are free"
        return reason + (
            f" ({room})" if needed is None else f" ({needed:,} bytes are needed, {room})"
        )
    if not path.parent.exists():
        return f"the folder {path.parent} does not exist any more"
    return reason


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the file system on which a path is, or will be."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


# readers


def read_bytes(folder: Path, name: str, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file below a folder. Raises as `open_file` does."""
    with open_file(folder, name, most=most) as file:
        return file.read(most + 1)


def read_json(folder: Path, name: str, most: int = MOST_BYTES) -> Any:
    """Return the content of a JSON file below a folder.

    Raises:
        RunError: the file is not opened (see `open_file`), or is no JSON within the limits of nodes and depth.
        OSError: the file is missing or cannot be opened.
    """
    return parse_json(read_bytes(folder, name, most), folder / name)


def parse_json(text: bytes | str, path: Path) -> Any:
    """Return a JSON document. Raises RunError naming the file if it is none, or beyond the limits."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # of a UnicodeDecodeError, too
        raise RunError(f"{path} is no JSON: {first_words(error)}") from error
    check_tree(content, path)
    return content


def check_tree(content: Any, path: Path) -> None:
    count = 0
    for depth, level in enumerate(levels(content), 1):
        count += len(level)
        if count > MOST_JSON_NODES or depth > MOST_DEPTH:
            raise too_large(path, MOST_JSON_NODES)


def levels(tree: Any) -> Iterator[list[Any]]:
    """Yield the values of a tree of dicts, lists and tuples by their depth; a level is built when it is asked for."""
    level = [tree]
    while level:
        yield level
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list | tuple):
                inner.extend(value)
        level = inner


def read_yaml(folder: Path, name: str, most: int = MOST_BYTES) -> Any:
    """Return the content of a YAML file below a folder, of plain types only. Raises as `read_json` does."""
    return parse_yaml(read_bytes(folder, name, most), folder / name)


def parse_yaml(text: bytes | str, path: Path) -> Any:
    """Return a YAML document. Raises RunError naming the file if it is none, or beyond the limits."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast
    if SURROGATE.search(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text):
        loader = (
            yaml.SafeLoader
        )  # libyaml refuses the escape of a byte in a file name that is no UTF-8
    try:
        check_yaml(yaml.parse(text, Loader=loader), path)
        return yaml.load(text, Loader=loader)  # a safe loader
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RunError(f"{path} is no YAML: {first_words(error)}") from error


def check_yaml(events: Iterator[Any], path: Path) -> None:
    """Raise RunError for a document with too many nodes or too deep, before it is built.

    An alias counts as many nodes as what it stands for, and as deep.
    """
    import yaml

    anchors: dict[str, tuple[int, int]] = {}  # of complete nodes: count of nodes and depth
    stack: list[list[Any]] = [
        [None, 0, 0]
    ]  # of open collections: anchor, count and depth of what is in them
    documents = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append([event.anchor, 0, 0])
            count, depth = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inside, below = stack.pop()
            count, depth = inside + 1, below + 1
            anchors[anchor] = (count, depth)
        elif isinstance(event, yaml.ScalarEvent):
            count, depth = 1, 1
            anchors[event.anchor] = (count, depth)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise RunError(
                    f"{path} is no YAML: the alias *{event.anchor} stands for nothing before it"
                )
            count, depth = anchors[event.anchor]
        else:
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise RunError(f"{path} is no YAML: expected one document")
            continue
        stack[-1][1] += count
        stack[-1][2] = max(stack[-1][2], depth)
        if stack[-1][1] > MOST_YAML_NODES or len(stack) + stack[-1][2] > MOST_DEPTH + 1:
            raise too_large(path, MOST_YAML_NODES)


def too_large(path: Path, nodes: int) -> RunError:
    limits = f"at most {nodes:,} values, nested at most {MOST_DEPTH} deep"
    return RunError(f"{path} is too large or too deep: expected {limits}")


def read_rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with a JSON object per line.

    Skipped are a last line without an end, lines that are no JSON object or no UTF-8, and lines of more than 16 MB.

    Raises as `open_file` does.
    """
    with open_file(folder, name, most=MOST_ROWS_BYTES) as file:
        while line := file.readline(MOST_LINE_BYTES):
            if not line.endswith(b"\n"):
                continue
            row = parse_row(line)
            if row is not None:
                yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is torn or something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def first_words(error: BaseException) -> str:
    """Return an error's message on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
