"""Data files as readers open them: refused if they are no regular files, unpacked within limits, numbers in texts.

Data files may come from a stranger. What is unpacked or allocated is compared with the memory that is available
before that is done, so that a small file cannot fill the memory.
"""

import gzip
import io
import lzma
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from framework import DataError, memory

CHUNK = 2**20
SMALL = (
    2**24
)  # bytes that are not compared with the memory available: that would take longer than to read them
GZIP = b"\x1f\x8b"
MOST_RATIO = 1032  # deflate packs at most so many bytes into one
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,  # a zip packed by a method that Python does not know
)


def parse_number(text: str) -> float | None:
    """Return the number that a text is, None if it is none.

    A number has the digits 0 to 9, at most one decimal point, and may have a sign, an exponent, and blanks around it:
    "3", "+3", " 3 ", "007", "1e5", "-.5". All else is text: "3_400", "1,5", "0x10", "inf", digits of other scripts.
    """
    text = text.strip()
    return float(text) if NUMBER.fullmatch(text) else None


def open_data(path: Path) -> BinaryIO:
    """Open a data file to read. Raises DataError at once if it is missing or no regular file; does not wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: there is no such file (looked from {Path.cwd()})") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
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
    """Return what a file holds, and what is packed in a .zip of one file, or in a file that begins as gzip does.

    Raises:
        DataError: the file cannot be read, or what it holds is more than the memory that is available.
    """
    with open_data(path) as file, readable(path):
        if path.suffix.lower() == ".zip":
            return read_zip(file, path)
        start = file.peek(2)[:2]  # type: ignore[attr-defined]
        if start == GZIP:
            return read_gzip(file, path)
        if path.suffix.lower() == ".gz" and start:
            raise DataError(f"{path} is no gzip file: it begins with {start.hex(' ')}")
        check_memory(os.fstat(file.fileno()).st_size, path)
        return file.read()


def read_gzip(file: BinaryIO, path: Path) -> bytes:
    with gzip.GzipFile(fileobj=file) as packed:
        return read_within(packed, path)


def read_zip(file: BinaryIO, path: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        members = [
            member for member in archive.infolist() if not member.filename.startswith("__MACOSX")
        ]
        if len(members) != 1:
            raise DataError(f"{path} holds {len(members)} files; unpack it and name one of them")
        check_member(members[0], path)
        with archive.open(members[0]) as packed:
            return read_within(packed, path)


def check_member(member: zipfile.ZipInfo, path: Path) -> None:
    """Raise DataError for a file in a zip that is encrypted, larger than it can be, or than the memory available."""
    if member.flag_bits & 1:
        raise DataError(f"{path} is encrypted; unpack it")
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > MOST_RATIO * (
        member.compress_size + 64
    ):
        raise DataError(
            f"{path} is damaged: it says that {member.compress_size:,} bytes unpack to {member.file_size:,} bytes"
        )
    check_memory(member.file_size, path)


def read_within(packed: io.BufferedIOBase | gzip.GzipFile | object, path: Path) -> bytes:
    """Return all that a packed file holds. Raises DataError as soon as it is more than the memory available."""
    unpacked = bytearray()
    room = memory.available_bytes()
    while chunk := packed.read(CHUNK):  # type: ignore[union-attr, attr-defined]
        unpacked += chunk
        if room is not None and 2 * len(unpacked) > room:  # a bytearray that grows is copied
            raise DataError(
                f"{path} unpacks to more than {len(unpacked):,} bytes; {room:,} bytes of memory are available"
            )
    return bytes(unpacked)


def check_memory(needed: int, path: Path) -> None:
    """Raise DataError if a file needs more bytes of memory than are available (where the system says how many)."""
    room = memory.available_bytes() if needed > SMALL else None
    if room is not None and needed > room:
        raise DataError(f"{path} needs {needed:,} bytes of memory; {room:,} bytes are available")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from error
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    except RuntimeError as error:  # zipfile has no class of its own for a password that it needs
        if "encrypted" not in str(error) and "password" not in str(error):
            raise
        raise DataError(f"{path} is encrypted; unpack it") from error
    except MemoryError as error:
        raise DataError(f"{path} cannot be read: it needs more memory than is available") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's message on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())[:most]


def not_utf8(path: Path, byte: int) -> DataError:
    return DataError(f"{path} is no UTF-8 text (byte {byte}); save it as UTF-8")


def read_text(path: Path) -> str:
    """Return what a file of UTF-8 holds, with \\n at the ends of lines. Raises DataError that names the file."""
    with readable(path):
        text = read_bytes(path).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")
