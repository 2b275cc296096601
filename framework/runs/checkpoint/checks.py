"""Limits on the files of a checkpoint, which may be damaged or come from an untrusted source."""

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from framework.errors import CheckpointError, short
from framework.runtime.memory import available_bytes
from framework.system.files import MOST_DEPTH, levels

MOST_PICKLE = 64 * 2**20  # bytes of the pickle in a torch file
MOST_VALUES = 10_000_000  # in a training state; a shared value counts each time
ALLOWED_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|sparse_tensor)"
    r"|torch \w+Storage|torch\.storage UntypedStorage"
    r"|torch\.serialization _get_layout|torch Size|torch [a-z]\w*"
    r"|collections OrderedDict|_codecs encode"
)
"""Names that the pickle may import. Torch also allows bytearray, which can take any memory."""
OTHER_GLOBALS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
SPARSE_FROM = 2**30  # bytes; smaller files are read even if they have holes
MOST_HOLES = 16  # largest ratio of the size of a file to its data


def check_size(file: BinaryIO, expected: int, path: Path) -> None:
    """Raise CheckpointError if a file has another size, or if it is large and nearly all holes.

    Reading the holes could take hours.
    """
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes instead of {expected}")
    if size < SPARSE_FROM:
        return
    data = 0
    end = 0
    while data * MOST_HOLES < size:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError:  # no more data
            raise CheckpointError(
                f"{path} is a sparse file: {size:,} bytes, of which {data:,} are stored"
            ) from None
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        data += end - start


def check_memory(checkpoint: Path, needed: int) -> None:
    """Raise CheckpointError if a checkpoint does not fit into the free memory.

    Args:
        needed: the bytes of its files.
    """
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint} has {needed:,} bytes; {free:,} bytes of memory are free"
        )


def check_torch_file(file: BinaryIO) -> None:
    """Raise CheckpointError if a torch file is larger in memory, or unsafe to unpickle."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"its record {record.filename} is compressed")
        if sum(record.file_size for record in records) > size:
            raise CheckpointError(f"its records have more than its {size:,} bytes")
        for record in records:
            if not record.filename.endswith("/data.pkl"):
                continue
            if record.file_size > MOST_PICKLE:
                raise CheckpointError(
                    f"its record {record.filename} has {record.file_size:,} bytes"
                )
            check_pickle(archive.read(record))


def check_pickle(content: bytes) -> None:
    """Raise CheckpointError if a pickle imports anything except tensors and plain types."""
    for code, argument, _ in pickletools.genops(content):
        if code.name in OTHER_GLOBALS:
            raise CheckpointError(
                f"it has the instruction {code.name}, which is not allowed in a checkpoint"
            )
        if code.name == "GLOBAL" and ALLOWED_GLOBALS.fullmatch(str(argument)) is None:
            raise CheckpointError(
                f"it names {short(argument, most=100, quote=False)}, "
                "which is neither a tensor nor a plain type"
            )


def check_training_size(training: dict[str, Any]) -> None:
    """Raise CheckpointError if a state needs far more memory or time than its file has bytes."""
    count = 0
    for depth, level in enumerate(levels(training), 1):
        count += len(level)
        if count > MOST_VALUES or depth > MOST_DEPTH:
            raise CheckpointError(
                f"its state has more than {MOST_VALUES:,} values, or more than {MOST_DEPTH} levels"
            )
        for value in level:
            if isinstance(value, Tensor):
                check_strides(value)


def check_strides(tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor has more elements than its storage."""
    if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"a tensor of shape {short(list(tensor.shape))} is stored with fewer elements"
        )
