"""Detection of in-place changes of a tensor."""

from collections.abc import Hashable

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> Hashable:
    """Return a value that is different after an in-place change of the tensor.

    Gain: reading autograd's counter takes no time. The fallback hashes the content, which it copies
    to the CPU. Inference tensors have no counter and count as never changed.
    """
    if tensor.is_inference():
        return 0
    version = getattr(tensor, "_version", None)
    return content_hash(tensor) if version is None else version


def content_hash(tensor: Tensor) -> int:
    """Return a hash of the content of a tensor."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return hash(numbers.view(torch.uint8).numpy().tobytes())
