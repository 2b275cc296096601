"""What of a run goes into a checkpoint, on the CPU and checked: tensors and plain types, nothing that is code."""

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

Weights = Mapping[str, Tensor]  # by name, buffers included
Facts = Mapping[str, Any] | None  # of the run, in plain JSON types
Take = Callable[[Tensor], Tensor]  # brings a tensor to the CPU
PLAIN = (str, int, float, bool, type(None), bytes)


class Snapshot(NamedTuple):
    """All that a checkpoint will hold: to write it, nothing else of the run is needed."""

    step: int
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    training: Any
    run: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return bytes_of(self.tensors) + bytes_of(self.training)


class Copies:
    """Copies tensors to the CPU, one round after the other into the same memory, which is quicker than new memory."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.used = 0

    def begin(self) -> "Copies":
        """Begin a round: what the round before gave will be overwritten."""
        self.used = 0
        return self

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor.detach().cpu().clone()
        kept = self.kept[self.used] if self.used < len(self.kept) else None
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.kept[self.used :] = [kept]  # what follows belongs to another order of tensors
        self.used += 1
        return kept.copy_(tensor.detach())


def snapshot(
    model: Weights, training: Any, step: int, run: Facts = None, *, copies: Copies | None = None
) -> Snapshot:
    """Check a state and bring it to the CPU; without `copies`, tensors that are there already are shared.

    Raises CheckpointError when a value is not plain (named by its path, "callbacks.early_stop.best").
    """
    take = own_memory if copies is None else copies.begin()
    facts = {
        "threads": torch.get_num_threads(),
        **(run or {}),
    }  # a thread that writes has a number of its own
    return Snapshot(step, *without_copies(model, take), plain_copy(training, take), facts)


def without_copies(state: Weights, take: Take) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each distinct tensor once, whole and on the CPU, and for every further name of it the first one."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_of: dict[Any, str] = {}
    memory: set[int] = set()
    for name, tensor in state.items():
        check_tensor(name, tensor)
        first = first_of.setdefault(memory_of(tensor), name) if tensor.numel() else name
        if first != name:
            tied[name] = first
            continue
        taken = take(tensor)
        if taken.untyped_storage().data_ptr() in memory:
            taken = taken.clone()  # safetensors refuses tensors that share memory
        memory.add(taken.untyped_storage().data_ptr())
        stored[name] = taken
    return stored, tied


def check_model(state: Weights) -> None:
    """Raise CheckpointError when a tensor of a model's state cannot be saved. Nothing is copied."""
    for name, tensor in state.items():
        if not is_lazy(tensor):
            check_tensor(name, tensor)


def check_training(state: Any) -> None:
    """Raise CheckpointError for a value that is not plain, naming its path. Nothing is copied."""
    plain_copy(state, lambda tensor: tensor)


def check_tensor(name: str, tensor: Any) -> None:
    """Raise CheckpointError for a part of a model's state that cannot be saved, with the reason."""
    why = None
    if not isinstance(tensor, Tensor):
        why = f"a {type(tensor).__qualname__}, not a tensor"
    elif tensor.is_nested:
        why = "a nested tensor"
    elif tensor.is_quantized:
        why = "a quantized tensor"
    elif tensor.layout is not torch.strided:
        why = f"a sparse tensor ({tensor.layout})"
    elif tensor.is_meta:
        why = "a tensor on the device meta, without values"
    elif not storable(tensor.dtype):
        why = f"a tensor of {tensor.dtype}"
    if why is not None:
        raise CheckpointError(
            f"{name} of the model's state is {why}, which checkpoints do not support; a buffer "
            "that need not be saved can be registered with persistent=False"
        )


@cache
def storable(dtype: torch.dtype) -> bool:
    """Whether a file of tensors can hold a dtype."""
    try:
        save({"empty": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


def memory_of(tensor: Tensor) -> Any:
    """Equal for two tensors only when they are the same numbers in the same memory."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    where = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    lazy = tensor.is_conj(), tensor.is_neg()  # these change the numbers, and not the memory
    return *where, *lazy, tensor.dtype, tensor.shape, tensor.stride()


def own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that fills its storage, so that no file holds more than it shows."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.layout is not torch.strided:
        return tensor
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def plain_copy(value: Any, take: Take, path: str = "") -> Any:
    """Return a value made of plain types only. Raises CheckpointError naming the path of anything else.

    Subclasses are refused too: a numpy.float64 is a float, but is pickled as code that makes one.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (Tensor, torch.nn.Parameter):
        return take(value)
    if kind in (dict, OrderedDict):
        items = ((key, f"{path}.{key}".lstrip("."), item) for key, item in value.items())
        return {
            plain_copy(key, take, f"{path} (a key)"): plain_copy(item, take, where)
            for key, where, item in items
        }
    if kind in (list, tuple):
        return kind(
            plain_copy(item, take, f"{path}.{index}".lstrip("."))
            for index, item in enumerate(value)
        )
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    raise CheckpointError(
        f"{path or 'the training state'} is a {name}, which no checkpoint may hold; state_dict must give "
        f"dict, list, tuple, str, int, float, bool, None, bytes or tensors"
    )


def bytes_of(value: Any) -> int:
    """The bytes of all tensors in a plain value."""
    if isinstance(value, Tensor):
        return value.nbytes if value.layout is torch.strided else 0
    items = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return sum(map(bytes_of, items))
