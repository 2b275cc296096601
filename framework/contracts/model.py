"""Optional capabilities of models, which some tasks and callbacks use."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class GenerativeModel(Protocol):
    """A model that draws samples."""

    def sample(self, count: int) -> Tensor:
        """Return generated samples, shape (count, *in_shape)."""


@runtime_checkable
class CachedDecoder(Protocol):
    """A language model that caches its computations for earlier tokens."""

    def new_cache(self) -> Any:
        """Return an empty cache; `model(tokens, cache)` reads and extends it."""
