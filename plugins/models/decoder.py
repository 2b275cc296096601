"""Decoder-only language model and its layers: rotary positions, RMS norm, SwiGLU, a cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework import (
    BuildError,
    DataError,
    Dropout,
    Norm,
    PositiveFloat,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    models,
    shapes,
)
from framework_plugins.sequence_helpers import EMBEDDING_STD, check_heads, dropout_or_identity

Cache = list[list[Tensor]]
"""For each layer, the keys and values of previous tokens; last, the tokens for n-grams.

Each list is empty before the first token.
"""


class Rotary(nn.Module):
    """Rotate features i and i + D/2 of position m by the angle m · base^(-2i / D).

    Su et al. 2021, arXiv:2104.09864, equation 34; the paper pairs neighboring features, which
    differs by a fixed permutation.

    Args:
        features: D, an even number.
        context: maximum number of positions.
        base: wavelengths go from 2π to 2π · base.

    Raises:
        BuildError: D is odd.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, features: int, context: int, base: float):
        super().__init__()
        if features % 2:
            raise BuildError(
                f"rotary positions: expected an even number of features per head, got {features}"
            )
        angles = torch.arange(context)[:, None] * base ** -(torch.arange(0, features, 2) / features)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.context = context

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate the features of (..., T, D). The first position is `start`.

        Raises:
            DataError: the sequence is longer than the context.
        """
        end = start + x.shape[-2]
        if end > self.context:
            raise DataError(
                f"a sequence of {end} tokens is longer than the model's context of {self.context}"
            )
        cos = self.cos[start:end].to(x.dtype)
        sin = self.sin[start:end].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@blocks.register("rotary_attention")
class RotaryAttention(nn.Module):
    """Self-attention with rotary position embedding: (T, D) -> (T, D) (Su et al. 2021).

    forward(x, mask) ignores padding; mask (batch, T) is true at all other positions.

    Args:
        heads: number of attention heads; must divide D.
        causal: each position attends only to itself and to earlier positions.
        dropout: probability of zeroing an attention weight.
        base: wavelengths of the rotations go from 2π to 2π · base.
    """

    def __init__(
        self,
        in_shape: Shape,
        heads: PositiveInt = 4,
        causal: bool = True,
        dropout: Rate = 0.0,
        base: PositiveFloat = 10_000.0,
    ):
        super().__init__()
        context, features = shapes.expect(in_shape, "(T, D)", "rotary_attention")
        check_heads(features, heads, "rotary_attention")
        self.heads = heads
        self.causal = causal
        self.p = dropout
        self.input = nn.Linear(features, 3 * features, bias=False)
        self.output = nn.Linear(features, features, bias=False)
        self.rotary = Rotary(features // heads, context, base)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        query, key, value = self.input(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        start = cache[0].shape[2] if cache else 0
        query = self.rotary(query, start)
        key = self.rotary(key, start)
        if cache is not None:
            if cache:
                key = torch.cat([cache[0], key], 2)
                value = torch.cat([cache[1], value], 2)
            cache[:] = key, value
        visible = None if mask is None else mask[:, None, None, :]
        if start and self.causal:  # query i is at position start + i
            pairs = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device)
            visible = pairs.tril(start)
        causal = self.causal and visible is None
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, visible, dropout_p=p, is_causal=causal
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


@blocks.register("gated_transformer")
class GatedTransformer(nn.Module):
    """Pre-norm transformer layer with rotary attention and SwiGLU, no biases: (T, D) -> (T, D).

    Touvron et al. 2023, arXiv:2302.13971, section 2.2; SwiGLU: Shazeer 2020, arXiv:2002.05202. The
    last linear layer of each branch starts at zero, so a new layer is the identity.

    Args:
        heads: number of attention heads; must divide D.
        hidden: features between the two linear layers; null: 8/3 D, rounded up to a multiple of
            16.
        norm: normalization of each position before each branch.
        causal: each position attends only to itself and to earlier positions.
        dropout: probability of zeroing attention weights and each branch.
        dropout_kind: how branches are dropped.
        base: base of the wavelengths of the positions.
    """

    def __init__(
        self,
        in_shape: Shape,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        norm: Norm = "rms",
        causal: bool = True,
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
        base: PositiveFloat = 10_000.0,
    ):
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "gated_transformer")
        hidden = hidden or math.ceil(8 * features / 48) * 16
        self.attention_norm = norm((features,))
        self.norm = norm((features,))
        self.attention = blocks.build(
            "rotary_attention", in_shape, heads=heads, causal=causal, dropout=dropout, base=base
        )
        self.input = nn.Linear(features, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, features, bias=False)
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        for last in (self.attention.output, self.output):
            nn.init.zeros_(last.weight)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        value, gate = self.input(self.norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.output(value * F.silu(gate)))


class NGrams(nn.Module):
    """The sum of the vectors of the n-grams that end at each position, hashed into one table.

    The lengths are 2 to `longest`. Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1, equations
    2 to 5, with one table for all lengths. Zeros precede the first token.

    Args:
        longest: the largest length, at least 2.
        buckets: size of the table.
        width: features of a vector.
    """

    PRIME = 1_000_003

    def __init__(self, longest: int, buckets: int, width: int):
        super().__init__()
        self.longest = longest
        self.table = nn.Embedding(buckets, width)
        nn.init.zeros_(self.table.weight)  # the model starts as one without n-grams

    def forward(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Return the sums for each token.

        Args:
            tokens: (batch, T).
            before: the longest - 1 tokens that precede them, (batch, longest - 1).

        Returns:
            (batch, T, width).
        """
        text = torch.cat([before, tokens], 1)
        hashed = text
        indices = []
        for length in range(2, self.longest + 1):
            hashed = (hashed[:, 1:] * self.PRIME + text[:, : 1 - length] + length) % (2**31 - 1)
            indices.append(hashed[:, -tokens.shape[1] :] % self.table.num_embeddings)
        return self.table(torch.stack(indices)).sum(0)


@models.register("decoder")
class Decoder(nn.Module):
    """Decoder-only transformer: token ids (T,) -> logits of the next token at each position.

    (T,) -> (T, vocabulary). The layers are those of Llama (see `gated_transformer`), with rotary
    positions. T is the context: a longer input is an error, and text is generated in a sliding
    window (see `sample`).

    Muon takes the last matrix to be the output layer: here that is the embedding, or the output
    layer itself. The table of n-grams is the first matrix (for Muon: optimizer.embedding=true).

    Args:
        width: features of a position.
        depth: number of stacked layers.
        heads: number of attention heads; must divide width.
        hidden: features between the two linear layers; null: 8/3 width, rounded up to a
            multiple of 16.
        tied: the output layer shares the weights of the embedding (Press & Wolf 2017,
            arXiv:1608.05859).
        ngrams: largest length of the n-grams that add vectors to those of tokens (see
            `NGrams`); 1: no n-grams.
        buckets: size of the hash table of n-gram vectors.
        norm: normalization of each position before each branch and after the last layer.
        dropout: probability of zeroing embedded features, attention weights and each branch.
        dropout_kind: how features and branches are dropped.
        base: base of the wavelengths of the positions.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        width: PositiveInt = 128,
        depth: PositiveInt = 4,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        tied: bool = True,
        ngrams: PositiveInt = 1,
        buckets: PositiveInt = 32_768,
        norm: Norm = "rms",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
        base: PositiveFloat = 10_000.0,
    ):
        super().__init__()
        (self.context,) = shapes.expect(in_shape, "token ids (T,)", "decoder")
        self.ngrams = NGrams(ngrams, buckets, width) if ngrams > 1 else None
        layer = blocks.maker(
            "gated_transformer",
            heads=heads,
            hidden=hidden,
            norm=norm,
            dropout=dropout,
            dropout_kind=dropout_kind,
            base=base,
        )
        self.layers = nn.ModuleList(layer((self.context, width)) for _ in range(depth))
        self.norm = norm((width,))
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        self.embedding = nn.Embedding(out_shape[-1], width)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.output = nn.Linear(width, out_shape[-1], bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits. With a cache, `tokens` follow the cached tokens and are cached, too."""
        x = self.dropout(self.embed(tokens, [] if cache is None else cache[-1]))
        for number, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[number]
            x = layer(x, None, layer_cache)
        return self.output(self.norm(x))

    def embed(self, tokens: Tensor, cached: list[Tensor]) -> Tensor:
        """Return the vectors of tokens, and put the last tokens into `cached` for the next call."""
        if self.ngrams is None:
            return self.embedding(tokens)
        count = self.ngrams.longest - 1
        before = cached[0] if cached else tokens.new_zeros(tokens.shape[0], count)
        cached[:] = [torch.cat([before, tokens], 1)[:, -count:]]
        return self.embedding(tokens) + self.ngrams(tokens, before)

    def new_cache(self) -> Cache:
        """Return an empty cache."""
        return [[] for _ in range(len(self.layers) + 1)]
