"""Buffers that forward passes change, other than those of synchronized batch normalization."""

from collections.abc import Collection, Hashable

import torch
from torch import Tensor, nn

from framework import version_of

from .collectives import broadcast, summed


class ChangingBuffers:
    """Finds the buffers of a model that change in a step, and makes them equal.

    Each process has changed them with its own rows. The values of the main process are used, as in
    torch's DistributedDataParallel.

    Args:
        model: the model in training.
        but: the modules whose buffers are equal in all processes already.
    """

    def __init__(self, model: nn.Module, but: Collection[nn.Module]):
        self.modules: list[nn.Module] = []
        for module in model.modules():
            if module not in but and list(module.buffers(recurse=False)):
                self.modules.append(module)
        self.versions = self._versions()

    def _versions(self) -> list[Hashable]:
        return [versions_of(module) for module in self.modules]

    def share(self) -> None:
        """Give all processes the changed buffers of the main one (collective)."""
        if not self.modules:
            return
        versions = self._versions()
        changes = [now != before for now, before in zip(versions, self.versions, strict=True)]
        counts = summed(torch.tensor(changes, dtype=torch.int32)).tolist()
        changed: list[Tensor] = []
        for module, count in zip(self.modules, counts, strict=True):
            if count > 0:
                changed += module.buffers(recurse=False)
        broadcast(changed)
        self.versions = self._versions()


def versions_of(module: nn.Module) -> Hashable:
    """Return what changes if a forward pass changes buffers of a module itself.

    It is for all of them, since a batch norm of torch changes its statistics without new versions,
    and only counts its batches with one.
    """
    buffers = module.buffers(recurse=False)
    return tuple((buffer.data_ptr(), version_of(buffer)) for buffer in buffers)
