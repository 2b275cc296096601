"""Read arrays of numbers from .npy and .npz files, and check them. Nothing is unpickled."""

import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import DataError

from .data_files import READ_ERRORS, check_member, check_memory, one_line, open_data
from .scaling import standardize

ZIP = b"PK"
ARRAY_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    struct.error,
)


class Arrays(Mapping[str, Any]):
    """The arrays of a .npz file, or the array of a .npy file under the name "".

    An array is read when it is accessed, after its size was compared with the size of the file and
    with the available memory.
    """

    def __init__(self, path: Path):
        """List the arrays.

        Raises:
            DataError: the file cannot be read, or is not an array file.
        """
        if path.suffix not in (".npy", ".npz"):
            raise DataError(
                f"{path}: expected a .npy or .npz file, "
                f"got {path.suffix or 'a file without suffix'}"
            )
        self.path = path
        self.members: dict[str, zipfile.ZipInfo | None] = {"": None}
        with open_data(path) as file, array_errors(path):
            if file.peek(2)[:2] != ZIP:  # type: ignore[attr-defined]
                return
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            self.members = {member.filename.removesuffix(".npy"): member for member in members}

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, name: str) -> Any:
        member = self.members[name]
        with open_data(self.path) as file, array_errors(self.path):
            if member is None:
                return read_npy(file, os.fstat(file.fileno()).st_size, self.path)
            check_member(member, self.path)
            with zipfile.ZipFile(file) as archive, archive.open(member) as packed:
                return read_npy(packed, member.file_size, self.path)


@contextmanager
def array_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading an array as a DataError that names the file."""
    try:
        yield
    except (*READ_ERRORS, *ARRAY_ERRORS) as error:
        reason = one_line(error).replace(" when allow_pickle=False", "")
        raise DataError(
            f"{path} cannot be read as an array ({reason}); save it again, as numbers"
        ) from error


def read_npy(file: Any, size: int, path: Path) -> Any:
    """Read an array in NumPy's format.

    Args:
        file: an open file.
        size: the size of the file in bytes.
        path: its path, for errors.

    Raises:
        DataError: the header announces an array that is larger than the file or the memory.
    """
    import numpy

    shape, _, dtype = read_npy_header(file, size, path)
    check_memory(math.prod(shape) * dtype.itemsize, path)
    file.seek(0)
    return numpy.lib.format.read_array(file, allow_pickle=False)


def read_npy_header(file: Any, size: int, path: Path) -> tuple[tuple[int, ...], bool, Any]:
    """Return shape, whether the order is Fortran's, and type of an array; see `read_npy`.

    Raises:
        DataError: the array is larger than the file.
    """
    import numpy

    version = numpy.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = numpy.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = numpy.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError("the names of its fields are not ASCII")
    needed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and needed > size:
        raise DataError(
            f"{path} is damaged: an array of shape {shape} has {needed:,} bytes, "
            "more than the file contains"
        )
    return shape, is_fortran, dtype


def batch_chunks(path: Path, rows: int, facts: dict[str, Any]) -> Iterator[tuple[Tensor, int]]:
    """Yield the inputs of a .npy or .npz file in chunks, and the number of rows before each.

    The rows of a .npy file in C order are read chunk by chunk, those of another file at once. See
    `read_batch`.
    """
    in_shape = tuple(facts["in_shape"])
    with open_data(path) as file, array_errors(path):
        start = file.peek(2)[:2]  # type: ignore[attr-defined]
        is_whole = path.suffix != ".npy" or start == ZIP
        if not is_whole:
            size = os.fstat(file.fileno()).st_size
            shape, is_fortran, dtype = read_npy_header(file, size, path)
            is_one_input = math.prod(shape) == math.prod(in_shape)
            is_whole = is_fortran or dtype.hasobject or not shape or is_one_input or not shape[0]
        if not is_whole:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            for first in range(0, shape[0], rows):
                count = min(rows, shape[0] - first)
                yield scaled_rows(file.read(count * row_bytes), shape, dtype, facts, path), first
            return
    yield read_batch(path, facts), 0


def scaled_rows(
    content: bytes, shape: tuple[int, ...], dtype: Any, facts: dict[str, Any], path: Path
) -> Tensor:
    """Return the bytes of some rows of an array of this shape and type as scaled inputs."""
    import numpy

    array = numpy.frombuffer(content, dtype).reshape(-1, *shape[1:])
    return standardize(as_batch_of(numbers(array, str(path)), facts["in_shape"], path), facts)


def read_array(path: Path, name: str | None = None) -> Tensor:
    """Read numbers from a .npy or .npz file.

    Args:
        path: the file.
        name: the array of a .npz file; the fallbacks are "x", "inputs" and its first array.

    Raises:
        DataError: the file cannot be read, or has no array of numbers.
    """
    arrays = Arrays(path)
    if not arrays:
        raise DataError(f"{path} contains no array")
    chosen = next(iter(arrays))
    for option in (name, "x", "inputs"):
        if option is not None and option in arrays:
            chosen = option
            break
    return numbers(arrays[chosen], f"{path}, array {chosen!r}" if chosen else str(path))


def read_batch(path: Path, facts: dict[str, Any]) -> Tensor:
    """Read inputs from a .npy or .npz file, and scale them as in training.

    Args:
        path: the file; `read_array` says which array of a .npz file is read.
        facts: "in_shape", and optionally "array" and those of `standardize`.
    """
    inputs = read_array(path, facts.get("array"))
    return standardize(as_batch_of(inputs, facts["in_shape"], path), facts)


def as_batch_of(inputs: Tensor, in_shape: Sequence[int], path: Path) -> Tensor:
    """Return inputs as (rows, *in_shape); rows of another shape and the same size are reshaped.

    Raises:
        DataError: the inputs have another size. `path` names them.
    """
    shape = tuple(in_shape)
    if tuple(inputs.shape[1:]) == shape:
        return inputs
    if math.prod(inputs.shape[1:]) == math.prod(shape):
        return inputs.reshape(-1, *shape)
    if inputs.numel() == math.prod(shape):  # one input without the axis of the batch
        return inputs.reshape(1, *shape)
    raise DataError(f"{path}: rows have shape {tuple(inputs.shape[1:])}; the model takes {shape}")


def numbers(array: Any, where: str) -> Tensor:
    """Return an array as a tensor of uint8, bool, int64, float32 or float64, shape (rows, ...).

    Args:
        array: a NumPy array or a tensor; its shape (rows,) becomes (rows, 1).
        where: its place, for errors.

    Raises:
        DataError: an element is not a number, not finite, or beyond float32.
    """
    import numpy

    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    array = numpy.asarray(array)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: expected an array of integers or floats, got {array.dtype}")
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{where}: the array is empty")
    if array.dtype == numpy.uint64 and array.max() >= 2**63:
        raise DataError(f"{where}: integers beyond 2^63 are not supported; subtract an offset")
    dtype: Any = array.dtype
    if dtype.kind == "f":
        dtype = numpy.float64 if dtype.itemsize >= 8 else numpy.float32
    elif dtype.kind != "b" and dtype != numpy.uint8:
        dtype = numpy.int64
    tensor = torch.from_numpy(numpy.array(array, dtype=dtype, order="C"))
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        row = int((~tensor.float().isfinite()).nonzero()[0, 0])
        raise DataError(
            f"{where}: row {row + 1} contains NaN or infinity; fill it in or drop the row"
        )
    return tensor if tensor.ndim > 1 else tensor[:, None]
