"""Models for tables with columns of numbers and of categories.

`columns` says of each input what it is: 0 for a number, n for the index of one of n categories, of which 0 is what
training never saw (see `Data.columns`). Without it, all inputs are numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework import (
    Activation,
    BuildError,
    Dropout,
    NonNegativeInt,
    Norm,
    PositiveFloat,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    heads,
    models,
    shapes,
)


class Columns(nn.Module):
    """Parts inputs (batch, columns) into the numbers and the learned vectors of the categories, None without any.

    The vector of index 0, what training never saw, is zero and stays so. All are in one table: one lookup a batch.
    """

    def __init__(self, in_shape: Shape, sizes: Sequence[int] | None, width: int, who: str):
        super().__init__()
        (inputs,) = shapes.expect(in_shape, "columns (D,)", who)
        sizes = torch.tensor(sizes or [0] * inputs)
        if len(sizes) != inputs:
            raise BuildError(f"{who} gets {inputs} inputs, but is told of {len(sizes)} columns")
        numbers, indices = (sizes == 0).nonzero()[:, 0], sizes.nonzero()[:, 0]
        self.numbers, self.categories = len(numbers), len(indices)
        if not len(indices):
            return
        starts = sizes[indices].cumsum(0) - sizes[indices]
        for name, buffer in (("number_at", numbers), ("index_at", indices), ("starts", starts)):
            self.register_buffer(name, buffer, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), width)
        with torch.no_grad():
            self.table.weight.uniform_(
                -(width**-0.5), width**-0.5
            )  # as in the authors' code of Gorishniy et al. 2021

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.categories:
            return x, None
        rows = x.index_select(1, self.index_at).long()
        vectors = self.table(rows + self.starts) * (rows > 0).unsqueeze(2)
        return x.index_select(1, self.number_at), vectors


@blocks.register("feature_tokenizer")
class FeatureTokenizer(nn.Module):
    """A token for each column: b + x w of a number, b + a learned vector of a category; (columns,) -> (columns, width).

    The tokens of numbers come first.

    Gorishniy et al. 2021, arXiv:2106.11959, section 3.3.
    """

    def __init__(
        self, in_shape: Shape, width: PositiveInt = 64, sizes: list[NonNegativeInt] | None = None
    ):
        """Build the vectors.

        Args:
            width: features of a token.
            sizes: of each column, 0 for a number or how many categories there are; null: all are numbers.
        """
        super().__init__()
        self.columns = Columns(in_shape, sizes, width, "feature_tokenizer")
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(self.columns.numbers, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(in_shape[0], width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        numbers, vectors = self.columns(x)
        tokens = numbers.unsqueeze(2) * self.weight
        return (tokens if vectors is None else torch.cat([tokens, vectors], dim=1)) + self.bias


@blocks.register("column_embedding")
class ColumnEmbedding(nn.Module):
    """The numbers as they are, then a learned vector for each category: (columns,) -> (D,)."""

    def __init__(
        self, in_shape: Shape, width: PositiveInt = 16, sizes: list[NonNegativeInt] | None = None
    ):
        """Build the vectors.

        Args:
            width: features of a category's vector.
            sizes: of each column, 0 for a number or how many categories there are; null: all are numbers.
        """
        super().__init__()
        self.columns = Columns(in_shape, sizes, width, "column_embedding")

    def forward(self, x: Tensor) -> Tensor:
        numbers, vectors = self.columns(x)
        return numbers if vectors is None else torch.cat([numbers, vectors.flatten(1)], dim=1)


@models.register("tabular_resnet")
def tabular_resnet(
    in_shape: Shape,
    out_shape: Shape,
    columns: Sequence[int] = (),
    width: PositiveInt = 192,
    depth: PositiveInt = 3,
    expansion: PositiveFloat = 2.0,
    embedding: PositiveInt = 16,
    activation: Activation = "relu",
    norm: Norm = "batch",
    dropout: Rate = 0.1,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Residual MLP on the columns of a table (Gorishniy et al. 2021, arXiv:2106.11959, section 3.2).

    linear, then depth times x + dropout(linear(dropout(relu(linear(norm(x)))))), then norm, relu, linear.

    Args:
        width: features between blocks.
        depth: residual blocks.
        expansion: hidden features of a block, per feature between blocks.
        embedding: features of a category's vector.
        activation: in each block, and before the last layer.
        norm: of each block's input, and before the last layer.
        dropout: probability of zeroing a hidden feature, and a feature of each branch.
        dropout_kind: how features are dropped.
    """
    hidden = max(1, round(width * expansion))
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers = [
        blocks.maker("column_embedding", width=embedding, sizes=list(columns) or None),
        blocks.maker("linear", width=width, activation=None),
        *[
            blocks.maker("residual_mlp", width=hidden, activation=activation, norm=norm, **drop)
            for _ in range(depth)
        ],
        blocks.maker("norm", norm=norm),
        blocks.maker("activation", activation=activation),
    ]
    return models.build("stack", in_shape, out_shape, blocks=layers, head=heads.maker("class"))


@models.register("ft_transformer")
def ft_transformer(
    in_shape: Shape,
    out_shape: Shape,
    columns: Sequence[int] = (),
    width: PositiveInt = 64,
    depth: PositiveInt = 3,
    heads: PositiveInt = 8,
    expansion: PositiveInt = 2,
    activation: Activation = "reglu",
    norm: Norm = "layer",
    dropout: Rate = 0.1,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Transformer over the columns of a table, each a token (Gorishniy et al. 2021, arXiv:2106.11959, section 3.3).

    A class token gathers what the last layers, norm, relu and linear, read. Unlike in the paper, the first layer has
    its norm before attention too.

    Args:
        width: features of a token.
        depth: layers on top of each other.
        heads: attentions side by side; must divide width.
        expansion: hidden features of a layer's two linear maps, per feature of a token; reglu takes two for one.
        activation: between a layer's two linear maps.
        norm: of each token.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how features are dropped.
    """
    rest = {"heads": heads, "expansion": expansion, "activation": activation, "norm": norm}
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers = [
        blocks.maker("feature_tokenizer", width=width, sizes=list(columns) or None),
        blocks.maker("class_token"),
        *[blocks.maker("transformer_encoder", **rest, **drop) for _ in range(depth)],
        blocks.maker("norm", norm=norm, features="last"),
        blocks.maker("activation", activation="relu"),
    ]
    return models.build("stack", in_shape, out_shape, blocks=layers, head=class_head())


def class_head():
    """Return the head that reads the class token."""
    return heads.maker("class", pool="first")
