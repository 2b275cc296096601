"""Files of a run folder, which may be untrusted, and the disk full.

All files of runs and sweeps are opened with `open_file` and written with `write_file`. Below the
folder that the user names, these functions follow no links, accept regular files only, and limit
the bytes that are read.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from framework.errors import DiskFull, RunError
from framework.errors.user_code import text_of

OpenMode = Literal["r", "r+", "a", "x"]
FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "a": os.O_RDWR | os.O_APPEND | os.O_CREAT,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
}
# Non-blocking: opening a FIFO does not wait for a writer.
NO_LINKS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)

MOST_BYTES = 16 * 2**20  # of a file that is read at once
MOST_ROWS_BYTES = 4 * 2**30  # of a file that is read line by line
MOST_LINE_BYTES = 16 * 2**20
MOST_JSON_NODES = 1_000_000
MOST_YAML_NODES = 100_000  # each use of an alias counts; libyaml takes 20 µs for one node
MOST_DEPTH = 64


def open_file(folder: Path, name: str, mode: OpenMode = "r", most: int | None = None) -> BinaryIO:
    """Open a file below a folder, unbuffered if it is opened for writing.

    Args:
        folder: a folder that the user named; its own path may contain links.
        name: the file relative to `folder`, such as "checkpoints/step-00000001/MANIFEST.json".
            No component may be a link.
        mode: "r" to read, "r+" to change, "a" to append and read (a missing file is created), "x"
            to create.
        most: the largest size in bytes; None for any.

    Raises:
        RunError: the file or a folder of its path is a link, or the file is not regular, has
            several hard links, or is larger than `most`.
        OSError: the file is missing or cannot be opened.
    """
    path = folder / name
    directory = open_directory(folder, PurePosixPath(name).parent)
    try:
        descriptor = os.open(path.name, FLAGS[mode] | NO_LINKS, 0o666, dir_fd=directory)
    except OSError as error:
        raise open_error(error, path) from None
    finally:
        os.close(directory)
    try:
        check_descriptor(descriptor, path, most)
        os.set_blocking(descriptor, True)
        if mode == "r":
            return open(descriptor, "rb")
        return open(descriptor, "wb" if mode == "x" else "r+b", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def open_directory(folder: Path, below: PurePosixPath) -> int:
    """Return the descriptor of a folder below `folder`; no component may be a link."""
    if below.is_absolute() or ".." in below.parts:
        raise RunError(f"{folder / below} is outside of {folder}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    path = folder
    for part in below.parts:
        path = path / part
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | NO_LINKS, dir_fd=descriptor)
        except OSError as error:
            raise open_error(error, path) from None
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def open_error(error: OSError, path: Path) -> Exception:
    """Return the error of opening `path`; for links and irregular files a RunError."""
    if path.is_symlink():
        return RunError(
            f"{path} is a symbolic link; files of a run are not read or written through links"
        )
    if error.errno in (errno.ENXIO, errno.EISDIR):
        return RunError(f"{path} is not a regular file")
    return OSError(error.errno, error.strerror, str(path))


def check_descriptor(descriptor: int, path: Path, most: int | None) -> None:
    """Raise RunError unless an open file is regular, has one hard link and `most` bytes at most."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"{path} is not a regular file")
    if status.st_nlink > 1:
        raise RunError(
            f"{path} has {status.st_nlink} hard links, so it may be another file; copy the run "
            "(cp -r)"
        )
    if most is not None and status.st_size > most:
        raise RunError(f"{path} has {status.st_size:,} bytes; expected at most {most:,}")


def write_file(folder: Path, name: str, content: bytes | str | Iterable[bytes]) -> None:
    """Write a file below a folder atomically; an existing file is replaced.

    The content is written to a temporary file, which is then renamed.

    Args:
        folder: an existing folder; it is not created.
        name: the file relative to `folder`, as for `open_file`.
        content: a text, bytes, or an iterable of bytes.

    Raises:
        RunError: a folder of the path is a link, or the file cannot be written. For a full disk the
            message has the bytes free, and those needed or, of an iterable, written before.
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
            write_and_rename(directory, temporary, path, content, needed)
        finally:
            os.close(directory)
    except OSError as error:
        raise unwritable(path, error, needed) from error


def write_and_rename(
    directory: int, temporary: str, path: Path, pieces: Iterable[bytes], needed: int | None
) -> None:
    """Write a temporary file and rename it; remove it if that fails.

    Args:
        directory: the descriptor of the folder.
        temporary: the name of the temporary file.
        path: the path of the file, for messages; its name is the name of the file.
        pieces: the content.
        needed: the number of its bytes; None if it is not known before it is written.

    Raises:
        RunError: the file cannot be written.
    """
    descriptor = os.open(temporary, FLAGS["x"] | NO_LINKS, 0o666, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
        os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException as error:
        written = None
        with suppress(OSError):
            written = os.stat(temporary, dir_fd=directory).st_size
            os.unlink(temporary, dir_fd=directory)
        if isinstance(error, OSError):
            raise unwritable(path, error, needed, written) from error
        raise


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents.

    Raises:
        RunError: that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


class AppendFile:
    """A file to which records are appended atomically.

    Attributes:
        path: the path, for messages.
        file: the open file, unbuffered.
    """

    def __init__(self, folder: Path, name: str, mode: Literal["a", "x"] = "a"):
        """Open a file below an existing folder; see `open_file`.

        Raises:
            RunError: the file is refused or cannot be opened.
        """
        self.path = folder / name
        try:
            self.file = open_file(folder, name, mode)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def append(self, record: bytes) -> None:
        """Append a record.

        Raises:
            RunError: the record cannot be written; the file is truncated to its former size. Also
                if the folder was deleted: the system would write on to a file without a name.
        """
        status = os.fstat(self.file.fileno())
        if status.st_nlink == 0 and not self.path.parent.is_dir():
            raise unwritable(self.path, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        rest = memoryview(record)
        try:
            while rest:  # a disk that becomes full accepts a part
                rest = rest[self.file.write(rest) :]
        except BaseException as error:
            with suppress(OSError):
                self.file.truncate(status.st_size)
                self.file.seek(status.st_size)
            if isinstance(error, OSError):
                raise unwritable(self.path, error, len(record)) from error
            raise

    def close(self) -> None:
        with suppress(OSError):  # `append` has reported the errors of writing
            self.file.close()


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of a killed process. The caller must hold the lock of the folder."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path | None) -> Iterator[None]:
    """Raise errors of the disk in a block as `check_disk_error` does."""
    try:
        yield
    except OSError as error:
        check_disk_error(error, folder)
        raise


def check_disk_error(error: OSError, folder: Path | None) -> None:
    """Raise RunError for an error of a full, failing, read-only or absent disk or a deleted folder.

    Args:
        error: raised by a part that writes files, with or without this module.
        folder: the folder of the run, for an error without a file name.
    """
    has_name = isinstance(error.filename, str | bytes)
    path = Path(os.fsdecode(error.filename)) if has_name else folder
    deleted = error.errno == errno.ENOENT and folder is not None and not folder.is_dir()
    if path is not None and (deleted or error.errno in DISK):
        raise unwritable(path, error) from error


def check_exists(folder: Path) -> None:
    """Raise RunError if the folder of a run was deleted or renamed after the start."""
    if not folder.is_dir():
        raise RunError(f"the folder {folder} no longer exists")


def unwritable(
    path: Path, error: OSError, needed: int | None = None, written: int | None = None
) -> RunError:
    """Return the error of a file that cannot be written.

    Args:
        path: the file.
        error: of the system.
        needed: the bytes to write; the message for a full disk has them.
        written: if the number of bytes to write is not known: those that were written and removed.
    """
    reason = failure_reason(path, error, needed, written)
    return write_error(error)(f"{path} cannot be written: {reason}")


def write_error(error: OSError) -> type[RunError]:
    """Return the class for an error of writing: DiskFull if the disk is full."""
    return DiskFull if error.errno in FULL else RunError


def failure_reason(
    path: Path, error: OSError, needed: int | None = None, written: int | None = None
) -> str:
    """Return the reason that a file or folder cannot be written; the message names the path."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        size = ""
        if needed is not None:
            size = f"{needed:,} bytes are needed, "
        elif written is not None:
            size = f"{written:,} bytes were written and removed, "
        return f"{reason} ({size}{free_disk_bytes(path):,} bytes are free)"
    if error.errno == errno.ENOENT and not path.parent.exists():
        return f"the folder {path.parent} no longer exists"
    return reason


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the file system of a path, which need not exist."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read_bytes(folder: Path, name: str, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file below a folder.

    Raises:
        RunError, OSError: as `open_file` does.
    """
    with open_file(folder, name, most=most) as file:
        return file.read(most + 1)


def read_json(folder: Path, name: str, most: int = MOST_BYTES) -> Any:
    """Return the content of a JSON file below a folder.

    Raises:
        RunError: `open_file` refuses the file, or it is not JSON, too large or too deep.
        OSError: the file is missing or cannot be opened.
    """
    return parse_json(read_bytes(folder, name, most), folder / name)


def parse_json(text: bytes | str, path: Path) -> Any:
    """Return a JSON document.

    Raises:
        RunError: the document is invalid, too large or too deep.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RunError(f"{path} is not valid JSON: {text_of(error)}") from error
    check_tree(content, path)
    return content


def check_tree(content: Any, path: Path) -> None:
    """Raise RunError for a document with too many values or too deep."""
    count = 0
    for depth, level in enumerate(levels(content), 1):
        count += len(level)
        if count > MOST_JSON_NODES or depth > MOST_DEPTH:
            raise too_large(path, MOST_JSON_NODES)


def levels(tree: Any) -> Iterator[list[Any]]:
    """Yield the values of a tree of dicts, lists and tuples level by level."""
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
    """Return the content of a YAML file below a folder.

    Raises:
        RunError, OSError: as `read_json` does.
    """
    return parse_yaml(read_bytes(folder, name, most), folder / name)


def parse_yaml(text: bytes | str, path: Path) -> Any:
    """Return a YAML document.

    Raises:
        RunError: the document is invalid, too large or too deep.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast
    encoded = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if ESCAPED_SURROGATE.search(encoded):
        # libyaml refuses escaped bytes of file names that are not UTF-8
        loader = yaml.SafeLoader
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
        raise RunError(f"{path} is not valid YAML: {text_of(error)}") from error


def check_yaml(events: Iterator[Any], path: Path) -> None:
    """Raise RunError for a document with too many nodes or too deep, before it is built.

    An alias has as many nodes as its anchor, and the same depth.
    """
    import yaml

    anchors: dict[str, tuple[int, int]] = {}  # number and depth of the nodes of each anchor
    # The anchor of each open collection, and the number and depth of the nodes inside it.
    stack: list[list[Any]] = [[None, 0, 0]]
    documents = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append([event.anchor, 0, 0])
            count = 0
            depth = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inner_count, inner_depth = stack.pop()
            count = inner_count + 1
            depth = inner_depth + 1
            anchors[anchor] = (count, depth)
        elif isinstance(event, yaml.ScalarEvent):
            count = 1
            depth = 1
            anchors[event.anchor] = (count, depth)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise RunError(f"{path} is not valid YAML: undefined alias *{event.anchor}")
            count, depth = anchors[event.anchor]
        else:
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise RunError(f"{path} is not valid YAML: expected one document")
            continue
        stack[-1][1] += count
        stack[-1][2] = max(stack[-1][2], depth)
        if stack[-1][1] > MOST_YAML_NODES or len(stack) + stack[-1][2] > MOST_DEPTH + 1:
            raise too_large(path, MOST_YAML_NODES)


def too_large(path: Path, nodes: int) -> RunError:
    """Return the error of a document with more than `nodes` values or too deep."""
    return RunError(
        f"{path} is too large or too deep: "
        f"expected at most {nodes:,} values, nested at most {MOST_DEPTH} deep"
    )


def read_rows(
    folder: Path,
    name: str,
    skipped: Counter[str] | None = None,
    most: int = MOST_ROWS_BYTES,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with a JSON object per line.

    Lines that are incomplete, not a JSON object, not UTF-8, or longer than 16 MB are skipped.

    Args:
        folder: the folder of the file.
        name: of the file.
        skipped: receives the numbers of lines that are "incomplete" and "damaged".
        most: the bytes of the file, at most.

    Raises:
        RunError, OSError: as `open_file` does.
    """
    with open_file(folder, name, most=most) as file:
        while line := file.readline(MOST_LINE_BYTES):
            row = parse_row(line) if line.endswith(b"\n") else None
            if row is not None:
                yield row
            elif skipped is not None:
                skipped["damaged" if line.endswith(b"\n") else "incomplete"] += 1


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None for any other content."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
