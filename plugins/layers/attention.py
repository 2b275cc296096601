"""Blocks over sequences (T, D): tokens and patches made into them, positions, attention, transformers, MLP-Mixer."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from framework import (
    Activation,
    BuildError,
    Dropout,
    Norm,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    shapes,
)

EMBEDDING_STD = 0.02  # of learned positions and class tokens, as in BERT and ViT


@blocks.register("embedding")
def embedding(in_shape: Shape, vocabulary: PositiveInt = 256, width: PositiveInt = 64) -> nn.Module:
    """A learned vector for each token id: (T,) of integers -> (T, width).

    Args:
        vocabulary: how many ids there are, from 0 on (256: bytes).
        width: features of a vector.
    """
    shapes.expect(in_shape, "token ids (T,)", "embedding")
    return nn.Embedding(vocabulary, width)


@blocks.register("patch_embedding")
class PatchEmbedding(nn.Module):
    """Square patches of an image, each mapped linearly to a vector (Dosovitskiy et al. 2021, arXiv:2010.11929).

    (C, H, W) -> (T, width), with T = H / patch · W / patch, row by row.
    """

    def __init__(self, in_shape: Shape, patch: PositiveInt = 4, width: PositiveInt = 64):
        """Check that the patches tile the image.

        Args:
            patch: height and width of a patch.
            width: features of a vector.
        """
        super().__init__()
        channels, high, wide = shapes.expect(in_shape, "images (C, H, W)", "patch_embedding")
        if high % patch or wide % patch:
            divisors = [
                n for n in range(1, math.gcd(high, wide) + 1) if math.gcd(high, wide) % n == 0
            ]
            raise BuildError(
                f"patch_embedding cannot tile {in_shape} with patch={patch}; it can with {divisors}"
            )
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


@blocks.register("class_token")
class ClassToken(nn.Module):
    """A learned vector put before a sequence, to gather what a class head reads: (T, D) -> (T + 1, D)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "class_token")
        self.token = nn.Parameter(torch.randn(1, 1, features) * EMBEDDING_STD)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)


@blocks.register("position", aliases=["positional_encoding"])
class Position(nn.Module):
    """x + a vector for each position; sequences may be shorter than T.

    sinusoidal: sin(t / 10000^(2i / D)) at feature 2i, cos of the same at 2i + 1 (Vaswani et al. 2017, section 3.5).
    """

    def __init__(
        self,
        in_shape: Shape,
        position: Literal["learned", "sinusoidal"] = "learned",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the table of vectors.

        Args:
            position: learned vectors, or waves.
            dropout: probability of zeroing an output.
            dropout_kind: how outputs are dropped.
        """
        super().__init__()
        steps, features = shapes.expect(in_shape, "(T, D)", "position")
        if position == "learned":
            self.table = nn.Parameter(torch.randn(steps, features) * EMBEDDING_STD)
        else:
            self.register_buffer("table", waves(steps, features), persistent=False)
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.table[: x.shape[1]])


def waves(steps: int, features: int) -> Tensor:
    """Return the sinusoidal table, shape (steps, features)."""
    frequency = 10_000.0 ** -(torch.arange(0, features, 2) / features)
    angle = torch.arange(steps)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :features]


@blocks.register("attention")
class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2): (T, D) -> (T, D).

    With a memory, forward(x, memory), the keys and values come from there (its shape: (batch, any T, memory_width)).
    """

    def __init__(
        self,
        in_shape: Shape,
        heads: PositiveInt = 4,
        causal: bool = False,
        dropout: Rate = 0.0,
        bias: bool = True,
        memory_width: PositiveInt | None = None,
    ):
        """Build the projections.

        Args:
            heads: attentions side by side; must divide D.
            causal: a position sees itself and those before it.
            dropout: probability of zeroing an attention weight.
            bias: whether the projections have one.
            memory_width: features of a memory to attend to; null: the sequence attends to itself.
        """
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "attention")
        if features % heads:
            raise BuildError(
                f"attention cannot split {features} features into {heads} heads of one size"
            )
        self.heads, self.causal, self.p = heads, causal, dropout
        self.query = nn.Linear(features, features, bias=bias)
        self.key_value = nn.Linear(memory_width or features, 2 * features, bias=bias)
        self.output = nn.Linear(features, features, bias=bias)
        self.needs_memory = memory_width is not None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.needs_memory and memory is None:
            raise ValueError(
                "attention with a memory_width needs a memory: call it as block(x, memory)"
            )
        source = x if memory is None else memory
        query = self.split(self.query(x))
        key, value = map(self.split, self.key_value(source).chunk(2, dim=-1))
        p = self.p if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """Return (batch, T, D) as (batch, heads, T, D / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Sublayer(nn.Module):
    """x + dropout(module(norm(x))), or with the norm last, norm(x + dropout(module(x)))."""

    def __init__(self, module: nn.Module, norm: nn.Module, dropout: nn.Module, norm_first: bool):
        super().__init__()
        self.module, self.norm, self.dropout, self.norm_first = module, norm, dropout, norm_first

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        if self.norm_first:
            return x + self.dropout(self.module(self.norm(x), *memory))
        return self.norm(x + self.dropout(self.module(x, *memory)))


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory where asked for, and two linear layers, each a Sublayer."""

    def __init__(
        self,
        in_shape: Shape,
        heads: int,
        expansion: int,
        activation: Activation,
        norm: Norm,
        norm_first: bool,
        dropout: float,
        dropout_kind: Dropout,
        causal: bool,
        memory_width: int | None = None,
    ):
        super().__init__()
        features = in_shape[-1]

        def sublayer(module: nn.Module) -> Sublayer:
            normed = norm((features,))
            return Sublayer(
                module, normed, dropout_kind(dropout) if dropout > 0 else nn.Identity(), norm_first
            )

        def attention(**settings) -> Sublayer:
            return sublayer(
                blocks.build("attention", in_shape, heads=heads, dropout=dropout, **settings)
            )

        wide = {"width": expansion * features, "dropout": dropout, "dropout_kind": dropout_kind}
        narrow = {"width": features, "activation": None}
        makers = [
            blocks.maker("linear", activation=activation, **wide),
            blocks.maker("linear", **narrow),
        ]
        self.attention = attention(causal=causal)
        self.cross_attention = attention(memory_width=memory_width) if memory_width else None
        self.feed_forward = sublayer(nn.Sequential(*shapes.build_chain(makers, in_shape)[0]))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, memory)
        return self.feed_forward(x)


@blocks.register("transformer_encoder")
def transformer_encoder(
    in_shape: Shape,
    heads: PositiveInt = 4,
    expansion: PositiveInt = 4,
    activation: Activation = "gelu",
    norm: Norm = "layer",
    norm_first: bool = True,
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
    causal: bool = False,
) -> nn.Module:
    """One layer of a transformer encoder (Vaswani et al. 2017, arXiv:1706.03762, section 3.1): (T, D) -> (T, D).

    Args:
        heads: attentions side by side; must divide D.
        expansion: hidden features of the two linear layers, per feature of the sequence.
        activation: between the two linear layers.
        norm: of each position.
        norm_first: norm each branch's input (Xiong et al. 2020, arXiv:2002.04745); false: each sum, as in 2017.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
        causal: a position sees itself and those before it.
    """
    shapes.expect(in_shape, "(T, D)", "transformer_encoder")
    return TransformerLayer(
        in_shape, heads, expansion, activation, norm, norm_first, dropout, dropout_kind, causal
    )


@blocks.register("transformer_decoder")
def transformer_decoder(
    in_shape: Shape,
    heads: PositiveInt = 4,
    expansion: PositiveInt = 4,
    activation: Activation = "gelu",
    norm: Norm = "layer",
    norm_first: bool = True,
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
    memory_width: PositiveInt | None = None,
) -> nn.Module:
    """One causal layer of a transformer decoder (Vaswani et al. 2017, arXiv:1706.03762, section 3.1): (T, D) -> (T, D).

    A position sees itself and those before it; with a memory_width also all of a memory: forward(x, memory).

    Args:
        heads: attentions side by side; must divide D.
        expansion: hidden features of the two linear layers, per feature of the sequence.
        activation: between the two linear layers.
        norm: of each position.
        norm_first: norm each branch's input (Xiong et al. 2020, arXiv:2002.04745); false: each sum, as in 2017.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
        memory_width: features of the memory to attend to, such as an encoder's output; null: no memory.
    """
    shapes.expect(in_shape, "(T, D)", "transformer_decoder")
    rest = {"causal": True, "memory_width": memory_width}
    return TransformerLayer(
        in_shape, heads, expansion, activation, norm, norm_first, dropout, dropout_kind, **rest
    )


@blocks.register("mlp_mixer")
class MLPMixer(nn.Module):
    """Two linear layers across positions, then two across features, each x + mlp(norm(x)): (T, D) -> (T, D).

    Tolstikhin et al. 2021, arXiv:2105.01601, equation 1.
    """

    def __init__(
        self,
        in_shape: Shape,
        token_width: PositiveInt = 64,
        width: PositiveInt = 256,
        activation: Activation = "gelu",
        norm: Norm = "layer",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the two mixing steps.

        Args:
            token_width: hidden features of the step across positions.
            width: hidden features of the step across features.
            activation: between two linear layers.
            norm: of each position, before each step.
            dropout: probability of zeroing, after each linear layer.
            dropout_kind: how features are dropped.
        """
        super().__init__()
        steps, features = shapes.expect(in_shape, "(T, D)", "mlp_mixer")
        rest = {"activation": activation, "dropout": dropout, "dropout_kind": dropout_kind}
        self.norm = norm((features,))
        self.tokens = mixing((features, steps), token_width, **rest)
        self.features = blocks.build("residual_mlp", in_shape, width=width, norm=norm, **rest)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.features(mixed)


def mixing(
    shape: Shape, width: int, activation: Activation, dropout: float, dropout_kind: Dropout
) -> nn.Sequential:
    """Return two linear layers over the last axis of `shape`, which they keep."""
    rest = {"dropout": dropout, "dropout_kind": dropout_kind}
    first = blocks.maker("linear", width=width, activation=activation, **rest)
    second = blocks.maker("linear", width=shape[-1], activation=None, **rest)
    return nn.Sequential(*shapes.build_chain([first, second], shape)[0])
