"""The number format of the arithmetic, and the scaling of the loss that fp16 needs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import seeds
from .modes import restored_modes
from .momentum import complete_momentum

Format = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_AUTOCAST = nullcontext()


class Precision:
    """Runs forward passes in a number format.

    Args:
        number_format: fp32, or bf16 or fp16 for automatic mixed precision.
        device: the device of the model.

    Attributes:
        dtype: the dtype of autocast; None for fp32.
        scaler: scales the loss, so that small gradients do not vanish; None except for fp16.
    """

    def __init__(self, number_format: Format, device: torch.device):
        self.device = device
        self.dtype = AUTOCAST_DTYPES[number_format]
        self.scaler: torch.amp.GradScaler | None = None
        self.needs_scaler = number_format == "fp16"
        self.reset()

    def reset(self) -> None:
        """Forget the loss scale of an earlier fit."""
        self.scaler = torch.amp.GradScaler(self.device.type) if self.needs_scaler else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for a forward pass and the loss."""
        return NO_AUTOCAST if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """Run a model in evaluation mode without gradients.

        Afterwards the modes of its modules and the global random generators are as before. Its
        buffers are not copied, which a large model would pay for in each validation.
        """
        with restored_modes(model):
            model.eval()
            with seeds.undisturbed(), torch.no_grad(), self.autocast():
                yield

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to call `backward` on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of an optimizer by the loss scale."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> None:
        """Update the parameters; with a scaler, only if all gradients are finite.

        Args:
            optimizer: holds the parameters and their gradients.
            update: does the same as `optimizer.step`; called where there is no scaler.
        """
        if self.scaler is None:
            update()
            return
        complete_momentum(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the scaler."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
