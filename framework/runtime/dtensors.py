"""torch's DTensor: a tensor of which each process of a run has a part, as with strategy=fsdp.

Texts call it a sharded tensor. The virtual shards of `trainer.shards` are something else: see
`training/shards.py`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ORDINARY = (Tensor, nn.Parameter)
FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)
"""The optimizers whose fused kernels take sharded parameters."""


Path = tuple[Any, ...]  # the keys and indices that lead to a value in a state


class TensorPart(NamedTuple):
    """The part of a sharded tensor that this process has.

    Attributes:
        name: of the tensor, different from those of all others.
        local: the part.
        offsets: the position of its first element in the tensor.
        shape: of the whole tensor.
        of_model: whether the tensor is one of the model's state.
    """

    name: str
    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    of_model: bool

    @property
    def full_bytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(self.shape) * self.local.element_size()


def part_of(name: str, tensor: Any, copy: Callable[[Tensor], Tensor], of_model: bool) -> TensorPart:
    """Return the part that this process has of a sharded tensor.

    Args:
        copy: returns a copy of a tensor on the CPU.
    """
    (chunk,) = tensor.__create_chunk_list__()
    local = copy(tensor.detach().to_local())
    return TensorPart(name, local, tuple(chunk.offsets), tuple(tensor.shape), of_model)


def without_dtensors(value: Any, path: Path = ()) -> tuple[Any, dict[Path, Any]]:
    """Return a value with None in place of sharded tensors, and these tensors by their paths.

    One without elements becomes an ordinary tensor.

    Args:
        value: plain types and tensors; dicts, lists and tuples of them.
        path: that of the value.
    """
    if is_dtensor(value):
        if value.numel() == 0:
            return torch.empty(value.shape, dtype=value.dtype), {}
        return None, {path: value}
    if not isinstance(value, Mapping) and type(value) not in (list, tuple):
        return value, {}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found: dict[Path, Any] = {}
    rest = {}
    for key, item in items:
        rest[key], inner = without_dtensors(item, (*path, key))
        found.update(inner)
    return rest if isinstance(value, Mapping) else type(value)(rest.values()), found


def with_tensors(value: Any, tensors: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """Return a value with tensors at the paths that `without_dtensors` has returned."""
    if path in tensors:
        return tensors[path]
    if isinstance(value, Mapping):
        return {key: with_tensors(item, tensors, (*path, key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [with_tensors(item, tensors, (*path, key)) for key, item in enumerate(value)]
        return type(value)(items)
    return value


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a sharded tensor."""
    if type(value) in ORDINARY or not isinstance(value, Tensor):
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and rarely needed

    return isinstance(value, DTensor)


def has_dtensors(model: nn.Module) -> bool:
    """Return whether a parameter of a model is sharded."""
    return any(map(is_dtensor, model.parameters()))


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its parts; collective for a sharded one."""
    if not is_dtensor(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


@torch.no_grad()
def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor that this process has of `like`, without communication.

    Args:
        tensor: with equal values in all processes.
        like: of the same shape; the tensor itself is returned if `like` is not sharded.
    """
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    example: Any = like
    part = distribute_tensor(
        tensor.detach().to(like.device),
        example.device_mesh,
        example.placements,
        src_data_rank=None,
    )
    return part.clone()  # the part may be a view, which would keep the memory of the tensor


def full_values(value: Any, keep: bool) -> Any:
    """Return a value with full tensors on the CPU in place of sharded ones (collective).

    Args:
        value: plain types and tensors, with sharded tensors in the same order in all processes.
        keep: whether this process needs the result; if not, sharded tensors become None.
    """
    return FullValues(keep).of(value)


class FullValues:
    """Gathers sharded tensors one by one, so that the device needs memory for a single one."""

    def __init__(self, keep: bool):
        self.keep = keep
        self.tied: dict[tuple[int, torch.Size], Tensor] = {}

    def of(self, value: Any) -> Any:
        """Return a value with full tensors."""
        if is_dtensor(value):
            return self._gathered(value)
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.of(item) for item in value])
        return value

    def _gathered(self, tensor: Any) -> Tensor | None:
        """Return a full tensor; the same one for tensors that share their memory."""
        full = full_tensor(tensor)
        if not self.keep:
            return None
        key = (tensor.to_local().data_ptr(), tensor.shape)
        if key[0] == 0:  # this process has no part of it
            return full.cpu()
        return self.tied.setdefault(key, full.cpu())


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the full tensors of a state dict into a model, whose parameters may be sharded.

    Raises:
        RuntimeError: the state does not fit the model.
    """
    if not has_dtensors(model):
        model.load_state_dict(state)
        return
    own = model.state_dict()
    parts = {}
    for name, tensor in state.items():
        fits = name in own and own[name].shape == tensor.shape
        parts[name] = distribute_like(tensor, own[name]) if fits else tensor
    model.load_state_dict(parts)
