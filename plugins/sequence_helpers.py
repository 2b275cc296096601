"""Helpers of layers and models for sequences: dropout, attention heads, embeddings."""

from torch import nn

from framework import BuildError, Dropout

EMBEDDING_STD = 0.02
"""Standard deviation of initial token and position embeddings, as in BERT, GPT-2 and ViT."""


def dropout_or_identity(kind: Dropout, p: float) -> nn.Module:
    """Return a dropout with probability `p` of zeroing, or the identity if `p` is 0."""
    return kind(p) if p > 0 else nn.Identity()


def check_heads(features: int, heads: int, name: str) -> None:
    """Check that the features of a position can be split into attention heads.

    Args:
        features: features of a position.
        heads: number of attention heads.
        name: the name of the part, for the message.

    Raises:
        BuildError: the heads do not divide the features.
    """
    if features % heads:
        raise BuildError(
            f"{name}: {features} features cannot be split into {heads} heads of equal size"
        )
