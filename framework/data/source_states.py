"""The state of a source of batches that can save it, such as torchdata's StatefulDataLoader."""

import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from framework.errors import CheckpointError, DataError
from framework.errors.user_code import describe
from framework.runtime import seeds
from framework.runtime.plain_state import plain_copy

END = object()


@runtime_checkable
class StatefulSource(Protocol):
    """A source with a state that says which batch is the next one.

    After `load_state_dict(state)`, the next `iter()` continues behind the last batch that was read
    before `state_dict()` returned the state.
    """

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def stateful_source(batches: Any) -> StatefulSource | None:
    """Return the object with the state of an iterable of batches; None if there is none.

    It is the iterable itself, or the stream of samples that a DataLoader without workers reads.
    """
    if isinstance(batches, StatefulSource):
        return batches
    if type(batches) is not DataLoader or batches.num_workers:
        return None
    is_stream = isinstance(batches.dataset, IterableDataset)
    return batches.dataset if is_stream and isinstance(batches.dataset, StatefulSource) else None


class SourceStates:
    """The states of a source after the last batches that a fit has read.

    A state is taken after each read, since some batches are read before the step that uses them:
    for the copy to a CUDA device, and to know the last step of an epoch without a length.

    Args:
        source: the object with the state.
    """

    def __init__(self, source: StatefulSource):
        self.source = source
        self.reset()

    def reset(self) -> None:
        """Forget all states, as at the start of a fit."""
        self.loaded: Any = None  # to be restored before the next batch is read
        self.states: dict[tuple[int, int], Any] = {}  # by epoch and number of batches read
        self.epoch = 0
        self.number = 0  # of batches read in the epoch
        self.most: int | None = None  # batches that the steps of the epoch use
        self.is_plain = True

    def load(self, state: Any) -> None:
        """Restore a state when the next batch is read; None: there is none."""
        self.loaded = state

    def at(self, epoch: int, number: int) -> Any:
        """Return the state after some batches of an epoch; None if it is not known.

        For no batches, that is the state at the end of the epoch before.
        """
        if self.loaded is not None or not self.is_plain:
            return self.loaded
        if (epoch, number) in self.states:
            return self.states[epoch, number]
        if number:
            return None
        last = self.number if self.most is None else min(self.number, self.most)
        return self.states.get((epoch - 1, last))

    def record(
        self,
        epoch: int,
        start: int,
        read: Callable[[int], Iterator[Any]],
        length: int | None,
        accumulate: int,
    ) -> Iterator[Any]:
        """Yield the batches of an epoch, and record the state after each of them.

        Args:
            epoch: the epoch.
            start: number of batches to skip.
            read: returns an iterator that begins with a batch of some number.
            length: number of batches of an epoch, or None. A stream may have more.
            accumulate: batches per step.
        """
        before = self.at(epoch, start)
        batches = self._begin(start, read)
        self.states = {} if before is None else {(epoch, start): before}
        self.epoch = epoch
        self.number = start
        self.most = None if length is None else -(-length // accumulate) * accumulate
        kept = 2 * accumulate + 2  # up to two steps are read before the first one is done
        for batch in batches:
            self.number += 1
            self._add(kept)
            yield batch

    def _begin(self, start: int, read: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
        state = self.loaded
        self.loaded = None
        if state is None:
            return read(start)
        try:
            self.source.load_state_dict(plain_copy(state, clone))
        except Exception as error:
            raise DataError(
                f"resume: the saved state does not fit {type(self.source).__name__}: "
                f"{describe(error)}"
            ) from error
        if start:
            with seeds.undisturbed():  # the resumed fit has restored the generators already
                return read(0)
        random = seeds.capture()
        batches = read(0)
        first = next(batches, END)
        if first is not END:
            return chain([first], batches)
        seeds.restore(random)  # that was the end of the epoch before
        return read(0)

    def _add(self, kept: int) -> None:
        """Record the present state; warn once if a checkpoint cannot contain it."""
        if not self.is_plain:
            return
        try:
            state = plain_copy(self.source.state_dict(), clone)
        except CheckpointError as error:
            self.is_plain = False
            self.states = {}
            warnings.warn(
                f"the state of {type(self.source).__name__} is not saved, and a resumed fit reads "
                f"the batches of an epoch again to skip them: {error}",
                stacklevel=2,
            )
            return
        self.states[self.epoch, self.number] = state
        while len(self.states) > kept:
            del self.states[next(iter(self.states))]


def clone(tensor: Tensor) -> Tensor:
    """Return a tensor with the same values in its own memory."""
    return tensor.detach().clone()
