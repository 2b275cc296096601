"""Limits on the files of a checkpoint, which may be damaged or untrusted."""

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

MOST_PICKLE = (
    64 * 2**20
)  # bytes of the record of a torch file that says how its tensors lie in plain types
MOST_VALUES = 10_000_000  # of a training state, what is shared counted as often as it is used
GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|sparse_tensor)|torch \w+Storage|torch\.storage UntypedStorage"
    r"|torch\.serialization _get_layout|torch Size|torch [a-z]\w*|collections OrderedDict|_codecs encode"
)
"""What the pickle of a training state may name. Torch allows more, such as bytearray, which takes any memory."""
OTHER_GLOBALS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
SPARSE_FROM = 2**30  # bytes; smaller files are read whatever holes they have
MOST_HOLES = 16  # times as many bytes as there is data


def check_size(file: BinaryIO, expected: int, path: Path) -> None:
    """Raise CheckpointError for a file of another size, and for a large one of which nearly all is holes, which could
    take hours to read.
    """
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes instead of {expected}")
    if size < SPARSE_FROM:
        return
    data = end = 0
    while data * MOST_HOLES < size:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError:  # there is no more data
            raise CheckpointError(
                f"{path} has {size:,} bytes, but data for {data:,} bytes only"
            ) from None
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        data += end - start


def check_memory(checkpoint: Path, needed: int) -> None:
    """Raise CheckpointError when the files of a checkpoint do not fit into the free memory."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint} has {needed:,} bytes; {free:,} bytes of memory are free"
        )


def check_torch_file(file: BinaryIO) -> None:
    """Raise CheckpointError for a torch file that would take more memory than it has bytes, or that names more than
    tensors and plain types.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        compressed = [
            record.filename for record in records if record.compress_type != zipfile.ZIP_STORED
        ]
        if compressed:
            raise CheckpointError(f"its record {compressed[0]} is compressed")
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
    for code, argument, _ in pickletools.genops(content):
        if code.name in OTHER_GLOBALS:
            raise CheckpointError(f"it has the instruction {code.name}, which no checkpoint has")
        if code.name == "GLOBAL" and GLOBALS.fullmatch(str(argument)) is None:
            raise CheckpointError(
                f"it names {str(argument)[:100]}, which is neither a tensor nor a plain type"
            )


def check_training_size(training: dict[str, Any]) -> None:
    """Raise CheckpointError for a state that would take much more memory, or time, than its file has bytes."""
    count = 0
    for depth, level in enumerate(levels(training), 1):
        count += len(level)
        if count > MOST_VALUES or depth > MOST_DEPTH:
            raise CheckpointError(
                f"its state has more than {MOST_VALUES:,} values, or is more than {MOST_DEPTH} deep"
            )
        for value in level:
            if isinstance(value, Tensor):
                check_strides(value)


def check_strides(tensor: Tensor) -> None:
    """Raise CheckpointError for a tensor with more numbers than are stored."""
    if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"a tensor of shape {short(list(tensor.shape))} is stored with fewer numbers"
        )
