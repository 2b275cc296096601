"""A callback that shows where the attention layers of a model look."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from framework import (
    Batch,
    Context,
    Every,
    PositiveInt,
    SettingError,
    callbacks,
    drawing,
    evaluation,
    select_rows,
)
from framework.contracts.periodic_callback import ValidationCallback

from .samples import (
    labels_of,
    measured_samples,
    model_outputs,
    token_texts,
)

MAP = 80  # pixels of a map at least, so that four fit into a card of TensorBoard
MOST_NAMED = 32  # tokens beside a map
MOST_HEADS = 8
MOST_LAYERS = 12
GAP = 6
NAME = 12  # pixels of a token's name
PICTURE = 64  # pixels of the sample
LINE = 14  # pixels of a line of text
MARGIN = 64  # pixels for the names of tokens


@callbacks.register("attention")
class AttentionMaps(ValidationCallback):
    """Shows the attention weights of all layers and heads for some validation samples.

    An image for each sample: a row for each layer, a map for each head. A row of a map is a query,
    a column a key; white is the largest weight of its row. The weights are computed again from the
    queries and keys of `scaled_dot_product_attention`, which all attention layers of the framework
    call; layers that compute attention otherwise are not shown. Padding at the end is left out.

    Args:
        count: number of samples, evenly spaced in the validation split.
        every: how often to show them.
    """

    name = "attention"

    def __init__(self, count: PositiveInt = 2, every: Every = "1epoch"):
        super().__init__(every)
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        attention_of(trainer, measured_samples(trainer, 1))

    def cost(self) -> str:
        return f"runs the model on {self.count:,} samples, {self.cadence}"

    def show(self, trainer: Context) -> None:
        batch = measured_samples(trainer, self.count)
        pictures = evaluation.show_inputs(trainer, trainer.task.fields.only_input(batch)).images
        for number, label in enumerate(labels_of(trainer, batch)):
            sample = select_rows(batch, number, number + 1)
            all_weights = attention_of(trainer, sample)
            inputs = trainer.task.fields.only_input(sample)
            names = None
            if not inputs.is_floating_point() and inputs.ndim == 2:
                names = token_texts(trainer, inputs[0].tolist())
            weights = without_padding(all_weights)
            if names is not None and len(names) == all_weights[0].shape[1]:
                names = names[: weights[0].shape[1]]
            picture = None if pictures is None else pictures[number]
            image = attention_image(weights, names, picture, label)
            for logger in trainer.loggers:
                logger.images(f"attention/{number}", image, trainer.state.step)


class AttentionRecorder(TorchFunctionMode):
    """Records the weights of each call of `scaled_dot_product_attention` in a block.

    Attributes:
        weights: of the first sample, each of shape (heads, queries, keys), on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(attention_weights(*args, **kwargs))
        return function(*args, **kwargs)


def attention_of(trainer: Context, sample: Batch) -> list[Tensor]:
    """Return the weights of each layer for a batch of one sample.

    Raises:
        SettingError: the model has no attention that can be recorded.
    """
    with AttentionRecorder() as recorder:
        model_outputs(trainer, sample)
    if not recorder.weights:
        raise SettingError(
            f"callbacks.attention: model {type(trainer.model).__name__} calls no "
            "scaled_dot_product_attention"
        )
    return recorder.weights


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights of the first sample: softmax(query keyᵀ / √D), shape (heads, T, S).

    The arguments are those of `scaled_dot_product_attention`.
    """
    query = query[0].float()
    key = key[0].float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = factor * query @ key.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        mask = attn_mask[0] if attn_mask.ndim == value.ndim else attn_mask
        hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
        scores = scores.masked_fill(hidden, -math.inf)
        if mask.is_floating_point():
            scores = scores + mask
    weights = scores.softmax(-1).nan_to_num(0)
    return weights.reshape(-1, *weights.shape[-2:]).detach().cpu()


def without_padding(layers: list[Tensor]) -> list[Tensor]:
    """Return the weights without the positions at the end to which no query of any layer attends.

    Args:
        layers: of each layer, shape (heads, T, S); unchanged unless all have the same T = S.
    """
    size = layers[0].shape[-1]
    if any(weights.shape[1:] != (size, size) for weights in layers):
        return layers
    attended = torch.zeros(size, dtype=torch.bool)
    for weights in layers:
        attended |= weights.amax((0, 1)) > 0
    length = int(attended.nonzero().max()) + 1 if attended.any() else size
    return [weights[:, :length, :length] for weights in layers]


def attention_image(
    layers: list[Tensor], names: list[str] | None, picture: Tensor | None, label: str
) -> Tensor:
    """Return the weights of all layers as one image (1, 3, height, width).

    Args:
        layers: of each layer, shape (heads, T, S).
        names: of the tokens; written beside the maps if there are at most MOST_NAMED.
        picture: the image of the sample, (channels, H, W), or None.
        label: of the sample.
    """
    layers = layers[:MOST_LAYERS]
    named = names is not None and len(names) <= MOST_NAMED
    heads = min(MOST_HEADS, max(len(weights) for weights in layers))
    left = MARGIN if named else GAP
    size = max(MAP, (drawing.CARD - left) // heads - GAP)
    if named and names is not None:
        size = max(size, NAME * len(names))
    top = GAP
    if picture is not None:
        top += PICTURE + GAP
    if label:
        top += LINE
    height = size + GAP + LINE
    width = max(drawing.CARD, left + heads * (size + GAP))
    canvas = drawing.Canvas(width, top + len(layers) * height, 10)
    if picture is not None:
        canvas.paste(picture, left, GAP, PICTURE, PICTURE)
    canvas.text(left, top - LINE / 2, label, "lm")
    for row, weights in enumerate(layers):
        upper = top + row * height + LINE
        canvas.text(left, upper - 7, f"layer {row + 1}, {len(weights)} heads", "lm")
        for column, weight in enumerate(weights[:heads]):
            shown = weight / weight.amax(1, keepdim=True).clamp(min=1e-12)
            canvas.paste(shown[None], left + column * (size + GAP), upper, size, size)
        if not named or names is None or weights.shape[1] != len(names):
            continue
        cell = size / len(names)
        for number, name in enumerate(names):
            text = drawing.cut_to_width(canvas, name, MARGIN - 6)
            canvas.text(left - 4, upper + (number + 0.5) * cell, text, "rm")
    return canvas.tensor()
