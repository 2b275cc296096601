"""Splits in memory whose samples are cut out of one long row of tokens: texts of unequal length, windows of a text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from framework.errors import DataError
from framework.runtime import seeds
from framework.runtime.batch import Batch


class GatheredSplit:
    """A split in memory that makes whole batches itself, and may say in which order its samples are read.

    Subclasses have `__len__` (samples of an epoch), `__getitem__` (one sample) and `gather` (a batch).
    """

    device = torch.device("cpu")
    reuses_memory = True
    """Whether `gather` may write a batch into the memory of the one before it; False is faster."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        """Return one sample, without a batch axis."""
        return tuple(tensor[0] for tensor in self.gather(torch.tensor([int(index)])))

    def gather(self, indices: Tensor) -> Batch:
        """Return the samples of the indices (on the CPU) as one batch, on the device."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Tensor:
        """Return the samples of an epoch in their order: a pure function of the arguments."""
        return seeds.order(seed, epoch, len(self)) if shuffle else torch.arange(len(self))

    def to(self, device: torch.device) -> "GatheredSplit":
        """Make batches on a device from now on, and return this split."""
        self.device = device
        return self


class RaggedSplit(GatheredSplit):
    """Token sequences of unequal length; a batch is padded with 0 to its longest one.

    Shuffled, texts of about one length come together ("bucketing"): the epoch's permutation is cut into pools of
    `bucket` batches, each pool is sorted by length and cut into batches, and then all full batches are shuffled.
    Which texts share a batch still changes from epoch to epoch.
    """

    reuses_memory = False

    def __init__(self, sequences: Sequence[Tensor], *others: Tensor, bucket: int = 16):
        """Store the sequences (1-d tensors of ids, 0 being padding) end to end, and what goes with each of them.

        bucket: batches of a pool; 0 leaves the permutation as it is.
        """
        empty = next((row for row, tokens in enumerate(sequences) if not len(tokens)), None)
        if empty is not None:
            raise DataError(
                f"sequence {empty} is empty; a model that averages over tokens needs at least one"
            )
        if any(len(other) != len(sequences) for other in others):
            raise DataError(
                f"{len(sequences)} sequences do not go with {[len(other) for other in others]} of the rest"
            )
        self.tokens = torch.cat(
            [*sequences, torch.zeros(1, dtype=torch.int32)]
        ).int()  # what lies past the last one
        self.lengths = torch.tensor([len(tokens) for tokens in sequences])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.others, self.bucket = others, bucket

    def __len__(self) -> int:
        return len(self.lengths)

    def content(self) -> Any:
        """Return what the samples are made of, see `content.py`."""
        return [self.tokens, self.lengths, self.others, self.bucket]

    def gather(self, indices: Tensor) -> Batch:
        lengths = self.lengths[indices, None]
        columns = torch.arange(int(lengths.max()))
        inside = columns < lengths
        places = torch.where(inside, self.starts[indices, None] + columns, len(self.tokens) - 1)
        batch = (self.tokens[places].long(), *(other[indices] for other in self.others))
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Tensor:
        plain = super().order(seed, epoch, batch_size, shuffle)
        full = len(plain) - len(plain) % batch_size
        if not shuffle or self.bucket < 2 or full == 0:
            return plain
        pools = plain[:full].split(self.bucket * batch_size)
        batches = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools]).view(
            -1, batch_size
        )
        mixed = torch.randperm(len(batches), generator=seeds.generator(seed, "batches", epoch))
        return torch.cat(
            [batches[mixed].flatten(), plain[full:]]
        )  # a smaller batch can only be the last


class WindowSplit(GatheredSplit):
    """Windows of one long text: inputs (length,) and, at each position, the token that comes next.

    A sample's index is the position in the text where it begins. To train on, an epoch is the text cut into windows
    side by side, from a start that is drawn anew in each epoch. To measure on, windows overlap by `context` tokens,
    whose targets are -1 in the later window: each token but the first counts once, and is predicted from at least
    `context` tokens (from fewer at the very beginning).
    """

    reuses_memory = False

    def __init__(self, tokens: Tensor, length: int, context: int | None = None, **facts: Any):
        """Cut the tokens (1-d) when they are asked for.

        context: tokens that a window shares with the one before it; None: windows to train on.
        facts: kept as `facts`, for those who look at samples (what makes text of tokens).
        """
        if len(tokens) < 2 * length:
            raise DataError(
                f"{len(tokens)} tokens are too few for windows of {length}: {2 * length} are needed"
            )
        if not 0 <= (context or 0) < length:
            raise DataError(
                f"windows of {length} tokens can overlap by 0 to {length - 1} tokens, not {context}"
            )
        self.tokens, self.length, self.context, self.facts = tokens, length, context, facts

    @property
    def stride(self) -> int:
        return self.length - (self.context or 0)

    def __len__(self) -> int:
        """The windows of an epoch: so many fit whatever the start."""
        if self.context is None:
            return (len(self.tokens) - 1) // self.length - 1
        return 1 + -(-(len(self.tokens) - 1 - self.length) // self.stride)

    def order(self, seed: int, epoch: int, batch_size: int, shuffle: bool) -> Tensor:
        windows = torch.arange(len(self)) * self.stride
        if not shuffle:
            return windows.clamp(
                max=len(self.tokens) - 1 - self.length
            )  # the last one ends with the text
        start = torch.randint(self.length, (), generator=seeds.generator(seed, "windows", epoch))
        return windows[seeds.order(seed, epoch, len(self))] + start

    def content(self) -> Any:
        """Return what the samples are made of, see `content.py`."""
        return [self.tokens, self.length, self.context]

    def gather(self, indices: Tensor) -> Batch:
        places = indices[:, None] + torch.arange(self.length + 1)
        window = self.tokens[places].long()
        inputs, targets = window[:, :-1], window[:, 1:]
        if self.context is not None:
            before = (indices - 1).div(
                self.stride, rounding_mode="floor"
            ) * self.stride  # where the last one began
            seen = torch.where(indices > 0, before + self.length - indices, 0)
            targets = targets.masked_fill(torch.arange(self.length) < seen[:, None], -1)
        # Clones, since the inputs and targets of a single window would share its memory.
        own = [part.clone(memory_format=torch.contiguous_format) for part in (inputs, targets)]
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in own)
