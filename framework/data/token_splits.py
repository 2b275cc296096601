"""Splits in memory whose samples are parts of one tensor of tokens: texts, or windows of a text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from framework.errors import DataError
from framework.runtime import seeds
from framework.runtime.batch import Batch, map_tensors

from .sample_order import Order, mapped, sequential, shuffled


class GatheredSplit:
    """A split that makes its batches, and may choose the order of its samples.

    Subclasses implement `__len__` (samples of an epoch) and `gather` (a batch). A batch should be
    made from memory, or from a file that is mapped into memory: data workers do not read it.
    """

    device = torch.device("cpu")
    reuses_memory = True
    """Whether `gather` may write a batch into the memory of the previous one; False is faster."""
    bytes_per_sample: int | None = None
    """The size of a sample if samples are independent of the others in their batch: then `gather`
    may be called for several batches at once. None: for one batch after the other."""
    place = "in memory"
    """Where the samples are, for the description of the loader."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        """Return one sample, without a batch axis."""
        batch = self.gather(torch.tensor([int(index)]))
        return map_tensors(lambda tensor: tensor[0], batch)

    def gather(self, indices: Tensor) -> Batch:
        """Return the samples at indices (a tensor on the CPU) as one batch on the device."""
        raise NotImplementedError

    def gather_part(self, indices: Tensor, batch: Tensor) -> Batch:
        """Return some samples of a batch, padded like the whole batch.

        Args:
            indices: of the samples.
            batch: the indices of the whole batch.
        """
        return self.gather(indices)

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Order:
        """Return the indices of an epoch, a pure function of the arguments: e.g. a tensor."""
        return shuffled(seed, epoch, len(self)) if shuffle else sequential(len(self))

    def indices_of(self, numbers: Tensor) -> Tensor:
        """Return the indices, as `gather` takes them, of samples by their numbers from 0.

        The numbers count the samples in the order of a measurement.
        """
        order = self.order(0, 0, 1, shuffle=False)
        return torch.cat([order[number : number + 1] for number in numbers.tolist()])

    def to(self, device: torch.device) -> "GatheredSplit":
        """Make further batches on a device, and return this split."""
        self.device = device
        return self


class RaggedSplit(GatheredSplit):
    """Token sequences of unequal length; a batch is padded with 0 to its longest sequence.

    Shuffling puts sequences of similar length into a batch (bucketing): the permutation of the
    epoch is cut into pools of `bucket` batches, each pool is sorted by length and cut into batches,
    and then all full batches are shuffled. The sequences that share a batch still change from epoch
    to epoch.

    Args:
        sequences: 1-d tensors of token ids; 0 is padding.
        others: further parts of the samples, such as targets.
        bucket: batches per pool; 0 keeps the permutation.
        facts: stored in `facts`, for the code that shows samples (such as the tokenizer).

    Raises:
        DataError: a sequence is empty, or the numbers of samples differ.
    """

    reuses_memory = False

    def __init__(
        self, sequences: Sequence[Tensor], *others: Tensor, bucket: int = 16, **facts: Any
    ):
        lengths = [len(tokens) for tokens in sequences]
        if 0 in lengths:
            raise DataError(
                f"sequence {lengths.index(0)} is empty; a model that averages over tokens needs at "
                "least one"
            )
        counts = [len(other) for other in others]
        if any(count != len(sequences) for count in counts):
            raise DataError(
                f"expected {len(sequences)} entries, one for each sequence, in all other parts of "
                f"a split, got {counts}"
            )
        padding = torch.zeros(1, dtype=torch.int32)
        self.tokens = torch.cat([*sequences, padding]).int()
        self.lengths = torch.tensor(lengths)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.others = others
        self.bucket = bucket
        self.facts = facts

    def __len__(self) -> int:
        return len(self.lengths)

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        return [self.tokens, self.lengths, self.others, self.bucket]

    def gather(self, indices: Tensor) -> Batch:
        return self.gather_part(indices, indices)

    def gather_part(self, indices: Tensor, batch: Tensor) -> Batch:
        lengths = self.lengths[indices, None]
        columns = torch.arange(int(self.lengths[batch].max()))
        padding = len(self.tokens) - 1
        places = torch.where(columns < lengths, self.starts[indices, None] + columns, padding)
        parts = [self.tokens[places].long()]
        parts += [other[indices] for other in self.others]
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in parts)

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Tensor:
        permutation = super().order(seed, epoch, batch_size, shuffle)[:]  # as large as `lengths`
        full = len(permutation) - len(permutation) % batch_size
        if not shuffle or self.bucket < 2 or full == 0:
            return permutation
        pools = torch.split(permutation[:full], self.bucket * batch_size)
        by_length = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = torch.cat(by_length).view(-1, batch_size)
        generator = seeds.generator(seed, "batches", epoch)
        shuffled = batches[torch.randperm(len(batches), generator=generator)]
        return torch.cat([shuffled.flatten(), permutation[full:]])  # the smaller batch is the last


class WindowSplit(GatheredSplit):
    """Windows of one long text: inputs (length,), and as targets the next token at each position.

    The index of a sample is the position in the text where it begins. For training, an epoch is the
    text cut into adjacent windows, from a random start in each epoch. For measuring, windows
    overlap by `context` tokens, whose targets are -1 in the later window: each token but the first
    counts once, and is predicted from at least `context` tokens (fewer at the beginning).

    Args:
        tokens: the text, shape (tokens,).
        length: tokens of a window.
        context: tokens that a window shares with the previous one; None for training.
        facts: stored in `facts`, for the code that shows samples (such as the tokenizer).

    Raises:
        DataError: the text is too short, or `context` is too large.
    """

    reuses_memory = False

    def __init__(self, tokens: Tensor, length: int, context: int | None = None, **facts: Any):
        if len(tokens) < 2 * length:
            raise DataError(
                f"{len(tokens)} tokens are too few for windows of {length}: {2 * length} are needed"
            )
        if not 0 <= (context or 0) < length:
            raise DataError(
                f"windows of {length} tokens can overlap by 0 to {length - 1} tokens, not {context}"
            )
        self.tokens = tokens
        self.length = length
        self.context = context
        self.facts = facts

    @property
    def stride(self) -> int:
        """The distance between the starts of two windows."""
        return self.length - (self.context or 0)

    def __len__(self) -> int:
        """Return the number of windows of an epoch."""
        if self.context is None:  # this number fits in with any start
            return (len(self.tokens) - 1) // self.length - 1
        return 1 + -(-(len(self.tokens) - 1 - self.length) // self.stride)

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Order:
        windows = super().order(seed, epoch, batch_size, shuffle)
        if not shuffle:
            last = len(self.tokens) - 1 - self.length  # the last window ends with the text
            return mapped(windows, lambda window: (window * self.stride).clamp(max=last))
        start = torch.randint(self.length, (), generator=seeds.generator(seed, "windows", epoch))
        return mapped(windows, lambda window: window * self.stride + start)

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        return [self.tokens, self.length, self.context]

    def gather(self, indices: Tensor) -> Batch:
        places = indices[:, None] + torch.arange(self.length + 1)
        window = self.tokens[places].long()
        inputs = window[:, :-1]
        targets = window[:, 1:]
        if self.context is not None:
            previous = (indices - 1).div(self.stride, rounding_mode="floor") * self.stride
            overlap = torch.where(indices > 0, previous + self.length - indices, 0)
            targets = targets.masked_fill(torch.arange(self.length) < overlap[:, None], -1)
        # Clones, since the inputs and targets of a single window would share its memory.
        inputs = inputs.clone(memory_format=torch.contiguous_format)
        targets = targets.clone(memory_format=torch.contiguous_format)
        return (
            inputs.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )
