"""Copies of states in plain types and tensors, as checkpoints contain them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from framework.errors import CheckpointError

from .dtensors import is_dtensor

CopyTensor = Callable[[Tensor], Tensor]
PLAIN_TYPES = (str, int, float, bool, type(None), bytes)


def plain_copy(value: Any, copy_tensor: CopyTensor, path: str = "") -> Any:
    """Return a copy of a value in plain types, with copies of its tensors.

    Subclasses are refused: a numpy.float64 is a float, but it is pickled as code.

    Raises:
        CheckpointError: a value is of another type; the message has its path.
    """
    kind = type(value)
    if kind in PLAIN_TYPES:
        return value
    if kind in (Tensor, torch.nn.Parameter) or is_dtensor(value):
        return copy_tensor(value)
    if kind in (dict, OrderedDict):
        copied = {}
        for key, item in value.items():
            key_copy = plain_copy(key, copy_tensor, f"{path} (a key)")
            copied[key_copy] = plain_copy(item, copy_tensor, f"{path}.{key}".lstrip("."))
        return copied
    if kind in (list, tuple):
        items = []
        for index, item in enumerate(value):
            items.append(plain_copy(item, copy_tensor, f"{path}.{index}".lstrip(".")))
        return kind(items)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    raise CheckpointError(
        f"{path or 'the training state'} is a {name}, which a checkpoint cannot hold; state_dict "
        "must give dict, list, tuple, str, int, float, bool, None, bytes or tensors"
    )
