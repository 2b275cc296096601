"""Writes the parts of sharded tensors from all processes, with torch.distributed.checkpoint (DCP).

The files are safetensors. Each has the offsets of its parts in its metadata, as those of torch's
`HuggingFaceStorageWriter`. DCP's own format is a pickle, which a checkpoint must not need.

Import it only where it is used: DCP takes 0.5 s to import.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from .dtensors import TensorPart
from .processes import lost_processes

MOST_FILE_BYTES = 64 * 2**20  # DCP copies the content of a file before it writes it


class DistributedSaver:
    """Saves the parts of sharded tensors; its methods are collective, on a group of its own.

    So a background thread of each process may call them while the processes train. The methods are
    those of `framework.contracts.strategy.StateSaver`.

    Args:
        timeout_seconds: longest time to wait for the other processes.
    """

    def __init__(self, timeout_seconds: float):
        timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = distributed.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Return a value of each process, in the order of their ranks (collective)."""
        values: list[Any] = [None] * distributed.get_world_size(self.group)
        with lost_processes():
            distributed.all_gather_object(values, value, group=self.group)
        return values

    def write(self, folder: Path, parts: Sequence[TensorPart]) -> dict[str, list[str]]:
        """Write the parts of all processes (collective).

        Args:
            folder: an existing one, the same for all processes.
            parts: those of this process, of the same tensors in all processes.

        Returns:
            The files that this process has written, with the names of their tensors. A file has
            either tensors of the model or others.

        Raises:
            Exception: that of the first process that cannot write, in all processes.
        """
        writer = FileWriter(folder, file_numbers(parts))
        failure: BaseException | None = None
        with lost_processes():
            try:
                save(
                    {},
                    storage_writer=writer,
                    planner=PartPlanner(parts),
                    process_group=self.group,
                )
            except CheckpointException as error:
                failures = error.failures
                failure = failures[min(failures)][0]
        if failure is not None:
            raise failure
        return writer.files


class FileWriter(HuggingFaceStorageWriter):
    """Writes each process's parts into files of its own.

    Attributes:
        files: those that this process has written, with the names of their tensors.
    """

    def __init__(self, folder: Path, numbers: Mapping[str, int]):
        """Numbers: that of the file of each tensor, from 1."""
        super().__init__(str(folder), dict(numbers), save_distributed=True)
        self.per_thread_copy_ahead = 0  # the parts are on the CPU already
        self.files: dict[str, list[str]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        written: Future[Any] = super().write_data(plan, planner)
        for result in written.value():
            names = self.files.setdefault(result.storage_data.relative_path, [])
            names.append(result.index.fqn)
        return written


class PartPlanner(DefaultSavePlanner):
    """Plans to write parts; of equal parts, as of replicas, one process writes one."""

    def __init__(self, parts: Sequence[TensorPart]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = {part.name: part for part in parts}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([write_item(part) for part in self.parts.values() if has_data(part)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.parts[write_item.index.fqn].local


def has_data(part: TensorPart) -> bool:
    """Return whether the part of this process has any elements."""
    return part.local.numel() > 0


def write_item(part: TensorPart) -> WriteItem:
    """Return a part as DCP describes it."""
    offsets = torch.Size(part.offsets)
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=part.local.shape)
    properties = TensorProperties.create_from_tensor(part.local)
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(part.shape))
    return WriteItem(
        index=MetadataIndex(part.name, offsets), type=WriteItemType.SHARD, tensor_data=data
    )


def file_numbers(parts: Sequence[TensorPart]) -> dict[str, int]:
    """Return the number of the file of each tensor; those of the model have files of their own."""
    numbers: dict[str, int] = {}
    number = 0
    for of_model in (True, False):
        number += 1
        size = 0
        for part in parts:
            if part.of_model != of_model:
                continue
            if size and size + part.local.nbytes > MOST_FILE_BYTES:
                number += 1
                size = 0
            numbers[part.name] = number
            size += part.local.nbytes
    return numbers
