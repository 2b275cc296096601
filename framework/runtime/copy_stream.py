"""Copies of batches to a CUDA device."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class CopyStream:
    """Copies batches to a CUDA device on a stream of its own, which does not wait for the model.

    Args:
        device: the CUDA device.
        reused: whether the memory of a batch may be written when the next one is read. Then each
            copy is complete before that, and a batch that is on the device already is copied too.
    """

    def __init__(self, device: torch.device, reused: bool = False):
        self.device, self.stream, self.reused = device, torch.cuda.Stream(device), reused

    def ahead(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, something) on the device, having begun to copy the one after it; no batch passes as it is."""
        return self._ready(one_ahead(map(self._begin, reads)))

    def in_turn(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, something) on the device; the next one is read when it is asked for."""
        return self._ready(map(self._begin, reads))

    def _ready(self, begun: Iterable[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield the copies that `_begin` has begun, ready for the current stream."""
        for batch, beside, done in begun:
            if done is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                for tensor in batch:
                    tensor.record_stream(
                        current
                    )  # its memory is of the other stream, which might use it again
            yield batch, beside

    def _begin(self, read: tuple[Any, Any]) -> tuple[Any, Any, torch.cuda.Event | None]:
        batch, beside = read
        if not isinstance(batch, tuple | list):
            return batch, beside, None
        with torch.cuda.stream(self.stream):
            copied = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
            done = self.stream.record_event()
        if self.reused:
            done.synchronize()  # waits for this copy alone; out of pinned memory it is asynchronous
            pairs = zip(copied, batch, strict=True)
            copied = tuple(new.clone() if new is old else new for new, old in pairs)
        return copied, beside, done


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one is made. An error comes where it would have: after the items before it."""
    held: list[Item] = []
    failed: Exception | None = None
    try:
        for item in items:
            yield from held
            held = [item]
    except Exception as error:
        failed = error
    yield from held
    if failed is not None:
        raise failed
