"""Blocks over sequences (T, D): embeddings, positions, attention, transformer layers, MLP-Mixer."""

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
from framework_plugins.sequence_helpers import EMBEDDING_STD, check_heads, dropout_or_identity


@blocks.register("embedding")
def embedding(in_shape: Shape, vocabulary: PositiveInt = 256, width: PositiveInt = 64) -> nn.Module:
    """A learned vector for each token id: (T,) of integers -> (T, width).

    Args:
        vocabulary: number of token ids, counted from 0 (256: bytes).
        width: features of a vector.
    """
    shapes.expect(in_shape, "token ids (T,)", "embedding")
    return nn.Embedding(vocabulary, width)


@blocks.register("patch_embedding")
class PatchEmbedding(nn.Module):
    """Split an image into square patches and map each one linearly to a vector.

    (C, H, W) -> (T, width), with T = H / patch · W / patch, row by row (Dosovitskiy et al. 2021,
    arXiv:2010.11929).

    Args:
        patch: height and width of a patch.
        width: features of a vector.
    """

    def __init__(self, in_shape: Shape, patch: PositiveInt = 4, width: PositiveInt = 64):
        super().__init__()
        channels, high, wide = shapes.expect(in_shape, "images (C, H, W)", "patch_embedding")
        if high % patch or wide % patch:
            largest = math.gcd(high, wide)
            divisors = [n for n in range(1, largest + 1) if largest % n == 0]
            raise BuildError(
                f"patch_embedding: patch={patch} does not tile {in_shape}; use one of {divisors}"
            )
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


@blocks.register("class_token")
class ClassToken(nn.Module):
    """Prepend a learned vector to a sequence, for the class head to read: (T, D) -> (T + 1, D)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "class_token")
        self.token = nn.Parameter(torch.randn(1, 1, features) * EMBEDDING_STD)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)


@blocks.register("position", aliases=["positional_encoding"])
class Position(nn.Module):
    """x + a vector for each position; a sequence may be shorter than T.

    sinusoidal: sin(t / 10000^(2i / D)) at feature 2i, cos of the same at 2i + 1 (Vaswani et al.
    2017, section 3.5).

    Args:
        position: learned vectors, or fixed sine waves.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
    """

    def __init__(
        self,
        in_shape: Shape,
        position: Literal["learned", "sinusoidal"] = "learned",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        super().__init__()
        steps, features = shapes.expect(in_shape, "(T, D)", "position")
        if position == "learned":
            self.table = nn.Parameter(torch.randn(steps, features) * EMBEDDING_STD)
        else:
            self.register_buffer("table", waves(steps, features), persistent=False)
        self.dropout = dropout_or_identity(dropout_kind, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.table[: x.shape[1]])


def waves(steps: int, features: int) -> Tensor:
    """Return the sinusoidal table, shape (steps, features)."""
    frequency = 10_000.0 ** -(torch.arange(0, features, 2) / features)
    angle = torch.arange(steps)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :features]


@blocks.register("attention")
class Attention(nn.Module):
    """Multi-head scaled dot-product attention: (T, D) -> (T, D).

    forward(x, memory) takes keys and values from the memory (batch, any T, memory_width) (Vaswani
    et al. 2017, arXiv:1706.03762, section 3.2).

    Args:
        heads: number of attention heads; must divide D.
        causal: each position attends only to itself and to earlier positions.
        dropout: probability of zeroing an attention weight.
        bias: add a learned bias in the projections.
        memory_width: features of a memory to attend to; null: self-attention.
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
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "attention")
        check_heads(features, heads, "attention")
        self.heads = heads
        self.causal = causal
        self.p = dropout
        self.query = nn.Linear(features, features, bias=bias)
        self.key_value = nn.Linear(memory_width or features, 2 * features, bias=bias)
        self.output = nn.Linear(features, features, bias=bias)
        self.needs_memory = memory_width is not None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.needs_memory and memory is None:
            raise ValueError("attention with memory_width: expected a memory: block(x, memory)")
        source = x if memory is None else memory
        query = self.split(self.query(x))
        key, value = self.key_value(source).chunk(2, dim=-1)
        key = self.split(key)
        value = self.split(value)
        p = self.p if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """Return (batch, T, D) as (batch, heads, T, D / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Sublayer(nn.Module):
    """x + dropout(module(norm(x))), or, with norm_first=False, norm(x + dropout(module(x)))."""

    def __init__(self, module: nn.Module, norm: nn.Module, dropout: nn.Module, norm_first: bool):
        super().__init__()
        self.module = module
        self.norm = norm
        self.dropout = dropout
        self.norm_first = norm_first

    def forward(self, x: Tensor, *memory: Tensor | None) -> Tensor:
        if self.norm_first:
            return x + self.dropout(self.module(self.norm(x), *memory))
        return self.norm(x + self.dropout(self.module(x, *memory)))


class TransformerLayer(nn.Module):
    """Self-attention, optional attention to a memory, and two linear layers, each a `Sublayer`.

    With norm_first:

        x = x + dropout(attention(norm(x)))
        x = x + dropout(cross_attention(norm(x), memory))  # with memory_width
        x = x + dropout(feed_forward(norm(x)))

    Args:
        in_shape: (T, D).
        heads: number of attention heads; must divide D.
        expansion: hidden features of the two linear layers, per feature of the sequence.
        activation: between the two linear layers.
        norm: normalization of each position.
        norm_first: normalize the input of each branch; false: each sum.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
        causal: each position attends only to itself and to earlier positions.
        memory_width: features of the memory; None: no attention to a memory.
    """

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
            branch_norm = norm((features,))
            branch_dropout = dropout_or_identity(dropout_kind, dropout)
            return Sublayer(module, branch_norm, branch_dropout, norm_first)

        attention = blocks.maker("attention", heads=heads, dropout=dropout)
        self.attention = sublayer(attention(in_shape, causal=causal))
        self.cross_attention: Sublayer | None = None
        if memory_width is not None:
            self.cross_attention = sublayer(attention(in_shape, memory_width=memory_width))
        feed_forward = two_linear_layers(
            in_shape, expansion * features, activation, dropout, 0.0, dropout_kind
        )
        self.feed_forward = sublayer(feed_forward)

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
    """One layer of a transformer encoder: (T, D) -> (T, D).

    Vaswani et al. 2017, arXiv:1706.03762, section 3.1.

    Args:
        heads: number of attention heads; must divide D.
        expansion: hidden features of the two linear layers, per feature of the sequence.
        activation: between the two linear layers.
        norm: normalization of each position.
        norm_first: normalize the input of each branch (Xiong et al. 2020, arXiv:2002.04745); false:
            normalize each sum, as in the original paper.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
        causal: each position attends only to itself and to earlier positions.
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
    """One causal layer of a transformer decoder: (T, D) -> (T, D).

    Each position attends to itself and to earlier positions; with memory_width, forward(x, memory)
    also attends to all of a memory (Vaswani et al. 2017, arXiv:1706.03762, section 3.1).

    Args:
        heads: number of attention heads; must divide D.
        expansion: hidden features of the two linear layers, per feature of the sequence.
        activation: between the two linear layers.
        norm: normalization of each position.
        norm_first: normalize the input of each branch (Xiong et al. 2020, arXiv:2002.04745); false:
            normalize each sum, as in the original paper.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
        memory_width: features of the memory, such as the output of an encoder; null: no memory.
    """
    shapes.expect(in_shape, "(T, D)", "transformer_decoder")
    return TransformerLayer(
        in_shape,
        heads,
        expansion,
        activation,
        norm,
        norm_first,
        dropout,
        dropout_kind,
        causal=True,
        memory_width=memory_width,
    )


@blocks.register("mlp_mixer")
class MLPMixer(nn.Module):
    """Two linear layers across positions, then two across features: (T, D) -> (T, D).

    Each step is x + mlp(norm(x)) (Tolstikhin et al. 2021, arXiv:2105.01601, equation 1).

    Args:
        token_width: hidden features of the step across positions.
        width: hidden features of the step across features.
        activation: between two linear layers.
        norm: normalization of each position before each step.
        dropout: probability of zeroing after each linear layer.
        dropout_kind: how features are dropped.
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
        super().__init__()
        steps, features = shapes.expect(in_shape, "(T, D)", "mlp_mixer")
        self.norm = norm((features,))
        self.tokens = two_linear_layers(
            (features, steps), token_width, activation, dropout, dropout, dropout_kind
        )
        self.features = blocks.build(
            "residual_mlp",
            in_shape,
            width=width,
            activation=activation,
            norm=norm,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.features(mixed)


def two_linear_layers(
    shape: Shape,
    hidden: int,
    activation: Activation,
    dropout: float,
    last_dropout: float,
    dropout_kind: Dropout,
) -> nn.Sequential:
    """Return two linear layers over the last axis that keep the shape.

    Args:
        shape: the shape of a sample.
        hidden: features between the two layers.
        activation: between the two layers.
        dropout: probability of zeroing a hidden feature.
        last_dropout: probability of zeroing an output.
        dropout_kind: how features are dropped.
    """
    first = blocks.maker(
        "linear", width=hidden, activation=activation, dropout=dropout, dropout_kind=dropout_kind
    )
    second = blocks.maker(
        "linear",
        width=shape[-1],
        activation=None,
        dropout=last_dropout,
        dropout_kind=dropout_kind,
    )
    modules, _ = shapes.build_chain([first, second], shape)
    return nn.Sequential(*modules)
