"""Copies of batches to a CUDA device that run at the same time as the model."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from .batch import map_tensors, tensors_of

Item = TypeVar("Item")


class CopyStream:
    """Copies batches to a CUDA device on a separate stream, which does not wait for the model.

    A batch comes in a pair with further facts, which are passed on unchanged; so is an error in
    place of a batch.

    Args:
        device: the CUDA device.
        reused: whether the memory of a batch may be overwritten when the next one is read. Then
            each copy is complete before that, and a batch that is already on the device is copied
            too.
    """

    def __init__(self, device: torch.device, reused: bool = False):
        self.device = device
        self.reused = reused
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)

    def ahead(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, facts) on the device; the copy of the next batch has begun by then."""
        return self._finish(one_ahead(map(self._begin, reads)))

    def in_turn(self, reads: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, facts) on the device; each batch is read when it is asked for."""
        return self._finish(map(self._begin, reads))

    def _begin(self, read: tuple[Any, Any]) -> tuple[Any, Any, torch.cuda.Event | None]:
        """Begin to copy a batch; return it with its facts and the event at which it is complete."""
        batch, facts = read
        if isinstance(batch, Exception):
            return batch, facts, None
        with torch.cuda.stream(self.stream):
            copies = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
            done = self.stream.record_event()
        if self.reused:
            done.synchronize()  # waits for this copy only; from pinned memory it is asynchronous
            sources = tensors_of(batch)
            copies = map_tensors(
                lambda copy: copy.clone() if any(copy is each for each in sources) else copy, copies
            )
        return copies, facts, done

    def _finish(
        self, begun: Iterable[tuple[Any, Any, torch.cuda.Event | None]]
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (batch, facts); the current stream waits for the copy of the batch."""
        for batch, facts, done in begun:
            if done is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                for tensor in tensors_of(batch):
                    # Its memory belongs to the copy stream, which could use it again too early.
                    tensor.record_stream(current)
            yield batch, facts


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one is made.

    An error is raised after the items before it, as without this function.
    """
    previous: list[Item] = []
    failure: Exception | None = None
    try:
        for item in items:
            yield from previous
            previous = [item]
    except Exception as error:
        failure = error
    yield from previous
    if failure is not None:
        raise failure
