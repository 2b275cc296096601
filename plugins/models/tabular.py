"""Models for tables with columns of numbers and of categories.

`columns` has an entry for each input: 0 for a number, n for the index of one of n categories. Index
0 is for categories that do not occur in training (see `Data.columns`). Without `columns`, all
inputs are numbers.
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
    models,
    shapes,
)


class Columns(nn.Module):
    """Split inputs (batch, columns) into numbers and learned vectors of categories.

    The vector of index 0 (a category that does not occur in training) is always zero. All vectors
    are in one table, so that a batch needs one lookup. Without categories, the vectors are None.

    Args:
        in_shape: (columns,).
        sizes: for each column 0 for a number, or the number of categories; None: all numbers.
        width: features of a vector.
        name: the name of the part, for messages.
    """

    number_at: Tensor
    index_at: Tensor
    starts: Tensor

    def __init__(self, in_shape: Shape, sizes: Sequence[int] | None, width: int, name: str):
        super().__init__()
        (inputs,) = shapes.expect(in_shape, "columns (D,)", name)
        sizes = sizes or [0] * inputs
        if len(sizes) != inputs:
            raise BuildError(f"{name}: expected sizes of {inputs} columns, got {len(sizes)}")
        column_sizes = torch.tensor(sizes)
        numbers = (column_sizes == 0).nonzero()[:, 0]
        indices = column_sizes.nonzero()[:, 0]
        self.numbers = len(numbers)
        self.categories = len(indices)
        if not self.categories:
            return
        table_sizes = column_sizes[indices]
        starts = table_sizes.cumsum(0) - table_sizes
        self.register_buffer("number_at", numbers, persistent=False)
        self.register_buffer("index_at", indices, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.table = nn.Embedding(int(table_sizes.sum()), width)
        bound = width**-0.5  # as in the code of the authors, Gorishniy et al. 2021
        with torch.no_grad():
            self.table.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.categories:
            return x, None
        rows = x.index_select(1, self.index_at).long()
        vectors = self.table(rows + self.starts) * (rows > 0).unsqueeze(2)
        return x.index_select(1, self.number_at), vectors


@blocks.register("feature_tokenizer")
class FeatureTokenizer(nn.Module):
    """A token for each column: (columns,) -> (columns, width).

    It is b + x w for a number x, and b + a learned vector for a category. The tokens of numbers
    come first (Gorishniy et al. 2021, arXiv:2106.11959, section 3.3).

    Args:
        width: features of a token.
        sizes: for each column 0 for a number, or the number of categories; null: all columns
            are numbers.
    """

    def __init__(
        self, in_shape: Shape, width: PositiveInt = 64, sizes: list[NonNegativeInt] | None = None
    ):
        super().__init__()
        self.columns = Columns(in_shape, sizes, width, "feature_tokenizer")
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(self.columns.numbers, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(in_shape[0], width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        numbers, vectors = self.columns(x)
        tokens = numbers.unsqueeze(2) * self.weight
        if vectors is not None:
            tokens = torch.cat([tokens, vectors], dim=1)
        return tokens + self.bias


@blocks.register("column_embedding")
class ColumnEmbedding(nn.Module):
    """The numbers unchanged, then a learned vector for each category: (columns,) -> (D,).

    Args:
        width: features of a category's vector.
        sizes: for each column 0 for a number, or the number of categories; null: all columns
            are numbers.
    """

    def __init__(
        self, in_shape: Shape, width: PositiveInt = 16, sizes: list[NonNegativeInt] | None = None
    ):
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
    """Residual MLP on the columns of a table.

    linear, then depth times x + dropout(linear(dropout(relu(linear(norm(x)))))), then norm, relu,
    linear (Gorishniy et al. 2021, arXiv:2106.11959, section 3.2).

    Args:
        width: features between blocks.
        depth: number of residual blocks.
        expansion: hidden features of a block, per feature between blocks.
        embedding: features of the vector of a category.
        activation: in each block, and before the last layer.
        norm: normalization of the input of each block, and before the last layer.
        dropout: probability of zeroing a hidden feature, and a feature of each branch.
        dropout_kind: how features are dropped.
    """
    hidden = max(1, round(width * expansion))
    block = blocks.maker(
        "residual_mlp",
        width=hidden,
        activation=activation,
        norm=norm,
        dropout=dropout,
        dropout_kind=dropout_kind,
    )
    layers = [
        blocks.maker("column_embedding", width=embedding, sizes=list(columns) or None),
        blocks.maker("linear", width=width, activation=None),
    ]
    layers += [block] * depth
    layers.append(blocks.maker("norm", norm=norm))
    layers.append(blocks.maker("activation", activation=activation))
    return models.build("stack", in_shape, out_shape, blocks=layers, head="class")


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
    """Transformer over the columns of a table, each column being a token (FT-Transformer).

    Gorishniy et al. 2021, arXiv:2106.11959, section 3.3. The last layers (norm, relu, linear) read
    a class token. Unlike in the paper, the first layer also has a norm before the attention.

    Args:
        width: features of a token.
        depth: number of stacked layers.
        heads: number of attention heads; must divide width.
        expansion: hidden features of the two linear layers, per feature of a token; reglu halves
            them.
        activation: between the two linear layers.
        norm: normalization of each token.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how features are dropped.
    """
    layer = blocks.maker(
        "transformer_encoder",
        heads=heads,
        expansion=expansion,
        activation=activation,
        norm=norm,
        dropout=dropout,
        dropout_kind=dropout_kind,
    )
    layers = [
        blocks.maker("feature_tokenizer", width=width, sizes=list(columns) or None),
        blocks.maker("class_token"),
    ]
    layers += [layer] * depth
    layers.append(blocks.maker("norm", norm=norm, features="last"))
    layers.append(blocks.maker("activation", activation="relu"))
    head = {"name": "class", "pool": "first"}  # reads the class token
    return models.build("stack", in_shape, out_shape, blocks=layers, head=head)
