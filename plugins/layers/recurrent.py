"""Recurrent blocks over sequences (T, D)."""

from typing import Literal

from torch import Tensor, nn

from framework import PositiveInt, Rate, Shape, blocks, shapes


class Recurrent(nn.Module):
    """A recurrent layer of torch that returns one tensor: all outputs, or the last hidden state.

    Args:
        layer: an LSTM or GRU with batch_first=True.
        outputs: all: (batch, T, D); last: (batch, D).
    """

    def __init__(self, layer: nn.LSTM | nn.GRU, outputs: str):
        super().__init__()
        self.layer = layer
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.layer(x)
        if self.outputs == "all":
            return outputs
        hidden = state[0] if isinstance(state, tuple) else state  # an LSTM returns (hidden, cell)
        directions = 1 + self.layer.bidirectional
        return hidden[-directions:].transpose(0, 1).flatten(1)


@blocks.register("lstm")
def lstm(
    in_shape: Shape,
    width: PositiveInt = 128,
    depth: PositiveInt = 1,
    bidirectional: bool = False,
    outputs: Literal["all", "last"] = "all",
    dropout: Rate = 0.0,
) -> nn.Module:
    """Long short-term memory: (T, D) -> (T, width), or (width,) with outputs=last.

    Hochreiter & Schmidhuber 1997.

    Args:
        width: features of the hidden state; the output has twice as many with bidirectional=true.
        depth: number of stacked layers.
        bidirectional: read the sequence in both directions.
        outputs: all steps, or the last step of each direction (for the backward one: the first).
        dropout: probability of zeroing an output between layers.
    """
    return recurrent(nn.LSTM, "lstm", in_shape, width, depth, bidirectional, outputs, dropout)


@blocks.register("gru")
def gru(
    in_shape: Shape,
    width: PositiveInt = 128,
    depth: PositiveInt = 1,
    bidirectional: bool = False,
    outputs: Literal["all", "last"] = "all",
    dropout: Rate = 0.0,
) -> nn.Module:
    """Gated recurrent unit: (T, D) -> (T, width), or (width,) with outputs=last.

    Cho et al. 2014, arXiv:1406.1078.

    Args:
        width: features of the hidden state; the output has twice as many with bidirectional=true.
        depth: number of stacked layers.
        bidirectional: read the sequence in both directions.
        outputs: all steps, or the last step of each direction (for the backward one: the first).
        dropout: probability of zeroing an output between layers.
    """
    return recurrent(nn.GRU, "gru", in_shape, width, depth, bidirectional, outputs, dropout)


def recurrent(
    layer: type[nn.LSTM | nn.GRU],
    name: str,
    in_shape: Shape,
    width: int,
    depth: int,
    bidirectional: bool,
    outputs: str,
    dropout: float,
) -> Recurrent:
    """Build a recurrent layer with the batch as the first axis."""
    _, features = shapes.expect(in_shape, "(T, D)", name)
    between = dropout if depth > 1 else 0.0  # torch warns about dropout in a single layer
    built = layer(
        features, width, depth, batch_first=True, dropout=between, bidirectional=bidirectional
    )
    return Recurrent(built, outputs)
