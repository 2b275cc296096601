"""Tensors that share the memory of another one."""

from typing import Any

from torch import Tensor


def without_view(value: Any) -> Any:
    """Return a copy of a tensor that autograd made as a view; any other value as it is.

    Gain: hooks on a tensor are lost if an operation changes it in place while it is a view.
    Without the private method no tensor counts as a view, and torch itself warns.
    """
    if not isinstance(value, Tensor):
        return value
    is_view = getattr(value, "_is_view", None)
    return value.clone() if is_view is not None and is_view() else value
