"""Write a checkpoint of a sharded state: each process writes its parts of the tensors.

The main process writes everything else. It also joins the model's parts, one tensor at a time, to
the model file that every checkpoint has; their own files are temporary.
"""

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from framework.contracts.strategy import StateSaver
from framework.errors import CheckpointDiskFull, CheckpointError
from framework.runs.snapshot import CopyBuffers, Facts, Snapshot, Weights, snapshot, storable
from framework.runtime.dtensors import TensorPart, part_of, without_dtensors
from framework.system.files import open_file

from .layout import MODEL, SCHEMA_WITH_PARTS, TRAINING, folder_name, parts_name
from .parts import SHARDED, PartFiles, described, stored_name
from .save_errors import failure_cause, save_error
from .writing import (
    UNWRITABLE,
    hidden_folder,
    holds_nan,
    make_hidden,
    measured,
    publish,
    write_manifest,
    write_training,
)

Result = TypeVar("Result")
Files = dict[str, list[str]]  # names of files, with those of the tensors in each
MODEL_PREFIX = "model."  # of the names of the model's tensors in the files of parts


class Written(NamedTuple):
    """The files of a process: those of the model, and bytes and sha256 of those to keep."""

    of_model: list[str]
    kept: dict[str, dict[str, Any]]


class ModelTensor(NamedTuple):
    """A tensor of the model's file, and a function that returns it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class ShardedSnapshot(NamedTuple):
    """What this process writes of a checkpoint, on the CPU.

    Attributes:
        rank: of this process.
        parts: of sharded tensors.
        rest: everything else, in the main process only.
    """

    step: int
    rank: int
    parts: list[TensorPart]
    rest: Snapshot | None

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rest is not None

    @property
    def nbytes(self) -> int:
        """The bytes that all processes write; the parts of the model are written twice."""
        total = 0 if self.rest is None else self.rest.nbytes
        for part in self.parts:
            total += (2 if part.of_model else 1) * part.full_bytes
        return total


def sharded_snapshot(
    model: Weights,
    training: dict[str, Any],
    step: int,
    run: Facts = None,
    *,
    rank: int,
    buffers: CopyBuffers,
) -> ShardedSnapshot:
    """Copy the parts of sharded tensors to the CPU, and in the main process everything else.

    Args:
        model, training, step, run: as for `snapshot`.
        rank: of this process; 0 is the main one.
        buffers: memory to copy into.

    Raises:
        CheckpointError: as `snapshot` does.
    """
    whole, sharded, tied = separated_model(model)
    training, tensors = without_dtensors(training)
    buffers.begin()
    parts = []
    for name, tensor in sharded.items():
        parts.append(copied_part(MODEL_PREFIX + name, tensor, buffers, True))
    for index, (path, tensor) in enumerate(tensors.items()):
        parts.append(copied_part(stored_name(index, path), tensor, buffers, False))
    rest = None
    if rank == 0:
        state = training | {SHARDED: described(tensors)}
        rest = snapshot(whole, state, step, run, buffers=CopyBuffers())
        rest = rest._replace(tied=rest.tied | tied)
    return ShardedSnapshot(step, rank, parts, rest)


def separated_model(
    model: Weights,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return the ordinary tensors of a model's state, its sharded ones, and the names of tied ones.

    Of tied tensors the first one is returned; its name is given for each further name.
    """
    rest, tensors = without_dtensors(model)
    whole = {name: tensor for name, tensor in rest.items() if tensor is not None}
    sharded: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first_names: dict[Any, str] = {}
    for (name,), tensor in tensors.items():
        key = (tensor.to_local().data_ptr(), tensor.dtype, tensor.shape)
        first = first_names.setdefault(key, name) if key[0] else name  # 0: no part of it here
        if first != name:
            tied[name] = first
            continue
        sharded[name] = tensor
    return whole, sharded, tied


def copied_part(name: str, tensor: Any, buffers: CopyBuffers, of_model: bool) -> TensorPart:
    """Return a copy of the part of a sharded tensor.

    Raises:
        CheckpointError: safetensors does not support its dtype.
    """
    if not storable(tensor.dtype):
        raise CheckpointError(
            f"{name} is a sharded tensor of {tensor.dtype}, which checkpoints do not support"
        )
    return part_of(name, tensor, buffers, of_model)


def commit_sharded(
    folder: Path, state: ShardedSnapshot, saver: StateSaver, then: Callable[[Path], None]
) -> None:
    """Write a checkpoint from all processes (collective).

    Args:
        folder: of the checkpoints; the same for all processes.
        state: of this process.
        saver: of the strategy.
        then: is called in the main process with the written checkpoint.

    Raises:
        CheckpointError: a process cannot write, or `then` raises it; in all processes.
    """
    ShardedCommit(folder, state, saver).run(then)


class ShardedCommit:
    """Writes one checkpoint. The arguments are those of `commit_sharded`."""

    def __init__(self, folder: Path, state: ShardedSnapshot, saver: StateSaver):
        self.folder = folder
        self.state = state
        self.saver = saver
        self.hidden: Path | None = None  # the folder before its rename

    def run(self, then: Callable[[Path], None]) -> None:
        """Write the checkpoint; call `then` with it in the main process (collective)."""
        try:
            name = self._together(self._make_folder)[0]
            self.hidden = self.folder / name
            written = self._together(partial(self._named_and_measured, self._write_parts()))
            self._together(partial(self._finish, written, then))
        finally:
            if self.state.is_main and self.hidden is not None:
                shutil.rmtree(self.hidden, ignore_errors=True)  # after a success it is renamed

    def _together(self, function: Callable[[], Result]) -> list[Result]:
        """Return the results of all processes, or raise the first error in all (collective)."""
        result = None
        failure = None
        error = None
        try:
            result = function()
        except Exception as caught:
            error = caught
            failure = self._failure(caught)
        answers = self.saver.gather((result, failure))
        for _, failed in answers:
            if failed is not None:
                raise self._error(failed) from error
        return [each for each, _ in answers]

    def _failure(self, error: Exception) -> tuple[bool, str]:
        """Return whether the disk is full, and the message of an error."""
        if isinstance(error, CheckpointError):
            return isinstance(error, CheckpointDiskFull), str(error)
        step = self.state.step
        cause = failure_cause(error, self.folder, self.state.nbytes)
        text = f"step {step} cannot be saved in {self.folder}: {cause}"
        return save_error(error) is CheckpointDiskFull, text

    def _error(self, failure: tuple[bool, str]) -> CheckpointError:
        is_full, text = failure
        return CheckpointDiskFull(text) if is_full else CheckpointError(text)

    def _make_folder(self) -> str:
        """Make the hidden folder in the main process, and return its name."""
        if not self.state.is_main:
            return ""
        self.hidden = hidden_folder(self.folder, self.state.step)
        make_hidden(self.hidden, self.state.nbytes)
        return self.hidden.name

    def _write_parts(self) -> Files:
        """Write the parts of all processes, and return the files of this one (collective)."""
        assert self.hidden is not None
        try:
            return self.saver.write(self.hidden, self.state.parts)
        except UNWRITABLE as error:  # the same error in all processes
            raise self._error(self._failure(error)) from error

    def _named_and_measured(self, files: Files) -> Written:
        """Rename the files of this process that the checkpoint keeps, and measure them."""
        assert self.hidden is not None
        of_model: list[str] = []
        kept: dict[str, dict[str, Any]] = {}
        for file, names in files.items():
            if names[0].startswith(MODEL_PREFIX):
                of_model.append(file)
                continue
            name = parts_name(self.state.rank, len(kept))
            os.rename(self.hidden / file, self.hidden / name)
            kept[name] = measured(self.hidden / name)
        return Written(of_model, kept)

    def _finish(self, written: Sequence[Written], then: Callable[[Path], None]) -> None:
        """Write the other files in the main process, and rename the folder.

        Args:
            written: the files of each process.
            then: is called with the checkpoint.
        """
        rest = self.state.rest
        if rest is None:
            return
        assert self.hidden is not None
        hidden = self.hidden
        of_model = [hidden / name for each in written for name in each.of_model]
        with PartFiles(of_model) as files:
            nan = write_joined_model(hidden / MODEL, self.state, rest, files)
        for path in of_model:
            path.unlink()
        write_training(hidden / TRAINING, rest.training)
        entries = {name: measured(hidden / name) for name in (MODEL, TRAINING)}
        for each in written:
            entries |= each.kept
        write_manifest(hidden, rest, entries, nan, SCHEMA_WITH_PARTS)
        then(publish(hidden, self.folder / folder_name(self.state.step)))


def write_joined_model(
    path: Path, state: ShardedSnapshot, rest: Snapshot, files: PartFiles
) -> list[str]:
    """Write all tensors of the model; only one sharded tensor at a time is in memory.

    Args:
        path: of the file.
        state: has the names and shapes of the sharded tensors.
        rest: has the other tensors.
        files: have the parts.

    Returns:
        The names of the tensors with NaN.
    """
    sources: dict[str, ModelTensor] = {}
    for name, tensor in rest.tensors.items():
        sources[name] = ModelTensor(tensor.dtype, tuple(tensor.shape), tensor.detach)
    for part in state.parts:
        if part.of_model:
            name = part.name.removeprefix(MODEL_PREFIX)
            read = partial(files.tensor, part.name, part.shape)
            sources[name] = ModelTensor(part.local.dtype, part.shape, read)
    # Large elements first, as safetensors does: each tensor begins at a multiple of its own.
    names = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"tied": json.dumps(rest.tied)}}
    end = 0
    for name in names:
        source = sources[name]
        begin = end
        end += math.prod(source.shape) * source.dtype.itemsize
        code = dtype_code(source.dtype)
        header[name] = {"dtype": code, "shape": source.shape, "data_offsets": [begin, end]}
    nan = []
    with open_file(path.parent, path.name, "x") as raw, io.BufferedWriter(raw) as file:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = sources[name].read()
            if holds_nan(tensor):
                nan.append(name)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return nan


@cache
def dtype_code(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors files."""
    content = save({"empty": torch.empty(0, dtype=dtype)})
    length = int.from_bytes(content[:8], "little")
    code: str = json.loads(content[8 : 8 + length])["empty"]["dtype"]
    return code
