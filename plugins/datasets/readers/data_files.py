"""Data files: opened only if they are regular files, unpacked within the available memory.

Data files may come from an untrusted source. The size of anything that is unpacked or allocated is
first compared with the available memory, so that a small file cannot fill the memory.
"""

import gzip
import lzma
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from framework import DataError, memory

CHUNK = 2**20
UNCHECKED_BYTES = 2**24  # to look up the available memory takes longer than to read so few bytes
GZIP = b"\x1f\x8b"
MAX_DEFLATE_RATIO = 1032
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,  # a zip file with a compression method that Python does not support
)


def open_data(path: Path) -> IO[bytes]:
    """Open a data file for reading, without waiting for a pipe or device.

    Raises:
        DataError: the file is missing, not readable, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path} is a folder; expected a file")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is not a regular file")
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path) -> bytes:
    """Return the content of a file; a gzip file, or a zip file of one file, is unpacked.

    Raises:
        DataError: the file cannot be read, or its content is larger than the available memory.
    """
    with open_data(path) as file, file_errors(path):
        if path.suffix.lower() == ".zip":
            return read_zip(file, path)
        start = file.peek(2)[:2]  # type: ignore[attr-defined]
        if start == GZIP:
            with gzip.GzipFile(fileobj=file) as packed:
                return read_packed(packed, path)
        if path.suffix.lower() == ".gz" and start:
            raise DataError(f"{path} is not a gzip file: it begins with {start.hex(' ')}")
        check_memory(os.fstat(file.fileno()).st_size, path)
        return file.read()


@contextmanager
def open_unpacked(path: Path, stream: IO[bytes] | None = None) -> Iterator[IO[bytes]]:
    """Open a file to read it piece by piece; a gzip file, or a zip file of one file, is unpacked.

    Args:
        path: the file.
        stream: a stream that is read instead, such as standard input; it is not unpacked.

    Raises:
        DataError: the file cannot be read.
    """
    if stream is not None:
        yield stream
        return
    with open_data(path) as file, file_errors(path):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(file) as archive:
                member = only_member(archive, path)
                if member.flag_bits & 1:
                    raise DataError(f"{path} is encrypted; unpack it")
                with archive.open(member) as packed:
                    yield packed
            return
        start = file.peek(2)[:2]  # type: ignore[attr-defined]
        if start == GZIP:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked  # type: ignore[misc]
            return
        if path.suffix.lower() == ".gz" and start:
            raise DataError(f"{path} is not a gzip file: it begins with {start.hex(' ')}")
        yield file


def read_text(path: Path) -> str:
    r"""Return the content of a UTF-8 file, with all line ends replaced by \n.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    with file_errors(path):
        text = read_bytes(path).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_number(text: str) -> float | None:
    """Return a text as a number, or None if it is not one.

    A number consists of the digits 0 to 9, at most one decimal point, and optionally a sign, an
    exponent, and blanks around it: "3", "+3", " 3 ", "007", "1e5", "-.5". Anything else is a text:
    "3_400", "1,5", "0x10", "inf", digits of other scripts.
    """
    text = text.strip()
    return float(text) if NUMBER.fullmatch(text) else None


def read_zip(file: IO[bytes], path: Path) -> bytes:
    """Return the content of the one file in a zip file."""
    with zipfile.ZipFile(file) as archive:
        member = only_member(archive, path)
        check_member(member, path)
        with archive.open(member) as packed:
            return read_packed(packed, path)


def only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Return the one file in a zip file."""
    members = [
        member for member in archive.infolist() if not member.filename.startswith("__MACOSX")
    ]
    if len(members) != 1:
        raise DataError(f"{path} contains {len(members)} files; unpack it and name one of them")
    return members[0]


def check_member(member: zipfile.ZipInfo, path: Path) -> None:
    """Raise DataError if a file in a zip is encrypted, damaged, or larger than the memory."""
    if member.flag_bits & 1:
        raise DataError(f"{path} is encrypted; unpack it")
    largest = MAX_DEFLATE_RATIO * (member.compress_size + 64)
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > largest:
        raise DataError(
            f"{path} is damaged: its header says that {member.compress_size:,} bytes "
            f"unpack to {member.file_size:,} bytes"
        )
    check_memory(member.file_size, path)


def read_packed(packed: IO[bytes] | gzip.GzipFile, path: Path) -> bytes:
    """Return the unpacked content.

    Raises:
        DataError: the content exceeds the available memory; raised as soon as it does.
    """
    unpacked = bytearray()
    available = memory.available_bytes()
    while chunk := packed.read(CHUNK):
        unpacked += chunk
        # Half of the memory: a bytearray that grows is copied.
        if available is not None and 2 * len(unpacked) > available:
            raise DataError(
                f"{path} unpacks to more than {len(unpacked):,} bytes; "
                f"{available:,} bytes of memory are available"
            )
    return bytes(unpacked)


def check_memory(needed: int, path: Path | str) -> None:
    """Raise DataError if a file needs more bytes of memory than are available."""
    if needed <= UNCHECKED_BYTES:
        return
    available = memory.available_bytes()
    if available is not None and needed > available:
        raise DataError(
            f"{path} needs {needed:,} bytes of memory; {available:,} bytes are available"
        )


@contextmanager
def file_errors(path: Path | str) -> Iterator[None]:
    """Raise errors of reading a file as a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    except RuntimeError as error:  # zipfile has no own class for a missing password
        if "encrypted" not in str(error) and "password" not in str(error):
            raise
        raise DataError(f"{path} is encrypted; unpack it") from error
    except MemoryError as error:
        raise DataError(f"{path} cannot be read: it needs more memory than is available") from error


def one_line(error: BaseException, max_length: int = 200) -> str:
    """Return the message of an error on one line."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(message.split())[:max_length]
