"""Text classifiers on token ids (T,), 0 being padding: the output does not depend on the padding.

Ids of `vocabulary` and above count as the unknown token (1); tokenizers sort rare tokens last.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from framework import Dropout, Norm, PositiveInt, Range, Rate, Shape, blocks, models, shapes
from framework_plugins.sequence_helpers import dropout_or_identity

UNKNOWN = 1
Vocabulary = Annotated[int, Range("[2, inf)")]


class Words(nn.Module):
    """Embedding of token ids; zero for padding."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(self.known(tokens))

    def known(self, tokens: Tensor) -> Tensor:
        """Return the ids, with ids beyond the table replaced by the unknown token."""
        return torch.where(tokens < self.table.num_embeddings, tokens, UNKNOWN)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of (batch, T, D) over the positions where the mask (batch, T) is true."""
    weights = mask.to(x.dtype).unsqueeze(2)
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)


def reverse(x: Tensor, mask: Tensor) -> Tensor:
    """Return each sequence of (batch, T, D) in reverse order, with its padding still at the end."""
    lengths = mask.sum(1, keepdim=True)
    positions = torch.arange(x.shape[1], device=x.device)
    index = torch.where(positions < lengths, lengths - 1 - positions, positions)
    return x.gather(1, index.unsqueeze(2).expand_as(x))


@models.register("embedding_bag")
class EmbeddingBag(nn.Module):
    """The mean of the word vectors of a text, then a linear layer.

    Joulin et al. 2017, arXiv:1607.01759, with words (and pairs) instead of n-grams of any length.

    Args:
        vocabulary: number of token ids.
        width: features of a vector.
        pairs: also use vectors of pairs of neighboring words, hashed into `buckets` (section
            2.1 of the paper).
        buckets: size of the hash table of pair vectors.
        dropout: probability of zeroing a feature of the mean.
        dropout_kind: how features are dropped.
    """

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
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "embedding_bag")
        self.words = Words(vocabulary, width)
        self.pairs = nn.Embedding(buckets, width) if pairs else None
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        self.output = nn.Linear(width, out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mean = masked_mean(self.words(tokens), tokens != 0)
        if self.pairs is not None and tokens.shape[1] > 1:
            known = self.words.known(tokens)
            first = known[:, :-1]
            second = known[:, 1:]
            hashed = (first * 92_821 + second) % self.pairs.num_embeddings
            mean = mean + masked_mean(self.pairs(hashed), second != 0)
        return self.output(self.dropout(mean))


@models.register("text_lstm")
class TextLSTM(nn.Module):
    """LSTMs over a text in one or both directions, the mean of all steps, then a linear layer.

    Args:
        vocabulary: number of token ids.
        embedding: features of the vector of a token.
        cell: the recurrent layer.
        width: features of its hidden state, for each direction.
        bidirectional: also read the text backwards, from its last word.
        dropout: probability of zeroing a feature of a vector, and of the mean.
        dropout_kind: how features are dropped.
    """

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
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "text_lstm")
        self.words = Words(vocabulary, embedding)
        shape = (in_shape[0], embedding)
        self.forwards = blocks.build(cell, shape, width=width)
        self.backwards = blocks.build(cell, shape, width=width) if bidirectional else None
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        self.output = nn.Linear(width * (1 + bidirectional), out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.dropout(self.words(tokens))
        steps = self.forwards(x)  # padding at the end does not change the steps before it
        if self.backwards is not None:
            # The backward steps stay in reverse order, which does not change their mean.
            backwards = self.backwards(reverse(x, mask))
            steps = torch.cat([steps, backwards], 2)
        return self.output(self.dropout(masked_mean(steps, mask)))


@models.register("text_transformer")
class TextTransformer(nn.Module):
    """Transformer encoder over a text, the mean of all positions, then a linear layer.

    Padding is masked.

    The layers are those of `gated_transformer`, not causal. T is the length of the longest text.

    Args:
        vocabulary: number of token ids.
        width: features of a position.
        depth: number of stacked layers.
        heads: number of attention heads; must divide width.
        hidden: features between the two linear layers; null: 8/3 width, rounded up to a
            multiple of 16.
        norm: normalization of each position before each branch and after the last layer.
        dropout: probability of zeroing features of word vectors, attention weights, branches
            and features of the mean.
        dropout_kind: how features and branches are dropped.
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
        super().__init__()
        shapes.expect(in_shape, "token ids (T,)", "text_transformer")
        self.words = Words(vocabulary, width)
        self.norm = norm((width,))
        layer = blocks.maker(
            "gated_transformer",
            heads=heads,
            hidden=hidden,
            norm=norm,
            causal=False,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )
        self.layers = nn.ModuleList(layer((in_shape[0], width)) for _ in range(depth))
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        self.output = nn.Linear(width, out_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.dropout(self.words(tokens))
        visible = mask.clone()
        visible[:, 0] = True  # attention over a row of padding alone would be NaN
        for layer in self.layers:
            x = layer(x, visible)
        return self.output(self.dropout(masked_mean(self.norm(x), mask)))
