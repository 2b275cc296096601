"""Sums in a fixed order: a binary tree over the terms.

The sum of each half of the terms is that of a smaller tree. So processes that have equal numbers of
neighboring terms, a power of two, can sum their own ones first, and then the sums of all processes:
the result is the same, bit for bit, as that of one process with all terms.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor


class PairwiseSum:
    """Adds lists of tensors, term by term: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).

    Of n terms it keeps at most log2(n) + 1 at a time. It changes the tensors that it is given.
    """

    def __init__(self) -> None:
        self.partial: list[tuple[int, Sequence[Tensor]]] = []  # the number of terms, their sum

    def add(self, term: Sequence[Tensor]) -> None:
        """Add the next term."""
        count = 1
        while self.partial and self.partial[-1][0] == count:
            before = self.partial.pop()[1]
            term = [left.add_(right) for left, right in zip(before, term, strict=True)]
            count *= 2
        self.partial.append((count, term))

    def total(self) -> Sequence[Tensor]:
        """Return the sum of all terms.

        Raises:
            ValueError: their number is not a power of two.
        """
        if len(self.partial) != 1:
            terms = sum(count for count, _ in self.partial)
            raise ValueError(f"expected a number of terms that is a power of two, got {terms}")
        return self.partial[0][1]


def pairwise_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors, whose number is a power of two; it changes them."""
    result = PairwiseSum()
    for tensor in tensors:
        result.add([tensor])
    return result.total()[0]
