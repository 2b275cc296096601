"""A check on the device whether all numbers of some tensors are finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from framework.runtime.dtensors import full_tensor, is_dtensor
from framework.runtime.gradients import numbers_of


class NonFiniteFlag:
    """A flag on a device that becomes 1 if a tensor has a number that is not finite.

    Gain: torch's kernel for gradient scalers reads all tensors in one call. For six small gradients
    on a CPU it takes a twentieth of the time of `isfinite().all()` for each, or of a norm. The
    callback `non_finite` calls it in each step of the default experiment.

    Attributes:
        value: shape (): 0.0, or 1.0 after a number that is not finite.
    """

    def __init__(self, device: torch.device):
        self.value = torch.zeros((), device=device)
        self._scale = torch.ones((), device=device)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Set the flag to 1 if a number is not finite, without waiting for the device."""
        kernel = getattr(torch, "_amp_foreach_non_finite_check_and_unscale_", None)
        if kernel is None:
            check_each(tensors, self.value)
            return
        sharded = [tensor for tensor in tensors if is_dtensor(tensor)]
        if sharded:  # the kernel takes tensors of one kind; it exchanges their result
            kernel(sharded, self.value, self._scale)
            tensors = [tensor for tensor in tensors if not is_dtensor(tensor)]
        try:
            kernel(tensors, self.value, self._scale)
        except NotImplementedError:  # sparse and complex tensors
            kernel([numbers_of(tensor) for tensor in tensors], self.value, self._scale)


@torch.no_grad()
def check_each(tensors: Sequence[Tensor], flag: Tensor) -> None:
    """Set the flag to 1 if a number is not finite, tensor by tensor."""
    for tensor in tensors:
        finite = full_tensor(numbers_of(tensor).isfinite().all())
        flag.copy_(torch.where(finite.to(flag.device), flag, 1.0))
