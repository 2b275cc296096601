"""Classifiers of token ids (T,), 0 being padding: what they give for a text does not depend on how far it is padded.

Ids of `vocabulary` and above count as the unknown token (1); tokenizers put what is rare last.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from framework import Dropout, Norm, PositiveInt, Range, Rate, Shape, blocks, models, shapes

UNKNOWN = 1
Vocabulary = Annotated[int, Range("[2, inf)")]


class Words(nn.Module):
    """Vectors of token ids, zero for padding."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(self.known(tokens))

    def known(self, tokens: Tensor) -> Tensor:
        """Return the ids, those beyond the table as the unknown token."""
        return torch.where(tokens < self.table.num_embeddings, tokens, UNKNOWN)


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of (batch, T, D) over the positions where the mask (batch, T) is true."""
    weights = mask.to(x.dtype).unsqueeze(2)
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)


def mirrored(x: Tensor, mask: Tensor) -> Tensor:
    """Return each sequence (batch, T, D) backwards, its padding still at the end."""
    lengths, places = mask.sum(1, keepdim=True), torch.arange(x.shape[1], device=x.device)
    index = torch.where(places < lengths, lengths - 1 - places, places)
    return x.gather(1, index.unsqueeze(2).expand_as(x))


@models.register("embedding_bag")
class EmbeddingBag(nn.Module):
    """The mean of a text's word vectors, then a linear layer (Joulin et al. 2017, arXiv:1607.01759, words alone)."""

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        vocabulary: Vocabulary = 20_000,
        width: PositiveInt = 64,
        pairs: bool = False,
        buckets: PositiveInt = 50_000,
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the tables.

        Args:
            vocabulary: how many ids there are.
            width: features of a vector.
            pairs: vectors for neighbouring words too, hashed into `buckets` (section 2.1 there).
            buckets: vectors that pairs share.
            dropout: probability of zeroing a feature of the mean.
            dropout_kind: how features are dropped.
        """
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "embedding_bag")
        self.words = Words(vocabulary, width)
        self.pairs = nn.Embedding(buckets, width) if pairs else None
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        self.output = nn.Linear(width, out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mean = mean_of(self.words(tokens), tokens != 0)
        if self.pairs is not None and tokens.shape[1] > 1:
            known = self.words.known(tokens)
            first, second = known[:, :-1], known[:, 1:]
            hashed = (first * 92_821 + second) % self.pairs.num_embeddings
            mean = mean + mean_of(self.pairs(hashed), second != 0)
        return self.output(self.dropout(mean))


@models.register("text_lstm")
class TextLSTM(nn.Module):
    """LSTMs over a text in both directions, each from its own first word; the mean of all steps, a linear layer."""

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        vocabulary: Vocabulary = 20_000,
        embedding: PositiveInt = 64,
        cell: Literal["lstm", "gru"] = "lstm",
        width: PositiveInt = 64,
        bidirectional: bool = True,
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the layers.

        Args:
            vocabulary: how many ids there are.
            embedding: features of a token's vector.
            cell: the recurrent layer.
            width: features of its hidden state, for each direction.
            bidirectional: read the text backwards too.
            dropout: probability of zeroing a feature of a vector, and of the mean.
            dropout_kind: how features are dropped.
        """
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "text_lstm")
        self.words = Words(vocabulary, embedding)
        shape = (in_shape[0], embedding)
        self.forwards = blocks.build(cell, shape, width=width)
        self.backwards = blocks.build(cell, shape, width=width) if bidirectional else None
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        self.output = nn.Linear(width * (1 + bidirectional), out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mask, x = tokens != 0, self.dropout(self.words(tokens))
        steps = self.forwards(x)  # what comes after a text cannot change its own steps
        if self.backwards is not None:
            steps = torch.cat(
                [steps, self.backwards(mirrored(x, mask))], 2
            )  # their mean has no order
        return self.output(self.dropout(mean_of(steps, mask)))


@models.register("text_transformer")
class TextTransformer(nn.Module):
    """A transformer encoder over a text, padding masked out; the mean of its positions, a linear layer.

    Layers as in `gated_transformer`, seeing both sides; T, the longest text, is all that they can take.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        vocabulary: Vocabulary = 20_000,
        width: PositiveInt = 64,
        depth: PositiveInt = 2,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        norm: Norm = "rms",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the layers.

        Args:
            vocabulary: how many ids there are.
            width: features of a position.
            depth: layers on top of each other.
            heads: attentions side by side; must divide width.
            hidden: features between a layer's two linear maps; null: 8/3 width, rounded up to a multiple of 16.
            norm: of each position, before each branch and after the last layer.
            dropout: probability of zeroing a feature of a vector, attention weights, branches and the mean.
            dropout_kind: how features and branches are dropped.
        """
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "text_transformer")
        settings = {"heads": heads, "hidden": hidden, "norm": norm, "causal": False}
        dropping = {"dropout": dropout, "dropout_kind": dropout_kind}
        shape = (in_shape[0], width)
        self.words, self.norm = Words(vocabulary, width), norm((width,))
        self.layers = nn.ModuleList(
            blocks.build("gated_transformer", shape, **settings, **dropping) for _ in range(depth)
        )
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        self.output = nn.Linear(width, out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mask, x = tokens != 0, self.dropout(self.words(tokens))
        seen = mask.clone()
        seen[:, 0] = True  # of a row that is all padding the attention would be NaN
        for layer in self.layers:
            x = layer(x, seen)
        return self.output(self.dropout(mean_of(self.norm(x), mask)))
