"""Number formats of the arithmetic."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import seeds
from .momentum import complete_momentum

NOTHING = nullcontext()
Format = Literal["fp32", "bf16", "fp16"]


class Precision:
    """Runs forward passes in a number format, and scales the loss where the format needs it (fp16)."""

    def __init__(self, format: Format, device: torch.device):
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[format]
        self.scaler: torch.amp.GradScaler | None = None
        self.needs_scaler = format == "fp16"
        self.reset()

    def reset(self) -> None:
        """Forget the scale of an earlier fit."""
        self.scaler = torch.amp.GradScaler(self.device.type) if self.needs_scaler else None

    def autocast(self) -> AbstractContextManager:
        return NOTHING if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """Run a model as it is used after training; its modules' modes and the random generators stay as they are."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with seeds.undisturbed(), torch.no_grad(), self.autocast():
                yield
        finally:
            model.train(modes[model])  # some modules do more in `train` than set a flag
            for module, mode in modes.items():
                module.training = mode

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> None:
        """Update the parameters; with a scaler, only when no gradient overflowed. `update` does as `optimizer.step`."""
        if self.scaler is None:
            update()
        else:
            complete_momentum(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
