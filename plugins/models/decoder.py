"""The layers of decoder-only language models, and such a model: rotary positions, RMS norm, SwiGLU, a cache."""

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

EMBEDDING_STD = 0.02  # as in GPT-2
Cache = list[list[Tensor]]
"""For each layer the keys and values of the tokens so far, then the tokens that n-grams need: [] before the first."""


class Rotary(nn.Module):
    """Turns features i and i + D/2 of a position m together by the angle m · base^(-2i / D).

    Su et al. 2021, arXiv:2104.09864, equation 34, with the pairs in another order (a fixed permutation of features).
    """

    def __init__(self, features: int, context: int, base: float):
        super().__init__()
        if features % 2:
            raise BuildError(
                f"rotary positions turn pairs of features; {features} a head are not even"
            )
        angles = torch.arange(context)[:, None] * base ** -(torch.arange(0, features, 2) / features)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.context = context

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Turn (..., T, D), whose first position is `start`. Raises DataError beyond the context."""
        end = start + x.shape[-2]
        if end > self.context:
            raise DataError(
                f"a sequence of {end} tokens is longer than the model's context of {self.context}"
            )
        cos, sin = self.cos[start:end].to(x.dtype), self.sin[start:end].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@blocks.register("rotary_attention")
class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are turned by their positions (Su et al. 2021): (T, D) -> (T, D).

    forward(x, mask) leaves out the positions of padding, mask (batch, T) being true for the others.
    """

    def __init__(
        self,
        in_shape: Shape,
        heads: PositiveInt = 4,
        causal: bool = True,
        dropout: Rate = 0.0,
        base: PositiveFloat = 10_000.0,
    ):
        """Build the projections; the one behind the attention begins at zero.

        Args:
            heads: attentions side by side; must divide D.
            causal: a position sees itself and those before it.
            dropout: probability of zeroing an attention weight.
            base: of the wavelengths, which go from 2π to 2π · base.
        """
        super().__init__()
        context, features = shapes.expect(in_shape, "(T, D)", "rotary_attention")
        if features % heads:
            raise BuildError(
                f"rotary_attention cannot split {features} features into {heads} heads of one size"
            )
        self.heads, self.causal, self.p = heads, causal, dropout
        self.input = nn.Linear(features, 3 * features, bias=False)
        self.output = nn.Linear(features, features, bias=False)
        self.rotary = Rotary(features // heads, context, base)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        query, key, value = self.input(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        start = cache[0].shape[2] if cache else 0
        query, key = self.rotary(query, start), self.rotary(key, start)
        if cache is not None:
            if cache:
                key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
            cache[:] = key, value
        seen = None if mask is None else mask[:, None, None, :]
        if start and self.causal:  # new queries against all keys: position i of them sees start + i
            seen = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool, device=x.device).tril(
                start
            )
        causal = self.causal and seen is None
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, seen, dropout_p=p, is_causal=causal
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


@blocks.register("gated_transformer")
class GatedTransformer(nn.Module):
    """A pre-norm transformer layer with rotary attention and a SwiGLU, without biases: (T, D) -> (T, D).

    As in Touvron et al. 2023 (arXiv:2302.13971), section 2.2; SwiGLU: Shazeer 2020, arXiv:2002.05202.
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
        """Build the layer; what ends each branch begins at zero, so that the layer begins as the identity.

        Args:
            heads: attentions side by side; must divide D.
            hidden: features between the two linear maps; null: 8/3 D, rounded up to a multiple of 16.
            norm: of each position, before each branch.
            causal: a position sees itself and those before it.
            dropout: probability of zeroing attention weights and each branch.
            dropout_kind: how branches are dropped.
            base: of the wavelengths of the positions.
        """
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "gated_transformer")
        wide = hidden or -(-8 * features // 48) * 16
        settings = {"heads": heads, "causal": causal, "dropout": dropout, "base": base}
        self.attention_norm, self.norm = norm((features,)), norm((features,))
        self.attention = blocks.build("rotary_attention", in_shape, **settings)
        self.input, self.output = (
            nn.Linear(features, 2 * wide, bias=False),
            nn.Linear(wide, features, bias=False),
        )
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        for last in (self.attention.output, self.output):
            nn.init.zeros_(last.weight)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        value, gate = self.input(self.norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.output(value * F.silu(gate)))


class NGrams(nn.Module):
    """The sum of vectors for the pair, triple ... of tokens that ends at each position, hashed into one table.

    Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1, equations 2 to 5, with one table for all lengths. Zeros stand
    before the first token.
    """

    PRIME = 1_000_003

    def __init__(self, longest: int, buckets: int, width: int):
        super().__init__()
        self.longest = longest
        self.table = nn.Embedding(buckets, width)
        nn.init.zeros_(self.table.weight)  # the model begins as one without

    def forward(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Return (batch, T, width) for tokens (batch, T); before: the longest - 1 tokens that precede them."""
        text = torch.cat([before, tokens], 1)
        hashed, found = text, []
        for length in range(2, self.longest + 1):
            hashed = (hashed[:, 1:] * self.PRIME + text[:, : 1 - length] + length) % (2**31 - 1)
            found.append(hashed[:, -tokens.shape[1] :] % self.table.num_embeddings)
        return self.table(torch.stack(found)).sum(0)


@models.register("decoder")
class Decoder(nn.Module):
    """Decoder-only transformer over token ids (T,): logits of the next token at each position, (T, vocabulary).

    Layers as in Llama (see `gated_transformer`); positions are rotary. T is the context: a longer input is an
    error, and text is generated in a window that slides (see `sample`).
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
        """Build the layers. The embedding is the last matrix, which Muon takes to be the output layer.

        The table of n-grams, where there is one, is the first (for Muon: optimizer.embedding=true).

        Args:
            width: features of a position.
            depth: layers on top of each other.
            heads: attentions side by side; must divide width.
            hidden: features between a layer's two linear maps; null: 8/3 width, rounded up to a multiple of 16.
            tied: the output layer's weights are the embedding's (Press & Wolf 2017, arXiv:1608.05859).
            ngrams: vectors for the 2, 3 ... up to so many last tokens are added to a token's (see `NGrams`); 1: none.
            buckets: vectors that n-grams share, by a hash.
            norm: of each position, before each branch and after the last layer.
            dropout: probability of zeroing embedded features, attention weights and each branch.
            dropout_kind: how features and branches are dropped.
            base: of the wavelengths of the positions.
        """
        super().__init__()
        (self.context,) = shapes.expect(in_shape, "token ids (T,)", "decoder")
        settings = {"heads": heads, "hidden": hidden, "norm": norm, "base": base}
        dropping = {"dropout": dropout, "dropout_kind": dropout_kind}
        shape = (self.context, width)
        self.ngrams = NGrams(ngrams, buckets, width) if ngrams > 1 else None
        self.layers = nn.ModuleList(
            blocks.build("gated_transformer", shape, **settings, **dropping) for _ in range(depth)
        )
        self.norm = norm((width,))
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        self.embedding = nn.Embedding(out_shape[-1], width)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.output = nn.Linear(width, out_shape[-1], bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits; with a cache, the tokens follow those that it has seen, and it remembers them."""
        x = self.dropout(self.embed(tokens, [] if cache is None else cache[-1]))
        for number, layer in enumerate(self.layers):
            x = layer(x, None, None if cache is None else cache[number])
        return self.output(self.norm(x))

    def embed(self, tokens: Tensor, last: list[Tensor]) -> Tensor:
        """Return the vectors of tokens; `last` holds those before them, and then these."""
        if self.ngrams is None:
            return self.embedding(tokens)
        before = last[0] if last else tokens.new_zeros(len(tokens), self.ngrams.longest - 1)
        last[:] = [torch.cat([before, tokens], 1)[:, 1 - self.ngrams.longest :]]
        return self.embedding(tokens) + self.ngrams(tokens, before)

    def new_cache(self) -> Cache:
        return [[] for _ in range(len(self.layers) + 1)]
