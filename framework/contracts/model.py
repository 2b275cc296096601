"""What a task or callback may ask of a model besides its forward pass; each a method of its own."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class GenerativeModel(Protocol):
    """A model that draws samples."""

    def sample(self, count: int) -> Tensor:
        """Return samples, shape (count, *in_shape)."""


@runtime_checkable
class CachedDecoder(Protocol):
    """A language model that keeps what it computed of earlier tokens."""

    def new_cache(self) -> Any:
        """Return an empty cache; `model(tokens, cache)` reads and extends it."""
