"""Whether a tensor was changed in place."""

from collections.abc import Hashable

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> Hashable:
    """Return a value that differs after an in-place change of the tensor.

    Gain: autograd's counter costs nothing. The fallback hashes the content, which copies it to the
    CPU. The counter does not exist for inference tensors; they count as never changed.
    """
    if tensor.is_inference():
        return 0
    version = getattr(tensor, "_version", None)
    return content_hash(tensor) if version is None else version


def content_hash(tensor: Tensor) -> int:
    """Return a hash of the numbers in a tensor."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return hash(numbers.view(torch.uint8).numpy().tobytes())
