"""The order of the samples of an epoch, and the indices of its batches.

An order is a pure function of (seed, epoch). Above `MAX_IN_MEMORY` samples it is not kept in
memory: its parts are computed when they are read.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.runtime import seeds

from .batch_slice import WHOLE, BatchSlice

MAX_IN_MEMORY = 2**24
"""The largest number of samples whose order is a tensor of all indices (128 MiB)."""

BLOCK = 2**14
"""The number of indices that are computed at once when batches are read one after another."""

ROUNDS = 8
CPU = torch.device("cpu")


class Order(Protocol):
    """The indices of the samples of an epoch by their position; a 1-d tensor is an order."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: slice, /) -> Tensor:
        """Return the indices at some positions `first:last` as int64, on the CPU."""


def sequential(size: int) -> Order:
    """Return the order 0, 1, ... of `size` samples."""
    return torch.arange(size) if size <= MAX_IN_MEMORY else SequentialOrder(size)


def shuffled(seed: int, epoch: int, size: int) -> Order:
    """Return a permutation of `size` indices: a pure function of the arguments."""
    if size <= MAX_IN_MEMORY:
        return seeds.order(seed, epoch, size)
    return ShuffledOrder(size, seeds.derive(seed, "order", epoch))


def mapped(order: Order, function: Callable[[Tensor], Tensor]) -> Order:
    """Return the order of the results of an elementwise function of indices."""
    return function(order) if isinstance(order, Tensor) else MappedOrder(order, function)


class ComputedOrder:
    """An order whose indices are computed when they are read.

    Subclasses implement `at`.
    """

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, positions: slice, /) -> Tensor:
        """Return the indices at the positions `first:last`, as for a tensor."""
        first, last, step = positions.indices(self.size)
        return self.at(torch.arange(first, max(first, last), step))

    def at(self, positions: Tensor) -> Tensor:
        """Return the indices at positions, which are int64."""
        raise NotImplementedError


class SequentialOrder(ComputedOrder):
    """The order 0, 1, ... of `size` samples."""

    def at(self, positions: Tensor) -> Tensor:
        return positions


class ShuffledOrder(ComputedOrder):
    """A pseudorandom permutation that needs no memory: a Feistel network with cycle walking.

    A position x < side², with side = ceil(sqrt(size)), is a pair (left, right) with
    x = left * side + right. Each of the rounds is a bijection of such pairs: (left, right) becomes
    (right, (left + F(right)) mod side), with a function F of the round. A result that is not below
    `size` goes through the rounds again, until it is (cycle walking). This is the "generalized
    Feistel cipher" with a = b of J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002. Four rounds with random functions F are a pseudorandom permutation (M. Luby and
    C. Rackoff, SIAM J. Comput. 17, 1988); here F is a mixing function of 64 bits, hence twice as
    many. F is the finalizer of SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014). It is no cipher: the order is not secret.

    Args:
        size: number of samples, up to 2**62.
        key: the seed of the permutation.
    """

    def __init__(self, size: int, key: int):
        super().__init__(size)
        self.side = math.isqrt(max(size, 1) - 1) + 1
        self.keys = [seeds.derive(key, size, number) for number in range(ROUNDS)]

    def at(self, positions: Tensor) -> Tensor:
        import numpy  # its integers without sign wrap around by definition

        values: Any = self._permute(positions.numpy().astype(numpy.uint64))
        outside = numpy.flatnonzero(values >= self.size)
        while len(outside):
            walked = self._permute(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return torch.from_numpy(values.astype(numpy.int64))

    def _permute(self, values: Any) -> Any:
        """Return the image of values below side² in a bijection of them."""
        import numpy

        side = numpy.uint64(self.side)
        left, right = numpy.divmod(values, side)
        for key in self.keys:
            left, right = right, (left + mix(right ^ numpy.uint64(key)) % side) % side
        return left * side + right


def mix(values: Any) -> Any:
    """Return well-mixed 64-bit integers: a step of SplitMix64 from each value as the state."""
    import numpy

    values = values + numpy.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return values ^ (values >> numpy.uint64(31))


class MappedOrder:
    """The results of an elementwise function of the indices of another order."""

    def __init__(self, order: Order, function: Callable[[Tensor], Tensor]):
        self.order = order
        self.function = function

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, positions: slice, /) -> Tensor:
        return self.function(self.order[positions])


class BatchIndices:
    """The indices of the samples in each batch of an epoch. Nothing else cuts an order.

    Args:
        order: the order of the epoch.
        batch_size: samples per batch; the last one may be smaller.
        batches: number of batches, if the order has enough samples.
        device: the device of the indices. An order in memory is copied to it once.
        part: the rows of each batch that are read.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        batches: int,
        device: torch.device = CPU,
        part: BatchSlice = WHOLE,
    ):
        self.batch_size = batch_size
        self.size = min(len(order), batches * batch_size)
        self.order = order[: self.size].to(device) if isinstance(order, Tensor) else order
        self.device = device
        self.part = part

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.size // self.batch_size)

    def __getitem__(self, number: int) -> Tensor:
        """Return the indices of batch number `number`, counted from 0."""
        return self.joined(number, number + 1)

    def joined(self, start: int, stop: int) -> Tensor:
        """Return the indices of the batches from number `start` to `stop - 1` as one tensor."""
        first = start * self.batch_size
        last = min(stop * self.batch_size, self.size)
        return self.part.of_batches(self.order[first:last], self.batch_size).to(self.device)

    def read(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the indices of each batch from number `start` on; they are computed in blocks.

        A last batch without rows of the part is left out.
        """
        rows = self.part.rows(self.batch_size)
        per_block = max(BLOCK // self.batch_size, 1)
        for number in range(start, len(self), per_block):
            indices = self.joined(number, number + per_block)
            if len(indices):
                yield from torch.split(indices, rows)
