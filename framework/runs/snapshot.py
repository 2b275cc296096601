"""The contents of a checkpoint: tensors on the CPU and plain types, without code."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.nn.parameter import is_lazy

from framework.errors import CheckpointError
from framework.runtime.sharded import is_sharded

Weights = Mapping[str, Tensor]  # by name, buffers included
Facts = Mapping[str, Any] | None  # of the run, in plain JSON types
ToCPU = Callable[[Tensor], Tensor]
PLAIN_TYPES = (str, int, float, bool, type(None), bytes)


class Snapshot(NamedTuple):
    """All contents of a checkpoint; writing it needs nothing else of the run.

    Attributes:
        tensors: of the model, by name; of tied tensors the first one.
        tied: the other names of tied tensors, with the first name.
        training: the training state.
        run: facts of the run, for the manifest.
    """

    step: int
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    training: Any
    run: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return bytes_of(self.tensors) + bytes_of(self.training)


class CopyBuffers:
    """Copies tensors to the CPU into memory that is reused, which is faster than new memory."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.used = 0

    def begin(self) -> "CopyBuffers":
        """Begin new copies, which overwrite the earlier ones."""
        self.used = 0
        return self

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor.detach().cpu().clone()
        buffer = self.buffers[self.used] if self.used < len(self.buffers) else None
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            del self.buffers[self.used :]  # they belong to another order of tensors
            self.buffers.append(buffer)
        self.used += 1
        return buffer.copy_(tensor.detach())


def snapshot(
    model: Weights,
    training: Any,
    step: int,
    run: Facts = None,
    *,
    buffers: CopyBuffers | None = None,
) -> Snapshot:
    """Check a state and bring it to the CPU.

    Args:
        model: the state of the model.
        training: the rest of the state, in plain types and tensors.
        run: facts for the manifest.
        buffers: memory to copy into; None: tensors that are on the CPU already are shared.

    Raises:
        CheckpointError: a value is of another type; the message has its path, such as
            "callbacks.early_stop.best".
    """
    to_cpu = compact if buffers is None else buffers.begin()
    # Here and not when it is written: the thread that writes has a number of threads of its own.
    facts = {"threads": torch.get_num_threads(), **(run or {})}
    tensors, tied = distinct_tensors(model, to_cpu)
    return Snapshot(step, tensors, tied, plain_copy(training, to_cpu), facts)


def distinct_tensors(state: Weights, to_cpu: ToCPU) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each distinct tensor once, on the CPU, and the first name for each further name."""
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_names: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        check_tensor(name, tensor)
        first = first_names.setdefault(memory_key(tensor), name) if tensor.numel() else name
        if first != name:
            tied[name] = first
            continue
        copied = to_cpu(tensor)
        if copied.untyped_storage().data_ptr() in storages:
            copied = copied.clone()  # safetensors refuses tensors that share memory
        storages.add(copied.untyped_storage().data_ptr())
        distinct[name] = copied
    return distinct, tied


def check_model(state: Weights) -> None:
    """Raise CheckpointError if a tensor of a model's state cannot be saved. Nothing is copied."""
    for name, tensor in state.items():
        if not is_lazy(tensor):
            check_tensor(name, tensor)


def check_training(state: Any) -> None:
    """Raise CheckpointError for a value that is not plain, with its path. Nothing is copied."""
    plain_copy(state, lambda tensor: tensor)


def check_tensor(name: str, tensor: Any) -> None:
    """Raise CheckpointError if an entry of a model's state cannot be saved."""
    problem = None
    if not isinstance(tensor, Tensor):
        problem = f"a {type(tensor).__qualname__}, not a tensor"
    elif tensor.is_nested:
        problem = "a nested tensor"
    elif tensor.is_quantized:
        problem = "a quantized tensor"
    elif tensor.layout is not torch.strided:
        problem = f"a sparse tensor ({tensor.layout})"
    elif tensor.is_meta:
        problem = "a tensor on the device meta, without values"
    elif not storable(tensor.dtype):
        problem = f"a tensor of {tensor.dtype}"
    if problem is not None:
        raise CheckpointError(
            f"{name} of the model's state is {problem}, which checkpoints do not support; a buffer "
            "that need not be saved can be registered with persistent=False"
        )


@cache
def storable(dtype: torch.dtype) -> bool:
    """Return whether safetensors supports a dtype."""
    try:
        save({"empty": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


def memory_key(tensor: Tensor) -> Any:
    """Return a key that two tensors share only if they are the same values in the same memory.

    Args:
        tensor: a strided one.
    """
    storage = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    lazy = (tensor.is_conj(), tensor.is_neg())  # these change the values, and not the memory
    return (*storage, *lazy, tensor.dtype, tensor.shape, tensor.stride())


def compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that fills its storage, so that a file stores nothing else."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.layout is not torch.strided:
        return tensor
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def plain_copy(value: Any, to_cpu: ToCPU, path: str = "") -> Any:
    """Return a copy of a value in plain types, with its tensors on the CPU.

    Subclasses are refused: a numpy.float64 is a float, but it is pickled as code.

    Raises:
        CheckpointError: a value is of another type; the message has its path.
    """
    kind = type(value)
    if kind in PLAIN_TYPES:
        return value
    if kind in (Tensor, torch.nn.Parameter) or is_sharded(value):
        return to_cpu(value)
    if kind in (dict, OrderedDict):
        copied = {}
        for key, item in value.items():
            key_copy = plain_copy(key, to_cpu, f"{path} (a key)")
            copied[key_copy] = plain_copy(item, to_cpu, f"{path}.{key}".lstrip("."))
        return copied
    if kind in (list, tuple):
        items = []
        for index, item in enumerate(value):
            items.append(plain_copy(item, to_cpu, f"{path}.{index}".lstrip(".")))
        return kind(items)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    raise CheckpointError(
        f"{path or 'the training state'} is a {name}, which a checkpoint cannot hold; state_dict "
        "must give dict, list, tuple, str, int, float, bool, None, bytes or tensors"
    )


def bytes_of(value: Any) -> int:
    """Return the bytes of all tensors in a plain value."""
    if isinstance(value, Tensor):
        return value.nbytes if value.layout is torch.strided else 0
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return 0
