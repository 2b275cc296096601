"""A model of the user's own, and a callback that keeps state."""

from typing import Any

import torch
from torch import Tensor, nn

from framework import Callback, PositiveInt, Rate, Shape, Trainer, callbacks, models


@models.register("small")
class Small(nn.Module):
    """One hidden layer with batch norm and dropout."""

    def __init__(
        self, in_shape: Shape, out_shape: Shape, width: PositiveInt = 6, dropout: Rate = 0.1
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_shape[0], width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, out_shape[0]),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@callbacks.register("loss_trace")
class LossTrace(Callback):
    """Logs an exponential moving average of the loss, and a random number after each epoch."""

    def __init__(self, decay: Rate = 0.9):
        self.decay = decay
        self.average: Tensor | None = None

    def on_step_end(self, trainer: Trainer) -> None:
        loss = trainer.loss.detach()
        before = loss if self.average is None else self.average
        self.average = torch.lerp(loss, before, self.decay)

    def on_epoch_end(self, trainer: Trainer) -> None:
        assert self.average is not None
        trainer.log({"train/loss_trace": self.average, "train/random": torch.rand(())})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state.get("average")
