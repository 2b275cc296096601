"""Buffers that forward passes change, other than those of batch normalization."""

from collections.abc import Hashable

import torch
from torch import nn

from framework import version_of
from framework.contracts.strategy import BatchStatistics

from .batch_norm import BATCH_NORMS
from .collectives import broadcast, summed


class ChangingBuffers:
    """Finds the buffers of a model that change in a step, and makes them equal.

    Each process has changed them with its own rows. The values of the main process are used, as in
    torch's DistributedDataParallel.

    Args:
        model: the model in training; its batch norms are synchronized already.
    """

    def __init__(self, model: nn.Module):
        self.owners: list[tuple[nn.Module, str]] = []
        for module in model.modules():
            if isinstance(module, (*BATCH_NORMS, BatchStatistics)):
                continue
            for name, _ in module.named_buffers(recurse=False):
                self.owners.append((module, name))
        self.versions = self._versions()

    def _versions(self) -> list[Hashable]:
        versions: list[Hashable] = []
        for module, name in self.owners:
            buffer = module.get_buffer(name)
            versions.append((buffer.data_ptr(), version_of(buffer)))
        return versions

    def share(self) -> None:
        """Give all processes the changed buffers of the main one (collective)."""
        if not self.owners:
            return
        versions = self._versions()
        changes = [now != before for now, before in zip(versions, self.versions, strict=True)]
        counts = summed(torch.tensor(changes, dtype=torch.int32)).tolist()
        for (module, name), count in zip(self.owners, counts, strict=True):
            if count > 0:
                broadcast(module.get_buffer(name))
        self.versions = self._versions()
