"""A callback that shows the features of validation samples as points in space."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import (
    Context,
    Every,
    PositiveInt,
    SettingError,
    callbacks,
    did_you_mean,
    dtensors,
    evaluation,
)
from framework.contracts.periodic_callback import ValidationCallback

from .samples import (
    labels_of,
    last_linear,
    measured_samples,
    model_outputs,
    token_texts,
    tokenizer_of,
)

THUMBNAIL = 32  # largest side in pixels
MOST_FEATURES = 4096


@callbacks.register("embeddings")
class Embeddings(ValidationCallback):
    """Shows the features of validation samples on TensorBoard's Projector page.

    A point is the input of the last linear layer for a sample; of a sequence, at its last position.
    Its label is the target; images are shown as thumbnails. Points of a class that the model tells
    apart lie together. The points of a later epoch replace those of an earlier one. It reads the
    samples, and runs the model on them.

    Args:
        count: number of samples, evenly spaced in the validation split.
        layer: name of the module whose outputs are the points, as `framework plan` shows it; null:
            the input of the last linear layer.
        tokens: also show the vectors of the token embedding, at most `count`.
        every: how often to show them.
    """

    name = "embeddings"

    def __init__(
        self,
        count: PositiveInt = 1000,
        layer: str | None = None,
        tokens: bool = False,
        every: Every = "1epoch",
    ):
        super().__init__(every)
        self.count = count
        self.layer = layer
        self.tokens = tokens

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        names = [name for name, _ in trainer.model.named_modules()]
        if self.layer is not None and self.layer not in names:
            advice = did_you_mean(self.layer, names)
            raise SettingError(f"callbacks.embeddings.layer={self.layer}: {advice}")
        if self.layer is None and last_linear(trainer.model) is None:
            raise SettingError(
                "callbacks.embeddings: the model has no linear layer; choose the module with the "
                "features by callbacks.embeddings.layer"
            )
        if self.tokens and token_embedding(trainer) is None:
            raise SettingError("callbacks.embeddings.tokens: the model has no token embedding")

    def cost(self) -> str:
        return f"runs the model on {self.count:,} samples, {self.cadence}"

    def show(self, trainer: Context) -> None:
        batch = measured_samples(trainer, self.count)
        points = self._features(trainer, batch)
        labels = labels_of(trainer, batch)
        images = evaluation.show_inputs(trainer, trainer.task.fields.only_input(batch)).images
        if images is not None and max(images.shape[-2:]) > THUMBNAIL:
            scale = THUMBNAIL / max(images.shape[-2:])
            height, width = (max(1, round(size * scale)) for size in images.shape[-2:])
            images = F.interpolate(images, (height, width), mode="area")
        step = trainer.state.step
        for logger in trainer.loggers:
            logger.embedding("features", points, labels, step, images)
        embedding = token_embedding(trainer) if self.tokens else None
        if embedding is None:
            return
        vectors = dtensors.full_tensor(embedding.weight.detach()).float().cpu()[: self.count]
        texts = token_texts(trainer, range(len(vectors)))
        for logger in trainer.loggers:
            logger.embedding("tokens", vectors, texts, step)

    def _features(self, trainer: Context, batch: Any) -> Tensor:
        """Return the features of the samples of a batch, shape (N, D) on the CPU."""
        found: list[Tensor] = []
        if self.layer is None:
            module = last_linear(trainer.model)
            assert module is not None
            hook = module.register_forward_pre_hook(lambda _, args: found.append(points(args[0])))
        else:
            module = trainer.model.get_submodule(self.layer)
            hook = module.register_forward_hook(lambda *args: found.append(points(args[2])))
        try:
            model_outputs(trainer, batch)
        finally:
            hook.remove()
        return torch.cat(found)


def points(features: Any) -> Tensor:
    """Return the features of each sample as one row, on the CPU.

    Raises:
        SettingError: the features are no tensor.
    """
    if not isinstance(features, Tensor):
        kind = type(features).__name__
        raise SettingError(f"callbacks.embeddings.layer: expected a tensor as output, got a {kind}")
    if features.ndim == 3:
        features = features[:, -1]
    rows = features.detach().flatten(1).float().cpu()
    if rows.shape[1] > MOST_FEATURES and features.ndim == 4:
        rows = features.detach().float().mean((2, 3)).cpu()
    return rows


def token_embedding(trainer: Context) -> nn.Embedding | nn.EmbeddingBag | None:
    """Return the embedding of the model with a row for each token of the data.

    If there is none, return the first embedding; None without one.
    """
    tokenizer = tokenizer_of(trainer)
    first = None
    for module in trainer.model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if tokenizer is not None and module.num_embeddings == tokenizer.size:
            return module
        first = first or module
    return first
